"""Rows of arrays on disk in parts: each written once by whoever comes first, checksummed, memory-mapped.

    <folder>/parts.json                          what this store is, and into how many rows it is cut
             00000.latents.npy  00000.json       a part: its arrays, then the record that makes it count
             00001.latents.npy  00001.json

A killed process costs the part it was at. Several processes, on one machine or on many over a shared disk, start the
same command and share the parts between them: each takes those that nobody holds. Reading is by batched index.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmdit.untrusted import read_json

Arrays = dict[str, np.ndarray]
Encode = Callable[[np.ndarray], Arrays]  # row numbers -> arrays of those rows

_CHUNK = 1 << 22


class Rows:
    """Arrays of equal length, in one or several parts; `take` gathers rows of one of them.

    A ragged array is stored as `<name>` [items of all rows, ...] beside `<name>.count` int64 [rows].
    """

    def __init__(self, parts: Sequence[Arrays]) -> None:
        self.parts = list(parts)
        first = next(name for name in self.parts[0] if f"{name}.count" not in self.parts[0])
        self._starts = np.concatenate([[0], np.cumsum([len(part[first]) for part in self.parts])])
        self._offsets = {
            name: [np.concatenate([[0], np.cumsum(part[f"{name}.count"])]) for part in self.parts]
            for name in self.parts[0]
            if f"{name}.count" in self.parts[0]
        }

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __contains__(self, name: str) -> bool:
        return name in self.parts[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one row, of a ragged array that of one item."""
        return tuple(self.parts[0][name].shape[1:])

    def take(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Return rows, [B, ...]."""
        indices = np.asarray(indices)
        if len(self.parts) == 1:
            return np.asarray(self.parts[0][name][indices])
        found = np.empty((len(indices), *self.shape(name)), self.parts[0][name].dtype)
        for part, here, inside in self._split(indices):
            found[here] = self.parts[part][name][inside]
        return found

    def take_ragged(self, name: str, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return rows padded with zeros to the longest, [B, longest, ...], and their lengths int64 [B]."""
        indices = np.asarray(indices)
        counts = self.take(f"{name}.count", indices)
        found = np.zeros((len(indices), int(counts.max(initial=0)), *self.shape(name)), self.parts[0][name].dtype)
        for part, here, inside in self._split(indices):
            array, starts = self.parts[part][name], self._offsets[name][part][inside]
            lengths = counts[here]
            rows = np.repeat(here, lengths)
            columns = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            found[rows, columns] = array[np.repeat(starts, lengths) + columns]
        return found, counts

    def _split(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield (part, places in `indices`, rows inside the part)."""
        homes = np.searchsorted(self._starts, indices, side="right") - 1
        for part in np.unique(homes):
            here = np.flatnonzero(homes == part)
            yield int(part), here, indices[here] - self._starts[part]


def build(
    folder: Path,
    key: dict[str, Any],
    count: int,
    part_rows: int,
    encode: Encode,
    *,
    verify: bool = True,
    progress: bool = False,
    label: str = "",
    say: Callable[[str], None] = print,
) -> Rows:
    """Open a store, encoding the parts that are not there or not whole.

    Args:
        folder: of this store alone; its name should be a hash of `key`.
        key: everything that decides the content; JSON types.
        count, part_rows: rows in all, and in a part.
        encode: makes the arrays of some rows.
        verify: compare each part with its SHA-256; else only sizes.
        progress, label: of the bar.
        say: told which parts were damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, {"key": key, "count": count, "part_rows": part_rows})
    starts = list(range(0, count, part_rows))
    sizes = [min(part_rows, count - start) for start in starts]
    with ThreadPoolExecutor() as pool:
        states = list(pool.map(lambda part: look(folder, part, sizes[part], verify), range(len(starts))))
    for part, state in enumerate(states):
        if state not in ("whole", "absent"):
            say(f"{folder.name}: part {part} of {len(starts)} {state}; it is encoded anew")
    waiting = [part for part, state in enumerate(states) if state != "whole"]
    bar = tqdm(total=count, initial=count - sum(sizes[part] for part in waiting), desc=label,
               unit=" rows", disable=not (progress and waiting))  # fmt: skip
    bad = {part for part in waiting if states[part] != "absent"}
    with bar:
        while waiting:
            before = len(waiting)
            for part in list(waiting):
                with _lock(folder / f".lock-{part:05d}") as mine:
                    if not mine:
                        continue
                    rows = np.arange(starts[part], starts[part] + sizes[part])
                    if part in bad or look(folder, part, sizes[part], verify=False) != "whole":
                        _write(folder, part, encode(rows))
                        bad.discard(part)
                    waiting.remove(part)
                    bar.update(len(rows))
            if len(waiting) == before:
                time.sleep(0.2)  # others are at work on all that is left
    return Rows([_open(folder, part) for part in range(len(starts))])


def in_memory(count: int, encode: Encode) -> Rows:
    """Encode everything at once, on no disk."""
    return Rows([encode(np.arange(count))])


def look(folder: Path, part: int, rows: int, verify: bool) -> str:
    """Return `whole`, `absent`, or in words what is wrong with a part of so many rows."""
    try:
        files = read_json(folder / f"{part:05d}.json")["files"]
        entries = {str(name): (int(size), str(digest)) for name, (size, digest) in files.items()}
    except FileNotFoundError:
        return "absent"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "has a damaged record"
    if not entries:
        return "has a record of nothing"
    for name, (size, digest) in entries.items():
        file = folder / name
        if not re.fullmatch(rf"{part:05d}\.[\w.]+\.npy", name):
            return f"has a record of another file ({name!r:.80})"
        if not file.is_file() or file.stat().st_size != size:
            return f"lacks {name} or has another size of it"
        if verify and _sha256(file) != digest:
            return f"has changed since it was written ({name}: SHA-256 differs)"
    try:
        _check_rows(_open(folder, part), rows)
    except (OSError, ValueError) as error:  # hashes that fit: a cache that somebody else has made
        return f"holds no arrays of {rows} rows ({error!s:.200})"
    return "whole"


def _check_rows(arrays: Arrays, rows: int) -> None:
    """Raise ValueError where arrays are not of so many rows, ragged ones by their counts."""
    for name, array in arrays.items():
        counts = arrays.get(f"{name}.count")
        wanted = rows if counts is None else int(counts.sum())
        if array.ndim < 1 or len(array) != wanted:
            raise ValueError(f"{name} has shape {list(array.shape)}")
        if name.endswith(".count") and (array.dtype != np.int64 or array.min(initial=0) < 0):
            raise ValueError(f"{name} holds no counts")


def is_complete(folder: Path, key: dict[str, Any], verify: bool) -> bool:
    """Say whether every part of a store of this key is there and whole."""
    try:
        head = read_json(folder / "parts.json")
        count, most = head["count"], head["part_rows"]
        parts = [(part, min(most, count - part * most)) for part in range(-(-count // most))]
        if head["key"] != json.loads(json.dumps(key)):
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    with ThreadPoolExecutor() as pool:
        return all(pool.map(lambda part: look(folder, part[0], part[1], verify) == "whole", parts))


def _claim(folder: Path, head: dict[str, Any]) -> None:
    """Write what the store is, or make sure that it is that."""
    path = folder / "parts.json"
    text = json.dumps(head, sort_keys=True)
    with _lock(folder / ".lock", wait=True):
        try:
            same = read_json(path) == json.loads(text)
        except (OSError, ValueError):
            same = False
        if not same:  # another key under this name, or none: whatever lies here is not ours
            for record in folder.glob("[0-9]*.json"):
                record.unlink()
            _replace(path, text.encode())


def _write(folder: Path, part: int, arrays: Arrays) -> None:
    """Write the arrays of a part, then its record."""
    (folder / f"{part:05d}.json").unlink(missing_ok=True)
    files = {}
    for name, array in arrays.items():
        file = folder / f"{part:05d}.{name}.npy"
        temporary = file.with_name(f".{file.name}.tmp")
        temporary.unlink(missing_ok=True)  # it may be a link that leads elsewhere
        with temporary.open("wb") as stream:
            np.save(stream, np.ascontiguousarray(array), allow_pickle=False)
        files[file.name] = (temporary.stat().st_size, _sha256(temporary))
        temporary.replace(file)
    _replace(folder / f"{part:05d}.json", json.dumps({"files": files}, indent=1).encode())


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # as above
    temporary.write_bytes(data)
    temporary.replace(path)


def _open(folder: Path, part: int) -> Arrays:
    """Map the arrays of a part into memory; small ones are read."""
    found: Arrays = {}
    for name in read_json(folder / f"{part:05d}.json")["files"]:
        mapped = np.load(folder / name, mmap_mode="r", allow_pickle=False)
        key = name.partition(".")[2].removesuffix(".npy")
        found[key] = np.asarray(mapped).copy() if key.endswith(".count") else mapped
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold a lock, or learn that another has it; a process that died holding it has released it."""
    if path.is_symlink():  # opened for writing, it would make or empty a file elsewhere
        path.unlink()
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "rb+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
