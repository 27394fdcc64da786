"""The evaluator as a program: score, stats, selftest, and any number of processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from evaluations import evaluator, extraction, features
from evaluations.acceptance import PUBLISHED, Published, compare
from evaluations.evaluator import main, parse_args
from preprocessing.crop import center_crop, to_rgb
from tests.conftest import random_images
from tests.test_features import write_timm_folder

ROOT = Path(__file__).parents[1]
FIVE = ["inception_score", "fid", "sfid", "precision", "recall"]


def run(*arguments) -> None:
    main([str(argument) for argument in arguments])


def refused(capsys, *arguments) -> str:
    """The one sentence that ends the program with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    printed = capsys.readouterr()
    last = printed.err.splitlines()[-1]
    assert end.value.code == 2 and last.startswith("error: ") and printed.err.count("error: ") == 1 and "Traceback" not in printed.err
    return last


@pytest.fixture
def two_sets(tmp_path):
    np.savez(tmp_path / "ref.npz", random_images(30, seed=1))
    (tmp_path / "made").mkdir()
    np.savez(tmp_path / "made" / "sample.npz", random_images(28, seed=2))
    return tmp_path / "ref.npz", tmp_path / "made" / "sample.npz"


@pytest.fixture
def score(tiny_inception, tiny_weights, two_sets, tmp_path):
    """Scores `two_sets` with the small Inception; further arguments come after and win. Returns what metrics.json holds."""
    def score(*arguments):
        run("--ref-batch", two_sets[0], "--sample-batch", two_sets[1], "--inception-weights", tiny_weights, "--device", "cpu",
            "--output", tmp_path / "metrics.json", *arguments)
        return json.loads((tmp_path / "metrics.json").read_text())

    return score


# --- score -----------------------------------------------------------------------------------------------------------------------


def test_adms_five_lines_in_adms_order(score, capsys):
    result = score()
    *lines, _ = capsys.readouterr().out.splitlines()
    assert lines == [f"Inception Score: {result['inception_score']}", f"FID: {result['fid']}", f"sFID: {result['sfid']}",
                     f"Precision: {result['precision']:.4f}", f"Recall: {result['recall']:.4f}"]
    assert all(np.isfinite(result[name]) for name in FIVE)


def test_the_last_line_says_what_was_compared_and_how(score, capsys, monkeypatch, tmp_path):
    result = score()
    network = f"inception with sha256 {result['weights_sha256']}"
    assert capsys.readouterr().out.splitlines()[-1] == (f"28 samples; 30 reference images; {network}, the published file; "
                                                        "inception score: slices of 5000 in file order; precision recall: adm")
    monkeypatch.setattr(features, "INCEPTION_SHA256", "another")
    np.savez(tmp_path / "mu.npz", mu=np.zeros(6), sigma=np.eye(6))
    score("--metrics", "fid", "--ref-batch", tmp_path / "mu.npz")
    assert capsys.readouterr().out.splitlines()[-1] == ("28 samples; reference images' statistics from the file; "
                                                        f"{network}, NOT the published file")


def test_the_last_line_tells_kept_images_from_those_of_the_statistics(score, two_sets, tiny_weights, tmp_path, capsys):
    run("stats", two_sets[0], tmp_path / "stats.npz", "--keep", 20, "--inception-weights", tiny_weights, "--device", "cpu")
    score("--ref-batch", tmp_path / "stats.npz")
    assert "; 20 reference images and reference images' statistics from the file (of 30); " in capsys.readouterr().out


def test_metrics_json_says_how_the_scores_were_made(score, two_sets, tiny_inception):
    result = score()
    assert list(result) == [*FIVE, "num_samples", "num_reference", "sample_statistics_from_file", "reference_statistics_from_file",
                            "image_size", "reference_image_size", "features", "weights_sha256", "weights_verified", "modes", "device",
                            "versions", "sample_batch", "ref_batch", "asked"]
    assert (result["num_samples"], result["num_reference"], result["image_size"]) == (28, 30, [16, 16])
    assert (result["ref_batch"], result["sample_batch"]) == tuple(map(str, two_sets))
    assert (result["features"], result["weights_sha256"], result["device"]) == ("inception", tiny_inception.weights_sha256, "cpu")
    assert result["asked"] == {"features": "inception", "metrics": None, "precision_recall": "adm"}


