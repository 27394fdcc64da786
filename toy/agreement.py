"""Agreement: how often a sample shows the class, or what the caption names, that it was conditioned on.

    python -m toy.agreement SAMPLES.npz ...      # arr_0: uint8 images (N, R, R, 3), arr_1: labels (N,)
    python -m toy.agreement SAMPLES.npz ...      # arr_0 alone, with captions.jsonl beside it

The toy's feature network sees class, colour and shape; size, place and background are measured on the pixels.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from evaluations.features import TimmFeatures
from runtime.arguments import Parser
from runtime.files import UNREADABLE
from runtime.messages import UserError, without_traceback
from runtime.speed import full_precision
from toy.draw import CLASSES
from toy.words import PLACES, WORDS, Scene, parse

# Thresholds halfway between what toy/draw.py draws, in units of the image width; brightness in [0, 1].
SIDE, LARGE, LIGHT = 0.07, 0.175, 0.6
QUESTIONS = (("colour", "shape"), ("size", "place"), ("size",), ("place",), ("background",))
KNOWN = 0.18                              # the radius of gyration of a disc of size 0.3
FEATURES = Path(__file__).parent / "networks" / "features"


@torch.inference_mode()
def predict(network: TimmFeatures, images: torch.Tensor) -> torch.Tensor:
    """Classify uint8 images (N, 3, R, R) with `network` and its class head -> int64 (N,)."""
    head = network.model.get_classifier()
    with full_precision(torch.device("cpu")):
        return torch.cat([head(network(part)).argmax(dim=1) for part in images.split(256)])


def locate(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the shape in uint8 images (N, 3, R, R) -> centre (N, 2), radius (N,), brightness around (N,).

    The shape is what is saturated; its radius is that of gyration. Lengths are in units of the image width, the
    centre is in [-1/2, 1/2].
    """
    brightest, darkest = images.amax(dim=1) / 255, images.amin(dim=1) / 255               # (N, R, R)
    saturation = (brightest - darkest) / brightest.clamp(min=0.2)
    weight = ((saturation - 0.5) / 0.1).clamp(0, 1)
    weight = weight / weight.sum(dim=(1, 2), keepdim=True).clamp(min=1e-6)
    axis = (torch.arange(images.shape[-1]) + 0.5) / images.shape[-1] - 0.5                # (R,)
    x, y = ((weight.sum(dim=over) * axis).sum(dim=1) for over in (1, 2))                  # (N,)
    squares = (axis - x[:, None]).square()[:, None] + (axis - y[:, None]).square()[:, :, None]
    radius = (weight * squares).sum(dim=(1, 2)).sqrt()
    around = brightest.where(weight == 0, torch.nan).flatten(1).nanmedian(dim=1).values
    return torch.stack([x, y], dim=1), radius, around


def look(network: TimmFeatures, images: torch.Tensor) -> list[Scene]:
    """What uint8 images (N, 3, R, R) show: colour and shape by `network`, the rest measured on the pixels."""
    kinds = [CLASSES[kind].split("-") for kind in predict(network, close_up(images))]
    centres, radii, around = locate(images)
    cells = (centres > SIDE).long() - (centres < -SIDE).long() + 1                        # (N, 2): column, row
    return [Scene(size="small" if radius < LARGE else "large", colour=colour, shape=shape,
                  place=PLACES[3 * row + column], background="dark" if brightness < LIGHT else "light")
            for (colour, shape), (column, row), radius, brightness
            in zip(kinds, cells.tolist(), radii, around, strict=True)]


def close_up(images: torch.Tensor) -> torch.Tensor:
    """Centre the shape at the size that the feature network knows: uint8 (N, 3, R, R) -> uint8 (N, 3, R, R)."""
    centres, radii, _ = locate(images)
    scale = (radii / KNOWN).clamp(0.2, 1)
    move = torch.zeros(len(images), 2, 3)
    move[:, 0, 0], move[:, 1, 1], move[:, :, 2] = scale, scale, 2 * centres
    grid = F.affine_grid(move, images.shape, align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False).round().byte()


def read_samples(path: Path) -> tuple[torch.Tensor, torch.Tensor | list[str]]:
    """Read an npz of samples -> uint8 images (N, 3, R, R), and int64 labels (N,) or the N captions beside the npz.

    Raises UserError for other files.
    """
    captions = path.with_name("captions.jsonl")
    try:
        with np.load(path) as file:
            images, labels = file["arr_0"], None if captions.exists() else file["arr_1"]
        if labels is None:
            lines = captions.read_text(encoding="utf-8").splitlines()
            asked = [str(json.loads(line)["caption"]) for line in lines]
            count = len(asked)
        else:
            asked, count = torch.from_numpy(labels.astype(np.int64)), labels.size
    except UNREADABLE as error:
        raise UserError(f"{path}: not an npz with arr_0, and arr_1 or captions.jsonl beside it ({error}); give one of "
                        "generate.py's") from error
    if images.dtype != np.uint8 or images.shape[3:] != (3,) or count != len(images) or count == 0:
        raise UserError(f"{path}: arr_0 is {images.dtype} {images.shape} for {count} labels or captions, expected "
                        "uint8 (N, R, R, 3) and N of them")
    return torch.from_numpy(images).permute(0, 3, 1, 2), asked


def compare(asked: list[Scene], seen: list[Scene]) -> Iterator[tuple[str, int, int, float]]:
    """For each question: its name, answers that are right, prompts that ask it, chance."""
    for names in QUESTIONS:
        def answer(scene: Scene, names: tuple[str, ...] = names) -> tuple:
            return tuple(getattr(scene, name) for name in names)
        pairs = [(answer(one), answer(other)) for one, other in zip(asked, seen, strict=True)]
        right = [one == other for one, other in pairs if None not in one]
        yield " and ".join(names), sum(right), len(right), 1 / math.prod(len(WORDS[name]) for name in names)


@without_traceback
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=Path, nargs="+", metavar="SAMPLES.npz", help="arr_0 uint8 images, arr_1 labels")
    parser.add_argument("--features", type=Path, default=FEATURES, metavar="FOLDER", help="timm model with class head")
    args = parser.parse_args(argv)

    network = TimmFeatures.load(args.features).eval()
    for path in args.samples:
        images, asked = read_samples(path)
        if len(args.samples) > 1:
            print(path)
        report(path, images, asked, network)


def report(path: Path, images: torch.Tensor, asked: torch.Tensor | list[str], network: TimmFeatures) -> None:
    """Print the agreement of uint8 images (N, 3, R, R) with the labels (N,) or captions asked for.

    Raises UserError for labels that the network does not know.
    """
    if isinstance(asked, list):
        for name, right, count, chance in compare([parse(caption) for caption in asked], look(network, images)):
            print(f"{name:>16}  {100 * right / max(count, 1):6.2f} % of {count} prompts that name it "
                  f"(chance: {100 * chance:.2f} %)")
        return
    classes = network.model.num_classes
    if not 0 <= asked.min() <= asked.max() < classes:
        raise UserError(f"{path}: labels {asked.min()} to {asked.max()}, but the feature network has {classes} "
                        "classes; give --features of these classes")
    agreement = (predict(network, images) == asked).double().mean().item()
    print(f"class agreement {100 * agreement:.2f} % of {len(asked)} images (chance: {100 / classes:.2f} %)")


if __name__ == "__main__":
    main()
