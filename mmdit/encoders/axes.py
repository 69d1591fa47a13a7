"""The text axes of a run: which encoders speak, what is pooled of them, what becomes of padding and of dropped parts.

    encoders.use        any of clip_l, clip_g, t5; one that is left out leaves zeros of the same shapes, as SD3 does
                        without T5, so the denoiser stays the same. Under `mask` and `trim` a stream of which nobody is
                        left keeps one attended token of zeros; under `attend` all its zeros are read
    encoders.absent     of such a stream: `zeros`, as above, or `nothing`: the stream is not there, and neither are the
                        weights that would read it
    encoders.pooled     clip      [CLIP-L ; CLIP-G], what every release modulates with
                        clip+t5   T5's mean behind them: pooled grows by T5's width
                        none      no pooled vector: modulation from time alone
    encoders.pooled_at  of CLIP: the state at the end token (`end`), or the mean of the final states of real tokens
                        (`mean`), projected where the tower projects. T5 has no token made for it: always its mean
    encoders.padding    what attention sees of padding, see `apply_padding`

An encoder gives an `Encoded`; `join` makes the Conditioning of several. Both the live road and the cache end here, so
none of these fields changes what an encoder computes, and caches are shared between runs that differ in them.

Source of the mean of T5: Ni et al. 2022, arXiv:2108.08877 (encoder-only mean).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.config import CaptionDropoutConfig
from mmdit.denoiser import Conditioning, Streams

Padding = Literal["attend", "mask", "trim"]
Null = Literal["zeros", "empty_caption"]
Pooled = Literal["clip", "clip+t5", "none"]
PooledAt = Literal["end", "mean"]
Absent = Literal["zeros", "nothing"]


class Encoded(NamedTuple):
    """What one encoder made of B texts.

    Attributes:
        states: [B, l, width]; l reaches the longest row, or is the full length where padding is attended to. States
            of padding are zero otherwise.
        real: int64 [B], real tokens, on the CPU.
        end: [B, G], a CLIP tower's pooled state at the end token; None for T5.
        mean: [B, G], the mean of the final states of real tokens.
    """

    states: Tensor
    real: Tensor
    end: Tensor | None
    mean: Tensor


class TextLayout(NamedTuple):
    """How encoders are joined: everything but their states.

    Attributes:
        clip: (name, width) of each CLIP tower, in the order of their features; absent ones too. (): no CLIP stream.
        t5: whether there is a T5 stream.
        pooled: (name, width) of each part of the pooled vector, in order; absent ones too.
        pooled_at: where CLIP's are taken.
        context_dim: E.
        lengths: tokens of each untrimmed stream.
    """

    clip: tuple[tuple[str, int], ...]
    t5: bool
    pooled: tuple[tuple[str, int], ...]
    pooled_at: PooledAt
    context_dim: int
    lengths: tuple[int, ...]

    def streams(self, lengths: Sequence[int] | None = None) -> Streams:
        """Where each stream lies: (name, start, stop, width); by default untrimmed."""
        lengths = self.lengths if lengths is None else lengths
        widths = {"clip": sum(width for _, width in self.clip), "t5": self.context_dim}
        stops = list(accumulate(lengths))
        return tuple(
            (name, start, stop, widths[name])
            for name, start, stop in zip(self.encoders, [0, *stops[:-1]], stops, strict=True)
        )

    @property
    def encoders(self) -> dict[str, tuple[str, ...]]:
        """The encoders of each stream, in the order of the context; absent ones too."""
        clip = {"clip": tuple(name for name, _ in self.clip)} if self.clip else {}
        return {**clip, "t5": ("t5",)} if self.t5 else clip

    @property
    def clip_l_width(self) -> int:
        """Where CLIP-L ends and CLIP-G begins, in the features of the CLIP stream."""
        return dict(self.clip).get("clip_l", 0)

    @property
    def pooled_dim(self) -> int:
        """Numbers of the pooled vector that are text; 0 where there is none."""
        return sum(width for _, width in self.pooled)


def pooled_encoders(pooled: Pooled, clips: Sequence[str], has_t5: bool) -> tuple[str, ...]:
    """Return the encoders whose vectors are joined to the pooled one, in order.

    Args:
        clips: those that the family of encoders pools.

    Raises:
        ValueError: `clip+t5` of a family without T5.
    """
    if pooled == "none":
        return ()
    if pooled == "clip":
        return tuple(clips)
    if pooled != "clip+t5":
        raise ValueError(f"unknown encoders.pooled {pooled!r}; use 'clip', 'clip+t5' or 'none'")
    if not has_t5:
        raise ValueError("encoders.pooled 'clip+t5' needs a T5, which these text encoders do not have; use 'clip'")
    return (*clips, "t5")


def join(
    layout: TextLayout,
    parts: Mapping[str, Encoded],
    padding: Padding,
    batch: int,
    *,
    lengths: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Conditioning:
    """Make a Conditioning of what the encoders gave; absent ones leave zeros.

    Args:
        parts: by the encoder's name; any may be missing.
        padding: the policy the states were encoded for; `attend` and the others differ there.
        batch: B.
        lengths: tokens of the untrimmed streams, by default the layout's.
        device: where the zeros of absent encoders are made.

    Returns:
        context [B, L, E], pooled [B, G] or None, context_mask bool [B, L] (None with `attend`), streams.
    """
    reals = [torch.ones(batch, dtype=torch.long) for _ in layout.encoders]  # one null token where nobody speaks
    for real, names in zip(reals, layout.encoders.values(), strict=True):
        for name in names:
            if name in parts:
                torch.maximum(real, parts[name].real, out=real)
    lengths = list(layout.lengths if lengths is None else lengths)
    if padding == "trim":
        lengths = [int(real.max()) for real in reals]

    def states(name: str, width: int, length: int) -> Tensor:
        if name not in parts:
            return torch.zeros(batch, length, width, device=device)
        return _lengthen(parts[name].states, length)

    streams = []
    if layout.clip:
        clip = torch.cat([states(name, width, lengths[0]) for name, width in layout.clip], dim=2)  # [B, l, clip width]
        streams.append(F.pad(clip, (0, layout.context_dim - clip.shape[2])))  # [B, l, E]
    if layout.t5:
        streams.append(states("t5", layout.context_dim, lengths[-1]))  # [B, l, E]
    context = torch.cat(streams, dim=1)  # [B, L, E]
    mask = None
    if padding != "attend":
        mask = torch.cat([first(real, n) for real, n in zip(reals, lengths, strict=True)], dim=1).to(context.device)
    return Conditioning(context, _pooled(layout, parts, batch, device), mask, layout.streams(lengths))


def _pooled(layout: TextLayout, parts: Mapping[str, Encoded], batch: int, device: torch.device | str) -> Tensor | None:
    """Join the encoders' vectors, [B, G]; None where the layout has none."""
    if layout.pooled_dim == 0:
        return None
    vectors = []
    for name, width in layout.pooled:
        part = parts.get(name)
        if part is None:
            vectors.append(torch.zeros(batch, width, device=device))
        else:
            vectors.append(part.end if layout.pooled_at == "end" and part.end is not None else part.mean)
    return torch.cat(vectors, dim=1)


