"""Every config class, and the one road from YAML and overrides to a validated object.

    config = load_config("configs/train/quickstart.yaml", ["--model.name", "unet", "--train.lr", "2e-4"])

Files, dotted overrides and the rows of a study are merged into one tree *before* one validation, so a typo gives
the same message wherever it stands: the file, the dotted path, the nearest valid name. This module imports no
torch: a wrong config is refused in a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import (  # fmt: skip
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from mmdit.presets import ENCODER_WIDTHS, PRESETS, VAE_WIDTHS
from mmdit.registry import nearest, unknown

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class ConfigError(ValueError):
    """A config that cannot be used; the message says where, what was got and what was expected."""


class Config(BaseModel):
    """Frozen, and no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# --- backbones --------------------------------------------------------------------------------------------------


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


class SamplingConfig(Config):
    """Inference. `guidance_scale` 1 is off: the second half of the batch is then not computed."""

    sampler: SamplerName = "euler"
    grid: GridName = "linear"
    num_steps: PositiveInt = 28
    guidance_scale: Annotated[float, Field(ge=0.0, le=100.0)] = 4.0
    eta: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0  # ddim only
    variance: Literal["beta", "posterior"] = "posterior"  # ddpm only


# --- encoders ---------------------------------------------------------------------------------------------------


class CaptionDropoutConfig(Config):
    """Probabilities in training. SD3: caption 0, each encoder 0.464: one in ten has no text (arXiv:2403.03206, B.3)."""

    caption: Probability = 0.1  # the whole caption at once
    clip_l: Probability = 0.0
    clip_g: Probability = 0.0
    t5: Probability = 0.0


class EncodersConfig(Config):
    """Text and pixels to tensors. `tiny` is the embedded default; otherwise the path of a folder."""

    text: str = "tiny"
    vae: str = "tiny"
    t5_length: PositiveInt = 77
    padding: Literal["attend", "mask", "trim"] = "trim"
    null: Literal["zeros", "empty_caption"] = "zeros"
    dropout: CaptionDropoutConfig = CaptionDropoutConfig()


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


DataConfig = Annotated[ShapesConfig | EmojiConfig | ImagesConfig, Field(discriminator="name")]


# --- training ---------------------------------------------------------------------------------------------------


class TrainConfig(Config):
    """One training run. Budgets and intervals are counted in images; 0 switches an interval off."""

    images: PositiveInt = 1_000_000
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
    precision: Literal["fp32", "bf16"] = "bf16"
    precompute: bool = True  # encode latents and captions once, before the first step
    cache_dir: Path | None = None  # where they are kept; None: <run>/cache
    compile: bool = False
    num_processes: PositiveInt = 1  # asserted, not set: launch with torchrun or accelerate
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

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.batch_size % (self.accumulation * self.num_processes):
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by accumulation x num_processes = "
                f"{self.accumulation} x {self.num_processes}"
            )
        if self.images < self.batch_size:
            raise ValueError(f"images {self.images} is less than one batch of {self.batch_size}")
        return self


