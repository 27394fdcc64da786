"""Sample and score every combination of settings; then one table, one plot, the best marked. The program behind eval.sh.

    python -m evaluations.sweep EXP_DIR --cfg-scale 1,1.8,2.3 --guidance-high 0.75,0.85 --steps 200000,400000 [flags of generate.py]

What is there is neither sampled nor scored again, so the same command goes on after an interruption. The table has a row for
everything that was ever scored in the samples folder. Relative paths start where the programs do.
"""

import argparse
import hashlib
import itertools
import math
import os
import sys
import tempfile
from pathlib import Path

from evaluations.report import (
    GUIDANCE,
    METRICS,
    as_text,
    distance_of,
    draw,
    protocol,
    read_result,
    read_rows,
    write_table,
)
from runtime import run as runs
from runtime.files import sha256
from runtime.launch import is_first_node, supervise
from runtime.messages import UserError, notice, say, without_traceback

# Flags of generate.py that take several values here: type, test, what to give. It tests them too, but each when its turn has come.
SWEPT = {
    "weights": (str, ("ema", "model").__contains__, "ema or model"),
    "mode": (str, ("sde", "ode").__contains__, "sde or ode"),
    "num_steps": (int, lambda n: n >= 1, "whole numbers from 1 on"),
    "cfg_scale": (float, lambda s: 1 <= s < math.inf, "numbers from 1 on; 1: unguided"),
    "cls_cfg_scale": (float, math.isfinite, "numbers"),
    "guidance_low": (float, lambda t: 0 <= t <= 1, "numbers in [0, 1]"),
    "guidance_high": (float, lambda t: 0 <= t <= 1, "numbers in [0, 1]"),
    "labels": (str, ("random", "balanced").__contains__, "random or balanced"),
    "num_fid_samples": (int, lambda n: n >= 1, "whole numbers from 1 on"),
    "global_seed": (int, lambda n: n >= 0, "whole numbers from 0 on"),
}
SCORING = ("ref_batch", "features", "inception_weights", "dinov2_weights", "metrics", "precision_recall", "cache")


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """This program's arguments, and those that go to generate.py as they are."""
    parser = argparse.ArgumentParser(prog="python -m evaluations.sweep", description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     epilog="Every other flag goes to generate.py as it is: see python generate.py --help.")
    parser.add_argument("experiment", metavar="EXP_DIR", help="experiment folder, or a checkpoint file")
    swept = parser.add_argument_group("one value, or several with commas, of which every combination is made (default: generate.py's)")
    swept.add_argument("--steps", metavar="LIST", help="training steps of checkpoints in EXP_DIR (default: the newest)")
    for name, (_, _, wanted) in SWEPT.items():
        swept.add_argument(flag(name), metavar="LIST", help=wanted)
    scoring = parser.add_argument_group("scoring (default: the evaluator's)")
    scoring.add_argument("--ref-batch", type=Path, default=os.environ.get("REF_BATCH") or None, metavar="REF",
                         help="reference npz or image folder (default: $REF_BATCH)")
    scoring.add_argument("--features", default=os.environ.get("FEATURES") or "inception", metavar="NAME",
                         help="feature network (default: $FEATURES, or inception)")
    scoring.add_argument("--inception-weights", type=Path, default=os.environ.get("INCEPTION_WEIGHTS") or None, metavar="FILE",
                         help="weights of the Inception of 2015-12-05 (default: $INCEPTION_WEIGHTS, or cache and download)")
    scoring.add_argument("--dinov2-weights", type=Path, metavar="FILE", help="weights of --features dinov2")
    scoring.add_argument("--metrics", metavar="LIST", help="scores to compute (python -m evaluations.evaluator --help names them)")
    scoring.add_argument("--precision-recall", choices=("adm", "exact", "off"), default="adm",
                         help="distances in float16 as papers, in float32, or neither score")
    scoring.add_argument("--cache", metavar="DIR", help="keeps the reference's features")
    return parser.parse_known_args(argv)


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def flags(setting: dict) -> list[str]:
    """As a command line; what is None is left out."""
    return [part for name, value in setting.items() if value is not None for part in (flag(name), str(value))]


# ------------------------------------------------------------------------------------------------------------- what is to be made

