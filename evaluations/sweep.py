"""Sample and score every combination of settings; then print one table, draw one plot, and mark the best.

    python -m evaluations.sweep EXP_DIR --cfg-scale 1,1.8,2.3 --guidance-high 0.75,0.85 --steps 200000,400000 [flags]

The program behind eval.sh. Existing samples and scores are not made again, so the same command continues after an
interruption. The table has a row for everything that was ever scored in the samples folder.
"""

import argparse
import functools
import hashlib
import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import generate
from evaluations import evaluator
from evaluations.report import GUIDANCE, read_result, references_of, write_report
from models import checkpoint
from runtime.arguments import Parser
from runtime.files import read_object, sha256
from runtime.launch import is_first_node, launch
from runtime.messages import UserError, notice, say, without_traceback
from runtime.run import find, saved
from runtime.samples import METRICS, SETTINGS

# Flags of generate.py that take several values here.
SWEPT = ("weights", "mode", "num_steps", "cfg_scale", *GUIDANCE, "labels", "num_fid_samples", "global_seed")

# Samplings under a name of the field: 100 evaluations of the network, without guidance.
PRESETS = {"nfe100": {"mode": "ode", "num_steps": "100", "cfg_scale": "1"}}


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """This program's arguments, and the others, which go to generate.py unchanged."""
    parser = Parser(prog="python -m evaluations.sweep", description=__doc__.split("\n\n")[0],
                    formatter_class=argparse.HelpFormatter,
                    epilog="Every other flag goes to generate.py: see python generate.py --help.")
    parser.add_argument("experiment", metavar="EXP_DIR", help="experiment folder, or a checkpoint file")
    swept = parser.add_argument_group("one value, or several with commas (default: generate.py's)")
    swept.add_argument("--steps", metavar="LIST", help="training steps of checkpoints in EXP_DIR (default: the newest)")
    for name in SWEPT:
        swept.add_argument(flag(name), metavar="LIST")
    scoring = parser.add_argument_group("scoring (default: the evaluator's)")
    scoring.add_argument("--ref-batch", type=evaluator.references, default=os.environ.get("REF_BATCH") or None,
                         metavar="REF[,REF]", help="reference npz or image folder, or several (default: $REF_BATCH)")
    scoring.add_argument("--features", default=os.environ.get("FEATURES") or "inception", metavar="NAME",
                         help="feature network (default: $FEATURES, or inception)")
    scoring.add_argument("--inception-weights", type=Path, default=os.environ.get("INCEPTION_WEIGHTS") or None,
                         metavar="FILE", help="the 2015 Inception (default: $INCEPTION_WEIGHTS, or cache and download)")
    scoring.add_argument("--dinov2-weights", type=Path, metavar="FILE", help="weights of --features dinov2")
    scoring.add_argument("--metrics", metavar="LIST", help="scores (python -m evaluations.evaluator --help names them)")
    scoring.add_argument("--precision-recall", choices=("adm", "exact", "off"), default="adm",
                         help="distances in float16 as in papers, in float32, or neither score")
    scoring.add_argument("--clip", default=os.environ.get("CLIP") or None, metavar="NAME|FOLDER",
                         help="CLIP for the clip_score of a text experiment (default: $CLIP)")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="nfe100: unguided, 100 Euler steps")
    args, passed_on = parser.parse_known_args(argv)
    if args.preset and "--heun" in passed_on:
        parser.error(f"--preset {args.preset}: Heun's steps evaluate the network twice; leave --heun out")
    for name, value in PRESETS.get(args.preset, {}).items():
        if getattr(args, name) is not None:
            parser.error(f"--preset {args.preset}: contradicts {flag(name)}; leave one of them out")
        setattr(args, name, value)
    return args, passed_on


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def flags(setting: dict) -> list[str]:
    """As a command line; None is left out."""
    texts = {name: ",".join(map(str, value)) if isinstance(value, list) else str(value)
             for name, value in setting.items() if value is not None}
    return [part for name, text in texts.items() for part in (flag(name), text)]


# --------------------------------------------------------------------------------------------------- what is to be made

def values(name: str, text: str) -> list:
    """The values of a swept flag, each once, as generate.py reads them. One that it refuses ends the program."""
    given = (generate.parse_args(["--ckpt", "", "--guidance-high", "1", f"{flag(name)}={part.strip()}"])
             for part in text.split(","))
    return list(dict.fromkeys(getattr(args, name) for args in given))


def expand(lists: dict[str, list]) -> list[dict]:
    """The product of the lists. Unguided settings (scale 1) lose interval and class scale; equal ones become one."""
    settings = []
    for combination in itertools.product(*lists.values()):
        setting = dict(zip(lists, combination, strict=True))
        if setting.get("cfg_scale") == 1:
            setting = {name: value for name, value in setting.items() if name not in GUIDANCE}
        if setting not in settings:
            settings.append(setting)
    return settings


def checkpoints(experiment: str, steps: str | None) -> list[Path]:
    """The checkpoints of a list of steps, or the newest. Raises UserError for a missing one."""
    if steps is None:
        return [find(experiment)]
    there = {str(step): path for step, path in saved(Path(experiment)).items()}
    wanted = list(dict.fromkeys(step.strip() for step in steps.split(",")))
    for step in wanted:
        if step not in there:
            raise UserError(f"--steps {step}: {experiment} has checkpoints of steps {', '.join(there) or '(none)'}; "
                            "the solver's steps are --num-steps")
    return [there[step] for step in wanted]


