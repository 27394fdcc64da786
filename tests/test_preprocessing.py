"""Data preparation by `main(argv)`: ADM's crop, convert, encode and check; continued, refused, divided, catalogued."""

import io
import json
import shutil
import struct
import sys
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import LatentDataset
from models.cached_features import Features, features_folder, unpack
from models.encoders import load_encoder
from models.vae import load_codec
from preprocessing.crop import center_crop, to_rgb
from preprocessing.dataset_tools import main
from runtime import files
from runtime.catalogue import Catalogue
from runtime.pictures import GAP
from runtime.stores import IMAGE_EXTENSIONS, open_store
from tests import forks

ROOT = Path(__file__).resolve().parent.parent
SIDE, COUNT = 32, 10


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random RGB picture."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def as_file(image: Image.Image, form: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files, named by their paths in the folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def zip_of(folder: Path) -> Path:
    """A deflated zip beside a folder, its entries in reverse order."""
    with zipfile.ZipFile(f"{folder}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*.*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return Path(f"{folder}.zip")


def contents(path: Path) -> dict[str, bytes]:
    """All files of a folder or zip, hidden ones too."""
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def data_files(path: Path) -> dict[str, bytes]:
    """The images, moments or features of a folder or zip."""
    return {name: data for name, data in contents(path).items() if name.endswith((".png", ".npy"))}


def record(path: Path) -> dict:
    return json.loads(contents(path)["dataset.json"])


def pixels(path: Path) -> np.ndarray:
    """The only image of a converted folder, (R, R, 3)."""
    (data,) = data_files(path).values()
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB"
        return np.array(image)


def convert(source: Path, dest: Path, *flags: str) -> None:
    main(["convert", f"--source={source}", f"--dest={dest}", f"--resolution={SIDE}x{SIDE}", "--workers=0",
          "--transform=center-crop-dhariwal", *flags])


def encode(source: Path, dest: Path, *flags: str) -> None:
    main(["encode", f"--source={source}", f"--dest={dest}", "--batch-size=4", "--workers=0", *flags])


@pytest.fixture
def refused(capsys):
    """A function that runs a command, which must fail with one line of error, and returns that line."""

    def run(command, *arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ending:
            command(*arguments)
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert ending.value.code == 2
        return line

    return run


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, vae_folder) -> Path:
    """photos/ in two class folders, and data/ made of them. Read it, or copy it before changing it."""
    folder = tmp_path_factory.mktemp("prepared")
    fill(folder / "photos", {f"{name}/p{i}.png": as_file(picture(33 + 7 * i, 90 - 11 * i, seed + i), "png")
                             for name, seed in (("cat", 0), ("dog", 10)) for i in range(5)})
    convert(folder / "photos", folder / "data/images")
    encode(folder / "data/images", folder / "data/vae-sd", f"--model-url={vae_folder}")
    return folder


@pytest.fixture
def mine(prepared, tmp_path) -> Path:
    """A copy of `prepared` to change; its images know their source by another path."""
    shutil.copytree(prepared, tmp_path / "mine")
    return tmp_path / "mine"


# ------------------------------------------------------------------------------------------------------- crop and modes

def literal_adm_crop(image: Image.Image, target: int) -> np.ndarray:
    """The definition in words: halve by boxes while twice the target fits, scale bicubically, cut the centre."""
    width, height = image.size
    while width >= 2 * target and height >= 2 * target:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.BOX)
    factor = target / (width if width < height else height)
    image = image.resize((round(width * factor), round(height * factor)), resample=Image.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - target) // 2, (array.shape[1] - target) // 2
    return array[top:top + target, left:left + target]


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (31, 29), (63, 64), (64, 65), (131, 129), (257, 90), (7, 200)])
def test_crop_equals_adm(size):
    ours = np.array(center_crop(picture(*size), SIDE))
    assert ours.shape == (SIDE, SIDE, 3) and (ours == literal_adm_crop(picture(*size), SIDE)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1", "CMYK", "I;16", "I"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = picture(40, 50).convert("L")
    if mode.startswith("I"):                                      # 257 * 8-bit grey: the same picture in 16 bits
        image = Image.fromarray(np.array(grey).astype(np.uint16 if mode == "I;16" else np.int32) * 257)
    else:
        image = picture(40, 50).convert(mode)
    assert image.mode == mode
    name, form = ("x.tif", "tiff") if mode in ("CMYK", "I") else ("x.png", "png")
    fill(tmp_path / "a", {name: as_file(image, form)})
    convert(tmp_path / "a", tmp_path / "b")
    expected = grey.convert("RGB") if mode.startswith("I") else image.convert("RGB")
    assert (pixels(tmp_path / "b") == literal_adm_crop(expected, SIDE)).all()


def grey(kind: type, brightest: int) -> Image.Image:
    """A grey picture whose numbers go from 0 to `brightest`."""
    return Image.fromarray((np.arange(40 * 40).reshape(40, 40) % 100 * brightest / 99).astype(kind))


@pytest.mark.parametrize("kind, brightest, form", [
    (np.int32, 255, "tiff"), (np.int32, 10**6, "tiff"), (np.int32, -5, "tiff"), (np.float32, 255, "tiff"),
    (np.uint16, 255, "png"), (np.uint16, 4095, "png"), (np.uint16, 4095, "tiff"), (np.uint16, 16383, "png")])
def test_greys_of_unknown_range_are_refused(tmp_path, capsys, kind, brightest, form):
    """They would become black, or white."""
    fill(tmp_path / "a", {f"x.{form}": as_file(grey(kind, brightest), form)})
    with pytest.raises(SystemExit):
        convert(tmp_path / "a", tmp_path / "b")
    assert f"x.{form}: " in (said := capsys.readouterr().err) and "8 " in said and not data_files(tmp_path / "b")


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6                                              # a quarter turn
    assert to_rgb(Image.open(io.BytesIO(as_file(picture(40, 30), "jpeg", exif=exif))), "x").size == (40, 30)


@pytest.mark.parametrize("form", ["png", "gif", "webp"])
def test_an_animation_is_its_first_frame(tmp_path, form):
    first, *others = (picture(40, 50, seed) for seed in range(3))
    options = {"lossless": True} if form == "webp" else {}
    fill(tmp_path / "a", {f"x.{form}": as_file(first, form, save_all=True, append_images=others, **options)})
    convert(tmp_path / "a", tmp_path / "b")
    alone = Image.open(io.BytesIO(as_file(first, form, **options))).convert("RGB")
    assert (pixels(tmp_path / "b") == literal_adm_crop(alone, SIDE)).all()


@pytest.mark.parametrize("side", [1, 7, 160])                     # the last takes more than one deflate block of 64 KiB
def test_a_png_keeps_its_pixels_uncompressed(tmp_path, side):
    array = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    fill(tmp_path / "a", {"x.png": as_file(Image.fromarray(array), "png")})
    convert(tmp_path / "a", tmp_path / "b", f"--resolution={side}", "--transform=none")
    (png,) = data_files(tmp_path / "b").values()
    assert (pixels(tmp_path / "b") == array).all() and len(png) < side * (1 + 3 * side) + 100
    assert b"\0" + array[0].tobytes() in png
    with Image.open(io.BytesIO(png)) as image:
        image.verify()                                            # checksums


# ------------------------------------------------------------------------------------------------------------- convert

def test_convert_numbers_pictures_and_labels_folders(prepared):
    images = prepared / "data/images"
    names = [f"00000/img{i:08d}.png" for i in range(COUNT)]
    assert set(contents(images)) == {*names, "dataset.json", "catalogue.npz"}
    assert record(images)["labels"] == [[name, int(i >= 5)] for i, name in enumerate(names)]
    seventh = literal_adm_crop(Image.open(prepared / "photos/dog/p2.png"), SIDE)
    assert (np.array(Image.open(images / names[7])) == seventh).all()


@pytest.mark.parametrize("dest", ["out", "out.zip"])
def test_zips_folders_and_workers_make_no_difference(prepared, mine, tmp_path, dest):
    convert(zip_of(mine / "photos"), tmp_path / dest, "--workers=2")
    assert data_files(tmp_path / dest) == data_files(prepared / "data/images")
    assert record(tmp_path / dest)["labels"] == record(prepared / "data/images")["labels"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") or ".partial" in path.name]
    if dest == "out.zip":                                         # equal contents are equal bytes
        with zipfile.ZipFile(tmp_path / dest) as archive:
            kinds = {(entry.compress_type, entry.date_time[0]) for entry in archive.infolist()}
        assert kinds == {(zipfile.ZIP_STORED, 1980)}


def test_labels_of_dataset_json_are_kept(mine, tmp_path):
    photos = mine / "photos"
    names = sorted(str(file.relative_to(photos)) for file in photos.rglob("*.png"))
    (photos / "dataset.json").write_text(json.dumps({"labels": [[name, 9 - i] for i, name in enumerate(names)][::-1]}))
    convert(photos, tmp_path / "a", "--max-images=3")             # each picture has a class of its own
    assert [label for _, label in record(tmp_path / "a")["labels"]] == [9, 8, 7]
    (photos / "dataset.json").write_text('{"labels": null}')
    convert(photos, tmp_path / "b")
    convert(photos / "cat", tmp_path / "flat")
    assert record(tmp_path / "b")["labels"] is record(tmp_path / "flat")["labels"] is None


def test_max_images_are_spread_over_the_classes(tmp_path, mine):
    (mine / "photos/dog").rename(mine / "photos/ant")             # cat is the second class now
    for file in list((mine / "photos/cat").iterdir())[1:]:
        file.unlink()                                             # and has one picture
    for most, labels in ((1, [0]), (2, [0, 1]), (4, [0, 0, 0, 1])):
        convert(mine / "photos", tmp_path / f"{most}", f"--max-images={most}")
        assert [label for _, label in record(tmp_path / f"{most}")["labels"]] == labels
    first = literal_adm_crop(Image.open(mine / "photos/ant/p0.png"), SIDE)
    assert (pixels(tmp_path / "1") == first).all()
    convert(mine / "photos/ant", tmp_path / "flat", "--max-images=3")
    assert len(data_files(tmp_path / "flat")) == 3


def test_class_names_are_kept(prepared, mine, vae_folder, tmp_path):
    assert record(prepared / "data/images")["classes"] == record(prepared / "data/vae-sd")["classes"] == ["cat", "dog"]
    convert(prepared / "data/images", tmp_path / "again")
    assert record(tmp_path / "again")["classes"] == ["cat", "dog"]
    assert record(tmp_path / "again")["labels"] == record(prepared / "data/images")["labels"]


def test_encode_keeps_the_labels_of_class_folders(tmp_path, vae_folder, refused):
    files = {f"{name}/p{i}.png": as_file(picture(32, 32, i), "png") for i, name in enumerate(["dog", "cat", "dog"])}
    fill(tmp_path / "images", files)
    encode(tmp_path / "images", tmp_path / "vae-sd", f"--model-url={vae_folder}")
    assert record(tmp_path / "vae-sd")["classes"] == ["cat", "dog"]
    entries = LatentDataset(tmp_path)
    assert {entries.key(i): entries[i][2] for i in range(3)} == {"cat/p1": 0, "dog/p0": 1, "dog/p2": 1}
    fill(tmp_path / "images", {"loose.png": as_file(picture(32, 32), "png")})
    assert "loose.png" in refused(encode, tmp_path / "images", tmp_path / "x", f"--model-url={vae_folder}")


@pytest.mark.parametrize("names, labels, words", [
    (["ant/a.png", "bee/", "cat/c.png"], None, ["folders without pictures: 1", "(bee)"]),
    (["ant/a.png", "bee/b.heic", "cat/c.png"], None, ["folders without pictures: 1", "(bee)", "(bee/b.heic)"]),
    (["train/ant/a.png", "train/cat/c.png"], None, ["1 top-level folders (train)", "the 2 folders below"]),
    (["train/ant/a.png", "val/ant/c.png"], None, ["2 top-level folders", "the 2 folders below"]),
    (["a.png", "b.png", "c.png"], [0, 500, 999], ["997 of 1000"]),
    (["a.png", "b.png", "c.png"], [1, 2, 3], ["1 of 4", "(0)"]),
    (["ant/a.png", "cat/c.png"], None, []), (["a.png", "b.png", "c.png"], [0, 1, 2], [])])
def test_classes_that_may_not_be_meant_are_said_at_the_door(tmp_path, capsys, names, labels, words):
    source = fill(tmp_path / "photos", {name: as_file(picture(32, 32), "png") for name in names if name[-1] != "/"})
    for name in names:
        (source / name).parent.mkdir(exist_ok=True) if name[-1] != "/" else (source / name).mkdir()
    if labels:
        fill(source, {"dataset.json": json.dumps({"labels": list(zip(names, labels, strict=True))}).encode()})
    convert(source, tmp_path / "out")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(str(source))]
    assert bool(said) == bool(words) and all(word in "".join(said) for word in words)


def test_jfif_and_tif_are_pictures(tmp_path, vae_folder):
    fill(tmp_path / "images", {"a.jfif": as_file(picture(32, 32), "jpeg"), "b.TIF": as_file(picture(32, 32), "tiff")})
    convert(tmp_path / "images", tmp_path / "out")
    encode(tmp_path / "images", tmp_path / "vae-sd", f"--model-url={vae_folder}")
    assert len(data_files(tmp_path / "out")) == len(LatentDataset(tmp_path)) == 2


# Names of a class folder that a file system takes.
ODD = ["!ü", "a b", "ünï-\u65e5\u672c", "line\nbreak", "quote\"'`$(x)", "--help", "\udcff\udc80", "n" * 200, "{0}%s",
       "a\\b", "c:"]


def test_odd_class_names(tmp_path, vae_folder, monkeypatch):
    """Numbered by convert, or kept as the keys of moments; messages fit a terminal that knows ASCII only."""
    fill(tmp_path / "named/images", {f"{name}/img {name[:99]}.png": as_file(picture(32, 32, i), "png")
                                     for i, name in enumerate(ODD)})
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii", errors="strict"))
    convert(tmp_path / "named/images", tmp_path / "out\udcff\n")
    encode(tmp_path / "named/images", tmp_path / "named/vae-sd", f"--model-url={vae_folder}")
    sys.stdout.flush()
    assert b"\\udcff\\n: " in printed.getvalue()
    assert sorted(label for _, label in record(tmp_path / "out\udcff\n")["labels"]) == list(range(len(ODD)))
    named = LatentDataset(tmp_path / "named")
    found = {bytes(named[i][0].permute(1, 2, 0).numpy().tobytes()) for i in range(len(named))}
    assert found == {picture(32, 32, i).tobytes() for i in range(len(ODD))}


# -------------------------------------------------------------------------------------------------------------- encode

def test_encode_writes_the_posterior_under_the_same_keys(prepared, vae_folder):
    codec, entries = load_codec(str(vae_folder)), LatentDataset(prepared / "data")
    assert len(entries) == COUNT and entries.num_classes == 2 and entries.vae_record == codec.space.to_record()
    for i in (0, 3, 9):
        image, moments, label = entries[i]
        posterior = codec.vae.encode(image[None] / 127.5 - 1).latent_dist
        torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.std], dim=1)[0], rtol=1e-4, atol=1e-5)
        assert label == int(i >= 5)
    assert set(data_files(prepared / "data/vae-sd")) == {f"00000/img-mean-std-{i:08d}.npy" for i in range(COUNT)}