def values(name: str, text: str) -> list:
    """The values of a swept flag, each once; raises UserError for one that generate.py would refuse."""
    kind, accepts, wanted = SWEPT[name]
    try:
        found = [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(map(accepts, found)):
        raise UserError(f"{flag(name)} is {text!r}: give {wanted}, with commas between several")
    return list(dict.fromkeys(found))


def expand(lists: dict[str, list]) -> list[dict]:
    """The product of the lists. With scale 1 nothing is guided: interval and class scale fall away, and what is then equal is one."""
    settings = []
    for combination in itertools.product(*lists.values()):
        setting = dict(zip(lists, combination, strict=True))
        if setting.get("guidance_low", 0) > setting.get("guidance_high", 1):
            raise UserError(f"--guidance-low {setting['guidance_low']} would be combined with --guidance-high {setting['guidance_high']}, "
                            "an empty interval: leave one of them out")
        if setting.get("cfg_scale") == 1:
            fallen = GUIDANCE if len(lists["cfg_scale"]) > 1 else GUIDANCE[1:]    # a class scale without any guidance: generate.py refuses
            setting = {name: value for name, value in setting.items() if name not in fallen}
        if setting not in settings:
            settings.append(setting)
    return settings


def checkpoints(experiment: str, steps: str | None) -> list[Path]:
    """The checkpoints of the steps in a list with commas, or the newest; raises UserError for one that is not there."""
    if steps is None:
        return [runs.find(experiment)]
    saved = {str(step): path for step, path in runs.saved(Path(experiment)).items()}
    wanted = list(dict.fromkeys(step.strip() for step in steps.split(",")))
    for step in wanted:
        if step not in saved:
            raise UserError(f"--steps names {step!r}, and {experiment} has checkpoints of training steps {', '.join(saved) or '(none)'}: "
                            "choose among these; the solver's steps are --num-steps")
    return [saved[step] for step in wanted]


# ---------------------------------------------------------------------------------------------------------------------- making it

def run(*command: str) -> str:
    """Run a program and return what it printed; stderr is shared. Its failure, which it has explained, ends this one with its status."""
    with tempfile.TemporaryFile("w+") as printed:
        status, signals = supervise([sys.executable, "-m", *command], [{}], printed)
        if status != 0 or signals:
            sys.exit(status or 128 + signals[0])
        printed.seek(0)
        return printed.read()


def scored(folder: Path, args: argparse.Namespace, tokens: bool) -> Path | None:
    """The folder's file that answers this call, if there is one: same reference and network, and the same scores were asked for."""
    weights = args.inception_weights or args.dinov2_weights
    asked = {"features": args.features, "metrics": args.metrics, "precision_recall": args.precision_recall}
    for path in sorted(folder.glob(METRICS)):
        result = read_result(path)
        if (result is not None and result["asked"] == asked and Path(result["ref_batch"]) == args.ref_batch
                and args.ref_batch.stat().st_mtime <= path.stat().st_mtime        # a reference made anew under the same name
                and (result["weights_sha256"] == sha256(weights) if weights else result["weights_verified"] is not False)
                and (not tokens or "class_token_cosine" in result)):
            return path
    return None


def score(folder: Path, args: argparse.Namespace, scoring: list[str], tokens: bool) -> Path:
    """Score the folder's samples to its metrics.json; an earlier one, of other features, scores or reference, is kept beside it."""
    metrics = folder / "metrics.json"
    before = read_result(metrics) if metrics.is_file() else None
    if before is not None:
        identity = repr([before[name] for name in ("asked", "ref_batch", "weights_sha256")])
        metrics.rename(folder / f"metrics-{before['features']}-{hashlib.sha256(identity.encode()).hexdigest()[:6]}.json")
    more = flags({"class_tokens": folder / "class_tokens.npz" if tokens else None})
    say(run("runtime.launch", "-m", *scoring, *more, "--sample-batch", str(folder / "samples.npz"), "--output", str(metrics)).rstrip())
    return metrics


def write_report(folders: list[Path]) -> list[str]:
    """Write table and plot beside the folders of this call; returns what to print."""
    samples = folders[0].parent
    rows = read_rows(samples)
    write_table(samples, rows)
    called = [row for row in rows if row["folder"] in [folder.name for folder in folders] and distance_of(row)]
    if called:
        draw(samples / "sweep.png", rows, list(dict.fromkeys(map(protocol, called))))
    return [as_text(rows), f"table: {samples / 'sweep.csv'}", *([f"plot: {samples / 'sweep.png'}"] if called else [])]


@without_traceback
def main(argv: list[str] | None = None) -> None:
    args, passed_on = parse_args(argv)
    settings = expand({name: values(name, text) for name in SWEPT if (text := getattr(args, name)) is not None})
    work = list(itertools.product(checkpoints(args.experiment, args.steps), settings))
    scoring = ["evaluations.evaluator", *flags({name: getattr(args, name) for name in SCORING})]
    if args.ref_batch is not None:                                # what scoring lacks is said before the images are made
        run(*scoring, "--dry-run")
    else:
        notice("REF_BATCH is not set: samples are made and not scored")

    tokens = "--save-cls-tokens" in passed_on
    folders, said = [], []
    for number, (path, setting) in enumerate(work, 1):
        if len(work) > 1:
            notice(f"{number} of {len(work)}: {path.stem} {' '.join(flags(setting))}")
        printed = run("runtime.launch", "generate.py", "--ckpt", str(path), *flags(setting), *passed_on)
        folder = Path(printed.splitlines()[-1]).parent
        folders.append(folder)
        if args.ref_batch is None:
            continue
        metrics = scored(folder, args, tokens) or score(folder, args, scoring, tokens)
        if is_first_node(os.environ):                             # after every setting: an interruption loses nothing
            said = write_report(folders)

    if args.ref_batch is None:
        raise UserError(f"the samples are in {', '.join(map(str, folders))}, but cannot be scored without a reference: set REF_BATCH to an "
                        ".npz or an image folder and give the same command; it does not sample again")
    if len(folders) == 1:
        said += [f"grid: {folder / 'grid.png'}", f"metrics: {metrics}"]
    say("\n".join(said))


if __name__ == "__main__":
    main()
