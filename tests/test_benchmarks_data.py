"""`python -m benchmarks.data` runs through on tiny sizes and says what it measured; no time is asserted."""

import json
import os

import pytest
import torch

from benchmarks import data
from runtime import index
from runtime.files import to_npy


def test_it_runs_and_prints_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(index, "SETTLED", 0)
    cache = os.environ["XDG_CACHE_HOME"]
    data.main(["--device", "cpu", "--baseline", "--resolution", "16", "--images", "6", "--batch-size", "4", "--workers", "2",
               "--entries", "30", "--warmup", "0", "--repeats", "1", "--folder", str(tmp_path),
               "--output", str(tmp_path / "out" / "data.json")])
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found == json.loads((tmp_path / "out" / "data.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert all(row["measured"] > 0 for row in rows.values())
    for kind in ("folder", "zip"):
        for workers in ("1 worker", "2 workers"):
            row = rows[f"load, {kind}, {workers}"]
            assert row["unit"] == "images/s" and row["ratio"] > 0 and "extrapolated" in row["formula"]
            assert rows[f"load, features, {kind}, {workers}"]["unit"] == "images/s"
        assert rows[f"open 30 entries, {kind}, first"]["unit"] == rows[f"open 30 entries, {kind}, later"]["unit"] == "s"
    assert rows["load, zip, 2 workers"]["ideal"] == 625                           # 2 of 16 cores
    assert found["settings"]["bytes_an_image"] > 16 * 16 * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"] and os.environ["XDG_CACHE_HOME"] == cache


@pytest.mark.parametrize("flag", ["--workers", "--entries", "--images", "--batch-size", "--resolution"])
def test_sizes_that_cannot_be(flag, capsys):
    with pytest.raises(SystemExit) as ended:
        data.main([flag, "0"])
    assert ended.value.code == 2 and f"{flag} is 0" in capsys.readouterr().err


@pytest.mark.parametrize("zipped", [False, True])
def test_the_features_it_builds_are_what_training_reads(tmp_path, zipped):
    """Those of each entry, in the layout that `encode` writes, in the place of its image."""
    pictures, moments = [data.to_png(data.np.zeros((32, 32, 3), dtype="uint8"))], [to_npy(data.np.zeros((8, 4, 4), dtype="float16"))]
    entries = data.with_features(data.build(tmp_path / "x", pictures, moments, 3, zipped), 3, 32, zipped)
    image, _, label, features = entries[2]
    assert image.numel() == 0 and label == 2 and entries.features[0].record.enc_type == data.ENCODER
    assert features["class_token"].shape == (768,) and features["patches"].shape == (4, 768) and features["patches"].dtype == torch.float16
    assert not torch.equal(features["patches"], entries[1][3]["patches"])


@pytest.mark.parametrize("zipped", [False, True])
def test_the_data_set_it_builds_is_what_training_reads(tmp_path, zipped):
    rng = data.np.random.default_rng(0)
    pictures = [data.photograph(rng, 16) for _ in range(3)]
    moments = [to_npy(rng.normal(size=(8, 2, 2)).astype("float16")) for _ in range(2)]
    entries = data.LatentDataset(data.build(tmp_path / "x", [data.to_png(picture) for picture in pictures], moments, 5, zipped))
    assert len(entries) == 5 and entries.resolution == 16 and entries.moments_shape == (8, 2, 2)
    for i in range(5):
        image, latents, label = entries[i]
        assert (image.permute(1, 2, 0).numpy() == pictures[i % 3]).all() and label == i
        assert (latents.numpy() == data.np.load(data.io.BytesIO(moments[i % 2]))).all()
