"""The data set: pairing by key, labels, faults named at the door, and an order of data that can start anywhere."""

import io
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

import dataset as module
from dataset import GlobalBatchSampler, LatentDataset
from runtime.catalogue import key_of, list_keyed
from runtime.messages import UserError
from runtime.stores import FolderStore, ZipStore, open_store

VAE = {"vae": "tiny", "scale": 0.5, "shift": 0.0, "channels": 2, "downsampling": 4}
COUNT, SIDE = 6, 16


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


def put(folder: Path, files: dict[str, bytes], metadata: dict | None) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    if metadata is not None:
        (folder / "dataset.json").write_text(json.dumps(metadata))


def to_zip(folder: Path, compression=zipfile.ZIP_STORED) -> None:
    """Replace a folder by a zip of it, in an order that is not the sorted one, with folders and extra fields as `zip` writes them."""
    with zipfile.ZipFile(f"{folder}.zip", "w", compression) as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            info = zipfile.ZipInfo.from_file(file, file.relative_to(folder).as_posix())
            info.extra = struct.pack("<HHI", 0xCAFE, 4, 7)
            archive.writestr(info, b"" if file.is_dir() else file.read_bytes(), compress_type=compression)
    shutil.rmtree(folder)


@pytest.fixture
def data(tmp_path) -> Path:
    labels = [2, 0, 1, 2, 0, 1]
    put(tmp_path / "images", {image_name(i): png(i) for i in range(COUNT)}, {"labels": labels_of(image_name, labels)})
    put(tmp_path / "vae-sd", {moments_name(i): npy(i) for i in range(COUNT)}, {"labels": labels_of(moments_name, labels), "vae": VAE})
    return tmp_path


def relabel(data: Path, folder: str, labels: list | None) -> None:
    path = data / folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "labels": labels}))


# ---- reading --------------------------------------------------------------------------------------------------------------------------

def test_entry_holds_what_was_written(data):
    entries = LatentDataset(data)
    assert len(entries) == COUNT and entries.num_classes == 3 and entries.resolution == SIDE
    assert entries.moments_shape == (4, 4, 4) and entries.vae_record == VAE
    assert entries.labels.dtype == np.int64 and entries.labels.tolist() == [2, 0, 1, 2, 0, 1]
    image, moments, label = entries[5]
    assert image.dtype == torch.uint8 and image.shape == (3, SIDE, SIDE) and image[:, 3, 4].tolist() == [5, 10, 15]
    assert moments.dtype == torch.float32 and moments.shape == (4, 4, 4) and (moments == 5).all()
    assert label == 1 and type(label) is int
    with pytest.raises(IndexError):
        entries[COUNT]


def test_image_axes_are_channel_row_column(data):
    picture = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    picture[2, 7, 1] = 200                                                        # row 2, column 7, green
    Image.fromarray(picture).save(data / "images" / image_name(3))
    assert LatentDataset(data)[3][0][1, 2, 7] == 200


def test_half_precision_moments_are_widened(data):
    (data / "vae-sd" / moments_name(1)).write_bytes(npy(0.25, dtype=np.float16))
    moments = LatentDataset(data)[1][1]
    assert moments.dtype == torch.float32 and (moments == 0.25).all()


