"""Sets of images to score: an npz file in ADM's form, a folder, an array, or images made while they are read.

Letters: N images in the set, n in one block, H W image size, F and S widths of pooled and spatial features.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from evaluations.networks import FDR6
from preprocessing.crop import center_crop, to_rgb
from runtime.catalogue import read_labels
from runtime.messages import UserError, notice
from runtime.npz import load_npz, npz_names, read_npz_rows, read_npz_shape
from runtime.stores import IMAGE_EXTENSIONS, MAX_PIXELS, Store, decode_image, list_names, open_store, shown

READERS = min(8, os.cpu_count() or 1)  # threads that decode the files of a folder
NPZ = "expected an npz file (arr_0, uint8, NHWC) or a folder of images"


@dataclass(frozen=True)
class FileStatistics:
    """Feature statistics that an npz file holds, perhaps of more images than it holds. All float64."""

    mu: np.ndarray                  # (F,)
    sigma: np.ndarray               # (F, F)
    mu_s: np.ndarray | None         # (S,) of the spatial features; None: the file has FID's alone
    sigma_s: np.ndarray | None      # (S, S)
    about: dict                     # what `stats` recorded; {}: ADM's file
    pooled: np.ndarray | None = None          # (n, F) float32: features of some of the images, for precision and MIND


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order, read in blocks; opening it reads only headers and listings.

    `blocks` maps increasing ranges to uint8 (n, H, W, 3) each. Without images count, size and blocks are None.
    """

    name: str                                                     # for messages
    count: int | None                                             # N
    size: tuple[int, int] | None                                  # (H, W)
    blocks: Callable[[Iterable[range]], Iterator[np.ndarray]] | None
    statistics: FileStatistics | None = None
    labels: np.ndarray | None = None                              # (N,) class of each image
    more: tuple[FileStatistics, ...] = ()                         # in the features of other networks


def open_images(source: "str | Path | np.ndarray | ImageSet", name: str = "the images",
                crop: int | None = None) -> ImageSet:
    """Open an npz file, a folder (images or FDr6's files), or an array uint8 (N, H, W, 3); an ImageSet is returned.

    `crop` cuts and resizes every image as ADM did, to that many pixels. Raises UserError if the source is missing, of
    another form, or has fewer than two images.
    """
    if isinstance(source, ImageSet):
        return source
    if isinstance(source, np.ndarray):
        _require_form(source.shape, source.dtype, name)
        return ImageSet(name, len(source), source.shape[1:3], lambda ranges: (source[r.start:r.stop] for r in ranges))
    path = Path(source)
    if path.is_dir():
        files = {name: path / row.file for name, row in FDR6.items() if (path / row.file).is_file()}
        return _open_statistics(path, files) if files else _open_folder(path, crop)
    if not path.is_file():
        raise UserError(f"{name} {path}: not found; {NPZ}")
    return _open_npz(path, crop)


def reference_label(name: str, digest: str | None) -> str:
    """A reference's short name with the start of its hash: adm:b3273271. Without a hash, its whole name."""
    return name if digest is None else f"{Path(name).stem}:{digest[:8]}"


def _require_form(shape: tuple[int, ...], dtype: np.dtype, name: str) -> None:
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise UserError(f"{name}: {dtype} {shape}; expected uint8 (N, H, W, 3), RGB")
    if not 0 < shape[1] * shape[2] <= MAX_PIXELS or min(shape) < 0:
        raise UserError(f"{name}: {shape}; expected images of 1 to {MAX_PIXELS} pixels")
    if shape[0] < 2:
        raise UserError(f"{name}: holds {shape[0]} images; a score needs at least 2")


# ---- a folder --------------------------------------------------------------------------------------------------------

def _open_folder(folder: Path, crop: int | None) -> ImageSet:
    """All images below the folder, sorted by relative path, with the labels of its dataset.json."""
    store = open_store(folder)
    names = list_names(store, IMAGE_EXTENSIONS)                   # (N,)
    if len(names) < 2:
        raise UserError(f"{shown(folder)}: holds {len(names)} images; a score needs at least 2")
    first = _read_image(store, names[0], crop)                    # (H, W, 3)

    def read(name: bytes) -> np.ndarray:
        image = _read_image(store, name, crop)
        if image.shape != first.shape:
            raise UserError(f"{store.where(name)}: {image.shape[:2]} pixels (H, W), the first image {first.shape[:2]}; "
                            "bring all to one size, for example with preprocessing.dataset_tools convert")
        return image

    def blocks(ranges: Iterable[range]) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(READERS) as pool:
            for r in ranges:
                yield np.stack(list(pool.map(read, names[r.start:r.stop])))

    try:
        labels = read_labels(store, names, key=bytes)             # (N,)
    except UserError as error:                                    # no distance depends on them
        notice(f"{error} (read without labels)")
        labels = None
    return ImageSet(str(folder), len(names), first.shape[:2], lambda ranges: _ahead(blocks(ranges)), labels=labels)


def _read_image(store: Store, name: bytes, crop: int | None) -> np.ndarray:
    """uint8 (H, W, 3) of an RGB or grey image; of any picture if it is cropped."""
    where = store.where(name)
    image = decode_image(store.read(name), where)
    if crop is not None:
        return np.array(center_crop(to_rgb(image, where), crop, where))
    if image.mode not in ("RGB", "L"):
        raise UserError(f"{where}: mode {image.mode}, expected RGB or grey (8 bits); convert it, "
                        "for example with preprocessing.dataset_tools convert")
    return np.array(image.convert("RGB"))


