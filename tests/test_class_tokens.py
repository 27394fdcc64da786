"""Scores of class tokens: against the encoder's of the same images, and against the classes of the reference."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluations.class_tokens import (
    class_token_scores,
    load_class_token_extractor,
    nearest_mean_accuracy,
    read_class_tokens,
)
from evaluations.evaluator import main
from evaluations.images import ImageSet, open_images
from models.encoders import load_encoders
from runtime.messages import UserError
from tests.conftest import SIDE
from tests.scoring_networks import CPU, channels_first

COUNT = 24


def coloured(count, seed=0):
    """Images of four classes that differ in brightness, and their labels."""
    labels = np.arange(count) % 4
    noise = np.random.default_rng(seed).integers(0, 16, (count, SIDE, SIDE, 3), dtype=np.uint8)
    return (noise + 60 * labels[:, None, None, None]).astype(np.uint8), labels


def labelled(images, labels, name="the reference"):
    return ImageSet(name, len(images), images.shape[1:3], open_images(images).blocks, labels=labels)


@pytest.fixture
def name(encoder_folder):
    return f"local-dir:{encoder_folder}"


@pytest.fixture
def extractor(name):
    return load_class_token_extractor(name, CPU, SIDE, None, 32)


def scored(tokens, labels, ref, images, extractor, batch_size=5):
    return class_token_scores(tokens, torch.as_tensor(labels), extractor, ref, open_images(images), batch_size)


def tokens_of(name, images):
    (encoder,) = load_encoders(name, "cpu", SIDE)
    return encoder(channels_first(images))[0]


# ---- the numbers -----------------------------------------------------------------------------------------------------

def test_cosine_is_the_mean_over_the_images_and_1_for_the_encoders_own_tokens(name, extractor):
    images, labels = coloured(COUNT)
    seen, ref = tokens_of(name, images), labelled(images, labels)
    scores = scored(seen, labels, ref, images, extractor)
    assert scores["class_token_cosine"] == pytest.approx(1, abs=1e-6)
    assert (scores["class_token_classes"], scores["class_token_encoder"]) == (4, name)
    opposite = scored(-3 * seen, labels, ref, images, extractor)
    assert opposite["class_token_cosine"] == pytest.approx(-1, abs=1e-6)
    tokens = torch.randn(COUNT, 32, generator=torch.Generator().manual_seed(0))
    expected = np.mean([float(a @ b / (a.norm() * b.norm())) for a, b in zip(tokens, seen, strict=True)])
    scores = scored(tokens, labels, ref, images, extractor, 7)
    assert scores["class_token_cosine"] == pytest.approx(expected, abs=1e-6)


def test_accuracy_is_1_for_classes_apart_and_chance_for_shuffled_labels(name, extractor):
    known, known_labels = coloured(COUNT, seed=1)
    images, labels = coloured(COUNT)
    tokens, ref = tokens_of(name, images), labelled(known, known_labels)
    assert scored(tokens, labels, ref, images, extractor)["class_token_accuracy"] == 1
    assert scored(tokens, (labels + 1) % 4, ref, images, extractor)["class_token_accuracy"] == 0
    shuffled = torch.from_numpy(labels).repeat(10)[torch.randperm(240, generator=torch.Generator().manual_seed(0))]
    accuracy, _ = nearest_mean_accuracy(tokens.repeat(10, 1), shuffled, tokens_of(name, known),
                                        torch.from_numpy(known_labels))
    assert 0.15 < accuracy < 0.35


def test_nearest_mean_by_hand():
    """Class 7's mean is (1, 0), class 3's (5, 0); class 5 has none."""
    known, known_labels = torch.tensor([[-1.0, 0], [3, 0], [5, 0]]), torch.tensor([7, 7, 3])
    tokens, labels = torch.tensor([[2.9, 0], [3.1, 0], [3.2, 0], [1, 9], [1, 0]]), torch.tensor([7, 3, 3, 3, 5])
    assert nearest_mean_accuracy(tokens, labels, known, known_labels) == (3 / 4, 2)


def test_a_reference_without_labels_or_without_these_classes_gives_no_accuracy(name, extractor, capsys, tmp_path):
    images, labels = coloured(COUNT)
    tokens = tokens_of(name, images)
    np.savez(tmp_path / "mu.npz", mu=np.zeros(3), sigma=np.eye(3), arr_1=np.arange(4))
    for ref, word in ((open_images(images, "REF"), "REF has no labels"),
                      (open_images(tmp_path / "mu.npz"), "no labels"),
                      (labelled(images, labels + 10), "no image of any class")):
        scores = scored(tokens, labels, ref, images, extractor)
        assert "class_token_cosine" in scores and "class_token_accuracy" not in scores
        assert "without class_token_accuracy" in (printed := capsys.readouterr().err) and word in printed
        json.dumps(scores, allow_nan=False)


def test_an_encoder_of_another_width_is_refused(name):
    with pytest.raises(UserError, match="--enc-type local-dir:.* width 32, .* 8"):
        load_class_token_extractor(name, CPU, SIDE, None, 8)


# ---- the file --------------------------------------------------------------------------------------------------------

def test_tokens_are_read_as_generate_writes_them(tmp_path):
    tokens, labels = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32), np.arange(5, dtype=np.int32)
    np.savez(tmp_path / "class_tokens.npz", class_tokens=tokens, labels=labels)
    read, read_labels = read_class_tokens(tmp_path / "class_tokens.npz", 5)
    assert np.array_equal(read, tokens) and np.array_equal(read_labels, labels)
    assert read.dtype == torch.float32 and read_labels.dtype == torch.int64
    np.savez(tmp_path / "of_captions.npz", class_tokens=tokens)
    assert read_class_tokens(tmp_path / "of_captions.npz", 5)[1].tolist() == 5 * [-1]     # of no class of a reference


@pytest.mark.parametrize("arrays, word", [
    (dict(labels=np.zeros(5)), "no class_tokens"),
    (dict(class_tokens=np.zeros((5, 8)), labels=np.zeros(4, int)), "for 5 images"),
    (dict(class_tokens=np.zeros((6, 8)), labels=np.zeros(6, int)), "for 5 images"),
    (dict(class_tokens=np.zeros(5), labels=np.zeros(5, int)), "for 5 images"),
    (dict(class_tokens=np.zeros((5, 8)), labels=np.full(5, np.nan)), "labels of float64"),
    (dict(class_tokens=np.zeros((5, 8), int), labels=np.zeros(5)), "int64"),
    (dict(class_tokens=np.full((5, 8), np.nan), labels=np.zeros(5)), "not finite"),
    (dict(class_tokens=np.zeros((5, 8)), labels=np.full(5, np.nan)), "not finite"),
    (dict(class_tokens=np.zeros((5, 8)), labels=np.full(5, np.inf)), "not finite"),
    (dict(class_tokens=np.array([None] * 5), labels=np.zeros(5)), "not a readable npz"),
    (None, "not a readable npz"),
    ("text", "not a readable npz"),
])
def test_another_file_is_refused(tmp_path, arrays, word):
    path = tmp_path / "tokens.npz"
    if isinstance(arrays, str):
        path.write_text(arrays)
    elif arrays is not None:
        np.savez(path, **arrays)
    with pytest.raises(UserError, match=f"tokens.npz: .*{word}") as error:
        read_class_tokens(path, 5)
    assert "\n" not in str(error.value)


# ---- the program -----------------------------------------------------------------------------------------------------

@pytest.fixture
def score(name, tmp_path):
    """Score a sample folder as generate.py leaves it, whose class tokens are the encoder's own."""
    images, labels = coloured(COUNT)
    np.savez(tmp_path / "samples.npz", images, labels)
    np.savez(tmp_path / "class_tokens.npz", class_tokens=tokens_of(name, images).numpy(), labels=labels)
    (tmp_path / "settings.json").write_text(json.dumps({"training": {"enc_type": name, "encoder_weights": None}}))
    np.savez(tmp_path / "ref.npz", *coloured(COUNT, seed=1))

    def score(*arguments):
        flags = ("--ref-batch", tmp_path / "ref.npz", "--sample-batch", tmp_path / "samples.npz", "--features", name,
                 "--device", "cpu", "--class-tokens", tmp_path / "class_tokens.npz",
                 "--output", tmp_path / "metrics.json")
        main([str(argument) for argument in (*flags, *arguments)])
        return json.loads((tmp_path / "metrics.json").read_text())

    return score