def test_program_takes_regs_spellings(tiny_inception, tiny_weights, two_sets, tmp_path, capsys):
    run("--ref_batch", two_sets[0], "--sample_batch", two_sets[1], "--save_path", tmp_path / "made", "--device", "cpu",
        "--inception-weights", tiny_weights)
    result = json.loads((tmp_path / "made" / "metrics.json").read_text())         # an existing folder gets metrics.json
    assert f"FID: {result['fid']}\n" in capsys.readouterr().out and result["weights_verified"] is True and "settings" not in result


def test_metrics_are_chosen(score, capsys):
    everything = score("--metrics", "inception_score,fid,sfid,precision,recall,kid")
    assert f"KID: {everything['kid']} +- {everything['kid_std']}" in capsys.readouterr().out.splitlines()
    some = score("--metrics", "recall, fid")
    assert [name for name in some if name in FIVE] == ["fid", "recall"] and "kid" not in some
    assert (some["fid"], some["recall"]) == (everything["fid"], everything["recall"])
    assert capsys.readouterr().out.splitlines()[:-1] == [f"FID: {some['fid']}", f"Recall: {some['recall']:.4f}"]
    assert some["asked"]["metrics"] == "recall, fid"


def test_unknown_metrics_are_refused_before_images_are_read(score, capsys, monkeypatch):
    monkeypatch.setattr(extraction, "extract", None)
    with pytest.raises(SystemExit):
        score("--metrics", "fid,is")
    assert "error: --metrics names 'is': in the features of 'inception' there are inception_score, fid, sfid" in capsys.readouterr().err


def test_distances_of_precision_and_recall_are_chosen(score, capsys, monkeypatch):
    assert score()["modes"]["precision_recall"] == score("--precision-recall", "adm")["modes"]["precision_recall"] == "adm"
    assert score("--precision-recall", "exact")["modes"]["precision_recall"] == "exact"
    off = score("--precision-recall", "off")
    assert [name for name in off if name in FIVE] == FIVE[:3] and "precision_recall" not in off["modes"]
    assert list(score("--precision-recall", "off", "--metrics", "sfid"))[0] == "sfid"
    with pytest.raises(SystemExit):
        score("--precision-recall", "off", "--metrics", "sfid,recall")
    assert "--metrics names recall and --precision-recall is off: leave one of them out" in capsys.readouterr().err


def test_program_with_other_features_never_says_fid(two_sets, tmp_path, capsys):
    ref, sample = two_sets
    write_timm_folder(tmp_path / "inception", 5)                                  # the name alone makes it no Inception
    output = tmp_path / "deep" / "metrics.json"
    flags = ("--ref-batch", ref, "--sample-batch", sample, "--features", f"local-dir:{tmp_path / 'inception'}", "--device", "cpu")
    run(*flags, "--output", output, "--metrics", "fd,kid")
    printed, result = capsys.readouterr(), json.loads(output.read_text())
    assert printed.out.splitlines() == [f"Frechet distance (inception): {result['fd_inception']}",
                                        f"KID (inception): {result['kid_inception']} +- {result['kid_inception_std']}",
                                        f"28 samples; 30 reference images; inception with sha256 {result['weights_sha256']}; "
                                        "kid: 100 subsets of 28, seed 0"]
    assert "fid" not in printed.out.lower() and not [key for key in result if "fid" in key.lower()]
    assert result["fd_inception"] > 0 and result["weights_verified"] is None
    assert [path.name for path in output.parent.iterdir()] == ["metrics.json"]   # no temporary file is left
    run(*flags, "--precision-recall", "off")                                      # which these features do not have anyway
    assert capsys.readouterr().out.splitlines()[:-1] == [f"Frechet distance (inception): {result['fd_inception']}"]


def test_settings_of_the_samples_go_into_the_result(score, two_sets, tmp_path, capsys):
    settings = {"cfg_scale": 2.3, "checkpoint_sha256": "abc"}
    (two_sets[1].parent / "settings.json").write_text(json.dumps(settings))
    assert score()["settings"] == settings
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(random_images(5)):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i}.png")
    assert "settings" not in score("--sample-batch", tmp_path / "folder")
    (tmp_path / "folder" / "settings.json").write_text("{}")
    assert score("--sample-batch", tmp_path / "folder")["settings"] == {}
    (two_sets[1].parent / "settings.json").write_text("{")
    assert "settings.json is not JSON" in refused(capsys, "--ref-batch", two_sets[0], "--sample-batch", two_sets[1])


