"""What a folder of scored samples says: a table with the best marked, and a plot of the distance against the guidance scale."""

import csv
import json
import math
from pathlib import Path

from runtime.files import write_whole
from runtime.messages import notice
from runtime.run import CHECKPOINTS

METRICS = "metrics*.json"  # one for each feature network in which the samples of a folder were scored
GUIDANCE = ("cls_cfg_scale", "guidance_low", "guidance_high")                     # mean nothing without guidance, scale 1
# The table's columns before the scores. A distance is comparable to others of the same PROTOCOL only.
PROTOCOL = ("num_samples", "labels", "features", "feature_weights", "reference")
SETTINGS = ("experiment", "step", "checkpoint", "weights", "mode", "heun", "num_steps", "cfg_scale", *GUIDANCE, "seed",
            "network_precision", "vae", "block", *PROTOCOL)


def distance_of(row: dict) -> str | None:
    """The key of the Frechet distance in a row or a metrics.json: "fid", or "fd_<features>"."""
    return "fid" if "fid" in row else next((key for key in row if key.startswith("fd_")), None)


def protocol(row: dict) -> tuple:
    """Rows of one protocol are comparable: a smaller distance from fewer samples, or in other features, is not a better one."""
    return *(row[name] for name in PROTOCOL), distance_of(row)


def read_result(metrics: Path) -> dict | None:
    """What the evaluator wrote of samples that generate.py made; None, said, if the file is of another form."""
    try:
        result = json.loads(metrics.read_text(encoding="utf-8"))
    except ValueError:
        result = {}
    if not isinstance(result, dict) or not {"asked", "settings", "weights_sha256"} <= result.keys():
        notice(f"{metrics} is passed over: it is no score that this version wrote of samples of generate.py")
        return None
    return result


def read_row(metrics: Path, result: dict) -> dict:
    """A row of the table from a metrics.json, whose top-level fractions are the scores. None: does not apply, or as --cfg-scale."""
    settings, how = result["settings"], result["settings"]["sampling"]
    path = Path(settings["checkpoint"])
    row = {
        "experiment": path.parent.parent.name if path.parent.name == CHECKPOINTS else path.stem,
        "step": settings["step"], "checkpoint": settings["checkpoint_sha256"][:8], "weights": settings["weights"],
        "mode": how["mode"], "heun": how["heun"], "num_steps": how["num_steps"],
        "cfg_scale": how["cfg_scale"], **{name: None if how["cfg_scale"] == 1 else how[name] for name in GUIDANCE},
        "seed": how["seed"], "network_precision": how["precision"], "vae": settings["vae"], "block": settings["per_proc_batch_size"],
        "num_samples": result["num_samples"],
        "labels": how["labels"] if how["classes"] is None else "classes " + " ".join(map(str, how["classes"])),
        "features": result["features"], "feature_weights": result["weights_sha256"][:8], "reference": result["ref_batch"],
    }
    return row | {name: value for name, value in result.items() if isinstance(value, float)} | {"folder": metrics.parent.name}


def read_rows(samples: Path) -> list[dict]:
    """A row for all that was scored below the folder, sorted; `best` is true for the lowest distance among those comparable to it."""
    rows = sorted((read_row(path, result) for path in sorted(samples.glob(f"*/{METRICS}")) if (result := read_result(path)) is not None),
                  key=lambda row: [(row[name] is not None, row[name]) for name in SETTINGS])
    lowest: dict[tuple, float] = {}
    for row in rows:
        lowest[protocol(row)] = min(lowest.get(protocol(row), math.inf), row.get(distance_of(row), math.inf))
    return [row | {"best": row.get(distance_of(row)) == lowest[protocol(row)]} for row in rows]


def scores_of(rows: list[dict]) -> list[str]:
    """The scores that any row has, distances first."""
    found = dict.fromkeys(name for row in rows for name in row if name not in (*SETTINGS, "best", "folder"))
    return sorted(found, key=lambda name: not name.startswith(("fid", "fd_")))


