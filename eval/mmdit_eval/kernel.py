"""Kernel distances between two sets of features: squared maximum mean discrepancy (MMD²).

`kernel_distance` is unbiased, so unlike the Fréchet distance its expectation does not depend on N.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmdit import rng
from mmdit_eval.frechet import FloatArray, check_features

_CHUNK = 4_096  # rows of a kernel matrix held at once


def kernel_distance(
    a: Any,
    b: Any,
    *,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    subsets: int | None = None,
    subset_size: int = 1_000,
    seed: int = 0,
) -> float:
    """Return the unbiased MMD² under the polynomial kernel (gamma x·y + coef0)^degree.

    Source: Binkowski et al. 2018, arXiv:1801.01401, section 4 (KID); the estimator is Gretton et al. 2012, Eq. 3.

    Args:
        a, b: features [N_a, d], [N_b, d]; at least 2 rows each.
        gamma: None is 1/d.
        subsets: None uses every pair of samples once, which has the least variance; a number averages over that many
            random subsets of `subset_size`, as published numbers do.

    Raises:
        ValueError: fewer than 2 rows, widths that differ, values that are not finite, subsets larger than a set.
    """
    a, b = _pair(a, b)
    gamma = 1.0 / a.shape[1] if gamma is None else gamma
    if subsets is None:
        return _unbiased(a, b, degree, gamma, coef0)
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise ValueError(f"subset_size {subset_size} must lie between 2 and the smaller set, {min(len(a), len(b))}")
    values = []
    for i in range(subsets):
        random = rng.generator(seed, "metric", i)
        rows_a = random.choice(len(a), subset_size, replace=False)
        rows_b = random.choice(len(b), subset_size, replace=False)
        values.append(_unbiased(a[rows_a], b[rows_b], degree, gamma, coef0))
    return float(np.mean(values))


def cmmd(a: Any, b: Any, *, sigma: float = 10.0, scale: float = 1_000.0) -> float:
    """Return the MMD² under a Gaussian kernel on normalised CLIP embeddings, times 1000.

    Source: Jayasumana et al. 2024, arXiv:2401.09603; as in its code the mean includes the diagonal (biased).

    Args:
        a, b: image embeddings [N_a, d], [N_b, d]; normalised here.

    Raises:
        ValueError: as `kernel_distance`.
    """
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for x in _pair(a, b))
    gamma = 1.0 / (2.0 * sigma**2)

    def mean(x: FloatArray, y: FloatArray) -> float:
        total = 0.0
        for start in range(0, len(x), _CHUNK):
            rows = x[start : start + _CHUNK]
            squared = (rows**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2.0 * rows @ y.T
            total += float(np.exp(-gamma * squared.clip(0.0)).sum())
        return total / (len(x) * len(y))

    return scale * (mean(a, a) + mean(b, b) - 2.0 * mean(a, b))


def _pair(a: Any, b: Any) -> tuple[FloatArray, FloatArray]:
    a, b = check_features(a, "a"), check_features(b, "b")
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features differ in width: a has {a.shape[1]}, b has {b.shape[1]}; use one extractor for both"
        )
    return a, b


def _unbiased(a: FloatArray, b: FloatArray, degree: int, gamma: float, coef0: float) -> float:
    """MMD² without the diagonals of the two within-set kernels."""

    def total(x: FloatArray, y: FloatArray) -> float:
        parts = (x[start : start + _CHUNK] @ y.T for start in range(0, len(x), _CHUNK))
        return float(sum(((gamma * part + coef0) ** degree).sum() for part in parts))

    def diagonal(x: FloatArray) -> float:
        return float(((gamma * (x**2).sum(1) + coef0) ** degree).sum())

    n, m = len(a), len(b)
    within = (total(a, a) - diagonal(a)) / (n * (n - 1)) + (total(b, b) - diagonal(b)) / (m * (m - 1))
    return within - 2.0 * total(a, b) / (n * m)
