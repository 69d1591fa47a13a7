"""Conversion keeps every bit, there and back; the table of a file says what is in it and what is wrong."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from mmdit import load_denoiser, save_denoiser
from mmdit.config import VAEConfig
from mmdit.encoders.vae import AutoencoderKL, load_vae, save_vae
from mmdit.weights import sd3
from mmdit.weights.convert import DTYPES, convert
from mmdit.weights.files import WeightsError, open_weights
from mmdit.weights.inspect import inspect_weights
from mmdit.weights.writing import write_weights

ROOT = Path(__file__).resolve().parents[2]


def transformer():
    """A small SD3.5-medium of diffusers with random weights, its position table included."""
    network = SD3Transformer2DModel(
        sample_size=8, num_layers=3, num_attention_heads=2, attention_head_dim=64, in_channels=16,
        caption_projection_dim=128, joint_attention_dim=24, pooled_projection_dim=20, pos_embed_max_size=12,
        qk_norm="rms_norm", dual_attention_layers=(0, 1),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return network


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A whole file in the original layout: denoiser fp16 with one tensor in fp32, and a VAE."""
    file = tmp_path_factory.mktemp("release") / "sd3.5_medium.safetensors"
    denoiser = {sd3.PREFIX + key: t.half() for key, t in sd3.from_diffusers(transformer().state_dict()).items()}
    denoiser[sd3.PREFIX + "pos_embed"] = denoiser[sd3.PREFIX + "pos_embed"].float()
    vae = AutoencoderKL(VAEConfig(block_channels=(32, 32), num_res_blocks=1)).state_dict()
    write_weights(
        {**denoiser, **{f"first_stage_model.{key}": tensor.half() for key, tensor in vae.items()}},
        file,
        metadata={"modelspec.title": "mine"},
    )
    return file


def equal(a, b, keys=None):
    """Every tensor of both has the same name, dtype and bits."""
    a, b = open_weights(a), open_weights(b)
    keys = set(a) if keys is None else keys
    same = [a.dtype(key) == b.dtype(key) and torch.equal(a.read(key), b.read(key)) for key in keys]
    return keys == set(b) and all(same)


@pytest.mark.parametrize("shard_size", [None, "100KB"])
def test_a_denoiser_keeps_every_bit_there_and_back(release, shard_size, tmp_path):
    convert(release, tmp_path / "there", "diffusers", shard_size=shard_size)
    assert (len(list((tmp_path / "there").glob("*.safetensors"))) > 1) == (shard_size is not None)
    convert(tmp_path / "there", tmp_path / "back.safetensors", "original")
    denoiser = {key for key in open_weights(release) if key.startswith(sd3.PREFIX)}
    assert equal(release, tmp_path / "back.safetensors", denoiser)
    assert open_weights(tmp_path / "back.safetensors").metadata["modelspec.title"] == "mine"
    assert open_weights(tmp_path / "there").dtype("pos_embed.pos_embed") == torch.float32
    theirs = SD3Transformer2DModel.from_pretrained(tmp_path / "there", torch_dtype=torch.float32).state_dict()
    expected = transformer().half().state_dict()
    assert all(torch.equal(theirs[key], expected[key].float()) for key in expected if key != "pos_embed.pos_embed")


@pytest.mark.parametrize("name", DTYPES)
def test_a_denoiser_is_cast_as_torch_casts(release, name, tmp_path):
    convert(release, tmp_path / "cast", "diffusers", dtype=DTYPES[name])
    files, whole = open_weights(tmp_path / "cast"), open_weights(release)
    assert {files.dtype(key) for key in files} == {DTYPES[name]}
    table = whole.read(sd3.PREFIX + "final_layer.adaLN_modulation.1.weight").to(DTYPES[name])
    expected = sd3.swap_halves(table.float())
    assert torch.equal(files.read("norm_out.linear.weight").float(), expected)


def test_a_unet_keeps_every_bit_there_and_back(tmp_path):
    network = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=40,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
    )  # fmt: skip
    network.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "there.safetensors", "original")
    convert(tmp_path / "there.safetensors", tmp_path / "back", "diffusers")
    assert equal(tmp_path / "theirs", tmp_path / "back")
    again, first = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("back", "theirs"))
    for field in (
        "addition_embed_type",
        "addition_time_embed_dim",
        "transformer_layers_per_block",
        "attention_head_dim",
    ):
        assert again[field] == first[field]


def test_a_vae_and_all_parts_are_converted(release, tmp_path):
    convert(release, tmp_path / "vae", "diffusers", part="vae")
    save_vae(load_vae(release, dtype=torch.float16), tmp_path / "expected", "diffusers")
    assert equal(tmp_path / "vae", tmp_path / "expected")
    convert(release, tmp_path / "all", "diffusers", part="all")
    assert sorted(folder.name for folder in (tmp_path / "all").iterdir()) == ["transformer", "vae"]
    assert equal(tmp_path / "all" / "vae", tmp_path / "expected")
    convert(tmp_path / "all", tmp_path / "again.safetensors", "original", part="all")
    assert equal(release, tmp_path / "again.safetensors")
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["again.safetensors"]


