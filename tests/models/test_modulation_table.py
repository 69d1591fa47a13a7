"""adaLN by table: the same numbers with the weights away, and no answer for a time or text that is not in it."""

import pytest
import torch

from mmdit.config import CrossDiTConfig, MMDiTConfig, UNetConfig
from mmdit.denoiser import Conditioning
from mmdit.models import build_denoiser
from mmdit.models.layers import Modulation
from mmdit.models.modulation_table import ModulationTables, modulation_tables, table_bytes

SMALL = {"depth": 2, "width": 32, "num_heads": 2, "context_dim": 16, "pooled_dim": 12, "in_channels": 4,
         "out_channels": 4, "pos_embed_max_size": 8, "pos_embed_base_size": 4}  # fmt: skip
TIMES = torch.tensor([1000.0, 987.381, 500.0, 8.929])
BACKBONES = [MMDiTConfig(**SMALL, qk_norm="rms", dual_attention_layers=(0,)), CrossDiTConfig(**SMALL)]


def shaken(config):
    generator = torch.Generator().manual_seed(0)
    denoiser = build_denoiser(config).eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return denoiser


def inputs(rows=3):
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(rows, 4, 8, 12, generator=generator),
        Conditioning(
            torch.randn(rows, 5, 16, generator=generator), torch.randn(rows, 12, generator=generator)
        ),
    )  # fmt: skip


@pytest.mark.parametrize("config", BACKBONES, ids=lambda c: c.name)
@pytest.mark.parametrize("keep", ["place", "host"])
@torch.no_grad()
def test_tables_give_what_the_weights_gave_and_the_weights_come_back(config, keep):
    denoiser, (latents, conditioning) = shaken(config), inputs()
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    whole = [denoiser(latents, t.expand(3), conditioning) for t in TIMES]
    with modulation_tables(denoiser, TIMES, conditioning.pooled, keep=keep) as tables:
        assert not any(isinstance(module, Modulation) for module in denoiser.modules())
        assert tables.steps == 4
        assert tables.rows == 3
        for t, expected in zip(TIMES, whole, strict=True):
            torch.testing.assert_close(denoiser(latents, t.expand(3), conditioning), expected, atol=1e-6, rtol=1e-6)
        some = conditioning.index([2, 0])  # other batches of the same texts, as guidance asks for
        torch.testing.assert_close(
            denoiser(latents[[2, 0]], TIMES[:1].expand(2), some), whole[0][[2, 0]], atol=1e-6, rtol=1e-6
        )
    after = denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(denoiser(latents, TIMES[:1].expand(3), conditioning), whole[0])


@torch.no_grad()
def test_each_row_is_looked_up_for_its_own_time_and_text():
    denoiser, (latents, conditioning) = shaken(BACKBONES[0]), inputs()
    mixed = torch.stack([TIMES[2], TIMES[0], TIMES[3]])
    expected = denoiser(latents, mixed, conditioning)
    with modulation_tables(denoiser, TIMES, conditioning.pooled):
        torch.testing.assert_close(denoiser(latents, mixed, conditioning), expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_another_grid_and_other_prompts_are_refused():
    denoiser, (latents, conditioning) = shaken(BACKBONES[0]), inputs()
    with modulation_tables(denoiser, TIMES, conditioning.pooled):
        with pytest.raises(ValueError, match="built for another grid"):
            denoiser(latents, torch.full((3,), 499.0), conditioning)
        with pytest.raises(ValueError, match="built for other prompts"):
            denoiser(latents, TIMES[:1].expand(3), conditioning._replace(pooled=conditioning.pooled + 1e-3))
        with pytest.raises(ValueError, match="tables already"):
            ModulationTables(denoiser, TIMES, conditioning.pooled)
    denoiser(latents, torch.full((3,), 499.0), conditioning)


@torch.no_grad()
def test_freed_weights_hold_no_memory_and_return_only_where_they_are_given():
    denoiser, (latents, conditioning) = shaken(BACKBONES[0]), inputs()
    state = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    expected = denoiser(latents, TIMES[:1].expand(3), conditioning)
    count = sum(p.numel() for p in denoiser.parameters())
    tables = ModulationTables(denoiser, TIMES, conditioning.pooled, keep="nowhere")
    assert sum(p.numel() for p in denoiser.parameters()) == count - tables.weight_bytes // 4
    torch.testing.assert_close(
        denoiser(latents, TIMES[:1].expand(3), conditioning), expected, atol=1e-6, rtol=1e-6
    )  # fmt: skip
    with pytest.raises(ValueError, match="freed and 10 tensors of them are not given"):
        tables.restore()
    tables.restore(state)
    assert torch.equal(denoiser(latents, TIMES[:1].expand(3), conditioning), expected)


def test_equal_texts_are_stored_once_and_sizes_are_known_beforehand():
    denoiser, (_, conditioning) = shaken(BACKBONES[0]), inputs()
    pooled = torch.cat([conditioning.pooled, conditioning.pooled[:1].repeat(5, 1)])
    expected = table_bytes(denoiser, steps=4, rows=3, itemsize=4)
    with modulation_tables(denoiser, TIMES, pooled) as tables:
        assert (tables.table_bytes, tables.weight_bytes) == expected
    numbers = 6 * 32 + 9 * 32 + 6 * 32 + 2 * 32 + 2 * 32  # two blocks of two streams and the final layer
    assert expected == (4 * 3 * numbers * 4, 4 * (numbers * 32 + numbers))


def test_a_third_of_sd3_medium_is_modulation():
    with torch.device("meta"):
        denoiser = build_denoiser(MMDiTConfig())
    weights = table_bytes(denoiser, 28, 2, 2)[1] / 4
    assert weights / sum(p.numel() for p in denoiser.parameters()) == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize("injection", ["cross", "joint"])
def test_there_are_no_tables_for_a_unet(injection):
    config = UNetConfig(model_channels=16, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(1, 1), head_dim=8,
                        norm_groups=8, context_dim=16, injection=injection)  # fmt: skip
    assert table_bytes(build_denoiser(config), 4, 1, 4) == (0, 0)  # so that nobody asks for them
    with pytest.raises(ValueError, match="UNet has no adaLN modulations"):
        ModulationTables(build_denoiser(config), TIMES, None)
