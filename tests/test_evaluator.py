"""The evaluator as a program: score, stats, selftest, and two processes."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluations import acceptance
from evaluations.acceptance import PUBLISHED, Published, compare
from evaluations.evaluator import PRINTED, lines, main, write_reference
from evaluations.images import open_images
from evaluations.scoring import ADM_METRICS, evaluate
from preprocessing.crop import center_crop, to_rgb
from runtime.files import sha256
from runtime.messages import UserError
from tests import forks, scoring_networks
from tests.conftest import random_images
from tests.scoring_networks import channels_first
from tests.test_features import write_timm_folder

small, random_state, weights_file = (scoring_networks.small, scoring_networks.random_state,  # fixtures
                                     scoring_networks.weights_file)


def run(*arguments) -> None:
    main([str(argument) for argument in arguments])


def refused(capsys, *arguments) -> str:
    """The one sentence that ends the program with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and printed.splitlines()[-1].startswith("error: ")
    assert printed.count("error: ") == 1 and "Traceback" not in printed
    return printed.splitlines()[-1]


@pytest.fixture
def sets(tmp_path):
    """`ref.npz`, `made/sample.npz`, and the timm folder `tiny`."""
    np.savez(tmp_path / "ref.npz", random_images(30, seed=1))
    (tmp_path / "made").mkdir()
    np.savez(tmp_path / "made" / "sample.npz", random_images(28, seed=2))
    write_timm_folder(tmp_path / "tiny", 5)
    return tmp_path


@pytest.fixture
def score(sets):
    """Score the sets in features of `tiny`; further arguments override. Returns the content of metrics.json."""
    def score(*arguments):
        run("--ref-batch", sets / "ref.npz", "--sample-batch", sets / "made" / "sample.npz", "--device", "cpu",
            "--features", f"local-dir:{sets / 'tiny'}", "--output", sets / "new" / "metrics.json", *arguments)
        return json.loads((sets / "new" / "metrics.json").read_text())

    return score


# ---- score -----------------------------------------------------------------------------------------------------------

def test_adms_five_lines_in_adms_order_and_one_on_what_was_compared(small, tmp_path):
    ref, sample = random_images(30, seed=1), random_images(28, seed=2)
    result = evaluate(ref, sample, small, [*ADM_METRICS, "kid"])
    assert lines(result, small) == [
        f"Inception Score: {result['inception_score']}", f"FID: {result['fid']}", f"sFID: {result['sfid']}",
        f"Precision: {result['precision']:.4f}", f"Recall: {result['recall']:.4f}",
        f"KID: {result['kid']} +- {result['kid_std']}",
        "28 samples; 30 reference images; inception with sha256 0, the published file; inception score: slices of 5000 "
        "in file order; precision recall: adm; kid: 100 subsets of 28, seed 0"]
    np.savez(tmp_path / "mu.npz", mu=np.zeros(6), sigma=np.eye(6))
    (_, last) = lines(evaluate(tmp_path / "mu.npz", sample, small, ["fid"]), small)
    assert last.startswith("28 samples; no reference images and statistics from the file; ")


def test_inceptions_scores_and_regs_spellings(sets, weights_file, capsys):
    """Without the distances, whose algebra takes a minute at this width."""
    np.savez(sets / "few.npz", random_images(2))
    run("--ref_batch", sets / "few.npz", "--sample_batch", sets / "few.npz", "--save_path", sets / "made",
        "--inception-weights", weights_file, "--device", "cpu", "--metrics", " inception_score ")
    result = json.loads((sets / "made" / "metrics.json").read_text())             # an existing folder gets metrics.json
    assert "notes" not in result
    *printed, last = capsys.readouterr().out.splitlines()
    assert printed == [f"Inception Score: {result['inception_score']}"]
    assert result["weights_verified"] is False and "NOT the published file" in last and "settings" not in result


def test_notes_of_the_released_eval_script_go_into_the_json(score):
    notes = dict(cfg_cond="1", step="4000000", num_steps="250", cfg="2.3", cls_cfg="2.3", gh="0.85")
    assert score(*(part for name, value in notes.items() for part in (f"--{name}", value)))["notes"] == notes


