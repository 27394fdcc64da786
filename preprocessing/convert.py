"""`convert`: pictures of any size and mode to square RGB images, numbered in sorted order, with their labels."""

import argparse
import os
import struct
import zlib
from functools import partial

import numpy as np
from tqdm import tqdm

from preprocessing.crop import TRANSFORMS, to_rgb, to_square
from preprocessing.destination import Destination, digest, in_workers, listed
from runtime import stores
from runtime.catalogue import read_labels
from runtime.launch import blocks
from runtime.messages import UserError, say
from runtime.stores import IMAGE_EXTENSIONS, MAX_PIXELS, Store, few, list_names, open_store, shown

CHUNK = 16  # pictures that a worker converts at a time


def parse_resolution(text: str) -> int:
    """A type for square sizes: `256x256` or `256` -> 256."""
    width, cross, height = text.lower().partition("x")
    side = int(width) if width.isascii() and width.isdigit() and len(width) < 10 else 0
    if not 0 < side * side <= MAX_PIXELS or (cross and height != width):
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected a square like 256x256")
    return side


def source_labels(store: Store, names: np.ndarray) -> tuple[np.ndarray | None, str]:
    """Labels (n,) int64 of the pictures or None, and their origin in words.

    They are read from the source's dataset.json; without one, a label is the rank of the picture's top-level folder in
    sorted order. Raises UserError if only some pictures have a label.
    """
    if "labels" in stores.read_metadata(store):
        return read_labels(store, names, key=lambda name: name), "from its dataset.json"
    folders = np.array([name.rpartition(b"/")[0].partition(b"/")[0] for name in names.tolist()], dtype=bytes)
    loose = folders == b""
    if loose.all():
        return None, "none in a flat folder"
    if loose.any():
        raise UserError(f"{shown(store.path)}: {loose.sum()} pictures lie beside its class folders "
                        f"({few(names[loose])}); move them into folders, or list all labels in dataset.json")
    classes, labels = np.unique(folders, return_inverse=True)
    return labels.astype(np.int64), f"from {len(classes)} sorted folders ({few(classes)})"


def image_name(i: int) -> str:
    """The name of image i, as REPA has it: a thousand to a folder."""
    return f"{i // 1000:05d}/img{i:08d}.png"


def to_png(image: np.ndarray) -> bytes:
    """Encode an RGB image uint8 (H, W, 3) as a PNG without compression and filters, in a little over H * W * 3 bytes.

    Training reads it several times as fast as Pillow's, whose lowest level still predicts every row from the one
    above. A compressed photograph takes two thirds to three quarters of that.
    """
    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)      # each begins with its filter: 0, none
    rows[:, 1:] = image.reshape(height, 3 * width)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)               # 8 bits, RGB, not interlaced
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks)


def convert_chunk(store: Store, names: np.ndarray, destination: Destination, resolution: int, transform: str | None,
                  chunk: np.ndarray) -> int:
    """Convert and write the pictures with the indices in `chunk`, and return their number."""
    for i in chunk.tolist():
        where = store.where(names[i])
        image = to_rgb(stores.decode_image(store.read(names[i]), where), where)
        destination.write(destination.names[i], to_png(np.asarray(to_square(image, resolution, transform, where))))
    return len(chunk)


def convert(source: str, dest: str, resolution: int, workers: int, transform: str | None = None,
            max_images: int | None = None) -> None:
    """Write the pictures of `source` to `dest` as `00000/img00000000.png`, ... and dataset.json; both folder or zip.

    Raises UserError if source or settings are wrong, `dest` holds something else, or a picture cannot be read.
    """
    store = open_store(source)
    names = list_names(store, IMAGE_EXTENSIONS)
    if not len(names):
        raise UserError(f"--source {shown(source)}: holds no pictures; "
                        f"expected {', '.join(map(os.fsdecode, IMAGE_EXTENSIONS))}")
    labels, origin = source_labels(store, names)
    names = names[:max_images]
    settings = {"command": "convert", "source": os.path.realpath(source), "source_contents": digest(store, names),
                "images": len(names), "transform": transform or TRANSFORMS[0], "resolution": resolution}
    outputs = np.array([image_name(i).encode() for i in range(len(names))], dtype=bytes)
    destination = Destination(dest, outputs, IMAGE_EXTENSIONS, settings, source)
    if destination.is_finished():
        destination.close()
        say(f"{shown(dest)} is finished already ({len(names)} images): nothing to do")
        return
    destination.require_room(resolution * (3 * resolution + 1))   # a PNG's rows
    destination.begin()

    missing = np.flatnonzero(destination.is_missing())
    chunks = [missing[part.start:part.stop] for part in blocks(len(missing), CHUNK)]
    work = partial(convert_chunk, store, names, destination, resolution, transform)
    with tqdm(total=len(names), initial=len(names) - len(missing), desc="convert", unit="image") as bar:
        for count in in_workers(work, chunks, workers, in_order=False):
            bar.update(count)

    destination.finish({"labels": listed(outputs, None if labels is None else labels[:max_images]),
                        "transform": {"name": settings["transform"], "resolution": resolution}})
    say(f"{shown(dest)}: {len(names)} images of {resolution}x{resolution}, labels {origin}")
