"""Every benchmark runs at tiny sizes and prints rows; formulas and plain ways are checked. No time is asserted."""

import importlib
import inspect
import json
import math
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

import train
from benchmarks import data, encode, forms, harness, latency, parts, plain, sampling, scoring, train_step, vae
from dataset import LatentDataset
from evaluations.features import Extractor
from evaluations.metrics import precision_recall
from loss import alignment_loss
from models.sit import SiT_models
from preprocessing.convert import to_png
from runtime.files import to_npy

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Peaks are not measured, which takes seconds."""
    monkeypatch.setattr(harness, "matmul_peak", lambda *_: (1e9, "1 GFLOP/s"))
    monkeypatch.setattr(harness, "bandwidth", lambda *_: (1e9, "1 GB/s"))
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


def test_sampling_without_a_decoder_needs_no_diffusers(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    table = sampling.measure(CPU, "SiT-T/8", resolution=64, batch_size=2, compile=False, num_steps=2, repeats=1,
                             decoder=False)
    each = sampling.network_flops("SiT-T/8", 8, 4)
    assert rows_of(table, capsys)["2 SDE steps"]["ideal"] == pytest.approx(1e9 / (3 * each))


def test_latency(capsys):
    rows = rows_of(latency.measure(CPU, "SiT-T/8", (2, 1), compile=False, resolution=64, repeats=1), capsys)
    reg, sit = (sampling.network_flops("SiT-T/8", 8, 4, slot) for slot in (768, None))
    assert rows["REG / SiT, FLOPs"]["measured"] == reg / sit > 1
    for row, number in (("forward, batch 2", 2), ("guided step, batch 2", 4), ("forward, batch 1", 1)):
        assert rows[f"SiT, {row}"]["ideal"] == pytest.approx(number * sit / 1e9)
        assert f"REG / SiT, {row}" in rows


def test_vae(capsys, monkeypatch):
    monkeypatch.setattr(encode, "WIDTHS", {"cpu": (8, 8, 8, 8)})
    rows = rows_of(vae.measure(CPU, batch_size=2, compile=False, resolution=32, repeats=1), capsys)
    assert rows["encode"]["ideal"] == pytest.approx(1e9 / encode.encoder_flops("cpu", 32))
    assert rows["decode"]["ideal"] == pytest.approx(1e9 / sampling.decoder_flops("cpu", 4))


def test_parts(capsys):
    rows = rows_of(parts.measure(CPU, "SiT-T/8", batch_size=2, compile=False, resolution=64, repeats=1), capsys)
    network = SiT_models["SiT-T/8"](input_size=8, in_channels=4)
    assert rows["AdamW and EMA"]["ideal"] == 40 * sum(parameter.numel() for parameter in network.parameters()) / 1e9
    assert rows["alignment loss"]["ideal"] == 20 * 2 * 2 * 768 / 1e9                         # 2 images, 2 tokens
    assert all(row["ratio"] > 0 for row in rows.values())


def test_forms(capsys):
    rows = rows_of(forms.measure(CPU, "SiT-T/2", batch_size=1, compile=False, resolution=32, repeats=1), capsys)
    assert rows["attention and gradients, queries apart"]["formula"].endswith("of the form in use")
    assert rows["norm and gradients, in use"]["formula"].startswith("1.000 ")
    assert {"attention by flex_attention, keys apart", "GELU, in the product", "network, one CUDA graph"} <= rows.keys()


def test_other_forms_of_attention_are_exact():
    """To float32's rounding; the gradients too, where a CPU has them. Keys that dominate and keys that vanish."""
    torch.manual_seed(0)
    for size in (1.0, 8.0):
        inputs = [(size * torch.randn(2, 3, 17, 8)).requires_grad_() for _ in range(3)]
        wanted = nn.functional.scaled_dot_product_attention(*inputs)
        gradients = torch.autograd.grad(wanted.square().sum(), inputs)
        for form in (forms.queries_apart, forms.keys_apart):
            assert (form(*(one.detach() for one in inputs)) - wanted).abs().max() < 1e-6 * size
        found = torch.autograd.grad(forms.queries_apart(*inputs).square().sum(), inputs)
        for one, other in zip(found, gradients, strict=True):
            assert (one - other).abs().max() < 1e-5 * other.abs().max()


def test_gelu_in_the_product():
    x, weight, bias = torch.randn(2, 5, 8), torch.randn(16, 8), torch.randn(16)
    assert (forms.gelu_in_product(x, weight, bias) - forms.gelu(x, weight, bias)).abs().max() < 5e-4


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
    assert "all five metrics, 40 + 8 images, extrapolated" in rows
    assert rows["all five metrics, 12 + 12 images"]["unit"] == "s"


def test_all_become_one_file_and_a_failed_one_is_left_out(tmp_path, capsys, monkeypatch):
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


# ---- with a time limit

