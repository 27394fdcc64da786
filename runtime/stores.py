"""A folder or a zip as named bytes; refuses hostile names, decompression bombs and pictures too large."""

import functools
import io
import json
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from runtime.files import UNREADABLE, read_patiently, write_whole
from runtime.messages import UserError, notice

METADATA = "dataset.json"
UNFINISHED = ".unfinished.json"  # marks a folder that is still being written, and holds the settings it is written with
IMAGE_EXTENSIONS = (b".png", b".jpg", b".jpeg", b".jfif", b".webp", b".bmp", b".tif", b".tiff", b".gif", b".ppm",
                    b".pgm")
# Pillow's decoders of these extensions; for some others it would start Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

OWN = {METADATA.encode(), UNFINISHED.encode(), b".tmp", b"catalogue.npz"}        # passed over without a notice

# Limits on files from elsewhere, which may be damaged or malicious.
MAX_PIXELS = 2**27      # per picture: half a GiB decoded, in each worker; nearly all cameras make less
MAX_SIDE = 2**16        # of a picture: decoders take time and memory for every row
MAX_INFLATED = 2**30    # bytes of one compressed file; a dataset.json of a million labels has a tenth of it
SMALL, MAX_RATIO = 2**22, 100  # a compressed file may have SMALL bytes and MAX_RATIO times its stored ones; labels: 17
MAX_NAME = 4096         # bytes of a name in a zip, Linux's limit for a path: all names are as wide as the longest
# Pillow warns of large pictures before MAX_PIXELS refuses them; warnings.catch_warnings is not thread-safe.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def shown(name: bytes | str | os.PathLike) -> str:
    """A foreign name or text for a message: on one line, what cannot be printed as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in os.fsdecode(name))


def few(names: np.ndarray) -> str:
    """The first three of an array of names (bytes), for messages."""
    return ", ".join(map(shown, names[:3].tolist())) + (", ..." if len(names) > 3 else "")


def max_inflated(stored: int | np.ndarray) -> int | np.ndarray:
    """The most bytes that a compressed file of `stored` bytes may have; deflate itself reaches 1,000 times as many."""
    return np.minimum(SMALL + MAX_RATIO * stored, MAX_INFLATED)


# ---- folder or zip -------------------------------------------------------------------------------------------------

class FolderStore:
    """The files of a folder. `read` raises UserError if a file cannot be read."""

    def __init__(self, path: str | Path):
        self.path = str(path)

    def listing(self) -> tuple[np.ndarray, np.ndarray]:
        """Relative paths (n,) of all files that are not hidden, sorted, as bytes with `/`; and what is hidden, (m,),
        where a folder counts as one. Opens no file.

        Links are followed. Raises UserError for a folder that cannot be listed, or a link to a folder that contains it.
        """
        found: list[bytes] = []
        hidden: list[bytes] = []
        todo: list[tuple[bytes, frozenset]] = [(b"", frozenset())]                # a folder, and the folders above it
        while todo:
            prefix, above = todo.pop()
            try:
                folder = os.stat(self._path(prefix))
                inside = above | {(folder.st_dev, folder.st_ino)}
                if inside == above:
                    raise UserError(f"{self.where(prefix)}: is a link to a folder that contains it; remove the link")
                with os.scandir(self._path(prefix)) as entries:
                    for entry in entries:
                        if entry.name.startswith(b"."):
                            hidden.append(prefix + entry.name)
                        elif entry.is_dir():
                            todo.append((prefix + entry.name + b"/", inside))
                        elif entry.is_file() or not os.path.exists(entry.path):   # no pipes; `read` names broken links
                            found.append(prefix + entry.name)
            except OSError as error:
                raise UserError(f"{shown(error.filename)}: cannot be listed ({error.strerror})") from error
        return np.sort(np.array(found, dtype=bytes)), np.sort(np.array(hidden, dtype=bytes))

    def names(self) -> np.ndarray:
        """The files of `listing`, (n,)."""
        return self.listing()[0]

    def _path(self, name: bytes | str) -> bytes:
        return os.path.join(os.fsencode(self.path), os.fsencode(name))

    def where(self, name: bytes | str) -> str:
        """The file's full name, for messages."""
        return shown(self._path(name))

    def __contains__(self, name: bytes | str) -> bool:
        return os.path.exists(self._path(name))

    def read(self, name: bytes | str) -> bytes:
        return read_patiently(lambda: Path(os.fsdecode(self._path(name))).read_bytes(), self.where(name))


