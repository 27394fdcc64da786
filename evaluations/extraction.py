"""Features of a set of images in their order, from any number of processes, and what scores need of them.

Letters: n, N images, B batch, H W image size, F feature width, S spatial width.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
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


def extract(images: ImageSet, extractors: Sequence[Extractor], batch_size: int) -> Iterator[list[Pair]]:
    """Pooled (n, F) and spatial (n, S) features, float32, of all images in order, in pieces; the same on every process.

    An image is decoded once for all networks, which are on one device and have a pair each in every piece.
    Processes take blocks of `batch_size` consecutive images in turn, so that their number does not change a bit. Raises
    UserError after the last piece if a feature is not finite.
    """
    assert images.blocks is not None and images.count is not None
    (rank, world), device = place(), extractors[0].device
    every = blocks(images.count, batch_size)
    mine = images.blocks(every[rank::world])
    finite = torch.ones(len(extractors), dtype=torch.bool, device=device)  # read at the end: earlier, a GPU would wait
    # A process without a block in the last round runs the networks on a black image, to know the widths.
    idle = np.zeros((1, *(images.size or (64, 64)), 3), np.uint8)
    with tqdm(total=images.count, desc=images.name, unit="image", disable=None if rank == 0 else True) as bar:
        for first in range(0, len(every), world):
            together = every[first:first + world]
            pixels = torch.from_numpy(next(mine) if rank < len(together) else idle)       # (B, H, W, 3), bytes
            if device.type == "cuda":                             # copies from pinned memory overlap with computing
                pixels = pixels.pin_memory().to(device, non_blocking=True)
            pairs = [_features(extractor, pixels.permute(0, 3, 1, 2)) for extractor in extractors]
            if world > 1:
                parts = [part for pair in pairs for part in pair]
                rows = _gather(torch.cat(parts, dim=1), together, batch_size)
                parts = iter(rows.split([part.shape[1] for part in parts], dim=1))
                pairs = list(zip(parts, parts, strict=True))
            finite &= torch.stack([pooled.isfinite().all() & spatial.isfinite().all() for pooled, spatial in pairs])
            yield pairs
            bar.update(sum(map(len, together)))
        for extractor, good in zip(extractors, finite.tolist(), strict=True):
            if not good:
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
    """The fields of `Measured` that `need` names: what the file has of them, the rest from its images."""
    return measure_all(images, [(extractor, need)], batch_size)[extractor.key]


def measure_all(images: ImageSet, jobs: Sequence[tuple[Extractor, set[str]]], batch_size: int,
                rows: np.ndarray | None = None) -> dict[str, Measured]:
    """`measure` of each network, by its key, in one reading. `rows`: sorted numbers of images whose rows are kept."""
    known = {extractor.key: _from_file(images, extractor, need) for extractor, need in jobs}
    left = [(extractor, _Gathering(rest)) for extractor, need in jobs if (rest := need - known[extractor.key].keys())]
    rows, done = np.arange(images.count or 0) if rows is None else rows, 0
    for pairs in extract(images, [extractor for extractor, _ in left], batch_size) if left else ():
        if place()[0] == 0:
            end = done + len(pairs[0][0])
            kept = slice(*np.searchsorted(rows, (done, end)))
            for (_, gathering), pair in zip(left, pairs, strict=True):
                gathering.add(*pair, rows[kept] - done, kept, len(rows))
            done = end
    with full_precision(jobs[0][0].device), all_threads():
        found = {extractor.key: gathering.found() for extractor, gathering in left} if place()[0] == 0 else {}
    return {key: Measured(**fields, **found.get(key, {})) for key, fields in known.items()}


def _from_file(images: ImageSet, extractor: Extractor, need: set[str]) -> dict:
    """The fields in `need` that the file has, on the network's device."""
    own = file_statistics(images, extractor)
    if own is None:
        return {}
    arrays = {"gaussian": (own.mu, own.sigma), "spatial": (own.mu_s, own.sigma_s), "pooled": (own.pooled,)}
    found = {name: tuple(torch.from_numpy(x).to(extractor.device) for x in parts)
             for name, parts in arrays.items() if name in need and parts[0] is not None}
    return found | {name: found[name][0] for name in found.keys() & {"pooled"}}


class _Gathering:
    """What one network's features are gathered into, block by block: the fields in `need`."""

    def __init__(self, need: set[str]):
        self.need, self.parts = need, {}

    def add(self, pooled: torch.Tensor, spatial: torch.Tensor, chosen: np.ndarray, kept: slice, total: int) -> None:
        """Add features (n, F) and (n, S) of the next images, of which the `chosen` become rows `kept` of `total`."""
        for name, features in (("gaussian", pooled), ("spatial", spatial)):
            if name in self.need:
                self.parts[name] = self.parts.get(name) or Gaussian(features.shape[1], features.device)
                self.parts[name].add(features)
        if "pooled" in self.need:                                 # one array: many small ones would fragment the heap
            if "pooled" not in self.parts:
                self.parts["pooled"] = torch.empty(total, pooled.shape[1], device=pooled.device)
            self.parts["pooled"][kept] = pooled if len(chosen) == len(pooled) else pooled[chosen]

    def found(self) -> dict:
        """The fields of `Measured`."""
        return {name: part.statistics() if name != "pooled" else part for name, part in self.parts.items()}


def file_statistics(images: ImageSet, extractor: Extractor) -> FileStatistics | None:
    """The file's statistics of this extractor's features, or None. Raises UserError if weights or widths differ."""
    every = (images.statistics, *images.more) if images.statistics else images.more
    own = next((one for one in every if one.about.get("distance", "fid") == extractor.key), None)
    if own is None:
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
