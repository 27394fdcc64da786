"""Preparation killed at any moment: the same command continues and ends with the files of an undisturbed run."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocessing.dataset_tools import main
from tests.test_preprocessing import contents, data_files

ROOT = Path(__file__).resolve().parent.parent
SIDE, COUNT = 32, 300


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """COUNT images of noise in two classes."""
    folder = tmp_path_factory.mktemp("source")
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i:03d}.png", compress_level=0)
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    """All files below a folder but the catalogues, whose zip entries have a date; of the zips their entries."""
    found = {name: data for name, data in contents(folder).items() if "catalogue" not in name}
    zips = {name: contents(folder / name) for name in found if name.endswith(".zip")}
    return {**found, **{f"{name}:{inner}": data for name, files in zips.items() for inner, data in files.items()}}


def arguments(command: str, source: Path, dest: Path, vae: Path) -> list[str]:
    own = {"convert": [f"--resolution={SIDE}", "--transform=center-crop-dhariwal"],
           "encode": [f"--model-url={vae}", "--batch-size=3"]}
    return [command, f"--source={source}", f"--dest={dest}", "--workers=0", *own[command]]


@pytest.mark.parametrize("command, name", [("encode", "out"), ("convert", "out.zip")])
def test_killed_by_a_signal(images, vae_folder, tmp_path, command, name):
    dest = tmp_path / "killed" / name
    begun = dest.with_name(f"{name}.partial") if name.endswith(".zip") else dest
    process = subprocess.Popen([sys.executable, "-m", "preprocessing.dataset_tools",
                                *arguments(command, images, dest, vae_folder)], cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(begun.glob("*/*.[np][pn][yg]"))) < 20:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert (begun / ".unfinished.json").exists() and not (begun / "dataset.json").exists()
    main(arguments(command, images, dest, vae_folder))
    main(arguments(command, images, tmp_path / "whole" / name, vae_folder))
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")


class Killed(BaseException):
    """Not caught by the program, as SIGKILL is not."""


class Killer:
    """An audit hook that raises Killed at the n-th file operation below `folder` and at all later ones.

    So nothing is cleaned up, as after SIGKILL. An audit hook cannot be removed: `folder` None makes it idle.
    """

    def __init__(self):
        self.folder, self.left, self.last = None, 0, ""

    def __call__(self, event: str, values: tuple) -> None:
        if self.folder is None or not event.startswith(("os.", "open", "shutil.")) or not values:
            return
        removing = event in ("os.remove", "os.rmdir")             # shutil.rmtree names files relative to a descriptor
        if removing or isinstance(values[0], str | bytes) and os.fsdecode(values[0]).startswith(self.folder):
            self.left, self.last = self.left - 1, event
            if self.left < 0:
                raise Killed


@pytest.fixture(scope="module")
def killer() -> Killer:
    hook = Killer()
    sys.addaudithook(hook)
    return hook


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")    # Killed in a destructor
@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_killed_at_every_file_operation(images, tmp_path, killer, name):
    source = tmp_path / "source"
    for file in ("a/000.png", "b/001.png"):
        (source / file).parent.mkdir(parents=True)
        shutil.copy(images / file, source / file)
    main(arguments("convert", source, tmp_path / "whole" / name, Path()))
    whole, operations = everything(tmp_path / "whole"), set()
    for moment in range(1000):
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        killer.left, killer.folder = moment, str(tmp_path / "killed")
        try:
            main(arguments("convert", source, tmp_path / "killed" / name, Path()))
            break
        except Killed:
            operations.add(killer.last)
        finally:
            killer.folder = None
        final = tmp_path / "killed" / name
        if final.suffix == ".zip" and final.exists():             # it has its name only when it is whole
            assert zipfile.ZipFile(final).testzip() is None
        main(arguments("convert", source, final, Path()))
        assert everything(tmp_path / "killed") == whole, f"killed at operation {moment}, {killer.last}"
    assert 20 < moment < 999 and {"open", "os.rename", "os.mkdir"} <= operations


def test_records_are_on_the_disk_before_they_are_named(images, tmp_path, monkeypatch):
    """A power cut must not leave a name without its content for what says that the work is whole."""
    flushed, named, fsync, replace = set(), {}, os.fsync, os.replace

    def note(handle: int) -> None:
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    def rename(old, new) -> None:
        named[Path(new).name] = os.stat(old).st_ino in flushed
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "replace", rename)
    main([*arguments("convert", images, tmp_path / "out.zip", Path()), "--max-images=3"])
    assert {".unfinished.json", "dataset.json", "out.zip"} <= {name for name, first in named.items() if first}
    assert len(data_files(tmp_path / "out.zip")) == 3
