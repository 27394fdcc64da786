"""Scores as functions of features: closed forms, literal sums, and an imitation of ADM's float16 distances."""

import numpy as np
import pytest
import torch

from evaluations import metrics
from evaluations.metrics import (
    Gaussian,
    frechet_distance,
    gaussian_statistics,
    inception_score,
    kernel_distance,
    monge_distance,
    precision_recall,
)
from runtime.speed import float32_arithmetic, full_precision
from tests.conftest import tf32_and_autocast


def random_covariance(size, rank=None, seed=0):
    factor = np.random.default_rng(seed).normal(size=(size, rank or size))
    return factor @ factor.T


# ---- Frechet distance ------------------------------------------------------------------------------------------------

def test_gaussian_statistics_are_numpys_in_float64_over_several_chunks():
    """Far from the origin, where sums of squares that are not centred lose all digits of float32, eight of float64."""
    rows = (np.random.default_rng(0).normal(size=(20_000, 5)) + 1e4 * np.arange(5)).astype(np.float32)
    assert len(rows) > 2 * metrics.CHUNK
    mu, sigma = gaussian_statistics(rows)
    assert mu.dtype == sigma.dtype == torch.float64
    np.testing.assert_allclose(mu, rows.astype(np.float64).mean(axis=0), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(sigma, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-10)
    few = np.random.default_rng(0).normal(size=(5, 2))
    np.testing.assert_allclose(gaussian_statistics(few)[1], np.cov(few, rowvar=False, ddof=1), rtol=1e-12)


def test_pieces_do_not_change_a_bit():
    count = 2 * metrics.CHUNK + 100
    rows = torch.randn(count, 5, generator=torch.Generator().manual_seed(0))
    found = []
    for pieces in ([count], [metrics.CHUNK, metrics.CHUNK, 100], [3, 0, 9000, 1, count - 9004], [50] * 329 + [34]):
        gaussian = Gaussian(5)
        for piece in rows.split(pieces):
            gaussian.add(piece)
        found.append(gaussian.statistics())
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_frechet_distance_of_diagonal_gaussians():
    mu1, mu2 = np.array([1.0, 2.0, 3.0]), np.array([0.0, 4.0, 3.0])
    s1, s2 = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.0])                # standard deviations
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((s1 - s2) ** 2)
    assert frechet_distance(mu1, np.diag(s1**2), mu2, np.diag(s2**2)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [None, 5])
def test_frechet_distance_equals_the_eigenvalues_of_the_product(rank):
    a, b = random_covariance(30, rank, seed=1), random_covariance(30, rank, seed=2)
    root = np.sqrt(np.maximum(np.linalg.eigvals(a @ b).real, 0)).sum()
    expected = 30 * 4.0 + np.trace(a) + np.trace(b) - 2 * root
    expected = pytest.approx(expected, rel=1e-9 if rank is None else 1e-6)
    assert frechet_distance(np.zeros(30), a, np.full(30, 2.0), b) == expected
    assert frechet_distance(np.full(30, 2.0), b, np.zeros(30), a) == expected


@pytest.mark.parametrize("rank", [None, 5])
def test_frechet_distance_to_itself_is_zero(rank):
    sigma, mu = random_covariance(40, rank), np.arange(40.0)
    assert abs(frechet_distance(mu, sigma, mu, sigma)) < (1e-10 if rank is None else 1e-5) * np.trace(sigma)


# ---- Inception Score -------------------------------------------------------------------------------------------------

def certain(labels, classes):
    """Logits (N, classes) of a network that is certain: other classes' probabilities are 0 in float32."""
    return 1000 * torch.nn.functional.one_hot(torch.as_tensor(labels), classes).float()


def test_inception_score_is_1_for_equal_images_and_the_number_of_classes_for_certain_ones():
    assert inception_score(torch.zeros(50, 1008)) == pytest.approx(1, rel=1e-12)
    assert inception_score(torch.randn(1, 1008).expand(50, -1)) == pytest.approx(1, rel=1e-6)
    assert inception_score(certain(np.arange(50) % 10, 1008)) == pytest.approx(10, rel=1e-12)     # not nan
    entropy = -0.75 * np.log(0.75) - 0.25 * np.log(0.25)
    assert inception_score(certain([0] * 30 + [1] * 10, 1008)) == pytest.approx(np.exp(entropy))


def test_inception_score_is_the_literal_sum():
    logits = torch.randn(60, 1008, generator=torch.Generator().manual_seed(0)) * 3
    p = np.exp(logits.double().numpy())
    p /= p.sum(axis=1, keepdims=True)
    expected = np.exp(np.mean((p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1)))
    assert inception_score(logits) == pytest.approx(expected, rel=1e-9) and expected > 2


