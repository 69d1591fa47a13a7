"""F12: every field of every config misspelt by one edit, given a wrong type, a number out of range, a YAML trap."""

from __future__ import annotations

import random
import resource
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from benchmarks.faults import Outcome
from mmdit.config import ConfigError, RunConfig, StudyConfig, SuiteConfig, load_config, to_tree, validate
from mmdit.config.parts import Config

ROOT = Path(__file__).resolve().parents[2]
Load = Callable[[Mapping[str, Any]], Config]
_VARIANTS: tuple[dict[str, Any], ...] = (
    {
        "model": {"name": "mmdit", "preset": "tiny"},
        "data": {"name": "shapes"},
        "train": {"more_emas": {"long": {"decay": 0.9}}},
    },
    {"model": {"name": "crossdit", "preset": "tiny"}, "data": {"name": "images", "source": "pictures"}},
    {"model": {"name": "unet", "preset": "tiny"}, "data": {"name": "shards", "source": "pictures/*.tar"}},
    {"data": {"name": "emoji"}, "diffusion": {"density": {"name": "mode"}}},
    {
        "diffusion": {"schedule": {"name": "variance_preserving"}, "prediction": "v", "density": {"name": "uniform"}},
    },
    {"diffusion": {"density": {"name": "cosmap"}}},
)
_SUITE = {"sampling": {}}
_STUDY = {"name": "s", "base": "base.yaml", "rows": {"a": {}, "b": {}}, "budget": {"by": "images", "amount": 1000}}


def run_edits(folder: Path, full: bool) -> Outcome:
    """F12."""
    chance = random.Random(12)
    trees = list(_trees())
    names = _try_names(trees, chance, full)
    values = _try_values(trees)
    lines = _try_command_line(folder, full)
    suggested = names["suggested"] / names["tried"]
    passed = not (names["accepted"] or values["wrong"] or lines["wrong"]) and suggested >= 0.95
    slowest = max(names["slowest_seconds"], values["slowest_seconds"], lines["slowest_cpu_seconds"])
    return Outcome(
        passed and slowest < 1,
        f"{names['tried']:,} misspellings of {names['fields']} fields: {names['tried'] - len(names['accepted']):,} "
        f"refused, {100 * suggested:.1f} % with the right key; {values['tried']:,} wrong values: "
        f"{len(values['wrong'])} taken wrongly; at most {slowest:.2f} s (CPU); {lines['tried']} by command line, "
        f"exit code 2 each",
        {"names": names, "values": values, "command_line": lines},
    )


def _trees() -> Iterator[tuple[str, type[Config], dict[str, Any], Load]]:
    """Yield whole configs in which every class of every room stands somewhere."""
    for variant in _VARIANTS:
        yield "run", RunConfig, to_tree(load_config(None, variant)), lambda tree: load_config(None, tree)
    yield "suite", SuiteConfig, to_tree(validate(SuiteConfig, _SUITE, "suite.yaml")), _suite
    yield "study", StudyConfig, to_tree(validate(StudyConfig, _STUDY, "study.yaml")), _study


def _suite(tree: Mapping[str, Any]) -> Config:
    return validate(SuiteConfig, tree, "suite.yaml")


def _study(tree: Mapping[str, Any]) -> Config:
    return validate(StudyConfig, tree, "study.yaml")


