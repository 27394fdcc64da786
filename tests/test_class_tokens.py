"""Scores of generated class tokens: against the encoder's of the same images, and against the classes of the reference."""

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
from tests.conftest import SIDE, random_images

COUNT = 24
CPU = torch.device("cpu")


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


def scored(tokens, labels, ref, images, extractor, batch_size=5, cache=None):
    return class_token_scores(tokens, torch.as_tensor(labels), ref, open_images(images), extractor, batch_size, cache)


def tokens_of(name, images):
    (encoder,) = load_encoders(name, "cpu", SIDE)
    return encoder(torch.from_numpy(images).permute(0, 3, 1, 2))[0]


# --- the numbers -----------------------------------------------------------------------------------------------------------------


def test_the_encoders_own_tokens_have_cosine_1(name, extractor):
    images, labels = coloured(COUNT)
    tokens = tokens_of(name, images)
    assert tokens.shape == (COUNT, 32)
    scores = scored(tokens, labels, labelled(images, labels), images, extractor)
    assert scores["class_token_cosine"] == pytest.approx(1, abs=1e-6)
    assert (scores["class_token_classes"], scores["class_token_encoder"]) == (4, name)
    opposite = scored(-3 * tokens, labels, labelled(images, labels), images, extractor)
    assert opposite["class_token_cosine"] == pytest.approx(-1, abs=1e-6)


def test_cosine_is_the_mean_over_the_images(name, extractor):
    images, labels = coloured(COUNT)
    tokens = torch.randn(COUNT, 32, generator=torch.Generator().manual_seed(0))
    seen = tokens_of(name, images)
    expected = np.mean([float(a @ b / (a.norm() * b.norm())) for a, b in zip(tokens, seen, strict=True)])
    scores = scored(tokens, labels, labelled(images, labels), images, extractor, 7)
    assert scores["class_token_cosine"] == pytest.approx(expected, abs=1e-6)


def test_accuracy_is_1_for_classes_apart_and_chance_for_shuffled_labels(name, extractor):
    known, known_labels = coloured(COUNT, seed=1)
    images, labels = coloured(COUNT)
    tokens, ref = tokens_of(name, images), labelled(known, known_labels)
    assert scored(tokens, labels, ref, images, extractor)["class_token_accuracy"] == 1
    assert scored(tokens, (labels + 1) % 4, ref, images, extractor)["class_token_accuracy"] == 0
    shuffled = torch.from_numpy(labels).repeat(10)[torch.randperm(240, generator=torch.Generator().manual_seed(0))]
    accuracy, _ = nearest_mean_accuracy(tokens.repeat(10, 1), shuffled, tokens_of(name, known), torch.from_numpy(known_labels))
    assert 0.15 < accuracy < 0.35


def test_nearest_mean_by_hand():
    """Class 7's mean is (1, 0), class 3's (5, 0); class 5 has none."""
    known, known_labels = torch.tensor([[-1.0, 0], [3, 0], [5, 0]]), torch.tensor([7, 7, 3])
    tokens, labels = torch.tensor([[2.9, 0], [3.1, 0], [3.2, 0], [1, 9], [1, 0]]), torch.tensor([7, 3, 3, 3, 5])
    assert nearest_mean_accuracy(tokens, labels, known, known_labels) == (3 / 4, 2)


def test_a_reference_without_labels_gives_no_accuracy(name, extractor, capsys, tmp_path):
    images, labels = coloured(COUNT)
    scores = scored(tokens_of(name, images), labels, open_images(images, "REF"), images, extractor)
    assert "class_token_cosine" in scores and "class_token_accuracy" not in scores
    assert "without class_token_accuracy: REF has no labels (arr_1 in an npz, dataset.json in a folder)" in capsys.readouterr().err
    np.savez(tmp_path / "mu.npz", mu=np.zeros(3), sigma=np.eye(3), arr_1=np.arange(4))
    assert "class_token_accuracy" not in scored(tokens_of(name, images), labels, open_images(tmp_path / "mu.npz"), images, extractor)


def test_labels_that_the_reference_lacks_give_no_accuracy(name, extractor):
    images, labels = coloured(COUNT)
    json.dumps(scored(tokens_of(name, images), labels + 10, labelled(images, labels), images, extractor), allow_nan=False)


