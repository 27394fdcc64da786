"""The prepared data set: image, moments and label, paired by key, from folders or zips; and the order they are drawn in.

DATA_DIR holds `images/` (png) and `vae-sd/` (npy), or zips of them, each with a dataset.json that `preprocessing.dataset_tools` writes.
Shape letters: B batch, C latent channels, H W latent size, R image size.

A million entries must not cost a million Python objects in every loader worker (reading touches their reference counts, which
copies the memory that fork shares), so names and labels are numpy arrays, names as fixed-width bytes.
"""

import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.errors import UserError, notice

IMAGES = ("images", "images.zip", "imagenet_256_vae", "imagenet_256_vae.zip")
MOMENTS = ("vae-sd", "vae-sd.zip")
IMAGE_EXTENSIONS = (b".png", b".jpg", b".jpeg", b".webp", b".bmp", b".tif", b".tiff", b".gif", b".ppm", b".pgm")
MOMENTS_EXTENSIONS = (b".npy",)
METADATA = "dataset.json"
UNFINISHED = ".unfinished.json"  # lies in a folder that is still being written, and holds the settings it is written with


# ---- folder or zip --------------------------------------------------------------------------------------------------------------------

class FolderStore:
    """The files of a folder. `read` raises UserError when a file cannot be read."""

    def __init__(self, path: str | Path):
        self.path = str(path)

    def names(self) -> np.ndarray:
        """Relative paths of all files that are not hidden, sorted, as bytes with `/` (n,); no file is opened. Raises UserError."""
        found, todo = [], [b""]
        while todo:
            prefix = todo.pop()
            try:
                entries = list(os.scandir(os.path.join(os.fsencode(self.path), prefix)))
            except OSError as error:
                raise UserError(f"cannot list {self.where(prefix)}: {error.strerror}") from error
            for entry in entries:
                if not entry.name.startswith(b"."):
                    (todo.append(prefix + entry.name + b"/") if entry.is_dir() else found.append(prefix + entry.name))
        return np.sort(np.array(found, dtype=bytes))

    def where(self, name: bytes | str) -> str:
        """The file's full name, for messages."""
        return os.path.join(self.path, os.fsdecode(name))

    def __contains__(self, name: bytes | str) -> bool:
        return os.path.exists(self.where(name))

    def read(self, name: bytes | str) -> bytes:
        try:
            return Path(self.where(name)).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {self.where(name)}: {error.strerror}") from error


class ZipStore:
    """The files of a zip, stored or deflated, read by offset.

    zipfile keeps an object for every entry and one file position for all readers. Here the central directory becomes arrays and
    every read names its own offset, so that threads and forked or spawned workers share the store. Raises UserError like FolderStore.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._file = None
        try:
            with zipfile.ZipFile(path) as archive:
                entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} is not a readable zip file ({error}): write it again") from error
        for entry in entries:
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
                raise UserError(f"{path} holds {entry.filename} encrypted or with an unusual compression: store it plainly (zip -0)")
        names = np.array([os.fsencode(entry.filename) for entry in entries], dtype=bytes)
        order = np.argsort(names, kind="stable")
        self._names = names[order]
        table = np.array([(e.header_offset, e.compress_size, e.compress_type, e.CRC) for e in entries], dtype=np.int64)
        self._table = table.reshape(-1, 4)[order]                                 # (n, 4)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_file": None}

    def names(self) -> np.ndarray:
        """As FolderStore.names."""
        hidden = [name.startswith((b".", b"__MACOSX/")) or b"/." in name for name in self._names.tolist()]
        return self._names[~np.array(hidden, dtype=bool)]

    def where(self, name: bytes | str) -> str:
        return f"{self.path}:{os.fsdecode(name)}"

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
            raise UserError(f"{self.path} holds no file {os.fsdecode(name)}")
        offset, size, method, crc = self._table[row].tolist()
        try:
            if self._file is None:
                self._file = open(self.path, "rb")  # noqa: SIM115  (kept open for the store's life)
            handle = self._file.fileno()
            # The local header is 30 bytes, then the name and an extra field, whose lengths may differ from the central directory's.
            name_length, extra_length = struct.unpack("<HH", os.pread(handle, 30, offset)[26:])
            data = os.pread(handle, size, offset + 30 + name_length + extra_length)
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompress(data, -zlib.MAX_WBITS)
        except (OSError, struct.error, zlib.error) as error:
            raise UserError(f"cannot read {self.where(name)}: {error}") from error
        if zlib.crc32(data) != crc:
            raise UserError(f"{self.where(name)} is damaged (wrong checksum): write the zip again")
        return data


Store = FolderStore | ZipStore


def open_store(path: str | Path) -> Store:
    """A folder or a zip file as a Store; raises UserError when it is neither, or still being written."""
    if os.path.isdir(path):
        store = FolderStore(path)
        if UNFINISHED in store and METADATA not in store:
            raise UserError(f"{path} is not finished: give the command that writes it again, it continues")
        return store
    if os.path.isfile(path):
        return ZipStore(path)
    raise UserError(f"{path} does not exist: expected a folder or a zip file")


def read_metadata(store: Store) -> dict:
    """What the store's dataset.json says, {} without one; raises UserError when it is not a JSON object."""
    if METADATA not in store:
        return {}
    data = store.read(METADATA)
    try:
        metadata = json.loads(data)
    except ValueError as error:
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
    return ", ".join(os.fsdecode(name) for name in names[:3].tolist()) + (", ..." if len(names) > 3 else "")


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
        raise UserError(f"{store.path}: {few(names[twice[0]:twice[0] + 2])} have the same key {few(keys[twice[:1]])}: remove one of them")
    return keys, names


