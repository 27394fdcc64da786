"""runtime/samples.py: a folder of blocks that can be interrupted at any moment and continued."""

import shutil
import time
from collections import namedtuple

import numpy as np
import pytest
from PIL import Image

from runtime import files
from runtime.files import lock, read_object
from runtime.messages import UserError
from runtime.samples import PNG_EXTRA, SampleFolder
from tests import forks

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
TOKENS, LABELS = np.arange(21, dtype=np.float32).reshape(7, 3), np.arange(7)
PARTS = {"tokens": np.dtype((np.float32, (3,))), "images": np.dtype((np.uint8, (4, 4, 3)))}
SETTINGS = {"seed": 0}


@pytest.fixture
def folder(tmp_path):
    return SampleFolder(tmp_path / "samples", count=7, block_size=2, parts=PARTS, png=True)


def fill(folder, settings=SETTINGS, until=4, images=IMAGES) -> list[range] | None:
    """Make what is missing, as generate.py does, but end before block number `until`; returns what was missing."""
    missing = folder.missing(read_object(folder.path / "settings.json") == settings)
    if missing is not None:
        folder.begin(settings, keep=len(missing) < len(folder.blocks))
        for block in [block for block in missing if block in folder.blocks[:until]]:
            rows = slice(block.start, block.stop)
            folder.write_block(block, images=images[rows], tokens=TOKENS[rows])
        if until < 4:
            return missing
        folder.finish(LABELS)
    folder.export()
    return missing


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder.path)): path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}


@pytest.fixture
def whole(tmp_path) -> dict[str, bytes]:
    """The files of a run without interruption."""
    folder = SampleFolder(tmp_path / "undisturbed", 7, 2, PARTS, png=True)
    fill(folder)
    return contents(folder)


def test_a_finished_folder(folder):
    assert fill(folder) == [range(2), range(2, 4), range(4, 6), range(6, 7)] and fill(folder) is None
    names = ["grid.png", "images", "samples.npz", "settings.json", "tokens.npz"]
    assert sorted(path.name for path in folder.path.iterdir()) == names
    images, tokens = np.load(folder.path / "samples.npz"), np.load(folder.path / "tokens.npz")
    assert (images["arr_0"] == IMAGES).all() and (images["arr_1"] == LABELS).all()
    assert (tokens["tokens"] == TOKENS).all() and (tokens["labels"] == LABELS).all()
    for index in range(7):
        assert (np.asarray(Image.open(folder.path / "images" / f"{index:06d}.png")) == IMAGES[index]).all()
    assert read_object(folder.path / "settings.json") == SETTINGS


def test_the_grid_shows_the_first_64_images(tmp_path):
    """Blocks of 40: the grid needs one and a half of them."""
    images = np.random.default_rng(1).integers(0, 256, (70, 4, 4, 3), dtype=np.uint8)
    folder = SampleFolder(tmp_path, 70, 40, {"images": PARTS["images"]}, png=False)
    folder.begin(SETTINGS, keep=False)
    for block in folder.blocks:
        folder.write_block(block, images=images[block.start:block.stop])
    folder.finish(np.zeros(70))
    grid = np.asarray(Image.open(tmp_path / "grid.png"))                                  # 8 x 8 tiles, 2 pixels apart
    assert grid.shape == (50, 50, 3) and (grid[-6:-2, -6:-2] == images[63]).all()


@pytest.mark.parametrize("done", range(4))
def test_continued_after_any_number_of_blocks(folder, whole, done):
    fill(folder, until=done)
    for name in (".samples.npz.partial", "blocks/.00000004.npy.partial"):                 # as SIGKILL leaves them
        (folder.path / name).parent.mkdir(exist_ok=True)
        (folder.path / name).write_bytes(b"part")
    assert fill(folder) == folder.blocks[done:] and contents(folder) == whole


@pytest.mark.parametrize("lost", [
    (), ("samples.npz",), ("samples.npz", "grid.png"), ("samples.npz", "grid.png", "tokens.npz")])
def test_continued_after_any_of_the_files_at_the_end(folder, whole, lost):
    """All blocks were written; of the files that follow, the last ones are missing, or the blocks were not removed."""
    fill(folder, until=3)
    folder.write_block(range(6, 7), images=IMAGES[6:], tokens=TOKENS[6:])
    folder.finish(LABELS)
    for name in lost:
        (folder.path / name).unlink()
    assert fill(folder) == ([] if lost else None) and contents(folder) == whole


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def npy(*shape, dtype=np.uint8):
    return lambda path: np.save(path, np.zeros(shape, dtype))


@pytest.mark.parametrize("part", ["blocks", "tokens"])
@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(), cut, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(bytes(224)),
    lambda path: path.write_bytes(path.read_bytes()[:50]), npy(1, 4, 4, 3), npy(2, 4, 4, 3, dtype=np.int8), npy(2, 3)])
def test_a_block_that_is_not_whole_is_made_again(folder, whole, part, damage):
    fill(folder, until=2)
    damage(folder.path / part / "00000000.npy")
    assert fill(folder) == [range(2), range(4, 6), range(6, 7)] and contents(folder) == whole


