"""Sets of images to be scored: an npz file in ADM's form, a folder, arrays in memory, or pictures that are made when they are read.

Letters: N images in the set, n in one block, H W image size.
"""

import functools
import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from preprocessing.crop import center_crop, to_rgb
from runtime.files import UNREADABLE
from runtime.stores import MAX_PIXELS, decode_image, shown
from runtime.files import sha256
from runtime.messages import UserError, notice

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
LOADED = ("arr_1", "mu", "sigma", "mu_s", "sigma_s", "about")  # what is loaded whole of an npz file, and may be compressed there
MAX_LOADED = 2**30  # bytes of each: Inception's sigma is a thirtieth
STREAMED = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
READERS = min(8, os.cpu_count() or 1)  # threads that decode the files of a folder


@dataclass(frozen=True)
class FileStatistics:
    """What an npz file says of a set's features, which may be more images than it holds. All float64."""

    mu: np.ndarray                  # (F,)
    sigma: np.ndarray               # (F, F)
    mu_s: np.ndarray | None         # (S,) of the spatial features; None: the file has FID's alone
    sigma_s: np.ndarray | None      # (S, S)
    about: dict                     # what `stats` wrote of their making; {}: ADM's file


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order, of which blocks can be read; only headers and listings are read before."""

    name: str                                                     # for messages
    count: int | None                                             # N; None: a file with statistics only
    size: tuple[int, int] | None                                  # (H, W)
    blocks: Callable[[Iterable[range]], Iterator[np.ndarray]] | None  # increasing ranges -> uint8 (n, H, W, 3) each; None likewise
    statistics: FileStatistics | None = None
    labels: np.ndarray | None = None                              # (N,) class of each image, where the source says it
    content: Callable[[], str] | None = None                      # sha256 of names and pixels' files; None: nothing to cache by


def open_images(source, name: str = "the images", crop: int | None = None, least: int = 2) -> ImageSet:
    """An npz file, a folder of images, an array uint8 (N, H, W, 3), or an ImageSet as it is.

    `crop` cuts and resizes every image as ADM did, to so many pixels. Raises UserError when the source is missing or not of its form,
    and when an npz file holds fewer than `least` images: a score needs 2.
    """
    if isinstance(source, ImageSet):
        return source
    if isinstance(source, np.ndarray):
        _require_form(source.shape, source.dtype, name)
        return ImageSet(name, len(source), source.shape[1:3], lambda ranges: (source[r.start:r.stop] for r in ranges))
    path = Path(source)
    if path.is_dir():
        return _open_folder(path, crop)
    if not path.is_file():
        raise UserError(f"{name} {path} not found: expected an npz file (arr_0, uint8, NHWC) or a folder of images")
    return _open_npz(path, crop, least)


def _require_form(shape: tuple[int, ...], dtype: np.dtype, name: str, least: int = 2) -> None:
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise UserError(f"{name} is {dtype} {shape}: expected uint8 (N, H, W, 3), RGB")
    if not 0 < shape[1] * shape[2] <= MAX_PIXELS or min(shape) < 0:
        raise UserError(f"{name} is {shape}: expected images of 1 to {MAX_PIXELS} pixels")
    if shape[0] < least:
        raise UserError(f"{name} holds {shape[0]} images: a score needs at least 2")


def _cropped(image: Image.Image, crop: int, where: str) -> np.ndarray:
    """uint8 (crop, crop, 3)"""
    return np.array(center_crop(image, crop, where))


# ------------------------------------------------------------------------------------------------------------------ a folder

def _open_folder(folder: Path, crop: int | None) -> ImageSet:
    """All images below the folder, sorted by path, so that class folders and REPA's `00000/img00000000.png` work alike."""
    files = sorted(Path(place, name) for place, _, names in os.walk(folder, onerror=_refuse_folder) for name in names
                   if Path(name).suffix.lower() in IMAGE_SUFFIXES)
    if len(files) < 2:
        raise UserError(f"{shown(folder)} holds {len(files)} images ({', '.join(sorted(IMAGE_SUFFIXES))}): a score needs at least 2")
    first = _read_image(files[0], crop)

    def blocks(ranges: Iterable[range]) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(READERS) as pool:
            for r in ranges:
                images = list(pool.map(lambda file: _read_image(file, crop), files[r.start:r.stop]))
                for file, image in zip(files[r.start:r.stop], images, strict=True):
                    if image.shape != first.shape:
                        raise UserError(f"{shown(file)} is {_size(image)} and {shown(files[0])} {_size(first)}: bring all images to "
                                        "one size first, for example with preprocessing.dataset_tools convert")
                yield np.stack(images)

    @functools.cache
    def content() -> str:
        digest = hashlib.sha256(str(crop).encode())
        for file in files:
            digest.update(os.fsencode(f"{file.relative_to(folder)} {sha256(file)}\n"))
        return digest.hexdigest()

    return ImageSet(str(folder), len(files), first.shape[:2], lambda ranges: _ahead(blocks(ranges)), labels=_folder_labels(folder, files),
                    content=content)


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"cannot list {shown(error.filename)}: {error.strerror}") from error


