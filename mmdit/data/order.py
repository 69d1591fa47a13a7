"""The order of training data as a function: its whole state is one integer, the position."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mmdit import rng


def data_order(seed: int, length: int, positions: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return which item stands at each position of the endless stream of training samples.

    Position p lies in epoch p // length; each epoch is its own permutation of all items.

    Args:
        seed: of the run.
        length: items in the data set.
        positions: from 0 on, int [B].

    Returns:
        indices int64 [B].

    Raises:
        ValueError: the data set is empty.
    """
    if length < 1:
        raise ValueError("the data set is empty: there is nothing to put in order")
    positions = np.asarray(positions, dtype=np.int64)
    epochs, places = np.divmod(positions, length)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _epoch(seed, int(epoch), length)[places[here]]
    return indices


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, length: int) -> np.ndarray:
    return rng.permutation(seed, epoch, length)