def test_another_normalisation_of_the_same_encoder_is_measured_anew(encoder_folder, tmp_path):
    images, labels = coloured(COUNT)
    np.savez(tmp_path / "ref.npz", images, labels)
    folder, calls = shutil.copytree(encoder_folder, tmp_path / "encoder"), []
    for mean in ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]):
        config = json.loads((folder / "config.json").read_text())
        config["pretrained_cfg"]["mean"] = mean
        (folder / "config.json").write_text(json.dumps(config))
        extractor = load_class_token_extractor(f"local-dir:{folder}", CPU, SIDE, None, 32)
        extractor.network.register_forward_hook(lambda network, args, output: calls.append(len(output)))
        scored(torch.ones(COUNT, 32), labels, open_images(tmp_path / "ref.npz"), images, extractor, 100, tmp_path / "cache")
    assert sum(calls) == 4 * COUNT


def test_the_references_tokens_are_kept(name, extractor, tmp_path):
    images, labels = coloured(COUNT)
    np.savez(tmp_path / "ref.npz", images, labels)
    calls = []
    extractor.network.register_forward_hook(lambda network, args, output: calls.append(len(output)))
    for _ in range(2):
        scored(tokens_of(name, images), labels, open_images(tmp_path / "ref.npz"), images, extractor, 100, tmp_path / "cache")
    assert sum(calls) == 3 * COUNT                                                # sample, reference, sample


def test_an_encoder_of_another_width_is_refused(name):
    with pytest.raises(UserError, match="the class tokens have 8 numbers and local-dir:.*'s 32: name the encoder of the training"):
        load_class_token_extractor(name, CPU, SIDE, None, 8)


