"""Features in file order, what is measured of them, statistics that a file brings along, and the reference's cache."""

import json
import shutil

import numpy as np
import pytest
import torch

from evaluations import extraction
from evaluations.extraction import all_threads, extract, file_statistics, measure
from evaluations.features import Extractor, load_extractor
from evaluations.images import open_images
from runtime.messages import UserError
from tests.conftest import TinyInception, random_images

ALL = {"pooled", "gaussian", "spatial"}


class Network(torch.nn.Module):
    """Mean colours (B, 3) and the first two pixels' reds (B, 2); counts the images it has seen."""

    def __init__(self):
        super().__init__()
        self.images = 0

    def forward(self, x):
        self.images += len(x)
        return x.float().mean(dim=(2, 3)), x[:, 0, 0, :2].float()


def counting(name="net", digest="0"):
    return Extractor(Network(), torch.device("cpu"), name, digest, None)


def pooled_of(images):
    return images.astype(np.float64).mean(axis=(1, 2))


@pytest.mark.parametrize("batch_size", [1, 4, 11, 100])
def test_features_come_in_order_with_an_odd_last_batch(batch_size):
    images = random_images(11, 12, 20)
    pieces = list(extract(open_images(images), counting(), batch_size))
    pooled, spatial = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    np.testing.assert_allclose(pooled, pooled_of(images), rtol=1e-5)
    assert np.array_equal(spatial, images[:, 0, :2, 0])


def test_features_that_are_not_finite_are_refused():
    class Broken(torch.nn.Module):
        def forward(self, x):
            return x.float().mean(dim=(2, 3)) / 0

    with pytest.raises(UserError, match="broken gives features that are not finite on the images"):
        list(extract(open_images(random_images(4)), Extractor(Broken(), torch.device("cpu"), "broken", "0", None), 2))


