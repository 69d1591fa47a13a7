"""The header of a .safetensors file, checked before a single weight is read.

A file is 8 bytes (the header's length, little-endian), the header (JSON: name -> dtype, shape, byte range), then the
tensors' bytes without gaps. Whatever contradicts that is told in words, from the header alone, without torch and in
well under two seconds: a download that was cut off, a web page saved under the wrong name, a pickle, lengths that lie.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

MAX_HEADER = 20_000_000  # bytes; the format allows 100 million, SDXL whole has 0.3: parsing more takes seconds
MAX_TENSORS = 100_000  # SDXL whole has 2,500
MAX_NAME = 1_000  # characters of a tensor's name
ITEMSIZE = {  # bytes of one number, by the format's name of its dtype
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_PICKLED = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # how a pickle of protocol 2 to 5 begins
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")


class WeightsError(ValueError):
    """A file of weights that cannot be used: which, why, and what to do."""


class Entry(NamedTuple):
    """One tensor of a file: bytes `start` to `stop` from the beginning of the file; its dtype by the format's name."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def refuse_unreadable(path: str | Path) -> None:
    """Refuse a single file that can be no weights; scripts ask this before they wait for torch.

    Raises:
        WeightsError: as `read_header`, for a file that is there; folders, indices and names of files are left alone.
    """
    path = Path(path)
    if path.suffix in PICKLES and path.is_file():
        raise pickle_error(path)
    if path.suffix == ".safetensors" and path.is_file():
        read_header(path)


def read_header(path: str | Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Read and check a file's header.

    Returns:
        {key: entry} in the file's order, and the file's metadata.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: the file is no safetensors file, is damaged, or is a pickle.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give a .safetensors file, or the folder that holds it")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        _refuse_foreign(path, start, size)
        length = int.from_bytes(start[:8], "little")
        if length > MAX_HEADER:
            raise WeightsError(
                f"{path} is not a safetensors file: it claims a header of {length:,} bytes "
                f"(at most {MAX_HEADER:,} are allowed); download it again"
            )
        if 8 + length > size:
            raise WeightsError(
                f"{path} ends inside its header: it has {size:,} bytes and a header of {length:,}; the download was "
                f"cut off, fetch it again"
            )
        file.seek(8)
        text = file.read(length)
    table, metadata = _parse(path, text)
    return _entries(path, table, 8 + length, size), metadata


def _refuse_foreign(path: Path, start: bytes, size: int) -> None:
    """Recognise by their first bytes the files that people have instead of a safetensors file."""
    text = start.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its repository")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<script")):
        raise WeightsError(
            f"{path} is a web page saved under the name of a file (often a page that asks to log in or to accept a "
            f"licence); accept the licence in a browser and download the file itself"
        )
    plausible = start[8:9] == b"{" and 8 + int.from_bytes(start[:8], "little") <= size
    if start.startswith((b"PK\x03\x04", *_PICKLED)) and not plausible:  # 1,152 is the bytes 80 04, a pickle's too
        raise pickle_error(path)
    if start.startswith(b"GGUF"):
        raise WeightsError(f"{path} is a GGUF file (quantised); use the .safetensors file of the release")
    if size < 8:
        raise WeightsError(f"{path} has {size} bytes; the shortest safetensors file has 8: the download failed")
    if start[8:9] not in (b"{", b""):
        raise WeightsError(f"{path} is not a safetensors file: it begins with {start[:16]!r}; download it again")


def pickle_error(path: Path) -> WeightsError:
    """Return the refusal of a pickle, with the way out."""
    return WeightsError(
        f"{path} is a pickle: opening one can run any code its author put in, so it is not opened. Take the "
        f".safetensors file of the same release, or convert it: the 'safetensors/convert' space on Hugging Face does, "
        f"and so do `torch.load(path, weights_only=True)` followed by `safetensors.torch.save_file`"
    )


def _parse(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    # told before it is parsed, which would take seconds; a brace a tensor, two brackets, and some in the metadata
    if text.count(b"{") > MAX_TENSORS or text.count(b"[") > 2 * MAX_TENSORS:
        raise WeightsError(f"{path} describes more than {MAX_TENSORS:,} tensors; no network has so many")
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} has a damaged header ({error}); download it again") from error
    if not isinstance(table, dict):
        raise WeightsError(f"{path} has a header that is a {type(table).__name__}, not a table of tensors")
    metadata = table.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{path} has a damaged header: its __metadata__ is not a table of strings")
    return table, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands there twice")
    return table


def _entries(path: Path, table: dict[str, Any], offset: int, size: int) -> dict[str, Entry]:
    """Turn the header's table into entries; together they must cover the rest of the file exactly."""
    entries = {}
    for key, described in table.items():
        if len(key) > MAX_NAME:
            raise WeightsError(f"{path} names a tensor {key[:40]!r}... in {len(key):,} characters; is it damaged?")
        try:
            name, shape, (start, stop) = described["dtype"], described["shape"], described["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise WeightsError(f"{path} describes {key!r} without dtype, shape and data_offsets") from error
        if not isinstance(name, str) or name not in ITEMSIZE:
            raise WeightsError(f"{path} holds {key!r} as {name!r}; known are {', '.join(ITEMSIZE)}")
        numbers = [*shape, start, stop] if isinstance(shape, list) else [None]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise WeightsError(f"{path} describes {key!r} with shape {shape!r} and bytes {start!r} to {stop!r}")
        if math.prod(shape) * ITEMSIZE[name] != stop - start:
            raise WeightsError(
                f"{path} is damaged: {key!r} is {name} {shape}, {math.prod(shape) * ITEMSIZE[name]:,} bytes, "
                f"but occupies bytes {start:,} to {stop:,}"
            )
        entries[key] = Entry(path, name, tuple(shape), offset + start, offset + stop)
    _check_cover(path, entries, offset, size)
    return entries


def _check_cover(path: Path, entries: dict[str, Entry], offset: int, size: int) -> None:
    end = offset
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            fault = (
                "overlaps the tensor before it" if entry.start < end else f"leaves {entry.start - end:,} bytes unused"
            )
            raise WeightsError(f"{path} is damaged: {key!r} {fault}")
        end = entry.stop
    if end > size:
        raise WeightsError(
            f"{path} is cut off: it has {size:,} bytes, its header describes {end:,}; download it again "
            f"({100 * size / end:.1f} % is there)"
        )
    if end < size:
        raise WeightsError(f"{path} has {size - end:,} bytes more than its header describes; download it again")


def sync(path: Path) -> None:
    """Push a file or a folder's entries to the disk; without it a power loss leaves empty files under good names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
