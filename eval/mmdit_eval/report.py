"""The report of a study, from its files alone: terminal table, report.html, table.md, table.csv, summary.json, figures.

python scripts/ablate.py --report-only runs/quickstart
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmdit_eval import plots
from mmdit_eval.claims import for_new_prompts, judge_claims, verdict
from mmdit_eval.findings import (  # fmt: skip
    SPLITS,
    Files,
    ceiling_value,
    cost_table,
    equal_budgets,
    estimate,
    read_study,
    score_table,
)
from mmdit_eval.scores import SCORES, shown, shown_interval
from mmdit_eval.statistics import Estimate

TEMPLATES = Path(__file__).parent / "templates"


def write_report(folder: str | Path, console: Any = None) -> Path:
    """Write report.html, table.md, table.csv, summary.json and the figures into the study's folder; print the table.

    Figures: grid-<split>.png, the samples; figure-<n>.png, the curves of the report.
    """
    files = read_study(folder)
    (files.folder / "table.md").write_text(markdown(files), encoding="utf-8")
    (files.folder / "table.csv").write_text(csv_table(files), encoding="utf-8")
    (files.folder / "table.tex").write_text(latex(files), encoding="utf-8")
    (files.folder / "summary.json").write_text(
        json.dumps(summary(files), indent=1, ensure_ascii=False), encoding="utf-8"
    )
    drawn = figures(files, plots.row_colours(files.rows))
    out = files.folder / "report.html"
    out.write_text(html(files, drawn), encoding="utf-8")
    write_pictures(files, drawn)
    print_study(files, console)
    return out


def write_pictures(files: Files, drawn: list[dict[str, str]]) -> None:
    """Write the sample grids and the report's figures as files of their own, in place of earlier ones."""
    for stale in (*files.folder.glob("grid-*.png"), *files.folder.glob("figure-*.png")):
        stale.unlink()
    pictures = {f"grid-{grid['split']}": plots.grid_figure(grid) for grid in grids(files) if grid["lines"]}
    pictures |= {f"figure-{number}": figure["png"] for number, figure in enumerate(drawn, start=1)}
    for name, png in pictures.items():
        (files.folder / f"{name}.png").write_bytes(base64.b64decode(png))


def summary(files: Files) -> dict[str, Any]:
    """Return the study in numbers: what the README's table is made of."""
    scores: dict[str, Any] = {}
    for line in score_table(files):
        for (split, row), value in line["cells"].items():
            scores.setdefault(row, {}).setdefault(split, {})[line["score"]] = dict(value)
    return {
        "study": files.study["name"],
        "command": files.book.get("command", ""),
        "headline": files.headline,
        "verdict": verdict(files),
        "claims": [{**claim, "new_prompts": for_new_prompts(files, claim)} for claim in judge_claims(files)],
        "rows": {line["row"]: {k: v for k, v in line.items() if k != "row"} for line in cost_table(files)},
        "scores": scores,
        "equal_budgets": equal_budgets(files),
        "cells": {c.folder.name: {"status": c.status, "reason": c.reason} for c in files.cells},
        "stamp": (files.judged[0].result or {})["stamp"] if files.judged else None,
        "environment": (files.judged[0].result or {})["environment"] if files.judged else None,
    }


def _columns(files: Files) -> list[tuple[str, str]]:
    found = {key for line in score_table(files) for key in line["cells"]}
    wanted = [(split, column) for split in files.splits for column in [*files.rows, "ceiling", "chance"]]
    return [key for key in wanted if key in found]


