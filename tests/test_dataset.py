"""The data set: pairing by key, labels, damaged and hostile files, and an order of data that can start anywhere."""

import io
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import GlobalBatchSampler, LatentDataset
from models.vae import read_space
from runtime.catalogue import key_of
from runtime.messages import UserError
from runtime.stores import MAX_INFLATED, ZipStore, decode_image, open_store

VAE = {"vae": "tiny", "scale": 0.5, "shift": 0.0, "channels": 2, "downsampling": 4}
COUNT, SIDE, LABELS = 6, 16, [2, 0, 1, 2, 0, 1]
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


def image_name(i: int) -> str:
    return f"00000/img{i:08d}.png"


def moments_name(i: int) -> str:
    return f"00000/img-mean-std-{i:08d}.npy"


def png(value: int, size=(SIDE, SIDE), mode="RGB") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, (value, 2 * value, 3 * value)).convert(mode).save(data, "png")
    return data.getvalue()


def npy(value: float, shape=(4, 4, 4), dtype=np.float32) -> bytes:
    data = io.BytesIO()
    np.save(data, np.full(shape, value, dtype=dtype))
    return data.getvalue()


def labels_of(name, labels) -> list:
    return [[name(i), label] for i, label in enumerate(labels)]


def put(folder: Path, files: dict[str, bytes], metadata: dict | None = None) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    if metadata is not None:
        (folder / "dataset.json").write_text(json.dumps(metadata))


def write_data(place: Path, labels=tuple(LABELS), value: int = 0) -> Path:
    """A data set of six entries; `value` is added to the content of images and moments."""
    put(place / "images", {image_name(i): png(i + value) for i in range(COUNT)},
        {"labels": labels_of(image_name, labels)})
    put(place / "vae-sd", {moments_name(i): npy(i + value) for i in range(COUNT)},
        {"labels": labels_of(moments_name, labels), "vae": VAE})
    return place


def to_zip(folder: Path, compression=STORED) -> Path:
    """Replace a folder by a zip of it, not in sorted order, with folders and extra fields as `zip` writes them."""
    with zipfile.ZipFile(f"{folder}.zip", "w", compression) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            info = zipfile.ZipInfo.from_file(file, file.relative_to(folder).as_posix())
            info.extra = struct.pack("<HHI", 0xCAFE, 4, 7)
            archive.writestr(info, b"" if file.is_dir() else file.read_bytes(), compress_type=compression)
    shutil.rmtree(folder)
    return Path(f"{folder}.zip")


def relabel(data: Path, folder: str, labels: list | None) -> None:
    path = data / folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "labels": labels}))


@pytest.fixture
def data(tmp_path) -> Path:
    return write_data(tmp_path / "data")


def refuse(word: str, *args, **kwargs) -> None:
    with pytest.raises(UserError) as caught:
        LatentDataset(*args, **kwargs)
    assert word in str(caught.value) and "\n" not in str(caught.value), caught.value


# ---- reading ---------------------------------------------------------------------------------------------------------

def test_an_entry_is_what_was_written(data):
    entries = LatentDataset(data)
    assert len(entries) == COUNT and entries.num_classes == 3 and entries.resolution == SIDE
    assert entries.moments_shape == (4, 4, 4) and entries.vae_record == VAE
    assert entries.labels.dtype == np.int64 and entries.labels.tolist() == LABELS
    image, moments, label = entries[5]
    assert image.dtype == torch.uint8 and image.shape == (3, SIDE, SIDE) and image[:, 3, 4].tolist() == [5, 10, 15]
    assert moments.dtype == torch.float32 and moments.shape == (4, 4, 4) and (moments == 5).all()
    assert label == 1 and type(label) is int
    with pytest.raises(IndexError):
        entries[COUNT]


def test_image_axes_are_channel_row_column(data):
    picture = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    picture[2, 7, 1] = 200                                        # row 2, column 7, green
    Image.fromarray(picture).save(data / "images" / image_name(3))
    assert LatentDataset(data)[3][0][1, 2, 7] == 200


