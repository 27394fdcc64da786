"""All benchmarks, one after the other, into one JSON and one Markdown table: `python -m benchmarks [--output FILE]`.

Each runs in a process of its own, beside its plain way, with sizes that suit the machine. One that fails is named, and the others go on.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.harness import require_output
from runtime.files import write_whole
from runtime.messages import UserError, notice, without_traceback

ALL = ("train_step", "sampling", "data", "encode", "scoring")


def parse_args(argv=None) -> argparse.Namespace:
    flags = argparse.ArgumentParser(description="Run all benchmarks.", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--only", type=str, default=",".join(ALL), metavar="LIST", help="benchmarks, comma-separated")
    flags.add_argument("--output", type=Path, default=Path("benchmarks.json"), metavar="FILE", help="all that was measured")
    flags.add_argument("--repeats", type=int, default=None, metavar="N", help="runs that count; None: each benchmark's own number")
    return flags.parse_args(argv)


def run(name: str, repeats: int | None) -> dict | None:
    """What one benchmark reports, None where it failed; its tables are shown."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "found.json")
        more = [] if repeats is None else ["--repeats", str(repeats)]
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--baseline", "--output", found, *more])
        if done.returncode:
            notice(f"benchmarks.{name} failed with status {done.returncode}: it is left out")
            return None
        return json.loads(found.read_text())


def markdown(found: dict) -> str:
    """One benchmark's rows."""
    settings = ", ".join(f"{name} {value}" for name, value in found["settings"].items())
    lines = [f"**{found['benchmark']}**, {settings}", "",
             "| | measured | ideal | share | time / plain way | ideal is |", "|---|---|---|---|---|---|"]
    for row in found["rows"]:
        ideal = "-" if row["ideal"] is None else f"{row['ideal']:.3g} {row['unit']}"
        share = "-" if row["share"] is None else f"{100 * row['share']:.0f} %"
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(f"| {row['name']} | {row['measured']:.4g} {row['unit']} | {ideal} | {share} | {ratio} | {row['formula']} |")
    return "\n".join(lines)


@without_traceback
def main(argv=None) -> None:
    args = parse_args(argv)
    names = args.only.split(",")
    unknown = [name for name in names if name not in ALL]
    if unknown:
        raise UserError(f"--only names {', '.join(map(repr, unknown))}: give some of {','.join(ALL)}, without spaces")
    if args.repeats is not None and args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}: give at least 1")
    require_output(args.output)
    all_found = []
    for name in names:
        if (found := run(name, args.repeats)) is not None:
            all_found.append(found)                               # on the disk at once: the rest may be cut off
            write_whole(args.output, lambda partial: partial.write_text(json.dumps(all_found, indent=1) + "\n"))
    print("\n\n".join(map(markdown, all_found)))
    if len(all_found) < len(names):
        sys.exit(1)


if __name__ == "__main__":
    main()
