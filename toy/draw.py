"""Draw the toy data set: images of one coloured shape on a soft background, in 16 classes.

    python -m toy.draw --dest data/toy/raw --num-images 8192 --seed 0        # FOLDER/<class-name>/000123.png
    python -m toy.draw --npz data/toy/reference.npz --num-images 2048 --seed 1
    python -m toy.draw --dest data/toy-t2i/raw --captions training           # FOLDER/000123.png, FOLDER/000123.txt
    python -m toy.draw --npz prompts.npz --captions phrasings --seed 1       # and prompts.txt, a line per image

Image i is a function of (seed, i); its label is i mod 16. Lengths are in units of the image width, x to the right
and y down, both in [-1/2, 1/2]. Angles are in radians, colours RGB in [0, 1].
"""

import argparse
import colorsys
import multiprocessing
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from runtime.arguments import Parser, at_least
from runtime.files import write_whole
from runtime.messages import UserError, without_traceback
from runtime.npz import write_npz
from toy.words import KINDS, PLACES, Scene, draw_scene, write_caption

SHAPES = ("disc", "square", "triangle", "cross")
HUES = {"red": (355, 8), "yellow": (52, 6), "green": (130, 18), "blue": (220, 14)}  # centre, half range; degrees
CLASSES = tuple(sorted(f"{colour}-{shape}" for colour in HUES for shape in SHAPES))  # in the order of a folder listing
ATTRIBUTES = ("x", "y", "size", "angle", "shape red", "shape green", "shape blue",
              "left red", "left green", "left blue", "right red", "right green", "right blue")
BRIGHTNESS = (0.3, 0.95)                                # of the background
RESOLUTION = 32
SUPERSAMPLING = 4


# Scenes, the pictures with captions. Sizes are those of a disc; a triangle has the same moment of inertia.
SIZES = {"small": (0.245, 0.255), "large": (0.34, 0.35)}
TRIANGLE = 1.15
TILT = np.pi / 32
BACKGROUNDS = {"dark": (0.3, 0.45), "light": (0.75, 0.95)}
ASIDE, SPREAD = 0.14, 0.015                                   # |x| of "left" and "right", and how far x may be off


@dataclass(frozen=True)
class Drawing:
    """An image and the values it was drawn from."""

    image: np.ndarray         # uint8 (R, R, 3)
    label: int                # index into CLASSES
    coverage: np.ndarray      # float32 (R, R): share of each pixel inside the shape
    attributes: np.ndarray    # float32 (13,), named by ATTRIBUTES


def draw(seed: int, index: int, resolution: int = RESOLUTION) -> Drawing:
    """Draw image `index` of `seed`, `resolution` pixels wide. Depends on nothing else."""
    rng = np.random.default_rng([seed, index])
    size = rng.uniform(0.24, 0.36)
    reach = 0.5 * (0.5 - size)
    return _draw(rng, index % len(CLASSES), size, *rng.uniform(-reach, reach, 2), np.pi / 8, BRIGHTNESS, resolution)


def draw_captioned(seed: int, index: int, resolution: int = RESOLUTION,
                   held_out: bool = False) -> tuple[Drawing, Scene]:
    """Draw scene `index` of `seed`, one that training may see or one of the held-out combinations."""
    rng = np.random.default_rng([seed, index, 1 + held_out])
    scene = draw_scene(rng, index, held_out)
    size = rng.uniform(*SIZES[scene.size])

    row, column = divmod(PLACES.index(scene.place), 3)

    def offset(side: int) -> float:
        return side * ASIDE + rng.uniform(-SPREAD, SPREAD)

    x, y = offset(column - 1), offset(row - 1)
    label = CLASSES.index(f"{scene.colour}-{scene.shape}")
    size *= TRIANGLE if scene.shape == "triangle" else 1
    return _draw(rng, label, size, x, y, TILT, BACKGROUNDS[scene.background], resolution), scene


def _draw(rng: np.random.Generator, label: int, size: float, x: float, y: float, tilt: float,
          brightness: tuple[float, float], resolution: int) -> Drawing:
    """Draw a shape at (x, y), turned by at most `tilt`; everything else is random."""
    colour, shape = CLASSES[label].split("-")
    angle = rng.uniform(-tilt, tilt) * (shape != "disc")
    paint = _paint(rng, *HUES[colour])
    ends = np.array([_muted(rng, *brightness), _muted(rng, *brightness)])       # (2, 3)
    ends[1] = 0.5 * ends[0] + 0.5 * ends[1]
    direction = rng.uniform(0, 2 * np.pi)

    axis = (np.arange(resolution * SUPERSAMPLING) + 0.5) / (resolution * SUPERSAMPLING) - 0.5
    u, v = np.meshgrid(axis.astype(np.float32), axis.astype(np.float32))        # (S, S), S = R * SUPERSAMPLING
    blend = 0.5 + (u * np.cos(direction) + v * np.sin(direction)) / np.sqrt(2)
    canvas = ends[0] + (ends[1] - ends[0]) * blend[..., None]                   # (S, S, 3)

    softness = 0.3 * size
    shade = np.clip(0.5 - _distance(shape, u - x - 0.15 * size, v - y - 0.25 * size, size, angle) / softness, 0, 1)
    canvas = canvas * (1 - 0.45 * shade * shade * (3 - 2 * shade))[..., None]   # the shadow falls down and right

    inside = _distance(shape, u - x, v - y, size, angle) < 0                    # (S, S)
    light = 1 - 0.22 * (u - x + 1.5 * (v - y)) / size                           # from above left
    canvas = np.where(inside[..., None], paint * light[..., None], canvas)

    pixels = _reduce(np.clip(canvas, 0, 1), resolution)                         # (R, R, 3)
    left, right = (_background(ends, direction, u) for u in (-0.5, 0.5))
    return Drawing(
        image=np.round(pixels * 255).astype(np.uint8),
        label=label,
        coverage=_reduce(inside.astype(np.float32), resolution),
        attributes=np.array([x, y, size, angle, *paint, *left, *right], dtype=np.float32),
    )


