"""Key names of VAEs: the original layout (ours), diffusers' and back; what shapes and neighbours tell of the config.

Source: the key list of the SD3 release (tests/weights/keys/vae.tsv) and diffusers' AutoencoderKL, by name only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from mmdit.config import VAEConfig
from mmdit.weights.header import WeightsError

PREFIXES = ("first_stage_model.", "vae.", "")  # in a whole checkpoint; bare last

# (original, diffusers); {} is a number. `up` counts from the other end in diffusers: `_turn` sees to that.
_STAGES = (
    ("encoder.down.{}.block.{}.", "encoder.down_blocks.{}.resnets.{}."),
    ("encoder.down.{}.downsample.", "encoder.down_blocks.{}.downsamplers.0."),
    ("decoder.up.{}.block.{}.", "decoder.up_blocks.{}.resnets.{}."),
    ("decoder.up.{}.upsample.", "decoder.up_blocks.{}.upsamplers.0."),
)
_PARTS = (
    ("mid.block_1.", "mid_block.resnets.0."),
    ("mid.block_2.", "mid_block.resnets.1."),
    ("mid.attn_1.norm.", "mid_block.attentions.0.group_norm."),
    ("mid.attn_1.q.", "mid_block.attentions.0.to_q."),
    ("mid.attn_1.k.", "mid_block.attentions.0.to_k."),
    ("mid.attn_1.v.", "mid_block.attentions.0.to_v."),
    ("mid.attn_1.proj_out.", "mid_block.attentions.0.to_out.0."),
    ("nin_shortcut.", "conv_shortcut."),
    ("norm_out.", "conv_norm_out."),
)
# names that diffusers' files of 2022 and 2023 have (sd-vae-ft-mse, for one)
_OLD = (("query.", "to_q."), ("key.", "to_k."), ("value.", "to_v."), ("proj_attn.", "to_out.0."))

# shift and scale are nowhere in the weights. Sources: the releases' own model code and configs.
LATENT_STATISTICS = {
    "sd3": {"shift": 0.0609, "scale": 1.5305},
    "sd1.5": {"shift": 0.0, "scale": 0.18215},
    "sdxl": {"shift": 0.0, "scale": 0.13025},
}


def _levels(keys: Iterable[str]) -> int:
    found = [re.match(r"decoder\.up(?:_blocks)?\.(\d+)\.", key) for key in keys]
    return max((int(match.group(1)) for match in found if match), default=-1) + 1


def _turn(key: str, levels: int) -> str:
    """Count the decoder's stages from the other end."""
    return re.sub(r"^(decoder\.up(?:_blocks)?\.)(\d+)\.", lambda m: f"{m.group(1)}{levels - 1 - int(m.group(2))}.", key)


def is_diffusers(keys: Iterable[str]) -> bool:
    """Say whether keys (without prefix) are in diffusers' layout."""
    return any(key.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for key in keys)


def _rename(key: str, source: int, target: int) -> str:
    """Rename one key; 0 is the original layout's column, 1 diffusers'."""
    for pair in _STAGES:
        match = re.match(re.escape(pair[source]).replace(r"\{\}", r"(\d+)"), key)
        if match:
            key = pair[target].format(*match.groups()) + key[match.end() :]
            break
    for pair in _PARTS:
        key = key.replace(pair[source], pair[target])
    return key


def original_names(keys: Iterable[str]) -> dict[str, str]:
    """Return {original name: key}, of keys without prefix in either layout."""
    keys = list(keys)
    if not is_diffusers(keys):
        return {key: key for key in keys}
    levels, out = _levels(keys), {}
    for key in keys:
        name = key
        for old, new in _OLD:
            name = name.replace(f"attentions.0.{old}", f"attentions.0.{new}")
        out[_rename(_turn(name, levels), source=1, target=0)] = key
    return out


def original_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape under an original name: attention weights, Linear [C, C] in diffusers, are 1x1 convolutions."""
    return (*shape, 1, 1) if ".attn_1." in name and name.endswith(".weight") and len(shape) == 2 else shape


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename diffusers' keys to the original ones; a state in the original layout passes unchanged.

    Attention weights, Linear [C, C] in diffusers, become 1x1 convolutions [C, C, 1, 1].
    """
    names = original_names(state)
    return {name: state[key].reshape(original_shape(name, tuple(state[key].shape))) for name, key in names.items()}


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename original keys to diffusers'; the inverse of `to_original`, bit for bit."""
    levels, out = _levels(state), {}
    for key, tensor in state.items():
        if ".attn_1." in key and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]
        out[_turn(_rename(key, source=0, target=1), levels)] = tensor
    return out


