"""Compositional accuracy by task, in the six rows of GenEval, from what the oracle read in pictures of shapes.

Source of the rows: Ghosh et al. 2023, arXiv:2310.11513, section 3: single object, two objects, counting, colours,
position, attribute binding; the overall score is the mean of the six, each task counting alike. Departs: objects are
the shapes of our scenes and are read by the oracle of `composition`, not by a detector, so numbers compare among our
rows and with nobody's GenEval; scenes of several groups (`list`) belong to no task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import scipy.stats

from mmdit_eval.statistics import LEVEL, Estimate, wilson_interval

# task: kind of scene it is asked of, and what must be right (names of `composition.score_image`)
TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "single_object": ("single", ("shape",)),
    "two_objects": ("pair", ("shape",)),
    "counting": ("count", ("shape", "count")),
    "colours": ("single", ("shape", "colour")),
    "position": ("pair", ("shape", "relation")),
    "attribute_binding": ("pair", ("shape", "colour")),
}


def task_hits(per_image: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Return {task: 1.0 right, 0.0 wrong, None where it is not asked} of each picture.

    Args:
        per_image: what `composition.score_image` gave.
    """
    return {
        task: [
            float(all(bool(image[name]) for name in wanted)) if image["kind"] == kind else None for image in per_image
        ]
        for task, (kind, wanted) in TASKS.items()
    }


def task_table(per_image: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    """Return each task's share of right pictures with Wilson's interval, and `overall`, the mean of those asked.

    The interval of `overall` takes the tasks as independent samples, which two tasks asked of one picture are not
    quite: it is a little too narrow where a picture is right or wrong in both.
    """
    table = {}
    for task, values in task_hits(per_image).items():
        applying = [bool(value) for value in values if value is not None]
        if applying:
            table[task] = wilson_interval(applying)
    if table:
        shares = [(estimate["value"], estimate["n"]) for estimate in table.values()]
        value = sum(share for share, _ in shares) / len(shares)
        # add two hits and two misses: a share of 0 or 1 has a spread too (Agresti and Coull 1998)
        softened = [((share * n + 2) / (n + 4), n + 4) for share, n in shares]
        error = math.sqrt(sum(p * (1 - p) / n for p, n in softened)) / len(shares)
        half = float(scipy.stats.norm.ppf((1 + LEVEL) / 2)) * error
        n = sum(1 for image in per_image if image["kind"] in {kind for kind, _ in TASKS.values()})
        table["overall"] = Estimate(
            value=value, low=max(0.0, value - half), high=min(1.0, value + half), n=n, method="mean of the tasks"
        )
    return table
