"""Kernel distances between two sets of features: squared maximum mean discrepancy (MMD²).

`kernel_distance` is unbiased, so unlike the Fréchet distance its expectation does not depend on N. Where row i of both
sets belongs to one prompt, say `paired`: those N kernels between the sets are no comparison of independent pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmdit import rng
from mmdit_eval.moments import FloatArray, check_pair

_CHUNK = 4_096  # rows of a kernel matrix held at once
Kernel = Callable[[FloatArray, FloatArray], FloatArray]  # [n, d], [m, d] to [n, m]


def polynomial(width: int, degree: int = 3, gamma: float | None = None, coef0: float = 1.0) -> Kernel:
    """Return the kernel (gamma x·y + coef0)^degree; gamma None is 1/width.

    Raises:
        ValueError: a degree below 1.
    """
    if degree < 1:
        raise ValueError(f"degree must be a whole number from 1 on, got {degree}")
    factor = 1.0 / width if gamma is None else gamma

    def kernel(x: FloatArray, y: FloatArray) -> FloatArray:
        base: FloatArray = factor * (x @ y.T) + coef0
        block = base.copy()
        for _ in range(degree - 1):  # ten times as fast as a power
            block *= base
        return block

    return kernel


def gaussian(sigma: float) -> Kernel:
    """Return the kernel exp(-|x - y|² / 2 sigma²)."""

    def kernel(x: FloatArray, y: FloatArray) -> FloatArray:
        squared = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2.0 * x @ y.T
        block: FloatArray = np.exp(-squared.clip(0.0) / (2.0 * sigma**2))
        return block

    return kernel


def kernel_distance(
    a: Any,
    b: Any,
    *,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    subsets: int | Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
    subset_size: int = 1_000,
    seed: int = 0,
    paired: bool = False,
) -> float:
    """Return the unbiased MMD² under the polynomial kernel (gamma x·y + coef0)^degree.

    Source: Binkowski et al. 2018, arXiv:1801.01401, section 4 (KID); the estimator is Gretton et al. 2012, Eq. 3.

    Args:
        a, b: features [N_a, d], [N_b, d]; at least 2 rows each.
        gamma: None is 1/d.
        subsets: None uses every pair of samples once, which has the least variance; a number averages over that many
            random subsets of `subset_size`, as published numbers do; pairs of row numbers name the subsets.
        paired: row i of a and row i of b belong together (one prompt); their kernel is left out, without subsets only.

    Raises:
        ValueError: fewer than 2 rows, widths that differ, values that are not finite, subsets larger than a set, pairs
            of unequal number or in subsets.
    """
    a, b = check_pair(a, b)
    kernel = polynomial(a.shape[1], degree, gamma, coef0)
    if subsets is None:
        return mmd(a, b, kernel, paired=paired)
    if paired:
        raise ValueError("paired=True uses every pair of samples once: leave `subsets` out")
    if isinstance(subsets, int):
        if not 2 <= subset_size <= min(len(a), len(b)):
            raise ValueError(f"subset_size {subset_size} must lie between 2 and the smaller set, {min(len(a), len(b))}")
        if subsets < 1:
            raise ValueError(f"subsets must be at least 1, got {subsets}")
        subsets = [_draw_rows(a, b, subset_size, seed, i) for i in range(subsets)]
    return float(np.mean([mmd(a[rows_a], b[rows_b], kernel) for rows_a, rows_b in subsets]))


def cmmd(
    a: Any, b: Any, *, sigma: float = 10.0, scale: float = 1_000.0, unbiased: bool = False, paired: bool = False
) -> float:
    """Return the MMD² under a Gaussian kernel on normalised CLIP embeddings, times 1000.

    Source: Jayasumana et al. 2024, arXiv:2401.09603. Its code keeps the diagonals (biased), and so do published
    numbers: for N samples of one distribution it gives about 1000 (1 - mean kernel) 2/N instead of 0.

    Args:
        a, b: image embeddings [N_a, d], [N_b, d]; normalised here.
        unbiased: leave the diagonals out.
        paired: as for `kernel_distance`; the biased form takes every pair, as published.

    Raises:
        ValueError: as `kernel_distance`.
    """
    a, b = (normalised(x) for x in check_pair(a, b))
    return scale * mmd(a, b, gaussian(sigma), biased=not unbiased, paired=paired)


def mmd(a: FloatArray, b: FloatArray, kernel: Kernel, *, biased: bool = False, paired: bool = False) -> float:
    """Return MMD²; unbiased without the diagonals of the two within-set kernels, and of the one across where paired.

    Source: Gretton et al. 2012, Lemma 6: Eq. 3 for sets drawn apart, Eq. 4 for pairs.

    Raises:
        ValueError: pairs of unequal number.
    """
    if paired and len(a) != len(b):
        raise ValueError(f"pairs need equal numbers, a has {len(a)} samples and b {len(b)}")

    def within(x: FloatArray) -> float:
        total, n = sum(_sums(kernel, x, x)), len(x)
        return total / n**2 if biased else (total - _diagonal(kernel, x, x)) / (n * (n - 1))

    across, pairs = sum(_sums(kernel, a, b)), len(a) * len(b)
    if paired and not biased:
        across, pairs = across - _diagonal(kernel, a, b), pairs - len(a)
    return within(a) + within(b) - 2.0 * across / pairs


def normalised(x: FloatArray) -> FloatArray:
    """Return rows of length 1."""
    rows: FloatArray = x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12)
    return rows


class Core:
    """A symmetric function of two units summed over all pairs of different units, and a function of unit and other.

    A squared MMD is mean over i ≠ j of within[i, j] (+ the same of the other set) - 2 mean of across[i, j]; what a
    unit is decides how chance enters. Two sets drawn apart: units are samples. Sets drawn in pairs: a unit is a pair.
    The difference of two runs: a unit is both runs' pictures of one prompt. Each is a signed sum of kernels.
    """

    def __init__(self, kernel: Kernel, terms: Sequence[tuple[float, FloatArray, FloatArray]]) -> None:
        self.kernel, self.terms = kernel, terms
        self.shape = len(terms[0][1]), len(terms[0][2])

    def sums(self, *, square: bool) -> tuple[FloatArray, FloatArray, float]:
        """Return sums over rows [n], over columns [m], and of squares; `square` leaves the diagonal out."""
        n, m = self.shape
        rows, columns, squares = np.empty(n), np.zeros(m), 0.0
        for start in range(0, n, _CHUNK):
            part = slice(start, min(start + _CHUNK, n))
            block = sum(sign * self.kernel(x[part], y) for sign, x, y in self.terms)
            assert isinstance(block, np.ndarray)
            if square:
                block[np.arange(len(block)), np.arange(part.start, part.stop)] = 0.0
            rows[part] = block.sum(1)
            columns += block.sum(0)
            squares += float((block**2).sum())
        return rows, columns, squares


def mmd_spread(
    first: Core, across: Core | None = None, second: Core | None = None, *, fixed: bool = False
) -> tuple[float, FloatArray]:
    """Return the variance of mean(first) + mean(second) - 2 mean(across), drawn anew, and what each unit moves it by.

    The influences [n], of mean zero, are those of the units of `first`; their mean square over n is the first order of
    these units' share in the variance, with the noise of the second still in it.

    To second order: where the two distributions are equal the first order vanishes, and an interval of the first order
    alone would be empty there. Noise that the second order puts into the estimate of the first is taken off.

    Source: Hoeffding 1948; for the MMD Bounliphone et al. 2016, arXiv:1511.04581; here for N_a ≠ N_b.

    Args:
        first: units of one kind, [n, n].
        across: those against the other set, [n, m]; None: there is no other set.
        second: the other set's own, [m, m]; None: that part cancels.
        fixed: the other set is not drawn, it is what the distance refers to.
    """
    n = first.shape[0]
    rows, _, squares = first.sums(square=True)
    noise = _second_order(rows, rows, squares, n - 1, n - 1, n * (n - 1))
    projection = rows / (n - 1)
    pairs = 2.0 * noise / (n * (n - 1))
    surplus = 4.0 * noise / (n * (n - 1))  # what noise of the second order adds to the spread of the projections
    spread = 0.0
    if across is not None:
        m = across.shape[1]
        by_row, by_column, squares = across.sums(square=False)
        projection = projection - by_row / m
        if not fixed:
            noise = 4.0 * _second_order(by_row, by_column, squares, m, n, n * m) / (n * m)
            pairs, surplus, other = pairs + noise, surplus + 2.0 * noise, -by_column / n
            if second is not None:
                rows, _, squares = second.sums(square=True)
                noise = _second_order(rows, rows, squares, m - 1, m - 1, m * (m - 1)) / (m * (m - 1))
                pairs, surplus, other = pairs + 2.0 * noise, surplus + 4.0 * noise, other + rows / (m - 1)
            spread = 4.0 * float(other.var(ddof=1)) / m
    variance = pairs + max(0.0, 4.0 * float(projection.var(ddof=1)) / n + spread - surplus)
    return variance, 2.0 * (projection - projection.mean())


def _second_order(
    rows: FloatArray, columns: FloatArray, squares: float, per_row: int, per_column: int, pairs: int
) -> float:
    """Mean square of a matrix after its row means and column means are taken off."""
    mean = float(rows.sum()) / pairs
    left, right = float(((rows / per_row) ** 2).mean()), float(((columns / per_column) ** 2).mean())
    return max(0.0, squares / pairs - left - right + mean**2)


def _sums(kernel: Kernel, x: FloatArray, y: FloatArray) -> list[float]:
    return [float(kernel(x[start : start + _CHUNK], y).sum()) for start in range(0, len(x), _CHUNK)]


def _diagonal(kernel: Kernel, x: FloatArray, y: FloatArray) -> float:
    """Sum of k(x_i, y_i), in small blocks."""
    return float(sum(np.trace(kernel(x[i : i + 64], y[i : i + 64])) for i in range(0, len(x), 64)))


def _draw_rows(a: FloatArray, b: FloatArray, size: int, seed: int, i: int) -> tuple[np.ndarray, np.ndarray]:
    random = rng.generator(seed, "metric", i)
    rows_a = random.choice(len(a), size, replace=False)
    return rows_a, random.choice(len(b), size, replace=False)
