"""Whole trajectories against the schedulers of diffusers, with one fake network on both sides.

Where the two differ by intent, the test says so:
- diffusers' DDIM config of SD1.5 ends at alpha_bar[0] (set_alpha_to_one false); ours, like its Euler, ends at the data.
- diffusers' DDPM with variance "fixed_large" adds noise at its last step unless that is k = 0; ours never does.
- its DPM-Solver has a "leading" spacing of its own (T // (n + 1)); the grid compared is the scheduler's, passed to us.
- its flow DPM-Solver truncates the network time to an integer; both sides are asked with 1000 sigma here.
"""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from mmdit.denoiser import Conditioning
from mmdit.diffusion import RectifiedFlow, VariancePreserving
from mmdit.sampling import GRIDS, SAMPLERS, guided_denoise

SHAPE = (2, 3, 4, 4)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW, CHAIN = RectifiedFlow(3.0), VariancePreserving()
COND = Conditioning(torch.zeros(2, 1, 1))


def network(latents, timestep, conditioning=None):
    """Not linear in the latents, and sensitive to a timestep that is wrong by a fraction.

    Near the latents themselves, as true noise is: denoised = (latents - sigma epsilon) / alpha stays of order one.
    """
    phase = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1, 1, 1) / 37
    return 0.9 * latents + 0.08 * torch.tanh(latents.roll(1, dims=1)) + 0.03 * torch.cos(phase)


def start():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def ours(sampler, schedule, prediction, grid, **options):
    denoise = guided_denoise(network, schedule, prediction, COND)
    return SAMPLERS[sampler](denoise, start(), schedule, grid, **options)


def theirs(scheduler, latents, **step):
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(latents, t), t)
        latents = scheduler.step(output, t, latents, return_dict=False, **step)[0]
    return latents


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [4, 28, 50])
def test_the_release_grid_and_euler_are_those_of_the_flow_scheduler(num_steps, shift):
    schedule, scheduler = RectifiedFlow(shift), FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    grid = GRIDS["release"](schedule, num_steps)
    same(schedule.sigma(grid).float(), scheduler.sigmas)
    torch.testing.assert_close(schedule.timestep(grid[:-1]).float(), scheduler.timesteps, rtol=1e-6, atol=0)
    latents = start()
    for t in scheduler.timesteps:
        latents = scheduler.step(network(latents, t), t, latents, return_dict=False)[0]
    same(ours("euler", schedule, "velocity", grid), latents)


def test_heun_is_that_of_the_flow_scheduler():
    scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(12)
    latents, sigmas = start(), scheduler.sigmas
    for t in scheduler.timesteps:
        latents = scheduler.step(network(latents, t), t, latents, return_dict=False)[0]
    own = torch.cat([sigmas[:1], sigmas[1:-1:2], sigmas[-1:]]).double()  # diffusers lists inner levels twice
    same(ours("heun", FLOW, "velocity", FLOW.t_from_tau(own)), latents)


@pytest.mark.parametrize(("prediction", "theirs_name"), [("epsilon", "epsilon"), ("v", "v_prediction")])
def test_ddim_without_noise_is_that_of_diffusers(prediction, theirs_name):
    scheduler = DDIMScheduler(
        **SD, clip_sample=False, set_alpha_to_one=True, steps_offset=1, prediction_type=theirs_name
    )
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[:2].tolist() == [981, 961]
    expected = theirs(scheduler, start())
    grid = GRIDS["leading"](CHAIN, 50)
    torch.testing.assert_close(CHAIN.timestep(grid[:-1]), scheduler.timesteps.double(), rtol=0, atol=1e-9)
    same(ours("ddim", CHAIN, prediction, grid), expected)
    same(ours("euler", CHAIN, prediction, grid), expected)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise_is_that_of_diffusers(eta):
    scheduler = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=True, steps_offset=1)
    scheduler.set_timesteps(20)
    noise = torch.randn(20, *SHAPE, generator=torch.Generator().manual_seed(1))
    latents = start()
    for i, t in enumerate(scheduler.timesteps):
        latents = scheduler.step(network(latents, t), t, latents, eta=eta, variance_noise=noise[i], return_dict=False)[
            0
        ]
    grid = GRIDS["leading"](CHAIN, 20)
    same(ours("ddim", CHAIN, "epsilon", grid, eta=eta, step_noise=lambda i: noise[i]), latents)


@pytest.mark.parametrize(("variance", "theirs_name"), [("posterior", "fixed_small"), ("beta", "fixed_large")])
def test_the_whole_ddpm_chain_is_that_of_diffusers(variance, theirs_name):
    betas = {"beta_start": 0.001, "beta_end": 0.15, "beta_schedule": "linear"}
    scheduler = DDPMScheduler(num_train_timesteps=60, **betas, variance_type=theirs_name, clip_sample=False)
    scheduler.set_timesteps(60)
    expected = theirs(scheduler, start(), generator=torch.Generator().manual_seed(2))
    schedule = VariancePreserving("linear", 0.001, 0.15, num_steps=60)
    generator = torch.Generator().manual_seed(2)
    found = ours(
        "ddpm",
        schedule,
        "epsilon",
        GRIDS["leading"](schedule, 60),
        variance=variance,
        step_noise=lambda i: torch.randn(SHAPE, generator=generator),
    )
    same(found, expected)


