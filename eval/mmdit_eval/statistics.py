"""Intervals: how far a number could have come out otherwise.

Four sources of chance, four tools, never mixed: images of one run (`mean_interval`, `wilson_interval`), distances
between sets (`mmdit_eval.set_intervals`, whose names stand here too), the same prompts under two rows
(`paired_interval`), and training seeds (`seed_interval`). Only the last one speaks about an architecture; the others
speak about one trained model.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import numpy as np

from mmdit import rng

LEVEL = 0.95  # of every interval in a report

_OF_SETS = (
    "cmmd_interval",
    "frechet_infinity_interval",
    "frechet_interval",
    "kernel_interval",
    "paired_frechet_difference",
    "paired_kernel_difference",
)


def __getattr__(name: str) -> Any:
    """Intervals of distances between sets, looked up late: they need numpy's linear algebra and this module."""
    if name in _OF_SETS:
        return getattr(importlib.import_module("mmdit_eval.set_intervals"), name)
    raise AttributeError(f"module 'mmdit_eval.statistics' has no attribute {name!r}")


class Estimate(TypedDict):
    """A value with its interval; `n` counts images (or seeds), `method` says how the interval was made."""

    value: float
    low: float | None
    high: float | None
    n: int
    method: str


def mean_interval(values: Any, *, clusters: Any = None, level: float = LEVEL, draws: int = 2_000) -> Estimate:
    """Return the mean with a percentile bootstrap interval.

    Args:
        values: [M] real.
        clusters: [M] labels of what was drawn independently (the image an object stands in); None: every value by
            itself. Whole clusters are resampled, because objects of one picture succeed and fail together.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    values = _finite(values)
    labels = np.arange(len(values)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    sums, counts = np.bincount(labels, weights=values), np.bincount(labels)
    n = len(sums)
    estimate = Estimate(value=float(values.mean()), low=None, high=None, n=n, method="bootstrap")
    if n < 2:
        return estimate
    random = rng.generator(0, "metric", n)
    means = np.empty(draws)
    for i in range(draws):
        weights = random.multinomial(n, np.full(n, 1.0 / n))
        means[i] = (weights @ sums) / (weights @ counts) if weights @ counts else values.mean()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    estimate["low"], estimate["high"] = float(low), float(high)
    return estimate


def wilson_interval(hits: Any, *, level: float = LEVEL) -> Estimate:
    """Return a share of successes with Wilson's interval, which stays honest at 0 and 1. Source: Wilson 1927.

    Args:
        hits: [N] bool, drawn independently.
    """
    hits = np.asarray(hits)
    if hits.ndim != 1 or not len(hits):
        raise ValueError(f"a share needs a list of at least one True or False, got shape {list(hits.shape)}")
    n, share = len(hits), float(np.mean(hits.astype(bool)))
    z = float(_distributions().norm.ppf((1 + level) / 2))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if share == 0 else centre - half
    high = 1.0 if share == 1 else centre + half
    return Estimate(value=share, low=low, high=high, n=n, method="wilson")


def jackknife_interval(
    statistic: Callable[[np.ndarray], float], n: int, *, groups: int = 10, level: float = LEVEL
) -> Estimate:
    """Return a statistic of a set of n samples with a delete-a-group jackknife interval.

    For distances between sets: a bootstrap repeats samples, which biases them. Source: Shao and Wu 1989.

    Args:
        statistic: from the rows that are kept, int [m], to a number.
        groups: samples i, i + groups, ... leave together.
    """
    value = float(statistic(np.arange(n)))
    groups = min(groups, n // 3)
    if groups < 2:
        return Estimate(value=value, low=None, high=None, n=n, method="none (too few samples)")
    left_out = np.arange(n) % groups
    replicates = np.array([statistic(np.flatnonzero(left_out != g)) for g in range(groups)])
    error = math.sqrt((groups - 1) / groups * float(((replicates - replicates.mean()) ** 2).sum()))
    half = float(_distributions().t.ppf((1 + level) / 2, groups - 1)) * error
    return Estimate(value=value, low=value - half, high=value + half, n=n, method=f"jackknife ({groups} groups)")


def paired_interval(a: Any, b: Any, *, level: float = LEVEL) -> Estimate:
    """Return the mean of a - b with its interval, pair by pair (same prompt, same noise).

    Raises:
        ValueError: lengths that differ.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"pairs need equal lengths, got {list(a.shape)} and {list(b.shape)}")
    estimate = mean_interval(a - b, level=level)
    estimate["method"] = "paired bootstrap"
    return estimate


def seed_interval(values: Sequence[float], *, level: float = LEVEL) -> Estimate:
    """Return the mean over training seeds with Student's t interval; one seed has no interval."""
    array = _finite(values)
    n = len(array)
    mean = float(array.mean())
    if n < 2:
        return Estimate(value=mean, low=None, high=None, n=n, method="one seed: no spread")
    half = float(_distributions().t.ppf((1 + level) / 2, n - 1) * array.std(ddof=1) / math.sqrt(n))
    return Estimate(value=mean, low=mean - half, high=mean + half, n=n, method="t over seeds")


def _finite(values: Any) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"a mean needs a list of at least one number, got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} of {len(array)} values are not finite")
    return array


def _distributions() -> Any:
    """Return scipy's; importing them takes half a second, which the answer to a typo should not wait for."""
    import scipy.stats

    return scipy.stats
