"""Score generated images against a reference: Inception Score, FID, sFID, precision and recall, equal to ADM's evaluator.

    python -m evaluations.evaluator --ref-batch VIRTUAL_imagenet256_labeled.npz --sample-batch samples.npz --output metrics.json
    python -m evaluations.evaluator stats FOLDER_OR_NPZ OUT.npz         # a reference from your own images
    python -m evaluations.evaluator selftest FOLDER                     # against ADM's published batches, if you have them

Images come as npz in ADM's form (`arr_0`, uint8, NHWC, RGB; streamed, never loaded whole) or as a folder. On several GPUs:
python -m runtime.launch -m evaluations.evaluator ...
"""

import argparse
import functools
import importlib.metadata
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from evaluations.acceptance import PUBLISHED, compare
from evaluations.class_tokens import class_token_scores, load_class_token_extractor, read_class_tokens
from evaluations.extraction import measure, place, reference_cache
from evaluations.features import Extractor, load_extractor
from evaluations.images import ImageSet, open_images, pick
from evaluations.metrics import NEIGHBOURS
from evaluations.scoring import ADM_METRICS, INCEPTION_METRICS, OTHER_METRICS, choose, evaluate, warn_of_few
from runtime.files import write_npz, write_whole
from runtime.launch import join_processes, leave_processes
from runtime.messages import UserError, say, without_traceback

COMMANDS = ("score", "stats", "selftest")
KEPT = 10_000  # images that `stats` keeps for precision and recall, as many as ADM's reference files hold
# Names and order of ADM's evaluator, whose output others parse.
PRINTED = {"inception_score": "Inception Score", "fid": "FID", "sfid": "sFID", "precision": "Precision", "recall": "Recall",
           "class_token_cosine": "Class token cosine", "class_token_accuracy": "Class token accuracy"}
ASKED = ("features", "metrics", "precision_recall")  # flags that decide which scores there are, repeated in the output
FOUR_DECIMALS = ("precision", "recall", "class_token_cosine", "class_token_accuracy")
TO_BE_MADE = ImageSet("the samples", 50_000, None, lambda ranges: iter(()))        # what a dry run takes the samples for


