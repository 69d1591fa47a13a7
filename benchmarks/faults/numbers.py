"""F9: numbers that are not finite, wherever they come from. F16: memory that is not there, wherever it is wanted."""

from __future__ import annotations

import math
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.faults import Outcome
from benchmarks.faults.laboratory import BATCH, all_finite, micro, newest, rank, run, steps_saved, unequal

NAN, INF = math.nan, math.inf
POSITION = 2 * BATCH + 5  # of the bad sample: in the third update, in the half of rank 1


class Case(NamedTuple):
    """What goes bad, for how many updates in a row, and what the run is allowed."""

    name: str
    place: str  # loss, gradient, latents, context, scale (a finite factor of the loss)
    value: float = NAN
    updates: int = 1
    max_skips: int = 0
    goes_on: bool = False
    processes: int = 1
    train: dict[str, Any] = {}  # noqa: RUF012 (read only)
    backbone: str = "mmdit"


CASES = (
    Case("loss NaN", "loss"),
    Case("loss Inf", "loss", INF),
    Case("loss -Inf", "loss", -INF),
    Case("loss NaN, U-Net", "loss", backbone="unet"),
    Case("loss NaN, one skip allowed", "loss", max_skips=1, goes_on=True),
    Case("gradient NaN", "gradient"),
    Case("gradient Inf", "gradient", INF),
    Case("gradient NaN, one skip allowed, U-Net", "gradient", max_skips=1, goes_on=True, backbone="unet"),
    Case("latents of one picture NaN", "latents"),
    Case("latents of one picture Inf, bf16", "latents", INF, train={"precision": "bf16"}),
    Case("text of one caption Inf", "context", INF),
    Case("two in a row, two allowed", "loss", updates=2, max_skips=2, goes_on=True),
    Case("three in a row, two allowed", "loss", updates=3, max_skips=2),
    Case("in the second micro-batch of two", "loss", train={"accumulation": 2}),
    Case("a loss of 1e16, clipped", "scale", 1e16, goes_on=True),
    Case("a loss of 1e16, not clipped", "scale", 1e16, goes_on=True, train={"clip_norm": None}),
    Case("a loss of 1e25: the norm of its gradient overflows", "scale", 1e25),
    Case("a learning rate of 1e38: the update itself overflows", "none", train={"lr": 1e38, "warmup_images": 0}),
    Case("loss NaN on rank 1 of 2, DDP", "loss", processes=2),
    Case("loss NaN on rank 1 of 2, FSDP2", "loss", processes=2, train={"sharding": "fsdp2"}),
    Case("gradient Inf on rank 1 of 2, DDP", "gradient", INF, processes=2),
    Case("loss NaN on rank 1 of 2, one skip allowed", "loss", processes=2, max_skips=1, goes_on=True),
)
SHORT = (1, 18)


def not_finite(folder: Path, full: bool) -> Outcome:
    """F9."""
    rows = {}
    for case in CASES if full else [CASES[i] for i in SHORT]:
        rows[case.name] = _one_case(folder, case)
    bad = [name for name, row in rows.items() if row["wrong"]]
    stopped = sum(not row["went_on"] for row in rows.values())
    measured = (
        f"{len(rows)} cases, {len(bad)} wrong: no non-finite number in any checkpoint; {stopped} ended with exit code "
        f"1 on the same step in all processes, naming the sample"
    )
    return Outcome(not bad, measured, {"cases": rows})


def _one_case(folder: Path, case: Case) -> dict[str, Any]:
    """Train with something bad in it and say what was not as it should be."""
    place = folder / re.sub(r"\W+", "-", case.name)
    train = {"images": 8 * BATCH, "checkpoint_every": BATCH, "keep_checkpoints": 99, "max_skips": case.max_skips,
             "num_processes": case.processes, "save_retries": 99, **case.train}  # fmt: skip
    session = run(micro(folder, train, case.backbone), place, _poisoned(case, place), case.processes)
    said, wrong = session.output(), []
    if session.codes != [0 if case.goes_on else 1] * case.processes:
        wrong.append(f"exit codes {session.codes}")
    if not all_finite(place):
        wrong.append("a checkpoint holds numbers that are not finite")
    if "Traceback" in said:
        wrong.append("a traceback")
    steps = {int(step) for step in re.findall(r"step (\d+) \(images", said)}
    if not case.goes_on and len(steps) != 1:
        wrong.append(f"processes stopped at steps {sorted(steps)}")
    named = place.with_suffix(".poisoned")
    index = named.read_text(encoding="utf-8").split()[0] if named.is_file() else None
    if case.place not in ("scale", "none") and not re.search(rf"samples[^.]*\[[^]]*\b{index}\b", said):
        wrong.append(f"sample {index} is not named")
    if case.place in ("loss", "latents") and f"non-finite loss: [{index}]" not in said:
        wrong.append(f"sample {index} is not the one named")
    if case.goes_on and not newest(place).state["complete"]:
        wrong.append("not complete")
    return {"codes": session.codes, "stopped_at_step": sorted(steps), "went_on": case.goes_on, "wrong": wrong,
            "said": said[-600:] if wrong else ""}  # fmt: skip


