"""Encoder outputs stored on disk, so that training need not run the encoder.

`preprocessing.dataset_tools encode --enc-type` writes one file per image, `dataset.py` reads them, and
`models.encoders.CachedEncoder` gives them to the loss.

Precision. The encoders of REG and REPA see the prepared image, neither flipped nor cropped, so their output is the same
in every epoch and storing it costs rounding alone. It is computed in float32, without TF32 and autocast. The class
token, which REG noises, stays float32. Patch tokens, which are only compared with, are rounded to float16, |error| <=
|x| / 2048 (2^-25 where |x| < 2^-14), or to 8 bits, |error| <= scale / 2 with scale = max |x| / 127 of each token. An
encoder under bf16 autocast rounds the inputs of every matrix product to bf16, |error| <= |x| / 256: stored float16
is more precise.

Shape letters: B batch, E encoder width, N = grid^2 patch tokens on the encoder's own grid.
"""

import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from runtime.catalogue import Catalogue
from runtime.files import to_npy
from runtime.messages import UserError
from runtime.stores import METADATA, open_store, read_npy, shown

DTYPES = ("float16", "int8")
FOLDER = "features-"     # begins the name of every folder of features
EXTENSIONS = (b".npy",)
LIMITS = {"resolution": 2**16, "grid": 2**8, "width": 2**13}     # of what a record may claim


def features_folder(enc_type: str) -> str:
    """Name of the folder (of the zip, with `.zip`) that holds an encoder's features: `features-dinov2-vit-b`.

    What does not belong in a file's name, as in `local-dir:toy/networks/encoder`, becomes a dash.
    """
    kind, colon, folder = enc_type.partition(":")
    name = f"{kind}-{os.path.normpath(folder)}" if colon else kind
    return FOLDER + re.sub(r"[^A-Za-z0-9._]+", "-", name)


def features_path(data_dir: str | Path, enc_type: str) -> Path | None:
    """The folder or zip in a data folder that holds an encoder's features, or None."""
    folder = os.path.join(data_dir, features_folder(enc_type))
    return next((Path(path) for path in (folder, f"{folder}.zip") if os.path.exists(path)), None)


def feature_stores(data_dir: str | Path) -> list[Path]:
    """The folders and zips in a data folder that hold features of any encoder."""
    found = sorted(path for path in Path(data_dir).glob(f"{FOLDER}*") if path.is_dir() or path.suffix == ".zip")
    return [path for path in found if path.suffix != ".partial"]                  # an unfinished zip


@dataclass(frozen=True)
class FeaturesRecord:
    """What the features were made with, from their dataset.json."""

    enc_type: str
    timm_name: str
    weights_file: str | None  # sha256 of the file or local folder of the weights, None for the hub's
    resolution: int          # of the images
    grid: int                # the encoder's own
    width: int               # E
    class_token: bool        # whether there is one; some encoders have none
    dtype: str               # of the patch tokens; the class token is float32

    @classmethod
    def from_record(cls, record: object) -> "FeaturesRecord":
        """The inverse of `to_record`; other entries are ignored. Raises UserError for a missing or impossible value."""
        known = record if isinstance(record, dict) else {}
        for field in fields(cls):
            value, limit = known.get(field.name), LIMITS.get(field.name)
            fits = type(value) is int and 0 < value <= limit if limit else isinstance(value, field.type)
            if not fits or field.name == "dtype" and value not in DTYPES:
                raise UserError(f'"features" has {field.name} {shown(repr(value))} in {METADATA}; encode again')
        return cls(**{field.name: known[field.name] for field in fields(cls)})

    def to_record(self) -> dict:
        """A plain dict, for dataset.json."""
        return asdict(self)

    def layout(self) -> np.dtype:
        """One image: class_token (E,) float32, if any; patches (N, E) float16, or int8 with scales (N,) float32."""
        return _layout(self.grid**2, self.width, self.class_token, self.dtype)


def _layout(tokens: int, width: int, class_token: bool, dtype: str) -> np.dtype:
    first = [("class_token", "<f4", (width,))] if class_token else []
    scales = [("scales", "<f4", (tokens,))] if dtype == "int8" else []
    return np.dtype([*first, *scales, ("patches", {"float16": "<f2", "int8": "i1"}[dtype], (tokens, width))])


class Features:
    """The stored features of one encoder.

    Attributes: `store`, with `keys` (n,) and `names` (n,) of its files; `record`; `source`, the digest of the images
    they were made from, None if unknown. Raises UserError if they cannot be opened, are unfinished or lack a record.
    """

    def __init__(self, path: str | Path):
        self.store = open_store(path)
        catalogue = Catalogue(self.store, EXTENSIONS)
        self.keys, self.names = catalogue.keys, catalogue.names
        try:
            self.record = FeaturesRecord.from_record(catalogue.metadata.get("features"))
        except UserError as error:
            raise UserError(f"{shown(path)}: {error}") from error
        self.source = source_of(catalogue.metadata)
        self._layout = self.record.layout()

    def read(self, name: bytes) -> dict[str, torch.Tensor]:
        """One image's features as `FeaturesRecord.layout` names them. Raises UserError if they are damaged."""
        features = read_npy(self.store, name)
        if getattr(features, "dtype", None) != self._layout or features.shape != ():
            raise UserError(f"{self.store.where(name)}: not the features that its {METADATA} describes; remove it and "
                            "encode again")
        return {part: torch.from_numpy(features[part]) for part in self._layout.names}


def source_of(metadata: dict) -> object:
    """The digest of the images that `encode` read, from its dataset.json; None in foreign data."""
    made_with = metadata.get("made_with")
    return made_with.get("source_contents") if isinstance(made_with, dict) else None


# ---- the form on disk ------------------------------------------------------------------------------------------------

def pack(class_token: torch.Tensor | None, patches: torch.Tensor, dtype: str) -> np.ndarray:
    """Class token (B, E) or None and patch tokens (B, N, E), float32 -> stored features (B,) as `layout` says."""
    stored = np.empty(len(patches), _layout(patches.shape[1], patches.shape[2], class_token is not None, dtype))
    if class_token is not None:
        stored["class_token"] = class_token.float().cpu().numpy()
    if dtype == "int8":
        scales = patches.abs().amax(dim=2) / 127                                  # (B, N)
        scales = scales.clamp(min=torch.finfo(torch.float32).tiny)                # a token may be 0
        stored["scales"] = scales.cpu().numpy()
        stored["patches"] = (patches / scales[..., None]).round().to(torch.int8).cpu().numpy()
    else:
        stored["patches"] = patches.half().cpu().numpy()
    return stored


def unpack(stored: dict[str, torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor]:
    """A batch of each stored part -> class token (B, E) or None, patch tokens (B, N, E), float32."""
    patches = stored["patches"].float()
    return stored.get("class_token"), patches * stored["scales"][..., None] if "scales" in stored else patches


def file_size(layout: np.dtype) -> int:
    """Bytes of one image's file, with numpy's header."""
    return len(to_npy(np.zeros((), layout)))
