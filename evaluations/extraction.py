"""Features of a set of images, in their order, from any number of processes; what scores need of them; and the reference's cache.

Letters: n, N images, B batch, H W image size, F feature width, S spatial width.
"""

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from evaluations.features import Extractor
from evaluations.images import FileStatistics, ImageSet
from evaluations.inception import Inception
from evaluations.metrics import Gaussian, side_by_side
from runtime.files import write_whole
from runtime.messages import UserError, notice
from runtime.speed import full_precision

PIECE = 8         # images that one thread of a CPU takes at a time
CACHE_FORMAT = 1  # part of the cache's keys: raise it when features or their meaning change

Pair = tuple[torch.Tensor, torch.Tensor]


def place() -> tuple[int, int]:
    """This process's rank and the number of processes that were joined."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


# ------------------------------------------------------------------------------------------------------------------- features

def extract(images: ImageSet, extractor: Extractor, batch_size: int) -> Iterator[Pair]:
    """Pooled (n, F) and spatial (n, S) features, float32, of all images in their order, in several pieces; the same on every process.

    Blocks of `batch_size` consecutive images are dealt whole to the processes in turn, so that no number of processes changes
    a bit. The last block may be smaller. Raises UserError for features that are not finite, behind the last piece.
    """
    assert images.blocks is not None and images.count is not None
    rank, world = place()
    blocks = [range(start, min(start + batch_size, images.count)) for start in range(0, images.count, batch_size)]
    mine, on_gpu = images.blocks(blocks[rank::world]), extractor.device.type == "cuda"
    finite = torch.ones((), dtype=torch.bool, device=extractor.device)  # asked at the end: before, a GPU would wait for the next block
    # A process that has no block left takes part in the exchange, with a black image in order to know the widths.
    idle = np.zeros((1, *(images.size or (64, 64)), 3), np.uint8)
    with tqdm(total=images.count, desc=images.name, unit="image", disable=None if rank == 0 else True) as bar:
        for first in range(0, len(blocks), world):
            together = blocks[first:first + world]
            pixels = torch.from_numpy(next(mine) if rank < len(together) else idle)       # (B, H, W, 3), bytes
            if on_gpu:                                            # from pinned memory nothing waits for the block before
                pixels = pixels.pin_memory().to(extractor.device, non_blocking=True)
            pooled, spatial = _features(extractor, pixels.permute(0, 3, 1, 2))
            if world > 1:
                rows = _gather(torch.cat([pooled, spatial], dim=1), together, batch_size)
                pooled, spatial = rows[:, :pooled.shape[1]], rows[:, pooled.shape[1]:]
            finite &= pooled.isfinite().all() & spatial.isfinite().all()
            yield pooled, spatial
            bar.update(sum(map(len, together)))
        if not finite:
            raise UserError(f"{extractor.name} gives features that are not finite on {images.name}: its weights are damaged")


def _features(extractor: Extractor, images: torch.Tensor) -> Pair:
    """The extractor's features of images (B, 3, H, W): all at once on a GPU, in small pieces side by side on a CPU."""
    if extractor.device.type != "cpu":
        return extractor(images)
    with full_precision(extractor.device):                        # around all threads: they would restore each other's settings
        pieces = side_by_side(extractor, images.split(PIECE), extractor.device)
    return tuple(torch.cat(rows) for rows in zip(*pieces, strict=True))


def _gather(rows: torch.Tensor, blocks: list[range], batch_size: int) -> torch.Tensor:
    """Each process's rows, padded to one shape for the exchange, joined in the order of the blocks."""
    padded = rows.new_zeros(batch_size, rows.shape[1])
    padded[:len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[:len(block)] for part, block in zip(parts, blocks, strict=False)])


@dataclass(frozen=True)
class Measured:
    """What scores need to know of one set; None where it was not asked for. What comes from images is on the first process only."""

    pooled: torch.Tensor | None = None      # (N, F) float32
    gaussian: Pair | None = None            # mean (F,) and covariance (F, F) of the pooled features, float64
    spatial: Pair | None = None             # mean (S,) and covariance (S, S) of the spatial ones


def measure(images: ImageSet, extractor: Extractor, batch_size: int, need: set[str], cache: Path | None = None) -> Measured:
    """The fields of `Measured` that `need` names: the file's own statistics where it has them, else from its images.

    With `cache`, what comes from images is kept in that folder under a hash of the images' files and of the network.
    """
    known = _from_file(images, extractor, need)
    missing = need - known.keys()
    if cache is None or images.content is None or not missing:
        return Measured(**known, **_from_images(images, extractor, batch_size, missing))
    kept = file = None
    if place()[0] == 0:
        network = (extractor.key, extractor.weights_sha256, extractor.config, extractor.device.type)
        identity = (CACHE_FORMAT, images.content(), *network, *sorted(missing))
        file = cache / f"{hashlib.sha256(repr(identity).encode()).hexdigest()}.npz"
        kept = _read_cache(file, extractor.device)
    if not from_first(kept is not None):
        kept = _from_images(images, extractor, batch_size, missing)
        if file is not None:
            _write_cache(file, kept)
    return Measured(**known, **(kept or {}))


