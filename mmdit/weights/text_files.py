"""Where the text encoders of a release lie: one file for all, a file for each, or diffusers' folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mmdit.registry import lookup, unknown
from mmdit.weights.files import SUFFIX, WeightFiles, open_weights
from mmdit.weights.header import WeightsError
from mmdit.weights.text import ENCODERS, FILES, FOLDERS, PREFIXES, TOKEN_TABLE, Source, name_sources

# A pipeline's class, as its model_index.json names it, without what stands behind (Img2Img, Inpaint, ...)
_PIPELINES = {
    "StableDiffusion3": "sd3",
    "StableDiffusionXL": "sdxl",
    "StableDiffusion": "sd1.5",
}
_WIDTHS = {"clip_l": 768, "clip_g": 1280}  # of the releases' CLIPs
_FOREIGN = {
    "cond_stage_model.model.": "the text encoder of SD2 (OpenCLIP ViT-H), which no family here uses",
    "conditioner.embedders.0.model.": "the text encoder of the SDXL refiner, which is no family here",
    "lora_te": "a LoRA; merge it into its base model first, or load the base model",
}


class TextPart(NamedTuple):
    """One text encoder on disk.

    Attributes:
        encoder: a name in `ENCODERS`.
        files: opened, not read.
        sources: our names to what holds them.
        config: the config.json of its folder, None where shapes must tell.
    """

    encoder: str
    files: WeightFiles
    sources: dict[str, Source]
    config: dict[str, Any] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: source.shape(self.files) for name, source in self.sources.items()}


class TextRelease(NamedTuple):
    """The text encoders found at a path.

    Attributes:
        family: whose rules they follow.
        parts: by encoder.
        folder: where their tokenizers may lie.
    """

    family: str
    parts: dict[str, TextPart]
    folder: Path


def find_text(path: str | Path | Mapping[str, str | Path], family: str | None = None) -> TextRelease:
    """Find text encoders; only headers are read.

    Args:
        path: an all-in-one file, a folder of separate files (`clip_l*`, `clip_g*`, `t5xxl*`), a diffusers folder, one
            encoder's file or folder, or {encoder: path}.
        family: whose rules to follow where the files do not tell: encoders that stand alone are taken for SD3's.

    Raises:
        FileNotFoundError: nothing there, or no text encoder in the folder.
        WeightsError: the file holds none, or those of another family; or a bad file.
    """
    if family is not None:
        lookup(PREFIXES, family, "family of text encoders")
    if isinstance(path, Mapping):
        return _separate(path, family)
    path = Path(path)
    if not path.is_dir():
        return _one_file(path, family)
    if any((path / name).is_dir() for name in FOLDERS.values()):
        return _diffusers(path, family)
    if (path / "config.json").is_file():
        part = _alone(path)
        return TextRelease(family or "sd3", {part.encoder: part}, path.parent)
    for folder in (path, path / "text_encoders"):
        found = {name: sorted(folder.glob(f"{stem}*{SUFFIX}")) for name, stem in FILES.items()}
        if any(found.values()):
            for name, files in found.items():
                if len(files) > 1:
                    names = ", ".join(file.name for file in files)
                    raise WeightsError(
                        f"{folder} holds {len(files)} files of {name} ({names}); name the files instead of the folder: "
                        f"{{{name!r}: PATH, ...}}, in scripts/sample.py --text clip_l=PATH clip_g=PATH t5=PATH"
                    )
            return _separate({name: files[0] for name, files in found.items() if files}, family)
    raise FileNotFoundError(
        f"no text encoders at {path}: expected the folders {', '.join(FOLDERS.values())}, or files named "
        f"{', '.join(f'{stem}*{SUFFIX}' for stem in FILES.values())} (also in text_encoders/)"
    )


def _one_file(path: Path, family: str | None) -> TextRelease:
    files = open_weights(path)
    keys = files.keys()
    for name, prefixes in PREFIXES.items():
        held = {e: prefix for e, prefix in prefixes.items() if any(key.startswith(prefix) for key in keys)}
        if not held:
            continue
        if family not in (None, name):
            raise WeightsError(
                f"{path} holds the text encoders of {name}, not of {family}; give those of {family}, or leave `family` "
                f"out if you named it"
            )
        parts = {e: TextPart(e, files, name_sources(e, keys, prefix)) for e, prefix in held.items()}
        return TextRelease(name, parts, path.parent)
    for prefix, what in _FOREIGN.items():
        if any(key.startswith(prefix) for key in keys):
            raise WeightsError(f"{path} holds {what}")
    part = _alone(path)
    return TextRelease(family or "sd3", {part.encoder: part}, path.parent)


def _alone(path: Path) -> TextPart:
    """Open the one encoder of a file or folder; which it is, its widths tell."""
    files = open_weights(path)
    config = files.config if path.is_dir() else None
    if any(key.endswith("block.0.layer.0.SelfAttention.q.weight") for key in files):
        return TextPart("t5", files, name_sources("t5", files), config)
    for encoder, width in _WIDTHS.items():
        sources = name_sources(encoder, files)
        if TOKEN_TABLE in sources and sources[TOKEN_TABLE].shape(files)[-1] == width:
            return TextPart(encoder, files, sources, config)
    if TOKEN_TABLE in name_sources("clip_l", files):
        raise WeightsError(f"{path} is a CLIP of unreleased width; say which it is: {{'clip_l': PATH}} or 'clip_g'")
    raise WeightsError(
        f"{path} holds no text encoder: none of its {len(files)} names begins with {', '.join(_all_prefixes())}, and "
        f"it is no CLIP or T5 by itself; it begins with {files.keys()[:3]}. SD3's encoders are in "
        f"sd3_medium_incl_clips*.safetensors and in the release's text_encoders/"
    )


def _all_prefixes() -> list[str]:
    return [prefix for prefixes in PREFIXES.values() for prefix in prefixes.values()]


def _separate(paths: Mapping[str, str | Path], family: str | None) -> TextRelease:
    parts = {}
    for encoder, path in paths.items():
        if encoder not in ENCODERS:
            raise WeightsError(unknown("text encoder", encoder, ENCODERS))
        files = open_weights(path)
        prefix = _prefix_of(encoder, files)
        sources = name_sources(encoder, files, prefix)
        _check_width(encoder, path, files, sources)
        parts[encoder] = TextPart(encoder, files, sources, files.config if Path(path).is_dir() else None)
    if not parts:
        raise WeightsError(f"no paths of text encoders were given; name some of {', '.join(ENCODERS)}")
    return TextRelease(family or "sd3", parts, Path(next(iter(paths.values()))).parent)


def _prefix_of(encoder: str, files: WeightFiles) -> str:
    """Return what stands before an encoder's keys: nothing in a file of its own."""
    known = [prefixes[encoder] for prefixes in PREFIXES.values() if encoder in prefixes]
    return next((prefix for prefix in known if any(key.startswith(prefix) for key in files)), "")


