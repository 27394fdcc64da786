"""The files of a folder or a zip as named bytes, and what is refused of them: hostile names, bombs, pictures too large to decode."""

import io
import json
import os
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from runtime import index
from runtime.files import UNREADABLE
from runtime.messages import UserError

IMAGE_EXTENSIONS = (b".png", b".jpg", b".jpeg", b".webp", b".bmp", b".tif", b".tiff", b".gif", b".ppm", b".pgm")
METADATA = "dataset.json"
UNFINISHED = ".unfinished.json"  # lies in a folder that is still being written, and holds the settings it is written with

# What comes from elsewhere may be damaged or made to do harm.
MAX_PIXELS = 2**27      # of a picture: half a GiB decoded (4 bytes a pixel), which each worker holds; nearly all cameras make less
MAX_INFLATED = 2**30    # bytes that one compressed file may grow to; a dataset.json of a million labels is a tenth of it
MAX_NAME = 4096         # bytes of a file's name in a zip, as many as a system takes: all names are as wide as the longest
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # IMAGE_EXTENSIONS; Pillow would run Ghostscript for some others
# Pillow warns of large pictures before MAX_PIXELS refuses them; warnings.catch_warnings is not for threads.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def shown(name: bytes | str | os.PathLike) -> str:
    """A name or text of others in a message: on one line and in any encoding, with escapes for what cannot be printed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in os.fsdecode(name))


def few(names: np.ndarray) -> str:
    """The first names of an array of bytes, for messages."""
    return ", ".join(map(shown, names[:3].tolist())) + (", ..." if len(names) > 3 else "")


# ---- folder or zip --------------------------------------------------------------------------------------------------------------------

class FolderStore:
    """The files of a folder. `read` raises UserError when a file cannot be read.

    Attribute `seen`: after `names`, the stamps (see runtime.index) of what they and dataset.json follow from.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self.seen: dict[bytes, bytes] = {}

    def names(self) -> np.ndarray:
        """Relative paths of all files that are not hidden, sorted, as bytes with `/` (n,); no file is opened.

        Links are followed. Raises UserError for a folder that cannot be listed, or that a link leads back to.
        """
        found: list[bytes] = []
        self.seen = {}
        todo: list[tuple[bytes, frozenset]] = [(b"", frozenset())]                # a folder, and the folders that hold it
        while todo:
            prefix, above = todo.pop()
            try:
                self.seen[prefix] = index.stamp(self._path(prefix))               # before it is listed
                folder = os.stat(self._path(prefix))
                inside = above | {(folder.st_dev, folder.st_ino)}
                if inside == above:
                    raise UserError(f"{self.where(prefix)} is a link to a folder that holds it: remove the link")
                with os.scandir(self._path(prefix)) as entries:
                    for entry in entries:
                        if entry.name.startswith(b"."):
                            continue
                        if entry.is_dir():
                            todo.append((prefix + entry.name + b"/", inside))
                        elif entry.is_file() or not os.path.exists(entry.path):   # a broken link is named when it is read; no pipes
                            found.append(prefix + entry.name)
                if not prefix and METADATA in self:
                    self.seen[os.fsencode(METADATA)] = index.stamp(self._path(METADATA))
            except OSError as error:
                raise UserError(f"cannot list {shown(error.filename)}: {error.strerror}") from error
        return np.sort(np.array(found, dtype=bytes))

    def _path(self, name: bytes | str) -> bytes:
        return os.path.join(os.fsencode(self.path), os.fsencode(name))

    def where(self, name: bytes | str) -> str:
        """The file's full name, for messages."""
        return shown(self._path(name))

    def __contains__(self, name: bytes | str) -> bool:
        return os.path.exists(self._path(name))

    def read(self, name: bytes | str) -> bytes:
        try:
            with open(self._path(name), "rb") as file:
                return file.read()
        except OSError as error:
            raise UserError(f"cannot read {self.where(name)}: {error.strerror}") from error


def is_zip_name(name: str) -> bool:
    """Whether a file in a zip may have this name: relative, inside of its folder, and the same file on every system."""
    parts = f"/{name}/"
    plain = not ("//" in parts or "/./" in parts or "/../" in parts or "\\" in name or "\0" in name or name[1:2] == ":")
    return plain and len(name) <= MAX_NAME and (name.isascii() or len(os.fsencode(name)) <= MAX_NAME)


def _fault(entry: zipfile.ZipInfo, end: int) -> str | None:
    """Why an entry of a zip of `end` bytes cannot be taken, to be said behind its name."""
    if not is_zip_name(entry.orig_filename.removesuffix("/")):
        return ": expected relative names without \"..\", backslashes or drive letters; write the zip again"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
        return " encrypted or with an unusual compression: store it plainly (zip -0)"
    if entry.compress_type == zipfile.ZIP_DEFLATED and entry.file_size > MAX_INFLATED:
        return f" of {entry.file_size} bytes, compressed: expected at most {MAX_INFLATED}; remove it or use zip -0"
    if not 0 <= entry.header_offset <= end - 30 - entry.compress_size:
        return f" outside of its {end} bytes: write the zip again"
    return None


