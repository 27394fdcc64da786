"""The index of a large data set: the same data with and without it, every change noticed, damage and full disks no matter."""

import gc
import json
import multiprocessing
import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import dataset as module
from dataset import LatentDataset
from runtime import index
from runtime.messages import UserError
from runtime.stores import ZipStore
from tests.test_dataset import COUNT, VAE, image_name, labels_of, moments_name, npy, png, put, relabel, to_zip

LABELS = [2, 0, 1, 2, 0, 1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, in which also a small data set that was written just now has its index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "WORTHWHILE", 1)
    monkeypatch.setattr(index, "SETTLED", 0)
    return tmp_path / "cache" / "reg" / "index"


def write(place: Path, labels=LABELS, value: int = 0) -> Path:
    """`value` is added to what the pictures and moments hold."""
    put(place / "images", {image_name(i): png(i + value) for i in range(COUNT)}, {"labels": labels_of(image_name, labels)})
    put(place / "vae-sd", {moments_name(i): npy(i + value) for i in range(COUNT)}, {"labels": labels_of(moments_name, labels), "vae": VAE})
    return place


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "data")


def everything(data: Path, **kwargs) -> tuple:
    """All that a data set says, or its error."""
    try:
        entries = LatentDataset(data, **kwargs)
    except UserError as error:
        return (str(error),)
    read = [tuple(part.tolist() if isinstance(part, torch.Tensor) else part for part in entries[i]) for i in range(len(entries))]
    return (entries.keys.tolist(), entries.labels.tolist(), entries.labels.dtype, entries.fingerprint, entries.num_classes,
            entries.vae_record, entries.resolution, entries.moments_shape, read)


def without_index(data: Path, **kwargs) -> tuple:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "recall", lambda *_: None)
        patch.setattr(index, "keep", lambda *_: None)
        return everything(data, **kwargs)


def forbid(monkeypatch) -> None:
    """What an index spares may not be done."""
    monkeypatch.setattr(module, "list_keyed", None)
    monkeypatch.setattr(module, "read_metadata", None)
    monkeypatch.setattr(ZipStore, "_read_directory", None)


@pytest.mark.parametrize("with_images", [True, False])
@pytest.mark.parametrize("zips", [(), ("images",), ("images", "vae-sd")])
def test_a_data_set_is_the_same_with_and_without_its_index(data, zips, with_images, monkeypatch):
    for name in zips:
        to_zip(data / name)
    expected = without_index(data, with_images=with_images)
    assert len(expected) > 1
    assert everything(data, with_images=with_images) == expected              # writes it
    forbid(monkeypatch)
    assert everything(data, with_images=with_images) == expected              # reads it


@pytest.mark.parametrize("where", ["images", "vae-sd", "both"])
def test_absent_labels_stay_absent(data, where, monkeypatch, capsys):
    for folder in ("images", "vae-sd"):
        if where in (folder, "both"):
            relabel(data, folder, None)
    expected = without_index(data)
    assert everything(data) == expected
    forbid(monkeypatch)
    capsys.readouterr()
    assert everything(data) == expected
    assert capsys.readouterr().err.count("no labels") == (where == "both")


def test_images_that_are_not_read_still_say_the_labels(data):
    relabel(data, "vae-sd", None)
    assert everything(data, with_images=False)[1] == LABELS
    time.sleep(0.05)
    relabel(data, "images", labels_of(image_name, LABELS[::-1]))
    assert everything(data, with_images=False)[1] == LABELS[::-1]


# ---- changes --------------------------------------------------------------------------------------------------------------------------

def both(change):
    """The same change to images and moments, so that they still pair."""
    return lambda data: [change(data / folder, name) for folder, name in (("images", image_name), ("vae-sd", moments_name))]


def add(place: Path, name) -> None:
    shutil.copy(place / name(0), place / name(7))
    relabel(place.parent, place.name, labels_of(name, [*LABELS, 1, 0]))


def add_folder(place: Path, name) -> None:
    shutil.copytree(place / "00000", place / "00001")
    relabel(place.parent, place.name, None)


def rewrite_unseen(data: Path) -> None:
    """Other labels of the same size and times of writing."""
    for folder in ("images", "vae-sd"):
        path = data / folder / "dataset.json"
        was, text = path.stat(), path.read_text()
        labels = [label for _, label in json.loads(text)["labels"]]
        assert labels == LABELS
        with open(path, "r+") as file:                                        # the folder does not change
            file.write(text.replace("00000000.png\", 2", "00000000.png\", 1").replace("00000000.npy\", 2", "00000000.npy\", 1"))
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
        assert path.stat().st_size == was.st_size and path.read_text() != text


