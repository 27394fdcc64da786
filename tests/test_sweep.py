"""The program behind eval.sh: which settings are made, which are not made again, and what table and plot say of them."""

import csv
import json
import os
from pathlib import Path

import pytest
from PIL import Image

import generate
from evaluations import evaluator, report, sweep
from runtime.files import sha256
from runtime.messages import UserError


def scored(folder: Path, score: float | None, cfg_scale=2.3, low=0.0, high=0.85, cls=None, samples=50, labels="random", step=3, mode="sde",
           seed=0, classes=None, key="fd_net", checkpoint=None, **result) -> dict:
    """Write a metrics.json as the evaluator does, of samples that generate.py made."""
    sampling = dict(mode=mode, num_steps=9, heun=False, cfg_scale=cfg_scale, cls_cfg_scale=cls, guidance_low=low, guidance_high=high,
                    seed=seed, labels=labels, classes=classes, path_type="linear", precision="fp32")
    settings = dict(checkpoint=f"exps/run/checkpoints/{step:07d}.pt", checkpoint_sha256=checkpoint or f"{step:064d}"[::-1], step=step,
                    weights="ema", vae="vae", sampling=sampling, per_proc_batch_size=64, num_images=samples)
    metrics = {"num_samples": samples, "features": "net", "weights_sha256": "0123456789", "weights_verified": None, "ref_batch": "ref.npz",
               "modes": {}, **asked(), **({} if score is None else {key: score}), **result, "settings": settings}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return metrics


def asked(metrics=None, precision_recall="adm", features="local-dir:some/net") -> dict:
    return {"asked": {"features": features, "metrics": metrics, "precision_recall": precision_recall}}


# -------------------------------------------------------------------------------------------------------------------- settings

def test_the_product_of_the_lists():
    lists = {"num_steps": [50, 250], "cfg_scale": [1.5, 2.3], "guidance_high": [0.85, 1.0]}
    settings = sweep.expand(lists)
    assert len(settings) == 8 and settings[1] == {"num_steps": 50, "cfg_scale": 1.5, "guidance_high": 1.0}
    assert sweep.expand({}) == [{}]                                               # generate.py's defaults


def test_an_unguided_setting_is_made_once():
    """With scale 1 neither interval nor class scale applies, but the other settings do."""
    lists = {"num_steps": [50, 250], "cfg_scale": [1.0, 2.3], "cls_cfg_scale": [0.0, 2.0], "guidance_high": [0.85, 1.0]}
    settings = sweep.expand(lists)
    unguided = [setting for setting in settings if setting["cfg_scale"] == 1]
    assert unguided == [{"num_steps": 50, "cfg_scale": 1.0}, {"num_steps": 250, "cfg_scale": 1.0}] and len(settings) == 2 + 8
    assert sweep.expand({"cfg_scale": [1.0], "guidance_low": [0.0], "guidance_high": [0.85, 1.0]}) == [{"cfg_scale": 1.0}]


def test_the_flags_are_those_of_the_two_programs():
    setting = {"weights": "model", "mode": "ode", "num_steps": 9, "cfg_scale": 1.5, "cls_cfg_scale": 0.0, "guidance_low": 0.1,
               "guidance_high": 0.9, "labels": "balanced", "num_fid_samples": 7, "global_seed": 1}
    assert setting.keys() == sweep.SWEPT.keys()
    parsed = vars(generate.parse_args(["--ckpt", "x", *sweep.flags(setting)]))
    assert setting == {name: parsed[name] for name in setting}
    assert set(sweep.SCORING) <= vars(evaluator.parse_args(["--ref-batch", "x", "--dry-run"])).keys()


def test_values_are_read_once_each():
    assert sweep.values("cfg_scale", "1, 1.0,2.3") == [1.0, 2.3]
    assert sweep.values("labels", "random,balanced") == ["random", "balanced"]


