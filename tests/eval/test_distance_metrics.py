"""Distances as a suite measures them: with intervals, with enough pictures, and refused where they mean nothing."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from mmdit_eval import cmmd, frechet_distance, inception_score, kernel_distance
from mmdit_eval.distance_metrics import DISTANCES
from mmdit_eval.features import load_extractor
from mmdit_eval.metrics import METRICS, Drawn, Reference
from mmdit_eval.moments import Moments
from mmdit_eval.scores import SCORES
from mmdit_eval.suite import check_suite

from mmdit.config import ConfigError, RunConfig, ShapesConfig, SuiteConfig, resolve
from mmdit.data import make_dataset

CONFIG = ShapesConfig(num_images=120)


def draw(n, d, seed, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, d)) + shift


def drawn(pictures=None, extractor=None, count=30):
    dataset, indices = make_dataset(CONFIG, "seen"), np.arange(count)
    true = dataset.pixels(indices)
    reference = Reference(
        "seen", dataset, indices, dataset.captions(indices), true, extractor or load_extractor("pixel_statistics")
    )
    return Drawn(true if pictures is None else pictures, reference, SuiteConfig(extractor="pixel_statistics"))


@pytest.mark.parametrize("reference", ["drawn", "paired"])
def test_every_distance_gives_scores_that_are_shown_with_intervals(reference):
    fake, real = draw(120, 6, 0, 0.5), draw(120, 6, 1)
    found = {}
    for function in DISTANCES.values():
        found |= function(fake, real, reference)
    assert set(found) == {
        "frechet", "frechet_infinity", "kernel", "cmmd", "precision", "recall", "density", "coverage"
    }  # fmt: skip
    for name, estimate in found.items():
        assert name in SCORES
        assert estimate["low"] < estimate["value"] < estimate["high"]
    kernel = functools.partial(kernel_distance, paired=reference == "paired")
    for name, function in (("frechet", frechet_distance), ("kernel", kernel), ("cmmd", cmmd)):
        assert found[name]["value"] == pytest.approx(function(fake, real), rel=1e-10)
    assert found["frechet_infinity"]["value"] < found["frechet"]["value"]


def test_moments_serve_the_frechet_distances():
    fake, real = draw(120, 6, 0, 0.5), draw(150, 6, 1)
    found = DISTANCES["frechet"](fake, Moments.of(real), None)["frechet"]
    assert found["value"] == pytest.approx(frechet_distance(fake, real), rel=1e-10)
    assert "fixed" in found["method"]
    assert DISTANCES["frechet_infinity"](fake, Moments.of(real), None)


def test_too_few_pictures_cost_the_score_that_needs_more_and_say_how_many():
    with pytest.warns(UserWarning, match="30 pictures are too few for 8 features, 36 are needed"):
        assert DISTANCES["frechet_infinity"](draw(30, 8, 0), draw(40, 8, 1), None) == {}
    with pytest.warns(UserWarning, match="more than 5 pictures"):
        assert DISTANCES["precision_recall"](draw(5, 8, 0), draw(40, 8, 1), None) == {}


def test_copies_of_training_pictures_are_found_in_a_suite():
    pictures = drawn().images.copy()
    honest = METRICS["memorisation"].function(drawn())
    assert honest.scores["closer"]["value"] == pytest.approx(0.5, abs=1e-9)
    pictures[::2] = make_dataset(CONFIG, "train").pixels(np.arange(40, 55))
    found = METRICS["memorisation"].function(drawn(pictures))
    assert found.scores["copied"]["value"] >= 0.5
    assert found.chance["copied"] == (found.details["memorisation"]["twins"] + 1) / 31
    closest = found.details["memorisation"]["closest"]
    assert all(entry["distance"] == 0 and entry["image"] % 2 == 0 for entry in closest)
    assert all(entry["training"] == 40 + entry["image"] // 2 for entry in closest)


def test_the_inception_score_takes_the_logits_behind_the_features():
    plain = load_extractor("pixel_statistics")
    classifier = replace(
        plain, classes=3, network=lambda features: torch.cat([features, 9 * features[:, [0, 20, 40]]], dim=1)
    )
    given = drawn(extractor=classifier)
    found = METRICS["inception_score"].function(given).scores["inception_score"]
    logits = 9 * given.features[:, [0, 20, 40]]
    assert found["value"] == pytest.approx(inception_score(logits, 1).mean, rel=1e-5)
    assert 1 < found["low"] < found["value"] < found["high"] < 3.5


def test_an_inception_score_of_an_extractor_without_classes_is_refused_before_drawing():
    run: RunConfig = resolve({})
    with pytest.raises(ConfigError, match="needs the logits of a classifier"):
        check_suite(SuiteConfig(metrics=("inception_score",)), run)
    check_suite(SuiteConfig(metrics=("inception_score",), extractor="inception_fid@weights.pth"), run)


def test_a_suites_frechet_distance_keeps_what_pairs_two_runs():
    given = drawn(drawn().images[::-1].copy())
    found = METRICS["frechet"].function(given)
    influence = np.array(found.influence["frechet"])
    assert len(influence) == 30
    half = (found.scores["frechet"]["high"] - found.scores["frechet"]["low"]) / 2
    assert half == pytest.approx(2.0452 * influence.std(ddof=1) / np.sqrt(30), rel=1e-3, abs=1e-9)


def test_plain_sets_are_measured_by_the_same_functions():
    from mmdit_eval.set_metrics import SET_METRICS, Pair

    fake, real = draw(60, 51, 0, 0.5), draw(80, 51, 1)
    pair = Pair(fake, real, draw(60, 4, 2), load_extractor("pixel_statistics"))
    found = {name: SET_METRICS[name](pair).scores for name in ("frechet", "kernel", "cmmd", "precision_recall")}
    for name, scores in found.items():
        expected = DISTANCES[name](fake, real, "drawn")
        assert {key: value["value"] for key, value in scores.items()} == pytest.approx(
            {key: value["value"] for key, value in expected.items()}
        )
    scored = SET_METRICS["inception_score"](pair)
    assert scored.scores["inception_score"]["value"] == pytest.approx(inception_score(pair.logits, 1).mean)
    assert scored.details["inception_score_of_10"]["mean"] == inception_score(pair.logits).mean
    with pytest.raises(ValueError, match="'pixel_statistics' has not"):
        SET_METRICS["inception_score"](replace(pair, logits=np.zeros((60, 0))))
