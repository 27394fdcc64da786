"""What the pieces of the comparison say together: means and spreads over seeds, steps to a distance, and the tables of RESULTS.md.

Everything here is a function of results.json.
"""

import math
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True)
class Method:
    """A method of the comparison: `name` and `flags` are what train.sh and train.py are given."""

    name: str
    title: str
    flags: tuple[str, ...] = ()


METHODS = {
    "sit": Method("sit", "SiT"),
    "repa": Method("repa", "REPA"),
    "reg": Method("reg", "REG"),
    "class-token": Method("reg", "class token, no alignment", ("--proj-coeff", "0")),
    "patches": Method("reg", "class token, patches aligned", ("--align", "patches")),
}
TARGETS = ("sit", "repa")                     # whose final distance the others are timed to
SCORES = {"distance": "distance", "class_agreement": "class agreement", "precision": "precision", "recall": "recall"}
TOKENS = {"token_cosine": "cosine to its image's token", "token_cosine_other": "to another's of its label",
          "token_nearest": "to the nearest training image's", "token_agreement": "token shows its label",
          "class_agreement": "image shows its label"}


def spread(values: list[float]) -> dict:
    """Mean and sample standard deviation over seeds (None of a single one), and how many there are."""
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None, "seeds": len(values)}


def steps_to(points: list[dict], target: float) -> float | None:
    """The first step at which the distance is down to `target`, on straight lines between scored steps in log-log; None: never."""
    if points[0]["distance"] <= target:
        return float(points[0]["step"])
    for before, after in zip(points[:-1], points[1:], strict=True):
        if after["distance"] <= target:
            part = math.log(before["distance"] / target) / math.log(before["distance"] / after["distance"])
            return before["step"] * (after["step"] / before["step"]) ** part
    return None


def summarise(results: dict) -> dict:
    """Per method: every score at every step over the seeds, and the steps to the mean final distance of SiT and of REPA."""
    by_method = {method: [piece["points"] for piece in results["pieces"] if piece["method"] == method] for method in METHODS}
    by_method = {method: runs for method, runs in by_method.items() if runs}
    targets = {target: fmean(points[-1]["distance"] for points in by_method[target]) for target in TARGETS if target in by_method}
    methods = {}
    for method, runs in by_method.items():
        curve = [{"step": rows[0]["step"], **{key: spread([row[key] for row in rows]) for key in rows[0] if key != "step"}}
                 for rows in zip(*runs, strict=True)]
        reached = {}
        for target, value in targets.items():
            found = [steps_to(points, value) for points in runs]
            there = [steps for steps in found if steps is not None]
            reached[target] = {"steps": found, **(spread(there) if there else {"mean": None, "std": None, "seeds": 0})}
        methods[method] = {"curve": curve, "steps_to": reached}
    sampling = {piece["method"]: spread(piece["repeated_distances"]) for piece in results["pieces"] if piece["repeated_distances"]}
    return {"targets": targets, "methods": methods, "distance_over_samplings": sampling,
            "distance_over_draws": spread(results["real"]["distances"])}


# --------------------------------------------------------------------------------------------------------------------- tables

def plus_minus(value: dict, digits: int, scale: float = 1) -> str:
    """`4.03 ± 0.10`, or the mean alone of a single seed."""
    mean = f"{scale * value['mean']:.{digits}f}"
    return mean if value["std"] is None else f"{mean} ± {scale * value['std']:.{digits}f}"


def shown(key: str, value: dict) -> str:
    return f"{plus_minus(value, 1, 100)} %" if "agreement" in key else plus_minus(value, 2 if key == "distance" else 3)


def shown_steps(reached: dict, last: int) -> str:
    """Steps with their spread; of runs that never came there, how many did."""
    runs, there = len(reached["steps"]), reached["seeds"]
    if there == 0:
        return f"not in {last:,}"
    words = f"{reached['mean']:,.0f}" + ("" if reached["std"] is None else f" ± {reached['std']:,.0f}")
    return words if there == runs else f"{words} ({there} of {runs} runs)"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def tables(results: dict) -> str:
    """The page's tables in Markdown: final scores and steps to a distance, the distance at every step, the class token, what is real."""
    summary = results["summary"]
    methods, last = summary["methods"], results["setting"]["steps"][-1]
    titles = {method: METHODS[method].title for method in methods}

    final = table([f"after {last:,} steps", *SCORES.values(), *(f"steps to {titles[target]}'s {value:.2f}" for target, value in
                                                               summary["targets"].items())],
                  [[titles[method], *(shown(key, found["curve"][-1][key]) for key in SCORES),
                    *(shown_steps(found["steps_to"][target], last) for target in summary["targets"])] for method, found in methods.items()])
    curves = table(["distance after", *(f"{step:,}" for step in results["setting"]["steps"])],
                   [[titles[method], *(plus_minus(point["distance"], 2) for point in found["curve"])] for method, found in methods.items()])
    tokens = {method: found["curve"] for method, found in methods.items() if "token_cosine" in found["curve"][-1]}
    token = "\n".join(table([f"{titles[method]}, after", *TOKENS.values()],
                            [[f"{point['step']:,}", *(shown(key, point[key]) for key in TOKENS)] for point in curve])
                      for method, curve in tokens.items())
    columns = SCORES | TOKENS
    real = table(["real images, never seen", *columns.values()],
                 [[what, *(shown(key, spread([results["real"][name][key]])) for key in columns)]
                  for name, what in (("drawn", "as drawn"), ("decoded", "through the VAE"))])
    draws = summary["distance_over_draws"]
    noise = ", ".join(f"{titles[method]} {value['std']:.3f}" for method, value in summary["distance_over_samplings"].items())
    lines = [final, curves, token, real,
             f"± is the standard deviation over seeds of training. That of the distance at {results['setting']['num_samples']:,} samples: "
             f"{noise} over {draws['seeds']} samplings of one checkpoint; {draws['std']:.3f} over as many draws of real images, whose mean "
             f"distance is {draws['mean']:.3f}.\n"]
    if results["not_run"]:
        lines.append("Not run, for lack of time: " + ", ".join(f"{METHODS[piece['method']].title} seed {piece['seed']}"
                                                               for piece in results["not_run"]) + ".\n")
    return "\n".join(lines)


def headline(results: dict) -> str:
    """One sentence that says whatever came out: steps of REPA and REG to SiT's final distance, and REG's to REPA's."""
    summary, last = results["summary"], results["setting"]["steps"][-1]
    said = []
    for target in summary["targets"]:
        others = [method for method in ("repa", "reg") if method in summary["methods"] and method != target]
        reached = " and ".join(f"{METHODS[method].title} after {words_of(summary['methods'][method]['steps_to'][target], last)}"
                               for method in others)
        said.append(f"{METHODS[target].title}'s distance after {last:,} steps ({summary['targets'][target]:.2f}) is reached by {reached}")
    return "; ".join(said) + "."


def words_of(reached: dict, last: int) -> str:
    return f"none of its {last:,} steps" if reached["seeds"] == 0 else f"{shown_steps(reached, last)} steps"
