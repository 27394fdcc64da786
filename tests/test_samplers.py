"""Solvers against fields with known solutions, guidance, the randomness of image i."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.conditioning import ClassLabels
from models.interpolant import PATHS, widen
from runtime.messages import UserError
from samplers import (
    Sampling,
    euler_maruyama_sampler,
    euler_sampler,
    image_rng,
    pack,
    sample_images,
    unpack,
)
from tests.test_sit import randomised, small

X = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
C = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.zeros(3, dtype=torch.long)


class Field(torch.nn.Module):
    """A velocity given by a formula, one for both members of the pair; counts its evaluations."""

    num_classes = 10

    def __init__(self, velocity):
        super().__init__()
        self.velocity, self.times, self.batches = velocity, [], []

    def forward(self, x, t, y, cls_token=None):
        self.times.append(t[0].item())
        self.batches.append(len(x))
        return self.velocity(x, t, y), [], None if cls_token is None else self.velocity(cls_token, t, y)


def test_pack_and_unpack_are_inverse():
    for pair in ((X, C), (X, None)):
        for back, member in zip(unpack(pack(pair), X.shape), pair, strict=True):
            assert (back is None and member is None) or (back == member).all()


@pytest.mark.parametrize(("heun", "order"), [(False, 1), (True, 2)])
def test_order_of_convergence(heun, order):
    """dx/dt = x cos(3t): x(0) = x(1) exp(-sin(3) / 3). Twice the steps divide the error by 2^order, in both members."""
    exact = math.exp(-math.sin(3) / 3)
    errors = []
    for steps in (200, 400):
        field = Field(lambda x, t, y: x * widen((3 * t).cos(), x))
        x, c = euler_sampler(field, X, Y, num_steps=steps, heun=heun, cls_latents=C)
        errors.append((x - exact * X).norm())
        torch.testing.assert_close(c / C, torch.full_like(C, (x / X).mean().item()))
    # The last Heun step is an Euler step of local error O(h^2), so that the whole stays of second order.
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.05


def test_ode_times_and_evaluations():
    euler, heun = Field(lambda x, t, y: x), Field(lambda x, t, y: x)
    euler_sampler(euler, X, Y, num_steps=4)
    euler_sampler(heun, X, Y, num_steps=4, heun=True)
    assert euler.times == [1.0, 0.75, 0.5, 0.25]
    assert heun.times == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]


def test_sde_times_and_noise_order():
    calls = []

    def noise(member):
        calls.append(tuple(member.shape))
        return torch.zeros_like(member)

    field = Field(lambda x, t, y: x)
    euler_maruyama_sampler(field, X, Y, num_steps=4, cls_latents=C, noise=noise)
    np.testing.assert_allclose(field.times, [1, 0.68, 0.36, 0.04], rtol=1e-6)
    assert calls == [tuple(X.shape), tuple(C.shape)] * 3                                # the last step adds none


@pytest.mark.parametrize("path_type", PATHS)
def test_euler_maruyama_reproduces_a_gaussian(path_type):
    """Data N(m, s^2): the velocity is known, and the samples must have the data's mean and variance."""
    mean, std, path = 0.7, 0.5, PATHS[path_type]

    def velocity(x, t, y):
        t = widen(t, x)
        a, s, da, ds = (f(t) for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
        variance = (a * std) ** 2 + s**2
        return da * mean + (a * da * std**2 + s * ds) / variance * (x - a * mean)          # E[d x_t / dt | x_t]

    torch.manual_seed(0)
    n = 40_000
    start, cls_start = (torch.randn(shape, dtype=torch.float64) for shape in ((n // 2, 1, 1, 2), (n // 2, 1)))
    labels = torch.zeros(n // 2, dtype=torch.long)
    x, c = euler_maruyama_sampler(Field(velocity), start, labels, 200, path_type=path_type, cls_latents=cls_start)
    # Four standard errors, and the solver's error: the noise missing in the last step, and O(1 / 200).
    for member in (x, c):
        assert abs(member.mean() - mean) < 4 * std / math.sqrt(member.numel()) + 0.01
        assert abs(member.var() - std**2) < 4 * std**2 * math.sqrt(2 / member.numel()) + 0.01


def labelled(x, t, y):
    """A field that shows its label: c for label 0, u for the null label 10."""
    return torch.where(widen(y, x) == 10, 0.25, 1.0) * x


def one_step(**settings):
    field = Field(labelled)
    x, c = euler_sampler(field, X, Y, num_steps=1, cls_latents=C, **settings)
    return 1 - (x / X).mean().item(), 1 - (c / C).mean().item(), field.batches[0]


def test_guidance_combines_velocities():
    """From x(1) = 1, one step leaves 1 - velocity; both guidance halves go through the network as one batch."""
    assert one_step(cfg_scale=1.0) == pytest.approx((1.0, 1.0, 3))
    assert one_step(cfg_scale=3.0) == pytest.approx((0.25 + 3 * 0.75, 0.25 + 3 * 0.75, 6))
    assert one_step(cfg_scale=3.0, cls_cfg_scale=2.0) == pytest.approx((0.25 + 3 * 0.75, 0.25 + 2 * 0.75, 6))
    assert one_step(cfg_scale=3.0, cls_cfg_scale=0.0) == pytest.approx((0.25 + 3 * 0.75, 1.0, 6))


def test_guidance_interval_includes_its_ends_and_is_tested_with_a_steps_starting_time():
    field = Field(labelled)
    euler_sampler(field, X, Y, num_steps=4, heun=True, cfg_scale=2.0, guidance_low=0.5, guidance_high=0.75)
    guided = list(zip(field.times, (batch == 6 for batch in field.batches), strict=True))
    assert guided == [(1.0, False), (0.75, False), (0.75, True), (0.5, True), (0.5, True), (0.25, True), (0.25, False)]


def test_guiding_the_velocity_is_guiding_the_drift():
    """The sampler guides velocities; by hand, the drifts v - w/2 score of c and u are guided, with w = 2t."""
    sampled, _ = euler_maruyama_sampler(Field(labelled), X, Y, num_steps=3, cfg_scale=2.3, noise=torch.zeros_like)
    x = X
    for t, t_next in ((1.0, 0.52), (0.52, 0.04), (0.04, 0.0)):
        c, u = (v - t * PATHS["linear"].score(x, v, torch.full((3,), t, dtype=torch.float64)) for v in (x, 0.25 * x))
        x = x + (t_next - t) * (u + 2.3 * (c - u))
    torch.testing.assert_close(sampled, x)


def test_a_slot_needs_class_noise():
    model = small().eval()
    with pytest.raises(ValueError, match="cls_latents"):
        euler_sampler(model, torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.long), num_steps=1)


class Pixels:
    """In the codec's place: decodes latents to three of their own channels."""

    @staticmethod
    def decode(latents):
        return (latents * 40 + 128).clamp(0, 255).to(torch.uint8)


HOW, LABELS = Sampling(num_steps=3, seed=7), ClassLabels(5)


def test_image_depends_on_seed_and_index_alone():
    model = randomised(small()).eval()
    images, labels, tokens = sample_images(model, Pixels, range(6), HOW, LABELS)
    assert images.dtype == torch.uint8 and images.shape == (6, 3, 8, 8) and tokens.shape == (6, 12)
    rows = [sample_images(model, Pixels, [i], HOW, LABELS) for i in (4, 1)]
    for (image, label, token), i in zip(rows, (4, 1), strict=True):
        assert label == [labels[i]]
        assert (image[0].int() - images[i].int()).abs().max() <= 1        # kernels depend on the batch size
        torch.testing.assert_close(token[0], tokens[i], atol=1e-4, rtol=1e-4)
    again, _, _ = sample_images(model, Pixels, range(6), HOW, LABELS)
    assert (again == images).all()
    other, _, _ = sample_images(model, Pixels, range(6), replace(HOW, seed=8), LABELS)
    assert (other != images).any(dim=(1, 2, 3)).all()


@pytest.mark.parametrize("change", [
    dict(mode="ode"), dict(mode="ode", heun=True), dict(num_steps=4), dict(cfg_scale=1.0), dict(cls_cfg_scale=0.0),
    dict(guidance_high=0.3), dict(guidance_low=0.5), dict(path_type="cosine"), dict(precision="bf16"),
    dict(time_shift=2.0)])
def test_every_setting_changes_the_images(change):
    model = randomised(small()).eval()
    base = replace(HOW, mode="ode") if change.get("heun") else HOW
    a, _, tokens_a = sample_images(model, Pixels, range(8), base, LABELS)
    b, _, tokens_b = sample_images(model, Pixels, range(8), replace(base, **change), LABELS)
    assert (a != b).any() or not torch.equal(tokens_a, tokens_b)


def test_seeds_and_indices_keep_more_than_32_bits():
    """With 32 bits two of 50,000 images would likely share their noise."""
    keys = [(0, 1), (0, 2**32 + 1), (2**33, 1), (1, 0)]
    assert len({image_rng(*key).bytes(16) for key in keys}) == 4


@pytest.mark.parametrize(("sampler", "steps"), [(euler_sampler, 4), (euler_maruyama_sampler, 4)])
def test_samples_that_do_not_stay_finite_are_an_error_that_names_the_step(sampler, steps):
    """From t < 0.6 on the velocity is 1e30 times too large, and beyond float32 with the guidance scale."""

    class Exploding(torch.nn.Module):
        num_classes = 3

        def forward(self, x, t, y, cls_token=None):
            factor = torch.where(t < 0.6, 1e30, 1.0)[:, None, None, None]
            return x * factor * (y < 3)[:, None, None, None], None, None

    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match=r"step 3 of 4 \(guidance scale 1e\+10"):
        sampler(Exploding(), noise, torch.tensor([0, 1]), num_steps=steps, cfg_scale=1e10)


def test_guidance_without_a_null_condition_needs_a_null_label():
    class Captioned(torch.nn.Module):
        def forward(self, x, t, context, cls_token=None):
            return x + context.mean(), [], None

    noise, context = torch.zeros(2, 4, 4, 4), torch.ones(2, 3, 8)
    euler_sampler(Captioned(), noise, context, num_steps=2)
    euler_sampler(Captioned(), noise, context, null=torch.zeros(3, 8), num_steps=2, cfg_scale=2.0)
    with pytest.raises(AssertionError, match="null states"):
        euler_sampler(Captioned(), noise, context, num_steps=2, cfg_scale=2.0)


def test_shifted_times_keep_their_ends_and_solve_the_same_equation():
    """dx/dt = x cos(3t) as above: other steps, the same solution; the last SDE time stays 0.04."""
    exact = math.exp(-math.sin(3) / 3)
    field = Field(lambda x, t, y: x * widen((3 * t).cos(), x))
    latents, _ = euler_sampler(field, X, Y, num_steps=400, time_shift=2.0)
    torch.testing.assert_close(latents, X * exact, rtol=0.02, atol=0)
    u = 1 - torch.arange(400) / 400
    torch.testing.assert_close(torch.tensor(field.times), 2 * u / (1 + u), rtol=0, atol=1e-6)
    field.times.clear()
    euler_maruyama_sampler(field, X, Y, num_steps=4, time_shift=3.0)
    u = torch.tensor([1, 0.68, 0.36])
    torch.testing.assert_close(torch.tensor(field.times), torch.cat([3 * u / (1 + 2 * u), torch.tensor([0.04])]))
    field.times.clear()
    euler_maruyama_sampler(field, X, Y, num_steps=100, time_shift=0.25)          # later times would lie below 0.04
    assert field.times == sorted(field.times, reverse=True) and field.times[-1] == pytest.approx(0.04)
