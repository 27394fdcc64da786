"""An experiment on disk: whole checkpoints, the newest of them, a lock, and what is kept."""

import argparse
import contextlib
import fcntl
import itertools
import json
import re
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch

from runtime.files import make_folder, partial_name, write_whole
from runtime.messages import UserError, notice, say

CHECKPOINTS = "checkpoints"
ASIDE = ".aside"  # ends the names of checkpoints that a run has gone back behind


def checkpoint_path(experiment: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies, in REPA's spelling."""
    return experiment / CHECKPOINTS / f"{step:07d}.pt"


def saved(experiment: Path) -> dict[int, Path]:
    """The checkpoints of `experiment` by their steps, in order."""
    found = {int(p.stem): p for p in (experiment / CHECKPOINTS).glob("*.pt") if re.fullmatch(r"\d{7,}", p.stem)}
    return dict(sorted(found.items()))


def newest(experiment: Path) -> Path | None:
    """The checkpoint of `experiment` with the highest step, or None."""
    return next(reversed(saved(experiment).values()), None)


def find(path: str | Path) -> Path:
    """A checkpoint file as named, or the newest one of an experiment folder; raises UserError when there is none."""
    path = Path(path)
    if path.is_dir():
        found = newest(path)
        if found is None:
            raise UserError(f"no checkpoint below {path / CHECKPOINTS}: name a .pt file or an experiment folder that holds one")
        return found
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: name a .pt file or an experiment folder")
    return path


class Damaged(UserError):
    """A file that is not what was written. (One that cannot be read just now is another matter.)"""


def save(experiment: Path, state: dict) -> Path:
    """Write the checkpoint of `state["steps"]` whole, and return its path. Raises UserError where it cannot be written."""
    path = checkpoint_path(experiment, state["steps"])

    def write(partial: Path) -> None:
        try:
            torch.save(state, partial)
        except RuntimeError as error:             # what PyTorch's zip writer makes of every failure
            raise OSError("not all of it could be written, as on a full disk") from error

    write_whole(path, write)
    return path


class Saver:
    """Writes an experiment's checkpoints in a thread, one at a time, and removes those that are not to be kept.

    The newest `keep_last` stay (0: all), and of the others those whose step is a multiple of `keep_every` (0: none). Nothing is
    removed before the newer one is whole.
    """

    def __init__(self, experiment: Path, keep_last: int = 0, keep_every: int = 0):
        """Raises UserError where another process is training the experiment."""
        self.experiment, self.keep_last, self.keep_every = make_folder(experiment), keep_last, keep_every
        self._lock = _lock(experiment)
        self.failure: UserError | None = None     # of the last write
        self._state: dict | None = None           # what is being written, or could not be
        self._thread = threading.Thread()
        for partial in (experiment / CHECKPOINTS).glob(partial_name(Path("*.pt")).name):
            partial.unlink()                      # of a run that was killed while it wrote

    def start(self, state: dict) -> None:
        """Begin to write what `capture` returned, after the one before is done."""
        self.wait()
        self._state = state
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        before = self.failure
        try:
            path = save(self.experiment, self._state)
            for old in self._superseded():
                old.unlink()
        except Exception as error:                # whatever it is must reach the run, which is in another thread
            self.failure = error if isinstance(error, UserError) else UserError(f"cannot write a checkpoint: {error!r}")
            if before is None:
                notice(f"warning: {self.failure}; training goes on and tries again at every log line, older checkpoints are untouched")
        else:
            self._state = self.failure = None
            say(f"saved {path}")

    def _superseded(self) -> list[Path]:
        if self.keep_last == 0:
            return []
        older = list(saved(self.experiment).items())[:-self.keep_last]
        return [path for step, path in older if not self.keep_every or step % self.keep_every]

    def wait(self) -> None:
        """Until nothing is being written; `failure` then tells how the last write went."""
        if self._thread.ident is not None:
            self._thread.join()

    def finish(self) -> None:
        """Until the last one is whole, which is tried once more if it has failed. Raises UserError when that fails, too."""
        self.wait()
        if self.failure is not None:
            self.start(self._state)
            self.wait()
        if self.failure is not None:
            raise self.failure


def _lock(experiment: Path) -> IO:
    """Keeps others from writing to this experiment until the file is closed, by whatever ends this process."""
    file = open(experiment / ".lock", "a")        # noqa: SIM115  (stays open)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)                          # not inherited by loader workers, unlike flock
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process is training {experiment}: wait until it ends, or use another --exp-name") from None
    except OSError as error:
        notice(f"{experiment} lies on a disk without locks ({error.strerror}): take care that nothing else trains it")
    return file


def save_args(experiment: Path, args: dict) -> None:
    """Write the settings beside the checkpoints, for people."""
    write_whole(experiment / "args.json", lambda partial: partial.write_text(json.dumps(args, indent=2) + "\n"))


def read_file(path: Path, mmap: bool) -> dict:
    """Read a checkpoint without running anything in it (`weights_only`); an argparse.Namespace in it becomes a dict.

    The file is read through once for its checksums. With `mmap` tensors stay on disk until they are used, so a sampler needs no memory
    for the optimiser state; without it they are the caller's own, whatever becomes of the file.
    Raises UserError when the file is missing or cannot be read now, and Damaged when it is no whole checkpoint.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()       # torch.load does not look at the checksums
                if damaged is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    except (OSError, MemoryError) as error:
        raise UserError(f"{path} cannot be read now ({error!r}): give the same command again when it can") from error
    except Exception as error:                    # a file that is no checkpoint can make the unpickler raise anything
        raise Damaged(f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is damaged or holds more than weights; "
                        "use another file, or delete it") from error
    if not isinstance(state, dict) or not state:
        raise Damaged(f"{path} holds a {type(state).__name__}, not a checkpoint: name a .pt file of REG, REPA or this program")
    if isinstance(state.get("args"), argparse.Namespace):
        state["args"] = vars(state["args"])
    return state


def resumable(experiment: Path, resume: str, read: Callable) -> tuple[Path, dict] | None:
    """The checkpoint to go on from and its content, or None for a new run.

    `resume` is "auto": the newest one that is whole, with a warning where newer ones are damaged; "none": a new run; or a file. A run
    goes back to a file once: given the same `resume` again, it goes on from what it has saved since.
    Raises UserError when nothing that is there can be read, or when "none" would write among the checkpoints of another run.
    """
    there = saved(experiment)
    if resume == "none":
        if there:
            raise UserError(f"--resume none came, but {experiment / CHECKPOINTS} holds {len(there)} checkpoints up to step {max(there)}: "
                            "use another --exp-name, or remove them")
        return None
    if resume == "auto":
        return _newest_whole(there, read) if there else None
    with contextlib.suppress(Damaged):            # if all are, the file is the remedy
        since = _newest_whole(there, read) if there else None
        if since is not None and since[1].get("args", {}).get("resume") == resume:
            return since
    path = find(resume)
    if there and not path.parent.samefile(experiment / CHECKPOINTS):
        raise UserError(f"--resume {resume} came, but {experiment} holds checkpoints of its own: use another --exp-name")
    return path, read(path, mmap=False)


def _newest_whole(there: dict[int, Path], read: Callable) -> tuple[Path, dict]:
    damaged = []
    for path in reversed(there.values()):
        try:
            state = read(path, mmap=False)
        except Damaged:
            damaged.append(path)
            continue
        if damaged:
            notice(f"warning: {', '.join(map(str, damaged))} cannot be read and is passed over: going on from {path}")
        return path, state
    raise Damaged(f"none of the checkpoints can be read ({', '.join(map(str, damaged))}): remove them to start afresh, "
                  "or use another --exp-name")


def set_aside(experiment: Path, step: int) -> None:
    """Rename the checkpoints after `step`, where a run goes on: the same command must not take them for its own later."""
    for later, path in saved(experiment).items():
        if later > step:
            aside = next(name for i in itertools.count() if not (name := path.with_name(f"{path.name}{ASIDE}{i or ''}")).exists())
            path.rename(aside)
            notice(f"the run goes on at step {step}: {path} is renamed to {aside.name}, and may be removed")
