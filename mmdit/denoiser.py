"""THE door: what every backbone takes and gives, and nothing else.

    prediction = denoiser(latents, timestep, conditioning)

    latents      [B, C, H, W]   shifted and scaled VAE latents, noisy
    timestep     [B]            network time, float: 1000 t for rectified flow, the 0-based index k of the
                                releases for the variance-preserving schedule
    conditioning                the text, as below
    prediction   [B, C, H, W]   velocity, epsilon, v or sample: a property of the run, not of the class

A study may change which class stands behind the door; everything on this side of it stays the same. That is what
makes two rows of a table comparable.

Letters used in shapes throughout the project: B batch, C latent channels, H W latent height and width, P patch,
N image tokens = HW/P^2, L text tokens, D model width, A heads, K head width, E context width, G pooled width,
R pixel resolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

Streams = tuple[tuple[str, int, int, int], ...]


class Conditioning(NamedTuple):
    """Everything a denoiser is told about the wanted image; a tuple of tensors, so accelerate and FSDP move it.

    Attributes:
        context: token embeddings, [B, L, E].
        pooled: one vector per text, [B, G], or None.
        context_mask: bool [B, L], True = attend; None attends to everything, padding included (as the releases do).
        streams: static; (name, start, stop, width) of each encoder's part of L; width <= E is what is not zero-padding.
        spatial: [B, Cs, H, W], concatenated to the latents by the backbone, or None.
        control: [B, Cc, Hc, Wc], what a ControlNet reads, or None.
        negative: a second context [B, L, E] for attention-space guidance, or None.
    """

    context: Tensor
    pooled: Tensor | None = None
    context_mask: Tensor | None = None
    streams: Streams | None = None
    spatial: Tensor | None = None
    control: Tensor | None = None
    negative: Tensor | None = None

    def map(self, function: Any) -> Conditioning:
        """Apply `function` to each tensor that is present."""
        return Conditioning(*(function(field) if isinstance(field, Tensor) else field for field in self))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move all tensors to `device`; cast the floating ones to `dtype` (the mask stays bool)."""
        return self.map(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None))

    def index(self, rows: Tensor | Sequence[int] | slice) -> Conditioning:  # type: ignore[override]
        """Select rows of the batch."""
        return self.map(lambda x: x[rows])

    def repeat(self, times: int) -> Conditioning:
        """Repeat each row `times` times, neighbours together: [B, ...] -> [B * times, ...]."""
        return self.map(lambda x: x.repeat_interleave(times, dim=0))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join along the batch; shorter contexts are padded with zeros and masked, stream by stream.

        Raises:
            ValueError: `parts` is empty, or they differ in which fields are present or in their streams' names.
        """
        if not parts:
            raise ValueError("Conditioning.cat got no parts; pass at least one Conditioning")
        context, mask, streams = _cat_contexts(parts)
        joined = {}
        for name in ("pooled", "spatial", "control", "negative"):
            values = [getattr(part, name) for part in parts]
            if any(v is None for v in values) and not all(v is None for v in values):
                raise ValueError(f"Conditioning.cat: {name!r} is present in some parts and absent in others")
            joined[name] = None if values[0] is None else torch.cat(values)
        return Conditioning(context, joined["pooled"], mask, streams, joined["spatial"], joined["control"],
                            joined["negative"])  # fmt: skip


def _cat_contexts(parts: Sequence[Conditioning]) -> tuple[Tensor, Tensor | None, Streams | None]:
    """Pad each stream to its longest, join, and mask what was added."""
    layouts = [p.streams or (("context", 0, p.context.shape[1], p.context.shape[2]),) for p in parts]
    names = [tuple(s[0] for s in layout) for layout in layouts]
    if len(set(names)) != 1:
        raise ValueError(f"Conditioning.cat: the parts have different text streams: {sorted(set(names))}")
    lengths = [max(layout[s][2] - layout[s][1] for layout in layouts) for s in range(len(names[0]))]
    padded = any(layout[s][2] - layout[s][1] != lengths[s] for layout in layouts for s in range(len(lengths)))
    masked = padded or any(p.context_mask is not None for p in parts)

    contexts, masks = [], []
    for part, layout in zip(parts, layouts, strict=True):
        mask = part.context_mask
        if mask is None:
            mask = part.context.new_ones(part.context.shape[:2], dtype=torch.bool)
        for (_, start, stop, _), length in zip(layout, lengths, strict=True):
            missing = length - (stop - start)
            contexts.append(torch.nn.functional.pad(part.context[:, start:stop], (0, 0, 0, missing)))
            masks.append(torch.nn.functional.pad(mask[:, start:stop], (0, missing)))
    per_part = len(lengths)

    def join(pieces: list[Tensor]) -> Tensor:
        return torch.cat([torch.cat(pieces[i : i + per_part], dim=1) for i in range(0, len(pieces), per_part)])

    starts = [sum(lengths[:s]) for s in range(per_part)]
    streams = None
    if parts[0].streams is not None:
        streams = tuple(
            (name, start, start + length, max(layout[s][3] for layout in layouts))
            for s, (name, start, length) in enumerate(zip(names[0], starts, lengths, strict=True))
        )
    return join(contexts), join(masks) if masked else None, streams


@runtime_checkable
class Denoiser(Protocol):
    """An object obeying the door; usually an nn.Module."""

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor: ...


def check_inputs(
    latents: Tensor,
    timestep: Tensor,
    conditioning: Conditioning,
    *,
    in_channels: int,
    context_dim: int,
    pooled_dim: int | None,
    multiple: int = 1,
    max_size: int | None = None,
) -> None:
    """Refuse inputs that do not fit a backbone, in words.

    Args:
        in_channels: channels the backbone reads, `spatial` included.
        context_dim: E.
        pooled_dim: G, or None where the backbone ignores the pooled vector.
        multiple: H and W must be divisible by this (patch size, or 2^(stages - 1)).
        max_size: largest H or W in latent pixels (the position table), or None.

    Raises:
        ValueError: what, got, expected, how to fix.
    """
    if latents.ndim != 4:
        raise ValueError(f"latents must be [B, C, H, W], got shape {list(latents.shape)}")
    batch, channels, height, width = latents.shape
    if conditioning.spatial is not None:
        channels += conditioning.spatial.shape[1]
    if channels != in_channels:
        raise ValueError(
            f"latents have {channels} channels (spatial conditioning included), this denoiser reads {in_channels}; "
            f"set model.in_channels={channels} or use the VAE it was trained with"
        )
    if height % multiple or width % multiple:
        raise ValueError(
            f"latent size {height}x{width} is not a multiple of {multiple}; "
            f"choose an image size that is a multiple of {multiple} latent pixels in both directions"
        )
    if max_size is not None and max(height, width) > max_size:
        raise ValueError(
            f"latent size {height}x{width} exceeds the position table: at most {max_size}x{max_size} latent pixels; "
            f"use a smaller image or a model with a larger model.pos_embed_max_size"
        )
    if timestep.shape != (batch,):
        raise ValueError(f"timestep must be [B] = [{batch}], got shape {list(timestep.shape)}")
    context, pooled, mask = conditioning.context, conditioning.pooled, conditioning.context_mask
    if context.ndim != 3 or context.shape[0] != batch or context.shape[2] != context_dim:
        raise ValueError(f"context must be [B, L, E] = [{batch}, L, {context_dim}], got shape {list(context.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != context.shape[:2]):
        raise ValueError(
            f"context_mask must be bool [B, L] = {list(context.shape[:2])}, got {mask.dtype} {list(mask.shape)}"
        )
    if pooled_dim is not None and (pooled is None or pooled.shape != (batch, pooled_dim)):
        got = "none" if pooled is None else f"shape {list(pooled.shape)}"
        raise ValueError(f"pooled must be [B, G] = [{batch}, {pooled_dim}], got {got}")


@contextmanager
def skip_layers(denoiser: Denoiser, layers: Iterable[int]) -> Iterator[None]:
    """Leave out the named blocks while the context lasts (skip-layer guidance).

    Backbones read `skipped_layers(self)` once per forward, outside any compiled block.

    Raises:
        ValueError: a block that this denoiser does not have.
    """
    module, layers = unwrap(denoiser), frozenset(layers)
    count = getattr(module, "num_blocks", None)
    wrong = sorted(i for i in layers if i < 0 or (count is not None and i >= count))
    if wrong:
        known = "numbers from 0" if count is None else f"0 to {count - 1}"
        raise ValueError(f"skip_layers: there are no blocks {wrong}; this denoiser has {known}")
    previous = skipped_layers(module)
    module._skipped_layers = layers
    try:
        yield
    finally:
        module._skipped_layers = previous


def skipped_layers(module: Any) -> frozenset[int]:
    """The blocks that `skip_layers` has switched off."""
    return getattr(module, "_skipped_layers", frozenset())


@contextmanager
def record_attention(denoiser: Denoiser) -> Iterator[dict[str, list[Tensor]]]:
    """Collect what image tokens read from the text: {block name: [weights [B, A, N, L], one per forward]}.

    Backbones read `attention_records(self)` once per forward and, where it is not None, append there.
    """
    module = unwrap(denoiser)
    records: dict[str, list[Tensor]] = {}
    previous = attention_records(module)
    module._attention_records = records
    try:
        yield records
    finally:
        module._attention_records = previous


def attention_records(module: Any) -> dict[str, list[Tensor]] | None:
    """The dictionary of the surrounding `record_attention`, or None."""
    return getattr(module, "_attention_records", None)


def unwrap(denoiser: Any) -> Any:
    """Return the module inside DistributedDataParallel (`.module`) or torch.compile (`._orig_mod`)."""
    while True:
        inner = getattr(denoiser, "_orig_mod", None) or getattr(denoiser, "module", None)
        if inner is None:
            return denoiser
        denoiser = inner
