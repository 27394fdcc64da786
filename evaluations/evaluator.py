"""Score generated images against a reference: the Frechet distance, called FID in Inception's features and only there.

    python -m evaluations.evaluator --ref-batch VIRTUAL_imagenet256_labeled.npz --sample-batch samples.npz --output metrics.json

Images come as npz in ADM's form (`arr_0`, uint8, NHWC, RGB; streamed, never loaded whole) or as a folder.
Letters: N images, H W image size, F feature width.
"""

import argparse
import importlib.metadata
import itertools
import json
import math
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from evaluations.features import Extractor, load_extractor
from evaluations.inception import Inception
from evaluations.metrics import frechet_distance, gaussian_statistics
from models.errors import UserError, without_traceback
from models.files import write_whole

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError)  # zipfile and numpy, on a damaged file


@dataclass(frozen=True)
class ImageSet:
    """Images to be read in order, and what is known of them before reading. `images()` yields uint8 (H, W, 3)."""

    name: str                                                 # for messages
    images: Callable[[], Iterator[np.ndarray]] | None         # None: a file with statistics only
    count: int | None = None                                  # None: known after reading
    size: tuple[int, int] | None = None                       # (H, W); None: known after reading
    statistics: tuple[np.ndarray, np.ndarray] | None = None   # mu, sigma of Inception features, as the file gives them


def open_images(source, name: str) -> ImageSet:
    """An npz file, a folder of images, or an iterable of uint8 arrays (H, W, 3) or (B, H, W, 3) in memory.

    Only headers, listings and statistics are read. Raises UserError when the source is missing or not of its form.
    """
    if isinstance(source, ImageSet):
        return source
    if not isinstance(source, (str, Path)):
        return ImageSet(name, lambda: _from_memory(source, name))
    path = Path(source)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise UserError(f"{name} {path} not found: expected an npz file (arr_0, uint8, NHWC) or a folder of images")
    return _open_npz(path)


def _from_memory(source: Iterable[np.ndarray], name: str) -> Iterator[np.ndarray]:
    for item in source:
        array = np.asarray(item)
        if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3:
            raise UserError(f"{name} yields {array.dtype} {array.shape}: expected uint8 (H, W, 3) or (B, H, W, 3), RGB")
        yield from array if array.ndim == 4 else [array]


