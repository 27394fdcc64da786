"""Preparing a data set: ADM's crop, convert, encode and check, whole, interrupted and continued, with one process and with two."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import LatentDataset
from models.vae import Codec, LatentSpace, load_codec
from preprocessing import convert as converting
from preprocessing import encode as encoding
from preprocessing.convert import convert, parse_resolution, to_png
from preprocessing.crop import center_crop, to_rgb
from preprocessing.dataset_tools import main
from preprocessing.encode import encode
from runtime.messages import UserError

ROOT = Path(__file__).resolve().parent.parent
CROP = "center-crop-dhariwal"


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random RGB picture."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(autouse=True)
def one_thread():
    """Bits may depend on the number of threads, and torchrun gives each process one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two class folders of pictures of several sizes."""
    for folder, offset in (("cat", 0), ("dog", 10)):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for i in range(5):
            noise(33 + 7 * i, 90 - 11 * i, offset + i).save(tmp_path / "photos" / folder / f"p{i}.png")
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vae")
    AutoencoderKL(block_out_channels=(8, 16, 16), norm_num_groups=4, layers_per_block=1, latent_channels=4, scaling_factor=0.7,
                  down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3).save_pretrained(path)
    return str(path)


@pytest.fixture
def images(photos, tmp_path) -> Path:
    run_convert(photos, tmp_path / "data" / "images")
    return tmp_path / "data" / "images"


def run_convert(source, dest, resolution="32x32", transform=CROP, workers=0, max_images=None) -> None:
    convert(str(source), str(dest), resolution, transform, workers, max_images)


def run_encode(source, dest, vae: str, batch_size=4, dtype="float32", workers=0, precision="fp32", compile=None) -> None:
    encode(str(source), str(dest), vae, batch_size, dtype, workers, precision, compile)


def contents(path: Path) -> dict[str, bytes]:
    """Everything in a folder or zip, hidden or not."""
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def files(path: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(path).items() if name != "dataset.json"}


def metadata(path: Path) -> dict:
    return json.loads(contents(path)["dataset.json"])


def run_program(arguments: list[str], cwd: Path = ROOT, expected: int = 0, **variables) -> subprocess.CompletedProcess:
    """Run `python arguments...`, which must end with the status `expected`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == expected, done.stderr
    return done


# ---- crop -----------------------------------------------------------------------------------------------------------------------------

def literal_adm_crop(picture: Image.Image, target: int) -> np.ndarray:
    """The definition in words: halve by boxes while twice the target fits, scale bicubically to the target, cut the centre, floored."""
    width, height = picture.size
    while width >= 2 * target and height >= 2 * target:
        width, height = width // 2, height // 2
        picture = picture.resize((width, height), resample=Image.BOX)
    factor = target / (width if width < height else height)
    picture = picture.resize((round(width * factor), round(height * factor)), resample=Image.BICUBIC)
    array = np.array(picture)
    top, left = (array.shape[0] - target) // 2, (array.shape[1] - target) // 2
    return array[top:top + target, left:left + target]


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (31, 29), (63, 64), (64, 65), (131, 129), (257, 90), (7, 200), (127, 127)])
def test_crop_equals_adm(size):
    picture = noise(*size)
    ours = np.array(center_crop(picture, 32))
    assert ours.shape == (32, 32, 3) and (ours == literal_adm_crop(picture, 32)).all()


def test_crop_keeps_the_centre_and_no_more():
    picture = np.zeros((32, 97, 3), dtype=np.uint8)
    picture[:, 32:64] = np.arange(32)[None, :, None]
    assert (np.array(center_crop(Image.fromarray(picture), 32))[5, :, 0] == np.arange(32)).all()


def test_a_png_is_written_plainly():
    """Neither compressed nor filtered, so that to read it costs little; wide and high are not the same."""
    for height, width in ((5, 7), (1, 1), (200, 150)):                            # the last takes more than one block of 64 KiB
        picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        png = to_png(picture)
        assert len(png) < height * (1 + 3 * width) + 100
        for row in picture[:3]:
            assert b"\0" + row.tobytes() in png
        with Image.open(io.BytesIO(png)) as image:
            image.verify()                                                        # checksums
        with Image.open(io.BytesIO(png)) as image:
            assert image.mode == "RGB" and (np.array(image) == picture).all()


# ---- convert --------------------------------------------------------------------------------------------------------------------------

def test_convert_numbers_sorted_pictures_and_labels_folders(photos, images):
    expected = {f"00000/img{i:08d}.png" for i in range(10)}
    assert set(contents(images)) == expected | {"dataset.json"}
    seventh = np.array(Image.open(images / "00000/img00000007.png"))
    assert (seventh == np.array(center_crop(Image.open(photos / "dog/p2.png"), 32))).all()
    assert metadata(images)["labels"] == [[f"00000/img{i:08d}.png", int(i >= 5)] for i in range(10)]
    assert metadata(images)["transform"] == {"name": CROP, "resolution": 32}


