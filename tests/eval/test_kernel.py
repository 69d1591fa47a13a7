"""Kernel distances against the sums written out, and against torch-fidelity."""

import functools

import numpy as np
import pytest
from mmdit_eval import cmmd, kernel_distance


def draw(n, d, seed, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, d)) + shift


def naive(a, b):
    def k(x, y):
        return (x @ y / len(x) + 1) ** 3

    n, m = len(a), len(b)
    within_a = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_b = sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_a + within_b - 2 * sum(k(x, y) for x in a for y in b) / (n * m)


def test_it_equals_the_sums_written_out():
    a, b = draw(15, 6, 0), draw(22, 6, 1, 0.4)
    assert kernel_distance(a, b) == pytest.approx(naive(a, b), rel=1e-12)


def test_chunks_do_not_matter(monkeypatch):
    a, b = draw(50, 6, 0), draw(30, 6, 1, 0.4)
    whole = kernel_distance(a, b), cmmd(a, b)
    monkeypatch.setattr("mmdit_eval.kernel._CHUNK", 7)
    assert (kernel_distance(a, b), cmmd(a, b)) == pytest.approx(whole, rel=1e-12)


def test_it_equals_torch_fidelity_on_the_full_set():
    torch = pytest.importorskip("torch")
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = draw(60, 8, 0), draw(60, 8, 1, 0.3)
    out = fidelity.kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subsets=2, kid_subset_size=60, verbose=False
    )
    assert kernel_distance(a, b) == pytest.approx(out["kernel_inception_distance_mean"], rel=1e-9)


def test_its_mean_over_draws_of_one_distribution_is_zero():
    values = [kernel_distance(draw(20, 4, 2 * i), draw(20, 4, 2 * i + 1)) for i in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(300)
    assert min(values) < 0 < max(values)


def test_pairs_are_compared_with_others_only():
    """Gretton et al. 2012, Eq. 4: the mean of h over pairs that differ."""
    a, b = draw(15, 6, 0), draw(15, 6, 1, 0.4)

    def k(x, y):
        return (x @ y / 6 + 1) ** 3

    different = [(i, j) for i in range(15) for j in range(15) if i != j]
    h = [k(a[i], a[j]) + k(b[i], b[j]) - k(a[i], b[j]) - k(a[j], b[i]) for i, j in different]
    assert kernel_distance(a, b, paired=True) == pytest.approx(np.mean(h), rel=1e-12)
    assert kernel_distance(a, a, paired=True) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("distance", [kernel_distance, functools.partial(cmmd, unbiased=True)])
def test_pairs_that_resemble_each_other_have_a_mean_of_zero(distance):
    """Sets of one distribution whose row i agree for nine tenths, as pictures of one prompt do."""
    paired, apart = [], []
    for i in range(300):
        a = draw(20, 4, 2 * i)
        b = 0.9 * a + np.sqrt(1 - 0.9**2) * draw(20, 4, 2 * i + 1)
        paired.append(distance(a, b, paired=True))
        apart.append(distance(a, b))
    assert abs(np.mean(paired)) < 3 * np.std(paired) / np.sqrt(300)
    assert np.mean(apart) < -20 * np.std(apart) / np.sqrt(300)


def test_it_equals_torch_fidelity_on_the_same_subsets():
    torch = pytest.importorskip("torch")
    fidelity = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = draw(50, 6, 0), draw(60, 6, 1)
    out = fidelity.kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subsets=4, kid_subset_size=20, rng_seed=2020, verbose=False
    )
    random = np.random.RandomState(2020)
    rows = [(random.choice(50, 20, False), random.choice(60, 20, False)) for _ in range(4)]
    assert kernel_distance(a, b, subsets=rows) == pytest.approx(out["kernel_inception_distance_mean"], rel=1e-10)


def test_subsets_of_the_whole_set_are_the_whole_set():
    a, b = draw(40, 5, 0), draw(40, 5, 1, 0.5)
    assert kernel_distance(a, b, subsets=3, subset_size=40) == pytest.approx(kernel_distance(a, b), rel=1e-12)
    first = kernel_distance(a, b, subsets=5, subset_size=20, seed=3)
    assert first == kernel_distance(a, b, subsets=5, subset_size=20, seed=3)
    assert first != kernel_distance(a, b, subsets=5, subset_size=20, seed=4)


def test_cmmd_of_a_set_with_itself_is_zero_and_of_opposites_is_known():
    a = draw(12, 5, 0)
    assert cmmd(a, a) == pytest.approx(0.0, abs=1e-9)
    point = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert cmmd(point, -point) == pytest.approx(1000 * (2 - 2 * np.exp(-4 / 200)), rel=1e-9)


def test_unusable_features_are_refused_in_words():
    a = draw(10, 4, 0)
    with pytest.raises(ValueError, match="differ in width"):
        kernel_distance(a, a[:, :2])
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(a[:1], a)
    with pytest.raises(ValueError, match="subset_size 11"):
        kernel_distance(a, a, subsets=2, subset_size=11)
    with pytest.raises(ValueError, match="a has 10 samples and b 9"):
        kernel_distance(a, a[1:], paired=True)
    with pytest.raises(ValueError, match="leave `subsets` out"):
        kernel_distance(a, a, subsets=2, subset_size=5, paired=True)
