"""Schedules against their formulas, their published tables, and the chain they summarise."""

import math

import pytest
import torch

from mmdit.config import RectifiedFlowConfig, VariancePreservingConfig
from mmdit.diffusion import SCHEDULES, RectifiedFlow, VariancePreserving, build_schedule, transition

DOUBLE = torch.float64
BETA_NAMES = ["linear", "scaled_linear", "cosine", "constant"]
ALL = [RectifiedFlow(), RectifiedFlow(shift=3.0), *(VariancePreserving(betas=name) for name in BETA_NAMES)]


def describe(schedule):
    return "-".join(str(v) for v in list(schedule.describe().values())[:2])


def times(*values):
    return torch.tensor(values, dtype=DOUBLE)


every_schedule = pytest.mark.parametrize("schedule", ALL, ids=describe)


@every_schedule
def test_t_zero_is_exactly_the_data(schedule):
    latents, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    assert schedule.alpha(times(0)).item() == 1.0
    assert schedule.sigma(times(0)).item() == 0.0
    assert torch.equal(schedule.add_noise(latents, noise, torch.zeros(3)), latents)


@every_schedule
def test_sigma_over_alpha_strictly_rises_with_t_between_the_indices_too(schedule):
    t = torch.linspace(0, 1, 7001, dtype=DOUBLE)[:-1]
    assert (torch.diff(schedule.sigma(t) / schedule.alpha(t)) > 0).all()
    assert (torch.diff(schedule.tau(t)) > 0).all()


@every_schedule
def test_the_clocks_are_inverted_exactly(schedule):
    t = torch.cat([times(0.001, 1.0), torch.linspace(0.0013, 0.9987, 501, dtype=DOUBLE)])
    torch.testing.assert_close(schedule.t_from_tau(schedule.tau(t)), t, rtol=0, atol=1e-9)
    torch.testing.assert_close(schedule.t_from_timestep(schedule.timestep(t)), t, rtol=0, atol=1e-12)
    assert schedule.t_from_tau(times(0)).item() == 0.0


@every_schedule
def test_ode_coordinates_move_noise_as_tau_and_come_back(schedule):
    latents, noise = torch.randn(2, 3, 4, 4, dtype=DOUBLE), torch.randn(2, 3, 4, 4, dtype=DOUBLE)
    t = times(0.3, 0.8)
    noisy_latents = schedule.add_noise(latents, noise, t)
    y, tau = schedule.ode_coordinates(noisy_latents, t)
    torch.testing.assert_close(schedule.from_ode_coordinates(y, t), noisy_latents)
    # dy/dtau = (y - latents) / tau along the straight line that this pair of latents and noise draws
    slope = noise - latents if isinstance(schedule, RectifiedFlow) else noise
    torch.testing.assert_close((y - latents) / tau.reshape(-1, 1, 1, 1), slope, rtol=1e-9, atol=1e-9)


@every_schedule
def test_results_follow_the_dtype_of_t_but_stay_at_least_float32(schedule):
    wide = torch.linspace(0.05, 1, 40, dtype=DOUBLE)
    for read in (schedule.alpha, schedule.sigma, schedule.timestep, schedule.tau):
        assert read(wide).dtype == DOUBLE
        assert read(wide.float()).dtype == torch.float32
        assert read(wide.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(schedule.alpha(wide.float()), schedule.alpha(wide).float(), rtol=1e-3, atol=2e-7)
    torch.testing.assert_close(schedule.sigma(wide.float()), schedule.sigma(wide).float(), rtol=2e-6, atol=0)


def test_bfloat16_latents_are_mixed_in_float32():
    latents, noise = torch.randn(2, 1, 2, 2).bfloat16(), torch.randn(2, 1, 2, 2)
    mixed = RectifiedFlow().add_noise(latents, noise, torch.tensor([0.5, 0.25]))
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed[1], 0.75 * latents[1].float() + 0.25 * noise[1])


