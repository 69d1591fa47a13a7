"""Guidance scales against each other: a distance (less is better) over CLIP-score (more is better), a point a scale.

    python scripts/evaluate.py sweep runs/quickstart/mmdit-s0 --scales 0 1 2 4 8

A single scale favours whichever row it suits; the curve does not. The form is Nichol et al. 2021, arXiv:2112.10741,
figure 6, and Esser et al. 2024, arXiv:2403.03206v1, figure 3. Every scale is judged as a suite of its own, with the
same prompts and noise, and kept: an interrupted sweep goes on, and more scales may be added later.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmdit.checkpoint import find_checkpoint
from mmdit.config import ConfigError, SuiteConfig, load_config
from mmdit_eval import plots
from mmdit_eval.comparison import write_result
from mmdit_eval.suite import evaluate_run, load_references

ACROSS, UP = "clip_score", ("frechet", "kernel", "cmmd")


def sweep_run(
    run_dir: str | Path,
    scales: Sequence[float],
    suite: SuiteConfig | None = None,
    checkpoint: str | Path | None = None,
    *,
    say: Callable[[str], None] = print,
) -> tuple[Path, Path]:
    """Judge one checkpoint at several guidance scales; write a table and a plot.

    Args:
        scales: guidance scales; 1 is off, 0 ignores the prompt.
        suite: its metrics must hold `clip_score` and a distance; others are kept beside. Its name begins the files'.

    Returns:
        (plot, table): `<run>/eval/<suite>-sweep-<images_seen>.png` and `.json`.

    Raises:
        ConfigError: no scales, one twice, or a suite without the two metrics.
        FileNotFoundError, CheckpointError: no run, no whole checkpoint.
    """
    path = Path(checkpoint) if checkpoint is not None else find_checkpoint(run_dir)
    config = load_config(path / "config.yaml")
    suite = (suite or SuiteConfig()).for_data(config.data.name)
    distance = next((name for name in UP if name in suite.metrics), None)
    if ACROSS not in suite.metrics or distance is None:
        raise ConfigError(
            f"suite.metrics: a sweep draws a distance ({', '.join(UP)}) over clip_score, got {list(suite.metrics)}"
        )
    if not scales or len(set(scales)) != len(scales) or min(scales) < 0:
        raise ConfigError(f"--scales: give each guidance scale >= 0 once, got {list(scales)}")
    sampling = suite.sampling or config.sampling
    references = load_references(config, suite)
    points: list[dict[str, Any]] = []
    for scale in sorted(scales):
        one = suite.model_copy(
            update={
                "name": f"{suite.name}-guidance-{scale:g}",
                "sampling": sampling.model_copy(update={"guidance_scale": float(scale)}),
                "snapshot_images": 0,
            }
        )
        result = evaluate_run(run_dir, one, path, references=references, say=say)
        scores = {split: found["scores"] for split, found in result["splits"].items()}
        points.append({"guidance_scale": float(scale), "scores": scores})
    table: dict[str, Any] = {
        "run": config.name,
        "data": config.data.name,
        "images_seen": int(path.name),
        "across": ACROSS,
        "up": distance,
        "splits": {split: {"num_images": found["num_images"]} for split, found in result["splits"].items()},
        "stamp": {
            "protocol": result["stamp"]["protocol"],
            "inference": {k: v for k, v in result["stamp"]["inference"].items() if k != "sampling.guidance_scale"},
        },
        "points": points,
        "best": {
            split: min(points, key=lambda p: p["scores"][split][distance]["value"])["guidance_scale"]
            for split in result["splits"]
        },
    }
    stem = Path(run_dir) / "eval" / f"{suite.name}-sweep-{path.name}"
    write_result(stem.with_suffix(".json"), table)
    picture = stem.with_suffix(".png")
    picture.write_bytes(base64.b64decode(plots.sweep_figure(table)))
    return picture, stem.with_suffix(".json")
