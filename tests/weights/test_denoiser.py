"""Released denoisers load from every layout and agree with diffusers; what is saved is read back bit for bit.

The networks are diffusers' own, small, with random weights and a position table that no formula gives. Their files in
the original layout are checked by diffusers' own converter, not by our key tables.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import save_file

from mmdit import build_denoiser, load_denoiser, save_denoiser
from mmdit.checkpoint import MANIFEST, CheckpointError, fingerprint, manifest_text, save_checkpoint
from mmdit.config import model_config
from mmdit.denoiser import Conditioning
from mmdit.weights import sd3, unet_keys
from mmdit.weights.detect import detect
from mmdit.weights.files import WeightsError, open_weights
from mmdit.weights.writing import write_weights

PREFIX = "model.diffusion_model."
DIT = {"sample_size": 8, "num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 64, "in_channels": 16,
       "caption_projection_dim": 128, "joint_attention_dim": 24, "pooled_projection_dim": 20,
       "pos_embed_max_size": 12}  # fmt: skip
UNET = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
BOTH = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
SD1 = {**UNET, "down_block_types": BOTH["down_block_types"][::-1], "up_block_types": BOTH["up_block_types"][::-1],
       "cross_attention_dim": 24, "attention_head_dim": 8}  # fmt: skip
SDXL = {**UNET, **BOTH, "cross_attention_dim": 40, "attention_head_dim": (2, 4), "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80}  # fmt: skip
FAMILIES = {
    "sd3": (SD3Transformer2DModel, DIT, {}),
    "sd3.5_medium": (SD3Transformer2DModel, {**DIT, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, {}),
    "sd3.5_large": (SD3Transformer2DModel, {**DIT, "qk_norm": "rms_norm"}, {}),
    "sd1.5": (UNet2DConditionModel, SD1, {"num_heads": 8, "norm_groups": 8}),
    "sdxl": (UNet2DConditionModel, SDXL, {"head_dim": 16, "norm_groups": 8}),
}


def reference(family):
    """A network of diffusers with every tensor filled, and what its original layout does not tell."""
    cls, config, overrides = FAMILIES[family]
    network = cls(**config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.05)
    return network, overrides


def original(family, network):
    """The network's tensors under the releases' names, which diffusers' converter turns back exactly."""
    theirs = network.state_dict()
    if family.startswith("sd3"):
        state = sd3.from_diffusers(theirs)
        again = convert_sd3_transformer_checkpoint_to_diffusers({PREFIX + key: t for key, t in state.items()})
    else:
        fields = unet_keys.infer_fields({key: tuple(t.shape) for key, t in theirs.items()}, "diffusers")
        state = unet_keys.from_diffusers(theirs, model_config("unet", head_dim=1, norm_groups=8, **fields))
        again = convert_ldm_unet_checkpoint({PREFIX + key: t for key, t in state.items()}, dict(network.config))
    assert again.keys() == theirs.keys()
    assert all(torch.equal(again[key], theirs[key]) for key in theirs)
    return state


