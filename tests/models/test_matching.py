"""FLOP in closed form against torch's counter and published figures; widths solved for a budget."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mmdit.models.flops as flops
from mmdit.config import load_config, model_config, to_tree
from mmdit.denoiser import Conditioning
from mmdit.models import BACKBONES, build_denoiser
from mmdit.models.flops import FORMULAS, forward_flops
from mmdit.models.matching import NoMatchError, ff_ratio, measure, solve
from mmdit.presets import ENCODER_WIDTHS, PRESETS, VAE_WIDTHS

WIDTHS = {"in_channels": VAE_WIDTHS["tiny"]["channels"], "out_channels": VAE_WIDTHS["tiny"]["channels"]}
WIDTHS |= ENCODER_WIDTHS["tiny"]
OURS = ("tiny", "S", "B", "L")
QUICK = ("tiny", "S", "sd3_medium", "sd1.5")  # the others only take longer
EVERY = [
    pytest.param(name, preset, marks=[] if preset in QUICK else pytest.mark.slow)
    for name, presets in PRESETS.items()
    for preset in presets
]
STUDY = {"tokens": 24, "latent_size": 8}  # the quickstart's: 64 pixels, captions of one phrase
MICRO = {"depth": 3, "width": 32, "num_heads": 4, "pos_embed_max_size": 8, "pos_embed_base_size": 4}
MICRO_UNET = {
    "model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "transformer_depth": (1, 1), "head_dim": 8,
    "norm_groups": 4,
}  # fmt: skip
VARIANTS = [
    ("mmdit", {**MICRO, "qk_norm": "rms", "dual_attention_layers": (0, 2)}),
    ("mmdit", {**MICRO, "depth": 1, "mlp_ratio": 2.3, "patch_size": 1, "out_channels": 5, "pos_embed_max_size": 16}),
    ("crossdit", {**MICRO, "mlp_ratio": 2.3, "patch_size": 4}),
    ("unet", {**MICRO_UNET, "pooled_dim": None}),
    ("unet", {**MICRO_UNET, "transformer_depth": (0, 2), "middle_transformer_depth": 0, "linear_projection": True}),
    ("unet", {**MICRO_UNET, "channel_mult": (1, 1, 3), "transformer_depth": (1, 0, 2), "num_res_blocks": 2}),
]


STREAMS = {"text_streams": {"clip": 224, "t5": 256}}
SPLIT = (("clip", 0, 3, 224), ("t5", 3, 10, 256))  # of 10 tokens
WAYS = [
    ("mmdit", {"weight_sets": 1}),
    ("mmdit", {"weight_sets": 3, **STREAMS}),
    ("mmdit", {"weight_sets": 3, "text_projection": "per_encoder", **STREAMS}),
    ("mmdit", {"text_projection": "per_encoder", "dual_attention_layers": (0, 2), **STREAMS}),
    ("mmdit", {"injection": "pooled"}),
    ("mmdit", {"pooled_dim": None}),
    ("crossdit", {"injection": "decoupled", **STREAMS}),
    ("crossdit", {"injection": "decoupled", "text_projection": "per_encoder", **STREAMS}),
    ("crossdit", {"injection": "cross", "text_projection": "per_encoder", **STREAMS}),
    ("crossdit", {"injection": "pooled"}),
    ("crossdit", {"pooled_dim": None}),
    ("unet", {"injection": "decoupled", **STREAMS}),
    ("unet", {"injection": "decoupled", "text_in_query": True, **STREAMS}),
    ("unet", {"text_projection": "per_encoder", "text_in_query": True, **STREAMS}),
    ("unet", {"text_stages": (1,)}),
    ("unet", {"text_stages": ("middle",), "text_in_query": True}),
    ("unet", {"injection": "pooled"}),
    *(("unet", {"injection": "joint", "weight_sets": sets, **STREAMS}) for sets in (1, 2, 3)),
    ("unet", {"injection": "joint", "text_projection": "per_encoder", "text_in_query": True, **STREAMS}),
    ("unet", {"injection": "joint", "text_stages": (0,)}),
    ("unet", {"injection": "joint", "text_stages": (1, "middle"), "transformer_depth": (2, 2)}),
    ("unet", {"injection": "joint", "channel_mult": (1, 2, 2), "transformer_depth": (1, 0, 2), "num_res_blocks": 2}),
]


def build(name, preset):
    return model_config(name, preset, **(WIDTHS if preset in OURS else {}))


def counted(config, tokens, height, width, streams=None):
    """Torch's counter on a real forward without memory; a mask, which changes nothing, is given too."""
    with torch.device("meta"):
        denoiser = build_denoiser(config)
        pooled = None if config.pooled_dim is None else torch.empty(1, config.pooled_dim)
        mask = torch.ones(1, tokens, dtype=torch.bool)
        conditioning = Conditioning(torch.empty(1, tokens, config.context_dim), pooled, mask, streams)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            denoiser(torch.empty(1, config.in_channels, height, width), torch.empty(1), conditioning)
    return counter.get_total_flops()


