"""Samples, epochs and GPU hours until a score: from the files of a run and its sweep."""

import json

import pytest

from evaluations import efficiency
from evaluations.efficiency import crossing, hours_at

ROW = {"experiment": "run", "checkpoint": "c", "weights": "ema", "mode": "ode", "heun": False, "num_steps": 100,
       "cfg_scale": 1.0, "cls_cfg_scale": None, "guidance_low": None, "guidance_high": None, "seed": 0,
       "time_shift": 1.0, "network_precision": "tf32", "vae": "v", "block": 64, "num_samples": 50_000,
       "labels": "random", "features": "inception", "feature_weights": "w", "reference": "adm.npz",
       "reference_sha256": "b3273271ff"}


@pytest.fixture
def experiment(tmp_path):
    """FID = 100 / sqrt(samples / 10): a straight line in log-log coordinates; 10 images per step, two processes."""
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    rows = [{**ROW, "step": step, "fid": 100 / step**0.5} for step in (25, 100, 400)]
    rows += [{**ROW, "step": 25, "fid": 3.0, "cfg_scale": 2.0, "guidance_low": 0.0, "guidance_high": 1.0}]
    rows += [{**ROW, "step": 100, "fid": 1.0, "experiment": "another"}]
    (folder / "samples" / "sweep.json").write_text(json.dumps(rows))
    (folder / "args.json").write_text(json.dumps({"batch_size": 10, "images": 500, "processes": 2, "method": "reg"}))
    lines = [{"step": step, "images_per_second": 10.0 if step <= 100 else 20.0} for step in (25, 100, 400)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*lines, {"step": 400, "fid_10k": 3.0}])))
    return folder


def test_the_curve_of_a_run(experiment, capsys):
    efficiency.main([str(experiment), "--thresholds", "50,8,5,2"])
    found = json.loads((experiment / "samples" / "efficiency.json").read_text())
    curve, guided = found["curves"]
    assert [point["step"] for point in curve["points"]] == [25, 100, 400] and guided["cfg_scale"] == 2
    assert curve["points"][2] == {"step": 400, "samples": 4000, "epochs": 8.0, "fid": 5.0,
                                  "gpu_hours": pytest.approx(2 * (100 + 150) / 3600)}
    at = curve["crossings"]
    assert "at or before" in at["50"] and curve["reference"] == "adm:b3273271"
    assert at["8"]["samples"] == pytest.approx(10 * (100 / 8) ** 2) and at["2"] == "not reached"
    assert curve["EP_FID@5"] == pytest.approx(8) and curve["Samples-to-FID-5"] == pytest.approx(4000)
    assert not {"EP_FID@2", "EP_FID@50"} & curve.keys() and not any(name.startswith("EP_FID") for name in guided)
    text = capsys.readouterr().out
    assert found["run"]["method"] == "reg" and "not reached" in text and "EP_FID@5: 8" in text
    assert (experiment / "samples" / "efficiency.png").stat().st_size > 1000


def test_each_reference_and_each_time_shift_has_a_curve(experiment):
    """A row of several references has their distances under their labels; the first one's also as `fid`."""
    rows = [{**ROW, "step": step, "time_shift": shift, "fid": 9.0 / step, "fid@adm:b3273271": 9.0 / step,
             "fid@jit:01234567": 8.0 / step} for step in (1, 2) for shift in (1.0, 2.0)]
    (experiment / "samples" / "sweep.json").write_text(json.dumps(rows))
    efficiency.main([str(experiment)])
    curves = json.loads((experiment / "samples" / "efficiency.json").read_text())["curves"]
    assert {(curve["reference"], curve["time_shift"], len(curve["points"]), curve["points"][0]["fid"])
            for curve in curves} == {(label, shift, 2, first) for shift in (1.0, 2.0)
                                     for label, first in (("adm:b3273271", 9.0), ("jit:01234567", 8.0))}


def test_a_run_that_does_not_tell_its_processes_has_no_gpu_hours(experiment):
    (experiment / "args.json").write_text('{"batch_size": 10}')
    efficiency.main([str(experiment)])
    curve = json.loads((experiment / "samples" / "efficiency.json").read_text())["curves"][0]
    assert curve["points"][0]["gpu_hours"] is None and curve["crossings"]["10"] == {"samples": pytest.approx(1000)}


def test_crossings_are_log_interpolated():
    assert crossing({1: 100, 4: 50}, 100 / 2**0.5) == pytest.approx(2)
    assert crossing({1: 100, 4: 50, 16: 60}, 49) is None
    assert crossing({1: 1, 4: -4e-13}, 1e-3) == pytest.approx(4 ** (1 / 3))                 # a distance of 0, rounded


def test_hours_count_training_alone_at_the_logged_rate():
    lines = [{"step": 10, "images_per_second": 2.0}, {"step": 10, "fid_10k": 1.0},
             {"step": 30, "images_per_second": 4.0}]
    assert hours_at(lines, batch_size=36, processes=5) == {10: pytest.approx(0.25), 30: pytest.approx(0.5)}


@pytest.mark.parametrize("content", [None, "[]", "[1]", "{}", '[{"step": 1}]', "["])
@pytest.mark.parametrize(("name", "word"), [("args.json", "args.json"), ("samples/sweep.json", "score")])
def test_a_run_without_scores_or_with_damaged_files_is_named(experiment, name, word, content, capsys):
    (experiment / name).unlink()
    if content is not None:
        (experiment / name).write_text(content)
    with pytest.raises(SystemExit):
        efficiency.main([str(experiment)])
    assert word in capsys.readouterr().err and not (experiment / "samples" / "efficiency.json").exists()
