"""What a run cost until it reached a score: samples, epochs and GPU hours at thresholds of FID.

    bash eval.sh EXP_DIR --preset nfe100 --steps 50000,100000,200000,400000     # scores first: a sweep over checkpoints
    python -m evaluations.efficiency EXP_DIR --thresholds 20,10,5,3,2

Reads EXP_DIR's args.json, metrics.jsonl and samples/sweep.json; writes samples/efficiency.json and efficiency.png.
Rows of the sweep that differ in the step alone are one curve. Between two scores it is a straight line in log-log
coordinates; nothing is extrapolated.
"""

import argparse
import json
import math
from pathlib import Path

from evaluations.images import reference_label
from evaluations.report import GUIDANCE, distance_of
from runtime.arguments import Parser, positive
from runtime.files import write_json, write_whole
from runtime.log import read_lines
from runtime.messages import UserError, say, without_traceback

# Rows that agree in these are one curve over the steps.
SAME = ("weights", "mode", "heun", "num_steps", "cfg_scale", *GUIDANCE, "time_shift", "seed", "network_precision",
        "vae", "block", "num_samples", "labels", "features", "feature_weights")
# What the JSON says of the run, by the names of train.py's flags.
DESCRIBED = ("method", "model", "enc_type", "encoder_depth", "proj_coeff", "cls", "align", "path_type", "weighting",
             "time_shift", "learning_rate", "batch_size", "ema_decay", "mixed_precision", "seed", "resolution",
             "images", "processes", "hardware")
NEVER, EARLY = "not reached", "reached at or before the first scored checkpoint"        # no curve tells where


def crossing(curve: dict[float, float], target: float) -> float | None:
    """The first place at which a curve {place: distance} is down to `target`, or None.

    Between its points it is a straight line in log-log coordinates. At `target` from the start: the first place.
    """
    points = sorted(curve.items())
    if points[0][1] <= target:
        return float(points[0][0])
    for (place, distance), (next_place, next_distance) in zip(points[:-1], points[1:], strict=True):
        if next_distance <= target:
            share = math.log(distance / target) / math.log(distance / max(next_distance, 1e-9))     # equal sets give 0
            return place * (next_place / place) ** share
    return None


def hours_at(lines: list[dict], batch_size: int, processes: int) -> dict[int, float]:
    """GPU hours of training up to each logged step; saving, grids and scores do not count.

    `processes` are those of the last start.
    """
    hours, found, before = 0.0, {}, 0
    for line in lines:
        rate = line.get("images_per_second")
        if rate:
            hours += (line["step"] - before) * batch_size / rate / 3600 * processes
            before = line["step"]
            found[before] = hours
    return found


def distances_of(row: dict) -> dict[str, float]:
    """The Frechet distances of a row by the label of their reference, such as adm:b3273271."""
    key = distance_of(row)
    several = {name.partition("@")[2]: value for name, value in row.items() if name.startswith(f"{key}@")}
    return several or {reference_label(row["reference"], row["reference_sha256"]): row[key]}


def curves_of(rows: list[dict], args: dict, hours: dict[int, float]) -> list[dict]:
    """The curves of a sweep's `rows`: what they have in common, and a point for each step."""
    groups: dict[tuple, list[tuple[int, float]]] = {}
    for row in rows:
        if distance_of(row) and row["step"]:
            for label, distance in distances_of(row).items():
                same = (label, distance_of(row), *(row[name] for name in SAME))
                groups.setdefault(same, []).append((row["step"], distance))
    curves = []
    for (label, key, *same), group in groups.items():
        points = [{"step": step, "samples": step * args["batch_size"], "gpu_hours": hours.get(step),
                   "epochs": step * args["batch_size"] / args["images"] if args.get("images") else None, key: distance}
                  for step, distance in sorted(group)]
        curves.append({"distance": key, "reference": label, **dict(zip(SAME, same, strict=True)), "points": points})
    return sorted(curves, key=lambda curve: -len(curve["points"]))


def cross(curve: dict, thresholds: list[float]) -> dict[str, dict | str]:
    """By threshold: samples, epochs and GPU hours at which the curve crosses it, or NEVER or EARLY."""
    found, points, key = {}, curve["points"], curve["distance"]
    for threshold in thresholds:
        at = {unit: crossing({point[unit]: point[key] for point in points}, threshold)
              for unit in ("samples", "epochs", "gpu_hours") if all(point[unit] for point in points)}
        early = points[0][key] <= threshold
        found[f"{threshold:g}"] = EARLY if early else NEVER if at["samples"] is None else at
    return found


