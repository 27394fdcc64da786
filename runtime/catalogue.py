"""Keys, names, labels and captions of a data set's files, listed or from the catalogue file that its writer left.

To list a million files, or to parse a zip's directory and a million labels, takes half a minute. `convert`, `encode`
and `check` therefore leave a catalogue: `images/catalogue.npz` in a folder, `images.zip.catalogue.npz` beside a zip.
It counts while the folder's dataset.json has the same size and CRC-32 and a sample of the names exists, or while the
zip has the same size and CRC-32 of its directory. Otherwise the files are listed. A file removed from a folder by hand
may therefore be missed only when it is read, and one added is not found: run `check`, which writes the catalogue again.

A million entries must not cost a million Python objects in every loader worker (reading touches their reference
counts, which copies the memory that fork shares), so names, labels and captions are numpy arrays, names as fixed-width
bytes.
"""

import functools
import gc
import hashlib
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Container, Iterable
from pathlib import Path

import numpy as np

from runtime.files import UNREADABLE
from runtime.messages import UserError, notice
from runtime.npz import write_npz
from runtime.stores import METADATA, Store, ZipStore, few, list_names, max_inflated, open_store, read_metadata, shown

MAX_CLASSES = 10**7     # an embedding of XL's width for each takes 46 GB
SAMPLE = 64             # names that must exist for a catalogue to count; files whose content is recorded


def key_of(name: bytes) -> bytes:
    """The key of a file: its relative path without the extension and the file's prefix `img-mean-std-` or `img`."""
    folder, slash, file = name.rpartition(b"/")
    stem = file.rpartition(b".")[0] or file
    for prefix in (b"img-mean-std-", b"img"):
        if stem.startswith(prefix):
            return folder + slash + stem[len(prefix):]
    return folder + slash + stem


def list_keyed(store: Store, extensions: tuple[bytes, ...]) -> tuple[np.ndarray, np.ndarray]:
    """List the keys (n,), sorted, and their names (n,). Raises UserError as `keyed` does."""
    return keyed(store, list_names(store, extensions))


