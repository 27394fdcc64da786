"""Interpolants between data and noise, x_t = alpha(t) x + sigma(t) eps (SiT, arXiv 2401.08740, section 2).

t = 0 is data, t = 1 is noise. t is always (B,); only `widen` reshapes it, to broadcast against (B, ...).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensor = torch.Tensor


def widen(t: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) with the rank of `like`: a bare (B,) would broadcast along the wrong axis."""
    assert t.ndim == 1 and len(t) == len(like), f"t must be (B,), not {tuple(t.shape)} for {tuple(like.shape)}"
    return t.view(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True)
class Interpolant:
    """alpha, sigma and their time derivatives as functions of t; transforms between data, velocity and score."""

    alpha: Callable[[Tensor], Tensor]
    sigma: Callable[[Tensor], Tensor]
    d_alpha: Callable[[Tensor], Tensor]
    d_sigma: Callable[[Tensor], Tensor]

    def corrupt(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t of data x and noise eps, both (B, ...)."""
        t = widen(t, x)
        return self.alpha(t) * x + self.sigma(t) * eps

    def velocity(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """d/dt of the path from data x to noise eps, both (B, ...): what the network learns."""
        t = widen(t, x)
        return self.d_alpha(t) * x + self.d_sigma(t) * eps

    def score(self, x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """The score, grad log p_t(x_t), of velocity v at x_t, both (B, ...); undefined at t = 0."""
        t = widen(t, x_t)
        sigma, d_sigma = self.sigma(t), self.d_sigma(t)
        ratio = self.alpha(t) / self.d_alpha(t)
        variance = sigma**2 - ratio * d_sigma * sigma
        return (ratio * v - x_t) / variance


PATHS: dict[str, Interpolant] = {
    "linear": Interpolant(
        alpha=lambda t: 1 - t,
        sigma=lambda t: t,
        d_alpha=lambda t: -torch.ones_like(t),
        d_sigma=lambda t: torch.ones_like(t),
    ),
    "cosine": Interpolant(
        alpha=lambda t: torch.cos(t * math.pi / 2),
        sigma=lambda t: torch.sin(t * math.pi / 2),
        d_alpha=lambda t: -math.pi / 2 * torch.sin(t * math.pi / 2),
        d_sigma=lambda t: math.pi / 2 * torch.cos(t * math.pi / 2),
    ),
}


def get_path(path_type: str) -> Interpolant:
    """The path called `linear` or `cosine`; raises ValueError for another name."""
    if path_type not in PATHS:
        raise ValueError(f"unknown path type {path_type!r}: use one of {', '.join(PATHS)}")
    return PATHS[path_type]


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = s t / (1 + (s - 1) t): times moved towards noise for s > 1 (SD3, arXiv 2403.03206, section 5.3.2)."""
    return shift * t / (1 + (shift - 1) * t)


def auto_shift(channels: int, side: int) -> float:
    """s = sqrt(C H W / 4096): 1 for latents of 4x32x32, and more for larger ones, which need more noise."""
    return math.sqrt(channels * side * side / 4096)


def draw_t(law: str, path_type: str, batch: int, device: torch.device) -> Tensor:
    """Draw t (B,) in [0, 1]: `uniform`, or `lognormal`: sigma / alpha = exp(N(0, 1)).

    EDM (arXiv 2206.00364) draws noise levels so, with another mean and deviation.
    """
    if law == "uniform":
        return torch.rand(batch, device=device)
    return lognormal_t(torch.randn(batch, device=device), path_type)


def lognormal_t(normal: Tensor, path_type: str) -> Tensor:
    """t of a standard normal draw (B,): the noise level s = exp(normal) of the path with sigma(t)/alpha(t) = s."""
    level = normal.exp()
    return level / (1 + level) if path_type == "linear" else 2 / math.pi * torch.atan(level)
