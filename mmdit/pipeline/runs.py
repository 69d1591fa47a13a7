"""A trained run's parts: denoiser, encoders, and where they come from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mmdit.checkpoint import CheckpointError, checkpoint_hash, find_checkpoint, load_checkpoint, weights_stem
from mmdit.config import RunConfig
from mmdit.encoders.text import TextEncoders, load_run_text
from mmdit.encoders.vae import AutoencoderKL, load_run_vae
from mmdit.models import build_denoiser


def load_run(path: str | Path, weights: str, device: torch.device) -> tuple[nn.Module, RunConfig, dict[str, str]]:
    """Return a run's denoiser in evaluation mode, its config, and where the weights come from.

    Raises:
        FileNotFoundError, CheckpointError: as `TextToImage.load`.
    """
    stem = weights_stem(weights)
    checkpoint = load_checkpoint(find_checkpoint(path), stems=[stem])
    denoiser = build_denoiser(checkpoint.config.model).to(device)
    try:
        denoiser.load_state_dict(checkpoint.tensors[stem])
    except RuntimeError as error:
        reason = f"its {stem} does not fit the model of its config ({error})"
        raise CheckpointError(checkpoint.path, reason, "Was the library changed since?") from error
    provenance = {
        "run": checkpoint.config.name,
        "checkpoint": checkpoint.path.name,
        "checkpoint_sha256": checkpoint_hash(checkpoint.path, stem),
        "weights": weights,
    }
    return denoiser.eval(), checkpoint.config, provenance


def load_encoders(
    config: RunConfig, *, vae: AutoencoderKL | None = None, text: TextEncoders | None = None
) -> tuple[AutoencoderKL, TextEncoders]:
    """Load a run's VAE and text encoders, on the CPU; what is passed in is taken as it is."""
    encoders = config.encoders
    vae = vae if vae is not None else load_run_vae(encoders)
    text = text if text is not None else load_run_text(encoders)
    return vae, text
