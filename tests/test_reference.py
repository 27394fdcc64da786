"""Golden vectors recorded from the released REG and REPA programs and the original DINOv2 code."""

import inspect
import zlib
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loss import SILoss
from models.checkpoint import load_weights
from models.encoders import load_encoders
from models.interpolant import lognormal_t
from models.mmdit import MMDiT
from models.sit import SiT
from samplers import euler_maruyama_sampler, euler_sampler

DATA = Path(__file__).parent / "data"
FORWARD, SAMPLES = 1e-5, 2e-6           # relative L2; other kernels or numbers of threads move samples by 1e-7


def vectors(name: str) -> dict:
    return dict(np.load(DATA / f"{name}.npz"))


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array))


def distance(ours: torch.Tensor, theirs) -> float:
    ours, theirs = ours.detach().double(), tensor(theirs).double()
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm()).item()


def seeded(name: str, shape, scale: float = 0.05) -> torch.Tensor:
    """The weight that the recorded programs had under the released name `name`."""
    weight = scale * np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if name.endswith("gamma") or (name.endswith("weight") and len(shape) == 1):
        weight += 1
    return torch.from_numpy(weight).float()


def released_model(v: dict) -> SiT:
    """The recorded model, its weights loaded under their released names."""
    config = {key.removeprefix("config_"): value.tolist() for key, value in v.items() if key.startswith("config_")}
    slot = bool({"cls_token", "cls_latents"} & v.keys())
    model = SiT(in_channels=4, cls_token_dim=48 if slot else None, **config).eval()
    ours_to_released = {"cls_embedder.": "cls_projectors2.", "cls_norm.": "wg_norm."}
    weights = {}
    for name, value in model.state_dict().items():
        for ours, released in ours_to_released.items():
            name = name.replace(ours, released)
        weights[name] = value if name == "pos_embed" else seeded(name, value.shape)
    if "state_dict_keys" in v:
        assert set(weights) == set(v["state_dict_keys"])
    load_weights(model, weights)
    return model


@pytest.mark.parametrize("name", ["reg_forward", "repa_forward"])
@torch.no_grad()
def test_forward(name):
    v = vectors(name)
    model = released_model(v)
    cls_token = tensor(v["cls_token"]) if "cls_token" in v else None
    velocity, projected, cls_velocity = model(tensor(v["x"]), tensor(v["t"]), tensor(v["y"]), cls_token)
    assert distance(model.pos_embed, v["pos_embed"]) < 1e-7
    assert distance(velocity, v["out"]) < FORWARD
    assert distance(projected[0], v["zs0"]) < FORWARD
    if "cls_out" in v:
        assert distance(cls_velocity, v["cls_out"]) < FORWARD
    else:
        assert cls_velocity is None


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("weighting", ["uniform", "lognormal"])
@torch.no_grad()
def test_loss(path_type, weighting):
    v = vectors(f"reg_loss_{path_type}_{weighting}")
    if weighting == "lognormal":
        assert distance(lognormal_t(tensor(v["raw_draw"]), path_type), v["t"]) < FORWARD
    terms = SILoss(path_type=path_type, weighting=weighting)(
        released_model(v), tensor(v["images"]), dict(y=tensor(v["y"])), zs=[tensor(v["zs0"])],
        cls_token=tensor(v["cls_token"]), time_input=tensor(v["t"]), noises=tensor(v["noise"]),
        cls_noises=tensor(v["cls_noise"]))
    assert distance(terms.denoising, v["denoising_loss"]) < FORWARD
    assert distance(terms.proj, v["proj_loss"]) < FORWARD
    if path_type == "linear":               # on the cosine path the released program broadcasts wrongly
        assert distance(terms.cls, v["denoising_loss_cls"]) < FORWARD


SDE = ["reg_sde_nocfg", "reg_sde_cfg", "reg_sde_cfg_cls0", "reg_sde_cosine", "repa_sde_cfg"]
ODE = ["repa_ode_euler_nocfg", "repa_ode_euler_cfg", "repa_ode_heun_nocfg", "repa_ode_heun_cfg"]


@pytest.mark.parametrize("name", SDE + ODE)
def test_samples(name):
    v = vectors(name)
    names = ("num_steps", "cfg_scale", "cls_cfg_scale", "guidance_low", "guidance_high", "path_type", "heun")
    settings = {name: v[name].item() for name in names if name in v}
    if "cls_latents" in v:
        settings["cls_latents"] = tensor(v["cls_latents"])
    if name in SDE:
        noises = chain.from_iterable(zip(*(v[key] for key in ("eps", "cls_eps") if key in v), strict=True))
        settings["noise"] = lambda like: tensor(next(noises))
    sampler = euler_maruyama_sampler if name in SDE else euler_sampler
    latents, cls_token = sampler(released_model(v), tensor(v["latents"]), tensor(v["y"]), **settings)
    assert latents.dtype == torch.float64
    assert distance(latents, v["samples"]) < SAMPLES
    assert (cls_token is None) == ("cls_latents" not in v)


