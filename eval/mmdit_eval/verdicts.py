"""Which row is better: tests whose unit is the training seed. No torch.

A row's value under one seed is one number. The difference of two rows is a t interval on those numbers: Welch's, or the
paired one where the design says that rows share seeds. Every claim of a study goes through Holm's correction together.
What pictures of one trained model say (bootstrap, `statistics.paired_interval`) never carries a verdict: in simulated
studies without any difference it "found" one in 43 %.

How often these verdicts are wrong is simulated by scripts/calibrate_verdicts.py; the numbers are in
results/calibration/verdicts.json.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import scipy.stats

from mmdit import rng
from mmdit_eval.power import detectable
from mmdit_eval.scores import SCORES, Score

LEVEL = 0.95  # of every interval; a verdict needs a corrected p of at most 1 - LEVEL
WELCH, PAIRED = "Welch t over seeds", "paired t over seeds"  # `method` of a test
PAIRED_SEEDS = 3  # below this many shared seeds the paired form has too few degrees of freedom to pay
PERMUTATION_SEEDS = 5  # below this many seeds a row there are too few arrangements to reach any level of interest
_MOST_ARRANGEMENTS = 20_000  # counted one by one up to here, drawn at random beyond
_DRAWS = 9_999
_ROUND_OFF = 1e-12  # of the numbers themselves


class Difference(TypedDict):
    """first - second in one score; plain JSON types.

    Attributes:
        low, high: interval at LEVEL, not corrected for the number of claims; None with fewer than two seeds.
        p: of the two-sided t test; p_holm: after Holm's correction over all claims of the study.
        seeds: training seeds of each row that the value stands on.
        effect: Hedges's g: the difference in standard deviations of a row's seeds.
        permutation: p of the exact test; None below PERMUTATION_SEEDS seeds a row.
        detectable: the true difference that these seeds would have shown 4 times in 5.
        verdict: "first" | "second" (that row is better), "none" (no difference shown), "one seed", "no spread".
    """

    first: str
    second: str
    split: str
    score: str
    value: float
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    df: float | None
    method: str
    seeds: tuple[int, int]
    effect: float | None
    permutation: float | None
    detectable: float | None
    verdict: str


class TTest(TypedDict):
    """A t test of one difference: its value, standard error, degrees of freedom, interval and two-sided p."""

    value: float
    error: float
    df: float
    low: float
    high: float
    p: float


def t_test(value: float, error: float, df: float, level: float = LEVEL) -> TTest:
    """Return interval and p of a difference whose standard error has `df` degrees of freedom.

    Raises:
        ValueError: the standard error is not above 0: nothing to judge by.
    """
    if not error > 0:
        raise ValueError(f"a t test needs a spread above 0, got a standard error of {error}")
    half = float(scipy.stats.t.ppf((1 + level) / 2, df)) * error
    p = float(2 * scipy.stats.t.sf(abs(value) / error, df))
    return TTest(value=value, error=error, df=df, low=value - half, high=value + half, p=p)


def welch(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> TTest:
    """Compare two means over independent seeds without assuming equal spread.

    Source: Welch 1947, Biometrika 34; degrees of freedom by Satterthwaite 1946.

    Args:
        first, second: one number a training seed, at least two each.

    Raises:
        ValueError: fewer than two numbers, one not finite, or no spread in either row.
    """
    a, b = _numbers(first), _numbers(second)
    parts = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    variance = sum(parts)
    if is_round_off(math.sqrt(variance), a, b):
        raise ValueError("no spread over seeds in either row")
    df = variance**2 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1))
    return t_test(float(a.mean() - b.mean()), math.sqrt(variance), float(df), level)


def paired(first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> TTest:
    """Compare two rows seed by seed: Student's t on the differences.

    Raises:
        ValueError: unequal lengths, fewer than two pairs, or differences without spread.
    """
    if len(first) != len(second):
        raise ValueError(f"pairs need equal lengths, got {len(first)} and {len(second)}")
    differences = _numbers(np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64))
    spread = float(differences.std(ddof=1))
    if is_round_off(spread, first, second):
        raise ValueError("the seeds' differences have no spread")
    return t_test(float(differences.mean()), spread / math.sqrt(len(differences)), len(differences) - 1, level)


def permutation(first: Sequence[float], second: Sequence[float], pairs: bool = False) -> float | None:
    """Return the two-sided p of the permutation test on the difference of means, or None below PERMUTATION_SEEDS.

    Rows of equal quality could have changed their labels: of every arrangement (of signs, where `pairs`), the share
    whose difference is at least as large. Exact up to 20,000 arrangements. Source: Fisher 1935; the correction of the
    drawn form is Phipson and Smyth 2010, arXiv:1603.05766.
    """
    a, b = _numbers(first), _numbers(second)
    if min(len(a), len(b)) < PERMUTATION_SEEDS:
        return None
    random = rng.generator(0, "metric", len(a) + len(b))
    if pairs:
        differences = a - b
        exact = 2 ** len(differences) <= _MOST_ARRANGEMENTS
        signs = (
            np.array(list(itertools.product((1.0, -1.0), repeat=len(differences))))
            if exact
            else random.choice([1.0, -1.0], size=(_DRAWS, len(differences)))
        )
        found, seen = signs @ differences / len(differences), float(differences.mean())
    else:
        both, count = np.concatenate([a, b]), len(a)
        exact = math.comb(len(both), count) <= _MOST_ARRANGEMENTS
        chosen = (
            np.array(list(itertools.combinations(range(len(both)), count)))
            if exact
            else np.stack([random.permutation(len(both))[:count] for _ in range(_DRAWS)])
        )
        means = both[chosen].mean(1)
        found, seen = means - (both.sum() - count * means) / len(b), float(a.mean() - b.mean())
    extreme = int((np.abs(found) >= abs(seen) * (1 - 1e-9) - 1e-15).sum())
    return extreme / len(found) if exact else (extreme + 1) / (len(found) + 1)


def holm(values: Sequence[float], family: int | None = None) -> list[float]:
    """Return p values corrected so that a whole family is wrong with at most its level. Source: Holm 1979.

    Args:
        family: how many claims were stated, where some of them have no p value yet; those count as the largest.
    """
    count = max(family or 0, len(values))
    order = np.argsort(values, kind="stable")
    corrected = [0.0] * len(values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (count - rank) * float(values[index])))
        corrected[int(index)] = largest
    return corrected


def hedges_g(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the difference in units of one row's spread over seeds, corrected for few seeds; None without spread.

    In the paired form too the unit is a row's own spread, so that effects of both forms compare.
    Source: Hedges 1981, J. Educ. Stat. 6: d times the exact correction J.
    """
    a, b = _numbers(first), _numbers(second)
    df = len(a) + len(b) - 2
    pooled = math.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / df)
    if is_round_off(pooled, a, b):
        return None
    correction = math.exp(math.lgamma(df / 2) - math.lgamma((df - 1) / 2)) / math.sqrt(df / 2)
    return float(correction * (a.mean() - b.mean()) / pooled)


