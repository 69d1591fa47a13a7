"""What the state of a training takes in each process, on paper: parameters, gradients, moments, averages, copies.

Counted from the shapes of a module (on `meta`, so 8 billion parameters cost nothing), by the rules of
`mmdit.train.sharding`; the tests compare it with the bytes that real processes hold. Activations are not in it: those
are counted by `mmdit.train.estimate`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn

from mmdit.config import TrainConfig
from mmdit.train.sharding import repeated_blocks, shards_of

_FLOAT32, _BFLOAT16 = 4, 2


class StateMemory(NamedTuple):
    """Bytes in the process that holds most (the first).

    Attributes:
        parameters: float32, those the optimiser moves.
        gradients: float32.
        moments: AdamW's two, float32, and its step counts.
        averages: every EMA, float32.
        copies: what comes and goes within a step: bf16 copies that autocast makes of the weights; under sharding the
            gathered block, the next one, and the gradients of one before they are spread again.
    """

    parameters: int
    gradients: int
    moments: int
    averages: int
    copies: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def state_memory(denoiser: nn.Module, config: TrainConfig, processes: int | None = None) -> StateMemory:
    """Count what a process holds of a training's state.

    Args:
        denoiser: not sharded yet; may be on `meta`.
        config: `sharding`, `shard_size`, `precision`, `more_emas`.
        processes: how many train; None: `config.num_processes`.

    Raises:
        ValueError: `hsdp` with a shard_size that does not divide the processes.

    Source: Rajbhandari et al. 2019, arXiv:1910.02054 (what a training's state consists of); shards are cut along the
    first axis, as torch's `fully_shard` does, so the first process holds the rounded-up part of each parameter.
    """
    processes = processes or config.num_processes
    ways = shards_of(config, processes)
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    held = sum(_part(p, ways) for p in trained)
    return StateMemory(
        parameters=_FLOAT32 * sum(_part(p, ways) for p in denoiser.parameters()),
        gradients=_FLOAT32 * held,
        moments=2 * _FLOAT32 * held + _FLOAT32 * len(trained),
        averages=_FLOAT32 * (1 + len(config.more_emas)) * sum(_part(p, ways) for p in denoiser.parameters()),
        copies=_copies(denoiser, config),
    )


def checkpoint_memory(denoiser: nn.Module, config: TrainConfig, processes: int | None = None) -> int:
    """Return the host bytes that `train.async_checkpoints` keeps in the first process (under sharding: in each)."""
    state = state_memory(denoiser, config, processes)
    # the averages' files hold the buffers, too; every state dict has them
    buffers = sum(b.numel() * b.element_size() for b in denoiser.buffers())
    return state.parameters + state.moments + state.averages + (2 + len(config.more_emas)) * buffers


def _part(tensor: nn.Parameter, ways: int) -> int:
    """Numbers of a parameter in the first of so many shards."""
    if tensor.ndim == 0:
        return 1
    return math.ceil(tensor.shape[0] / ways) * (tensor.numel() // max(1, tensor.shape[0]))


def _copies(denoiser: nn.Module, config: TrainConfig) -> int:
    compute = _BFLOAT16 if config.precision == "bf16" else _FLOAT32
    every = sum(p.numel() for p in denoiser.parameters())
    if config.sharding == "none":
        # autocast keeps the bf16 weights of matrix products until the backward pass has used them
        matrices = sum(p.numel() for p in denoiser.parameters() if p.ndim > 1)
        return compute * matrices if config.precision == "bf16" else 0
    blocks = [sum(p.numel() for p in block.parameters()) for block in repeated_blocks(denoiser)]
    largest, outermost = max(blocks), every - sum(blocks)
    # this block and the next one gathered, one block's gradients as computed and as summed; the outermost unit in fp32
    return (2 * compute + compute + _FLOAT32) * largest + 2 * _FLOAT32 * outermost
