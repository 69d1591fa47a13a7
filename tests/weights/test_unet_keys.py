"""The U-Net's names and shapes are the releases'; renaming to diffusers and back loses nothing."""

import gzip
from pathlib import Path

import pytest
import torch

from mmdit.config import model_config
from mmdit.models import build_denoiser
from mmdit.weights import sd1, sdxl, unet_keys

KEYS = Path(__file__).parent / "keys"
RELEASES = {
    "sd1.5": (sd1, "sd15_unet", 686, 859_520_964),
    "sdxl": (sdxl, "sdxl_unet", 1_680, 2_567_463_684),
}
# stages without transformers at either end, different depths, no middle transformer, one to three blocks a stage
SHAPES = (
    {"transformer_depth": (1, 1, 0)},
    {"transformer_depth": (0, 1, 2), "middle_transformer_depth": 2, "pooled_dim": 12},
    {"transformer_depth": (0, 0, 0), "middle_transformer_depth": 0, "num_res_blocks": 3},
    {"transformer_depth": (2, 0, 1), "middle_transformer_depth": 0, "linear_projection": True, "pooled_dim": 4},
)


def small(**fields):
    shape = {
        "model_channels": 8,
        "channel_mult": (1, 2, 2),
        "num_res_blocks": 1,
        "head_dim": 4,
        "context_dim": 6,
        "norm_groups": 4,
    }
    return model_config("unet", **{**shape, **fields})


def on_meta(config):
    with torch.device("meta"):
        return build_denoiser(config)


@pytest.mark.parametrize("name", RELEASES)
def test_the_released_preset_has_exactly_the_released_keys_and_shapes(name):
    layout, file, num_keys, num_parameters = RELEASES[name]
    denoiser = on_meta(model_config("unet", name))
    ours = {layout.PREFIX + key: tuple(tensor.shape) for key, tensor in denoiser.state_dict().items()}
    lines = gzip.decompress((KEYS / f"{file}.tsv.gz").read_bytes()).decode().splitlines()
    released = {
        key: tuple(int(n) for n in shape.strip("()").split(",") if n.strip())
        for key, shape in (line.split("\t") for line in lines)
        if key.startswith(layout.PREFIX)
    }
    assert sorted(set(ours) ^ set(released)) == []
    assert ours == released
    assert len(ours) == num_keys
    assert sum(p.numel() for p in denoiser.parameters()) == num_parameters


@pytest.mark.parametrize("fields", SHAPES)
def test_renaming_to_diffusers_and_back_is_bit_equal(fields):
    config = small(**fields)
    layout = sd1 if config.pooled_dim is None else sdxl
    state = build_denoiser(config).state_dict()
    there = layout.to_diffusers(state, config)
    back = layout.from_diffusers(there, config)
    assert len(there) == len(state)
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert layout.to_diffusers(back, config).keys() == there.keys()


@pytest.mark.parametrize("name", RELEASES)
def test_renaming_a_release_to_diffusers_and_back_keeps_every_key(name):
    layout, _, num_keys, _ = RELEASES[name]
    config = model_config("unet", name)
    state = on_meta(config).state_dict()
    there = layout.to_diffusers(state, config)
    assert len(there) == num_keys
    assert "up_blocks.0.upsamplers.0.conv.weight" in there
    assert ("add_embedding.linear_1.weight" in there) == (name == "sdxl")
    assert list(layout.from_diffusers(there, config)) == list(state)


def test_a_key_that_does_not_fit_the_config_is_named():
    config = small(transformer_depth=(1, 1, 0))
    state = build_denoiser(config).state_dict()
    with pytest.raises(ValueError, match=r"input_blocks\.6\.1\.norm\.weight"):
        sd1.to_diffusers({**state, "input_blocks.6.1.norm.weight": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match="prefix"):
        unet_keys.to_diffusers({unet_keys.PREFIX + key: value for key, value in state.items()}, config)


def test_sd1_refuses_a_pooled_vector_and_sdxl_its_absence():
    with pytest.raises(ValueError, match=r"weights\.sdxl"):
        sd1.to_diffusers({}, small(transformer_depth=(1, 1, 0), pooled_dim=4))
    with pytest.raises(ValueError, match=r"weights\.sd1"):
        sdxl.from_diffusers({}, small(transformer_depth=(1, 1, 0)))