def test_the_references_features_are_kept_in_torch_hubs_folder(score, tiny_inception, monkeypatch, tmp_path):
    assert parse_args(["--ref-batch", "a", "--sample-batch", "b"]).cache == Path(torch.hub.get_dir()) / "reference-features"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    seen, extract = [], extraction.extract
    monkeypatch.setattr(extraction, "extract", lambda images, *rest: seen.append(Path(images.name).name) or extract(images, *rest))
    results = [score(), score(), score("--cache", tmp_path / "other")]
    assert results[0] == results[1] == results[2]
    assert seen == ["ref.npz", "sample.npz", "sample.npz", "ref.npz", "sample.npz"]
    assert len(list((tmp_path / "hub" / "reference-features").iterdir())) == len(list((tmp_path / "other").iterdir())) == 1


def test_dry_run_checks_reference_and_network_and_stops(two_sets, tiny_inception, tiny_weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluator, "evaluate", None)
    flags = ("--ref-batch", two_sets[0], "--inception-weights", tiny_weights, "--device", "cpu", "--dry-run")
    run(*flags)
    assert capsys.readouterr().out == ""
    assert "nowhere.npz not found" in refused(capsys, *flags, "--ref-batch", "nowhere.npz")
    assert "nowhere.pth not found" in refused(capsys, *flags, "--inception-weights", "nowhere.pth")
    with pytest.raises(SystemExit):
        run(*flags[:-1])
    assert "--sample-batch is missing" in capsys.readouterr().err



@pytest.mark.parametrize("change, sentence", [
    (("--sample-batch", "none.npz"), "none.npz not found"),
    (("--ref-batch", "none.npz"), "none.npz not found"),
    (("--device", "gpu"), "expected cpu, cuda or cuda:N"),
    (("--device", "cuda:7"), "torch sees 0 GPUs"),
    (("--features", "dino"), "expected 'inception', 'dinov2' or"),
    (("--output", "{ref}/below/metrics.json"), "cannot be written"),
    (("--dinov2-weights", "file.pth"), "--dinov2-weights came with --features local-dir:"),
    (("--inception-weights", "file.pth"), "--inception-weights came with --features local-dir:"),
    (("--class-tokens", "file.npz"), "no settings.json beside"),
    (("--metrics", ","), "--metrics"),
    (("--enc-type", "dinov2-vit-b"), "--class-tokens"),
    (("--encoder-weights", "file.pth"), "--class-tokens"),
    (("--precision-recall", "exact"), "--precision-recall"),
])
def test_program_ends_with_one_sentence_and_status_2(two_sets, tmp_path, capsys, change, sentence):
    ref, sample = two_sets
    write_timm_folder(tmp_path / "tiny", 0)
    arguments = {"--ref-batch": ref, "--sample-batch": sample, "--features": f"local-dir:{tmp_path / 'tiny'}", "--device": "cpu"}
    arguments[change[0]] = change[1].format(ref=ref)
    assert sentence in refused(capsys, *(part for pair in arguments.items() for part in pair))


def test_inceptions_weights_are_not_dinov2s(two_sets, tmp_path, capsys):
    (tmp_path / "file.pth").write_text("")
    flags = ("--ref-batch", two_sets[0], "--sample-batch", two_sets[1], "--features", "dinov2", "--device", "cpu")
    assert "--inception-weights came with --features dinov2" in refused(capsys, *flags, "--inception-weights", tmp_path / "file.pth")


def test_a_batch_size_below_1_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        run("--ref-batch", "a", "--sample-batch", "b", "--batch-size", "0")
    assert end.value.code == 2 and "expected at least 1" in capsys.readouterr().err


# --- stats -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Thirty labelled pictures as `convert` leaves them."""
    (tmp_path / "images" / "00000").mkdir(parents=True)
    labels = []
    for i, image in enumerate(random_images(30, seed=1)):
        labels.append([f"00000/img{i:08d}.png", i % 4])
        Image.fromarray(image).save(tmp_path / "images" / labels[-1][0])
    (tmp_path / "images" / "dataset.json").write_text(json.dumps({"labels": labels}))
    return tmp_path / "images"


