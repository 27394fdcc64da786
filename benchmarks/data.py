"""How fast a data set opens and is read: `python -m benchmarks.data [--baseline]`.

It builds data sets of its own in a temporary folder, as `preprocessing convert` and `encode --dtype float16` write them: photographs
(smooth colours with noise) for the reading, tiny files for the opening of many. What is read was just written, so the disk is left out.
The plain way of `--baseline` reads PNGs as Pillow writes them at its lowest level, 0, as the data tools of this family do, and opens for
the first time, which also writes the index. Features are random numbers in dinov2-vit-b's layout, which training reads instead of images.
"""

import argparse
import io
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from benchmarks.harness import Row, open_device, parser, profile, ratio, report, timed
from dataset import Features, GlobalBatchSampler, LatentDataset, Reading, WatchedDataset, read_image, read_moments
from models.cached_features import FeaturesRecord, features_folder, pack
from preprocessing.convert import image_name, to_png
from preprocessing.encode import moments_name
from preprocessing.encode_features import features_name
from preprocessing.work import all_cores
from runtime import index
from runtime.files import make_folder, to_npy
from runtime.messages import UserError, say, without_traceback

GOAL, CORES = 5000, 16                # images/s on so many cores
IMAGENET, FIRST, LATER = 1_281_167, 30.0, 2.0  # entries, and the seconds in which they are to open, first and later
ENTRIES = IMAGENET // 10              # opened beside a GPU: to write all of them takes minutes
LATENT = (8, 8)                       # channels of the moments, pixels of the image to each of theirs
ROUNDS = {"cuda": 3, "cpu": 8}         # batches that each worker reads in a run; beside a GPU they are large
BY_PILLOW = ", by Pillow"              # ends the name of the plain way's data sets
ENCODER, WIDTH, PIXELS = "dinov2-vit-b", 768, 16  # whose features are read, and the pixels of the image to each of its patches


def parse_args(argv=None) -> argparse.Namespace:
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--resolution", type=int, default=256, metavar="PIXELS", help="side of the images")
    flags.add_argument("--images", type=int, default=None, metavar="N", help="images on the disk; None: 2048 beside a GPU, else 256")
    flags.add_argument("--batch-size", type=int, default=None, metavar="N", help="images; None: 256 beside a GPU, else 64")
    flags.add_argument("--workers", type=int, default=None, metavar="N", help=f"loader processes; None: the cores, at most {CORES}")
    flags.add_argument("--entries", type=int, default=None, metavar="N",
                       help=f"of the data set that is opened; None: {ENTRIES} beside a GPU, else 20000")
    flags.add_argument("--folder", type=Path, default=None, metavar="DIR", help="where data sets are built and removed; None: the system's")
    args = flags.parse_args(argv)
    large = args.device == "cuda"
    for name, value in (("images", 2048 if large else 256), ("batch_size", 256 if large else 64), ("workers", min(all_cores(), CORES)),
                        ("entries", ENTRIES if large else 20_000)):
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}: give at least 1")
    if args.resolution < PIXELS or args.resolution % PIXELS:
        raise UserError(f"--resolution is {args.resolution}: give a multiple of {PIXELS}")
    return args


# ------------------------------------------------------------------------------------------------------------------- data sets

def photograph(rng: np.random.Generator, side: int) -> np.ndarray:
    """uint8 (R, R, 3): large soft shapes and the noise of a sensor, which compress as photographs do."""
    soft = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    return (np.asarray(soft) + rng.normal(0, 6, (side, side, 3))).clip(0, 255).astype(np.uint8)


def by_pillow(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "png", compress_level=0)
    return data.getvalue()


def write(place: Path, files: dict[str, bytes], zipped: bool, metadata: dict) -> None:
    """A folder or a zip (`place`.zip) of `files` and dataset.json. In a folder equal contents are links to one file per subfolder."""
    contents = {**files, "dataset.json": json.dumps(metadata).encode()}
    if zipped:
        place.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(f"{place}.zip", "w") as archive:
            for name, data in contents.items():
                archive.writestr(zipfile.ZipInfo(name), data)
        return
    written: dict[tuple[str, int], str] = {}
    for name, data in contents.items():
        path = os.path.join(place, name)
        folder = os.path.dirname(path)
        first = written.setdefault((folder, id(data)), path)
        if first != path:
            os.link(first, path)
            continue
        os.makedirs(folder, exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)


