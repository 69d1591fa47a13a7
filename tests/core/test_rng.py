"""Randomness belongs to the image, not to the batch."""

import numpy as np
import pytest

from mmdit import rng


def test_a_row_does_not_depend_on_the_others():
    together = rng.normal(3, "train_noise", [5, 9, 7], (4, 2, 2))
    for row, index in enumerate([5, 9, 7]):
        assert np.array_equal(together[row], rng.normal(3, "train_noise", [index], (4, 2, 2))[0])


def test_seed_purpose_index_and_step_each_change_the_draw():
    base = rng.normal(0, "sample_noise", [0], (8,))
    for other in (
        rng.normal(1, "sample_noise", [0], (8,)),
        rng.normal(0, "step_noise", [0], (8,)),
        rng.normal(0, "sample_noise", [1], (8,)),
        rng.normal(0, "sample_noise", [0], (8,), step=1),
    ):
        assert np.abs(base - other).max() > 1e-3


def test_the_draws_are_the_same_on_every_machine():
    """Golden numbers: a change here changes every result and belongs under 'Changed results'."""
    assert rng.uniform(0, "train_t", [0, 1]).tolist() == pytest.approx(GOLDEN, abs=0)


GOLDEN = [0.9394991745311123, 0.5448679456531558]


def test_uniforms_are_standard_and_normals_have_unit_variance():
    draws = rng.normal(0, "sample_noise", range(2000), (16,))
    assert abs(draws.mean()) < 0.02
    assert abs(draws.std() - 1) < 0.02
    u = rng.uniform(0, "train_t", range(4000))
    assert abs(np.sort(u) - (np.arange(4000) + 0.5) / 4000).max() < 0.03  # Kolmogorov-Smirnov at about 1e-3


def test_a_permutation_holds_every_item_once_and_changes_with_the_epoch():
    first, second = rng.permutation(0, 0, 100), rng.permutation(0, 1, 100)
    assert sorted(first) == list(range(100))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, rng.permutation(0, 0, 100))


def test_an_unknown_purpose_is_refused():
    with pytest.raises(ValueError, match="unknown purpose 'nois'"):
        rng.generator(0, "nois")
