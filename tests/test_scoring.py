"""`evaluate`: which scores two sets of images have, from where, under what names, and what is refused."""

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

from evaluations.images import FileStatistics, ImageSet, open_images
from evaluations.metrics import (
    SPLIT,
    frechet_distance,
    gaussian_statistics,
    inception_score,
    kernel_distance,
    monge_distance,
    precision_recall,
)
from evaluations.scoring import ADM_METRICS, evaluate, measure_reference
from runtime.messages import UserError
from tests import scoring_networks
from tests.conftest import random_images

small = scoring_networks.small  # fixture
ROOT = Path(__file__).parents[1]
INCEPTION_METRICS = (*ADM_METRICS, "kid", "mind")
SCORES = {*INCEPTION_METRICS, "kid_std"}


def scores(result):
    return {name: value for name, value in result.items() if name in SCORES}


def colour_statistics(images):
    return gaussian_statistics(images.astype(np.float64).mean(axis=(1, 2)))


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
        assert not [key for key in result if "fid" in key.lower()]


# ---- Inception's scores ----------------------------------------------------------------------------------------------

def small_features(network, images):
    mean = F.adaptive_avg_pool2d(torch.from_numpy(images).permute(0, 3, 1, 2) / 16, 4)
    rows = network.body(mean.flatten(1)).detach()
    return rows[:, :6], rows[:, 6:]


