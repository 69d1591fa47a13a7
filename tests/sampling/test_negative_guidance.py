"""Guidance inside the attention: the rule against its definition, both texts through every backbone, what it costs."""

import pytest
import torch

from mmdit.config import ConfigError, SamplingConfig, load_config, merge, model_config
from mmdit.denoiser import AttentionGuidance, Conditioning, record_attention
from mmdit.diffusion import RectifiedFlow
from mmdit.models import build_denoiser
from mmdit.models.layers import Keys, attend, extrapolate
from mmdit.sampling import guidance_options, guided_denoise, needs_null
from mmdit.sampling.cost import SamplingMeter

FLOW = RectifiedFlow(3.0)
STREAMS = {"text_streams": {"clip": 20, "t5": 24}}
WIDTHS = {"in_channels": 4, "out_channels": 4, "context_dim": 24, "pooled_dim": 20}
TRANSFORMER = {
    **WIDTHS, "depth": 3, "width": 32, "num_heads": 4, "pos_embed_max_size": 8, "pos_embed_base_size": 4,
}  # fmt: skip
UNET = {
    **WIDTHS, "name": "unet", "model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1,
    "transformer_depth": (1, 1), "head_dim": 8, "linear_projection": True, "norm_groups": 4,
}  # fmt: skip
READERS = {
    "mmdit": {"name": "mmdit", **TRANSFORMER},
    "mmdit 1 set": {"name": "mmdit", **TRANSFORMER, "weight_sets": 1},
    "mmdit 3 sets": {"name": "mmdit", **TRANSFORMER, "weight_sets": 3, "qk_norm": "rms", **STREAMS},
    "crossdit": {"name": "crossdit", **TRANSFORMER},
    "crossdit decoupled": {"name": "crossdit", **TRANSFORMER, "injection": "decoupled", **STREAMS},
    "unet": UNET,
    "unet decoupled": {**UNET, "injection": "decoupled", **STREAMS},
    "unet joint": {**UNET, "injection": "joint"},
    "unet joint 3 sets": {**UNET, "injection": "joint", "weight_sets": 3, "text_stages": (1, "middle"), **STREAMS},
}
each_reader = pytest.mark.parametrize("reader", READERS)


def build(reader):
    fields = dict(READERS[reader])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = build_denoiser(model_config(fields.pop("name"), **fields)).eval()
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return denoiser


def text(seed, clip=3, t5=4, batch=2):
    """A text whose second row ends early."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(batch, clip + t5, 24, generator=generator)
    context[:, :clip, 20:] = 0
    mask = torch.ones(batch, clip + t5, dtype=torch.bool)
    mask[1, -1] = mask[1, clip - 1] = False
    streams = (("clip", 0, clip, 20), ("t5", clip, clip + t5, 24))
    return Conditioning(context, torch.randn(batch, 20, generator=generator), mask, streams)


def inputs():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9)), torch.tensor([7.5, 900.0])


def predict(denoiser, conditioning, rows=slice(None)):
    latents, timestep = inputs()
    with torch.no_grad():
        return denoiser(latents[rows], timestep[rows], conditioning)


# --- the rule -------------------------------------------------------------------------------------------------------


def keys(seed, shared=0):
    """Keys and values of 5 text tokens (the last two masked in row 1), and of `shared` image tokens behind them."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.Generator().manual_seed(99)
    k, v = (
        torch.cat([torch.randn(2, 3, 5, 8, generator=generator), torch.randn(2, 3, shared, 8, generator=image)], dim=2)
        for _ in range(2)
    )
    mask = torch.ones(2, 5 + shared, dtype=torch.bool)
    mask[1, 3 + seed : 5] = False
    return Keys(k, v, mask)


def softmax_read(q, k, v, mask):
    """Attention by its definition, float64."""
    scores = torch.einsum("banc,bamc->banm", q.double(), k.double()) / 8**0.5
    return scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1) @ v.double()


