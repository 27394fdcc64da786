"""Feature extractors: weights that are the published ones, timm folders, DINOv2, and full float32 around each of them."""

import json
import shutil
import urllib.error

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from evaluations import features
from evaluations.features import Extractor, load_extractor
from models import encoders
from models.encoders import Spec, sha256_of_parameters
from runtime.messages import UserError
from tests.conftest import TinyInception, random_images, tf32_and_autocast


def channels_first(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


# --- Inception's weights ---------------------------------------------------------------------------------------------------------


def test_unknown_weights_are_used_when_given_and_recorded(weights_file, random_state, capsys):
    extractor = load_extractor("inception", "cpu", weights_file)
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1 and "is not the published Inception" in sentence and "not comparable to papers'" in sentence
    assert extractor.weights_verified is False and extractor.weights_sha256 == features.sha256(weights_file)
    assert (extractor.name, extractor.key, extractor.label, extractor.is_inception) == ("inception", "fid", "FID", True)
    state = extractor.network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in random_state.items())
    assert not extractor.network.training and not any(p.requires_grad for p in extractor.network.parameters())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of torch hub's cached files, empty and out of the network's reach."""
    def unreachable(url, path, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    return tmp_path / "checkpoints"


def test_a_file_without_batch_counters_is_accepted(random_state, tmp_path):
    """As converters write it."""
    state = {key: value for key, value in random_state.items() if not key.endswith("num_batches_tracked")}
    assert len(random_state) == 566 and len(state) == 472
    torch.save(state, tmp_path / "472.pth")
    loaded = load_extractor("inception", inception_weights=tmp_path / "472.pth").network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("name", features.INCEPTION_FILES)
def test_the_published_hash_is_verified_under_either_name(tiny_inception, tiny_weights, hub, name, capsys):
    hub.mkdir()
    torch.save(TinyInception().state_dict(), hub / name)
    with pytest.raises(UserError, match=f"{name} is damaged .*delete it, then download"):
        load_extractor("inception")
    shutil.copy(tiny_weights, hub / name)
    for extractor in (load_extractor("inception"), load_extractor("inception", inception_weights=hub / name)):
        assert extractor.weights_verified is True and extractor.weights_sha256 == features.INCEPTION_SHA256
        assert torch.equal(extractor.network.fc.weight, tiny_inception.network.fc.weight)
    assert not capsys.readouterr().err


def test_the_published_file_is_downloaded_once_and_its_hash_asked_for(tiny_inception, tiny_weights, hub, monkeypatch):
    calls = []

    def download(url, path, hash_prefix):
        calls.append((url, hash_prefix))
        shutil.copy(tiny_weights, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert load_extractor("inception").weights_verified is True
    assert calls == [(features.INCEPTION_URL, features.INCEPTION_SHA256)] and (hub / features.INCEPTION_FILE).is_file()


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError("invalid hash value"), OSError("no room")])
def test_weights_out_of_reach_are_said_in_one_line(hub, monkeypatch, error):
    def unreachable(url, path, **kwargs):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError) as said:
        load_extractor("inception")
    sentence = str(said.value)
    assert "\n" not in sentence
    for part in (features.INCEPTION_FILE, features.INCEPTION_SHA256, features.INCEPTION_URL, str(hub), "--inception-weights"):
        assert part in sentence


def test_weights_of_another_network_are_refused(random_state, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({**random_state, "fc.weight": torch.zeros(1000, 2048)}, path)
    with pytest.raises(UserError, match=r"1 entries differ, for example fc.weight is \(1000, 2048\), expected \(1008, 2048\)"):
        load_extractor("inception", inception_weights=path)


def test_files_that_are_no_inception_are_refused(tiny_inception, tmp_path):
    path, state = tmp_path / "weights.pth", tiny_inception.network.state_dict()
    torch.save({key: value for key, value in state.items() if key != "body.bias"}, path)
    with pytest.raises(UserError, match=r"1 entries differ, for example body.bias is missing, expected \(10,\)"):
        load_extractor("inception", inception_weights=path)
    torch.save({**state, "AuxLogits.fc.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=r"AuxLogits.fc.weight is \(2,\), expected none"):
        load_extractor("inception", inception_weights=path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(UserError, match="holds a list: expected the state dict"):
        load_extractor("inception", inception_weights=path)
    torch.save(torch.nn.Linear(2, 2), path)                                       # a pickled module is not unpickled
    with pytest.raises(UserError, match="weights_only"):
        load_extractor("inception", inception_weights=path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="weights_only"):
        load_extractor("inception", inception_weights=path)
    with pytest.raises(UserError, match="not found"):
        load_extractor("inception", inception_weights=tmp_path / "none.pth")
    with pytest.raises(UserError, match="expected 'inception', 'dinov2' or"):
        load_extractor("dino")


# --- around every network --------------------------------------------------------------------------------------------------------


class Probe(torch.nn.Module):
    """Notes the switches it runs under."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append((tf32_and_autocast(), x.is_contiguous(), torch.is_inference_mode_enabled()))
        _ = 1 / int(x.max())
        return x.flatten(1).half()


