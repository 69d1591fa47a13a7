"""What a row costs: parameters and FLOPs of one forward, counted on `meta`; evaluations and FLOPs of a picture."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmdit.config import EncodersConfig, ModelConfig, RunConfig, SamplingConfig
from mmdit.data import make_dataset
from mmdit.denoiser import Conditioning, Streams
from mmdit.diffusion import build_schedule
from mmdit.encoders.axes import apply_padding
from mmdit.encoders.text import TextEncoders, load_run_text
from mmdit.encoders.vae import load_vae
from mmdit.models import build_denoiser
from mmdit.presets import VAE_WIDTHS
from mmdit.sampling.cost import SamplingMeter

_CAPTIONS = 128  # captions looked at for the length of a trimmed batch


class Cost(NamedTuple):
    """Cost of one row.

    Attributes:
        parameters: trained ones.
        flops: of one forward of one image, 2 a multiply-add.
        tokens: text tokens of it.
        evaluations: rows through the network that drawing one image takes, guidance and all steps included; 0: not
            worked out.
        image_flops: FLOPs of these.
    """

    parameters: int
    flops: int
    tokens: int
    evaluations: int = 0
    image_flops: int = 0


def cost_of(config: RunConfig) -> Cost:
    """Count a run's denoiser at its own resolution and text length.

    Raises:
        FileNotFoundError: the data have not been built.
    """
    tokens, context_dim, pooled_dim, streams = text_shape(config)
    shape = (_vae_shape(config.encoders.vae)[1], *latent_size(config))
    parameters, flops = _count(config.model, shape, tokens, context_dim, pooled_dim, streams)
    return Cost(parameters, flops, tokens)


@lru_cache(maxsize=256)
def _count(
    model: ModelConfig, shape: tuple[int, ...], tokens: int, width: int, pooled_dim: int | None, streams: Streams | None
) -> tuple[int, int]:
    """Parameters, and FLOPs of one forward of one image."""
    denoiser = _on_meta(model)
    with torch.device("meta"):
        pooled = None if pooled_dim is None else torch.zeros(1, pooled_dim)
        conditioning = Conditioning(torch.zeros(1, tokens, width), pooled, streams=streams)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            denoiser(torch.zeros(1, *shape), torch.zeros(1), conditioning)
    parameters = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    return parameters, int(counter.get_total_flops())


@lru_cache(maxsize=64)
def _on_meta(model: ModelConfig) -> torch.nn.Module:
    with torch.device("meta"):
        denoiser: torch.nn.Module = build_denoiser(model).eval()
    return denoiser


def drawing_cost(config: RunConfig, cost: Cost) -> Cost:
    """Add what drawing one image takes: rows through the network over the sampler's steps, guidance included.

    FLOPs of text encoders and VAE are not counted.
    """
    found = sampling_meter(config).cost(config.sampling)
    return cost._replace(evaluations=found.evaluations, image_flops=found.flops)


def sampling_meter(config: RunConfig) -> SamplingMeter:
    """Return what counts the cost of a picture of this run under any sampling."""
    neutral = {"name": "any", "seed": 0, "sampling": SamplingConfig()}
    return _meter(config.model_copy(update=neutral).model_dump_json())


@lru_cache(maxsize=64)
def _meter(config_json: str) -> SamplingMeter:
    config = RunConfig.model_validate_json(config_json)
    tokens, context_dim, pooled_dim, streams = text_shape(config)
    mask = None if config.encoders.padding == "attend" else torch.ones(1, tokens, dtype=torch.bool)
    pooled = None if pooled_dim is None else torch.zeros(1, pooled_dim)
    conditioning = Conditioning(torch.zeros(1, tokens, context_dim), pooled, mask, streams)
    denoiser = _on_meta(config.model)
    shape = (_vae_shape(config.encoders.vae)[1], *latent_size(config))
    schedule = build_schedule(config.diffusion.schedule)
    return SamplingMeter(denoiser, schedule, config.diffusion.prediction, conditioning, conditioning, shape)


def check_match(costs: Mapping[str, Cost], within: float, by: str = "parameters") -> str | None:
    """Say which rows are farther apart than the study allows; None where all are near enough."""

    def size(row: str) -> int:
        return int(getattr(costs[row], by))

    largest, smallest = max(costs, key=size), min(costs, key=size)
    ratio = size(largest) / size(smallest)
    if ratio <= 1.0 + within:
        return None
    unit = "parameters" if by == "parameters" else "FLOP a forward"
    return (
        f"row {largest!r} has {size(largest):,} {unit}, row {smallest!r} {size(smallest):,}: {100 * (ratio - 1):.1f} % "
        f"more, the study allows {100 * within:g} %. Set match.solve: true to have widths solved, change one by "
        f"hand, raise match.within, or set match: null to compare unequal sizes"
    )


def latent_size(config: RunConfig) -> tuple[int, int]:
    """Return H and W of a run's latents."""
    side = config.data.resolution // _vae_shape(config.encoders.vae)[0]
    return side, side


def text_shape(config: RunConfig) -> tuple[int, int, int | None, Streams | None]:
    """Return tokens L, E, G and the streams that the denoiser of a run sees in a batch of its own captions."""
    return _text_shape(config.model_copy(update={"name": "any", "seed": 0}).model_dump_json())


@lru_cache(maxsize=64)
def _text_shape(config_json: str) -> tuple[int, int, int | None, Streams | None]:
    config = RunConfig.model_validate_json(config_json)
    text = _text(config.encoders)
    dataset = make_dataset(config.data, "val")
    captions = dataset.captions(range(min(_CAPTIONS, len(dataset))))
    padding = config.encoders.padding
    encoded = apply_padding(text.encode(captions, padding="attend" if padding == "attend" else "mask"), padding)
    pooled = None if encoded.pooled is None else encoded.pooled.shape[1]
    return encoded.context.shape[1], encoded.context.shape[2], pooled, encoded.streams


@lru_cache(maxsize=2)
def _text(config: EncodersConfig) -> TextEncoders:
    return load_run_text(config)


@lru_cache(maxsize=2)
def _vae_shape(path: str) -> tuple[int, int]:
    if path in VAE_WIDTHS:
        return VAE_WIDTHS[path]["factor"], VAE_WIDTHS[path]["channels"]
    config = load_vae(path).config
    return config.factor, config.latent_channels