# ------------------------------------------------------------------------------------------------------------------ arguments

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of `score`, the default command, or of `stats` or `selftest`; `.command` says which."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv and argv[0] in COMMANDS else "score"
    parser = argparse.ArgumentParser(prog="python -m evaluations.evaluator" + ("" if command == "score" else f" {command}"),
                                     description=__doc__ if command == "score" else DESCRIPTIONS[command],
                                     formatter_class=Formatter, allow_abbrev=False)
    {"score": _score_flags, "stats": _stats_flags, "selftest": _selftest_flags}[command](parser)
    network = parser.add_argument_group("network")
    if command != "selftest":
        network.add_argument("--features", default="inception", metavar="inception|dinov2|local-dir:FOLDER",
                             help="feature network; a folder holds a timm model. A distance in other features than Inception's is not "
                                  "called FID")
        network.add_argument("--dinov2-weights", type=Path, metavar="FILE", help="weights of dinov2 (None: timm's hub or its cache)")
    network.add_argument("--inception-weights", type=Path, metavar="FILE",
                         help="weights of the Inception of 2015-12-05 (None: torch hub cache, else download)")
    network.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device of network and algebra")
    network.add_argument("--batch-size", type=int, default=64, help="images per forward pass")
    args = parser.parse_args(argv)
    if command == "score" and args.sample_batch is None and not args.dry_run:
        parser.error("--sample-batch is missing: name an npz file or a folder of generated images")
    if args.batch_size < 1:
        parser.error(f"--batch-size is {args.batch_size}: expected at least 1")
    args.command = command
    return args


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and every default."""


DESCRIPTIONS = {
    "stats": "Write mu, sigma, mu_s, sigma_s of a set of images, and some of the images for precision and recall, as one npz that serves "
             "as --ref-batch.\nFor data sets without a published reference; the numbers compare only with others against the same file.",
    "selftest": "Score ADM's published sample batches and compare with the published numbers. FOLDER holds, from ADM's evaluation suite,\n"
                + "\n".join(f"  {row.ref} and {row.sample}" for row in PUBLISHED) + "\nor one of these pairs.",
}


def _score_flags(parser: argparse.ArgumentParser) -> None:
    images = parser.add_argument_group("images: an npz file (arr_0, uint8, NHWC) or a folder")
    images.add_argument("--ref-batch", "--ref_batch", type=Path, required=True, default=argparse.SUPPRESS, metavar="REF",
                        help="reference; its own mu, sigma, mu_s and sigma_s are used when an npz has them")
    images.add_argument("--sample-batch", "--sample_batch", type=Path, default=None, metavar="SAMPLE",
                        help="generated images; the settings.json beside the npz (or in the folder) goes into the output")
    scores = parser.add_argument_group("scores")
    scores.add_argument("--metrics", default=None, metavar="LIST",
                        help=f"comma-separated: {', '.join(INCEPTION_METRICS)}; in other features {', '.join(OTHER_METRICS)} "
                             "(None: ADM's five, or fd)")
    scores.add_argument("--precision-recall", choices=("adm", "exact", "off"), default="adm",
                        help="distances in float16 as ADM's, which papers report; in float32; or neither score")
    scores.add_argument("--class-tokens", type=Path, metavar="FILE", help="class_tokens.npz of the same samples: scores REG's tokens too")
    scores.add_argument("--enc-type", metavar="NAME", help="encoder of the class tokens (None: from the sample's settings.json)")
    scores.add_argument("--encoder-weights", metavar="FILE", help="its weights (None: as in training)")
    scores.add_argument("--cache", type=Path, default=reference_cache(), metavar="DIR",
                        help="keeps the reference's features, by content; may be deleted at any time")
    scores.add_argument("--output", "--save_path", type=Path, metavar="OUT.json",
                        help="result; an existing folder gets metrics.json (None: print only)")
    scores.add_argument("--dry-run", action="store_true", help="check reference and feature network, and stop")


def _stats_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="FOLDER_OR_NPZ", help="images")
    parser.add_argument("output", type=Path, metavar="OUT.npz", help="file to write")
    parser.add_argument("--adm-crop", type=int, metavar="PIXELS",
                        help="cut and resize every image as ADM did, to this size (None: images are used as they are, and have one size)")
    parser.add_argument("--keep", type=int, default=KEPT, metavar="N", help="images kept for precision and recall, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")


def _selftest_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where ADM's files are")


# ------------------------------------------------------------------------------------------------------------------- commands

@without_traceback
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    {"score": score, "stats": make_statistics, "selftest": selftest}[args.command](args)


def score(args: argparse.Namespace) -> None:
    # Everything that can be wrong with the arguments is said before weights are downloaded or images read.
    output = _output(args.output, args.ref_batch, args.sample_batch, args.class_tokens, args.inception_weights, args.dinov2_weights)
    metrics = None if args.metrics is None else [name.strip() for name in args.metrics.split(",")]
    if args.precision_recall == "exact" and args.features != "inception":
        raise UserError(f"--precision-recall exact came with --features {args.features}, in which there are neither: leave it out")
    for flag, value in (("--enc-type", args.enc_type), ("--encoder-weights", args.encoder_weights)):
        if value is not None and args.class_tokens is None:
            raise UserError(f"{flag} {value} came without --class-tokens, and would be ignored: name the class tokens too, or leave it out")
    ref = open_images(args.ref_batch, "--ref-batch")
    if args.dry_run:
        choose(metrics, ref, TO_BE_MADE, open_extractor(args, args.features, args.dinov2_weights), args.precision_recall)
        return
    sample, settings = open_images(args.sample_batch, "--sample-batch"), read_settings(args.sample_batch)
    tokens = None if args.class_tokens is None else open_class_tokens(args, sample, settings)
    extractor = open_extractor(args, args.features, args.dinov2_weights)
    encoder = tokens and load_class_token_extractor(tokens.enc_type, extractor.device, sample.size[0], tokens.weights,
                                                    width=tokens.tokens.shape[1])
    result = evaluate(ref, sample, extractor, metrics, args.precision_recall, args.batch_size, args.cache)
    token_scores = tokens and class_token_scores(tokens.tokens, tokens.labels, ref, sample, encoder, args.batch_size, args.cache)
    if result is None:                                            # the first process writes
        return
    result = (token_scores or {}) | result
    result |= {"sample_batch": str(args.sample_batch), "ref_batch": str(args.ref_batch),
               "asked": {name: getattr(args, name) for name in ASKED}}
    if settings is not None:
        result["settings"] = settings
    say("\n".join(lines(result, extractor)))
    if output is not None:
        write_whole(output, lambda partial: partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8"))


def lines(result: dict, extractor: Extractor) -> list[str]:
    """What is printed: ADM's five lines, more where more was asked for, and one that says of what."""
    names = PRINTED | {extractor.key: extractor.label}
    shown = [f"{names[key]}: {f'{result[key]:.4f}' if key in FOUR_DECIMALS else result[key]}" for key in names if key in result]
    kid = extractor.kid_key
    if kid in result:
        shown.append(f"KID{'' if extractor.is_inception else f' ({extractor.name})'}: {result[kid]} +- {result[f'{kid}_std']}")
    counts = [counted(result["num_samples"], "samples", result["sample_statistics_from_file"], None),
              counted(result["num_reference"], "reference images", result["reference_statistics_from_file"], result.get("reference_about"))]
    known = {True: ", the published file", False: ", NOT the published file", None: ""}[extractor.weights_verified]
    modes = [f"{name.replace('_', ' ')}: {mode}" for name, mode in result["modes"].items()]
    return [*shown, "; ".join([*counts, f"{extractor.name} with sha256 {extractor.weights_sha256}{known}", *modes])]


