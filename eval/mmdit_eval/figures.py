"""The report's figures and sample grids, collected from a study's files; `plots` draws them."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmdit_eval import plots
from mmdit_eval.findings import (
    Files,
    ceiling_value,
    estimate,
    of_intervals,
    pictures_of_curves,
    seconds_note,
    spent,
)
from mmdit_eval.plots import RowStyle
from mmdit_eval.scores import SCORES
from mmdit_eval.statistics import Estimate
from mmdit_eval.words import repeated, shown_words

# the one number that says how strong a kind of guidance is
STRENGTHS = {
    "cfg": ("guidance_scale",),
    "skip_layer": ("skip_layer", "scale"),
    "kv_subtract": ("kv_subtract", "weight"),
    "nag": ("nag", "scale"),
}


def figures(files: Files, styles: Mapping[str, RowStyle]) -> list[dict[str, str]]:
    """Draw the figures that the files allow: [{"title", "note", "png", "width"}], the width as the page shows it."""
    drawn = []
    of_seconds = seconds_note(files)
    headline = [name for name in (files.headline,) if name]
    for score in [*headline, *(s for s in ("frechet",) if s in files.scores and s not in headline)]:
        by_images, by_flops, by_seconds = (_curves(files, score, axis) for axis in ("images", "flops", "seconds"))
        if not any(len(points) > 1 for curves in by_images.values() for seeds in curves.values() for points in seeds):
            continue
        ceiling = {s: v for s in _drawn_splits(files) if (v := ceiling_value(files, s, score)) is not None}
        if files.study["suite"]["snapshot_images"] and score in ("frechet",):
            ceiling = {}  # measured on more pictures, which lowers a Fréchet distance: no line beside these curves
        label = SCORES[score].label
        title = f"{label[0].upper()}{label[1:]} against images, FLOPs and seconds"
        note = (
            f"Each point: {pictures_of_curves(files)} of one checkpoint. An update takes three times the FLOP of its "
            f"forward. Seconds are training steps alone, on this machine.{_of_splits(files)} {of_seconds}"
        )
        png = plots.score_figure(score, by_images, by_flops, by_seconds, ceiling, styles, files.split_names)
        drawn.append({"title": title, "note": note.strip(), "png": png})
    training: dict[str, list[Any]] = {}
    levels: dict[str, dict[str, list[Any]]] = {"seen": {}, "heldout": {}}
    for cell in files.cells:
        records = cell.records("train")
        if records:
            values = [r["images_seen"] for r in records], [r["loss"] for r in records]
            training.setdefault(cell.row, []).append(values)
    for cell in files.judged:
        for split in _drawn_splits(files):
            curve = _loss_by_level((cell.result or {})["splits"][split]["details"], files.one_target)
            if curve:
                levels[split].setdefault(cell.row, []).append(curve)
    if training or any(levels.values()):
        drawn.append(_losses(files, styles, training, levels))
    drawn += [*_by_attribute(files, styles), *_guidance(files, styles), *_attention(files)]
    return [{**figure, "width": f"{plots.css_width(figure['png'])}px"} for figure in drawn]


def _losses(
    files: Files, styles: Mapping[str, RowStyle], training: Mapping[str, Any], levels: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """Draw the losses: in training, and of validation at each t."""
    name = "validation loss" if files.one_target else "velocity loss"
    title, notes = "Training loss against images", []
    if any(levels.values()):
        title += f", and {name} at each t"
        notes.append("Validation: the averaged weights on true pictures, the same noise for every row.")
    if not files.one_target:
        notes.append("Rows were trained on different targets, whose training losses are different numbers.")
        if any(levels.values()):
            notes.append("The velocity loss is one error for all, at t of equal ratios of noise to data.")
    png = plots.loss_figure(training, levels["seen"], styles, levels["heldout"], files.split_names, name)
    which = _of_splits(files) if any(levels.values()) else ""
    return {"title": title, "note": " ".join(notes) + which, "png": png}


def _loss_by_level(details: Mapping[str, Any], one_target: bool) -> tuple[list[float], list[float]] | None:
    """Return (t, loss) of one result: of the common loss, in the t of rectified flow, where targets differ."""
    if one_target:
        return (details["levels"], details["loss_by_level"]) if "loss_by_level" in details else None
    found = {float(ratio): loss for ratio, loss in details.get("common_loss_by_ratio", {}).items()}
    return ([ratio / (1 + ratio) for ratio in found], list(found.values())) if found else None


def _drawn_splits(files: Files) -> list[str]:
    """Return the splits whose curves are drawn: of many rows those of the last one alone, the held-out combinations."""
    return files.splits if len(files.rows) <= plots.FEW else files.splits[-1:]


def _of_splits(files: Files) -> str:
    """Say which split stands in a figure, where one was left out, and what a line is where seeds were averaged."""
    drawn = _drawn_splits(files)
    name = "" if len(drawn) == len(files.splits) else f" {files.split_names[drawn[0]].capitalize()} only."
    several = len(files.study["seeds"]) > 1
    return name + (" Lines: means over seeds." if several and len(files.rows) > plots.FEW else "")


def _by_attribute(files: Files, styles: Mapping[str, RowStyle]) -> list[dict[str, str]]:
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
    note = f"95 % intervals {of_intervals(files)}."
    png = plots.attribute_figure(values, styles, labels, files.split_names)
    return [{"title": "Accuracy by attribute", "note": note, "png": png}]


def _attention(files: Files) -> list[dict[str, str]]:
    """Draw which image tokens read which word, row by row, where it was recorded: the same words in every row."""
    found: dict[str, list[Any]] = {}
    words: list[str] = []
    for row in files.rows:
        file = next(
            (c.folder / "attention.json" for c in files.of(row) if (c.folder / "attention.json").is_file()), None
        )
        if file is not None:
            stored = json.loads(file.read_text(encoding="utf-8"))
            found[row], words = stored["prompts"], stored["settings"]["config"]["words"]
    drawn = []
    for i in range(min((len(prompts) for prompts in found.values()), default=0)):
        maps = {row: prompts[i]["maps"] for row, prompts in found.items()}
        if any(maps.values()):
            first = next(iter(found.values()))[i]
            shown, left_out = shown_words(first["caption"], words)
            drawn.append(
                {
                    "title": f"What is read from: {first['caption']}",
                    "note": _attention_note(first, maps, shown, left_out) + _sums_note(files, list(maps)),
                    "png": plots.map_figure(maps, shown),
                }
            )
    return drawn


def _attention_note(
    prompt: Mapping[str, Any], maps: Mapping[str, Mapping[str, Any]], shown: Sequence[str], left_out: int
) -> str:
    """Say what the maps are, what their colours mean, and what is not shown."""
    note = (
        f"The true picture at t = {prompt['t']}, mean over heads and blocks: the share of an image token's attention "
        f"that goes to the word, on one colour scale (by its square root) for all words and rows."
    )
    if any(word not in found for found in maps.values() for word in shown):
        note += " Not read: the row's text is cut off before the word, or it reads no text tokens."
    twice = repeated(prompt["caption"], shown)
    if twice:
        note += f" Of {', '.join(twice)}, which stand{'s' if len(twice) == 1 else ''} more than once, the first place."
    if left_out:
        note += f" Left out: {left_out} other word{'s' if left_out > 1 else ''} of the caption."
    return note


def _sums_note(files: Files, rows: Sequence[str]) -> str:
    """Say which rows' shares add up to more than one."""
    several = [row for row in rows if files.injections[row] == "decoupled"]
    if not several:
        return ""
    return f" In {' and '.join(several)} each stream of text has an attention of its own, whose shares add up to 1."


