"""`evaluate`: two sets of images -> their scores and a record of how they were made."""

import importlib.metadata
from collections.abc import Callable, Sequence

import numpy as np
import torch

from evaluations.extraction import Measured, all_threads, file_statistics, measure, measure_all, place
from evaluations.features import Extractor
from evaluations.images import ImageSet, open_images
from evaluations.metrics import (
    DIRECTIONS,
    MIND_SEED,
    NEIGHBOURS,
    SPLIT,
    SUBSET,
    SUBSETS,
    frechet_distance,
    inception_score,
    kernel_distance,
    monge_distance,
    precision_recall,
    side_by_side,
)
from evaluations.networks import FDR6, OTHERS
from runtime.messages import UserError, notice
from runtime.speed import full_precision

ADM_METRICS = ("inception_score", "fid", "sfid", "precision", "recall")
INCEPTION_METRICS = (*ADM_METRICS, "kid", "mind", "fdr6")
NEIGHBOUR_METRICS = ("precision", "recall")
OTHER_METRICS = ("fd", "kid", "mind")  # in any other features
# The field of Measured that a score needs of both sets; the Inception Score needs it of the samples only.
NEEDS = {"inception_score": "pooled", "fid": "gaussian", "fd": "gaussian", "sfid": "spatial", "precision": "pooled",
         "recall": "pooled", "kid": "pooled", "mind": "pooled", "fdr6": "gaussian"}


def evaluate(ref, sample, extractor: Extractor, metrics: Sequence[str] | None = None, distances: str = "adm",
             batch_size: int = 64, measured_ref: Measured | None = None,
             open_networks: Callable[[], Sequence[Extractor]] = tuple) -> dict | None:
    """Compare two sets of images; each is a path (npz, folder), an array uint8 (N, H, W, 3), or an ImageSet.

    Args:
        ref: a set, or a list of sets; the samples are read once.
        metrics: among INCEPTION_METRICS, or OTHER_METRICS in other features; None: ADM's five, or the Frechet distance.
        distances: of precision and recall: "adm" (float16, as in papers), "exact" (float32), or "off": neither score.
        measured_ref: `measure_reference` of the same reference, if it is scored repeatedly; None: measured here.
        open_networks: called for fdr6, gives its networks beside Inception; without all of them there is no mean.
    Returns:
        The content of metrics.json, on the first process; None on others. Counts are of the set's images, or of the
        feature rows that its file holds; with `..._statistics_from_file` its mu and sigma may be of more (the 10,000
        images of VIRTUAL_imagenet256 come with the statistics of 1.28 million). Of several references, `references` has
        each one's scores; those at the top are the first one's. Raises UserError for sets that cannot be scored.
    """
    sample = open_images(sample, "the sample batch")
    refs = [open_images(one, "the reference batch") for one in (ref if isinstance(ref, list) else [ref])]
    chosen = choose(metrics, refs, sample, extractor, distances)
    lacking = [_lacking(one, is_ref=True) | _lacking(sample, is_ref=False) if "fdr6" in names else {*OTHERS}
               for one, names in zip(refs, chosen, strict=True)]
    networks = open_networks() if any("fdr6" in names for names in chosen) else ()

    def jobs(names: set[str], without: set[str]) -> list[tuple[Extractor, set[str]]]:
        more = [(network, {"gaussian"}) for network in networks if network.name not in without]
        return [(extractor, {NEEDS[name] for name in names}), *more]

    b = [{extractor.key: measured_ref}] if measured_ref else [
        measure_all(one, jobs({*names} - {"inception_score"}, without), batch_size)
        for one, names, without in zip(refs, chosen, lacking, strict=True)]
    a = measure_all(sample, jobs(set().union(*chosen), set.intersection(*lacking)), batch_size)
    if place()[0] != 0:
        return None
    results = [_result(*one, sample, extractor, distances, a) for one in zip(refs, chosen, b, strict=True)]
    several = [{"name": one.name, "num_reference": own["num_reference"], **{
        key: score for key, score in own.items() if isinstance(score, float) and key != "inception_score"}}
        for one, own in zip(refs, results, strict=True)]
    weights = {"fdr6_weights": {one.name: one.weights_sha256 for one in networks}} if networks else {}
    return results[0] | weights | ({"references": several} if len(refs) > 1 else {})


