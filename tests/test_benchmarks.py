"""Benchmarks run, say what they measured, and their pages say what they print. No test asks how long anything takes."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from benchmarks import harness, plain, scaling, train_step
from loss import alignment_loss

ROOT = Path(__file__).parents[1]


def test_the_scaling_page_holds_the_table_that_is_computed():
    assert scaling.table() in (ROOT / "benchmarks" / "SCALING.md").read_text()


def test_scaling_by_hand():
    """XL/2 on one node: 32 images of 773.5 GFLOP at 395 TFLOP/s; 2.74 GB of gradient pass NVLink 2 * 7/8 times."""
    found = scaling.step_time("XL/2", 8, 256)
    assert found["compute"] == pytest.approx(32 * 773.5 / 395e3)
    assert found["exchange"] == pytest.approx(2 * 7 / 8 * 2.74 / 360) and found["exposed"] == 0
    assert found["step"] == found["compute"]
    many = scaling.step_time("XL/2", 64, 256)                     # 3,115 launches take longer than 4 images; 2/3 without the encoder
    assert many["host"] == pytest.approx(3115 * 5e-6) and many["step"] == many["host"] + many["exposed"]
    assert many["exposed"] == pytest.approx(many["exchange"] - 2 / 3 * (773.5 - 46.3) / 773.5 * 15.575e-3)
    one = scaling.step_time("XL/2", 1, 1)
    assert one["exchange"] == 0 and one["step"] == one["host"]    # a single image leaves the GPU waiting for launches


def test_the_scaling_models_cost_what_the_benchmark_counts():
    for name, (flops, parameters, _) in scaling.MODELS.items():
        args = train_step.parse_args(["--model", f"SiT-{name}", "--batch-size", "8", "--no-compile"])
        settings = train_step.settings_of(args, "no")
        assert train_step.flops_per_image(settings, cached=False) == pytest.approx(flops, rel=2e-3), name
        with torch.device("meta"):
            _, _, model = train_step.build(settings, torch.device("meta"))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=2e-3)


def test_the_plain_alignment_is_the_same_number():
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(3, 5, 7, generator=generator) for _ in range(4)]
    torch.testing.assert_close(plain.alignment_loss(tokens[:2], tokens[2:]), alignment_loss(tokens[:2], tokens[2:]))


# ---- the harness

def test_ways_are_timed_in_turn(monkeypatch):
    order = []
    seconds = harness.timed({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, torch.device("cpu"), warmup=1, repeats=2)
    assert order == ["a", "b", "b", "a", "a", "b"] and [len(found) for found in seconds.values()] == [2, 2]


def test_what_takes_long_is_warmed_up_once(monkeypatch):
    """Beside the first turn, in which a short thing may be compiled."""
    clock, runs = iter(range(0, 1000, 3)), []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))                # every run takes 3 seconds
    seconds = harness.timed({"a": lambda: runs.append("a"), "b": lambda: runs.append("b")}, torch.device("cpu"), warmup=3, repeats=1)
    assert runs == ["a", "b", "b", "a", "a", "b"] and seconds == {"a": [3], "b": [3]}
    runs.clear()
    harness.timed({"a": lambda: runs.append("a")}, torch.device("cpu"), warmup=3, repeats=1)
    assert len(runs) == 4                                         # 3 seconds are not long


def test_a_row_is_said_at_once(capsys):
    harness.Row("a step", 2.0, "images/s")
    assert capsys.readouterr().err == "a step: 2 images/s\n"


def test_a_ratio_is_of_pairs():
    assert harness.ratio([1.0, 20.0, 3.0], [2.0, 40.0, 6.0]) == 0.5                       # however the machine's speed drifts


def test_shares_of_rates_and_of_times():
    assert harness.Row("rate", 30.0, "images/s", ideal=40.0).share == 0.75
    assert harness.Row("time", 4.0, "s", ideal=3.0).share == 0.75
    assert harness.Row("no bound", 4.0, "s").share is None


def test_launches_are_counted_without_views():
    x = torch.zeros(2, 3)
    assert harness.count_launches(lambda: (x.view(6) + 1).t().sum(), torch.device("cpu")) == 2


TINY = ["--threads", "1", "--warmup", "0", "--repeats", "1"]


def printed(capsys) -> dict:
    out = capsys.readouterr().out
    assert "measured" in out and "ideal" in out and "share" in out
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("encoder", ["online", "cached"])
def test_train_step(capsys, tmp_path, encoder_folder, encoder, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(train_step, "ALIGNED", (4, 5, 8))
    for name in ("matmul_peak", "bandwidth"):
        monkeypatch.setattr(train_step, name, lambda *_: (1e9, "a round number"))
    try:
        train_step.main([*TINY, "--model", "SiT-T/8", "--resolution", "64", "--batch-size", "2", "--precisions", "no", "--no-compile",
                         "--enc-type", f"local-dir:{encoder_folder}", "--encoder", encoder, "--baseline",
                         "--profile", str(tmp_path / "trace"), "--output", str(tmp_path / "found.json")])
    finally:
        torch.set_num_threads(threads)
    found = printed(capsys)
    assert found == json.loads((tmp_path / "found.json").read_text()) and (tmp_path / "trace" / "SiT-T-8-no" / "trace.json").exists()
    step, launches, memory, kept, update, alignment = found["rows"]
    assert 0 < kept["measured"] < memory["measured"]
    assert step["measured"] > 0 and step["ideal"] > 0 and step["ratio"] > 0 and "GFLOP" in step["formula"]
    assert launches["measured"] < launches["baseline"] and alignment["ratio"] > 0 and update["ratio"] > 0 and memory["measured"] > 0
    assert found["hardware"]["versions"]["torch"] and found["hardware"]["threads"] == 1 and step["name"] == "SiT-T/8, batch 2, float32"


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--device", "tpu"], "--device is 'tpu'"), (["--repeats", "0"], "--repeats is 0"),
    (["--precisions", "fp8"], "--precisions names 'fp8'"),
    (["--model", "SiT-B/2,SiT-B"], "--model names 'SiT-B':"),
    (["--precisions", "no,fp16"], "which needs a CUDA device"), (["--model", "SiT-B/2,"], "--model names '':"),
    (["--device", "cuda"], "torch sees no GPU"), (["--batch-size", "0"], "--batch-size is 0"), (["--enc-type", "a,b"], "give one"),
    (["--resolution", "33"], "multiple of 16"),
    (["--output", "{}"], "is a folder"), (["--output", "{}/file/a.json"], "file"),
])
def test_mistakes_end_with_one_sentence(tmp_path, capsys, flags, sentence):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        train_step.main([flag.format(tmp_path) for flag in flags])
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--only", "nosuch"], "--only names 'nosuch'"), (["--only", ","], "--only names ''"), (["--repeats", "0"], "--repeats is 0"),
    (["--output", "{}"], "is a folder"),
])
def test_all_benchmarks_refuse_before_the_first_one_runs(tmp_path, capsys, monkeypatch, flags, sentence):
    every = importlib.import_module("benchmarks.__main__")
    monkeypatch.setattr(every, "run", lambda *_: pytest.fail("one has run"))
    with pytest.raises(SystemExit) as stopped:
        every.main([flag.format(tmp_path) for flag in flags])
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_all_benchmarks_become_one_file_and_one_page(tmp_path, capsys, monkeypatch):
    every = importlib.import_module("benchmarks.__main__")
    row = {"name": "a step", "measured": 2.0, "unit": "images/s", "ideal": 4.0, "share": 0.5, "formula": "by hand", "ratio": None}
    monkeypatch.setattr(every, "run", lambda name, _: None if name == "data" else {"benchmark": name, "settings": {}, "rows": [row]})
    with pytest.raises(SystemExit) as stopped:                    # one of them failed
        every.main(["--only", "train_step,data", "--output", str(tmp_path / "all.json")])
    assert stopped.value.code == 1 and [found["benchmark"] for found in json.loads((tmp_path / "all.json").read_text())] == ["train_step"]
    assert "| a step | 2 images/s | 4 images/s | 50 % | - | by hand |" in capsys.readouterr().out


@pytest.mark.parametrize(("bf16", "fp32", "suits"), [(0.5, 0.25, "fp32"), (0.25, 0.5, "bf16")])
def test_bf16_suits_a_cpu_whose_products_are_faster_in_it(monkeypatch, bf16, fp32, suits):
    monkeypatch.setattr(harness, "timed", lambda ways, *_, **__: {torch.bfloat16: [bf16], torch.float32: [fp32]})
    assert harness.precision_that_suits(torch.device("cpu")) == suits
    assert harness.precision_that_suits(torch.device("cuda")) == "bf16"


@pytest.mark.parametrize(("gigabytes", "baseline", "batch"), [(141, True, 256), (78, False, 128), (78, True, 64), (1, True, 1)])
def test_the_largest_batch_that_fits_a_gpu(monkeypatch, gigabytes, baseline, batch):
    """XL/2: 0.38 GB an image beside 14 GB of states, which the plain way has again."""
    monkeypatch.setattr(train_step, "memory_of", lambda settings, device: (0.38e9, 14e9, gigabytes * 1e9))
    args = train_step.parse_args(["--model", "SiT-XL/2", "--precisions", "bf16", "--no-compile", *(["--baseline"] if baseline else [])])
    assert train_step.fitting_batch(args, torch.device("cuda")) == batch
    assert train_step.fitting_batch(args, torch.device("cpu")) == 8


def test_a_model_that_does_not_fit_leaves_the_others_their_rows(monkeypatch, capsys):
    def rows(args, device):
        if "XL" in args.model:
            raise torch.OutOfMemoryError("too little memory.\nand a long story")
        return [args.model]

    monkeypatch.setattr(train_step, "step_rows", rows)
    monkeypatch.setattr(train_step, "update_row", lambda args, device: f"{args.model} update")
    monkeypatch.setattr(train_step, "alignment_rows", lambda *_: [])
    monkeypatch.setattr(train_step, "report", lambda name, found, *_: print(found))
    train_step.main(["--device", "cpu", "--model", "SiT-XL/2,SiT-B/2"])
    said = capsys.readouterr()
    assert said.out == "['SiT-B/2', 'SiT-B/2 update']\n"
    assert said.err == "SiT-XL/2 is left out: too little memory. Give a smaller --batch-size\n"


@pytest.mark.parametrize(("suits", "precisions"), [("fp32", "no"), ("bf16", "no,bf16")])
def test_a_step_is_timed_in_the_precisions_that_suit(monkeypatch, suits, precisions):
    asked = []
    monkeypatch.setattr(train_step, "precision_that_suits", lambda device: suits)
    monkeypatch.setattr(train_step, "step_rows", lambda args, device: asked.append((args.model, args.precisions)) or [])
    for rows in ("update_row", "alignment_rows"):
        monkeypatch.setattr(train_step, rows, lambda *_: [])
    monkeypatch.setattr(train_step, "report", lambda *_: None)
    train_step.main(["--device", "cpu", "--model", "SiT-S/8,SiT-T/4"])
    assert asked == [("SiT-S/8", precisions), ("SiT-T/4", precisions)]


def test_peaks_are_measured_where_none_is_known(monkeypatch):
    monkeypatch.setattr(harness, "timed", lambda ways, *_, **__: {"": [0.5, 0.25]})
    peak, source = harness.matmul_peak(torch.device("cpu"), torch.float32)
    assert peak == 2 * 2048**3 / 0.25 and "float32 here" in source
    speed, _ = harness.bandwidth(torch.device("cpu"))
    assert speed == 2 * 2**28 / 0.25                              # read once, written once
