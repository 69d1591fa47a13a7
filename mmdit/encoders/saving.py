"""Text encoders back to the layouts they came in: an all-in-one file, separate files, diffusers' folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdit.encoders.released import our_name
from mmdit.encoders.text import TextEncoders
from mmdit.encoders.tokenizers import ClipTokenizer, ReleasedT5Tokenizer
from mmdit.encoders.towers import Tower
from mmdit.registry import lookup
from mmdit.weights.files import SUFFIX
from mmdit.weights.text import FILES, FOLDERS, PREFIXES, PROJECTION, T5_COPY, T5_TABLE, to_open_clip
from mmdit.weights.writing import write_weights

_CLASSES = {"clip_l": "CLIPTextModel", "clip_g": "CLIPTextModelWithProjection", "t5": "T5EncoderModel"}


def save_text_encoders(
    text: TextEncoders,
    path: str | Path,
    layout: str = "original",
    *,
    dtype: torch.dtype | None = None,
    shard_size: int | str | None = None,
) -> list[Path]:
    """Save released text encoders in a released layout; the bits of their weights do not change.

    Args:
        path: `original`: a .safetensors file for all, with the family's prefixes (SDXL's CLIP-G packed as OpenCLIP's),
            or for SD3 a folder of clip_l, clip_g and t5xxl files. `diffusers`: the pipeline's folder, which gets
            text_encoder, text_encoder_2, text_encoder_3 and the tokenizers that are there.
        layout: `original` or `diffusers`.
        dtype: what weights are converted to; None keeps theirs.
        shard_size: largest file, such as "5GB"; None: one file each.

    Returns:
        The files of weights.

    Raises:
        ValueError: an unknown layout; encoders whose states are standardised (the tiny ones), or a projection of CLIP-L
            that SD3's original layout has no place for.
    """
    path = Path(path)
    whole = lookup({"original": False, "diffusers": True}, layout, "layout")
    if not text.towers:
        raise ValueError("there are no text encoders to save")
    states = {name: _state(name, tower) for name, tower in text.towers.items()}
    if whole:
        return _save_folders(text, states, path, dtype, shard_size)
    files = _original(text, states)
    if path.suffix == SUFFIX:
        prefixes = PREFIXES[text.family]
        together = {f"{prefixes[name]}{key}": value for name, state in files.items() for key, value in state.items()}
        return write_weights(together, path, dtype=dtype, shard_size=shard_size)
    if text.family != "sd3":
        raise ValueError(f"the encoders of {text.family} are not released in separate files; give a {SUFFIX} path")
    written = []
    for name, state in files.items():
        written += write_weights(state, path / f"{FILES[name]}{SUFFIX}", dtype=dtype, shard_size=shard_size)
    return written


def _state(name: str, tower: Tower) -> dict[str, Tensor]:
    """Return a tower's tensors under our names, T5's table once."""
    if tower.state_mean.any() or (tower.state_std != 1).any():
        raise ValueError(
            f"the states of this {name} are standardised, as those of the tiny encoders are, and no released layout "
            f"says so; only encoders loaded from released files are saved"
        )
    return {our_name(key): value for key, value in tower.module.state_dict().items() if key != T5_COPY}


def _original(text: TextEncoders, states: Mapping[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    files = {name: dict(state) for name, state in states.items()}
    projection = files.get("clip_l", {}).pop(PROJECTION, None)
    if projection is not None and not _is_identity(projection):
        raise ValueError(
            "SD3's original layout takes CLIP-L's pooled vector unprojected, and this CLIP-L projects it by a matrix "
            "that is not the identity: saving it would change results; use layout='diffusers'"
        )
    if "t5" in files:
        files["t5"][T5_COPY] = files["t5"][T5_TABLE]  # the releases hold the table twice
    if text.family == "sdxl" and "clip_g" in files:
        files["clip_g"] = to_open_clip(files["clip_g"])
    return files


def _is_identity(matrix: Tensor) -> bool:
    eye = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    return matrix.shape == eye.shape and torch.equal(matrix, eye)


def _save_folders(
    text: TextEncoders,
    states: Mapping[str, dict[str, Tensor]],
    path: Path,
    dtype: torch.dtype | None,
    shard_size: int | str | None,
) -> list[Path]:
    written = []
    for name, state in states.items():
        folder, config = path / FOLDERS[name], text.towers[name].module.config.to_dict()
        kind = _CLASSES[name]
        if name == "clip_l" and text.family == "sd3":  # released with a projection, an identity
            width, kind = config["hidden_size"], "CLIPTextModelWithProjection"
            if PROJECTION not in state:
                eye = torch.eye(width, dtype=state["text_model.final_layer_norm.weight"].dtype)
                state, config = {**state, PROJECTION: eye}, {**config, "projection_dim": width}
        written += write_weights(state, folder / f"model{SUFFIX}", dtype=dtype, shard_size=shard_size)
        stored = str(dtype or next(iter(state.values())).dtype).removeprefix("torch.")
        config = {key: value for key, value in config.items() if not key.startswith("_") and key != "dtype"}
        _write_json(folder / "config.json", {**config, "architectures": [kind], "torch_dtype": stored})
        tokenizer = text.tokenizers.get(name)
        if isinstance(tokenizer, ClipTokenizer):
            tokenizer.save(path / f"tokenizer{'_2' if name == 'clip_g' else ''}", pad_with_zero=name == "clip_g")
        elif isinstance(tokenizer, ReleasedT5Tokenizer):
            tokenizer.save(path / "tokenizer_3")
    return written


def _write_json(file: Path, tree: dict[str, Any]) -> None:
    file.write_text(json.dumps(tree, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
