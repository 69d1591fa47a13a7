"""How many seeds a study needs, and what a finished one could have shown. No torch.

Welch's test has random degrees of freedom. Its power follows exactly for normal seeds all the same: the share that one
row has in the two sample variances is Beta-distributed and independent of their sum, and given the share the statistic
is a scaled noncentral t. So the power is the noncentral t's, averaged over the share; for paired seeds it is the
noncentral t's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats

POWER = 0.8  # of "could have shown" and of the seeds asked for
MOST_SEEDS = 200
_SHARES, _SCALES = 32, 256  # nodes of the two averages: powers are good to 1e-6


def power(difference: float, spread: Sequence[float], seeds: Sequence[int], alpha: float = 0.05) -> float:
    """Return the chance that a true difference is found by the two-sided test.

    Args:
        difference: between the rows' true means.
        spread: true deviation over seeds of each row (two numbers: Welch), or of the paired differences (one).
        seeds: of each row.
        alpha: level of the test; for m claims under Holm at least 0.05 / m.

    Raises:
        ValueError: fewer than two seeds, or no spread.
    """
    if min(seeds) < 2:
        raise ValueError(f"the power of a test over seeds needs at least two seeds a row, got {list(seeds)}")
    if not max(spread) > 0:
        raise ValueError("the power of a test over seeds needs a spread above 0")
    t = scipy.stats.t
    if len(spread) == 1:
        df = min(seeds) - 1
        return float(_two_sided(t.isf(alpha / 2, df), df, abs(difference) * math.sqrt(min(seeds)) / spread[0]))
    (n1, n2), (v1, v2) = seeds, (spread[0] ** 2, spread[1] ** 2)
    df = n1 + n2 - 2
    share, weights = _jacobi((n1 - 1) / 2, (n2 - 1) / 2)
    first, second = v1 * share / (n1 * (n1 - 1)), v2 * (1 - share) / (n2 * (n2 - 1))  # of the squared standard error
    welch_df = (first + second) ** 2 / (first**2 / (n1 - 1) + second**2 / (n2 - 1))
    variance = v1 / n1 + v2 / n2
    scale = np.sqrt(variance / (df * (first + second)))
    return float(weights @ _two_sided(t.isf(alpha / 2, welch_df) / scale, df, abs(difference) / math.sqrt(variance)))


def _two_sided(critical: np.ndarray, df: float, noncentrality: float) -> np.ndarray:
    """P(|T| > critical) of each, T noncentral t; scipy's own gives NaN or 0 far from the centre."""
    nodes, weights = _legendre()
    deviation = np.sqrt(scipy.stats.chi2.ppf(nodes, df) / df)
    limit = np.multiply.outer(critical, deviation)
    tails = scipy.special.ndtr(noncentrality - limit) + scipy.special.ndtr(-noncentrality - limit)
    return np.asarray(tails @ weights)


@lru_cache(maxsize=1)
def _legendre() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the mean of a function over (0, 1)."""
    nodes, weights = np.polynomial.legendre.leggauss(_SCALES)
    return (nodes + 1) / 2, weights / 2


@lru_cache(maxsize=256)
def _jacobi(a: float, b: float) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the mean of a function under the density of Beta(a, b)."""
    nodes, weights = scipy.special.roots_jacobi(_SHARES, b - 1, a - 1)
    return (nodes + 1) / 2, weights / weights.sum()


def detectable(
    spread: Sequence[float], seeds: Sequence[int], *, alpha: float = 0.05, wanted: float = POWER
) -> float | None:
    """Return the true difference that is found with the power `wanted`; None where there is no spread to plan with."""
    largest = max(spread)
    if not largest > 0:
        return None
    unit = largest * math.sqrt(1 / seeds[0] + 1 / seeds[-1])
    high = unit
    while power(high, spread, seeds, alpha) < wanted:
        high *= 2
        if high > 1e6 * unit:
            return None
    return float(scipy.optimize.brentq(lambda d: power(d, spread, seeds, alpha) - wanted, 0.0, high, xtol=1e-6 * unit))


