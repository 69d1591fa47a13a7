"""The claims of a study, stated in its YAML before it runs, and what became of them: tests, intervals, sentences.

A claim is (row, reference row, split, score). Its unit is the training seed; all claims of a study are corrected
together. Beside each verdict stands what a mixed model says about new prompts, which decides nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from mmdit_eval.comparison import check_comparable, compare
from mmdit_eval.findings import Cell, Files, ceiling_value, estimate
from mmdit_eval.mixed import common_table, mixed_difference
from mmdit_eval.scores import SCORES, Score, shown, shown_interval
from mmdit_eval.verdicts import PAIRED, Difference, decide, difference, sentence

_PARTNERS_LEFT_OUT = 3  # the protocol from which kernel distances leave out pairs of one prompt
FEW = 4  # above so many rows the verdict does not repeat each row's value
_ORDER = ("first", "second", "none", "no spread", "one seed")


def claimed_scores(files: Files) -> list[str]:
    """Return the scores that the study gives verdicts on: those it names and measured, or its headline."""
    named = files.study["claims"]["scores"]
    if named:
        return [score for score in named if score in files.scores]
    return [score for score in (files.headline,) if score is not None]


def pairs_of_rows(files: Files) -> list[tuple[str, str]]:
    """Return (row, reference) of every comparison that the study states, whether or not its cells are judged."""
    against = files.study["claims"]["against"]
    if against == "all":
        return [(b, a) for a, b in itertools.combinations(files.rows, 2)]
    reference = against or (files.study["match"] or {}).get("reference") or next(iter(files.rows), None)
    return [(row, reference) for row in files.rows if row != reference] if reference in files.rows else []


def claimed_splits(files: Files) -> list[str]:
    """Return the splits that the study gives verdicts on: those it names and judged, or all."""
    return [split for split in files.study["claims"]["splits"] or files.splits if split in files.splits]


def stated_claims(files: Files) -> list[tuple[str, str, str, str]]:
    """Return (row, reference, split, score) of every claim, those of cells that are missing too."""
    claims = itertools.product(pairs_of_rows(files), claimed_splits(files), claimed_scores(files))
    return [(first, second, split, score) for (first, second), split, score in claims]


def judge_claims(files: Files) -> list[Difference]:
    """Test every claim whose cells are judged and correct all together; none where the stamps forbid a comparison."""
    if incomparable(files):
        return []
    found, stated = [], stated_claims(files)
    for first, second, split, score in stated:
        a, b = (_values(files.of(row), split, score) for row in (first, second))
        if a and b:
            names = {"first": first, "second": second, "split": split, "score": score}
            found.append({**difference(a, b, pairs=paired_by_design(files, first, second)), **names})
    return decide(found, stated=len(stated))


def paired_by_design(files: Files, first: str, second: str) -> bool:
    """Follow the study's own rule, which knows no result."""
    rule = files.study["claims"]["pairs"]
    if rule == "auto":
        return bool(files.book["rows"][first]["trained_as"] == files.book["rows"][second]["trained_as"])
    return bool(rule == "seeds")


def _values(cells: Sequence[Cell], split: str, score: str) -> dict[int, float]:
    """{seed: value} of a row."""
    found = {}
    for cell in cells:
        value = (cell.result or {})["splits"].get(split, {}).get("scores", {}).get(score)
        if value is not None:
            found[cell.seed] = float(value["value"])
    return found


