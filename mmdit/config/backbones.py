"""The backbones: one config each, and which of their choices go together.

Fields by which text enters (docs/conditioning.md draws each):

    injection        joint      text tokens are updated beside the image's and share its attention
                     cross      image tokens read the text, which stays as it came
                     decoupled  as cross, with one cross-attention per encoder stream; outputs are summed
                     pooled     no text tokens: the pooled vector alone
    text_projection  shared       one linear map for all streams, zero-padded to one width, as in SD3
                     per_encoder  one for each stream, on its real width
    text_streams     {name: width} of each encoder's part of the context; read by `decoupled`, `per_encoder` and
                     `weight_sets: 3`. A run fills it in from encoders it knows.
    pooled_dim       None: modulation from time alone
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from mmdit.config.parts import Config

Injection = Literal["joint", "cross", "decoupled", "pooled"]
Projection = Literal["shared", "per_encoder"]


def _pairs(streams: Any) -> Any:
    return tuple(streams.items()) if isinstance(streams, dict) else streams


# {name: width}, in the order of the context; kept as pairs so that a config can be hashed
TextStreams = Annotated[
    tuple[tuple[str, PositiveInt], ...],
    BeforeValidator(_pairs),
    PlainSerializer(lambda streams: dict(streams), return_type=dict[str, int]),
]

_NOT_HERE = {
    ("mmdit", "cross"): "an MMDiT updates its text; blocks that read it by cross-attention are model.name: crossdit",
    ("mmdit", "decoupled"): "an MMDiT has no cross-attention to decouple; use model.name: crossdit, or weight_sets: 3",
    ("crossdit", "joint"): "a CrossDiT never updates its text; joint attention in such blocks is model.name: mmdit",
}


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
    pooled_dim: PositiveInt | None = 2048
    qk_norm: Literal["rms"] | None = None
    dual_attention_layers: tuple[NonNegativeInt, ...] = ()
    pos_embed_max_size: PositiveInt = 192  # patches per side of the stored table
    pos_embed_base_size: PositiveInt = 64  # patches per side that span 16 units of position (arXiv:2403.03206, 5.3.2)
    injection: Injection = "joint"
    weight_sets: Literal[1, 2, 3] = (
        2  # 1: text and image share; 2: one each (SD3); 3: one for each of two streams, image
    )
    text_projection: Projection = "shared"
    text_streams: TextStreams | None = None

    @model_validator(mode="after")
    def _fits(self) -> MMDiTConfig:
        _check_heads(self.width, self.num_heads)
        wrong = [i for i in self.dual_attention_layers if i >= self.depth]
        if wrong:
            raise ValueError(f"dual_attention_layers {wrong} do not exist; depth is {self.depth}")
        if self.dual_attention_layers and self.injection == "joint" and self.weight_sets == 1:
            raise ValueError(
                "dual_attention_layers give the image an attention of its own, which weight_sets: 1 shares with the "
                "text; leave them out or use weight_sets: 2"
            )
        _check_text(self, self.weight_sets)
        return self


class CrossDiTConfig(Config):
    """DiT with cross-attention to the text, adaLN from time and pooled text."""

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
    pooled_dim: PositiveInt | None = 2048
    qk_norm: Literal["rms"] | None = None
    pos_embed_max_size: PositiveInt = 192
    pos_embed_base_size: PositiveInt = 64
    injection: Injection = "cross"
    text_projection: Projection = "shared"
    text_streams: TextStreams | None = None

    @model_validator(mode="after")
    def _fits(self) -> CrossDiTConfig:
        _check_heads(self.width, self.num_heads)
        _check_text(self)
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
    pooled_dim: PositiveInt | None = None  # None: text enters by its tokens alone
    size_embed_dim: PositiveInt | None = None  # SDXL 256: `pooled` ends with six sizes, each embedded in this width
    norm_groups: PositiveInt = 32
    injection: Injection = "cross"
    weight_sets: Literal[1, 2, 3] = 2  # of `joint`, as in MMDiT
    text_projection: Projection = "shared"  # `shared`: `cross` reads the states as they come, as the releases do
    text_streams: TextStreams | None = None
    text_stages: tuple[NonNegativeInt | Literal["middle"], ...] | None = None  # that read text tokens; None: all
    text_in_query: bool = False  # adds a projection of the pooled text to the image's queries where they read text

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
        _check_text(self, self.weight_sets)
        if self.injection == "decoupled" and self.text_projection == "per_encoder":
            raise ValueError(
                "text_projection 'per_encoder' is what injection 'decoupled' does in a U-Net anyway: each stream has "
                "keys and values of its own, read at its real width; leave it out"
            )
        self._check_stages()
        return self

    def _check_stages(self) -> None:
        """Refuse stages that have no transformer to read text with, and queries without a pooled vector."""
        if self.text_in_query and (self.pooled_dim is None or self.injection == "pooled"):
            why = "pooled_dim is None" if self.pooled_dim is None else "with injection 'pooled' no queries read text"
            raise ValueError(f"text_in_query adds the pooled text to queries, but {why}; leave it out")
        existing = self.transformer_stages
        if self.injection in ("joint", "decoupled") and not existing:
            raise ValueError(f"injection {self.injection!r} needs transformers, but transformer_depth is 0 everywhere")
        if self.text_stages is None:
            return
        if self.injection == "pooled" or not self.text_stages:
            raise ValueError("a U-Net without text tokens in any stage is injection: pooled; leave text_stages out")
        wrong = [stage for stage in self.text_stages if stage not in existing]
        if wrong:
            raise ValueError(f"text_stages {wrong} have no transformers; those that have are {list(existing)}")

    @property
    def transformer_stages(self) -> tuple[int | str, ...]:
        """The stages that have transformers, with "middle" for the middle block."""
        stages: list[int | str] = [stage for stage, depth in enumerate(self.transformer_depth) if depth]
        return (*stages, *(["middle"] if self.middle_transformer_depth else []))

    @property
    def reading_stages(self) -> tuple[int | str, ...]:
        """The stages whose transformers read text tokens."""
        if self.injection == "pooled":
            return ()
        return self.transformer_stages if self.text_stages is None else self.text_stages


ModelConfig = Annotated[MMDiTConfig | CrossDiTConfig | UNetConfig, Field(discriminator="name")]


def _check_heads(width: int, num_heads: int) -> None:
    if width % num_heads or (width // num_heads) % 2:
        raise ValueError(f"width {width} does not split into {num_heads} heads of even size; choose a multiple")
    if width % 4:
        raise ValueError(f"width {width} is not a multiple of 4, which the 2-D position grid needs")


def reads_streams(model: MMDiTConfig | CrossDiTConfig | UNetConfig) -> bool:
    """Tell whether the weights of a backbone differ between encoder streams."""
    per_stream = model.injection == "decoupled" or model.text_projection == "per_encoder"
    return per_stream or (not isinstance(model, CrossDiTConfig) and model.weight_sets == 3)


def num_blocks(model: MMDiTConfig | CrossDiTConfig | UNetConfig) -> int:
    """Count the blocks that `skip_layers` can leave out."""
    if not isinstance(model, UNetConfig):
        return model.depth
    return sum(model.transformer_depth) * (2 * model.num_res_blocks + 1) + model.middle_transformer_depth


def _check_text(model: MMDiTConfig | CrossDiTConfig | UNetConfig, weight_sets: int = 2) -> None:
    """Refuse choices of how text enters that exclude each other."""
    injection = model.injection
    if (model.name, injection) in _NOT_HERE:
        raise ValueError(f"injection {injection!r}: {_NOT_HERE[model.name, injection]}")
    if injection == "pooled":
        if model.pooled_dim is None:
            raise ValueError("injection 'pooled' has nothing to read, pooled_dim is None; give it the encoders' width")
        if model.text_projection != "shared":
            raise ValueError("text_projection maps text tokens, of which injection 'pooled' has none; leave it out")
    if weight_sets != 2 and injection != "joint":
        raise ValueError(f"weight_sets {weight_sets} counts the sets of joint attention; injection is {injection!r}")
    if not reads_streams(model):
        return
    streams = model.text_streams
    if not streams:
        raise ValueError(
            "these weights differ between encoders, so text_streams must name each stream and its width, such as "
            "{clip: 2048, t5: 4096} for SD3's encoders"
        )
    if len(dict(streams)) != len(streams):
        raise ValueError(f"text_streams names a stream twice: {[name for name, _ in streams]}")
    if weight_sets == 3 and len(streams) != 2:
        raise ValueError(f"weight_sets 3 needs two text streams beside the image, text_streams has {len(streams)}")
    wide = [name for name, width in streams if width > model.context_dim]
    if wide:
        raise ValueError(f"text_streams {wide} are wider than context_dim {model.context_dim}")