def test_half_precision_moments_are_widened(data):
    (data / "vae-sd" / moments_name(1)).write_bytes(npy(0.25, dtype=np.float16))
    moments = LatentDataset(data)[1][1]
    assert moments.dtype == torch.float32 and (moments == 0.25).all()


@pytest.mark.parametrize(("images", "compression"), [
    ("images", STORED), ("images.zip", DEFLATED), ("imagenet_256_vae", None), ("imagenet_256_vae.zip", None)])
def test_folders_and_zips_are_the_same_data(data, images, compression):
    """Also in forked workers, which share an open zip, and when the data set is pickled for spawned ones."""
    expected = LatentDataset(data)
    pairs = [expected[i] for i in range(COUNT)]
    (data / "images").rename(data / images.removesuffix(".zip"))
    if images.endswith(".zip"):
        to_zip(data / images.removesuffix(".zip"))
    if compression is not None:
        to_zip(data / "vae-sd", compression)
    entries = LatentDataset(data)
    assert entries.fingerprint == expected.fingerprint and entries.vae_record == VAE
    for (image, moments, label), pair in zip([entries[i] for i in range(COUNT)], pairs, strict=True):
        assert torch.equal(image, pair[0]) and torch.equal(moments, pair[1]) and label == pair[2]
    for one in (entries, pickle.loads(pickle.dumps(entries))):
        loader = torch.utils.data.DataLoader(one, batch_size=2, num_workers=2, multiprocessing_context="fork")
        assert torch.cat([batch[1] for batch in loader])[:, 0, 0, 0].tolist() == list(range(COUNT))


def test_forked_processes_read_one_zip_at_once(tmp_path):
    """A file position that is shared after a fork would mix up what the children read."""
    contents = {f"{i:03d}.npy": bytes([i]) * 50_000 for i in range(40)}
    put(tmp_path / "a", contents)
    store = ZipStore(to_zip(tmp_path / "a"))
    store.read("000.npy")

    def read_all(offset: int, queue) -> None:
        names = sorted(contents) * 5
        queue.put(all(store.read(name) == contents[name] for name in names[offset:]))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=read_all, args=(offset, queue)) for offset in (0, 7)]
    for child in children:
        child.start()
    assert [queue.get(timeout=300) for _ in children] == [True, True]
    for child in children:
        child.join()


def test_opening_reads_the_first_pair_alone(data):
    for folder, name in (("images", image_name), ("vae-sd", moments_name)):
        for i in range(1, COUNT):
            (data / folder / name(i)).write_bytes(b"damaged")
    assert len(LatentDataset(data)) == COUNT


def test_without_images_none_are_needed(data):
    with_images = LatentDataset(data).fingerprint
    shutil.rmtree(data / "images")
    entries = LatentDataset(data, with_images=False)
    image, moments, label = entries[4]
    assert image.numel() == 0 and image.dtype == torch.uint8 and (moments == 4).all() and label == 0
    assert entries.resolution is None and entries.fingerprint == with_images


def test_hidden_and_foreign_files_are_ignored(data):
    put(data / "images", dict.fromkeys([".hidden/img00000009.png", ".img9.png", "00000/readme.txt", "Thumbs.db"], b""))
    (data / "images" / "folder.png").mkdir()
    os.mkfifo(data / "images" / "pipe.png")                       # a read would never end
    assert len(LatentDataset(data)) == COUNT
    (data / "images" / "pipe.png").unlink()
    to_zip(data / "images")
    assert len(LatentDataset(data)) == COUNT


# ---- keys and labels -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "key"), [
    ("00000/img00000007.png", "00000/00000007"), ("00000/img-mean-std-00000007.npy", "00000/00000007"),
    ("cat.png", "cat"), ("img/imgage.v2.jpeg", "img/age.v2"), ("a.b/c", "a.b/c"), ("n01/my-img7.JPEG", "n01/my-img7")])
def test_key(name, key):
    assert key_of(name.encode()) == key.encode()


