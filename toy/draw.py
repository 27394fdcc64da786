"""Draw the toy data set: pictures of one coloured shape on a soft background, 16 classes, as many as wanted.

    python -m toy.draw --dest data/toy/raw --num-images 8192 --seed 0        # FOLDER/<class-name>/000123.png
    python -m toy.draw --npz data/toy/reference.npz --num-images 2048 --seed 1

Image i of a seed depends on (seed, i) alone, and its label is i mod 16. Lengths are in units of the picture's width,
x to the right and y down, both in [-1/2, 1/2]; angles are in radians; colours are RGB in [0, 1].
"""

import argparse
import colorsys
import multiprocessing
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from runtime.messages import UserError, without_traceback

SHAPES = ("disc", "square", "triangle", "cross")
HUES = {"red": (355, 8), "yellow": (52, 6), "green": (130, 18), "blue": (220, 14)}       # centre and half range, degrees
CLASSES = tuple(sorted(f"{colour}-{shape}" for colour in HUES for shape in SHAPES))      # sorted: as a folder lists them
ATTRIBUTES = ("x", "y", "size", "angle", "shape red", "shape green", "shape blue",
              "left red", "left green", "left blue", "right red", "right green", "right blue")
RESOLUTION = 32
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Drawing:
    """A picture and what it was drawn from."""

    image: np.ndarray         # uint8 (R, R, 3)
    label: int                # index into CLASSES
    coverage: np.ndarray      # float32 (R, R): the share of each pixel that the shape covers
    attributes: np.ndarray    # float32 (13,), named by ATTRIBUTES


def draw(seed: int, index: int, resolution: int = RESOLUTION) -> Drawing:
    """Draw image `index` of `seed`, `resolution` pixels wide. Depends on nothing else."""
    rng = np.random.default_rng([seed, index])
    label = index % len(CLASSES)
    colour, shape = CLASSES[label].split("-")

    size = rng.uniform(0.24, 0.36)
    reach = 0.5 * (0.5 - size)
    x, y = rng.uniform(-reach, reach, 2)
    angle = rng.uniform(-np.pi / 8, np.pi / 8) * (shape != "disc")
    paint = _paint(rng, *HUES[colour])
    ends = np.array([_muted(rng), _muted(rng)])                                          # (2, 3)
    ends[1] = 0.5 * ends[0] + 0.5 * ends[1]
    wind = rng.uniform(0, 2 * np.pi)

    axis = (np.arange(resolution * SUPERSAMPLING) + 0.5) / (resolution * SUPERSAMPLING) - 0.5
    u, v = np.meshgrid(axis.astype(np.float32), axis.astype(np.float32))                 # (S, S), S = R * SUPERSAMPLING
    blend = 0.5 + (u * np.cos(wind) + v * np.sin(wind)) / np.sqrt(2)
    canvas = ends[0] + (ends[1] - ends[0]) * blend[..., None]                            # (S, S, 3)

    softness = 0.3 * size
    shade = np.clip(0.5 - _distance(shape, u - x - 0.15 * size, v - y - 0.25 * size, size, angle) / softness, 0, 1)
    canvas = canvas * (1 - 0.45 * shade * shade * (3 - 2 * shade))[..., None]            # the shadow falls down and right

    inside = _distance(shape, u - x, v - y, size, angle) < 0                             # (S, S)
    light = 1 - 0.22 * (u - x + 1.5 * (v - y)) / size                                    # the light comes from above left
    canvas = np.where(inside[..., None], paint * light[..., None], canvas)

    pixels = _reduce(np.clip(canvas, 0, 1), resolution)                                  # (R, R, 3)
    attributes = [x, y, size, angle, *paint, *_background(ends, wind, -0.5), *_background(ends, wind, 0.5)]
    return Drawing(
        image=np.round(pixels * 255).astype(np.uint8),
        label=label,
        coverage=_reduce(inside.astype(np.float32), resolution),
        attributes=np.array(attributes, dtype=np.float32),
    )


def _paint(rng: np.random.Generator, centre: float, half_range: float) -> np.ndarray:
    hue = rng.uniform(centre - half_range, centre + half_range) / 360 % 1
    return np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.75, 0.95), rng.uniform(0.72, 0.95)))


