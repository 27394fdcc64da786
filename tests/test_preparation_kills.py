"""Preparation that is killed at any moment: the same command continues and ends with the files of an undisturbed run.

The processes are forks that are really killed: nothing of the program runs after it.
"""

import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from preprocessing.dataset_tools import main
from tests.conftest import random_images
from tests.test_preprocessing import fork, put, to_png

COUNT = 40


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """COUNT images of noise in two classes, under other names than `convert` gives."""
    folder = tmp_path_factory.mktemp("source")
    for i, pixels in enumerate(random_images(COUNT, 32, 32)):
        put(folder / "ab"[i % 2] / f"{i:03d}.png", to_png(pixels))
    return folder


def prepare(command: str, source: Path, dest: Path, vae: Path) -> None:
    flags = ["--resolution=32x32"] if command == "convert" else [f"--model-url={vae}", "--batch-size=3"]
    main([command, f"--source={source}", f"--dest={dest}", "--workers=0", *flags])


def everything(path: Path) -> dict[str, bytes]:
    """Each file below the path, hidden ones too, by its name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def written(folder: Path) -> int:
    """How many files with their final name are in the folder."""
    return sum(len(names) for place, _, names in os.walk(folder) if not Path(place).name.startswith("."))


def slowly(run, *args) -> None:
    """run(*args) with a pause before each file gets its name, so that a kill from outside falls between them."""
    replace = os.replace
    os.replace = lambda *paths: time.sleep(0.005) or replace(*paths)
    run(*args)


@pytest.mark.parametrize("command, name, kills", [("encode", "x", 3), ("encode", "x.zip", 1), ("convert", "x", 1)])
def test_killed_and_started_again(images, vae_folder, tmp_path, command, name, kills):
    prepare(command, images, tmp_path / "undisturbed" / name, vae_folder)
    dest = tmp_path / "killed" / name
    folder = dest.with_name(f"{name}.partial") if name.endswith(".zip") else dest
    chance = random.Random(f"{command} {name}")
    for kill in range(kills):
        # Every start writes something new before it is killed, and COUNT / 4 files are left for the last one.
        enough = written(folder) + chance.randrange(2, COUNT * 3 // 4 // kills - 3)
        process = fork(slowly, prepare, command, images, dest, vae_folder)
        while written(folder) < enough and process.is_alive():
            time.sleep(chance.random() / 500)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"start {kill} ended before it was killed"
        assert (folder / ".unfinished.json").exists() and not (folder / "dataset.json").exists()
        assert enough <= written(folder) < COUNT
    prepare(command, images, dest, vae_folder)
    assert everything(tmp_path / "killed") == everything(tmp_path / "undisturbed")


# ---- moments that are too short to be met from outside ---------------------------------------------------------------

def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_the_name(name: str) -> None:
    """Die between writing a file and renaming it."""
    replace = os.replace
    os.replace = lambda a, b: die() if Path(b).name == name else replace(a, b)


def at_the_cleaning() -> None:
    shutil.rmtree = die


def in_the_cleaning() -> None:
    def half(folder, **_) -> None:
        next(file for file in sorted(folder.rglob("*.npy"))).unlink()
        (folder / ".unfinished.json").unlink()
        die()

    shutil.rmtree = half


def killed(arrange, run, *args) -> None:
    arrange()
    run(*args)


MOMENTS = [("x", partial(before_the_name, name)) for name in (
    ".unfinished.json", "img-mean-std-004.npy", "dataset.json", "catalogue.npz")]
MOMENTS += [("x.zip", partial(before_the_name, name)) for name in (
    "dataset.json", "x.zip", "x.zip.catalogue.npz")]
MOMENTS += [("x", at_the_cleaning), ("x.zip", in_the_cleaning)]


@pytest.mark.parametrize("name, arrange", MOMENTS, ids=lambda part: str(getattr(part, "args", part)))
def test_killed_at_a_moment(images, vae_folder, tmp_path, name, arrange):
    prepare("encode", images, tmp_path / "undisturbed" / name, vae_folder)
    process = fork(killed, arrange, prepare, "encode", images, tmp_path / "killed" / name, vae_folder)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert everything(tmp_path / "killed") != everything(tmp_path / "undisturbed")
    prepare("encode", images, tmp_path / "killed" / name, vae_folder)
    assert everything(tmp_path / "killed") == everything(tmp_path / "undisturbed")


def test_records_and_zips_are_flushed_before_they_are_named(images, vae_folder, tmp_path, monkeypatch):
    flushed, named = set(), {}
    fsync, replace = os.fsync, os.replace

    def note(handle):
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    def rename(partial, path):
        named[Path(path).name] = os.stat(partial).st_ino in flushed
        replace(partial, path)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", rename)
    prepare("encode", images, tmp_path / "x.zip", vae_folder)
    assert {".unfinished.json", "dataset.json", "x.zip"} <= {name for name, first in named.items() if first}
