"""Frozen encoders: one interface over timm."""

import argparse
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from models.encoders import ENCODERS, encoder_ids, load_encoders, require_class_tokens, same_encoders, to_grid
from runtime.messages import UserError

IMAGES = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
NO_CLASS_TOKEN = {"jepa-vit-h", "siglip2-vit-b"}


@pytest.mark.parametrize("name", ENCODERS)
def test_every_name_builds_with_its_shapes(name):
    """On the meta device: shapes without weights."""
    with torch.device("meta"):
        encoder, = load_encoders(name, "meta", resolution=256, pretrained=False)
        class_token, patches = encoder(torch.zeros(2, 3, 256, 256, dtype=torch.uint8))
    assert patches.shape == (2, 256, encoder.embed_dim)
    assert (class_token is None) == (name in NO_CLASS_TOKEN) == (not encoder.has_class_token)
    if class_token is not None:
        assert class_token.shape == (2, encoder.embed_dim)
    assert encoder.input_size == (224 if "patch14" in ENCODERS[name].timm_name else 256)
    assert all(timm.is_model(spec.timm_name.split(".")[0]) for spec in ENCODERS.values())


def test_prefix_tokens_are_not_patches():
    encoder, = load_encoders("dinov2reg-vit-s", "cpu", resolution=64, pretrained=False)
    # class token, 4 registers, 16 patches
    tokens = encoder.model.forward_features(encoder.preprocess(IMAGES))
    class_token, patches = encoder(IMAGES)
    assert tokens.shape[1] == 1 + 4 + 16
    torch.testing.assert_close(class_token, tokens[:, 0])
    torch.testing.assert_close(patches, tokens[:, 5:])


@pytest.mark.parametrize("name", ["clip-vit-b", "mae-vit-b"])
def test_patches_before_the_norm_and_class_token_after(name):
    encoder, = load_encoders(name, "cpu", resolution=64, pretrained=False)
    torch.nn.init.constant_(encoder.model.norm.weight, 2.0)
    class_token, patches = encoder(IMAGES)
    tokens = encoder.model.forward_features(encoder.preprocess(IMAGES))
    torch.testing.assert_close(class_token, tokens[:, 0])
    torch.testing.assert_close(encoder.model.norm(patches), tokens[:, 1:])


def test_preprocessing():
    encoder, = load_encoders("siglip2-vit-b", "cpu", resolution=64, pretrained=False)
    # mean = std = 0.5, patch 16: no resize
    torch.testing.assert_close(encoder.preprocess(IMAGES), IMAGES / 127.5 - 1)
    encoder, = load_encoders("dinov2-vit-s", "cpu", resolution=64, pretrained=False)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(encoder.preprocess(IMAGES),
                               F.interpolate((IMAGES / 255 - mean) / std, 56, mode="bicubic"))


def test_tokens_on_the_grid_of_sit():
    encoder, = load_encoders("dinov2-vit-s", "cpu", resolution=64, pretrained=False)       # own grid: 4 x 4
    own = encoder(IMAGES)[1]
    three, = load_encoders("dinov2-vit-s", "cpu", resolution=64, pretrained=False, grid=3)
    three.model.load_state_dict(encoder.model.state_dict())
    # 4 -> 3: floor(4i/3) to ceil(4(i+1)/3)
    windows = [slice(0, 2), slice(1, 3), slice(2, 4)]
    pooled = [own.view(2, 4, 4, -1)[:, row, column].mean(dim=(1, 2)) for row in windows for column in windows]
    torch.testing.assert_close(three(IMAGES)[1], torch.stack(pooled, dim=1))
    maps = own.transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(to_grid(own, 8), F.interpolate(maps, 8, mode="bilinear").flatten(2).transpose(1, 2))


def test_local_folder(encoder_folder):
    encoder, = load_encoders(f"local-dir:{encoder_folder}", "cpu", resolution=32, grid=4)
    assert encoder.embed_dim == 32 and encoder.input_size == 32
    for name, value in load_file(encoder_folder / "model.safetensors").items():
        assert (encoder.model.state_dict()[name] == value).all()
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.training
    class_token, patches = encoder(IMAGES[..., :32, :32])
    assert class_token.shape == (2, 32) and patches.shape == (2, 16, 32)
    # the folder's mean, std
    torch.testing.assert_close(encoder.preprocess(IMAGES[..., :32, :32]), IMAGES[..., :32, :32] / 127.5 - 1)


def test_weights_from_files_in_the_order_of_the_list(encoder_folder, tmp_path):
    name = f"local-dir:{encoder_folder}"
    other = {key: value + 1 for key, value in load_file(encoder_folder / "model.safetensors").items()}
    torch.save(other, tmp_path / "other.pth")
    files = [encoder_folder / "model.safetensors", tmp_path / "other.pth"]
    for weights in (files, ",".join(map(str, files))):
        first, second = load_encoders(f"{name},{name}", "cpu", resolution=32, weights=weights)
        assert (second.model.cls_token == first.model.cls_token + 1).all()


def test_moco_v3_files(tmp_path):
    """12 heads in the small model, and names below module.base_encoder."""
    encoder, = load_encoders("mocov3-vit-s", "cpu", resolution=64, pretrained=False)
    assert encoder.model.blocks[0].attn.num_heads == 12
    state = {f"module.base_encoder.{name}": value for name, value in encoder.model.state_dict().items()}
    torch.save({"state_dict": {**state, "module.predictor.0.weight": torch.zeros(2)}}, tmp_path / "moco.pth.tar")
    loaded, = load_encoders("mocov3-vit-s", "cpu", resolution=64, weights=[tmp_path / "moco.pth.tar"])
    torch.testing.assert_close(loaded(IMAGES)[0], encoder(IMAGES)[0])


