"""The parts of a run: one frozen class per room, each with its defaults and its own checks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic_core import PydanticCustomError

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Config(BaseModel):
    """Frozen, no unknown fields, no NaN or infinity, and no switch where a number is wanted."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, tree: Any) -> Any:
        """YAML reads a bare no as False, which Python would take for 0: `guidance_scale: no` is not a scale of 0."""
        for name, value in tree.items() if isinstance(tree, dict) else ():
            field = cls.model_fields.get(str(name))
            switches = [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, bool)]
            if field is not None and switches and not _takes_switches(field.annotation):
                raise PydanticCustomError(
                    "switch",
                    "{field}: got {value}, but this is no switch; YAML reads a bare no, off, yes or on as False or "
                    "True: write the number (0 where that switches something off), or put a word into quotes",
                    {"field": str(name), "value": str(switches[0])},
                )
        return tree


def _takes_switches(annotation: Any) -> bool:
    """Say whether False and True are values of an annotation; what is in a dictionary is looked at elsewhere."""
    if annotation in (bool, Any):
        return True
    return any(_takes_switches(part) for part in get_args(annotation))


# --- diffusion --------------------------------------------------------------------------------------------------


class RectifiedFlowConfig(Config):
    """alpha = 1 - t, sigma = t, after the shift t -> s t / (1 + (s - 1) t). arXiv:2403.03206, Eq. 23."""

    name: Literal["rectified_flow"] = "rectified_flow"
    shift: PositiveFloat = 1.0


class VariancePreservingConfig(Config):
    """DDPM. Defaults: the betas of Stable Diffusion. Source: Ho et al. 2020, arXiv:2006.11239."""

    name: Literal["variance_preserving"] = "variance_preserving"
    betas: Literal["linear", "scaled_linear", "cosine", "constant"] = "scaled_linear"
    beta_start: PositiveFloat = 0.00085
    beta_end: PositiveFloat = 0.012
    num_steps: PositiveInt = 1000

    @model_validator(mode="after")
    def _fits(self) -> VariancePreservingConfig:
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"need 0 < beta_start <= beta_end < 1, got {self.beta_start} and {self.beta_end}")
        return self


class UniformConfig(Config):
    """t uniform on (0, 1)."""

    name: Literal["uniform"] = "uniform"


class LogitNormalConfig(Config):
    """t = sigmoid(u), u normal. arXiv:2403.03206, Eq. 19; mean > 0 biases towards noise."""

    name: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: PositiveFloat = 1.0


class ModeConfig(Config):
    """Mode sampling with heavy tails. arXiv:2403.03206, Eq. 20."""

    name: Literal["mode"] = "mode"
    scale: Annotated[float, Field(ge=-1.0, le=1.7519383938841662)] = 1.29  # at most 2 / (pi - 2)


class CosMapConfig(Config):
    """The density of the cosine schedule for rectified flow. arXiv:2403.03206, Eq. 21."""

    name: Literal["cosmap"] = "cosmap"


ScheduleConfig = Annotated[RectifiedFlowConfig | VariancePreservingConfig, Field(discriminator="name")]
DensityConfig = Annotated[UniformConfig | LogitNormalConfig | ModeConfig | CosMapConfig, Field(discriminator="name")]
Prediction = Literal["velocity", "epsilon", "v", "sample"]


class DiffusionConfig(Config):
    """What noise is, what the network predicts, and how training draws t. One object for train, eval and sampling."""

    schedule: ScheduleConfig = RectifiedFlowConfig()
    prediction: Prediction = "velocity"
    density: DensityConfig = LogitNormalConfig()


SamplerName = Literal["euler", "heun", "ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sd35"]
GridName = Literal["linear", "release", "leading", "karras"]


NegativeGuidance = Literal["cfg", "none", "skip_layer", "kv_subtract", "nag"]


class SkipLayerConfig(Config):
    """Skip-layer guidance, beside CFG: + scale (cond - cond without the layers). Defaults: SD3.5-medium's release."""

    scale: NonNegativeFloat = 2.5
    layers: tuple[NonNegativeInt, ...] = Field(default=(7, 8, 9), min_length=1)  # numbers of blocks
    start: Probability = 0.01  # active while start < 1 - t < end
    end: Probability = 0.20


class KVSubtractConfig(Config):
    """The image reads keys K(pos) - weight K(neg), values likewise; 0 is off."""

    weight: NonNegativeFloat = 0.5


class NAGConfig(Config):
    """Normalised attention guidance; scale 1 is off. Defaults: its release. Source: arXiv:2505.21179."""

    scale: Annotated[float, Field(ge=1.0)] = 5.0
    tau: PositiveFloat = 2.5  # most by which the L1 norm of an attention's output may grow
    alpha: Probability = 0.25  # share of the extrapolated output


