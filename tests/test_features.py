"""Feature extractors: Inception and its weights, timm folders, DINOv2, and full float32 around each of them."""

import json
import shutil
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from evaluations import features
from evaluations.features import DinoFeatures, Extractor, load_extractor
from runtime.files import sha256
from runtime.messages import UserError
from runtime.speed import full_precision
from tests import scoring_networks
from tests.conftest import random_images, tf32_and_autocast
from tests.scoring_networks import CPU, channels_first

random_state, weights_file = scoring_networks.random_state, scoring_networks.weights_file   # fixtures
inception = scoring_networks.inception

# ---- Inception -------------------------------------------------------------------------------------------------------

SIDE = 299
# Norm, deviation, and every 500th feature of one image.
POOLED = [102.17306, 1.80556, 5.15287, 1.59631, 0.0, 1.3171, 0.00397]
SPATIAL = [88.15356, 1.59366, 1.34075, 1.16277, 0.19566, 0.0, 0.0]


def resize_literally(image, i, j):
    """TensorFlow 1's ResizeBilinear at one pixel of an image (H, W, 3), float32: reads at i * in / out, unshifted."""
    def taps(index, source):
        position = np.float32(index) * (np.float32(source) / np.float32(SIDE))
        low = int(np.floor(position))
        return low, min(low + 1, source - 1), position - np.float32(low)

    image = image.astype(np.float32)
    (y0, y1, wy), (x0, x1, wx) = taps(i, image.shape[0]), taps(j, image.shape[1])
    top = image[y0, x0] + (image[y0, x1] - image[y0, x0]) * wx
    bottom = image[y1, x0] + (image[y1, x1] - image[y1, x0]) * wx
    return top + (bottom - top) * wy


@pytest.mark.parametrize("height, width", [(64, 40), (320, 400)])
def test_the_resize_is_tensorflow_1s(inception, height, width):
    """At random pixels, and along the last row and column, where the upper index is clamped."""
    image, seen = random_images(1, height, width)[0], []
    layer = inception.network.network.Conv2d_1a_3x3
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    inception(channels_first(image[None]))
    hook.remove()
    assert seen[0].shape == (1, 3, SIDE, SIDE)
    pixels = [*np.random.default_rng(0).integers(0, SIDE, (300, 2)), *((SIDE - 1, i) for i in range(SIDE)),
              *((i, SIDE - 1) for i in range(SIDE))]
    rows, columns = np.array(pixels).T
    expected = np.array([resize_literally(image, i, j) for i, j in pixels])
    found = seen[0][0].permute(1, 2, 0).numpy()[rows, columns] * 128 + 128
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_spatial_features_are_seven_channels_of_mixed_6d_with_the_channel_last(inception):
    """A planted map whose values are their own places."""
    row, column, channel = torch.meshgrid(torch.arange(17.0), torch.arange(17.0), torch.arange(192.0), indexing="ij")
    planted = (1e4 * row + 100 * column + channel).permute(2, 0, 1)[None]          # (1, 192, 17, 17)
    branch = inception.network.network.Mixed_6d.branch1x1
    hook = branch.register_forward_hook(lambda *_: planted, prepend=True)
    pooled, spatial = inception(channels_first(random_images(1)))
    hook.remove()
    assert spatial.tolist() == [[1e4 * i + 100 * j + k for i in range(17) for j in range(17) for k in range(7)]]
    assert pooled.shape == (1, 2048) and pooled.dtype == spatial.dtype == torch.float32


def test_features_of_random_weights_are_known(inception):
    """Of a network written by hand that agrees with ADM's TensorFlow graph to 1e-5."""
    pooled, spatial = inception(channels_first(random_images(1, 40, 56)))
    assert (spatial >= 0).all()                                                   # behind the ReLU
    for found, expected in ((pooled, POOLED), (spatial, SPATIAL)):
        assert [float(found.norm()), float(found.std()), *found[0, 7::500].tolist()] == pytest.approx(
            expected, rel=1e-3, abs=1e-4)


def test_threads_that_share_the_network_get_their_own_spatial_features(inception):
    images = [channels_first(random_images(1, seed=seed)) for seed in range(2)]
    alone = [inception(image)[1] for image in images]
    with full_precision(CPU), ThreadPoolExecutor(2) as pool:                      # outside: switches are the process's
        together = list(pool.map(lambda image: inception(image)[1], images))
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(alone[0], alone[1])


