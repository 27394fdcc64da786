"""Prepare a data set: `convert` pictures to images, `encode` images to moments, or to an encoder's features, `check` them.

    python -m preprocessing.dataset_tools convert --source=PHOTOS --dest=DATA/images --resolution=256x256
    python -m preprocessing.dataset_tools encode --source=DATA/images --dest=DATA/vae-sd
    python -m preprocessing.dataset_tools encode --source=DATA/images --dest=DATA/features-dinov2-vit-b --enc-type=dinov2-vit-b
    python -m preprocessing.dataset_tools check --source=DATA

Given again, a command continues where it was interrupted. Source and destination are folders or zip files.
Several GPUs: `accelerate launch -m preprocessing.dataset_tools encode ...`.
"""

import argparse
import io
import sys
from pathlib import Path

import torch

if not __package__:  # called as a script: the repository is not on the path yet
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from models.vae import SHORTHANDS
from preprocessing.check import check
from preprocessing.convert import TRANSFORMS, convert
from preprocessing.encode import PRECISIONS
from preprocessing.encode import encode as encode_moments
from preprocessing.encode_features import encode_features
from preprocessing.work import all_cores, reading_workers
from runtime.launch import leave_processes
from runtime.messages import UserError, without_traceback


def encode(source: str, dest: str, batch_size: int, workers: int, model_url: str | None = None, dtype: str | None = None,
           precision: str | None = None, compile: bool | None = None, enc_type: str | None = None,
           encoder_weights: str | None = None) -> None:
    """Moments, or with an encoder its features; raises UserError as both do, and for flags of the one that came with the other."""
    if enc_type is not None:
        if model_url is not None:
            raise UserError(f"--model-url {model_url} came with --enc-type {enc_type}: a VAE gives moments, an encoder features; give one")
        if precision is not None:
            raise UserError(f"--precision {precision} came with --enc-type {enc_type}: encoders compute in float32; leave it out")
        if compile is not None:
            raise UserError(f"--{'' if compile else 'no-'}compile came with --enc-type {enc_type}: it is the VAE's; leave it out")
        return encode_features(source, dest, enc_type, encoder_weights, batch_size, dtype or "float16", workers)
    if encoder_weights is not None:
        raise UserError(f"--encoder-weights {encoder_weights} came without an encoder: name it with --enc-type")
    if dtype == "int8":
        raise UserError("--dtype int8 came without --enc-type: moments are stored as float16 or float32")
    return encode_moments(source, dest, model_url or SHORTHANDS["mse"], batch_size, dtype or "float32", workers, precision,
                          compile)


def build_parser() -> argparse.ArgumentParser:
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="convert | encode | check")

    def command(function, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(function.__name__, help=text, description=text, formatter_class=form, allow_abbrev=False)
        added.set_defaults(function=function)
        return added

    # SUPPRESS keeps "(default: None)" out of the help: the functions themselves have the default.
    optional = {"default": argparse.SUPPRESS}
    required = {**optional, "required": True}
    one = command(convert, "crop and resize pictures to square RGB images")
    one.add_argument("--source", **required, help="pictures: a folder or a zip; labels from its dataset.json or its top-level folders")
    one.add_argument("--dest", **required, help="images: a folder or a name ending in .zip")
    one.add_argument("--resolution", default="256x256", help="size of the images in pixels, WIDTHxHEIGHT, square")
    one.add_argument("--transform", default=TRANSFORMS[0], choices=TRANSFORMS, help="ADM's centre crop, or none: the pictures must fit")
    one.add_argument("--max-images", type=int, **optional, help="take only the first pictures, in sorted order (default: all)")
    one.add_argument("--workers", type=int, default=all_cores(), help="processes that convert; 0: none but this one")

    two = command(encode, "encode images to VAE moments, or with --enc-type to an encoder's features")
    two.add_argument("--source", **required, help="images, as written by convert: a folder or a zip")
    two.add_argument("--dest", **required, help="moments or features: a folder or a name ending in .zip")
    two.add_argument("--model-url", **optional, help=f"VAE: a hub id, a local folder, ema or mse (default: {SHORTHANDS['mse']})")
    two.add_argument("--enc-type", **optional, help="encoder, as train.py names it: store its features instead, for --cached-features")
    two.add_argument("--encoder-weights", **optional, metavar="FILE", help="weights of the encoder (default: the hub's)")
    two.add_argument("--batch-size", type=int, default=32, help="images encoded at a time, per process")
    two.add_argument("--dtype", **optional, choices=("float16", "float32", "int8"),
                     help="how they are stored: moments as float32 (default) or float16, patch tokens as float16 (default) or int8")
    two.add_argument("--precision", **optional, choices=PRECISIONS,
                     help="how the VAE computes: tf32 moves moments as much as storing them as float16 does, bf16 more (default: tf32 on a "
                          "GPU, as PyTorch convolves there by itself, else fp32)")
    two.add_argument("--compile", action=argparse.BooleanOptionalAction, **optional,
                     help="compile the VAE, which moves moments as its precision does (default: on a GPU in bf16)")
    two.add_argument("--workers", type=int, default=reading_workers(torch.cuda.is_available()),
                     help="processes that read, for each that encodes; 0: none but this one, which suits a CPU")

    three = command(check, "verify a prepared data set and draw a picture to look at")
    three.add_argument("--source", **required, help="the data folder that holds images and vae-sd, folders or zips")
    three.add_argument("--output", default="check.png", help="the picture: images above their decoded latents")
    three.add_argument("--model-url", **optional, help="VAE that decodes (default: the decoder of the one that encoded)")
    three.add_argument("--workers", type=int, default=all_cores(), help="processes that read; 0: none but this one")
    return parser


@without_traceback
def main(argv: list[str] | None = None) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")         # class names may hold letters that the terminal's encoding has not
    arguments = vars(build_parser().parse_args(argv))
    if arguments["workers"] < 0:
        raise UserError(f"--workers is {arguments['workers']}: give 0 or more")
    arguments.pop("function")(**arguments)


if __name__ == "__main__":
    main()
    leave_processes()
