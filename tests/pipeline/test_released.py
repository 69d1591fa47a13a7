"""Released weights: every part is found or missed by name, memory is told beforehand, the command line works."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit.pipeline import Sizes, TextToImage, sample_to_folder
from mmdit.pipeline.folder import parse_pair, parse_text
from mmdit.pipeline.memory import plan_memory
from mmdit.pipeline.prompts import cut_words
from mmdit.pipeline.released import choose_dtypes
from mmdit.pipeline.sources import find_sources, is_released

CPU = torch.device("cpu")
LONG = " ".join(f"word{i}" for i in range(60))


@pytest.fixture(scope="module")
def sd3(tiny_release):
    return TextToImage.load(tiny_release("sd3").folder, dtype="fp32", device="cpu")


def test_a_denoiser_alone_says_which_file_has_the_vae(single_file):
    path, overrides = single_file("sd3", ("denoiser",))
    with pytest.raises(ValueError, match=r"SD3 medium needs the VAE, which .* Give vae= \(--vae\) .*sd3_medium"):
        TextToImage.load(path, device="cpu", overrides=overrides)


def test_missing_text_encoders_are_named_with_their_files_and_t5_may_stay_away(single_file, tiny_release, caplog):
    path, overrides = single_file("sd3", ("denoiser", "vae", "clip_l"))
    with pytest.raises(ValueError, match=r"text encoders clip_g, .*clip_g\.safetensors \(t5 may be left out\)"):
        TextToImage.load(path, device="cpu", overrides=overrides)
    path, overrides = single_file("sd3", ("denoiser", "vae", "clip_l", "clip_g"))
    with caplog.at_level(logging.WARNING):
        sources = TextToImage.load(path, device="cpu", overrides=overrides | {"t5": {"d_model": 128}})
    assert "SD3 medium without t5: its tokens are zeros" in caplog.text
    assert sources.provenance["text_encoders"] == ["clip_l", "clip_g"]
    path, overrides = single_file("sdxl", ("denoiser", "vae", "clip_l"))
    with pytest.raises(ValueError, match=r"Stable Diffusion XL base needs the text encoders clip_g"):
        TextToImage.load(path, device="cpu", overrides=overrides)


def test_parts_may_come_from_several_places_or_be_loaded_already(tiny_release, single_file, sd3):
    path, _ = single_file("sd3", ("denoiser",))
    folder = tiny_release("sd3").folder
    options = {"seed": 3, "size": 64, "num_steps": 1}
    expected = sd3(["a star"], **options)
    assembled = TextToImage.load(path, vae=folder, text=folder, device="cpu")
    assert np.array_equal(assembled(["a star"], **options), expected)
    shared = TextToImage.load(path, vae=sd3.vae, text=sd3.text, device="cpu")
    assert shared.text is sd3.text
    assert np.array_equal(shared(["a star"], **options), expected)


def test_what_is_a_run_and_what_is_released(tiny_release, tmp_path):
    assert is_released(tiny_release("sd3").folder)
    assert is_released(tmp_path / "not_there.safetensors")
    assert is_released("model.ckpt")
    assert not is_released(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"not_there\.safetensors"):
        TextToImage.load(tmp_path / "not_there.safetensors")
    with pytest.raises(ValueError, match="family, dtype: only with released weights"):
        TextToImage.load(tmp_path, family="sd3", dtype="bf16")


def test_the_family_decides_and_can_be_said(tiny_release):
    assert find_sources(tiny_release("sdxl").folder).release.name == "sdxl"
    folder = tiny_release("sd3").folder
    assert find_sources(folder, family="sd3.5_large_turbo").release.sampling.num_steps == 4
    with pytest.raises(ValueError, match=r"did you mean 'sd3\.5_medium'"):
        find_sources(folder, family="sd3.5_medum")


def test_a_denoiser_for_other_channels_is_refused(single_file, tiny_release):
    path, overrides = single_file("sd1.5", ("denoiser",))
    with pytest.raises(ValueError, match=r"reads 4 channels and gives 4; the VAE has 16\. A model for inpainting"):
        find_sources(path, vae=tiny_release("sd3").folder, overrides=overrides)


def test_sizes_beyond_the_position_table_are_refused_with_the_largest(sd3):
    assert (sd3.grain, sd3.largest) == (16, 12 * 16)
    with pytest.raises(ValueError, match="208x64 exceeds the denoiser's table of positions: at most 192x192 pixels"):
        sd3(["a star"], size=(208, 64))
    with pytest.raises(ValueError, match="nearest is 64x96"):
        sd3(["a star"], size=(64, 100))


def test_what_a_family_does_not_have_is_refused(sd3):
    with pytest.raises(ValueError, match="read by SDXL alone"):
        sd3(["a star"], size=64, sizes=Sizes((64, 64)))
    with pytest.raises(ValueError, match="SD3 medium has no skip-layer guidance of its own"):
        sd3(["a star"], size=64, skip_layer=True)


def test_cut_words_are_named_once(sd3, caplog):
    cut = cut_words(sd3.text, LONG)
    assert set(cut) == {"clip_l", "clip_g", "t5"}
    kept = LONG.removesuffix(cut["clip_l"]).split()
    ids = sd3.text.tokenizers["clip_l"]([" ".join(kept)])[0]
    assert len(ids) <= 77
    assert len(sd3.text.tokenizers["clip_l"]([" ".join([*kept, cut["clip_l"].split()[0]])])[0]) == 77
    assert cut_words(sd3.text, "a star") == {}
    with caplog.at_level(logging.WARNING):
        sd3([LONG, "a star"], size=64, num_steps=1)
        sd3([LONG + " more"], size=64, num_steps=1)
    assert len(caplog.records) == 1
    assert f"clip_l does not read {cut['clip_l']!r}" in caplog.text


def test_an_image_is_the_same_alone_and_in_a_batch(sd3):
    prompts = ["a star", "a red circle", "two stars"]
    together = sd3(prompts, seed=5, size=64, num_steps=2, batch_size=3)
    apart = sd3(prompts[1:2], seed=5, indices=[1], size=64, num_steps=2)
    assert np.abs(together[1].astype(int) - apart[0]).max() <= 1
    assert np.abs(together - sd3(prompts, seed=5, size=64, num_steps=2).astype(int)).max() <= 1


def test_sdxl_reads_an_empty_negative_prompt_as_none_and_a_written_one_as_text(tiny_release):
    pipeline = TextToImage.load(tiny_release("sdxl").folder, dtype="fp32", device="cpu")
    told = torch.tensor([[64, 64, 0, 0, 64, 64]])
    nothing, empty, written = (pipeline.encode_null([n], told) for n in (None, "", "blurry"))
    assert torch.equal(nothing.context, empty.context)
    assert not nothing.context.any()
    assert not nothing.pooled[:, :64].any()
    assert nothing.pooled[:, 64:].any()  # the sizes are no text
    assert written.context.any()


def test_half_precision_draws_nearly_the_same(tiny_release, sd3):
    options = {"seed": 3, "size": 64, "num_steps": 2}
    half = TextToImage.load(tiny_release("sd3").folder, dtype="bf16", device="cpu")
    assert half.dtype == torch.bfloat16
    assert half.vae.decoder.conv_in.weight.dtype == torch.bfloat16
    difference = half(["a star"], **options).astype(int) - sd3(["a star"], **options)
    assert np.abs(difference).mean() < 4


def test_memory_is_planned_from_headers_and_is_what_is_loaded(tiny_release, sd3):
    sources = find_sources(tiny_release("sd3").folder)
    plan = plan_memory(sources, choose_dtypes(sources, "bf16", CPU))
    counted = {part.name: part.parameters for part in plan.parts}
    held = sum(p.numel() for p in [*sd3.denoiser.parameters(), *sd3.denoiser.buffers()])
    assert counted["denoiser"] == held
    assert counted["vae"] == sum(p.numel() for p in sd3.vae.parameters())
    assert counted["clip_g"] == sum(p.numel() for p in sd3.text.towers["clip_g"].module.parameters())
    assert plan.other_bytes == 2 * (counted["denoiser"] + counted["vae"])
    assert plan.peak("none") == plan.text_bytes + plan.other_bytes
    assert plan.peak("blocks") < plan.peak("encoders") < plan.peak("none")
    assert "encoders" in plan.table("encoders")


def test_fp16_keeps_the_vae_in_fp32(tiny_release):
    dtypes = choose_dtypes(find_sources(tiny_release("sdxl").folder), "fp16", CPU)
    assert (dtypes["denoiser"], dtypes["vae"]) == (torch.float16, torch.float32)
    with pytest.raises(ValueError, match="did you mean 'bf16'"):
        choose_dtypes(find_sources(tiny_release("sdxl").folder), "bff16", CPU)


def test_the_command_line_draws_with_released_weights(tiny_release, tmp_path, capsys):
    folder, out = str(tiny_release("sd3").folder), tmp_path / "out"
    prompts = ["a red circle", "a star"]
    common = {"weights": folder, "device": "cpu", "steps": 2, "size": "64x96", "seed": 3}
    assert sample_to_folder(None, prompts, negative="blurry", out=out, offload="encoders", **common) == 0
    assert sorted(p.name for p in out.iterdir()) == ["00000.png", "00001.png", "grid.png"]
    with Image.open(out / "00001.png") as picture:
        assert picture.size == (96, 64)
        notes = picture.text
    assert (notes["prompt"], notes["negative_prompt"], notes["release"]) == ("a star", "blurry", "sd3")
    assert json.loads(notes["num_steps"]) == 2
    assert json.loads(notes["guidance_scale"]) == 5.0
    assert len(notes["weights_header_sha256"]) == 64
    assert sample_to_folder(None, [], dry_run=True, **common) == 0
    told = capsys.readouterr().out
    assert "SD3 medium" in told
    assert "clip_g" in told
    assert "<- this run" in told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"weights": "ema"}, "nothing to draw with"),
        ({"weights": "no/such.safetensors"}, "no/such.safetensors"),
        ({"size": "64by96"}, "HEIGHTxWIDTH such as 768x1344, got '64by96'"),
        ({"size": "1024"}, "at most 192x192 pixels"),
        ({"offload": "blocks"}, "both are the same memory"),
        ({"text": ("a", "b")}, "--text is one path"),
        ({"crop": "8x8", "size": 64}, "read by SDXL alone"),
    ],
)
def test_wrong_command_lines_are_exit_2_in_words(tiny_release, tmp_path, capsys, options, told):
    given = {"weights": str(tiny_release("sd3").folder), "device": "cpu", "out": tmp_path / "out"} | options
    assert sample_to_folder(None, ["a star"], **given) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_pairs_and_text_paths_are_read():
    assert [parse_pair(v, "size") for v in (None, 64, "64", "64x96")] == [None, 64, 64, (64, 96)]
    assert parse_text(("folder",)) == "folder"
    assert parse_text(("clip_l=a", "t5=b=c")) == {"clip_l": "a", "t5": "b=c"}