@pytest.mark.parametrize("flag, moved", [("--dtype=float16", 2e-4), ("--precision=bf16", 2e-2)])
def test_moments_move_by_their_rounding(prepared, vae_folder, tmp_path, flag, moved):
    """float16 has 11 bits; bf16 has 8 and rounds in each of some thirty layers."""
    encode(prepared / "data/images", tmp_path / "coarse", f"--model-url={vae_folder}", flag)
    coarse, exact = ({name: np.load(io.BytesIO(data)) for name, data in data_files(path).items()}
                     for path in (tmp_path / "coarse", prepared / "data/vae-sd"))
    assert coarse.keys() == exact.keys()
    away = np.mean([abs(coarse[name] - exact[name]).mean() / abs(exact[name]).mean() for name in exact])
    assert moved / 100 < away < moved


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("zipped", [False, True])
def test_features_are_the_encoders(mine, encoder_folder, dtype, zipped):
    name = f"local-dir:{encoder_folder}"
    dest = mine / "data" / (features_folder(name) + ".zip" * zipped)
    encode(mine / "data/images", dest, f"--enc-type={name}", f"--dtype={dtype}")
    features = Features(dest)
    layout = features.record.layout()
    fields = {"class_token", "patches"} | ({"scales"} if dtype == "int8" else set())
    assert set(layout.names) == fields and layout["patches"].base == np.dtype(dtype)
    assert "weights" not in record(dest)["features"] and len(record(dest)["features"]["weights_file"]) == 64
    image, _, _, stored = LatentDataset(mine / "data", features=[features])[7]
    class_token, patches = unpack({part: value[None] for part, value in stored.items()})
    expected_class, expected = load_encoder(name, "cpu", SIDE).tokens(image[None])            # (1, E), (1, N, E)
    torch.testing.assert_close(class_token, expected_class, rtol=1e-4, atol=1e-5)
    step = expected.abs().amax(dim=2, keepdim=True) / (254 if dtype == "int8" else 2048)
    assert ((patches - expected).abs() <= step * 1.01 + 1e-5).all()