CHANGES = {
    "a pair added": both(add),
    "a folder added": both(add_folder),
    "a pair removed": both(lambda place, name: (place / name(2)).unlink()),
    "an image removed": lambda data: (data / "images" / image_name(2)).unlink(),
    "moments removed": lambda data: (data / "vae-sd" / moments_name(2)).unlink(),
    "a folder removed": both(lambda place, name: shutil.rmtree(place / "00000")),
    "a pair renamed": both(lambda place, name: (place / name(2)).rename(place / name(8))),
    "two pairs swapped": both(lambda place, name: [(place / a).rename(place / b) for a, b in (
        (name(1), "x"), (name(2), name(1)), ("x", name(2)))]),
    "a folder renamed": both(lambda place, name: (place / "00000").rename(place / "00009")),
    "labels edited": both(lambda place, name: relabel(place.parent, place.name, labels_of(name, LABELS[::-1]))),
    "labels edited, their size and time kept": rewrite_unseen,
    "labels removed": both(lambda place, name: (place / "dataset.json").unlink()),
    "another VAE": lambda data: put(data / "vae-sd", {}, {"labels": labels_of(moments_name, LABELS), "vae": {**VAE, "scale": 2.0}}),
    "not finished": lambda data: (data / "vae-sd" / "dataset.json").rename(data / "vae-sd" / ".unfinished.json"),
    "another extension": lambda data: (data / "images" / image_name(2)).rename(data / "images" / image_name(2).replace("png", "txt")),
}


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_of_a_folder_is_noticed(data, tmp_path, change, linked):
    if linked:                                                                # the files lie elsewhere
        data.rename(tmp_path / "elsewhere")
        data.symlink_to(tmp_path / "elsewhere")
    before = everything(data)
    assert everything(data) == before
    time.sleep(0.05)                                                          # as SETTLED is 0: longer than the clock of files ticks
    change(data)
    after = without_index(data)
    assert after != before
    assert everything(data) == after                                          # noticed
    assert everything(data) == after                                          # and the new index says the same


def test_a_link_that_leads_elsewhere_is_noticed(data, tmp_path):
    for folder in ("images", "vae-sd"):
        (data / folder / "00000").rename(tmp_path / folder)
        (data / folder / "00000").symlink_to(tmp_path / folder)
    everything(data)
    time.sleep(0.05)
    other = write(tmp_path / "other", value=30)
    for folder in ("images", "vae-sd"):
        (other / folder / "00000" / "extra.txt").touch()
        (data / folder / "00000").unlink()
        (data / folder / "00000").symlink_to(other / folder / "00000")
    assert everything(data) == without_index(data)


def test_a_zip_that_is_replaced_is_noticed(data, tmp_path):
    """Also one of the same size and time of writing, whose files lie in another order."""
    to_zip(data / "images")
    to_zip(data / "vae-sd")
    before = everything(data)
    for name in ("images.zip", "vae-sd.zip"):
        was = (data / name).stat()
        with zipfile.ZipFile(data / name) as archive:
            entries = [(info, archive.read(info)) for info in archive.infolist()]
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for info, content in reversed(entries):
                archive.writestr(info, content.replace(b'0.png", 2', b'0.png", 1').replace(b'0.npy", 2', b'0.npy", 1'))
        os.utime(tmp_path / name, ns=(was.st_atime_ns, was.st_mtime_ns))
        time.sleep(0.05)
        os.replace(tmp_path / name, data / name)
        assert (data / name).stat().st_size == was.st_size and (data / name).stat().st_mtime_ns == was.st_mtime_ns
    after = without_index(data)
    assert after != before and len(after) > 1
    assert everything(data) == after == everything(data)


@pytest.mark.parametrize("zipped", [False, True])
def test_two_data_sets_never_mix(data, tmp_path, zipped):
    other = write(tmp_path / "other", labels=LABELS[::-1], value=30)
    if zipped:
        for folder in (data, other):
            to_zip(folder / "images")
            to_zip(folder / "vae-sd")
    one, two = without_index(data), without_index(other)
    assert one != two
    for _ in range(2):
        assert everything(data) == one and everything(other) == two
    time.sleep(0.05)
    data.rename(tmp_path / "aside")
    other.rename(data)
    assert everything(data) == two
    (tmp_path / "aside").rename(other)
    assert everything(other) == one and everything(data) == two


