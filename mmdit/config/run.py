"""What a run and an evaluation suite are made of, and which combinations cannot work."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mmdit.config.backbones import MMDiTConfig, ModelConfig, UNetConfig, num_blocks, reads_streams
from mmdit.config.parts import (
    Config,
    DataConfig,
    DiffusionConfig,
    EncodersConfig,
    SamplingConfig,
    ShapesConfig,
    TrainConfig,
)
from mmdit.presets import ENCODER_WIDTHS, STREAM_WIDTHS, VAE_WIDTHS, pooled_width, used_streams


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
            for name in ("latent_shift", "latent_scale"):
                numbers = getattr(encoders, name)
                if isinstance(numbers, tuple) and len(numbers) != vae["channels"]:
                    raise ValueError(
                        f"encoders.{name} has {len(numbers)} numbers, the VAE {encoders.vae!r} has {vae['channels']} "
                        f"channels; `python scripts/cache.py CONFIG --statistics` prints a fitting line"
                    )
        text = ENCODER_WIDTHS.get(encoders.text)
        if text is not None and model.context_dim != text["context_dim"]:
            raise ValueError(
                f"model.context_dim is {model.context_dim}, the text encoders {encoders.text!r} give "
                f"{text['context_dim']}; leave it out to take theirs"
            )
        if encoders.pooled == "none" and model.pooled_dim is not None:
            raise ValueError(
                f"model.pooled_dim is {model.pooled_dim}, but encoders.pooled 'none' gives the denoiser no pooled "
                f"vector; set model.pooled_dim: null, or leave it out"
            )
        if text is not None and model.pooled_dim not in (None, pooled_width(text, encoders.pooled)):
            raise ValueError(
                f"model.pooled_dim is {model.pooled_dim}, the text encoders {encoders.text!r} give "
                f"{pooled_width(text, encoders.pooled)} with encoders.pooled {encoders.pooled!r}; leave it out to take "
                f"theirs"
            )
        if model.injection == "pooled" and encoders.use == ("t5",) and encoders.pooled == "clip":
            raise ValueError(
                "nothing of the text would reach the denoiser: model.injection 'pooled' reads the pooled vector alone, "
                "which encoders.pooled 'clip' takes from encoders that encoders.use ['t5'] leaves out; set "
                "encoders.pooled: clip+t5"
            )
        known, given = STREAM_WIDTHS.get(encoders.text), dict(model.text_streams or ())
        streams = None if known is None else used_streams(known, encoders.use, encoders.absent)
        if streams is not None and reads_streams(model) and given != streams:
            raise ValueError(
                f"model.text_streams is {given}, the text encoders {encoders.text!r} give {streams}; leave it out to "
                f"take theirs"
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
        check_guidance(model, encoders, self.sampling)
        return self


def check_guidance(model: ModelConfig, encoders: EncodersConfig, sampling: SamplingConfig) -> None:
    """Refuse a kind of guidance that a run's denoiser or text cannot have.

    Raises:
        ValueError: which, and what would work.
    """
    kind = sampling.negative_guidance
    if kind in ("kv_subtract", "nag") and model.injection == "pooled":
        raise ValueError(
            f"sampling.negative_guidance {kind!r} acts on text tokens, of which model.injection 'pooled' has none; "
            f"use 'cfg'"
        )
    if kind in ("kv_subtract", "nag") and encoders.use == ():
        raise ValueError(
            f"sampling.negative_guidance {kind!r} acts on text tokens, of which encoders.use [] leaves none: a "
            f"negative text would be the text itself; use 'none'"
        )
    if kind == "kv_subtract" and encoders.padding == "trim":
        raise ValueError(
            "sampling.negative_guidance 'kv_subtract' subtracts a negative text token by token, so both texts must "
            "have one length, which encoders.padding 'trim' does not give; set encoders.padding: mask, which trains "
            "the same network"
        )
    count = num_blocks(model)
    wrong = [i for i in sampling.skip_layer.layers if i >= count]
    if kind == "skip_layer" and wrong:
        raise ValueError(
            f"sampling.skip_layer.layers {wrong} do not exist; this {model.name} has blocks 0 to {count - 1}"
        )


# data whose combinations are known, so that some are held out of training; and the metric that asks for them
COMBINATIONS = {"shapes": "composition", "emoji": "retrieval"}


class SuiteConfig(Config):
    """What is measured on a run. `guidance_scale` and the like are the run's own `sampling` unless given here.

    `metrics` and `splits` left empty are what the run's data can serve (`for_data`).
    """

    name: str = "default"
    metrics: tuple[str, ...] = ()
    num_images: PositiveInt = 1_000  # per split
    splits: tuple[Literal["seen", "heldout"], ...] = ()
    batch_size: PositiveInt = 128
    seed: NonNegativeInt = 1234
    extractor: str = "tiny_clip"
    clip: str = "tiny_clip"  # the pair of clip_score and retrieval; others: clip:FOLDER, openclip:NAME@FILE
    long_captions: Literal["truncate", "error", "chunk"] = "truncate"  # captions over the CLIP tower's 77 tokens
    weights: Annotated[str, Field(pattern=r"^(raw|ema(-[a-z0-9_]+)?)$")] = "ema"  # ema-<name>: one of train.more_emas
    sampling: SamplingConfig | None = None
    snapshot_images: NonNegativeInt = 0  # images per split at each kept earlier checkpoint; 0: final only
    grid_prompts: PositiveInt = 16  # pictures in the report's grid

    def for_data(self, data: str) -> SuiteConfig:
        """Fill in the metrics and splits that a kind of data can serve, where none are given.

        Pictures of one's own have captions but no known combinations: their `seen` are those kept out of training
        (`data.val_fraction`), and there is no `heldout`. The tiny CLIP pair does not know what is on them.

        Args:
            data: `data.name` of the run.
        """
        made = data in COMBINATIONS
        first = (COMBINATIONS[data],) if made else ()
        clip = ("clip_score",) if made or self.clip != "tiny_clip" else ()
        return self.model_copy(
            update={
                "metrics": self.metrics or (*first, *clip, "frechet", "kernel", "validation_loss"),
                "splits": self.splits or (("seen", "heldout") if made else ("seen",)),
            }
        )
