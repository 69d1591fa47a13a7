"""Sharded checkpoints: every process writes its part of each tensor, as safetensors.

    checkpoints/<images_seen>/model/shard-00001-model-00001-of-00001.safetensors   what process 0 holds
                              model/shard-00002-...                                what process 1 holds
                              ema/...  optimizer/...  state.json  config.yaml  manifest.json

The files are torch.distributed.checkpoint's with its safetensors writer (the default one pickles): each file's
metadata says where in the whole tensor its piece lies, so any number of processes can read them.
`mmdit.checkpoint.load_checkpoint` puts whole tensors together from them for whoever samples or evaluates.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from mmdit.checkpoint import (
    CONFIG,
    MANIFEST,
    STATE,
    TEMPORARY,
    Checkpoint,
    CheckpointError,
    fingerprint,
    make_folder,
    manifest_text,
    put_in_place,
    sync,
    verify_checkpoint,
    write_text,
)
from mmdit.config import RunConfig, to_yaml
from mmdit.train.ema import EMAs


def save_sharded(
    run_dir: str | Path,
    images_seen: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    config: RunConfig,
    group: Any = None,
) -> Path:
    """Write one checkpoint together; every process calls this with its shards. Arguments as `save_checkpoint`.

    Args:
        group: processes agree over this group; None: the default one. A thread beside the training needs its own.

    Raises:
        CheckpointError: in every process, where one of them could not write, or not read back what it wrote.
    """
    folder, rank = Path(run_dir) / "checkpoints", dist.get_rank()
    path = folder / f"{images_seen:012d}"
    names = [f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}"]
    dist.broadcast_object_list(names, src=0, group=group)  # one name for all
    temporary = folder / names[0]
    problem: str | None = None
    mine: dict[str, dict[str, Any]] = {}
    try:
        if rank == 0:
            make_folder(folder)
            temporary.mkdir()
    except OSError as error:
        problem = str(error)
    problem = _worst(problem, group)
    if problem is None:
        try:
            mine = _write_shards(temporary, tensors, rank, group)
        except (OSError, RuntimeError, dcp.CheckpointException) as error:
            problem = f"{type(error).__name__}: {error}"
        problem = _worst(problem, group)
    if problem is None:
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine, group=group)
        try:
            if rank == 0:
                _finish(temporary, path, {k: v for part in every for k, v in part.items()}, images_seen, state, config)
        except OSError as error:
            problem = str(error)
        problem = _worst(problem, group)
    if problem is not None:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            path, f"could not be written ({problem})", "Free disk space; the checkpoints before it are untouched"
        )
    _verify_together(path, rank, group)
    return path


def _write_shards(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], rank: int, group: Any
) -> dict[str, dict[str, Any]]:
    """Write and sync this process's files; return their entries of the manifest."""
    for stem, table in tensors.items():
        writer = HuggingFaceStorageWriter(str(folder / stem), save_distributed=True)
        detached = {name: tensor.detach() for name, tensor in table.items()}
        dcp.save(detached, storage_writer=writer, process_group=group)
    entries = {}
    for file in sorted(folder.glob(f"*/shard-{rank + 1:05d}-*")):
        sync(file)
        entries[f"{file.parent.name}/{file.name}"] = fingerprint(file)
    return entries


def _verify_together(path: Path, rank: int, group: Any) -> None:
    """Read back what this process wrote, and agree.

    Raises:
        CheckpointError: in every process, where one of them reads other bytes than it wrote.
    """
    unreadable: CheckpointError | None = None
    try:
        verify_checkpoint(path, only=lambda name: "/" not in name or f"/shard-{rank + 1:05d}-" in name)
    except CheckpointError as error:
        unreadable = error
    problem = _worst(None if unreadable is None else str(unreadable), group)
    if problem is not None:
        raise unreadable or CheckpointError(path, f"another process reads back other bytes ({problem})", _ASK)


def _finish(
    temporary: Path, path: Path, files: dict[str, Any], images_seen: int, state: Mapping[str, Any], config: RunConfig
) -> None:
    """Write what is not tensors, the manifest last, and make the checkpoint visible."""
    write_text(temporary / STATE, json.dumps({**state, "images_seen": images_seen}, indent=1, sort_keys=True))
    write_text(temporary / CONFIG, to_yaml(config))
    for name in (STATE, CONFIG):
        sync(temporary / name)
        files[name] = fingerprint(temporary / name)
    for left in [p for p in temporary.rglob("*") if p.is_file() and str(p.relative_to(temporary)) not in files]:
        left.unlink()  # the writer's own index, which says nothing that the shards do not
    write_text(temporary / MANIFEST, manifest_text(files))
    for place in (temporary / MANIFEST, *(p for p in temporary.iterdir() if p.is_dir()), temporary):
        sync(place)
    put_in_place(temporary, path)
    sync(path.parent)


_ASK = "Look at that process's disk; the checkpoints before it are untouched"


def _worst(problem: str | None, group: Any) -> str | None:
    """Return the first problem any process has; all get the same answer."""
    every: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, problem, group=group)
    return next((p for p in every if p is not None), None)


def load_sharded(
    checkpoint: Checkpoint, denoiser: nn.Module, emas: EMAs, optimizer: torch.optim.Optimizer, ema_updates: int
) -> None:
    """Read a checkpoint into a sharded module, its averages and its optimiser; each process reads what it needs.

    The number of processes may differ from that of the writing; a checkpoint written whole is read as well.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    _begin_moments(optimizer)
    names = {id(parameter): name for name, parameter in denoiser.named_parameters()}
    moments = {
        f"{key}.{names[id(parameter)]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
    tables: dict[str, Mapping[str, Tensor]] = {"model": denoiser.state_dict(), "optimizer": moments}
    tables |= {stem: dict(zip(ema.names, ema.averages, strict=True)) for stem, ema in emas.all.items()}
    for stem, table in tables.items():
        folder = checkpoint.path / stem
        try:
            if folder.is_dir():
                dcp.load(dict(table), storage_reader=HuggingFaceStorageReader(str(folder)))
            else:
                _scatter(table, checkpoint.tensors[stem])
        except (KeyError, RuntimeError, ValueError, dcp.CheckpointException) as error:
            raise CheckpointError(checkpoint.path, f"its {stem} does not fit this run ({error})", _CHANGED) from error
    for ema in emas.all.values():
        ema.updates = ema_updates


_CHANGED = "Was the model changed?"


def _begin_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW its state as its first step would, so that there is something to read into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state.setdefault("step", step)
            for key in ("exp_avg", "exp_avg_sq"):
                state.setdefault(key, torch.zeros_like(parameter, memory_format=torch.preserve_format))


def _scatter(table: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into sharded ones."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, tensor in table.items():
        if whole[name].shape != tensor.shape:
            raise ValueError(f"{name} is {list(whole[name].shape)}, the run has {list(tensor.shape)}")
        with torch.no_grad():
            if isinstance(tensor, DTensor):
                part = distribute_tensor(whole[name].to(tensor.device), tensor.device_mesh, tensor.placements)
                tensor.to_local().copy_(part.to_local())
            else:
                tensor.copy_(whole[name])
