"""Train SiT, REPA and REG side by side on the toy, and compare their distance to the data at equal steps.

    python -m toy.compare --scale cpu
    python -m toy.compare --scale gpu --minutes 30
    python -m toy.compare --scale words

Every run is an ordinary run of train.sh with --eval-steps; only its metrics.jsonl is read. The same command continues
what is unfinished.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch

from runtime.arguments import Parser, positive
from runtime.files import make_folder, require_same_settings, write_json, write_whole
from runtime.log import read_lines
from runtime.messages import UserError, notice, say, without_traceback
from runtime.stopping import STOPPED, StopRequest
from toy.summary import METHODS, convergence, side_by_side, summarise, table

ROOT = Path(__file__).parents[1]
COMMON = {"--proj-coeff": 0.5, "--cls": 0.03, "--ema-decay": 0.99, "--keep-last": 1,
          "--features": "local-dir:toy/networks/features"}
# Flags for `train.sh toy` or, with captions, `train.sh toy-t2i`, equal for all methods; the recipe has the rest.
SCALES = {
    "cpu": COMMON | {
        "--resolution": 32, "--model": "SiT-T/2", "--batch-size": 64, "--encoder-depth": 2, "--learning-rate": 6e-3,
        "--max-train-steps": 2000, "--checkpointing-steps": 500, "--eval-steps": 500, "--sampling-steps": 2000,
        "--eval-samples": 1024, "--mixed-precision": "no", "--num-workers": 0},
    "gpu": COMMON | {
        "--resolution": 64, "--model": "SiT-S/2", "--batch-size": 256, "--encoder-depth": 4, "--learning-rate": 1e-3,
        "--max-train-steps": 1500, "--checkpointing-steps": 250, "--eval-steps": 250, "--sampling-steps": 1500,
        "--eval-samples": 2048, "--mixed-precision": "bf16", "--num-workers": 12, "--projector-dim": 1024},
    "words": COMMON | {
        "--resolution": 32, "--model": "MMDiT-T/2", "--batch-size": 32, "--encoder-depth": 4, "--learning-rate": 4e-3,
        "--max-train-steps": 400, "--checkpointing-steps": 400, "--eval-steps": 400, "--sampling-steps": 400,
        "--eval-samples": 256, "--mixed-precision": "no", "--num-workers": 0},
}
RECIPES = {"cpu": "toy", "gpu": "toy", "words": "toy-t2i"}
DATA = {"cpu": ("data/toy", 8192), "gpu": ("data/toy64", 32768), "words": ("data/toy-t2i", 8192)}  # folder, images
SEEDS = {"cpu": 3, "gpu": 3, "words": 1}
FOUR = ("sit", "repa", "class-token", "reg")
COMPARED = {"cpu": FOUR, "gpu": tuple(METHODS), "words": FOUR}


def train_command(recipe: str, flags: dict, method: str, seed: int) -> list[str]:
    """The command of one run, whose folder is METHOD-seedSEED."""
    flags = flags | {"--seed": seed, "--exp-name": f"{method}-seed{seed}"}
    return ["env", f"METHOD={METHODS[method].name}", "bash", "train.sh", recipe,
            *(str(part) for pair in flags.items() for part in pair), *METHODS[method].flags]      # a later flag wins


def read_curve(run: Path) -> dict[int, float]:
    """The scores in a run's metrics.jsonl: {step: Frechet distance in the toy's features}."""
    lines = read_lines(run / "metrics.jsonl")
    return {line["step"]: line[key] for line in lines for key in line if key.startswith("fd_")}


def train_all(commands: dict[str, list[str]], environment: dict[str, str], output: Path, at_once: int,
              deadline: float, finished: Callable[[], object]) -> None:
    """Run named commands, `at_once` at a time, with their output in `output/NAME.log`; call `finished` after each.

    A run starts only if the longest so far would end before `deadline` (time.monotonic). A signal makes all runs save,
    and ends this process with status 75. Raises UserError if a run fails; the others save, too.
    """
    waiting, running, longest = list(commands), {}, 0.0
    with StopRequest() as stop:
        try:
            while not stop.asked:
                while waiting and len(running) < at_once and time.monotonic() + longest < deadline:
                    name = waiting.pop(0)
                    say(f"{name} starts")
                    with open(output / f"{name}.log", "a", encoding="utf-8") as log:
                        process = subprocess.Popen(commands[name], cwd=ROOT, env=environment, stdout=log,
                                                   stderr=subprocess.STDOUT, start_new_session=True)
                    running[name] = process, time.monotonic()
                if not running:
                    return
                time.sleep(0.2)
                for name in [name for name, (process, _) in running.items() if process.poll() is not None]:
                    process, began = running.pop(name)
                    if process.returncode == STOPPED:
                        sys.exit(STOPPED)
                    if process.returncode:
                        raise UserError(f"{output / name}.log: the run ended with status {process.returncode}")
                    longest = max(longest, time.monotonic() - began)
                    finished()
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.wait()
    notice("stopped; the same command continues")
    sys.exit(STOPPED)


def report(scale: str, settings: dict, output: Path) -> str:
    """Write results.json, tables.md, convergence.png and samples.png from the finished runs, and return the table."""
    last, curves, missing = settings["--max-train-steps"], {}, []
    for seed, method in product(range(SEEDS[scale]), COMPARED[scale]):
        curve = read_curve(output / f"{method}-seed{seed}")
        if last in curve:
            curves.setdefault(method, {})[seed] = curve
        else:
            missing.append(f"{method}-seed{seed}")
    summary = summarise(curves)
    write_json(output / "results.json", {"settings": settings, "torch": torch.__version__, "curves": curves,
                                         "summary": summary, "not_run": missing})
    text = table(summary) + f"\nNot run: {', '.join(missing)}.\n" * bool(missing)
    write_whole(output / "tables.md", lambda partial: partial.write_text(text, encoding="utf-8"))
    shown = {method: output / f"{method}-seed{min(seeds)}/grids/{last:07d}.png" for method, seeds in curves.items()}
    for name, figure in (("convergence.png", convergence(summary)), ("samples.png", side_by_side(shown))):
        write_whole(output / name, lambda partial, figure=figure: figure.savefig(partial, format="png", dpi=130))
    return text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=tuple(SCALES), default="cpu", help="size of the comparison")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="prepared data; None: data/toy and alike")
    parser.add_argument("--output", type=Path, metavar="DIR", help="runs and results; None: exps/compare-SCALE")
    parser.add_argument("--learning-rate", type=positive, metavar="LR",
                        help="None: 6e-3 for cpu, 1e-3 for gpu, 4e-3 for words")
    parser.add_argument("--minutes", type=positive, help="start no run that would probably end later; None: no limit")
    return parser.parse_args(argv)


@without_traceback
def main(argv: list[str] | None = None) -> None:
    args, began = parse_args(argv), time.monotonic()
    if args.scale == "gpu" and not torch.cuda.is_available():
        raise UserError("--scale gpu: no CUDA device; use --scale cpu")
    folder, num_images = DATA[args.scale]
    data = (args.data_dir or ROOT / folder).resolve()
    output = make_folder((args.output or ROOT / "exps" / f"compare-{args.scale}").resolve())
    settings = SCALES[args.scale] | ({"--learning-rate": args.learning_rate} if args.learning_rate else {})
    kept = output / "settings.json"
    if kept.exists():
        found = json.loads(kept.read_text(encoding="utf-8"))
        require_same_settings(found, settings, f"--output {output}", "choose another folder")
    write_json(kept, settings)

    environment = os.environ | {"PYTHON": sys.executable, "DATA_DIR": str(data), "OUTPUT_DIR": str(output),
                                "NUM_GPUS": "1", "REPORT_TO": "none", "OMP_NUM_THREADS": "1"}
    environment |= {"CAPTIONS": "training"} if args.scale == "words" else {}
    prepare = ["bash", "toy/prepare.sh", str(data), str(settings["--resolution"]), str(num_images)]
    if subprocess.run(prepare, cwd=ROOT, env=environment, check=False).returncode:
        raise UserError(f"--data-dir {data}: could not be prepared; see above")
    flags = settings | {"--ref-batch": data / "reference.npz"}
    commands = {f"{method}-seed{seed}": train_command(RECIPES[args.scale], flags, method, seed)
                for seed, method in product(range(SEEDS[args.scale]), COMPARED[args.scale])
                if settings["--max-train-steps"] not in read_curve(output / f"{method}-seed{seed}")}
    at_once = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    deadline = began + 60 * args.minutes if args.minutes else math.inf
    train_all(commands, environment, output, at_once, deadline, partial(report, args.scale, settings, output))
    say(report(args.scale, settings, output))
    say(f"see {output}: results.json, tables.md, convergence.png, samples.png")


if __name__ == "__main__":
    main()
