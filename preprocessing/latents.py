"""`import-latents`: latents that other programs stored, as moments; std is 0 where they stored samples."""

import os
import re
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dataset import MOMENTS_EXTENSIONS
from models.vae import SHORTHANDS, VAES, LatentSpace, load_codec
from preprocessing.convert import convert_missing
from preprocessing.destination import Destination, described, digest
from preprocessing.encode import moments_name
from runtime.catalogue import key_of, list_keyed, read_labels
from runtime.files import to_npy
from runtime.messages import UserError, notice, say
from runtime.sources import RowStore, naming, require_ratio
from runtime.stores import FolderStore, list_names, read_metadata, shown

FORMATS = {"lightningdit": (b".safetensors",), "repa-e": (b".h5", b".hdf5"), "sit-npy": (b".npy",)}
FLIPPED = "latents_flip"
LOOKED_AT = 64  # entries whose size is compared with the latent space's


@lru_cache(1)
def arrays_in(file: str, process: int) -> dict[str, Any]:
    """The arrays of a file, by name, read when they are sliced. `process`: its id, as open files must not be shared."""
    with naming(shown(file)):
        if file.endswith(".npy"):
            return {"": np.load(file, mmap_mode="r", allow_pickle=False)}
        if file.endswith(".safetensors"):
            from safetensors import safe_open

            opened = safe_open(file, framework="pt")              # numpy has no bfloat16
            return {name: opened.get_slice(name) for name in opened.keys()}       # noqa: SIM118  (it is no dict)
        import h5py

        found: dict[str, Any] = {}
        h5py.File(file).visititems(lambda name, one: found.update({name: one} if isinstance(one, h5py.Dataset) else {}))
        for name, one in found.items():
            if one.is_virtual or one.external:
                raise ValueError(f"{name} lies in another file")
            require_ratio(one.nbytes, one.id.get_storage_size())
        return found


class LatentStore(RowStore):
    """Latents (C, H, W) or moments (2C, H, W) in the files of a folder, or in one file.

    A name is that of the file, or array, which holds one entry; else the file's, the array's and the number of the row.
    """

    __contains__ = FolderStore.__contains__                       # there may be a dataset.json

    def __init__(self, source: str, form: str, flips: bool):
        """Raises UserError for unreadable files, and two entries with one name."""
        super().__init__(source if os.path.isdir(source) else Path(source).parent)
        self.entries, self._labels, flipped = {}, {}, 0
        files = list_names(FolderStore(source), FORMATS[form]) if os.path.isdir(source) else [Path(source).name]
        for file in map(os.fsdecode, files):
            for array, one in self._arrays(file).items():
                with naming(f"{shown(os.path.join(self.path, file))}: {shown(array)}"):
                    shape = tuple(one.get_shape() if hasattr(one, "get_shape") else one.shape)
                flipped += sum(shape[:1]) if array == FLIPPED else 0
                if len(shape) in (3, 4) and all(shape) and (flips or array != FLIPPED):
                    self._add(file, array, shape)
        if flipped and not flips:
            notice(f"{shown(source)}: {flipped} latents of flipped images are left out; --flips takes them, too")
        self.columns = {"label": "label" if {*self._labels.values()} - {None} else None, "caption": None}

    def _arrays(self, file: str) -> dict[str, Any]:
        return arrays_in(os.path.join(self.path, file), os.getpid())

    def _add(self, file: str, array: str, shape: tuple[int, ...]) -> None:
        rows = range(shape[0]) if len(shape) == 4 else [None]
        alone = rows == [None] or (not array and len(rows) == 1)
        stem = os.path.splitext(file)[0] + f"/{array}" * (array not in ("", "latents"))
        for row, label in zip(rows, self._labels_of(file, array, len(rows)), strict=True):
            name = f"{(array or file).removesuffix('.npy')}.npy" if alone else f"{stem}/{row:08d}.npy"
            if name in self.entries or "\0" in name:
                raise UserError(f"{self.where(name)}: {shown(name)} is not the name of one file; import them apart")
            self.entries[name], self._labels[name] = (file, array, row, shape[-3:]), label

    def _labels_of(self, file: str, array: str, count: int) -> list:
        """Labels in an array, or a file of one array, that is called "labels" instead; None for each without one."""
        twin = re.sub(f"{FLIPPED}|latents|features|moments", "labels", array or file)
        other, name = (file, twin) if array else (twin, array)
        if twin == (array or file) or other not in self or name not in (arrays := self._arrays(other)):
            return [None] * count
        with naming(f"{super().where(other)}: {shown(name)}"):
            values = arrays[name][:].flatten().tolist()           # of numpy or torch
        if len(values) != count:
            raise UserError(f"{self.where(other)}: {len(values)} labels for {count} latents; correct it")
        return values

    def values(self, column: str | None) -> dict[str, Any]:
        return self._labels

    def where(self, name: bytes | str) -> str:
        file, array, row, _ = self.entries.get(os.fsdecode(name), (name, "", None, ()))
        return super().where(file) + shown(f": {array}" * bool(array) + f", row {row}" * (row is not None))

    def array(self, name: bytes) -> np.ndarray:
        """An entry's numbers, float32. Raises UserError."""
        file, array, row, _ = self.entries[os.fsdecode(name)]
        with naming(self.where(name)):
            whole = self._arrays(file)[array]
            part = whole[:] if row is None else whole[row:row + 1][0]
            return np.asarray(part.float() if isinstance(part, torch.Tensor) else part, dtype=np.float32)


