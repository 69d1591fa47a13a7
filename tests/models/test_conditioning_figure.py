"""The picture in docs/conditioning.md is that of the network, and its sizes are those of the presets."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import yaml

from mmdit.config import load_config
from mmdit.models import build_denoiser
from mmdit.models.matching import measure

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_picture_is_what_its_script_draws():
    spec = importlib.util.spec_from_file_location("draw_conditioning", DOCS / "draw_conditioning.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "conditioning.svg").read_text(encoding="utf-8") == module.draw()


ROWS = re.findall(r"^\| `(\w+)` \| (.*?) \| ([\d,]+) \| ([\d,]+) \|$", (DOCS / "conditioning.md").read_text(), re.M)


each_row = pytest.mark.parametrize(("name", "changed", "parameters", "flop"), ROWS)


def config_of(name, changed):
    fields = {}
    for field in re.findall(r"`([^`]+)`", changed):
        fields |= yaml.safe_load(field)
    return load_config(None, {"model": {"name": name, "preset": "tiny", **fields}}).model


@each_row
def test_the_parameters_in_the_table_are_true(name, changed, parameters, flop):
    with torch.device("meta"):
        count = sum(p.numel() for p in build_denoiser(config_of(name, changed)).parameters())
    assert f"{count:,}" == parameters


@pytest.mark.slow
@each_row
def test_the_flop_in_the_table_are_true(name, changed, parameters, flop):
    assert f"{measure(config_of(name, changed), tokens=24, latent_size=8).flops / 1e6:,.0f}" == flop


def test_the_table_has_every_backbone():
    assert {row[0] for row in ROWS} == {"mmdit", "crossdit", "unet"}
    assert len(ROWS) == 17
