"""What two sets of features say of each other, as a suite measures it: `DISTANCES`, one line each.

Runs (`metrics.METRICS`) and plain sets of pictures (`set_metrics.SET_METRICS`) are measured by the same functions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from mmdit_eval.extrapolation import SPLITS
from mmdit_eval.moments import FloatArray
from mmdit_eval.neighbours import manifold_intervals
from mmdit_eval.set_intervals import (
    Reference,
    cmmd_interval,
    frechet_infinity_interval,
    frechet_interval,
    kernel_interval,
)
from mmdit_eval.statistics import Estimate

NEIGHBOURS = 5  # k of precision, recall, density and coverage


def _frechet_infinity(fake: FloatArray, real: Any, reference: Reference | None) -> dict[str, Estimate]:
    """Leave the score out, with a warning, where there are too few pictures: the others of the suite still count."""
    fewest, width = min(len(fake), len(real)) if isinstance(real, np.ndarray) else len(fake), fake.shape[1]
    if fewest // SPLITS <= width:
        warnings.warn(
            f"frechet_infinity is left out: {fewest} pictures are too few for {width} features, {SPLITS * (width + 1)} "
            "are needed",
            stacklevel=3,
        )
        return {}
    return {"frechet_infinity": frechet_infinity_interval(fake, real, reference=reference)}


def _neighbours(fake: FloatArray, real: FloatArray, reference: Reference | None) -> dict[str, Estimate]:
    if min(len(fake), len(real)) <= NEIGHBOURS:
        warnings.warn(f"precision_recall is left out: it needs more than {NEIGHBOURS} pictures a set", stacklevel=3)
        return {}
    return manifold_intervals(real, fake, NEIGHBOURS)


# (fake features, real features or moments, what is drawn anew) -> scores
DISTANCES: dict[str, Callable[[FloatArray, Any, Reference | None], dict[str, Estimate]]] = {
    "frechet": lambda fake, real, reference: {"frechet": frechet_interval(fake, real, reference=reference)},
    "frechet_infinity": _frechet_infinity,
    "kernel": lambda fake, real, reference: {"kernel": kernel_interval(fake, real, reference=reference)},
    "cmmd": lambda fake, real, reference: {"cmmd": cmmd_interval(fake, real, reference=reference)},
    "precision_recall": _neighbours,
}
