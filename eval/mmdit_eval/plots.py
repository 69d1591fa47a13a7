"""The report's figures, drawn by matplotlib from numbers alone; one colour and mark a row, the same in every figure."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmdit_eval.scores import SCORES, Score, split_names
from mmdit_eval.statistics import Estimate

# Okabe and Ito's palette, distinguishable with every kind of colour vision, then five darker ones; marks tell the rest
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#1A1A1A", "#8C510A", "#A6004C",
    "#7A9A01", "#5F7C8A",
)  # fmt: skip
# matplotlib's name of a mark, and the same mark as a character of the page
MARKS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("p", "⬟"), ("<", "◀"), (">", "▶"))
CEILING = "#8A8F98"
WIDE = 8  # a distance that spans this factor stands on a logarithmic axis
FEW = 4  # above so many rows the single seeds' lines are left out: their mean alone can be read
DPI = 160
LEGEND = 5  # entries in a line of the legend
# where a label may stand beside its point: to the right, dy up (points), and on which side it begins
_PLACES = (
    (7, 5, "left"), (7, -12, "left"), (-7, 5, "right"), (-7, -12, "right"), (16, 1, "left"), (-16, 1, "right"),
    (7, 16, "left"), (7, -23, "left"), (-7, 16, "right"), (-7, -23, "right"), (28, 8, "left"), (28, -15, "left"),
    (-28, 8, "right"), (-28, -15, "right"),
)  # fmt: skip
_NEAR = 4  # of these touch their point
SPLIT_STYLES = {"seen": "-", "heldout": (0, (4, 2))}

# a curve: (x, y) pairs; a row may have several, one a seed
Curves = Mapping[str, Sequence[Sequence[tuple[float, float]]]]


class RowStyle(NamedTuple):
    """How a row of the study looks in every figure and table."""

    colour: str
    mark: str
    character: str


def row_styles(rows: Sequence[str]) -> dict[str, RowStyle]:
    """Give each row its colour and mark, by its place in the study; 24 pairs, each row of a smaller study its own."""
    return {row: RowStyle(COLOURS[i % len(COLOURS)], *MARKS[i % len(MARKS)]) for i, row in enumerate(rows)}


def score_figure(
    score: str,
    by_images: Mapping[str, Curves],
    by_flops: Mapping[str, Curves],
    by_seconds: Mapping[str, Curves],
    ceiling: Mapping[str, float],
    styles: Mapping[str, RowStyle],
    names: Mapping[str, str],
) -> str:
    """Draw one score against images, FLOPs and training seconds, side by side: base64 PNG.

    Args:
        by_images, by_flops, by_seconds: {split: {row: curves}}.
        ceiling: {split: value}.
        names: {split: what it is called}.
    """
    figure, axes = _figure(3, rows=len(styles))
    style = SCORES[score]
    several = any(len(seeds) > 1 for curves in by_seconds.values() for seeds in curves.values())
    panels = (
        (axes[0], by_images, "training images (thousands)", 1e-3),
        (axes[1], by_flops, "training TFLOP", 1e-12),
        (axes[2], by_seconds, f"training seconds{', median over seeds' if several else ''}", 1.0),
    )
    for axis, data, label, unit in panels:
        for split, curves in data.items():
            for row, seeds in curves.items():
                look = styles[row]
                dashes = SPLIT_STYLES[split] if len(data) > 1 else "-"
                curve = {"color": look.colour, "linestyle": dashes, "markeredgewidth": 0}
                tables = [np.array(points) * (unit, style.factor) for points in seeds]
                if len(tables) > 1 and len(styles) <= FEW:  # seeds thin, their mean as the row's line
                    for table in tables:
                        axis.plot(*table.T, **curve, linewidth=0.8, alpha=0.35)
                if len({len(table) for table in tables}) == 1:
                    axis.plot(*np.mean(tables, axis=0).T, **curve, marker=look.mark, markersize=4.5, linewidth=1.8)
            if split in ceiling:
                axis.axhline(
                    style.factor * ceiling[split], color=CEILING, linestyle=SPLIT_STYLES[split], linewidth=1.0, zorder=0
                )
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        drawn = [y for line in axis.get_lines() for y in line.get_ydata()]
        if style.better < 0 and drawn and max(drawn) > WIDE * min(drawn) > 0:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(_plain())
            axis.yaxis.set_minor_formatter(_plain())
    unit_text = f" ({style.unit})" if style.unit else ""
    axes[0].set_ylabel(f"{style.label}{unit_text}")
    _legend(figure, styles, {split: names[split] for split in by_images}, bool(ceiling))
    return _png(figure)


def attribute_figure(
    values: Mapping[str, Mapping[str, Mapping[str, Estimate]]],
    styles: Mapping[str, RowStyle],
    labels: Mapping[str, str],
    names: Mapping[str, str],
) -> str:
    """Draw accuracy by attribute with intervals, one panel a split: base64 PNG.

    Args:
        values: {split: {row: {score: estimate}}}.
        labels: {score: how it is called}.
    """
    figure, axes = _figure(len(values), rows=len(styles))
    for axis, (split, rows) in zip(np.atleast_1d(axes), values.items(), strict=True):
        half = min(0.36, 0.09 * (len(rows) - 1))  # a few rows stand together, so that each attribute is one group
        offsets = np.linspace(-half, half, len(rows))
        for offset, (row, found) in zip(offsets, rows.items(), strict=True):
            for place, score in enumerate(labels):
                if score in found:
                    _point(axis, place + offset, found[score], SCORES[score].factor, styles[row])
        axis.set_xticks(range(len(labels)), [label.replace(" ", "\n") for label in labels.values()])
        axis.grid(axis="x", visible=False)
        axis.set_title(names[split], fontsize=10, color="#30343b")
    np.atleast_1d(axes)[0].set_ylabel("right (%)")
    _legend(figure, styles, {}, False)
    return _png(figure)


def _point(axis: Any, x: float, value: Estimate, factor: float, look: RowStyle) -> None:
    """A value with its interval where it has one."""
    axis.plot(
        [x], [factor * value["value"]], marker=look.mark, markersize=5, color=look.colour, linestyle="none",
        markeredgewidth=0,
    )  # fmt: skip
    if value["low"] is not None and value["high"] is not None:
        ends = factor * value["low"], factor * value["high"]
        axis.plot([x, x], ends, color=look.colour, linewidth=1.2, alpha=0.7)


def guidance_figure(
    points: Sequence[Mapping[str, Any]],
    scores: tuple[str, str],
    rows: Mapping[str, RowStyle],
    names: Mapping[str, str],
) -> str:
    """Draw two scores of rows that differ in guidance against each other, with intervals of both: base64 PNG.

    Args:
        points: [{"row", "label", "split", "curve", "scale", "x": estimate, "y": estimate}]; those of one curve (None:
            of none) are joined in the order of their scales.
        scores: of x and of y.
    """
    splits = list(dict.fromkeys(point["split"] for point in points))
    figure, axes = _figure(len(splits))
    styles = [SCORES[score] for score in scores]
    drawn: list[tuple[np.ndarray, list[str], list[str]]] = []
    for axis, split in zip(np.atleast_1d(axes), splits, strict=True):
        here = sorted((p for p in points if p["split"] == split), key=lambda p: p["scale"])
        line = np.array([[styles[i].factor * p[k]["value"] for i, k in enumerate("xy")] for p in here])
        for curve in {p["curve"] for p in here} - {None}:
            joined = line[[p["curve"] == curve for p in here]]
            axis.plot(*joined.T, color=CEILING, linewidth=1.2, zorder=1)
        for p, (x, y) in zip(here, line, strict=True):
            for key, style, draw in (("x", styles[0], axis.hlines), ("y", styles[1], axis.vlines)):
                if p[key]["low"] is not None:
                    ends = style.factor * p[key]["low"], style.factor * p[key]["high"]
                    draw(y if key == "x" else x, *ends, color=rows[p["row"]].colour, linewidth=1.2, alpha=0.7)
            axis.plot(
                [x], [y], marker=rows[p["row"]].mark, markersize=6, color=rows[p["row"]].colour, zorder=3, alpha=0.75,
                markeredgewidth=0,
            )  # fmt: skip
        axis.margins(0.12)
        axis.set_xlabel(_axis_label(styles[0]))
        axis.set_title(names[split], fontsize=10, color="#30343b")
        drawn.append((line, [str(p["label"]) for p in here], [rows[p["row"]].colour for p in here]))
    np.atleast_1d(axes)[0].set_ylabel(_axis_label(styles[1]))
    figure.canvas.draw()  # from here on the axes stay where they are
    for axis, found in zip(np.atleast_1d(axes), drawn, strict=True):
        _label_apart(axis, *found, size=8.5)
    return _png(figure)


def _axis_label(style: Score) -> str:
    return style.label + (f" ({style.unit})" if style.unit else "") + (", less is better" if style.better < 0 else "")


def loss_figure(
    training: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
    by_level: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
    styles: Mapping[str, RowStyle],
    heldout_by_level: Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]],
    names: Mapping[str, str],
    validated: str = "validation loss",
) -> str:
    """Draw training loss against images, and where it was measured the loss at each t: base64 PNG.

    Of several seeds the mean.
    """
    panels = 2 if by_level or heldout_by_level else 1
    figure, axes = _figure(panels, rows=len(styles))
    axes = np.atleast_1d(axes)
    for row, runs in training.items():
        images, loss = _mean_curve(runs)
        axes[0].plot(1e-3 * images, smooth(loss), color=styles[row].colour, linewidth=1.8)
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
        dashes = SPLIT_STYLES[split] if by_level and heldout_by_level else "-"
        for row, levels in data.items():
            t, loss = _mean_curve(levels)
            axes[1].plot(
                t, loss, color=styles[row].colour, linestyle=dashes, marker=styles[row].mark, markersize=4,
                linewidth=1.8, markeredgewidth=0,
            )  # fmt: skip
    if panels == 2:
        axes[1].set_xlabel("t (0 data, 1 noise)")
        axes[1].set_ylabel(f"{validated} at t")
        axes[1].set_xlim(0, 1.03)
    drawn = {s: names[s] for s, levels in (("seen", by_level), ("heldout", heldout_by_level)) if levels}
    _legend(figure, styles, drawn, False)
    return _png(figure)


def _mean_curve(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Average (x, y) curves over seeds, each at the places of the shortest."""
    x = np.asarray(min((xs for xs, _ in curves), key=len), dtype=np.float64)
    return x, np.mean([np.interp(x, xs, ys) for xs, ys in curves], axis=0)


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
    splits, names = list(table["splits"]), split_names(table.get("data", ""))
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
        axis.set_title(f"{names.get(split, split)}, {table['splits'][split]['num_images']:,} pictures a point",
                       fontsize=10, color="#30343b", loc="left")  # fmt: skip
        axis.set_xlabel(f"{across.label} (more is better)")
        axis.set_ylabel(f"{up.label} (less is better)")
        _view_on_guided(axis, [p["guidance_scale"] for p in table["points"]], x, y, bars)
        if min(y) > 0 and max(y) > WIDE * min(y):
            lowest, highest = min(y) / 1.5, axis.get_ylim()[1] * 1.3
            axis.set_yscale("log")
            axis.set_ylim(lowest, highest)
            axis.yaxis.set_major_formatter(_plain())
            axis.yaxis.set_minor_formatter(_plain())
    figure.canvas.draw()  # from here on the axes stay where they are
    for axis in np.atleast_1d(axes):
        _label_apart(axis, axis.lines[0].get_xydata(), [f"{point['guidance_scale']:g}" for point in table["points"]])
    return _png(figure)


