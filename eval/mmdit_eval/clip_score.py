"""CLIP-score: how well a picture fits its prompt, by the angle between their embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmdit_eval.frechet import FloatArray


def clip_scores(image_embeds: Any, text_embeds: Any) -> FloatArray:
    """Return max(100 cos, 0) per pair, [N].

    Source: Hessel et al. 2021, arXiv:2104.08718, Eq. 1, with w = 100 as in common implementations (the paper has 2.5).

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
    scores: FloatArray = np.maximum(100.0 * (image * text).sum(1), 0.0)
    return scores


def clip_score(image_embeds: Any, text_embeds: Any) -> float:
    """Return the mean of `clip_scores`: 0 ... 100. Comparable only within one CLIP."""
    return float(clip_scores(image_embeds, text_embeds).mean())
