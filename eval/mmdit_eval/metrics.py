"""What can be measured on drawn pictures: `METRICS`, one line each.

A metric is a function of `Drawn` (pictures beside their prompts and the true pictures) and returns `Measured`. The
same functions judge a run, its snapshots and the ceiling (true pictures passed through the VAE).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from mmdit.config import EmojiConfig, SuiteConfig
from mmdit.data import make_dataset
from mmdit.diffusion.loss import equidistant_levels
from mmdit.pipeline import TextToImage
from mmdit_eval.clip_score import caption_embeds, clip_score, clip_scores
from mmdit_eval.distance_metrics import DISTANCES
from mmdit_eval.features import Extractor, TextTower, extract, extract_logits, hash_tensors, load_extractor, tiny_clip
from mmdit_eval.frechet import frechet_influence
from mmdit_eval.inception_scores import inception_score_interval
from mmdit_eval.moments import FloatArray
from mmdit_eval.neighbours import memorisation
from mmdit_eval.set_intervals import influence_interval
from mmdit_eval.statistics import Estimate, mean_interval, wilson_interval
from mmdit_eval.tasks import task_table

VALIDATION_LEVELS = 8  # equidistant t; the mean leaves out t = 1, as in arXiv:2403.03206v1, 5.3


@dataclass(frozen=True)
class Reference:
    """The items of one split that a suite looks at.

    Attributes:
        indices: int [N] into the data set; also the numbers that key each picture's noise.
        images: the true pictures, uint8 [N, R, R, 3].
    """

    split: str
    dataset: Any
    indices: np.ndarray
    captions: list[str]
    images: np.ndarray
    extractor: Extractor
    batch_size: int = 128

    @cached_property
    def features(self) -> FloatArray:
        """Features of the true pictures, [N, d]."""
        return extract(self.extractor, self.images, self.batch_size)

    def head(self, count: int) -> Reference:
        """Return the first `count` items."""
        return self.part(slice(0, count))

    def part(self, rows: slice) -> Reference:
        """Return some of the items."""
        return Reference(
            self.split,
            self.dataset,
            self.indices[rows],
            self.captions[rows],
            self.images[rows],
            self.extractor,
            self.batch_size,
        )


@dataclass(frozen=True)
class Drawn:
    """Pictures to be judged: `images[i]` was drawn for `reference.captions[i]`.

    Attributes:
        reference: the true pictures, which distances refer to, and their captions.
        pipeline: the run itself, or None where the pictures are true ones.
    """

    images: np.ndarray
    reference: Reference
    suite: SuiteConfig
    pipeline: TextToImage | None = None

    @cached_property
    def features(self) -> FloatArray:
        return extract(self.reference.extractor, self.images, self.suite.batch_size)


@dataclass(frozen=True)
class Measured:
    """What a metric found on one split.

    Attributes:
        scores: {score: value with interval}.
        per_image: {score: one number an image, None where it does not apply}; pairs rows that share prompts.
        influence: {distance: how much each image moves it}; pairs rows in a distance, which no image has by itself.
        chance: {score: what guessing gives}, where guessing is defined.
        details: anything else worth keeping, plain JSON types.
    """

    scores: dict[str, Estimate] = field(default_factory=dict)
    per_image: dict[str, list[float | None]] = field(default_factory=dict)
    influence: dict[str, list[float]] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """A function and what it needs.

    Attributes:
        data: the kind of data set (None: any).
        judge: hash of the network that judges, if there is one, or what else of the rule a stamp must say.
        logits: the extractor must be a classifier.
    """

    function: Callable[[Drawn], Measured]
    data: str | None = None
    judge: Callable[[], str] | None = None
    logits: bool = False


def _composition(drawn: Drawn) -> Measured:
    """Read the pictures back by the oracle."""
    from mmdit_eval.composition import METRICS as ATTRIBUTES
    from mmdit_eval.composition import score_composition

    reference = drawn.reference
    long_form = [reference.dataset.long_form(int(i)) for i in reference.indices]
    result = score_composition(drawn.images, reference.dataset.scenes(reference.indices), long_form)
    scores, per_image = {}, {}
    for name in ATTRIBUTES:
        values = [None if image[name] is None else float(image[name]) for image in result["per_image"]]
        applying = [value for value in values if value is not None]
        if applying:
            scores[name] = wilson_interval(applying)
            per_image[name] = values
    details = {key: result[key] for key in ("by_heldout_kind", "by_kind") if result[key]}
    return Measured(scores, per_image, details={**details, "tasks": task_table(result["per_image"])})


def _clip_score(drawn: Drawn) -> Measured:
    """Score each picture against its own prompt by the tiny CLIP."""
    tower = load_extractor("tiny_clip").text
    assert tower is not None
    images = tiny_clip().image_embeds(drawn.images).double().cpu().numpy()
    return score_captions(images, drawn.reference.captions, tower, drawn.suite.long_captions)


def score_captions(images: FloatArray, captions: Sequence[str], tower: TextTower, policy: str) -> Measured:
    """Score embeddings of pictures [N, e] against their captions; says how many captions were too long."""
    text, long = caption_embeds(captions, tower, policy)
    values = clip_scores(images, text)
    details = {
        "long_captions": {"policy": policy, "limit": tower.limit, "over_limit": long},
        "clip_score_of_clamped_mean": clip_score(images, text, clamp="mean"),
    }
    return Measured(
        {"clip_score": mean_interval(values)}, {"clip_score": [round(float(v), 4) for v in values]}, details=details
    )


def _clip_hash() -> str:
    clip = tiny_clip()
    return f"{hash_tensors(clip.image.state_dict())}-{clip.text.fingerprint[:16]}"


def _distance(name: str) -> Callable[[Drawn], Measured]:
    """Turn a distance between sets into a metric; pictures and true pictures are paired by their captions."""

    def metric(drawn: Drawn) -> Measured:
        return Measured(DISTANCES[name](drawn.features, drawn.reference.features, "paired"))

    return metric


def _frechet(drawn: Drawn) -> Measured:
    """Measure the Fréchet distance and how much each picture, with the true one beside it, moves it."""
    value, of_drawn, of_true = frechet_influence(drawn.features, drawn.reference.features)
    estimate = influence_interval(value, of_drawn, of_true, "paired")
    assert of_true is not None
    influence = [float(f"{v:.6g}") for v in of_drawn + of_true]
    return Measured({"frechet": estimate}, influence={"frechet": influence})


def _inception_score(drawn: Drawn) -> Measured:
    """Score the whole set as one part; nothing where the extractor is no classifier, which `check_suite` refuses."""
    extractor = drawn.reference.extractor
    if not extractor.classes:
        return Measured()
    logits = extract_logits(extractor, drawn.images, drawn.suite.batch_size)
    return Measured({"inception_score": inception_score_interval(logits)})


def _memorisation(drawn: Drawn) -> Measured:
    """Compare distances to the training pictures with those of the split's true pictures, which no training saw."""
    reference = drawn.reference
    train = _training_features(reference.dataset.config, reference.extractor, drawn.suite.batch_size)
    found = memorisation(drawn.features, train, reference.features, twins="allow")
    closest = [
        {"image": int(i), "training": int(found.nearest[i]), "distance": round(float(found.distances[i]), 6)}
        for i in found.closest[:8]
    ]
    details = {"threshold": found.threshold, "twins": found.twins, "closest": closest}
    return Measured(
        {"copied": found.copied, "closer": found.closer},
        chance={"copied": found.expected, "closer": 0.5},
        details={"memorisation": details},
    )


