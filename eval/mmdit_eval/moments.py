"""Mean and covariance of a stream of features, and the community's (mu, sigma) files.

Features of 50,000 images are 800 MiB at width 2048, their moments 32 MiB. So rows are folded in as they come, in
blocks of fixed size: the result does not depend on how the stream was cut into batches, to the last bit. While there
are no more rows than features the covariance is singular and the rows say more than it does; until then they are kept.

Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
All in float64: a Fréchet distance is a small difference of large traces.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg.blas import dsyrk
from scipy.linalg.lapack import dpotrf

from mmdit.data.archives import array_names, read_arrays

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
_CACHED = 128  # rows and columns of a block for which a transposed read costs nothing
_WIDEST = 16_384  # features that a file may have: the covariance of so many takes 2 GiB
_SMALLEST_BLOCK = 1_000  # rows folded in at once: large enough for the matrix product to dominate


class Moments:
    """Count, mean [d] and unbiased covariance [d, d] of features that arrive batch by batch.

    Attributes:
        count: rows seen; None where a file did not say.
        width: d, known from the first batch on.
    """

    def __init__(self) -> None:
        self.count: int | None = 0
        self.width: int | None = None
        self._folded = 0
        self._mean: FloatArray = np.zeros(0)
        self._scatter: FloatArray = np.zeros((0, 0))  # sum of outer products about the mean; upper triangle
        self._pending: list[FloatArray] = []  # rows not folded in yet
        self._settled: Moments | None = None  # all folded in, kept until the next row comes

    @classmethod
    def of(cls, features: Any) -> Moments:
        """Return the moments of features [N, d], N >= 2.

        Raises:
            ValueError: as `check_features`.
        """
        moments = cls()
        moments.update(check_features(features, "features"))
        return moments

    def update(self, features: Any) -> None:
        """Take in a batch [B, d]; an empty one changes nothing.

        Raises:
            ValueError: not two-dimensional, another width than before, a value that is not finite, or moments read
                from a file that does not say how many samples they are of.
        """
        rows = _finite_rows(features, "features")
        if not len(rows):
            return
        if self.count is None:
            raise ValueError("these moments come from a file without a count of samples: nothing can be added to them")
        if self.width is None:
            self.width = rows.shape[1]
            self._mean, self._scatter = np.zeros(self.width), np.zeros((self.width, self.width), order="F")
        elif rows.shape[1] != self.width:
            raise ValueError(f"features differ in width: had {self.width}, got {rows.shape[1]}; use one extractor")
        self.count, self._settled = self.count + len(rows), None
        start = 0
        while start < len(rows):
            room = self._block - sum(map(len, self._pending))
            self._pending.append(rows[start : start + room].copy())  # the caller may reuse its buffer
            start += room
            if sum(map(len, self._pending)) == self._block:
                self._fold(np.concatenate(self._pending))
                self._pending = []

    def merge(self, other: Moments) -> None:
        """Take in what another process has seen: rank by rank in one order, for results equal to the last bit.

        Raises:
            ValueError: widths that differ, or moments without a count.
        """
        if other.count is None:
            raise ValueError("moments from a file without a count of samples cannot be merged")
        if not other.count:
            return
        if other._folded:
            if self.count == 0:
                self.width = other.width
                self._mean, self._scatter = np.zeros_like(other._mean), np.zeros_like(other._scatter)
            if self.count is None or self.width != other.width:
                raise ValueError(f"moments differ in width or lack a count: {self.width} and {other.width}")
            self._combine(other._folded, other._mean, other._scatter)
            self.count, self._settled = self.count + other._folded, None
        for rows in other._pending:
            self.update(rows)

    @property
    def rows(self) -> FloatArray | None:
        """Every row seen, [N, d], while N <= d; None afterwards. Not to be written to."""
        if self._folded or self.width is None or self.count is None or self.count > self.width:
            return None
        return self._pending[0] if len(self._pending) == 1 else np.concatenate(self._pending)

    @property
    def mean(self) -> FloatArray:
        """Mean, [d]."""
        return self._whole()._mean

    @property
    def covariance(self) -> FloatArray:
        """Unbiased covariance, [d, d]; its rank is at most N - 1.

        Raises:
            ValueError: fewer than 2 samples.
        """
        whole = self._whole()
        if whole.count is not None and whole.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {whole.count}")
        full = whole._scatter.copy(order="F")
        if whole.count is not None:
            full /= whole.count - 1
        for rows, columns in _blocks(len(full)):
            if rows.start < columns.start:
                full[columns, rows] = full[rows, columns].T
            elif rows == columns:
                full[rows, rows] = np.triu(full[rows, rows]) + np.triu(full[rows, rows], 1).T
        return full

    @property
    def _block(self) -> int:
        assert self.width is not None
        return max(_SMALLEST_BLOCK, self.width + 1)

    def _whole(self) -> Moments:
        """Return moments with every row folded in; these ones stay as they are."""
        if self.width is None:
            raise ValueError("moments of no features: update them first")
        if not self._pending:
            return self
        if self._settled is None:
            copy = self._settled = Moments()
            copy.width, copy.count, copy._folded = self.width, self.count, self._folded
            copy._mean, copy._scatter = self._mean, self._scatter.copy(order="F")
            copy._fold(np.concatenate(self._pending))
        return self._settled

    def _fold(self, rows: FloatArray) -> None:
        """Add a block; the step between the two means enters as one more row of the same product."""
        mean = rows.mean(0)
        n, m = self._folded, len(rows)
        step = (mean - self._mean) * np.sqrt(n * m / (n + m))
        centred = np.concatenate([rows - mean, step[None]])
        self._scatter = dsyrk(1.0, centred.T, beta=1.0, c=self._scatter, overwrite_c=1)  # half the work of a product
        self._mean = self._mean + (mean - self._mean) * (m / (n + m))
        self._folded += m

    def _combine(self, m: int, mean: FloatArray, scatter: FloatArray) -> None:
        n = self._folded
        step = mean - self._mean
        self._scatter = np.asfortranarray(self._scatter + scatter + np.triu(np.outer(step, step)) * (n * m / (n + m)))
        self._mean = self._mean + step * (m / (n + m))
        self._folded += m

    def save(self, path: str | Path, extractor: Mapping[str, str] | None = None) -> None:
        """Write `mu` and `sigma` as other tools read them, and beside them what they leave out.

        Ours are `count`, `extractor` (JSON: name, hash, resize) and, while N <= d, `features`. The file is whole or
        absent.

        Raises:
            ValueError: fewer than 2 samples.
        """
        arrays: dict[str, Any] = {"mu": self.mean, "sigma": self.covariance}
        if self.count is not None:
            arrays["count"] = np.int64(self.count)
        if (rows := self.rows) is not None:
            arrays["features"] = rows
        if extractor is not None:
            arrays["extractor"] = np.array(json.dumps(dict(extractor), sort_keys=True))
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path, extractor: Mapping[str, str] | None = None) -> Moments:
        """Read a file of `mu` and `sigma`, ours or another tool's.

        Args:
            extractor: what the other set's features come from (name, hash, resize); a file that says otherwise is
                refused, one that says nothing is taken with a warning.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not an .npz, `mu` or `sigma` missing or malformed, another extractor, or statistics of no more
                samples than features, whose covariance alone is not enough.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no statistics file {path}; write one with Moments.of(features).save({str(path)!r})"
            )
        arrays, names = read_arrays(path, ("mu", "sigma", "count", "extractor", "features")), array_names(path)
        widest = max((array.shape[-1] for array in arrays.values() if array.ndim), default=0)
        if widest > _WIDEST:
            raise ValueError(f"{path} is {widest:,} wide; no extractor has more than {_WIDEST:,} features")
        if missing := [key for key in ("mu", "sigma") if key not in arrays]:
            raise ValueError(f"{path} has no {' and no '.join(missing)}; it holds {', '.join(names) or 'nothing'}")
        _check_extractor(path, arrays.get("extractor"), extractor)
        if "features" in arrays:
            return cls.of(arrays["features"])
        mean, covariance = _check_statistics(path, arrays["mu"], arrays["sigma"])
        moments = cls()
        moments.width, moments._mean = len(mean), mean
        moments.count = count = _whole_number(path, arrays["count"]) if "count" in arrays else None
        if count is not None and count <= len(mean):
            raise ValueError(
                f"{path} holds the covariance of {count} samples of {len(mean)} features and not the features: it is "
                "singular, and a distance from it is wrong by 1e-6 and more. Save it anew with Moments.save, which "
                "keeps the features while they are so few, or use more samples"
            )
        moments._folded = count or 0
        moments._scatter = np.asfortranarray(np.triu(covariance) * (1 if count is None else count - 1))
        return moments