def keyed(store: Store, names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The keys (n,) of names (n,), and these, both sorted by key. Raises UserError if two files share a key."""
    keys = np.array([key_of(name) for name in names.tolist()], dtype=bytes)
    order = np.argsort(keys, kind="stable")
    keys, names = keys[order], names[order]
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice):
        raise UserError(f"{shown(store.path)}: {few(names[twice[0]:twice[0] + 2])} have the same key "
                        f"{few(keys[twice[:1]])}; remove one of them")
    return keys, names


# ---- labels ----------------------------------------------------------------------------------------------------------

def read_labels(store: Store, keys: np.ndarray, key: Callable[[bytes], bytes] = key_of, metadata: dict | None = None
                ) -> np.ndarray | None:
    """The labels (n,) int64 of `keys` from dataset.json, None if it has none; `key` maps its names to keys.

    `metadata`, the content of dataset.json, saves parsing it again. Raises UserError if a label is no whole number >= 0
    or beyond MAX_CLASSES, or a key has no label or two.
    """
    metadata = read_metadata(store) if metadata is None else metadata
    entries, where = metadata.get("labels"), store.where(METADATA)
    if entries is None:
        return None
    if not isinstance(entries, list) or not all(map(_is_labelled, entries)):
        raise UserError(f'{where}: expected "labels" to be [[name, whole number >= 0], ...] or null')
    largest = max((label for _, label in entries), default=0)
    if largest >= MAX_CLASSES:
        raise UserError(f"{where}: label {largest}; labels must be below {MAX_CLASSES}: every class has an embedding")
    return np.array(_match(entries, "label", where, keys, key), dtype=np.int64)


def _is_labelled(entry: object) -> bool:
    """Whether it is [name, label]; true and false are no labels, and no file's name contains a NUL."""
    return (isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is str and "\0" not in entry[0]
            and type(entry[1]) is int and 0 <= entry[1] < 2**63 - 1)


def _match(entries: Iterable, what: str, where: str, keys: np.ndarray, key: Callable[[bytes], bytes]) -> list:
    """The values (n) of `keys` in [name, value] pairs from `where`, a dataset.json."""
    try:
        pairs = [(key(os.fsencode(name)), value) for name, value in entries]
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: no file can be called {shown(error.object)}; correct it") from error
    given = dict(pairs)
    for one, value in pairs if len(given) < len(pairs) else ():
        if given[one] != value and one in keys:
            raise UserError(f"{where}: {shown(one)} has {what} {value!r:.80} and {what} {given[one]!r:.80}; remove one")
    require_all(given, what, where, keys)
    return [given[one] for one in keys.tolist()]


def require_all(given: Container[bytes], what: str, where: str, keys: np.ndarray) -> None:
    """Raise UserError naming those of `keys` (n,) of which nothing is given."""
    lacking = keys[[one not in given for one in keys.tolist()]]
    if len(lacking):
        how = ', or set "labels" to null' if what == "label" else " (in prepared data by `dataset_tools captions`)"
        raise UserError(f"{where}: no {what} for {len(lacking)} of {len(keys)} files ({few(lacking)}); add it{how}")


# ---- captions --------------------------------------------------------------------------------------------------------

class Captions:
    """Captions of n entries in two arrays: UTF-8 text (bytes,) uint8, and where each entry ends in it, (n,) int64."""

    def __init__(self, text: np.ndarray, ends: np.ndarray):
        self.text, self.ends = text, ends

    def __len__(self) -> int:
        return len(self.ends)

    def equal(self, other: "Captions") -> bool:
        return np.array_equal(self.ends, other.ends) and np.array_equal(self.text, other.text)

    def __getitem__(self, i: int) -> str:
        """The captions of entry i, joined by newlines."""
        return self.text[self.ends[i - 1] if i else 0:self.ends[i]].tobytes().decode()


def pack_captions(joined: list[str]) -> Captions:
    """`joined` holds the captions of each entry, joined by newlines."""
    parts = [captions.encode() for captions in joined]
    return Captions(np.frombuffer(b"".join(parts), np.uint8), np.cumsum([*map(len, parts)], dtype=np.int64))


def tidy(captions: object, where: str) -> list[str]:
    """A caption or a list of them, stripped, with one space for any white space between words.

    Raises UserError naming `where` if there is none, or one is empty or no text.
    """
    found = [" ".join(one.split()) if isinstance(one, str) else "" for one in
             (captions if isinstance(captions, list) else [captions])]
    if not found or not all(found) or re.search("[\ud800-\udfff]", "".join(found)):
        raise UserError(f"{where}: captions {shown(str(captions)[:80])}, expected one text or more, none of them "
                        "empty; correct them")
    return found


def read_captions(store: Store, keys: np.ndarray, key: Callable[[bytes], bytes] = key_of, metadata: dict | None = None
                  ) -> Captions | None:
    """The captions of `keys` (n,) from dataset.json, None if it has none; arguments are those of read_labels.

    Raises UserError if a key has no caption or an empty one.
    """
    metadata = read_metadata(store) if metadata is None else metadata
    entries, where = metadata.get("captions"), store.where(METADATA)
    if entries is None:
        return None
    if not isinstance(entries, dict):
        raise UserError(f'{where}: expected "captions" to be {{name: [caption, ...], ...}} or null')
    given = _match(entries.items(), "caption", where, keys, key)
    return pack_captions(["\n".join(tidy(captions, f"{where}: {shown(one)}"))
                          for one, captions in zip(keys.tolist(), given, strict=True)])


def digest_of(store: Store, name: bytes) -> str:
    """Hash of a file, 16 hex digits."""
    return hashlib.sha256(store.read(name)).hexdigest()[:16]


def sample_digests(store: Store, names: np.ndarray) -> dict[str, str]:
    """`digest_of` some of the names (n,), for dataset.json: files that are replaced under their names are noticed."""
    some = names[np.unique(np.linspace(0, len(names) - 1, SAMPLE).astype(int))]
    return {os.fsdecode(name): digest_of(store, name) for name in some.tolist()}


# ---- the catalogue ---------------------------------------------------------------------------------------------------

class Catalogue:
    """The entries of a store, from its catalogue file or listed.

    Attributes: `keys` (n,) bytes, sorted; `names` (n,) bytes of their files; `metadata`, the content of dataset.json
    but for `labels` (n,) int64 or None and `captions` or None. Raises UserError as list_keyed and, at the first use of
    `labels` or `captions`, as read_labels or read_captions.
    """

    def __init__(self, store: Store, extensions: tuple[bytes, ...], recall: bool = True):
        self.store = store
        found = _recall(store, extensions) if recall else None
        if found is not None:
            self.keys, self.names, self.labels, self.captions, self.metadata = found
            return
        gc.disable()                                              # it doubles the time of a million objects
        try:
            self.keys, self.names = list_keyed(store, extensions)
            self.metadata = read_metadata(store)
        finally:
            gc.enable()

    def keep(self, keys: np.ndarray) -> None:
        """Forget all entries but those of `keys`."""
        labels, kept = self.labels, np.isin(self.keys, keys)
        if self.captions is not None:
            self.captions = pack_captions([self.captions[i] for i in np.flatnonzero(kept)])
        self.keys, self.names, self.labels = self.keys[kept], self.names[kept], None if labels is None else labels[kept]

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        return read_labels(self.store, self.keys, metadata={"labels": self.metadata.pop("labels", None)})

    @functools.cached_property
    def captions(self) -> Captions | None:
        return read_captions(self.store, self.keys, metadata={"captions": self.metadata.pop("captions", None)})


def catalogue_file(path: str | Path) -> Path:
    """Where the catalogue of a folder or a zip is: in the folder, or beside the zip."""
    return Path(path, "catalogue.npz") if os.path.isdir(path) else Path(f"{path}.catalogue.npz")


def write_catalogue(path: str | Path, extensions: tuple[bytes, ...]) -> Catalogue:
    """List a finished folder or zip and write its catalogue. If it cannot be written, that is reported once.

    Returns what was listed. Raises UserError as Catalogue does.
    """
    store = open_store(path)
    found = Catalogue(store, extensions, recall=False)
    keys, names, labels, captions, metadata = found.keys, found.names, found.labels, found.captions, found.metadata
    # A zip's readers need all of its files that are not hidden, a folder's only those with a key.
    files = store.names() if isinstance(store, ZipStore) else np.sort(names)
    if not len(keys) or not _are_plain(files):
        return found
    arrays = {"extensions": np.array(extensions), "files": files, "keys": keys, "labels": labels,
              "order": np.searchsorted(files, names.astype(files.dtype)),         # (n,): names are files[order]
              "metadata": np.frombuffer(json.dumps(metadata).encode(), dtype=np.uint8),
              "captions": captions and captions.text, "caption_ends": captions and captions.ends}
    start = 0
    if isinstance(store, ZipStore):
        arrays["table"] = store.directory[1][np.isin(store.directory[0], files)]
        start = int((arrays["table"][:, 0] + arrays["table"][:, 1]).max())        # behind this are only lists
    arrays["stamp"] = np.array(_stamp(store.path, start))
    try:
        write_npz(catalogue_file(path), (), 0, (0, 0), **arrays)
    except UserError as error:
        _notice_once(f"{error} (without this file a large data set takes half a minute to open)")
    return found


_notice_once = functools.cache(notice)


def _recall(store: Store, extensions: tuple[bytes, ...]) -> tuple | None:
    """Keys (n,), names (n,), labels (n,) or None, captions or None, and metadata of the store's catalogue file.

    It also gives a zip its directory. None without one that fits.
    """
    file = catalogue_file(store.path)
    try:
        with np.load(file, allow_pickle=False) as archive:
            if max(entry.file_size for entry in archive.zip.infolist()) > os.path.getsize(file):
                raise ValueError("compressed")
            kept = {name: archive[name] for name in archive.files}                # each is checked by its CRC-32
        found = kept["stamp"].tolist()
        if kept["extensions"].tolist() != list(extensions) or _stamp(store.path, found[0]) != found:
            return None
        _require_sound(kept, os.path.getsize(store.path))
        metadata = dict(json.loads(kept["metadata"].tobytes()))
        if isinstance(store, ZipStore):
            store.directory = kept["files"], kept["table"]
    except FileNotFoundError:
        return None
    except (*UNREADABLE, AttributeError) as error:
        _notice_once(f"{shown(file)}: damaged ({shown(str(error))}), the files are listed; `check` writes it again")
        return None
    some = kept["files"][np.linspace(0, len(kept["files"]) - 1, SAMPLE).astype(int)]
    if not all(name in store for name in some.tolist()):
        return None
    captions = Captions(kept["captions"], kept["caption_ends"]) if "captions" in kept else None
    return kept["keys"], kept["files"][kept["order"]], kept.get("labels"), captions, metadata


def _stamp(path: str | Path, start: int) -> list[int]:
    """`start`, size and CRC-32 of what changes with the data: dataset.json in a folder; the directory of a zip, which
    lists all names, sizes, offsets and CRC-32s, from `start` on.
    """
    file = Path(path, METADATA) if os.path.isdir(path) else Path(path)
    if not file.exists():
        return [start, 0, 0]
    with open(file, "rb") as stream:
        stream.seek(start)
        data = stream.read()
    return [start, len(data), zlib.crc32(data)]


def _are_plain(files: np.ndarray) -> bool:
    """Whether names (n,) are relative, without "..", the same on every system, and none is hidden or empty."""
    letters = files.view(np.uint8).reshape(len(files), -1)        # (n, width), padded with 0
    text = files.tobytes()
    outside = any(part in text for part in (b"/.", b"//", b"\\"))
    nul_inside = ((letters[:, :-1] == 0) & (letters[:, 1:] != 0)).any()
    drive = (letters[:, 1:2] == ord(":")).any()
    return not (outside or nul_inside or drive or np.isin(letters[:, 0], list(b"\0./")).any())


def _require_sound(kept: dict[str, np.ndarray], end: int) -> None:
    """Raise ValueError unless the arrays could be ours: no name leads out, no offset lies outside of a zip's `end`."""
    files, keys, order, labels = kept["files"], kept["keys"], kept["order"], kept.get("labels", np.zeros(1, np.int64))
    kinds = [array.dtype.kind for array in (files, keys, order, labels)]
    if kinds != ["S", "S", "i", "i"] or files.ndim != 1 or not keys.shape == order.shape == (len(keys),):
        raise ValueError(f"arrays of {kinds}")
    if not _are_plain(files) or not (files[1:] > files[:-1]).all() or not (keys[1:] > keys[:-1]).all():
        raise ValueError("invalid names or keys")
    if order.min() < 0 or order.max() >= len(files):
        raise ValueError("order out of range")
    if "labels" in kept and (labels.shape != keys.shape or labels.min() < 0 or labels.max() >= MAX_CLASSES):
        raise ValueError("labels out of range")
    if "captions" in kept:
        text, ends = kept["captions"], kept["caption_ends"]
        shaped = text.dtype == np.uint8 and text.ndim == 1 and ends.dtype == np.int64 and ends.shape == keys.shape
        rising = shaped and ends[-1] == len(text) and (np.diff(ends, prepend=0) > 0).all()
        if not rising or (text[ends[:-1]] >> 6 == 0b10).any():    # inside of a letter of several bytes
            raise ValueError("captions out of range")
        text.tobytes().decode()
    if "table" in kept:
        offset, size, inflated, method, _ = kept["table"].T
        stored = method == zipfile.ZIP_STORED
        deflated = (method == zipfile.ZIP_DEFLATED) & (inflated <= max_inflated(size))
        outside = (kept["table"] < 0).any() or (offset > end - 30 - size).any()
        if outside or not (stored | deflated).all() or offset.shape != files.shape:
            raise ValueError("offsets outside the zip")