def test_every_backbone_has_a_formula():
    assert FORMULAS.keys() == BACKBONES.keys()


@pytest.mark.parametrize(("name", "preset"), EVERY)
def test_the_formula_of_a_preset_is_what_torch_counts(name, preset):
    config = build(name, preset)
    assert forward_flops(config, tokens=91, latent_size=(16, 24)) == counted(config, 91, 16, 24)


@pytest.mark.parametrize(("name", "fields"), VARIANTS, ids=str)
def test_the_formula_of_a_variant_is_what_torch_counts(name, fields):
    config = model_config(name, **{**WIDTHS, **fields})
    assert forward_flops(config, tokens=5, latent_size=(8, 16)) == counted(config, 5, 8, 16)
    assert measure(config, tokens=5, latent_size=(8, 16)).flops == counted(config, 5, 8, 16)


@pytest.mark.parametrize(("name", "fields"), WAYS, ids=str)
def test_the_formula_knows_every_way_in_which_text_enters(name, fields):
    config = model_config(name, **{**WIDTHS, **(MICRO_UNET if name == "unet" else MICRO), **fields})
    assert forward_flops(config, tokens=SPLIT, latent_size=(8, 16)) == counted(config, 10, 8, 16, SPLIT)
    assert measure(config, tokens=SPLIT, latent_size=(8, 16)).flops == counted(config, 10, 8, 16, SPLIT)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mmdit", {"weight_sets": 1}),
        ("mmdit", {"weight_sets": 3, **STREAMS}),
        ("crossdit", {"injection": "decoupled", **STREAMS}),
        ("unet", {"injection": "joint"}),
    ],
    ids=str,
)
def test_rows_that_bring_text_in_otherwise_are_matched_too(name, fields):
    tokens = (("clip", 0, 10, 224), ("t5", 10, 24, 256))
    reference = model_config("unet", "tiny", **WIDTHS, injection="decoupled", **STREAMS)
    target = measure(reference, tokens=tokens, latent_size=8).parameters
    match = solve(model_config(name, "tiny", **WIDTHS, **fields), target, tokens=tokens, latent_size=8)
    assert match.parameters == pytest.approx(target, rel=0.01)
    assert match.flops == counted(match.config, 24, 8, 8, tokens)


def test_sd3_medium_at_1024_pixels_takes_nine_teraflop():
    """333 text tokens (77 and 256): 24 blocks of 1536, by hand from the released shapes 8.9 TFLOP."""
    assert forward_flops(build("mmdit", "sd3_medium"), tokens=333, latent_size=128) == pytest.approx(8.90e12, rel=1e-3)


def test_sd15_has_the_published_multiply_adds(monkeypatch):
    """338.7 G multiply-adds at 512 pixels, counted without the products of attention: arXiv:2305.15798."""
    config = build("unet", "sd1.5")
    everything = forward_flops(config, tokens=77, latent_size=64)
    monkeypatch.setattr(flops, "attention", lambda queries, keys, width: 0)
    assert forward_flops(config, tokens=77, latent_size=64) / 2 == pytest.approx(338.7e9, rel=1e-3)
    assert everything / 2 == pytest.approx(401.6e9, rel=1e-3)


# --- matching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reference", "row"), [(a, b) for a in BACKBONES for b in BACKBONES if a != b])
@pytest.mark.parametrize("preset", ["tiny", pytest.param("S", marks=pytest.mark.slow)])
def test_rows_of_one_preset_match_in_parameters_within_one_percent(preset, reference, row):
    target = sum(p.numel() for p in on_meta(build(reference, preset)))
    given = build(row, preset)
    match = solve(given, target, "parameters", **STUDY)
    assert sum(p.numel() for p in on_meta(match.config)) == match.parameters == pytest.approx(target, rel=0.01)
    assert match.flops == counted(match.config, 24, 8, 8)
    assert 2 <= ff_ratio(match.config) <= 6
    assert_only_widths_changed(given, match.config)


def on_meta(config):
    with torch.device("meta"):
        return list(build_denoiser(config).parameters())


