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


def arrival(runs: list[list[dict]], target: float) -> dict:
    """`steps_to` of every run; their mean and spread only where all arrived, since those that did are the better ones."""
    steps = [steps_to(points, target) for points in runs]
    return {"steps": steps, **(spread(steps) if None not in steps else {"mean": None, "std": None, "seeds": len(steps)})}


def summarise(results: dict) -> dict:
    """Per method: every score at every step over the seeds, the steps to what SiT had at each step and to the final distance of SiT and
    REPA (means over their seeds), and the distance's difference to SiT, at each step seed by seed and at the end sampling by sampling,
    which share their noise."""
    by_method = {method: {piece["seed"]: piece for piece in results["pieces"] if piece["method"] == method} for method in METHODS}
    runs = {method: [piece["points"] for piece in pieces.values()] for method, pieces in by_method.items() if pieces}
    curves = {method: [{"step": rows[0]["step"], **{key: spread([row[key] for row in rows]) for key in rows[0] if key != "step"}}
                       for rows in zip(*found, strict=True)] for method, found in runs.items()}
    targets = {target: curves[target][-1]["distance"]["mean"] for target in TARGETS if target in curves}
    samplings = {method: piece["repeated_distances"] for method, pieces in by_method.items() for piece in pieces.values()
                 if piece["repeated_distances"]}
    methods = {}
    for method, found in runs.items():
        methods[method] = {"curve": curves[method], "steps_to": {target: arrival(found, value) for target, value in targets.items()}}
        if "sit" in runs:
            sit, own = by_method["sit"], by_method[method]
            shared = [seed for seed in own if seed in sit]
            methods[method]["steps_to_sit_at"] = [{"step": point["step"], **arrival(found, point["distance"]["mean"])}
                                                  for point in curves["sit"]]
            if method != "sit" and shared:
                methods[method]["beside_sit"] = {
                    "curve": [{"step": point["step"], "distance": spread([own[seed]["points"][index]["distance"]
                                                                          - sit[seed]["points"][index]["distance"] for seed in shared])}
                              for index, point in enumerate(curves["sit"])],
                    "samplings": spread([a - b for a, b in zip(samplings[method], samplings["sit"], strict=True)])}
    return {"targets": targets, "methods": methods, "distance_over_samplings": {method: spread(of) for method, of in samplings.items()},
            "distance_over_draws": spread(results["real"]["distances"]),
            "core_minutes": sum(piece["train_seconds"] + piece["score_seconds"] for piece in results["pieces"]) / 60}


# --------------------------------------------------------------------------------------------------------------------- tables

def plus_minus(value: dict, digits: int, scale: float = 1) -> str:
    """`4.03 ± 0.10`, or the mean alone of a single seed."""
    mean = f"{scale * value['mean']:.{digits}f}"
    return mean if value["std"] is None else f"{mean} ± {scale * value['std']:.{digits}f}"


def signed(value: dict) -> str:
    return ("+" if value["mean"] >= 0 else "") + plus_minus(value, 2)


def shown(key: str, value: dict) -> str:
    return f"{plus_minus(value, 1, 100)} %" if "agreement" in key else plus_minus(value, 2 if key == "distance" else 3)


