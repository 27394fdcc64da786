"""What was found out about a large store of files, kept in a cache so that it need not be found out again.

To list a million files and to parse their labels takes half a minute, to look whether they changed takes milliseconds. An index is some
numpy arrays together with the stamps of every folder and file that they follow from; it counts while all of these are as they were.

Noticed: a file or folder added, removed or renamed anywhere in the store (which changes the folder that holds it), dataset.json or a
zip written or replaced, by whatever means, since the system's own time of change (ctime) and the inode are looked at, which nobody sets.
Not noticed: a change to what a file in a folder contains; an index does not depend on it, files are read anew each time. Nor anything
where a file system invents the times of its folders, as mounted object stores may: give XDG_CACHE_HOME a new folder after a change there.
Nor that a mounted image whose times were all set to one number was replaced by another image of the same names' sizes and inodes.
"""

import functools
import hashlib
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path

import numpy as np

from runtime.files import UNREADABLE, write_whole
from runtime.messages import UserError, notice

FORMAT = 1          # part of an index's name: raise it when arrays or their meaning change
WORTHWHILE = 10_000  # entries; fewer are listed in no time
MOST = 16           # indices that stay, those used last: paths are given up, and one of ImageNet takes 0.1 GB
SETTLED = 2.0       # seconds; a clock of files may tick no faster, so that a second change would leave the time of one just now as it is


def folder() -> Path:
    """Where indices are: `reg/index` in XDG_CACHE_HOME, by default ~/.cache. Not beside the data, which many share and few may write."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "reg", "index")


def stamp(path: bytes | str) -> bytes:
    """What changes with a folder's list of names, or with a file's content; b"", which no index holds, where that cannot be relied on:
    it changed just now, or cannot be looked at.

    It is opened, since network disks answer from memory when it is only looked at.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:                                                           # whoever reads it says what is wrong
        return b""
    now, found = time.time_ns(), os.fstat(handle)
    os.close(handle)
    settled = 0 < found.st_ctime_ns <= now - SETTLED * 1e9                    # where a file system keeps no times, they are often 0
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}".encode() if settled else b""


def recall(what: str, root: str | Path) -> dict[str, np.ndarray] | None:
    """The arrays that were kept of `what` about the store `root`, None where there are none or the store has changed since."""
    root = os.path.realpath(root)
    file = _file(what, root, stamp(root))
    try:
        with open(file, "rb") as stream:
            kept = np.load(stream, allow_pickle=False)
            if any(stamp(_path(root, name)) != was for name, was in zip(kept["seen"].tolist(), kept["stamps"].tolist(), strict=True)):
                return None
            arrays = {name: kept[name] for name in kept.files}                # each is held against its checksum
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UNREADABLE as error:
        notice(f"the index {file} of {root} cannot be read ({error}) and is made again")
        return None
    with suppress(OSError):
        os.utime(file)                                                        # used last
    return arrays


def keep(what: str, root: str | Path, seen: dict[bytes, bytes], arrays: dict[str, np.ndarray]) -> None:
    """Keep `arrays` for `recall`. `seen`: every folder and file they follow from, by its path in `root` (b"" for itself), with the stamp
    it had before it was read.

    Nothing is kept of what changed just now. A cache that cannot be written is said, and no fault. Of the processes on a machine the
    first one writes.
    """
    if b"" in seen.values() or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    root = os.path.realpath(root)
    file = _file(what, root, seen[b""])
    everything = {**arrays, "seen": np.array(list(seen), dtype=bytes), "stamps": np.array(list(seen.values()), dtype=bytes)}

    def write(partial: Path) -> None:
        with open(partial, "wb") as stream:
            np.savez(stream, **everything)

    own = file.with_name(f"{uuid.uuid4().hex}.npz")                           # others may be writing the same one
    try:
        write_whole(own, write)
        os.replace(own, file)
        _remove_oldest(file.parent)
    except (OSError, UserError) as error:
        cause = error.__cause__ or error
        _say_once(f"no index can be kept in {file.parent} ({getattr(cause, 'strerror', None) or cause}), without which a large data set "
                  "takes as long to open the next time: make room, or set XDG_CACHE_HOME")


_say_once = functools.cache(notice)


def _file(what: str, root: str, root_stamp: bytes) -> Path:
    """The index's file. The root's stamp is in its name, as machines that share a cache may each have other data at the same path."""
    return folder() / f"{hashlib.sha256(repr((FORMAT, what, root, root_stamp)).encode()).hexdigest()[:32]}.npz"


def _path(root: str, name: bytes) -> bytes:
    return os.path.join(os.fsencode(root), name) if name else os.fsencode(root)


def _remove_oldest(place: Path) -> None:
    """Leave the MOST files that were used last."""
    used = {}
    for file in place.iterdir():
        with suppress(OSError):                                               # another process was faster
            used[file] = file.stat().st_mtime_ns
    for file in sorted(used, key=used.get, reverse=True)[MOST:]:
        file.unlink(missing_ok=True)
