"""Retrieval: does a picture lie nearest to its own caption (or its own true picture) among candidates?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_TIE = 1e-12  # cosines nearer than this are equal but for round-off


def retrieval_hits(queries: Any, candidates: Any, truth: Sequence[int], sets: Sequence[Sequence[int]]) -> np.ndarray:
    """Say for each query whether its true candidate is the nearest by cosine among its own set.

    Args:
        queries: [N, d].
        candidates: [M, d].
        truth: for each query the row of its true candidate.
        sets: for each query the rows it is chosen from; must contain the true one.

    Returns:
        bool [N]. Ties count as misses: a judge that sees no difference has not found the picture.

    Raises:
        ValueError: widths or lengths that differ, values that are not finite, or a set without its true candidate.
    """
    q, c = np.asarray(queries, dtype=np.float64), np.asarray(candidates, dtype=np.float64)
    if q.ndim != 2 or c.ndim != 2 or q.shape[1] != c.shape[1]:
        raise ValueError(f"queries [N, d] and candidates [M, d] differ: {list(q.shape)} and {list(c.shape)}")
    if not len(q) == len(truth) == len(sets):
        raise ValueError(f"got {len(q)} queries, {len(truth)} true candidates and {len(sets)} sets; need one each")
    for name, array in (("queries", q), ("candidates", c)):
        bad = np.flatnonzero(~np.isfinite(array).all(1))
        if bad.size:
            raise ValueError(f"{name} hold values that are not finite in {bad.size} row(s), the first is row {bad[0]}")
    q = q / np.linalg.norm(q, axis=1, keepdims=True).clip(1e-12)
    c = c / np.linalg.norm(c, axis=1, keepdims=True).clip(1e-12)
    hits = np.zeros(len(q), dtype=bool)
    for i, (true, among) in enumerate(zip(truth, sets, strict=True)):
        others = [j for j in among if j != true]
        if len(others) == len(among):
            raise ValueError(f"the set of query {i} does not contain its true candidate {true}")
        own = float(q[i] @ c[true])
        hits[i] = not others or own > float((c[others] @ q[i]).max()) + _TIE
    return hits


def retrieval_at_1(image_embeds: Any, text_embeds: Any, group_size: int = 64) -> float:
    """Return the share of pictures nearest to their own caption within groups of `group_size` neighbours (R@1).

    The last group reaches back into the one before it, so that chance is one in `group_size` for every picture.

    Equal captions in one group make the task impossible; the caller passes distinct ones or accepts the ceiling.

    Args:
        image_embeds, text_embeds: [N, d], row i of one belongs to row i of the other.
    """
    count = len(np.asarray(image_embeds))
    sets = []
    for i in range(count):
        start = max(0, min(i // group_size * group_size, count - group_size))
        sets.append(range(start, min(start + group_size, count)))
    return float(retrieval_hits(image_embeds, text_embeds, range(count), sets).mean())
