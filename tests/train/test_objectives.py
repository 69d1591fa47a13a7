"""Objective x backbone: every combination trains and samples, also at the ends of time; one schedule serves all."""

from itertools import product

import numpy as np
import pytest
import torch

from mmdit.config import ConfigError
from mmdit.data import make_dataset
from mmdit.data.cache import precompute
from mmdit.diffusion import build_schedule, time_limits, training_loss
from mmdit.models import BACKBONES
from mmdit.pipeline import TextToImage
from mmdit.train.step import BatchDrawer
from mmdit.train.trainer import build_seeded, train

OBJECTIVES = [
    *product(["rectified_flow"], ["velocity", "epsilon", "v", "sample"]),
    *product(["variance_preserving"], ["epsilon", "v", "sample"]),
]
DENSITIES = ["uniform", "logit_normal", "mode", "cosmap"]
SAMPLERS = {"rectified_flow": ["euler", "heun"], "variance_preserving": ["ddim", "ddpm"]}


@pytest.fixture
def backbone(micro, micro_unet):
    """The model tree of a micro backbone by name."""
    transformer = {"depth": 2, "width": 32, "num_heads": 2, "pos_embed_max_size": 8, "pos_embed_base_size": 4}

    def tree(name):
        return micro_unet if name == "unet" else {"name": name, "in_channels": 4, "out_channels": 4, **transformer}

    return tree


@pytest.fixture(scope="module")
def source(vae, text):
    """The micro run's data, encoded once."""
    from mmdit.config import EncodersConfig, ShapesConfig

    dataset = make_dataset(ShapesConfig(num_images=20), "train")
    return precompute(dataset, vae, text, EncodersConfig(t5_length=32), precision="fp32", progress=False)


def batch_of(config, source, text, count=8):
    schedule = build_schedule(config.diffusion.schedule)
    return BatchDrawer(source, text, schedule, config).draw(np.arange(count)), schedule


def losses_of(denoiser, batch, schedule, prediction, t=None):
    t = batch.t if t is None else t
    return training_loss(denoiser, batch.latents, batch.conditioning, batch.noise, t, schedule, prediction)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(("schedule_name", "prediction"), OBJECTIVES)
def test_every_objective_trains_and_samples_on_every_backbone(
    micro, backbone, source, vae, text, name, schedule_name, prediction
):
    diffusion = {"schedule": {"name": schedule_name}, "prediction": prediction}
    config = micro({"model": backbone(name), "diffusion": diffusion})
    batch, schedule = batch_of(config, source, text)
    denoiser = build_seeded(config)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-3)
    history = []
    for _ in range(8):
        losses = losses_of(denoiser, batch, schedule, prediction)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(losses.mean().item())
    assert np.isfinite(history).all()
    assert history[-1] < 0.98 * history[0]  # the same eight images, again and again

    ends = torch.tensor([0.0, 1.0] * 4, dtype=torch.float64)
    assert losses_of(denoiser, batch, schedule, prediction, ends).isfinite().all()
    pipeline = TextToImage(
        denoiser, vae, text, schedule, prediction, config.sampling, config.encoders, precision="fp32"
    )
    decoded, decode = [], pipeline.decode
    pipeline.decode = lambda latents: decoded.append(latents) or decode(latents)
    for sampler in SAMPLERS[schedule_name]:
        images = pipeline(["a red circle", "a star"], [None, "blue"], sampler=sampler, num_steps=2)
        assert images.shape == (2, 64, 64, 3)
        assert decoded[-1].isfinite().all()