@pytest.mark.parametrize("shared", [0, 6])
def test_kv_subtract_is_the_attention_to_subtracted_keys_and_values(shared):
    q = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(3))
    positive, negative = keys(0, shared), keys(1, shared)
    k, v = positive.k.clone(), positive.v.clone()
    for row, token in ((row, token) for row in range(2) for token in range(5) if negative.mask[row, token]):
        k[row, :, token] -= 0.7 * negative.k[row, :, token]
        v[row, :, token] -= 0.7 * negative.v[row, :, token]
    got = attend(q, positive, 5, negative, AttentionGuidance("kv_subtract", 0.7))
    torch.testing.assert_close(got.double(), softmax_read(q, k, v, positive.mask), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tau", [1.2, 100.0])
def test_nag_extrapolates_outputs_holds_their_norm_and_blends(tau):
    q = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(3))
    positive, negative = keys(0, 6), keys(1, 6)
    got = attend(q, positive, 5, negative, AttentionGuidance("nag", 4.0, tau, 0.25))
    z, other = (softmax_read(q, *side).transpose(1, 2).flatten(2) for side in (positive, negative))  # tokens, all heads
    guided = 4 * z - 3 * other
    ratio = guided.abs().sum(-1, keepdim=True) / z.abs().sum(-1, keepdim=True)
    assert (ratio > 1.2).any()
    guided = guided * ratio.clamp(max=tau) / ratio
    expected = 0.25 * guided + 0.75 * z
    torch.testing.assert_close(got.double().transpose(1, 2).flatten(2), expected, rtol=0, atol=1e-5)


def test_nag_is_finite_where_nothing_is_read():
    zero = torch.zeros(1, 2, 3, 4)
    assert torch.equal(extrapolate(zero, zero, AttentionGuidance("nag", 5.0)), zero)


# --- both texts through every backbone ------------------------------------------------------------------------------


@each_reader
@pytest.mark.parametrize("mode", ["kv_subtract", "nag"])
def test_a_guidance_that_is_off_is_no_guidance(reader, mode):
    denoiser, positive = build(reader), text(0)
    plain = predict(denoiser, positive)
    off = [AttentionGuidance("kv_subtract", 0.0)] if mode == "kv_subtract" else [
        AttentionGuidance("nag", 1.0), AttentionGuidance("nag", 5.0, alpha=0.0),
    ]  # fmt: skip
    for guidance in off:  # so nothing of the negative text is written into the image
        guided = predict(denoiser, positive.with_negative(text(1), guidance))
        torch.testing.assert_close(guided, plain, rtol=0, atol=1e-6 * plain.abs().max().item())


@each_reader
def test_nag_against_the_prompt_itself_is_no_guidance(reader):
    denoiser, positive = build(reader), text(0)
    guided = predict(denoiser, positive.with_negative(positive, AttentionGuidance("nag", 5.0)))
    torch.testing.assert_close(guided, predict(denoiser, positive), rtol=0, atol=1e-6)


@each_reader
@pytest.mark.parametrize("guidance", [AttentionGuidance("kv_subtract", 0.5), AttentionGuidance("nag", 5.0)])
def test_the_negative_text_acts_row_by_row_and_only_where_it_is_attended(reader, guidance):
    denoiser, positive, negative = build(reader), text(0), text(1)
    plain, guided = predict(denoiser, positive), predict(denoiser, positive.with_negative(negative, guidance))
    assert all((guided[i] - plain[i]).abs().max() > 1e-4 for i in range(2))
    hidden = negative.context.masked_fill(~negative.context_mask[..., None], 50.0)
    again = predict(denoiser, positive.with_negative(negative._replace(context=hidden), guidance))
    torch.testing.assert_close(again, guided, rtol=0, atol=1e-5)
    for i in range(2):
        both = positive.index([i]).with_negative(negative.index([i]), guidance)
        torch.testing.assert_close(predict(denoiser, both, [i])[0], guided[i], rtol=0, atol=1e-5)


