"""Inception and its resize against the literal rule, torchvision's network with the documented differences, and torch-fidelity's."""

import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from evaluations.inception import SIDE, Inception, _taps, resize_tf1
from tests.conftest import random_images


def channels_first(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def relative(ours, expected):
    return float((ours - expected).norm() / expected.norm())


# --- resize ----------------------------------------------------------------------------------------------------------------------


def taps_literally(source, side):
    """[(lower index, upper index, weight of the upper)] in float32."""
    scale = np.float32(source) / np.float32(side)
    taps = []
    for i in range(side):
        position = np.float32(i) * scale
        low = int(np.floor(position))
        taps.append((low, min(low + 1, source - 1), position - np.float32(low)))
    return taps


def resize_literally(image, pixels, side=SIDE):
    """The rule word by word at some pixels (row, column) of one image (H, W, 3), in float32."""
    image = image.astype(np.float32)
    down, across = taps_literally(image.shape[0], side), taps_literally(image.shape[1], side)
    result = []
    for i, j in pixels:
        (y0, y1, wy), (x0, x1, wx) = down[i], across[j]
        top = image[y0, x0] + (image[y0, x1] - image[y0, x0]) * wx
        bottom = image[y1, x0] + (image[y1, x1] - image[y1, x0]) * wx
        result.append(top + (bottom - top) * wy)
    return np.array(result)


@pytest.mark.parametrize("height, width", [(64, 64), (256, 256), (299, 299), (320, 200), (512, 512)])
def test_resize_is_tensorflow_1s(height, width):
    """At 3000 random pixels and all along the last row and column, where the upper index ends."""
    image = random_images(1, height, width)[0]
    pixels = [*np.random.default_rng(0).integers(0, SIDE, (3000, 2)),
              *((SIDE - 1, i) for i in range(SIDE)), *((i, SIDE - 1) for i in range(SIDE))]
    ours = resize_tf1(channels_first(image[None]))
    assert ours.shape == (1, 3, SIDE, SIDE) and ours.dtype == torch.float32
    rows, columns = np.array(pixels).T
    np.testing.assert_allclose(ours[0].permute(1, 2, 0).numpy()[rows, columns], resize_literally(image, pixels), rtol=0, atol=1e-4)


def test_resize_of_299_is_the_identity():
    images = channels_first(random_images(1, 299, 299))
    assert torch.equal(resize_tf1(images), images.float())


# --- network ---------------------------------------------------------------------------------------------------------------------


def published_keys():
    """The 566 names of the published file, by its rule: 94 units of 6 entries, and fc."""
    pool = ["branch1x1", "branch_pool"]
    family = {
        "5": [*pool, "branch5x5_1", "branch5x5_2", *(f"branch3x3dbl_{i}" for i in (1, 2, 3))],
        "6": [*pool, *(f"branch7x7_{i}" for i in (1, 2, 3)), *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))],
        "7": [*pool, "branch3x3_1", "branch3x3_2a", "branch3x3_2b", *(f"branch3x3dbl_{i}" for i in ("1", "2", "3a", "3b"))],
    }
    units = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
    units += [f"Mixed_{block}.{unit}" for block in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b", "7c") for unit in family[block[0]]]
    units += ["Mixed_6a.branch3x3", *(f"Mixed_6a.branch3x3dbl_{i}" for i in (1, 2, 3))]
    units += ["Mixed_7a.branch3x3_1", "Mixed_7a.branch3x3_2", *(f"Mixed_7a.branch7x7x3_{i}" for i in (1, 2, 3, 4))]
    assert len(units) == 94
    leaves = ["conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked"]
    return {f"{unit}.{leaf}" for unit in units for leaf in leaves} | {"fc.weight", "fc.bias"}


def test_network_has_the_published_keys():
    assert set(Inception().state_dict()) == published_keys() and len(published_keys()) == 566


def test_widths(inception):
    pooled, spatial = inception(channels_first(random_images(2, 24, 40)))
    assert pooled.shape == (2, 2048) == (2, Inception.pooled) and spatial.shape == (2, 2023) == (2, Inception.spatial)
    assert pooled.dtype == spatial.dtype == torch.float32 and inception.network.fc.weight.shape == (1008, 2048)


def test_spatial_features_are_mixed_6ds_first_branch_after_its_relu(inception):
    """TensorFlow's names count from 0: `mixed_6` is Mixed_6d."""
    inputs = {}
    hooks = [getattr(inception.network, name).register_forward_hook(lambda block, x, y, name=name: inputs.update({name: x[0].clone()}))
             for name in ("Mixed_6d", "Mixed_6e")]
    spatial = inception(channels_first(random_images(2, 40, 56)))[1]
    for hook in hooks:
        hook.remove()

    def before_relu(name):
        unit = getattr(inception.network, name).branch1x1
        x = F.conv2d(inputs[name], unit.conv.weight)                              # (B, 192, 17, 17)
        scale, column = unit.bn.weight / (unit.bn.running_var + 1e-3).sqrt(), (slice(None), None, None)
        return (x - unit.bn.running_mean[column]) * scale[column] + unit.bn.bias[column]

    maps = before_relu("Mixed_6d")[:, :7]
    assert maps.shape == (2, 7, 17, 17) and (maps < -1e-2).any() and (maps > 1e-2).any()
    expected = torch.empty(2, 2023)
    for row in range(17):
        for column in range(17):
            for channel in range(7):
                expected[:, (row * 17 + column) * 7 + channel] = maps[:, channel, row, column].clamp(min=0)
    assert relative(spatial, expected) < 1e-5
    assert relative(before_relu("Mixed_6e")[:, :7].relu().permute(0, 2, 3, 1).flatten(1), expected) > 0.1


def test_spatial_features_are_flattened_with_the_channel_last(inception):
    """A planted map whose values are their own places."""
    row, column, channel = torch.meshgrid(torch.arange(17.0), torch.arange(17.0), torch.arange(192.0), indexing="ij")
    planted = (1e4 * row + 100 * column + channel).permute(2, 0, 1)[None]          # (1, 192, 17, 17)
    hook = inception.network.Mixed_6d.branch1x1.register_forward_hook(lambda *_: planted)
    spatial = inception(channels_first(random_images(1, 16, 16)))[1]
    hook.remove()
    expected = [1e4 * i + 100 * j + k for i in range(17) for j in range(17) for k in range(7)]
    assert spatial.tolist() == [expected]


def test_network_is_torchvisions_with_the_three_documented_differences(inception, random_state, monkeypatch):
    calls = []

    def average(x, **kwargs):                       # nine in all, in the order of the blocks; the last is Mixed_7c's
        calls.append(kwargs)
        assert kwargs == {"kernel_size": 3, "stride": 1, "padding": 1}
        return F.avg_pool2d(x, **kwargs, count_include_pad=False) if len(calls) < 9 else F.max_pool2d(x, **kwargs)

    monkeypatch.setattr(torchvision.models.inception, "F", types.SimpleNamespace(
        avg_pool2d=average, max_pool2d=F.max_pool2d, relu=F.relu))
    oracle = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, transform_input=False, init_weights=False).eval()
    oracle.load_state_dict(random_state)
    oracle.fc = torch.nn.Identity()
    images = channels_first(random_images(2, 40, 56))
    with torch.inference_mode():
        expected = oracle((resize_tf1(images) - 128) / 128)
    assert len(calls) == 9
    assert expected.std() > 1e-3 and (expected[0] - expected[1]).norm() > 1e-3 * expected.norm()   # the weights do carry a signal
    assert relative(inception(images)[0], expected) < 1e-5


