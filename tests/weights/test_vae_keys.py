"""The VAE's names and shapes are the release's; renaming to diffusers and back loses nothing."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmdit.config import EncodersConfig, VAEConfig
from mmdit.encoders.vae import AutoencoderKL, load_run_vae, load_vae, save_vae
from mmdit.weights import vae as layout
from mmdit.weights.files import WeightsError

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
    assert load_vae(folder, family="sd1.5").config == vae.config  # what the folder states comes first


def test_a_folder_may_scale_latents_by_channel(tmp_path):
    vae = small(latent_channels=4)
    state = {key: tensor.contiguous() for key, tensor in layout.to_diffusers(vae.state_dict()).items()}
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    means, deviations = [-1.6, 1.1, 1.4, -0.6], [8.4, 5.0, 5.2, 5.4]
    config = {"norm_num_groups": 4, "scaling_factor": 0.5, "latents_mean": means, "latents_std": deviations}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, pixels = load_vae(tmp_path), torch.rand(1, 3, 32, 32)
    mean, std = (torch.tensor(numbers).view(1, 4, 1, 1) for numbers in (means, deviations))
    expected = (loaded.moments(pixels)[0] - mean) * 0.5 / std  # as diffusers' pipelines scale
    assert torch.allclose(loaded.encode(pixels), expected, atol=1e-6)


def write(tensors, path):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def four_channels(path, *marks, prefix="first_stage_model."):
    state = {
        f"{prefix}{key}": tensor for key, tensor in small(latent_channels=4, use_quant_conv=True).state_dict().items()
    }
    return write({**state, **{mark: torch.zeros(1) for mark in marks}}, path)


@pytest.mark.parametrize(
    ("mark", "scale"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", 0.18215),
        ("cond_stage_model.transformer.text_model.final_layer_norm.weight", 0.18215),
        ("model.diffusion_model.label_emb.0.0.weight", 0.13025),
        ("conditioner.embedders.1.model.ln_final.weight", 0.13025),
    ],
)
def test_a_whole_checkpoint_tells_the_scale_of_its_latents(tmp_path, mark, scale):
    vae = load_vae(four_channels(tmp_path / "all.safetensors", mark), norm_groups=4)
    assert (vae.config.scale, vae.config.shift) == (scale, 0.0)
    assert vae.config.use_quant_conv


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_a_bare_vae_of_four_channels_asks_whose_it_is(tmp_path, prefix):
    path = four_channels(tmp_path / "bare.safetensors", prefix=prefix)
    with pytest.raises(
        WeightsError, match=r"family='sd1\.5' \(0\.18215\), family='sdxl' \(0\.13025\) or latent_scale="
    ):
        load_vae(path, norm_groups=4)
    assert load_vae(path, family="sdxl", norm_groups=4).config.scale == 0.13025
    assert load_vae(path, latent_scale=0.5, norm_groups=4).config.scale == 0.5
    assert load_vae(path, scale=0.5, latent_shift=0.25, norm_groups=4).config.shift == 0.25
    with pytest.raises(ValueError, match=r"did you mean 'sdxl'"):
        load_vae(path, family="sdx")


def test_a_run_may_state_the_scale_that_a_bare_file_lacks(tmp_path):
    path = tmp_path / "bare.safetensors"
    write(AutoencoderKL(VAEConfig(latent_channels=4, block_channels=(32, 32))).state_dict(), path)
    encoders = EncodersConfig(vae=str(path), latent_scale=(0.1, 0.2, 0.3, 0.4))
    assert load_run_vae(encoders).config.scale == (0.1, 0.2, 0.3, 0.4)


def test_a_vae_file_beside_its_config_takes_its_scale(tmp_path):
    save_vae(small(latent_channels=4, scale=0.13025, shift=0.0), tmp_path, "diffusers")
    assert load_vae(tmp_path / "diffusion_pytorch_model.safetensors").config.scale == 0.13025


@pytest.mark.parametrize("layout_name", ["original", "diffusers"])
@pytest.mark.parametrize("fields", [{}, {"latent_channels": 4, "use_quant_conv": True, "scale": 0.13025, "shift": 0.0}])
def test_saving_and_loading_is_bit_equal_in_both_layouts(tmp_path, layout_name, fields):
    vae = small(**fields)
    path = tmp_path / ("vae.safetensors" if layout_name == "original" else "vae")
    save_vae(vae, path, layout_name)
    loaded = load_vae(path)
    assert loaded.config == vae.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), vae.state_dict().values(), strict=True))
    second = tmp_path / ("again.safetensors" if layout_name == "original" else "again")
    save_vae(loaded, second, layout_name)
    files = [p if p.is_file() else p / "diffusion_pytorch_model.safetensors" for p in (path, second)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_saved_folder_is_read_by_diffusers_itself(tmp_path):
    from diffusers import AutoencoderKL as Theirs

    vae = small(latent_channels=4, use_quant_conv=True, scale=0.13025, shift=0.0)
    save_vae(vae, tmp_path / "vae", "diffusers")
    theirs = Theirs.from_pretrained(str(tmp_path / "vae"))
    assert theirs.config.scaling_factor == 0.13025
    raw = torch.randn(1, 4, 8, 6)
    with torch.no_grad():
        torch.testing.assert_close(vae.decode_raw(raw), theirs.decode(raw).sample, atol=5e-5, rtol=0)


def test_what_diffusers_has_no_words_for_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"stem_patch=2.*original layout"):
        save_vae(small(stem_patch=2), tmp_path / "vae", "diffusers")
    with pytest.raises(ValueError, match="one latent scale per channel"):
        save_vae(small(scale=(1.0,) * 16), tmp_path / "vae", "diffusers")
    with pytest.raises(ValueError, match="did you mean 'diffusers'"):
        save_vae(small(), tmp_path / "vae", "diffuser")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_files_of_every_dtype_load_and_a_target_dtype_is_obeyed(tmp_path, stored):
    vae = small()
    path = write({k: v.to(stored) for k, v in vae.state_dict().items()}, tmp_path / "v.safetensors")
    loaded = load_vae(path, norm_groups=4)
    assert all(torch.equal(b, a.to(stored).float()) for a, b in zip(vae.parameters(), loaded.parameters(), strict=True))
    half = load_vae(path, norm_groups=4, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in half.buffers()} == {torch.float32}
    latents = torch.randn(1, 16, 4, 4)
    pixels = half.decode(latents)
    assert pixels.dtype == torch.bfloat16
    assert (pixels.float() - loaded.decode(latents)).abs().mean() < 0.05 * loaded.decode(latents).abs().mean()
    assert half.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 16, 4, 4)
    with pytest.raises(ValueError, match="cannot run in"):
        load_vae(path, dtype=torch.float8_e4m3fn)


def test_losses_and_the_counters_of_an_average_that_a_file_carries_are_left_out(tmp_path):
    state = {**small().state_dict(), "loss.logvar": torch.zeros(1), "loss.discriminator.main.0.weight": torch.zeros(2)}
    state |= {"model_ema.decay": torch.zeros(()), "model_ema.num_updates": torch.zeros((), dtype=torch.int32)}
    assert load_vae(write(state, tmp_path / "v.safetensors"), norm_groups=4).config.latent_channels == 16


def test_a_file_that_does_not_fit_is_refused_with_its_keys(tmp_path):
    state = {**small().state_dict(), "encoder.strange": torch.zeros(1)}
    del state["encoder.mid.block_2.conv2.bias"]
    write(state, tmp_path / "v.safetensors")
    message = r"1 missing: encoder\.mid\.block_2\.conv2\.bias; 1 unexpected: encoder\.strange"
    with pytest.raises(ValueError, match=message):
        load_vae(tmp_path / "v.safetensors", norm_groups=4)
    write({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no VAE"):
        load_vae(tmp_path / "other.safetensors")
    write({"encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="not whole"):
        load_vae(tmp_path / "half.safetensors")
    with pytest.raises(FileNotFoundError, match="no VAE at"):
        load_vae(tmp_path / "missing.safetensors")
    with pytest.raises(FileNotFoundError, match="no VAE at"):
        load_vae(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="3 sets of weights"):
        load_vae(tmp_path)
