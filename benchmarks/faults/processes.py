"""F6: two processes train what one trains. F15: when one of two dies or hangs, the other does not wait for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults import Outcome
from benchmarks.faults.laboratory import (
    BATCH,
    begin,
    losses,
    micro,
    newest,
    rank,
    run,
    steps_logged,
    temporaries,
    wait_until,
)
from benchmarks.faults.resuming import order_of, recording
from mmdit.checkpoint import latest_checkpoint
from mmdit.config import to_yaml

TOLERANCE = 1e-5
ALLOWED = 60.0  # seconds


def one_against_two(folder: Path, full: bool) -> Outcome:
    """F6."""
    steps = 50 if full else 6
    settings = (
        [("mmdit", "none"), ("mmdit", "fsdp2"), ("unet", "none"), ("unet", "fsdp2")] if full else [("mmdit", "none")]
    )
    rows: dict[str, Any] = {}
    for backbone, sharding in settings:
        name = f"{backbone}, {'DDP' if sharding == 'none' else sharding.upper()}"
        rows[name] = _two(folder, backbone, sharding, steps)
    if full:
        rows["mmdit, 1 -> 2 -> 1 processes on one run"] = _changing(folder, "mmdit", "none", steps)
        rows["unet, 2 sharded -> 1 -> 2 sharded"] = _changing(folder, "unet", "fsdp2", steps)
    worst = max(row["worst_relative_difference"] for row in rows.values())
    same = all(row["same_order"] for row in rows.values())
    passed = same and worst <= TOLERANCE and all(row["steps"] == steps for row in rows.values())
    order = "order of samples identical" if same else "ORDER OF SAMPLES DIFFERS"
    measured = f"{len(rows)} settings, {steps} steps: {order}, losses within {worst:.1e} relative"
    return Outcome(passed, measured, {"rows": rows, "tolerance": TOLERANCE})


def _two(folder: Path, backbone: str, sharding: str, steps: int) -> dict[str, Any]:
    """Train in one process and in two."""
    alone, together = folder / f"{backbone}-one", folder / f"{backbone}-{sharding}"
    common = {"images": steps * BATCH, "validate_every": steps * BATCH // 2, "lr_schedule": "constant"}
    if not alone.exists():
        run(micro(folder, common, backbone), alone, recording(alone.with_suffix(".order")))
    config = micro(folder, {**common, "num_processes": 2, "sharding": sharding}, backbone)
    session = run(config, together, recording(together.with_suffix(".order")), processes=2)
    assert session.codes == [0, 0], session.output()[-2000:]
    return _row(alone, together)


def _changing(folder: Path, backbone: str, sharding: str, steps: int) -> dict[str, Any]:
    """Go on with another number of processes, twice."""
    alone, changing = folder / f"{backbone}-one", folder / f"{backbone}-{sharding}-changing"
    first = 2 if sharding != "none" else 1
    orders = []
    for leg, processes in enumerate((first, 3 - first, first)):
        train = {
            "images": (steps * (leg + 1) // 3) * BATCH,
            "lr_schedule": "constant",
            "num_processes": processes,
            "sharding": sharding if processes > 1 else "none",
            "validate_every": steps * BATCH // 2,
        }
        log = folder / f"{changing.name}-leg{leg}"
        session = run(micro(folder, train, backbone), changing, recording(log.with_suffix(".order")), processes)
        assert session.codes == [0] * processes, session.output()[-2000:]
        orders += order_of(log)
    return {**_row(alone, changing), "same_order": orders == order_of(alone)}


def _row(alone: Path, other: Path) -> dict[str, Any]:
    pairs = list(zip(losses(alone), losses(other), strict=False))
    return {
        "steps": len(losses(other)),
        "worst_relative_difference": max(abs(a - b) / abs(a) for a, b in pairs),
        "same_order": order_of(alone) == order_of(other),
    }


def one_of_two_dies(folder: Path, full: bool) -> Outcome:
    """F15."""
    cases = [
        (sharding, victim, moment, number)
        for sharding in ("none", "fsdp2")
        for victim in (0, 1)
        for moment, number in (("update", signal.SIGKILL), ("save", signal.SIGKILL), ("update", signal.SIGSTOP))
    ]
    rows = {}
    for case in cases if full else [cases[3]]:
        rows[", ".join([case[0], f"rank {case[1]}", case[2], case[3].name])] = _deserted(folder, *case)
    if full:
        rows["DDP under torchrun, rank 1, update, SIGKILL"] = _under_torchrun(folder)
    slowest = max(row["seconds"] for row in rows.values())
    passed = all(row["good"] for row in rows.values()) and slowest <= ALLOWED
    measured = (
        f"{sum(row['good'] for row in rows.values())} of {len(rows)} cases (killed or hung; while updating or saving; "
        f"DDP and FSDP2): the other ended with an error after at most {slowest:.0f} s, none left running, gone on with"
    )
    return Outcome(passed, measured, {"cases": rows, "train.timeout": 10, "allowed_seconds": ALLOWED})


def _deserted(folder: Path, sharding: str, victim: int, moment: str, number: signal.Signals) -> dict[str, Any]:
    """Take one process away and watch the other."""
    place = folder / f"{sharding}-{victim}-{moment}-{number.name}"
    train = {"images": 40 * BATCH, "num_processes": 2, "sharding": sharding, "timeout": 10}
    config = micro(folder, {**train, "checkpoint_every": 3 * BATCH})
    session = begin(config, place, _vanishing(victim, moment, number), processes=2)
    gone, other = session.pids[victim], session.pids[1 - victim]
    stopped = wait_until(lambda: _state(gone) in ("Z", "T", ""))
    began = time.monotonic()
    ended = wait_until(lambda: _state(other) in ("Z", ""), ALLOWED)
    seconds = time.monotonic() - began
    for pid in session.pids:
        os.kill(pid, signal.SIGKILL)
    session.wait()
    code = session.codes[1 - victim]
    saved = latest_checkpoint(place)
    resumed = run(config, place, processes=2)
    whole = resumed.codes == [0, 0] and newest(place).state["complete"] and not temporaries(place)
    good = bool(stopped and ended and code > 0 and saved is not None and whole)
    return {"seconds": round(seconds, 2), "code": code, "went_on": bool(whole), "good": good,
            "said": [] if good else [session.output()[-600:], resumed.output()[-600:]]}  # fmt: skip


def _vanishing(victim: int, moment: str, number: signal.Signals) -> Callable[[], None]:
    """Return a sabotage: one rank gets the signal in its fifth update, or as it begins its second save."""

    def sabotage() -> None:
        if rank() != victim:
            return
        import mmdit.train.trainer as room

        name, at = ("update", 5) if moment == "update" else ("save_or_go_on", 2)
        original, calls = getattr(room, name), 0

        def vanish(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), number)
            return original(*args)

        setattr(room, name, vanish)

    return sabotage


def _under_torchrun(folder: Path) -> dict[str, Any]:
    """The same through the launcher people use."""
    place = folder / "torchrun"
    config = micro(folder, {"images": 100_000 * BATCH, "num_processes": 2, "checkpoint_every": 5 * BATCH})
    path = place.with_suffix(".yaml")
    path.write_text(to_yaml(config), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*launcher, "-m", "mmdit.train", str(path), "--out", str(place), "--quiet"]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began_training = wait_until(lambda: steps_logged(place) > 6, 240)
    workers = [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(workers[1], signal.SIGKILL)
    began = time.monotonic()
    code = process.wait(timeout=90)
    seconds = time.monotonic() - began
    left = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    good = began_training and code != 0 and not left and latest_checkpoint(place) is not None
    return {"seconds": round(seconds, 2), "code": code, "left_running": len(left), "good": bool(good)}


def _state(pid: int) -> str:
    """Return the kernel's letter for a process; "" where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return ""


RUNS = {"F6": one_against_two, "F15": one_of_two_dies}
