"""The comparison's pictures: distance against steps, samples by method and step, and the class token beside its image."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from runtime.files import write_whole
from toy.summary import METHODS

COLOURS = {"sit": "tab:gray", "repa": "tab:blue", "reg": "tab:red", "class-token": "tab:orange", "patches": "tab:purple"}
PER_CELL = 4                 # samples in a cell of samples.png, two by two


def draw_figures(results: dict, pictures: dict[tuple[str, int], dict[str, np.ndarray]], training: np.ndarray, output: Path) -> None:
    """Write convergence.png, samples.png and, where a method generates class tokens, class_token.png.

    Args:
        pictures: of each (method, seed), `images` uint8 (steps, n, 3, R, R) and perhaps `neighbours` (steps, n, k), rows of `training`.
        training: uint8 (T, R, R, 3).
    """
    seeds = Counter(seed for _, seed in sorted(pictures, key=lambda key: key[1]))
    (seed, _), = seeds.most_common(1)                    # rows share their noise: those of one seed
    rows = {method: pictures[method, seed] for method in METHODS if (method, seed) in pictures}
    figures = {"convergence.png": convergence(results), "samples.png": samples(results, rows)}
    with_token = [method for method, arrays in rows.items() if "neighbours" in arrays]
    if with_token:
        chosen = "reg" if "reg" in with_token else with_token[0]
        figures["class_token.png"] = class_token(results, chosen, rows[chosen], training)
    for name, figure in figures.items():
        save(figure, output / name, digest(results))


def digest(results: dict) -> str:
    """What a figure carries to say which results it shows."""
    return hashlib.sha256(json.dumps(results["pieces"]).encode()).hexdigest()


def save(figure: Figure, path: Path, results: str) -> None:
    write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=130, metadata={"Results": results}))


def over_seeds(axes: Axes, curve: list[dict], key: str, **style) -> None:
    """The mean of a score against steps, and a band of one standard deviation."""
    steps, means = [point["step"] for point in curve], np.array([point[key]["mean"] for point in curve])
    (line,) = axes.plot(steps, means, marker="o", markersize=3, **style)
    spread = np.array([point[key]["std"] or 0 for point in curve])
    axes.fill_between(steps, means - spread, means + spread, color=line.get_color(), alpha=0.2, linewidth=0)


def convergence(results: dict) -> Figure:
    """Left: distance against steps; right: the distance over SiT's of the same seed, in which the noise that they share is gone."""
    summary = results["summary"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes, beside = figure.subplots(1, 2)
    for method, found in summary["methods"].items():
        style = {"color": COLOURS[method], "label": METHODS[method].title}
        over_seeds(axes, found["curve"], "distance", **style)
        if "beside_sit" in found:
            over_seeds(beside, found["beside_sit"], "distance", **style)
    for target, value in summary["targets"].items():
        axes.axhline(value, color=COLOURS[target], linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="training steps", ylabel="Frechet distance, toy features")
    low, high = axes.get_ylim()
    ticks = [tick for tick in (0.2, 0.5, 1, 2, 3, 4, 5, 7, 10, 20, 50, 100) if low < tick < high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.legend(fontsize=8)
    beside.axhline(1, color=COLOURS["sit"], linewidth=1)
    beside.set(xscale="log", xlabel="training steps", ylabel="distance over SiT's, seed by seed")
    for panel in (axes, beside):
        step_ticks(panel, results["setting"]["steps"])
    return figure


def step_ticks(axes: Axes, steps: list[int]) -> None:
    axes.set_xticks(steps, [f"{step:,}" for step in steps], fontsize=7, rotation=45)
    axes.minorticks_off()


def mosaic(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 images (n, R, R, 3), n a multiple of `columns`, with a white pixel around each -> one image."""
    framed = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    n, side = framed.shape[:2]
    return framed.reshape(n // columns, columns, side, side, 3).swapaxes(1, 2).reshape(n // columns * side, columns * side, 3)


def samples(results: dict, pictures: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Methods as rows, steps as columns, the same noise and labels in every cell."""
    steps = results["setting"]["steps"]
    figure = Figure(figsize=(1.1 * len(steps) + 0.8, 1.15 * len(pictures) + 0.3), layout="constrained")
    grid = figure.subplots(len(pictures), len(steps), squeeze=False)
    for axes, step in zip(grid[0], steps, strict=True):
        axes.set_title(f"{step:,}", fontsize=8)
    for row, (method, arrays) in zip(grid, pictures.items(), strict=True):
        for axes, images in zip(row, arrays["images"], strict=True):
            axes.imshow(mosaic(images[:PER_CELL].transpose(0, 2, 3, 1), 2), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(METHODS[method].title.replace(", ", ",\n"), fontsize=8)
    return figure


def class_token(results: dict, method: str, arrays: dict[str, np.ndarray], training: np.ndarray) -> Figure:
    """Left: cosines against steps; middle: agreement with the label; right: samples, and the training images nearest by class token."""
    curve, real = results["summary"]["methods"][method]["curve"], results["real"]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    cosines, agreements, nearest = figure.subplots(1, 3, width_ratios=(3, 3, 2.4))
    for key, colour, label in (("token_cosine", "tab:red", "token and its own image"),
                               ("token_cosine_other", "tab:gray", "token and another image of its label"),
                               ("token_nearest", "tab:blue", "token and the nearest training image")):
        over_seeds(cosines, curve, key, color=colour, label=label)
    cosines.axhline(real["decoded"]["token_cosine"], color="black", linestyle="--", linewidth=1, label="real images through the VAE")
    cosines.set(xscale="log", xlabel="training steps", ylabel="cosine of class tokens")
    for key, colour, label in (("token_agreement", "tab:red", "class token"), ("class_agreement", "tab:green", "image")):
        over_seeds(agreements, curve, key, color=colour, label=label)
    agreements.set(xscale="log", xlabel="training steps", ylabel="class agreement", ylim=(0, 1))
    for axes in (cosines, agreements):
        step_ticks(axes, results["setting"]["steps"])
        axes.legend(fontsize=7)
    images, neighbours = arrays["images"][-1].transpose(0, 2, 3, 1), training[arrays["neighbours"][-1]]
    rows = np.concatenate([images[:, None], np.full_like(images, 255)[:, None], neighbours], axis=1)      # (n, 2 + k, R, R, 3)
    nearest.imshow(mosaic(rows.reshape(-1, *rows.shape[2:]), rows.shape[1]), interpolation="nearest")
    nearest.set_title("sample | nearest training images by class token", fontsize=8)
    nearest.axis("off")
    return figure