def test_encode_takes_the_first_images_of_each_class(prepared, vae_folder, tmp_path):
    encode(prepared / "data/images", tmp_path / "few", f"--model-url={vae_folder}", "--max-images=2")
    assert set(data_files(tmp_path / "few")) == {f"00000/img-mean-std-{i:08d}.npy" for i in (0, 5)}


def test_two_processes_write_what_one_writes(prepared, vae_folder, tmp_path):
    forks.two_ranks(forks.run_main, main, [
        "encode", f"--model-url={vae_folder}", f"--source={prepared / 'data/images'}", f"--dest={tmp_path / 'two.zip'}",
        "--batch-size=4", "--workers=0"])
    assert data_files(tmp_path / "two.zip") == data_files(prepared / "data/vae-sd")
    assert record(tmp_path / "two.zip") == record(prepared / "data/vae-sd")


# ----------------------------------------------------------------------------------------------------------- continuing

@pytest.mark.parametrize("command", ["convert", "encode"])
@pytest.mark.parametrize("dest", ["out", "out.zip"])
def test_the_same_command_continues_after_a_damaged_picture(mine, vae_folder, tmp_path, refused, command, dest):
    """The picture is found in the middle of the work; replaced, the rest is done and nothing twice."""
    run, source, name, *flags = {
        "convert": (convert, mine / "photos", "dog/p3.png"),
        "encode": (encode, mine / "data/images", "00000/img00000008.png", f"--model-url={vae_folder}")}[command]
    run(source, tmp_path / "whole", *flags)
    good = (source / name).read_bytes()
    (source / name).write_bytes(good[:90])
    assert name in refused(run, source, tmp_path / dest, *flags)
    begun = tmp_path / f"{dest}.partial" if dest.endswith(".zip") else tmp_path / dest
    early = {file: file.stat().st_mtime_ns for file in begun.rglob("*0000000[0-3].*")}
    assert len(early) == 4 and not (begun / "dataset.json").exists()
    refused(convert, tmp_path / dest, tmp_path / "x")             # unfinished, so no data set yet

    (source / name).write_bytes(good)
    run(source, tmp_path / dest, *flags)
    assert data_files(tmp_path / dest) == data_files(tmp_path / "whole")
    assert record(tmp_path / dest) == record(tmp_path / "whole")
    if begun == tmp_path / dest:
        assert all(file.stat().st_mtime_ns == time for file, time in early.items())
    assert not list(tmp_path.glob("*.partial")) and not list((tmp_path / dest).glob(".*"))


