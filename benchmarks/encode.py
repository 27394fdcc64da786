"""How fast a data set is prepared: `convert` by number of workers, and `encode` stage by stage and as a whole.

    python -m benchmarks.encode [--baseline] [--profile DIR]

The pictures are drawn: JPEG of 500 x 375, noisy as photos are. The VAE has random weights; on a GPU Stable Diffusion's sizes, else a small
one's. The plain ways: one process that writes PNG as Pillow does by itself; batches that are read, encoded and written in turn.
"""

import argparse
import contextlib
import io
import math
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import (
    Row,
    matmul_peak,
    open_device,
    parser,
    precision_that_suits,
    profile,
    ratio,
    report,
    timed,
)
from benchmarks.vae import WIDTHS, autoencoder, random_codec
from dataset import read_image
from models.vae import Codec
from preprocessing.convert import convert
from preprocessing.crop import center_crop, to_rgb
from preprocessing.encode import PRECISIONS, Batches, encode_batches, moments_name, moments_of, set_precision
from preprocessing.work import Destination, all_cores, load, reading_workers
from runtime.catalogue import list_keyed
from runtime.files import to_npy
from runtime.messages import UserError, without_traceback
from runtime.speed import compiler_works, float32_arithmetic
from runtime.stores import IMAGE_EXTENSIONS, decode_image, list_names, open_store

CROP = "center-crop-dhariwal"
SIZES = {"cuda": {"images": 512, "batch_size": 32}, "cpu": {"images": 64, "batch_size": 8}}


def draw_photos(folder: Path, count: int) -> None:
    """`count` JPEG pictures of 500 x 375 px: smooth colours and a camera's noise."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        colours = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), Image.Resampling.BICUBIC)
        noisy = np.asarray(colours) + rng.normal(0, 4, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i:06d}.jpg", quality=90)


def encode_flops(device: torch.device, resolution: int) -> int:
    """Of one image, counted on tensors without numbers."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        vae, image = autoencoder(device.type), torch.empty(1, 3, resolution, resolution)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        vae.encode(image)
    return counter.get_total_flops()


def quietly(run: Callable, *args) -> None:
    """Without its progress bar, its last line and PyTorch's warning of many workers."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run(*args)


def rates(count: int, seconds: dict[str, list[float]]) -> dict[str, float]:
    """Images per second of each way."""
    return {name: count / median(taken) for name, taken in seconds.items()}


# -------------------------------------------------------------------------------------------------------------------------- convert

def convert_rows(photos: Path, scratch: Path, args: argparse.Namespace) -> list[Row]:
    """`convert` with each number of workers, and the plain way: one process, Pillow's own PNG."""
    number = iter(range(10**9))
    store = open_store(photos)
    names = list_names(store, IMAGE_EXTENSIONS).tolist()

    def ours(workers: int) -> None:
        quietly(convert, str(photos), str(scratch / f"{next(number)}"), str(args.resolution), CROP, workers)

    def plain() -> None:
        folder = scratch / f"{next(number)}"
        folder.mkdir()
        for i, name in enumerate(names):
            image = to_rgb(decode_image(store.read(name), "a photo"), "a photo")
            center_crop(image, args.resolution).save(folder / f"{i}.png")

    ways = {str(n): lambda n=n: ours(n) for n in args.workers} | ({"plain": plain} if args.baseline else {})
    seconds = timed(ways, torch.device("cpu"), min(args.warmup, 1), args.repeats)
    rate = rates(len(names), seconds)
    least = args.workers[0]
    return [Row(f"convert, {n} worker{'s' * (n > 1)}", rate[str(n)], "images/s", None if n == least else rate[str(least)] * n / least,
                "" if n == least else f"{n / least:g} x {least} worker{'s' * (least > 1)}", rate.get("plain"),
                ratio(seconds[str(n)], seconds["plain"]) if args.baseline else None) for n in args.workers]


# --------------------------------------------------------------------------------------------------------------------------- encode

