"""How long a set of samples takes to be scored in all five metrics: as a whole, and stage by stage.

    python -m benchmarks.scoring [--baseline] [--profile DIR]

Inception has random weights, which cost what others cost. The stages behind the features work on random rows of as many as are asked
for, so that they can be timed at full size where features cannot. The plain ways: one image at a time through the network; all rows in
one covariance; the eigenvalues of the product of both, which has no symmetry; all distances in one matrix of float32.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.harness import Row, matmul_peak, open_device, parser, profile, ratio, report, timed
from evaluations.extraction import extract
from evaluations.features import Extractor
from evaluations.images import open_images, write_npz
from evaluations.inception import Inception
from evaluations.metrics import (
    NEIGHBOURS,
    SPLIT,
    frechet_distance,
    gaussian_statistics,
    inception_score,
    precision_recall,
    side_by_side,
)
from evaluations.scoring import evaluate
from runtime.messages import UserError, without_traceback
from runtime.speed import full_precision

GOAL = 50_000, 10_000             # samples and reference images of the published scores
SIZES = {"cuda": {"samples": GOAL[0], "references": GOAL[1], "rows": GOAL, "stage": 2048, "batch_size": 64},
         "cpu": {"samples": 48, "references": 24, "rows": (2000, 500), "stage": 24, "batch_size": 16}}
BLOCK = 512                       # images that are drawn; a set repeats them
CLASSES = 1008


def random_inception(device: torch.device) -> Extractor:
    """With weights that neither kill the signal nor let it grow over 94 units."""
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    if device.type == "cpu":
        network = network.to(memory_format=torch.channels_last)   # as load_extractor does
    return Extractor(network.to(device).eval().requires_grad_(False), device, "inception", "random", None)


def image_flops() -> int:
    """Of Inception on one image, counted on tensors without numbers."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network, image = Inception().eval(), torch.empty(1, 3, 256, 256, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    return counter.get_total_flops()


def draw(count: int, size: int) -> Iterator[np.ndarray]:
    """Blocks uint8 (n, size, size, 3) of noise, `count` images together."""
    images = np.random.default_rng(0).integers(0, 256, (min(count, BLOCK), size, size, 3), dtype=np.uint8)
    for start in range(0, count, BLOCK):
        yield images[:count - start]


