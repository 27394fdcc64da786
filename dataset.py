"""The prepared data set: image, moments and label, paired by key, from folders or zips; and the order they are drawn
in.

DATA_DIR holds `images/` (png) and `vae-sd/` (npy), or zips of them, each with the dataset.json that
`preprocessing.dataset_tools` writes, and possibly `features-*/` (npy), stored encoder outputs.
Shape letters: B batch, C latent channels, H W latent size, R image size.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from models.cached_features import Features, read_features, source_of
from runtime.catalogue import MAX_CLASSES, Catalogue, read_labels
from runtime.files import UNREADABLE
from runtime.messages import UserError, notice
from runtime.stores import IMAGE_EXTENSIONS, METADATA, Store, decode_image, few, open_store, shown

IMAGES = ("images", "images.zip", "imagenet_256_vae", "imagenet_256_vae.zip")
MOMENTS = ("vae-sd", "vae-sd.zip")
MOMENTS_EXTENSIONS = (b".npy",)


class LatentDataset(torch.utils.data.Dataset):
    """`dataset[i]` -> image uint8 (3, R, R), moments float32 (2C, H, W), label int, each encoder's features; by key.

    Args:
        data_dir: holds the images and the moments, each a folder or a zip
        resolution: R in pixels; None takes the images' or the features'
        num_classes: None takes the greatest label + 1
        with_images: False neither needs nor reads images; the image is then an empty tensor (0,)
        features: stored encoder outputs; each adds a dict of tensors, named by `FeaturesRecord.layout`, after the label

    Attributes: `keys` (n,) bytes, `labels` (n,) int64, `num_classes`, `moments_shape` (2C, H, W), `vae_record` (written
    by `encode`; None in data of others), `resolution` (None if neither images nor features say it), `features`,
    `fingerprint` (sha256 of keys and labels, hex).

    Raises UserError if images, moments, labels, features, `resolution` and `num_classes` do not fit together (only the
    first pair is opened), and from `dataset[i]` if a file is damaged.
    """

    def __init__(self, data_dir: str | Path, resolution: int | None = None, num_classes: int | None = None,
                 with_images: bool = True, features: Sequence[Features] = ()):
        data_dir = Path(data_dir)
        if not data_dir.is_dir():
            raise UserError(f"{shown(data_dir)}: no such data folder; expected a folder with images/ and vae-sd/")
        self.moments = _find(data_dir, MOMENTS, "moments")
        self.images = _find(data_dir, IMAGES, "images") if with_images else None
        moments = Catalogue(self.moments, MOMENTS_EXTENSIONS)
        images = Catalogue(self.images, IMAGE_EXTENSIONS) if with_images else None
        self.keys, self._moments_names = moments.keys, moments.names
        if images is not None:
            self._image_names = images.names
            self._require_pairs(images.keys)
        if not len(self.keys):
            raise UserError(f"{shown(self.moments.path)}: holds no .npy file; run `preprocessing.dataset_tools encode`")
        self.labels = self._join_labels(data_dir, moments, images)
        self.num_classes = self._count_classes(num_classes)
        self.fingerprint = hashlib.sha256(self.keys.tobytes() + self.labels.astype("<i8").tobytes()).hexdigest()
        self.moments_shape = read_moments(self.moments, self._moments_names[0]).shape
        self.vae_record = moments.metadata.get("vae")
        self.resolution = self._find_resolution(resolution)
        self.features = list(features)
        self._features_names = [self._match(one, moments.metadata) for one in self.features]

    def _require_pairs(self, image_keys: np.ndarray) -> None:
        if len(image_keys) == len(self.keys) and (image_keys == self.keys).all():
            return
        faults = []
        for kind, keys, store, other in (("images", image_keys, self.moments, self.keys),
                                         ("moments", self.keys, self.images, image_keys)):
            alone = np.setdiff1d(keys, other)
            if len(alone):
                faults.append(f"{len(alone)} of {len(keys)} {kind} have no partner in "
                              f"{shown(store.path)} ({few(alone)})")
        raise UserError(f"{' and '.join(faults)}: encode again, or remove what has no partner")

    def _join_labels(self, data_dir: Path, moments: Catalogue, images: Catalogue | None) -> np.ndarray:
        labels = moments.labels
        if images is not None:
            if labels is not None and images.labels is not None and (labels != images.labels).any():
                i = int((labels != images.labels).argmax())
                raise UserError(f"{self.key(i)} has label {images.labels[i]} in {self.images.where(METADATA)} and "
                                f"{labels[i]} in {self.moments.where(METADATA)}: encode again, or correct one of them")
            labels = images.labels if labels is None else labels
        elif labels is None:                                      # images that are not read may still have labels
            found = next((data_dir / name for name in IMAGES if (data_dir / name).exists()), None)
            labels = None if found is None else read_labels(open_store(found), self.keys)
        if labels is None:
            notice(f"{shown(data_dir)}: no labels; every image counts as class 0")
            labels = np.zeros(len(self.keys), dtype=np.int64)
        return labels

    def _count_classes(self, num_classes: int | None) -> int:
        top = int(self.labels.argmax())
        count = int(self.labels[top]) + 1 if num_classes is None else num_classes
        if count > MAX_CLASSES:
            raise UserError(f"--num-classes {count}: every class has an embedding; give at most {MAX_CLASSES}")
        if self.labels[top] >= count:
            raise UserError(f"--num-classes {count}: {self.key(top)} has label {self.labels[top]}; give at "
                            f"least {self.labels[top] + 1}")
        return count

    def _find_resolution(self, given: int | None) -> int | None:
        side = read_image(self.images, self._image_names[0]).shape[-1] if self.images is not None else None
        if given and side and given != side:
            raise UserError(f"--resolution {given}: the images have {side} px; give "
                            f"--resolution {side}, or convert again")
        return given or side

    def _match(self, features: Features, metadata: dict) -> np.ndarray:
        """The names (n,) of each key's features. Raises UserError if they are of other images or of another size."""
        path, record, source = shown(features.store.path), features.record, source_of(metadata)
        lacking = self.keys[~np.isin(self.keys, features.keys)]
        if len(lacking):
            raise UserError(f"{path}: lacks the features of {len(lacking)} of {len(self.keys)} images "
                            f"({few(lacking)}); encode again")
        if None not in (features.source, source) and features.source != source:
            raise UserError(f"{path}: encoded from other images or labels than "
                            f"{shown(self.moments.path)}; encode again")
        if record.resolution != (self.resolution or record.resolution):
            raise UserError(f"{path}: features of images of {record.resolution} px, not of "
                            f"{self.resolution}; encode again")
        self.resolution = record.resolution
        return features.names[np.searchsorted(features.keys, self.keys)]

    def key(self, i: int) -> str:
        """The key of entry i, for messages."""
        return shown(self.keys[i])

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> tuple:
        image = np.zeros(0, dtype=np.uint8)
        if self.images is not None:
            image = read_image(self.images, self._image_names[i], self.resolution)
        moments = read_moments(self.moments, self._moments_names[i], self.moments_shape)
        features = [read_features(one.store, names[i], one.layout)
                    for one, names in zip(self.features, self._features_names, strict=True)]
        return torch.from_numpy(image), torch.from_numpy(moments), int(self.labels[i]), *features


