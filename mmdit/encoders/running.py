"""Ids through one tower: equal rows once, rows of like length together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmdit.encoders.axes import Encoded, first
from mmdit.encoders.tokenizers import CLIP_END, T5_END, T5_PAD
from mmdit.encoders.towers import States, Tower, mean_state, projected, run_tower

_BATCH = 512  # rows run through a tower at once


def clip_lengths(ids: Tensor) -> Tensor:
    """Count real tokens, the first end token included: int64 [B]; rows without an end token are real throughout."""
    ends = ids == CLIP_END
    return torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, ids.shape[1]).cpu()


def t5_lengths(ids: Tensor) -> Tensor:
    """Count real tokens, the end token included: int64 [B]; without one, up to the last that is not padding."""
    ends = ids == T5_END
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    unpadded = torch.where(ids != T5_PAD, places, 0).amax(dim=1)
    return torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, unpadded).cpu()


def run_rows(tower: Tower, ids: Tensor, real: Tensor, keep: bool, which: States = "penultimate") -> Encoded:
    """Run one tower over distinct rows, sorted by length.

    Args:
        ids: [B, L].
        real: [B] real tokens, on the CPU.
        keep: run at full length without a mask and keep the states of padding; else they are zero.
        which: states of CLIP, see `run_tower`.

    Returns:
        Standardised states [B, longest, width], longest = L with `keep`; real; the pooled vectors.
    """
    counts = real
    ids, inverse = torch.unique(ids, dim=0, return_inverse=True)
    real = counts.new_zeros(ids.shape[0]).scatter_(0, inverse.cpu(), counts)  # equal rows have equal length
    length = ids.shape[1] if keep else max(1, int(real.max()))
    states = torch.zeros(ids.shape[0], length, tower.width, device=ids.device)
    made: dict[str, list[tuple[Tensor, Tensor]]] = {"end": [], "mean": []}
    for rows in torch.argsort(real, stable=True).split(_BATCH):
        stop = length if keep else max(1, int(real[rows].max()))
        mask = first(real[rows], stop).to(ids.device)
        rows = rows.to(ids.device)
        out = run_tower(tower.module, ids[rows, :stop], None if keep else mask, which)
        standard = (out.states.float() - tower.state_mean) / tower.state_std
        states[rows, :stop] = standard if keep else standard * mask[:, :, None]
        if out.end is None:  # T5: the mean of the states as the denoiser reads them
            made["mean"].append((rows, mean_state(standard, mask)))
        else:
            made["end"].append((rows, out.end.float()))
            made["mean"].append((rows, projected(tower.module, mean_state(out.last, mask)).float()))
    end, mean = (_in_order(pairs, ids.shape[0]) for pairs in made.values())
    assert mean is not None
    return Encoded(states[inverse], counts, None if end is None else end[inverse], mean[inverse])


def _in_order(pairs: Sequence[tuple[Tensor, Tensor]], count: int) -> Tensor | None:
    """Put vectors [b, G] back in their rows: [count, G]."""
    if not pairs:
        return None
    vectors = pairs[0][1].new_zeros(count, pairs[0][1].shape[1])
    for rows, part in pairs:
        vectors[rows] = part
    return vectors