def counted(images: int | None, what: str, from_file: bool, about: dict | None) -> str:
    """How many images stand for one side, and whether its mean and covariance came from the file instead."""
    statistics = f"{what}' statistics from the file" + (f" (of {about['images']})" if about else "")
    return f"{images} {what}" if not from_file else statistics if images is None else f"{images} {what} and {statistics}"


def make_statistics(args: argparse.Namespace) -> None:
    if args.keep != 0 and args.keep <= NEIGHBOURS:
        raise UserError(f"--keep is {args.keep}: give 0, or at least {NEIGHBOURS + 1}, which precision and recall need")
    if args.adm_crop is not None and args.adm_crop < 1:
        raise UserError(f"--adm-crop is {args.adm_crop}: give the side in pixels")
    if args.output.suffix != ".npz":
        raise UserError(f"the output is {args.output}: give it a name that ends in .npz")
    output = _output(args.output, args.source, args.inception_weights, args.dinov2_weights)
    images = replace(open_images(args.source, "the images", args.adm_crop), statistics=None)   # a file's own are not of its images
    if images.blocks is None:
        raise UserError(f"{args.source} holds statistics and no images: name images")
    extractor = open_extractor(args, args.features, args.dinov2_weights)
    found = measure(images, extractor, args.batch_size, {"gaussian", "spatial"} if extractor.is_inception else {"gaussian"})
    if found.gaussian is None:
        return
    warn_of_few([(images.count, "images")], len(found.gaussian[0]), extractor)
    arrays = dict(zip(("mu", "sigma", "mu_s", "sigma_s"), (*found.gaussian, *(found.spatial or ())), strict=False))
    about = {"source": str(args.source), "images": images.count, "adm_crop": args.adm_crop, "kept": min(args.keep, images.count),
             "seed": args.seed, "features": extractor.name, "distance": extractor.key, "weights_sha256": extractor.weights_sha256,
             "weights_verified": extractor.weights_verified,
             "versions": {name: importlib.metadata.version(name) for name in ("torch", "numpy", "pillow")}}
    arrays = {name: value.cpu().numpy() for name, value in arrays.items()} | {"about": np.array(json.dumps(about))}
    rows = np.sort(np.random.default_rng(args.seed).choice(images.count, min(args.keep, images.count), replace=False))
    if images.labels is not None:
        arrays["arr_1"] = images.labels[rows]
    write_npz(output, pick(images, rows.tolist()), len(rows), images.size, **arrays)
    say(f"{output}: statistics of {images.count} images, {len(rows)} of them kept")


