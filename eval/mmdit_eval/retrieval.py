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


_ROUNDING = 1e-6  # of cosines of float32 embeddings of one network: captions cut to the same words tie
BLOCK = 1024  # queries at once: [BLOCK, M] numbers are in memory


def retrieval_ranks(queries: Any, candidates: Any, names: Any, candidate_names: Any) -> np.ndarray:
    """Count for each query the wrong candidates that are as near by cosine as its nearest right one, or nearer.

    A query is among the first K (R@K) where its rank is below K. Ties count against it.

    Args:
        queries: [N, d].
        candidates: [M, d].
        names, candidate_names: int [N] and [M]; candidates of a query's name are right.

    Returns:
        int64 [N]; 0 is best.

    Raises:
        ValueError: shapes that do not fit, embeddings that are not finite or have no direction, or a query without a
            right candidate.
    """
    q, c = np.asarray(queries, dtype=np.float64), np.asarray(candidates, dtype=np.float64)
    of, have = np.asarray(names), np.asarray(candidate_names)
    if q.ndim != 2 or c.ndim != 2 or q.shape[1] != c.shape[1]:
        raise ValueError(f"queries [N, d] and candidates [M, d] differ: {list(q.shape)} and {list(c.shape)}")
    if of.shape != q.shape[:1] or have.shape != c.shape[:1]:
        raise ValueError(f"got {len(of)} names for {len(q)} queries and {len(have)} for {len(c)} candidates")
    lengths = [np.linalg.norm(rows, axis=1, keepdims=True) for rows in (q, c)]
    for kind, length in zip(("queries", "candidates"), lengths, strict=True):
        if not (np.isfinite(length).all() and (length > 0).all()):
            raise ValueError(f"{kind} hold an embedding that is not finite or has length zero")
    if missing := sorted(set(of.tolist()) - set(have.tolist())):
        raise ValueError(f"{len(missing)} queries have no right candidate, the first is named {missing[0]}")
    q, c = q / lengths[0], c / lengths[1]
    ranks = np.zeros(len(q), dtype=np.int64)
    for start in range(0, len(q), BLOCK):
        rows = slice(start, start + BLOCK)
        near = q[rows] @ c.T  # [b, M]
        right = of[rows, None] == have
        best = np.where(right, near, -np.inf).max(axis=1, keepdims=True)
        ranks[rows] = (~right & (near >= best - _ROUNDING)).sum(axis=1)
    return ranks


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