@pytest.mark.parametrize("dest", ["out", "out.zip"])
def test_convert_reads_and_writes_zips_with_many_workers(photos, images, tmp_path, dest):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(photos.rglob("*.png"), reverse=True):
            archive.write(file, file.relative_to(photos))
    run_convert(tmp_path / "photos.zip", tmp_path / dest, workers=2)
    assert files(tmp_path / dest) == files(images)
    assert metadata(tmp_path / dest)["labels"] == metadata(images)["labels"]
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "photos.zip", "data", dest}
    if dest.endswith(".zip"):
        with zipfile.ZipFile(tmp_path / dest) as archive:
            assert archive.namelist() == [*sorted(files(images)), "dataset.json"]
            assert {(entry.compress_type, entry.date_time[0]) for entry in archive.infolist()} == {(zipfile.ZIP_STORED, 1980)}


def test_chunks_of_pictures_come_when_they_are_done(photos, tmp_path, monkeypatch):
    """Two workers: the first is held until the second has converted all that is not its own, which it may only out of order."""
    monkeypatch.setattr(converting, "CHUNK", 1)
    convert_one, held = converting._Conversion._convert, tmp_path / "held"

    def slow(self, name):
        for _ in range(3000 if name == self.names[0] else 0):
            if len(list((tmp_path / "out").rglob("*.png"))) >= 7:
                held.touch()
                break
            time.sleep(0.01)
        return convert_one(self, name)

    monkeypatch.setattr(converting._Conversion, "_convert", slow)
    run_convert(photos, tmp_path / "out", workers=2)
    assert held.exists() and len(files(tmp_path / "out")) == 10


def test_convert_takes_labels_of_the_source(photos, tmp_path):
    names = sorted(str(file.relative_to(photos)) for file in photos.rglob("*.png"))
    (photos / "dataset.json").write_text(json.dumps({"labels": [[name, 9 - i] for i, name in enumerate(names)][::-1]}))
    run_convert(photos, tmp_path / "a", max_images=3)
    assert metadata(tmp_path / "a")["labels"] == [[f"00000/img{i:08d}.png", 9 - i] for i in range(3)]
    (photos / "dataset.json").write_text(json.dumps({"labels": None}))
    run_convert(photos, tmp_path / "b")
    assert metadata(tmp_path / "b")["labels"] is None
    (photos / "dataset.json").write_text(json.dumps({"labels": [["cat/p0.png", 0]]}))
    with pytest.raises(UserError, match=r"no label for 9 of 10 files \(cat/p1.png"):
        run_convert(photos, tmp_path / "c")


def test_a_thousand_images_to_a_folder():
    assert [converting.image_name(i) for i in (0, 999, 1000, 1234567)] == [
        "00000/img00000000.png", "00000/img00000999.png", "00001/img00001000.png", "01234/img01234567.png"]


def test_flat_folder_has_no_labels_and_a_mixed_one_is_refused(photos, tmp_path):
    run_convert(photos / "cat", tmp_path / "flat")
    assert metadata(tmp_path / "flat")["labels"] is None
    noise(40, 40).save(photos / "loose.png")
    with pytest.raises(UserError, match=r"1 pictures beside its class folders \(loose.png\)"):
        run_convert(photos, tmp_path / "mixed")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16", "I"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = noise(40, 50).convert("L")
    if mode.startswith("I"):  # 257 * 8-bit grey: the same picture in 16 bits
        dtype = np.uint16 if mode == "I;16" else np.int32
        picture = Image.fromarray(np.array(grey).astype(dtype) * 257)
    else:
        picture = noise(40, 50).convert(mode)
    assert picture.mode == mode
    extension = "tif" if mode in ("CMYK", "I") else "png"
    (tmp_path / "a").mkdir()
    picture.save(tmp_path / "a" / f"x.{extension}")
    expected = np.array(center_crop(grey.convert("RGB") if mode.startswith("I") else picture.convert("RGB"), 32))
    run_convert(tmp_path / "a", tmp_path / "b")
    with Image.open(tmp_path / "b/00000/img00000000.png") as image:
        assert image.mode == "RGB" and (np.array(image) == expected).all()


def test_exif_orientation_is_not_applied():
    data, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6                                                              # a quarter turn
    noise(40, 30).save(data, "jpeg", exif=exif)
    assert to_rgb(Image.open(data), "x").size == (40, 30)


def test_floating_point_picture_is_refused():
    with pytest.raises(UserError, match="x.tif is a floating-point picture"):
        to_rgb(Image.new("F", (4, 4)), "x.tif")


def animation(extension: str) -> bytes:
    """Three frames, each of another picture."""
    data = io.BytesIO()
    first, *others = (noise(40, 50, seed) for seed in range(3))
    first.save(data, extension, save_all=True, append_images=others, **({"lossless": True} if extension == "webp" else {}))
    return data.getvalue()


