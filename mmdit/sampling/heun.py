"""Heun's method on the sampling ODE."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmdit.diffusion.schedule import Schedule
from mmdit.sampling.trajectory import Callback, Denoise, StepNoise, evaluate, read_levels, read_options, working


@torch.no_grad()
def heun(
    denoise: Denoise,
    noisy_latents: Tensor,
    schedule: Schedule,
    grid: Tensor,
    *,
    step_noise: StepNoise | None = None,
    callback: Callback | None = None,
    **options: Any,
) -> Tensor:
    """Integrate dy/dtau = (y - denoised) / tau by the trapezoidal rule: two evaluations a step, global error O(h^2).

    The last step, to tau = 0 where the slope is 0/0, is Euler's; so n steps cost 2 n - 1 evaluations. Arguments,
    result and errors as `euler`; no options.

    Source: Karras et al. 2022, arXiv:2206.00364, Algorithm 1 (in the schedule's own ODE coordinates).
    """
    read_options("heun", options)
    latents = working(noisy_latents)
    for i, (now, after) in enumerate(pairwise(read_levels(schedule, grid))):
        denoised = evaluate(denoise, latents, now.t)
        if callback is not None:
            callback(i, now.t, denoised)
        if after.tau == 0:
            latents = after.scale * denoised
            continue
        step = after.tau - now.tau
        y = latents / now.scale
        slope = (y - denoised) / now.tau
        guess = y + step * slope
        guess_slope = (guess - evaluate(denoise, after.scale * guess, after.t)) / after.tau
        latents = after.scale * (y + step * (slope + guess_slope) / 2)
    return latents
