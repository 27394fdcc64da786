"""The toy's comparison: steps to a distance, means over seeds, and results from the metrics.jsonl of ordinary runs."""

import json
import sys
import time

import numpy as np
import pytest
from PIL import Image

import train
from evaluations.efficiency import crossing
from runtime.messages import UserError
from toy import compare
from toy.compare import COMPARED, RECIPES, SCALES, read_curve, report, train_all, train_command
from toy.summary import METHODS, summarise, table


@pytest.mark.parametrize("target", [0.5, 3.0, 7.9])
def test_steps_to_a_distance_are_exact_on_a_power_law(target):
    curve = {step: 80 * step**-0.4 for step in (250, 500, 1000, 3000, 400_000)}
    assert crossing(curve, target) == pytest.approx((80 / target) ** 2.5, rel=1e-9)


@pytest.mark.parametrize(("distances", "target", "steps"),
                         [((8, 2, 4), 4, 2**0.5), ((8, 2, 4), 9, 1), ((8, 6, 5), 4, None), ((8, 6, 5), 5, 4)])
def test_the_first_crossing_counts(distances, target, steps):
    assert crossing(dict(zip((1, 2, 4), distances, strict=True)), target) == (steps and pytest.approx(steps))


def falling(final: float) -> dict[int, float]:
    """A distance that falls as step^-1/2 to `final` at step 400."""
    return {step: final * (400 / step) ** 0.5 for step in (100, 200, 400)}


def test_runs_are_compared_with_those_of_the_same_seed():
    finals = {"sit": [4.0, 4.4], "repa": [3.0, 4.5], "reg": [2.4, 2.4]}
    found = summarise({method: dict(enumerate(map(falling, ends))) for method, ends in finals.items()})
    assert found["reg"]["steps_to"]["sit"] == pytest.approx([400 * (2.4 / 4) ** 2, 400 * (2.4 / 4.4) ** 2])
    assert found["reg"]["over_sit"]["mean"] == pytest.approx((2.4 / 4 + 2.4 / 4.4) / 2)
    assert found["repa"]["steps_to"]["sit"] == [pytest.approx(225), None] and "sit" not in found["sit"]["steps_to"]
    assert found["sit"]["distance"][400] == {"mean": pytest.approx(4.2), "std": pytest.approx(0.2 * 2**0.5)}
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table(found).splitlines()]
    assert rows[2] == ["SiT", "8.40 ± 0.57", "5.94 ± 0.40", "4.20 ± 0.28", "-", "-", "1 of 2 runs"]
    assert rows[3][4:] == ["0.886 ± 0.193", "1 of 2 runs", "-"]
    assert rows[4][5:] == ["132 ± 18", "185 ± 101"]


def test_a_seed_without_its_counterpart_and_an_early_arrival_are_shown_as_such():
    found = summarise({"sit": {0: falling(4.0)}, "reg": {0: falling(1.9), 1: falling(2.0)}})
    assert found["reg"]["steps_to"] == {"sit": [100]}
    assert "| at most 100 ± 0 |" in table(found)


def lines(curve: dict[int, float]) -> str:
    """A metrics.jsonl with training lines between the scores, and half a line at its end."""
    return "".join(f'{{"step": {step}, "loss": 1.0}}\n{{"step": {step}, "fd_features_1024": {value}}}\n'
                   for step, value in curve.items()) + '{"step": 401, "fd_fea'


