"""Checkpoints of a run: what goes in, what is put back, and what happens when the disk refuses.

A model that every process holds is written by the first one; a sharded model by all of them, each its own part
(`mmdit.train.shards`), under the same folder name, manifest and rules. Both load into any number of processes.
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
    prune_checkpoints,
    save_checkpoint,
    tensors_of,
)
from mmdit.train.optim import load_optimizer, optimizer_tensors
from mmdit.train.run import Run, count_parameters
from mmdit.train.shards import load_sharded, save_sharded

ROOM = 1.2  # free disk space wanted before a save, in sizes of the last checkpoint


def save(run: Run, complete: bool = False) -> Path:
    """Write a checkpoint, then prune; of a finished run also `complete.json`.

    Raises:
        CheckpointError: it could not be written; the ones before are untouched. Every process raises.
    """
    path = run.run_dir / "checkpoints" / f"{run.images_seen:012d}"
    if run.saved_at == run.images_seen and not complete:
        return path
    error = None
    try:
        check_room(run)
        path = _write(run, complete)
    except (CheckpointError, ValueError) as failure:
        error = failure
    if not _all_agree(run, error is None):
        if isinstance(error, CheckpointError):
            raise error
        raise CheckpointError(path, str(error or "another process could not write its part"), "See its message")
    run.saved_at = run.images_seen
    if run.accelerator.is_main_process:
        _tidy(run, path, complete)
    run.accelerator.wait_for_everyone()
    return path


def save_or_go_on(run: Run) -> None:
    """Write a checkpoint; where that fails (a full disk), say so, keep the last one and go on with the training.

    Raises:
        CheckpointError: `train.save_retries` checkpoints in a row have failed already.
    """
    try:
        save(run)
    except CheckpointError as error:
        run.failed_saves += 1
        allowed = run.config.train.save_retries
        run.log("event", event="save_failed", message=str(error))
        if run.failed_saves > allowed:
            raise
        if run.accelerator.is_main_process:
            print(
                f"\n{error}\ntraining goes on; failure {run.failed_saves} of at most {allowed} in a row "
                f"(train.save_retries), the next try is at the next checkpoint",
                flush=True,
            )
    else:
        run.failed_saves = 0


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


def _write(run: Run, complete: bool) -> Path:
    state = {
        "step": run.step,
        "seconds": run.seconds,
        "ema_updates": run.emas.main.updates,
        "evaluation_pending": run.evaluation_pending,
        "skipped": run.skipped,
        "complete": complete,
    }
    if run.sharded:
        return save_sharded(run.run_dir, run.images_seen, state_tensors(run), state, run.config)
    if run.accelerator.is_main_process:
        return save_checkpoint(run.run_dir, run.images_seen, state_tensors(run), state, run.config)
    return run.run_dir / "checkpoints" / f"{run.images_seen:012d}"


def _tidy(run: Run, path: Path, complete: bool) -> None:
    """Prune, and of a finished run leave the marker."""
    train = run.config.train
    every = train.keep_every
    prune_checkpoints(run.run_dir, train.keep_checkpoints, lambda n: every > 0 and n % every < train.batch_size)
    if complete:
        record = {
            "images_seen": run.images_seen,
            "step": run.step,
            "seconds": run.seconds,
            "parameters": count_parameters(run.module),
            "checkpoint": path.name,
        }
        (run.run_dir / "complete.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        run.log("event", event="complete")


def _newest_folder(run: Run) -> Path | None:
    """The newest checkpoint, unverified: only its size is asked for."""
    from mmdit.checkpoint import list_checkpoints

    found = list_checkpoints(run.run_dir)
    return found[-1] if found else None


def _all_agree(run: Run, good: bool) -> bool:
    """Say whether it went well in every process."""
    if run.accelerator.num_processes == 1:
        return good
    failures = torch.tensor(0.0 if good else 1.0, device=run.accelerator.device)
    return float(run.accelerator.reduce(failures, "sum")) == 0


def _raw(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)
