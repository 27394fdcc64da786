"""The log of a training run: means summed on the device, metrics.jsonl, trackers."""

import json
import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator

from runtime.files import write_whole
from runtime.messages import UserError, notice, say


class Meter:
    """Means between two log lines. Sums stay on the device, so that no step waits for it."""

    def __init__(self):
        self.in_a_row = torch.zeros(())                           # skipped updates up to now
        self._start()

    def _start(self) -> None:
        self.sums, self.updates, self.waited, self.since = {}, [], 0.0, time.perf_counter()

    def add(self, name: str, values: torch.Tensor, where: torch.Tensor | bool = True) -> None:
        """Add `values` to the mean called `name`, those that are finite and selected by `where`."""
        values = values.detach().float()
        counted = values.isfinite() & where
        row = torch.stack([values.where(counted, 0).sum(), counted.sum(), (~values.isfinite()).sum()])
        self.sums[name] = self.sums.get(name, 0) + row            # (3,): sum, count, number of non-finite values

    def add_update(self, norm: torch.Tensor, finite: torch.Tensor) -> None:
        """Add the gradient norm () of an update, and whether it was made (True) or skipped."""
        self.add("grad_norm", norm)
        self.in_a_row = (self.in_a_row.to(norm.device) + 1) * ~finite
        self.updates.append(torch.stack([~finite, self.in_a_row]))

    def timed(self, batches: Iterable) -> Iterator:
        """Pass `batches` on, and count the time spent waiting for them."""
        batches = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(batches)
            self.waited += time.perf_counter() - before
            yield batch

    def pause(self, action: Callable[..., None], *args) -> None:
        """Call `action(*args)` without counting its time as training."""
        since, before = self.since, time.perf_counter()
        action(*args)
        if self.since == since:                                   # else the action has closed the line
            self.since += time.perf_counter() - before

    def read(self, reduce: Callable[[torch.Tensor], torch.Tensor],
             images_per_update: int) -> tuple[dict, list[str], int]:
        """Close the line: means over all ranks, names with non-finite values, longest row of skipped updates.

        `reduce` sums a tensor over the ranks; its one call is the one wait for the device. All ranks must call `read`.
        """
        updates = torch.stack(self.updates).float()               # (updates, 2), equal on all ranks
        local = torch.stack([updates[:, 0].sum(), updates[:, 1].max(), updates.new_tensor(1.0)])           # (3,)
        *rows, (skipped, longest, ranks) = reduce(torch.stack([*self.sums.values(), local])).tolist()
        means = {name: total / n if n else math.nan for name, (total, n, _) in zip(self.sums, rows, strict=True)}
        bad = [name for name, (_, _, broken) in zip(self.sums, rows, strict=True) if broken]
        elapsed = time.perf_counter() - self.since
        means |= {"images_per_second": len(updates) * images_per_update / elapsed, "data_wait": self.waited / elapsed,
                  "skipped_updates": round(skipped / ranks)}
        self._start()
        return means, bad, round(longest / ranks)


class Log:
    """metrics.jsonl of a run that goes on after `step`; later lines are cut off, they will be written again."""

    def __init__(self, path: Path, step: int):
        self.path, self.pending = path, ""
        lines = [line for line in read_lines(path) if line["step"] <= step]
        if path.exists():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))

    def append(self, line: dict) -> None:
        """Write one line; numbers that are not finite become null. On a full disk it is written with the next line."""
        finite = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                  for name, value in line.items()}
        self.pending += json.dumps(finite) + "\n"
        data = self.pending.encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                size = file.tell()
                if file.write(data) < len(data):                  # the disk is full: leave no half line
                    file.truncate(size)
                    raise OSError("no space left")
            self.pending = ""
        except OSError as error:
            notice(f"warning: {self.path} cannot be written ({error.strerror or error}); its "
                   "lines wait for the next one")


def read_lines(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl. A line that was cut off with the run that wrote it is left out."""
    if not path.exists():
        return []
    try:
        texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); remove it, or use another --exp-name") from error
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def write_line(log: Log | None, accelerator: Accelerator, line: dict, shown: Iterable[str]) -> None:
    """Write one line to metrics.jsonl (`log`, first process) and the tracker, and names in `shown` to the terminal."""
    numbers = {name: value for name, value in line.items() if name != "step" and isinstance(value, int | float)}
    track(accelerator, lambda: accelerator.log(numbers, step=line["step"]))
    if log is not None:
        log.append(line)
        numbers = [f"{name} {line[name]:.{'4f' if abs(line[name]) < 1e6 else '3e'}}" for name in shown if name in line]
        say(" · ".join([f"step {line['step']:7d}", *numbers]))


def require_tracker(name: str) -> None:
    """Raise UserError unless the tracker `name` is "none" or installed."""
    if name != "none" and find_spec(name) is None:
        raise UserError(f"--report-to {name}: {name} is not installed; pip install {name}, or use --report-to none")


def track(accelerator: Accelerator, act: Callable[[], None]) -> None:
    """Call `act()`, which uses the tracker. If that fails, say so and use it no more."""
    try:
        act()
    except Exception as error:                                    # not logged in, a full disk, no network, ...
        accelerator.trackers.clear()
        notice(f"warning: the tracker has failed ({type(error).__name__}: {error}); metrics.jsonl goes on without it")


def start_tracker(accelerator: Accelerator, folder: Path, name: str, settings: dict) -> None:
    """Start the tracker, if any; wandb goes on with the run whose id is kept in the experiment's folder.

    A copied folder has another name, and gets a run of its own.
    """
    extra = {}
    if name == "wandb" and accelerator.is_main_process:
        kept = folder / "wandb_id.txt"                            # the id, and the name of the experiment
        run, _, experiment = (kept.read_text(encoding="utf-8") if kept.exists() else "").partition(" ")
        if not run or experiment not in ("", folder.name):
            run = uuid.uuid4().hex
        write_whole(kept, lambda partial: partial.write_text(f"{run} {folder.name}", encoding="utf-8"))
        extra = {"wandb": {"name": folder.name, "id": run, "resume": "allow"}}
    config = {key: str(value) for key, value in settings.items()}
    track(accelerator, lambda: accelerator.init_trackers("REG", config=config, init_kwargs=extra))


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most GPU memory that PyTorch has held on this rank since its start, in GiB; {} on a CPU."""
    return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30} if device.type == "cuda" else {}
