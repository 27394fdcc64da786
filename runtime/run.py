"""An experiment on disk, and the steps of a run.

OUTPUT_DIR/EXP/args.json                  the settings, for people
OUTPUT_DIR/EXP/checkpoints/0400000.pt     what models/checkpoint.py describes
OUTPUT_DIR/EXP/metrics.jsonl              one line per log interval (runtime/log.py)
"""

import argparse
import contextlib
import datetime
import itertools
import pathlib
import re
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from runtime.files import lock, remove_partials, write_json, write_whole
from runtime.log import Log, Meter, start_tracker
from runtime.messages import UserError, notice, say
from runtime.stopping import StopRequest
from runtime.stores import shown

CHECKPOINTS = "checkpoints"
ASIDE = ".aside"     # ends the names of checkpoints later than the one a run has gone back to
# Harmless types that the settings in a checkpoint may have beside torch's own, under the names that files give them.
PLAIN = [argparse.Namespace, dict, list, int, datetime.datetime, datetime.date, datetime.timedelta, datetime.timezone,
         pathlib.PurePosixPath, *((pathlib.PurePosixPath, f"pathlib{module}.PosixPath") for module in ("", "._local")),
         *((pathlib.PureWindowsPath, f"pathlib{module}.WindowsPath") for module in ("", "._local")),
         np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
         *((lambda dtype, data: np.frombuffer(data, dtype, 1)[0], f"numpy.{core}.multiarray.scalar")
           for core in ("core", "_core")),
         (lambda *factory: {}, "collections.defaultdict")]


class Damaged(UserError):
    """A file that is not what was written. (A file that cannot be read just now is a plain UserError.)"""


class Run:
    """The steps from `start` to `last`, and the table of what is due after a step."""

    def __init__(self, start: int, last: int, stop: StopRequest):
        self.step, self.last, self.stop = start, last, stop
        self.meter = Meter()
        self.due: list[tuple[tuple[int, ...], Callable[[int], None], str]] = []
        self.fetch: Callable[[], None] = lambda: None
        self.rescue: Callable[[int], None] = lambda step: None

    def every(self, periods: tuple[int, ...], action: Callable[[int], None], optional: str = "") -> None:
        """Call `action(step)` after each step that a number in `periods` divides (0: never), and after the last one.

        `optional`: the flag that leaves the action out; so does a signal, so that the run can save.
        """
        periods = tuple(period for period in periods if period)
        if periods:
            self.due.append((periods, action, optional))

    def read_ahead(self, batches: Iterator, count: int) -> Iterator:
        """Pass `batches` on; `steps` reads the `count` of a step before all ranks agree to take it."""
        ahead = deque()
        self.fetch = lambda: ahead.extend(itertools.islice(batches, count))
        return iter(ahead.popleft, None)

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to take, to `last`. All ranks end at the same step after a signal or failed read."""
        while self.step < self.last:
            try:
                self.fetch()
            except Exception as error:                            # whatever it is: the state is whole and can be saved
                self.stop.failure = error
            if self.stop.agreed():
                return
            yield self.step + 1

    def after(self, step: int) -> None:
        """Do what is due after `step`, in the order of the table. The meter's images per second count training only.

        Where that fails, `rescue(step)` saves what the run has, without waiting for other ranks.
        """
        self.step, self.stop.progress = step, True
        for periods, action, optional in self.due:
            due = step == self.last or any(step % period == 0 for period in periods)
            if due and not (optional and step < self.last and self.stop.agreed()):
                try:
                    self.meter.pause(action, step)
                except Exception as error:                        # whatever it is: the state is whole
                    self.rescue(step)
                    if optional and isinstance(error, UserError):
                        raise type(error)(f"step {step}: {error}; or give {optional} 0") from error
                    raise

    @property
    def interrupted(self) -> bool:
        """Whether a signal or a failed read ended `steps` before the last one."""
        return self.step < self.last


# ----------------------------------------------------------------------------------------------------------- the folder

def checkpoint_path(experiment: Path, step: int) -> Path:
    """The checkpoint file of `step`, in REPA's spelling."""
    return experiment / CHECKPOINTS / f"{step:07d}.pt"


def saved(experiment: Path) -> dict[int, Path]:
    """The checkpoints of `experiment` by step, in order."""
    found = {int(p.stem): p for p in (experiment / CHECKPOINTS).glob("*.pt") if re.fullmatch(r"\d{7,}", p.stem)}
    return dict(sorted(found.items()))


def newest(experiment: Path) -> Path | None:
    """The checkpoint of `experiment` with the highest step, or None."""
    return next(reversed(saved(experiment).values()), None)


def find(path: str | Path) -> Path:
    """The checkpoint file `path`, or the newest one of the experiment folder `path`.

    Raises UserError if there is none.
    """
    path = Path(path)
    if path.is_dir():
        found = newest(path)
        if found is None:
            raise UserError(f"{path}: no checkpoint in {CHECKPOINTS}/; name a .pt file or an experiment folder")
        return found
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; name a .pt file or an experiment folder")
    return path


