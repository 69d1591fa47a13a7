"""The fault table: what is done to the code on purpose, what must come of it, and where the runs are kept.

`FAULTS` names every test once. A test is a function (folder, full) -> Outcome in the `RUNS` of its module: `full` asks
for the counts of its goal, otherwise a handful. The default tests call the same functions with full=False
(tests/reliability/), `benchmarks/faults.py` with full=True, which stores results/reliability/<ID>.json.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

MARKS = ("<!-- faults:start -->", "<!-- faults:end -->")


class Outcome(NamedTuple):
    """What a test found: whether its goal was met, the sentence for the table, and the counts and worst cases."""

    passed: bool
    measured: str
    figures: dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """One test: what is done, what must come of it, which module here holds it (None: not built yet)."""

    title: str
    goal: str
    module: str | None = None


FAULTS: dict[str, Fault] = {
    "F1": Fault(
        "SIGKILL at random times, gone on with each time",
        "100 kills: no run lost, the bits of an unkilled run, at most 5 steps repeated a kill (a checkpoint every 5)",
        "kills",
    ),
    "F2": Fault(
        "SIGKILL, and loss of power, at every file operation of a save",
        "each point x 10: the newest verified checkpoint loads, at most one stale folder after a restart",
        "saving",
    ),
    "F3": Fault(
        "checkpoints mutated: truncated, flipped, zeroed, swapped, deleted",
        "1,000 mutations: none loads silently, one CheckpointError each, < 1 s, falls back to the step before",
        "checkpoint_mutations",
    ),
    "F4": Fault(
        "hostile files in every loader: pickles, header bombs, zip bombs, links",
        "50 files: no code run, peak memory < 500 MB, < 2 s each",
        "hostile",
    ),
    "F5": Fault(
        "three-leg resume",
        "16 of 16 settings: weights, averages, optimiser, counters and order of samples identical",
        "resuming",
    ),
    "F6": Fault(
        "one process against two, and the number changed on resume",
        "order of samples identical, loss within 1e-5 relative over 50 steps",
        "processes",
    ),
    "F7": Fault(
        "evaluation shared out over processes",
        "48 of 48 splits: each image once; distances equal one process's within 1e-6 relative",
        "judging",
    ),
    "F8": Fault(
        "metrics against other implementations",
        "Fréchet distance within 1e-6 relative on 20 sets, identical sets < 1e-6, singular covariance finite",
        "judging",
    ),
    "F9": Fault(
        "NaN or Inf in loss, gradient, batch, on one process only, several in a row",
        "20 cases: no non-finite number saved, all processes stop on the same step, samples named",
        "numbers",
    ),
    "F10": Fault(
        "pictures of 40 kinds, and mutated PNG, JPEG, WebP, GIF",
        "1,000 mutations: no process dies, each reject with path and reason, memory < 1 GB, EXIF and 16 bit exact",
        "pictures",
    ),
    "F11": Fault(
        "captions: empty, 10k characters, NUL, BOM, surrogates, right to left, emoji",
        "1,000 fuzzed: no crash; ids of 200 texts equal open_clip's",
        "captions",
    ),
    "F12": Fault(
        "config fields misspelt by one edit, of a wrong type, out of range",
        "all rejected (or coerced as listed) in < 1 s with exit code 2, 95 % suggest the right key",
        "config_edits",
    ),
    "F13": Fault(
        "disk full, no permission, input/output error at each write",
        "every point: the last checkpoint kept, a clear message, training goes on or ends with exit code 3",
        "writing",
    ),
    "F14": Fault(
        "SIGTERM at the start, in training, validation, sampling, saving; a second one",
        "50 runs: saved at most one step later, exit code 75, the same bits on resume",
        "signals",
    ),
    "F15": Fault(
        "one of two processes killed",
        "the other ends with an error within the timeout (<= 60 s), nothing left running",
        "processes",
    ),
    "F16": Fault(
        "memory full: address space limited, allocators that refuse",
        "a message with a hint on the batch size, the last checkpoint intact",
        "numbers",
    ),
    "F17": Fault(
        "wrong weights: missing, extra, misshapen, misnamed, of another family",
        "30 cases: none loads in part, the message names keys, round trips bit-equal",
        "wrong_weights",
    ),
    "F18": Fault(
        "static: pickle, eval, weights_only=False, shell=True, yaml.load, trust_remote_code",
        "no hit in our code",
        "static",
    ),
    "F19": Fault("no network: the whole test suite behind a guard on sockets", "no attempt to connect", "static"),
    "F20": Fault(
        "20,000 tiny steps with validation, samples and checkpoints",
        "memory grows < 1 MB per 1,000 steps, file descriptors and temporary files constant",
        "soak",
    ),
}


def runner(name: str) -> Callable[[Path, bool], Outcome]:
    """Return the function of a test; its module is imported only now.

    Raises:
        ValueError: no such test, or not built.
    """
    if name not in FAULTS:
        raise ValueError(f"no fault test {name!r}; there are {', '.join(FAULTS)}")
    module = FAULTS[name].module
    if module is None:
        raise ValueError(f"{name} ({FAULTS[name].title}) is not built yet")
    return importlib.import_module(f"benchmarks.faults.{module}").RUNS[name]


def table(records: dict[str, dict[str, Any]]) -> str:
    """Return the fault table in Markdown; `records` holds the stored JSON by id."""
    lines = ["| | what is done | goal | measured | met |", "|---|---|---|---|---|"]
    for name, fault in FAULTS.items():
        record = records.get(name)
        measured, met = ("not run", "") if record is None else (record["measured"], "yes" if record["passed"] else "NO")
        lines.append(f"| {name} | {fault.title} | {fault.goal} | {measured} | {met} |")
    return "\n".join(lines)


def write_table(page: Path, records: dict[str, dict[str, Any]]) -> None:
    """Replace what stands between the marks of a page.

    Raises:
        ValueError: the page has no marks.
    """
    from mmdit_eval.readme import rewrite  # and with it scipy, which the tests' processes shall not count as theirs

    page.write_text(rewrite(page.read_text(encoding="utf-8"), table(records), "faults"), encoding="utf-8")