@each_reader
def test_a_longer_negative_text_pads_the_prompt_and_padding_changes_nothing(reader):
    denoiser, guidance = build(reader), AttentionGuidance("nag", 5.0)
    positive, negative = text(0), text(1, clip=5, t5=9)
    both = positive.with_negative(negative, guidance)
    assert both.context.shape == both.negative.shape == (2, 14, 24)
    assert [stop - start for _, start, stop, _ in both.streams] == [5, 9]
    off = both._replace(guidance=guidance._replace(alpha=0.0))
    torch.testing.assert_close(predict(denoiser, off), predict(denoiser, positive), rtol=0, atol=1e-5)
    wide = Conditioning.cat([positive.with_negative(text(1), guidance)] * 2).index([0, 3])
    torch.testing.assert_close(
        predict(denoiser, wide), predict(denoiser, positive.with_negative(text(1), guidance)), rtol=0, atol=1e-6
    )


@each_reader
def test_the_negative_stream_reads_the_image_in_joint_attention_and_never_in_cross_attention(reader):
    """With equal texts every token of both streams stays equal, block by block, whatever the image reads."""
    denoiser = build(reader)
    seen = []
    for module in denoiser.modules():
        if type(module).__name__ in ("JointBlock", "CrossBlock", "JointTransformerBlock", "TransformerBlock"):
            module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    predict(denoiser, text(0).with_negative(text(0), AttentionGuidance("kv_subtract", 0.5)))
    given = [t for t in seen if t is not None]
    assert len(given) >= 3
    for each in given:
        torch.testing.assert_close(each.negative, each.context, rtol=0, atol=1e-5)


@each_reader
def test_recorded_attention_is_that_to_the_prompt(reader):
    denoiser, positive = build(reader), text(0)
    guidance = AttentionGuidance("nag", 3.0)
    with record_attention(denoiser) as records:
        predict(denoiser, positive)
        predict(denoiser, positive.with_negative(text(1), guidance))
    first = next(iter(records.values()))
    torch.testing.assert_close(first[0], first[1], rtol=0, atol=1e-6)
    assert all(len(weights) == 2 and weights[0].shape == weights[1].shape for weights in records.values())


def test_texts_that_do_not_belong_together_are_refused():
    denoiser, positive = build("mmdit"), text(0)
    guided = positive.with_negative(text(1), AttentionGuidance("nag", 3.0))
    cases = {
        "shape of context": guided._replace(negative=guided.negative[:, :3]),
        "negative_mask must be": guided._replace(negative_mask=guided.negative_mask[:, :3]),
        "belong together": guided._replace(guidance=None),
    }
    for words, conditioning in cases.items():
        with pytest.raises(ValueError, match=words):
            predict(denoiser, conditioning)
    with pytest.raises(ValueError, match="3 rows"):
        positive.with_negative(text(1, batch=3), AttentionGuidance("nag", 3.0))
    with pytest.raises(ValueError, match="guided differently"):
        Conditioning.cat([guided, guided._replace(guidance=AttentionGuidance("nag", 2.0))])
    with pytest.raises(ValueError, match="'negative' is present in some"):
        Conditioning.cat([guided, positive])


# --- configs and the closure ----------------------------------------------------------------------------------------


def closure(denoiser, config, negative=None):
    options = guidance_options(config)
    null = (negative or text(1)) if needs_null(config) else None
    return guided_denoise(denoiser, FLOW, "velocity", text(0), null, **options)


def drawn(denoise, level=0.6):
    with torch.no_grad():
        return denoise(inputs()[0], torch.full((2,), level, dtype=torch.float64))


def config_of(kind, **fields):
    return SamplingConfig.model_validate({"negative_guidance": kind, **fields})


