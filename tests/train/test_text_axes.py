"""Every value of a text axis, from the config to trained steps and drawn pictures; trimmed text is masked text."""

from itertools import combinations

import numpy as np
import pytest
import torch
from mmdit_eval.cost import cost_of

from mmdit.config import ConfigError, load_config
from mmdit.data import make_dataset
from mmdit.data.cache import precompute
from mmdit.diffusion import build_schedule, training_loss
from mmdit.encoders.axes import apply_padding
from mmdit.encoders.text import load_run_text
from mmdit.models import BACKBONES, build_denoiser
from mmdit.models.flops import forward_flops
from mmdit.pipeline import TextToImage
from mmdit.train.run import count_parameters
from mmdit.train.step import BatchDrawer
from mmdit.train.trainer import build_seeded, train

ENCODERS = ("clip_l", "clip_g", "t5")
TRANSFORMER = {
    "depth": 2, "width": 32, "num_heads": 2, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8,
    "pos_embed_base_size": 4,
}  # fmt: skip
PROMPTS = ["a red circle", "a small blue square left of a large green star"]
LONG = {"data": {"captions": "long", "max_objects": 6}}
DROPOUT = {"caption": 0.1, "clip_l": 0.464, "clip_g": 0.464, "t5": 0.464}


def dropout_of(use):
    """The dropout of a run with some encoders."""
    return {name: chance for name, chance in DROPOUT.items() if name in ("caption", *use)}


@pytest.fixture
def backbone(micro_unet):
    """The model tree of a micro backbone by name."""

    def tree(name):
        return (
            dict(micro_unet) if name == "unet" else {"name": name, "in_channels": 4, "out_channels": 4, **TRANSFORMER}
        )

    return tree


def run_through(config, vae, tiny=None):
    """Encode, train two steps and draw two pictures as a run does, without its folder; return the batch and text."""
    encoders = config.encoders
    text = load_run_text(encoders) if tiny is None else tiny.under(encoders.use, encoders.pooled, encoders.pooled_at)
    dataset = make_dataset(config.data, "train")
    source = precompute(
        dataset, vae, text, config.encoders, cache_dir=config.train.cache_dir, precision="fp32", progress=False
    )
    schedule = build_schedule(config.diffusion.schedule)
    denoiser = build_seeded(config)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3)
    for positions in np.arange(16).reshape(2, 8):
        batch = BatchDrawer(source, text, schedule, config).draw(positions)
        losses = training_loss(
            denoiser, batch.latents, batch.conditioning, batch.noise, batch.t, schedule, config.diffusion.prediction
        )
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert losses.isfinite().all()
    pipeline = TextToImage(
        denoiser, vae, text, schedule, "velocity", config.sampling, config.encoders, precision="fp32"
    )
    decoded, decode = [], pipeline.decode
    pipeline.decode = lambda latents: decoded.append(latents) or decode(latents)
    assert pipeline(PROMPTS, [None, "a star"]).shape == (2, 64, 64, 3)
    assert decoded[-1].isfinite().all()
    return batch, text, pipeline


@pytest.mark.parametrize("use", [subset for n in range(4) for subset in combinations(ENCODERS, n)], ids=str)
def test_every_subset_of_encoders_trains_and_samples(micro, backbone, vae, text, use):
    name = list(BACKBONES)[len(use) % 3]  # each backbone meets some; what it reads is the same
    encoders = {"use": list(use), "dropout": dropout_of(use)}
    config = micro({"model": backbone(name), "encoders": encoders})
    batch, text, pipeline = run_through(config, vae, text)
    assert list(text.towers) == list(use)
    assert batch.conditioning.context.shape[2] == 256
    assert batch.conditioning.pooled.shape == (8, 224)
    assert batch.conditioning.context_mask.any(dim=1).all()
    null = pipeline.encode_null([None])
    assert torch.equal(null.context, text.null(1, padding="trim").context)  # training's and guidance's are one


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(
    ("pooled", "pooled_at", "width"),
    [("clip", "end", 224), ("clip", "mean", 224), ("clip+t5", "end", 480), ("clip+t5", "mean", 480),
     ("none", "end", None)],
)  # fmt: skip
def test_every_pooled_vector_trains_and_samples_on_every_backbone(
    micro, backbone, vae, text, name, pooled, pooled_at, width
):
    encoders = {"pooled": pooled, "pooled_at": pooled_at, "dropout": DROPOUT}
    config = micro({"model": backbone(name), "encoders": encoders})
    assert config.model.pooled_dim == width
    batch, text, _ = run_through(config, vae, text)
    if width is None:
        assert batch.conditioning.pooled is None
    else:
        assert batch.conditioning.pooled.shape == (8, width) == (8, text.pooled_dim)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("padding", ["attend", "mask", "trim"])