@pytest.mark.parametrize("mode", ["adm", "exact"])
def test_adms_five_scores_and_kid_are_those_of_the_features(small, mode):
    ref = random_images(40, seed=1)
    sample = np.concatenate([random_images(30, seed=2), random_images(1, seed=3) // 2])
    result = evaluate(ref, sample, small, INCEPTION_METRICS, mode, batch_size=7)
    (b, b_spatial), (a, a_spatial) = (small_features(small.network, images) for images in (ref, sample))
    precision, recall = precision_recall(b, a, mode)
    assert 0 < precision < 1 and 0 < recall < 1 and precision != recall
    kid, kid_std = kernel_distance(b, a)
    expected = {"inception_score": inception_score(a @ small.classifier.T),
                "fid": frechet_distance(*gaussian_statistics(a), *gaussian_statistics(b)),
                "sfid": frechet_distance(*gaussian_statistics(a_spatial), *gaussian_statistics(b_spatial)),
                "precision": precision, "recall": recall, "kid": kid, "kid_std": kid_std, "mind": monge_distance(b, a)}
    assert scores(result) == pytest.approx(expected, rel=1e-4)
    assert result["modes"] == {"inception_score": "slices of 5000 in file order", "precision_recall": mode,
                               "kid": "100 subsets of 31, seed 0", "mind": "1000 directions, 31 rows, seed 2020"}
    assert (result["features"], result["weights_verified"], result["device"]) == ("inception", True, "cpu")
    assert result["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_adms_five_are_the_default_and_one_alone_is_the_same_number(small):
    ref, sample = random_images(12), random_images(11, seed=1)
    together = scores(evaluate(ref, sample, small, INCEPTION_METRICS))
    assert scores(evaluate(ref, sample, small)).keys() == {*ADM_METRICS}
    for metric in INCEPTION_METRICS:
        alone = scores(evaluate(ref, sample, small, [metric]))
        assert alone.keys() == {metric, *(["kid_std"] if metric == "kid" else [])}
        assert alone.items() <= together.items()


def test_inception_score_is_of_all_images(small):
    """More than one piece of logits and not a whole number of pieces."""
    images = random_images(600, 8, 8)
    pooled = torch.cat([small(torch.from_numpy(part).permute(0, 3, 1, 2))[0] for part in np.array_split(images, 10)])
    expected = inception_score(pooled @ small.classifier.T)
    found = evaluate(images[:5], images, small, ["inception_score"])["inception_score"]
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_reference_that_is_scored_repeatedly_is_measured_once(colours):
    """As the training does it."""
    calls, ref = [], open_images(random_images(5))
    colours.network.register_forward_hook(lambda network, args, output: calls.append(len(output)))
    measured = measure_reference(ref, colours, ["fd"])
    for seed in (1, 2):
        sample = random_images(7, seed=seed)
        once = evaluate(ref, sample, colours, ["fd"], measured_ref=measured)
        assert once == evaluate(ref, sample, colours, ["fd"])
    assert calls == [5] + [7, 5, 7] * 2


# ---- statistics in the files -----------------------------------------------------------------------------------------

def gaussian(mean, deviation, width):
    return np.full(width, mean, np.float32), deviation**2 * np.eye(width)


def adm_file(path, mean, deviation, images=None, spatial=True):
    """Statistics that no image has, and perhaps images."""
    arrays = dict(zip(("mu", "sigma"), gaussian(mean, deviation, 6), strict=True))
    arrays |= dict(zip(("mu_s", "sigma_s"), gaussian(mean + 1, deviation, 4), strict=True)) if spatial else {}
    np.savez(path, **arrays, **({} if images is None else {"arr_0": images}))
    return path


def test_a_references_statistics_are_used_and_its_images_for_precision_and_recall(small, tmp_path):
    images, sample = random_images(12), random_images(11, seed=1)
    ref = adm_file(tmp_path / "ref.npz", 5, 2, images)
    result, plain = evaluate(ref, sample, small), evaluate(images, sample, small)
    pooled, spatial = (gaussian_statistics(rows) for rows in small_features(small.network, sample))
    assert result["fid"] == pytest.approx(frechet_distance(*pooled, *gaussian(5, 2, 6)), rel=1e-4)
    assert result["sfid"] == pytest.approx(frechet_distance(*spatial, *gaussian(6, 2, 4)), rel=1e-4)
    assert all(result[name] == plain[name] for name in ("inception_score", "precision", "recall"))
    assert result["fid"] != plain["fid"] and result["num_reference"] == 12 and "reference_about" not in result
    assert result["reference_statistics_from_file"] and not result["sample_statistics_from_file"]
    assert not plain["reference_statistics_from_file"]


def test_a_samples_statistics_are_used_too_as_adm_does(small, tmp_path):
    ref, images = adm_file(tmp_path / "ref.npz", 5, 2, random_images(12)), random_images(11, seed=1)
    result = evaluate(ref, adm_file(tmp_path / "sample.npz", 4, 3, images), small)
    assert result["fid"] == pytest.approx(6 * (1 + 1), rel=1e-9)
    assert result["sfid"] == pytest.approx(4 * (1 + 1), rel=1e-9)
    assert result["sample_statistics_from_file"]
    assert result["inception_score"] == evaluate(ref, images, small)["inception_score"]


def statistics_alone(path):
    return adm_file(path, 5, 2)


def without_spatial(path):
    """As pytorch-fid writes it."""
    return adm_file(path, 5, 2, random_images(11), spatial=False)


@pytest.mark.parametrize("ref, sample, missing, reason", [
    (statistics_alone, None, "precision, recall", "no images"),
    (None, statistics_alone, "inception_score, precision, recall", "no images"),
    (without_spatial, None, "sfid", "no mu_s"),
    (None, without_spatial, "sfid", "no mu_s"),
    (3, None, "precision, recall", "3 images"),
    (None, 3, "precision, recall", "3 images"),
])
def test_impossible_scores_are_left_out_by_default_and_refused_if_asked_for(
        small, tmp_path, capsys, ref, sample, missing, reason):
    ref, sample = (random_images(11 if given is None else given) if not callable(given) else given(tmp_path / "s.npz")
                   for given in (ref, sample))
    result = evaluate(ref, sample, small)
    assert scores(result).keys() == {*ADM_METRICS} - {*missing.split(", ")}
    assert f"without {missing}: " in (printed := capsys.readouterr().err) and reason in printed
    with pytest.raises(UserError, match=reason):
        evaluate(ref, sample, small, ["fid", missing.split(", ")[-1]])


def test_inceptions_statistics_are_not_used_for_other_features(colours, tmp_path, capsys):
    held, images = random_images(5), random_images(4, 8, 8, seed=1)
    ref, alone = adm_file(tmp_path / "ref.npz", 5, 2, held), adm_file(tmp_path / "alone.npz", 5, 2)
    result = evaluate(ref, images, colours)
    expected = frechet_distance(*colour_statistics(images), *colour_statistics(held))
    assert result["fd_colours"] == pytest.approx(expected, rel=1e-5) and not result["reference_statistics_from_file"]
    printed = capsys.readouterr().err
    assert "its 5 images are used" in printed and "(8, 8)" in printed             # warns of two sizes too
    with pytest.raises(UserError, match="alone.npz: holds no images and no statistics of colours"):
        evaluate(alone, images, colours)


# ---- several references ----------------------------------------------------------------------------------------------

def test_several_references_are_scored_in_one_reading_of_the_samples(small, tmp_path):
    """Each one's scores are those of the reference alone; the first one's are at the top too, as of one reference."""
    images = random_images(11, seed=1)
    read, sample = [], open_images(images)
    counted = replace(sample, blocks=lambda ranges: (read.append(r) or images[r.start:r.stop] for r in ranges))
    np.savez(tmp_path / "a.npz", random_images(12))
    refs = [tmp_path / "a.npz", adm_file(tmp_path / "b.npz", 5, 2, random_images(9)),
            adm_file(tmp_path / "c.npz", 4, 2)]
    metrics = [*ADM_METRICS, "kid", "mind"]
    result = evaluate(refs, counted, small, metrics, batch_size=4)
    assert read == [range(4), range(4, 8), range(8, 11)]
    references = result.pop("references")
    assert result == evaluate(refs[0], sample, small, metrics, batch_size=4)
    assert [one["name"] for one in references] == list(map(str, refs))
    assert [one["num_reference"] for one in references] == [12, 9, None]
    for path, one in zip(refs[:2], references, strict=False):
        alone = scores(evaluate(path, sample, small, metrics, batch_size=4))
        assert scores(one) == {name: value for name, value in alone.items() if name != "inception_score"}
    assert scores(references[2]).keys() == {"fid", "sfid"}        # of statistics alone


def test_every_reference_is_warned_of(small, capsys):
    evaluate([random_images(9, 12, 12), random_images(9), random_images(9, 8, 8)], random_images(9), small, ["fid"])
    printed = capsys.readouterr().err
    assert "the reference (12, 12)" in printed and "the reference (8, 8)" in printed and printed.count("warning") == 2


def test_a_score_that_no_reference_allows_or_a_reference_that_allows_none_is_refused(small, tmp_path, capsys):
    sample, alone = random_images(11), adm_file(tmp_path / "alone.npz", 5, 2)
    other = without_spatial(tmp_path / "other.npz")
    assert "references" in evaluate([alone, other], sample, small, ["fid", "sfid", "precision"])
    printed = capsys.readouterr().err
    assert "without precision: " in printed and "without sfid: " in printed
    with pytest.raises(UserError, match="alone.npz: .* no images"):
        evaluate([alone, other], sample, small, ["precision"])    # nothing is left of the first one
    with pytest.raises(UserError, match="no images"):
        evaluate([alone, alone], sample, small, ["fid", "precision"])


@pytest.mark.parametrize("metrics", [["fid", "precision"], None])
def test_a_reference_that_allows_nothing_for_two_reasons_is_refused(small, tmp_path, metrics, capsys):
    """Statistics of another network without images: neither its distance nor feature rows. Wherever it stands."""
    other = adm_file(tmp_path / "other.npz", 5, 2)
    with np.load(other) as file:
        np.savez(other, **file, about=json.dumps({"distance": "fd_other"}))
    refs, sample = [other, random_images(9)], random_images(11)
    if metrics is None:                                           # the Inception Score is the samples' alone
        assert "references" in evaluate(refs, sample, small)
        assert "None images" not in capsys.readouterr().err
        return
    for order in (refs, refs[::-1]):
        with pytest.raises(UserError, match="other.npz: holds no images"):
            evaluate(order, sample, small, metrics)


# ---- refusals and warnings -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ref, sample, settings, word", [
    (random_images(1), random_images(4), {}, "the reference batch: holds 1 images"),
    (random_images(4), random_images(4) / 255, {}, "the sample batch: float64"),
    (random_images(4), random_images(4), {"metrics": ["fid"]}, "--metrics fid"),
    (random_images(4), random_images(4), {"metrics": ["fd", "is"]}, "--metrics is"),
])
def test_mistakes_are_refused_by_name(colours, ref, sample, settings, word):
    with pytest.raises(UserError, match=word):
        evaluate(ref, sample, colours, **settings)


def test_too_few_images_for_a_full_covariance_are_warned_of_once(colours, small, capsys):
    evaluate(random_images(4), random_images(4), colours)
    assert not capsys.readouterr().err
    evaluate(random_images(3), random_images(2), colours)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "2 samples and 3 reference images are fewer than" in printed
    images = open_images(random_images(9))
    for about, warned in (({}, False), ({"images": 6}, True), ({"images": 7}, False)):    # of the statistics' images
        own = FileStatistics(np.zeros(6), np.eye(6), np.zeros(4), np.eye(4), {"distance": "fid", **about})
        assert evaluate(replace(images, statistics=own), images, small, ["fid"]).get("reference_about") == own.about
        assert ("6 reference images are fewer than" in capsys.readouterr().err) == warned


def labelled(labels):
    images = np.zeros((len(labels), 2, 2, 3), np.uint8)
    return ImageSet("samples", len(labels), (2, 2), open_images(images).blocks, labels=labels)


def test_samples_sorted_by_class_are_warned_of(small, capsys):
    rows = np.arange(SPLIT + 2)
    ordered, mixed, short = labelled(rows // 2000), labelled(rows % 3), labelled(rows[:SPLIT] // 2000)
    for sample, metric, warned in ((ordered, "inception_score", True), (mixed, "inception_score", False),
                                   (short, "inception_score", False), (ordered, "fid", False)):
        evaluate(random_images(9), sample, small, [metric], batch_size=512)
        assert ("sorted by class" in capsys.readouterr().err) == warned


# ---- a GPU -----------------------------------------------------------------------------------------------------------

ON_BOTH = """
import json, sys
import numpy as np, torch
from evaluations.features import load_extractor
from evaluations.scoring import evaluate
images = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
metrics = ["inception_score", "sfid", "kid", "precision", "recall"]
networks = [load_extractor("inception", device, sys.argv[1]) for device in ("cpu", "cuda")]
print(json.dumps([evaluate(images[:20], images[20:], network, metrics) for network in networks]))
"""


@pytest.mark.skipif(not Path("/dev/nvidia0").exists() or os.environ.get("VISIBLE_BEFORE") == "", reason="no GPU")
def test_a_gpu_gives_the_cpus_scores(tmp_path):
    """Float32 sums differ by their order, 1e-5; a distance by twice that, and one image of twenty may change sides."""
    weights = tmp_path / "random.pth"
    torch.save(scoring_networks.random_inception_state(), weights)
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if os.environ["VISIBLE_BEFORE"] != "all":
        environment["CUDA_VISIBLE_DEVICES"] = os.environ["VISIBLE_BEFORE"]
    done = subprocess.run([sys.executable, "-c", ON_BOTH, str(weights)], cwd=ROOT, env=environment, check=True,
                          capture_output=True, text=True)
    cpu, gpu = json.loads(done.stdout.splitlines()[-1])
    assert gpu["device"] != cpu["device"] == "cpu"
    for name in ("inception_score", "sfid", "kid"):
        assert gpu[name] == pytest.approx(cpu[name], rel=1e-4, abs=1e-6), name
    for name in ("precision", "recall"):
        assert abs(gpu[name] - cpu[name]) <= 1 / 20 + 1e-9, name
