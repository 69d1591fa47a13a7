"""GenEval's six tasks from the oracle's readings, and the adapter for scorers that answer questions."""

import numpy as np
import pytest
from mmdit_eval.composition import score_composition
from mmdit_eval.metrics import METRICS, Drawn, Reference
from mmdit_eval.tasks import TASKS, task_hits, task_table
from mmdit_eval.vqa import vqa_metric, vqa_scores

from mmdit.config import ShapesConfig, SuiteConfig
from mmdit.data import make_dataset


def image(kind, **right):
    return {"colour": True, "shape": True, "count": True, "relation": None, "kind": kind, **right}


def test_each_task_is_asked_of_its_scenes_and_of_its_attributes_alone():
    readings = [
        image("single"),
        image("single", colour=False),
        image("pair", relation=True, colour=False),
        image("pair", relation=False),
        image("pair", relation=True, shape=False),
        image("count", count=False),
        image("count"),
        image("list", shape=False),
    ]
    table = task_table(readings)
    values = {task: table[task]["value"] for task in TASKS}
    assert values == {
        "single_object": 1.0, "two_objects": 2 / 3, "counting": 0.5, "colours": 0.5, "position": 1 / 3,
        "attribute_binding": 1 / 3,
    }  # fmt: skip
    assert table["counting"]["n"] == 2
    assert table["overall"]["value"] == pytest.approx(sum(values.values()) / 6)
    assert table["overall"]["n"] == 7
    assert table["overall"]["low"] < table["overall"]["value"] < table["overall"]["high"]
    assert task_hits(readings)["position"] == [None, None, 1.0, 0.0, 0.0, None, None, None]
    assert task_table([]) == {}


def test_true_pictures_solve_every_task_and_recoloured_ones_lose_colour_alone():
    dataset = make_dataset(ShapesConfig(), "seen")
    rows = np.arange(40)
    scenes, images = dataset.scenes(rows), dataset.pixels(rows)
    right = task_table(score_composition(images, scenes)["per_image"])
    assert set(right) == {*TASKS, "overall"} - ({"counting"} if "counting" not in right else set())
    assert all(estimate["value"] == 1.0 for estimate in right.values())
    shifted = task_table(score_composition(images[:, :, ::-1].copy(), scenes)["per_image"])  # mirrored left to right
    assert shifted["position"]["value"] < 1.0
    assert shifted["single_object"]["value"] == shifted["colours"]["value"] == 1.0


def test_the_composition_metric_holds_the_table():
    found = METRICS["composition"].function(drawn(8))
    assert found.details["tasks"]["overall"]["value"] == 1.0


class Fake:
    """Finds a caption in a picture where the picture's first pixel says so."""

    name, fingerprint = "fake", "0123"

    def __init__(self):
        self.asked = []

    def yes(self, images, questions):
        self.asked += questions
        return [float(image[0, 0, 0]) / 255 for image in images]


def drawn(count):
    dataset = make_dataset(ShapesConfig(), "seen")
    rows = np.arange(count)
    from mmdit_eval.features import load_extractor

    reference = Reference(
        "seen", dataset, rows, dataset.captions(rows), dataset.pixels(rows), load_extractor("pixel_statistics")
    )
    return Drawn(reference.images, reference, SuiteConfig())


def test_a_scorer_is_asked_its_question_about_each_picture_and_becomes_a_metric():
    pictures = np.zeros((5, 4, 4, 3), dtype=np.uint8)
    pictures[:, 0, 0, 0] = [0, 51, 102, 153, 255]
    scorer = Fake()
    found = vqa_scores(scorer, pictures, [f"thing {i}" for i in range(5)], batch_size=2)
    assert found == pytest.approx([0, 0.2, 0.4, 0.6, 1])
    assert scorer.asked[3] == 'Does this figure show "thing 3"? Please answer yes or no.'
    metric = vqa_metric(scorer)
    measured = metric.function(drawn(6))
    assert measured.scores["vqa_score"]["n"] == 6
    assert len(measured.per_image["vqa_score"]) == 6
    assert metric.judge() == "fake-0123"


def test_answers_that_are_no_probabilities_are_refused():
    pictures = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    for answers, message in (
        ([0.5], "gave \\[1\\] for 2 questions"), ([0.5, 1.5], "in 0 ... 1"), ([0.5, np.nan], "in 0 ... 1")
    ):  # fmt: skip
        scorer = Fake()
        scorer.yes = lambda images, questions, answers=answers: answers
        with pytest.raises(ValueError, match=message):
            vqa_scores(scorer, pictures, ["a", "b"])
    with pytest.raises(ValueError, match="got 1 for 2 pictures"):
        vqa_scores(Fake(), pictures, ["a"])
