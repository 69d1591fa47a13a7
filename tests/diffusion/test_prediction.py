"""Predictions: each one's true target means the true latents, on every schedule that defines it."""

import pytest
import torch

from mmdit.diffusion import (
    PREDICTIONS,
    RectifiedFlow,
    VariancePreserving,
    clamp_t,
    from_denoised,
    target,
    time_limits,
    to_denoised,
)

FLOW, SHIFTED, CHAIN = RectifiedFlow(), RectifiedFlow(3.0), VariancePreserving()
VALID = [
    ("velocity", FLOW),
    ("velocity", SHIFTED),
    ("epsilon", FLOW),
    ("epsilon", SHIFTED),
    ("epsilon", CHAIN),
    ("v", FLOW),
    ("v", SHIFTED),
    ("v", CHAIN),
    ("sample", FLOW),
    ("sample", SHIFTED),
    ("sample", CHAIN),
]
every_valid = pytest.mark.parametrize(("prediction", "schedule"), VALID)


def pair(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, count, 3, 4, 4, generator=generator, dtype=torch.float64)


def test_the_table_of_valid_pairs_covers_every_prediction():
    assert {prediction for prediction, _ in VALID} == set(PREDICTIONS)


@every_valid
def test_the_true_target_means_the_true_latents_at_every_level(prediction, schedule):
    t = clamp_t(prediction, torch.tensor([0.0, 0.001, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64), schedule)
    latents, noise = pair(len(t))
    noisy_latents = schedule.add_noise(latents, noise, t)
    output = target(prediction, latents, noise, t, schedule)
    torch.testing.assert_close(to_denoised(prediction, output, noisy_latents, t, schedule), latents, rtol=0, atol=1e-11)


@every_valid
def test_from_denoised_inverts_to_denoised_and_gives_the_target(prediction, schedule):
    t = clamp_t(prediction, torch.tensor([0.001, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64), schedule)
    latents, noise = pair(len(t))
    noisy_latents = schedule.add_noise(latents, noise, t)
    again = from_denoised(prediction, latents, noisy_latents, t, schedule)
    torch.testing.assert_close(again, target(prediction, latents, noise, t, schedule), rtol=0, atol=1e-9)


@every_valid
def test_half_precision_outputs_are_combined_in_float32(prediction, schedule):
    noisy_latents, t = torch.randn(2, 1, 2, 2), torch.tensor([0.3, 0.6])
    denoised = to_denoised(prediction, torch.randn(2, 1, 2, 2).bfloat16(), noisy_latents, t, schedule)
    assert denoised.dtype == torch.float32


def test_velocity_is_the_derivative_of_the_path():
    latents, noise = pair(1)
    low, high = torch.tensor([0.4]).double(), torch.tensor([0.4001]).double()
    for schedule in (FLOW, SHIFTED):
        rise = schedule.add_noise(latents, noise, high) - schedule.add_noise(latents, noise, low)
        clock = (schedule.sigma(high) - schedule.sigma(low)).item()
        torch.testing.assert_close(rise / clock, target("velocity", latents, noise, low, schedule))


def test_v_is_the_derivative_along_the_circle_of_the_variance_preserving_schedule():
    latents, noise = pair(1)
    t = torch.tensor([0.4], dtype=torch.float64)
    alpha, sigma = CHAIN.alpha(t).item(), CHAIN.sigma(t).item()
    torch.testing.assert_close(target("v", latents, noise, t, CHAIN), alpha * noise - sigma * latents)


def test_only_singular_ends_are_cut_off():
    assert time_limits("velocity", FLOW) == (0.0, 1.0)
    assert time_limits("v", FLOW) == (0.0, 1.0)
    assert time_limits("epsilon", FLOW) == (0.0, 0.999)
    assert time_limits("sample", FLOW) == (0.001, 1.0)
    assert time_limits("epsilon", CHAIN) == (0.0, 1.0)  # k = 999 keeps a little image: the releases start there
    assert time_limits("v", CHAIN) == (0.0, 1.0)
    assert time_limits("sample", CHAIN) == (0.001, 1.0)
    assert clamp_t("epsilon", torch.tensor([0.5, 1.0]), FLOW).tolist() == [0.5, pytest.approx(0.999)]


@every_valid
def test_nothing_is_infinite_at_the_ends_after_clamping(prediction, schedule):
    t = clamp_t(prediction, torch.tensor([0.0, 1.0]), schedule)
    noisy_latents, output = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    assert torch.isfinite(to_denoised(prediction, output, noisy_latents, t, schedule)).all()


def test_what_a_schedule_does_not_define_is_refused_in_words():
    x, t = torch.zeros(1, 1, 2, 2), torch.tensor([0.5])
    for call in (to_denoised, target):
        with pytest.raises(ValueError, match="'velocity' belongs to rectified_flow"):
            call("velocity", x, x, t, CHAIN)
    with pytest.raises(ValueError, match="did you mean 'epsilon'"):
        to_denoised("epsilom", x, x, t, FLOW)
