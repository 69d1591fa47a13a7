"""Intervals of distances between two sets, by the delta method: how much each sample moves the distance.

What they are intervals for. A Fréchet distance of N samples is too large by about c/N, and its interval is for what
other samples *of the same number* would give: right for comparing rows of one N, wrong as a statement about the two
distributions. That one is `frechet_infinity_interval`. Kernel distances of sets drawn apart have no bias, and one
interval serves both; of sets drawn in pairs it is for this N, see `mmdit_eval.kernel`.

What is drawn anew. `reference` says it: "drawn", both sets by themselves; "paired", sample i of both belongs to the
same prompt, and prompts are drawn; "fixed", the reference is what the distance refers to and stays as it is. Left
out, it is "fixed" for `Moments`, which have no samples to draw, and "drawn" for features.

A bootstrap is refused: a resample holds 63 % of the samples, some twice, so its rank and its spread are smaller, its
distance from the reference is biased upwards, and the interval leaves out the very estimate it is for (tried: 1.40
against [2.42, 2.74]). Source: Efron 1982, "The jackknife, the bootstrap and other resampling plans", chapter 6, for the
delta method and the infinitesimal jackknife, which are one and the same here.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import scipy.stats

from mmdit_eval.extrapolation import SPLITS, frechet_infinity
from mmdit_eval.frechet import frechet_influence
from mmdit_eval.kernel import Core, Kernel, gaussian, mmd, mmd_spread, normalised, polynomial
from mmdit_eval.moments import FloatArray, Moments, check_features, check_pair
from mmdit_eval.statistics import LEVEL, Estimate

Reference = Literal["drawn", "paired", "fixed"]
_FEWEST = 8  # samples; below, the spread of influence values says nothing


def frechet_interval(
    a: Any, b: Any, *, reference: Reference | None = None, method: str = "delta", level: float = LEVEL
) -> Estimate:
    """Return the Fréchet distance with its interval, for what other samples of the same number would give.

    Where the two distributions are equal the distance has no first order, and the interval is too wide there, by a
    factor of about 1.4; with fewer samples than features by about 1.15 (98 % instead of 95).

    Args:
        a: features [N_a, d].
        b: features [N_b, d], or `Moments`, which are fixed.
        reference: what is drawn anew, see above.

    Raises:
        ValueError: as `frechet_distance`; pairs of unequal number; or any method but "delta".
    """
    if method != "delta":
        raise ValueError(
            f"method {method!r} is refused: a bootstrapped set repeats samples, which biases its Fréchet distance, and "
            "the interval leaves out its own estimate (1.40 against [2.42, 2.74]); use method='delta'"
        )
    kind = _checked(a, b, reference)
    return influence_interval(*frechet_influence(a, b), kind, level=level)


def influence_interval(
    value: float, of_a: FloatArray, of_b: FloatArray | None, reference: Reference, *, level: float = LEVEL
) -> Estimate:
    """Return a Fréchet distance with its interval from what `frechet_influence` gave."""
    variance = _variance(of_a, of_b, reference)
    return _estimate(value, variance, of_a, of_b, f"delta, at this N, reference {reference}", level)


def frechet_infinity_interval(
    a: Any, b: Any, *, reference: Reference | None = None, splits: int = SPLITS, seed: int = 0, level: float = LEVEL
) -> Estimate:
    """Return the Fréchet distance at infinitely many samples with its interval: for the two distributions themselves.

    Args:
        a, b, reference: as `frechet_interval`; pairs are kept together in every part.
        splits, seed: as `frechet_infinity`.

    Raises:
        ValueError: as `frechet_infinity`.
    """
    kind = _checked(a, b, reference)
    found = frechet_infinity(a, b, splits=splits, paired=kind == "paired", seed=seed)
    _, of_a, of_b = frechet_influence(a, b)
    return _estimate(
        found.value, _variance(of_a, of_b, kind), of_a, of_b, f"delta, extrapolated, reference {kind}", level
    )


def kernel_interval(
    a: Any,
    b: Any,
    *,
    reference: Reference | None = None,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    level: float = LEVEL,
) -> Estimate:
    """Return the unbiased `kernel_distance` over all pairs with its interval.

    With reference "paired" the kernel of a row with its own partner is left out (`kernel_distance(paired=True)`).
    Where the two distributions are equal the estimate is skewed, and the interval, symmetric, covers too often.

    Args:
        a, b: features [N_a, d], [N_b, d].
        degree, gamma, coef0: of the kernel.

    Raises:
        ValueError: as `kernel_distance`, or pairs of unequal number.
    """
    a, b = check_pair(a, b)
    return _mmd_interval(a, b, polynomial(a.shape[1], degree, gamma, coef0), reference, level)[0]


def kernel_influence(a: Any, b: Any, *, reference: Reference | None = None) -> tuple[Estimate, FloatArray]:
    """Return `kernel_interval` and how much each row of `a` moves the distance, [N_a] of mean zero.

    With reference "paired" it is row i of both sets that moves it.
    """
    a, b = check_pair(a, b)
    return _mmd_interval(a, b, polynomial(a.shape[1]), reference, LEVEL)


def cmmd_interval(
    a: Any,
    b: Any,
    *,
    reference: Reference | None = None,
    sigma: float = 10.0,
    scale: float = 1_000.0,
    unbiased: bool = False,
    level: float = LEVEL,
) -> Estimate:
    """Return `cmmd` with its interval; for the biased form, of what other samples of the same number would give.

    Raises:
        ValueError: as `cmmd`, or pairs of unequal number.
    """
    a, b = (normalised(x) for x in check_pair(a, b))
    return _mmd_interval(a, b, gaussian(sigma), reference, level, scale=scale, biased=not unbiased)[0]


def cmmd_influence(a: Any, b: Any, *, reference: Reference | None = None) -> tuple[Estimate, FloatArray]:
    """Return `cmmd_interval` and how much each row of `a` moves the distance, as `kernel_influence`."""
    a, b = (normalised(x) for x in check_pair(a, b))
    return _mmd_interval(a, b, gaussian(10.0), reference, LEVEL, scale=1_000.0, biased=True)


def paired_frechet_difference(
    a1: Any, a2: Any, b: Any, *, reference: Reference | None = None, level: float = LEVEL
) -> Estimate:
    """Return distance(a1, b) - distance(a2, b) of two runs on the same prompts with its interval.

    Influence values are subtracted prompt by prompt and reference by reference, so what both runs share cancels. The
    biases cancel only as far as the runs resemble each other.

    Args:
        a1, a2: features [N, d]; row i of both was drawn for the same prompt.
        b: features [M, d] or `Moments` (fixed).

    Raises:
        ValueError: as `frechet_interval`, or runs of unequal number.
    """
    kind = _checked(a1, b, reference)
    first, second = frechet_influence(a1, b), frechet_influence(a2, b)
    if len(first[1]) != len(second[1]):
        raise ValueError(f"runs are paired by prompts: a1 has {len(first[1])} rows, a2 has {len(second[1])}")
    of_a = first[1] - second[1]
    of_b = None if first[2] is None or second[2] is None else first[2] - second[2]
    method = f"paired delta, at this N, reference {kind}"
    return _estimate(first[0] - second[0], _variance(of_a, of_b, kind), of_a, of_b, method, level)


def paired_kernel_difference(
    a1: Any,
    a2: Any,
    b: Any,
    *,
    reference: Reference | None = None,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    level: float = LEVEL,
) -> Estimate:
    """Return kernel_distance(a1, b) - kernel_distance(a2, b) of two runs on the same prompts with its interval.

    The reference's own pairs cancel exactly.

    Args:
        a1, a2: features [N, d]; row i of both was drawn for the same prompt.
        b: features [M, d].

    Raises:
        ValueError: as `kernel_interval`, or runs of unequal number.
    """
    a1, b = check_pair(a1, b)
    a2, b = check_pair(a2, b)
    if len(a1) != len(a2):
        raise ValueError(f"runs are paired by prompts: a1 has {len(a1)} rows, a2 has {len(a2)}")
    kernel = polynomial(a1.shape[1], degree, gamma, coef0)
    kind = _checked(a1, b, reference)
    value = mmd(a1, b, kernel, paired=kind == "paired") - mmd(a2, b, kernel, paired=kind == "paired")
    own = [(1.0, a1, a1), (-1.0, a2, a2)]
    if kind == "paired":
        mixed = [(-1.0, a1, b), (-1.0, b, a1), (1.0, a2, b), (1.0, b, a2)]
        variance, _ = mmd_spread(Core(kernel, own + mixed))
    else:
        across = Core(kernel, [(1.0, a1, b), (-1.0, a2, b)])
        variance, _ = mmd_spread(Core(kernel, own), across, fixed=kind == "fixed")
    return _estimate(value, variance, a1[:, 0], b[:, 0], f"paired delta, reference {kind}", level)


def _mmd_interval(
    a: FloatArray,
    b: FloatArray,
    kernel: Kernel,
    reference: Reference | None,
    level: float,
    *,
    scale: float = 1.0,
    biased: bool = False,
) -> tuple[Estimate, FloatArray]:
    own, kind = Core(kernel, [(1.0, a, a)]), _checked(a, b, reference)
    value = scale * mmd(a, b, kernel, biased=biased, paired=kind == "paired")
    if kind == "paired":
        found = mmd_spread(Core(kernel, [(1.0, a, a), (1.0, b, b), (-1.0, a, b), (-1.0, b, a)]))
    elif kind == "fixed":
        found = mmd_spread(own, Core(kernel, [(1.0, a, b)]), fixed=True)
    else:
        found = mmd_spread(own, Core(kernel, [(1.0, a, b)]), Core(kernel, [(1.0, b, b)]))
    variance, influence = found
    return _estimate(value, scale**2 * variance, a[:, 0], b[:, 0], f"delta, reference {kind}", level), scale * influence


def _checked(a: Any, b: Any, reference: Reference | None) -> Reference:
    """Return what is drawn, or refuse it."""
    if reference is None:
        return "fixed" if isinstance(b, Moments) else "drawn"
    if reference not in ("drawn", "paired", "fixed"):
        raise ValueError(f"unknown reference {reference!r}; it is 'drawn', 'paired' or 'fixed'")
    if isinstance(b, Moments):
        if reference != "fixed":
            raise ValueError("moments have no samples to draw anew: give reference='fixed', or the features")
    elif reference == "paired" and len(check_features(a, "a")) != len(check_features(b, "b")):
        raise ValueError(f"pairs need equal numbers, a has {len(a)} samples and b {len(b)}")
    return reference


def _variance(of_a: FloatArray, of_b: FloatArray | None, reference: Reference) -> float:
    """Variance of the sum of influences over N."""
    if reference == "paired":
        assert of_b is not None
        return float((of_a + of_b).var(ddof=1)) / len(of_a)
    variance = float(of_a.var(ddof=1)) / len(of_a)
    if reference == "drawn":
        assert of_b is not None
        variance += float(of_b.var(ddof=1)) / len(of_b)
    return variance


def _estimate(
    value: float, variance: float, of_a: FloatArray, of_b: FloatArray | None, method: str, level: float
) -> Estimate:
    n = len(of_a)
    fewest = min(n, n if of_b is None else len(of_b))
    if fewest < _FEWEST:
        return Estimate(value=value, low=None, high=None, n=n, method="none (too few samples)")
    half = float(scipy.stats.t.ppf((1 + level) / 2, fewest - 1)) * math.sqrt(variance)
    return Estimate(value=value, low=value - half, high=value + half, n=n, method=method)
