"""A study: rows x seeds, each trained as its own process, all judged by one suite, then one report.

    python scripts/ablate.py configs/studies/quickstart.yaml

Everything lies in `runs/<study>/`: `study.json` (the grid and what became of each cell), one run folder a cell,
`cache/` (latents and text states, encoded once for all), the ceiling, `report.html`. The same command goes on where
it was interrupted: finished cells are skipped, begun ones resumed.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmdit.config import RunConfig, StudyConfig, differences, load_config, load_study, row_configs, to_tree, to_yaml
from mmdit_eval import executor

Say = Callable[[str], None]


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; everything finished so far is on disk."""


def run_study(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    out: str | Path = "runs",
    dry_run: bool = False,
    say: Say = print,
) -> int:
    """Train, judge and report a study; return the exit code (0 all cells done, 1 some failed).

    Args:
        path: the study's YAML.
        overrides: dotted command-line words laid on the study (`--seeds [0,1,2]`, `--overrides.train.images 64000`).
        out: folder in which the study's own folder is made.
        dry_run: print the grid with parameters, FLOPs and steps, and stop.

    Raises:
        ConfigError, FileNotFoundError: the study, its base or its data cannot be used; nothing has been trained.
        StudyInterrupted: stopped by hand; run the same command again.
    """
    study = load_study(path, overrides)
    cells = row_configs(study)

    from mmdit_eval.cost import check_match, cost_of  # torch from here on
    from mmdit_eval.suite import check_suite

    first = {row: next(iter(configs.values())) for row, configs in cells.items()}
    for config in first.values():
        check_suite(study.suite, config)
    costs = {row: cost_of(config) for row, config in first.items()}
    mismatch = check_match(costs, study.match.within) if study.match is not None else None
    print_grid(study, cells, costs)
    if mismatch:
        from mmdit.config import ConfigError

        raise ConfigError(f"{path}: {mismatch}")
    if dry_run:
        return 0

    study_dir = Path(out) / study.name
    study_dir.mkdir(parents=True, exist_ok=True)
    book = Book(
        study_dir, study, cells, costs, command=shlex.join(["python", "scripts/ablate.py", str(path), *overrides])
    )
    with interruptible():
        train_cells(book, study, cells, study_dir, say)
        judge(book, study, cells, study_dir, say)
    report = write_reports(study_dir, say)
    failed = [name for name, cell in book.cells.items() if cell["status"] == "failed"]
    for name in failed:
        say(f"failed: {name}: {book.cells[name]['reason']}")
    say(f"report: {report}")
    return 1 if failed else 0


def write_reports(study: Path, say: Say = print, out: str | Path = "runs") -> Path:
    """Print the table and write report.html, table.md, table.csv and summary.json from the files of a study.

    Args:
        study: its folder, or its YAML (the folder is then `<out>/<name>`).
    """
    from mmdit_eval.report import write_report

    study_dir = Path(out) / load_study(study).name if study.is_file() else study
    say(f"\nWriting the report of {study_dir} ...")
    return write_report(study_dir)


