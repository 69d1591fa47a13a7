"""Simulate how often the intervals of `mmdit_eval` cover what they are for: 95 % is promised.

Every case draws its sets anew many times from distributions whose distance is known, or whose expected estimate is the
mean of all repetitions, and counts. "at this N" is the expected distance of that many samples; "true" the distance of
the two distributions themselves.

    OMP_NUM_THREADS=1 python benchmarks/intervals.py --repetitions 2000 --out results/calibration/intervals.json
    python benchmarks/intervals.py --table                                 # writes the table of docs/metrics.md anew
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from mmdit_eval.frechet import frechet_from_statistics
from mmdit_eval.readme import rewrite
from mmdit_eval.retrieval import retrieval_ranks
from mmdit_eval.set_intervals import (
    cmmd_interval,
    frechet_infinity_interval,
    frechet_interval,
    influence_interval,
    kernel_influence,
    kernel_interval,
    paired_frechet_difference,
    paired_kernel_difference,
)
from mmdit_eval.statistics import Estimate, mean_interval, seed_interval, wilson_interval

from mmdit.train.tracking import describe_environment

ROOT = Path(__file__).resolve().parents[1]
PAGE, STORED = ROOT / "docs" / "metrics.md", ROOT / "results" / "calibration" / "intervals.json"


class Sets(NamedTuple):
    """One draw: two runs on the same prompts [n, d], a reference [m, d], the prompts' true pictures [n, d]."""

    a1: np.ndarray
    a2: np.ndarray
    b: np.ndarray
    true: np.ndarray


class World(NamedTuple):
    """Distributions to draw from.

    Attributes:
        heavy: skewed features (a rectified, squared share, as after a ReLU) instead of Gaussian ones.
        equal: runs and reference are one distribution.
    """

    n: int
    m: int
    d: int
    equal: bool = False
    heavy: bool = False

    def draw(self, seed: int) -> Sets:
        random = np.random.default_rng(seed)
        shared = random.normal(size=(self.n, self.d))  # what the prompts say
        drawn = [self.bend(0.8 * shared + 0.6 * random.normal(size=shared.shape)) for _ in range(3)]
        runs = [x @ mix.T + mean for x, mix, mean in zip(drawn, self.mixes(), self.means(), strict=False)]
        reference = self.bend(random.normal(size=(self.m, self.d)))
        return Sets(*runs, reference * self.scales(), drawn[2] * self.scales())

    def bend(self, x: np.ndarray) -> np.ndarray:
        return np.maximum(x, 0.0) + 0.2 * x**2 if self.heavy else x

    def scales(self) -> np.ndarray:
        return np.arange(1, self.d + 1) ** -0.5

    def mixes(self) -> list[np.ndarray]:
        turns = [np.random.default_rng(3 + i).normal(size=(self.d, self.d)) * 0.3 / np.sqrt(self.d) for i in range(2)]
        return [np.diag(self.scales()) if self.equal else (np.eye(self.d) + turn) * self.scales() for turn in turns]

    def means(self) -> list[float]:
        return [0.0, 0.0] if self.equal else [0.9 / self.d**0.5, 0.6 / self.d**0.5]

    def true_frechet(self, run: int = 0) -> float:
        """In closed form for Gaussians; otherwise from the moments of the bent normal, found once by many draws."""
        zero, unit = np.zeros(self.d), np.eye(self.d)
        if self.heavy:
            many = self.bend(np.random.default_rng(0).normal(size=10**7))
            zero, unit = np.full(self.d, many.mean()), np.eye(self.d) * many.var()
        mix, scales = self.mixes()[run], np.diag(self.scales())
        return frechet_from_statistics(
            mix @ zero + self.means()[run], mix @ unit @ mix.T, scales @ zero, scales @ unit @ scales
        )


class Case(NamedTuple):
    """An interval, where it is drawn, and what it is for: a number, or None for the mean of all estimates."""

    name: str
    world: World
    interval: Callable[[Sets], Estimate]
    target: float | None = None
    conservative: bool = False  # known to cover too often, which its docstring says