def test_position_table_is_resampled(tmp_path):
    encoder, = load_encoders("dinov2-vit-s", "cpu", resolution=64, pretrained=False)
    torch.save(encoder.model.state_dict(), tmp_path / "4x4.pth")
    larger, = load_encoders("dinov2-vit-s", "cpu", resolution=128, weights=[tmp_path / "4x4.pth"])
    assert larger.model.pos_embed.shape[1] == 64 + encoder.model.pos_embed.shape[1] - 16


@pytest.mark.parametrize(("enc_type", "settings", "word"), [
    ("dino", {}, "unknown encoder"), ("local-dir:nowhere", {}, "config.json: missing"),
    ("mocov3-vit-b", {}, "no weights on the hub"), ("dinov2-vit-s", {}, "model.safetensors"),  # the hub is out of reach
    ("dinov2-vit-s", {"weights": ["nowhere.pth"]}, "no such file"),
    ("dinov2-vit-s,dinov2-vit-b", {"weights": ["a"]}, "1 files for 2 encoders"),
    ("dinov2-vit-s", {"weights": "{}/part.pth"}, "not the weights of dinov2-vit-s"),
    ("dinov2-vit-s", {"weights": "{}/broken.pth"}, "not the weights of dinov2-vit-s"),
    ("dinov2-vit-s", {"weights": "{}/code.pth"}, "not the weights of dinov2-vit-s"),
    ("local-dir:{}/convnet", {}, "no vision transformer"),
])
def test_mistakes_are_refused(tmp_path, capsys, enc_type, settings, word):
    torch.save({"cls_token": torch.zeros(1, 1, 384)}, tmp_path / "part.pth")
    (tmp_path / "broken.pth").write_bytes(b"not weights")
    torch.save({"cls_token": Printed()}, tmp_path / "code.pth")
    (tmp_path / "convnet").mkdir()
    (tmp_path / "convnet" / "config.json").write_text('{"architecture": "resnet18", "pretrained_cfg": {}}')
    settings = {name: value.format(tmp_path) if isinstance(value, str) else value for name, value in settings.items()}
    with pytest.raises(UserError, match=word):
        load_encoders(enc_type.format(tmp_path), "cpu", resolution=64, **settings)
    assert "code was run" not in capsys.readouterr().out


def test_weights_of_a_parallel_compiled_and_averaged_network(tmp_path):
    """Under the names of DataParallel and torch.compile, in timm's training checkpoint, with a head."""
    encoder, = load_encoders("dinov2-vit-s", "cpu", resolution=64, pretrained=False)
    state = {f"module._orig_mod.{name}": value for name, value in encoder.model.state_dict().items()}
    state = {**state, "module._orig_mod.head.weight": torch.zeros(2)}
    args = argparse.Namespace(device=torch.device("cuda"), folder=tmp_path)
    torch.save({"state_dict": {}, "state_dict_ema": state, "args": args}, tmp_path / "x.pth")
    loaded, = load_encoders("dinov2-vit-s", "cpu", resolution=64, weights=[tmp_path / "x.pth"])
    torch.testing.assert_close(loaded(IMAGES)[0], encoder(IMAGES)[0])


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_a_folder_of_timm_with_and_without_safetensors(tmp_path, architecture):
    """What timm itself makes of the folder; the second has buffers that no file holds."""
    torch.manual_seed(0)
    size = dict(img_size=64, embed_dim=32, depth=2, num_heads=2)
    timm.models.save_for_hf(timm.create_model(architecture, **size, num_classes=5), tmp_path, model_args=size,
                            safe_serialization=True)
    expected = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    for name in ("model.safetensors", "pytorch_model.bin"):
        encoder, = load_encoders(f"local-dir:{tmp_path}", "cpu", resolution=64)
        x = encoder.preprocess(IMAGES)
        torch.testing.assert_close(encoder.model(x), expected(x), rtol=0, atol=0)
        if name == "model.safetensors":
            torch.save(load_file(tmp_path / name), tmp_path / "pytorch_model.bin")
            (tmp_path / name).unlink()


def test_what_identifies_encoders(encoder_folder, tmp_path):
    """A local encoder its files, wherever they are; a known one its name, and its file if both were given one."""
    moved = shutil.copytree(encoder_folder, tmp_path / "moved")
    here, there = (encoder_ids(f"local-dir:{folder},dinov2-vit-b", None) for folder in (encoder_folder, moved))
    assert here == there and same_encoders(here, there)
    file = moved / "model.safetensors"
    given = encoder_ids(f"local-dir:{encoder_folder},dinov2-vit-b", f"{file},{file}")
    assert same_encoders(here, given) and given[1] != here[1]     # the hub's weights may be given as a file
    save_file({"a": torch.zeros(1)}, file)
    other = encoder_ids(f"local-dir:{moved},dinov2-vit-b", f",{file}")
    assert not same_encoders(here, other) and not same_encoders(given, other)
    assert not any(same_encoders(before, here) for before in (here[::-1], here[:1]))


class Printed:
    """Prints when it is unpickled."""

    def __reduce__(self):
        return print, ("code was run",)


def test_reg_needs_a_class_token():
    with torch.device("meta"):
        encoders = load_encoders("dinov2-vit-s,siglip2-vit-b", "meta", pretrained=False)
    require_class_tokens(encoders[:1])
    with pytest.raises(UserError, match="siglip2-vit-b: no class token"):
        require_class_tokens(encoders)