class SamplingConfig(Config):
    """Inference. `guidance_scale` 1 is off: the second half of the batch is then not computed.

    `negative_guidance` says what is done with the negative prompt (or the run's null, where there is none):

        cfg          null + guidance_scale (cond - null)
        skip_layer   the same, and pushed away from the network without some blocks
        kv_subtract  in attention: keys and values of the negative text are subtracted; no CFG
        nag          in attention: what is read from the negative text is extrapolated away from; no CFG
        none         nothing

    `guidance_scale` is read by `cfg` and `skip_layer`. Outside `guidance_interval` none acts.
    """

    sampler: SamplerName = "euler"
    grid: GridName = "linear"
    num_steps: PositiveInt = 28
    guidance_scale: Annotated[float, Field(ge=0.0, le=100.0)] = 4.0
    eta: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0  # ddim only
    variance: Literal["beta", "posterior"] = "posterior"  # ddpm only
    negative_guidance: NegativeGuidance = "cfg"
    guidance_interval: tuple[Probability, Probability] = (0.0, 1.0)  # of t
    skip_layer: SkipLayerConfig = SkipLayerConfig()
    kv_subtract: KVSubtractConfig = KVSubtractConfig()
    nag: NAGConfig = NAGConfig()

    @model_validator(mode="after")
    def _fits(self) -> SamplingConfig:
        low, high = self.guidance_interval
        if low > high:
            raise ValueError(f"guidance_interval must be [low, high] in t, low first, got [{low}, {high}]")
        if self.skip_layer.start >= self.skip_layer.end:
            raise ValueError(
                f"skip_layer acts while start < 1 - t < end; got start {self.skip_layer.start}, end "
                f"{self.skip_layer.end}"
            )
        return self

    def in_effect(self) -> dict[str, Any]:
        """Return the fields that decide a picture, as YAML types: of the kinds of guidance the chosen one alone."""
        tree = self.model_dump(mode="json")
        for kind in ("skip_layer", "kv_subtract", "nag"):
            if kind != self.negative_guidance:
                del tree[kind]
        if self.negative_guidance == "cfg":  # as before there were others: stored results stay comparable
            del tree["negative_guidance"]
        elif self.negative_guidance != "skip_layer":
            del tree["guidance_scale"]
        if self.guidance_interval == (0.0, 1.0):
            del tree["guidance_interval"]
        return tree


# --- encoders ---------------------------------------------------------------------------------------------------


EncoderName = Literal["clip_l", "clip_g", "t5"]


class CaptionDropoutConfig(Config):
    """Probabilities in training. SD3: caption 0, each encoder 0.464: one in ten has no text (arXiv:2403.03206, B.3)."""

    caption: Probability = 0.1  # the whole caption at once
    clip_l: Probability = 0.0
    clip_g: Probability = 0.0
    t5: Probability = 0.0


class EncodersConfig(Config):
    """Text and pixels to tensors. `tiny` is the embedded default; otherwise the path of a folder.

    Latents are best learnt where each channel has mean 0 and deviation 1 on the data at hand: `latent_shift` and
    `latent_scale`, one number or one per channel, replace the VAE's own; `scripts/cache.py --statistics` measures them.
    """

    text: str = "tiny"
    vae: str = "tiny"
    latent_shift: float | tuple[float, ...] | None = None  # None: the VAE's
    latent_scale: PositiveFloat | tuple[PositiveFloat, ...] | None = None
    use: tuple[EncoderName, ...] | None = None  # None: all that are there; (): none, an unconditional run
    absent: Literal["zeros", "nothing"] = "zeros"  # what a stream leaves of which no encoder is in use
    t5_length: PositiveInt = 77
    padding: Literal["attend", "mask", "trim"] = "trim"
    pooled: Literal["clip", "clip+t5", "none"] = "clip"  # what modulates beside time; `mmdit.encoders.axes`
    pooled_at: Literal["end", "mean"] = "end"  # where CLIP's pooled vector is taken
    null: Literal["zeros", "empty_caption"] = "zeros"
    dropout: CaptionDropoutConfig = CaptionDropoutConfig()
    posterior: Literal["mean", "sample"] = "mean"  # training latents: the VAE's mean, or drawn anew each time

    @model_validator(mode="after")
    def _fits(self) -> EncodersConfig:
        if self.use is not None and len(set(self.use)) != len(self.use):
            raise ValueError(f"use names an encoder twice: {list(self.use)}")
        if self.use == () and self.absent == "nothing":
            raise ValueError("absent 'nothing' leaves no token at all where use is []; use 'zeros'")
        if self.pooled == "none" and self.pooled_at != "end":
            raise ValueError("pooled_at says where the pooled vector is taken, but pooled is 'none'; leave it out")
        absent = [name for name in get_args(EncoderName) if self.use is not None and name not in self.use]
        dropped = [f"dropout.{name}" for name in absent if getattr(self.dropout, name)]
        if dropped:
            raise ValueError(
                f"{', '.join(dropped)} would drop what is not there: use is {list(self.use or ())}; set it to 0, or "
                f"name the encoder in use"
            )
        return self


