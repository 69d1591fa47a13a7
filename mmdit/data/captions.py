"""English for scenes of shapes: a phrase, or several sentences.

The long form puts filler between what CLIP can read (75 tokens between its start and end tokens) and the rest. Every
word and every punctuation mark is at least one BPE token, so counting those bounds CLIP's tokens from below without a
tokenizer; a test checks the bound with the real one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmdit.data.shapes import Scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
FILLED = 74  # words before the closing sentence, which has three or more before its object: with the start token, 77
RELATION_WORDS = {"left": ("left of", "right of"), "above": ("above", "below")}

_BACKGROUND_SENTENCES = (
    "The background is plain black, even from one edge to the other.",
    "Everything lies on a flat black background without any texture.",
    "Behind it all there is one calm black surface and nothing else.",
)
_FILLER = (
    "It is a simple computer drawing with clean edges and even colours.",
    "There are no shadows, no lines and no letters anywhere in it.",
    "The light is the same in every corner, as in a printed sign.",
    "Nothing overlaps, and nothing is cut off by the border.",
    "The style is flat and quiet, like a page from a picture book.",
    "Each form is filled with a single colour from edge to edge.",
    "The frame is square, and the view is straight from the front.",
    "One could draw it again with a ruler, a pencil and some paint.",
    "There is some empty space around whatever is shown here.",
    "No person, no animal and no building can be found in it.",
)


def plural(shape: str) -> str:
    """Return the plural of a shape's name."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def article(words: str) -> str:
    """Put a or an before a phrase, by the sound of our own words (orange is the only vowel among them)."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def noun_phrase(scene: Scene, group: tuple[int, ...], with_article: bool = True) -> str:
    """Name a group of equal objects: "an orange star", "three small red circles"."""
    item = scene.objects[group[0]]
    size = f"{item.size} " if item.size_mentioned else ""
    if len(group) > 1:
        return f"{NUMBERS[len(group)]} {size}{item.colour} {plural(item.shape)}"
    words = f"{size}{item.colour} {item.shape}"
    return article(words) if with_article else words


def joined(parts: list[str]) -> str:
    """Join phrases: "A", "A and B", "A, B and C"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _ordered_groups(scene: Scene, wording: int) -> list[tuple[int, ...]]:
    return list(scene.groups) if wording == 0 else list(scene.groups)[::-1]


def short_caption(scene: Scene, wording: int) -> str:
    """Return the caption in one phrase; wording 1 names the objects in the opposite order."""
    phrases = [noun_phrase(scene, group) for group in _ordered_groups(scene, wording)]
    if scene.relation is not None:
        return f"{phrases[0]} {RELATION_WORDS[scene.relation][wording]} {phrases[1]}"
    return joined(phrases)


def late_objects(scene: Scene) -> tuple[int, ...]:
    """Return which objects the long caption describes late: all but the first-named group, or the only group."""
    groups = _ordered_groups(scene, scene.wording)
    late = groups if len(groups) == 1 else groups[1:]
    return tuple(sorted(i for group in late for i in group))


def long_caption(scene: Scene) -> str:
    """Return the caption in several sentences; `late_objects` are described only after CLIP's 77th token."""
    groups = _ordered_groups(scene, scene.wording)
    phrases = [noun_phrase(scene, group) for group in groups]
    if len(groups) == 1:
        opening = "This picture shows something small in number and easy to name."
        verb = "are" if len(groups[0]) > 1 else "is"
        closing = f"What can be seen {verb} {phrases[0]}."
    elif scene.relation is not None:
        opening = f"This picture shows {phrases[0]} and one more thing."
        # the other object is the subject now, so the relation is said from its side
        side = RELATION_WORDS[scene.relation][1 - scene.wording]
        side = f"To the {side}" if scene.relation == "left" else side.capitalize()
        closing = f"{side} the first there is {phrases[1]}."
    else:
        opening = f"This picture shows {phrases[0]} and something else."
        first_is_many = len(groups[1]) > 1
        closing = f"The rest {'are' if first_is_many or len(phrases) > 2 else 'is'} {joined(phrases[1:])}."
    sentences = [opening, _BACKGROUND_SENTENCES[scene.filler % 3]]
    # a walk with a step coprime to the table's length visits every sentence once
    position, stride = scene.filler // 3 % len(_FILLER), (1, 3, 7, 9)[scene.filler // 97 % 4]
    walk = [_FILLER[(position + k * stride) % len(_FILLER)] for k in range(len(_FILLER))]
    missing = FILLED - sum(map(count_words, sentences))
    while missing > 0:
        # the shortest sentence that will do ends the filler: T5's 154 tokens must hold the whole caption
        enough = [sentence for sentence in walk if count_words(sentence) >= missing]
        walk.remove(chosen := min(enough, key=count_words) if enough else walk[0])
        sentences.append(chosen)
        missing -= count_words(chosen)
    return " ".join([*sentences, closing])


def count_words(text: str) -> int:
    """Count words and punctuation marks: a lower bound of the number of BPE tokens."""
    return len(re.findall(r"\w+|[^\w\s]", text))
