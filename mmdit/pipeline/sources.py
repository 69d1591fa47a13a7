"""Which files hold which part of a released model, found from headers alone, and what is missing said by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmdit.checkpoint import CONFIG, MANIFEST
from mmdit.encoders.families import RELEASED_WIDTHS
from mmdit.pipeline.stated import follow_stated
from mmdit.releases import Release, find_release
from mmdit.weights.denoiser import open_denoiser
from mmdit.weights.detect import detect
from mmdit.weights.files import SUFFIX, WeightFiles, open_weights
from mmdit.weights.header import PICKLES
from mmdit.weights.text import ENCODERS, FOLDERS, PROJECTION, infer_config
from mmdit.weights.text_files import TextPart, find_text
from mmdit.weights.vae import name_sources

TextPaths = str | Path | Mapping[str, str | Path]


class Found(NamedTuple):
    """One part: the opened files and the tensors in them that are the part."""

    files: WeightFiles
    keys: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(_count(self.files.shape(key)) for key in self.keys)

    @property
    def stored(self) -> str:
        """The dtypes it is stored in, the largest share first."""
        shares: dict[torch.dtype, int] = {}
        for key in self.keys:
            shares[self.files.dtype(key)] = shares.get(self.files.dtype(key), 0) + self.files.nbytes(key)
        return ", ".join(str(d).removeprefix("torch.") for d in sorted(shares, key=lambda d: -shares[d]))


class Tower(NamedTuple):
    """A text encoder, and the width of its states."""

    found: Found
    width: int


@dataclass(frozen=True)
class Sources:
    """A released model on disk.

    Attributes:
        release: the family.
        denoiser, vae: their paths.
        text: the text encoders' path, or {encoder: path}.
        parts: denoiser, vae and text encoders, by name.
        config: of the denoiser.
        missing: optional text encoders that are not there and count as zeros.
    """

    release: Release
    denoiser: Path
    vae: Path
    text: Path | dict[str, Path]
    parts: Mapping[str, Found]
    config: Any
    missing: tuple[str, ...] = field(default=())


def is_released(path: str | Path) -> bool:
    """Whether a path is taken for released weights, not for a run of ours: a file of weights, or a folder of them."""
    path = Path(path)
    if path.name.endswith((SUFFIX, ".json", *PICKLES)):
        return True
    if not path.is_dir() or (path / MANIFEST).is_file() or (path / CONFIG).is_file() or (path / "checkpoints").is_dir():
        return False
    below = (path / "model_index.json", path / "transformer", path / "unet")
    return any(place.exists() for place in below) or any(path.glob(f"*{SUFFIX}"))


def find_sources(
    path: str | Path,
    vae: str | Path | None = None,
    text: TextPaths | None = None,
    family: str | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    need_vae: bool = True,
    need_text: bool = True,
) -> Sources:
    """Find the parts of a released model.

    Args:
        path: of the denoiser, and of everything else that is not given.
        vae, text: of the others; `text` a file, a folder, or {"clip_l": file, "clip_g": file, "t5": file}.
        family: a name of `RELEASES`, where the weights do not tell it or tell it wrongly.
        overrides: {part: config fields}.
        need_vae, need_text: False where the part is there already, loaded.

    Raises:
        FileNotFoundError: a path is not there.
        ValueError: a damaged file, an unknown family, or a part that is in none of the files; the message names the
            file of the release that has it.
    """
    path, overrides = Path(path), overrides or {}
    files, part, config = open_denoiser(path, **overrides.get("denoiser", {}))
    release = follow_stated(_release(files, family), path, files)
    parts = {"denoiser": Found(files, part.keys)}
    vae_path, text_path = Path(vae or path), _paths(text) if text is not None else path
    if need_vae:
        found = _vae(vae_path)
        if found is None:
            raise ValueError(_lacking(release, "vae", vae_path))
        _check_channels(path, config, found)
        parts["vae"] = found
    missing: tuple[str, ...] = ()
    if need_text:
        there = _towers(text_path, release, text is not None)
        towers = {name: tower for name, tower in there.items() if name in release.towers}
        absent = [name for name in release.towers if name not in towers]
        required = [name for name in absent if name not in release.optional]
        if required:
            raise ValueError(_lacking(release, "text", text_path, required))
        _check_widths(path, config, release, towers, overrides)
        parts |= {name: tower.found for name, tower in towers.items()}
        missing = tuple(absent)
    return Sources(release, path, vae_path, text_path, parts, config, missing)


def _release(files: WeightFiles, family: str | None) -> Release:
    detected = detect(files).family
    found = family or detected
    if found is None:
        raise ValueError(
            f"{files.path} holds a denoiser of no released family (SD3, SD3.5, SD1.5, SDXL base); its schedule and "
            f"guidance are not known. Say which it follows: family='sd3', for instance"
        )
    release = find_release(found)
    if detected is not None and (release.text == "sd3") != (find_release(detected).text == "sd3"):
        raise ValueError(
            f"{files.path} holds a denoiser of {detected}, which is no {family}: one is an MMDiT, the other a U-Net; "
            f"leave `family` out, or give {release.files['denoiser']}"
        )
    return release


def _check_channels(path: Path, config: Any, vae: Found) -> None:
    """Refuse a denoiser that reads or gives other channels than the VAE has, such as an inpainting model."""
    entrance = next((key for key in vae.keys if key.endswith("decoder.conv_in.weight")), None)
    channels = config.in_channels if entrance is None else vae.files.shape(entrance)[1]
    if channels != config.in_channels or channels != config.out_channels:
        raise ValueError(
            f"{path} holds a denoiser that reads {config.in_channels} channels and gives {config.out_channels}; the "
            f"VAE has {channels}. A model for inpainting or editing reads more than latents and cannot draw from text "
            f"alone; otherwise give the VAE it was trained with"
        )


def _check_widths(
    path: Path, config: Any, release: Release, towers: Mapping[str, Tower], overrides: Mapping[str, Mapping[str, Any]]
) -> None:
    """Refuse text encoders whose states are not as wide as the denoiser reads, before anything is loaded."""
    if release.text == "sd3":
        absent = overrides.get("t5", {}).get("d_model", RELEASED_WIDTHS["t5"][0])
        width = towers["t5"].width if "t5" in towers else absent
    else:
        width = sum(tower.width for tower in towers.values())
    if width != config.context_dim:
        raise ValueError(
            f"{path} holds a denoiser that reads text {config.context_dim} wide; {release.title}'s encoders "
            f"({', '.join(towers)}) give {width}. It is of another family (SD2 reads 1024, SDXL's refiner 1280), or "
            f"these are not its text encoders"
        )


def _paths(text: TextPaths) -> Path | dict[str, Path]:
    if not isinstance(text, Mapping):
        return Path(text)
    strange = [name for name in text if name not in ENCODERS]
    if strange:
        raise ValueError(f"text encoders are {', '.join(ENCODERS)}, got {', '.join(strange)}")
    return {name: Path(path) for name, path in text.items()}


def _vae(path: Path) -> Found | None:
    """Return the VAE in a file, in its own folder, or in the pipeline folder above it."""
    place = path / "vae" if (path / "vae").is_dir() else path
    if place.is_dir() and place == path and _is_pipeline(path):
        return None
    files = open_weights(place)
    if "vae" not in detect(files).parts:
        return None
    return Found(files, tuple(name_sources(files).values()))


def _towers(path: Path | dict[str, Path], release: Release, given: bool) -> dict[str, Tower]:
    """Return the text encoders at a path; none, instead of an error, where the path is only the denoiser's."""
    if not given and isinstance(path, Path):
        if path.is_dir():
            if not any((path / folder).is_dir() for folder in FOLDERS.values()):
                return {}
        elif not any(name in FOLDERS for name in detect(open_weights(path)).parts):
            return {}
    return {name: _tower(part) for name, part in find_text(path, release.text).parts.items()}


def _tower(part: TextPart) -> Tower:
    told = infer_config(part.encoder, part.shapes, part.files.path)
    unread = part.encoder == "clip_l" and part.config is None  # only SD3's diffusers folder projects by it
    keys = dict.fromkeys(s.key for name, s in part.sources.items() if not (unread and name == PROJECTION))
    return Tower(Found(part.files, tuple(keys)), told["d_model" if part.encoder == "t5" else "hidden_size"])


def _is_pipeline(path: Path) -> bool:
    return any((path / name).exists() for name in ("model_index.json", "transformer", "unet"))


def _lacking(release: Release, part: str, path: Path | dict[str, Path], towers: list[str] | None = None) -> str:
    if part == "vae":
        what, where = "the VAE", [release.files["vae"]]
    else:
        what, where = f"the text encoders {', '.join(towers or [])}", [release.files[name] for name in towers or []]
    there = path if isinstance(path, Path) else ", ".join(map(str, path.values()))
    optional = f" ({', '.join(release.optional)} may be left out)" if part == "text" and release.optional else ""
    return (
        f"{release.title} needs {what}, which {there} does not hold. Give {part}= (--{part}) the path of "
        f"{'; '.join(where)}{optional}"
    )


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
