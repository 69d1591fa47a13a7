"""What can be measured on drawn pictures: `METRICS`, one line each.

A metric is a function of `Drawn` (pictures beside their prompts and the true pictures) and returns `Measured`. The
same functions judge a run, its snapshots and the ceiling (true pictures passed through the VAE). A metric names the
looks it takes at each picture, which several processes then share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from mmdit.config import EmojiConfig, SuiteConfig
from mmdit.diffusion.loss import equidistant_levels
from mmdit_eval.alignment import retrieve_captions, score_captions
from mmdit_eval.composition import METRICS as ATTRIBUTES
from mmdit_eval.composition import score_composition
from mmdit_eval.distance_metrics import DISTANCES
from mmdit_eval.drawn import VALIDATION_LEVELS, Drawn, Measured, Reference, rounded, training_features
from mmdit_eval.features import hash_tensors, load_clip, tiny_clip
from mmdit_eval.frechet import frechet_influence
from mmdit_eval.inception_scores import inception_score_interval
from mmdit_eval.neighbours import memorisation
from mmdit_eval.set_intervals import cmmd_influence, influence_interval, kernel_influence
from mmdit_eval.statistics import mean_interval, wilson_interval
from mmdit_eval.tasks import task_table

__all__ = ["METRICS", "Drawn", "Measured", "Metric", "Reference", "looks_of", "stamp_of_judges"]

TINY = "tiny_clip"  # the pair that suites take unless they name another


@dataclass(frozen=True)
class Metric:
    """A function and what it needs.

    Attributes:
        data: the kind of data set (None: any).
        judge: hash of the network that judges, if there is one, or what else of the rule a stamp must say.
        judged_by: what judges, for a stamp, where that depends on the suite and on the kind of data set.
        logits: the extractor must be a classifier.
        looks: lines of `drawn.LOOKS`.
        scores: the lines of `scores.SCORES` that it may give; which ones it does give depends on the data.
    """

    function: Callable[[Drawn], Measured]
    scores: tuple[str, ...]
    data: str | None = None
    judge: Callable[[], str] | None = None
    judged_by: Callable[[SuiteConfig, str], Any] | None = None
    logits: bool = False
    looks: tuple[str, ...] = ()


def _composition(drawn: Drawn) -> Measured:
    """Read the pictures back by the oracle."""
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
    """Score each picture against its own prompt by the CLIP pair of the suite."""
    return score_captions(drawn.look("clip_embeds"), drawn.texts)


def _clip_stamp(suite: SuiteConfig, data: str) -> Any:
    """Say which CLIP pair judges; the tiny one by its hashes alone, as in results from before there was a choice."""
    if suite.clip != TINY:
        return load_clip(suite.clip).describe()
    clip = tiny_clip()
    return f"{hash_tensors(clip.image.state_dict())}-{clip.text.fingerprint[:16]}"


def _distance(name: str) -> Callable[[Drawn], Measured]:
    """Turn a distance between sets into a metric; pictures and true pictures are paired by their captions."""

    def metric(drawn: Drawn) -> Measured:
        return Measured(DISTANCES[name](drawn.features, drawn.look("true_features"), "paired"))

    return metric


def _frechet(drawn: Drawn) -> Measured:
    """Measure the Fréchet distance and how much each picture, with the true one beside it, moves it."""
    value, of_drawn, of_true = frechet_influence(drawn.features, drawn.look("true_features"))
    estimate = influence_interval(value, of_drawn, of_true, "paired")
    assert of_true is not None
    return Measured({"frechet": estimate}, influence={"frechet": rounded(of_drawn + of_true)})


def _kernel(drawn: Drawn) -> Measured:
    estimate, influence = kernel_influence(drawn.features, drawn.look("true_features"), reference="paired")
    return Measured({"kernel": estimate}, influence={"kernel": rounded(influence)})


def _cmmd(drawn: Drawn) -> Measured:
    estimate, influence = cmmd_influence(drawn.features, drawn.look("true_features"), reference="paired")
    return Measured({"cmmd": estimate}, influence={"cmmd": rounded(influence)})


def _inception_score(drawn: Drawn) -> Measured:
    """Score the whole set as one part; nothing where the extractor is no classifier, which `check_suite` refuses."""
    if not drawn.reference.extractor.classes:
        return Measured()
    return Measured({"inception_score": inception_score_interval(drawn.logits)})


def _memorisation(drawn: Drawn) -> Measured:
    """Compare distances to the training pictures with those of the split's true pictures, which no training saw."""
    reference = drawn.reference
    train = drawn.training
    if train is None:
        train = training_features(reference.dataset.config, reference.extractor, drawn.suite.batch_size)
    found = memorisation(drawn.features, train, drawn.look("true_features"), twins="allow")
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


