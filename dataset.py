"""The prepared data set (image, moments, label or captions, paired by key) and the order in which batches are drawn.

DATA_DIR holds `images/` (png) and `vae-sd/` (npy), or zips of them, each with a dataset.json that
`preprocessing.dataset_tools` writes, and perhaps `features-*/` (npy), stored encoder outputs.
Shape letters: B batch, C latent channels, H W latent size, R image size.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from models.cached_features import Features, source_of
from runtime.catalogue import Captions, Catalogue, read_captions, read_labels
from runtime.messages import UserError, notice
from runtime.stores import IMAGE_EXTENSIONS, METADATA, Store, decode_image, few, open_store, read_npy, shown

IMAGES = ("images", "images.zip", "imagenet_256_vae", "imagenet_256_vae.zip")
MOMENTS = ("vae-sd", "vae-sd.zip")
MOMENTS_EXTENSIONS = (b".npy",)


def read_image(store: Store, name: bytes, resolution: int | None = None) -> np.ndarray:
    """A prepared image, uint8 (3, R, R). Raises UserError if it is unreadable, not RGB, or not square."""
    image = decode_image(store.read(name), store.where(name))
    expected = resolution or image.width
    if image.mode != "RGB" or image.size != (expected, expected):
        raise UserError(f"{store.where(name)}: {image.mode} of {image.width}x{image.height} px, expected RGB of "
                        f"{expected}x{expected}; prepare it with `preprocessing.dataset_tools convert`")
    return np.ascontiguousarray(np.array(image).transpose(2, 0, 1))               # (3, R, R)


def read_moments(store: Store, name: bytes, shape: tuple[int, int, int] | None = None) -> np.ndarray:
    """Moments, float32 (2C, H, W). Raises UserError if they are unreadable, have no such shape, or not `shape`."""
    moments = read_npy(store, name)
    found = getattr(moments, "shape", None)
    square = found is not None and len(found) == 3 and min(found) > 0 and found[0] % 2 == 0 and found[1] == found[2]
    if not square or found != (shape or found) or moments.dtype.kind != "f":
        raise UserError(f"{store.where(name)}: shape {found}, expected floats of {shape or '(2C, H, H)'}; remove it "
                        "and encode again")
    return moments.astype(np.float32)


def classes_with_images(labels: np.ndarray, num_classes: int, where: str) -> np.ndarray:
    """The classes (k,) int64, sorted, among labels (n,). A notice names those of `num_classes` that have no image."""
    seen = np.unique(labels)
    if len(seen) < num_classes:
        empty = np.setdiff1d(np.arange(min(num_classes, len(seen) + 4)), seen)[:4].astype(bytes)
        notice(f"{where}: {num_classes - len(seen)} of {num_classes} classes have no image ({few(empty)}) and are not "
               "learned")
    return seen


class LatentDataset(torch.utils.data.Dataset):
    """`dataset[i]` -> image uint8 (3, R, R), moments float32 (2C, H, W), label int or captions str, encoders' features.

    Entries are in the order of their keys.

    Args:
        data_dir: contains the images and the moments, each a folder or a zip
        resolution: R in pixels; None: that of the data
        num_classes: None: the largest label + 1
        with_images: False neither needs nor reads images; the image is then an empty tensor (0,)
        features: stored features, each yielded after the label as a dict of tensors (see `FeaturesRecord.layout`)
        only: keys (n,) to which images and moments are limited; the others need no partner
        captions: yield, instead of the label, the image's captions as one str, joined by newlines

    Attributes: `keys` (n,) bytes; `labels` (n,) int64; `num_classes`; `classes_seen` (k,) int64, those with images,
    sorted; `moments_shape` (2C, H, W); `vae_record`, the content of "vae" in the moments' dataset.json or None;
    `resolution`, None if neither arguments nor data tell it; `captions`, indexed as the entries, or None;
    `fingerprint`, sha256 in hex of the keys and of the labels or captions.

    Raises UserError if images, moments, labels or captions, features and arguments do not fit together, for which it
    opens only the first pair; `dataset[i]` raises it for a damaged file. `models.vae.read_space` checks "vae".
    """

    def __init__(self, data_dir: str | Path, resolution: int | None = None, num_classes: int | None = None,
                 with_images: bool = True, features: Sequence[Features] = (), only: np.ndarray | None = None,
                 captions: bool = False):
        data_dir = Path(data_dir)
        self.moments = find_store(data_dir, MOMENTS, "moments")
        self.images = find_store(data_dir, IMAGES, "images") if with_images else None
        moments = Catalogue(self.moments, MOMENTS_EXTENSIONS)
        images = Catalogue(self.images, IMAGE_EXTENSIONS) if with_images else None
        for catalogue in filter(None, (moments, images) if only is not None else ()):
            catalogue.keep(only)
        self.keys, self._moments_names = moments.keys, moments.names
        if images is not None:
            self._image_names = images.names
            self._require_pairs(images.keys)
        if not len(self.keys):
            raise UserError(f"{shown(self.moments.path)}: holds no .npy file; encode the images with "
                            "`preprocessing.dataset_tools encode`")
        self.captions = self._find_captions(data_dir, moments, images) if captions else None
        self.labels = self._join_labels(data_dir, moments, images)
        self.num_classes = self._count_classes(num_classes)
        self.classes_seen = (np.unique(self.labels) if captions else
                             classes_with_images(self.labels, self.num_classes, shown(data_dir)))
        conditions = (self.captions.ends, self.captions.text) if captions else (self.labels.astype("<i8"),)
        self.fingerprint = hashlib.sha256(b"".join(one.tobytes() for one in (self.keys, *conditions))).hexdigest()

        self.moments_shape = read_moments(self.moments, self._moments_names[0]).shape
        self.vae_record = moments.metadata.get("vae")
        if not isinstance(self.vae_record, dict | None):
            raise UserError(f'{self.moments.where(METADATA)}: expected "vae" to be an object; encode again')
        side = None if images is None else read_image(self.images, self._image_names[0]).shape[-1]
        if resolution and side and resolution != side:
            raise UserError(f"--resolution {resolution}: the images have {side} px; convert again, or leave it out")
        self.resolution = resolution or side
        self.features = list(features)
        self._features_names = [self._match(one, source_of(moments.metadata)) for one in self.features]

    def _require_pairs(self, image_keys: np.ndarray) -> None:
        if len(image_keys) == len(self.keys) and (image_keys == self.keys).all():
            return
        faults = []
        for kind, keys, store, other in (("images", image_keys, self.moments, self.keys),
                                         ("moments", self.keys, self.images, image_keys)):
            alone = np.setdiff1d(keys, other)
            if len(alone):
                faults.append(f"{len(alone)} of {len(keys)} {kind} have no partner in {shown(store.path)} "
                              f"({few(alone)})")
        raise UserError(f"{' and '.join(faults)}; encode again, or remove what has no partner")

    def _find_captions(self, data_dir: Path, moments: Catalogue, images: Catalogue | None) -> Captions:
        found = [one.captions for one in (moments, images) if one is not None and one.captions is not None]
        if not found and images is None and (store := first_store(data_dir, IMAGES)):     # not read, but they may tell
            found = [read_captions(store, self.keys)]
        if not found or found[0] is None:
            raise UserError(f"{shown(data_dir)}: no captions; add them with `preprocessing.dataset_tools captions`")
        if not found[0].equal(found[-1]):
            raise UserError(f"{self.images.where(METADATA)}: other captions than {self.moments.where(METADATA)}; add "
                            "them again with `preprocessing.dataset_tools captions`")
        return found[0]

    def _join_labels(self, data_dir: Path, moments: Catalogue, images: Catalogue | None) -> np.ndarray:
        labels = moments.labels
        if images is not None:
            other = images.labels
            if labels is not None and other is not None and (labels != other).any():
                i = int((labels != other).argmax())
                raise UserError(f"{self.key(i)}: label {other[i]} in {self.images.where(METADATA)} and {labels[i]} in "
                                f"{self.moments.where(METADATA)}; encode again, or correct one of them")
            labels = other if labels is None else labels
        elif labels is None and (store := first_store(data_dir, IMAGES)):
            labels = read_labels(store, self.keys)
        if labels is None and self.captions is None:
            notice(f"{shown(data_dir)}: no labels, every image has class 0")
        return np.zeros(len(self.keys), dtype=np.int64) if labels is None else labels

    def _count_classes(self, given: int | None) -> int:
        top = int(self.labels.argmax())
        if given is None:
            return int(self.labels[top]) + 1
        if self.labels[top] >= given:
            raise UserError(f"--num-classes {given}: {self.key(top)} has label {self.labels[top]}; give at least "
                            f"{self.labels[top] + 1}")
        return given

    def _match(self, features: Features, source: object) -> np.ndarray:
        """The names (n,) of each key's features. Raises UserError if they are of other images or another size."""
        path, side = shown(features.store.path), features.record.resolution
        same = np.array_equal(self.keys, features.keys)           # the usual case, and 100 times faster
        lacking = [] if same else self.keys[~np.isin(self.keys, features.keys)]
        if len(lacking):
            raise UserError(f"{path}: no features of {len(lacking)} of {len(self.keys)} images ({few(lacking)}); "
                            "encode again")
        if None not in (features.source, source) and features.source != source:
            raise UserError(f"{path}: made from other images or labels than {shown(self.moments.path)}; encode again")
        if side != (self.resolution or side):
            raise UserError(f"{path}: features of {side} px images, expected {self.resolution} px; encode again")
        self.resolution = side
        return features.names if same else features.names[np.searchsorted(features.keys, self.keys)]

    def key(self, i: int) -> str:
        """The key of entry i, for messages."""
        return shown(self.keys[i])

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, i: int) -> tuple:
        moments = torch.from_numpy(read_moments(self.moments, self._moments_names[i], self.moments_shape))
        image = torch.zeros(0, dtype=torch.uint8)
        if self.images is not None:
            image = torch.from_numpy(read_image(self.images, self._image_names[i], self.resolution))
        features = [one.read(names[i]) for one, names in zip(self.features, self._features_names, strict=True)]
        return image, moments, int(self.labels[i]) if self.captions is None else self.captions[i], *features