def spoil(photos: Path, *names: str) -> None:
    for name in names:
        (photos / name).write_bytes((photos / name).read_bytes()[:90])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dest", ["out", "out.zip"])
def test_all_bad_pictures_are_named_and_the_work_goes_on_without_them(mine, tmp_path, capsys, refused, workers, dest):
    """Two are bad: one is removed from the source, the other allowed; numbers and labels of the others stay."""
    photos, out, flag = mine / "photos", tmp_path / dest, f"--workers={workers}"
    convert(photos, tmp_path / "whole")
    whole = data_files(tmp_path / "whole")
    spoil(photos, "cat/p1.png", "dog/p3.png")
    with pytest.raises(SystemExit):
        convert(photos, out, flag)
    said = capsys.readouterr().err
    assert all(said.count(f"{name}: not a readable image") == 1 for name in ("cat/p1.png", "dog/p3.png"))
    assert "2 of 10" in said and not (out / "dataset.json").exists()
    begun = tmp_path / f"{dest}.partial" if dest.endswith(".zip") else out
    times = {file: file.stat().st_mtime_ns for file in begun.rglob("*.png")}
    assert len(times) == 8
    (photos / "cat/p1.png").unlink()
    assert "--skip-bad 1" in (line := refused(convert, photos, out)) and "1 of 9" in line
    for _ in range(2):                                            # a folder is filled again, as after `check`
        convert(photos, out, "--skip-bad=1", flag)
    assert begun != out or all(file.stat().st_mtime_ns == time for file, time in times.items())
    left = [name for i, name in enumerate(sorted(whole)) if i not in (1, 8)]
    assert data_files(out) == {name: whole[name] for name in left}
    assert record(out)["labels"] == [entry for entry in record(tmp_path / "whole")["labels"] if entry[0] in left]
    assert not list(tmp_path.glob("*.partial")) and not list(out.glob(".*"))
    assert Catalogue(open_store(out), IMAGE_EXTENSIONS).names.tolist() == [name.encode() for name in left]


