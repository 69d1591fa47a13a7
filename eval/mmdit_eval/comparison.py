"""Stored results: reading them, writing them, and saying which two may be compared. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdit.config import differences
from mmdit_eval.statistics import Estimate, paired_interval


def check_comparable(a: Mapping[str, Any], b: Mapping[str, Any], varies: Sequence[str] = ()) -> None:
    """Refuse to compare results whose stamps differ.

    Args:
        a, b: results of `evaluate_run`.
        varies: dotted prefixes of inference settings that may differ.

    Raises:
        ValueError: naming each field that differs and both values.
    """
    problems = []
    for part in ("protocol", "inference"):
        for name in differences(a["stamp"][part], b["stamp"][part]):
            if part == "inference" and any(name == v or name.startswith(v + ".") for v in varies):
                continue
            problems.append(f"{part}.{name}: {_at(a['stamp'][part], name)!r} and {_at(b['stamp'][part], name)!r}")
    if problems:
        way = "Judge both by one suite with today's code; fields of inference may differ that varies: or --varies name"
        if a.get("kind") == "images":
            way = "Judge both sets against the same pictures with the same options"
        raise ValueError(
            f"results of {a['run']!r} and {b['run']!r} are not comparable, they differ in {'; '.join(problems)}. {way}"
        )


def compare(a: Mapping[str, Any], b: Mapping[str, Any], varies: Sequence[str] = ()) -> dict[str, dict[str, Estimate]]:
    """Return a - b for every score that is known image by image: {split: {score: difference with interval}}.

    The prompts and the noise are the same, so pictures are paired; in a distance between sets by the influence that
    each picture has on it. The interval speaks about these two trained models; what another training seed would give
    it cannot know.

    Raises:
        ValueError: the stamps differ.
    """
    check_comparable(a, b, varies)
    found: dict[str, dict[str, Estimate]] = {}
    for split in a["splits"]:
        left, right = a["splits"][split]["per_image"], b["splits"][split]["per_image"]
        for name in left:
            if name not in right:
                continue
            _check_paired(f"{split}.{name}", (left[name], right[name]), a, b)
            pairs = [(x, y) for x, y in zip(left[name], right[name], strict=True) if None not in (x, y)]
            if pairs:
                found.setdefault(split, {})[name] = paired_interval(*zip(*pairs, strict=True))
        kind = "fixed" if a.get("kind") == "images" else "paired"
        moved = [side["splits"][split].get("influence", {}) for side in (a, b)]
        for name in moved[0].keys() & moved[1].keys():
            _check_paired(f"{split}.{name}", [side[name] for side in moved], a, b)
            values = [side["splits"][split]["scores"][name]["value"] for side in (a, b)]
            at_this_n = "" if (name, kind) == ("kernel", "fixed") else "at this N, "
            method = f"paired delta, {at_this_n}reference {kind}"
            found.setdefault(split, {})[name] = _difference_of_distances(values, [side[name] for side in moved], method)
    return found


def _check_paired(name: str, sides: Sequence[Sequence[Any]], a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"{name} has {len(sides[0])} pictures in {a['run']!r} and {len(sides[1])} in {b['run']!r}: they cannot be "
            "paired"
        )


def _difference_of_distances(values: Sequence[float], influences: Sequence[Sequence[float]], method: str) -> Estimate:
    """Delta method for a difference of two distances, picture by picture.

    What an influence counts is what is drawn anew: the picture alone where the reference stays as it is (folders), the
    picture with the true one of its prompt in a suite. Kernel distances to first order, with the noise of the second in
    it: too wide where the two runs draw alike, by a factor of 1.4 at most.
    """
    import numpy as np

    from mmdit_eval.set_intervals import influence_interval

    difference = np.subtract(*(np.asarray(influence, dtype=np.float64) for influence in influences))
    estimate = influence_interval(values[0] - values[1], difference, None, "fixed")
    estimate["method"] = method
    return estimate


def _at(tree: Any, dotted: str) -> Any:
    """Value at a path of `differences`; keys may contain dots themselves."""
    if not dotted:
        return tree
    for key in tree if isinstance(tree, Mapping) else ():
        if dotted == key or dotted.startswith(key + "."):
            return _at(tree[key], dotted[len(key) + 1 :])
    return None


def read_result(path: str | Path) -> dict[str, Any] | None:
    """Read a stored result; None where there is none or it is not whole."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and "splits" in result else None


def find_result(path: str | Path) -> dict[str, Any]:
    """Read a result that must be there: a JSON file, or that of a run folder's last judged checkpoint.

    Where several suites have judged that checkpoint, the last one that did: `print_comparison` says which.

    Raises:
        FileNotFoundError: no such file, or a run that was not judged yet. ValueError: not a result.
    """
    path = Path(path)
    if path.is_dir():
        judged = []
        for file in (path / "eval").glob("*.json"):
            result = read_result(file)
            if result is not None and "suite" in result:  # a sweep's table has none
                judged.append((result["images_seen"], file.stat().st_mtime, file))
        if not judged:
            raise FileNotFoundError(f"no result in {path / 'eval'}; make one: python scripts/evaluate.py {path}")
        path = max(judged)[2]
    if not path.is_file():
        raise FileNotFoundError(f"no result {path}; give the .json of scripts/evaluate.py, or a run folder")
    result = read_result(path)
    if result is None or not {"stamp", "run"} <= result.keys():
        raise ValueError(f"{path} is no result of scripts/evaluate.py: it has no splits, stamp and run")
    return result


def check_place(path: Path, what: str = "--out") -> None:
    """Refuse a place where no file can be written, before anything is computed for it.

    Raises:
        ValueError: it is a folder, lies below a file, or its folder may not be written to.
    """
    if path.is_dir():
        raise ValueError(f"{what} {path} is a folder; give the file's name in it")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ValueError(f"{what} {path} cannot be written: {parent} is a file, not a folder")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{what} {path} cannot be written: no permission to write in {parent}")


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write JSON beside its place and rename, so that a result is whole or absent; NaN is refused."""
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