def convert_latents(store: LatentStore, space: LatentSpace, normalised: bool, name: bytes) -> bytes:
    """The npy file of an entry's raw moments, float32 (2C, H, W); the std of samples is 0.

    Raises UserError if they are not finite, or a std is below 0.
    """
    mean, std = np.split(store.array(name), [space.channels])     # (C, H, W), (0 or C, H, W)
    if normalised:
        scale, shift = (np.float32(np.reshape(one, (-1, 1, 1))) for one in (space.scale, space.shift))
        mean, std = mean / scale + shift, std / scale if len(std) else std
    if not np.isfinite([mean.sum(), std.sum()]).all() or (std < 0).any():
        raise UserError(f"{store.where(name)}: not finite, or a standard deviation below 0; encode the images anew")
    return to_npy(np.concatenate([mean, std if len(std) else np.zeros_like(mean)]))


def require_space(store: LatentStore, names: np.ndarray, space: LatentSpace, normalised: bool) -> bool:
    """Whether the entries are samples, rather than moments, of a latent space.

    Raises UserError for another shape, and if the other choice of `normalised` would fit their size clearly better.
    """
    shapes = {entry[3]: name for name, entry in store.entries.items()}
    (shape, name), *others = shapes.items()
    if others or shape[0] not in (space.channels, 2 * space.channels) or shape[1] != shape[2]:
        fitting = ", ".join(key for key, row in VAES.items() if shape[0] in (row.channels, 2 * row.channels))
        raise UserError(f"{store.where(name)}: shape {shape}, expected ({space.channels}, H, H) for all, or twice as "
                        f"many channels, as --vae {space.vae} has; VAEs that fit it: {fitting or 'none'}")
    some = names[np.linspace(0, len(names) - 1, min(LOOKED_AT, len(names))).astype(int)]
    stored = torch.from_numpy(np.stack([store.array(one)[:space.channels] for one in some]))      # (B, C, H, W)
    raw = space.latents(torch.cat([stored, 0 * stored], dim=1), 0)
    sizes = [one.square().mean().sqrt().clamp(min=1e-9).log2().item() for one in (raw, stored)]
    if abs(sizes[normalised]) > abs(sizes[not normalised]) + 1:
        raise UserError(f"{store.where(name)}: size {2**sizes[normalised]:.2g} in the space of {space.vae}, expected 1"
                        f"; {'leave out' if normalised else 'add'} --normalised, or name another --vae")
    return shape[0] == space.channels


def import_latents(source: str, dest: str, format: str, vae: str, workers: int, normalised: bool = False,
                   flips: bool = False) -> None:
    """Write `dest`, moments as `encode` does, of the latents in `source`, in one of FORMATS, with their labels.

    `normalised`: they are (raw - shift) * scale. Raises UserError if they are not of the latent space of `vae`, and as
    `convert` does.
    """
    store = LatentStore(source, format, flips)
    keys, names = list_keyed(store, MOMENTS_EXTENSIONS)
    if not len(names):
        raise UserError(f"--source {shown(source)}: holds no arrays (N, C, H, W) or (C, H, W) in files of {format}")
    space, metadata = load_codec(SHORTHANDS.get(vae, vae)).space, read_metadata(store)
    samples = require_space(store, names, space, normalised)
    outputs = np.array([moments_name(key) for key in keys.tolist()], dtype=bytes)
    labels = described(outputs, read_labels(store, keys, key_of, metadata), metadata.get("classes"))
    settings = {"command": "import-latents", "source": os.path.realpath(source), "images": len(names),
                "source_contents": digest(outputs, labels), "format": format, "flips": flips, "normalised": normalised,
                "vae": space.to_record()}
    destination = Destination(dest, outputs, MOMENTS_EXTENSIONS, settings, source)
    if destination.is_finished():
        return
    convert_one = partial(convert_latents, store, space, normalised)
    destination.require_room(len(convert_one(names[0])))
    destination.begin()
    convert_missing(store, names, destination, convert_one, workers, 0, "latents")
    destination.finish({**labels, "vae": space.to_record(), "samples": samples})
    say(f"{shown(dest)}: moments of {len(names)} images in the latent space of {space.vae}"
        f"{', no labels' * (not labels['labels'])}{', samples: their std is 0, every epoch sees the same' * samples}")
