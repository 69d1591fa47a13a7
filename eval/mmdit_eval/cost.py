"""What one forward of a denoiser costs: parameters and FLOPs, counted on `meta`, so no memory and no time."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmdit.config import RunConfig
from mmdit.data import make_dataset
from mmdit.denoiser import Conditioning
from mmdit.encoders.text import TextEncoders, apply_padding, load_text_encoders
from mmdit.encoders.vae import load_vae
from mmdit.models import build_denoiser
from mmdit.models.text import even_streams
from mmdit.presets import VAE_WIDTHS

_CAPTIONS = 128  # captions looked at for the length of a trimmed batch


class Cost(NamedTuple):
    """Cost of one row: trained parameters, FLOPs of one forward of one image (2 a multiply-add), text tokens of it."""

    parameters: int
    flops: int
    tokens: int


def cost_of(config: RunConfig) -> Cost:
    """Count a run's denoiser at its own resolution and text length.

    Raises:
        FileNotFoundError: the data have not been built.
    """
    tokens, context_dim, pooled_dim = _text_shape(config.model_dump_json())
    vae_factor, channels = _vae_shape(config.encoders.vae)
    with torch.device("meta"):
        denoiser = build_denoiser(config.model).eval()
        side = config.data.resolution // vae_factor
        latents, timestep = torch.zeros(1, channels, side, side), torch.zeros(1)
        pooled = None if pooled_dim is None else torch.zeros(1, pooled_dim)
        streams = even_streams(config.model, tokens)
        conditioning = Conditioning(torch.zeros(1, tokens, context_dim), pooled, streams=streams)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            denoiser(latents, timestep, conditioning)
    parameters = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    return Cost(parameters, int(counter.get_total_flops()), tokens)


def check_match(costs: dict[str, Cost], within: float) -> str | None:
    """Say which rows are farther apart in parameters than the study allows; None where all are near enough."""
    largest = max(costs, key=lambda row: costs[row].parameters)
    smallest = min(costs, key=lambda row: costs[row].parameters)
    ratio = costs[largest].parameters / costs[smallest].parameters
    if ratio <= 1.0 + within:
        return None
    return (
        f"row {largest!r} has {costs[largest].parameters:,} parameters, row {smallest!r} "
        f"{costs[smallest].parameters:,}: {100 * (ratio - 1):.1f} % more, the study allows {100 * within:.0f} %. "
        f"Change a width, raise match.within, or set match: null to compare unequal sizes"
    )


@lru_cache(maxsize=8)
def _text_shape(config_json: str) -> tuple[int, int, int | None]:
    """Tokens, E and G that the denoiser of this config sees in a batch of its own captions."""
    config = RunConfig.model_validate_json(config_json)
    text = _text(config.encoders.text, config.encoders.t5_length)
    dataset = make_dataset(config.data, "val")
    captions = dataset.captions(range(min(_CAPTIONS, len(dataset))))
    padding = config.encoders.padding
    encoded = apply_padding(text.encode(captions, padding="attend" if padding == "attend" else "mask"), padding)
    pooled = None if encoded.pooled is None else encoded.pooled.shape[1]
    return encoded.context.shape[1], encoded.context.shape[2], pooled


@lru_cache(maxsize=2)
def _text(path: str, t5_length: int) -> TextEncoders:
    return load_text_encoders(path, t5_length=t5_length)


@lru_cache(maxsize=2)
def _vae_shape(path: str) -> tuple[int, int]:
    if path in VAE_WIDTHS:
        return VAE_WIDTHS[path]["factor"], VAE_WIDTHS[path]["channels"]
    config = load_vae(path).config
    return config.factor, config.latent_channels