def first_store(data_dir: Path, candidates: tuple[str, ...]) -> Store | None:
    """The first of the candidates that exists."""
    path = next((data_dir / name for name in candidates if (data_dir / name).exists()), None)
    return path and open_store(path)


def find_store(data_dir: Path, candidates: tuple[str, ...], what: str) -> Store:
    """The first of the candidates that exists. Raises UserError if none does."""
    if found := first_store(data_dir, candidates):
        return found
    if data_dir.resolve().name in IMAGES + MOMENTS:
        raise UserError(f"{shown(data_dir)}: holds no {what}; give the folder above it, "
                        f"{shown(data_dir.resolve().parent)}")
    if not data_dir.is_dir():
        raise UserError(f"{shown(data_dir)}: no such data folder; expected one with images/ and vae-sd/")
    raise UserError(f"{shown(data_dir)}: holds no {what} ({', '.join(candidates)}); prepare it with "
                    "`python -m preprocessing.dataset_tools`")


def find_captions(data_dir: str | Path) -> Captions:
    """The captions of a prepared data set, in the order of its keys; moments or images alone are enough.

    Raises UserError if it has none.
    """
    for candidates, extensions in ((MOMENTS, MOMENTS_EXTENSIONS), (IMAGES, IMAGE_EXTENSIONS)):
        store = first_store(Path(data_dir), candidates)
        if store and (found := Catalogue(store, extensions).captions):
            return found
    raise UserError(f"{shown(data_dir)}: no captions; give a data set with captions, or add them with "
                    "`preprocessing.dataset_tools captions`")


class GlobalBatchSampler:
    """A batch sampler for DataLoader that can start anywhere: the order depends on seed and data set alone.

    The data set's permutations of epochs 0, 1, 2, ... (each from (seed, epoch)) are laid end to end; global batch `d`
    is positions [d*B, (d+1)*B) of that endless sequence. It is cut into `accumulation` micro-batches, each of these
    into `world_size` contiguous pieces; this rank's pieces are yielded in turn, as lists of B / (accumulation *
    world_size) indices.

    Args:
        size: number of entries
        batch_size: B, over all processes and micro-batches
        start: the first global batch
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, start: int = 0, accumulation: int = 1, rank: int = 0,
                 world_size: int = 1):
        assert size > 0 and batch_size > 0 and start >= 0 and 0 <= rank < world_size
        if batch_size % (accumulation * world_size):
            raise UserError(f"--batch-size {batch_size}: cannot be split evenly among {world_size} processes x "
                            f"{accumulation} micro-batches; give a multiple of {accumulation * world_size}")
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
