"""REG's objective (arXiv 2507.01467, section 3): velocities of latents and class token, alignment with the encoder.

total = denoising + beta * cls + lambda * proj, with beta = `--cls` and lambda = `--proj-coeff` (`weighted`). SILoss
returns the unweighted terms, in float32.
Shape letters: B batch, C latent channels, H W latent size, T tokens (1+N with a slot, else N), E encoder width.
"""

from typing import NamedTuple

import torch

from models.interpolant import draw_t, get_path, shift_time

# Which tokens are aligned: those of [class token; patches], or one of the two parts.
ALIGNED_TOKENS = {"all": slice(None), "patches": slice(1, None), "class": slice(0, 1)}


class Terms(NamedTuple):
    """The unweighted terms; None where the model has no such part."""

    denoising: torch.Tensor            # (B,)
    proj: torch.Tensor | None          # scalar, in [-1, 1]: minus the mean cosine
    cls: torch.Tensor | None           # (B,)
    t: torch.Tensor                    # (B,)


def alignment_loss(projected: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
    """Minus the mean cosine of projected tokens and targets, (B, T, E) per encoder, over tokens, batch and encoders.

    REPA (arXiv 2410.06940), eq. 6. Raises ValueError if numbers of encoders or shapes differ.
    """
    if [p.shape for p in projected] != [z.shape for z in targets]:
        raise ValueError(f"projected tokens {[tuple(p.shape) for p in projected]} do not match the targets "
                         f"{[tuple(z.shape) for z in targets]}")
    return -torch.stack([cosine(p.float(), z.float()).mean() for p, z in zip(projected, targets, strict=True)]).mean()


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine along the last axis, (..., E) -> (...); 0 where a vector is 0."""
    # Three sums over E, which a compiler fuses into one pass over the memory.
    lengths = [torch.linalg.vector_norm(vector, dim=-1).clamp(min=1e-8) for vector in (a, b)]
    return (a * b).sum(dim=-1) / (lengths[0] * lengths[1])


def weighted(terms: Terms, beta: float, lam: float) -> torch.Tensor:
    """denoising + beta * cls + lambda * proj, a scalar."""
    total = terms.denoising.mean()
    if terms.cls is not None:
        total = total + beta * terms.cls.mean()
    if terms.proj is not None:
        total = total + lam * terms.proj
    return total


class SILoss:
    """Flow matching on the pair (latents, class token), plus alignment.

    Args:
        prediction: only "v", the velocity.      path_type: "linear" or "cosine".
        weighting: law of t, "uniform" or "lognormal".
        time_shift: s of `shift_time`, for the times that are drawn; 1: none.
        align: aligned tokens, "all", "patches" or "class"; the last two need a model with a class-token slot.
        compile: fuse the alignment over (B, T, E) tokens into one kernel, forward and backward.
    """

    def __init__(self, prediction: str = "v", path_type: str = "linear", weighting: str = "uniform", align: str = "all",
                 compile: bool = False, time_shift: float = 1.0):
        if prediction != "v":
            raise ValueError(f"unknown prediction {prediction!r}: SiT predicts the velocity, 'v'")
        if weighting not in ("uniform", "lognormal"):
            raise ValueError(f"unknown weighting {weighting!r}: use 'uniform' or 'lognormal'")
        if align not in ALIGNED_TOKENS:
            raise ValueError(f"unknown align {align!r}: use one of {', '.join(ALIGNED_TOKENS)}")
        self.path = get_path(path_type)
        self.path_type, self.weighting, self.time_shift = path_type, weighting, time_shift
        self.tokens = ALIGNED_TOKENS[align]
        self.alignment_loss = torch.compile(alignment_loss, dynamic=False) if compile else alignment_loss

    def __call__(self, model, images, model_kwargs, zs=None, cls_token=None, time_input=None, noises=None,
                 cls_noises=None) -> Terms:
        """Evaluate the model at random times and return the unweighted terms.

        Args:
            images: latents (B, C, H, W).        cls_token: the encoder's class token (B, E), for a model with a slot.
            model_kwargs: dict(y=labels (B,)).   zs: targets (B, T, E) per projector; None or empty: no alignment.
            time_input (B,), noises (like images), cls_noises (like cls_token): drawn if None.
        """
        images, path = images.float(), self.path
        if time_input is None:
            time_input = draw_t(self.weighting, self.path_type, len(images), images.device)
            time_input = time_input if self.time_shift == 1 else shift_time(time_input, self.time_shift)
        t = time_input.float()                                                            # (B,)
        eps = torch.randn_like(images) if noises is None else noises.float()              # (B, C, H, W)
        noised, target = path.corrupt(images, eps, t), path.velocity(images, eps, t)      # (B, C, H, W) each
        noised_cls = None
        if cls_token is not None:                                 # the same t as the latents, and its own noise
            cls_token = cls_token.float()                                                 # (B, E)
            cls_eps = torch.randn_like(cls_token) if cls_noises is None else cls_noises.float()           # (B, E)
            noised_cls, cls_target = path.corrupt(cls_token, cls_eps, t), path.velocity(cls_token, cls_eps, t)
        velocity, projected, cls_velocity = model(noised, t, **model_kwargs, cls_token=noised_cls)
        denoising = ((velocity.float() - target) ** 2).flatten(1).mean(dim=1)             # (B,)
        cls = None if cls_token is None else ((cls_velocity.float() - cls_target) ** 2).mean(dim=1)       # (B,)

        aligned = [p[:, self.tokens] for p in projected], [z[:, self.tokens] for z in zs or ()]
        proj = self.alignment_loss(*aligned) if zs else None
        return Terms(denoising, proj, cls, t)
