"""What captions say as class labels, and the tokens and pieces these labels fall on."""

import numpy as np
import pytest

from mmdit.data.shapes import COLOURS, SHAPES, draw_scene
from mmdit.encoders.tokenizers import TINY, ClipTokenizer, T5Tokenizer
from mmdit.train.scene_heads import Pieces, WordEnds
from mmdit.train.scene_labels import (
    ATTRIBUTES,
    CLASSES,
    IGNORE,
    MAX_GROUPS,
    canonical_list,
    group_labels,
    is_heldout,
    slot_labels,
    swapped_scenes,
    word_labels,
)
from mmdit.train.tiny_clip import token_labels

SCENES = [draw_scene(5, i, "train", 6) for i in range(200)]


def _names(labels):
    return {name: CLASSES[name][label] for name, label in zip(ATTRIBUTES, labels, strict=True)}


@pytest.mark.parametrize("form", ["first", "second", "long"])
def test_every_group_is_found_by_its_words(form):
    for scene in SCENES:
        caption = scene.long() if form == "long" else scene.short(("first", "second").index(form))
        kinds, labels = word_labels(caption, scene)
        words = [word.strip(".,").lower() for word in caption.split()]
        found = {tuple(row) for row, kind in zip(labels.tolist(), kinds, strict=True) if kind}
        assert found == set(group_labels(scene))
        for word, kind, row in zip(words, kinds, labels.tolist(), strict=True):
            if not kind:
                assert row == [IGNORE] * len(ATTRIBUTES)
            elif kind in ("colour", "size", "count"):
                assert _names(row)[kind] == word
            else:
                assert word.startswith(_names(row)["shape"])


def test_the_canonical_list_does_not_depend_on_the_wording():
    pair = next(scene for scene in SCENES if scene.relation == "left")
    first = pair.objects[0]
    assert canonical_list(pair).split(" ; ")[0].startswith(f"{first.colour} {first.shape}")
    assert canonical_list(pair).endswith("right")
    many = next(scene for scene in SCENES if scene.kind == "list")
    assert group_labels(many) == sorted(group_labels(many))
    assert len({canonical_list(scene) for scene in SCENES}) > 100


def test_slots_are_the_groups_then_zeros():
    for scene in SCENES:
        slots = slot_labels(scene)
        assert slots.shape == (MAX_GROUPS, len(ATTRIBUTES))
        assert [tuple(row) for row in slots[: len(scene.groups)]] == group_labels(scene)
        assert not slots[len(scene.groups) :].any()
    assert not slot_labels(None).any()


def test_swapped_scenes_differ_in_what_they_say_and_avoid_held_out_combinations():
    kinds = set()
    for scene in SCENES:
        swaps = swapped_scenes(scene)
        assert bool(scene.relation) or not swaps
        for kind, swap in swaps.items():
            kinds.add(kind)
            assert canonical_list(swap) != canonical_list(scene)
            assert not is_heldout(swap)
            if kind != "axis":
                assert sorted(canonical_list(swap).replace(";", "").split()) == sorted(
                    canonical_list(scene).replace(";", "").split()
                )
        assert set(swaps) <= set(swapped_scenes(scene, heldout=True))
    assert kinds == {"order", "colour", "shape", "axis"}


def test_training_scenes_are_not_held_out_and_held_out_ones_are():
    assert not any(is_heldout(scene) for scene in SCENES)
    assert all(is_heldout(draw_scene(5, i, "heldout", 2)) for i in range(50))


def test_labels_of_words_fall_on_their_pieces():
    tokenizer = T5Tokenizer(TINY)
    pieces = Pieces(tokenizer)
    for scene in SCENES[:60]:
        caption = scene.short(0)
        kinds, _ = word_labels(caption, scene)
        (ids,) = tokenizer([caption], 160)
        spread = pieces.spread(ids, np.arange(len(kinds))[:, None])[:, 0]
        texts = {}
        for index, word in zip(ids, spread.tolist(), strict=True):
            if word != IGNORE:
                texts[word] = texts.get(word, "") + tokenizer.id_to_piece(index).replace("\u2581", "")
        for word, text in texts.items():
            assert caption.split()[word].strip(".,") == text
        assert set(texts) == set(range(len(kinds)))


def test_labels_of_words_fall_on_their_byte_pair_tokens():
    tokenizer = ClipTokenizer()
    ends = WordEnds(tokenizer)
    for scene in SCENES[:60]:
        caption = scene.long()
        words = caption.split()
        (ids,) = tokenizer([caption])
        spread = ends.spread(ids, np.arange(len(words))[:, None])[:, 0]
        texts = {}
        for index, word in zip(ids, spread.tolist(), strict=True):
            if word != IGNORE:
                texts[word] = texts.get(word, "") + tokenizer.id_to_piece(index).removesuffix("</w>")
        for word, text in list(texts.items())[:-1]:  # the last may be cut
            assert words[word].strip(".,").lower() == text


def test_every_object_has_the_token_its_centre_lies_in():
    for scene in SCENES:
        labels = token_labels(scene)
        for item in scene.objects:
            colour, shape, large, _ = labels[int(item.y // 8) * 8 + int(item.x // 8)]
            assert tuple(COLOURS)[colour - 1] == item.colour
            assert SHAPES[shape] == item.shape
            assert bool(large) == (item.size == "large")
        assert (labels[:, 0] > 0).sum() < 40
