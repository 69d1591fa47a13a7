"""What every sampler promises, run over the table SAMPLERS on both schedules."""

import pytest
import torch

from mmdit.config import SamplingConfig
from mmdit.diffusion import RectifiedFlow, VariancePreserving
from mmdit.sampling import GRIDS, SAMPLERS, sampler_options

FLOW, CHAIN = RectifiedFlow(3.0), VariancePreserving()
VALID = [
    ("euler", FLOW, {}),
    ("euler", CHAIN, {}),
    ("heun", FLOW, {}),
    ("heun", CHAIN, {}),
    ("ddim", FLOW, {"eta": 0.0}),
    ("ddim", CHAIN, {"eta": 0.0}),
    ("ddim", FLOW, {"eta": 0.5}),
    ("ddim", CHAIN, {"eta": 1.0}),
    ("ddpm", CHAIN, {"variance": "beta"}),
    ("ddpm", CHAIN, {"variance": "posterior"}),
    ("dpmpp_2m", FLOW, {}),
    ("dpmpp_2m", CHAIN, {}),
    ("dpmpp_2m_sd35", FLOW, {}),
    ("dpmpp_2m_sd35", CHAIN, {}),
]
REFUSED = [("ddpm", FLOW)]
every_valid = pytest.mark.parametrize(("name", "schedule", "options"), VALID)


def noise_of(step, batch=3, size=(4, 6)):
    return torch.randn(batch, 2, *size, generator=torch.Generator().manual_seed(step))


def denoise(noisy_latents, t):
    """Not linear, depends on t, and treats each row by itself."""
    return torch.tanh(noisy_latents) * (1.2 - t.reshape(-1, 1, 1, 1)).to(noisy_latents.dtype)


def test_the_tables_cover_every_sampler_on_both_schedules():
    told = {(name, schedule) for name, schedule, _ in VALID} | set(REFUSED)
    assert told == {(name, schedule) for name in SAMPLERS for schedule in (FLOW, CHAIN)}


@pytest.mark.parametrize(("name", "schedule"), REFUSED)
def test_a_sampler_that_the_schedule_cannot_have_is_refused_in_words(name, schedule):
    with pytest.raises(ValueError, match="with rectified_flow use 'euler'"):
        SAMPLERS[name](denoise, noise_of(0), schedule, GRIDS["linear"](schedule, 4), step_noise=noise_of)


@every_valid
def test_the_result_is_finite_float32_and_leaves_the_noise_untouched(name, schedule, options):
    noise = noise_of(99)
    before = noise.clone()
    for given in (noise, noise.bfloat16()):
        grid = GRIDS["release"](schedule, 5)
        latents = SAMPLERS[name](denoise, given, schedule, grid, step_noise=noise_of, **options)
        assert latents.shape == noise.shape
        assert latents.dtype == torch.float32
        assert torch.isfinite(latents).all()
    assert torch.equal(noise, before)


@every_valid
def test_a_sample_does_not_depend_on_its_neighbours(name, schedule, options):
    grid, noise = GRIDS["linear"](schedule, 4), noise_of(99)
    whole = SAMPLERS[name](denoise, noise, schedule, grid, step_noise=noise_of, **options)
    alone = SAMPLERS[name](denoise, noise[1:2], schedule, grid, step_noise=lambda i: noise_of(i)[1:2], **options)
    torch.testing.assert_close(whole[1:2], alone, rtol=0, atol=1e-6)


@every_valid
def test_the_last_step_gives_the_last_denoised_latents(name, schedule, options):
    seen = []
    latents = SAMPLERS[name](
        denoise,
        noise_of(99),
        schedule,
        GRIDS["linear"](schedule, 4),
        step_noise=noise_of,
        callback=lambda i, t, denoised: seen.append(denoised),
        **options,
    )
    torch.testing.assert_close(latents, seen[-1], rtol=0, atol=1e-6)


@every_valid
def test_the_callback_hears_each_step_once_and_t_is_the_grids_in_float64(name, schedule, options):
    grid, heard, asked = GRIDS["release"](schedule, 5), [], []

    def listening(noisy_latents, t):
        assert t.shape == (3,)
        assert t.dtype == torch.float64
        asked.append(t[0].item())
        return denoise(noisy_latents, t)

    SAMPLERS[name](
        listening,
        noise_of(99),
        schedule,
        grid,
        step_noise=noise_of,
        callback=lambda i, t, denoised: heard.append((i, t)),
        **options,
    )
    assert heard == list(enumerate(grid[:-1].tolist()))
    assert set(asked) == set(grid[:-1].tolist())
    assert len(asked) == (2 * 5 - 1 if name == "heun" else 5)


