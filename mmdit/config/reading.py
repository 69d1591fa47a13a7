"""From YAML and dotted overrides to one validated object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mmdit.config.backbones import CrossDiTConfig, MMDiTConfig, ModelConfig, UNetConfig
from mmdit.config.errors import ConfigError, validate
from mmdit.config.parts import Config
from mmdit.config.run import RunConfig, SuiteConfig
from mmdit.config.study import StudyConfig
from mmdit.presets import ENCODER_WIDTHS, PRESETS, STREAM_WIDTHS, VAE_WIDTHS, pooled_width, used_streams
from mmdit.registry import nearest, unknown
from mmdit.untrusted import read_text

MOST_BYTES = 1 << 18  # of a file: the longest that is shipped has 5 KB; YAML is read at 0.2 MB a second
MOST_NODES = 50_000  # values with all aliases written out


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, not the last one silently."""

    file = ""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            line = key_node.start_mark.line + 1
            raise ConfigError(f"{loader.file}, line {line}: the key {key!r} stands twice; rename or remove one")
        seen.add(key)
    # YAML reads the bare key `null` (encoders.null) as None
    mapping = yaml.SafeLoader.construct_mapping(loader, node, deep=deep)
    return {"null" if key is None else key: value for key, value in mapping.items()}


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML file as a tree.

    Raises:
        FileNotFoundError: no such file; the message names the nearest one beside it.
        ConfigError: not YAML, or not a mapping, or a key twice.
    """
    path = Path(path)
    if not path.is_file():
        beside = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        guess = nearest(str(path), beside)
        hint = f"; did you mean {guess}?" if guess else "; see configs/ for the ones that are shipped"
        raise FileNotFoundError(f"no config file {path}{hint}")
    try:
        text = read_text(path, MOST_BYTES)
    except ValueError as error:
        raise ConfigError(f"{error}; is it a config?") from None
    tree = _parse(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}, expected a mapping of config fields")
    return tree


def _parse(text: str, source: str) -> Any:
    """Parse YAML without tags of a language; whatever is wrong with it is a ConfigError that names the source."""
    try:
        loader = _UniqueKeyLoader(text)
        loader.file = source
        tree = loader.get_single_data()
        _count(tree, source, {})
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(f"{source} is not valid YAML: it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # a day that is none, a list for a key
        raise ConfigError(f"{source} is not valid YAML: {error!s:.1000}") from error
    return tree


def _count(node: Any, source: str, known: dict[int, int]) -> int:
    """Count the values below a node with all aliases written out: a few lines of them can mean billions.

    Raises:
        ConfigError: too many, a node that holds itself, or a number that no field takes.
    """
    if isinstance(node, int) and abs(node) >= 2**63:  # 1:59:59 and so on is a number in YAML: of any length
        raise ConfigError(f"{source} holds a whole number of more than 64 bits")
    if not isinstance(node, dict | list | tuple):
        return 1
    if id(node) not in known:
        known[id(node)] = MOST_NODES  # while it is being counted: what holds itself has no end
        parts = node.values() if isinstance(node, dict) else node
        known[id(node)] = 1 + sum(_count(part, source, known) for part in parts)
    if known[id(node)] > MOST_NODES:
        raise ConfigError(f"{source} has more than {MOST_NODES:,} values with its aliases written out")
    return known[id(node)]


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Turn `--train.lr 2e-4`, `--train.lr=2e-4` or `train.lr=2e-4` into a tree.

    Raises:
        ConfigError: an argument has no value or is no override.
    """
    tree: dict[str, Any] = {}
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        if not equals:
            if not argument.startswith("--") or not queue or (queue[0].startswith("--") and len(queue[0]) > 2):
                raise ConfigError(f"override {argument!r} has no value; write --train.lr 2e-4 or train.lr=2e-4")
            value = queue.pop(0)
        parsed = _parse(value, f"override {key}: {value!r:.80}")
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {key}: {parent!r} is given both a value and fields")
        node[leaf] = parsed
    return tree


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `over` on `base`, deeply; a changed `name` (or `preset`) drops the old variant's (or preset's) fields.

    A preset that the new variant has too stays: `--model.name unet` on the tiny MMDiT is the tiny U-Net.
    """
    if "name" in over and "name" in base and over["name"] != base["name"] and not _is_run(base):
        shared = {"preset": base["preset"]} if str(base.get("preset")) in PRESETS.get(str(over["name"]), {}) else {}
        return {**shared, **over}
    result = dict(base)
    if "preset" in over and over["preset"] != base.get("preset"):
        stale = PRESETS.get(str(over.get("name", base.get("name"))), {}).get(str(base.get("preset")), {})
        result = {key: value for key, value in result.items() if key not in stale}
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merge(result[key], value)
        else:
            result[key] = value
    return result


def _is_run(tree: Mapping[str, Any]) -> bool:
    """The `name` of a run, suite or study is a label, not the choice of a variant."""
    own = ("model", "train", "data", "diffusion", "rows", "factorial", "metrics", "encoders")
    return any(key in tree for key in own)


def read_tree(path: str | Path) -> dict[str, Any]:
    """Read a YAML file with its `base:` (one level, relative to the file) underneath."""
    path = Path(path)
    tree = read_yaml(path)
    if "base" not in tree or "rows" in tree or "factorial" in tree:
        return tree
    base = tree.pop("base")
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected the path of a config, got {base!r:.80}")
    parent = path.parent / base
    below = read_yaml(parent)
    if "base" in below:
        raise ConfigError(f"{parent}: a base may not have a base of its own; {path} builds on it")
    return merge(below, tree)


DEFAULT_MODEL = {"name": "mmdit", "preset": "tiny"}


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    hardware: str | Path | None = None,
) -> RunConfig:
    """Read a run's YAML, lay hardware and overrides on it, fill presets and widths, validate.

    Args:
        path: YAML file, or None for the defaults.
        overrides: command-line words (`["--train.lr", "2e-4"]`) or a tree.
        hardware: YAML file of `configs/hardware/`: what a machine changes about a run, and nothing that it learns.

    Raises:
        ConfigError: unknown field, wrong type, impossible combination; with file, dotted path and nearest name.
        FileNotFoundError: no such file.
    """
    tree = read_tree(path) if path is not None else {}
    if hardware is not None:
        tree = merge(tree, _read_hardware(hardware))
    extra = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    # with the default variants named, an override's other variant drops their fields
    return resolve(merge(_default_names({"model": DEFAULT_MODEL, **tree}), extra), source=str(path or "defaults"))


HARDWARE_FIELDS = (
    "num_processes", "sharding", "shard_size", "accumulation", "compile", "activation_checkpointing", "timeout",
    "peak_tflops",
)  # fmt: skip


def _read_hardware(path: str | Path) -> dict[str, Any]:
    """Read a hardware file; it may set the fields of `train` that leave a run's numbers alone (but for rounding)."""
    tree = read_yaml(path)
    inner = tree.get("train")
    named = [f"train.{name}" for name in inner] if isinstance(inner, Mapping) else []
    foreign = [name for name in tree if name != "train"]
    foreign += [name for name in named if name.removeprefix("train.") not in HARDWARE_FIELDS]
    if foreign:
        raise ConfigError(
            f"{path}: a hardware file sets {', '.join(f'train.{name}' for name in HARDWARE_FIELDS)} only, got "
            f"{', '.join(foreign)}; put those into the run's own config"
        )
    return tree