class Bench:
    """Stages and their plain ways, timed as the flags say."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device, self.rows = args, device, []
        self.seconds = {}                                         # median of each stage, for the extrapolation

    def add(self, name: str, ways: dict, count: int | None, ideal: float | None, formula: str, warmup: int = 1, repeats: int | None = None):
        """Time `ours`, and `plain` where it is asked for and there; as images/s of `count` images, or as seconds. `ideal` in the same."""
        ways = {way: run for way, run in ways.items() if way == "ours" or self.args.baseline}
        taken = timed(ways, self.device, min(warmup, self.args.warmup), repeats or self.args.repeats)
        middle = {way: median(seconds) for way, seconds in taken.items()}
        self.seconds[name] = middle["ours"]
        said = middle if count is None else {way: count / seconds for way, seconds in middle.items()}
        self.rows.append(Row(name, said["ours"], "s" if count is None else "images/s", ideal, formula, said.get("plain"),
                             ratio(taken["ours"], taken["plain"]) if "plain" in taken else None))


# --------------------------------------------------------------------------------------------------------------------------- stages

def reading(bench: Bench, file: Path) -> None:
    """Blocks of an npz file, which the system has in memory."""
    images, size = open_images(file), bench.args.batch_size
    blocks = [range(start, min(start + size, images.count)) for start in range(0, images.count, size)]
    buffer = bytearray(size * 3 * bench.args.size**2)

    def ours() -> None:
        for _ in images.blocks(iter(blocks)):
            pass

    def bytes_alone() -> None:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass

    ideal = images.count / median(timed({"": bytes_alone}, torch.device("cpu"), 1, bench.args.repeats)[""])
    bench.add("reading npz", {"ours": ours}, images.count, ideal, "the file's bytes into one buffer")


def features(bench: Bench, extractor: Extractor, peak: float, source: str) -> None:
    """Images in memory -> features, on the device."""
    pixels = np.concatenate(list(draw(bench.args.stage, bench.args.size)))
    images, flops = open_images(pixels), image_flops()

    def ours() -> None:
        for _ in extract(images, extractor, bench.args.batch_size):
            pass

    def plain() -> None:
        with full_precision(bench.device), torch.inference_mode():
            for image in pixels:
                for part in extractor.network(torch.from_numpy(image).permute(2, 0, 1)[None].to(bench.device)):
                    part.cpu()

    bench.add("features", {"ours": ours, "plain": plain}, len(pixels), peak / flops, f"{source} / {flops / 1e9:.4g} GFLOP an image")
    profile(ours, bench.args.profile, bench.device)


def statistics(bench: Bench, rows: list[torch.Tensor]) -> None:
    """Covariances of pooled and spatial features, of samples and references, in float64."""
    spatial = [part[:, :Inception.spatial] for part in rows]
    peak, source = matmul_peak(bench.device, torch.float64)
    flops = 2 * sum(map(len, rows)) * (Inception.pooled**2 + Inception.spatial**2)
    every = [*rows, *spatial]
    ways = {"ours": lambda: [gaussian_statistics(part) for part in every],
            "plain": lambda: [torch.cov(part.double().T) for part in every]}
    bench.add("covariances", ways, None, flops / peak, f"2 (N + M) (F^2 + S^2) / {source}")


def frechet(bench: Bench) -> None:
    """FID and sFID of full covariances; on the CPU, whatever the device."""
    generator = torch.Generator().manual_seed(0)
    pairs = [[gaussian_statistics(torch.randn(3 * width // 2, width, generator=generator)) for _ in range(2)]
             for width in (Inception.pooled, Inception.spatial)]
    peak, source = matmul_peak(torch.device("cpu"), torch.float64)
    flops = sum(26 / 3 * len(a[0]) ** 3 for a, _ in pairs)

    def plain() -> None:
        for (_, a), (_, b) in pairs:
            np.sqrt(np.linalg.eigvals(a.numpy() @ b.numpy()).astype(complex)).sum()

    ways = {"ours": lambda: side_by_side(lambda pair: frechet_distance(*pair[0], *pair[1]), pairs, torch.device("cpu")), "plain": plain}
    bench.add("Frechet distances", ways, None, flops / peak,
              f"(4/3 + 4/3 + 2 + 4) (F^3 + S^3) / {source}: two tridiagonal forms, one's vectors, two products", warmup=0)


def score(bench: Bench, rows: torch.Tensor, peak: float, source: str) -> None:
    """The Inception Score of pooled features."""
    weight = torch.randn(CLASSES, Inception.pooled, device=bench.device) / 10

    def ours() -> float:
        with full_precision(bench.device):
            return inception_score(torch.cat(side_by_side(lambda part: part @ weight.T, rows.split(512), bench.device)))

    def plain() -> float:
        scores = []
        for part in rows.split(SPLIT):
            p = (part @ weight.T).double().softmax(dim=1)
            scores.append(float((p * (p.log() - p.mean(dim=0).log())).sum(dim=1).mean().exp()))
        return sum(scores) / len(scores)

    bench.add("Inception Score", {"ours": ours, "plain": plain}, None, 2 * len(rows) * CLASSES * Inception.pooled / peak,
              f"2 N F {CLASSES} / {source}")


def neighbours(bench: Bench, samples: torch.Tensor, reference: torch.Tensor, peak: float, source: str) -> None:
    """Precision and recall, as ADM rounds; the plain way does not round."""

    def distances(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return u.square().sum(dim=1)[:, None] - 2 * u @ v.T + v.square().sum(dim=1)

    def plain() -> tuple[float, float]:
        with full_precision(bench.device):
            radii = [distances(x, x).topk(NEIGHBOURS + 1, dim=1, largest=False).values[:, -1] for x in (reference, samples)]
            between = distances(reference, samples)
            inside = (between <= radii[0][:, None]).any(dim=0), (between <= radii[1]).any(dim=1)
            return tuple(float(which.double().mean()) for which in inside)

    bench.add("precision, recall", {"ours": lambda: precision_recall(reference, samples), "plain": plain}, None,
              2 * Inception.pooled * pairs(len(samples), len(reference)) / peak, f"2 F (N^2 + M^2 + N M) / {source}")


def pairs(samples: int, references: int) -> int:
    return samples**2 + references**2 + samples * references


def whole(bench: Bench, extractor: Extractor, ref: Path, sample: Path) -> None:
    """`evaluate`, its ideal the sum of the stages' that follow one another."""
    counts, full = [bench.args.samples, bench.args.references], dict(zip((row.name for row in bench.rows), bench.rows, strict=True))
    rows = bench.args.rows
    ideal = (sum(counts) / full["features"].ideal + full["covariances"].ideal * sum(counts) / sum(rows) + full["Frechet distances"].ideal
             + full["Inception Score"].ideal * counts[0] / rows[0] + full["precision, recall"].ideal * pairs(*counts) / pairs(*rows))
    bench.add(f"all five metrics, {counts[0]} + {counts[1]} images", {"ours": lambda: evaluate(ref, sample, extractor,
              batch_size=bench.args.batch_size)}, None, ideal, "the sum of the ideals above but reading, at these counts", warmup=0)


