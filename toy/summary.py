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
          "token_nearest": "to the nearest training image's", "token_agreement": "class agreement of the token",
          "class_agreement": "class agreement"}


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


def arrival(own: dict[int, list[dict]], others: dict[int, list[dict]], index: int) -> dict:
    """For each seed that both have, the steps after which a run is where the other one was at its scored step `index`: `steps_to`.

    Mean and spread only where all arrived, since those that did are the better ones; no spread either, and the mean a `bound`, where
    one was there at the first scored step, and so perhaps before. `factor`: how many times fewer steps that is than the other took.
    """
    shared = [seed for seed in own if seed in others]
    steps = [steps_to(own[seed], others[seed][index]["distance"]) for seed in shared]
    result = {"steps": steps, "bound": any(own[seed][0]["step"] == found for seed, found in zip(shared, steps, strict=True)),
              "mean": None, "std": None, "factor": None, "seeds": len(steps)}
    if steps and None not in steps:
        factors = [others[seed][index]["step"] / found for seed, found in zip(shared, steps, strict=True)]
        result |= spread(steps) | {"factor": spread(factors)}
        result["std"] = None if result["bound"] else result["std"]
    return result


def summarise(results: dict) -> dict:
    """Per method: every score at every step over the seeds; the steps to what SiT had at each step, and to where SiT and REPA end, seed by
    seed; and the distance over SiT's, at each step seed by seed and at the end sampling by sampling, in which the shared noise is gone."""
    by_method = {method: {piece["seed"]: piece for piece in results["pieces"] if piece["method"] == method} for method in METHODS}
    runs = {method: {seed: piece["points"] for seed, piece in pieces.items()} for method, pieces in by_method.items() if pieces}
    curves = {method: [{"step": rows[0]["step"], **{key: spread([row[key] for row in rows]) for key in rows[0] if key != "step"}}
                       for rows in zip(*found.values(), strict=True)] for method, found in runs.items()}
    targets = {target: curves[target][-1]["distance"]["mean"] for target in TARGETS if target in curves}
    samplings = {(method, seed): piece["repeated_distances"] for method, pieces in by_method.items() for seed, piece in pieces.items()
                 if piece["repeated_distances"]}
    methods = {}
    for method, found in runs.items():
        methods[method] = {"curve": curves[method],
                           "steps_to": {target: arrival(found, runs[target], -1) for target in targets if target != method}}
        shared = [seed for seed in found if seed in runs.get("sit", {})]
        if method != "sit" and shared:
            methods[method]["steps_to_sit_at"] = [{"step": point["step"], **arrival(found, runs["sit"], index)}
                                                  for index, point in enumerate(curves["sit"])]
            methods[method]["beside_sit"] = [
                {"step": point["step"], "distance": spread([found[seed][index]["distance"] / runs["sit"][seed][index]["distance"]
                                                            for seed in shared])} for index, point in enumerate(curves["sit"])]
            methods[method]["beside_sit_over_samplings"] = [
                spread([a / b for a, b in zip(samplings[method, seed], samplings["sit", seed], strict=True)])
                for seed in shared if (method, seed) in samplings and ("sit", seed) in samplings]
    return {"targets": targets, "methods": methods,
            "distance_over_samplings": {method: spread(of) for (method, _), of in samplings.items()},
            "distance_over_draws": spread(results["real"]["distances"]),
            "core_minutes": sum(piece["train_seconds"] + piece["score_seconds"] for piece in results["pieces"]) / 60}


# --------------------------------------------------------------------------------------------------------------------- tables

def plus_minus(value: dict, digits: int, scale: float = 1) -> str:
    """`4.03 ± 0.10`, or the mean alone of a single seed."""
    mean = f"{scale * value['mean']:.{digits}f}"
    return mean if value["std"] is None else f"{mean} ± {scale * value['std']:.{digits}f}"


def shown(key: str, value: dict) -> str:
    return f"{plus_minus(value, 1, 100)} %" if "agreement" in key else plus_minus(value, 2 if key == "distance" else 3)


