"""The oracle: reads true pictures perfectly, and finds every planted error."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from mmdit_eval.composition import METRICS, read_scene, score_composition, score_image
from scipy import ndimage

from mmdit.config import ShapesConfig
from mmdit.data import make_dataset
from mmdit.data.shapes import Scene, SceneObject, draw_scene, render, spacing_of


def thing(colour="red", shape="circle", size="large", x=16.0, y=20.0, said=True, number=2) -> SceneObject:
    return SceneObject(colour, shape, size, x, y, getattr(spacing_of(number), size)[0], said)


def scene_of(*objects: SceneObject, relation=None, kind="pair") -> Scene:
    return Scene(0, kind, tuple(objects), relation, None, 0, 0)


PAIR = scene_of(thing(), thing("blue", "square", "small", 48.0, 24.0), relation="left")


def changed(scene: Scene, slot: int, **changes) -> Scene:
    objects = list(scene.objects)
    objects[slot] = replace(objects[slot], **changes)
    return replace(scene, objects=tuple(objects))


def scored(drawn: Scene, wanted: Scene = PAIR) -> dict:
    return score_image(render(drawn), wanted)


@pytest.mark.parametrize("limit", [2, 6])
@pytest.mark.parametrize("split", ["seen", "heldout"])
def test_true_pictures_are_read_without_an_error(limit, split):
    data = make_dataset(ShapesConfig(max_objects=limit), split)
    result = score_composition(data.pixels(range(150)), data.scenes(range(150)))
    for metric in ("colour", "shape", "size", "count", "relation", "all_correct"):
        if metric in result["summary"]:
            assert result["summary"][metric]["value"] == 1.0
    assert result["summary"]["unreadable"] == {"value": 0.0, "n": 150}


@pytest.mark.parametrize("damage", ["noise", "blur", "both"])
def test_noise_of_ten_and_blur_of_one_pixel_leave_at_least_99_percent(damage):
    data = make_dataset(ShapesConfig(max_objects=6), "seen")
    images = data.pixels(range(200)).astype(float)
    if damage != "noise":
        images = ndimage.gaussian_filter(images, (0, 1, 1, 0))
    if damage != "blur":
        images = images + np.random.default_rng(0).normal(0, 10, images.shape)
    images = np.clip(images, 0, 255).round().astype(np.uint8)
    summary = score_composition(images, data.scenes(range(200)))["summary"]
    assert summary["all_correct"]["value"] >= 0.99
    assert summary["unreadable"]["value"] <= 0.01


def test_centres_are_read_to_a_fifth_of_a_pixel():
    for index in range(40):
        scene = draw_scene(0, index, "seen", 2)
        for item in scene.objects:
            assert min(np.hypot(item.x - o.x, item.y - o.y) for o in read_scene(render(scene))) < 0.2


def test_the_pair_itself_is_all_correct():
    result = scored(PAIR)
    assert result["all_correct"] is True
    assert [result[m] for m in ("colour", "shape", "size", "count", "relation")] == [True] * 5


PLANTED = {
    "one wrong colour": (changed(PAIR, 0, colour="green"), {"colour"}),
    "one wrong shape": (changed(PAIR, 1, shape="star"), {"shape"}),
    "one wrong size": (changed(PAIR, 1, size="large", radius=13.0), {"size"}),
    "objects exchanged": (changed(changed(PAIR, 0, x=48.0, y=24.0), 1, x=16.0, y=20.0), {"relation"}),
    "above instead of left": (changed(changed(PAIR, 0, x=30.0, y=16.0), 1, x=32.0, y=50.0), {"relation"}),
    "missing object": (replace(PAIR, objects=PAIR.objects[:1]), {"colour", "shape", "size", "count", "relation"}),
    "extra object": (
        replace(PAIR, objects=(*PAIR.objects, thing("white", "star", "small", x=32.0, y=52.0))),
        {"count"},
    ),
    "second of a kind": (replace(PAIR, objects=(*PAIR.objects, thing(x=24.0, y=49.0))), {"count"}),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_found_where_it_lies_and_nowhere_else(name):
    drawn, wrong = PLANTED[name]
    result = scored(drawn)
    got = {m for m in ("colour", "shape", "size", "count", "relation") if not result[m]}
    assert got == wrong
    assert result["all_correct"] is False
    assert result["unreadable"] is False


def test_exchanged_colours_are_an_error_of_binding():
    result = scored(changed(changed(PAIR, 0, colour="blue"), 1, colour="red"))
    assert result["all_correct"] is False
    assert not (result["colour"] and result["shape"] and result["relation"])


@pytest.mark.parametrize("relation", ["left", "above"])
def test_every_turned_relation_makes_a_true_scene_wrong(relation):
    scenes = [s for s in (draw_scene(0, i, "seen", 2) for i in range(120)) if s.relation == relation][:20]
    for scene in scenes:
        a, b = scene.objects
        turned = replace(scene, objects=(replace(a, x=64 - a.x, y=64 - a.y), replace(b, x=64 - b.x, y=64 - b.y)))
        result = score_image(render(turned), scene)
        assert result["relation"] is False
        assert result["all_correct"] is False
        assert result["colour"]
        assert result["shape"]
        assert result["count"]


def test_numpy_bools_count_as_what_they_are(monkeypatch):
    import mmdit_eval.composition as composition

    monkeypatch.setattr(composition, "_stands", lambda *_: np.bool_(False))
    result = score_image(render(PAIR), PAIR)
    assert not result["relation"]
    assert result["all_correct"] is False


def test_an_unmentioned_size_is_not_scored():
    silent = changed(changed(PAIR, 0, size_mentioned=False), 1, size_mentioned=False)
    result = scored(changed(PAIR, 1, size="large", radius=13.0), silent)
    assert result["size"] is None
    assert result["all_correct"] is True


def test_a_wrong_count_of_equal_objects_is_found():
    three = scene_of(*(thing(x=x, y=16.0 + 2 * x / 3, said=False, number=3) for x in (11.0, 32.0, 53.0)), kind="count")
    two = replace(three, objects=three.objects[:2])
    assert score_image(render(three), three)["all_correct"] is True
    assert score_image(render(two), three)["count"] is False
    assert score_image(render(three), two)["count"] is False
    assert score_image(render(three), two)["colour"] is True


def test_what_is_large_depends_on_how_many_objects_were_asked_for():
    middling = thing(
        "red", "circle", "large", x=20.0, said=True, number=3
    )  # radius 8.75: large among three, small alone
    others = [thing("blue", "square", "small", x=44.0, y=y, said=True, number=3) for y in (16.0, 40.0)]
    among_three = scene_of(middling, *others, kind="list")
    alone = scene_of(middling, kind="single")
    assert score_image(render(among_three), among_three)["size"] is True
    assert score_image(render(alone), alone)["size"] is False


def test_an_empty_picture_and_pure_noise_are_unreadable_and_wrong():
    empty = np.full((64, 64, 3), 30, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    for image in (empty, noise):
        result = score_image(image, PAIR)
        assert result["unreadable"] is True
        assert result["all_correct"] is False
        assert result["relation"] is False
        assert result["colour"] is False


def test_a_colour_outside_the_palette_is_unreadable():
    image = render(PAIR)
    image[image.astype(int)[..., 0] > 150] = (120, 90, 20)  # the red circle turns brown
    result = score_image(image, PAIR)
    assert result["unreadable"] is True
    assert result["colour"] is False


def test_a_blob_is_no_star():
    star = scene_of(thing("green", "star"), kind="single")
    image = ndimage.gaussian_filter(render(star).astype(float), (4, 4, 0)).round().astype(np.uint8)
    assert score_image(image, star)["shape"] is False


def test_late_and_early_objects_are_reported_apart_for_long_captions_only():
    late = PAIR.late
    assert late == (1,)
    wrong_late = score_image(render(changed(PAIR, 1, colour="white")), PAIR, long_caption=True)
    assert (wrong_late["late"], wrong_late["early"]) == (False, True)
    wrong_early = score_image(render(changed(PAIR, 0, colour="white")), PAIR, long_caption=True)
    assert (wrong_early["late"], wrong_early["early"]) == (True, False)
    assert scored(PAIR)["late"] is None


def test_summaries_tell_how_many_images_they_stand_for_and_keep_held_out_kinds_apart():
    data = make_dataset(ShapesConfig(), "heldout")
    scenes = data.scenes(range(40))
    images = data.pixels(range(40))
    for i, scene in enumerate(scenes):  # spoil the pairs
        if scene.heldout_kind == "pair":
            images[i] = 30
    result = score_composition(images, scenes)
    kinds = result["by_heldout_kind"]
    assert set(kinds) == {"pair", "binding"}
    assert kinds["pair"]["all_correct"]["value"] == 0.0
    assert kinds["binding"]["all_correct"]["value"] == 1.0
    assert kinds["pair"]["all_correct"]["n"] + kinds["binding"]["all_correct"]["n"] == 40
    assert set(result["summary"]) <= set(METRICS)
    assert result["summary"]["relation"]["n"] == sum(scene.relation is not None for scene in scenes)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="2 images for 1 scenes"):
        score_composition(np.zeros((2, 64, 64, 3), np.uint8), [PAIR])
    with pytest.raises(ValueError, match=r"uint8 image \[R, R, 3\], got float32"):
        read_scene(np.zeros((64, 64, 3), np.float32))
