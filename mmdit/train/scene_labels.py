"""What a caption of shapes says, as class labels: for each of its words, and for the scene's objects in order.

Training the tiny text encoders and probing them both read these labels. Class 0 is "unsaid" or "none".
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from mmdit.data.captions import NUMBERS, plural
from mmdit.data.shapes import COLOURS, HELDOUT_BINDINGS, SHAPES, Scene, pair_is_heldout

IGNORE = -100  # no label; torch's cross-entropy leaves it out
MAX_GROUPS = 3  # groups of equal objects in one scene
_PLACES = {"left": ("left", "right"), "above": ("top", "bottom")}

CLASSES: dict[str, tuple[str, ...]] = {
    "colour": ("none", *COLOURS),
    "shape": ("none", *SHAPES),
    "size": ("none", "small", "large"),
    "place": ("none", "left", "right", "top", "bottom"),
    "count": ("none", "one", "two", "three", "four", "five", "six"),
}
ATTRIBUTES = tuple(CLASSES)
_SINGULAR = {name: shape for shape in SHAPES for name in (shape, plural(shape))}
GRAMMAR_WORDS = ("above", "below", "left", "right", *COLOURS, *_SINGULAR, "small", "large", *NUMBERS[2:])
_WORD_KINDS = {
    **dict.fromkeys(COLOURS, "colour"),
    **dict.fromkeys(_SINGULAR, "shape"),
    "small": "size",
    "large": "size",
}
_WORD_KINDS |= dict.fromkeys(NUMBERS[2:], "count")


def group_labels(scene: Scene) -> list[tuple[int, ...]]:
    """Return one tuple of `ATTRIBUTES` classes per group, in canonical order.

    A pair's order is left before right, top before bottom; other scenes, whose captions may name groups in any order,
    are sorted by colour and shape.
    """
    labels = []
    for number, group in enumerate(scene.groups):
        item = scene.objects[group[0]]
        place = _PLACES[scene.relation][number] if scene.relation is not None else "none"
        said = (item.colour, item.shape, item.size if item.size_mentioned else "none", place, NUMBERS[len(group)])
        labels.append(tuple(CLASSES[name].index(value) for name, value in zip(ATTRIBUTES, said, strict=True)))
    return labels if scene.relation is not None else sorted(labels)


def slot_labels(scene: Scene | None) -> np.ndarray:
    """Return the scene's groups in canonical order: int64 [MAX_GROUPS, attributes], zeros where there is no group."""
    out = np.zeros((MAX_GROUPS, len(ATTRIBUTES)), dtype=np.int64)
    if scene is not None:
        groups = group_labels(scene)
        out[: len(groups)] = groups
    return out


def canonical_list(scene: Scene) -> str:
    """Write the groups in canonical order: "red circle left ; two blue square small"."""
    parts = []
    for labels in group_labels(scene):
        said = {name: CLASSES[name][label] for name, label in zip(ATTRIBUTES, labels, strict=True)}
        count = said["count"] if said["count"] != "one" else "none"
        words = (count, said["colour"], said["shape"], said["size"], said["place"])
        parts.append(" ".join(word for word in words if word != "none"))
    return " ; ".join(parts)


def word_labels(caption: str, scene: Scene) -> tuple[list[str], np.ndarray]:
    """Label each word of a caption with the attributes of the group it belongs to.

    Returns:
        For each word its kind (colour | shape | size | count, "" for others), and int64 [words, attributes] with
        `IGNORE` on words that describe no object.
    """
    words = [re.sub(r"\W", "", word).lower() for word in caption.split()]
    # (colour, shape) names a group: no two groups of a scene look alike
    known = {(labels[0], labels[1]): labels for labels in group_labels(scene)}
    kinds = [""] * len(words)
    labels = np.full((len(words), len(ATTRIBUTES)), IGNORE, dtype=np.int64)
    for i in range(len(words) - 1):
        if words[i] not in COLOURS or words[i + 1] not in _SINGULAR:
            continue
        look = CLASSES["colour"].index(words[i]), CLASSES["shape"].index(_SINGULAR[words[i + 1]])
        first = i
        while first > 0 and _WORD_KINDS.get(words[first - 1]) in ("size", "count"):
            first -= 1
        for j in range(first, i + 2):
            kinds[j], labels[j] = _WORD_KINDS[words[j]], known[look]
    return kinds, labels


def swapped_scenes(scene: Scene, heldout: bool = False) -> dict[str, Scene]:
    """Return minimal pairs of a two-object scene: what a caption of the same words, wrongly bound, would describe.

    `order`: the objects exchanged; `colour`, `shape`: that attribute exchanged between the objects; `axis`: the other
    relation. Scenes equal to this one are left out, and held-out combinations, which training must not show.
    """
    if scene.relation is None:
        return {}
    a, b = scene.objects
    swaps = {
        "order": replace(scene, objects=(b, a)),
        "colour": replace(scene, objects=(replace(a, colour=b.colour), replace(b, colour=a.colour))),
        "shape": replace(scene, objects=(replace(a, shape=b.shape), replace(b, shape=a.shape))),
        "axis": replace(scene, relation="above" if scene.relation == "left" else "left"),
    }
    return {name: swap for name, swap in swaps.items() if (heldout or not is_heldout(swap)) and not _same(swap, scene)}


def is_heldout(scene: Scene) -> bool:
    """Say whether training may not show this scene (its pair, or the look of one of its objects)."""
    looks = [(item.colour, item.shape) for item in scene.objects]
    if any(look in HELDOUT_BINDINGS for look in looks):
        return True
    return scene.relation is not None and pair_is_heldout(looks[0], scene.relation, looks[1])


def _same(a: Scene, b: Scene) -> bool:
    looks = [[(item.colour, item.shape) for item in scene.objects] for scene in (a, b)]
    return (looks[0] == looks[1] and a.relation == b.relation) or looks[0][0] == looks[0][1]
