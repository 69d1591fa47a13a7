"""DPM-Solver++(2M): a multistep exponential integrator, second order for one evaluation a step."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmdit.diffusion.schedule import Schedule
from mmdit.sampling.trajectory import Callback, Denoise, StepNoise, evaluate, read_levels, read_options, working


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoise,
    noisy_latents: Tensor,
    schedule: Schedule,
    grid: Tensor,
    *,
    step_noise: StepNoise | None = None,
    callback: Callback | None = None,
    **options: Any,
) -> Tensor:
    """Extrapolate `denoised` linearly in lambda = log(alpha / sigma), and integrate the rest exactly.

    The first step and the last (to the data, lambda = inf) are of first order; so is the second where the grid begins
    at lambda = -inf (rectified flow at t = 1), because nothing can be extrapolated from there. Global error O(h^2).
    Arguments, result and errors as `euler`; no options.

    Source: Lu et al. 2022, arXiv:2211.01095, Algorithm 2; the midpoint variant, as diffusers'
    DPMSolverMultistepScheduler with final_sigmas_type "zero".
    """
    read_options("dpmpp_2m", options)
    latents = working(noisy_latents)
    previous: Tensor | None = None
    step_before = math.nan
    for i, (now, after) in enumerate(pairwise(read_levels(schedule, grid))):
        denoised = evaluate(denoise, latents, now.t)
        if callback is not None:
            callback(i, now.t, denoised)
        step = after.log_snr - now.log_snr
        estimate = _extrapolate(denoised, previous, step, step_before)
        # sigma'/sigma x + alpha' (1 - exp(-step)) estimate, with exp(-step) as a ratio: no logarithm of zero
        decay = now.alpha * after.sigma / (now.sigma * after.alpha)
        latents = after.sigma / now.sigma * latents + after.alpha * (1 - decay) * estimate
        previous, step_before = denoised, step
    return latents


@torch.no_grad()
def dpmpp_2m_sd35(
    denoise: Denoise,
    noisy_latents: Tensor,
    schedule: Schedule,
    grid: Tensor,
    *,
    step_noise: StepNoise | None = None,
    callback: Callback | None = None,
    **options: Any,
) -> Tensor:
    """The SD3.5 release's form: extrapolate linearly in -log(tau), the ODE's own clock; for parity with the release.

    For rectified flow tau is sigma, so this ignores alpha, unlike `dpmpp_2m`; both are of second order, with different
    error constants. For the variance-preserving schedule tau is sigma / alpha and the two are the same.
    Arguments, result and errors as `euler`; no options.

    Source: Stability-AI/sd3.5, its sampler "dpmpp_2m", which applies k-diffusion's solver to rectified-flow sigmas.
    """
    read_options("dpmpp_2m_sd35", options)
    latents = working(noisy_latents)
    previous: Tensor | None = None
    step_before = math.nan
    for i, (now, after) in enumerate(pairwise(read_levels(schedule, grid))):
        denoised = evaluate(denoise, latents, now.t)
        if callback is not None:
            callback(i, now.t, denoised)
        decay = after.tau / now.tau
        step = math.inf if decay == 0 else -math.log(decay)
        estimate = _extrapolate(denoised, previous, step, step_before)
        latents = after.scale * (estimate + decay * (latents / now.scale - estimate))
        previous, step_before = denoised, step
    return latents


def _extrapolate(denoised: Tensor, previous: Tensor | None, step: float, step_before: float) -> Tensor:
    """Estimate `denoised` at the middle of the coming step from its last two values.

    Source: arXiv:2211.01095, Algorithm 2, line 8; with r = step_before / step, 1 / (2 r) is the weight below.
    """
    if previous is None or math.isinf(step) or math.isinf(step_before):
        return denoised
    return denoised + step / (2 * step_before) * (denoised - previous)
