"""`convert`: pictures of any size and mode -> square RGB images, numbered in sorted order, with their labels."""

import os
import struct
import zlib

import numpy as np
import torch
from tqdm import tqdm

from preprocessing.crop import MAX_PIXELS, center_crop, to_rgb
from preprocessing.work import Destination, digest, load
from runtime.catalogue import read_labels
from runtime.messages import UserError
from runtime.stores import IMAGE_EXTENSIONS, Store, decode_image, few, list_names, open_store, read_metadata, shown

TRANSFORMS = ("center-crop-dhariwal", "none")
CHUNK = 16  # pictures a worker converts at a time


def parse_resolution(text: str) -> int:
    """`256x256` or `256` -> 256; raises UserError."""
    width, cross, height = text.lower().partition("x")
    side = int(width) if width.isascii() and width.isdigit() and len(width) < 10 else 0
    if not 0 < side * side <= MAX_PIXELS or (cross and height != width):
        raise UserError(f"--resolution {shown(text)} is not understood: expected a square like 256x256")
    return side


def source_labels(store: Store, names: np.ndarray) -> tuple[np.ndarray | None, str]:
    """Labels (n,) int64 of the pictures, or None, and where they come from.

    They are those of the source's dataset.json; without one, the rank of a picture's top-level folder among the sorted ones.
    Raises UserError when some pictures have a label and others none.
    """
    if "labels" in read_metadata(store):
        return read_labels(store, names, key=lambda name: name), "its dataset.json"
    folders = np.array([name.rpartition(b"/")[0].partition(b"/")[0] for name in names.tolist()], dtype=bytes)
    loose = folders == b""
    if loose.all():
        return None, "nowhere: a flat folder has none"
    if loose.any():
        raise UserError(f"{shown(store.path)} holds {loose.sum()} pictures beside its class folders ({few(names[loose])}): "
                        "move them into folders, or list all labels in dataset.json")
    classes, labels = np.unique(folders, return_inverse=True)
    return labels.astype(np.int64), f"{len(classes)} sorted folders ({few(classes)})"


def image_name(i: int) -> str:
    """The name of picture i, REPA's: a thousand to a folder."""
    return f"{i // 1000:05d}/img{i:08d}.png"


def to_png(image: np.ndarray) -> bytes:
    """An RGB picture uint8 (H, W, 3) as a PNG that is neither compressed nor filtered.

    Training reads it several times as fast as one of Pillow's, whose lowest level still predicts every row from the one above, and it is
    written as much faster. It takes H * W * 3 bytes, a third to a half more than a compressed photograph.
    """
    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)                      # each begins with its filter: 0, none
    rows[:, 1:] = image.reshape(height, 3 * width)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)                # 8 bits, RGB, deflate, the five filters, not interlaced
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)


class _Conversion(torch.utils.data.Dataset):
    """Item k converts and writes the k-th chunk of pictures and tells how many they are."""

    def __init__(self, store: Store, names: np.ndarray, indices: np.ndarray, destination: Destination, resolution: int, transform: str):
        self.store, self.names, self.indices, self.destination = store, names, indices, destination
        self.resolution, self.transform = resolution, transform

    def __len__(self) -> int:
        return -(-len(self.indices) // CHUNK)

    def __getitem__(self, k: int) -> int:
        chunk = self.indices[k * CHUNK:(k + 1) * CHUNK].tolist()
        for i in chunk:
            self.destination.write(image_name(i), self._convert(self.names[i]))
        return len(chunk)

    def _convert(self, name: bytes) -> bytes:
        where = self.store.where(name)
        image = to_rgb(decode_image(self.store.read(name), where), where)
        if self.transform != "none":
            image = center_crop(image, self.resolution, where)
        if image.size != (self.resolution, self.resolution):
            raise UserError(f"{where} is {image.width}x{image.height} px, expected {self.resolution}x{self.resolution}: "
                            "use --transform=center-crop-dhariwal")
        return to_png(np.asarray(image))


def convert(source: str, dest: str, resolution: str, transform: str, workers: int, max_images: int | None = None) -> None:
    """Write the pictures of `source` (folder or zip) to `dest` (folder or .zip) as `00000/img00000000.png`, ... and dataset.json.

    Raises UserError when source or settings are wrong, when `dest` holds something else, or naming a picture that cannot be read.
    """
    side = parse_resolution(resolution)
    store = open_store(source)
    names = list_names(store, IMAGE_EXTENSIONS)
    if not len(names):
        raise UserError(f"the source {shown(source)} holds no pictures: expected {', '.join(map(os.fsdecode, IMAGE_EXTENSIONS))}")
    if max_images is not None and max_images < 1:
        raise UserError(f"--max-images {max_images}: expected at least 1")
    labels, origin = source_labels(store, names)
    names = names[:max_images]
    settings = {"command": "convert", "source": os.path.realpath(source), "source_contents": digest(store, names), "images": len(names),
                "transform": transform, "resolution": side}
    destination = Destination(dest, settings, source)
    outputs = np.array([image_name(i).encode() for i in range(len(names))], dtype=bytes)
    if destination.is_finished(outputs):
        print(f"{shown(dest)} is finished already ({len(names)} images): nothing to do")
        return
    destination.begin()

    missing = np.flatnonzero(destination.is_missing(outputs))
    work = _Conversion(store, names, missing, destination, side, transform)
    with tqdm(total=len(names), initial=len(names) - len(missing), desc="convert", unit="image") as bar:
        for count in load(work, workers, in_order=False):
            bar.update(count)

    listed = None if labels is None else [[os.fsdecode(name), int(label)] for name, label in zip(outputs, labels[:max_images], strict=True)]
    destination.finish(outputs, {"labels": listed, "transform": {"name": transform, "resolution": side}})
    print(f"{shown(dest)}: {len(names)} images of {side}x{side}, labels from {origin}")
