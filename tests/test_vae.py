"""The latent codec: diffusers' convention, numbers that must agree, and what is refused."""

import copy
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.vae import PIECE, Codec, LatentSpace, load_codec, read_space
from runtime.messages import UserError
from runtime.speed import compile_parts

WEIGHTS = "diffusion_pytorch_model.safetensors"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def codec(vae_folder):
    return load_codec(str(vae_folder))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_images(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_numbers_are_read_from_the_config(codec, vae_folder):
    assert codec.space == LatentSpace(vae=str(vae_folder), scale=0.5, shift=0.1, channels=4, downsampling=4)


def test_encode_gives_the_posterior(codec):
    images = draw_images(2, 3, 32, 32)
    posterior = codec.vae.encode(images / 127.5 - 1).latent_dist
    torch.testing.assert_close(codec.encode(images), torch.cat([posterior.mean, posterior.std], dim=1))


def test_latents_are_normalised_draws_of_the_posterior():
    space = LatentSpace(scale=0.5, shift=0.25)
    moments = torch.cat([torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 2.0)], dim=1).half()
    latents = space.latents(moments, torch.full((1, 4, 2, 2), -1.0))
    assert latents.dtype == torch.float32 and (latents == (3 - 2 - 0.25) * 0.5).all()


def test_sample_draws_with_the_moments_mean_and_std():
    """Of n draws the mean is off by std / sqrt(n), the std by std / sqrt(2n); five of each are allowed."""
    space, side = LatentSpace(scale=0.5, shift=0.25), 100
    moments = torch.cat([torch.full((1, 4, side, side), 3.0), torch.full((1, 4, side, side), 2.0)], dim=1)
    torch.manual_seed(0)
    drawn, again = space.sample(moments), space.sample(moments)
    n = drawn.numel()
    assert drawn.shape == (1, 4, side, side) and not torch.equal(drawn, again)
    assert abs(drawn.mean() - (3 - 0.25) * 0.5) < 5 * 1 / n**0.5 and abs(drawn.std() - 2 * 0.5) < 5 * 1 / (2 * n)**0.5
    torch.manual_seed(0)
    assert torch.equal(space.sample(moments), drawn)


def test_decode_undoes_the_normalisation_and_truncates(codec):
    raw = draw(2, 4, 8, 8)
    floor = (127.5 * codec.vae.decode(raw).sample + 127.5).clamp(0, 255).floor()
    ours = codec.decode((raw - codec.space.shift) * codec.space.scale)
    assert ours.dtype == torch.uint8 and ours.shape == (2, 3, 32, 32)
    assert (ours.float() != floor).float().mean() < 1e-3                          # (raw - shift) * scale rounds
    assert (ours.float() - floor).abs().max() <= 1


def test_large_batches_are_split_to_the_same_bits(codec):
    latents, images = draw(2 * PIECE + 3, 4, 2, 2), draw_images(PIECE + 3, 3, 8, 8)
    assert torch.equal(codec.decode(latents), torch.cat([codec.decode(piece) for piece in latents.split(PIECE)]))
    assert torch.equal(codec.encode(images), torch.cat([codec.encode(piece) for piece in images.split(PIECE)]))


