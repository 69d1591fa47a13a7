"""Named sizes of each backbone, and the widths of known encoders: literal tables, standard library only.

The rows `tiny`, `S`, `B`, `L` leave out the encoder-dependent widths (in/out channels, context, pooled); `RunConfig`
fills those from the chosen encoders. The released sizes state everything (facts: Stability-AI/sd3-ref and sd3.5
shapes; SD1.5 and SDXL U-Net configs). Parameter counts stand in tests/models/test_presets.py and are recomputed there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# context_dim E, pooled_dim G of text encoders; channels C, downsampling factor of VAEs. Keys: values of `encoders.*`.
ENCODER_WIDTHS: dict[str, dict[str, int]] = {"tiny": {"context_dim": 256, "pooled_dim": 224}}
# Width of each encoder stream before zero-padding, in the order of the context.
STREAM_WIDTHS: dict[str, dict[str, int]] = {"tiny": {"clip": 224, "t5": 256}}
VAE_WIDTHS: dict[str, dict[str, int]] = {"tiny": {"channels": 16, "factor": 8}}

# Position tables, in patches a side: up to 512 pixels around a base of 64, and up to 1,024 around a base of 256.
_SMALL_TABLE = {"pos_embed_max_size": 32, "pos_embed_base_size": 4}
_TABLE = {"pos_embed_max_size": 64, "pos_embed_base_size": 16}
_SD3 = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "context_dim": 4096,
    "pooled_dim": 2048,
    "pos_embed_base_size": 64,
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "mmdit": {
        "tiny": {"patch_size": 2, "depth": 5, "width": 240, "num_heads": 5, **_SMALL_TABLE},
        "S": {"patch_size": 2, "depth": 8, "width": 384, "num_heads": 6, **_TABLE},
        "B": {"patch_size": 2, "depth": 8, "width": 768, "num_heads": 12, **_TABLE},
        "L": {"patch_size": 2, "depth": 17, "width": 1024, "num_heads": 16, **_TABLE},
        "sd3_medium": {**_SD3, "depth": 24, "width": 1536, "num_heads": 24, "pos_embed_max_size": 192},
        "sd3.5_medium": {
            **_SD3,
            "depth": 24,
            "width": 1536,
            "num_heads": 24,
            "pos_embed_max_size": 384,
            "qk_norm": "rms",
            "dual_attention_layers": tuple(range(13)),
        },
        "sd3.5_large": {
            **_SD3,
            "depth": 38,
            "width": 2432,
            "num_heads": 38,
            "pos_embed_max_size": 192,
            "qk_norm": "rms",
        },
    },
    # Depths that give MMDiT's parameters at the same width: 25 D^2 a block here, 36 D^2 there less 13 D^2 in the last.
    "crossdit": {
        "tiny": {"patch_size": 2, "depth": 6, "width": 256, "num_heads": 4, "mlp_ratio": 3.5, **_SMALL_TABLE},
        "S": {"patch_size": 2, "depth": 11, "width": 384, "num_heads": 6, **_TABLE},
        "B": {"patch_size": 2, "depth": 11, "width": 768, "num_heads": 12, **_TABLE},
        "L": {"patch_size": 2, "depth": 24, "width": 1024, "num_heads": 16, **_TABLE},
    },
    # `ff_mult` brings the parameters to MMDiT's. `norm_groups` keeps 16 channels or more in a group: below that torch's
    # GroupNorm in channels_last is not vectorised on CPU (with 2 channels 70 x slower, 28 % of a training step).
    "unet": {
        "tiny": {
            "model_channels": 64,
            "channel_mult": (1, 2, 3),
            "num_res_blocks": 1,
            "transformer_depth": (1, 1, 1),
            "linear_projection": True,
            "ff_mult": 1.5,
            "norm_groups": 4,
        },
        "S": {
            "model_channels": 128,
            "channel_mult": (1, 2, 3),
            "num_res_blocks": 1,
            "transformer_depth": (1, 1, 1),
            "linear_projection": True,
            "ff_mult": 2.625,
            "norm_groups": 8,
        },
        "B": {
            "model_channels": 192,
            "channel_mult": (1, 2, 3),
            "num_res_blocks": 2,
            "transformer_depth": (1, 1, 2),
            "linear_projection": True,
            "ff_mult": 3.0,
            "norm_groups": 8,
        },
        "L": {
            "model_channels": 320,
            "channel_mult": (1, 2, 4),
            "num_res_blocks": 2,
            "transformer_depth": (1, 1, 2),
            "linear_projection": True,
            "ff_mult": 2.0,
            "norm_groups": 16,
        },
        "sd1.5": {
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 320,
            "channel_mult": (1, 2, 4, 4),
            "num_res_blocks": 2,
            "transformer_depth": (1, 1, 1, 0),
            "num_heads": 8,
            "context_dim": 768,
            "pooled_dim": None,
        },
        "sdxl": {
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 320,
            "channel_mult": (1, 2, 4),
            "num_res_blocks": 2,
            "transformer_depth": (0, 2, 10),
            "middle_transformer_depth": 10,
            "linear_projection": True,
            "context_dim": 2048,
            "pooled_dim": 2816,
            "size_embed_dim": 256,
        },
    },
}


def used_streams(streams: Mapping[str, int], use: Sequence[str] | None, absent: str) -> dict[str, int]:
    """Return those streams (of an entry of `STREAM_WIDTHS`) that a context has under `encoders.use` and `absent`."""
    if use is None or absent != "nothing":
        return dict(streams)
    speaking = {"t5" if name == "t5" else "clip" for name in use}
    return {name: width for name, width in streams.items() if name in speaking}


def pooled_width(text: dict[str, int], pooled: str) -> int | None:
    """Return G of text encoders (an entry of `ENCODER_WIDTHS`) under `encoders.pooled`; None: no pooled vector."""
    widths = {"clip": text["pooled_dim"], "clip+t5": text["pooled_dim"] + text["context_dim"]}
    return widths.get(pooled)
