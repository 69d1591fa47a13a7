"""Checkpoints of a run: what goes in, what is put back, and what happens when the disk refuses.

A model that every process holds is written by the first one; a sharded model by all of them, each its own part
(`mmdit.train.shards`), under the same folder name, manifest and rules. Both load into any number of processes.

With `train.async_checkpoints` those of the intervals are written by a thread (`mmdit.train.background`); the last one
of a session never is. Failures count alike, a step or an interval later.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdit.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    save_checkpoint,
    tensors_of,
    write_whole,
)
from mmdit.train.optim import load_optimizer, optimizer_tensors
from mmdit.train.run import Run, count_parameters
from mmdit.train.shards import load_sharded, save_sharded

COMPLETE = "complete.json"  # the marker of a finished run
ROOM = 1.2  # free disk space wanted before a save, in sizes of the last checkpoint


def save(run: Run, complete: bool = False) -> Path:
    """Write a checkpoint, then prune; of a finished run also `complete.json`. One in the background is waited for.

    Raises:
        CheckpointError: it could not be written; the ones before are untouched. Every process raises.
    """
    path = _folder(run)
    before = settle(run)
    if before is not None:  # no matter: this one comes after it
        run.log("event", event="save_failed", message=str(before))
    if run.saved_at == run.images_seen and not complete:
        return path
    error = None
    try:
        check_room(run)
        path = _write(run, state_tensors_here(run), _counters(run, complete))
    except (CheckpointError, ValueError) as failure:
        error = failure
    _raise_together(run, path, error)
    run.saved_at = run.images_seen
    if run.accelerator.is_main_process:
        _prune(run, run.images_seen)
        if complete:
            _mark_complete(run, path)
    run.accelerator.wait_for_everyone()
    return path


def save_or_go_on(run: Run) -> None:
    """Write a checkpoint, or begin to; where that fails (a full disk), say so, keep the last one and go on training.

    Raises:
        CheckpointError: `train.save_retries` checkpoints in a row have failed already.
    """
    poll(run, wait=True)
    try:
        if run.config.train.async_checkpoints:
            begin(run)
            return
        save(run)
    except CheckpointError as error:
        _failed(run, error)
    else:
        run.failed_saves = 0


def begin(run: Run) -> None:
    """Copy the state into host memory and let the thread write it; what goes wrong there `poll` tells.

    Raises:
        CheckpointError: there is no room for it, or a parameter is not finite. Every process raises.
    """
    if run.saved_at == run.images_seen:
        return
    error, staged = None, {}
    try:
        check_room(run)
        staged = run.background.stage(state_tensors_here(run))
    except (CheckpointError, ValueError) as failure:
        error = failure
    _raise_together(run, _folder(run), error)
    counters = _counters(run, complete=False)
    group = run.background.group(run.config.train.timeout) if run.sharded else None
    main = run.accelerator.is_main_process

    def write() -> None:
        _write(run, staged, counters, group)
        if main:
            _prune(run, counters["images_seen"])

    run.background.begin(run.images_seen, write if main or run.sharded else None)


def settle(run: Run, wait: bool = True) -> CheckpointError | None:
    """Take note of the checkpoint in the background; every process must ask, all get the same kind of answer.

    Args:
        wait: until it is written; else do nothing where a process is still at it.

    Returns:
        What went wrong; None where nothing did, or nothing was in flight, or it still is.
    """
    images_seen = run.background.images_seen
    if images_seen is None or not (wait or _all_agree(run, run.background.finished())):
        return None
    error = run.background.result()
    agreed = _all_agree(run, error is None)
    if error is not None and not isinstance(error, CheckpointError | ValueError):
        raise error  # no disk's fault, but ours
    if not agreed:
        return error if isinstance(error, CheckpointError) else _elsewhere(_folder(run, images_seen), error)
    run.saved_at, run.failed_saves = images_seen, 0
    return None


def poll(run: Run, wait: bool = False) -> None:
    """Look after the checkpoint in the background: a failure there counts as that of any other.

    Raises:
        CheckpointError: as `save_or_go_on`.
    """
    error = settle(run, wait)
    if error is not None:
        _failed(run, error)


def _failed(run: Run, error: CheckpointError) -> None:
    """Count a checkpoint that could not be written, and go on; or not.

    Raises:
        CheckpointError: `error`, where it is one too many in a row.
    """
    run.failed_saves += 1
    allowed = run.config.train.save_retries
    run.log("event", event="save_failed", message=str(error))
    if run.failed_saves > allowed:
        raise error
    if run.accelerator.is_main_process:
        print(
            f"\n{error}\ntraining goes on; failure {run.failed_saves} of at most {allowed} in a row "
            f"(train.save_retries), the next try is at the next checkpoint",
            flush=True,
        )


def check_room(run: Run) -> None:
    """Refuse to begin a save that cannot fit, before anything is written.

    Raises:
        CheckpointError: less free space than `ROOM` times the newest checkpoint.
    """
    if not run.accelerator.is_main_process:
        return
    newest = latest_checkpoint(run.run_dir) if run.failed_saves else _newest_folder(run)
    if newest is None:
        return
    size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    free = shutil.disk_usage(run.run_dir).free
    if free < ROOM * size:
        raise CheckpointError(
            run.run_dir,
            f"the disk has {free / 2**30:.2f} GiB free, a checkpoint takes {size / 2**30:.2f}",
            f"Free {(ROOM * size - free) / 2**30:.2f} GiB or lower train.keep_checkpoints; {newest.name} is untouched",
        )


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Put everything back as it was, bit for bit (into another number of processes: the same numbers)."""
    state = checkpoint.state
    try:
        if run.sharded:
            load_sharded(checkpoint, run.module, run.emas, _raw(run.optimizer), state["ema_updates"])
        else:
            tensors = checkpoint.tensors
            run.module.load_state_dict(tensors["model"])
            for stem, ema in run.emas.all.items():
                ema.load(tensors[stem], state["ema_updates"])
            load_optimizer(_raw(run.optimizer), run.module, tensors["optimizer"])
        run.step, run.images_seen, run.seconds = state["step"], state["images_seen"], state["seconds"]
        run.evaluation_pending = state["evaluation_pending"]
        run.skipped = state.get("skipped", 0)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(checkpoint.path, f"does not fit this run ({error})", "Was the model changed?") from error
    run.saved_at = run.images_seen


