"""Key names of U-Nets: the original layout (ours) and diffusers' UNet2DConditionModel, derived from the config.

Every tensor keeps its shape and values; only names differ. The correspondence is walked block by block in the order
in which the network runs, so any number of stages, blocks and transformer depths is covered, not the releases' alone.

Source: the key lists of the SD1.5 and SDXL releases (tests/weights/keys) and diffusers' module names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from mmdit.config import UNetConfig

T = TypeVar("T")

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
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
    ("input_blocks.0.0", "conv_in"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)


def module_pairs(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Yield (original, diffusers) names of modules: whatever follows them in a key is the same in both layouts."""
    yield from _OUTSIDE
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


def to_diffusers(state: Mapping[str, T], config: UNetConfig) -> dict[str, T]:
    """Rename the parameters of our `UNet` (original layout, no prefix) to those of UNet2DConditionModel.

    Raises:
        ValueError: a key does not fit the config.
    """
    return rename(state, module_pairs(config))


def from_diffusers(state: Mapping[str, T], config: UNetConfig) -> dict[str, T]:
    """Rename the parameters of UNet2DConditionModel to those of our `UNet`; the inverse of `to_diffusers`.

    Raises:
        ValueError: a key does not fit the config.
    """
    return rename(state, ((diffusers, original) for original, diffusers in module_pairs(config)))
