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
from mmdit_eval.claims import claimed_splits, paired_by_design, pairs_of_rows, stated_claims
from mmdit_eval.findings import Files, read_study
from mmdit_eval.mixed import common_table
from mmdit_eval.power import POWER, Spread, pilot_spread, seeds_needed, shared_freedom
from mmdit_eval.scores import SCORES

PICTURES = (256, 512, 1024, 2048, 4096)


def plan_from_pilot(
    folder: str | Path, metric: str, difference: float, *, split: str | None = None, comparisons: int | None = None
) -> dict[str, Any]:
    """Work out seeds a row for a wanted difference, at several numbers of pictures.

    The spread is that of the pilot's rows, pooled; where all its comparisons are paired seed by seed, that of their
    differences. It is split into the training's own and that of the pictures, so more pictures can be weighed against
    more seeds. With few seeds the pilot knows its spread badly, and differences to one reference share its noise:
    `careful` plans with the spread that the true one stays below 4 times in 5.

    Args:
        metric: a score of the study.
        difference: as shown: points for a score in %.
        split: None: the first that the study claims.
        comparisons: claims of the planned study, which Holm's correction will share 5 % among; None: as many as the
            pilot states.

    Returns:
        {"spread": {...}, "pairs": paired or not, "share": of the pictures to which the score applies, "lines":
        [{"pictures": of the split, "seeds", "careful"}], ...}; seeds None: more than 200. Where nothing is known about
        single pictures, one line: the pilot's own number.

    Raises:
        ConfigError: no such score or split, no comparison, or a pilot with one seed a row.
        FileNotFoundError: no study there.
    """
    files = read_study(folder)
    split = split or next(iter([*claimed_splits(files), *files.splits]), None)
    if split not in files.splits:
        raise ConfigError(f"{folder} has no results of the split {split!r}; it has {files.splits}")
    if metric not in files.scores:
        raise ConfigError(unknown("score", metric, files.scores))
    if not (difference > 0 and math.isfinite(difference)):
        raise ConfigError(f"the wanted difference must be above 0, got {difference:g}")
    if comparisons is None:
        comparisons = max(1, len(stated_claims(files)))
    if comparisons < 1:
        raise ConfigError(f"a study has 1 comparison or more, got {comparisons}")
    compared = pairs_of_rows(files)
    pairs = bool(compared) and all(paired_by_design(files, *rows) for rows in compared)
    try:
        samples = _samples(files, split, metric, compared if pairs else None)
        spread, drawn = _spread(samples), samples[-1].drawn
    except ValueError as error:
        raise ConfigError(f"{folder}: {error}") from None
    if pairs:
        spread = spread._replace(df=shared_freedom([sample.values for sample in samples]))
    wanted, alpha = difference / (SCORES[metric].factor if metric in SCORES else 1.0), 0.05 / comparisons
    share, lines = spread.pictures / drawn, []
    for pictures in [drawn] if spread.sample is None else sorted({drawn, *PICTURES}):
        applies = spread.pictures if pictures == drawn else pictures * share
        plain, careful = ((s,) if pairs else (s, s) for s in (spread.at(applies), spread.careful(applies)))
        lines.append({
            "pictures": pictures,
            "seeds": seeds_needed(wanted, plain, alpha=alpha),
            "careful": seeds_needed(wanted, careful, alpha=alpha),
        })  # fmt: skip
    return {
        "metric": metric, "split": split, "split_name": files.split_names[split], "difference": difference,
        "comparisons": comparisons, "spread": spread._asdict(), "pairs": pairs, "share": share, "lines": lines,
    }  # fmt: skip


class _Sample(NamedTuple):
    """One number a seed, whose spread is wanted.

    Attributes:
        values: {seed: that number}.
        table: it, picture by picture to which the score applies, [S, P]; None where there is no such number.
        drawn: pictures of the split, whether or not the score applies to them.
    """

    values: dict[int, float]
    table: np.ndarray | None
    drawn: int


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
        drawn = min(rows[row][seed]["num_images"] for row in group for seed in seeds)
        found.append(_Sample(dict(zip(seeds, np.subtract.reduce(values).tolist(), strict=True)), table, drawn))
    return found


def _spread(samples: Sequence[_Sample]) -> Spread:
    """Pool the spread over seeds; what pictures add to it is not known of scores that none has by itself."""
    if not samples:
        return pilot_spread([np.ones((1, 2))])  # says what is missing
    tables = [sample.table for sample in samples if sample.table is not None]
    if tables:
        return pilot_spread(tables)
    values = [list(sample.values.values()) for sample in samples]
    df = sum(len(v) - 1 for v in values)
    between = sum(float(np.var(v, ddof=1)) * (len(v) - 1) for v in values) / df
    return Spread(math.sqrt(between), None, samples[-1].drawn, df)


def print_power(folder: str | Path, metric: str, difference: float, split: str | None, comparisons: int | None) -> None:
    """Print what `plan_from_pilot` found."""
    from rich.console import Console
    from rich.table import Table

    found = plan_from_pilot(folder, metric, difference, split=split, comparisons=comparisons)
    style, spread = SCORES[metric], found["spread"]
    unit = " points" if style.unit == "%" else ""
    kind = "two rows' difference (rows share their seeds: paired test)" if found["pairs"] else "a training's quality"
    of_pictures = "; what pictures add to it is not known, so only the pilot's number of them can be planned with"
    if spread["sample"] is not None:
        of_pictures = f", of one picture {style.factor * spread['sample']:.1f}"
    told = [
        f"To find a difference of {difference:g}{unit} in {style.label} {100 * POWER:.0f} times in 100, from a pilot "
        f"with {spread['df']:.3g} degree(s) of freedom:",
        f"  split: {found['split_name']} ({'as the pilot claims; or --split' if split is None else 'as given'})",
        f"  corrected for {found['comparisons']} comparison(s) "
        f"({'as the pilot claims; or --comparisons' if comparisons is None else 'as given'})",
        f"  spread of {kind} from seed to seed {style.factor * spread['training']:.2f}{of_pictures}",
    ]
    if found["share"] < 1:
        told.append(f"  the score applies to {100 * found['share']:.0f} % of the pictures; below, all are counted")
    console = Console()
    console.print("\n".join(told), highlight=False, soft_wrap=True)
    table = Table("pictures a split", "seeds a row", "careful", caption="careful: the pilot's spread may be too small")
    for line in found["lines"]:
        table.add_row(f"{line['pictures']:,}", *(str(line[k] or "over 200") for k in ("seeds", "careful")))
    console.print(table)
