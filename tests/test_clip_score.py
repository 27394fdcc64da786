"""The CLIP score: equal to transformers' own forward, of the right captions, and what is refused before any scoring."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from evaluations import evaluator
from evaluations.clip import Clip, clip_score
from evaluations.images import open_images
from runtime.messages import UserError
from tests import forks
from tests.conftest import random_images
from tests.scoring_networks import CPU
from tests.test_features import write_timm_folder

COLOURS, SHAPES = ("red", "blue", "small red", "large blue", "dark"), ("disc", "square")
CAPTIONS = [f"a {colour} {shape} on a dark background" for colour in COLOURS for shape in SHAPES][:9]


def coloured_images():
    """uint8 (9, 40, 40, 3) of different colours, to be resized."""
    colours = np.random.default_rng(0).integers(0, 200, (len(CAPTIONS), 1, 1, 3))
    return (random_images(len(CAPTIONS), 40, 40) // 5 + colours).astype(np.uint8)


def cosines_of(folder, images, captions):
    """By transformers, one image and caption at a time and without any padding."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    found = []
    for image, caption in zip(images, captions, strict=True):
        inputs = processor(images=Image.fromarray(image), return_tensors="pt")
        with torch.no_grad():
            out = model(**inputs, **tokenizer(caption, return_tensors="pt"))
            found.append(float(out.logits_per_image / model.logit_scale.exp()))
    return np.array(found)


def score_of(folder, images, captions, batch_size=4):
    return clip_score(open_images(images), captions, Clip(str(folder)), CPU, batch_size)