def test_pictures_removed_from_the_source_of_unfinished_work_are_not_in_the_data(mine, tmp_path, refused, capsys):
    """Also those that were converted before, and with --max-images; one that is new would have no number."""
    photos = mine / "photos"
    convert(photos, tmp_path / "whole", "--max-images=6")
    whole = data_files(tmp_path / "whole")
    spoil(photos, "dog/p1.png")
    fill(photos, {"a note whose name is longer than those of the pictures.txt": b""})
    refused(convert, photos, tmp_path / "out", "--max-images=6")
    shutil.copytree(photos / "dog", photos / "emu")
    assert "--dest" in (line := refused(convert, photos, tmp_path / "out", "--max-images=6")) and "emu/p0.png" in line
    shutil.rmtree(photos / "emu")
    for gone in ("a note whose name is longer than those of the pictures.txt", "cat/p0.png", "dog/p1.png"):
        (photos / gone).unlink()
    convert(photos, tmp_path / "out", "--max-images=6")
    convert(photos, tmp_path / "out", "--max-images=6")
    assert "finished" in capsys.readouterr().out
    left = [name for i, name in enumerate(sorted(whole)) if i not in (0, 4)]
    assert data_files(tmp_path / "out") == {name: whole[name] for name in left}
    assert [label for _, label in record(tmp_path / "out")["labels"]] == [0, 0, 1, 1]


def test_a_data_set_of_bad_pictures_alone_is_refused(tmp_path, refused):
    fill(tmp_path / "a", {"x.png": b"", "y.png": b""})
    line = refused(convert, tmp_path / "a", tmp_path / "b", "--skip-bad=9")
    assert "2 of 2" in line and "--skip-bad" not in line


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_may_be_read_later_is_not_left_out(mine, tmp_path, monkeypatch, workers):
    """Reading it gives EIO, as of a network disk."""
    monkeypatch.setattr(files, "READ_PAUSES", (0.01, 0.01))
    picture, out, flags = mine / "photos/dog/p3.png", tmp_path / "out", ("--skip-bad=9", f"--workers={workers}")
    good = picture.read_bytes()
    picture.unlink()
    picture.symlink_to("/proc/self/mem")
    with pytest.raises(SystemExit) as ending:
        convert(mine / "photos", out, *flags)
    assert ending.value.code == 75 and not (out / "dataset.json").exists()
    picture.unlink()
    picture.write_bytes(good)
    convert(mine / "photos", out, *flags)
    assert len(data_files(out)) == COUNT


def test_a_refused_command_removes_nothing(mine, tmp_path, monkeypatch, refused):
    """Also not the images whose pictures are gone from the source."""
    spoil(mine / "photos", "dog/p3.png")
    refused(convert, mine / "photos", tmp_path / "out")
    (mine / "photos/cat/p0.png").unlink()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 0))
    assert "room" in refused(convert, mine / "photos", tmp_path / "out")
    assert len(data_files(tmp_path / "out")) == COUNT - 1


def test_pictures_that_need_a_transform_are_refused_before_work(mine, tmp_path, refused):
    """Only a rare one is found later; then the sentence says what to do with what is done."""
    fill(mine / "photos", {"cat/p0.png": b""})                    # says nothing about the others
    words = ["convert", "--resolution=8", "--workers=0", f"--dest={tmp_path / 'out'}"]
    assert "p1.png" in (line := refused(main, [*words, f"--source={mine / 'photos'}"])) and "--transform" in line
    assert not (tmp_path / "out").exists()
    fill(tmp_path / "many", {f"{i:02d}.png": as_file(picture(8, 9 if i == 32 else 8), "png") for i in range(66)})
    assert "32.png" in (line := refused(main, [*words, f"--source={tmp_path / 'many'}"])) and "remove" in line
    main([*words, f"--source={tmp_path / 'many'}", "--transform=center-crop-dhariwal"])
    assert len(data_files(tmp_path / "out")) == 66


@pytest.mark.parametrize("command", ["convert", "encode"])
def test_finished_work_is_left_alone_and_gaps_are_filled(mine, vae_folder, capsys, command):
    """Also empty files, which a power failure leaves. `check` asks to remove what is damaged."""
    run, source, dest, *flags = {
        "convert": (convert, mine / "photos", mine / "out"),
        "encode": (encode, mine / "data/images", mine / "out", f"--model-url={vae_folder}")}[command]
    run(source, dest, *flags)
    files = sorted(file for file in dest.rglob("*") if file.is_file())
    whole, times = data_files(dest), [file.stat().st_mtime_ns for file in files]
    capsys.readouterr()
    run(source, dest, *flags)
    assert "finished" in capsys.readouterr().out and [file.stat().st_mtime_ns for file in files] == times
    files[3].unlink()
    files[5].write_bytes(b"")
    run(source, dest, *flags)
    assert data_files(dest) == whole and len(LatentDataset(mine / "data")) == COUNT


def test_other_settings_are_refused(prepared, vae_folder, tmp_path, refused):
    photos, images, vae = prepared / "photos", prepared / "data/images", f"--model-url={vae_folder}"
    for dest in (tmp_path / "out", tmp_path / "out.zip"):
        convert(photos, dest, "--max-images=4")
        for flags, word in ((["--max-images=4", "--resolution=16"], "resolution"), (["--max-images=3"], "images"),
                            (["--max-images=4", "--transform=none"], "transform")):
            assert word in refused(convert, photos, dest, *flags)
        assert "source" in refused(convert, photos / "cat", dest, "--max-images=4")
        assert "command" in refused(encode, images, dest, vae)
    for flag in ("--dtype=float16", "--precision=bf16"):
        assert flag.partition("=")[0][2:] in refused(encode, images, prepared / "data/vae-sd", vae, flag)