def write_table(samples: Path, rows: list[dict]) -> None:
    """sweep.csv and sweep.json."""
    def write_csv(partial: Path) -> None:
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*SETTINGS, *scores_of(rows), "best", "folder"])
            writer.writeheader()
            writer.writerows(rows)

    write_whole(samples / "sweep.csv", write_csv)
    write_whole(samples / "sweep.json", lambda partial: partial.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8"))


def differing(rows: list[dict], names=SETTINGS) -> list[str]:
    """The settings in which the rows differ; the checkpoint's hash only where it says more than experiment and step."""
    found = [name for name in names if len({row[name] for row in rows}) > 1]
    if len({row["checkpoint"] for row in rows}) == len({(row["experiment"], row["step"]) for row in rows}):
        found = [name for name in found if name != "checkpoint"]
    return found


def as_text(rows: list[dict]) -> str:
    """The table for a terminal: scale and number of samples, other settings that differ, and the scores; an asterisk marks the best."""
    names = [name for name in SETTINGS if name in ("cfg_scale", "num_samples", "labels", *differing(rows))] + scores_of(rows)
    cells = [[shown(row.get(name)) for name in names] + ["*" if row["best"] else ""] for row in rows]
    table = [[*names, "best"], *cells]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table)


def shown(value) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


# ----------------------------------------------------------------------------------------------------------------------- plot

def lines_of(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of one protocol as lines over the scale, by a label that names what differs.

    A line of guided rows begins with the unguided row of otherwise equal settings; one that begins none is a line by itself.
    """
    others = [name for name in SETTINGS if name not in ("cfg_scale", *GUIDANCE, *PROTOCOL)]
    guided, unguided = ([row for row in rows if (row["cfg_scale"] > 1) == wanted] for wanted in (True, False))
    lines: dict[str, list[dict]] = {}
    for row in guided + unguided:
        label = [words(name, row[name]) for name in differing(rows, others)]
        start = []
        if row in guided:
            label += [f"t in [{row['guidance_low']:g}, {row['guidance_high']:g}]"]
            label += [words(name, row[name]) for name in differing(guided, ("cls_cfg_scale",))]
            start = [other for other in unguided if all(other[name] == row[name] for name in others)]
        elif any(row in line for line in lines.values()):
            continue
        lines.setdefault(", ".join(label) or "unguided", start).append(row)
    return lines


def words(name: str, value) -> str:
    if name == "cls_cfg_scale":
        return "class scale as scale" if value is None else f"class scale {value:g}"
    return f"{name.replace('_', ' ')} {shown(value)}"


def draw(path: Path, rows: list[dict], groups: list[tuple]) -> None:
    """One panel per group of comparable rows (`protocol`): distance over guidance scale, one line per interval, a star at the best."""
    from matplotlib.figure import Figure  # slow to import, and only this needs it

    figure = Figure(figsize=(1.2 + 6 * len(groups), 4.8), dpi=150, layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        inside = [row for row in rows if protocol(row) == group]
        key = group[-1]
        for label, line in lines_of(inside).items():
            axes.plot([row["cfg_scale"] for row in line], [row[key] for row in line], marker="o", label=label)
        for row in inside:
            if row["best"]:
                axes.plot(row["cfg_scale"], row[key], marker="*", markersize=16, color="gold", markeredgecolor="black", zorder=3)
                axes.annotate(f"{row[key]:.4g}", (row["cfg_scale"], row[key]), (0, -14), textcoords="offset points", ha="center", va="top")
        common = [words(name, inside[0][name]) for name in ("experiment", "step", "mode", "num_steps") if name not in differing(inside)]
        axes.set_title(f"{inside[0]['num_samples']:,} samples, labels {inside[0]['labels']}\n{', '.join(common)}", fontsize="medium")
        axes.set(xlabel="guidance scale (1: unguided)", ylabel="FID" if key == "fid" else f"Frechet distance ({key.removeprefix('fd_')})")
        axes.margins(0.08, 0.15)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    write_whole(path, lambda partial: figure.savefig(partial, format="png"))
