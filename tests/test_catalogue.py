"""The catalogue file: it saves the listing, never changes what is read, and may be stale, damaged or hostile."""

import json
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dataset import LatentDataset
from runtime.catalogue import Catalogue, catalogue_file, list_keyed, write_catalogue
from runtime.messages import UserError
from runtime.stores import IMAGE_EXTENSIONS, METADATA, open_store
from tests.test_dataset import COUNT, LABELS, image_name, moments_name, npy, png, put, relabel, to_zip, write_data

NPY = (b".npy",)
KINDS = {"images": (IMAGE_EXTENSIONS, image_name), "vae-sd": (NPY, moments_name)}


def stores(data: Path) -> dict[str, Path]:
    return {kind: data / f"{kind}{'' if (data / kind).exists() else '.zip'}" for kind in KINDS}


def write_catalogues(data: Path) -> None:
    for kind, path in stores(data).items():
        write_catalogue(path, KINDS[kind][0])


def edit(path: Path, **changes) -> None:
    """Write the catalogue of a store with other arrays; a function changes the array, None removes it."""
    file = catalogue_file(path)
    with np.load(file) as archive:
        arrays = {name: archive[name] for name in archive.files}
    for name, change in changes.items():
        arrays[name] = change(arrays[name].copy()) if callable(change) else change
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})


def everything(data: Path, **settings) -> tuple:
    """All that a data set tells, or its error."""
    try:
        entries = LatentDataset(data, **settings)
        read = [tuple(part.tolist() if isinstance(part, torch.Tensor) else part for part in entries[i])
                for i in range(len(entries))]
    except UserError as error:
        return (str(error),)
    return (entries.keys.tolist(), entries.labels.tolist(), entries.labels.dtype, entries.fingerprint,
            entries.num_classes, entries.vae_record, entries.resolution, entries.moments_shape, read)


def without_catalogues(data: Path) -> tuple:
    """`everything` of a copy that has no catalogue; errors name the original."""
    copy = shutil.copytree(data, data.with_name("copy"), symlinks=True)
    for file in copy.rglob("*catalogue.npz"):
        file.unlink()
    found = everything(copy)
    shutil.rmtree(copy)
    return tuple(part.replace("/copy/", f"/{data.name}/") if isinstance(part, str) else part for part in found)


@pytest.fixture(params=["folders", "zips"])
def data(request, tmp_path) -> Path:
    """A data set with its catalogues."""
    data = write_data(tmp_path / "data")
    if request.param == "zips":
        for kind in KINDS:
            to_zip(data / kind)
    write_catalogues(data)
    return data


@pytest.fixture
def folders(tmp_path) -> Path:
    data = write_data(tmp_path / "data")
    write_catalogues(data)
    return data


@pytest.mark.parametrize("labelled", [True, False])
def test_a_data_set_is_the_same_with_and_without_catalogues(tmp_path, labelled):
    for zipped in (False, True):
        data = write_data(tmp_path / f"{zipped}")
        for kind in KINDS:
            if not labelled:
                relabel(data, kind, None)
            if zipped:
                to_zip(data / kind)
        expected = everything(data)
        assert len(expected) > 1
        write_catalogues(data)
        assert everything(data) == expected
        assert everything(data, with_images=False)[:4] == expected[:4]


def test_the_catalogue_is_what_is_read(data):
    """Labels that were changed in the catalogues alone are believed; so nothing was listed."""
    for path in stores(data).values():
        edit(path, labels=lambda labels: labels[::-1])
    assert everything(data)[1] == LABELS[::-1]


def test_names_that_sort_unlike_their_keys(tmp_path):
    put(tmp_path / "a", {"b.png": b"1", "imga.png": b"2", "img-mean-std-c.png": b"3"}, {"labels": None})
    expected = Catalogue(open_store(tmp_path / "a"), IMAGE_EXTENSIONS)
    write_catalogue(tmp_path / "a", IMAGE_EXTENSIONS)
    found = Catalogue(open_store(tmp_path / "a"), IMAGE_EXTENSIONS)
    assert found.keys.tolist() == expected.keys.tolist() == [b"a", b"b", b"c"]
    assert found.names.tolist() == expected.names.tolist() == [b"imga.png", b"b.png", b"img-mean-std-c.png"]


