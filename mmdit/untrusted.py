"""Files that somebody else has made, read within bounds.

A file may be a pipe that never ends, a link to a device, a hole of terabytes, JSON nested a million deep. Whatever
reads a user's or a download's small files (configs, manifests, records, captions, pictures) reads them through here:
what is too large or too odd is refused in words before it takes memory or time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TABLE_BYTES = 4 << 20  # of a JSON table: an index of SDXL has 0.2 MB; 4 MiB of empty lists parse in a second
TEXT_BYTES = 1 << 20  # of a caption


def read_bytes(path: str | Path, most: int) -> bytes:
    """Read a file of at most `most` bytes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is a folder, a pipe or a device, or larger; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        if path.exists():
            raise ValueError(f"{path} is no regular file (a folder, a pipe or a device)")
        raise FileNotFoundError(f"no file {path}")
    with path.open("rb") as file:
        data = file.read(most + 1) if path.stat().st_size <= most else None
    if data is None or len(data) > most:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; more than {most:,} are not read here")
    return data


def read_text(path: str | Path, most: int = TEXT_BYTES) -> str:
    """Read a text file in UTF-8 of at most `most` bytes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `read_bytes`, or not UTF-8; the message names it.
    """
    data = read_bytes(path, most)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}") from None


def read_json(path: str | Path, most: int = TABLE_BYTES) -> Any:
    """Read a JSON file of at most `most` bytes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `read_text`, or not JSON; the message names it.
    """
    text = read_text(path, most)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
