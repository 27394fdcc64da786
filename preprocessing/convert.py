"""`convert`: pictures of any size and mode to square RGB images, numbered in sorted order, with their labels."""

import argparse
import os
import struct
import zlib
from collections.abc import Callable
from functools import partial

import numpy as np
from tqdm import tqdm

from dataset import classes_with_images
from preprocessing.captions import source_captions
from preprocessing.crop import TRANSFORMS, NotSquare, require_square, to_rgb, to_square
from preprocessing.destination import Destination, described, digest, in_workers, names_when_begun
from runtime import stores
from runtime.catalogue import read_labels
from runtime.launch import blocks
from runtime.messages import MayPass, UserError, notice, say
from runtime.sources import TableStore, TarStore, open_source
from runtime.stores import IMAGE_EXTENSIONS, MAX_PIXELS, Store, few, shown, split_names

CHUNK, RUN = 16, 128  # pictures that a worker converts at a time; of a table, of whose row groups it skips the rest
LOOKED_AT = 64  # pictures that must be square before anything is written


def parse_resolution(text: str) -> int:
    """A type for square sizes: `256x256` or `256` -> 256."""
    width, cross, height = text.lower().partition("x")
    side = int(width) if width.isascii() and width.isdigit() and len(width) < 10 else 0
    if not 0 < side * side <= MAX_PIXELS or (cross and height != width):
        raise argparse.ArgumentTypeError(f"{shown(text)}: expected a square like 256x256")
    return side


def source_labels(store: Store, names: np.ndarray, metadata: dict, key: Callable[[bytes], bytes] = bytes,
                  captioned: bool = False) -> tuple[np.ndarray | None, list | None, str]:
    """Labels (n,) int64 of the pictures or None, the names of the classes or None, and their origin in words.

    They are read from the source's dataset.json, whose content is `metadata`, and matched by `key`; without labels
    there, a label is the rank of the picture's top-level folder in sorted order. Notices tell of classes without
    pictures and of folders that are not classes. Raises UserError if only some pictures have a label. If `captioned`,
    all are then without labels, as are pictures in tars.
    """
    where = shown(store.path)
    if "labels" in metadata:
        keys = np.array([key(name) for name in names.tolist()], dtype=bytes)
        labels = read_labels(store, keys, key, metadata)
        if labels is not None:
            classes_with_images(labels, int(labels.max()) + 1, where)
        return labels, metadata.get("classes"), "none" if labels is None else "as the source lists them"
    inner = [name.partition(b"/")[2] for name in names.tolist()]
    packed = os.path.isfile(store.path) and len({name.partition(b"/")[0] for name in names.tolist()}) == 1
    if packed and all(b"/" in name for name in inner):            # one folder above the classes, as `tar cf` packs it
        names = np.array(inner, dtype=bytes)
        notice(f"{where}: its only top-level folder is not a class; those below it are")
    folders = np.array([name.rpartition(b"/")[0].partition(b"/")[0] for name in names.tolist()], dtype=bytes)
    loose = folders == b""
    if loose.all() or (captioned and (loose.any() or isinstance(store, TarStore))):
        return None, None, "none in a flat folder"
    if loose.any():
        raise UserError(f"{where}: {loose.sum()} pictures lie beside its class folders "
                        f"({few(names[loose])}); move them into folders, or list all labels in dataset.json")
    classes, labels = np.unique(folders, return_inverse=True)
    below = np.setdiff1d([name.rpartition(b"/")[0] for name in names.tolist()], classes)
    if len(below):
        notice(f"{where}: the classes are its {len(classes)} top-level folders ({few(classes)}), not the {len(below)} "
               f"folders below them ({few(below)}); for those, name the folder above them")
    inside = os.scandir(os.fsencode(store.path)) if os.path.isdir(store.path) else ()
    empty = np.setdiff1d([entry.name for entry in inside if entry.is_dir() and entry.name[:1] != b"."], classes)
    if len(empty):
        notice(f"{where}: folders without pictures: {len(empty)} ({few(empty)}); they do not count as classes, so the "
               "labels of the folders behind them are smaller")
    return labels.astype(np.int64), [*map(os.fsdecode, classes)], f"from {len(classes)} sorted names ({few(classes)})"


def spread(labels: np.ndarray | None, count: int, most: int | None) -> np.ndarray:
    """Indices of at most `most` of `count` pictures, sorted: the first ones of each class, or without labels of all."""
    if labels is None or most is None:
        return np.arange(count)[:most]
    order = np.argsort(labels, kind="stable")
    rank = np.arange(count) - np.searchsorted(labels[order], labels[order])       # of each picture in its class
    return np.sort(order[np.lexsort((order, rank))][:most])


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


def convert_picture(store: Store, resolution: int, transform: str | None, name: bytes) -> bytes:
    """A picture as the PNG of a square RGB image. Raises UserError if it cannot be converted."""
    where = store.where(name)
    image = to_rgb(stores.decode_image(store.read(name), where), where)
    return to_png(np.asarray(to_square(image, resolution, transform, where)))


def convert_chunk(names: np.ndarray, destination: Destination, convert_one: Callable[[bytes], bytes], chunk: np.ndarray
                  ) -> tuple[int, dict[int, str]]:
    """Convert and write the names with the indices in `chunk`; return their number and what is wrong with some."""
    faults = {}
    for i in chunk.tolist():
        try:
            data = convert_one(names[i])
        except NotSquare as error:                                # the choice of a transform is for all pictures
            raise NotSquare(f"{error}, and continues {destination.where}; remove that for another") from error
        except MayPass:                                           # the picture may be good
            raise
        except UserError as error:
            faults[i] = str(error)
            continue
        destination.write(destination.names[i], data)
    return len(chunk), faults


