"""The prepared data set: image, moments and label, paired by key, from folders or zips; and the order they are drawn in.

DATA_DIR holds `images/` (png) and `vae-sd/` (npy), or zips of them, each with a dataset.json that `preprocessing.dataset_tools` writes,
and perhaps `features-*/` (npy), what encoders said of the images.
Shape letters: B batch, C latent channels, H W latent size, R image size.

A million entries must not cost a million Python objects in every loader worker (reading touches their reference counts, which
copies the memory that fork shares), so names and labels are numpy arrays, names as fixed-width bytes.
"""

import contextlib
import functools
import gc
import hashlib
import io
import json
import multiprocessing
import os
import re
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from models import index
from models.cached_features import FOLDER, FeaturesRecord, UnfitFeatures, features_folder
from models.errors import UserError, notice
from models.files import UNREADABLE

IMAGES = ("images", "images.zip", "imagenet_256_vae", "imagenet_256_vae.zip")
MOMENTS = ("vae-sd", "vae-sd.zip")
IMAGE_EXTENSIONS = (b".png", b".jpg", b".jpeg", b".webp", b".bmp", b".tif", b".tiff", b".gif", b".ppm", b".pgm")
MOMENTS_EXTENSIONS = (b".npy",)
METADATA = "dataset.json"
UNFINISHED = ".unfinished.json"  # lies in a folder that is still being written, and holds the settings it is written with

# What comes from elsewhere may be damaged or made to do harm.
MAX_PIXELS = 2**27      # of a picture: half a GiB decoded (4 bytes a pixel), which each worker holds; nearly all cameras make less
MAX_CLASSES = 10**7     # an embedding of XL's width for each takes 46 GB
MAX_INFLATED = 2**30    # bytes that one compressed file may grow to; a dataset.json of a million labels is a tenth of it
MAX_NAME = 4096         # bytes of a file's name in a zip, as many as a system takes: all names are as wide as the longest
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # IMAGE_EXTENSIONS; Pillow would run Ghostscript for some others
# Pillow warns of large pictures before MAX_PIXELS refuses them; warnings.catch_warnings is not for threads.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def shown(name: bytes | str | os.PathLike) -> str:
    """A name or text of others in a message: on one line and in any encoding, with escapes for what cannot be printed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in os.fsdecode(name))


# ---- folder or zip --------------------------------------------------------------------------------------------------------------------

class FolderStore:
    """The files of a folder. `read` raises UserError when a file cannot be read.

    Attribute `seen`: after `names`, the stamps (see models.index) of what they and dataset.json follow from.
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


# ---- keys and labels ------------------------------------------------------------------------------------------------------------------

def key_of(name: bytes) -> bytes:
    """The key of a file: its relative path without extension and without the prefix `img-mean-std-` or `img` of its name."""
    folder, slash, file = name.rpartition(b"/")
    stem = file.rpartition(b".")[0] or file
    for prefix in (b"img-mean-std-", b"img"):
        if stem.startswith(prefix):
            return folder + slash + stem[len(prefix):]
    return folder + slash + stem


def few(names: np.ndarray) -> str:
    """The first names of an array of bytes, for messages."""
    return ", ".join(map(shown, names[:3].tolist())) + (", ..." if len(names) > 3 else "")


def list_names(store: Store, extensions: tuple[bytes, ...]) -> np.ndarray:
    """The store's names (n,) bytes, sorted, that end in one of `extensions` (any case)."""
    names = store.names()
    return names[np.array([name.lower().endswith(extensions) for name in names.tolist()], dtype=bool)]


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


# ---- one file -------------------------------------------------------------------------------------------------------------------------

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


def read_image(store: Store, name: bytes, resolution: int | None = None) -> np.ndarray:
    """A prepared image: uint8 (3, R, R). Raises UserError when it is unreadable, not RGB, not square or not `resolution` px."""
    image = decode_image(store.read(name), store.where(name))
    expected = resolution or image.width
    if image.mode != "RGB" or image.size != (expected, expected):
        raise UserError(f"{store.where(name)} is {image.mode} of {image.width}x{image.height} px, "
                        f"expected RGB of {expected}x{expected}: prepare it with `preprocessing.dataset_tools convert`")
    return np.ascontiguousarray(np.array(image).transpose(2, 0, 1))               # (3, R, R)


