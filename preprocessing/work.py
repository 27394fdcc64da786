"""What the commands share: a destination that never looks whole before it is, and a loop over all cores."""

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

from dataset import METADATA, UNFINISHED, FolderStore, Store, few, open_store, read_metadata
from models.errors import UserError


def all_cores() -> int:
    """The cores this process may use, its share of them when several were launched on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)


def load(items: torch.utils.data.Dataset, workers: int) -> Iterator:
    """Yield items[0], items[1], ... as they are, worked out by `workers` processes (0: by this one)."""
    yield from torch.utils.data.DataLoader(items, batch_size=None, num_workers=workers, collate_fn=_as_it_is)


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

    def __init__(self, path: str | Path, settings: dict, source: str | Path):
        """Raises UserError when `path` holds something else, was begun with other settings, or lies in the folder `source`."""
        self.path = Path(path)
        self.zipped = self.path.suffix == ".zip"
        self.folder = self.path.with_name(self.path.name + ".partial") if self.zipped else self.path
        self.settings = settings
        if Path(source).resolve() in (self.path.resolve(), *self.path.resolve().parents):
            raise UserError(f"the destination {path} lies in the source {source}: choose a --dest outside of it")
        if self.path.exists() and self.path.is_dir() == self.zipped:
            raise UserError(f"the destination {path} is a {'folder' if self.zipped else 'file'}: give a folder, or a name ending in .zip")
        self.finished = self._look()
        if self.finished:
            self._clean()

    def _look(self) -> bool:
        """Whether the work is done already."""
        if self.path.exists() and (self.zipped or METADATA in FolderStore(self.path)):
            store = open_store(self.path) if self.zipped else FolderStore(self.path)
            self._require_same(read_metadata(store).get("made_with"))
            return True
        if self.folder.exists():
            store = FolderStore(self.folder)
            if UNFINISHED in store:
                self._require_same(json.loads(store.read(UNFINISHED)))
            elif len(store.names()):
                raise UserError(f"the destination {self.folder} holds other files: choose another --dest or empty it")
        return False

    def _require_same(self, found: dict | None) -> None:
        if found == self.settings:
            return
        if found is None:
            raise UserError(f"the destination {self.path} holds a data set that this program did not write: choose another --dest")
        other = [name for name in self.settings if found.get(name) != self.settings[name]]
        if other == ["source_contents"] or other == ["source_contents", "images"]:
            raise UserError(f"the destination {self.path} was begun from other files or labels ({found.get('images')} images, now "
                            f"{self.settings['images']} images), numbered otherwise: choose another --dest or remove it")
        raise UserError(f"the destination {self.path} was made with {', '.join(f'{name} {found.get(name)}' for name in other)}, now "
                        f"{', '.join(f'{name} {self.settings[name]}' for name in other)} is asked for: choose another --dest or remove it")

    def begin(self) -> None:
        """Create it, or take it as it is."""
        try:
            (self.folder / ".tmp").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create {self.folder}: {error.strerror}") from error
        self.write(UNFINISHED, json.dumps(self.settings).encode())

    def is_missing(self, names: np.ndarray) -> np.ndarray:
        """Which of the names (n,) are still to be written: bool (n,)."""
        return ~np.isin(names, FolderStore(self.folder).names())

    def write(self, name: bytes | str, data: bytes) -> None:
        """Write one whole file or none."""
        name = os.fsdecode(name)
        temporary = self.folder / ".tmp" / uuid.uuid4().hex
        try:
            temporary.write_bytes(data)
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, self.folder / name)
        except OSError as error:
            raise UserError(f"cannot write {self.folder / name}: {error.strerror}") from error

    def finish(self, names: np.ndarray, metadata: dict) -> None:
        """Close it: dataset.json, then the zip. Raises UserError when one of `names` is missing or the disk is too small."""
        missing = self.is_missing(names)
        if missing.any():  # one process of several failed, or a network folder does not show its files yet
            raise UserError(f"{self.folder} lacks {missing.sum()} of {len(names)} files ({few(names[missing])}): "
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
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.unlink(missing_ok=True)
        need = sum((self.folder / name).stat().st_size + 2 * len(name) + 128 for name in names)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise UserError(f"{self.path} needs {need / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free: "
                            f"make room and give the same command again, or use the folder {self.folder}")
        try:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
                for name in tqdm(names, desc="zip", unit="file"):  # a fixed date: equal contents are equal bytes
                    archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), (self.folder / name).read_bytes())
            os.replace(temporary, self.path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
