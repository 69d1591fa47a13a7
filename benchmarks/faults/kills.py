"""F1: SIGKILL at random times; each time the same command goes on, and the end is that of a run left alone."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults import Outcome
from benchmarks.faults.laboratory import (
    BATCH,
    begin,
    micro,
    run,
    steps_logged,
    steps_saved,
    temporaries,
    unequal,
    wait_until,
)
from mmdit.config import RunConfig, to_yaml

EVERY = 5  # steps between checkpoints


class Kind(NamedTuple):
    """A kind of run and how many kills it gets."""

    name: str
    kills: int
    backbone: str = "mmdit"
    processes: int = 1
    sharding: str = "none"
    command: bool = False  # through a new interpreter each time, not a fork
    train: dict[str, Any] = {}  # noqa: RUF012 (read only)


FULL = (
    Kind("mmdit", 40),
    Kind("unet", 30, "unet"),
    Kind("mmdit, accumulation 2, bf16, two averages", 10, train={"accumulation": 2, "precision": "bf16",
                                                                 "more_emas": {"wide": {"sigma_rel": 0.1}}}),
    Kind("mmdit, two processes, FSDP2", 12, processes=2, sharding="fsdp2"),
    Kind("unet, command line", 8, "unet", command=True),
)  # fmt: skip
SHORT = (Kind("mmdit", 2),)


@dataclass
class Tally:
    """What the kills did."""

    kills: int = 0
    runs: int = 0
    lost: list[str] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)
    phases: Counter[str] = field(default_factory=Counter)
    stale: int = 0  # most temporary folders ever found after a kill
    left: list[str] = field(default_factory=list)  # temporary folders after the run's end


def random_kills(folder: Path, full: bool) -> Outcome:
    """F1."""
    chance, kinds, tally = random.Random(1), FULL if full else SHORT, Tally()
    counts = {}
    for kind in kinds:
        wanted, seed = tally.kills + kind.kills, 0
        while tally.kills < wanted:
            _one_run(folder, kind, seed, wanted, chance, tally, steps=60 if full else 20)
            seed += 1
        counts[kind.name] = kind.kills
    worst = max(tally.repeated)
    passed = not (tally.lost or tally.unequal or tally.left) and worst <= EVERY and tally.stale <= 1
    measured = (
        f"{tally.kills} kills in {tally.runs} runs: {len(tally.lost)} lost, {len(tally.unequal)} tensors unequal, "
        f"at most {worst} steps repeated (mean {sum(tally.repeated) / tally.kills:.1f}); "
        f"{tally.phases['saving']} of them inside a save"
    )
    figures = {
        "kills": tally.kills,
        "kills_by_kind": counts,
        "runs": tally.runs,
        "lost_runs": tally.lost,
        "unequal_tensors": tally.unequal,
        "steps_repeated": {"worst": worst, "mean": sum(tally.repeated) / tally.kills},
        "killed_while": dict(tally.phases),
        "temporary_folders": {"most_after_a_kill": tally.stale, "after_the_end": tally.left},
        "checkpoint_every_steps": EVERY,
    }
    return Outcome(passed, measured, figures)


def _one_run(folder: Path, kind: Kind, seed: int, wanted: int, chance: random.Random, tally: Tally, steps: int) -> None:
    """Kill one run until it is complete or there were kills enough, let it end, compare it with one left alone."""
    train = {
        "images": steps * BATCH,
        "checkpoint_every": EVERY * BATCH,
        "validate_every": 20 * BATCH,
        "sample_every": 20 * BATCH,
        "num_processes": kind.processes,
        "sharding": kind.sharding,
        **kind.train,
    }
    config = micro(folder, train, kind.backbone, seed=seed)
    name = f"{kind.name.replace(' ', '-').replace(',', '')}-{seed}"
    whole, killed = folder / f"{name}-whole", folder / name
    began = time.monotonic()
    assert run(config, whole, processes=kind.processes).codes == [0] * kind.processes, "the run left alone failed"
    length = (time.monotonic() - began) / 2
    while tally.kills < wanted:
        if not _one_kill(config, killed, kind, chance, length, tally):
            break
    session = run(config, killed, processes=kind.processes)
    tally.runs += 1
    if session.codes != [0] * kind.processes:
        tally.lost.append(f"{name}: {session.codes} {session.output()[-300:]}")
        return
    tally.unequal += [f"{name}: {difference}" for difference in unequal(whole, killed)]
    tally.left += temporaries(killed)


def _one_kill(config: RunConfig, killed: Path, kind: Kind, chance: random.Random, length: float, tally: Tally) -> bool:
    """Begin a session and kill it; False where the run was complete before."""
    before = _inode(killed)
    if kind.command:
        path = killed.with_suffix(".yaml")
        path.write_text(to_yaml(config), encoding="utf-8")
        words = [sys.executable, "-m", "mmdit.train", str(path), "--out", str(killed), "--quiet"]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        kill, wait = process.kill, process.wait
    else:
        session = begin(config, killed, processes=kind.processes)
        kill, wait = session.kill, session.wait
    early = chance.random() < 0.2  # else once it trains, at any point of the next few steps
    if not early:
        kept = steps_saved(killed)
        wait_until(lambda: _inode(killed) != before and steps_logged(killed) > kept)
    time.sleep(chance.uniform(0, length if early else length / 4))
    kill()
    code = wait()
    if code == 0:
        return False
    if code != -9:
        tally.lost.append(f"{killed.name}: a session ended with {code}")
    stale = [name for name in temporaries(killed) if name.startswith("checkpoints/")]
    repeated = max(0, steps_logged(killed) - steps_saved(killed))
    began = _inode(killed) != before
    tally.phases["saving" if stale else "training" if began else "starting"] += 1
    tally.stale = max(tally.stale, len(stale))
    tally.repeated.append(repeated)
    tally.kills += 1
    return True


def _inode(run_dir: Path) -> int:
    """Return what changes once a session has opened its metrics anew."""
    path = run_dir / "metrics.jsonl"
    return path.stat().st_ino if path.is_file() else 0


RUNS = {"F1": random_kills}