def extrapolated(bench: Bench) -> float:
    """Seconds for GOAL as the stages' times suggest; reading runs beside the network."""
    seconds, rows = bench.seconds, bench.args.rows
    rate = min(row.measured for row in bench.rows if row.unit == "images/s")
    return (sum(GOAL) / rate + seconds["covariances"] * sum(GOAL) / sum(rows) + seconds["Frechet distances"]
            + seconds["Inception Score"] * GOAL[0] / rows[0] + seconds["precision, recall"] * pairs(*GOAL) / pairs(*rows))


# ----------------------------------------------------------------------------------------------------------------------------- main

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    flags = parser(__doc__.partition("\n")[0], repeats=1)         # whose longest stages take a minute
    flags.add_argument("--samples", type=int, metavar="N", help="samples scored as a whole; None: 50000 on a GPU, 48 on a CPU")
    flags.add_argument("--references", type=int, metavar="N", help="reference images; None: 10000 on a GPU, 24 on a CPU")
    flags.add_argument("--rows", type=int, nargs=2, metavar=("N", "M"),
                       help="random features, of samples and references, behind the network; None: 50000 10000, or 2000 500")
    flags.add_argument("--stage", type=int, metavar="N", help="images of the stage of features; None: 2048, or 24")
    flags.add_argument("--batch-size", type=int, metavar="N", help="images in the network at a time; None: 64, or 16")
    flags.add_argument("--size", type=int, default=256, metavar="N", help="of the images, in pixels")
    return flags.parse_args(argv)


@without_traceback
def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    device = open_device(args)
    for name, value in SIZES[device.type].items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if min(args.samples, args.references, *args.rows) <= NEIGHBOURS or min(args.stage, args.batch_size, args.size) < 2:
        raise UserError(f"--samples {args.samples}, --references {args.references} and --rows {args.rows} need at least {NEIGHBOURS + 1}, "
                        f"--stage {args.stage}, --batch-size {args.batch_size} and --size {args.size} at least 2: give more")
    bench, extractor = Bench(args, device), random_inception(device)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(count, Inception.pooled, generator=generator).abs().to(device) / 2 for count in args.rows]
    with tempfile.TemporaryDirectory() as folder, full_precision(device):
        files = {}
        for name, count in (("sample", args.samples), ("ref", args.references)):
            files[name] = Path(folder, f"{name}.npz")
            write_npz(files[name], draw(count, args.size), count, (args.size, args.size))
        peak, source = matmul_peak(device, torch.float32)
        reading(bench, files["sample"])
        features(bench, extractor, peak, source)
        statistics(bench, rows)
        frechet(bench)
        score(bench, rows[0], peak, source)
        neighbours(bench, *rows, peak, source)
        whole(bench, extractor, files["ref"], files["sample"])
    return report("scoring", bench.rows, {"batch size": args.batch_size, "size": args.size, "rows": " + ".join(map(str, args.rows)),
                                          f"seconds extrapolated to {GOAL[0]} + {GOAL[1]} images": round(extrapolated(bench))},
                  device, args.output)


if __name__ == "__main__":
    main()
