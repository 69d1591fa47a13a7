"""Text on its way through a backbone: its streams, their projections, and joint attention with the image.

Shared by the backbones so that a comparison of two of them cannot drift here. Parts of the text, one for each encoder
stream, come from `Conditioning.streams`; a conditioning without streams is one part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.config import CrossDiTConfig, MMDiTConfig, UNetConfig, reads_streams
from mmdit.denoiser import AttentionGuidance, Conditioning, Streams
from mmdit.models.layers import Keys, attend, attention

Parts = tuple[tuple[str, int, int], ...]
BackboneConfig = MMDiTConfig | CrossDiTConfig | UNetConfig


class Text(NamedTuple):
    """What the blocks are told of the text.

    Attributes:
        context: [B, L, D], projected as the backbone wants it.
        mask: bool [B, M], True = attend, or None; M is L, or L + N where image tokens stand behind the text.
        parts: static; (stream, start, stop) of each encoder's part of L.
        negative: the second text of attention-space guidance, shaped as `context`, or None.
        negative_mask: as `mask`, of `negative`.
        guidance: static; what is done with `negative`.
    """

    context: Tensor
    mask: Tensor | None
    parts: Parts
    negative: Tensor | None = None
    negative_mask: Tensor | None = None
    guidance: AttentionGuidance | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Text:
        """Apply `function` to the text and to the negative one."""
        negative = None if self.negative is None else function(self.negative)
        return self._replace(context=function(self.context), negative=negative)

    def combine(self, other: Text, function: Callable[[Tensor, Tensor], Tensor]) -> Text:
        """Apply a function to the context and to the negative text of both; masks and the rest are this one's."""
        negative = None
        if self.negative is not None and other.negative is not None:
            negative = function(self.negative, other.negative)
        return self._replace(context=function(self.context, other.context), negative=negative)

    def part(self, start: int, stop: int, width: int | None = None) -> Text:
        """Cut out one stream, of its features the first `width`."""
        mask, other = (None if m is None else m[:, start:stop] for m in (self.mask, self.negative_mask))
        return self.map(lambda text: text[:, start:stop, :width])._replace(mask=mask, negative_mask=other)


def read_text(config: BackboneConfig, conditioning: Conditioning, dtype: torch.dtype) -> Text:
    """Take the text out of a conditioning, in `dtype`, and find the parts that the backbone's weights tell apart.

    Raises:
        ValueError: the backbone has weights for streams that the conditioning does not name, or the other way round,
            or a stream is wider than its weights.
    """
    text = Text(
        conditioning.context,
        conditioning.context_mask,
        _parts(config, conditioning),
        conditioning.negative,
        conditioning.negative_mask,
        conditioning.guidance,
    )
    return text.map(lambda context: context.to(dtype))


def _parts(config: BackboneConfig, conditioning: Conditioning) -> Parts:
    length = conditioning.context.shape[1]
    if not reads_streams(config):
        return (("context", 0, length),)
    wanted, streams = dict(config.text_streams or ()), conditioning.streams
    if streams is None:
        if len(wanted) == 1:
            return ((next(iter(wanted)), 0, length),)
        raise ValueError(
            f"this {config.name} has weights for each of the text streams {list(wanted)}, and the conditioning does "
            f"not say where they lie; give Conditioning.streams = ((name, start, stop, width), ...)"
        )
    for name, start, stop, width in streams:
        if name not in wanted:
            raise ValueError(
                f"the conditioning has a text stream {name!r}, this {config.name} has weights for {list(wanted)}; "
                f"set model.text_streams to the encoders' streams"
            )
        if width > wanted[name] and stop > start:
            raise ValueError(
                f"the text stream {name!r} is {width} wide, this {config.name} reads {wanted[name]}; "
                f"set model.text_streams to the encoders' widths"
            )
    starts = [0, *(stop for _, _, stop, _ in streams)]
    if starts != [*(start for _, start, _, _ in streams), length]:
        raise ValueError(f"streams {streams} do not cover the {length} text tokens one after the other")
    return tuple((name, start, stop) for name, start, stop, _ in streams)


def extend_masks(text: Text | None, num_image_tokens: int) -> Text | None:
    """Extend the masks of a text by the image tokens, which are always visible: bool [B, L] -> [B, L + N]."""
    if text is None:
        return None
    mask, negative_mask = (
        None if mask is None else F.pad(mask, (0, num_image_tokens), value=True)
        for mask in (text.mask, text.negative_mask)
    )
    return text._replace(mask=mask, negative_mask=negative_mask)