def state_tensors(run: Run) -> dict[str, dict[str, Tensor]]:
    """Return everything a run is made of, by file stem; under FSDP2 the tensors are this process's shards."""
    return {
        "model": tensors_of(run.module),
        **{stem: ema.state_dict(run.module) for stem, ema in run.emas.all.items()},
        "optimizer": optimizer_tensors(_raw(run.optimizer), run.module),
    }


def state_tensors_here(run: Run) -> dict[str, dict[str, Tensor]]:
    """Return what this process writes: its shards, or everything in the first process and nothing in the others."""
    return state_tensors(run) if run.sharded or run.accelerator.is_main_process else {}


def _counters(run: Run, complete: bool) -> dict[str, Any]:
    return {
        "images_seen": run.images_seen,
        "step": run.step,
        "seconds": run.seconds,
        "ema_updates": run.emas.main.updates,
        "evaluation_pending": run.evaluation_pending,
        "skipped": run.skipped,
        "complete": complete,
    }


def _write(run: Run, tensors: dict[str, dict[str, Tensor]], counters: dict[str, Any], group: Any = None) -> Path:
    images_seen = counters["images_seen"]
    if run.sharded:
        return save_sharded(run.run_dir, images_seen, tensors, counters, run.config, group)
    if run.accelerator.is_main_process:
        return save_checkpoint(run.run_dir, images_seen, tensors, counters, run.config)
    return _folder(run, images_seen)


def _prune(run: Run, newest: int) -> None:
    train = run.config.train
    every = train.keep_every
    prune_checkpoints(run.run_dir, train.keep_checkpoints, lambda n: every > 0 and n % every < train.batch_size, newest)


def _mark_complete(run: Run, path: Path) -> None:
    """Leave the marker of a finished run."""
    record = {
        "images_seen": run.images_seen,
        "step": run.step,
        "seconds": run.seconds,
        "parameters": count_parameters(run.module),
        "checkpoint": path.name,
    }
    write_whole(run.run_dir / COMPLETE, json.dumps(record, indent=1))
    run.log("event", event="complete")


def _folder(run: Run, images_seen: int | None = None) -> Path:
    return run.run_dir / "checkpoints" / f"{run.images_seen if images_seen is None else images_seen:012d}"


def _newest_folder(run: Run) -> Path | None:
    """The newest checkpoint, unverified: only its size is asked for."""
    found = list_checkpoints(run.run_dir)
    return found[-1] if found else None


def _raise_together(run: Run, path: Path, error: CheckpointError | ValueError | None) -> None:
    """Raise in every process what went wrong in one."""
    if not _all_agree(run, error is None):
        raise error if isinstance(error, CheckpointError) else _elsewhere(path, error)


def _elsewhere(path: Path, error: BaseException | None) -> CheckpointError:
    return CheckpointError(path, str(error or "another process could not write its part"), "See its message")


def _all_agree(run: Run, good: bool) -> bool:
    """Say whether it went well in every process."""
    if run.accelerator.num_processes == 1:
        return good
    failures = torch.tensor(0.0 if good else 1.0, device=run.accelerator.device)
    return float(run.accelerator.reduce(failures, "sum")) == 0


def _raw(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)