def test_rectified_flow_ends_in_pure_noise_and_is_linear_without_shift():
    t = torch.linspace(0, 1, 11, dtype=DOUBLE)
    for shift in (1.0, 3.0, 0.5):
        assert RectifiedFlow(shift).alpha(times(1)).item() == 0.0
        assert RectifiedFlow(shift).sigma(times(1)).item() == 1.0
    torch.testing.assert_close(RectifiedFlow().sigma(t), t)
    torch.testing.assert_close(RectifiedFlow().timestep(t), 1000 * t)


def test_shift_is_the_papers_map_and_reaches_the_network():
    schedule, t = RectifiedFlow(shift=3.0), torch.linspace(0, 1, 11, dtype=DOUBLE)
    shifted = 3 * t / (1 + 2 * t)
    torch.testing.assert_close(schedule.sigma(t), shifted)
    torch.testing.assert_close(schedule.alpha(t), 1 - shifted)
    torch.testing.assert_close(schedule.timestep(t), 1000 * shifted)


def test_alpha_bar_of_stable_diffusion_has_its_published_values():
    schedule = VariancePreserving()
    assert schedule.alpha_bar[0].item() == pytest.approx(0.99915, abs=1e-12)
    assert schedule.alpha_bar[999].item() == pytest.approx(0.0046601, abs=5e-8)
    # Lin et al. 2023, arXiv:2305.08891, section 2: sqrt(alpha_bar) at the last step of Stable Diffusion
    assert schedule.alpha(times(1)).item() == pytest.approx(0.068265, abs=5e-7)
    assert schedule.sigma(times(1 / 1000)).item() == pytest.approx(0.029, abs=2e-4)


@pytest.mark.parametrize("name", BETA_NAMES)
def test_the_table_stands_at_k_plus_one_over_T(name):
    schedule = VariancePreserving(betas=name)
    t = (torch.arange(1000, dtype=DOUBLE) + 1) / 1000
    torch.testing.assert_close(schedule.alpha(t) ** 2, schedule.alpha_bar, rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.timestep(t), torch.arange(1000, dtype=DOUBLE), rtol=0, atol=1e-9)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t), rtol=1e-14, atol=0)


def test_between_two_indices_log_sigma_over_alpha_is_linear():
    schedule = VariancePreserving()
    at = lambda index: schedule.tau(times((index + 1) / 1000)).log().item()  # noqa: E731
    assert at(400.25) == pytest.approx(0.75 * at(400) + 0.25 * at(401), abs=1e-12)
    assert at(0.5) == pytest.approx(0.5 * at(0) + 0.5 * at(1), abs=1e-12)
    assert schedule.timestep(times(0.0004)).item() == 0.0


