"""Keys, names and labels of the files in a store, and the catalogue that keeps them on disk.

Listing a million files and parsing their labels takes half a minute. `convert`, `encode` and `check` therefore leave a
catalogue beside dataset.json: names, keys, labels, and for a zip the places of its files. It is verified by size (of
dataset.json, or of the zip), count and two names; if it does not fit, the files are listed.

A million entries must not cost a million Python objects in every loader worker (reading them touches reference counts,
which copies the memory that fork shares): names are numpy arrays of fixed-width bytes.
"""

import contextlib
import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from runtime.files import write_whole
from runtime.messages import UserError, notice
from runtime.stores import (
    METADATA,
    Store,
    ZipStore,
    catalogue_path,
    described_size,
    few,
    list_names,
    open_store,
    read_catalogue,
    read_metadata,
    shown,
)

MAX_CLASSES = 10**7  # an embedding of XL's width for each takes 46 GB


class Catalogue:
    """The entries of a store: `keys` (n,) bytes, sorted, `names` (n,) of their files, `labels` (n,) int64 or None, and
    `metadata`, the rest of its dataset.json.

    Read from the store's catalogue if it has one that fits, else listed. Raises UserError as list_keyed, read_metadata
    and read_labels do.
    """

    def __init__(self, store: Store, extensions: tuple[bytes, ...]):
        kept = read_catalogue(store.path)
        if kept is not None and _fits(kept, extensions):
            self.keys, self.names, self.labels = kept["keys"], kept["names"], kept.get("labels")
            self.metadata = json.loads(kept["metadata"].tobytes())
            return
        with no_garbage_collection():
            self.keys, self.names = list_keyed(store, extensions)
            self.metadata = read_metadata(store)
            entries = self.metadata.pop("labels", None)
            self.labels = match_labels(entries, store.where(METADATA), self.keys, names=self.names)


def _fits(kept: dict[str, np.ndarray], extensions: tuple[bytes, ...]) -> bool:
    labels, names = kept.get("labels"), kept["names"]
    if labels is not None and (labels.dtype != np.int64 or labels.shape != names.shape or (labels < 0).any()):
        return False
    arrays_fit = names.dtype.kind == kept["keys"].dtype.kind == "S" and names.ndim == 1
    complete = {"metadata", "extensions"} <= kept.keys()
    return arrays_fit and complete and kept["extensions"].tobytes() == b" ".join(extensions)


def write_catalogue(path: str | Path, extensions: tuple[bytes, ...]) -> None:
    """List the files of a folder or zip and write its catalogue. A folder that cannot be written gets a notice.

    Raises UserError for what `Catalogue` refuses.
    """
    file = catalogue_path(path)
    with contextlib.suppress(OSError):
        file.unlink(missing_ok=True)                              # what is there must not be believed
    store = open_store(path)
    found = Catalogue(store, extensions)
    if not len(found.keys):
        return
    arrays = {"keys": found.keys, "names": found.names, "size": np.array(described_size(path)),
              "count": np.array(len(found.keys)), "extensions": np.frombuffer(b" ".join(extensions), np.uint8),
              "metadata": np.frombuffer(json.dumps(found.metadata).encode(), np.uint8)}
    arrays |= {} if found.labels is None else {"labels": found.labels}
    arrays |= store.directory() if isinstance(store, ZipStore) else {}

    def write(partial: Path) -> None:
        with open(partial, "wb") as stream:
            np.savez(stream, **arrays)

    try:
        write_whole(file, write)
    except UserError as error:
        notice(f"no catalogue: {error} (opening a large data set takes longer without)")


# ------------------------------------------------------------------------------------------------------ keys and labels

def key_of(name: bytes) -> bytes:
    """The key of a file: its relative path without extension and without the prefix `img-mean-std-` or `img`."""
    folder, slash, file = name.rpartition(b"/")
    stem = file.rpartition(b".")[0] or file
    for prefix in (b"img-mean-std-", b"img"):
        if stem.startswith(prefix):
            return folder + slash + stem[len(prefix):]
    return folder + slash + stem


def list_keyed(store: Store, extensions: tuple[bytes, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Keys (n,), sorted, and their files' names (n,). Raises UserError if two files share a key."""
    names = list_names(store, extensions)
    keys = np.array([key_of(name) for name in names.tolist()], dtype=bytes)
    order = np.argsort(keys, kind="stable")
    keys, names = keys[order], names[order]
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice):
        raise UserError(f"{shown(store.path)}: {few(names[twice[0]:twice[0] + 2])} have the same key "
                        f"{few(keys[twice[:1]])}; remove one of them")
    return keys, names


def read_labels(store: Store, keys: np.ndarray, key: Callable[[bytes], bytes] = key_of) -> np.ndarray | None:
    """The labels (n,) int64 of `keys` from the store's dataset.json, None if it has none; `key` maps its names to keys.

    Raises UserError if a label is no whole number >= 0 or beyond MAX_CLASSES, or if a key has none or two.
    """
    return match_labels(read_metadata(store).get("labels"), store.where(METADATA), keys, key)


def match_labels(entries: object, where: str, keys: np.ndarray, key: Callable[[bytes], bytes] = key_of,
                 names: np.ndarray | None = None) -> np.ndarray | None:
    """`read_labels` of the "labels" `entries` in the file `where`; `names` (n,), the files of `keys`, save time."""
    if entries is None:
        return None
    if not isinstance(entries, list) or not all(map(_is_labelled, entries)):
        raise UserError(f'{where}: expected "labels" to be [[name, whole number >= 0], ...] or null')
    try:
        listed = [os.fsencode(name) for name, _ in entries]
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: names {shown(error.object)}, which no file can have; correct it") from error
    named = keys.tolist() if names is not None and listed == names.tolist() else list(map(key, listed))
    values = np.array([label for _, label in entries], dtype=np.int64)
    fitting = np.array([len(name) <= keys.itemsize for name in named], dtype=bool)
    listed = np.array([name for name in named if len(name) <= keys.itemsize], dtype=bytes)  # no wider than the keys
    values = values[fitting]
    if (values >= MAX_CLASSES).any():
        raise UserError(f"{where}: label {values.max()}, expected labels below {MAX_CLASSES}; number classes from 0")
    order = np.argsort(listed, kind="stable")
    listed, values = listed[order], values[order]
    found = np.searchsorted(listed, keys).clip(max=max(len(listed) - 1, 0))
    known = listed[found] == keys if len(listed) else np.zeros(len(keys), dtype=bool)
    if not known.all():
        raise UserError(f"{where}: no label for {(~known).sum()} of {len(keys)} files ({few(keys[~known])}); "
                        'complete it, or set "labels" to null')
    differing = np.flatnonzero((listed[1:] == listed[:-1]) & (values[1:] != values[:-1]))
    differing = differing[np.isin(listed[differing], keys)]
    if len(differing):
        i = differing[0]
        raise UserError(f"{where}: lists {few(listed[[i]])} with labels {values[i]} and "
                        f"{values[i + 1]}; remove one of them")
    return values[found]


def _is_labelled(entry: object) -> bool:
    """Whether it is [name, label]; true and false are no labels, and a NUL is in no file's name."""
    return (isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is str and "\0" not in entry[0]
            and type(entry[1]) is int and 0 <= entry[1] < 2**63 - 1)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Disable the garbage collector while a million objects are built; it would double the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
