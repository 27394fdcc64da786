"""Prepare a data set: `convert` pictures, `encode` images to moments or an encoder's features, add `captions`, `check`.

    python -m preprocessing.dataset_tools convert --source=PHOTOS --dest=DATA/images --resolution=256x256
    python -m preprocessing.dataset_tools encode --source=DATA/images --dest=DATA/vae-sd
    python -m preprocessing.dataset_tools encode --source=DATA/images --dest=DATA/features-dinov2-vit-b \
        --enc-type=dinov2-vit-b
    python -m preprocessing.dataset_tools captions --source=DATA --captions=captions.json
    python -m preprocessing.dataset_tools import-latents --source=LATENTS --dest=DATA/vae-sd --format=lightningdit \
        --vae=va-vae
    python -m preprocessing.dataset_tools stats-latents --source=DATA/vae-sd --output=stats.npz
    python -m preprocessing.dataset_tools check --source=DATA

The same command continues an interrupted one. Source and destination are folders or zip files; docs/data.md has other
forms of sources.
Several GPUs: `accelerate launch -m preprocessing.dataset_tools encode ...`.
"""

import argparse
import os
import sys
from pathlib import Path

import torch

if not __package__:  # called as a script: the repository is not on the path yet
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from models.cached_features import DTYPES, features_folder
from models.vae import VAES
from preprocessing import encode as encoding
from preprocessing.captions import captions
from preprocessing.check import check
from preprocessing.convert import convert, parse_resolution
from preprocessing.crop import TRANSFORMS
from preprocessing.latents import FORMATS, import_latents
from runtime.arguments import Parser, at_least
from runtime.launch import join_processes, leave_processes
from runtime.messages import UserError, without_traceback
from runtime.stores import shown


def encode(source: str, dest: str, batch_size: int, workers: int, vae: str | None = None,
           latent_stats: Path | None = None, dtype: str | None = None, precision: str | None = None,
           compile: bool | None = None, enc_type: str | None = None, encoder_weights: str | None = None,
           max_images: int | None = None, **columns: str) -> None:
    """Encode moments or, with `enc_type`, features. Raises UserError as both do, and for flags of the other one."""
    if enc_type is None:
        if encoder_weights is not None:
            raise UserError(f"--encoder-weights {encoder_weights}: needs --enc-type")
        if dtype == "int8":
            raise UserError("--dtype int8: for features only; give float16 or float32, or add --enc-type")
        network = encoding.Moments(vae or "mse", dtype or "float32", precision, compile, join_processes().device,
                                   latent_stats)
    else:
        for flag, value in (("--vae or --model-url", vae), ("--latent-stats", latent_stats),
                            ("--precision", precision), ("--compile", compile)):
            if value is not None:
                raise UserError(f"{flag} {value}: for moments only; leave it out, or leave out --enc-type")
        if dtype not in (None, *DTYPES):
            raise UserError(f"--dtype {dtype}: features are stored as {' or '.join(DTYPES)}; give one of these")
        if "," in enc_type:
            raise UserError(f"--enc-type {enc_type}: encode one encoder at a time, each into its own --dest")
        name = features_folder(enc_type)
        if Path(dest).name.removesuffix(".zip") != name:
            raise UserError(f"--dest {shown(dest)}: training looks for DATA/{name} or DATA/{name}.zip; use that name")
        network = encoding.Features(enc_type, encoder_weights, dtype or "float16", join_processes().device)
    encoding.encode(source, dest, network, batch_size, workers, max_images, **columns)


