"""A folder of numbered blocks of images that can be continued. Every file is written atomically.

    settings.json   how the images were made; a folder holds images of one setting only
    blocks/         00000064.npy: a block of images, uint8 (B, R, R, 3), named by its first index; removed at the end
    NAME/           the same for another array of which each image has a row, (B, ...)
    NAME.npz        that array (N, ...) and the labels (N,), if the images show labels
    captions.jsonl  of captions: a line for each image, {"index": 0, "caption": "..."}
    grid.png        the first images, with their captions
    samples.npz     images and labels in ADM's form, the last of the arrays
    images/         000064.png by index, exported from samples.npz
    geneval/        00016/samples/0000.png by prompt and image, and 00016/metadata.jsonl, on request
    metrics*.json   scores, written by others; removed before the samples are made again
"""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import AcquireReturnProxy
from PIL import Image
from tqdm import tqdm

from runtime.files import lock, make_folder, read_object, remove_partials, require_room, to_npy, write_json, write_whole
from runtime.launch import blocks
from runtime.messages import UserError
from runtime.npz import read_npz_rows, read_npz_shape, write_npz
from runtime.pictures import grid_of

SETTINGS, METRICS = "settings.json", "metrics*.json"
CAPTIONS, GENEVAL = "captions.jsonl", "geneval"
GRID_IMAGES, GRID_COLUMNS = 64, 8
PNG_EXTRA = 4096                          # bytes by which a PNG file may exceed its pixels, rounded up by the disk
PNG_THREADS, PNG_AT_ONCE = 8, 256