def read_labels(store: Store, keys: np.ndarray, key: Callable[[bytes], bytes] = key_of) -> np.ndarray | None:
    """The labels (n,) int64 of `keys` from the store's dataset.json, None where it has none; `key` maps its names to keys.

    Raises UserError when a label is no whole number >= 0 or a key has none.
    """
    entries = read_metadata(store).get("labels")
    if entries is None:
        return None
    where = store.where(METADATA)
    try:
        listed = np.array([key(os.fsencode(name)) for name, _ in entries], dtype=bytes)
        values = np.array([label for _, label in entries])
    except (TypeError, ValueError) as error:
        raise UserError(f'{where}: expected "labels" to be [[name, whole number], ...] or null') from error
    if len(values) and (values.ndim != 1 or values.dtype.kind not in "iu" or values.min() < 0):
        raise UserError(f"{where}: expected every label to be a whole number >= 0")
    order = np.argsort(listed, kind="stable")
    listed, values = listed[order], values[order]
    found = np.searchsorted(listed, keys).clip(max=max(len(listed) - 1, 0))
    known = listed[found] == keys if len(listed) else np.zeros(len(keys), dtype=bool)
    if not known.all():
        raise UserError(f"{where} has no label for {(~known).sum()} of {len(keys)} files ({few(keys[~known])}): "
                        'complete it, or set "labels" to null')
    return values[found].astype(np.int64)


# ---- one file -------------------------------------------------------------------------------------------------------------------------

