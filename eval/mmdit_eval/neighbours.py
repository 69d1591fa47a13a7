"""What nearest neighbours say of two sets: precision and recall, density and coverage, copies of the training set.

Every distance is Euclidean in float64 and made in blocks: memory is that of one block, whatever the sets' sizes. Ties
count as ties: a distance that round-off could put on either side of a radius is done again exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.stats

from mmdit_eval.moments import FloatArray, check_features
from mmdit_eval.statistics import LEVEL, Estimate, mean_interval, wilson_interval

_BLOCK = 2**24  # numbers of a block of distances, 128 MiB
_FEW = 16  # pairs a row that may be done again one by one
_ROUND_OFF = 1e-12  # of a squared distance, in |x|² + |y|²; products of 4,096 features stay below


class PrecisionRecall(NamedTuple):
    """Shares, 0 ... 1."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density is 0 ... about 1 and may exceed 1; coverage a share."""

    density: float
    coverage: float


@dataclass(frozen=True)
class Membership:
    """Which samples lie in the other set's neighbourhoods.

    Attributes:
        precise: bool [N]: the picture lies within the k-th neighbour's distance of some real one.
        recalled: bool [M]: the real one lies so near some picture.
        density: [N]: how many reals it is so near to, over k.
        covered: bool [M]: some picture is nearer to the real one than its k-th real neighbour.
    """

    precise: np.ndarray
    recalled: np.ndarray
    density: FloatArray
    covered: np.ndarray


def precision_recall(real: Any, fake: Any, k: int = 3) -> PrecisionRecall:
    """Return the share of pictures inside the reals' manifold and of reals inside the pictures'.

    A manifold is the union of balls about its samples, each reaching to the sample's k-th nearest neighbour.

    Source: Kynkäänniemi et al. 2019, arXiv:1904.06991, section 3.

    Args:
        real, fake: features [M, d], [N, d]; the paper compares 50,000 each, and values fall or rise with N.
        k: neighbours.

    Raises:
        ValueError: fewer than k + 1 samples, widths that differ, values that are not finite.
    """
    found = membership(real, fake, k)
    return PrecisionRecall(float(found.precise.mean()), float(found.recalled.mean()))


def density_coverage(real: Any, fake: Any, k: int = 5) -> DensityCoverage:
    """Return how densely pictures lie about the reals and the share of reals with a picture near.

    Unlike precision and recall, one outlier among the reals cannot enclose many pictures, and only the reals' balls
    are used. Of two sets of one distribution density is 1 and coverage near 1 - 2^-k.

    Source: Naeem et al. 2020, arXiv:2002.09797, section 3; strict comparison as in its code.

    Args:
        real, fake: features [M, d], [N, d].
        k: neighbours.

    Raises:
        ValueError: as `precision_recall`.
    """
    found = membership(real, fake, k)
    return DensityCoverage(float(found.density.mean()), float(found.covered.mean()))


def membership(real: Any, fake: Any, k: int) -> Membership:
    """Return sample by sample what `precision_recall` and `density_coverage` average.

    Raises:
        ValueError: as `precision_recall`.
    """
    real, fake = _pair(real, fake, "real", "fake")
    for name, array in (("real", real), ("fake", fake)):
        if not 1 <= k < len(array):
            raise ValueError(f"k = {k} neighbours need at least k + 1 samples, {name} has {len(array)}")
    of_real, of_fake = _radii(real, k), _radii(fake, k)
    precise, recalled = np.zeros(len(fake), dtype=bool), np.zeros(len(real), dtype=bool)
    density, nearest = np.zeros(len(fake)), np.full(len(real), np.inf)
    for rows, squared in _blocks(fake, real, lambda rows, _: (of_real, of_fake[rows, None])):
        precise[rows] = (squared <= of_real).any(1)
        recalled |= (squared <= of_fake[rows, None]).any(0)
        density[rows] = (squared < of_real).sum(1) / k
        nearest = np.minimum(nearest, squared.min(0))
    return Membership(precise, recalled, density, nearest < of_real)


