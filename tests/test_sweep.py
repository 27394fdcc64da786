"""The program behind eval.sh: which settings are made, which are not made again, and what table and plot show."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import generate
from evaluations import evaluator, report, sweep
from models import checkpoint
from runtime.files import sha256
from runtime.messages import UserError
from tests import test_text_to_image
from tests.conftest import random_images

captioned, flags, run = test_text_to_image.captioned, test_text_to_image.flags, test_text_to_image.run  # fixtures

# ------------------------------------------------------------------------------------------------------------- settings

def test_the_product_of_the_lists():
    lists = {"num_steps": [50, 250], "cfg_scale": [1.5, 2.3], "guidance_high": [0.85, 1.0]}
    settings = sweep.expand(lists)
    assert len(settings) == 8 and settings[1] == {"num_steps": 50, "cfg_scale": 1.5, "guidance_high": 1.0}
    assert sweep.expand({}) == [{}]                                                       # generate.py's defaults


def test_an_unguided_setting_is_made_once():
    """With scale 1 neither interval nor class scale applies, but the other settings do."""
    lists = {"num_steps": [50, 250], "cfg_scale": [1.0, 2.3], "cls_cfg_scale": [0.0, 2.0], "guidance_high": [0.85, 1.0]}
    settings = sweep.expand(lists)
    unguided = [setting for setting in settings if setting["cfg_scale"] == 1]
    assert unguided == [{"num_steps": 50, "cfg_scale": 1.0}, {"num_steps": 250, "cfg_scale": 1.0}]
    assert len(settings) == 2 + 8
    assert sweep.expand({"cfg_scale": [1.0], "guidance_low": [0.0], "guidance_high": [0.85, 1.0]}) == [{"cfg_scale": 1}]


@pytest.mark.parametrize(("name", "text", "expected"), [
    ("cfg_scale", "1, 1.0,2.3", [1.0, 2.3]), ("labels", "random,balanced", ["random", "balanced"]),
    ("guidance_low", "0,0.9", [0.0, 0.9]), ("cls_cfg_scale", "-1,0", [-1.0, 0.0]), ("num_steps", "9", [9])])
def test_values_are_read_as_generate_reads_them(name, text, expected):
    assert sweep.values(name, text) == expected


def test_checkpoints_by_step(tmp_path):
    for step in (20, 3):
        path = tmp_path / "checkpoints" / f"{step:07d}.pt"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert [path.name for path in sweep.checkpoints(str(tmp_path), "20,3,20")] == ["0000020.pt", "0000003.pt"]
    assert [path.name for path in sweep.checkpoints(str(tmp_path), None)] == ["0000020.pt"]
    with pytest.raises(UserError, match="--steps 250: .* 3, 20; .*--num-steps"):
        sweep.checkpoints(str(tmp_path), "3,250")


# ------------------------------------------------------------------------------------------------------------- programs

@pytest.fixture
def experiment(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def launched(monkeypatch):
    """Run in this process what the launcher would start; returns the list of what was run, which may refuse to."""
    class Launched(list):
        fails = ()                                                                        # programs that end with 75

        def kinds(self) -> str:
            return " ".join("sample" if "generate.py" in program else "score" for program in self)

    launched = Launched()

    def launch(program: list[str]) -> int:
        launched.append(program)
        if len(launched) in launched.fails:
            return 75
        main, argv = (generate.main, program[1:]) if program[0] == "generate.py" else (evaluator.main, program[2:])
        try:
            main(argv)
        except SystemExit as ended:
            return ended.code
        return 0

    monkeypatch.setattr(sweep, "launch", launch)
    return launched


@pytest.fixture
def call(experiment, launched, encoder_folder, tmp_path, capsys):
    """Run a sweep of eight images, scored in the small encoder's features; returns stdout and stderr."""
    np.savez(tmp_path / "ref.npz", arr_0=random_images(12, 32, 32))
    os.utime(tmp_path / "ref.npz", (1e9, 1e9))

    def run(*flags) -> tuple[str, str]:
        sweep.main([str(experiment), "--num-fid-samples", "8", "--num-steps", "1", "--no-png", "--ref-batch",
                    str(tmp_path / "ref.npz"), "--features", f"local-dir:{encoder_folder}", *map(str, flags)])
        return capsys.readouterr()

    return run


