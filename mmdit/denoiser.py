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
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

Streams = tuple[tuple[str, int, int, int], ...]


class AttentionGuidance(NamedTuple):
    """How a second, negative text acts on what image tokens read from the first; `guide` in `mmdit.models.layers`.

    Attributes:
        mode: `kv_subtract`: keys and values K(pos) - weight K(neg), V likewise; 0 is off.
            `nag`: the attention's outputs, extrapolated to pos + (weight - 1)(pos - neg); 1 is off.
        weight: lambda, or the scale of `nag`.
        tau: `nag` only; the extrapolated output may have at most tau times the L1 norm of the positive one.
        alpha: `nag` only; share of the extrapolated output in the result.

    Source: Chen et al. 2025, arXiv:2505.21179 (`nag`, in the form of its release, where scale 1 is off).
    """

    mode: Literal["kv_subtract", "nag"]
    weight: float
    tau: float = 2.5
    alpha: float = 0.25


class Conditioning(NamedTuple):
    """Everything a denoiser is told about the wanted image; a tuple of tensors, so accelerate and FSDP move it.

    Attributes:
        context: token embeddings, [B, L, E].
        pooled: one vector per text, [B, G], or None.
        context_mask: bool [B, L], True = attend; None attends to everything, padding included (as the releases do).
        streams: static; (name, start, stop, width) of each encoder's part of L; width <= E is what is not zero-padding.
        spatial: [B, Cs, H, W], concatenated to the latents by the backbone, or None.
        control: [B, Cc, Hc, Wc], what a ControlNet reads, or None.
        negative: a second context [B, L, E] for attention-space guidance, laid out in the same streams, or None.
        negative_mask: bool [B, L] as `context_mask`, of `negative`.
        guidance: static; what is done with `negative`. Given where `negative` is.
    """

    context: Tensor
    pooled: Tensor | None = None
    context_mask: Tensor | None = None
    streams: Streams | None = None
    spatial: Tensor | None = None
    control: Tensor | None = None
    negative: Tensor | None = None
    negative_mask: Tensor | None = None
    guidance: AttentionGuidance | None = None

    def map(self, function: Any) -> Conditioning:
        """Apply `function` to each tensor that is present."""
        fields: Any = (function(field) if isinstance(field, Tensor) else field for field in self)
        return Conditioning(*fields)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move all tensors to `device`; cast the floating ones to `dtype` (the mask stays bool)."""
        return self.map(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None))

    def index(self, rows: Tensor | Sequence[int] | slice) -> Conditioning:  # type: ignore[override]
        """Select rows of the batch."""
        return self.map(lambda x: x[rows])

    def repeat(self, times: int) -> Conditioning:
        """Repeat each row `times` times, neighbours together: [B, ...] -> [B * times, ...]."""
        return self.map(lambda x: x.repeat_interleave(times, dim=0))

    def with_negative(self, negative: Conditioning, guidance: AttentionGuidance) -> Conditioning:
        """Set a second text against this one in attention; both are padded, stream by stream, to the longer.

        Only the text of `negative` is taken: attention-space guidance leaves the pooled vector the prompt's own.

        Raises:
            ValueError: another number of rows, or other streams.
        """
        rows = self.context.shape[0]
        if negative.context.shape[0] != rows:
            raise ValueError(f"the negative text has {negative.context.shape[0]} rows, the text {rows}; give as many")
        texts = [Conditioning(c.context, context_mask=c.context_mask, streams=c.streams) for c in (self, negative)]
        both = Conditioning.cat(texts)
        (context, other), masks = both.context.chunk(2), (None, None)
        if both.context_mask is not None:
            masks = both.context_mask.chunk(2)
        return self._replace(
            context=context, context_mask=masks[0], streams=both.streams, negative=other, negative_mask=masks[1],
            guidance=guidance,
        )  # fmt: skip

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join along the batch; shorter contexts are padded with zeros and masked, stream by stream.

        Raises:
            ValueError: `parts` is empty, or they differ in which fields are present or in their streams' names.
        """
        if not parts:
            raise ValueError("Conditioning.cat got no parts; pass at least one Conditioning")
        layouts, lengths = _common_layout(parts)
        joined: dict[str, Any] = {}
        for name in ("pooled", "spatial", "control", "negative"):
            values = [getattr(part, name) for part in parts]
            if any(v is None for v in values) and not all(v is None for v in values):
                raise ValueError(f"Conditioning.cat: {name!r} is present in some parts and absent in others")
            if values[0] is not None and name != "negative":
                joined[name] = torch.cat(values)
        if len({part.guidance for part in parts}) > 1:
            raise ValueError(f"Conditioning.cat: the parts are guided differently: {[p.guidance for p in parts]}")
        for text, mask in (("context", "context_mask"), ("negative", "negative_mask")):
            if getattr(parts[0], text) is None:
                continue
            pairs = [(getattr(part, text), getattr(part, mask)) for part in parts]
            joined[text], joined[mask] = _cat_texts(pairs, layouts, lengths)
        if parts[0].streams is not None:
            joined["streams"] = _joined_streams(layouts, lengths)
        return Conditioning(**joined, guidance=parts[0].guidance)


