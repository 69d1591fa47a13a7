"""A study: rows x seeds, each trained as its own process, all judged by one suite, then one report.

    python scripts/ablate.py configs/studies/quickstart.yaml

Everything lies in `runs/<study>/`: `study.json` (the grid and what became of each cell), one run folder a cell,
`cache/` (latents and text states, encoded once for all), the ceiling, `report.html`. The same command goes on where
it was interrupted: finished cells are skipped, begun ones resumed.
"""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmdit.config import (
    Cells,
    RunConfig,
    StudyConfig,
    differences,
    load_config,
    load_study,
    row_configs,
    to_tree,
    to_yaml,
)
from mmdit.stopping import handled, interrupt
from mmdit_eval import executor
from mmdit_eval.book import Book, cell_name, check_book, read_book
from mmdit_eval.judging import judge

Say = Callable[[str], None]


class StudyInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; everything finished so far is on disk."""


def run_study(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    out: str | Path = "runs",
    dry_run: bool = False,
    rate: float | None = None,
    measure: bool = False,
    say: Say = print,
) -> int:
    """Train, judge and report a study; return the exit code (0 all cells done, 1 some failed).

    Args:
        path: the study's YAML.
        overrides: dotted command-line words laid on the study (`--seeds [0,1,2]`, `--overrides.train.images 64000`).
        out: folder in which the study's own folder is made.
        dry_run: print the grid with parameters, FLOPs, steps, time and disk, and stop.
        rate: FLOP/s of training that the times of the grid stand on.
        measure: take that rate from a few updates of each row instead.

    Raises:
        ConfigError, FileNotFoundError: the study, its base, its data or its folder cannot be used; nothing has been
            trained.
        StudyInterrupted: stopped by hand; run the same command again.
    """
    study = load_study(path, overrides)
    study_dir = Path(out) / study.name
    check_book(study_dir)
    row_configs(study, str(path))  # mistakes in the YAML are answered before torch is imported

    from mmdit_eval.plan import make_plan, print_plan  # torch from here on

    plan = make_plan(study, str(path))
    print_plan(study, plan, rate=rate, measure=measure)
    if dry_run:
        _say_what_is_missing(study, say)
        return 0

    study_dir.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "scripts/ablate.py", str(path), *overrides])
    _say_what_leaves(study_dir, study, plan.cells, say)
    book = Book(study_dir, study, {row: plan.describe(row) for row in plan.cells}, command)
    with interruptible():
        train_cells(book, study, plan.cells, study_dir, say)
        judge(book, study, plan.cells, study_dir, say, run_commands)
    report = write_reports(study_dir, say)
    failed = [name for name, cell in book.cells.items() if cell["status"] == "failed"]
    for name in failed:
        say(f"failed: {name}: {book.cells[name]['reason']}")
    say(f"report: {report}")
    return 1 if failed else 0


def _say_what_is_missing(study: StudyConfig, say: Say) -> None:
    """Warn where this machine could plan the study and not start its jobs."""
    if study.executor == "slurm":
        from mmdit_eval.slurm import missing

        reason = missing(study.slurm)
        if reason is not None:
            say(f"warning: the study could not be started here: {reason}")


def _say_what_leaves(study_dir: Path, study: StudyConfig, rows: Iterable[str], say: Say) -> None:
    """Name cells of an earlier run of this study that are no part of it any more: `--seeds [3]` means no other."""
    if (study_dir / "study.json").is_file():
        wanted = {cell_name(row, seed) for row in rows for seed in study.seeds}
        left = [name for name in read_book(study_dir / "study.json")["cells"] if name not in wanted]
        if left:
            say(
                f"\nnot in this study any more, and not in its report: {', '.join(left)}. Their folders stay; name "
                f"their rows and seeds again to take them up"
            )


def write_reports(study: Path, say: Say = print, out: str | Path = "runs") -> Path:
    """Print the table and write report.html, table.md, table.csv and summary.json from the files of a study.

    Args:
        study: its folder, or its YAML (the folder is then `<out>/<name>`).
    """
    from mmdit_eval.report import write_report

    study_dir = Path(out) / load_study(study).name if study.is_file() else study
    say(f"\nWriting the report of {study_dir} ...")
    return write_report(study_dir)


def cell_config(config: RunConfig, study_dir: Path) -> RunConfig:
    """Give a cell the study's shared cache, unless its config names another place."""
    if config.train.cache_dir is not None:
        return config
    train = config.train.model_copy(update={"cache_dir": study_dir / "cache"})
    return config.model_copy(update={"train": train})


