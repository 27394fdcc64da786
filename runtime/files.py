"""Files that are whole or absent, locks of folders, what identifies a file, and room on the disk."""

import contextlib
import errno
import glob
import hashlib
import io
import json
import lzma
import os
import shutil
import struct
import time
import tokenize
import uuid
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import AcquireReturnProxy, FileLock, Timeout

from runtime.messages import MayPass, UserError

# What Pillow, numpy and zipfile raise on damaged bytes.
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, OverflowError, MemoryError,
              RuntimeError, struct.error, zlib.error, lzma.LZMAError, tokenize.TokenError, zipfile.BadZipFile)
# Errors of a network disk that may pass, and the seconds before a read is tried again.
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO, errno.ENETDOWN, errno.ENETUNREACH,
           errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.ECONNRESET}
READ_PAUSES = (1, 3)
LOCK_PATIENCE = 10  # seconds; the loader workers of a killed program hold its lock for up to five
DAY = 86_400        # seconds; a temporary file without a change for so long is of a killed writer


def read_patiently(read: Callable[[], bytes], where: str) -> bytes:
    """`read()`, tried three times where the error may pass. Raises UserError naming `where`, or then MayPass."""
    for pause in (*READ_PAUSES, None):
        try:
            return read()
        except OSError as error:
            passing = error.errno in PASSING
            if not passing or pause is None:
                raise (MayPass if passing else UserError)(f"{where}: cannot be read ({error.strerror})") from error
            time.sleep(pause)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file atomically: `write(temporary path beside it)`, flush to the disk, rename.

    `path` is whole or absent, even after a power cut. Raises UserError if it cannot be written; an old file stays.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")      # two processes may write one file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_partials(path.parent, name=glob.escape(path.name), age=DAY)
        write(partial)
        _flush(partial)
        os.replace(partial, path)
        with contextlib.suppress(OSError):                        # some network disks refuse it for folders
            _flush(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); make "
                        "room, or choose another folder") from error
    finally:
        if partial.is_file():
            partial.unlink()


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON, atomically."""
    write_whole(path, lambda partial: partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def read_object(path: Path) -> dict:
    """The object in a JSON file; {} if there is none, or something else in it. Raises UserError as read_patiently."""
    data = read_patiently(path.read_bytes, str(path)) if path.is_file() else b"{}"
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}


def to_npy(array: np.ndarray) -> bytes:
    """The bytes of an npy file. (np.save into a file does not report a full disk.)"""
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def remove_partials(*folders: Path, name: str = "*", age: float | None = None) -> None:
    """Remove temporary files of killed writers of `name`: all in locked folders, or those of an `age` in seconds."""
    for left in (file for folder in folders for file in folder.glob(f".{name}.*.partial")):
        with contextlib.suppress(OSError):
            if age is None or time.time() - left.stat().st_mtime > age:
                left.unlink()


def lock(folder: Path, remedy: str, inside: str = "") -> AcquireReturnProxy:
    """Create and lock a folder that is written over time; until the end of `with`, `.lock.release()` or the process.

    `inside`: the folder in it that holds the lock's file.
    Raises UserError if another process holds the lock, or if there can be none.
    """
    try:
        # One process may lock it more than once: what failed may not be collected yet.
        return FileLock(make_folder(folder / inside) / ".lock", is_singleton=True).acquire(LOCK_PATIENCE)
    except Timeout:
        raise UserError(f"{folder}: another process is writing it; wait for it, or {remedy}") from None
    except (OSError, NotImplementedError) as error:               # the second: a disk without locks
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: cannot be locked ({why}); {remedy}") from error


def _flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> Path:
    """Create a folder with its parents. Raises UserError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: the folder cannot be created ({error.strerror}); choose another") from error
    return path


def require_room(place: Path, need: int, remedy: str) -> int:
    """Return the bytes free on the disk of `place`, which need not exist yet.

    Raises UserError if fewer than `need` are free.
    """
    home = next(path for path in (Path(place), *Path(place).resolve().parents) if path.exists())
    free = shutil.disk_usage(home).free
    if need > free:
        raise UserError(f"{place}: needs {as_size(need)}, {as_size(need - free)} more than are free; {remedy}")
    return free


def as_size(count: int) -> str:
    """Bytes in decimal units, as disks are sold: `505.7 GB`."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count} bytes"


def require_same_settings(found: object, wanted: dict, where: str, remedy: str) -> None:
    """Raise UserError unless `where` was made with the settings `wanted`: equal ones continue, others are refused."""
    wanted = json.loads(json.dumps(wanted))                       # tuples become lists, as in a file
    found = found if isinstance(found, dict) else {}
    other = [name for name in wanted if found.get(name) != wanted[name]]
    if other:
        was, now = (", ".join(f"{name} {made.get(name)}" for name in other) for made in (found, wanted))
        raise UserError(f"{where}: made with {was}, now {now}; {remedy}")


def sha256(path: Path) -> str:
    """The file's SHA-256, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
