"""Aspect-ratio buckets: pictures of like shape train together, so that nothing square has to be cut out of them.

A bucket is one size (height, width). Each picture goes to the bucket of the nearest ratio, and a batch holds pictures
of one bucket only, since its latents must stack. The order of batches is a permutation of whole batches of one bucket,
fixed by (seed, epoch); which process works on which part of a batch is decided afterwards, so nothing depends on it.

Source: Podell et al. 2023, arXiv:2307.01952, section 2.3 (training on several aspect ratios).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from mmdit import rng
from mmdit.denoiser import Conditioning

Size = tuple[int, int]  # height, width in pixels


def bucket_sizes(resolution: int, step: int, widest: float = 2.0) -> list[Size]:
    """Return sizes whose sides are multiples of `step` and whose area is nearest below resolution², widest first last.

    Args:
        resolution: pixels a side of the square one.
        step: pixels; a multiple of the denoiser's grain.
        widest: largest ratio of the longer side to the shorter.
    """
    sizes = set()
    for height in range(step, int(resolution * math.sqrt(widest)) + step, step):
        width = resolution * resolution // height // step * step
        if width >= step and max(height / width, width / height) <= widest:
            sizes.add((height, width))
    sizes.add((resolution, resolution))
    return sorted(sizes)


def nearest_bucket(width: int, height: int, sizes: Sequence[Size]) -> int:
    """Return the number of the bucket whose ratio is nearest to a picture's, on a logarithmic scale."""
    wanted = math.log(height / width)
    return min(range(len(sizes)), key=lambda k: (abs(math.log(sizes[k][0] / sizes[k][1]) - wanted), k))


def bucket_order(
    seed: int, counts: Sequence[int], batch_size: int, positions: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Return which item stands at each position of the endless stream of training samples.

    Items are numbered bucket by bucket. Each epoch shuffles every bucket, cuts it into whole batches and shuffles the
    batches; what is left of a bucket (less than a batch) sits this epoch out, other items each time.

    Args:
        seed: of the run.
        counts: items in each bucket; each is 0 or at least `batch_size`.
        batch_size: global.
        positions: from 0 on, int [B].

    Returns:
        indices int64 [B].

    Raises:
        ValueError: a bucket holds items, but less than a batch, which would never be seen.
    """
    small = [(k, n) for k, n in enumerate(counts) if 0 < n < batch_size]
    if small or not any(counts):
        listing = ", ".join(f"bucket {k} has {n}" for k, n in small) or "there are no items"
        raise ValueError(
            f"{listing}, less than a batch of {batch_size}: such pictures would never be seen; use fewer buckets or a "
            f"smaller train.batch_size"
        )
    positions = np.asarray(positions, dtype=np.int64)
    batches = sum(n // batch_size for n in counts)
    indices = np.empty_like(positions)
    epochs, places = np.divmod(positions, batches * batch_size)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _epoch(seed, int(epoch), tuple(counts), batch_size)[places[here]]
    return indices


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, counts: tuple[int, ...], batch_size: int) -> np.ndarray:
    offsets = np.concatenate([[0], np.cumsum(counts)])
    rows = []
    for k, count in enumerate(counts):
        shuffled = rng.generator(seed, "data_order", epoch, step=k + 1).permutation(count)
        whole = count // batch_size * batch_size
        rows.append(offsets[k] + shuffled[:whole].reshape(-1, batch_size))
    batches = np.concatenate(rows)
    return batches[rng.permutation(seed, epoch, len(batches))].reshape(-1)


def groups_of(source: Any) -> list[np.ndarray]:
    """Return the items of a source that may stand in one batch together: all of them, unless it says otherwise."""
    groups = getattr(source, "groups", None)
    return [np.arange(len(source))] if groups is None else groups


class BucketedSource:
    """Batches by index out of one source per bucket; items are numbered bucket by bucket.

    Args:
        sources: one per bucket that holds items, each as `mmdit.data.cache` makes them.
    """

    def __init__(self, sources: Sequence[Any]) -> None:
        self.sources = list(sources)
        self.counts = [len(source) for source in sources]
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def order(self, seed: int, positions: np.ndarray, batch_size: int) -> np.ndarray:
        """Return `bucket_order` of this source."""
        return bucket_order(seed, self.counts, batch_size, positions)

    @property
    def groups(self) -> list[np.ndarray]:
        """Items that may stand in one batch together: indices bucket by bucket."""
        return [np.arange(a, b) for a, b in zip(self._starts[:-1], self._starts[1:], strict=True)]

    def batch(self, indices: Sequence[int] | np.ndarray, draw: Any = None) -> tuple[Tensor, Conditioning]:
        """As `CachedLatents.batch`; all indices must lie in one bucket.

        Raises:
            ValueError: they do not.
        """
        indices = np.asarray(indices)
        buckets = np.unique(np.searchsorted(self._starts, indices, side="right") - 1)
        if len(buckets) != 1:
            raise ValueError(f"a batch must lie in one bucket, got items of {len(buckets)}; see `groups`")
        return self.sources[buckets[0]].batch(indices - self._starts[buckets[0]], draw)