def _fields(cls: type[Config], tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[Any]:
    """Yield (class, field name, path) of all that a tree holds, the config classes inside included."""
    for name, field in cls.model_fields.items():
        yield cls, name, (*path, name)
        value = tree.get(name)
        members = [m for m in _flat(field.annotation) if isinstance(m, type) and issubclass(m, Config)]
        if not members or not isinstance(value, Mapping):
            continue
        if get_origin(field.annotation) is dict:
            for key in value:
                yield from _fields(members[0], value[key], (*path, name, key))
            continue
        chosen = [
            m for m in members if "name" in m.model_fields and m.model_fields["name"].default == value.get("name")
        ]
        yield from _fields(chosen[0] if chosen else members[0], value, (*path, name))


def _flat(annotation: Any) -> list[Any]:
    """Return the leaves of an annotation: types, and the words of a Literal."""
    if get_origin(annotation) is Literal:
        return ["literal", *get_args(annotation)]
    arguments = get_args(annotation)
    if not arguments:
        return [annotation]
    return [leaf for part in arguments if not _is_constraint(part) for leaf in _flat(part)]


def _is_constraint(part: Any) -> bool:
    return hasattr(part, "discriminator") or type(part).__module__.startswith("annotated_types")


def _edited(tree: Mapping[str, Any], path: tuple[str, ...], change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Copy a tree and change the mapping that holds the last part of a path."""
    copy = dict(tree)
    node = copy
    for part in path[:-1]:
        node[part] = dict(node[part])
        node = node[part]
    change(node)
    return copy


# --- names ------------------------------------------------------------------------------------------------------


def misspellings(word: str, chance: random.Random) -> list[str]:
    """Return every deletion and swap of neighbours, and a random insertion and substitution at each place."""
    letters = string.ascii_lowercase
    found = [word[:i] + word[i + 1 :] for i in range(len(word))]
    found += [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)]
    found += [word[:i] + chance.choice(letters) + word[i:] for i in range(len(word) + 1)]
    found += [word[:i] + chance.choice(letters) + word[i + 1 :] for i in range(len(word))]
    return [wrong for wrong in dict.fromkeys(found) if wrong and wrong != word]


def _try_names(trees: list[Any], chance: random.Random, full: bool) -> dict[str, Any]:
    seen: set[tuple[str, str]] = set()
    tried = suggested = 0
    slowest, accepted, elsewhere = 0.0, [], []
    for _, root, tree, load in trees:
        for cls, name, path in _fields(root, tree):
            if (cls.__name__, name) in seen:
                continue
            seen.add((cls.__name__, name))
            wrongs = [w for w in misspellings(name, chance) if w not in cls.model_fields]
            for wrong in wrongs if full else chance.sample(wrongs, min(2, len(wrongs))):
                began = time.process_time()
                message = _refusal(load, _edited(tree, path, partial(_rename, name=name, wrong=wrong)))
                slowest = max(slowest, time.process_time() - began)
                tried += 1
                if message is None:
                    accepted.append(".".join((*path[:-1], wrong)))
                    continue
                place, right = ".".join((*path[:-1], wrong)), ".".join(path)
                line = next((line for line in message.splitlines() if f" {place}: unknown field" in line), "")
                good = f"did you mean {right!r}?" in line
                suggested += good
                if not good and len(elsewhere) < 40:
                    elsewhere.append(f"{place}: {line.partition('unknown field')[2][:60]}")
    return {
        "fields": len(seen), "tried": tried, "suggested": suggested, "accepted": accepted,
        "slowest_seconds": round(slowest, 3), "without_the_right_key": elsewhere,
    }  # fmt: skip


def _rename(node: dict[str, Any], name: str, wrong: str) -> None:
    node[wrong] = node.pop(name, 1)


def _set(node: dict[str, Any], name: str, value: Any) -> None:
    node[name] = value


def _refusal(load: Load, tree: Mapping[str, Any]) -> str | None:
    """Return the message of the ConfigError, None where the tree is taken."""
    try:
        load(tree)
    except ConfigError as error:
        return str(error)
    return None


# --- values -----------------------------------------------------------------------------------------------------

# as they are written in YAML or behind an override; what each may be taken for, by the kind of the field
_TRAPS: dict[str, dict[str, Any]] = {
    "2e-4": {"float": 2e-4, "str": "2e-4"},  # YAML 1.1 reads it as a word
    "no": {"bool": False},
    "yes": {"bool": True},
    "off": {"bool": False},
    "fast": {"str": "fast"},
    "''": {"str": ""},
    "'3'": {"int": 3, "float": 3.0, "str": "3"},
    "1.5": {"float": 1.5},
    "-1": {"int": -1, "float": -1.0},
    "1e6": {"float": 1e6, "str": "1e6"},
    ".nan": {},
    ".inf": {},
    "-.inf": {},
    "null": {"none": None},
    "[1, [2]]": {},
    "{a: 1}": {"pairs": (("a", 1),)},
    "2024-01-01": {},
    "99999999999999999999999": {"int": 10**23 - 1, "float": 1e23},
}


def _kinds(field: Any) -> set[str]:
    leaves = _flat(field.annotation)
    named = {float: "float", int: "int", bool: "bool", str: "str", Path: "str", type(None): "none", Any: "any"}
    kinds = {named.get(leaf, "") for leaf in leaves if not isinstance(leaf, (str, int))}
    if any(hasattr(part, "func") for part in (*field.metadata, *_metadata(field.annotation))):
        kinds.add("pairs")  # text_streams: {name: width} becomes pairs
    return kinds - {""}


def _metadata(annotation: Any) -> Iterator[Any]:
    """Yield what stands beside the types of an annotation, at any depth."""
    yield from getattr(annotation, "__metadata__", ())
    for part in get_args(annotation):
        yield from _metadata(part)


def _try_values(trees: list[Any]) -> dict[str, Any]:
    seen: set[tuple[str, str]] = set()
    tried = coerced = 0
    slowest, wrong = 0.0, []
    for _, root, tree, load in trees:
        for cls, name, path in _fields(root, tree):
            field = cls.model_fields[name]
            kinds = _kinds(field)
            if (cls.__name__, name) in seen or "any" in kinds:  # rows and overrides hold what another config checks
                continue
            seen.add((cls.__name__, name))
            for text, meanings in {**_TRAPS, **_out_of_range(field)}.items():
                began = time.process_time()
                value = yaml.safe_load(text)
                taken = _taken(load, _edited(tree, path, partial(_set, name=name, value=value)), path)
                slowest = max(slowest, time.process_time() - began)
                tried += 1
                if isinstance(taken, str):
                    if path[0] not in taken:
                        wrong.append(f"{'.'.join(path)}: {text}: the message does not name it: {taken[:120]}")
                    continue
                coerced += 1
                allowed = [meaning for kind, meaning in meanings.items() if kind in kinds]
                if not any(type(taken[0]) is type(a) and taken[0] == a for a in allowed) and not _is_path(
                    taken[0], text
                ):
                    wrong.append(f"{'.'.join(path)}: {text} was taken for {taken[0]!r}")
    return {"fields": len(seen), "tried": tried, "coerced_as_listed": coerced - len(wrong), "wrong": wrong,
            "slowest_seconds": round(slowest, 3)}  # fmt: skip


def _is_path(value: Any, text: str) -> bool:
    return isinstance(value, Path) and str(value) == str(Path(str(yaml.safe_load(text))))


def _out_of_range(field: Any) -> dict[str, dict[str, Any]]:
    """Return numbers just outside of each bound that a field states."""
    bounds = [*field.metadata, *_metadata(field.annotation)]
    outside: dict[str, dict[str, Any]] = {}
    for bound in bounds:
        for side, number in ((side, getattr(bound, side, None)) for side in ("gt", "ge", "lt", "le")):
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                step = {"gt": 0.0, "lt": 0.0, "ge": -1e-9, "le": 1e-9}[side]
                outside[repr(float(number + step))] = {}
                if float(number).is_integer():
                    outside[str(int(number) + {"gt": 0, "lt": 0, "ge": -1, "le": 1}[side])] = {}
    return outside


def _taken(load: Load, tree: Mapping[str, Any], path: tuple[str, ...]) -> tuple[Any] | str:
    """Return what a field became, boxed; or the message of the refusal."""
    try:
        node: Any = load(tree)
    except ConfigError as error:
        return str(error)
    for part in path:
        node = node[part] if isinstance(node, Mapping) else getattr(node, part)
    return (node,)


# --- the command line -------------------------------------------------------------------------------------------


def _try_command_line(folder: Path, full: bool) -> dict[str, Any]:
    """Run the scripts with a wrong word: exit code 2, the right word on stderr, no traceback."""
    bad = folder / "bad.yaml"
    bad.write_text("train: {lrr: 2e-4}\n", encoding="utf-8")
    config, suite = "configs/train/quickstart.yaml", "configs/eval/quickstart.yaml"
    cases = [
        ((f"train.py {config} --train.lrr 2e-4"), "'train.lr'"),
        (f"train.py {bad} --dry-run", "'train.lr'"),
        (f"train.py {config} --train.compile fast", "train.compile"),
        (f"train.py {config} --train.lr no", "train.lr"),
        (f"train.py {config} --sampling.sampler eular --dry-run", "'euler'"),
        (f"train.py {config} --train.batch_size", "has no value"),
        (f"cache.py {config} --data.num_imags 5", "'data.num_images'"),
        (f"evaluate.py {folder} --suite {suite} --num_imags 5", "'num_images'"),
        ("ablate.py configs/studies/quickstart.yaml --sedes [0]", "'seeds'"),
        (f"train.py {folder}/nowhere.yaml", "no config file"),
    ]
    wrong, slowest = [], 0.0
    for words, expected in cases if full else cases[:1]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        script, *rest = words.split(" ")
        done = subprocess.run(
            [sys.executable, f"scripts/{script}", *rest], cwd=ROOT, capture_output=True, text=True, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        slowest = max(slowest, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if done.returncode != 2 or expected not in done.stderr or "Traceback" in done.stderr:
            wrong.append({"words": words, "exit code": done.returncode, "stderr": done.stderr[-300:]})
    return {"tried": len(cases) if full else 1, "wrong": wrong, "slowest_cpu_seconds": round(slowest, 2)}


RUNS = {"F12": run_edits}
