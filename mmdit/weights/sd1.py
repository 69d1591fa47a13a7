"""The U-Net of SD1.x: original names to diffusers' and back. The config of SD1.5 is the preset `sd1.5`.

Both directions are pure: a dictionary of tensors and a config in, a dictionary of the same tensors out.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mmdit.config import UNetConfig
from mmdit.weights import unet_keys

PREFIX = unet_keys.PREFIX


def to_diffusers(state: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Rename original keys (no prefix) to those of diffusers' UNet2DConditionModel.

    Raises:
        ValueError: a key does not fit the config, or the config has a pooled vector, which SD1.x does not.
    """
    return unet_keys.to_diffusers(state, _checked(config))


def from_diffusers(state: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Rename diffusers' keys to the original ones; the inverse of `to_diffusers`.

    Raises:
        ValueError: as `to_diffusers`.
    """
    return unet_keys.from_diffusers(state, _checked(config))


def _checked(config: UNetConfig) -> UNetConfig:
    if config.pooled_dim is not None:
        raise ValueError(
            f"SD1.x has no pooled vector, got pooled_dim={config.pooled_dim}; set it to None or use mmdit.weights.sdxl"
        )
    return config