def test_what_changed_just_now_is_not_relied_on(data, cache, monkeypatch):
    """A second change within one tick of the clock of files would look like none."""
    monkeypatch.setattr(index, "SETTLED", 3600)
    everything(data)
    assert not cache.exists() and index.stamp(data) == b""


# ---- the cache ------------------------------------------------------------------------------------------------------------------------

def middle_flipped(content: bytes) -> bytes:
    place = content.index(b"00000/00000003")                                  # a key
    return content[:place] + b"9" + content[place + 1:]


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"no npz", lambda content: content[:-100], lambda content: content[:200],
                                    lambda _: npy(1), middle_flipped], ids=["empty", "text", "cut", "short", "array", "flipped"])
def test_a_damaged_index_is_said_and_made_again(data, cache, damage, capsys):
    expected = everything(data)
    for file in cache.iterdir():
        file.write_bytes(damage(file.read_bytes()))
    assert capsys.readouterr().err == ""
    assert everything(data) == expected
    assert capsys.readouterr().err.count("cannot be read") == len(list(cache.iterdir())) == 2
    assert everything(data) == expected
    assert capsys.readouterr().err == ""


def test_an_index_of_other_arrays_is_damaged(data, cache, capsys):
    expected = everything(data)
    for file in cache.iterdir():
        np.savez(file, keys=np.zeros(3))
    assert everything(data) == expected
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["a file", "no room"])
def test_a_cache_that_cannot_be_written_is_said_once(data, tmp_path, place, monkeypatch, capsys):
    if place == "a file":                                                     # not a matter of permission, which root would have
        (tmp_path / "cache").write_text("")
    else:
        monkeypatch.setattr(np, "savez", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    expected = without_index(data)
    assert everything(data) == expected == everything(data)
    said = capsys.readouterr().err
    assert said.count("no index can be kept") == 1 and said.count("\n") == 1
    assert ("No space left" if place == "no room" else "Not a directory") in said
    assert not list(tmp_path.rglob("*.npz*"))


def test_what_a_process_leaves_behind_is_no_index(data, cache):
    expected = everything(data)
    for file in list(cache.iterdir()):
        file.rename(cache / f".{file.name}.partial")
    assert everything(data) == expected


def test_small_data_sets_and_those_at_fault_have_none(data, cache, monkeypatch):
    monkeypatch.setattr(index, "WORTHWHILE", COUNT + 1)
    LatentDataset(data)
    monkeypatch.setattr(index, "WORTHWHILE", COUNT)
    with pytest.raises(UserError, match="num_classes"):
        LatentDataset(data, num_classes=1)
    assert not cache.exists()
    LatentDataset(data)
    assert len(list(cache.iterdir())) == 2


def test_the_first_process_of_a_machine_writes(data, cache, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    LatentDataset(data)
    assert not cache.exists()


def test_processes_may_open_at_once(data, cache):
    to_zip(data / "images")
    expected = without_index(data)
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4), context.Queue()

    def open_at_once() -> None:
        barrier.wait()
        queue.put([everything(data) == expected for _ in range(5)])

    children = [context.Process(target=open_at_once) for _ in range(4)]
    for child in children:
        child.start()
    assert [queue.get(timeout=300) for _ in children] == [[True] * 5] * 4
    for child in children:
        child.join()
    assert len(list(cache.iterdir())) == 3                                    # the zip, its catalogue, and that of the moments


def test_indices_not_used_for_longest_make_room(data, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "MOST", 4)
    other = write(tmp_path / "other")
    everything(data)
    everything(other)
    first = set(cache.iterdir())
    for age, file in enumerate(sorted(first)):
        os.utime(file, (age, age))
    everything(data)                                                          # used again
    everything(write(tmp_path / "third"))
    assert len(list(cache.iterdir())) == 4
    with pytest.MonkeyPatch.context() as patch:
        forbid(patch)
        everything(data)
    assert len(first & set(cache.iterdir())) == 2


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    assert index.folder() == tmp_path / "cache" / "reg" / "index"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert index.folder() == tmp_path / ".cache" / "reg" / "index"


def test_the_collector_of_garbage_works_again(data):
    assert gc.isenabled()
    LatentDataset(data)
    assert gc.isenabled()
    with pytest.raises(UserError):
        LatentDataset(data / "nowhere")
    assert gc.isenabled()