def manifold_intervals(real: Any, fake: Any, k: int = 5, *, level: float = LEVEL) -> dict[str, Estimate]:
    """Return precision, recall, density and coverage with intervals, all with one k.

    Each is a mean over one set with the other held as it is, and the interval is for that: other pictures against
    these reals (precision, density), other reals against these pictures and these radii (recall, coverage).

    Raises:
        ValueError: as `precision_recall`.
    """
    found = membership(real, fake, k)
    estimates = {
        "precision": wilson_interval(found.precise, level=level),
        "recall": wilson_interval(found.recalled, level=level),
        "density": mean_interval(found.density, level=level),
        "coverage": wilson_interval(found.covered, level=level),
    }
    for name, estimate in estimates.items():
        estimate["method"] += ", given the reals" if name in ("precision", "density") else ", given the pictures"
    return estimates


@dataclass(frozen=True)
class Memorisation:
    """How much nearer to the training set pictures lie than new real ones do.

    Attributes:
        copied: share of pictures nearer to a training sample than `threshold`, with Wilson's interval, which takes the
            threshold as given; what the threshold's own chance does is in `expected`.
        expected: that share for a model that draws like the held-out set, (twins + 1) / (held-out samples + 1).
        closer: chance that a picture lies nearer to the training set than a held-out real does; 1/2 without copying.
        threshold: the least distance of a held-out real to the training set, above zero.
        twins: held-out samples that are in the training set.
        distances, nearest: each picture's distance to its nearest training sample, and that sample's row, [N].
        closest: rows of the pictures, the nearest to training first.
    """

    copied: Estimate
    expected: float
    closer: Estimate
    threshold: float
    twins: int
    distances: FloatArray
    nearest: np.ndarray
    closest: np.ndarray


def memorisation(
    fake: Any, train: Any, heldout: Any, *, twins: Literal["refuse", "allow"] = "refuse", level: float = LEVEL
) -> Memorisation:
    """Say whether pictures are copies of training samples, calibrated on real samples that were not trained on.

    Source: Meehan et al. 2020, arXiv:2004.05675, section 3: the Mann-Whitney comparison of the two sets of distances;
    the interval is DeLong's (1988). Departs: one comparison for the whole space instead of one in each of its cells.

    Args:
        fake, train, heldout: features [N, d], [T, d], [M, d]; `heldout` from the training distribution and not in
            `train`.
        twins: what to do with held-out samples that are in the training set, where nothing could be nearer: refuse
            the set, or allow them, in data that repeats itself as drawn scenes do: they then count in `closer` and
            `expected`, since an honest model repeats training samples as often.

    Raises:
        ValueError: fewer than 2 samples, widths that differ, values that are not finite, or held-out samples that are
            in the training set.
    """
    fake, train = _pair(fake, train, "fake", "train")
    heldout, _ = _pair(heldout, train, "heldout", "train")
    distances, nearest = nearest_neighbours(fake, train)
    calibration, rows = nearest_neighbours(heldout, train)
    equal = np.flatnonzero(calibration == 0)
    if len(equal) and (twins == "refuse" or len(calibration) - len(equal) < 2):
        raise ValueError(
            f"{len(equal)} of {len(heldout)} held-out samples are in the training set, the first is row {equal[0]} "
            f"(equal to training row {rows[equal[0]]}): leave them out, or give twins='allow'"
        )
    threshold = float(np.delete(calibration, equal).min())
    copied = wilson_interval(distances < threshold, level=level)
    copied["method"] += ", given the threshold"
    return Memorisation(
        copied=copied,
        expected=(len(equal) + 1) / (len(heldout) + 1),
        closer=_chance_of_less(distances, calibration, level),
        threshold=threshold,
        twins=len(equal),
        distances=distances,
        nearest=nearest,
        closest=np.argsort(distances, kind="stable"),
    )


def nearest_neighbours(queries: Any, bank: Any) -> tuple[FloatArray, np.ndarray]:
    """Return each query's distance to its nearest row of the bank, and that row, [N] and int [N].

    Raises:
        ValueError: widths that differ, values that are not finite, fewer than 2 rows.
    """
    queries, bank = _pair(queries, bank, "queries", "bank")
    distances, rows_found = np.empty(len(queries)), np.empty(len(queries), dtype=np.int64)
    for rows, squared in _blocks(queries, bank):
        rows_found[rows] = squared.argmin(1)
        distances[rows] = np.sqrt(((queries[rows] - bank[rows_found[rows]]) ** 2).sum(1))
    return distances, rows_found


