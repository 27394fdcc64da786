"""The table of a folder of scored samples with the best marked, and the plot of distance over guidance scale."""

import csv
import math
from pathlib import Path

from evaluations.images import reference_label
from runtime.files import read_object, write_json, write_whole
from runtime.messages import notice
from runtime.run import CHECKPOINTS
from runtime.samples import METRICS

GUIDANCE = ("cls_cfg_scale", "guidance_low", "guidance_high")     # without meaning for unguided images
# The table's columns before the scores. Distances are comparable among rows of the same PROTOCOL only.
PROTOCOL = ("num_samples", "labels", "features", "feature_weights", "reference")
SETTINGS = ("experiment", "step", "checkpoint", "weights", "mode", "heun", "num_steps", "cfg_scale", *GUIDANCE,
            "time_shift", "seed", "network_precision", "vae", "block", *PROTOCOL, "reference_sha256")


def read_result(metrics: Path) -> dict | None:
    """What the evaluator wrote for samples of generate.py; None, with a notice, if the file is of another form."""
    result = read_object(metrics)
    if not {"asked", "settings", "weights_sha256"} <= result.keys():
        notice(f"{metrics}: not scores of samples that generate.py made; left out")
        return None
    return result


def references_of(result: dict) -> list[str]:
    """The names of the references of a result, the first one first."""
    return [one["name"] for one in result.get("references", ())] or [result["ref_batch"]]


def distance_of(row: dict) -> str | None:
    """The key of the Frechet distance in a row: "fid", or "fd_<features>"."""
    return "fid" if "fid" in row else next((key for key in row if key.startswith("fd_")), None)


def protocol(row: dict) -> tuple:
    """Equal for comparable rows: fewer samples or other features may give a smaller distance that is not better."""
    return *(row[name] for name in PROTOCOL), distance_of(row)


def read_row(metrics: Path, result: dict) -> dict:
    """A row of the table; its scores are the fractions at the top of metrics.json. None: not applicable, or default."""
    settings, how = result["settings"], result["settings"]["sampling"]
    path = Path(settings["checkpoint"])
    row = {
        "experiment": path.parent.parent.name if path.parent.name == CHECKPOINTS else path.stem,
        "step": settings["step"], "checkpoint": settings["checkpoint_sha256"][:8], "weights": settings["weights"],
        "mode": how["mode"], "heun": how["heun"], "num_steps": how["num_steps"], "cfg_scale": how["cfg_scale"],
        **{name: None if how["cfg_scale"] == 1 else how[name] for name in GUIDANCE},
        "time_shift": how.get("time_shift", 1.0), "seed": how["seed"], "network_precision": how["precision"],
        "vae": settings["vae"], "block": settings["per_proc_batch_size"], "num_samples": result["num_samples"],
        "labels": (f"captions {how['captions']} {how['prompts_sha256'][:6]}" if "captions" in how else how["labels"]
                   if how["classes"] is None else "classes " + " ".join(map(str, how["classes"]))),
        "features": result["features"], "feature_weights": result["weights_sha256"][:8],
        "reference": result["ref_batch"], "reference_sha256": result.get("reference_sha256"),
    }
    scores = {name: value for name, value in result.items() if isinstance(value, float)}
    for one in result.get("references", ()):                      # the first one too: fid@adm:b3273271
        label = reference_label(one["name"], one["sha256"])
        scores |= {f"{name}@{label}": value for name, value in one.items() if isinstance(value, float)}
    return row | scores | {"folder": metrics.parent.name}


def read_rows(samples: Path) -> list[dict]:
    """A row for everything scored below the folder, sorted; `best` marks the lowest distance among comparable rows."""
    rows = []
    for path in sorted(samples.glob(f"*/{METRICS}")):
        try:
            rows += [read_row(path, result) for result in [read_result(path)] if result is not None]
        except (LookupError, TypeError, AttributeError) as error:
            notice(f"{path}: not what the evaluator writes ({error!r:.80}); left out")
    rows.sort(key=lambda row: [(row[name] is not None, row[name]) for name in SETTINGS])
    lowest: dict[tuple, float] = {}
    for row in rows:
        lowest[protocol(row)] = min(lowest.get(protocol(row), math.inf), row.get(distance_of(row), math.inf))
    return [row | {"best": row.get(distance_of(row)) == lowest[protocol(row)]} for row in rows]


def scores_of(rows: list[dict]) -> list[str]:
    """The scores that any row has, distances first."""
    found = dict.fromkeys(name for row in rows for name in row if name not in (*SETTINGS, "best", "folder"))
    return sorted(found, key=lambda name: not name.startswith(("fid", "fd_")))