def rows_of(experiment) -> list[dict]:
    return json.loads((experiment / "samples" / "sweep.json").read_text())


def test_a_sweep_samples_scores_and_reports_and_makes_nothing_again(call, launched, experiment):
    samples = experiment / "samples"
    out, err = call("--cfg-scale", "1,2.3", "--guidance-high", "0.85")
    assert launched.kinds() == "sample score sample score"
    assert f"table: {samples}/sweep.csv\nplot: {samples}/sweep.png\n" in out and "*" in out
    assert "2 of 2: 0000002 --num-steps 1 --cfg-scale 2.3 --guidance-high 0.85" in err
    unguided, guided = rows_of(experiment)
    assert (unguided["cfg_scale"], unguided["guidance_high"], guided["guidance_high"]) == (1, None, 0.85)
    assert (unguided["best"] or guided["best"]) and Image.open(samples / "sweep.png").width > 500
    done = {path: path.stat().st_mtime_ns for path in samples.glob("*/*.*")}
    out, _ = call("--cfg-scale", "1,1.5,2.3")
    assert launched.kinds() == "sample score sample score" + " sample sample score sample"
    assert len(rows_of(experiment)) == 3 and done == {path: path.stat().st_mtime_ns for path in done}


def test_a_single_setting_names_its_files_and_its_class_tokens_are_scored(call, launched, experiment):
    out, _ = call("--save-cls-tokens")
    folder, = (path for path in (experiment / "samples").iterdir() if path.is_dir())
    assert out.endswith(f"grid: {folder}/grid.png\nmetrics: {folder}/metrics.json\n")
    assert -1 <= json.loads((folder / "metrics.json").read_text())["class_token_cosine"] <= 1
    call()                                                                                # asks for less
    assert launched.kinds() == "sample score sample"


def test_scores_are_kept_beside_each_other(call, launched, experiment):
    """Other scores of the same samples do not replace the first ones, which are found again."""
    for more in ((), ("--metrics", "kid"), ()):
        call(*more)
    assert launched.kinds() == "sample score sample score sample"
    kept, last = sorted(path.name for path in experiment.glob("samples/*/metrics*.json"))
    assert kept.startswith("metrics-") and last == "metrics.json"
    assert [any(name.startswith("fd_") for name in row) for row in rows_of(experiment)] == [True, False]


def test_a_sweep_with_two_references_has_two_columns(call, launched, experiment, tmp_path):
    np.savez(tmp_path / "jit.npz", arr_0=random_images(12, 32, 32, seed=1))
    os.utime(tmp_path / "jit.npz", (1e9, 1e9))
    both = f"{tmp_path}/ref.npz,{tmp_path}/jit.npz"
    out, _ = call("--ref-batch", both)
    names = [f"@{stem}:{sha256(tmp_path / f'{stem}.npz')[:8]}" for stem in ("ref", "jit")]
    assert all(name in out for name in names)
    (row,) = rows_of(experiment)
    scores = [next(value for key, value in row.items() if key.startswith("fd_") and key.endswith(name))
              for name in names]
    assert scores[0] != scores[1]
    call("--ref-batch", both)
    assert launched.kinds() == "sample score sample"
    call()                                                        # one reference alone: the first one's number
    assert launched.kinds() == "sample score sample sample score"
    plain = [[value for key, value in row.items() if key.startswith("fd_") and "@" not in key]
             for row in rows_of(experiment)]
    assert plain == [[scores[0]]] * 2                             # both files are kept


def test_a_stopped_program_ends_the_sweep_with_its_status(call, launched, experiment):
    launched.fails = (4,)
    with pytest.raises(SystemExit) as ended:
        call("--cfg-scale", "1,2.3")
    assert ended.value.code == 75 and len(rows_of(experiment)) == 1                       # of what was scored before
    call("--cfg-scale", "1,2.3")
    assert launched.kinds() == "sample score sample score" + " sample sample score" and len(rows_of(experiment)) == 2