# ---- Inception's weights ---------------------------------------------------------------------------------------------

def test_other_weights_are_used_if_given_and_recorded(weights_file, random_state, capsys):
    extractor = load_extractor("inception", "cpu", weights_file)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "not the published Inception" in warning and "not comparable" in warning
    assert extractor.weights_verified is False and extractor.weights_sha256 == sha256(weights_file)
    assert (extractor.name, extractor.key, extractor.label) == ("inception", "fid", "FID") and extractor.is_inception
    state = extractor.network.network.state_dict()
    assert all(torch.equal(state[name], value) for name, value in random_state.items())
    assert torch.equal(extractor.classifier, random_state["fc.weight"]) and extractor.classifier.shape == (1008, 2048)
    assert not extractor.network.training and not any(p.requires_grad for p in extractor.network.parameters())


def test_a_file_without_batch_counters_is_accepted(random_state, tmp_path):
    """As converters write it."""
    state = {key: value for key, value in random_state.items() if not key.endswith("num_batches_tracked")}
    assert len(random_state) == 566 and len(state) == 472
    torch.save(state, tmp_path / "472.pth")
    loaded = load_extractor("inception", inception_weights=tmp_path / "472.pth").network.network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


class Harmful:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("content, word", [
    (lambda state: {**state, "fc.weight": torch.zeros(1000, 2048)}, "fc.weight"),
    (lambda state: {key: value for key, value in state.items() if key != "fc.bias"}, "fc.bias"),
    (lambda state: {**state, "AuxLogits.fc.weight": torch.zeros(2)}, "AuxLogits.fc.weight"),
    (lambda state: {**state, "fc.bias": 7}, "fc.bias"),
    (lambda state: {1: torch.zeros(1)}, "not the Inception"),
    (lambda state: {}, "not the Inception"),
    (lambda state: None, "not the Inception"),
    (lambda state: [torch.zeros(2)], "not the Inception"),
    (lambda state: {**state, "fc.bias": Harmful()}, "not the Inception"),
    (b"not a checkpoint", "not the Inception"),
])
def test_files_that_are_another_network_or_none_are_refused(random_state, tmp_path, capsys, content, word):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content(random_state), path)
    with pytest.raises(UserError, match=f"weights.pth: not the Inception of 2015-12-05.*{word}|{word}") as error:
        load_extractor("inception", inception_weights=path)
    assert "\n" not in str(error.value) and "unpickled" not in capsys.readouterr().out


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The folder of torch hub's cached files, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


def test_the_published_file_is_downloaded_once_and_verified_under_either_name(
        hub, weights_file, monkeypatch, capsys):
    calls = []

    def download(url, path, hash_prefix):
        calls.append((url, hash_prefix))
        shutil.copy(weights_file, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(features, "INCEPTION_SHA256", sha256(weights_file))       # the published file is not here
    assert load_extractor("inception").weights_verified is True
    (hub / features.INCEPTION_FILE).rename(hub / features.INCEPTION_FILES[1])
    assert load_extractor("inception").weights_verified is True
    assert calls == [(features.INCEPTION_URL, sha256(weights_file))] and not capsys.readouterr().err


@pytest.mark.parametrize("error", [urllib.error.URLError("no route"), RuntimeError("invalid hash value"), OSError()])
def test_weights_that_cannot_be_downloaded_are_named_with_the_remedy(hub, monkeypatch, error):
    def unreachable(url, path, **kwargs):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError) as refused:
        load_extractor("inception")
    for part in (features.INCEPTION_FILE, features.INCEPTION_SHA256, features.INCEPTION_URL, str(hub),
                 "--inception-weights"):
        assert part in str(refused.value)


def test_a_damaged_file_in_the_cache_is_refused(hub):
    hub.mkdir(parents=True)
    (hub / features.INCEPTION_FILE).write_text("damaged")
    with pytest.raises(UserError, match=f"{features.INCEPTION_FILE}: damaged.*delete it"):
        load_extractor("inception")


# ---- around every network --------------------------------------------------------------------------------------------