def _chance_of_less(a: FloatArray, b: FloatArray, level: float) -> Estimate:
    """P(a < b) + P(a = b) / 2 with DeLong's interval; where every pair agrees, with Wilson's for the smaller set."""
    ordered_a, ordered_b = np.sort(a), np.sort(b)
    above = 1 - (np.searchsorted(ordered_b, a, "left") + np.searchsorted(ordered_b, a, "right")) / (2 * len(b))
    below = (np.searchsorted(ordered_a, b, "left") + np.searchsorted(ordered_a, b, "right")) / (2 * len(a))
    value = float(above.mean())
    variance = float(above.var(ddof=1)) / len(a) + float(below.var(ddof=1)) / len(b)
    if value in (0.0, 1.0):  # no spread is seen, which is not to say that there is none
        agreed = wilson_interval(np.full(min(len(a), len(b)), bool(value)), level=level)
        return Estimate(value=value, low=agreed["low"], high=agreed["high"], n=len(a), method="wilson, smaller set")
    half = float(scipy.stats.norm.ppf((1 + level) / 2)) * math.sqrt(variance)
    return Estimate(value=value, low=max(0.0, value - half), high=min(1.0, value + half), n=len(a), method="DeLong")


def _radii(x: FloatArray, k: int) -> FloatArray:
    """Squared distance of each sample to its k-th nearest other one, [N]."""
    radii = np.empty(len(x))
    # the k-th neighbour with the sample itself in front
    for rows, squared in _blocks(x, x, lambda _, found: (np.partition(found, k, axis=1)[:, k, None],)):
        squared[np.arange(len(squared)), np.arange(rows.start, rows.stop)] = np.inf
        radii[rows] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return radii


def _blocks(
    x: FloatArray, y: FloatArray, edges: Callable[[slice, FloatArray], Sequence[FloatArray]] = lambda *_: ()
) -> Iterator[tuple[slice, FloatArray]]:
    """Yield rows of x and their squared distances to all of y, [rows, M].

    By one matrix product about a common centre, which costs digits where two points nearly coincide, and whose last
    bits depend on the shape of the block. Those pairs, and pairs within round-off of an edge, are done again by their
    difference: a copy has distance 0, and equal distances are equal.

    Args:
        edges: rows and their distances to what these are compared with afterwards, broadcast to [rows, M].
    """
    centre = y.mean(0)
    centred_x, centred_y = x - centre, y - centre
    of_x, of_y = (centred_x**2).sum(1), (centred_y**2).sum(1)
    step = max(1, _BLOCK // len(y))
    equals: tuple[np.ndarray, np.ndarray] | None = None
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        lengths = of_x[rows, None] + of_y[None]
        squared = lengths - 2.0 * (centred_x[rows] @ centred_y.T)
        doubtful = squared < 1e-6 * lengths
        for edge in edges(rows, squared):
            doubtful |= np.abs(squared - edge) <= _ROUND_OFF * lengths
        near_x, near_y = np.nonzero(doubtful)
        if len(near_x) <= _FEW * len(squared):
            squared[near_x, near_y] = _differences(x, y, start + near_x, near_y, step)
        else:  # one picture many times over: each pair of different rows once
            equals = equals or (_first_equal(x), _first_equal(y))
            pairs = equals[0][start + near_x] * len(y) + equals[1][near_y]
            pairs, places = np.unique(pairs, return_inverse=True)
            squared[near_x, near_y] = _differences(x, y, *np.divmod(pairs, len(y)), step)[places]
        yield rows, squared


def _differences(x: FloatArray, y: FloatArray, of_x: np.ndarray, of_y: np.ndarray, step: int) -> FloatArray:
    """Squared distances of pairs of rows by their difference, [P]."""
    found = np.empty(len(of_x))
    for i in range(0, len(found), step):
        part = slice(i, i + step)
        found[part] = ((x[of_x[part]] - y[of_y[part]]) ** 2).sum(1)
    return found


def _first_equal(x: FloatArray) -> np.ndarray:
    """The first row that equals each row, [N]."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(row.tobytes(), i) for i, row in enumerate(x)])


def _pair(a: Any, b: Any, name_a: str, name_b: str) -> tuple[FloatArray, FloatArray]:
    a, b = check_features(a, name_a), check_features(b, name_b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features differ in width: {name_a} has {a.shape[1]}, {name_b} has {b.shape[1]}; use one extractor"
        )
    return a, b