def test_inception_score_is_the_mean_of_slices_of_5000_in_order_and_a_short_last_one_counts_fully():
    """10 classes in the first 5000, 4 in the last 1200."""
    logits = torch.cat([certain(np.arange(5000) % 10, 12), certain(np.arange(1200) % 4, 12)])
    assert inception_score(logits) == pytest.approx((10 + 4) / 2, rel=1e-12)
    mixed = logits[torch.randperm(6200, generator=torch.Generator().manual_seed(0))]
    assert inception_score(mixed) > 8                                             # all ten classes in both slices


# ---- precision and recall --------------------------------------------------------------------------------------------

def exact_distances(u, v):
    return ((u[:, None].astype(np.float64) - v[None].astype(np.float64)) ** 2).sum(axis=2)


def float16_distances(u, v):
    """ADM's formula with every quantity rounded to float16; sums of products are float32's."""
    u, v = u.astype(np.float16), v.astype(np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        uu, vv = ((x * x).astype(np.float32).sum(axis=1).astype(np.float16) for x in (u, v))
        uv = (u.astype(np.float32) @ v.astype(np.float32).T).astype(np.float16)
        difference = uu[:, None] - np.float16(2) * uv
        assert difference.dtype == np.float16
        return np.maximum(difference + vv, np.float16(0))


def blockwise_distances(block):
    """As ADM: a block with anything that is not finite is computed in float32."""
    def distances(u, v):
        out = np.empty((len(u), len(v)))
        for i in range(0, len(u), block):
            for j in range(0, len(v), block):
                rough = float16_distances(u[i:i + block], v[j:j + block])
                exact = exact_distances(u[i:i + block], v[j:j + block]).astype(np.float32)
                out[i:i + block, j:j + block] = rough if np.isfinite(rough).all() else exact
        return out

    return distances


def brute_force(reference, samples, distances=exact_distances):
    """The definition, from all distances at once: third neighbours, the point itself not counted."""
    between = distances(reference, samples)
    reference_radius, sample_radius = (np.sort(distances(x, x), axis=1)[:, 3] for x in (reference, samples))
    precision = np.mean([(between[:, j] <= reference_radius).any() for j in range(len(samples))])
    recall = np.mean([(between[i] <= sample_radius).any() for i in range(len(reference))])
    return precision, recall


@pytest.mark.parametrize("block", [5, 7, 16, 10_000])
@pytest.mark.parametrize("mode", ["adm", "exact"])
def test_precision_and_recall_of_lattices_full_of_ties(monkeypatch, mode, block):
    """Values 0, 1/4, 1/2 are exact in float16, so that both modes equal the definition to the last digit."""
    monkeypatch.setattr(metrics, "BLOCK", block)                                  # else 10,000
    seen = set()
    for seed in range(6):
        rng = np.random.default_rng(seed)
        reference, samples = (rng.integers(0, 3, (count, 6)).astype(np.float32) / 4 for count in (23, 31))
        samples[:, :2] += 0.25 * (seed % 3)
        found = precision_recall(reference, samples, mode)
        assert found == brute_force(reference, samples)
        seen |= set(found)
    assert len(seen) > 6 and any(0 < value < 1 for value in seen)


@pytest.mark.parametrize("mode", ["adm", "exact"])
def test_the_radius_is_the_third_neighbours_and_on_it_is_inside(mode):
    """Of 0, 1, 3, 6 the radii are 6, 5, 3, 6: -6 and 12 lie on the outermost circles."""
    reference, samples = (torch.tensor(x)[:, None] for x in ([0.0, 1, 3, 6], [-6.5, -6, 12, 12.5]))
    precision, recall = precision_recall(reference, samples, mode)
    assert precision == 0.5
    assert recall == 1.0                                                          # radii 19, 18.5, 18.5, 19


@pytest.mark.parametrize("mode", ["adm", "exact"])
def test_precision_is_the_samples_share_and_recall_the_references(mode):
    """The samples fill one of the reference's two clusters: all of them are good, half of the reference is missed."""
    near, far = torch.arange(5.0)[:, None], torch.arange(5.0)[:, None] + 100
    assert precision_recall(torch.cat([near, far]), near + 0.25, mode) == (1.0, 0.5)
    assert precision_recall(near + 0.25, torch.cat([near, far]), mode) == (0.5, 1.0)


def features_of_inceptions_size(count, seed, side=64):
    """Multiples of 1/64 in 2048 dimensions: |u|^2 is about 680, where float16 steps by 0.5; float32 sums are exact."""
    return (np.random.default_rng(seed).integers(0, side, (count, 2048)) / 64).astype(np.float32)


def test_adms_precision_and_recall_are_the_float16_ones():
    """On points whose distances are close to each other, so that rounding decides."""
    reference, samples = features_of_inceptions_size(60, 2), features_of_inceptions_size(70, 3)
    adm, exact = precision_recall(reference, samples), precision_recall(reference, samples, "exact")
    assert adm == brute_force(reference, samples, float16_distances)
    assert exact == brute_force(reference, samples)
    assert adm != exact and adm[0] > exact[0] and adm[1] > exact[1]               # ties count as inside


def test_a_block_that_overflows_is_computed_in_float32_and_no_other(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 16)
    small, large = features_of_inceptions_size(16, 4), features_of_inceptions_size(16, 5)
    large[3] *= 16                                                                # |u|^2 of this row is 170,000
    reference = np.concatenate([small, large])
    samples = np.concatenate([features_of_inceptions_size(16, 6), features_of_inceptions_size(7, 7)])
    found = precision_recall(reference, samples)
    assert found == brute_force(reference, samples, blockwise_distances(16))
    assert found not in (brute_force(reference, samples), brute_force(reference, samples, blockwise_distances(100)))


# ---- kernel distance -------------------------------------------------------------------------------------------------

def test_kernel_distance_is_the_unbiased_estimate_on_all_rows():
    rng = np.random.default_rng(0)
    reference, samples = rng.normal(size=(12, 5)), rng.normal(size=(12, 5)) * 1.5 + 0.5

    def mean(a, b, skip):
        values = [(a[i] @ b[j] / 5 + 1) ** 3 for i in range(12) for j in range(12) if not (skip and i == j)]
        return np.mean(values)

    expected = mean(samples, samples, True) + mean(reference, reference, True) - 2 * mean(samples, reference, False)
    value, error = kernel_distance(reference, samples)
    assert value == pytest.approx(expected, rel=1e-10) and error < 1e-10          # every subset is the whole


def test_kernel_distance_of_one_distribution_is_0_within_its_error(monkeypatch):
    """The error is the standard deviation over subsets, which are drawn with a seed of their own."""
    monkeypatch.setattr(metrics, "SUBSET", 50)                                    # else 1000
    rows = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    value, error = kernel_distance(rows[:600], rows[600:])
    assert error > 0 and abs(value) < error
    moved = kernel_distance(rows[:600], rows[600:] + 0.5)
    assert moved[0] > 3 * moved[1] > 0
    torch.manual_seed(7)
    assert kernel_distance(rows[:600], rows[600:] + 0.5) == moved
    assert kernel_distance(rows[:600], rows[600:] + 0.5, seed=1) != moved


# ---- precision of the arithmetic -------------------------------------------------------------------------------------

def test_arithmetic_is_full_float32_inside_and_unchanged_afterwards(lax):
    assert lax == ("tf32", "tf32", torch.bfloat16)
    with full_precision(torch.device("cpu")):
        assert tf32_and_autocast() == ("ieee", "ieee", torch.float32)
        with float32_arithmetic(tf32=True):
            assert tf32_and_autocast()[:2] == ("tf32", "tf32")
        assert tf32_and_autocast() == ("ieee", "ieee", torch.float32)
    assert tf32_and_autocast() == lax
    with pytest.raises(ZeroDivisionError), full_precision(torch.device("cpu")):
        _ = 1 / 0
    assert tf32_and_autocast() == lax


# ---- Monge distance --------------------------------------------------------------------------------------------------

def literal_mind(samples, reference):
    """A loop over directions, float64 numpy; the generator first draws the rows of the larger set."""
    generator, size = torch.Generator().manual_seed(2020), min(len(samples), len(reference))
    sets = [rows if len(rows) == size else rows[torch.randperm(len(rows), generator=generator)[:size].numpy()]
            for rows in (samples, reference)]
    total, width = 0.0, samples.shape[1]
    for direction in torch.randn(1000, width, generator=generator).double().numpy():
        direction = direction / np.sqrt((direction**2).sum())
        x, y = (np.sort(rows @ direction) for rows in sets)
        total += ((x - y) ** 2).sum() / size
    return 3 * width * total / 1000


@pytest.mark.parametrize("n, m", [(60, 60), (60, 90), (90, 60)])
def test_mind_equals_the_direct_formula(n, m):
    rng = np.random.default_rng(0)
    samples, reference = rng.normal(size=(n, 7)), rng.normal(0.5, 2, size=(m, 7))
    found = monge_distance(torch.from_numpy(reference).float(), torch.from_numpy(samples).float())
    assert found == pytest.approx(literal_mind(samples, reference), rel=1e-4)


def test_mind_of_a_shift_is_three_times_its_square():
    """Of equal shapes a direction sees the shift's component, whose mean square is |shift|^2 / F."""
    rows, shift = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(8)
    shift[0] = 2
    assert monge_distance(rows, rows + shift) == pytest.approx(3 * 4, rel=0.15)
    assert monge_distance(rows, rows[torch.randperm(500)]) == 0