def _find(data_dir: Path, candidates: tuple[str, ...], what: str) -> Store:
    for name in candidates:
        if (data_dir / name).exists():
            return open_store(data_dir / name)
    raise UserError(f"{shown(data_dir)}: holds no {what} ({', '.join(candidates)}); prepare it with `python -m "
                    "preprocessing.dataset_tools`")


# ------------------------------------------------------------------------------------------------------------- one file

def read_image(store: Store, name: bytes, resolution: int | None = None) -> np.ndarray:
    """A prepared image: uint8 (3, R, R).

    Raises UserError if it is unreadable, not RGB, not square or not `resolution`.
    """
    image = decode_image(store.read(name), store.where(name))
    expected = resolution or image.width
    if image.mode != "RGB" or image.size != (expected, expected):
        raise UserError(f"{store.where(name)}: {image.mode} of {image.width}x{image.height} px, expected RGB of "
                        f"{expected}x{expected}; prepare it with `preprocessing.dataset_tools convert`")
    return np.ascontiguousarray(np.array(image).transpose(2, 0, 1))                       # (3, R, R)


def read_moments(store: Store, name: bytes, shape: tuple[int, int, int] | None = None) -> np.ndarray:
    """Moments: float32 (2C, H, W). Raises UserError if they are unreadable, of no such shape, or not of `shape`."""
    data = store.read(name)
    try:
        moments = np.load(io.BytesIO(data), allow_pickle=False)
    except UNREADABLE as error:
        raise UserError(f"{store.where(name)}: not a readable npy file ({shown(str(error))}); "
                        "remove it and encode again") from error
    found = getattr(moments, "shape", None)
    fits = found is not None and moments.dtype.kind == "f" and (found == shape if shape else _is_moments(found))
    if not fits:
        raise UserError(f"{store.where(name)}: shape {found}, expected {shape or '(2C, H, H)'} floats; "
                        "remove it and encode again")
    return moments.astype(np.float32)


def _is_moments(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and min(shape) > 0 and shape[0] % 2 == 0 and shape[1] == shape[2]


class GlobalBatchSampler:
    """A batch sampler for DataLoader that can start anywhere; the order depends on seed and data set size alone.

    The data set's permutations for epochs 0, 1, 2, ... (each from (seed, epoch)) are laid end to end; global batch `d`
    is positions [d*B, (d+1)*B) of that endless sequence. It is cut into `accumulation` micro-batches and each of these
    into `world_size` contiguous pieces; this rank's pieces are yielded one after the other, as lists of B /
    (accumulation * world_size) indices.

    Args:
        size: number of entries; batch_size: B, over all processes and accumulation
        start: the first global batch, from 0
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, start: int = 0, accumulation: int = 1, rank: int = 0,
                 world_size: int = 1):
        assert size > 0 and start >= 0 and 0 <= rank < world_size
        if batch_size < 1 or batch_size % (accumulation * world_size):
            raise UserError(f"batch size {batch_size} cannot be dealt evenly to {world_size} processes x "
                            f"{accumulation} accumulation steps: give a multiple of {accumulation * world_size}")
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
