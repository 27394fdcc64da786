"""Two processes that do the same at once: one is refused or both succeed, and the result is that of one alone.

    python -m tests.stress.races --times 50     # about twenty minutes on two cores; tests/test_survival.py is short

Writers of one file, `convert`, `encode` to a zip and to a folder, `generate.py` and training on the toy's networks.
Prints one line for each; the exit status is 1 if anything is damaged.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import generate
import train
from preprocessing import dataset_tools
from runtime import files
from runtime.files import write_whole
from tests import forks
from tests.stress.kills import assert_same_run, contents
from toy import draw

KINDS = ("write", "convert", "encode-zip", "encode-folder", "generate", "train")


def outcome(folder: Path) -> dict[str, bytes]:
    """All files below a folder but the catalogues, whose zip entries have a date, and locks."""
    return {name: data for name, data in contents(folder).items() if "catalogue" not in name and ".lock" not in name}


def write(path: Path) -> None:
    """One file ten times, in pieces."""
    for _ in range(10):
        def pieces(partial: Path) -> None:
            with open(partial, "wb", buffering=0) as file:
                for _ in range(50):
                    file.write(b"0123456789" * 100)

        write_whole(path, pieces)


def quietly(output: Path, function, argument) -> None:
    handle = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    function(argument)


def race(output: Path, function, argument, rng: random.Random, most: float) -> str:
    """Run two processes, the second up to `most` seconds later; returns their exit statuses.

    Raises AssertionError unless at least one has succeeded and none has failed but with a sentence.
    """
    first = forks.start(quietly, output, function, argument)
    time.sleep(rng.choice((0, rng.random() * most)))
    second = forks.start(quietly, output, function, argument)
    statuses = sorted(process.wait(300) for process in (first, second))
    assert statuses in ([0, 0], [0, 2]), f"exit statuses {statuses}, see {output}"
    return "both succeeded" if statuses == [0, 0] else "one was refused"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--times", type=int, default=50, help="of each")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS, help="what to race (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    folder, rng, failed = Path(tempfile.mkdtemp(prefix="races-")), random.Random(args.seed), False
    files.LOCK_PATIENCE = 0.1
    data, networks = folder / "data", Path("toy/networks").resolve()
    print(f"output of the programs: {folder / 'output.txt'}", flush=True)

    def do(function, argv, dest: Path) -> None:
        assert forks.start(quietly, folder / "output.txt", function, [*map(str, argv), str(dest)]).wait() == 0

    tools = dataset_tools.main
    convert = ["convert", "--source", data / "raw", "--resolution", "32x32", "--workers", "1", "--dest"]
    encode = ["encode", "--source", data / "images", "--model-url", networks / "vae", "--batch-size", "4", "--dest"]
    training = ["--data-dir", data, "--enc-type", f"local-dir:{networks / 'encoder'}", "--vae", networks / "vae",
                "--model", "SiT-T/2", "--projector-dim", "64", "--batch-size", "4", "--num-workers", "1",
                "--max-train-steps", "4", "--checkpointing-steps", "2", "--exp-name", "run", "--output-dir"]
    sample = ["--ckpt", folder / "run", "--num-fid-samples", "24", "--per-proc-batch-size", "4", "--num-steps", "2",
              "--sample-dir"]
    do(draw.main, ["--num-images", "40", "--dest"], data / "raw")
    do(tools, convert, data / "images")
    do(tools, encode, data / "vae-sd")
    do(train.main, training, folder)
    kinds = {"convert": (tools, convert, "x.zip", 1.0), "encode-zip": (tools, encode, "x.zip", 1.0),
             "encode-folder": (tools, encode, "x", 1.0), "generate": (generate.main, sample, "", 2.0),
             "train": (train.main, training, "", 2.0)}

    for kind in args.only:
        began, seen, alone, raced = time.monotonic(), Counter(), folder / "alone" / kind, folder / "raced" / kind
        try:
            if kind != "write":
                function, argv, name, most = kinds[kind]
                do(function, argv, alone / name)
            for _ in range(args.times):
                shutil.rmtree(raced, ignore_errors=True)
                if kind == "write":
                    raced.mkdir(parents=True)
                    seen[race(folder / "output.txt", write, raced / "x", rng, 0.01)] += 1
                    assert contents(raced) == {"x": b"0123456789" * 5000}, "damaged"
                    continue
                seen[race(folder / "output.txt", function, [*map(str, argv), str(raced / name)], rng, most)] += 1
                if kind == "train":
                    assert_same_run(raced / "run", alone / "run")
                else:
                    assert outcome(raced) == outcome(alone), "another result"
            result = ", ".join(f"{count} times {what}" for what, count in sorted(seen.items()))
        except AssertionError as error:
            result, failed = f"DAMAGED: {error}", True
        print(f"{kind}: {args.times} races, {result} ({(time.monotonic() - began) / 60:.1f} min)", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