@pytest.fixture
def stats(tiny_inception, tiny_weights, tmp_path):
    """Runs `stats`; returns the file."""
    def stats(source, *arguments, name="stats.npz"):
        run("stats", source, tmp_path / name, "--inception-weights", tiny_weights, "--device", "cpu", *arguments)
        return tmp_path / name

    return stats


def five(result):
    return {name: result[name] for name in FIVE}


def test_a_reference_of_own_images_scores_as_the_images_do(score, stats, folder, tiny_inception, capsys):
    path = stats(folder)
    assert capsys.readouterr().out == f"{path}: statistics of 30 images, 30 of them kept\n"
    with np.load(path) as file:
        assert set(file.files) == {"arr_0", "arr_1", "mu", "sigma", "mu_s", "sigma_s", "about"}
        assert np.array_equal(file["arr_0"], random_images(30, seed=1)) and np.array_equal(file["arr_1"], np.arange(30) % 4)
        assert file["mu"].shape == (6,) and file["sigma_s"].shape == (4, 4) and file["sigma"].dtype == np.float64
    direct, through = score("--ref-batch", folder), score("--ref-batch", path)
    assert five(direct) == five(through)
    assert through["reference_statistics_from_file"] and not direct["reference_statistics_from_file"]
    about = through["reference_about"]
    assert (about["source"], about["images"], about["kept"], about["adm_crop"], about["seed"]) == (str(folder), 30, 30, None, 0)
    assert (about["features"], about["weights_sha256"]) == ("inception", tiny_inception.weights_sha256)


def test_statistics_are_of_all_images_when_few_are_kept(score, stats, folder):
    whole, few, again, other = (stats(folder, *flags, name=f"{i}.npz") for i, flags in enumerate(
        [(), ("--keep", 8), ("--keep", 8, "--batch-size", 7), ("--keep", 8, "--seed", 1)]))
    images, kept = random_images(30, seed=1), []
    with np.load(whole) as a:
        for path in (few, again, other):
            with np.load(path) as b:
                for name in ("mu", "sigma", "mu_s", "sigma_s"):
                    # Products of 7 rows may sum their 48 float32 terms in another order than of 8: 48 * 2^-24 = 3e-6.
                    tolerance = 3e-6 * np.abs(a[name]).max() if path == again else 0
                    assert np.abs(a[name] - b[name]).max() <= tolerance
                rows = [int(np.flatnonzero((images == image).all(axis=(1, 2, 3))).item()) for image in b["arr_0"]]
                assert len(rows) == 8 and rows == sorted(set(rows)) and b["arr_1"].tolist() == [row % 4 for row in rows]
                kept.append(rows)
    assert kept[0] == kept[1] != kept[2] and kept[0] != list(range(8))
    direct, through = score("--ref-batch", folder), score("--ref-batch", few)
    assert (through["fid"], through["sfid"]) == (direct["fid"], direct["sfid"]) and through["num_reference"] == 8


def test_statistics_without_images_serve_for_the_distances(score, stats, folder):
    path = stats(folder, "--keep", 0)
    with np.load(path) as file:
        assert "arr_0" not in file.files
    direct, through = score("--ref-batch", folder), score("--ref-batch", path)
    assert [name for name in through if name in FIVE] == FIVE[:3] and all(direct[name] == through[name] for name in FIVE[:3])


def test_pictures_of_any_size_are_cropped_as_adm_did(stats, score, tmp_path):
    (tmp_path / "raw").mkdir()
    pictures = [random_images(1, 20 + i, 31 + 2 * i, seed=i)[0] for i in range(9)]
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / "raw" / f"{i}.png")
    path = stats(tmp_path / "raw", "--adm-crop", 16)
    expected = np.stack([np.array(center_crop(Image.fromarray(picture), 16)) for picture in pictures])
    with np.load(path) as file:
        assert np.array_equal(file["arr_0"], expected) and "arr_1" not in file.files
    np.savez(tmp_path / "cropped.npz", expected)
    assert five(score("--ref-batch", path)) == five(score("--ref-batch", tmp_path / "cropped.npz"))
    assert score("--ref-batch", path)["reference_about"]["adm_crop"] == 16


