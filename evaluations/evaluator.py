"""Score generated images against a reference: Inception Score, FID, sFID, precision and recall, equal to ADM's.

    python -m evaluations.evaluator --ref-batch VIRTUAL_imagenet256_labeled.npz --sample-batch samples.npz
    python -m evaluations.evaluator stats FOLDER_OR_NPZ OUT.npz         # a reference from your own images
    python -m evaluations.evaluator selftest FOLDER                     # compare with ADM's published batches

Images come as npz in ADM's form (`arr_0`, uint8, NHWC, RGB; streamed, never loaded whole) or as a folder. On several
GPUs: python -m runtime.launch -m evaluations.evaluator ...
"""

import argparse
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

if not __package__:  # called as a script: the repository is not on the path yet
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from evaluations import acceptance
from evaluations.class_tokens import class_token_scores, load_class_token_extractor, read_class_tokens
from evaluations.clip import METRIC, Clip, clip_score, read_captions
from evaluations.extraction import measure_all, place
from evaluations.features import Extractor, load_extractor
from evaluations.images import ImageSet, open_images, pick, reference_label
from evaluations.metrics import NEIGHBOURS
from evaluations.networks import FDR6, OTHERS
from evaluations.scoring import ADM_METRICS, INCEPTION_METRICS, OTHER_METRICS, choose, evaluate, warn_of_few
from models.text import DEFAULT
from runtime.arguments import Parser, at_least
from runtime.files import read_object, sha256, write_json
from runtime.launch import join_processes, leave_processes
from runtime.messages import UserError, notice, say, without_traceback
from runtime.npz import write_npz

KEPT = 10_000  # images that `stats` keeps for precision and recall, as many as ADM's reference files hold
# Names and order of ADM's evaluator, whose output other programs parse.
PRINTED = {"inception_score": "Inception Score", "fid": "FID", "sfid": "sFID", "precision": "Precision",
           "recall": "Recall",
           "class_token_cosine": "Class token cosine", "class_token_accuracy": "Class token accuracy"}
ASKED = ("features", "metrics", "precision_recall")  # flags that decide which scores there are, repeated in the output
NOTES = ("cfg_cond", "step", "num_steps", "cfg", "cls_cfg", "gh")  # flags of REG's eval.sh, for the output
FOUR_DECIMALS = ("precision", "recall", "class_token_cosine", "class_token_accuracy")
UNKNOWN_SAMPLES = ImageSet("the samples", 50_000, None, lambda ranges: iter(()))      # in a dry run


# ---- arguments -------------------------------------------------------------------------------------------------------

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags of `score`, the default command, of `stats` or of `selftest`; `.command` is its name."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv and argv[0] in COMMANDS else "score"
    add_flags, run = COMMANDS[command]
    parser = Parser(prog="python -m evaluations.evaluator" + ("" if command == "score" else f" {command}"),
                    description=inspect.getdoc(run), formatter_class=Formatter)
    add_flags(parser)
    network = parser.add_argument_group("network")
    if command != "selftest":
        network.add_argument("--features", default="inception", metavar="inception|dinov2|local-dir:FOLDER",
                             help=f"feature network, also {', '.join(OTHERS)}; a folder holds a timm model. Only "
                                  "a distance in Inception's features is called FID")
        network.add_argument("--dinov2-weights", type=Path, metavar="FILE",
                             help="weights of dinov2 (None: timm's hub or its cache)")
    network.add_argument("--inception-weights", type=Path, metavar="FILE",
                         help="weights of the Inception of 2015-12-05 (None: torch hub cache, else download)")
    network.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu",
                         help="torch device of network and algebra")
    network.add_argument("--batch-size", type=at_least(1, 10**5), default=64, help="images per forward pass")
    args = parser.parse_args(argv)
    if command == "score" and args.sample_batch is None and not args.dry_run:
        parser.error("--sample-batch is missing: name an npz file or a folder of generated images")
    args.command = command
    return args


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the description's line breaks, and show every default."""


