"""Preparing a data set: ADM's crop, convert, encode and check, begun, continued and refused, by one process and two."""

import io
import json
import multiprocessing
import os
import resource
import runpy
import shutil
import socket
import struct
import sys
import zipfile
import zlib
from collections import namedtuple
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image

from dataset import LatentDataset
from models.vae import LatentSpace, load_codec
from preprocessing.convert import image_name, parse_resolution, to_png
from preprocessing.crop import center_crop, to_rgb
from preprocessing.dataset_tools import main
from preprocessing.destination import Destination
from runtime.catalogue import Catalogue, catalogue_file
from runtime.launch import leave_processes
from runtime.messages import UserError
from runtime.speed import compiler_works
from runtime.stores import IMAGE_EXTENSIONS, open_store

ROOT = Path(__file__).resolve().parent.parent
NAMES = [f"00000/img{i:08d}.png" for i in range(10)]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random RGB picture."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def saved(picture: Image.Image, form: str, **options) -> bytes:
    data = io.BytesIO()
    picture.save(data, form, **options)
    return data.getvalue()


def put(path: Path, content: bytes | Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else saved(content, "png"))
    return path


def convert(source, dest, *flags: str) -> None:
    main(["convert", f"--source={source}", f"--dest={dest}", "--resolution=32x32", "--workers=0", *flags])


def encode(source, dest, *flags: str) -> None:
    main(["encode", f"--source={source}", f"--dest={dest}", "--batch-size=4", "--workers=0", *flags])


def fork(run, *args, **variables: str) -> BaseProcess:
    """Start run(*args) as a process of its own with these environment variables, without importing torch again."""
    def child() -> None:
        os.environ.update(variables)
        PartialState._reset_state()                               # this process may have joined nobody before
        run(*args)
        leave_processes()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def refusal(capfd, run, *args) -> str:
    """The one line with which run(*args) refuses to work."""
    with pytest.raises(SystemExit) as stopped:
        run(*args)
    error = capfd.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error and "Warning" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a folder or zip, hidden or not, but its catalogue."""
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and file != catalogue_file(path)]
        return {str(file.relative_to(path)): file.read_bytes() for file in found}
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def files(path: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(path).items() if name != "dataset.json"}


def arrays(path: Path) -> np.ndarray:
    return np.stack([np.load(io.BytesIO(data)) for _, data in sorted(files(path).items())])


def metadata(path: Path) -> dict:
    return json.loads(contents(path)["dataset.json"])


@pytest.fixture(scope="session")
def source(tmp_path_factory, vae_folder, encoder_folder):
    """Ten pictures of several sizes in two class folders, and the data set made of them. Copy it before changing it."""
    place = tmp_path_factory.mktemp("preparation")
    for i in range(10):
        put(place / "photos" / ("cat", "dog")[i // 5] / f"p{i % 5}.png", noise(33 + 7 * (i % 5), 90 - 11 * (i % 5), i))
    found = SimpleNamespace(photos=place / "photos", data=place / "data", images=place / "data/images",
                            moments=place / "data/vae-sd", features=place / "data/features-local-dir-encoder",
                            vae=f"--model-url={vae_folder}", encoder=["--enc-type=local-dir:encoder"])
    convert(found.photos, found.images)
    encode(found.images, found.moments, found.vae)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(encoder_folder.parent)
        encode(found.images, found.features, *found.encoder)
    return found


@pytest.fixture
def copy(source, tmp_path):
    """The same in a folder of the test's own, without features."""
    shutil.copytree(source.photos, tmp_path / "photos")
    shutil.copytree(source.data, tmp_path / "data", ignore=shutil.ignore_patterns("features-*"))
    return SimpleNamespace(photos=tmp_path / "photos", data=tmp_path / "data", images=tmp_path / "data/images",
                           moments=tmp_path / "data/vae-sd", vae=source.vae)


# ---- crop ------------------------------------------------------------------------------------------------------------

