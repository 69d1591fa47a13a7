"""F14: SIGTERM, wherever it comes; and a second one."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults import Outcome
from benchmarks.faults.laboratory import BATCH, begin, micro, run, steps_logged, steps_saved, temporaries, unequal

STEPS = 40
# phase: how many signals; what is called there: (module, function, one of its first calls)
PHASES: dict[str, tuple[int, str, str, int]] = {
    "start": (8, "trainer", "build_run", 1),
    "reading the checkpoint": (2, "trainer", "restore", 1),
    "update": (16, "trainer", "update", 6),
    "validation": (8, "validation", "loss_by_level", 2),
    "samples": (8, "validation", "draw_samples", 1),
    "save": (8, "saving", "save_checkpoint", 1),
}


def signalled(folder: Path, full: bool) -> Outcome:
    """F14."""
    chance = random.Random(5)
    phases = [phase for phase, (count, *_) in PHASES.items() for _ in range(count)]
    chance.shuffle(phases)
    if not full:
        phases = ["samples"]
    twice = ["update", "validation", "save", "samples", "start"] * 2 if full else ["update"]
    wrong: list[str] = []
    seen: Counter[str] = Counter()
    late, runs = [0], 0
    queue = [(phase, False) for phase in phases] + [(phase, True) for phase in twice]
    while queue:
        backbone = ("mmdit", "unet")[runs % 2]
        train = {"images": STEPS * BATCH, "checkpoint_every": 5 * BATCH, "validate_every": 3 * BATCH,
                 "sample_every": 4 * BATCH, "warmup_images": STEPS * BATCH // 2}  # fmt: skip
        config = micro(folder, train, backbone, seed=runs)
        run_dir, whole = folder / f"run-{runs}", folder / f"whole-{runs}"
        assert run(config, whole).codes == [0]
        while queue and steps_saved(run_dir) < STEPS - 10:
            phase, second = queue.pop()
            problem, steps_late = _one_signal(config, run_dir, phase, second, chance)
            seen[phase + (", a second signal" if second else "")] += 1
            late.append(steps_late)
            wrong += [f"{phase}, second {second}: {problem}"] if problem else []
        if run(config, run_dir).codes != [0] or unequal(whole, run_dir) or temporaries(run_dir):
            wrong.append(
                f"run {runs} did not go on to the same bits: {(folder / f'run-{runs}.log').read_text()[-500:]}"
            )
        runs += 1
    first = sum(count for phase, count in seen.items() if "second" not in phase)
    measured = (
        f"{first} signals and {sum(seen.values()) - first} pairs in {runs} runs: {len(wrong)} wrong; saved at most "
        f"{max(late)} step later, exit code 75 (a second one: ended at once), all went on to the same bits"
    )
    figures = {"signals": dict(seen), "runs": runs, "steps_until_saved_at_most": max(late), "wrong": wrong}
    return Outcome(not wrong and max(late) <= 1, measured, figures)


def _one_signal(config: Any, run_dir: Path, phase: str, second: bool, chance: random.Random) -> tuple[str, int]:
    """Run one session with a signal in it; return what was wrong ("" for nothing) and how many steps late it saved."""
    before, note = steps_saved(run_dir), run_dir.with_suffix(".note")
    note.unlink(missing_ok=True)
    if phase == "reading the checkpoint" and not before:
        phase = "start"
    at = chance.randint(1, PHASES[phase][3])
    session = begin(config, run_dir, _signalling(phase, at, second, note, run_dir))
    code, said = session.wait(), session.output()
    if not note.is_file():
        return f"the signal was never sent ({code}: {said[-300:]})", 0
    done, saved = int(note.read_text(encoding="utf-8")), steps_saved(run_dir)
    if second:
        # before the first update the first signal is obeyed at once
        good = code == (75 if phase == "start" else -signal.SIGTERM) and saved >= before
        return ("" if good else f"exit code {code}, step {saved} of {before}"), 0
    if code != 75:
        return f"exit code {code}: {said[-400:]}", 0
    if "Traceback" in said:
        return f"a traceback: {said[-400:]}", 0
    if saved < max(done, before):
        return f"step {done} was made, {saved} is saved", 0
    return "", saved - max(done, before)


def _signalling(phase: str, at: int, second: bool, note: Path, run_dir: Path) -> Callable[[], None]:
    """Return a sabotage: SIGTERM to itself as a function is called for the `at`-th time; a second one right after."""

    def sabotage() -> None:
        import importlib

        _, room_name, name, _ = PHASES[phase]
        room = importlib.import_module(f"mmdit.train.{room_name}")
        original, calls = getattr(room, name), 0

        def signalling(*args: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                note.write_text(str(steps_logged(run_dir)), encoding="utf-8")
                os.kill(os.getpid(), signal.SIGTERM)
                if second:
                    os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **named)

        setattr(room, name, signalling)

    return sabotage


RUNS = {"F14": signalled}
