"""Weights to .safetensors files: one file or shards with an index, tensor by tensor, all or nothing.

Shapes and dtypes are known before the first byte is written, so the header goes first and tensors follow one by one:
writing a 16 GB file costs the memory of its largest tensor. Files are written under temporary names, synced, and only
then renamed; an interrupted save leaves what was there before.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mmdit.weights.files import DTYPES, SHARD, SUFFIX
from mmdit.weights.header import WeightsError, sync

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Lazy(NamedTuple):
    """A tensor that is made when its turn to be written comes; `load` must give this shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


def write_weights(
    tensors: Mapping[str, Tensor | Lazy],
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    shard_size: int | str | None = None,
) -> list[Path]:
    """Write tensors to `path`, or to shards and an index beside it.

    Args:
        tensors: {key: tensor, or how to make it}; on any device.
        path: NAME.safetensors. Shards become NAME-00001-of-0000N.safetensors, as diffusers names them; what an
            earlier save left under the same NAME is replaced.
        metadata: goes into each header; {"format": "pt"}, which other libraries ask for, is added.
        dtype: what floating tensors are converted to; None keeps theirs.
        shard_size: largest file, in bytes or as "5GB"; None: one file. A tensor larger than this has its own shard.

    Returns:
        The files, the index last.

    Raises:
        WeightsError: no tensors, a path that does not end in .safetensors, a shard size that is no size.
        OSError: the disk is full or refuses; nothing is left behind.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise WeightsError(f"weights are written to a {SUFFIX} file, got {path}")
    if not tensors:
        raise WeightsError(f"there are no tensors to write to {path}")
    limit = None if shard_size is None else parse_size(shard_size)
    stored = {key: _stored_dtype(tensor.dtype, dtype) for key, tensor in tensors.items()}
    # widest first, so that every tensor lies at a multiple of its item size
    keys = sorted(tensors, key=lambda key: -stored[key].itemsize)
    sizes = {key: math.prod(tensors[key].shape) * stored[key].itemsize for key in keys}
    shards = _split(keys, sizes, limit)
    stem = path.name.removesuffix(SUFFIX)
    if len(shards) == 1:
        names = [path.name]
    else:
        names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}{SUFFIX}" for i in range(len(shards))]

    path.parent.mkdir(parents=True, exist_ok=True)
    mark = f".tmp-{uuid.uuid4().hex[:8]}"
    written = {name: path.parent / f"{mark}-{name}" for name in names}
    try:
        for name, part in zip(names, shards, strict=True):
            _write_file(written[name], {key: tensors[key] for key in part}, stored, metadata or {})
        if len(shards) > 1:
            index = f"{stem}{SUFFIX}.index.json"
            written[index] = path.parent / f"{mark}-{index}"
            table = {key: name for name, part in zip(names, shards, strict=True) for key in part}
            tree = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": table}
            written[index].write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            sync(written[index])
        for name, temporary in written.items():
            temporary.replace(path.parent / name)
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)
    _remove_earlier(path, keep=set(written))
    sync(path.parent)
    return [path.parent / name for name in written]


def parse_size(size: int | str) -> int:
    """Return bytes of "5GB" (10^9), "2GiB" (2^30), "500MB" or a number.

    Raises:
        WeightsError: it is none of these, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise WeightsError(f"a shard size is a number of bytes or a text such as '5GB' or '2GiB', got {size!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _stored_dtype(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    dtype = wanted if wanted is not None and own.is_floating_point else own
    if dtype not in _NAMES:
        raise WeightsError(f"{dtype} cannot be stored; known are {', '.join(map(str, _NAMES))}")
    return dtype


def _split(keys: list[str], sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """Fill shards in order up to `limit` bytes of tensors."""
    shards: list[list[str]] = [[]]
    filled = 0
    for key in keys:
        if limit is not None and shards[-1] and filled + sizes[key] > limit:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += sizes[key]
    return shards


def _write_file(
    path: Path, tensors: Mapping[str, Tensor | Lazy], stored: Mapping[str, torch.dtype], metadata: Mapping[str, str]
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for key, tensor in tensors.items():
        size = math.prod(tensor.shape) * stored[key].itemsize
        header[key] = {
            "dtype": _NAMES[stored[key]],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, tensor in tensors.items():
            made = tensor.load() if isinstance(tensor, Lazy) else tensor
            assert made.shape == tuple(tensor.shape), key
            whole = made.detach().to(device="cpu", dtype=stored[key]).contiguous()
            file.write(memoryview(whole.view(-1).view(torch.uint8).numpy()))
            del made, whole
    sync(path)


def _remove_earlier(path: Path, keep: set[str]) -> None:
    """Remove the files of an earlier save under the same name, which a reader would find beside the new ones."""
    stem = path.name.removesuffix(SUFFIX)
    for file in path.parent.glob(f"*{SUFFIX}*"):
        shard = SHARD.fullmatch(file.name.removesuffix(SUFFIX))
        ours = file.name in (path.name, f"{path.name}.index.json") or (shard is not None and shard["stem"] == stem)
        if ours and file.name not in keep:
            file.unlink()
