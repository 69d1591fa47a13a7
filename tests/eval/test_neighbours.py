"""Precision, recall, density, coverage and copies of the training set: against the formulas written out."""

import numpy as np
import pytest
import torch
import torch_fidelity.metric_prc as fidelity
from mmdit_eval import neighbours
from mmdit_eval.neighbours import (
    density_coverage,
    manifold_intervals,
    membership,
    memorisation,
    nearest_neighbours,
    precision_recall,
)
from scipy.spatial.distance import cdist


def draw(n, d, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, d)) + shift


def by_definition(real, fake, k):
    """The four numbers as their papers' codes compute them, from whole distance matrices."""
    between = cdist(real, fake)
    radius = [np.sort(cdist(x, x), axis=1)[:, k] for x in (real, fake)]
    precision = (between <= radius[0][:, None]).any(0).mean()
    recall = (between <= radius[1][None]).any(1).mean()
    density = (between < radius[0][:, None]).sum(0).mean() / k
    coverage = (between.min(1) < radius[0]).mean()
    return precision, recall, density, coverage


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("n", "m", "d"), [(80, 60, 4), (60, 90, 30), (7, 50, 2)])
def test_they_equal_their_definitions(n, m, d, k):
    real, fake = draw(m, d, 0), 0.8 * draw(n, d, 1, 0.3)
    found = (*precision_recall(real, fake, k), *density_coverage(real, fake, k))
    assert found == pytest.approx(by_definition(real, fake, k), rel=1e-12)


def test_precision_and_recall_equal_torch_fidelity():
    real, fake = draw(150, 6, 0), 0.7 * draw(120, 6, 1, 0.4)
    out = fidelity.prc_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real), prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=False,
        verbose=False,
    )  # fmt: skip
    assert precision_recall(real, fake) == pytest.approx((out["precision"], out["recall"]), abs=1e-7)


def test_blocks_do_not_matter(monkeypatch):
    real, fake = draw(83, 5, 0), draw(61, 5, 1, 0.5)
    whole = membership(real, fake, 3), nearest_neighbours(fake, real)
    monkeypatch.setattr(neighbours, "_BLOCK", 200)
    parts = membership(real, fake, 3), nearest_neighbours(fake, real)
    for name in ("precise", "recalled", "density", "covered"):
        assert (getattr(whole[0], name) == getattr(parts[0], name)).all()
    assert (whole[1][1] == parts[1][1]).all()


def test_one_distribution_has_the_published_density_and_coverage():
    """Density 1 and coverage 1 - 2^-k, Naeem et al. 2020: k = 5 gives 0.969."""
    found = [density_coverage(draw(500, 3, 2 * i), draw(500, 3, 2 * i + 1)) for i in range(8)]
    density, coverage = np.mean(found, axis=0)
    assert density == pytest.approx(1.0, abs=0.03)
    assert coverage == pytest.approx(1 - 2**-5, abs=0.01)


def test_an_outlier_that_encloses_everything_fools_precision_and_not_density():
    real = np.concatenate([draw(100, 2, 0), [[60.0, 0.0]]])
    fake = draw(100, 2, 1) * 0.5 + [30.0, 0.0]
    assert precision_recall(real, fake, 3).precision == 1.0
    assert density_coverage(real, fake, 3).density < 0.4


def test_copies_far_from_the_origin_have_distance_zero():
    """|x|² + |y|² - 2 xy alone would leave 1e-3 here."""
    bank = draw(50, 8, 0) + 1e6
    distances, rows = nearest_neighbours(bank[[7, 3, 20]], bank)
    assert (distances == 0).all()
    assert rows.tolist() == [7, 3, 20]
    near = bank[[5, 6]] + 1e-4
    assert nearest_neighbours(near, bank)[0] == pytest.approx(1e-4 * np.sqrt(8), rel=1e-5)
    doubled = np.repeat(draw(30, 4, 1) + 1e6, 5, axis=0)  # radii of 0: a copy lies within, on the edge
    assert precision_recall(doubled, doubled[::5], 3).precision == 1.0
    assert density_coverage(doubled, doubled[::5], 3).coverage == 0.0


def test_intervals_hold_the_four_numbers():
    real, fake = draw(200, 4, 0), draw(150, 4, 1, 0.8)
    found = manifold_intervals(real, fake, 5)
    expected = (*precision_recall(real, fake, 5), *density_coverage(real, fake, 5))
    assert [found[name]["value"] for name in ("precision", "recall", "density", "coverage")] == pytest.approx(expected)
    for estimate in found.values():
        assert estimate["low"] < estimate["value"] < estimate["high"]
    assert (found["precision"]["n"], found["recall"]["n"]) == (150, 200)
    assert "given the reals" in found["precision"]["method"]


def test_copies_of_the_training_set_are_found_and_counted():
    train, heldout, new = draw(400, 6, 0), draw(300, 6, 1), draw(200, 6, 2)
    clean = memorisation(new, train, heldout)
    assert clean.copied["value"] <= 3 * clean.expected + 0.02
    assert clean.closer["low"] < 0.5 < clean.closer["high"]
    copies = new.copy()
    copies[:40] = train[100:140] + 0.001
    found = memorisation(copies, train, heldout)
    assert found.copied["value"] == pytest.approx(0.2 + clean.copied["value"] * 0.8, abs=0.02)
    assert found.copied["low"] > found.expected
    assert found.closer["low"] > 0.5
    assert sorted(found.closest[:40].tolist()) == list(range(40))
    assert (found.nearest[:40] == np.arange(100, 140)).all()


