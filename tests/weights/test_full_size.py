"""Every released denoiser, by its full list of keys: recognised, configured and matched without a byte of weights."""

import gzip
import json
import struct
from pathlib import Path

import pytest

from mmdit.config import model_config
from mmdit.weights.denoiser import check_fit, find_sources, open_denoiser
from mmdit.weights.detect import detect
from mmdit.weights.empty import empty_denoiser
from mmdit.weights.files import open_weights

KEYS = Path(__file__).parent / "keys"
DENOISERS = {
    "sd3_medium": ("sd3", "mmdit", "sd3_medium", 2_028_328_000),
    "sd3.5_medium": ("sd3.5_medium", "mmdit", "sd3.5_medium", 2_243_171_520),
    "sd3.5_large": ("sd3.5_large", "mmdit", "sd3.5_large", 8_056_627_520),
    "sd15_unet": ("sd1.5", "unet", "sd1.5", 859_520_964),
    "sdxl_unet": ("sdxl", "unet", "sdxl", 2_567_463_684),
}
OTHERS = {"vae": "vae", "clip_l": "clip_l", "clip_g": "clip_g", "t5xxl": "t5"}


def sparse(path, name, strip=""):
    """A file with a release's keys and shapes in fp16, whose weights are a hole in the disk."""
    header, offset = {}, 0
    for line in gzip.decompress((KEYS / f"{name}.tsv.gz").read_bytes()).decode().splitlines():
        key, shape = line.split("\t")
        numbers = [int(number) for number in shape.strip("()").split(",") if number.strip()]
        size = 2
        for number in numbers:
            size *= number
        header[key.removeprefix(strip)] = {"dtype": "F16", "shape": numbers, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return path


@pytest.mark.parametrize("strip", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", DENOISERS)
def test_a_released_denoiser_has_nothing_missing_and_nothing_unexpected(name, strip, tmp_path):
    family, backbone, preset, parameters = DENOISERS[name]
    path = sparse(tmp_path / f"{name}.safetensors", name, strip)
    files, part, config = open_denoiser(path)
    assert config == model_config(backbone, preset).model_copy(update={"preset": None})
    denoiser = empty_denoiser(config)
    expected = denoiser.state_dict()
    check_fit(files, part, expected, find_sources(expected, part, config), {})
    assert len(expected) == len(files)
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == parameters
    detected = detect(open_weights(path))
    assert (detected.family, list(detected.parts), detected.unknown) == (family, ["denoiser"], ())


@pytest.mark.parametrize("name", OTHERS)
def test_released_vae_and_text_encoders_are_recognised(name, tmp_path):
    detected = detect(open_weights(sparse(tmp_path / "m.safetensors", name)))
    assert (detected.family, list(detected.parts), detected.unknown) == (None, [OTHERS[name]], ())
