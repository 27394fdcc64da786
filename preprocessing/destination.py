"""A folder or zip that `convert` or `encode` fills, and that an interrupted run can continue.

A killed program loses no finished file and leaves none half-written. A power failure may, as flushing every file to
the disk would take longer than the work: an empty file is written again, and `check` reads everything to find the rest.
"""

import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from runtime import stores
from runtime.catalogue import sample_digests, write_catalogue
from runtime.files import lock, read_object, remove_partials, require_room, require_same_settings, write_whole
from runtime.loading import batches_of
from runtime.messages import UserError, say
from runtime.stores import METADATA, UNFINISHED, FolderStore, few, shown

LONGEST_NAME = 255  # bytes of a file's name, without folders: the limit of nearly all file systems
BLOCK = 4096        # bytes to which nearly all file systems round up a file's size


def in_workers(function: Callable[[Any], Any], items: Sequence, workers: int, in_order: bool = True) -> Iterator:
    """Yield function(item) for each item, computed by `workers` processes, by this one if 0.

    Without `in_order`, results are yielded as they are completed, so that no process waits for a slower one.
    """
    yield from batches_of(torch.utils.data.DataLoader(items, batch_size=None, num_workers=workers,
                                                      collate_fn=function, in_order=in_order))


def digest(names: np.ndarray, metadata: dict) -> str:
    """Hash of a source's file names and the content of its dataset.json but for captions, 16 hex digits."""
    metadata = {name: metadata[name] for name in metadata if name != "captions"}  # they may be added later
    plain = np.array(names.tolist(), dtype=bytes).tobytes()       # as wide as the longest of them, not of other files
    return hashlib.sha256(plain + json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:16]


def working_folder(path: str) -> Path:
    """Where the files of a destination are written: in a folder itself; those of a zip beside it."""
    return Path(f"{Path(path)}.partial" if Path(path).suffix == ".zip" else path)


def names_when_begun(path: str, names: np.ndarray) -> np.ndarray:
    """The source's names (n,) when a destination was begun: images keep their numbers if pictures are removed since.

    `names` (m,) are those of today. Raises UserError if some of them are new.
    """
    record, folder = read_object(working_folder(path) / UNFINISHED), os.path.isdir(path)
    if "source_names" not in record:
        finished = METADATA in FolderStore(path) if folder else path.endswith(".zip") and os.path.isfile(path)
        removed = stores.read_metadata(stores.open_store(path)).get("removed") if finished else None
        return np.union1d(names, [os.fsencode(name) for name in removed]) if removed else names
    begun = np.array([os.fsencode(name) for name in record["source_names"]], dtype=bytes)
    added = np.setdiff1d(names, begun)
    if len(added):
        raise UserError(f"--dest {shown(path)}: begun before {len(added)} pictures ({few(added)}) were in the source; "
                        "choose another --dest, or remove them")
    return begun


def described(names: np.ndarray, labels: np.ndarray | None, classes: list | None,
              captions: Sequence[list[str]] | None = None) -> dict:
    """What dataset.json says of files with names (n,) bytes: their labels (n,), names of classes and captions."""
    files = [*map(os.fsdecode, names.tolist())]
    said = {"labels": None if labels is None else [[*one] for one in zip(files, labels.tolist(), strict=True)],
            "classes": classes}
    return said if captions is None else {**said, "captions": dict(zip(files, captions, strict=True))}


