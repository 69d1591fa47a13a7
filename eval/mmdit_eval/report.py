"""The report of a study, from its files alone: terminal table, report.html, table.md, table.csv, summary.json, figures.

python scripts/ablate.py --report-only runs/quickstart
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmdit_eval import plots
from mmdit_eval.claims import caveats, for_new_prompts, judge_claims, verdict
from mmdit_eval.figures import figures, grids
from mmdit_eval.findings import (
    Files,
    cost_table,
    drawing_note,
    equal_budgets,
    estimate,
    interval_over,
    of_intervals,
    pictures_of_curves,
    ranged,
    read_study,
    score_table,
    seconds_note,
)
from mmdit_eval.scores import SCORES, shown, shown_interval, split_names
from mmdit_eval.statistics import Estimate
from mmdit_eval.verdicts import PAIRED

TEMPLATES = Path(__file__).parent / "templates"
LATENTS = ("encoders.vae", "encoders.latent_shift", "encoders.latent_scale", "encoders.posterior")
INTERVALS = "95 % interval"  # head of what says, row by row, what the intervals are over
_LATEX = str.maketrans(
    {
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "–": "--",
        **{"−": "$-$", "×": r"$\times$", "→": r"$\to$", "∞": r"$\infty$", "±": r"$\pm$", "≤": r"$\le$"},
        **{"≥": r"$\ge$", "²": "$^2$", "·": r"$\cdot$", "…": r"\dots{}", "’": "'"},
    }
)
WIDE = 8  # more columns of (split, row) than this, and rows stand down the table, one table a split


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
    drawn = figures(files, plots.row_styles(files.rows))
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
        "split_names": files.split_names,
        "verdict": verdict(files),
        "caveats": caveats(files),
        "claims": [{**claim, "new_prompts": for_new_prompts(files, claim)} for claim in judge_claims(files)],
        "rows": {line["row"]: {k: v for k, v in line.items() if k != "row"} for line in cost_table(files)},
        "seconds_note": seconds_note(files),
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


def row_tables(files: Files) -> list[dict[str, Any]]:
    """Return the score table by rows: [{"split", "scores", "lines": [(row or ceiling or chance, {score: value})]}]."""
    tables, lines = [], score_table(files)
    for split in files.splits:
        scores = [line["score"] for line in lines if any(key[0] == split for key in line["cells"])]
        found = {
            column: {line["score"]: line["cells"][split, column] for line in lines if (split, column) in line["cells"]}
            for column in [*files.rows, "ceiling", "chance"]
        }
        tables.append({"split": split, "scores": scores, "lines": [(c, cells) for c, cells in found.items() if cells]})
    return tables


def markdown(files: Files) -> str:
    """Return the score table as Markdown: scores down and rows across, or turned over where there are many rows."""
    columns = _columns(files)
    if len(columns) > WIDE:
        return "\n".join(_markdown_of_rows(files, table) for table in row_tables(files))
    several = len(files.splits) > 1
    heads = [f"{column}, {split}" if several else column for split, column in columns]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(columns)]
    lines.append(f"| {INTERVALS} | " + " | ".join(interval_over(files, column) for _, column in columns) + " |")
    for line in score_table(files):
        style = SCORES.get(line["score"])
        entries = [_with_interval(line["score"], line["cells"].get(key)) for key in columns]
        lines.append(f"| {style.label if style else line['score']} | " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n"


def _markdown_of_rows(files: Files, table: Mapping[str, Any]) -> str:
    name = files.split_names[table["split"]]
    heads = [INTERVALS, *(SCORES[score].label if score in SCORES else score for score in table["scores"])]
    lines = [f"{name[0].upper()}{name[1:]}:", "", "| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for column, cells in table["lines"]:
        entries = [_with_interval(score, cells.get(score)) for score in table["scores"]]
        lines.append(f"| {column} | " + " | ".join([interval_over(files, column), *entries]) + " |")
    return "\n".join(lines) + "\n"


def latex(files: Files) -> str:
    """Return the score table as a LaTeX tabular (booktabs): rows of the study down, scores across; plain pdflatex."""
    known = [(split, score) for split in files.splits for score in files.scores]
    heads = [f"{SCORES[score].label if score in SCORES else score}, {split}" for split, score in known]
    lines = [f"\\begin{{tabular}}{{ll{'r' * len(known)}}}", r"\toprule", _latex_line(["", INTERVALS, *heads])]
    lines.append(r"\midrule")
    for row in files.rows:
        entries = [estimate(files.of(row), split, score) for split, score in known]
        cells = ["–" if v is None else _with_interval(score, v) for v, (_, score) in zip(entries, known, strict=True)]
        over = interval_over(files, row) if files.of(row) else ""
        lines.append(_latex_line([row, over, *cells]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(map(latex_text, cells)) + r" \\"


def latex_text(text: str) -> str:
    """Escape text for LaTeX: its own signs, and symbols that pdflatex does not know; letters with accents stay."""
    return text.replace(" – ", "–").translate(_LATEX)


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

    console = console or Console(width=None if Console().is_terminal else 130)
    for table in row_tables(files):
        shown_table = Table(
            title=f"study {files.study['name']}, {files.split_names[table['split']]}", title_justify="left"
        )
        shown_table.add_column("row", no_wrap=True)
        for score in table["scores"]:
            shown_table.add_column(SCORES[score].label if score in SCORES else score, justify="right")
        for column, cells in table["lines"]:
            entries = [shown(s, cells[s]["value"], unit=False) if s in cells else "" for s in table["scores"]]
            shown_table.add_row(column, *entries)
        console.print(shown_table)
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
    names = split_names(result.get("data", ""))
    for split in result["splits"]:
        table.add_column(names.get(split, split), justify="right")
    scores = list(dict.fromkeys(name for split in result["splits"].values() for name in split["scores"]))
    for name in [n for n in SCORES if n in scores] + [n for n in scores if n not in SCORES]:
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
    environment.filters["small_p"] = lambda p: "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
    environment.filters["breakable"] = _breakable
    environment.filters["ranged"] = ranged
    environment.filters["interval"] = lambda value, score: shown_interval(score, value["low"], value["high"])
    styles = plots.row_styles(files.rows)
    seeds, changed = len(files.study["seeds"]), _changed(files)
    claims = judge_claims(files)
    return environment.get_template("report.html.j2").render(
        files=files,
        study=files.study,
        row_styles=styles,
        split_names=files.split_names,
        varied=_varied(files, changed),
        equal=_equal(changed),
        row_tables=row_tables(files) if len(_columns(files)) > WIDE else [],
        styles=SCORES,
        verdict=verdict(files),
        seeds=seeds,
        columns=_columns(files),
        scores=score_table(files),
        claims=[(claim, for_new_prompts(files, claim)) for claim in claims],
        least_pairs=min(
            (c["seeds"][0] for c in claims if c["method"] == PAIRED and c["permutation"] is not None), default=0
        ),
        confounded=[row for row, kept in files.book["rows"].items() if kept["confounded"]],
        costs=cost_table(files),
        seconds_note=seconds_note(files),
        drawing_note=drawing_note(files),
        intervals=of_intervals(files),
        interval_over=lambda column: interval_over(files, column),
        budgets=equal_budgets(files),
        figures=figures(files, styles) if drawn is None else drawn,
        grids=grids(files),
        counts=_counts(files),
        curve_counts=pictures_of_curves(files),
        failed=[cell for cell in files.cells if cell.result is None or cell.status == "failed"],
        suite=files.study["suite"],
        study_yaml=yaml.safe_dump(files.study, sort_keys=False, width=100),
        stamp=json.dumps((files.judged[0].result or {})["stamp"], indent=2, ensure_ascii=False) if files.judged else "",
        environment=_environment(files),
        command=files.book.get("command", ""),
        started=files.book.get("started", ""),
    )


def _varied(files: Files, changed: Collection[str]) -> list[str]:
    """Return the fields of `varies` in which rows really differ; of two backbones the whole `model` does."""
    found = [
        field for field in files.study["varies"]
        if any(f"{path}.".startswith(f"{field}.") or f"{field}.".startswith(f"{path}.") for path in changed)
    ] or list(files.study["varies"])  # fmt: skip
    if "model.name" in found:
        return ["model", *(field for field in found if not field.startswith("model."))]
    return found


def _changed(files: Files) -> set[str]:
    """Return the dotted paths of all that rows set, a confounded row's among them."""
    trees = [*files.study["rows"].values()]
    for axis, values in files.study.get("factorial", {}).items():
        trees += list(values.values()) if isinstance(values, dict) else [{axis: values}]
    return {path for tree in trees for path in _leaves(tree)}


