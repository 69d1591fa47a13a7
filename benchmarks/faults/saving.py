"""F2: the process dies, or the power goes, at every single operation on files of a save; and of a whole session."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.faults import Outcome
from benchmarks.faults.disk import Disk, power_cut
from benchmarks.faults.laboratory import BATCH, forked, free_port, micro, newest, run, steps_saved, temporaries, unequal
from mmdit.checkpoint import latest_checkpoint, load_checkpoint, prune_checkpoints, save_checkpoint, sweep_temporaries
from mmdit.config import load_config

CONFIG = load_config(None, {"name": "saved"})
OLD, NEW = 8, 16  # images_seen


class Scene(NamedTuple):
    """A save to die in: what stands there before, what is done, and which number must be found at least."""

    name: str
    prepare: Callable[[Path], None]
    work: Callable[[Path], None]
    least: int  # images_seen of the checkpoint that stood there before; 0: none
    processes: int = 1


@dataclass
class Tally:
    """What was found."""

    points: dict[str, int] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    deaths: int = 0
    cuts: int = 0
    broken: list[str] = field(default_factory=list)
    stale: int = 0


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    """Return tensors that tell which save they are of."""
    return {"model": {"weight": torch.full((64, 8), value)}, "ema": {"weight": torch.full((64, 8), value)}}


def save(run_dir: Path, images_seen: int, value: float) -> None:
    """Save one."""
    save_checkpoint(run_dir, images_seen, tensors(value), {"value": value}, CONFIG)


def _new_and_prune(run_dir: Path) -> None:
    sweep_temporaries(run_dir)
    save(run_dir, NEW, 2.0)
    prune_checkpoints(run_dir, 1)


def _sharded(run_dir: Path) -> None:
    """Save the parts of two processes together; the group exists already."""
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    from mmdit.train.shards import save_sharded

    mesh = init_device_mesh("cpu", (2,))
    part = {
        stem: {name: DTensor.from_local(t[:32], mesh, [Shard(0)]) for name, t in table.items()}
        for stem, table in tensors(2.0).items()
    }
    save_sharded(run_dir, NEW, part, {"value": 2.0}, CONFIG)


def _old(run_dir: Path) -> None:
    save(run_dir, OLD, 1.0)


def _old_and_new(run_dir: Path) -> None:
    save(run_dir, OLD, 1.0)
    save(run_dir, NEW, 2.0)


def _new(run_dir: Path) -> None:
    save(run_dir, NEW, 2.0)


SCENES = (
    Scene("a save, then pruning", _old, _new_and_prune, OLD),
    Scene("the first save", Path.mkdir, _new, 0),
    Scene("the same images_seen again", _old_and_new, _new, NEW),
)
SHARDED = Scene("a sharded save of two processes", _old, _sharded, OLD, 2)


def death_in_a_save(folder: Path, full: bool) -> Outcome:
    """F2."""
    tally, repeats = Tally(), 10 if full else 1
    for scene in SCENES if full else SCENES[:1]:
        _every_point(folder / scene.name.replace(" ", "-").replace(",", ""), scene, repeats, tally)
    if full:
        import mmdit.train.shards  # noqa: F401 (forks find it ready)

        _every_point(folder / "sharded", SHARDED, repeats, tally)
        _session(folder / "session", tally)
    points = sum(tally.points.values())
    passed = not tally.broken  # a folder that is left after a restart counts as broken
    measured = (
        f"{points} points, {tally.deaths:,} deaths and {tally.cuts:,} power cuts: {len(tally.broken)} without their "
        f"newest whole checkpoint; at most {tally.stale} temporary folders when dead, none after a restart"
    )
    figures = {
        "points": tally.points,
        "operations": dict(tally.kinds),
        "repeats": repeats,
        "deaths": tally.deaths,
        "power_cuts": tally.cuts,
        "broken": tally.broken,
        "stale_folders_at_most": tally.stale,
    }
    return Outcome(passed, measured, figures)


def _every_point(folder: Path, scene: Scene, repeats: int, tally: Tally) -> None:
    """Die at each operation of a scene; look at what is left, and at what a power cut would have left of it."""
    folder.mkdir(parents=True)
    prepared = folder / "prepared"
    scene.prepare(prepared)
    for dying in range(scene.processes):
        number, chance = 0, random.Random(dying)
        while True:
            number += 1
            for repeat in range(repeats):  # bytes let through by a write, and what a power cut loses, differ
                place = folder / f"{dying}-{number}-{repeat}"
                died = _one_death(scene, prepared, place, number, dying, chance, tally)
                shutil.rmtree(place)
                if not died:
                    break
            if not died:
                break
        tally.points[scene.name + (f", process {dying} dies" if scene.processes > 1 else "")] = number - 1


def _one_death(
    scene: Scene, prepared: Path, place: Path, number: int, dying: int, chance: random.Random, tally: Tally
) -> bool:
    """Return False where the scene ends before operation `number`: then it was not interrupted."""
    root, journals = place / "run", [place / f"journal-{rank}" for rank in range(scene.processes)]
    shutil.copytree(prepared, root)
    before = {path.stat().st_ino for path in root.rglob("*") if path.is_file()}
    returned = place / "returned"
    codes = _act_out(scene, root, journals, returned, number, dying, chance.randint(0, 400))
    died = any(code == -signal.SIGKILL for code in codes)
    least = NEW if returned.exists() else scene.least
    tally.deaths += died
    if not died and any(codes):
        tally.broken.append(f"{scene.name}, operation {number}: {codes} {(place / 'log').read_text()[-300:]}")
    cut = place / "cut"
    if scene.processes == 1:  # two journals have no common order
        power_cut(root, journals[0], cut, chance, before)
        tally.cuts += 1
        tally.broken += [f"{scene.name}, power cut at operation {number}: {p}" for p in _problems(cut, least, tally)]
    tally.broken += [f"{scene.name}, death at operation {number}: {p}" for p in _problems(root, least, tally)]
    if not died:  # the journal of a whole save
        lines = journals[dying].read_text(encoding="utf-8").splitlines()
        tally.kinds.update(json.loads(line)["kind"] for line in lines)
    return died


def _act_out(
    scene: Scene, root: Path, journals: list[Path], returned: Path, number: int, dying: int, torn: int
) -> list[int]:
    """Do the scene's work in forks, one of which dies at its operation `number`; return the exit codes."""
    port, pids = free_port() if scene.processes > 1 else 0, []
    for rank, journal in enumerate(journals):

        def work(rank: int = rank, journal: Path = journal) -> None:
            if scene.processes > 1:
                _join(rank, scene.processes, port)
            Disk(root, journal, _dying(number if rank == dying else 0, torn)).install()
            scene.work(root)
            os.close(os.open(returned, os.O_CREAT | os.O_WRONLY))

        pids.append(forked(work, root.parent / "log", wait=False))
    codes = []
    while pids:  # one dead, the others are killed: a node has gone
        pid, status = os.wait()
        codes.append(os.waitstatus_to_exitcode(status))
        pids.remove(pid)
        if codes[-1] and pids:
            for other in list(pids):
                os.kill(other, signal.SIGKILL)
                codes.append(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
            break
    return codes


def _join(rank: int, processes: int, port: int) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)