def zeros(layout: TextLayout, batch: int, padding: Padding, device: torch.device | str = "cpu") -> Conditioning:
    """Return the null `zeros`: nothing said by any encoder, one attended token in each stream."""
    return join(layout, {}, padding, batch, device=device)


def first(counts: Tensor, length: int) -> Tensor:
    """True on the first counts[i] of `length` places: bool [B, length]."""
    return torch.arange(length)[None] < counts.cpu()[:, None]


def _lengthen(states: Tensor, length: int) -> Tensor:
    """Zero-pad (or cut) [B, l, width] to [B, length, width]."""
    return F.pad(states[:, :length], (0, 0, 0, max(0, length - states.shape[1])))


# --- padding --------------------------------------------------------------------------------------------------------


def apply_padding(conditioning: Conditioning, padding: Padding) -> Conditioning:
    """Apply a padding policy to encoded captions; which one a run uses is a config field, because it changes results.

    `attend` drops the mask (for states that were encoded with padding `attend`), `mask` keeps everything, `trim` cuts
    each stream to its longest row in this batch.

    Raises:
        ValueError: `mask` or `trim` without a `context_mask`.
    """
    if padding == "attend":
        return conditioning._replace(context_mask=None)
    if padding not in ("mask", "trim"):
        raise ValueError(f"unknown padding {padding!r}; use 'attend', 'mask' or 'trim'")
    if conditioning.context_mask is None:
        raise ValueError(f"padding {padding!r} needs a context_mask; encode with padding='mask', not 'attend'")
    if padding == "mask":
        return conditioning
    places = torch.arange(conditioning.context.shape[1], device=conditioning.context.device)
    last = (places * conditioning.context_mask).amax(dim=0)  # a column's own index where any row attends to it, else 0
    lengths = [max(1, int(last[start:stop].max()) - start + 1) for _, start, stop, _ in _streams(conditioning)]
    return resize_streams(conditioning, lengths)


