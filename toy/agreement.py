"""Class agreement: how often the toy's feature network sees the class that a sample was conditioned on.

    python -m toy.agreement SAMPLES.npz          # arr_0: uint8 images (N, R, R, 3), arr_1: labels (N,)
"""

from pathlib import Path

import numpy as np
import torch

from evaluations.features import TimmFeatures
from runtime.arguments import Parser
from runtime.files import UNREADABLE
from runtime.messages import UserError, without_traceback
from runtime.speed import full_precision

FEATURES = Path(__file__).parent / "networks" / "features"


@torch.inference_mode()
def predict(network: TimmFeatures, images: torch.Tensor) -> torch.Tensor:
    """Classify uint8 images (N, 3, R, R) with `network` and its class head -> int64 (N,)."""
    head = network.model.get_classifier()
    with full_precision(torch.device("cpu")):
        return torch.cat([head(network(part)).argmax(dim=1) for part in images.split(256)])


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
