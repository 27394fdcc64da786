"""REG's objective: each term against its definition."""

import pytest
import torch

from loss import SILoss, alignment_loss
from tests.test_sit import inputs, randomised, small


def targets(model, dims=(12,), batch=2):
    tokens = model.pos_embed.shape[1]
    g = torch.Generator().manual_seed(3)
    return [torch.randn(batch, tokens, dim, generator=g) for dim in dims]


def test_vectorised_alignment_and_its_gradient_equal_the_loop():
    g = torch.Generator().manual_seed(0)
    projected = [torch.randn(3, 5, dim, dtype=torch.float32, generator=g, requires_grad=True) for dim in (7, 11)]
    wanted = [torch.randn(3, 5, dim, generator=g) for dim in (7, 11)]
    loop = 0
    for p, z in zip(projected, wanted, strict=True):
        for p_image, z_image in zip(p, z, strict=True):
            for p_token, z_token in zip(p_image, z_image, strict=True):
                loop = loop - (p_token / p_token.norm()) @ (z_token / z_token.norm()) / (2 * 3 * 5)
    ours = alignment_loss(projected, wanted)
    torch.testing.assert_close(ours, loop)
    for a, b in zip(torch.autograd.grad(ours, projected), torch.autograd.grad(loop, projected), strict=True):
        torch.testing.assert_close(a, b)


def test_targets_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="do not match"):
        alignment_loss([torch.randn(2, 17, 12)], [torch.randn(2, 16, 12)])
    with pytest.raises(ValueError, match="do not match"):
        alignment_loss([torch.randn(2, 17, 12)], [])


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_a_perfect_velocity_has_no_loss_and_a_zero_one_the_targets_square(path_type):
    objective = SILoss(path_type=path_type)
    g = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 2, 3, 8, 8, generator=g)
    c, eps_c = torch.randn(2, 2, 12, generator=g)
    t = torch.tensor([0.3, 0.8])
    target, target_c = objective.path.velocity(x, eps, t), objective.path.velocity(c, eps_c, t)
    given = dict(cls_token=c, time_input=t, noises=eps, cls_noises=eps_c)

    perfect = objective(lambda *_, **__: (target, [], target_c), x, dict(y=None), **given)
    assert perfect.denoising.abs().max() == 0 and perfect.cls.abs().max() == 0 and perfect.proj is None
    zero = objective(lambda *_, **__: (0 * target, [], 0 * target_c), x, dict(y=None), **given)
    torch.testing.assert_close(zero.denoising, (target**2).mean(dim=(1, 2, 3)))
    torch.testing.assert_close(zero.cls, (target_c**2).mean(dim=1))


def test_model_sees_the_noised_pair_at_the_same_time():
    seen = {}

    def model(x, t, y, cls_token=None):
        seen.update(x=x, t=t, y=y, c=cls_token)
        return x, [], cls_token

    x, eps, c, eps_c = torch.ones(2, 3, 4, 4), torch.full((2, 3, 4, 4), 5.0), torch.ones(2, 6), torch.full((2, 6), 5.0)
    SILoss()(model, x, dict(y=torch.tensor([1, 2])), cls_token=c, time_input=torch.tensor([0.0, 0.25]), noises=eps,
             cls_noises=eps_c)
    for member in (seen["x"], seen["c"]):
        assert (member[0] == 1).all() and (member[1] == 2).all()                    # 0.75 * 1 + 0.25 * 5
    assert seen["t"].tolist() == [0.0, 0.25] and seen["y"].tolist() == [1, 2]


def test_noise_and_times_are_drawn_where_none_are_given():
    """From zero data the noised pair is t eps: divided by t it must be a fresh standard normal in both members."""
    seen = []

    def model(x, t, y, cls_token=None):
        seen.append([member / t.view(-1, *[1] * (member.ndim - 1)) for member in (x, cls_token)])
        return x, [], cls_token

    torch.manual_seed(0)
    for _ in range(2):
        terms = SILoss()(model, torch.zeros(64, 3, 8, 8), dict(y=None), cls_token=torch.zeros(64, 192))
        assert len(terms.t.unique()) == 64
    for first, second in zip(*seen, strict=True):
        for eps in (first, second):
            n = eps.numel()
            assert abs(eps.mean()) < 5 / n**0.5 and abs(eps.var() - 1) < 5 * (2 / n) ** 0.5    # five standard errors
        assert not torch.equal(first, second)


def test_terms_of_parts_that_the_model_lacks_are_none():
    plain = randomised(small(cls_token_dim=None, z_dims=())).eval()
    x, _, y, _ = inputs(plain)
    terms = SILoss()(plain, x, dict(y=y))
    assert terms.denoising.shape == terms.t.shape == (2,) and terms.proj is None and terms.cls is None


def test_align_chooses_tokens():
    model = randomised(small()).eval()
    x, t, y, c = inputs(model)
    zs = targets(model)
    given = dict(cls_token=c, time_input=t, noises=torch.zeros_like(x), cls_noises=torch.zeros_like(c))
    every, patches, single = (SILoss(align=align)(model, x, dict(y=y), zs=zs, **given).proj
                              for align in ("all", "patches", "class"))
    torch.testing.assert_close(every, (16 * patches + single) / 17)
    assert not torch.allclose(patches, single)


def test_losses_are_float32_under_autocast():
    model = randomised(small()).eval()
    x, _, y, c = inputs(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        zs = [z.bfloat16() for z in targets(model)]
        terms = SILoss()(model, x.bfloat16(), dict(y=y), zs=zs, cls_token=c.bfloat16())
    assert {term.dtype for term in terms} == {torch.float32}


@pytest.mark.parametrize("wrong", [dict(prediction="eps"), dict(path_type="x"), dict(weighting="x"), dict(align="x")])
def test_unknown_settings(wrong):
    with pytest.raises(ValueError, match=r"unknown"):
        SILoss(**wrong)


def test_drawn_times_are_shifted_and_given_times_are_not():
    seen = []

    def model(x, t, y, cls_token=None):
        seen.append(t)
        return x, [], None

    x = torch.zeros(4000, 1, 1, 1)
    torch.manual_seed(0)
    SILoss()(model, x, dict(y=None))
    torch.manual_seed(0)
    SILoss(time_shift=3.0)(model, x, dict(y=None))
    torch.testing.assert_close(seen[1], 3 * seen[0] / (1 + 2 * seen[0]))
    SILoss(time_shift=3.0)(model, x[:1], dict(y=None), time_input=torch.tensor([0.5]))
    assert seen[2].tolist() == [0.5]
