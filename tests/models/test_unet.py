"""The U-Net against diffusers' UNet2DConditionModel, and what is its own: skips, layout, residuals, presets."""

import diffusers
import pytest
import torch
from torch.nn import functional as F

from mmdit.config import model_config
from mmdit.denoiser import Conditioning, record_attention, skip_layers
from mmdit.models import build_denoiser
from mmdit.models.layers import timestep_embedding
from mmdit.models.unet import ResBlock, UNet
from mmdit.weights import sd1, sdxl

TINY_WIDTHS = {"in_channels": 16, "out_channels": 16, "context_dim": 256, "pooled_dim": 224}
SMALL = {
    "model_channels": 16,
    "channel_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "transformer_depth": (1, 1, 0),
    "num_heads": 4,
    "context_dim": 12,
    "norm_groups": 8,
}
SMALL_XL = {
    **SMALL,
    "transformer_depth": (0, 1, 2),
    "middle_transformer_depth": 2,
    "num_heads": None,
    "head_dim": 8,
    "linear_projection": True,
    "pooled_dim": 10 + 6 * 8,
}


def fill(module, seed=0):
    """Random numbers in every parameter: zero-initialised branches would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval()


def small(seed=0, **fields):
    return fill(build_denoiser(model_config("unet", **{**SMALL, **fields})), seed)


def inputs(config, batch=2, height=8, width=12, length=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, config.in_channels, height, width, generator=generator)
    timestep = torch.rand(batch, generator=generator) * 999
    context = torch.randn(batch, length, config.context_dim, generator=generator)
    pooled = None if config.pooled_dim is None else torch.randn(batch, config.pooled_dim, generator=generator)
    return latents, timestep, Conditioning(context, pooled)


def diffusers_unet(config, **fields):
    """UNet2DConditionModel of the same shape; its `attention_head_dim` is the number of heads, by an old mistake."""
    widths = [config.model_channels * mult for mult in config.channel_mult]
    depths = config.transformer_depth
    return diffusers.UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=widths,
        layers_per_block=config.num_res_blocks,
        down_block_types=["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths],
        up_block_types=["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depths)],
        transformer_layers_per_block=[max(d, 1) for d in depths[:-1]] + [config.middle_transformer_depth],
        attention_head_dim=config.num_heads or [width // config.head_dim for width in widths],
        cross_attention_dim=config.context_dim,
        use_linear_projection=config.linear_projection,
        norm_num_groups=config.norm_groups,
        **fields,
    ).eval()


def test_an_sd15_like_unet_equals_diffusers():
    ours = small()
    theirs = diffusers_unet(ours.config)
    theirs.load_state_dict(sd1.to_diffusers(ours.state_dict(), ours.config), strict=True)
    latents, timestep, conditioning = inputs(ours.config)
    with torch.no_grad():
        expected = theirs(latents, timestep, encoder_hidden_states=conditioning.context).sample
        got = ours(latents, timestep, conditioning)
    assert expected.std() > 0.1
    assert (got - expected).abs().max() <= 2e-5


def test_an_sdxl_like_unet_equals_diffusers():
    ours = small(**SMALL_XL)
    theirs = diffusers_unet(
        ours.config,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=ours.config.pooled_dim,
    )
    theirs.load_state_dict(sdxl.to_diffusers(ours.state_dict(), ours.config), strict=True)
    latents, timestep, conditioning = inputs(ours.config, height=12, width=8)
    sizes = torch.tensor([[64.0, 96.0, 0.0, 8.0, 64.0, 96.0], [32.0, 64.0, 4.0, 0.0, 96.0, 64.0]])
    text = conditioning.pooled[:, :10]
    pooled = torch.cat([text, timestep_embedding(sizes.flatten(), 8).reshape(2, 48)], dim=1)
    with torch.no_grad():
        expected = theirs(
            latents,
            timestep,
            encoder_hidden_states=conditioning.context,
            added_cond_kwargs={"text_embeds": text, "time_ids": sizes},
        ).sample
        got = ours(latents, timestep, conditioning._replace(pooled=pooled))
    assert expected.std() > 0.1
    assert (got - expected).abs().max() <= 2e-5


def test_residuals_of_a_controlnet_act_as_in_diffusers():
    ours = small()
    theirs = diffusers_unet(ours.config)
    theirs.load_state_dict(sd1.to_diffusers(ours.state_dict(), ours.config), strict=True)
    latents, timestep, conditioning = inputs(ours.config)
    shapes = [(16, 1), (16, 1), (16, 2), (32, 2), (32, 4), (32, 4), (32, 4)]
    generator = torch.Generator().manual_seed(5)
    residuals = [torch.randn(2, c, 8 // f, 12 // f, generator=generator) for c, f in shapes]
    with torch.no_grad():
        expected = theirs(
            latents,
            timestep,
            encoder_hidden_states=conditioning.context,
            down_block_additional_residuals=tuple(residuals[:-1]),
            mid_block_additional_residual=residuals[-1],
        ).sample
        got = ours.run_blocks(latents, timestep, conditioning, residuals)
        without = ours(latents, timestep, conditioning)
    assert (got - expected).abs().max() <= 2e-5
    assert (got - without).abs().max() > 1e-2
    with pytest.raises(ValueError, match="residuals must be 7 tensors"):
        ours.run_blocks(latents, timestep, conditioning, residuals[:-1])


@pytest.mark.parametrize("fields", [{}, SMALL_XL])
def test_masked_text_is_the_same_as_text_cut_off(fields):
    ours = small(**fields)
    latents, timestep, conditioning = inputs(ours.config, length=7)
    mask = torch.tensor([[True] * 4 + [False] * 3] * 2)
    with torch.no_grad():
        masked = ours(latents, timestep, conditioning._replace(context_mask=mask))
        trimmed = ours(latents, timestep, conditioning._replace(context=conditioning.context[:, :4]))
        attended = ours(latents, timestep, conditioning)
    assert (masked - trimmed).abs().max() <= 2e-6
    assert (attended - trimmed).abs().max() > 1e-3


def test_each_sample_keeps_its_own_mask():
    ours = small()
    latents, timestep, conditioning = inputs(ours.config, length=6)
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    with torch.no_grad():
        both = ours(latents, timestep, conditioning._replace(context_mask=mask))
        alone = ours(latents[1:], timestep[1:], Conditioning(conditioning.context[1:, :2]))
    assert (both[1:] - alone).abs().max() <= 2e-6


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_every_feature_map_is_channels_last_whatever_comes_in(format):
    ours = small(**SMALL_XL)
    latents, timestep, conditioning = inputs(ours.config)
    wrong, seen = [], 0

    def watch(module, args, output):
        nonlocal seen
        seen += 1
        if not output.is_contiguous(memory_format=torch.channels_last):
            wrong.append(type(module).__name__)

    for module in ours.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm | ResBlock):
            module.register_forward_hook(watch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours(latents.contiguous(memory_format=format), timestep, conditioning)
    assert seen > 40
    assert wrong == []


def test_group_norm_on_bf16_features_has_float32_statistics():
    torch.manual_seed(0)
    features = (torch.randn(2, 16, 8, 8) * 3 + 100).bfloat16().contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(16), torch.randn(16)
    got = F.group_norm(features, 8, weight.bfloat16(), bias.bfloat16())
    expected = F.group_norm(features.double(), 8, weight.bfloat16().double(), bias.bfloat16().double())
    assert (got.double() - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_bf16_autocast_trains_and_stays_near_float32():
    ours = small()
    latents, timestep, conditioning = inputs(ours.config)
    exact = ours(latents, timestep, conditioning)
    with torch.autocast("cpu", torch.bfloat16):
        rough = ours(latents, timestep, conditioning)
    rough.float().square().mean().backward()
    assert (rough.float() - exact).abs().max() <= 0.05 * exact.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


def test_a_fresh_unet_predicts_exactly_zero_and_its_branches_are_closed():
    torch.manual_seed(0)
    ours = UNet(model_config("unet", **SMALL))
    latents, timestep, conditioning = inputs(ours.config)
    assert torch.equal(ours(latents, timestep, conditioning), torch.zeros_like(latents))
    block = ours.input_blocks[1][0]
    features = torch.randn(2, 16, 8, 8)
    assert torch.equal(block(features, torch.randn(2, 64)), features)


def test_skipping_a_transformer_block_leaves_out_that_one_alone():
    ours = small(**SMALL_XL)
    assert ours.num_blocks == 1 + 2 + 2 + 4 + 2
    latents, timestep, conditioning = inputs(ours.config)
    with torch.no_grad():
        full = ours(latents, timestep, conditioning)
        with skip_layers(ours, [3]):
            skipped = ours(latents, timestep, conditioning)
        block = ours.middle_block[1].transformer_blocks[0]  # the fourth to run
        for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
            layer.weight.zero_()
            layer.bias.zero_()
        closed = ours(latents, timestep, conditioning)
    assert (skipped - full).abs().max() > 1e-3
    assert (skipped - closed).abs().max() <= 1e-6


def test_recorded_attention_names_each_block_and_sums_to_one_over_attended_tokens():
    ours = small()
    latents, timestep, conditioning = inputs(ours.config)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    with torch.no_grad(), record_attention(ours) as records:
        recorded = ours(latents, timestep, conditioning._replace(context_mask=mask))
    with torch.no_grad():
        plain = ours(latents, timestep, conditioning._replace(context_mask=mask))
    assert torch.equal(recorded, plain)
    assert len(records) == ours.num_blocks == 7
    modules = dict(ours.named_modules())
    for name, (weights,) in records.items():
        assert name in modules
        assert weights.shape[:2] == (2, 4)
        assert weights.shape[3] == 5
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
        assert weights[1, ..., 3:].abs().max() == 0
    assert records["input_blocks.1.1.transformer_blocks.0"][0].shape == (2, 4, 96, 5)


def test_spatial_conditioning_is_joined_to_the_latents():
    ours = small(in_channels=7)
    latents, timestep, conditioning = inputs(ours.config)
    split = conditioning._replace(spatial=latents[:, 4:])
    with torch.no_grad():
        assert torch.equal(ours(latents[:, :4], timestep, split), ours(latents, timestep, conditioning))


def test_what_does_not_fit_is_refused_in_words():
    ours = small()
    latents, timestep, conditioning = inputs(ours.config)
    with pytest.raises(ValueError, match="multiple of 4"):
        ours(latents[..., :10], timestep, conditioning)
    with pytest.raises(ValueError, match="negative"):
        ours(latents, timestep, conditioning._replace(negative=conditioning.context))
    with pytest.raises(ValueError, match="pooled must be"):
        small(pooled_dim=4)(latents, timestep, conditioning)


@pytest.mark.parametrize(
    ("preset", "parameters"), [("tiny", 10_067_472), ("S", 41_495_472), ("B", 165_495_184), ("L", 636_744_656)]
)
def test_a_preset_has_the_parameters_it_promises_and_mmdits_within_one_percent(preset, parameters):
    def count(name):
        with torch.device("meta"):
            return sum(p.numel() for p in build_denoiser(model_config(name, preset, **TINY_WIDTHS)).parameters())

    assert count("unet") == parameters
    assert abs(count("unet") / count("mmdit") - 1) <= 0.01


def test_the_tiny_preset_reads_text_at_every_level_with_64_channel_heads():
    with torch.device("meta"):
        ours = build_denoiser(model_config("unet", "tiny", **TINY_WIDTHS))
    blocks = [m for name, m in ours.named_modules() if name.endswith("transformer_blocks.0")]
    assert sorted({b.norm1.weight.numel() for b in blocks}) == [64, 128, 192]
    assert all(b.norm1.weight.numel() // b.attn2.num_heads == 64 for b in blocks)
