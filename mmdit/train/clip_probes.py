"""The gate of the CLIP pair: retrieval, minimal pairs, and what can be read from its text towers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdit.config import EmojiConfig
from mmdit.data.emoji import EmojiDataset
from mmdit.data.shapes import draw_scene, render
from mmdit.encoders.clip import TinyClip
from mmdit.encoders.text import TextEncoders
from mmdit.train.scene_heads import SEED, WordEnds
from mmdit.train.scene_labels import canonical_list, swapped_scenes
from mmdit.train.text_probes import paraphrase_cosines, probe_emoji, probe_scenes


def probe_clip(clip: TinyClip, emoji_path: Path) -> dict[str, Any]:
    """Measure retrieval and minimal pairs on fresh scenes, and what can be read from the text towers; in per cent."""
    report: dict[str, Any] = {
        "top-1 of 64, 1-2 objects": top_one(clip, 2),
        "top-1 of 64, 1-4 objects": top_one(clip, 4),
        "minimal pairs, seen": minimal_pairs(clip, "seen"),
        "minimal pairs, heldout": minimal_pairs(clip, "heldout"),
    }
    for split in ("seen", "heldout"):
        emoji = EmojiDataset(EmojiConfig(path=emoji_path), split)
        chosen = np.random.default_rng(0).permutation(len(emoji))[: 64 * (3 if split == "heldout" else 16)]
        report[f"emoji top-1 of 64, {split}"] = _top_one(clip, emoji.pixels(chosen), emoji.captions(chosen))
    report["text towers"] = probe_clip_text(clip.text, emoji_path)
    return report


def _top_one(clip: TinyClip, images: np.ndarray, captions: Sequence[str], group: int = 64) -> dict[str, float]:
    """Return how often the right caption (picture) wins among `group`, all different."""
    cosines = [
        clip.image_embeds(images[i : i + group]) @ clip.text_embeds(captions[i : i + group]).T
        for i in range(0, len(captions) - group + 1, group)
    ]
    right = torch.arange(group)
    to_text = torch.stack([(c.argmax(dim=1) == right).float().mean() for c in cosines]).mean()
    to_image = torch.stack([(c.argmax(dim=0) == right).float().mean() for c in cosines]).mean()
    return {"to text": round(100 * float(to_text), 2), "to image": round(100 * float(to_image), 2)}


def top_one(clip: TinyClip, max_objects: int, groups: int = 31, group: int = 64) -> dict[str, float]:
    """Retrieve among 64 fresh scenes whose captions all say something different."""
    images, captions, index = [], [], 0
    for _ in range(groups):
        keys: set[str] = set()
        while len(keys) < group:
            scene = draw_scene(SEED + 3, index, "seen", max_objects)
            index += 1
            if canonical_list(scene) not in keys:
                keys.add(canonical_list(scene))
                images.append(render(scene))
                captions.append(scene.short())
    return _top_one(clip, np.stack(images), captions, group)


def minimal_pairs(clip: TinyClip, split: str, count: int = 1_000) -> dict[str, float]:
    """Return how often a two-object picture prefers its caption to the same words wrongly bound, by kind."""
    won: dict[str, float] = {}
    scenes = [draw_scene(SEED + 4, i, split, 2) for i in range(3 * count)]
    scenes = [scene for scene in scenes if scene.relation is not None][:count]
    embeds = clip.image_embeds(np.stack([render(scene) for scene in scenes]))
    true = (embeds * clip.text_embeds([scene.short() for scene in scenes])).sum(dim=1)
    swaps = [swapped_scenes(scene, heldout=True) for scene in scenes]
    for kind in ("order", "colour", "shape", "axis"):
        rows = [i for i, swap in enumerate(swaps) if kind in swap]
        wrong = (embeds[rows] * clip.text_embeds([swaps[i][kind].short() for i in rows])).sum(dim=1)
        won[kind] = round(100 * float((true[rows] > wrong).float().mean()), 2)
    return won


@torch.no_grad()
def probe_clip_text(text: TextEncoders, emoji_path: Path) -> dict[str, Any]:
    """Run T5's gate on the CLIP stream and its pooled vector; for information, as they are causal."""
    tokenizer = text.tokenizers["clip_l"]
    ends = WordEnds(tokenizer)

    def states_of(captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        out = text.encode(captions, "trim")
        (_, start, stop, width), _ = out.streams or ()
        assert out.context_mask is not None
        assert out.pooled is not None
        return (
            out.context[:, start:stop, :width],
            out.context_mask[:, start:stop],
            text.tokenize(captions)["clip_l"][:, : stop - start],
            out.pooled,
        )

    return {
        "short, 1-2 objects": probe_scenes(states_of, ends.spread),
        "cosine of pooled": paraphrase_cosines(lambda captions: states_of(captions)[3]),
        "emoji": probe_emoji(lambda captions: states_of(captions)[3], emoji_path),
    }