def test_one_of_several_nodes_writes_the_table(call, launched, experiment, monkeypatch):
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("NODE_RANK", "1")
    call()
    assert launched.kinds() == "sample score" and not (experiment / "samples" / "sweep.csv").exists()


def test_samples_of_captions_are_scored_by_clip_too(run, launched, encoder_folder, tiny_clip, tmp_path, capsys):
    """They have no labels; another CLIP scores again, beside the first; other prompts are not comparable."""
    experiment, other = shutil.copytree(run, tmp_path / "run"), shutil.copytree(tiny_clip, tmp_path / "other")
    np.savez(tmp_path / "ref.npz", arr_0=random_images(12, 32, 32), arr_1=np.arange(12))
    os.utime(tmp_path / "ref.npz", (1e9, 1e9))
    printed = []
    for more in ([], ["--clip", tiny_clip], ["--clip", other], ["--clip", tiny_clip],
                 ["--clip", tiny_clip, "--prompt", "a red disc"]):
        sweep.main([str(experiment), "--num-fid-samples", "8", "--num-steps", "1", "--no-png", "--save-cls-tokens",
                    "--ref-batch", str(tmp_path / "ref.npz"), "--features", f"local-dir:{encoder_folder}",
                    *map(str, more)])
        printed.append(capsys.readouterr().out)
    assert launched.kinds() == "sample score sample score sample score sample sample score"
    rows = rows_of(experiment)
    assert sorted(name for row in rows for name in row if name.startswith("clip_score")) == [
        "clip_score_other", "clip_score_tiny-clip", "clip_score_tiny-clip"]
    assert all("class_token_cosine" in row and "class_token_accuracy" not in row for row in rows)
    assert len({row["labels"] for row in rows}) == 2 and all(row["labels"].startswith("captions ") for row in rows)
    header, = (line for line in printed[1].splitlines() if "cfg_scale" in line)
    assert "clip_score_tiny-clip" in header and "clip_score_tiny-clip" not in printed[0]


@pytest.mark.parametrize("more", [["--clip", "some/clip"], ["--metrics", "fd,clip_score"]])
def test_a_clip_score_of_class_samples_is_refused_before_sampling(call, launched, capsys, more):
    with pytest.raises(SystemExit):
        call(*more)
    assert not launched and "captions" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"fid": 2.0}'])
def test_a_file_of_another_form_is_left_out(tmp_path, capsys, text):
    scored(tmp_path / "a", 1.0)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "metrics.json").write_text(text)
    assert [row["folder"] for row in report.read_rows(tmp_path)] == ["a"]
    assert f"{tmp_path}/foreign/metrics.json" in capsys.readouterr().err


def test_without_a_reference_samples_are_made_and_not_scored(experiment, launched, monkeypatch, capsys):
    monkeypatch.delenv("REF_BATCH", raising=False)
    with pytest.raises(SystemExit) as ended:
        sweep.main([str(experiment), "--cfg-scale", "1,2.3", "--num-fid-samples", "2", "--num-steps", "1"])
    assert ended.value.code == 2 and launched.kinds() == "sample sample"
    assert "set REF_BATCH" in capsys.readouterr().err.splitlines()[-1]


def test_the_samples_are_found_though_the_compiler_does_not_work(experiment, launched):
    """generate.py then samples without it, as asked with --no-compile."""
    flags = ["--ckpt", str(experiment), "--num-fid-samples", "2", "--num-steps", "1", "--no-png"]
    generate.main([*flags, "--no-compile"])
    folder, = (experiment / "samples").iterdir()
    path = experiment / "checkpoints" / "0000002.pt"
    args = generate.parse_args([*flags, "--compile"])
    assert sweep.samples_of(args, path, checkpoint.read(path), checkpoint.digest_of(path)) == folder