def find_prefix(keys: Iterable[str], file: object) -> str:
    """Return what stands before the VAE's keys in a file.

    Raises:
        ValueError: the file holds no VAE.
    """
    keys = list(keys)
    for prefix in PREFIXES:
        if f"{prefix}encoder.conv_in.weight" in keys:
            return prefix
    raise WeightsError(
        f"{file} holds no VAE: none of its {len(keys)} keys is '[first_stage_model.|vae.]encoder.conv_in.weight'; "
        f"it begins with {keys[:3]}"
    )


def name_sources(keys: Iterable[str]) -> dict[str, str]:
    """Return {original name: key} of the VAE in a file, without what training left in it: losses, the EMA's counters.

    Raises:
        ValueError: the file holds no VAE.
    """
    prefix = find_prefix(keys, getattr(keys, "path", "the file"))
    held = [key[len(prefix) :] for key in keys if key.startswith(prefix)]
    names = original_names(key for key in held if not key.startswith(("loss.", "model_ema.")))
    return {name: prefix + key for name, key in names.items()}


def release_of(keys: Iterable[str]) -> str | None:
    """Tell from the other parts of a whole checkpoint which family it is: sd1.5 | sdxl | sd3; None for a bare VAE."""
    keys = list(keys)
    marks = {
        "joint_blocks.": "sd3",
        "text_encoders.": "sd3",
        "model.diffusion_model.label_emb.": "sdxl",
        "conditioner.embedders.": "sdxl",
        "model.diffusion_model.": "sd1.5",
        "cond_stage_model.": "sd1.5",
    }
    for mark, family in marks.items():
        if any(mark in key for key in keys):
            return family
    return None


def infer_fields(
    shapes: Mapping[str, tuple[int, ...]],
    folder_config: Mapping[str, Any] | None = None,
    family: str | None = None,
) -> dict[str, Any]:
    """Tell the fields of VAEConfig from shapes under the original names.

    Args:
        folder_config: diffusers' config.json, which knows the norm groups and, where it states them, the latents' shift
            and scale: before any family's, and a number for each channel where it has their means and deviations.
        family: sd1.5 | sdxl | sd3, where the file's other parts told or the user said; None: a bare VAE.

    `shift` and `scale` are left out where nothing tells them: of a bare VAE whose latents have not 16 channels, SD3's.

    Raises:
        WeightsError: tensors are missing.
    """
    levels = _levels(shapes)
    blocks = [
        int(m.group(1)) for key in shapes if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight", key))
    ]
    try:
        fields: dict[str, Any] = {
            "block_channels": tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)),
            "num_res_blocks": max(blocks, default=0) + 1,
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "use_quant_conv": "quant_conv.weight" in shapes,
            "mid_attention": "encoder.mid.attn_1.q.weight" in shapes,
            "stem_patch": 2 if shapes["encoder.conv_in.weight"][1] == 12 else 1,
        }
    except KeyError as error:
        raise WeightsError(f"the VAE is not whole: {error.args[0]!r} is missing; take the file again") from None
    if folder_config is not None:
        fields["norm_groups"] = folder_config.get("norm_num_groups", 32)
        if "scaling_factor" in folder_config or (family is None and fields["latent_channels"] == 4):
            fields["shift"] = folder_config.get("shift_factor") or 0.0
            fields["scale"] = folder_config.get("scaling_factor", 0.18215)  # diffusers' default, of SD1.5's old folders
            means, deviations = folder_config.get("latents_mean"), folder_config.get("latents_std")
            if means and deviations:
                fields["shift"] = tuple(means)
                fields["scale"] = tuple(fields["scale"] / deviation for deviation in deviations)
            return fields
    if family is None and fields["latent_channels"] == 16:
        family = "sd3"
    return fields | LATENT_STATISTICS.get(family or "", {})


def diffusers_config(config: VAEConfig) -> dict[str, Any]:
    """Return the config.json of diffusers' AutoencoderKL.

    Raises:
        ValueError: the VAE has a stem or a scale per channel, which diffusers has not.
    """
    foreign = [f"stem_patch={config.stem_patch}"] if config.stem_patch > 1 else []
    foreign += [
        f"one latent {name} per channel" for name in ("shift", "scale") if isinstance(getattr(config, name), tuple)
    ]
    foreign += ["clamp"] if config.clamp else []
    if foreign:
        raise ValueError(f"diffusers has no {', '.join(foreign)}; save this VAE in the original layout")
    levels = len(config.block_channels)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": list(config.block_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config.num_res_blocks,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "act_fn": "silu",
        "mid_block_add_attention": config.mid_attention,
        "use_quant_conv": config.use_quant_conv,
        "use_post_quant_conv": config.use_quant_conv,
        "scaling_factor": config.scale,
        "shift_factor": config.shift or None,
        "force_upcast": True,
    }
