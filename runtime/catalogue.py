"""Keys, names and labels of the files in a store.

A million entries must not cost a million Python objects in every loader worker (reading touches their reference counts, which
copies the memory that fork shares), so names and labels are numpy arrays, names as fixed-width bytes.
"""

import contextlib
import functools
import gc
import json
import os
from collections.abc import Callable, Iterator

import numpy as np

from runtime import index
from runtime.messages import UserError
from runtime.stores import METADATA, Store, few, list_names, read_metadata, shown

MAX_CLASSES = 10**7     # an embedding of XL's width for each takes 46 GB


def key_of(name: bytes) -> bytes:
    """The key of a file: its relative path without extension and without the prefix `img-mean-std-` or `img` of its name."""
    folder, slash, file = name.rpartition(b"/")
    stem = file.rpartition(b".")[0] or file
    for prefix in (b"img-mean-std-", b"img"):
        if stem.startswith(prefix):
            return folder + slash + stem[len(prefix):]
    return folder + slash + stem


def list_keyed(store: Store, extensions: tuple[bytes, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Keys (n,) sorted, and the names (n,) they belong to. Raises UserError when two files share a key."""
    names = list_names(store, extensions)
    keys = np.array([key_of(name) for name in names.tolist()], dtype=bytes)
    order = np.argsort(keys, kind="stable")
    keys, names = keys[order], names[order]
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice):
        raise UserError(f"{shown(store.path)}: {few(names[twice[0]:twice[0] + 2])} have the same key {few(keys[twice[:1]])}: "
                        "remove one of them")
    return keys, names


def read_labels(store: Store, keys: np.ndarray, key: Callable[[bytes], bytes] = key_of) -> np.ndarray | None:
    """The labels (n,) int64 of `keys` from the store's dataset.json, None where it has none; `key` maps its names to keys.

    Raises UserError when a label is no whole number >= 0 or beyond MAX_CLASSES, or a key has none or two.
    """
    return match_labels(read_metadata(store).get("labels"), store.where(METADATA), keys, key)


def match_labels(entries: object, where: str, keys: np.ndarray, key: Callable[[bytes], bytes] = key_of,
                 names: np.ndarray | None = None) -> np.ndarray | None:
    """`read_labels` from what the file `where` says; `names` (n,) are those that `keys` came from, which it mostly lists as they are."""
    if entries is None:
        return None
    if not isinstance(entries, list) or not all(map(_is_labelled, entries)):
        raise UserError(f'{where}: expected "labels" to be [[name, whole number >= 0], ...] or null')
    try:
        listed = [os.fsencode(name) for name, _ in entries]
    except UnicodeEncodeError as error:
        raise UserError(f"{where} names {shown(error.object)}, which no file can be called: correct it") from error
    named = keys.tolist() if names is not None and listed == names.tolist() else list(map(key, listed))
    values = np.array([label for _, label in entries], dtype=np.int64)
    fitting = np.array([len(name) <= keys.itemsize for name in named], dtype=bool)
    listed = np.array([name for name in named if len(name) <= keys.itemsize], dtype=bytes)  # all would be as wide as the longest
    values = values[fitting]
    if (values >= MAX_CLASSES).any():
        raise UserError(f"{where} has label {values.max()}, expected labels below {MAX_CLASSES}, as every class has an embedding: "
                        "number the classes from 0")
    order = np.argsort(listed, kind="stable")
    listed, values = listed[order], values[order]
    found = np.searchsorted(listed, keys).clip(max=max(len(listed) - 1, 0))
    known = listed[found] == keys if len(listed) else np.zeros(len(keys), dtype=bool)
    if not known.all():
        raise UserError(f"{where} has no label for {(~known).sum()} of {len(keys)} files ({few(keys[~known])}): "
                        'complete it, or set "labels" to null')
    differing = np.flatnonzero((listed[1:] == listed[:-1]) & (values[1:] != values[:-1]))
    if len(differing):
        differing = differing[np.isin(listed[differing], keys)]
    if len(differing):
        i = differing[0]
        raise UserError(f"{where} lists {few(listed[[i]])} with label {values[i]} and with label {values[i + 1]}: remove one of them")
    return values[found]


def _is_labelled(entry: object) -> bool:
    """Whether it is [name, label]; true and false are no labels, and a NUL is in no file's name."""
    return (isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is str and "\0" not in entry[0]
            and type(entry[1]) is int and 0 <= entry[1] < 2**63 - 1)


class Catalogue:
    """The entries of a store: `keys` (n,) bytes, sorted, `names` (n,) of their files, `labels` (n,) int64 or None, and what else its
    dataset.json says, `metadata`.

    Those of a large store come from an index if there is one; `keep` writes it. Raises UserError as list_keyed, read_metadata and
    read_labels do; dataset.json is read when it is first asked for.
    """

    def __init__(self, store: Store, extensions: tuple[bytes, ...]):
        self.store = store
        self._what = f"catalogue {extensions}"
        kept = index.recall(self._what, store.path)
        self._is_new = kept is None
        if kept is None:
            self.keys, self.names = list_keyed(store, extensions)
        else:
            self.keys, self.names, self.labels = kept["keys"], kept["names"], kept.get("labels")
            self.metadata = json.loads(kept["metadata"].tobytes())

    @functools.cached_property
    def metadata(self) -> dict:
        return read_metadata(self.store)

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        entries = self.metadata.pop("labels", None)               # a million lists, no longer needed
        return match_labels(entries, self.store.where(METADATA), self.keys, names=self.names)

    def keep(self) -> None:
        """Write the index, if it is worthwhile and did not come from one."""
        if self._is_new and len(self.keys) >= index.WORTHWHILE:
            arrays = {"keys": self.keys, "names": self.names} | ({} if self.labels is None else {"labels": self.labels})
            metadata = np.frombuffer(json.dumps(self.metadata).encode(), dtype=np.uint8)
            index.keep(self._what, self.store.path, self.store.seen, {**arrays, "metadata": metadata})


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Python's search for garbage rests. Going through a million entries again and again, of which none is any, doubles the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