def write_captions(path, captions):
    lines = [json.dumps({"index": i, "caption": caption}, ensure_ascii=False) for i, caption in enumerate(captions)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def sets(tmp_path):
    """`ref.npz`, the timm folder `tiny`, and `made` with samples.npz, captions.jsonl and the same as PNG in images/."""
    np.savez(tmp_path / "ref.npz", random_images(12, 40, 40, seed=1))
    write_timm_folder(tmp_path / "tiny", 5)
    (tmp_path / "made" / "images").mkdir(parents=True)
    np.savez(tmp_path / "made" / "samples.npz", coloured_images())
    for i, image in enumerate(coloured_images()):
        Image.fromarray(image).save(tmp_path / "made" / "images" / f"{i:06d}.png")
    write_captions(tmp_path / "made" / "captions.jsonl", CAPTIONS)
    return tmp_path


def flags(sets, *more):
    return [*map(str, ("--ref-batch", sets / "ref.npz", "--sample-batch", sets / "made" / "samples.npz", "--features",
                       f"local-dir:{sets / 'tiny'}", "--device", "cpu", "--batch-size", "4", "--output",
                       sets / "metrics.json", *more))]


def scored(sets, *more) -> dict:
    evaluator.main(flags(sets, *more))
    return json.loads((sets / "metrics.json").read_text())


# ---- the score -------------------------------------------------------------------------------------------------------

def test_the_score_is_the_mean_of_positive_cosines(tiny_clip, lax):
    """Also with TF32 and autocast on outside."""
    with torch.autocast("cpu", enabled=False):
        cosines = cosines_of(tiny_clip, coloured_images(), CAPTIONS)
    assert cosines.min() < -0.01 and cosines.max() > 0.01
    found = score_of(tiny_clip, coloured_images(), CAPTIONS)
    assert found["clip_score_tiny-clip"] == pytest.approx(100 * np.maximum(cosines, 0).mean(), abs=1e-5)


def test_the_order_of_captions_matters(tiny_clip):
    a, b = (score_of(tiny_clip, coloured_images(), captions)["clip_score_tiny-clip"]
            for captions in (CAPTIONS, CAPTIONS[1:] + CAPTIONS[:1]))
    assert abs(a - b) > 1e-3
    assert score_of(tiny_clip, coloured_images(), CAPTIONS, 100)["clip_score_tiny-clip"] == pytest.approx(a, abs=1e-5)


def test_long_captions_are_cut_and_this_is_printed_once(tiny_clip, capsys):
    long = [f"{caption}{' red' * 20}" for caption in CAPTIONS]
    found = score_of(tiny_clip, coloured_images(), long)
    assert capsys.readouterr().err.count("9 of 9 captions are cut to the 16 tokens") == 1
    cut = [f"a {caption.removeprefix('a ')}{' red' * 20}".split()[:14] for caption in CAPTIONS]    # 14 words and 2 ends
    assert found == score_of(tiny_clip, coloured_images(), [" ".join(words) for words in cut])
    assert "cut" not in capsys.readouterr().err


# ---- the evaluator ---------------------------------------------------------------------------------------------------

def test_the_evaluator_adds_the_score_to_the_default_metrics(tiny_clip, sets, capsys):
    result = scored(sets, "--clip", tiny_clip)
    score = result["clip_score_tiny-clip"]
    assert score == score_of(tiny_clip, coloured_images(), CAPTIONS)["clip_score_tiny-clip"] and "fd_tiny" in result
    assert f"CLIP score (tiny-clip): {score}" in capsys.readouterr().out.splitlines()
    assert result["asked"]["clip"] == str(tiny_clip) and len(result["clip_weights_sha256"]) == 64
    alone = scored(sets, "--clip", tiny_clip, "--metrics", "clip_score", "--sample-batch", sets / "made" / "images")
    assert alone["clip_score_tiny-clip"] == score and "fd_tiny" not in alone      # captions of a folder: above it
    assert "clip" not in scored(sets)["asked"]


def test_captions_are_read_from_a_named_file_or_in_the_folder(tiny_clip, sets):
    a = scored(sets, "--clip", tiny_clip)["clip_score_tiny-clip"]
    write_captions(sets / "other.jsonl", CAPTIONS[::-1])
    b = scored(sets, "--clip", tiny_clip, "--captions", sets / "other.jsonl")["clip_score_tiny-clip"]
    (sets / "other.jsonl").rename(sets / "made" / "images" / "captions.jsonl")
    c = scored(sets, "--clip", tiny_clip, "--sample-batch", sets / "made" / "images")["clip_score_tiny-clip"]
    assert a != b == c
    unusual = ["a red\u2028disc", "", *CAPTIONS[2:]]                              # a separator of lines to Python only
    write_captions(sets / "made" / "captions.jsonl", unusual)
    assert scored(sets, "--clip", tiny_clip)["clip_score_tiny-clip"] == (
        score_of(tiny_clip, coloured_images(), unusual)["clip_score_tiny-clip"])


def test_two_processes_write_the_same_file(tiny_clip, sets):
    """Three blocks of four samples, of which the last is one sample."""
    command = flags(sets, "--clip", tiny_clip)
    evaluator.main(command)
    one = (sets / "metrics.json").read_text()
    (sets / "metrics.json").unlink()
    forks.two_ranks(lambda rank: evaluator.main(command))
    assert (sets / "metrics.json").read_text() == one


# ---- refusals --------------------------------------------------------------------------------------------------------

def line(number, text):
    """A change of captions.jsonl: line `number` becomes `text`."""
    def change(sets):
        lines = (sets / "made" / "captions.jsonl").read_text().splitlines()
        lines[number - 1:number] = [text] if text is not None else []
        (sets / "made" / "captions.jsonl").write_text("\n".join(lines))

    return change


@pytest.mark.parametrize(("change", "more", "word"), [
    (lambda sets: (sets / "made" / "captions.jsonl").unlink(), (), "captions.jsonl: not found"),
    (lambda sets: None, ("--captions", "nowhere.jsonl"), "nowhere.jsonl: not found"),
    (line(9, None), (), "8 captions for 9 images"),
    (line(9, '{"index": 8, "caption": "a"}\n{"index": 9, "caption": "a"}'), (), "10 captions for 9 images"),
    (line(3, '{"index": 2, "caption"'), (), "line 3"),
    (line(3, '{"index": 2, "caption": ["a"]}'), (), "line 3"),
    (line(3, '{"index": 2}'), (), "line 3"),
    (line(3, "2"), (), "line 3"),
    (line(3, "[]"), (), "line 3"),
    (line(3, ""), (), "line 3"),
    (line(3, '{"index": 3, "caption": "a"}'), (), "line 3"),
    (lambda sets: np.savez(sets / "made" / "samples.npz", mu=np.zeros(24), sigma=np.eye(24)), (), "no images"),
    (lambda sets: None, ("--clip", "{sets}/made"), "made: cannot be loaded"),
    (lambda sets: None, ("--clip", "{sets}/tiny"), "tiny: is a"),
])
def test_captions_or_a_clip_that_do_not_fit_are_refused(tiny_clip, sets, capsys, change, more, word):
    change(sets)
    with pytest.raises(SystemExit) as ended:
        scored(sets, "--clip", tiny_clip, *(part.format(sets=sets) for part in more))
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and error.startswith("error: ") and word in error
    assert not (sets / "metrics.json").exists()


def test_captions_need_a_clip_and_the_score_has_a_default_one(sets, capsys):
    for more, word in ((("--captions", sets / "made" / "captions.jsonl"), "needs --clip"),
                       (("--metrics", "fd,clip_score"), "--clip openai/clip-vit-large-patch14: cannot be loaded"),
                       (("--metrics", "clip_score", "--dry-run"), "--clip openai/clip-vit-large-patch14")):
        with pytest.raises(SystemExit):
            scored(sets, *more)                                   # the tests' hub is empty and offline
        assert word in capsys.readouterr().err


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def without_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def another_kind(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config["text_config"], "model_type": "clip_text_model"}))


@pytest.mark.parametrize(("damage", "word"), [
    (without("config.json"), "config.json"),
    (without("model.safetensors"), "model.safetensors"),
    (without("preprocessor_config.json"), "image processor"),
    (without("vocab.json", "merges.txt", "tokenizer.json"), "tokenizer"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "header"),
    (without_a_weight, "visual_projection.weight"),
    (another_kind, "clip_text_model"),
])
def test_an_incomplete_or_damaged_clip_is_refused(tiny_clip, tmp_path, damage, word):
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    damage(folder)
    with pytest.raises(UserError, match=f"--clip .*{word}") as error:
        Clip(str(folder))
    assert "\n" not in str(error.value)