def test_networks_see_full_float32_and_contiguous_images(lax):
    extractor = Extractor(Probe(), torch.device("cpu"), "probe", "", None)
    pooled, spatial = extractor(channels_first(random_images(2, 3, 5) | 1))
    ((state, contiguous, inference),) = extractor.network.seen
    assert state in (("ieee", "ieee", torch.float32), (False, False, torch.float32)) and contiguous and inference
    assert tf32_and_autocast() == lax
    assert pooled.dtype == spatial.dtype == torch.float32 and (pooled.shape, spatial.shape) == ((2, 45), (2, 0))
    with pytest.raises(ZeroDivisionError):
        extractor(torch.zeros(2, 3, 1, 1, dtype=torch.uint8))
    assert tf32_and_autocast() == lax
    for wrong in (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, 3, dtype=torch.uint8)):
        with pytest.raises(AssertionError):
            extractor(wrong)


# --- a timm folder ---------------------------------------------------------------------------------------------------------------


def write_timm_folder(folder, num_classes, seed=0):
    """A tiny ViT in timm's own form: 16 pixels, width 24."""
    torch.manual_seed(seed)
    architecture = dict(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=num_classes)
    model = timm.create_model("vit_tiny_patch16_224", **architecture).eval()
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "architecture": "vit_tiny_patch16_224", "num_classes": num_classes, "model_args": architecture,
        "pretrained_cfg": {"input_size": [3, 16, 16], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "num_classes": num_classes,
                           "classifier": "head", "first_conv": "patch_embed.proj"}}))
    return model


@pytest.mark.parametrize("num_classes", [0, 5])
def test_timm_features_are_those_before_the_classifier(tmp_path, num_classes):
    model = write_timm_folder(tmp_path / "tiny", num_classes)
    extractor = load_extractor(f"local-dir:{tmp_path / 'tiny'}")
    assert (extractor.name, extractor.key, extractor.label) == ("tiny", "fd_tiny", "Frechet distance (tiny)")
    assert extractor.weights_sha256 == features.sha256(tmp_path / "tiny" / "model.safetensors") and extractor.weights_verified is None
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    for side in (16, 24):
        images = channels_first(random_images(3, side, side))
        x = images / 255 if side == 16 else F.interpolate(images / 255, 16, mode="bilinear", align_corners=False, antialias=False)
        with torch.inference_mode():
            expected = model.forward_features((x - mean) / std)[:, 0]             # the ViT's class token
        pooled, spatial = extractor(images)
        assert pooled.shape == (3, 24) and spatial.shape == (3, 0) and pooled.dtype == torch.float32
        torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)


def test_a_folder_named_inception_is_not_inception(tmp_path):
    write_timm_folder(tmp_path / "inception", 5)
    extractor = load_extractor(f"local-dir:{tmp_path / 'inception'}")
    assert not extractor.is_inception and extractor.key == "fd_inception" and extractor.label == "Frechet distance (inception)"


def test_a_folder_that_is_no_timm_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.json and model.safetensors"):
        load_extractor(f"local-dir:{tmp_path}")
    write_timm_folder(tmp_path / "tiny", 5)
    with pytest.raises(UserError, match="--inception-weights came with --features local-dir:"):
        load_extractor(f"local-dir:{tmp_path / 'tiny'}", inception_weights="file.pth")
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="timm cannot build"):
        load_extractor(f"local-dir:{tmp_path / 'tiny'}")


