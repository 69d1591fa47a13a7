"""Sets of pictures to be judged, from any place: folder, list of files, table, array. Read lazily, batch by batch.

Pictures are decoded by the rules of `mmdit.data.images` (upright, RGB, transparency on white). The order of a set is
fixed: relative path for folders, the order written for everything else.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmdit.data.archives import array_names, read_arrays
from mmdit.data.images import (
    FORMATS,
    MOST_BYTES,
    SUFFIXES,
    DataError,
    decode,
    image_bytes,
    open_table,
    row_name,
    square,
)
from mmdit.untrusted import read_bytes, read_text

_TABLES = ("*.parquet", "*.arrow", "dataset_dict.json", "state.json")
_ROTATED = (5, 6, 7, 8)  # values of EXIF's orientation that swap height and width
_LISTED = 20  # bad items an error names
_LIST_BYTES = 1 << 28  # of a list of files or captions: a million captions have a tenth of it


@dataclass(frozen=True)
class ImageSet:
    """Pictures in a fixed order.

    Attributes:
        source: where they come from, for people.
        names: one a picture, for messages and captions.
        data: index to the encoded picture (an array's bytes where it is none).
        decode: encoded picture to uint8 [H, W, 3].
        side: pixels of the middle square that each is cut and resized to; 0: as it is.
        captions: those the source itself holds.
    """

    source: str
    names: tuple[str, ...]
    data: Callable[[int], bytes]
    decode: Callable[[bytes], np.ndarray]
    side: int = 0
    captions: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def digest(self, index: int) -> bytes:
        """Hash of what decides picture `index`: its encoded bytes and the square it is cut to."""
        return hashlib.sha256(self._data(index) + f"|{self.side}".encode()).digest()

    def picture(self, index: int) -> np.ndarray:
        """Return picture `index`, uint8 [H, W, 3].

        Raises:
            DataError: it cannot be read or decoded; the message names it.
        """
        try:
            return self.decode(self._data(index))
        except ValueError as error:
            raise DataError(f"{self.source}: {self.names[index]}: {error}") from error

    def batches(self, batch_size: int) -> Iterator[list[np.ndarray]]:
        """Yield the pictures in order, `batch_size` at a time."""
        for start in range(0, len(self), batch_size):
            yield [self.picture(i) for i in range(start, min(start + batch_size, len(self)))]

    def head(self, count: int) -> ImageSet:
        """Return the first `count` pictures."""
        captions = self.captions[:count] if self.captions is not None else None
        return replace(self, names=self.names[:count], captions=captions)

    def _data(self, index: int) -> bytes:
        try:
            return self.data(index)
        except (OSError, ValueError) as error:
            raise DataError(f"{self.source}: {self.names[index]} cannot be read: {error}") from error


def open_images(
    source: str | Path,
    *,
    sizes: str = "equal",
    split: str = "train",
    image_column: str = "image",
    caption_column: str | None = None,
) -> ImageSet:
    """Open a set of pictures and look at the head of each.

    Args:
        source: a folder (all pictures below it), a .txt file with a path a line, a table that `datasets` reads
            (.parquet, .arrow, saved data set, hub name), or an .npy or .npz of uint8 [N, H, W, 3].
        sizes: `equal` refuses pictures of different size, `any` leaves them to the extractor's resizing, a number cuts
            the middle square of each and resizes it to so many pixels (Lanczos), as training data are.
        split, image_column, caption_column: of a table.

    Raises:
        FileNotFoundError: nothing there.
        DataError: no pictures, pictures that cannot be read (all named), or sizes that differ.
        ValueError: an unknown `sizes` or column.
    """
    side = int(sizes) if sizes.isdigit() else 0
    if sizes not in ("equal", "any") and side < 1:
        raise ValueError(f"sizes must be 'equal', 'any' or a number of pixels, got {sizes!r}")
    path = Path(source).expanduser()
    if path.suffix in (".npy", ".npz") and path.is_file():
        found = _from_array(path)
    elif path.suffix == ".txt" and path.is_file():
        found = _from_list(path)
    elif path.is_dir() and not any(file for pattern in _TABLES for file in path.rglob(pattern)):
        found = _from_folder(path)
    else:
        found = _from_table(str(source), split, image_column, caption_column)
    if not len(found):
        raise DataError(f"{source}: no pictures; known suffixes: {', '.join(sorted(SUFFIXES))}")
    if found.decode is _decode:
        _check_heads(found, sizes)
    if side:
        whole = decode if found.decode is _decode else lambda data, of=found.decode: Image.fromarray(of(data))
        found = replace(found, side=side, decode=lambda data: square(whole(data), side))
    return found


def from_array(images: np.ndarray, source: str = "array") -> ImageSet:
    """Wrap images uint8 [N, H, W, 3].

    Raises:
        ValueError: another shape or dtype.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"{source}: images must be uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}")
    shape = images.shape[1:]
    return ImageSet(
        source,
        tuple(f"image {i}" for i in range(len(images))),
        lambda i: images[i].tobytes(),
        lambda data: np.frombuffer(data, dtype=np.uint8).reshape(shape),
    )


