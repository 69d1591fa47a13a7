"""What is in memory when: parts that are fetched and put away, and blocks that are streamed to the device.

Three levels, from fast to small:

    none       every part stays on the device
    encoders   text encoders are loaded, used and freed before the denoiser is loaded; denoiser and VAE then stay
    blocks     as `encoders`, with the text encoders run on the host, and of the denoiser only the block that is
               running on the device; its weights stay in the host's memory. For accelerators
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from mmdit.registry import unknown

Offload = Literal["none", "encoders", "blocks"]
RESERVE = 0.8  # of the free memory may be weights; the rest is for activations
T = TypeVar("T")


class Part(Generic[T]):
    """One part of a pipeline: held, or fetched when it is needed and put away when it is not.

    Args:
        value: the part, where it is there already.
        fetch: makes it anew; without it the part always stays.
    """

    def __init__(self, value: T | None = None, fetch: Callable[[], T] | None = None) -> None:
        if value is None and fetch is None:
            raise ValueError("a part needs a value or a way to fetch it")
        self._value, self._fetch = value, fetch

    @property
    def resident(self) -> bool:
        """Whether it is in memory."""
        return self._value is not None

    @property
    def can_leave(self) -> bool:
        """Whether it can be put away."""
        return self._fetch is not None

    def get(self) -> T:
        """Return the part, fetched if need be."""
        if self._value is None:
            assert self._fetch is not None
            self._value = self._fetch()
        return self._value

    def put_away(self) -> None:
        """Free the part's memory, if it can be fetched again.

        Neither our modules nor the text encoders are cycles, so it is free at once, without the garbage collector.
        """
        if self._fetch is None or self._value is None:
            return
        self._value = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def stages(denoiser: nn.Module) -> list[nn.Module]:
    """Return a backbone's blocks in the order they run; together they hold nearly all of its weights.

    Raises:
        ValueError: a denoiser without known blocks.
    """
    for names in (("joint_blocks",), ("blocks",), ("input_blocks", "middle_block", "output_blocks")):
        groups = [getattr(denoiser, name, None) for name in names]
        if all(isinstance(group, nn.Module) for group in groups):
            return [block for group in groups for block in (group if isinstance(group, nn.ModuleList) else [group])]
    raise ValueError(f"a {type(denoiser).__name__} has no blocks that could be streamed; use offload 'encoders'")


class BlockStream:
    """Bring each block's weights to the device when it runs, and leave them on the host otherwise.

    Args:
        denoiser: a backbone, its weights on the host. What is outside its blocks moves to `device` and stays.
        device: where it runs.
        bring: how one tensor comes to the device; by default `tensor.to(device)`.

    The results are those of the whole denoiser on the device, bit for bit: the same kernels on the same numbers.
    """

    def __init__(
        self, denoiser: nn.Module, device: torch.device | str, bring: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self._bring = bring or (lambda tensor: tensor.to(device, non_blocking=True))
        blocks = stages(denoiser)
        inside = {id(tensor) for block in blocks for tensor in _tensors(block)}
        for tensor in _tensors(denoiser):
            if id(tensor) not in inside:
                tensor.data = self._bring(tensor.data)
        self.resident_bytes = sum(t.nbytes for t in _tensors(denoiser) if id(t) not in inside)
        self.largest_block_bytes = max(sum(t.nbytes for t in _tensors(block)) for block in blocks)
        self._hooks = [hook for block in blocks for hook in self._watch(block)]

    def _watch(self, block: nn.Module) -> list[Any]:
        home = [(tensor, tensor.data) for tensor in _tensors(block)]

        def arrive(module: nn.Module, inputs: Any) -> None:
            for tensor, stored in home:
                tensor.data = self._bring(stored)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor, stored in home:
                tensor.data = stored

        return [
            block.register_forward_pre_hook(arrive),
            block.register_forward_hook(leave, always_call=True),  # also where the block raises
        ]

    def end(self) -> None:
        """Take the hooks off; what is outside the blocks stays on the device."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def check_level(level: str, device: torch.device) -> Offload:
    """Return the level, if it exists and makes sense on the device.

    Raises:
        ValueError: an unknown level, or `blocks` where device and host are the same memory.
    """
    if level not in get_args(Offload):
        raise ValueError(unknown("offload level", level, get_args(Offload)))
    if level == "blocks" and device.type == "cpu":
        raise ValueError(
            "offload 'blocks' streams weights from the host to an accelerator; on the CPU both are the same memory: "
            "use 'encoders', and dtype 'bf16' halves what is left"
        )
    return level  # type: ignore[return-value]


def choose_level(text_bytes: int, other_bytes: int, device: torch.device, free: int | None = None) -> Offload:
    """Choose the fastest level whose weights fit into what is free on the device.

    Args:
        text_bytes: of the text encoders.
        other_bytes: of denoiser and VAE.
        free: bytes; None asks the device.
    """
    room = RESERVE * (free_memory(device) if free is None else free)
    if text_bytes + other_bytes <= room:
        return "none"
    if max(text_bytes, other_bytes) <= room or device.type == "cpu":
        return "encoders"
    return "blocks"


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be had on a device: the accelerator's, or the host's within its group's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = []
    info = Path("/proc/meminfo")
    if info.is_file():
        lines = dict(line.split(":", 1) for line in info.read_text(encoding="utf-8").splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 1024)
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.is_file() and limit.read_text(encoding="utf-8").strip() != "max":
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        used -= int(cached.get("inactive_file", 0))  # the file cache gives way
        free.append(max(0, int(limit.read_text(encoding="utf-8")) - used))
    return min(free) if free else 8 << 30  # neither is known outside Linux