class Stages:
    """What `encode` does, each stage by itself: `source` is a folder of images."""

    def __init__(self, source: Path, scratch: Path, args: argparse.Namespace, device: torch.device):
        self.store = open_store(source)
        self.keys, self.names = list_keyed(self.store, IMAGE_EXTENSIONS)
        self.keys, self.names = self.keys[:args.encoded], self.names[:args.encoded]
        self.args, self.device, self.starts = args, device, list(range(0, len(self.names), args.batch_size))
        self.destination = Destination(scratch / "moments", {}, source)
        self.destination.begin()
        self.outputs = [moments_name(key) for key in self.keys.tolist()]

    def batches(self, workers: int):
        return load(Batches(self.store, self.names, self.starts, self.args.batch_size, self.args.resolution), workers)

    def read(self, workers: int) -> None:
        for _ in self.batches(workers):
            pass

    def write(self, start: int, moments: torch.Tensor) -> None:
        for i, one in enumerate(moments.cpu().numpy(), start):
            self.destination.write(self.outputs[i], to_npy(one))

    def whole(self, compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
        on_gpu = self.device.type == "cuda"
        for _ in encode_batches(compute, self.batches(reading_workers(on_gpu)), self.write, on_gpu):
            pass

    def plain(self, codec: Codec) -> None:
        """Read, encode and write in turn, in this process."""
        for start in self.starts:
            names = self.names[start:start + self.args.batch_size]
            images = torch.from_numpy(np.stack([read_image(self.store, name) for name in names]))
            with torch.inference_mode():
                posterior = codec.vae.encode(images.to(self.device, codec.vae.dtype) / 127.5 - 1).latent_dist
                moments = torch.cat([posterior.mean, posterior.std], dim=1)
            self.write(start, moments.float())


def file_rows(stages: Stages, codec: Codec, scratch: Path) -> list[Row]:
    """Reading with each number of workers, and writing."""
    args, count = stages.args, len(stages.names)
    ways = {n: lambda n=n: quietly(stages.read, n) for n in (0, *args.workers)}
    rate = rates(count, timed(ways, torch.device("cpu"), min(args.warmup, 1), args.repeats))
    rows = [Row("encode: reading in this process", rate[0], "images/s")]
    rows += [Row(f"encode: reading, {n} worker{'s' * (n > 1)}", rate[n], "images/s", n * rate[0], f"{n} x this process")
             for n in args.workers]
    side = args.resolution // codec.space.downsampling
    moments = torch.zeros((args.batch_size, 2 * codec.space.channels, side, side))
    ways = {"files": lambda: [stages.write(0, moments[:len(stages.outputs)])],
            "one": lambda: (scratch / "one").write_bytes(moments[:len(stages.outputs)].numpy().tobytes())}
    rate = rates(min(args.batch_size, count), timed(ways, torch.device("cpu"), args.warmup, args.repeats))
    return [*rows, Row("encode: writing", rate["files"], "images/s", rate["one"], "the same bytes in one file")]


def vae_rows(stages: Stages, precision: str) -> list[Row]:
    """The VAE alone on images that are in memory, and reading, encoding and writing overlapped; shares of the precision's own peak."""
    args, device = stages.args, stages.device
    codec = random_codec(device)
    flops = encode_flops(device, args.resolution)
    images = torch.randint(256, (args.batch_size, 3, args.resolution, args.resolution), dtype=torch.uint8)
    images = images.pin_memory() if device.type == "cuda" else images
    with float32_arithmetic(tf32=precision == "tf32"):
        peak, source = matmul_peak(device, torch.bfloat16 if precision == "bf16" else torch.float32)
        plainly = deepcopy(codec)                                 # and not compiled
        for each in (codec, plainly):
            set_precision(each, precision)
        compute = moments_of(codec, args.batch_size, device.type == "cuda" and precision == "bf16" and compiler_works(device.type))
        alone = rates(args.batch_size, timed({"": lambda: compute(images)}, device, args.warmup, args.repeats))[""]
        ways = {"ours": lambda: quietly(stages.whole, compute)} | ({"plain": lambda: stages.plain(plainly)} if args.baseline else {})
        seconds = timed(ways, device, min(args.warmup, 1), args.repeats)
        profile(lambda: quietly(stages.whole, compute), args.profile and args.profile / precision, device)
    rate = rates(len(stages.names), seconds)
    readers = reading_workers(device.type == "cuda")
    formula = f"{source}{' in TF32' * (precision == 'tf32')} / {flops / 1e9:.4g} GFLOP an image"
    return [Row(f"encode: the VAE, {precision}", alone, "images/s", peak / flops, formula),
            Row(f"encode: all stages, {precision}, {readers} reading workers", rate["ours"], "images/s", peak / flops, formula,
                rate.get("plain"), ratio(seconds["ours"], seconds["plain"]) if args.baseline else None)]


# ----------------------------------------------------------------------------------------------------------------------------- main

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    flags = parser(__doc__.partition("\n")[0], repeats=3)
    flags.add_argument("--images", type=int, metavar="N", help="photos that are drawn; None: 512 for a GPU, 64 for a CPU")
    flags.add_argument("--encoded", type=int, metavar="N", help="of them that are read and encoded; None: all, on a CPU 16 at most")
    flags.add_argument("--batch-size", type=int, metavar="N", help="images encoded at a time; None: 32 on a GPU, 8 on a CPU")
    flags.add_argument("--resolution", type=int, default=256, metavar="N", help="of the images, in pixels, a multiple of 8")
    flags.add_argument("--workers", type=int, nargs="+", metavar="N", help="numbers of processes; None: 1, 2, 4, ... up to the cores")
    flags.add_argument("--precision", nargs="+", choices=PRECISIONS,
                       help="of the VAE; None: all on a GPU, fp32 on a CPU, and bf16 where it has instructions for it")
    return flags.parse_args(argv)


@without_traceback
def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    device = open_device(args)
    for name, value in SIZES[device.type].items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.encoded is None:
        args.encoded = args.images if device.type == "cuda" else min(args.images, 16)
    args.workers = sorted({*(args.workers or (*(2**i for i in range(int(math.log2(all_cores())) + 1)), all_cores()))})
    precisions = args.precision or (PRECISIONS if device.type == "cuda" else sorted({"fp32", precision_that_suits(device)}, reverse=True))
    if min(args.images, args.encoded, args.batch_size, *args.workers) < 1 or args.resolution < 8 or args.resolution % 8:
        raise UserError(f"--images {args.images}, --encoded {args.encoded}, --batch-size {args.batch_size}, --workers {args.workers}, "
                        f"--resolution {args.resolution}: give at least 1 of each, and a multiple of 8 for the last")
    if args.encoded > args.images:
        raise UserError(f"--encoded is {args.encoded}, but only --images {args.images} are drawn: give at most as many")
    try:
        codec = random_codec(device)                              # before anything is drawn
    except ImportError as error:
        raise UserError("the VAE's stages need diffusers, which is not installed: pip install diffusers") from error
    for precision in precisions:
        set_precision(codec, precision)                           # refused before, too
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        draw_photos(scratch / "photos", args.images)
        rows = convert_rows(scratch / "photos", scratch, args)
        quietly(convert, str(scratch / "photos"), str(scratch / "images"), str(args.resolution), CROP, max(args.workers))
        stages = Stages(scratch / "images", scratch, args, device)
        rows += file_rows(stages, codec, scratch)
        for precision in precisions:
            rows += vae_rows(stages, precision)
    settings = {"images": args.images, "encoded": args.encoded, "resolution": args.resolution, "batch size": args.batch_size,
                "workers": args.workers, "repeats": args.repeats, "VAE": WIDTHS[device.type]}
    return report("encode", rows, settings, device, args.output)


if __name__ == "__main__":
    main()
