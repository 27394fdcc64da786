"""How fast a prepared data set opens, and loads into batches on the device: `--only data`.

Data sets are built in a temporary folder in the format of `convert` and `encode --dtype float16`. What is read was just
written: the disk is left out. The plain way: compressed PNG files of Pillow, and np.load.
"""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks import harness
from benchmarks.encode import draw_photo
from dataset import MOMENTS_EXTENSIONS, GlobalBatchSampler, LatentDataset
from preprocessing.convert import image_name, to_png
from preprocessing.destination import Destination
from preprocessing.encode import moments_name
from runtime.files import to_npy
from runtime.stores import IMAGE_EXTENSIONS

SIZES = {"cuda": {"images": 2048, "batch_size": 256}, "cpu": {"images": 256, "batch_size": 64}}
GOAL = 5000 / 16                     # images/s per core
KINDS, ROUNDS = {"folder": "", "zip": ".zip"}, 4        # ROUNDS: batches per worker and run
IMAGENET, OPENED = 1_281_167, 2.0    # entries, and the seconds in which they should open


def build(place: Path, images: list[bytes], moments: list[bytes], count: int, end: str) -> Path:
    """A data set of `count` entries, which take `images` and `moments` in turn; `end`: "" or ".zip"."""
    names = [image_name(i).encode() for i in range(count)]
    outputs = [moments_name(name.replace(b"/img", b"/").removesuffix(b".png")) for name in names]
    for kind, of, contents, extensions in (("images", names, images, IMAGE_EXTENSIONS),
                                           ("vae-sd", outputs, moments, MOMENTS_EXTENSIONS)):
        destination = Destination(str(place / f"{kind}{end}"), np.array(of), extensions, {}, str(place / "none"))
        destination.begin()
        for i, name in enumerate(of):
            destination.write(name, contents[i % len(contents)])
        destination.finish({"labels": [[name.decode(), i % 1000] for i, name in enumerate(of)]})
    return place


class PlainDataset(Dataset):
    """PNG files of Pillow and npy files, one call each."""

    def __init__(self, place: Path, count: int):
        self.images, self.moments = ([place / f"{i}.{end}" for i in range(count)] for end in ("png", "npy"))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        image = torch.from_numpy(np.array(Image.open(self.images[i]))).permute(2, 0, 1)   # (3, R, R)
        return image, torch.from_numpy(np.load(self.moments[i]).astype(np.float32)), i


def reader(data: Dataset, batch_size: int, workers: int, device: torch.device) -> tuple[Callable[[], None], int]:
    """A function that loads as train.py does, and the number of images that it loads."""
    batches = list(islice(GlobalBatchSampler(len(data), batch_size, seed=0), ROUNDS * workers))
    loader = DataLoader(data, batch_sampler=batches, num_workers=workers, persistent_workers=True,
                        pin_memory=device.type == "cuda")

    def run() -> None:
        for batch in loader:
            for part in batch:
                part.to(device, non_blocking=True)

    return run, len(batches) * batch_size


def measure(device: torch.device, images: int, batch_size: int, resolution: int = 256, entries: int = 20_000,
            all_cores: bool = False, repeats: int = 5) -> harness.Table:
    """The table: loading of `images` entries with up to 16 workers, else with one, too, and opening of `entries`."""
    settings = {"resolution": resolution, "images": images, "batch_size": batch_size}
    table, rng, side = harness.Table("data", settings, device), np.random.default_rng(0), resolution // 8
    photos = [draw_photo(rng, resolution, resolution) for _ in range(min(images, 64))]
    latents = [rng.normal(size=(8, side, side)).astype(np.float16) for _ in photos]
    pngs, npys = [to_png(np.asarray(photo)) for photo in photos], [to_npy(one) for one in latents]
    with tempfile.TemporaryDirectory() as root:
        place = Path(root)
        data = {kind: LatentDataset(build(place / kind, pngs, npys, images, end)) for kind, end in KINDS.items()}
        if not harness.run.limited:
            (place / "plain").mkdir()
            for i in range(images):
                photos[i % len(photos)].save(place / "plain" / f"{i}.png")
                np.save(place / "plain" / f"{i}.npy", latents[i % len(photos)])
            data["plain"] = PlainDataset(place / "plain", images)
        cores = min(os.cpu_count(), 16)
        for workers in sorted({cores if all_cores else 1, cores}):
            runs = {kind: reader(of, batch_size, workers, device) for kind, of in data.items()}
            seconds = harness.timed({kind: run for kind, (run, _) in runs.items()}, device, repeats)
            for kind in KINDS:
                found = {way: seconds[key] for way, key in (("ours", kind), ("plain", "plain")) if key in seconds}
                table.add(f"load, {kind}, {workers} worker(s)", found, runs[kind][1], "images/s", GOAL * workers,
                          "the goal of 5,000 images/s on 16 cores")
        tiny = [to_png(np.zeros((8, 8, 3), np.uint8))], [to_npy(np.zeros((8, 1, 1), np.float16))]
        for kind, end in KINDS.items():
            many = build(place / f"many-{kind}", *tiny, entries, end)
            seconds = harness.timed({"ours": partial(LatentDataset, many)}, device, repeats)
            table.add(f"open {entries:,} entries, {kind}", seconds, ideal=OPENED * entries / IMAGENET,
                      formula=f"the goal of {OPENED:g} s for {IMAGENET:,}")
    return table