class RunConfig(Config):
    """One training run, whole: what `config.yaml` in a run folder holds."""

    name: str = "run"
    seed: NonNegativeInt = 0
    model: ModelConfig = MMDiTConfig()
    encoders: EncodersConfig = EncodersConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    sampling: SamplingConfig = SamplingConfig()
    data: DataConfig = ShapesConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _fits(self) -> RunConfig:
        """Refuse combinations that cannot work, before torch is imported."""
        model, encoders, schedule = self.model, self.encoders, self.diffusion.schedule
        vae = VAE_WIDTHS.get(encoders.vae)
        if vae is not None:
            if self.data.resolution % vae["factor"]:
                raise ValueError(
                    f"data.resolution {self.data.resolution} is not a multiple of the VAE's factor {vae['factor']}"
                )
            side = self.data.resolution // vae["factor"]
            multiple = 2 ** (len(model.channel_mult) - 1) if isinstance(model, UNetConfig) else model.patch_size
            if side % multiple:
                raise ValueError(
                    f"latent size {side} (data.resolution {self.data.resolution} / {vae['factor']}) is not divisible "
                    f"by {multiple} ({'2^(stages-1)' if isinstance(model, UNetConfig) else 'model.patch_size'})"
                )
            if not isinstance(model, UNetConfig) and side // model.patch_size > model.pos_embed_max_size:
                raise ValueError(f"{side // model.patch_size} patches a side exceed model.pos_embed_max_size")
            if model.in_channels != vae["channels"] or model.out_channels != vae["channels"]:
                raise ValueError(
                    f"model.in_channels/out_channels are {model.in_channels}/{model.out_channels}, the VAE "
                    f"{encoders.vae!r} has {vae['channels']}; leave them out to take the VAE's"
                )
        text = ENCODER_WIDTHS.get(encoders.text)
        if text is not None and model.context_dim != text["context_dim"]:
            raise ValueError(
                f"model.context_dim is {model.context_dim}, the text encoders {encoders.text!r} give "
                f"{text['context_dim']}; leave it out to take theirs"
            )
        if text is not None and model.pooled_dim not in (None, text["pooled_dim"]):
            raise ValueError(
                f"model.pooled_dim is {model.pooled_dim}, the text encoders {encoders.text!r} give {text['pooled_dim']}"
            )
        if schedule.name == "variance_preserving" and self.diffusion.prediction == "velocity":
            raise ValueError(
                "diffusion.prediction 'velocity' belongs to rectified_flow; with variance_preserving use 'epsilon', "
                "'v' or 'sample'"
            )
        sampler, grid = self.sampling.sampler, self.sampling.grid
        if schedule.name == "rectified_flow" and sampler == "ddpm":
            raise ValueError(
                "sampling.sampler 'ddpm' is the ancestral chain of variance_preserving; with rectified_flow use "
                "'euler', 'heun', 'ddim' (with eta for noise) or 'dpmpp_2m'"
            )
        if schedule.name == "rectified_flow" and grid == "leading":
            raise ValueError("sampling.grid 'leading' is for variance_preserving; use 'linear' or 'release'")
        if self.sampling.eta and sampler != "ddim":
            raise ValueError(f"sampling.eta is read by the sampler 'ddim' only, got sampler {sampler!r}")
        return self


class SuiteConfig(Config):
    """What is measured on a run. `guidance_scale` and the like are the run's own `sampling` unless given here."""

    name: str = "default"
    metrics: tuple[str, ...] = ("composition", "clip_score", "frechet", "kernel", "validation_loss")
    num_images: PositiveInt = 1_000  # per split
    splits: tuple[Literal["seen", "heldout"], ...] = ("seen", "heldout")
    batch_size: PositiveInt = 128
    seed: NonNegativeInt = 1234
    extractor: str = "tiny_clip"
    weights: Literal["ema", "raw"] = "ema"
    sampling: SamplingConfig | None = None
    snapshot_images: NonNegativeInt = 0  # images per split at each kept earlier checkpoint; 0: final only
    grid_prompts: PositiveInt = 16  # pictures in the report's grid


class MatchConfig(Config):
    """How near the rows of a study must be to each other."""

    by: Literal["parameters"] = "parameters"
    within: Annotated[float, Field(gt=0.0, le=1.0)] = 0.05


class StudyConfig(Config):
    """Named rows of overrides over one base, and the seeds to run each with."""

    name: str
    base: Path
    rows: dict[str, dict[str, Any]]
    seeds: tuple[NonNegativeInt, ...] = (0,)
    varies: tuple[str, ...] = ("model",)  # dotted prefixes a row may change
    allow_confounded: bool = False
    match: MatchConfig | None = MatchConfig()
    overrides: dict[str, Any] = {}  # for every row: the study's own base
    suite: SuiteConfig = SuiteConfig()

    @model_validator(mode="after")
    def _fits(self) -> StudyConfig:
        if not self.rows:
            raise ValueError("a study needs at least one row under 'rows:'")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds are listed twice: {list(self.seeds)}")
        return self


