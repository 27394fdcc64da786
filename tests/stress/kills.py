"""SIGKILL at random moments, the same command again, and at the end the bits of an undisturbed run.

    python -m tests.stress.kills --kills 25            # by hand, about half an hour on two cores; tests/test_kills.py is the short one

Training (one process, and two through the launcher, of which the launcher or a rank is killed), `encode` and `generate.py` on the
toy's networks. Prints one line for each; the exit status is 1 if anything differs.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from models import checkpoint
from runtime import run as run_disk

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
PATIENCE = 120                                                    # seconds without progress after which something hangs
ATTACKED = ("encode", "train", "generate", "train-2")             # train-2: two processes
TIMED = ("images_per_second", "data_wait")                        # of a log line; everything else is the same in every run


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def family(pid: int) -> list[int]:
    """A process, its children, and theirs."""
    return [pid, *(one for child in children(pid) for one in family(child))]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_and_restart(command: list[str], progress: Callable[[], object], kills: int, rng: random.Random, most: int) -> None:
    """Start `command` so many times and kill it each time after 1 to `most` changes of `progress()`; then let it end.

    With several processes the victim is the launcher or one of its ranks; either way none may be left. Raises AssertionError.
    """
    for _ in range(kills):
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in changes(progress, process, rng.randint(1, most)):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)
        members = family(process.pid)
        victim = rng.choice([process.pid, *children(process.pid)]) if "runtime.launch" in command else process.pid
        os.kill(victim, 9)
        process.wait(PATIENCE)
        gone_at = time.monotonic() + 15                           # loader workers look for their rank every five seconds
        while any(map(runs, members)) and time.monotonic() < gone_at:
            time.sleep(0.05)
        assert not any(map(runs, members)), f"{command} left processes after {victim} was killed"
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def changes(progress: Callable[[], object], process: subprocess.Popen, wanted: int) -> Iterator[None]:
    """Yield between looks until `progress()` has changed so often; raises AssertionError if the process ends before, or hangs."""
    seen, last, looked = 0, progress(), time.monotonic()
    while seen < wanted:
        now = progress()
        if now != last:
            seen, last, looked = seen + 1, now, time.monotonic()
        assert process.poll() is None, f"ended before it was killed: {process.stderr.read().decode()}"
        assert time.monotonic() < looked + PATIENCE, "no progress"
        yield


# -------------------------------------------------------------------------------------------------------------- what is compared

def same(a, b) -> bool:
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def log_of(experiment: Path) -> list[dict]:
    lines = [json.loads(line) for line in (experiment / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMED} for line in lines]


def assert_same_run(experiment: Path, undisturbed: Path) -> None:
    """Checkpoints (weights, EMA, optimiser, scaler, counters), losses and grids; and no other file lies about."""
    ours, theirs = (checkpoint.read(run_disk.newest(folder)) for folder in (experiment, undisturbed))
    parts = ours.keys() - {"args"}
    assert parts == theirs.keys() - {"args"} and all(same(ours[part], theirs[part]) for part in parts)
    assert log_of(experiment) == log_of(undisturbed)
    assert contents(experiment / "grids") == contents(undisturbed / "grids")
    assert {path.name for path in experiment.rglob("*")} == {path.name for path in undisturbed.rglob("*")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_files(folder: Path, undisturbed: Path) -> None:
    ours, theirs = contents(folder), contents(undisturbed)
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    # settings.json names the checkpoint's and the decoder's folders, which are the same; everything must be.
    assert all(ours[name] == theirs[name] for name in ours), [name for name in ours if ours[name] != theirs[name]]


def kill_training(flags: list[str], folder: Path, processes: int, kills: int, seed: int, most: int) -> None:
    """`flags` of train.py without --output-dir; both runs end at their --max-train-steps."""
    launcher = ["-m", "runtime.launch"] if processes > 1 else []
    ENVIRONMENT["NUM_GPUS"] = str(processes)
    command = [sys.executable, *launcher, "train.py", *flags, "--exp-name", "run", "--output-dir"]
    subprocess.run([*command, str(folder / "undisturbed")], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    log = folder / "killed" / "run" / "metrics.jsonl"
    kill_and_restart([*command, str(folder / "killed")], lambda: log.stat().st_mtime_ns if log.exists() else 0, kills, random.Random(seed),
                     most)
    assert_same_run(folder / "killed" / "run", folder / "undisturbed" / "run")


# ------------------------------------------------------------------------------------------------------------------------ by hand

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=25, help="of each")
    parser.add_argument("--only", choices=ATTACKED, nargs="+", default=ATTACKED, help="what to kill (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    data, n = folder / "data", args.kills
    tools = [sys.executable, "-m", "preprocessing.dataset_tools"]

    def do(*command) -> None:
        subprocess.run([str(part) for part in command], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)

    do(sys.executable, "-m", "toy.draw", "--dest", data / "raw", "--num-images", 60 * n, "--seed", "0")
    do(*tools, "convert", "--source", data / "raw", "--dest", data / "images", "--resolution=32x32")
    encode = [*tools, "encode", "--source", data / "images", "--model-url", "toy/networks/vae", "--batch-size", "4", "--dest"]
    train = ["--data-dir", data, "--enc-type", "local-dir:toy/networks/encoder", "--vae", "toy/networks/vae", "--model", "SiT-T/2",
             "--projector-dim", "64", "--batch-size", "8", "--gradient-accumulation-steps", "2", "--num-workers", "2",
             "--logging-steps", "1", "--checkpointing-steps", "3", "--keep-last", "2", "--sampling-steps", "50",
             "--max-train-steps", 12 * n]
    sample = [sys.executable, "generate.py", "--ckpt", folder / "run", "--num-fid-samples", 40 * n,
              "--per-proc-batch-size", "4", "--num-steps", "8", "--save-cls-tokens", "--sample-dir"]
    do(*encode, data / "vae-sd")
    do(sys.executable, "train.py", *train, "--output-dir", folder, "--exp-name", "run", "--max-train-steps", "3")
    rng = random.Random(args.seed)

    def files(place: Path) -> Callable[[], int]:
        return lambda: sum(len(names) for _, _, names in os.walk(place))

    def kill_encode() -> None:
        command = [str(part) for part in [*encode, folder / "moments"]]
        kill_and_restart(command, files(folder / "moments"), n, rng, 8)
        assert_same_files(folder / "moments", data / "vae-sd")

    def kill_generate() -> None:
        do(*sample, folder / "undisturbed")
        command = [str(part) for part in [*sample, folder / "samples"]]
        kill_and_restart(command, files(folder / "samples"), n, rng, 20)
        assert_same_files(folder / "samples", folder / "undisturbed")

    def kill_train(processes: int) -> None:
        kill_training([str(part) for part in train], folder / f"train-{processes}", processes, n, args.seed, 10)

    attacks = dict(zip(ATTACKED, (kill_encode, lambda: kill_train(1), kill_generate, lambda: kill_train(2)), strict=True))
    failed = False
    for name in args.only:
        began = time.monotonic()
        try:
            attacks[name]()
            outcome = "equal to the undisturbed run"
        except AssertionError as error:
            outcome, failed = f"DIFFERENT: {error}", True
        print(f"{name}: {n} kills, {outcome} ({(time.monotonic() - began) / 60:.1f} min)", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
