"""The files of a folder or a zip as named bytes. Hostile names, bombs and pictures too large to decode are refused."""

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

from runtime.files import UNREADABLE
from runtime.messages import UserError, notice

# The one list of picture extensions, for convert, check and the evaluator.
IMAGE_EXTENSIONS = (b".png", b".jpg", b".jpeg", b".jfif", b".webp", b".bmp", b".tif", b".tiff", b".gif", b".ppm",
                    b".pgm")
METADATA = "dataset.json"
UNFINISHED = ".unfinished.json"  # in a folder that is still being written; holds the settings it is written with
CATALOGUE = "catalogue.npz"      # beside dataset.json, or as X.zip.catalogue.npz beside X.zip: see runtime/catalogue.py

# Files of others may be damaged or made to do harm.
MAX_PIXELS = 2**27      # of a picture: half a GiB decoded (4 bytes a pixel), more than nearly all cameras make
MAX_INFLATED = 2**30  # bytes that one compressed file may grow to; a dataset.json of a million labels is a tenth of it
MAX_NAME = 4096         # bytes of a file's name in a zip, the limit of most systems; all names take the longest's width
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")    # Pillow would run Ghostscript for some others
# Pillow warns of large pictures before MAX_PIXELS refuses them; warnings.catch_warnings is not for threads.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def shown(name: bytes | str | os.PathLike) -> str:
    """A name or text of others for a message: on one line, with escapes for what cannot be printed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in os.fsdecode(name))


def few(names: np.ndarray) -> str:
    """The first names of an array of bytes, for messages."""
    return ", ".join(map(shown, names[:3].tolist())) + (", ..." if len(names) > 3 else "")


# -------------------------------------------------------------------------------------------------------- folder or zip

class FolderStore:
    """The files of a folder. `read` raises UserError if a file cannot be read."""

    def __init__(self, path: str | Path):
        self.path = str(path)

    def names(self) -> np.ndarray:
        """Relative paths of all files that are not hidden, sorted, as bytes with `/` (n,); no file is opened.

        Links are followed. Raises UserError for a folder that cannot be listed, or that a link leads back to.
        """
        found: list[bytes] = []
        todo: list[tuple[bytes, frozenset]] = [(b"", frozenset())]              # a folder, and the folders that hold it
        while todo:
            prefix, above = todo.pop()
            try:
                folder = os.stat(self._path(prefix))
                inside = above | {(folder.st_dev, folder.st_ino)}
                if inside == above:
                    raise UserError(f"{self.where(prefix)}: a link to a folder that holds it; remove the link")
                with os.scandir(self._path(prefix)) as entries:
                    for entry in entries:
                        if entry.name.startswith(b".") or not prefix and entry.name == CATALOGUE.encode():
                            continue
                        if entry.is_dir():
                            todo.append((prefix + entry.name + b"/", inside))
                        # a broken link is named when it is read
                        elif entry.is_file() or not os.path.exists(entry.path):
                            found.append(prefix + entry.name)
            except OSError as error:
                raise UserError(f"{shown(error.filename)}: cannot be listed ({error.strerror})") from error
        return np.sort(np.array(found, dtype=bytes))

    def _path(self, name: bytes | str) -> bytes:
        return os.path.join(os.fsencode(self.path), os.fsencode(name))

    def where(self, name: bytes | str) -> str:
        """The file's full name, for messages."""
        return shown(self._path(name))

    def __contains__(self, name: bytes | str) -> bool:
        return os.path.exists(self._path(name))

    def read(self, name: bytes | str) -> bytes:
        """The bytes of one file."""
        try:
            with open(self._path(name), "rb") as file:
                return file.read()
        except OSError as error:
            raise UserError(f"{self.where(name)}: cannot be read ({error.strerror})") from error


def is_zip_name(name: str) -> bool:
    """Whether a file in a zip may have this name: relative, inside its folder, and the same file on every system."""
    parts = f"/{name}/"
    odd = "//" in parts or "/./" in parts or "/../" in parts or "\\" in name or "\0" in name or name[1:2] == ":"
    return not odd and len(name) <= MAX_NAME and (name.isascii() or len(os.fsencode(name)) <= MAX_NAME)


