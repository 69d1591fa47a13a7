"""Pixels from overlapping tiles: what bounds the memory of decoding large pictures.

What is lost: group norms see one tile instead of the picture, and convolutions see zeros beyond a cut edge. On random
decoders the mean difference from the whole is about half that of tiles which cut the lowest stages too (diffusers'),
where the latents' statistics are the same everywhere; where they are not, little less. Statistics pooled over all
tiles in passes of their own were tried: they do not settle, since each norm's change upsets the next.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SMALLEST_TILE = 8  # latents a side; below, borders are most of a tile


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles begin so that they cover `length`, evenly spread, neighbours sharing `overlap` or more."""
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def blend_tiles(decode: Callable[[Tensor], Tensor], hidden: Tensor, tile: int, factor: int) -> Tensor:
    """Decode tile by tile; where tiles overlap, by a quarter of a tile or more, they are mixed linearly.

    A tile's weight rises linearly from its cut edges, where convolutions saw zeros instead of a neighbour, and is full
    at the picture's own borders. Where one tile covers everything, the result is `decode(hidden)` itself.

    Args:
        decode: [B, D, h, w] -> [B, 3, factor * h, factor * w].
        hidden: [B, D, H, W].
        tile: latents a side.
        factor: pixels per latent.

    Raises:
        ValueError: a tile below 8 latents.
    """
    if tile < SMALLEST_TILE:
        raise ValueError(f"a tile is at least {SMALLEST_TILE} latents a side, got {tile}; 64 or 128 are usual")
    height, width = hidden.shape[-2:]
    if height <= tile and width <= tile:
        return decode(hidden)
    tops, lefts = (tile_starts(side, tile, tile // 4) for side in (height, width))
    pixels = weights = None
    for top in tops:
        for left in lefts:
            part = decode(hidden[..., top : top + tile, left : left + tile])
            rows = _ramp(part.shape[-2], top > 0, top + tile < height, tile // 4 * factor, part)
            columns = _ramp(part.shape[-1], left > 0, left + tile < width, tile // 4 * factor, part)
            weight = rows[:, None] * columns[None]  # [h, w]
            if pixels is None or weights is None:
                size = (height * factor, width * factor)
                pixels = part.new_zeros(*part.shape[:2], *size, dtype=torch.float32)
                weights = torch.zeros(size, device=part.device)
            y, x = top * factor, left * factor
            place = (..., slice(y, y + part.shape[-2]), slice(x, x + part.shape[-1]))
            pixels[place] += part.float() * weight
            weights[place] += weight
    assert pixels is not None
    assert weights is not None
    return (pixels / weights).to(part.dtype)


def _ramp(length: int, cut_first: bool, cut_last: bool, over: int, like: Tensor) -> Tensor:
    """Return weights [length]: 1, falling linearly to nearly 0 over `over` pixels towards a cut edge."""
    places = torch.arange(length, device=like.device) + 0.5
    ramp = torch.ones(length, device=like.device)
    if cut_first:
        ramp = torch.minimum(ramp, places / over)
    if cut_last:
        ramp = torch.minimum(ramp, (length - places) / over)
    return ramp
