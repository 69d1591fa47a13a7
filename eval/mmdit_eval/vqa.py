"""Text alignment judged by a model that answers questions about pictures: the adapter, and the score.

No such model is small enough to ship or to load unasked. Whoever has one writes a class of two attributes and a
method, and puts it beside the other metrics:

    class Mine:
        name, fingerprint = "clip-flant5-xl", "sha256 of its weights"

        def yes(self, images, questions):          # list of uint8 [H, W, 3], list of str
            ...                                    # probability of the answer "yes", [N]

    METRICS["vqa"] = vqa_metric(Mine())            # for suites on runs: metrics: [vqa, ...]
    vqa_scores(Mine(), images, captions)           # for arrays
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from mmdit_eval.drawn import Drawn, Measured
from mmdit_eval.metrics import Metric
from mmdit_eval.moments import FloatArray
from mmdit_eval.statistics import mean_interval

TEMPLATE = 'Does this figure show "{caption}"? Please answer yes or no.'


class Scorer(Protocol):
    """A model that answers questions about pictures.

    Attributes:
        name: for people.
        fingerprint: hash of what decides its answers; enters the stamp, so that two models are never compared.
    """

    name: str
    fingerprint: str

    def yes(self, images: Sequence[np.ndarray], questions: Sequence[str]) -> Any:
        """Return the probability of the answer "yes" to each question about its picture, [B].

        Args:
            images: uint8 [H, W, 3].
            questions: one a picture.
        """


def vqa_scores(
    scorer: Scorer, images: Sequence[np.ndarray] | np.ndarray, captions: Sequence[str], batch_size: int = 16
) -> FloatArray:
    """Return how probable the model finds it that each picture shows its caption, [N] in 0 ... 1.

    Source: Lin et al. 2024, arXiv:2404.01291, Eq. 1 and its question.

    Raises:
        ValueError: lists of different length, no pictures, or answers that are no probabilities.
    """
    if not len(images) or len(images) != len(captions):
        raise ValueError(
            f"need one caption a picture, and at least one: got {len(captions)} for {len(images)} pictures"
        )
    parts = []
    for start in range(0, len(images), batch_size):
        pictures = list(images[start : start + batch_size])
        questions = [TEMPLATE.format(caption=caption) for caption in captions[start : start + batch_size]]
        answers = np.asarray(scorer.yes(pictures, questions), dtype=np.float64)
        if answers.shape != (len(pictures),):
            raise ValueError(f"scorer {scorer.name!r} gave {list(answers.shape)} for {len(pictures)} questions")
        if not (np.isfinite(answers).all() and (answers >= 0).all() and (answers <= 1).all()):
            raise ValueError(
                f"scorer {scorer.name!r} must give probabilities in 0 ... 1, got {answers.min():.3g} to "
                f"{answers.max():.3g}"
            )
        parts.append(answers)
    return np.concatenate(parts)


def vqa_metric(scorer: Scorer, batch_size: int = 16) -> Metric:
    """Turn a scorer into a metric of runs, to be put into `metrics.METRICS` under a name of its own."""

    def metric(drawn: Drawn) -> Measured:
        values = vqa_scores(scorer, drawn.images, drawn.reference.captions, batch_size)
        return Measured({"vqa_score": mean_interval(values)}, {"vqa_score": [round(float(v), 6) for v in values]})

    return Metric(metric, ("vqa_score",), judge=lambda: f"{scorer.name}-{scorer.fingerprint}")
