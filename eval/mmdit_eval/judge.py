"""The judge of emoji: is a drawn picture nearer to its own true picture than to its nearest relatives?

A small image tower, trained on all emoji (also on the held-out combinations, `judge_training.py`) and used here alone:
nothing in `mmdit` may learn from it. Three questions about each picture with a skin tone, each among relatives that
share all but one property:

    same_base      the same base and gender in other tones       does the picture have the right tone?
    same_tone      the same tone and gender of other bases       does it show the right thing?
    same_gender    the same base and tone in other genders       (where the base comes in several)

Read them beside `chance` (1 / candidates, averaged) and beside the same score of true pictures passed through the VAE.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from mmdit.config import EmojiConfig
from mmdit.data import make_dataset
from mmdit.encoders.vae import to_pixels
from mmdit_eval.retrieval import retrieval_hits

WEIGHTS = Path(__file__).parent / "weights" / "emoji_judge.safetensors"
QUESTIONS = ("same_base", "same_tone", "same_gender")
SIDE = 64  # R the tower was trained at


class Tower(nn.Module):
    """Four convolutions, each halving the sides, and a linear map: pixels [B, 3, 64, 64] -> embeddings [B, d].

    Positions are kept to the end (4 x 4): with a mean over positions, hands that point up and down look alike.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96, 128), narrow: int = 32, width: int = 128) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out in widths:
            layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
            channels = out
        self.features = nn.Sequential(*layers)
        self.narrow = nn.Conv2d(channels, narrow, 1)
        self.project = nn.Linear(narrow * (SIDE >> len(widths)) ** 2, width)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.features(pixels)  # [B, 128, 4, 4]
        return F.normalize(self.project(F.silu(self.narrow(hidden)).flatten(1)), dim=1)


class Judge:
    """The trained tower behind uint8 images."""

    def __init__(self, tower: Tower) -> None:
        self.tower = tower.eval().requires_grad_(False)

    @torch.inference_mode()
    def embed(self, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """Return embeddings of length 1, float32 [B, d], of images uint8 [B, R, R, 3].

        Another R than 64 is resized first (bicubic, antialiased).
        """
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"images must be uint8 [B, R, R, 3], got {images.dtype} {list(images.shape)}")
        parts = [np.empty((0, self.tower.project.out_features), dtype=np.float32)]
        for start in range(0, len(images), batch_size):
            pixels = to_pixels(images[start : start + batch_size])
            if pixels.shape[-2:] != (SIDE, SIDE):
                pixels = F.interpolate(pixels, (SIDE, SIDE), mode="bicubic", antialias=True)
            parts.append(self.tower(pixels).numpy())
        return np.concatenate(parts)


def load_judge(path: Path = WEIGHTS) -> Judge:
    """Load the trained judge.

    Raises:
        FileNotFoundError: no weights; the message names the command that makes them.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no judge at {path}; `python -m mmdit_eval.judge_training` trains it")
    with safe_open(path, framework="pt") as opened:
        tower = Tower(**json.loads(opened.metadata()["tower"]))
        tower.load_state_dict({key: opened.get_tensor(key).float() for key in opened.keys()})  # noqa: SIM118
    return Judge(tower)


@lru_cache(maxsize=1)
def judge() -> Judge:
    """Load the judge once."""
    return load_judge()


def _key(record: Any) -> tuple[str, str, str]:
    return record.base, record.gender, record.tone


@dataclass(frozen=True)
class Bank:
    """All true pictures, seen and held out, to choose from.

    Attributes:
        records: N names with base, tone, gender (mmdit.data.emoji.EmojiRecord).
        embeddings: [N, d].
    """

    records: Sequence[Any]
    embeddings: np.ndarray

    def row(self, record: Any) -> int:
        """Return where a record's own true picture stands.

        Raises:
            ValueError: the bank lacks it.
        """
        row = self._rows.get(record.codepoints)
        if row is None:
            raise ValueError(f"the bank of {len(self.records)} emoji has no {record.caption!r} ({record.codepoints})")
        return row

    @property
    def _rows(self) -> dict[str, int]:
        if "rows" not in self.__dict__:
            self.__dict__["rows"] = {record.codepoints: i for i, record in enumerate(self.records)}
        return self.__dict__["rows"]

    def relatives(self, record: Any) -> dict[str, list[int]]:
        """Return the rows to choose from, for each question that can be asked of a record; its own row is in each."""
        base, gender, tone = _key(record)
        if not tone:
            return {}
        sets = {
            "same_base": self._index[None, base, gender],
            "same_tone": self._index[tone, None, gender],
            "same_gender": self._index[tone, base, None],
        }
        return {question: rows for question, rows in sets.items() if len(rows) > 1}

    @property
    def _index(self) -> dict[tuple[str | None, str | None, str | None], list[int]]:
        if "index" not in self.__dict__:
            index: dict[tuple[str | None, str | None, str | None], list[int]] = defaultdict(list)
            for i, record in enumerate(self.records):
                base, gender, tone = _key(record)
                for key in ((None, base, gender), (tone, None, gender), (tone, base, None)):
                    index[key].append(i)
            self.__dict__["index"] = index
        return self.__dict__["index"]


def make_bank(judge: Judge, config: EmojiConfig) -> Bank:
    """Embed all true pictures of a data set, seen and held out (never the mirrored ones)."""
    records: list[Any] = []
    images = []
    for split in ("seen", "heldout"):
        data = make_dataset(config, split)
        records += data.records(range(len(data)))
        images.append(data.pixels(range(len(data))))
    return Bank(records, judge.embed(np.concatenate(images)))


def retrieval_scores(images: np.ndarray, records: Sequence[Any], bank: Bank, judge: Judge) -> dict[str, dict[str, Any]]:
    """Ask of each picture which of its relatives it shows.

    Args:
        images: uint8 [N, R, R, 3], drawn for the names of `records`.
        records: N emoji (mmdit.data.emoji.EmojiRecord).

    Returns:
        {question: {"accuracy", "chance", "n", "hits": [True | False | None per image]}}; None where a question cannot
        be asked (no tone, one gender). A question that no image admits has accuracy and chance None.
    """
    if len(images) != len(records):
        raise ValueError(f"{len(images)} images for {len(records)} records")
    embeddings = judge.embed(images)
    sets = [bank.relatives(record) for record in records]
    out: dict[str, dict[str, Any]] = {}
    for question in QUESTIONS:
        asked = [i for i, found in enumerate(sets) if question in found]
        hits: list[bool | None] = [None] * len(images)
        truth = [bank.row(records[i]) for i in asked]
        among = [sets[i][question] for i in asked]
        for i, hit in zip(asked, retrieval_hits(embeddings[asked], bank.embeddings, truth, among), strict=True):
            hits[i] = bool(hit)
        out[question] = {
            "accuracy": float(np.mean([hits[i] for i in asked])) if asked else None,
            "chance": float(np.mean([1 / len(rows) for rows in among])) if asked else None,
            "n": len(asked),
            "hits": hits,
        }
    return out
