"""Captions: read with the data set, from files in several forms, beside pictures and in tars, and added later."""

import gzip
import io
import json
import os
import pickle
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from dataset import LatentDataset
from preprocessing.dataset_tools import main
from runtime.catalogue import Catalogue, catalogue_file, write_catalogue
from runtime.messages import UserError
from runtime.pictures import grid_of
from runtime.sources import open_source
from runtime.stores import IMAGE_EXTENSIONS, METADATA, open_store
from tests import test_preprocessing
from tests.test_catalogue import edit, stores, write_catalogues
from tests.test_dataset import COUNT, image_name, moments_name, refuse, relabel, to_zip, write_data
from tests.test_preprocessing import (
    as_file,
    contents,
    convert,
    data_files,
    encode,
    fill,
    picture,
    pixels,
    record,
    zip_of,
)

refused = test_preprocessing.refused                              # a fixture

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


def test_white_space_in_captions_is_collapsed(tmp_path):
    data = write_data(tmp_path)
    caption(data, "vae-sd", [[" a\tred\n\n disc "]] * COUNT)
    assert everything(data)[0] == ["a red disc"] * COUNT


def test_other_captions_in_images_than_in_moments_are_refused(tmp_path):
    data = write_data(tmp_path)
    caption(data, "vae-sd", [["a disc"]] * COUNT)
    caption(data, "images", [["a disc"]] * COUNT)
    assert everything(data)[0] == ["a disc"] * COUNT
    caption(data, "images", [*[["a disc"]] * (COUNT - 1), ["a dish"]])
    refuse("other captions", data, captions=True)


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
    caption(data, "vae-sd", [["a red disct"], ["wo dogs", "dogs in the snow"], *CAPTIONS[2:]])      # the same letters
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
           "beyond the text": {"caption_ends": lambda ends: np.r_[ends[:-1], ends[-1] + 9]},
           "less than the text": {"caption_ends": lambda ends: np.r_[ends[:-1], ends[-1] - 1]},
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


# ---- from files and beside pictures ----------------------------------------------------------------------------------

PICTURES = ["b/p2.png", "b/p4.png", "a/p1.png", "a/p3.jpg"]       # not in sorted order
WORDS = {name: [f"words of {name}", "others"] for name in PICTURES}


def lines(*records: object) -> str:
    return "\n".join(map(json.dumps, records)) + "\n"


def coco(named: dict[int, str], words: dict[int, list[str]]) -> dict:
    return {"info": {}, "images": [{"id": i, "file_name": name, "height": 1} for i, name in named.items()],
            "annotations": [{"id": 7, "image_id": i, "caption": f"{text}\n"} for i, texts in words.items()
                            for text in texts]}


def stem(name: str) -> str:
    return name.partition(".")[0]


FORMS = {
    "paths": ("c.json", json.dumps(WORDS)),
    "paths without extension": ("c.json", json.dumps({stem(name): texts for name, texts in WORDS.items()})),
    "file names": ("c.json", json.dumps({name[2:]: texts for name, texts in WORDS.items()})),
    "stems": ("c.json", json.dumps({stem(name)[2:]: texts for name, texts in WORDS.items()})),
    "records": ("c.json", json.dumps([{"image": name, "captions": texts} for name, texts in WORDS.items()])),
    "lines": ("c.jsonl", lines(*({"file_name": name, "caption": texts} for name, texts in WORDS.items()))),
    "a line for each caption": ("c.jsonl", lines(*({"key": stem(name), "text": text, "score": 1}
                                                   for name, texts in WORDS.items() for text in texts))),
    "short lines": ("c.jsonl", "\n" + lines(*({name: texts} for name, texts in WORDS.items()))),
    "COCO by name": ("c.json", json.dumps(coco({90 + i: name[2:] for i, name in enumerate(PICTURES)},
                                               {90 + i: [*WORDS[name], " "] for i, name in enumerate(PICTURES)}))),
    "COCO by id": ("c.json", json.dumps(coco({i: f"val_{i:06d}.jpg" for i in range(1, 5)},
                                             {int(stem(name)[-1]): WORDS[name] for name in PICTURES}))),
    "COCO without images": ("c.json", json.dumps(coco({}, {int(stem(name)[-1]): WORDS[name] for name in PICTURES}))),
}