class Book:
    """`study.json`: the grid, its cost and what became of each cell; written after every change."""

    def __init__(
        self, study_dir: Path, study: StudyConfig, cells: dict[str, dict[int, RunConfig]], costs: Any, command: str
    ) -> None:
        self.path = study_dir / "study.json"
        self.head = {
            "study": to_tree(study),
            "command": command,
            "rows": {row: costs[row]._asdict() for row in cells},
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self.cells: dict[str, dict[str, Any]] = {
            cell_name(row, seed): {"row": row, "seed": seed, "status": "waiting", "reason": ""}
            for row, configs in cells.items()
            for seed in configs
        }
        self.write()

    def mark(self, name: str, status: str, reason: str = "") -> None:
        self.cells[name].update(status=status, reason=reason)
        self.write()

    def write(self) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        temporary.write_text(json.dumps({**self.head, "cells": self.cells}, indent=1), encoding="utf-8")
        temporary.replace(self.path)


def cell_name(row: str, seed: int) -> str:
    return f"{row}-s{seed}"


def cell_config(config: RunConfig, study_dir: Path) -> RunConfig:
    """Give a cell the study's shared cache, unless its config names another place."""
    if config.train.cache_dir is not None:
        return config
    train = config.train.model_copy(update={"cache_dir": study_dir / "cache"})
    return config.model_copy(update={"train": train})


def train_cells(
    book: Book, study: StudyConfig, cells: dict[str, dict[int, RunConfig]], study_dir: Path, say: Say
) -> None:
    """Train what is not trained yet, each cell in its own process; a failure is written down and stops no other."""
    commands: dict[str, list[str]] = {}
    for seed in study.seeds:  # seeds outside: whole comparisons are finished early
        for row in cells:
            name, config = cell_name(row, seed), cell_config(cells[row][seed], study_dir)
            if finished(study_dir / name, config):
                say(f"{name}: trained already")
                book.mark(name, "trained")
            else:
                commands[name] = cell_command(name, config, study_dir)
    if study.workers > 1 and len(commands) > 1:
        encode_first(commands, say)

    def begun(name: str) -> None:
        cell = book.cells[name]
        say(f"\n{name}: training ({cells[cell['row']][cell['seed']].train.images:,} images)")
        book.mark(name, "training")

    def ended(name: str, code: int) -> None:
        if code in (0, executor.EXIT_INTERRUPTED):
            book.mark(name, "interrupted" if code else "trained")
            return
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = f"; if {study_dir / name} holds another run, remove it or rename the study (--name)" if code == 2 else ""
        again = shlex.join(commands[name])
        book.mark(name, "failed", f"training ended with {how}; see above, or run: {again}{hint}")
        say(f"{name}: failed with {how}; going on with the other cells")

    if not executor.run_queue(commands, study.workers, begun, ended):
        saved = [name for name, cell in book.cells.items() if cell["status"] == "interrupted"]
        raise StudyInterrupted(f"interrupted; {', '.join(saved) or 'no cell'} saved its state")


def cell_command(name: str, config: RunConfig, study_dir: Path) -> list[str]:
    """Write a cell's config and return the command that trains it, or goes on with it."""
    run_dir = study_dir / name
    run_dir.mkdir(parents=True, exist_ok=True)
    if not (run_dir / "config.yaml").exists():
        (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    wanted = study_dir / "configs" / f"{name}.yaml"  # config.yaml is the trainer's: it compares before it overwrites
    wanted.parent.mkdir(exist_ok=True)
    wanted.write_text(to_yaml(config), encoding="utf-8")
    return [sys.executable, "-m", "mmdit.train", str(wanted), "--out", str(run_dir)]


def encode_first(commands: dict[str, list[str]], say: Say) -> None:
    """Encode the data of cells that will train at the same time, with all cores; else all but one would wait for it."""
    seen = []
    for name, command in commands.items():
        config = load_config(command[3])
        key = config.data, config.encoders, config.train.cache_dir
        if config.train.precompute and key not in seen:
            seen.append(key)
            say(f"\n{name}: encoding its data")
            if not executor.run_queue({name: [*command, "--cache-only"]}, 1, lambda _: None, lambda *_: None):
                raise StudyInterrupted("interrupted while encoding")


def finished(run_dir: Path, config: RunConfig) -> bool:
    """Say whether the newest checkpoint is that of a complete run of this very config."""
    from mmdit.checkpoint import CheckpointError, latest_checkpoint, read_state

    try:
        path = latest_checkpoint(run_dir)
        if path is None or not read_state(path).get("complete"):
            return False
        return not differences(to_tree(load_config(path / "config.yaml")), to_tree(config))
    except (CheckpointError, FileNotFoundError, ValueError):
        return False


@contextmanager
def interruptible() -> Iterator[None]:
    """Treat SIGTERM like Ctrl-C, and name a KeyboardInterrupt."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        previous = None
    try:
        yield
    except StudyInterrupted:
        raise
    except KeyboardInterrupt:
        raise StudyInterrupted("stopped between two cells or while judging") from None
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def judge(book: Book, study: StudyConfig, cells: dict[str, dict[int, RunConfig]], study_dir: Path, say: Say) -> None:
    """Evaluate every trained cell and the ceiling; results that are there with the same stamp are kept."""
    from mmdit.checkpoint import CheckpointError
    from mmdit_eval.suite import evaluate_ceiling, evaluate_run, evaluate_snapshots, load_references

    trained = [
        (row, seed) for row in cells for seed in cells[row] if book.cells[cell_name(row, seed)]["status"] == "trained"
    ]
    shared: dict[str, Any] = {}  # rows of equal data look at the same true pictures
    for row, seed in trained:
        name, config = cell_name(row, seed), cells[row][seed]
        key = config.data.model_dump_json()
        try:
            if key not in shared:
                say(f"\njudging: {study.suite.num_images} pictures a split, and the ceiling")
                shared[key] = load_references(config, study.suite)
                number = "" if len(shared) == 1 else f"-{len(shared)}"
                evaluate_ceiling(config, study.suite, study_dir / f"ceiling{number}.json", references=shared[key])
            evaluate_snapshots(study_dir / name, study.suite, references=shared[key], say=say)
            evaluate_run(study_dir / name, study.suite, references=shared[key], say=say)
        except (CheckpointError, FileNotFoundError, ValueError, RuntimeError) as error:
            book.mark(name, "failed", f"evaluation: {error}")
            say(f"{name}: evaluation failed: {error}")
        else:
            book.mark(name, "done")


def print_grid(study: StudyConfig, cells: dict[str, dict[int, RunConfig]], costs: Any) -> None:
    """Print rows with parameters, FLOPs per image and steps."""
    from rich.console import Console
    from rich.table import Table

    title = f"study {study.name}: {len(cells)} rows x {len(study.seeds)} seed(s); GFLOP: one forward of one image"
    table = Table(title=title, title_justify="left")
    for column in ("row", "backbone", "parameters", "GFLOP", "tokens", "images", "steps", "seeds"):
        table.add_column(column, justify="left" if column in ("row", "backbone") else "right")
    for row, configs in cells.items():
        config, cost = next(iter(configs.values())), costs[row]
        table.add_row(
            row,
            config.model.name,
            f"{cost.parameters / 1e6:.2f} M",
            f"{cost.flops / 1e9:.3f}",
            str(cost.tokens),
            f"{config.train.images:,}",
            f"{-(-config.train.images // config.train.batch_size):,}",
            " ".join(str(seed) for seed in configs),
        )
    Console().print(table)
