"""Break things on purpose and store what came of it; the table stands in docs/reliability.md.

python benchmarks/faults.py F1 F2 --out results/reliability     # full size: minutes each
python benchmarks/faults.py F1 --short                          # a handful of cases, nothing stored
python benchmarks/faults.py --table                             # write docs/reliability.md's table anew
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "eval")]

from benchmarks.faults import FAULTS, Outcome, runner, write_table  # noqa: E402


@dataclass(frozen=True)
class Arguments:
    """Run fault tests."""

    ids: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """F1, F2, ...; none with --table."""
    out: Path = ROOT / "results" / "reliability"
    """Folder of the stored figures."""
    short: bool = False
    """A handful of cases each; nothing is stored."""
    table: bool = False
    """Write the table of docs/reliability.md from all stored figures."""


def store(name: str, outcome: Outcome, out: Path, seconds: float, environment: dict[str, Any]) -> Path:
    """Write one test's record; `environment` is as it was at the start.

    Returns:
        The file: id, title, goal, command, passed, measured, figures, seconds, commit, dirty, versions, hardware, date.
    """
    fault = FAULTS[name]
    record = {
        "id": name,
        "title": fault.title,
        "goal": fault.goal,
        "command": f"python benchmarks/faults.py {name}",
        "passed": outcome.passed,
        "measured": outcome.measured,
        "figures": outcome.figures,
        "seconds": round(seconds, 1),
        "commit": environment["commit"],
        "dirty": environment["dirty"],
        "versions": {"python": environment["python"], **environment["versions"]},
        "hardware": environment["hardware"],
        "date": environment["time"],
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def read_records(out: Path) -> dict[str, dict[str, Any]]:
    """Return what is stored, by id."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in out.glob("F*.json")}


def main() -> int:
    """Run the tests named; exit code 1 where a goal was missed, 2 for a name that is none."""
    arguments = tyro.cli(Arguments, description=__doc__)
    try:
        runs = {name: runner(name) for name in arguments.ids}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    from mmdit.train.tracking import describe_environment

    missed, environment = 0, describe_environment() if runs else {}
    for name, run in runs.items():
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
            outcome = run(Path(folder), not arguments.short)
        seconds = time.monotonic() - began
        print(f"{name} {'met' if outcome.passed else 'MISSED'} in {seconds:.0f} s: {outcome.measured}", flush=True)
        missed += not outcome.passed
        if arguments.short:
            print(json.dumps(outcome.figures, indent=1))
        else:
            print(store(name, outcome, arguments.out, seconds, environment))
    if arguments.table:
        write_table(ROOT / "docs" / "reliability.md", read_records(arguments.out))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