def test_the_chance_of_being_closer_is_mann_whitneys_and_its_interval_covers():
    from scipy.stats import mannwhitneyu

    train = draw(50, 3, 9)
    hits = 0
    for seed in range(200):
        fake, heldout = draw(60, 3, 2 * seed + 100), draw(60, 3, 2 * seed + 101)
        found = memorisation(fake, train, heldout).closer
        hits += found["low"] <= 0.5 <= found["high"]
    assert 0.90 <= hits / 200 <= 0.99
    distances = [nearest_neighbours(x, train)[0] for x in (heldout, fake)]
    assert found["value"] == pytest.approx(mannwhitneyu(*distances).statistic / 3_600)


def test_unusable_sets_are_refused_in_words():
    a, b = draw(20, 4, 0), draw(30, 4, 1)
    with pytest.raises(ValueError, match="k = 20 neighbours need at least k \\+ 1 samples, real has 20"):
        precision_recall(a, b, 20)
    with pytest.raises(ValueError, match="k = 0"):
        density_coverage(a, b, 0)
    with pytest.raises(ValueError, match="real has 4, fake has 2"):
        precision_recall(a, b[:, :2])
    broken = b.copy()
    broken[4, 0] = np.nan
    with pytest.raises(ValueError, match="fake holds values that are not finite in 1 row"):
        precision_recall(a, broken)
    with pytest.raises(ValueError, match="fake has 1 sample"):
        precision_recall(a, b[:1])
    with pytest.raises(ValueError, match="2 of 2 held-out samples are in the training set, the first is row 0"):
        memorisation(a, b, b[5:7])
    heldout = np.concatenate([b[5:7], draw(9, 4, 2)])
    assert memorisation(a, b, heldout, twins="allow").twins == 2
    assert memorisation(a, b, heldout, twins="allow").expected == pytest.approx(3 / 12)


def exactly(real, fake, k):
    """The four numbers in whole numbers, where nothing is rounded."""
    squared = [((x[:, None] - y[None]) ** 2).sum(2) for x, y in ((real, real), (fake, fake), (real, fake))]
    radius = [np.sort(x, axis=1)[:, k] for x in squared[:2]]
    between = squared[2]
    precision = (between <= radius[0][:, None]).any(0).mean()
    recall = (between <= radius[1][None]).any(1).mean()
    density = (between < radius[0][:, None]).sum(0).mean() / k
    return precision, recall, density, (between.min(1) < radius[0]).mean()


@pytest.mark.parametrize("spread", [3, 12, 1_000])
@pytest.mark.parametrize("block", [2**24, 700])
def test_ties_count_as_ties(monkeypatch, spread, block):
    """Round-off put every second tie inside a ball: density was 0.79 instead of 0.57."""
    monkeypatch.setattr(neighbours, "_BLOCK", block)
    random = np.random.default_rng(0)
    real, fake = random.integers(0, spread, (300, 3)), random.integers(0, spread, (250, 3))
    found = (*precision_recall(real, fake, 5), *density_coverage(real, fake, 5))
    assert found == pytest.approx(exactly(real, fake, 5), rel=1e-14)


@pytest.mark.parametrize("d", [3, 64, 513])
def test_a_set_against_itself_has_the_density_of_its_neighbours_alone(d):
    """Each ball holds its centre and k - 1 neighbours; the k-th lies on its edge."""
    a = draw(400, d) + 7.3
    assert density_coverage(a, a[np.random.default_rng(1).permutation(400)], 5) == (1.0, 1.0)


def test_a_set_that_is_nearer_throughout_has_an_interval_all_the_same():
    train = draw(60, 4, 0)
    found = memorisation(train[:20] + 1e-6, train, draw(30, 4, 1) + 5.0)
    assert (found.closer["value"], found.closer["high"]) == (1.0, 1.0)
    assert 0.8 < found.closer["low"] < 0.9  # 20 of 20
    assert "given the threshold" in found.copied["method"]


@pytest.mark.parametrize("block", [2**24, 9_000])
def test_one_picture_many_times_over_is_compared_once(monkeypatch, block):
    """Every pair of equal pictures was done again by its difference: hours for 50,000 of a model that has collapsed."""
    done = []

    def counted(x, y, of_x, of_y, step):
        done.append(len(of_x))
        return differences(x, y, of_x, of_y, step)

    differences = neighbours._differences
    monkeypatch.setattr(neighbours, "_differences", counted)
    monkeypatch.setattr(neighbours, "_BLOCK", block)
    random = np.random.default_rng(0)
    real, fake = random.integers(0, 50, (300, 6)), np.repeat(random.integers(0, 50, (3, 6)), [100, 80, 60], axis=0)
    found = (*precision_recall(real, fake, 5), *density_coverage(real, fake, 5))
    assert found == pytest.approx(exactly(real, fake, 5), rel=1e-14)
    assert sum(done) < 300 * 240 / 4
