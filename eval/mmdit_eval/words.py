"""Words of a caption: which are looked at, and which of them a figure has room for. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mmdit.data.captions import NUMBERS, RELATION_WORDS, plural
from mmdit.data.shapes import COLOURS, SHAPES

_PLAIN = {"a", "an", "the", "of", "and", "in", "on", "to", "is", "with"}  # words whose maps say little
MOST = 8  # words in a row of a figure


def chosen_words(caption: str, words: Sequence[str] = ()) -> list[str]:
    """Return the given words that stand in the caption, else its own without articles and the like."""
    own = list(dict.fromkeys(_words(caption)))
    return [word for word in words if word in own] or [word for word in own if word not in _PLAIN]


def shown_words(caption: str, words: Sequence[str] = ()) -> tuple[list[str], int]:
    """Choose the words of a figure, and count those that are left out.

    Of the given words the first `MOST`. Of a long caption's own those that say what is in the picture (colours, shapes,
    sizes, numbers, relations), where it has any; of too many the first and the last ones, for a long text is cut off
    at its end.
    """
    known = chosen_words(caption, words)
    kept = known
    if len(known) > MOST and set(words) & set(known):
        kept = known[:MOST]
    elif len(known) > MOST:
        content = _content()
        kept = [word for word in known if word in content] or known
        kept = kept if len(kept) <= MOST else kept[: MOST // 2] + kept[-MOST // 2 :]
    return kept, len(known) - len(kept)


def repeated(caption: str, words: Sequence[str]) -> list[str]:
    """Return which of the words stand in the caption more than once."""
    every = _words(caption)
    return [word for word in words if every.count(word) > 1]


def _words(caption: str) -> list[str]:
    return re.findall(r"[\w'-]+", caption.lower())


def _content() -> set[str]:
    relations = {word for pair in RELATION_WORDS.values() for phrase in pair for word in phrase.split()}
    return {*COLOURS, *SHAPES, *map(plural, SHAPES), *NUMBERS[2:], *relations, "small", "large"} - _PLAIN
