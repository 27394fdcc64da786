"""Scores as pure functions of features, equal to ADM's evaluator (arXiv 2105.05233, released code) where it has them.

Features are tensors or numpy arrays; a tensor is processed on its device, CPU or GPU.
Letters: N samples, M reference images, F features.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from tqdm import tqdm

from runtime.speed import full_precision

CHUNK = 8192        # rows centred at a time: bounds the float64 copy to 128 MiB at F = 2048
STRIP = 256         # columns of it, or rows of a block of distances, that one thread multiplies
SPLIT = 5000        # images per split of the Inception Score
BLOCK = 10_000      # ADM's block of distances: one that overflows float16 is computed in float32 as a whole
NEIGHBOURS = 3      # k of precision and recall
SUBSETS, SUBSET = 100, 1000  # of the kernel distance
DIRECTIONS, MIND_SEED = 1000, 2020  # of the Monge distance, as torch-fidelity's


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch use one thread inside: the number of threads of a CPU would change the last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def side_by_side(function: Callable, pieces: Iterable, device: torch.device) -> list:
    """`function` of each piece, in order; on a CPU in threads of one core each, whose number does not change a bit."""
    if device.type != "cpu":
        return [function(piece) for piece in pieces]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool, one_thread():
        return list(pool.map(function, pieces))


# ---- Frechet distance ------------------------------------------------------------------------------------------------

class Gaussian:
    """Mean and covariance of rows added in pieces, float64. The cut into pieces does not change a bit."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.count, self.filled = 0, 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.waiting = torch.empty(CHUNK, width, dtype=torch.float64, device=device)      # the first `filled` are used

    def add(self, rows: torch.Tensor) -> None:
        """Add rows (n, F)."""
        while len(rows):
            taken = rows[:CHUNK - self.filled]
            self.waiting[self.filled:self.filled + len(taken)] = taken
            self.filled += len(taken)
            rows = rows[len(taken):]
            if self.filled == CHUNK:
                self._merge()

    def _merge(self) -> None:
        """Chan et al. 1983: means and scatter matrices of two sets give those of their union, without cancellation."""
        rows, total = self.waiting[:self.filled], self.count + self.filled        # (n, F)
        with one_thread():
            mean = rows.mean(dim=0)                                               # (F,)
        centred, gap = rows - mean, mean - self.mean
        strips = side_by_side(lambda strip: strip.T @ centred, centred.split(STRIP, dim=1), rows.device)
        self.scatter += torch.cat(strips) + torch.outer(gap, gap) * (self.count * len(rows) / total)
        self.mean += gap * (len(rows) / total)
        self.count, self.filled = total, 0

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean (F,) and covariance (F, F), divided by N - 1, of all rows added; at least 2."""
        if self.filled:
            self._merge()
        assert self.count >= 2, f"a covariance needs at least 2 rows, not {self.count}"
        return self.mean, self.scatter / (self.count - 1)


def gaussian_statistics(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (F,) and covariance (F, F) of features (N, F), both float64, the covariance divided by N - 1."""
    features = torch.as_tensor(features)
    gaussian = Gaussian(features.shape[1], features.device)
    gaussian.add(features)
    return gaussian.statistics()


def frechet_distance(mu1: torch.Tensor, sigma1: torch.Tensor, mu2: torch.Tensor, sigma2: torch.Tensor) -> float:
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2) of two Gaussians (Heusel et al. 2017, eq. 6), float64.

    With S1 = R R^T, tr sqrt(S1 S2) is the sum of the roots of the eigenvalues of R^T S2 R, which is symmetric: no
    complex numbers, and singular covariances are allowed. Rounding errors are about 1e-12 of the traces (1e-8 if both
    covariances are singular), so the distance of a set to itself can be slightly negative; it is not clipped.
    """
    # On the CPU also for a GPU's tensors: LAPACK's eigenvalues.
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a).double().cpu() for a in (mu1, sigma1, mu2, sigma2))
    with one_thread():
        values, vectors = torch.linalg.eigh(sigma1)
        root = vectors * values.clamp(min=0).sqrt()                               # (F, F), R
        overlap = torch.linalg.eigvalsh(root.T @ sigma2 @ root).clamp(min=0).sqrt().sum()
        return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * overlap)


# ---- Inception Score -------------------------------------------------------------------------------------------------

def inception_score(logits: torch.Tensor) -> float:
    """exp E_x KL(p(y|x) || p(y)) (Salimans et al. 2016) of logits (N, 1008), ADM's without the classifier's bias.

    The mean over slices of 5000 images in the given order; a shorter last slice counts fully. Images sorted by class
    collapse it.
    """
    scores = []
    with one_thread():
        for part in torch.as_tensor(logits).split(SPLIT):
            log_p = part.double().log_softmax(dim=1)                              # (n, 1008), p(y|x)
            log_mean = log_p.logsumexp(dim=0) - np.log(len(part))                 # (1008,), p(y)
            scores.append((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp())
        return float(torch.stack(scores).mean())


# ---- precision and recall --------------------------------------------------------------------------------------------

def precision_recall(reference: torch.Tensor, samples: torch.Tensor, mode: str = "adm") -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of reference (M, F) and samples (N, F), 3 neighbours.

    Precision: share of samples within the third-neighbour distance of a reference image. Recall: the same with the
    roles exchanged. `mode` "adm" computes distances in float16 as ADM does, coarse enough that ties raise both in the
    third decimal; "exact" in float32. Needs more than 3 rows each.
    """
    assert mode in ("adm", "exact") and min(len(reference), len(samples)) > NEIGHBOURS
    reference, samples = torch.as_tensor(reference), torch.as_tensor(samples)
    with full_precision(reference.device), _blocks_bar(len(reference), len(samples)) as bar:
        reference_radii, sample_radii = (_radii(features, mode, bar) for features in (reference, samples))
        precise = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
        recalled = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
        for rows in _blocks(reference):
            for columns in _blocks(samples):
                near = _distances(reference[rows], samples[columns], mode)        # (m, n)
                precise[columns] |= (near <= reference_radii[rows, None]).any(dim=0)
                recalled[rows] |= (near <= sample_radii[columns]).any(dim=1)
                bar.update()
    return float(precise.double().mean()), float(recalled.double().mean())