@pytest.mark.parametrize(("name", "text"), [
    ("cfg_scale", "1,two"), ("cfg_scale", "0.5"), ("cfg_scale", "nan"), ("cfg_scale", "1,"), ("num_steps", "2.5"), ("num_steps", "0"),
    ("guidance_high", "1.1"), ("guidance_low", "-0.1"), ("cls_cfg_scale", "inf"), ("labels", "uniform"), ("mode", "ode,euler"),
    ("weights", "last"), ("num_fid_samples", "0"), ("global_seed", "-1")])
def test_a_wrong_value_is_named_before_anything_runs(name, text):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is '{text}': give "):
        sweep.values(name, text)


def test_an_empty_interval_is_refused():
    with pytest.raises(UserError, match="--guidance-low 0.9 would be combined with --guidance-high 0.85"):
        sweep.expand({"guidance_low": [0.0, 0.9], "guidance_high": [1.0, 0.85]})


@pytest.fixture
def experiment(tmp_path):
    """Checkpoints of steps 3 and 20, which nothing here reads."""
    for step in (20, 3):
        path = tmp_path / "run" / "checkpoints" / f"{step:07d}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "run"


def test_checkpoints_by_step(experiment):
    names = [path.name for path in sweep.checkpoints(str(experiment), "20,3,20")]
    assert names == ["0000020.pt", "0000003.pt"]
    assert [path.name for path in sweep.checkpoints(str(experiment), None)] == ["0000020.pt"]
    with pytest.raises(UserError, match="names '250', .* has checkpoints of training steps 3, 20: .* solver's steps are --num-steps"):
        sweep.checkpoints(str(experiment), "3,250")


# ---------------------------------------------------------------------------------------------------- what runs, and what does not

@pytest.fixture
def programs(monkeypatch, experiment, tmp_path):
    """Stands for the two programs: notes their command lines, and leaves what they would."""
    commands = []
    monkeypatch.chdir(tmp_path)
    for name in ("ref.npz", "there.npz"):
        (tmp_path / name).touch()

    def run(command, ranks, stdout):
        assert command[1] == "-m" and ranks == [{}]
        _, _, *command = command
        commands.append(command)
        given = dict(zip(command, command[1:], strict=False))
        if "generate.py" in command:
            name = "-".join(part.lstrip("-") for part in command[command.index("--ckpt") + 2:]) + Path(given["--ckpt"]).stem
            (experiment / "samples" / name).mkdir(parents=True, exist_ok=True)
            stdout.write(f"a line\n{experiment / 'samples' / name / 'samples.npz'}\n")
            return 0, []
        if "--dry-run" not in command:
            high = 0.85 if "guidance-high-0.85" in given["--output"] else 1.0
            scale = 1.0 if "cfg-scale-1.0" in given["--output"] else 2.3
            tokens = {"class_token_cosine": 0.5} if "--class-tokens" in command else {}
            scored(Path(given["--output"]).parent, scale + high, scale, high=high, ref_batch=given["--ref-batch"], **tokens,
                   **asked(given.get("--metrics"), given["--precision-recall"], given["--features"]))
        return 0, []

    monkeypatch.setattr(sweep, "supervise", run)
    return commands


SWEEP = ("--cfg-scale", "1,2.3", "--guidance-high", "0.85,1", "--ref-batch", "ref.npz", "--features", "net", "--vae", "a,b",
         "--classes", "1,2")


def kinds(commands) -> list[str]:
    return ["check" if "--dry-run" in c else "sample" if "generate.py" in c else "score" for c in commands]