# --- reading ----------------------------------------------------------------------------------------------------


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, not the last one silently."""


def _unique_mapping(loader: _UniqueKeyLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise ConfigError(f"{key_node.start_mark}: the key {key!r} stands twice; remove one")
        seen.add(key)
    # YAML reads the bare key `null` (encoders.null) as None
    mapping = yaml.SafeLoader.construct_mapping(loader, node, deep=deep)
    return {"null" if key is None else key: value for key, value in mapping.items()}


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML file as a tree.

    Raises:
        FileNotFoundError: no such file; the message names the nearest one beside it.
        ConfigError: not YAML, or not a mapping, or a key twice.
    """
    path = Path(path)
    if not path.is_file():
        beside = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        guess = nearest(str(path), beside)
        hint = f"; did you mean {guess}?" if guess else "; see configs/ for the ones that are shipped"
        raise FileNotFoundError(f"no config file {path}{hint}")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}, expected a mapping of config fields")
    return tree


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Turn `--train.lr 2e-4`, `--train.lr=2e-4` or `train.lr=2e-4` into a tree.

    Raises:
        ConfigError: an argument has no value or is no override.
    """
    tree: dict[str, Any] = {}
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        if not equals:
            if not argument.startswith("--") or not queue or (queue[0].startswith("--") and len(queue[0]) > 2):
                raise ConfigError(f"override {argument!r} has no value; write --train.lr 2e-4 or train.lr=2e-4")
            value = queue.pop(0)
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {key}: {value!r} is not valid YAML") from error
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override {key}: {parent!r} is given both a value and fields")
        node[leaf] = parsed
    return tree


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `over` on `base`, deeply; a changed `name` (or `preset`) drops the old variant's (or preset's) fields."""
    if "name" in over and "name" in base and over["name"] != base["name"] and not _is_run(base):
        return dict(over)
    result = dict(base)
    if "preset" in over and over["preset"] != base.get("preset"):
        stale = PRESETS.get(str(over.get("name", base.get("name"))), {}).get(str(base.get("preset")), {})
        result = {key: value for key, value in result.items() if key not in stale}
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merge(result[key], value)
        else:
            result[key] = value
    return result


def _is_run(tree: Mapping[str, Any]) -> bool:
    """The `name` of a run, suite or study is a label, not the choice of a variant."""
    return any(key in tree for key in ("model", "train", "data", "diffusion", "rows", "metrics", "encoders"))


def read_tree(path: str | Path) -> dict[str, Any]:
    """Read a YAML file with its `base:` (one level, relative to the file) underneath."""
    path = Path(path)
    tree = read_yaml(path)
    if "base" not in tree or "rows" in tree:
        return tree
    parent = path.parent / tree.pop("base")
    below = read_yaml(parent)
    if "base" in below:
        raise ConfigError(f"{parent}: a base may not have a base of its own; {path} builds on it")
    return merge(below, tree)


def load_config(path: str | Path | None = None, overrides: Sequence[str] | Mapping[str, Any] = ()) -> RunConfig:
    """Read a run's YAML, lay overrides on it, fill presets and widths, validate.

    Args:
        path: YAML file, or None for the defaults.
        overrides: command-line words (`["--train.lr", "2e-4"]`) or a tree.

    Raises:
        ConfigError: unknown field, wrong type, impossible combination; with file, dotted path and nearest name.
        FileNotFoundError: no such file.
    """
    tree = read_tree(path) if path is not None else {}
    extra = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    return resolve(merge(tree, extra), source=str(path or "defaults"))


