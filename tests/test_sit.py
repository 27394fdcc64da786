"""SiT: sizes, the published parameter counts to the digit, label drop, the class-token slot."""

import math

import pytest
import torch

from models.sit import SIZES, SiT, SiT_models, position_table
from runtime.messages import UserError

# Published parameters in millions: REG at inference, REG in training (with projector), SiT without REG.
PUBLISHED = {"SiT-B/2": (131.684, 139.028, 130.50), "SiT-L/2": (459.664, 467.533, 458.09),
             "SiT-XL/2": (676.886, 685.017, 675.11)}


def small(**changes) -> SiT:
    torch.manual_seed(0)
    settings = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=3, num_heads=2, encoder_depth=2,
                    num_classes=5, z_dims=(12,), projector_dim=16, cls_token_dim=12)
    return SiT(**{**settings, **changes})


def randomised(model: SiT) -> SiT:
    """Away from the zero heads and gates of the initialisation."""
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return model


def inputs(model: SiT, batch: int = 2) -> tuple:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, model.in_channels, model.input_size, model.input_size, generator=g)
    cls_token = None if model.cls_token_dim is None else torch.randn(batch, model.cls_token_dim, generator=g)
    return x, torch.rand(batch, generator=g), torch.randint(model.num_classes, (batch,), generator=g), cls_token


def test_names():
    assert SiT_models.keys() == {f"SiT-{size}/{patch}" for size in ("T", "S", "B", "L", "XL") for patch in (1, 2, 4, 8)}


