"""Archives that somebody else has made: .npz, .tar and .parquet, read in bounds and without running anything.

numpy, tarfile and pyarrow take a file at its word: a kilobyte of .npz or .parquet unpacks to gigabytes, a tar header
makes Python 3.11's tarfile search for hours or go round for ever. Here sizes are looked at first, and what a file says
of itself is held against what it has.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

FREE = 64 << 20  # bytes that anything may unpack to
RATIO = 100  # times its packed size: what more unpacks to is a bomb (numbers and pictures hardly shrink)
_BLOCK = 512  # of a tar
_MOST_HEAD = 1 << 20  # bytes of a tar's extended header or long name
_PIECE = 1 << 22  # bytes read at once


# --- npz ----------------------------------------------------------------------------------------------------------


def array_names(path: str | Path) -> list[str]:
    """Return the names of the arrays in an .npz file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an .npz; the message names it.
    """
    with _opened(path) as archive:
        return [info.filename.removesuffix(".npy") for info in archive.infolist() if info.filename.endswith(".npy")]


def read_arrays(path: str | Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read those of the named arrays that an .npz file holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an .npz, damaged, an array of objects, or one that unpacks to far more than the file has; the
            message names it.
    """
    with _opened(path) as archive:
        there = {info.filename: info for info in archive.infolist()}
        found, size = {}, Path(path).stat().st_size
        for name in names:
            info = there.get(f"{name}.npy")
            if info is None:
                continue
            try:
                with archive.open(info) as stream:
                    found[name] = _read_array(stream, min(info.compress_size, size))
            except Exception as error:  # zipfile and numpy raise what comes to them: nine kinds were seen
                raise ValueError(
                    f"{path} is no readable .npz of arrays: {name} ({type(error).__name__}: {error!s:.300})"
                ) from None
    return found


def _opened(path: str | Path) -> zipfile.ZipFile:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file {path}")
    try:
        if not path.is_file():
            raise ValueError("a folder, a pipe or a device")
        return zipfile.ZipFile(path)
    except Exception as error:  # as above
        raise ValueError(f"{path} is no readable .npz of arrays ({type(error).__name__}: {error!s:.300})") from None


def _read_array(stream: Any, packed: int) -> np.ndarray:
    """Read one array of a stream whose content has so many bytes in the file."""
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"version {version} of the format")
    shape, fortran, dtype = read[version](stream)
    if dtype.hasobject:
        raise ValueError("Python objects, which would be unpickled")
    if any(side < 0 for side in shape):
        raise ValueError(f"shape {shape}")
    size = math.prod(shape) * dtype.itemsize
    if size > max(FREE, RATIO * packed):
        raise ValueError(f"it claims {size:,} bytes out of {packed:,}")
    array = np.empty(math.prod(shape), dtype)
    content, place = array.view(np.uint8), 0
    while place < size:
        piece = stream.read(min(_PIECE, size - place))
        if not piece:
            raise ValueError(f"it has {place:,} of {size:,} bytes")
        content[place : place + len(piece)] = np.frombuffer(piece, np.uint8)
        place += len(piece)
    return array.reshape(shape, order="F" if fortran else "C")


# --- tar ----------------------------------------------------------------------------------------------------------