@pytest.mark.parametrize("reader", ["mmdit", "crossdit decoupled", "unet joint"])
def test_each_kind_of_guidance_is_what_its_name_says(reader):
    denoiser = build(reader)
    none = drawn(closure(denoiser, config_of("none", guidance_scale=7.0)))
    torch.testing.assert_close(none, drawn(guided_denoise(denoiser, FLOW, "velocity", text(0))), rtol=0, atol=0)
    cfg = drawn(closure(denoiser, config_of("cfg", guidance_scale=3.0)))
    null = drawn(guided_denoise(denoiser, FLOW, "velocity", text(1)))
    torch.testing.assert_close(cfg, null + 3 * (none - null), rtol=0, atol=1e-4)
    for kind, weight in (("kv_subtract", 0.5), ("nag", 5.0)):
        guidance = AttentionGuidance(kind, weight)
        attended = text(0).with_negative(text(1), guidance)
        expected = drawn(guided_denoise(denoiser, FLOW, "velocity", attended))
        torch.testing.assert_close(drawn(closure(denoiser, config_of(kind))), expected, rtol=0, atol=0)
        assert (expected - none).abs().max() > 1e-3
    layers = {"layers": [1], "scale": 2.0, "start": 0.3, "end": 0.5}
    skip = config_of("skip_layer", guidance_scale=1.0, skip_layer=layers)
    assert (drawn(closure(denoiser, skip)) - none).abs().max() > 1e-3
    early = drawn(guided_denoise(denoiser, FLOW, "velocity", text(0)), 0.8)
    torch.testing.assert_close(drawn(closure(denoiser, skip), 0.8), early, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["cfg", "kv_subtract", "nag"])
def test_outside_its_interval_no_guidance_acts(kind):
    denoiser = build("crossdit")
    denoise = closure(denoiser, config_of(kind, guidance_interval=[0.3, 0.7]))
    plain = guided_denoise(denoiser, FLOW, "velocity", text(0))
    for level, acts in ((0.9, False), (0.7, True), (0.5, True), (0.2, False)):
        assert ((drawn(denoise, level) - drawn(plain, level)).abs().max() > 1e-3) == acts


def test_attention_guidance_may_stand_beside_cfg():
    denoiser, guidance = build("mmdit"), AttentionGuidance("nag", 5.0)
    both = drawn(guided_denoise(denoiser, FLOW, "velocity", text(0), text(1), 3.0, attention=guidance))
    positive = drawn(guided_denoise(denoiser, FLOW, "velocity", text(0), text(1), attention=guidance))
    null = drawn(guided_denoise(denoiser, FLOW, "velocity", text(1)))
    torch.testing.assert_close(both, null + 3 * (positive - null), rtol=0, atol=1e-5)


