"""What each image token reads from the text: maps of single words, for the report.

The true picture of a prompt is noised to one level of t and the network looks at it once, so every row is asked the
same. Weights are averaged over heads and blocks; a word's are summed over its tokens in every encoder's part.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmdit import rng
from mmdit.config import AttentionConfig
from mmdit.denoiser import record_attention
from mmdit.encoders.text import TextEncoders
from mmdit.encoders.vae import to_pixels
from mmdit.pipeline import TextToImage
from mmdit_eval.drawn import Reference
from mmdit_eval.words import chosen_words

SIDE = 16  # every map is brought to this size


def word_positions(text: TextEncoders, caption: str, word: str) -> dict[str, list[int]]:
    """Return where a word's tokens stand in each encoder's ids: {encoder: positions}; the first time it occurs."""
    found = {}
    before = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption.lower())
    if before is None:
        return {}
    parts = [caption[: before.start()].strip(), caption[: before.end()].strip()]
    whole = text.tokenize([f"{caption} and"])  # one word more: so that the last one's end shows too
    starts = text.tokenize([part or " " for part in parts])
    for name, ids in whole.items():
        # a prefix of the caption has a prefix of its tokens, up to where the end token and the padding begin
        shared = [_common(row, ids[0]) for row in starts[name]]
        found[name] = list(range(shared[0] if parts[0] else _first(name), shared[1]))
    return {name: positions for name, positions in found.items() if positions}


def _common(a: Any, b: Any) -> int:
    different = (a != b).nonzero()
    return int(different[0]) if len(different) else len(a)


def _first(name: str) -> int:
    return 0 if name == "t5" else 1  # CLIP begins with a start token


@torch.inference_mode()
def attention_maps(pipeline: TextToImage, reference: Reference, item: int, config: AttentionConfig) -> dict[str, Any]:
    """Look at one prompt of a split.

    Returns:
        {"caption", "t", "maps": {word: [SIDE][SIDE]}}: shares of an image token's attention that go to the word,
        averaged over blocks; no maps where the network reads no text tokens.
    """
    caption = reference.captions[item]
    device = next(pipeline.denoiser.parameters()).device
    latents = pipeline.vae.encode(to_pixels(reference.images[item : item + 1]).to(device)).float()
    noise = torch.from_numpy(rng.normal(0, "val_noise", [int(reference.indices[item])], latents.shape[1:])).to(device)
    t = torch.full((1,), config.t, device=device)
    conditioning = pipeline.encode([caption]).to(device)
    noisy = pipeline.schedule.add_noise(latents, noise, t)
    with record_attention(pipeline.denoiser) as records:
        pipeline.denoiser(noisy, pipeline.schedule.timestep(t).float(), conditioning)
    streams = conditioning.streams or ()
    maps: dict[str, list[list[float]]] = {}
    for word in chosen_words(caption, config.words) if records else []:
        columns = set()
        for encoder, positions in word_positions(pipeline.text, caption, word).items():
            for name, start, stop, _ in streams:
                if name == encoder or (name == "clip" and encoder.startswith("clip")):
                    columns |= {start + position for position in positions if start + position < stop}
        if columns:
            layers = [_square(weights[0][..., sorted(columns)]) for found in records.values() for weights in found]
            maps[word] = np.round(torch.stack(layers).mean(0).cpu().numpy().astype(float), 5).tolist()
    return {"caption": caption, "t": config.t, "maps": maps}


def _square(weights: torch.Tensor) -> torch.Tensor:
    """[A, N, K] -> [SIDE, SIDE]: mean over heads, sum over the word's tokens, image tokens in their places."""
    tokens = weights.float().mean(0).sum(-1)
    side = math.isqrt(len(tokens))
    grid = tokens.reshape(1, 1, side, -1)
    return torch.nn.functional.interpolate(grid, size=(SIDE, SIDE), mode="nearest")[0, 0]


def write_attention(
    checkpoint: Path, reference: Reference, config: AttentionConfig, out: Path, pipeline: TextToImage | None = None
) -> None:
    """Store the maps of the first prompts of a split; what is there for these weights and settings is kept."""
    settings = {"checkpoint": checkpoint.name, "config": config.model_dump(mode="json")}
    try:
        if json.loads(out.read_text(encoding="utf-8"))["settings"] == json.loads(json.dumps(settings)):
            return
    except (OSError, ValueError, KeyError):
        pass
    pipeline = pipeline or TextToImage.load(checkpoint)
    found = [attention_maps(pipeline, reference, item, config) for item in range(config.prompts)]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"settings": settings, "prompts": found}), encoding="utf-8")