def resolve(tree: Mapping[str, Any], source: str = "config") -> RunConfig:
    """Expand the preset, fill in the widths of the encoders, validate."""
    tree = _default_names(tree)
    if isinstance(tree.get("model"), Mapping):
        model = _expand_preset(dict(tree["model"]), source)
        given = tree.get("encoders")
        encoders: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
        text = ENCODER_WIDTHS.get(str(encoders.get("text", "tiny")))
        vae = VAE_WIDTHS.get(str(encoders.get("vae", "tiny")))
        if text is not None:
            model.setdefault("context_dim", text["context_dim"])
            model.setdefault("pooled_dim", pooled_width(text, str(encoders.get("pooled", "clip"))))
            per_stream = ("injection", "decoupled"), ("text_projection", "per_encoder"), ("weight_sets", 3)
            if model.get("text_streams") is None and any(model.get(field) == value for field, value in per_stream):
                streams, use = STREAM_WIDTHS[str(encoders.get("text", "tiny"))], encoders.get("use")
                named = use if isinstance(use, list | tuple) else None
                model["text_streams"] = used_streams(streams, named, str(encoders.get("absent")))
        elif encoders.get("pooled") == "none":
            model.setdefault("pooled_dim", None)
        if vae is not None:
            model.setdefault("in_channels", vae["channels"])
            model.setdefault("out_channels", vae["channels"])
        tree["model"] = model
    else:
        tree["model"] = tree.get("model", DEFAULT_MODEL)
        if isinstance(tree["model"], Mapping):
            return resolve(tree, source)
    return validate(RunConfig, tree, source)


