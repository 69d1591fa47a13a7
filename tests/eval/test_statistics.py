"""Intervals: known values, and that they cover what they promise."""

import numpy as np
import pytest
from mmdit_eval.statistics import (
    jackknife_interval,
    mean_interval,
    paired_interval,
    seed_interval,
    wilson_interval,
)


def test_wilson_has_the_published_value_and_stays_inside_zero_and_one():
    estimate = wilson_interval([True] * 8 + [False] * 2)
    assert (estimate["low"], estimate["high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval([True] * 20)["high"] == 1.0
    assert wilson_interval([True] * 20)["low"] == pytest.approx(0.8389, abs=1e-4)
    assert wilson_interval([False] * 5)["low"] == 0.0


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for i in range(200):
        estimate = mean_interval(np.random.default_rng(i).normal(1.0, 2.0, size=40), draws=300)
        hits += estimate["low"] <= 1.0 <= estimate["high"]
    assert 0.88 <= hits / 200 <= 0.99


def test_clusters_widen_the_interval_where_their_members_move_together():
    random = np.random.default_rng(0)
    per_image = np.repeat(random.random(50) < 0.5, 4).astype(float)
    alone = mean_interval(per_image)
    grouped = mean_interval(per_image, clusters=np.repeat(np.arange(50), 4))
    assert grouped["n"] == 50
    assert grouped["value"] == alone["value"]
    assert grouped["high"] - grouped["low"] > 1.6 * (alone["high"] - alone["low"])


def test_the_jackknife_of_a_mean_is_near_the_classical_error():
    x = np.random.default_rng(0).normal(size=500)
    estimate = jackknife_interval(lambda rows: float(x[rows].mean()), 500, groups=50)
    assert estimate["value"] == pytest.approx(x.mean())
    classical = 2.01 * x.std(ddof=1) / np.sqrt(500)
    assert (estimate["high"] - estimate["low"]) / 2 == pytest.approx(classical, rel=0.3)


def test_pairs_of_equal_results_have_no_difference_and_no_width():
    a = np.random.default_rng(0).random(30)
    assert paired_interval(a, a) == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 30, "method": "paired bootstrap"}
    with pytest.raises(ValueError, match="equal lengths"):
        paired_interval(a, a[:3])


def test_one_seed_has_no_interval_and_three_have_students():
    assert seed_interval([0.9])["low"] is None
    estimate = seed_interval([1.0, 2.0, 3.0])
    assert estimate["value"] == 2.0
    assert estimate["high"] - 2.0 == pytest.approx(4.3027 / np.sqrt(3), abs=1e-3)


def test_values_that_are_not_finite_are_counted_and_refused():
    with pytest.raises(ValueError, match="1 of 2"):
        mean_interval([1.0, float("nan")])
    with pytest.raises(ValueError, match="at least one"):
        wilson_interval([])