def samples_of(args: argparse.Namespace, path: Path, state: dict, digest: str) -> Path:
    """The folder that generate.py has filled with these flags. Only that process knows whether the compiler worked."""
    asked = torch.cuda.is_available() if args.compile is None else args.compile
    for compiled in (asked, not asked):
        conditions = generate.conditions_of(args, state)
        settings = generate.settings_of(args, path, state, digest, compiled, conditions)
        folder = generate.folder_of(args.sample_dir, settings)
        if generate.is_same(read_object(folder / SETTINGS), settings):
            return folder
    raise AssertionError(f"no samples of {path} with {args}")


# -------------------------------------------------------------------------------------------------------------- scoring

@dataclass(frozen=True)
class Scoring:
    """The evaluator's flags."""

    ref_batch: list[Path]
    features: str
    inception_weights: Path | None
    dinov2_weights: Path | None
    metrics: str | None
    precision_recall: str
    clip: str | None = None

    def scored(self, folder: Path, tokens: bool) -> Path | None:
        """The file in the folder with these scores by this network against these references, or None."""
        weights = self.inception_weights or self.dinov2_weights
        asked = {name: getattr(self, name) for name in ("features", "metrics", "precision_recall")}
        asked |= {"clip": self.clip} if self.clip else {}
        for path in sorted(folder.glob(METRICS)):
            result = read_result(path)
            if (result is not None and result["asked"] == asked
                    and list(map(Path, references_of(result))) == self.ref_batch
                    and all(ref.stat().st_mtime <= path.stat().st_mtime for ref in self.ref_batch)        # not newer
                    and (result["weights_sha256"] == sha256(weights) if weights
                         else result["weights_verified"] is not False)
                    and (not tokens or "class_token_cosine" in result)):
                return path
        return None

    def score(self, folder: Path, tokens: bool) -> Path:
        """Score the samples to metrics.json; an earlier one with other scores is kept under another name."""
        metrics = folder / "metrics.json"
        before = read_result(metrics) if metrics.is_file() and is_first_node(os.environ) else None
        if before is not None:
            identity = repr([before["asked"], references_of(before), before["weights_sha256"]])
            digest = hashlib.sha256(identity.encode()).hexdigest()[:6]
            metrics.rename(folder / f"metrics-{before['features']}-{digest}.json")
        more = {"class_tokens": folder / "class_tokens.npz" if tokens else None, "sample_batch": folder / "samples.npz",
                "output": metrics}
        run("-m", "evaluations.evaluator", *flags({**vars(self), **more}))
        return metrics


def run(*program: str) -> None:
    """Run a program on all GPUs. If it fails, which it has explained, end with its status."""
    status = launch(list(program))
    if status != 0:
        sys.exit(status)


@without_traceback
def main(argv: list[str] | None = None) -> None:
    args, passed_on = parse_args(argv)
    settings = expand({name: values(name, text) for name in SWEPT if (text := getattr(args, name)) is not None})
    precision = "tf32" if torch.cuda.is_available() else "fp32"
    work = [(path, setting, ["--ckpt", str(path), "--precision", precision, *flags(setting), *passed_on])
            for path, setting in itertools.product(checkpoints(args.experiment, args.steps), settings)]
    parsed = [generate.parse_args(command) for *_, command in work]                       # ends here if one is wrong
    scoring, read = None, functools.cache(lambda path: (checkpoint.read(path), checkpoint.digest_of(path)))
    if args.ref_batch is None:
        notice("REF_BATCH is not set: samples are made and not scored")
    else:
        scoring = Scoring(**{name: getattr(args, name) for name in Scoring.__dataclass_fields__})
        for path, *_ in work if scoring.clip or "clip_score" in (scoring.metrics or "") else ():
            if not checkpoint.has_captions(read(path)[0], parsed[0].model):
                raise UserError(f"{path}: trained on class labels, without captions; leave --clip and clip_score out")
        evaluator.main([*flags(vars(scoring)), "--device", "cpu", "--dry-run"])           # likewise, before sampling

    folders, report = [], []
    for number, ((path, setting, command), sampling) in enumerate(zip(work, parsed, strict=True), 1):
        if len(work) > 1:
            notice(f"{number} of {len(work)}: {path.stem} {' '.join(flags(setting))}")
        run("generate.py", *command)
        folder = samples_of(sampling, path, *read(path))
        folders.append(folder)
        if scoring is None:
            continue
        metrics = scoring.scored(folder, sampling.save_cls_tokens) or scoring.score(folder, sampling.save_cls_tokens)
        if is_first_node(os.environ):                             # after every setting: an interruption loses nothing
            report = write_report(folders)

    if scoring is None:
        raise UserError(f"samples are in {', '.join(map(str, folders))}: to score them, set REF_BATCH to an npz or an "
                        "image folder and give the same command")
    if len(folders) == 1:
        report += [f"grid: {folder / 'grid.png'}", f"metrics: {metrics}"]
    say("\n".join(report))


if __name__ == "__main__":
    main()
