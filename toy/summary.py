"""What the comparison's curves show: means over seeds, steps until another method's final distance, table and figures.

A curve is {step: Frechet distance} of one run; curves[method][seed] of all runs are scored at the same steps.
"""

from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image

from evaluations.efficiency import crossing


class Method(NamedTuple):
    """A method of the comparison: METHOD of train.sh, flags of train.py, and how it is shown."""

    name: str
    flags: tuple[str, ...]
    title: str
    colour: str


METHODS = {
    "sit": Method("sit", (), "SiT", "tab:gray"),
    "repa": Method("repa", (), "REPA", "tab:blue"),
    "reg": Method("reg", (), "REG", "tab:red"),
    "class-token": Method("reg", ("--proj-coeff", "0"), "REG without alignment", "tab:orange"),
    "patches": Method("reg", ("--align", "patches"), "REG, patches aligned", "tab:purple"),
}
TARGETS = ("sit", "repa")         # the others are timed until their final distance


def spread(values: list[float]) -> dict[str, float]:
    """Mean and sample standard deviation (0 of a single value)."""
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else 0.0}


def summarise(curves: dict[str, dict[int, dict[int, float]]]) -> dict:
    """By method: distance by step, steps to the final distance of SiT and REPA, final ratio to SiT.

    Steps and ratios compare runs of the same seed.
    """
    found = {}
    for method in (name for name in METHODS if name in curves):
        runs = curves[method]
        steps = sorted(next(iter(runs.values())))
        ends = {target: {seed: run[steps[-1]] for seed, run in curves.get(target, {}).items()} for target in TARGETS}
        paired = {target: [(run, of_target[seed]) for seed, run in runs.items() if seed in of_target]
                  for target, of_target in ends.items() if target != method}
        found[method] = {
            "distance": {step: spread([run[step] for run in runs.values()]) for step in steps},
            "steps_to": {target: [crossing(*pair) for pair in pairs] for target, pairs in paired.items() if pairs},
            "over_sit": spread([run[steps[-1]] / end for run, end in paired["sit"]]) if paired.get("sit") else None,
        }
    return found


def table(summary: dict) -> str:
    """The summary as a Markdown table: mean ± standard deviation over seeds."""
    steps = list(next(iter(summary.values()))["distance"])
    targets = [target for target in TARGETS if target in summary]
    head = ["distance after", *(f"{step:,} steps" for step in steps), "over SiT's, same seed",
            *(f"steps to {METHODS[target].title}'s end" for target in targets)]
    rows = []
    for method, found in summary.items():
        distances = [f"{at['mean']:.2f} ± {at['std']:.2f}" for at in found["distance"].values()]
        ratio = "{mean:.3f} ± {std:.3f}".format(**found["over_sit"]) if found["over_sit"] else "-"
        reached = [_shown(found["steps_to"].get(target), steps[0]) for target in targets]
        rows.append([METHODS[method].title, *distances, ratio, *reached])
    return "".join("| " + " | ".join(cells) + " |\n" for cells in (head, ["---"] * len(head), *rows))


def _shown(steps: list[float | None] | None, first: int) -> str:
    """Mean and spread if all runs arrived (those that did are the better ones), else how many did."""
    if not steps:
        return "-"
    if None in steps:
        return f"{len(steps) - steps.count(None)} of {len(steps)} runs"
    bound = "at most " if first in steps else ""              # reached at the first score, perhaps before
    return bound + "{mean:,.0f} ± {std:,.0f}".format(**spread(steps))


def convergence(summary: dict) -> Figure:
    """Distance against steps, mean and one standard deviation; dotted: where SiT and REPA end."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for method, found in summary.items():
        steps, points = list(found["distance"]), list(found["distance"].values())
        low, high = ([point["mean"] + sign * point["std"] for point in points] for sign in (-1, 1))
        means, look = [point["mean"] for point in points], METHODS[method]
        axes.plot(steps, means, marker="o", markersize=3, color=look.colour, label=look.title)
        axes.fill_between(steps, low, high, color=look.colour, alpha=0.2, linewidth=0)
        if method in TARGETS:
            axes.axhline(means[-1], color=look.colour, linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="training steps", ylabel="Frechet distance, toy features")
    axes.set_xticks(steps, [f"{step:,}" for step in steps])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend()
    return figure


def side_by_side(grids: dict[str, Path]) -> Figure:
    """The runs' own grids of samples, one column per method."""
    figure = Figure(figsize=(3 * len(grids), 3.3), layout="constrained")
    for axes, (method, path) in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True):
        with Image.open(path) as image:
            axes.imshow(image, interpolation="nearest")
        axes.set_title(METHODS[method].title)
        axes.axis("off")
    return figure
