"""SiT, REPA and REG side by side on the toy: after how many steps is each as near to the data as another at its end?

    python -m toy.compare --scale cpu
    python -m toy.compare --scale gpu --minutes 30

A piece is one method with one seed, trained by train.sh and scored at several steps with the noise and labels of that seed for all methods.
Pieces that are whole are kept, so that the same command goes on; what the time did not allow is reported as not run.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluations.images import open_images
from models.cached_features import features_folder
from preprocessing.work import all_cores
from runtime import run as runs
from runtime.files import make_folder, write_whole
from runtime.messages import UserError, notice, say, without_traceback
from samplers import Sampling
from toy.figures import draw_figures
from toy.scores import ENCODER, Judge, open_judge, real_scores, repeated_distances, score_checkpoint
from toy.summary import METHODS, as_text, summarise

ROOT = Path(__file__).parents[1]
HOW = Sampling(mode="ode", num_steps=25, cfg_scale=1.0, labels="balanced")      # unguided, as convergence is reported
REPEATS = 5                                             # samplings of one checkpoint, and draws of real images, for the spread
FRESH_SEED = 100                                        # of real images that nobody has seen; the next ones follow it
STOPS = (signal.SIGTERM, signal.SIGHUP)                 # as Ctrl-C does; the second when a terminal is closed
PIECE, PICTURES = "scores.json", "pictures.npz"         # in the folder of a piece, beside its checkpoints
SETTING = "setting.json"                                # of all pieces in an output folder
OWN = ("data_dir", "output_dir", "exp_name", "seed", "resume", "report_to")     # flags that differ between pieces or machines


@dataclass(frozen=True)
class Scale:
    """One setting of the experiment, the same for every method."""

    data: str                     # folder of the prepared data
    resolution: int               # of the images, in pixels
    num_images: int               # to train on
    flags: tuple[str, ...]        # for `train.sh toy`, whose recipe holds the rest
    steps: tuple[int, ...]        # that are scored; the last one ends the training
    num_samples: int
    pieces: tuple[tuple[str, int], ...]       # (method, seed), in the order they are run


def in_turn(methods: tuple[str, ...], seeds: int) -> tuple[tuple[str, int], ...]:
    """All methods with seed 0, then all with seed 1, ..."""
    return tuple((method, seed) for seed, method in product(range(seeds), methods))


MAIN, ABLATIONS = ("sit", "repa", "reg"), ("class-token", "patches")
PAPER = ("--proj-coeff", "0.5", "--cls", "0.03")        # lambda and beta; RESULTS.md says how the rest was chosen
SCALES = {
    "cpu": Scale(
        data="data/toy", resolution=32, num_images=8192, num_samples=1024, steps=(250, 500, 750, 1000, 1500, 2000),
        flags=(*PAPER, "--model", "SiT-T/2", "--batch-size", "64", "--encoder-depth", "2", "--learning-rate", "6e-3", "--ema-decay", "0.99",
               "--mixed-precision", "no", "--no-compile", "--no-allow-tf32", "--num-workers", "0"),
        pieces=in_turn(MAIN, 3),
    ),
    "gpu": Scale(
        data="data/toy64", resolution=64, num_images=32768, num_samples=2048, steps=(250, 500, 750, 1000, 1250, 1500),
        flags=(*PAPER, "--model", "SiT-S/2", "--batch-size", "256", "--encoder-depth", "4", "--projector-dim", "1024",
               "--learning-rate", "1e-3", "--ema-decay", "0.99", "--mixed-precision", "bf16", "--compile", "--num-workers", "12"),
        pieces=in_turn(MAIN, 3) + in_turn(ABLATIONS, 3),
    ),
}


def at_learning_rate(scale: Scale, learning_rate: float) -> Scale:
    """The scale itself where that is its learning rate already."""
    if float(scale.flags[scale.flags.index("--learning-rate") + 1]) == learning_rate:
        return scale
    return replace(scale, flags=(*scale.flags, "--learning-rate", str(learning_rate)))


# ------------------------------------------------------------------------------------------------------------------ one piece

def piece_name(method: str, seed: int) -> str:
    return f"{method}-seed{seed}"


def train(scale: Scale, method: str, seed: int, data: Path, output: Path) -> float:
    """Train one piece to its last step, or go on with it -> seconds, earlier calls' included; raises UserError where train.sh fails.

    train.sh has a session of its own: Ctrl-C reaches it through this function alone, as the one signal after which it saves.
    """
    of_method, name = METHODS[method], piece_name(method, seed)
    command = ["bash", str(ROOT / "train.sh"), "toy", *scale.flags, *of_method.flags, "--exp-name", name, "--seed", str(seed),
               "--max-train-steps", str(scale.steps[-1]), "--checkpointing-steps", str(math.gcd(*scale.steps)), "--sampling-steps", "0",
               "--cached-features", "require" if of_method.name != "sit" else "off"]
    environment = os.environ | {"METHOD": of_method.name, "DATA_DIR": str(data.resolve()), "OUTPUT_DIR": str(output.resolve()),
                                "PYTHON": sys.executable, "NUM_GPUS": "1", "REPORT_TO": "none", "OMP_NUM_THREADS": "1"}
    log, spent = output / f"{name}.log", output / f"{name}.seconds"
    began = time.time()
    with open(log, "a", encoding="utf-8") as stream, \
            subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        finally:
            with open(spent, "a", encoding="utf-8") as file:
                file.write(f"{time.time() - began:.1f}\n")
    if status:
        last = (log.read_text(encoding="utf-8").strip().splitlines() or ["no output"])[-1]
        raise UserError(f"the training of {name} ended with status {status} ({last}): see {log}")
    return sum(map(float, spent.read_text(encoding="utf-8").split()))


def run_piece(scale: Scale, method: str, seed: int, data: Path, output: Path) -> dict:
    """Train and score one piece -> what its scores.json holds; its pictures and its last checkpoint stay beside it."""
    torch.set_num_threads(1)                            # their number would show in the last bits
    train_seconds, trained = train(scale, method, seed, data, output), time.time()
    judge, how = open_data(data), replace(HOW, seed=seed)
    experiment = output / piece_name(method, seed)
    points, shown = [], []
    for step in scale.steps:
        scores, pictures = score_checkpoint(runs.checkpoint_path(experiment, step), judge, scale.num_samples, how)
        points.append({"step": step, **scores})
        shown.append(pictures)
        say(f"{piece_name(method, seed)} · " + " · ".join(f"{key} {value:.4g}" for key, value in points[-1].items()))
    last = runs.checkpoint_path(experiment, scale.steps[-1])
    repeats = []
    if seed == min(s for m, s in scale.pieces if m == method):
        again = [replace(how, seed=seed + number) for number in range(1, REPEATS)]
        repeats = [points[-1]["distance"], *repeated_distances(last, judge, scale.num_samples, again)]
    stacked = {key: torch.stack([pictures[key] for pictures in shown]).numpy() for key in shown[0]}
    write_whole(experiment / PICTURES, lambda partial: save_arrays(partial, stacked))
    piece = {"method": method, "seed": seed, "train_seconds": round(train_seconds, 1), "score_seconds": round(time.time() - trained, 1),
             "points": points, "repeated_distances": repeats}
    write_json(experiment / PIECE, piece)
    for path in runs.saved(experiment).values():  # several times the size of everything else
        if path != last:
            path.unlink()
    return piece


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with open(path, "wb") as stream:
        np.savez_compressed(stream, **arrays)


def write_json(path: Path, content: dict) -> None:
    write_whole(path, lambda partial: partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


# ------------------------------------------------------------------------------------------------------------------- the data

def prepare(scale: Scale, data: Path) -> None:
    """Draw, convert and encode the data set, and let the encoder look at each image once, for all pieces; what is whole is kept."""
    environment = os.environ | {"PYTHON": sys.executable}
    encode = [sys.executable, "-m", "preprocessing.dataset_tools", "encode", "--source", data / "images",
              "--dest", data / features_folder(ENCODER), "--enc-type", ENCODER]
    for command in (["bash", "toy/prepare.sh", data, scale.resolution, scale.num_images], encode):
        if subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, check=False).returncode:
            raise UserError(f"the data in {data} could not be prepared, for the reason above: name another --data-dir, or mend it")


def require_size(scale: Scale, data: Path) -> None:
    """Raise UserError where the images that were drawn already are not as many or as large as the scale's."""
    paths = list((data / "raw").glob("*/*.png"))
    if paths:
        with Image.open(paths[0]) as image:
            width, height = image.size
        if (len(paths), width, height) != (scale.num_images, scale.resolution, scale.resolution):
            raise UserError(f"{data} holds {len(paths)} images of {width}x{height}, and this scale takes {scale.num_images} of "
                            f"{scale.resolution}x{scale.resolution}: name another --data-dir")