def check_features(features: Any, name: str) -> FloatArray:
    """Return features as finite float64 [N, d], N >= 2, or say what is wrong.

    Raises:
        ValueError: not two-dimensional, fewer than 2 rows, or a value that is not finite.
    """
    array = _finite_rows(features, name)
    if array.shape[0] < 2:
        raise ValueError(f"{name} has {array.shape[0]} sample(s); a distance between sets needs at least 2")
    return array


def check_pair(a: Any, b: Any) -> tuple[FloatArray, FloatArray]:
    """Return two sets of features of one width.

    Raises:
        ValueError: as `check_features`, or widths that differ.
    """
    a, b = check_features(a, "a"), check_features(b, "b")
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features differ in width: a has {a.shape[1]}, b has {b.shape[1]}; use one extractor for both"
        )
    return a, b


def asymmetry(matrix: FloatArray) -> float:
    """Return the largest difference of a square matrix from its transpose, without a copy of it."""
    differences = (np.abs(matrix[i, j] - matrix[j, i].T).max() for i, j in _blocks(len(matrix)) if i.start <= j.start)
    return float(max(differences, default=0.0))


def symmetrical(matrix: FloatArray, gap: float | None = None) -> FloatArray:
    """Return the mean of a matrix and its transpose; the matrix itself where both are equal. `gap`: its asymmetry."""
    gap = asymmetry(matrix) if gap is None else gap
    return matrix if gap == 0.0 else (matrix + matrix.T) / 2