def assert_only_widths_changed(before, after):
    free = {"width", "num_heads", "mlp_ratio", "model_channels", "ff_mult"}
    old, new = before.model_dump(exclude=free), after.model_dump(exclude=free)
    assert old == new
    if before.name == "unet":
        assert after.model_channels * after.ff_mult == pytest.approx(
            round(after.model_channels * after.ff_mult / 8) * 8
        )
    else:
        assert after.width // after.num_heads == before.width // before.num_heads
        assert int(after.width * after.mlp_ratio) % 8 == 0


@pytest.mark.parametrize(("row", "reference"), [("crossdit", "mmdit"), ("mmdit", "crossdit"), ("mmdit", "unet")])
@pytest.mark.parametrize("preset", ["S", pytest.param("L", marks=pytest.mark.slow)])
def test_transformers_match_in_flops_within_one_percent(preset, row, reference):
    target = forward_flops(build(reference, preset), **STUDY)
    given = build(row, preset)
    match = solve(given, target, "flops", **STUDY)
    assert counted(match.config, 24, 8, 8) == match.flops == pytest.approx(target, rel=0.01)
    assert match.parameters == sum(p.numel() for p in on_meta(match.config))
    assert_only_widths_changed(given, match.config)


def test_flops_are_matched_at_the_studys_own_resolution_and_text_length():
    reference, given = build("mmdit", "S"), build("crossdit", "S")
    widths = set()
    for tokens, latent_size in ((24, 8), (333, 8), (24, 64)):
        target = forward_flops(reference, tokens=tokens, latent_size=latent_size)
        match = solve(given, target, "flops", tokens=tokens, latent_size=latent_size)
        assert match.flops == pytest.approx(target, rel=0.01)
        widths.add((match.config.width, match.config.mlp_ratio))
    assert len(widths) == 3


@pytest.mark.slow
def test_a_released_size_can_be_the_reference():
    target = measure(build("mmdit", "sd3_medium"), tokens=154, latent_size=16).parameters
    match = solve(model_config("crossdit"), target, tokens=154, latent_size=16)
    assert match.parameters == pytest.approx(2_028_328_000, rel=0.01)
    assert match.config.width % 64 == 0
    assert match.config.width // match.config.num_heads == 64


def test_a_row_that_fits_already_stays_as_it_is():
    given = build("unet", "tiny")
    match = solve(given, 10_092_544, **STUDY)
    assert match.config is given
    assert match.note == "unchanged: 10,067,472 parameters, 0.25 % below the target"
    tighter = solve(given, 10_092_544, **STUDY, within=0.0025)
    assert tighter.config is given
    assert solve(given, 4 * 10_092_544, **STUDY).config.model_channels == 128


def test_the_note_says_what_was_changed():
    match = solve(build("crossdit", "tiny"), 10_092_544, **STUDY)
    assert match.note == "mlp_ratio 3.5 -> 3.6875: 10,103,392 parameters, 0.11 % above the target"


@pytest.mark.parametrize(("width", "hidden"), [(240, 952), (240, 928), (100, 115), (10, 23), (1536, 4360), (448, 1320)])
def test_a_solved_ratio_gives_exactly_its_feed_forward_width(width, hidden):
    from mmdit.models.matching import _ratio_of

    ratio = _ratio_of(hidden, width)
    assert int(width * ratio) == hidden  # as the transformers cut it
    assert round(width * ratio) == hidden  # as the U-Net rounds it
    assert ratio == float(f"{ratio:.6f}")  # as YAML writes it


def test_a_solved_config_survives_the_way_through_yaml():
    match = solve(build("crossdit", "tiny"), 12_000_000, **STUDY)
    run = load_config(None, {"model": to_tree(match.config)})
    assert run.model == match.config


def test_what_cannot_be_matched_is_refused_with_the_nearest():
    target = forward_flops(build("mmdit", "S"), **STUDY)
    with pytest.raises(NoMatchError, match=r"The nearest: ff_mult 2\.625 -> 4: .* 8\.79 % below") as caught:
        solve(build("unet", "S"), target, "flops", **STUDY)
    assert "ratio between 2 and 6" in str(caught.value)
    assert "A ratio of 8.81 would fit" in str(caught.value)
    with pytest.raises(NoMatchError, match=r"no mmdit .* heads of 48.* 1,000 parameters"):
        solve(build("mmdit", "tiny"), 1_000, **STUDY)
    with pytest.raises(NoMatchError, match="% below the target"):
        solve(build("mmdit", "tiny"), 1e13, **STUDY)


def test_wrong_questions_are_refused_in_words():
    with pytest.raises(ValueError, match="did you mean 'flops'"):
        solve(build("mmdit", "tiny"), 1e9, "flop", **STUDY)
    with pytest.raises(ValueError, match="must be positive"):
        solve(build("mmdit", "tiny"), 0, **STUDY)
