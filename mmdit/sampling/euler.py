"""Euler's method on the sampling ODE."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmdit.diffusion.schedule import Schedule
from mmdit.sampling.trajectory import Callback, Denoise, StepNoise, evaluate, read_levels, read_options, working


@torch.no_grad()
def euler(
    denoise: Denoise,
    noisy_latents: Tensor,
    schedule: Schedule,
    grid: Tensor,
    *,
    step_noise: StepNoise | None = None,
    callback: Callback | None = None,
    **options: Any,
) -> Tensor:
    """Integrate dy/dtau = (y - denoised) / tau with first-order steps: one evaluation a step, global error O(h).

    Exact where the denoiser's velocity is constant; equal to DDIM with eta = 0 on every schedule. Deterministic:
    `step_noise` is accepted and not drawn from.

    Args:
        denoise: denoise(noisy_latents, t) -> denoised.
        noisy_latents: at grid[0] (pure noise at the start of a full grid), [B, C, H, W].
        grid: descending t, ending in 0.

    Returns:
        latents [B, C, H, W], float32 or wider.

    Raises:
        ValueError: not a grid, or an option (there are none).

    Source: Esser et al. 2024, arXiv:2403.03206v1 (rectified flow); Song et al. 2021, arXiv:2010.02502, Eq. 14.
    """
    read_options("euler", options)
    latents = working(noisy_latents)
    for i, (now, after) in enumerate(pairwise(read_levels(schedule, grid))):
        denoised = evaluate(denoise, latents, now.t)
        if callback is not None:
            callback(i, now.t, denoised)
        y = latents / now.scale
        # y + (tau' - tau) (y - denoised) / tau, regrouped: the step to tau' = 0 gives `denoised` itself
        y = denoised + after.tau / now.tau * (y - denoised)
        latents = after.scale * y
    return latents
