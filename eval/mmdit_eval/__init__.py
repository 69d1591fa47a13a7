"""Evaluation of diffusion runs: features, distances, scores, studies, report.

Public names are imported on first use: a config is validated before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# not lazy: a first import of the module of that name would hide the function for good
from mmdit_eval.clip_score import clip_score

_EXPORTS = {
    "Moments": "mmdit_eval.moments",
    "cmmd": "mmdit_eval.kernel",
    "compare": "mmdit_eval.comparison",
    "density_coverage": "mmdit_eval.neighbours",
    "evaluate_run": "mmdit_eval.suite",
    "frechet_distance": "mmdit_eval.frechet",
    "frechet_infinity": "mmdit_eval.extrapolation",
    "inception_score": "mmdit_eval.inception_scores",
    "kernel_distance": "mmdit_eval.kernel",
    "memorisation": "mmdit_eval.neighbours",
    "precision_recall": "mmdit_eval.neighbours",
    "retrieval_at_1": "mmdit_eval.retrieval",
    "run_study": "mmdit_eval.study",
}
__all__ = [
    "Moments",
    "clip_score",
    "cmmd",
    "compare",
    "density_coverage",
    "evaluate_run",
    "frechet_distance",
    "frechet_infinity",
    "inception_score",
    "kernel_distance",
    "memorisation",
    "precision_recall",
    "retrieval_at_1",
    "run_study",
]

if TYPE_CHECKING:
    from mmdit_eval.comparison import compare
    from mmdit_eval.extrapolation import frechet_infinity
    from mmdit_eval.frechet import frechet_distance
    from mmdit_eval.inception_scores import inception_score
    from mmdit_eval.kernel import cmmd, kernel_distance
    from mmdit_eval.moments import Moments
    from mmdit_eval.neighbours import density_coverage, memorisation, precision_recall
    from mmdit_eval.retrieval import retrieval_at_1
    from mmdit_eval.study import run_study
    from mmdit_eval.suite import evaluate_run


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mmdit_eval' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
