"""Pictures and captions in tar or parquet shards: sets too large for one folder, read in place, in an exact order.

    data: {name: shards, source: "pictures/*.tar"}       a.jpg and a.txt (or a.json with a caption) in each tar

Each shard is indexed once (where every picture and caption lies); after that any item is one read. So no shuffle
buffer is needed: the order of training is a function of (seed, position), as for every other data set here, and a run
goes on exactly where it was in any number of processes.

The order is made for disks. An epoch puts the units (a tar, a row group of a parquet) in random order and shuffles
within each; that sequence is cut into `lanes` equal parts, and a batch takes an equal share from each lane. A process
works on the same lanes throughout, so it opens only its own part of the shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mmdit import rng
from mmdit.config import ShardsConfig
from mmdit.data.archives import check_parquet, read_arrays, read_row_group, walk_tar
from mmdit.data.images import MOST_BYTES, SUFFIXES, DataError, cleaned, decode, square
from mmdit.untrusted import TEXT_BYTES

SPLITS = ("train", "val", "seen")
_REMEMBERED = 100_000  # items whose usability is kept in mind
_LOG = logging.getLogger(__name__)


class Unit(NamedTuple):
    """A run of items that are near each other on disk: a tar, or one row group of a parquet file.

    Attributes:
        file: the shard.
        group: number of the row group; -1 for a tar.
        keys: a name per item, unique in its shard.
        places: int64 [n, 4], offset and size of picture and caption in a tar; empty for parquet.
        in_json: bool [n], whether the caption stands in a JSON file (tar).
    """

    file: Path
    group: int
    keys: np.ndarray
    places: np.ndarray
    in_json: np.ndarray


class ShardsDataset:
    """Pictures and captions of one split, by number, in the order of the sorted shards.

    An item belongs to `val` by the hash of its key, as in `images`, so the split survives new shards.

    Raises:
        FileNotFoundError: no shard matches the source.
        DataError: a shard cannot be read, a picture has no caption, or a split is empty; names the files.
    """

    def __init__(self, config: ShardsConfig, split: str = "train") -> None:
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r} of shards; known: {', '.join(SPLITS)}")
        self.config, self.split = config, split
        self._units = _units(config)
        shares = [_shares(unit) for unit in self._units]
        # a small set keeps at least one item for validation, unless validation was switched off
        least = min(float(s.min()) for s in shares if len(s))
        border = max(config.val_fraction, least + 2**-53) if config.val_fraction > 0 else 0.0
        self._items = [np.flatnonzero((s < border) == (split != "train")) for s in shares]
        self._sizes = np.array([len(items) for items in self._items])
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        if not len(self):
            raise DataError(f"{config.source}: split {split!r} is empty at data.val_fraction {config.val_fraction}")
        self._groups: OrderedDict[int, Any] = OrderedDict()
        self._files: OrderedDict[Path, int] = OrderedDict()
        self._stand_ins: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def fingerprint(self) -> str:
        """Hash of what decides pixels and captions: names, sizes and times of the shards, and the rules."""
        digest = hashlib.sha256(f"shards|1|{self.split}|{self.config.model_dump_json()}".encode())
        for file in dict.fromkeys(unit.file for unit in self._units):
            status = file.stat()
            digest.update(f"{file.name}|{status.st_size}|{status.st_mtime_ns}".encode())
        return digest.hexdigest()[:32]

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Return the captions of items.

        Raises:
            DataError: as `pixels`.
        """
        if self.config.on_error == "skip":
            return [self._caption(*self._find(self._usable(int(index)))) for index in indices]
        return [self._caption(*self._find(int(index))) for index in indices]

    def pixels(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Decode items: the middle square, resized, uint8 [B, R, R, 3].

        Raises:
            DataError: a picture or caption cannot be used and `on_error` is `fail`; names shard and item.
        """
        return np.stack([square(self._picture(int(index)), self.config.resolution) for index in indices])

    def order(self, seed: int, positions: np.ndarray, batch_size: int) -> np.ndarray:
        """Return which item stands at each position of the endless stream of training samples, int64 [B].

        Items beyond a multiple of `lanes` sit an epoch out, others each time.

        Raises:
            DataError: `lanes` divides no batch of this size, or there are fewer items than lanes.
        """
        lanes, length = self.config.lanes, len(self) // self.config.lanes
        if batch_size % lanes or not length:
            raise DataError(
                f"data.lanes {lanes} must divide train.batch_size {batch_size} and be at most the {len(self)} items"
            )
        share = batch_size // lanes
        batches, inside = np.divmod(np.asarray(positions, dtype=np.int64), batch_size)
        numbers = batches * share + inside % share  # how many items the lane has given before
        epochs, steps = np.divmod(numbers, length)
        places = inside // share * length + steps
        return np.array([self._at(seed, int(e), int(p)) for e, p in zip(epochs, places, strict=True)], dtype=np.int64)

    def _at(self, seed: int, epoch: int, place: int) -> int:
        order, ends = self._epoch(seed, epoch)
        turn = int(np.searchsorted(ends, place, side="right"))
        unit = int(order[turn])
        inner = place - (int(ends[turn - 1]) if turn else 0)
        return int(self._starts[unit] + _shuffled(seed, epoch, unit, int(self._sizes[unit]))[inner])

    def _epoch(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = rng.permutation(seed, epoch, len(self._units))
        return order, np.cumsum(self._sizes[order])

    def _find(self, index: int) -> tuple[int, int]:
        """Return the unit of an item and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        unit = int(np.searchsorted(self._starts, index, side="right")) - 1
        return unit, int(self._items[unit][index - self._starts[unit]])

    def _name(self, unit: int, row: int) -> str:
        return f"{self._units[unit].file}: {self._units[unit].keys[row]}"

    def _caption(self, unit: int, row: int) -> str:
        here = self._units[unit]
        if here.group >= 0:
            caption = self._table(unit)[self.config.caption_column][row].as_py()
        else:
            try:
                text = self._read(here.file, here.places[row, 2:], TEXT_BYTES).decode("utf-8-sig")
                caption = json.loads(text).get(self.config.caption_column) if here.in_json[row] else text
            except (ValueError, AttributeError, RecursionError) as error:
                raise DataError(f"{self._name(unit, row)}: caption cannot be read: {error}") from error
        if not isinstance(caption, str) or not caption.strip():
            raise DataError(f"{self._name(unit, row)}: caption is empty or no text: {caption!r:.60}")
        try:
            return cleaned(caption) if self.config.clean_captions else caption.strip()
        except ValueError as error:
            raise DataError(f"{self._name(unit, row)}: {error}") from error

    def _picture(self, index: int) -> Image.Image:
        """Decode the picture of an item, or of the one that stands in for it."""
        if self.config.on_error == "skip":
            index = self._usable(index)
        return self._decode(index)

    def _decode(self, index: int) -> Image.Image:
        unit, row = self._find(index)
        try:
            return decode(self._bytes(unit, row))
        except (ValueError, OSError) as error:
            hint = "data.on_error: skip puts the next good item in its place"
            raise DataError(f"{self._name(unit, row)}: {error} ({hint})") from error

    def _usable(self, index: int) -> int:
        """Return the item itself, or the next after it whose picture and caption are good: the same every time."""
        if index not in self._stand_ins:
            if len(self._stand_ins) >= _REMEMBERED:
                self._stand_ins.popitem(last=False)
            self._stand_ins[index] = self._next_good(index)
        return self._stand_ins[index]

    def _next_good(self, index: int) -> int:
        for step in range(len(self)):
            there = (index + step) % len(self)
            try:
                self._decode(there)
                self._caption(*self._find(there))
                return there
            except DataError as error:
                _LOG.warning("%s; the next item stands in for it", error)
        raise DataError(f"{self.config.source}: no item can be used")

    def _bytes(self, unit: int, row: int) -> bytes:
        here = self._units[unit]
        if here.group < 0:
            return self._read(here.file, here.places[row, :2], MOST_BYTES)
        cell = self._table(unit)[self.config.image_column][row].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            raise ValueError(f"column {self.config.image_column!r} holds no image bytes")
        return data

    def _read(self, file: Path, place: np.ndarray, most: int) -> bytes:
        """Read a piece (offset, size) of a file of at most so many bytes; files stay open, the least used is closed."""
        offset, size = place.tolist()
        if size > most:
            raise ValueError(f"it has {size:,} bytes; more than {most:,} are not read")
        if file not in self._files:
            if len(self._files) >= 2 * self.config.lanes:
                os.close(self._files.popitem(last=False)[1])
            self._files[file] = os.open(file, os.O_RDONLY)
        self._files.move_to_end(file)
        data = os.pread(self._files[file], size, offset)
        if len(data) != size:
            raise ValueError(f"{file} is shorter than when it was indexed")
        return data

    def _table(self, unit: int) -> Any:
        """Read a row group; as many as there are lanes stay in memory."""
        import pyarrow.parquet

        if unit not in self._groups:
            if len(self._groups) >= self.config.lanes:
                self._groups.popitem(last=False)
            here = self._units[unit]
            columns = [self.config.image_column, self.config.caption_column]
            try:
                self._groups[unit] = read_row_group(pyarrow.parquet.ParquetFile(here.file), here.group, columns)
            except (ValueError, OSError) as error:
                raise DataError(f"{here.file} cannot be read: {error}") from error
        self._groups.move_to_end(unit)
        return self._groups[unit]


@lru_cache(maxsize=256)
def _shuffled(seed: int, epoch: int, unit: int, size: int) -> np.ndarray:
    return rng.generator(seed, "data_order", epoch, step=unit + 1).permutation(size)


def _shares(unit: Unit) -> np.ndarray:
    """Return a number in [0, 1) per item, by the hash of its key."""
    digests = (hashlib.blake2b(str(key).encode(), digest_size=8).digest() for key in unit.keys)
    return np.array([int.from_bytes(digest, "little") / 2**64 for digest in digests])


# --- indexing -----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _units(config: ShardsConfig) -> tuple[Unit, ...]:
    """Index all shards, or read the indices of an earlier time."""
    files = find_shards(config.source)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda file: _try_index(file, config), files))
    bad = [result for result in found if isinstance(result, str)]
    if bad:
        listing = "".join(f"\n  {line}" for line in bad[:20])
        raise DataError(f"{config.source}: {len(bad)} of {len(files)} shards cannot be used:{listing}")
    return tuple(unit for units in found if not isinstance(units, str) for unit in units)


