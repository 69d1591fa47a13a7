"""The README's results, made from `results/*/summary.json`: no number in it was typed by hand.

`store_study` copies a finished study there: its numbers, curves, pictures and report, without weights and caches.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdit_eval.scores import SCORES, shown, shown_interval

START, END = "<!-- results:start -->", "<!-- results:end -->"
# which scores fit into a README, by what the study has
_CHOSEN = ("colour", "shape", "relation", "all_correct", "same_tone", "same_base", "clip_score", "frechet")
_WITH_INTERVAL = ("all_correct", "same_tone", "same_base")


def store_study(folder: str | Path, results: str | Path) -> Path:
    """Copy what a study found to `results`/<its name>, replacing what was there, and return that folder.

    Everything the report is made from is copied, so that `ablate.py --report-only` works there too; weights, caches
    and the pictures of earlier checkpoints are not.

    Raises:
        FileNotFoundError: the folder holds no finished study.
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
    for cell in summary["cells"]:
        final = max((path.stem for path in (folder / cell / "eval").glob("*.json")), default=None)
        patterns += [f"{cell}/samples/{final}/*.png"] if final else []
    for file in sorted(found for pattern in patterns for found in folder.glob(pattern)):
        target = temporary / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    return out


def results_block(results: str | Path) -> str:
    """Return the Markdown between the markers: one picture, then one table a study, in alphabetical order."""
    files = sorted(Path(results).glob("*/summary.json"))
    pictures = [picture for file in files if (picture := file.parent / "grid-heldout.png").is_file()]
    words = "Held-out combinations: true, through the VAE, and as each row drew them from the same prompts and noise"
    parts = [f"![{words}]({picture.as_posix()})" for picture in pictures[:1]]
    for file in files:
        parts.append(study_block(json.loads(file.read_text(encoding="utf-8")), file.parent))
    return "\n\n".join(parts) if parts else "No study has been stored under `results/` yet."


def study_block(summary: Mapping[str, Any], folder: Path) -> str:
    """Return one study: heading, table, what it does not say."""
    scores, rows = summary["scores"], summary["rows"]
    known = {name for splits in scores.values() for split in splits.values() for name in split}
    chosen = [name for name in _CHOSEN if name in known]
    splits = list(next(iter(scores.values()), {}))
    lines = [f"**[{summary['study']}]({folder.as_posix()})** (`{summary['command']}`)", ""]
    heads = ["", *(SCORES[name].label for name in chosen), "parameters", "images", "training s"]
    for split in splits:
        lines.append(f"{'Seen' if split == 'seen' else 'Held-out'} combinations:")
        lines += ["", "| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
        for row in [*rows, "ceiling", "chance"]:
            found = scores.get(row, {}).get(split, {})
            if not found:
                continue
            entries = [row, *(_entry(name, found.get(name)) for name in chosen), *_costs(rows.get(row))]
            lines.append("| " + " | ".join(entries) + " |")
        lines.append("")
    lines += [sentence for sentence in summary["verdict"] if sentence.startswith(("One seed", "The rows"))]
    return "\n".join(lines).rstrip()


def _entry(name: str, value: Mapping[str, Any] | None) -> str:
    if value is None:
        return "–"
    interval = shown_interval(name, value["low"], value["high"]) if name in _WITH_INTERVAL else ""
    return shown(name, value["value"]) + (f" [{interval}]" if interval else "")


def _costs(row: Mapping[str, Any] | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    seconds = row["seconds"]
    return [
        f"{row['parameters'] / 1e6:.2f} M",
        f"{row['images']:,}" if row["images"] else "–",
        f"{seconds:,.0f}" if seconds else "–",
    ]


def rewrite(text: str, block: str) -> str:
    """Return a README's text with the block between its markers replaced.

    Raises:
        ValueError: a marker is missing or stands twice.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"the README needs {START} and after it {END}, once each")
    before, rest = text.split(START)
    return f"{before}{START}\n{block}\n{END}{rest.split(END)[1]}"