def even_streams(config: BackboneConfig, tokens: int) -> Streams | None:
    """Lay out `tokens` in streams of about equal length, to count with; None where streams are not told apart."""
    if not reads_streams(config) or not config.text_streams:
        return None
    count = len(config.text_streams)
    stops = [tokens * (i + 1) // count for i in range(count)]
    return tuple(
        (name, start, stop, width)
        for (name, width), start, stop in zip(config.text_streams, [0, *stops[:-1]], stops, strict=True)
    )


class PerEncoder(nn.ModuleDict):
    """One linear map for each encoder stream, on its real width: [B, L, E] -> [B, L, D]."""

    def __init__(self, streams: Iterable[tuple[str, int]], width: int) -> None:
        super().__init__({name: nn.Linear(size, width) for name, size in streams})

    def forward(self, context: Tensor, parts: Parts, prepare: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Project each part by its own map, after `prepare` where given."""
        projected = []
        for name, start, stop in parts:
            states = context[:, start:stop, : self[name].in_features]
            projected.append(self[name](states if prepare is None else prepare(states)))
        return torch.cat(projected, dim=1)


def text_projection(config: BackboneConfig, width: int) -> nn.Linear | PerEncoder:
    """Make the map of encoder states to `width` that the config asks for."""
    if config.text_projection == "per_encoder":
        return PerEncoder(config.text_streams or (), width)
    return nn.Linear(config.context_dim, width)


def project(projection: nn.Linear | PerEncoder, text: Text, prepare: Callable[[Tensor], Tensor] | None = None) -> Text:
    """Project a text and its negative, each state after `prepare` where given."""
    if isinstance(projection, PerEncoder):
        return text.map(lambda context: projection(context, text.parts, prepare))
    return text.map(lambda context: projection(context if prepare is None else prepare(context)))


# --- joint attention ------------------------------------------------------------------------------------------------

Owner = tuple[Any, int, int]  # a module with `read` and `write`, and the part of the text it works on


class Reading(NamedTuple):
    """What owners read of a text: q or None, k, v, each [B, A, L, K]; and what the `write` of each needs."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    states: list[Any]


def joint_attention(
    x: Tensor,
    image: Any,
    reading: tuple[Any, ...],
    owners: Sequence[Owner],
    text: Text | None,
    *arguments: Any,
    last: bool,
    record: list[Tensor] | None = None,
) -> tuple[Tensor, Text | None]:
    """Let image and text tokens attend to each other, each projected and updated by the weights that own it.

    A negative text is a second text stream: read and updated by the same weights, attending to itself and to the same
    image tokens. Nothing of it is added to the image; it acts where image tokens read the text (`attend`).

    Args:
        x: image tokens [B, N, D].
        image: what owns them, a module with `write(tokens, mixed, state) -> tokens`.
        reading: what its `read` made of x: q, k, v, each [B, A, N, K], and the state for `write`.
        owners: modules with `write` and `read(tokens, *arguments, queries) -> q, k, v, state`, q None without
            `queries`; each owns a part of the text.
        text: its masks reach over text and image, [B, L + N]; None leaves the image to itself.
        last: no later block reads the text, which then stays as it came.
        record: where given, what image queries read from text keys is appended, [B, A, N, L].

    Returns:
        x and text, updated.
    """
    q, k, v, state = reading
    if text is None:
        return image.write(x, attention(q, k, v), state), text
    length = text.context.shape[1]

    def read(context: Tensor, mask: Tensor | None) -> tuple[Reading, Keys]:
        own = _read(owners, context, arguments, queries=not last)
        return own, Keys(torch.cat([own.k, k], dim=2), torch.cat([own.v, v], dim=2), mask)  # [B, A, L + N, K]

    positive, keys = read(text.context, text.mask)
    if text.negative is None:
        if last:
            return image.write(x, attend(q, keys, length, record=record), state), text
        if record is not None:
            attend(q, keys, length, record=record)
        mixed = attention(torch.cat([positive.q, q], dim=2), *keys)
        context = _write(owners, text.context, mixed[:, :, :length], positive.states)
        return image.write(x, mixed[:, :, length:], state), text._replace(context=context)

    negative, negative_keys = read(text.negative, text.negative_mask)
    mixed = attend(q, keys, length, negative_keys, text.guidance, record)
    if not last:
        text = text._replace(
            context=_write(owners, text.context, attention(positive.q, *keys), positive.states),
            negative=_write(owners, text.negative, attention(negative.q, *negative_keys), negative.states),
        )
    return image.write(x, mixed, state), text


def _read(owners: Sequence[Owner], context: Tensor, arguments: Sequence[Any], queries: bool) -> Reading:
    """Read each part of a text by its owner and put the parts together."""
    read = [owner.read(context[:, start:stop], *arguments, queries=queries) for owner, start, stop in owners]
    q, k, v = (None if part[0] is None else _joined(part, dim=2) for part in list(zip(*read, strict=True))[:3])
    return Reading(q, k, v, [state for *_, state in read])


def _write(owners: Sequence[Owner], context: Tensor, mixed: Tensor, states: Sequence[Any]) -> Tensor:
    """Update each part of a text by its owner: [B, L, D] and [B, A, L, K] -> [B, L, D]."""
    written = [
        owner.write(context[:, start:stop], mixed[:, :, start:stop], state)
        for (owner, start, stop), state in zip(owners, states, strict=True)
    ]
    return _joined(written, dim=1)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)
