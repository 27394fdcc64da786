"""`evaluate`: which scores come out of two sets of images, from where, under what names, and what is said or refused."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from evaluations import scoring
from evaluations.features import load_extractor
from evaluations.images import FileStatistics, ImageSet, open_images
from evaluations.metrics import (
    frechet_distance,
    gaussian_statistics,
    inception_score,
    kernel_distance,
    precision_recall,
)
from evaluations.scoring import ADM_METRICS, INCEPTION_METRICS, evaluate
from runtime.messages import UserError
from tests.conftest import random_images
from tests.test_features import write_timm_folder

ROOT = Path(__file__).parents[1]
SCORES = {*INCEPTION_METRICS, "kid_std"}


def scores(result):
    return {name: value for name, value in result.items() if name in SCORES}


def colour_statistics(images):
    return gaussian_statistics(images.astype(np.float64).mean(axis=(1, 2)))


# --- where images come from ------------------------------------------------------------------------------------------------------


def test_evaluate_equals_the_closed_form_from_npz_folder_and_memory(tmp_path, colours):
    a, b = random_images(9, seed=1), random_images(12, 8, 8, seed=2)
    np.savez(tmp_path / "a.npz", a)
    (tmp_path / "a").mkdir()
    for i, image in enumerate(a):
        Image.fromarray(image).save(tmp_path / "a" / f"{i}.png")
    expected = frechet_distance(*colour_statistics(a), *colour_statistics(b))
    assert expected > 1
    made = ImageSet("made", 9, (16, 16), lambda ranges: (a[r.start:r.stop] for r in ranges))
    for sample in (tmp_path / "a.npz", str(tmp_path / "a"), a, made):
        result = evaluate(b, sample, colours, batch_size=5)
        assert result["fd_colours"] == pytest.approx(expected, rel=1e-5)
        assert (result["num_samples"], result["num_reference"]) == (9, 12)
        assert (result["image_size"], result["reference_image_size"]) == ([16, 16], [8, 8])


def test_what_cannot_be_opened_is_refused_by_its_role(colours):
    with pytest.raises(UserError, match="the reference batch holds 1 images"):
        evaluate(random_images(1), random_images(4), colours)
    with pytest.raises(UserError, match="the sample batch is float64"):
        evaluate(random_images(4), random_images(4) / 255, colours)
    with pytest.raises(UserError, match="--batch-size is 0"):
        evaluate(random_images(4), random_images(4), colours, batch_size=0)


# --- Inception's scores ----------------------------------------------------------------------------------------------------------


def tiny_features(network, images):
    rows = network.body(F.adaptive_avg_pool2d(torch.from_numpy(images).permute(0, 3, 1, 2) / 16, 4).flatten(1)).detach()
    return rows[:, :6], rows[:, 6:]


@pytest.mark.parametrize("mode", ["adm", "exact"])
def test_adms_five_scores_and_kid_are_those_of_the_features(tiny_inception, mode):
    ref, sample = random_images(40, seed=1), np.concatenate([random_images(30, seed=2), random_images(1, seed=3) // 2])
    result = evaluate(ref, sample, tiny_inception, INCEPTION_METRICS, mode, batch_size=7)
    network = tiny_inception.network
    (b, b_spatial), (a, a_spatial) = (tiny_features(network, images) for images in (ref, sample))
    precision, recall = precision_recall(b, a, mode)
    assert 0 < precision < 1 and 0 < recall < 1 and precision != recall
    kid, kid_std = kernel_distance(b, a)
    expected = {"inception_score": inception_score(a @ network.fc.weight.detach().T),
                "fid": frechet_distance(*gaussian_statistics(a), *gaussian_statistics(b)),
                "sfid": frechet_distance(*gaussian_statistics(a_spatial), *gaussian_statistics(b_spatial)),
                "precision": precision, "recall": recall, "kid": kid, "kid_std": kid_std}
    assert scores(result) == pytest.approx(expected, rel=1e-4)
    assert result["modes"] == {"inception_score": "slices of 5000 in file order", "precision_recall": mode,
                               "kid": "100 subsets of 31, seed 0"}
    assert (result["features"], result["weights_verified"], result["device"]) == ("inception", True, "cpu")
    assert result["weights_sha256"] == tiny_inception.weights_sha256
    assert result["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_adms_five_are_the_default(tiny_inception):
    result = evaluate(random_images(9), random_images(9, seed=1), tiny_inception)
    assert scores(result).keys() == set(ADM_METRICS) and result["modes"]["precision_recall"] == "adm"


@pytest.mark.parametrize("metric", INCEPTION_METRICS)
def test_one_metric_alone_is_the_same_number(tiny_inception, metric):
    ref, sample = random_images(12), random_images(11, seed=1)
    alone = scores(evaluate(ref, sample, tiny_inception, [metric]))
    assert alone.keys() == {metric, *(["kid_std"] if metric == "kid" else [])}
    together = evaluate(ref, sample, tiny_inception, INCEPTION_METRICS)
    assert all(together[name] == value for name, value in alone.items())


def test_inception_score_takes_all_1008_columns_and_no_bias(inception):
    """With a classifier that is certain, and whose classes are the last ones."""
    images = random_images(4, 24, 24)
    pooled = inception(torch.from_numpy(images).permute(0, 3, 1, 2))[0]           # (4, 2048)
    wanted = torch.zeros(4, 1008)
    wanted[torch.arange(4), 1004 + torch.arange(4)] = 30
    classifier = torch.nn.Linear(2048, 1008)
    assert classifier.weight.shape == inception.network.fc.weight.shape
    classifier.weight.data = (torch.linalg.pinv(pooled) @ wanted).T
    classifier.bias.data[1004] = 60
    inception = replace(inception, network=copy.deepcopy(inception.network))
    inception.network.fc = classifier.requires_grad_(False)
    assert evaluate(images[:2], images, inception, ["inception_score"])["inception_score"] == pytest.approx(4, rel=1e-2)


def test_distances_are_of_inceptions_features(inception, monkeypatch, capsys):
    """2048 wide and 2023 wide: the algebra at this width takes seconds and is tested elsewhere."""
    rows, taken = [], []
    hook = inception.network.register_forward_hook(lambda network, images, output: rows.append([x.double().numpy() for x in output]))
    monkeypatch.setattr(scoring, "frechet_distance", lambda *statistics: taken.append(statistics) or 1.0)
    result = evaluate(random_images(2, 24, 24, seed=1), random_images(3, 24, 24, seed=2), inception, ["fid", "sfid"], batch_size=2)
    hook.remove()
    assert "3 samples and 2 reference images are fewer than inception's 2048 features + 1" in capsys.readouterr().err
    assert (result["fid"], result["sfid"], result["weights_verified"]) == (1.0, 1.0, False)
    assert [len(pooled) for pooled, _ in rows] == [2, 2, 1]                       # the reference first
    for index, statistics in enumerate(taken):
        ref, sample = rows[0][index], np.concatenate([rows[1][index], rows[2][index]])
        for mean, covariance, expected in ((*statistics[:2], sample), (*statistics[2:], ref)):
            assert mean.shape == ((2048,), (2023,))[index]
            np.testing.assert_allclose(mean, expected.mean(axis=0), rtol=1e-12)
            np.testing.assert_allclose(covariance, np.cov(expected, rowvar=False), rtol=1e-9, atol=1e-12)


# --- statistics in the files -----------------------------------------------------------------------------------------------------


def gaussian(mean, deviation, width):
    return np.full(width, mean, np.float32), deviation**2 * np.eye(width)


def adm_file(path, mean, deviation, images=None, spatial=True):
    """Statistics that no image has, and perhaps images."""
    arrays = dict(zip(("mu", "sigma"), gaussian(mean, deviation, 6), strict=True))
    arrays |= dict(zip(("mu_s", "sigma_s"), gaussian(mean + 1, deviation, 4), strict=True)) if spatial else {}
    np.savez(path, **arrays, **({} if images is None else {"arr_0": images}))
    return path


def test_a_references_statistics_are_used_and_its_images_for_precision_and_recall(tiny_inception, tmp_path):
    images, sample = random_images(12), random_images(11, seed=1)
    ref = adm_file(tmp_path / "ref.npz", 5, 2, images)
    result, plain = evaluate(ref, sample, tiny_inception), evaluate(images, sample, tiny_inception)
    pooled, spatial = (gaussian_statistics(rows) for rows in tiny_features(tiny_inception.network, sample))
    assert result["fid"] == pytest.approx(frechet_distance(*pooled, *gaussian(5, 2, 6)), rel=1e-4)
    assert result["sfid"] == pytest.approx(frechet_distance(*spatial, *gaussian(6, 2, 4)), rel=1e-4)
    assert all(result[name] == plain[name] for name in ("inception_score", "precision", "recall")) and result["fid"] != plain["fid"]
    assert result["reference_statistics_from_file"] and not result["sample_statistics_from_file"]
    assert not plain["reference_statistics_from_file"] and result["num_reference"] == 12


def test_a_samples_statistics_are_used_too_as_adm_does(tiny_inception, tmp_path):
    ref, images = adm_file(tmp_path / "ref.npz", 5, 2, random_images(12)), random_images(11, seed=1)
    result = evaluate(ref, adm_file(tmp_path / "sample.npz", 4, 3, images), tiny_inception)
    assert result["fid"] == pytest.approx(6 * (1 + 1), rel=1e-9) and result["sfid"] == pytest.approx(4 * (1 + 1), rel=1e-9)
    assert result["sample_statistics_from_file"] and result["inception_score"] == evaluate(ref, images, tiny_inception)["inception_score"]


def test_a_reference_of_statistics_alone_leaves_precision_and_recall_out(tiny_inception, tmp_path, capsys):
    ref = adm_file(tmp_path / "ref.npz", 5, 2)
    result = evaluate(ref, random_images(11), tiny_inception)
    assert scores(result).keys() == {"inception_score", "fid", "sfid"} and "precision_recall" not in result["modes"]
    assert (result["num_reference"], result["reference_image_size"]) == (None, None)
    assert f"without precision, recall: {ref} holds statistics and no images (arr_0)\n" == capsys.readouterr().err.replace("\r", "")
    for metrics in (["fid", "recall"], ["kid"]):
        with pytest.raises(UserError, match=f"{metrics[-1]} cannot be had: .*ref.npz holds statistics and no images"):
            evaluate(ref, random_images(11), tiny_inception, metrics)


def test_a_sample_of_statistics_alone_has_two_scores(tiny_inception, tmp_path, capsys):
    sample = adm_file(tmp_path / "sample.npz", 4, 3)
    result = evaluate(random_images(11), sample, tiny_inception)
    assert scores(result).keys() == {"fid", "sfid"} and (result["num_samples"], result["image_size"]) == (None, None)
    assert "without inception_score, precision, recall: " in capsys.readouterr().err
    with pytest.raises(UserError, match="inception_score cannot be had"):
        evaluate(random_images(11), sample, tiny_inception, ["inception_score"])


@pytest.mark.parametrize("which", ["ref", "sample"])
def test_statistics_without_the_spatial_ones_give_no_sfid(tiny_inception, tmp_path, capsys, which):
    """A file as pytorch-fid writes it."""
    paths = [adm_file(tmp_path / f"{name}.npz", 5, 2, random_images(11), spatial=name != which) for name in ("ref", "sample")]
    result = evaluate(*paths, tiny_inception)
    assert scores(result).keys() == {*ADM_METRICS} - {"sfid"} and result["fid"] == pytest.approx(0, abs=1e-9)
    assert f"without sfid: {tmp_path / which}.npz has mu and sigma but no mu_s and sigma_s" in capsys.readouterr().err
    with pytest.raises(UserError, match="sfid cannot be had"):
        evaluate(*paths, tiny_inception, ["sfid"])


def test_inceptions_statistics_are_nothing_to_other_features(colours, tmp_path):
    held, images = random_images(5), random_images(4, seed=1)
    ref, alone = adm_file(tmp_path / "ref.npz", 5, 2, held), adm_file(tmp_path / "alone.npz", 5, 2)
    result = evaluate(ref, images, colours)
    assert result["fd_colours"] == pytest.approx(frechet_distance(*colour_statistics(images), *colour_statistics(held)), rel=1e-5)
    assert not result["reference_statistics_from_file"]
    with pytest.raises(UserError, match="fd cannot be had: .*alone.npz holds statistics of other features and no images"):
        evaluate(alone, images, colours)


def test_what_stats_wrote_of_the_reference_goes_into_the_result(tiny_inception, tmp_path):
    about = {"features": "inception", "weights_sha256": tiny_inception.weights_sha256, "images": 1000}
    np.savez(tmp_path / "ref.npz", random_images(5), mu=np.zeros(6), sigma=np.eye(6), about=np.array(json.dumps(about)))
    assert evaluate(tmp_path / "ref.npz", random_images(5), tiny_inception, ["fid"])["reference_about"] == about
    assert "reference_about" not in evaluate(adm_file(tmp_path / "adm.npz", 5, 2), random_images(5), tiny_inception, ["fid"])


# --- choosing --------------------------------------------------------------------------------------------------------------------


def test_unknown_metrics_are_refused(tiny_inception, colours):
    with pytest.raises(UserError, match="names 'fd': in the features of 'inception' there are inception_score, fid, sfid, precision"):
        evaluate(random_images(4), random_images(4), tiny_inception, ["fid", "fd"])
    with pytest.raises(UserError, match="names 'fid': in the features of 'colours' there are fd, kid"):
        evaluate(random_images(4), random_images(4), colours, ["fid"])


@pytest.mark.parametrize("few, role", [((3, 9), "reference"), ((9, 3), "sample")])
def test_three_images_have_no_third_neighbour(tiny_inception, capsys, few, role):
    ref, sample = (random_images(count, seed=count) for count in few)
    result = evaluate(ref, sample, tiny_inception)
    assert scores(result).keys() == {"inception_score", "fid", "sfid"}
    assert f"without precision, recall: the {role} batch holds 3 images, and 3 neighbours need at least 4" in capsys.readouterr().err
    with pytest.raises(UserError, match="precision cannot be had: .* holds 3 images"):
        evaluate(ref, sample, tiny_inception, ["precision"])


def test_too_few_images_for_a_full_covariance_are_said_once(colours, capsys):
    evaluate(random_images(4), random_images(4), colours)
    assert not capsys.readouterr().err
    evaluate(random_images(3), random_images(2), colours)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "2 samples and 3 reference images are fewer than colours's 3 features + 1" in said


def labelled(labels):
    images = np.zeros((len(labels), 2, 2, 3), np.uint8)
    return ImageSet("samples", len(labels), (2, 2), open_images(images).blocks, labels=np.array(labels))


def test_samples_sorted_by_class_are_warned_of(tiny_inception, monkeypatch, capsys):
    monkeypatch.setattr(scoring, "SPLIT", 6)
    metrics, ref = ["inception_score"], random_images(4)
    evaluate(ref, labelled([0, 0, 1, 1, 2, 2, 3, 3]), tiny_inception, metrics)
    assert "samples is sorted by class, so that slices of 6 see few classes" in capsys.readouterr().err
    for labels in ([0, 1, 2, 3, 0, 1, 2, 3], [5] * 8, [0, 0, 1, 1, 2, 2]):        # mixed; one class alone; a single slice
        evaluate(ref, labelled(labels), tiny_inception, metrics)
    evaluate(labelled([0, 0, 1, 1, 2, 2, 3, 3]), random_images(8), tiny_inception, metrics)          # the reference's order is nothing
    evaluate(ref, labelled([0, 0, 1, 1, 2, 2, 3, 3]), tiny_inception, ["recall"])                   # nor anything to other scores
    assert "sorted" not in capsys.readouterr().err


def test_other_features_never_say_fid(tmp_path):
    write_timm_folder(tmp_path / "inception", 5)                                  # the name alone makes it no Inception
    extractor = load_extractor(f"local-dir:{tmp_path / 'inception'}")
    result = evaluate(random_images(30), random_images(28, seed=1), extractor, ["fd", "kid"])
    assert result["fd_inception"] > 0 and {"kid_inception", "kid_inception_std"} < result.keys()
    assert not [key for key in result if "fid" in key.lower() or key in ("kid", "kid_std")]


def test_the_reference_is_kept_and_the_sample_is_not(colours, tmp_path):
    calls = []
    colours.network.register_forward_hook(lambda network, args, output: calls.append(len(output)))
    np.savez(tmp_path / "ref.npz", random_images(5))
    np.savez(tmp_path / "sample.npz", random_images(7, seed=1))
    results = [evaluate(tmp_path / "ref.npz", tmp_path / "sample.npz", colours, cache=tmp_path / "cache") for _ in range(2)]
    assert results[0] == results[1] and calls == [5, 7, 7]


def test_inception_score_is_of_all_images(tiny_inception):
    """More than one piece of logits and not a whole number of them; the pieces only bound what one thread does."""
    images = random_images(600, 8, 8)
    pooled = torch.cat([tiny_inception(torch.from_numpy(part).permute(0, 3, 1, 2))[0] for part in np.array_split(images, 10)])
    expected = inception_score(pooled @ tiny_inception.network.fc.weight.T)
    assert evaluate(images[:5], images, tiny_inception, ["inception_score"])["inception_score"] == pytest.approx(expected, rel=1e-6)


ON_BOTH = """
import json, sys
import numpy as np, torch
from evaluations.features import load_extractor
from evaluations.scoring import evaluate
if not torch.cuda.is_available():
    sys.exit(0)
images = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
metrics = ["inception_score", "sfid", "kid", "precision", "recall"]
networks = [load_extractor("inception", device, sys.argv[1]) for device in ("cpu", "cuda")]
print(json.dumps([evaluate(images[:20], images[20:], network, metrics) for network in networks]))
"""


def test_a_gpu_gives_the_cpus_scores(weights_file, tmp_path):
    """Features differ by the order of float32 sums, 1e-5; a distance by twice that, and one image of twenty may change sides."""
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if os.environ["VISIBLE_BEFORE"] != "all":
        environment["CUDA_VISIBLE_DEVICES"] = os.environ["VISIBLE_BEFORE"]
    done = subprocess.run([sys.executable, "-c", ON_BOTH, str(weights_file)], cwd=ROOT, env=environment, check=True, capture_output=True,
                          text=True)
    if not done.stdout:
        pytest.skip("no GPU")
    cpu, gpu = json.loads(done.stdout.splitlines()[-1])
    assert gpu["device"] != cpu["device"] == "cpu"
    for name in ("inception_score", "sfid", "kid"):
        assert gpu[name] == pytest.approx(cpu[name], rel=1e-4, abs=1e-6), name
    for name in ("precision", "recall"):
        assert abs(gpu[name] - cpu[name]) <= 1 / 20 + 1e-9, name


def test_sets_of_two_sizes_and_statistics_of_other_features_are_said(colours, tmp_path, capsys):
    np.savez(tmp_path / "ref.npz", random_images(9, 16, 16), mu=np.zeros(2048), sigma=np.eye(2048))
    evaluate(tmp_path / "ref.npz", random_images(9, 8, 8), colours)
    said = capsys.readouterr().err
    assert "the samples are (8, 8) and the reference (16, 16)" in said
    assert "are of other features than colours's: its 9 images are used" in said
    evaluate(random_images(9, 8, 8), random_images(9, 8, 8), colours)
    assert not capsys.readouterr().err


def test_the_images_behind_a_files_statistics_are_counted_when_it_says_so(tiny_inception, capsys):
    def statistics(**about):
        return FileStatistics(np.zeros(6), np.eye(6), np.zeros(4), np.eye(4), {"distance": "fid", **about})

    images = open_images(random_images(9))
    for about, said in (({}, False), ({"images": 6}, True), ({"images": 7}, False)):
        evaluate(replace(images, statistics=statistics(**about)), images, tiny_inception, ["fid"])
        assert ("6 reference images are fewer than" in capsys.readouterr().err) == said