def train_cells(book: Book, study: StudyConfig, cells: Cells, study_dir: Path, say: Say) -> None:
    """Train what is not trained yet, each cell in its own process; a failure is written down and stops no other."""
    commands: dict[str, list[str]] = {}
    for seed in study.seeds:  # seeds outside: whole comparisons are finished early
        for row in cells:
            name, config = cell_name(row, seed), cell_config(cells[row][seed], study_dir)
            if book.trained_as(name) != name:
                continue
            if finished(study_dir / name, config):
                say(f"{name}: trained already")
                book.mark(name, "trained")
                if study.prune_finished:
                    prune_cell(study_dir / name, study.suite.weights, say)
            else:
                commands[name] = cell_command(name, config, study_dir)
    if study.workers > 1 and study.executor == "local" and len(commands) > 1:
        encode_first(commands, say)

    def begun(name: str) -> None:
        say(f"\n{name}: training ({_amount(cells[book.cells[name]['row']][book.cells[name]['seed']])})")
        book.mark(name, "training")

    def ended(name: str, code: int) -> None:
        if code in executor.EXITS_UNBEGUN:
            book.mark(name, "waiting")
            return
        if code in (0, executor.EXIT_INTERRUPTED):
            book.mark(name, "interrupted" if code else "trained")
            if study.prune_finished and not code:
                prune_cell(study_dir / name, study.suite.weights, say)
            return
        how = executor.describe_exit(code)
        hint = f"; if {study_dir / name} holds another run, remove it or rename the study (--name)" if code == 2 else ""
        again = shlex.join(commands[name])
        book.mark(name, "failed", f"training ended with {how}; see above, or run: {again}{hint}")
        say(f"{name}: failed with {how}; going on with the other cells")

    if not run_commands(study, commands, study_dir, begun, ended):
        saved = [name for name, cell in book.cells.items() if cell["status"] == "interrupted"]
        raise StudyInterrupted(f"interrupted; {', '.join(saved) or 'no cell'} saved its state")


def prune_cell(run_dir: Path, weights: str, say: Say) -> None:
    """Leave a trained cell's checkpoints only the weights that are judged; one that cannot be thinned stays whole."""
    from mmdit.checkpoint import CheckpointError, list_checkpoints, thin_checkpoint, weights_stem

    freed = 0
    for path in list_checkpoints(run_dir):
        try:
            freed += thin_checkpoint(path, [weights_stem(weights)])
        except CheckpointError as error:
            say(f"{run_dir.name}: left as it is: {error}")
    if freed:
        say(f"{run_dir.name}: pruned to its weights, {freed / 1e9:.2f} GB freed")


def run_commands(
    study: StudyConfig,
    commands: dict[str, list[str]],
    study_dir: Path,
    begun: Callable[[str], None],
    ended: Callable[[str, int], None],
) -> bool:
    """Run cells where the study says: processes on this machine, or jobs of a cluster; return whether all were run."""
    if study.executor == "slurm":
        from mmdit_eval.slurm import run_jobs

        return run_jobs(commands, study.slurm, study_dir / "slurm", begun, ended)
    return executor.run_queue(commands, study.workers, begun, ended, devices=study.devices)


def _amount(config: RunConfig) -> str:
    seconds = config.train.seconds
    return f"{config.train.images:,} images" if seconds is None else f"{seconds:,.0f} seconds"


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
    """Treat SIGTERM and a closed terminal like Ctrl-C, and name a KeyboardInterrupt."""
    with handled(interrupt, signal.SIGTERM):
        try:
            yield
        except StudyInterrupted:
            raise
        except KeyboardInterrupt:
            raise StudyInterrupted("stopped between two cells or while judging") from None