@pytest.mark.parametrize("name", BETA_NAMES)
def test_all_single_steps_of_the_chain_give_the_closed_form(name):
    schedule = VariancePreserving(betas=name)
    # run the chain on symbols: the weight of the data, and the variance of the sum of all noises
    weight, variance = torch.ones((), dtype=DOUBLE), torch.zeros((), dtype=DOUBLE)
    one, zero = torch.ones((), dtype=DOUBLE), torch.zeros((), dtype=DOUBLE)
    for k in range(1000):
        weight = schedule.single_step(weight, zero, k)
        variance = schedule.single_step(zero, one, k) ** 2 + schedule.single_step(one, zero, k) ** 2 * variance
        t = times((k + 1) / 1000)
        if k in (0, 1, 17, 500, 999):
            torch.testing.assert_close(weight, schedule.alpha(t)[0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(variance, schedule.sigma(t)[0] ** 2, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BETA_NAMES)
def test_the_transition_between_neighbours_is_the_chains_step(name):
    schedule = VariancePreserving(betas=name)
    k = torch.tensor([1, 10, 500, 990])
    a, variance = transition(schedule, k.double() / 1000, (k.double() + 1) / 1000)
    torch.testing.assert_close(a**2, 1 - schedule.betas[k], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(variance, schedule.betas[k], rtol=1e-9, atol=1e-12)


@every_schedule
def test_transitions_compose(schedule):
    a_first, v_first = transition(schedule, times(0.1), times(0.4))
    a_second, v_second = transition(schedule, times(0.4), times(0.9))
    a_whole, v_whole = transition(schedule, times(0.1), times(0.9))
    torch.testing.assert_close(a_first * a_second, a_whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(a_second**2 * v_first + v_second, v_whole, rtol=1e-12, atol=0)


def test_constant_betas_make_the_chain_time_homogeneous_and_the_others_do_not():
    def steps(name):
        schedule = VariancePreserving(betas=name, beta_start=0.001, beta_end=0.01)
        t = torch.arange(1, 1000, dtype=DOUBLE) / 1000
        return transition(schedule, t, t + 0.001)[1]

    constant = steps("constant")
    torch.testing.assert_close(constant, torch.full_like(constant, 0.01), rtol=1e-9, atol=0)
    for name in ("linear", "scaled_linear", "cosine"):
        assert (torch.diff(steps(name)) > 0).float().mean() > 0.99


def test_linear_and_cosine_betas_follow_their_papers():
    linear = VariancePreserving(betas="linear", beta_start=1e-4, beta_end=0.02)
    assert linear.betas[[0, 999]].tolist() == [1e-4, 0.02]
    assert linear.alpha_bar[999].item() == pytest.approx(4.0358e-5, rel=1e-4)  # Ho et al. 2020
    cosine = VariancePreserving(betas="cosine")
    level = lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    assert cosine.alpha_bar[499].item() == pytest.approx(level(0.5) / level(0), rel=1e-10)
    assert cosine.betas.max().item() == 0.999


def test_snap_turns_uniform_times_into_uniform_indices():
    schedule = VariancePreserving()
    u = (torch.arange(5000, dtype=DOUBLE) + 0.5) / 5000
    k = schedule.timestep(schedule.snap(u)).round().long()
    assert torch.equal(torch.bincount(k, minlength=1000), torch.full((1000,), 5))
    at_index = (torch.arange(1000, dtype=DOUBLE) + 1) / 1000
    assert torch.equal(schedule.snap(at_index), at_index)
    torch.testing.assert_close(schedule.snap(at_index.float()), at_index.float(), rtol=0, atol=1e-7)
    assert schedule.snap(times(0.0)).item() == 0.001
    assert RectifiedFlow().snap(times(0.0123456)).item() == 0.0123456


def test_configs_build_their_schedules_and_the_stamp_tells_them_apart():
    flow = build_schedule(RectifiedFlowConfig(shift=3.0))
    assert isinstance(flow, RectifiedFlow)
    assert flow.shift == 3.0
    chain = build_schedule(VariancePreservingConfig(betas="linear", num_steps=20))
    assert isinstance(chain, VariancePreserving)
    assert len(chain.betas) == 20
    stamps = [schedule.describe() for schedule in [*ALL, chain]]
    assert all(stamp["name"] in SCHEDULES for stamp in stamps)
    assert len({str(stamp) for stamp in stamps}) == len(stamps)


def test_a_chain_of_one_step_works():
    schedule = VariancePreserving(betas="constant", beta_end=0.5, num_steps=1)
    torch.testing.assert_close(schedule.alpha(times(0, 1)) ** 2, times(1, 0.5))
    torch.testing.assert_close(schedule.t_from_tau(schedule.tau(times(0.5, 1))), times(0.5, 1))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: RectifiedFlow(shift=0), "shift must be positive"),
        (lambda: VariancePreserving(betas="scaled_linaer"), "did you mean 'scaled_linear'"),
        (lambda: VariancePreserving(num_steps=0), "num_steps must be at least 1"),
        (lambda: VariancePreserving(betas="linear", beta_start=0.5, beta_end=1.5), "betas must lie in"),
        (lambda: VariancePreserving().single_step(torch.zeros(1), torch.zeros(1), 1000), "k must be in 0 .. 999"),
    ],
)
def test_impossible_schedules_are_refused_in_words(build, words):
    with pytest.raises(ValueError, match=words):
        build()