def _validation_loss(drawn: Drawn) -> Measured:
    """Measure the training objective on the true pictures of the split; not defined without a denoiser."""
    if drawn.pipeline is None:
        return Measured()
    table = np.ascontiguousarray(drawn.look("losses").T)
    details = {
        "levels": equidistant_levels(VALIDATION_LEVELS).tolist(),
        "loss_by_level": [float(value) for value in table.mean(1)],
        "prediction": drawn.pipeline.prediction,
    }
    per_image = table[:-1].mean(0)
    return Measured(
        {"validation_loss": mean_interval(per_image)},
        {"validation_loss": [round(float(value), 6) for value in per_image]},
        details=details,
    )


def _common_loss(drawn: Drawn) -> Measured:
    """Measure the error of whatever was trained, in the velocity of rectified flow at equal ratios of noise to data."""
    from mmdit_eval.validation import ratios_of

    if drawn.pipeline is None:
        return Measured()
    ratios, table = ratios_of(VALIDATION_LEVELS).tolist(), np.ascontiguousarray(drawn.look("common_losses").T)
    per_image = table.mean(0)
    return Measured(
        {"common_loss": mean_interval(per_image)},
        {"common_loss": [round(float(value), 6) for value in per_image]},
        details={"common_loss_by_ratio": dict(zip(map(str, ratios), table.mean(1).tolist(), strict=True))},
    )


def _retrieval(drawn: Drawn) -> Measured:
    """Ask the CLIP pair for captions (R@1, R@5); of emoji the judge asks its own questions, the tiny CLIP none."""
    emoji = drawn.reference.dataset.config.name == "emoji"
    if not emoji:
        return retrieve_captions(drawn.look("clip_embeds"), drawn.texts)
    measured = _emoji_questions(drawn)
    if drawn.suite.clip != TINY:
        found = retrieve_captions(drawn.look("clip_embeds"), drawn.texts)
        for part in fields(Measured):
            getattr(measured, part.name).update(getattr(found, part.name))
    return measured


def _retrieval_stamp(suite: SuiteConfig, data: str) -> Any:
    if data != "emoji":
        return _clip_stamp(suite, data)
    return _emoji_judge_hash() if suite.clip == TINY else {"emoji": _emoji_judge_hash(), **_clip_stamp(suite, data)}


def _emoji_questions(drawn: Drawn) -> Measured:
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


SETS = ("features", "true_features")
QUESTIONS = ("same_base", "same_tone", "same_gender", "r_at_1", "r_at_5")
METRICS: dict[str, Metric] = {
    "composition": Metric(_composition, ATTRIBUTES, data="shapes"),
    "retrieval": Metric(_retrieval, QUESTIONS, judged_by=_retrieval_stamp, looks=("clip_embeds",)),
    "clip_score": Metric(_clip_score, ("clip_score",), judged_by=_clip_stamp, looks=("clip_embeds",)),
    "frechet": Metric(_frechet, ("frechet",), looks=SETS),
    "frechet_infinity": Metric(_distance("frechet_infinity"), ("frechet_infinity",), looks=SETS),
    "kernel": Metric(_kernel, ("kernel",), looks=SETS),
    "cmmd": Metric(_cmmd, ("cmmd",), looks=SETS),
    "precision_recall": Metric(
        _distance("precision_recall"), ("precision", "recall", "density", "coverage"), looks=SETS
    ),
    "inception_score": Metric(
        _inception_score, ("inception_score",), logits=True, judge=lambda: "logits without bias", looks=("features",)
    ),
    "memorisation": Metric(_memorisation, ("copied", "closer"), looks=SETS),
    "validation_loss": Metric(_validation_loss, ("validation_loss",), looks=("losses",)),
    "common_loss": Metric(_common_loss, ("common_loss",), looks=("common_losses",)),
}


def looks_of(suite: SuiteConfig, data: str) -> list[str]:
    """Return the looks that a suite's metrics take at pictures of that kind of data set, each once."""
    names = dict.fromkeys(look for name in suite.metrics for look in METRICS[name].looks)
    if data == "emoji" and suite.clip == TINY and "clip_score" not in suite.metrics:
        names.pop("clip_embeds", None)  # the judge of emoji looks by itself
    return list(names)


def stamp_of_judges(suite: SuiteConfig, data: str) -> dict[str, Any]:
    """Say of each metric of a suite that has a judge which one it is."""
    found: dict[str, Any] = {}
    for name in suite.metrics:
        metric = METRICS[name]
        if metric.judged_by is not None:
            found[name] = metric.judged_by(suite, data)
        elif metric.judge is not None:
            found[name] = metric.judge()
    return found
