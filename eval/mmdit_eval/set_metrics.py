"""What can be said of two sets of pictures by their features alone: `SET_METRICS`, one line each.

A metric is a function of `Pair` and returns `Measured`, as in `metrics.METRICS`; it needs no run and no data set.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from mmdit_eval.alignment import retrieve_captions, score_captions
from mmdit_eval.clip_score import Texts, embed_texts
from mmdit_eval.distance_metrics import NEIGHBOURS
from mmdit_eval.drawn import Measured, rounded
from mmdit_eval.features import Extractor
from mmdit_eval.frechet import FloatArray, frechet_influence
from mmdit_eval.inception_scores import inception_score, inception_score_interval
from mmdit_eval.neighbours import manifold_intervals, memorisation
from mmdit_eval.set_intervals import cmmd_influence, frechet_infinity_interval, influence_interval, kernel_influence


@dataclass(frozen=True)
class Pair:
    """Two sets of pictures, seen through one extractor.

    Attributes:
        fake: features [N, d] of the pictures to be judged.
        real: features [M, d] of the others, or moments read from a file.
        logits: of the pictures to be judged, [N, K]; K is 0 where the extractor has none.
        captions: of the pictures to be judged, or None.
        clip_features, clip: of the extractor with a text tower that CLIP-score and retrieval use.
        long_captions: policy for captions longer than the text tower reads.
        seed: of random subsets.
        train: features of the pictures the model was trained on, for copies of them; `real` must not be among these.
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
    train: FloatArray | None = None

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

    @cached_property
    def embedded(self) -> tuple[FloatArray, Texts]:
        """Embeddings of the pictures [N, e], and their captions with theirs.

        Raises:
            ValueError: no captions, or no text tower.
        """
        if self.captions is None or self.clip is None or self.clip_features is None or self.clip.text is None:
            raise ValueError(
                "clip_score and retrieval need captions and an extractor with a text tower: --captions FILE and --clip "
                "clip:FOLDER (or openclip:NAME@FILE; tiny_clip knows shapes and emoji only)"
            )
        images = self.clip.text.image_embeds(torch.from_numpy(self.clip_features).float())
        texts = embed_texts(self.captions, self.clip.text, self.long_captions)
        return images.double().cpu().numpy(), texts


def _frechet(pair: Pair) -> Measured:
    value, of_fake, of_real = frechet_influence(pair.fake, pair.real)
    estimate = influence_interval(value, of_fake, of_real, "fixed" if of_real is None else "drawn")
    return Measured({"frechet": estimate}, influence={"frechet": rounded(of_fake)})


def _frechet_infinity(pair: Pair) -> Measured:
    return Measured({"frechet_infinity": frechet_infinity_interval(pair.fake, pair.real, seed=pair.seed)})


def _kernel(pair: Pair) -> Measured:
    estimate, influence = kernel_influence(pair.fake, pair.rows())
    return Measured({"kernel": estimate}, influence={"kernel": rounded(influence)})


def _cmmd(pair: Pair) -> Measured:
    """Measure CMMD; said where the extractor is no CLIP, since published numbers are on CLIP's embeddings."""
    if pair.extractor.text is None:
        warnings.warn(
            f"cmmd on {pair.extractor.name!r}, which is no CLIP: compare the number with none that was published "
            "(--extractor clip:FOLDER)",
            stacklevel=2,
        )
    estimate, influence = cmmd_influence(pair.fake, pair.rows())
    return Measured({"cmmd": estimate}, influence={"cmmd": rounded(influence)})


def _precision_recall(pair: Pair) -> Measured:
    return Measured(manifold_intervals(pair.rows(), pair.fake, NEIGHBOURS))


def _inception_score(pair: Pair) -> Measured:
    """Score the whole set as one part, with its interval; ten parts, as published, stand in the details."""
    if not pair.logits.shape[1]:
        raise ValueError(
            f"inception_score needs the logits of a classifier, which extractor {pair.extractor.name!r} has not; take "
            "inception_fid or inception_clean"
        )
    details = {}
    if len(pair.logits) >= 10:
        mean, deviation = inception_score(pair.logits, seed=pair.seed)
        details = {"inception_score_of_10": {"mean": mean, "deviation": deviation}}
    return Measured({"inception_score": inception_score_interval(pair.logits)}, details=details)


def _memorisation(pair: Pair) -> Measured:
    """Compare distances to the training pictures with those of the other set, which no training saw."""
    if pair.train is None:
        raise ValueError("memorisation needs the pictures of the training: --train FOLDER; --against then names others")
    found = memorisation(pair.fake, pair.train, pair.rows())
    closest = [
        {"image": int(i), "training": int(found.nearest[i]), "distance": round(float(found.distances[i]), 6)}
        for i in found.closest[:8]
    ]
    return Measured(
        {"copied": found.copied, "closer": found.closer},
        chance={"copied": found.expected, "closer": 0.5},
        details={"memorisation": {"threshold": found.threshold, "closest": closest}},
    )


def _clip_score(pair: Pair) -> Measured:
    return score_captions(*pair.embedded)


def _retrieval(pair: Pair) -> Measured:
    return retrieve_captions(*pair.embedded)


SET_METRICS: dict[str, Callable[[Pair], Measured]] = {
    "frechet": _frechet,
    "frechet_infinity": _frechet_infinity,
    "kernel": _kernel,
    "cmmd": _cmmd,
    "precision_recall": _precision_recall,
    "inception_score": _inception_score,
    "memorisation": _memorisation,
    "clip_score": _clip_score,
    "retrieval": _retrieval,
}
OF_CAPTIONS = ("clip_score", "retrieval")  # metrics that need captions and a CLIP pair