def literal_adm_crop(picture: Image.Image, target: int) -> np.ndarray:
    """The definition in words: halve by boxes while twice the target fits, scale bicubically, cut out the centre."""
    width, height = picture.size
    while width >= 2 * target and height >= 2 * target:
        width, height = width // 2, height // 2
        picture = picture.resize((width, height), resample=Image.BOX)
    factor = target / (width if width < height else height)
    picture = picture.resize((round(width * factor), round(height * factor)), resample=Image.BICUBIC)
    array = np.array(picture)
    top, left = (array.shape[0] - target) // 2, (array.shape[1] - target) // 2
    return array[top:top + target, left:left + target]


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (31, 29), (63, 64), (64, 65), (131, 129), (257, 90), (7, 200)])
def test_crop_equals_adm(size):
    ours = np.array(center_crop(noise(*size), 32))
    assert ours.shape == (32, 32, 3) and (ours == literal_adm_crop(noise(*size), 32)).all()


def test_crop_keeps_the_centre():
    picture = np.zeros((32, 97, 3), dtype=np.uint8)
    picture[:, 32:64] = np.arange(32)[None, :, None]
    assert (np.array(center_crop(Image.fromarray(picture), 32))[5, :, 0] == np.arange(32)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16", "I"])
def test_every_mode_becomes_rgb(mode):
    grey = noise(40, 50).convert("L")
    picture, expected = noise(40, 50).convert(mode.partition(";")[0]), None
    if mode.startswith("I"):                                      # 257 * 8-bit grey: the same picture in 16 bits
        sixteen = np.array(grey).astype(np.uint16 if mode == "I;16" else np.int32) * 257
        picture, expected = Image.fromarray(sixteen), grey.convert("RGB")
    assert picture.mode == mode
    with Image.open(io.BytesIO(saved(picture, "tiff" if mode in ("CMYK", "I") else "png"))) as read:
        assert (np.array(to_rgb(read, "x")) == np.array(expected or picture.convert("RGB"))).all()


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6                                              # a quarter turn
    assert to_rgb(Image.open(io.BytesIO(saved(noise(40, 30), "jpeg", exif=exif))), "x").size == (40, 30)


@pytest.mark.parametrize("height, width", [(5, 7), (1, 1), (200, 150)])   # the last takes more than a block of 64 KiB
def test_a_png_is_neither_compressed_nor_filtered(height, width):
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    png = to_png(picture)
    assert len(png) < height * (1 + 3 * width) + 100 and b"\0" + picture[0].tobytes() in png
    with Image.open(io.BytesIO(png)) as image:
        image.verify()                                            # checksums
    with Image.open(io.BytesIO(png)) as image:
        assert image.mode == "RGB" and (np.array(image) == picture).all()


# ---- convert ---------------------------------------------------------------------------------------------------------

def test_convert_numbers_sorted_pictures_and_labels_folders(source):
    assert set(contents(source.images)) == {*NAMES, "dataset.json"}
    seventh = np.array(Image.open(source.images / NAMES[7]))
    assert (seventh == np.array(center_crop(Image.open(source.photos / "dog/p2.png"), 32))).all()
    assert metadata(source.images)["labels"] == [[name, int(i >= 5)] for i, name in enumerate(NAMES)]
    assert metadata(source.images)["transform"] == {"name": "center-crop-dhariwal", "resolution": 32}


@pytest.mark.parametrize("dest", ["out", "out.zip"])
def test_convert_reads_and_writes_zips_with_several_workers(source, tmp_path, dest):
    shutil.make_archive(str(tmp_path / "photos"), "zip", source.photos)
    convert(tmp_path / "photos.zip", tmp_path / dest, "--workers=2")
    assert files(tmp_path / dest) == files(source.images)
    assert metadata(tmp_path / dest)["labels"] == metadata(source.images)["labels"]
    assert {path.name for path in tmp_path.iterdir()} - {"out.zip.catalogue.npz"} == {"photos.zip", dest}
    if dest.endswith(".zip"):
        with zipfile.ZipFile(tmp_path / dest) as archive:
            assert archive.namelist() == [*NAMES, "dataset.json"]
            assert {(entry.compress_type, entry.date_time[0]) for entry in archive.infolist()} == {(0, 1980)}


def test_labels_of_the_source_come_first(copy, tmp_path, capfd):
    names = sorted(str(file.relative_to(copy.photos)) for file in copy.photos.rglob("*.png"))
    for i, labels in enumerate(([[name, 9 - i] for i, name in enumerate(names)][::-1], None)):
        (copy.photos / "dataset.json").write_text(json.dumps({"labels": labels}))
        convert(copy.photos, tmp_path / f"{i}", "--max-images=3")
    assert metadata(tmp_path / "0")["labels"] == [[name, 9 - i] for i, name in enumerate(NAMES[:3])]
    assert metadata(tmp_path / "1")["labels"] is None
    (copy.photos / "dataset.json").write_text(json.dumps({"labels": [["cat/p0.png", 0]]}))
    assert "no label for 9 of 10 files (cat/p1.png" in refusal(capfd, convert, copy.photos, tmp_path / "c")


def test_a_flat_folder_has_no_labels_and_a_mixed_one_is_refused(copy, tmp_path, capfd):
    convert(copy.photos / "cat", tmp_path / "flat")
    assert metadata(tmp_path / "flat")["labels"] is None
    put(copy.photos / "loose.png", noise(40, 40))
    assert "1 pictures lie beside" in refusal(capfd, convert, copy.photos, tmp_path / "mixed")


def test_a_thousand_images_to_a_folder():
    assert [image_name(i) for i in (0, 999, 1000, 1234567)] == [
        "00000/img00000000.png", "00000/img00000999.png", "00001/img00001000.png", "01234/img01234567.png"]


def test_resolution():
    assert [parse_resolution(text) for text in ("256x256", "64", "32X32")] == [256, 64, 32]


@pytest.mark.parametrize("extension", ["png", "gif", "webp"])
def test_the_first_frame_of_an_animation_is_taken(tmp_path, extension):
    options = {"lossless": True} if extension == "webp" else {}
    frames = [noise(40, 50, seed) for seed in range(3)]
    put(tmp_path / f"a/x.{extension}", saved(frames[0], extension, save_all=True, append_images=frames[1:], **options))
    convert(tmp_path / "a", tmp_path / "b")
    alone = Image.open(io.BytesIO(saved(frames[0], extension, **options))).convert("RGB")
    with Image.open(tmp_path / "b/00000/img00000000.png") as image:
        assert (np.array(image) == np.array(center_crop(alone, 32))).all()


def test_transform_none_copies_fitting_pictures(source, tmp_path, capfd):
    convert(source.images, tmp_path / "again", "--transform=none")
    assert files(tmp_path / "again") == files(source.images)
    assert "p0.png: 33x90 px, expected 32x32" in refusal(capfd, convert, source.photos, tmp_path / "b",
                                                         "--transform=none")


def claiming(width: int, height: int) -> bytes:
    """A png that holds no pixel, with a header of this size."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


UNREADABLE = {
    "empty.png": (b"", "readable"), "text.png": (b"no picture", "readable"),
    "cut.png": (saved(noise(40, 50), "png")[:500], "readable"),
    "cut.jpg": (saved(noise(40, 50), "jpeg")[:500], "readable"),
    "eps.png": (saved(noise(8, 8), "eps"), "readable"),           # for which Pillow would call Ghostscript
    "float.tif": (saved(Image.new("F", (8, 8)), "tiff"), "floating-point"),
    "strip.png": (saved(Image.new("L", (200_000, 1)), "png"), "enlarged to 6400000x32"),
    "bomb.png": (claiming(40_000, 40_000), "134217728 pixels"), "large.png": (claiming(12_000, 12_000), "134217728"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")   # pytest overrides the filter of the stores
@pytest.mark.parametrize("name", UNREADABLE)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_picture_that_cannot_be_converted_is_named(tmp_path, capfd, name, zipped):
    content, word = UNREADABLE[name]
    put(tmp_path / "a" / name, content)
    if zipped:
        shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path / "a")
    said = refusal(capfd, convert, tmp_path / ("a.zip" if zipped else "a"), tmp_path / "b")
    assert name in said and word in said and not list((tmp_path / "b").rglob("*.png"))


def test_an_error_in_a_worker_is_one_line(copy, tmp_path, capfd):
    (copy.photos / "dog/p1.png").write_bytes(b"")
    assert "dog/p1.png: not a readable image" in refusal(capfd, convert, copy.photos, tmp_path / "x", "--workers=1")
    assert not (tmp_path / "x/dataset.json").exists()


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSED = [
    ("convert --source nowhere --dest x", "nowhere: does not exist"),
    ("convert --source empty --dest x", "holds no pictures"),
    ("convert --source images --dest images/x", "lies in the source"),
    ("convert --source images --dest file", "is a file"),
    ("convert --source images --dest folder.zip", "is a folder"),
    ("convert --source images --dest file/x", "cannot be created"),
    ("convert --source images --dest photos", "holds other files"),
    ("convert --source images --dest of-others", "did not write"),
    ("convert --source images --dest x --max-images 0", "--max-images 0"),
    ("convert --source images --dest x --workers -1", "--workers -1"),
    *((f"convert --source images --dest x --resolution {text}", "like 256x256") for text in (
        "256x128", "x256", "256x", "0x0", "a", "256x256x256", "1.5", "²", "9" * 5000, "99999x99999")),
    ("encode --source nowhere --dest x", "nowhere: does not exist"),
    ("encode --source empty --dest x", "holds no images"),
    ("encode --source images --dest images/x", "lies in the source"),
    ("encode --source photos --dest x", "expected RGB of"),
    ("encode --source images --dest x --batch-size 0", "--batch-size 0"),
    ("encode --source images --dest x --model-url empty", "no readable AutoencoderKL"),
    ("encode --source images --dest x --precision tf32", "--precision tf32"),
    ("encode --source images --dest x --dtype int8", "--dtype int8"),
    ("encode --source images --dest x --encoder-weights file", "--encoder-weights file"),
    ("encode --source images --dest x --enc-type dinov2-vit-b", "DATA/features-dinov2-vit-b"),
    *((f"encode --source images --dest features-dinov2-vit-b --enc-type dinov2-vit-b {flags}", flags) for flags in (
        "--model-url mse", "--precision fp32", "--compile", "--encoder-weights nowhere", "--dtype float32")),
    ("encode --source images --dest features-dinov2-vit-b --enc-type dinov2-vit-b --no-compile", "--compile"),
    ("encode --source images --dest x --enc-type dinov2-vit-b,clip-vit-b", "one encoder at a time"),
    ("check --source empty", "vae-sd"), ("check --source . --output x/look.png", "--output x/look.png"),
    ("check --source . --output look.jpg", "--output look.jpg"),
    ("check --source . --model-url empty", "no readable AutoencoderKL"),
]


@pytest.fixture(scope="module")
def places(source, tmp_path_factory):
    """What REFUSED names."""
    place = tmp_path_factory.mktemp("places")
    for name in ("images", "photos"):
        shutil.copytree(getattr(source, name), place / name)
    shutil.copytree(source.moments, place / "vae-sd")
    put(place / "file", b"")
    put(place / "of-others/dataset.json", b'{"labels": null}')
    (place / "empty").mkdir()
    (place / "folder.zip").mkdir()
    return place


@pytest.mark.parametrize("line, word", REFUSED, ids=[line[:60] for line, _ in REFUSED])
def test_refused_before_anything_is_written(places, monkeypatch, capfd, line, word):
    monkeypatch.chdir(places)
    before = {path for path in places.rglob("*") if path.name != "catalogue.npz"}
    said = refusal(capfd, main, line.split())
    assert word.removesuffix(" nowhere").strip() in said.replace("--compile True", "--compile")
    assert {path for path in places.rglob("*") if path.name != "catalogue.npz"} == before


@pytest.mark.parametrize("name, dest, word", [
    ("\udcff.png", "x.zip", r"\udcff.npy cannot be in a zip"), ("a\\b.png", "x.zip", "cannot be in a zip"),
    ("c:/x.png", "x.zip", "cannot be in a zip"), ("n" * 245 + ".png", "x", "longer than 255 bytes"),
])
def test_names_that_the_destination_cannot_hold(tmp_path, capfd, name, dest, word):
    put(tmp_path / "images" / name, noise(32, 32))
    assert word in refusal(capfd, encode, tmp_path / "images", tmp_path / dest)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_images_must_have_one_size_that_the_vae_can_halve(copy, tmp_path, capfd):
    put(copy.images / NAMES[6], noise(64, 64))
    assert f"{NAMES[6]}: RGB of 64x64" in refusal(capfd, encode, copy.images, tmp_path / "x", copy.vae)
    convert(copy.photos, tmp_path / "odd", "--resolution=30x30")
    assert "a multiple of 4 px" in refusal(capfd, encode, tmp_path / "odd", tmp_path / "y", copy.vae)
    assert not (tmp_path / "y").exists()


def test_moments_that_are_not_finite(source, vae_folder, tmp_path, capfd):
    codec = load_codec(str(vae_folder))
    codec.vae.quant_conv.weight.mul_(1e6)
    codec.vae.save_pretrained(tmp_path / "vae")
    assert f"{NAMES[0]}: its moments are not finite in float16" in refusal(
        capfd, encode, source.images, tmp_path / "x", f"--model-url={tmp_path / 'vae'}", "--dtype=float16")


# ---- interrupted and continued ---------------------------------------------------------------------------------------

def begun(whole: Path, dest: Path, kept: int) -> Path:
    """What a killed run that should have made `whole` leaves of `dest`: its record and the first `kept` files."""
    folder = dest.with_name(f"{dest.name}.partial") if dest.suffix == ".zip" else dest
    for name, data in sorted(files(whole).items())[:kept]:
        put(folder / name, data)
    put(folder / ".unfinished.json", json.dumps(metadata(whole)["made_with"]).encode())
    put(folder / ".tmp/123", b"half of a file")
    put(folder / max(files(whole)), b"")                          # a power failure may leave the name without content
    return folder


@pytest.mark.parametrize("kept", [0, 6, 10])
@pytest.mark.parametrize("zipped", ["", ".zip"])
@pytest.mark.parametrize("kind", ["images", "moments", "features"])
def test_interrupted_work_continues(source, encoder_folder, tmp_path, monkeypatch, capfd, kind, zipped, kept):
    """Bit for bit: a batch of which a file is missing is encoded again as a whole."""
    monkeypatch.chdir(encoder_folder.parent)
    whole = getattr(source, kind)
    dest = tmp_path / f"{whole.name}{zipped}"
    work = {"images": partial(convert, source.photos, dest),
            "moments": partial(encode, source.images, dest, source.vae),
            "features": partial(encode, source.images, dest, *source.encoder)}[kind]
    folder = begun(whole, dest, kept)
    assert ("not exist" if zipped else "not finished") in refusal(capfd, convert, dest, tmp_path / "x")
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*.png") if file.stat().st_size}
    work()
    assert contents(dest) == contents(whole)
    assert {path.name for path in tmp_path.iterdir()} - {f"{dest.name}.catalogue.npz"} == {dest.name}
    assert all(file.stat().st_mtime_ns == time for file, time in before.items() if not zipped)
    capfd.readouterr()
    finished = dest.stat().st_mtime_ns
    work()
    assert "finished already (10 images): nothing to do" in capfd.readouterr().out
    assert dest.stat().st_mtime_ns == finished


def test_a_file_that_cannot_be_written_is_absent(source, tmp_path, capfd):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # less than an image
    try:
        assert f"{NAMES[0]}: cannot be written" in refusal(capfd, convert, source.photos, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "a").rglob("*.png")) == []
    convert(source.photos, tmp_path / "a")
    assert files(tmp_path / "a") == files(source.images)


@pytest.mark.parametrize("dest, need", [("a", 10 * 4096), ("a.zip", 20 * 4096)])  # a zip's files are collected first
def test_a_full_disk_is_noticed_first(source, tmp_path, monkeypatch, capfd, dest, need):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need - 1))
    assert "make room" in refusal(capfd, convert, source.photos, tmp_path / dest)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need))
    convert(source.photos, tmp_path / dest)


def test_work_with_a_gap_is_not_closed(tmp_path):
    """As when one of several processes has died."""
    dest = Destination(str(tmp_path / "a.zip"), np.array([b"a.npy", b"b.npy"]), (b".npy",), {}, "source")
    dest.begin()
    dest.write(b"a.npy", b"1")
    with pytest.raises(UserError, match=r"lacks 1 of 2 files \(b.npy\)"):
        dest.finish({})
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize("kind", ["images", "moments"])
def test_a_damaged_file_that_was_removed_is_made_again(source, tmp_path, capfd, kind):
    """As `check` asks for, after the work was finished once."""
    whole, dest = getattr(source, kind), tmp_path / "x"
    shutil.copytree(whole, dest)
    next(dest.rglob("*0003.*")).unlink()
    convert(source.photos, dest) if kind == "images" else encode(source.images, dest, source.vae)
    assert contents(dest) == contents(whole) and "nothing to do" not in capfd.readouterr().out


@pytest.mark.parametrize("content, word", [(b"", "damaged"), (b"[" * 100_000, "damaged"), (b"[]", "did not write")])
def test_an_unreadable_record_of_settings(source, tmp_path, capfd, content, word):
    put(tmp_path / "x/.unfinished.json", content)
    assert word in refusal(capfd, convert, source.photos, tmp_path / "x")


def test_a_source_that_changed_needs_another_destination(copy, tmp_path, capfd):
    convert(copy.photos, tmp_path / "images")
    (copy.photos / "cat/p0.png").rename(copy.photos / "cat/p9.png")           # as many pictures, in another order
    assert "source_contents" in refusal(capfd, convert, copy.photos, tmp_path / "images")
    (copy.images / "dataset.json").write_text('{"labels": null}')
    assert "source_contents" in refusal(capfd, encode, copy.images, copy.moments, copy.vae)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("zipped", ["", ".zip"])
def test_other_settings_need_another_destination(source, tmp_path, capfd, finished, zipped):
    images, moments = tmp_path / f"images{zipped}", tmp_path / f"vae-sd{zipped}"
    if finished:
        convert(source.photos, images)
        encode(source.images, moments, source.vae)
    else:
        begun(source.images, images, 3)
        begun(source.moments, moments, 3)
    for words, work, *args in (
            ("made with resolution 32, now resolution 16", convert, source.photos, images, "--resolution=16"),
            ("images 3", convert, source.photos, images, "--max-images=3"),
            ("now transform none", convert, source.photos, images, "--transform=none"),
            ("made with source ", convert, source.photos / "cat", images),
            ("made with command convert", encode, source.images, images, source.vae),
            ("dtype float32, now dtype float16", encode, source.images, moments, source.vae, "--dtype=float16"),
            ("precision fp32, now precision bf16", encode, source.images, moments, source.vae, "--precision=bf16"),
            ("now vae stabilityai/sd-vae-ft-ema", encode, source.images, moments, "--model-url=ema")):
        assert words in refusal(capfd, work, *args)


# ---- encode ----------------------------------------------------------------------------------------------------------

def test_moments_are_the_codecs_under_the_same_keys(source, vae_folder):
    codec, entries = load_codec(str(vae_folder)), LatentDataset(source.data)
    assert len(entries) == 10 and entries.num_classes == 2 and entries.resolution == 32
    assert LatentSpace.from_record(entries.vae_record) == codec.space and entries.moments_shape == (8, 8, 8)
    for i in (0, 3, 9):
        image, moments, label = entries[i]
        assert torch.allclose(moments, codec.encode(image[None])[0], atol=1e-5) and label == int(i >= 5)
        assert (moments[4:] > 0).all()                            # the second half is a standard deviation
    assert metadata(source.moments)["labels"][7] == ["00000/img-mean-std-00000007.npy", 1]


def test_encode_zip_to_zip_in_half_precision(source, tmp_path):
    convert(source.images, tmp_path / "images.zip", "--transform=none")
    encode(tmp_path / "images.zip", tmp_path / "vae-sd.zip", source.vae, "--dtype=float16", "--workers=1")
    half, full = arrays(tmp_path / "vae-sd.zip"), arrays(source.moments)
    assert half.dtype == np.float16 and (half == full.astype(np.float16)).all()
    assert len(LatentDataset(tmp_path)) == 10


def test_bf16_moves_moments_by_its_rounding(source, tmp_path):
    """Each rounding is up to 2^-9 of a value; some thirty layers of sums add up to less than ten times that."""
    encode(source.images, tmp_path / "bf16", source.vae, "--precision=bf16")
    exact, coarse = arrays(source.moments), arrays(tmp_path / "bf16")
    assert coarse.dtype == np.float32 and 2e-4 < np.abs(coarse - exact).mean() / np.abs(exact).mean() < 0.02
    assert metadata(tmp_path / "bf16")["made_with"]["precision"] == "bf16"


def test_a_compiled_vae_sees_batches_of_one_size(source, tmp_path, capfd):
    """Of ten images the last two are filled up to four. (Dynamo is off: compiling takes minutes.)"""
    sizes = []

    def note(module, inputs) -> None:
        if type(module).__name__ == "Encoder":
            sizes.append(len(inputs[0]))

    compiler_works.cache_clear()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(note)
    with torch._dynamo.config.patch(disable=True):
        encode(source.images, tmp_path / "x", source.vae, "--compile")
    hook.remove()
    compiler_works.cache_clear()
    assert sizes == [4, 4, 4] and metadata(tmp_path / "x")["made_with"]["compiled"] is True
    assert np.allclose(arrays(tmp_path / "x"), arrays(source.moments), atol=1e-5)
    assert "compiled True, now compiled False" in refusal(capfd, encode, source.images, tmp_path / "x", source.vae)


def test_images_under_any_name_keep_their_keys(source, tmp_path):
    for name in ("n02/b.png", "n01/img-x.png"):
        put(tmp_path / "images" / name, noise(32, 32))
    encode(tmp_path / "images", tmp_path / "vae-sd", source.vae)
    assert set(files(tmp_path / "vae-sd")) == {"n02/img-mean-std-b.npy", "n01/img-mean-std--x.npy"}
    assert len(LatentDataset(tmp_path)) == 2


def test_two_processes_write_what_one_writes(source, tmp_path, capfd):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [fork(encode, source.images, tmp_path / "two.zip", source.vae, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2",
                  MASTER_ADDR="127.0.0.1", MASTER_PORT=port, ACCELERATE_USE_CPU="true") for rank in "01"]
    assert [rank.join() or rank.exitcode for rank in ranks] == [0, 0]
    assert capfd.readouterr().out.count("moments of 10 images") == 1
    assert metadata(tmp_path / "two.zip") == metadata(source.moments)
    assert (arrays(tmp_path / "two.zip") == arrays(source.moments)).all()


# ---- names of others -------------------------------------------------------------------------------------------------

ODD = ["!ü", "a b", "ünï-日本", "line\nbreak", "quote\"'`$(x)", "--help", "\udcff\udc80", "n" * 200, "{0}%s", "a\\b",
       "c:", " ", "*"]                                            # names of a class folder that a file system takes


def test_class_names_with_odd_characters(source, tmp_path, monkeypatch):
    for i, name in enumerate(ODD):
        put(tmp_path / "photos" / name / f"img {name[:100]}.png", noise(32, 32, i))
    printed = io.BytesIO()
    terminal = io.TextIOWrapper(printed, encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", terminal)                  # of few letters
    convert(tmp_path / "photos", tmp_path / "a\udcff\n/images")
    encode(tmp_path / "a\udcff\n/images", tmp_path / "a\udcff\n/vae-sd", source.vae)
    shutil.copytree(tmp_path / "photos", tmp_path / "b/images")   # and under their own names, as keys of moments
    encode(tmp_path / "b/images", tmp_path / "b/vae-sd", source.vae)
    terminal.flush()
    assert printed.getvalue().count(b"\n") == 5 and b"a\\udcff\\n/images: 13 images" in printed.getvalue()
    numbered, named = LatentDataset(tmp_path / "a\udcff\n"), LatentDataset(tmp_path / "b")
    assert numbered.labels.tolist() == list(range(len(ODD))) and len(named) == len(ODD)
    order = sorted(range(len(ODD)), key=lambda i: os.fsencode(f"{ODD[i]}/{ODD[i][:100]}"))
    for k, i in enumerate(order):
        assert (named[k][0].permute(1, 2, 0).numpy() == np.array(noise(32, 32, i))).all()


# ---- check, catalogues and the command line --------------------------------------------------------------------------

def check(data: Path, picture: Path, *flags: str) -> None:
    main(["check", f"--source={data}", f"--output={picture}", "--workers=0", *flags])


def test_check_draws_images_above_decoded_latents(source, vae_folder, tmp_path, capfd):
    check(source.data, tmp_path / "look.png", "--workers=1")
    summary = capfd.readouterr().out.strip().splitlines()[-1]
    for words in ("10 images of 32 px, moments (8, 8, 8), 2 classes", "features of local-dir:encoder", "PSNR"):
        assert words in summary
    picture = np.array(Image.open(tmp_path / "look.png"))
    assert picture.shape == (64, 8 * 32, 3)
    assert (picture[:32, :32] == np.array(Image.open(source.images / NAMES[0]))).all()
    codec, moments = load_codec(str(vae_folder)), torch.from_numpy(arrays(source.moments)[:1])
    decoded = codec.decode(codec.space.latents(moments, torch.zeros(1, 4, 8, 8)))[0].permute(1, 2, 0).numpy()
    assert (abs(picture[32:, :32].astype(int) - decoded) <= 1).all()


def test_check_counts_and_names_what_is_wrong(copy, tmp_path, capfd):
    put(copy.images / NAMES[2], b"")
    moments = arrays(copy.moments)[5]
    moments[0, 0, 0] = np.nan
    np.save(copy.moments / "00000/img-mean-std-00000005.npy", moments)
    said = refusal(capfd, check, copy.data, tmp_path / "look.png")
    for words in ("2 of 10", f"{NAMES[2]}: not a readable image", "00000/00000005: its moments are not finite"):
        assert words in said
    (copy.moments / "00000/img-mean-std-00000009.npy").unlink()
    assert "1 of 10 images have no partner" in refusal(capfd, check, copy.data, tmp_path / "look.png")


def listed(path: Path, extensions: tuple[bytes, ...]) -> tuple[list, list, list | None]:
    found = Catalogue(open_store(path), extensions)
    return found.keys.tolist(), found.names.tolist(), None if found.labels is None else found.labels.tolist()


def test_finished_work_has_a_catalogue_and_check_renews_it(copy, tmp_path):
    convert(copy.images, tmp_path / "images.zip", "--transform=none")
    for path in (copy.images, tmp_path / "images.zip"):
        catalogued = listed(path, IMAGE_EXTENSIONS)
        catalogue_file(path).unlink()
        assert listed(path, IMAGE_EXTENSIONS) == catalogued and len(catalogued[0]) == 10
    check(copy.data, tmp_path / "look.png")
    (copy.images / NAMES[4]).unlink()
    (copy.moments / "00000/img-mean-std-00000004.npy").unlink()
    check(copy.data, tmp_path / "look.png")
    assert len(LatentDataset(copy.data)) == 9


def test_a_script_called_from_elsewhere(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["the script's folder", *sys.path])
    monkeypatch.setattr(sys, "argv", ["", "convert", f"--source={source.photos}", "--dest=x", "--resolution=32"])
    runpy.run_path(str(ROOT / "preprocessing/dataset_tools.py"), run_name="__main__")
    assert sys.path[0] == str(ROOT) and files(tmp_path / "x") == files(source.images)
