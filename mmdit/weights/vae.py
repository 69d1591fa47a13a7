"""Key names of VAEs: the original layout (ours), diffusers' and back; what shapes and neighbours tell of the config.

Source: the key list of the SD3 release (tests/weights/keys/vae.tsv) and diffusers' AutoencoderKL, by name only.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

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
_LATENT_STATISTICS = {
    "sd3": {"shift": 0.0609, "scale": 1.5305},
    "sd1": {"shift": 0.0, "scale": 0.18215},
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


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename diffusers' keys to the original ones; a state in the original layout passes unchanged.

    Attention weights, Linear [C, C] in diffusers, become 1x1 convolutions [C, C, 1, 1].
    """
    if not is_diffusers(state):
        return dict(state)
    levels, out = _levels(state), {}
    for key, tensor in state.items():
        for old, new in _OLD:
            key = key.replace(f"attentions.0.{old}", f"attentions.0.{new}")
        name = _rename(_turn(key, levels), source=1, target=0)
        if ".attn_1." in name and name.endswith(".weight") and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        out[name] = tensor
    return out


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
    raise ValueError(
        f"{file} holds no VAE: none of its {len(keys)} keys is '[first_stage_model.|vae.]encoder.conv_in.weight'; "
        f"it begins with {keys[:3]}"
    )


def release_of(keys: Iterable[str]) -> str | None:
    """Tell from the other parts of a whole checkpoint which release it is: sd1 | sdxl | sd3; None for a bare VAE."""
    keys = list(keys)
    marks = {"joint_blocks.": "sd3", "model.diffusion_model.label_emb.": "sdxl", "model.diffusion_model.": "sd1"}
    for mark, release in marks.items():
        if any(mark in key for key in keys):
            return release
    return None


def in_folder(folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """Return the weights' file and the config of a diffusers folder: the VAE's own, or the pipeline's above it.

    Raises:
        FileNotFoundError: the folder holds no single .safetensors file.
    """
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    files = [file for file in sorted(folder.glob("*.safetensors")) if "fp16" not in file.name]
    files = files or sorted(folder.glob("*.safetensors"))
    named = [f for f in files if f.name in ("diffusion_pytorch_model.safetensors", "vae.safetensors")]
    files = named or files
    if len(files) != 1:
        raise FileNotFoundError(
            f"{folder} holds {len(files)} .safetensors files ({[f.name for f in files]}); expected one: give its path"
        )
    config = folder / "config.json"
    return files[0], json.loads(config.read_text(encoding="utf-8")) if config.is_file() else None


def infer_fields(
    state: Mapping[str, Tensor], folder_config: Mapping[str, Any] | None = None, release: str | None = None
) -> dict[str, Any]:
    """Tell the fields of VAEConfig from the shapes of a state in the original layout.

    Args:
        folder_config: diffusers' config.json, which knows the norm groups and the latents' shift and scale.
        release: sd1 | sdxl | sd3, where the file's other parts told; None: a bare VAE.

    A bare VAE with 16 channels is taken for SD3's, one with 4 channels for SD1's; the latter is said as a warning,
    since SDXL's has the same shapes and another scale (`load_vae(path, scale=0.13025)`).
    """
    levels = _levels(state)
    blocks = [
        int(m.group(1)) for key in state if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight", key))
    ]
    latent_channels = state["decoder.conv_in.weight"].shape[1]
    fields: dict[str, Any] = {
        "block_channels": tuple(state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)),
        "num_res_blocks": max(blocks) + 1,
        "latent_channels": latent_channels,
        "use_quant_conv": "quant_conv.weight" in state,
        "mid_attention": "encoder.mid.attn_1.q.weight" in state,
        "stem_patch": 2 if state["encoder.conv_in.weight"].shape[1] == 12 else 1,
    }
    if folder_config is not None:
        fields["norm_groups"] = folder_config.get("norm_num_groups", 32)
        fields["shift"] = folder_config.get("shift_factor") or 0.0
        fields["scale"] = folder_config.get("scaling_factor", 0.18215)
        return fields
    if release is None:
        release = "sd3" if latent_channels == 16 else "sd1"
        if release == "sd1":
            logger.warning(
                "a bare VAE with %d latent channels: SD1's scale 0.18215 is taken; SDXL's has the same shapes, say "
                "scale=0.13025 for it",
                latent_channels,
            )
    return fields | _LATENT_STATISTICS[release]
