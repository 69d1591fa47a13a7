"""Pictures beside their prompts and the true pictures, and what is seen of each: `Drawn`.

What networks say of one picture alone (features, embeddings, losses of its true picture) is a look, a line of `LOOKS`.
Looks are made batch by batch, by all processes together, each at its own pictures (`look_together`); a metric that
asks for one that nobody made makes it then. What needs the whole set (distances, ranks) is left to the first process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mmdit.config import SuiteConfig
from mmdit.data import make_dataset
from mmdit.diffusion.loss import equidistant_levels
from mmdit.pipeline import TextToImage
from mmdit_eval.clip_score import Texts, embed_texts
from mmdit_eval.distribution import Share
from mmdit_eval.features import Extractor, extract, extract_whole, load_clip
from mmdit_eval.moments import FloatArray
from mmdit_eval.statistics import Estimate

VALIDATION_LEVELS = 8  # equidistant t; the mean leaves out t = 1, as in arXiv:2403.03206v1, 5.3


@dataclass(frozen=True)
class Reference:
    """The items of one split that a suite looks at.

    Attributes:
        indices: int [N] into the data set; also the numbers that key each picture's noise.
        images: the true pictures, uint8 [N, R, R, 3].
    """

    split: str
    dataset: Any
    indices: np.ndarray
    captions: list[str]
    images: np.ndarray
    extractor: Extractor
    batch_size: int = 128

    @cached_property
    def features(self) -> FloatArray:
        """Features of the true pictures, [N, d]."""
        return extract(self.extractor, self.images, self.batch_size)

    def head(self, count: int) -> Reference:
        """Return the first `count` items."""
        return self.part(slice(0, count))

    def part(self, rows: slice | np.ndarray) -> Reference:
        """Return some of the items, by a slice or by their places [n]."""
        return Reference(
            self.split,
            self.dataset,
            self.indices[rows],
            self.captions[rows] if isinstance(rows, slice) else [self.captions[i] for i in rows],
            self.images[rows],
            self.extractor,
            self.batch_size,
        )


@dataclass(frozen=True)
class Drawn:
    """Pictures to be judged: `images[i]` was drawn for `reference.captions[i]`.

    Attributes:
        reference: the true pictures, which distances refer to, and their captions.
        pipeline: the run itself, or None where the pictures are true ones.
        looks: {look: [N, ...]}, those that were made.
        training: features of the training pictures, [T, d], where they were made.
    """

    images: np.ndarray
    reference: Reference
    suite: SuiteConfig
    pipeline: TextToImage | None = None
    looks: dict[str, np.ndarray] = field(default_factory=dict)
    training: FloatArray | None = None

    def look(self, name: str) -> np.ndarray:
        """Return one row a picture, [N, ...], of that line of `LOOKS`; made once."""
        if name not in self.looks:
            self.looks[name] = LOOKS[name](self)
        return self.looks[name]

    @cached_property
    def features(self) -> FloatArray:
        """Features of the pictures, float64 [N, d]."""
        return self.look("features")[:, : self.reference.extractor.width].astype(np.float64)

    @property
    def logits(self) -> FloatArray:
        """Logits of the pictures, float64 [N, classes]."""
        return self.look("features")[:, self.reference.extractor.width :].astype(np.float64)

    @cached_property
    def texts(self) -> Texts:
        """The captions, read by the text tower of `suite.clip`."""
        tower = load_clip(self.suite.clip).text
        assert tower is not None  # `load_clip` refuses others
        return embed_texts(self.reference.captions, tower, self.suite.long_captions)

    def head(self, count: int) -> Drawn:
        """Return the first `count` pictures, with what is known of them."""
        looks = {name: rows[:count] for name, rows in self.looks.items()}
        return Drawn(self.images[:count], self.reference.head(count), self.suite, self.pipeline, looks, self.training)


@dataclass(frozen=True)
class Measured:
    """What a metric found on one split.

    Attributes:
        scores: {score: value with interval}.
        per_image: {score: one number an image, None where it does not apply}; pairs rows that share prompts.
        influence: {distance: how much each image moves it}; pairs rows in a distance, which no image has by itself.
        chance: {score: what guessing gives}, where guessing is defined.
        details: anything else worth keeping, plain JSON types.
    """

    scores: dict[str, Estimate] = field(default_factory=dict)
    per_image: dict[str, list[float | None]] = field(default_factory=dict)
    influence: dict[str, list[float]] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def rounded(influence: np.ndarray) -> list[float]:
    """Return influences as a result keeps them, to six digits."""
    return [float(f"{value:.6g}") for value in influence]


# --- looks ------------------------------------------------------------------------------------------------------


def _features(drawn: Drawn) -> np.ndarray:
    """Features, with the logits behind them where there are any, float32 [N, d + classes]."""
    return extract_whole(drawn.reference.extractor, drawn.images, drawn.suite.batch_size)


def _clip_embeds(drawn: Drawn) -> np.ndarray:
    """Embeddings by the image tower of `suite.clip`, float64 [N, e]; its features are not made twice."""
    clip, extractor = load_clip(drawn.suite.clip), drawn.reference.extractor
    assert clip.text is not None
    if clip.describe() == extractor.describe():
        features = drawn.look("features")[:, : clip.width]
    else:
        features = extract_whole(clip, drawn.images, drawn.suite.batch_size)[:, : clip.width]
    return np.asarray(clip.text.image_embeds(torch.from_numpy(features)).double().cpu().numpy())


def _losses(drawn: Drawn) -> np.ndarray:
    """The training objective on each true picture, [N, levels]."""
    from mmdit_eval.validation import losses_by_level

    levels = equidistant_levels(VALIDATION_LEVELS)
    assert drawn.pipeline is not None
    return losses_by_level(drawn.pipeline, drawn.reference, levels, drawn.suite.seed).T


def _common_losses(drawn: Drawn) -> np.ndarray:
    """The error in velocity on each true picture, [N, levels - 1]."""
    from mmdit_eval.validation import velocity_losses

    assert drawn.pipeline is not None
    return velocity_losses(drawn.pipeline, drawn.reference, VALIDATION_LEVELS, drawn.suite.seed)[1].T


LOOKS: dict[str, Callable[[Drawn], np.ndarray]] = {
    "features": _features,
    "true_features": lambda drawn: drawn.reference.features,
    "clip_embeds": _clip_embeds,
    "losses": _losses,
    "common_losses": _common_losses,
}


def look_together(own: Drawn, ids: np.ndarray, whole: Reference, names: Sequence[str], share: Share) -> Drawn | None:
    """Make looks at this process's pictures, batch by batch, and bring pictures and looks to the first process.

    The batches are those the pictures were drawn in, cut from the whole list: so they, and every number, are the same
    whatever the number of processes.

    Args:
        own: this process's pictures with their items.
        ids: int64 [n], their places in `whole`.
        names: of `LOOKS`.

    Returns:
        All pictures with their looks; None in processes other than the first.
    """
    size, values = own.suite.batch_size, [own.images]
    starts = range(0, len(ids), size)
    parts = [Drawn(own.images[i : i + size], own.reference.part(slice(i, i + size)), own.suite, own.pipeline)
             for i in starts]  # fmt: skip
    with tqdm(total=len(ids), unit=" images", desc=f"measuring {whole.split}", disable=None, leave=False) as bar:
        for part in parts:
            for name in names:
                part.look(name)
            bar.update(len(part.images))
    if parts:
        values += [np.concatenate([part.looks[name] for part in parts]) for name in names]
    gathered = share.gather(ids, values, len(whole.indices))
    if gathered is None:
        return None
    looks = dict(zip(names, gathered[1:], strict=True))
    return Drawn(gathered[0], whole, own.suite, own.pipeline, looks)


@lru_cache(maxsize=1)
def training_features(config: Any, extractor: Extractor, batch_size: int, share: Share | None = None) -> Any:
    """Return features of every training picture, [T, d], kept for the next run; each process makes its batches.

    None in processes other than the first.
    """
    dataset, share = make_dataset(config, "train"), share or Share()
    ids, parts = [np.empty(0, dtype=np.int64)], [np.empty((0, extractor.width))]
    for start in share.of(range(0, len(dataset), batch_size)):
        rows = np.arange(start, min(start + batch_size, len(dataset)))
        ids.append(rows)
        parts.append(extract(extractor, dataset.pixels(rows), batch_size))
    gathered = share.gather(np.concatenate(ids), [np.concatenate(parts)], len(dataset))
    return gathered[0] if gathered is not None else None