@pytest.mark.parametrize("command", ["convert", "encode"])
def test_a_source_that_changed_is_refused(mine, vae_folder, tmp_path, refused, command):
    if command == "convert":
        convert(mine / "photos", tmp_path / "out")
        (mine / "photos/cat/p0.png").rename(mine / "photos/cat/p9.png")
        line = refused(convert, mine / "photos", tmp_path / "out")
    else:
        (mine / "data/images/dataset.json").write_text('{"labels": null}')
        line = refused(encode, mine / "data/images", mine / "data/vae-sd", f"--model-url={vae_folder}")
    assert "other pictures or labels" in line and "source_contents" not in line


@pytest.mark.parametrize("name, text", [(".unfinished.json", "[" * 100_000), (".unfinished.json", '{"command": 1}'),
                                        ("dataset.json", '{"made_with": [1]}'), ("dataset.json", '{"labels": null}'),
                                        ("more.txt", "")])
def test_a_folder_of_others_is_not_overwritten(prepared, tmp_path, refused, name, text):
    fill(tmp_path / "x", found := {name: text.encode(), "other.txt": b""})
    line = refused(convert, prepared / "photos", tmp_path / "x")
    assert str(tmp_path / "x") in line and ("damaged" in line or name != ".unfinished.json" or "made with" in line)
    assert contents(tmp_path / "x") == found


# ------------------------------------------------------------------------------------------------------------- refusals

FLAGS = [
    ("convert --resolution=256x128", "--resolution"), ("convert --resolution=0x0", "--resolution"),
    ("convert --resolution=256x", "--resolution"), ("convert --resolution=1.5", "--resolution"),
    ("convert --resolution=²", "--resolution"), (f"convert --resolution={'9' * 5000}", "--resolution"),
    ("convert --resolution=99999", "--resolution"), ("convert --max-images=0", "--max-images"),
    ("convert --transform=crop", "--transform"), ("convert --workers=-1", "--workers"),
    ("encode --batch-size=0", "--batch-size"), ("encode --workers=-1", "--workers"), ("encode --dtype=int8", "int8"),
    ("encode --precision=tf32", "--precision"), ("encode --model-url=no/such/vae/here", "no/such/vae/here"),
    ("encode --encoder-weights=x.pth", "--encoder-weights"), ("encode --enc-type=a,b", "--enc-type"),
    ("encode --enc-type=dinov2-vit-b --model-url=ema", "--model-url"),
    ("encode --enc-type=dinov2-vit-b --precision=fp32", "--precision"),
    ("encode --enc-type=dinov2-vit-b --no-compile", "compile"),
    ("encode --enc-type=dinov2-vit-b --dtype=float32", "--dtype"), ("encode --enc-type=dinov2-vit-b", "--dest"),
    ("check --output=look.jpg", "--output"), ("check --output=none/look.png", "--output"),
]


@pytest.mark.parametrize("line, word", FLAGS, ids=[line[:60] for line, _ in FLAGS])
def test_flags_are_refused_before_work(prepared, tmp_path, monkeypatch, refused, line, word):
    monkeypatch.chdir(tmp_path)
    command, *flags = line.split()
    source = {"convert": "photos", "encode": "data/images", "check": "data"}[command]
    dest = [] if command == "check" else ["--dest=x"]
    assert word in refused(main, [command, f"--source={prepared / source}", *dest, *flags])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run", [convert, encode])
def test_wrong_paths_are_refused(mine, tmp_path, refused, run):
    fill(tmp_path, {"file": b"", "full/other.txt": b"", "folder.zip/x": b""})
    (tmp_path / "empty").mkdir()
    images, flags = mine / "data/images", [] if run is convert else [f"--model-url={ROOT / 'toy/networks/vae'}"]
    for source, dest, word in (("nowhere", "x", "nowhere"), ("empty", "x", "empty"), (images, images / "x", "images"),
                               (images, "file", "file"), (images, "file/x", "file"), (images, "full", "full"),
                               (images, "folder.zip", "folder.zip")):
        assert word in refused(run, tmp_path / source, tmp_path / dest, *flags)
    assert not (tmp_path / "x").exists()


