"""What a study found, from its files alone: values over seeds, equal budgets, costs. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmdit_eval.book import read_book
from mmdit_eval.comparison import read_result
from mmdit_eval.scores import HEADLINES, SCORES, SPLITS, split_names
from mmdit_eval.statistics import Estimate, seed_interval

SHARED = 1.5  # seeds of one row that differ in time by more than this factor did not have the machine to themselves


@dataclass
class Cell:
    """One row and seed, as its folder tells it.

    Attributes:
        flops: of one forward of one image.
        points: (images, seconds, {split: measured}) along training.
        target: what was trained, as text: prediction and schedule, which decide what its loss means; "": not known.
    """

    row: str
    seed: int
    status: str
    reason: str
    folder: Path
    flops: float
    result: dict[str, Any] | None = None
    points: list[tuple[int, float, dict[str, Any]]] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    target: str = ""

    @property
    def pictures(self) -> Path | None:
        """The folder of what was drawn for the result; None where there is none."""
        if self.result is None:
            return None
        return self.folder / "samples" / f"{self.result['suite']}-{self.result['images_seen']:012d}"

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in self.log if record.get("kind") == kind]

    @property
    def seconds(self) -> float | None:
        times = [record["seconds"] for record in self.log if "seconds" in record]
        return max(times) if times else None

    @property
    def images_per_second(self) -> float | None:
        last = self.records("train")[-1:]
        return last[0]["images_seen"] / last[0]["seconds"] if last and last[0].get("seconds") else None


@dataclass
class Files:
    """Everything a study's folder holds that the report needs."""

    folder: Path
    book: dict[str, Any]
    cells: list[Cell]
    ceiling: dict[str, Any] | None

    @property
    def study(self) -> dict[str, Any]:
        found: dict[str, Any] = self.book["study"]
        return found

    @cached_property
    def rows(self) -> list[str]:
        return list(self.book["rows"])

    @cached_property
    def split_names(self) -> dict[str, str]:
        """What the splits are called, by the study's data."""
        return split_names(next((kept["data"] for kept in self.book["rows"].values()), ""))

    @cached_property
    def judged(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.result is not None]

    def of(self, row: str) -> list[Cell]:
        return [cell for cell in self.judged if cell.row == row]

    @property
    def shown(self) -> list[Cell]:
        """The cell of each row whose pictures stand in the grid: the first that was judged."""
        return [self.of(row)[0] for row in self.rows if self.of(row)]

    @cached_property
    def splits(self) -> list[str]:
        return [split for split in SPLITS if any(split in (cell.result or {})["splits"] for cell in self.judged)]

    @cached_property
    def seconds(self) -> dict[tuple[str, int], float]:
        """{(row, images seen): training seconds until then}, the median over the row's seeds."""
        found: dict[tuple[str, int], list[float]] = {}
        for cell in self.judged:
            for images, seconds, _ in cell.points:
                found.setdefault((cell.row, images), []).append(seconds)
        return {key: float(np.median(values)) for key, values in found.items()}

    @cached_property
    def injections(self) -> dict[str, str]:
        """How text enters each row's network; "" where no cell's config says so."""
        found = dict.fromkeys(self.rows, "")
        for name, entry in self.book["cells"].items():
            config = self.folder / entry.get("trained_as", name) / "config.yaml"
            if found.get(entry["row"]) == "" and config.is_file():
                try:
                    model = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]
                    found[entry["row"]] = str(model.get("injection", ""))
                except (yaml.YAMLError, KeyError, TypeError, AttributeError):
                    continue  # not whole: another seed's says the same
        return found

    @cached_property
    def one_target(self) -> bool:
        """Whether all were trained on one target: else their losses are different numbers."""
        return len({cell.target for cell in self.judged}) < 2

    @cached_property
    def scores(self) -> list[str]:
        """What was measured and compares, in the order of a table."""
        known = {n for c in self.judged for split in (c.result or {})["splits"].values() for n in split["scores"]}
        if not self.one_target:
            known -= {"validation_loss"}
        return [name for name in SCORES if name in known] + sorted(known - set(SCORES))

    @cached_property
    def headline(self) -> str | None:
        return next((name for name in HEADLINES if name in self.scores), None)


def read_study(folder: str | Path) -> Files:
    """Read a study's folder.

    Raises:
        FileNotFoundError: no study.json in it.
        ConfigError: its study.json is not whole, or was written by a newer version.
    """
    folder = Path(folder)
    book = read_book(folder / "study.json")
    cells = [_read_cell(folder, name, book) for name in book["cells"]]
    return Files(folder, book, cells, read_result(folder / "ceiling.json"))