def seeds_needed(
    difference: float, spread: Sequence[float], *, alpha: float = 0.05, wanted: float = POWER, most: int = MOST_SEEDS
) -> int | None:
    """Return the fewest seeds a row with which a difference is found with the power `wanted`; None above `most`."""
    if not difference > 0:
        raise ValueError(f"the wanted difference must be above 0, got {difference}")
    if not max(spread) > 0:
        return 2
    if power(difference, spread, (most, most), alpha) < wanted:
        return None
    low, high = 1, most  # the power rises with the seeds
    while high - low > 1:
        middle = (low + high) // 2
        if power(difference, spread, (middle, middle), alpha) >= wanted:
            high = middle
        else:
            low = middle
    return high


class Spread(NamedTuple):
    """Where a row's spread over seeds comes from.

    Attributes:
        training: deviation of a row's true quality from seed to seed.
        sample: deviation of one picture's score around its row, seed and prompt: shrinks with the pictures. None: not
            known, and `training` holds the pictures' part too.
        pictures: a seed's value in the pilot stands on so many.
        df: degrees of freedom behind them.
    """

    training: float
    sample: float | None
    pictures: int
    df: float

    def at(self, pictures: float) -> float:
        """Deviation of a seed's value when it stands on so many pictures.

        Raises:
            ValueError: what pictures add is not known, and these are not as many as the pilot's.
        """
        if self.sample is None:
            if pictures != self.pictures:
                raise ValueError(f"the spread is known at the pilot's {self.pictures} pictures only, got {pictures:g}")
            return self.training
        return math.sqrt(self.training**2 + self.sample**2 / pictures)

    def careful(self, pictures: float, confidence: float = 0.8) -> float:
        """Deviation that the true one stays below with this confidence: few seeds know their own spread badly."""
        factor = self.df / scipy.stats.chi2.ppf(1 - confidence, self.df)
        return float(self.at(pictures) * math.sqrt(factor))


def pilot_spread(rows: Sequence[Any]) -> Spread:
    """Split the spread of a pilot's rows into that of training and that of pictures.

    Args:
        rows: of each row an array [S, P] of per-picture scores, S seeds by P pictures, the same pictures in a row.

    Raises:
        ValueError: no row has two seeds.
    """
    between, within, df, df_within, pictures = 0.0, 0.0, 0, 0, 0
    for values in rows:
        table = np.asarray(values, dtype=np.float64)
        count, pictures = table.shape
        if count < 2:
            continue
        means = table.mean(1)
        rest = table - means[:, None] - table.mean(0)[None, :] + table.mean()
        between += float(((means - means.mean()) ** 2).sum())
        within += float((rest**2).sum())
        df, df_within = df + count - 1, df_within + (count - 1) * (pictures - 1)
    if not df:
        raise ValueError(
            "the pilot has one seed a row, so nothing is known about the spread over seeds; give it another: "
            "--seeds [0,1,2]"
        )
    sample = within / max(df_within, 1)
    training = max(0.0, between / df - sample / pictures)
    return Spread(math.sqrt(training), math.sqrt(sample), pictures, df)


def shared_freedom(values: Sequence[Mapping[int, float]]) -> float:
    """Return the degrees of freedom of a variance that is pooled over differences from the same seeds.

    Differences to one reference share its noise, so they know less than as many rows by themselves; the pooled variance
    is taken for the multiple of a chi-square with its mean and spread. The covariance is estimated from the seeds that
    all have, which makes the number too small rather than too large.

    Args:
        values: of each comparison {seed: difference}, two seeds or more.

    Source: Box 1954, Ann. Math. Stat. 25(2), theorem 3.1.
    """
    common = sorted(set.intersection(*map(set, values)))
    if len(common) < 2:
        return min(len(one) for one in values) - 1
    covariance = np.atleast_2d(np.cov([[one[seed] for seed in common] for one in values]))
    square = float((covariance**2).sum())
    share = float(np.trace(covariance)) ** 2 / square if square > 0 else 1.0
    return (len(common) - 1) * share
