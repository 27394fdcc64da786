"""The latent codec: diffusers' convention, and numbers that must agree."""

import copy
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.vae import PIECE, Codec, LatentSpace, load_codec
from runtime.messages import UserError
from runtime.speed import compile_parts


@pytest.fixture(scope="module")
def codec(vae_folder):
    return load_codec(str(vae_folder))


def test_numbers_come_from_the_config(codec, vae_folder):
    assert codec.space == LatentSpace(vae=str(vae_folder), scale=0.5, shift=0.1, channels=4, downsampling=4)
    assert LatentSpace.from_record(codec.space.to_record()) == codec.space


def test_encode_gives_the_posterior(codec):
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    posterior = codec.vae.encode(images / 127.5 - 1).latent_dist
    torch.testing.assert_close(codec.encode(images), torch.cat([posterior.mean, posterior.std], dim=1))


def test_latents_are_normalised_samples_of_the_posterior():
    space = LatentSpace(scale=0.5, shift=0.25)
    moments = torch.cat([torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 2.0)], dim=1).half()
    latents = space.latents(moments, torch.full((1, 4, 2, 2), -1.0))
    assert latents.dtype == torch.float32 and (latents == (3 - 2 - 0.25) * 0.5).all()


def test_decode_undoes_the_normalisation_and_truncates(codec):
    raw = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels = 127.5 * codec.vae.decode(raw).sample + 127.5
    ours = codec.decode((raw - codec.space.shift) * codec.space.scale)
    assert ours.dtype == torch.uint8 and ours.shape == (2, 3, 32, 32)
    floor = pixels.clamp(0, 255).floor()
    assert (ours.float() != floor).float().mean() < 1e-3 and (ours.float() - floor).abs().max() <= 1   # (raw - shift) * scale rounds


def test_decoding_in_pieces_gives_the_same_bits(codec, monkeypatch):
    """Of a fixed size, the last smaller."""
    latents, sizes = torch.randn(2 * PIECE + 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)), []
    alone = torch.cat([codec.decode(piece) for piece in latents.split(PIECE)])
    decode = codec.vae.decode
    monkeypatch.setattr(codec.vae, "decode", lambda raw: sizes.append(len(raw)) or decode(raw))
    assert (codec.decode(latents) == alone).all() and sizes == [PIECE, PIECE, 3]


def test_encoding_in_pieces_gives_the_same_bits(codec, monkeypatch):
    images, sizes = torch.randint(256, (PIECE + 3, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), []
    alone = torch.cat([codec.encode(piece) for piece in images.split(PIECE)])
    encode = codec.vae.encode
    monkeypatch.setattr(codec.vae, "encode", lambda x: sizes.append(len(x)) or encode(x))
    assert (codec.encode(images) == alone).all() and sizes == [PIECE, 3]


def test_compiled_in_bf16_is_bf16():
    """The same numbers but for roundings: fused, several steps are computed in float32 where bf16 rounded after each of them."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    smallest = AutoencoderKL(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False)
    exact, plain, compiled = (Codec(copy.deepcopy(smallest).eval(), "the smallest") for _ in range(3))
    plain.in_bf16()
    assert compile_parts(compiled.in_bf16().vae)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    for found in ([codec.encode(images) for codec in (exact, plain, compiled)],
                  [codec.decode(latents).float() for codec in (exact, plain, compiled)]):
        away = [(found[0] - other).abs().mean() for other in found[1:]]
        assert 0 < away[1] < 1.5 * away[0]                        # no further from float32 than bf16 is by itself


def test_bf16_decodes_nearly_the_same():
    """bf16 rounds by up to 2^-9 of a value after each layer of the decoder, and the pixels are of the order of 1.

    Independent roundings add up to the root of their number, the worst ones to their number; truncation adds one level.
    """
    folder = str(Path(__file__).parents[1] / "toy" / "networks" / "vae")
    exact, fast = load_codec(folder), load_codec(folder).in_bf16()
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    a, b = exact.decode(latents), fast.decode(latents)
    layers = sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear | torch.nn.GroupNorm) for m in exact.vae.decoder.modules())
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


@pytest.mark.parametrize("name", ["scale", "shift", "channels", "downsampling"])
def test_a_difference_in_any_number_is_an_error(name):
    space = LatentSpace()
    space.require_same(dataclasses.replace(space, vae="another/name"), "a", "b")
    with pytest.raises(UserError, match=f"the data set has latent {name}"):
        space.require_same(dataclasses.replace(space, **{name: 9}), "the data set", "the decoder")


@pytest.mark.parametrize(("name", "sentence"), [
    ("no/such/folder", "no VAE at"), ("./nothing", "no VAE at"), ("ema", "neither a folder nor reachable")])
def test_unknown_vae(name, sentence):
    with pytest.raises(UserError, match=sentence):
        load_codec(name)


def test_the_hubs_cache_serves_offline(vae_folder, tmp_path):
    """VAE and encoder by their hub names, from a cache as the hub's client leaves it, with no network."""
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
               "print(load_codec('ema').space.scale, load_encoders('dinov2-vit-s', 'cpu', resolution=64)[0].model.cls_token.sum().item())")
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True,
                          env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    scale, total = map(float, done.stdout.split())
    assert scale == 0.5 and total == encoder.cls_token.sum().item()


def test_a_folder_without_a_vae(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        load_codec(str(tmp_path))
