"""How many seeds and pictures a wanted difference needs, from the spread of a study that was run. No torch.

python scripts/ablate.py power runs/quickstart --metric relation --difference 2
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmdit.config import ConfigError
from mmdit.registry import unknown
from mmdit_eval.claims import paired_by_design, pairs_of_rows
from mmdit_eval.findings import Files, read_study
from mmdit_eval.mixed import common_table
from mmdit_eval.power import POWER, Spread, pilot_spread, seeds_needed, shared_freedom
from mmdit_eval.scores import SCORES

PICTURES = (256, 512, 1024, 2048, 4096)


def plan_from_pilot(
    folder: str | Path, metric: str, difference: float, *, split: str | None = None, comparisons: int = 1
) -> dict[str, Any]:
    """Work out seeds a row for a wanted difference, at several numbers of pictures.

    The spread is that of the pilot's rows, pooled; where all its comparisons are paired seed by seed, that of their
    differences. It is split into the training's own and that of the pictures, so more pictures can be weighed against
    more seeds. With few seeds the pilot knows its spread badly, and differences to one reference share its noise:
    `careful` plans with the spread that the true one stays below 4 times in 5.

    Args:
        metric: a score of the study.
        difference: as shown: points for a score in %.
        split: None: the first that the study has.
        comparisons: claims of the planned study, which Holm's correction will share 5 % among.

    Returns:
        {"spread": {...}, "pairs": paired or not, "lines": [{"pictures", "seeds", "careful"}]}; seeds None: more than
        200.

    Raises:
        ConfigError: no such score or split, or a pilot with one seed a row.
        FileNotFoundError: no study there.
    """
    files = read_study(folder)
    split = split or next(iter(files.splits), None)
    if split not in files.splits:
        raise ConfigError(f"{folder} has no results of the split {split!r}; it has {files.splits}")
    if metric not in files.scores:
        raise ConfigError(unknown("score", metric, files.scores))
    if not (difference > 0 and math.isfinite(difference)):
        raise ConfigError(f"the wanted difference must be above 0, got {difference:g}")
    compared = pairs_of_rows(files)
    pairs = bool(compared) and all(paired_by_design(files, *rows) for rows in compared)
    try:
        samples = _samples(files, split, metric, compared if pairs else None)
        spread = _spread(samples, files)
    except ValueError as error:
        raise ConfigError(f"{folder}: {error}") from None
    if pairs:
        spread = spread._replace(df=shared_freedom([sample.values for sample in samples]))
    wanted, alpha = difference / (SCORES[metric].factor if metric in SCORES else 1.0), 0.05 / comparisons
    lines = []
    for pictures in sorted({spread.pictures, *PICTURES}) if spread.sample else [spread.pictures]:
        plain, careful = ((s,) if pairs else (s, s) for s in (spread.at(pictures), spread.careful(pictures)))
        lines.append({
            "pictures": pictures,
            "seeds": seeds_needed(wanted, plain, alpha=alpha),
            "careful": seeds_needed(wanted, careful, alpha=alpha),
        })  # fmt: skip
    return {
        "metric": metric, "split": split, "split_name": files.split_names[split], "difference": difference,
        "spread": spread._asdict(), "pairs": pairs, "lines": lines,
    }  # fmt: skip


class _Sample(NamedTuple):
    """One number a seed, whose spread is wanted; and that number picture by picture, [S, P], where there is one."""

    values: dict[int, float]
    table: np.ndarray | None


def _samples(files: Files, split: str, metric: str, compared: Sequence[tuple[str, str]] | None) -> list[_Sample]:
    """Collect the seeds of each row; of each comparison the differences where it is `compared` seed by seed."""
    rows: dict[str, dict[int, dict[str, Any]]] = {}
    for row in files.rows:
        judged = {cell.seed: (cell.result or {})["splits"][split] for cell in files.of(row)}
        rows[row] = {seed: found for seed, found in judged.items() if metric in found["scores"]}
    groups = [(row,) for row in files.rows] if compared is None else list(compared)
    found = []
    for group in groups:
        seeds = sorted(set.intersection(*(set(rows[row]) for row in group)))
        if len(seeds) < 2:
            continue
        values = [[rows[row][seed]["scores"][metric]["value"] for seed in seeds] for row in group]
        lists = [[rows[row][seed]["per_image"].get(metric) for seed in seeds] for row in group]
        known = all(one is not None for row in lists for one in row)
        table = np.subtract.reduce(common_table(lists)) if known else None
        found.append(_Sample(dict(zip(seeds, np.subtract.reduce(values).tolist(), strict=True)), table))
    return found


def _spread(samples: Sequence[_Sample], files: Files) -> Spread:
    """Pool the spread over seeds; of scores without pictures of their own only the training's."""
    if not samples:
        return pilot_spread([np.ones((1, 2))])  # says what is missing
    tables = [sample.table for sample in samples if sample.table is not None]
    if tables:
        return pilot_spread(tables)
    values = [list(sample.values.values()) for sample in samples]
    df = sum(len(v) - 1 for v in values)
    between = sum(float(np.var(v, ddof=1)) * (len(v) - 1) for v in values) / df
    return Spread(math.sqrt(between), 0.0, files.study["suite"]["num_images"], df)


def print_power(folder: str | Path, metric: str, difference: float, split: str | None, comparisons: int) -> None:
    """Print what `plan_from_pilot` found."""
    from rich.console import Console
    from rich.table import Table

    found = plan_from_pilot(folder, metric, difference, split=split, comparisons=comparisons)
    style, spread = SCORES[metric], found["spread"]
    unit = "points" if style.unit == "%" else ""
    kind = "two rows' difference (rows share their seeds: paired test)" if found["pairs"] else "a training's quality"
    console = Console()
    console.print(
        f"To find a difference of {difference:g} {unit} in {style.label} ({found['split_name']}) {100 * POWER:.0f} "
        f"times in 100, {comparisons} comparison(s); from a pilot with {spread['df']:.3g} degree(s) of freedom:\n"
        f"  spread of {kind} from seed to seed {style.factor * spread['training']:.2f}, of one picture "
        f"{style.factor * spread['sample']:.1f}",
        highlight=False,
    )
    table = Table("pictures a split", "seeds a row", "careful", caption="careful: the pilot's spread may be too small")
    for line in found["lines"]:
        table.add_row(f"{line['pictures']:,}", *(str(line[k] or "over 200") for k in ("seeds", "careful")))
    console.print(table)