def _open_folder(folder: Path) -> ImageSet:
    """All images below the folder, sorted by path, so that class folders and REPA's `00000/img00000000.png` work alike."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if len(files) < 2:
        raise UserError(f"{folder} holds {len(files)} images ({', '.join(sorted(IMAGE_SUFFIXES))}): a score needs at least 2")
    first = _read_image(files[0])

    def images() -> Iterator[np.ndarray]:
        for file in files:
            image = _read_image(file)
            if image.shape != first.shape:
                raise UserError(f"{file} is {_size(image)} and {files[0]} {_size(first)}: bring all images to one size first, "
                                "for example with preprocessing.dataset_tools convert")
            yield image

    return ImageSet(str(folder), images, len(files), first.shape[:2])


def _read_image(file: Path) -> np.ndarray:
    """uint8 (H, W, 3) of an RGB or grey image."""
    try:
        with Image.open(file) as image:
            if image.mode not in ("RGB", "L"):
                raise UserError(f"{file} has mode {image.mode}: expected RGB or grey (8 bits); convert it first, "
                                "for example with preprocessing.dataset_tools convert")
            return np.array(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:               # SyntaxError: Pillow on broken PNG chunks
        raise UserError(f"{file} is not a readable image ({error}): remove it or write it again") from error


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]} pixels"


def _open_npz(path: Path) -> ImageSet:
    """Header of `arr_0`, and `mu`, `sigma` where the file has them; other keys (ADM's `mu_s`, labels) are left alone."""
    header = None
    try:
        with zipfile.ZipFile(path) as archive:
            keys = {name.removesuffix(".npy") for name in archive.namelist()}
            if "arr_0" in keys:
                with archive.open("arr_0.npy") as member:
                    header = _read_header(member)
    except UNREADABLE as error:
        raise UserError(f"{path} is not a readable npz file ({error}): expected arr_0 (uint8, NHWC) as np.savez writes it") from error
    statistics = _read_statistics(path, keys) if "mu" in keys else None           # ADM's own test for statistics
    if header is None:
        if statistics is None:
            raise UserError(f"{path} has no arr_0 but {', '.join(sorted(keys)) or 'nothing'}: "
                            "expected images as arr_0 (uint8, NHWC), or Inception's statistics as mu and sigma")
        return ImageSet(str(path), None, statistics=statistics)
    shape, fortran, dtype = header
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran:
        raise UserError(f"arr_0 of {path} is {dtype} {shape}{' in Fortran order' if fortran else ''}: expected uint8 (N, H, W, 3), RGB")
    if shape[0] < 2:
        raise UserError(f"{path} holds {shape[0]} images: a score needs at least 2")
    return ImageSet(str(path), lambda: _stream_npz(path), shape[0], shape[1:3], statistics)


def _read_statistics(path: Path, keys: set[str]) -> tuple[np.ndarray, np.ndarray]:
    """float64 mu (F,) and sigma (F, F) of Inception features."""
    if "sigma" not in keys:
        raise UserError(f"{path} has mu but no sigma: expected both statistics, or images alone")
    try:
        with np.load(path) as file:
            mu, sigma = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
    except UNREADABLE as error:
        raise UserError(f"mu and sigma of {path} are not readable ({error}): write or download the file again") from error
    width = Inception.features
    if mu.shape != (width,) or sigma.shape != (width, width) or not np.isfinite(sigma).all():
        raise UserError(f"{path} has mu {mu.shape} and sigma {sigma.shape}: expected Inception's: ({width},), ({width}, {width})")
    return mu, sigma


def _read_header(member) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an npy stream, which is left at the first value."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(member)
    if version not in readers:
        raise ValueError(f"npy version {version}")
    return readers[version](member)


def _stream_npz(path: Path) -> Iterator[np.ndarray]:
    """uint8 (H, W, 3), one image of `arr_0` after the other; a compressed member is decompressed on the way."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            (count, *shape), _, _ = _read_header(member)
            for i in range(count):
                data = member.read(math.prod(shape))
                if len(data) < math.prod(shape):
                    raise EOFError(f"it ends within image {i} of {count}")
                yield np.frombuffer(data, np.uint8).reshape(shape)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is damaged ({error}): write or download it again") from error


def extract(images: ImageSet, extractor: Extractor, batch_size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Features (N, F), float32, in the order of the images, and the image size (H, W). Batches are consecutive; the last may be smaller.

    Rows go into one array: small blocks kept from every batch would lie between the large passing ones on the heap, and memory
    would grow with the pixels that were read.
    """
    assert images.images is not None
    stream, size = images.images(), images.size
    features, count = None, 0                                                     # (room, F), of which `count` rows are filled
    with tqdm(total=images.count, desc=images.name, unit="image", disable=None) as bar:
        while batch := list(itertools.islice(stream, batch_size)):
            size = size or batch[0].shape[:2]
            for image in batch:
                if image.shape[:2] != size:
                    raise UserError(f"{images.name} has images of {size} and {image.shape[:2]} (height, width): expected one size")
            pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)        # (B, 3, H, W)
            rows = extractor(pixels).cpu().numpy()                                # (B, F)
            end = count + len(rows)
            if features is None:
                features = np.empty((images.count or len(rows), rows.shape[1]), np.float32)
            elif end > len(features):
                features = np.concatenate([features[:count], np.empty_like(features)])  # twice the room, for sets of unknown length
            features[count:end] = rows
            count = end
            bar.update(len(rows))
    if count < 2:
        raise UserError(f"{images.name} holds {count} images: a score needs at least 2")
    features = features[:count]
    if not np.isfinite(features).all():
        raise UserError(f"{extractor.name} gives features that are not finite on {images.name}: its weights are damaged")
    return features, size


@dataclass(frozen=True)
class Statistics:
    """A Gaussian in feature space, and where it comes from."""

    mu: np.ndarray                  # (F,), float64
    sigma: np.ndarray               # (F, F), float64
    count: int | None               # images in the set; None: a file with statistics only
    size: tuple[int, int] | None    # (H, W), likewise
    from_file: bool                 # mu and sigma were in the file, and may stand for more images than it holds


def statistics(images: ImageSet, extractor: Extractor, batch_size: int) -> Statistics:
    """The set's own mu and sigma where it has them and the features are Inception's, else those of its images' features."""
    if images.statistics is not None and extractor.key == "fid":
        return Statistics(*images.statistics, images.count, images.size, from_file=True)
    features, size = extract(images, extractor, batch_size)
    return Statistics(*gaussian_statistics(features), len(features), size, from_file=False)