def _read_image(file: Path, crop: int | None) -> np.ndarray:
    """uint8 (H, W, 3) of an RGB or grey image; of any picture if it is cropped as `convert` does."""
    where = shown(file)
    try:
        if not file.is_file() and file.exists():
            raise UserError(f"{where} is no file but a pipe or device: remove it")
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {where}: {error.strerror}") from error
    image = decode_image(data, where)
    if crop is not None:
        return _cropped(to_rgb(image, where), crop, where)
    if image.mode not in ("RGB", "L"):
        raise UserError(f"{where} has mode {image.mode}: expected RGB or grey (8 bits); convert it first, "
                        "for example with preprocessing.dataset_tools convert")
    return np.array(image.convert("RGB"))


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]} pixels"


def _folder_labels(folder: Path, files: list[Path]) -> np.ndarray | None:
    """Labels (N,) from the folder's dataset.json, in StyleGAN's form; None where it has none for all files."""
    try:
        listed = dict(json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["labels"])
        labels = [listed[file.relative_to(folder).as_posix()] for file in files]
        return np.array(labels, dtype=np.int64) if all(type(label) is int for label in labels) else None
    except UNREADABLE:
        return None


# --------------------------------------------------------------------------------------------------------------- an npz file

def _open_npz(path: Path, crop: int | None, least: int) -> ImageSet:
    """Header of `arr_0`, labels of `arr_1`, and statistics where the file has them; other keys are left alone."""
    array, shape, labels, statistics = None, None, None, None
    try:
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as file:
            keys = {name.removesuffix(".npy") for name in archive.namelist()}
            for member in archive.infolist():
                if member.file_size > MAX_LOADED and member.filename.removesuffix(".npy") in LOADED:
                    raise UserError(f"{shown(path)} holds {member.filename} of {member.file_size} bytes: expected at most {MAX_LOADED}")
            if "arr_0" in keys:
                with archive.open("arr_0.npy") as member:
                    shape, dtype, streamed = _read_header(member)
                    promised = member.tell() + (math.prod(shape) * dtype.itemsize if streamed else 0)
                if not streamed:
                    notice(f"{path} is in Fortran order or of a later npy version: it is loaded whole")
                    array = np.ascontiguousarray(file["arr_0"])
                    shape, dtype = array.shape, array.dtype
                _require_form(shape, dtype, f"arr_0 of {path}", least)
                if promised > archive.getinfo("arr_0.npy").file_size:
                    raise EOFError(f"arr_0 ends before the {shape[0]} images that it says")
            if "arr_1" in keys and shape is not None:
                with archive.open("arr_1.npy") as member:
                    labelled, kind, _ = _read_header(member)
                if labelled == shape[:1] and kind.kind in "iu":                   # else some other array, which ADM's reader ignores too
                    labels = file["arr_1"].astype(np.int64)
            if "mu" in keys and crop is None:                                     # ADM's own test for statistics
                statistics = _read_statistics(path, file, keys)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{shown(path)} is not a readable npz file ({shown(str(error))}): "
                        "expected arr_0 (uint8, NHWC) as np.savez writes it") from error
    if shape is None:
        if statistics is None:
            raise UserError(f"{shown(path)} has no arr_0 but {shown(', '.join(sorted(keys))) or 'nothing'}: "
                            "expected images as arr_0 (uint8, NHWC), or statistics as mu and sigma")
        return ImageSet(str(path), None, None, None, statistics)

    def blocks(ranges: Iterable[range]) -> Iterator[np.ndarray]:
        stream = _stream_npz(path, shape, ranges) if array is None else (array[r.start:r.stop] for r in ranges)
        if crop is None:
            return stream
        return (np.stack([_cropped(Image.fromarray(image), crop, str(path)) for image in block]) for block in stream)

    return ImageSet(str(path), shape[0], shape[1:3] if crop is None else (crop, crop), lambda ranges: _ahead(blocks(ranges)), statistics,
                    labels, functools.cache(lambda: f"{sha256(path)} {crop}"))


