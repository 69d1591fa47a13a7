"""The report's figures, drawn by matplotlib from numbers alone; one colour a row, the same in every figure."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmdit_eval.scores import SCORES, Score
from mmdit_eval.statistics import Estimate

# Okabe and Ito's palette: distinguishable with every kind of colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#4D4D4D")
CEILING = "#8A8F98"
SPLIT_STYLES = {"seen": "-", "heldout": (0, (4, 2))}
SPLIT_NAMES = {"seen": "seen combinations", "heldout": "held-out combinations"}

# a curve: (x, y) pairs; a row may have several, one a seed
Curves = Mapping[str, Sequence[Sequence[tuple[float, float]]]]


def row_colours(rows: Sequence[str]) -> dict[str, str]:
    """Give each row its colour, by its place in the study."""
    return {row: COLOURS[i % len(COLOURS)] for i, row in enumerate(rows)}


def score_figure(
    score: str,
    by_images: Mapping[str, Curves],
    by_flops: Mapping[str, Curves],
    by_seconds: Mapping[str, Curves],
    ceiling: Mapping[str, float],
    colours: Mapping[str, str],
) -> str:
    """Draw one score against images, FLOPs and training seconds, side by side: base64 PNG.

    Args:
        by_images, by_flops, by_seconds: {split: {row: curves}}.
        ceiling: {split: value}.
    """
    figure, axes = _figure(3)
    style = SCORES[score]
    panels = (
        (axes[0], by_images, "training images (thousands)", 1e-3),
        (axes[1], by_flops, "training TFLOP", 1e-12),
        (axes[2], by_seconds, "training seconds", 1.0),
    )
    for axis, data, label, unit in panels:
        for split, curves in data.items():
            for row, seeds in curves.items():
                curve = {"color": colours[row], "linestyle": SPLIT_STYLES[split], "markeredgewidth": 0}
                tables = [np.array(points) * (unit, style.factor) for points in seeds]
                if len(tables) > 1:  # seeds thin, their mean as the row's line
                    for table in tables:
                        axis.plot(*table.T, **curve, linewidth=0.8, alpha=0.35)
                if len({len(table) for table in tables}) == 1:
                    axis.plot(*np.mean(tables, axis=0).T, **curve, marker="o", markersize=4, linewidth=1.8)
            if split in ceiling:
                axis.axhline(
                    style.factor * ceiling[split], color=CEILING, linestyle=SPLIT_STYLES[split], linewidth=1.0, zorder=0
                )
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
    unit_text = f" ({style.unit})" if style.unit else ""
    axes[0].set_ylabel(f"{style.label}{unit_text}")
    _legend(figure, axes[1], colours, list(by_images), bool(ceiling))
    return _png(figure)


def attribute_figure(
    values: Mapping[str, Mapping[str, Mapping[str, Estimate]]], colours: Mapping[str, str], labels: Mapping[str, str]
) -> str:
    """Draw accuracy by attribute with intervals, one panel a split: base64 PNG.

    Args:
        values: {split: {row: {score: estimate}}}.
        labels: {score: how it is called}.
    """
    figure, axes = _figure(len(values))
    for axis, (split, rows) in zip(np.atleast_1d(axes), values.items(), strict=True):
        offsets = np.linspace(-0.36, 0.36, len(rows)) if len(rows) > 1 else np.zeros(1)
        for offset, (row, found) in zip(offsets, rows.items(), strict=True):
            for place, score in enumerate(labels):
                if score in found:
                    _point(axis, place + offset, found[score], SCORES[score].factor, colours[row])
        axis.set_xticks(range(len(labels)), labels.values())
        axis.grid(axis="x", visible=False)
        axis.set_title(SPLIT_NAMES[split], fontsize=10, color="#30343b")
    np.atleast_1d(axes)[0].set_ylabel("right (%)")
    _legend(figure, axes, colours, [], False)
    return _png(figure)


def _point(axis: Any, x: float, value: Estimate, factor: float, colour: str) -> None:
    """A value with its interval where it has one."""
    axis.plot([x], [factor * value["value"]], marker="o", markersize=5, color=colour, linestyle="none")
    if value["low"] is not None and value["high"] is not None:
        ends = factor * value["low"], factor * value["high"]
        axis.plot([x, x], ends, color=colour, linewidth=1.2, alpha=0.7)


def guidance_figure(points: Sequence[Mapping[str, Any]], scores: tuple[str, str], colours: Mapping[str, str]) -> str:
    """Draw two scores of rows that differ in guidance against each other, with intervals of both: base64 PNG.

    Args:
        points: [{"row", "label", "split", "scale", "x": estimate, "y": estimate}].
        scores: of x and of y.
    """
    splits = list(dict.fromkeys(point["split"] for point in points))
    figure, axes = _figure(len(splits))
    styles = [SCORES[score] for score in scores]
    for axis, split in zip(np.atleast_1d(axes), splits, strict=True):
        here = sorted((p for p in points if p["split"] == split), key=lambda p: p["scale"])
        line = np.array([[styles[i].factor * p[k]["value"] for i, k in enumerate("xy")] for p in here])
        if all(p["kind"] == "cfg" for p in here):
            axis.plot(*line.T, color=CEILING, linewidth=1.2, zorder=1)
        for p, (x, y) in zip(here, line, strict=True):
            for key, style, draw in (("x", styles[0], axis.hlines), ("y", styles[1], axis.vlines)):
                if p[key]["low"] is not None:
                    ends = style.factor * p[key]["low"], style.factor * p[key]["high"]
                    draw(y if key == "x" else x, *ends, color=colours[p["row"]], linewidth=1.2, alpha=0.7)
            axis.plot([x], [y], marker="o", markersize=6, color=colours[p["row"]], zorder=3)
            axis.annotate(p["label"], (x, y), textcoords="offset points", xytext=(6, 5), fontsize=8.5, color="#30343b")
        axis.set_xlabel(_axis_label(styles[0]))
        axis.set_title(SPLIT_NAMES[split], fontsize=10, color="#30343b")
    np.atleast_1d(axes)[0].set_ylabel(_axis_label(styles[1]))
    return _png(figure)


def _axis_label(style: Score) -> str:
    return style.label + (f" ({style.unit})" if style.unit else "") + (", less is better" if style.better < 0 else "")


def loss_figure(
    training: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
    by_level: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
    colours: Mapping[str, str],
    heldout_by_level: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
) -> str:
    """Draw training loss against images, and validation loss at each t: base64 PNG."""
    figure, axes = _figure(2)
    for row, runs in training.items():
        for images, loss in runs:
            axes[0].plot(1e-3 * np.asarray(images), smooth(loss), color=colours[row], linewidth=1.8)
    values = [value for runs in training.values() for _, loss in runs for value in loss]
    wide = bool(values) and max(values) > 3 * min(values) > 0
    if wide:
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter(_plain())
        axes[0].yaxis.set_minor_formatter(_plain())
    axes[0].set_xlabel("training images (thousands)")
    axes[0].set_ylabel("training loss (running mean)")
    axes[0].set_xlim(left=0)
    for split, data in (("seen", by_level), ("heldout", heldout_by_level)):
        for row, levels in data.items():
            for t, loss in levels:
                axes[1].plot(
                    t, loss, color=colours[row], linestyle=SPLIT_STYLES[split], marker="o", markersize=4,
                    linewidth=1.8, markeredgewidth=0,
                )  # fmt: skip
    axes[1].set_xlabel("t (0 data, 1 noise)")
    axes[1].set_ylabel("validation loss at t")
    axes[1].set_xlim(0, 1.03)
    _legend(figure, axes[1], colours, [s for s, d in (("seen", by_level), ("heldout", heldout_by_level)) if d], False)
    return _png(figure)


def grid_figure(grid: Mapping[str, Any]) -> str:
    """Draw a sample grid: one line of pictures a row of the study, below the prompts.

    Args:
        grid: {"heads": names of the lines, "lines": [{"prompt", "pictures": [(name, base64 PNG or None)]}]}, as
            `report.grids` gives it.

    Returns:
        base64 PNG.
    """
    from textwrap import fill

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    prompts = grid["lines"]
    shape = len(grid["heads"]), len(prompts)
    figure, axes = pyplot.subplots(
        *shape, figsize=(1.25 * shape[1] + 0.6, 1.2 * shape[0] + 0.5), squeeze=False, layout="constrained"
    )
    for column, line in enumerate(prompts):
        axes[0][column].set_title(fill(line["prompt"], 18), fontsize=7.5, color="#30343b", parse_math=False)
        for row, (_, picture) in enumerate(line["pictures"]):
            if picture is not None:
                pixels = pyplot.imread(io.BytesIO(base64.b64decode(picture)))
                axes[row][column].imshow(pixels, interpolation="nearest")
    for row, name in enumerate(grid["heads"]):
        axes[row][0].set_ylabel(name, fontsize=9, color="#30343b")
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    return _png(figure)


def sweep_figure(table: Mapping[str, Any]) -> str:
    """Draw a guidance sweep, one panel a split: distance over CLIP-score, each point with both intervals: base64 PNG.

    Scales below 1 leave the prompt out in part and lie far away; where there are two others, these decide the view, and
    what lies outside is written in the corner. Distances that span a factor of 8 stand on a logarithmic axis, for the
    best scales would fall on one spot.

    Args:
        table: as `sweep.sweep_run` writes it.
    """
    splits = list(table["splits"])
    figure, axes = _figure(len(splits))
    across, up = SCORES[table["across"]], SCORES[table["up"]]
    for axis, split in zip(np.atleast_1d(axes), splits, strict=True):
        points = [
            [point["scores"][split][name] for point in table["points"]] for name in (table["across"], table["up"])
        ]
        x, y = ([style.factor * e["value"] for e in line] for style, line in zip((across, up), points, strict=True))
        bars = [_error_bars(line, style.factor) for style, line in zip((across, up), points, strict=True)]
        axis.plot(x, y, color=COLOURS[0], linewidth=1.4, zorder=2)
        axis.errorbar(
            x, y, xerr=bars[0], yerr=bars[1], fmt="o", color=COLOURS[0], ecolor=CEILING, markersize=5, elinewidth=1,
            zorder=3,
        )  # fmt: skip
        for i, point in enumerate(table["points"]):
            axis.annotate(
                f"{point['guidance_scale']:g}", (x[i], y[i]), xytext=(7, 6), textcoords="offset points", fontsize=9,
                annotation_clip=True,
            )  # fmt: skip
        axis.set_title(f"{SPLIT_NAMES.get(split, split)}, {table['splits'][split]['num_images']:,} pictures a point",
                       fontsize=10, color="#30343b", loc="left")  # fmt: skip
        axis.set_xlabel(f"{across.label} (more is better)")
        axis.set_ylabel(f"{up.label} (less is better)")
        _view_on_guided(axis, [p["guidance_scale"] for p in table["points"]], x, y, bars)
        if min(y) > 0 and max(y) > 8 * min(y):
            lowest, highest = min(y) / 1.5, axis.get_ylim()[1] * 1.3
            axis.set_yscale("log")
            axis.set_ylim(lowest, highest)
            axis.yaxis.set_major_formatter(_plain())
            axis.yaxis.set_minor_formatter(_plain())
    return _png(figure)


def _view_on_guided(
    axis: Any, scales: Sequence[float], x: Sequence[float], y: Sequence[float], bars: Sequence[np.ndarray]
) -> None:
    """Set the limits by the points of scales from 1 upwards, and name the points that fall outside."""
    kept = [i for i, scale in enumerate(scales) if scale >= 1]
    if len(kept) < 2 or len(kept) == len(scales):
        return
    for values, spread, limits in ((x, bars[0], axis.set_xlim), (y, bars[1], axis.set_ylim)):
        low, high = min(values[i] - spread[0, i] for i in kept), max(values[i] + spread[1, i] for i in kept)
        room = (high - low) or 1.0
        limits(low - 0.08 * room, high + 0.12 * room)
    outside = [f"{scales[i]:g}: ({x[i]:.1f}, {y[i]:.1f})" for i in range(len(scales)) if i not in kept]
    axis.text(0.98, 0.97, "outside, " + ", ".join(outside), transform=axis.transAxes, ha="right", va="top", fontsize=9,
              color="#5f6368")  # fmt: skip


def _error_bars(estimates: Sequence[Mapping[str, Any]], factor: float) -> np.ndarray:
    """Distances below and above each value, [2, points]; zero where an estimate has no interval."""
    sides = [(e["value"] - e["low"], e["high"] - e["value"]) if e["low"] is not None else (0, 0) for e in estimates]
    return factor * np.array(sides).T.clip(0)


def map_figure(maps: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw attention maps, one line a row of the study, one column a word: base64 PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    words = list(dict.fromkeys(word for found in maps.values() for word in found))
    size = 1.15 * len(words) + 1.4, 1.15 * len(maps) + 0.4
    figure, axes = pyplot.subplots(len(maps), len(words), figsize=size, squeeze=False, layout="constrained")
    for line, (row, found) in enumerate(maps.items()):
        for column, word in enumerate(words):
            axis = axes[line][column]
            if word in found:
                axis.imshow(np.asarray(found[word]), cmap="magma", interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if line == 0:
                axis.set_title(word, fontsize=9, color="#30343b", parse_math=False)
        axes[line][0].set_ylabel(row, fontsize=9, color="#30343b", rotation=0, ha="right", va="center")
    return _png(figure)


def smooth(values: Sequence[float], window: int = 5) -> np.ndarray:
    """Return the running mean of the last `window` values, shorter at the beginning."""
    sums = np.cumsum(np.insert(np.asarray(values, dtype=np.float64), 0, 0.0))
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    mean: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return mean


def _plain() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "1235" else "")


def _figure(panels: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#9aa0a6",
        "axes.labelcolor": "#30343b",
        "axes.grid": True,
        "grid.color": "#e8eaed",
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "xtick.color": "#5f6368",
        "ytick.color": "#5f6368",
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(1, panels, figsize=(10.0, 3.5), layout="constrained")
    return figure, axes


def _legend(figure: Any, axis: Any, colours: Mapping[str, str], splits: Sequence[str], ceiling: bool) -> None:
    """One legend for the whole figure: rows by colour, splits by line."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, linewidth=3, label=row) for row, colour in colours.items()]
    if len(splits) > 1:
        handles += [Line2D([], [], color="#30343b", linestyle=SPLIT_STYLES[s], label=SPLIT_NAMES[s]) for s in splits]
    if ceiling:
        handles.append(Line2D([], [], color=CEILING, linewidth=1, label="ceiling"))
    figure.legend(
        handles=handles, loc="outside upper left", ncols=min(len(handles), 7), fontsize=9.5, handlelength=2.0,
        frameon=False,
    )  # fmt: skip


def _png(figure: Any) -> str:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    pyplot.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()
