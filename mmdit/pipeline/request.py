"""What is asked of a pipeline: prompts, sizes, guidance; checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmdit.denoiser import Conditioning
from mmdit.releases import Release
from mmdit.sampling import SkipLayerGuidance


class Texts(NamedTuple):
    """What one batch is told: its conditioning, and what guidance sets against it (None: no guidance)."""

    conditioning: Conditioning
    null: Conditioning | None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Texts:
        """Move and cast both."""
        return Texts(self.conditioning.to(device, dtype), None if self.null is None else self.null.to(device, dtype))


class Sizes(NamedTuple):
    """SDXL's micro-conditioning in pixels: what the picture is said to have been cut from. Podell et al. 2023, 2.2.

    Attributes:
        original: (height, width) before scaling; None: as the target.
        crop: (top, left) of the cut; (0, 0) gives centred objects.
        target: (height, width); None: the picture's own.
    """

    original: tuple[int, int] | None = None
    crop: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None

    def tensor(self, size: tuple[int, int]) -> Tensor:
        """Return [1, 6] for a picture of `size`."""
        target = self.target or size
        return torch.tensor([[*(self.original or target), *self.crop, *target]])


def check_lists(
    prompts: Sequence[str], indices: Sequence[int] | None, negative_prompts: Sequence[str | None] | str | None
) -> tuple[list[int], Sequence[str | None]]:
    """Return one number and one negative prompt per prompt, or say what does not fit."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of strings, got the string {prompts!r}; write [{prompts!r}]")
    if not prompts:
        raise ValueError("there are no prompts; give at least one")
    numbers = list(range(len(prompts))) if indices is None else [int(i) for i in indices]
    if isinstance(negative_prompts, str) or negative_prompts is None:
        negative_prompts = [negative_prompts] * len(prompts)
    for name, given in (("indices", numbers), ("negative_prompts", negative_prompts)):
        if len(given) != len(prompts):
            raise ValueError(f"{name} has {len(given)} entries for {len(prompts)} prompts; give one per prompt")
    return numbers, negative_prompts


def check_size(size: int | tuple[int, int], grain: int, largest: int | None) -> tuple[int, int]:
    """Return (height, width) in pixels, or say why not: multiples of `grain`, at most `largest` a side."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1 or height % grain or width % grain:
        near = [max(grain, round(side / grain) * grain) for side in (height, width)]
        raise ValueError(
            f"image size {height}x{width} is not a multiple of {grain} pixels; the nearest is {near[0]}x{near[1]}"
        )
    if largest is not None and max(height, width) > largest:
        raise ValueError(
            f"image size {height}x{width} exceeds the denoiser's table of positions: at most {largest}x{largest} pixels"
        )
    return height, width


def check_sizes(sizes: Sizes | None, size: tuple[int, int], release: Release | None) -> Tensor | None:
    """Return SDXL's six sizes, [1, 6]; None for all others, which may not be given any."""
    if release is not None and release.sizes:
        return (sizes or Sizes()).tensor(size)
    if sizes is not None:
        raise ValueError("sizes (original, crop, target) are read by SDXL alone; leave them out")
    return None


def check_skip(skip_layer: SkipLayerGuidance | bool, release: Release | None) -> SkipLayerGuidance | None:
    """Return the skip-layer guidance asked for; True means the release's own, which it must have."""
    if not isinstance(skip_layer, bool):
        return skip_layer
    own = None if release is None else release.skip_layer
    if skip_layer and own is None:
        name = "a run" if release is None else release.title
        raise ValueError(
            f"{name} has no skip-layer guidance of its own; pass SkipLayerGuidance(scale, layers, start, end)"
        )
    return own if skip_layer else None
