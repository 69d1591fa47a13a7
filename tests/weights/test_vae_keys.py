"""The VAE's names and shapes are the release's; renaming to diffusers and back loses nothing."""

import gzip
import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmdit.config import VAEConfig
from mmdit.encoders.vae import AutoencoderKL, load_vae
from mmdit.weights import vae as layout

KEYS = Path(__file__).parent / "keys" / "vae.tsv.gz"
SMALL = {"block_channels": (8, 16, 16), "norm_groups": 4, "num_res_blocks": 1}


def small(**fields):
    torch.manual_seed(0)
    return AutoencoderKL(VAEConfig(**{**SMALL, **fields})).eval()


def test_the_sd3_vae_has_exactly_the_released_keys_and_shapes():
    with torch.device("meta"):
        vae = AutoencoderKL(VAEConfig())
    ours = {f"first_stage_model.{key}": tuple(tensor.shape) for key, tensor in vae.state_dict().items()}
    lines = gzip.decompress(KEYS.read_bytes()).decode().splitlines()
    released = {
        key: tuple(int(n) for n in shape.strip("()").split(",") if n.strip())
        for key, shape in (line.split("\t") for line in lines)
    }
    assert ours == released
    assert sum(p.numel() for p in vae.parameters()) == 83_819_683


@pytest.mark.parametrize("fields", [{}, {"use_quant_conv": True, "latent_channels": 4}, {"mid_attention": False}])
def test_renaming_to_diffusers_and_back_is_bit_equal(fields):
    state = small(**fields).state_dict()
    back = layout.to_original(layout.to_diffusers(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_the_diffusers_names_are_those_of_diffusers():
    from diffusers import AutoencoderKL as Theirs

    theirs = Theirs(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=16,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).state_dict()
    ours = layout.to_diffusers(small().state_dict())
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: t.shape for key, t in theirs.items()}


def test_diffusers_old_attention_names_are_read():
    state = small().state_dict()
    old = layout.to_diffusers(state)
    names = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    for new_name, old_name in names.items():
        old = {key.replace(new_name, old_name): tensor for key, tensor in old.items()}
    back = layout.to_original(old)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_a_file_in_the_original_layout_is_loaded_from_its_shapes(tmp_path):
    vae = small(shift=0.0609, scale=1.5305)
    save_file(
        {f"first_stage_model.{k}": t.contiguous() for k, t in vae.state_dict().items()}, tmp_path / "v.safetensors"
    )
    loaded = load_vae(tmp_path / "v.safetensors", norm_groups=4)
    assert loaded.config == vae.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), vae.state_dict().values(), strict=True))


def test_a_diffusers_folder_is_loaded_with_its_own_shift_and_scale(tmp_path):
    vae = small(latent_channels=4, use_quant_conv=True, shift=0.0, scale=0.13025)
    folder = tmp_path / "pipeline" / "vae"
    folder.mkdir(parents=True)
    state = {key: tensor.contiguous() for key, tensor in layout.to_diffusers(vae.state_dict()).items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"norm_num_groups": 4, "scaling_factor": 0.13025}))
    assert load_vae(folder).config == load_vae(tmp_path / "pipeline").config == vae.config


def test_a_whole_checkpoint_tells_its_release_and_a_bare_one_warns(tmp_path, caplog):
    state = {f"first_stage_model.{k}": t.contiguous() for k, t in small(latent_channels=4).state_dict().items()}
    save_file(state, tmp_path / "bare.safetensors")
    save_file({**state, "model.diffusion_model.label_emb.0.0.weight": torch.zeros(1)}, tmp_path / "sdxl.safetensors")
    assert load_vae(tmp_path / "sdxl.safetensors", norm_groups=4).config.scale == 0.13025
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert load_vae(tmp_path / "bare.safetensors", norm_groups=4).config.scale == 0.18215
    assert "0.13025" in caplog.text


def test_a_file_that_does_not_fit_is_refused_with_its_keys(tmp_path):
    state = {key: tensor.contiguous() for key, tensor in small().state_dict().items()}
    state["loss.logvar"] = torch.zeros(1)
    del state["encoder.mid.block_2.conv2.bias"]
    save_file(state, tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match=r"missing \['encoder.mid.block_2.conv2.bias'\], unexpected \['loss.logvar'\]"):
        load_vae(tmp_path / "v.safetensors", norm_groups=4)
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no VAE"):
        load_vae(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="no VAE at"):
        load_vae(tmp_path / "missing.safetensors")