def test_a_sweep_samples_scores_and_reports(programs, experiment, capsys):
    sweep.main([str(experiment), *SWEEP])
    assert kinds(programs) == ["check"] + 3 * ["sample", "score"]
    path = str(experiment / "checkpoints" / "0000020.pt")
    rest = ["--vae", "a,b", "--classes", "1,2"]                                   # commas of other flags are their own
    assert programs[1] == ["runtime.launch", "generate.py", "--ckpt", path, "--cfg-scale", "1.0", *rest]
    assert programs[3] == ["runtime.launch", "generate.py", "--ckpt", path, "--cfg-scale", "2.3", "--guidance-high", "0.85", *rest]
    assert programs[0] == ["evaluations.evaluator", "--ref-batch", "ref.npz", "--features", "net", "--precision-recall", "adm", "--dry-run"]
    assert programs[2][:9] == ["runtime.launch", "-m", *programs[0][:-1]] and programs[2][9::2] == ["--sample-batch", "--output"]
    out, err = capsys.readouterr()
    assert f"table: {experiment}/samples/sweep.csv\nplot: {experiment}/samples/sweep.png\n" in out and out.count("*") == 1
    assert err.splitlines()[1] == "2 of 3: 0000020 --cfg-scale 2.3 --guidance-high 0.85"
    assert len(json.loads((experiment / "samples" / "sweep.json").read_text())) == 3


def test_a_second_call_scores_nothing_again(programs, experiment):
    sweep.main([str(experiment), *SWEEP])
    done = {path: path.stat().st_mtime_ns for path in experiment.glob("samples/*/metrics.json")}
    programs.clear()
    sweep.main([str(experiment), *SWEEP])
    assert kinds(programs) == ["check", "sample", "sample", "sample"]             # and generate.py finds its samples there
    assert done == {path: path.stat().st_mtime_ns for path in done}


def test_a_larger_sweep_makes_what_is_missing(programs, experiment):
    sweep.main([str(experiment), *SWEEP])
    programs.clear()
    sweep.main([str(experiment), *SWEEP, "--steps", "3,20"])
    assert kinds(programs) == ["check"] + 3 * ["sample", "score"] + 3 * ["sample"]


def test_after_an_interruption_the_table_has_what_was_scored(programs, experiment, monkeypatch):
    run = sweep.supervise
    monkeypatch.setattr(sweep, "supervise", lambda *how: run(*how) if kinds(programs).count("score") < 2 else (7, []))
    with pytest.raises(SystemExit) as ended:
        sweep.main([str(experiment), *SWEEP])
    assert ended.value.code == 7                                                  # the failing program's own, which said why
    assert len(json.loads((experiment / "samples" / "sweep.json").read_text())) == 2


def test_one_of_several_nodes_writes_the_table(programs, experiment, monkeypatch, capsys):
    """Each takes part in sampling and scoring; two would write one file."""
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("NODE_RANK", "1")
    sweep.main([str(experiment), *SWEEP])
    assert kinds(programs).count("score") == 3 and not (experiment / "samples" / "sweep.csv").exists()


def test_class_tokens_are_scored_when_they_are_saved(programs, experiment):
    call = [str(experiment), "--ref-batch", "ref.npz", "--features", "net"]
    sweep.main([*call, "--save-cls-tokens"])
    assert programs[-1][-6:-4] == ["--class-tokens", programs[-1][-1].replace("metrics.json", "class_tokens.npz")]
    sweep.main(call)
    assert "--class-tokens" not in programs[-1]


def test_the_environment_gives_the_scoring(programs, experiment, monkeypatch):
    monkeypatch.setenv("REF_BATCH", "there.npz")
    monkeypatch.setenv("FEATURES", "net")
    sweep.main([str(experiment), "--metrics", "fd,kid", "--cache", "here"])
    assert programs[0] == ["evaluations.evaluator", "--ref-batch", "there.npz", "--features", "net", "--metrics", "fd,kid",
                           "--precision-recall", "adm", "--cache", "here", "--dry-run"]


def test_without_a_reference_samples_are_made_and_the_way_on_is_said(programs, experiment, capsys):
    with pytest.raises(SystemExit) as ended:
        sweep.main([str(experiment), "--cfg-scale", "1,2.3"])
    assert ended.value.code == 2 and kinds(programs) == ["sample", "sample"]
    assert "set REF_BATCH to an .npz or an image folder and give the same command" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("flags", [("--cfg-scale", "1,x"), ("--steps", "4"), ("--guidance-low", "1", "--guidance-high", "0.5")])
