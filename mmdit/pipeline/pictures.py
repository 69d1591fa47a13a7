"""Pictures: arrays to Pillow images, PNG files with their settings inside, and grids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """Turn images uint8 [B, R, R, 3] into Pillow images."""
    return [Image.fromarray(image) for image in images]


def save_image(image: np.ndarray, path: str | Path, settings: dict[str, Any] | None = None) -> None:
    """Write one image uint8 [R, R, 3] as PNG; `settings` go into its metadata, one text entry each."""
    notes = PngImagePlugin.PngInfo()
    for key, value in (settings or {}).items():
        notes.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, format="PNG", pnginfo=notes)


def image_grid(images: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Lay images uint8 [B, R, R, 3] side by side: one picture, with 2 pixels of white between them."""
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    rows, gap = -(-len(images) // columns), 2
    _, height, width, _ = images.shape
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas
