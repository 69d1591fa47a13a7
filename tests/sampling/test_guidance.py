"""Guidance: the arithmetic, how often the network runs and on which rows, and what is refused."""

import pytest
import torch

from mmdit.denoiser import Conditioning, skipped_layers
from mmdit.diffusion import PREDICTIONS, RectifiedFlow, VariancePreserving, to_denoised
from mmdit.sampling import GRIDS, SAMPLERS, SkipLayerGuidance, guided_denoise

FLOW, CHAIN = RectifiedFlow(3.0), VariancePreserving()


class Network:
    """Reads the masked mean of its context, and is weaker with blocks left out; remembers every call."""

    def __init__(self):
        self.calls = []

    def __call__(self, latents, timestep, conditioning):
        self.calls.append((latents, timestep, conditioning, skipped_layers(self)))
        mask = conditioning.context_mask
        weight = torch.ones(conditioning.context.shape[:2]) if mask is None else mask.float()
        text = (conditioning.context.float().mean(2) * weight).sum(1) / weight.sum(1)
        strength = 1.0 if not skipped_layers(self) else 0.25
        return (latents * 0.5 + strength * text.reshape(-1, 1, 1, 1)).to(latents.dtype)


def inputs(batch=2, length=5):
    generator = torch.Generator().manual_seed(0)
    conditioning = Conditioning(torch.randn(batch, length, 4, generator=generator))
    null = Conditioning(torch.randn(batch, length, 4, generator=generator))
    noisy_latents = torch.randn(batch, 3, 4, 4, generator=generator)
    return noisy_latents, torch.full((batch,), 0.6, dtype=torch.float64), conditioning, null


def plain(noisy_latents, t, conditioning, prediction="velocity", schedule=FLOW):
    return guided_denoise(Network(), schedule, prediction, conditioning)(noisy_latents, t)


def test_scale_one_runs_the_network_once_on_the_conditioning_alone():
    noisy_latents, t, conditioning, null = inputs()
    for given in (None, null):
        network = Network()
        denoised = guided_denoise(network, FLOW, "velocity", conditioning, given, 1.0)(noisy_latents, t)
        assert len(network.calls) == 1
        latents, timestep, seen, _ = network.calls[0]
        assert latents.shape[0] == 2
        assert seen.context is conditioning.context
        torch.testing.assert_close(timestep.double(), FLOW.timestep(t), rtol=1e-6, atol=0)
        expected = to_denoised("velocity", Network()(noisy_latents, timestep, conditioning), noisy_latents, t, FLOW)
        torch.testing.assert_close(denoised, expected)


def test_scale_zero_runs_the_network_once_on_the_null_alone():
    noisy_latents, t, conditioning, null = inputs()
    network = Network()
    denoised = guided_denoise(network, FLOW, "velocity", conditioning, null, 0.0)(noisy_latents, t)
    assert len(network.calls) == 1
    assert network.calls[0][0].shape[0] == 2
    torch.testing.assert_close(denoised, plain(noisy_latents, t, null))


@pytest.mark.parametrize("scale", [0.5, 4.0, 20.0])
def test_other_scales_run_one_doubled_batch_and_extrapolate_from_the_null(scale):
    noisy_latents, t, conditioning, null = inputs()
    network = Network()
    denoised = guided_denoise(network, FLOW, "velocity", conditioning, null, scale)(noisy_latents, t)
    assert len(network.calls) == 1
    latents, timestep, seen, _ = network.calls[0]
    assert latents.shape[0] == timestep.shape[0] == seen.context.shape[0] == 4
    assert torch.equal(latents[:2], latents[2:])
    positive, without = plain(noisy_latents, t, conditioning), plain(noisy_latents, t, null)
    torch.testing.assert_close(denoised, without + scale * (positive - without), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("prediction", "schedule"), [(p, s) for p in PREDICTIONS for s in (FLOW, CHAIN) if (p, s) != ("velocity", CHAIN)]
)
def test_guidance_on_denoised_is_guidance_on_the_networks_output(prediction, schedule):
    noisy_latents, t, conditioning, null = inputs()
    timestep = schedule.timestep(t).float()
    positive, without = (Network()(noisy_latents, timestep, c) for c in (conditioning, null))
    expected = to_denoised(prediction, without + 3 * (positive - without), noisy_latents, t, schedule)
    denoised = guided_denoise(Network(), schedule, prediction, conditioning, null, 3.0)(noisy_latents, t)
    torch.testing.assert_close(denoised, expected, rtol=1e-5, atol=1e-5)


def test_a_shorter_null_is_padded_and_masked_and_changes_nothing():
    noisy_latents, t, conditioning, null = inputs()
    short = Conditioning(null.context[:, :2])
    network = Network()
    denoised = guided_denoise(network, FLOW, "velocity", conditioning, short, 4.0)(noisy_latents, t)
    mask = network.calls[0][2].context_mask
    assert mask.tolist() == [[True] * 5] * 2 + [[True, True, False, False, False]] * 2
    positive, without = plain(noisy_latents, t, conditioning), plain(noisy_latents, t, short)
    torch.testing.assert_close(denoised, without + 4 * (positive - without), rtol=0, atol=1e-5)


def test_one_null_row_serves_the_whole_batch():
    noisy_latents, t, conditioning, null = inputs()
    one = guided_denoise(Network(), FLOW, "velocity", conditioning, null.index([0]), 4.0)(noisy_latents, t)
    both = guided_denoise(Network(), FLOW, "velocity", conditioning, null.index([0, 0]), 4.0)(noisy_latents, t)
    torch.testing.assert_close(one, both, rtol=0, atol=0)


