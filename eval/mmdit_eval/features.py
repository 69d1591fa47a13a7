"""Feature extractors: images to vectors, for distances between sets. `EXTRACTORS` is the table.

An extractor states its width, a hash of what decides its numbers, how it resizes and in which precision it computes:
distances from two extractors, or from one with two resize rules, are not comparable, and the stamp of a result
carries all of it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit.encoders.vae import to_pixels
from mmdit.registry import lookup, unknown
from mmdit_eval.extractor_weights import KNOWN, find_weights, hash_tensors, hash_weights, read_tensors
from mmdit_eval.frechet import FloatArray
from mmdit_eval.resizing import check_images, resize_clean, to_tensor

__all__ = [
    "EXTRACTORS",
    "Extractor",
    "Options",
    "TextTower",
    "extract",
    "extract_logits",
    "extract_whole",
    "hash_tensors",
    "load_clip",
    "load_extractor",
    "tiny_clip",
]

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class TextTower:
    """The text side of a CLIP: what CLIP-score needs besides features.

    Attributes:
        embed: captions to embeddings [B, e].
        image_embeds: features [B, d] to embeddings [B, e].
        lengths: tokens of each caption, start and end included.
        limit: tokens the tower reads; longer captions are cut by `embed`.
    """

    embed: Callable[[Sequence[str]], Tensor]
    image_embeds: Callable[[Tensor], Tensor]
    lengths: Callable[[Sequence[str]], list[int]]
    limit: int = 77


@dataclass(frozen=True)
class Extractor:
    """Images to features.

    Attributes:
        width: d.
        hash: of the weights, or of the rule where there are none.
        resize: in words, what happens to images of another size.
        prepare: images uint8 [B, H, W, 3] of one size to what the network reads.
        network: that to features [B, d], with `classes` logits behind them: [B, d + classes].
        precision: of the network; features leave it as float32.
        classes: logits the network gives (for the Inception score); 0: none.
        text: the text tower of a CLIP.
    """

    name: str
    width: int
    hash: str
    resize: str
    prepare: Callable[[np.ndarray], Tensor]
    network: Callable[[Tensor], Tensor]
    precision: Precision = "fp32"
    classes: int = 0
    text: TextTower | None = None

    def describe(self) -> dict[str, str]:
        """Return what a stamp says of it; fp32 goes without saying, as in results from before there was a choice."""
        stated = {"name": self.name, "hash": self.hash, "resize": self.resize}
        return stated if self.precision == "fp32" else {**stated, "precision": self.precision}

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray] | np.ndarray) -> Tensor:
        """Return float32 [B, d + classes] of images uint8 [H, W, 3], whose sizes may differ.

        Raises:
            ValueError: features that are not finite.
        """
        shapes = {image.shape for image in images}
        if len(shapes) == 1:
            prepared = self.prepare(np.asarray(images) if isinstance(images, np.ndarray) else np.stack(images))
        else:
            prepared = torch.cat([self.prepare(np.stack([image])) for image in images])
        with exact_products(prepared.device):
            found = self.network(prepared).float().cpu()
        if not torch.isfinite(found).all():
            raise ValueError(f"extractor {self.name!r} gave values that are not finite; are its weights whole?")
        return found


@dataclass(frozen=True)
class Options:
    """What a user may choose of an extractor.

    Attributes:
        argument: what stands behind the colon of its name (`timm:NAME`).
        weights: file or folder; None: the usual places.
        device: None: CUDA where there is one.
    """

    argument: str = ""
    weights: str | None = None
    device: torch.device | str | None = None
    precision: Precision = "fp32"

    @property
    def place(self) -> torch.device:
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def load_extractor(
    name: str,
    *,
    weights: str | None = None,
    device: torch.device | str | None = None,
    precision: Precision = "fp32",
) -> Extractor:
    """Build the extractor of that name: `NAME`, `FAMILY:ARGUMENT`, each with `@WEIGHTS` behind it if wanted.

    Args:
        weights: file or folder of its weights, instead of `@WEIGHTS`.

    Raises:
        ValueError: unknown name, or weights of another network.
        FileNotFoundError: weights that are nowhere.
    """
    own, _, given = name.partition("@")
    family, colon, argument = own.partition(":")
    key = f"{family}:" if colon else family
    if key not in EXTRACTORS:
        shown = [f"{k}NAME" if k.endswith(":") else k for k in EXTRACTORS]
        raise ValueError(unknown("extractor", own, shown))
    if colon and not argument:
        raise ValueError(f"extractor {own!r}: a name or path must follow the colon")
    return lookup(EXTRACTORS, key, "extractor")(Options(argument, weights or given or None, device, precision))


def extract_whole(extractor: Extractor, images: np.ndarray, batch_size: int = 128) -> np.ndarray:
    """Return features with the logits behind them, float32 [N, d + classes], of images uint8 [N, R, R, 3].

    Raises:
        ValueError: images that are not uint8 [N, R, R, 3].
    """
    check_images(images)
    parts = [np.empty((0, extractor.width + extractor.classes), dtype=np.float32)]
    for start in range(0, len(images), batch_size):
        parts.append(extractor(images[start : start + batch_size]).numpy())
    return np.concatenate(parts)


def extract(extractor: Extractor, images: np.ndarray, batch_size: int = 128) -> FloatArray:
    """Return features float64 [N, d] of images uint8 [N, R, R, 3]; the batch size does not matter.

    Raises:
        ValueError: images that are not uint8 [N, R, R, 3].
    """
    return extract_whole(extractor, images, batch_size)[:, : extractor.width].astype(np.float64)


def extract_logits(extractor: Extractor, images: np.ndarray, batch_size: int = 128) -> FloatArray:
    """Return the logits [N, classes] of images uint8 [N, R, R, 3].

    Raises:
        ValueError: images that are not uint8 [N, R, R, 3].
    """
    return extract_whole(extractor, images, batch_size)[:, extractor.width :].astype(np.float64)


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Keep CUDA from rounding float32 products to TF32, its default for convolutions: FIDs would differ by machine."""
    if device.type != "cuda":
        yield
        return
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    conv.fp32_precision, matmul.fp32_precision = "ieee", "ieee"
    try:
        yield
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


