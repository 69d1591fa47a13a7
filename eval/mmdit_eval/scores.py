"""How numbers are shown: label, factor, digits and which way is better. No torch: the report reads files only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """How a number is shown: its name for people, a factor and format, and which way is better.

    `noun` stands in a sentence ("3.1 points of relation accuracy"); empty: the label.
    """

    label: str
    better: int  # +1 more is better, -1 less is better
    factor: float = 1.0
    digits: int = 3
    unit: str = ""
    noun: str = ""


# every score a metric may give, in the order of a table
SCORES: dict[str, Score] = {
    "colour": Score("colour", +1, 100, 1, "%"),
    "shape": Score("shape", +1, 100, 1, "%"),
    "size": Score("size", +1, 100, 1, "%"),
    "count": Score("count", +1, 100, 1, "%"),
    "relation": Score("relation", +1, 100, 1, "%"),
    "early": Score("early objects", +1, 100, 1, "%"),
    "late": Score("late objects", +1, 100, 1, "%"),
    "all_correct": Score("all correct", +1, 100, 1, "%", "pictures right in everything"),
    "unreadable": Score("unreadable", -1, 100, 1, "%"),
    "same_base": Score("right tone", +1, 100, 1, "%"),  # retrieved among the same base in other tones
    "same_tone": Score("right base", +1, 100, 1, "%"),  # among other bases in the same tone
    "same_gender": Score("right gender", +1, 100, 1, "%"),  # among the same base and tone
    "clip_score": Score("CLIP-score", +1, 1, 1),
    "r_at_1": Score("R@1", +1, 100, 1, "%"),  # of a picture's own caption among all
    "r_at_5": Score("R@5", +1, 100, 1, "%"),
    "frechet": Score("Fréchet", -1, 1, 3),
    "frechet_infinity": Score("Fréchet, N → ∞", -1, 1, 3),
    "kernel": Score("kernel ×1000", -1, 1000, 2),
    "cmmd": Score("CMMD", -1, 1, 3),
    "precision": Score("precision", +1, 100, 1, "%"),
    "recall": Score("recall", +1, 100, 1, "%"),
    "density": Score("density", +1, 1, 3),
    "coverage": Score("coverage", +1, 100, 1, "%"),
    "inception_score": Score("Inception score", +1, 1, 2),
    "copied": Score("nearer to training than any new picture", -1, 100, 1, "%"),
    "closer": Score("closer to training than a new picture", -1, 100, 1, "%"),
    "validation_loss": Score("validation loss", -1, 1, 3),
    "common_loss": Score("velocity loss", -1, 1, 3),  # of any target, converted
    "vqa_score": Score("VQA score", +1, 100, 1, "%"),
}

# what a study is judged by first, where it is measured
HEADLINES = ("all_correct", "same_tone", "clip_score", "frechet", "validation_loss")


SPLITS = {"seen": "seen combinations", "heldout": "held-out combinations"}


def split_names(data: str) -> dict[str, str]:
    """Return what the splits are called in words, for a kind of data (`data.name`); "": one of known combinations."""
    return {"seen": "pictures kept out of training"} if data in ("images", "shards") else SPLITS


def shown(score: str, value: float | None, unit: bool = True) -> str:
    """Format a value for people: "93.4 %"."""
    if value is None:
        return "–"
    style = SCORES.get(score, Score(score, +1))
    number = f"{style.factor * value:.{style.digits}f}".replace("-", "−")
    return number + (f" {style.unit}" if unit and style.unit else "")


def shown_interval(score: str, low: float | None, high: float | None) -> str:
    """Format an interval for people: "90.1 – 96.0"; empty where there is none."""
    if low is None or high is None:
        return ""
    return f"{shown(score, low, unit=False)} – {shown(score, high, unit=False)}"
