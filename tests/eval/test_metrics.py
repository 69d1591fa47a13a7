"""Contracts of every extractor and metric in the tables; a new one is tested by being registered."""

import warnings

import numpy as np
import pytest
from mmdit_eval.features import extract, load_extractor
from mmdit_eval.metrics import METRICS, Drawn, Measured, Reference
from mmdit_eval.scores import SCORES
from mmdit_eval.suite import check_suite, measure

from mmdit.config import ConfigError, RunConfig, ShapesConfig, SuiteConfig, resolve
from mmdit.data import make_dataset
from mmdit.data.shapes import COLOURS

COUNT = 12
# what a metric must say of true pictures beside themselves
KNOWN = {"colour": 1, "shape": 1, "count": 1, "relation": 1, "all_correct": 1, "unreadable": 0, "frechet": 0, "cmmd": 0}
OF_SHAPES = [name for name, metric in METRICS.items() if metric.data in (None, "shapes")]


def images(count=COUNT):
    return make_dataset(ShapesConfig(num_images=200), "seen").pixels(np.arange(count))


def reference(extractor="pixel_statistics", count=COUNT, batch_size=128):
    dataset = make_dataset(ShapesConfig(num_images=200), "seen")
    indices = np.arange(count)
    return Reference(
        "seen",
        dataset,
        indices,
        dataset.captions(indices),
        dataset.pixels(indices),
        load_extractor(extractor),
        batch_size,
    )


def drawn(pictures, **fields):
    true = reference(batch_size=fields.pop("batch_size", 128))
    return Drawn(pictures, true, SuiteConfig(extractor="pixel_statistics", batch_size=true.batch_size, **fields))


@pytest.mark.parametrize("name", ["tiny_clip", "pixel_statistics"])  # the others: test_extractors.py
def test_an_extractor_gives_finite_features_of_its_width_whatever_the_batch(name):
    extractor = load_extractor(name)
    pictures = images()
    features = extract(extractor, pictures)
    assert features.shape == (COUNT, extractor.width)
    assert np.isfinite(features).all()
    assert features.std(0).max() > 0
    assert extract(extractor, pictures, batch_size=5) == pytest.approx(features, abs=1e-5)
    assert extract(extractor, pictures[:0]).shape == (0, extractor.width)
    assert extractor.hash == load_extractor(name).hash
    assert extractor.resize


@pytest.mark.parametrize("name", ["tiny_clip", "pixel_statistics"])  # the others: test_extractors.py
def test_an_extractor_takes_other_sizes_and_refuses_what_is_no_picture(name):
    extractor = load_extractor(name)
    assert extract(extractor, np.zeros((2, 32, 48, 3), dtype=np.uint8)).shape == (2, extractor.width)
    with pytest.raises(ValueError, match="uint8"):
        extract(extractor, np.zeros((2, 64, 64, 3), dtype=np.float32))


@pytest.mark.parametrize("name", OF_SHAPES)
def test_a_metric_of_true_pictures_has_its_known_value_and_is_shown(name):
    measured = METRICS[name].function(drawn(images()))
    assert isinstance(measured, Measured)
    for score, estimate in measured.scores.items():
        assert np.isfinite(estimate["value"])
        assert score in SCORES
        if estimate["low"] is not None:
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
        if score in KNOWN:
            assert estimate["value"] == pytest.approx(KNOWN[score], abs=1e-6)
    for values in measured.per_image.values():
        assert len(values) == COUNT


@pytest.mark.parametrize("name", OF_SHAPES)
def test_a_metric_does_not_depend_on_the_batch_size(name):
    pictures = images()[::-1].copy()
    whole = METRICS[name].function(drawn(pictures))
    parts = METRICS[name].function(drawn(pictures, batch_size=5))
    for score, estimate in whole.scores.items():
        assert parts.scores[score]["value"] == pytest.approx(estimate["value"], abs=1e-5)