@pytest.mark.parametrize("name", ["SiT-T/2", "SiT-S/4", "SiT-B/8", "SiT-L/2", "SiT-XL/2"])
def test_every_size_builds_and_runs(name):
    with torch.device("meta"):
        model = SiT_models[name](input_size=16, in_channels=16, num_classes=7, z_dims=(384, 768), cls_token_dim=384)
        velocity, projected, cls_velocity = model(*inputs(model))
    tokens = 1 + (16 // int(name[-1])) ** 2
    assert velocity.shape == (2, 16, 16, 16)
    assert [p.shape for p in projected] == [(2, tokens, 384), (2, tokens, 768)]
    assert cls_velocity.shape == (2, 384)
    assert model.y_embedder.embedding_table.num_embeddings == 8


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    with torch.device("meta"):
        counts = [sum(p.numel() for p in SiT_models[name](input_size=32, in_channels=4, **changes).parameters())
                  for changes in (dict(z_dims=()), dict(), dict(z_dims=(), cls_token_dim=None))]
    assert tuple(round(count / 1e6, digits) for count, digits in zip(counts, (3, 3, 2), strict=True)) == PUBLISHED[name]


def test_alignment_depth_follows_the_size():
    assert {size: depth for size, (*_, depth) in SIZES.items()} == {"T": 4, "S": 4, "B": 4, "L": 8, "XL": 8}


@pytest.mark.parametrize("cls_token_dim", [None, 12])
@pytest.mark.parametrize("z_dims", [(), (12,), (12, 20)])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_every_form_runs_forward_and_backward(cls_token_dim, z_dims, qk_norm):
    model = randomised(small(cls_token_dim=cls_token_dim, z_dims=z_dims, qk_norm=qk_norm, input_size=6))
    velocity, projected, cls_velocity = model(*inputs(model))
    assert velocity.shape == (2, 3, 6, 6) and len(projected) == len(z_dims)
    assert (cls_velocity is None) == (cls_token_dim is None)
    sum(out.square().mean() for out in (velocity, *projected, cls_velocity) if out is not None).backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused                                                   # DDP would wait for them


def test_starts_at_zero_velocity_with_blocks_as_identity():
    model = small()
    velocity, _, cls_velocity = model(*inputs(model))
    assert velocity.abs().max() == 0 and cls_velocity.abs().max() == 0
    tokens = torch.randn(2, 17, 32)
    torch.testing.assert_close(model.blocks[0](tokens, torch.randn(2, 32)), tokens)


def test_initialisation():
    """Standard deviations of the published initialisation, within five standard errors; biases zero."""
    torch.manual_seed(0)
    model = SiT_models["SiT-T/2"](input_size=8, in_channels=4, num_classes=1000, z_dims=())
    xavier = (2 / (128 + 3 * 128)) ** 0.5
    expected = {"y_embedder.embedding_table": 0.02, "t_embedder.mlp.0": 0.02, "t_embedder.mlp.2": 0.02,
                "blocks.0.attn.qkv": xavier, "x_embedder.proj": (2 / (128 + 16)) ** 0.5,
                "cls_embedder": (2 / (128 + 768)) ** 0.5}
    for name, std in expected.items():
        weight = model.get_parameter(f"{name}.weight")
        assert abs(weight.std() / std - 1) < 5 / (2 * weight.numel()) ** 0.5
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


def test_norms_have_the_published_epsilon():
    named = small(qk_norm=True).named_modules()
    eps = {name.rpartition(".")[2]: module.eps for name, module in named if isinstance(module, torch.nn.LayerNorm)}
    assert eps == {"norm1": 1e-6, "norm2": 1e-6, "norm_final": 1e-6, "cls_norm": 1e-6, "q_norm": 1e-5, "k_norm": 1e-5}


def test_projection_is_taken_after_the_named_block():
    shallow, deep = randomised(small(encoder_depth=2)), randomised(small(encoder_depth=2))
    torch.nn.init.zeros_(deep.blocks[2].attn.proj.weight)               # block 3 does not reach the output of block 2
    a, b = shallow.eval()(*inputs(shallow)), deep.eval()(*inputs(deep))
    torch.testing.assert_close(a[1][0], b[1][0])
    assert not torch.allclose(a[0], b[0])


def test_fused_attention_is_attention_written_out():
    a, b = (randomised(small(fused_attn=fused)).eval() for fused in (True, False))
    torch.testing.assert_close(a(*inputs(a))[0], b(*inputs(b))[0], atol=1e-5, rtol=1e-5)


def test_position_table_codes_rows_and_columns():
    table = position_table(8, 3).view(3, 3, 8)                          # row, column, width
    assert (table[0, :, :4] == table[2, :, :4]).all() and (table[:, 0, 4:] == table[:, 2, 4:]).all()
    omega = torch.tensor([1.0, 0.01])
    torch.testing.assert_close(table[1, 2], torch.cat([(2 * omega).sin(), (2 * omega).cos(), omega.sin(), omega.cos()]))
    model = small()
    assert model.pos_embed[0, 0].abs().max() == 0 and model.pos_embed.shape == (1, 17, 32)


def test_label_drop_rate_is_the_flag():
    torch.manual_seed(0)
    n = 20_000
    for prob in (0.0, 0.1, 0.4, 1.0):
        embedder = small(class_dropout_prob=prob).y_embedder.train()
        with torch.no_grad():
            embedder.embedding_table.weight.copy_(torch.arange(6.0)[:, None].expand(6, 32))     # a row tells its label
        kept = embedder(torch.full((n,), 2))[:, 0]
        assert set(kept.unique().tolist()) <= {2.0, 5.0}                # its own or the null label, num_classes
        assert abs((kept == 5).float().mean() - prob) <= 4 * math.sqrt(prob * (1 - prob) / n)
        assert (embedder.eval()(torch.full((n,), 2))[:, 0] == 2).all()


def test_slot_and_class_token_go_together():
    with_slot, without = small(), small(cls_token_dim=None)
    x, t, y, cls_token = inputs(with_slot)
    with pytest.raises(ValueError, match="slot"):
        with_slot(x, t, y)
    with pytest.raises(ValueError, match="slot"):
        without(x, t, y, cls_token)


def test_impossible_settings_are_refused():
    with pytest.raises(UserError, match="encoder_depth is 4, but the model has 3"):
        small(encoder_depth=4)
    with pytest.raises(UserError, match="patches of 3"):
        small(patch_size=3)
