"""Key names of U-Nets: the original layout (ours) and diffusers' UNet2DConditionModel, derived from the config.

Every tensor keeps its shape and values; only names differ. The correspondence is walked block by block in the order
in which the network runs, so any number of stages, blocks and transformer depths is covered, not the releases' alone.

Source: the key lists of the SD1.5 and SDXL releases (tests/weights/keys) and diffusers' module names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from mmdit.config import UNetConfig

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]

PREFIX = "model.diffusion_model."  # of the U-Net in a whole SD1.x or SDXL checkpoint

# (original, diffusers) inside one residual block
_RES_BLOCK = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_OUTSIDE = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)


def module_pairs(config: UNetConfig, pooled: str = "add_embedding") -> Iterator[tuple[str, str]]:
    """Yield (original, diffusers) names of modules: whatever follows them in a key is the same in both layouts.

    Args:
        pooled: diffusers' name of what embeds the pooled vector: `add_embedding` where six sizes are part of it, as in
            SDXL, else `class_embedding`.
    """
    yield from _OUTSIDE
    yield from (("label_emb.0.0", f"{pooled}.linear_1"), ("label_emb.0.2", f"{pooled}.linear_2"))
    stages, blocks = len(config.channel_mult), config.num_res_blocks
    for stage in range(stages):
        first = 1 + stage * (blocks + 1)  # input_blocks.0 is the first convolution; a stage ends in its downsampler
        for i in range(blocks):
            yield from _res_block(f"input_blocks.{first + i}.0", f"down_blocks.{stage}.resnets.{i}")
            if config.transformer_depth[stage]:
                yield f"input_blocks.{first + i}.1", f"down_blocks.{stage}.attentions.{i}"
        if stage + 1 < stages:
            yield f"input_blocks.{first + blocks}.0.op", f"down_blocks.{stage}.downsamplers.0.conv"

    yield from _res_block("middle_block.0", "mid_block.resnets.0")
    last = 1
    if config.middle_transformer_depth:
        yield "middle_block.1", "mid_block.attentions.0"
        last = 2
    yield from _res_block(f"middle_block.{last}", "mid_block.resnets.1")

    for up in range(stages):  # the deepest stage comes first
        depth = config.transformer_depth[stages - 1 - up]
        for i in range(blocks + 1):
            block = f"output_blocks.{up * (blocks + 1) + i}"
            yield from _res_block(f"{block}.0", f"up_blocks.{up}.resnets.{i}")
            if depth:
                yield f"{block}.1", f"up_blocks.{up}.attentions.{i}"
        if up + 1 < stages:
            yield f"{block}.{2 if depth else 1}.conv", f"up_blocks.{up}.upsamplers.0.conv"


def _res_block(original: str, diffusers: str) -> Iterator[tuple[str, str]]:
    for a, b in _RES_BLOCK:
        yield f"{original}.{a}", f"{diffusers}.{b}"


def rename(state: Mapping[str, T], pairs: Iterable[tuple[str, str]]) -> dict[str, T]:
    """Replace the module name at the start of each key; values are passed through untouched, in the same order.

    Args:
        state: {key: tensor}.
        pairs: (module name as it is, module name as it becomes).

    Raises:
        ValueError: a key belongs to no module of `pairs`; all such keys are listed.
    """
    table = dict(pairs)
    renamed: dict[str, T] = {}
    strange = []
    for key, value in state.items():
        module = _owner(key, table)
        if module is None:
            strange.append(key)
        else:
            renamed[table[module] + key[len(module) :]] = value
    if strange:
        shown = ", ".join(strange[:5]) + (f" and {len(strange) - 5} more" if len(strange) > 5 else "")
        raise ValueError(
            f"{len(strange)} of {len(state)} keys do not belong to a U-Net of this config: {shown}; "
            f"check channel_mult, num_res_blocks, transformer_depth, and that no prefix such as {PREFIX!r} is left"
        )
    return renamed


def _owner(key: str, table: Mapping[str, str]) -> str | None:
    """Return the module of `table` under which `key` lies: the longest, should two fit."""
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:end])
        if module in table:
            return module
    return None


def to_diffusers(state: Mapping[str, T], config: UNetConfig, pooled: str = "add_embedding") -> dict[str, T]:
    """Rename the parameters of our `UNet` (original layout, no prefix) to those of UNet2DConditionModel.

    Args:
        pooled: as in `module_pairs`.

    Raises:
        ValueError: a key does not fit the config.
    """
    return rename(state, module_pairs(config, pooled))


def from_diffusers(state: Mapping[str, T], config: UNetConfig) -> dict[str, T]:
    """Rename the parameters of UNet2DConditionModel to those of our `UNet`; the inverse of `to_diffusers`.

    Raises:
        ValueError: a key does not fit the config.
    """
    return rename(state, ((diffusers, original) for original, diffusers in module_pairs(config)))


def infer_fields(shapes: Shapes, layout: str) -> dict[str, Any]:
    """Tell the fields of UNetConfig from the shapes of a file, in either layout and without prefix.

    What a damaged file lacks is taken from SD1.5, so that the caller can say what is missing. Heads and norm groups
    leave no trace in shapes and are not among the fields.
    """
    original = layout == "original"
    stem = shapes.get("input_blocks.0.0.weight" if original else "conv_in.weight", (320, 4, 3, 3))
    stages = list(_original_stages(shapes) if original else _diffusers_stages(shapes))
    middle = "middle_block.1" if original else "mid_block.attentions.0"
    depths: dict[str, int] = {}
    for key in shapes:
        match = re.match(r"(.+)\.transformer_blocks\.(\d+)\.", key)
        if match:
            depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    widths = [next((shapes[conv][0] for conv, _ in stage if conv in shapes), stem[0]) for stage in stages]
    pooled = ("label_emb.0.0",) if original else ("add_embedding.linear_1", "class_embedding.linear_1")
    pooled_dim = next((shapes[f"{name}.weight"][1] for name in pooled if f"{name}.weight" in shapes), None)
    fields: dict[str, Any] = {
        "in_channels": stem[1],
        "out_channels": shapes.get("out.2.weight" if original else "conv_out.weight", (stem[1],))[0],
        "model_channels": stem[0],
        "channel_mult": tuple(max(1, width // stem[0]) for width in widths),
        "num_res_blocks": max(1, len(stages[0])),
        "transformer_depth": tuple(max((depths.get(name, 0) for _, name in stage), default=0) for stage in stages),
        "middle_transformer_depth": depths.get(middle, 0),
        "pooled_dim": pooled_dim,
        "size_embed_dim": None if "class_embedding.linear_1.weight" in shapes else _size_embed_dim(pooled_dim),
    }
    for name in depths:  # any of them tells what all have in common
        first = f"{name}.transformer_blocks.0"
        if f"{name}.proj_in.weight" in shapes:
            fields["linear_projection"] = len(shapes[f"{name}.proj_in.weight"]) == 2
        if f"{first}.attn2.to_k.weight" in shapes:
            fields["context_dim"] = shapes[f"{first}.attn2.to_k.weight"][1]
        if f"{first}.ff.net.0.proj.weight" in shapes:
            hidden, channels = shapes[f"{first}.ff.net.0.proj.weight"]
            fields["ff_mult"] = hidden / 2 / channels
    return fields


def _size_embed_dim(pooled_dim: int | None) -> int | None:
    """Return the width of each of the six sizes in a pooled vector: 256, or what can fit in a small network's."""
    if pooled_dim is None or pooled_dim <= 6:
        return None
    return min(256, 1 << ((pooled_dim - 1) // 6).bit_length() - 1)


def _original_stages(shapes: Shapes) -> Iterator[list[tuple[str, str]]]:
    """Yield the stages of the way down: (first convolution, transformer) of each residual block."""
    stage: list[tuple[str, str]] = []
    for i in range(1, _count(shapes, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            yield stage
            stage = []
        else:
            stage.append((f"input_blocks.{i}.0.in_layers.2.weight", f"input_blocks.{i}.1"))
    yield stage


def _diffusers_stages(shapes: Shapes) -> Iterator[list[tuple[str, str]]]:
    for stage in range(max(1, _count(shapes, r"down_blocks\.(\d+)\."))):
        block = f"down_blocks.{stage}"
        yield [
            (f"{block}.resnets.{i}.conv1.weight", f"{block}.attentions.{i}")
            for i in range(_count(shapes, rf"down_blocks\.{stage}\.resnets\.(\d+)\."))
        ]


def _count(keys: Iterable[str], pattern: str) -> int:
    """Return one more than the largest number that `pattern` finds at the start of a key, 0 where it finds none."""
    return max((int(match[1]) for match in (re.match(pattern, key) for key in keys) if match), default=-1) + 1
