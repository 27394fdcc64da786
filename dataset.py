"""The prepared data set: image, moments and label, paired by key, from folders or zips; and the order they are drawn in.

DATA_DIR holds `images/` (png) and `vae-sd/` (npy), or zips of them, each with a dataset.json that `preprocessing.dataset_tools` writes,
and perhaps `features-*/` (npy), what encoders said of the images.
Shape letters: B batch, C latent channels, H W latent size, R image size.
"""

import hashlib
import io
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from models.cached_features import FOLDER, FeaturesRecord, UnfitFeatures, features_folder
from runtime.catalogue import MAX_CLASSES, Catalogue, read_labels, uncollected
from runtime.files import UNREADABLE
from runtime.messages import UserError, notice
from runtime.stores import IMAGE_EXTENSIONS, METADATA, Store, decode_image, few, open_store, shown

IMAGES = ("images", "images.zip", "imagenet_256_vae", "imagenet_256_vae.zip")
MOMENTS = ("vae-sd", "vae-sd.zip")
MOMENTS_EXTENSIONS = (b".npy",)


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
    Names and labels of a large data set are kept in an index (runtime.index says where, and which changes it notices).
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