def _score_flags(parser: argparse.ArgumentParser) -> None:
    images = parser.add_argument_group("images: an npz file (arr_0, uint8, NHWC) or a folder")
    images.add_argument("--ref-batch", "--ref_batch", type=references, required=True, default=argparse.SUPPRESS,
                        metavar="REF[,REF]", help="reference; mu, sigma, mu_s and sigma_s of an npz are used if it has "
                        "them. A folder may hold FDr6's published files. Several with commas give a column each")
    images.add_argument("--sample-batch", "--sample_batch", type=Path, metavar="SAMPLE",
                        help="generated images; settings.json beside the npz (or in the folder) goes into the output")
    scores = parser.add_argument_group("scores")
    scores.add_argument("--metrics", metavar="LIST",
                        help=f"comma-separated: {', '.join(INCEPTION_METRICS)} (adm: the first five); in other "
                             f"features {', '.join(OTHER_METRICS)} (None: ADM's five, or fd); in any, {METRIC}")
    scores.add_argument("--precision-recall", choices=("adm", "exact", "off"), default="adm",
                        help="distances in float16 as ADM's, which papers report; in float32; or neither score")
    scores.add_argument("--clip", metavar="NAME|FOLDER", help=f"CLIP of {METRIC}, which it adds (None: {DEFAULT})")
    scores.add_argument("--captions", type=Path, metavar="FILE", help="for it (None: captions.jsonl of the samples)")
    scores.add_argument("--class-tokens", type=Path, metavar="FILE",
                        help="class_tokens.npz of the same samples: scores REG's class tokens too")
    scores.add_argument("--enc-type", metavar="NAME", help="their encoder (None: from the sample's settings.json)")
    scores.add_argument("--encoder-weights", metavar="FILE", help="its weights (None: as in training)")
    scores.add_argument("--output", "--save_path", type=Path, metavar="OUT.json",
                        help="result; an existing folder gets metrics.json (None: print only)")
    scores.add_argument("--dry-run", action="store_true", help="check reference and feature network, and stop")
    notes = parser.add_argument_group("notes, written into the output as they are")
    for name in NOTES:
        notes.add_argument(f"--{name}", metavar="TEXT", default=argparse.SUPPRESS)


def _stats_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="FOLDER_OR_NPZ", help="images")
    parser.add_argument("output", type=npz_file, metavar="OUT.npz", help="file to write")
    parser.add_argument("--adm-crop", type=at_least(1), metavar="PIXELS",
                        help="cut and resize every image as ADM did, to this size (None: all images have one size)")
    parser.add_argument("--keep", type=kept, default=KEPT, metavar="N",
                        help="images kept, drawn at random, and their features for precision, recall and MIND: 10,000 "
                             "take 2 GB at 256 px, and 80 MB in Inception's features (290 MB in all of FDr6)")
    parser.add_argument("--no-images", action="store_true", help="keep their features only")
    parser.add_argument("--networks", choices=("fdr6",), help="measure in the features of its other networks too")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of that draw")


def _selftest_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="ADM's files")


