"""`import-latents`: latents that other programs stored, as moments; std is 0 where they stored samples."""

import math
import os
import re
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from dataset import MOMENTS_EXTENSIONS
from models.vae import SHORTHANDS, VAES, LatentSpace, load_codec, read_statistics
from preprocessing.destination import Destination, digest, in_workers, listed
from preprocessing.encode import moments_name
from runtime.catalogue import key_of, read_labels
from runtime.files import UNREADABLE, sha256, to_npy
from runtime.launch import blocks
from runtime.messages import UserError, notice, say
from runtime.stores import METADATA, FolderStore, list_names, parse_json, read_metadata, shown

FORMATS = {"lightningdit": (b".safetensors",), "repa-e": (b".h5", b".hdf5"), "sit-npy": (b".npy",)}
CHUNK, LOOKED_AT = 64, 64  # entries that a worker writes at a time; whose size is compared with the latent space


class Entry(NamedTuple):
    """Latents (C, H, W) or moments (2C, H, W): a row of an array in a file, or with `row` None all of it."""

    file: str
    array: str
    row: int | None
    shape: tuple[int, ...]
    label: int | None

    def __str__(self) -> str:
        return shown(f"{self.file}{f', {self.array}' * bool(self.array)}{f', row {self.row}' * (self.row is not None)}")


@lru_cache(1)
def arrays_in(file: str, process: int) -> dict[str, Any]:
    """The arrays of a file, by name, read when they are sliced. `process`: its id, as open files must not be shared.

    Raises UserError if the file is unreadable, or needs h5py and that is not installed.
    """
    try:
        if file.endswith(".npy"):
            return {"": np.load(file, mmap_mode="r", allow_pickle=False)}
        if file.endswith(".safetensors"):
            opened = safe_open(file, framework="pt")              # numpy has no bfloat16
            return {name: opened.get_slice(name) for name in opened.keys()}       # noqa: SIM118  (it is no dict)
        import h5py

        found: dict[str, Any] = {}
        h5py.File(file).visititems(lambda name, one: found.update({name: one} if isinstance(one, h5py.Dataset) else {}))
        return found
    except ImportError:
        raise UserError(f"{shown(file)}: needs h5py; install it with `pip install h5py`") from None
    except (*UNREADABLE, SafetensorError) as error:
        raise UserError(f"{shown(file)}: cannot be read ({shown(str(error))[:200]}); download it again") from error


def shape_of(array: Any) -> tuple[int, ...]:
    return tuple(array.get_shape() if hasattr(array, "get_shape") else array.shape)


def _labels(store: FolderStore, name: str, array: str, count: int) -> list[int | None]:
    """The labels of `count` rows of an array: those of the array, or else the file, called "labels" instead.

    Raises UserError for another number of labels, or other types.
    """
    twins = [re.sub("latents_flip|latents|features|moments", "labels", one) for one in (name, array)]
    if twins[1] != array and twins[1] in (arrays := arrays_in(os.path.join(store.path, name), os.getpid())):
        values = np.asarray(arrays[twins[1]][:])
    elif twins[0] != name and twins[0] in store:
        values = np.asarray(arrays_in(os.path.join(store.path, twins[0]), os.getpid())[array][:])
    else:
        return [None] * count
    if values.size != count or values.dtype.kind not in "iu" or values.min() < 0:
        raise UserError(f"{store.where(twins[0])}: labels of shape {values.shape}, {values.dtype}, for {count} latents; "
                        "expected a whole number of at least 0 for each")
    return values.flatten().tolist()


def find_entries(source: str, form: str, flips: bool) -> tuple[dict[bytes, Entry], dict]:
    """The entries of a folder or file, by key, and the content of a dataset.json in it.

    Keys are those of files, or of arrays, that hold one entry; else the file, the array and the number of the row.
    Raises UserError for unreadable files, and two entries with one key.
    """
    store = FolderStore(source if os.path.isdir(source) else Path(source).parent)
    names = list_names(store, FORMATS[form]) if os.path.isdir(source) else np.array([os.fsencode(Path(source).name)])
    metadata, found, flipped = read_metadata(store) if os.path.isdir(source) else {}, {}, 0
    for name in map(os.fsdecode, names.tolist()):
        file = os.path.join(store.path, name)
        arrays = arrays_in(file, os.getpid())
        if METADATA in arrays:
            metadata = parse_json(bytes(arrays[METADATA][()]), f"{shown(file)}: {METADATA}")
        for array, one in arrays.items():
            rows, shape = [None], shape_of(one)
            if len(shape) == 4:
                rows, shape = range(shape[0]), shape[1:]
            flipped += len(rows) * (array == "latents_flip")
            if len(shape) != 3 or (array == "latents_flip" and not flips):
                continue
            for row, label in zip(rows, _labels(store, name, array, len(rows)), strict=True):
                parts = [os.path.splitext(name)[0], *[array] * (array not in ("", "latents")), f"{row or 0:08d}"]
                alone = row is None or (not array and len(rows) == 1)
                key = key_of(os.fsencode(array or name)) if alone else os.fsencode("/".join(parts))
                if key in found:
                    raise UserError(f"{found[key]}: has the key {shown(key)}, and so has {shown(file)}; import them apart")
                found[key] = Entry(file, array, row, shape, label)
    if flipped and not flips:
        notice(f"{shown(source)}: {flipped} latents of flipped images are left out; --flips takes them, too")
    return found, metadata if isinstance(metadata, dict) else {}