def test_every_padding_trains_and_samples_on_every_backbone(micro, backbone, vae, text, name, padding):
    config = micro({"model": backbone(name), "encoders": {"padding": padding, "dropout": DROPOUT}})
    batch, _, _ = run_through(config, vae, text)
    length = batch.conditioning.context.shape[1]
    assert (length < 77) if padding == "trim" else (length == 77 + 32)
    assert (batch.conditioning.context_mask is None) == (padding == "attend")


@pytest.mark.parametrize("t5_length", [77, 154, 256, 512])
def test_every_t5_length_trains_and_samples_on_long_captions(micro, backbone, vae, t5_length):
    name = list(BACKBONES)[t5_length % 3]
    config = micro({"model": backbone(name), "encoders": {"t5_length": t5_length, "padding": "mask"}, **LONG})
    batch, text, _ = run_through(config, vae)
    real = batch.conditioning.context_mask[:, 77:].sum(dim=1)
    assert batch.conditioning.context.shape[1] == 77 + t5_length
    assert real.max() == 77 if t5_length == 77 else real.max() > 77
    assert real.max() <= t5_length == text.t5_length


def filled(config, source=None, rename=None):
    """The denoiser of a run with random weights in every place, or with those of another under other names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = build_denoiser(config.model).eval()
        with torch.no_grad():  # zero gates would hide everything
            for parameter in denoiser.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    if source is not None:
        state = {rename(key): value for key, value in source.state_dict().items()}
        wanted = denoiser.state_dict()
        # a U-Net reads a stream at its real width: of `cross` the columns that meet zero-padding are not needed
        denoiser.load_state_dict({key: value[tuple(map(slice, wanted[key].shape))] for key, value in state.items()})
    return denoiser


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mmdit", {}),
        ("mmdit", {"weight_sets": 1}),
        ("mmdit", {"weight_sets": 3}),
        ("crossdit", {}),
        ("crossdit", {"injection": "decoupled", "text_projection": "per_encoder"}),
        ("unet", {}),
        ("unet", {"injection": "decoupled"}),
        ("unet", {"injection": "joint"}),
    ],
    ids=str,
)
def test_trimmed_text_gives_the_masked_result_for_less(micro, backbone, text, name, fields):
    config = micro({"model": {**backbone(name), **fields}})
    denoiser = filled(config)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    masked = text.encode(PROMPTS, "mask")
    trimmed = apply_padding(masked, "trim")
    timestep = torch.tensor([300.0, 900.0])
    with torch.no_grad():
        whole, short = denoiser(latents, timestep, masked), denoiser(latents, timestep, trimmed)
        attended = denoiser(latents, timestep, masked._replace(context_mask=None))
    torch.testing.assert_close(short, whole, atol=1e-5, rtol=0)
    assert (attended - whole).abs().max() > 1e-3  # the mask matters
    costs = [forward_flops(config.model, tokens=c.streams, latent_size=8) for c in (masked, trimmed)]
    assert trimmed.context.shape[1] < 0.5 * masked.context.shape[1]
    assert costs[1] < costs[0]


@pytest.mark.parametrize("padding", ["trim", "mask", "attend"])
@pytest.mark.parametrize("name", ["crossdit", "unet"])
@pytest.mark.parametrize(("use", "stream"), [(["t5"], "t5"), (["clip_l", "clip_g"], "clip")])
def test_a_decoupled_run_with_one_encoder_absent_is_the_cross_run_with_the_other(
    micro, backbone, name, use, stream, padding
):
    encoders = {"use": use, "absent": "nothing", "padding": padding}
    cross, decoupled = (
        micro({"model": {**backbone(name), "injection": injection}, "encoders": encoders})
        for injection in ("cross", "decoupled")
    )
    assert dict(decoupled.model.text_streams) == {stream: {"clip": 224, "t5": 256}[stream]}
    text = load_run_text(decoupled.encoders)
    inner = "cross_attn." if name == "crossdit" else "attn2."
    first = filled(cross)
    second = filled(decoupled, first, lambda key: key.replace(inner, f"{inner}{stream}."))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([300.0, 900.0])
    prompts = text.encode(PROMPTS, padding)
    null = text.null(2, padding=padding)
    with torch.no_grad():
        for conditioning in (prompts, null):
            expected = first(latents, timestep, conditioning)
            torch.testing.assert_close(second(latents, timestep, conditioning), expected, atol=1e-6, rtol=0)
        assert (first(latents, timestep, prompts) - first(latents, timestep, null)).abs().max() > 1e-2
    costs = [cost_of(config) for config in (cross, decoupled)]
    if stream == "t5" or name == "crossdit":  # a U-Net's `cross` reads CLIP zero-padded to T5's width
        assert costs[0] == costs[1]
    assert costs[1].parameters == count_parameters(second)
    assert costs[1].tokens < cost_of(micro({"model": {**backbone(name)}, "encoders": {"padding": padding}})).tokens


@pytest.mark.parametrize(
    ("name", "fields", "fewer"),
    [
        ("mmdit", {"text_projection": "per_encoder"}, True),
        ("mmdit", {"weight_sets": 1}, False),
        ("crossdit", {"injection": "decoupled"}, True),
        ("unet", {"injection": "decoupled"}, True),
        ("unet", {"injection": "joint"}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("use", [["t5"], ["clip_g"]], ids=str)
def test_a_run_without_a_stream_trains_and_samples_without_weights_for_it(
    micro, backbone, vae, name, fields, fewer, use
):
    model = {**backbone(name), **fields}
    config = micro({"model": model, "encoders": {"use": use, "absent": "nothing", "dropout": dropout_of(use)}})
    batch, text, pipeline = run_through(config, vae)
    left = ["t5" if use == ["t5"] else "clip"]
    assert [stream[0] for stream in text.streams] == [stream[0] for stream in batch.conditioning.streams] == left
    both = build_denoiser(micro({"model": model}).model)
    assert (count_parameters(pipeline.denoiser) < count_parameters(both)) == fewer


def test_a_run_without_a_stream_is_saved_and_loaded_again(micro, backbone, tmp_path):
    model = {**backbone("crossdit"), "injection": "decoupled"}
    config = micro({"model": model, "encoders": {"use": ["t5"], "absent": "nothing"}, "train": {"images": 16}})
    train(config, tmp_path, progress=False)
    again = TextToImage.load(tmp_path)
    assert [stream[0] for stream in again.text.streams] == ["t5"]
    assert again(PROMPTS, negative_guidance="nag").shape == (2, 64, 64, 3)


def test_three_sets_of_weights_need_both_streams(micro, backbone):
    encoders = {"use": ["t5"], "absent": "nothing"}
    with pytest.raises(ConfigError, match="weight_sets 3 needs two text streams beside the image, text_streams has 1"):
        micro({"model": {**backbone("mmdit"), "weight_sets": 3}, "encoders": encoders})


def test_a_whole_run_keeps_its_axes_when_it_is_loaded_again(micro, backbone, tmp_path):
    use = ["clip_g", "t5"]
    encoders = {"use": use, "pooled": "clip+t5", "pooled_at": "mean", "dropout": dropout_of(use)}
    config = micro({"model": backbone("unet"), "encoders": encoders,
                    "train": {"images": 16, "validate_every": 16, "sample_every": 16}})  # fmt: skip
    train(config, tmp_path, progress=False)
    again = TextToImage.load(tmp_path)
    assert list(again.text.towers) == ["clip_g", "t5"]
    assert (again.text.pooled, again.text.pooled_at, again.text.pooled_dim) == ("clip+t5", "mean", 480)
    assert again(PROMPTS).shape == (2, 64, 64, 3)
    assert (tmp_path / "samples" / "000000000016.png").is_file()


def test_the_estimate_follows_the_axes(micro, backbone):
    from mmdit.train.estimate import estimate

    plain = estimate(micro())
    long = estimate(micro({"encoders": {"t5_length": 154, "pooled": "clip+t5"}, **LONG}))
    silent = estimate(micro({"encoders": {"use": [], "pooled": "none"}}))
    assert silent.text_tokens == 2 < plain.text_tokens < 77 + 77 < long.text_tokens
    assert silent.forward_flop < plain.forward_flop < long.forward_flop
    assert silent.parameters < plain.parameters < long.parameters  # the pooled vector's embedding


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--encoders.use", "[clip_l, clip_l]"], "names an encoder twice"),
        (["--encoders.use", "[clip_h]"], "encoders.use.0: unknown value 'clip_h'; did you mean 'clip_[lg]'"),
        (["--encoders.pooled", "t5"], "encoders.pooled: unknown value 't5'"),
        (["--encoders.pooled_at", "start"], "encoders.pooled_at: unknown value 'start'"),
        (["--encoders.pooled", "none", "--encoders.pooled_at", "mean"], "pooled is 'none'; leave it out"),
        (["--encoders.pooled", "none", "--model.pooled_dim", "224"], "gives the denoiser no pooled vector"),
        (["--encoders.pooled", "clip+t5", "--model.pooled_dim", "224"], r"give 480 with encoders\.pooled 'clip\+t5'"),
        (["--encoders.t5_length", "0"], "greater than 0"),
        (["--encoders.padding", "pad"], "encoders.padding: unknown value 'pad'"),
        (["--encoders.pooled", "none", "--model.injection", "pooled"], "nothing to read"),
        (["--encoders.use", "[t5]", "--encoders.dropout", "{clip_l: 0.1, clip_g: 0.2, t5: 0.3}"],
         r"encoders: dropout\.clip_l, dropout\.clip_g would drop what is not there: use is \['t5'\];"),
        (["--encoders.use", "[]", "--encoders.absent", "nothing"], "absent 'nothing' leaves no token at all"),
        (["--encoders.use", "[t5]", "--encoders.absent", "nothing", "--model.name", "unet", "--model.injection",
          "decoupled", "--model.text_streams", "{clip: 224, t5: 256}"], r"text encoders 'tiny' give \{'t5': 256\}"),
        (["--encoders.use", "[]", "--sampling.negative_guidance", "nag"], r"of which encoders\.use \[\] leaves none"),
        (["--encoders.use", "[]", "--sampling.negative_guidance", "kv_subtract"], r"encoders\.use \[\] leaves none"),
    ],
)  # fmt: skip
def test_axes_that_make_no_sense_are_refused_at_the_start(overrides, words):
    with pytest.raises(ConfigError, match=words):
        load_config(None, overrides)


@pytest.mark.parametrize("kind", ["cfg", "none", "skip_layer"])
def test_guidance_that_needs_no_text_tokens_stays_open_to_an_unconditional_run(kind):
    words = ["--encoders.use", "[]", "--sampling.negative_guidance", kind, "--sampling.skip_layer.layers", "[1]"]
    assert load_config(None, words).sampling.negative_guidance == kind


def test_the_pooled_width_is_filled_in_from_the_axis():
    widths = {value: load_config(None, ["--encoders.pooled", value]).model.pooled_dim
              for value in ("clip", "clip+t5", "none")}  # fmt: skip
    assert widths == {"clip": 224, "clip+t5": 480, "none": None}
    assert load_config(None, ["--model.name", "unet", "--encoders.pooled", "clip+t5"]).model.pooled_dim == 480