@pytest.mark.parametrize("extension", ["png", "gif", "webp"])
def test_an_animation_is_its_first_frame(tmp_path, extension):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f"x.{extension}").write_bytes(animation(extension))
    alone = io.BytesIO()
    noise(40, 50, 0).save(alone, extension, **({"lossless": True} if extension == "webp" else {}))
    run_convert(tmp_path / "a", tmp_path / "b")
    expected = np.array(center_crop(Image.open(alone).convert("RGB"), 32))
    with Image.open(tmp_path / "b/00000/img00000000.png") as image:
        assert (np.array(image) == expected).all()


def claiming(width: int, height: int) -> bytes:
    """A png whose header says so and that holds no pixel."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def saved(picture: Image.Image, form: str) -> bytes:
    data = io.BytesIO()
    picture.save(data, form)
    return data.getvalue()


REFUSED = {
    "empty.png": (b"", "is not a readable image .none of BMP, GIF"), "text.png": (b"no picture", "is not a readable image .none of"),
    "cut.png": (saved(noise(40, 50), "png")[:500], "is not a readable image"),
    "cut.jpg": (saved(noise(40, 50), "jpeg")[:500], "is not a readable image"),
    "eps.png": (saved(noise(8, 8), "eps"), "is not a readable image .none of"),   # for which Pillow would call Ghostscript
    "float.tif": (saved(Image.new("F", (8, 8)), "tiff"), "is a floating-point picture"),
    "strip.png": (saved(Image.new("L", (200_000, 1)), "png"), "is 200000x1 px and would be enlarged to 6400000x32"),
    "bomb.png": (claiming(40_000, 40_000), "has more than 134217728 pixels"), "large.png": (claiming(12_000, 12_000), "has more than 134"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")           # pytest sets aside the filters of others
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_picture_that_cannot_be_converted_is_named(tmp_path, name, zipped):
    content, sentence = REFUSED[name]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(content)
    if zipped:
        shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path / "a")
    with pytest.raises(UserError, match=f"a.*{name} {sentence}") as caught:
        run_convert(tmp_path / ("a.zip" if zipped else "a"), tmp_path / "b")
    assert "\n" not in str(caught.value) and not list((tmp_path / "b").rglob("*.png"))


def test_transform_none_wants_fitting_pictures(photos, images, tmp_path):
    run_convert(images, tmp_path / "again", transform="none")
    assert files(tmp_path / "again") == files(images)
    with pytest.raises(UserError, match="p0.png is 33x90 px, expected 32x32"):
        run_convert(photos, tmp_path / "b", transform="none")


@pytest.mark.parametrize("text, value", [("256x256", 256), ("64", 64), ("32X32", 32)])
def test_resolution(text, value):
    assert parse_resolution(text) == value


@pytest.mark.parametrize("text", ["256x128", "x256", "256x", "0x0", "-1", "a", "", "256x256x256", "1.5", "²", "9" * 5000, "99999x99999"])
def test_wrong_resolution(text):
    with pytest.raises(UserError, match="expected a square like 256x256"):
        parse_resolution(text)


# ---- what can go wrong ----------------------------------------------------------------------------------------------------------------

def test_wrong_paths(photos, images, vae, tmp_path):
    for run in (run_convert, lambda source, dest: run_encode(source, dest, vae)):
        with pytest.raises(UserError, match="nowhere does not exist"):
            run(tmp_path / "nowhere", tmp_path / "x")
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="empty holds no"):
            run(tmp_path / "empty", tmp_path / "x")
        with pytest.raises(UserError, match="lies in the source"):
            run(images, images / "x")
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="file is a file: give a folder"):
            run(images, tmp_path / "file")
        with pytest.raises(UserError, match="cannot create"):
            run(images, tmp_path / "file" / "x")
        with pytest.raises(UserError, match="other files"):
            run(images, photos)
    with pytest.raises(UserError, match="--max-images 0"):
        run_convert(photos, tmp_path / "x", max_images=0)
    with pytest.raises(UserError, match="--batch-size 0"):
        run_encode(images, tmp_path / "x", vae, batch_size=0)
    with pytest.raises(UserError, match="no readable AutoencoderKL"):
        run_encode(images, tmp_path / "x", str(tmp_path / "empty"))
    assert not (tmp_path / "x").exists()


def test_corrupt_picture_is_named_in_one_line(photos, tmp_path):
    """Although a worker meets it, whose error arrives as a traceback."""
    (photos / "dog/p1.png").write_bytes((photos / "dog/p1.png").read_bytes()[:90])
    done = run_program(["-m", "preprocessing.dataset_tools", "convert", f"--source={photos}", f"--dest={tmp_path / 'x'}",
                        "--resolution=32x32", "--workers=1"], expected=2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "dog/p1.png is not a readable image" in last and "Traceback" not in done.stderr
    (photos / "dog/p1.png").write_bytes(claiming(12_000, 12_000))                 # of which Pillow would warn in two lines
    done = run_program(["-m", "preprocessing.dataset_tools", "convert", f"--source={photos / 'dog'}", f"--dest={tmp_path / 'y'}",
                        "--resolution=32x32", "--workers=0"], expected=2)
    assert "dog/p1.png has more than 134217728 pixels" in done.stderr and "Warning" not in done.stderr
    assert not (tmp_path / "x/dataset.json").exists()


# Names of a class folder that a file system takes.
ODD = ["!ü", "a b", "ünï-日本", "line\nbreak", "quote\"'`$(x)", "--help", "\udcff\udc80", "n" * 200, "{0}%s", "a\\b", "c:", " ", "*"]


def test_class_names_with_odd_characters(tmp_path, vae, monkeypatch):
    for i, name in enumerate(ODD):
        (tmp_path / "photos" / name).mkdir(parents=True)
        noise(32, 32, i).save(tmp_path / "photos" / name / f"img {name[:100]}.png")
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii", errors="strict"))       # a terminal that knows little
    main(["convert", f"--source={tmp_path / 'photos'}", f"--dest={tmp_path / 'a/images'}", "--resolution=32x32", "--workers=0"])
    main(["encode", f"--source={tmp_path / 'a/images'}", f"--dest={tmp_path / 'a/vae-sd'}", f"--model-url={vae}", "--workers=0"])
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "photos", tmp_path / "b/images")                    # and under their own names, as keys of moments
    run_encode(tmp_path / "b/images", tmp_path / "b/vae-sd", vae)
    sys.stdout.flush()
    assert printed.getvalue().count(b"\n") == 3
    numbered, named = LatentDataset(tmp_path / "a"), LatentDataset(tmp_path / "b")
    assert numbered.labels.tolist() == list(range(len(ODD))) and len(named) == len(ODD)
    order = sorted(range(len(ODD)), key=lambda i: os.fsencode(f"{ODD[i]}/{ODD[i][:100]}"))
    for k, i in enumerate(order):
        assert (named[k][0].permute(1, 2, 0).numpy() == np.array(noise(32, 32, i))).all()


def test_a_printed_class_name_is_one_line_in_any_encoding(tmp_path, monkeypatch):
    """Also where `convert` is called by another program, whose stdout is strict."""
    for name in ("line\nbreak", "\udcff"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        noise(32, 32).save(tmp_path / "photos" / name / "x.png")
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="utf-8", errors="strict"))
    run_convert(tmp_path / "photos", tmp_path / "out\udcff\n")
    sys.stdout.flush()
    assert printed.getvalue().endswith(b"out\\udcff\\n: 2 images of 32x32, labels from 2 sorted folders (line\\nbreak, \\udcff)\n")


@pytest.mark.parametrize("name, dest, sentence", [
    ("\udcff.png", "x.zip", r"\\udcff.npy cannot be named in the zip"), ("a\\b.png", "x.zip", "cannot be named in the zip"),
    ("c:/x.png", "x.zip", "cannot be named in the zip"), ("n" * 245 + ".png", "x", "is longer than 255 bytes"),
])
def test_keys_that_no_destination_takes_are_refused_at_once(tmp_path, vae, name, dest, sentence):
    (tmp_path / "images" / name).parent.mkdir(parents=True)
    noise(32, 32).save(tmp_path / "images" / name)
    with pytest.raises(UserError, match=sentence):
        run_encode(tmp_path / "images", tmp_path / dest, vae)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("name", ["../../outside.png", "/outside.png", "a\\..\\outside.png"])
def test_a_zip_writes_nothing_outside_of_the_destination(tmp_path, vae, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, saved(noise(32, 32), "png"))
    for run in (run_convert, lambda source, dest: run_encode(source, dest, vae)):
        with pytest.raises(UserError, match="a.zip holds .*outside.png: expected relative names"):
            run(tmp_path / "a.zip", tmp_path / "deep/er/out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_images_of_another_size_are_named(images, vae, tmp_path):
    noise(64, 64).save(images / "00000/img00000006.png")
    with pytest.raises(UserError, match="img00000006.png is RGB of 64x64 px, expected RGB of 32x32"):
        run_encode(images, tmp_path / "x", vae)


def test_images_that_the_vae_cannot_halve(photos, vae, tmp_path):
    run_convert(photos, tmp_path / "odd", resolution="30x30")
    with pytest.raises(UserError, match="images of 30 px cannot be encoded .* multiple of 4"):
        run_encode(tmp_path / "odd", tmp_path / "x", vae)
    assert not (tmp_path / "x").exists()


def test_moments_that_are_not_finite(images, vae, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "load_codec", lambda *args: broken)
    broken = load_codec(vae)
    broken.encode = lambda images: torch.full((len(images), 8, 8, 8), 1e9)
    with pytest.raises(UserError, match="img00000000.png are not finite in float16"):
        run_encode(images, tmp_path / "x", vae, dtype="float16")


def test_launcher_whose_processes_do_not_meet(images, vae, tmp_path, monkeypatch):
    assert encoding.join_processes().num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="started 2 processes, but accelerate sees 1"):
        run_encode(images, tmp_path / "x", vae)


# ---- interrupted work -----------------------------------------------------------------------------------------------------------------

class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, count: int) -> None:
    """Every command stops before it writes file number `count` (the record of settings is number 0)."""
    from preprocessing.work import Destination

    write, written = Destination.write, []

    def limited(self, name, data):
        if len(written) == count:
            raise Interrupted
        written.append(name)
        write(self, name, data)

    monkeypatch.setattr(Destination, "write", limited)


@pytest.mark.parametrize("command", ["convert", "encode"])
@pytest.mark.parametrize("dest", ["out", "out.zip"])
@pytest.mark.parametrize("count", [1, 7, 11])                                     # no image, some images, all but dataset.json
def test_interrupted_work_continues(photos, images, vae, tmp_path, capsys, command, dest, count):
    def run(dest):
        run_convert(photos, tmp_path / dest) if command == "convert" else run_encode(images, tmp_path / dest, vae)

    run("whole")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, count)
        with pytest.raises(Interrupted):
            run(dest)
    begun = tmp_path / f"{dest}.partial" if dest.endswith(".zip") else tmp_path / dest
    assert len(list(begun.rglob("*.*g")) + list(begun.rglob("*.npy"))) == count - 1 and not (begun / "dataset.json").exists()
    with pytest.raises(UserError, match="not finished" if begun == tmp_path / dest else "does not exist"):
        run_convert(tmp_path / dest, tmp_path / "x")

    kept = {file: file.stat().st_mtime_ns for file in begun.rglob("*.png")}
    run(dest)
    assert contents(tmp_path / dest) == contents(tmp_path / "whole")
    if begun == tmp_path / dest:
        assert all(file.stat().st_mtime_ns == time for file, time in kept.items())
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "data", "whole", dest}

    capsys.readouterr()
    before = (tmp_path / dest).stat().st_mtime_ns
    run(dest)
    assert "finished already (10 images): nothing to do" in capsys.readouterr().out
    assert (tmp_path / dest).stat().st_mtime_ns == before


def test_killed_between_the_last_file_and_the_cleaning(photos, tmp_path):
    run_convert(photos, tmp_path / "a")
    run_convert(photos, tmp_path / "a.zip")
    whole = contents(tmp_path / "a")
    settings = json.dumps(metadata(tmp_path / "a")["made_with"])
    (tmp_path / "a/.unfinished.json").write_text(settings)
    shutil.copytree(tmp_path / "a", tmp_path / "a.zip.partial")
    run_convert(tmp_path / "a", tmp_path / "readable")
    run_convert(photos, tmp_path / "a")
    run_convert(photos, tmp_path / "a.zip")
    assert contents(tmp_path / "a") == whole and not (tmp_path / "a.zip.partial").exists()


def test_a_file_appears_whole_or_not_at_all(photos, tmp_path):
    def full(source, target):
        if Path(target).suffix == ".png":
            raise OSError(28, "No space left on device")
        rename(source, target)

    rename = os.replace
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(UserError, match="cannot write .*img00000000.png: No space left"):
            run_convert(photos, tmp_path / "a")
    assert list((tmp_path / "a").rglob("*.png")) == []
    run_convert(photos, tmp_path / "a")
    assert len(contents(tmp_path / "a")) == 11


def test_work_with_a_gap_is_not_closed(images, vae, tmp_path):
    """As when one of several processes died: the next run fills the gap."""
    from preprocessing.work import Destination

    write = Destination.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Destination, "write", lambda self, name, data: None if b"0007" in os.fsencode(name) else write(self, name, data))
        with pytest.raises(UserError, match=r"lacks 1 of 10 files \(00000/img-mean-std-00000007.npy\): give the same command again"):
            run_encode(images, tmp_path / "a.zip", vae)
    assert not (tmp_path / "a.zip").exists()
    run_encode(images, tmp_path / "a.zip", vae)
    assert len(files(tmp_path / "a.zip")) == 10


def test_a_damaged_file_that_was_removed_is_made_again(photos, images, vae, tmp_path, capsys):
    """As `check` asks for, after the work was finished once."""
    run_encode(images, tmp_path / "moments", vae)
    for folder, name in ((images, "00000/img00000003.png"), (tmp_path / "moments", "00000/img-mean-std-00000003.npy")):
        whole = contents(folder)
        (folder / name).unlink()
        run_convert(photos, images) if folder == images else run_encode(images, tmp_path / "moments", vae)
        assert contents(folder) == whole
    assert "finished already" not in capsys.readouterr().out


def test_a_record_of_settings_that_cannot_be_read_is_said(photos, tmp_path):
    for content, sentence in ((b"", "unfinished.json is damaged: remove .*x and begin again"), (b"[" * 100_000, "is damaged"),
                              (b"[]", "did not write")):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x/.unfinished.json").write_bytes(content)
        with pytest.raises(UserError, match=sentence):
            run_convert(photos, tmp_path / "x")
    (tmp_path / "x/dataset.json").write_text('{"made_with": [1]}')
    with pytest.raises(UserError, match="did not write"):
        run_convert(photos, tmp_path / "x")


def test_a_source_that_changed_needs_another_destination(photos, images, vae, tmp_path):
    run_encode(images, tmp_path / "moments", vae)
    (photos / "cat/p0.png").rename(photos / "cat/p9.png")                         # as many pictures, in another order
    with pytest.raises(UserError, match="was begun from other files or labels"):
        run_convert(photos, images)
    (images / "dataset.json").write_text('{"labels": null}')
    with pytest.raises(UserError, match="was begun from other files or labels"):
        run_encode(images, tmp_path / "moments", vae)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("dest", ["out", "out.zip"])
def test_other_settings_need_another_destination(photos, images, vae, tmp_path, finished, dest):
    for work in (lambda: run_convert(photos, tmp_path / dest), lambda: run_encode(images, tmp_path / f"m-{dest}", vae)):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, 100 if finished else 3)
            with nullcontext() if finished else pytest.raises(Interrupted):
                work()
    for wrong, settings in (("was made with resolution 32, now resolution 16", {"resolution": "16x16"}),
                            (r"other files or labels \(10 images, now 3", {"max_images": 3}),
                            ("was made with .*transform", {"transform": "none"})):
        with pytest.raises(UserError, match=wrong):
            run_convert(photos, tmp_path / dest, **settings)
    with pytest.raises(UserError, match="was made with source"):
        run_convert(photos / "cat", tmp_path / dest)
    with pytest.raises(UserError, match="was made with command convert"):
        run_encode(images, tmp_path / dest, vae)
    with pytest.raises(UserError, match="was made with dtype float32, now dtype float16"):
        run_encode(images, tmp_path / f"m-{dest}", vae, dtype="float16")


def test_a_data_set_of_others_is_not_overwritten(photos, images, tmp_path):
    (images / "dataset.json").write_text('{"labels": null}')
    with pytest.raises(UserError, match="did not write: choose another --dest"):
        run_convert(photos, images)


def test_a_full_disk_is_seen_before_the_zip_is_begun(photos, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 5000))
        with pytest.raises(UserError, match="make room and give the same command again"):
            run_convert(photos, tmp_path / "a.zip")
    assert [path.name for path in tmp_path.iterdir() if path.name != "photos"] == ["a.zip.partial"]
    monkeypatch.setattr(converting, "center_crop", None)  # nothing is left to crop
    run_convert(photos, tmp_path / "a.zip")
    assert len(files(tmp_path / "a.zip")) == 10


# ---- encode ---------------------------------------------------------------------------------------------------------------------------

def test_encode_writes_the_codec_s_moments_under_the_same_keys(images, vae, tmp_path):
    run_encode(images, tmp_path / "data/vae-sd", vae)
    codec = load_codec(vae)
    entries = LatentDataset(tmp_path / "data")
    assert len(entries) == 10 and entries.num_classes == 2 and entries.resolution == 32 and entries.moments_shape == (8, 8, 8)
    assert LatentSpace.from_record(entries.vae_record) == codec.space and codec.space.scale == 0.7
    for i in (0, 3, 9):
        image, moments, label = entries[i]
        assert torch.allclose(moments, codec.encode(image[None])[0], atol=1e-5) and label == int(i >= 5)
        assert (moments[4:] > 0).all()                                            # the second half is a standard deviation
    assert metadata(tmp_path / "data/vae-sd")["labels"][7] == ["00000/img-mean-std-00000007.npy", 1]


def test_encode_zip_to_zip_in_half_precision(images, vae, tmp_path):
    run_convert(images, tmp_path / "data2" / "images.zip", transform="none")
    run_encode(tmp_path / "data2/images.zip", tmp_path / "data2/vae-sd.zip", vae, dtype="float16", workers=1)
    run_encode(images, tmp_path / "data/vae-sd", vae)
    half, full = LatentDataset(tmp_path / "data2"), LatentDataset(tmp_path / "data")
    assert np.load(io.BytesIO(contents(tmp_path / "data2/vae-sd.zip")["00000/img-mean-std-00000004.npy"])).dtype == np.float16
    assert torch.allclose(half[4][1], full[4][1], atol=2e-3) and not torch.equal(half[4][1], full[4][1])


def test_bf16_moves_moments_by_its_rounding(images, vae, tmp_path):
    """Eight bits are 2^-9 of a value each time it is rounded; some thirty layers of sums add up to less than ten times that."""
    run_encode(images, tmp_path / "fp32", vae)
    run_encode(images, tmp_path / "bf16", vae, precision="bf16")
    exact, coarse = (np.stack([np.load(io.BytesIO(data)) for _, data in sorted(files(tmp_path / name).items())])
                     for name in ("fp32", "bf16"))
    assert coarse.dtype == np.float32 and 2e-4 < np.abs(coarse - exact).mean() / np.abs(exact).mean() < 0.02
    assert metadata(tmp_path / "bf16")["made_with"]["precision"] == "bf16"


def test_a_compiled_vae_sees_batches_of_one_size(images, vae, tmp_path, monkeypatch):
    """Of ten images the last two are filled up to four; what was compiled is said in the record, and does not mix with what was not."""
    monkeypatch.setattr(encoding, "choose_same_kernels", lambda: None)
    monkeypatch.setattr(encoding, "compiler_works", lambda _: True)
    asked, sizes, plainly = [], [], Codec.encode
    monkeypatch.setattr(encoding, "compile_parts", lambda network: asked.append(type(network).__name__))
    monkeypatch.setattr(Codec, "encode", lambda self, batch: sizes.append(len(batch)) or plainly(self, batch))
    run_encode(images, tmp_path / "compiled", vae, compile=True)
    assert asked == ["AutoencoderKL"] and sizes == [4, 4, 4]
    assert metadata(tmp_path / "compiled")["made_with"]["compiled"] is True
    run_encode(images, tmp_path / "plain", vae)
    assert asked == ["AutoencoderKL"] and sizes[3:] == [4, 4, 2] and metadata(tmp_path / "plain")["made_with"]["compiled"] is False
    found = [files(tmp_path / name) for name in ("compiled", "plain")]
    assert found[0].keys() == found[1].keys() and len(found[0]) == 10
    for name in found[0]:
        a, b = (np.load(io.BytesIO(some[name])) for some in found)
        assert np.allclose(a, b, atol=1e-5)
    with pytest.raises(UserError, match="was made with compiled True, now compiled False is asked for"):
        run_encode(images, tmp_path / "compiled", vae)


def test_a_machine_that_cannot_compile_says_what_it_did(images, vae, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "compiler_works", lambda _: False)
    run_encode(images, tmp_path / "moments", vae, compile=True)
    assert metadata(tmp_path / "moments")["made_with"]["compiled"] is False


def test_processes_that_cannot_all_compile(images, vae, tmp_path, monkeypatch):
    from accelerate import utils

    monkeypatch.setattr(utils, "gather_object", lambda mine: [*mine, not mine[0]])
    with pytest.raises(UserError, match="add --no-compile"):
        run_encode(images, tmp_path / "moments", vae)
    assert not (tmp_path / "moments").exists()


def test_tf32_is_refused_on_a_cpu(images, vae, tmp_path):
    with pytest.raises(UserError, match="--precision is tf32, which is a GPU's"):
        run_encode(images, tmp_path / "x", vae, precision="tf32")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_precisions_do_not_mix_and_a_record_without_one_is_fp32s(images, vae, tmp_path, finished):
    dest = tmp_path / "moments"
    run_encode(images, dest, vae)
    whole = contents(dest)
    record = dest / "dataset.json"
    made = json.loads(record.read_text())
    del made["made_with"]["precision"]                                            # as it was written before there was a choice
    record.write_text(json.dumps(made))
    if not finished:
        (dest / ".unfinished.json").write_text(json.dumps(made["made_with"]))
        record.unlink()
        (dest / "00000/img-mean-std-00000003.npy").unlink()
    with pytest.raises(UserError, match="was made with precision fp32, now precision bf16 is asked for"):
        run_encode(images, dest, vae, precision="bf16")
    run_encode(images, dest, vae)
    assert files(dest) == {name: data for name, data in whole.items() if name != "dataset.json"}
    run_encode(images, tmp_path / "coarse", vae, precision="bf16")
    with pytest.raises(UserError, match="was made with precision bf16, now precision fp32 is asked for"):
        run_encode(images, tmp_path / "coarse", vae)


def test_images_under_any_name_keep_their_keys(tmp_path, vae):
    for name in ("n02/b.png", "n01/img-x.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True)
        noise(32, 32).save(tmp_path / "images" / name)
    run_encode(tmp_path / "images", tmp_path / "vae-sd", vae)
    assert set(files(tmp_path / "vae-sd")) == {"n02/img-mean-std-b.npy", "n01/img-mean-std--x.npy"}
    assert len(LatentDataset(tmp_path)) == 2


def test_a_batch_with_a_missing_file_is_redone_whole(images, vae, tmp_path):
    """The last batch is odd in size, so that redoing a single file would use another batch size, and the bits might differ."""
    run_encode(images, tmp_path / "whole", vae)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 10)
        with pytest.raises(Interrupted):
            run_encode(images, tmp_path / "out", vae)
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        codec = load_codec(vae)
        encode_batch = codec.encode
        codec.encode = lambda batch: (sizes.append(len(batch)), encode_batch(batch))[1]
        patch.setattr(encoding, "load_codec", lambda *args: codec)
        run_encode(images, tmp_path / "out", vae)
    assert sizes == [2] and contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_processes_write_what_one_writes(images, vae, tmp_path):
    run_encode(images, tmp_path / "one.zip", vae, batch_size=3)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = run_program([*torchrun, "-m", "preprocessing.dataset_tools", "encode", f"--source={images}", f"--dest={tmp_path / 'two.zip'}",
                        f"--model-url={vae}", "--batch-size=3", "--workers=0"], ACCELERATE_USE_CPU="true")
    assert done.stdout.count("moments of 10 images") == 1
    one, two = files(tmp_path / "one.zip"), files(tmp_path / "two.zip")
    assert one.keys() == two.keys() and metadata(tmp_path / "one.zip") == metadata(tmp_path / "two.zip")
    for name in one:
        assert np.allclose(np.load(io.BytesIO(one[name])), np.load(io.BytesIO(two[name])), atol=1e-6)


# ---- check and the command line -------------------------------------------------------------------------------------------------------

def test_check_draws_images_above_decoded_latents(images, vae, tmp_path, capsys):
    run_encode(images, tmp_path / "data/vae-sd", vae)
    main(["check", f"--source={tmp_path / 'data'}", f"--output={tmp_path / 'look.png'}", "--workers=1"])
    summary = capsys.readouterr().out.strip().splitlines()[-1]
    assert "10 images of 32 px, moments (8, 8, 8), 2 classes, all readable" in summary and "PSNR" in summary
    picture = np.array(Image.open(tmp_path / "look.png"))
    assert picture.shape == (64, 8 * 32, 3)
    assert (picture[:32, :32] == np.array(Image.open(images / "00000/img00000000.png"))).all()
    codec, moments = load_codec(vae), torch.from_numpy(np.load(tmp_path / "data/vae-sd/00000/img-mean-std-00000000.npy"))[None]
    decoded = codec.decode(codec.space.latents(moments, torch.zeros(1, 4, 8, 8)))[0].permute(1, 2, 0).numpy()
    assert (abs(picture[32:, :32].astype(int) - decoded) <= 1).all()


def test_check_says_what_is_wrong(images, vae, tmp_path, capsys):
    data = tmp_path / "data"

    def fail(match: str, *flags: str) -> None:
        with pytest.raises(SystemExit):
            main(["check", f"--source={data}", f"--output={tmp_path / 'look.png'}", "--workers=0", *flags])
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: ") and match in said

    fail("looked for vae-sd")
    run_encode(images, data / "vae-sd", vae)
    fail("expected the name of a .png", f"--output={tmp_path / 'none/look.png'}")
    fail("no readable AutoencoderKL", f"--model-url={images}")
    whole = (data / "vae-sd/dataset.json").read_text()
    (data / "vae-sd/dataset.json").write_text('{"labels": null}')
    fail("moments of shape (8, 8, 8) and images of 32 px do not fit LatentSpace(")
    (data / "vae-sd/dataset.json").write_text(whole)
    (images / "00000/img00000002.png").write_bytes(b"")
    moments = np.load(data / "vae-sd/00000/img-mean-std-00000005.npy")
    moments[0, 0, 0] = np.nan
    np.save(data / "vae-sd/00000/img-mean-std-00000005.npy", moments)
    fail("2 of 10 entries are at fault")
    fail("img00000002.png is not a readable image")
    fail("the moments of 00000/00000005 are not finite")
    (data / "vae-sd/00000/img-mean-std-00000009.npy").unlink()
    fail("1 of 10 images have no partner")


@pytest.mark.parametrize("spelling", [["-m", "preprocessing.dataset_tools"], [str(ROOT / "preprocessing/dataset_tools.py")]])
def test_both_spellings_of_the_command(photos, images, tmp_path, spelling):
    """From the repository as a module, from anywhere as a script."""
    done = run_program([*spelling, "convert", f"--source={photos}", f"--dest={tmp_path / 'x'}", "--resolution=32x32",
                        "--transform=center-crop-dhariwal", "--max-images=7", "--workers=2"], ROOT if "-m" in spelling else tmp_path)
    assert files(tmp_path / "x") == {name: data for name, data in files(images).items() if name < "00000/img00000007"}
    assert "7 images of 32x32, labels from 2 sorted folders (cat, dog)" in done.stdout
