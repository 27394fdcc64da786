"""The latent codec: diffusers' convention, and numbers that must agree."""

import dataclasses
import math
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from models.encoders import load_encoder
from models.vae import PIECE, LatentSpace, load_codec, read_space
from runtime.messages import UserError
from tests.conftest import random_images

SPACE = LatentSpace(vae="a", scale=0.5, shift=0.1, channels=4, downsampling=4)


@pytest.fixture(scope="module")
def codec(vae_folder):
    return load_codec(str(vae_folder))


def images_of(count: int, side: int) -> torch.Tensor:
    return torch.from_numpy(random_images(count, side, side)).permute(0, 3, 1, 2)


def random_latents(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# ---- the latent space ------------------------------------------------------------------------------------------------

def test_numbers_come_from_the_config(codec, vae_folder):
    assert codec.space == dataclasses.replace(SPACE, vae=str(vae_folder))
    assert LatentSpace.from_record(codec.space.to_record()) == codec.space


def test_a_missing_shift_is_zero(codec, tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_config(dict(codec.vae.config) | {"shift_factor": None})
    vae.save_pretrained(tmp_path)
    assert load_codec(str(tmp_path)).space.shift == 0


def test_latents_are_normalised_samples_of_the_posterior():
    space = LatentSpace(scale=0.5, shift=0.25)
    moments = torch.cat([torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), 2.0)], dim=1).half()
    latents = space.latents(moments, torch.full((1, 4, 2, 2), -1.0))
    assert latents.dtype == torch.float32 and (latents == (3 - 2 - 0.25) * 0.5).all()


def test_sampled_latents_have_the_posteriors_mean_and_std():
    torch.manual_seed(0)
    moments = torch.cat([torch.full((1, 4, 64, 64), 3.0), torch.full((1, 4, 64, 64), 2.0)], dim=1)
    drawn = SPACE.sample(moments)                                 # 16,384 numbers: 5 standard errors are 0.04 and 0.03
    assert abs(drawn.mean() - (3 - 0.1) * 0.5) < 0.04 and abs(drawn.std() - 2 * 0.5) < 0.03


def test_the_recipe_encodes_with_mse_and_decodes_with_ema():
    assert LatentSpace().decoder == "stabilityai/sd-vae-ft-ema"
    assert LatentSpace(vae="my/vae").decoder == "my/vae"


@pytest.mark.parametrize("name", ["scale", "shift", "channels", "downsampling"])
def test_a_difference_in_any_number_is_an_error(name):
    SPACE.require_same(dataclasses.replace(SPACE, vae="another/name"), "a", "b")
    with pytest.raises(UserError, match=f"the data set has latent {name}"):
        SPACE.require_same(dataclasses.replace(SPACE, **{name: 9}), "the data set", "the decoder")


@pytest.mark.parametrize("change", [
    {"vae": 1}, {"scale": math.nan}, {"scale": "0.5"}, {"scale": 10**400}, {"shift": -math.inf}, {"shift": None},
    {"channels": 0}, {"channels": True}, {"channels": 4.0}, {"downsampling": -8}, None, [], "text"])
def test_a_record_with_impossible_values(change):
    record = {**SPACE.to_record(), **change} if isinstance(change, dict) else change
    with pytest.raises(UserError, match="images: the VAE's .* encode the data set again"):
        LatentSpace.from_record(record, "images")


def test_the_resolution_follows_from_images_or_moments(capsys):
    assert read_space(SPACE.to_record(), (8, 8, 8), 32, "data") == (SPACE, 32)
    assert read_space(SPACE.to_record(), (8, 16, 16), None, "data") == (SPACE, 64)
    assert not capsys.readouterr().err
    assert read_space(None, (8, 32, 32), None, "data") == (LatentSpace(), 256)    # of another program
    assert "data: does not record its VAE" in capsys.readouterr().err


