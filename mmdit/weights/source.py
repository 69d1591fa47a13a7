"""Where one of our tensors lies in a file of another layout."""

from __future__ import annotations

from typing import NamedTuple


class Source(NamedTuple):
    """One tensor of ours, as a file stores it.

    Attributes:
        keys: one key, or several whose tensors are joined along the first axis (queries, keys and values).
        swapped: the file has the halves of the first axis the other way round, (scale, shift).
    """

    keys: tuple[str, ...]
    swapped: bool = False
