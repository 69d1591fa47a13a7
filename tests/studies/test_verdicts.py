"""Verdicts, each against an independent truth (scipy, brute force, restricted maximum likelihood), and in words."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from mmdit_eval.calibration import false_verdicts, judge_simulated, other_intervals, planted_effects, simulate
from mmdit_eval.mixed import common_table, mixed_difference
from mmdit_eval.power import Spread, detectable, pilot_spread, power, seeds_needed, shared_freedom
from mmdit_eval.verdicts import decide, difference, hedges_g, holm, paired, permutation, sentence, welch

A, B = [0.81, 0.84, 0.79, 0.86, 0.83], [0.74, 0.80, 0.77, 0.72, 0.78]


def by_seed(values):
    return dict(enumerate(values))


def test_welch_is_scipys():
    ours, theirs = welch(A, B[:3]), scipy.stats.ttest_ind(A, B[:3], equal_var=False)
    interval = theirs.confidence_interval(0.95)
    assert (ours["p"], ours["df"]) == pytest.approx((theirs.pvalue, theirs.df), rel=1e-12)
    assert (ours["low"], ours["high"]) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert ours["value"] == pytest.approx(np.mean(A) - np.mean(B[:3]))


def test_the_paired_form_is_scipys():
    ours, theirs = paired(A, B), scipy.stats.ttest_rel(A, B)
    interval = theirs.confidence_interval(0.95)
    assert ours["p"] == pytest.approx(theirs.pvalue, rel=1e-12)
    assert (ours["low"], ours["high"]) == pytest.approx((interval.low, interval.high), rel=1e-12)


def test_the_permutation_test_counts_every_arrangement():
    both, seen = np.array(A + B), abs(np.mean(A) - np.mean(B))
    found = [
        abs(both[list(chosen)].mean() - np.delete(both, list(chosen)).mean())
        for chosen in itertools.combinations(range(10), 5)
    ]
    assert permutation(A, B) == pytest.approx(np.mean(np.array(found) >= seen - 1e-12))
    signs = itertools.product((1, -1), repeat=5)
    flipped = [abs(np.mean(np.array(s) * np.subtract(A, B))) for s in signs]
    assert permutation(A, B, pairs=True) == pytest.approx(np.mean(np.array(flipped) >= seen - 1e-12))
    assert permutation(A, B, pairs=True) == 2 / 32  # the least that five pairs can give
    assert permutation(A[:4], B) is None


def test_many_seeds_are_permuted_at_random_and_give_scipys_p():
    random = np.random.default_rng(0)
    a, b = random.normal(0.5, 1, 12), random.normal(0, 1, 12)
    theirs = scipy.stats.permutation_test(
        (a, b), lambda x, y: x.mean() - y.mean(), n_resamples=20_000, rng=np.random.default_rng(1)
    )
    assert permutation(a, b) == pytest.approx(theirs.pvalue, abs=0.015)
    assert permutation(a, b) == permutation(a, b)


def test_holm_against_its_definition():
    p = [0.01, 0.04, 0.03, 0.005]
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    assert holm([0.01, 0.02], family=4) == pytest.approx([0.04, 0.06])  # two more, not tested yet, count as the largest


def test_hedges_g_is_unbiased_for_few_seeds():
    random = np.random.default_rng(0)
    draws = [hedges_g(random.normal(1.5, 1, 4), random.normal(0, 1, 4)) for _ in range(20_000)]
    assert np.mean(draws) == pytest.approx(1.5, abs=0.03)  # d without the correction: 1.73


# --- the mixed model --------------------------------------------------------------------------------------------


def crossed(random, seeds, prompts, spreads, shift=0.0):
    """Two rows of scores [S, P] with seed, prompt, row x prompt and rest of the given deviations."""
    s, p, rp, e = spreads
    prompt = p * random.normal(size=prompts)
    return [
        shift * row
        + s * random.normal(size=(seeds, 1))
        + prompt
        + rp * random.normal(size=prompts)
        + e * random.normal(size=(seeds, prompts))
        for row in range(2)
    ]


def reml(tables, parts):
    """Fit a mixed model by brute force; return difference, standard error and Satterthwaite's degrees of freedom.

    Each of `parts` is a random effect: which of (row, seed, prompt) name one draw of it.
    """
    y = np.concatenate([table.ravel() for table in tables])
    labels = [(r, s, p) for r, t in enumerate(tables) for s in range(t.shape[0]) for p in range(t.shape[1])]

    def same(*parts):
        keys = [tuple(label[i] for i in parts) for label in labels]
        return np.array([[float(a == b) for b in keys] for a in keys])

    components = [*(same(*part) for part in parts), np.eye(len(y))]
    x = np.array([[float(r == row) for row in range(len(tables))] for r, _, _ in labels])
    contrast = np.array([1.0, -1.0])[: len(tables)]

    def projections(theta):
        v = sum(t * c for t, c in zip(theta, components, strict=True))
        inverse = np.linalg.inv(v)
        gram = np.linalg.inv(x.T @ inverse @ x)
        return v, inverse, gram, inverse - inverse @ x @ gram @ x.T @ inverse

    def loss(logs):
        v, _, gram, p = projections(np.exp(logs))
        return np.linalg.slogdet(v)[1] - np.linalg.slogdet(gram)[1] + y @ p @ y

    start = np.log(np.full(len(components), y.var() / len(components)))
    fitted = scipy.optimize.minimize(
        loss, start, method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-7, "fatol": 1e-10}
    )
    theta = np.exp(fitted.x)
    _, inverse, gram, p = projections(theta)
    value = contrast @ gram @ x.T @ inverse @ y
    information = 0.5 * np.array([[np.trace(p @ a @ p @ b) for b in components] for a in components])
    gradient = np.array([contrast @ gram @ x.T @ inverse @ c @ inverse @ x @ gram @ contrast for c in components])
    variance = contrast @ gram @ contrast
    return value, math.sqrt(variance), 2 * variance**2 / (gradient @ np.linalg.solve(information, gradient))


def test_the_mixed_model_is_restricted_maximum_likelihood():
    tables = crossed(np.random.default_rng(4), 3, 8, (0.6, 1.0, 0.8, 0.5), 0.4)
    value, error, df = reml(tables, [(0, 1), (2,), (0, 2)])
    ours = mixed_difference(*tables)
    assert (ours["value"], ours["error"]) == pytest.approx((value, error), rel=1e-4)
    assert ours["df"] == pytest.approx(df, rel=1e-3)


def test_with_shared_seeds_it_is_that_of_the_differences():
    random = np.random.default_rng(2)
    shared = 3.0 * random.normal(size=(4, 1))  # what a seed does to both rows
    a, b = (table + shared for table in crossed(random, 4, 8, (0.6, 1.0, 0.8, 0.5), 0.4))
    value, error, df = reml([a - b], [(1,), (2,)])
    ours = mixed_difference(a, b, pairs=True)
    assert (ours["value"], ours["error"]) == pytest.approx((value, error), rel=1e-4)
    assert ours["df"] == pytest.approx(df, rel=1e-3)
    assert mixed_difference(a, b)["error"] > 2 * ours["error"]
    with pytest.raises(ValueError, match="the same ones"):
        mixed_difference(a, b[:3], pairs=True)


def test_the_mixed_models_interval_holds_for_new_seeds_and_new_prompts():
    random = np.random.default_rng(0)
    for seeds in (3, 5):
        tests = [mixed_difference(*crossed(random, seeds, 20, (0.3, 1.0, 0.5, 1.0))) for _ in range(2_000)]
        assert np.mean([test["p"] <= 0.05 for test in tests]) <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / 2_000)
    unequal = [
        mixed_difference(a, b[:2]) for a, b in (crossed(random, 5, 20, (0.3, 1.0, 0.5, 1.0)) for _ in range(2_000))
    ]
    assert np.mean([test["p"] <= 0.05 for test in unequal]) <= 0.065


def test_the_paired_interval_holds_and_is_no_wider_than_it_must_be():
    random = np.random.default_rng(1)
    studies = [simulate(random, 2, 5, 256, pairs=True) for _ in range(600)]
    false = np.mean([mixed_difference(a, b, pairs=True)["p"] <= 0.05 for a, b in studies])
    assert 0.025 <= false <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / 600)  # nested seeds would give 0


def test_prompts_without_a_score_in_some_cell_are_left_out():
    rows = [[[1.0, None, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0]], [[0.0, 1.0, 1.0, None]]]
    first, second = common_table(rows)
    assert first.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert second.tolist() == [[0.0, 1.0]]
    with pytest.raises(ValueError, match="no prompt"):
        common_table([[[None, 1.0]], [[1.0, None]]])
    with pytest.raises(ValueError, match="do not line up"):
        common_table([[[1.0]], [[1.0, 1.0]]])


# --- power ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seeds", "spread", "size"), [((3, 3), (1.0, 1.0), 3.0), ((3, 5), (1.0, 0.3), 2.0), ((2, 2), (1.0, 1.0), 8.0)]
)
def test_the_power_of_welchs_test_is_what_simulation_finds(seeds, spread, size):
    random = np.random.default_rng(0)
    a = random.normal(size, spread[0], (20_000, seeds[0]))
    b = random.normal(0.0, spread[1], (20_000, seeds[1]))
    found = scipy.stats.ttest_ind(a, b, axis=1, equal_var=False).pvalue <= 0.05
    assert power(size, spread, seeds) == pytest.approx(found.mean(), abs=0.011)


@pytest.mark.parametrize(
    ("seeds", "spread", "size", "alpha"),
    [((5, 5), (1.0, 1.0), 3.0, 0.05 / 14), ((3, 8), (1.0, 3.0), 5.0, 0.01), ((2, 20), (1.0, 10.0), 4.0, 0.05)],
)
def test_the_power_is_the_integral_over_both_rows_variances(seeds, spread, size, alpha):
    nodes, weights = np.polynomial.legendre.leggauss(1_600)
    nodes, weights = (nodes + 1) / 2, weights / 2
    own = [s**2 * scipy.stats.chi2.ppf(nodes, n - 1) / (n - 1) / n for s, n in zip(spread, seeds, strict=True)]
    first, second = own[0][:, None], own[1][None, :]
    df = (first + second) ** 2 / (first**2 / (seeds[0] - 1) + second**2 / (seeds[1] - 1))
    limit = scipy.stats.t.isf(alpha / 2, df) * np.sqrt(first + second)
    error = math.sqrt(sum(s**2 / n for s, n in zip(spread, seeds, strict=True)))
    tails = scipy.stats.norm.cdf((size - limit) / error) + scipy.stats.norm.cdf((-size - limit) / error)
    assert power(size, spread, seeds, alpha) == pytest.approx(weights @ tails @ weights, abs=1e-6)


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_a_careful_plan_knows_that_differences_to_one_reference_share_its_noise(rows):
    random = np.random.default_rng(0)
    wide_enough = 0
    for _ in range(1_000):
        reference = random.normal(size=(5, 1))
        differences = random.normal(size=(5, rows)) - reference  # true variance 2
        pooled = math.sqrt(differences.var(axis=0, ddof=1).mean())
        df = shared_freedom([dict(enumerate(column)) for column in differences.T])
        assert 4 <= df <= 4 * rows
        wide_enough += Spread(pooled, 0.0, 1, df).careful(1) >= math.sqrt(2)
    assert wide_enough / 1_000 >= 0.78  # 4 in 5; of rows taken for independent 0.63 to 0.76


def test_without_two_common_seeds_the_smallest_comparison_counts():
    assert shared_freedom([{0: 1.0, 1: 2.0, 2: 0.5}, {3: 1.0, 4: 2.0}]) == 1
    assert shared_freedom([{0: 1.0, 1: 1.0, 2: 1.0}]) == 2  # no spread


def test_the_paired_power_is_the_noncentral_ts():
    critical = scipy.stats.t.isf(0.025, 4)
    theirs = scipy.stats.nct.sf(critical, 4, math.sqrt(5) * 1.2) + scipy.stats.nct.cdf(-critical, 4, math.sqrt(5) * 1.2)
    assert power(1.2, (1.0,), (5, 5)) == pytest.approx(theirs, abs=1e-8)


def test_detectable_and_seeds_needed_invert_the_power():
    size = detectable((1.0, 1.0), (4, 4), alpha=0.01)
    assert power(size, (1.0, 1.0), (4, 4), 0.01) == pytest.approx(0.8, abs=1e-5)
    count = seeds_needed(1.0, (1.0, 1.0))
    assert power(1.0, (1.0, 1.0), (count, count)) >= 0.8 > power(1.0, (1.0, 1.0), (count - 1, count - 1))
    assert count == 17
    assert seeds_needed(0.01, (1.0, 1.0)) is None
    with pytest.raises(ValueError, match="above 0"):
        seeds_needed(0.0, (1.0, 1.0))


def test_a_pilots_spread_is_split_into_training_and_pictures():
    random = np.random.default_rng(0)
    rows = [crossed(random, 400, 50, (0.3, 1.0, 0.0, 2.0))[0] for _ in range(3)]
    found = pilot_spread(rows)
    assert found.training == pytest.approx(0.3, abs=0.03)
    assert found.sample == pytest.approx(2.0, abs=0.05)
    assert found.at(200) == pytest.approx(math.hypot(0.3, 2 / math.sqrt(200)), abs=0.03)
    assert Spread(1.0, 0.0, 10, 4).careful(10) > 1.2
    with pytest.raises(ValueError, match="one seed a row"):
        pilot_spread([np.ones((1, 50))])


# --- decisions and words ----------------------------------------------------------------------------------------


def claim(first, second, pairs=False, score="relation", **names):
    return {**difference(first, second, pairs=pairs), **{"first": "joint", "second": "cross", "split": "seen",
            "score": score, **names}}  # fmt: skip


def test_a_clear_difference_is_said_with_its_interval_and_the_winner_first():
    found = decide([claim(by_seed(B), by_seed(A))])[0]
    assert found["verdict"] == "second"
    test = welch(A, B)
    words = sentence(found, "held-out combinations")
    assert words.startswith(
        f"cross beats joint by {100 * test['value']:.1f} points of relation accuracy, held-out combinations"
    )
    assert f"95 % interval {100 * test['low']:.1f} to {100 * test['high']:.1f}, 5 seeds" in words
    assert found["permutation"] == permutation(A, B)
    assert found["effect"] == hedges_g(B, A)


def test_where_less_is_better_the_smaller_value_wins():
    found = decide([claim({0: 1.0, 1: 1.1, 2: 0.9}, {0: 3.0, 1: 3.1, 2: 2.9}, score="frechet")])[0]
    assert found["verdict"] == "first"
    assert sentence(found, "seen combinations").startswith("joint beats cross by 2.000 in Fréchet")


def test_no_difference_says_what_could_have_been_shown():
    noisy = decide([claim({0: 0.70, 1: 0.78, 2: 0.74}, {0: 0.73, 1: 0.80, 2: 0.70})])[0]
    words = sentence(noisy, "seen combinations")
    assert noisy["verdict"] == "none"
    assert words.startswith("No difference shown between joint and cross in relation accuracy")
    assert words.endswith(f"this study could have shown {100 * noisy['detectable']:.1f}.")


def test_holm_takes_back_what_one_comparison_alone_would_have_shown():
    a, b = by_seed([0.80, 0.82, 0.84]), by_seed([0.75, 0.77, 0.785])
    alone = decide([claim(a, b)])[0]
    assert alone["verdict"] == "first"
    among = decide([claim(a, b)] + [claim(by_seed(A), by_seed([*A[1:], A[0]])) for _ in range(9)])[0]
    assert among["verdict"] == "none"
    assert "too little after Holm's correction" in sentence(among, "seen combinations")


def test_one_seed_gives_no_verdict_and_equal_seeds_give_none_either():
    one = decide([claim({0: 0.9}, {0: 0.5})])[0]
    assert one["verdict"] == "one seed"
    assert one["low"] is None
    assert sentence(one, "seen combinations").endswith("1 seed: between samples only.")
    full = decide([claim(by_seed([1.0] * 3), by_seed([1.0] * 3))])[0]
    assert full["verdict"] == "no spread"
    assert "the score cannot tell them" in sentence(full, "seen combinations")
    apart = decide([claim(by_seed([1.0] * 3), by_seed([0.5] * 3))])[0]
    assert "no test" in sentence(apart, "seen combinations")


@pytest.mark.parametrize(("a", "b", "pairs"), [([0.1] * 3, [0.7] * 3, False), ([0.3, 0.4, 0.5], [0.2, 0.3, 0.4], True)])
def test_the_round_off_of_equal_numbers_is_no_spread_over_seeds(a, b, pairs):
    assert np.std(np.subtract(a, b) if pairs else a) > 0  # 1e-17, which would make the difference certain
    found = decide([claim(by_seed(a), by_seed(b), pairs=pairs)])[0]
    assert (found["verdict"], found["p"]) == ("no spread", None)
    assert "no test" in sentence(found, "seen combinations")
    assert hedges_g([0.1] * 3, [0.7] * 3) is None
    with pytest.raises(ValueError, match="no spread"):
        mixed_difference(np.full((3, 4), 0.1), np.full((3, 4), 0.7))


def test_pairs_are_made_from_three_shared_seeds_on_and_only_from_shared_ones():
    a, b = {0: 0.5, 1: 0.6, 2: 0.7, 3: 0.9}, {1: 0.5, 2: 0.61, 0: 0.4, 7: 0.1}
    found = difference(a, b, pairs=True)
    assert found["method"] == "paired t over seeds"
    assert found["p"] == pytest.approx(paired([0.5, 0.6, 0.7], [0.4, 0.5, 0.61])["p"])
    assert difference({0: 1.0, 1: 2.0}, {0: 0.5, 1: 0.7}, pairs=True)["method"] == "Welch t over seeds"
    assert difference(a, b)["seeds"] == (4, 4)


# --- calibration ------------------------------------------------------------------------------------------------


def test_a_few_studies_without_a_difference_give_few_verdicts():
    for pairs in (False, True):
        found = false_verdicts(60, rows=3, seeds=3, pictures=64, pairs=pairs)
        assert found["share"] <= 0.17  # 5 % and four deviations
        planted = simulate(np.random.default_rng(0), 2, 8, 256, 4.0, pairs)
        assert judge_simulated(planted, pairs) == ["first"]
    # a difference smaller than the spread over seeds, which rows share: only the paired form shows it
    shared = simulate(np.random.default_rng(0), 2, 5, 4096, 0.3, pairs=True)
    assert (judge_simulated(shared, True), judge_simulated(shared)) == (["first"], ["none"])


@pytest.mark.slow
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("rows", "seeds"), [(2, 3), (2, 5), (4, 3), (4, 5)])
def test_a_thousand_studies_without_a_difference_give_five_percent_at_most(rows, seeds, pairs):
    found = false_verdicts(1_000, rows, seeds, 256, pairs=pairs)
    assert found["low"] <= 0.05
    assert found["share"] <= 0.07


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "planted", "pairs"), [(3, 1.2, False), (5, 0.8, False), (10, 0.5, False), (3, 0.6, True), (5, 0.4, True)]
)
def test_planted_effects_are_found_as_often_as_promised(seeds, planted, pairs):
    found = planted_effects(1_000, seeds, 256, planted, pairs=pairs)
    assert found["share"] == pytest.approx(found["promised"], abs=0.05)


@pytest.mark.slow
def test_the_bootstrap_over_pictures_is_wrong_far_more_often_than_the_mixed_model():
    found = other_intervals(500, 3, 256)
    assert found["mixed_model"]["low"] <= 0.05
    assert found["bootstrap_over_pictures"]["share"] > 0.2