@torch.no_grad()
def agree(network, denoiser, tolerance=2e-5):
    """Both give the same on images that are not square; the reference's output is not nearly zero."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    config, timestep = denoiser.config, torch.tensor([3.25, 998.0])
    latents, context = draw(2, config.in_channels, 8, 12), draw(2, 7, config.context_dim)
    if config.name == "mmdit":
        conditioning = Conditioning(context, draw(2, config.pooled_dim))
        expected = network(latents, context, conditioning.pooled, timestep).sample
    elif config.pooled_dim is None:
        conditioning = Conditioning(context)
        expected = network(latents, timestep, context).sample
    else:
        text, sizes = draw(2, 32), torch.tensor([[64.0, 96, 0, 0, 64, 96], [32, 32, 4, 8, 64, 64]])
        embedded = network.add_time_proj(sizes.flatten()).reshape(2, -1)
        conditioning = Conditioning(context, torch.cat([text, embedded], dim=1))
        expected = network(
            latents, timestep, context, added_cond_kwargs={"text_embeds": text, "time_ids": sizes}
        ).sample
    assert expected.std() > 0.05
    torch.testing.assert_close(denoiser(latents, timestep, conditioning), expected, rtol=0, atol=tolerance)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("prefix", [PREFIX, "", "net."])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_gives_the_numbers_of_diffusers(family, prefix, tmp_path):
    network, overrides = reference(family)
    write_weights({prefix + k: t for k, t in original(family, network).items()}, tmp_path / "m.safetensors")
    denoiser = load_denoiser(tmp_path / "m.safetensors", **overrides)
    assert not denoiser.training
    agree(network, denoiser)
    agree(network, load_denoiser(tmp_path / "m.safetensors", prefix, **overrides))
    assert detect(open_weights(tmp_path / "m.safetensors")).family == family


@pytest.mark.parametrize("shard_size", ["10GB", "100KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_diffusers_gives_the_numbers_of_diffusers_without_being_told_anything(family, shard_size, tmp_path):
    network, _ = reference(family)
    folder = tmp_path / ("transformer" if family.startswith("sd3") else "unet")
    network.save_pretrained(folder, max_shard_size=shard_size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard_size == "100KB")
    agree(network, load_denoiser(folder))
    (tmp_path / "model_index.json").write_text("{}")
    write_weights({"decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    agree(network, load_denoiser(tmp_path))
    assert detect(open_weights(folder)).family == family


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_read_back_bit_for_bit(family, layout, tmp_path):
    network, _ = reference(family)
    network.save_pretrained(tmp_path / "theirs")
    denoiser = load_denoiser(tmp_path / "theirs")
    for name in ("folder", "file.safetensors"):
        save_denoiser(denoiser, tmp_path / name, layout, shard_size="100KB" if name == "folder" else None)
        again = load_denoiser(tmp_path / name)
        assert same(again, denoiser)
        assert again.config == denoiser.config
    if layout == "diffusers":
        back, info = type(network).from_pretrained(tmp_path / "folder", output_loading_info=True)
        assert not any(info.values()), info
        assert same(back, network)
        agree(back.eval(), denoiser)
    else:
        assert set(open_weights(tmp_path / "file.safetensors")) == {PREFIX + k for k in original(family, network)}


def test_an_all_in_one_file_gives_its_denoiser_and_names_its_parts(tmp_path):
    network, _ = reference("sd3")
    state = {PREFIX + k: t for k, t in original("sd3", network).items()}
    others = {
        "vae": "first_stage_model.decoder.conv_in.weight",
        "clip_l": "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight",
        "clip_g": "text_encoders.clip_g.transformer.text_projection.weight",
        "t5": "text_encoders.t5xxl.transformer.shared.weight",
    }
    state |= {key: torch.zeros(1) for key in others.values()}
    write_weights({**state, "loss.logvar": torch.zeros(1), "odd": torch.zeros(1)}, tmp_path / "m.safetensors")
    agree(network, load_denoiser(tmp_path / "m.safetensors"))
    detected = detect(open_weights(tmp_path / "m.safetensors"))
    assert {name: part.keys for name, part in detected.parts.items() if name in others} == {
        name: (key,) for name, key in others.items()
    }
    assert (detected.leftovers, detected.unknown) == (("loss.logvar",), ("odd",))


def test_the_position_table_is_the_files_own():
    """Guards the guard: the table in these files is not what either library would compute."""
    network, _ = reference("sd3")
    fresh = SD3Transformer2DModel(**DIT)
    assert (network.pos_embed.pos_embed - fresh.pos_embed.pos_embed).abs().mean() > 0.03


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_cast_on_their_way_and_fp8_becomes_bf16(stored, wanted, tmp_path):
    network, _ = reference("sd3.5_medium")
    state = original("sd3.5_medium", network)
    write_weights(state, tmp_path / "m.safetensors", dtype=stored)
    loaded = load_denoiser(tmp_path / "m.safetensors", dtype=wanted).state_dict()
    expected = wanted or (torch.bfloat16 if stored is torch.float8_e4m3fn else stored)
    assert {tensor.dtype for tensor in loaded.values()} == {expected}
    assert all(torch.equal(loaded[key], state[key].to(stored).to(expected)) for key in state)
    with pytest.raises(WeightsError, match="cannot run in"):
        load_denoiser(tmp_path / "m.safetensors", dtype=torch.float8_e4m3fn)


def test_fp8_weights_from_a_diffusers_folder_are_joined_and_swapped(tmp_path):
    network, _ = reference("sd3.5_large")
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    write_weights(network.state_dict(), file, dtype=torch.float8_e4m3fn)
    expected = original("sd3.5_large", network)
    for key, tensor in load_denoiser(file, dtype=torch.float32).state_dict().items():
        assert torch.equal(tensor, expected[key].to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize(("name", "preset"), [("mmdit", "tiny"), ("unet", "tiny"), ("unet", "S"), ("crossdit", "tiny")])
def test_our_own_networks_are_saved_with_their_config_or_refused(name, preset, layout, tmp_path):
    widths = {"in_channels": 4, "out_channels": 4, "context_dim": 24, "pooled_dim": 20}
    small = {"depth": 2} if name != "unet" else {"model_channels": 32, "head_dim": 16, "norm_groups": 4}
    config = model_config(name, preset, **{**widths, **small})
    denoiser = build_denoiser(config)
    if layout == "diffusers" and name != "mmdit":
        with pytest.raises(ValueError, match="layout='original'"):
            save_denoiser(denoiser, tmp_path / "out", layout)
        assert not (tmp_path / "out").exists()
        return
    save_denoiser(denoiser, tmp_path / "out", layout)
    again = load_denoiser(tmp_path / "out")
    assert same(again, denoiser)
    assert again.config == config.model_copy(update={"preset": None})


def test_a_unet_of_ours_with_a_plain_pooled_vector_runs_in_diffusers(tmp_path):
    fields = {"context_dim": 24, "pooled_dim": 20, "model_channels": 32, "ff_mult": 4.0, "head_dim": 8}
    denoiser = build_denoiser(
        model_config("unet", "tiny", in_channels=4, out_channels=4, norm_groups=4, **fields)
    ).eval()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.05)
    save_denoiser(denoiser, tmp_path, "diffusers")
    theirs = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    latents, context, pooled = torch.randn(2, 4, 8, 12), torch.randn(2, 7, 24), torch.randn(2, 20)
    timestep = torch.tensor([3.0, 700.0])
    with torch.no_grad():
        expected = theirs(latents, timestep, context, class_labels=pooled).sample
        actual = denoiser(latents, timestep, Conditioning(context, pooled))
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


def test_heads_of_no_released_unet_are_taken_by_rule_with_a_warning_or_asked_for(tmp_path, caplog):
    network, _ = reference("sd1.5")
    write_weights(original("sd1.5", network), tmp_path / "m.safetensors")
    agree(network, load_denoiser(tmp_path / "m.safetensors", norm_groups=8))
    assert "num_heads=8" in caplog.text
    write_weights(original("sdxl", reference("sdxl")[0]), tmp_path / "xl.safetensors")
    assert load_denoiser(tmp_path / "xl.safetensors", norm_groups=8).config.head_dim == 64
    network = SD3Transformer2DModel(**{**DIT, "num_attention_heads": 4, "attention_head_dim": 8,
                                       "caption_projection_dim": 32}).eval()  # fmt: skip
    write_weights(sd3.from_diffusers(network.state_dict()), tmp_path / "narrow.safetensors")
    with pytest.raises(WeightsError, match="pass num_heads= or head_dim="):
        load_denoiser(tmp_path / "narrow.safetensors")
    for given in ({"num_heads": 4}, {"head_dim": 8}):
        assert load_denoiser(tmp_path / "narrow.safetensors", **given).config.num_heads == 4
    with pytest.raises(WeightsError, match="does not divide"):
        load_denoiser(tmp_path / "narrow.safetensors", head_dim=5)
    with pytest.raises(ValueError, match="num_heads"):
        load_denoiser(tmp_path / "narrow.safetensors", num_hads=4)


def test_what_was_distilled_is_told_by_its_name_alone(tmp_path):
    state = original("sd3.5_large", reference("sd3.5_large")[0])
    for name, family in (("sd3.5_large", "sd3.5_large"), ("sd3.5_large_turbo", "sd3.5_large_turbo")):
        write_weights(state, tmp_path / f"{name}.safetensors")
        assert detect(open_weights(tmp_path / f"{name}.safetensors")).family == family


def edited(tmp_path, change, family="sd3"):
    state = {PREFIX + k: t for k, t in original(family, reference(family)[0]).items()}
    change(state)
    write_weights(state, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def drop(*parts):
    def change(state):
        for key in [key for key in state if any(part in key for part in parts)]:
            del state[key]

    return change


def test_keys_that_do_not_fit_are_counted_named_and_explained(tmp_path):
    with pytest.raises(WeightsError, match=r"1 missing: model\.diffusion_model\.pos_embed\. Likely cause: the file is"):
        load_denoiser(edited(tmp_path, drop("pos_embed")))
    with pytest.raises(WeightsError, match=r"1 missing: model.diffusion_model.x_embedder.proj.weight\."):
        load_denoiser(edited(tmp_path, drop("x_embedder.proj.weight")))
    with pytest.raises(WeightsError, match=r"20 missing: (\S+ ){10}and 10 more.*sharded set"):
        load_denoiser(edited(tmp_path, drop("joint_blocks.1")))
    with pytest.raises(WeightsError, match=r"1 unexpected: model\.diffusion_model\.extra\."):
        load_denoiser(edited(tmp_path, lambda state: state.update({PREFIX + "extra": torch.zeros(1)})))
    key = PREFIX + "joint_blocks.1.x_block.mlp.fc2.bias"
    with pytest.raises(WeightsError, match=rf"1 of another shape: {key} is \[3\], expected \[128\]"):
        load_denoiser(edited(tmp_path, lambda state: state.update({key: torch.zeros(3)})))
    with pytest.raises(WeightsError, match=r"patch_size.* contradict the file"):
        load_denoiser(edited(tmp_path, lambda state: None), patch_size=4)


CAUSES = {
    "lora": ({"transformer.transformer_blocks.0.attn.to_k.lora_A.weight": (4, 8)}, "it is a LoRA"),
    "kohya lora": ({"lora_unet_down_blocks_0_attentions_0.lora_down.weight": (4, 8)}, "it is a LoRA"),
    "controlnet": ({"down_blocks.0.resnets.0.time_emb_proj.weight": (8, 8), "controlnet_mid_block.weight": (8, 8)},
                   "it is a ControlNet"),
    "old controlnet": ({"control_model.input_blocks.0.0.weight": (8, 4, 3, 3)}, "it is a ControlNet"),
    "sd3 controlnet": ({"transformer_blocks.0.norm1_context.linear.weight": (8, 8), "controlnet_blocks.0.bias": (8,)},
                       "it is a ControlNet"),
    "ema": ({"model_ema.diffusion_modelinput_blocks00weight": (8, 4, 3, 3)}, "EMA's copy alone"),
    "vae": ({"first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3)}, "it holds vae; the denoiser is in another"),
    "bare vae": ({"decoder.conv_in.weight": (8, 4, 3, 3)}, "it holds vae"),
    "vae of diffusers": ({"decoder.conv_in.weight": (8, 4, 3, 3), "encoder.down_blocks.0.resnets.0.norm1.bias": (8,),
                          "decoder.up_blocks.0.resnets.0.norm1.bias": (8,)}, "it holds vae"),
    "text": ({"text_model.embeddings.token_embedding.weight": (9, 768)}, "it holds clip_l"),
    "flux": ({"double_blocks.0.img_attn.qkv.weight": (24, 8)}, "another family"),
    "second shard": ({"joint_blocks.20.x_block.attn.qkv.weight": (24, 8)}, "part of a sharded set"),
    "nothing known": ({"weight": (2,)}, "no known network, the first is 'weight'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSES)
def test_a_file_without_a_denoiser_is_recognised_for_what_it_is(name, tmp_path):
    shapes, words = CAUSES[name]
    write_weights({key: torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "m.safetensors")
    with pytest.raises(WeightsError, match="holds no denoiser") as caught:
        load_denoiser(tmp_path / "m.safetensors")
    assert words in str(caught.value)


def test_a_wrong_prefix_is_refused_with_the_right_one(tmp_path):
    with pytest.raises(WeightsError, match=r"no denoiser under the prefix 'net\.'; it has one under 'model\.diff"):
        load_denoiser(edited(tmp_path, lambda state: None), "net.")


def test_half_of_a_file_is_told_from_a_whole_smaller_network(tmp_path):
    with pytest.raises(WeightsError, match="part of a sharded set"):
        load_denoiser(edited(tmp_path, drop("joint_blocks.2", "final_layer")))


def test_scaled_fp8_is_refused_before_anything_is_read(tmp_path):
    def scale(state):
        key = PREFIX + "joint_blocks.1.x_block.mlp.fc1"
        state[f"{key}.weight"] = state[f"{key}.weight"].to(torch.float8_e4m3fn)
        state[f"{key}.scale_weight"] = torch.ones(())

    with pytest.raises(WeightsError, match="scaled fp8"):
        load_denoiser(edited(tmp_path, scale))


def test_a_config_json_that_asks_for_another_network_is_refused(tmp_path):
    network, _ = reference("sd1.5")
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "flip_sin_to_cos": False}))
    with pytest.raises(WeightsError, match="flip_sin_to_cos=False"):
        load_denoiser(tmp_path)


def test_saving_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'diffusers'"):
        save_denoiser(build_denoiser(model_config("mmdit", "tiny", depth=1)), tmp_path, "diffuser")
    with pytest.raises(ValueError, match="without wrappers"):
        save_denoiser(torch.nn.Linear(2, 2), tmp_path)


MEMORY = """
import re, sys, torch
from pathlib import Path
import mmdit.weights.denoiser  # imports, before the baseline