def _poisoned(case: Case, place: Path) -> Callable[[], None]:
    """Return a sabotage: the sample at POSITION, and at the same place of the updates after it, is bad."""

    def sabotage() -> None:
        import mmdit.train.step as room

        draw, loss_of = room.BatchDrawer.draw, room.training_loss
        wanted = {POSITION + BATCH * i for i in range(case.updates)}
        rows: dict[float, int] = {}  # the first number of a batch's noise: the bad row

        def drawn(drawer: Any, positions: Any) -> Any:
            batch = draw(drawer, positions)
            for row, position in enumerate(batch.positions):
                if int(position) not in wanted:
                    continue
                rows[float(batch.noise.flatten()[0])] = row
                with place.with_suffix(".poisoned").open("a", encoding="utf-8") as file:
                    file.write(f"{batch.indices[row]}\n")
                if case.place == "latents":
                    batch.latents[row] *= case.value
                if case.place == "context":
                    batch.conditioning.context[row] *= case.value
            return batch

        def training_loss(denoiser: Any, latents: Any, conditioning: Any, noise: Any, *rest: Any) -> Any:
            losses = loss_of(denoiser, latents, conditioning, noise, *rest)
            row = rows.get(float(noise.flatten()[0]))
            if row is None or case.place not in ("loss", "gradient", "scale"):
                return losses
            if case.place == "gradient":
                losses.register_hook(lambda gradient: gradient * case.value)
                return losses
            factor = torch.ones_like(losses)
            factor[row] = case.value
            return losses * factor

        room.BatchDrawer.draw, room.training_loss = drawn, training_loss

    return sabotage


# --- memory -------------------------------------------------------------------------------------------------------

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
REAL, PYTHON = "the address space is limited", MemoryError()
FAKES = {"CUDA's error": CUDA, "Python's error": PYTHON}
PLACES = ("update", "validation", "samples", "checkpoint", "start")


def no_memory(folder: Path, full: bool) -> Outcome:
    """F16."""
    kinds = (*FAKES, REAL)
    every = [(place, kind) for place in PLACES for kind in kinds]
    rows = {}
    train = {"images": 8 * BATCH, "checkpoint_every": 2 * BATCH, "validate_every": 4 * BATCH, "sample_every": 4 * BATCH}
    whole = folder / "whole"
    run(micro(folder, train), whole)
    for place, kind in every if full else [("samples", REAL)]:
        rows[f"{place}: {kind}"] = _too_little(folder, train, whole, place, kind)
    bad = [name for name, row in rows.items() if row["wrong"]]
    measured = (
        f"{len(rows)} cases (real limits and allocators that refuse; {', '.join(PLACES)}): {len(bad)} wrong; exit code "
        f"4 with a hint, the last checkpoint intact, gone on with to the same bits"
    )
    return Outcome(not bad, measured, {"cases": rows})


def _too_little(folder: Path, train: dict[str, Any], whole: Path, place: str, kind: str) -> dict[str, Any]:
    config = micro(folder, train)
    run_dir = folder / re.sub(r"\W+", "-", f"{place}-{kind}")
    if place == "start":  # there is something to lose
        first = micro(folder, {**train, "images": 8 * BATCH})
        from benchmarks.faults.resuming import recording

        run(first, run_dir, recording(run_dir.with_suffix(".order"), stop=3))
    session = run(config, run_dir, _hungry(place, kind))
    said, saved, wrong = session.output(), steps_saved(run_dir), []
    if session.codes != [4]:
        wrong.append(f"exit code {session.codes}")
    if "Traceback" in said:
        wrong.append("a traceback")
    if not re.search(r"out of memory.*(--train\.|fewer|smaller|less)", said, re.DOTALL):
        wrong.append("no hint")
    least = {"update": 4, "validation": 2, "samples": 2, "checkpoint": 2, "start": 3}[place]
    if saved < least:
        wrong.append(f"the checkpoint of step {saved} is the newest, {least} must be")
    if run(config, run_dir).codes != [0] or unequal(whole, run_dir):
        wrong.append("does not go on to the same bits")
    return {"codes": session.codes, "newest_step": saved, "wrong": wrong, "said": said[-600:] if wrong else ""}


def _hungry(place: str, kind: str) -> Callable[[], None]:
    """Return a sabotage: at one place of the session more memory is wanted than there is."""

    def starve() -> None:
        if kind in FAKES:
            raise FAKES[kind]
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, before[1]))
        try:
            torch.empty(2**28)  # 1 GiB
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    def sabotage() -> None:
        import mmdit.train.saving as saving
        import mmdit.train.step as step
        import mmdit.train.trainer as trainer
        import mmdit.train.validation as validation

        module, name, at = {
            "update": (step, "training_loss", 6),
            "validation": (validation, "loss_by_level", 1),
            "samples": (validation, "image_grid", 1),
            "checkpoint": (saving, "state_tensors", 2),
            "start": (trainer, "build_run", 1),
        }[place]
        original, calls = getattr(module, name), 0

        def starving(*args: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at and rank() == 0:
                starve()
            return original(*args, **named)

        setattr(module, name, starving)

    return sabotage


RUNS = {"F9": not_finite, "F16": no_memory}