def resize_streams(conditioning: Conditioning, lengths: Sequence[int]) -> Conditioning:
    """Cut or zero-pad each stream to `lengths` tokens; what is added is masked where there is a mask."""
    contexts, masks, streams, place = [], [], [], 0
    for (name, start, stop, width), length in zip(_streams(conditioning), lengths, strict=True):
        missing = max(0, length - (stop - start))
        end = min(stop, start + length)
        contexts.append(F.pad(conditioning.context[:, start:end], (0, 0, 0, missing)))
        if conditioning.context_mask is not None:
            masks.append(F.pad(conditioning.context_mask[:, start:end], (0, missing)))
        streams.append((name, place, place + length, width))
        place += length
    mask = torch.cat(masks, dim=1) if masks else None
    return conditioning._replace(context=torch.cat(contexts, dim=1), context_mask=mask, streams=tuple(streams))


# --- caption dropout ------------------------------------------------------------------------------------------------


def drop_captions(
    conditioning: Conditioning,
    null_conditioning: Conditioning,
    dropout: CaptionDropoutConfig,
    uniforms: Tensor,
    *,
    clip_l_width: int | None = None,
    pooled: Sequence[tuple[str, int]] | None = None,
    absent: Collection[str] = (),
) -> Conditioning:
    """Replace whole captions, or single encoders' parts of them, by the run's null.

    A dropped encoder's slice of the context and of `pooled` becomes the null's. The two CLIP towers share one stream:
    when both are dropped (or the caption) the stream's mask becomes the null's too, which attends to at least one
    token; when one is dropped, only its features change.

    Args:
        conditioning: streams ("clip", ...), ("t5", ...), or one of them; trimmed or not.
        null_conditioning: one row, or B.
        dropout: probabilities.
        uniforms: [B, 4] in [0, 1): caption, clip_l, clip_g, t5; below its probability = dropped.
        clip_l_width: `TextEncoders.clip_l_width`; needed where `clip_l` or `clip_g` has a probability of its own.
        pooled: `TextLayout.pooled`, (encoder, width) of each part of the pooled vector; what stands behind them
            (SDXL's sizes) is no text and stays. None: CLIP-L's `clip_l_width` numbers, then CLIP-G's.
        absent: encoders that are not there; in a stream they share they count as dropped.

    Raises:
        ValueError: shapes that do not fit, or `clip_l_width` missing.
    """
    batch = conditioning.context.shape[0]
    uniforms = torch.as_tensor(uniforms, device=conditioning.context.device)
    if uniforms.shape != (batch, 4):
        raise ValueError(f"uniforms must be [B, 4] = [{batch}, 4], got {list(uniforms.shape)}")
    if (dropout.clip_l or dropout.clip_g) and clip_l_width is None:
        raise ValueError("dropping clip_l or clip_g alone needs clip_l_width (TextEncoders.clip_l_width)")
    if (conditioning.context_mask is None) != (null_conditioning.context_mask is None):
        raise ValueError("conditioning and null_conditioning must both have a context_mask or both have none")
    whole = uniforms[:, 0] < dropout.caption
    chances = {"clip_l": dropout.clip_l, "clip_g": dropout.clip_g, "t5": dropout.t5}
    dropped = {name: whole | (uniforms[:, i] < p) for i, (name, p) in enumerate(chances.items(), start=1)}

    conditioning, null = _aligned(conditioning, null_conditioning)
    context, mask = conditioning.context.clone(), conditioning.context_mask
    spans = {name: slice(start, stop) for name, start, stop, _ in _streams(conditioning)}
    split = clip_l_width if clip_l_width is not None else 0  # without it both towers fall together
    parts = [("clip", "clip_l", slice(0, split)), ("clip", "clip_g", slice(split, None)), ("t5", "t5", slice(None))]
    for stream, name, features in parts:
        if stream not in spans:
            continue
        tokens = spans[stream]
        context[:, tokens, features] = torch.where(
            dropped[name][:, None, None],
            null.context[:, tokens, features].to(context.dtype),
            context[:, tokens, features],
        )
    vector = _drop_pooled(conditioning.pooled, null.pooled, dropped, pooled, split)
    if mask is not None and null.context_mask is not None:
        nobody = torch.ones_like(whole)
        silent = [nobody if name in absent else dropped[name] for name in ("clip_l", "clip_g")]
        gone_streams = {"clip": silent[0] & silent[1], "t5": dropped["t5"]}
        gone = torch.cat(
            [gone_streams[name][:, None].expand(-1, span.stop - span.start) for name, span in spans.items()], dim=1
        )  # [B, L]
        mask = torch.where(gone, null.context_mask, mask)
    return conditioning._replace(context=context, pooled=vector, context_mask=mask)


