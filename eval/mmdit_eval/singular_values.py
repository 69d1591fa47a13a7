"""Singular values of F_a F_bᵀ, whose sum is the trace of (cov_a cov_b)^½, by the fastest road that can be trusted.

Three roads, tried in this order:

- both covariances of full rank: the eigenvalues of F_a cov_b F_aᵀ, by one reduction and no product;
- the eigenvalues of R Rᵀ, where F_b F_aᵀ = Q R: half the time of singular values. The rows of R fall, so that a small
  eigenvalue stands at the end among small entries and keeps its digits, which it loses in the product of F_a F_bᵀ with
  its transpose: over spectra of 14 decades the sum was off by 1e-14 there against 1e-8;
- the singular values themselves.

Trust needs no second computation. The determinant is known from the triangular factors' diagonals, and small
eigenvalues, where the error sits, move it most: how far their product misses it tells how far the sum is off.

Products are SciPy's, as the factorisations are: NumPy's wheels bring a second BLAS whose threads, after a product, spin
on the cores that the next step wants.

Source: Barlow and Demmel 1990, "Computing accurate eigensystems of scaled diagonally dominant matrices", for graded
matrices; Higham 2000, "QR factorization with complete pivoting and accurate computation of the SVD", for the QR step.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
from scipy.linalg import blas, lapack

from mmdit_eval.factors import EPSILON, Factor
from mmdit_eval.moments import FloatArray, transposed

_WIDE = 256  # features from which on eigenvalues are worth their care; below, an SVD costs nothing
_BLOCK = 128  # columns of a panel of the QR


def sum_of_singular_values(a: Factor, b: Factor) -> float:
    """Return the sum of the singular values of F_a F_bᵀ."""
    if _wide(a, b) and a.covariance is not None and b.covariance is not None:
        eigenvalues = _reduced_eigenvalues(a.matrix, b.covariance)
        if (roots := trusted(eigenvalues, _log_determinant(a.matrix, b.matrix), _allowed(a, b))) is not None:
            return float(roots.sum())
    return _sum_of(_product(a, b), a, b)


def _sum_of(product: FloatArray, a: Factor, b: Factor) -> float:
    """Sum the singular values of F_a F_bᵀ, without the first road."""
    if _wide(a, b):
        graded, known = _graded(product if len(product) <= product.shape[1] else product.T)
        # neither divide and conquer nor relatively robust representations keep the digits of small eigenvalues here
        eigenvalues = scipy.linalg.eigvalsh(graded, lower=True, driver="ev", check_finite=False, overwrite_a=True)
        if (roots := trusted(eigenvalues, known, _allowed(a, b))) is not None:
            return float(roots.sum())
    return float(np.linalg.svd(product, compute_uv=False).sum()) if product.size else 0.0


def singular_vectors(a: Factor, b: Factor) -> tuple[FloatArray, FloatArray, FloatArray, float]:
    """Return X [r, k], S [k] and Y [s, k] with F_a F_bᵀ = X S Yᵀ, and the sum of the singular values.

    From 256 features on they come from eigenvectors, in a third of the time. Then X S Xᵀ and Y S Yᵀ are right to 1e-8
    of the largest singular value, far finer than an interval needs; the sum is as exact as it is alone.
    """
    if len(a.matrix) > len(b.matrix):
        right, roots, left, total = singular_vectors(b, a)
        return left, roots, right, total
    product = _product(a, b)
    if not _wide(a, b):
        left, roots, rows = np.linalg.svd(product, full_matrices=False)
        return left, roots, rows.T, float(roots.sum())
    eigenvalues, left = scipy.linalg.eigh(product @ product.T, driver="evd", check_finite=False, overwrite_a=True)
    right = product.T @ left
    lengths = np.sqrt(np.einsum("ij,ij->j", right, right))  # unlike roots of eigenvalues never below round-off
    right /= np.where(lengths > 0, lengths, 1.0)
    found = None
    if a.covariance is not None and b.covariance is not None:
        found = trusted(eigenvalues, _log_determinant(a.matrix, b.matrix), _allowed(a, b))
    return left, lengths, right, _sum_of(product, a, b) if found is None else float(found.sum())


def trusted(eigenvalues: FloatArray, known: float, allowed: float) -> FloatArray | None:
    """Return the roots of eigenvalues; None where their sum may be off by more than is allowed.

    Args:
        eigenvalues: rising, [k].
        known: logarithm of their product.
        allowed: error of the sum.
    """
    if eigenvalues[0] <= 0 or not np.isfinite(known):
        return None
    drift = abs(float(np.log(eigenvalues).sum()) - known)
    inverse = eigenvalues[0] / eigenvalues
    # one error e for every eigenvalue v, of random sign: drift² = sum (e / v)², error of the sum² = sum e² / 4v
    error = drift * np.sqrt(eigenvalues[0] * inverse.sum() / (inverse**2).sum()) / 2.0
    return None if drift > 0.5 or 10.0 * error > allowed else np.sqrt(eigenvalues)


def _product(a: Factor, b: Factor) -> FloatArray:
    """F_a F_bᵀ, [r, s]; as a transpose, whose layout BLAS reads without a copy."""
    if not (len(a.matrix) and len(b.matrix)):
        return np.zeros((len(a.matrix), len(b.matrix)))
    product: FloatArray = blas.dgemm(1.0, b.matrix.T, a.matrix.T, trans_a=True)
    return product.T


def _wide(a: Factor, b: Factor) -> bool:
    return min(len(a.matrix), len(b.matrix)) >= _WIDE


def _allowed(a: Factor, b: Factor) -> float:
    """Round-off of d sums of the size of the traces."""
    return 9.0 * EPSILON * a.matrix.shape[1] * (a.trace + b.trace)


def _log_determinant(*triangles: FloatArray) -> float:
    """Logarithm of the squared determinant of triangles' product; minus infinity where it is singular."""
    with np.errstate(divide="ignore"):
        return 2.0 * sum(float(np.log(np.abs(np.diag(triangle))).sum()) for triangle in triangles)


def _reduced_eigenvalues(upper: FloatArray, cov: FloatArray) -> FloatArray:
    """Return the eigenvalues of upper cov upperᵀ, rising. One reduction is half the work of two products."""
    # LAPACK's lower form, Lᵀ cov L with L = upperᵀ, is the faster one, and so is its lower triangle for `eigvalsh`
    reduced, _ = lapack.dsygst(cov.T, transposed(upper), itype=2, lower=1)
    values: FloatArray = scipy.linalg.eigvalsh(reduced, lower=True, driver="ev", check_finite=False, overwrite_a=True)
    return values


def _graded(product: FloatArray) -> tuple[FloatArray, float]:
    """Return R Rᵀ (its lower triangle, [r, r]) of productᵀ = Q R, and the logarithm of its determinant.

    Args:
        product: [r, s], r <= s. Its longest rows are taken first, so that R falls whatever their order was.
    """
    ordered = product[np.argsort(-np.einsum("ij,ij->i", product, product))]
    factored, _, _ = lapack.dgeqrt(min(_BLOCK, len(ordered)), ordered.T, overwrite_a=1)
    upper = np.asfortranarray(factored[: len(ordered)])  # nobody reads below its diagonal
    known = _log_determinant(upper)
    squared, _ = lapack.dlauum(upper, lower=0, overwrite_c=1)
    return transposed(squared), known