def test_results_come_from_the_metrics_of_finished_runs(tmp_path):
    settings = SCALES["cpu"] | {"--max-train-steps": 400}
    for name, curve in {"sit-seed1": falling(4.0), "reg-seed1": falling(3.0), "repa-seed0": {100: 9.0}}.items():
        (tmp_path / name / "grids").mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text(lines(curve))
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name / "grids" / "0000400.png")
    assert read_curve(tmp_path / "repa-seed0") == {100: 9.0} and read_curve(tmp_path / "sit-seed2") == {}
    text = report("cpu", settings, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["curves"]["reg"]["1"] == {"100": 6.0, "200": pytest.approx(3 * 2**0.5), "400": 3.0}
    assert results["summary"]["reg"]["steps_to"]["sit"] == [pytest.approx(225)]
    assert len(results["not_run"]) == 10 and "repa-seed0" in results["not_run"] and "REPA" not in text
    assert (tmp_path / "tables.md").read_text() == text and "Not run: sit-seed0" in text
    for name in ("convergence.png", "samples.png"):
        assert Image.open(tmp_path / name).size[0] > 300


def test_an_ordinary_run_leaves_what_is_read(data_dir, encoder_folder, vae_folder, tmp_path):
    """train.py's own metrics.jsonl and grid, at the smallest size."""
    reference = np.random.default_rng(1).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=reference)
    flags = SCALES["cpu"] | {"--max-train-steps": 2, "--eval-steps": 1, "--eval-samples": 16, "--batch-size": 4,
                             "--sampling-steps": 2, "--projector-dim": 32, "--ref-batch": tmp_path / "reference.npz",
                             "--enc-type": f"local-dir:{encoder_folder}", "--vae": vae_folder}
    _, method, *command = train_command("toy", flags, "reg", 0)
    train.main(["--method", method.removeprefix("METHOD="), "--data-dir", str(data_dir), "--output-dir", str(tmp_path),
                *command[command.index("toy") + 1:]])
    assert [step for step, distance in read_curve(tmp_path / "reg-seed0").items() if distance > 0] == [1, 2]
    assert (tmp_path / "reg-seed0" / "grids" / "0000002.png").exists()


@pytest.mark.parametrize("scale", SCALES)
def test_every_flag_is_one_of_train(scale):
    for method in COMPARED[scale]:
        command = train_command(RECIPES[scale], SCALES[scale], method, 0)
        args = train.parse_args(command[command.index(RECIPES[scale]) + 1:])
        assert command[1] == f"METHOD={METHODS[method].name}" and args.exp_name == f"{method}-seed0"
        assert (args.proj_coeff == 0) == (method == "class-token") and (args.align is None) == (method != "patches")


def run(tmp_path, programs: dict[str, str], at_once=2, seconds=60.0) -> list[str]:
    """The runs that `train_all` finished, each a Python program."""
    finished = []
    commands = {name: [sys.executable, "-c", program] for name, program in programs.items()}
    train_all(commands, {}, tmp_path, at_once, time.monotonic() + seconds, lambda: finished.append(len(finished)))
    return finished


def test_runs_have_a_log_each_and_none_starts_that_would_end_too_late(tmp_path):
    programs = dict.fromkeys(("a", "b", "c"), "import time; time.sleep(0.7); print('done')")
    assert len(run(tmp_path, programs, at_once=1, seconds=1.0)) == 1
    assert (tmp_path / "a.log").read_text() == "done\n" and not (tmp_path / "b.log").exists()
    assert len(run(tmp_path, programs)) == 3


def test_a_failed_run_is_named_and_a_stopped_run_stops_all(tmp_path):
    trains = ("import signal, sys; signal.signal(15, lambda *_: sys.exit(print('saved'))); "
              "print(1, flush=True); signal.pause()")
    fails = f"while not open({str(tmp_path / 'b.log')!r}).read(): pass\nexit(3)"
    with pytest.raises(UserError, match="a.log"):
        run(tmp_path, {"b": trains, "a": fails})
    assert (tmp_path / "b.log").read_text() == "1\nsaved\n"
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, {"a": "import sys; sys.exit(75)"})
    assert stopped.value.code == 75


@pytest.mark.parametrize(("flags", "word"), [(["--scale", "gpu"], "--scale gpu"), (["--minutes", "0"], "--minutes"),
                                             (["--learning-rate", "-1"], "--learning-rate"), ([], "other")])
def test_refusals(tmp_path, capsys, flags, word):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "settings.json").write_text(json.dumps(SCALES["cpu"] | {"--batch-size": 8}))
    with pytest.raises(SystemExit) as stopped:
        compare.main([*flags, "--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "other")])
    assert stopped.value.code == 2 and word in capsys.readouterr().err and not (tmp_path / "data").exists()