def named(curve: dict, crossings: dict) -> dict[str, float]:
    """The field's names of crossings: EP_FID@k, epochs until unguided FID-50K <= k; Samples-to-FID-k of 100 steps."""
    if curve["distance"] != "fid" or curve["cfg_scale"] != 1 or curve["num_samples"] != 50_000:
        return {}
    reached = {k: at for k, at in crossings.items() if isinstance(at, dict)}
    few = curve["mode"] == "ode" and curve["num_steps"] * (1 + curve["heun"]) <= 100
    return ({f"EP_FID@{k}": at["epochs"] for k, at in reached.items() if "epochs" in at}
            | {f"Samples-to-FID-{k}": at["samples"] for k, at in reached.items() if few})


def draw(path: Path, curves: list[dict], thresholds: list[float]) -> None:
    """Plot the distance over training samples, both logarithmic, with the thresholds dotted."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(7, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        setting = f"{curve['mode']} {curve['num_steps']}, scale {curve['cfg_scale']:g}, n {curve['num_samples']:,}"
        axes.loglog([point["samples"] for point in curve["points"]],
                    [point[curve["distance"]] for point in curve["points"]], marker="o", label=setting)
    for threshold in thresholds:
        axes.axhline(threshold, color="gray", linestyle=":", linewidth=1)
    axes.set(xlabel="training samples", ylabel=" or ".join(dict.fromkeys(curve["distance"] for curve in curves)))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    write_whole(path, lambda partial: figure.savefig(partial, format="png"))


def read_json(path: Path, kind: type, names: tuple[str, ...], remedy: str):
    """A JSON object with `names`, or a list of such (`kind`). Raises UserError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for one in found if kind is list and isinstance(found, list) else [found]:
            if not isinstance(one, dict) or not one.keys() >= set(names):
                raise ValueError(f"lacks {', '.join(names)[:60]} ...")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {remedy}") from error
    return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m evaluations.efficiency", description=__doc__.splitlines()[0])
    parser.add_argument("experiment", type=Path, metavar="EXP_DIR", help="experiment folder with scored samples")
    parser.add_argument("--thresholds", type=lambda text: [*map(positive, text.split(","))], default="20,10,5,3,2",
                        metavar="LIST", help="distances")
    return parser.parse_args(argv)


@without_traceback
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    samples = args.experiment / "samples"
    trained = read_json(args.experiment / "args.json", dict, ("batch_size",), "name the folder of an experiment")
    rows = read_json(samples / "sweep.json", list, ("experiment", "step", "reference", "reference_sha256", *SAME),
                     "score checkpoints first: REF_BATCH=... bash eval.sh EXP_DIR --steps LIST")
    processes = trained.get("processes")                          # runs of earlier versions do not tell
    lines = read_lines(args.experiment / "metrics.jsonl") if processes else []
    rows = [row for row in rows if row["experiment"] == args.experiment.resolve().name]
    curves = curves_of(rows, trained, hours_at(lines, trained["batch_size"], processes))
    if not curves:
        raise UserError(f"{samples / 'sweep.json'}: holds no distances of {args.experiment}; score its checkpoints")
    for curve in curves:
        curve["crossings"] = cross(curve, args.thresholds)
        names = named(curve, curve["crossings"])
        curve |= names
        say(f"{curve['distance']} against {curve['reference']}, {curve['mode']} {curve['num_steps']} steps, "
            f"scale {curve['cfg_scale']:g}, {curve['num_samples']:,} samples, {len(curve['points'])} checkpoints")
        for threshold, at in curve["crossings"].items():
            text = at if isinstance(at, str) else ", ".join(f"{value:,.4g} {unit.replace('_', ' ')}"
                                                            for unit, value in at.items())
            say(f"  {threshold:>6}: {text}")
        for name, value in names.items():
            say(f"  {name}: {value:,.4g}")
    write_json(samples / "efficiency.json", {"run": {name: trained.get(name) for name in DESCRIBED}, "curves": curves})
    draw(samples / "efficiency.png", curves, args.thresholds)
    say(f"see {samples / 'efficiency.json'} and efficiency.png")


if __name__ == "__main__":
    main()
