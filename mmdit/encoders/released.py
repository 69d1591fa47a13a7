"""Released text encoders: files to towers and tokenizers, built on the meta device and filled tensor by tensor."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmdit.encoders.families import CLIPS, FAMILIES, RELEASED_WIDTHS
from mmdit.encoders.tokenizers import ClipTokenizer, ReleasedT5Tokenizer
from mmdit.encoders.towers import Tower, build_tower
from mmdit.registry import unknown
from mmdit.weights.fit import check_shapes
from mmdit.weights.header import WeightsError
from mmdit.weights.text import ENCODERS, PROJECTION, T5_COPY, T5_TABLE, infer_config
from mmdit.weights.text_files import TextPart, TextRelease, find_text

COMPUTED = (torch.float32, torch.bfloat16, torch.float16)  # dtypes a network can run in
_NOT_CONFIG = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "model_type")

Overrides = Mapping[str, Mapping[str, Any] | None]


class Released(NamedTuple):
    """What `TextEncoders` is made of: see there."""

    towers: dict[str, Tower]
    tokenizers: dict[str, Any]
    family: str
    context_dim: int
    absent: dict[str, tuple[int, int]]


def load_released(
    path: str | Path | Mapping[str, str | Path],
    family: str | None = None,
    *,
    overrides: Overrides | None = None,
    use: Sequence[str] | None = None,
    tokenizers: str | Path | Mapping[str, str | Path] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Released:
    """Load what `find_text` finds; arguments and errors as `mmdit.encoders.text.load_text_encoders`."""
    dtype, device = dtype or torch.float32, torch.device(device or "cpu")
    if dtype not in COMPUTED:
        raise ValueError(f"text encoders cannot run in {dtype}; choose {', '.join(map(str, COMPUTED))}")
    overrides = overrides or {}
    release = find_text(path, family)
    chosen = choose(release, use)
    readers = find_tokenizers(release, chosen, tokenizers)
    towers = {
        name: load_tower(release.parts[name], release.family, overrides.get(name) or {}, dtype, device)
        for name in chosen
    }
    absent = {
        name: _absent_widths(name, overrides.get(name) or {})
        for name in FAMILIES[release.family].encoders
        if name not in towers
    }
    widths = {name: tower.width for name, tower in towers.items()} | {name: w for name, (w, _) in absent.items()}
    context_dim = widths["t5"] if release.family == "sd3" else sum(widths.get(name, 0) for name in CLIPS)
    return Released(
        towers, readers, release.family, context_dim, {name: absent[name] for name in CLIPS if name in absent}
    )


def choose(release: TextRelease, use: Sequence[str] | None) -> list[str]:
    """Return the encoders to load: those of the family that are there, or those of them that `use` names.

    Raises:
        ValueError: `use` names one the family does not have.
        WeightsError: `use` names one that is not there.
    """
    known = FAMILIES[release.family].encoders
    strange = [name for name in use or () if name not in known]
    if strange:
        raise ValueError(unknown(f"text encoder of {release.family}", strange[0], known))
    missing = [name for name in use or () if name not in release.parts]
    if missing:
        raise WeightsError(
            f"use names {', '.join(missing)}, but only {', '.join(release.parts)} is there; give each one's path: "
            f"{{{', '.join(f'{name!r}: PATH' for name in use or ())}}}"
        )
    return [name for name in known if name in (release.parts if use is None else use)]


def _absent_widths(name: str, override: Mapping[str, Any]) -> tuple[int, int]:
    """Return the widths of states and pooled vector of an encoder that is left out: zeros stand for it."""
    width, pooled = RELEASED_WIDTHS[name]
    width = int(override.get("d_model", override.get("hidden_size", width)))
    return width, int(override.get("projection_dim", width if name == "clip_l" else pooled))


# --- one tower ----------------------------------------------------------------------------------------------------


def load_tower(
    part: TextPart, family: str, override: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> Tower:
    """Build one encoder on the meta device and give it its tensors in `dtype` on `device`.

    Raises:
        WeightsError: tensors are missing, unexpected or of another shape.
        ValueError: an override that is no field of the config.
    """
    shapes = part.shapes
    projected = part.encoder == "clip_g" or _clip_l_is_projected(part, family)
    if not projected:
        shapes.pop(PROJECTION, None)  # sd3-ref reads CLIP-L unprojected, whatever its file holds
    config = tower_config(part, override)
    with torch.device("meta"):
        module = build_tower(part.encoder, config, projected=projected)
    names = {our_name(key): key for key in module.state_dict() if key != T5_COPY}
    expected = tower_shapes(module)
    check_shapes(f"the {part.encoder} of {family}", part.files.path, expected, shapes)
    state: dict[str, Tensor] = {}
    for name, key in names.items():
        state[key] = part.sources[name].read(part.files, _dtype_of(key, dtype), device)
    if part.encoder == "t5":
        state[T5_COPY] = state[T5_TABLE]
    module.load_state_dict(state, strict=True, assign=True)
    _finish(module, device)
    width = expected[T5_TABLE if part.encoder == "t5" else "text_model.final_layer_norm.weight"][-1]
    return Tower(
        module.eval().requires_grad_(False), torch.zeros(width, device=device), torch.ones(width, device=device)
    )


def tower_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a module's tensors under our names, T5's table once."""
    return {our_name(key): tuple(tensor.shape) for key, tensor in module.state_dict().items() if key != T5_COPY}


def our_name(key: str) -> str:
    """Return a module's key under our names: CLIPTextModel lost its `text_model.` in transformers 5.6."""
    if key.startswith(("embeddings.", "final_layer_norm.", "encoder.layers.")):
        return f"text_model.{key}"
    return key


