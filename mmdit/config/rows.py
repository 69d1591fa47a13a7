"""From a study to its cells: the product of its axes, one resolved config a row and seed, and what rows may share."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmdit.config.errors import ConfigError
from mmdit.config.reading import differences, merge, read_tree, resolve, to_tree
from mmdit.config.run import RunConfig
from mmdit.config.study import StudyConfig, check_row_name
from mmdit.registry import unknown

Cells = dict[str, dict[int, RunConfig]]


def row_configs(study: StudyConfig, source: str = "study") -> Cells:
    """Resolve every (row, seed) of a study and refuse rows that change more than the study may vary.

    Args:
        source: the study's file, for what is said of a mistake in it.

    Returns:
        {row: {seed: config}}.

    Raises:
        ConfigError: a row does not validate, stands there twice, drops what the study overrides for every row, is the
            same as another, or differs from the reference row in a field outside `varies`; the base does not validate.
    """
    own = read_tree(study.base)
    base = merge(own, study.overrides)
    cells: Cells = {}
    for row, changes in all_rows(study).items():
        _check_overrides(study, base, row, changes)
        tree = merge(merge(base, changes), _budget(study, row, changes))
        for seed in study.seeds:
            cell = merge(tree, {"seed": seed, "name": f"{row}-s{seed}"})
            try:
                cells.setdefault(row, {})[seed] = resolve(cell, source=f"{source}, row {row!r}")
            except ConfigError:
                resolve(own, source=str(study.base))  # where the base is wrong by itself, this says so
                raise
    _check_named_rows(study, cells)
    _check_twins(cells)
    for other, fields in confounded_rows(study, cells).items():
        if not study.allow_confounded:
            raise ConfigError(
                f"row {other!r} differs from row {reference_row(study, cells)!r} in {fields[0]}, which is outside the "
                f"study's varies: {list(study.varies)}. A difference in results could then not be laid to the "
                f"conditioning. Name it in varies: (which then stands for the whole list), or set allow_confounded: "
                f"true, which marks the row in the report"
            )
    if study.suite.sampling is not None and len(trainings(cells)) > len(set(trainings(cells).values())):
        raise ConfigError(
            "rows differ in sampling only, and suite.sampling would judge them all alike; leave suite.sampling out"
        )
    return cells


def _check_named_rows(study: StudyConfig, cells: Cells) -> None:
    """Refuse a reference that is no row."""
    reference, against = study.match.reference if study.match else None, study.claims.against
    for field, named in (("match.reference", reference), ("claims.against", None if against == "all" else against)):
        if named is not None and named not in cells:
            raise ConfigError(f"{field}: {unknown('row', named, cells)}")


def _check_twins(cells: Cells) -> None:
    """Refuse two rows that are one and the same run under two names."""
    seen: dict[str, str] = {}
    for row, configs in cells.items():
        tree = to_tree(next(iter(configs.values())))
        twin = seen.setdefault(json.dumps({**tree, "name": None}), row)
        if twin != row:
            raise ConfigError(
                f"rows {twin!r} and {row!r} are one and the same config once defaults are filled in; take one of them "
                f"out, or write what tells them apart"
            )


def _check_overrides(study: StudyConfig, base: Mapping[str, Any], row: str, changes: Mapping[str, Any]) -> None:
    """Refuse a row of another backbone that would lose fields which `overrides` gives to every row."""
    ours, theirs, own = base.get("model"), study.overrides.get("model"), changes.get("model")
    if not (isinstance(ours, Mapping) and isinstance(theirs, Mapping) and isinstance(own, Mapping)):
        return
    if "name" in theirs:
        return  # overrides.model is then meant for that backbone
    kept = merge(ours, own)
    lost = [f"model.{field}" for field in theirs if field not in kept]
    if lost:
        raise ConfigError(
            f"row {row!r} changes model.name, which drops {', '.join(lost)} of the study's overrides; write them in "
            f"the rows that should have them"
        )


def all_rows(study: StudyConfig) -> dict[str, dict[str, Any]]:
    """Return the overrides of every row: the product of the axes first, then the listed ones.

    Raises:
        ConfigError: a name twice, or one that cannot be a folder's.
    """
    rows: dict[str, dict[str, Any]] = {}
    axes = [_axis(axis, values, study.factorial) for axis, values in study.factorial.items()]
    for choice in itertools.product(*axes) if axes else ():
        name, tree = "+".join(part for part, _ in choice), dict[str, Any]()
        for _, over in choice:
            tree = merge(tree, over)
        _add(rows, name, tree)
    for name, changes in study.rows.items():
        _add(rows, name, changes)
    return rows


def _add(rows: dict[str, dict[str, Any]], name: str, changes: dict[str, Any]) -> None:
    if name in rows:
        raise ConfigError(f"the row {name!r} stands twice; rename one, or take it out of rows: or factorial:")
    try:
        check_row_name(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    rows[name] = changes


def _axis(axis: str, values: Sequence[Any] | Mapping[str, Any], axes: Mapping[str, Any]) -> list[tuple[str, dict]]:
    """Return (part of the row's name, overrides) for each value of an axis."""
    if isinstance(values, Mapping):
        for name, over in values.items():
            if over is not None and not isinstance(over, Mapping):
                raise ConfigError(f"factorial.{axis}.{name}: expected overrides of config fields, got {over!r}")
        return [(str(name), dict(over or {})) for name, over in values.items()]
    others = {str(v) for other, found in axes.items() if other != axis for v in found}
    plain = all(isinstance(v, str) and v not in others for v in values)
    leaf, parts = axis.split(".")[-1], []
    for value in values:
        tree: Any = value
        for key in reversed(axis.split(".")):
            tree = {key: tree}
        parts.append((value if plain else f"{leaf}={_word(value)}", tree))
    return parts


def _word(value: Any) -> str:
    """A value as part of a folder's name."""
    if value is None or value == []:
        return "none"
    if isinstance(value, list | tuple):
        return "-".join(_word(item) for item in value)
    return re.sub(r"[^\w.-]+", "-", json.dumps(value) if not isinstance(value, str) else value).strip("-")


def _budget(study: StudyConfig, row: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides that give a row the study's budget; one in FLOPs is solved later, where parameters are counted."""
    if study.budget is None:
        return {}
    own = changes.get("train") or {}
    if isinstance(own, Mapping) and ("images" in own or "seconds" in own):
        raise ConfigError(f"row {row!r} sets a budget of its own (train.images or train.seconds) beside budget:")
    if study.budget.by == "images":
        return {"train": {"images": int(study.budget.amount)}}
    if study.budget.by == "seconds":
        return {"train": {"seconds": study.budget.amount, "images": NO_LIMIT}}
    return {}


NO_LIMIT = 10**9  # images of a run whose budget is seconds


def reference_row(study: StudyConfig, cells: Mapping[str, Any]) -> str:
    """Return the row that others are compared with and matched to."""
    named = (study.match.reference if study.match else None) or study.claims.against
    return named if named in cells else next(iter(cells))  # type: ignore[return-value]


def confounded_rows(study: StudyConfig, cells: Cells) -> dict[str, list[str]]:
    """Return {row: fields outside `varies` in which it differs from the reference row}."""
    seed, reference = study.seeds[0], reference_row(study, cells)
    allowed = [*study.varies, *(["sampling.num_steps"] if study.equal_flops else [])]
    found: dict[str, list[str]] = {}
    for row in cells:
        ours, theirs = to_tree(cells[row][seed]), to_tree(cells[reference][seed])
        other = ours["model"]["name"] != theirs["model"]["name"] and "model.name" in allowed
        free = [*allowed, "model"] if other else allowed
        for field in differences(theirs, ours):
            if field != "name" and not any(field == v or field.startswith(v + ".") for v in free):
                found.setdefault(row, []).append(field)
    return found


def trainings(cells: Cells) -> dict[str, str]:
    """Return {row: the row whose trained networks it uses}: itself, or the first that differs in sampling only."""
    found: dict[str, str] = {}
    seen: dict[str, str] = {}
    for row, configs in cells.items():
        tree = to_tree(next(iter(configs.values())))
        key = json.dumps({field: value for field, value in tree.items() if field not in ("name", "sampling")})
        found[row] = seen.setdefault(key, row)
    return found