def _blocks(features: torch.Tensor) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, len(features), BLOCK)]


def _blocks_bar(m: int, n: int) -> tqdm:
    m, n = -(-m // BLOCK), -(-n // BLOCK)
    return tqdm(total=m * m + n * n + m * n, desc="precision and recall", unit="block", disable=None)


def _radii(features: torch.Tensor, mode: str, bar: tqdm) -> torch.Tensor:
    """Squared distance (N,) of each row to its third neighbour: the fourth smallest, as the row itself is the first."""
    radii = []
    for rows in _blocks(features):
        nearest = features.new_empty(len(features[rows]), 0)                      # (m, up to 4)
        for columns in _blocks(features):
            near = _distances(features[rows], features[columns], mode)            # (m, n)
            near = near.topk(min(NEIGHBOURS + 1, near.shape[1]), dim=1, largest=False).values
            nearest = torch.cat([nearest, near], dim=1).sort(dim=1).values[:, :NEIGHBOURS + 1]
            bar.update()
        radii.append(nearest[:, NEIGHBOURS])
    return torch.cat(radii)


def _distances(u: torch.Tensor, v: torch.Tensor, mode: str) -> torch.Tensor:
    """max(|u|^2 - 2 u.v + |v|^2, 0) of u (m, F) and v (n, F) -> (m, n), float32.

    In mode "adm" each quantity is rounded to float16 (products are summed in float32), unless one in the block
    overflows.
    """
    if mode == "adm":
        distances, finite = _expansion(u.half(), v.half())
        if finite:
            return distances
    return _expansion(u.float(), v.float())[0]


def _expansion(u: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The expansion, every result rounded to the dtype of u and v, a few rows at a time; and whether it is finite."""
    with one_thread():                                                            # (m,), (n,)
        uu, vv = (x.square().sum(dim=1, dtype=torch.float32).to(x.dtype) for x in (u, v))
    out, columns = torch.empty(len(u), len(v), device=u.device), v.float().T      # (m, n), (F, n)

    def fill(here: slice) -> torch.Tensor:
        uv = (u[here].float() @ columns).to(u.dtype)
        out[here] = distances = ((uu[here, None] - 2 * uv) + vv).clamp(min=0)
        return distances.isfinite().all()

    finite = side_by_side(fill, [slice(start, start + STRIP) for start in range(0, len(u), STRIP)], u.device)
    return out, bool(torch.stack(finite).all())


# ---- kernel distance -------------------------------------------------------------------------------------------------

def kernel_distance(reference: torch.Tensor, samples: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """KID (Binkowski et al. 2018): unbiased squared MMD, kernel (x.y / F + 1)^3, of reference (M, F), samples (N, F).

    Mean and standard deviation over 100 subsets of 1000 rows (all rows if there are fewer), drawn with `seed`; float64.
    """
    reference, samples, rng = torch.as_tensor(reference), torch.as_tensor(samples), np.random.default_rng(seed)
    size = min(SUBSET, len(reference), len(samples))
    subsets = [[torch.from_numpy(rng.choice(len(rows), size, replace=False)) for rows in (samples, reference)]
               for _ in range(SUBSETS)]

    def estimate(subset: list[torch.Tensor]) -> torch.Tensor:
        x, y = (rows[chosen.to(rows.device)].double()                             # (size, F)
                for rows, chosen in zip((samples, reference), subset, strict=True))
        xx, yy, xy = (((a @ b.T) / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))     # (size, size) each
        within = sum((k.sum() - k.trace()) / (size * (size - 1)) for k in (xx, yy))
        return within - 2 * xy.mean()

    values = torch.stack(side_by_side(estimate, subsets, samples.device))
    return float(values.mean()), float(values.std(correction=0))


# ---- Monge distance --------------------------------------------------------------------------------------------------

def monge_distance(reference: torch.Tensor, samples: torch.Tensor) -> float:
    """MIND (arXiv 2605.06797): 3 F times the mean squared distance of sorted projections on 1000 random directions.

    Of the larger of reference (M, F) and samples (N, F) as many random rows are used as the other has.
    """
    generator, size = torch.Generator().manual_seed(MIND_SEED), min(len(reference), len(samples))     # a CPU's
    sets = [rows if len(rows) == size else rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)]
            for rows in map(torch.as_tensor, (samples, reference))]               # (size, F) each
    directions = torch.randn(DIRECTIONS, sets[0].shape[1], generator=generator)   # (1000, F)
    directions = (directions / directions.norm(dim=1, keepdim=True)).to(sets[0].device)

    def squared(some: torch.Tensor) -> torch.Tensor:              # a few directions at a time bound the memory
        x, y = ((rows.float() @ some.T).sort(dim=0).values.double() for rows in sets)    # (size, 50) each
        return (x - y).square().mean()

    with full_precision(sets[0].device):
        found = side_by_side(squared, directions.split(50), sets[0].device)
    return 3 * directions.shape[1] * float(torch.stack(found).mean())