def write_table(samples: Path, rows: list[dict]) -> None:
    """Write sweep.csv and sweep.json."""
    def write_csv(partial: Path) -> None:
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*SETTINGS, *scores_of(rows), "best", "folder"])
            writer.writeheader()
            writer.writerows(rows)

    write_whole(samples / "sweep.csv", write_csv)
    write_json(samples / "sweep.json", rows)


def differing(rows: list[dict], names=SETTINGS) -> list[str]:
    """The settings in which the rows differ; the checkpoint's hash only if it tells more than experiment and step."""
    found = [name for name in names if len({row[name] for row in rows}) > 1]
    if len({row["checkpoint"] for row in rows}) == len({(row["experiment"], row["step"]) for row in rows}):
        found = [name for name in found if name != "checkpoint"]
    return found


def as_text(rows: list[dict]) -> str:
    """The table for a terminal: scale, number of samples, settings that differ, scores, and an asterisk at the best."""
    names = [name for name in SETTINGS if name in ("cfg_scale", "num_samples", "labels", *differing(rows))]
    # `fid` is left out if every row that has it also has it with a reference's name, as `fid@adm:b3273271`.
    names += [name for name in scores_of(rows)
              if any(name in row and not any(other.startswith(f"{name}@") for other in row) for row in rows)]
    cells = [[shown(row.get(name)) for name in names] + ["*" if row["best"] else ""] for row in rows]
    table = [[*names, "best"], *cells]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table)


def shown(value) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


# ----------------------------------------------------------------------------------------------------------------- plot

def lines_of(rows: list[dict]) -> dict[str, list[dict]]:
    """Comparable rows as lines over the guidance scale, by a label of the settings that differ.

    A line starts at the unguided row of otherwise equal settings; an unguided row without guided ones is its own line.
    """
    names = [name for name in SETTINGS if name not in ("cfg_scale", *GUIDANCE, *PROTOCOL)]
    guided, unguided = ([row for row in rows if (row["cfg_scale"] > 1) == wanted] for wanted in (True, False))
    lines: dict[str, list[dict]] = {}
    for row in guided + unguided:
        label = [words(name, row[name]) for name in differing(rows, names)]
        start = []
        if row in guided:
            label += [f"t in [{row['guidance_low']:g}, {row['guidance_high']:g}]"]
            label += [words(name, row[name]) for name in differing(guided, ("cls_cfg_scale",))]
            start = [other for other in unguided if all(other[name] == row[name] for name in names)]
        elif any(row in line for line in lines.values()):
            continue
        lines.setdefault(", ".join(label) or "unguided", start).append(row)
    return lines


def words(name: str, value) -> str:
    if name == "cls_cfg_scale":
        return "class scale as scale" if value is None else f"class scale {value:g}"
    return f"{name.replace('_', ' ')} {shown(value)}"


def draw(path: Path, rows: list[dict], groups: list[tuple]) -> None:
    """Plot distance over guidance scale: a panel per group of comparable rows (`protocol`), a star at the best."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(1.2 + 6 * len(groups), 4.8), dpi=150, layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        inside = [row for row in rows if protocol(row) == group]
        key = group[-1]
        for label, line in lines_of(inside).items():
            axes.plot([row["cfg_scale"] for row in line], [row[key] for row in line], marker="o", label=label)
        for best in (row for row in inside if row["best"]):
            place = best["cfg_scale"], best[key]
            axes.plot(*place, marker="*", markersize=16, color="gold", markeredgecolor="black", zorder=3)
            axes.annotate(f"{best[key]:.4g}", place, (0, -14), textcoords="offset points", ha="center", va="top")
        common = [words(name, inside[0][name]) for name in ("experiment", "step", "mode", "num_steps")
                  if name not in differing(inside)]
        title = f"{inside[0]['num_samples']:,} samples, labels {inside[0]['labels']}\n{', '.join(common)}"
        axes.set_title(title, fontsize="medium")
        axes.set(xlabel="guidance scale (1: unguided)",
                 ylabel="FID" if key == "fid" else f"Frechet distance ({key.removeprefix('fd_')})")
        axes.margins(0.08, 0.15)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    write_whole(path, lambda partial: figure.savefig(partial, format="png"))


def write_report(folders: list[Path]) -> list[str]:
    """Write table and plot beside the folders of this call; returns the lines to print."""
    samples, names = folders[0].parent, {folder.name for folder in folders}
    rows = read_rows(samples)
    write_table(samples, rows)
    called = [row for row in rows if row["folder"] in names and distance_of(row)]
    if called:
        draw(samples / "sweep.png", rows, list(dict.fromkeys(map(protocol, called))))
    return [as_text(rows), f"table: {samples / 'sweep.csv'}", *([f"plot: {samples / 'sweep.png'}"] if called else [])]