def _muted(rng: np.random.Generator) -> np.ndarray:
    """A background colour: any hue, little saturation, so that it is never taken for the shape's colour."""
    return np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.05, 0.3), rng.uniform(0.3, 0.95)))


def _background(ends: np.ndarray, wind: float, u: float) -> np.ndarray:
    """The background's colour halfway up the left (u = -1/2) or right (u = 1/2) edge."""
    return ends[0] + (ends[1] - ends[0]) * (0.5 + u * np.cos(wind) / np.sqrt(2))


def _distance(shape: str, u: np.ndarray, v: np.ndarray, size: float, angle: float) -> np.ndarray:
    """About the distance of points (u, v) to the edge of a centred shape; negative inside. `size`: radius of the circle around it."""
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = u * cos + v * sin, v * cos - u * sin
    if shape == "disc":
        return np.hypot(u, v) - 0.86 * size
    if shape == "square":
        return np.maximum(abs(u), abs(v)) - 0.74 * size
    if shape == "triangle":
        return np.maximum(v, abs(u) * np.sqrt(3) / 2 - v / 2) - 0.5 * size
    assert shape == "cross", shape
    long, short = np.maximum(abs(u), abs(v)), np.minimum(abs(u), abs(v))
    return np.maximum(long - 0.95 * size, short - 0.3 * size)


def _reduce(fine: np.ndarray, resolution: int) -> np.ndarray:
    """Average SUPERSAMPLING x SUPERSAMPLING blocks: (S, S, ...) -> float32 (R, R, ...)."""
    blocks = fine.reshape(resolution, SUPERSAMPLING, resolution, SUPERSAMPLING, *fine.shape[2:])
    return blocks.mean(axis=(1, 3)).astype(np.float32)


def draw_many(seed: int, count: int, resolution: int = RESOLUTION, progress: bool = False) -> list[Drawing]:
    """Images 0 .. count - 1 of `seed`, drawn by all cores."""
    with multiprocessing.Pool() as pool:
        one = partial(draw, seed, resolution=resolution)
        return list(tqdm(pool.imap(one, range(count), chunksize=64), "draw", count, disable=not progress))


def write_npz(path: Path, drawings: list[Drawing]) -> None:
    """Write images and labels as `arr_0` uint8 (N, R, R, 3) and `arr_1` int64 (N,), the layout of ADM's batches."""
    partial_path = path.with_name(path.name + ".partial.npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(partial_path, arr_0=np.stack([d.image for d in drawings]), arr_1=np.array([d.label for d in drawings], dtype=np.int64))
    os.replace(partial_path, path)


def write_folder(dest: Path, drawings: list[Drawing]) -> None:
    """Write `dest/<class-name>/000123.png`, 123 being the index; `dest` appears when all of it is written."""
    unfinished = dest.with_name(dest.name + ".partial")
    if unfinished.exists():
        shutil.rmtree(unfinished)      # of an interrupted call, perhaps with another seed
    for name in CLASSES:
        (unfinished / name).mkdir(parents=True, exist_ok=True)
    for index, drawing in enumerate(drawings):
        Image.fromarray(drawing.image).save(unfinished / CLASSES[drawing.label] / f"{index:06d}.png")
    os.replace(unfinished, dest)


@without_traceback
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--dest", type=Path, metavar="FOLDER", help="labelled image folder to make")
    where.add_argument("--npz", type=Path, metavar="FILE", help="npz file to make: arr_0 images, arr_1 labels")
    parser.add_argument("--num-images", type=int, default=8192, help="images, classes taking turns")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another data set of the same kind")
    parser.add_argument("--resolution", type=int, default=RESOLUTION, help="width and height, pixels")
    args = parser.parse_args(argv)
    for name, least in (("num_images", 1), ("seed", 0), ("resolution", 8)):
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} is too small: give {least} or more")
    if args.dest and args.dest.exists():
        raise UserError(f"--dest {args.dest} exists already: remove it or name another folder")

    drawings = draw_many(args.seed, args.num_images, args.resolution, progress=True)
    if args.npz:
        write_npz(args.npz, drawings)
    else:
        write_folder(args.dest, drawings)
    print(f"{len(drawings)} images of {len(CLASSES)} classes in {args.npz or args.dest}")


if __name__ == "__main__":
    main()
