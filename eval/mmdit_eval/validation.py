"""Validation losses of a run at fixed levels of noise, image by image.

Validation loss follows human preference and the other scores (Esser et al. 2024, arXiv:2403.03206v1, section 5.3 and
figure 8), but only among runs of one target: the error of a velocity, of an epsilon and of a v are different numbers.
`velocity_losses` turns each run's output into the picture it means and asks for one error of all.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmdit import rng
from mmdit.diffusion import RectifiedFlow
from mmdit.diffusion.loss import equidistant_levels, loss_by_level
from mmdit.encoders.vae import to_pixels
from mmdit.pipeline import TextToImage
from mmdit_eval.drawn import Reference
from mmdit_eval.moments import FloatArray


def losses_by_level(
    pipeline: TextToImage, reference: Reference, times: Tensor, seed: int, common: str | None = None
) -> FloatArray:
    """Return the loss of each true picture at each level, float64 [levels, N].

    The noise is keyed by (seed, item) and the same at every level and for every run.

    Args:
        times: schedule times, [levels].
        common: as in `mmdit.diffusion.loss.training_loss`; None: the run's own target.
    """
    device = next(pipeline.denoiser.parameters()).device
    losses = []
    with (
        torch.inference_mode(),
        torch.autocast(device.type, dtype=torch.bfloat16, enabled=pipeline.precision == "bf16"),
    ):
        for start in range(0, len(reference.indices), reference.batch_size):
            rows = slice(start, start + reference.batch_size)
            latents = pipeline.vae.encode(to_pixels(reference.images[rows]).to(device)).float()
            conditioning = pipeline.encode(reference.captions[rows]).to(device)
            noise = rng.normal(seed, "val_noise", reference.indices[rows].tolist(), latents.shape[1:])
            losses.append(
                loss_by_level(
                    pipeline.denoiser,
                    latents,
                    conditioning,
                    torch.from_numpy(noise).to(device),
                    times,
                    pipeline.schedule,
                    pipeline.prediction,
                    common,
                )
                .double()
                .cpu()
            )
    return np.asarray(torch.cat(losses, dim=1).numpy())


def ratios_of(count: int) -> Tensor:
    """Return the ratios of noise to data r = t / (1 - t) at t = 1/count, 2/count, ... below 1, [count - 1]."""
    times = equidistant_levels(count)[:-1]
    return times / (1 - times)


def velocity_losses(
    pipeline: TextToImage, reference: Reference, count: int, seed: int
) -> tuple[list[float], FloatArray]:
    """Return the error of the velocity noise - latents at equal ratios of noise to data, whatever the run predicts.

    A level is a ratio r = sigma / alpha, that of rectified flow's t = 1/count, 2/count, ... (r = t / (1 - t)); each run
    is asked at the time of its own schedule that has this ratio. There the picture it means (`denoised`) is off by d,
    its noise by -d / r, and its velocity by -(1 + 1/r) d. The last level, t = 1, is left out as in the paper: no ratio
    belongs to it.

    Source: the levels and the exclusion: arXiv:2403.03206v1, section 5.3; the conversion: Kingma and Gao 2023,
    arXiv:2303.00848, section 2 (all targets are one error under different weights).

    Returns:
        (ratios, losses float64 [count - 1, N]); for a run of rectified flow with shift 1 that predicts velocity, its
        own validation loss without the last level.
    """
    times, ratios = equidistant_levels(count)[:-1], ratios_of(count)
    # the clock tau of rectified flow is sigma = r / (1 + r), that of the others sigma / alpha = r
    own = pipeline.schedule.t_from_tau(times if isinstance(pipeline.schedule, RectifiedFlow) else ratios)
    errors = losses_by_level(pipeline, reference, own, seed, common="sample")
    weights = ((1 + 1 / ratios) ** 2).numpy()
    return ratios.tolist(), errors * weights[:, None]
