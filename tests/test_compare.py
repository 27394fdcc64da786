"""The toy's comparison: steps to a distance, the class token beside its image, pieces that are kept, and the page that it wrote."""

import json
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import train
from models.sit import SiT
from preprocessing import dataset_tools
from runtime.messages import UserError
from toy import compare, draw
from toy.compare import (
    HOW,
    MAIN,
    SCALES,
    at_learning_rate,
    open_data,
    prepare,
    require_setting,
    setting_of,
    training_flags,
)
from toy.draw import draw_many
from toy.figures import digest, draw_figures
from toy.scores import draw_samples, image_scores, nearest, next_of_label, real_scores, score_checkpoint, token_scores
from toy.summary import METHODS, as_text, headline, steps_to, summarise, tables

ROOT = Path(__file__).parents[1]
TINY = replace(SCALES["cpu"], steps=(2, 4), num_samples=32, num_images=64, flags=(*SCALES["cpu"].flags, "--batch-size", "8"),
               pieces=(("sit", 1), ("reg", 1)))


# ------------------------------------------------------------------------------------------------------------ steps and spreads

def curve(steps, distances) -> list[dict]:
    return [{"step": step, "distance": distance} for step, distance in zip(steps, distances, strict=True)]


def test_steps_to_a_distance_are_exact_on_a_power_law():
    steps = (250, 500, 1000, 3000)
    points = curve(steps, [80 * step**-0.4 for step in steps])
    for sought in (300, 500, 777, 2500):
        assert steps_to(points, 80 * sought**-0.4) == pytest.approx(sought, rel=1e-9)


def test_a_distance_counts_from_the_first_time_it_is_reached():
    assert steps_to(curve((1, 2, 4), (8, 2, 4)), 4) == pytest.approx(2**0.5)
    assert steps_to(curve((1, 2, 4), (8, 2, 4)), 9) == 1
    assert steps_to(curve((1, 2, 4), (8, 6, 5)), 4) is None


def made_up(finals: dict[str, list[float]]) -> dict:
    """Results of runs whose distance falls as step^-1/2 to the given ones at step 400; all other scores are 0.5."""
    others = {"class_agreement": 0.5, "precision": 0.5, "recall": 0.5}
    tokens = {"token_cosine": 0.5, "token_cosine_other": 0.5, "token_agreement": 0.5, "token_nearest": 0.5}
    pieces = [{"method": method, "seed": seed, "repeated_distances": [final, final + 0.1] if seed == 0 else [],
               "train_seconds": 60, "score_seconds": 30,
               "points": [point | others | (tokens if METHODS[method].name == "reg" else {})
                          for point in curve((100, 400), (2 * final, final))]}
              for method, found in finals.items() for seed, final in enumerate(found)]
    real = {"drawn": {"distance": 0.1} | others | tokens, "decoded": {"distance": 0.2} | others | tokens, "distances": [0.1, 0.3]}
    results = {"setting": {"steps": [100, 400], "num_samples": 1024}, "pieces": pieces, "not_run": [], "real": real,
               "machine": {"device": "a machine", "torch": "2.6"}}
    return results | {"summary": summarise(results)}


def test_the_summary_times_every_method_to_where_sit_and_repa_end_with_the_same_seed():
    results = made_up({"sit": [4.0, 4.4], "repa": [3.0, 3.3], "reg": [2.4, 2.4]})
    found = results["summary"]["methods"]
    assert results["summary"]["targets"] == {"sit": pytest.approx(4.2), "repa": pytest.approx(3.15)}
    steps = [100 * (4.8 / 4) ** 2, 100 * (4.8 / 4.4) ** 2]
    reached = found["reg"]["steps_to"]["sit"]
    assert reached["steps"] == pytest.approx(steps) and reached["mean"] == pytest.approx(sum(steps) / 2) and not reached["bound"]
    assert reached["factor"]["mean"] == pytest.approx((400 / steps[0] + 400 / steps[1]) / 2)
    assert list(found["sit"]["steps_to"]) == ["repa"] and found["sit"]["steps_to"]["repa"]["steps"] == [None, None]
    assert [(at["mean"], at["bound"]) for at in found["repa"]["steps_to_sit_at"]] == [(100, True), (pytest.approx(225), False)]
    assert [at["distance"]["mean"] for at in found["reg"]["beside_sit"]] == [pytest.approx((2.4 / 4 + 2.4 / 4.4) / 2)] * 2
    assert [over["mean"] for over in found["reg"]["beside_sit_over_samplings"]] == [pytest.approx((2.4 / 4 + 2.5 / 4.1) / 2)]
    assert found["sit"]["curve"][-1]["distance"] == {"mean": pytest.approx(4.2), "std": pytest.approx(0.2 * 2**0.5), "seeds": 2}
    text = tables(results)["After 400 steps"]
    assert "| SiT | 4.20 ± 0.28 | 50.0 ± 0.0 % | 0.500 ± 0.000 | 0.500 ± 0.000 | 400 | not in 400 |" in text
    assert "| REG | 2.40 ± 0.00 | 50.0 ± 0.0 % | 0.500 ± 0.000 | 0.500 ± 0.000 | 132 ± 18 | 234 ± 31 |" in text
    assert headline(results) == (
        "SiT's distance after 400 steps (4.20) is reached by REPA after 225 ± 0 (1.78 times fewer) and by REG after 132 ± 18 (3.07 times "
        "fewer); REPA's distance after 400 steps (3.15) is reached by REG after 234 ± 31 (1.73 times fewer).")