class Probe(torch.nn.Module):
    """Records the switches it runs under."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append((tf32_and_autocast(), x.is_contiguous(), torch.is_inference_mode_enabled()))
        _ = 1 / int(x.max())
        return x.flatten(1).half()


def test_networks_get_full_float32_and_contiguous_images(lax):
    extractor = Extractor(Probe(), CPU, "probe", "", None)
    pooled, spatial = extractor(channels_first(random_images(2, 3, 5) | 1))
    ((state, contiguous, inference),) = extractor.network.seen
    assert state == ("ieee", "ieee", torch.float32) and contiguous and inference
    assert pooled.dtype == spatial.dtype == torch.float32 and (pooled.shape, spatial.shape) == ((2, 45), (2, 0))
    with pytest.raises(ZeroDivisionError):
        extractor(torch.zeros(2, 3, 1, 1, dtype=torch.uint8))
    assert tf32_and_autocast() == lax                                             # also after an error


# ---- a timm folder ---------------------------------------------------------------------------------------------------

def write_timm_folder(folder, num_classes, seed=0):
    """A tiny ViT in timm's own form: 16 pixels, width 24."""
    torch.manual_seed(seed)
    architecture = dict(img_size=16, patch_size=8, embed_dim=24, depth=1, num_heads=2, num_classes=num_classes)
    model = timm.create_model("vit_tiny_patch16_224", **architecture).eval()
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "architecture": "vit_tiny_patch16_224", "num_classes": num_classes, "model_args": architecture,
        "pretrained_cfg": {"input_size": [3, 16, 16], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4],
                           "num_classes": num_classes, "classifier": "head", "first_conv": "patch_embed.proj"}}))
    return model


@pytest.mark.parametrize("num_classes", [0, 5])
def test_timm_features_are_those_before_the_classifier(tmp_path, num_classes):
    model = write_timm_folder(tmp_path / "inception", num_classes)                # the name alone makes it no Inception
    extractor = load_extractor(f"local-dir:{tmp_path / 'inception'}")
    assert (extractor.key, extractor.label) == ("fd_inception", "Frechet distance (inception)")
    assert extractor.weights_sha256 == sha256(tmp_path / "inception" / "model.safetensors")
    assert extractor.weights_verified is None and not extractor.is_inception
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    for side in (16, 24):
        images = channels_first(random_images(3, side, side))
        x = images / 255
        x = x if side == 16 else F.interpolate(x, 16, mode="bilinear", align_corners=False, antialias=False)
        with torch.inference_mode():
            expected = model.forward_features((x - mean) / std)[:, 0]             # the ViT's class token
        pooled, spatial = extractor(images)
        assert pooled.shape == (3, 24) and spatial.shape == (3, 0)
        torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)


def test_a_folder_that_is_no_timm_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="config.json and model.safetensors"):
        load_extractor(f"local-dir:{tmp_path}")
    write_timm_folder(tmp_path / "tiny", 5)
    (tmp_path / "tiny" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="timm cannot build"):
        load_extractor(f"local-dir:{tmp_path / 'tiny'}")


# ---- DINOv2 ----------------------------------------------------------------------------------------------------------

class SeesAt224(torch.nn.Module):
    """In an encoder's place: records its images; the class token is their mean colour."""

    input_size = 224

    def forward(self, images):
        self.seen = images
        return images.mean(dim=(2, 3)), None


@pytest.mark.parametrize("height, width", [(224, 224), (64, 64), (300, 224), (512, 300)])
def test_dinov2_sees_pils_antialiased_bicubic_resize_without_its_rounding(height, width):
    """The oracle resizes each colour as float, since PIL rounds images of bytes twice."""
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    waves = np.stack([np.sin(y / 3 + x / 5), np.sin(y / 11) * np.sin(x / 2), np.sin(x * y / 400)], axis=2)
    image = (127.5 + 127 * waves).astype(np.uint8)                                # (H, W, 3)
    encoder = SeesAt224()
    token = DinoFeatures(encoder)(channels_first(image[None]))
    levels = encoder.seen[0].permute(1, 2, 0).numpy()                             # (224, 224, 3)
    colours = (Image.fromarray(image[..., i].astype(np.float32)) for i in range(3))
    oracle = np.stack([np.array(colour.resize((224, 224), Image.Resampling.BICUBIC)) for colour in colours], axis=2)
    np.testing.assert_allclose(levels, oracle, rtol=0, atol=1e-2)
    assert torch.equal(token, encoder.seen.mean(dim=(2, 3)))
    if (height, width) != (224, 224):
        assert np.abs(levels - np.round(levels)).max() > 0.4                      # not rounded


def test_missing_dinov2_weights_are_refused_by_their_own_flag(tmp_path):
    with pytest.raises(UserError, match="none.pth"):
        load_extractor("dinov2", dinov2_weights=tmp_path / "none.pth")
