"""Files that are whole or absent, and what identifies them."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from models.errors import UserError


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary path beside it)` and rename, so that `path` is whole or absent. Raises UserError where it cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}): make room, or choose another folder") from error
    finally:
        if partial.is_file():
            partial.unlink()


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