@pytest.mark.parametrize("images", ["images", "images.zip", "imagenet_256_vae", "imagenet_256_vae.zip"])
@pytest.mark.parametrize("compression", [None, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_folders_and_zips_give_the_same(data, images, compression):
    expected = LatentDataset(data)
    pairs = [expected[i] for i in range(COUNT)]
    if not images.startswith("images"):
        (data / "images").rename(data / images.removesuffix(".zip"))
    if images.endswith(".zip"):
        to_zip(data / images.removesuffix(".zip"))
    if compression is not None:
        to_zip(data / "vae-sd", compression)
    entries = LatentDataset(data)
    assert entries.fingerprint == expected.fingerprint and entries.vae_record == VAE
    for (image, moments, label), (image_0, moments_0, label_0) in zip([entries[i] for i in range(COUNT)], pairs, strict=True):
        assert torch.equal(image, image_0) and torch.equal(moments, moments_0) and label == label_0


@pytest.mark.parametrize("context, zipped", [("fork", False), ("fork", True), ("spawn", True)])
def test_workers_read_what_one_process_reads(data, context, zipped):
    if zipped:
        to_zip(data / "vae-sd")
        to_zip(data / "images", zipfile.ZIP_DEFLATED)
    entries = LatentDataset(data)
    entries[0]  # opens the zips before the fork
    loader = torch.utils.data.DataLoader(entries, batch_size=2, num_workers=2, multiprocessing_context=context)
    moments = torch.cat([batch[1] for batch in loader])
    assert moments[:, 0, 0, 0].tolist() == list(range(COUNT))


def test_pickled_store_reads(data):
    to_zip(data / "vae-sd")
    store = open_store(data / "vae-sd.zip")
    before = store.read(moments_name(2))
    assert pickle.loads(pickle.dumps(store)).read(moments_name(2)) == before == npy(2)


def test_reading_from_forked_processes_at_once(tmp_path):
    """One file position shared after a fork would mix up what the children read."""
    contents = {f"{i:03d}.npy": bytes([i]) * 50_000 for i in range(40)}
    put(tmp_path / "a", contents, None)
    to_zip(tmp_path / "a")
    store = ZipStore(tmp_path / "a.zip")
    store.read("000.npy")

    def whole(offset: int, queue) -> None:
        names = sorted(contents) * 5
        queue.put(all(store.read(name) == contents[name] for name in names[offset:]))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=whole, args=(offset, queue)) for offset in (0, 7)]
    for child in children:
        child.start()
    assert [queue.get(timeout=300) for _ in children] == [True, True]
    for child in children:
        child.join()


def test_listing_opens_no_file(data, monkeypatch):
    opened = []
    read = FolderStore.read

    def spy(self, name):
        opened.append(name)
        return read(self, name)

    monkeypatch.setattr(FolderStore, "read", spy)
    LatentDataset(data)
    assert sorted(name for name in opened if name != "dataset.json") == [moments_name(0).encode(), image_name(0).encode()]


def test_without_images_none_are_needed(data):
    with_images = LatentDataset(data).fingerprint
    shutil.rmtree(data / "images")
    entries = LatentDataset(data, with_images=False)
    image, moments, label = entries[4]
    assert image.numel() == 0 and image.dtype == torch.uint8 and (moments == 4).all() and label == 0
    assert entries.resolution == SIDE and entries.fingerprint == with_images


def test_hidden_and_foreign_files_are_ignored(data):
    put(data / "images", {".hidden/img00000009.png": b"", ".img00000009.png": b"", "00000/readme.txt": b"", "00000/Thumbs.db": b""}, None)
    put(data / "vae-sd", {"00000/.img-mean-std-00000009.npy.tmp": b""}, None)
    assert len(LatentDataset(data)) == COUNT
    to_zip(data / "images")
    assert len(LatentDataset(data)) == COUNT


# ---- keys -----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, key", [
    ("00000/img00000007.png", "00000/00000007"), ("00000/img-mean-std-00000007.npy", "00000/00000007"), ("cat.png", "cat"),
    ("img/imgage.v2.jpeg", "img/age.v2"), ("a.b/c", "a.b/c"), ("n01/my-img7.JPEG", "n01/my-img7"),
])
def test_key(name, key):
    assert key_of(name.encode()) == key.encode()