def test_pairs_by_key_not_by_position(tmp_path):
    """`b` is the second image, behind `imga`, and the first of the moments."""
    put(tmp_path / "images", {"b.png": png(1), "imga.png": png(2), "ü.png": png(3)})
    put(tmp_path / "vae-sd", {"img-mean-std-b.npy": npy(1), "a.npy": npy(2), "img-mean-std-ü.npy": npy(3)},
        {"labels": [["img-mean-std-ü.npy", 3], ["b.npy", 1], ["img-mean-std-a.npy", 2]]})
    entries = LatentDataset(tmp_path)
    assert [entries.key(i) for i in range(3)] == ["a", "b", "ü"]
    for (image, moments, label), value in zip([entries[i] for i in range(3)], (2, 1, 3), strict=True):
        assert image[0, 0, 0] == moments[0, 0, 0] == label == value


def test_labels_of_either_file_suffice(data):
    (data / "images" / "dataset.json").unlink()
    assert LatentDataset(data).labels.tolist() == LABELS
    relabel(data, "vae-sd", None)
    put(data / "images", {}, {"labels": labels_of(image_name, LABELS[::-1])})
    assert LatentDataset(data).labels.tolist() == LABELS[::-1]
    assert LatentDataset(data, with_images=False).labels.tolist() == LABELS[::-1]


def test_no_labels_are_one_class_with_a_notice(data, capsys, monkeypatch):
    relabel(data, "images", None)
    (data / "vae-sd" / "dataset.json").unlink()
    entries = LatentDataset(data)
    assert capsys.readouterr().err.count("no labels") == 1
    monkeypatch.setenv("RANK", "1")
    LatentDataset(data)
    assert capsys.readouterr().err == ""                          # printed by the first process only
    assert entries.num_classes == 1 and entries.labels.tolist() == [0] * COUNT and entries.vae_record is None


@pytest.mark.parametrize(("labels", "num_classes", "seen", "words"), [
    ([0, 500, 999] * 2, None, [0, 500, 999], ["997 of 1000", "(1, 2, 3, ...)"]),
    ([1, 2, 3] * 2, None, [1, 2, 3], ["1 of 4", "(0)"]),          # labels that begin with 1
    (LABELS, 10, [0, 1, 2], ["7 of 10", "(3, 4, 5, ...)"]), (LABELS, 3, [0, 1, 2], [])])
def test_classes_without_images_are_said(tmp_path, capsys, labels, num_classes, seen, words):
    entries = LatentDataset(write_data(tmp_path, labels), num_classes=num_classes)
    said = capsys.readouterr().err
    assert all(word in said for word in words) and bool(words) == bool(said)
    assert entries.classes_seen.tolist() == seen and entries.classes_seen.dtype == np.int64


def test_labels_may_list_more_files_and_fewer_classes(data):
    for folder, name in (("images", image_name), ("vae-sd", moments_name)):
        (data / folder / name(0)).unlink()
        (data / folder / name(3)).unlink()
    relabel(data, "images", [*labels_of(image_name, LABELS), ["00000/00000009.png", 1], ["00000/00000009.png", 2]])
    entries = LatentDataset(data, num_classes=10)
    assert entries.labels.tolist() == [0, 1, 0, 1] and entries.num_classes == 10


def test_the_fingerprint_is_that_of_old_checkpoints(data):
    """sha256 of the keys, fixed width, and the labels, int64 little-endian, in the order of the keys."""
    before = LatentDataset(data).fingerprint
    assert before == "83755881e0e977e4c158f2cdca7f6d64c0b34d9c30e06cbcbc4f43bc7880156d"
    assert LatentDataset(data, num_classes=9).fingerprint == before
    for folder, name in (("images", image_name), ("vae-sd", moments_name)):
        relabel(data, folder, labels_of(name, [2, 0, 1, 2, 0, 0]))
    assert LatentDataset(data).fingerprint != before


# ---- refusals --------------------------------------------------------------------------------------------------------

def remove(*names: str):
    return lambda data: [(data / name).unlink() for name in names]


def move(name: str, to: str):
    return lambda data: (data / name).rename(data / to)


