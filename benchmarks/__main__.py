"""Run all benchmarks, one after the other: `python -m benchmarks [--gpu] [--minutes N] [--only LIST] [--output FILE]`.

Each is timed beside its plain way, with sizes that suit the machine (`SIZES` of its module). Every row is printed and
written to the file when it is made. A benchmark that fails is named, and the others go on. With `--minutes` the plain
ways are left out, a benchmark may take half of the time that is left, and one that would start late is named instead.
`CUDA_VISIBLE_DEVICES=` measures the CPU.
"""

import argparse
import gc
import importlib
import importlib.util
import math
import sys
import time
from pathlib import Path

import torch

from benchmarks import harness
from runtime.arguments import Parser, positive
from runtime.files import write_json
from runtime.messages import UserError, notice, without_traceback

ALL = ("train_step", "latency", "sampling", "data", "encode", "vae", "scoring", "parts", "forms")
NEEDS = {"sampling": "diffusers", "encode": "diffusers", "vae": "diffusers", "scoring": "torch_fidelity"}
# For --gpu, the most valuable first. The seconds are estimates for an H200 with an empty compiler cache.
GPU = (
    ("train_step", {"model": "SiT-XL/2"}),               # 75: six graphs with their backward passes; 0.5 s a step
    ("latency", {}),                                     # 60: two networks at four shapes
    ("sampling", {"decoder": False}),                    # 15: finds its graphs in the cache, as compiled for `latency`
    ("train_step", {"model": "SiT-B/2"}),                # 35: finds the encoder's
    ("train_step", {"model": "SiT-L/2"}),                # 45
    ("vae", {}),                                         # 75: encoder and decoder are one graph each
    ("scoring", {}),                                     # 40: 2,048 images, the later stages in full
    ("parts", {}),                                       # 10
    ("forms", {}),                                       # 60: eight small graphs, and the network as one
    ("data", {"all_cores": True, "images": 1024, "entries": 2000, "repeats": 2}),         # 20
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    flags = Parser(description=__doc__.splitlines()[0])
    flags.add_argument("--gpu", action="store_true", help="the published sizes, the most valuable first; needs a GPU")
    flags.add_argument("--minutes", type=positive, default=math.inf, metavar="N", help="stop after this time")
    flags.add_argument("--only", default=",".join(ALL), metavar="LIST", help="benchmarks, comma-separated")
    flags.add_argument("--output", type=Path, default=Path("benchmarks.json"), metavar="FILE", help="all rows as JSON")
    return flags.parse_args(argv)


def clear() -> None:
    """Leave graphs, the choice of kernels and GPU memory of one benchmark behind. Compiled kernels stay on disk."""
    from torch._inductor import config  # slow to import

    torch.compiler.reset()                                        # PyTorch compiles a function for eight shapes at most
    config.deterministic = False                                  # set by runtime.speed.choose_same_kernels
    gc.collect()
    torch.cuda.empty_cache()


@without_traceback
def main(argv: list[str] | None = None) -> None:
    end = time.monotonic()
    args = parse_args(argv)
    end, names, failed = end + 60 * args.minutes, args.only.split(","), False
    for name in names:
        if name not in ALL:
            raise UserError(f"--only {args.only}: {name!r} is unknown; expected some of {','.join(ALL)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.gpu and device.type == "cpu":
        raise UserError("--gpu: PyTorch finds no GPU here; leave it out to measure the CPU")
    plan = [row for row in GPU if row[0] in names] if args.gpu else [(name, {}) for name in names]
    if not plan:
        raise UserError(f"--only {args.only}: --gpu measures {', '.join(dict(GPU))}")
    write_json(args.output, [])                                   # fails now if it cannot be written
    harness.run = run = harness.Run(args.output, args.minutes < math.inf)
    for name, settings in plan:
        title, now = " ".join([f"benchmarks.{name}", settings.get("model", "")]).strip(), time.monotonic()
        package = NEEDS.get(name) if settings.get("decoder", True) else None
        if now > end or package and importlib.util.find_spec(package) is None:
            reason = f"{args.minutes:g} minutes have passed" if now > end else f"{package} is not installed"
            notice(f"{title}: not measured, {reason}")
            continue
        run.until = now + (end - now) / 2
        module = importlib.import_module(f"benchmarks.{name}")
        try:
            module.measure(device, **{**module.SIZES[device.type], **settings})
        except harness.OutOfTime:
            notice(f"{title}: not measured to its end, its time has passed")
        except Exception as error:                                # one that fails must not take the others' rows
            notice(f"{title} failed: {error!r}")
            failed = True
        clear()
    harness.run = harness.Run()
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