def test_pairs_by_key_not_by_position(tmp_path):
    """`b` sorts behind `img...` among the images and before it among the moments."""
    put(tmp_path / "images", {"b.png": png(1), "imga.png": png(2), "ü.png": png(3)}, None)
    put(tmp_path / "vae-sd", {"img-mean-std-b.npy": npy(1), "a.npy": npy(2), "img-mean-std-ü.npy": npy(3)},
        {"labels": [["img-mean-std-ü.npy", 3], ["b.npy", 1], ["img-mean-std-a.npy", 2]]})
    entries = LatentDataset(tmp_path)
    assert [entries.key(i) for i in range(3)] == ["a", "b", "ü"]
    assert [(int(image[0, 0, 0]), int(moments[0, 0, 0]), label) for image, moments, label in (entries[i] for i in range(3))] == \
        [(2, 2, 2), (1, 1, 1), (3, 3, 3)]


def test_hundred_thousand_names(monkeypatch):
    """Names and labels are arrays of plain bytes and numbers; matching them is not quadratic."""
    count = 100_000
    store = FolderStore("nowhere")
    names = np.array([f"{i // 1000:05d}/img{i:08d}.png".encode() for i in range(count)])
    order = np.random.default_rng(0).permutation(count)
    monkeypatch.setattr(FolderStore, "names", lambda self: names[order])
    monkeypatch.setattr(module, "read_metadata", lambda store: {"labels": [[names[i].decode(), i % 7] for i in order.tolist()]})
    keys, paired = list_keyed(store, (b".png",))
    assert keys.dtype.kind == paired.dtype.kind == "S"
    assert (paired == names).all() and keys[12345] == b"00012/00012345"
    assert (module.read_labels(store, keys) == np.arange(count) % 7).all()


# ---- labels ---------------------------------------------------------------------------------------------------------------------------

def test_labels_of_either_file_suffice(data):
    (data / "images" / "dataset.json").unlink()
    assert LatentDataset(data).labels.tolist() == [2, 0, 1, 2, 0, 1]
    relabel(data, "vae-sd", None)
    put(data / "images", {}, {"labels": labels_of(image_name, [5, 4, 3, 2, 1, 0])})
    assert LatentDataset(data).labels.tolist() == [5, 4, 3, 2, 1, 0]
    assert LatentDataset(data, with_images=False).labels.tolist() == [5, 4, 3, 2, 1, 0]


def test_no_labels_is_one_class_and_said(data, capsys, monkeypatch):
    relabel(data, "images", None)
    (data / "vae-sd" / "dataset.json").unlink()
    entries = LatentDataset(data)
    assert capsys.readouterr().err.count("no labels") == 1
    monkeypatch.setenv("RANK", "1")
    LatentDataset(data)
    assert capsys.readouterr().err == ""                                          # said once, by the first process
    assert entries.num_classes == 1 and entries.labels.tolist() == [0] * COUNT and entries.vae_record is None


def test_labels_may_list_more_files_than_there_are(data):
    for folder, name in (("images", image_name), ("vae-sd", moments_name)):
        (data / folder / name(0)).unlink()
        (data / folder / name(3)).unlink()
    assert LatentDataset(data).labels.tolist() == [0, 1, 0, 1]


def test_num_classes_may_exceed_the_labels(data, capsys):
    assert LatentDataset(data, num_classes=10).num_classes == 10
    assert capsys.readouterr().err == ""


def test_fingerprint_tells_keys_and_labels(data):
    before = LatentDataset(data).fingerprint
    assert len(before) == 64 and before == LatentDataset(data, num_classes=9).fingerprint
    for folder, name in (("images", image_name), ("vae-sd", moments_name)):
        relabel(data, folder, labels_of(name, [2, 0, 1, 2, 0, 0]))
    assert LatentDataset(data).fingerprint != before


# ---- faults ---------------------------------------------------------------------------------------------------------------------------

