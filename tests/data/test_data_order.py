"""Order of data: a function of (seed, epoch, position), and of nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from mmdit.data.order import data_order


def test_every_epoch_visits_every_item_once():
    order = data_order(0, 13, np.arange(39))
    for epoch in range(3):
        assert sorted(order[13 * epoch : 13 * (epoch + 1)].tolist()) == list(range(13))


def test_epochs_and_seeds_have_different_orders():
    epochs = data_order(0, 50, np.arange(100))
    assert (epochs[:50] != epochs[50:]).any()
    assert (data_order(1, 50, np.arange(50)) != epochs[:50]).any()


def test_it_does_not_matter_how_positions_are_asked_for():
    whole = data_order(7, 10, np.arange(64))
    backwards = np.concatenate([data_order(7, 10, [p]) for p in range(63, -1, -1)])[::-1]
    ranks = np.empty_like(whole)
    for rank in range(4):  # a batch that spans epochs, dealt out to four processes
        ranks[rank::4] = data_order(7, 10, np.arange(64)[rank::4])
    assert (whole == backwards).all()
    assert (whole == ranks).all()
    assert whole.dtype == np.int64


def test_far_positions_cost_no_walk_through_the_epochs_before():
    assert data_order(0, 4, [10**12]).shape == (1,)


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="empty"):
        data_order(0, 0, [0])