def resolve(tree: Mapping[str, Any], source: str = "config") -> RunConfig:
    """Expand the preset, fill in the widths of the encoders, validate."""
    tree = _default_names(tree)
    if isinstance(tree.get("model"), Mapping):
        model = _expand_preset(dict(tree["model"]), source)
        given = tree.get("encoders")
        encoders: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
        text = ENCODER_WIDTHS.get(str(encoders.get("text", "tiny")))
        vae = VAE_WIDTHS.get(str(encoders.get("vae", "tiny")))
        if text is not None:
            model.setdefault("context_dim", text["context_dim"])
            model.setdefault("pooled_dim", text["pooled_dim"])
        if vae is not None:
            model.setdefault("in_channels", vae["channels"])
            model.setdefault("out_channels", vae["channels"])
        tree["model"] = model
    else:
        tree["model"] = tree.get("model", {"name": "mmdit", "preset": "tiny"})
        if isinstance(tree["model"], Mapping):
            return resolve(tree, source)
    return validate(RunConfig, tree, source)


def _default_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Where a variant's fields are given without its name, the default variant is meant."""
    tree = dict(tree)
    if isinstance(tree.get("data"), Mapping):
        tree["data"] = {"name": "shapes", **tree["data"]}
    if isinstance(tree.get("diffusion"), Mapping):
        diffusion = dict(tree["diffusion"])
        for field, name in (("schedule", "rectified_flow"), ("density", "logit_normal")):
            if isinstance(diffusion.get(field), Mapping):
                diffusion[field] = {"name": name, **diffusion[field]}
        tree["diffusion"] = diffusion
    return tree


def model_config(name: str, preset: str | None = None, **fields: Any) -> MMDiTConfig | CrossDiTConfig | UNetConfig:
    """Build one backbone's config in Python: `model_config("mmdit", "S", qk_norm="rms")`."""
    tree: dict[str, Any] = {"name": name, **({"preset": preset} if preset else {}), **fields}
    holder = validate(_ModelHolder, {"model": _expand_preset(tree, "model_config")}, "model_config")
    return holder.model


class _ModelHolder(Config):
    model: ModelConfig


def _expand_preset(model: dict[str, Any], source: str) -> dict[str, Any]:
    name = model.setdefault("name", "mmdit")
    if name not in PRESETS:
        raise ConfigError(f"{source}: model.name: {unknown('backbone', str(name), PRESETS)}")
    preset = model.get("preset")
    if preset is None:
        return model
    if preset not in PRESETS[name]:
        raise ConfigError(f"{source}: model.preset: {unknown(f'preset of {name}', str(preset), PRESETS[name])}")
    return {**PRESETS[name][preset], **model}


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study's YAML; `base` becomes relative to the working folder."""
    path = Path(path)
    tree = merge(read_yaml(path), parse_overrides(overrides))
    if isinstance(tree.get("base"), str):
        tree["base"] = path.parent / tree["base"]
    return validate(StudyConfig, tree, str(path))


def load_suite(path: str | Path, overrides: Sequence[str] = ()) -> SuiteConfig:
    """Read an evaluation suite's YAML."""
    return validate(SuiteConfig, merge(read_tree(path), parse_overrides(overrides)), str(path))


def row_configs(study: StudyConfig) -> dict[str, dict[int, RunConfig]]:
    """Resolve every (row, seed) of a study and refuse rows that change more than the study may vary.

    Returns:
        {row: {seed: config}}.

    Raises:
        ConfigError: a row does not validate, or differs from the others in a field outside `varies`.
    """
    base = merge(read_tree(study.base), study.overrides)
    cells: dict[str, dict[int, RunConfig]] = {}
    for row, changes in study.rows.items():
        tree = merge(base, changes or {})
        for seed in study.seeds:
            cell = merge(tree, {"seed": seed, "name": f"{row}-s{seed}"})
            cells.setdefault(row, {})[seed] = resolve(cell, source=f"{study.base}, row {row!r}")
    if not study.allow_confounded:
        first = next(iter(study.rows))
        for row in study.rows:
            seed = study.seeds[0]
            for field in differences(to_tree(cells[first][seed]), to_tree(cells[row][seed])):
                if field != "name" and not any(field == v or field.startswith(v + ".") for v in study.varies):
                    raise ConfigError(
                        f"row {row!r} differs from row {first!r} in {field}, which is outside the study's "
                        f"varies: {list(study.varies)}. A difference in results could then not be laid to the "
                        f"conditioning. Add the field to varies:, or set allow_confounded: true, which marks the report"
                    )
    return cells


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted paths at which two trees differ."""
    found = []
    for key in [*a, *(k for k in b if k not in a)]:
        path = f"{prefix}{key}"
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differences(left, right, f"{path}.")
        elif left != right:
            found.append(path)
    return found


def to_tree(config: Config) -> dict[str, Any]:
    """Return a config as plain YAML types; `resolve(to_tree(c)) == c`."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML text."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, width=120)