@pytest.mark.parametrize(("flags", "word"), [
    ("--cfg-scale 1,x", "--cfg-scale"), ("--cfg-scale 0.5", "--cfg-scale"), ("--cfg-scale 1,", "--cfg-scale"),
    ("--num-steps 2.5", "--num-steps"), ("--num-steps 0,1", "--num-steps"), ("--guidance-high 1.1", "--guidance-high"),
    ("--cls-cfg-scale inf", "--cls-cfg-scale"), ("--labels uniform", "--labels"), ("--mode ode,euler", "--mode"),
    ("--weights last", "--weights"), ("--num-fid-samples 0", "--num-fid"), ("--global-seed -1", "--global-seed"),
    ("--steps 4", "--steps 4"), ("--guidance-low 0,0.9 --guidance-high 1,0.85", "--guidance-low 0.9"),
    ("--cache here", "--cache"), ("--heun", "--heun"),
    ("--ref-batch nowhere.npz", "nowhere.npz")])
def test_mistakes_end_before_any_program_runs(experiment, launched, monkeypatch, capsys, flags, word):
    monkeypatch.delenv("REF_BATCH", raising=False)
    with pytest.raises(SystemExit) as ended:
        sweep.main([str(experiment), *flags.split()])
    assert ended.value.code == 2 and not launched
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and word in error


# ------------------------------------------------------------------------------------------------ what counts as scored

def scored(folder: Path, score: float | None, cfg_scale=2.3, low=0.0, high=0.85, cls=None, samples=50, labels="random",
           step=3, classes=None, key="fd_net", checkpoint=None, **result) -> None:
    """Write a metrics.json as the evaluator does for samples of generate.py."""
    sampling = dict(mode="sde", num_steps=9, heun=False, cfg_scale=cfg_scale, cls_cfg_scale=cls, guidance_low=low,
                    guidance_high=high, seed=0, labels=labels, classes=classes, path_type="linear", precision="fp32")
    settings = dict(checkpoint=f"exps/run/checkpoints/{step:07d}.pt", step=step, weights="ema", vae="vae",
                    checkpoint_sha256=checkpoint or f"{step:064d}"[::-1], sampling=sampling, per_proc_batch_size=64,
                    num_images=samples)
    scores = {} if score is None else {key: score}
    metrics = {"num_samples": samples, "features": "net", "weights_sha256": "0123456789", "weights_verified": None,
               "ref_batch": "ref.npz", "modes": {}, **asked(), **scores, **result, "settings": settings}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))


def asked(metrics=None, precision_recall="adm", features="local-dir:some/net", **clip) -> dict:
    return {"asked": {"features": features, "metrics": metrics, "precision_recall": precision_recall, **clip}}


@pytest.mark.parametrize(("changed", "flags", "found"), [
    ({}, {}, True),
    ({"ref_batch": "./ref.npz"}, {}, True),
    ({"ref_batch": "other.npz"}, {}, False),
    (asked(features="local-dir:other/net"), {}, False),
    ({"weights_verified": False}, {}, False),                                             # not the published weights
    ({}, {"inception_weights": Path("file")}, False),
    ({"weights_sha256": "{hash}", "weights_verified": False}, {"inception_weights": Path("file")}, True),
    (asked("kid"), {}, False),                                                            # fewer than the default
    (asked("fd,kid"), {"metrics": "fd,kid"}, True),
    ({}, {"metrics": "fd,kid"}, False),
    ({"references": [{"name": "ref.npz"}, {"name": "file"}]}, {}, False),                  # of other references
    ({"references": [{"name": "ref.npz"}, {"name": "file"}]}, {"ref_batch": [Path("ref.npz"), Path("file")]}, True),
    ({}, {"ref_batch": [Path("ref.npz"), Path("file")]}, False),
    ({}, {"clip": "some/clip"}, False),
    (asked(clip="some/clip"), {"clip": "some/clip"}, True),
    (asked(clip="some/clip"), {"clip": "other/clip"}, False),
    (asked(clip="some/clip"), {}, False),
    (asked(None, "exact"), {}, False),
    (asked(None, "exact"), {"precision_recall": "exact"}, True)])
