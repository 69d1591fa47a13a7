"""Judges the cells of a study: one after the other in this process, or shared among as many processes as train them.

    python -m mmdit_eval.judging STUDY_DIR CELL [CELL ...]

is what such a process runs: what to do lies in STUDY_DIR/judging/, and there it leaves what became of each cell.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmdit.config import (
    AttentionConfig,
    Cells,
    ConfigError,
    RunConfig,
    StudyConfig,
    SuiteConfig,
    load_config,
    to_tree,
    to_yaml,
)
from mmdit.stopping import handled, interrupt
from mmdit_eval import executor
from mmdit_eval.book import Book, read_book

Say = Callable[[str], None]


class Task(NamedTuple):
    """A cell to be judged.

    Attributes:
        name: of the cell; results go into its folder.
        source: the cell whose networks it has; where it is another's, it has its own `sampling`.
        attention: the maps wanted of it, if any.
    """

    name: str
    source: str
    config: RunConfig
    attention: AttentionConfig | None


class References:
    """The true pictures that cells are judged by, and the ceiling; cells of equal data share them."""

    def __init__(self, suite: SuiteConfig, study_dir: Path, say: Say) -> None:
        self.suite, self.study_dir, self.say = suite, study_dir, say
        self.loaded: dict[str, Any] = {}

    def of(self, config: RunConfig, ceiling: bool = True) -> Any:
        """Return {split: Reference}; the first time also judge the ceiling of this data, unless another process did."""
        from mmdit_eval.suite import evaluate_ceiling, load_references

        key = config.data.model_dump_json()
        if key not in self.loaded:
            self.loaded[key] = load_references(config, self.suite)
            if ceiling:
                counts = [f"{len(found.indices):,} {split}" for split, found in self.loaded[key].items()]
                self.say(f"\njudging: {' and '.join(counts)} pictures, and the ceiling")
            number = "" if len(self.loaded) == 1 else f"-{len(self.loaded)}"
            if ceiling:
                out = self.study_dir / f"ceiling{number}.json"
                evaluate_ceiling(config, self.suite, out, references=self.loaded[key])
        return self.loaded[key]


def judge(book: Book, study: StudyConfig, cells: Cells, study_dir: Path, say: Say, run: Any) -> None:
    """Evaluate every trained cell and the ceiling; results that are there with the same stamp are kept.

    Args:
        run: runs commands where the study's executor says, as `study.run_commands` does.

    Raises:
        KeyboardInterrupt: stopped; what was drawn is on disk.
    """
    tasks = _ready(book, study, cells)
    references = References(study.suite, study_dir, say)
    if len(tasks) > 1 and (study.workers > 1 or study.executor == "slurm"):
        _judge_apart(book, study, tasks, study_dir, references, run)
        return
    for task in tasks:
        _note(book, task.name, judge_cell(task, study.suite, study_dir, references, say), say)


def judge_cell(
    task: Task, suite: SuiteConfig, study_dir: Path, references: References, say: Say, **options: Any
) -> str:
    """Evaluate one cell; return why it failed, or nothing."""
    from mmdit.checkpoint import CheckpointError, find_checkpoint
    from mmdit_eval.attention import write_attention
    from mmdit_eval.suite import evaluate_run, evaluate_snapshots

    run_dir, source = study_dir / task.name, study_dir / task.source
    try:
        found = references.of(task.config, **options)
        # the study's sampling, not the one in the checkpoint, which stays as it was on the training's last day
        own = suite.model_copy(update={"sampling": suite.sampling or task.config.sampling})
        if source == run_dir:
            evaluate_snapshots(run_dir, own, references=found, say=say)
            evaluate_run(run_dir, own, references=found, say=say)
            if task.attention is not None:
                split = next(iter(found.values()))
                write_attention(find_checkpoint(run_dir), split, task.attention, run_dir / "attention.json")
        else:  # on another's networks, in a folder of its own
            evaluate_run(source, own, references=found, out=run_dir, name=task.config.name, say=say)
    except (CheckpointError, FileNotFoundError, ValueError, RuntimeError) as error:
        return str(error) or type(error).__name__
    return ""


def _ready(book: Book, study: StudyConfig, cells: Cells) -> list[Task]:
    """Return the cells whose networks are there; note what the others wait for."""
    tasks = []
    for name, cell in book.cells.items():
        source = book.trained_as(name)
        if book.cells[source]["status"] in ("trained", "done"):
            maps = study.attention if source == name and cell["seed"] == study.seeds[0] else None
            tasks.append(Task(name, source, cells[cell["row"]][cell["seed"]], maps))
        elif source != name:
            book.mark(name, "failed" if book.cells[source]["status"] == "failed" else "waiting", f"needs {source}")
    return tasks


def _note(book: Book, name: str, reason: str, say: Say) -> None:
    if reason:
        book.mark(name, "failed", f"evaluation: {reason}")
        say(f"{name}: evaluation failed: {reason}")
    else:
        book.mark(name, "done")


def _judge_apart(
    book: Book, study: StudyConfig, tasks: Sequence[Task], study_dir: Path, references: References, run: Any
) -> None:
    """Judge in processes of their own: one for each worker, or for each cell where there is a cluster."""
    folder = study_dir / "judging"
    folder.mkdir(exist_ok=True)
    waiting: list[str] = []
    for task in tasks:
        try:
            references.of(task.config)  # the ceiling, once, before anybody needs it
        except (FileNotFoundError, ValueError, RuntimeError) as error:
            _note(book, task.name, str(error), references.say)
            continue
        _file(folder, task.name, "result").unlink(missing_ok=True)
        told = {"source": task.source, "suite": to_tree(study.suite), "attention": None}
        if task.attention is not None:
            told["attention"] = to_tree(task.attention)
        _file(folder, task.name).write_text(json.dumps(told, indent=1), encoding="utf-8")
        (folder / f"{task.name}.yaml").write_text(to_yaml(task.config), encoding="utf-8")
        waiting.append(task.name)
    references.loaded.clear()
    count = len(waiting) if study.executor == "slurm" else min(study.workers, len(waiting))
    shares = {f"judging-{i}": waiting[i::count] for i in range(count)}
    module = [sys.executable, "-m", "mmdit_eval.judging", str(study_dir)]
    codes: dict[str, int] = {}
    commands = {name: [*module, *share] for name, share in shares.items()}
    whole = run(study, commands, study_dir, lambda name: None, codes.__setitem__)
    for name, share in shares.items():
        for cell in share:
            file = _file(folder, cell, "result")
            if file.is_file():
                _note(book, cell, json.loads(file.read_text(encoding="utf-8"))["reason"], references.say)
            elif codes.get(name) not in (None, executor.EXIT_INTERRUPTED, *executor.EXITS_UNBEGUN):
                _note(
                    book,
                    cell,
                    f"its process ended with {executor.describe_exit(codes[name])}; see above",
                    references.say,
                )
    if not whole:
        raise KeyboardInterrupt


def _file(folder: Path, cell: str, kind: str = "task") -> Path:
    return folder / f"{cell}.{kind}.json"


def _read_task(folder: Path, name: str) -> tuple[Task, SuiteConfig]:
    told: Mapping[str, Any] = json.loads(_file(folder, name).read_text(encoding="utf-8"))
    maps = None if told["attention"] is None else AttentionConfig.model_validate(told["attention"])
    return Task(name, told["source"], load_config(folder / f"{name}.yaml"), maps), SuiteConfig.model_validate(
        told["suite"]
    )


def main(words: Sequence[str]) -> int:
    """Judge the named cells of a study; return 0.

    Raises:
        KeyboardInterrupt: asked to stop by SIGINT (also where a shell's background taught us to ignore it), SIGTERM or
            SIGHUP; what was drawn is on disk.
    """
    study_dir, names = Path(words[0]), words[1:]
    read_book(study_dir / "study.json")
    references: References | None = None
    with handled(interrupt, signal.SIGINT, signal.SIGTERM):
        for name in names:
            task, suite = _read_task(study_dir / "judging", name)
            references = references or References(suite, study_dir, print)
            reason = judge_cell(task, suite, study_dir, references, print, ceiling=False)
            _file(study_dir / "judging", name, "result").write_text(json.dumps({"reason": reason}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(executor.EXIT_INTERRUPTED)
    except (ConfigError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
