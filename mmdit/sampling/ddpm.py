"""DDPM's ancestral sampling: the learned reverse of the variance-preserving chain."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmdit.diffusion.schedule import Schedule, VariancePreserving
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
def ddpm(
    denoise: Denoise,
    noisy_latents: Tensor,
    schedule: Schedule,
    grid: Tensor,
    *,
    step_noise: StepNoise | None = None,
    callback: Callback | None = None,
    **options: Any,
) -> Tensor:
    """Draw each step from N(posterior mean, variance); on a shorter grid the chain's steps are merged.

    Arguments, result and errors as `euler`; and
        variance: `posterior` (default), that of q(x_low | x_high, denoised), right for a single data point; or `beta`,
            that of q(x_high | x_low), right for unit-normal data. No noise is added at the last step.
        step_noise: needed, unless the grid has one step.

    Source: Ho et al. 2020, arXiv:2006.11239, Algorithm 2, Eq. 7 and section 3.2.

    Raises:
        ValueError: the schedule is not variance preserving, unknown variance, or step_noise missing.
    """
    variance = read_options("ddpm", options, variance="posterior")["variance"]
    if variance not in ("beta", "posterior"):
        raise ValueError(f"variance must be 'beta' or 'posterior', got {variance!r}")
    if not isinstance(schedule, VariancePreserving):
        raise ValueError(
            "sampler 'ddpm' is the ancestral chain of variance_preserving; with rectified_flow use 'euler', 'heun', "
            "'ddim' (with eta for noise) or 'dpmpp_2m'"
        )
    latents = working(noisy_latents)
    for i, (now, after) in enumerate(pairwise(read_levels(schedule, grid))):
        denoised = evaluate(denoise, latents, now.t)
        if callback is not None:
            callback(i, now.t, denoised)
        ratio = now.alpha / after.alpha
        beta = now.sigma**2 - (ratio * after.sigma) ** 2  # 1 - ratio^2: one merged step of the chain
        mean_of_latents = ratio * after.sigma**2 / now.sigma**2
        mean_of_denoised = after.alpha * beta / now.sigma**2
        latents = mean_of_latents * latents + mean_of_denoised * denoised
        if after.t > 0:
            added = beta if variance == "beta" else beta * after.sigma**2 / now.sigma**2
            latents = latents + math.sqrt(max(added, 0.0)) * draw(step_noise, i, latents, "ddpm")
    return latents
