"""The Fréchet distance against closed forms, scipy's matrix root and torch-fidelity."""

import mpmath
import numpy as np
import pytest
import scipy.linalg
from mmdit_eval import frechet_distance, singular_values
from mmdit_eval.frechet import frechet_from_statistics, frechet_influence, statistics


def draw(n, d, seed=0, shift=0.0, scale=1.0):
    random = np.random.default_rng(seed)
    return (random.normal(size=(n, d)) @ random.normal(size=(d, d))) * scale + shift


def by_matrix_root(a, b):
    (mean_a, cov_a), (mean_b, cov_b) = statistics(a), statistics(b)
    root = np.real(scipy.linalg.sqrtm(cov_a @ cov_b))
    return ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)


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


@pytest.mark.parametrize(("n", "d"), [(40, 60), (300, 400), (500, 300)])
def test_a_mean_a_million_deviations_away_costs_six_of_sixteen_digits_and_no_more(n, d):
    """The features are whole numbers of 2^-20, so that the offset itself costs none."""
    random = np.random.default_rng(0)
    a, b = (np.round(random.normal(size=(n, d)) * scale * 2**20) / 2**20 for scale in (1.0, 1.2))
    assert frechet_distance(a + 2.0**20, b + 2.0**20) == pytest.approx(frechet_distance(a, b), rel=1e-10)


def test_dead_and_duplicated_features_change_nothing_but_the_scale_they_add():
    a, b = draw(300, 10, 0), draw(300, 10, 1)
    dead = [np.hstack([x, np.full((300, 4), 7.0)]) for x in (a, b)]
    assert frechet_distance(*dead) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    silent = [np.hstack([x, np.zeros((300, 4))]) for x in (a, b)]
    assert frechet_distance(*silent) == pytest.approx(frechet_distance(a, b), rel=1e-13)
    doubled = [np.hstack([x, x]) for x in (a, b)]
    assert frechet_distance(*doubled) == pytest.approx(2 * frechet_distance(a, b), rel=1e-9)


def exact(a, b):
    """tr(a) + tr(b) - 2 tr((ab)^½) with fifty digits."""
    with mpmath.workdps(50):
        lower = mpmath.cholesky(mpmath.matrix(a.tolist()))
        squared = lower.T * mpmath.matrix(b.tolist()) * lower
        values = mpmath.eigsy((squared + squared.T) / 2, eigvals_only=True)
        traces = sum(mpmath.mpf(float(x)) for x in np.concatenate([np.diag(a), np.diag(b)]))
        return float(traces - 2 * sum(mpmath.sqrt(v) for v in values))


SPECTRA = {
    "even": np.logspace(0, -12, 24),
    "half of it small": np.repeat([1.0, 1e-12], 12),
    "one large": np.array([1.0] + [1e-12] * 23),
    "one small": np.array([1.0] * 23 + [1e-12]),
}


@pytest.mark.parametrize("turned", [False, True], ids=["upright", "turned"])
@pytest.mark.parametrize("other", ["itself", "near", "unlike"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_it_is_right_to_twelve_digits_at_condition_1e12(spectrum, other, turned):
    """Against 50 digits at d = 24. Roots of eigenvalues alone are off by up to 1e-8 in these (see the next test)."""
    values, d = SPECTRA[spectrum], 24
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0] if turned else np.eye(d)[::-1]
    tilt = np.random.default_rng(3).normal(size=(d, d)) * 0.05
    p = {
        "itself": q,
        "near": q @ scipy.linalg.expm(tilt - tilt.T),
        "unlike": np.linalg.qr(np.random.default_rng(1).normal(size=(d, d)))[0],
    }[other]
    a, b = (((m * values) @ m.T + ((m * values) @ m.T).T) / 2 for m in (q, p))
    zero = np.zeros(d)
    expected = exact(a, b)
    assert frechet_from_statistics(zero, a, zero, b) == pytest.approx(expected, rel=1e-12, abs=1e-13)
    assert frechet_from_statistics(zero, b, zero, a) == pytest.approx(expected, rel=1e-12, abs=1e-13)


def refuse_svd(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("singular values were taken where eigenvalues would do")

    monkeypatch.setattr(np.linalg, "svd", refused)


def by_centred_features(a, b):
    """Orthogonal factors of the features, singular values of their product: slow, and right at every rank."""
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    root = scipy.linalg.svdvals(centred[0] @ centred[1].T).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + sum((x**2).sum() for x in centred) - 2 * root


def test_full_rank_takes_one_reduction_and_no_singular_values(monkeypatch):
    x, y = draw(600, 300, 0), draw(600, 300, 1)
    expected = by_centred_features(x, y)
    refuse_svd(monkeypatch)
    monkeypatch.setattr(singular_values, "_graded", None)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("n", "m"), [(290, 290), (340, 270), (270, 900)])
def test_decaying_spectra_below_one_sample_a_feature_keep_every_digit_by_eigenvalues(n, m, power, monkeypatch):
    """Singular values from 1 to 1e-13; the product with its own transpose loses half of the digits."""
    d, random = 360, np.random.default_rng(0)
    turn = np.linalg.qr(random.normal(size=(d, d)))[0]
    a, b = ((random.normal(size=(k, d)) * np.arange(1, d + 1.0) ** -power) @ turn + 0.4 for k in (n, m))
    if power == 1.0:  # small samples first: R must fall all the same
        a = a[np.argsort(((a - a.mean(0)) ** 2).sum(1))]
    expected = by_centred_features(a, b)
    if m < d:
        refuse_svd(monkeypatch)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)


