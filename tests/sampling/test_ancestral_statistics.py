"""Stochastic samplers, exactly: with a linear denoiser a sample is a weighted sum of noises; weights are compared."""

import math

import pytest
import torch

from mmdit.diffusion import RectifiedFlow, VariancePreserving
from mmdit.sampling import GRIDS, SAMPLERS

CHAIN = VariancePreserving()


def variances(sampler, schedule, grid, gain, **options):
    """Variance of the noisy latents at each level of the grid, for denoised = gain(t) * noisy_latents.

    Row 0 of the batch starts from 1 and gets no noise; row i + 1 starts from 0 and gets 1 at step i. The rows are
    then the weights of the independent standard normals in the result.
    """
    count, seen = len(grid) - 1, []

    def denoise(noisy_latents, t):
        seen.append(noisy_latents.square().sum().item())
        return gain(t).reshape(-1, 1, 1, 1) * noisy_latents

    def step_noise(i):
        return torch.eye(count + 1, dtype=torch.float64)[i + 1].reshape(-1, 1, 1, 1)

    start = torch.eye(count + 1, dtype=torch.float64)[0].reshape(-1, 1, 1, 1)
    result = SAMPLERS[sampler](denoise, start, schedule, grid, step_noise=step_noise, **options)
    return [*seen, result.square().sum().item()]


def gaussian_gain(schedule, deviation):
    def gain(t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)

    return gain


@pytest.mark.parametrize("num_steps", [3, 20])
def test_with_beta_variance_unit_normal_data_keep_unit_variance_at_every_level(num_steps):
    grid = GRIDS["linear"](CHAIN, num_steps)
    found = variances("ddpm", CHAIN, grid, gaussian_gain(CHAIN, 1.0), variance="beta")
    assert found[:-1] == pytest.approx([1.0] * num_steps, abs=1e-12)
    # the last step adds no noise: what is left is alpha^2 of the level before it
    assert found[-1] == pytest.approx(CHAIN.alpha(grid[-2:-1]).item() ** 2, abs=1e-12)


def test_with_posterior_variance_a_data_point_leaves_exactly_sigma_squared_at_every_level():
    grid = GRIDS["leading"](CHAIN, 20)
    found = variances("ddpm", CHAIN, grid, lambda t: torch.zeros_like(t), variance="posterior")
    # start from the marginal's own deviation: sigma at grid[0] in place of 1
    sigma = CHAIN.sigma(grid)
    before = found[0] - sigma[0].item() ** 2
    ratios = [(CHAIN.alpha(grid[:1]) / CHAIN.alpha(t)).item() * (CHAIN.sigma(t) / sigma[0]).item() ** 2 for t in grid]
    expected = [s**2 + r**2 * before for s, r in zip(sigma.tolist(), ratios, strict=True)]
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("deviation", [0.3, 1.0])
def test_the_whole_chain_follows_the_closed_recursion_and_ends_at_the_data_variance(variance, deviation):
    grid = GRIDS["leading"](CHAIN, 1000)
    gain = gaussian_gain(CHAIN, deviation)
    v = 1.0
    for high, low in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        k = round(high * 1000) - 1
        beta, bar = CHAIN.betas[k].item(), CHAIN.alpha_bar[k].item()
        bar_low = CHAIN.alpha_bar[k - 1].item() if k else 1.0
        # Ho et al. 2020, Eq. 7
        weight = math.sqrt(1 - beta) * (1 - bar_low) / (1 - bar)
        weight += math.sqrt(bar_low) * beta / (1 - bar) * gain(torch.tensor([high], dtype=torch.float64)).item()
        added = beta if variance == "beta" else beta * (1 - bar_low) / (1 - bar)
        v = weight**2 * v + (added if low > 0 else 0.0)
    found = variances("ddpm", CHAIN, grid, gain, variance=variance)[-1]
    assert found == pytest.approx(v, rel=1e-9)
    # neither variance is exact for data of this spread (Ho et al., 3.2): the posterior's leaves out that of `denoised`
    assert found == pytest.approx(deviation**2, rel=0.05)


def test_on_a_data_point_ddim_keeps_the_marginal_for_every_eta_on_both_schedules():
    for schedule in (RectifiedFlow(3.0), CHAIN):
        grid = GRIDS["linear"](schedule, 15)
        first = schedule.sigma(grid[:1]).item() ** 2
        for eta in (0.0, 0.4, 1.0):
            found = variances("ddim", schedule, grid, lambda t: torch.zeros_like(t), eta=eta)
            # sigma_0 < 1 on the chain: the start from unit noise is a little too wide, and only shrinks
            expected = (schedule.sigma(grid) ** 2).tolist()
            excess = [f - e for f, e in zip(found, expected, strict=True)]
            assert all(-1e-12 < e <= 1 - first + 1e-12 for e in excess)
            if isinstance(schedule, RectifiedFlow):
                assert found == pytest.approx(expected, abs=1e-12)


def test_ddim_with_eta_one_is_ancestral_sampling_with_posterior_variance():
    noise = torch.randn(21, 2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    denoise = lambda x, t: torch.tanh(0.5 * x)  # noqa: E731
    grid = GRIDS["leading"](CHAIN, 20)
    step_noise = lambda i: noise[i + 1]  # noqa: E731
    ddim = SAMPLERS["ddim"](denoise, noise[0], CHAIN, grid, step_noise=step_noise, eta=1.0)
    ddpm = SAMPLERS["ddpm"](denoise, noise[0], CHAIN, grid, step_noise=step_noise, variance="posterior")
    torch.testing.assert_close(ddim, ddpm, rtol=0, atol=1e-12)


def test_rectified_flow_with_eta_one_forgets_the_noise_it_started_from():
    flow = RectifiedFlow()
    denoise = lambda x, t: torch.zeros_like(x)  # noqa: E731
    seen = []

    def step_noise(i):
        return torch.ones(1, 1, 1, 1, dtype=torch.float64)

    for start in (-3.0, 3.0):
        states = []
        SAMPLERS["ddim"](
            lambda x, t, states=states: states.append(x.item()) or denoise(x, t),
            torch.full((1, 1, 1, 1), start, dtype=torch.float64),
            flow,
            GRIDS["linear"](flow, 4),
            step_noise=step_noise,
            eta=1.0,
        )
        seen.append(states)
    assert seen[0][0] != seen[1][0]
    assert seen[0][1:] == pytest.approx(seen[1][1:], abs=1e-12)