def difference(
    first: Mapping[int, float], second: Mapping[int, float], *, pairs: bool = False, level: float = LEVEL
) -> dict[str, Any]:
    """Compare two rows: everything of a `Difference` but the names and what depends on the other claims.

    Args:
        first, second: {training seed: value}.
        pairs: the design says that equal seeds belong together; followed from PAIRED_SEEDS shared seeds on.
    """
    shared = sorted(set(first) & set(second))
    pairs = pairs and len(shared) >= PAIRED_SEEDS
    a = [first[seed] for seed in (shared if pairs else sorted(first))]
    b = [second[seed] for seed in (shared if pairs else sorted(second))]
    found: dict[str, Any] = {
        "value": float(np.mean(a) - np.mean(b)), "low": None, "high": None, "p": None, "df": None, "error": None,
        "method": PAIRED if pairs else WELCH, "seeds": (len(a), len(b)),
        "effect": None, "permutation": None, "spread": None,
    }  # fmt: skip
    if min(len(a), len(b)) < 2:
        return {**found, "method": "between samples only", "verdict": "one seed"}
    try:
        test = paired(a, b, level) if pairs else welch(a, b, level)
    except ValueError:
        return {**found, "verdict": "no spread"}
    spread = (float(np.std(np.subtract(a, b), ddof=1)),) if pairs else (_spread(a), _spread(b))
    return {
        **found, **test, "effect": hedges_g(a, b), "permutation": permutation(a, b, pairs), "spread": spread,
        "verdict": "none",
    }  # fmt: skip