@pytest.mark.parametrize(("name", "damage"), [
    ("samples.npz", lambda path: path.unlink()), ("samples.npz", cut), ("tokens.npz", lambda path: path.unlink()),
    ("tokens.npz", lambda path: np.savez(path, tokens=TOKENS[:6])),
    ("samples.npz", lambda path: np.savez(path, arr_0=IMAGES[:6], arr_1=LABELS)),
    ("samples.npz", lambda path: np.savez(path, mu=np.zeros(2), sigma=np.eye(2)))])
def test_a_result_that_is_not_whole_is_made_again(folder, whole, name, damage):
    fill(folder)
    damage(folder.path / name)
    assert fill(folder) == folder.blocks and contents(folder) == whole


@pytest.mark.parametrize("until", [2, 4])
@pytest.mark.parametrize("found", ['{"seed": 1}', "[]", '{"seed": 0', None])
def test_other_settings_leave_nothing_behind(folder, whole, until, found):
    """Neither finished samples nor blocks, PNG files or scores of other settings."""
    fill(folder, until=until, images=255 - IMAGES)
    (folder.path / "images").mkdir(exist_ok=True)
    (folder.path / "images" / "000003.png").write_bytes(b"other")
    for name in ("metrics.json", "metrics-dinov2-123456.json"):
        (folder.path / name).write_text("{}")
    if found is None:
        (folder.path / "settings.json").unlink()
    else:
        (folder.path / "settings.json").write_text(found)
    assert fill(folder) == folder.blocks and contents(folder) == whole


def test_files_that_are_not_wanted_any_more(folder):
    """Tokens and PNG files of an earlier call do not stay beside samples that are made anew; a user's folder does."""
    fill(folder)
    (folder.path / "figures").mkdir()
    fill(SampleFolder(folder.path, 7, 2, {"images": PARTS["images"]}, png=False), {"seed": 1})
    names = ["figures", "grid.png", "samples.npz", "settings.json"]
    assert sorted(path.name for path in folder.path.iterdir()) == names


def test_export_writes_missing_png_files_only(folder, whole):
    fill(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*.*") if path.is_file()}
    for name in ("000002.png", "000006.png"):
        (folder.path / "images" / name).unlink()
    (folder.path / "images" / "000004.png").write_bytes(b"")                              # after a power cut
    assert fill(folder) is None and contents(folder) == whole
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"000002.png", "000004.png", "000006.png"}


def test_a_png_file_that_cannot_be_written(folder, whole):
    fill(folder)
    (folder.path / "images" / "000003.png").unlink()
    (folder.path / "images" / ".000003.png.partial").mkdir()
    with pytest.raises(UserError, match=r"000003\.png: cannot be written"):
        fill(folder)
    assert not (folder.path / "images" / "000003.png").exists()
    (folder.path / "images" / ".000003.png.partial").rmdir()
    assert fill(folder) is None and contents(folder) == whole


def test_genevals_folders_are_written_under_the_lock(folder, monkeypatch):
    """Also where nothing else is left to write."""
    fill(folder)
    monkeypatch.setattr(files, "LOCK_PATIENCE", 0.1)
    held = folder.path / "held"
    holder = forks.start(lambda: (lock(folder.path, ""), held.touch(), time.sleep(100)))
    while not held.exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match="another process"):
        folder.export((["{}"] * 7, 1))
    holder.kill()
    holder.wait()
    folder.export((["{}"] * 7, 1))
    assert (folder.path / "geneval/00006/samples/0000.png").exists() and not (folder.path / ".lock").exists()


def test_a_second_process_does_not_make_again_what_the_first_has_finished(folder):
    """Both have found nothing done."""
    second = SampleFolder(folder.path, 7, 2, PARTS, png=True)
    assert second.missing(same=False) == folder.blocks
    fill(folder)
    with pytest.raises(UserError, match="just written"):
        second.begin(SETTINGS, keep=False)
    second.begin({"seed": 1}, keep=False)                         # other settings replace them
    assert not (folder.path / "samples.npz").exists()


PIXELS, TOKEN = 4 * 4 * 3, 3 * 4
PNG = PIXELS + PNG_EXTRA


@pytest.mark.parametrize(("png", "each"), [(True, 2 * (PIXELS + TOKEN) + PNG), (False, 2 * (PIXELS + TOKEN))])
def test_a_disk_that_is_too_small(tmp_path, monkeypatch, png, each):
    """Blocks and npz files are on the disk together; what exists needs no more room, what is finished needs none."""
    def free(size):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(size, 0, size))

    folder = SampleFolder(tmp_path / "samples", 7, 2, PARTS, png)
    free(7 * each - 1)
    with pytest.raises(UserError, match="make no PNG files" if png else "another folder$"):
        fill(folder)
    assert not folder.path.exists()
    free(7 * each)
    fill(folder, until=2)
    there = sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file())
    free(7 * each - there - 1)
    with pytest.raises(UserError, match="samples: needs"):
        folder.missing(same=True)
    free(7 * each - there)
    fill(folder)
    free(0)
    assert folder.missing(same=True) is None
    if png:
        (folder.path / "images" / "000003.png").unlink()
        free(PNG - 1)
        with pytest.raises(UserError, match="samples: needs"):
            folder.missing(same=True)