def refuse(match: str, *args, **kwargs) -> None:
    with pytest.raises(UserError, match=match) as caught:
        LatentDataset(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_missing_or_empty_data(tmp_path):
    refuse("does not exist", tmp_path / "none")
    refuse("looked for vae-sd, vae-sd.zip", tmp_path)
    (tmp_path / "vae-sd").mkdir()
    refuse("looked for images, images.zip, imagenet_256_vae, imagenet_256_vae.zip", tmp_path)
    (tmp_path / "images").mkdir()
    refuse("no .npy", tmp_path)


def test_unpaired_entries_are_counted_and_named(data):
    (data / "vae-sd" / moments_name(2)).unlink()
    refuse(r"1 of 6 images have no partner in .*vae-sd \(00000/00000002\)", data)
    for i in (0, 1, 3, 4):
        (data / "images" / image_name(i)).unlink()
    refuse(r"1 of 2 images .* and 4 of 5 moments have no partner in .*images "
           r"\(00000/00000000, 00000/00000001, 00000/00000003, \.\.\.\)", data)


def test_as_many_moments_as_images_but_of_others(data):
    (data / "vae-sd" / moments_name(2)).rename(data / "vae-sd" / moments_name(7))
    refuse(r"1 of 6 images .*00000/00000002.* and 1 of 6 moments .*00000/00000007", data)


def test_two_files_with_one_key(data):
    put(data / "images", {"00000/00000003.jpg": png(3)}, None)
    refuse("00000/00000003.jpg, 00000/img00000003.png have the same key", data)


def test_label_faults(data):
    refuse("00000/00000000 has label 2.*num_classes 2", data, num_classes=2)
    relabel(data, "images", labels_of(image_name, [2, 0, 1, 2, 1, 1]))
    refuse("00000/00000004 has label 1 in .*images.* and 0 in .*vae-sd", data)
    relabel(data, "images", labels_of(image_name, [2, 0, 1, 2]))
    refuse(r"no label for 2 of 6 files \(00000/00000004, 00000/00000005\)", data)
    for wrong in ([["00000/img00000000.png"]], [["00000/img00000000.png", -1]], [["00000/img00000000.png", 0.5]], 7,
                  [["00000/img00000000.png", [0, 1]]], [["00000/img00000000.png", "cat"]]):
        relabel(data, "images", wrong)
        refuse("whole number", data)
    relabel(data, "images", [*labels_of(image_name, [2, 0, 1, 2, 0, 1]), ["00000/00000009.png", 1], ["00000/00000009.png", 2]])
    assert len(LatentDataset(data)) == COUNT                                      # of a file that is not there


@pytest.mark.parametrize("text, sentence", [
    (b"{", "not JSON"), (b"", "not JSON"), (b"[" * 100_000, "not JSON"), (b'{"labels": "\xff"}', "not JSON"), (b"9" * 5000, "not JSON"),
    (b"[]", "must be an object"), (b"NaN", "must be an object"), (b'"labels"', "must be an object"),
    *((json.dumps({"labels": wrong}).encode(), "whole number") for wrong in (
        True, "cat", 0.5, {"00000/img00000000.png": 1}, [None], ["ab"], [[]], [[7, 7]], [["a.png", 1, 2]], [["a.png", True]],
        [["a.png", "7"]], [["a.png", 7.0]], [["a.png", float("nan")]], [["a.png", -1]], [["a.png", 2**63]], [["a.png", 10**400]],
        [["a.png", None]], [["a.png", [[1]]]], [["a\0.png", 1]])),
    (b'{"labels": [["\\ud800.png", 1]]}', r"names \\ud800.png, which no file can be called"),
    (json.dumps({"labels": [*labels_of(image_name, [2, 0, 1, 2, 0, 1]), [image_name(4), 3]]}).encode(),
     "lists 00000/00000004 with label 0 and with label 3"),
    (json.dumps({"labels": [["x" * 10_000, 1]] * 3}).encode(), "no label for 6 of 6 files"),
], ids=lambda value: str(value)[:40])
def test_hostile_metadata_is_refused_in_one_sentence(data, text, sentence):
    (data / "images" / "dataset.json").write_bytes(text)
    refuse(f"{data}/images/dataset.json.*{sentence}", data)


def test_one_long_name_does_not_widen_all_others(data):
    relabel(data, "images", [*labels_of(image_name, [2, 0, 1, 2, 0, 1]), *([str(i), 0] for i in range(200)), ["x" * 2**20, 0]])
    tracemalloc.start()
    try:
        LatentDataset(data)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20                      # and not 207 MiB
    finally:
        tracemalloc.stop()


def test_resolution_that_does_not_fit(data):
    assert LatentDataset(data, resolution=SIDE).resolution == SIDE
    refuse("resolution 32 was asked for and the images are 16 px", data, resolution=32)
    refuse("resolution 32 does not fit the moments", data, resolution=32, with_images=False)
    for i in range(COUNT):
        (data / "images" / image_name(i)).write_bytes(png(i, (32, 32)))
    refuse("resolution 32 does not fit the moments", data)
    put(data / "vae-sd", {}, {"labels": None})
    assert LatentDataset(data).resolution == 32  # nothing recorded: any whole multiple may be right
    assert LatentDataset(data, with_images=False).resolution is None
    assert LatentDataset(data, with_images=False, resolution=64).resolution == 64
    refuse("does not fit", data, with_images=False, resolution=30)


def test_record_of_another_vae(data):
    put(data / "vae-sd", {}, {"labels": None, "vae": {**VAE, "channels": 4}})
    refuse("4 channels", data)
    for wrong in ({"scale": 1}, [], 7, {**VAE, "channels": "4"}, {**VAE, "downsampling": 0}, {**VAE, "channels": None},
                  {**VAE, "downsampling": True}):
        put(data / "vae-sd", {}, {"labels": None, "vae": wrong})
        refuse("channels and downsampling", data)
    for wrong in ({**VAE, "scale": float("nan")}, {**VAE, "shift": "0"}, {**VAE, "scale": float("inf")}):
        put(data / "vae-sd", {}, {"labels": None, "vae": wrong})
        refuse("a finite scale and shift", data)


@pytest.mark.parametrize("content", [b"", b"not a picture", png(7)[:60], png(7, (8, 16)),
                                     png(7, (8, 8)), png(7, mode="L"), png(7, mode="RGBA")])
def test_damaged_image_is_named(data, content):
    (data / "images" / image_name(3)).write_bytes(content)
    entries = LatentDataset(data)
    with pytest.raises(UserError, match="img00000003.png"):
        entries[3]
    (data / "images" / image_name(0)).write_bytes(content)
    if content != png(7, (8, 8)):  # a readable square: a matter of resolution, not of damage
        refuse("img00000000.png", data)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", npy(7)[:-1], npy(7, (4, 4, 2)), npy(7, (4, 2, 2)),
                                     npy(7, dtype=np.int64), pickle.dumps([1]), npy(7, dtype=object), npy(7, (4, 0, 0)),
                                     b"PK\x03\x04 is no npz", npy(7).replace(b"{'descr'", b"['descr'"),
                                     npy(7).replace(b"(4, 4, 4), }", b"(4, 4, 9**99")])
