"""Every benchmark runs at tiny sizes and prints rows; formulas and plain ways are checked. No time is asserted."""

import importlib
import json

import numpy as np
import pytest
import torch
from torch import nn

import train
from benchmarks import data, encode, harness, plain, sampling, scoring, train_step
from dataset import LatentDataset
from evaluations.features import Extractor
from evaluations.metrics import precision_recall
from loss import alignment_loss
from preprocessing.convert import to_png
from runtime.files import to_npy

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Peaks are not measured, which takes seconds."""
    monkeypatch.setattr(harness, "matmul_peak", lambda *_: (1e9, "1 GFLOP/s"))
    monkeypatch.setattr(harness, "has_fast_bf16", lambda *_: False)


def rows_of(table: harness.Table, capsys) -> dict[str, dict]:
    """The rows by name, whose numbers must be positive, and printed."""
    printed = capsys.readouterr().out
    for row in table.record["rows"]:
        assert row["measured"] > 0 and f"| {row['name']} | {row['measured']:.4g} {row['unit']} |" in printed
        assert (row["ideal"] is None) == (row["share"] is None)
    return {row["name"]: row for row in table.record["rows"]}


# ---- each of them

def test_train_step(capsys, encoder_folder, tmp_path):
    train_step.main(["--model", "SiT-T/8", "--resolution", "64", "--batch-size", "2", "--precision", "no", "--repeats",
                     "1", "--enc-type", f"local-dir:{encoder_folder}", "--profile", str(tmp_path / "trace")])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| SiT-T/8, batch 2, float32"))
    assert "images/s" in row and "GFLOP" in row and float(row.split("|")[5]) > 0
    assert (tmp_path / "trace" / "trace.json").exists()


def test_sampling(capsys):
    table = sampling.measure(CPU, model="SiT-T/8", resolution=64, batch_size=2, compile=False, num_steps=2, repeats=1)
    rows = rows_of(table, capsys)
    each, decoder = sampling.network_flops("SiT-T/8", 8, 4), sampling.decoder_flops("cpu", 8)
    assert rows["network, guided"]["ideal"] == pytest.approx(1e9 / each)
    assert rows["2 SDE steps and decoder"]["ideal"] == pytest.approx(1e9 / (3 * each + decoder))          # t = 1, 0.04
    hours = rows["50000 images, 250 steps, extrapolated"]
    assert hours["ideal"] == pytest.approx(50_000 * (461 * each + decoder) / 1e9 / 3600)
    assert hours["ratio"] == pytest.approx(rows["2 SDE steps and decoder"]["ratio"])


def test_data(capsys):
    table = data.measure(CPU, images=6, batch_size=4, resolution=16, entries=30, repeats=1)
    rows = rows_of(table, capsys)
    for kind in ("folder", "zip"):
        assert rows[f"load, {kind}, 1 worker(s)"]["ratio"] > 0 and rows[f"load, {kind}, 1 worker(s)"]["ideal"] == 312.5
        assert rows[f"open 30 entries, {kind}"]["unit"] == "s"


def test_encode(capsys, monkeypatch):
    monkeypatch.setattr(encode, "WIDTHS", {"cpu": (8, 8, 8, 8)})
    rows = rows_of(encode.measure(CPU, images=3, batch_size=2, resolution=32, repeats=1), capsys)
    assert rows["convert, 1 worker(s)"]["ratio"] > 0
    assert rows["encode, fp32"]["ideal"] == pytest.approx(1e9 / encode.encoder_flops("cpu", 32))


class TinyInception(nn.Module):
    """In place of Inception: few features, so that covariances are cheap."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(12, 10)

    def forward(self, images):
        seen = self.body(nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1))           # (B, 10)
        return seen[:, :6], seen[:, 6:]


def test_scoring(capsys, monkeypatch):
    extractor = Extractor(TinyInception(), CPU, "inception", "random", None, torch.randn(12, 6))
    monkeypatch.setattr(scoring, "random_inception", lambda device: extractor)
    rows = rows_of(scoring.measure(CPU, images=12, rows=40, batch_size=4, resolution=16), capsys)
    assert rows["features"]["ideal"] == pytest.approx(1e9 / (2 * 12 * 10))
    assert rows["precision, recall"]["ideal"] == pytest.approx(2 * 6 * (40**2 + 8**2 + 40 * 8) / 1e9)
    assert rows["all five metrics, 12 + 12 images"]["unit"] == "s"