def _fault(entry: zipfile.ZipInfo, end: int) -> str | None:
    """Why an entry of a zip of `end` bytes is refused; None if it is not."""
    if not is_zip_name(entry.orig_filename.removesuffix("/")):
        return "not a relative name without \"..\", backslashes and drive letters; write the zip again"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
        return "encrypted, or of an unusual compression; store it plainly (zip -0)"
    if entry.compress_type == zipfile.ZIP_DEFLATED and entry.file_size > MAX_INFLATED:
        return f"{entry.file_size} bytes, compressed: more than {MAX_INFLATED}; remove it, or use zip -0"
    if not 0 <= entry.header_offset <= end - 30 - entry.compress_size:
        return f"outside the zip's {end} bytes; write the zip again"
    return None


class ZipStore:
    """The files of a zip, stored or deflated, read by offset.

    zipfile keeps an object per entry and one file position for all readers. Here the central directory is an array and
    every read has its own offset: threads and forked or spawned workers share the store. Raises UserError like
    FolderStore, and when opened for names that lead out of a folder, for duplicate names, and for impossible sizes and
    places.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._file = None
        kept = read_catalogue(path)
        if kept is not None and _is_table(kept, os.path.getsize(path)):
            self._names, self._table = kept["files"], kept["table"]
        else:
            self._names, self._table = self._read_directory()     # (n,) sorted, (n, 5)

    def _read_directory(self) -> tuple[np.ndarray, np.ndarray]:
        """Names (n,), sorted, and (n, 5): offset, stored size, size, compression, checksum."""
        path = self.path
        try:
            with zipfile.ZipFile(path) as archive:
                listed, end = archive.infolist(), os.path.getsize(path)
        except UNREADABLE as error:
            raise UserError(f"{shown(path)}: not a readable zip file ({shown(str(error))}); write it again") from error
        for entry in listed:
            if fault := _fault(entry, end):
                raise UserError(f"{shown(path)}: holds {shown(entry.orig_filename)}, {fault}")
        entries = [entry for entry in listed if entry.filename[-1] != "/"]
        names = np.array([os.fsencode(entry.filename) for entry in entries], dtype=bytes)
        order = np.argsort(names, kind="stable")
        names = names[order]
        twice = np.flatnonzero(names[1:] == names[:-1])
        if len(twice):
            raise UserError(f"{shown(path)}: holds two files named {few(names[twice[:1]])}; write the zip again")
        rows = [(e.header_offset, e.compress_size, e.file_size, e.compress_type, e.CRC) for e in entries]
        return names, np.array(rows, dtype=np.int64).reshape(-1, 5)[order]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}

    def directory(self) -> dict[str, np.ndarray]:
        """The arrays that a catalogue keeps of the zip: names of all files, and where they lie."""
        return {"files": self._names, "table": self._table}

    def names(self) -> np.ndarray:
        """As FolderStore.names."""
        text = self._names.tobytes()                              # each name in as many bytes as the longest has
        if not (b"/." in text or b"__MACOSX/" in text or b"." in self._names.astype("S1")):
            return self._names                                    # the usual case, without a look at each
        hidden = [name.startswith((b".", b"__MACOSX/")) or b"/." in name for name in self._names.tolist()]
        return self._names[~np.array(hidden, dtype=bool)]

    def where(self, name: bytes | str) -> str:
        """The file's full name, for messages."""
        return shown(f"{self.path}:{os.fsdecode(name)}")

    def _row(self, name: bytes | str) -> int | None:
        name = os.fsencode(name)
        # The needle takes the haystack's width, or numpy would copy the haystack to widen it.
        row = int(np.searchsorted(self._names, np.array(name, dtype=self._names.dtype), side="right")) - 1
        return row if row >= 0 and self._names[row] == name else None

    def __contains__(self, name: bytes | str) -> bool:
        return self._row(name) is not None

    def read(self, name: bytes | str) -> bytes:
        """The bytes of one file, held against their checksum."""
        row = self._row(name)
        if row is None:
            raise UserError(f"{shown(self.path)}: holds no file {shown(name)}")
        offset, size, inflated, method, crc = self._table[row].tolist()
        try:
            if self._file is None:
                self._file = open(self.path, "rb")  # noqa: SIM115  (open for the store's life)
            handle = self._file.fileno()
            # The local header is 30 bytes, a name and an extra field, whose lengths may differ from the directory's.
            name_length, extra_length = struct.unpack("<HH", os.pread(handle, 30, offset)[26:])
            data = os.pread(handle, size, offset + 30 + name_length + extra_length)
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, inflated + 1)  # the length tells one more
        except (OSError, struct.error, zlib.error) as error:
            raise UserError(f"{self.where(name)}: cannot be read ({error})") from error
        if len(data) != inflated or zlib.crc32(data) != crc:
            raise UserError(f"{self.where(name)}: damaged (wrong size or checksum); write the zip again")
        return data


