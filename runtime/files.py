"""Files that are whole or absent, and what identifies them."""

import hashlib
import io
import lzma
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from runtime.messages import UserError

# What Pillow, numpy and zipfile raise on damaged bytes.
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, OverflowError, MemoryError, RuntimeError, struct.error,
              zlib.error, lzma.LZMAError, tokenize.TokenError, zipfile.BadZipFile)


def to_npy(array: np.ndarray) -> bytes:
    """The bytes of an npy file. (Into a file itself, np.save does not tell what a full disk did not take.)"""
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary path beside it)`, flush to the disk and rename, so that `path` is whole or absent, even after a power cut.

    Raises UserError where it cannot be written; what was there before is then untouched.
    """
    partial = partial_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        _flush(partial)
        os.replace(partial, path)
        with suppress(OSError):                                   # some network disks refuse it for folders
            _flush(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): make room, or choose another folder") from error
    finally:
        if partial.is_file():
            partial.unlink()


def partial_name(path: Path) -> Path:
    """The temporary file beside `path`; a killed process may leave it."""
    return path.with_name(f".{path.name}.partial")


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> Path:
    """Create a folder with its parents; raises UserError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {path} ({error.strerror}): choose another") from error
    return path


def sha256(path: Path) -> str:
    """The file's SHA-256, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
