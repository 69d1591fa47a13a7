"""The backbones: one config each, and which of their choices go together."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from mmdit.config.parts import Config


class MMDiTConfig(Config):
    """MMDiT. Defaults: SD3-medium. Source: Esser et al. 2024, arXiv:2403.03206, and the released shapes."""

    name: Literal["mmdit"] = "mmdit"
    preset: str | None = None
    in_channels: PositiveInt = 16
    out_channels: PositiveInt = 16
    patch_size: PositiveInt = 2
    depth: PositiveInt = 24
    width: PositiveInt = 1536
    num_heads: PositiveInt = 24
    mlp_ratio: PositiveFloat = 4.0
    context_dim: PositiveInt = 4096
    pooled_dim: PositiveInt = 2048
    qk_norm: Literal["rms"] | None = None
    dual_attention_layers: tuple[NonNegativeInt, ...] = ()
    pos_embed_max_size: PositiveInt = 192  # patches per side of the stored table
    pos_embed_base_size: PositiveInt = 64  # patches per side that span 16 units of position (arXiv:2403.03206, 5.3.2)

    @model_validator(mode="after")
    def _fits(self) -> MMDiTConfig:
        _check_heads(self.width, self.num_heads)
        wrong = [i for i in self.dual_attention_layers if i >= self.depth]
        if wrong:
            raise ValueError(f"dual_attention_layers {wrong} do not exist; depth is {self.depth}")
        return self


class CrossDiTConfig(Config):
    """DiT with cross-attention to the concatenated context, adaLN from time and pooled text."""

    name: Literal["crossdit"] = "crossdit"
    preset: str | None = None
    in_channels: PositiveInt = 16
    out_channels: PositiveInt = 16
    patch_size: PositiveInt = 2
    depth: PositiveInt = 24
    width: PositiveInt = 1536
    num_heads: PositiveInt = 24
    mlp_ratio: PositiveFloat = 4.0
    context_dim: PositiveInt = 4096
    pooled_dim: PositiveInt = 2048
    qk_norm: Literal["rms"] | None = None
    pos_embed_max_size: PositiveInt = 192
    pos_embed_base_size: PositiveInt = 64

    @model_validator(mode="after")
    def _fits(self) -> CrossDiTConfig:
        _check_heads(self.width, self.num_heads)
        return self


class UNetConfig(Config):
    """U-Net of SD1.x and SDXL. Defaults: SD1.5 with 64-channel heads. Source: Rombach et al. 2022, arXiv:2112.10752."""

    name: Literal["unet"] = "unet"
    preset: str | None = None
    in_channels: PositiveInt = 4
    out_channels: PositiveInt = 4
    model_channels: PositiveInt = 320
    channel_mult: tuple[PositiveInt, ...] = (1, 2, 4, 4)
    num_res_blocks: PositiveInt = 2
    transformer_depth: tuple[NonNegativeInt, ...] = (1, 1, 1, 0)  # per stage; 0 = no attention at that stage
    middle_transformer_depth: NonNegativeInt = 1
    head_dim: PositiveInt = 64  # ignored where num_heads is given
    num_heads: PositiveInt | None = None  # fixed count of heads in every stage (SD1.5: 8)
    linear_projection: bool = False  # proj_in / proj_out of the transformers: Linear (SDXL) or 1x1 convolution
    ff_mult: PositiveFloat = 4.0
    context_dim: PositiveInt = 768
    pooled_dim: PositiveInt | None = None  # None: text enters by cross-attention alone
    norm_groups: PositiveInt = 32

    @model_validator(mode="after")
    def _fits(self) -> UNetConfig:
        if len(self.transformer_depth) != len(self.channel_mult):
            raise ValueError(
                f"transformer_depth has {len(self.transformer_depth)} entries, channel_mult {len(self.channel_mult)}; "
                f"give one number per stage"
            )
        for stage, (mult, depth) in enumerate(zip(self.channel_mult, self.transformer_depth, strict=True)):
            channels = mult * self.model_channels
            if channels % self.norm_groups:
                raise ValueError(
                    f"stage {stage} has {channels} channels, not a multiple of norm_groups={self.norm_groups}"
                )
            heads = self.num_heads or max(1, channels // self.head_dim)
            if depth and channels % heads:
                raise ValueError(f"stage {stage} has {channels} channels, not divisible into {heads} heads")
            if depth and self.num_heads is None and channels % self.head_dim:
                raise ValueError(f"stage {stage} has {channels} channels, not a multiple of head_dim={self.head_dim}")
        return self


ModelConfig = Annotated[MMDiTConfig | CrossDiTConfig | UNetConfig, Field(discriminator="name")]


def _check_heads(width: int, num_heads: int) -> None:
    if width % num_heads or (width // num_heads) % 2:
        raise ValueError(f"width {width} does not split into {num_heads} heads of even size; choose a multiple")
    if width % 4:
        raise ValueError(f"width {width} is not a multiple of 4, which the 2-D position grid needs")