@lru_cache(maxsize=1)
def _training_features(config: Any, extractor: Extractor, batch_size: int) -> FloatArray:
    """Features of every training picture, [T, d], made batch by batch and kept for the next split or run."""
    dataset = make_dataset(config, "train")
    parts = [
        extract(extractor, dataset.pixels(np.arange(start, min(start + batch_size, len(dataset)))), batch_size)
        for start in range(0, len(dataset), batch_size)
    ]
    return np.concatenate(parts)


def _validation_loss(drawn: Drawn) -> Measured:
    """Measure the training objective on the true pictures of the split; not defined without a denoiser."""
    from mmdit_eval.validation import losses_by_level

    pipeline = drawn.pipeline
    if pipeline is None:
        return Measured()
    table = losses_by_level(pipeline, drawn.reference, equidistant_levels(VALIDATION_LEVELS), drawn.suite.seed)
    details = {
        "levels": equidistant_levels(VALIDATION_LEVELS).tolist(),
        "loss_by_level": [float(value) for value in table.mean(1)],
        "prediction": pipeline.prediction,
    }
    per_image = table[:-1].mean(0)
    return Measured(
        {"validation_loss": mean_interval(per_image)},
        {"validation_loss": [round(float(value), 6) for value in per_image]},
        details=details,
    )


def _common_loss(drawn: Drawn) -> Measured:
    """Measure the error of whatever was trained, in the velocity of rectified flow at equal ratios of noise to data."""
    from mmdit_eval.validation import velocity_losses

    if drawn.pipeline is None:
        return Measured()
    ratios, table = velocity_losses(drawn.pipeline, drawn.reference, VALIDATION_LEVELS, drawn.suite.seed)
    per_image = table.mean(0)
    return Measured(
        {"common_loss": mean_interval(per_image)},
        {"common_loss": [round(float(value), 6) for value in per_image]},
        details={"common_loss_by_ratio": dict(zip(map(str, ratios), table.mean(1).tolist(), strict=True))},
    )


def _retrieval(drawn: Drawn) -> Measured:
    """Ask the judge whether each emoji is nearer to its own true picture than to its relatives."""
    from mmdit_eval.judge import judge, retrieval_scores

    dataset = drawn.reference.dataset
    bank = _emoji_bank(dataset.config.model_dump_json())
    result = retrieval_scores(drawn.images, dataset.records(drawn.reference.indices), bank, judge())
    measured = Measured()
    for question, found in result.items():
        if not found["n"]:
            continue
        measured.scores[question] = wilson_interval([hit for hit in found["hits"] if hit is not None])
        measured.per_image[question] = [None if hit is None else float(hit) for hit in found["hits"]]
        measured.chance[question] = found["chance"]
    return measured


def _emoji_judge_hash() -> str:
    from mmdit_eval.judge import judge

    return hash_tensors(judge().tower.state_dict())


@lru_cache(maxsize=2)
def _emoji_bank(config_json: str) -> Any:
    from mmdit_eval.judge import judge, make_bank

    return make_bank(judge(), EmojiConfig.model_validate_json(config_json))


METRICS: dict[str, Metric] = {
    "composition": Metric(_composition, data="shapes"),
    "retrieval": Metric(_retrieval, data="emoji", judge=_emoji_judge_hash),
    "clip_score": Metric(_clip_score, judge=_clip_hash),
    "frechet": Metric(_frechet),
    **{name: Metric(_distance(name)) for name in DISTANCES if name != "frechet"},
    "inception_score": Metric(_inception_score, logits=True, judge=lambda: "logits without bias"),
    "memorisation": Metric(_memorisation),
    "validation_loss": Metric(_validation_loss),
    "common_loss": Metric(_common_loss),
}
