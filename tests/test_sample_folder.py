"""evaluations/sample_folder.py: the life of a folder without a model, ended anywhere. test_generate.py ends the program itself."""

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations import sample_folder
from evaluations.sample_folder import BlockWriter, SampleFolder
from runtime.messages import UserError

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
    for name in ("checkpoint_sha256", "weights", "vae", "vae_precision", "compiled", "num_images", "per_proc_batch_size"):
        assert not sample_folder.is_of(folder, {**SETTINGS, name: "other"})
    assert not sample_folder.is_of(folder, {**SETTINGS, "sampling": {"cfg_scale": 2.0, "classes": (1, 3)}})


def test_settings_from_before_there_was_a_choice():
    assert sample_folder.decisive(SETTINGS) == sample_folder.decisive({**SETTINGS, "vae_precision": "fp32", "compiled": False})


def test_without_guidance_there_is_no_interval():
    def at(scale, high):
        return sample_folder.decisive({**SETTINGS, "sampling": {"cfg_scale": scale, "guidance_low": 0.0, "guidance_high": high}})

    assert at(1, 0.5) == at(1, 1.0) and at(2, 0.5) != at(2, 1.0)


# ---- writing beside other work

def put_all(folder, writer) -> None:
    for block in folder.blocks:
        writer.put(block, IMAGES[block.start:block.stop], TOKENS[block.start:block.stop])


def prepared(folder) -> SampleFolder:
    sample_folder.prepare(folder, False, SETTINGS)
    return folder


def test_a_writer_leaves_what_write_block_does(folder, tmp_path):
    inline = prepared(SampleFolder(tmp_path / "inline", 5, 2, 4, 3, True))
    for block in inline.blocks:
        sample_folder.write_block(inline, block, IMAGES[block.start:block.stop], TOKENS[block.start:block.stop])
    with BlockWriter(prepared(folder)) as writer:
        put_all(folder, writer)
    assert contents(folder) == contents(inline)


@pytest.fixture
def saved(monkeypatch):
    """Names of files in the order in which they are begun; PNGs of even indices come late."""
    names, save, write_array = [], sample_folder.write_png, sample_folder.write_array

    def slow_png(file, image):
        names.append(file.name)
        if int(file.stem) % 2 == 0:
            threading.Event().wait(0.05)
        save(file, image)
        names.append(f"{file.name} is there")

    def array(file, rows):
        names.append(f"{file.parent.name}/{file.name}")
        write_array(file, rows)

    monkeypatch.setattr(sample_folder, "write_png", slow_png)
    monkeypatch.setattr(sample_folder, "write_array", array)
    return names


def test_a_writer_keeps_the_order(folder, saved):
    """PNGs, then class tokens, then images of a block; block after block."""
    with BlockWriter(prepared(folder)) as writer:
        put_all(folder, writer)
    ends = [position for position, name in enumerate(saved) if name.startswith("blocks/")]
    assert [saved[end] for end in ends] == ["blocks/00000000.npy", "blocks/00000002.npy", "blocks/00000004.npy"]
    for block, start, end in zip(folder.blocks, [0, *(end + 1 for end in ends)], ends, strict=False):
        pngs = {f"{index:06d}.png{there}" for index in block for there in ("", " is there")}
        assert set(saved[start:end - 1]) == pngs and saved[end - 1] == f"class_tokens/{block.start:08d}.npy"


def test_a_writer_stops_at_the_first_failure_and_tells_it(folder, monkeypatch):
    def full(image, file, *_):
        if Path(file).name == "000003.png":
            raise OSError(28, "No space left on device")
        save(image, file, *_)

    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"000003\.png \(No space left on device\): make room"), BlockWriter(prepared(folder)) as writer:
        put_all(folder, writer)
    assert [path.name for path in (folder.path / "blocks").iterdir()] == ["00000000.npy"]
    assert not folder.png_file(4).exists()


def test_a_failure_is_told_before_the_end(folder, monkeypatch):
    """By the first `put` after it; otherwise a run would sample on for hours."""
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    many = prepared(SampleFolder(folder.path, 1000, 1, 4, None, True))
    with BlockWriter(many) as writer, pytest.raises(UserError, match="make room"):
        for block in many.blocks:
            writer.put(block, IMAGES[:1], None)
            assert block.start <= 2 * sample_folder.WAITING


def test_what_was_sampled_is_written_though_the_work_is_ended(folder, saved):
    with pytest.raises(Killed), BlockWriter(prepared(folder)) as writer:
        writer.put(folder.blocks[0], IMAGES[:2], TOKENS[:2])
        raise Killed
    assert folder.block_file("blocks", folder.blocks[0]).exists()


def test_few_blocks_wait_to_be_written(folder, monkeypatch):
    """With a writer that stands still, `put` returns for WAITING blocks and then waits."""
    go_on, written, put = threading.Event(), [], []

    def stands(_, block, *arguments, **options):
        assert go_on.wait(300)
        written.append(block)

    def sample():
        with BlockWriter(folder) as writer:
            for block in (range(i, i + 1) for i in range(5)):
                writer.put(block, None, None)
                put.append(block)

    monkeypatch.setattr(sample_folder, "write_block", stands)
    thread = threading.Thread(target=sample)
    thread.start()
    thread.join(0.3)
    assert len(put) <= sample_folder.WAITING and not written      # no more than that, however long one waits
    go_on.set()
    thread.join(300)
    assert written == put == [range(i, i + 1) for i in range(5)]
