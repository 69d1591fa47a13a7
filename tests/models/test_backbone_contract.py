"""What every backbone behind the door keeps to; a new one is tested by being registered and given a size here."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit.config import model_config
from mmdit.denoiser import Conditioning, Denoiser, record_attention, skip_layers
from mmdit.models import BACKBONES, build_denoiser

WIDTHS = {"in_channels": 4, "out_channels": 4, "context_dim": 24, "pooled_dim": 20}
TRANSFORMER = {"depth": 3, "width": 32, "num_heads": 4, "pos_embed_max_size": 8, "pos_embed_base_size": 4}
STREAMS = {"text_streams": {"clip": 20, "t5": 24}}
CONVOLUTIONAL = {
    "model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "transformer_depth": (1, 1), "head_dim": 8,
    "linear_projection": True, "norm_groups": 4,
}  # fmt: skip
JOINT = {**CONVOLUTIONAL, "injection": "joint"}
SIZES = {
    "mmdit": [
        TRANSFORMER,
        {**TRANSFORMER, "qk_norm": "rms", "dual_attention_layers": (0, 1)},
        {**TRANSFORMER, "depth": 2, "width": 48, "num_heads": 3, "mlp_ratio": 2.5},
        {**TRANSFORMER, "weight_sets": 1, "qk_norm": "rms"},
        {**TRANSFORMER, "weight_sets": 3, "qk_norm": "rms", "dual_attention_layers": (1,), **STREAMS},
        {**TRANSFORMER, "text_projection": "per_encoder", "pooled_dim": None, **STREAMS},
        {**TRANSFORMER, "injection": "pooled", "dual_attention_layers": (1,)},
    ],
    "crossdit": [
        TRANSFORMER,
        {**TRANSFORMER, "qk_norm": "rms"},
        {**TRANSFORMER, "injection": "decoupled", "qk_norm": "rms", **STREAMS},
        {**TRANSFORMER, "injection": "decoupled", "text_projection": "per_encoder", "pooled_dim": None, **STREAMS},
        {**TRANSFORMER, "text_projection": "per_encoder", **STREAMS},
        {**TRANSFORMER, "injection": "pooled"},
    ],
    "unet": [
        CONVOLUTIONAL,
        {**CONVOLUTIONAL, "linear_projection": False},
        {**CONVOLUTIONAL, "injection": "decoupled", "text_in_query": True, **STREAMS},
        {**CONVOLUTIONAL, "text_projection": "per_encoder", "pooled_dim": None, "text_stages": (1,), **STREAMS},
        {**CONVOLUTIONAL, "text_stages": (0, "middle"), "text_in_query": True},
        {**JOINT, "linear_projection": False, "pooled_dim": None},
        {**JOINT, "weight_sets": 1, "num_res_blocks": 2, "transformer_depth": (2, 1), "text_in_query": True},
        {**JOINT, "weight_sets": 3, "text_projection": "per_encoder", **STREAMS},
        {**JOINT, "text_stages": (0,)},
        {**JOINT, "text_stages": ("middle",), "middle_transformer_depth": 2},
        {**JOINT, "transformer_depth": (2, 0)},
        {**CONVOLUTIONAL, "injection": "pooled"},
    ],
}
CASES = [(name, i) for name in BACKBONES for i in range(len(SIZES.get(name, [{}])))]
READING = [(name, i) for name, i in CASES if SIZES[name][i].get("injection") != "pooled"]
each_backbone = pytest.mark.parametrize(("name", "size"), CASES)
each_reader = pytest.mark.parametrize(("name", "size"), READING)  # of text tokens


def build(name, size, fill=True, **fields):
    """A micro backbone; filled, every parameter and buffer is small and random, since zero gates hide everything."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = build_denoiser(model_config(name, **{**WIDTHS, **SIZES[name][size], **fields}))
        if fill:
            with torch.no_grad():
                for tensor in denoiser.state_dict().values():
                    tensor.add_(0.1 * torch.randn(tensor.shape))
    return denoiser.eval()


