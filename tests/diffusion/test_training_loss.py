"""The loss against its definition: plain, per sample, at the levels asked for, comparable between predictions."""

import pytest
import torch

from mmdit.denoiser import Conditioning
from mmdit.diffusion import (
    PREDICTIONS,
    RectifiedFlow,
    VariancePreserving,
    equidistant_levels,
    from_denoised,
    loss_by_level,
    target,
    training_loss,
)

B = 4
COND = Conditioning(torch.zeros(B, 2, 3))


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, B, 3, 4, 4, generator=generator, dtype=dtype)


class Recorder:
    """A denoiser that answers with a function of what it was given and remembers the timesteps."""

    def __init__(self, answer):
        self.answer, self.timesteps = answer, []

    def __call__(self, latents, timestep, conditioning):
        self.timesteps.append(timestep)
        return self.answer(latents, timestep)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_is_the_unweighted_mean_square_of_the_error_in_the_target(prediction):
    latents, noise = batch()
    t, flow = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64), RectifiedFlow(3.0)
    error = torch.randn(B, 3, 4, 4, dtype=torch.float64)
    oracle = Recorder(lambda x, timestep: target(prediction, latents, noise, t, flow) + error)
    loss = training_loss(oracle, latents, COND, noise, t, flow, prediction)
    assert loss.shape == (B,)
    torch.testing.assert_close(loss, error.square().mean((1, 2, 3)))
    torch.testing.assert_close(oracle.timesteps[0].double(), flow.timestep(t), rtol=1e-6, atol=0)
    assert oracle.timesteps[0].dtype == torch.float32


def test_the_loss_of_one_sample_does_not_depend_on_the_others():
    latents, noise = batch()
    t, flow = torch.linspace(0.1, 0.9, B, dtype=torch.float64), RectifiedFlow()
    net = Recorder(lambda x, timestep: 0.3 * x + timestep.reshape(-1, 1, 1, 1) / 1000)
    whole = training_loss(net, latents, COND, noise, t, flow, "velocity")
    part = training_loss(net, latents[1:3], COND.index([1, 2]), noise[1:3], t[1:3], flow, "velocity")
    torch.testing.assert_close(whole[1:3], part, rtol=0, atol=0)


def test_the_loss_is_float32_when_the_network_answers_in_bfloat16():
    latents, noise = batch(torch.float32)
    net = Recorder(lambda x, timestep: (0.5 * x).bfloat16())
    loss = training_loss(net, latents, COND, noise, torch.full((B,), 0.5), RectifiedFlow(), "velocity")
    assert loss.dtype == torch.float32


def test_the_loss_carries_gradients_to_the_denoiser_and_the_validation_loss_does_not():
    latents, noise = batch()
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    net = Recorder(lambda x, timestep: weight * x)
    loss = training_loss(net, latents, COND, noise, torch.full((B,), 0.5), RectifiedFlow(), "velocity")
    loss.mean().backward()
    assert weight.grad.abs() > 0
    assert not loss_by_level(net, latents, COND, noise, 2, RectifiedFlow(), "velocity").requires_grad


def test_levels_are_equidistant_end_in_pure_noise_and_share_their_noise():
    latents, noise = batch()
    net = Recorder(lambda x, timestep: torch.zeros_like(x))
    losses = loss_by_level(net, latents, COND, noise, 8, RectifiedFlow(), "velocity")
    assert losses.shape == (8, B)
    assert equidistant_levels(8).tolist() == [i / 8 for i in range(1, 9)]
    assert [step[0].item() for step in net.timesteps] == [125.0 * i for i in range(1, 9)]
    # a network that says nothing has the same velocity error at every level, because latents and noise are the same
    torch.testing.assert_close(losses, (noise - latents).square().mean((1, 2, 3)).expand(8, B))
    named = loss_by_level(net, latents, COND, noise, [0.25, 1.0], RectifiedFlow(), "velocity")
    torch.testing.assert_close(named, losses[[1, 7]])


@pytest.mark.parametrize("schedule", [RectifiedFlow(3.0), VariancePreserving()])
@pytest.mark.parametrize("common", ["epsilon", "v", "sample", "velocity"])
def test_denoisers_that_mean_the_same_have_the_same_common_loss(schedule, common):
    defined = [p for p in PREDICTIONS if p != "velocity" or isinstance(schedule, RectifiedFlow)]
    latents, noise = batch()
    t = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    if common not in defined:
        with pytest.raises(ValueError, match="belongs to rectified_flow"):
            training_loss(lambda x, s, c: x, latents, COND, noise, t, schedule, "epsilon", common)
        return
    guess = latents + 0.1 * torch.randn(B, 3, 4, 4, dtype=torch.float64)
    noisy_latents = schedule.add_noise(latents, noise, t)
    losses = []
    for prediction in defined:
        output = from_denoised(prediction, guess, noisy_latents, t, schedule)
        net = Recorder(lambda x, timestep, output=output: output)
        losses.append(training_loss(net, latents, COND, noise, t, schedule, prediction, common))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-9, atol=1e-12)


def test_the_common_loss_of_velocity_is_the_denoised_error_over_sigma_squared():
    latents, noise = batch()
    t, flow = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64), RectifiedFlow()
    net = Recorder(lambda x, timestep: 0.7 * x)
    in_velocity = training_loss(net, latents, COND, noise, t, flow, "sample", "velocity")
    in_sample = training_loss(net, latents, COND, noise, t, flow, "sample")
    torch.testing.assert_close(in_velocity, in_sample / flow.sigma(t) ** 2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("common", [None, "velocity", "epsilon"])
def test_the_singular_ends_give_finite_losses(prediction, common):
    latents, noise = batch(torch.float32)
    net = Recorder(lambda x, timestep: torch.zeros_like(x))
    losses = loss_by_level(net, latents, COND, noise, [0.0, 1.0], RectifiedFlow(), prediction, common)
    assert torch.isfinite(losses).all()
    if prediction == "epsilon":
        assert net.timesteps[1][0].item() == pytest.approx(999.0)


def test_no_level_is_refused():
    with pytest.raises(ValueError, match="at least one level"):
        equidistant_levels(0)