def test_negative_prompts_are_a_null_per_row():
    noisy_latents, t, conditioning, null = inputs()
    whole = guided_denoise(Network(), FLOW, "velocity", conditioning, null, 4.0)(noisy_latents, t)
    for row in range(2):
        alone = guided_denoise(Network(), FLOW, "velocity", conditioning.index([row]), null.index([row]), 4.0)
        torch.testing.assert_close(alone(noisy_latents[[row]], t[[row]]), whole[[row]], rtol=0, atol=1e-6)


def test_outside_its_interval_guidance_is_off_and_costs_nothing():
    noisy_latents, _, conditioning, null = inputs()
    network = Network()
    denoise = guided_denoise(network, FLOW, "velocity", conditioning, null, 4.0, interval=(0.3, 0.7))
    rows = []
    for level in (0.9, 0.7, 0.5, 0.3, 0.1):
        denoise(noisy_latents, torch.full((2,), level, dtype=torch.float64))
        rows.append(network.calls[-1][0].shape[0])
    assert rows == [2, 4, 4, 4, 2]


def test_skip_layer_guidance_pushes_away_from_the_network_without_its_blocks():
    noisy_latents, _, conditioning, null = inputs()
    t = torch.full((2,), 0.9, dtype=torch.float64)
    network = Network()
    skip = SkipLayerGuidance(scale=2.5, layers=(1, 3))
    denoised = guided_denoise(network, FLOW, "velocity", conditioning, null, 4.0, skip_layer=skip)(noisy_latents, t)
    assert [(len(call[0]), sorted(call[3])) for call in network.calls] == [(4, []), (2, [1, 3])]
    assert skipped_layers(network) == frozenset()
    positive, without = plain(noisy_latents, t, conditioning), plain(noisy_latents, t, null)
    weak = Network()
    weak._skipped_layers = frozenset({1})
    weakened = guided_denoise(weak, FLOW, "velocity", conditioning)(noisy_latents, t)
    expected = without + 4 * (positive - without) + 2.5 * (positive - weakened)
    torch.testing.assert_close(denoised, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_steps", [28, 40, 50])
def test_skip_layer_guidance_is_active_at_the_releases_steps(num_steps):
    noisy_latents, _, conditioning, _ = inputs()
    network = Network()
    denoise = guided_denoise(network, FLOW, "velocity", conditioning, skip_layer=SkipLayerGuidance())
    active = []
    for i, t in enumerate(GRIDS["release"](FLOW, num_steps)[:-1]):
        network.calls.clear()
        denoise(noisy_latents, t.repeat(2))
        active += [i] if len(network.calls) == 2 else []
    assert active == [i for i in range(num_steps) if 0.01 * num_steps < i < 0.20 * num_steps]


def test_a_half_precision_denoiser_gets_half_precision_and_is_combined_in_float32():
    noisy_latents, t, conditioning, null = inputs()
    network = Network()
    half = (conditioning.to(dtype=torch.bfloat16), null.to(dtype=torch.bfloat16))
    denoised = guided_denoise(network, FLOW, "velocity", *half, 4.0)(noisy_latents, t)
    assert network.calls[0][0].dtype == torch.bfloat16
    assert network.calls[0][1].dtype == torch.float32
    assert denoised.dtype == torch.float32


def test_the_callers_autocast_reaches_the_network_and_not_the_arithmetic():
    noisy_latents, _, conditioning, _ = inputs()
    weight = torch.randn(4, 4)
    seen = []

    def network(latents, timestep, conditioning):
        output = latents @ weight
        seen.append(output.dtype)
        return output

    denoise = guided_denoise(network, FLOW, "velocity", conditioning)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = SAMPLERS["euler"](denoise, noisy_latents, FLOW, GRIDS["linear"](FLOW, 2))
    assert seen == [torch.bfloat16] * 2
    assert latents.dtype == torch.float32


def test_epsilon_at_pure_noise_is_asked_just_below_it_and_stays_finite():
    noisy_latents, _, conditioning, _ = inputs()
    network = Network()
    flow = RectifiedFlow()
    denoise = guided_denoise(network, flow, "epsilon", conditioning)
    denoised = denoise(noisy_latents, torch.ones(2, dtype=torch.float64))
    assert network.calls[0][1].tolist() == pytest.approx([999.0, 999.0])
    assert torch.isfinite(denoised).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"guidance_scale": 4.0, "null_conditioning": None}, "needs a null_conditioning"),
        ({"guidance_scale": -1.0}, "must be at least 0"),
        ({"interval": (0.7, 0.3)}, "guidance interval"),
        ({"prediction": "velocitee"}, "did you mean 'velocity'"),
        ({"schedule": CHAIN}, "belongs to rectified_flow"),
        ({"null_conditioning": Conditioning(torch.zeros(3, 5, 4))}, "null_conditioning has 3 rows"),
    ],
)
def test_what_cannot_work_is_refused_before_sampling(change, words):
    _, _, conditioning, null = inputs()
    arguments = {"schedule": FLOW, "prediction": "velocity", "null_conditioning": null, "guidance_scale": 4.0, **change}
    with pytest.raises(ValueError, match=words):
        guided_denoise(Network(), conditioning=conditioning, **arguments)


def test_latents_that_do_not_fit_the_conditioning_are_refused():
    noisy_latents, t, conditioning, _ = inputs()
    with pytest.raises(ValueError, match="noisy_latents have 1 rows, the conditioning has 2"):
        guided_denoise(Network(), FLOW, "velocity", conditioning)(noisy_latents[:1], t[:1])