def store(name: str, content: bytes):
    return lambda data: (data / name).write_bytes(content)


def label_images(*labels: int):
    return lambda data: relabel(data, "images", labels_of(image_name, labels))


IMAGES, MOMENTS = [[f"{folder}/{name(i)}" for i in range(COUNT)] for folder, name in (
    ("images", image_name), ("vae-sd", moments_name))]
ODD_NAMES = [store(f"images/{name}", png(1)) for name in ("a\nb.png", "\udcff.png", "\u2028.png")]


@pytest.mark.parametrize(("changes", "settings", "word"), [
    ([move("vae-sd", "x")], {}, "vae-sd.zip"),
    ([move("images", "x")], {}, "imagenet_256_vae.zip"),
    ([remove(*IMAGES, *MOMENTS)], {}, "no .npy file"),
    ([remove(MOMENTS[2])], {}, "1 of 6 images have no partner"),
    ([remove(MOMENTS[2], *IMAGES[3:5])], {}, "2 of 5 moments have no partner"),
    ([move(MOMENTS[2], "vae-sd/00000/7.npy")], {}, "00000/00000002) and 1 of 6 moments"),
    (ODD_NAMES, {}, "3 of 9 images have no partner"),
    (ODD_NAMES, {}, "(a\\nb, \\u2028, \\udcff)"),
    ([store("images/00000/00000003.jpg", png(3))], {}, "same key 00000/00000003"),
    ([move("vae-sd/dataset.json", "vae-sd/.unfinished.json")], {}, "not finished"),
    ([label_images(2, 0, 1, 2, 1, 1)], {}, "00000/00000004: label 1"),
    ([label_images(2, 0, 1, 2)], {}, "no label for 2 of 6 files"),
    ([], {"num_classes": 2}, "give at least 3"),
    ([], {"resolution": 32}, "16 px"),
    ([lambda data: put(data / "vae-sd", {}, {"vae": 7})], {}, '"vae"'),
    ([store(IMAGES[0], png(7, (8, 16)))], {}, "img00000000.png"),
    ([store(MOMENTS[0], npy(7, (4, 4, 2)))], {}, "img-mean-std-00000000.npy"),
    ([lambda data: (data / "images/loop").symlink_to(data / "images")], {}, "loop"),
    ([lambda data: (data / "images/loop").symlink_to(data / "images/loop")], {}, "Too many levels"),
    ([remove(IMAGES[0]), lambda data: (data / IMAGES[0]).symlink_to("nowhere")], {}, "No such file"),
])
def test_what_does_not_fit_is_refused(data, changes, settings, word):
    for change in changes:
        change(data)
    refuse(word, data, **settings)


@pytest.mark.parametrize(("field", "value"), [("scale", 0), ("scale", -0.5), ("scale", 1e-30), ("scale", 1e30),
                                              ("shift", 1e30)])
def test_a_latent_space_that_makes_zeros_or_infinities_is_refused(data, field, value):
    put(data / "vae-sd", {}, {"vae": {**VAE, field: value}})
    entries = LatentDataset(data)
    with pytest.raises(UserError, match=field):
        read_space(entries.vae_record, entries.moments_shape, entries.resolution, "data")


def test_no_data_folder(tmp_path):
    refuse("no such data folder", tmp_path / "none")


@pytest.mark.parametrize(("text", "word"), [
    *((text, "not JSON") for text in (b"{", b"", b"[" * 100_000, b'{"labels": "\xff"}', b"9" * 5000)),
    *((text, "must be an object") for text in (b"[]", b"NaN", b'"labels"')),
    *((json.dumps({"labels": wrong}).encode(), "whole number") for wrong in (
        7, True, "cat", {"a.png": 1}, [None], ["ab"], [[]], [["a.png"]], [[7, 7]], [["a.png", 1, 2]], [["a.png", True]],
        [["a.png", "7"]], [["a.png", 7.0]], [["a.png", float("nan")]], [["a.png", -1]], [["a.png", 10**400]],
        [["a.png", None]], [["a.png", [1]]], [["a\0.png", 1]])),
    (b'{"labels": [["\\ud800.png", 1]]}', "\\ud800.png"),
    (json.dumps({"labels": [[image_name(0), 10**12]]}).encode(), "below 10000000"),
    (json.dumps({"labels": [*labels_of(image_name, LABELS), [image_name(4), 3]]}).encode(), "label 0 and label 3"),
    (json.dumps({"labels": [["x" * 10_000, 1]] * 3}).encode(), "no label for 6"),
])
def test_hostile_metadata_is_refused(data, text, word):
    (data / "images" / "dataset.json").write_bytes(text)
    refuse(word, data)