@pytest.mark.parametrize("shape, side", [((8, 8, 8), 64), ((8, 8, 8), 33), ((4, 8, 8), 32), ((8, 4, 4), 32)])
def test_moments_that_do_not_fit_their_vae(shape, side):
    with pytest.raises(UserError, match="data: moments of shape .* encode the images again"):
        read_space(SPACE.to_record(), shape, side, "data")


# ---- the codec -------------------------------------------------------------------------------------------------------

def test_encode_gives_the_posterior(codec):
    images = images_of(2, 32)
    posterior = codec.vae.encode(images / 127.5 - 1).latent_dist
    torch.testing.assert_close(codec.encode(images), torch.cat([posterior.mean, posterior.std], dim=1))


def test_decode_undoes_the_normalisation_and_truncates(codec):
    raw = random_latents(2, 4, 8, 8)
    floor = (127.5 * codec.vae.decode(raw).sample + 127.5).clamp(0, 255).floor()
    ours = codec.decode((raw - codec.space.shift) * codec.space.scale)            # which rounds
    assert ours.dtype == torch.uint8 and ours.shape == (2, 3, 32, 32)
    assert (ours.float() != floor).float().mean() < 1e-3 and (ours.float() - floor).abs().max() <= 1


def test_pieces_give_the_same_bits_as_small_batches(codec):
    """Of a fixed size, the last smaller."""
    images, latents = images_of(PIECE + 3, 8), random_latents(2 * PIECE + 3, 4, 2, 2)
    assert (codec.encode(images) == torch.cat([codec.encode(piece) for piece in images.split(PIECE)])).all()
    assert (codec.decode(latents) == torch.cat([codec.decode(piece) for piece in latents.split(PIECE)])).all()


def test_bf16_decodes_nearly_the_same():
    """bf16 rounds by up to 2^-9 of a value after each layer of the decoder, and the pixels are of the order of 1.

    Independent roundings add up to the root of their number, the worst ones to their number; truncation adds one level.
    """
    folder = str(Path(__file__).parents[1] / "toy" / "networks" / "vae")
    exact, fast = load_codec(folder), load_codec(folder).in_bf16()
    latents = random_latents(8, 4, 8, 8)
    a, b = exact.decode(latents), fast.decode(latents)
    layers = sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear | torch.nn.GroupNorm)
                 for m in exact.vae.decoder.modules())
    difference, rounding = (a.float() - b.float()).abs(), 2**-9 * 127.5
    assert b.dtype == torch.uint8 and (a != b).any()
    assert difference.mean() < rounding * layers**0.5 and difference.max() <= rounding * layers + 1


# ---- loading ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, word", [("no/such/folder", "no VAE at"), ("./nothing", "no VAE at"),
                                        ("ema", "neither on the hub")])
def test_unknown_vae(name, word):
    with pytest.raises(UserError, match=word):
        load_codec(name)


def test_a_folder_without_a_vae(tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        load_codec(str(tmp_path))


def test_the_hubs_cache_serves_offline(vae_folder):
    """VAE and encoder by their hub names, from a cache as the hub's client leaves it; conftest.py forbids the network.
    """
    import timm

    encoder = timm.create_model("vit_small_patch14_dinov2.lvd142m", num_classes=0, img_size=56)
    hub, made = Path(huggingface_hub.constants.HF_HUB_CACHE), []

    def snapshot(repository: str) -> Path:
        made.append(hub / f"models--{repository}")
        (made[-1] / "refs").mkdir(parents=True)
        (made[-1] / "refs" / "main").write_text("0" * 40)
        (made[-1] / "snapshots" / ("0" * 40)).mkdir(parents=True)
        return made[-1] / "snapshots" / ("0" * 40)

    try:
        shutil.copytree(vae_folder, snapshot("stabilityai--sd-vae-ft-ema"), dirs_exist_ok=True)
        save_file(encoder.state_dict(), snapshot("timm--vit_small_patch14_dinov2.lvd142m") / "model.safetensors")
        assert load_codec("ema").space.scale == 0.5
        assert (load_encoder("dinov2-vit-s", "cpu", resolution=64).model.cls_token == encoder.cls_token).all()
    finally:
        for folder in made:
            shutil.rmtree(folder)
