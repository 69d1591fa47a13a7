"""Fréchet distance at infinitely many samples, by a straight line in 1/N.

The distance of N samples is too large by about c/N, and c depends on the model: at N = 10,000 a better model may get
the worse number. The line through distances of parts of the set ends, at 1/N = 0, where more samples would lead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmdit import rng
from mmdit_eval.frechet import frechet_distance
from mmdit_eval.moments import FloatArray, Moments, check_features

SPLITS = 4  # the smallest part is a quarter of the set


@dataclass(frozen=True)
class Extrapolation:
    """A line through distances.

    Attributes:
        value: the distance at 1/N = 0; may be below zero where the true distance is near it.
        slope: c of c/N, in N of the first set.
        sizes: samples of the first set at each point.
        distances: mean distance at each point.
    """

    value: float
    slope: float
    sizes: list[int]
    distances: list[float]


def frechet_infinity(
    a: Any,
    b: Any,
    *,
    splits: int = SPLITS,
    sizes: Sequence[int] | None = None,
    paired: bool = False,
    seed: int = 0,
) -> Extrapolation:
    """Return the Fréchet distance extrapolated to infinitely many samples of whatever is given as features.

    Both sets are cut into k random parts of equal size, k = 1 ... splits, every part of one against its part of the
    other, so every sample counts once at every point and both sets' biases vanish together at 1/N = 0.

    Source: Chong and Forsyth 2020, arXiv:1911.07023, section 4.
    Departs: the paper draws one random subset of the generated set at each of 15 sizes from 5,000 upwards and keeps the
    reference whole, so the reference's bias stays; `sizes` does just that.

    Args:
        a: features [N_a, d].
        b: features [N_b, d], or `Moments`, which cannot be cut: the bias of that set stays.
        splits: the largest number of parts, at least 2.
        paired: row i of both sets belongs to one prompt, and pairs stay together in every part.
        sizes: of subsets of `a`, at least 2 of them different; b is kept whole, as in the paper.

    Raises:
        ValueError: as `frechet_distance`; parts of no more samples than features, where the bias is not c/N; or too
            few sizes.
    """
    a = check_features(a, "a")
    reference = b if isinstance(b, Moments) else check_features(b, "b")
    random = rng.generator(seed, "metric", len(a))
    if sizes is not None:
        points = [(int(size), _subset_distance(a, reference, int(size), random)) for size in sizes]
    else:
        if splits < 2:
            raise ValueError(f"splits must be at least 2 for a line, got {splits}")
        whole = [len(a)] if isinstance(reference, Moments) else [len(a), len(reference)]
        _check_size(min(whole) // splits, a.shape[1], f"a {splits}th of the smaller set")
        orders = [random.permutation(n) for n in whole]
        if paired:
            if len(set(whole)) > 1 or len(whole) < 2:
                raise ValueError(f"pairs need features of equal number on both sides, got {whole}")
            orders[1] = orders[0]
        points = [(len(a) // k, _split_distance(a, reference, orders, k)) for k in range(1, splits + 1)]
    if len({size for size, _ in points}) < 2:
        raise ValueError(f"a line needs two sizes at least, got {[size for size, _ in points]}")
    x, y = np.array([1.0 / size for size, _ in points]), np.array([distance for _, distance in points])
    slope, value = np.polyfit(x, y, 1)
    return Extrapolation(float(value), float(slope), [size for size, _ in points], y.tolist())


def _split_distance(a: FloatArray, b: Any, orders: list[np.ndarray], parts: int) -> float:
    """Mean distance over `parts` disjoint pairs of parts."""
    distances = []
    whole = b if isinstance(b, Moments) else None
    for k in range(parts):
        left = a[_part(orders[0], k, parts)]
        distances.append(frechet_distance(left, whole if whole is not None else b[_part(orders[1], k, parts)]))
    return float(np.mean(distances))


def _part(order: np.ndarray, k: int, parts: int) -> np.ndarray:
    size = len(order) // parts
    return order[k * size : (k + 1) * size]


def _subset_distance(a: FloatArray, b: Any, size: int, random: np.random.Generator) -> float:
    _check_size(size, a.shape[1], "sizes")
    if size > len(a):
        raise ValueError(f"sizes has {size}, the set only {len(a)} samples")
    return frechet_distance(a[random.choice(len(a), size, replace=False)], b)


def _check_size(size: int, width: int, what: str) -> None:
    if size <= width:
        raise ValueError(
            f"{what} has {size} samples of {width} features; below one sample a feature the bias is no longer c/N. Use "
            f"more samples, fewer splits, or a kernel distance, which has no bias"
        )
