"""What every benchmark shares: how times are taken, what they are compared with, how they are printed.

Each benchmark is one process. Its ways of doing a thing are timed in turn, A B B A A B ..., after a warm-up, so that a ratio of two holds
on a machine whose speed drifts, and neither always pays for the memory that the other gave back; the median is reported. A row says what
was measured, what the hardware allows at best, by which formula, and the share of it. Nothing here is asserted by a test: the numbers are
a machine's, not the program's.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.files import make_folder, write_whole
from runtime.messages import UserError, notice

# Dense bf16 TFLOP/s that a matrix product reaches on a GPU when nothing else is in its way; others' are measured.
PEAKS = {"NVIDIA H200": 790.0}
LONG = 5.0  # seconds of a turn after which nothing is warmed up any more
LIBRARIES = ("torch", "torchvision", "timm", "accelerate", "diffusers", "numpy", "pillow")



@dataclass(frozen=True)
class Row:
    """One measured thing. `ideal` has the unit of `measured`; `formula` says where it comes from; None: there is no such bound.

    Made, it is said on stderr: the table comes last, and a run may be cut off before.
    """

    name: str
    measured: float
    unit: str
    ideal: float | None = None
    formula: str = ""
    baseline: float | None = None       # the plain way, in the same unit and process
    ratio: float | None = None          # seconds of the measured way / seconds of the plain way, median over pairs

    def __post_init__(self):
        notice(f"{self.name}: {self.measured:.4g} {self.unit}".rstrip())

    @property
    def share(self) -> float | None:
        """Of the ideal, 0 to 1; times are the better the smaller."""
        if self.ideal is None:
            return None
        return self.ideal / self.measured if self.unit in ("s", "h") else self.measured / self.ideal


def parser(description: str, repeats: int = 5) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks have; each adds its own sizes, None of which means: what suits the machine."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    flags.add_argument("--device", type=str, default="cuda" if torch.cuda.is_available() else "cpu", metavar="DEVICE", help="cpu or cuda")
    flags.add_argument("--threads", type=int, default=None, metavar="N", help="of a CPU; None: as many as PyTorch takes")
    flags.add_argument("--warmup", type=int, default=3, metavar="N", help="runs before the first that counts; of long things one at most")
    flags.add_argument("--repeats", type=int, default=repeats, metavar="N",
                       help="runs that count, of short things more; the median is reported")
    flags.add_argument("--baseline", action="store_true", help="also time the plain way, in turn with the other, and print the ratio")
    flags.add_argument("--profile", type=Path, default=None, metavar="DIR", help="write a trace of one run, print its 20 longest operators")
    flags.add_argument("--output", type=Path, default=None, metavar="FILE", help="write the JSON there, too")
    return flags


def open_device(args: argparse.Namespace) -> torch.device:
    """The device of --device, with --threads set. Raises UserError for numbers, devices and files that cannot be."""
    for name, least in (("warmup", 0), ("repeats", 1), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}: give at least {least}")
    if args.device not in ("cpu", "cuda"):
        raise UserError(f"--device is {args.device!r}: give cpu or cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is 'cuda', and torch sees no GPU: give cpu")
    require_output(args.output)
    if getattr(args, "profile", None) is not None:
        make_folder(args.profile)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return torch.device(args.device)


def require_output(path: Path | None) -> None:
    """Raise UserError, before minutes of measuring, where the JSON could not be written."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"--output {path} is a folder: name a file in it")
    make_folder(path.parent)
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--output {path} cannot be written: name a file in a folder of yours")


# --------------------------------------------------------------------------------------------------------------------- taking times

