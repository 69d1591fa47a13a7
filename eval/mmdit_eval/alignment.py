"""Do pictures fit their captions, by one CLIP pair: CLIP-score and retrieval as metrics of runs and of plain sets."""

from __future__ import annotations

import warnings

import numpy as np

from mmdit_eval.clip_score import Texts, clip_score, clip_scores
from mmdit_eval.drawn import Measured
from mmdit_eval.moments import FloatArray
from mmdit_eval.retrieval import retrieval_ranks
from mmdit_eval.statistics import mean_interval, wilson_interval

RECALLS = (1, 5)  # K of R@K


def score_captions(images: FloatArray, texts: Texts) -> Measured:
    """Score embeddings of pictures [N, e] against their captions; says how many captions were too long."""
    values = clip_scores(images, texts.embeds)
    return Measured(
        {"clip_score": mean_interval(values)},
        {"clip_score": [round(float(v), 4) for v in values]},
        details={**texts.details(), "clip_score_of_clamped_mean": clip_score(images, texts.embeds, clamp="mean")},
    )


def retrieve_captions(images: FloatArray, texts: Texts) -> Measured:
    """Ask whether each picture's own caption is among the K nearest of all captions of the set (R@K).

    Captions with the same words are one candidate. The other direction, whether a caption's picture is among the K
    nearest of all pictures, stands in the details.

    Source: both directions over a whole set, as CLIP's zero-shot retrieval: Radford et al. 2021, arXiv:2103.00020; as a
    measure of drawn pictures: R-precision, Xu et al. 2017, arXiv:1711.10485, section 4.
    Departs: R-precision takes 100 captions at random; here all of the set are candidates, so N matters.

    Args:
        images: [N, e].
    """
    places = {caption: i for i, caption in enumerate(dict.fromkeys(texts.captions))}
    count = len(places)
    if count < 2:
        warnings.warn("retrieval is left out: it needs at least two different captions", stacklevel=2)
        return Measured()
    names = np.array([places[caption] for caption in texts.captions])
    first = np.unique(names, return_index=True)[1]  # one row a caption
    ranks = retrieval_ranks(images, texts.embeds[first], names, np.arange(count))
    back = retrieval_ranks(texts.embeds[first], images, np.arange(count), names)
    measured = Measured(details={**texts.details(), "retrieval": {"captions": count, "pictures": len(images)}})
    for k in RECALLS:
        hits = (ranks < k).astype(float).tolist()
        measured.scores[f"r_at_{k}"] = wilson_interval(hits)
        measured.per_image[f"r_at_{k}"] = hits
        measured.chance[f"r_at_{k}"] = min(k / count, 1.0)
        measured.details["retrieval"][f"text_to_image_r_at_{k}"] = float((back < k).mean())
    return measured
