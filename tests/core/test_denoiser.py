"""The door: conditioning that is joined, moved and picked; inputs refused in words; context managers that restore."""

import pytest
import torch
from torch import nn

from mmdit.denoiser import (
    Conditioning,
    attention_records,
    check_inputs,
    record_attention,
    skip_layers,
    skipped_layers,
    unwrap,
)


def text(batch, *lengths, seed=0, masked=False):
    """Conditioning with one stream per length; a masked one hides the last token of each stream."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    context = torch.randn(batch, total, 8, generator=generator)
    mask, streams, start = torch.ones(batch, total, dtype=torch.bool), [], 0
    for name, length in zip(("clip", "t5"), lengths, strict=False):
        streams.append((name, start, start + length, 8))
        start += length
        mask[:, start - 1] = False
    pooled = torch.randn(batch, 4, generator=generator)
    return Conditioning(context, pooled, mask if masked else None, tuple(streams))


def test_equal_lengths_are_joined_without_a_mask():
    a, b = text(2, 3, 5), text(1, 3, 5, seed=1)
    joined = Conditioning.cat([a, b])
    assert torch.equal(joined.context, torch.cat([a.context, b.context]))
    assert torch.equal(joined.pooled, torch.cat([a.pooled, b.pooled]))
    assert joined.context_mask is None
    assert joined.streams == a.streams


def test_each_stream_is_padded_by_itself_and_what_was_added_is_masked():
    a, b = text(2, 3, 2), text(1, 1, 4, seed=1)
    joined = Conditioning.cat([a, b])
    assert joined.context.shape == (3, 7, 8)
    assert joined.streams == (("clip", 0, 3, 8), ("t5", 3, 7, 8))
    assert torch.equal(joined.context[:2, 0:3], a.context[:, 0:3])
    assert torch.equal(joined.context[:2, 3:5], a.context[:, 3:5])
    assert torch.equal(joined.context[2:, 0:1], b.context[:, 0:1])
    assert torch.equal(joined.context[2:, 3:7], b.context[:, 1:5])
    assert joined.context_mask.tolist() == [
        [True, True, True, True, True, False, False],
        [True, True, True, True, True, False, False],
        [True, False, False, True, True, True, True],
    ]
    assert torch.count_nonzero(joined.context[~joined.context_mask]) == 0


def test_a_part_without_a_mask_attends_to_all_of_its_own_tokens():
    joined = Conditioning.cat([text(1, 2, 2, masked=True), text(1, 2, 2, seed=1)])
    assert joined.context_mask.tolist() == [[True, False, True, False], [True, True, True, True]]


def test_masks_are_kept_where_streams_are_padded():
    joined = Conditioning.cat([text(1, 2, 1, masked=True), text(1, 3, 2, seed=1, masked=True)])
    assert joined.context_mask.tolist() == [[True, False, False, False, False], [True, True, False, True, False]]


def test_contexts_without_streams_are_padded_at_the_end():
    joined = Conditioning.cat([Conditioning(torch.ones(1, 2, 8)), Conditioning(torch.ones(1, 3, 8))])
    assert joined.streams is None
    assert joined.context_mask.tolist() == [[True, True, False], [True, True, True]]
    assert joined.context[0, 2].tolist() == [0.0] * 8


def test_the_wider_width_of_a_stream_is_kept():
    a, b = text(1, 2), text(1, 2)
    a = a._replace(streams=(("clip", 0, 2, 5),))
    assert Conditioning.cat([a, b]).streams == (("clip", 0, 2, 8),)


def test_joining_does_not_change_its_parts():
    a, b = text(1, 1, 2), text(1, 2, 3)
    before = a.context.clone()
    Conditioning.cat([a, b]).context.zero_()
    assert torch.equal(a.context, before)


def test_parts_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="no parts"):
        Conditioning.cat([])
    with pytest.raises(ValueError, match="'pooled' is present in some parts"):
        Conditioning.cat([text(1, 2), text(1, 2)._replace(pooled=None)])
    with pytest.raises(ValueError, match="different text streams"):
        Conditioning.cat([text(1, 2), text(1, 2, 3)])


def test_optional_tensors_are_joined_too():
    part = text(2, 2)._replace(spatial=torch.ones(2, 1, 4, 4), control=torch.zeros(2, 3, 8, 8))
    joined = Conditioning.cat([part, part])
    assert joined.spatial.shape == (4, 1, 4, 4)
    assert joined.control.shape == (4, 3, 8, 8)


def test_repeated_rows_stand_beside_each_other():
    part = text(2, 3, masked=True)
    repeated = part.repeat(2)
    for field in ("context", "pooled", "context_mask"):
        rows = getattr(part, field)
        assert torch.equal(getattr(repeated, field), torch.stack([rows[0], rows[0], rows[1], rows[1]]))
    assert repeated.streams == part.streams


@pytest.mark.parametrize("rows", [[2, 0], torch.tensor([2, 0]), torch.tensor([True, False, True]), slice(1, 3)])
def test_picked_rows_are_picked_from_every_tensor(rows):
    part = text(3, 3, masked=True)._replace(spatial=torch.arange(3.0).view(3, 1, 1, 1))
    picked = part.index(rows)
    for field in ("context", "pooled", "context_mask", "spatial"):
        assert torch.equal(getattr(picked, field), getattr(part, field)[rows])
    assert picked.streams == part.streams


def test_casting_leaves_the_mask_bool():
    cast = text(1, 3, masked=True).to(dtype=torch.bfloat16)
    assert (cast.context.dtype, cast.pooled.dtype, cast.context_mask.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.bool,
    )
    moved = cast.to("meta")
    assert (moved.context.device.type, moved.context.dtype) == ("meta", torch.bfloat16)
    assert moved.negative is None


def fitting():
    """Inputs and limits that fit each other."""
    inputs = {"latents": torch.zeros(2, 4, 8, 6), "timestep": torch.zeros(2), "conditioning": text(2, 3, 2)}
    limits = {"in_channels": 4, "context_dim": 8, "pooled_dim": 4, "multiple": 2, "max_size": 8}
    return inputs, limits


def test_inputs_that_fit_are_accepted():
    inputs, limits = fitting()
    check_inputs(**inputs, **limits)
    check_inputs(**{**inputs, "conditioning": text(2, 3, 2)._replace(pooled=None)}, **{**limits, "pooled_dim": None})
    check_inputs(**inputs, **{**limits, "multiple": 1, "max_size": None})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("latents", torch.zeros(2, 4, 8), r"latents must be \[B, C, H, W\], got shape \[2, 4, 8\]"),
        ("latents", torch.zeros(2, 16, 8, 6), r"latents have 16 channels .* reads 4; set model.in_channels=16"),
        ("latents", torch.zeros(2, 4, 8, 7), "latent size 8x7 is not a multiple of 2"),
        ("latents", torch.zeros(2, 4, 10, 6), "10x6 exceeds the position table: at most 8x8"),
        ("timestep", torch.zeros(()), r"timestep must be \[B\] = \[2\], got shape \[\]"),
        ("timestep", torch.zeros(2, 1), r"timestep must be \[B\] = \[2\], got shape \[2, 1\]"),
        ("conditioning", text(3, 3), r"context must be \[B, L, E\] = \[2, L, 8\], got shape \[3, 3, 8\]"),
        ("conditioning", Conditioning(torch.zeros(2, 3, 9)), r"= \[2, L, 8\], got shape \[2, 3, 9\]"),
        ("conditioning", Conditioning(torch.zeros(2, 8)), r"got shape \[2, 8\]"),
        ("conditioning", text(2, 3)._replace(context_mask=torch.ones(2, 3)), r"context_mask must be bool .*float32"),
        (
            "conditioning",
            text(2, 3)._replace(context_mask=torch.ones(2, 4, dtype=torch.bool)),
            r"context_mask must be bool \[B, L\] = \[2, 3\], got torch.bool \[2, 4\]",
        ),
        ("conditioning", text(2, 3)._replace(pooled=None), r"pooled must be \[B, G\] = \[2, 4\], got none"),
        ("conditioning", text(2, 3)._replace(pooled=torch.zeros(2, 5)), r"= \[2, 4\], got shape \[2, 5\]"),
        (
            "conditioning",
            text(2, 3)._replace(spatial=torch.zeros(2, 1, 8, 6)),
            r"5 channels \(spatial conditioning included\)",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_what_was_expected(field, value, message):
    inputs, limits = fitting()
    with pytest.raises(ValueError, match=message):
        check_inputs(**{**inputs, field: value}, **limits)


class Inner(nn.Module):
    """Stands for a backbone."""


class Wrapper(nn.Module):
    """Wraps as DistributedDataParallel (`module`) or torch.compile (`_orig_mod`) does."""

    def __init__(self, attribute, inner):
        super().__init__()
        setattr(self, attribute, inner)


def test_the_backbone_is_found_inside_its_wrappers():
    inner = Inner()
    assert unwrap(Wrapper("_orig_mod", Wrapper("module", inner))) is inner
    assert unwrap(inner) is inner


def test_skipped_layers_are_restored_also_when_nested_and_after_an_error():
    inner = Inner()
    assert skipped_layers(inner) == frozenset()
    with skip_layers(Wrapper("module", inner), [1, 2]):
        assert skipped_layers(inner) == {1, 2}
        with skip_layers(inner, (layer for layer in [3])):
            assert skipped_layers(inner) == {3}
        assert skipped_layers(inner) == {1, 2}
    with pytest.raises(RuntimeError, match="inside"), skip_layers(inner, [0]):
        raise RuntimeError("inside")
    assert skipped_layers(inner) == frozenset()


def test_attention_is_recorded_only_inside_the_context():
    inner = Inner()
    assert attention_records(inner) is None
    with record_attention(inner) as outer:
        with record_attention(inner) as nested:
            assert attention_records(inner) is nested
        assert attention_records(inner) is outer
    assert attention_records(inner) is None


@pytest.mark.parametrize("name", ["mmdit", "crossdit", "unet"])
def test_a_block_that_does_not_exist_cannot_be_skipped(name):
    from mmdit.config import model_config
    from mmdit.models import build_denoiser

    with torch.device("meta"):
        denoiser = build_denoiser(model_config(name, "tiny", context_dim=16, pooled_dim=8))
    with (
        pytest.raises(ValueError, match=rf"no blocks \[99\].*0 to {denoiser.num_blocks - 1}"),
        skip_layers(denoiser, [0, 99]),
    ):
        pass
