"""evaluations/sample_folder.py: the life of a folder without a model, ended anywhere. test_generate.py ends the program itself."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations import sample_folder
from evaluations.sample_folder import SampleFolder

SETTINGS = {"checkpoint_sha256": "a", "weights": "ema", "vae": "v", "sampling": {"cfg_scale": 2.0, "classes": (1, 2)}, "num_images": 5,
            "per_proc_batch_size": 2, "device": "CPU"}
IMAGES = torch.arange(5 * 3 * 4 * 4, dtype=torch.uint8).reshape(5, 3, 4, 4)
TOKENS, LABELS = torch.arange(15.0).reshape(5, 3), np.arange(5)


@pytest.fixture
def folder(tmp_path):
    return SampleFolder(tmp_path / "samples", count=5, block_size=2, side=4, token_width=3, png=True)


def fill(folder, settings=SETTINGS) -> list[range]:
    """What generate.py does, of these images; returns the blocks that it made."""
    missing = sample_folder.blocks_to_make(folder, settings)
    if missing is not None:
        sample_folder.prepare(folder, len(missing) < len(folder.blocks), settings)
        for block in missing:
            sample_folder.write_block(folder, block, IMAGES[block.start:block.stop], TOKENS[block.start:block.stop])
        sample_folder.write_outputs(folder, LABELS)
    sample_folder.finish(folder, missing or [])
    return missing


def contents(folder) -> dict:
    return {str(path.relative_to(folder.path)): path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


def test_blocks_cut_the_indices(folder):
    assert folder.blocks == [range(2), range(2, 4), range(4, 5)]


def test_the_life_of_a_folder(folder):
    assert fill(folder) == folder.blocks and fill(folder) is None
    assert sorted(path.name for path in folder.path.iterdir()) == ["class_tokens.npz", "grid.png", "images", "samples.npz", "settings.json"]
    images, tokens = np.load(folder.samples), np.load(folder.class_tokens)
    assert (images["arr_0"] == IMAGES.permute(0, 2, 3, 1).numpy()).all() and (images["arr_1"] == LABELS).all()
    assert (tokens["class_tokens"] == TOKENS.numpy()).all() and (tokens["labels"] == LABELS).all()
    for index in range(5):
        assert (np.asarray(Image.open(folder.png_file(index))) == images["arr_0"][index]).all()


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.parametrize(("begun", "call"), [(False, call) for call in range(1, 19)] + [(True, call) for call in range(1, 22)])
def test_killed_before_any_change(folder, tmp_path, monkeypatch, call, begun):
    """5 PNGs and the grid are saved, 10 files renamed, 2 folders removed, and 3 more that an unfinished run of other settings left."""
    whole = SampleFolder(tmp_path / "undisturbed", 5, 2, 4, 3, True)
    fill(whole)
    if begun:
        sample_folder.prepare(folder, False, {**SETTINGS, "checkpoint_sha256": "b"})
        sample_folder.write_block(folder, range(2), 255 - IMAGES[:2], -TOKENS[:2])
    changes = []

    def counted(change):
        def until(*arguments, **options):
            assert not folder.samples.exists() or change is remove        # samples.npz is the last to be written
            changes.append(change)
            if len(changes) == call:
                raise Killed
            return change(*arguments, **options)
        return until

    remove = shutil.rmtree
    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (shutil, "rmtree"), (Image.Image, "save")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        with pytest.raises(Killed):
            fill(folder)
    for block in folder.blocks:
        if sample_folder.is_of(folder, SETTINGS) and folder.block_file("blocks", block).exists():
            assert all(sample_folder.is_whole_png(folder.png_file(index)) for index in block)
            assert folder.block_file("class_tokens", block).exists()
    fill(folder)
    assert contents(folder) == contents(whole)


def test_settings_that_decide(folder):
    fill(folder)
    assert json.loads(folder.settings.read_text())["device"] == "CPU"
    assert sample_folder.is_of(folder, {**SETTINGS, "device": "GPU"})
    for name in ("checkpoint_sha256", "weights", "vae", "num_images", "per_proc_batch_size"):
        assert not sample_folder.is_of(folder, {**SETTINGS, name: "other"})
    assert not sample_folder.is_of(folder, {**SETTINGS, "sampling": {"cfg_scale": 2.0, "classes": (1, 3)}})


def test_without_guidance_there_is_no_interval():
    def at(scale, high):
        return sample_folder.decisive({**SETTINGS, "sampling": {"cfg_scale": scale, "guidance_low": 0.0, "guidance_high": high}})

    assert at(1, 0.5) == at(1, 1.0) and at(2, 0.5) != at(2, 1.0)