@dataclass
class SampleFolder:
    """N = `count` images in blocks of B = `block_size`, of which the last may be smaller."""

    path: Path
    count: int
    block_size: int
    parts: dict[str, np.dtype]            # what a block holds of each image: "images" and other arrays, by name
    png: bool                             # whether PNG files are wanted
    _lock: AcquireReturnProxy | None = None

    @property
    def blocks(self) -> list[range]:
        """The image indices of each block."""
        return blocks(self.count, self.block_size)

    def npz(self, part: str = "images") -> tuple[Path, str]:
        """The file that a part's blocks become, and the array's name in it."""
        return self.path / f"{'samples' if part == 'images' else part}.npz", "arr_0" if part == "images" else part

    def block_folder(self, part: str) -> Path:
        return self.path / ("blocks" if part == "images" else part)

    def block_file(self, part: str, block: range) -> Path:
        return self.block_folder(part) / f"{block.start:08d}.npy"

    def png_file(self, index: int) -> Path:
        return self.path / "images" / f"{index:06d}.png"

    def missing(self, same: bool) -> list[range] | None:
        """The blocks to make, or None if samples.npz is finished. `same`: the folder's settings are the wanted ones.

        Writes nothing. Raises UserError if the disk is too small for the rest.
        """
        finished = same and all(self._is_finished(part) for part in self.parts)
        png = self.parts["images"].itemsize + PNG_EXTRA
        if finished:
            need = png * len(self._missing_png())
        else:                             # blocks and npz files exist together
            there = sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())
            need = self.count * (2 * sum(row.itemsize for row in self.parts.values()) + png * self.png) - there
        require_room(self.path, need, "free some, choose another folder" + ", or make no PNG files" * self.png)
        return None if finished else [block for block in self.blocks if not (same and self._is_whole(block))]

    def _is_finished(self, part: str) -> bool:
        row = self.parts[part]
        try:
            return read_npz_shape(*self.npz(part)) == ((self.count, *row.shape), row.base)
        except UserError:                 # missing or damaged
            return False

    def _is_whole(self, block: range) -> bool:
        """Whether all files of a block have its rows, by their headers and lengths."""
        try:
            found = [np.lib.format.open_memmap(self.block_file(part, block), mode="r") for part in self.parts]
        except (OSError, ValueError):     # missing, cut off, or not an npy file
            return False
        return all((array.dtype, array.shape) == (row.base, (len(block), *row.shape))
                   for array, row in zip(found, self.parts.values(), strict=True))

    def _missing_png(self) -> list[int]:
        folder = self.path / "images"
        there = {entry.name for entry in os.scandir(folder) if entry.stat().st_size} if folder.is_dir() else set()
        return [index for index in range(self.count) if self.png and self.png_file(index).name not in there]

    def begin(self, settings: dict, keep: bool) -> None:
        """One process, before the blocks: lock the folder and remove what they replace.

        Unless blocks are kept, write the settings. Raises UserError if another process writes the folder, or
        has just finished it.
        """
        self._lock = lock(self.path, "give another --sample-dir")
        same = keep or read_object(self.path / SETTINGS) == json.loads(json.dumps(settings))
        if same and all(self._is_finished(part) for part in self.parts):
            raise UserError(f"{self.path}: another process has just written it; give the same command again")
        for stale in (file for name in (METRICS, "*.npz", CAPTIONS, "grid.png") for file in self.path.glob(name)):
            stale.unlink()
        remove_partials(self.path)
        kept = {self.block_folder(part) for part in self.parts} if keep else set()
        old = (file.parent for file in self.path.glob("*/[0-9]*.npy"))
        for folder in {self.path / "images", self.path / GENEVAL, *old} - kept:
            shutil.rmtree(folder, ignore_errors=True)
        if not keep:                      # last: the old settings stay until nothing made with them is left
            write_json(self.path / SETTINGS, settings)

    def write_block(self, block: range, **arrays: np.ndarray) -> None:
        """Any process: write each part's rows of a block (B, ...)."""
        for part in self.parts:
            data = to_npy(arrays[part])
            write_whole(self.block_file(part, block), lambda partial, data=data: partial.write_bytes(data))

    def finish(self, shown: list[int] | list[str]) -> None:
        """One process, after all blocks: write the npz files and grid.png; `shown`: the labels or captions, N."""
        def load(part: str, count: int = self.count):
            return (np.load(self.block_file(part, block)) for block in self.blocks if block.start < count)

        captions = shown if isinstance(shown[0], str) else None
        labels = None if captions else np.array(shown)                                            # (N,)
        if captions:
            lines = [json.dumps({"index": i, "caption": text}, ensure_ascii=False) for i, text in enumerate(captions)]
            write_whole(self.path / CAPTIONS, lambda partial: partial.write_text("\n".join([*lines, ""]), "utf-8"))
        for part in [part for part in self.parts if part != "images"]:
            write_npz(self.npz(part)[0], (), 0, (0, 0), **{part: np.concatenate(list(load(part))), "labels": labels})
        first = torch.from_numpy(np.concatenate(list(load("images", GRID_IMAGES)))[:GRID_IMAGES])   # (64, R, R, 3)
        grid = grid_of(first.permute(0, 3, 1, 2), GRID_COLUMNS, captions and captions[:GRID_IMAGES])
        write_whole(self.path / "grid.png", lambda partial: grid.save(partial, "png"))
        images = tqdm(load("images"), desc="npz", unit="block", total=len(self.blocks))
        write_npz(self.npz()[0], images, self.count, first.shape[1:3], arr_1=labels)

    def export(self, geneval: tuple[list[str], int] | None = None) -> None:
        """One process, once samples.npz is finished: remove the blocks, write missing PNG files, unlock the folder.

        `geneval`: the lines of GenEval's file of prompts (JSON), and the images of each, for its folders.
        """
        for part in self.parts:
            shutil.rmtree(self.block_folder(part), ignore_errors=True)
        missing = set(self._missing_png())
        if missing or geneval is not None:
            self._lock = lock(self.path, "give another --sample-dir")
        if missing:
            self._export(missing)
        if geneval is not None:
            self._export_geneval(*geneval)
        if self._lock is not None:
            (self.path / ".lock").unlink(missing_ok=True)
            self._lock.lock.release(force=True)

    def _export_geneval(self, prompts: list[str], per_prompt: int) -> None:
        rows = read_npz_rows(self.npz()[0], blocks(self.count, per_prompt))               # (per_prompt, R, R, 3) each
        for number, (line, images) in enumerate(zip(prompts, rows, strict=True)):
            folder = self.path / GENEVAL / f"{number:05d}"
            make_folder(folder / "samples")
            for i, image in enumerate(images):
                _write_png(folder / "samples" / f"{i:04d}.png", image)
            write_whole(folder / "metadata.jsonl", lambda partial, line=line: partial.write_bytes(line.encode()))

    def _export(self, missing: set[int]) -> None:
        make_folder(self.path / "images")
        needed = [block for block in blocks(self.count, PNG_AT_ONCE) if not missing.isdisjoint(block)]
        with ThreadPoolExecutor(PNG_THREADS) as pool:
            for block, images in zip(tqdm(needed, desc="png", unit="block"), read_npz_rows(self.npz()[0], needed),
                                     strict=True):
                wanted = [index for index in block if index in missing]
                list(pool.map(_write_png, map(self.png_file, wanted), (images[i - block.start] for i in wanted)))


def _write_png(file: Path, image: np.ndarray) -> None:
    """Write a PNG file without `write_whole`, whose flushing takes longer than all else for small files."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        Image.fromarray(image).save(partial, "png")
        os.replace(partial, file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror or error}); free some room") from error

