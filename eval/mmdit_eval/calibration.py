"""Are the verdicts as honest as they say? Simulated studies of known truth, judged by the report's own code.

A cell's score is the mean of 0/1 pictures: the row's quality, moved by its training seed and by each prompt's
difficulty, on the scale of log-odds. A/A studies have rows of equal quality, so every verdict in them is false.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.stats

from mmdit_eval.mixed import mixed_difference
from mmdit_eval.power import power
from mmdit_eval.statistics import paired_interval
from mmdit_eval.verdicts import LEVEL, PAIRED, WELCH, decide, difference

QUALITY, SEED_SPREAD, PROMPT_SPREAD = 1.0, 0.35, 1.0  # log-odds: some 70 % right, seeds 6 points apart
OWN_SPREAD = 0.1  # where rows share their trainings: what a seed's networks gain or lose under one row's sampling alone


def simulate(
    random: np.random.Generator,
    rows: int,
    seeds: int,
    pictures: int,
    planted: float = 0.0,
    pairs: bool = False,
    ratio: float = 1.0,
) -> list[np.ndarray]:
    """Draw one study: of each row 0/1 scores [seeds, pictures]; the last row is better by `planted` (log-odds).

    With `pairs` a seed moves all rows alike, as where they share its networks, and each a little by itself. The first
    row, to which the others are compared, spreads over seeds `ratio` times less than they do.
    """
    prompts = PROMPT_SPREAD * random.normal(size=pictures)
    if pairs:
        prompts = prompts + SEED_SPREAD * random.normal(size=(seeds, 1))  # [S, P]
    spread = OWN_SPREAD if pairs else SEED_SPREAD
    tables = []
    for row in range(rows):
        quality = QUALITY + (planted if row == rows - 1 else 0.0)
        own = spread / ratio if row == 0 else spread
        odds = quality + own * random.normal(size=(seeds, 1)) + prompts
        tables.append((random.random((seeds, pictures)) < 1 / (1 + np.exp(-odds))).astype(np.float64))
    return tables


def judge_simulated(tables: list[np.ndarray], pairs: bool = False) -> list[str]:
    """Return the verdicts on every row against the first, as the report would give them."""
    claims = []
    values = [dict(enumerate(table.mean(1).tolist())) for table in tables]
    for row in range(1, len(tables)):
        names = {"first": f"row{row}", "second": "row0", "split": "seen", "score": "relation"}
        claims.append({**difference(values[row], values[0], pairs=pairs), **names})
    return [claim["verdict"] for claim in decide(claims)]


def false_verdicts(
    studies: int, rows: int, seeds: int, pictures: int, seed: int = 0, pairs: bool = False, ratio: float = 1.0
) -> dict[str, Any]:
    """Judge A/A studies: the share with at least one verdict, which Holm's correction holds to 5 %.

    With unequal spreads (`ratio`) equal log-odds are shares of right pictures that differ a little: 0.2 points at 4.
    """
    unequal = {} if ratio == 1 else {"spread_ratio": ratio}
    random = np.random.default_rng([seed, rows, seeds, pictures, *([4] if pairs else []), *map(int, unequal.values())])
    wrong = 0
    for _ in range(studies):
        tables = simulate(random, rows, seeds, pictures, pairs=pairs, ratio=ratio)
        wrong += any(verdict in ("first", "second") for verdict in judge_simulated(tables, pairs))
    form = {**_form(pairs), **unequal}
    return {"rows": rows, "seeds": seeds, "pictures": pictures, **form, **share(wrong, studies)}


def other_intervals(studies: int, seeds: int, pictures: int, seed: int = 0, pairs: bool = False) -> dict[str, Any]:
    """Judge A/A pairs of rows by the mixed model, and by the bootstrap over pictures that never carries a verdict."""
    random = np.random.default_rng([seed, 1, seeds, pictures, *([4] if pairs else [])])
    mixed = bootstrap = 0
    for _ in range(studies):
        a, b = simulate(random, 2, seeds, pictures, pairs=pairs)
        with contextlib.suppress(ValueError):  # few seeds of 0/1 pictures may all differ alike: nothing is said
            mixed += mixed_difference(a, b, pairs=pairs)["p"] <= 1 - LEVEL
        found = paired_interval(a.mean(0), b.mean(0))
        bootstrap += found["low"] > 0 or found["high"] < 0  # type: ignore[operator]
    return {
        "seeds": seeds, "pictures": pictures, **_form(pairs), "mixed_model": share(mixed, studies),
        "bootstrap_over_pictures": share(bootstrap, studies),
    }  # fmt: skip


def planted_effects(
    studies: int, seeds: int, pictures: int, planted: float, seed: int = 0, rows: int = 2, pairs: bool = False
) -> dict[str, Any]:
    """Plant a difference in the last row and count how often it is found, beside what `power` promises.

    The promise is made from the true spreads, which are measured on 20,000 simulated seeds. With more than two rows it
    is that of Holm's strictest step, a lower bound.
    """
    random = np.random.default_rng([seed, 2, seeds, pictures, rows, *([4] if pairs else [])])
    truth = simulate(np.random.default_rng([seed, 3]), 2, 20_000, pictures, planted, pairs)
    plain, better = (table.mean(1) for table in truth)
    found = 0
    for _ in range(studies):
        found += judge_simulated(simulate(random, rows, seeds, pictures, planted, pairs), pairs)[-1] == "first"
    size = float(better.mean() - plain.mean())
    spread: tuple[float, ...] = float(better.std(ddof=1)), float(plain.std(ddof=1))
    if pairs:
        spread = (float((better - plain).std(ddof=1)),)
    promised = power(size, spread, (seeds, seeds), (1 - LEVEL) / (rows - 1))
    return {
        "rows": rows, "seeds": seeds, "pictures": pictures, **_form(pairs), "difference": round(size, 4),
        "promised": round(promised, 4), **share(found, studies),
    }  # fmt: skip


def _form(pairs: bool) -> dict[str, str]:
    """Name the test where it is not Welch's."""
    return {"method": PAIRED} if pairs else {}