def test_compiled_in_bf16_is_no_further_from_float32():
    """Fused kernels compute steps in float32 that bf16 rounds one by one."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    smallest = AutoencoderKL(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
                             mid_block_add_attention=False)
    exact, plain, compiled = (Codec(copy.deepcopy(smallest).eval(), "the smallest") for _ in range(3))
    plain.in_bf16()
    assert compile_parts(compiled.in_bf16().vae)
    images = draw_images(2, 3, 16, 16)
    found, rounded, fused = (one.encode(images) for one in (exact, plain, compiled))
    assert 0 < (found - fused).abs().mean() < 1.5 * (found - rounded).abs().mean()


def test_bf16_decodes_nearly_the_same():
    """bf16 rounds by up to 2^-9 of a value after each layer of the decoder, and the pixels are of the order of 1.

    Independent roundings add up to the root of their number, the worst ones to their number; truncation adds one level.
    """
    folder = str(ROOT / "toy" / "networks" / "vae")
    exact, fast = load_codec(folder), load_codec(folder).in_bf16()
    latents = draw(8, 4, 8, 8)
    a, b = exact.decode(latents), fast.decode(latents)
    rounding_layers = torch.nn.Conv2d | torch.nn.Linear | torch.nn.GroupNorm
    layers = sum(isinstance(module, rounding_layers) for module in exact.vae.decoder.modules())
    difference, rounding = (a.float() - b.float()).abs(), 2**-9 * 127.5
    assert b.dtype == torch.uint8 and (a != b).any()
    assert difference.mean() < rounding * layers**0.5 and difference.max() <= rounding * layers + 1


def test_the_recipe_encodes_with_mse_and_decodes_with_ema():
    assert LatentSpace().decoder == "stabilityai/sd-vae-ft-ema"
    assert LatentSpace(vae="my/vae").decoder == "my/vae"


def test_a_missing_shift_is_zero(vae_folder, tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(vae_folder)
    vae.register_to_config(shift_factor=None)
    vae.save_pretrained(tmp_path)
    assert load_codec(str(tmp_path)).space.shift == 0


# ------------------------------------------------------------------------------------------------------------- records

@pytest.mark.parametrize("name", ["scale", "shift", "channels", "downsampling"])
def test_numbers_must_agree_and_names_may_differ(name):
    space = LatentSpace()
    space.require_same(dataclasses.replace(space, vae="another/name"), "a", "b")
    with pytest.raises(UserError, match=name):
        space.require_same(dataclasses.replace(space, **{name: 9}), "the data set", "the decoder")


def test_read_space_returns_the_recorded_space_and_the_images_side():
    space = LatentSpace("my/vae", scale=1.5, shift=-0.5, channels=16, downsampling=4)
    for side in (32, None):                                       # given, and taken from the moments
        assert read_space(space.to_record(), (32, 8, 8), side, "DATA") == (space, 32)


def test_without_a_record_the_space_is_the_default_with_a_notice(capsys):
    assert read_space(None, (8, 32, 32), None, "DATA") == (LatentSpace(), 256)
    assert "DATA" in capsys.readouterr().err


RECORD = LatentSpace().to_record()


@pytest.mark.parametrize("field, value", [
    ("vae", 3), ("vae", "x" * 300), ("vae", "a\nb"), ("downsampling", 10**9), ("scale", 0), ("scale", "1"),
    ("scale", float("nan")), ("scale", None), ("shift", 10**400), ("channels", True),
    ("channels", 0), ("downsampling", -8), ("downsampling", 8.0)])
def test_a_record_with_a_wrong_number_is_refused(field, value):
    with pytest.raises(UserError, match=f"DATA.*{field}"):
        read_space({**RECORD, field: value}, (8, 32, 32), 256, "DATA")


@pytest.mark.parametrize("record", [{}, [], "ema", {name: RECORD[name] for name in RECORD if name != "shift"}])
def test_an_incomplete_record_is_refused(record):
    with pytest.raises(UserError, match="DATA"):
        read_space(record, (8, 32, 32), 256, "DATA")


@pytest.mark.parametrize("shape, side", [((16, 32, 32), 256), ((8, 32, 32), 128), ((8, 32, 32), 257)])
def test_moments_that_do_not_fit_the_images_are_refused(shape, side):
    with pytest.raises(UserError, match="DATA.*moments"):
        read_space(RECORD, shape, side, "DATA")


# ------------------------------------------------------------------------------------------------------------- loading

# "ema" is not in the test's cache
@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "ema", "x" * 300, "a/" + "x" * 300])
def test_an_unknown_vae_is_refused_by_name(name):
    with pytest.raises(UserError, match=name):
        load_codec(name)


def test_a_folder_without_a_vae_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        load_codec(str(tmp_path))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 167335342\n"


@pytest.mark.parametrize(("change", "word"), [
    (lambda folder: shutil.move(folder / WEIGHTS, folder / "diffusion_pytorch_model.fp16.safetensors"), "fp16"),
    (lambda folder: (folder / WEIGHTS).write_text(POINTER), "git lfs pull"),
    (lambda folder: shutil.move(shutil.copytree(folder, folder / "vae") / ".." / "config.json", folder / "x.json"),
     "name .*vae/vae$"),
    (lambda folder: (folder / WEIGHTS).unlink(), "safetensors"),
    (lambda folder: (folder / "config.json").write_text("[" * 10**5), "no readable AutoencoderKL"),
])
def test_a_folders_fault_is_named(vae_folder, tmp_path, change, word):
    """Of a pipeline with the VAE inside, a clone without git-lfs, and a download of the fp16 variant alone."""
    folder = shutil.copytree(vae_folder, tmp_path / "vae")
    change(folder)
    with pytest.raises(UserError, match=word):
        load_codec(str(folder))


def test_weights_of_torch_save_are_read(vae_folder, tmp_path, codec):
    folder = shutil.copytree(vae_folder, tmp_path / "vae")
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    latents = draw(1, 4, 8, 8)
    assert torch.equal(load_codec(str(folder)).decode(latents), codec.decode(latents))


def test_the_hubs_cache_serves_offline(vae_folder, tmp_path):
    """VAE and encoder by their hub names, from a cache as the hub's client leaves it, without a network."""
    import timm

    encoder = timm.create_model("vit_small_patch14_dinov2.lvd142m", num_classes=0)

    def snapshot(repository: str) -> Path:
        folder = tmp_path / "hub" / f"models--{repository}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
        return folder / "snapshots" / ("0" * 40)

    shutil.copytree(vae_folder, snapshot("stabilityai--sd-vae-ft-ema"), dirs_exist_ok=True)
    save_file(encoder.state_dict(), snapshot("timm--vit_small_patch14_dinov2.lvd142m") / "model.safetensors")
    program = ("from models.vae import load_codec; from models.encoders import load_encoders\n"
               "encoder = load_encoders('dinov2-vit-s', 'cpu', resolution=64)[0]\n"
               "print(load_codec('ema').space.scale, encoder.model.cls_token.sum().item())")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True,
                          env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    scale, total = map(float, done.stdout.split())
    assert scale == 0.5 and total == encoder.cls_token.sum().item()