def _read_cell(study: Path, name: str, book: Mapping[str, Any]) -> Cell:
    """Read a cell: its results from its own folder, its log from that of the networks that it uses."""
    entry, suite, folder = book["cells"][name], book["study"]["suite"], study / name
    flops = float(book["rows"][entry["row"]]["flops"])
    cell = Cell(entry["row"], entry["seed"], entry["status"], entry.get("reason", ""), folder, flops)
    trained = study / entry.get("trained_as", name)
    cell.target, log = _target(trained / "config.yaml"), trained / "metrics.jsonl"
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
        try:
            cell.log.append(json.loads(line))
        except ValueError:
            continue  # the last line of a run that was killed while writing it
    if cell.status == "failed":  # what lies there is of another config, or of a training that did not end
        return cell
    found = [read_result(path) for path in sorted((folder / "eval").glob("*.json"))]
    # by what a result says of itself: a sweep by the suite `tiny` leaves `tiny-guidance-8` and a table beside it
    own = (result for result in found if result is not None and result.get("suite") == suite["name"])
    results = sorted(own, key=lambda result: result["images_seen"])
    if not results:
        return cell
    cell.result = results[-1]
    clock = sorted({(r["images_seen"], r["seconds"]) for r in cell.log if "seconds" in r and "images_seen" in r})
    for result in results:
        # the final one on as many pictures as the earlier ones; a split smaller than that was judged whole each time
        splits = {**result["splits"], **result["prefix"]}
        seconds = _interpolate(result["images_seen"], clock) if clock else float("nan")
        cell.points.append((result["images_seen"], seconds, splits))
    return cell


def _target(config: Path) -> str:
    try:
        diffusion = yaml.safe_load(config.read_text(encoding="utf-8"))["diffusion"]
        return json.dumps([diffusion["prediction"], diffusion["schedule"]], sort_keys=True)
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return ""


# --- numbers ----------------------------------------------------------------------------------------------------


def estimate(cells: Sequence[Cell], split: str, score: str) -> Estimate | None:
    """Return a row's value: over seeds where there are several, else the one run's own with its interval."""
    found = [cell.result["splits"][split]["scores"].get(score) for cell in cells if cell.result is not None]
    values: list[Estimate] = [value for value in found if value is not None]
    if not values:
        return None
    return values[0] if len(values) == 1 else seed_interval([value["value"] for value in values])


def spent(files: Files, cell: Cell, axis: str) -> list[tuple[float, dict[str, Any]]]:
    """Return (what a judged checkpoint had cost, {split: measured}); axis is `images`, `flops` or `seconds`.

    An update takes three times the FLOPs of its forward. Seconds are the median over the row's seeds: one of them may
    have trained beside other work.
    """
    return [
        (
            {
                "images": float(images),
                "flops": 3.0 * cell.flops * images,
                "seconds": files.seconds[cell.row, images],
            }[axis],
            splits,
        )
        for images, _, splits in cell.points
    ]


def at_budget(files: Files, cell: Cell, split: str, score: str, axis: str, budget: float) -> float | None:
    """Return a score at a budget, linear between the judged checkpoints; None outside. `axis`: as in `spent`."""
    points = []
    for cost, splits in spent(files, cell, axis):
        found = splits.get(split, {}).get("scores", {}).get(score)
        if found is not None:
            points.append((cost, found["value"]))
    if not points or not points[0][0] <= budget <= points[-1][0] * (1 + 1e-9):
        return None
    return _interpolate(budget, points)


def _interpolate(x: float, points: Sequence[tuple[float, float]]) -> float:
    """Linear between (x, y) points sorted by x."""
    table = np.array(points, dtype=np.float64)
    return float(np.interp(x, table[:, 0], table[:, 1]))


def equal_budgets(files: Files) -> list[dict[str, Any]]:
    """Compare rows at equal images, FLOPs and seconds: the largest budget that every row has reached.

    A row that was first judged later has no value there; a budget at which fewer than two rows have one is left out.
    """
    tables = []
    chosen: list[str] = [
        s for s in ("colour", "shape", "relation", "all_correct", "same_base", "same_tone") if s in files.scores
    ]
    chosen = chosen or [s for s in (files.headline,) if s]
    for axis in ("images", "flops", "seconds"):
        reached = [spent(files, cell, axis)[-1][0] for cell in files.judged if cell.points]
        if not reached or not np.isfinite(reached).all():
            continue
        budget = min(reached)
        lines: list[dict[str, Any]] = []
        for row in files.rows:
            values = {
                f"{split}.{score}": _mean(
                    [at_budget(files, cell, split, score, axis, budget) for cell in files.of(row)]
                )
                for split in files.splits
                for score in chosen
            }
            lines.append({"row": row, "values": values})
        if sum(any(value is not None for value in line["values"].values()) for line in lines) > 1:
            tables.append({"axis": axis, "budget": budget, "scores": chosen, "rows": lines})
    return tables


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present and len(present) == len(values) else None


def ceiling_value(files: Files, split: str, score: str) -> float | None:
    found = ((files.ceiling or {}).get("splits", {}).get(split, {}).get("scores", {})).get(score)
    return None if found is None else float(found["value"])