def _common_layout(parts: Sequence[Conditioning]) -> tuple[list[Streams], list[int]]:
    """Return the streams of each part, and the length that each stream needs to hold the longest."""
    layouts = [p.streams or (("context", 0, p.context.shape[1], p.context.shape[2]),) for p in parts]
    names = {tuple(s[0] for s in layout) for layout in layouts}
    if len(names) != 1:
        raise ValueError(f"Conditioning.cat: the parts have different text streams: {sorted(names)}")
    return layouts, [max(layout[s][2] - layout[s][1] for layout in layouts) for s in range(len(layouts[0]))]


def _cat_texts(
    pairs: Sequence[tuple[Tensor, Tensor | None]], layouts: Sequence[Streams], lengths: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """Pad each stream of each (text [B, L, E], mask [B, L]) to `lengths`, join, and mask what was added."""
    contexts, masks = [], []
    for (context, mask), layout in zip(pairs, layouts, strict=True):
        mask = context.new_ones(context.shape[:2], dtype=torch.bool) if mask is None else mask
        missing = [length - (stop - start) for (_, start, stop, _), length in zip(layout, lengths, strict=True)]
        pieces = [(start, stop, n) for (_, start, stop, _), n in zip(layout, missing, strict=True)]
        contexts.append(torch.cat([F.pad(context[:, a:b], (0, 0, 0, n)) for a, b, n in pieces], dim=1))
        masks.append(torch.cat([F.pad(mask[:, a:b], (0, n)) for a, b, n in pieces], dim=1))
    padded = any(context.shape[1] != sum(lengths) for context, _ in pairs)
    masked = padded or any(mask is not None for _, mask in pairs)
    return torch.cat(contexts), torch.cat(masks) if masked else None


def _joined_streams(layouts: Sequence[Streams], lengths: Sequence[int]) -> Streams:
    starts = [sum(lengths[:s]) for s in range(len(lengths))]
    return tuple(
        (layouts[0][s][0], start, start + length, max(layout[s][3] for layout in layouts))
        for s, (start, length) in enumerate(zip(starts, lengths, strict=True))
    )


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
    _check_negative(conditioning)
    if pooled_dim is not None and (pooled is None or pooled.shape != (batch, pooled_dim)):
        got = "none" if pooled is None else f"shape {list(pooled.shape)}"
        raise ValueError(f"pooled must be [B, G] = [{batch}, {pooled_dim}], got {got}")


def _check_negative(conditioning: Conditioning) -> None:
    """Refuse a negative text that does not lie beside the positive one, or of which nobody says what to do with it."""
    negative, mask, guidance = conditioning.negative, conditioning.negative_mask, conditioning.guidance
    if (negative is None) != (guidance is None):
        raise ValueError(
            "conditioning.negative and conditioning.guidance belong together: the second text, and what is done with "
            "it, such as AttentionGuidance('nag', 5.0); a negative prompt of classifier-free guidance is its "
            "null_conditioning"
        )
    if negative is None:
        return
    if negative.shape != conditioning.context.shape:
        raise ValueError(
            f"negative must have the shape of context, {list(conditioning.context.shape)}, got {list(negative.shape)}; "
            f"pad both texts to one length"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != negative.shape[:2]):
        raise ValueError(
            f"negative_mask must be bool [B, L] = {list(negative.shape[:2])}, got {mask.dtype} {list(mask.shape)}"
        )


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