def test_a_run_that_is_there_at_the_first_scored_step_gives_a_bound():
    results = made_up({"sit": [4.0, 4.4], "reg": [2.1, 2.1]})
    assert headline(results) == "SiT's distance after 400 steps (4.20) is reached by REG after at most 105 (at least 3.81 times fewer)."


def test_pieces_without_their_counterparts_are_summarised_as_far_as_they_go():
    results = made_up({"sit": [4.0, 4.4], "reg": [2.1, 2.4]})
    del results["pieces"][2]                                                                      # REG, seed 0
    results["summary"] = summarise(results)
    found = results["summary"]["methods"]["reg"]
    assert found["steps_to"]["sit"]["seeds"] == 1 and found["beside_sit_over_samplings"] == []
    assert "REG after 119 (3.36 times fewer)" in as_text(results)
    results["pieces"] = [piece for piece in results["pieces"] if (piece["method"], piece["seed"]) != ("sit", 1)]
    results["summary"] = summarise(results)
    assert results["summary"]["methods"]["reg"]["steps_to"]["sit"]["seeds"] == 0 and headline(results) == ""


def test_the_sentence_says_so_where_the_order_does_not_hold():
    results = made_up({"sit": [3.0, 3.2], "repa": [3.0, 4.0], "reg": [5.0, 5.0]})
    assert headline(results) == ("SiT's distance after 400 steps (3.10) is reached by REPA in 1 of 2 runs and by REG in none of 2 runs; "
                                 "REPA's distance after 400 steps (3.50) is reached by REG in none of 2 runs.")
    assert headline(made_up({"sit": [3.0]})) == ""


def test_what_was_not_run_is_named():
    results = made_up({"sit": [3.0], "reg": [2.0]}) | {"not_run": [{"method": "patches", "seed": 2}]}
    text = as_text(results)
    assert "### Not run\n\nclass token, patches aligned seed 2.\n" in text and "REPA" not in text


def test_rows_of_the_samples_share_a_seed(monkeypatch, tmp_path):
    shown = []
    monkeypatch.setattr("toy.figures.samples", lambda _, rows: shown.append(rows) or Figure())
    results = made_up({"sit": [4.0, 4.4], "repa": [3.0], "reg": [2.1, 2.4]})
    pictures = {key: {"of": key} for key in [("sit", 0), ("repa", 1), ("sit", 1), ("reg", 1)]}
    draw_figures(results, pictures, np.zeros((0, 32, 32, 3)), tmp_path)
    assert shown == [{method: {"of": (method, 1)} for method in ("sit", "repa", "reg")}]


# ------------------------------------------------------------------------------------------------------------------- the scores

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """64 drawn images, prepared by the script's own commands with the encoder's features; they run here, which spares five programs."""
    folder, bin_folder = tmp_path_factory.mktemp("toy"), tmp_path_factory.mktemp("bin")
    recorder, record = bin_folder / "python", bin_folder / "commands"
    recorder.write_text(f'#!/bin/bash\nprintf "%s\\n" "${{*@Q}}" >> {shlex.quote(str(record))}\n')
    recorder.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(recorder))
        prepare(TINY, folder)
    programs = {"toy.draw": draw.main, "preprocessing.dataset_tools": dataset_tools.main}
    commands = [shlex.split(line) for line in record.read_text().splitlines()]
    assert [command[1:3] for command in commands if command[1] != "toy.draw"] == [
        ["preprocessing.dataset_tools", name] for name in ("convert", "encode", "check", "encode")]
    for minus_m, program, *arguments in commands:
        assert minus_m == "-m"
        programs[program](arguments)
    return folder