def is_zip_name(name: str) -> bool:
    """Whether a file in a zip may have this name: relative, without "..", and the same file on every system."""
    parts = f"/{name}/"
    plain = not ("//" in parts or "/./" in parts or "/../" in parts or "\\" in name or "\0" in name
                 or name[1:2] == ":")
    return plain and len(name) <= MAX_NAME and (name.isascii() or len(os.fsencode(name)) <= MAX_NAME)


def _fault(entry: zipfile.ZipInfo, end: int) -> str | None:
    """Why an entry of a zip of `end` bytes is refused, or None."""
    if not is_zip_name(entry.orig_filename.removesuffix("/")):
        return "no relative name without \"..\", backslashes or drive letters; write the zip again"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
        return "encrypted or unusual compression; store it plainly (zip -0)"
    if entry.compress_type == zipfile.ZIP_DEFLATED and entry.file_size > (limit := max_inflated(entry.compress_size)):
        return f"{entry.file_size} bytes, compressed, the limit is {limit}; remove it or use zip -0"
    if not 0 <= entry.header_offset <= end - 30 - entry.compress_size:
        return f"lies outside of the zip's {end} bytes; write the zip again"
    return None


class ZipStore:
    """The files of a zip, stored or deflated, read by offset.

    zipfile keeps an object per entry and one file position for all readers. Here the central directory becomes arrays
    and every read has its own offset, so threads and forked or spawned workers can share the store. Raises UserError
    like FolderStore; the first access raises it for a damaged directory, a hostile or repeated name, and impossible
    sizes or offsets.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._file = None

    @functools.cached_property
    def directory(self) -> tuple[np.ndarray, np.ndarray]:
        """Names (n,) of all files, sorted; and (n, 5) int64: offset, stored size, size, compression, CRC-32.

        runtime.catalogue sets it to what it has verified, which saves reading it.
        """
        try:
            with zipfile.ZipFile(self.path) as archive:
                listed, end = archive.infolist(), os.path.getsize(self.path)
        except UNREADABLE as error:
            raise UserError(f"{shown(self.path)}: not a readable zip file ({shown(str(error))}); write it again"
                            ) from error
        for entry in listed:
            if fault := _fault(entry, end):
                raise UserError(f"{self.where(entry.orig_filename)}: {fault}")
        entries = [entry for entry in listed if entry.filename[-1] != "/"]
        table = [(e.header_offset, e.compress_size, e.file_size, e.compress_type, e.CRC) for e in entries]
        return self._sorted([os.fsencode(entry.filename) for entry in entries], table, 5)

    def _sorted(self, files: list[bytes], rows: list[tuple], columns: int) -> tuple[np.ndarray, np.ndarray]:
        names, table = np.array(files, dtype=bytes), np.array(rows, dtype=np.int64).reshape(-1, columns)
        order = np.argsort(names, kind="stable")
        names = names[order]
        twice = np.flatnonzero(names[1:] == names[:-1])
        if len(twice):
            raise UserError(f"{shown(self.path)}: holds two files named {few(names[twice[:1]])}; write it again")
        return names, table[order]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}

    def listing(self) -> tuple[np.ndarray, np.ndarray]:
        """As FolderStore.listing."""
        names, _ = self.directory
        text = names.tobytes()                                    # each name in as many bytes as the longest has
        if not (b"/." in text or b"__MACOSX/" in text or b"." in names.astype("S1")):
            return names, names[:0]                               # the usual case, without a loop over the names
        hidden = [name.startswith((b".", b"__MACOSX/")) or b"/." in name for name in names.tolist()]
        return names[~np.array(hidden, dtype=bool)], names[np.array(hidden, dtype=bool)]

    names = FolderStore.names

    def where(self, name: bytes | str) -> str:
        return shown(f"{self.path}:{os.fsdecode(name)}")

    def _row(self, name: bytes | str) -> int | None:
        names, name = self.directory[0], os.fsencode(name)
        # The needle has the haystack's width, or numpy would copy the haystack to widen it.
        row = int(np.searchsorted(names, np.array(name, dtype=names.dtype), side="right")) - 1
        return row if row >= 0 and names[row] == name else None

    def _entry(self, name: bytes | str) -> list[int]:
        row = self._row(name)
        if row is None:
            raise UserError(f"{self.where(name)}: no such file in it")
        return self.directory[1][row].tolist()

    def __contains__(self, name: bytes | str) -> bool:
        return self._row(name) is not None

    def read(self, name: bytes | str) -> bytes:
        offset, size, inflated, method, crc = self._entry(name)

        def fetch() -> bytes:
            try:
                if self._file is None:
                    self._file = open(self.path, "rb")  # noqa: SIM115  (kept open for the store's life)
                handle = self._file.fileno()
                # The local header has 30 bytes, a name and an extra field, perhaps of other lengths than the directory.
                name_length, extra_length = struct.unpack("<HH", os.pread(handle, 30, offset)[26:])
                return os.pread(handle, size, offset + 30 + name_length + extra_length)
            except OSError:
                self._file = None                                 # a stale handle stays stale
                raise

        try:
            data = read_patiently(fetch, self.where(name))
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, inflated + 1)  # 1 more: too long
        except (struct.error, zlib.error) as error:
            raise UserError(f"{self.where(name)}: cannot be read ({error})") from error
        if len(data) != inflated or zlib.crc32(data) != crc:
            raise UserError(f"{self.where(name)}: damaged (wrong size or checksum); write the zip again")
        return data


Store = FolderStore | ZipStore                            # and their subclasses in runtime.sources


def open_store(path: str | Path) -> Store:
    """A folder or a zip file as a Store. Raises UserError if it is neither, or a folder that is still being written."""
    if os.path.isdir(path):
        store = FolderStore(path)
        if UNFINISHED in store and METADATA not in store:
            raise UserError(f"{shown(path)}: not finished; give the command that writes it again, it continues")
        return store
    if os.path.isfile(path):
        return ZipStore(path)
    raise UserError(f"{shown(path)}: does not exist; expected a folder or a zip file")


def write_zip(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write a zip of (name, bytes) atomically: stored, with a fixed date, so that equal contents give equal bytes.

    Raises UserError if it cannot be written.
    """

    def write(partial: Path) -> None:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            for name, data in files:
                archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), data)

    write_whole(path, write)