def test_the_program_scores_class_tokens_with_the_encoder_of_the_training(score, name, capsys, extractor):
    result = score()
    assert capsys.readouterr().out.splitlines()[:-1] == [
        "Class token cosine: 1.0000", "Class token accuracy: 1.0000",
        f"Frechet distance (encoder): {result['fd_encoder']}"]
    assert result["class_token_cosine"] == pytest.approx(1, abs=1e-6)
    assert (result["class_token_accuracy"], result["class_token_classes"]) == (1, 4)
    assert result["class_token_encoder"] == name
    assert result["class_token_encoder_sha256"] == extractor.weights_sha256


def test_encoder_and_weights_can_be_named(score, name, encoder_folder, extractor, tmp_path):
    other, generator = tmp_path / "other.safetensors", torch.Generator().manual_seed(1)
    state = load_file(encoder_folder / "model.safetensors")
    save_file({key: torch.randn(value.shape, generator=generator) for key, value in state.items()}, other)
    settings = {"training": {"enc_type": f"{name},dinov2-vit-b", "encoder_weights": f"{other},b.pth"}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))                 # the first is the class token's
    recorded = score()
    named = score("--encoder-weights", encoder_folder / "model.safetensors")
    assert recorded["class_token_cosine"] < 0.9 < 0.999 < named["class_token_cosine"]
    assert recorded["class_token_encoder_sha256"] != extractor.weights_sha256
    copy = shutil.copytree(encoder_folder, tmp_path / "copy")
    own = score("--enc-type", f"local-dir:{copy}")                                # without the recorded weights
    assert own["class_token_cosine"] > 0.999 and own["class_token_encoder"] == f"local-dir:{copy}"
    (tmp_path / "settings.json").unlink()
    assert score("--enc-type", name)["class_token_encoder_sha256"] == extractor.weights_sha256