def test_one_long_name_does_not_widen_all_others(data):
    relabel(data, "images", [*labels_of(image_name, LABELS), *([str(i), 0] for i in range(200)), ["x" * 2**20, 0]])
    tracemalloc.start()
    try:
        LatentDataset(data)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20      # instead of 207 MiB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("content", [b"", b"not a picture", png(7)[:60], png(7, (8, 16)), png(7, (8, 8)),
                                     png(7, mode="L"), png(7, mode="RGBA")])
def test_a_damaged_image_is_named(data, content):
    (data / IMAGES[3]).write_bytes(content)
    entries = LatentDataset(data)
    with pytest.raises(UserError, match="img00000003.png"):
        entries[3]


@pytest.mark.parametrize("content", [
    b"", b"\x93NUMPY", npy(7)[:-1], npy(7, (4, 4, 2)), npy(7, (4, 2, 2)), npy(7, dtype=np.int64), pickle.dumps([1]),
    npy(7, dtype=object), npy(7, (4, 0, 0)), b"PK\x03\x04 is no npz", npy(7).replace(b"{'descr'", b"['descr'"),
    npy(7).replace(b"(4, 4, 4), }", b"(4, 4, 9**99")])
def test_damaged_moments_are_named(data, content):
    (data / MOMENTS[3]).write_bytes(content)
    entries = LatentDataset(data)
    with pytest.raises(UserError, match="img-mean-std-00000003.npy"):
        entries[3]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_files_and_folders_without_permission(data):
    (data / IMAGES[0]).chmod(0)
    refuse("Permission denied", data)
    (data / "images" / "00000").chmod(0)
    refuse("cannot be listed", data)
    (data / "images" / "00000").chmod(0o755)


