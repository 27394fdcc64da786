"""Samples, epochs and GPU hours until a score: from the files of a run and its sweep."""

import json

import pytest

from evaluations import efficiency
from evaluations.efficiency import crossing, hours_at

ROW = {"experiment": "run", "checkpoint": "c", "weights": "ema", "mode": "ode", "heun": False, "num_steps": 100,
       "cfg_scale": 1.0, "cls_cfg_scale": None, "guidance_low": None, "guidance_high": None, "seed": 0,
       "num_samples": 50_000, "labels": "random", "features": "inception", "feature_weights": "w", "reference": "r"}


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
    assert at["50"]["samples"] == 250                                        # the first score: not extrapolated
    assert at["8"]["samples"] == pytest.approx(10 * (100 / 8) ** 2) and at["2"] == "not reached"
    assert curve["EP_FID@5"] == pytest.approx(8) and curve["Samples-to-FID-5"] == pytest.approx(4000)
    assert "EP_FID@2" not in curve and not any(name.startswith("EP_FID") for name in guided)
    assert found["run"]["method"] == "reg" and "not reached" in capsys.readouterr().out
    assert (experiment / "samples" / "efficiency.png").stat().st_size > 1000


def test_crossings_are_log_interpolated():
    assert crossing({1: 100, 4: 50}, 100 / 2**0.5) == pytest.approx(2)
    assert crossing({1: 100, 4: 50, 16: 60}, 49) is None


def test_hours_count_training_alone_at_the_logged_rate():
    lines = [{"step": 10, "images_per_second": 2.0}, {"step": 10, "fid_10k": 1.0},
             {"step": 30, "images_per_second": 4.0}]
    assert hours_at(lines, batch_size=36, processes=5) == {10: pytest.approx(0.25), 30: pytest.approx(0.5)}


@pytest.mark.parametrize(("missing", "word"), [("args.json", "args.json"), ("samples/sweep.json", "score")])
def test_a_run_without_scores_is_named(experiment, missing, word, capsys):
    (experiment / missing).unlink()
    with pytest.raises(SystemExit):
        efficiency.main([str(experiment)])
    assert word in capsys.readouterr().err and not (experiment / "samples" / "efficiency.json").exists()
