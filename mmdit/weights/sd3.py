"""Key names of MMDiT: the releases' original layout (which is ours), diffusers' and back.

Two things differ beside the names. The original packs queries, keys and values in one matrix; diffusers keeps three.
And where a modulation is only (shift, scale), in the final layer and for the text of the last block, diffusers stores
(scale, shift). Splitting, joining and swapping move bits and change none, so a round trip is exact.

Source: the key lists of the releases (tests/weights/keys/sd3*.tsv.gz) and diffusers' SD3Transformer2DModel, by name
only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

PREFIXES = ("model.diffusion_model.", "")  # in a whole checkpoint; bare last

# (original, diffusers), one to one, outside the blocks.
_OUTSIDE = (
    ("x_embedder.proj", "pos_embed.proj"),
    ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    ("context_embedder", "context_embedder"),
    ("final_layer.linear", "proj_out"),
)
# Inside block i: after "joint_blocks.i." and after "transformer_blocks.i.".
_INSIDE = (
    ("x_block.attn.proj", "attn.to_out.0"),
    ("x_block.attn.ln_q", "attn.norm_q"),
    ("x_block.attn.ln_k", "attn.norm_k"),
    ("x_block.attn2.proj", "attn2.to_out.0"),
    ("x_block.attn2.ln_q", "attn2.norm_q"),
    ("x_block.attn2.ln_k", "attn2.norm_k"),
    ("x_block.mlp.fc1", "ff.net.0.proj"),
    ("x_block.mlp.fc2", "ff.net.2"),
    ("x_block.adaLN_modulation.1", "norm1.linear"),
    ("context_block.attn.proj", "attn.to_add_out"),
    ("context_block.attn.ln_q", "attn.norm_added_q"),
    ("context_block.attn.ln_k", "attn.norm_added_k"),
    ("context_block.mlp.fc1", "ff_context.net.0.proj"),
    ("context_block.mlp.fc2", "ff_context.net.2"),
    ("context_block.adaLN_modulation.1", "norm1_context.linear"),
)
# One packed matrix here, three there.
_PACKED = (
    ("x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    ("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
    ("context_block.attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
)
_POSITION = ("pos_embed", "pos_embed.pos_embed")
_FINAL_MODULATION = ("final_layer.adaLN_modulation.1", "norm_out.linear")

_ORIGINAL_BLOCK = re.compile(r"joint_blocks\.(\d+)\.(.+)\.(weight|bias)")
_DIFFUSERS_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)\.(weight|bias)")


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename original to diffusers; `state` has no prefix and is not changed. Unpacked tensors are views.

    Raises:
        ValueError: a key is not of the original layout; the message lists all such keys.
    """
    outside, inside, packed = dict(_OUTSIDE), dict(_INSIDE), dict(_PACKED)
    last = _last_block(state, _ORIGINAL_BLOCK)
    result: dict[str, Tensor] = {}
    foreign = []
    for key, tensor in state.items():
        block = _ORIGINAL_BLOCK.fullmatch(key)
        stem, _, kind = key.rpartition(".")
        if key == _POSITION[0]:
            result[_POSITION[1]] = tensor
        elif stem == _FINAL_MODULATION[0]:
            result[f"{_FINAL_MODULATION[1]}.{kind}"] = swap_halves(tensor)
        elif stem in outside:
            result[f"{outside[stem]}.{kind}"] = tensor
        elif block and block[2] in packed:
            for part, name in zip(tensor.chunk(3), packed[block[2]], strict=True):
                result[f"transformer_blocks.{block[1]}.{name}.{kind}"] = part
        elif block and block[2] in inside:
            swapped = int(block[1]) == last and block[2] == "context_block.adaLN_modulation.1"
            name = f"transformer_blocks.{block[1]}.{inside[block[2]]}.{kind}"
            result[name] = swap_halves(tensor) if swapped else tensor
        else:
            foreign.append(key)
    _refuse(foreign, "the original SD3 layout")
    return result


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename diffusers to original; `state` is not changed.

    Raises:
        ValueError: a key is not of the diffusers layout, or one of a q, k, v triple is missing; all are listed.
    """
    outside = {theirs: ours for ours, theirs in _OUTSIDE}
    inside = {theirs: ours for ours, theirs in _INSIDE}
    packed = {name: (ours, names) for ours, names in _PACKED for name in names}
    last = _last_block(state, _DIFFUSERS_BLOCK)
    result: dict[str, Tensor] = {}
    foreign = []
    for key, tensor in state.items():
        block = _DIFFUSERS_BLOCK.fullmatch(key)
        stem, _, kind = key.rpartition(".")
        if key == _POSITION[1]:
            result[_POSITION[0]] = tensor
        elif stem == _FINAL_MODULATION[1]:
            result[f"{_FINAL_MODULATION[0]}.{kind}"] = swap_halves(tensor)
        elif stem in outside:
            result[f"{outside[stem]}.{kind}"] = tensor
        elif block and block[2] in packed:
            ours, names = packed[block[2]]
            keys = [f"transformer_blocks.{block[1]}.{name}.{kind}" for name in names]
            missing = [name for name in keys if name not in state]
            if missing:
                raise ValueError(f"{key} is there but {', '.join(missing)} is not; the file is incomplete")
            name = f"joint_blocks.{block[1]}.{ours}.{kind}"
            if name not in result:
                result[name] = torch.cat([state[name] for name in keys])
        elif block and block[2] in inside:
            swapped = int(block[1]) == last and block[2] == "norm1_context.linear"
            name = f"joint_blocks.{block[1]}.{inside[block[2]]}.{kind}"
            result[name] = swap_halves(tensor) if swapped else tensor
        else:
            foreign.append(key)
    _refuse(foreign, "the SD3 layout of diffusers")
    return result


def swap_halves(tensor: Tensor) -> Tensor:
    """Exchange the halves of the first axis: (shift, scale) <-> (scale, shift)."""
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def _last_block(keys: Iterable[str], pattern: re.Pattern[str]) -> int:
    """Return the largest block index, -1 where there are no blocks."""
    return max((int(match[1]) for match in map(pattern.fullmatch, keys) if match), default=-1)


def _refuse(foreign: list[str], layout: str) -> None:
    if foreign:
        shown = ", ".join(foreign[:8]) + (f" and {len(foreign) - 8} more" if len(foreign) > 8 else "")
        raise ValueError(f"{len(foreign)} keys are not of {layout}: {shown}; strip the prefix first, or check the file")