def png_claiming(width: int, height: int) -> bytes:
    """A png whose header claims a size and that holds no pixel."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


DAMAGED = {
    "empty.png": b"", "text.png": b"no picture", "cut.png": as_file(picture(40, 50), "png")[:500],
    "cut.jpg": as_file(picture(40, 50), "jpeg")[:500],
    "eps.png": as_file(picture(8, 8), "eps"),                     # for which Pillow would call Ghostscript
    "float.tif": as_file(Image.new("F", (8, 8)), "tiff"), "strip.png": as_file(Image.new("L", (200_000, 1)), "png"),
    "bomb.png": png_claiming(40_000, 40_000), "large.png": png_claiming(12_000, 12_000),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")         # pytest resets the program's filter
@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_picture_that_cannot_be_converted_is_named(tmp_path, refused, name, zipped):
    source = fill(tmp_path / "a", {name: DAMAGED[name]})
    assert name in refused(convert, zip_of(source) if zipped else source, tmp_path / "b")
    assert not list((tmp_path / "b").rglob("*.png"))


def test_a_worker_that_meets_a_damaged_picture_names_it(mine, tmp_path, refused):
    (mine / "photos/dog/p1.png").write_bytes(b"")
    assert "dog/p1.png" in refused(convert, mine / "photos", tmp_path / "x", "--workers=1")
    assert not (tmp_path / "x/dataset.json").exists()


def test_images_of_another_size_are_refused(mine, vae_folder, tmp_path, refused):
    vae = f"--model-url={vae_folder}"
    assert "p0.png" in refused(convert, mine / "photos", tmp_path / "x", "--transform=none")
    fill(mine / "data/images", {"00000/img00000006.png": as_file(picture(64, 64), "png")})
    assert "img00000006.png" in refused(encode, mine / "data/images", tmp_path / "y", vae)
    convert(mine / "photos", tmp_path / "odd", "--resolution=30")
    assert "30 px" in refused(encode, tmp_path / "odd", tmp_path / "z", vae)      # 4 pixels to a latent
    assert not (tmp_path / "z").exists()


def test_a_vae_whose_latents_are_zeros_is_refused(prepared, vae_folder, tmp_path, refused):
    vae = shutil.copytree(vae_folder, tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.0}))
    assert "scale" in refused(encode, prepared / "data/images", tmp_path / "x", f"--model-url={vae}")
    assert not (tmp_path / "x").exists()


def test_incomplete_labels_are_refused(mine, tmp_path, refused):
    fill(mine / "photos", {"loose.png": as_file(picture(40, 40), "png")})
    assert "loose.png" in refused(convert, mine / "photos", tmp_path / "x")
    (mine / "photos/dataset.json").write_text(json.dumps({"labels": [["cat/p0.png", 0]]}))
    assert "cat/p1.png" in refused(convert, mine / "photos", tmp_path / "x")


@pytest.mark.parametrize("name, dest", [("\udcff.png", "x.zip"), ("a\\b.png", "x.zip"), ("c:/x.png", "x.zip"),
                                        ("n" * 245 + ".png", "x")])
def test_names_that_the_destination_cannot_hold_are_refused(tmp_path, vae_folder, refused, name, dest):
    fill(tmp_path / "images", {name: as_file(picture(32, 32), "png")})
    assert "rename" in refused(encode, tmp_path / "images", tmp_path / dest, f"--model-url={vae_folder}")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("name", ["../../outside.png", "/outside.png", "a\\..\\outside.png"])
@pytest.mark.parametrize("run", [convert, encode])
def test_a_zip_writes_nothing_outside_of_the_destination(tmp_path, refused, name, run):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, as_file(picture(32, 32), "png"))
    assert "outside.png" in refused(run, tmp_path / "a.zip", tmp_path / "deep/er/out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("kind", ["convert", "moments", "features"])
@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_a_full_disk_is_refused_before_work(prepared, vae_folder, encoder_folder, tmp_path, monkeypatch, refused, kind,
                                            suffix):
    """Ten files of a block (4096 bytes) or more each; a zip takes twice that for a while."""
    usage, name = namedtuple("usage", "total used free"), f"local-dir:{encoder_folder}"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, COUNT * 4096 - 1))
    run, source, dest, flags = {
        "convert": (convert, "photos", "x", []), "moments": (encode, "data/images", "x", [f"--model-url={vae_folder}"]),
        "features": (encode, "data/images", features_folder(name), [f"--enc-type={name}"])}[kind]
    assert "room" in refused(run, prepared / source, tmp_path / f"{dest}{suffix}", *flags)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------- catalogue and check

@pytest.mark.parametrize("suffix, catalogue", [("", "{}/catalogue.npz"), (".zip", "{}.zip.catalogue.npz")])
def test_convert_and_encode_leave_a_catalogue(prepared, vae_folder, tmp_path, suffix, catalogue):
    convert(prepared / "photos", tmp_path / f"images{suffix}")
    encode(tmp_path / f"images{suffix}", tmp_path / f"vae-sd{suffix}", f"--model-url={vae_folder}")
    for kind, extensions in (("images", IMAGE_EXTENSIONS), ("vae-sd", (b".npy",))):
        file = tmp_path / catalogue.format(kind)
        assert file.is_file()
        read = Catalogue(open_store(tmp_path / f"{kind}{suffix}"), extensions)
        file.unlink()
        listed = Catalogue(open_store(tmp_path / f"{kind}{suffix}"), extensions)
        assert (read.keys == listed.keys).all() and (read.names == listed.names).all()
        assert read.labels.tolist() == listed.labels.tolist() == [0] * 5 + [1] * 5
        assert read.metadata == listed.metadata


def test_check_draws_images_above_decoded_latents_and_leaves_catalogues(mine, vae_folder, tmp_path, capsys):
    data, look = mine / "data", tmp_path / "look.png"
    for file in data.rglob("catalogue.npz"):
        file.unlink()
    main(["check", f"--source={data}", f"--output={look}", "--workers=1"])
    assert "PSNR" in capsys.readouterr().out
    drawn = np.array(Image.open(look)).astype(int)
    assert drawn.shape == (GAP + 2 * SIDE + GAP, GAP + 8 * (SIDE + GAP), 3)
    drawn = drawn[GAP:-GAP, GAP:]
    assert (drawn[:SIDE, :SIDE] == np.array(Image.open(data / "images/00000/img00000000.png"))).all()
    codec, moments = load_codec(str(vae_folder)), LatentDataset(data)[0][1]
    decoded = codec.decode(codec.space.latents(moments[None], torch.zeros(1, 4, 8, 8)))[0].permute(1, 2, 0).numpy()
    assert (abs(drawn[SIDE:, :SIDE] - decoded) <= 1).all()
    assert (data / "images/catalogue.npz").exists() and (data / "vae-sd/catalogue.npz").exists()


def test_check_names_every_damaged_file(mine, encoder_folder, tmp_path, capsys):
    data, name = mine / "data", f"local-dir:{encoder_folder}"
    encode(data / "images", data / features_folder(name), f"--enc-type={name}")
    cut = np.load(data / "vae-sd/00000/img-mean-std-00000005.npy")
    cut[0, 0, 0] = np.nan
    np.save(data / "vae-sd/00000/img-mean-std-00000005.npy", cut)
    for damaged in ("images/00000/img00000002.png", "images/00000/img00000007.png",
                    "vae-sd/00000/img-mean-std-00000003.npy", f"{features_folder(name)}/00000/img00000008.npy"):
        (data / damaged).write_bytes((data / damaged).read_bytes()[:300])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["check", f"--source={data}", f"--output={tmp_path / 'look.png'}", "--workers=0"])
    printed = "".join(capsys.readouterr())
    assert "5 of 10" in printed and not (tmp_path / "look.png").exists()
    for i in (2, 3, 5, 7, 8):
        assert f"0000000{i}" in printed


def checked(data: Path, capsys) -> str:
    """What `check` prints about a faulty data set."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["check", f"--source={data}", f"--output={data / 'look.png'}", "--workers=0"])
    assert not (data / "look.png").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize("zipped", [False, True])