# --- the table --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def tiny_clip() -> Any:
    """Load the CLIP pair that ships with the package, once."""
    from mmdit.encoders.clip import load_tiny_clip

    return load_tiny_clip()


@lru_cache(maxsize=1)
def load_clip(name: str) -> Extractor:
    """Return the extractor of that name, kept for the next call, which must have a text tower.

    Raises:
        ValueError: it has none. As `load_extractor`.
    """
    clip = load_extractor(name)
    if clip.text is None:
        raise ValueError(f"the extractor {clip.name!r} has no text tower; give tiny_clip, clip:FOLDER or openclip:NAME")
    return clip


@lru_cache(maxsize=1)
def _tiny_clip() -> Extractor:
    from mmdit.encoders.clip import images_to_pixels

    clip = tiny_clip()
    tokenizer = clip.text.tokenizers["clip_l"]
    return Extractor(
        name="tiny_clip",
        width=clip.image_features(np.zeros((1, 64, 64, 3), dtype=np.uint8)).shape[1],
        hash=hash_tensors(clip.image.state_dict()),
        resize="bicubic, antialiased, float, to 64",
        prepare=lambda images: images_to_pixels(images, clip.image.resolution),
        network=clip.image,
        text=TextTower(clip.text_embeds, clip.embeds_of_features, tokenizer.lengths),
    )


def _pixel_statistics(options: Options) -> Extractor:
    def prepare(images: np.ndarray) -> Tensor:
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
        prepare=prepare,
        network=lambda features: features,
    )


def _inception(name: str, options: Options) -> Extractor:
    """FID's Inception; `inception_fid` resizes as published FIDs do, `inception_clean` as clean-fid does."""
    from mmdit_eval.inception import CLASSES, FEATURES, SIDE, Inception, legacy_pixels

    path = find_weights(name, KNOWN["inception"], options.weights)
    tensors = read_tensors(path)
    try:
        network = Inception(tensors).to(options.place)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if options.precision == "bf16":
        network.to_bf16()
    legacy = name == "inception_fid"
    return Extractor(
        name=name,
        width=FEATURES,
        hash=hash_weights(path, tensors, KNOWN["inception"]),
        resize=(
            "TensorFlow 1 bilinear, no antialiasing, float, to 299"
            if legacy
            else "clean-fid: Pillow bicubic per channel, antialiased, float, to 299"
        ),
        prepare=(
            (lambda images: legacy_pixels(to_tensor(images, options.place)))
            if legacy
            else (lambda images: resize_clean(images, SIDE, options.place))
        ),
        network=lambda pixels: torch.cat(network(pixels), dim=1),
        precision=options.precision,
        classes=CLASSES,
    )


def _tower(builder: str, name: str = "") -> Callable[[Options], Extractor]:
    """Return a builder of `towers`, which is imported when it is asked for."""

    def build(options: Options) -> Extractor:
        from mmdit_eval import towers

        function: Callable[..., Extractor] = getattr(towers, builder)
        return function(name, options) if name else function(options)

    return build


# tiny_clip knows shapes and emoji only; pixel_statistics knows nothing and is meant for tests and sanity checks
EXTRACTORS: dict[str, Callable[[Options], Extractor]] = {
    "tiny_clip": lambda options: _tiny_clip(),
    "pixel_statistics": _pixel_statistics,
    "inception_fid": lambda options: _inception("inception_fid", options),
    "inception_clean": lambda options: _inception("inception_clean", options),
    "dinov2_vits14": _tower("dinov2", "dinov2_vits14"),
    "dinov2_vitb14": _tower("dinov2", "dinov2_vitb14"),
    "dinov2_vitl14": _tower("dinov2", "dinov2_vitl14"),
    "timm:": _tower("timm_model"),
    "clip:": _tower("clip"),
    "openclip:": _tower("openclip"),
}