def read_moments(store: Store, name: bytes, shape: tuple[int, int, int] | None = None) -> np.ndarray:
    """Moments: float32 (2C, H, W). Raises UserError when they are unreadable, have no such shape, or not `shape`."""
    data = store.read(name)
    try:
        moments = np.load(io.BytesIO(data), allow_pickle=False)
    except UNREADABLE as error:
        raise UserError(f"{store.where(name)} is not a readable npy file ({shown(str(error))}): remove it and encode again") from error
    found = getattr(moments, "shape", None)
    fits = found is not None and moments.dtype.kind == "f" and (found == shape if shape else _is_moments(found))
    if not fits:
        raise UserError(f"{store.where(name)} has shape {found}, expected {shape or '(2C, H, H)'} floats: remove it and encode again")
    return moments.astype(np.float32)


def _is_moments(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and min(shape) > 0 and shape[0] % 2 == 0 and shape[1] == shape[2]


def read_features(store: Store, name: bytes, layout: np.dtype) -> dict[str, np.ndarray]:
    """One image's features, the arrays that `layout` names. Raises UserError when they are unreadable or laid out otherwise."""
    data = store.read(name)
    try:
        features = np.load(io.BytesIO(data), allow_pickle=False)
    except UNREADABLE as error:
        raise UserError(f"{store.where(name)} is not a readable npy file ({shown(str(error))}): remove it and encode again") from error
    if getattr(features, "dtype", None) != layout or features.shape != ():
        raise UserError(f"{store.where(name)} does not hold the features that its {METADATA} describes: remove it and encode again")
    return {part: features[part] for part in layout.names}


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


class Features:
    """The features of one encoder: `store` with `keys` (n,) and `names` (n,), `record` of what made them, `source` of which images.

    Raises UnfitFeatures when they cannot be opened, are not finished, or are described by no record.
    """

    def __init__(self, path: str | Path):
        try:
            self.store = open_store(path)
            catalogue = Catalogue(self.store, MOMENTS_EXTENSIONS)
            self.record = FeaturesRecord.from_record(catalogue.metadata.get("features"))
            self.keys, self.names = catalogue.keys, catalogue.names
            catalogue.keep()
        except UserError as error:
            raise UnfitFeatures(f"{shown(path)}: {error}") from error
        self.source = _source_of(catalogue.metadata)
        self.layout = self.record.layout()


def _source_of(metadata: dict) -> object:
    """What `encode` noted of the images it read, None in data sets of others."""
    made_with = metadata.get("made_with")
    return made_with.get("source_contents") if isinstance(made_with, dict) else None


def features_path(data_dir: str | Path, enc_type: str) -> Path | None:
    """Where the features of an encoder lie in a data folder, a folder or a zip; None where they do not."""
    folder = os.path.join(data_dir, features_folder(enc_type))
    return next((Path(path) for path in (folder, f"{folder}.zip") if os.path.exists(path)), None)


def feature_stores(data_dir: str | Path) -> list[Path]:
    """Where the features of every encoder lie in a data folder."""
    found = sorted(path for path in Path(data_dir).glob(f"{FOLDER}*") if path.is_dir() or path.suffix == ".zip")
    return [path for path in found if path.suffix != ".partial"]                  # that is a zip to be


# ---- the data set ---------------------------------------------------------------------------------------------------------------------

def _find(data_dir: Path, candidates: tuple[str, ...], what: str) -> Store:
    for name in candidates:
        if (data_dir / name).exists():
            return open_store(data_dir / name)
    raise UserError(f"{shown(data_dir)} holds no {what}: looked for {', '.join(candidates)}; "
                    "prepare it with `python -m preprocessing.dataset_tools`")


def _find_resolution(given: int | None, image: int | None, latent: int, record: dict | None) -> int | None:
    """The image size that `given`, the images and the moments agree on, None when nothing says it; raises UserError when they differ."""
    if given and image and given != image:
        raise UserError(f"resolution {given} was asked for and the images are {image} px: give --resolution {image}, or convert again")
    resolution = given or image
    if record:
        fitting = latent * record["downsampling"]
        if resolution and resolution != fitting:
            raise UserError(f"resolution {resolution} does not fit the moments: {latent}x{latent} latents of "
                            f"{shown(str(record.get('vae')))} belong to {fitting} px; give the resolution they were encoded at, "
                            "or encode again")
        return fitting
    if resolution and resolution % latent:
        raise UserError(f"resolution {resolution} does not fit the moments of {latent}x{latent}: encode the images again")
    return resolution


class LatentDataset(torch.utils.data.Dataset):
    """`dataset[i]` -> image uint8 (3, R, R), moments float32 (2C, H, W), label int, and each encoder's features; ordered by key.

    Args:
        data_dir: holds the images and the moments, each a folder or a zip
        resolution: R in pixels; None takes what the data says
        num_classes: None takes the greatest label + 1
        with_images: False neither needs nor reads images; the image is then an empty tensor (0,)
        features: stored features to yield, too: after the label one dict of tensors for each, as `FeaturesRecord.layout` names them

    Attributes: `keys` (n,) bytes, `labels` (n,) int64, `num_classes`, `moments_shape` (2C, H, W), `vae_record` (what
    `LatentSpace.to_record` wrote, None in data sets of others), `resolution` (None when neither images nor record say it),
    `fingerprint` (sha256 of keys and labels, hex).

    Raises UserError before any long work when images, moments, labels, `resolution` and `num_classes` do not fit together (only the
    first pair is opened), UnfitFeatures when `features` do not fit the rest, and UserError from `dataset[i]` when a file is damaged.
    Names and labels of a large data set are kept in an index (models.index says where, and which changes it notices).
    """

    @uncollected()
    def __init__(self, data_dir: str | Path, resolution: int | None = None, num_classes: int | None = None, with_images: bool = True,
                 features: Sequence[Features] = ()):
        data_dir = Path(data_dir)
        if not data_dir.is_dir():
            raise UserError(f"the data folder {shown(data_dir)} does not exist: expected a folder with images/ and vae-sd/")
        self.moments = _find(data_dir, MOMENTS, "moments")
        self.images = _find(data_dir, IMAGES, "images") if with_images else None
        moments = Catalogue(self.moments, MOMENTS_EXTENSIONS)
        images = Catalogue(self.images, IMAGE_EXTENSIONS) if with_images else None
        self.keys, self._moments_names = moments.keys, moments.names
        if images is not None:
            self._image_names = images.names
            self._require_pairs(images.keys)
        if not len(self.keys):
            raise UserError(f"{shown(self.moments.path)} holds no .npy file: encode the images with `preprocessing.dataset_tools encode`")

        self.labels = self._join_labels(data_dir, moments, images)
        top = int(self.labels.argmax())
        self.num_classes = int(self.labels[top]) + 1 if num_classes is None else num_classes
        if self.num_classes > MAX_CLASSES:
            raise UserError(f"num_classes is {num_classes}, expected at most {MAX_CLASSES}, as every class has an embedding: give fewer")
        if self.labels[top] >= self.num_classes:
            raise UserError(f"{self.key(top)} has label {self.labels[top]}, expected labels below num_classes {num_classes}: "
                            f"give at least {self.labels[top] + 1}")
        self.fingerprint = hashlib.sha256(self.keys.tobytes() + self.labels.astype("<i8").tobytes()).hexdigest()

        self.moments_shape = read_moments(self.moments, self._moments_names[0]).shape
        self.vae_record, self._source = self._check_vae_record(moments.metadata.get("vae")), _source_of(moments.metadata)
        image_size = read_image(self.images, self._image_names[0]).shape[-1] if self.images is not None else None
        self.resolution = _find_resolution(resolution, image_size, self.moments_shape[1], self.vae_record)
        self.features = list(features)
        self._features_names = [self._match(one) for one in self.features]
        for catalogue in filter(None, (moments, images)):
            catalogue.keep()

    def _match(self, features: Features) -> np.ndarray:
        """The names (n,) of the features of each key. Raises UnfitFeatures where they are of other images or of another size."""
        path, record = shown(features.store.path), features.record
        lacking = self.keys[~np.isin(self.keys, features.keys)]
        if len(lacking):
            raise UnfitFeatures(f"{path} lacks the features of {len(lacking)} of {len(self.keys)} images ({few(lacking)}): encode again")
        if None not in (features.source, self._source) and features.source != self._source:
            raise UnfitFeatures(f"{path} and {shown(self.moments.path)} were encoded from different images or labels: encode again")
        if record.resolution != (self.resolution or record.resolution):
            raise UnfitFeatures(f"{path} holds features of images of {record.resolution} px, and {self.resolution} px are asked for: "
                                "encode again")
        self.resolution = record.resolution
        return features.names[np.searchsorted(features.keys, self.keys)]

    def _require_pairs(self, image_keys: np.ndarray) -> None:
        if len(image_keys) == len(self.keys) and (image_keys == self.keys).all():
            return
        faults = []
        for kind, keys, store, other in (("images", image_keys, self.moments, self.keys), ("moments", self.keys, self.images, image_keys)):
            alone = np.setdiff1d(keys, other)
            if len(alone):
                faults.append(f"{len(alone)} of {len(keys)} {kind} have no partner in {shown(store.path)} ({few(alone)})")
        raise UserError(f"{' and '.join(faults)}: encode again, or remove what has no partner")

    def _join_labels(self, data_dir: Path, moments: Catalogue, images: Catalogue | None) -> np.ndarray:
        labels = moments.labels
        if images is not None:
            other = images.labels
            if labels is not None and other is not None and (labels != other).any():
                i = int((labels != other).argmax())
                raise UserError(f"{self.key(i)} has label {other[i]} in {self.images.where(METADATA)} and {labels[i]} in "
                                f"{self.moments.where(METADATA)}: encode again, or correct one of them")
            labels = other if labels is None else labels
        elif labels is None:                                                      # images that are not read may still have them
            found = next((data_dir / name for name in IMAGES if (data_dir / name).exists()), None)
            labels = None if found is None else read_labels(open_store(found), self.keys)
        if labels is None:
            notice(f"{shown(data_dir)} has no labels: every image counts as class 0")
            labels = np.zeros(len(self.keys), dtype=np.int64)
        return labels

    def _check_vae_record(self, record: object) -> dict | None:
        if record is None:
            return None
        known = record if isinstance(record, dict) else {}
        if not all(type(known.get(name)) is int and known[name] > 0 for name in ("channels", "downsampling")):
            raise UserError(f'{self.moments.where(METADATA)}: expected "vae" to record channels and downsampling: encode again')
        if not all(type(known.get(name, 0)) in (int, float) and abs(known.get(name, 0)) < np.inf for name in ("scale", "shift")):
            raise UserError(f'{self.moments.where(METADATA)}: expected "vae" to record a finite scale and shift: encode again')
        if self.moments_shape[0] != 2 * record["channels"]:
            raise UserError(f"{shown(self.moments.path)} holds moments of shape {self.moments_shape}, expected mean and std of "
                            f"{record['channels']} channels as its {METADATA} says: encode again")
        return record

    def key(self, i: int) -> str:
        """The key of entry i, for messages."""
        return shown(self.keys[i])

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> tuple:
        moments = read_moments(self.moments, self._moments_names[i], self.moments_shape)
        with_images = self.images is not None
        image = read_image(self.images, self._image_names[i], self.resolution) if with_images else np.zeros(0, dtype=np.uint8)
        features = [read_features(one.store, names[i], one.layout) for one, names in zip(self.features, self._features_names, strict=True)]
        features = [{part: torch.from_numpy(array) for part, array in one.items()} for one in features]
        return torch.from_numpy(image), torch.from_numpy(moments), int(self.labels[i]), *features


class GlobalBatchSampler:
    """A batch sampler for DataLoader that can start anywhere: the order of data depends on seed and data set alone.

    The data set's permutations for epochs 0, 1, 2, ... (each from (seed, epoch)) are laid end to end; global batch `d` is positions
    [d*B, (d+1)*B) of that endless sequence. It is cut into `accumulation` micro-batches and each of these into `world_size`
    contiguous pieces; this rank's pieces are yielded one after the other, as lists of B / (accumulation * world_size) indices.

    Args:
        size: number of entries; batch_size: B, over all processes and accumulation
        start: the first global batch, in draws
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, start: int = 0, accumulation: int = 1, rank: int = 0, world_size: int = 1):
        assert size > 0 and start >= 0 and 0 <= rank < world_size
        if batch_size < 1 or batch_size % (accumulation * world_size):
            raise UserError(f"batch size {batch_size} cannot be dealt evenly to {world_size} processes x {accumulation} "
                            f"accumulation steps: give a multiple of {accumulation * world_size}")
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start
        self.accumulation, self.rank, self.world_size = accumulation, rank, world_size

    def __iter__(self) -> Iterator[list[int]]:
        piece = self.batch_size // (self.accumulation * self.world_size)
        epoch, order = -1, None
        position = self.start * self.batch_size
        while True:
            batch = np.empty(self.batch_size, dtype=np.int64)
            filled = 0
            while filled < self.batch_size:
                needed, offset = divmod(position, self.size)
                if needed != epoch:
                    epoch, order = needed, np.random.default_rng([self.seed, needed]).permutation(self.size)
                part = order[offset:offset + self.batch_size - filled]
                batch[filled:filled + len(part)] = part
                filled += len(part)
                position += len(part)
            for micro in batch.reshape(self.accumulation, self.world_size, piece):
                yield micro[self.rank].tolist()


class Reading:
    """What each loader worker of this rank is reading, known also when the system kills it.

    Around the loop (`with Reading(workers) as reading:`) it turns the death of a worker into a UserError that names the file; PyTorch
    may raise it anywhere in the loop.
    """

    def __init__(self, workers: int):
        self.entries: LatentDataset | None = None
        self._table = multiprocessing.RawArray("q", 2 * max(workers, 1))          # process id and index, for each worker

    def note(self, i: int) -> None:
        worker = torch.utils.data.get_worker_info()
        slot = 0 if worker is None else 2 * worker.id
        self._table[slot:slot + 2] = [os.getpid(), i]

    def __enter__(self) -> "Reading":
        return self

    def __exit__(self, _, error: BaseException | None, __) -> None:
        if not isinstance(error, RuntimeError) or "DataLoader worker" not in str(error) or self.entries is None:
            return
        named = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
        died = {int(number) for number in re.findall(r"\d+", named[1])} if named else set()
        begun = {pid: i for pid, i in zip(self._table[::2], self._table[1::2], strict=True) if pid}
        keys = [self.entries.key(i) for pid, i in begun.items() if pid in died or not died & begun.keys()]
        raise UserError(f"a data loader worker was killed while it was reading {' or '.join(dict.fromkeys(keys)) or 'its first file'} in "
                        f"{self.entries.moments.path}: look at that file, or leave more memory to the workers (--num-workers)") from error


class WatchedDataset(torch.utils.data.Dataset):
    """`watched[i]` -> image, moments, label and features of entries[i], and -1; what is being read is noted in `reading`.

    An entry that cannot be read raises UserError. With `skip_bad` = N its next neighbour stands in, the same one in every run, or the
    one after, N at most; the last item is then i instead of -1.
    """

    def __init__(self, entries: LatentDataset, reading: Reading, skip_bad: int = 0):
        self.entries, self.reading, self.skip_bad = entries, reading, skip_bad
        reading.entries = entries

    def __getitem__(self, i: int) -> tuple:
        self.reading.note(i)
        fault = None
        for neighbour in range(i, i + 1 + self.skip_bad):
            try:
                return *self.entries[neighbour % len(self.entries)], -1 if fault is None else i
            except UserError as error:
                fault = fault or error
        raise fault


class BadSamples:
    """The unreadable entries that were met, each said once; more than `most` raise UserError."""

    def __init__(self, entries: LatentDataset, most: int):
        self.entries, self.most, self.found = entries, most, set()

    def note(self, indices: list[int]) -> None:
        for i in sorted(set(indices) - self.found):
            self.found.add(i)
            try:
                self.entries[i]
                fault = f"{self.entries.key(i)} could not be read"
            except UserError as error:
                fault = str(error)
            print(f"passed over, {len(self.found)} of at most {self.most}: {fault}", file=sys.stderr, flush=True)
        self.join([])

    def join(self, indices: list[int]) -> None:
        """Count those that other ranks have met and said, too."""
        self.found |= set(indices)
        if len(self.found) > self.most:
            raise UserError(f"{len(self.found)} entries cannot be read, more than --skip-bad-samples {self.most} "
                            f"({', '.join(self.entries.key(i) for i in sorted(self.found)[:3])}, ...): mend them, or allow more")