def test_mistakes_end_before_any_program_runs(programs, experiment, capsys, flags):
    with pytest.raises(SystemExit) as ended:
        sweep.main([str(experiment), "--ref-batch", "ref.npz", *flags])
    assert ended.value.code == 2 and programs == []
    assert capsys.readouterr().err.startswith(f"error: {flags[0]} ")


@pytest.mark.parametrize(("changed", "flags", "again"), [
    ({}, (), False),
    ({"ref_batch": "./ref.npz"}, (), False),
    ({"ref_batch": "other.npz"}, (), True),
    (asked(features="local-dir:other/net"), (), True),
    ({"weights_verified": False}, (), True),                                      # other weights than the published, unasked
    ({}, ("--inception-weights", "{file}"), True),
    ({"weights_sha256": "{hash}", "weights_verified": False}, ("--inception-weights", "{file}"), False),
    (asked("kid"), (), True),                                                     # fewer than the default was asked for
    (asked("fd,kid"), ("--metrics", "fd,kid"), False),
    ({}, ("--metrics", "fd,kid"), True),
    (asked(None, "exact"), (), True),
    (asked(None, "exact"), ("--precision-recall", "exact"), False)])
def test_what_counts_as_scored(tmp_path, monkeypatch, changed, flags, again):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ref.npz").touch()
    (tmp_path / "file").write_text("weights")
    fill = {"{file}": str(tmp_path / "file"), "{hash}": sha256(tmp_path / "file")}
    scored(tmp_path / "a", 1.0, **{name: fill.get(str(value), value) for name, value in changed.items()})
    args, _ = sweep.parse_args(["x", "--ref-batch", "ref.npz", "--features", "local-dir:some/net", *(fill.get(f, f) for f in flags)])
    assert sweep.scored(tmp_path / "a", args, tokens=False) == (None if again else tmp_path / "a" / "metrics.json")
    assert not sweep.scored(tmp_path / "a", args, tokens=True)
    assert not sweep.scored(tmp_path / "b", args, tokens=False)


def test_a_reference_made_anew_under_its_name_is_scored_against_again(tmp_path):
    (tmp_path / "ref.npz").touch()
    scored(tmp_path / "a", 1.0, ref_batch=str(tmp_path / "ref.npz"))
    args, _ = sweep.parse_args(["x", "--ref-batch", str(tmp_path / "ref.npz"), "--features", "local-dir:some/net"])
    assert sweep.scored(tmp_path / "a", args, tokens=False)
    os.utime(tmp_path / "ref.npz", (2e9, 2e9))
    assert not sweep.scored(tmp_path / "a", args, tokens=False)


def test_a_score_in_other_features_is_kept_beside(programs, experiment):
    """And found again: both are rows of the table."""
    for features in ("net", "local-dir:some/other", "net"):
        sweep.main([str(experiment), "--ref-batch", "ref.npz", "--features", features])
    assert [kind for kind in kinds(programs)] == ["check", "sample", "score", "check", "sample", "score", "check", "sample"]
    kept, last = sorted(path.name for path in experiment.glob("samples/*/*.json"))
    assert kept.startswith("metrics-net-") and last == "metrics.json"
    assert len(json.loads((experiment / "samples" / "sweep.json").read_text())) == 2


def test_fewer_scores_do_not_replace_the_first_ones(programs, experiment):
    for more in ((), ("--metrics", "kid"), ()):
        sweep.main([str(experiment), "--ref-batch", "ref.npz", "--features", "net", *more])
    assert kinds(programs).count("score") == 2 and len(list(experiment.glob("samples/*/metrics*.json"))) == 2


@pytest.mark.parametrize("listed", [sorted, lambda paths: sorted(paths, reverse=True)])
def test_an_earlier_score_stands_before_the_last_one(programs, experiment, monkeypatch, listed):
    """Whatever the order in which the disk lists them."""
    for more in ((), ("--metrics", "kid")):
        sweep.main([str(experiment), "--ref-batch", "ref.npz", "--features", "net", *more])
    samples, glob = experiment / "samples", Path.glob
    folder, = (path for path in samples.iterdir() if path.is_dir())
    for path, value in zip(sorted(folder.glob("metrics*.json")), (1.0, 2.0), strict=True):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"fd_net": value}))
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(listed(glob(self, pattern))))
    assert [row["fd_net"] for row in report.read_rows(samples)] == [1.0, 2.0]             # metrics-....json, metrics.json


