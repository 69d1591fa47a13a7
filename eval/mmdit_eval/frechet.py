"""Fréchet distance between two sets of features, by the numerically right road for their rank.

    |mean_a - mean_b|² + tr(cov_a) + tr(cov_b) - 2 tr((cov_a cov_b)^½)

Source: Dowson and Landau 1982; Heusel et al. 2017, arXiv:1706.08500. The trace of the root is the sum of the
singular values of F_a F_bᵀ for any factors with cov = FᵀF, so no matrix root is taken. Which factor, says
`mmdit_eval.factors`; how the sum is found, `mmdit_eval.singular_values`.

Departs: the usual implementations take `sqrtm` or the eigenvalues of cov_a cov_b. They agree with this one to 1e-11
for full rank, and are off by 1e-6 and more for singular covariances. All in float64: differences of large traces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg.blas import dsyrk, dtrmm
from scipy.linalg.lapack import dpotrf

from mmdit_eval.factors import Factor, check_size, factor_of, factor_of_covariance
from mmdit_eval.moments import FloatArray, Moments, asymmetry, check_features, symmetrical
from mmdit_eval.singular_values import singular_vectors, sum_of_singular_values

__all__ = ["FloatArray", "check_features", "frechet_distance", "frechet_from_statistics", "frechet_influence"]

_CHUNK = 2_048  # rows whose influence is found at once
_Carried = Callable[[FloatArray, slice], FloatArray]


def frechet_distance(a: Any, b: Any) -> float:
    """Return the Fréchet distance between two sets of features.

    Args:
        a, b: features [N_a, d] and [N_b, d], any real dtype, at least 2 rows each; or `Moments` of them. The value
            falls with N (its bias is of order 1/N), so compare sets of equal size only, or see `frechet_infinity`.

    Raises:
        ValueError: fewer than 2 rows, widths that differ, or a value that is not finite.
    """
    left, right = _of_one_width(a, b)
    return _distance(left.mean - right.mean, factor_of(left), factor_of(right))


def frechet_from_statistics(mean_a: Any, cov_a: Any, mean_b: Any, cov_b: Any) -> float:
    """Return the Fréchet distance between two Gaussians.

    Args:
        mean_a, mean_b: [d].
        cov_a, cov_b: [d, d], symmetric, unbiased (divided by N - 1).

    Raises:
        ValueError: shapes that do not fit, a value that is not finite, or a covariance with negative eigenvalues.
    """
    means = [np.asarray(m, dtype=np.float64) for m in (mean_a, mean_b)]
    covs = [np.asarray(c, dtype=np.float64) for c in (cov_a, cov_b)]
    width = means[0].shape[0] if means[0].ndim == 1 else -1
    factors = []
    for name, mean, cov in (("a", means[0], covs[0]), ("b", means[1], covs[1])):
        if mean.shape != (width,) or cov.shape != (width, width):
            raise ValueError(
                f"mean_{name} must be [d] and cov_{name} [d, d], got {list(mean.shape)} and {list(cov.shape)}"
            )
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise ValueError(f"mean_{name} or cov_{name} holds a value that is not finite")
        if (gap := asymmetry(cov)) > 1e-5 * np.abs(np.diag(cov)).max(initial=0.0):
            raise ValueError(f"cov_{name} is no covariance: it is not symmetric")
        factors.append(factor_of_covariance(symmetrical(cov, gap)))
    return _distance(means[0] - means[1], *factors)


def frechet_influence(a: Any, b: Any) -> tuple[float, FloatArray, FloatArray | None]:
    """Return the distance and how much each sample moves it: the gradient in mean and covariance, sample by sample.

    With u = sample - mean_a the gradient in mean_a is 2 (mean_a - mean_b), that in cov_a is 1 - T, and T is the linear
    map that carries one Gaussian to the other; uᵀTu needs no T, only the singular vectors of the one product that
    the distance itself is made of: with F_a F_bᵀ = X S Yᵀ and w the whitened u it is wᵀ X S Xᵀ w.

    Source: the gradient is that of Dowson and Landau's closed form (Takatsu 2011, arXiv:0801.2250); von Mises 1947 for
    its use. Checked in the tests against differences of reweighted sets.

    Args:
        a: features [N_a, d]; moments are not enough.
        b: features [N_b, d], or `Moments`, which have no samples to tell apart.

    Returns:
        (distance, [N_a], [N_b] or None); each array has mean zero. Mean squared influence over N is the variance of the
        distance to first order.

    Raises:
        ValueError: as `frechet_distance`.
    """
    sides = check_features(a, "a"), None if isinstance(b, Moments) else check_features(b, "b")
    moments = _of_one_width(sides[0], b if sides[1] is None else sides[1])
    factors = factor_of(moments[0]), factor_of(moments[1])
    difference = moments[0].mean - moments[1].mean
    left, values, right, root = singular_vectors(*factors)
    distance = _combined(difference, *factors, root)
    of_a = _influences(sides[0], moments[0].mean, difference, _carried(factors[0], left, values))
    if sides[1] is None:
        return distance, of_a, None
    return distance, of_a, _influences(sides[1], moments[1].mean, -difference, _carried(factors[1], right, values))


def _influences(features: FloatArray, mean: FloatArray, difference: FloatArray, carried: _Carried) -> FloatArray:
    """Return the influence of each row, [N] of mean zero."""
    found = np.empty(len(features))
    for start in range(0, len(features), _CHUNK):
        part = slice(start, start + _CHUNK)
        deviations = features[part] - mean
        squares = np.einsum("ij,ij->i", deviations, deviations)
        spread = (squares - carried(deviations, part)) * (len(features) / (len(features) - 1))
        found[part] = 2.0 * (deviations @ difference) + spread
    found -= found.mean()
    return found


def _carried(factor: Factor, vectors: FloatArray, values: FloatArray) -> _Carried:
    """Return what gives uᵀTu [n] of deviations u [n, d], which are the rows `part` of the features.

    T is a product M Mᵀ; by its Cholesky factor, a triangle, each row costs half of what it costs by M.
    """
    scaled = vectors * np.sqrt(values)
    if factor.inverse is None:
        assert factor.coordinates is not None
        whole = _squares(factor.coordinates(scaled))
        return lambda _, part: whole[part]
    matrix = factor.inverse(scaled)
    upper, failed = dpotrf(dsyrk(1.0, matrix), lower=0, clean=0)
    if failed:
        return lambda deviations, _: _squares(deviations @ matrix)
    return lambda deviations, _: _squares(dtrmm(1.0, upper, deviations.T).T)


def _squares(rows: FloatArray) -> FloatArray:
    return np.einsum("ij,ij->i", rows, rows)


def statistics(features: Any) -> tuple[FloatArray, FloatArray]:
    """Return mean [d] and unbiased covariance [d, d] of features [N, d]."""
    moments = Moments.of(features)
    return moments.mean, moments.covariance


def as_moments(value: Any, name: str) -> Moments:
    """Return moments as they are and those of features [N, d].

    Raises:
        ValueError: as `check_features`.
    """
    if not isinstance(value, Moments):
        return Moments.of(check_features(value, name))
    if value.width is None or value.count in (0, 1):
        raise ValueError(f"{name} has {value.count} sample(s); a distance between sets needs at least 2")
    return value


def _of_one_width(a: Any, b: Any) -> tuple[Moments, Moments]:
    left, right = as_moments(a, "a"), as_moments(b, "b")
    if left.width != right.width:
        raise ValueError(
            f"features differ in width: a has {left.width}, b has {right.width}; use one extractor for both"
        )
    return left, right


def _distance(difference: FloatArray, a: Factor, b: Factor) -> float:
    """Combine the difference of means and the factors."""
    return _combined(difference, a, b, sum_of_singular_values(a, b))


def _combined(difference: FloatArray, a: Factor, b: Factor, root: float) -> float:
    """Return the distance; never below zero, where round-off would put it."""
    apart = float(difference @ difference) + a.trace + b.trace
    check_size(apart)
    return max(0.0, apart - 2.0 * root)