def _dying(number: int, torn: int) -> Callable[[int, str, Path], int | None]:
    """Return what ends the process at an operation; a write first lets some bytes through."""

    def act(now: int, kind: str, path: Path) -> int | None:
        if now != number:
            return None
        if kind == "write" and torn:
            return torn
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    return act


def _problems(root: Path, least: int, tally: Tally) -> list[str]:
    """Restart on what is left and say what is wrong with it."""
    stale = [name for name in temporaries(root) if name.startswith("checkpoints/") and name.count("/") == 1]
    tally.stale = max(tally.stale, len(stale))
    sweep_temporaries(root)
    problems = [f"{name} is left after a restart" for name in temporaries(root)]
    path = latest_checkpoint(root)
    if path is None:
        return [*problems, f"no checkpoint loads, {least} must"] if least else problems
    found = load_checkpoint(path)
    value = {OLD: 1.0, NEW: 2.0}[int(path.name)]
    if int(path.name) < least:
        problems.append(f"{path.name} is the newest, {least} must be")
    for table in found.tensors.values():
        if any(not bool((tensor == value).all()) for tensor in table.values()):
            problems.append(f"{path.name} holds other numbers than were saved")
    return problems


def _session(folder: Path, tally: Tally) -> None:
    """Die at every operation of a whole session of training, at every second one lose the power; go on after each."""
    train: dict[str, Any] = {"images": 2 * BATCH, "checkpoint_every": BATCH, "validate_every": 2 * BATCH,
                             "sample_every": 2 * BATCH, "keep_checkpoints": 1}  # fmt: skip
    config, whole, chance = micro(folder, train), folder / "whole", random.Random(7)
    assert run(config, whole).codes == [0]
    number = 0
    while True:
        number += 1
        place = folder / str(number)
        root, journal = place / "run", place / "journal"
        sabotage = lambda n=number, r=root, j=journal: Disk(r, j, _dying(n, 100)).install()  # noqa: E731
        place.mkdir()
        died = run(config, root, sabotage).codes[0] == -signal.SIGKILL
        if not died:
            break
        tally.deaths += 1
        images = {"death": root}
        if number % 2 and root.is_dir():
            tally.cuts += 1
            images["power cut"] = place / "cut"
            power_cut(root, journal, images["power cut"], chance, set())
        for kind, left in images.items():
            saved = steps_saved(left) if left.is_dir() else 0
            session = run(config, left)
            good = session.codes == [0] and not unequal(whole, left) and not temporaries(left)
            if not good:
                tally.broken.append(f"session, {kind} at operation {number}: {session.output()[-300:]}")
            elif newest(left).state["step"] < saved:
                tally.broken.append(f"session, {kind} at operation {number}: went back")
        shutil.rmtree(place)
    tally.points["a whole session of training"] = number - 1


RUNS = {"F2": death_in_a_save}