@pytest.fixture(scope="module")
def prepared(data):
    """The same data, which `compare` is spared to prepare again: five programs that would find all of it whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "prepare", lambda *_: None)
        yield data


def test_data_of_another_size_is_refused_before_anything_is_made(data, tmp_path):
    for scale, takes in ((SCALES["cpu"], "8192 of 32x32"), (replace(TINY, resolution=64), "64 of 64x64")):
        with pytest.raises(UserError, match=f"holds 64 images of 32x32, and this scale takes {takes}: name another --data-dir"):
            compare.compare(scale, "cpu", data, tmp_path / "output", math.inf)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot create the folder .*file"):
        compare.compare(TINY, "cpu", tmp_path / "file", tmp_path / "output", math.inf)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_data_that_cannot_be_prepared_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(UserError, match=f"the data in {tmp_path} could not be prepared, for the reason above"):
        prepare(TINY, tmp_path)


@pytest.fixture(scope="module")
def judge(data):
    return open_data(data)


@pytest.fixture(scope="module")
def fresh():
    """96 images that no network has seen, uint8 (96, 3, 32, 32), and labels (96,)."""
    drawings = draw_many(77, 96)
    images = np.stack([drawing.image for drawing in drawings])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor([drawing.label for drawing in drawings])


def test_the_reference_is_a_fresh_draw(data):
    with np.load(data / "reference.npz") as file:
        reference = {image.tobytes() for image in file["arr_0"]}
    training = {image.tobytes() for image in compare.read_training(data)[0].permute(0, 2, 3, 1).numpy()}
    assert len(training) == 64 and len(reference) == 2048 and not training & reference


def test_real_images_score_near_perfect_and_noise_does_not(judge, fresh):
    images, labels = fresh
    real, noise = image_scores(judge, images, labels), image_scores(judge, torch.randint_like(images, 256), labels)
    assert real["class_agreement"] > 0.98 and real["precision"] > 0.8
    assert noise["class_agreement"] < 0.3 and noise["precision"] < 0.1 and noise["distance"] > 5 * real["distance"]


def test_the_encoders_own_tokens_fit_their_images_better_than_others_of_the_label(judge, fresh):
    images, labels = fresh
    own = judge.encoder(images)
    scores = token_scores(judge, own, images, labels)
    assert scores["token_cosine"] == pytest.approx(1, abs=1e-6) and scores["token_cosine_other"] < 0.9
    assert scores["token_agreement"] > 0.9 and scores["token_nearest"] > scores["token_cosine_other"]
    swapped = token_scores(judge, own[next_of_label(labels)], images, labels)
    assert swapped["token_cosine"] == pytest.approx(scores["token_cosine_other"], abs=1e-6)
    random = token_scores(judge, torch.randn_like(own), images, labels)
    assert abs(random["token_cosine"]) < 0.1 and random["token_agreement"] < 0.3


def test_the_next_of_a_label_is_another_image_of_it():
    labels = torch.tensor([2, 0, 2, 1, 0, 2])
    assert next_of_label(labels).tolist() == [2, 4, 5, 3, 1, 0]


def test_nearest_tokens_are_by_angle_and_sorted():
    known = torch.tensor([[10.0, 0], [0, 1], [-1, 0]])
    values, indices = nearest(torch.tensor([[1.0, 0.1]]), known, 2)
    assert indices.tolist() == [[0, 1]] and values[0, 0].item() == pytest.approx(1 / math.hypot(1, 0.1))


def test_every_method_starts_from_the_same_noise_and_labels(judge):
    """An untrained SiT predicts a velocity of zero, so that its samples are the decoded noise: with or without a class token."""
    size = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=1, num_heads=2, num_classes=16, z_dims=())
    plain = draw_samples(SiT(**size, cls_token_dim=None).eval(), judge, 20, HOW)
    slotted = draw_samples(SiT(**size, cls_token_dim=128).eval(), judge, 20, HOW)
    assert torch.equal(plain[0], slotted[0]) and torch.equal(plain[1], slotted[1]) and plain[2] is None and slotted[2].shape == (20, 128)
    assert plain[1].tolist() == [index % 16 for index in range(20)]


def test_real_images_bound_what_a_model_can_reach(judge):
    real = real_scores(judge, 256, 32, [5, 6])
    assert 0 < real["drawn"]["distance"] < real["decoded"]["distance"] < 1.5 and real["distances"][0] == real["drawn"]["distance"]
    assert real["distances"][0] != real["distances"][1] and real["decoded"]["token_cosine"] > 0.98


# ------------------------------------------------------------------------------------------------------------------- the pieces

def test_scales_run_the_methods_in_turn_and_the_ablations_last():
    assert SCALES["cpu"].pieces == tuple((method, seed) for seed in range(3) for method in MAIN)
    methods = [method for method, _ in SCALES["gpu"].pieces]
    assert methods[:9] == list(MAIN) * 3 and set(methods[9:]) == {"class-token", "patches"}
    for scale in SCALES.values():
        assert len(scale.steps) >= 6


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_flag_of_a_piece_is_one_that_train_takes(scale, method):
    args = train.resolve(train.parse_args(["--method", method.name, "--model", "SiT-T/2", *scale.flags, *method.flags]))
    asked = {"sit": (0, None), "repa": (0.5, "patches"), "reg": (0.5, "all")}[method.name]
    asked = {"--proj-coeff": (0, None), "--align": (0.5, "patches")}.get("".join(method.flags[:1]), asked)
    assert (args.proj_coeff, args.align) == asked


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory):
    output = tmp_path_factory.mktemp("compare")
    compare.compare(TINY, "cpu", prepared, output, math.inf)
    return output


def test_a_comparison_leaves_results_tables_and_pictures(run):
    results = json.loads((run / "results.json").read_text())
    assert [(piece["method"], piece["seed"]) for piece in results["pieces"]] == list(TINY.pieces) and results["not_run"] == []
    assert [point["step"] for point in results["pieces"][1]["points"]] == [2, 4]
    assert results["pieces"][0]["points"][-1]["distance"] != results["pieces"][1]["points"][-1]["distance"]
    assert "token_cosine" in results["pieces"][1]["points"][0] and "token_cosine" not in results["pieces"][0]["points"][0]
    assert [len(set(piece["repeated_distances"])) for piece in results["pieces"]] == [compare.REPEATS, compare.REPEATS]
    assert results["summary"] == json.loads(json.dumps(summarise(results))) and (run / "tables.md").read_text() == as_text(results)
    for name in ("convergence.png", "samples.png", "class_token.png"):
        assert Image.open(run / name).text["Results"] == digest(results)
    settings = [json.loads((run / name / "args.json").read_text()) for name in ("sit-seed1", "reg-seed1")]
    assert [(found["method"], found["seed"], found["cached_features"]) for found in settings] == [("sit", 1, "off"), ("reg", 1, "require")]
    assert [path.name for path in (run / "sit-seed1" / "checkpoints").iterdir()] == ["0000004.pt"]


def test_a_piece_is_sampled_with_the_noise_of_its_seed(run, judge):
    last = run / "sit-seed1" / "checkpoints" / "0000004.pt"
    kept = json.loads((run / "sit-seed1" / "scores.json").read_text())["points"][-1]["distance"]
    of_seed = [score_checkpoint(last, judge, TINY.num_samples, replace(HOW, seed=seed))[0]["distance"] for seed in (0, 1)]
    assert kept == pytest.approx(of_seed[1], rel=1e-6) and kept != pytest.approx(of_seed[0], rel=1e-3)


def test_pieces_of_other_flags_are_not_set_beside_each_other(run, tmp_path):
    for seed in (0, 1):
        (tmp_path / f"sit-seed{seed}").mkdir()
        args = json.loads((run / "sit-seed1" / "args.json").read_text()) | {"seed": seed, "adam_weight_decay": 0.1 * seed}
        (tmp_path / f"sit-seed{seed}" / "args.json").write_text(json.dumps(args))
    assert training_flags(tmp_path, [{"method": "sit", "seed": 1}])["sit"]["adam_weight_decay"] == 0.1
    with pytest.raises(UserError, match="sit-seed1 was trained with other flags than the pieces before it: remove it"):
        training_flags(tmp_path, [{"method": "sit", "seed": 0}, {"method": "sit", "seed": 1}])


def test_the_same_command_keeps_whole_pieces(run, prepared):
    kept = [run / "reg-seed1" / "scores.json", run / "sit-seed1" / "checkpoints" / "0000004.pt"]
    before, results = [path.stat().st_mtime_ns for path in kept], json.loads((run / "results.json").read_text())
    compare.compare(TINY, "cpu", prepared, run, math.inf)
    assert [path.stat().st_mtime_ns for path in kept] == before
    again = json.loads((run / "results.json").read_text())
    assert again["pieces"] == results["pieces"] and again["summary"] == results["summary"]


def test_pieces_of_another_setting_are_refused(run, prepared):
    with pytest.raises(UserError, match="holds pieces of another setting: name another --output"):
        compare.compare(replace(TINY, num_samples=64), "cpu", prepared, run, math.inf)


def test_a_setting_of_no_piece_is_replaced(tmp_path):
    require_setting(TINY, tmp_path)
    other = replace(TINY, num_samples=64)
    require_setting(other, tmp_path)
    assert json.loads((tmp_path / compare.SETTING).read_text()) == setting_of(other)


def test_what_the_time_does_not_allow_is_reported(run, prepared):
    scale = replace(TINY, pieces=(*TINY.pieces, ("patches", 0)))
    compare.compare(scale, "cpu", prepared, run, 1e-9)
    results = json.loads((run / "results.json").read_text())
    assert results["not_run"] == [{"method": "patches", "seed": 0}] and len(results["pieces"]) == 2


def test_the_gpus_scale_is_refused_without_one(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--scale", "gpu", "--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "new")])
    assert stopped.value.code == 2 and not list(tmp_path.iterdir())
    assert "there is no CUDA device: use --scale cpu" in capsys.readouterr().err


def test_another_learning_rate_is_that_of_every_piece(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(compare, "compare", lambda scale, *_: ran.append(scale))
    compare.main(["--learning-rate", "1e-3"])
    args = train.parse_args(["--method", "reg", *ran[0].flags])
    assert args.learning_rate == 1e-3 and setting_of(ran[0]) != setting_of(SCALES["cpu"])
    compare.main(["--learning-rate", "0.006"])
    assert ran.pop() == SCALES["cpu"]
    with pytest.raises(SystemExit):
        compare.main(["--learning-rate", "0"])
    assert "--learning-rate 0.0 came: give a number above 0" in capsys.readouterr().err and len(ran) == 1


def test_no_time_is_refused_before_anything_is_made(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "new"), "--minutes", "0"])
    assert stopped.value.code == 2 and "--minutes 0.0 is no time" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_stopped_comparison_stops_its_trainings_which_save(data, tmp_path):
    """SIGTERM to the program: the piece that trains writes a checkpoint, and nothing is left running."""
    program = f"""
