"""SIGKILL at random moments, the same command again, and in the end the bits of an undisturbed run.

    python -m tests.stress.kills --kills 25     # about half an hour on two cores; tests/test_kills.py is the short one

Training (one process, and two through the launcher: the launcher or a rank is killed), `encode` and `generate.py` on
the toy's networks. Prints one line for each; the exit status is 1 if anything differs.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from models import checkpoint
from runtime.run import newest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300                                                    # seconds without progress
ATTACKED = ("encode", "train", "generate", "train-2")             # train-2: two processes
TIMED = ("images_per_second", "data_wait")                        # of a log line: differ between equal runs


# ---- killing

def program(*line, output=None, **environment: str) -> Callable[[], subprocess.Popen]:
    """A function that starts `python *line` in the root of the project; its output goes to the file `output`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, *map(str, line)]
    return lambda: subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)


def children(pid: int) -> list[int]:
    """In the order of their start; each thread has a list of its own."""
    try:
        lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return sorted(int(child) for text in lists for child in text.split())


def family(pid: int) -> list[int]:
    """A process, its children, and theirs."""
    return [pid, *(one for child in children(pid) for one in family(child))]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill(start: Callable, progress: Callable[[], object], victims: Iterable[int], rng: random.Random, most: int):
    """Start a process once per victim, and kill the victim after 1 to `most` changes of `progress()`.

    A victim is 0 for the process of `start()`, n for its child n. Raises AssertionError if one of its family is left.
    """
    for victim in victims:
        process = start()
        wait_for_changes(progress, process, rng.randint(1, most))
        time.sleep(rng.random() * 0.1)
        members = family(process.pid)
        os.kill([process.pid, *children(process.pid)][victim], 9)
        process.wait(PATIENCE)
        gone_at = time.monotonic() + 15                           # loader workers look for their rank every 5 seconds
        while any(map(runs, members)) and time.monotonic() < gone_at:
            time.sleep(0.05)
        assert not any(map(runs, members)), f"processes are left after victim {victim} was killed"


def wait_for_changes(progress: Callable[[], object], process, wanted: int) -> None:
    """Wait until `progress()` has changed `wanted` times. Raises AssertionError if the process ends or hangs."""
    last, changed_at = progress(), time.monotonic()
    while wanted:
        if (now := progress()) != last:
            last, wanted, changed_at = now, wanted - 1, time.monotonic()
        assert process.poll() is None, "ended before it was killed"
        assert time.monotonic() < changed_at + PATIENCE, "no progress"
        time.sleep(0.002)


def log_written(experiment: Path) -> Callable[[], int]:
    """Progress of a training run: when its log was written last."""
    log = experiment / "metrics.jsonl"
    return lambda: log.stat().st_mtime_ns if log.exists() else 0


def files_written(folder: Path) -> Callable[[], int]:
    """Progress of other programs: the number of files in a folder."""
    return lambda: sum(len(names) for _, _, names in os.walk(folder))


# ---- comparing

def same(a, b) -> bool:
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def log_of(experiment: Path) -> list[dict]:
    lines = [json.loads(line) for line in (experiment / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_run(experiment: Path, undisturbed: Path) -> None:
    """Equal: the last checkpoint (weights, EMA, optimiser, step), losses, grids, and the names of all files."""
    ours, theirs = (checkpoint.read(newest(folder)) for folder in (experiment, undisturbed))
    assert ours.keys() == theirs.keys() and all(same(ours[part], theirs[part]) for part in ours.keys() - {"args"})
    assert log_of(experiment) == log_of(undisturbed)
    assert contents(experiment / "grids") == contents(undisturbed / "grids")
    assert {path.name for path in experiment.rglob("*")} == {path.name for path in undisturbed.rglob("*")}


def assert_same_files(folder: Path, undisturbed: Path) -> None:
    ours, theirs = contents(folder), contents(undisturbed)
    different = [name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)]
    assert not different, different


# ---- by hand

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=25, help="of each")
    parser.add_argument("--only", choices=ATTACKED, nargs="+", default=ATTACKED, help="what to kill (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    folder, n, rng = Path(tempfile.mkdtemp(prefix="kills-")), args.kills, random.Random(args.seed)
    data, output = folder / "data", open(folder / "output.txt", "ab")  # noqa: SIM115  (until the end)
    tools = ["-m", "preprocessing.dataset_tools"]

    def do(*line, **environment) -> None:
        assert program(*line, output=output, **environment)().wait() == 0, f"{line} failed"

    encode = [*tools, "encode", "--source", data / "images", "--model-url", "toy/networks/vae", "--batch-size", "4",
              "--dest"]
    train = ["train.py", "--data-dir", data, "--enc-type", "local-dir:toy/networks/encoder", "--vae",
             "toy/networks/vae", "--model", "SiT-T/2", "--projector-dim", "64", "--batch-size", "8",
             "--gradient-accumulation-steps", "2", "--num-workers", "2", "--logging-steps", "1",
             "--checkpointing-steps", "3", "--keep-last", "2", "--sampling-steps", "50", "--exp-name", "run"]
    sample = ["generate.py", "--ckpt", folder / "run", "--num-fid-samples", 40 * n, "--per-proc-batch-size", "4",
              "--num-steps", "8", "--save-cls-tokens", "--sample-dir"]
    print(f"output of the programs: {output.name}", flush=True)
    do("-m", "toy.draw", "--dest", data / "raw", "--num-images", 60 * n)
    do(*tools, "convert", "--source", data / "raw", "--dest", data / "images", "--resolution", "32x32")
    do(*encode, data / "vae-sd")
    do(*train, "--output-dir", folder, "--max-train-steps", 3)

    def attack(name: str) -> None:
        ours, theirs = folder / name / "killed", folder / name / "undisturbed"
        if name == "encode":
            do(*encode, theirs)
            kill(program(*encode, ours, output=output), files_written(ours), n * [0], rng, 8)
            do(*encode, ours)
            assert_same_files(ours, theirs)
        elif name == "generate":
            do(*sample, theirs)
            kill(program(*sample, ours, output=output), files_written(ours), n * [0], rng, 20)
            do(*sample, ours)
            assert_same_files(ours, theirs)
        else:
            ranks = 2 if name == "train-2" else 1
            launcher = ["-m", "runtime.launch"] if ranks == 2 else []
            line = [*launcher, *train, "--max-train-steps", 12 * n, "--output-dir"]
            victims = [rng.randint(0, 2) if ranks == 2 else 0 for _ in range(n)]
            do(*line, theirs, NUM_GPUS=str(ranks))
            kill(program(*line, ours, output=output, NUM_GPUS=str(ranks)), log_written(ours / "run"), victims, rng, 10)
            do(*line, ours, NUM_GPUS=str(ranks))
            assert_same_run(ours / "run", theirs / "run")

    failed = False
    for name in args.only:
        began = time.monotonic()
        try:
            attack(name)
            outcome = "equal to the undisturbed run"
        except AssertionError as error:
            outcome, failed = f"DIFFERENT: {error}", True
        print(f"{name}: {n} kills, {outcome} ({(time.monotonic() - began) / 60:.1f} min)", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