def selftest(args: argparse.Namespace) -> None:
    pairs = [row for row in PUBLISHED if (args.folder / row.ref).is_file() and (args.folder / row.sample).is_file()]
    if not pairs:
        names = "; or ".join(f"{row.ref} and {row.sample}" for row in PUBLISHED)
        raise UserError(f"{args.folder} holds none of ADM's published pairs: download {names}, from ADM's evaluation suite")
    extractor, passed = open_extractor(args, "inception"), True
    for row in pairs:
        result = evaluate(args.folder / row.ref, args.folder / row.sample, extractor, ADM_METRICS, "adm", args.batch_size)
        if result is None:
            continue
        say(f"{row.sample}\n{'':16} {'published':>12} {'here':>12}")
        for name, published, measured, close in compare(row.scores, result):
            say(f"{PRINTED[name]:16} {published:12.6g} {measured:12.6g}   {'equal' if close else 'DIFFERENT'}")
            passed &= close
    if not passed:
        raise UserError("the scores differ from the published ones by more than two implementations should: "
                        f"check the files and the Inception weights (sha256 {extractor.weights_sha256})")


# --------------------------------------------------------------------------------------------------------------------- set-up

def open_extractor(args: argparse.Namespace, features: str, dinov2_weights: Path | None = None) -> Extractor:
    """The feature network on every process: one of them downloads, the others find the cache."""
    load = functools.partial(load_extractor, features, _join(args.device), args.inception_weights, dinov2_weights)
    first = place()[0] == 0
    if first:
        extractor = load()
    if place()[1] > 1:
        torch.distributed.barrier()
    return extractor if first else load()


def _join(name: str) -> torch.device:
    """This process's device, once it has joined the others if there are any."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device is {name!r}: expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {name!r}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device is {name!r} and torch sees {torch.cuda.device_count()} GPUs: use another, or cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.index is not None:
        raise UserError(f"--device is {name!r}, but several processes were started: give cuda, and each takes its own, or cpu")
    joined = join_processes(cpu=device.type == "cpu").device
    return device if device.type == "cpu" else joined


@dataclass(frozen=True)
class ClassTokens:
    """Generated class tokens (N, E) with their labels (N,), and the encoder they are compared with."""

    tokens: torch.Tensor
    labels: torch.Tensor
    enc_type: str
    weights: str | None


def open_class_tokens(args: argparse.Namespace, sample: ImageSet, settings: dict | None) -> ClassTokens:
    training = (settings or {}).get("training") or {}
    enc_type = args.enc_type or (training.get("enc_type") or "").split(",")[0]
    if not enc_type:
        raise UserError(f"--class-tokens came, but no settings.json beside {args.sample_batch} names the encoder of the training: "
                        "name it with --enc-type")
    if sample.blocks is None:
        raise UserError(f"--class-tokens came, but {sample.name} holds no images to compare with")
    recorded = (training.get("encoder_weights") or "").split(",")[0] if args.enc_type is None else ""
    return ClassTokens(*read_class_tokens(args.class_tokens, sample.count), enc_type, args.encoder_weights or recorded or None)


def read_settings(sample: Path) -> dict | None:
    """The `settings.json` that generate.py leaves beside the npz (for a folder: in it), so that a score says how its images were made."""
    path = (sample if sample.is_dir() else sample.parent) / "settings.json"
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): sample again, or move the file away") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("training") or {}, dict):
        raise UserError(f"{path} is no object as generate.py writes it: sample again, or move the file away")
    return settings


def _output(path: Path | None, *inputs: Path | None) -> Path | None:
    """The file to write, whose folder is made when it is written. Raises UserError where it cannot be, or is one of the inputs."""
    if path is None:
        return None
    path = path / "metrics.json" if path.is_dir() else path
    for given in inputs:
        if given is not None and os.path.exists(given) and os.path.exists(path) and given.samefile(path):
            raise UserError(f"the output {path} is the input {given}, which would be lost: name another file")
    home = next(folder for folder in path.parents if os.path.exists(folder))
    if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written ({home} is {'closed to you' if home.is_dir() else 'no folder'}): "
                        "name a file in a folder of yours")
    return path


if __name__ == "__main__":
    main()
    leave_processes()