def test_opening_makes_no_object_for_each_entry(tmp_path):
    """Loader workers share numpy arrays; a million Python objects would be copied into each of them."""
    path, count = tmp_path / "a.zip", 5_000
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            archive.writestr(zipfile.ZipInfo(image_name(i)), b"")
        archive.writestr(METADATA, json.dumps({"labels": [[image_name(i), i % 7] for i in range(count)]}))
    write_catalogue(path, IMAGE_EXTENSIONS)
    Catalogue(open_store(path), IMAGE_EXTENSIONS)                 # imports and caches
    before = sys.getallocatedblocks()
    found = Catalogue(open_store(path), IMAGE_EXTENSIONS)
    assert sys.getallocatedblocks() - before < count // 10
    assert found.keys[4321] == b"00000/00004321" and (found.labels == np.arange(count) % 7).all()
    assert found.keys.dtype.kind == found.names.dtype.kind == "S" and found.store.read(found.names[-1]) == b""


# ---- changes after the catalogue was written -------------------------------------------------------------------------

def both(change):
    """The same change to images and moments, so that they still pair."""
    return lambda data: [change(data / kind, name) for kind, (_, name) in KINDS.items()]


CHANGES = {
    "labels": both(lambda place, name: relabel(place.parent, place.name, [[name(i), i] for i in range(COUNT)])),
    "a label, of the same size": both(lambda place, name: relabel(
        place.parent, place.name, [[name(i), label] for i, label in enumerate([1, *LABELS[1:]])])),
    "no dataset.json": both(lambda place, name: (place / METADATA).unlink()),
    "a pair removed": both(lambda place, name: (place / name(2)).unlink()),
    "a pair renamed": both(lambda place, name: (place / name(2)).rename(place / name(8))),
    "a folder renamed": both(lambda place, name: (place / "00000").rename(place / "00009")),
    "an image removed": lambda data: (data / "images" / image_name(2)).unlink(),
    "not finished": lambda data: (data / "vae-sd" / METADATA).rename(data / "vae-sd" / ".unfinished.json"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_folder_is_listed(folders, change):
    before = everything(folders)
    change(folders)
    after = everything(folders)
    assert after == without_catalogues(folders) != before


@pytest.mark.parametrize("change", ["labels", "order", "content"])
def test_a_zip_replaced_by_one_of_the_same_size_is_listed(tmp_path, change, capsys):
    data = write_data(tmp_path / "data")
    for kind in KINDS:
        to_zip(data / kind)
    write_catalogues(data)
    for path in stores(data).values():
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = [(info, archive.read(info)) for info in archive.infolist()]
        with zipfile.ZipFile(path, "w") as archive:
            for info, content in entries[::-1] if change == "order" else entries:
                if change == "labels":
                    content = content.replace(b'00.png", 2', b'00.png", 1').replace(b'00.npy", 2', b'00.npy", 1')
                if change == "content" and info.filename == moments_name(3):
                    content = npy(30)
                archive.writestr(info, content)
        assert path.stat().st_size == size
    assert everything(data) == without_catalogues(data) and len(everything(data)) > 1
    assert not capsys.readouterr().err                            # a change is no damage


def test_a_file_that_the_catalogue_still_lists_is_named_when_it_is_read(tmp_path):
    """A folder of more files than the sample; the one that is removed is not in it."""
    count = 200
    put(tmp_path / "images", {image_name(i): png(1) for i in range(count)}, {"labels": None})
    put(tmp_path / "vae-sd", {moments_name(i): npy(1) for i in range(count)}, {"labels": None})
    write_catalogues(tmp_path)
    (tmp_path / "vae-sd" / moments_name(7)).unlink()
    entries = LatentDataset(tmp_path)
    with pytest.raises(UserError, match="img-mean-std-00000007.npy"):
        entries[7]
    write_catalogues(tmp_path)
    with pytest.raises(UserError, match="1 of 200 images have no partner"):
        LatentDataset(tmp_path)


def test_a_catalogue_for_other_extensions_does_not_count(folders):
    path = folders / "images"
    put(path, {"00000/00000009.txt": b""})
    assert Catalogue(open_store(path), (b".txt",)).keys.tolist() == [b"00000/00000009"]


# ---- damaged and hostile catalogues ----------------------------------------------------------------------------------

def flipped(content: bytes) -> bytes:
    place = content.index(b"00000/00000003")                      # a key
    return content[:place] + b"9" + content[place + 1:]


DAMAGES = {"empty": lambda _: b"", "text": lambda _: b"no npz", "cut": lambda content: content[:-100],
           "short": lambda content: content[:200], "an array": lambda _: npy(1), "flipped": flipped}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_catalogue_is_reported_and_the_files_listed(data, damage, capsys):
    expected = everything(data)
    for path in stores(data).values():
        catalogue_file(path).write_bytes(damage(catalogue_file(path).read_bytes()))
    assert everything(data) == expected
    assert capsys.readouterr().err.count("are listed") == 2
    write_catalogues(data)
    assert everything(data) == expected and not capsys.readouterr().err


def put_at(i, value):
    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(f"S{max(array.itemsize, len(value))}") if isinstance(value, bytes) else array
        array[i] = value
        return array
    return change


HOSTILE = {
    "a name that leads out": {"files": put_at(0, b"../00000/secret.png")},
    "an absolute name": {"files": put_at(0, b"/etc/passwd")},
    "a name with a NUL": {"files": put_at(0, b"00000/a\0.png")},
    "a backslash": {"files": put_at(0, b"00000\\a.png")},
    "a drive": {"files": put_at(0, b"0:/a.png")},
    "unsorted keys": {"keys": lambda keys: keys[::-1]},
    "too few keys": {"keys": lambda keys: keys[:-1]},
    "no names": {"files": lambda files: files[:0]},
    "an order beyond the names": {"order": put_at(0, 10**6)},
    "a negative label": {"labels": put_at(0, -1)},
    "a label beyond any embedding": {"labels": put_at(0, 10**9)},
    "labels of text": {"labels": np.array(["a"] * COUNT)},
    "code": {"keys": np.array([print] * COUNT, dtype=object)},
    "no keys at all": {"keys": None},
    "metadata that is a list": {"metadata": np.frombuffer(b"[1]", np.uint8)},
    "a stamp of text": {"stamp": np.array(["a", "b", "c"])},
}
HOSTILE_ZIP = {
    "no table": {"table": None},
    "an offset outside": {"table": lambda table: table + [10**9, 0, 0, 0, 0]},
    "a negative size": {"table": lambda table: table * [1, -1, 1, 1, 1]},
    "an unknown compression": {"table": lambda table: table + [0, 0, 0, 12, 0]},
    "a bomb": {"table": lambda table: table + [0, 0, 2**40, 8, 0]},
    "a short table": {"table": lambda table: table[1:]},
}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_catalogue_is_not_believed(data, changes, capsys):
    expected, path = everything(data), stores(data)["images"]
    edit(path, **changes)
    assert everything(data) == expected
    assert len(capsys.readouterr().err.splitlines()) <= 1


@pytest.mark.parametrize("changes", HOSTILE_ZIP.values(), ids=HOSTILE_ZIP)
def test_a_hostile_table_of_a_zip_is_not_believed(tmp_path, changes):
    data = write_data(tmp_path)
    path = to_zip(data / "images")
    write_catalogue(path, IMAGE_EXTENSIONS)
    expected = everything(data)
    edit(path, **changes)
    assert everything(data) == expected


def test_a_catalogue_that_inflates_is_not_read(folders, capsys):
    file = catalogue_file(folders / "images")
    with np.load(file) as archive:
        np.savez_compressed(file, **{**{name: archive[name] for name in archive.files}, "more": np.zeros(10**6)})
    assert len(everything(folders)) > 1 and "compressed" in capsys.readouterr().err


# ---- writing ---------------------------------------------------------------------------------------------------------

def test_a_catalogue_that_cannot_be_written_is_reported_once(tmp_path, capsys):
    data = write_data(tmp_path)
    expected = everything(data)
    catalogue_file(data / "images").mkdir()                       # not a matter of permission, which root has
    for _ in range(2):
        write_catalogue(data / "images", IMAGE_EXTENSIONS)
    assert capsys.readouterr().err.count("catalogue.npz") == 1
    assert everything(data) == expected and not list(tmp_path.rglob("*.partial"))


def test_faults_of_the_data_are_found_by_the_writer(tmp_path):
    data = write_data(tmp_path)
    put(data / "images", {"00000/00000003.jpg": png(3)})
    with pytest.raises(UserError, match="same key"):
        write_catalogue(data / "images", IMAGE_EXTENSIONS)
    relabel(data, "vae-sd", [])
    with pytest.raises(UserError, match="no label"):
        write_catalogue(data / "vae-sd", NPY)


@pytest.mark.parametrize("name", ["a\\b.png", "c:d.png"])
def test_names_that_other_systems_read_otherwise_are_not_catalogued(tmp_path, name):
    put(tmp_path / "images", {name: png(1), "good.png": png(2)})
    write_catalogue(tmp_path / "images", IMAGE_EXTENSIONS)
    assert not catalogue_file(tmp_path / "images").exists()
    assert len(list_keyed(open_store(tmp_path / "images"), IMAGE_EXTENSIONS)[0]) == 2


def test_hidden_files_of_a_zip_stay_hidden(tmp_path):
    data = write_data(tmp_path)
    put(data / "images", {".hidden/img9.png": b"", "__MACOSX/img7.png": b""})
    path = to_zip(data / "images")
    expected = everything(data)
    write_catalogue(path, IMAGE_EXTENSIONS)
    assert everything(data) == expected and len(expected[0]) == COUNT
