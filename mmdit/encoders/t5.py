"""Training objectives of a T5-like encoder: span corruption, and rewriting one form of a caption into another.

Span corruption alone leaves a grammar's attributes unbound: colours and shapes are drawn independently, so a masked
word cannot be predicted from who owns what, and nothing rewards keeping it (measured: a linear probe then reads the
order of two objects from the mean state at chance). Rewriting, "a red circle left of a blue square" to "blue square
right ; red circle left", cannot be done without binding. The decoder exists in training only.

Source: Raffel et al. 2020, arXiv:1910.10683, section 3.1.4 (span corruption), T5 v1.1 (encoder).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.encoders.tokenizers import T5_END, T5_PAD

TASKS = ("spans", "list", "first_wording", "second_wording", "long")
NUM_SENTINELS = 8  # ids behind the vocabulary's pieces; they mark masked spans


def corrupt_spans(
    ids: Sequence[int],
    first_sentinel: int,
    random: np.random.Generator,
    *,
    density: float = 0.2,
    mean_length: float = 2.0,
) -> tuple[list[int], list[int]]:
    """Replace random spans by sentinels; the target lists each sentinel with what it hides.

        ids      a small red circle </s>
        inputs   a <0> circle </s>
        targets  <0> small red </s>

    Args:
        ids: one caption, its end token last; the end token is never hidden.
        first_sentinel: id of <0>; <1> ... follow it, `NUM_SENTINELS` in all.
        density: share of tokens to hide, at least one.
        mean_length: of a span, in tokens (T5: 3; captions are short).

    Returns:
        inputs, targets. A caption without words is returned as it is, with the target [</s>].
    """
    words = list(ids[:-1])
    if not words:
        return [T5_END], [T5_END]
    hidden = min(len(words), max(1, round(density * len(words))))
    # n spans need n - 1 visible tokens between them, lest two melt into one
    spans = int(np.clip(round(hidden / mean_length), 1, min(NUM_SENTINELS, hidden, len(words) - hidden + 1)))
    cuts = np.sort(random.choice(hidden - 1, spans - 1, replace=False)) + 1 if spans > 1 else np.empty(0, dtype=int)
    lengths = np.diff([0, *cuts, hidden])
    # spans - 1 visible tokens are spoken for; the others fall into the spans + 1 gaps at random
    free = len(words) - hidden - (spans - 1)
    bars = np.sort(random.integers(0, free + 1, spans))
    inputs: list[int] = []
    targets: list[int] = []
    place = 0
    for k, length in enumerate(lengths.tolist()):
        start = int(bars[k]) + k + int(lengths[:k].sum())
        inputs += [*words[place:start], first_sentinel + k]
        targets += [first_sentinel + k, *words[start : start + length]]
        place = start + length
    return [*inputs, *words[place:], T5_END], [*targets, T5_END]


class Rewriter(nn.Module):
    """A small decoder that reads an encoder's states and writes another form of the caption; thrown away afterwards.

    Args:
        vocab_size: pieces and sentinels.
        width: D of the encoder.
        num_heads, depth: of the decoder.
        max_length: longest target, tokens.
    """

    def __init__(self, vocab_size: int, width: int, num_heads: int = 4, depth: int = 1, max_length: int = 160) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.places = nn.Parameter(0.02 * torch.randn(max_length, width))
        self.tasks = nn.Embedding(len(TASKS), width)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(width, num_heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, states: Tensor, mask: Tensor, task: Tensor, targets: Tensor) -> Tensor:
        """Predict each target token from those before it.

        Args:
            states: encoder states [B, L, D].
            mask: bool [B, L], True on real tokens.
            task: int64 [B], index into `TASKS`.
            targets: int64 [B, M], padded with 0.

        Returns:
            Logits [B, M, vocab_size].
        """
        length = targets.shape[1]
        before = torch.cat([self.tasks(task)[:, None], self.tokens(targets[:, :-1])], dim=1)  # [B, M, D]
        hidden = before + self.places[:length]
        future = torch.ones(length, length, dtype=torch.bool, device=states.device).triu(1)
        for layer in self.layers:
            hidden = layer(hidden, states, tgt_mask=future, memory_key_padding_mask=~mask)
        return self.head(self.norm(hidden))


def rewriting_loss(rewriter: Rewriter, states: Tensor, mask: Tensor, task: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy per target token, mean over all tokens that are not padding; arguments as `Rewriter.forward`."""
    logits = rewriter(states, mask, task, targets)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=T5_PAD)