def test_metrics_json_records_how_the_scores_were_made(score, sets, capsys):
    result = score("--metrics", "fd,kid")
    assert list(result) == ["fd_tiny", "kid_tiny", "kid_tiny_std", "num_samples", "num_reference",
                            "sample_statistics_from_file", "reference_statistics_from_file", "image_size",
                            "reference_image_size", "features", "weights_sha256", "weights_verified", "modes", "device",
                            "versions", "sample_batch", "ref_batch", "reference_sha256", "asked"]
    assert result["reference_sha256"] == sha256(sets / "ref.npz")
    assert (result["num_samples"], result["num_reference"], result["image_size"]) == (28, 30, [16, 16])
    assert result["ref_batch"] == str(sets / "ref.npz") and result["sample_batch"].endswith("sample.npz")
    assert (result["features"], result["weights_verified"], result["device"]) == ("tiny", None, "cpu")
    assert result["asked"] == {"features": f"local-dir:{sets / 'tiny'}", "metrics": "fd,kid", "precision_recall": "adm"}
    printed = capsys.readouterr().out
    assert printed.splitlines()[0] == f"Frechet distance (tiny): {result['fd_tiny']}" and "FID" not in printed
    assert printed.endswith(f"reference {sets / 'ref.npz'} with sha256 {sha256(sets / 'ref.npz')}\n")
    assert [path.name for path in (sets / "new").iterdir()] == ["metrics.json"]   # no temporary file is left


def test_settings_of_the_samples_go_into_the_result(score, sets, capsys):
    settings = {"cfg_scale": 2.3, "checkpoint_sha256": "abc"}
    (sets / "made" / "settings.json").write_text(json.dumps(settings))
    assert score()["settings"] == settings
    for i, image in enumerate(random_images(5)):
        Image.fromarray(image).save(sets / "made" / f"{i}.png")
    assert score("--sample-batch", sets / "made")["settings"] == settings         # of a folder: in it
    for text in ("{", "[]"):
        (sets / "made" / "settings.json").write_text(text)
        assert "settings.json" in refused(capsys, "--ref-batch", sets / "ref.npz", "--sample-batch",
                                          sets / "made" / "sample.npz")


def test_several_references_have_a_column_each_with_name_and_hash(score, sets, capsys):
    np.savez(sets / "jit.npz", random_images(26, seed=3))
    (sets / "folder").mkdir()
    for i, image in enumerate(random_images(25, seed=4)):
        Image.fromarray(image).save(sets / "folder" / f"{i}.png")
    refs = [sets / "ref.npz", sets / "jit.npz", sets / "folder"]
    alone = [score("--ref-batch", ref, "--metrics", "fd,mind") for ref in refs]
    capsys.readouterr()
    result = score("--ref-batch", ",".join(map(str, refs)), "--metrics", "fd,mind")
    head, distance, mind, last = capsys.readouterr().out.splitlines()
    hashes = [sha256(refs[0]), sha256(refs[1]), None]
    assert head.split() == [f"ref:{hashes[0][:8]}", f"jit:{hashes[1][:8]}", str(sets / "folder")]
    assert distance.split() == ["Frechet", "distance", "(tiny):", *(str(one["fd_tiny"]) for one in alone)]
    assert mind.split() == ["MIND", "(tiny):", *(str(one["mind_tiny"]) for one in alone)]
    assert all(f"{ref} with sha256" in last for ref in refs)
    assert result.pop("references") == [
        {"name": str(ref), "num_reference": one["num_reference"], "fd_tiny": one["fd_tiny"],
         "mind_tiny": one["mind_tiny"], "sha256": digest}
        for ref, one, digest in zip(refs, alone, hashes, strict=True)]
    assert result == alone[0]
    assert "comma" in refused(capsys, "--ref-batch", f"{refs[0]},", "--sample-batch", refs[1], "--device", "cpu")


def test_a_dry_run_checks_reference_and_network_only(sets, capsys):
    flags = ("--ref-batch", sets / "ref.npz", "--features", f"local-dir:{sets / 'tiny'}", "--device", "cpu")
    run(*flags, "--dry-run")
    assert capsys.readouterr().out == ""
    np.savez(sets / "mu.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    for change, word in ((("--ref-batch", "nowhere.npz"), "nowhere.npz"), (("--features", "local-dir:none"), "none"),
                         (("--metrics", "fid"), "--metrics fid"), (("--ref-batch", sets / "mu.npz"), "no images")):
        assert word in refused(capsys, *flags, *change, "--dry-run")
    assert "--sample-batch" in refused(capsys, *flags)


