"""F20: a long run of tiny steps, with validation, samples and checkpoints, takes no more memory at its end."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

from benchmarks.faults import Outcome
from benchmarks.faults.laboratory import BATCH, begin, micro, newest, steps_logged, temporaries

PAGE = os.sysconf("SC_PAGE_SIZE")


def soak(folder: Path, full: bool) -> Outcome:
    """F20."""
    steps, rounds = (20_000, 100) if full else (60, 12)
    every = steps // rounds
    train = {
        "images": steps * BATCH, "validate_every": every * BATCH, "sample_every": 2 * every * BATCH,
        "checkpoint_every": every * BATCH, "log_every": 10 * BATCH, "tensorboard": True, "warmup_images": 80,
        "more_emas": {"wide": {"sigma_rel": 0.1}}, "async_checkpoints": True,
    }  # fmt: skip
    run_dir = folder / "soak"
    session = begin(micro(folder, train), run_dir)
    seen = _watch(session.pids[0], run_dir, interval=1.0 if full else 0.1)
    code = session.wait()
    complete = code == 0 and newest(run_dir).state["step"] == steps
    step, memory, descriptors, stale = (np.array(column, dtype=float) for column in zip(*seen, strict=True))
    settled = step >= steps * 0.2  # allocators and caches have what they want
    slope = float(np.polyfit(step[settled], memory[settled], 1)[0] * 1000 / 2**20) if settled.sum() > 2 else 0.0
    figures = {
        "steps": steps,
        "complete": complete,
        "samples": len(seen),
        "memory_slope_mb_per_1000_steps": slope,
        "memory_mb": {"at_20_percent": memory[settled][0] / 2**20, "at_end": memory[-1] / 2**20},
        "file_descriptors": {"least": int(descriptors[settled].min()), "most": int(descriptors[settled].max()),
                             "at_20_percent": int(descriptors[settled][0]), "at_end": int(descriptors[-1])},
        "temporary_files": {"most_at_once": int(stale.max()), "at_end": temporaries(run_dir)},
        "checkpoints_left": len(list((run_dir / "checkpoints").iterdir())),
        "validations_and_checkpoints": rounds,
        "samples_drawn": len(list((run_dir / "samples").glob("*.png"))),
    }  # fmt: skip
    constant = descriptors[settled].max() - descriptors[settled].min() <= 8  # files of a save that is on its way
    passed = complete and (slope < 1 or not full) and constant and not temporaries(run_dir) and stale.max() <= 2
    measured = (
        f"{steps:,} steps, {rounds} validations and checkpoints, {figures['samples_drawn']} samples: memory "
        f"{slope:+.3f} MB per 1,000 steps, file descriptors {int(descriptors[settled].min())} to "
        f"{int(descriptors[settled].max())}, no temporary file left"
    )
    return Outcome(bool(passed), measured, figures)


def _watch(pid: int, run_dir: Path, interval: float) -> list[tuple[int, int, int, int]]:
    """Return (step, resident bytes, file descriptors, temporary files) as time went by."""
    seen = []
    process = Path(f"/proc/{pid}")
    while True:
        try:
            resident = int((process / "statm").read_text(encoding="ascii").split()[1]) * PAGE
            descriptors = len(os.listdir(process / "fd"))
        except (OSError, IndexError):
            return seen
        if not resident:  # a process that has ended and was not waited for
            return seen
        step = steps_logged(run_dir) if run_dir.is_dir() else 0
        stale = len(list((run_dir / "checkpoints").glob(".*"))) if run_dir.is_dir() else 0
        if step:
            seen.append((step, resident, descriptors, stale))
        time.sleep(interval)


RUNS = {"F20": soak}