def test_what_counts_as_scored(tmp_path, monkeypatch, changed, flags, found):
    monkeypatch.chdir(tmp_path)
    Path("ref.npz").touch()
    Path("file").write_text("weights")
    changed = {name: sha256(Path("file")) if value == "{hash}" else value for name, value in changed.items()}
    scored(tmp_path / "a", 1.0, **changed)
    defaults = dict(ref_batch=[Path("ref.npz")], features="local-dir:some/net", inception_weights=None,
                    dinov2_weights=None, metrics=None, precision_recall="adm")
    scoring = sweep.Scoring(**defaults | flags)
    assert scoring.scored(tmp_path / "a", tokens=False) == (tmp_path / "a" / "metrics.json" if found else None)
    assert scoring.scored(tmp_path / "a", tokens=True) is None
    assert scoring.scored(tmp_path / "b", tokens=False) is None
    os.utime(scoring.ref_batch[-1], (2e9, 2e9))                                           # made anew under its name
    assert scoring.scored(tmp_path / "a", tokens=False) is None


# ------------------------------------------------------------------------------------------------------- table and plot

def test_every_row_names_what_decides_its_score(tmp_path):
    scored(tmp_path / "guided", 2.5, cls=1.5, low=0.1, labels="random", classes=[4, 2], precision=0.7)
    row, = report.read_rows(tmp_path)
    assert row == {
        "experiment": "run", "step": 3, "checkpoint": "30000000", "weights": "ema", "mode": "sde", "heun": False,
        "num_steps": 9, "cfg_scale": 2.3, "cls_cfg_scale": 1.5, "guidance_low": 0.1, "guidance_high": 0.85, "seed": 0,
        "time_shift": 1.0, "network_precision": "fp32", "vae": "vae", "block": 64, "num_samples": 50,
        "labels": "classes 4 2", "features": "net", "feature_weights": "01234567", "reference": "ref.npz",
        "reference_sha256": None,
        "fd_net": 2.5, "precision": 0.7, "folder": "guided", "best": True}


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
    best = {row["folder"] for row in report.read_rows(tmp_path) if row["best"]}
    assert best == {"guided", "few", "balanced", "other reference", "Inception"}


def test_rows_of_a_checkpoint_that_was_replaced_can_be_told_apart(tmp_path):
    scored(tmp_path / "old", 2.0, checkpoint="a" * 64, cfg_scale=1.0)
    scored(tmp_path / "new", 3.0, checkpoint="b" * 64)
    assert "checkpoint" in report.as_text(report.read_rows(tmp_path))
    scored(tmp_path / "old", 3.0, step=20)
    assert "checkpoint" not in report.as_text(report.read_rows(tmp_path))


