"""What makes folders of weights a pipeline of diffusers: model_index.json and the scheduler's config.

Source: the releases' diffusers folders, by names and numbers only.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from mmdit.weights.detect import detect
from mmdit.weights.files import open_weights

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
_CHAIN = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False,
    "set_alpha_to_one": False,
}  # fmt: skip
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
# family's text rules -> pipeline, scheduler, and what else its index states
_PIPELINES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sd3": ("StableDiffusion3Pipeline", _FLOW, {}),
    "sd1.5": (
        "StableDiffusionPipeline",
        {"_class_name": "DDIMScheduler", **_CHAIN},
        {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False},
    ),
    "sdxl": (
        "StableDiffusionXLPipeline",
        {"_class_name": "EulerDiscreteScheduler", **_CHAIN},
        {"force_zeros_for_empty_prompt": True},
    ),
}
# the folders of each pipeline
_PARTS = {
    "sd3": ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2",
            "tokenizer_3"),
    "sd1.5": ("unet", "vae", "text_encoder", "tokenizer"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
}  # fmt: skip
_CLASSES = {
    "transformer": ("diffusers", "SD3Transformer2DModel"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "tokenizer_3": ("transformers", "T5TokenizerFast"),
}


def write_index(path: Path, out: Path) -> list[Path]:
    """Write the files that make the folders in `out` a pipeline; those of a diffusers folder at `path` are copied.

    Nothing is written where the denoiser is of no released family, whose noise nobody knows, or where a part is missing
    (T5 may be).

    Returns:
        The files written.
    """
    if (path / INDEX).is_file() and (path / SCHEDULER).is_file():
        index = json.loads((path / INDEX).read_text(encoding="utf-8"))
        kept = {name: value for name, value in index.items() if not isinstance(value, list) or _stays(out, name)}
        (out / SCHEDULER).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path / SCHEDULER, out / SCHEDULER)
        lost = {name: [None, None] for name in index if name not in kept}
        return [_write(out / INDEX, kept | lost), out / SCHEDULER]
    files = open_weights(path, ("transformer", "unet"))
    family = detect(files).family
    if family is None:
        return []
    family = "sd3" if family.startswith("sd3") else family
    if not all((out / part).is_dir() for part in _PARTS[family] if not part.endswith("_3")):
        return []
    name, scheduler, more = _PIPELINES[family]
    if family != "sd3" and ("v_pred" in files or files.metadata.get("modelspec.prediction_type") == "v"):
        scheduler = {**scheduler, "prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in files}
    parts = {part: _class_of(out, part) if (out / part).is_dir() else (None, None) for part in _PARTS[family]}
    tree = {"_class_name": name, "_diffusers_version": "0.30.0", **more, **parts}
    tree["scheduler"] = ("diffusers", scheduler["_class_name"])
    return [_write(out / INDEX, tree), _write(out / SCHEDULER, scheduler)]


def _stays(out: Path, part: str) -> bool:
    return part == "scheduler" or (out / part).is_dir()


def _class_of(out: Path, part: str) -> tuple[str, str]:
    """Return library and class of a part; a text encoder's stands in its config."""
    if part in _CLASSES:
        return _CLASSES[part]
    config = json.loads((out / part / "config.json").read_text(encoding="utf-8"))
    return "transformers", config["architectures"][0]


def _write(file: Path, tree: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return file