def share(hits: int, count: int) -> dict[str, Any]:
    """Return a share with the exact binomial interval. Source: Clopper and Pearson 1934."""
    interval = scipy.stats.binomtest(int(hits), count).proportion_ci(LEVEL, method="exact")
    return {
        "share": hits / count, "low": round(float(interval.low), 4), "high": round(float(interval.high), 4),
        "studies": count,
    }  # fmt: skip


def calibrate(studies: int = 1_000, seed: int = 0) -> dict[str, Any]:
    """Simulate every case of results/calibration/verdicts.json."""
    return {
        "studies": studies,
        "false_verdicts": [
            false_verdicts(studies, rows, seeds, 256, seed)
            for rows, seeds in ((2, 2), (2, 3), (2, 5), (4, 3), (4, 5), (8, 3), (8, 5))
        ]
        + [
            false_verdicts(studies, rows, seeds, 256, seed, ratio=ratio)
            for rows, seeds, ratio in ((2, 3, 4.0), (2, 5, 4.0), (8, 5, 4.0), (2, 3, 6.0), (5, 3, 6.0), (5, 5, 6.0))
        ]
        + [false_verdicts(studies, rows, seeds, 256, seed, pairs=True) for rows, seeds in ((2, 3), (2, 5), (5, 5))],
        "other_intervals": [
            other_intervals(studies, seeds, 256, seed, pairs) for pairs in (False, True) for seeds in (3, 5)
        ],
        "planted_effects": [
            planted_effects(studies, seeds, 256, planted, seed, rows)
            for rows, seeds, planted in ((2, 3, 1.2), (2, 5, 0.8), (2, 10, 0.5), (4, 5, 1.2))
        ]
        + [
            planted_effects(studies, seeds, 256, planted, seed, rows, pairs=True)
            for rows, seeds, planted in ((2, 3, 0.6), (2, 5, 0.4), (5, 5, 0.6))
        ],
    }


def markdown(found: Mapping[str, Any]) -> str:
    """Return what `calibrate` found as the tables of docs/studies.md."""
    lines = ["| no difference, 256 pictures a split | rows | seeds | studies with a verdict |", "|---|---:|---:|---:|"]
    for case in found["false_verdicts"]:
        lines.append(f"| {_test(case)} | {case['rows']} | {case['seeds']} | {_percent(case)} |")
    lines += ["", "| a planted difference | rows | seeds | points | promised by `power` | found |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    for case in found["planted_effects"]:
        points, promised = f"{100 * case['difference']:.1f}", f"{100 * case['promised']:.1f} %"
        lines.append(f"| {_test(case)} | {case['rows']} | {case['seeds']} | {points} | {promised} | {_percent(case)} |")
    lines += ["", "| no difference, two rows | seeds | mixed model, new prompts | bootstrap over pictures |"]
    lines += ["|---|---:|---:|---:|"]
    for case in found["other_intervals"]:
        kinds = " | ".join(_percent(case[kind]) for kind in ("mixed_model", "bootstrap_over_pictures"))
        lines.append(f"| {'shared seeds' if 'method' in case else 'seeds of their own'} | {case['seeds']} | {kinds} |")
    return "\n".join(lines)


def _test(case: Mapping[str, Any]) -> str:
    unequal = f", spreads 1 to {case['spread_ratio']:g}" if "spread_ratio" in case else ""
    return case.get("method", WELCH) + unequal


def _percent(case: Mapping[str, Any]) -> str:
    return f"{100 * case['share']:.1f} % [{100 * case['low']:.1f} – {100 * case['high']:.1f}]"
