"""Denoisers from files and to files: released ones, diffusers folders, our own runs and checkpoints.

    denoiser = load_denoiser("sd3_medium_incl_clips.safetensors", dtype=torch.bfloat16)
    save_denoiser(denoiser, "sd3-medium", layout="diffusers")

The architecture comes from the shapes in the file, the network is built without memory on the `meta` device, and each
tensor is read straight into its place: loading takes the memory of the weights in their target dtype and of one tensor
more. The position table is loaded like any weight and never recomputed: releases made it in other ways than we do.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmdit.checkpoint import MANIFEST, find_checkpoint, load_checkpoint
from mmdit.config import UNetConfig, model_config
from mmdit.models import BACKBONES
from mmdit.registry import lookup
from mmdit.weights import sd3, unet_keys
from mmdit.weights.detect import Part, denoiser_parts, find_denoiser, infer_fields
from mmdit.weights.diffusers_config import check_fits_diffusers, from_diffusers_config, to_diffusers_config
from mmdit.weights.empty import empty_denoiser
from mmdit.weights.files import SUFFIX, WeightFiles, open_weights
from mmdit.weights.fit import Shapes, check_shapes
from mmdit.weights.header import WeightsError, sync
from mmdit.weights.heads import resolve_heads
from mmdit.weights.source import Source
from mmdit.weights.writing import Lazy, write_weights

T = TypeVar("T")
FOLDERS = ("transformer", "unet")  # of a diffusers pipeline
LAYOUTS = {"original": "model.safetensors", "diffusers": "diffusion_pytorch_model.safetensors"}
_BLOCK = re.compile(r"(joint|transformer|input|output|down|up)_blocks\.\d+")
_COMPUTED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # what a network can run in


def load_denoiser(
    path: str | Path,
    prefix: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **overrides: Any,
) -> nn.Module:
    """Load a denoiser, in evaluation mode; offline, from the files alone.

    Args:
        path: a .safetensors file of SD3, SD3.5, SD1.x or SDXL, alone or with VAE and text encoders; a diffusers folder
            (its own, or the pipeline's with `transformer` or `unet` in it), sharded or not; what `save_denoiser`
            wrote; a run folder or one checkpoint of ours (the average is taken; give `model.safetensors` inside the
            checkpoint for the weights themselves).
        prefix: what stands before the denoiser's keys; by default it is found.
        dtype: of all weights; by default the file's own (the one most of its bytes are in; fp8 becomes bfloat16).
        device: where the weights go.
        overrides: config fields that shapes do not tell or tell wrongly: `num_heads=`, `head_dim=`, `norm_groups=`,
            `patch_size=`.

    Returns:
        MMDiT, CrossDiT or UNet with its `config`; parameters are trainable.

    Raises:
        FileNotFoundError: no such file, folder or shard.
        WeightsError: a damaged file, a pickle, no denoiser in it, or tensors that are missing, unexpected or of
            another shape; the first ten are named, with the likely cause. Nothing is left half-loaded.
        ConfigError: an override that is no field, or fields that do not go together.
        CheckpointError: a checkpoint of ours that does not verify.
    """
    sharded = _sharded_checkpoint(Path(path))
    if sharded is not None:
        return _join_shards(sharded, dtype, device, overrides)
    files, part, config = open_denoiser(path, prefix, **overrides)
    denoiser = empty_denoiser(config)
    expected = denoiser.state_dict()
    sources = find_sources(expected, part, config)
    check_fit(files, part, expected, sources, overrides)
    dtype = _choose_dtype(files, part) if dtype is None else dtype
    if dtype not in _COMPUTED:
        raise WeightsError(f"a network cannot run in {dtype}; choose {', '.join(map(str, _COMPUTED))}")
    state = {}
    for key, tensor in expected.items():
        state[key] = torch.empty(tensor.shape, dtype=dtype, device=device or "cpu")
        read_source(files, sources[key], state[key])
    denoiser.load_state_dict(state, strict=True, assign=True)
    return denoiser.eval()


def save_denoiser(
    denoiser: nn.Module,
    path: str | Path,
    layout: str = "original",
    *,
    dtype: torch.dtype | None = None,
    shard_size: int | str | None = None,
    prefix: str = sd3.PREFIX,
) -> list[Path]:
    """Write a denoiser so that others can use it, all or nothing. `load_denoiser` reads back the same bits.

    Args:
        denoiser: one of our backbones.
        path: NAME.safetensors, or a folder, in which the file gets the layout's usual name. A diffusers folder also
            gets the config.json that its `from_pretrained` asks for.
        layout: `original` (the releases' names, ours) or `diffusers`.
        dtype: to store weights in; by default theirs.
        shard_size: largest file, such as "5GB"; by default one file.
        prefix: before the original names; "" for bare ones.

    Returns:
        The files written.

    Raises:
        ValueError: unknown layout, not one of our backbones, or a network that diffusers does not have.
    """
    config: Any = getattr(denoiser, "config", None)
    if getattr(config, "name", None) not in BACKBONES:
        raise ValueError(
            f"save_denoiser takes one of our backbones ({', '.join(BACKBONES)}), got a {type(denoiser).__name__}; "
            f"pass the network itself, without wrappers"
        )
    file = target_file(path, layout)
    state: Mapping[str, Tensor] = denoiser.state_dict()
    if layout == "original":
        state = {prefix + key: tensor for key, tensor in state.items()}
    else:
        check_fits_diffusers(config)
        state = sd3.to_diffusers(state) if config.name == "mmdit" else _unet_to_diffusers(state, config)
    return write_denoiser(state, file, layout, config, folder=file != Path(path), dtype=dtype, shard_size=shard_size)


def target_file(path: str | Path, layout: str) -> Path:
    """Return the file that weights in `layout` go to: `path` itself, or the usual name in the folder `path`.

    Raises:
        ValueError: unknown layout.
    """
    name = lookup(LAYOUTS, layout, "layout")
    path = Path(path)
    return path if path.suffix == SUFFIX and not path.is_dir() else path / name


def write_denoiser(
    state: Mapping[str, Tensor | Lazy],
    file: Path,
    layout: str,
    config: Any,
    *,
    folder: bool,
    dtype: torch.dtype | None,
    shard_size: int | str | None,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write a denoiser's tensors under their final names, our config inside, and diffusers' beside in a folder."""
    metadata = {**(metadata or {}), "config": json.dumps(config.model_dump(mode="json"))}
    written = write_weights(state, file, metadata=metadata, dtype=dtype, shard_size=shard_size)
    if layout == "diffusers" and folder:
        beside = file.with_name("config.json")
        temporary = file.with_name(".tmp-config.json")
        temporary.write_text(json.dumps(to_diffusers_config(config), indent=2) + "\n", encoding="utf-8")
        sync(temporary)
        temporary.replace(beside)
        written.append(beside)
    return written


def open_denoiser(path: str | Path, prefix: str | None = None, **overrides: Any) -> tuple[WeightFiles, Part, Any]:
    """Open a denoiser's files and tell its config, reading headers only; arguments and errors as `load_denoiser`.

    Returns:
        The files, the part of them that is the denoiser, and its MMDiTConfig, CrossDiTConfig or UNetConfig.
    """
    path = Path(path)
    own: dict[str, Any] | None
    if (path / MANIFEST).is_file() or (path / "checkpoints").is_dir():
        checkpoint = find_checkpoint(path)
        own = load_checkpoint(checkpoint, stems=()).config.model.model_dump()
        files = open_weights(checkpoint / f"ema{SUFFIX}")
    elif path.suffix == SUFFIX and (path.parent / MANIFEST).is_file():
        own = load_checkpoint(path.parent, stems=()).config.model.model_dump()
        files = open_weights(path)
    else:
        files = open_weights(path, FOLDERS)
        own = _own_config(files)
    if own is not None:
        part = _own_part(files, prefix, own["name"])
        fields: dict[str, Any] = own
    else:
        part = find_denoiser(files, prefix)
        fields = {"name": part.backbone, **infer_fields(part, files)}
        if part.layout == "diffusers" and files.config is not None:
            fields |= from_diffusers_config(files.config, fields, files.path)
    fields = resolve_heads(fields, overrides, str(files.path))
    return files, part, model_config(**{key: value for key, value in fields.items() if key != "preset"})


def find_sources(keys: Iterable[str], part: Part, config: Any) -> dict[str, Source]:
    """Say for each tensor of ours where in the file it lies.

    Args:
        keys: names in the original layout, without prefix.
    """
    keys = list(keys)
    if part.layout == "original":
        return {key: Source((part.prefix + key,)) for key in keys}
    found = diffusers_sources(keys, config)
    return {
        ours: source._replace(keys=tuple(part.prefix + key for key in source.keys)) for ours, source in found.items()
    }


def diffusers_sources(keys: Iterable[str], config: Any) -> dict[str, Source]:
    """Say for each tensor of ours where it lies in diffusers' layout."""
    keys = list(keys)
    if config.name == "mmdit":
        last = sd3.last_block(keys)
        found = {key: sd3.diffusers_source(key, last) for key in keys}
        return {key: source for key, source in found.items() if source is not None}
    return {ours: Source((theirs,)) for theirs, ours in _unet_to_diffusers({key: key for key in keys}, config).items()}


def _unet_to_diffusers(state: Mapping[str, T], config: UNetConfig) -> dict[str, T]:
    pooled = "class_embedding" if config.size_embed_dim is None else "add_embedding"
    return unet_keys.to_diffusers(state, config, pooled)


def read_source(files: WeightFiles, source: Source, target: Tensor) -> None:
    """Read one tensor of ours into its place, joining and swapping as the source says."""
    for key, part in zip(source.keys, _parts(target, source), strict=True):
        files.read_into(key, part)
    if source.swapped:
        target.copy_(sd3.swap_halves(target))


def _parts(tensor: Tensor, source: Source) -> Sequence[Tensor]:
    """Return the views of a tensor of ours that the keys of its source fill."""
    return (tensor,) if len(source.keys) == 1 else tensor.chunk(len(source.keys))


def check_fit(
    files: WeightFiles,
    part: Part,
    expected: Mapping[str, Tensor],
    sources: Mapping[str, Source],
    overrides: Mapping[str, Any],
) -> None:
    """Compare what the network needs with what the file has, before anything is read.

    Raises:
        WeightsError: tensors are missing, unexpected or of another shape, or stored as scaled fp8.
    """
    needed, found = stored_shapes(files, part, expected, sources)
    what, cause = f"the {part.backbone} that its shapes describe", likely_cause(needed, found, overrides)
    check_shapes(what, files.path, needed, found, cause)
    files.refuse_scaled(sorted(needed))


def stored_shapes(
    files: WeightFiles, part: Part, expected: Mapping[str, Tensor], sources: Mapping[str, Source]
) -> tuple[Shapes, Shapes]:
    """Return {key of the file: shape} as the network needs them, and as the file has them."""
    needed: dict[str, tuple[int, ...]] = {}
    for ours, source in sources.items():
        for key, part_of_ours in zip(source.keys, _parts(expected[ours], source), strict=True):
            needed[key] = tuple(part_of_ours.shape)
    there = dict.fromkeys((*part.keys, *(key for key in needed if key in files)))
    return needed, {key: files.shape(key) for key in there}


def likely_cause(needed: Shapes, found: Shapes, overrides: Mapping[str, Any]) -> str:
    """Guess in words why a file does not fit; empty where `check_shapes` knows as much."""
    missing, unexpected = needed.keys() - found.keys(), found.keys() - needed.keys()
    if overrides and any(needed[key] != found[key] for key in needed.keys() & found.keys()):
        return f"the overrides ({', '.join(overrides)}) contradict the file; leave them out"
    if any("controlnet" in key for key in unexpected):
        return "this is a ControlNet; load the base model it belongs to"
    absent = _blocks(missing) - _blocks(needed.keys() & found.keys())
    if absent or any(".context_block.mlp." in key or ".ff_context." in key for key in unexpected):
        return "this is a part of a sharded set; give the folder, or the index.json"
    return ""


def _blocks(keys: Iterable[str]) -> set[str]:
    """Return the blocks that keys are of."""
    return {match[0] for match in map(_BLOCK.search, keys) if match}


def _choose_dtype(files: WeightFiles, part: Part) -> torch.dtype:
    """Return the dtype most bytes of a part are in; bfloat16 where that is fp8, in which nothing can be computed."""
    sizes: Counter[torch.dtype] = Counter()
    for key in part.keys:
        sizes[files.dtype(key)] += files.nbytes(key)
    dtype = sizes.most_common(1)[0][0]
    return dtype if dtype in _COMPUTED else torch.bfloat16


def _sharded_checkpoint(path: Path) -> Path | None:
    """Return the checkpoint of a run that was saved in one file per process, whose parts are parts of tensors."""
    if not ((path / MANIFEST).is_file() or (path / "checkpoints").is_dir()):
        return None
    checkpoint = find_checkpoint(path)
    return checkpoint if (checkpoint / "ema").is_dir() else None


def _join_shards(
    checkpoint: Path, dtype: torch.dtype | None, device: torch.device | str | None, overrides: Mapping[str, Any]
) -> nn.Module:
    """Load the average of a sharded checkpoint; its tensors are put together in memory first."""
    if overrides:
        raise WeightsError(f"{checkpoint} knows its config; leave out {', '.join(overrides)}")
    loaded = load_checkpoint(checkpoint, stems=["ema"])
    denoiser = empty_denoiser(loaded.config.model)
    state = {key: tensor.to(device=device, dtype=dtype) for key, tensor in loaded.tensors["ema"].items()}
    denoiser.load_state_dict(state, strict=True, assign=True)
    return denoiser.eval()


def _own_config(files: WeightFiles) -> dict[str, Any] | None:
    """Return the config that `save_denoiser` put into the header."""
    try:
        stored = json.loads(files.metadata.get("config", "null"))
    except ValueError:
        return None
    return stored if isinstance(stored, dict) and stored.get("name") in BACKBONES else None


def _own_part(files: WeightFiles, prefix: str | None, backbone: str) -> Part:
    """Return the denoiser of a file of ours: it holds nothing else, and its names may be of no release."""
    theirs = [part for part in denoiser_parts(files) if part.layout == "diffusers"]
    if theirs:
        return replace(theirs[0], keys=tuple(files))
    if prefix is None:
        prefix = sd3.PREFIX if all(key.startswith(sd3.PREFIX) for key in files) else ""
    keys = tuple(key for key in files if key.startswith(prefix))
    if not keys:
        raise WeightsError(f"{files.path} has no keys under the prefix {prefix!r}; leave `prefix` out")
    return Part("denoiser", prefix, keys, "original", backbone)