def cases() -> list[Case]:
    """Every interval, far from equality and at it, above and below one sample a feature."""
    small, uneven, wide = World(400, 400, 8), World(300, 500, 8), World(1000, 1000, 32)
    few, heavy = World(100, 100, 128), World(800, 800, 8, heavy=True)
    equal, equal_wide = World(400, 400, 8, equal=True), World(1000, 1000, 32, equal=True)
    found = []
    for name, world in (("d 8", small), ("N 300 and 500", uneven), ("d 32", wide), ("N < d", few), ("skewed", heavy)):
        below = name == "N < d"
        found.append(
            Case(f"frechet at this N, drawn; {name}", world, lambda s: frechet_interval(s.a1, s.b), None, below)
        )
    found += [
        Case("frechet at this N, paired; d 8", small, lambda s: frechet_interval(s.a1, s.true, reference="paired")),
        Case(
            "frechet at this N, paired; N < d",
            few,
            lambda s: frechet_interval(s.a1, s.true, reference="paired"),
            None,
            True,
        ),
        Case("frechet at this N, drawn; equal", equal, lambda s: frechet_interval(s.a1, s.b), None, True),
        Case("frechet difference, drawn; d 8", small, lambda s: paired_frechet_difference(s.a1, s.a2, s.b)),
        Case(
            "frechet difference, paired; d 32",
            wide,
            lambda s: paired_frechet_difference(s.a1, s.a2, s.true, reference="paired"),
        ),
    ]
    for name, world in (
        ("d 8", small),
        ("d 32", wide),
        ("skewed", heavy),
        ("equal", equal),
        ("equal, d 32", equal_wide),
    ):
        target = world.true_frechet()
        found.append(Case(f"frechet, true; {name}", world, lambda s: frechet_infinity_interval(s.a1, s.b), target))
    found.append(
        Case(
            "frechet, true, paired; d 8",
            small,
            lambda s: frechet_infinity_interval(s.a1, s.true, reference="paired"),
            small.true_frechet(),
        )
    )
    for name, world in (("d 8", small), ("N 300 and 500", uneven), ("skewed", heavy)):
        found.append(Case(f"kernel, drawn; {name}", world, lambda s: kernel_interval(s.a1, s.b)))
    found += [
        Case("kernel, drawn; equal", equal, lambda s: kernel_interval(s.a1, s.b), 0.0, True),
        Case("kernel, paired; d 8", small, lambda s: kernel_interval(s.a1, s.true, reference="paired")),
        Case("kernel difference, drawn; d 8", small, lambda s: paired_kernel_difference(s.a1, s.a2, s.b)),
        Case(
            "kernel difference, paired; d 8",
            small,
            lambda s: paired_kernel_difference(s.a1, s.a2, s.true, reference="paired"),
        ),
        Case("kernel difference of stored results, paired; d 8", small, stored_kernel_difference),
        Case("kernel difference of stored results, paired; equal", equal, stored_kernel_difference, None, True),
        Case("R@1 at this N; N 200, d 32", World(200, 200, 32), lambda s: retrieved(s, 1)),
        Case("R@1 at this N; N 500, d 16", World(500, 500, 16), lambda s: retrieved(s, 1)),
        Case("R@5 at this N; N 500, d 16", World(500, 500, 16), lambda s: retrieved(s, 5)),
        Case("cmmd, drawn; d 8", small, lambda s: cmmd_interval(s.a1, s.b)),
        Case("mean of 200, bootstrap", World(200, 200, 1), lambda s: mean_interval(s.b[:, 0], draws=400), 0.0),
        Case("mean over 3 seeds, t", World(8, 8, 1), lambda s: seed_interval(s.b[:3, 0]), 0.0),
    ]
    return found


def stored_kernel_difference(sets: Sets) -> Estimate:
    """As `compare` makes it, of two results that keep influences and no features."""
    (one, of_one), (two, of_two) = (kernel_influence(run, sets.true, reference="paired") for run in (sets.a1, sets.a2))
    return influence_interval(one["value"] - two["value"], of_one - of_two, None, "fixed")


def retrieved(sets: Sets, first: int) -> Estimate:
    """Share of pictures whose own caption is among the `first` nearest of all captions."""
    own = np.arange(len(sets.a1))
    return wilson_interval(retrieval_ranks(sets.a1, sets.true, own, own) < first)


def coverage(case: Case, repetitions: int, start: int = 0) -> dict[str, Any]:
    """Return the share of intervals that hold their target, and its own error."""
    estimates = [case.interval(case.world.draw(start + i)) for i in range(repetitions)]
    values, low, high = (np.array([e[key] for e in estimates], dtype=float) for key in ("value", "low", "high"))
    target = float(values.mean()) if case.target is None else case.target
    share = float(((low <= target) & (target <= high)).mean())
    return {
        "case": case.name,
        **case.world._asdict(),
        "target": target,
        "mean_estimate": float(values.mean()),
        "deviation": float(values.std(ddof=1)),
        "mean_half_width": float((high - low).mean() / 2),
        "coverage": round(share, 4),
        "error_of_coverage": round(float(np.sqrt(share * (1 - share) / repetitions)), 4),
        "repetitions": repetitions,
        "conservative": case.conservative,
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the table of docs/metrics.md."""
    lines = ["| interval; features | covers |", "|---|---:|"]
    for case in result["cases"]:
        wide = " (wide)" if case["coverage"] > 0.97 else ""
        lines.append(f"| {case['case']} | {100 * case['coverage']:.1f} %{wide} |")
    return "\n".join(lines)


def main(repetitions: int = 2_000, only: str = "", out: Path | None = None, table: bool = False) -> None:
    """Simulate every case.

    Args:
        repetitions: draws of each case; 2,000 tell a coverage to half a point.
        only: part of the names of the cases to run; with `out`, the others' shares stay as they are.
        out: JSON file for the shares.
        table: write the table of docs/metrics.md from results/calibration/intervals.json, and simulate nothing.
    """
    if table:
        text = rewrite(PAGE.read_text("utf-8"), markdown(json.loads(STORED.read_text("utf-8"))), "coverage")
        PAGE.write_text(text, encoding="utf-8")
        return
    started, found = time.perf_counter(), []
    for case in cases():
        if only in case.name:
            found.append(coverage(case, repetitions))
            print(f"{case.name:40s} {100 * found[-1]['coverage']:5.1f} %", flush=True)
    if out is not None:
        command = f"OMP_NUM_THREADS=1 python benchmarks/intervals.py --repetitions {repetitions} --out {out}"
        command += f" --only {only!r}" if only else ""
        environment = describe_environment()
        shares = {case["case"]: {**case, "commit": environment["commit"]} for case in found}
        if out.is_file():
            shares = {case["case"]: case for case in json.loads(out.read_text("utf-8"))["cases"]} | shares
        result = {
            "command": command,
            "nominal": 0.95,
            "seconds": round(time.perf_counter() - started),
            "environment": environment,
            "cases": [shares[case.name] for case in cases() if case.name in shares],
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
