"""How long scoring takes, stage by stage and as a whole: `--only scoring`.

Inception has random weights. The stages behind it work on random features, so that they can be timed at full size where
Inception cannot. The plain ways: one image at a time; one covariance of all rows; eigenvalues of the
unsymmetric product; all distances in one float32 matrix.
"""

from functools import partial
from statistics import median

import numpy as np
import torch

from benchmarks import harness
from evaluations.extraction import extract
from evaluations.features import Extractor, Inception
from evaluations.images import open_images
from evaluations.metrics import NEIGHBOURS, frechet_distance, gaussian_statistics, precision_recall
from evaluations.scoring import evaluate
from runtime.speed import full_precision

SIZES = {"cuda": {"images": 2048, "rows": 50_000, "batch_size": 64},
         "cpu": {"images": 24, "rows": 2000, "batch_size": 16}}


def random_inception(device: torch.device) -> Extractor:
    """Inception with weights that keep the size of the signal over its 94 units."""
    torch.manual_seed(0)
    inception = Inception()
    for module in inception.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    if device.type == "cpu":
        inception = inception.to(memory_format=torch.channels_last)               # as load_extractor does
    inception = inception.to(device).eval().requires_grad_(False)
    return Extractor(inception, device, "inception", "random", None, inception.network.fc.weight)


def one_by_one(extractor: Extractor, images: np.ndarray) -> None:
    for image in torch.from_numpy(images).permute(0, 3, 1, 2).split(1):
        for features in extractor(image):
            features.cpu()


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(*gaussian_statistics(a), *gaussian_statistics(b))


def plain_frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    (mu1, sigma1), (mu2, sigma2) = ((rows.double().mean(dim=0), torch.cov(rows.double().T)) for rows in (a, b))
    roots = np.sqrt(np.linalg.eigvals((sigma1 @ sigma2).cpu().numpy()).astype(complex)).real.sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace()) - 2 * roots


def plain_precision_recall(reference: torch.Tensor, samples: torch.Tensor) -> tuple[float, float]:
    def distances(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return u.square().sum(dim=1)[:, None] - 2 * u @ v.T + v.square().sum(dim=1)

    radii = [distances(x, x).kthvalue(NEIGHBOURS + 1, dim=1).values for x in (reference, samples)]
    between = distances(reference, samples)                                       # (M, N)
    inside = (between <= radii[0][:, None]).any(dim=0), (between <= radii[1]).any(dim=1)
    return inside[0].double().mean().item(), inside[1].double().mean().item()


def measure(device: torch.device, images: int, rows: int, batch_size: int, resolution: int = 256,
            repeats: int = 1) -> harness.Table:
    """The table: `images` through Inception, `rows` random features of samples, a fifth of them of a reference."""
    settings = {"images": images, "rows": rows, "batch_size": batch_size, "resolution": resolution}
    table, extractor = harness.Table("scoring", settings, device), random_inception(device)
    pixels = np.random.default_rng(0).integers(0, 256, (images, resolution, resolution, 3), dtype=np.uint8)
    n, m, width = rows, max(rows // 5, NEIGHBOURS + 1), extractor.widths[0]
    generator = torch.Generator().manual_seed(0)
    samples, reference = (torch.randn(count, width, generator=generator).abs().to(device) for count in (n, m))
    timed = partial(harness.timed, device=device, repeats=repeats, warmup=1)
    with full_precision(device):
        peak, source = harness.matmul_peak(device, torch.float32)
        each = harness.flops(lambda: extractor(torch.from_numpy(pixels[:1]).permute(0, 3, 1, 2)))
        seconds = timed({"ours": lambda: list(extract(open_images(pixels), [extractor], batch_size)),
                         "plain": lambda: one_by_one(extractor, pixels)})
        total = median(seconds["ours"]) * (n + m) / images
        table.add("features", seconds, images, "images/s", peak / each, f"{source} / {each / 1e9:.4g} GFLOP")
        seconds = timed({"ours": lambda: precision_recall(reference, samples),
                         "plain": lambda: plain_precision_recall(reference, samples)})
        total += median(seconds["ours"])
        table.add("precision, recall", seconds, ideal=2 * width * (n * n + m * m + n * m) / peak,
                  formula=f"2 F (N^2 + M^2 + N M) / {source}")
        peak, source = harness.matmul_peak(torch.device("cpu"), torch.float64)
        pair = samples, reference
        seconds = timed({"ours": lambda: frechet(*pair), "plain": lambda: plain_frechet(*pair)})
        table.add("covariances, Frechet distance", seconds, ideal=(2 * (n + m) * width**2 + 26 / 3 * width**3) / peak,
                  formula=f"(2 (N + M) F^2 + 26/3 F^3) / {source}")
        total += 2 * median(seconds["ours"])                      # sFID's features are as wide as FID's
        table.add(f"all five metrics, {n} + {m} images, extrapolated", {"ours": [total]}, formula="sum of these stages")
        seconds = timed({"ours": lambda: evaluate(pixels, pixels[::-1].copy(), extractor, batch_size=batch_size)})
        table.add(f"all five metrics, {images} + {images} images", seconds)
    return table
