"""What is MMDiT's and CrossDiT's own: streams, positions, residuals, the shared layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_2d_sincos_pos_embed_from_grid, get_timestep_embedding

from mmdit.config import model_config
from mmdit.denoiser import Conditioning, record_attention
from mmdit.models import build_denoiser, layers
from mmdit.models.posembed import crop_center, position_table

SMALL = {
    "depth": 3, "width": 32, "num_heads": 4, "pos_embed_max_size": 8, "pos_embed_base_size": 4, "in_channels": 4,
    "out_channels": 4, "context_dim": 24, "pooled_dim": 20,
}  # fmt: skip


def filled(name, **fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = build_denoiser(model_config(name, **{**SMALL, **fields})).eval()
        with torch.no_grad():
            for tensor in denoiser.state_dict().values():
                tensor.add_(0.1 * torch.randn(tensor.shape))
    return denoiser


def draw(length=6, height=8, width=8):
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return randn(2, 4, height, width), torch.tensor([7.5, 999.0]), Conditioning(randn(2, length, 24), randn(2, 20))


def test_the_last_block_of_mmdit_computes_no_text_queries():
    denoiser = filled("mmdit", qk_norm="rms")
    denoiser(*draw()).square().sum().backward()
    attn = denoiser.joint_blocks[2].context_block.attn
    assert set(denoiser.unused_parameters()) == {
        f"joint_blocks.2.context_block.attn.{name}" for name in ("qkv.weight", "qkv.bias", "ln_q.weight")
    }
    assert torch.count_nonzero(attn.qkv.weight.grad[:32]) == 0
    assert all(rows.any() for rows in attn.qkv.weight.grad[32:].chunk(2))
    assert not attn.ln_q.weight.requires_grad


def test_text_order_does_not_matter_to_mmdit_since_text_has_no_positions():
    denoiser = filled("mmdit")
    latents, timestep, conditioning = draw()
    with torch.no_grad():
        forward = denoiser(latents, timestep, conditioning)
        backward = denoiser(latents, timestep, conditioning._replace(context=conditioning.context.flip(1)))
    torch.testing.assert_close(forward, backward, rtol=0, atol=2e-6)


def test_mmdit_updates_the_text_and_crossdit_does_not():
    latents, timestep, conditioning = draw()
    other = latents.flip(0)
    for name, block in (("mmdit", "joint_blocks.2"), ("crossdit", "blocks.2")):
        denoiser = filled(name)
        keys = []
        target = denoiser.get_submodule(block)
        kv = target.context_block.attn.qkv if name == "mmdit" else target.cross_attn.kv
        if name == "mmdit":  # the last block applies a slice of `qkv`, so watch what goes in
            target.register_forward_pre_hook(lambda _, inputs, keys=keys: keys.append(inputs[1].context))
        else:
            kv.register_forward_hook(lambda _, __, output, keys=keys: keys.append(output))
        with torch.no_grad():
            denoiser(latents, timestep, conditioning)
            denoiser(other, timestep, conditioning)
        assert torch.equal(keys[0], keys[1]) == (name == "crossdit")


def test_joint_attention_also_reads_the_image_and_cross_attention_reads_text_only():
    for name, expected in (("mmdit", False), ("crossdit", True)):
        denoiser = filled(name)
        with torch.no_grad(), record_attention(denoiser) as records:
            denoiser(*draw())
        assert len(records) == 3
        for (weights,) in records.values():
            assert weights.shape == (2, 4, 16, 6)
            whole = torch.allclose(weights.sum(-1), torch.ones(2, 4, 16), atol=1e-5)
            assert whole == expected


@pytest.mark.parametrize("name", ["mmdit", "crossdit"])
def test_zero_residuals_change_nothing_and_others_do(name):
    denoiser = filled(name)
    with torch.no_grad():
        plain = denoiser(*draw())
        none = denoiser.run_blocks(*draw(), [torch.zeros(2, 16, 32)] * 3)
        generator = torch.Generator().manual_seed(1)
        residuals = [torch.randn(2, 16, 32, generator=generator) for _ in range(3)]
        some = [denoiser.run_blocks(*draw(), residuals[:n]) for n in (1, 2, 3)]
    assert torch.equal(none, plain)
    assert all((prediction - plain).abs().max() > 1e-2 for prediction in some)


@pytest.mark.parametrize("name", ["mmdit", "crossdit"])
def test_an_image_beyond_the_position_table_is_refused(name):
    with pytest.raises(ValueError, match="exceeds the position table: at most 16x16"):
        filled(name)(*draw(height=18))
    with pytest.raises(ValueError, match="9x4 patches exceeds the position table of 8x8"):
        crop_center(torch.zeros(1, 64, 4), 9, 4)


def test_the_position_table_follows_the_formula_of_sd3():
    M, S, D = 12, 4, 16
    positions = (torch.arange(M).double() - (M - S) / 2) * 16 / S
    grid = torch.stack(torch.meshgrid(positions, positions, indexing="xy"))  # columns first
    expected = get_2d_sincos_pos_embed_from_grid(D, grid.reshape(2, 1, M, M), output_type="pt")
    torch.testing.assert_close(position_table(D, M, S)[0], expected.float(), rtol=0, atol=1e-6)


def test_released_grids_lie_a_quarter_apart_around_the_centre():
    table = position_table(8, 192, 64).view(192, 192, 8)
    for column in (0, 63, 64, 96, 191):
        torch.testing.assert_close(table[5, column, 0].item(), math.sin((column - 64) / 4), rtol=0, atol=1e-6)
        torch.testing.assert_close(table[column, 5, 4].item(), math.sin((column - 64) / 4), rtol=0, atol=1e-6)


def test_a_crop_is_the_centre_of_the_table_row_by_row():
    table = torch.arange(36.0).view(1, 36, 1)
    assert crop_center(table, 2, 3).flatten().tolist() == [13, 14, 15, 19, 20, 21]
    assert crop_center(table, 3, 6).flatten().tolist() == list(range(6, 24))


def test_the_timestep_embedding_is_that_of_the_releases():
    timestep = torch.tensor([0.0, 0.5, 3.25, 999.0])
    expected = get_timestep_embedding(timestep, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(layers.timestep_embedding(timestep), expected, rtol=0, atol=2e-6)
    assert layers.timestep_embedding(timestep.double()).dtype == torch.float32


def test_patches_and_back_are_inverse_and_equal_the_convolution():
    latents = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    embed = layers.PatchEmbed(3, 2, 8)
    expected = embed.proj(latents).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(latents), expected, rtol=0, atol=1e-6)
    patches = latents.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    assert torch.equal(layers.unpatchify(patches, 2, 2), latents)


@pytest.mark.parametrize("keys", [5, 127, 128, 200])
@pytest.mark.parametrize("masked", [False, True])
def test_both_kernels_of_attention_agree_with_the_definition(keys, masked):
    generator = torch.Generator().manual_seed(keys)
    q, k, v = (torch.randn(2, 3, n, 8, generator=generator) for n in (7, keys, keys))
    mask = torch.rand(2, keys, generator=generator) < 0.5 if masked else None
    scores = torch.einsum("balk,bamk->balm", q.double(), k.double()) / math.sqrt(8)
    if masked:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    expected = (scores.softmax(-1) @ v.double()).float()
    torch.testing.assert_close(layers.attention(q, k, v, mask), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("keys", [5, 200])
def test_a_query_that_may_see_nothing_reads_zero_and_has_finite_gradients(keys):
    q, k, v = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (3, keys, keys))
    out = layers.attention(q, k, v, torch.zeros(1, keys, dtype=torch.bool))
    assert torch.count_nonzero(out) == 0
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_rms_norm_works_in_float32_on_half_precision_input():
    norm = layers.RMSNorm(8).to(torch.bfloat16)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = F.rms_norm(x.float(), (8,), eps=1e-6).bfloat16()
    assert torch.equal(norm(x), expected)
