"""Factors of a covariance, F [r, d] with FᵀF = covariance, by the numerically right road for its rank.

- full rank: the upper Cholesky factor;
- fewer samples than features: the centred features themselves, exact where a root of a singular matrix is not;
- rank lost otherwise (dead or duplicated features): the eigenvectors of the range.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from scipy.linalg.blas import ddot

from mmdit_eval.moments import FloatArray, Moments, check_eigenvalues

_CACHED = 128  # rows that stay in a cache from one step to the next
EPSILON = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Factor:
    """F [r, d] with FᵀF = covariance.

    Attributes:
        matrix: F.
        trace: of the covariance.
        covariance: [d, d] where it has full rank; F is then its upper Cholesky factor.
        inverse: vectors [r, k] to [d, k]: deviations from the mean, times these, are the whitened deviations, of unit
            covariance, times the vectors. None for a factor of features.
        coordinates: vectors [r, k] to [N, k]: the whitened features times the vectors. Of a factor of features only.
    """

    matrix: FloatArray
    trace: float
    covariance: FloatArray | None = None
    inverse: Callable[[FloatArray], FloatArray] | None = None
    coordinates: Callable[[FloatArray], FloatArray] | None = None


def factor_of(moments: Moments) -> Factor:
    """Factor the covariance: by the rows themselves while they are kept, else by its rank.

    Raises:
        ValueError: a covariance with negative eigenvalues, or numbers whose squares overflow.
    """
    rows = moments.rows
    if rows is None:
        return factor_of_covariance(moments.covariance, count_known=moments.count is not None)
    return _factor_of_rows(rows, moments.mean)


def _factor_of_rows(rows: FloatArray, mean: FloatArray) -> Factor:
    """Turn the centred features so that one of them, which the others determine, becomes zero, and leave it out.

    They sum to zero, which would make every product of two such factors singular. The Householder reflection that
    carries (1, ..., 1) / √N to the first axis leaves FᵀF as it is.
    """
    n = len(rows)
    matrix = rows - mean
    left = matrix.mean(0)  # what rounding left of the sum would be carried into every row
    step = left - (matrix[0] - left) / (np.sqrt(n) - 1)
    matrix = matrix[1:]
    for start in range(0, n - 1, _CACHED):
        block = matrix[start : start + _CACHED]
        block -= step
        block /= np.sqrt(n - 1)

    def coordinates(vectors: FloatArray) -> FloatArray:
        total = vectors.sum(0)
        return np.sqrt(n - 1) * np.vstack([total / np.sqrt(n), vectors - total / (n - np.sqrt(n))])

    return Factor(matrix, float(ddot(matrix.ravel(), matrix.ravel())), coordinates=coordinates)


def factor_of_covariance(cov: FloatArray, count_known: bool = True) -> Factor:
    """Upper Cholesky factor where the rank is full, else the range's eigenvectors.

    Rank is counted among the correlations, so that a feature of small scale is not taken for one without variance: what
    is a millionth in one set may be large in the other.

    Raises:
        ValueError: as `factor_of`.
    """
    variances = np.diag(cov)
    trace = float(variances.sum())
    check_size(trace)
    if (variances < 0).any():
        raise ValueError(f"a covariance has the negative variance {variances.min():.3g}; it is no covariance")
    # a feature that never moves is left out exactly; the range of the rest keeps its precision
    alive = variances > 0
    if not alive.any():
        return Factor(np.zeros((0, len(cov))), 0.0, inverse=lambda vectors: np.zeros((len(cov), vectors.shape[1])))
    upper = _cholesky(cov if alive.all() else cov[np.ix_(alive, alive)])
    if upper is None:
        return _range_factor(cov, alive, count_known)

    def inverse(vectors: FloatArray) -> FloatArray:
        found = np.zeros((len(cov), vectors.shape[1]), order="F")
        found[alive] = scipy.linalg.solve_triangular(upper, vectors)
        return found

    if alive.all():
        return Factor(upper, trace, cov, inverse)
    matrix = np.zeros((len(upper), len(cov)))
    matrix[:, alive] = upper
    return Factor(matrix, trace, inverse=inverse)


def _range_factor(cov: FloatArray, alive: np.ndarray, count_known: bool) -> Factor:
    """Eigenvectors of the range of the correlations, brought back to scale."""
    scale = np.sqrt(np.diag(cov)[alive])
    values, vectors = np.linalg.eigh(cov[np.ix_(alive, alive)] / np.outer(scale, scale))
    check_eigenvalues(values, "a covariance")
    kept = values > _tolerance(len(cov)) * values[-1]
    axes, roots = vectors[:, kept], np.sqrt(values[kept])
    matrix = np.zeros((len(roots), len(cov)))
    matrix[:, alive] = (axes * roots).T * scale
    if not count_known:
        warnings.warn(
            f"a covariance of width {len(cov)} has rank {len(matrix)} and its file does not say of how many "
            "samples; if they were no more than features, the distance is wrong by 1e-6 and more",
            stacklevel=5,
        )

    def inverse(vectors: FloatArray) -> FloatArray:
        found = np.zeros((len(cov), vectors.shape[1]), order="F")
        found[alive] = axes / scale[:, None] / roots @ vectors
        return found

    return Factor(matrix, float(np.trace(cov)), inverse=inverse)


def _cholesky(cov: FloatArray) -> FloatArray | None:
    """Upper factor; None where the rank is not numerically full."""
    # the transpose of a symmetric matrix is itself in the order LAPACK reads without a copy
    upper, failed = scipy.linalg.lapack.dpotrf(cov.T, lower=0, clean=1)
    if failed:
        return None
    # a smaller share of a feature's variance that the features before it leave is round-off that passed for positive
    return upper if (np.diag(upper) ** 2 / np.diag(cov)).min() > _tolerance(len(cov)) else None


def _tolerance(width: int) -> float:
    return width * EPSILON


def check_size(number: float) -> None:
    """Refuse what overflowed: the larger of 0 and a number that is none is 0, a perfect distance.

    Raises:
        ValueError: a number that is not finite.
    """
    if not np.isfinite(number):
        raise ValueError("the features are so large that their squares overflow; scale them down")
