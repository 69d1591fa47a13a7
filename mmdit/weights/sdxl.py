"""The U-Net of SDXL: original names to diffusers' and back. The config of SDXL base is the preset `sdxl`.

`label_emb`, which embeds the pooled vector (1,280 numbers of OpenCLIP and 6 x 256 of the sizes), is `add_embedding` in
diffusers. Both directions are pure: a dictionary of tensors and a config in, a dictionary of the same tensors out.
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
        ValueError: a key does not fit the config, or the config has no pooled vector, which SDXL reads.
    """
    return unet_keys.to_diffusers(state, _checked(config))


def from_diffusers(state: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """Rename diffusers' keys to the original ones; the inverse of `to_diffusers`.

    Raises:
        ValueError: as `to_diffusers`.
    """
    return unet_keys.from_diffusers(state, _checked(config))


def _checked(config: UNetConfig) -> UNetConfig:
    if config.pooled_dim is None:
        raise ValueError("SDXL reads a pooled vector, got pooled_dim=None; set its width or use mmdit.weights.sd1")
    return config