def _default_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Where a variant's fields are given without its name, the default variant is meant."""
    tree = dict(tree)
    if isinstance(tree.get("data"), Mapping):
        tree["data"] = {"name": "shapes", **tree["data"]}
    if isinstance(tree.get("diffusion"), Mapping):
        diffusion = dict(tree["diffusion"])
        for field, name in (("schedule", "rectified_flow"), ("density", "logit_normal")):
            if isinstance(diffusion.get(field), Mapping):
                diffusion[field] = {"name": name, **diffusion[field]}
        tree["diffusion"] = diffusion
    return tree


def model_config(name: str, preset: str | None = None, **fields: Any) -> MMDiTConfig | CrossDiTConfig | UNetConfig:
    """Build one backbone's config in Python: `model_config("mmdit", "S", qk_norm="rms")`."""
    tree: dict[str, Any] = {"name": name, **({"preset": preset} if preset else {}), **fields}
    holder = validate(_ModelHolder, {"model": _expand_preset(tree, "model_config")}, "model_config")
    return holder.model


class _ModelHolder(Config):
    model: ModelConfig


def _expand_preset(model: dict[str, Any], source: str) -> dict[str, Any]:
    name = model.setdefault("name", "mmdit")
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"{source}: model.name: {unknown('backbone', str(name), PRESETS)}")
    preset = model.get("preset")
    if preset is None:
        return model
    if not isinstance(preset, str) or preset not in PRESETS[name]:
        raise ConfigError(f"{source}: model.preset: {unknown(f'preset of {name}', str(preset), PRESETS[name])}")
    return {**PRESETS[name][preset], **model}


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study's YAML; `base` becomes relative to the working folder."""
    path = Path(path)
    tree = merge(read_yaml(path), parse_overrides(overrides))
    if isinstance(tree.get("base"), str):
        tree["base"] = path.parent / tree["base"]
    for name in tree:
        if name in RunConfig.model_fields and name not in (*StudyConfig.model_fields, "seed"):
            raise ConfigError(
                f"{path}: {name} belongs to a run, a study has it under rows (for one row) or overrides (for all): "
                f"overrides: {{{name}: ...}}"
            )
    return validate(StudyConfig, tree, str(path))


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> SuiteConfig:
    """Read an evaluation suite's YAML."""
    return validate(SuiteConfig, merge(read_tree(path), parse_overrides(overrides)), str(path))


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted paths at which two trees differ."""
    found = []
    for key in [*a, *(k for k in b if k not in a)]:
        path = f"{prefix}{key}"
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differences(left, right, f"{path}.")
        elif left != right:
            found.append(path)
    return found


def to_tree(config: Config) -> dict[str, Any]:
    """Return a config as plain YAML types; `resolve(to_tree(c)) == c`."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML text."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, width=120)