def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(ways: dict[str, Callable[[], object]], device: torch.device, warmup: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of every run of each way, run in turn and every other time in reverse; the device is waited for before and after each.

    A turn of more than LONG seconds is the last of `warmup`: caches and clocks are warm after it. Not the first one, which may compile.
    """
    order, turns = list(ways.items()), []
    while len(turns) < warmup + repeats:
        turn = {}
        for name, run in order:
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            turn[name] = time.perf_counter() - start
        turns.append(turn)
        order.reverse()
        if 1 < len(turns) < warmup and sum(turn.values()) > LONG:
            warmup = len(turns)
    return {name: [turn[name] for turn in turns[warmup:]] for name in ways}


def ratio(ours: list[float], plain: list[float]) -> float:
    """The median of pairwise ratios: a slow minute slows both of a pair."""
    return median(a / b for a, b in zip(ours, plain, strict=True))


def matmul_peak(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s of the device's matrix products in `dtype`, and where the number comes from: PEAKS, or the best of ten large ones now."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        if name in PEAKS:
            return PEAKS[name] * 1e12, f"{PEAKS[name]:.0f} TFLOP/s"
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = min(timed({"": lambda: a @ b}, device, warmup=2, repeats=10)[""])
    flops = 2 * side**3 / seconds
    return flops, f"{flops / 1e12:.3g} TFLOP/s, the best {side}x{side} product in {str(dtype).removeprefix('torch.')} here"


def precision_that_suits(device: torch.device) -> str:
    """`bf16` on a GPU and on CPUs that have instructions for it, known by faster products; else `fp32`, since bf16 would be imitated."""
    if device.type == "cuda":
        return "bf16"
    numbers = [torch.randn(512, 512, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    seconds = timed({x.dtype: lambda x=x: x @ x for x in numbers}, device, warmup=2, repeats=5)
    return "bf16" if median(seconds[torch.bfloat16]) < median(seconds[torch.float32]) else "fp32"


def bandwidth(device: torch.device) -> tuple[float, str]:
    """Bytes/s to and from the device's memory, measured now by adding to 1 GiB (256 MiB on a CPU) in place, and a sentence that says so.

    Not by a copy: a CPU reads what it is about to overwrite, which nobody would count.
    """
    numbers = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    seconds = min(timed({"": lambda: numbers.add_(1)}, device, warmup=2, repeats=10)[""])
    speed = 2 * numbers.nbytes / seconds
    return speed, f"{speed / 1e9:.3g} GB/s, the best addition in place here"


class _Launches(TorchDispatchMode):
    """Counts the operators that are run one by one, without those that only give another view of a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def count_launches(run: Callable[[], object], device: torch.device) -> int:
    """Kernels of one run on CUDA, as the profiler sees them. On a CPU the operators that would each be one or more of them."""
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            run()
            synchronise(device)
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events())
    with _Launches() as launches:
        run()
    return launches.count


# -------------------------------------------------------------------------------------------------------------------- what is said

def hardware(device: torch.device) -> dict:
    """What the numbers were taken on, and with what."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
        "commit": _commit(), "date": date.today().isoformat(),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):                            # Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:                                               # no git
        return None
    return None if head.returncode else head.stdout.strip() + ("+" if changed.stdout else "")


def report(name: str, rows: list[Row], settings: dict, device: torch.device, output: Path | None = None) -> dict:
    """Print a table, then the same as one line of JSON, and write that to `output`."""
    found = {"benchmark": name, "settings": settings, "hardware": hardware(device),
             "rows": [{**asdict(row), "share": row.share} for row in rows]}
    print(f"\n{name} on {found['hardware']['device']}, {found['hardware']['threads']} threads: "
          + ", ".join(f"{key} {value}" for key, value in settings.items()))
    cells = [("", "measured", "ideal", "share", "plain way", "time / plain", "ideal is")]
    for row in rows:
        cells.append((row.name, f"{row.measured:.4g} {row.unit}", *(_cell(row.ideal, row.unit), _cell(row.share and 100 * row.share, "%"),
                                                                    _cell(row.baseline, row.unit), _cell(row.ratio, "")), row.formula))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    text = json.dumps(found)
    print(text, flush=True)
    if output is not None:
        write_whole(output, lambda partial: partial.write_text(text + "\n"))
    return found


def _cell(value: float | None, unit: str) -> str:
    return "-" if value is None else f"{value:.3g} {unit}".strip()


def profile(run: Callable[[], object], folder: Path | None, device: torch.device) -> None:
    """With a folder: one run's trace.json (for chrome://tracing or Perfetto) in it, and a table of the 20 longest operators."""
    if folder is None:
        return
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch.profiler.profile(activities=kinds, record_shapes=True) as trace:
        run()
        synchronise(device)
    make_folder(folder)
    trace.export_chrome_trace(str(folder / "trace.json"))
    print(trace.key_averages().table(sort_by=f"self_{device.type}_time_total", row_limit=20))
    print(f"trace: {folder / 'trace.json'}")