def test_a_file_is_not_written_over_itself_and_nothing_is_left_of_a_failure(release, tmp_path):
    with pytest.raises(WeightsError, match="another path"):
        convert(release, release, "original")
    (tmp_path / "bad.safetensors").write_text("<html>")
    with pytest.raises(WeightsError, match="web page"):
        convert(tmp_path / "bad.safetensors", tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


def test_the_table_names_parts_dtypes_and_faults(release, tmp_path):
    table = inspect_weights(release)
    denoiser, vae = table.rows
    assert table.family == "sd3.5_medium"
    assert (denoiser.name, denoiser.where, denoiser.kind) == ("denoiser", sd3.PREFIX, "original mmdit")
    assert denoiser.parameters == sum(t.numel() for t in transformer().state_dict().values())
    assert (denoiser.dtypes, denoiser.notes) == (f"fp16 x {denoiser.tensors - 1}, fp32 x 1", "complete")
    assert (vae.name, vae.dtypes) == ("vae", "fp16")
    files = open_weights(release)
    state = {key: files.read(key) for key in files if "fc2.bias" not in key}
    write_weights({**state, "odd": torch.zeros(1), f"{sd3.PREFIX}more": torch.zeros(1)}, tmp_path / "m.safetensors")
    broken = inspect_weights(tmp_path / "m.safetensors")
    assert "5 missing: " in broken.rows[0].notes
    assert f"1 unexpected: {sd3.PREFIX}more" in broken.rows[0].notes
    assert (broken.rows[-1].name, broken.rows[-1].notes) == ("not known", "odd")


def test_the_table_names_faults_of_vae_and_text_encoders(release, tmp_path):
    from tests.weights.tiny_text import build, original

    vae = {key: torch.zeros(open_weights(release).shape(key)) for key in open_weights(release) if "first_stage" in key}
    text = {key: tensor for key, tensor in original("sdxl", build("sdxl")).items() if key.startswith("conditioner.")}
    write_weights({**vae, **text}, tmp_path / "m.safetensors")
    assert {row.name: row.notes for row in inspect_weights(tmp_path / "m.safetensors").rows} == {
        "vae": "complete", "clip_l": "complete", "clip_g": "complete"
    }  # fmt: skip
    del vae["first_stage_model.decoder.norm_out.bias"]
    first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
    del text[f"{second}transformer.resblocks.1.attn.in_proj_bias"]
    text |= {f"{first}odd": torch.zeros(1), f"{first}text_model.final_layer_norm.bias": torch.zeros(3)}
    write_weights({**vae, **text}, tmp_path / "m.safetensors")
    notes = {row.name: row.notes for row in inspect_weights(tmp_path / "m.safetensors").rows}
    assert notes["vae"] == "1 missing: decoder.norm_out.bias"
    assert notes["clip_l"] == "1 unexpected: odd; 1 of another shape: text_model.final_layer_norm.bias"
    assert notes["clip_g"].startswith("3 missing: text_model.encoder.layers.1.self_attn.k_proj.bias")


def run(monkeypatch, *arguments):
    """Run the script as its command line would; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "scripts" / "convert.py"), run_name="__main__")
    return left.value.code


def test_the_script_converts_inspects_and_refuses_with_exit_code_2(release, tmp_path, monkeypatch, capsys):
    options = ("--layout", "diffusers", "--dtype", "bf16", "--shard-size", "1MB")
    assert run(monkeypatch, release, tmp_path / "out", *options) == 0
    assert same_numbers(load_denoiser(tmp_path / "out"), load_denoiser(release, dtype=torch.bfloat16))
    assert str(tmp_path / "out" / "config.json") in capsys.readouterr().out
    assert run(monkeypatch, tmp_path / "out", "--inspect") == 0
    printed = capsys.readouterr().out
    assert "family: sd3.5_medium" in printed
    assert "denoiser: complete" in printed
    (tmp_path / "weights.ckpt").write_bytes(b"x")
    for arguments, words in (((tmp_path / "weights.ckpt", "--inspect"), "is a pickle"), ((release,), "give OUT")):
        assert run(monkeypatch, *arguments) == 2
        assert words in capsys.readouterr().err


def same_numbers(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[key], b[key]) for key in b)


def test_what_we_train_is_converted_like_a_release(tmp_path, release):
    save_denoiser(load_denoiser(release), tmp_path / "mine.safetensors")
    convert(tmp_path / "mine.safetensors", tmp_path / "there", "diffusers")
    assert same_numbers(load_denoiser(tmp_path / "there"), load_denoiser(release))


def test_text_encoders_are_converted_there_and_back(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    shape = {"num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 49408, "eos_token_id": 49407}
    clip_l = CLIPTextModelWithProjection(
        CLIPTextConfig(hidden_size=64, num_attention_heads=1, projection_dim=64, **shape)
    )
    clip_g = CLIPTextModelWithProjection(
        CLIPTextConfig(hidden_size=128, num_attention_heads=2, projection_dim=128, **shape)
    )
    t5 = T5EncoderModel(
        T5Config(vocab_size=99, d_model=192, d_kv=8, d_ff=32, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    )
    with torch.no_grad():
        clip_l.text_projection.weight.copy_(torch.eye(64))
    for name, model in (("text_encoder", clip_l), ("text_encoder_2", clip_g), ("text_encoder_3", t5)):
        model.half().save_pretrained(tmp_path / "theirs" / name)
    convert(tmp_path / "theirs", tmp_path / "text.safetensors", "original", part="text")
    files = open_weights(tmp_path / "text.safetensors")
    assert {key.split(".")[1] for key in files} == {"clip_l", "clip_g", "t5xxl"}
    assert {files.dtype(key) for key in files} == {torch.float16}
    convert(tmp_path / "text.safetensors", tmp_path / "back", "diffusers", part="text")
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        assert equal(tmp_path / "theirs" / name, tmp_path / "back" / name)