def shown_steps(reached: dict, last: int) -> str:
    """Steps with their spread; where not all runs came there, how many did."""
    there = [steps for steps in reached["steps"] if steps is not None]
    if reached["mean"] is None:
        return f"{len(there)} of {len(reached['steps'])} runs in {last:,}" if there else f"not in {last:,}"
    return f"{reached['mean']:,.0f}" + ("" if reached["std"] is None else f" ± {reached['std']:,.0f}")


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def tables(results: dict) -> dict[str, str]:
    """RESULTS.md's tables in Markdown by their headings, and the sentences on spread and on what was not run."""
    summary, setting = results["summary"], results["setting"]
    methods, last = summary["methods"], setting["steps"][-1]
    titles = {method: METHODS[method].title for method in methods}
    beside = {method: of for method, of in methods.items() if "beside_sit" in of}
    columns, draws = SCORES | TOKENS, summary["distance_over_draws"]

    found = {
        f"After {last:,} steps": table(
            ["", *SCORES.values(), *(f"steps to {titles[target]}'s {value:.2f}" for target, value in summary["targets"].items())],
            [[titles[method], *(shown(key, of["curve"][-1][key]) for key in SCORES),
              *(shown_steps(of["steps_to"][target], last) for target in summary["targets"])] for method, of in methods.items()]),
        "Distance by step": table(
            ["", *(f"{step:,}" for step in setting["steps"])],
            [[titles[method], *(plus_minus(point["distance"], 2) for point in of["curve"])] for method, of in methods.items()]),
        **({"Distance less SiT's, seed by seed": table(
            ["", *(f"{step:,}" for step in setting["steps"])],
            [[titles[method], *(signed(point["distance"]) for point in of["beside_sit"]["curve"])] for method, of in beside.items()])}
           if beside else {}),
        **({"Steps to SiT's distance": table(
            ["", *(f"{point['distance']['mean']:.2f} (SiT after {point['step']:,})" for point in methods["sit"]["curve"])],
            [[titles[method], *(shown_steps(reached, last) for reached in of["steps_to_sit_at"])]
             for method, of in methods.items() if method != "sit"])} if "sit" in methods else {}),
        **{f"Class token: {titles[method]}": table(
            ["steps", *TOKENS.values()],
            [[f"{point['step']:,}", *(shown(key, point[key]) for key in TOKENS)] for point in of["curve"]])
           for method, of in methods.items() if "token_cosine" in of["curve"][-1]},
        "Real images, never seen": table(
            ["", *columns.values()],
            [[what, *(shown(key, spread([results["real"][name][key]])) for key in columns)]
             for name, what in (("drawn", "as drawn"), ("decoded", "through the VAE"))]),
    }
    noise = ", ".join(f"{titles[method]} {value['std']:.2f}" for method, value in summary["distance_over_samplings"].items())
    found["Spread"] = (
        "± is the standard deviation over seeds, each with its own order of the data and its own noise to sample from, which all methods "
        f"share. Other noise moves the distance of one checkpoint at {setting['num_samples']:,} samples by a standard deviation of "
        f"{noise} ({draws['seeds']} samplings); other draws of real images by {draws['std']:.3f}, around {draws['mean']:.3f}.\n")
    if beside:
        moved = "; ".join(f"{titles[method]} {signed(of['beside_sit']['samplings'])}" for method, of in beside.items())
        found["Spread"] += f"Much of it is common to the methods. Final distance less SiT's over those samplings: {moved}.\n"
    found["Run"] = (f"{len(results['pieces'])} pieces, {summary['core_minutes']:.0f} minutes of one device or core on "
                    f"{results['machine']['device']}, PyTorch {results['machine']['torch']}.\n")
    missing = ", ".join(f"{METHODS[piece['method']].title} seed {piece['seed']}" for piece in results["not_run"])
    return found | ({"Not run": f"For lack of time: {missing}.\n"} if missing else {})


def as_text(results: dict) -> str:
    """All tables under their headings, and the headline."""
    return "".join(f"### {heading}\n\n{text}\n" for heading, text in tables(results).items()) + headline(results) + "\n"


def headline(results: dict) -> str:
    """What came out, whatever it was: after how many steps the others are at SiT's final distance, and REG at REPA's."""
    summary, last = results["summary"], results["setting"]["steps"][-1]
    said = []
    for target, value in summary["targets"].items():
        others = {method: summary["methods"][method]["steps_to"][target] for method in ("repa", "reg")
                  if method in summary["methods"] and method != target}
        reached = " and by ".join(f"{METHODS[method].title} {words_of(found)}" for method, found in others.items())
        if others:
            said.append(f"{METHODS[target].title}'s distance after {last:,} steps ({value:.2f}) is reached by {reached}")
    return "; ".join(said) + "." if said else ""


def words_of(reached: dict) -> str:
    there, runs = sum(steps is not None for steps in reached["steps"]), len(reached["steps"])
    return f"after {shown_steps(reached, 0)}" if there == runs else f"in {there or 'none'} of {runs} runs"