def test_rows_of_a_checkpoint_that_was_replaced_can_be_told(tmp_path):
    scored(tmp_path / "old", 2.0, checkpoint="a" * 64, cfg_scale=1.0)
    scored(tmp_path / "new", 3.0, checkpoint="b" * 64)
    rows = report.read_rows(tmp_path)
    assert {row["checkpoint"] for row in rows} == {"a" * 8, "b" * 8} and "checkpoint" in report.as_text(rows)
    (tmp_path / "old" / "metrics.json").unlink()
    scored(tmp_path / "other step", 3.0, step=20)
    assert "checkpoint" not in report.as_text(report.read_rows(tmp_path))


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"fid": 2.0}'])
def test_a_file_of_another_form_is_passed_over(programs, experiment, capsys, text):
    sweep.main([str(experiment), "--ref-batch", "ref.npz", "--features", "net"])
    (metrics,) = experiment.glob("samples/*/metrics.json")
    metrics.write_text(text)
    (experiment / "samples" / "foreign").mkdir()
    (experiment / "samples" / "foreign" / "metrics.json").write_text(text)
    programs.clear()
    sweep.main([str(experiment), "--ref-batch", "ref.npz", "--features", "net"])
    assert kinds(programs) == ["check", "sample", "score"] and f"{metrics} is passed over" in capsys.readouterr().err
    assert len(json.loads((experiment / "samples" / "sweep.json").read_text())) == 1


# -------------------------------------------------------------------------------------------------------------- table and plot

def test_every_row_says_what_decides_its_score(tmp_path):
    scored(tmp_path / "guided", 2.5, cls=1.5, low=0.1, labels="random", classes=[4, 2], precision=0.7)
    row, = report.read_rows(tmp_path)
    assert row == {"experiment": "run", "step": 3, "checkpoint": "30000000", "weights": "ema", "mode": "sde", "heun": False,
                   "num_steps": 9, "cfg_scale": 2.3, "cls_cfg_scale": 1.5, "guidance_low": 0.1, "guidance_high": 0.85, "seed": 0,
                   "network_precision": "fp32", "vae": "vae",
                   "block": 64, "num_samples": 50, "labels": "classes 4 2", "features": "net", "feature_weights": "01234567",
                   "reference": "ref.npz", "fd_net": 2.5, "precision": 0.7, "folder": "guided", "best": True}


def test_an_unguided_row_has_no_interval(tmp_path):
    scored(tmp_path / "unguided", 5.0, cfg_scale=1.0)
    row, = report.read_rows(tmp_path)
    assert row["guidance_low"] is row["guidance_high"] is row["cls_cfg_scale"] is None


def test_the_best_is_the_lowest_among_comparable_rows_only(tmp_path):
    """Fewer samples, other labels, features or references may give lower numbers, and those are not better."""
    scored(tmp_path / "unguided", 5.0, cfg_scale=1.0)
    scored(tmp_path / "guided", 3.0)
    scored(tmp_path / "another step", 4.0, step=20)
    scored(tmp_path / "few", 1.0, samples=10)
    scored(tmp_path / "balanced", 2.0, labels="balanced")
    scored(tmp_path / "other reference", 2.0, ref_batch="other.npz")
    scored(tmp_path / "Inception", 2.9, key="fid", features="inception")
    scored(tmp_path / "no distance", None, kid_net=0.1)
    best = {row["folder"]: row["best"] for row in report.read_rows(tmp_path)}
    assert best == {"unguided": False, "guided": True, "another step": False, "few": True, "balanced": True, "other reference": True,
                    "Inception": True, "no distance": False}


