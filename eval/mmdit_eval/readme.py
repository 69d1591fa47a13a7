"""The README's results, made from `results/*/summary.json`: no number in it was typed by hand.

`store_study` copies a finished study there: its numbers, curves, pictures and report, without weights and caches. The
`# Found:` lines in the heads of `configs/studies/*.yaml` are made from the same files.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdit_eval.findings import ranged, read_study
from mmdit_eval.scores import SCORES, SPLITS, Score, shown, shown_interval

# which scores fit into a README, by what the study has
_CHOSEN = ("colour", "shape", "relation", "all_correct", "same_tone", "same_base", "clip_score", "frechet")
_BESIDE = ("all_correct", "clip_score", "frechet")  # beside the claimed scores of a study with verdicts
_LEADING = "injection"  # the study of the project's own question
_FOUND = "# Found:"
_WITH_INTERVAL = ("all_correct", "same_tone", "same_base")


def store_study(folder: str | Path, results: str | Path) -> Path:
    """Copy what a study found to `results`/<its name>, replacing what was there, and return that folder.

    Everything the report is made from is copied, so that `ablate.py --report-only` works there too; weights, caches
    and pictures that it does not show, of earlier checkpoints and of other seeds than a row's first, are not.

    Raises:
        FileNotFoundError: the folder holds no finished study.
        ConfigError: its study.json is not whole, or was written by a newer version.
        ValueError: the study's name is no plain folder name, or it is stored there already.
    """
    folder, results = Path(folder), Path(results)
    if not (folder / "summary.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no summary.json; finish the study first: python scripts/ablate.py STUDY.yaml"
        )
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    out = results / summary["study"]
    if out.resolve().parent != results.resolve():
        raise ValueError(f"the study's name {summary['study']!r} is no folder name")
    if out.resolve() == folder.resolve():
        raise ValueError(f"{folder} is where this study is stored already; give the folder under runs/")
    temporary = results / f".{out.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    top = ("summary.json", "study.json", "ceiling.json", "ceiling/*.png", "report.html", "table.*", "*.png")
    of_a_cell = ("attention.json", "config.yaml", "metrics.jsonl", "environment.json", "eval/*.json")
    patterns = [*top, *(f"*/{name}" for name in of_a_cell)]
    shown = [cell.pictures for cell in read_study(folder).shown if cell.pictures is not None]
    patterns += [f"{pictures.relative_to(folder)}/*.png" for pictures in shown]
    for file in sorted(found for pattern in patterns for found in folder.glob(pattern)):
        target = temporary / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    return out


def results_block(results: str | Path) -> str:
    """Return the Markdown between the markers: one picture, then one table a study.

    Studies whose claims were tested over seeds come first, each kind in alphabetical order but for the one that the
    project is about; the picture is the first's.
    """
    summaries = {file: json.loads(file.read_text("utf-8")) for file in sorted(Path(results).glob("*/summary.json"))}
    files = sorted(summaries, key=lambda file: (not _tested(summaries[file]), file.parent.name != _LEADING))
    pictures = [picture for file in files if (picture := file.parent / "grid-heldout.png").is_file()]
    words = "Held-out combinations: true, through the VAE, and as each row drew them from the same prompts and noise"
    parts = [f"![{words}]({picture.as_posix()})" for picture in pictures[:1]]
    parts += [study_block(summaries[file], file.parent) for file in files]
    return "\n\n".join(parts) if parts else "No study has been stored under `results/` yet."


def study_block(summary: Mapping[str, Any], folder: Path) -> str:
    """Return one study: heading, what was found, table, what it does not say.

    A study whose claims were tested over seeds shows the splits that were claimed; one without tests shows all.
    """
    scores, rows = summary["scores"], summary["rows"]
    tested = _tested(summary)
    known = {name for splits in scores.values() for split in splits.values() for name in split}
    claimed = {claim["score"] for claim in tested}
    wanted = [name for name in SCORES if name in claimed | set(_BESIDE)] if tested else _CHOSEN
    chosen = [name for name in wanted if name in known]
    splits = list(next(iter(scores.values()), {}))
    lines = [f"**[{summary['study']}]({folder.as_posix()})** (`{summary['command']}`)", ""]
    for sentence in found_sentences(summary):
        lines += [f"- {sentence}"]
    lines += [""] if tested else []
    heads = ["", *(SCORES[name].label for name in chosen), "parameters", "images", "training s"]
    for split in splits:
        if tested and split not in {claim["split"] for claim in tested}:
            continue
        name = summary.get("split_names", SPLITS)[split]
        lines.append(f"{name[0].upper()}{name[1:]}:")
        lines += ["", "| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
        for row in [*rows, "ceiling", "chance"]:
            found = scores.get(row, {}).get(split, {})
            if not found:
                continue
            intervals = claimed | set(_WITH_INTERVAL)
            name_of_row = row if row not in rows else _with_seeds(row, rows)
            entries = [
                name_of_row,
                *(_entry(name, found.get(name), intervals) for name in chosen),
                *_costs(rows.get(row)),
            ]
            lines.append("| " + " | ".join(entries) + " |")
        lines.append("")
    plain = [sentence for sentence in summary["verdict"] if sentence.startswith(("One seed", "The rows"))]
    lines += [*summary.get("caveats", plain), *filter(None, [summary["seconds_note"]])]
    return "\n".join(lines).rstrip()


def _tested(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [claim for claim in summary.get("claims", ()) if claim["p"] is not None]


# --- what was found, in words -------------------------------------------------------------------------------------


def found_sentences(summary: Mapping[str, Any]) -> list[str]:
    """Say what became of the claims that were tested over seeds: one sentence for each score, split and reference."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for claim in _tested(summary):
        groups.setdefault((claim["score"], claim["split"], claim["second"]), []).append(claim)
    names = summary.get("split_names", SPLITS)
    return [_group_in_words(key, claims, names[key[1]]) for key, claims in groups.items()]