class ZipStore:
    """The files of a zip, stored or deflated, read by offset.

    zipfile keeps an object for every entry and one file position for all readers. Here the central directory becomes arrays and
    every read names its own offset, so that threads and forked or spawned workers share the store. Raises UserError like FolderStore,
    and when it is opened for names that lead out of a folder, for one name twice, and for sizes and places that cannot be.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._file = None
        self.seen = {b"": index.stamp(path)}                                      # as FolderStore.seen, before it is read
        kept = index.recall("zip", path)
        if kept is None:
            self._names, self._table = self._read_directory()
            if len(self._names) >= index.WORTHWHILE:
                index.keep("zip", path, self.seen, {"names": self._names, "table": self._table})
        else:
            self._names, self._table = kept["names"], kept["table"]               # (n,) sorted, (n, 5)

    def _read_directory(self) -> tuple[np.ndarray, np.ndarray]:
        """The names (n,) sorted, and of each its offset, stored size, size, compression and checksum (n, 5)."""
        path = self.path
        try:
            with zipfile.ZipFile(path) as archive:
                listed, end = archive.infolist(), os.path.getsize(path)
        except UNREADABLE as error:
            raise UserError(f"{shown(path)} is not a readable zip file ({shown(str(error))}): write it again") from error
        for entry in listed:
            if fault := _fault(entry, end):
                raise UserError(f"{shown(path)} holds {shown(entry.orig_filename)}{fault}")
        entries = [entry for entry in listed if entry.filename[-1] != "/"]
        names = np.array([os.fsencode(entry.filename) for entry in entries], dtype=bytes)
        order = np.argsort(names, kind="stable")
        names = names[order]
        twice = np.flatnonzero(names[1:] == names[:-1])
        if len(twice):
            raise UserError(f"{shown(path)} holds two files named {few(names[twice[:1]])}: write the zip again")
        table = np.array([(e.header_offset, e.compress_size, e.file_size, e.compress_type, e.CRC) for e in entries], dtype=np.int64)
        return names, table.reshape(-1, 5)[order]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}

    def names(self) -> np.ndarray:
        """As FolderStore.names."""
        text = self._names.tobytes()                              # each name in as many bytes as the longest has
        if not (b"/." in text or b"__MACOSX/" in text or b"." in self._names.astype("S1")):
            return self._names                                    # the usual case, without a look at each
        hidden = [name.startswith((b".", b"__MACOSX/")) or b"/." in name for name in self._names.tolist()]
        return self._names[~np.array(hidden, dtype=bool)]

    def where(self, name: bytes | str) -> str:
        return shown(f"{self.path}:{os.fsdecode(name)}")

    def _row(self, name: bytes | str) -> int | None:
        name = os.fsencode(name)
        # The needle takes the haystack's width, or numpy would copy the haystack to widen it.
        row = int(np.searchsorted(self._names, np.array(name, dtype=self._names.dtype), side="right")) - 1
        return row if row >= 0 and self._names[row] == name else None

    def __contains__(self, name: bytes | str) -> bool:
        return self._row(name) is not None

    def read(self, name: bytes | str) -> bytes:
        row = self._row(name)
        if row is None:
            raise UserError(f"{shown(self.path)} holds no file {shown(name)}")
        offset, size, inflated, method, crc = self._table[row].tolist()
        try:
            if self._file is None:
                self._file = open(self.path, "rb")  # noqa: SIM115  (kept open for the store's life)
            handle = self._file.fileno()
            # The local header is 30 bytes, then the name and an extra field, whose lengths may differ from the central directory's.
            name_length, extra_length = struct.unpack("<HH", os.pread(handle, 30, offset)[26:])
            data = os.pread(handle, size, offset + 30 + name_length + extra_length)
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, inflated + 1)  # one more would be told by the length
        except (OSError, struct.error, zlib.error) as error:
            raise UserError(f"cannot read {self.where(name)}: {error}") from error
        if len(data) != inflated or zlib.crc32(data) != crc:
            raise UserError(f"{self.where(name)} is damaged (wrong size or checksum): write the zip again")
        return data


Store = FolderStore | ZipStore


def open_store(path: str | Path) -> Store:
    """A folder or a zip file as a Store; raises UserError when it is neither, or still being written."""
    if os.path.isdir(path):
        store = FolderStore(path)
        if UNFINISHED in store and METADATA not in store:
            raise UserError(f"{shown(path)} is not finished: give the command that writes it again, it continues")
        return store
    if os.path.isfile(path):
        return ZipStore(path)
    raise UserError(f"{shown(path)} does not exist: expected a folder or a zip file")


def read_metadata(store: Store) -> dict:
    """What the store's dataset.json says, {} without one; raises UserError when it is not a JSON object."""
    if METADATA not in store:
        return {}
    data = store.read(METADATA)
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{store.where(METADATA)} is not JSON ({error}): write it again") from error
    if not isinstance(metadata, dict):
        raise UserError(f'{store.where(METADATA)} must be an object like {{"labels": [["00000/img00000000.png", 7], ...]}}')
    return metadata


def list_names(store: Store, extensions: tuple[bytes, ...]) -> np.ndarray:
    """The store's names (n,) bytes, sorted, that end in one of `extensions` (any case)."""
    names = store.names()
    return names[np.array([name.lower().endswith(extensions) for name in names.tolist()], dtype=bool)]


def decode_image(data: bytes, where: str) -> Image.Image:
    """A file's bytes -> the loaded picture, in its own mode and size; of an animation the first frame.

    Raises UserError naming `where` when it cannot be decoded, or when its header says more than MAX_PIXELS.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.load()
    except Image.DecompressionBombError as error:
        raise UserError(f"{where} has more than {MAX_PIXELS} pixels: make it smaller or remove it") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{where} is not a readable image (none of {', '.join(FORMATS)}): replace or remove it") from error
    except UNREADABLE as error:
        raise UserError(f"{where} is not a readable image ({shown(str(error))}): replace or remove it") from error
    return image