def _label_apart(
    axis: Any, points: np.ndarray, labels: Sequence[str], colours: Sequence[str] | None = None, size: float = 9
) -> None:
    """Write each label beside its point, where it hides no label and no point, stays inside and crosses few lines.

    Of places that are equally good the first; a thin line leads to a point that its label does not touch.
    """
    places, frame = axis.transData.transform(points), axis.get_window_extent()
    lines = [np.asarray(line.get_transform().transform(line.get_xydata())) for line in axis.lines]
    lines += [axis.transData.transform(part) for found in axis.collections for part in found.get_segments()]
    taken: list[Any] = []

    def cost(box: Any) -> int:
        hidden = sum(box.overlaps(other) for other in taken) + sum(box.contains(*place) for place in places)
        outside = not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)
        return 100 * hidden + 50 * outside + sum(_crosses(box, line) for line in lines)

    for i, (point, label) in enumerate(zip(points, labels, strict=True)):
        look = {"textcoords": "offset points", "fontsize": size, "color": colours[i] if colours else "#30343b"}
        found = []
        for number, (*offset, side) in enumerate(_PLACES):
            text = axis.annotate(label, point, xytext=offset, ha=side, **look)
            found.append((cost(text.get_window_extent()), number, text.get_window_extent()))
            text.remove()
        _, chosen, box = min(found, key=lambda place: place[:2])
        *offset, side = _PLACES[chosen]
        line = {"arrowstyle": "-", "color": look["color"], "linewidth": 0.6} if chosen >= _NEAR else None
        axis.annotate(label, point, xytext=offset, ha=side, arrowprops=line, **look)
        taken.append(box)


