"""The config.json of diffusers' SD3Transformer2DModel and UNet2DConditionModel, read and written.

Source: the configs of the releases' diffusers folders and the constructors' arguments, by name only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdit.config import MMDiTConfig, UNetConfig
from mmdit.weights.header import WeightsError

_VERSION = "0.30.0"  # the first diffusers whose SD3Transformer2DModel has all that is written here

# Choices of diffusers' U-Net that our U-Net makes in one way only. Others change numbers and no key.
_UNET_FIXED = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "mid_block_scale_factor": 1,
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "time_embedding_type": "positional",
    "downsample_padding": 1,
}
# Fields of ours that the names and shapes in a diffusers folder, or its config.json, express.
_MMDIT_EXPRESSED = {
    *("name", "preset", "in_channels", "out_channels", "patch_size", "depth", "width", "num_heads", "context_dim"),
    *("pooled_dim", "qk_norm", "dual_attention_layers", "pos_embed_max_size", "pos_embed_base_size"),
}
_UNET_EXPRESSED = {
    *("name", "preset", "in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks"),
    *("transformer_depth", "middle_transformer_depth", "head_dim", "num_heads", "linear_projection", "context_dim"),
    *("pooled_dim", "size_embed_dim", "norm_groups"),
}


def from_diffusers_config(config: Mapping[str, Any], fields: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Read from a config.json what shapes do not tell: heads and norm groups.

    Args:
        fields: what the shapes told, of MMDiTConfig or UNetConfig.

    Raises:
        WeightsError: the config asks for something our U-Net does otherwise.
    """
    if fields["name"] == "mmdit":
        names = {"num_heads": "num_attention_heads", "pos_embed_base_size": "sample_size"}
        told = {ours: config[theirs] for ours, theirs in names.items() if isinstance(config.get(theirs), int)}
        if "pos_embed_base_size" in told:
            told["pos_embed_base_size"] = max(1, told["pos_embed_base_size"] // fields["patch_size"])
        return told
    for name, ours in _UNET_FIXED.items():
        if config.get(name, ours) != ours:
            raise WeightsError(
                f"{path}: its config.json says {name}={config[name]!r}, which our U-Net does not do ({ours!r}); this "
                f"network cannot be loaded"
            )
    found: dict[str, Any] = {"norm_groups": config.get("norm_num_groups", 32)}
    if fields.get("size_embed_dim") is not None and config.get("addition_time_embed_dim"):
        found["size_embed_dim"] = config["addition_time_embed_dim"]
    # what diffusers calls attention_head_dim is the number of heads, unless num_attention_heads is given
    heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
    if isinstance(heads, int):
        return {**found, "num_heads": heads}
    widths = [fields["model_channels"] * mult for mult in fields["channel_mult"]]
    sizes = {width // count for width, count in zip(widths, heads, strict=False)}
    if len(set(heads)) == 1:
        return {**found, "num_heads": heads[0]}
    if len(sizes) != 1 or len(heads) != len(widths):
        raise WeightsError(f"{path}: heads of different size per stage ({heads}) are not supported")
    return {**found, "head_dim": sizes.pop(), "num_heads": None}


def check_fits_diffusers(config: Any) -> None:
    """Refuse a network that diffusers does not have.

    Raises:
        ValueError: which choice it is, and what to do.
    """
    where = "save it with layout='original'"
    if config.name not in ("mmdit", "unet"):
        raise ValueError(f"diffusers has no network like {config.name}; {where}")
    name, ratio = ("mlp_ratio", config.mlp_ratio) if config.name == "mmdit" else ("ff_mult", config.ff_mult)
    if ratio != 4:
        raise ValueError(f"diffusers' feed-forwards have 4 times the width, this network has {name}={ratio}; {where}")
    expressed = _MMDIT_EXPRESSED | {"mlp_ratio"} if config.name == "mmdit" else _UNET_EXPRESSED | {"ff_mult"}
    for field, described in type(config).model_fields.items():
        value = getattr(config, field)
        if field not in expressed and value != described.get_default(call_default_factory=True):
            raise ValueError(f"diffusers' {config.name} has no {field}={value!r}; {where}")
    if config.name == "unet":
        deepest = config.transformer_depth[-1]
        if deepest and deepest != config.middle_transformer_depth:
            raise ValueError(
                f"diffusers' U-Net has the middle as deep as the last stage, this one has {deepest} transformer blocks "
                f"there and {config.middle_transformer_depth} in the middle; {where}"
            )


def to_diffusers_config(config: MMDiTConfig | UNetConfig) -> dict[str, Any]:
    """Return the config.json from which diffusers' `from_pretrained` builds the same network."""
    return _transformer(config) if isinstance(config, MMDiTConfig) else _unet(config)


def _transformer(config: MMDiTConfig) -> dict[str, Any]:
    return {
        "_class_name": "SD3Transformer2DModel",
        "_diffusers_version": _VERSION,
        "sample_size": config.patch_size * config.pos_embed_base_size,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "attention_head_dim": config.width // config.num_heads,
        "num_attention_heads": config.num_heads,
        "caption_projection_dim": config.width,
        "joint_attention_dim": config.context_dim,
        "pooled_projection_dim": config.pooled_dim,
        "pos_embed_max_size": config.pos_embed_max_size,
        "dual_attention_layers": list(config.dual_attention_layers),
        "qk_norm": "rms_norm" if config.qk_norm == "rms" else None,
    }


def _unet(config: UNetConfig) -> dict[str, Any]:
    widths = [config.model_channels * mult for mult in config.channel_mult]
    depths, middle = config.transformer_depth, config.middle_transformer_depth
    tree: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": _VERSION,
        **_UNET_FIXED,
        "sample_size": 64 if config.pooled_dim is None else 128,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": widths,
        "layers_per_block": config.num_res_blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D",
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        # the last number is the middle's, too
        "transformer_layers_per_block": [*(depth or 1 for depth in depths[:-1]), depths[-1] or middle or 1],
        "attention_head_dim": config.num_heads or [max(1, width // config.head_dim) for width in widths],
        "cross_attention_dim": config.context_dim,
        "use_linear_projection": config.linear_projection,
        "norm_num_groups": config.norm_groups,
    }
    if config.size_embed_dim is not None:
        tree |= {"addition_embed_type": "text_time", "addition_time_embed_dim": config.size_embed_dim}
    elif config.pooled_dim is not None:
        tree |= {"class_embed_type": "projection"}
    return tree | {"projection_class_embeddings_input_dim": config.pooled_dim}
