"""One trainer a run folder: a second one would sweep away the checkpoint that the first is writing.

That happens to people: a job that was cancelled is still saving when its successor starts, or a study's process was
closed with its terminal and its trainings go on.
"""

from __future__ import annotations

import fcntl
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmdit.checkpoint import CheckpointError, make_folder

LOCK = ".training"
PATIENCE = 60.0  # seconds; who was asked to stop saves within a step


@contextmanager
def sole_trainer(run_dir: Path, patience: float | None = None) -> Iterator[None]:
    """Hold a run folder as its only trainer; who dies lets go of it. Where a file system knows no locks, hold nothing.

    Args:
        run_dir: made where it is not there.
        patience: seconds to wait for another one to end; None: `PATIENCE`.

    Raises:
        CheckpointError: another process trains here still; says which.
    """
    make_folder(run_dir)
    descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        until, told = time.monotonic() + (PATIENCE if patience is None else patience), False
        while not _locked(descriptor):
            who = os.pread(descriptor, 200, 0).decode(errors="replace") or "unknown"
            if time.monotonic() >= until:
                raise CheckpointError(
                    run_dir,
                    f"another process is training in this folder ({who})",
                    "Wait until it ends, or stop it: it saves within a step. Then run the same command again",
                )
            if not told:
                print(f"{run_dir}: another process is training here ({who}); waiting for it to end", flush=True)
            told = True
            time.sleep(0.2)
        with suppress(OSError):  # a full disk: the lock holds without a name on it
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Take the lock if nobody has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here
        return True
    return True
