"""Features of a set of images in their order, from any number of processes, and what scores need of them.

Letters: n, N images, B batch, H W image size, F feature width, S spatial width.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from evaluations.features import Extractor
from evaluations.images import FileStatistics, ImageSet
from evaluations.metrics import Gaussian, side_by_side
from runtime.launch import blocks
from runtime.messages import UserError
from runtime.speed import full_precision

PIECE = 8         # images that one thread of a CPU takes at a time

Pair = tuple[torch.Tensor, torch.Tensor]


def place() -> tuple[int, int]:
    """This process's rank and the number of joined processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def extract(images: ImageSet, extractor: Extractor, batch_size: int) -> Iterator[Pair]:
    """Pooled (n, F) and spatial (n, S) features, float32, of all images in order, in pieces; the same on every process.

    Processes take blocks of `batch_size` consecutive images in turn, so that their number does not change a bit. Raises
    UserError after the last piece if a feature is not finite.
    """
    assert images.blocks is not None and images.count is not None
    rank, world = place()
    every = blocks(images.count, batch_size)
    mine, on_gpu = images.blocks(every[rank::world]), extractor.device.type == "cuda"
    finite = torch.ones((), dtype=torch.bool, device=extractor.device)  # read at the end: earlier, a GPU would wait
    # A process without a block in the last round runs the network on a black image, to know the widths.
    idle = np.zeros((1, *(images.size or (64, 64)), 3), np.uint8)
    with tqdm(total=images.count, desc=images.name, unit="image", disable=None if rank == 0 else True) as bar:
        for first in range(0, len(every), world):
            together = every[first:first + world]
            pixels = torch.from_numpy(next(mine) if rank < len(together) else idle)       # (B, H, W, 3), bytes
            if on_gpu:                                            # copies from pinned memory overlap with computing
                pixels = pixels.pin_memory().to(extractor.device, non_blocking=True)
            pooled, spatial = _features(extractor, pixels.permute(0, 3, 1, 2))
            if world > 1:
                rows = _gather(torch.cat([pooled, spatial], dim=1), together, batch_size)
                pooled, spatial = rows[:, :pooled.shape[1]], rows[:, pooled.shape[1]:]
            finite &= pooled.isfinite().all() & spatial.isfinite().all()
            yield pooled, spatial
            bar.update(sum(map(len, together)))
        if not finite:
            raise UserError(f"{images.name}: features of {extractor.name} are not finite; its weights are damaged")


def _features(extractor: Extractor, images: torch.Tensor) -> Pair:
    """The features of images (B, 3, H, W): all at once on a GPU, in small pieces side by side on a CPU."""
    if extractor.device.type != "cpu":
        return extractor(images)
    with full_precision(extractor.device):                        # outside of the threads, which share its settings
        pieces = side_by_side(extractor, images.split(PIECE), extractor.device)
    return tuple(torch.cat(rows) for rows in zip(*pieces, strict=True))


def _gather(rows: torch.Tensor, blocks: list[range], batch_size: int) -> torch.Tensor:
    """All processes' rows, in the order of the blocks; padded to one shape for the exchange."""
    padded = rows.new_zeros(batch_size, rows.shape[1])
    padded[:len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[:len(block)] for part, block in zip(parts, blocks, strict=False)])


@dataclass(frozen=True)
class Measured:
    """What scores need of one set; None: not asked for, or computed from images by another process than this one."""

    pooled: torch.Tensor | None = None      # (N, F) float32
    gaussian: Pair | None = None            # mean (F,) and covariance (F, F) of the pooled features, float64
    spatial: Pair | None = None             # mean (S,) and covariance (S, S) of the spatial features, float64


def measure(images: ImageSet, extractor: Extractor, batch_size: int, need: set[str]) -> Measured:
    """The fields of `Measured` that `need` names: the file's own statistics if it has them, else from its images."""
    own = file_statistics(images, extractor)
    pairs = {} if own is None else {"gaussian": (own.mu, own.sigma), "spatial": (own.mu_s, own.sigma_s)}
    known = {name: tuple(torch.from_numpy(x).to(extractor.device) for x in pair)
             for name, pair in pairs.items() if name in need and pair[0] is not None}
    return Measured(**known, **_from_images(images, extractor, batch_size, need - known.keys()))


def _from_images(images: ImageSet, extractor: Extractor, batch_size: int, need: set[str]) -> dict:
    """The fields in `need` on the first process, {} on others."""
    if not need:
        return {}
    rank, _ = place()
    pooled, gaussian, spatial, done = None, None, None, 0
    for rows, spatial_rows in extract(images, extractor, batch_size):
        if rank != 0:
            continue
        if "pooled" in need:                                      # one array: many small ones would fragment the heap
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
        found = {"pooled": pooled, "gaussian": gaussian and gaussian.statistics(),
                 "spatial": spatial and spatial.statistics()}
    return {name: found[name] for name in need}


def file_statistics(images: ImageSet, extractor: Extractor) -> FileStatistics | None:
    """The file's statistics if they are of this extractor's features. Raises UserError if weights or widths differ."""
    own = images.statistics
    if own is None or own.about.get("distance", "fid") != extractor.key:
        return None
    if own.about.get("weights_sha256", extractor.weights_sha256) != extractor.weights_sha256:
        raise UserError(f"{images.name}: statistics of other {extractor.name} weights ({own.about['weights_sha256']}, "
                        f"now {extractor.weights_sha256}); use the same, or make the statistics again")
    widths = len(own.mu), extractor.widths[1] if own.mu_s is None else len(own.mu_s)
    if widths != extractor.widths:
        raise UserError(f"{images.name}: mu has {widths[0]} and mu_s {widths[1]} numbers, {extractor.name} gives "
                        f"{extractor.widths[0]} and {extractor.widths[1]}; make the statistics again")
    return own


@contextlib.contextmanager
def all_threads() -> Iterator[None]:
    """Let the first process use the threads of the others on its node, which wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads * (int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if place()[1] > 1 else 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
