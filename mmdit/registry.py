"""One way to look a name up in a literal table, and one message when it is not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")
_LONG = 200  # characters of a name that are looked at: comparing more takes seconds


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the most similar of `names`, or None where nothing is similar enough to be a typo."""
    matches = difflib.get_close_matches(name[:_LONG], list(names), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(kind: str, name: str, names: Iterable[str]) -> str:
    """Say that `name` is no `kind`, which one was probably meant, and which there are."""
    names = list(names)
    guess = nearest(name, names)
    hint = f"; did you mean {guess!r}?" if guess else "."
    return f"unknown {kind} {name!r:.{2 * _LONG}}{hint} Known: {', '.join(names)}"


def lookup(table: Mapping[str, T], name: str, kind: str = "name") -> T:
    """Return `table[name]`.

    Raises:
        ValueError: `name` is not in the table; the message names the nearest entry.
    """
    if name not in table:
        raise ValueError(unknown(kind, str(name), table))
    return table[name]
