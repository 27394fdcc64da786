"""Class labels and captions: what image i shows follows from (seed, i), and captions are dropped as whole states."""

import math

import numpy as np
import pytest
import torch

from models.conditioning import Captions, ClassLabels, open_captions
from runtime.messages import UserError
from samplers import image_rng


def shown(conditions, count: int, seed: int = 0) -> list:
    return [conditions.draw(i, image_rng(seed, i)) for i in range(count)]


def test_random_labels_are_uniform():
    counts = np.bincount(shown(ClassLabels(10), 5000), minlength=10)
    assert abs(counts - 500).max() < 5 * math.sqrt(5000 * 0.1 * 0.9)


def test_labels_in_turn():
    assert shown(ClassLabels(3, "balanced"), 4) == [0, 1, 2, 0]
    assert shown(ClassLabels(300, classes=(207, 260)), 3) == [207, 260, 207]
    assert shown(ClassLabels(9, "balanced", seen=(2, 5)), 3) == [2, 5, 2]
    assert set(shown(ClassLabels(9, seen=(2, 5)), 64)) == {2, 5}


def test_labels_become_a_batch_and_null_is_the_class_behind_the_last():
    labels = ClassLabels(7)
    assert labels.embed([3, 0]).tolist() == [3, 0] and labels.null(2).tolist() == [7, 7]
    batch = torch.tensor([1, 2])
    assert torch.equal(labels.drop(labels.embed(batch), 1.0), batch)          # the network drops labels


PROMPTS = ["a disc", "a square\na red square\none square", "a cross"]


def test_captions_in_order_and_at_random():
    in_order = shown(Captions(PROMPTS, None, None, "in-order"), 300)
    assert in_order[0] == "a disc" and in_order[2] == "a cross" and in_order[3] == "a disc"
    assert set(in_order[1::3]) == set(PROMPTS[1].split("\n"))                 # one of the image's captions
    assert shown(Captions(PROMPTS, None, None, "in-order", per_prompt=2), 2) == ["a disc", "a disc"]
    counts = np.unique(shown(Captions(PROMPTS, None, None), 3000), return_counts=True)[1]
    assert len(counts) == 5 and abs(counts[[0, 1]] - 1000).max() < 5 * math.sqrt(3000 * 2 / 9)


def test_what_an_image_shows_does_not_change_its_noise():
    """The generator is at the same place behind any caption of any list, in any order."""
    after = set()
    for prompts, order in ((PROMPTS, "random"), (PROMPTS, "in-order"), (["x"], "random"), ([*"abcdefgh"], "in-order")):
        rng = image_rng(0, 1)
        Captions(prompts, None, None, order).draw(1, rng)
        after.add(rng.bytes(8))
    assert len(after) == 1


@pytest.fixture(scope="module")
def captions(tiny_clip):
    return open_captions(PROMPTS, str(tiny_clip), None, torch.device("cpu"), None)


def test_states_are_those_of_one_caption_drawn_from_the_runs_randomness(captions):
    every = captions.encoder.states(PROMPTS[1].split("\n"))                   # (3, L, W)
    torch.manual_seed(0)
    drawn = torch.cat([captions.embed([PROMPTS[1]]) for _ in range(40)])      # (40, L, W)
    which = [[torch.allclose(one, state, atol=1e-5) for state in every].index(True) for one in drawn]
    assert set(which) == {0, 1, 2}
    torch.manual_seed(0)
    assert torch.equal(torch.cat([captions.embed([PROMPTS[1]]) for _ in range(40)]), drawn)


def test_a_dropped_caption_has_the_states_of_the_empty_one(captions):
    states = captions.embed(["a disc"] * 400)                                 # (400, L, W)
    torch.manual_seed(0)
    dropped = captions.drop(states, 0.1)
    null = captions.encoder.states([""])[0]                                   # (L, W)
    gone = torch.tensor([torch.equal(one, null) for one in dropped])
    assert abs(gone.sum() - 40) < 5 * math.sqrt(400 * 0.1 * 0.9)
    assert torch.equal(dropped[~gone], states[~gone])
    assert torch.equal(captions.null(2), null.expand(2, -1, -1))


def test_another_text_encoder_than_the_recorded_one_is_refused(captions, tmp_path, tiny_clip):
    cpu, recorded = torch.device("cpu"), captions.record()["text"]
    again = open_captions(PROMPTS, str(tiny_clip), None, cpu, recorded, tmp_path)
    assert torch.equal(again.null_states, captions.null_states)
    with pytest.raises(UserError, match="width 32"):
        open_captions(PROMPTS, str(tiny_clip), None, cpu, {**recorded, "width": 64}, tmp_path)
    with pytest.raises(UserError, match="other weights"):
        open_captions(PROMPTS, str(tiny_clip), None, cpu, {**recorded, "sha256": "0"}, tmp_path)


def test_a_recorded_encoder_is_opened_by_its_name_and_with_its_length(captions, tiny_clip):
    short = open_captions(PROMPTS, str(tiny_clip), 9, torch.device("cpu"), None)
    again = open_captions(PROMPTS, None, None, torch.device("cpu"), short.record()["text"])
    assert again.encoder.name == str(tiny_clip) and again.embed(["a disc"]).shape == (1, 9, 32)
    assert torch.equal(again.null(1)[0], short.null_states)
