"""The toy with words: captions and their inverse, held-out combinations, the measurement on pixels, the tiny CLIP."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations.features import TimmFeatures
from models.text import TextEncoder
from models.vae import load_codec
from toy import agreement, draw
from toy.agreement import FEATURES, look
from toy.words import HELD_OUT, KINDS, PHRASINGS, UNSEEN, WORDS, Scene, describe, draw_scene, parse, write_caption

CLIP, FRESH_SEED = FEATURES.parent / "clip", 41               # no network was trained on this seed


@pytest.fixture(scope="module")
def fresh():
    """192 fresh scenes and their images, uint8 (192, 3, 32, 32); a quarter is of held-out combinations."""
    drawn = [draw.draw_captioned(FRESH_SEED, index, held_out=index % 4 == 0) for index in range(192)]
    images = torch.from_numpy(np.stack([drawing.image for drawing, _ in drawn])).permute(0, 3, 1, 2)
    return [scene for _, scene in drawn], images


@pytest.mark.parametrize("phrasing", PHRASINGS + UNSEEN)
def test_captions_and_parse_are_inverse(phrasing):
    rng = np.random.default_rng(0)
    for index in range(64):
        scene = draw_scene(rng, index)
        part = Scene(*(value if rng.uniform() < 0.7 else None for value in scene))
        for named in (scene, part, Scene()):
            caption = describe(named, phrasing, rng)
            assert parse(caption) == named, caption
            assert re.fullmatch(r"[a-z]+(,? [a-z]+)*", caption), caption


def test_captions_leave_attributes_out_and_differ():
    scene, rng = Scene("small", "red", "disc", "top", "dark"), np.random.default_rng(0)
    captions = [write_caption(scene, PHRASINGS, rng) for _ in range(200)]
    assert len(set(captions)) > 60
    named = np.array([[value is not None for value in parse(caption)] for caption in captions]).mean(axis=0)
    assert ((named > 0.6) & (named < 0.98)).all()


def test_held_out_phrasings_are_new_but_their_words_are_not():
    def words(phrasings):
        return {word for phrasing in phrasings for word in re.findall(r"\w+", phrasing)}
    assert words(UNSEEN) <= words(PHRASINGS) and not set(UNSEEN) & set(PHRASINGS)
    scene, rng = Scene("small", "red", "disc", "top", "dark"), np.random.default_rng(0)
    trained = {describe(scene, phrasing, rng) for phrasing in PHRASINGS for _ in range(100)}
    assert not any(describe(scene, phrasing, rng) in trained for phrasing in UNSEEN for _ in range(100))


def test_held_out_combinations_are_never_trained_on_and_every_value_is():
    rng = np.random.default_rng(0)
    trained, held = ([draw_scene(rng, index, held_out) for index in range(2000)] for held_out in (False, True))
    assert not any(scene.shows(other) for scene in trained for other in HELD_OUT)
    assert all(any(scene.shows(other) for other in HELD_OUT) for scene in held)
    for name, values in WORDS.items():
        assert {getattr(scene, name) for scene in trained} == set(values)


def test_measured_attributes_of_drawings_and_reconstructions_are_those_of_the_scene(fresh):
    scenes, images = fresh
    network, codec = TimmFeatures.load(FEATURES).eval(), load_codec(str(FEATURES.parent / "vae"))
    assert look(network, images) == scenes
    noise = torch.randn(192, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    decoded = codec.decode(codec.space.latents(codec.encode(images), noise))
    pairs = list(zip(look(network, decoded), scenes, strict=True))
    assert np.mean([seen[0] == scene[0] and seen[3:] == scene[3:] for seen, scene in pairs]) >= 0.98
    assert np.mean([seen[1:3] == scene[1:3] for seen, scene in pairs]) >= 0.95


def test_agreement_of_drawn_pictures_is_high_and_of_shuffled_captions_low(fresh, tmp_path, capsys):
    scenes, images = fresh
    rng = np.random.default_rng(0)
    captions = [write_caption(scene, PHRASINGS, rng) for scene in scenes]
    files = []
    for folder, lines in (("right", captions), ("wrong", [captions[i] for i in rng.permutation(len(captions))])):
        (tmp_path / folder).mkdir()
        np.savez(tmp_path / folder / "samples.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
        (tmp_path / folder / "captions.jsonl").write_text(
            "".join(json.dumps({"index": i, "caption": line}) + "\n" for i, line in enumerate(lines)))
        files.append(str(tmp_path / folder / "samples.npz"))
    agreement.main(files)
    parts = re.split(r"^.*samples\.npz$", capsys.readouterr().out, flags=re.MULTILINE)[1:]      # in the order given
    right, wrong = ({line[0].strip(): [float(n) for n in line[1:]] for line in re.findall(
        r"(.+?) +([\d.]+) % of (\d+) prompts .*chance: ([\d.]+) %", part)} for part in parts)
    assert set(right) == {"colour and shape", "size and place", "size", "place", "background"}
    for name, (share, count, chance) in right.items():
        assert share == 100 and 90 < count < 192
        assert abs(wrong[name][0] - chance) < 15


@pytest.mark.parametrize("lines", ["", "{}\n", '{"index": 0, "caption": "a disc"}\n', "torn"])
def test_agreement_refuses_other_captions(tmp_path, capsys, lines):
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    (tmp_path / "captions.jsonl").write_text(lines)
    with pytest.raises(SystemExit):
        agreement.main([str(tmp_path / "samples.npz")])
    assert "captions" in capsys.readouterr().err


def test_a_folder_with_captions_and_prompts_of_a_kind(tmp_path):
    draw.main(["--dest", str(tmp_path / "raw"), "--captions", "training", "--num-images", "20", "--seed", "7"])
    pictures = sorted((tmp_path / "raw").glob("*.png"))
    assert len(pictures) == 20 == len(list((tmp_path / "raw").glob("*.txt")))
    for index, path in enumerate(pictures):
        drawing, scene = draw.draw_captioned(7, index)
        assert np.array_equal(np.asarray(Image.open(path)), drawing.image)
        lines = path.with_suffix(".txt").read_text().splitlines()
        assert len(lines) == 5 and all(scene.shows(parse(line)) for line in lines)
    for kind, (_, held_out) in KINDS.items():
        draw.main(["--npz", str(tmp_path / f"{kind}.npz"), "--captions", kind, "--num-images", "16", "--seed", "8"])
        with np.load(tmp_path / f"{kind}.npz") as file:
            assert file.files == ["arr_0"] and file["arr_0"].shape == (16, 32, 32, 3)
        lines = (tmp_path / f"{kind}.txt").read_text().splitlines()
        scenes = [draw.draw_captioned(8, index, held_out=held_out)[1] for index in range(16)]
        assert all(scene.shows(parse(line)) for scene, line in zip(scenes, lines, strict=True))


def test_the_tiny_clip_encodes_text_and_ranks_captions(fresh):
    from transformers import CLIPModel, CLIPProcessor

    encoder = TextEncoder(str(CLIP))
    assert encoder.states(["a small red disc", ""]).shape == (2, encoder.length, encoder.width)
    rng = np.random.default_rng(0)
    longest = max((describe(draw_scene(rng, i), phrasing, rng) for phrasing in PHRASINGS + UNSEEN for i in range(99)),
                  key=lambda text: len(encoder.tokenizer(text).input_ids))
    ids = encoder.tokenizer(longest).input_ids
    assert len(ids) <= encoder.length and len(ids) == len(re.findall(r"[a-z]+|,", longest)) + 2   # a token per word
    assert sum(path.stat().st_size for path in CLIP.iterdir()) <= 1.5e6

    scenes, images = fresh
    clip, processor = CLIPModel.from_pretrained(CLIP).float().eval(), CLIPProcessor.from_pretrained(CLIP)
    for name, values in WORDS.items():
        right = 0                                             # of 96 scenes of combinations that it was trained on
        for scene, image in [pair for i, pair in enumerate(zip(scenes, images, strict=True)) if i % 4 and i % 3]:
            others = [scene._replace(**{name: value}) for value in values]
            texts = [describe(other, PHRASINGS[0], np.random.default_rng(0)) for other in others]
            with torch.inference_mode():
                scores = clip(**processor(text=texts, images=image, return_tensors="pt", padding="max_length"))
            right += others[scores.logits_per_image.argmax()] == scene
        assert right >= 0.9 * 96, name