def require_squares(store: Store, names: np.ndarray) -> None:
    """Raise NotSquare if one of a few pictures spread over `names` (n,) is not square; pass over unreadable ones."""
    for name in names[np.linspace(0, len(names) - 1, min(LOOKED_AT, len(names))).astype(int)]:
        where = store.where(name)
        try:
            image = stores.decode_image(store.read(name), where)
        except MayPass:
            raise
        except UserError:                                         # `convert_missing` names it
            continue
        require_square(image, where)


def convert_missing(store: Store, names: np.ndarray, destination: Destination, convert_one: Callable[[bytes], bytes],
                    workers: int, skip_bad: int, kind: str = "pictures") -> np.ndarray:
    """Write `convert_one(name)` for what is missing of `names` (n,); return whether each (n,) exists now.

    Goes on over those that cannot be converted, and names them. Raises UserError at the end if they are more than
    `skip_bad`, or none exists.
    """
    missing = np.flatnonzero(destination.is_missing())
    size = RUN if isinstance(store, TableStore) else CHUNK
    chunks = [missing[part.start:part.stop] for part in blocks(len(missing), size)]
    work = partial(convert_chunk, names, destination, convert_one)
    bad: list[int] = []
    with tqdm(total=len(names), initial=len(names) - len(missing), desc=kind, unit="image") as bar:
        for count, found in in_workers(work, chunks, workers, in_order=False):
            for i, fault in found.items():
                bad.append(i)
                bar.clear()
                notice(fault)
            bar.update(count)
    exists = ~np.isin(np.arange(len(names)), bad)
    if len(bad) > skip_bad or not exists.any():
        enough = f", or give --skip-bad {len(bad)} instead of {skip_bad}" * bool(exists.any() and kind == "pictures")
        remedy = ("correct the source and choose another --dest" if hasattr(store, "described") else
                  "replace or remove them and give the same command again")
        raise UserError(f"{shown(store.path)}: {len(bad)} of {len(names)} {kind} cannot be converted "
                        f"({few(names[sorted(bad)])}), named above; {remedy}{enough}")
    return exists


def convert(source: str, dest: str, resolution: int, workers: int, transform: str | None = None,
            max_images: int | None = None, skip_bad: int = 0, captions: str | None = None, **columns: str) -> None:
    """Write the pictures of `source` to `dest` as `00000/img00000000.png`, ... and dataset.json; both folder or zip.

    The source is what `open_source` reads, with `columns` for it. Captions are those of the file `captions`, or what
    `source_captions` finds.
    At most `skip_bad` pictures that cannot be read are left out; their numbers, and those of pictures removed from the
    source since the work was begun, stay free. Raises UserError if source or settings are wrong, `dest` holds something
    else, or, after all others are done, more pictures cannot be read.
    """
    store = open_source(source, **columns)
    for kind, column in getattr(store, "columns", {}).items():
        if kind == "label" and column is not None or kind == "caption" and column is not None and not captions:
            say(f"{shown(source)}: {kind}s are those of the column {shown(column)}")
    (present, others), metadata = split_names(store, IMAGE_EXTENSIONS), stores.read_metadata(store)
    if not len(present):
        raise UserError(f"--source {shown(source)}: holds no pictures; "
                        f"expected {', '.join(map(os.fsdecode, IMAGE_EXTENSIONS))}, or shards directly in it")
    all_names = names_when_begun(dest, present)
    texts = source_captions(store, present, others, metadata, captions, all_names)
    labels, classes, origin = source_labels(store, all_names, metadata, captioned=texts is not None)
    chosen = spread(labels, len(all_names), max_images)
    names, labels = all_names[chosen], None if labels is None else labels[chosen]
    settings = {"command": "convert", "source": os.path.realpath(source), "source_contents": digest(names, metadata),
                "image_column": getattr(store, "columns", {}).get("image"), "images": len(names),
                "transform": transform or TRANSFORMS[0], "resolution": resolution}
    outputs = np.array([image_name(i).encode() for i in range(len(names))], dtype=bytes)
    here = np.isin(names, present)
    gone, outputs = outputs[~here], outputs[here]
    names, labels = names[here], None if labels is None else labels[here]
    destination = Destination(dest, outputs, IMAGE_EXTENSIONS, settings, source)

    def about(some: slice | np.ndarray) -> dict:
        return described(outputs[some], None if labels is None else labels[some], classes,
                         texts and [texts[name] for name in names[some].tolist()])

    if destination.is_finished():
        done = stores.read_metadata(stores.open_store(dest)).get("captions")
        if texts and not (done and done.items() <= about(slice(None))["captions"].items()):
            raise UserError(f"--dest {shown(dest)}: has other captions or none; change them with "
                            "`preprocessing.dataset_tools captions`")
        return
    destination.require_room(resolution * (3 * resolution + 1))   # a PNG's rows
    if transform is None:
        require_squares(store, names)
    destination.begin(all_names)
    destination.leave_out(gone)
    convert_one = partial(convert_picture, store, resolution, transform)
    exists = convert_missing(store, names, destination, convert_one, workers, skip_bad)
    destination.leave_out(outputs[~exists])
    destination.finish({**about(exists), "transform": {"name": settings["transform"], "resolution": resolution},
                        "removed": [*map(os.fsdecode, np.setdiff1d(all_names, present))]})
    say(f"{shown(dest)}: {exists.sum()} images of {resolution}x{resolution} of {len(names)} pictures, labels {origin}"
        f"{', with captions' * (texts is not None)}")