def _decode(data: bytes) -> np.ndarray:
    return np.asarray(decode(data))


def _from_folder(folder: Path) -> ImageSet:
    # sorted by parts joined with "/", so that the order is the same on every system
    files = sorted((f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file()),
                   key=lambda f: f.relative_to(folder).as_posix())  # fmt: skip
    names = tuple(f.relative_to(folder).as_posix() for f in files)
    return ImageSet(str(folder), names, lambda i: read_bytes(files[i], MOST_BYTES), _decode)


def _from_list(file: Path) -> ImageSet:
    lines = [line.strip() for line in read_text(file, _LIST_BYTES).splitlines()]
    names = tuple(line for line in lines if line)
    files = [Path(name) if Path(name).is_absolute() else file.parent / name for name in names]
    missing = [name for name, path in zip(names, files, strict=True) if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{file}: {len(missing)} of {len(names)} files are not there, first {missing[0]}")
    return ImageSet(str(file), names, lambda i: read_bytes(files[i], MOST_BYTES), _decode)


def _from_table(source: str, split: str, image_column: str, caption_column: str | None) -> ImageSet:
    table = open_table(source, split, image_column, caption_column)
    root = Path(source).expanduser()
    cells = table.select_columns([image_column])
    names = tuple(row_name(row[image_column], i) for i, row in enumerate(cells))
    captions = tuple(table[caption_column]) if caption_column is not None else None
    wrong = [i for i, caption in enumerate(captions or ()) if not (isinstance(caption, str) and caption.strip())]
    if captions is not None and wrong:
        raise DataError(
            f"{source}: column {caption_column!r} holds no caption in {len(wrong)} of {len(names)} rows, first "
            f"{captions[wrong[0]]!r:.60} for {names[wrong[0]]}"
        )
    return ImageSet(source, names, lambda i: image_bytes(cells[i][image_column], root), _decode, captions=captions)


def _from_array(path: Path) -> ImageSet:
    try:
        if path.suffix == ".npy":
            return from_array(np.load(path, allow_pickle=False, mmap_mode="r"), str(path))
        names = array_names(path)
        if {"mu", "sigma"} <= set(names):
            raise DataError(f"{path} holds statistics (mu, sigma), not pictures; give it behind --against")
        if not names:
            raise DataError(f"{path} holds no array")
        name = "arr_0" if "arr_0" in names else names[0]
        return from_array(read_arrays(path, [name])[name], str(path))
    except DataError:
        raise
    except Exception as error:  # numpy's reader of heads raises what comes to it
        told = str(path) in str(error)
        raise DataError(str(error) if told else f"{path} cannot be read as an array: {error}") from error


def _check_heads(images: ImageSet, sizes: str) -> None:
    """Read the size of every picture without decoding it; complain about all that cannot be read at once."""

    def look(index: int) -> tuple[int, int] | str:
        try:
            picture = Image.open(io.BytesIO(images._data(index)), formats=FORMATS)
            # Pillow decodes a whole PNG in search of EXIF that stands behind the pixels: nobody writes it there
            seeking = picture.format != "PNG" or "exif" in picture.info
            turned = seeking and picture.getexif().get(0x0112) in _ROTATED
            return (picture.height, picture.width)[:: -1 if turned else 1]  # type: ignore[return-value]
        except Exception as error:  # Pillow raises whatever comes to it on broken files
            reason = "not a picture" if isinstance(error, Image.UnidentifiedImageError) else str(error)
            return f"{images.names[index]}: {reason}"

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(look, range(len(images))))
    bad = [line for line in found if isinstance(line, str)]
    if bad:
        more = f"\n  and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
        listing = "".join(f"\n  {line}" for line in bad[:_LISTED]) + more
        raise DataError(f"{images.source}: {len(bad)} of {len(images)} pictures cannot be read:{listing}")
    other = [i for i, size in enumerate(found) if size != found[0]]
    if other and sizes == "equal":
        first, wrong = found[0], found[other[0]]
        raise DataError(
            f"{images.source}: {len(other)} of {len(images)} pictures differ in size: {images.names[0]} has "
            f"{first[0]} x {first[1]} pixels, {images.names[other[0]]} {wrong[0]} x {wrong[1]}. A set drawn by one "
            f"model should not; --sizes any leaves each to the extractor's resizing, --sizes 256 cuts the middle "
            f"square of each and resizes it"
        )


