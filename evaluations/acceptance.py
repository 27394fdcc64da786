"""Compare this evaluator with published scores, for users who have ADM's files: `evaluator selftest FOLDER`.

ADM's authors released sample batches together with their scores. The numbers below were published by ADM and by users
of its TensorFlow evaluator; none was measured with this code.
"""

from dataclasses import dataclass
from pathlib import Path

from evaluations.features import Extractor
from evaluations.scoring import ADM_METRICS, evaluate
from runtime.messages import UserError, say

# Scores of two implementations differ in the last digits (another machine's convolutions move FID and IS by up to 7e-4
# of their value), precision and recall in the third decimal, which ADM's float16 distances leave open.
RELATIVE, ABSOLUTE = 1e-3, 0.002


@dataclass(frozen=True)
class Published:
    """Two of ADM's files and the published scores of the sample."""

    ref: str
    sample: str
    scores: dict[str, float]


PUBLISHED = (
    Published("VIRTUAL_imagenet256_labeled.npz", "admnet_guided_upsampled_imagenet256.npz",
              {"inception_score": 215.8370, "fid": 3.942557, "sfid": 6.140434, "precision": 0.8265, "recall": 0.5309}),
    Published("VIRTUAL_imagenet128_labeled.npz", "admnet_guided_imagenet128.npz",
              {"inception_score": 141.4767, "fid": 2.973289, "sfid": 5.094564, "precision": 0.78138, "recall": 0.5929}),
)


def present(folder: Path, rows: tuple[Published, ...] = PUBLISHED) -> list[Published]:
    """The rows whose two files are in the folder. Raises UserError if there is none."""
    found = [row for row in rows if (folder / row.ref).is_file() and (folder / row.sample).is_file()]
    if not found:
        names = "; or ".join(f"{row.ref} and {row.sample}" for row in rows)
        raise UserError(f"{folder}: holds none of ADM's published pairs; download {names}")
    return found


def check(folder: Path, rows: list[Published], extractor: Extractor, batch_size: int, names: dict[str, str]) -> None:
    """Print published and measured scores, called by `names`. Raises UserError if they differ beyond the tolerance."""
    passed = True
    for row in rows:
        result = evaluate(folder / row.ref, folder / row.sample, extractor, ADM_METRICS, "adm", batch_size)
        if result is None:                                        # the first process prints
            continue
        say(f"{row.sample}\n{'':16} {'published':>12} {'here':>12}")
        for name, published, measured, close in compare(row.scores, result):
            say(f"{names[name]:16} {published:12.6g} {measured:12.6g}   {'equal' if close else 'DIFFERENT'}")
            passed &= close
    if not passed:
        raise UserError(f"{folder}: the scores differ from the published ones by more than two implementations should; "
                        f"check the files and the Inception weights (sha256 {extractor.weights_sha256})")


def compare(published: dict[str, float], measured: dict[str, float]) -> list[tuple[str, float, float, bool]]:
    """Rows (name, published, measured, within tolerance)."""
    rows = []
    for name, value in published.items():
        tolerance = ABSOLUTE if name in ("precision", "recall") else RELATIVE * value
        rows.append((name, value, measured[name], abs(measured[name] - value) <= tolerance))
    return rows
