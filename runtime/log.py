"""Numbers of a training run: summed up on the device between two log lines, so that no step waits for it, then written as one line."""

import errno
import json
import math
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from runtime.files import write_whole
from runtime.messages import UserError, notice


class Meter:
    """Means since the last reading."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        self.sums, self.counts, self.waited, self.since = {}, {}, 0.0, time.perf_counter()

    def add(self, name: str, values: torch.Tensor, which: torch.Tensor | None = None) -> None:
        """Add values whose mean is wanted, over `which` of them (default: all) as far as they are finite."""
        values = values.detach().float()
        counted = values.isfinite() if which is None else values.isfinite() & which
        self.sums[name] = self.sums.get(name, 0) + values.where(counted, 0).sum()
        self.counts[name] = self.counts.get(name, 0) + counted.sum()

    def read(self, accelerator: Accelerator, images: int) -> dict[str, float]:
        """Means over all ranks since the last reading, images/s and the share of time spent waiting for data."""
        table = torch.stack([torch.stack([s, self.counts[name].to(s)]) for name, s in self.sums.items()])
        sums, counts = accelerator.reduce(table, "sum").T.tolist()                        # the one wait for the device
        means = {name: s / n if n else math.nan for name, s, n in zip(self.sums, sums, counts, strict=True)}
        elapsed = time.perf_counter() - self.since
        means |= {"images_per_second": images / elapsed, "data_wait": self.waited / elapsed}
        self.start()
        return means

    def state(self, accelerator: Accelerator) -> dict | None:
        """For a checkpoint between two log lines: what has been added on each rank. All ranks must call it."""
        if not self.sums:
            return None
        table = torch.stack([torch.stack([s, self.counts[name].to(s)]) for name, s in self.sums.items()])          # (names, 2)
        return {"names": list(self.sums), "table": accelerator.gather(table[None]).cpu()}                          # (ranks, names, 2)

    def resume(self, state: dict | None, accelerator: Accelerator) -> None:
        """Go on from `state`; after a change of the number of ranks the first one takes all of it."""
        if state is None:
            return
        table, rank = state["table"].to(accelerator.device), accelerator.process_index
        if len(table) != accelerator.num_processes:
            table = torch.cat([table.sum(0, keepdim=True), torch.zeros_like(table[:1]).expand(accelerator.num_processes - 1, -1, -1)])
        for name, (total, count) in zip(state["names"], table[rank], strict=True):
            self.sums[name], self.counts[name] = total, count


class Log:
    """metrics.jsonl of a run that begins or goes on after `step`: lines after it are cut off, since they will be written again."""

    def __init__(self, path: Path, step: int):
        self.path, self.waiting = path, ""
        self.lines = [line for line in _readable(path) if line["step"] <= step]
        if path.exists():
            write_whole(path, lambda partial: partial.write_text("".join(json.dumps(line) + "\n" for line in self.lines)))

    def append(self, line: dict) -> None:
        """Write one line; what is not finite becomes null. On a full disk it waits for the next one."""
        self.waiting += json.dumps({name: None if isinstance(value, float) and not math.isfinite(value) else value
                                    for name, value in line.items()}) + "\n"
        data = self.waiting.encode()
        try:
            with open(self.path, "ab", buffering=0) as file:
                whole = file.tell()
                try:
                    if file.write(data) < len(data):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(whole)                          # not half a line
                    raise
        except OSError as error:
            notice(f"warning: cannot write {self.path} ({error.strerror or error}): its lines wait until there is room")
        else:
            self.waiting = ""


def _readable(path: Path) -> list[dict]:
    """The lines of a log; one that was cut off with the run that wrote it is left out."""
    lines = []
    try:
        texts = path.read_text(errors="replace").splitlines() if path.exists() else []
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): remove it, or use another --exp-name") from error
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


class Skips:
    """Updates that were skipped for non-finite numbers; more than `most_in_a_row` end the run."""

    def __init__(self, most_in_a_row: int):
        self.most_in_a_row, self.in_a_row = most_in_a_row, 0
        self.names, self.rows, self.events = [], [], []

    def note(self, parts: dict[str, list[torch.Tensor]]) -> None:
        """After each draw: the named tensors it came from, on this rank; the last is the norm of all ranks' gradients."""
        self.names = list(parts)
        sums = [sum(value.detach().float().sum() for value in values) for values in parts.values()]
        self.rows.append(~torch.stack(sums).isfinite())           # (names,); a sum is finite where all that it adds up is

    def settle(self, accelerator: Accelerator, step: int, draws: int) -> int:
        """How many updates were skipped since the last call, the same on every rank; says which, and why.

        `step` counts them all the same, and `draws` is after the last. `too_many` tells when to give up.
        """
        if not self.rows:
            return 0
        table = accelerator.reduce(torch.stack(self.rows).float(), "sum").tolist()        # (draws, names)
        first, step, before, self.rows = draws - len(table), step - len(table), len(self.events), []
        for draw, row in enumerate(table, first):
            if not row[-1]:
                step, self.in_a_row = step + 1, 0
                continue
            self.in_a_row += 1
            self.events.append({"draw": draw, "step": step, "terms": [name for name, bad in zip(self.names, row, strict=True) if bad]})
            notice(f"skipped the update after step {step} (draw {draw}), not finite: {', '.join(self.events[-1]['terms'])}")
        return len(self.events) - before

    @property
    def too_many(self) -> UserError | None:
        """What to say when so many updates in a row were skipped that the run must end."""
        if self.in_a_row < self.most_in_a_row:
            return None
        return UserError(f"{self.in_a_row} updates in a row were skipped for non-finite numbers, after step {self.events[-1]['step']}: "
                         "go on from an older checkpoint with --resume FILE and a lower --learning-rate, or --mixed-precision bf16 or no")

    def read(self) -> dict:
        """For the log: how many were skipped since the last reading, and which."""
        events, self.events = self.events, []
        return {"skipped_updates": len(events), **({"skipped": events} if events else {})}