def shown_steps(reached: dict, last: int) -> str:
    """Steps with their spread; where not all runs came there, how many did."""
    if reached["mean"] is None:
        there = sum(steps is not None for steps in reached["steps"])
        return f"{there} of {len(reached['steps'])} runs in {last:,}" if there else f"not in {last:,}"
    return ("at most " if reached["bound"] else "") + f"{reached['mean']:,.0f}" + (
        "" if reached["std"] is None else f" ± {reached['std']:,.0f}")


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def tables(results: dict) -> dict[str, str]:
    """RESULTS.md's tables in Markdown by their headings, and the sentences on spread and on what was not run."""
    summary, setting = results["summary"], results["setting"]
    methods, last = summary["methods"], setting["steps"][-1]
    titles = {method: METHODS[method].title for method in methods}
    beside = {method: of for method, of in methods.items() if "beside_sit" in of}
    columns, draws = SCORES | TOKENS, summary["distance_over_draws"]
    by_step = ["", *(f"{step:,}" for step in setting["steps"])]

    found = {
        f"After {last:,} steps": table(
            ["", *SCORES.values(), *(f"steps to where {titles[target]} ends" for target in summary["targets"])],
            [[titles[method], *(shown(key, of["curve"][-1][key]) for key in SCORES),
              *(shown_steps(of["steps_to"][target], last) if target != method else f"{last:,}" for target in summary["targets"])]
             for method, of in methods.items()]),
        "Distance by step": table(
            by_step, [[titles[method], *(plus_minus(point["distance"], 2) for point in of["curve"])] for method, of in methods.items()])}
    if beside:
        found["Distance over SiT's, seed by seed"] = table(
            by_step, [[titles[method], *(plus_minus(point["distance"], 3) for point in of["beside_sit"])] for method, of in beside.items()])
        found["Steps to where SiT is after so many"] = table(
            ["", *by_step[2:]],                          # nothing is scored before the first
            [[titles[method], *(shown_steps(reached, last) for reached in of["steps_to_sit_at"][1:])] for method, of in beside.items()])
    found |= {
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
        f"share. Other noise moves the distance of the first seed's last checkpoint at {setting['num_samples']:,} samples by a standard "
        f"deviation of {noise} ({draws['seeds']} samplings); other draws of real images have {draws['mean']:.3f} ± {draws['std']:.3f}.\n")
    moved = "; ".join(f"{titles[method]} {plus_minus(value, 3)}" for method, of in beside.items()
                      for value in of["beside_sit_over_samplings"])
    if moved:
        found["Spread"] += f"Its distance over SiT's with the same noise, in those samplings: {moved}.\n"
    found["Run"] = (f"{len(results['pieces'])} pieces, {summary['core_minutes']:.0f} minutes of one device or core on "
                    f"{results['machine']['device']}, PyTorch {results['machine']['torch']}.\n")
    missing = ", ".join(f"{METHODS[piece['method']].title} seed {piece['seed']}" for piece in results["not_run"])
    return found | ({"Not run": f"{missing}.\n"} if missing else {})


def as_text(results: dict) -> str:
    """All tables under their headings, and the headline."""
    return "".join(f"### {heading}\n\n{text}\n" for heading, text in tables(results).items()) + headline(results) + "\n"


def headline(results: dict) -> str:
    """What came out, whatever it was: after how many steps the others are where SiT ends, and REG where REPA does, seed by seed."""
    summary, last = results["summary"], results["setting"]["steps"][-1]
    said = []
    for target, value in summary["targets"].items():
        others = {method: summary["methods"][method]["steps_to"][target] for method in ("repa", "reg")
                  if method in summary["methods"] and method != target}
        reached = " and by ".join(f"{METHODS[method].title} {words_of(found)}" for method, found in others.items() if found["seeds"])
        if reached:
            said.append(f"{METHODS[target].title}'s distance after {last:,} steps ({value:.2f}) is reached by {reached}")
    return "; ".join(said) + "." if said else ""


def words_of(reached: dict) -> str:
    there, runs = sum(steps is not None for steps in reached["steps"]), reached["seeds"]
    if there < runs:
        return f"in {there or 'none'} of {runs} runs"
    at_least = "at least " if reached["bound"] else ""
    return f"after {shown_steps(reached, 0)} ({at_least}{reached['factor']['mean']:.2f} times fewer)"