def find_shards(source: str) -> list[Path]:
    """Return the shards of a folder, one file, or a pattern with * and ?; sorted by name.

    Raises:
        FileNotFoundError: there are none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.suffix in (".tar", ".parquet")]
    elif path.is_file():
        found = [path]
    else:
        parts = path.parts
        fixed = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), len(parts))
        root = Path(*parts[:fixed])
        found = list(root.glob("/".join(parts[fixed:]))) if fixed < len(parts) and root.is_dir() else []
    if not found:
        raise FileNotFoundError(
            f"{source}: no .tar or .parquet shards; data.source names a folder, a file or a pattern such as "
            f"pictures/*.tar"
        )
    return sorted(found)


def _try_index(file: Path, config: ShardsConfig) -> list[Unit] | str:
    if not file.is_file():
        return f"{file}: no regular file (a folder, a pipe or a device)"
    try:
        return _parquet_units(file, config) if file.suffix == ".parquet" else [_tar_unit(file, config)]
    except (OSError, ValueError, KeyError) as error:
        return f"{file}: {type(error).__name__}: {error}"


def _parquet_units(file: Path, config: ShardsConfig) -> list[Unit]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        opened = pyarrow.parquet.ParquetFile(file)
    except pyarrow.lib.ArrowException as error:
        raise ValueError(str(error)) from error
    missing = [c for c in (config.image_column, config.caption_column) if c not in opened.schema_arrow.names]
    if missing:
        raise ValueError(f"no column {', '.join(missing)}; it has {', '.join(opened.schema_arrow.names)}")
    check_parquet(opened, file.stat().st_size, (config.image_column, config.caption_column))
    none = np.empty((0, 4), dtype=np.int64)
    units, first = [], 0
    for group in range(opened.num_row_groups):
        count = opened.metadata.row_group(group).num_rows
        keys = np.array([f"{file.name}/{first + row}" for row in range(count)])
        units.append(Unit(file, group, keys, none, np.empty(0, dtype=bool)))
        first += count
    return units


def _tar_unit(file: Path, config: ShardsConfig) -> Unit:
    """Read or make the index of a tar; it is kept beside the shard, or in `data.index`."""
    folder = config.index or file.parent
    name = f"{file.name}.index.npz" if config.index is None else f"{_short(file)}-{file.name}.index.npz"
    status = file.stat()
    stamp = np.array([1, status.st_size, status.st_mtime_ns])
    try:
        stored = read_arrays(folder / name, ("stamp", "keys", "places", "in_json"))
        unit = Unit(file, -1, stored["keys"], stored["places"], stored["in_json"])
        if np.array_equal(stored["stamp"], stamp) and _lies_within(unit, status.st_size):
            return unit
    except (OSError, ValueError, KeyError):
        pass  # none yet, of another time, or torn: it is made anew
    unit = _scan_tar(file)
    data = io.BytesIO()
    np.savez(data, stamp=stamp, keys=unit.keys, places=unit.places, in_json=unit.in_json)
    temporary = folder / f".{name}.{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data.getvalue())
        temporary.replace(folder / name)
    except OSError as error:
        raise ValueError(f"its index cannot be kept in {folder} ({error}); set data.index to a folder") from error
    return unit


def _lies_within(unit: Unit, size: int) -> bool:
    """Say whether an index speaks of places in its shard: one that came with a download may say anything."""
    places, count = unit.places, len(unit.keys)
    if places.shape != (count, 4) or places.dtype != np.int64 or unit.in_json.shape != (count,):
        return False
    ends = places[:, ::2].astype(np.float64) + places[:, 1::2]
    return bool(unit.keys.dtype.kind == "U" and count and places.min() >= 0 and ends.max() <= size)


def _short(file: Path) -> str:
    return hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]


def _scan_tar(file: Path) -> Unit:
    """Walk through a tar's headers and pair each picture with its caption."""
    pictures: dict[str, tuple[int, int]] = {}
    texts: dict[str, tuple[int, int, bool]] = {}
    for name, offset, size in walk_tar(file):
        key, dot, suffix = name.rpartition(".")
        if dot and f".{suffix.lower()}" in SUFFIXES:
            pictures[key] = (offset, size)
        elif suffix == "txt" or (suffix == "json" and key not in texts):
            texts[key] = (offset, size, suffix == "json")
    lone = [key for key in pictures if key not in texts]
    if lone:
        raise ValueError(f"{len(lone)} picture(s) have no .txt or .json beside them, the first is {lone[0]!r}")
    if not pictures:
        raise ValueError("it holds no picture")
    keys = sorted(pictures)
    places = np.array([(*pictures[key], *texts[key][:2]) for key in keys], dtype=np.int64)
    return Unit(file, -1, np.array(keys), places, np.array([texts[key][2] for key in keys]))
