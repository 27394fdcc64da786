"""The interpolant between data and noise: derivatives, round trips, the law of t."""

import math

import pytest
import torch

from models.interpolant import PATHS, auto_shift, draw_t, get_path, shift_time, widen

T = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_ends_are_data_and_noise(path):
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(path.alpha(ends), torch.tensor([1.0, 0.0], dtype=torch.float64), atol=1e-15, rtol=0)
    torch.testing.assert_close(path.sigma(ends), torch.tensor([0.0, 1.0], dtype=torch.float64), atol=1e-15, rtol=0)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_derivatives(path):
    h = 1e-6                                   # the central difference errs by h^2, and by 1e-16 / h from rounding
    for function, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        torch.testing.assert_close((function(T + h) - function(T - h)) / (2 * h), derivative(T), atol=1e-9, rtol=0)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_velocity_score_data_round_trip(path):
    x, eps = torch.randn(2, 19, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t, v = path.corrupt(x, eps, T), path.velocity(x, eps, T)
    score = path.score(x_t, v, T)
    sigma, alpha = widen(path.sigma(T), x), widen(path.alpha(T), x)
    torch.testing.assert_close(score, -eps / sigma)                            # the score of a Gaussian around alpha x
    torch.testing.assert_close((x_t + sigma**2 * score) / alpha, x)            # Tweedie


def test_t_is_widened_for_any_rank():
    path = get_path("cosine")
    t = torch.tensor([0.2, 0.7])
    class_token, eps = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0))
    both = path.velocity(class_token, eps, t)
    for row in ([0], [1]):                     # (B, 1, 1, 1) against (B, E) would mix the rows
        torch.testing.assert_close(both[row], path.velocity(class_token[row], eps[row], t[row]))
    with pytest.raises(AssertionError):
        path.corrupt(class_token, eps, t.view(2, 1, 1, 1))


def test_unknown_path():
    with pytest.raises(ValueError, match="linear, cosine"):
        get_path("quadratic")


@pytest.mark.parametrize("path_type", PATHS)
def test_lognormal_t_has_a_standard_normal_log_noise_level(path_type):
    torch.manual_seed(0)
    n = 20_000
    t = draw_t("lognormal", path_type, n, torch.device("cpu")).double()
    path = get_path(path_type)
    level = torch.log(path.sigma(t) / path.alpha(t))
    assert abs(level.mean()) < 4 / math.sqrt(n)                                # four standard errors
    assert abs(level.var() - 1) < 4 * math.sqrt(2 / n)


def test_uniform_t():
    torch.manual_seed(0)
    t = draw_t("uniform", "linear", 20_000, torch.device("cpu"))
    assert t.min() >= 0 and t.max() < 1
    assert abs(t.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 20_000)


def test_time_shift():
    """The ends stay; s divides the odds of data, t' / (1 - t') = s t / (1 - t); 512 px of four channels have s = 2."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_time(t, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1
    torch.testing.assert_close((shifted / (1 - shifted))[1:-1], 3 * (t / (1 - t))[1:-1])
    assert torch.equal(shift_time(t, 1.0), t)
    assert (auto_shift(4, 32), auto_shift(4, 64)) == (1, 2) and round(auto_shift(32, 16), 2) == 1.41
