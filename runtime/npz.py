"""npz files, read in blocks and written atomically; in ADM's form `arr_0` uint8 (N, H, W, 3) and smaller arrays."""

import contextlib
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from runtime.files import UNREADABLE, write_whole
from runtime.messages import UserError
from runtime.stores import MAX_INFLATED, shown

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def npz_names(path: Path) -> set[str]:
    """Names of the arrays in an npz file. This and all functions below raise UserError for a damaged file."""
    with _opened(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def read_npz_shape(path: Path, name: str = "arr_0") -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array, from its header. Raises UserError if it is missing or has too few bytes."""
    with _opened(path) as archive, archive.open(f"{name}.npy") as member:
        shape, _, dtype = _read_header(member)
        end = member.tell() + math.prod(shape) * dtype.itemsize
        if end > archive.getinfo(f"{name}.npy").file_size and not dtype.hasobject:
            raise EOFError(f"{name} ends before its {shape[0]} rows")
    return shape, dtype


def read_npz_rows(path: Path, ranges: Iterable[range], name: str = "arr_0") -> Iterator[np.ndarray]:
    """Rows (n, ...) of an array for increasing `ranges`. Only one block is in memory, also of a compressed file.

    An array in Fortran order is loaded whole: its rows are not consecutive.
    """
    with _opened(path) as archive, archive.open(f"{name}.npy") as member:
        shape, fortran, dtype = _read_header(member)
        if fortran:
            member.seek(0)
            array = np.lib.format.read_array(member, allow_pickle=False)
            yield from (np.ascontiguousarray(array[r.start:r.stop]) for r in ranges)
            return
        row, position = math.prod(shape[1:]) * dtype.itemsize, 0
        for r in ranges:
            if r.start > position:
                member.seek((r.start - position) * row, os.SEEK_CUR)
            data = member.read(len(r) * row)
            if len(data) < len(r) * row:
                raise EOFError(f"{name} ends within row {r.start + len(data) // row} of {shape[0]}")
            position = r.stop
            yield np.frombuffer(bytearray(data), dtype).reshape(len(r), *shape[1:])   # PyTorch wants it writable


def load_npz(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """The arrays among `names` that the file has. Raises UserError if one inflates to over MAX_INFLATED bytes."""
    arrays = {}
    with _opened(path) as archive:
        for name in names:
            if f"{name}.npy" not in archive.namelist():
                continue
            entry = archive.getinfo(f"{name}.npy")
            if entry.compress_type != zipfile.ZIP_STORED and entry.file_size > MAX_INFLATED:
                raise UserError(f"{shown(path)}: {name} inflates to {entry.file_size} bytes; save it uncompressed")
            with archive.open(f"{name}.npy") as member:
                arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
    return arrays


def write_npz(path: Path, images: Iterable[np.ndarray], count: int, size: tuple[int, int],
              **arrays: np.ndarray | None) -> None:
    """Write `arr_0` uint8 (count, H, W, 3) from a stream of images or blocks, and `arrays`, as one file, atomically.

    With a count of 0 there is no `arr_0`, and arrays that are None are left out. Raises UserError if the file cannot be
    written.
    """

    def write(partial: Path) -> None:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            if count:
                with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *size, 3)}
                    np.lib.format.write_array_header_1_0(member, header)
                    written = sum(member.write(np.ascontiguousarray(image).tobytes()) for image in images)
                    assert written == count * math.prod(size) * 3, f"{written} bytes for {count} images of {size}"
            for name in [name for name in arrays if arrays[name] is not None]:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(arrays[name]), allow_pickle=False)

    write_whole(path, write)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{shown(path)}: not a readable npz file ({shown(str(error))}); make or download it "
                        "again") from error


def _read_header(member) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and dtype of an npy stream, which is left at the first value."""
    version = np.lib.format.read_magic(member)
    if version not in HEADERS:                                    # the others are not used for numbers
        raise ValueError(f"npy version {version}")
    return HEADERS[version](member)