@pytest.mark.parametrize("flag, value, word", [
    ("--sample-batch", "none.npz", "not found"),
    ("--ref-batch", "none.npz", "not found"),
    ("--device", "gpu", "expected cpu, cuda"),
    ("--device", "cuda:7", "finds 0 GPUs"),
    ("--batch-size", "0", "at least 1"),
    ("--features", "dino", "expected inception"),
    ("--output", "{place}/ref.npz/below/metrics.json", "cannot be written"),
    ("--output", "{place}/ref.npz", "output and input"),
    ("--dinov2-weights", "file.pth", "--features local-dir:"),
    ("--inception-weights", "file.pth", "--features local-dir:"),
    ("--class-tokens", "file.npz", "--enc-type"),
    ("--metrics", ",", "--metrics"),
    ("--metrics", "fd,fid", "--metrics fid"),
    ("--enc-type", "dinov2-vit-b", "--class-tokens"),
    ("--encoder-weights", "file.pth", "--class-tokens"),
    ("--precision-recall", "exact", "--precision-recall"),
    ("--precision-recall", "of", "--precision-recall"),
])
def test_mistakes_end_the_program_with_one_sentence(sets, capsys, flag, value, word):
    arguments = {"--ref-batch": sets / "ref.npz", "--sample-batch": sets / "made" / "sample.npz",
                 "--features": f"local-dir:{sets / 'tiny'}", "--device": "cpu"} | {flag: value.format(place=sets)}
    assert word in refused(capsys, *(part for pair in arguments.items() for part in pair))


def test_a_missing_weights_file_of_inception_is_refused(sets, capsys):
    assert "none.pth" in refused(capsys, "--ref-batch", sets / "ref.npz", "--dry-run", "--device", "cpu",
                                 "--inception-weights", "none.pth")


# ---- stats -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    """Thirty labelled images as `convert` leaves them."""
    (tmp_path / "images" / "00000").mkdir(parents=True)
    labels = []
    for i, image in enumerate(random_images(30, seed=1)):
        labels.append([f"00000/img{i:08d}.png", i % 4])
        Image.fromarray(image).save(tmp_path / "images" / labels[-1][0])
    (tmp_path / "images" / "dataset.json").write_text(json.dumps({"labels": labels}))
    return tmp_path / "images"


def reference(folder, extractor, keep=30, seed=0, batch_size=64, **settings):
    path = folder.parent / f"{keep}-{seed}-{batch_size}.npz"
    images, about = open_images(folder), {"source": "images"}
    write_reference(path, images, extractor, batch_size, keep, seed, {**about, "images": images.count}, **settings)
    return path


def test_the_kept_features_score_as_the_kept_images_do(folder, small):
    """Also without the images: precision, recall, KID and MIND are of the kept rows, FID of all."""
    metrics, sample = [*ADM_METRICS, "kid", "mind"], random_images(28, seed=2)
    path = reference(folder, small, keep=9, batch_size=4)
    with np.load(path) as file:
        kept = file["arr_0"]
        np.testing.assert_allclose(file["pooled"], small(channels_first(kept))[0], rtol=1e-5)
        assert file["pooled"].shape == (9, 6) and file["pooled"].dtype == np.float32
    alone = reference(folder, small, keep=9, batch_size=5, with_images=False)
    with np.load(alone) as file:
        assert not {"arr_0", "arr_1"} & set(file.files)
    whole, of_kept = (evaluate(ref, sample, small, metrics, batch_size=4) for ref in (folder, kept))
    for ref in (path, alone):
        result = evaluate(ref, sample, small, metrics, batch_size=4)
        assert result["fid"] == pytest.approx(whole["fid"], rel=1e-4) and whole["fid"] != of_kept["fid"]
        assert result["num_reference"] == 9 and "; 9 reference images and statistics" in lines(result, small)[-1]
        assert [one["num_reference"] for one in evaluate([ref, kept], sample, small, ["mind"])["references"]] == [9, 9]
        for name in ("precision", "recall", "kid", "mind"):
            assert result[name] == pytest.approx(of_kept[name], rel=1e-4), name
        assert whole["mind"] != pytest.approx(of_kept["mind"], rel=1e-3)
    with pytest.raises(UserError, match="no images .* or feature rows"):
        evaluate(reference(folder, small, keep=0), sample, small, ["mind"])