def parse_json(data: bytes, where: str) -> object:
    """The content of a JSON text. Raises UserError naming `where` if it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error) or "not enough memory"
        raise UserError(f"{where}: not JSON ({reason}); write it again") from error


def read_metadata(store: Store) -> dict:
    """The content of the store's dataset.json, or what a source that has none `described`, or {}.

    Raises UserError if it is not a JSON object.
    """
    if METADATA not in store:
        return store.described() if hasattr(store, "described") else {}
    metadata = parse_json(store.read(METADATA), store.where(METADATA))
    if not isinstance(metadata, dict):
        raise UserError(f'{store.where(METADATA)}: must be an object like '
                        '{"labels": [["00000/img00000000.png", 7], ...]}')
    return metadata


def read_npy(store: Store, name: bytes) -> np.ndarray:
    """The array of an npy file; of an npz its archive. Raises UserError if it is unreadable or would need pickle."""
    data = store.read(name)
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except UNREADABLE as error:
        raise UserError(f"{store.where(name)}: not a readable npy file ({shown(str(error))}); remove it, encode again"
                        ) from error


def list_names(store: Store, extensions: tuple[bytes, ...]) -> np.ndarray:
    """The store's names (n,) bytes, sorted, that end in one of `extensions` (any case). A notice counts all others.

    Every program lists with it: conversion, encoding, training and evaluation see the same files.
    """
    names, other = split_names(store, extensions)
    pass_over(store, other)
    return names


def split_names(store: Store, extensions: tuple[bytes, ...]) -> tuple[np.ndarray, np.ndarray]:
    """`list_names` without its notice, and the names (m,) of all others that are not our own."""
    names, hidden = store.listing()
    fits = np.array([name.lower().endswith(extensions) for name in names.tolist()], dtype=bool)
    other = np.array([name for name in [*hidden.tolist(), *names[~fits].tolist()] if name not in OWN], dtype=bytes)
    return names[fits], other


def pass_over(store: Store, other: np.ndarray) -> None:
    """A notice counts the names `other` (m,)."""
    if len(other):
        notice(f"{shown(store.path)}: {len(other)} hidden or other file(s) or folder(s) passed over ({few(other)})")


def decode_image(data: bytes, where: str) -> Image.Image:
    """Decode a picture in its own mode and size; of an animation the first frame.

    Raises UserError naming `where` if it cannot be decoded, or its header declares more than MAX_PIXELS or MAX_SIDE.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
            raise Image.DecompressionBombError
        image.load()
    except Image.DecompressionBombError as error:
        raise UserError(f"{where}: more than {MAX_PIXELS} pixels, or {MAX_SIDE} in a row or column; make it smaller or "
                        "remove it") from error
    except UnidentifiedImageError as error:
        reason = ", ".join(FORMATS) if data else "it is empty"
        raise UserError(f"{where}: not a readable image ({reason}); replace or remove it") from error
    except UNREADABLE as error:
        reason = shown(str(error)) or type(error).__name__
        raise UserError(f"{where}: not a readable image ({reason}); replace or remove it") from error
    return image
