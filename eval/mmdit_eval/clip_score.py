"""CLIP-score: how well a picture fits its prompt, by the angle between their embeddings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from mmdit.registry import lookup
from mmdit_eval.frechet import FloatArray

_LOG = logging.getLogger(__name__)


class Tower(Protocol):
    """What is asked of a text tower; `features.TextTower` is one."""

    @property
    def embed(self) -> Callable[[Sequence[str]], Any]:
        """Captions to embeddings [B, e]; longer ones are cut."""

    @property
    def lengths(self) -> Callable[[Sequence[str]], list[int]]:
        """Tokens of each caption, start and end included."""

    @property
    def limit(self) -> int:
        """Tokens the tower reads."""


def cosines(image_embeds: Any, text_embeds: Any) -> FloatArray:
    """Return the cosine of each pair, [N].

    Args:
        image_embeds, text_embeds: [N, d], any real dtype, not all zeros; normalised here.

    Raises:
        ValueError: shapes that differ, no pairs, values that are not finite, or an embedding of length zero.
    """
    image, text = np.asarray(image_embeds, dtype=np.float64), np.asarray(text_embeds, dtype=np.float64)
    if image.ndim != 2 or image.shape != text.shape or not len(image):
        raise ValueError(
            f"image_embeds and text_embeds must both be [N, d] with one N >= 1, got {list(image.shape)} and "
            f"{list(text.shape)}"
        )
    for name, array in (("image_embeds", image), ("text_embeds", text)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds a value that is not finite")
        if not (np.linalg.norm(array, axis=1) > 0).all():
            raise ValueError(f"{name} holds an embedding of length zero, which has no direction")
    image = image / np.linalg.norm(image, axis=1, keepdims=True)
    text = text / np.linalg.norm(text, axis=1, keepdims=True)
    found: FloatArray = (image * text).sum(1)
    return found


def clip_scores(image_embeds: Any, text_embeds: Any) -> FloatArray:
    """Return max(100 cos, 0) per pair, [N].

    Source: Hessel et al. 2021, arXiv:2104.08718, Eq. 1, with w = 100 as in common implementations (the paper has 2.5).

    Raises:
        ValueError: as `cosines`.
    """
    scores: FloatArray = np.maximum(100.0 * cosines(image_embeds, text_embeds), 0.0)
    return scores


def clip_score(image_embeds: Any, text_embeds: Any, *, clamp: Literal["each", "mean"] = "each") -> float:
    """Return the mean over pairs, 0 ... 100. Comparable only within one CLIP.

    Args:
        image_embeds, text_embeds: [N, d].
        clamp: `each`, the mean of max(100 cos, 0), as in the paper; `mean`, max(mean of 100 cos, 0), as torchmetrics
            has it. They differ where a picture is opposed to its caption.

    Raises:
        ValueError: as `cosines`, or an unknown `clamp`.
    """
    if clamp not in ("each", "mean"):
        raise ValueError(f"clamp must be 'each' or 'mean', got {clamp!r}")
    if clamp == "mean":
        return max(0.0, 100.0 * float(cosines(image_embeds, text_embeds).mean()))
    return float(clip_scores(image_embeds, text_embeds).mean())


# what happens to captions that are longer than the text tower reads (77 tokens for CLIP)
POLICIES = {
    "truncate": "the rest is not read; how many are concerned is said",
    "error": "refused",
    "chunk": "cut between words into pieces that fit; the mean of their normalised embeddings counts",
}


def caption_embeds(
    captions: Sequence[str], tower: Tower, policy: str = "truncate", batch_size: int = 64
) -> tuple[FloatArray, int]:
    """Embed captions under an explicit policy for long ones.

    Common implementations cut at 77 tokens without a word, and one lost the end token with the rest and fell from 26
    to 16 (torchmetrics#2883).

    Args:
        policy: a name of `POLICIES`.

    Returns:
        (embeddings float64 [N, e], number of captions over the limit).

    Raises:
        ValueError: unknown policy; captions over the limit under `error`; a single word over the limit under `chunk`.
    """
    lookup(POLICIES, policy, "policy for long captions")
    captions = list(captions)
    over = [i for i, length in enumerate(tower.lengths(captions)) if length > tower.limit]
    if over and policy == "error":
        raise ValueError(
            f"{len(over)} of {len(captions)} captions are longer than the {tower.limit} tokens the text tower reads, "
            f"first number {over[0]}: {captions[over[0]]!r:.80}; use the policy 'truncate' or 'chunk'"
        )
    if over and policy == "truncate":
        _LOG.warning(
            "%d of %d captions are longer than %d tokens; CLIP-score does not read the rest (policy 'truncate')",
            len(over), len(captions), tower.limit,
        )  # fmt: skip
    pieces = [[caption] for caption in captions]
    if policy == "chunk":
        for i in over:
            pieces[i] = _pieces(captions[i], tower)
    flat = [piece for parts in pieces for piece in parts]
    rows = [
        np.asarray(tower.embed(flat[i : i + batch_size]), dtype=np.float64) for i in range(0, len(flat), batch_size)
    ]
    embeds = np.concatenate(rows)
    if len(flat) == len(captions):
        return embeds, len(over)
    embeds = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
    starts = np.concatenate([[0], np.cumsum([len(parts) for parts in pieces])[:-1]])
    return np.add.reduceat(embeds, starts) / np.array([[len(parts)] for parts in pieces]), len(over)


@dataclass(frozen=True)
class Texts:
    """Captions and what a text tower made of them.

    Attributes:
        embeds: float64 [N, e].
        policy, limit, over_limit: for captions longer than `limit` tokens, and how many there are.
    """

    captions: list[str]
    embeds: FloatArray
    policy: str
    limit: int
    over_limit: int

    def details(self) -> dict[str, Any]:
        """Return what a result says of long captions."""
        return {"long_captions": {"policy": self.policy, "limit": self.limit, "over_limit": self.over_limit}}


def embed_texts(captions: Sequence[str], tower: Tower, policy: str = "truncate") -> Texts:
    """Read captions by a text tower. Raises as `caption_embeds`."""
    embeds, over = caption_embeds(captions, tower, policy)
    return Texts(list(captions), embeds, policy, tower.limit, over)


def _pieces(caption: str, tower: Tower) -> list[str]:
    """Cut a caption between words into the fewest pieces that fit, taking as many words as fit each time."""
    words, found = caption.split(), []
    while words:
        low, high = 1, len(words)
        while low < high:  # the length grows with every word
            middle = (low + high + 1) // 2
            fits = tower.lengths([" ".join(words[:middle])])[0] <= tower.limit
            low, high = (middle, high) if fits else (low, middle - 1)
        if tower.lengths([" ".join(words[:low])])[0] > tower.limit:
            raise ValueError(f"the word {words[0]!r:.60} alone is longer than {tower.limit} tokens; shorten it")
        found.append(" ".join(words[:low]))
        words = words[low:]
    return found