def _paint(rng: np.random.Generator, centre: float, half_range: float) -> np.ndarray:
    hue = rng.uniform(centre - half_range, centre + half_range) / 360 % 1
    return np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.75, 0.95), rng.uniform(0.72, 0.95)))


def _muted(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """A background colour: any hue, low saturation, so that it differs from every shape colour."""
    return np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.05, 0.3), rng.uniform(low, high)))


def _background(ends: np.ndarray, direction: float, u: float) -> np.ndarray:
    """The background colour halfway up the left (u = -1/2) or right (u = 1/2) edge."""
    return ends[0] + (ends[1] - ends[0]) * (0.5 + u * np.cos(direction) / np.sqrt(2))


def _distance(shape: str, u: np.ndarray, v: np.ndarray, size: float, angle: float) -> np.ndarray:
    """Approximate signed distance of points (u, v) to a centred shape, negative inside; `size` is its circumradius."""
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


def draw_many(seed: int, count: int, resolution: int = RESOLUTION, draw: Callable = draw) -> list:
    """What `draw` gives for images 0 .. count - 1 of `seed`, drawn on all cores."""
    with multiprocessing.Pool() as pool:
        one = partial(draw, seed, resolution=resolution)
        return list(tqdm(pool.imap(one, range(count), chunksize=64), "draw", count))


def caption_all(seed: int, scenes: list[Scene], kind: str, each: int) -> list[list[str]]:
    """`each` captions of every scene, of one of `KINDS`; those of scene i follow from (seed, i)."""
    rngs = [np.random.default_rng([seed, index, 3]) for index in range(len(scenes))]
    return [[write_caption(scene, KINDS[kind][0], rng) for _ in range(each)]
            for scene, rng in zip(scenes, rngs, strict=True)]


def write_folder(dest: Path, drawings: list[Drawing], captions: list[list[str]] | None) -> None:
    """Write `dest/<class-name>/<index>.png`, or with captions `dest/<index>.png` and `.txt`, one caption per line.

    `dest` appears only when it is complete.
    """
    unfinished = dest.with_name(dest.name + ".partial")
    if unfinished.exists():
        shutil.rmtree(unfinished)      # from an interrupted call, perhaps with another seed
    for name in CLASSES if captions is None else ("",):
        (unfinished / name).mkdir(parents=True)
    for index, drawing in enumerate(drawings):
        folder = unfinished if captions else unfinished / CLASSES[drawing.label]
        Image.fromarray(drawing.image).save(folder / f"{index:06d}.png")
        if captions:
            (folder / f"{index:06d}.txt").write_text("\n".join(captions[index]) + "\n", encoding="utf-8")
    os.replace(unfinished, dest)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__.splitlines()[0])
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--dest", type=Path, metavar="FOLDER", help="write a labelled image folder")
    where.add_argument("--npz", type=Path, metavar="FILE", help="write an npz: arr_0 images, arr_1 labels")
    parser.add_argument("--captions", choices=tuple(KINDS), help="scenes with captions like training's, in phrasings "
                        "or of combinations that training never sees, instead of classes")
    parser.add_argument("--num-images", type=at_least(1), default=8192, help="number of images, classes in turn")
    parser.add_argument("--seed", type=at_least(0), default=0, help="another seed gives another data set of this kind")
    parser.add_argument("--resolution", type=at_least(8), default=RESOLUTION, help="width and height in pixels")
    return parser.parse_args(argv)


@without_traceback
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.dest and args.dest.exists():
        raise UserError(f"--dest {args.dest}: exists; remove it, or choose another folder")
    if args.captions is None:
        drawings, captions = draw_many(args.seed, args.num_images, args.resolution), None
    else:
        one = partial(draw_captioned, held_out=KINDS[args.captions][1])
        drawings, scenes = zip(*draw_many(args.seed, args.num_images, args.resolution, one), strict=True)
        captions = caption_all(args.seed, scenes, args.captions, each=5 if args.dest else 1)
    if args.npz:
        labels = {} if captions else {"arr_1": np.array([drawing.label for drawing in drawings], dtype=np.int64)}
        images = (drawing.image for drawing in drawings)
        write_npz(args.npz, images, len(drawings), (args.resolution, args.resolution), **labels)
        if captions:
            lines = "".join(f"{caption}\n" for [caption] in captions)
            write_whole(args.npz.with_suffix(".txt"), lambda partial: partial.write_text(lines, encoding="utf-8"))
    else:
        write_folder(args.dest, drawings, captions)
    print(f"{args.npz or args.dest}: {len(drawings)} images of "
          + (f"scenes with captions of {args.captions}" if captions else f"{len(CLASSES)} classes"))


if __name__ == "__main__":
    main()