def test_statistics_that_the_source_brings_along_are_not_its_images(stats, two_sets, tmp_path):
    np.savez(tmp_path / "adm.npz", random_images(30, seed=1), mu=np.full(6, 7.0), sigma=np.eye(6), mu_s=np.full(4, 8.0), sigma_s=np.eye(4))
    with np.load(stats(two_sets[0], name="a.npz")) as a, np.load(stats(tmp_path / "adm.npz", name="b.npz")) as b:
        assert np.array_equal(a["arr_0"], b["arr_0"]) and np.array_equal(a["mu"], b["mu"]) and np.array_equal(a["sigma_s"], b["sigma_s"])


def test_statistics_of_other_features(two_sets, tmp_path, capsys):
    ref, sample = two_sets
    model = tmp_path / "tiny"
    write_timm_folder(model, 5)
    flags = ("--features", f"local-dir:{model}", "--device", "cpu")
    run("stats", ref, tmp_path / "stats.npz", *flags, "--keep", 6)
    with np.load(tmp_path / "stats.npz") as file:
        assert set(file.files) == {"arr_0", "mu", "sigma", "about"} and file["mu"].shape == (24,)
    scores = []
    for reference in (ref, tmp_path / "stats.npz"):
        run("--ref-batch", reference, "--sample-batch", sample, *flags, "--output", tmp_path / "metrics.json")
        scores.append(json.loads((tmp_path / "metrics.json").read_text())["fd_tiny"])
    assert scores[0] == scores[1]
    save_file({name: value + 1e-3 for name, value in load_file(model / "model.safetensors").items()}, model / "model.safetensors")
    sentence = refused(capsys, "--ref-batch", tmp_path / "stats.npz", "--sample-batch", sample, *flags)
    assert "stats.npz were made with other tiny weights" in sentence and "make the statistics again" in sentence


def test_a_crop_takes_pictures_of_every_kind(stats, tmp_path):
    """As `convert` does: raw data sets hold some."""
    (tmp_path / "raw").mkdir()
    kinds = {"RGB": "png", "CMYK": "jpg", "P": "png", "RGBA": "png", "LA": "png", "I;16": "png"}
    for i, (mode, suffix) in enumerate(kinds.items()):
        picture = Image.fromarray(random_images(1, 20, 20, seed=i)[0])
        picture = Image.fromarray(np.full((20, 20), 300 * i, np.uint16)) if mode == "I;16" else picture.convert(mode)
        picture.save(tmp_path / "raw" / f"{i}.{suffix}")
    path = stats(tmp_path / "raw", "--adm-crop", 16)
    expected = [np.array(center_crop(to_rgb(Image.open(file), ""), 16)) for file in sorted((tmp_path / "raw").iterdir())]
    with np.load(path) as file:
        assert np.array_equal(file["arr_0"], expected)