@pytest.mark.parametrize(("schedule_name", "prediction"), OBJECTIVES)
def test_a_perfect_denoiser_has_no_loss_up_to_the_singular_ends(micro, source, text, schedule_name, prediction):
    """The oracle answers each prediction from latents and noise; the clamp keeps it defined at t = 0 and 1."""
    from mmdit.diffusion import clamp_t, target

    config = micro({"diffusion": {"schedule": {"name": schedule_name}, "prediction": prediction}})
    batch, schedule = batch_of(config, source, text, 4)
    t = torch.tensor([0.0, 1e-4, 0.9999, 1.0], dtype=torch.float64)
    low, high = time_limits(prediction, schedule)
    seen = {}

    def oracle(noisy_latents, timestep, conditioning):
        seen["timestep"] = timestep
        inside = clamp_t(prediction, t, schedule)
        return target(prediction, batch.latents, batch.noise, inside, schedule)

    assert losses_of(oracle, batch, schedule, prediction, t).max() < 1e-10
    expected = schedule.timestep(t.clamp(low, high))
    torch.testing.assert_close(seen["timestep"], expected.float(), atol=1e-4, rtol=1e-6)
    assert (low > 0) == (prediction == "sample")
    assert (high < 1) == (prediction == "epsilon" and schedule_name == "rectified_flow")


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("schedule_name", ["rectified_flow", "variance_preserving"])
def test_every_density_trains_under_both_schedules(micro, source, text, schedule_name, density):
    diffusion = {"schedule": {"name": schedule_name}, "prediction": "epsilon", "density": {"name": density}}
    config = micro({"diffusion": diffusion})
    batch, schedule = batch_of(config, source, text, 64)
    assert ((batch.t > 0) & (batch.t <= 1)).all()
    assert batch.t.std() > 0.1
    if schedule_name == "variance_preserving":  # the chain's own T times
        torch.testing.assert_close(batch.t * 1000, (batch.t * 1000).round(), atol=1e-9, rtol=0)
    denoiser = build_seeded(config)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-3)
    history = []
    for _ in range(6):
        losses = losses_of(denoiser, batch, schedule, "epsilon")
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(losses.mean().item())
    assert np.isfinite(history).all()
    assert history[-1] < 0.98 * history[0]


def test_training_validation_and_sampling_share_one_schedule(micro, tmp_path, monkeypatch):
    """Shift 3 everywhere or nowhere: the same object, and network times that are those of the shifted level."""
    import mmdit.train.trainer as trainer
    import mmdit.train.validation as room

    seen = {"training": [], "validation": [], "sampling": []}
    original = trainer.update, room.loss_by_level, room.TextToImage

    def update(denoiser, optimizer, accelerator, batches, schedule, config, *rest, **more):
        seen["training"].append(schedule)
        return original[0](denoiser, optimizer, accelerator, batches, schedule, config, *rest, **more)

    def loss_by_level(denoiser, latents, conditioning, noise, levels, schedule, prediction, *rest):
        seen["validation"].append(schedule)
        return original[1](denoiser, latents, conditioning, noise, levels, schedule, prediction, *rest)

    def pipeline(denoiser, vae, text, schedule, *rest, **more):
        seen["sampling"].append(schedule)
        return original[2](denoiser, vae, text, schedule, *rest, **more)

    monkeypatch.setattr(trainer, "update", update)
    monkeypatch.setattr(room, "loss_by_level", loss_by_level)
    monkeypatch.setattr(room, "TextToImage", pipeline)
    diffusion = {"schedule": {"name": "rectified_flow", "shift": 3.0}}
    config = micro({"diffusion": diffusion, "train": {"images": 8, "validate_every": 8, "sample_every": 8}})
    train(config, tmp_path, progress=False)
    schedules = [schedule for where in seen.values() for schedule in where]
    assert all(where for where in seen.values())
    assert len({id(schedule) for schedule in schedules}) == 1
    assert schedules[0].shift == 3.0
    half = torch.tensor([0.5], dtype=torch.float64)
    assert schedules[0].timestep(half).item() == pytest.approx(750.0)  # 3 t / (1 + 2 t)
    again = TextToImage.load(tmp_path)
    assert again.schedule.describe() == schedules[0].describe()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--diffusion.schedule.name", "variance_preserving"], "belongs to rectified_flow"),
        (["--diffusion.prediction", "noise"], "unknown value 'noise'"),
        (["--sampling.sampler", "ddpm"], "ancestral chain of variance_preserving"),
        (["--sampling.grid", "leading"], "is for variance_preserving"),
        (["--sampling.eta", "0.5"], "read by the sampler 'ddim' only"),
        (["--diffusion.density.name", "mode", "--diffusion.density.scale", "1.9"], "1.7519"),
        (["--diffusion.schedule.shift", "0"], "greater than 0"),
        (
            ["--diffusion.schedule.name", "variance_preserving", "--diffusion.prediction", "v",
             "--diffusion.schedule.shift", "3"],
            "unknown field",
        ),
    ],
)  # fmt: skip
def test_objectives_that_make_no_sense_are_refused_in_words(overrides, words):
    from mmdit.config import load_config

    with pytest.raises(ConfigError, match=words):
        load_config(None, overrides)
