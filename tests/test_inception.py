"""Inception: torch-fidelity's network as ADM uses it."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.conftest import random_images
from tests.scoring_networks import channels_first, inception, random_state, weights_file  # noqa: F401  (fixtures)

SIDE = 299
# Norm, deviation, and every 500th feature of one image.
POOLED = [102.17306, 1.80556, 5.15287, 1.59631, 0.0, 1.3171, 0.00397]
SPATIAL = [88.15356, 1.59366, 1.34075, 1.16277, 0.19566, 0.0, 0.0]


def resize_literally(image, i, j):
    """TensorFlow 1's ResizeBilinear at one pixel of an image (H, W, 3), float32: reads at i * in / out, no half pixel."""
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
def test_the_resize_is_tensorflow_1s(inception, height, width):  # noqa: F811
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


def test_spatial_features_are_seven_channels_of_mixed_6d_with_the_channel_last(inception):  # noqa: F811
    """A planted map whose values are their own places."""
    row, column, channel = torch.meshgrid(torch.arange(17.0), torch.arange(17.0), torch.arange(192.0), indexing="ij")
    planted = (1e4 * row + 100 * column + channel).permute(2, 0, 1)[None]          # (1, 192, 17, 17)
    branch = inception.network.network.Mixed_6d.branch1x1
    hook = branch.register_forward_hook(lambda *_: planted, prepend=True)
    pooled, spatial = inception(channels_first(random_images(1)))
    hook.remove()
    assert spatial.tolist() == [[1e4 * i + 100 * j + k for i in range(17) for j in range(17) for k in range(7)]]
    assert pooled.shape == (1, 2048) and inception.widths == (2048, 17 * 17 * 7)
    assert pooled.dtype == spatial.dtype == torch.float32


def test_features_of_random_weights_are_known(inception):  # noqa: F811
    """Of a network written by hand that agrees with ADM's TensorFlow graph to 1e-5."""
    pooled, spatial = inception(channels_first(random_images(1, 40, 56)))
    assert (spatial >= 0).all()                                                   # behind the ReLU
    for found, expected in ((pooled, POOLED), (spatial, SPATIAL)):
        assert [float(found.norm()), float(found.std()), *found[0, 7::500].tolist()] == pytest.approx(
            expected, rel=1e-3, abs=1e-4)


def test_threads_that_share_the_network_get_their_own_spatial_features(inception):  # noqa: F811
    images = [channels_first(random_images(1, seed=seed)) for seed in range(2)]
    alone = [inception(image)[1] for image in images]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda image: inception(image)[1], images))
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(alone[0], alone[1])


def test_the_classifier_has_1008_columns_and_no_bias(inception, random_state):  # noqa: F811
    assert torch.equal(inception.classifier, random_state["fc.weight"]) and inception.classifier.shape == (1008, 2048)