def _guidance(files: Files, styles: Mapping[str, RowStyle]) -> list[dict[str, str]]:
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
                scale, rest = _strength(sampling)
                curve = json.dumps([files.book["rows"][row]["trained_as"], rest]) if rest else None
                points.append({"row": row, "label": row, "split": split, "scale": scale, "curve": curve, **found})
    if not points:
        return []
    note = (
        f"Up and to the left is better. Crosses are 95 % intervals, {of_intervals(files)}; a line joins strengths of "
        f"one kind of guidance on one network, all else equal."
    )
    png = plots.guidance_figure(points, (x, y), styles, files.split_names)
    return [{"title": "What guidance buys, and what it costs", "note": note, "png": png}]


def _strength(sampling: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Return how strong a row's guidance is, and all else that decides its pictures; (0, None) without guidance."""
    kind = sampling.get("negative_guidance", "cfg")
    if kind not in STRENGTHS:
        return 0.0, None
    rest = {
        name: dict(value) if isinstance(value, Mapping) else value
        for name, value in sampling.items()
        if name not in STRENGTHS or name == kind  # what belongs to other kinds has no effect
    }
    if kind in ("nag", "kv_subtract"):
        rest.pop("guidance_scale", None)
    *path, last = STRENGTHS[kind]
    place: dict[str, Any] = rest
    for name in path:
        place = place[name]
    return float(place.pop(last, 0.0)), {**rest, "negative_guidance": kind}


def _curves(files: Files, score: str, axis: str) -> dict[str, dict[str, list[list[tuple[float, float]]]]]:
    found: dict[str, dict[str, list[list[tuple[float, float]]]]] = {}
    for split in _drawn_splits(files):
        for cell in files.judged:
            points = [
                (cost, splits[split]["scores"][score]["value"])
                for cost, splits in spent(files, cell, axis)
                if score in splits.get(split, {}).get("scores", {})
            ]
            if points and np.isfinite(points).all():
                found.setdefault(split, {}).setdefault(cell.row, []).append(points)
    return found


def grids(files: Files) -> list[dict[str, Any]]:
    """Collect the sample grid: the same prompts and noise in every row, beside the true picture and the ceiling."""
    found = []
    firsts = files.shown
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
                right = (cell.result or {})["splits"][split]["per_image"].get("all_correct")
                mark = "" if right is None or right[i] is None else ("right" if right[i] else "wrong")
                assert cell.pictures is not None
                picture = _picture(cell.pictures / f"{split}-{i:03d}.png")
                pictures.append((f"{cell.row} {mark}".strip(), picture))
            lines.append({"prompt": prompt, "pictures": pictures})
        heads = ["true", "VAE", *(cell.row for cell in firsts)]
        found.append({"split": split, "heads": heads, "lines": lines})
    return found


def _picture(path: Path) -> str | None:
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else None
