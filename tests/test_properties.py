"""Facts that hold for any input: names keep their labels, damaged files give a result or one sentence."""

import io
import json
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset import read_moments
from evaluations.images import open_images
from preprocessing.crop import center_crop, to_rgb
from preprocessing.encode import moments_name
from runtime.catalogue import Catalogue, list_keyed, read_labels, write_catalogue
from runtime.messages import UserError
from runtime.stores import IMAGE_EXTENSIONS, Store, decode_image, list_names, open_store

pytestmark = pytest.mark.filterwarnings("ignore")                 # Pillow's and numpy's, of damaged files


def examples(count: int):
    """The same examples in every run, and no limit of time for each."""
    return settings(max_examples=count, deadline=None, derandomize=True)


def outcome(action):
    """The result, or a UserError of one line; any other exception fails the test."""
    try:
        return action()
    except UserError as error:
        assert "\n" not in str(error) and str(error).isprintable()
        return error


# ---- names -----------------------------------------------------------------------------------------------------------

# Bytes that file systems take, and parts that have a meaning somewhere.
PARTS = st.one_of(st.binary(min_size=1, max_size=6), st.sampled_from(
    [b"img", b"img-mean-std-", b".png", b".", b"..", b" ", b"\n", b"\\", b"a", b"b", b"c:", "ü".encode(), b"\xff"]))
FILE = st.lists(PARTS, min_size=1, max_size=4).map(
    lambda parts: b"".join(parts).replace(b"/", b"_").replace(b"\0", b"_"))
NAME = st.lists(FILE, min_size=1, max_size=3).map(lambda parts: b"/".join(parts) + b".png")
NAMES = st.lists(NAME, min_size=1, max_size=6, unique=True)


def write(folder: bytes, names: list[bytes]) -> None:
    """A file under each name, whose content is the name."""
    for name in names:
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "xb") as file:
            file.write(name)


def labels_by_content(store: Store) -> dict[bytes, int]:
    """Content of each file that is listed -> its label."""
    keys, names = list_keyed(store, IMAGE_EXTENSIONS)
    labels = read_labels(store, keys)
    return {store.read(name): int(label) for name, label in zip(names.tolist(), labels, strict=True)}


def by_catalogue(path: Path) -> dict[bytes, int]:
    """`labels_by_content` through Catalogue."""
    found = Catalogue(open_store(path), IMAGE_EXTENSIONS)
    return {found.store.read(name): int(label) for name, label in zip(found.names.tolist(), found.labels, strict=True)}


def in_a_plain_folder(name: bytes) -> bool:
    """Whether no part of the path is hidden."""
    return not any(part.startswith(b".") for part in name.split(b"/"))


@examples(60)
@given(names=NAMES)
def test_every_name_keeps_its_label(names):
    names = [name for name in names if not {b".", b".."} & set(name.split(b"/"))]
    with tempfile.TemporaryDirectory() as place:
        folder = os.path.join(os.fsencode(place), b"images")
        os.mkdir(folder)
        try:
            write(folder, names)
        except OSError:                                           # one is the folder of another
            assume(False)
        labels = [[os.fsdecode(name), i] for i, name in enumerate(names)]
        Path(place, "images", "dataset.json").write_text(json.dumps({"labels": labels}))
        expected = {name: i for i, name in enumerate(names) if in_a_plain_folder(name)}

        found = outcome(lambda: labels_by_content(open_store(Path(place, "images"))))
        # Two names with one key are refused, also where one of them is hidden but has a label.
        clash = isinstance(found, UserError) and ("the same key" in str(found) or "remove one" in str(found))
        assert found == expected or clash
        if not clash:
            outcome(lambda: write_catalogue(Path(place, "images"), IMAGE_EXTENSIONS))
            assert by_catalogue(Path(place, "images")) == expected

        path = Path(place, "images.zip")
        with zipfile.ZipFile(path, "w") as archive:
            try:
                for name in [*names, b"dataset.json"]:
                    archive.writestr(os.fsdecode(name), Path(place, "images", os.fsdecode(name)).read_bytes())
            except UnicodeEncodeError:                            # zipfile writes UTF-8 alone
                return
        # A zip has no name for some that a folder takes.
        packed = outcome(lambda: labels_by_content(open_store(path)))
        refused = isinstance(packed, UserError) and "no relative name" in str(packed)
        assert packed == found or refused or clash and isinstance(packed, UserError)
        if not isinstance(packed, UserError):
            write_catalogue(path, IMAGE_EXTENSIONS)
            assert by_catalogue(path) == packed


@examples(60)
@given(names=NAMES)
def test_moments_have_the_key_of_their_image(names):
    class Listed:
        path = "listed"

        def __init__(self, names):
            self.listing = lambda: (np.sort(np.array(names, dtype=bytes)), np.array([], dtype=bytes))

    keys = outcome(lambda: list_keyed(Listed(names), IMAGE_EXTENSIONS)[0])
    assume(not isinstance(keys, UserError))
    moments = [moments_name(key) for key in keys.tolist()]
    assert len(set(moments)) == len(names)
    assert (list_keyed(Listed(moments), (b".npy",))[0] == keys).all()
    assert (list_names(Listed(moments), (b".npy",)) == np.sort(np.array(moments))).all()


# ---- labels ----------------------------------------------------------------------------------------------------------

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
TEXT = st.text(max_size=5)
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
                    max_leaves=12)
