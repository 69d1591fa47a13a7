"""`--dry-run`: what a run would cost. Only shapes run, on PyTorch's `meta` device, which has no memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmdit.config import RunConfig, UNetConfig
from mmdit.data import make_dataset
from mmdit.denoiser import Conditioning
from mmdit.models import build_denoiser
from mmdit.pipeline import load_encoders
from mmdit.train.run import count_parameters, total_images

_CAPTIONS = 128  # looked at to learn how many text tokens a batch has


class Estimate(NamedTuple):
    """Counts of one run: parameters; FLOP per image; tokens; optimiser updates; bytes."""

    parameters: int
    forward_flop: int
    training_flop: int
    image_tokens: int
    text_tokens: int
    steps: int
    memory: int


def estimate(config: RunConfig) -> Estimate:
    """Count what a run costs.

    FLOP are those of matrix products, convolutions and attention, one multiply-add being two; training is forward and
    backward. Memory is parameters, gradients, two moments and the EMA in float32, and what the backward pass keeps of
    one micro-batch in float32 (bf16 autocast keeps less): an upper estimate of what the denoiser needs.
    """
    vae, text = load_encoders(config)
    dataset = make_dataset(config.data, "train")
    captions = dataset.captions(np.arange(min(_CAPTIONS, len(dataset))))
    encoded = text.encode(captions, padding=config.encoders.padding)
    length = encoded.context.shape[1]
    side = config.data.resolution // vae.config.factor
    with torch.device("meta"):
        denoiser = build_denoiser(config.model)
        latents = torch.empty(1, vae.config.latent_channels, side, side)
        pooled = None if encoded.pooled is None else torch.empty(1, encoded.pooled.shape[1])
        mask = None if encoded.context_mask is None else torch.empty(1, length, dtype=torch.bool)
        context = torch.empty(1, length, encoded.context.shape[2])
        conditioning = Conditioning(context, pooled, mask, encoded.streams)
        kept: dict[Any, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        timestep = torch.empty(1)
        with FlopCounterMode(display=False) as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            output = denoiser(latents, timestep, conditioning)
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
    owned = {p.untyped_storage()._cdata for p in denoiser.parameters()}
    activations = sum(size for storage, size in kept.items() if storage not in owned)
    train, parameters = config.train, count_parameters(denoiser)
    patch = 1 if isinstance(config.model, UNetConfig) else config.model.patch_size
    return Estimate(
        parameters=parameters,
        forward_flop=forward.get_total_flops(),
        training_flop=forward.get_total_flops() + backward.get_total_flops(),
        image_tokens=(side // patch) ** 2,
        text_tokens=length,
        steps=total_images(config) // train.batch_size,
        memory=5 * 4 * parameters + activations * (train.batch_size // train.accumulation // train.num_processes),
    )


def describe(config: RunConfig) -> str:
    """Return the estimate as lines for people."""
    costs = estimate(config)
    train = config.train
    rows = {
        "run": f"{config.name}, seed {config.seed}",
        "backbone": f"{config.model.name}{f' ({config.model.preset})' if config.model.preset else ''}",
        "parameters": f"{costs.parameters:,}",
        "FLOP per image": f"{costs.forward_flop / 1e9:.3f} GFLOP forward, "
        f"{costs.training_flop / 1e9:.3f} GFLOP training",
        "tokens": f"{costs.image_tokens} image (latent positions for a U-Net), {costs.text_tokens} text in the longest "
        f"of {_CAPTIONS} captions, padding {config.encoders.padding}",
        "steps": f"{costs.steps:,} updates of {train.batch_size} images = {total_images(config):,} images",
        "whole run": f"{costs.training_flop * total_images(config) / 1e12:,.1f} TFLOP",
        "memory": f"about {costs.memory / 2**30:.2f} GiB for the denoiser at most (encoders and data come on top)",
    }
    if train.warmup_images >= total_images(config):
        rows["warning"] = (
            f"warm-up of {train.warmup_images:,} images is as long as the run; the full lr is never reached"
        )
    return "\n".join(f"{key:>15}  {value}" for key, value in rows.items())
