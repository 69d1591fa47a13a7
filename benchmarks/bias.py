"""Show what the Fréchet distance of real pictures against real pictures says: c/N, where the truth is 0.

Two disjoint sets of one distribution are compared at several N: Gaussian features, and tiny CLIP's features of drawn
scenes. The dashed line is what theory gives for c, nothing in it is fitted; `frechet_infinity` should lie on zero.

    OMP_NUM_THREADS=1 python benchmarks/bias.py --out results/metrics/bias.json

The plot stands beside the JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from mmdit_eval import frechet_distance, kernel_distance
from mmdit_eval.features import extract, load_extractor
from mmdit_eval.statistics import frechet_infinity_interval

from mmdit.config import ShapesConfig
from mmdit.data import make_dataset
from mmdit.train.tracking import describe_environment

Draw = Callable[[int, int], tuple[np.ndarray, np.ndarray]]  # (N, seed) to two disjoint sets


def bias_constant(features: np.ndarray) -> float:
    """Return c: the distance between two sets of N is c/N on average, to first order.

    2 tr(cov) from the means. From the covariances, in the eigenvectors of cov with eigenvalues v, the second order of
    the distance is half the sum of d_ij² / (v_i + v_j) over their difference d, whose variance is 2/N of that of
    x_i x_j. For Gaussian features that variance is v_i v_j (1 + [i = j]).
    """
    centred = features - features.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred / len(features))
    kept = values > 1e-9 * values[-1]
    squares = (centred @ vectors[:, kept]) ** 2
    values = values[kept]
    products = squares.T @ squares / len(features) - np.diag(values**2)
    return float(2 * values.sum() + (products / (values[:, None] + values[None])).sum())


def gaussian(width: int) -> tuple[Draw, float]:
    """Gaussian features whose variances fall as 1/j^½."""
    scales = np.arange(1, width + 1) ** -0.25

    def draw(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(seed)
        return random.normal(size=(n, width)) * scales, random.normal(size=(n, width)) * scales

    values = scales**2
    pairs = values[:, None] * values[None] / (values[:, None] + values[None])
    return draw, float(2 * values.sum() + pairs.sum() + np.diag(pairs).sum())


def scenes(pool: int) -> tuple[Draw, float]:
    """Tiny CLIP's features of so many drawn scenes; sets are disjoint parts of the pool."""
    dataset, extractor = make_dataset(ShapesConfig(num_images=pool, seed=7), "train"), load_extractor("tiny_clip")
    features = np.concatenate(
        [extract(extractor, dataset.pixels(np.arange(i, min(i + 256, pool)))) for i in range(0, pool, 256)]
    )

    def draw(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng(seed).permutation(pool)
        return features[order[:n]], features[order[n : 2 * n]]

    return draw, bias_constant(features)


def measure(draw: Draw, constant: float, counts: list[int], repetitions: int) -> list[dict[str, Any]]:
    """Return mean and spread of each estimate at each N."""
    rows = []
    for n in counts:
        plain, line, kernel, covers = [], [], [], []
        for seed in range(repetitions):
            a, b = draw(n, 1_000 * n + seed)
            plain.append(frechet_distance(a, b))
            kernel.append(kernel_distance(a, b))
            if n // 4 > a.shape[1]:
                estimate = frechet_infinity_interval(a, b)
                line.append(estimate["value"])
                covers.append((estimate["low"] or 0) <= 0 <= (estimate["high"] or 0))
        row = {"n": n, "theory": constant / n, "interval_holds_zero": f"{sum(covers)} of {len(covers)}"}
        for name, values in (("frechet", plain), ("frechet_infinity", line), ("kernel", kernel)):
            if values:
                row[name] = float(np.mean(values))
                row[f"{name}_deviation"] = float(np.std(values, ddof=1))
        rows.append(row)
        print({key: value if isinstance(value, str) else round(value, 5) for key, value in row.items()}, flush=True)
    return rows


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw each kind of features: the plain distance, what theory says, and the extrapolated one."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(5.2 * len(found), 3.8), layout="constrained")
    for axis, (title, kind) in zip(np.atleast_1d(axes), found.items(), strict=True):
        rows = kind["rows"]
        for name, label, colour in (
            ("frechet", "Fréchet distance of N against N", "tab:red"),
            ("frechet_infinity", "extrapolated to infinity", "tab:blue"),
        ):
            known = [row for row in rows if name in row]
            x, y, spread = ([row[key] for row in known] for key in ("n", name, f"{name}_deviation"))
            axis.errorbar(x, y, spread, fmt="o-", color=colour, label=label, capsize=3, markersize=4)
        axis.plot(
            [row["n"] for row in rows],
            [row["theory"] for row in rows],
            "k--",
            label="theory: c/N",
            linewidth=1,
            zorder=3,
        )
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set(xscale="log", xlabel="N, samples a set", ylabel="distance (truth: 0)", title=title)
        axis.set_xticks([row["n"] for row in rows], [f"{row['n']:,}" for row in rows])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def main(
    width: int = 64,
    pool: int = 16_000,
    counts: tuple[int, ...] = (500, 1_000, 2_000, 4_000, 8_000),
    repetitions: int = 10,
    out: Path | None = None,
) -> None:
    """Measure both kinds of features.

    Args:
        width: of the Gaussian features.
        pool: scenes, at least twice the largest count.
        counts: samples a set.
        repetitions: pairs of sets at each N; those of scenes overlap between repetitions.
        out: JSON file; the plot gets its name with .png.
    """
    found: dict[str, Any] = {}
    for title, (draw, constant) in {
        f"Gaussian features, d = {width}": gaussian(width),
        "tiny CLIP features of true scenes": scenes(pool),
    }.items():
        print(title)
        found[title] = {"c": constant, "rows": measure(draw, constant, list(counts), repetitions)}
    if out is not None:
        result = {"environment": describe_environment(), "repetitions": repetitions, "pool": pool, "features": found}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        plot(found, out.with_suffix(".png"))


if __name__ == "__main__":
    tyro.cli(main)
