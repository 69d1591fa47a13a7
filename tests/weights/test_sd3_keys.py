"""MMDiT's names and shapes are the releases'; renaming to diffusers loses nothing and the networks agree there."""

import gzip
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from mmdit.config import model_config
from mmdit.denoiser import Conditioning, skip_layers
from mmdit.models import MMDiT
from mmdit.weights import sd3

KEYS = Path(__file__).parent / "keys"
VARIANTS = {
    "sd3": {},
    "sd3.5_large": {"qk_norm": "rms"},
    "sd3.5_medium": {"qk_norm": "rms", "dual_attention_layers": (0, 1)},
    "dual_without_norm": {"dual_attention_layers": (0, 2)},
}


def small(variant, seed=0):
    """A small MMDiT with every parameter and the position table filled: zero gates would hide everything."""
    config = model_config(
        "mmdit",
        depth=3,
        width=32,
        num_heads=4,
        in_channels=4,
        out_channels=4,
        context_dim=24,
        pooled_dim=20,
        pos_embed_max_size=12,
        pos_embed_base_size=4,
        **VARIANTS[variant],
    )
    denoiser = MMDiT(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in denoiser.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    return denoiser


def theirs(denoiser):
    """The same network in diffusers, loaded strictly from our renamed weights."""
    config = denoiser.config
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        attention_head_dim=config.width // config.num_heads,
        num_attention_heads=config.num_heads,
        caption_projection_dim=config.width,
        joint_attention_dim=config.context_dim,
        pooled_projection_dim=config.pooled_dim,
        pos_embed_max_size=config.pos_embed_max_size,
        dual_attention_layers=config.dual_attention_layers,
        qk_norm="rms_norm" if config.qk_norm else None,
    ).eval()
    network.load_state_dict(sd3.to_diffusers(denoiser.state_dict()), strict=True)
    return network


def inputs(height=6, width=10, length=7):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return draw(2, 4, height, width), torch.tensor([3.25, 998.0]), Conditioning(draw(2, length, 24), draw(2, 20))


def released(name):
    lines = gzip.decompress((KEYS / f"{name}.tsv.gz").read_bytes()).decode().splitlines()
    rows = (line.split("\t") for line in lines)
    return {key: tuple(int(n) for n in shape.strip("()").split(",") if n.strip()) for key, shape in rows}


@pytest.mark.parametrize("name", ["sd3_medium", "sd3.5_medium", "sd3.5_large"])
def test_a_released_preset_has_exactly_the_released_keys_and_shapes(name):
    with torch.device("meta"):
        denoiser = MMDiT(model_config("mmdit", name))
    assert {key: tuple(tensor.shape) for key, tensor in denoiser.state_dict().items()} == released(name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_renaming_to_diffusers_and_back_is_bit_equal(variant):
    state = small(variant).state_dict()
    back = sd3.from_diffusers(sd3.to_diffusers(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_renaming_from_diffusers_and_back_is_bit_equal(variant):
    state = theirs(small(variant)).state_dict()
    again = sd3.to_diffusers(sd3.from_diffusers(state))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [7, 150])
def test_the_prediction_is_that_of_diffusers_with_the_same_weights(variant, length):
    denoiser = small(variant)
    latents, timestep, conditioning = inputs(length=length)
    with torch.no_grad():
        ours = denoiser(latents, timestep, conditioning)
        reference = theirs(denoiser)(latents, conditioning.context, conditioning.pooled, timestep).sample
    assert reference.std() > 0.05
    torch.testing.assert_close(ours, reference, rtol=0, atol=2e-6)


def test_control_residuals_and_skipped_layers_mean_the_same_as_in_diffusers():
    denoiser = small("sd3.5_medium")
    latents, timestep, conditioning = inputs()
    residuals = [torch.randn(2, 15, 32, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    reference = theirs(denoiser)
    args = (latents, conditioning.context, conditioning.pooled, timestep)
    with torch.no_grad():
        controlled = denoiser.run_blocks(latents, timestep, conditioning, residuals)
        expected = reference(*args, block_controlnet_hidden_states=residuals).sample
        torch.testing.assert_close(controlled, expected, rtol=0, atol=2e-6)
        with skip_layers(denoiser, [1]):
            skipped = denoiser(latents, timestep, conditioning)
        torch.testing.assert_close(skipped, reference(*args, skip_layers=[1]).sample, rtol=0, atol=2e-6)


def test_only_the_modulations_of_two_vectors_are_swapped():
    denoiser = small("sd3.5_medium")
    ours, renamed = denoiser.state_dict(), sd3.to_diffusers(denoiser.state_dict())
    swapped = ours["final_layer.adaLN_modulation.1.bias"].chunk(2)
    assert torch.equal(renamed["norm_out.linear.bias"], torch.cat([swapped[1], swapped[0]]))
    swapped = ours["joint_blocks.2.context_block.adaLN_modulation.1.bias"].chunk(2)
    assert torch.equal(renamed["transformer_blocks.2.norm1_context.linear.bias"], torch.cat([swapped[1], swapped[0]]))
    kept = ours["joint_blocks.1.context_block.adaLN_modulation.1.bias"]
    assert torch.equal(renamed["transformer_blocks.1.norm1_context.linear.bias"], kept)


def test_foreign_keys_and_incomplete_triples_are_refused_by_name():
    state = small("sd3").state_dict()
    with pytest.raises(ValueError, match=r"joint_blocks\.0\.x_block\.extra\.weight"):
        sd3.to_diffusers({**state, "joint_blocks.0.x_block.extra.weight": torch.zeros(1)})
    renamed = sd3.to_diffusers(state)
    with pytest.raises(ValueError, match=r"decoder\.weight"):
        sd3.from_diffusers({**renamed, "decoder.weight": torch.zeros(1)})
    del renamed["transformer_blocks.1.attn.add_k_proj.bias"]
    with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn\.add_k_proj\.bias"):
        sd3.from_diffusers(renamed)
