"""Data sets: pixels and captions by index. `make_dataset(config, split)` is the way in."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from mmdit.registry import lookup


class Dataset(Protocol):
    """What every data set offers; items are addressed by arrays of indices, order is somebody else's business."""

    def __len__(self) -> int: ...

    def pixels(self, indices: Any) -> np.ndarray:
        """Return images, uint8 [B, R, R, 3]."""

    def captions(self, indices: Any) -> list[str]:
        """Return one caption per image."""

    @property
    def fingerprint(self) -> str:
        """Return a hash of everything that decides pixels and captions."""


def _shapes(config: Any, split: str) -> Dataset:
    from mmdit.data.shapes import ShapesDataset

    return ShapesDataset(config, split)


def _emoji(config: Any, split: str) -> Dataset:
    from mmdit.data.emoji import EmojiDataset

    return EmojiDataset(config, split)


def _images(config: Any, split: str) -> Dataset:
    from mmdit.data.images import ImagesDataset

    return ImagesDataset(config, split)


def _shards(config: Any, split: str) -> Dataset:
    from mmdit.data.shards import ShardsDataset

    return ShardsDataset(config, split)


DATASETS = {
    "shapes": _shapes,
    "emoji": _emoji,
    "images": _images,
    "shards": _shards,
}  # built lazily: each room imports what it needs


def make_dataset(config: Any, split: str = "train") -> Any:
    """Build the data set a config names.

    Args:
        config: ShapesConfig, EmojiConfig, ImagesConfig or ShardsConfig.
        split: train | val | seen (test items of training combinations) | heldout (combinations training lacks).

    Raises:
        ValueError: unknown name or split.
        FileNotFoundError: the data has not been built; the message names the command.
    """
    return lookup(DATASETS, config.name, "data set")(config, split)