def test_the_table_in_three_forms(tmp_path):
    scored(tmp_path / "a", 3.0, num_reference=7)
    scored(tmp_path / "b", None, cfg_scale=1.0, kid_net=0.25, fd_net=5.0)
    rows = report.read_rows(tmp_path)
    report.write_table(tmp_path, rows)
    assert json.loads((tmp_path / "sweep.json").read_text()) == rows
    with open(tmp_path / "sweep.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0])[-4:] == ["fd_net", "kid_net", "best", "folder"] and "num_reference" not in table[0]
    columns = ("cfg_scale", "guidance_high", "fd_net", "kid_net", "best")
    assert [[row[name] for name in columns] for row in table] == [
        ["1.0", "", "5.0", "0.25", "False"], ["2.3", "0.85", "3.0", "", "True"]]
    header, unguided, guided = (line.split() for line in report.as_text(rows).splitlines())
    assert header[:5] == ["cfg_scale", "guidance_low", "guidance_high", "num_samples", "labels"]
    assert header[5:] == ["fd_net", "kid_net", "best"]
    assert unguided == ["1", "50", "random", "5", "0.25"] and guided == ["2.3", "0", "0.85", "50", "random", "3", "*"]


def test_several_references_are_columns_with_name_and_hash(tmp_path):
    one = {"name": "place/adm.npz", "sha256": "a" * 64, "num_reference": 7, "fd_net": 3.0}
    two = {"name": "place/jit.npz", "sha256": "b" * 64, "num_reference": 7, "fd_net": 4.0}
    scored(tmp_path / "both", 3.0, ref_batch="place/adm.npz", reference_sha256="a" * 64, references=[one, two])
    rows = report.read_rows(tmp_path)
    assert (rows[0]["fd_net"], rows[0]["reference"], rows[0]["reference_sha256"]) == (3.0, "place/adm.npz", "a" * 64)
    header, line = report.as_text(rows).splitlines()
    assert header.split()[-3:] == ["fd_net@adm:aaaaaaaa", "fd_net@jit:bbbbbbbb", "best"]  # not again without a name
    assert line.split()[-3:] == ["3", "4", "*"]
    report.write_table(tmp_path, rows)
    with open(tmp_path / "sweep.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["fd_net@adm:aaaaaaaa"], row["fd_net@jit:bbbbbbbb"]) == ("3.0", "4.0")
    scored(tmp_path / "alone", 5.0, cfg_scale=1.0, ref_batch="place/adm.npz")
    header, unguided, guided = report.as_text(report.read_rows(tmp_path)).splitlines()
    assert "fd_net" in header.split() and "5" in unguided.split() and guided.split().count("3") == 2


def test_lines_begin_unguided_and_are_named_by_what_differs(tmp_path):
    for step in (3, 20):
        scored(tmp_path / f"{step}", 5.0, cfg_scale=1.0, step=step)
        scored(tmp_path / f"{step} low", 4.0, cfg_scale=1.5, step=step)
        scored(tmp_path / f"{step} high", 3.0, step=step)
    scored(tmp_path / "wide", 3.5, high=1.0)
    scored(tmp_path / "alone", 6.0, cfg_scale=1.0, step=40)
    lines = report.lines_of(report.read_rows(tmp_path))
    assert {label: [row["folder"] for row in line] for label, line in lines.items()} == {
        "step 3, t in [0, 0.85]": ["3", "3 low", "3 high"], "step 3, t in [0, 1]": ["3", "wide"],
        "step 20, t in [0, 0.85]": ["20", "20 low", "20 high"], "step 40": ["alone"]}


def test_class_scales_are_lines_of_their_own(tmp_path):
    scored(tmp_path / "a", 3.0)
    scored(tmp_path / "b", 4.0, cls=0.0)
    labels = list(report.lines_of(report.read_rows(tmp_path)))
    assert labels == ["t in [0, 0.85], class scale as scale", "t in [0, 0.85], class scale 0"]


def test_the_plot_has_a_panel_per_protocol_of_this_call(tmp_path):
    scored(tmp_path / "unguided", 5.0, cfg_scale=1.0)
    scored(tmp_path / "guided", 3.0)
    scored(tmp_path / "few", 1.0, samples=1200, labels="balanced", key="fid", features="inception")
    widths = []
    for folders in (["guided"], ["guided", "few"]):
        printed = report.write_report([tmp_path / name for name in folders])
        assert printed[1:] == [f"table: {tmp_path}/sweep.csv", f"plot: {tmp_path}/sweep.png"]
        widths.append(Image.open(tmp_path / "sweep.png").width)
    assert widths[1] > 1.5 * widths[0]


def test_the_plot_is_labelled(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    scored(tmp_path / "unguided", 5.0, cfg_scale=1.0)
    scored(tmp_path / "guided", 3.0)
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: (drawn.append(self), save(self, *args, **how)))
    report.write_report([tmp_path / "guided"])
    axes, = drawn[0].axes
    assert axes.get_ylabel() == "Frechet distance (net)" and axes.get_title().startswith("50 samples, labels random\n")
    line, star = axes.lines
    assert line.get_xydata().tolist() == [[1.0, 5.0], [2.3, 3.0]] and star.get_xydata().tolist() == [[2.3, 3.0]]
    assert star.get_marker() == "*" and axes.texts[0].get_text() == "3"


@pytest.mark.parametrize("more", [["--heun"], ["--num-steps", "50"]])
def test_a_preset_is_not_mixed_with_what_contradicts_it(capsys, more):
    with pytest.raises(SystemExit):
        sweep.parse_args(["exps/run", "--preset", "nfe100", *more])
    assert more[0] in capsys.readouterr().err