@every_valid
def test_a_grid_with_its_beginning_cut_off_is_the_rest_of_the_same_trajectory(name, schedule, options):
    grid, states = GRIDS["linear"](schedule, 6), []

    def recording(noisy_latents, t):
        states.append((t[0].item(), noisy_latents))
        return denoise(noisy_latents, t)

    whole = SAMPLERS[name](recording, noise_of(99), schedule, grid, step_noise=noise_of, **options)
    middle = next(x for t, x in states if t == grid[3].item())
    if name == "heun":  # the trial point comes first, the state of the trajectory second
        middle = [x for t, x in states if t == grid[3].item()][1]
    rest = SAMPLERS[name](denoise, middle, schedule, grid[3:], step_noise=lambda i: noise_of(i + 3), **options)
    if name.startswith("dpmpp"):  # a multistep method forgets its history; it still ends nearby
        assert (rest - whole).abs().max() < 0.2
    else:
        torch.testing.assert_close(rest, whole, rtol=0, atol=1e-6)


@every_valid
def test_no_gradient_is_recorded(name, schedule, options):
    weight = torch.ones((), requires_grad=True)
    latents = SAMPLERS[name](
        lambda x, t: weight * denoise(x, t),
        noise_of(99),
        schedule,
        GRIDS["linear"](schedule, 3),
        step_noise=noise_of,
        **options,
    )
    assert not latents.requires_grad


@pytest.mark.parametrize("name", SAMPLERS)
def test_unknown_options_are_refused_by_name(name):
    with pytest.raises(ValueError, match="churn"):
        SAMPLERS[name](denoise, noise_of(0), CHAIN, GRIDS["linear"](CHAIN, 3), step_noise=noise_of, churn=1.0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("grid", [[1.0], [0.0, 1.0], [1.0, 0.5], [1.0, 0.5, 0.5, 0.0], [1.5, 0.0], [[1.0, 0.0]]])
def test_what_is_no_grid_is_refused(name, grid):
    with pytest.raises(ValueError, match="a grid"):
        SAMPLERS[name](denoise, noise_of(0), CHAIN, torch.tensor(grid), step_noise=noise_of)


@pytest.mark.parametrize(("name", "options"), [("ddim", {"eta": 0.5}), ("ddpm", {})])
def test_noise_is_never_ambient(name, options):
    grid = GRIDS["linear"](CHAIN, 3)
    with pytest.raises(ValueError, match="pass step_noise"):
        SAMPLERS[name](denoise, noise_of(0), CHAIN, grid, **options)
    with pytest.raises(ValueError, match="has shape"):
        SAMPLERS[name](denoise, noise_of(0), CHAIN, grid, step_noise=lambda i: noise_of(i, batch=1), **options)


@pytest.mark.parametrize(("name", "options"), [("ddim", {"eta": 1.0}), ("ddpm", {})])
def test_noise_is_asked_for_at_every_step_but_the_last(name, options):
    asked = []
    SAMPLERS[name](
        denoise,
        noise_of(0),
        CHAIN,
        GRIDS["linear"](CHAIN, 4),
        step_noise=lambda i: asked.append(i) or noise_of(i),
        **options,
    )
    assert asked == [0, 1, 2]


def test_wrong_values_of_options_are_refused():
    grid = GRIDS["linear"](CHAIN, 3)
    with pytest.raises(ValueError, match="eta must lie in"):
        SAMPLERS["ddim"](denoise, noise_of(0), CHAIN, grid, eta=2.0)
    with pytest.raises(ValueError, match="variance must be 'beta' or 'posterior'"):
        SAMPLERS["ddpm"](denoise, noise_of(0), CHAIN, grid, step_noise=noise_of, variance="learned")
    with pytest.raises(ValueError, match="did you mean 'eta'"):
        SAMPLERS["ddim"](denoise, noise_of(0), CHAIN, grid, etta=0.5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_configs_options_are_those_its_sampler_reads(name):
    config = SamplingConfig(sampler=name, variance="beta")
    expected = {"ddim": {"eta": 0.0}, "ddpm": {"variance": "beta"}}.get(name, {})
    assert sampler_options(config) == expected
    grid = GRIDS["linear"](CHAIN, 3)
    SAMPLERS[name](denoise, noise_of(0), CHAIN, grid, step_noise=noise_of, **sampler_options(config))