def evaluate(ref, sample, extractor: Extractor, batch_size: int = 64) -> dict:
    """Compare two sets of images; each is a path (npz, folder) or an iterable of uint8 arrays (H, W, 3) or (B, H, W, 3).

    Returns what metrics.json holds: the distance under `extractor.key`, counts, image sizes, features, device and versions.
    Counts are of the images in the set; with `..._statistics_from_file` its mu and sigma may stand for more (the 10,000 images
    of VIRTUAL_imagenet256 come with the statistics of 1.28 million). Raises UserError for what cannot be scored.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size is {batch_size}: expected at least 1")
    sample, ref = open_images(sample, "the sample batch"), open_images(ref, "the reference batch")
    for images in (sample, ref):
        if images.images is None and extractor.key != "fid":
            raise UserError(f"{images.name} holds Inception's statistics and no images: {extractor.label} needs images (arr_0)")
    a, b = statistics(sample, extractor, batch_size), statistics(ref, extractor, batch_size)
    few = [f"{s.count} {what}" for s, what in ((a, "samples"), (b, "reference images")) if not s.from_file and s.count <= len(s.mu)]
    if few:
        warnings.warn(f"{' and '.join(few)} are fewer than {extractor.name}'s {len(a.mu)} features + 1: the covariance is singular, "
                      "the distance is biased upward and comparable only at equal counts", stacklevel=2)
    return {
        extractor.key: frechet_distance(a.mu, a.sigma, b.mu, b.sigma),
        "num_samples": a.count,
        "num_reference": b.count,
        "sample_statistics_from_file": a.from_file,
        "reference_statistics_from_file": b.from_file,
        "image_size": a.size and list(a.size),
        "reference_image_size": b.size and list(b.size),
        "features": extractor.name,
        "weights_sha256": extractor.weights_sha256,
        "weights_verified": extractor.weights_verified,
        "device": torch.cuda.get_device_name(extractor.device) if extractor.device.type == "cuda" else str(extractor.device),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "numpy", "timm")},
    }


def read_settings(sample: Path) -> dict | None:
    """The `settings.json` that generate.py leaves beside the npz (for a folder: in it), so that a score says how its images were made."""
    path = (sample if sample.is_dir() else sample.parent) / "settings.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): sample again, or move the file away") from error


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evaluations.evaluator", description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    images = parser.add_argument_group("images: an npz file (arr_0, uint8, NHWC) or a folder")
    images.add_argument("--ref-batch", "--ref_batch", type=Path, required=True, default=argparse.SUPPRESS, metavar="REF",
                        help="reference; its own mu and sigma are used for FID when an npz has them")
    images.add_argument("--sample-batch", "--sample_batch", type=Path, default=None, metavar="SAMPLE",
                        help="generated images; the settings.json beside the npz (or in the folder) goes into the output")
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--features", default="inception", metavar="inception|local-dir:FOLDER",
                         help="feature network; a folder holds a timm model, and its distance is not called FID")
    scoring.add_argument("--inception-weights", type=Path, metavar="FILE",
                         help="weights of the Inception of 2015-12-05 (None: torch hub cache, else download)")
    scoring.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device of the feature network")
    scoring.add_argument("--batch-size", type=int, default=64, help="images per forward pass")
    scoring.add_argument("--output", "--save_path", type=Path, metavar="OUT.json",
                         help="result; an existing folder gets metrics.json (None: print only)")
    scoring.add_argument("--dry-run", action="store_true", help="check reference and feature network, and stop")
    args = parser.parse_args(argv)
    if args.sample_batch is None and not args.dry_run:
        parser.error("--sample-batch is missing: name an npz file or a folder of generated images")
    return args


@without_traceback
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    # Everything that can be wrong with the arguments is said before weights are downloaded or images read.
    device, output = _device(args.device), _output(args.output)
    ref = open_images(args.ref_batch, "--ref-batch")
    if args.dry_run:
        load_extractor(args.features, device, args.inception_weights)
        return
    sample, settings = open_images(args.sample_batch, "--sample-batch"), read_settings(args.sample_batch)
    extractor = load_extractor(args.features, device, args.inception_weights)
    result = evaluate(ref, sample, extractor, args.batch_size)
    result |= {"sample_batch": str(args.sample_batch), "ref_batch": str(args.ref_batch)}
    if settings is not None:
        result["settings"] = settings
    print(f"{extractor.label}: {result[extractor.key]}")
    if output is not None:
        write_whole(output, lambda partial: partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8"))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device is {name!r}: expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device is {name!r} and torch sees {torch.cuda.device_count()} GPUs: use another, or cpu")
    return device


def _output(path: Path | None) -> Path | None:
    """The file to write, in a folder that exists."""
    if path is None:
        return None
    path = path / "metrics.json" if path.is_dir() else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path} cannot be written ({error}): name a file in a folder of yours") from error
    return path


if __name__ == "__main__":
    main()