def walk_tar(file: Path) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, size) of a tar's regular files, from its headers alone; nothing is unpacked.

    Names are told as they stand, `../` included: they are no paths here. ustar, GNU long names and pax headers are
    known; a sparse file is refused, because its bytes do not lie in one piece.

    Raises:
        ValueError: not a tar, damaged, or cut off; says at which byte.

    Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar manual, "Basic Tar Format".
    """
    end = file.stat().st_size
    everywhere: dict[str, str] = {}
    with file.open("rb") as stream:
        place, own = 0, dict(everywhere)
        while place < end:
            head = _read_exactly(stream, place, _BLOCK, end)
            if not any(head):
                return
            _check_sum(head, place)
            kind, size, start = head[156:157], _number(head[124:136], place), place + _BLOCK
            if kind in b"xgLK":
                if size > _MOST_HEAD:
                    raise ValueError(f"the extended header at byte {place:,} claims {size:,} bytes")
                content = _read_exactly(stream, start, size, end)
                if kind == b"g":
                    everywhere |= _pax(content, place)
                    own = {**everywhere, **own}
                elif kind == b"x":
                    own |= _pax(content, place)
                elif kind == b"L":
                    own["path"] = _text(content)
                place = start + -(-size // _BLOCK) * _BLOCK
                continue
            name = own.get("path", _plain_name(head))
            if "size" in own:
                size = _decimal(own["size"], place)
            if kind == b"S" or any(key.startswith("GNU.sparse.") for key in own):
                raise ValueError(f"{name!r:.200} is sparse; write the shard without holes (tar without --sparse)")
            holds = kind not in b"123456"  # links, devices and folders have no content
            if holds and start + size > end:
                raise ValueError(f"{name!r:.200} is cut off: {size:,} bytes at byte {start:,} of {end:,}")
            if kind in b"0\x007" and not (kind == b"\0" and name.endswith("/")):
                yield name, start, size
            place = start + (-(-size // _BLOCK) * _BLOCK if holds else 0)
            own = dict(everywhere)
    if not end:
        raise ValueError("it is empty")


def _read_exactly(stream: BinaryIO, place: int, size: int, end: int) -> bytes:
    if place + size > end:
        raise ValueError(f"it ends at byte {end:,}, inside the header at {place:,}")
    stream.seek(place)
    return stream.read(size)


def _check_sum(head: bytes, place: int) -> None:
    """Compare a header with its sum, of signed bytes too, as old tars have it."""
    blank = head[:148] + b" " * 8 + head[156:]
    total = sum(blank)
    if _number(head[148:156], place) not in (total, total - 256 * sum(byte > 127 for byte in blank)):
        raise ValueError(f"no tar header at byte {place:,}")


def _number(digits: bytes, place: int) -> int:
    """Read a number: octal digits, or base 256 where the first bit is set."""
    if digits[0] & 0x80:
        value = int.from_bytes(digits, "big", signed=True) if digits[0] == 0xFF else int.from_bytes(digits[1:], "big")
    else:
        text = digits.partition(b"\0")[0].strip()
        if text.strip(b"01234567"):
            raise ValueError(f"no tar header at byte {place:,}")
        value = int(text or b"0", 8)
    if value < 0:
        raise ValueError(f"a size below zero at byte {place:,}")
    return value


def _plain_name(head: bytes) -> str:
    name = _text(head[:100])
    prefix = _text(head[345:500]) if head[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _text(content: bytes) -> str:
    return content.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _pax(content: bytes, place: int) -> dict[str, str]:
    """Read the records of an extended header: "<length> <key>=<value>\\n"."""
    found, start = {}, 0
    while start < len(content) and content[start]:
        digits = content[start : start + 8].partition(b" ")[0]
        length = _decimal(digits.decode("ascii", "replace"), place)
        key, equals, value = content[start + len(digits) + 1 : start + length - 1].partition(b"=")
        if not equals or content[start + length - 1 : start + length] != b"\n":
            raise ValueError(f"a damaged extended header at byte {place:,}")
        found[_text(key)] = _text(value)
        start += length
    return found


def _decimal(digits: str, place: int) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) < 19):
        raise ValueError(f"{digits!r:.40} is no number, in the extended header at byte {place:,}")
    return int(digits)


# --- parquet ------------------------------------------------------------------------------------------------------


def check_parquet(opened: Any, size: int, columns: Sequence[str] | None = None) -> None:
    """Look at what the columns of each row group unpack to, by the file's own account.

    Args:
        opened: a pyarrow.parquet.ParquetFile.
        size: of the file, in bytes.
        columns: those that will be read; None: all.

    Raises:
        ValueError: far more than they take in the file.
    """
    for group in range(opened.num_row_groups):
        unpacked, packed = _sizes(opened, group, columns)
        if unpacked > max(FREE, RATIO * min(packed, size)):
            raise ValueError(f"row group {group} claims {unpacked:,} bytes out of {packed:,}")


def read_row_group(opened: Any, group: int, columns: Sequence[str]) -> Any:
    """Read a row group as a pyarrow.Table, piece by piece: one value in a dictionary may stand for gigabytes.

    Raises:
        ValueError: it unpacks to far more than its pages hold.
    """
    import pyarrow

    return pyarrow.Table.from_batches(list(_pieces(opened, group, columns)))


def check_dictionaries(opened: Any) -> None:
    """Unpack those row groups, and keep nothing, in which one value could stand for more than memory has room for.

    Raises:
        ValueError: as `read_row_group`.
    """
    for group in range(opened.num_row_groups):
        described = opened.metadata.row_group(group)
        parts = [described.column(i) for i in range(described.num_columns)]
        most = described.num_rows * sum(p.total_uncompressed_size for p in parts if p.has_dictionary_page)
        if most > 4 * FREE:
            for _ in _pieces(opened, group, None):
                pass


def _pieces(opened: Any, group: int, columns: Sequence[str] | None) -> Iterator[Any]:
    """Yield the record batches of a row group."""
    unpacked, _ = _sizes(opened, group, columns)
    rows = max(1, min(65_536, FREE // max(1, unpacked)))  # no value is larger than all pages together
    size = 0
    for piece in opened.iter_batches(rows, row_groups=[group], columns=None if columns is None else list(columns)):
        size += piece.nbytes
        if size > max(4 * FREE, 4 * unpacked):
            raise ValueError(f"row group {group} unpacks to more than {size:,} bytes out of pages of {unpacked:,}")
        yield piece


def _sizes(opened: Any, group: int, columns: Sequence[str] | None) -> tuple[int, int]:
    """Return how many bytes columns have in their pages, and packed in the file."""
    described = opened.metadata.row_group(group)
    parts = [described.column(i) for i in range(described.num_columns)]
    chosen = [part for part in parts if columns is None or part.path_in_schema.partition(".")[0] in columns]
    return sum(part.total_uncompressed_size for part in chosen), sum(part.total_compressed_size for part in chosen)