def _check_width(encoder: str, path: str | Path, files: WeightFiles, sources: Mapping[str, Source]) -> None:
    """Refuse one released CLIP given as the other; shapes alone would make a network of either."""
    width = sources[TOKEN_TABLE].shape(files)[-1] if encoder != "t5" and TOKEN_TABLE in sources else None
    other = next((name for name, known in _WIDTHS.items() if known == width and name != encoder), None)
    if other is not None:
        raise WeightsError(f"{path} was given as {encoder} and is {other}: it is {width} wide; exchange the paths")


def _diffusers(folder: Path, family: str | None) -> TextRelease:
    parts = {}
    for encoder, name in FOLDERS.items():
        if (folder / name).is_dir():
            files = open_weights(folder / name)
            parts[encoder] = TextPart(encoder, files, name_sources(encoder, files), files.config)
    family = family or _folder_family(folder, parts)
    return TextRelease(family, {name: part for name, part in parts.items() if name in PREFIXES[family]}, folder)


def _folder_family(folder: Path, parts: Mapping[str, TextPart]) -> str:
    """Tell the family of a diffusers folder: by its pipeline's class, else by which encoders there are.

    Only SD3 has a third encoder, and only SD3 writes the first one with a projection.
    """
    index = folder / "model_index.json"
    if index.is_file():
        try:
            pipeline = str(json.loads(index.read_text(encoding="utf-8")).get("_class_name"))
        except (ValueError, AttributeError) as error:
            raise WeightsError(f"{index} is not a pipeline's index ({error}); download it again") from error
        known = next((family for name, family in _PIPELINES.items() if pipeline.startswith(name)), None)
        if known is not None:
            return known
    architectures = (parts["clip_l"].config or {}).get("architectures") or [] if "clip_l" in parts else []
    if "t5" in parts or "clip_l" not in parts or "CLIPTextModelWithProjection" in architectures:
        return "sd3"
    return "sdxl" if "clip_g" in parts else "sd1.5"