def test_damaged_moments_are_named(data, content):
    (data / "vae-sd" / moments_name(3)).write_bytes(content)
    entries = LatentDataset(data)
    with pytest.raises(UserError, match="img-mean-std-00000003.npy"):
        entries[3]
    (data / "vae-sd" / moments_name(0)).write_bytes(content)
    if content != npy(7, (4, 2, 2)):  # readable: a matter of resolution, not of damage
        refuse("img-mean-std-00000000.npy", data)


def test_damaged_zip(data):
    to_zip(data / "vae-sd")
    path = data / "vae-sd.zip"
    whole = path.read_bytes()
    place = whole.index(npy(3)) + 140                                             # in the numbers, behind npy's header
    path.write_bytes(whole[:place] + b"\xff" + whole[place + 1:])
    entries = LatentDataset(data)
    assert (entries[2][1] == 2).all()
    with pytest.raises(UserError, match="img-mean-std-00000003.npy is damaged"):
        entries[3]
    with pytest.raises(UserError, match="no file 00000/img-mean-std-00000003.npyx"):
        entries.moments.read(moments_name(3) + "x")
    path.write_bytes(whole[:-30])
    refuse("not a readable zip", data)


def test_unfinished_folder_is_refused(data):
    (data / "vae-sd" / "dataset.json").rename(data / "vae-sd" / ".unfinished.json")
    refuse("vae-sd is not finished", data)


