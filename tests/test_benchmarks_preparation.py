"""The benchmarks of preparation and scoring at sizes that take seconds: they run, and say what they should."""

import json

import numpy as np
import pytest
import torch

from benchmarks import encode, scoring, vae
from preprocessing.encode import encode_batches
from tests.conftest import TinyInception


@pytest.fixture(autouse=True)
def some_peak(monkeypatch):
    """To measure the machine's would take longer than all else."""
    for module in (encode, scoring):
        monkeypatch.setattr(module, "matmul_peak", lambda device, dtype: (1e11, "100 GFLOP/s"))


def spoken(capsys) -> dict:
    """The JSON line."""
    return json.loads(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("{")))


def require_rows(found: dict, said: dict, without_ideal: set[str]) -> dict[str, dict]:
    """Rows by name; each has a measured value, an ideal with its formula and a share, but for those that have no bound."""
    assert said == json.loads(json.dumps(found)) and said["hardware"]["cores"] >= 1
    rows = {row["name"]: row for row in said["rows"]}
    for name, row in rows.items():
        assert row["measured"] > 0 and (row["ideal"] is None) == (name in without_ideal) == (row["share"] is None), name
        assert (row["formula"] == "") == (name in without_ideal), name
    return rows


@pytest.mark.parametrize("suits", ["fp32", "bf16"])
def test_encode(monkeypatch, capsys, tmp_path, suits):
    monkeypatch.setattr(vae, "WIDTHS", {"cpu": (8, 8, 8, 8)})
    monkeypatch.setattr(encode, "precision_that_suits", lambda device: suits)
    found = encode.main(["--device", "cpu", "--images", "6", "--encoded", "5", "--batch-size", "2", "--resolution", "32", "--workers", "1",
                         "2", "--warmup", "0", "--repeats", "1", "--baseline", "--output", str(tmp_path / "found.json")])
    rows = require_rows(found, spoken(capsys), {"convert, 1 worker", "encode: reading in this process"})
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == found["rows"]
    whole = {f"encode: all stages, {precision}, 0 reading workers" for precision in {"fp32", suits}}
    assert {name for name, row in rows.items() if row["ratio"]} == {"convert, 1 worker", "convert, 2 workers"} | whole
    assert rows["convert, 2 workers"]["ideal"] == pytest.approx(2 * rows["convert, 1 worker"]["measured"])


def test_the_ideal_of_encode_is_that_of_stable_diffusions_vae(monkeypatch):
    """136.4 billion multiplications and additions an image of 256 px."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr(vae, "WIDTHS", {"cpu": vae.WIDTHS["cuda"]})
    assert encode.encode_flops(torch.device("cpu"), 256) == pytest.approx(2 * 136.4e9, rel=1e-3)


def test_the_ideal_of_scoring_is_that_of_the_whole_inception():
    """Twice 5.71 billion multiplications and additions an image of 299 px, whatever size it comes in."""
    assert scoring.image_flops() == pytest.approx(2 * 5.71e9, rel=1e-3)


def test_scoring(tiny_inception, monkeypatch, capsys):
    monkeypatch.setattr(scoring, "Inception", TinyInception)
    monkeypatch.setattr(scoring, "CLASSES", 12)
    found = scoring.main(["--device", "cpu", "--samples", "5", "--references", "4", "--rows", "300", "200", "--stage", "3", "--batch-size",
                          "2", "--size", "32", "--warmup", "0"])
    rows = require_rows(found, spoken(capsys), set())
    assert rows["all five metrics, 5 + 4 images"]["unit"] == "s" and rows["features"]["unit"] == "images/s"
    assert found["settings"]["seconds extrapolated to 50000 + 10000 images"] > 0


def test_scorings_plain_ways_do_what_the_stages_do(monkeypatch):
    """Stages and plain ways are run once each, and must agree: a comparison of two different things says nothing."""
    results = {}

    def run(self, name, ways, *_, **__):
        results[name] = {way: function() for way, function in ways.items()}

    class Args:
        rows, stage, size, batch_size, baseline, profile = (300, 200), 3, 32, 2, True, None

    monkeypatch.setattr(scoring.Bench, "add", run)
    monkeypatch.setattr(scoring, "Inception", TinyInception)
    bench = scoring.Bench(Args, torch.device("cpu"))
    rows = [torch.randn(count, TinyInception.pooled, generator=torch.Generator().manual_seed(count)) for count in Args.rows]
    scoring.statistics(bench, rows)
    scoring.score(bench, rows[0], 1.0, "")
    scoring.neighbours(bench, *rows, 1.0, "")
    for (_, ours), plain in zip(*results["covariances"].values(), strict=True):
        torch.testing.assert_close(ours, plain)
    assert results["Inception Score"]["ours"] == pytest.approx(results["Inception Score"]["plain"])
    ours, plain = results["precision, recall"].values()
    assert np.abs(np.subtract(ours, plain)).max() < 0.05                          # float16 moves points over circles


@pytest.mark.parametrize(("program", "flags", "sentence"), [
    (encode, ["--workers", "0"], "--workers [0]"), (encode, ["--precision", "tf32"], "tf32, which is a GPU's"),
    (encode, ["--resolution", "30"], "a multiple of 8"), (encode, ["--images", "3", "--encoded", "4"], "only --images 3 are drawn"),
    (scoring, ["--rows", "3", "9"], "need at least 4"),
    (scoring, ["--stage", "1"], "give more")])
def test_sizes_that_cannot_be_are_refused(program, flags, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--device", "cpu", *flags])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_diffusers_is_asked_for_in_a_sentence(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(SystemExit) as stop:
        encode.main(["--device", "cpu"])
    assert stop.value.code == 2 and "pip install diffusers" in capsys.readouterr().err


# --- encode_batches: what the command and its benchmark share ---------------------------------------------------------------------


def two_bytes(images: torch.Tensor) -> torch.Tensor:
    """In a network's place: the first byte of two channels."""
    return images[:, :2, :1, :1].half()


def batches(*sizes):
    start = 0
    for size in sizes:
        yield start, np.arange(start * 12, (start + size) * 12, dtype=np.uint8).reshape(size, 3, 2, 2)
        start += size


def test_each_batch_is_written_once_in_order_whatever_is_read_ahead():
    written = []
    counts = list(encode_batches(two_bytes, batches(3, 3, 2), lambda *found: written.append(found), on_gpu=False))
    assert counts == [3, 3, 2] and [start for start, _ in written] == [0, 3, 6]
    assert all(moments.dtype == torch.float16 and moments[0].ravel().tolist() == [start * 12, start * 12 + 4] for start, moments in written)
    assert list(encode_batches(two_bytes, batches(), None, on_gpu=False)) == []


@pytest.mark.parametrize("bad", [0, 3, 6])
def test_what_writing_raises_is_raised_whichever_batch_it_is(bad):
    def write(start, moments):
        if start == bad:
            raise OSError(f"batch {start}")

    with pytest.raises(OSError, match=f"batch {bad}"):
        list(encode_batches(two_bytes, batches(3, 3, 2), write, on_gpu=False))
