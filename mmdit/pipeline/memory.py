"""How much memory a released model takes, part by part and level by level, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mmdit.models import build_denoiser
from mmdit.models.modulation_table import table_bytes
from mmdit.pipeline.offload import Offload, stages
from mmdit.pipeline.sources import Sources
from mmdit.releases import Release

GIB = 2**30


@dataclass(frozen=True)
class PartMemory:
    """One part: its parameters, how they are stored, and what they take once loaded."""

    name: str
    parameters: int
    stored: str
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes of its weights in memory."""
        return self.parameters * self.dtype.itemsize


@dataclass(frozen=True)
class MemoryPlan:
    """What loading would take; weights only, activations come on top.

    Attributes:
        release: the family.
        parts: denoiser, vae, text encoders.
        resident_block_bytes: of the denoiser under `blocks`: what is outside its blocks, and its largest block.
        modulation_bytes: of the denoiser's adaLN weights, which tables can stand for.
    """

    release: Release
    parts: tuple[PartMemory, ...]
    resident_block_bytes: int
    modulation_bytes: int

    @property
    def text_bytes(self) -> int:
        """Of all text encoders."""
        return sum(part.bytes for part in self.parts if part.name not in ("denoiser", "vae"))

    @property
    def other_bytes(self) -> int:
        """Of denoiser and VAE."""
        return sum(part.bytes for part in self.parts) - self.text_bytes

    def peak(self, level: Offload) -> int:
        """Return the most bytes of weights that are on the device at once."""
        if level == "none":
            return self.text_bytes + self.other_bytes
        if level == "encoders":
            return max(self.text_bytes, self.other_bytes)
        return self.resident_block_bytes + sum(part.bytes for part in self.parts if part.name == "vae")

    def table(self, chosen: Offload | None = None) -> str:
        """Return the plan as text, the chosen level marked."""
        lines = [f"{self.release.title}", f"{'part':<10}{'parameters':>16}  {'stored':<18}{'in memory':<12}{'GiB':>8}"]
        for part in self.parts:
            dtype = str(part.dtype).removeprefix("torch.")
            lines.append(f"{part.name:<10}{part.parameters:>16,}  {part.stored:<18}{dtype:<12}{part.bytes / GIB:>8.2f}")
        lines.append("weights on the device at most, by offload level (GiB; activations come on top):")
        for level in ("none", "encoders", "blocks"):
            mark = "  <- this run" if level == chosen else ""
            lines.append(f"  {level:<10}{self.peak(level) / GIB:>8.2f}{mark}")
        if self.modulation_bytes:
            freed = self.modulation_bytes / GIB
            lines.append(f"adaLN tables (--tables) free up to {freed:.2f} GiB of the denoiser while sampling")
        return "\n".join(lines)


def plan_memory(sources: Sources, dtypes: Mapping[str, torch.dtype]) -> MemoryPlan:
    """Plan from headers; nothing is loaded.

    Args:
        dtypes: part -> what it will be held in.
    """
    dtype = dtypes["denoiser"]
    with torch.device("meta"):
        denoiser = build_denoiser(sources.config)
    blocks = stages(denoiser)
    whole = sum(p.numel() for p in denoiser.parameters()) + sum(b.numel() for b in denoiser.buffers())
    inside = [sum(p.numel() for p in block.parameters()) for block in blocks]
    parts = tuple(
        PartMemory(name, found.parameters, found.stored, dtypes[name]) for name, found in sources.parts.items()
    )
    return MemoryPlan(
        sources.release,
        parts,
        (whole - sum(inside) + max(inside)) * dtype.itemsize,
        table_bytes(denoiser, 1, 1, 1)[1] // torch.float32.itemsize * dtype.itemsize,
    )