every = importlib.import_module("benchmarks.__main__")


def stub(monkeypatch, module, run):
    """Let the benchmark `module` run `run(table)` with an empty table."""
    monkeypatch.setattr(module, "measure", lambda device, **sizes: run(harness.Table(module.__name__, {}, device)))


def test_every_row_is_in_the_file_when_it_is_made_and_stays_there(tmp_path, monkeypatch, capsys):
    output, seen = tmp_path / "all.json", []

    def rows_and_an_error(table):
        for name in "ab":
            table.add(name, {"ours": [1.0]})
            seen.append([row["name"] for one in json.loads(output.read_text()) for row in one["rows"]])
        raise RuntimeError("in the third row")

    stub(monkeypatch, data, rows_and_an_error)
    stub(monkeypatch, encode, lambda table: table.add("c", {"ours": [1.0]}))
    with pytest.raises(SystemExit) as stopped:
        every.main(["--only", "data,encode", "--minutes", "9", "--output", str(output)])
    assert stopped.value.code == 1 and "in the third row" in capsys.readouterr().err
    assert seen == [["a"], ["a", "b"]]
    assert [[row["name"] for row in one["rows"]] for one in json.loads(output.read_text())] == [["a", "b"], ["c"]]


def test_after_the_limit_no_benchmark_starts_and_each_may_take_half_of_the_time(tmp_path, monkeypatch, capsys):
    shares, minutes = [], 0.01

    def slow(table):
        shares.append((harness.run.until - time.monotonic()) / (60 * minutes))
        table.add("slow", {"ours": [1.0]})
        time.sleep(60 * minutes)

    stub(monkeypatch, data, slow)
    stub(monkeypatch, encode, lambda table: table.add("late", {"ours": [1.0]}))
    every.main(["--only", "data,encode", "--minutes", str(minutes), "--output", str(tmp_path / "all.json")])
    printed = capsys.readouterr()
    assert 0.3 < shares[0] <= 0.5 and harness.run.until == math.inf                                # again as before
    assert "benchmarks.encode: not measured" in printed.err and "late" not in printed.out
    assert [one["benchmark"] for one in json.loads((tmp_path / "all.json").read_text())] == ["benchmarks.data"]


def test_late_timings_end_after_one_turn_and_none_begins(tmp_path, monkeypatch, capsys):
    order = []

    def late(table):
        def ours():
            order.append("ours")
            harness.run.until = -math.inf                         # passes in the warm-up

        for name in ("first", "second"):
            table.add(name, harness.timed({"ours": ours, "plain": lambda: order.append("plain")}, CPU, repeats=5))

    stub(monkeypatch, data, late)
    every.main(["--only", "data", "--minutes", "9", "--output", str(tmp_path / "all.json")])
    assert order == ["ours", "ours"] and "benchmarks.data: not measured to its end" in capsys.readouterr().err
    assert [row["name"] for row in json.loads((tmp_path / "all.json").read_text())[0]["rows"]] == ["first"]


def test_a_gpus_rows_are_in_the_order_of_their_worth_and_missing_packages_are_named(tmp_path, monkeypatch, capsys):
    order = []
    for name in every.ALL:
        module = importlib.import_module(f"benchmarks.{name}")
        wanted = inspect.signature(module.measure)

        def measured(device, name=name, wanted=wanted, **sizes):
            wanted.bind(device, **sizes)
            order.append(f"{name} {sizes['model']}" if "model" in sizes else name)
            return 1 / (name != "latency")

        monkeypatch.setattr(module, "measure", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit):                               # latency has failed
        every.main(["--gpu", "--minutes", "6", "--output", str(tmp_path / "all.json")])
    assert order == ["train_step SiT-XL/2", "latency SiT-XL/2", "sampling SiT-XL/2", "train_step SiT-B/2",
                     "train_step SiT-L/2", "scoring", "parts SiT-XL/2", "forms SiT-XL/2", "data"]
    assert "benchmarks.vae: not measured, diffusers is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "flags", "word"), [
    ("__main__", ["--gpu", "--minutes", "1e-9", "--output", "{}/all.json"], "--gpu"),
    ("__main__", ["--minutes", "0"], "--minutes"),
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


@pytest.mark.parametrize(("slot", "tokens"), [(768, 2), (None, 1)])
def test_flops_of_a_network_by_hand(slot, tokens):
    """SiT-T/8 on one patch, and the class token: 2 FLOPs per weight and token, and attention."""
    width, depth, patch, head = 128, 6, 4 * 8 * 8, slot or 0
    block = tokens * (4 + 8) * width**2 + 2 * tokens**2 * width + 6 * width**2    # products, attention, condition
    once = patch * width + head * width + (256 + width) * width + 2 * width**2 + width * patch + width * head
    assert sampling.network_flops("SiT-T/8", 8, 4, slot) == 2 * (depth * block + once)


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