SIDE = st.integers(1, 200)
LABEL = st.one_of(st.integers(-1, 3), st.integers(2**63 - 2, 2**64), JSON)
NAMED = st.tuples(st.sampled_from(["a.png", "b.png", "imga.png", "c.png"]), LABEL)
LABELS = st.one_of(JSON, st.lists(st.one_of(JSON, NAMED), max_size=5))


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write(os.fsencode(folder), [b"a.png", b"b.png"])
    return folder


@examples(60)
@given(labels=LABELS)
@example(labels=[["a.png", 1], ["b.png", 2]])
@example(labels=[["a.png", 1], ["b.png", 2**63 - 1]])
def test_any_labels_are_whole_numbers_or_a_sentence(pair, labels):
    (pair / "dataset.json").write_text(json.dumps({"labels": labels}))
    store = open_store(pair)
    found = outcome(lambda: read_labels(store, np.array([b"a", b"b"])))
    if not isinstance(found, UserError) and labels is not None:
        assert found.dtype == np.int64 and found.shape == (2,) and (found >= 0).all()
        assert ["b.png", int(found[1])] in [list(entry) for entry in labels]


@examples(60)
@given(text=st.one_of(st.binary(max_size=40), JSON.map(lambda value: json.dumps(value).encode())))
def test_any_metadata_is_read_or_a_sentence(pair, text):
    (pair / "dataset.json").write_bytes(text)
    outcome(lambda: read_labels(open_store(pair), np.array([b"a", b"b"])))


@examples(60)
@given(width=SIDE, height=SIDE, target=SIDE, mode=st.sampled_from(["RGB", "L", "P", "RGBA", "1"]))
@example(width=1, height=200, target=200, mode="L")
def test_a_crop_has_the_size_asked_for(width, height, target, mode):
    cropped = center_crop(to_rgb(Image.new(mode, (width, height)), "x"), target)
    assert (cropped.mode, cropped.size) == ("RGB", (target, target))


# ---- damaged files ---------------------------------------------------------------------------------------------------

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 9, 11, 3), dtype=np.uint8)


def saved(form: str, **options) -> bytes:
    data = io.BytesIO()
    Image.fromarray(PIXELS[0]).save(data, form, **options)
    return data.getvalue()


def npy() -> bytes:
    data = io.BytesIO()
    np.save(data, np.ones((4, 2, 2), np.float32))
    return data.getvalue()


def archive(compression: int) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as file:
        for name in ("a.png", "ü/imgb.png", "dataset.json"):
            file.writestr(name, b'{"labels": [["a.png", 1], ["\xc3\xbc/imgb.png", 2]]}')
    return data.getvalue()


def npz(save, **arrays: np.ndarray) -> bytes:
    data = io.BytesIO()
    save(data, PIXELS, np.arange(3), **arrays)
    return data.getvalue()


def read_picture(path: Path) -> None:
    to_rgb(decode_image(path.read_bytes(), "x"), "x")


def read_npy(path: Path) -> None:
    read_moments(open_store(path.parent), path.name.encode())


def read_zip(path: Path) -> None:
    store = open_store(path)
    if "dataset.json" not in store:                               # a damaged name
        return
    for name in store.names():
        outcome(lambda name=name: store.read(name))
    labels_by_content(store)


def read_npz(path: Path) -> None:
    images = open_images(path)
    if images.blocks is not None:
        list(images.blocks(range(i, i + 1) for i in range(min(images.count, 5))))


STATISTICS = {"mu": np.zeros(2), "sigma": np.eye(2), "about": np.array('{"images": 3}')}
WHOLE = {
    "png": (saved("PNG"), read_picture), "jpeg": (saved("JPEG"), read_picture), "webp": (saved("WEBP"), read_picture),
    "gif": (saved("GIF"), read_picture), "bmp": (saved("BMP"), read_picture), "tiff": (saved("TIFF"), read_picture),
    "lzw": (saved("TIFF", compression="tiff_lzw"), read_picture), "ppm": (saved("PPM"), read_picture),
    "animation": (saved("PNG", save_all=True, append_images=[Image.fromarray(PIXELS[1])]), read_picture),
    "npy": (npy(), read_npy), "zip": (archive(zipfile.ZIP_STORED), read_zip),
    "deflated": (archive(zipfile.ZIP_DEFLATED), read_zip),
    "npz": (npz(np.savez), read_npz), "compressed npz": (npz(np.savez_compressed, **STATISTICS), read_npz),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "file"


@pytest.mark.parametrize("kind", WHOLE)
def test_a_cut_file_gives_a_result_or_a_sentence(place, kind):
    whole, read = WHOLE[kind]
    place.write_bytes(whole)
    assert not isinstance(outcome(lambda: read(place)), UserError)
    for end in range(0, len(whole), max(len(whole) // 40, 1)):
        place.write_bytes(whole[:end])
        outcome(lambda: read(place))


@pytest.mark.parametrize("kind", WHOLE)
@examples(40)
@given(data=st.data())
def test_a_changed_byte_gives_a_result_or_a_sentence(place, kind, data):
    whole, read = WHOLE[kind]
    # Headers are at the beginning, those of a zip at its end: most examples are there.
    at = data.draw(st.one_of(st.integers(0, min(120, len(whole) - 1)),
                             st.integers(max(len(whole) - 200, 0), len(whole) - 1), st.integers(0, len(whole) - 1)))
    place.write_bytes(whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1:])
    outcome(lambda: read(place))