from pathlib import Path
from dataclasses import replace
from runtime.messages import without_traceback
from tests.test_compare import TINY
from toy import compare
compare.prepare = lambda *_: None
if __name__ == "__main__":
    scale = replace(TINY, steps=(100_000,), flags=(*TINY.flags, "--logging-steps", "1"), pieces=(("sit", 0),))
    without_traceback(compare.compare)(scale, "cpu", Path({str(data)!r}), Path({str(tmp_path)!r}), float("inf"))
"""
    (tmp_path / "program.py").write_text(program)
    running = subprocess.Popen([sys.executable, tmp_path / "program.py"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
                               stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "sit-seed0" / "metrics.jsonl"
    deadline = time.time() + 300
    while not (metrics.exists() and metrics.read_text()) and time.time() < deadline:
        time.sleep(0.2)
    running.terminate()
    _, errors = running.communicate(timeout=300)
    assert running.returncode == 130 and "interrupted: the same command goes on" in errors, errors
    assert len(list((tmp_path / "sit-seed0" / "checkpoints").glob("*.pt"))) == 1
    assert "stopped by SIGTERM" in (tmp_path / "sit-seed0.log").read_text()


def test_a_training_that_fails_is_named_with_its_log(data, tmp_path):
    broken = replace(TINY, flags=("--batch-size", "0"))
    with pytest.raises(UserError, match="the training of sit-seed0 ended with status 2 .*batch-size.*: see .*sit-seed0.log"):
        compare.train(broken, "sit", 0, data, tmp_path)


# --------------------------------------------------------------------------------------------------------------------- the page

RESULTS = ROOT / "toy" / "results"
LOWER = RESULTS / "lr-1e-3"                   # the same comparison at another learning rate


def flat(text: str) -> str:
    """Without line breaks, so that a sentence is found wherever it is broken."""
    return " ".join(text.split())


def read_results(folder: Path) -> dict:
    results = json.loads((folder / "results.json").read_text())
    assert results["summary"] == json.loads(json.dumps(summarise(results)))
    return results


@pytest.fixture(scope="module")
def published():
    return read_results(RESULTS)


@pytest.fixture(scope="module")
def lower():
    return read_results(LOWER)


@pytest.fixture(scope="module")
def page():
    return (ROOT / "toy" / "RESULTS.md").read_text()


def test_the_page_says_what_the_results_say(published, lower, page):
    for heading, text in tables(published).items():
        assert f"### {heading}\n\n{text}" in page, heading
    for heading in ("Distance by step", "Distance over SiT's, seed by seed", "Steps to where SiT is after so many"):
        assert f"\n{tables(lower)[heading]}" in page, heading
    assert headline(published) in flat(page) and headline(lower) in flat(page)
    for figure, results in (("convergence.png", published), ("samples.png", published), ("class_token.png", published),
                            ("lr-1e-3/convergence.png", lower)):
        assert f"(results/{figure})" in page and Image.open(RESULTS / figure).text["Results"] == digest(results)


def test_the_readme_says_what_the_results_say(published, lower):
    readme = flat((ROOT / "README.md").read_text())
    assert headline(published) in readme and headline(lower) in readme


def test_the_published_settings_are_those_that_run(published, lower):
    for results, scale in ((published, SCALES["cpu"]), (lower, at_learning_rate(SCALES["cpu"], 1e-3))):
        assert results["setting"] == setting_of(scale)
        assert {(piece["method"], piece["seed"]) for piece in (*results["pieces"], *results["not_run"])} == set(scale.pieces)


def test_the_claims_in_words_hold_in_the_results(published, lower, page):
    """What page and README say beyond the tables: how near the methods are; how token and image belong together."""
    methods, real = published["summary"]["methods"], published["real"]["decoded"]
    means = {method: [point["distance"]["mean"] for point in methods[method]["curve"]] for method in MAIN}
    assert all(reg < min(sit, repa) for sit, repa, reg in zip(*means.values(), strict=True))
    over = [point["distance"] for point in methods["reg"]["beside_sit"]]
    assert all(1 - value["mean"] < value["std"] for value in over)
    near = f"{min(value['mean'] for value in over):.2f} to {max(value['mean'] for value in over):.2f} of SiT's"
    spreads = f"{min(value['std'] for value in over):.2f} to {max(value['std'] for value in over):.2f}"
    assert f"{near}, a difference that is smaller than its spread over seeds ({spreads})" in flat(page)

    of_lower = lower["summary"]["methods"]
    ends = [piece["points"][-1]["distance"] for piece in lower["pieces"]]                         # SiT, REPA, REG of seed 0, then of seed 1
    assert ends[2] < min(ends[:2]) and ends[5] < min(ends[3:5])
    agreements = [f"{100 * of_lower[method]['curve'][-1]['class_agreement']['mean']:.1f} %" for method in ("reg", "sit")]
    assert f"REG ends at {ends[2] / ends[0]:.2f} and {ends[5] / ends[3]:.2f} of SiT's distance" in flat(page)
    assert f"({agreements[0]} against {agreements[1]})" in flat(page)

    for point in methods["reg"]["curve"]:
        assert point["token_cosine"]["mean"] - point["token_cosine_other"]["mean"] > 3 * point["token_cosine"]["std"]
        assert (point["token_agreement"]["mean"] > point["class_agreement"]["mean"]) == (point["step"] >= 500)
        assert point["token_nearest"]["mean"] < published["real"]["drawn"]["token_nearest"]
    at_500, last = methods["reg"]["curve"][1], methods["reg"]["curve"][-1]
    there = f"({100 * at_500['token_agreement']['mean']:.1f} % and {100 * at_500['class_agreement']['mean']:.1f} % there)"
    assert f"From 500 steps on the token has its label more often than the image does {there}" in flat(page)
    gap, real_gap = last["token_cosine"]["mean"] - last["token_cosine_other"]["mean"], real["token_cosine"] - real["token_cosine_other"]
    assert f"at the end by {gap:.2f}, where real images have {real_gap:.2f} (through the VAE)" in flat(page)
