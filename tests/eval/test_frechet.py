"""The Fréchet distance against closed forms, scipy's matrix root and torch-fidelity."""

import numpy as np
import pytest
import scipy.linalg
from mmdit_eval import frechet_distance
from mmdit_eval.frechet import frechet_from_statistics, statistics


def draw(n, d, seed=0, shift=0.0, scale=1.0):
    random = np.random.default_rng(seed)
    return (random.normal(size=(n, d)) @ random.normal(size=(d, d))) * scale + shift


def by_matrix_root(a, b):
    (mean_a, cov_a), (mean_b, cov_b) = statistics(a), statistics(b)
    root = np.real(scipy.linalg.sqrtm(cov_a @ cov_b))
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)


def covariance(d, condition, seed):
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    cov = (q * np.logspace(0, -np.log10(condition), d)) @ q.T
    return (cov + cov.T) / 2


def test_full_rank_equals_the_matrix_root():
    a, b = draw(400, 24, 0), draw(300, 24, 1, shift=0.5, scale=1.3)
    assert frechet_distance(a, b) == pytest.approx(by_matrix_root(a, b), rel=1e-11)


def test_it_equals_torch_fidelity():
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = draw(200, 16, 2), draw(220, 16, 3, shift=1.0)
    stats = [{"mu": mean, "sigma": cov} for mean, cov in (statistics(a), statistics(b))]
    expected = fidelity.fid_statistics_to_metric(*stats, verbose=False)
    value = expected if isinstance(expected, float) else next(iter(expected.values()))
    assert frechet_distance(a, b) == pytest.approx(float(value), rel=1e-9)


def test_commuting_covariances_have_a_closed_form():
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0]
    left, right = np.linspace(0.1, 3, 16), np.logspace(-3, 1, 16)
    mean = np.linspace(-1, 1, 16)
    expected = (mean**2).sum() + ((np.sqrt(left) - np.sqrt(right)) ** 2).sum()
    value = frechet_from_statistics(mean, (q * left) @ q.T, np.zeros(16), (q * right) @ q.T)
    assert value == pytest.approx(expected, rel=1e-12)


def test_one_dimension_is_the_difference_of_means_and_deviations():
    a, b = draw(50, 1, 0), draw(70, 1, 1, shift=2.0)
    expected = (a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "d"), [(200, 8), (10, 40), (40, 40), (41, 40)])
def test_a_set_has_no_distance_to_itself(n, d):
    a = draw(n, d)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-10 * (a**2).sum() / n)


def test_a_shift_alone_gives_its_square_at_every_rank():
    for n in (6, 200):
        a = draw(n, 12)
        assert frechet_distance(a, a + 0.25) == pytest.approx(12 * 0.25**2, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(20, 25), (20, 400), (400, 20)])
def test_fewer_samples_than_features_is_exact(n, m):
    """In the joint span of both sets nothing changes, and there scipy's root is well conditioned."""
    random = np.random.default_rng(5)
    a, b = random.normal(size=(n, 60)), random.normal(size=(m, 60)) * 1.5 + 0.1
    a_c, b_c = a - a.mean(0), b - b.mean(0)
    nuclear = scipy.linalg.svdvals(a_c @ b_c.T).sum() / np.sqrt((n - 1) * (m - 1))
    traces = (a_c**2).sum() / (n - 1) + (b_c**2).sum() / (m - 1)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * nuclear
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_dead_and_duplicated_features_change_nothing_but_the_scale_they_add():
    a, b = draw(300, 10, 0), draw(300, 10, 1)
    dead = [np.hstack([x, np.full((300, 4), 7.0)]) for x in (a, b)]
    assert frechet_distance(*dead) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    doubled = [np.hstack([x, x]) for x in (a, b)]
    assert frechet_distance(*doubled) == pytest.approx(2 * frechet_distance(a, b), rel=1e-9)


def test_ill_conditioned_pairs_stay_right_against_fifty_digits():
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 50
    a, b = covariance(8, 1e10, 0), covariance(8, 1e10, 1)
    lower = mpmath.cholesky(mpmath.matrix(a.tolist()))
    values = mpmath.eigsy(lower.T * mpmath.matrix(b.tolist()) * lower, eigvals_only=True)
    expected = float(mpmath.mpf(np.trace(a) + np.trace(b)) - 2 * sum(mpmath.sqrt(v) for v in values))
    assert frechet_from_statistics(np.zeros(8), a, np.zeros(8), b) == pytest.approx(expected, rel=1e-12)
    assert frechet_from_statistics(np.zeros(8), a, np.zeros(8), a) == pytest.approx(0.0, abs=1e-12)


def test_it_is_symmetric_and_does_not_depend_on_the_order_of_samples():
    a, b = draw(100, 12, 0), draw(90, 12, 1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a[::-1], b) == pytest.approx(frechet_distance(a, b), rel=1e-12)


def test_unusable_features_are_refused_in_words():
    a = draw(20, 4)
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(a[:1], a)
    with pytest.raises(ValueError, match="differ in width: a has 4, b has 3"):
        frechet_distance(a, a[:, :3])
    broken = a.copy()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match="the first is row 3"):
        frechet_distance(a, broken)
    with pytest.raises(ValueError, match=r"\[N, d\]"):
        frechet_distance(a[0], a)
    with pytest.raises(ValueError, match="negative eigenvalue"):
        frechet_from_statistics(np.zeros(2), np.diag([1.0, -0.5]), np.zeros(2), np.eye(2))