# ---- an npz file -----------------------------------------------------------------------------------------------------

def _open_npz(path: Path, crop: int | None) -> ImageSet:
    """Images `arr_0`, labels `arr_1`, and statistics if the file has them. Other arrays are ignored."""
    names, where = npz_names(path), shown(path)
    statistics, *more = _read_statistics(path) if "mu" in names and crop is None else [None]  # ADM's own test: `mu`
    if "arr_0" not in names:
        if statistics is None:
            raise UserError(f"{where}: has no arr_0 but {shown(', '.join(sorted(names))) or 'nothing'}; expected "
                            "images as arr_0 (uint8, NHWC), or statistics as mu and sigma")
        return ImageSet(str(path), None, None, None, statistics, more=tuple(more))
    shape, dtype = read_npz_shape(path)
    _require_form(shape, dtype, f"arr_0 of {where}")
    labels = None
    if "arr_1" in names:
        labelled, kind = read_npz_shape(path, "arr_1")
        if labelled == shape[:1] and kind.kind in "iu":                                  # ADM's reader ignores arr_1
            labels = load_npz(path, ["arr_1"])["arr_1"].astype(np.int64)

    def blocks(ranges: Iterable[range]) -> Iterator[np.ndarray]:
        stream = read_npz_rows(path, ranges)
        if crop is None:
            return stream
        return (np.stack([np.array(center_crop(Image.fromarray(image), crop, where)) for image in block])
                for block in stream)

    size = shape[1:3] if crop is None else (crop, crop)
    return ImageSet(str(path), shape[0], size, lambda ranges: _ahead(blocks(ranges)), statistics, labels, tuple(more))


def _read_statistics(path: Path) -> list[FileStatistics]:
    """The statistics of an npz file that has `mu`, and then those in the features of other networks."""
    try:
        about = json.loads(str(load_npz(path, ["about"]).get("about", "{}")))
        others = {f"_{one['features']}": one for one in about.get("more", ())}
        for one in ({"distance": "fid", "features": "inception"} | about, *others.values()):
            if not isinstance(one["distance"] + one["features"], str) or not isinstance(one.get("images", 0), int):
                raise TypeError("a name is no text, or the number of images no number")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{shown(path)}: about is not a JSON object of stats; write the file again") from error
    return [_read_one(path, "", about), *(_read_one(path, suffix, one) for suffix, one in others.items())]


def _read_one(path: Path, suffix: str, about: dict) -> FileStatistics:
    """The statistics of one network, whose arrays have names with this suffix."""
    names, where = ("mu", "sigma", "mu_s", "sigma_s", "pooled"), shown(path)
    found = load_npz(path, [name + suffix for name in names])
    found = {name: found.get(name + suffix) for name in names}
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        mu, sigma = found[mean], found[covariance]
        if mean == "mu_s" and mu is None and sigma is None:
            continue                                              # other programs keep FID's statistics alone
        if (mu is None or sigma is None or mu.ndim != 1 or sigma.shape != 2 * mu.shape
                or mu.dtype.kind not in "iuf" or sigma.dtype.kind not in "iuf"):
            raise UserError(f"{where}: {mean}{shown(suffix)} {getattr(mu, 'shape', 'missing')} and {covariance}"
                            f"{shown(suffix)} {getattr(sigma, 'shape', 'missing')}; expected numbers (F,) and (F, F)")
        found |= {mean: mu.astype(np.float64), covariance: sigma.astype(np.float64)}
        if not (np.isfinite(found[mean]).all() and np.isfinite(found[covariance]).all()):
            raise UserError(f"{where}: {mean} and {covariance} are not finite; make or download the file again")
    if (rows := found["pooled"]) is not None:
        if (rows.dtype.kind != "f" or rows.ndim != 2 or rows.shape[1:] != found["mu"].shape or len(rows) < 2
                or not np.isfinite(rows := rows.astype(np.float32)).all()):
            raise UserError(f"{where}: pooled{shown(suffix)} is {rows.dtype} {rows.shape}; expected at least 2 rows of "
                            f"{len(found['mu'])} finite numbers")
        found["pooled"] = rows
    return FileStatistics(**found, about=about)


def _open_statistics(folder: Path, files: dict[str, Path]) -> ImageSet:
    """The published reference files of FDr6's networks, as one reference without images."""
    read = {name: _read_one(file, "", {} if name == "inception" else {"distance": f"fd_{name}"})
            for name, file in files.items()}
    return ImageSet(str(folder), None, None, None, read.pop("inception", None), more=tuple(read.values()))


def _ahead(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The same blocks; the next one is read in a thread while the current one is used."""
    with ThreadPoolExecutor(1) as thread:
        block = thread.submit(next, blocks, None)
        while (current := block.result()) is not None:
            block = thread.submit(next, blocks, None)
            yield current


def pick(images: ImageSet, rows: Iterable[int]) -> Iterator[np.ndarray]:
    """uint8 (H, W, 3): the images of increasing row numbers, one after the other."""
    return (block[0] for block in images.blocks(range(row, row + 1) for row in rows))