def _from_file(images: ImageSet, extractor: Extractor, need: set[str]) -> dict[str, Pair]:
    own = file_statistics(images, extractor)
    pairs = {} if own is None else {"gaussian": (own.mu, own.sigma), "spatial": (own.mu_s, own.sigma_s)}
    return {name: tuple(torch.from_numpy(x).to(extractor.device) for x in pair)
            for name, pair in pairs.items() if name in need and pair[0] is not None}


def _from_images(images: ImageSet, extractor: Extractor, batch_size: int, need: set[str]) -> dict:
    """`pooled` rows go into one array: many small ones would lie between the large passing ones on the heap, and memory would grow."""
    if not need:
        return {}
    rank, _ = place()
    pooled, gaussian, spatial, done = None, None, None, 0
    for rows, spatial_rows in extract(images, extractor, batch_size):
        if rank != 0:
            continue
        if "pooled" in need:
            pooled = torch.empty(images.count, rows.shape[1], device=rows.device) if pooled is None else pooled
            pooled[done:done + len(rows)] = rows
            done += len(rows)
        if "gaussian" in need:
            gaussian = gaussian or Gaussian(rows.shape[1], rows.device)
            gaussian.add(rows)
        if "spatial" in need:
            spatial = spatial or Gaussian(spatial_rows.shape[1], rows.device)
            spatial.add(spatial_rows)
    if rank != 0:
        return {}
    with full_precision(extractor.device), all_threads():
        found = {"pooled": pooled, "gaussian": gaussian and gaussian.statistics(), "spatial": spatial and spatial.statistics()}
    return {name: found[name] for name in need}


def file_statistics(images: ImageSet, extractor: Extractor) -> FileStatistics | None:
    """The file's own statistics, if they are of this extractor's features. Raises UserError when its weights or widths differ."""
    own = images.statistics
    if own is None or own.about.get("distance", "fid") != extractor.key:
        return None
    if own.about.get("weights_sha256", extractor.weights_sha256) != extractor.weights_sha256:
        raise UserError(f"the statistics of {images.name} were made with other {extractor.name} weights ({own.about['weights_sha256']}, "
                        f"now {extractor.weights_sha256}): use the same weights, or make the statistics again")
    if not extractor.is_inception and len(own.mu) != extractor.width:
        raise UserError(f"{images.name} has mu of {len(own.mu)} numbers and {extractor.name} gives {extractor.width}: "
                        "make the statistics again with these features, or name another file")
    widths = Inception.pooled, Inception.spatial
    if extractor.is_inception and (len(own.mu), widths[1] if own.mu_s is None else len(own.mu_s)) != widths:
        raise UserError(f"{images.name} has mu of {len(own.mu)} and mu_s of {0 if own.mu_s is None else len(own.mu_s)} numbers: "
                        f"expected Inception's {widths[0]} and {widths[1]}")
    return own


@contextlib.contextmanager
def all_threads() -> Iterator[None]:
    """The first process computes while the others wait: let it use their threads, as many as one process alone would have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads * (int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if place()[1] > 1 else 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------- reference's cache

def from_first(value):
    """The first process's value, on every process."""
    values = [value]
    if place()[1] > 1:
        dist.broadcast_object_list(values)
    return values[0]


def reference_cache() -> Path:
    """The folder that keeps references' features unless the user names another: beside torch hub's weights."""
    return Path(torch.hub.get_dir()) / "reference-features"


def _read_cache(file: Path, device: torch.device) -> dict | None:
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: torch.from_numpy(arrays[name]).to(device) for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        notice(f"the cached reference features {file} are damaged ({error}) and made again")
        return None
    pairs = {name: (found[f"{name}_mean"], found[f"{name}_covariance"]) for name in ("gaussian", "spatial") if f"{name}_mean" in found}
    return pairs | ({"pooled": found["pooled"]} if "pooled" in found else {})


def _write_cache(file: Path, kept: dict) -> None:
    arrays = {}
    for name, value in kept.items():
        arrays |= {name: value} if isinstance(value, torch.Tensor) else {f"{name}_mean": value[0], f"{name}_covariance": value[1]}

    def write(partial: Path) -> None:
        with open(partial, "wb") as stream:
            np.savez(stream, **{name: array.cpu().numpy() for name, array in arrays.items()})

    try:
        write_whole(file, write)
    except UserError as error:
        notice(f"reference features are not kept: {error}")


