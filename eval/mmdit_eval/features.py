"""Feature extractors: images to vectors, for distances between sets. `EXTRACTORS` is the table.

An extractor states its width, a hash of what decides its numbers and how it resizes: distances from two extractors,
or from one with two resize rules, are not comparable, and the stamp of a result carries all three.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.encoders.vae import to_pixels
from mmdit.registry import lookup
from mmdit_eval.frechet import FloatArray


@dataclass(frozen=True)
class Extractor:
    """Images to features.

    Attributes:
        width: d.
        hash: of the weights, or of the rule where there are none.
        resize: in words, what happens to images of another size.
        function: images uint8 [B, R, R, 3], any R, to features [B, d].
    """

    name: str
    width: int
    hash: str
    resize: str
    function: Callable[[np.ndarray], Tensor]


def load_extractor(name: str) -> Extractor:
    """Build the extractor of that name.

    Raises:
        ValueError: unknown name.
    """
    return lookup(EXTRACTORS, name, "extractor")()


@torch.inference_mode()
def extract(extractor: Extractor, images: np.ndarray, batch_size: int = 128) -> FloatArray:
    """Return features float64 [N, d] of images uint8 [N, R, R, 3]; the batch size does not matter.

    Raises:
        ValueError: images that are not uint8 [N, R, R, 3].
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 [N, R, R, 3], got {images.dtype} {list(images.shape)}")
    parts = [np.empty((0, extractor.width))]
    for start in range(0, len(images), batch_size):
        features = extractor.function(images[start : start + batch_size])
        parts.append(features.double().cpu().numpy())
    return np.concatenate(parts)


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """Return a short hash of names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=1)
def tiny_clip() -> Any:
    """Load the CLIP pair that ships with the package, once."""
    from mmdit.encoders.clip import load_tiny_clip

    return load_tiny_clip()


@lru_cache(maxsize=1)
def _tiny_clip_extractor() -> Extractor:
    clip = tiny_clip()
    return Extractor(
        name="tiny_clip",
        width=clip.image_features(np.zeros((1, 64, 64, 3), dtype=np.uint8)).shape[1],
        hash=hash_tensors(clip.image.state_dict()),
        resize="bicubic, antialiased, float, to 64",
        function=clip.image_features,
    )


def _pixel_statistics_extractor() -> Extractor:
    def function(images: np.ndarray) -> Tensor:
        pixels = to_pixels(images)
        small = F.adaptive_avg_pool2d(pixels, 4).flatten(1)  # [B, 48]
        spread = pixels.flatten(2).std(-1)  # [B, 3]
        return torch.cat([small, spread], dim=1)

    rule = "4x4 mean and deviation per channel, version 1"
    return Extractor(
        name="pixel_statistics",
        width=51,
        hash=hashlib.sha256(rule.encode()).hexdigest()[:16],
        resize="mean over 4 x 4 cells",
        function=function,
    )


# tiny_clip knows shapes and emoji only; pixel_statistics knows nothing and is meant for tests and sanity checks
EXTRACTORS: dict[str, Callable[[], Extractor]] = {
    "tiny_clip": _tiny_clip_extractor,
    "pixel_statistics": _pixel_statistics_extractor,
}
