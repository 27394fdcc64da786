"""`stats-latents`: mean and std of the raw latents of each channel, measured over encoded moments."""

from functools import partial
from pathlib import Path

import numpy as np

from dataset import MOMENTS_EXTENSIONS, read_moments
from preprocessing.destination import in_workers
from runtime.catalogue import list_keyed
from runtime.launch import blocks
from runtime.messages import UserError, say
from runtime.npz import write_npz
from runtime.stores import Store, open_store, shown

CHUNK = 64  # files that a worker reads at a time


def _sums(store: Store, names: np.ndarray, shape: tuple[int, int, int], chunk: range) -> np.ndarray:
    """Sums over images and positions of E[x] and E[x^2] under the posteriors: (2, C) float64."""
    found = np.zeros((2, shape[0] // 2))
    for name in names[chunk.start:chunk.stop]:
        mean, std = np.split(read_moments(store, name, shape).astype(np.float64), 2)      # (C, H, W) each
        found += mean.sum((1, 2)), (mean**2 + std**2).sum((1, 2))
    return found


def stats_latents(source: str, output: str, workers: int) -> None:
    """Write `output`, an npz with mean and std (C,) float64 of latents drawn from the moments in `source`.

    Raises UserError for unreadable moments, and if a std is not above 0.
    """
    path, store = Path(output), open_store(source)
    if path.suffix != ".npz" or not path.parent.is_dir():
        raise UserError(f"--output {shown(output)}: not the name of an .npz in a folder that exists")
    _, names = list_keyed(store, MOMENTS_EXTENSIONS)
    if not len(names):
        raise UserError(f"--source {shown(source)}: holds no moments; expected those that `encode` writes")
    shape = read_moments(store, names[0]).shape
    chunks = in_workers(partial(_sums, store, names, shape), blocks(len(names), CHUNK), workers)
    mean, square = sum(chunks) / (len(names) * shape[1] * shape[2])               # (C,) each
    std = np.sqrt(np.maximum(square - mean**2, 0))
    if not (np.isfinite(mean).all() and std.min() > 0):
        raise UserError(f"--source {shown(source)}: a channel is constant or not finite; see what `check` finds")
    write_npz(path, (), 0, (0, 0), mean=mean, std=std)
    say(f"{shown(output)}: mean {mean.min():.4g} to {mean.max():.4g}, std {std.min():.4g} to {std.max():.4g} over "
        f"{len(std)} channels of {len(names)} images; give it to encode --latent-stats")
