"""What a run tells about itself while it trains: speed, waiting, memory, the loss by t, gradient norms by part."""

from __future__ import annotations

import resource
import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmdit.denoiser import Conditioning
from mmdit.train.sharding import whole

T_BINS = 8  # equal bins of t in (0, 1]

# dense bf16 matrix products, TFLOP/s of one device; source: NVIDIA's data sheets (A100, L40S, H100, H200, B200)
PEAK_TFLOPS = {"A100": 312.0, "L40S": 362.0, "H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}


class Watch:
    """Sums since the last record; nothing here waits for the device until `record` is called.

    Args:
        device: where losses are.
        training_flop: FLOP of one image, forward and backward; 0 leaves TFLOP/s out.
        peak_tflops: of one device, for MFU; None leaves it out.
    """

    def __init__(self, device: torch.device, training_flop: int = 0, peak_tflops: float | None = None) -> None:
        self.device, self.training_flop, self.peak = device, training_flop, peak_tflops
        self.clear()

    def clear(self) -> None:
        """Begin a new interval."""
        self.loss_sums = torch.zeros(T_BINS, device=self.device, dtype=torch.float64)
        self.counts = torch.zeros(T_BINS, device=self.device, dtype=torch.float64)
        self.waited = self.seconds = 0.0
        self.images = 0

    def see(self, t: Tensor, losses: Tensor) -> None:
        """Take in one micro-batch: t [B] in (0, 1], losses [B]."""
        bins = (t.to(self.device) * T_BINS).ceil().long().clamp(1, T_BINS) - 1
        self.loss_sums.index_add_(0, bins, losses.double())
        self.counts.index_add_(0, bins, torch.ones_like(losses, dtype=torch.float64))

    def record(self, accelerator: Any) -> dict[str, Any]:
        """Return the record of this interval and begin the next; every process must ask.

        `images_per_second` counts all processes, `tflops_per_device` and `mfu` one; `data_wait` is the share of
        training time spent waiting for batches; memory in GiB is this process's peak (the device's where there is one).
        """
        both = accelerator.reduce(torch.stack([self.loss_sums, self.counts]), "sum").cpu()
        sums, counts = both.tolist()
        seconds = max(self.seconds, 1e-9)
        speed = self.images / seconds
        found: dict[str, Any] = {
            "images_per_second": round(speed, 2),
            "data_wait": round(self.waited / seconds, 4),
            "memory_gib": round(peak_memory(self.device) / 2**30, 3),
            "loss_by_t": [total / count if count else None for total, count in zip(sums, counts, strict=True)],
        }
        if self.training_flop:
            found["tflops_per_device"] = round(speed * self.training_flop / accelerator.num_processes / 1e12, 4)
            if self.peak:
                found["mfu"] = round(found["tflops_per_device"] / self.peak, 4)
        self.clear()
        return found


def peak_memory(device: torch.device) -> int:
    """Return the most memory used so far, bytes: allocated on a GPU, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_tflops(device: torch.device, given: float | None) -> float | None:
    """Return the peak of one device: as given, or that of a known GPU, or None."""
    if given is not None or device.type != "cuda":
        return given
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


def training_flop(denoiser: nn.Module, latents: Tensor, conditioning: Conditioning) -> int:
    """Count FLOP of one image, forward and backward, on `meta`: one multiply-add is two, shapes as in a real batch.

    Recomputation by activation checkpointing is not counted: it is no useful work.
    """
    shapes = tuple(None if x is None else (1, *x.shape[1:]) for x in (conditioning.context, conditioning.pooled))
    masked = conditioning.context_mask is not None
    backbone: Any = type(denoiser)
    return _count(backbone, denoiser.config, (1, *latents.shape[1:]), shapes, masked, conditioning.streams)


@lru_cache(maxsize=8)
def _count(
    backbone: Any, config: Any, latents: tuple[int, ...], text: tuple[Any, Any], masked: bool, streams: Any
) -> int:
    with torch.device("meta"):
        denoiser = backbone(config)
        context = torch.empty(text[0])
        mask = torch.ones(text[0][:2], dtype=torch.bool) if masked else None
        conditioning = Conditioning(context, None if text[1] is None else torch.empty(text[1]), mask, streams)
        with FlopCounterMode(display=False) as counter:
            denoiser(torch.empty(latents), torch.empty(1), conditioning).sum().backward()
    return int(counter.get_total_flops())


def part_norms(denoiser: nn.Module) -> dict[str, float]:
    """Return the gradient's norm by part of the network; every process must ask where it is sharded.

    A part is a child of the denoiser; of a list of blocks that each hold a few named children (the two streams of an
    MMDiT) these are told apart.
    """
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in denoiser.named_parameters():
        if parameter.grad is not None:
            groups.setdefault(_part(denoiser, name), []).append(parameter.grad)
    return {part: float(whole(torch.nn.utils.get_total_norm(grads))) for part, grads in groups.items()}


def _part(denoiser: nn.Module, name: str) -> str:
    first, *rest = name.split(".")
    child = getattr(denoiser, first)
    named = isinstance(child, nn.ModuleList) and len(rest) > 1 and not rest[1].isdigit()
    if named and len(list(child[int(rest[0])].named_children())) <= 3:
        return f"{first}.{rest[1]}"
    return first