def peak():  # of this process alone; ru_maxrss begins with its parent's
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak()
denoiser = mmdit.weights.denoiser.load_denoiser(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
print((peak() - before) / sum(tensor.nbytes for tensor in denoiser.state_dict().values()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux' /proc")
@pytest.mark.parametrize(
    ("layout", "stored", "wanted"), [("original", "float16", "float16"), ("diffusers", "float32", "bfloat16")]
)
def test_loading_takes_little_more_memory_than_the_weights(layout, stored, wanted, tmp_path):
    fields = {"depth": 2, "width": 1024, "num_heads": 16, "context_dim": 64, "pos_embed_max_size": 32}
    with torch.device("meta"):
        denoiser = build_denoiser(model_config("mmdit", **fields))
    denoiser = denoiser.to(getattr(torch, stored)).to_empty(device="cpu")
    save_denoiser(denoiser, tmp_path / "m", layout)
    code = [sys.executable, "-c", MEMORY, str(tmp_path / "m"), wanted]
    ratio = float(subprocess.run(code, capture_output=True, text=True, check=True).stdout)
    assert 0.9 < ratio < 1.15


def test_a_run_of_ours_loads_by_folder_by_checkpoint_and_by_file(micro, tmp_path):
    config = micro()
    raw, average = build_denoiser(config.model), build_denoiser(config.model)
    tensors = {"model": raw.state_dict(), "ema": average.state_dict()}
    checkpoint = save_checkpoint(tmp_path / "run", 48, tensors, {}, config)
    for path in (tmp_path / "run", checkpoint, checkpoint / "ema.safetensors"):
        loaded = load_denoiser(path)
        assert loaded.config == config.model.model_copy(update={"preset": None})
        assert same(loaded, average)
    assert same(load_denoiser(checkpoint / "model.safetensors"), raw)
    damaged = bytearray((checkpoint / "ema.safetensors").read_bytes())
    damaged[-1] ^= 1
    (checkpoint / "ema.safetensors").write_bytes(damaged)
    with pytest.raises(CheckpointError, match="has changed"):
        load_denoiser(checkpoint)


def test_the_average_of_a_run_sharded_over_processes_is_put_together(micro, tmp_path):
    config = micro()
    average = build_denoiser(config.model)
    checkpoint = save_checkpoint(tmp_path / "run", 48, {"ema": average.state_dict()}, {}, config)
    (checkpoint / "ema.safetensors").unlink()
    (checkpoint / "ema").mkdir()
    for part in range(2):  # as torch.distributed.checkpoint writes them
        halves = {key: tensor.chunk(2) for key, tensor in average.state_dict().items()}
        pieces = {key: both[part].contiguous() for key, both in halves.items() if part < len(both)}
        starts = {key: [part * len(halves[key][0])] + [0] * (tensor.ndim - 1) for key, tensor in pieces.items()}
        places = json.dumps({key: {"saved_offsets": start} for key, start in starts.items()})
        save_file(pieces, checkpoint / "ema" / f"shard-{part}.safetensors", metadata={"DCP_SHARDING_INFO": places})
    files = [file for file in checkpoint.rglob("*") if file.is_file() and file.name != MANIFEST]
    table = {file.relative_to(checkpoint).as_posix(): fingerprint(file) for file in files}
    (checkpoint / MANIFEST).write_text(manifest_text(table))
    assert same(load_denoiser(tmp_path / "run"), average)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mmdit", {"weight_sets": 1}),
        ("crossdit", {"injection": "pooled"}),
        ("unet", {"injection": "joint", "weight_sets": 2}),
    ],
)
def test_networks_that_no_release_has_keep_their_injection(name, fields, tmp_path):
    widths = {"in_channels": 4, "out_channels": 4, "context_dim": 24, "pooled_dim": 20}
    small = {"depth": 2} if name != "unet" else {"model_channels": 32, "head_dim": 16, "norm_groups": 4, "ff_mult": 4}
    denoiser = build_denoiser(model_config(name, "tiny", **{**widths, **small, **fields}))
    save_denoiser(denoiser, tmp_path / "m.safetensors")
    again = load_denoiser(tmp_path / "m.safetensors")
    assert same(again, denoiser)
    assert again.config == denoiser.config.model_copy(update={"preset": None})
    with pytest.raises(ValueError, match="layout='original'"):
        save_denoiser(denoiser, tmp_path / "folder", "diffusers")
