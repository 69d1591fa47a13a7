"""Features of a set of pictures, kept by content: a second look at the same pictures reads instead of computing.

The key of a chunk of pictures is the hash of their encoded bytes, of the extractor and of its resizing; names and
places do not count. A chunk is one safetensors file with the hash of its numbers inside, written beside its place and
renamed: several processes may fill one cache, and a damaged file is computed again, with a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mmdit_eval.features import Extractor
from mmdit_eval.image_sets import ImageSet

CHUNK = 512  # pictures a file
_LOG = logging.getLogger(__name__)


def default_cache() -> Path:
    """Return the folder of cached features: $MMDIT_EVAL_CACHE, else one below the user's cache folder."""
    given = os.environ.get("MMDIT_EVAL_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return Path(given).expanduser() if given else home / "mmdit-lab" / "features"


def extract_set(
    extractor: Extractor,
    images: ImageSet,
    *,
    batch_size: int = 64,
    cache: Path | None = None,
    progress: Callable[[int], object] | None = None,
    rank: int = 0,
    world: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Return features of a set of pictures.

    Args:
        batch_size: pictures the network sees at once; the result does not depend on it beyond rounding.
        cache: folder of kept features; None: compute and keep nothing.
        progress: called with the number of pictures that are done.
        rank, world: compute only the chunks rank, rank + world, ... and return these (`distribution` joins them).

    Returns:
        (features float32 [N, d + classes], ids int64 [N]).

    Raises:
        DataError: a picture that cannot be decoded. ValueError: features that are not finite.
    """
    parts = [np.empty((0, extractor.width + extractor.classes), dtype=np.float32)]
    ids: list[int] = []
    for start in range(rank * CHUNK, len(images), world * CHUNK):
        rows = range(start, min(start + CHUNK, len(images)))
        key = _key(extractor, images, rows) if cache is not None else ""
        found = _read(cache, key, len(rows), parts[0].shape[1]) if cache is not None else None
        if found is None:
            computed = []
            for first in range(rows.start, rows.stop, batch_size):
                pictures = [images.picture(i) for i in range(first, min(first + batch_size, rows.stop))]
                computed.append(extractor(pictures).numpy())
            found = np.concatenate(computed)
            if cache is not None:
                _write(cache, key, found)
        parts.append(found)
        ids.extend(rows)
        if progress is not None:
            progress(len(rows))
    return np.concatenate(parts), np.asarray(ids, dtype=np.int64)


def _key(extractor: Extractor, images: ImageSet, rows: range) -> str:
    rule: list[Any] = [extractor.describe(), extractor.precision]
    if extractor.classes:  # files from before hold logits with the bias
        rule.append("logits without bias")
    digest = hashlib.sha256(json.dumps(rule, sort_keys=True).encode())
    for row in rows:
        digest.update(images.digest(row))
    return digest.hexdigest()


def _read(cache: Path, key: str, rows: int, width: int) -> np.ndarray | None:
    path = cache / key[:2] / f"{key}.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            features, stated = file.get_tensor("features"), (file.metadata() or {}).get("sha256")
        if features.shape != (rows, width) or stated != _hash(features):
            raise ValueError("its numbers are not those that were written")
    except (OSError, ValueError, SafetensorError) as error:
        _LOG.warning("cached features %s are damaged (%s) and will be computed again", path, error)
        return None
    return np.asarray(features)


def _write(cache: Path, key: str, features: np.ndarray) -> None:
    path = cache / key[:2] / f"{key}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        save_file({"features": features}, temporary, metadata={"sha256": _hash(features)})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _hash(features: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(features).tobytes()).hexdigest()