@pytest.fixture
def photos(tmp_path) -> Path:
    return fill(tmp_path / "photos", {name: as_file(picture(40, 33 + i), "png") for i, name in enumerate(PICTURES)})


def written(place: Path) -> list:
    """Captions in the order of the images."""
    found = record(place)["captions"]
    assert list(found) == [image_name(i) for i in range(len(found))]
    return list(found.values())


@pytest.mark.parametrize(("name", "text"), FORMS.values(), ids=FORMS)
def test_convert_reads_captions_in_every_form(photos, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    convert(photos, tmp_path / "images", f"--captions={tmp_path / name}")
    assert written(tmp_path / "images") == [WORDS[name] for name in sorted(PICTURES)]
    assert [label for _, label in record(tmp_path / "images")["labels"]] == [0, 0, 1, 1]      # as without captions


def test_the_most_exact_name_counts(tmp_path):
    fill(tmp_path / "photos", {name: as_file(picture(40, 33), "png") for name in ("p.png", "x/p.png")})
    (tmp_path / "c.json").write_text(json.dumps({"p.png": "above", "x/p.png": "below"}))
    convert(tmp_path / "photos", tmp_path / "images", f"--captions={tmp_path / 'c.json'}")
    assert written(tmp_path / "images") == [["above"], ["below"]] and record(tmp_path / "images")["labels"] is None


ALL = json.dumps(WORDS)
BAD_FILES = {
    "an unknown key": ("c.json", json.dumps({**WORDS, "b/p9.png": "a"}), "b/p9.png"),
    "a key of two": ("c.json", json.dumps({**WORDS, "p1": "a"}), "(p1)"),
    "an image without one": ("c.json", json.dumps({**WORDS, "b/p2.png": []}), "b/p2.png"),
    "no line of it": ("c.jsonl", lines(*({name: WORDS[name]} for name in PICTURES[1:])), "b/p2.png"),
    "an empty caption": ("c.json", json.dumps({**WORDS, "b/p2.png": ["a", " "]}), "b/p2.png"),
    "no words": ("c.json", json.dumps({**WORDS, "b/p2.png": 7}), "b/p2.png"),
    "an unknown id": ("c.json", json.dumps(coco({}, {9: ["a"]})), "9"),
    "boxes": ("c.json", json.dumps({"images": [], "annotations": [{"image_id": 1, "bbox": []}]}), "captions_"),
    "no JSON": ("c.json", ALL[:-1], "JSON"), "no line": ("c.jsonl", ALL + "\n{", "JSON"),
    "numbers": ("c.json", "7", "c.json"), "lists": ("c.jsonl", "[1]", "c.jsonl"), "none": ("c.json", "{}", "a/p1.png"),
    "an odd key": ("c.jsonl", '{"key": [1], "text": "a"}', "[1]"), "nothing": (None, "", "No such file"),
}


@pytest.mark.parametrize(("name", "text", "word"), BAD_FILES.values(), ids=BAD_FILES)
def test_captions_that_do_not_fit_are_refused_before_any_work(photos, tmp_path, refused, name, text, word):
    if name:
        (tmp_path / name).write_text(text)
    if word == "(p1)":
        fill(photos, {"b/p1.png": b"not looked at"})
    assert word in refused(convert, photos, tmp_path / "images", f"--captions={tmp_path / (name or 'x')}")
    assert not (tmp_path / "images").exists()


def test_captions_are_matched_before_pictures_are_chosen(photos, tmp_path):
    (tmp_path / "c.json").write_text(ALL)
    convert(photos, tmp_path / "images", f"--captions={tmp_path / 'c.json'}", "--max-images=2")
    assert written(tmp_path / "images") == [WORDS["a/p1.png"], WORDS["b/p2.png"]]


def test_captions_follow_pictures_when_some_are_left_out_or_removed(photos, tmp_path, refused):
    (tmp_path / "c.json").write_text(ALL)
    flags = photos, tmp_path / "images", f"--captions={tmp_path / 'c.json'}"
    (photos / "a/p1.png").write_bytes(b"no picture")
    (photos / "b/p2.png").write_bytes(b"no picture")
    assert "2 of 4" in refused(convert, *flags)
    (photos / "a/p1.png").unlink()                                # the file still names it
    convert(*flags, "--skip-bad=1")
    assert record(tmp_path / "images")["captions"] == {image_name(1): WORDS["a/p3.jpg"],
                                                       image_name(3): WORDS["b/p4.png"]}


def test_finished_images_with_other_captions_are_not_called_finished(photos, tmp_path, refused, capsys):
    convert(photos, tmp_path / "images")
    (tmp_path / "c.json").write_text(ALL)
    flags = photos, tmp_path / "images", f"--captions={tmp_path / 'c.json'}"
    assert "dataset_tools captions" in refused(convert, *flags)
    main(["captions", f"--source={tmp_path}", f"--captions={prepared_keys(tmp_path)}"])
    convert(*flags)
    convert(photos, tmp_path / "images")
    assert capsys.readouterr().out.count("finished already") == 2
    (tmp_path / "c.json").write_text(ALL.replace("others", "another"))
    assert "dataset_tools captions" in refused(convert, *flags)


def prepared_keys(place: Path) -> Path:
    """A file with the words of each prepared image, named by its key."""
    (place / "d.json").write_text(json.dumps({f"00000/{i:08d}": WORDS[name] for i, name in
                                              enumerate(sorted(PICTURES))}))
    return place / "d.json"


def beside(name: str) -> dict[str, bytes]:
    """Files with the words of a picture: .txt of some, .json of others."""
    if name < "b":
        return {f"{stem(name)}.txt": ("\ufeff\n" + "\r\n\n".join(WORDS[name])).encode()}
    return {f"{stem(name)}.json": json.dumps({"width": 3, "caption": WORDS[name]}).encode()}


def pack(photos: Path, kind: str) -> Path:
    """The files of a folder as a zip, a tar or, for each of its folders, a tar of flat files."""
    if kind == "zip":
        return zip_of(photos)
    for place, path in {"tar": [(photos, photos.with_suffix(".tar"))], "tars": [
            (photos / name, photos.with_name("tars") / f"{name}.tar") for name in "ab"]}.get(kind, ()):
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
            archive.add(place, "." if kind == "tar" else "")
    return {"tar": photos.with_suffix(".tar"), "tars": photos.with_name("tars")}.get(kind, photos)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tars"])
def test_captions_beside_pictures_in_folders_zips_and_tars(photos, tmp_path, kind, capsys):
    convert(photos, tmp_path / "expected")
    for name in PICTURES:
        fill(photos, beside(name))
    fill(photos, {"a/p1.json": b'{"caption": "not read, .txt comes first"}', "a/notes.txt": b"of no picture"})
    capsys.readouterr()
    source = pack(photos, kind)
    convert(source, tmp_path / "images", "--workers=2")
    assert written(tmp_path / "images") == [WORDS[name] for name in sorted(PICTURES)]
    assert data_files(tmp_path / "images") == data_files(tmp_path / "expected")
    assert ": 2 hidden or other" in (said := capsys.readouterr().err) and "a/notes.txt, a/p1.json" in said
    assert (record(tmp_path / "images")["labels"] is None) == kind.startswith("tar")


def test_json_without_captions_and_tars_of_classes_are_what_they_were(photos, tmp_path, capsys):
    """As ImageNet's: a tar for each class."""
    fill(photos, {f"{stem(name)}.json": b'{"boxes": []}' for name in PICTURES})
    convert(pack(photos, "tars"), tmp_path / "images")
    assert ": 4 hidden or other" in capsys.readouterr().err and "captions" not in record(tmp_path / "images")
    assert [label for _, label in record(tmp_path / "images")["labels"]] == [0, 0, 1, 1]


@pytest.mark.parametrize(("files", "word"), [
    ({f"{stem(name)}.txt": b"words" for name in PICTURES if name != "a/p3.jpg"}, "a/p3.jpg"),
    ({"a/p1.txt": b"\n \n"}, "a/p1.txt"), ({"a/p1.txt": b"Caf\xe9"}, "UTF-8"), ({"a/p1.json": b"{"}, "a/p1.json"),
    ({"a/p1.json": b'{"text": [""]}'}, "a/p1.json")])
def test_every_picture_needs_a_caption_beside_it(photos, tmp_path, refused, files, word):
    fill(photos, files)
    assert word in refused(convert, photos, tmp_path / "images")
    assert not (tmp_path / "images").exists()


def test_captions_of_a_prepared_source_are_kept(photos, tmp_path):
    (tmp_path / "c.json").write_text(ALL)
    convert(photos, tmp_path / "images", f"--captions={tmp_path / 'c.json'}")
    convert(tmp_path / "images", tmp_path / "smaller.zip", "--resolution=16x16")
    assert written(tmp_path / "smaller.zip") == [WORDS[name] for name in sorted(PICTURES)]


# ---- tars ------------------------------------------------------------------------------------------------------------

def member(name: str, data: bytes = b"words", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(data), link
    return info, io.BytesIO(data)


BAD_TARS = {"absolute": [member("/a.png")], "above": [member("a/../../b.png")], "a backslash": [member("a\\b.png")],
            "a link": [member("a.png", b"", tarfile.SYMTYPE, "/etc/passwd")],
            "a hard link": [member("a.png"), member("b.png", b"", tarfile.LNKTYPE, "a.png")],
            "a pipe": [member("a.png", b"", tarfile.FIFOTYPE)], "two": [member("a.png"), member("./a.png")]}


@pytest.mark.parametrize("members", BAD_TARS.values(), ids=BAD_TARS)
def test_hostile_tars_are_refused(tmp_path, members, refused):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for one in members:
            archive.addfile(*one)
    with pytest.raises(UserError, match=r"a\.tar: [^\n]*$"):
        open_source(tmp_path / "a.tar").names()
    (tmp_path / "tars").mkdir()
    (tmp_path / "a.tar").rename(tmp_path / "tars/a.tar")
    assert "tars" in refused(convert, tmp_path / "tars", tmp_path / "images")


@pytest.mark.parametrize("damage", [lambda data: data[:-10_000], lambda data: data[:700], lambda data: b"",
                                    gzip.compress, lambda data: data[:100] + b"x" + data[101:]])
def test_damaged_and_compressed_tars_are_refused(tmp_path, damage, refused):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(*member("a.png", bytes(20_000)))
    (tmp_path / "a.tar").write_bytes(damage((tmp_path / "a.tar").read_bytes()))
    assert "a.tar" in refused(convert, tmp_path / "a.tar", tmp_path / "images")


def test_a_tar_is_read_by_name_from_any_process_and_changes_are_noticed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for name in ("b.png", f"{'long/' * 40}a.png", "dataset.json", ".hidden/x.png"):
            archive.addfile(*member(name, name.encode()))
    store = pickle.loads(pickle.dumps(open_source(tmp_path / "a.tar")))
    names, hidden = store.listing()
    assert names.tolist() == [b"b.png", b"dataset.json", b"long/" * 40 + b"a.png"] and len(hidden) == 1
    assert all(store.read(name) == name for name in names.tolist()) and METADATA in store and "c.png" not in store
    with pytest.raises(UserError, match=r"a.tar:c.png: no such file"):
        store.read(b"c.png")
    os.truncate(tmp_path / "a.tar", 600)
    with pytest.raises(UserError, match="dataset.json"):
        store.read(METADATA)


def test_a_folder_with_pictures_or_folders_is_a_folder(photos, tmp_path):
    (photos / "old.tar").write_bytes(b"")
    convert(photos, tmp_path / "images")
    assert len(data_files(tmp_path / "images")) == 4


# ---- encode, add and check -------------------------------------------------------------------------------------------

@pytest.fixture
def captioned(photos, tmp_path, vae_folder) -> Path:
    """A prepared data set with captions."""
    (tmp_path / "c.json").write_text(ALL)
    convert(photos, tmp_path / "data/images", f"--captions={tmp_path / 'c.json'}")
    encode(tmp_path / "data/images", tmp_path / "data/vae-sd", f"--model-url={vae_folder}")
    return tmp_path / "data"


def test_moments_have_the_captions_of_their_images(captioned):
    expected = [WORDS[name] for name in sorted(PICTURES)]
    assert list(record(captioned / "vae-sd")["captions"].values()) == expected
    (captioned / "images").rename(captioned / "elsewhere")
    entries = LatentDataset(captioned, captions=True, with_images=False)
    assert [entries[i][2] for i in range(4)] == ["\n".join(texts) for texts in expected]


def test_captions_added_later_change_nothing_but_captions(captioned, tmp_path, vae_folder, capsys):
    """Neither a file nor what `encode` compares; in folders and zips."""
    convert(tmp_path / "photos", tmp_path / "plain/images.zip")
    encode(tmp_path / "plain/images.zip", tmp_path / "plain/vae-sd", f"--model-url={vae_folder}")
    before = {kind: contents(tmp_path / "plain" / kind) for kind in ("images.zip", "vae-sd")}
    opened = LatentDataset(tmp_path / "plain").fingerprint
    main(["captions", f"--source={tmp_path / 'plain'}", f"--captions={prepared_keys(tmp_path)}"])
    for kind, files in before.items():
        after = contents(tmp_path / "plain" / kind)
        assert "captions" in np.load(catalogue_file(tmp_path / "plain" / kind)).files
        captions = json.loads(after["dataset.json"]).pop("captions")
        assert list(captions.values()) == [WORDS[name] for name in sorted(PICTURES)]
        assert json.loads(after["dataset.json"]) == {**json.loads(files["dataset.json"]), "captions": captions}
        ours = {"dataset.json", "catalogue.npz"}
        assert {n: d for n, d in after.items() if n not in ours} == {n: d for n, d in files.items() if n not in ours}
    assert LatentDataset(tmp_path / "plain").fingerprint == opened
    assert LatentDataset(tmp_path / "plain", captions=True).fingerprint == LatentDataset(captioned, captions=True
                                                                                         ).fingerprint
    capsys.readouterr()
    encode(tmp_path / "plain/images.zip", tmp_path / "plain/vae-sd", f"--model-url={vae_folder}")
    convert(tmp_path / "photos", tmp_path / "plain/images.zip")
    assert capsys.readouterr().out.count("finished already") == 2


@pytest.mark.parametrize(("given", "word"), [
    ({"00000/00000009": "a"}, "00000/00000009"), ({"img00000000.png": "a"}, "3 of 4 files (00000/00000001"),
    (coco({}, {i: ["a"] for i in range(4)}), "0")])               # the numbers of images are not COCO's ids
def test_added_captions_that_do_not_fit_write_nothing(captioned, tmp_path, refused, given, word):
    before = contents(captioned)
    (tmp_path / "d.json").write_text(json.dumps(given))
    assert word in refused(main, ["captions", f"--source={captioned}", f"--captions={tmp_path / 'd.json'}"])
    assert contents(captioned) == before
    assert "images" in refused(main, ["captions", f"--source={tmp_path}", f"--captions={tmp_path / 'd.json'}"])


@pytest.mark.parametrize("kind", ["images", "vae-sd"])
def test_captions_are_added_to_images_or_moments_alone(captioned, tmp_path, kind):
    (captioned / kind).rename(tmp_path / "other")
    (captioned / "x").mkdir()
    (left,) = {"images", "vae-sd"} - {kind}
    (tmp_path / "d.json").write_text(json.dumps({f"00000/{i:08d}": f"new {i}" for i in range(4)}))
    main(["captions", f"--source={captioned}", f"--captions={tmp_path / 'd.json'}"])
    assert list(record(captioned / left)["captions"].values()) == [[f"new {i}"] for i in range(4)]


def test_check_verifies_captions_and_draws_them(captioned, tmp_path, capsys, refused):
    flags = ["check", f"--source={captioned}", "--workers=0"]
    main([*flags, f"--output={tmp_path / 'a.png'}"])
    assert "captions" in capsys.readouterr().out
    width, height = Image.open(tmp_path / "a.png").size
    assert width >= 4 * 128 and height > 2 * 128
    made = json.loads((captioned / "vae-sd/dataset.json").read_text())
    made["captions"].popitem()
    (captioned / "vae-sd/dataset.json").write_text(json.dumps(made))
    assert "00000/00000003" in refused(main, [*flags, f"--output={tmp_path / 'b.png'}"])


def test_cocos_crop_is_the_centre_resized_by_lanczos(tmp_path):
    fill(tmp_path / "a", {"x.png": as_file(picture(90, 50), "png")})
    main(["convert", f"--source={tmp_path / 'a'}", f"--dest={tmp_path / 'b'}", "--resolution=32", "--workers=0",
          "--transform=center-crop-lanczos"])
    centre = picture(90, 50).crop((20, 0, 70, 50)).resize((32, 32), Image.Resampling.LANCZOS)
    assert (pixels(tmp_path / "b") == np.array(centre)).all()
    assert record(tmp_path / "b")["transform"]["name"] == "center-crop-lanczos"


# ---- pictures --------------------------------------------------------------------------------------------------------

def test_a_grid_has_each_caption_below_its_image():
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 20, 20) * 50
    plain = grid_of(images, 2)
    assert np.array_equal(plain, to_pil_image(make_grid(images, nrow=2)))
    captions = ["a", "two words " * 9, "", "x" * 99, "e"]
    grid = np.array(grid_of(images, 2, captions))
    side = 20 * 7                                                 # a whole factor, the first that gives 128 px
    for i in range(5):
        rows = np.flatnonzero((grid == 50 * i).all(axis=2)[:, 10 + i % 2 * side])
        assert (np.diff(rows) == 1).sum() >= side - 1
    empty, filled = (np.array(grid_of(images[:1] + 99, 1, [text])) for text in ("", "words"))
    assert (filled[side + 5:] < 128).any() and not (empty[side + 5:] < 128).any()


def test_long_words_and_control_characters_are_drawn_within_the_width():
    """Each caption is drawn in its column, and at most ten lines of it."""
    images = torch.zeros(2, 3, 128, 128, dtype=torch.uint8)
    for text in ("x" * 500, "a\x1b[31m\n\u202eb" * 9, "words " * 200, "w" * 40 + " end"):
        grid = np.array(grid_of(images, 2, [text, ""]).convert("L"))
        below = grid[128 + 8:]
        assert (below[:, :132] < 128).any() and (below[:, 136:] > 200).all() and len(below) < 10 * 14


def test_stray_text_files_in_class_folders_are_passed_over(tmp_path, capsys):
    """A source with classes stays one with classes."""
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "raw" / name)
    (tmp_path / "raw/a/1.txt").write_text("a stray note")
    main(["convert", "--source", str(tmp_path / "raw"), "--dest", str(tmp_path / "images"),
          "--resolution", "8", "--workers", "0"])
    record = json.loads((tmp_path / "images/dataset.json").read_text())
    assert [label for _, label in record["labels"]] == [0, 0, 1] and "captions" not in record
    assert "1.txt" in capsys.readouterr().err
