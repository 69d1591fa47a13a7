"""Weights from one layout, dtype and shard size to another: what scripts/convert.py does.

A denoiser streams: one tensor is in memory at a time, whatever the file's size. VAE and text encoders are loaded and
saved one part after the other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mmdit.encoders.saving import save_text_encoders
from mmdit.encoders.text import load_text_encoders
from mmdit.encoders.vae import load_vae, save_vae
from mmdit.registry import lookup
from mmdit.weights import sd3
from mmdit.weights.denoiser import (
    FOLDERS,
    LAYOUTS,
    check_fit,
    diffusers_sources,
    find_sources,
    open_denoiser,
    read_source,
    target_file,
    write_denoiser,
)
from mmdit.weights.detect import detect
from mmdit.weights.diffusers_config import check_fits_diffusers
from mmdit.weights.diffusers_index import write_index
from mmdit.weights.empty import empty_denoiser
from mmdit.weights.files import SUFFIX, WeightFiles, open_weights
from mmdit.weights.header import WeightsError
from mmdit.weights.source import Source
from mmdit.weights.writing import Lazy, write_weights

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
PARTS = ("denoiser", "vae", "text", "all")
_TEXT = ("clip_l", "clip_g", "t5")


def convert(
    path: str | Path,
    out: str | Path,
    layout: str,
    *,
    dtype: torch.dtype | None = None,
    shard_size: int | str | None = None,
    part: str = "denoiser",
) -> list[Path]:
    """Write the weights at `path` in another layout; without `dtype` the bits of every weight stay.

    Args:
        path: as `load_denoiser`, `load_vae` and `load_text_encoders` take it.
        out: a .safetensors file, or a folder; `all` in the layout of diffusers is a folder.
        layout: `original` or `diffusers`.
        dtype: of all floating weights; None keeps each one's.
        shard_size: largest file, such as "2GB"; None: one file.
        part: `denoiser`, `vae`, `text` (all text encoders), or `all` that are there.

    Returns:
        The files written.

    Raises:
        ValueError: an unknown name, or weights that cannot be read or said in this layout.
        FileNotFoundError: nothing at `path`.
    """
    lookup(LAYOUTS, layout, "layout")
    lookup(dict.fromkeys(PARTS), part, "part")
    path, out = Path(path), Path(out)
    if out.exists() and path.exists() and out.resolve() == path.resolve():
        raise WeightsError(f"{out} is what is read; give another path to write to")
    if part == "denoiser":
        return convert_denoiser(path, out, layout, dtype=dtype, shard_size=shard_size)
    if part == "vae":
        return _convert_vae(path, out, layout, dtype)
    if part == "text":
        return _convert_text(path, out, layout, dtype, shard_size)
    return _convert_all(path, out, layout, dtype, shard_size)


def convert_denoiser(
    path: Path, out: Path, layout: str, *, dtype: torch.dtype | None = None, shard_size: int | str | None = None
) -> list[Path]:
    """Convert a denoiser tensor by tensor; arguments and errors as `convert`."""
    files, source_part, config = open_denoiser(path)
    expected = empty_denoiser(config).state_dict()
    sources = find_sources(expected, source_part, config)
    check_fit(files, source_part, expected, sources, {})
    if layout == "diffusers":
        check_fits_diffusers(config)
        tensors = dict(_diffusers_tensors(files, expected, sources, diffusers_sources(expected, config)))
    else:
        tensors = {sd3.PREFIX + key: _lazy(files, sources[key], tensor) for key, tensor in expected.items()}
    file = target_file(out, layout)
    metadata = {key: value for key, value in files.metadata.items() if key not in ("format", "config")}
    return write_denoiser(
        tensors, file, layout, config, folder=file != out, dtype=dtype, shard_size=shard_size, metadata=metadata
    )


def _lazy(files: WeightFiles, source: Source, like: Tensor) -> Lazy:
    stored = files.dtype(source.keys[0])

    def load() -> Tensor:
        target = torch.empty(like.shape, dtype=stored)
        read_source(files, source, target)
        return target

    return Lazy(tuple(like.shape), stored, load)


def _diffusers_tensors(
    files: WeightFiles, expected: Mapping[str, Tensor], sources: Mapping[str, Source], targets: Mapping[str, Source]
) -> Iterator[tuple[str, Lazy]]:
    """Yield diffusers' tensors, each a part of one of ours, with the halves exchanged where diffusers has them so."""

    def load(whole: Lazy, target: Source, index: int) -> Tensor:
        tensor = whole.load()
        if target.swapped:
            tensor = sd3.swap_halves(tensor)
        return tensor.chunk(len(target.keys))[index]

    for ours, target in targets.items():
        whole = _lazy(files, sources[ours], expected[ours])
        shape = (whole.shape[0] // len(target.keys), *whole.shape[1:])
        for index, key in enumerate(target.keys):
            yield key, Lazy(shape, whole.dtype, partial(load, whole, target, index))


def _stored_dtype(path: Path, folders: tuple[str, ...], names: tuple[str, ...]) -> torch.dtype:
    """Return the dtype that parts of a file or folder are stored in, so that loading them keeps their bits.

    float32 where they are stored in several, or in one that no network runs in.
    """
    places = [path / folder for folder in folders if (path / folder).is_dir()] if path.is_dir() else []
    if path.is_dir() and not places:
        places = sorted(path.rglob(f"*{SUFFIX}"))
    found = set()
    for place in places or [path]:
        files = open_weights(place)
        parts = detect(files).parts
        keys = [key for name in names if name in parts for key in parts[name].keys] or files.keys()
        found |= {files.dtype(key) for key in keys if files.dtype(key).is_floating_point}
    dtype = found.pop() if len(found) == 1 else torch.float32
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32


def _convert_vae(path: Path, out: Path, layout: str, dtype: torch.dtype | None) -> list[Path]:
    stored = _stored_dtype(path, ("vae",), ("vae",))
    file = out if layout == "diffusers" or out.suffix == SUFFIX else out / f"vae{SUFFIX}"
    return [save_vae(load_vae(path, dtype=stored), file, layout, dtype=dtype)]


def _convert_text(
    path: Path, out: Path, layout: str, dtype: torch.dtype | None, shard_size: int | str | None
) -> list[Path]:
    stored = _stored_dtype(path, ("text_encoder", "text_encoder_2", "text_encoder_3"), _TEXT)
    text = load_text_encoders(path, dtype=stored)
    return save_text_encoders(text, out, layout, dtype=dtype or stored, shard_size=shard_size)


def _convert_all(
    path: Path, out: Path, layout: str, dtype: torch.dtype | None, shard_size: int | str | None
) -> list[Path]:
    """Convert all parts that are there: into one file in the original layout, into folders in diffusers'."""
    parts = find_parts(path)
    if layout == "diffusers":
        _, _, config = open_denoiser(path)
        folder = FOLDERS[0] if config.name == "mmdit" else FOLDERS[1]
        written = convert_denoiser(path, out / folder, layout, dtype=dtype, shard_size=shard_size)
        if "vae" in parts:
            written += _convert_vae(path, out / "vae", layout, dtype)
        written += _convert_text(path, out, layout, dtype, shard_size) if "text" in parts else []
        return written + write_index(path, out)
    file = out if out.suffix == SUFFIX else out / LAYOUTS["original"]
    with tempfile.TemporaryDirectory(dir=_existing(file.parent)) as folder:
        places = {"denoiser": Path(folder, f"denoiser{SUFFIX}"), "vae": Path(folder, f"vae{SUFFIX}")}
        convert_denoiser(path, places["denoiser"], layout, dtype=dtype)
        if "vae" in parts:
            _convert_vae(path, places["vae"], layout, dtype)
        if "text" in parts:
            _convert_text(path, Path(folder, f"text{SUFFIX}"), layout, dtype, None)
        tensors: dict[str, Tensor | Lazy] = {}
        for place in sorted(Path(folder).glob(f"*{SUFFIX}")):
            prefix = "first_stage_model." if place == places["vae"] else ""
            files = open_weights(place)
            tensors |= {
                prefix + key: Lazy(files.shape(key), files.dtype(key), partial(files.read, key)) for key in files
            }
        return write_weights(tensors, file, shard_size=shard_size)


def find_parts(path: Path) -> set[str]:
    """Say which of denoiser, vae and text are in a file or a diffusers folder."""
    if path.is_dir() and any((path / folder).is_dir() for folder in FOLDERS):
        folders = {"vae": "vae", "text": "text_encoder"}
        return {"denoiser", *(part for part, folder in folders.items() if (path / folder).is_dir())}
    found = detect(open_weights(path, FOLDERS)).parts
    return {"text" if name in _TEXT else name for name in found}


def _existing(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