def score_table(files: Files) -> list[dict[str, Any]]:
    """Return one line a score: {"score", "cells": {(split, row | "ceiling" | "chance"): estimate}}."""
    lines = []
    for score in files.scores:
        cells: dict[tuple[str, str], Estimate] = {}
        for split in files.splits:
            for row in files.rows:
                value = estimate(files.of(row), split, score)
                if value is not None:
                    cells[split, row] = value
            ceiling = ((files.ceiling or {}).get("splits", {}).get(split, {}).get("scores", {})).get(score)
            if ceiling is not None:
                cells[split, "ceiling"] = ceiling
            chances = [(c.result or {})["splits"][split]["chance"].get(score) for c in files.judged]
            if chances and chances[0] is not None:
                cells[split, "chance"] = Estimate(value=chances[0], low=None, high=None, n=0, method="by construction")
        lines.append({"score": score, "cells": cells})
    return lines


def interval_over(files: Files, column: str) -> str:
    """Say what the intervals of a row, the ceiling or chance are over: "5 seeds" or "between samples only"."""
    if column == "chance":
        return ""  # by construction, without an interval
    seeds = len(files.of(column)) if column in files.rows else 1
    return f"{seeds} seeds" if seeds > 1 else "between samples only"


def of_intervals(files: Files) -> str:
    """Say in words what the intervals of all rows are over."""
    counts = {row: len(files.of(row)) for row in files.rows if files.of(row)}
    single = [row for row, count in counts.items() if count == 1]
    if len(single) == len(counts):
        return "over prompts and noise, between samples only"
    return "over training seeds" + (f"; of {', '.join(single)} between samples only (one seed)" if single else "")


def cost_table(files: Files) -> list[dict[str, Any]]:
    """Return one line a row: what it is and what it took.

    Times are those of the middle seed, beside them the range over seeds ([least, most]): a mean would follow the one
    seed that trained beside other work.
    """
    lines = []
    for row in files.rows:
        cells, cost = files.of(row), files.book["rows"][row]
        times = {
            "seconds": [cell.seconds for cell in cells],
            "images_per_second": [cell.images_per_second for cell in cells],
            "drawn_per_second": [(cell.result or {})["drawn_per_second"] for cell in cells],
        }
        lines.append(
            {
                "row": row,
                "backbone": cost["backbone"],
                "parameters": cost["parameters"],
                "gflops": cost["flops"] / 1e9,
                "evaluations": cost["evaluations"],
                "image_gflops": cost["image_flops"] / 1e9,
                "trained_as": cost["trained_as"],
                "confounded": cost["confounded"],
                "match": cost["match"],
                "tokens": 0 if files.injections[row] == "pooled" else cost["tokens"],
                "images": cells[0].result["images_seen"] if cells and cells[0].result else None,
                "seeds": len(cells),
                **{name: _middle(values) for name, values in times.items()},
                **{f"{name}_range": _range(values) for name, values in times.items()},
            }
        )
    return lines


def _middle(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.median(present)) if present and len(present) == len(values) else None


def _range(values: Sequence[float | None]) -> list[float] | None:
    """[least, most] over seeds; None of one seed, or where one has no value."""
    present = [value for value in values if value is not None]
    return [min(present), max(present)] if len(present) == len(values) > 1 else None


def seconds_note(files: Files) -> str:
    """Say what the seconds of a row with several seeds are, and that they compare nothing where the machine was shared.

    The seeds of a row do the same work: a factor of more than `SHARED` between their seconds an image is not theirs.
    """
    lines = cost_table(files)
    if all(line["seconds_range"] is None for line in lines):
        return ""
    note = "Training seconds: the median over seeds, and where they differ their range."
    times = _differing([line["images_per_second_range"] for line in lines])
    if not times:
        return note
    return (
        f"{note} Seconds of one row differ up to {times} times between seeds: the machine did other work; they do not "
        f"compare rows."
    )


def drawing_note(files: Files) -> str:
    """Say the same of the pictures drawn a second."""
    times = _differing([line["drawn_per_second_range"] for line in cost_table(files)])
    return f"Pictures/s of one row differ up to {times} times, and do not compare rows either." if times else ""


def _differing(ranges: Sequence[Sequence[float] | None]) -> str:
    """Return the largest factor between the seeds of one row, as text; "" where it is at most `SHARED`."""
    factor = max((ends[1] / ends[0] for ends in ranges if ends is not None and ends[0] > 0), default=1.0)
    return "" if factor <= SHARED else f"{factor:.0f}" if factor >= 10 else f"{factor:.1f}"


def ranged(value: float | None, ends: Sequence[float] | None, digits: int = 0) -> tuple[str, str]:
    """Format a time and its range over seeds: ("418", "181 – 2,900"); no range where it says nothing more."""
    if not value:
        return "–", ""
    low, high = (f"{end:,.{digits}f}" for end in ends) if ends else ("", "")
    return f"{value:,.{digits}f}", f"{low} – {high}" if low != high else ""


def pictures_of_curves(files: Files) -> str:
    """Say on how many pictures a point of the curves stands: "96 pictures", or from to where splits differ."""
    numbers = {
        found["num_images"] for cell in files.judged for _, _, splits in cell.points for found in splits.values()
    }
    ends = sorted({min(numbers, default=0), max(numbers, default=0)})
    return f"{' to '.join(f'{number:,}' for number in ends)} pictures"