def _equal(changed: Collection[str]) -> list[str]:
    """Return what no row sets, in the words of the report."""
    sections = {path.split(".")[0] for path in changed if path not in LATENTS}
    differs = {
        "data": "data" in sections,
        "latents": any(path in LATENTS for path in changed),
        "text tokens": "encoders" in sections,
        "noise": False,
        "objective": "diffusion" in sections,
        "sampler": "sampling" in sections,
        "budget": "train" in sections,
    }
    return [name for name in differs if not differs[name]]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted paths of a tree's values."""
    found = []
    for key, value in tree.items():
        found += _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [f"{prefix}{key}"]
    return found


def _breakable(name: str) -> Any:
    """Let a row's name break behind its underscores, so that a narrow column does not cut it."""
    import markupsafe

    return markupsafe.Markup("_<wbr>").join(name.split("_"))


def _counts(files: Files) -> str:
    """Say on how many pictures the scores stand: "256 pictures a split", or one number a split where they differ."""
    splits = (files.judged[0].result or {})["splits"] if files.judged else {}
    numbers = {split: found["num_images"] for split, found in splits.items()}
    if len(numbers) == 1:
        return f"{next(iter(numbers.values()))} pictures"
    if len(set(numbers.values())) <= 1:
        return f"{next(iter(numbers.values()), 0)} pictures a split"
    return ", ".join(f"{number} pictures of {files.split_names[split]}" for split, number in numbers.items())


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