def draw(batch=3, height=8, width=8, length=6, seed=0):
    """Random inputs: latents, timestep, conditioning; a third of the text is the narrower stream, zero-padded."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    timestep = torch.tensor([7.5, 420.0, 999.0, 1.0])[:batch]
    latents, context, pooled = randn(batch, 4, height, width), randn(batch, length, 24), randn(batch, 20)
    clip = length // 3
    context[:, :clip, 20:] = 0
    streams = (("clip", 0, clip, 20), ("t5", clip, length, 24))
    return latents, timestep, Conditioning(context, pooled, streams=streams)


def cut(conditioning, length):
    """The first tokens of a text; its last stream ends earlier."""
    (name, start, _, width) = conditioning.streams[-1]
    streams = (*conditioning.streams[:-1], (name, start, length, width))
    return conditioning._replace(context=conditioning.context[:, :length], streams=streams)


def predict(denoiser, *inputs):
    with torch.no_grad():
        return denoiser(*inputs)


def test_every_registered_backbone_has_a_micro_size_here():
    assert SIZES.keys() == BACKBONES.keys()


def test_an_unknown_backbone_is_refused_with_the_nearest_name():
    from types import SimpleNamespace

    with pytest.raises(ValueError, match="did you mean 'mmdit'"):
        build_denoiser(SimpleNamespace(name="mmdti"))


@each_backbone
@pytest.mark.parametrize("shape", [(8, 8), (4, 12), (16, 6), (2, 2)])
def test_the_prediction_has_the_shape_of_the_latents(name, size, shape):
    denoiser = build(name, size)
    prediction = predict(denoiser, *draw(2, *shape))
    assert isinstance(denoiser, Denoiser)
    assert prediction.shape == (2, 4, *shape)
    assert prediction.isfinite().all()
    assert prediction.std() > 1e-3


@each_backbone
def test_output_channels_may_differ_from_input_channels(name, size):
    assert predict(build(name, size, out_channels=6), *draw()).shape == (3, 6, 8, 8)


@each_backbone
def test_a_fresh_backbone_predicts_exactly_zero(name, size):
    assert torch.count_nonzero(predict(build(name, size, fill=False), *draw())) == 0


@each_backbone
def test_building_twice_from_one_seed_gives_equal_weights(name, size):
    first, second = (build(name, size, fill=False).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@each_backbone
def test_a_sample_does_not_depend_on_the_others_in_its_batch(name, size):
    denoiser = build(name, size)
    latents, timestep, conditioning = draw()
    together = predict(denoiser, latents, timestep, conditioning)
    for i in range(3):
        alone = predict(denoiser, latents[i : i + 1], timestep[i : i + 1], conditioning.index(slice(i, i + 1)))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=2e-5)
    other_latents, other_timestep, other_conditioning = draw(seed=1)
    mixed = [torch.cat([a[:1], b[1:]]) for a, b in ((latents, other_latents), (timestep, other_timestep.flip(0)))]
    swapped = Conditioning.cat([conditioning.index(slice(0, 1)), other_conditioning.index(slice(1, 3))])
    torch.testing.assert_close(predict(denoiser, *mixed, swapped)[0], together[0], rtol=0, atol=2e-5)


@each_reader
@pytest.mark.parametrize("length", [6, 140])  # both kernels of `layers.attention`
def test_masked_text_tokens_have_no_influence(name, size, length):
    denoiser = build(name, size)
    latents, timestep, conditioning = draw(length=length)
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[0, 2:], mask[1, 0], mask[2, 1::2] = False, False, False
    masked = predict(denoiser, latents, timestep, conditioning._replace(context_mask=mask))
    noise = 100 * torch.randn(conditioning.context.shape, generator=torch.Generator().manual_seed(2))
    changed = torch.where(mask[..., None], conditioning.context, noise)
    again = predict(denoiser, latents, timestep, conditioning._replace(context=changed, context_mask=mask))
    torch.testing.assert_close(again, masked, rtol=0, atol=1e-6)
    seen = predict(denoiser, latents, timestep, conditioning)
    assert all((seen[i] - masked[i]).abs().max() > 1e-4 for i in range(3))


@each_backbone
def test_masking_text_tokens_is_the_same_as_leaving_them_out(name, size):
    denoiser = build(name, size)
    latents, timestep, conditioning = draw()
    mask = torch.tensor([[True, True, True, False, False, False]] * 3)
    masked = predict(denoiser, latents, timestep, conditioning._replace(context_mask=mask))
    trimmed = predict(denoiser, latents, timestep, cut(conditioning, 3))
    torch.testing.assert_close(masked, trimmed, rtol=0, atol=2e-5)


@each_backbone
def test_a_mask_that_hides_nothing_changes_nothing(name, size):
    denoiser = build(name, size)
    latents, timestep, conditioning = draw()
    everything = conditioning._replace(context_mask=torch.ones(3, 6, dtype=torch.bool))
    plain, masked = (predict(denoiser, latents, timestep, c) for c in (conditioning, everything))
    torch.testing.assert_close(masked, plain, rtol=0, atol=2e-5)


@each_backbone
def test_text_that_is_hidden_whole_gives_finite_predictions(name, size):
    latents, timestep, conditioning = draw()
    hidden = conditioning._replace(context_mask=torch.zeros(3, 6, dtype=torch.bool))
    assert predict(build(name, size), latents, timestep, hidden).isfinite().all()


@each_backbone
@pytest.mark.parametrize("changed", ["context", "pooled", "timestep", "latents"])
def test_each_input_has_influence(name, size, changed):
    denoiser = build(name, size)
    latents, timestep, conditioning = draw()
    before = predict(denoiser, latents, timestep, conditioning)
    other_latents, _, other = draw(seed=1)
    if changed == "latents":
        latents = other_latents
    elif changed == "timestep":
        timestep = timestep + 100
    else:
        conditioning = conditioning._replace(**{changed: getattr(other, changed)})
    after = predict(denoiser, latents, timestep, conditioning)
    without = {"pooled": SIZES[name][size].get("pooled_dim", 20) is None, "context": (name, size) not in READING}
    if without.get(changed):
        assert torch.equal(after, before)
    else:
        assert all((after[i] - before[i]).abs().max() > 1e-4 for i in range(3))


@each_backbone
def test_neighbouring_timesteps_are_told_apart_in_bfloat16(name, size):
    denoiser = build(name, size)
    latents, _, conditioning = draw()
    with torch.autocast("cpu", torch.bfloat16):
        a, b = (predict(denoiser, latents, torch.full((3,), t), conditioning) for t in (998.0, 999.0))
    assert (a - b).abs().max() > 0


@each_backbone
def test_every_parameter_gets_a_gradient_except_those_the_backbone_names(name, size):
    denoiser = build(name, size)
    latents, timestep, conditioning = draw()
    weight = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    (denoiser(latents, timestep, conditioning) * weight).sum().backward()
    unused = denoiser.unused_parameters()
    parameters = dict(denoiser.named_parameters())
    assert unused.keys() <= parameters.keys()
    assert all(len(reason) > 20 for reason in unused.values())
    without = {key for key, p in parameters.items() if p.grad is None or not p.grad.any()}
    assert without <= unused.keys()
    trained = [p for p in parameters.values() if p.requires_grad]
    assert all(p.grad is not None for p in trained), "DistributedDataParallel would stop on these"


@each_backbone
def test_saved_weights_give_the_same_prediction_when_loaded(name, size, tmp_path):
    denoiser, other = build(name, size), build(name, size, fill=False)
    save_file({k: v.contiguous() for k, v in denoiser.state_dict().items()}, tmp_path / "model.safetensors")
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(predict(other, *draw()), predict(denoiser, *draw()))


@each_backbone
def test_bfloat16_autocast_is_finite_near_float32_and_trains(name, size):
    denoiser = build(name, size)
    full = predict(denoiser, *draw())
    with torch.autocast("cpu", torch.bfloat16):
        half = denoiser(*draw())
    half.float().square().mean().backward()
    assert (half.float() - full).abs().max() < 0.1 * full.abs().max()
    assert all(p.grad.isfinite().all() for p in denoiser.parameters() if p.grad is not None)


@each_backbone
def test_bfloat16_weights_run(name, size):
    prediction = predict(build(name, size).to(torch.bfloat16), *draw())
    assert prediction.dtype == torch.bfloat16
    assert prediction.isfinite().all()


@each_backbone
def test_spatial_conditioning_is_concatenated_to_the_latents(name, size):
    denoiser = build(name, size, in_channels=7)
    latents, timestep, conditioning = draw()
    spatial = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    split = predict(denoiser, latents, timestep, conditioning._replace(spatial=spatial))
    joined = predict(denoiser, torch.cat([latents, spatial], dim=1), timestep, conditioning)
    assert torch.equal(split, joined)


@each_backbone
def test_inputs_that_do_not_fit_are_refused_in_words(name, size):
    denoiser = build(name, size)
    latents, timestep, conditioning = draw()
    wrong = {
        "channels": (latents[:, :3], timestep, conditioning),
        "multiple of 2": (latents[..., :7], timestep, conditioning),
        "timestep must be": (latents, timestep[:2], conditioning),
        "context must be": (latents, timestep, conditioning._replace(context=conditioning.context[..., :23])),
        "context_mask must be": (latents, timestep, conditioning._replace(context_mask=torch.ones(3, 6))),
        "belong together": (latents, timestep, conditioning._replace(negative=conditioning.context)),
    }
    if denoiser.config.pooled_dim is not None:
        wrong["pooled must be"] = (latents, timestep, conditioning._replace(pooled=None))
    if SIZES[name][size].get("text_streams"):
        streams = {
            "does not say where they lie": None,
            "has weights for": (("clip", 0, 2, 20), ("byt5", 2, 6, 24)),
            "24 wide, this .* reads 20": (("clip", 0, 2, 24), ("t5", 2, 6, 24)),
            "do not cover the 6 text tokens": (("clip", 0, 2, 20), ("t5", 2, 5, 24)),
        }
        for message, layout in streams.items():
            wrong[message] = (latents, timestep, conditioning._replace(streams=layout))
    for message, inputs in wrong.items():
        with pytest.raises(ValueError, match=message):
            denoiser(*inputs)


@each_backbone
def test_skipping_a_layer_changes_the_prediction_only_inside_the_context(name, size):
    denoiser = build(name, size)
    before = predict(denoiser, *draw())
    with skip_layers(denoiser, [1]):
        skipped = predict(denoiser, *draw())
    assert (skipped - before).abs().max() > 1e-4
    assert torch.equal(predict(denoiser, *draw()), before)


@each_reader
def test_recorded_attention_is_what_image_tokens_read_from_the_text(name, size):
    denoiser = build(name, size)
    latents, timestep, conditioning = draw()
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[:, 4:] = False
    conditioning = conditioning._replace(context_mask=mask)
    plain = predict(denoiser, latents, timestep, conditioning)
    with record_attention(denoiser) as records:
        recorded = predict(denoiser, latents, timestep, conditioning)
        predict(denoiser, latents, timestep, conditioning)
    torch.testing.assert_close(recorded, plain, rtol=0, atol=1e-6)
    assert records
    for weights in records.values():
        assert len(weights) == 2
        batch, _, num_image_tokens, length = weights[0].shape
        assert (batch, length) == (3, 6)
        assert num_image_tokens in (64, 16)
        readings = 2 if SIZES[name][size].get("injection") == "decoupled" else 1
        assert weights[0].sum(-1).max() <= readings + 1e-5
        assert weights[0].sum(-1).min() > 0
        assert weights[0][..., 4:].abs().max() == 0


@each_backbone
def test_running_the_blocks_without_residuals_is_the_forward(name, size):
    denoiser = build(name, size)
    with torch.no_grad():
        assert torch.equal(denoiser.run_blocks(*draw()), denoiser(*draw()))
