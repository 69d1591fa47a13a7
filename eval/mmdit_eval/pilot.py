"""How many seeds and pictures a wanted difference needs, from the spread of a study that was run. No torch.

python scripts/ablate.py power runs/quickstart --metric relation --difference 2
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mmdit.config import ConfigError
from mmdit.registry import unknown
from mmdit_eval.findings import Files, read_study
from mmdit_eval.mixed import common_table
from mmdit_eval.power import POWER, Spread, pilot_spread, seeds_needed
from mmdit_eval.scores import SCORES

PICTURES = (256, 512, 1024, 2048, 4096)


def plan_from_pilot(
    folder: str | Path, metric: str, difference: float, *, split: str | None = None, comparisons: int = 1
) -> dict[str, Any]:
    """Work out seeds a row for a wanted difference, at several numbers of pictures.

    The spread is that of the pilot's rows, pooled. It is split into the training's own and that of the pictures, so
    more pictures can be weighed against more seeds. With few seeds the pilot knows its spread badly: `careful` plans
    with the spread that the true one stays below 4 times in 5.

    Args:
        metric: a score of the study.
        difference: as shown: points for a score in %.
        split: None: the first that the study has.
        comparisons: claims of the planned study, which Holm's correction will share 5 % among.

    Returns:
        {"spread": {...}, "lines": [{"pictures", "seeds", "careful"}]}; seeds None: more than 200.

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
    try:
        spread = _spread(files, split, metric)
    except ValueError as error:
        raise ConfigError(f"{folder}: {error}") from None
    wanted, alpha = difference / (SCORES[metric].factor if metric in SCORES else 1.0), 0.05 / comparisons
    lines = []
    for pictures in sorted({spread.pictures, *PICTURES}) if spread.sample else [spread.pictures]:
        plain, careful = spread.at(pictures), spread.careful(pictures)
        lines.append({
            "pictures": pictures,
            "seeds": seeds_needed(wanted, (plain, plain), alpha=alpha),
            "careful": seeds_needed(wanted, (careful, careful), alpha=alpha),
        })  # fmt: skip
    return {
        "metric": metric, "split": split, "split_name": files.split_names[split], "difference": difference,
        "spread": spread._asdict(), "lines": lines,
    }  # fmt: skip


def _spread(files: Files, split: str, metric: str) -> Spread:
    """Pool the spread over the rows' seeds; of scores without pictures of their own only the training's."""
    tables, values = [], []
    for row in files.rows:
        cells = [(cell.result or {})["splits"][split] for cell in files.of(row)]
        if len(cells) > 1:
            values.append([cell["scores"][metric]["value"] for cell in cells if metric in cell["scores"]])
            lists = [cell["per_image"].get(metric) for cell in cells]
            if all(found is not None for found in lists):
                tables += common_table([lists])
    if tables:
        return pilot_spread(tables)
    if not values:
        return pilot_spread([np.ones((1, 2))])  # says what is missing
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
    console = Console()
    console.print(
        f"To find a difference of {difference:g} {unit} in {style.label} ({found['split_name']}) {100 * POWER:.0f} "
        f"times in 100, {comparisons} comparison(s); from a pilot with {spread['df']} degree(s) of freedom:\n"
        f"  spread of a training's quality from seed to seed {style.factor * spread['training']:.2f}, of one picture "
        f"{style.factor * spread['sample']:.1f}",
        highlight=False,
    )
    table = Table("pictures a split", "seeds a row", "careful", caption="careful: the pilot's spread may be too small")
    for line in found["lines"]:
        table.add_row(f"{line['pictures']:,}", *(str(line[k] or "over 200") for k in ("seeds", "careful")))
    console.print(table)
