"""Every preset's size, recounted without memory; a changed number here changes results."""

import pytest
import torch

from mmdit.config import model_config
from mmdit.models import BACKBONES, build_denoiser
from mmdit.presets import ENCODER_WIDTHS, PRESETS, VAE_WIDTHS

TINY_WIDTHS = {
    "in_channels": VAE_WIDTHS["tiny"]["channels"],
    "out_channels": VAE_WIDTHS["tiny"]["channels"],
    **ENCODER_WIDTHS["tiny"],
}
RELEASED = {
    ("mmdit", "sd3_medium"): 2_028_328_000,
    ("mmdit", "sd3.5_medium"): 2_243_171_520,
    ("mmdit", "sd3.5_large"): 8_056_627_520,
    ("unet", "sd1.5"): 859_520_964,
    ("unet", "sdxl"): 2_567_463_684,
}
OURS = {
    ("mmdit", "tiny"): 10_092_544,
    ("mmdit", "S"): 41_563_456,
    ("mmdit", "B"): 165_407_296,
    ("mmdit", "L"): 633_696_320,
    ("crossdit", "tiny"): 9_955_648,
    ("crossdit", "S"): 41_568_064,
    ("crossdit", "B"): 165_416_512,
    ("crossdit", "L"): 634_773_568,
    ("unet", "tiny"): 10_067_472,
    ("unet", "S"): 41_495_472,
    ("unet", "B"): 165_495_184,
    ("unet", "L"): 636_744_656,
}
EVERY = [(name, preset) for name, presets in PRESETS.items() for preset in presets]


def count(name, preset):
    """Parameters without building them; the position table is a buffer and not counted."""
    widths = {} if (name, preset) in RELEASED else TINY_WIDTHS
    with torch.device("meta"):
        denoiser = build_denoiser(model_config(name, preset, **widths))
    return sum(p.numel() for p in denoiser.parameters())


def test_the_tables_of_presets_and_of_backbones_have_the_same_names():
    assert PRESETS.keys() == BACKBONES.keys()
    assert set(EVERY) == set(OURS) | set(RELEASED)


@pytest.mark.parametrize(("name", "preset"), EVERY)
def test_a_preset_has_the_written_number_of_parameters(name, preset):
    assert count(name, preset) == {**OURS, **RELEASED}[name, preset]


def test_tiny_presets_have_ten_million_parameters_within_two_and_a_half_percent():
    for name in BACKBONES:
        assert abs(count(name, "tiny") / 10e6 - 1) <= 0.025


@pytest.mark.parametrize("preset", ["tiny", "S", "B", "L"])
def test_presets_of_one_name_match_within_the_five_percent_a_study_allows(preset):
    counts = [count(name, preset) for name in BACKBONES]
    assert max(counts) / min(counts) <= 1.05
