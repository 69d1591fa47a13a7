"""Pictures with captions from any `datasets` source: folder, parquet, saved data set, hub name.

Every item is decoded once when the data set is built, so that a bad file stops the run before its first step (or is
left out and counted), not in the middle of a night. Pillow decodes; colour profiles are ignored; of an animation the
first frame counts.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mmdit.config import ImagesConfig
from mmdit.data.archives import check_dictionaries, check_parquet
from mmdit.data.buckets import Size, bucket_sizes, nearest_bucket
from mmdit.encoders.tokenizers import clean
from mmdit.registry import nearest, unknown
from mmdit.untrusted import TEXT_BYTES, read_bytes

SPLITS = ("train", "val", "seen")
MAX_PIXELS = 64_000_000  # a picture of more is taken for a decompression bomb
MOST_BYTES = 1 << 28  # of a picture's file: so many pixels in four channels, unpacked

# what Pillow may open: its other decoders start programs or read formats nobody trains on
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}
# suffix: the reader of `datasets`; its others (pandas) unpickle, and an unknown name would be asked of the hub
_TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}
_LISTED = 20  # bad items an error names
_STRIP = 256  # rows converted at a time
_LOG = logging.getLogger(__name__)


class DataError(ValueError):
    """Items of a data set cannot be used; the message lists them."""


# --- one picture ------------------------------------------------------------------------------------------------


def decode(data: bytes) -> Image.Image:
    """Decode one picture: upright, RGB, transparency on white, 16-bit grey scaled by 1/257.

    Raises:
        ValueError: not a picture, truncated, too large, or of a mode whose range is unknown.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"{picture.width} x {picture.height} pixels are more than {MAX_PIXELS:,}")
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
        return to_rgb(picture)
    except Image.UnidentifiedImageError:
        start = f"begins with {data[:8]!r}" if data else "empty"
        raise ValueError(f"not a picture ({start})") from None
    except ValueError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever comes to them on broken files
        raise ValueError(f"{type(error).__name__}: {error}") from None


def to_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture of any mode to RGB, transparent parts on white."""
    if picture.mode.startswith("I;16"):  # convert("RGB") would saturate nearly every pixel
        grey = np.empty((picture.height, picture.width), dtype=np.uint8)
        for top in range(0, picture.height, _STRIP):  # whole, 64 million pixels would take 1.5 GiB
            part = picture.crop((0, top, picture.width, min(top + _STRIP, picture.height)))
            grey[top : top + _STRIP] = np.rint(np.asarray(part).astype(np.float64) / 257)
        return Image.fromarray(grey).convert("RGB")
    if picture.mode in ("I", "F"):
        raise ValueError(f"mode {picture.mode}: numbers without a known range; save it with 8 or 16 bits")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        return _on_white(picture)
    return picture.convert("RGB")


def _on_white(picture: Image.Image) -> Image.Image:
    """Lay a picture with transparent parts on white, a strip at a time: whole, it would be in memory four times."""
    found = Image.new("RGB", picture.size)
    for top in range(0, picture.height, _STRIP):
        part = picture.crop((0, top, picture.width, min(top + _STRIP, picture.height)))
        white = Image.new("RGBA", part.size, "white")
        found.paste(Image.alpha_composite(white, part.convert("RGBA")).convert("RGB"), (0, top))
    return found


def cleaned(caption: str) -> str:
    """Repair a caption (`mmdit.encoders.tokenizers.clean`).

    Raises:
        ValueError: nothing is left of it.
    """
    found = clean(caption)
    if not found:
        raise ValueError(f"caption is empty once it is cleaned: {caption!r:.60}")
    return found


def square(picture: Image.Image, resolution: int) -> np.ndarray:
    """Cut the middle square out and resize it, antialiased: uint8 [R, R, 3]."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return _resized(picture, (left, top, left + side, top + side), (resolution, resolution))


def fitted(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """Cut the largest middle part of that ratio out and resize it, antialiased: uint8 [height, width, 3]."""
    scale = min(picture.width / width, picture.height / height)
    left, top = (picture.width - scale * width) / 2, (picture.height - scale * height) / 2
    return _resized(picture, (left, top, left + scale * width, top + scale * height), (height, width))


def _resized(picture: Image.Image, box: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    # Pillow's Lanczos widens its kernel when it shrinks a picture; without that, aliasing reaches 147 of 255
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.LANCZOS, box=box))