@pytest.fixture(scope="module")
def torch_fidelitys(weights_file):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    return module.FeatureExtractorInceptionV3("oracle", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights_file))


@pytest.mark.parametrize("height, width", [(64, 64), (320, 200)])
def test_network_is_torch_fidelitys(inception, torch_fidelitys, height, width):
    """Which others have compared with TensorFlow's on the real weights; resize, pooled and spatial features, logits without bias."""
    images, maps = channels_first(random_images(1, height, width)), []
    hook = torch_fidelitys.Mixed_6d.branch1x1.register_forward_hook(lambda unit, x, y: maps.append(y.clone()))
    with torch.inference_mode():
        pooled, logits = torch_fidelitys(images)
    hook.remove()
    ours = inception(images)
    assert relative(ours[0], pooled) < 1e-5
    assert relative(ours[1], maps[0][:, :7].permute(0, 2, 3, 1).flatten(1)) < 1e-5
    assert relative(ours[0] @ inception.network.fc.weight.T, logits) < 1e-5 and logits.shape == (1, 1008)


def test_the_resize_serves_in_any_mode_after_it_served_in_inference():
    """Its weights are kept from one call to the next."""
    _taps.cache_clear()
    with torch.inference_mode():
        resize_tf1(torch.ones(1, 3, 10, 20), 15)
    x = torch.ones(1, 3, 10, 20, requires_grad=True)
    resize_tf1(x, 15).sum().backward()
    assert x.grad.sum().item() == pytest.approx(3 * 15 * 15)                      # the weights of each pixel add up to 1
    assert _taps.cache_info().hits == 2
