"""The check of this evaluator against published numbers, for whoever has the published files: `evaluator selftest FOLDER`.

ADM's authors released sample batches together with their scores. The numbers below were published, by ADM and by users of its
TensorFlow evaluator; none was measured with this code.
"""

from dataclasses import dataclass

# Scores of two implementations differ in the last digits (another machine's convolutions move FID and IS by up to 7e-4 of
# their value), and precision and recall in the third decimal, which ADM's float16 distances leave open.
RELATIVE, ABSOLUTE = 1e-3, 0.002


@dataclass(frozen=True)
class Published:
    """Two of ADM's files and the scores of one against the other."""

    ref: str
    sample: str
    scores: dict[str, float]


PUBLISHED = (
    Published("VIRTUAL_imagenet256_labeled.npz", "admnet_guided_upsampled_imagenet256.npz",
              {"inception_score": 215.8370, "fid": 3.942557, "sfid": 6.140434, "precision": 0.8265, "recall": 0.5309}),
    Published("VIRTUAL_imagenet128_labeled.npz", "admnet_guided_imagenet128.npz",
              {"inception_score": 141.4767, "fid": 2.973289, "sfid": 5.094564, "precision": 0.78138, "recall": 0.5929}),
)


def compare(published: dict[str, float], measured: dict[str, float]) -> list[tuple[str, float, float, bool]]:
    """Rows (name, published, measured, within tolerance)."""
    rows = []
    for name, value in published.items():
        tolerance = ABSOLUTE if name in ("precision", "recall") else RELATIVE * value
        rows.append((name, value, measured[name], abs(measured[name] - value) <= tolerance))
    return rows