def markdown(files: Files) -> str:
    """Return the score table as Markdown."""
    columns = _columns(files)
    several = len(files.splits) > 1
    heads = [f"{column}, {split}" if several else column for split, column in columns]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(columns)]
    for line in score_table(files):
        style = SCORES.get(line["score"])
        entries = [_with_interval(line["score"], line["cells"].get(key)) for key in columns]
        lines.append(f"| {style.label if style else line['score']} | " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n"


def latex(files: Files) -> str:
    """Return the score table as a LaTeX tabular (booktabs): rows of the study down, scores across."""
    known = [(split, score) for split in files.splits for score in files.scores]
    heads = [f"{SCORES[score].label if score in SCORES else score}, {split}" for split, score in known]
    lines = [f"\\begin{{tabular}}{{l{'r' * len(known)}}}", "\\toprule", " & ".join(["", *heads]) + r" \\", r"\midrule"]
    for row in files.rows:
        entries = [estimate(files.of(row), split, score) for split, score in known]
        cells = ["--" if v is None else _with_interval(score, v) for v, (_, score) in zip(entries, known, strict=True)]
        lines.append(" & ".join([row, *cells]) + r" \\")
    for plain, escaped in (("_", r"\_"), ("%", r"\%"), ("−", "$-$"), (" – ", "--"), ("×", r"$\times$"), ("–", "--")):
        lines = [line.replace(plain, escaped) for line in lines]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _with_interval(score: str, value: Estimate | None) -> str:
    if value is None:
        return ""
    interval = shown_interval(score, value["low"], value["high"])
    return shown(score, value["value"]) + (f" [{interval}]" if interval else "")


def csv_table(files: Files) -> str:
    """Return every number of every cell, one a line, unrounded."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["row", "seed", "images_seen", "seconds", "split", "score", "value", "low", "high", "n", "method"])
    for cell in files.judged:
        final = cell.result or {}
        every = [(images, seconds, splits) for images, seconds, splits in cell.points if images != final["images_seen"]]
        every.append((final["images_seen"], cell.points[-1][1], final["splits"]))
        for images, seconds, splits in every:
            for split, found in splits.items():
                for score, v in found["scores"].items():
                    tail = [v["value"], v["low"], v["high"], v["n"], v["method"]]
                    writer.writerow([cell.row, cell.seed, images, seconds, split, score, *tail])
    return buffer.getvalue()


def print_study(files: Files, console: Any = None) -> None:
    """Print the table, the budgets and the verdict."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console(width=None if Console().is_terminal else 110)
    columns = _columns(files)
    table = Table(title=f"study {files.study['name']}", title_justify="left")
    table.add_column("score")
    for split, column in columns:
        table.add_column(f"{column}\n{SPLITS[split].split()[0]}", justify="right")
    for line in score_table(files):
        style = SCORES.get(line["score"])
        entries = [shown(line["score"], line["cells"][k]["value"]) if k in line["cells"] else "" for k in columns]
        table.add_row(style.label if style else line["score"], *entries)
    console.print(table)
    for line in cost_table(files):
        if line["images"]:
            console.print(
                f"  {line['row']}: {line['parameters'] / 1e6:.2f} M parameters, {line['gflops']:.3f} GFLOP an image, "
                f"{line['images']:,} images in {line['seconds'] or float('nan'):.0f} s "
                f"({line['images_per_second'] or float('nan'):.0f} images/s), draws "
                f"{line['drawn_per_second'] or float('nan'):.0f} pictures/s",
                highlight=False,
            )
    for sentence in verdict(files):
        console.print(f"  {sentence}", highlight=False)


def print_result(result: Mapping[str, Any]) -> None:
    """Print one run's scores."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['run']} at {result['images_seen']:,} images", title_justify="left")
    table.add_column("score")
    for split in result["splits"]:
        table.add_column(SPLITS.get(split, split), justify="right")
    names = list(dict.fromkeys(name for split in result["splits"].values() for name in split["scores"]))
    for name in [n for n in SCORES if n in names] + [n for n in names if n not in SCORES]:
        entries = [_with_interval(name, split["scores"].get(name)) for split in result["splits"].values()]
        table.add_row(SCORES[name].label if name in SCORES else name, *entries)
    Console().print(table)


def html(files: Files, drawn: list[dict[str, str]] | None = None) -> str:
    """Render report.html: one file, no outside resource; `drawn` are its figures where they are drawn already."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["shown_as"] = lambda value, score: shown(score, value)
    environment.filters["interval"] = lambda value, score: shown_interval(score, value["low"], value["high"])
    colours = plots.row_colours(files.rows)
    seeds = len(files.study["seeds"])
    return environment.get_template("report.html.j2").render(
        files=files,
        study=files.study,
        colours=colours,
        split_names=SPLITS,
        styles=SCORES,
        verdict=verdict(files),
        seeds=seeds,
        columns=_columns(files),
        scores=score_table(files),
        claims=[(claim, for_new_prompts(files, claim)) for claim in judge_claims(files)],
        confounded=[row for row, kept in files.book["rows"].items() if kept["confounded"]],
        costs=cost_table(files),
        budgets=equal_budgets(files),
        figures=figures(files, colours) if drawn is None else drawn,
        grids=grids(files),
        counts=_counts(files),
        failed=[cell for cell in files.cells if cell.result is None or cell.status == "failed"],
        suite=files.study["suite"],
        study_yaml=yaml.safe_dump(files.study, sort_keys=False, width=100),
        stamp=json.dumps((files.judged[0].result or {})["stamp"], indent=2, ensure_ascii=False) if files.judged else "",
        environment=_environment(files),
        command=files.book.get("command", ""),
        started=files.book.get("started", ""),
    )


def _counts(files: Files) -> str:
    """Say on how many pictures the scores stand: "256 pictures a split", or one number a split where they differ."""
    splits = (files.judged[0].result or {})["splits"] if files.judged else {}
    numbers = {split: found["num_images"] for split, found in splits.items()}
    if len(set(numbers.values())) <= 1:
        return f"{next(iter(numbers.values()), 0)} pictures a split"
    return ", ".join(f"{number} pictures of {SPLITS[split]}" for split, number in numbers.items())


def _environment(files: Files) -> dict[str, Any]:
    """Return where and with what the first judged cell was trained and judged."""
    if not files.judged:
        return {}
    found: dict[str, Any] = dict((files.judged[0].result or {})["environment"])
    trained = files.judged[0].folder / "environment.json"
    if trained.is_file():
        notes = json.loads(trained.read_text(encoding="utf-8"))
        found.update({f"training {k}": v for k, v in notes.items() if isinstance(v, str | int | float | bool)})
    return found


def figures(files: Files, colours: Mapping[str, str]) -> list[dict[str, str]]:
    """Draw the figures that the files allow: [{"title", "note", "png"}]."""
    drawn = []
    headline = [name for name in (files.headline,) if name]
    for score in [*headline, *(s for s in ("frechet",) if s in files.scores and s not in headline)]:
        by_images, by_flops, by_seconds = (_curves(files, score, axis) for axis in ("images", "flops", "seconds"))
        if not any(len(points) > 1 for curves in by_images.values() for seeds in curves.values() for points in seeds):
            continue
        ceiling = {s: v for s in files.splits if (v := ceiling_value(files, s, score)) is not None}
        if files.study["suite"]["snapshot_images"] and score in ("frechet",):
            ceiling = {}  # measured on more pictures, which lowers a Fréchet distance: no line beside these curves
        pictures = files.study["suite"]["snapshot_images"] or files.study["suite"]["num_images"]
        label = SCORES[score].label
        title = f"{label[0].upper()}{label[1:]} against images, FLOPs and seconds"
        note = (
            f"Each point: {pictures} pictures of one checkpoint. An update takes three times the FLOP of its forward. "
            f"Seconds are training steps alone, on this machine."
        )
        png = plots.score_figure(score, by_images, by_flops, by_seconds, ceiling, colours)
        drawn.append({"title": title, "note": note, "png": png})
    training: dict[str, list[Any]] = {}
    levels: dict[str, dict[str, list[Any]]] = {"seen": {}, "heldout": {}}
    for cell in files.cells:
        records = cell.records("train")
        if records:
            values = [r["images_seen"] for r in records], [r["loss"] for r in records]
            training.setdefault(cell.row, []).append(values)
    for cell in files.judged:
        for split in files.splits:
            details = (cell.result or {})["splits"][split]["details"]
            if "loss_by_level" in details:
                levels[split].setdefault(cell.row, []).append((details["levels"], details["loss_by_level"]))
    if training or any(levels.values()):
        title = "Training loss against images, and validation loss at each t"
        note = "Validation: the averaged weights on true pictures with the same noise for every row."
        png = plots.loss_figure(training, levels["seen"], colours, levels["heldout"])
        drawn.append({"title": title, "note": note, "png": png})
    return [*drawn, *_by_attribute(files, colours), *_guidance(files, colours), *_attention(files)]


def _by_attribute(files: Files, colours: Mapping[str, str]) -> list[dict[str, str]]:
    """Draw what is right in a picture, attribute by attribute."""
    names = ("colour", "shape", "size", "count", "relation", "early", "late", "same_base", "same_tone", "same_gender")
    labels = {score: SCORES[score].label for score in names if score in files.scores}
    if len(labels) < 2:
        return []
    values: dict[str, dict[str, dict[str, Estimate]]] = {}
    for split in files.splits:
        for row in files.rows:
            found = {score: estimate(files.of(row), split, score) for score in labels}
            values.setdefault(split, {})[row] = {score: value for score, value in found.items() if value is not None}
    several = len(files.study["seeds"]) > 1
    note = f"95 % intervals {'over training seeds' if several else 'over prompts and noise, between samples only'}."
    png = plots.attribute_figure(values, colours, labels)
    return [{"title": "Accuracy by attribute", "note": note, "png": png}]


def _attention(files: Files) -> list[dict[str, str]]:
    """Draw which image tokens read which word, row by row, where it was recorded."""
    found: dict[str, list[Any]] = {}
    for row in files.rows:
        file = next(
            (c.folder / "attention.json" for c in files.of(row) if (c.folder / "attention.json").is_file()), None
        )
        if file is not None:
            found[row] = json.loads(file.read_text(encoding="utf-8"))["prompts"]
    drawn = []
    for i in range(min((len(prompts) for prompts in found.values()), default=0)):
        maps = {row: prompts[i]["maps"] for row, prompts in found.items() if prompts[i]["maps"]}
        if maps:
            first = next(iter(found.values()))[i]
            note = f"The true picture at t = {first['t']}, mean over heads and blocks."
            drawn.append(
                {"title": f"What is read from: {first['caption']}", "note": note, "png": plots.map_figure(maps)}
            )
    return drawn


def _guidance(files: Files, colours: Mapping[str, str]) -> list[dict[str, str]]:
    """Draw what guidance buys against what it costs, where rows differ in guidance."""
    kept = {row: files.book["rows"][row]["sampling"] for row in files.rows}
    fields = ("guidance_scale", "negative_guidance", "guidance_interval", "kv_subtract", "nag", "skip_layer")
    if len({json.dumps([sampling.get(f) for f in fields]) for sampling in kept.values()}) < 2:
        return []
    x, y = "frechet", next((s for s in ("all_correct", "same_base", "clip_score") if s in files.scores), None)
    if x not in files.scores or y is None:
        return []
    points = []
    for split in files.splits:
        for row, sampling in kept.items():
            found = {"x": estimate(files.of(row), split, x), "y": estimate(files.of(row), split, y)}
            if None not in found.values():
                kind, scale = sampling.get("negative_guidance", "cfg"), sampling.get("guidance_scale", 0.0)
                points.append({"row": row, "label": row, "split": split, "scale": scale, "kind": kind, **found})
    if not points:
        return []
    note = "Up and to the left is better. Crosses are 95 % intervals; the line joins scales of one kind of guidance."
    png = plots.guidance_figure(points, (x, y), colours)
    return [{"title": "What guidance buys, and what it costs", "note": note, "png": png}]


def _curves(files: Files, score: str, axis: str) -> dict[str, dict[str, list[list[tuple[float, float]]]]]:
    found: dict[str, dict[str, list[list[tuple[float, float]]]]] = {}

    def at(row: str, images: int, seconds: float) -> float:
        flops = 3.0 * files.book["rows"][row]["flops"] * images
        return {"images": float(images), "flops": flops, "seconds": seconds}[axis]

    for split in files.splits:
        for cell in files.judged:
            points = [
                (at(cell.row, images, seconds), splits[split]["scores"][score]["value"])
                for images, seconds, splits in cell.points
                if score in splits.get(split, {}).get("scores", {})
            ]
            if points and np.isfinite(points).all():
                found.setdefault(split, {}).setdefault(cell.row, []).append(points)
    return found


def grids(files: Files) -> list[dict[str, Any]]:
    """Collect the sample grid: the same prompts and noise in every row, beside the true picture and the ceiling."""
    found = []
    firsts = [files.of(row)[0] for row in files.rows if files.of(row)]
    for split in files.splits:
        if not firsts:
            break
        lines = []
        prompts = (firsts[0].result or {})["prompts"][split]
        for i, prompt in enumerate(prompts):
            pictures: list[tuple[str, str | None]] = []
            for kind in ("true", "ceiling"):
                pictures.append((kind, _picture(files.folder / f"ceiling/{kind}-{split}-{i:03d}.png")))
            for cell in firsts:
                name = f"{(cell.result or {})['suite']}-{(cell.result or {})['images_seen']:012d}"
                right = (cell.result or {})["splits"][split]["per_image"].get("all_correct")
                mark = "" if right is None or right[i] is None else ("right" if right[i] else "wrong")
                picture = _picture(cell.folder / "samples" / name / f"{split}-{i:03d}.png")
                pictures.append((f"{cell.row} {mark}".strip(), picture))
            lines.append({"prompt": prompt, "pictures": pictures})
        heads = ["true", "VAE", *(cell.row for cell in firsts)]
        found.append({"split": split, "heads": heads, "lines": lines})
    return found


def _picture(path: Path) -> str | None:
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else None