def for_new_prompts(files: Files, claim: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the mixed model's test of a claim; None where pictures are not scored one by one or seeds are too few."""
    rows = [{cell.seed: cell for cell in files.of(claim[row])} for row in ("first", "second")]
    pairs = claim["method"] == PAIRED
    tables = []
    for cells in rows:
        seeds = sorted(set.intersection(*map(set, rows))) if pairs else list(cells)
        results = [(cells[seed].result or {})["splits"].get(claim["split"], {}) for seed in seeds]
        lists = [result.get("per_image", {}).get(claim["score"]) for result in results]
        if len(lists) < 2 or any(values is None for values in lists):
            return None
        tables.append(lists)
    try:
        first, second = common_table(tables)
        return dict(mixed_difference(first, second, pairs=pairs))
    except ValueError:
        return None  # other prompts, or scores without any spread


# --- in words ---------------------------------------------------------------------------------------------------


def verdict(files: Files) -> list[str]:
    """Say in sentences what the numbers allow, and what they do not; what was found comes first."""
    if files.headline is None or not files.judged:
        return ["No cell of this study has been judged yet."]
    values = []
    if len(files.rows) <= FEW:  # of more rows the table says it better
        values = [_values_in_words(files, score, split) for score in claimed_scores(files) for split in files.splits]
    problem = incomparable(files)
    if problem:
        return [f"The rows are not comparable: {problem}", *values]
    claims = judge_claims(files)
    ordered = sorted(claims, key=lambda claim: _ORDER.index(claim["verdict"]))
    sentences = [_sentence(files, claim) for claim in ordered]
    return [*sentences, *_limits(files, claims), *values, *_warnings(files), *_of_before(files)]


def caveats(files: Files) -> list[str]:
    """Say in sentences what a reader of the verdict must know beside it; part of `verdict`."""
    if not files.judged:
        return []
    problem = incomparable(files)
    if problem:
        return [f"The rows are not comparable: {problem}"]
    return [*_limits(files, judge_claims(files)), *_warnings(files)]


def _limits(files: Files, claims: Sequence[Difference]) -> list[str]:
    """Say what few seeds and many comparisons mean."""
    found = []
    if min(len(files.of(row)) for row in files.rows if files.of(row)) < 2:
        found.append(
            "One seed ranks nothing: the intervals cover the chance of prompts and noise, not that of training. "
            "Another seed may turn the order round."
        )
    tested, stated = sum(claim["p"] is not None for claim in claims), len(stated_claims(files))
    if tested and stated > 1:
        words = f"{stated} comparisons were stated beforehand and are corrected together (Holm); intervals are not."
        missing = f" {stated - tested} of them could not be tested and still count." if tested < stated else ""
        found.append(words + missing)
    return found


def _sentence(files: Files, claim: Difference) -> str:
    """One claim in words; of single seeds with the interval between samples, where pictures pair."""
    if claim["verdict"] == "one seed":
        a, b = ({cell.seed: cell for cell in files.of(claim[row])} for row in ("first", "second"))
        both = sorted(set(a) & set(b))
        found = compare(a[both[0]].result or {}, b[both[0]].result or {}, varies(files)) if both else {}
        between = found.get(claim["split"], {}).get(claim["score"])
        if len(a) == len(b) == 1 and between is not None and between["low"] is not None:
            style = SCORES.get(claim["score"], Score(claim["score"], +1))
            signed = f"{style.factor * between['value']:+.{style.digits}f}".replace("-", "−")
            points = " points" if style.unit == "%" else ""
            interval = shown_interval(claim["score"], between["low"], between["high"])
            names = f"{claim['first']} minus {claim['second']} in {style.label}, {files.split_names[claim['split']]}"
            return f"{names}: {signed}{points} [{interval}], 1 seed: between samples only."
    return sentence(claim, files.split_names[claim["split"]])


def _values_in_words(files: Files, score: str, split: str) -> str:
    parts = []
    for row in files.rows:
        value = estimate(files.of(row), split, score)
        if value is not None:
            interval = shown_interval(score, value["low"], value["high"])
            parts.append(f"{row} {shown(score, value['value'])}" + (f" [{interval}]" if interval else ""))
    top = ceiling_value(files, split, score)
    limit = f"; true pictures through the VAE: {shown(score, top)}" if top is not None else ""
    label = SCORES[score].label if score in SCORES else score
    return f"{label[0].upper()}{label[1:]}, {files.split_names[split]}: {', '.join(parts)}{limit}."


def _warnings(files: Files) -> list[str]:
    """What a reader must know beside the verdicts."""
    found = []
    codes = {(cell.result or {}).get("environment", {}).get("code") for cell in files.judged}
    if len(codes) > 1:
        found.append(f"Cells were judged by {len(codes)} versions of the code; judge them again to be sure.")
    for row, kept in files.book["rows"].items():
        if kept["confounded"]:
            found.append(
                f"{row} is confounded: it differs from the reference in {', '.join(kept['confounded'])} too, so its "
                f"differences have no one cause."
            )
    found += _little_to_subtract(files)
    for cell in files.judged:
        judged = (cell.result or {})["images_seen"]
        trained = max((record["images_seen"] for record in cell.records("train")), default=0)
        if judged < trained:
            found.append(
                f"{cell.folder.name} was judged at {judged:,} of its {trained:,} images: what came later does not "
                f"verify or was not judged. It does not compare with cells that were judged at their end."
            )
    unmeasured = [score for score in files.study["claims"]["scores"] if score not in files.scores]
    if unmeasured:
        found.append(f"Claimed and not measured on this data: {', '.join(unmeasured)}.")
    missing = [cell.folder.name for cell in files.cells if cell.result is None]
    if missing:
        found.append(f"Not judged: {', '.join(missing)}.")
    return found


def _little_to_subtract(files: Files) -> list[str]:
    """Name the rows whose negative text, the run's null, has hardly a token to subtract."""
    little = {"sampling.negative_guidance": "kv_subtract", "encoders.padding": "mask"}
    stamps = {cell.row: (cell.result or {}).get("stamp", {}).get("inference", {}) for cell in files.judged}
    rows = [row for row, stamp in stamps.items() if all(stamp.get(key) == value for key, value in little.items())]
    if not rows:
        return []
    return [
        f"The negative text of {', '.join(rows)} is the run's null, which has one or two tokens a stream: kv_subtract "
        f"leaves the prompt's others as they are."
    ]


def _of_before(files: Files) -> list[str]:
    """Name the scores that today's code would measure otherwise."""
    results = [cell.result or {} for cell in files.judged]
    version = min(result.get("stamp", {}).get("protocol", {}).get("version", 0) for result in results)
    measured = {name for result in results for split in result["splits"].values() for name in split["scores"]}
    if version >= _PARTNERS_LEFT_OUT or "kernel" not in measured:
        return []
    return [
        f"Kernel distances are those of protocol {version}, which counts a picture with the true picture of its own "
        f"prompt: they are too low, by about 2/N of that kernel, so a value below zero says nothing."
    ]


def varies(files: Files) -> list[str]:
    """Return the fields in which stamps may differ: the study's own, the steps that it solved, what it let through."""
    allowed = [field for kept in files.book["rows"].values() for field in kept["confounded"]]
    return [*files.study["varies"], *(["sampling.num_steps"] if files.study["equal_flops"] else []), *allowed]


def incomparable(files: Files) -> str | None:
    """Say why the study's results may not be compared; None where they may."""
    for cell in files.judged[1:]:
        try:
            check_comparable(files.judged[0].result or {}, cell.result or {}, varies(files))
        except ValueError as error:
            return str(error)
    return None
