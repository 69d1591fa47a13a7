"""Samplers against exact solutions: Gaussian data have a closed-form denoiser and a closed-form ODE."""

import math
from itertools import pairwise

import pytest
import torch

from mmdit.diffusion import RectifiedFlow, VariancePreserving
from mmdit.sampling import GRIDS, SAMPLERS

MEAN, DEVIATION = 0.7, 0.4
FLOW, SHIFTED, CHAIN = RectifiedFlow(), RectifiedFlow(3.0), VariancePreserving()
SCHEDULES = pytest.mark.parametrize("schedule", [FLOW, SHIFTED, CHAIN], ids=["flow", "flow-shift-3", "chain"])


def gaussian_denoiser(schedule, mean=MEAN, deviation=DEVIATION):
    """E[latents | noisy_latents] for latents from N(mean, deviation^2)."""

    def denoise(noisy_latents, t):
        alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
        gain = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
        return mean + gain * (noisy_latents - alpha * mean)

    return denoise


def exact_solution(schedule, noisy_latents, start):
    """The ODE keeps (noisy_latents - alpha mean) / standard deviation of noisy_latents."""
    t = torch.tensor([start], dtype=torch.float64)
    alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
    return MEAN + DEVIATION * (noisy_latents - alpha * MEAN) / math.hypot(alpha * DEVIATION, sigma)


def smooth_grid(schedule, num_steps, start=0.7):
    """Times whose ODE clock falls smoothly, as (1 - i/n)^4, so that the order of a method is not hidden by its ends.

    The multistep methods work in log(tau) or log(alpha / sigma), which run to infinity at both ends of [0, 1]. With
    even steps down to 0, or from t = 1, their error is h^2 log(1 / h), which measures as 1.83 instead of 2.
    """
    high = schedule.tau(torch.tensor([start], dtype=torch.float64)).item()
    return schedule.t_from_tau(high * torch.linspace(1, 0, num_steps + 1, dtype=torch.float64) ** 4)


def start_noise():
    return torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(8, 1, 1, 1)


@SCHEDULES
@pytest.mark.parametrize(
    ("sampler", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("dpmpp_2m_sd35", 2)]
)
def test_halving_the_steps_shows_the_order_of_convergence(sampler, order, schedule):
    noise, errors = start_noise(), []
    exact = exact_solution(schedule, noise, 0.7)
    for num_steps in (400, 800, 1600):
        latents = SAMPLERS[sampler](gaussian_denoiser(schedule), noise, schedule, smooth_grid(schedule, num_steps))
        errors.append((latents - exact).abs().max().item())
    measured = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert measured == pytest.approx([order, order], abs=0.1), (errors, measured)
    assert errors[-1] < (5e-3 if order == 1 else 1e-5), errors


@SCHEDULES
@pytest.mark.parametrize("grid", ["linear", "release", "karras"])
@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m"])
def test_second_order_samplers_come_near_the_exact_solution_on_every_named_grid(sampler, grid, schedule):
    noise, times = start_noise(), GRIDS[grid](schedule, 100)
    latents = SAMPLERS[sampler](gaussian_denoiser(schedule), noise, schedule, times)
    error = (latents - exact_solution(schedule, noise, times[0].item())).abs().max().item()
    assert error < 0.03, error


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim"])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_constant_velocity_is_integrated_exactly(sampler, num_steps):
    noise = start_noise()
    velocity = torch.linspace(1, 3, 8, dtype=torch.float64).reshape(8, 1, 1, 1)
    for schedule in (FLOW, SHIFTED):
        denoise = lambda x, t, s=schedule: x - s.sigma(t).reshape(-1, 1, 1, 1) * velocity  # noqa: E731
        latents = SAMPLERS[sampler](denoise, noise, schedule, GRIDS["linear"](schedule, num_steps))
        torch.testing.assert_close(latents, noise - velocity, rtol=0, atol=1e-13)


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim"])
def test_constant_noise_is_integrated_exactly_on_the_chain(sampler):
    noise, implied = start_noise(), 0.3 * start_noise() + 1
    alpha, sigma = (f(torch.ones(1, dtype=torch.float64)).item() for f in (CHAIN.alpha, CHAIN.sigma))

    def denoise(x, t):
        return (x - CHAIN.sigma(t).reshape(-1, 1, 1, 1) * implied) / CHAIN.alpha(t).reshape(-1, 1, 1, 1)

    latents = SAMPLERS[sampler](denoise, noise, CHAIN, GRIDS["linear"](CHAIN, 7))
    torch.testing.assert_close(latents, (noise - sigma * implied) / alpha, rtol=1e-11, atol=1e-11)


@SCHEDULES
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_single_data_point_is_found_exactly(sampler, schedule):
    if sampler == "ddpm" and isinstance(schedule, RectifiedFlow):
        with pytest.raises(ValueError, match="ancestral chain of variance_preserving"):
            SAMPLERS[sampler](lambda x, t: x, start_noise(), schedule, GRIDS["linear"](schedule, 5))
        return
    point = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(8, 1, 1, 1)
    latents = SAMPLERS[sampler](
        lambda x, t: point, start_noise(), schedule, GRIDS["linear"](schedule, 5), step_noise=lambda i: start_noise()
    )
    torch.testing.assert_close(latents, point, rtol=0, atol=1e-14)


@SCHEDULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_euler_equals_ddim_without_noise(dtype, schedule):
    noise = start_noise().to(dtype)
    denoise = lambda x, t: torch.tanh(x) * (1 - t.reshape(-1, 1, 1, 1)).to(x.dtype)  # noqa: E731
    for grid in ("linear", "release", "karras"):
        times = GRIDS[grid](schedule, 12)
        euler = SAMPLERS["euler"](denoise, noise, schedule, times)
        ddim = SAMPLERS["ddim"](denoise, noise, schedule, times, eta=0.0)
        torch.testing.assert_close(euler, ddim, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-13)


def test_both_forms_of_dpmpp_agree_on_the_chain_and_differ_on_rectified_flow():
    noise = start_noise()
    results = {}
    for schedule in (CHAIN, FLOW):
        times = GRIDS["linear"](schedule, 10)
        results[schedule] = [
            SAMPLERS[name](gaussian_denoiser(schedule), noise, schedule, times)
            for name in ("dpmpp_2m", "dpmpp_2m_sd35")
        ]
    torch.testing.assert_close(*results[CHAIN], rtol=0, atol=1e-12)
    assert (results[FLOW][0] - results[FLOW][1]).abs().max() > 1e-4


def test_dpmpp_in_the_release_form_is_the_recursion_in_minus_log_sigma():
    """An independent writing: x' = x e^-h + (1 - e^-h) D, D from the line through the last two values in -log sigma."""
    noise, times = start_noise(), GRIDS["release"](SHIFTED, 28)
    sigmas = SHIFTED.sigma(times).tolist()
    x, seen = noise.clone(), []
    for i in range(28):
        denoised = gaussian_denoiser(SHIFTED)(x, times[i].expand(8))
        seen.append((-math.log(sigmas[i]), denoised))
        if sigmas[i + 1] == 0:
            x = denoised
            continue
        place = -math.log(sigmas[i + 1])
        estimate = denoised
        if i:
            (before, old), (now, new) = seen[-2:]
            middle = (now + place) / 2
            estimate = new + (new - old) / (now - before) * (middle - now)
        keep = math.exp(seen[-1][0] - place)
        x = keep * x + (1 - keep) * estimate
    ours = SAMPLERS["dpmpp_2m_sd35"](gaussian_denoiser(SHIFTED), noise, SHIFTED, times)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-12)