# --- sources ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """A source: how many rows, and how to get one: (name, image bytes, caption); ValueError for a bad one."""

    length: int
    read: Callable[[int], tuple[str, bytes, str]]
    name: Callable[[int], str]


def _open(config: ImagesConfig) -> _Rows:
    path = Path(config.source).expanduser()
    tables = ("*.parquet", "*.arrow", "metadata.*")
    if path.is_dir() and not any(file for pattern in tables for file in path.rglob(pattern)):
        return _open_sidecars(path)
    table = open_table(config.source, config.split, config.image_column, config.caption_column)

    def name(row: int) -> str:
        return row_name(table[row][config.image_column], row)

    def read(row: int) -> tuple[str, bytes, str]:
        item = table[row]
        caption = item[config.caption_column]
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError("caption is empty" if not caption else f"caption is no text: {caption!r:.60}")
        return name(row), image_bytes(item[config.image_column], path), caption.strip()

    return _Rows(len(table), read, name)


def open_table(source: str, split: str, image_column: str, caption_column: str | None = None) -> Any:
    """Open a `datasets` table (parquet, arrow, image folder with metadata, hub name); its images stay encoded.

    Raises:
        FileNotFoundError: no such source. DataError: it cannot be read. ValueError: a column is not there.
    """
    import datasets

    table = _load(source, split)
    for column in (image_column, caption_column):
        if column is not None and column not in table.column_names:
            raise ValueError(f"{source}: {unknown('column', column, table.column_names)}")
    if isinstance(table.features[image_column], datasets.Image):
        table = table.cast_column(image_column, datasets.Image(decode=False))  # Pillow decodes, by our rules
    return table


def row_name(image: Any, row: int) -> str:
    """Name a row of a table for people, with its file where it has one."""
    place = image.get("path") if isinstance(image, dict) else image if isinstance(image, str) else None
    return f"row {row} ({Path(place).name})" if place else f"row {row}"


def image_bytes(image: Any, root: Path) -> bytes:
    """Return a cell's encoded picture: bytes, a path, or the dictionary of both that `datasets` stores."""
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    if isinstance(image, str):
        place = Path(image) if Path(image).is_absolute() else (root if root.is_dir() else root.parent) / image
        return read_bytes(place, MOST_BYTES)
    raise ValueError("no image" if image is None else f"an image column of {type(image).__name__}")


