"""Preparing a data set by the programs of preprocessing.dataset_tools, convert and encode: `--only encode`.

The photographs are drawn: JPEG of 500 x 375 px. The VAE has random weights: Stable Diffusion's sizes on a GPU, else a
small one's. The plain ways: one process with Pillow's own PNG; batches that are read, encoded and written in turn.
"""

import contextlib
import io
import itertools
import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import harness
from models.vae import Codec, load_codec
from preprocessing import dataset_tools
from preprocessing.crop import center_crop
from runtime.speed import compile_parts

SIZES = {"cuda": {"images": 512, "batch_size": 32}, "cpu": {"images": 48, "batch_size": 8}}
WIDTHS = {"cuda": (128, 256, 512, 512), "cpu": (16, 32, 32, 32)}          # channels of the VAE


def random_vae(device_type: str) -> torch.nn.Module:
    """A diffusers AutoencoderKL with random weights, on the current default device."""
    from diffusers import AutoencoderKL  # slow to import

    torch.manual_seed(0)
    widths = WIDTHS[device_type]
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                         layers_per_block=2, block_out_channels=widths, latent_channels=4,
                         norm_num_groups=min(32, widths[0]), scaling_factor=0.18215)


def random_codec(device: torch.device, precision: str, compile: bool) -> Codec:
    """`random_vae` as `encode` and generate.py open theirs: compiled in bf16 only."""
    codec = Codec(random_vae(device.type).eval().requires_grad_(False).to(device), "random")
    if precision == "bf16":
        codec.in_bf16()
        if compile:
            compile_parts(codec.vae)
    return codec


def encoder_flops(device_type: str, resolution: int) -> int:
    """FLOPs of encoding one image."""
    with torch.device("meta"):
        vae = random_vae(device_type)
        return harness.flops(lambda: vae.encode(torch.zeros(1, 3, resolution, resolution)))


def draw_photo(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth colours and sensor noise, which compress like a photograph."""
    colours = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(colours) + rng.normal(0, 4, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def tool(*argv: object) -> None:
    """Run preprocessing.dataset_tools without its output."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        dataset_tools.main([str(part) for part in argv])


def plain_convert(photos: list[Path], resolution: int, dest: Path) -> None:
    dest.mkdir()
    for photo in photos:
        with Image.open(photo) as image:
            center_crop(image, resolution).save(dest / f"{photo.stem}.png")


def plain_encode(images: list[Path], vae: torch.nn.Module, batch_size: int, dest: Path) -> None:
    dest.mkdir()
    for start in range(0, len(images), batch_size):
        batch = images[start:start + batch_size]
        x = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in batch])).permute(0, 3, 1, 2)
        with torch.inference_mode():
            posterior = vae.encode(x.to(vae.device) / 127.5 - 1).latent_dist
            moments = torch.cat([posterior.mean, posterior.std], dim=1).cpu().numpy()     # (B, 2C, H, W)
        for path, one in zip(batch, moments, strict=True):
            np.save(dest / f"{path.stem}.npy", one)


def measure(device: torch.device, images: int, batch_size: int, resolution: int = 256,
            repeats: int = 3) -> harness.Table:
    """The table, for `images` photographs and as many workers of convert as there are cores."""
    precision = "bf16" if harness.has_fast_bf16(device) else "fp32"
    settings = {"images": images, "batch_size": batch_size, "resolution": resolution, "precision": precision}
    table, rng, number = harness.Table("encode", settings, device), np.random.default_rng(0), itertools.count()
    timed = partial(harness.timed, device=device, repeats=repeats, warmup=1)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        photos = [root / "photos" / f"{i:06d}.jpg" for i in range(images)]
        (root / "photos").mkdir()
        for photo in photos:
            draw_photo(rng, 500, 375).save(photo, quality=90)

        def new() -> Path:
            return root / str(next(number))

        def convert(workers: int, dest: Path) -> None:
            flags = ("--dest", dest, "--resolution", resolution, "--workers", workers, "--transform",
                     "center-crop-dhariwal")
            tool("convert", "--source", root / "photos", *flags)

        for workers in sorted({1, os.cpu_count()}):
            seconds = timed({"ours": lambda workers=workers: convert(workers, new()),
                             "plain": lambda: plain_convert(photos, resolution, new())})
            table.add(f"convert, {workers} worker(s)", seconds, images, "images/s")

        convert(1, root / "images")
        random_vae(device.type).save_pretrained(root / "vae")
        vae, pngs = load_codec(str(root / "vae"), device).vae, sorted((root / "images").rglob("*.png"))
        flags = ("--model-url", root / "vae", "--batch-size", batch_size, "--precision", precision)
        seconds = timed({"ours": lambda: tool("encode", "--source", root / "images", "--dest", new(), *flags),
                         "plain": lambda: plain_encode(pngs, vae, batch_size, new())})
        peak, source = harness.matmul_peak(device, torch.bfloat16 if precision == "bf16" else torch.float32)
        each = encoder_flops(device.type, resolution)
        formula = f"{source} / {each / 1e9:.4g} GFLOP"
        table.add(f"encode, {precision}", seconds, images, "images/s", peak / each, formula)
    return table
