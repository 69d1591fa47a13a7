"""Resizing of pictures before a feature network: one function for each rule the literature uses.

The rule decides the number: the same pictures give Fréchet distances that differ by whole points under two rules
(Parmar et al. 2022, arXiv:2104.11222), so an extractor names its rule and the stamp of a result carries the name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def check_images(images: np.ndarray) -> np.ndarray:
    """Return images as they are, or say why they are no images.

    Raises:
        ValueError: not uint8 [B, H, W, 3].
    """
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 [N, R, R, 3], got {images.dtype} {list(images.shape)}")
    return images


def to_tensor(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Return float32 [B, 3, H, W] in 0 ... 255 of images uint8 [B, H, W, 3]."""
    return rearrange(torch.from_numpy(np.ascontiguousarray(images)).to(device), "B H W C -> B C H W").float()


def resize_tensorflow1(pixels: Tensor, side: int) -> Tensor:
    """Resize by TensorFlow 1's bilinear interpolation without antialiasing, as FID's Inception graph does.

    Output pixel i samples the input at i * (input side / output side): no half-pixel centres, so the picture is shifted
    and, when it shrinks, aliased. Kept because published FIDs contain it.
    Source: Heusel et al. 2017, arXiv:1706.08500 (their Inception graph, resize_bilinear, align_corners=False).

    Args:
        pixels: float [B, 3, H, W], any range.

    Returns:
        [B, 3, side, side]; the same floats as torch-fidelity's.
    """
    low, high, share = _bilinear_places(pixels.shape[3], side, pixels)
    left = pixels.index_select(3, low)
    pixels = left + (pixels.index_select(3, high) - left) * share  # [B, 3, H, side]
    low, high, share = _bilinear_places(pixels.shape[2], side, pixels)
    top = pixels.index_select(2, low)
    return top + (pixels.index_select(2, high) - top) * share[:, None]  # [B, 3, side, side]


def _bilinear_places(before: int, after: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbours and weight of the right one, for each output place; the product is float32, as in TensorFlow."""
    place = torch.arange(after, dtype=like.dtype, device=like.device)
    place = place * torch.tensor(before / after, dtype=torch.float32, device=like.device)
    low = place.long()
    return low, (low + 1).clamp_max(before - 1), place - low.float()


def resize_clean(images: np.ndarray, side: int, device: torch.device | str = "cpu") -> Tensor:
    """Resize by clean-fid's rule: antialiased bicubic of each channel in float, cut to 0 ... 255, never rounded.

    Pillow does it on the CPU; on another device two matrix products with Pillow's own weights, which differ from it by
    less than 1e-3 of 255 grey levels (a float32 sum in another order).
    Source: Parmar et al. 2022, arXiv:2104.11222, section 3.

    Args:
        images: uint8 [B, H, W, 3].

    Returns:
        float32 [B, 3, side, side] in 0 ... 255.
    """
    if torch.device(device).type == "cpu":
        return torch.stack([_pillow_float(image, side) for image in images])
    pixels = to_tensor(images, device)
    down, across = (bicubic_weights(n, side).to(device) for n in pixels.shape[2:])
    return (down @ (pixels @ across.T)).clamp(0, 255)


def _pillow_float(image: np.ndarray, side: int) -> Tensor:
    channels = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(channel.resize((side, side), Image.Resampling.BICUBIC)) for channel in channels]
    return torch.from_numpy(np.stack(resized).clip(0, 255))


@lru_cache(maxsize=64)
def bicubic_weights(before: int, after: int) -> Tensor:
    """Return Pillow's antialiased bicubic as a matrix, float32 [after, before]; rows sum to one.

    The kernel (a = -0.5) is stretched by the reduction, so that a shrinking picture is averaged first.
    """
    scale = before / after
    stretch = max(scale, 1.0)
    weights = np.zeros((after, before))
    for i in range(after):
        centre = (i + 0.5) * scale
        first = max(int(centre - 2 * stretch + 0.5), 0)
        last = min(int(centre + 2 * stretch + 0.5), before)
        x = np.abs((np.arange(first, last) - centre + 0.5) / stretch)
        near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
        row = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        weights[i, first:last] = row / row.sum()
    return torch.from_numpy(weights).float()


def resize_pillow(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize by Pillow's antialiased bicubic, rounded to uint8: [B, height, width, 3].

    What torchvision's and transformers' image processors do to a Pillow image.
    """
    if images.shape[1:3] == (height, width):
        return images
    resized = [Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(image) for image in resized])


def resize_shorter_side(images: np.ndarray, side: int) -> np.ndarray:
    """Resize the shorter side to `side` (Pillow, bicubic, uint8) and cut the middle square out: [B, side, side, 3].

    Source: Radford et al. 2021, arXiv:2103.00020 (CLIP's preprocessing).
    """
    height, width = images.shape[1:3]
    shorter = min(height, width)
    images = resize_pillow(images, int(side * height / shorter), int(side * width / shorter))
    top, left = (images.shape[1] - side) // 2, (images.shape[2] - side) // 2
    return images[:, top : top + side, left : left + side]


def normalise(images: np.ndarray, mean: Sequence[float], std: Sequence[float], device: torch.device | str) -> Tensor:
    """Return (images / 255 - mean) / std, float32 [B, 3, H, W], of uint8 [B, H, W, 3]."""
    centre, spread = (torch.tensor(v, device=device).view(3, 1, 1) for v in (tuple(mean), tuple(std)))
    return (to_tensor(images, device) / 255 - centre) / spread
