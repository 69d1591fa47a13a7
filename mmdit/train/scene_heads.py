"""What the recipes of the tiny text towers share: which token belongs to which word, and linear readers of scenes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.config import EmojiConfig
from mmdit.data.emoji import EmojiDataset, EmojiRecord
from mmdit.encoders.t5 import NUM_SENTINELS
from mmdit.encoders.tokenizers import CLIP_END, CLIP_START, T5_PAD, ClipTokenizer, T5Tokenizer, pad
from mmdit.encoders.towers import tower_states
from mmdit.train.scene_labels import ATTRIBUTES, CLASSES, IGNORE, MAX_GROUPS

SEED = 20  # of the scenes whose captions are read
T5_TOKENS = 160  # more than the longest caption has


def emoji_records(path: Path, split: str = "train") -> list[EmojiRecord]:
    """Read the names of one split of the emoji file."""
    data = EmojiDataset(EmojiConfig(path=path), split)
    return data.records(range(len(data)))


class Pieces:
    """Which word each piece of a caption belongs to, so that labels of words become labels of tokens."""

    def __init__(self, tokenizer: T5Tokenizer) -> None:
        # sentinels are looked up too: they begin no word and carry no letters
        names = [tokenizer.id_to_piece(i) for i in range(len(tokenizer))] + [""] * NUM_SENTINELS
        self.begins = np.array([name.startswith("\u2581") for name in names])
        self.letters = np.array([any(c.isalnum() for c in name) for name in names])
        self.letters[:3] = False  # pad, end, unknown

    def spread(self, ids: Sequence[int], labels: np.ndarray) -> np.ndarray:
        """Return int64 [tokens, attributes]: each letter-bearing piece takes its word's row, others `IGNORE`."""
        array = np.asarray(ids)
        words = np.cumsum(self.begins[array]) - 1
        out = np.full((len(ids), labels.shape[1]), IGNORE, dtype=np.int64)
        kept = self.letters[array] & (words >= 0) & (words < len(labels))
        out[kept] = labels[words[kept]]
        return out


class WordEnds:
    """As `Pieces`, for byte-pair tokens, which mark where a word ends."""

    def __init__(self, tokenizer: ClipTokenizer) -> None:
        self._names = tokenizer.id_to_piece

    def spread(self, ids: Sequence[int], labels: np.ndarray) -> np.ndarray:
        """Return int64 [tokens, attributes]; see `Pieces.spread`."""
        out = np.full((len(ids), labels.shape[1]), IGNORE, dtype=np.int64)
        word = 0
        for place, index in enumerate(ids):
            name = self._names(int(index))
            if index in (CLIP_START, CLIP_END):
                continue
            letters = any(c.isalnum() for c in name.removesuffix("</w>"))
            if letters and word < len(labels):
                out[place] = labels[word]
            # punctuation is a token of its own with its own "</w>", but no word of `str.split`
            if letters and name.endswith("</w>"):
                word += 1
        return out


class SceneHeads(nn.Module):
    """Linear readers in training: each word's own object; the canonical list or the emoji's parts from the mean."""

    def __init__(self, width: int, emoji: Sequence[EmojiRecord]) -> None:
        super().__init__()
        sizes = [len(CLASSES[name]) for name in ATTRIBUTES]
        self.words = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.slots = nn.ModuleList(nn.Linear(width, size) for _ in range(MAX_GROUPS) for size in sizes)
        self.vocabulary = [sorted({getattr(r, field) for r in emoji}) for field in ("base", "tone", "gender")]
        self.emoji = nn.ModuleList(nn.Linear(width, max(1, len(names))) for names in self.vocabulary)
        self._index = [{name: i for i, name in enumerate(names)} for names in self.vocabulary]

    def emoji_labels(self, record: EmojiRecord) -> list[int]:
        parts = (record.base, record.tone, record.gender)
        return [index[part] for index, part in zip(self._index, parts, strict=True)]

    def loss(self, states: Tensor, mean: Tensor, words: Tensor, slots: Tensor, emoji: Tensor) -> dict[str, Tensor]:
        """Cross-entropies, each a mean over its labelled places.

        Args:
            states: [B, L, D]; mean: [B, D] over real tokens.
            words: int64 [B, L, attributes]; slots: [B, groups * attributes]; emoji: [B, 3]; `IGNORE` where unlabelled.
        """
        said = (words != IGNORE).any(dim=2)
        out = {}
        if said.any():
            chosen, labels = states[said], words[said]
            out["words"] = total(
                F.cross_entropy(head(chosen).float(), labels[:, i]) for i, head in enumerate(self.words)
            )
        rows = (slots != IGNORE).any(dim=1)
        if rows.any():
            chosen, labels = mean[rows], slots[rows]
            out["slots"] = total(
                F.cross_entropy(head(chosen).float(), labels[:, i]) for i, head in enumerate(self.slots)
            )
        rows = emoji[:, 0] != IGNORE
        if rows.any():
            chosen, labels = mean[rows], emoji[rows]
            out["emoji"] = total(
                F.cross_entropy(head(chosen).float(), labels[:, i]) for i, head in enumerate(self.emoji)
            )
        return out


def total(values: Any) -> Tensor:
    """Add up losses."""
    return torch.stack(list(values)).sum()


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """Average the states of real tokens: [B, L, D], bool [B, L] -> [B, D]."""
    weight = mask[:, :, None].to(states.dtype)
    return (states * weight).sum(dim=1) / weight.sum(dim=1)


def encode_raw(module: nn.Module, tokenizer: T5Tokenizer, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Return raw states [B, L, D], mask [B, L] and ids [B, L] of captions."""
    rows = tokenizer(captions, T5_TOKENS)
    ids = pad(rows, T5_PAD, max(map(len, rows)))
    mask = ids != T5_PAD
    states, _ = tower_states(module, ids, mask)
    return states, mask, ids