def test_all_become_one_file_and_a_failed_one_is_left_out(tmp_path, capsys, monkeypatch):
    every = importlib.import_module("benchmarks.__main__")

    def measured(device, **sizes):
        table = harness.Table("encode", sizes, device)
        table.add("a row", {"ours": [2.0], "plain": [4.0]}, 8, "images/s", 16.0, "by hand")
        return table

    monkeypatch.setattr(encode, "measure", measured)
    monkeypatch.setattr(data, "measure", lambda device, **_: 1 / 0)
    with pytest.raises(SystemExit) as stopped:
        every.main(["--only", "data,encode", "--output", str(tmp_path / "all.json")])
    record, = json.loads((tmp_path / "all.json").read_text())
    printed = capsys.readouterr()
    assert stopped.value.code == 1 and "benchmarks.data failed" in printed.err
    assert record["rows"][0]["ratio"] == 0.5
    assert torch.__version__.startswith(record["hardware"]["versions"]["torch"])
    assert "| a row | 4 images/s | 16 images/s | 25 % | 0.50 | by hand |" in printed.out


@pytest.mark.parametrize(("module", "flags", "word"), [
    ("__main__", ["--only", "nosuch"], "nosuch"), ("__main__", ["--output", "{}"], "cannot be written"),
    ("train_step", ["--model", "SiT-B"], "SiT-B"), ("train_step", ["--precision", "fp16"], "CUDA"),
    ("train_step", ["--repeats", "0"], "--repeats"), ("train_step", ["--enc-type", "none"], "none")])
def test_refusals(tmp_path, capsys, module, flags, word):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"benchmarks.{module}").main([flag.format(tmp_path) for flag in flags])
    assert stopped.value.code == 2 and word in capsys.readouterr().err


# ---- times and formulas

def test_ways_are_timed_in_turn():
    order = []
    seconds = harness.timed({way: lambda way=way: order.append(way) for way in "ab"}, CPU, repeats=2, warmup=1)
    assert order == ["a", "b", "b", "a", "a", "b"] and [len(found) for found in seconds.values()] == [2, 2]


def test_a_share_is_of_rates_or_of_times_and_a_ratio_is_of_pairs():
    table = harness.Table("none", {}, CPU)
    table.add("rate", {"ours": [2.0]}, 60, "images/s", ideal=40.0)
    table.add("time", {"ours": [1.0, 20.0, 4.0], "plain": [2.0, 40.0, 8.0]}, ideal=3.0)
    table.add("no bound", {"ours": [4.0]})
    assert [row["share"] for row in table.record["rows"]] == [0.75, 0.75, None]
    assert table.record["rows"][1]["ratio"] == 0.5


def test_flops_of_a_network_by_hand():
    """SiT-T/8 on 2 tokens, one of them the class token: 2 FLOPs per weight and token, and attention."""
    width, depth, tokens, patch = 128, 6, 2, 4 * 8 * 8
    block = tokens * (4 + 8) * width**2 + 2 * tokens**2 * width + 6 * width**2    # products, attention, condition
    once = patch * width + 768 * width + (256 + width) * width + 2 * width**2 + width * patch + width * 768
    assert sampling.network_flops("SiT-T/8", 8, 4) == 2 * (depth * block + once)


def test_flops_of_a_training_image_with_dinov2():
    settings = train.resolve(train.parse_args(["--model", "SiT-B/2"]))
    assert train_step.flops_per_image(settings, 256) == pytest.approx(196.2e9, rel=2e-3)


def test_flops_of_stable_diffusions_encoder():
    """136.4 billion multiplications and additions an image of 256 px."""
    assert encode.encoder_flops("cuda", 256) == pytest.approx(2 * 136.4e9, rel=1e-3)


# ---- a comparison of two different things says nothing

def test_the_plain_alignment_is_the_same_number():
    tokens = [torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    torch.testing.assert_close(plain.alignment_loss(tokens[:2], tokens[2:]), alignment_loss(tokens[:2], tokens[2:]))


def test_the_plain_scores_are_the_same_numbers():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 6, generator=generator), 0.3 + torch.randn(200, 6, generator=generator)
    assert scoring.plain_frechet(a, b) == pytest.approx(scoring.frechet(a, b), rel=1e-6)
    assert scoring.plain_precision_recall(b, a) == pytest.approx(precision_recall(b, a, "exact"), abs=1e-3)


@pytest.mark.parametrize("end", ["", ".zip"])
def test_the_data_that_is_loaded_is_what_was_built(tmp_path, end):
    image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    moments = np.random.default_rng(0).normal(size=(8, 2, 2)).astype(np.float16)
    entries = LatentDataset(data.build(tmp_path / "x", [to_png(image)], [to_npy(moments)], 5, end))
    found, latents, label = entries[3]
    assert len(entries) == 5 and label == 3
    assert (found.permute(1, 2, 0).numpy() == image).all() and (latents.numpy() == moments).all()
