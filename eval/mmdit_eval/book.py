"""`study.json`: the grid of a study, what each row costs, and what became of each cell. No torch.

`FORMAT` rises when a reader of the old files would misread the new ones. Older books are read as they are, with the
defaults of what they lack; newer ones are refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdit.config import ConfigError, StudyConfig, to_tree

FORMAT = 2  # 1 had no such field: studies of listed rows, each with a training of its own


class Book:
    """What is written of a study, after every change.

    Args:
        rows: what is kept of each row, as `Plan.describe` gives it.
    """

    def __init__(
        self, study_dir: Path, study: StudyConfig, rows: Mapping[str, Mapping[str, Any]], command: str
    ) -> None:
        from mmdit import __version__

        self.path = study_dir / "study.json"
        self.head = {
            "format": FORMAT,
            "mmdit_lab": __version__,
            "study": to_tree(study),
            "command": command,
            "rows": {row: dict(kept) for row, kept in rows.items()},
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self.cells: dict[str, dict[str, Any]] = {
            cell_name(row, seed): {"row": row, "seed": seed, "status": "waiting", "reason": ""}
            for row in rows
            for seed in study.seeds
        }
        for name, cell in self.cells.items():
            source = cell_name(rows[cell["row"]]["trained_as"], cell["seed"])
            if source != name:
                cell["trained_as"] = source
        self.write()

    def trained_as(self, name: str) -> str:
        """Return the cell whose networks this one uses: itself, unless it differs in sampling only."""
        return str(self.cells[name].get("trained_as", name))

    def mark(self, name: str, status: str, reason: str = "") -> None:
        self.cells[name].update(status=status, reason=reason)
        self.write()

    def write(self) -> None:
        from mmdit.checkpoint import write_whole  # torch, which those who only read a book do without

        write_whole(self.path, json.dumps({**self.head, "cells": self.cells}, indent=1))


def cell_name(row: str, seed: int) -> str:
    return f"{row}-s{seed}"


def read_book(file: Path) -> dict[str, Any]:
    """Read a study.json of this version or an older one, filled with what it lacks.

    Raises:
        FileNotFoundError: it is not there.
        ConfigError: it is not whole, or a newer version wrote it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; run the study first: python scripts/ablate.py configs/studies/...")
    try:
        book: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found = book.get("format", 1)
        missing = [part for part in ("study", "rows", "cells") if not isinstance(book[part], dict)]
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{file} is not a study's book ({error}); remove it and run the study again") from None
    if missing:
        raise ConfigError(f"{file} is not a study's book ({missing[0]} is no mapping); remove it, run the study again")
    if found > FORMAT:
        raise ConfigError(
            f"{file} was written by a newer version (format {found}, mmdit-lab {book.get('mmdit_lab', '?')}); this one "
            f"reads up to format {FORMAT}. Update, or give the study another --name"
        )
    # fields that a later version added stand at their defaults: the study was run without them
    defaults = to_tree(StudyConfig(name="x", base=Path("x"), rows={"x": {}}))
    old = {"varies": ["model"], "attention": None} if found < 2 else {}
    book["study"] = {**defaults, **old, **book["study"]}
    plain = {
        "backbone": "",
        "sampling": {},
        "confounded": [],
        "match": "",
        "evaluations": 0,
        "image_flops": 0,
        "data": "",
    }
    book["rows"] = {row: {**plain, "trained_as": row, **kept} for row, kept in book["rows"].items()}
    return book


def check_book(study_dir: Path) -> None:
    """Refuse to go on in a folder whose book this version cannot read.

    Raises:
        ConfigError: as `read_book`.
    """
    if (study_dir / "study.json").is_file():
        read_book(study_dir / "study.json")
