"""Room: backbones. They know the door (`mmdit.denoiser`) and nothing of text encoders, VAE, loss or sampler."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmdit.models.crossdit import CrossDiT
from mmdit.models.mmdit import MMDiT
from mmdit.models.unet import UNet
from mmdit.registry import lookup

BACKBONES: dict[str, Any] = {"mmdit": MMDiT, "crossdit": CrossDiT, "unet": UNet}


def build_denoiser(config: Any) -> nn.Module:
    """Build the backbone that a model config (`mmdit.config.ModelConfig`) describes, freshly initialised.

    Parameters are drawn from PyTorch's global generator; seed it first (`mmdit.rng`, purpose "init").

    Raises:
        ValueError: `config.name` is no backbone; the message names the nearest one.
    """
    return lookup(BACKBONES, config.name, "backbone")(config)


__all__ = ["BACKBONES", "CrossDiT", "MMDiT", "UNet", "build_denoiser"]
