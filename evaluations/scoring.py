"""`evaluate`: two sets of images -> their scores and a record of how they were made."""

import importlib.metadata
from collections.abc import Sequence

import numpy as np
import torch

from evaluations.extraction import Measured, all_threads, file_statistics, measure, place
from evaluations.features import Extractor
from evaluations.images import ImageSet, open_images
from evaluations.metrics import (
    NEIGHBOURS,
    SPLIT,
    SUBSET,
    SUBSETS,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    side_by_side,
)
from runtime.messages import UserError, notice
from runtime.speed import full_precision

ADM_METRICS = ("inception_score", "fid", "sfid", "precision", "recall")
INCEPTION_METRICS = (*ADM_METRICS, "kid")
NEIGHBOUR_METRICS = ("precision", "recall")
OTHER_METRICS = ("fd", "kid")  # in any other features
# The field of Measured that a score needs of both sets; the Inception Score needs it of the samples only.
NEEDS = {"inception_score": "pooled", "fid": "gaussian", "fd": "gaussian", "sfid": "spatial", "precision": "pooled",
         "recall": "pooled", "kid": "pooled"}


def evaluate(ref, sample, extractor: Extractor, metrics: Sequence[str] | None = None, distances: str = "adm",
             batch_size: int = 64, measured_ref: Measured | None = None) -> dict | None:
    """Compare two sets of images; each is a path (npz, folder), an array uint8 (N, H, W, 3), or an ImageSet.

    Args:
        metrics: among INCEPTION_METRICS, or OTHER_METRICS in other features; None: ADM's five, or the Frechet distance.
        distances: of precision and recall: "adm" (float16, as in papers), "exact" (float32), or "off": neither score.
        measured_ref: `measure_reference` of the same reference, if it is scored repeatedly; None: measured here.
    Returns:
        The content of metrics.json, on the first process; None on others. Counts are of the images in the set; with
        `..._statistics_from_file` its mu and sigma may be of more (the 10,000 images of VIRTUAL_imagenet256 come with
        the statistics of 1.28 million). Raises UserError for sets that cannot be scored.
    """
    sample, ref = open_images(sample, "the sample batch"), open_images(ref, "the reference batch")
    metrics = choose(metrics, ref, sample, extractor, distances)
    b = measured_ref or measure_reference(ref, extractor, metrics, batch_size)
    a = measure(sample, extractor, batch_size, {NEEDS[name] for name in metrics})
    if place()[0] != 0:
        return None
    by_statistics = any(NEEDS[name] != "pooled" for name in metrics)
    from_file = {name: by_statistics and file_statistics(images, extractor) is not None
                 for name, images in (("sample", sample), ("reference", ref))}
    _warn(ref, sample, extractor, metrics, a, from_file)
    scores, modes = _scores(a, b, extractor, metrics, distances)
    on_gpu = extractor.device.type == "cuda"
    return scores | {
        "num_samples": sample.count,
        "num_reference": ref.count,
        "sample_statistics_from_file": from_file["sample"],
        "reference_statistics_from_file": from_file["reference"],
        "image_size": sample.size and list(sample.size),
        "reference_image_size": ref.size and list(ref.size),
        "features": extractor.name,
        "weights_sha256": extractor.weights_sha256,
        "weights_verified": extractor.weights_verified,
        "modes": modes,
        **({"reference_about": ref.statistics.about} if ref.statistics and ref.statistics.about else {}),
        "device": torch.cuda.get_device_name(extractor.device) if on_gpu else str(extractor.device),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "numpy", "timm")},
    }


def measure_reference(ref: ImageSet, extractor: Extractor, metrics: Sequence[str], batch_size: int = 64) -> Measured:
    """What `evaluate` needs of a reference for these metrics; every process calls it."""
    return measure(ref, extractor, batch_size, {NEEDS[name] for name in metrics if name != "inception_score"})


def _scores(a: Measured, b: Measured, extractor: Extractor, metrics: Sequence[str],
            distances: str) -> tuple[dict[str, float], dict[str, str]]:
    """Scores of samples `a` and reference `b` by their keys in JSON, and how those that have variants were computed."""
    scores, modes = {}, {}
    with full_precision(extractor.device), all_threads():
        if "inception_score" in metrics:
            parts = side_by_side(lambda rows: rows @ extractor.classifier.T, a.pooled.split(512), extractor.device)
            scores["inception_score"] = inception_score(torch.cat(parts))         # of (N, 1008)
            modes["inception_score"] = f"slices of {SPLIT} in file order"
        pairs = {extractor.key: (a.gaussian, b.gaussian)} if {"fid", "fd"} & set(metrics) else {}
        pairs |= {"sfid": (a.spatial, b.spatial)} if "sfid" in metrics else {}
        found = side_by_side(lambda pair: frechet_distance(*pair[0], *pair[1]), pairs.values(), torch.device("cpu"))
        scores |= dict(zip(pairs, found, strict=True))
        if {*NEIGHBOUR_METRICS} & set(metrics):
            both = zip(NEIGHBOUR_METRICS, precision_recall(b.pooled, a.pooled, distances), strict=True)
            scores |= {name: value for name, value in both if name in metrics}
            modes["precision_recall"] = distances
        if "kid" in metrics:
            scores[extractor.kid_key], scores[f"{extractor.kid_key}_std"] = kernel_distance(b.pooled, a.pooled)
            modes["kid"] = f"{SUBSETS} subsets of {min(SUBSET, len(a.pooled), len(b.pooled))}, seed 0"
    return scores, modes