def test_weights_are_part_of_the_encoders_identity(name, extractor, encoder_folder, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({key: value + 1 for key, value in load_file(encoder_folder / "model.safetensors").items()}, path)
    other = load_class_token_extractor(name, CPU, SIDE, str(path), 32)
    assert other.weights_sha256 != extractor.weights_sha256 == load_class_token_extractor(name, CPU, SIDE, None, 32).weights_sha256
    with pytest.raises(UserError, match="siglip2-vit-b has no class token"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluations.class_tokens.load_encoders", lambda *_, **__: load_encoders("siglip2-vit-b", "meta", pretrained=False))
        load_class_token_extractor("siglip2-vit-b", CPU, 256, None, 768)


# --- the file --------------------------------------------------------------------------------------------------------------------


def test_tokens_are_read_as_generate_writes_them(tmp_path):
    tokens, labels = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32), np.arange(5, dtype=np.int32)
    np.savez(tmp_path / "class_tokens.npz", class_tokens=tokens, labels=labels)
    read, read_labels = read_class_tokens(tmp_path / "class_tokens.npz", 5)
    assert np.array_equal(read, tokens) and np.array_equal(read_labels, labels)
    assert read.dtype == torch.float32 and read_labels.dtype == torch.int64
    with pytest.raises(UserError, match=r"holds class tokens \(5, 8\) and labels \(5,\) for 6 images: name the file of the same run"):
        read_class_tokens(tmp_path / "class_tokens.npz", 6)


@pytest.mark.parametrize("arrays, sentence", [
    (dict(labels=np.zeros(5)), "not readable as class tokens"),
    (dict(class_tokens=np.zeros((5, 8))), "not readable as class tokens"),
    (dict(class_tokens=np.zeros((5, 8)), labels=np.zeros(4)), r"labels \(4,\) for 5 images"),
    (dict(class_tokens=np.zeros(5), labels=np.zeros(5)), r"holds class tokens \(5,\)"),
    (None, "not readable as class tokens"),
    ("text", "not readable as class tokens"),
])
def test_what_is_no_file_of_class_tokens_is_refused(tmp_path, arrays, sentence):
    path = tmp_path / "tokens.npz"
    if isinstance(arrays, str):
        path.write_text(arrays)
    elif arrays is not None:
        np.savez(path, **arrays)
    with pytest.raises(UserError, match=sentence) as error:
        read_class_tokens(path, 5)
    assert "\n" not in str(error.value) and "tokens.npz" in str(error.value)


# --- the program -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(name, tmp_path):
    """A sample folder as generate.py leaves it, whose class tokens are the encoder's own, and a labelled reference."""
    images, labels = coloured(COUNT)
    np.savez(tmp_path / "samples.npz", images, labels)
    np.savez(tmp_path / "class_tokens.npz", class_tokens=tokens_of(name, images).numpy(), labels=labels)
    (tmp_path / "settings.json").write_text(json.dumps({"training": {"enc_type": name, "encoder_weights": None}}))
    np.savez(tmp_path / "ref.npz", *coloured(COUNT, seed=1))
    return tmp_path


@pytest.fixture
def score(made, tiny_inception, tiny_weights):
    def score(*arguments):
        flags = ("--ref-batch", made / "ref.npz", "--sample-batch", made / "samples.npz", "--inception-weights", tiny_weights,
                 "--device", "cpu", "--metrics", "fid", "--class-tokens", made / "class_tokens.npz", "--output", made / "metrics.json")
        main([str(argument) for argument in (*flags, *arguments)])
        return json.loads((made / "metrics.json").read_text())

    return score


def test_program_scores_class_tokens_with_the_encoder_of_the_training(score, name, capsys, extractor):
    result = score()
    assert capsys.readouterr().out.splitlines()[:-1] == [f"FID: {result['fid']}", "Class token cosine: 1.0000",
                                                         "Class token accuracy: 1.0000"]
    assert result["class_token_cosine"] == pytest.approx(1, abs=1e-6)
    assert (result["class_token_accuracy"], result["class_token_classes"]) == (1, 4)
    assert (result["class_token_encoder"], result["class_token_encoder_sha256"]) == (name, extractor.weights_sha256)


def test_program_takes_the_encoder_and_weights_that_are_named(score, made, name, encoder_folder, extractor):
    other, generator = made / "other.safetensors", torch.Generator().manual_seed(1)
    state = load_file(encoder_folder / "model.safetensors")
    save_file({key: torch.randn(value.shape, generator=generator) for key, value in state.items()}, other)
    settings = {"training": {"enc_type": f"{name},dinov2-vit-b", "encoder_weights": f"{other},b.pth"}}    # the first is the class token's
    (made / "settings.json").write_text(json.dumps(settings))
    recorded = score()
    named = score("--encoder-weights", encoder_folder / "model.safetensors")
    assert recorded["class_token_cosine"] < 0.9 < 0.999 < named["class_token_cosine"]
    shutil.copytree(encoder_folder, made / "copy")
    own = score("--enc-type", f"local-dir:{made / 'copy'}")                       # whose weights are not the recorded ones
    assert own["class_token_cosine"] > 0.999 and own["class_token_encoder"] == f"local-dir:{made / 'copy'}"
    (made / "settings.json").unlink()
    assert score("--enc-type", name)["class_token_encoder_sha256"] == extractor.weights_sha256


@pytest.mark.parametrize("settings", [None, {}, {"training": None}, {"training": {"enc_type": None}}])
def test_an_encoder_that_nobody_names_is_asked_for(score, made, capsys, settings):
    (made / "settings.json").unlink()
    if settings is not None:
        (made / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit) as end:
        score()
    assert end.value.code == 2 and "names the encoder of the training: name it with --enc-type" in capsys.readouterr().err


def test_class_tokens_need_images_and_their_number(score, made, capsys):
    np.savez(made / "alone.npz", mu=np.zeros(6), sigma=np.eye(6))
    np.savez(made / "short.npz", random_images(5, SIDE, SIDE))
    for sample, sentence in (("alone.npz", "alone.npz holds no images to compare with"), ("short.npz", "for 5 images")):
        with pytest.raises(SystemExit):
            score("--sample-batch", made / sample)
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("--enc-type", "dino"), ("--encoder-weights", "nowhere.pth"), ("--class-tokens", "{made}/narrow.npz")])
def test_a_mistaken_encoder_is_said_before_anything_is_scored(score, made, monkeypatch, flags):
    np.savez(made / "narrow.npz", class_tokens=np.zeros((COUNT, 8)), labels=np.zeros(COUNT, int))
    calls = []
    monkeypatch.setattr("evaluations.evaluator.evaluate", lambda *_: calls.append(1) or {})
    with pytest.raises(SystemExit):
        score(flags[0], flags[1].format(made=made))
    assert not calls
