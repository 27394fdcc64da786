"""Captions: read with the data set, from files in several forms, beside pictures and in tars, and added later."""

import json
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dataset import LatentDataset
from runtime.catalogue import Catalogue, catalogue_file, write_catalogue
from runtime.messages import UserError
from runtime.stores import IMAGE_EXTENSIONS, METADATA, open_store
from tests.test_catalogue import edit, stores, write_catalogues
from tests.test_dataset import COUNT, image_name, moments_name, refuse, relabel, to_zip, write_data

CAPTIONS = [["a red disc"], ["two dogs", "dogs in the snow"], ["\u00e9t\u00e9"], ["\u732b \U0001f431", "a cat"], ["x"],
            ["the last"]]
JOINED = ["\n".join(captions) for captions in CAPTIONS]


def caption(data: Path, kind: str, captions: object) -> None:
    """Set "captions" in the dataset.json of images or moments; a list is that of each entry."""
    path, name = data / kind / METADATA, image_name if kind == "images" else moments_name
    if isinstance(captions, list):
        captions = {name(i): one for i, one in enumerate(captions)}
    path.write_text(json.dumps({**json.loads(path.read_text()), "captions": captions}))


def everything(data: Path, **settings) -> tuple:
    """All that a data set with captions tells, or its error."""
    try:
        entries = LatentDataset(data, captions=True, **settings)
        return [entries[i][2] for i in range(len(entries))], entries.fingerprint, entries.labels.tolist()
    except UserError as error:
        return (str(error),)


# ---- reading ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("holders", [["images"], ["vae-sd"], ["images", "vae-sd"]])
@pytest.mark.parametrize("zipped", [False, True])
def test_an_entry_has_its_captions_with_and_without_catalogues(tmp_path, holders, zipped, capsys):
    data = write_data(tmp_path / "data")
    for kind in ("images", "vae-sd"):
        relabel(data, kind, None)
        if kind in holders:
            caption(data, kind, CAPTIONS)
        if zipped:
            to_zip(data / kind)
    listed = everything(data), everything(data, with_images=False)
    assert listed[0] == listed[1] and listed[0][0] == JOINED
    write_catalogues(data)
    for path in stores(data).values():                            # nothing is listed
        assert catalogue_file(path).exists()
    assert (everything(data), everything(data, with_images=False)) == listed
    assert not capsys.readouterr().err                            # of labels nothing is said
    assert "captions" not in write_catalogue(stores(data)["vae-sd"], (b".npy",)).metadata


def test_captions_of_the_moments_are_taken_first_and_white_space_collapsed(tmp_path):
    data = write_data(tmp_path)
    caption(data, "images", [["other"]] * COUNT)
    caption(data, "vae-sd", [[" a\tred\n\n disc "]] * COUNT)
    assert everything(data)[0] == ["a red disc"] * COUNT


def test_the_fingerprint_depends_on_captions_and_not_on_labels(tmp_path):
    data = write_data(tmp_path)
    caption(data, "vae-sd", CAPTIONS)
    labels = LatentDataset(data).fingerprint
    found = everything(data)[1]
    relabel(data, "vae-sd", None)
    relabel(data, "images", None)
    assert everything(data)[1] == found != labels
    caption(data, "vae-sd", [*CAPTIONS[:-1], ["the lest"]])
    assert everything(data)[1] != found
    caption(data, "vae-sd", [["a red disc", "two dogs"], ["dogs in the snow"], *CAPTIONS[2:]])
    assert everything(data)[1] != found


def test_only_some_entries(tmp_path):
    data = write_data(tmp_path)
    caption(data, "vae-sd", CAPTIONS)
    some = np.array([b"00000/00000001", b"00000/00000003"])
    assert everything(data, only=some)[0] == [JOINED[1], JOINED[3]]


def test_a_data_set_with_captions_is_pickled_for_workers(tmp_path):
    data = write_data(tmp_path)
    caption(data, "vae-sd", CAPTIONS)
    write_catalogues(data)
    assert pickle.loads(pickle.dumps(LatentDataset(data, captions=True)))[3][2] == JOINED[3]


def test_captions_make_no_object_for_each_entry(tmp_path):
    path, count = tmp_path / "a.zip", 5_000
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            archive.writestr(zipfile.ZipInfo(image_name(i)), b"")
        archive.writestr(METADATA, json.dumps({"captions": {image_name(i): [f"picture {i}"] for i in range(count)}}))
    write_catalogue(path, IMAGE_EXTENSIONS)
    Catalogue(open_store(path), IMAGE_EXTENSIONS)                 # imports and caches
    before = sys.getallocatedblocks()
    found = Catalogue(open_store(path), IMAGE_EXTENSIONS)
    assert sys.getallocatedblocks() - before < count // 10
    assert found.captions[0] == "picture 0" and found.captions[4321] == "picture 4321"


REFUSED = {"none": (None, "dataset_tools captions"), "a number": ([["a"], 3, *[["a"]] * 4], "00000/00000001"),
           "an image without one": ([["a"]] * (COUNT - 1), "1 of 6 files (00000/00000005)"),
           "an empty list": ([["a"], ["a"], [], *[["a"]] * 3], "00000/00000002"),
           "an empty caption": ([["a"], ["a", " \n"], *[["a"]] * 4], "00000/00000001"),
           "no text": ([["a"], ["a\ud800"], *[["a"]] * 4], "00000/00000001"),
           "text": ("a red disc", '"captions"'), "impossible names": ({"\ud800": ["a"]}, "no file")}


@pytest.mark.parametrize(("captions", "word"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("kind", ["images", "vae-sd"])
def test_captions_that_cannot_be_used_are_one_sentence(tmp_path, captions, word, kind):
    data = write_data(tmp_path)
    caption(data, kind, captions)
    refuse(word, data, captions=True)
    LatentDataset(data)                                           # labels do not need them


HOSTILE = {"no ends": {"caption_ends": None}, "too few": {"caption_ends": lambda ends: ends[:-1]},
           "an empty entry": {"caption_ends": lambda ends: np.r_[ends[:2], ends[1], ends[3:]]},
           "beyond the text": {"caption_ends": lambda ends: ends + 1},
           "unsorted": {"caption_ends": lambda ends: ends[::-1]},
           "inside of a letter": {"caption_ends": lambda ends: np.r_[ends[:2], ends[2] - 1, ends[3:]]},
           "no UTF-8": {"captions": lambda text: text | 0x80}, "numbers": {"captions": lambda text: text.astype(int)},
           "floats": {"caption_ends": lambda ends: ends / 2}, "overflow": {
               "caption_ends": lambda ends: np.r_[2**63 - 1, 2 - 2**63, 9 - 2**63, -5, 0, ends[-1]]}}


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_catalogue_is_not_believed(tmp_path, changes, capsys):
    data = write_data(tmp_path)
    caption(data, "vae-sd", CAPTIONS)
    write_catalogues(data)
    edit(data / "vae-sd", captions=lambda text: np.where(text == ord("x"), ord("y"), text).astype(np.uint8))
    assert everything(data)[0][4] == "y"                          # the catalogue is what is read
    edit(data / "vae-sd", **changes)
    assert everything(data)[0] == JOINED and "are listed" in capsys.readouterr().err
