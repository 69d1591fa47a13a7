"""Inception score: how sure a classifier is of each picture, and how evenly it uses its classes over all of them."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import scipy.special
import scipy.stats

from mmdit import rng
from mmdit_eval.moments import FloatArray
from mmdit_eval.statistics import LEVEL, Estimate


class InceptionScore(NamedTuple):
    """Mean and standard deviation (divided by the number of splits) over the splits."""

    mean: float
    deviation: float


def inception_score(logits: Any, splits: int = 10, *, seed: int | None = 0) -> InceptionScore:
    """Return exp(mean KL(p(class | picture) ‖ p(class))), 1 ... K, over `splits` parts of the set.

    Source: Salimans et al. 2016, arXiv:1606.03498, section 4, and its code: 10 parts, cut at i N / 10.

    Args:
        logits: [N, K] of the pictures, before the softmax; N at least `splits`.
        splits: parts; the score of a part falls with its size, so numbers of other N or splits do not compare.
        seed: of the order in which pictures are dealt to the parts; None: as they come.

    Raises:
        ValueError: not [N, K] with K > 1, values that are not finite, fewer pictures than splits.
    """
    logits = _checked(logits, splits)
    if seed is not None:
        logits = logits[rng.generator(seed, "metric", len(logits)).permutation(len(logits))]
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    scores = [math.exp(_divergences(logits[a:b]).mean()) for a, b in itertools.pairwise(bounds)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def inception_score_interval(logits: Any, *, level: float = LEVEL) -> Estimate:
    """Return the score of the whole set (one part) with its delta-method interval, for what as many others would give.

    A picture moves the logarithm of the score by its own divergence: what it does to p(class) cancels to first order.

    Raises:
        ValueError: as `inception_score`.
    """
    divergences = _divergences(_checked(logits, 2))
    n, score = len(divergences), math.exp(divergences.mean())
    half = float(scipy.stats.t.ppf((1 + level) / 2, n - 1) * divergences.std(ddof=1) / math.sqrt(n))
    # symmetric in the logarithm, so that it stays above zero
    return Estimate(
        value=score, low=score * math.exp(-half), high=score * math.exp(half), n=n, method="delta of the logarithm"
    )


def _divergences(logits: FloatArray) -> FloatArray:
    """KL(p(class | picture) ‖ p(class)) in nats, [N]."""
    log_p = scipy.special.log_softmax(logits, axis=1)
    log_marginal = scipy.special.logsumexp(log_p, axis=0) - math.log(len(logits))
    found: FloatArray = (np.exp(log_p) * (log_p - log_marginal)).sum(1)
    return found


def _checked(logits: Any, splits: int) -> FloatArray:
    if hasattr(logits, "detach"):
        logits = logits.detach().cpu().numpy()
    array: FloatArray = np.asarray(logits, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] < 2:
        raise ValueError(f"logits must be [N, K] with at least 2 classes, got {list(array.shape)}")
    if splits < 1 or len(array) < splits:
        raise ValueError(f"{len(array)} pictures cannot be dealt to {splits} splits; use at least one picture a split")
    bad = np.flatnonzero(~np.isfinite(array).all(1))
    if bad.size:
        raise ValueError(f"logits hold values that are not finite in {bad.size} row(s), the first is row {bad[0]}")
    return array
