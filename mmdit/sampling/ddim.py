"""DDIM: the family between the deterministic ODE (eta = 0) and the ancestral chain (eta = 1)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmdit.diffusion.schedule import Schedule
from mmdit.sampling.trajectory import (
    Callback,
    Denoise,
    StepNoise,
    draw,
    evaluate,
    read_levels,
    read_options,
    working,
)


@torch.no_grad()
def ddim(
    denoise: Denoise,
    noisy_latents: Tensor,
    schedule: Schedule,
    grid: Tensor,
    *,
    step_noise: StepNoise | None = None,
    callback: Callback | None = None,
    **options: Any,
) -> Tensor:
    """Keep a part of the implied noise and replace the rest by fresh noise of deviation `fresh`.

    Arguments, result and errors as `euler`; and
        eta: 0 (default) adds no noise and equals Euler; 1 draws from the posterior q(x_low | x_high, denoised).
        step_noise: needed for eta > 0; not asked for at the last step, which ends in the data.

    Source: Song et al. 2021, arXiv:2010.02502, Eq. 12 and 16.
    Departs: the paper's 1 - alpha_bar ratio is written as the variance of q(x_high | x_low), which is the same for
    the variance-preserving schedule and makes the formula valid for rectified flow.

    Raises:
        ValueError: eta outside [0, 1], or step_noise missing.
    """
    eta = float(read_options("ddim", options, eta=0.0)["eta"])
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    latents = working(noisy_latents)
    for i, (now, after) in enumerate(pairwise(read_levels(schedule, grid))):
        denoised = evaluate(denoise, latents, now.t)
        if callback is not None:
            callback(i, now.t, denoised)
        implied_noise = (latents - now.alpha * denoised) / now.sigma
        added = now.sigma**2 - (now.alpha / after.alpha * after.sigma) ** 2  # variance of q(x_now | x_after)
        fresh = eta * after.sigma / now.sigma * math.sqrt(max(added, 0.0))
        kept = math.sqrt(max(after.sigma**2 - fresh**2, 0.0))
        latents = after.alpha * denoised + kept * implied_noise
        if fresh > 0:
            latents = latents + fresh * draw(step_noise, i, latents, "ddim with eta > 0")
    return latents