@pytest.mark.parametrize("settings", [None, {"training": None}, {"training": {"enc_type": None}}])
def test_an_encoder_that_is_not_recorded_is_asked_for(score, tmp_path, capsys, settings):
    (tmp_path / "settings.json").unlink()
    if settings is not None:
        (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit) as end:
        score()
    assert end.value.code == 2 and "--enc-type" in capsys.readouterr().err


@pytest.mark.parametrize("flags, word", [
    (("--sample-batch", "alone.npz"), "no images"), (("--sample-batch", "short.npz"), "for 5 images"),
    (("--enc-type", "dino"), "dino"), (("--encoder-weights", "nowhere.pth"), "nowhere.pth"),
    (("--class-tokens", "narrow.npz"), "8 numbers"), (("--class-tokens", "none.npz"), "none.npz"),
])
def test_mistakes_are_refused(score, name, tmp_path, monkeypatch, capsys, flags, word):
    monkeypatch.chdir(tmp_path)
    np.savez("alone.npz", mu=np.zeros(32), sigma=np.eye(32))
    np.savez("short.npz", coloured(5)[0])
    np.savez("narrow.npz", class_tokens=np.zeros((COUNT, 8)), labels=np.zeros(COUNT, int))
    with pytest.raises(SystemExit) as end:
        score(*flags)
    assert end.value.code == 2 and word in capsys.readouterr().err
