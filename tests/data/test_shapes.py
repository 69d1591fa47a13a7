"""Scenes of shapes: pure functions, honest captions, held-out combinations."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mmdit.config import ShapesConfig, load_config
from mmdit.data import make_dataset
from mmdit.data.captions import article, count_words
from mmdit.data.shapes import (
    COLOURS,
    GAP,
    HELDOUT_BINDINGS,
    ROOMY,
    SHAPES,
    Scene,
    draw_scene,
    pair_is_heldout,
    render,
    spacing_of,
)

ROOT = Path(__file__).resolve().parents[2]


def looks(scene: Scene) -> list[tuple[str, str]]:
    return [(item.colour, item.shape) for item in scene.objects]


def test_there_are_eight_colours_six_shapes_and_two_sizes():
    assert (len(COLOURS), len(SHAPES)) == (8, 6)
    assert {item.size for i in range(50) for item in draw_scene(0, i, "train").objects} == {"small", "large"}
    for number in range(1, 7):  # no radius could be both
        assert spacing_of(number).small[1] + 2 < spacing_of(number).large[0]
    palette = np.array(list(COLOURS.values()), dtype=float)
    distances = np.linalg.norm(palette[:, None] - palette[None], axis=-1) + 1e9 * np.eye(8)
    assert distances.min() > 90


def test_a_scene_is_a_pure_function_of_seed_split_and_index():
    assert draw_scene(3, 17, "train", 6) == draw_scene(3, 17, "train", 6)
    assert draw_scene(3, 17, "train", 6) != draw_scene(4, 17, "train", 6)
    assert draw_scene(3, 17, "train", 6) != draw_scene(3, 17, "seen", 6)
    a, b = make_dataset(ShapesConfig(), "train"), make_dataset(ShapesConfig(), "train")
    b.pixels([5, 1, 9])
    assert (a.pixels([9, 5]) == b.pixels([9, 5])).all()
    assert a.captions([9, 5]) == [a.captions([9])[0], a.captions([5])[0]]


def test_pixels_are_uint8_on_a_dark_neutral_background_and_antialiased():
    images = make_dataset(ShapesConfig(), "train").pixels(range(16))
    assert images.shape == (16, 64, 64, 3)
    assert images.dtype == np.uint8
    background = np.median(images.reshape(16, -1, 3), axis=1)
    assert (background == 12).all()
    single = next(s for s in (draw_scene(0, i, "train", 1) for i in range(99)) if s.objects[0].shape == "circle")
    assert len(np.unique(render(single).reshape(-1, 3), axis=0)) > 8
    assert make_dataset(ShapesConfig(), "train").pixels([]).shape == (0, 64, 64, 3)


def test_no_held_out_picture_occurs_in_training():
    train, heldout = (make_dataset(ShapesConfig(), split) for split in ("train", "heldout"))
    shown = {
        frozenset((o.colour, o.shape, o.x, o.y, o.radius) for o in scene.objects) for scene in train.scenes(range(4000))
    }
    for scene in heldout.scenes(range(2000)):
        assert frozenset((o.colour, o.shape, o.x, o.y, o.radius) for o in scene.objects) not in shown


def test_the_quickstart_has_some_32_000_different_scenes():
    config = load_config(ROOT / "configs/train/quickstart.yaml").data
    scenes = (draw_scene(config.seed, i, "train", config.max_objects) for i in range(config.num_images))
    different = {frozenset((o.colour, o.shape, o.x, o.y, o.radius) for o in scene.objects) for scene in scenes}
    assert len(different) == 32_499


def test_few_pictures_of_different_splits_are_equal():
    seen = set()
    for split in ("train", "val", "seen", "heldout"):
        seen |= {image.tobytes() for image in make_dataset(ShapesConfig(), split).pixels(range(250))}
    # of single objects, a quarter of the scenes, there are only 3,256 pictures
    assert len(seen) > 950


def test_with_two_objects_three_of_four_scenes_are_pairs_with_a_relation():
    kinds = Counter(draw_scene(0, i, "train", 2).kind for i in range(1000))
    assert set(kinds) == {"single", "pair"}
    assert 700 < kinds["pair"] < 800


def test_one_and_two_objects_stand_on_the_lattice_and_use_all_of_the_picture():
    places: dict[str, set[tuple[float, float]]] = {"small": set(), "large": set()}
    for index in range(4000):
        for item in draw_scene(0, index, "train", 2).objects:
            assert item.x % ROOMY.lattice == 0
            assert item.y % ROOMY.lattice == 0
            places[item.size].add((item.x, item.y))
    assert (len(places["small"]), len(places["large"])) == (49, 25)


@pytest.mark.parametrize("limit", [1, 3, 6])
def test_counts_reach_the_limit_and_no_further(limit):
    scenes = [draw_scene(1, i, "train", limit) for i in range(400)]
    assert {len(scene.objects) for scene in scenes} == set(range(1, limit + 1))


def test_objects_keep_their_distance_lie_inside_and_stand_in_their_relation():
    for index in range(400):
        scene = draw_scene(2, index, "train", 6)
        for i, a in enumerate(scene.objects):
            assert a.radius <= a.x <= 64 - a.radius
            assert a.radius <= a.y <= 64 - a.radius
            low, high = getattr(spacing_of(len(scene.objects)), a.size)
            assert low <= a.radius <= high
            for b in scene.objects[:i]:
                gap = max(abs(a.x - b.x), abs(a.y - b.y)) - a.radius - b.radius
                assert gap >= GAP
        if scene.relation is not None:
            a, b = scene.objects
            along, across = (b.x - a.x, b.y - a.y) if scene.relation == "left" else (b.y - a.y, b.x - a.x)
            assert along >= abs(across) + 6


@pytest.mark.parametrize("limit", [1, 2, 6])
def test_training_never_shows_a_held_out_combination_and_heldout_shows_nothing_else(limit):
    for split in ("train", "val", "seen"):
        for index in range(300):
            scene = draw_scene(0, index, split, limit)
            assert scene.heldout_kind is None
            assert not set(looks(scene)) & HELDOUT_BINDINGS
            if scene.kind == "pair":
                assert not pair_is_heldout(looks(scene)[0], scene.relation, looks(scene)[1])
    kinds = Counter()
    for index in range(300):
        scene = draw_scene(0, index, "heldout", limit)
        kinds[scene.heldout_kind] += 1
        new = set(looks(scene)) & HELDOUT_BINDINGS
        if scene.heldout_kind == "binding":
            assert len(new) == 1
        else:
            assert scene.heldout_kind == "pair"
            assert not new
            assert pair_is_heldout(looks(scene)[0], scene.relation, looks(scene)[1])
    assert kinds["binding"] == 300 if limit == 1 else min(kinds.values()) > 100


def test_each_colour_and_shape_of_a_held_out_combination_occurs_in_training():
    colours, shapes = Counter(), Counter()
    for index in range(500):
        for colour, shape in looks(draw_scene(0, index, "train", 2)):
            colours[colour] += 1
            shapes[shape] += 1
    assert set(colours) == set(COLOURS)
    assert set(shapes) == set(SHAPES)
    assert min(colours.values()) > 40
    assert min(shapes.values()) > 60
    assert len({c for c, _ in HELDOUT_BINDINGS}) == len({s for _, s in HELDOUT_BINDINGS}) == len(HELDOUT_BINDINGS)


def test_one_tenth_of_the_pairs_is_held_out():
    known = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELDOUT_BINDINGS]
    pairs = [pair_is_heldout(a, r, b) for a in known for b in known if a != b for r in ("left", "above")]
    assert abs(np.mean(pairs) - 0.1) < 0.01


GROUP = rf"(an? |two |three |four |five |six )(small |large )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(e?s)?"


def test_short_captions_are_grammatical_and_name_what_the_scene_marks_as_mentioned():
    numbers = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
    for index in range(400):
        scene = draw_scene(5, index, "train", 6)
        for wording in (0, 1):
            caption = scene.short(wording)
            said = Counter()
            for match in re.finditer(GROUP, caption):
                number, size, colour, shape, ending = match.groups()
                number = number.strip()
                vowel = (size or colour)[0] in "aeiou"
                assert number not in ("a", "an") or (number == "an") == vowel
                assert (ending is not None) == (numbers[number] > 1)
                said[size.strip() if size else None, colour, shape] += numbers[number]
            truth = Counter((o.size if o.size_mentioned else None, o.colour, o.shape) for o in scene.objects)
            assert said == truth, caption
            left = re.sub(GROUP, "X", caption)
            assert re.fullmatch(r"X|X (above|below|left of|right of) X|X and X|X, X and X", left)


def test_the_two_wordings_turn_the_relation_round():
    scene = next(s for s in (draw_scene(0, i, "train") for i in range(99)) if s.relation == "left")
    first, second = scene.short(0).split(" left of ")
    assert scene.short(1) == f"{second} right of {first}"
    scene = next(s for s in (draw_scene(0, i, "train") for i in range(99)) if s.relation == "above")
    first, second = scene.short(0).split(" above ")
    assert scene.short(1) == f"{second} below {first}"


def test_articles_follow_the_sound():
    assert article("orange star") == "an orange star"
    assert article("small orange star") == "a small orange star"


def test_late_objects_are_described_only_after_clips_77th_token():
    open_clip = pytest.importorskip("open_clip.tokenizer", reason="the real BPE comes with open_clip")
    tokenizer = open_clip.SimpleTokenizer()
    for index in range(150):
        scene = draw_scene(0, index, "train", 6)
        assert scene.late
        ids = tokenizer.encode(scene.long())
        read = tokenizer.decode(ids[:76])  # the first 77 with the start token; CLIP itself reads one less
        early = [item for i, item in enumerate(scene.objects) if i not in scene.late]
        for i in scene.late:
            shape = scene.objects[i].shape
            colour = scene.objects[i].colour
            assert f"{colour} {shape}" not in read
            assert f"{colour} {shape}" in scene.long()
        named = re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", read)
        assert set(named) == {(item.colour, item.shape) for item in early}


def test_long_captions_are_sentences_that_never_repeat_and_stay_short_enough_for_t5():
    for index in range(300):
        text = draw_scene(0, index, "train", 6).long()
        sentences = re.findall(r"[^.]+\.", text)
        assert all(s.strip()[0].isupper() for s in sentences)
        assert len(set(sentences)) == len(sentences)
        assert 77 <= count_words(text) <= 100


def test_a_long_relation_is_told_from_the_side_of_the_late_object():
    for index in range(60):
        scene = draw_scene(0, index, "train", 2)
        if scene.relation is None:
            continue
        (late,) = scene.late
        closing = re.findall(r"[^.]+\.", scene.long())[-1].strip()
        sides = {
            ("left", 0): "To the left of",
            ("left", 1): "To the right of",
            ("above", 0): "Above",
            ("above", 1): "Below",
        }
        assert closing.startswith(f"{sides[scene.relation, late]} the first there is")


def test_captions_both_mixes_short_and_long():
    data = make_dataset(ShapesConfig(captions="both"), "train")
    forms = [data.long_form(i) for i in range(300)]
    assert 110 < sum(forms) < 190
    captions = data.captions(range(300))
    assert all((len(c) > 200) == is_long for c, is_long in zip(captions, forms, strict=True))


def test_the_fingerprint_follows_everything_that_changes_the_data():
    base = make_dataset(ShapesConfig(), "train").fingerprint
    assert base == make_dataset(ShapesConfig(), "train").fingerprint
    others = [
        ShapesConfig(seed=1),
        ShapesConfig(max_objects=3),
        ShapesConfig(captions="long"),
        ShapesConfig(num_images=9),
    ]
    prints = {base, make_dataset(ShapesConfig(), "val").fingerprint}
    prints |= {make_dataset(config, "train").fingerprint for config in others}
    assert len(prints) == 6


def test_an_unknown_split_and_an_index_outside_are_refused():
    with pytest.raises(ValueError, match="unknown split 'test' of shapes"):
        make_dataset(ShapesConfig(), "test")
    with pytest.raises(IndexError, match="scene 5 of a split of 5"):
        make_dataset(ShapesConfig(num_images=5), "train").scene(5)