@pytest.mark.parametrize(("variance", "theirs_name"), [("posterior", "fixed_small"), ("beta", "fixed_large")])
def test_the_mean_and_variance_of_merged_ddpm_steps_are_those_of_diffusers(variance, theirs_name):
    scheduler = DDPMScheduler(**SD, variance_type=theirs_name, clip_sample=False, steps_offset=1)
    scheduler.set_timesteps(50)
    grid = GRIDS["leading"](CHAIN, 50)
    states = []

    def step_noise(i):
        return torch.zeros(SHAPE) if i % 2 else torch.ones(SHAPE)

    denoise = guided_denoise(network, CHAIN, "epsilon", COND)
    SAMPLERS["ddpm"](
        lambda x, t: states.append(x) or denoise(x, t), start(), CHAIN, grid, variance=variance, step_noise=step_noise
    )
    for i, t in enumerate(scheduler.timesteps[:-1]):
        output = network(states[i], t)
        generator, again = torch.Generator().manual_seed(i), torch.Generator().manual_seed(i)
        drawn = scheduler.step(output, t, states[i], generator=generator, return_dict=False)[0]
        deviation = scheduler._get_variance(int(t)).sqrt()
        mean = drawn - deviation * torch.randn(SHAPE, generator=again)
        same(states[i + 1], mean + deviation * step_noise(i))


def test_the_second_order_multistep_solver_is_that_of_diffusers_on_the_chain():
    for num_steps in (10, 20):  # below and above 15 steps, where lower_order_final changes for theirs
        scheduler = DPMSolverMultistepScheduler(
            **SD, solver_order=2, algorithm_type="dpmsolver++", timestep_spacing="leading", steps_offset=1
        )
        scheduler.set_timesteps(num_steps)
        expected = theirs(scheduler, start())
        grid = torch.cat([CHAIN.t_from_timestep(scheduler.timesteps.double()), torch.zeros(1, dtype=torch.float64)])
        same(ours("dpmpp_2m", CHAIN, "epsilon", grid), expected)
        same(ours("dpmpp_2m_sd35", CHAIN, "epsilon", grid), expected)


def test_the_second_order_multistep_solver_is_that_of_diffusers_on_rectified_flow():
    scheduler = DPMSolverMultistepScheduler(
        solver_order=2,
        algorithm_type="dpmsolver++",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
    )
    scheduler.set_timesteps(20)
    latents = start()
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        latents = scheduler.step(network(latents, 1000 * sigma), t, latents, return_dict=False)[0]
    grid = FLOW.t_from_tau(scheduler.sigmas.double())
    same(ours("dpmpp_2m", FLOW, "velocity", grid), latents)
    assert (ours("dpmpp_2m_sd35", FLOW, "velocity", grid) - latents).abs().max() > 1e-4


def test_the_discrete_euler_scheduler_of_sdxl_gives_the_same_trajectory():
    scheduler = EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(30)
    grid = GRIDS["leading"](CHAIN, 30)
    torch.testing.assert_close(CHAIN.timestep(grid[:-1]).float(), scheduler.timesteps, rtol=0, atol=1e-4)
    # their table is a float32 product: 1 - alpha_bar has lost digits at low noise
    torch.testing.assert_close(CHAIN.tau(grid).float(), scheduler.sigmas, rtol=3e-5, atol=0)
    # theirs moves sigma / alpha units; its start is noise * sqrt(1 + (sigma / alpha)^2), ours the noise itself
    expected = theirs(scheduler, start() * scheduler.init_noise_sigma)
    same(ours("euler", CHAIN, "epsilon", grid), expected)


def test_the_karras_grid_is_that_of_diffusers():
    scheduler = DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True)
    scheduler.set_timesteps(20)
    tau = CHAIN.tau(GRIDS["karras"](CHAIN, 20))
    torch.testing.assert_close(tau.float(), scheduler.sigmas, rtol=3e-5, atol=0)


@pytest.mark.parametrize(
    ("ours_name", "theirs_name", "bounds"),
    [
        ("linear", "linear", (1e-4, 0.02)),
        ("scaled_linear", "scaled_linear", (0.00085, 0.012)),
        ("cosine", "squaredcos_cap_v2", (1e-4, 0.02)),
    ],
)
def test_the_tables_of_alpha_bar_and_the_noising_are_those_of_diffusers(ours_name, theirs_name, bounds):
    scheduler = DDPMScheduler(beta_schedule=theirs_name, beta_start=bounds[0], beta_end=bounds[1])
    schedule = VariancePreserving(ours_name, *bounds)
    torch.testing.assert_close(schedule.alpha_bar.float(), scheduler.alphas_cumprod, rtol=2e-4, atol=2e-6)
    noise, k = start().flip(0), torch.tensor([3, 900])
    expected = scheduler.add_noise(start(), noise, k)
    same(schedule.add_noise(start(), noise, (k.double() + 1) / 1000), expected)
