"""Features in file order, what is measured of them, and statistics that a file holds."""

import json

import numpy as np
import pytest
import torch

from evaluations.extraction import extract, file_statistics, measure
from evaluations.features import Extractor
from evaluations.images import open_images
from runtime.messages import UserError
from tests import scoring_networks
from tests.conftest import random_images
from tests.scoring_networks import CPU

small = scoring_networks.small  # fixture
ALL = {"pooled", "gaussian", "spatial"}


class Network(torch.nn.Module):
    """Mean colours (B, 3) and two reds (B, 2); counts its images. Infinite if a first pixel is 255."""

    def __init__(self):
        super().__init__()
        self.images = 0

    def forward(self, x):
        self.images += len(x)
        return x.float().mean(dim=(2, 3)) / (x[:, :1, 0, 0] != 255), x[:, 0, 0, :2].float()


def counting(name="net", digest="0"):
    return Extractor(Network(), CPU, name, digest, None)


def finite_images(count, *size):
    return np.minimum(random_images(count, *size), 254)


def pooled_of(images):
    return images.astype(np.float64).mean(axis=(1, 2))


@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_features_are_in_order_with_an_odd_last_batch(batch_size):
    images = finite_images(11, 12, 20)
    pieces = [pair for (pair,) in extract(open_images(images), [counting()], batch_size)]
    pooled, spatial = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    np.testing.assert_allclose(pooled, pooled_of(images), rtol=1e-5)
    assert np.array_equal(spatial, images[:, 0, :2, 0])


@pytest.mark.parametrize("bad", [0, 6])
def test_features_that_are_not_finite_are_refused_in_any_block(bad):
    images = finite_images(7)
    images[bad, 0, 0, 0] = 255
    with pytest.raises(UserError, match="the images: features of net are not finite"):
        measure(open_images(images), counting(), 2, ALL)


@pytest.mark.parametrize("need", [set(), {"pooled"}, {"gaussian"}, {"spatial"}, ALL])
def test_what_is_needed_is_measured_and_nothing_else(need):
    images, extractor = finite_images(11), counting()
    found = measure(open_images(images), extractor, 4, need)
    assert {name for name in ALL if getattr(found, name) is not None} == need
    assert extractor.network.images == (11 if need else 0)
    if "pooled" in need:
        np.testing.assert_allclose(found.pooled, pooled_of(images), rtol=1e-5)
        assert found.pooled.dtype == torch.float32
    for name, rows in (("gaussian", pooled_of(images)), ("spatial", images[:, 0, :2, 0].astype(np.float64))):
        if name in need:
            mean, covariance = getattr(found, name)
            np.testing.assert_allclose(mean, rows.mean(axis=0), rtol=1e-5)
            np.testing.assert_allclose(covariance, np.cov(rows, rowvar=False), rtol=1e-3, atol=1e-3)
            assert mean.dtype == covariance.dtype == torch.float64


def test_statistics_in_the_file_are_used_not_recomputed(tmp_path):
    images = finite_images(9)
    about = json.dumps({"distance": "fd_net"})
    planted = dict(mu=np.full(3, 7.0), sigma=2 * np.eye(3), mu_s=np.full(2, 8.0), sigma_s=3 * np.eye(2), about=about)
    np.savez(tmp_path / "ref.npz", images, **planted)
    opened, extractor = open_images(tmp_path / "ref.npz"), counting()
    assert extractor.widths == (3, 2)
    before = extractor.network.images
    found = measure(opened, extractor, 4, {"gaussian", "spatial"})
    assert extractor.network.images == before
    assert found.gaussian[0].tolist() == [7.0] * 3 and torch.equal(found.gaussian[1], 2 * torch.eye(3).double())
    assert found.spatial[0].tolist() == [8.0] * 2 and torch.equal(found.spatial[1], 3 * torch.eye(2).double())
    found = measure(opened, extractor, 4, ALL)
    assert extractor.network.images == before + 9 and found.gaussian[0].tolist() == [7.0] * 3   # images: pooled only
    assert torch.equal(found.pooled, measure(open_images(images), counting(), 4, {"pooled"}).pooled)


def statistics(path, width=3, spatial=None, **about):
    arrays = {} if spatial is None else dict(mu_s=np.zeros(spatial), sigma_s=np.eye(spatial))
    arrays |= {"about": np.array(json.dumps(about))} if about else {}
    np.savez(path, mu=np.zeros(width), sigma=np.eye(width), **arrays)
    return open_images(path)


def test_statistics_belong_to_the_features_they_were_made_of(small, tmp_path):
    adm = statistics(tmp_path / "adm.npz", 6, 4)                                  # without a record: Inception's
    assert file_statistics(adm, small) is adm.statistics
    assert file_statistics(adm, counting("inception")) is None                    # the name alone makes it no Inception
    own = statistics(tmp_path / "net.npz", distance="fd_net", weights_sha256="0")
    assert file_statistics(own, counting("net")) is own.statistics and file_statistics(own, small) is None
    assert file_statistics(open_images(random_images(9)), small) is None
    assert file_statistics(statistics(tmp_path / "fid.npz", 6), small).mu_s is None


@pytest.mark.parametrize("arrays, word", [
    (dict(width=3, distance="fd_net", weights_sha256="1"), "other net weights"),
    (dict(width=6, distance="fd_net"), "mu has 6"),
    (dict(width=3, spatial=5, distance="fd_net"), "mu_s 5"),
])
def test_statistics_of_other_weights_or_widths_are_refused(tmp_path, arrays, word):
    with pytest.raises(UserError, match=f"net.npz: .*{word}"):
        file_statistics(statistics(tmp_path / "net.npz", **arrays), counting("net"))