def _read_header(member) -> tuple[tuple[int, ...] | None, np.dtype | None, bool]:
    """Shape and dtype of an npy stream, which is left at the first value; and whether its rows can be streamed at all."""
    version = np.lib.format.read_magic(member)
    if version not in STREAMED:
        return None, None, False
    shape, fortran, dtype = STREAMED[version](member)
    return shape, dtype, not fortran


def _read_statistics(path: Path, file, keys: set[str]) -> FileStatistics:
    """From an opened npz with the key `mu`."""
    found = {key: file[key].astype(np.float64) if key in keys else None for key in ("mu", "sigma", "mu_s", "sigma_s")}
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        mu, sigma = found[mean], found[covariance]
        if mu is None and sigma is None and mean == "mu_s":
            continue                                                              # other programs keep FID's statistics alone
        if mu is None or sigma is None or mu.ndim != 1 or sigma.shape != 2 * mu.shape:
            raise UserError(f"{path} has {mean} {getattr(mu, 'shape', 'missing')} and {covariance} {getattr(sigma, 'shape', 'missing')}: "
                            "expected (F,) and (F, F), or images alone")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise UserError(f"{mean} and {covariance} of {path} are not finite: write or download the file again")
    about = json.loads(str(file["about"])) if "about" in keys else {}
    if not isinstance(about, dict):
        raise UserError(f"about of {path} is no JSON object: write the file again")
    return FileStatistics(**found, about=about)


def _stream_npz(path: Path, shape: tuple[int, ...], ranges: Iterable[range]) -> Iterator[np.ndarray]:
    """Rows of `arr_0`, never more than a block in memory; a compressed member is decompressed on the way."""
    row = math.prod(shape[1:])
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            _read_header(member)
            position = 0
            for r in ranges:
                if r.start > position:
                    member.seek((r.start - position) * row, os.SEEK_CUR)
                data = member.read(len(r) * row)
                if len(data) < len(r) * row:
                    raise EOFError(f"it ends within image {r.start + len(data) // row} of {shape[0]}")
                position = r.stop
                yield np.frombuffer(bytearray(data), np.uint8).reshape(len(r), *shape[1:])  # PyTorch wants it writable
    except UNREADABLE as error:
        raise UserError(f"{shown(path)} is damaged ({shown(str(error))}): delete it, then download it again, or "
                        "give the command again that made it") from error


def _ahead(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same blocks, each read in a thread while the one before is used."""
    with ThreadPoolExecutor(1) as thread:
        block = thread.submit(next, blocks, None)
        while (current := block.result()) is not None:
            block = thread.submit(next, blocks, None)
            yield current


def pick(images: ImageSet, rows: Iterable[int]) -> Iterator[np.ndarray]:
    """uint8 (H, W, 3): the images of increasing row numbers, one after the other."""
    return (block[0] for block in images.blocks(range(row, row + 1) for row in rows))