def _clip_l_is_projected(part: TextPart, family: str) -> bool:
    """SD3's diffusers folder projects CLIP-L's pooled vector (by an identity); nothing else does or uses it."""
    folder = part.config is not None and "CLIPTextModelWithProjection" in (part.config.get("architectures") or [])
    return part.encoder == "clip_l" and family == "sd3" and folder and PROJECTION in part.sources


def tower_config(part: TextPart, override: Mapping[str, Any]) -> dict[str, Any]:
    """Return transformers' config of an encoder: its folder's, else what shapes tell; `override` over both.

    Raises:
        ValueError: an override that is no field.
        WeightsError: CLIP's heads are told neither by the width nor by an override.
    """
    from transformers import CLIPTextConfig, T5Config

    override = dict(override)
    if part.encoder != "t5" and "num_heads" in override:
        override["num_attention_heads"] = override.pop("num_heads")
    known = set(inspect.signature(T5Config if part.encoder == "t5" else CLIPTextConfig).parameters)
    for name in override:
        if name not in known:
            raise ValueError(unknown(f"override of {part.encoder}", name, sorted(known - {"kwargs"})))
    inferred = infer_config(part.encoder, part.shapes, part.files.path)
    if part.config is not None:
        stored = part.config.get("text_config") or part.config  # a whole CLIP's config.json holds both towers
        inferred = {key: value for key, value in stored.items() if key not in _NOT_CONFIG}
        if part.encoder == "t5":
            inferred |= {"is_encoder_decoder": False, "use_cache": False}
    config = {**inferred, **override}
    if part.encoder != "t5" and "num_attention_heads" not in config:
        raise WeightsError(
            f"{part.files.path}: {part.encoder} is {config['hidden_size']} wide, from which its heads cannot be told "
            f"(released ones are 64 wide); pass {part.encoder}={{'num_heads': N}}"
        )
    return config


def _dtype_of(key: str, dtype: torch.dtype) -> torch.dtype:
    """T5's output matrices stay in float32 under float16, as in transformers: their sums overflow it."""
    return torch.float32 if dtype == torch.float16 and key.endswith(".DenseReluDense.wo.weight") else dtype


def _finish(module: nn.Module, device: torch.device) -> None:
    """Tie T5's copy of its table again, and make the one buffer that no file holds."""
    if hasattr(module, "shared"):
        module.encoder.embed_tokens.weight = module.shared.weight
    for owner in module.modules():
        for name, buffer in list(owner.named_buffers(recurse=False)):
            if buffer.is_meta:
                assert name == "position_ids", f"transformers has a new buffer {name}, which nothing fills"
                owner.register_buffer(
                    name, torch.arange(buffer.shape[-1], device=device).expand(buffer.shape), persistent=False
                )


# --- tokenizers -----------------------------------------------------------------------------------------------------


def find_tokenizers(
    release: TextRelease, chosen: Sequence[str], given: str | Path | Mapping[str, str | Path] | None
) -> dict[str, Any]:
    """Build the tokenizers of the chosen encoders: those given, else those beside the weights.

    CLIP falls back on the packaged vocabulary, which is every CLIP's. A T5 without one gets none: it loads and takes
    ids, and only tokenising raises.
    """
    paths = tokenizer_paths(release, chosen, given)
    readers: dict[str, Any] = {}
    packaged: ClipTokenizer | None = None
    for name in chosen:
        if name == "t5":
            readers |= {name: ReleasedT5Tokenizer(paths[name])} if name in paths else {}
        elif name in paths:
            readers[name] = ClipTokenizer(paths[name], cleaned=False)
        else:  # one object for both towers: each text is then cut once
            packaged = packaged or ClipTokenizer(cleaned=False)
            readers[name] = packaged
    return readers


def tokenizer_paths(
    release: TextRelease, chosen: Sequence[str], given: str | Path | Mapping[str, str | Path] | None
) -> dict[str, Path]:
    """Say where the tokenizers of the chosen encoders lie: those given, else those beside the weights."""
    paths = _given(given) if given is not None else {}
    for name in chosen:
        if name not in paths:
            found = _beside(release.folder, name)
            paths |= {name: found} if found else {}
    return paths


def _given(given: str | Path | Mapping[str, str | Path]) -> dict[str, Path]:
    if isinstance(given, Mapping):
        strange = next((name for name in given if name not in ENCODERS), None)
        if strange is not None:
            raise ValueError(unknown("text encoder with a tokenizer", strange, ENCODERS))
        return {name: Path(path) for name, path in given.items()}
    path = Path(given)
    if path.is_file():
        return {"t5": path}
    found = {name: place for name in ENCODERS if (place := _beside(path, name))}
    if not found and (path / "tokenizer.json").is_file():
        found = {"t5": path}
    if not found:
        raise FileNotFoundError(
            f"no tokenizers at {path}: expected spiece.model, or the folders {', '.join(map(_folder, ENCODERS))}"
        )
    return found


def _folder(encoder: str) -> str:
    return "tokenizer" + {"clip_l": "", "clip_g": "_2", "t5": "_3"}[encoder]


def _beside(folder: Path, encoder: str) -> Path | None:
    """Look for a tokenizer beside the weights, and beside the folder text_encoders/ they may lie in."""
    for place in (folder, folder.parent) if folder.name == "text_encoders" else (folder,):
        if (place / _folder(encoder)).is_dir():
            return place / _folder(encoder)
        if encoder == "t5" and (place / "spiece.model").is_file():
            return place / "spiece.model"
    return None
