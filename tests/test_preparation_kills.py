"""Preparation that is killed at any moment: the same command goes on, and ends with the files of an undisturbed run and no others."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from preprocessing import work
from preprocessing.convert import convert
from preprocessing.encode import encode

ROOT = Path(__file__).resolve().parent.parent
SIDE, COUNT = 32, 400


@pytest.fixture(autouse=True)
def one_thread():
    """As in the processes that are started here: bits may depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """COUNT images of noise in two classes, under other names than `convert` gives."""
    folder = tmp_path_factory.mktemp("source")
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i:03d}.png", compress_level=0)
    return folder


def everything(path: Path) -> dict[str, bytes]:
    """Each file below the path, hidden ones too, by its name; that of a zip under no name."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def prepare(command: str, source: Path, dest: Path, vae: Path) -> None:
    """In this process."""
    if command == "convert":
        convert(str(source), str(dest), f"{SIDE}x{SIDE}", "center-crop-dhariwal", workers=0)
    else:
        encode(str(source), str(dest), str(vae), batch_size=3, dtype="float32", workers=0)


def start(command: str, source: Path, dest: Path, vae: Path) -> subprocess.Popen:
    """The same as a process of its own."""
    flags = [f"--resolution={SIDE}x{SIDE}"] if command == "convert" else [f"--model-url={vae}", "--batch-size=3"]
    return subprocess.Popen([sys.executable, "-m", "preprocessing.dataset_tools", command, f"--source={source}", f"--dest={dest}",
                             "--workers=0", *flags], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def written(folder: Path) -> int:
    """How many files with their final name lie in the folder."""
    return sum(len(names) for place, _, names in os.walk(folder) if not Path(place).name.startswith("."))


@pytest.mark.parametrize("command, name, kills", [("encode", "out", 3), ("encode", "out.zip", 1), ("convert", "out", 1)])
def test_killed_and_started_again_it_ends_with_the_same_files(images, vae_folder, tmp_path, command, name, kills):
    (tmp_path / "undisturbed").mkdir()
    prepare(command, images, tmp_path / "undisturbed" / name, vae_folder)
    dest = tmp_path / "killed" / name
    begun = dest.with_name(f"{name}.partial") if name.endswith(".zip") else dest
    chance = random.Random(f"{command} {name}")
    for kill in range(kills):
        # Every start writes UNFINISHED and then something new before it is killed, and COUNT / 4 files are left for the last one.
        enough = written(begun) + chance.randrange(5, COUNT * 3 // 4 // kills - 30)
        process = start(command, images, dest, vae_folder)
        while written(begun) < enough and process.poll() is None:
            time.sleep(chance.random() / 500)
        process.kill()
        assert process.wait() == -signal.SIGKILL, f"start {kill} ended before it was killed"
        assert (begun / ".unfinished.json").exists() and not (begun / "dataset.json").exists() and enough <= written(begun) < COUNT
    process = start(command, images, dest, vae_folder)
    assert process.wait() == 0
    assert everything(tmp_path / "killed") == everything(tmp_path / "undisturbed")
    assert not list((tmp_path / "killed").rglob(".*"))


# ---- moments that are too short to be met from outside --------------------------------------------------------------------------------

class Killed(BaseException):
    """Nothing of the program catches it, as nothing catches SIGKILL."""


def small(images: Path, folder: Path) -> Path:
    for file in sorted(images.rglob("*.png"))[:5]:
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / file.parent.name)
    return folder


def die(*_, **__):
    raise Killed


def die_in_the_zip(patch: pytest.MonkeyPatch) -> None:
    write, count = zipfile.ZipFile.writestr, iter(range(3))

    def some(self, info, data):
        next(count, None) is not None or die()
        write(self, info, data)

    patch.setattr(zipfile.ZipFile, "writestr", some)
    patch.setattr(Path, "unlink", lambda *_, **__: None)          # SIGKILL lets nobody clear up


def die_in_the_cleaning(patch: pytest.MonkeyPatch) -> None:
    def half(folder, **_):
        next(file for file in sorted(folder.rglob("*.npy"))).unlink()
        die()

    patch.setattr(shutil, "rmtree", half)


def die_before_a_name(wanted: str):
    """Between writing and renaming."""
    def arrange(patch: pytest.MonkeyPatch) -> None:
        replace = os.replace
        patch.setattr(os, "replace", lambda a, b: die() if Path(b).name == wanted else replace(a, b))
        patch.setattr(Path, "unlink", lambda *_, **__: None)

    return arrange


MOMENTS = {
    "before the first file is named": ("out", die_before_a_name(".unfinished.json")),
    "before a file is named": ("out", die_before_a_name("img-mean-std-002.npy")),
    "before dataset.json is named": ("out", die_before_a_name("dataset.json")),
    "before dataset.json of a zip is named": ("out.zip", die_before_a_name("dataset.json")),
    "before cleaning": ("out", lambda patch: patch.setattr(shutil, "rmtree", die)),
    "while the zip is written": ("out.zip", die_in_the_zip),
    "before the zip is named": ("out.zip", die_before_a_name("out.zip")),
    "while the zip's files are removed": ("out.zip", die_in_the_cleaning),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_moment(images, vae_folder, tmp_path, moment):
    name, arrange = MOMENTS[moment]
    source = small(images, tmp_path / "source")
    prepare("encode", source, tmp_path / "undisturbed" / name, vae_folder)
    with pytest.MonkeyPatch.context() as patch:
        arrange(patch)
        with pytest.raises(Killed):
            prepare("encode", source, tmp_path / "killed" / name, vae_folder)
    assert everything(tmp_path / "killed") != everything(tmp_path / "undisturbed")
    prepare("encode", source, tmp_path / "killed" / name, vae_folder)
    assert everything(tmp_path / "killed") == everything(tmp_path / "undisturbed")
    assert not list((tmp_path / "killed").rglob(".*"))


# ---- what a power failure leaves ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_an_empty_file_is_written_again(images, vae_folder, tmp_path, name):
    """With its final name but without a byte, as a file system may leave it that was not flushed."""
    source = small(images, tmp_path / "source")
    prepare("encode", source, tmp_path / "undisturbed" / name, vae_folder)
    begun = tmp_path / "cut" / (f"{name}.partial" if name.endswith(".zip") else name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work.Destination, "finish", die)
        with pytest.raises(Killed):
            prepare("encode", source, tmp_path / "cut" / name, vae_folder)
    (begun / "a" / "img-mean-std-002.npy").write_bytes(b"")
    prepare("encode", source, tmp_path / "cut" / name, vae_folder)
    assert everything(tmp_path / "cut") == everything(tmp_path / "undisturbed")
    if name == "out":                                                             # nor is a finished folder believed
        (begun / "a" / "img-mean-std-004.npy").write_bytes(b"")
        prepare("encode", source, tmp_path / "cut" / name, vae_folder)
        assert everything(tmp_path / "cut") == everything(tmp_path / "undisturbed")


def test_what_says_that_the_work_is_whole_is_on_the_disk_before_it_is_named(images, vae_folder, tmp_path, monkeypatch):
    source, flushed, named = small(images, tmp_path / "source"), set(), {}
    fsync, replace = os.fsync, os.replace

    def note(handle):
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    def rename(partial, path):
        named[Path(path).name] = os.stat(partial).st_ino in flushed
        replace(partial, path)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", rename)
    prepare("encode", source, tmp_path / "out.zip", vae_folder)
    assert [name for name, first in named.items() if first] == [".unfinished.json", "dataset.json", "out.zip"]
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert json.loads(archive.read("dataset.json"))["made_with"]["images"] == 5
