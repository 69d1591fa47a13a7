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
from typing import Any

import torch
from torch import Tensor

from mmdit.weights.source import Source

PREFIX = "model.diffusion_model."  # of the MMDiT in a whole checkpoint

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
    last = last_block(state)
    result: dict[str, Tensor] = {}
    foreign = []
    for key, tensor in state.items():
        source = diffusers_source(key, last)
        if source is None:
            foreign.append(key)
        else:
            tensor = swap_halves(tensor) if source.swapped else tensor
            result.update(zip(source.keys, tensor.chunk(len(source.keys)), strict=True))
    _refuse(foreign, "the original SD3 layout")
    return result


def diffusers_source(key: str, last: int) -> Source | None:
    """Say where a tensor of the original layout lies in a diffusers file; None for a key that is not of this layout.

    Args:
        last: index of the last block, whose text modulation is stored the other way round.
    """
    outside, inside, packed = dict(_OUTSIDE), dict(_INSIDE), dict(_PACKED)
    block = _ORIGINAL_BLOCK.fullmatch(key)
    stem, _, kind = key.rpartition(".")
    if key == _POSITION[0]:
        return Source((_POSITION[1],))
    if stem == _FINAL_MODULATION[0]:
        return Source((f"{_FINAL_MODULATION[1]}.{kind}",), swapped=True)
    if stem in outside:
        return Source((f"{outside[stem]}.{kind}",))
    if block and block[2] in packed:
        return Source(tuple(f"transformer_blocks.{block[1]}.{name}.{kind}" for name in packed[block[2]]))
    if block and block[2] in inside:
        swapped = int(block[1]) == last and block[2] == "context_block.adaLN_modulation.1"
        return Source((f"transformer_blocks.{block[1]}.{inside[block[2]]}.{kind}",), swapped)
    return None


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename diffusers to original; `state` is not changed.

    Raises:
        ValueError: a key is not of the diffusers layout, or one of a q, k, v triple is missing; all are listed.
    """
    outside = {theirs: ours for ours, theirs in _OUTSIDE}
    inside = {theirs: ours for ours, theirs in _INSIDE}
    packed = {name: (ours, names) for ours, names in _PACKED for name in names}
    last = last_block(state)
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


def last_block(keys: Iterable[str]) -> int:
    """Return the largest block index of keys in either layout, -1 where there are no blocks."""
    found = (_ORIGINAL_BLOCK.fullmatch(key) or _DIFFUSERS_BLOCK.fullmatch(key) for key in keys)
    return max((int(match[1]) for match in found if match), default=-1)


def infer_fields(shapes: Mapping[str, tuple[int, ...]], layout: str) -> dict[str, Any]:
    """Tell the fields of MMDiTConfig from the shapes of a file, in either layout and without prefix.

    What a damaged file lacks is taken from SD3-medium, so that the caller can say what is missing. The number of
    heads is told only where queries are normalised; else it is not among the fields.
    """
    last = last_block(shapes)

    def shape(key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...] | None:
        source = diffusers_source(key, last)
        assert source is not None, key
        return shapes.get(key if layout == "original" else source.keys[0], default)

    first = "joint_blocks.0.x_block"
    width = (shape(f"{first}.attn.qkv.weight") or (0, 1536))[1]
    patches = shape("x_embedder.proj.weight") or (width, 16, 2, 2)
    position = shape("pos_embed") or (1, 192**2, width)
    hidden = shape(f"{first}.mlp.fc1.weight") or (4 * width, width)
    final = shape("final_layer.linear.weight") or (patches[1] * patches[2] ** 2, width)
    fields: dict[str, Any] = {
        "in_channels": patches[1],
        "out_channels": max(1, final[0] // patches[2] ** 2),
        "patch_size": patches[2],
        "depth": last + 1,
        "width": width,
        "mlp_ratio": hidden[0] / width,
        "context_dim": (shape("context_embedder.weight") or (width, 4096))[1],
        "pooled_dim": (shape("y_embedder.mlp.0.weight") or (width, 2048))[1],
        "dual_attention_layers": tuple(
            i for i in range(last + 1) if shape(f"joint_blocks.{i}.x_block.attn2.qkv.weight") is not None
        ),
        "pos_embed_max_size": round(position[1] ** 0.5),
    }
    norm = shape(f"{first}.attn.ln_k.weight") or shape("joint_blocks.0.context_block.attn.ln_k.weight")
    if norm is not None:
        fields |= {"qk_norm": "rms", "num_heads": max(1, width // norm[0])}
    return fields


def _refuse(foreign: list[str], layout: str) -> None:
    if foreign:
        shown = ", ".join(foreign[:8]) + (f" and {len(foreign) - 8} more" if len(foreign) > 8 else "")
        raise ValueError(f"{len(foreign)} keys are not of {layout}: {shown}; strip the prefix first, or check the file")