def decide(claims: Sequence[Mapping[str, Any]], level: float = LEVEL, *, stated: int | None = None) -> list[Difference]:
    """Correct all claims of a study together and say which rows are better.

    Args:
        claims: results of `difference`, each with "first", "second", "split" and "score".
        stated: how many the study states, which missing cells do not make fewer; None: as many as `claims`.
    """
    tested = [i for i, claim in enumerate(claims) if claim["p"] is not None]
    family = max(stated or 0, len(claims))
    corrected = dict(zip(tested, holm([claims[i]["p"] for i in tested], family), strict=True))
    decided = []
    for i, claim in enumerate(claims):
        verdict, could = claim["verdict"], None
        if i in corrected:
            better = SCORES.get(claim["score"], Score("", +1)).better
            if corrected[i] <= 1 - level:
                verdict = "first" if claim["value"] * better > 0 else "second"
            could = detectable(claim["spread"], claim["seeds"], alpha=(1 - level) / family)
        kept = {key: value for key, value in claim.items() if key not in ("spread", "error")}
        decided.append(Difference(**{**kept, "p_holm": corrected.get(i), "detectable": could, "verdict": verdict}))  # type: ignore[typeddict-item]
    return decided


# --- in words ---------------------------------------------------------------------------------------------------


def sentence(found: Difference, where: str) -> str:
    """Say in one sentence what a claim came to.

    Args:
        where: how the split is called, such as "held-out combinations".
    """
    style = SCORES.get(found["score"], Score(found["score"], +1))
    seeds = _seeds(found["seeds"])
    size = f"{style.factor * abs(found['value']):.{style.digits}f}"
    unit = f"points of {_noun(style)}" if style.unit == "%" else f"in {style.label}"
    names = f"{found['first']} and {found['second']}"
    if found["verdict"] == "one seed":
        signed = _signed(found["value"], style)
        return f"{found['first']} minus {found['second']}, {where}: {signed} {unit}, {seeds}: between samples only."
    if found["verdict"] == "no spread":
        if found["value"] == 0:
            return f"{names}, {where}: equal in {_noun(style)} under every seed ({seeds}); the score cannot tell them."
        return f"{names}, {where}: {size} {unit} apart, but no seed differs from another ({seeds}): no test."
    assert found["low"] is not None
    assert found["high"] is not None
    assert found["p_holm"] is not None
    if found["verdict"] in ("first", "second"):
        won, lost = (found["first"], found["second"]) if found["verdict"] == "first" else (
            found["second"], found["first"])  # fmt: skip
        ends = [style.factor * end * math.copysign(1.0, found["value"]) for end in (found["low"], found["high"])]
        low, high = (_number(end, style) for end in sorted(ends))
        return (
            f"{won} beats {lost} by {size} {unit}, {where} "
            f"(95 % interval {low} to {high}, {seeds}, {_p(found['p_holm'])} after Holm)."
        )
    interval = f"{_signed(found['low'], style)} to {_signed(found['high'], style)}"
    alone = found["p"] is not None and found["p"] <= 1 - LEVEL
    correction = ", too little after Holm's correction for the number of comparisons" if alone else ""
    could = ""
    if found["detectable"] is not None:
        could = f"; this study could have shown {style.factor * found['detectable']:.{style.digits}f}"
    return (
        f"No difference shown between {names} in {_noun(style)}, {where} "
        f"({found['first']} minus {found['second']} {_signed(found['value'], style)}, 95 % interval {interval}, "
        f"{seeds}{correction}){could}."
    )


def _noun(style: Score) -> str:
    plain = f"{style.label} accuracy" if style.unit == "%" and style.better > 0 else style.label
    return style.noun or plain


def _seeds(counts: Sequence[int]) -> str:
    if counts[0] == counts[1]:
        return f"{counts[0]} seed{'s' if counts[0] != 1 else ''}"
    return f"{counts[0]} and {counts[1]} seeds"


def _number(value: float, style: Score) -> str:
    return f"{value:.{style.digits}f}".replace("-", "−")


def _signed(value: float, style: Score) -> str:
    return f"{style.factor * value:+.{style.digits}f}".replace("-", "−")


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def is_round_off(spread: float, *values: Any) -> bool:
    """Say whether a deviation is no more than what float64 leaves among equal numbers of this size.

    0.1 under three seeds has a deviation of 1e-17, which passed for a spread would make any difference certain.
    """
    return not spread > _ROUND_OFF * max(float(np.abs(np.asarray(part)).max()) for part in values)


def _spread(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1))


def _numbers(values: Any) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"a comparison over seeds needs at least two numbers a row, got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} of {len(array)} values are not finite")
    return array
