"""Features on disk: what an encoder said of each image, so that training need not ask it again in every epoch.

`preprocessing.dataset_tools encode --enc-type` writes them, one file for each image, `dataset.py` reads them, and
`models.encoders.CachedEncoder` gives them to the loss in the encoder's place.

How exact they are: the encoders of REG and REPA see the prepared image itself, neither flipped nor cropped, so their output is the same in
every epoch, and keeping it costs rounding alone. It comes from a float32 forward pass (TF32 and autocast off). The class token, which REG
noises as it is, stays float32. Patch tokens, which are only compared with, are rounded to float16, |error| <= |x| / 2048 (2^-25 where
|x| < 2^-14), or to 8 bits, |error| <= scale / 2 with scale = max |x| / 127 of each token. Without a cache and under bf16 autocast the
encoder rounds what enters every matrix product to bf16, |error| <= |x| / 256: float16 features are the more exact ones.

Shape letters: B batch, E encoder width, N = grid^2 patch tokens on the encoder's own grid.
"""

import os
import re
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch

from runtime.files import to_npy
from runtime.messages import UserError

DTYPES = ("float16", "int8")
FOLDER = "features-"     # begins the name of every folder of features
BLOCK = 4096             # bytes that a file's length is rounded up to on nearly all disks
WIDEST, LARGEST = 2**16, 2**10  # E and grid beyond which a record is not believed


class UnfitFeatures(UserError):
    """Features are missing, or are not those that this run's encoders would give: training can do without them."""


def features_folder(enc_type: str) -> str:
    """The folder of an encoder's features beside images/ and vae-sd/, or with `.zip` the zip: `features-dinov2-vit-b`.

    What does not belong in the name of a file, as in `local-dir:toy/networks/encoder`, becomes a dash.
    """
    kind, colon, folder = enc_type.partition(":")
    name = f"{kind}-{os.path.normpath(folder)}" if colon else kind
    return FOLDER + re.sub(r"[^A-Za-z0-9._]+", "-", name)


@dataclass(frozen=True)
class FeaturesRecord:
    """What made the features, kept in their dataset.json."""

    enc_type: str
    timm_name: str
    weights: str             # sha256 of the network's parameters
    weights_file: str | None  # of the file or local folder they were read from, None for the hub's
    resolution: int          # of the images
    grid: int                # the encoder's own
    width: int               # E
    class_token: bool        # whether it comes first; some encoders have none
    dtype: str               # of the patch tokens; the class token is float32

    @classmethod
    def from_record(cls, record: object) -> "FeaturesRecord":
        """The inverse of `to_record`; raises UnfitFeatures when something is missing or cannot be."""
        known = record if isinstance(record, dict) else {}
        for field in fields(cls):
            value = known.get(field.name)
            if not isinstance(value, field.type) or field.type is int and type(value) is not int:
                raise UnfitFeatures(f'"features" of its dataset.json has {field.name} {value!r}, which cannot be: encode again')
        found = cls(**{field.name: known[field.name] for field in fields(cls)})
        if found.dtype not in DTYPES or not 0 < found.width <= WIDEST or not 0 < found.grid <= LARGEST or found.resolution < 1:
            raise UnfitFeatures(f'"features" of its dataset.json has dtype {found.dtype}, width {found.width}, grid {found.grid} and '
                                f"resolution {found.resolution}, which cannot be: encode again")
        return found

    def to_record(self) -> dict:
        """A plain dict, for dataset.json."""
        return asdict(self)

    def layout(self) -> np.dtype:
        """One image's features: class_token (E,) float32 where there is one; patches (N, E) float16, or int8 with scales (N,) float32."""
        return _layout(self.grid**2, self.width, self.class_token, self.dtype)


def _layout(tokens: int, width: int, class_token: bool, dtype: str) -> np.dtype:
    first = [("class_token", "<f4", (width,))] if class_token else []
    scales = [("scales", "<f4", (tokens,))] if dtype == "int8" else []
    return np.dtype([*first, *scales, ("patches", {"float16": "<f2", "int8": "i1"}[dtype], (tokens, width))])


def pack(class_token: torch.Tensor | None, patches: torch.Tensor, dtype: str) -> np.ndarray:
    """Class token (B, E) or None and patch tokens (B, N, E), float32 -> stored features (B,) in `FeaturesRecord.layout`."""
    stored = np.empty(len(patches), _layout(patches.shape[1], patches.shape[2], class_token is not None, dtype))
    if class_token is not None:
        stored["class_token"] = class_token.float().cpu().numpy()
    if dtype == "int8":
        scales = (patches.abs().amax(dim=2) / 127).clamp(min=torch.finfo(torch.float32).tiny)                 # (B, N); a token may be 0
        stored["scales"] = scales.cpu().numpy()
        stored["patches"] = (patches / scales[..., None]).round().to(torch.int8).cpu().numpy()
    else:
        stored["patches"] = patches.half().cpu().numpy()
    return stored


def unpack(stored: dict[str, torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Stored features, a batch of each part -> class token (B, E) or None, patch tokens (B, N, E), float32."""
    patches = stored["patches"].float()
    return stored.get("class_token"), patches * stored["scales"][..., None] if "scales" in stored else patches


def file_size(layout: np.dtype) -> int:
    """Bytes of one image's file, which numpy's header begins."""
    return len(to_npy(np.zeros((), layout)))


def on_disk(size: int) -> int:
    """Bytes of disk that a file of `size` bytes takes: whole blocks."""
    return -(-size // BLOCK) * BLOCK


def disk_cost(images: int, record: FeaturesRecord) -> int:
    """Bytes of disk that the features of so many images take in a folder (a zip, without rounding to blocks, takes a little less)."""
    return images * on_disk(file_size(record.layout()))


def gigabytes(size: int) -> str:
    """In decimal units, as disks are sold: `505.7 GB`."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