def build_parser() -> Parser:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)                   # of this process
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    optional = {"default": argparse.SUPPRESS}                     # the functions know it; no "(default: None)"

    def command(function, text: str, **paths: str) -> Parser:
        added = commands.add_parser(function.__name__.replace("_", "-"), help=text, description=text)
        added.set_defaults(function=function)
        for flag, meaning in paths.items():
            added.add_argument(f"--{flag}", required=True, **optional, help=meaning)
        return added

    one = command(convert, "crop and resize pictures to square RGB images",
                  source="pictures: a folder, a zip, tars, parquet or Arrow shards, or a list: see docs/data.md",
                  dest="images: a folder or a name ending in .zip")
    one.add_argument("--resolution", type=parse_resolution, default="256x256", help="of the images, square, in pixels")
    one.add_argument("--transform", **optional, choices=TRANSFORMS,
                     help=f"none: pictures must fit (default: {TRANSFORMS[0]} if all pictures are square)")
    one.add_argument("--captions", **optional, metavar="FILE",
                     help="COCO's captions_*.json, other JSON or JSON lines (default: .txt or .json beside pictures)")
    one.add_argument("--max-images", type=at_least(1), **optional, help="the first of each class (default: all)")
    one.add_argument("--skip-bad", type=at_least(0), default=0, metavar="N", help="leave out up to N unreadable ones")
    one.add_argument("--workers", type=at_least(0, 1000), default=cores, help="processes that convert; 0: this one")

    two = command(encode, "encode images to VAE moments, or with --enc-type to an encoder's features",
                  source="images, as written by convert, or in any form that it reads",
                  dest="moments or features: a folder or a name ending in .zip")
    two.add_argument("--vae", "--model-url", **optional,
                     help=f"VAE: a hub id, a local folder, or one of {', '.join(VAES)} (default: mse)")
    two.add_argument("--latent-stats", **optional, type=Path, metavar="FILE",
                     help="npz or pt with mean and std per channel (default: the VAE's own normalisation)")
    two.add_argument("--enc-type", **optional, help="encoder, as in train.py: store features, for --cached-features")
    two.add_argument("--encoder-weights", **optional, metavar="FILE", help="of the encoder (default: the hub's)")
    two.add_argument("--max-images", type=at_least(1), **optional,
                     help="the first of each class; training needs all: for fewer, limit convert (default: all)")
    two.add_argument("--batch-size", type=at_least(1, 10**5), default=32, help="images encoded at a time, per process")
    two.add_argument("--dtype", **optional, choices=("float16", "float32", "int8"),
                     help="stored moments: float32 (default) or float16; patch tokens: float16 (default) or int8")
    two.add_argument("--precision", **optional, choices=encoding.PRECISIONS,
                     help="of the VAE's arithmetic: tf32 changes moments as much as storing float16 does, bf16 more "
                          "(default: on a GPU tf32, PyTorch's own for convolutions, else fp32)")
    two.add_argument("--compile", action=argparse.BooleanOptionalAction, **optional,
                     help="compile the VAE; moments change within its precision (default: on a GPU in bf16)")
    two.add_argument("--workers", type=at_least(0, 1000), default=min(cores, 8) if torch.cuda.is_available() else 0,
                     help="processes that read, per process that encodes; 0: none, which suits a CPU")

    for added in (one, two):
        for column in ("image", "label", "caption"):
            added.add_argument(f"--{column}-column", **optional, metavar="NAME",
                               help="in parquet, Arrow or a list (default: the only one of a usual name or type)")

    command(captions, "add captions to a prepared data set", source="the data folder with images, vae-sd or both",
            captions="COCO's captions_*.json, other JSON or JSON lines")

    four = command(import_latents, "turn latents that other programs stored into moments",
                   source="a folder of their files, or one file", dest="moments: a folder or a name ending in .zip")
    four.add_argument("--format", required=True, choices=FORMATS, **optional, help="of the files: see docs/data.md")
    four.add_argument("--vae", required=True, **optional, help="that wrote the latents, as for encode")
    four.add_argument("--normalised", action="store_true", help="they are multiplied by the scaling factor already")
    four.add_argument("--flips", action="store_true", help="take latents_flip, too, as further entries")
    four.add_argument("--workers", type=at_least(0, 1000), default=cores, help="processes that write; 0: this one")

    stats = command(encoding.stats_latents, "measure mean and std of each latent channel, for --latent-stats",
                    source="moments, as written by encode: a folder or a zip", output="the statistics, a name in .npz")
    stats.add_argument("--workers", type=at_least(0, 1000), default=cores, help="processes that read; 0: this one")

    three = command(check, "verify a prepared data set and draw a picture to look at",
                    source="the data folder with images and vae-sd, folders or zips")
    three.add_argument("--output", default="check.png", help="the picture: images above their decoded latents")
    three.add_argument("--vae", "--model-url", **optional, help="VAE that decodes (default: that of the data set)")
    three.add_argument("--workers", type=at_least(0, 1000), default=cores, help="processes that read; 0: this one")
    return parser


@without_traceback
def main(argv: list[str] | None = None) -> None:
    arguments = vars(build_parser().parse_args(argv))
    arguments.pop("function")(**arguments)


if __name__ == "__main__":
    main()
    leave_processes()