@functools.cache
def read_training(data: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The images uint8 (T, 3, R, R) and labels (T,) that the models learn from."""
    training = open_images(data / "images", "the training images")
    (images,) = training.blocks([range(training.count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(training.labels)


@functools.cache
def open_data(data: Path) -> Judge:
    with np.load(data / "reference.npz") as file:
        reference = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2).contiguous()
    return open_judge(reference, *read_training(data), torch.device("cuda" if torch.cuda.is_available() else "cpu"))


# ----------------------------------------------------------------------------------------------------------------- all of them

def setting_of(scale: Scale) -> dict:
    """What must be equal for pieces to be compared."""
    fixed = {name: value for name, value in asdict(scale).items() if name not in ("pieces", "data")}
    methods = {method: [of.name, *of.flags] for method, of in METHODS.items()}
    return json.loads(json.dumps({**fixed, "methods": methods, "sampling": asdict(HOW) | {"seed": "the piece's"}}))


def require_setting(scale: Scale, output: Path) -> None:
    """Keep the setting in the output folder, before anything is trained; raises UserError where pieces of another one are there."""
    kept = output / SETTING
    begun = any((output / piece_name(method, seed)).exists() for method, seed in scale.pieces)
    if begun and (not kept.is_file() or json.loads(kept.read_text(encoding="utf-8")) != setting_of(scale)):
        raise UserError(f"{output} holds pieces of another setting: name another --output, or remove it")
    write_json(kept, setting_of(scale))


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def interruptible() -> None:
    for number in STOPS:
        signal.signal(number, interrupt)


def run_pieces(scale: Scale, data: Path, output: Path, processes: int, deadline: float, report: Callable[[list[dict]], None]) -> None:
    """Run what is not there yet, `processes` pieces at a time, while the longest so far would end before `deadline` (a time.time()).

    `report` is given the pieces that are whole, in the scale's order, at the start if there are any and after each new one.
    """
    pieces, waiting, running = [], [], {}
    for method, seed in scale.pieces:
        kept = output / piece_name(method, seed) / PIECE
        if kept.is_file():
            pieces.append(json.loads(kept.read_text(encoding="utf-8")))
        else:
            waiting.append((method, seed))
    if pieces:
        report(pieces)
    context, before = multiprocessing.get_context("spawn"), {number: signal.signal(number, interrupt) for number in STOPS}
    with ProcessPoolExecutor(processes, mp_context=context, initializer=interruptible) as pool:
        try:
            while waiting or running:
                longest = max(map(seconds, pieces), default=0.0)
                while waiting and len(running) < processes and time.time() + longest < deadline:
                    method, seed = waiting.pop(0)
                    say(f"{piece_name(method, seed)} begins")
                    running[pool.submit(run_piece, scale, method, seed, data, output)] = (method, seed)
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    running.pop(future)
                    pieces.append(future.result())
                pieces.sort(key=lambda piece: scale.pieces.index((piece["method"], piece["seed"])))
                report(pieces)
        except BaseException:                           # the others would train on for minutes, or for ever
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            for number, handler in before.items():      # other pools end their workers with SIGTERM
                signal.signal(number, handler)


def seconds(piece: dict) -> float:
    return piece["train_seconds"] + piece["score_seconds"]


def machine() -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"device": gpu or f"{all_cores()} CPU cores, {platform.machine()}", "python": platform.python_version(),
            "torch": torch.__version__}


def training_flags(output: Path, pieces: list[dict]) -> dict:
    """Every flag that train.py resolved, by method, but those that belong to a piece; raises UserError where one method's differ."""
    flags = {}
    for piece in pieces:
        experiment = output / piece_name(piece["method"], piece["seed"])
        args = json.loads((experiment / "args.json").read_text(encoding="utf-8"))
        found = {flag: value for flag, value in args.items() if flag not in OWN}
        if flags.setdefault(piece["method"], found) != found:
            raise UserError(f"{experiment} was trained with other flags than the pieces before it: remove it, or name another --output")
    return flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--scale", choices=tuple(SCALES), default="cpu", help="size of the experiment")
    parser.add_argument("--data-dir", type=Path, default=None, metavar="DIR",
                        help="where the data is or will be; None: data/toy or data/toy64")
    parser.add_argument("--output", type=Path, default=None, metavar="DIR",
                        help="holds a folder per piece, and the results; None: exps/compare-SCALE")
    parser.add_argument("--learning-rate", type=float, default=None, metavar="LR",
                        help="of every method; None: the scale's own, 6e-3 for cpu and 1e-3 for gpu")
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="a piece begins only while the longest so far would still end in that time; the first ones always begin")
    return parser.parse_args(argv)