class VAEConfig(Config):
    """AutoencoderKL. Defaults: the VAE of SD3 and SD3.5. Source: Rombach et al. 2022, arXiv:2112.10752, and its shapes.

    `latents = (mean - shift) * scale`: one number for all channels as in the releases (SD3 0.0609 / 1.5305, SD1
    0 / 0.18215, SDXL 0 / 0.13025), or one per channel.
    """

    block_channels: tuple[PositiveInt, ...] = (128, 256, 512, 512)
    num_res_blocks: PositiveInt = 2  # per stage of the encoder; the decoder has one more
    latent_channels: PositiveInt = 16
    use_quant_conv: bool = False  # 1x1 convolutions around the latents: SD1 and SDXL
    mid_attention: bool = True
    norm_groups: PositiveInt = 32
    stem_patch: Literal[1, 2] = 1  # 2: the network begins with a pixel-unshuffle and ends with a pixel-shuffle
    shift: float | tuple[float, ...] = 0.0609
    scale: PositiveFloat | tuple[PositiveFloat, ...] = 1.5305
    clamp: bool = False  # decoded pixels to [-1, 1]; the releases leave that to whoever writes the picture

    @property
    def factor(self) -> int:
        """Pixels per latent along one side."""
        return self.stem_patch * 2 ** (len(self.block_channels) - 1)

    @model_validator(mode="after")
    def _fits(self) -> VAEConfig:
        for channels in self.block_channels:
            if channels % self.norm_groups:
                raise ValueError(f"block_channels has {channels}, not a multiple of norm_groups={self.norm_groups}")
        for name, value in (("shift", self.shift), ("scale", self.scale)):
            if isinstance(value, tuple) and len(value) != self.latent_channels:
                raise ValueError(f"{name} has {len(value)} numbers for {self.latent_channels} latent channels")
        return self


# --- data -------------------------------------------------------------------------------------------------------


class ShapesConfig(Config):
    """Procedural scenes; every scene is a pure function of (seed, index)."""

    name: Literal["shapes"] = "shapes"
    num_images: PositiveInt = 32_000
    resolution: Literal[64] = 64
    max_objects: Annotated[int, Field(ge=1, le=6)] = 2
    captions: Literal["short", "long", "both"] = "short"
    seed: NonNegativeInt = 0


class EmojiConfig(Config):
    """Noto emoji with Unicode's English names; `scripts/build_emoji.py` makes the file."""

    name: Literal["emoji"] = "emoji"
    path: Path = Path("data/emoji.parquet")
    resolution: PositiveInt = 64
    flip: bool = False