def choose(metrics: Sequence[str] | None, ref: ImageSet, sample: ImageSet, extractor: Extractor,
           distances: str = "adm") -> tuple[str, ...]:
    """The metrics to compute. Raises UserError if one that was asked for is impossible; leaves out a default one."""
    possible = INCEPTION_METRICS if extractor.is_inception else OTHER_METRICS
    for metric in metrics or ():
        if metric not in possible:
            raise UserError(f"--metrics {metric}: unknown in {extractor.name} features; give {', '.join(possible)}")
        if metric in NEIGHBOUR_METRICS and distances == "off":
            raise UserError(f"--metrics {metric}: excluded by --precision-recall off; leave one of them out")
    asked = metrics if metrics is not None else ADM_METRICS if extractor.is_inception else OTHER_METRICS[:1]
    asked = [metric for metric in asked if metric not in NEIGHBOUR_METRICS or distances != "off"]
    obstacles = {metric: _obstacle(metric, ref, sample, extractor) for metric in asked}
    for reason in sorted({reason for reason in obstacles.values() if reason}):
        names = [metric for metric in asked if obstacles[metric] == reason]
        if metrics is not None or len(names) == len(asked):
            raise UserError(f"{reason}; leave out {', '.join(names)}, or name another file")
        notice(f"without {', '.join(names)}: {reason}")
    return tuple(metric for metric in asked if not obstacles[metric])


def _obstacle(metric: str, ref: ImageSet, sample: ImageSet, extractor: Extractor) -> str | None:
    """Why this score is impossible for these two sets, or None."""
    for images in (sample, ref):
        own = file_statistics(images, extractor)
        if NEEDS[metric] != "pooled":
            if own is None and images.blocks is None:
                return f"{images.name}: holds statistics of other features and no images"
            if metric == "sfid" and own is not None and own.mu_s is None:
                return f"{images.name}: holds mu and sigma but no mu_s and sigma_s"
        elif images is sample or metric != "inception_score":
            if images.blocks is None:
                return f"{images.name}: holds statistics and no images (arr_0)"
            if metric in NEIGHBOUR_METRICS and images.count <= NEIGHBOURS:
                return f"{images.name}: holds {images.count} images, {NEIGHBOURS} neighbours need {NEIGHBOURS + 1}"
    return None


def warn_of_few(sets: list[tuple[int, str]], width: int, extractor: Extractor) -> None:
    """Print a warning if one of the sets (count, what) is too small for a covariance of `width` features."""
    few = [f"{count} {what}" for count, what in sets if count <= width]
    if few:
        notice(f"warning: {' and '.join(few)} are fewer than {extractor.name}'s {width} features + 1: the covariance "
               "is singular, the distance is biased upward and comparable only at equal counts")


def _warn(ref: ImageSet, sample: ImageSet, extractor: Extractor, metrics: Sequence[str], a: Measured,
          from_file: dict[str, bool]) -> None:
    """Print what makes these scores incomparable to others."""
    if sample.size and ref.size and sample.size != ref.size:
        notice(f"warning: the samples are {sample.size} and the reference {ref.size} (height, width): the scores "
               "compare with no others")
    for images in (sample, ref):
        if images.statistics is not None and file_statistics(images, extractor) is None:
            notice(f"{images.name}: its statistics are of other features than {extractor.name}'s; its {images.count} "
                   "images are used")
    if a.gaussian is not None:
        sets = []
        for name, images, what in (("sample", sample, "samples"), ("reference", ref, "reference images")):
            count = images.statistics.about.get("images") if from_file[name] else images.count
            sets += [(count, what)] if count is not None else []  # ADM's files do not hold the count
        warn_of_few(sets, len(a.gaussian[0]), extractor)
    labels = sample.labels
    by_class = labels is not None and len(labels) > SPLIT and labels[0] != labels[-1] and (np.diff(labels) >= 0).all()
    if "inception_score" in metrics and by_class:
        notice(f"warning: {sample.name} is sorted by class, so that slices of {SPLIT} see few classes and the "
               "Inception Score collapses: shuffle the images")