def device(text: str) -> torch.device:
    """A type for devices that torch has."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text}: expected cpu, cuda or cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text}: torch finds {torch.cuda.device_count()} GPUs; use cpu or another")
    return found


def references(text: str) -> list[Path]:
    """A type for paths with commas between them."""
    if "" in (paths := text.split(",")):
        raise argparse.ArgumentTypeError(f"{text}: names no file at a comma")
    return [Path(path) for path in paths]


def kept(text: str) -> int:
    """A type for 0, or enough images for precision and recall."""
    return 0 if text == "0" else at_least(NEIGHBOURS + 1)(text)


def npz_file(text: str) -> Path:
    """A type for names that end in .npz."""
    if not text.endswith(".npz"):
        raise argparse.ArgumentTypeError(f"{text}: expected a name that ends in .npz")
    return Path(text)


# ---- commands --------------------------------------------------------------------------------------------------------

@without_traceback
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    COMMANDS[args.command][1](args)


def score(args: argparse.Namespace) -> None:
    """Score generated images against a reference; `stats` and `selftest` in front of the flags have flags of their own.

    Images are an npz file in ADM's form (arr_0, uint8, NHWC, RGB) or a folder.
    """
    # All arguments are checked before weights are downloaded or images read.
    output = _output(args.output, *args.ref_batch, args.sample_batch, args.class_tokens, args.inception_weights,
                     args.dinov2_weights)
    metrics = None if args.metrics is None else [name for part in map(str.strip, args.metrics.split(","))
                                                 for name in (ADM_METRICS if part == "adm" else [part])]
    clip_name = args.clip or (DEFAULT if METRIC in (metrics or ()) else None)
    metrics = metrics and [name for name in metrics if name != METRIC]                    # of the feature network
    if args.precision_recall == "exact" and args.features != "inception":
        raise UserError(f"--precision-recall exact: not a score of --features {args.features}; leave it out")
    for flag, value, needed, given in (("--enc-type", args.enc_type, "--class-tokens", args.class_tokens),
                                       ("--encoder-weights", args.encoder_weights, "--class-tokens", args.class_tokens),
                                       ("--captions", args.captions, "--clip", clip_name)):
        if value is not None and given is None:
            raise UserError(f"{flag} {value}: needs {needed}; add it, or leave it out")
    refs, device = [open_images(path, "--ref-batch") for path in args.ref_batch], join(args.device)
    load = functools.partial(open_extractor, args.features, device, args.inception_weights, args.dinov2_weights)
    if args.dry_run:
        choose(metrics, refs, UNKNOWN_SAMPLES, load(), args.precision_recall)
        _ = clip_name and Clip(clip_name)                         # refuses
        return
    sample, settings = open_images(args.sample_batch, "--sample-batch"), read_settings(args.sample_batch)
    tokens = args.class_tokens and open_class_tokens(args.class_tokens, sample, (settings or {}).get("training") or {},
                                                     args.enc_type, args.encoder_weights, device)
    captions = clip_name and read_captions(args.sample_batch, args.captions, sample.count)
    clip = clip_name and Clip(clip_name)                          # the hub's client locks its downloads
    extractor = load()
    result = evaluate(refs, sample, extractor, metrics, args.precision_recall, args.batch_size,
                      open_networks=lambda: open_networks(device))
    token_scores = class_token_scores(*tokens, refs[0], sample, args.batch_size) if tokens else {}
    clip_scores = clip_score(sample, captions, clip, device, args.batch_size) if clip else {}
    if result is None:                                            # the first process writes
        return
    result = clip_scores | token_scores | result
    hashes = [hash_of_reference(path) for path in args.ref_batch]
    if "references" in result:
        result["references"] = [one | {"sha256": at} for one, at in zip(result["references"], hashes, strict=True)]
    result |= {"sample_batch": str(args.sample_batch), "ref_batch": str(args.ref_batch[0]),
               "reference_sha256": hashes[0],
               "asked": {name: getattr(args, name) for name in ASKED} | ({"clip": args.clip} if args.clip else {})}
    notes = {name: getattr(args, name) for name in NOTES if name in args}
    result |= ({"notes": notes} if notes else {}) | ({} if settings is None else {"settings": settings})
    say("\n".join(lines(result, extractor)))
    if output is not None:
        write_json(output, result)


def lines(result: dict, extractor: Extractor) -> list[str]:
    """ADM's five lines, more for other scores, and one on what was compared. Of several references, a column each."""
    refs = result.get("references", [])
    columns = [result, *refs[1:]]
    names = PRINTED | {extractor.key: extractor.label}
    names |= {key: f"CLIP score ({key.removeprefix(METRIC)[1:]})" for key in result if key.startswith(METRIC)}
    names |= {f"fd_{name}": f"Frechet distance ({name})" for name in OTHERS} | {"fdr6": "FDr6"}
    of_features = "" if extractor.is_inception else f" ({extractor.name})"
    names |= {extractor.key_of(metric): f"{metric.upper()}{of_features}" for metric in ("kid", "mind")}
    rows = [[f"{names[key]}: ", *(_shown(key, column) for column in columns)]
            for key in names if any(key in column for column in columns)]
    if refs:
        rows.insert(0, ["", *(reference_label(one["name"], one["sha256"]) for one in refs)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        rows = [[cell.ljust(width + 1) for cell, width in zip(row, widths, strict=True)] for row in rows]
    scores = ["".join(row).rstrip() for row in rows]
    counts = [f"{count or 'no'} {what}{' and statistics from the file' if read else ''}" for count, what, read in (
        (result["num_samples"], "samples", result["sample_statistics_from_file"]),
        (result["num_reference"], "reference images", result["reference_statistics_from_file"]))]
    known = {True: ", the published file", False: ", NOT the published file", None: ""}[extractor.weights_verified]
    network = f"{extractor.name} with sha256 {extractor.weights_sha256}{known}"
    modes = [f"{name.replace('_', ' ')}: {mode}" for name, mode in result["modes"].items()]
    if "reference_sha256" in result:
        refs = refs or [{"name": result["ref_batch"], "sha256": result["reference_sha256"]}]
        modes += [f"reference {one['name']} with sha256 {one['sha256'] or '(a folder)'}" for one in refs]
    return [*scores, "; ".join([*counts, network, *modes])]


def _shown(key: str, scores: dict) -> str:
    """A score as printed; '-' where a reference does not allow it."""
    if key not in scores:
        return "-"
    spread = f" +- {scores[f'{key}_std']}" if f"{key}_std" in scores else ""
    return f"{scores[key]:.4f}" if key in FOUR_DECIMALS else f"{scores[key]}{spread}"


def hash_of_reference(path: Path) -> str | None:
    """SHA-256 of a file, or of the hashes of FDr6's files in a folder; None for a folder of images."""
    if path.is_file():
        return sha256(path)
    files = [path / row.file for row in FDR6.values() if (path / row.file).is_file()]
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest() if files else None


def make_statistics(args: argparse.Namespace) -> None:
    """Write mu, sigma, mu_s, sigma_s of a set of images, and some images and their features, as a reference npz.

    For data sets without a published reference; the scores compare only with others against the same file.
    """
    if args.networks and args.features != "inception":
        raise UserError(f"--networks {args.networks}: belongs to --features inception, not {args.features}")
    output = _output(args.output, args.source, args.inception_weights, args.dinov2_weights)
    images = open_images(args.source, "the images", args.adm_crop)
    images = replace(images, statistics=None, more=())            # measured, not copied
    if images.blocks is None:
        raise UserError(f"{args.source}: holds statistics and no images; name images")
    device = join(args.device)
    extractor = open_extractor(args.features, device, args.inception_weights, args.dinov2_weights)
    networks = [open_extractor(name, device, None) for name in OTHERS] if args.networks else []
    about = {"source": str(args.source), "images": images.count, "adm_crop": args.adm_crop}
    write_reference(output, images, extractor, args.batch_size, args.keep, args.seed, about, networks,
                    not args.no_images)


def write_reference(path: Path, images: ImageSet, extractor: Extractor, batch_size: int, keep: int, seed: int,
                    about: dict, networks: Sequence[Extractor] = (), with_images: bool = True) -> None:
    """Write statistics of images, and features and images of up to `keep` drawn with `seed`, on the first process."""
    rng, count = np.random.default_rng(seed), min(keep, images.count)
    rows = np.sort(rng.choice(images.count, count, replace=False))                # (count,)
    need = {"gaussian", "pooled"}
    jobs = [(extractor, need | ({"spatial"} if extractor.is_inception else set())),
            *((network, need) for network in networks)]
    found = measure_all(images, jobs, batch_size, rows)
    if found[extractor.key].gaussian is None:
        return
    warn_of_few([(images.count, "images")], len(found[extractor.key].gaussian[0]), extractor)
    arrays, records = {}, []
    for network in (extractor, *networks):
        measured, suffix = found[network.key], "" if network is extractor else f"_{network.name}"
        pairs = zip(("mu", "sigma", "mu_s", "sigma_s"), (*measured.gaussian, *(measured.spatial or ())), strict=False)
        arrays |= {f"{name}{suffix}": value.cpu().numpy() for name, value in pairs}
        if count:
            arrays[f"pooled{suffix}"] = measured.pooled.cpu().numpy()
        records.append({"features": network.name, "distance": network.key, "weights_sha256": network.weights_sha256,
                        "weights_verified": network.weights_verified})
    about = about | {"kept": count, "seed": seed, **records[0], **({"more": records[1:]} if networks else {}),
                     "versions": {name: importlib.metadata.version(name) for name in ("torch", "numpy", "pillow")}}
    if images.labels is not None and with_images:
        arrays["arr_1"] = images.labels[rows]
    write_npz(path, pick(images, rows.tolist()), len(rows) if with_images else 0, images.size, **arrays,
              about=np.array(json.dumps(about)))
    say(f"{path}: statistics of {images.count} images, {count} of them kept")


def selftest(args: argparse.Namespace) -> None:
    """Score ADM's published sample batches and compare with the published numbers. FOLDER holds, from ADM's evaluation
    suite, VIRTUAL_imagenet256_labeled.npz and admnet_guided_upsampled_imagenet256.npz, or the same for 128 px.
    """
    rows = acceptance.present(args.folder)
    extractor = open_extractor("inception", join(args.device), args.inception_weights)
    acceptance.check(args.folder, rows, extractor, args.batch_size, PRINTED)


COMMANDS = {"score": (_score_flags, score), "stats": (_stats_flags, make_statistics),
            "selftest": (_selftest_flags, selftest)}


# ---- set-up ----------------------------------------------------------------------------------------------------------

def join(device: torch.device) -> torch.device:
    """This process's device, after joining the other processes if there are any."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.index is not None:
        raise UserError(f"--device {device}: cannot serve several processes; give cuda (one each) or cpu")
    joined = join_processes(cpu=device.type == "cpu").device
    return device if device.type == "cpu" else joined


def open_extractor(features: str, device: torch.device, inception_weights: Path | None,
                   dinov2_weights: Path | None = None) -> Extractor:
    """The feature network on every process; the first downloads, the others then find the cache."""
    load = functools.partial(load_extractor, features, device, inception_weights, dinov2_weights)
    rank, world = place()
    extractor = load() if rank == 0 else None
    if world > 1:
        torch.distributed.barrier()
    return extractor or load()


def open_networks(device: torch.device) -> list[Extractor]:
    """FDr6's networks beside Inception, on every process; names those whose weights the first process lacks."""
    missing, networks, (rank, world) = [], [], place()
    for name in OTHERS if rank == 0 else ():
        try:
            networks.append(load_extractor(name, device))
        except UserError as error:
            notice(str(error))
            missing.append(name)
    if world > 1:
        torch.distributed.broadcast_object_list(box := [missing], device=device)
        missing = box[0]
    return networks if rank == 0 else [load_extractor(name, device) for name in OTHERS if name not in missing]


def open_class_tokens(file: Path, sample: ImageSet, training: dict, enc_type: str | None, weights: str | None,
                      device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Extractor]:
    """Class tokens (N, E) of `sample`, their labels (N,), and their encoder: `enc_type` with `weights`, else the first
    one in the flags `training` of their model.
    """
    name = enc_type or str(training.get("enc_type") or "").split(",")[0]
    if not name:
        raise UserError(f"--class-tokens {file}: settings.json of the samples names no encoder; give --enc-type")
    if sample.blocks is None:
        raise UserError(f"--class-tokens {file}: {sample.name} holds no images to compare with; leave it out")
    recorded = str(training.get("encoder_weights") or "").split(",")[0] if enc_type is None else ""
    tokens, labels = read_class_tokens(file, sample.count)
    encoder = load_class_token_extractor(name, device, sample.size[0], weights or recorded or None, tokens.shape[1])
    return tokens, labels, encoder


def read_settings(sample: Path) -> dict | None:
    """The settings.json that generate.py leaves beside the npz (for a folder: in it), or None."""
    path = (sample if sample.is_dir() else sample.parent) / "settings.json"
    settings = read_object(path)
    if path.is_file() and not (settings and isinstance(settings.get("training") or {}, dict)):
        raise UserError(f"{path}: not an object of generate.py; sample again, or move the file away")
    return settings or None


def _output(path: Path | None, *inputs: Path | None) -> Path | None:
    """The file to write. Raises UserError if it is one of the inputs, or its folder cannot be written."""
    if path is None:
        return None
    path = path / "metrics.json" if path.is_dir() else path
    for given in inputs:
        if given is not None and os.path.exists(given) and os.path.exists(path) and given.samefile(path):
            raise UserError(f"{path}: output and input at once; name another output")
    home = next(folder for folder in path.parents if os.path.exists(folder))
    if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written ({home} is not a folder of yours); name another output")
    return path


if __name__ == "__main__":
    main()
    leave_processes()
