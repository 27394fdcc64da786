"""Scores as pure functions of numpy arrays. Letters: N images, F features."""

import numpy as np

CHUNK = 8192  # rows centred at a time: bounds the float64 copy to 128 MiB at F = 2048


def gaussian_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (F,) and covariance (F, F) of features (N, F), both float64, the covariance divided by N - 1."""
    count = len(features)
    assert count >= 2, f"a covariance needs at least 2 rows, not {count}"
    mu = features.mean(axis=0, dtype=np.float64)                                  # (F,)
    sigma = np.zeros((mu.size, mu.size))                                          # (F, F)
    for start in range(0, count, CHUNK):
        centred = features[start:start + CHUNK] - mu
        sigma += centred.T @ centred
    return mu, sigma / (count - 1)


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """|mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr sqrt(S1 S2) of two Gaussians (Heusel et al. 2017, eq. 6), in float64.

    With S1 = R R^T, tr sqrt(S1 S2) is the sum of the roots of the eigenvalues of R^T S2 R, which is symmetric: no complex
    numbers, and singular covariances are fine. Rounding leaves about 1e-12 of the traces (1e-8 when both covariances are
    singular), so that of a set with itself it can be slightly negative; it is not clipped.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    values, vectors = np.linalg.eigh(sigma1)
    root = vectors * np.sqrt(np.maximum(values, 0))                               # (F, F), R
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(root.T @ sigma2 @ root), 0)).sum()
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap)
