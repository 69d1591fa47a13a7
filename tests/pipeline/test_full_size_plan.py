"""The memory of the releases at their full size, told from the headers of files that hold no data (sparse files)."""

import gzip
import json
import time
from pathlib import Path

import pytest
import torch

from mmdit.pipeline import sample_to_folder
from mmdit.pipeline.memory import plan_memory
from mmdit.pipeline.released import choose_dtypes
from mmdit.pipeline.sources import find_sources

KEYS = Path(__file__).parents[1] / "weights" / "keys"
PREFIXES = {
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5xxl": "text_encoders.t5xxl.transformer.",
}


def sparse_release(path, names):
    """Write a whole fp16 release of full size that takes no room on the disk; return its bytes."""
    header, end = {}, 0
    for name in names:
        for line in gzip.decompress((KEYS / f"{name}.tsv.gz").read_bytes()).decode().splitlines():
            key, shape = line.split("\t")
            shape = [int(side) for side in shape.strip("()[]").replace(",", " ").split()]
            key = key.removeprefix("model.diffusion_model.")
            size = 2
            for side in shape:
                size *= side
            prefix = PREFIXES.get(name, "model.diffusion_model.")
            header[prefix + key.removeprefix(prefix)] = {
                "dtype": "F16",
                "shape": shape,
                "data_offsets": [end, end + size],
            }
            end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


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
    assert plan.peak("none") == size + 2 * counted["vae"]  # the VAE is held in fp32
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