def _group_in_words(key: tuple[str, str, str], claims: Sequence[Mapping[str, Any]], where: str) -> str:
    """One score on one split against one row: who is better, who is worse, where nothing was shown."""
    style = SCORES.get(key[0], Score(key[0], +1))
    seeds = sorted({count for claim in claims for count in claim["seeds"]})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    parts = []
    for verdict, words in (
        ("first", "better"),
        ("second", "worse"),
        ("none", "no difference shown after correction for"),
    ):
        group = [claim for claim in claims if claim["verdict"] == verdict]
        group.sort(key=lambda claim: -abs(claim["value"]))
        if group:
            parts.append(f"{words} " + ", ".join(f"{c['first']} {_difference(c, style)}" for c in group))
    could = sorted(style.factor * c["detectable"] for c in claims if c["verdict"] == "none" and c["detectable"])
    if could:
        ends = [f"{could[0]:.{style.digits}f}", f"{could[-1]:.{style.digits}f}"]
        parts.append(f"this study could have shown {' to '.join(dict.fromkeys(ends))}")
    label = style.noun or style.label
    unit = " in points" if style.unit == "%" else ""
    head = f"{label[0].upper()}{label[1:]}, {where}, against {key[2]}{unit} ({count} seeds, 95 % intervals)"
    return f"{head}: {'; '.join(parts)}."


def _difference(claim: Mapping[str, Any], style: Score) -> str:
    ends = [f"{style.factor * claim[key]:+.{style.digits}f}".replace("-", "−") for key in ("value", "low", "high")]
    return f"{ends[0]} [{ends[1]} to {ends[2]}]"


def found_line(summary: Mapping[str, Any]) -> str:
    """Return what stands behind `# Found:` in a study's YAML."""
    sentences = found_sentences(summary)
    if not sentences:
        sentences = [sentence for sentence in summary["verdict"] if not sentence.startswith("One seed")][:1]
    return " ".join([*sentences, *summary.get("caveats", ())]) or "no cell has been judged."


def rewrite_found(text: str, found: str) -> str:
    """Return a study's YAML with the `# Found:` line of its head, and what it goes on with, replaced.

    A file without such a line stays as it is.
    """
    lines = text.split("\n")
    start = next((i for i, line in enumerate(lines) if line.startswith(_FOUND)), None)
    if start is None:
        return text
    end = start + 1
    while end < len(lines) and lines[end].startswith("#  "):  # indented: goes on; `# Command:` does not
        end += 1
    wrapped = textwrap.wrap(
        found, 118, initial_indent=f"{_FOUND} ", subsequent_indent="#" + " " * len(_FOUND), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join([*lines[:start], *wrapped, *lines[end:]])


def stale_heads(results: str | Path, studies: str | Path) -> dict[Path, str]:
    """Return the study files whose `# Found:` is not what the stored results say: {file: its text as it should be}."""
    stale = {}
    for file in sorted(Path(results).glob("*/summary.json")):
        summary = json.loads(file.read_text(encoding="utf-8"))
        study = Path(studies) / f"{summary['study']}.yaml"
        if study.is_file():
            old = study.read_text(encoding="utf-8")
            new = rewrite_found(old, found_line(summary))
            if new != old:
                stale[study] = new
    return stale


def _entry(name: str, value: Mapping[str, Any] | None, with_interval: Collection[str]) -> str:
    if value is None:
        return "–"
    interval = shown_interval(name, value["low"], value["high"]) if name in with_interval else ""
    return shown(name, value["value"]) + (f" [{interval}]" if interval else "")


def _with_seeds(row: str, rows: Mapping[str, Any]) -> str:
    """Return a row's name, with its seeds where rows have different numbers of them."""
    if len({line["seeds"] for line in rows.values()}) == 1:
        return row
    seeds = rows[row]["seeds"]
    return f"{row} ({seeds} seed{'' if seeds == 1 else 's'})"


def _costs(row: Mapping[str, Any] | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    seconds, ends = ranged(row["seconds"], row["seconds_range"])
    return [
        f"{row['parameters'] / 1e6:.2f} M",
        f"{row['images']:,}" if row["images"] else "–",
        f"{seconds} [{ends}]" if ends else seconds,
    ]


def markers(name: str) -> tuple[str, str]:
    """Return the lines between which a command writes the block of that name into a page."""
    return f"<!-- {name}:start -->", f"<!-- {name}:end -->"


def rewrite(text: str, block: str, name: str = "results") -> str:
    """Return a page's text with the block between its markers `<!-- name:start -->` and `<!-- name:end -->` replaced.

    Raises:
        ValueError: a marker is missing or stands twice.
    """
    start, end = markers(name)
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"the page has no markers {start} and after it {end}, once each")
    before, rest = text.split(start)
    return f"{before}{start}\n{block}\n{end}{rest.split(end)[1]}"