def test_a_reference_of_own_images_scores_as_the_images_do(folder, small, capsys):
    path, sample = reference(folder, small), random_images(28, seed=2)
    assert capsys.readouterr().out == f"{path}: statistics of 30 images, 30 of them kept\n"
    with np.load(path) as file:
        assert set(file.files) == {"arr_0", "arr_1", "pooled", "mu", "sigma", "mu_s", "sigma_s", "about"}
        assert np.array_equal(file["arr_0"], random_images(30, seed=1))
        assert np.array_equal(file["arr_1"], np.arange(30) % 4)
        assert file["mu"].shape == (6,) and file["sigma_s"].shape == (4, 4) and file["sigma"].dtype == np.float64
    direct, through = (evaluate(ref, sample, small) for ref in (folder, path))
    assert all(direct[name] == through[name] for name in ADM_METRICS)
    assert through["reference_statistics_from_file"] and not direct["reference_statistics_from_file"]
    about = through["reference_about"]
    assert (about["source"], about["images"], about["kept"], about["seed"]) == ("images", 30, 30, 0)
    assert (about["features"], about["distance"], about["weights_sha256"]) == ("inception", "fid", "0")


def test_statistics_are_of_all_images_if_few_are_kept(folder, small):
    whole, few, again, other, none = (reference(folder, small, **changes) for changes in (
        {}, {"keep": 8}, {"keep": 8, "batch_size": 7}, {"keep": 8, "seed": 1}, {"keep": 0}))
    images, chosen = random_images(30, seed=1), []
    with np.load(whole) as a:
        for path in (few, again, other, none):
            with np.load(path) as b:
                for name in ("mu", "sigma", "mu_s", "sigma_s"):
                    # Products of 7 rows may sum their 48 float32 terms in another order than of 8: 48 * 2^-24 = 3e-6.
                    tolerance = 3e-6 * np.abs(a[name]).max() if path == again else 0
                    assert np.abs(a[name] - b[name]).max() <= tolerance
                if path == none:
                    assert "arr_0" not in b.files
                    continue
                rows = [int(np.flatnonzero((images == image).all(axis=(1, 2, 3))).item()) for image in b["arr_0"]]
                assert rows == sorted(set(rows)) and b["arr_1"].tolist() == [row % 4 for row in rows]
                chosen.append(rows)
    assert len(chosen[0]) == 8 and chosen[0] == chosen[1] != chosen[2] and chosen[0] != list(range(8))


def test_stats_crops_pictures_of_every_size_and_kind_as_adm_did(sets):
    (sets / "raw").mkdir()
    kinds = {"RGB": "png", "CMYK": "jpg", "P": "png", "RGBA": "png", "LA": "png", "I;16": "png"}
    for i, (mode, suffix) in enumerate(kinds.items()):
        picture = Image.fromarray(random_images(1, 20 + i, 31, seed=i)[0])
        wide = Image.fromarray(np.full((20, 20), 10_000 * i, np.uint16))
        (wide if mode == "I;16" else picture.convert(mode)).save(sets / "raw" / f"{i}.{suffix}")
    run("stats", sets / "raw", sets / "out.npz", "--adm-crop", 16, "--device", "cpu", "--features",
        f"local-dir:{sets / 'tiny'}")
    expected = [np.array(center_crop(to_rgb(Image.open(file), ""), 16)) for file in sorted((sets / "raw").iterdir())]
    with np.load(sets / "out.npz") as file:
        assert np.array_equal(file["arr_0"], expected) and "arr_1" not in file.files
        about = json.loads(str(file["about"]))
    assert (about["adm_crop"], about["distance"]) == (16, "fd_tiny")


def test_stats_measures_the_images_and_not_the_sources_statistics(score, sets):
    network = ("--features", f"local-dir:{sets / 'tiny'}", "--device", "cpu")
    np.savez(sets / "adm.npz", random_images(30, seed=1), mu=np.full(24, 7.0), sigma=np.eye(24))
    for source in ("ref", "adm"):
        run("stats", sets / f"{source}.npz", sets / f"{source}-stats.npz", *network)
    with np.load(sets / "ref-stats.npz") as a, np.load(sets / "adm-stats.npz") as b:
        assert set(a.files) == set(b.files) == {"arr_0", "pooled", "mu", "sigma", "about"}
        assert np.array_equal(a["arr_0"], b["arr_0"]) and np.array_equal(a["mu"], b["mu"])
    assert score()["fd_tiny"] == score("--ref-batch", sets / "ref-stats.npz")["fd_tiny"]