def test_dry_run_says_what_no_samples_can_mend(two_sets, tmp_path, capsys):
    ref, _ = two_sets
    write_timm_folder(tmp_path / "tiny", 0)
    network = ("--features", f"local-dir:{tmp_path / 'tiny'}", "--device", "cpu")
    assert "--metrics names 'fid'" in refused(capsys, "--ref-batch", ref, *network, "--metrics", "fid", "--dry-run")
    np.savez(tmp_path / "mu.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert "holds statistics of other features and no images" in refused(capsys, "--ref-batch", tmp_path / "mu.npz", *network, "--dry-run")


def test_readme_shows_the_published_rows():
    readme = (ROOT / "README.md").read_text()
    for row in PUBLISHED:
        (line,) = (line for line in readme.splitlines() if row.sample in line)
        assert [float(cell) for cell in line.strip("| ").split(" | ")[1:]] == list(row.scores.values())


def test_mistakes_with_stats(two_sets, tmp_path, capsys):
    ref, _ = two_sets
    np.savez(tmp_path / "mu.npz", mu=np.zeros(3), sigma=np.eye(3))
    for arguments, sentence in (((ref, tmp_path / "out.npz", "--keep", "-1"), "--keep is -1"),
                                ((ref, tmp_path / "out.npz", "--keep", "3"), "--keep is 3: give 0, or at least 4"),
                                ((ref, tmp_path / "out.npz", "--adm-crop", "0"), "--adm-crop is 0"),
                                ((ref, tmp_path / "out.npy"), "give it a name that ends in .npz"),
                                ((tmp_path / "none", tmp_path / "out.npz"), "none not found"),
                                ((tmp_path / "mu.npz", tmp_path / "out.npz"), "holds statistics and no images")):
        assert sentence in refused(capsys, "stats", *arguments, "--device", "cpu")
    assert not (tmp_path / "out.npz").exists()


# --- selftest --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(score, two_sets, monkeypatch):
    """The small sets as if they were published, with the scores that they have here."""
    row = Published("ref.npz", "made/sample.npz", five(score()))
    monkeypatch.setattr(evaluator, "PUBLISHED", (row, Published("absent.npz", "neither.npz", {"fid": 1.0})))
    return row


def test_selftest_passes_on_the_published_scores(published, two_sets, tiny_weights, capsys):
    capsys.readouterr()
    run("selftest", two_sets[0].parent, "--inception-weights", tiny_weights, "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "made/sample.npz" and lines[1].split() == ["published", "here"]
    assert [line.split()[-1] for line in lines[2:]] == ["equal"] * 5
    assert [line.split("  ")[0] for line in lines[2:]] == ["Inception Score", "FID", "sFID", "Precision", "Recall"]


@pytest.mark.parametrize("name", FIVE)
def test_selftest_says_what_differs(published, two_sets, tiny_weights, capsys, name):
    published.scores[name] += 0.01 * abs(published.scores[name]) + 0.0021
    sentence = refused(capsys, "selftest", two_sets[0].parent, "--inception-weights", tiny_weights, "--device", "cpu")
    assert "differ from the published ones" in sentence


def test_selftest_prints_the_difference(published, two_sets, tiny_weights, capsys):
    published.scores["sfid"] *= 1.01
    with pytest.raises(SystemExit):
        run("selftest", two_sets[0].parent, "--inception-weights", tiny_weights, "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split()[-1] for line in lines] == ["equal", "equal", "DIFFERENT", "equal", "equal"]


def test_selftest_without_the_files_names_them(tmp_path, capsys):
    sentence = refused(capsys, "selftest", tmp_path)
    assert all(name in sentence for row in PUBLISHED for name in (row.ref, row.sample))


def test_tolerances_are_what_two_implementations_differ_by():
    """A PyTorch program of others with float16 distances left out, on the same files: FID and IS agree, the shares do not."""
    others = {"inception_score": 215.9764, "fid": 3.941033, "sfid": 6.140490, "precision": 0.82548, "recall": 0.5285}
    assert [row[3] for row in compare(PUBLISHED[0].scores, others)] == [True, True, True, True, False]
    others = {"inception_score": 141.4781, "fid": 2.973283, "sfid": 5.093504, "precision": 0.78042, "recall": 0.5906}
    assert [row[3] for row in compare(PUBLISHED[1].scores, others)] == [True, True, True, True, False]


# --- several processes -----------------------------------------------------------------------------------------------------------


def on_two_processes(*command, status=0) -> str:
    """Returns what was said on stderr."""
    environment = {**os.environ, "NUM_GPUS": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "runtime.launch", *map(str, command)], cwd=ROOT, env=environment, capture_output=True,
                          text=True)
    assert done.returncode == status, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def one_thread():
    """As each of the processes has."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_and_two(encoder_folder, tmp_path_factory, one_thread):
    """What one process and two write of the same sets: seven blocks of four images and one of two, where the last one goes alone."""
    folder = tmp_path_factory.mktemp("processes")
    np.savez(folder / "ref.npz", random_images(30, seed=1))
    np.savez(folder / "sample.npz", random_images(28, seed=2))
    flags = ["--ref-batch", folder / "ref.npz", "--sample-batch", folder / "sample.npz", "--metrics", "fd,kid", "--device", "cpu",
             "--features", f"local-dir:{encoder_folder}", "--batch-size", "4"]
    run(*flags, "--cache", folder / "cache1", "--output", folder / "1.json")
    on_two_processes("-m", "evaluations.evaluator", *flags, "--cache", folder / "cache2", "--output", folder / "2.json")
    return folder


def test_two_processes_give_the_same_bits(one_and_two):
    one, two = (json.loads((one_and_two / f"{n}.json").read_text()) for n in (1, 2))
    scores = ("fd_encoder", "kid_encoder", "kid_encoder_std")
    assert [one[name] for name in scores] == [two[name] for name in scores] and one["fd_encoder"] > 0 and one["kid_encoder_std"] > 0
    (kept1,), (kept2,) = ((one_and_two / f"cache{n}").iterdir() for n in (1, 2))
    assert kept1.name == kept2.name
    with np.load(kept1) as a, np.load(kept2) as b:
        assert set(a.files) == set(b.files) == {"pooled", "gaussian_mean", "gaussian_covariance"}
        assert all(np.array_equal(a[name], b[name]) for name in a.files)


def test_two_processes_write_the_same_file(one_and_two):
    assert (one_and_two / "1.json").read_text() == (one_and_two / "2.json").read_text()


PROGRAM = """
import json, sys
from evaluations import evaluator, extraction, features
from runtime.launch import leave_processes
from tests.conftest import TinyInception
features.Inception = extraction.Inception = TinyInception
commands = json.loads(sys.argv[1])
features.INCEPTION_SHA256 = features.sha256(commands[-1][commands[-1].index("--inception-weights") + 1])
for arguments in commands:
    evaluator.main(arguments)
leave_processes()
"""


def test_two_processes_give_the_same_scores_and_statistics(tiny_inception, tiny_weights, two_sets, encoder_folder, tmp_path, one_thread):
    """With an odd number of blocks, and with one block for two processes; the third run finds the first one's cache."""
    (tmp_path / "program.py").write_text(PROGRAM)
    labels, tokens = np.arange(30) % 4, np.random.default_rng(0).normal(size=(28, 32))
    np.savez(two_sets[0], random_images(30, seed=1), labels)
    np.savez(tmp_path / "tokens.npz", class_tokens=tokens, labels=labels[:28])
    of_tokens = ["--class-tokens", tmp_path / "tokens.npz", "--enc-type", f"local-dir:{encoder_folder}"]
    network = ["--inception-weights", tiny_weights, "--device", "cpu"]
    sets = ["--ref-batch", two_sets[0], "--sample-batch", two_sets[1], "--metrics", ",".join([*FIVE, "kid"])]

    def commands(n):
        where = tmp_path / str(n)
        return [[*sets, *network, "--batch-size", "3", "--output", where / "odd.json", "--cache", where / "cache"],
                [*sets, *network, "--batch-size", "64", "--output", where / "idle.json", "--cache", where / "no cache"],
                [*sets, *network, "--batch-size", "3", "--output", where / "again.json", "--cache", where / "cache", *of_tokens],
                ["stats", two_sets[0], where / "stats.npz", *network, "--batch-size", "4", "--keep", "5"]]

    for command in commands(1):
        run(*command)
    on_two_processes(tmp_path / "program.py", json.dumps([[str(part) for part in command] for command in commands(2)]))
    for name in ("odd", "idle", "again"):
        one, two = (json.loads((tmp_path / str(n) / f"{name}.json").read_text()) for n in (1, 2))
        scores = [*FIVE, "kid", "kid_std", *(["class_token_cosine", "class_token_accuracy"] if name == "again" else [])]
        assert {key: one[key] for key in scores} == {key: two[key] for key in scores}
    with np.load(tmp_path / "1" / "stats.npz") as a, np.load(tmp_path / "2" / "stats.npz") as b:
        assert a.files == b.files and all(np.array_equal(a[key], b[key]) for key in a.files)


@pytest.mark.parametrize("mistake", ["image", "weights"])
def test_a_mistake_that_one_of_two_processes_meets_is_one_sentence(two_sets, encoder_folder, tmp_path, mistake):
    """A damaged image in the second one's block, or weights that the first one looks for."""
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(random_images(12)):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:02d}.png")
    (tmp_path / "folder" / "05.png").write_bytes((tmp_path / "folder" / "05.png").read_bytes()[:300])
    network, expected = {"image": (["--features", f"local-dir:{encoder_folder}"], "05.png is not a readable image"),
                         "weights": (["--inception-weights", tmp_path / "none.pth"], "none.pth not found")}[mistake]
    sets = ("--ref-batch", two_sets[0], "--sample-batch", tmp_path / "folder")
    said = on_two_processes("-m", "evaluations.evaluator", *sets, "--device", "cpu", "--batch-size", "4", *network, status=2)
    (sentence,) = said.splitlines()
    assert sentence.startswith("error: ") and expected in sentence