def test_where_eigenvalues_cannot_be_trusted_singular_values_are_taken():
    """A sample that stands in the set twice makes the product singular, and no determinant vouches for anything."""
    random = np.random.default_rng(0)
    a, b = random.normal(size=(300, 400)), random.normal(size=(300, 400)) * 1.1
    a[150:] = a[:150]
    assert frechet_distance(a, b) == pytest.approx(by_centred_features(a, b), rel=1e-12)


def test_a_sum_is_trusted_only_if_the_product_of_the_eigenvalues_is_the_determinant():
    values = np.logspace(-12, 0, 300)
    known = float(np.log(values).sum())
    assert singular_values.trusted(values, known, 1e-10) == pytest.approx(np.sqrt(values))
    moved = values + np.r_[1e-14, np.zeros(299)]  # 1 % of the smallest: 5e-9 of its root
    assert singular_values.trusted(moved, known, 1e-10) is None
    assert singular_values.trusted(moved, known, 1e-6) is not None
    assert singular_values.trusted(values - 2e-12, known, 1.0) is None


@pytest.mark.slow
@pytest.mark.parametrize("n", [2_000, 6_000])
def test_at_width_2048_it_equals_singular_values_of_orthogonal_factors(n):
    d = 2_048
    a, b = (np.random.default_rng(i).normal(size=(n, d)) * np.arange(1, d + 1) ** -0.5 + 0.01 * i for i in (0, 1))
    centred = [x - x.mean(0) for x in (a, b)]
    upper = [np.linalg.qr(x, mode="r") for x in centred]
    root = scipy.linalg.svdvals(upper[0] @ upper[1].T).sum() / (n - 1)
    traces = sum((x**2).sum() for x in centred) / (n - 1)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(60, 50, 8), (12, 15, 30), (12, 200, 30), (200, 12, 30), (60, 60, 12)])
def test_influence_is_the_derivative_with_respect_to_each_samples_weight(n, m, d):
    a, b = draw(n, d, 0), draw(m, d, 1, shift=0.3)
    if d == 12:  # rank lost with more samples than features
        a, b = (np.hstack([x[:, :9], x[:, :3], np.zeros((len(x), 1))]) for x in (a, b))
    value, left, right = frechet_influence(a, b)
    assert value == pytest.approx(frechet_distance(a, b), rel=1e-10)
    assert left.shape == (n,)
    assert right.shape == (m,)
    assert left.mean() == pytest.approx(0, abs=1e-9)
    # in the joint span with factors diag(sqrt w) (x - mean): differentiable at every rank
    for i in (0, 3, 7):
        for x, y, influence in ((a, b, left), (b, a, right)):
            slope = (_reweighted(x, y, i, 1e-5) - _reweighted(x, y, i, -1e-5)) / 2e-5
            assert influence[i] == pytest.approx(slope, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize(("n", "m", "d"), [(700, 650, 280), (280, 300, 320), (300, 700, 320)])
def test_influence_by_eigenvectors_equals_that_by_singular_vectors(n, m, d, monkeypatch):
    random = np.random.default_rng(0)
    turn = np.linalg.qr(random.normal(size=(d, d)))[0]
    a, b = ((random.normal(size=(k, d)) * np.arange(1, d + 1.0) ** -1.0) @ turn + 0.2 * i for i, k in enumerate((n, m)))
    assert d >= singular_values._WIDE
    found = frechet_influence(a, b)
    monkeypatch.setattr(singular_values, "_WIDE", d + 1)
    expected = frechet_influence(a, b)
    assert found[0] == pytest.approx(expected[0], rel=1e-11)
    for x, y in zip(found[1:], expected[1:], strict=True):
        assert x == pytest.approx(y, abs=1e-7 * np.abs(y).max())


def _reweighted(x, y, i, step):
    """The distance when sample i of x gets the weight 1/n + step, the others shrinking alike."""
    n, m = len(x), len(y)
    weights = np.full(n, (1 - step) / n)
    weights[i] += step
    mean = weights @ x
    left = (x - mean) * np.sqrt(weights * n / (n - 1))[:, None]
    right = (y - y.mean(0)) / np.sqrt(m - 1)
    root = scipy.linalg.svdvals(left @ right.T).sum()
    return ((mean - y.mean(0)) ** 2).sum() + (left**2).sum() + (right**2).sum() - 2 * root


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
    with pytest.raises(ValueError, match=r"negative variance -0\.5"):
        frechet_from_statistics(np.zeros(2), np.diag([1.0, -0.5]), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="negative eigenvalue -1"):
        frechet_from_statistics(np.zeros(2), [[1.0, 2.0], [2.0, 1.0]], np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="cov_b is no covariance: it is not symmetric"):
        frechet_from_statistics(np.zeros(2), np.eye(2), np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]))


