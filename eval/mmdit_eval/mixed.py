"""The difference of two rows for new seeds *and* new prompts: a mixed model on per-picture scores. No torch.

Welch's test on seed means speaks about the prompts of the suite. Where the question is how two rows differ on prompts
of that kind, prompts are random too:

    score = mean of the row + seed (within its row) + prompt + row x prompt + rest

Where rows share their seeds, what a seed does to both cancels, and the model is that of their differences:

    difference = its mean + seed + prompt + rest

With every prompt drawn under every seed the analysis of variance is closed: the variance of the mean is a sum of mean
squares, and its degrees of freedom follow from Satterthwaite's formula. For equal numbers of seeds this is what
restricted maximum likelihood gives, where its estimates of variance are not cut off at zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmdit_eval.verdicts import LEVEL, TTest, is_round_off, t_test


def mixed_difference(first: Any, second: Any, level: float = LEVEL, *, pairs: bool = False) -> TTest:
    """Compare two rows picture by picture, with seeds and prompts both drawn at random.

    Source: Satterthwaite 1946, Biometrics Bull. 2, for the degrees of freedom; expected mean squares of the crossed
    design, with seeds nested in rows or shared by them.

    Args:
        first: [S1, P] scores of the first row: seeds by prompts.
        second: [S2, P] of the second, the same prompts in the same order.
        pairs: the rows share their seeds, which stand in the same order.

    Raises:
        ValueError: fewer than two seeds or prompts, other prompts or, with `pairs`, seeds, or no spread at all.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] and min(len(a), len(b), a.shape[1]) >= 2
    if not fits or (pairs and len(a) != len(b)):
        raise ValueError(
            f"a mixed model needs at least two seeds of each row{', the same ones,' if pairs else ''} on the same two "
            f"or more prompts, got shapes {list(a.shape)} and {list(b.shape)}"
        )
    tables = [a - b] if pairs else [a, b]
    prompts, freedom = a.shape[1], sum(len(table) - 1 for table in tables)
    means = [table.mean(1) for table in tables]
    seeds = prompts * sum(float(((m - m.mean()) ** 2).sum()) for m in means) / freedom
    residuals = [table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean() for table in tables]
    rest = sum(float((r**2).sum()) for r in residuals) / (freedom * (prompts - 1))
    by_prompt = float((a.mean(0) - b.mean(0)).var(ddof=1))  # holds the prompt's own part and its share of the rest
    share = sum(1 / len(table) for table in tables)
    # no variance is negative: where the prompts spread less than the rest explains, nothing is taken off
    terms = [(share * seeds / prompts, freedom)]
    if by_prompt > share * rest:
        terms += [(by_prompt / prompts, prompts - 1), (-share * rest / prompts, freedom * (prompts - 1))]
    variance = sum(term for term, _ in terms)
    if variance <= 0 or is_round_off(math.sqrt(variance), a, b):
        raise ValueError("no spread over seeds or prompts in either row")
    df = variance**2 / sum(term**2 / df for term, df in terms)
    return t_test(float(a.mean() - b.mean()), math.sqrt(variance), df, level)


def common_table(rows: Sequence[Sequence[Sequence[float | None]]]) -> list[np.ndarray]:
    """Keep the prompts to which a score applies in every seed of every row.

    Args:
        rows: of each row, of each seed, one number a prompt or None where the score does not apply.

    Returns:
        One array [S, P] a row.

    Raises:
        ValueError: lists of unequal lengths, or no prompt is left.
    """
    lists = [values for row in rows for values in row]
    if len({len(values) for values in lists}) != 1:
        raise ValueError(f"per-picture scores of {sorted({len(values) for values in lists})} pictures do not line up")
    kept = [i for i in range(len(lists[0])) if all(values[i] is not None for values in lists)]
    if not kept:
        raise ValueError("no prompt has this score in every seed of every row")
    return [np.array([[values[i] for i in kept] for values in row], dtype=np.float64) for row in rows]
