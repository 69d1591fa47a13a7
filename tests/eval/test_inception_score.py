"""The Inception score against torch-fidelity, closed forms, and the spread of many draws."""

import numpy as np
import pytest
import torch
import torch_fidelity.metric_isc as fidelity
from mmdit_eval import inception_score
from mmdit_eval.inception_scores import inception_score_interval


def draw(n, k, seed=0):
    return 2.0 * np.random.default_rng(seed).normal(size=(n, k))


@pytest.mark.parametrize(("n", "splits"), [(100, 10), (107, 10), (33, 1), (12, 12)])
def test_it_equals_torch_fidelity_on_the_same_parts(n, splits):
    logits = draw(n, 17)
    out = fidelity.isc_features_to_metric(torch.from_numpy(logits), splits, shuffle=False)
    mean, deviation = inception_score(logits, splits, seed=None)
    assert mean == pytest.approx(out["inception_score_mean"], rel=1e-12)
    assert deviation == pytest.approx(out["inception_score_std"], rel=1e-9, abs=1e-13)


def test_it_equals_torch_fidelity_with_its_order():
    logits = draw(90, 5)
    out = fidelity.isc_features_to_metric(torch.from_numpy(logits), 10, shuffle=True, rng_seed=2020)
    order = np.random.RandomState(2020).permutation(90)
    assert inception_score(logits[order], seed=None).mean == pytest.approx(out["inception_score_mean"], rel=1e-12)


def test_its_two_ends_are_one_and_the_number_of_classes():
    assert inception_score(np.zeros((40, 6))) == pytest.approx((1.0, 0.0), abs=1e-12)
    sure = 800.0 * np.eye(6)[np.arange(60) % 6]  # exp of this overflows where the softmax is done by hand
    assert inception_score(sure, 1).mean == pytest.approx(6.0, rel=1e-12)
    assert inception_score(sure[:1].repeat(20, 0)).mean == pytest.approx(1.0, rel=1e-12)


def test_the_order_is_seeded():
    logits = draw(200, 8)
    assert inception_score(logits) == inception_score(torch.from_numpy(logits))
    assert inception_score(logits) != inception_score(logits, seed=1)


def test_its_interval_has_the_width_of_many_draws():
    found = [inception_score_interval(draw(500, 10, seed)) for seed in range(200)]
    values = np.array([estimate["value"] for estimate in found])
    assert values[0] == pytest.approx(inception_score(draw(500, 10, 0), 1, seed=None).mean, rel=1e-12)
    hits = [estimate["low"] <= values.mean() <= estimate["high"] for estimate in found]
    assert 0.90 <= np.mean(hits) <= 0.99


def test_unusable_logits_are_refused_in_words():
    with pytest.raises(ValueError, match="5 pictures cannot be dealt to 10 splits"):
        inception_score(draw(5, 4))
    with pytest.raises(ValueError, match="at least 2 classes"):
        inception_score(draw(50, 1))
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        inception_score(np.zeros(5))
    broken = draw(50, 4)
    broken[7, 0] = np.inf
    with pytest.raises(ValueError, match="first is row 7"):
        inception_score(broken)