def _open_sidecars(folder: Path) -> _Rows:
    """Open a folder in which `a.png` has its caption in `a.txt`."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)

    def read(row: int) -> tuple[str, bytes, str]:
        text = files[row].with_suffix(".txt")
        if not text.is_file():
            raise ValueError(f"no caption: neither a metadata file nor {text.name} beside it")
        try:
            caption = read_bytes(text, TEXT_BYTES).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{text.name} is not UTF-8 at byte {error.start}") from None
        if not caption:
            raise ValueError(f"caption is empty: {text.name}")
        return name(row), read_bytes(files[row], MOST_BYTES), caption

    def name(row: int) -> str:
        return str(files[row].relative_to(folder))

    return _Rows(len(files), read, name)


def _load(source: str, split: str) -> Any:
    """Load a `datasets` table from wherever the source points."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else it tells a server which kind of local file was opened
    path = Path(source).expanduser()
    if path.is_file() and path.suffix not in _TABLES:
        raise DataError(f"{source}: no table that is read here; known: {', '.join(_TABLES)}, or a folder of pictures")
    try:
        _check_tables(path)
        if path.is_file():
            return datasets.load_dataset(_TABLES[path.suffix], data_files=str(path), split=split)
        if path.is_dir():
            if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                saved = datasets.load_from_disk(str(path))
                if not isinstance(saved, dict):
                    return saved
                if split not in saved:
                    raise ValueError(unknown("split", split, saved))
                return saved[split]
            if any(path.rglob("*.parquet")):
                return datasets.load_dataset("parquet", data_dir=str(path), split=split)
            return datasets.load_dataset("imagefolder", data_dir=str(path), split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: cannot be read: {error}") from error
    if source.startswith((".", "/", "~")) or path.suffix or source.count("/") > 1:
        raise FileNotFoundError(f"{source}: no such file or folder; data.source names one, or a hub data set")
    try:
        return datasets.load_dataset(source, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # ConnectionError is an OSError
        guess = nearest(source, (entry.name for entry in Path().iterdir()))
        hint = f"; did you mean the folder or file {guess!r} here?" if guess else ""
        raise FileNotFoundError(
            f"data.source {source!r} is neither a local path nor could it be loaded as a hub data set, which needs the "
            f"network (or an earlier download): {type(error).__name__}: {error}{hint}"
        ) from error


def _check_tables(path: Path) -> None:
    """Look at parquet files before `datasets` unpacks them onto the disk.

    Raises:
        ValueError: one is none, or claims to unpack to far more than it has.
    """
    import pyarrow.lib
    import pyarrow.parquet

    for file in [path] if path.suffix == ".parquet" else path.rglob("*.parquet") if path.is_dir() else ():
        if file.is_file():
            try:
                opened = pyarrow.parquet.ParquetFile(file)
                check_parquet(opened, file.stat().st_size)
                check_dictionaries(opened)
            except (pyarrow.lib.ArrowException, ValueError) as error:
                raise ValueError(f"{file.name}: {error}") from error


# --- the data set -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Checked:
    rows: _Rows
    good: tuple[int, ...]
    captions: tuple[str, ...]
    digests: tuple[bytes, ...]
    sizes: tuple[tuple[int, int], ...]  # width, height


def validate(config: ImagesConfig, out: str | Path) -> tuple[int, int]:
    """Look at every item of a source and write those that cannot be used, with the reason, into a file.

    Args:
        config: the source; `on_error` does not matter here.
        out: JSON lines {"item": ..., "reason": ...}; empty where all are good.

    Returns:
        Items looked at, and how many of them cannot be used.
    """
    rows = _open(config)
    bad = [result for result in _look_at_all(rows, config) if isinstance(result, _Bad)]
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps({"item": b.item, "reason": b.reason}) + "\n" for b in bad), encoding="utf-8")
    return rows.length, len(bad)


@dataclass(frozen=True)
class _Bad:
    """An item that cannot be used."""

    item: str
    reason: str


def _look_at_all(rows: _Rows, config: ImagesConfig) -> list[tuple[str, bytes, tuple[int, int]] | _Bad]:
    """Decode every item: caption, hash of the file, size; or why not."""

    def look(row: int) -> tuple[str, bytes, tuple[int, int]] | _Bad:
        try:
            _, data, caption = rows.read(row)
            caption = cleaned(caption) if config.clean_captions else caption
            picture = decode(data)
        except (ValueError, OSError) as error:
            return _Bad(rows.name(row), str(error))
        return caption, hashlib.sha256(data).digest(), picture.size

    with ThreadPoolExecutor() as pool:  # Pillow's decoders let other threads run
        return list(pool.map(look, range(rows.length)))


@lru_cache(maxsize=2)  # train and val of one run decode everything once
def _check(config: ImagesConfig) -> _Checked:
    rows = _open(config)
    found = _look_at_all(rows, config)
    bad = [f"{result.item}: {result.reason}" for result in found if isinstance(result, _Bad)]
    good = [(row, *result) for row, result in enumerate(found) if not isinstance(result, _Bad)]
    if bad:
        more = f"\n  and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
        listing = "".join(f"\n  {line}" for line in bad[:_LISTED]) + more
        if config.on_error == "fail":
            raise DataError(
                f"{config.source}: {len(bad)} of {rows.length} items cannot be used (data.on_error: skip leaves them "
                f"out; `python scripts/cache.py CONFIG --validate` writes all of them to a file):{listing}"
            )
        _LOG.warning("%s: %d of %d items left out:%s", config.source, len(bad), rows.length, listing)
    if not good:
        raise DataError(f"{config.source}: no usable item among {rows.length}")
    small = sum(min(size) < config.resolution for *_, size in good)
    if small:
        _LOG.warning(
            "%s: %d of %d images are smaller than %d pixels and will be enlarged",
            config.source, small, len(good), config.resolution,
        )  # fmt: skip
    columns = zip(*good, strict=True)
    return _Checked(rows, *(tuple(column) for column in columns))


