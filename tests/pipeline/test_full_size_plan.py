"""The memory of the releases at their full size, told from the headers of files that hold no data (sparse files)."""

import gzip
import json
import math
import time
from pathlib import Path

import pytest
import torch

from mmdit.pipeline import sample_to_folder
from mmdit.pipeline.memory import plan_memory
from mmdit.pipeline.released import choose_dtypes
from mmdit.pipeline.sources import find_sources
from mmdit.weights.inspect import inspect_weights

KEYS = Path(__file__).parents[1] / "weights" / "keys"
PREFIXES = {
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5xxl": "text_encoders.t5xxl.transformer.",
}


def shapes_of(name):
    """Return {key: shape} of a list of keys, without the denoiser's prefix."""
    lines = gzip.decompress((KEYS / f"{name}.tsv.gz").read_bytes()).decode().splitlines()
    pairs = (line.removeprefix("model.diffusion_model.").split("\t") for line in lines)
    return {key: [int(side) for side in shape.strip("()[]").replace(",", " ").split()] for key, shape in pairs}


def sparse_file(path, shapes):
    """Write an fp16 file of these shapes that takes no room on the disk; return the bytes of its tensors."""
    header, end = {}, 0
    for key, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def sparse_release(path, names):
    """Write a whole SD3 release of full size; return the bytes of its tensors."""
    return sparse_file(
        path,
        {
            PREFIXES.get(name, "model.diffusion_model.") + key.removeprefix(PREFIXES.get(name, "-")): shape
            for name in names
            for key, shape in shapes_of(name).items()
        },
    )


def four_channels():
    """Return the shapes of SD1.5's and SDXL's VAE: SD3's with 4 latent channels and two more convolutions."""
    shapes = {key.removeprefix("first_stage_model."): shape for key, shape in shapes_of("vae").items()}
    narrow = {"encoder.conv_out.weight": [8, 512, 3, 3], "encoder.conv_out.bias": [8],
              "decoder.conv_in.weight": [512, 4, 3, 3]}  # fmt: skip
    more = {"quant_conv.weight": [8, 8, 1, 1], "quant_conv.bias": [8], "post_quant_conv.weight": [4, 4, 1, 1],
            "post_quant_conv.bias": [4]}  # fmt: skip
    return {**shapes, **narrow, **more}


def open_clip_bigg():
    """Return the shapes of SDXL's second text tower, by hand: 32 blocks of width 1280 under OpenCLIP's names."""
    width, hidden = 1280, 5120
    block = {"ln_1.weight": [width], "ln_1.bias": [width], "ln_2.weight": [width], "ln_2.bias": [width],
             "attn.in_proj_weight": [3 * width, width], "attn.in_proj_bias": [3 * width],
             "attn.out_proj.weight": [width, width], "attn.out_proj.bias": [width],
             "mlp.c_fc.weight": [hidden, width], "mlp.c_fc.bias": [hidden],
             "mlp.c_proj.weight": [width, hidden], "mlp.c_proj.bias": [width]}  # fmt: skip
    shapes = {"positional_embedding": [77, width], "text_projection": [width, width], "ln_final.weight": [width],
              "token_embedding.weight": [49408, width], "ln_final.bias": [width], "logit_scale": []}  # fmt: skip
    return shapes | {f"transformer.resblocks.{i}.{key}": shape for i in range(32) for key, shape in block.items()}


def whole_unet_release(family):
    """Return the shapes of v1-5-pruned-emaonly or sd_xl_base_1.0, with what they hold beside the networks."""
    parts = {"model.diffusion_model.": shapes_of("sd15_unet" if family == "sd1.5" else "sdxl_unet"),
             "first_stage_model.": four_channels()}  # fmt: skip
    clip = {**shapes_of("clip_l"), "text_model.embeddings.position_ids": [1, 77]}
    del clip["text_projection.weight"]
    if family == "sd1.5":
        parts |= {"cond_stage_model.transformer.": clip, "": {"betas": [1000], "alphas_cumprod": [1000]}}
    else:
        parts |= {"conditioner.embedders.0.transformer.": clip, "conditioner.embedders.1.model.": open_clip_bigg()}
        parts |= {"denoiser.": {"sigmas": [1000]}}
    return {prefix + key: shape for prefix, shapes in parts.items() for key, shape in shapes.items()}


@pytest.mark.parametrize(("family", "tensors"), [("sd1.5", 1131), ("sdxl", 2515)])  # as the real files are counted
def test_the_whole_files_of_the_unet_families_are_complete(tmp_path, family, tensors):
    path = tmp_path / "whole.safetensors"
    sparse_file(path, whole_unet_release(family))
    table = inspect_weights(path)
    rows = {row.name: row for row in table.rows}
    assert table.family == family
    assert "not known" not in rows
    parts = {"denoiser", "vae", "clip_l"} | ({"clip_g"} if family == "sdxl" else set())
    assert rows.keys() == parts | {"leftovers"}
    assert {rows[name].notes for name in parts} == {"complete"}
    assert sum(rows[name].tensors for name in parts) == tensors
    counted = {name: part.parameters for name, part in find_sources(path).parts.items()}
    expected = {"denoiser": 859_520_964 if family == "sd1.5" else 2_567_463_684, "vae": 83_653_863}
    expected |= {"clip_l": 123_060_480} | ({"clip_g": 694_659_840} if family == "sdxl" else {})
    assert counted == expected


@pytest.mark.parametrize(
    ("name", "family", "parameters"),
    [
        ("sd3_medium", "sd3", 2_084_951_104),
        ("sd3.5_medium", "sd3.5_medium", 2_243_171_520 + 147_456 * 1536),
        ("sd3.5_large", "sd3.5_large", 8_056_627_520 + 36_864 * 2432),
    ],
)
def test_a_whole_release_is_planned_in_seconds(tmp_path, capsys, name, family, parameters):
    path = tmp_path / f"{name}_incl_all.safetensors"
    size = sparse_release(path, [name, "vae", "clip_l", "clip_g", "t5xxl"])
    started = time.monotonic()
    sources = find_sources(path)
    plan = plan_memory(sources, choose_dtypes(sources, "fp16", torch.device("cuda")))
    assert time.monotonic() - started < 20
    assert sources.release.name == family
    counted = {part.name: part.parameters for part in plan.parts}
    assert counted["denoiser"] == parameters
    assert counted["vae"] == 83_819_683
    unread = 2 * 768 * 768  # CLIP-L's projection, which the list of keys has
    assert plan.peak("none") == size - unread + 2 * counted["vae"]  # the VAE is held in fp32
    assert plan.peak("encoders") == max(plan.text_bytes, plan.other_bytes)
    assert plan.peak("blocks") < 0.2 * plan.peak("none")
    assert plan.modulation_bytes == pytest.approx(2 * parameters / 3, rel=0.1)
    assert sample_to_folder(None, [], weights=str(path), device="cpu", dry_run=True, dtype="bf16") == 0
    assert f"{parameters:,}" in capsys.readouterr().out


def test_turbo_is_told_by_its_name(tmp_path):
    path = tmp_path / "sd3.5_large_turbo.safetensors"
    sparse_release(path, ["sd3.5_large", "vae", "clip_l", "clip_g"])
    sources = find_sources(path)
    assert sources.release.sampling.num_steps == 4
    assert sources.missing == ("t5",)
