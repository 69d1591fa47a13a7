"""F13: the disk is full, forbids or fails, once or for good, at every single operation on files."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.faults import Outcome
from benchmarks.faults.disk import FULL_DISK, IO_ERROR, NO_PERMISSION, Disk, refusing
from benchmarks.faults.laboratory import BATCH, forked, micro, run, steps_saved, temporaries, unequal
from benchmarks.faults.saving import NEW, OLD, save
from mmdit.checkpoint import CheckpointError, latest_checkpoint, prune_checkpoints, sweep_temporaries

CODES = {"ENOSPC": FULL_DISK, "EACCES": NO_PERMISSION, "EIO": IO_ERROR}
WRITING = frozenset({"open", "write", "fsync", "mkdir", "rename"})
TRAIN: dict[str, Any] = {"images": 3 * BATCH, "checkpoint_every": BATCH, "validate_every": 2 * BATCH,
                         "sample_every": 2 * BATCH, "tensorboard": False}  # fmt: skip


def failing_disk(folder: Path, full: bool) -> Outcome:
    """F13."""
    wrong: list[str] = []
    saves, points = _saves(folder / "saves", list(CODES) if full else ["ENOSPC"], wrong)
    sessions, ends = _sessions(folder / "sessions", full, wrong)
    small = _small_disk(folder / "small", wrong) if full else "not tried"
    measured = (
        f"{points} operations of a save and {sessions['operations']} of a session, {saves + sessions['sessions']} "
        f"failures (ENOSPC, EACCES, EIO; once or for good): {len(wrong)} wrong; {ends.get(0, 0)} sessions went on "
        f"to their end, {ends.get(3, 0)} ended with exit code 3, all resume to the same bits"
    )
    figures = {
        "saves": {"operations": points, "failures": saves},
        "sessions": {**sessions, "exit_codes": ends},
        "disk_of_one_checkpoint_and_a_half": small,
        "wrong": wrong,
    }
    return Outcome(not wrong, measured, figures)


def _saves(folder: Path, codes: list[str], wrong: list[str]) -> tuple[int, int]:
    """Let each operation of one save fail."""
    folder.mkdir(parents=True)
    prepared, tried, number = folder / "prepared", 0, 0
    save(prepared, OLD, 1.0)
    while True:
        number += 1
        for name in codes:
            place = folder / f"{number}-{name}"
            shutil.copytree(prepared, place / "run")
            code = forked(lambda p=place, n=number, c=CODES[name]: _try_to_save(p, n, c), place / "log")
            shown = (place / "log").read_text(encoding="utf-8")
            if code == 5:  # there is no such operation: all have been tried
                return tried, number - 1
            tried += 1
            if code or latest_checkpoint(place / "run") is None:
                wrong.append(f"save, operation {number}, {name}: {code} {shown[-300:]}")
            shutil.rmtree(place)


def _try_to_save(place: Path, number: int, code: int) -> None:
    """Save with a failure; it must be told as what it is, leave nothing behind, and the next save must work."""
    reached = []
    act = refusing(code, number, number, WRITING)

    def noting(now: int, kind: str, path: Path) -> int | None:
        if now == number:
            reached.append(kind)
        return act(now, kind, path)

    Disk(place / "run", place / "journal", noting).install()
    problem = None
    try:
        save(place / "run", NEW, 2.0)
    except CheckpointError as error:
        problem = str(error)
    if not reached:
        raise SystemExit(5)
    assert problem is None or os.strerror(code) in problem, problem
    assert not temporaries(place / "run"), temporaries(place / "run")
    newest = latest_checkpoint(place / "run")
    assert newest is not None
    assert problem is not None or int(newest.name) == NEW, newest
    save(place / "run", NEW + 8, 3.0)
    prune_checkpoints(place / "run", 1)
    assert sweep_temporaries(place / "run") == 0


def _sessions(folder: Path, full: bool, wrong: list[str]) -> tuple[dict[str, int], dict[int, int]]:
    """Let operations of whole sessions of training fail, once or from there on."""
    whole, journal = folder / "whole", folder / "whole-journal"
    config = micro(folder, TRAIN)
    run(config, whole, lambda: Disk(whole, journal, lambda *a: None).install())
    kinds = [line.split('"kind": "')[1].split('"')[0] for line in journal.read_text(encoding="utf-8").splitlines()]
    operations = [number for number, kind in enumerate(kinds, 1) if kind in WRITING]
    chance, ends, tried = random.Random(3), {}, 0
    chosen = operations if full else [operations[len(operations) // 2]]
    for place, number in enumerate(chosen):
        name = list(CODES)[place % 3]
        for lasting in (False, True) if full and place % 4 == 0 else (bool(chance.getrandbits(1)),):
            tried += 1
            problem, code = _one_session(folder, whole, number, CODES[name], lasting)
            ends[code] = ends.get(code, 0) + 1
            if problem:
                again = "for good" if lasting else "once"
                wrong.append(f"session, operation {number} ({kinds[number - 1]}), {name} {again}: {problem}")
    return {"operations": len(operations), "sessions": tried}, ends


def _one_session(folder: Path, whole: Path, number: int, code: int, lasting: bool) -> tuple[str, int]:
    """Return what was wrong ("" for nothing) and the exit code."""
    root = folder / f"{number}-{code}-{lasting}"
    act = refusing(code, number, None if lasting else number, WRITING)
    session = run(micro(folder, TRAIN), root, lambda: Disk(root, root.with_suffix(".journal"), act).install())
    said, ended = session.output(), session.codes[0]
    if ended not in (0, 3):
        return f"exit code {ended}: {said[-500:]}", ended
    if "Traceback" in said:
        return f"a traceback: {said[-500:]}", ended
    if ended == 3 and os.strerror(code) not in said:
        return f"the reason is not told: {said[-300:]}", ended
    saved = steps_saved(root) if root.is_dir() else 0
    again = run(micro(folder, TRAIN), root)
    if again.codes != [0] or unequal(whole, root) or temporaries(root) or not (root / "complete.json").is_file():
        return f"does not go on from step {saved}: {again.output()[-500:]}", ended
    shutil.rmtree(root)
    return "", ended


def _small_disk(folder: Path, wrong: list[str]) -> dict[str, Any] | str:
    """Train on a file system that holds one checkpoint and a half, where one can be mounted."""
    folder.mkdir(parents=True)
    config = micro(folder, {**TRAIN, "images": 8 * BATCH, "save_retries": 99, "keep_checkpoints": 2})
    run(config, folder / "whole")
    one = sum(p.stat().st_size for p in sorted((folder / "whole" / "checkpoints").iterdir())[0].iterdir())
    mounted = folder / "disk"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * one) + 65536}", "tmpfs", str(mounted)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        return "no file system can be mounted here"
    try:
        session = run(config, mounted / "run")
        saved, said = steps_saved(mounted / "run"), session.output()
    finally:
        subprocess.run(["umount", str(mounted)], check=False)
    if session.codes != [3] or "Free" not in said or saved < 1:
        wrong.append(f"small disk: {session.codes}, step {saved}: {said[-500:]}")
    return {"exit_code": session.codes[0], "newest_step": saved, "checkpoint_bytes": one}


RUNS = {"F13": failing_disk}
