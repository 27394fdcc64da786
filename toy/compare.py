"""SiT, REPA and REG side by side on the toy: after how many steps is each as near to the data as another at its end?

    bash toy/compare.sh --scale cpu        # prepares the data, then calls `python -m toy.compare`
    bash toy/compare.sh --scale gpu --minutes 9

A piece is one method with one seed, trained by train.sh and scored at several steps with the same noise and labels as all others.
Pieces that are whole are kept, so that the same command goes on; what the time did not allow is reported as not run.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from evaluations.images import open_images
from models import checkpoint
from models.errors import UserError, notice, say, without_traceback
from models.files import write_whole
from models.stopping import STOPPED
from samplers import Sampling
from toy.figures import draw_figures
from toy.scores import Judge, open_judge, real_scores, repeated_distances, score_checkpoint
from toy.summary import METHODS, headline, summarise, tables

ROOT = Path(__file__).parents[1]
HOW = Sampling(mode="ode", num_steps=25, cfg_scale=1.0, labels="balanced")      # unguided, as convergence is reported
REPEATS = 5                                             # samplings of one checkpoint, and draws of real images, for the spread
FRESH_SEED = 100                                        # of real images that nobody has seen; the next ones follow it
SCORES, PICTURES = "scores.json", "pictures.npz"        # of a piece, in its folder


@dataclass(frozen=True)
class Scale:
    """One setting of the experiment, the same for every method."""

    resolution: int               # of the toy's pictures
    num_images: int               # to train on
    flags: tuple[str, ...]        # for `train.sh toy`, whose recipe holds the rest
    steps: tuple[int, ...]        # that are scored; the last one ends the training
    num_samples: int
    pieces: tuple[tuple[str, int], ...]       # (method, seed), in the order they are run


def in_turn(methods: tuple[str, ...], seeds: int) -> tuple[tuple[str, int], ...]:
    """All methods with seed 0, then all with seed 1, ..."""
    return tuple((method, seed) for seed, method in product(range(seeds), methods))


MAIN, ABLATIONS = ("sit", "repa", "reg"), ("class-token", "patches")
TUNED = ("--encoder-depth", "2", "--proj-coeff", "5", "--cls", "0.3", "--ema-decay", "0.99")     # RESULTS.md says what else was tried
SCALES = {
    "cpu": Scale(
        resolution=32, num_images=8192, num_samples=1024, steps=(250, 500, 750, 1000, 1500, 2000),
        flags=(*TUNED, "--learning-rate", "3e-3", "--num-workers", "0"),
        pieces=in_turn(MAIN, 3) + in_turn(ABLATIONS, 2),
    ),
    "gpu": Scale(
        resolution=64, num_images=32768, num_samples=4096, steps=(250, 500, 750, 1000, 1500, 2000),
        flags=(*TUNED, "--model", "SiT-S/2", "--batch-size", "256", "--learning-rate", "1e-3", "--projector-dim", "1024",
               "--num-workers", "12"),
        pieces=in_turn(MAIN, 3) + in_turn(ABLATIONS, 3),
    ),
}


# ------------------------------------------------------------------------------------------------------------------ one piece

def piece_name(method: str, seed: int) -> str:
    return f"{method}-seed{seed}"


def train(scale: Scale, method: str, seed: int, data: Path, output: Path) -> None:
    """Train one piece to its last step, or go on with it; raises UserError where train.sh fails, Stopped where it was told to stop."""
    of_method = METHODS[method]
    every = math.gcd(*scale.steps)
    name = piece_name(method, seed)
    command = ["bash", str(ROOT / "train.sh"), "toy", *scale.flags, *of_method.flags, "--exp-name", name, "--seed", str(seed),
               "--max-train-steps", str(scale.steps[-1]), "--checkpointing-steps", str(every), "--sampling-steps", "0",
               "--cached-features", "require" if of_method.name != "sit" else "off"]
    environment = os.environ | {"METHOD": of_method.name, "DATA_DIR": str(data.resolve()), "OUTPUT_DIR": str(output.resolve()),
                                "PYTHON": sys.executable, "NUM_GPUS": "1", "REPORT_TO": "none", "OMP_NUM_THREADS": "1"}
    log = output / f"{name}.log"
    with open(log, "a", encoding="utf-8") as stream:
        status = subprocess.run(command, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    if status == STOPPED:
        raise KeyboardInterrupt
    if status:
        last = (log.read_text(encoding="utf-8").strip().splitlines() or ["no output"])[-1]
        raise UserError(f"the training of {name} ended with status {status} ({last}): see {log}")


def run_piece(scale: Scale, method: str, seed: int, data: Path, output: Path) -> dict:
    """Train and score one piece -> what its scores.json holds; its pictures and its last checkpoint stay beside it."""
    torch.set_num_threads(1)                            # their number would show in the last bits
    began = time.time()
    train(scale, method, seed, data, output)
    trained = time.time()
    judge = open_data(data)
    experiment = output / piece_name(method, seed)
    points, shown = [], []
    for step in scale.steps:
        scores, pictures = score_checkpoint(checkpoint.checkpoint_path(experiment, step), judge, scale.num_samples, HOW)
        points.append({"step": step, **scores})
        shown.append(pictures)
        say(f"{piece_name(method, seed)} · " + " · ".join(f"{key} {value:.4g}" for key, value in points[-1].items()))
    last = checkpoint.checkpoint_path(experiment, scale.steps[-1])
    repeats = []
    if seed == min(s for m, s in scale.pieces if m == method):
        again = [replace(HOW, seed=HOW.seed + number) for number in range(1, REPEATS)]
        repeats = [points[-1]["distance"], *repeated_distances(last, judge, scale.num_samples, again)]
    stacked = {key: torch.stack([pictures[key] for pictures in shown]).numpy() for key in shown[0]}
    write_whole(experiment / PICTURES, lambda partial: save_arrays(partial, stacked))
    piece = {"method": method, "seed": seed, "train_seconds": round(trained - began, 1), "score_seconds": round(time.time() - trained, 1),
             "points": points, "repeated_distances": repeats}
    write_whole(experiment / SCORES, lambda partial: partial.write_text(json.dumps(made_with(scale) | piece, indent=1) + "\n"))
    for path in checkpoint.saved(experiment).values():  # several times the size of everything else
        if path != last:
            path.unlink()
    return piece


def made_with(scale: Scale) -> dict:
    """What must be equal for a piece to belong to a comparison."""
    return {"setting": {**{name: value for name, value in asdict(scale).items() if name != "pieces"}, "sampling": asdict(HOW)}}


def kept_piece(scale: Scale, method: str, seed: int, output: Path) -> dict | None:
    """A piece that is there already, or None; raises UserError for one of another setting."""
    path = output / piece_name(method, seed) / SCORES
    if not path.is_file():
        return None
    piece = json.loads(path.read_text())
    if piece.pop("setting") != json.loads(json.dumps(made_with(scale)["setting"])):
        raise UserError(f"{path} was made with another setting: name another --output, or remove {path.parent}")
    return piece


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as stream:
        np.savez_compressed(stream, **arrays)


# ----------------------------------------------------------------------------------------------------------------- all of them

def read_training(data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The images uint8 (T, 3, R, R) and labels (T,) that the models learn from."""
    training = open_images(data / "images", "the training images")
    (images,) = training.blocks([range(training.count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(training.labels)


def open_data(data: Path) -> Judge:
    with np.load(data / "reference.npz") as file:
        reference = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2).contiguous()
    return open_judge(reference, *read_training(data), torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def run_pieces(scale: Scale, data: Path, output: Path, processes: int, minutes: float) -> tuple[list[dict], list[dict]]:
    """Run what is not there yet, `processes` pieces at a time -> the pieces, and those for which the time did not last."""
    began, pieces, waiting = time.time(), [], []
    for method, seed in scale.pieces:
        piece = kept_piece(scale, method, seed, output)
        pieces.append(piece) if piece else waiting.append((method, seed))
    longest, running = 0.0, {}
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        while waiting or running:
            while waiting and len(running) < processes and (time.time() - began + longest) / 60 < minutes:
                method, seed = waiting.pop(0)
                say(f"{piece_name(method, seed)} begins")
                running[pool.submit(run_piece, scale, method, seed, data, output)] = (method, seed)
            if not running:
                break
            done = next((future for future in running if future.done()), None)
            if done is None:
                time.sleep(0.2)
                continue
            running.pop(done)
            pieces.append(done.result())
            longest = max(longest, pieces[-1]["train_seconds"] + pieces[-1]["score_seconds"])
            say(f"{len(pieces)} of {len(scale.pieces)} pieces, {(time.time() - began) / 60:.1f} minutes")
    pieces.sort(key=lambda piece: scale.pieces.index((piece["method"], piece["seed"])))
    return pieces, [{"method": method, "seed": seed} for method, seed in waiting]


def machine() -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"device": gpu or f"{os.cpu_count()} CPU cores, {platform.machine()}", "python": platform.python_version(),
            "torch": torch.__version__}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--scale", choices=tuple(SCALES), default="cpu", help="size of the experiment")
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR", help="what toy/prepare.sh made")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="holds a folder per piece, and the results")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no piece is begun that would not end in that time")
    return parser.parse_args(argv)


@without_traceback
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.minutes > 0:
        raise UserError(f"--minutes {args.minutes} is no time: give more than 0")
    compare(SCALES[args.scale], args.scale, args.data_dir, args.output, args.minutes)


def compare(scale: Scale, name: str, data: Path, output: Path, minutes: float) -> None:
    """Run the pieces, then write results.json, tables.md and the pictures into `output`."""
    if not (data / "reference.npz").is_file():
        raise UserError(f"--data-dir {data} has no reference.npz: prepare the data with bash toy/compare.sh --scale {name}")
    output.mkdir(parents=True, exist_ok=True)
    began = time.time()
    processes = 1 if torch.cuda.is_available() else max(1, len(os.sched_getaffinity(0)))
    pieces, not_run = run_pieces(scale, data, output, processes, minutes)
    if not pieces:
        raise UserError(f"--minutes {minutes:g} did not allow a single piece: give more")
    judge = open_data(data)
    real = real_scores(judge, scale.num_samples, scale.resolution, list(range(FRESH_SEED, FRESH_SEED + REPEATS)))
    results = {"scale": name, **made_with(scale), "machine": machine(), "minutes": round((time.time() - began) / 60, 1),
               "real": real, "pieces": pieces, "not_run": not_run}
    results["summary"] = summarise(results)
    write_whole(output / "results.json", lambda partial: partial.write_text(json.dumps(results, indent=1) + "\n"))
    write_whole(output / "tables.md", lambda partial: partial.write_text(tables(results)))
    pictures = {}
    for piece in pieces:
        with np.load(output / piece_name(piece["method"], piece["seed"]) / PICTURES) as file:
            pictures[piece["method"], piece["seed"]] = dict(file)
    draw_figures(results, pictures, read_training(data)[0].permute(0, 2, 3, 1).numpy(), output)
    say(tables(results) + "\n" + headline(results))
    if not_run:
        notice(f"{len(not_run)} pieces were not run for lack of time: give the same command again")
    say(f"see {output}/results.json, convergence.png, samples.png and class_token.png")


if __name__ == "__main__":
    main()