def load_captions(file: str | Path, images: ImageSet) -> list[str]:
    """Return a caption for each picture.

    Args:
        file: .txt with a caption a line in the pictures' order; .json {name: caption}; .jsonl or .csv with the fields
            `file_name` and `text` (or `caption`). Names are those of the set, with or without their suffix.

    Raises:
        FileNotFoundError: no such file. DataError: not readable, pictures without captions, captions without pictures.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"no captions file {file}: .txt (a line a picture), .json, .jsonl or .csv")
    text = read_text(file, _LIST_BYTES).removeprefix("\ufeff")
    if file.suffix == ".txt":
        lines = [line.strip() for line in text.splitlines()]
        lines = lines[:-1] if lines and not lines[-1] else lines
        if len(lines) != len(images):
            raise DataError(f"{file} has {len(lines)} captions for {len(images)} pictures of {images.source}")
        empty = [images.names[i] for i, line in enumerate(lines) if not line]
        if empty:
            raise DataError(f"{file}: {len(empty)} captions are empty, first that of {empty[0]}")
        return lines
    by_name = _captions_by_name(file, text)
    # "a" or "a.webp" may stand for a.png, but for neither of a.png and a.jpg, and not both of them for one
    counts = [Counter(map(_bare, names)) for names in (images.names, by_name)]
    shared = {name for count in counts for name, times in count.items() if times > 1}
    bare = {_bare(name): caption for name, caption in by_name.items() if _bare(name) not in shared}
    found = [by_name.get(name, bare.get(_bare(name))) for name in images.names]
    without = [name for name, caption in zip(images.names, found, strict=True) if not caption]
    if without:
        raise DataError(
            f"{file}: {len(without)} of {len(images)} pictures have no caption, first {', '.join(without[:3])}"
        )
    known = {_bare(name) for name in images.names}
    spare = [name for name in by_name if _bare(name) not in known]
    if spare:
        raise DataError(
            f"{file}: {len(spare)} captions belong to no picture of {images.source}, first {', '.join(spare[:3])}"
        )
    return [str(caption) for caption in found]


def _bare(name: str) -> str:
    """Return a name without the suffix of a picture; what follows another dot belongs to the name."""
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in SUFFIXES else name


def _captions_by_name(file: Path, text: str) -> dict[str, str | None]:
    try:
        if file.suffix == ".json":
            tree = json.loads(text, object_pairs_hook=list)
            if not (isinstance(tree, list) and all(isinstance(pair, tuple) for pair in tree)):
                raise ValueError("holds no object of name: caption")
            return _without_doubles(tree)
        if file.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        elif file.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
        else:
            raise ValueError("captions come as .txt, .json, .jsonl or .csv")
        return _without_doubles([(row["file_name"], row["text"] if "text" in row else row["caption"]) for row in rows])
    except (ValueError, KeyError, TypeError, RecursionError, csv.Error) as error:
        reason = f"a row has no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{file} cannot be read as captions: {reason}") from error


def _without_doubles(pairs: Sequence[tuple[Any, Any]]) -> dict[str, str | None]:
    """Return {name: caption}, None where a caption is no text.

    Raises:
        ValueError: a name that stands there twice, so that one of its captions would be lost.
    """
    doubles = [name for name, times in Counter(str(name) for name, _ in pairs).items() if times > 1]
    if doubles:
        raise ValueError(f"{len(doubles)} names stand there more than once, first {doubles[0]}")
    return {str(name): caption if isinstance(caption, str) else None for name, caption in pairs}