def test_check_notices_files_replaced_under_their_names(mine, encoder_folder, tmp_path, capsys, zipped):
    """By others that are as good to read: the moments of another image, say."""
    data, folder = mine / "data", features_folder(f"local-dir:{encoder_folder}")
    encode(data / "images", data / folder, f"--enc-type=local-dir:{encoder_folder}")
    for first, second in (("images/00000/img00000002.png", "images/00000/img00000003.png"),
                          ("vae-sd/00000/img-mean-std-00000005.npy", "vae-sd/00000/img-mean-std-00000006.npy"),
                          (f"{folder}/00000/img00000008.npy", f"{folder}/00000/img00000009.npy")):
        shutil.copy(data / first, data / second)
    (data / "images/00000/img00000000.png").write_bytes(b"")      # is unreadable, and not said to be replaced as well
    if zipped:
        zip_of(data / "vae-sd")
        shutil.rmtree(data / "vae-sd")
    said = checked(data, capsys)
    assert said.count("replaced") == 3 and "4 of 10" in said
    assert all(f"0000000{i}" in said for i in (0, 3, 6, 9))


@pytest.mark.parametrize("place, value", [(0, 3e38), (0, -1e6), (5, -1e-3), (5, 3e38), (5, np.nan), (5, np.inf)])
def test_check_names_moments_that_no_vae_writes(mine, capsys, place, value):
    """(8, 8, 8): the mean is first, then the standard deviation."""
    path = mine / "data/vae-sd/00000/img-mean-std-00000005.npy"
    moments = np.load(path)
    moments[place, 0, 0] = value
    np.save(path, moments)
    assert "00000005: its moments" in (said := checked(mine / "data", capsys)) and "1 of 10" in said


def test_check_lists_files_without_a_partner_beside_all_other_faults(mine, encoder_folder, capsys):
    data, folder = mine / "data", features_folder(f"local-dir:{encoder_folder}")
    encode(data / "images", data / folder, f"--enc-type=local-dir:{encoder_folder}")
    for name in ("images/00000/img00000001.png", "vae-sd/00000/img-mean-std-00000003.npy",
                 f"{folder}/00000/img00000004.npy"):
        (data / name).unlink()
    for name in ("images/00000/img00000000.png", "vae-sd/00000/img-mean-std-00000002.npy",
                 "vae-sd/00000/img-mean-std-00000007.npy"):       # the first pair that is whole is the sixth
        (data / name).write_bytes(b"damaged")
    said = checked(data, capsys)
    assert "6 of 10" in said and all(f"0000000{i}" in said for i in (0, 1, 2, 3, 4, 7)) and "00000005" not in said
    for file in (data / "vae-sd").rglob("*.npy"):
        file.write_bytes(b"")
    assert "10 of 10" in checked(data, capsys)


@pytest.mark.parametrize("fault, word", [("no moments", "vae-sd"), ("no partner", "1 of 10"),
                                         ("no VAE", "AutoencoderKL"), ("other VAE", "encode")])
def test_check_refuses_what_does_not_fit(mine, tmp_path, refused, fault, word):
    data, flags = mine / "data", []
    if fault == "no moments":
        shutil.rmtree(data / "vae-sd")
    elif fault == "no partner":
        (data / "vae-sd/00000/img-mean-std-00000009.npy").unlink()
    elif fault == "no VAE":
        flags = [f"--model-url={data / 'images'}"]
    else:                                                         # without a record it is taken for Stable Diffusion's
        (data / "vae-sd/dataset.json").write_text('{"labels": null}')
    look = f"--output={tmp_path / 'look.png'}"
    assert word in refused(main, ["check", f"--source={data}", look, "--workers=0", *flags])


@pytest.mark.parametrize("place, word", [("nowhere", "no such"), ("images", "give"), ("vae-sd", "give")])
def test_check_says_which_folder_it_wants(mine, tmp_path, refused, place, word):
    line = refused(main, ["check", f"--source={mine / 'data' / place}", f"--output={tmp_path / 'look.png'}"])
    assert word in line and (word != "give" or line.endswith(str(mine / "data")))