def _result(ref: ImageSet, metrics: Sequence[str], b: dict[str, Measured], sample: ImageSet, extractor: Extractor,
            distances: str, a: dict[str, Measured]) -> dict:
    """Scores and record of samples `a` and one reference `b`, each measured by networks, by their keys."""
    by_statistics = any(NEEDS[name] != "pooled" for name in metrics)
    _warn(ref, sample, extractor, metrics, a[extractor.key])
    scores, modes = _scores(a, b, extractor, metrics, distances)
    on_gpu = extractor.device.type == "cuda"
    return scores | {
        "num_samples": _rows(sample, extractor),
        "num_reference": _rows(ref, extractor),
        "sample_statistics_from_file": by_statistics and file_statistics(sample, extractor) is not None,
        "reference_statistics_from_file": by_statistics and file_statistics(ref, extractor) is not None,
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


def _scores(a: dict[str, Measured], b: dict[str, Measured], extractor: Extractor, metrics: Sequence[str],
            distances: str) -> tuple[dict[str, float], dict[str, str]]:
    """Scores of samples `a` and reference `b` (by networks) by their keys in JSON, and how some were computed."""
    scores, modes = {}, {}
    pairs = {key: (a[key].gaussian, one.gaussian) for key, one in b.items() if one.gaussian is not None}
    a, b = a[extractor.key], b[extractor.key]
    with full_precision(extractor.device), all_threads():
        if "inception_score" in metrics:
            parts = side_by_side(lambda rows: rows @ extractor.classifier.T, a.pooled.split(512), extractor.device)
            scores["inception_score"] = inception_score(torch.cat(parts))         # of (N, 1008)
            modes["inception_score"] = f"slices of {SPLIT} in file order"
        pairs |= {"sfid": (a.spatial, b.spatial)} if "sfid" in metrics else {}
        found = side_by_side(lambda pair: frechet_distance(*pair[0], *pair[1]), pairs.values(), torch.device("cpu"))
        scores |= dict(zip(pairs, found, strict=True))
        if {*NEIGHBOUR_METRICS} & set(metrics):
            both = zip(NEIGHBOUR_METRICS, precision_recall(b.pooled, a.pooled, distances), strict=True)
            scores |= {name: value for name, value in both if name in metrics}
            modes["precision_recall"] = distances
        if "kid" in metrics:
            key = extractor.key_of("kid")
            scores[key], scores[f"{key}_std"] = kernel_distance(b.pooled, a.pooled)
            modes["kid"] = f"{SUBSETS} subsets of {min(SUBSET, len(a.pooled), len(b.pooled))}, seed 0"
        if "mind" in metrics:
            scores[extractor.key_of("mind")] = monge_distance(b.pooled, a.pooled)
            modes["mind"] = f"{DIRECTIONS} directions, {min(len(a.pooled), len(b.pooled))} rows, seed {MIND_SEED}"
    if "fdr6" in metrics:
        ratios = {name: scores[key] / row.constant for name, row in FDR6.items()
                  if (key := extractor.key if name == "inception" else f"fd_{name}") in scores}
        if missing := ", ".join(f"{name} ({row.file})" for name, row in OTHERS.items() if name not in ratios):
            notice(f"without fdr6, the mean of six: no weights or no statistics of {missing}")
        else:
            scores["fdr6"] = sum(ratios.values()) / len(ratios)
        modes["fdr6"] = f"none without {missing}" if missing else "mean of distance / constant"
    return scores, modes


def choose(metrics: Sequence[str] | None, refs: ImageSet | Sequence[ImageSet], sample: ImageSet, extractor: Extractor,
           distances: str = "adm") -> list[tuple[str, ...]]:
    """The metrics to compute for each reference; an impossible one is left out.

    Raises UserError if one that was asked for is impossible with every reference, or all are with one.
    """
    refs = [refs] if isinstance(refs, ImageSet) else refs
    possible = INCEPTION_METRICS if extractor.is_inception else OTHER_METRICS
    for metric in metrics or ():
        if metric not in possible:
            raise UserError(f"--metrics {metric}: unknown in {extractor.name} features; give {', '.join(possible)}")
        if metric in NEIGHBOUR_METRICS and distances == "off":
            raise UserError(f"--metrics {metric}: excluded by --precision-recall off; leave one of them out")
    asked = metrics if metrics is not None else ADM_METRICS if extractor.is_inception else OTHER_METRICS[:1]
    asked = [metric for metric in asked if metric not in NEIGHBOUR_METRICS or distances != "off"]
    every = [{metric: _obstacle(metric, ref, sample, extractor) for metric in asked} for ref in refs]
    for obstacles in every:
        for reason in sorted({reason for reason in obstacles.values() if reason}):
            names = [metric for metric in asked if obstacles[metric] == reason]
            nowhere = any(all(others[metric] for others in every) for metric in names)
            if metrics is not None and nowhere or all(obstacles.values()):
                raise UserError(f"{reason}; leave out {', '.join(names)}, or name another file")
            notice(f"without {', '.join(names)}: {reason}")
    return [tuple(metric for metric in asked if not obstacles[metric]) for obstacles in every]


def _rows(images: ImageSet, extractor: Extractor) -> int | None:
    """The number of pooled features for precision, recall, KID and MIND: those that the file has, else its images'."""
    own = file_statistics(images, extractor)
    return images.count if own is None or own.pooled is None else len(own.pooled)


def _lacking(images: ImageSet, is_ref: bool) -> set[str]:
    """The networks of FDr6 beside Inception that a set has neither statistics nor images for.

    A reference's images do not count if it has statistics: those are of more images.
    """
    if images.blocks is not None and not (is_ref and images.statistics):
        return set()
    return {*OTHERS} - {one.about["distance"].removeprefix("fd_") for one in images.more}


def _obstacle(metric: str, ref: ImageSet, sample: ImageSet, extractor: Extractor) -> str | None:
    """Why this score is impossible for these two sets, or None."""
    for images in (sample, ref):
        own = file_statistics(images, extractor)
        if NEEDS[metric] != "pooled":
            if own is None and images.blocks is None:
                published = f" ({FDR6[extractor.name].file})" if extractor.name in FDR6 else ""
                return f"{images.name}: holds no images and no statistics of {extractor.name}{published}"
            if metric == "fdr6" and len(_lacking(images, is_ref=images is ref)) == len(OTHERS):
                return f"{images.name}: holds no statistics of {', '.join(OTHERS)} (stats --networks fdr6 makes them)"
            if metric == "sfid" and own is not None and own.mu_s is None:
                return f"{images.name}: holds mu and sigma but no mu_s and sigma_s"
        elif images is sample or metric != "inception_score":
            count = _rows(images, extractor)
            if count is None:
                return f"{images.name}: holds statistics and no images (arr_0) or feature rows"
            if metric in NEIGHBOUR_METRICS and count <= NEIGHBOURS:
                return f"{images.name}: holds {count} images, {NEIGHBOURS} neighbours need {NEIGHBOURS + 1}"
    return None


def warn_of_few(sets: list[tuple[int | None, str]], width: int, extractor: Extractor) -> None:
    """Print a warning if one of the sets (count, what) is too small for a covariance of `width` features."""
    few = [f"{count} {what}" for count, what in sets if count is not None and count <= width]
    if few:
        notice(f"warning: {' and '.join(few)} are fewer than {extractor.name}'s {width} features + 1: the covariance "
               "is singular, the distance is biased upward and comparable only at equal counts")


def _warn(ref: ImageSet, sample: ImageSet, extractor: Extractor, metrics: Sequence[str], a: Measured) -> None:
    """Print what makes these scores incomparable to others."""
    if sample.size and ref.size and sample.size != ref.size:
        notice(f"warning: the samples are {sample.size} and the reference {ref.size} (height, width): the scores "
               "compare with no others")
    sets = []
    for images, what in ((sample, "samples"), (ref, "reference images")):
        own = file_statistics(images, extractor)
        sets.append((images.count if own is None else own.about.get("images"), what))     # ADM's files do not hold it
        if own is None and images.statistics and images.blocks:
            notice(f"{images.name}: its statistics are of other features than {extractor.name}'s; its {images.count} "
                   "images are used")
    if a.gaussian is not None:
        warn_of_few(sets, len(a.gaussian[0]), extractor)
    labels = sample.labels
    by_class = labels is not None and len(labels) > SPLIT and labels[0] != labels[-1] and (np.diff(labels) >= 0).all()
    if "inception_score" in metrics and by_class:
        notice(f"warning: {sample.name} is sorted by class, so that slices of {SPLIT} see few classes and the "
               "Inception Score collapses: shuffle the images")
