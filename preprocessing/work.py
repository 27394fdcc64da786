"""What the commands share: a destination that never looks whole before it is, and a loop over all cores.

A program that is killed loses nothing and leaves nothing half-written. A power failure may: files are not flushed one by one, which
would take longer than the work. What it leaves of them empty is written again; `check` reads everything and finds the rest.
"""

import hashlib
import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from runtime.files import as_size as gigabytes
from runtime.files import write_whole
from runtime.messages import UserError
from runtime.stores import METADATA, UNFINISHED, FolderStore, Store, few, is_zip_name, open_store, read_metadata, shown

LONGEST_FILE = 255  # bytes of one file's name, without folders: what nearly all file systems take


def all_cores() -> int:
    """The cores this process may use, its share of them when several were launched on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)


def reading_workers(on_gpu: bool) -> int:
    """The processes that read for a network on a GPU, which leaves the cores free; on a CPU it takes them all, and none may be spared."""
    return min(all_cores(), 8) if on_gpu else 0


def load(items: torch.utils.data.Dataset, workers: int, in_order: bool = True) -> Iterator:
    """Yield items[0], items[1], ... as they are, worked out by `workers` processes (0: by this one).

    Without `in_order` each comes when it is done, so that no process waits for another whose item takes long.
    """
    yield from torch.utils.data.DataLoader(items, batch_size=None, num_workers=workers, collate_fn=_as_it_is, in_order=in_order)


def _as_it_is(item):
    return item


def digest(store: Store, names: np.ndarray) -> str:
    """A few letters that tell one source from another by its file names and dataset.json."""
    metadata = json.dumps(read_metadata(store), sort_keys=True).encode()
    return hashlib.sha256(names.tobytes() + metadata).hexdigest()[:16]


class Destination:
    """A folder or zip to be filled. `settings` (plain JSON values) say how, and must be the same when the work continues.

    A folder holds UNFINISHED until its dataset.json is written, which comes last. A zip is collected in `DEST.partial/` first.
    """

    def __init__(self, path: str | Path, settings: dict, source: str | Path, unsaid: dict | None = None):
        """`unsaid`: what a record means that lacks a setting, because the setting came after it.

        Raises UserError when `path` holds something else, was begun with other settings, or lies in the folder `source`.
        """
        self.path = Path(path)
        self.zipped = self.path.suffix == ".zip"
        self.folder = self.path.with_name(self.path.name + ".partial") if self.zipped else self.path
        self.settings, self.unsaid = settings, unsaid or {}
        self.name = shown(path)                                   # for messages
        if Path(source).resolve() in (self.path.resolve(), *self.path.resolve().parents):
            raise UserError(f"the destination {self.name} lies in the source {shown(source)}: choose a --dest outside of it")
        if self.path.exists() and self.path.is_dir() == self.zipped:
            raise UserError(f"the destination {self.name} is a {'folder' if self.zipped else 'file'}: "
                            "give a folder, or a name ending in .zip")
        self._closed = self._look()

    def _look(self) -> bool:
        """Whether the work was finished once."""
        if self.path.exists() and (self.zipped or METADATA in FolderStore(self.path)):
            store = open_store(self.path) if self.zipped else FolderStore(self.path)
            self._require_same(read_metadata(store).get("made_with"))
            return True
        if self.folder.exists():
            store = FolderStore(self.folder)
            if UNFINISHED in store:
                self._require_same(self._begun_with(store))
            elif len(store.names()):
                raise UserError(f"the destination {shown(self.folder)} holds other files: choose another --dest or empty it")
        return False

    def _begun_with(self, store: FolderStore) -> object:
        try:
            return json.loads(store.read(UNFINISHED))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{store.where(UNFINISHED)} is damaged: remove {shown(self.folder)} and begin again") from error

    def _require_same(self, found: object) -> None:
        if not isinstance(found, dict):
            raise UserError(f"the destination {self.name} holds a data set that this program did not write: choose another --dest")
        found = {**self.unsaid, **found}
        if found == self.settings:
            return
        other = [name for name in self.settings if found.get(name) != self.settings[name]]
        if other == ["source_contents"] or other == ["source_contents", "images"]:
            raise UserError(f"the destination {self.name} was begun from other files or labels ({found.get('images')} images, now "
                            f"{self.settings['images']} images), numbered otherwise: choose another --dest or remove it")
        was, now = (shown(", ".join(f"{name} {made.get(name)}" for name in other)) for made in (found, self.settings))
        raise UserError(f"the destination {self.name} was made with {was}, now {now} is asked for: choose another --dest or remove it")

    def is_finished(self, names: np.ndarray) -> bool:
        """Whether nothing is left to do. A folder's files may have been removed since, because `check` found them damaged."""
        done = self._closed and (self.zipped or not self.is_missing(names).any())
        if done:
            self._clean()                                         # an interrupted run may not have come to it
        return done

    def require_names(self, names: np.ndarray) -> None:
        """Raise UserError when one of the names (n,) cannot be written: too long for the file system, or not fit for a zip."""
        for name in names.tolist():
            text = os.fsdecode(name)
            if max(map(len, name.split(b"/"))) > LONGEST_FILE:
                raise UserError(f"the name {shown(name)} in {self.name} is longer than {LONGEST_FILE} bytes: rename its image")
            if self.zipped and (not is_zip_name(text) or text != name.decode(errors="replace")):
                raise UserError(f"{shown(name)} cannot be named in the zip {self.name}, which takes UTF-8 without backslashes or "
                                "drive letters: give a folder as --dest, or rename its image")

    def require_room(self, names: np.ndarray, each: int) -> int:
        """The bytes still free. Raises UserError when the disk lacks `each` for all of `names` (n,) that are missing, and for the zip."""
        place = next(path for path in (self.folder, *self.folder.resolve().parents) if path.exists())
        free = shutil.disk_usage(place).free
        missing = int(self.is_missing(names).sum()) if self.folder.exists() else len(names)
        need = missing * each + self.zipped * len(names) * each
        if need > free:
            raise UserError(f"{self.name} needs {gigabytes(need)} more{', as a zip is collected in a folder first' * self.zipped}, and "
                            f"{gigabytes(free)} are free: make room, or choose a --dest on another disk")
        return free

    def begin(self) -> None:
        """Create it, or take it as it is."""
        try:
            (self.folder / ".tmp").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create {shown(self.folder)}: {error.strerror}") from error
        self.write(UNFINISHED, json.dumps(self.settings).encode())

    def is_missing(self, names: np.ndarray) -> np.ndarray:
        """Which of the names (n,) are still to be written: bool (n,)."""
        there = np.isin(names, FolderStore(self.folder).names())
        folder = os.fsencode(self.folder)
        # A file without a byte is one that a power failure took before it was on the disk.
        return np.array([not found or os.path.getsize(os.path.join(folder, name)) == 0
                         for found, name in zip(there.tolist(), names.tolist(), strict=True)], dtype=bool)

    def write(self, name: bytes | str, data: bytes) -> None:
        """Write one whole file or none."""
        name = os.fsdecode(name)
        temporary = self.folder / ".tmp" / uuid.uuid4().hex
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                if name in (METADATA, UNFINISHED):                # the few that others depend on
                    file.flush()
                    os.fsync(file.fileno())
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, self.folder / name)
        except OSError as error:
            raise UserError(f"cannot write {shown(self.folder / name)}: {error.strerror}") from error

    def finish(self, names: np.ndarray, metadata: dict) -> None:
        """Close it: dataset.json, then the zip. Raises UserError when one of `names` is missing or the disk is too small."""
        missing = self.is_missing(names)
        if missing.any():  # one process of several failed, or a network folder does not show its files yet
            raise UserError(f"{shown(self.folder)} lacks {missing.sum()} of {len(names)} files ({few(names[missing])}): "
                            "give the same command again")
        self.write(METADATA, json.dumps({**metadata, "made_with": self.settings}).encode())
        if self.zipped:
            self._zip([*(os.fsdecode(name) for name in np.sort(names)), METADATA])
        self._clean()

    def _clean(self) -> None:
        """Away with what was temporary. An interrupted run may have left it beside finished work."""
        if self.zipped:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            shutil.rmtree(self.folder / ".tmp", ignore_errors=True)
            (self.folder / UNFINISHED).unlink(missing_ok=True)

    def _zip(self, names: list[str]) -> None:
        need = sum((self.folder / name).stat().st_size + 2 * len(os.fsencode(name)) + 128 for name in names)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise UserError(f"{self.name} needs {need / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free: "
                            f"make room and give the same command again, or use the folder {shown(self.folder)}")

        def write(partial: Path) -> None:
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
                for name in tqdm(names, desc="zip", unit="file"):  # a fixed date: equal contents are equal bytes
                    archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), (self.folder / name).read_bytes())

        write_whole(self.path, write)