# --- DINOv2 ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dinov2_file(tmp_path_factory):
    """A small network of DINOv2's build, in the large one's place; patches of 14, made for 518 px as the published one."""
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **dict(SMALL.model_args))
    path = tmp_path_factory.mktemp("dinov2") / "dinov2.pth"
    torch.save(model.state_dict(), path)
    return path


SMALL = Spec("vit_small_patch14_dinov2.lvd142m", model_args=(("embed_dim", 32), ("depth", 1), ("num_heads", 2)))


@pytest.fixture
def dinov2(dinov2_file, monkeypatch):
    monkeypatch.setitem(encoders.ENCODERS, "dinov2-vit-l", SMALL)
    return load_extractor("dinov2", dinov2_weights=dinov2_file)


def test_dinov2_is_the_large_ones_class_token(dinov2, dinov2_file):
    assert features.DINOV2 == "dinov2-vit-l" and encoders._family("dinov2", {"l": "x"}).keys() == {features.DINOV2}
    assert (dinov2.name, dinov2.key, dinov2.label) == ("dinov2", "fd_dinov2", "Frechet distance (dinov2)")
    assert dinov2.weights_sha256 == features.sha256(dinov2_file) and dinov2.weights_verified is None and not dinov2.is_inception
    images = channels_first(random_images(2, 224, 224))
    pooled, spatial = dinov2(images)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.inference_mode():
        tokens = dinov2.network.encoder.model.forward_features((images / 255 - mean) / std)      # 224 px: no resize
    assert tokens.shape == (2, 1 + 16 * 16, 32) and pooled.shape == (2, 32) and spatial.shape == (2, 0)
    torch.testing.assert_close(pooled, tokens[:, 0])


@pytest.mark.parametrize("height, width", [(256, 256), (64, 64), (300, 224), (512, 300)])
def test_dinov2_sees_pils_antialiased_bicubic_resize_without_its_rounding(dinov2, height, width):
    """The oracle resizes each colour as float, since PIL rounds images of bytes twice."""
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    waves = np.stack([np.sin(y / 3 + x / 5), np.sin(y / 11) * np.sin(x / 2), np.sin(x * y / 400)], axis=2)
    image = (127.5 + 127 * waves).astype(np.uint8)                                # (H, W, 3)
    seen = []
    hook = dinov2.network.encoder.model.patch_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    dinov2(channels_first(image[None]))
    hook.remove()
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    levels = ((seen[0][0] * std + mean) * 255).permute(1, 2, 0).numpy()           # (224, 224, 3)
    colours = (Image.fromarray(image[..., i].astype(np.float32)) for i in range(3))
    oracle = np.stack([np.array(colour.resize((224, 224), Image.Resampling.BICUBIC)) for colour in colours], axis=2)
    np.testing.assert_allclose(levels, oracle, rtol=0, atol=1e-2)
    assert np.abs(levels - np.round(levels)).max() > 0.4 and (levels.max() > 255 or levels.min() < 0)     # nor cut off


def test_dinov2_out_of_reach_is_said(dinov2, tmp_path):
    with pytest.raises(UserError, match="dinov2-vit-l.*could not be fetched"):
        load_extractor("dinov2")                                                  # the hub is out of reach here
    with pytest.raises(UserError, match="no encoder weights at"):
        load_extractor("dinov2", dinov2_weights=tmp_path / "none.pth")


def test_dinov2s_sentences_name_its_own_flag(dinov2, tmp_path):
    for weights in (None, tmp_path / "none.pth"):
        with pytest.raises(UserError, match="--dinov2-weights"):
            load_extractor("dinov2", dinov2_weights=weights)


def test_fetched_weights_are_known_by_their_numbers():
    a, b, c = (torch.nn.Linear(3, 2) for _ in range(3))
    b.load_state_dict(a.state_dict())
    c.load_state_dict({**a.state_dict(), "bias": a.bias + 1})
    assert sha256_of_parameters(a) == sha256_of_parameters(b) != sha256_of_parameters(c)
