"""Run all benchmarks, one after the other: `python -m benchmarks [--only LIST] [--output FILE]`.

Each is timed beside its plain way, with sizes that suit the machine (`SIZES` of its module), and prints every row when
it is made. A benchmark that fails is named, and the others go on. `CUDA_VISIBLE_DEVICES=` measures the CPU.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

from runtime.arguments import Parser
from runtime.files import write_json
from runtime.messages import UserError, notice, without_traceback

ALL = ("train_step", "sampling", "data", "encode", "scoring")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    flags = Parser(description=__doc__.splitlines()[0])
    flags.add_argument("--only", default=",".join(ALL), metavar="LIST", help="benchmarks, comma-separated")
    flags.add_argument("--output", type=Path, default=Path("benchmarks.json"), metavar="FILE", help="all rows as JSON")
    return flags.parse_args(argv)


@without_traceback
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    names, records = args.only.split(","), []
    for name in names:
        if name not in ALL:
            raise UserError(f"--only {args.only}: {name!r} is unknown; expected some of {','.join(ALL)}")
    write_json(args.output, records)                              # fails now if it cannot be written
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in names:
        module = importlib.import_module(f"benchmarks.{name}")
        try:
            table = module.measure(device, **module.SIZES[device.type])
        except Exception as error:                                # one that fails must not take the others' rows
            notice(f"benchmarks.{name} failed: {error!r}")
            continue
        records.append(table.record)
        write_json(args.output, records)
    if len(records) < len(names):
        sys.exit(1)


if __name__ == "__main__":
    main()