@pytest.mark.parametrize("name", OF_SHAPES)
def test_a_metric_survives_pictures_of_an_untrained_denoiser(name):
    random = np.random.default_rng(0)
    flat = np.stack([np.full((64, 64, 3), colour, dtype=np.uint8) for colour in list(COLOURS.values())[:4]])
    spots = flat.copy()
    spots[:, 20:40, 20:40] = 3  # darker than any colour of the palette, on a background that is one
    pictures = np.concatenate([flat, spots, random.integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        measured = METRICS[name].function(drawn(pictures))
    assert all(np.isfinite(estimate["value"]) for estimate in measured.scores.values())


def test_swapped_pictures_score_worse_than_right_ones():
    right, wrong = (measure(drawn(p, metrics=("composition", "frechet"))) for p in (images(), images()[::-1].copy()))
    assert wrong["scores"]["all_correct"]["value"] < 0.5 < right["scores"]["all_correct"]["value"]
    assert wrong["scores"]["frechet"]["value"] == pytest.approx(0, abs=1e-6)  # a distance of sets sees no prompts


def test_relation_is_asked_of_pairs_alone_and_wrong_relations_spoil_all_correct():
    true = reference()
    scenes = true.dataset.scenes(true.indices)
    mirrored = np.stack([p[:, ::-1] if s.relation == "left" else p for p, s in zip(true.images, scenes, strict=True)])
    found = METRICS["composition"].function(drawn(mirrored))
    for i, scene in enumerate(scenes):
        if scene.relation is None:
            assert found.per_image["relation"][i] is None
        elif scene.relation == "left":
            assert found.per_image["relation"][i] == 0.0
            assert found.per_image["all_correct"][i] == 0.0


def test_a_suite_that_the_data_cannot_serve_is_refused_by_name():
    run: RunConfig = resolve({"data": {"name": "images", "source": "folder", "resolution": 64}})
    with pytest.raises(ConfigError, match=r"'composition' needs data\.name 'shapes'"):
        check_suite(SuiteConfig(metrics=("composition",)), run)
    with pytest.raises(ConfigError, match="did you mean 'frechet'"):
        check_suite(SuiteConfig(metrics=("frechett",)), run)
    with pytest.raises(ConfigError, match=r"suite\.num_images: 'frechet' is a distance between sets"):
        check_suite(SuiteConfig(metrics=("clip_score", "frechet"), num_images=1), run)
    with pytest.raises(ConfigError, match=r"suite\.snapshot_images: 'cmmd' is"):
        check_suite(SuiteConfig(metrics=("cmmd",), snapshot_images=1), run)
    assert check_suite(SuiteConfig(metrics=("clip_score",), num_images=1), run).num_images == 1


def test_retrieval_asks_the_judge_about_each_emoji_and_states_chance(monkeypatch):
    """True pictures are found among their relatives; pictures of another tone are not."""
    from types import SimpleNamespace

    from mmdit_eval import judge as judging
    from mmdit_eval import metrics

    tones = ("light", "medium", "dark")
    records = [
        SimpleNamespace(base=base, gender="", tone=tone, codepoints=f"{base} {tone}", caption=f"{base}: {tone}")
        for base in ("hand", "foot")
        for tone in (*tones, "")
    ]

    class Painted:
        def embed(self, pictures):
            return np.eye(len(records), dtype=np.float32)[pictures[:, 0, 0, 0]]

    bank = judging.Bank(records, np.eye(len(records), dtype=np.float32))
    monkeypatch.setattr(judging, "judge", Painted)
    monkeypatch.setattr(metrics, "_emoji_bank", lambda config_json: bank)
    dataset = SimpleNamespace(
        records=lambda indices: [records[i] for i in indices], config=SimpleNamespace(name="emoji", model_dump_json=str)
    )
    rows = np.arange(len(records))
    pictures = np.zeros((len(records), 8, 8, 3), dtype=np.uint8)
    pictures[:, 0, 0, 0] = rows
    extractor = load_extractor("pixel_statistics")
    prompts = Reference("seen", dataset, rows, [r.caption for r in records], pictures, extractor)
    right = METRICS["retrieval"].function(Drawn(pictures, prompts, SuiteConfig()))
    assert {name: value["value"] for name, value in right.scores.items()} == {"same_base": 1.0, "same_tone": 1.0}
    assert right.chance["same_tone"] == pytest.approx(1 / 2)
    assert right.per_image["same_base"][3] is None  # no tone, nothing to ask
    shifted = pictures.copy()
    shifted[:, 0, 0, 0] = [1, 2, 0, 3, 5, 6, 4, 7]
    wrong = METRICS["retrieval"].function(Drawn(shifted, prompts, SuiteConfig()))
    assert wrong.scores["same_base"]["value"] == 0.0
