"""A CLIP pair: the contrastive loss it is trained with, and the tiny one that judges pictures.

One image tower with two projections is trained against both text towers of `encoders.text`, so that CLIP-L and CLIP-G
stay what SD3 expects of them and share one judge.

Source: Radford et al. 2021, arXiv:2103.00020, section 2.3 and figure 3 (symmetric cross-entropy, learned temperature).
Departs: equal captions count as positives of each other, and wrong captions made on purpose may stand in the softmax.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmdit.encoders.text import TextEncoders, load_text_encoders
from mmdit.encoders.tokenizers import TINY

MAX_SCALE = 100.0  # of the logits, as in the paper: keeps training from collapsing onto single pairs
IMAGE_FILE = "clip_image.safetensors"
TOWERS = ("clip_l", "clip_g")  # the order of their parts in `pooled` and in embeddings


def contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    log_scale: Tensor,
    image_keys: Tensor | None = None,
    text_keys: Tensor | None = None,
) -> Tensor:
    """Return the mean of both directions' cross-entropies.

    Args:
        image_embeds: [B, d], normalised here.
        text_embeds: [B + M, d]; row i < B belongs to image i, the last M are wrong captions, which only compete.
        log_scale: scalar; logarithm of the inverse temperature, clamped at log 100.
        image_keys, text_keys: int64 [B] and [B + M]; equal keys are positives and share the target. Without them each
            image has its own row alone.
    """
    batch = image_embeds.shape[0]
    scale = log_scale.clamp(max=math.log(MAX_SCALE)).exp()
    logits = scale * F.normalize(image_embeds, dim=1) @ F.normalize(text_embeds, dim=1).T  # [B, B + M]
    if image_keys is None or text_keys is None:
        image_keys = torch.arange(batch, device=logits.device)
        text_keys = torch.arange(text_embeds.shape[0], device=logits.device)
    positive = (image_keys[:, None] == text_keys[None]).to(logits.dtype)
    to_text = F.cross_entropy(logits, positive / positive.sum(dim=1, keepdim=True))
    back = positive[:, :batch].T
    to_image = F.cross_entropy(logits[:, :batch].T, back / back.sum(dim=1, keepdim=True))
    return (to_text + to_image) / 2


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "B N (three A K) -> three B A N K", three=3, A=self.num_heads)
        # plain softmax: torch's fused attention is a quarter slower on a CPU at 64 tokens (facts: quickstart.md)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)  # [B, A, N, N]
        x = x + self.out(rearrange(weights @ v, "B A N K -> B N (A K)"))
        return x + self.mlp(self.norm2(x))


class ImageTower(nn.Module):
    """A small ViT behind three strided convolutions, mean-pooled, with one projection per text tower.

    Source: Dosovitskiy et al. 2020, arXiv:2010.11929; the stem: Xiao et al. 2021, arXiv:2106.14881. With a linear map
    of 8-pixel patches instead, shapes of 11 to 19 pixels were not told apart after 19,000 pictures (tried).

    Args:
        resolution: R, pixels; other sizes are resized to it. One token for every 8 x 8 pixels.
        width, depth, num_heads: of the ViT.
        projections: {text tower: width of its pooled vector}.
    """

    def __init__(
        self,
        resolution: int = 64,
        width: int = 128,
        depth: int = 3,
        num_heads: int = 4,
        projections: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.resolution = resolution
        channels = (3, width // 4, width // 2, width)
        self.stem = nn.ModuleList(nn.Conv2d(a, b, 5, stride=2, padding=2) for a, b in pairwise(channels))
        self.stem_norms = nn.ModuleList(nn.GroupNorm(8, size) for size in channels[1:3])
        self.stem.to(memory_format=torch.channels_last)  # twice as fast in bf16 on a CPU
        self.places = nn.Parameter(0.1 * torch.randn((resolution // 8) ** 2, width))
        self.blocks = nn.ModuleList(_Block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        sizes = projections or {"clip_l": 96, "clip_g": 128}
        self.projections = nn.ModuleDict({name: nn.Linear(width, sizes[name], bias=False) for name in TOWERS})
        self.log_scales = nn.ParameterDict({name: nn.Parameter(torch.tensor(math.log(1 / 0.07))) for name in TOWERS})

    def tokens(self, pixels: Tensor) -> Tensor:
        """Return the last block's tokens [B, N, width], row by row, of pixels [B, 3, R, R] in [-1, 1]."""
        x = pixels.contiguous(memory_format=torch.channels_last)
        for i, conv in enumerate(self.stem):
            x = conv(x)
            if i < len(self.stem_norms):
                x = F.gelu(self.stem_norms[i](x))
        x = rearrange(x, "B D h w -> B (h w) D") + self.places
        for block in self.blocks:
            x = block(x)
        return x

    def pool(self, tokens: Tensor) -> Tensor:
        """Return trunk features [B, width] of tokens [B, N, width]."""
        return self.norm(tokens.mean(dim=1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return trunk features [B, width] of pixels [B, 3, R, R] in [-1, 1]."""
        return self.pool(self.tokens(pixels))


def images_to_pixels(images: np.ndarray | Tensor, resolution: int) -> Tensor:
    """Turn uint8 [B, R, R, 3] into float [B, 3, resolution, resolution] in [-1, 1]; resized by antialiased bicubic."""
    images = torch.as_tensor(np.ascontiguousarray(images) if isinstance(images, np.ndarray) else images)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 [B, R, R, 3], got {images.dtype} {list(images.shape)}")
    pixels = rearrange(images, "B H W C -> B C H W").float() / 127.5 - 1
    if pixels.shape[-2:] != (resolution, resolution):
        pixels = F.interpolate(pixels, (resolution, resolution), mode="bicubic", antialias=True).clamp(-1, 1)
    return pixels


class TinyClip:
    """The trained pair, for judging: features for Fréchet distances, embeddings for CLIP-score."""

    def __init__(self, image: ImageTower, text: TextEncoders, batch_size: int = 256) -> None:
        self.image, self.text, self.batch_size = image.eval().requires_grad_(False), text, batch_size

    @torch.no_grad()
    def image_features(self, images: np.ndarray | Tensor) -> Tensor:
        """Return trunk features of uint8 [B, R, R, 3]: float32 [B, 128]."""
        parts = [images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size)]
        return torch.cat([self.image(images_to_pixels(part, self.image.resolution)) for part in parts])

    @torch.no_grad()
    def image_embeds(self, images: np.ndarray | Tensor) -> Tensor:
        """Return normalised embeddings [B, 224]; their product with `text_embeds` is the mean cosine of both towers."""
        return self.embeds_of_features(self.image_features(images))

    @torch.no_grad()
    def embeds_of_features(self, features: Tensor) -> Tensor:
        """Return normalised embeddings [B, 224] of trunk features [B, 128]."""
        return _join([self.image.projections[name](features) for name in TOWERS])

    @torch.no_grad()
    def text_embeds(self, prompts: Sequence[str]) -> Tensor:
        """Return normalised embeddings of prompts, [B, 224]."""
        pooled = self.text.encode(prompts, "trim").pooled
        assert pooled is not None
        return _join(list(pooled.split([self.image.projections[name].out_features for name in TOWERS], dim=1)))


def _join(parts: list[Tensor]) -> Tensor:
    return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1) / math.sqrt(len(parts))


def load_tiny_clip(path: str | Path = "tiny", *, text: TextEncoders | None = None) -> TinyClip:
    """Load the tiny CLIP pair from the package or from a folder the training script wrote.

    Raises:
        FileNotFoundError: the image tower is missing; the message says what makes it.
    """
    from safetensors.torch import load_file

    folder = TINY if str(path) == "tiny" else Path(path)
    file = folder / IMAGE_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no {file}; `python scripts/train_tiny_encoders.py --part clip` makes it")
    config: dict[str, Any] = json.loads((folder / "text.json").read_text(encoding="utf-8"))["encoders"]["clip_image"]
    image = ImageTower(**config)
    image.load_state_dict({key: value.float() for key, value in load_file(file).items()})
    return TinyClip(image, text or load_text_encoders(folder))
