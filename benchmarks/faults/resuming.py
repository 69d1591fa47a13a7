"""F5: a run in three legs is the run in one, to the last bit."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults import Outcome
from benchmarks.faults.laboratory import BATCH, losses, micro, newest, rank, run, unequal

STEPS, STOPS = 12, (4, 3)  # after 4 updates, then after 3 more
RICH: dict[str, Any] = {
    "precision": "bf16",
    "more_emas": {"wide": {"sigma_rel": 0.1}, "short": {"decay": 0.5}},
    "activation_checkpointing": True,
    "async_checkpoints": True,
}
AXES = {
    "backbone": ("mmdit", "unet"),
    "data": ("cached", "encoded live"),
    "accumulation": (1, 2),
    "averages": ("one, fp32", "three, bf16, recomputed, saved in the background"),
}


def three_legs(folder: Path, full: bool) -> Outcome:
    """F5."""
    settings = list(itertools.product(*AXES.values()))
    results = {}
    for setting in settings if full else settings[1:2]:
        results[" / ".join(map(str, setting))] = _compare(folder, *setting)
    same = sum(not found for found in results.values())
    measured = f"{same} of {len(results)} settings bit-equal in three legs, with losses and the order of samples"
    return Outcome(same == len(results), measured, {"axes": AXES, "differences": results, "steps": STEPS})


def _compare(folder: Path, backbone: str, data: str, accumulation: int, averages: str) -> list[str]:
    """Name what differs between one leg and three."""
    train: dict[str, Any] = {
        "images": STEPS * BATCH,
        "accumulation": accumulation,
        "precompute": data == "cached",
        "validate_every": 6 * BATCH,
        "sample_every": 6 * BATCH,
        **(RICH if averages != AXES["averages"][0] else {}),
    }
    config = micro(folder, train, backbone)
    name = f"{backbone}-{data.split()[-1]}-{accumulation}-{averages[:3]}"
    whole, legs = folder / f"{name}-whole", folder / name
    codes = run(config, whole, recording(whole.with_suffix(".order"))).codes
    for stop in (*STOPS, None):
        codes += run(config, legs, recording(legs.with_suffix(".order"), stop)).codes
    if codes != [0, 75, 75, 0]:
        return [f"exit codes {codes}: {legs.with_suffix('.log').read_text()[-500:]}"]
    found = unequal(whole, legs)
    if order_of(whole) != order_of(legs):
        found.append("order of samples")
    if losses(whole) != losses(legs):
        found.append("losses")
    if len(newest(legs).tensors["optimizer"]) < 6:
        found.append("no optimiser was compared")
    return found


def recording(path: Path, stop: int | None = None) -> Callable[[], None]:
    """Return a sabotage that writes down the samples of each update, and sends SIGTERM within update `stop`."""

    def sabotage() -> None:
        import mmdit.train.trainer as room

        original, calls = room.update, 0

        def update(denoiser: Any, optimizer: Any, accelerator: Any, batches: Any, *rest: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            taken: list[int] = []

            def noting(take: Callable[[], Any]) -> Any:
                batch = take()
                taken.extend(int(index) for index in batch.indices)
                return batch

            noted = [lambda take=take: noting(take) for take in batches]
            result = original(denoiser, optimizer, accelerator, noted, *rest)
            with path.with_suffix(f".order{rank()}").open("a", encoding="utf-8") as file:
                file.write(" ".join(map(str, taken)) + "\n")
            return result

        room.update = update

    return sabotage


def order_of(run_dir: Path) -> list[list[int]]:
    """Return the samples of each update, those of all processes together, sorted within an update."""
    files = sorted(run_dir.parent.glob(f"{run_dir.name}.order?"))
    lines = [file.read_text(encoding="utf-8").splitlines() for file in files]
    return [sorted(int(word) for line in step for word in line.split()) for step in zip(*lines, strict=True)]


RUNS = {"F5": three_legs}
