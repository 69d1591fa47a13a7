"""Every problem of a config as one line: source, dotted path, what was got, the nearest valid name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from mmdit.config.parts import Config
from mmdit.registry import nearest, unknown

_LISTED = 50  # problems that an error tells


class ConfigError(ValueError):
    """A config that cannot be used; the message says where, what was got and what was expected."""


def validate(cls: type[Any], tree: Mapping[str, Any], source: str) -> Any:
    """Validate a tree; every problem is one line: source, dotted path, what was got, what is valid."""
    try:
        return cls.model_validate(dict(tree))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        lines = dict.fromkeys(f"{source}: {_describe(cls, dict(tree), problem)}" for problem in problems[:_LISTED])
        more = len(problems) - _LISTED
        rest = [f"{source}: and {more:,} more problems"] if more > 0 else []
        raise ConfigError("\n".join([*lines, *rest])) from None


def _describe(cls: type[Config], tree: Any, problem: Mapping[str, Any]) -> str:
    location, kind = list(problem["loc"]), problem["type"]
    # pydantic puts the tag of a union into the location: leave out what is no key of the tree
    keys: list[Any] = []
    node = tree
    for part in location:
        if isinstance(node, Mapping) and part not in node and part in ("mmdit", "crossdit", "unet", *_VARIANTS):
            continue
        keys.append(part)
        node = node.get(part) if isinstance(node, Mapping) else None
    path = ".".join(f"{k!s:.200}" for k in keys) or "(whole config)"
    if kind == "extra_forbidden":
        here, variants = _classes_at(cls, tree, keys[:-1])
        fields = list(here.model_fields) if here is not None else []
        owners = [v.model_fields["name"].default for v in variants if v is not here and keys[-1] in v.model_fields]
        if here is not None and owners:
            parent = ".".join(map(str, keys[:-1]))
            return (
                f"{path}: unknown field of {here.model_fields['name'].default}: it is one of {' and '.join(owners)}. "
                f"Remove it, or set {parent}.name: {' or '.join(owners)}. Valid here: {', '.join(fields)}"
            )
        guess = nearest(str(keys[-1]), fields)
        everywhere = sorted(_all_paths(cls))
        if guess is None:
            guess = next((p for p in everywhere if p.split(".")[-1] == str(keys[-1]) and p != path), None)
        hint = (
            f"; did you mean {'.'.join([*map(str, keys[:-1]), guess]) if guess in fields else guess!r}?"
            if guess
            else "."
        )
        return f"{path}: unknown field{hint} Valid here: {', '.join(fields)}"
    if kind in ("literal_error", "union_tag_invalid"):
        expected = problem["ctx"].get("expected") or problem["ctx"].get("expected_tags", "")
        names = [name.strip(" '") for name in str(expected).replace(" or ", ",").split(",")]
        given = problem["input"].get("name") if isinstance(problem["input"], Mapping) else problem["input"]
        return f"{path}: {unknown('value', str(given), names)}"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{path}: {message}"
    if kind == "switch":
        return f"{'.'.join(map(str, keys))}{'.' if keys else ''}{message}"
    return f"{path}: {message}, got {problem['input']!r:.200}"


_VARIANTS = (
    "rectified_flow",
    "variance_preserving",
    "uniform",
    "logit_normal",
    "mode",
    "cosmap",
    "shapes",
    "emoji",
    "images",
    "shards",
)


def _members(annotation: Any) -> list[type[Config]]:
    """The config classes inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [member for arg in get_args(annotation) for member in _members(arg)] if get_origin(annotation) else []


def _classes_at(
    cls: type[Config], tree: Any, keys: Iterable[Any]
) -> tuple[type[Config] | None, Sequence[type[Config]]]:
    """The class that stands at a path of the tree, and all the variants that could stand there; None where none can."""
    here, variants, node = cls, [cls], tree
    queue = list(keys)
    while queue:
        key = queue.pop(0)
        field = here.model_fields.get(str(key))
        variants = _members(field.annotation) if field is not None else []
        if field is None or not variants:
            return None, []
        node = node.get(key, {}) if isinstance(node, Mapping) else {}
        if get_origin(field.annotation) is dict:  # the next key is a name that the user has chosen
            named_by_user = queue.pop(0) if queue else None
            node = node.get(named_by_user, {}) if isinstance(node, Mapping) else {}
        name = node.get("name") if isinstance(node, Mapping) else None
        named = [m for m in variants if "name" in m.model_fields and m.model_fields["name"].default == name]
        here = named[0] if named else variants[0]
    return here, variants


def _all_paths(cls: type[Config], prefix: str = "") -> list[str]:
    paths = []
    for name, field in cls.model_fields.items():
        paths.append(prefix + name)
        for member in _members(field.annotation):
            paths += _all_paths(member, f"{prefix}{name}.")
    return paths


def check_path(cls: type[Config], path: str) -> None:
    """Refuse a dotted path at which no config of a class has a field or a section.

    Raises:
        ValueError: with the nearest path.
    """
    if not _stands_in(cls, path.split(".")):
        everywhere = sorted(set(_all_paths(cls)))
        leaf = path.split(".")[-1]
        guess = nearest(path, everywhere) or next((p for p in everywhere if p.split(".")[-1] == leaf), None)
        hint = f"; did you mean {guess!r}?" if guess else f". Sections: {', '.join(cls.model_fields)}"
        raise ValueError(f"{path!r:.200} is no field of a run{hint}")


def _stands_in(cls: type[Config], keys: Sequence[str]) -> bool:
    field = cls.model_fields.get(keys[0])
    if field is None:
        return False
    below = keys[2:] if get_origin(field.annotation) is dict else keys[1:]  # after a name that the user has chosen
    return not below or any(_stands_in(member, below) for member in _members(field.annotation))