class ImagesDataset:
    """Pictures and captions of one split.

    An item belongs to `val` by the hash of its file, so the split survives reordering and growth, and equal files fall
    on the same side. `seen` is `val` here: nothing is known about combinations, so there is no `heldout`.
    """

    def __init__(self, config: ImagesConfig, split: str = "train") -> None:
        if split not in SPLITS:
            raise ValueError(
                f"unknown split {split!r} of images; known: {', '.join(SPLITS)} (held-out combinations are known for "
                f"shapes and emoji only)"
            )
        self.config = config
        self.split = split
        checked = _check(config)
        shares = [int.from_bytes(digest[:8], "little") / 2**64 for digest in checked.digests]
        # a small data set keeps at least one item for validation, unless validation was switched off
        border = max(config.val_fraction, min(shares) + 2**-53) if config.val_fraction > 0 else 0.0
        chosen = [i for i, share in enumerate(shares) if (share < border) == (split != "train")]
        if not chosen:
            raise DataError(
                f"{config.source}: split {split!r} is empty: {len(shares)} usable items at data.val_fraction "
                f"{config.val_fraction}"
            )
        self._rows = checked.rows
        self._good = [checked.good[i] for i in chosen]
        self._captions = [checked.captions[i] for i in chosen]
        self._digests = [checked.digests[i] for i in chosen]
        self.sizes = [checked.sizes[i] for i in chosen]  # width, height as stored, upright

    def __len__(self) -> int:
        return len(self._good)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides pixels and captions."""
        digest = hashlib.sha256(f"images|1|{self._shape()}".encode())
        for data, caption in zip(self._digests, self._captions, strict=True):
            digest.update(data + hashlib.sha256(caption.encode()).digest())
        return digest.hexdigest()[:32]

    def captions(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """Return the captions as they stand in the source, without white space around them."""
        return [self._captions[int(i)] for i in indices]

    def pixels(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Decode items: the middle square, resized, uint8 [B, R, R, 3]."""
        side = self.config.resolution
        out = np.empty((len(indices), side, side, 3), dtype=np.uint8)
        for row, index in enumerate(indices):
            out[row] = square(self._decoded(index), side)
        return out

    def _decoded(self, index: Any) -> Image.Image:
        return decode(self._rows.read(self._good[int(index)])[1])

    def _shape(self) -> str:
        return str(self.config.resolution)

    def bucket_sizes(self) -> list[Size]:
        """Return the sizes (height, width) that the config names; none where pictures are cut square."""
        buckets = self.config.buckets
        resolution = self.config.resolution
        return bucket_sizes(resolution, max(16, resolution // 8)) if buckets == "auto" else list(buckets)

    def by_bucket(self) -> list[BucketView]:
        """Split the pictures by the bucket whose ratio is nearest; buckets that stay empty are left out."""
        sizes = self.bucket_sizes()
        homes = [nearest_bucket(width, height, sizes) for width, height in self.sizes]
        views = [
            BucketView(self, size, [i for i, home in enumerate(homes) if home == k]) for k, size in enumerate(sizes)
        ]
        return [view for view in views if len(view)]


class BucketView(ImagesDataset):
    """Those pictures of a data set that go into one bucket, all of its size."""

    def __init__(self, whole: ImagesDataset, size: Size, items: Sequence[int]) -> None:
        self.config, self.split, self.size = whole.config, whole.split, size
        self._rows = whole._rows
        self._good = [whole._good[i] for i in items]
        self._captions = [whole._captions[i] for i in items]
        self._digests = [whole._digests[i] for i in items]
        self.sizes = [whole.sizes[i] for i in items]

    def pixels(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Decode items: the largest middle part of the bucket's ratio, resized, uint8 [B, height, width, 3]."""
        return np.stack([fitted(self._decoded(index), *self.size) for index in indices])

    def _shape(self) -> str:
        return f"{self.size[0]}x{self.size[1]}"