def test_kv_subtract_refuses_texts_of_different_length_and_guidance_without_a_negative_text():
    with pytest.raises(ValueError, match="encode both with padding 'mask'"):
        closure(build("mmdit"), config_of("kv_subtract"), text(1, clip=2))
    with pytest.raises(ValueError, match=r"guidance in attention \(nag\) needs a null_conditioning"):
        guided_denoise(build("mmdit"), FLOW, "velocity", text(0), attention=AttentionGuidance("nag", 5.0))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"sampling": {"negative_guidance": "kv_subtract"}}, "set encoders.padding: mask"),
        ({"sampling": {"negative_guidance": "nag"}, "model": {"injection": "pooled"}}, "has none; use 'cfg'"),
        ({"sampling": {"negative_guidance": "skip_layer"}}, r"\[7, 8, 9\] do not exist; this mmdit has blocks 0 to 4"),
        ({"sampling": {"negative_guidance": "cgf"}}, "did you mean 'cfg'"),
        ({"sampling": {"guidance_interval": [0.7, 0.3]}}, "low first"),
        ({"sampling": {"skip_layer": {"start": 0.5, "end": 0.2}}}, "start < 1 - t < end"),
        ({"sampling": {"nag": {"scale": 0.5}}}, "greater than or equal to 1"),
    ],
)
def test_guidance_that_a_run_cannot_have_is_refused_at_start(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config(None, overrides)


def test_what_decides_a_picture_leaves_out_the_guidance_that_is_not_used():
    old = {"sampler", "grid", "num_steps", "guidance_scale", "eta", "variance"}
    assert SamplingConfig().in_effect().keys() == old  # results stored before there were other kinds stay comparable
    nag = config_of("nag", guidance_interval=[0.1, 1.0]).in_effect()
    assert nag.keys() == (old - {"guidance_scale"}) | {"negative_guidance", "guidance_interval", "nag"}
    assert config_of("none").in_effect().keys() == (old - {"guidance_scale"}) | {"negative_guidance"}


@pytest.mark.parametrize("kind", ["kv_subtract", "nag", "skip_layer", "none"])
def test_a_pipeline_draws_with_every_kind(kind, micro, vae, text):
    from mmdit.pipeline import TextToImage

    changes = {"encoders": {"padding": "mask"}, "sampling": {"negative_guidance": kind, "skip_layer": {"layers": [0]}}}
    config = load_config(None, merge(micro().model_dump(mode="json"), changes))
    torch.manual_seed(0)
    denoiser = build_denoiser(config.model)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    pipeline = TextToImage(denoiser, vae, text, FLOW, "velocity", config.sampling, config.encoders, precision="fp32")
    one, other = (pipeline(["a red circle"], negative, seed=1) for negative in ("a blue square", "a green ring"))
    assert one.shape == (1, 64, 64, 3)
    assert (one != other).any() == (kind != "none")


def test_a_pipeline_refuses_at_once_what_its_text_or_denoiser_cannot_have(micro, vae, text):
    from mmdit.pipeline import TextToImage

    for changes, kind, words in (
        ({}, "kv_subtract", "set encoders.padding: mask"),
        ({"model": {"injection": "pooled"}}, "nag", "has none"),
        ({}, "skip_layer", "do not exist"),
    ):
        config = micro(changes)
        denoiser = build_denoiser(config.model)
        pipeline = TextToImage(denoiser, vae, text, FLOW, "velocity", config.sampling, config.encoders)
        with pytest.raises(ValueError, match=words):
            pipeline.images(["a red circle"], negative_guidance=kind)


# --- what it costs --------------------------------------------------------------------------------------------------


def meter(reader="mmdit"):
    with torch.device("meta"):
        fields = dict(READERS[reader])
        denoiser = build_denoiser(model_config(fields.pop("name"), **fields)).eval()
    return SamplingMeter(denoiser, FLOW, "velocity", text(0, batch=2).index([0]), text(1).index([0]), (4, 8, 8))


def test_evaluations_are_counted_through_sampler_guidance_and_interval():
    count = lambda kind, **fields: meter().cost(config_of(kind, num_steps=10, **fields)).evaluations  # noqa: E731
    assert count("none") == 10
    assert count("cfg") == 20
    assert count("cfg", guidance_scale=1.0) == 10
    assert count("nag") == count("kv_subtract") == 10
    assert count("none", sampler="heun") == 19
    assert count("cfg", guidance_interval=[0.0, 0.45]) == 10 + 4  # t = 0.4, 0.3, 0.2, 0.1
    assert count("skip_layer", guidance_scale=1.0, skip_layer={"layers": [1], "start": 0.15, "end": 0.55}) == 10 + 4


@pytest.mark.parametrize("reader", ["mmdit", "crossdit", "unet", "unet joint"])
def test_flops_of_an_image_are_those_of_its_forwards(reader):
    with_one = meter(reader)
    plain = with_one.cost(config_of("none", num_steps=10)).flops
    assert plain == 10 * with_one.cost(config_of("none", num_steps=1)).flops > 0
    assert with_one.cost(config_of("cfg", num_steps=10)).flops == 2 * plain
    for kind in ("kv_subtract", "nag"):
        assert plain < with_one.cost(config_of(kind, num_steps=10)).flops < 2 * plain
    layers = {"layers": [1], "start": 0.0, "end": 1.0}
    skip = config_of("skip_layer", num_steps=10, guidance_scale=1.0, skip_layer=layers)
    assert plain < with_one.cost(skip).flops < 2 * plain


def test_steps_are_solved_for_a_budget():
    measured = meter()
    budget = measured.cost(config_of("cfg", num_steps=20)).flops
    for kind in ("none", "nag", "kv_subtract"):
        solved = measured.solve_steps(config_of(kind), budget)
        step = measured.cost(config_of(kind, num_steps=1)).flops
        assert abs(measured.cost(solved).flops - budget) <= step / 2
        assert 20 < solved.num_steps <= 40
    assert measured.solve_steps(config_of("cfg"), budget).num_steps == 20
    with pytest.raises(ValueError, match="no number of steps"):
        measured.solve_steps(config_of("cfg"), budget / 1000)