@pytest.mark.parametrize("bad", range(4))
def test_features_that_are_not_finite_are_refused_in_whichever_block(bad, tmp_path):
    """Each block is asked about when the next is under way, the last behind the loop; nothing of such a set is kept."""
    class Broken(torch.nn.Module):
        def forward(self, x):
            return x.float().mean(dim=(2, 3)) / (x[:, :1, 0, 0] != 255), x[:, 0, 0, :2].float()

    images = random_images(7)
    images[:, 0, 0, 0] = 1
    images[2 * bad, 0, 0, 0] = 255
    np.savez(tmp_path / "set.npz", images)
    extractor = Extractor(Broken(), torch.device("cpu"), "broken", "0", None)
    with pytest.raises(UserError, match="not finite on .*set.npz"):
        measure(open_images(tmp_path / "set.npz"), extractor, 2, ALL, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("need", [set(), {"pooled"}, {"gaussian"}, {"spatial"}, ALL])
def test_what_is_needed_is_measured_and_nothing_else(need):
    images, extractor = random_images(11), counting()
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


def test_all_threads_are_taken_while_others_wait_and_given_back(monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(extraction, "place", lambda: (0, 2))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ZeroDivisionError), all_threads():
        seen.append(torch.get_num_threads())
        _ = 1 / 0
    assert seen == [2 * before] and torch.get_num_threads() == before
    monkeypatch.setattr(extraction, "place", lambda: (0, 1))
    with all_threads():
        assert torch.get_num_threads() == before


# --- statistics in the file ------------------------------------------------------------------------------------------------------


def planted(images=None, **changes):
    """A file of TinyInception's widths with statistics that no image has."""
    arrays = dict(mu=np.full(6, 7.0), sigma=2 * np.eye(6), mu_s=np.full(4, 8.0), sigma_s=3 * np.eye(4), **changes)
    return {name: value for name, value in arrays.items() if value is not None} | ({} if images is None else {"arr_0": images})


def test_statistics_in_the_file_are_used_not_recomputed(tiny_inception, tmp_path):
    images = random_images(9)
    np.savez(tmp_path / "ref.npz", **planted(images))
    calls = []
    hook = tiny_inception.network.register_forward_hook(lambda *_: calls.append(1))
    found = measure(open_images(tmp_path / "ref.npz"), tiny_inception, 4, {"gaussian", "spatial"})
    assert not calls
    assert found.gaussian[0].tolist() == [7.0] * 6 and torch.equal(found.gaussian[1], 2 * torch.eye(6, dtype=torch.float64))
    assert found.spatial[0].tolist() == [8.0] * 4 and torch.equal(found.spatial[1], 3 * torch.eye(4, dtype=torch.float64))
    found = measure(open_images(tmp_path / "ref.npz"), tiny_inception, 4, ALL)
    hook.remove()
    assert len(calls) == 3 and found.gaussian[0].tolist() == [7.0] * 6            # the images serve for the pooled rows only
    assert torch.equal(found.pooled, measure(open_images(images), tiny_inception, 4, {"pooled"}).pooled)


def test_statistics_belong_to_the_features_they_were_made_of(tiny_inception, tmp_path):
    images = random_images(9)
    np.savez(tmp_path / "adm.npz", **planted(images))
    opened = open_images(tmp_path / "adm.npz")
    assert file_statistics(opened, tiny_inception) is opened.statistics and file_statistics(open_images(images), tiny_inception) is None
    assert file_statistics(opened, counting("net")) is None                       # a file that does not say is ADM's: Inception's
    about = json.dumps({"distance": "fd_net", "weights_sha256": "0"})
    np.savez(tmp_path / "net.npz", mu=np.zeros(3), sigma=np.eye(3), about=about)
    opened = open_images(tmp_path / "net.npz")
    assert file_statistics(opened, counting("net")) is opened.statistics and file_statistics(opened, tiny_inception) is None
    with pytest.raises(UserError, match=r"net.npz were made with other net weights \(0, now 1\)"):
        file_statistics(opened, counting("net", "1"))
    np.savez(tmp_path / "net.npz", mu=np.zeros(6), sigma=np.eye(6), about=about)
    with pytest.raises(UserError, match="net.npz has mu of 6 numbers and net gives 3"):
        file_statistics(open_images(tmp_path / "net.npz"), counting("net"))


def test_a_folder_named_inception_does_not_take_inceptions_statistics(tiny_inception, tmp_path):
    np.savez(tmp_path / "adm.npz", **planted(random_images(9)))
    assert file_statistics(open_images(tmp_path / "adm.npz"), counting("inception")) is None


def test_statistics_of_other_widths_than_inceptions_are_refused(tiny_inception, tmp_path):
    for name, mu, mu_s, sentence in (("mu", 5, 4, "mu of 5 and mu_s of 4 numbers: expected Inception's 6 and 4"),
                                     ("mu_s", 6, 5, "mu of 6 and mu_s of 5 numbers")):
        np.savez(tmp_path / f"{name}.npz", mu=np.zeros(mu), sigma=np.eye(mu), mu_s=np.zeros(mu_s), sigma_s=np.eye(mu_s))
        with pytest.raises(UserError, match=sentence):
            file_statistics(open_images(tmp_path / f"{name}.npz"), tiny_inception)
    np.savez(tmp_path / "fid.npz", mu=np.zeros(6), sigma=np.eye(6))
    assert file_statistics(open_images(tmp_path / "fid.npz"), tiny_inception).mu_s is None


# --- the cache -------------------------------------------------------------------------------------------------------------------


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip((a.pooled, *a.gaussian, *a.spatial), (b.pooled, *b.gaussian, *b.spatial), strict=True))


@pytest.fixture
def reference(tmp_path):
    np.savez(tmp_path / "ref.npz", random_images(9))
    return tmp_path / "ref.npz"


def test_a_second_time_the_network_does_not_run_on_the_reference(reference, tmp_path, capsys):
    first, cache = counting(), tmp_path / "deep" / "cache"
    found = measure(open_images(reference), first, 4, ALL, cache)
    assert first.network.images == 9
    (tmp_path / "elsewhere").mkdir()
    moved = reference.rename(tmp_path / "elsewhere" / "moved.npz")                # what counts is the content
    again = counting()
    assert same(measure(open_images(moved), again, 4, ALL, cache), found) and again.network.images == 0
    assert len(list(cache.iterdir())) == 1 and not capsys.readouterr().err
    fresh = counting()
    assert same(measure(open_images(moved), fresh, 4, ALL), found) and fresh.network.images == 9          # without a cache