def decode_image(data: bytes, where: str) -> Image.Image:
    """A file's bytes -> the loaded picture, in its own mode and size; raises UserError naming `where` when it cannot be decoded."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError, IndexError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise UserError(f"{where} is not a readable image ({error}): replace or remove it") from error
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
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{store.where(name)} is not a readable npy file ({error}): remove it and encode again") from error
    found = getattr(moments, "shape", None)
    if found is None or moments.dtype.kind != "f" or (found != shape if shape else len(found) != 3 or found[0] % 2 or found[1] != found[2]):
        raise UserError(f"{store.where(name)} has shape {found}, expected {shape or '(2C, H, H)'} floats: remove it and encode again")
    return moments.astype(np.float32)


# ---- the data set ---------------------------------------------------------------------------------------------------------------------

def _find(data_dir: Path, candidates: tuple[str, ...], what: str) -> Store:
    for name in candidates:
        if (data_dir / name).exists():
            return open_store(data_dir / name)
    raise UserError(f"{data_dir} holds no {what}: looked for {', '.join(candidates)}; "
                    "prepare it with `python -m preprocessing.dataset_tools`")


def _find_resolution(given: int | None, image: int | None, latent: int, record: dict | None) -> int | None:
    """The image size that `given`, the images and the moments agree on, None when nothing says it; raises UserError when they differ."""
    if given and image and given != image:
        raise UserError(f"resolution {given} was asked for and the images are {image} px: give --resolution {image}, or convert again")
    resolution = given or image
    if record:
        fitting = latent * record["downsampling"]
        if resolution and resolution != fitting:
            raise UserError(f"resolution {resolution} does not fit the moments: {latent}x{latent} latents of {record.get('vae')} "
                            f"belong to {fitting} px; give the resolution they were encoded at, or encode again")
        return fitting
    if resolution and resolution % latent:
        raise UserError(f"resolution {resolution} does not fit the moments of {latent}x{latent}: encode the images again")
    return resolution


class LatentDataset(torch.utils.data.Dataset):
    """`dataset[i]` -> image uint8 (3, R, R), moments float32 (2C, H, W), label int; ordered by key.

    Args:
        data_dir: holds the images and the moments, each a folder or a zip
        resolution: R in pixels; None takes what the data says
        num_classes: None takes the greatest label + 1
        with_images: False neither needs nor reads images; the image is then an empty tensor (0,)

    Attributes: `keys` (n,) bytes, `labels` (n,) int64, `num_classes`, `moments_shape` (2C, H, W), `vae_record` (what
    `LatentSpace.to_record` wrote, None in data sets of others), `resolution` (None when neither images nor record say it),
    `fingerprint` (sha256 of keys and labels, hex).

    Raises UserError before any long work when images, moments, labels, `resolution` and `num_classes` do not fit together (only the
    first pair is opened), and from `dataset[i]` when a file is damaged.
    """

    def __init__(self, data_dir: str | Path, resolution: int | None = None, num_classes: int | None = None, with_images: bool = True):
        data_dir = Path(data_dir)
        if not data_dir.is_dir():
            raise UserError(f"the data folder {data_dir} does not exist: expected a folder with images/ and vae-sd/")
        self.moments = _find(data_dir, MOMENTS, "moments")
        self.images = _find(data_dir, IMAGES, "images") if with_images else None
        self.keys, self._moments_names = list_keyed(self.moments, MOMENTS_EXTENSIONS)
        if self.images is not None:
            image_keys, self._image_names = list_keyed(self.images, IMAGE_EXTENSIONS)
            self._require_pairs(image_keys)
        if not len(self.keys):
            raise UserError(f"{self.moments.path} holds no .npy file: encode the images with `preprocessing.dataset_tools encode`")

        self.labels = self._read_labels(data_dir)
        top = int(self.labels.argmax())
        self.num_classes = int(self.labels[top]) + 1 if num_classes is None else num_classes
        if self.labels[top] >= self.num_classes:
            raise UserError(f"{self.key(top)} has label {self.labels[top]}, expected labels below num_classes {num_classes}: "
                            f"give at least {self.labels[top] + 1}")
        self.fingerprint = hashlib.sha256(self.keys.tobytes() + self.labels.astype("<i8").tobytes()).hexdigest()

        self.moments_shape = read_moments(self.moments, self._moments_names[0]).shape
        self.vae_record = self._read_vae_record()
        image_size = read_image(self.images, self._image_names[0]).shape[-1] if self.images is not None else None
        self.resolution = _find_resolution(resolution, image_size, self.moments_shape[1], self.vae_record)

    def _require_pairs(self, image_keys: np.ndarray) -> None:
        if len(image_keys) == len(self.keys) and (image_keys == self.keys).all():
            return
        faults = []
        for kind, keys, store, other in (("images", image_keys, self.moments, self.keys), ("moments", self.keys, self.images, image_keys)):
            alone = np.setdiff1d(keys, other)
            if len(alone):
                faults.append(f"{len(alone)} of {len(keys)} {kind} have no partner in {store.path} ({few(alone)})")
        raise UserError(f"{' and '.join(faults)}: encode again, or remove what has no partner")

    def _read_labels(self, data_dir: Path) -> np.ndarray:
        labels = read_labels(self.moments, self.keys)
        if self.images is not None or labels is None:
            images = self.images or next((open_store(data_dir / name) for name in IMAGES if (data_dir / name).exists()), None)
            other = read_labels(images, self.keys) if images is not None else None
            if labels is not None and other is not None and (labels != other).any():
                i = int((labels != other).argmax())
                raise UserError(f"{self.key(i)} has label {other[i]} in {images.where(METADATA)} and {labels[i]} in "
                                f"{self.moments.where(METADATA)}: encode again, or correct one of them")
            labels = other if labels is None else labels
        if labels is None:
            notice(f"{data_dir} has no labels: every image counts as class 0")
            labels = np.zeros(len(self.keys), dtype=np.int64)
        return labels

    def _read_vae_record(self) -> dict | None:
        record = read_metadata(self.moments).get("vae")
        if record is None:
            return None
        if not isinstance(record, dict) or not {"channels", "downsampling"} <= record.keys():
            raise UserError(f'{self.moments.where(METADATA)}: expected "vae" to record channels and downsampling: encode again')
        if self.moments_shape[0] != 2 * record["channels"]:
            raise UserError(f"{self.moments.path} holds moments of shape {self.moments_shape}, expected mean and std of "
                            f"{record['channels']} channels as its {METADATA} says: encode again")
        return record

    def key(self, i: int) -> str:
        return os.fsdecode(self.keys[i])

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        moments = read_moments(self.moments, self._moments_names[i], self.moments_shape)
        with_images = self.images is not None
        image = read_image(self.images, self._image_names[i], self.resolution) if with_images else np.zeros(0, dtype=np.uint8)
        return torch.from_numpy(image), torch.from_numpy(moments), int(self.labels[i])


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
