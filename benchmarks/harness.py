"""Shared by all benchmarks: timing in turn, what the hardware allows, rows of a table.

The ways of doing a thing (ours, the plain one) are timed in turn, A B B A A B ..., so that a ratio holds on a machine
whose speed drifts. Medians are reported. No test asserts a time. Under a time limit only ours are run.
"""

import contextlib
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from runtime.files import make_folder, write_json

PEAKS = {"NVIDIA H200": 790e12}  # dense bf16 FLOP/s that a large matrix product reaches; measured on other GPUs
LONG = 5.0                       # seconds of a turn after which the warm-up ends


class OutOfTime(Exception):
    """The time of this benchmark has passed."""


@dataclass
class Run:
    """What the benchmarks of one process share: the file of all tables, rewritten after each row, and the time."""

    output: Path | None = None
    limited: bool = False            # then the plain ways are left out
    until: float = math.inf          # time.monotonic() at which this benchmark should end
    tables: list[dict] = field(default_factory=list)


run = Run()                          # `python -m benchmarks` puts its own here


class Table:
    """The rows of one benchmark, printed as Markdown when they are made."""

    def __init__(self, name: str, settings: dict, device: torch.device):
        self.record = {"benchmark": name, "settings": settings, "hardware": hardware(device), "rows": []}
        about = ", ".join(f"{key} {value}" for key, value in settings.items())
        print(f"\n**{name}** on {self.record['hardware']['device']}: {about}\n\n"
              "| | measured | ideal | share | time / plain way | ideal is |\n|---|---|---|---|---|---|", flush=True)

    def add(self, name: str, seconds: dict[str, list[float]], work: float | None = None, unit: str = "s",
            ideal: float | None = None, formula: str = "") -> None:
        """Add the row of `seconds` per run of "ours" and perhaps "plain".

        With `work` the row shows work per second, else seconds. `ideal` is in the same unit. The ratio to the plain way
        is the median over pairs: a slow minute slows both of a pair.
        """
        ours = median(seconds["ours"])
        measured = work / ours if work else ours
        share = None if ideal is None else measured / ideal if work else ideal / measured
        ratio = None
        if "plain" in seconds:
            ratio = median(a / b for a, b in zip(seconds["ours"], seconds["plain"], strict=True))
        self.record["rows"].append({"name": name, "measured": measured, "unit": unit, "ideal": ideal, "share": share,
                                    "ratio": ratio, "formula": formula})
        cells = (name, f"{measured:.4g} {unit}", "-" if ideal is None else f"{ideal:.3g} {unit}",
                 "-" if share is None else f"{100 * share:.0f} %", "-" if ratio is None else f"{ratio:.2f}", formula)
        print("| " + " | ".join(cells) + " |", flush=True)
        if len(self.record["rows"]) == 1:
            run.tables.append(self.record)
        if run.output is not None:
            write_json(run.output, run.tables)


# --------------------------------------------------------------------------------------------------------------- timing

class Turns:
    """Iterate over the name of the way to run next. `seconds`: those of each run after the warm-up, by way.

    Past the time limit one turn after the warm-up is enough; raises OutOfTime if nothing has run before it.
    """

    def __init__(self, ways: list[str], device: torch.device, repeats: int, warmup: int = 3):
        self.device, self.warmup, self.repeats = device, warmup, repeats
        self.seconds: dict[str, list[float]] = {way: [] for way in ways if way != "plain" or not run.limited}

    def __iter__(self) -> Iterator[str]:
        turn, order = 0, list(self.seconds)
        while turn < self.warmup + self.repeats:
            if time.monotonic() > run.until:
                if turn == 0:
                    raise OutOfTime
                if turn > self.warmup:
                    return
                self.warmup = turn
            taken = {}
            for way in order:
                synchronise(self.device)
                start = time.perf_counter()
                yield way
                synchronise(self.device)
                taken[way] = time.perf_counter() - start
            order.reverse()
            turn += 1
            if turn > self.warmup:
                for way, seconds in taken.items():
                    self.seconds[way].append(seconds)
            elif turn > 1 and sum(taken.values()) > LONG:         # the first turn may compile
                self.warmup = turn


def timed(ways: dict[str, Callable[[], object]], device: torch.device, repeats: int,
          warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of every run of each way."""
    turns = Turns(list(ways), device, repeats, warmup)
    for way in turns:
        ways[way]()
    return turns.seconds


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def profile(folder: Path, device: torch.device) -> Iterator[None]:
    """Write a trace of what runs inside to `folder`/trace.json, and print the 20 longest operators."""
    with torch.profiler.profile(record_shapes=True) as trace:
        yield
        synchronise(device)
    trace.export_chrome_trace(str(make_folder(folder) / "trace.json"))
    print(trace.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=20))


# ----------------------------------------------------------------------------------------------------- the hardware

def matmul_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s of matrix products in `dtype`, and the source: PEAKS, or the best of ten large ones."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if name in PEAKS and dtype in (torch.bfloat16, torch.float16):
        return PEAKS[name], f"{PEAKS[name] / 1e12:.0f} TFLOP/s"
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device).to(dtype)
    peak = 2 * side**3 / min(timed({"": lambda: a @ a}, device, 10)[""])
    return peak, f"{peak / 1e12:.3g} TFLOP/s ({str(dtype).removeprefix('torch.')} product of {side})"


def bandwidth(device: torch.device) -> tuple[float, str]:
    """Bytes/s that a large copy reads and writes, and the source."""
    source = torch.ones(2**31 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rate = 2 * len(source) / min(timed({"": lambda: target.copy_(source)}, device, 10)[""])
    return rate, f"{rate / 1e9:.4g} GB/s"


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of `run`, forward and backward; works on meta tensors."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 pays: on a GPU, and on a CPU with instructions for it, seen by faster products."""
    if device.type == "cuda":
        return True
    numbers = [torch.ones(512, 512, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    seconds = timed({x.dtype: partial(torch.mm, x, x) for x in numbers}, device, 5)
    return median(seconds[torch.bfloat16]) < median(seconds[torch.float32])


def hardware(device: torch.device) -> dict:
    """The machine and the versions that the numbers belong to."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):                            # Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), cpu)
    versions = {}
    for name in ("torch", "timm", "accelerate", "diffusers"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu, "cpu": cpu,
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), "date": date.today().isoformat(),
            "versions": {"python": platform.python_version(), **versions}}