@contextlib.contextmanager
def open_folder(folder: Path, run: Run, settings: dict, accelerator: Accelerator) -> Iterator[Log | None]:
    """Lock the experiment, cut it back to the run's start, start log and tracker; yield the log (first process).

    Raises UserError if another process trains it, or if the processes do not see the same checkpoints.
    """
    starts = accelerator.gather(torch.tensor([run.step], device=accelerator.device)).tolist()
    if len(set(starts)) > 1:
        raise UserError(f"{folder}: the processes would start at steps {starts}; use a disk that all nodes share")
    with lock(folder, "use another --exp-name") if accelerator.is_main_process else contextlib.nullcontext():
        log = None
        if accelerator.is_main_process:
            remove_partials(folder, folder / CHECKPOINTS, folder / "grids")
            set_aside(folder, run.step)
            log = Log(folder / "metrics.jsonl", run.step)
            if run.interrupted:
                write_json(folder / "args.json", settings)
            else:
                say(f"nothing to do: {folder} has its {run.last} steps; raise --max-train-steps to go on")
        start_tracker(accelerator, folder, settings["report_to"], settings)
        yield log


# ----------------------------------------------------------------------------------------------------- reading, writing

def save(experiment: Path, state: dict) -> Path:
    """Write the checkpoint of `state["steps"]` atomically.

    Raises UserError if that fails, or if the weights are not finite; older checkpoints stay.
    """
    path = checkpoint_path(experiment, state["steps"])
    if not all(weight.isfinite().all() for part in ("model", "ema") for weight in state[part].values()):
        raise UserError(f"{path}: not written, as the weights are not finite; go on from an older checkpoint, or start "
                        "again, with a lower --learning-rate")

    def write(partial: Path) -> None:
        try:
            torch.save(state, partial)
        except RuntimeError as error:                             # what PyTorch's zip writer makes of every failure
            raise OSError("the disk is full, or the write failed") from error

    write_whole(path, write)
    say(f"saved {path}")
    return path


def prune(experiment: Path, keep_last: int, keep_every: int) -> None:
    """Remove checkpoints but the newest `keep_last` (0: keep all) and those of every `keep_every` steps (0: none)."""
    older = list(saved(experiment).items())[:-keep_last] if keep_last else []
    for step, path in older:
        if not keep_every or step % keep_every:
            path.unlink()


def read_file(path: Path, mmap: bool = True) -> dict:
    """Read a file of torch.save without running code in it (`weights_only`); settings may hold the types of PLAIN.

    The file is read once for its checksums. With `mmap` tensors stay on disk until they are used.
    Raises UserError if the file cannot be read now, and Damaged if it is not a whole checkpoint, or holds more.
    """
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                    raise zipfile.BadZipFile("it inflates")       # torch.save compresses nothing
                damaged = archive.testzip()                       # torch.load does not look at the checksums
                if damaged is not None:
                    raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        with torch.serialization.safe_globals(PLAIN):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    except (OSError, MemoryError) as error:
        raise UserError(f"{path}: cannot be read now ({error!r}); give the same command again later") from error
    except Exception as error:                                    # the unpickler raises anything on other files
        raise Damaged(f"{path}: cannot be read as a checkpoint ({type(error).__name__}): damaged, or more than weights"
                      f"{_more_than_weights(path)}; use another file, or one with tensors and plain settings alone"
                      ) from error
    if not isinstance(state, dict) or not state:
        raise Damaged(f"{path}: holds a {type(state).__name__}, no checkpoint; name a .pt file of "
                      "REG, REPA or this program")
    return state


def _more_than_weights(path: Path) -> str:
    """The names of what `read_file` refuses in a file, for its message."""
    try:
        with torch.serialization.safe_globals(PLAIN):
            found = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:                                             # no zip, or no pickle in it
        return ""
    return f" ({shown(', '.join(found))[:200]})" if found else ""


def resumable(experiment: Path, resume: str, read: Callable[..., dict]) -> tuple[Path, dict] | None:
    """The checkpoint to go on from and its content, or None for a new run.

    `resume`: "auto", the newest whole one (a warning names damaged newer ones); "none", a new run; or a file. A run
    goes back to a file once: the same command again goes on from what it has saved since.
    `read(path, mmap=)` reads a file.
    Raises UserError if none can be read, or if "none" would write among the checkpoints of another run.
    """
    there = saved(experiment)
    if resume == "none":
        if there:
            raise UserError(f"--resume none: {experiment / CHECKPOINTS} holds checkpoints up to step {max(there)}; use "
                            "another --exp-name, or remove them")
        return None
    if resume == "auto":
        return _newest_whole(there, read) if there else None
    with contextlib.suppress(Damaged):                            # if all are, the file is the remedy
        since = _newest_whole(there, read) if there else None
        if since is not None and since[1].get("args", {}).get("resume") == resume:
            return since
    path = find(resume)
    if there and not path.parent.samefile(experiment / CHECKPOINTS):
        raise UserError(f"--resume {resume}: {experiment} holds checkpoints of its own; use another --exp-name")
    return path, read(path, mmap=False)


def _newest_whole(there: dict[int, Path], read: Callable[..., dict]) -> tuple[Path, dict]:
    damaged = []
    for path in reversed(there.values()):
        try:
            state = read(path, mmap=False)
        except Damaged:
            damaged.append(str(path))
            continue
        if damaged:
            notice(f"warning: {', '.join(damaged)} cannot be read; going on from {path}")
        return path, state
    raise Damaged(f"{', '.join(damaged)}: no checkpoint can be read; remove them to start again, "
                  "or use another --exp-name")


def set_aside(experiment: Path, step: int) -> None:
    """Rename the checkpoints after `step`, where a run goes on, so that they are not resumed later."""
    for later, path in saved(experiment).items():
        if later > step:
            names = (path.with_name(f"{path.name}{ASIDE}{i or ''}") for i in itertools.count())
            aside = next(name for name in names if not name.exists())
            path.rename(aside)
            notice(f"going on at step {step}: {path} is renamed to {aside.name}, and may be removed")
