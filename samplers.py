"""Sampling: guided velocity field, ODE and SDE solvers on the pair (latents, class token), one seed per image.

The state is the pair, flattened to one float64 matrix S (B, C*H*W + E), so that every update is written once. A solver
sees `field(state, t) -> velocity` and nothing else; the field has guidance in it (REG, arXiv 2507.01467, appendix;
interval guidance: arXiv 2404.07724). Time runs from 1 (noise) to 0 (data).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from models.interpolant import get_path, shift_time
from runtime.messages import UserError

LAST_SDE_TIME = 0.04         # the score is singular at t = 0: the last step leaves from here, and adds no noise


def pack(pair: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """(latents, class token | None) -> one float64 state S (B, C*H*W [+ E])."""
    return torch.cat([member.double().flatten(1) for member in pair if member is not None], dim=1)


def unpack(state: torch.Tensor, shape: torch.Size,
           dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The inverse of `pack` for latents of `shape` (B, C, H, W); class token None if the state has none."""
    size = shape[1:].numel()
    latents = state[:, :size].reshape(len(state), *shape[1:]).to(dtype)
    return latents, (state[:, size:].to(dtype) if state.shape[1] > size else None)


def guided_field(model, condition: torch.Tensor, null: torch.Tensor | None, shape: torch.Size, dtype: torch.dtype,
                 scales: tuple[float, float], interval: tuple[float, float]) -> Callable[[float], Callable]:
    """Classifier-free guidance of the pair, `guidance(t_start) -> field(state, t)`.

    Inside the interval (ends inclusive, tested once with the step's starting time) the velocity is u + s (c - u), from
    one batch with the condition and its null counterpart; outside it, or with a latents' scale of 1, the conditional
    velocity alone. A class-token scale <= 0 leaves the class token conditional.
    """
    scale, cls_scale = scales
    low, high = interval
    unconditional = null                                          # (B, ...), like the condition
    if scale > 1:
        assert null is not None or hasattr(model, "num_classes"), "guidance of captions needs their null states"
        unconditional = torch.full_like(condition, model.num_classes) if null is None else null.expand_as(condition)

    def velocity(latents, cls_token, t, given):
        times = torch.full((len(given),), t, dtype=dtype, device=latents.device)
        v, _, cls_v = model(latents, times, given, cls_token=cls_token)
        return v, cls_v

    def conditional(state, t):
        return pack(velocity(*unpack(state, shape, dtype), t, condition))

    def guided(state, t):
        latents, cls_token = unpack(state.repeat(2, 1), shape, dtype)
        both = velocity(latents, cls_token, t, torch.cat([condition, unconditional]))
        (c, u), (cls_c, cls_u) = (member.double().chunk(2) if member is not None else (None, None) for member in both)
        v = u + scale * (c - u)
        cls_v = cls_c if cls_c is None or cls_scale <= 0 else cls_u + cls_scale * (cls_c - cls_u)
        return pack((v, cls_v))

    return lambda t_start: guided if scale > 1 and low <= t_start <= high else conditional


def euler_step(field, x, t, t_next):
    return x + (t_next - t) * field(x, t)


def heun_step(field, x, t, t_next):
    v = field(x, t)
    x_next = x + (t_next - t) * v
    if t_next == 0:                                                                     # the last step is an Euler step
        return x_next
    return x + (t_next - t) * (v + field(x_next, t_next)) / 2


def euler_maruyama_step(field, x, t, t_next, path, noise):
    """Reverse SDE with diffusion w(t) = 2t: drift v - w/2 * score; the step to 0 adds no noise."""
    w = 2 * t
    v = field(x, t)
    drift = v - w / 2 * path.score(x, v, torch.full((len(x),), t, dtype=x.dtype, device=x.device))
    x_next = x + (t_next - t) * drift
    if t_next == 0:
        return x_next
    return x_next + (w * (t - t_next)) ** 0.5 * noise()


def time_grid(last: float, count: int, shift: float) -> list[float]:
    """`count` times from 1 to `last`, equally spaced, then moved by `shift_time`; both ends stay.

    A shift below 1 moves some times below `last`. They are left out, so fewer remain.
    """
    times = shift_time(torch.linspace(1, last, count, dtype=torch.float64), shift).tolist()
    return [*(t for t in times[:-1] if t > last), last]


@torch.no_grad()
def integrate(step, times: list[float], model, latents, condition, null, cls_latents, cfg_scale, cls_cfg_scale,
              guidance_low, guidance_high):
    """Carry the pair through `times`, whose last is 0, with `step(field, state, t, t_next)`; the one stepping loop.

    Raises UserError naming step and scales if the pair does not stay finite in float32.
    """
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    dtype = next((p.dtype for p in parameters), latents.dtype)
    scales = (cfg_scale, cfg_scale if cls_cfg_scale is None else cls_cfg_scale)
    guidance = guided_field(model, condition, null, latents.shape, dtype, scales, (guidance_low, guidance_high))
    state = pack((latents, cls_latents))
    finite = torch.zeros((), dtype=torch.long, device=state.device)                       # steps; read at the end only
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        state = step(guidance(t), state, t, t_next)
        finite += state.float().isfinite().all()
    if finite < len(times) - 1:
        raise UserError(f"the samples are not finite after step {int(finite) + 1} of {len(times) - 1} (guidance scale "
                        f"{scales[0]:g}, class token {scales[1]:g}); use a lower scale, or another checkpoint")
    return unpack(state, latents.shape)


