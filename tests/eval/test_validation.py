"""One error for runs of every target: equal for denoisers that mean the same picture."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdit_eval.validation import losses_by_level, velocity_losses

from mmdit.config import RectifiedFlowConfig, VariancePreservingConfig
from mmdit.diffusion import build_schedule
from mmdit.diffusion.loss import equidistant_levels
from mmdit.diffusion.prediction import from_denoised

RUNS = [
    (RectifiedFlowConfig(), "velocity"),
    (RectifiedFlowConfig(shift=3.0), "velocity"),
    (RectifiedFlowConfig(), "sample"),
    (VariancePreservingConfig(), "epsilon"),
    (VariancePreservingConfig(), "v"),
    (VariancePreservingConfig(), "sample"),
]


class Shrinks(torch.nn.Module):
    """A denoiser of every target that means: the picture is the noisy picture, scaled as for unit Gaussian data."""

    def __init__(self, schedule, prediction):
        super().__init__()
        self.schedule, self.prediction, self.unused = schedule, prediction, torch.nn.Parameter(torch.zeros(1))

    def forward(self, noisy_latents, timestep, conditioning):
        t = self.schedule.t_from_timestep(timestep.double())
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in (self.schedule.alpha(t), self.schedule.sigma(t)))
        denoised = noisy_latents.double() * alpha / (alpha**2 + sigma**2)
        return from_denoised(self.prediction, denoised, noisy_latents.double(), t, self.schedule).float()


def pipeline(config, prediction):
    schedule = build_schedule(config)
    return SimpleNamespace(
        denoiser=Shrinks(schedule, prediction),
        schedule=schedule,
        prediction=prediction,
        precision="fp32",
        vae=SimpleNamespace(encode=lambda pixels: pixels[:, :1, ::4, ::4]),
        encode=lambda captions: torch.zeros(len(captions)),
    )


@pytest.fixture
def reference():
    random = np.random.default_rng(0)
    return SimpleNamespace(
        indices=np.arange(6),
        images=random.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8),
        captions=["x"] * 6,
        batch_size=4,
    )


@pytest.mark.parametrize(("config", "prediction"), RUNS)
def test_denoisers_that_mean_one_picture_have_one_loss(config, prediction, reference):
    ratios, found = velocity_losses(pipeline(config, prediction), reference, 8, seed=0)
    assert ratios == pytest.approx([k / (8 - k) for k in range(1, 8)])
    assert found.shape == (7, 6)
    _, expected = velocity_losses(pipeline(RectifiedFlowConfig(), "velocity"), reference, 8, seed=0)
    assert found == pytest.approx(expected, rel=1e-5)


def test_for_velocity_it_is_the_runs_own_loss_without_the_last_level(reference):
    run = pipeline(RectifiedFlowConfig(), "velocity")
    own = losses_by_level(run, reference, equidistant_levels(8), seed=0)
    _, found = velocity_losses(run, reference, 8, seed=0)
    assert found == pytest.approx(own[:-1], rel=1e-5)


def test_without_conversion_the_targets_do_not_compare(reference):
    losses = [
        losses_by_level(pipeline(VariancePreservingConfig(), name), reference, equidistant_levels(4), seed=0).mean()
        for name in ("epsilon", "v")
    ]
    assert abs(losses[0] - losses[1]) > 0.05 * losses[0]


def test_the_loss_of_a_denoiser_is_that_of_the_formula(reference):
    """E of velocity error for latents x and noise n at t: denoised = (1 - t) z / ((1 - t)^2 + t^2)."""
    from mmdit import rng

    _, found = velocity_losses(pipeline(RectifiedFlowConfig(), "velocity"), reference, 4, seed=3)
    pixels = reference.images.astype(np.float64).transpose(0, 3, 1, 2) / 127.5 - 1
    latents = pixels[:, :1, ::4, ::4]
    noise = rng.normal(3, "val_noise", range(6), latents.shape[1:]).astype(np.float64)
    for level, t in enumerate((0.25, 0.5, 0.75)):
        noisy = (1 - t) * latents + t * noise
        denoised = (1 - t) * noisy / ((1 - t) ** 2 + t**2)
        velocity = (noisy - denoised) / t
        expected = ((velocity - (noise - latents)) ** 2).mean((1, 2, 3))
        assert found[level] == pytest.approx(expected, rel=1e-4)