def _crosses(box: Any, line: np.ndarray) -> bool:
    """Tell whether a line of points [N, 2], in pixels, runs through a box: looked at every 2 pixels."""
    for a, b in itertools.pairwise(line):
        steps = np.linspace(a, b, 2 + int(np.hypot(*(b - a)) / 2)) if np.isfinite([a, b]).all() else np.zeros((0, 2))
        if any(box.contains(*step) for step in steps):
            return True
    return False


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


def map_figure(maps: Mapping[str, Mapping[str, Any]], words: Sequence[str]) -> str:
    """Draw attention maps, one line a row of the study, one column a word, on one colour scale: base64 PNG.

    The colour is that of the square root of a share, from 0: words that are read a little can be seen beside one that
    is read much. A word that a row did not read stays blank and is called so.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import PowerNorm

    highest = max(
        (float(np.max(found[word])) for found in maps.values() for word in words if word in found), default=1.0
    )
    size = 1.15 * len(words) + 1.0 + 0.09 * max(map(len, maps)), 1.15 * len(maps) + 0.4
    figure, axes = pyplot.subplots(len(maps), len(words), figsize=size, squeeze=False, layout="compressed")
    norm = PowerNorm(0.5, vmin=0, vmax=highest)
    image = pyplot.cm.ScalarMappable(norm, "magma")
    for line, (row, found) in enumerate(maps.items()):
        for column, word in enumerate(words):
            axis = axes[line][column]
            if word in found:
                axis.imshow(np.asarray(found[word]), cmap="magma", norm=norm, interpolation="nearest")
            else:
                axis.set_box_aspect(1)
                axis.text(0.5, 0.5, "not read", transform=axis.transAxes, ha="center", va="center", fontsize=8,
                          color=CEILING)  # fmt: skip
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if line == 0:
                axis.set_title(word, fontsize=9, color="#30343b", parse_math=False)
        axes[line][0].set_ylabel(row, fontsize=9, color="#30343b", rotation=0, ha="right", va="center")
    bar = figure.colorbar(image, ax=axes, aspect=max(8, 10 * len(maps)), pad=0.02)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("share of attention", fontsize=8, color="#30343b")
    bar.outline.set_visible(False)
    return _png(figure)


def smooth(values: Sequence[float] | np.ndarray, window: int = 5) -> np.ndarray:
    """Return the running mean of the last `window` values, shorter at the beginning."""
    sums = np.cumsum(np.insert(np.asarray(values, dtype=np.float64), 0, 0.0))
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    mean: np.ndarray = (sums[ends] - sums[starts]) / (ends - starts)
    return mean


def _plain() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "1235" else "")


def _figure(panels: int, rows: int = 1) -> tuple[Any, Any]:
    """Panels side by side, higher where the legend of many rows takes several lines."""
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
        figure, axes = pyplot.subplots(1, panels, figsize=(10.0, 3.3 + 0.22 * -(-rows // LEGEND)), layout="constrained")
    return figure, axes


def _legend(figure: Any, styles: Mapping[str, RowStyle], splits: Mapping[str, str], ceiling: bool) -> None:
    """One legend for the whole figure: rows by colour and mark, splits by line."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=look.colour, marker=look.mark, markersize=5, linewidth=2.5, label=row)
        for row, look in styles.items()
    ]
    if len(splits) > 1:
        handles += [Line2D([], [], color="#30343b", linestyle=SPLIT_STYLES[s], label=splits[s]) for s in splits]
    if ceiling:
        handles.append(Line2D([], [], color=CEILING, linewidth=1, label="ceiling"))
    figure.legend(
        handles=handles, loc="outside upper left", ncols=min(len(handles), LEGEND), fontsize=9.5, handlelength=2.0,
        frameon=False,
    )  # fmt: skip


def _png(figure: Any) -> str:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    pyplot.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def css_width(png: str) -> int:
    """Return the width at which a figure's letters have their true size on a page, in CSS pixels (96 an inch)."""
    header = base64.b64decode(png[:64])
    return round(int.from_bytes(header[16:20], "big") * 96 / DPI)