def build(place: Path, pictures: list[bytes], moments: list[bytes], count: int, zipped: bool) -> Path:
    """A data set of `count` entries that takes pictures and moments in turn."""
    images = {image_name(i): pictures[i % len(pictures)] for i in range(count)}
    latents = {f"{i // 1000:05d}/img-mean-std-{i:08d}.npy": moments[i % len(moments)] for i in range(count)}
    assert moments_name(b"00000/00000000").decode() in latents
    for kind, files in (("images", images), ("vae-sd", latents)):
        write(place / kind, files, zipped, {"labels": [[name, i % 1000] for i, name in enumerate(files)]})
    return place


def with_features(data: Path, count: int, resolution: int, zipped: bool) -> LatentDataset:
    """The data set `build` made, with features of each entry, and without its images."""
    record = FeaturesRecord(ENCODER, "random", "", None, resolution, resolution // PIXELS, WIDTH, class_token=True, dtype="float16")
    stored = pack(torch.randn(min(count, 64), WIDTH), torch.randn(min(count, 64), record.grid**2, WIDTH), record.dtype)
    contents = [to_npy(one) for one in stored]
    files = {features_name(b"%05d/%08d" % (i // 1000, i)).decode(): contents[i % len(contents)] for i in range(count)}
    write(data / features_folder(ENCODER), files, zipped, {"features": record.to_record()})
    return LatentDataset(data, with_images=False, features=[Features(data / f"{features_folder(ENCODER)}{'.zip' * zipped}")])


# --------------------------------------------------------------------------------------------------------------------- opening

def opening(args: argparse.Namespace, place: Path, device: torch.device) -> list[Row]:
    """Seconds of the first opening, which writes the index, and of later ones."""
    rows = []
    tiny, latents = [to_png(np.zeros((8, 8, 3), dtype=np.uint8))], [to_npy(np.zeros((LATENT[0], 1, 1), dtype=np.float16))]
    share = args.entries / IMAGENET
    for kind in ("folder", "zip"):
        say(f"building {args.entries:,} entries as {kind} ...")
        data = build(place / f"many-{kind}", tiny, latents, args.entries, zipped=kind == "zip")
        time.sleep(index.SETTLED + 0.1)                           # what is younger is not relied on
        start = time.perf_counter()
        LatentDataset(data)
        first = time.perf_counter() - start
        later = median(timed({"": lambda data=data: LatentDataset(data)}, device, 0, args.repeats)[""])
        name, formula = f"open {args.entries:,} entries, {kind}", "{:.0f} s for ImageNet's {:,}"
        rows.append(Row(f"{name}, first", first, "s", FIRST * share, formula.format(FIRST, IMAGENET)))
        rows.append(Row(f"{name}, later", later, "s", LATER * share, formula.format(LATER, IMAGENET),
                        *((first, later / first) if args.baseline else ())))
    return rows


# --------------------------------------------------------------------------------------------------------------------- reading

class InMemory:
    """A store of one file."""

    def __init__(self, data: bytes):
        self.data = data

    def read(self, name: bytes) -> bytes:
        return self.data

    def where(self, name: bytes) -> str:
        return "a file in memory"


def stages(args: argparse.Namespace, data: dict[str, LatentDataset], picture: np.ndarray, device: torch.device) -> list[Row]:
    """Images per second of each part of the work, on one core."""
    count = min(args.images, args.batch_size)
    one = InMemory(to_png(picture))
    latents = InMemory(data["folder"].moments.read(moments_name(b"00000/00000000")))
    entries = [data["folder"][i] for i in range(count)]
    ways = {f"read both files, {kind}": lambda of=of: [(of.images.read(image_name(i)), of.moments.read(moments_name(of.keys[i])))
                                                       for i in range(count)] for kind, of in data.items()}
    ways |= {"image from its bytes": lambda: [read_image(one, b"", args.resolution) for _ in range(count)],
             "moments from their bytes": lambda: [read_moments(latents, b"") for _ in range(count)],
             "collate": lambda: default_collate(entries)}
    if args.baseline:
        packed = InMemory(by_pillow(picture))
        ways["plain"] = lambda: [read_image(packed, b"", args.resolution) for _ in range(count)]
    seconds = timed(ways, device, args.warmup, args.repeats)
    plain = seconds.pop("plain", None)
    rows = []
    for name, ours in seconds.items():
        against = (count / median(plain), ratio(ours, plain)) if plain and name.startswith("image") else ()
        rows.append(Row(f"{name}, one core", count / median(ours), "images/s", None, "", *against))
    return rows


class Batches:
    """The first batches of the endless order, as a batch sampler."""

    def __init__(self, size: int, batch_size: int, count: int):
        self.order, self.count = GlobalBatchSampler(size, batch_size, seed=0), count

    def __iter__(self) -> Iterator[list[int]]:
        return islice(self.order, self.count)


def reader(data: LatentDataset, batch_size: int, workers: int, device: torch.device) -> tuple[Callable[[], None], int]:
    """A function that reads as train.py does, and how many images it reads. Workers stay from run to run and rest in between."""
    batches = Batches(len(data), batch_size, ROUNDS[device.type] * max(workers, 1))
    loader = DataLoader(WatchedDataset(data, Reading(workers)), batch_sampler=batches, num_workers=workers,
                        persistent_workers=workers > 0, pin_memory=device.type == "cuda")

    def run() -> None:
        for images, moments, _, *features, replaced in loader:
            for tensor in (images, moments, *(part for one in features for part in one.values())):
                tensor.to(device, non_blocking=True)
            replaced[replaced >= 0].tolist()

    return run, batches.count * batch_size


def loading(args: argparse.Namespace, data: dict[str, LatentDataset], device: torch.device) -> list[Row]:
    """Images per second of the whole way from files to batches on the device."""
    rows = []
    for workers in sorted({1, args.workers}):
        readers = {kind: reader(of, args.batch_size, workers, device) for kind, of in data.items()}
        seconds = timed({kind: run for kind, (run, _) in readers.items()}, device, args.warmup, args.repeats)
        for kind in (kind for kind in readers if not kind.endswith(BY_PILLOW)):
            images = readers[kind][1]
            rate, plain = images / median(seconds[kind]), seconds.get(f"{kind}{BY_PILLOW}")
            formula = f"{GOAL:,} images/s on {CORES} cores" + (f"; extrapolated to them: {rate * CORES / workers:,.0f}"
                                                               if workers != CORES else "")
            rows.append(Row(f"load, {kind}, {workers} worker{'s'[:workers > 1]}", rate, "images/s", GOAL * workers / CORES, formula,
                            *((images / median(plain), ratio(seconds[kind], plain)) if plain else ())))
    return rows


@without_traceback
def main(argv=None) -> None:
    args = parse_args(argv)
    device = open_device(args)
    if args.folder is not None:
        make_folder(args.folder)
    rng = np.random.default_rng(0)
    side = args.resolution // LATENT[1]
    pictures = [photograph(rng, args.resolution) for _ in range(min(args.images, 64))]
    moments = [to_npy(rng.normal(size=(LATENT[0], side, side)).astype(np.float16)) for _ in range(min(args.images, 64))]
    with tempfile.TemporaryDirectory(prefix="reg-data-", dir=args.folder) as made, patch.dict(os.environ, XDG_CACHE_HOME=f"{made}/cache"):
        place = Path(made)
        written = {"": [to_png(picture) for picture in pictures]}
        if args.baseline:
            written[BY_PILLOW] = [by_pillow(picture) for picture in pictures]
        data = {f"{kind}{how}": LatentDataset(build(place / f"{kind}{how}", files, moments, args.images, zipped=kind == "zip"))
                for how, files in written.items() for kind in ("folder", "zip")}
        own = {kind: data[kind] for kind in ("folder", "zip")}
        data |= {f"features, {kind}": with_features(place / kind, args.images, args.resolution, zipped=kind == "zip") for kind in own}
        rows = [*stages(args, own, pictures[0], device), *loading(args, data, device), *opening(args, place, device)]
        profile(reader(data["folder"], args.batch_size, 0, device)[0], args.profile, device)
    settings = {name: getattr(args, name) for name in ("resolution", "images", "batch_size", "workers", "entries")}
    size = {name: round(sum(map(len, files)) / len(files)) for name, files in written.items()}
    report("data", rows, {**settings, "bytes_an_image": size[""], "bytes_by_pillow": size.get(BY_PILLOW)}, device, args.output)


if __name__ == "__main__":
    main()