class Destination:
    """A folder or zip to be filled with the files `names` (n,) bytes.

    `settings` (plain JSON values) describe the work and must be equal when it is continued. A folder holds UNFINISHED
    until its dataset.json is written, which is last. The files of a zip are collected in `DEST.partial/` first.
    """

    def __init__(self, path: str, names: np.ndarray, extensions: tuple[bytes, ...], settings: dict, source: str):
        """`extensions` are those by which readers list the files.

        Raises UserError if `path` holds something else, was begun with other settings or lies in the folder `source`,
        and if one of the names is too long for the file system or not fit for a zip.
        """
        self.path, self.names, self.extensions, self.settings = Path(path), names, extensions, settings
        self.where = f"--dest {shown(path)}"                      # for messages
        self.zipped = self.path.suffix == ".zip"
        self.folder = working_folder(path)
        if Path(source).resolve() in (self.path.resolve(), *self.path.resolve().parents):
            raise UserError(f"{self.where}: lies in the source {shown(source)}; choose a --dest outside of it")
        if self.path.exists() and self.path.is_dir() == self.zipped:
            kind = "folder" if self.zipped else "file"
            raise UserError(f"{self.where}: is a {kind}; give a folder, or a name ending in .zip")
        self._lock = None
        self._written = self._look()
        for name in names.tolist():
            self._require_possible(name)

    def _look(self) -> bool:
        """Whether all of it was written once."""
        if self.path.exists() and (self.zipped or METADATA in FolderStore(self.path)):
            self._require_same(stores.read_metadata(stores.open_store(self.path)).get("made_with"))
            return True
        if record := read_object(self.folder / UNFINISHED):
            self._require_same(record)
        elif self.folder.exists() and len(FolderStore(self.folder).names()):
            raise UserError(f"--dest {shown(self.folder)}: holds other files, or a damaged {UNFINISHED}; choose "
                            "another --dest or empty it")
        return False

    def _require_same(self, found: object) -> None:
        if not isinstance(found, dict):
            raise UserError(f"{self.where}: holds a data set that this program did not write; choose another --dest")
        contents, remedy = {"source_contents", "images"}, "choose another --dest or remove it"
        require_same_settings(found, {name: self.settings[name] for name in self.settings if name not in contents},
                              self.where, remedy)
        if any(found.get(name) != self.settings[name] for name in contents):
            raise UserError(f"{self.where}: made of other pictures or labels ({found.get('images')} pictures, now "
                            f"{self.settings['images']}); give the same source and --max-images as then, or {remedy}")

    def _require_possible(self, name: bytes) -> None:
        text = os.fsdecode(name)
        if max(map(len, name.split(b"/"))) > LONGEST_NAME:
            raise UserError(f"{self.where}: {shown(name)} is longer than {LONGEST_NAME} bytes; rename its image")
        if text.startswith("/") or ".." in text.split("/"):
            raise UserError(f"{self.where}: {shown(name)} leads out of it; `convert` numbers images, `encode` those")
        if self.zipped and (not stores.is_zip_name(text) or text != name.decode(errors="replace")):
            raise UserError(f"{self.where}: {shown(name)} cannot be in a zip, which takes UTF-8 without backslashes "
                            "or drive letters; give a folder, or rename its image")

    def is_missing(self) -> np.ndarray:
        """Whether each of the names (n,) is still to be written. Empty files are: a power failure leaves them."""
        folder = os.fsencode(self.folder)
        return np.array([not _size(os.path.join(folder, name)) for name in self.names.tolist()], dtype=bool)

    def is_finished(self, first: bool = True) -> bool:
        """Whether nothing is left to do; the `first` process then says so, and closes what an earlier run left open.

        Files of a finished folder may have been removed, as `check` asks for.
        """
        finished = self._written and (self.zipped or not self.is_missing().any())
        if finished and first:
            self.close()
            say(f"{shown(self.path)} is finished already ({len(self.names)} images): nothing to do")
        return finished

    def require_room(self, size: int) -> int:
        """Return the bytes free on the disk. Raises UserError if the missing files, `size` bytes each, do not fit.

        A zip needs room for all of its files beside the folder in which they are collected.
        """
        count, blocks = int(self.is_missing().sum()) + self.zipped * len(self.names), -(-size // BLOCK)
        return require_room(self.folder, count * blocks * BLOCK, "make room, or choose a --dest on another disk")

    def begin(self, source_names: np.ndarray | None = None) -> None:
        """Create and lock the folder with its record of the settings, and of what `names_when_begun` will return.

        Raises UserError if that fails, or if another process writes it or has just written it.
        """
        self._take()
        if self._look() != self._written:
            raise UserError(f"{self.where}: another process has just written it; give the same command again")
        names = {} if source_names is None else {"source_names": [*map(os.fsdecode, source_names.tolist())]}
        record = json.dumps({**self.settings, **names})
        write_whole(self.folder / UNFINISHED, lambda partial: partial.write_text(record))

    def _take(self) -> None:
        """Lock the folder, and remove what killed processes left beside its files."""
        self._lock = lock(self.folder, "choose another --dest", ".tmp")
        remove_partials(self.folder)
        if self.zipped:
            remove_partials(self.path.parent, name=glob.escape(self.path.name))

    def write(self, name: bytes, data: bytes) -> None:
        """Write a file atomically, without flushing it to the disk. Raises UserError if it cannot be written."""
        path, temporary = self.folder / os.fsdecode(name), self.folder / ".tmp" / uuid.uuid4().hex
        try:
            temporary.write_bytes(data)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"{shown(path)}: cannot be written ({error.strerror}); make room, or choose another --dest"
                            ) from error

    def leave_out(self, names: np.ndarray) -> None:
        """Go on without these of the names; their files are removed."""
        for name in names.tolist():
            (self.folder / os.fsdecode(name)).unlink(missing_ok=True)
        self.names = self.names[~np.isin(self.names, names)]

    def finish(self, metadata: dict) -> None:
        """Write dataset.json, the zip and the catalogue. Raises UserError if a file is missing."""
        missing = self.is_missing()
        if missing.any():  # one process of several failed, or a network folder does not show its files yet
            raise UserError(f"{shown(self.folder)}: lacks {missing.sum()} of {len(missing)} files "
                            f"({few(self.names[missing])}); give the same command again")
        sample = sample_digests(FolderStore(self.folder), self.names)
        record = json.dumps({**metadata, "made_with": self.settings, "sample": sample})
        write_whole(self.folder / METADATA, lambda partial: partial.write_text(record))
        if self.zipped:
            names = [*map(os.fsdecode, np.sort(self.names)), METADATA]
            files = ((name, (self.folder / name).read_bytes()) for name in tqdm(names, "zip", unit="file"))
            stores.write_zip(self.path, files)
        self.close()

    def close(self) -> None:
        """Write the catalogue and remove what is temporary, unless an earlier run did."""
        if not (self.folder if self.zipped else self.folder / UNFINISHED).exists():
            return
        self._take()
        write_catalogue(self.path, self.extensions)
        if self.zipped:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            shutil.rmtree(self.folder / ".tmp", ignore_errors=True)
            (self.folder / UNFINISHED).unlink(missing_ok=True)
        self._lock.lock.release(force=True)


def _size(path: bytes) -> int:
    """The bytes of a file, 0 if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