def transposed(matrix: FloatArray) -> FloatArray:
    """Return the transpose of a square matrix as LAPACK reads it; by blocks, a fifth of the time of a whole copy."""
    found = np.empty(matrix.shape, order="F")
    for rows, columns in _blocks(len(matrix)):
        found[rows, columns] = matrix[columns, rows].T
    return found


def check_positive(covariance: FloatArray, name: str) -> None:
    """Refuse a matrix with eigenvalues below zero, by more than round-off among its correlations.

    Raises:
        ValueError: naming it and the eigenvalue.
    """
    if dpotrf(covariance.T, lower=0, clean=0)[1]:
        alive = np.diag(covariance) > 0
        scale = np.sqrt(np.diag(covariance)[alive])
        if scale.size:
            check_eigenvalues(np.linalg.eigvalsh(covariance[np.ix_(alive, alive)] / np.outer(scale, scale)), name)


def check_eigenvalues(values: FloatArray, name: str) -> None:
    """Refuse eigenvalues of correlations, rising, that are below zero by more than round-off.

    Raises:
        ValueError: naming whose they are.
    """
    if values[0] < -1e-6 * values[-1]:
        raise ValueError(
            f"{name} has the negative eigenvalue {values[0]:.3g} (of its correlations); it is no covariance"
        )


def _blocks(size: int) -> list[tuple[slice, slice]]:
    """Return rows and columns of blocks that a cache holds, of a square matrix."""
    parts = [slice(start, min(start + _CACHED, size)) for start in range(0, size, _CACHED)]
    return [(rows, columns) for rows in parts for columns in parts]


def _finite_rows(features: Any, name: str) -> FloatArray:
    if hasattr(features, "detach"):
        features = features.detach().cpu().double().numpy()
    array = np.asarray(features, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"{name} must be features [N, d], got shape {list(array.shape)}")
    bad = np.flatnonzero(~np.isfinite(array).all(1))
    if bad.size:
        raise ValueError(f"{name} holds values that are not finite in {bad.size} row(s), the first is row {bad[0]}")
    return array


def _check_statistics(path: Path, mean: Any, covariance: Any) -> tuple[FloatArray, FloatArray]:
    try:
        mean, covariance = np.asarray(mean, dtype=np.float64), np.asarray(covariance, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{path}: mu and sigma must be numbers, got {mean.dtype} and {covariance.dtype}") from None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{path}: mu must be [d] and sigma [d, d], got {list(mean.shape)} and {list(covariance.shape)}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path}: mu or sigma holds a value that is not finite")
    scale = np.abs(np.diag(covariance)).max(initial=0.0)
    if asymmetry(covariance) > 1e-5 * scale or np.diag(covariance).min(initial=0.0) < 0:
        raise ValueError(f"{path}: sigma is no covariance: it is not symmetric or has a negative variance")
    covariance = symmetrical(covariance)
    check_positive(covariance, f"{path}: sigma")
    return mean, covariance


def _whole_number(path: Path, stored: Any) -> int:
    if stored.size != 1 or stored.dtype.kind not in "iu":
        raise ValueError(f"{path}: count must be one whole number, got {stored.dtype} {list(stored.shape)}")
    return int(stored.reshape(()))


def _check_extractor(path: Path, stored: Any, expected: Mapping[str, str] | None) -> None:
    if expected is None:
        return
    if stored is None:
        warnings.warn(
            f"{path} does not say which extractor its statistics come from; taken to be {dict(expected)}", stacklevel=3
        )
        return
    try:
        found = json.loads(str(stored))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}, not a table")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: what it says of its extractor cannot be read ({error!s:.200})") from None
    if wrong := [
        f"{key} {found.get(key)!r} instead of {want!r}" for key, want in expected.items() if found.get(key) != want
    ]:
        raise ValueError(
            f"{path} comes from another extractor: {', '.join(wrong)}; distances between the two mean nothing"
        )