# --- errors -----------------------------------------------------------------------------------------------------


def validate(cls: type[Any], tree: Mapping[str, Any], source: str) -> Any:
    """Validate a tree; every problem is one line: source, dotted path, what was got, what is valid."""
    try:
        return cls.model_validate(dict(tree))
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            lines.append(f"{source}: {_describe(cls, dict(tree), problem)}")
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _describe(cls: type[Config], tree: Any, problem: Mapping[str, Any]) -> str:
    location, kind = list(problem["loc"]), problem["type"]
    # pydantic puts the tag of a union into the location: leave out what is no key of the tree
    keys: list[Any] = []
    node = tree
    for part in location:
        if isinstance(node, Mapping) and part not in node and part in ("mmdit", "crossdit", "unet", *_VARIANTS):
            continue
        keys.append(part)
        node = node.get(part) if isinstance(node, Mapping) else None
    path = ".".join(str(k) for k in keys) or "(whole config)"
    if kind == "extra_forbidden":
        fields = _fields_at(cls, tree, keys[:-1])
        guess = nearest(str(keys[-1]), fields)
        everywhere = sorted(_all_paths(cls))
        if guess is None:
            guess = next((p for p in everywhere if p.split(".")[-1] == str(keys[-1])), None)
        hint = (
            f"; did you mean {'.'.join([*map(str, keys[:-1]), guess]) if guess in fields else guess!r}?"
            if guess
            else ""
        )
        return f"{path}: unknown field{hint} Valid here: {', '.join(fields)}"
    if kind in ("literal_error", "union_tag_invalid"):
        expected = problem["ctx"].get("expected") or problem["ctx"].get("expected_tags", "")
        names = [name.strip(" '") for name in str(expected).replace(" or ", ",").split(",")]
        given = problem["input"].get("name") if isinstance(problem["input"], Mapping) else problem["input"]
        return f"{path}: {unknown('value', str(given), names)}"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{path}: {message}"
    return f"{path}: {message}, got {problem['input']!r}"


_VARIANTS = (
    "rectified_flow",
    "variance_preserving",
    "uniform",
    "logit_normal",
    "mode",
    "cosmap",
    "shapes",
    "emoji",
    "images",
)


def _members(annotation: Any) -> list[type[Config]]:
    """The config classes inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [member for arg in get_args(annotation) for member in _members(arg)] if get_origin(annotation) else []


def _fields_at(cls: type[Config], tree: Any, keys: Iterable[Any]) -> list[str]:
    """The valid field names of the class that stands at a path of the tree."""
    here, node = cls, tree
    for key in keys:
        field = here.model_fields.get(str(key))
        members = _members(field.annotation) if field is not None else []
        if not members:
            return []
        node = node.get(key, {}) if isinstance(node, Mapping) else {}
        name = node.get("name") if isinstance(node, Mapping) else None
        named = [m for m in members if "name" in m.model_fields and m.model_fields["name"].default == name]
        here = named[0] if named else members[0]
    return list(here.model_fields)


def _all_paths(cls: type[Config], prefix: str = "") -> list[str]:
    paths = []
    for name, field in cls.model_fields.items():
        paths.append(prefix + name)
        for member in _members(field.annotation):
            paths += _all_paths(member, f"{prefix}{name}.")
    return paths
