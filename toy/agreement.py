"""How often the toy's feature network sees the class that a sample was asked to show.

    python -m toy.agreement SAMPLES.npz          # arr_0: uint8 images (N, R, R, 3), arr_1: labels (N,)
"""

import argparse
import zipfile
from pathlib import Path

import numpy as np
import torch

from evaluations.features import TimmFeatures
from runtime.messages import UserError, without_traceback
from runtime.speed import full_precision

FEATURES = Path(__file__).parent / "networks" / "features"


@torch.inference_mode()
def embed(network: torch.nn.Module, images: torch.Tensor, device: torch.device | str = "cpu", batch_size: int = 256) -> torch.Tensor:
    """The features (N, F) of uint8 images (N, 3, R, R) by a network on `device`; on the CPU."""
    with full_precision(torch.device(device)):
        return torch.cat([network(part.to(device)).cpu() for part in images.split(batch_size)])


def predict(network: TimmFeatures, images: torch.Tensor) -> torch.Tensor:
    """The class that `network`, which has its class head, sees in each of the uint8 images (N, 3, R, R) -> int64 (N,)."""
    return class_of(network, embed(network, images))


@torch.inference_mode()
def class_of(network: TimmFeatures, features: torch.Tensor) -> torch.Tensor:
    """The class int64 (N,) that the class head of `network`, on the CPU or not, sees in features (N, F)."""
    head = network.model.get_classifier()
    return head(features.to(head.weight.device)).argmax(dim=1).cpu()


def read_samples(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read an npz of samples -> uint8 images (N, 3, R, R), int64 labels (N,); raises UserError when it is not one."""
    try:
        with np.load(path) as file:
            images, labels = file["arr_0"], file["arr_1"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not an npz with arr_0 (images) and arr_1 (labels), as generate.py writes it: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or labels.shape != images.shape[:1] or len(labels) == 0:
        raise UserError(f"{path} holds arr_0 {images.dtype} {images.shape} and arr_1 {labels.shape}: "
                        "expected uint8 (N, R, R, 3) and (N,), N > 0")
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels.astype(np.int64))


@without_traceback
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("samples", type=Path, metavar="SAMPLES.npz", help="arr_0 uint8 images, arr_1 labels")
    parser.add_argument("--features", type=Path, default=FEATURES, metavar="FOLDER", help="timm model with a class head")
    args = parser.parse_args(argv)

    images, labels = read_samples(args.samples)
    network = TimmFeatures.load(args.features).eval()
    classes = network.model.num_classes
    if classes == 0 or not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(f"{args.samples} has labels {labels.min()} to {labels.max()} and {args.features} knows {classes} classes: "
                        "give the feature network that was trained on these classes")
    agreement = (predict(network, images) == labels).double().mean().item()
    print(f"class agreement {100 * agreement:.2f} % of {len(labels)} images (chance: {100 / classes:.2f} %)")


if __name__ == "__main__":
    main()