class ImagesConfig(Config):
    """Any `datasets` source with an image and a text column: folder with metadata, parquet, local path or hub name."""

    name: Literal["images"] = "images"
    source: str
    split: str = "train"
    image_column: str = "image"
    caption_column: str = "text"
    resolution: PositiveInt = 256
    val_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.02
    on_error: Literal["fail", "skip"] = "fail"  # corrupt image or empty caption
    clean_captions: bool = True  # repair mojibake and HTML entities, as CLIP's training did
    # sizes (height, width) in pixels that pictures keep their shape in; `auto`: sides of multiples of an eighth of
    # `resolution`, of about its area, up to 2 : 1; (): the middle square of each picture
    buckets: Literal["auto"] | tuple[tuple[PositiveInt, PositiveInt], ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> ImagesConfig:
        if self.buckets == "auto" and self.resolution % 8:
            raise ValueError(f"buckets 'auto' need a resolution that is a multiple of 8, got {self.resolution}")
        if len(set(self.buckets)) != len(self.buckets):
            raise ValueError(f"buckets lists a size twice: {self.buckets}")
        return self


class ShardsConfig(Config):
    """Pictures and captions in tar shards (a.jpg beside a.txt or a.json) or parquet shards (two columns)."""

    name: Literal["shards"] = "shards"
    source: str  # a folder, a file, or a pattern such as pictures/*.tar
    image_column: str = "image"  # parquet: bytes, or the {bytes, path} of `datasets`
    caption_column: str = "text"  # parquet; in a tar the field of a.json
    resolution: PositiveInt = 256
    val_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.001
    on_error: Literal["fail", "skip"] = "fail"  # skip: the next good item stands in for a bad one
    clean_captions: bool = True
    lanes: PositiveInt = (
        8  # places in the epoch read side by side; divides train.batch_size, best a multiple of processes
    )
    index: Path | None = None  # where the indices of tars are kept; None: beside them


DataConfig = Annotated[ShapesConfig | EmojiConfig | ImagesConfig | ShardsConfig, Field(discriminator="name")]


# --- training ---------------------------------------------------------------------------------------------------


class EMAConfig(Config):
    """One more average of the parameters: a constant decay, or the power function of relative width `sigma_rel`.

    Source of the latter: Karras et al. 2023, arXiv:2312.02696, section 3.1; 0.05 to 0.15 is usual.
    """

    decay: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    sigma_rel: Annotated[float, Field(gt=0.0, lt=0.28)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> EMAConfig:
        if (self.decay is None) == (self.sigma_rel is None):
            raise ValueError("give one of decay (a constant average) and sigma_rel (a power-function average)")
        return self


class TrainConfig(Config):
    """One training run. Budgets and intervals are counted in images; 0 switches an interval off."""

    images: PositiveInt = 1_000_000
    seconds: PositiveFloat | None = None  # of training: stop there where it comes first; lr then falls with seconds
    batch_size: PositiveInt = 128  # global: over all processes and accumulation steps
    accumulation: PositiveInt = 1
    lr: PositiveFloat = 1e-4
    betas: tuple[Probability, Probability] = (0.9, 0.99)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip_norm: PositiveFloat | None = 1.0
    warmup_images: NonNegativeInt = 10_000
    lr_schedule: Literal["constant", "cosine", "linear"] = "cosine"
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    more_emas: dict[str, EMAConfig] = {}  # further averages by name; `--weights ema-<name>` samples from one
    precision: Literal["fp32", "bf16"] = "bf16"
    precompute: bool = True  # encode latents and captions once, before the first step
    cache_dir: Path | None = None  # where they are kept; None: <run>/cache
    verify_cache: bool = True  # compare a cache with its SHA-256 at start; false for more than a disk reads in a minute
    require_cache: bool = False  # encode nothing: a cache that is missing or of other settings is refused
    compile: bool = False  # torch.compile of the repeated block
    activation_checkpointing: bool = False  # by block: a third more time for a fraction of the memory
    num_processes: PositiveInt = 1  # asserted, not set: launch with torchrun or accelerate
    sharding: Literal["none", "fsdp2", "hsdp"] = "none"  # none: every process holds the model (DDP)
    shard_size: PositiveInt | None = None  # hsdp: processes that share one copy of the model; None: those of a machine
    timeout: PositiveInt = 600  # seconds a process waits for the others before it gives up
    max_skips: NonNegativeInt = 0  # updates in a row left out for a loss or gradient that is not finite; then it stops
    async_checkpoints: bool = False  # copied to host memory in the step, written by a thread; takes a copy's memory
    save_retries: NonNegativeInt = 3  # checkpoints in a row that may fail (disk full); training goes on meanwhile
    log_every: NonNegativeInt = 2_560
    validate_every: NonNegativeInt = 100_000
    sample_every: NonNegativeInt = 100_000
    checkpoint_every: NonNegativeInt = 100_000
    keep_checkpoints: PositiveInt = 3
    keep_every: NonNegativeInt = 0  # checkpoints at multiples of this are never pruned (the study's snapshots)
    val_images: PositiveInt = 512
    val_levels: Annotated[int, Field(ge=2)] = (
        8  # equidistant t; the mean leaves out the last (t = 1), as the paper does
    )
    sample_prompts: tuple[str, ...] = ()  # empty: captions of the validation split
    tensorboard: bool = True
    wandb: bool = False  # pip install "mmdit-lab[wandb]"; WANDB_MODE=offline keeps it on this machine
    peak_tflops: PositiveFloat | None = None  # of one device, for MFU; None: known for common GPUs, else left out

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.batch_size % (self.accumulation * self.num_processes):
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by accumulation x num_processes = "
                f"{self.accumulation} x {self.num_processes}"
            )
        if self.images < self.batch_size:
            raise ValueError(f"images {self.images} is less than one batch of {self.batch_size}")
        if self.shard_size is not None and self.sharding != "hsdp":
            raise ValueError(f"shard_size is read by sharding 'hsdp' only, got sharding {self.sharding!r}")
        odd = [name for name in self.more_emas if not re.fullmatch(r"[a-z0-9_]+", name)]
        if odd:
            raise ValueError(f"names of more_emas are a-z, 0-9 and _, got {', '.join(map(repr, odd))}")
        return self

    def unreached_lr(self) -> str | None:
        """Say that the budget ends before the learning rate has risen to its value, where it does."""
        whole = self.images // self.batch_size * self.batch_size
        if whole >= self.warmup_images:
            return None
        return (
            f"the budget of {whole:,} images ends within the warm-up of {self.warmup_images:,}, so the learning rate "
            f"never reaches {self.lr:g}; lower train.warmup_images, or train longer"
        )
