"""What can be said of two sets of pictures by their features alone: `SET_METRICS`, one line each.

A metric is a function of `Pair` and returns `Measured`, as in `metrics.METRICS`; it needs no run and no data set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmdit_eval.clip_score import caption_embeds, clip_scores
from mmdit_eval.features import Extractor, TextTower
from mmdit_eval.frechet import FloatArray, frechet_distance
from mmdit_eval.kernel import cmmd, kernel_distance
from mmdit_eval.metrics import Measured
from mmdit_eval.statistics import Estimate, jackknife_interval, mean_interval


@dataclass(frozen=True)
class Pair:
    """Two sets of pictures, seen through one extractor.

    Attributes:
        fake: features [N, d] of the pictures to be judged.
        real: features [M, d] of the others, or moments read from a file.
        logits: of the pictures to be judged, [N, K]; K is 0 where the extractor has none.
        captions: of the pictures to be judged, or None.
        clip_features, clip: of the extractor with a text tower that CLIP-score uses.
        long_captions: policy for captions longer than the text tower reads.
        seed: of random subsets.
    """

    fake: FloatArray
    real: Any
    logits: FloatArray
    extractor: Extractor
    captions: Sequence[str] | None = None
    clip_features: FloatArray | None = None
    clip: Extractor | None = None
    long_captions: str = "truncate"
    seed: int = 0

    def rows(self) -> FloatArray:
        """Return the features of the second set.

        Raises:
            ValueError: only moments are known.
        """
        if isinstance(self.real, np.ndarray):
            return self.real
        kept = getattr(self.real, "rows", None)
        if kept is None:
            raise ValueError(
                "statistics (mu, sigma) allow the Fréchet distance alone; give the pictures themselves for this metric"
            )
        return np.asarray(kept)


def _estimate(pair: Pair, function: Callable[[FloatArray, FloatArray], float]) -> Estimate:
    fake, real = pair.fake, pair.rows()
    if len(fake) != len(real):
        value = function(fake, real)
        return Estimate(value=value, low=None, high=None, n=len(fake), method="none (sets of different size)")
    return jackknife_interval(lambda rows: function(fake[rows], real[rows]), len(fake))


def _frechet(pair: Pair) -> Measured:
    return Measured({"frechet": _estimate(pair, frechet_distance)})


def _kernel(pair: Pair) -> Measured:
    return Measured({"kernel": _estimate(pair, kernel_distance)})


def _cmmd(pair: Pair) -> Measured:
    return Measured({"cmmd": _estimate(pair, cmmd)})


def _clip_score(pair: Pair) -> Measured:
    if pair.captions is None or pair.clip is None or pair.clip_features is None or pair.clip.text is None:
        raise ValueError(
            "clip_score needs captions and an extractor with a text tower: --captions FILE and --clip clip:FOLDER (or "
            "openclip:NAME@FILE; tiny_clip knows shapes and emoji only)"
        )
    images = pair.clip.text.image_embeds(torch.from_numpy(pair.clip_features).float())
    return score_captions(images.double().numpy(), pair.captions, pair.clip.text, pair.long_captions)


def score_captions(images: FloatArray, captions: Sequence[str], tower: TextTower, policy: str) -> Measured:
    """Score embeddings of pictures [N, e] against their captions; says how many captions were too long."""
    text, long = caption_embeds(captions, tower, policy)
    values = clip_scores(images, text)
    details = {"long_captions": {"policy": policy, "limit": tower.limit, "over_limit": long}}
    return Measured(
        {"clip_score": mean_interval(values)}, {"clip_score": [round(float(v), 4) for v in values]}, details=details
    )


SET_METRICS: dict[str, Callable[[Pair], Measured]] = {
    "frechet": _frechet,
    "kernel": _kernel,
    "cmmd": _cmmd,
    "clip_score": _clip_score,
}