def euler_sampler(model, latents, condition, null=None, num_steps=250, heun=False, cfg_scale=1.0, guidance_low=0.0,
                  guidance_high=1.0, path_type="linear", cls_latents=None, cls_cfg_scale=None, time_shift=1.0):
    """Probability-flow ODE, Euler or Heun, over `num_steps` equal steps from t = 1 to 0.

    Args:
        model: (latents, t, condition, cls_token=) -> (velocity, _, class-token velocity | None).
        latents: noise (B, C, H, W).      cls_latents: noise (B, E); required by a model with a class-token slot.
        condition: (B, ...), as the model takes it.
        null: the unconditional input, one for each image or one for all; None: `model.num_classes`.
        path_type: only checked; the ODE needs the velocity, not the path.
        cfg_scale: guidance of the latents for guidance_low <= t <= guidance_high; 1 or less: none, of either member.
        cls_cfg_scale: guidance of the class token; None: cfg_scale; <= 0: conditional only.
        time_shift: s of `shift_time`, which moves the times between the first and the last; 1: equal steps.
    Returns:
        final latents (B, C, H, W) and class token (B, E) or None, float64.
    """
    get_path(path_type)
    times = time_grid(0.0, num_steps + 1, time_shift)
    step = heun_step if heun else euler_step
    return integrate(step, times, model, latents, condition, null, cls_latents, cfg_scale, cls_cfg_scale, guidance_low,
                     guidance_high)


def euler_maruyama_sampler(model, latents, condition, null=None, num_steps=250, cfg_scale=1.0, guidance_low=0.0,
                           guidance_high=1.0, path_type="linear", cls_latents=None, cls_cfg_scale=None, time_shift=1.0,
                           noise=torch.randn_like):
    """Reverse SDE: `num_steps` equally spaced times from 1 to 0.04, then 0. Arguments and result as in `euler_sampler`.

    `noise(tensor)` returns Gaussian noise like the tensor; at each step but the last it is called for the latents, then
    the class token.
    """
    path = get_path(path_type)

    def step(field, x, t, t_next):
        members = [member for member in unpack(x, latents.shape) if member is not None]
        return euler_maruyama_step(field, x, t, t_next, path, lambda: pack([noise(member) for member in members]))

    times = [*time_grid(LAST_SDE_TIME, num_steps, time_shift), 0.0]
    return integrate(step, times, model, latents, condition, null, cls_latents, cfg_scale, cls_cfg_scale, guidance_low,
                     guidance_high)


@dataclass(frozen=True)
class Sampling:
    """How to sample: with the weights, the conditions and the decoder it decides image i. Defaults: as published."""

    mode: str = "sde"                             # sde: Euler-Maruyama · ode: Euler, or Heun
    num_steps: int = 250
    heun: bool = False
    cfg_scale: float = 2.3
    cls_cfg_scale: float | None = None            # None: cfg_scale · <= 0: conditional only
    guidance_low: float = 0.0
    guidance_high: float = 0.85
    seed: int = 0
    path_type: str = "linear"
    time_shift: float = 1.0                       # of the steps' times, as in training
    precision: str = "fp32"                       # bf16: autocast · fp32, tf32: the caller sets TF32


def image_rng(seed: int, index: int) -> np.random.Generator:
    """The source of everything random in image `index`.

    NumPy's: PyTorch's CPU generator keeps 32 bits of a seed, so two of 50,000 images would likely share their noise.
    """
    return np.random.default_rng((seed, index))


def sample_images(model, codec, indices: Iterable[int], how: Sampling, conditions,
                  rngs: list[np.random.Generator] | None = None) -> tuple[torch.Tensor, list, torch.Tensor | None]:
    """Turn image numbers into images, with condition and noise of image i from (seed, i) alone.

    Each image's generator gives what it shows, the starting latents and class token, then each step's noise in the
    sampler's order.

    Args:
        model: SiT or MMDiT in evaluation mode, on its device.
        codec: `decode`s latents (B, C, H, W) to images, as models.vae.Codec does.
        conditions: models.conditioning's, on the model's device.
        rngs: the source of everything random in each image, instead of `image_rng`.
    Returns:
        images uint8 (B, 3, R, R), what they show (B), generated class tokens (B, E) float32 or None; on the CPU.
    Raises UserError if they are not finite.
    """
    indices = list(indices)
    device = model.pos_embed.device
    rngs = rngs or [image_rng(how.seed, index) for index in indices]
    shown = [conditions.draw(i, rng) for i, rng in zip(indices, rngs, strict=True)]

    def noise(shape) -> torch.Tensor:
        draws = [rng.standard_normal(tuple(shape), dtype=np.float32) for rng in rngs]
        drawn = torch.from_numpy(np.stack(draws))                                         # (B, *shape)
        # From pinned memory the copy joins the device's queue; from any other it would first wait until that is empty.
        return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)

    latents = noise((model.in_channels, model.input_size, model.input_size))              # (B, C, H, W)
    cls_latents = noise((model.cls_token_dim,)) if model.cls_token_dim is not None else None
    settings = dict(num_steps=how.num_steps, cfg_scale=how.cfg_scale, cls_cfg_scale=how.cls_cfg_scale,
                    guidance_low=how.guidance_low, guidance_high=how.guidance_high, path_type=how.path_type,
                    cls_latents=cls_latents, time_shift=how.time_shift, null=conditions.null(len(indices)))
    condition = conditions.embed(shown)                                                   # (B, ...)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=how.precision == "bf16"):
        if how.mode == "sde":
            latents, cls_token = euler_maruyama_sampler(model, latents, condition, noise=lambda x: noise(x.shape[1:]),
                                                        **settings)
        else:
            latents, cls_token = euler_sampler(model, latents, condition, heun=how.heun, **settings)
    images = codec.decode(latents.float()).cpu()
    return images, shown, None if cls_token is None else cls_token.float().cpu()
