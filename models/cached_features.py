"""Encoder outputs stored on disk, so that training need not run the encoder.

`preprocessing.dataset_tools encode --enc-type` writes one file per image. `models.encoders.CachedEncoder` takes the
encoder's place in training. Images are neither flipped nor cropped, so storing changes the outputs by rounding alone:
they come from a float32 forward pass (TF32 and autocast off). The class token, which REG noises, stays float32. Patch
tokens are rounded to float16, |error| <= |x| / 2048 (2^-25 below 2^-14), or to 8 bits, |error| <= scale / 2 with
scale = max |x| / 127 of each token. Without a cache and under bf16 autocast the encoder's products round to |x| / 256.

Shape letters: B batch, E encoder width, N = grid^2 patch tokens on the encoder's own grid.
"""

import io
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from runtime.catalogue import Catalogue
from runtime.files import UNREADABLE, to_npy
from runtime.messages import UserError
from runtime.stores import METADATA, Store, open_store, shown

DTYPES = ("float16", "int8")
FOLDER = "features-"            # begins the name of every folder of features
EXTENSIONS = (b".npy",)
BLOCK = 4096                    # bytes to which nearly all disks round up the length of a file
WIDEST, LARGEST = 2**16, 2**10  # E and grid beyond which a record is refused


@dataclass(frozen=True)
class FeaturesRecord:
    """What made the features; stored in their dataset.json."""

    enc_type: str
    timm_name: str
    weights_file: str | None    # sha256 of the file or local folder with the weights; None: the hub's
    resolution: int             # of the images
    grid: int                   # the encoder's own
    width: int                  # E
    class_token: bool           # whether there is one; it comes first
    dtype: str                  # of the patch tokens; the class token is float32

    @classmethod
    def from_record(cls, record: object) -> "FeaturesRecord":
        """The inverse of `to_record`. Raises UserError if a field is missing or out of range."""
        known = record if isinstance(record, dict) else {}
        for field in fields(cls):
            value = known.get(field.name)
            if not isinstance(value, field.type) or field.type is int and type(value) is not int:
                raise UserError(f'"features" of {METADATA} has {field.name} {value!r}; encode again')
        found = cls(**{field.name: known[field.name] for field in fields(cls)})
        sizes_fit = 0 < found.width <= WIDEST and 0 < found.grid <= LARGEST and found.resolution > 0
        if found.dtype not in DTYPES or not sizes_fit:
            raise UserError(f'"features" of {METADATA} has dtype {found.dtype}, width {found.width}, grid '
                            f'{found.grid}, '
                            f"resolution {found.resolution}; encode again")
        return found

    def to_record(self) -> dict:
        """A plain dict, for dataset.json."""
        return asdict(self)

    def layout(self) -> np.dtype:
        """One image's file: class_token (E,) float32 if any; patches (N, E) float16, or int8 with scales (N,)
        float32.
        """
        return _layout(self.grid**2, self.width, self.class_token, self.dtype)


class Features:
    """The stored features of one encoder: `store`, `keys` (n,), `names` (n,), `record`, `layout`, `source` (of the
    images).

    Raises UserError if they cannot be opened, are not finished, or have no record.
    """

    def __init__(self, path: str | Path):
        self.store = open_store(path)
        catalogue = Catalogue(self.store, EXTENSIONS)
        try:
            self.record = FeaturesRecord.from_record(catalogue.metadata.get("features"))
        except UserError as error:
            raise UserError(f"{shown(path)}: {error}") from error
        self.keys, self.names = catalogue.keys, catalogue.names
        self.source = source_of(catalogue.metadata)
        self.layout = self.record.layout()


def source_of(metadata: dict) -> object:
    """What `encode` noted of the images it read; None in data of others."""
    made_with = metadata.get("made_with")
    return made_with.get("source_contents") if isinstance(made_with, dict) else None


def features_folder(enc_type: str) -> str:
    """The folder of an encoder's features beside images/ and vae-sd/ (or, with `.zip`, the zip):
    `features-dinov2-vit-b`.

    Characters that do not belong in a file's name, as in `local-dir:toy/networks/encoder`, become a dash.
    """
    kind, colon, folder = enc_type.partition(":")
    name = f"{kind}-{os.path.normpath(folder)}" if colon else kind
    return FOLDER + re.sub(r"[^A-Za-z0-9._]+", "-", name)


def features_path(data_dir: str | Path, enc_type: str) -> Path | None:
    """The folder or zip of an encoder's features in a data folder, or None."""
    folder = os.path.join(data_dir, features_folder(enc_type))
    return next((Path(path) for path in (folder, f"{folder}.zip") if os.path.exists(path)), None)


def feature_stores(data_dir: str | Path) -> list[Path]:
    """The folders and zips of all features in a data folder."""
    found = sorted(path for path in Path(data_dir).glob(f"{FOLDER}*") if path.is_dir() or path.suffix == ".zip")
    return [path for path in found if path.suffix != ".partial"]                          # a zip being written


def read_features(store: Store, name: bytes, layout: np.dtype) -> dict[str, torch.Tensor]:
    """One image's features by the names in `layout`. Raises UserError if they are unreadable or laid out otherwise."""
    data = store.read(name)
    try:
        features = np.load(io.BytesIO(data), allow_pickle=False)
    except UNREADABLE as error:
        raise UserError(f"{store.where(name)}: not a readable npy file ({shown(str(error))}); "
                        "remove it and encode again") from error
    if getattr(features, "dtype", None) != layout or features.shape != ():
        raise UserError(f"{store.where(name)}: not the features that {METADATA} describes; remove it and encode again")
    return {part: torch.from_numpy(features[part]) for part in layout.names}


def _layout(tokens: int, width: int, class_token: bool, dtype: str) -> np.dtype:
    first = [("class_token", "<f4", (width,))] if class_token else []
    scales = [("scales", "<f4", (tokens,))] if dtype == "int8" else []
    return np.dtype([*first, *scales, ("patches", {"float16": "<f2", "int8": "i1"}[dtype], (tokens, width))])


def pack(class_token: torch.Tensor | None, patches: torch.Tensor, dtype: str) -> np.ndarray:
    """Class token (B, E) or None and patch tokens (B, N, E), float32 -> stored features (B,) in the record's layout."""
    stored = np.empty(len(patches), _layout(patches.shape[1], patches.shape[2], class_token is not None, dtype))
    if class_token is not None:
        stored["class_token"] = class_token.float().cpu().numpy()
    if dtype == "int8":
        # (B, N); a token may be 0
        scales = (patches.abs().amax(dim=2) / 127).clamp(min=torch.finfo(torch.float32).tiny)
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
    """Bytes of one image's file, with numpy's header."""
    return len(to_npy(np.zeros((), layout)))


def on_disk(size: int) -> int:
    """Bytes of disk that a file of `size` bytes takes: whole blocks."""
    return -(-size // BLOCK) * BLOCK