# ---- files that are made to do harm ---------------------------------------------------------------------------------------------------

def zipped(path: Path, files: dict[str, bytes], compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def mend(path: Path, field: int, value: int) -> None:
    """Write another number (4 bytes) over a field of the first entry of a zip's central directory."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.index(b"PK\x01\x02") + field, value)
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["../a.png", "a/../../b.png", "/etc/a.png", "//a.png", "a//b.png", "./a.png", "..", "C:/a.png", "c:a.png",
                                  "a\\..\\b.png", "a\\b.png", "x" * 5000, "../", "/"])
def test_names_that_lead_out_of_a_folder_are_refused(tmp_path, name):
    path = zipped(tmp_path / "a.zip", {"good.png": b"", name: b""})
    with pytest.raises(UserError, match="a.zip holds .*: expected relative names"):
        open_store(path)


def test_a_name_with_a_nul_is_refused(tmp_path):
    path = zipped(tmp_path / "a.zip", {"good.pngX.txt": b""})
    path.write_bytes(path.read_bytes().replace(b"X", b"\0"))
    with pytest.raises(UserError, match=r"holds good.png\\x00.txt"):
        open_store(path)


def test_one_name_twice_in_a_zip_is_refused(tmp_path):
    path = zipped(tmp_path / "a.zip", {"a.png": b"1", "b.png": b"2"})
    path.write_bytes(path.read_bytes().replace(b"b.png", b"a.png"))
    with pytest.raises(UserError, match="a.zip holds two files named a.png"):
        open_store(path)


def test_a_file_that_is_inflated_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        zipped(tmp_path / f"{compression}.zip", {"a/bomb.png": bytes(1001)}, compression)
    monkeypatch.setattr(module, "MAX_INFLATED", 1001)
    assert open_store(tmp_path / "8.zip").read("a/bomb.png") == bytes(1001)
    monkeypatch.setattr(module, "MAX_INFLATED", 1000)
    with pytest.raises(UserError, match="a/bomb.png of 1001 bytes, compressed: expected at most 1000"):
        open_store(tmp_path / "8.zip")
    assert open_store(tmp_path / "0.zip").read("a/bomb.png") == bytes(1001)         # which inflates nothing


def test_no_more_is_inflated_than_the_zip_declares(tmp_path):
    path = zipped(tmp_path / "a.zip", {"bomb.png": bytes(50 << 20)}, zipfile.ZIP_DEFLATED)
    mend(path, 24, 100)                                                           # the size
    store = open_store(path)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="bomb.png is damaged"):
            store.read("bomb.png")
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("field, value", [(42, 10_000), (42, 2**31), (20, 10_000)])  # the offset, the compressed size
def test_places_outside_of_the_zip_are_refused(tmp_path, field, value):
    path = zipped(tmp_path / "a.zip", {"a.png": b"1234"})
    mend(path, field, value)
    with pytest.raises(UserError, match=f"a.zip holds a.png outside of its {path.stat().st_size} bytes"):
        open_store(path)


def test_links_are_followed_but_not_in_a_circle(data, tmp_path):
    (data / "images" / "00000").rename(tmp_path / "elsewhere")
    (data / "images" / "00000").symlink_to(tmp_path / "elsewhere")
    assert len(LatentDataset(data)) == COUNT
    (data / "images" / "loop").symlink_to(data / "images")
    refuse("images/loop/ is a link to a folder that holds it", data)
    (data / "images" / "loop").unlink()
    (data / "images" / "loop").symlink_to(data / "images" / "loop")
    refuse("cannot list .*images/loop: Too many levels", data)


def test_what_is_named_like_a_picture_and_is_none(data):
    (data / "images" / "folder.png").mkdir()
    os.mkfifo(data / "images" / "pipe.png")                                       # to read it would never end
    assert len(LatentDataset(data)) == COUNT
    (data / "images" / image_name(0)).unlink()
    (data / "images" / image_name(0)).symlink_to(data / "nowhere")
    refuse("cannot read .*img00000000.png: No such file", data)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_files_and_folders_without_permission(data):
    (data / "images" / image_name(0)).chmod(0)
    refuse("cannot read .*img00000000.png: Permission denied", data)
    (data / "images" / "00000").chmod(0)
    refuse("cannot list .*images/00000/: Permission denied", data)
    (data / "images" / "00000").chmod(0o755)


def test_a_picture_is_measured_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", SIDE * SIDE)
    assert module.decode_image(png(1), "x").size == (SIDE, SIDE)
    large = png(1, (SIDE, SIDE + 1))
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    with pytest.raises(UserError, match=f"x.png has more than {SIDE * SIDE} pixels: make it smaller"):
        module.decode_image(large, "x.png")


def test_faulty_names_are_shown_on_one_line(data):
    for name in ("a\nb.png", "\udcff.png", "\u2028.png"):
        (data / "images" / name).write_bytes(png(1))
    refuse(r"3 of 9 images have no partner in .* \(a\\nb, \\u2028, \\udcff\)", data)


# ---- order ----------------------------------------------------------------------------------------------------------------------------

def draws(count: int, *args, **kwargs) -> list[list[int]]:
    return list(islice(GlobalBatchSampler(*args, **kwargs), count))


def test_every_epoch_is_a_permutation_of_its_own():
    flat = sum(draws(12, 10, 5, seed=3), [])                                      # six epochs
    epochs = [flat[i:i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert flat != sum(draws(12, 10, 5, seed=4), [])
    assert flat == sum(draws(12, 10, 5, seed=3), [])


@pytest.mark.parametrize("size, batch", [(10, 4), (10, 10), (3, 8), (1, 4), (7, 16)])
def test_batches_cut_the_endless_sequence(size, batch):
    sequence = [int(i) for epoch in range(40) for i in np.random.default_rng([0, epoch]).permutation(size)]
    assert sum(draws(2, size, batch, seed=0), []) == sequence[:2 * batch]
    single = sum(draws(30, size, 1, seed=0), [])
    assert sum(draws(2, size, batch, seed=0), [])[:30] == single[:2 * batch]


@pytest.mark.parametrize("size, batch", [(10, 4), (3, 8), (100, 32)])
@pytest.mark.parametrize("start", [1, 2, 5, 17])
def test_starting_later_continues_the_same_order(size, batch, start):
    for rank in (0, 1):
        shared = dict(seed=1, accumulation=2, rank=rank, world_size=2)
        assert draws(6, size, batch, start=start, **shared) == draws(6 + 2 * start, size, batch, **shared)[2 * start:]


def test_micro_batches_of_all_ranks_make_up_the_global_batch():
    whole = draws(3, 50, 24, seed=0)
    ranks = [draws(6, 50, 24, seed=0, accumulation=2, rank=rank, world_size=3) for rank in range(3)]
    assert all(len(piece) == 4 for rank in ranks for piece in rank)
    for draw in range(3):
        pieces = [ranks[rank][2 * draw + micro] for micro in range(2) for rank in range(3)]
        assert sum(pieces, []) == whole[draw]


def test_indivisible_batch():
    with pytest.raises(UserError, match="batch size 10 .* 2 processes x 3 accumulation steps: give a multiple of 6"):
        GlobalBatchSampler(100, 10, seed=0, accumulation=3, world_size=2)


def test_sampler_drives_a_loader(data):
    entries = LatentDataset(data)
    loader = torch.utils.data.DataLoader(entries, batch_sampler=GlobalBatchSampler(COUNT, 4, seed=0), num_workers=1)
    for (_, moments, _), indices in zip(islice(loader, 4), draws(4, COUNT, 4, seed=0), strict=True):
        assert moments[:, 0, 0, 0].tolist() == indices