def test_dinov2(tmp_path):
    v = vectors("dinov2_features")
    images = F.interpolate(tensor(v["image_small"]).float(), 256, mode="bilinear").round().clamp(0, 255).to(torch.uint8)
    torch.save(dinov2_weights(v["state_dict_keys"]), tmp_path / "dinov2_vits14.pth")
    encoder, = load_encoders("dinov2-vit-s", "cpu", resolution=256, weights=[tmp_path / "dinov2_vits14.pth"])
    assert distance(encoder.preprocess(images)[..., ::8, ::8], v["preprocessed_every_8th"]) < FORWARD
    class_token, patch_tokens = encoder(images)
    assert distance(class_token, v["cls_token"]) < 1e-4
    assert distance(patch_tokens, v["patch_tokens"]) < 2e-3          # stored as float16


def dinov2_weights(names) -> dict[str, torch.Tensor]:
    """A ViT-S/14 under the original program's names (the position table of 518 px: 1 + 37 * 37 rows)."""
    width = 384
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1370, width), "mask_token": (1, width),
              "patch_embed.proj.weight": (width, 3, 14, 14), "attn.qkv.weight": (3 * width, width),
              "attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width), "mlp.fc1.weight": (4 * width, width),
              "mlp.fc1.bias": (4 * width,), "mlp.fc2.weight": (width, 4 * width)}
    weights = {}
    for name in names.tolist():
        shape = shapes.get(name) or shapes.get(name.split(".", 2)[-1]) or (width,)
        weights[name] = torch.zeros(shape) if name == "mask_token" else seeded(name, shape)
    return weights


# ---- captions --------------------------------------------------------------------------------------------------------

def released_mmdit(v: dict) -> MMDiT:
    """REPA's text-to-image network, its weights loaded under their released names."""
    config = {key.removeprefix("config_"): value.tolist() for key, value in v.items() if key.startswith("config_")}
    model = MMDiT(cls_token_dim=None, **{name: config[name] for name in inspect.signature(MMDiT).parameters
                                         if name in config}).eval()
    described = dict(np.load(DATA / "mmdit_forward.npz"))
    keys, shapes = described["state_dict_keys"].tolist(), described["state_dict_shapes"].tolist()
    weights = {name: seeded(name, [int(side) for side in shape.split("x")], 0.1)
               for name, shape in zip(keys, shapes, strict=True)}
    if not len(model.projectors):
        weights = {name: weight for name, weight in weights.items() if not name.startswith("projectors.")}
    load_weights(model, weights | {"pos_embed": tensor(described["pos_embed"])})
    return model


def test_mmdit_forward():
    v = vectors("mmdit_forward")
    model = released_mmdit(v)
    with torch.no_grad():
        velocity, projected, cls_velocity = model(tensor(v["x"]), tensor(v["t"]), tensor(v["context"]))
    assert distance(velocity, v["out"]) < FORWARD and distance(projected[0], v["zs0"]) < FORWARD
    assert cls_velocity is None


def test_mmdit_loss():
    v = vectors("mmdit_loss")
    terms = SILoss()(released_mmdit(v), tensor(v["images"]), dict(context=tensor(v["context"])), zs=[tensor(v["zs0"])],
                     time_input=tensor(v["t"]), noises=tensor(v["noise"]))
    assert distance(terms.denoising, v["denoising_loss"]) < FORWARD and terms.cls is None
    assert abs(terms.proj.item() - v["proj_loss"].item()) < FORWARD


@pytest.mark.parametrize("name", ["mmdit_ode_euler_cfg", "mmdit_sde_nocfg", "mmdit_sde_cfg"])
def test_mmdit_samples(name):
    v = vectors(name)
    settings = {key: v[key].item() for key in ("num_steps", "cfg_scale", "guidance_low", "guidance_high") if key in v}
    given = dict(condition=tensor(v["context"]), null=tensor(v["null_context"]), **settings)
    if "eps" in v:
        drawn = iter(tensor(v["eps"]))
        samples, _ = euler_maruyama_sampler(released_mmdit(v), tensor(v["latents"]), noise=lambda _: next(drawn),
                                            **given)
    else:
        samples, _ = euler_sampler(released_mmdit(v), tensor(v["latents"]), **given)
    assert distance(samples, v["samples"]) < FORWARD