@pytest.mark.parametrize("arguments, word", [
    (("ref.npz", "out.npz", "--keep", "-1"), "--keep"),
    (("ref.npz", "out.npz", "--keep", "3"), "at least 4"),
    (("ref.npz", "out.npz", "--adm-crop", "0"), "--adm-crop"),
    (("ref.npz", "out.npz", "--seed", "-1"), "--seed"),
    (("ref.npz", "out.npy"), "out.npy"),
    (("ref.npz", "ref.npz"), "output and input"),
    (("none", "out.npz"), "none"),
    (("mu.npz", "out.npz"), "no images"),
    (("ref.npz", "out.npz", "--networks", "fdr7"), "--networks"),
    (("ref.npz", "out.npz", "--networks", "fdr6", "--features", "dinov2"), "--features inception"),
])
def test_mistakes_with_stats(sets, monkeypatch, capsys, arguments, word):
    monkeypatch.chdir(sets)
    np.savez("mu.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert word in refused(capsys, "stats", *arguments, "--device", "cpu")
    assert not Path("out.npz").exists()


# ---- selftest --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong", [None, *ADM_METRICS])
def test_selftest_compares_with_the_published_scores(sets, small, capsys, wrong):
    result = evaluate(sets / "ref.npz", sets / "made" / "sample.npz", small)
    scores = {name: result[name] for name in ADM_METRICS}
    if wrong is not None:
        scores[wrong] += 0.01 * abs(scores[wrong]) + 0.0021
    rows = (Published("ref.npz", "made/sample.npz", scores), Published("absent.npz", "neither.npz", {"fid": 1.0}))
    capsys.readouterr()
    if wrong is None:
        acceptance.check(sets, acceptance.present(sets, rows), small, 64, PRINTED)
    else:
        with pytest.raises(UserError, match="differ from the published"):
            acceptance.check(sets, acceptance.present(sets, rows), small, 64, PRINTED)
    first, second, *table = capsys.readouterr().out.splitlines()
    assert first == "made/sample.npz" and second.split() == ["published", "here"]
    assert [line.split("  ")[0] for line in table] == ["Inception Score", "FID", "sFID", "Precision", "Recall"]
    assert [line.split()[-1] for line in table] == ["DIFFERENT" if name == wrong else "equal" for name in ADM_METRICS]


def test_selftest_without_the_files_names_them(tmp_path, capsys):
    sentence = refused(capsys, "selftest", tmp_path)
    assert all(name in sentence for row in PUBLISHED for name in (row.ref, row.sample))


@pytest.mark.parametrize("row, others", list(zip(PUBLISHED, [
    {"inception_score": 215.9764, "fid": 3.941033, "sfid": 6.140490, "precision": 0.82548, "recall": 0.5285},
    {"inception_score": 141.4781, "fid": 2.973283, "sfid": 5.093504, "precision": 0.78042, "recall": 0.5906},
], strict=True)))
def test_tolerances_are_what_two_implementations_differ_by(row, others):
    """Another PyTorch program without float16 distances, on the same files: FID and IS agree, recall does not."""
    assert [close for *_, close in compare(row.scores, others)] == [True, True, True, True, False]


# ---- two processes ---------------------------------------------------------------------------------------------------

def test_two_processes_write_the_same_file(sets, encoder_folder):
    """Seven blocks of four samples, where the last one is processed alone; the reference's last block is half full."""
    labels, tokens = np.arange(30) % 4, np.random.default_rng(0).normal(size=(28, 32))
    np.savez(sets / "ref.npz", random_images(30, 32, 32, seed=1), labels)
    np.savez(sets / "sample.npz", random_images(28, 32, 32, seed=2))
    np.savez(sets / "tokens.npz", class_tokens=tokens, labels=labels[:28])
    flags = ["--ref-batch", f"{sets / 'ref.npz'},{sets / 'sample.npz'}", "--sample-batch", sets / "sample.npz",
             "--metrics", "fd,kid,mind", "--device", "cpu", "--features", f"local-dir:{sets / 'tiny'}",
             "--batch-size", "4",
             "--class-tokens", sets / "tokens.npz", "--enc-type", f"local-dir:{encoder_folder}"]
    run(*flags, "--output", sets / "1.json")
    forks.two_ranks(forks.run_main, main, [*flags, "--output", sets / "2.json"])
    one, two = ((sets / f"{n}.json").read_text() for n in (1, 2))
    assert one == two and json.loads(one)["fd_tiny"] > 0 and "class_token_accuracy" in json.loads(one)