def test_the_table_in_two_forms(tmp_path):
    scored(tmp_path / "a", 3.0, num_reference=7)
    scored(tmp_path / "b", None, cfg_scale=1.0, kid_net=0.25, fd_net=5.0)
    rows = report.read_rows(tmp_path)
    report.write_table(tmp_path, rows)
    assert json.loads((tmp_path / "sweep.json").read_text()) == rows
    with open(tmp_path / "sweep.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0])[-4:] == ["fd_net", "kid_net", "best", "folder"] and "num_reference" not in table[0]
    assert [(row["cfg_scale"], row["guidance_high"], row["fd_net"], row["kid_net"], row["best"]) for row in table] == [
        ("1.0", "", "5.0", "0.25", "False"), ("2.3", "0.85", "3.0", "", "True")]
    header, unguided, guided = report.as_text(rows).splitlines()
    assert header.split() == ["cfg_scale", "guidance_low", "guidance_high", "num_samples", "labels", "fd_net", "kid_net", "best"]
    assert unguided.split() == ["1", "50", "random", "5", "0.25"] and guided.split() == ["2.3", "0", "0.85", "50", "random", "3", "*"]


def test_lines_begin_unguided_and_are_named_by_what_differs(tmp_path):
    for step in (3, 20):
        scored(tmp_path / f"{step}", 5.0, cfg_scale=1.0, step=step)
        scored(tmp_path / f"{step} low", 4.0, cfg_scale=1.5, step=step)
        scored(tmp_path / f"{step} high", 3.0, step=step)
    scored(tmp_path / "wide", 3.5, high=1.0)
    scored(tmp_path / "alone", 6.0, cfg_scale=1.0, step=40)
    lines = {label: [row["folder"] for row in line] for label, line in report.lines_of(report.read_rows(tmp_path)).items()}
    assert lines == {"step 3, t in [0, 0.85]": ["3", "3 low", "3 high"], "step 3, t in [0, 1]": ["3", "wide"],
                     "step 20, t in [0, 0.85]": ["20", "20 low", "20 high"], "step 40": ["alone"]}


def test_class_scales_are_lines_of_their_own(tmp_path):
    scored(tmp_path / "a", 3.0)
    scored(tmp_path / "b", 4.0, cls=0.0)
    assert list(report.lines_of(report.read_rows(tmp_path))) == ["t in [0, 0.85], class scale as scale", "t in [0, 0.85], class scale 0"]


def figure_of(monkeypatch, tmp_path, groups):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), save(self, *args, **kwargs)))
    rows = report.read_rows(tmp_path)
    report.draw(tmp_path / "sweep.png", rows, groups(rows))
    assert Image.open(tmp_path / "sweep.png").width > 500
    return drawn[0].axes


def test_the_plot_says_what_it_shows(monkeypatch, tmp_path):
    scored(tmp_path / "unguided", 5.0, cfg_scale=1.0)
    scored(tmp_path / "guided", 3.0)
    scored(tmp_path / "few", 1.0, samples=1200, labels="balanced", key="fid", features="inception")
    one, two = figure_of(monkeypatch, tmp_path, lambda rows: sorted(set(map(report.protocol, rows))))
    assert one.get_ylabel() == "Frechet distance (net)" and two.get_ylabel() == "FID"
    assert one.get_title().startswith("50 samples, labels random\n") and two.get_title().startswith("1,200 samples, labels balanced\n")
    line, star = one.lines
    assert line.get_xydata().tolist() == [[1.0, 5.0], [2.3, 3.0]] and star.get_xydata().tolist() == [[2.3, 3.0]]
    assert star.get_marker() == "*" and one.texts[0].get_text() == "3"


def test_the_plot_is_of_this_calls_rows_alone(monkeypatch, tmp_path):
    scored(tmp_path / "guided", 3.0)
    scored(tmp_path / "few", 1.0, samples=12)
    axes, = figure_of(monkeypatch, tmp_path, lambda rows: [report.protocol(row) for row in rows if row["folder"] == "guided"])
    assert axes.get_title().startswith("50 samples")