@without_traceback
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.minutes > 0:
        raise UserError(f"--minutes {args.minutes} is no time: give more than 0")
    if args.scale == "gpu" and not torch.cuda.is_available():
        raise UserError("--scale gpu came, and there is no CUDA device: use --scale cpu")
    if args.learning_rate is not None and not 0 < args.learning_rate < math.inf:
        raise UserError(f"--learning-rate {args.learning_rate} came: give a number above 0")
    scale = SCALES[args.scale]
    if args.learning_rate is not None:
        scale = at_learning_rate(scale, args.learning_rate)
    compare(scale, args.scale, args.data_dir or ROOT / scale.data, args.output or ROOT / "exps" / f"compare-{args.scale}", args.minutes)


def compare(scale: Scale, name: str, data: Path, output: Path, minutes: float) -> None:
    """Prepare the data, run the pieces, and after each one write results.json, tables.md and the pictures of all so far into `output`."""
    deadline = time.time() + 60 * minutes
    data, output = data.resolve(), output.resolve()
    require_size(scale, make_folder(data))
    require_setting(scale, make_folder(output))
    prepare(scale, data)
    real = real_scores(open_data(data), scale.num_samples, scale.resolution, list(range(FRESH_SEED, FRESH_SEED + REPEATS)))
    training = read_training(data)[0].permute(0, 2, 3, 1).numpy()
    results = {}

    def report(pieces: list[dict]) -> None:
        whole = {(piece["method"], piece["seed"]) for piece in pieces}
        results.update({
            "scale": name, "setting": setting_of(scale), "flags": training_flags(output, pieces), "machine": machine(), "real": real,
            "pieces": pieces,
            "not_run": [{"method": method, "seed": seed} for method, seed in scale.pieces if (method, seed) not in whole]})
        results["summary"] = summarise(results)
        write_json(output / "results.json", results)
        write_whole(output / "tables.md", lambda partial: partial.write_text(as_text(results), encoding="utf-8"))
        draw_figures(results, {key: shown_of(output / piece_name(*key)) for key in whole}, training, output)
        say(f"{len(pieces)} of {len(scale.pieces)} pieces")

    run_pieces(scale, data, output, 1 if torch.cuda.is_available() else all_cores(), deadline, report)
    if not results:
        raise UserError(f"--minutes {minutes:g} did not allow a single piece: give more")
    say(as_text(results))
    if results["not_run"]:
        notice(f"{len(results['not_run'])} pieces were not run for lack of time: give the same command again")
    say(f"see {output}/results.json, convergence.png, samples.png and class_token.png")


def shown_of(experiment: Path) -> dict[str, np.ndarray]:
    with np.load(experiment / PICTURES) as file:
        return dict(file)


if __name__ == "__main__":
    main()
