"""One model over many processes (FSDP2), and what is done block by block: sharding, checkpointing, compilation.

`fully_shard` is applied by ourselves, not through accelerate's plugin: on a machine without GPU that plugin silently
trains with DDP instead, and then a CPU test would test nothing. Parameters become DTensors whose shards every process
updates on its own; the optimiser and the averages follow, since both only see tensors.

Source: Zhao et al. 2023, arXiv:2304.11277 (FSDP); Chen et al. 2016, arXiv:1604.06174 (activation checkpointing).
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from mmdit.config import ConfigError, TrainConfig


def repeated_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """Return the blocks a backbone is a sequence of: entries of its module lists, and a U-Net's middle."""
    blocks = [block for child in denoiser.children() if isinstance(child, nn.ModuleList) for block in child]
    middle = getattr(denoiser, "middle_block", None)
    return [*blocks, middle] if middle is not None else blocks


def prepare_blocks(denoiser: nn.Module, config: TrainConfig) -> None:
    """Switch on activation checkpointing and compilation, block by block and in place: names stay as they are.

    Compiling the repeated block costs one compilation for all of them (seen by peers: 67 s whole, 9.6 s by block).
    """
    for block in repeated_blocks(denoiser):
        if config.activation_checkpointing:
            block.forward = partial(_recomputed, block, block.forward)
        if config.compile:
            block.compile()


def _recomputed(block: nn.Module, forward: Any, *inputs: Any) -> Any:
    """Run a block; where gradients are wanted, keep only its inputs and run it again in the backward pass."""
    if not (block.training and torch.is_grad_enabled()):
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)  # no block draws numbers


def shard(denoiser: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """Spread parameters over the processes in place, each block a unit that is gathered when its turn comes.

    Under bf16 the gathered copies are bf16 and gradients are summed in float32; the shards stay float32. Inputs are
    not cast: at bf16 the timestep 999 and its neighbours are one number.

    Raises:
        ConfigError: no process group, or a shard_size that does not divide the processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 0
    if not world:
        raise ConfigError(
            f"train.sharding {config.sharding} needs processes: launch with torchrun --nproc_per_node N -m mmdit.train "
            f"... --train.num_processes N"
        )
    if config.sharding == "hsdp":
        size = shards_of(config, world)
        mesh = init_device_mesh(device.type, (world // size, size), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if config.precision == "bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # a warning about in-place changes of a block's output, which no backbone here makes (the tests compare losses)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    for block in repeated_blocks(denoiser):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The outermost unit embeds the timestep and stays in float32. It lets go of its parameters after every forward:
    # by default it would keep them for the backward pass, and after a validation with the averages train on those.
    whole_model = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(denoiser, mesh=mesh, mp_policy=whole_model, reshard_after_forward=True)
    return denoiser


def shards_of(config: TrainConfig, processes: int) -> int:
    """Return over how many processes one copy of the model is spread; `hsdp` without a size: over those of a machine.

    Raises:
        ConfigError: `hsdp` with a shard_size that does not divide the processes.
    """
    if config.sharding == "none":
        return 1
    if config.sharding == "fsdp2":
        return processes
    size = config.shard_size or min(torch.cuda.device_count(), processes) or processes
    if processes % size:
        raise ConfigError(f"train.shard_size {size} does not divide the {processes} processes")
    return size


def is_sharded(module: nn.Module) -> bool:
    """Say whether a module's parameters are spread over processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds: all of it where nothing is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor on every process; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