def test_other_images_weights_networks_crops_and_needs_are_measured_anew(reference, tmp_path):
    cache, runs = tmp_path / "cache", []

    def run(images, extractor, need):
        measure(images, extractor, 4, need, cache)
        runs.append(extractor.network.images)

    np.savez(tmp_path / "other.npz", random_images(9, seed=1))
    cases = [(open_images(reference), counting(), ALL), (open_images(tmp_path / "other.npz"), counting(), ALL),
             (open_images(reference), counting(digest="1"), ALL), (open_images(reference), counting("other"), ALL),
             (open_images(reference, crop=8), counting(), ALL), (open_images(reference), counting(), {"pooled"}),
             (open_images(reference), counting(), {"gaussian"})]
    for _ in range(2):
        for images, extractor, need in cases:
            extractor.network.images = 0
            run(images, extractor, need)
    assert runs == [9] * 7 + [0] * 7


def test_another_normalisation_of_the_same_weights_is_measured_anew(reference, encoder_folder, tmp_path):
    folder = shutil.copytree(encoder_folder, tmp_path / "encoder")
    rows = []
    for mean in ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]):
        config = json.loads((folder / "config.json").read_text())
        config["pretrained_cfg"]["mean"] = mean
        (folder / "config.json").write_text(json.dumps(config))
        extractor = load_extractor(f"local-dir:{folder}")
        rows.append(measure(open_images(reference), extractor, 4, {"pooled"}, tmp_path / "cache").pooled)
        torch.testing.assert_close(rows[-1], measure(open_images(reference), extractor, 4, {"pooled"}).pooled)


def test_only_what_comes_from_images_is_kept(tiny_inception, tmp_path):
    np.savez(tmp_path / "ref.npz", **planted(random_images(9)))
    opened = open_images(tmp_path / "ref.npz")
    for _ in range(2):
        assert measure(opened, tiny_inception, 4, ALL, tmp_path / "cache").gaussian[0].tolist() == [7.0] * 6
    (kept,) = (tmp_path / "cache").iterdir()
    with np.load(kept) as file:
        assert file.files == ["pooled"]
    measure(opened, tiny_inception, 4, {"gaussian"}, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [kept]
    measure(open_images(random_images(9)), tiny_inception, 4, ALL, tmp_path / "memory")          # nothing to know it by
    assert not (tmp_path / "memory").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "text"])
def test_a_damaged_cache_is_said_and_made_again(reference, tmp_path, capsys, damage):
    cache = tmp_path / "cache"
    found = measure(open_images(reference), counting(), 4, ALL, cache)
    (file,) = cache.iterdir()
    data = file.read_bytes()
    at = data.index(found.pooled.numpy().tobytes())
    file.write_bytes({"cut": data[:-100], "flipped": data[:at] + b"\x00\x01" + data[at + 2:], "emptied": b"", "text": b"text"}[damage])
    again = counting()
    assert same(measure(open_images(reference), again, 4, ALL, cache), found) and again.network.images == 9
    assert f"the cached reference features {file} are damaged" in capsys.readouterr().err
    again = counting()
    assert same(measure(open_images(reference), again, 4, ALL, cache), found) and again.network.images == 0


def test_a_cache_that_cannot_be_written_is_said_and_the_scores_go_on(reference, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for _ in range(2):
        extractor = counting()
        assert measure(open_images(reference), extractor, 4, {"pooled"}, tmp_path / "file").pooled.shape == (9, 3)
        assert extractor.network.images == 9 and "reference features are not kept" in capsys.readouterr().err


def test_the_widths_are_inceptions():
    """Which the small one stands in for elsewhere."""
    assert (extraction.Inception.pooled, extraction.Inception.spatial) == (2048, 2023)
    assert (TinyInception.pooled, TinyInception.spatial) == (6, 4)