def test_numbers_too_large_to_square_are_refused():
    with pytest.raises(ValueError, match="so large that their squares overflow"), np.errstate(all="ignore"):
        frechet_from_statistics([1e200], [[1.0]], [0.0], [[1.0]])
    for n in (3, 20):
        a = 1e200 * draw(n, 4)
        for function in (frechet_distance, frechet_influence):
            with pytest.raises(ValueError, match="so large that"), np.errstate(all="ignore"):
                function(a, a)  # with 3 samples it was 0: the larger of 0 and a number that is none


def exact_distance(a, b):
    """By 60 digits, for covariances of full rank."""
    with mpmath.workdps(60):
        means, covs = [], []
        for x in (a, b):
            x = mpmath.matrix(x.tolist())
            mean = [mpmath.fsum(x[i, j] for i in range(x.rows)) / x.rows for j in range(x.cols)]
            centred = mpmath.matrix(x.rows, x.cols)
            for i in range(x.rows):
                for j in range(x.cols):
                    centred[i, j] = x[i, j] - mean[j]
            means.append(mean)
            covs.append(centred.T * centred / (x.rows - 1))
        lower = mpmath.cholesky(covs[0])
        values = mpmath.eigsy(lower.T * covs[1] * lower, eigvals_only=True)
        traces = sum(cov[i, i] for cov in covs for i in range(cov.rows))
        between = sum((p - q) ** 2 for p, q in zip(*means, strict=True))
        return float(between + traces - 2 * sum(mpmath.sqrt(value) for value in values))


@pytest.mark.parametrize("other", ["same scales", "reversed", "one scale"])
def test_features_of_unlike_scale_are_not_taken_for_dead_ones(other):
    """A variance of 1e-18 against 1 is below round-off of the largest, and counts; it was 6e-9 off."""
    random = np.random.default_rng(0)
    scale = np.logspace(0, -9, 10)
    a = random.normal(size=(40, 10)) * scale
    b = random.normal(size=(30, 10)) * {"same scales": scale, "reversed": scale[::-1], "one scale": 1.0}[other]
    assert frechet_distance(a, b) == pytest.approx(exact_distance(a, b), rel=1e-12)


def test_rank_is_lost_at_every_scale_alike():
    """Doubled features of scales from 1 to 1e-9: the distance is that of the single ones, doubled at most."""
    random = np.random.default_rng(0)
    scale = np.logspace(0, -9, 6)
    a, b = random.normal(size=(40, 6)) * scale, random.normal(size=(30, 6)) + 0.1
    doubled = [np.concatenate([x, x], axis=1) for x in (a, b)]
    assert frechet_distance(*doubled) == pytest.approx(2 * exact_distance(a, b), rel=1e-9)
    of_single, of_doubled = (frechet_influence(x, y)[1] for x, y in ((a, b), doubled))
    assert of_doubled == pytest.approx(2 * of_single, rel=1e-7, abs=1e-9 * np.abs(of_single).max())


@pytest.mark.parametrize("reverse", [False, True])
def test_wide_features_of_unlike_scale_equal_the_road_without_covariances(reverse):
    """Where eigenvalues are taken; the singular values of the centred features need no covariance."""
    random = np.random.default_rng(0)
    scale = np.logspace(0, -9, 260)
    a, b = random.normal(size=(400, 260)) * scale, random.normal(size=(350, 260)) * (scale[::-1] if reverse else 1.0)
    a_c, b_c = a - a.mean(0), b - b.mean(0)
    nuclear = scipy.linalg.svdvals(a_c @ b_c.T).sum() / np.sqrt(399 * 349)
    traces = (a_c**2).sum() / 399 + (b_c**2).sum() / 349
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * nuclear
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_influence(a, b)[0] == pytest.approx(expected, rel=1e-12)
