"""Named sizes of each backbone, and the widths of known encoders: literal tables, standard library only.

The rows `tiny`, `S`, `B`, `L` leave out the encoder-dependent widths (in/out channels, context, pooled); `RunConfig`
fills those from the chosen encoders. The released sizes state everything (facts: Stability-AI/sd3-ref and sd3.5
shapes; SD1.5 and SDXL U-Net configs). Parameter counts stand in tests/models/test_presets.py and are recomputed there.
"""

from __future__ import annotations

from typing import Any

# context_dim E, pooled_dim G of text encoders; channels C, downsampling factor of VAEs. Keys: values of `encoders.*`.
ENCODER_WIDTHS: dict[str, dict[str, int]] = {"tiny": {"context_dim": 256, "pooled_dim": 224}}
VAE_WIDTHS: dict[str, dict[str, int]] = {"tiny": {"channels": 16, "factor": 8}}

_SMALL_TABLE = {"pos_embed_max_size": 32, "pos_embed_base_size": 4}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "mmdit": {
        "tiny": {"patch_size": 2, "depth": 6, "width": 256, "num_heads": 4, **_SMALL_TABLE},
    },
    "crossdit": {
        "tiny": {"patch_size": 2, "depth": 8, "width": 256, "num_heads": 4, **_SMALL_TABLE},
    },
    "unet": {
        "tiny": {
            "model_channels": 64,
            "channel_mult": (1, 2, 3),
            "num_res_blocks": 1,
            "transformer_depth": (1, 1, 1),
            "head_dim": 64,
            "linear_projection": True,
        },
    },
}
