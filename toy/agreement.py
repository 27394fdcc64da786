"""Class agreement: how often the toy's feature network sees the class that a sample was conditioned on.

    python -m toy.agreement SAMPLES.npz          # arr_0: uint8 images (N, R, R, 3), arr_1: labels (N,)
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from evaluations.features import TimmFeatures
from runtime.arguments import Parser
from runtime.files import UNREADABLE
from runtime.messages import UserError, without_traceback
from runtime.speed import full_precision
from toy.words import PLACES, Scene

# Thresholds halfway between what toy/draw.py draws, in units of the image width; brightness in [0, 1].
SIDE, LARGE, LIGHT = 0.08, 0.16, 0.6
KNOWN = 0.18                              # the radius of gyration of a disc of size 0.3
FEATURES = Path(__file__).parent / "networks" / "features"


@torch.inference_mode()
def predict(network: TimmFeatures, images: torch.Tensor) -> torch.Tensor:
    """Classify uint8 images (N, 3, R, R) with `network` and its class head -> int64 (N,)."""
    head = network.model.get_classifier()
    with full_precision(torch.device("cpu")):
        return torch.cat([head(network(part)).argmax(dim=1) for part in images.split(256)])


def locate(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the shape in uint8 images (N, 3, R, R) -> its centre (N, 2), radius of gyration (N,), brightness around it (N,).

    The shape is what is saturated. Lengths are in units of the image width, the centre's in [-1/2, 1/2].
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


def look(images: torch.Tensor) -> list[Scene]:
    """Size, place and background measured on the pixels of uint8 images (N, 3, R, R)."""
    centres, radii, around = locate(images)
    cells = (centres > SIDE).long() - (centres < -SIDE).long() + 1                        # (N, 2): column, row
    return [Scene(size="small" if radius < LARGE else "large", place=PLACES[3 * row + column],
                  background="dark" if brightness < LIGHT else "light")
            for (column, row), radius, brightness in zip(cells.tolist(), radii, around, strict=True)]


def close_up(images: torch.Tensor) -> torch.Tensor:
    """Centre the shape at the size that the feature network knows: uint8 (N, 3, R, R) -> uint8 (N, 3, R, R)."""
    centres, radii, _ = locate(images)
    scale = (radii / KNOWN).clamp(0.2, 1)
    move = torch.zeros(len(images), 2, 3)
    move[:, 0, 0], move[:, 1, 1], move[:, :, 2] = scale, scale, 2 * centres
    grid = F.affine_grid(move, images.shape, align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False).round().byte()


def read_samples(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read an npz of samples -> uint8 images (N, 3, R, R), int64 labels (N,). Raises UserError if it is not one."""
    try:
        with np.load(path) as file:
            images, labels = file["arr_0"], file["arr_1"]
    except UNREADABLE as error:
        raise UserError(f"{path}: not an npz with arr_0 and arr_1 ({error}); give one from generate.py") from error
    if images.dtype != np.uint8 or images.shape[3:] != (3,) or labels.shape != images.shape[:1] or len(labels) == 0:
        raise UserError(f"{path}: arr_0 is {images.dtype} {images.shape} and arr_1 {labels.shape}, expected uint8 "
                        "(N, R, R, 3) and (N,)")
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64))


@without_traceback
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=Path, metavar="SAMPLES.npz", help="arr_0 uint8 images, arr_1 labels")
    parser.add_argument("--features", type=Path, default=FEATURES, metavar="FOLDER", help="timm model with class head")
    args = parser.parse_args(argv)

    images, labels = read_samples(args.samples)
    network = TimmFeatures.load(args.features).eval()
    classes = network.model.num_classes
    if not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(f"{args.samples}: labels {labels.min()} to {labels.max()}, but {args.features} has {classes} "
                        "classes; give --features of these classes")
    agreement = (predict(network, images) == labels).double().mean().item()
    print(f"class agreement {100 * agreement:.2f} % of {len(labels)} images (chance: {100 / classes:.2f} %)")


if __name__ == "__main__":
    main()
