"""What a folder of samples is on disk, so that work on it may end at any moment and the same command goes on.

    settings.json       what made the images; replaced when all that belonged to the one before is gone: two settings never mix
    blocks/             00000064.npy: the images of a block, uint8 (B, R, R, 3), by its first index; there until samples.npz is
    class_tokens/       the same of class tokens, float32 (B, E), if they are asked for
    images/             000064.png by index, if asked for; all of a block are written before its file in blocks/
    grid.png            the first images, for people
    class_tokens.npz    class tokens (N, E) and labels (N,), if asked for
    samples.npz         images and labels in ADM's form; comes last: where it is, all above was written
    metrics*.json       the evaluator's; removed before samples.npz is made again

Every file is whole or absent, but for PNGs, whose two ends tell it; they are mended from samples.npz.
Letters: N images, B in a block, R image size, E token width.
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from evaluations.images import open_images, pick
from evaluations.report import METRICS
from runtime.files import make_folder, partial_name, to_npy, write_npz, write_whole
from runtime.messages import UserError, notice

GRID_IMAGES, GRID_COLUMNS = 64, 8
BEFORE = {"vae_precision": "fp32", "compiled": False}             # of settings.json from before there was a choice
IMAGES, BLOCKS, TOKEN_BLOCKS = "images", "blocks", "class_tokens"
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
PNG_MORE = 4096                                                   # bytes by which a PNG file may exceed its pixels, rounded up by the disk
PNG_THREADS = 4                                                   # about 100 images of 256 px a second each
WAITING = 2                                                       # blocks that are sampled and not yet written, at most


@dataclass(frozen=True)
class SampleFolder:
    """Where the samples are, and which outputs they shall have."""

    path: Path
    count: int                                                    # N
    block_size: int                                               # B; the last block may be smaller
    side: int                                                     # R
    token_width: int | None                                       # E; None: class tokens are not asked for
    png: bool                                                     # whether PNG files are asked for

    @property
    def blocks(self) -> list[range]:
        """The indices of the images of each block."""
        return [range(start, min(start + self.block_size, self.count)) for start in range(0, self.count, self.block_size)]

    @property
    def rows(self) -> dict[str, np.dtype]:
        """What the blocks of each kind hold of one image."""
        rows = {BLOCKS: np.dtype((np.uint8, (self.side, self.side, 3)))}
        return rows if self.token_width is None else {**rows, TOKEN_BLOCKS: np.dtype((np.float32, (self.token_width,)))}

    @property
    def samples(self) -> Path:
        return self.path / "samples.npz"

    @property
    def class_tokens(self) -> Path:
        return self.path / "class_tokens.npz"

    @property
    def settings(self) -> Path:
        return self.path / "settings.json"

    def block_file(self, part: str, block: range) -> Path:
        return self.path / part / f"{block.start:08d}.npy"

    def png_file(self, index: int) -> Path:
        return self.path / IMAGES / f"{index:06d}.png"


# ------------------------------------------------------------------------------------------------------------------ what is there

def decisive(settings: dict) -> dict:
    """The part of settings.json that decides every image; an unguided image has no interval."""
    names = ("checkpoint_sha256", "weights", "vae", "vae_precision", "sampling", "compiled", "num_images", "per_proc_batch_size")
    settings = {name: {**BEFORE, **settings}.get(name) for name in names}
    if settings["sampling"]["cfg_scale"] == 1:
        settings["sampling"] = {**settings["sampling"], "guidance_low": None, "guidance_high": None}
    return json.loads(json.dumps(settings))                       # tuples become lists, as in a file


def is_of(folder: SampleFolder, settings: dict) -> bool:
    """Whether the folder's settings.json, if it is whole, decides the same images as `settings`."""
    try:
        found = decisive(json.loads(folder.settings.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing, cut off, or JSON of another form
        return False
    return found == decisive(settings)


def is_finished(folder: SampleFolder) -> bool:
    """Whether samples.npz, and class_tokens.npz if asked for, can be opened as N rows. Reads no pixels."""
    try:
        images = open_images(folder.samples, least=1)
        if folder.token_width is not None:
            from evaluations.class_tokens import read_class_tokens  # slow to import

            read_class_tokens(folder.class_tokens, folder.count)
    except UserError:                                             # missing or damaged
        return False
    return (images.count, images.size) == (folder.count, (folder.side, folder.side))


def is_whole_block(file: Path, count: int, row: np.dtype) -> bool:
    """Whether the file holds `count` rows; only its header and its length are read."""
    try:
        block = np.lib.format.open_memmap(file, mode="r")
    except (OSError, ValueError):                                 # missing, cut off, or no npy file
        return False
    return block.shape == (count, *row.shape) and block.dtype == row.base


def is_whole_png(file: Path) -> bool:
    """Whether the file begins and ends as a PNG does, which tells one that is missing, empty or cut off without decoding it."""
    try:
        with open(file, "rb") as png:
            start = png.read(len(PNG_START))
            png.seek(-len(PNG_END), os.SEEK_END)
            return start == PNG_START and png.read() == PNG_END
    except OSError:                                               # also of a seek to before the start
        return False


def blocks_to_make(folder: SampleFolder, settings: dict) -> list[range] | None:
    """The blocks that are not there whole; None if the images are finished. Writes nothing.

    Raises UserError where the disk is too small for the rest.
    """
    missing = folder.blocks
    if is_of(folder, settings):
        if is_finished(folder):
            return None
        missing = [block for block in missing
                   if not all(is_whole_block(folder.block_file(part, block), len(block), row) for part, row in folder.rows.items())]
    # At the end the blocks and the npz files are there together, and PNG may compress nothing.
    each = 2 * sum(row.itemsize for row in folder.rows.values()) + (folder.rows[BLOCKS].itemsize + PNG_MORE if folder.png else 0)
    there = sum(path.stat().st_size for path in folder.path.rglob("*") if path.is_file())  # either stays as a part of it, or makes room
    require_room(folder, folder.count * each - there)
    return missing


def require_room(folder: SampleFolder, size: int) -> None:
    """Raise UserError unless `size` bytes are free where the folder is or will be."""
    free = shutil.disk_usage(next(path for path in (folder.path, *folder.path.parents) if os.path.exists(path))).free
    if size > free:
        instead = "choose another --sample-dir, or add --no-png" if folder.png else "or choose another --sample-dir"
        raise UserError(f"the samples need up to {size / 2**30:.3g} GiB more in {folder.path}, where {free / 2**30:.3g} GiB are free: "
                        f"make room, {instead}")


# ---------------------------------------------------------------------------------------------------------------- what is written

def prepare(folder: SampleFolder, goes_on: bool, settings: dict) -> None:
    """Main process, before all blocks: settings.json and the folders to fill; what is in them stays only if the work `goes_on`.

    Raises UserError where they cannot be written.
    """
    make_folder(folder.path)
    for stale in [*folder.path.glob(METRICS), *folder.path.glob(partial_name(Path("*")).name),
                  folder.samples, folder.class_tokens, folder.path / "grid.png"]:
        stale.unlink(missing_ok=True)
    wanted = [*folder.rows, *([IMAGES] if folder.png else [])]
    for name in (IMAGES, BLOCKS, TOKEN_BLOCKS):
        if (folder.path / name).exists() and not (goes_on and name in wanted):
            shutil.rmtree(folder.path / name)
    for name in wanted:
        make_folder(folder.path / name)
    if not goes_on:                                               # last: until then the old settings are there, and nothing made of them
        write_whole(folder.settings, lambda partial: partial.write_text(json.dumps(settings, indent=2) + "\n"))


def write_block(folder: SampleFolder, block: range, images: torch.Tensor, class_tokens: torch.Tensor | None,
                each: Callable = map) -> None:
    """Any process: images uint8 (B, 3, R, R) and class tokens (B, E), which are left out where they are not asked for.

    The images' own file comes last: where it is, PNGs and class tokens are too. `each` is `map`, or a pool's, for the PNGs.
    Raises UserError where a file cannot be written.
    """
    if folder.png:
        list(each(lambda index, image: write_png(folder.png_file(index), to_pil_image(image)), block, images))
    if folder.token_width is not None:
        write_array(folder.block_file(TOKEN_BLOCKS, block), class_tokens.numpy())
    write_array(folder.block_file(BLOCKS, block), images.permute(0, 2, 3, 1).numpy())


class BlockWriter:
    """`write_block` beside other work: `with BlockWriter(folder) as writer: writer.put(block, images, class_tokens)`.

    Blocks are written one after the other, in the order in which they came. When one fails, none after it is written, and its exception
    is raised by a later `put` or at the end. Leaving waits for all that came, also after an exception from elsewhere: what was sampled is
    not lost.

    By threads, since 97 % of the time is zlib's, which runs without the GIL: processes were no faster, and would need the images copied.
    """

    def __init__(self, folder: SampleFolder):
        self.folder = folder
        self.pngs = ThreadPoolExecutor(PNG_THREADS, "png")
        self.blocks = ThreadPoolExecutor(1, "blocks")
        self.waiting = deque()
        self.failed = False

    def put(self, block: range, images: torch.Tensor, class_tokens: torch.Tensor | None) -> None:
        """Arguments as of `write_block`, which must not change any more. Waits while WAITING blocks are to be written."""
        while self.waiting and (self.waiting[0].done() or len(self.waiting) == WAITING):
            self.waiting.popleft().result()
        self.waiting.append(self.blocks.submit(self._write, block, images, class_tokens))

    def _write(self, *arguments) -> None:
        if self.failed:
            return
        try:
            write_block(self.folder, *arguments, each=self.pngs.map)
        except BaseException:
            self.failed = True
            raise

    def __enter__(self) -> "BlockWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        self.blocks.shutdown()
        self.pngs.shutdown()
        if kind is None:
            for block in self.waiting:
                block.result()


def write_array(file: Path, array: np.ndarray) -> None:
    write_whole(file, lambda partial: partial.write_bytes(to_npy(array)))


def write_png(file: Path, image: Image.Image) -> None:
    """Not by `write_whole`, whose flushing takes longer than all else here: `is_whole_png` tells what was cut off.

    Raises UserError where it cannot be written.
    """
    try:
        image.save(file)
    except OSError as error:
        raise UserError(f"cannot write {file} ({error.strerror or error}): make room, or choose another --sample-dir") from error


def write_outputs(folder: SampleFolder, labels: np.ndarray) -> None:
    """Main process, after all blocks: grid.png, class_tokens.npz and, last, samples.npz, with the images' labels (N,)."""
    files = [folder.block_file(BLOCKS, block) for block in folder.blocks]
    first = np.concatenate([np.load(file) for file in files[:-(-GRID_IMAGES // len(folder.blocks[0]))]])[:GRID_IMAGES]
    grid = to_pil_image(make_grid(torch.from_numpy(first).permute(0, 3, 1, 2), nrow=GRID_COLUMNS))             # (3, rows, columns)
    write_whole(folder.path / "grid.png", lambda partial: grid.save(partial, "png"))
    if folder.token_width is not None:
        tokens = np.concatenate([np.load(folder.block_file(TOKEN_BLOCKS, block)) for block in folder.blocks])  # (N, E)
        write_npz(folder.class_tokens, (), 0, (0, 0), class_tokens=tokens, labels=labels)
    write_npz(folder.samples, map(np.load, tqdm(files, desc="npz", unit="block")), folder.count, first.shape[1:3], arr_1=labels)


def finish(folder: SampleFolder, made: list[range]) -> None:
    """Main process, when samples.npz is there: remove the blocks, and mend the PNG files of all that this run has not `made`.

    Raises UserError where a PNG file cannot be written.
    """
    for part in (BLOCKS, TOKEN_BLOCKS):                           # a run killed here leaves some
        if (folder.path / part).exists():
            shutil.rmtree(folder.path / part)
    if folder.png:
        sure = set(made)
        mend_pngs(folder, [index for block in folder.blocks if block not in sure for index in block])


def mend_pngs(folder: SampleFolder, indices: list[int]) -> None:
    """Write those PNG files of `indices` that are not whole, from samples.npz. Raises UserError where it cannot."""
    broken = [index for index in indices if not is_whole_png(folder.png_file(index))]
    if not broken:
        return
    images = open_images(folder.samples, least=1)
    require_room(folder, len(broken) * (np.prod(images.size) * 3 + PNG_MORE))
    make_folder(folder.path / IMAGES)
    notice(f"{len(broken)} PNG files are not there or cut off: they are written from samples.npz")
    for index, image in zip(broken, pick(images, broken), strict=True):
        write_png(folder.png_file(index), to_pil_image(image))