def _aligned(conditioning: Conditioning, null: Conditioning) -> tuple[Conditioning, Conditioning]:
    """Bring a conditioning and its null to equal rows and equal lengths of their streams."""
    if null.context.shape[0] == 1:
        null = null.repeat(conditioning.context.shape[0])
    trimmed = apply_padding(null, "trim") if null.context_mask is not None else null
    lengths = [max(a, b) for a, b in zip(_lengths(conditioning), _lengths(trimmed), strict=True)]
    return resize_streams(conditioning, lengths), resize_streams(null, lengths)


def _drop_pooled(
    pooled: Tensor | None,
    null: Tensor | None,
    dropped: Mapping[str, Tensor],
    parts: Sequence[tuple[str, int]] | None,
    split: int,
) -> Tensor | None:
    """Replace the dropped encoders' parts of the pooled vectors [B, G] by the null's."""
    if pooled is None or null is None:
        return pooled
    if parts is None:
        parts = (("clip_l", split), ("clip_g", pooled.shape[1] - split))
    start, vectors = 0, []
    for name, width in parts:
        part = slice(start, start + width)
        vectors.append(torch.where(dropped[name][:, None], null[:, part].to(pooled.dtype), pooled[:, part]))
        start += width
    return torch.cat([*vectors, pooled[:, start:]], dim=1)


def _streams(conditioning: Conditioning) -> Streams:
    if conditioning.streams is None:
        raise ValueError("this Conditioning has no streams; encode with TextEncoders, which sets them")
    return conditioning.streams


def _lengths(conditioning: Conditioning) -> list[int]:
    return [stop - start for _, start, stop, _ in _streams(conditioning)]