@pytest.mark.filterwarnings("ignore")                           # Pillow's, of large pictures
def test_a_picture_is_measured_before_it_is_decoded():
    """11,600 x 11,600 px, over the limit, in a file whose pixels are missing."""
    header = struct.pack(">IIBBBBB", 11_600, 11_600, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(UserError, match="more than 134217728 pixels"):
        decode_image(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + bytes(4), "x.png")


# ---- zips that are made to do harm -----------------------------------------------------------------------------------

def zipped(path: Path, files: dict[str, bytes], compression=STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def mend(path: Path, field: int, value: int) -> None:
    """Overwrite a number (4 bytes) of the first entry in a zip's central directory."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.index(b"PK\x01\x02") + field, value)
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["../a.png", "a/../../b.png", "/etc/a.png", "//a.png", "a//b.png", "./a.png", "..",
                                  "C:/a.png", "c:a.png", "a\\..\\b.png", "a\\b.png", "x" * 5000, "../", "/",
                                  "nulX.png"])
def test_names_that_lead_out_of_a_folder_are_refused(tmp_path, name):
    path = zipped(tmp_path / "a.zip", {"good.png": b"", name: b""})
    path.write_bytes(path.read_bytes().replace(b"nulX", b"nul\0"))
    with pytest.raises(UserError, match="no relative name"):
        open_store(path).names()


def test_one_name_twice_in_a_zip_is_refused(tmp_path):
    path = zipped(tmp_path / "a.zip", {"a.png": b"1", "b.png": b"2"})
    path.write_bytes(path.read_bytes().replace(b"b.png", b"a.png"))
    with pytest.raises(UserError, match="two files named a.png"):
        open_store(path).names()


def test_a_damaged_zip(data):
    path = to_zip(data / "vae-sd")
    whole = path.read_bytes()
    place = whole.index(npy(3)) + 140                             # in the numbers, behind npy's header
    path.write_bytes(whole[:place] + b"\xff" + whole[place + 1:])
    entries = LatentDataset(data)
    assert (entries[2][1] == 2).all()
    with pytest.raises(UserError, match="00000003.npy: damaged"):
        entries[3]
    with pytest.raises(UserError, match="no such file"):
        entries.moments.read(moments_name(3) + "x")
    path.write_bytes(whole[:-30])
    refuse("not a readable zip", data)


def test_no_more_is_inflated_than_the_zip_declares(tmp_path):
    path = zipped(tmp_path / "a.zip", {"bomb.png": bytes(50 << 20)}, DEFLATED)
    mend(path, 24, 100)                                           # the size
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="bomb.png: damaged"):
            open_store(path).read("bomb.png")
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("field", "value", "compression", "word"), [
    (42, 10_000, STORED, "outside"), (42, 2**31, STORED, "outside"),              # the offset
    (20, 10_000, STORED, "outside"),                                              # the compressed size
    (24, MAX_INFLATED + 1, DEFLATED, "the limit"),                                # the size
    (10, 12, STORED, "unusual compression"), (8, 1, STORED, "encrypted")])
def test_impossible_entries_of_a_zip_are_refused(tmp_path, field, value, compression, word):
    path = zipped(tmp_path / "a.zip", {"a.png": b"1234"}, compression)
    mend(path, field, value)
    with pytest.raises(UserError, match=word):
        open_store(path).names()


# ---- order -----------------------------------------------------------------------------------------------------------

def draws(count: int, *args, **kwargs) -> list[list[int]]:
    return list(islice(GlobalBatchSampler(*args, **kwargs), count))


def test_every_epoch_is_a_permutation_of_its_own():
    flat = sum(draws(12, 10, 5, seed=3), [])                      # six epochs
    epochs = [flat[i:i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert flat == sum(draws(12, 10, 5, seed=3), []) != sum(draws(12, 10, 5, seed=4), [])


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (10, 10), (3, 8), (1, 4), (7, 16)])
def test_batches_cut_the_endless_sequence(size, batch):
    """The permutations of numpy's generator from (seed, epoch), end to end: the order of old runs."""
    sequence = [int(i) for epoch in range(40) for i in np.random.default_rng([0, epoch]).permutation(size)]
    assert sum(draws(2, size, batch, seed=0), []) == sequence[:2 * batch]


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (3, 8), (100, 32)])
@pytest.mark.parametrize("start", [1, 5, 17])
def test_starting_later_continues_the_same_order(size, batch, start):
    shared = dict(seed=1, accumulation=2, rank=1, world_size=2)
    assert draws(6, size, batch, start=start, **shared) == draws(6 + 2 * start, size, batch, **shared)[2 * start:]


def test_micro_batches_of_all_ranks_make_up_the_global_batch():
    whole = draws(3, 50, 24, seed=0)
    ranks = [draws(6, 50, 24, seed=0, accumulation=2, rank=rank, world_size=3) for rank in range(3)]
    assert all(len(piece) == 4 for rank in ranks for piece in rank)
    for draw in range(3):
        pieces = [ranks[rank][2 * draw + micro] for micro in range(2) for rank in range(3)]
        assert sum(pieces, []) == whole[draw]


def test_indivisible_batch():
    with pytest.raises(UserError, match="multiple of 6"):
        GlobalBatchSampler(100, 10, seed=0, accumulation=3, world_size=2)


def test_sampler_drives_a_loader(data):
    sampler = GlobalBatchSampler(COUNT, 4, seed=0)
    loader = torch.utils.data.DataLoader(LatentDataset(data), batch_sampler=sampler, num_workers=1)
    for (_, moments, _), indices in zip(islice(loader, 4), draws(4, COUNT, 4, seed=0), strict=True):
        assert moments[:, 0, 0, 0].tolist() == indices