Store = FolderStore | ZipStore


def open_store(path: str | Path) -> Store:
    """A folder or a zip file as a Store. Raises UserError if it is neither, or still being written."""
    if os.path.isdir(path):
        store = FolderStore(path)
        if UNFINISHED in store and METADATA not in store:
            raise UserError(f"{shown(path)}: not finished; give the command that writes it again, it continues")
        return store
    if os.path.isfile(path):
        return ZipStore(path)
    raise UserError(f"{shown(path)}: does not exist; expected a folder or a zip file")


def list_names(store: Store, extensions: tuple[bytes, ...]) -> np.ndarray:
    """The store's names (n,) bytes, sorted, that end in one of `extensions` (any case)."""
    names = store.names()
    return names[np.array([name.lower().endswith(extensions) for name in names.tolist()], dtype=bool)]


def read_metadata(store: Store) -> dict:
    """The content of the store's dataset.json, {} without one. Raises UserError if it is no JSON object."""
    if METADATA not in store:
        return {}
    try:
        metadata = json.loads(store.read(METADATA))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{store.where(METADATA)}: not JSON ({error}); write it again") from error
    if not isinstance(metadata, dict):
        raise UserError(f'{store.where(METADATA)}: expected an object like '
                        f'{{"labels": [["00000/img00000000.png", 7]]}}')
    return metadata


# ------------------------------------------------------------------------------------------------------------ catalogue

def catalogue_path(path: str | Path) -> Path:
    """The catalogue of a folder, inside it, or of a zip, beside it."""
    return Path(path) / CATALOGUE if os.path.isdir(path) else Path(f"{path}.{CATALOGUE}")


def described_size(path: str | Path) -> int:
    """The size in bytes by which a catalogue is verified: of the zip, or of the folder's dataset.json (0: none)."""
    file = os.path.join(path, METADATA) if os.path.isdir(path) else path
    return os.path.getsize(file) if os.path.exists(file) else 0


def read_catalogue(path: str | Path) -> dict[str, np.ndarray] | None:
    """The arrays in the catalogue of a folder or zip; None without one, or if it does not fit (then list the files)."""
    file = catalogue_path(path)
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as kept:
            arrays = {name: kept[name] for name in kept.files}    # each is held against its checksum
        names = arrays["names"]
        fits = int(arrays["size"]) == described_size(path) and int(arrays["count"]) == len(names) == len(arrays["keys"])
        if fits and os.path.isdir(path):
            inside = not (b"../" in names.tobytes() or (names.astype("S1") == b"/").any())
            ends = [os.path.join(os.fsencode(path), name) for name in names[[0, -1]].tolist()]
            fits = inside and all(map(os.path.exists, ends))
        return arrays if fits else None
    except UNREADABLE as error:
        notice(f"{shown(file)}: cannot be read ({error}); the files are listed instead")
        return None


def _is_table(kept: dict[str, np.ndarray], end: int) -> bool:
    """Whether a catalogue's table of a zip of `end` bytes is one that `_read_directory` could have made."""
    files, table = kept.get("files"), kept.get("table")
    if files is None or files.dtype.kind != "S" or table is None or table.dtype != np.int64:
        return False
    if files.ndim != 1 or table.shape != (len(files), 5):
        return False
    offset, size, inflated, method, _ = table.T
    deflated = method == zipfile.ZIP_DEFLATED
    placed = (offset >= 0) & (size >= 0) & (offset <= end - 30 - size) & (inflated >= 0)
    small = (deflated & (inflated <= MAX_INFLATED)) | ((method == zipfile.ZIP_STORED) & (inflated == size))
    return bool((placed & small).all() and (files[1:] > files[:-1]).all())


# ------------------------------------------------------------------------------------------------------------- pictures

def decode_image(data: bytes, where: str) -> Image.Image:
    """Decode a picture, in its own mode and size; of an animation the first frame.

    Raises UserError naming `where` if it cannot be decoded, or if its header says more than MAX_PIXELS.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.load()
    except Image.DecompressionBombError as error:
        raise UserError(f"{where}: more than {MAX_PIXELS} pixels; make it smaller, or remove it") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{where}: not a readable image ({', '.join(FORMATS)}); replace or remove it") from error
    except UNREADABLE as error:
        raise UserError(f"{where}: not a readable image ({shown(str(error))}); replace or remove it") from error
    return image