def moments_of(entry: Entry, space: LatentSpace, normalised: bool) -> np.ndarray:
    """An entry's raw moments, float32 (2C, H, W); the std of samples is 0. Raises UserError for other numbers."""
    try:
        array = arrays_in(entry.file, os.getpid())[entry.array]
        part = array[:] if entry.row is None else array[entry.row:entry.row + 1][0]
        part = np.asarray(part.float() if isinstance(part, torch.Tensor) else part, dtype=np.float32)
    except (*UNREADABLE, SafetensorError) as error:
        raise UserError(f"{entry}: cannot be read ({shown(str(error))[:200]}); download it again") from error
    mean, std = part[:space.channels], part[space.channels:]
    if normalised:
        scale, shift = (np.float32(np.reshape(one, (-1, 1, 1))) for one in (space.scale, space.shift))
        mean, std = mean / scale + shift, std / scale if len(std) else std
    moments = np.concatenate([mean, std if len(std) else np.zeros_like(mean)])    # (2C, H, W)
    if not np.isfinite(moments).all() or (std < 0).any():
        raise UserError(f"{entry}: not finite, or a standard deviation below 0 (log variances?); encode the images anew")
    return moments


def require_space(entries: list[Entry], space: LatentSpace, normalised: bool) -> bool:
    """Whether `entries` are samples rather than moments of the latent space.

    Raises UserError for another shape, and if the other choice of `normalised` would fit their size clearly better.
    """
    shape = entries[0].shape
    if other := [one for one in entries if one.shape != shape]:
        raise UserError(f"{other[0]}: of shape {other[0].shape}, {entries[0]} of {shape}; import them apart")
    if shape[0] not in (space.channels, 2 * space.channels) or shape[1] != shape[2]:
        fitting = ", ".join(name for name, row in VAES.items() if shape[0] in (row.channels, 2 * row.channels))
        raise UserError(f"--vae {space.vae}: has {space.channels} channels, {entries[0]} is of shape {shape}; those that "
                        f"fit are {fitting or 'none'}")
    some = [entries[i] for i in np.linspace(0, len(entries) - 1, min(LOOKED_AT, len(entries))).astype(int)]
    raw = torch.from_numpy(np.stack([moments_of(one, space, False) for one in some]))
    raw[:, space.channels:] = 0                                   # their means, as they are stored
    sizes = [float(x.square().mean().sqrt()) or 1.0 for x in (space.latents(raw, 0), raw[:, :space.channels])]
    fits, otherwise = (abs(math.log(size)) for size in (sizes[::-1] if normalised else sizes))
    if fits > otherwise + math.log(2):
        raise UserError(f"{entries[0].file}: latents of size {sizes[normalised]:.2g} where {space.vae} has about 1; "
                        f"{'leave out' if normalised else 'add'} --normalised, or name another --vae")
    return shape[0] == space.channels


def write_chunk(entries: list[Entry], destination: Destination, space: LatentSpace, normalised: bool, chunk: np.ndarray
                ) -> int:
    """Write the moments of the entries with the indices in `chunk`; return their number."""
    for i in chunk.tolist():
        destination.write(destination.names[i], to_npy(moments_of(entries[i], space, normalised)))
    return len(chunk)


def import_latents(source: str, dest: str, format: str, vae: str, workers: int, normalised: bool = False,
                   flips: bool = False, latent_stats: Path | None = None) -> None:
    """Write `dest`, moments as `encode` does, of the latents in `source`, in one of FORMATS, with their labels.

    `normalised`: they are (raw - shift) * scale. Raises UserError if they are not of the latent space of `vae`, and as
    `convert` does.
    """
    found, metadata = find_entries(source, format, flips)
    if not found:
        raise UserError(f"--source {shown(source)}: holds no arrays (N, C, H, W) or (C, H, W) in files "
                        f"{', '.join(map(os.fsdecode, FORMATS[format]))}")
    codec = load_codec(SHORTHANDS.get(vae, vae))
    if latent_stats:
        codec.use_statistics(read_statistics(latent_stats), str(latent_stats), sha256(latent_stats))
    space, entries, keys = codec.space, [*found.values()], np.array([*found], dtype=bytes)
    samples = require_space(entries, space, normalised)
    labels = [one.label for one in entries]
    if metadata.get("labels"):
        labels = read_labels(FolderStore(source), keys, key_of, metadata).tolist()
    elif None in labels and labels.count(None) < len(labels):
        raise UserError(f"{entries[labels.index(None)]}: has no labels, others have; complete them")
    names = np.array([moments_name(key) for key in found], dtype=bytes)
    table = listed(names, None if None in labels else np.array(labels))
    settings = {"command": "import-latents", "source_contents": digest(names, {"labels": table}), "images": len(names),
                "format": format, "normalised": normalised, "flips": flips, "vae": space.to_record()}
    destination = Destination(dest, names, MOMENTS_EXTENSIONS, settings, source)
    if destination.is_finished():
        destination.close()
        say(f"{shown(dest)} is finished already ({len(names)} images): nothing to do")
        return
    destination.require_room(len(to_npy(moments_of(entries[0], space, normalised))))
    destination.begin()
    missing = np.flatnonzero(destination.is_missing())
    chunks = [missing[part.start:part.stop] for part in blocks(len(missing), CHUNK)]
    work = partial(write_chunk, entries, destination, space, normalised)
    with tqdm(total=len(names), initial=len(names) - len(missing), desc="import-latents", unit="image") as bar:
        for count in in_workers(work, chunks, workers, in_order=False):
            bar.update(count)
    destination.finish({"labels": table, "classes": metadata.get("classes"), "vae": space.to_record(),
                        "samples": samples})
    said = "samples: their std is 0, every epoch sees the same latents" if samples else "mean and std"
    say(f"{shown(dest)}: moments of {len(names)} images in the latent space of {space.vae}; {said}")
