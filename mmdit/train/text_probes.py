"""The gate of a text encoder: what linear readers, fitted on training captions, read from held-out combinations.

The gate is on short captions of one and two objects, all held-out combinations together: each word's own colour, shape
and place, and both objects from the mean, at least 98 %. No diffusion run is worth its time on states that fail it
(facts: a U-Net on such states got 35 % of relations right, on passing ones 98 %). Fuller scenes and long captions are
read for information; in the mean of a long caption the objects are faint, and `text.json` says how faint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.data.captions import RELATION_WORDS
from mmdit.data.shapes import draw_scene
from mmdit.encoders.tokenizers import T5Tokenizer
from mmdit.encoders.towers import Tower
from mmdit.train.scene_heads import SEED, Pieces, emoji_records, encode_raw, mean_state
from mmdit.train.scene_labels import ATTRIBUTES, CLASSES, IGNORE, MAX_GROUPS, slot_labels, word_labels

COMBINATIONS = ("pair", "binding", "all")  # a known pair in a new relation; a new (colour, shape); both


def fit_reader(features: Tensor, labels: Tensor, classes: int, rounds: int = 40) -> nn.Linear:
    """Fit multinomial logistic regression by L-BFGS, with a small ridge."""
    reader = nn.Linear(features.shape[1], classes)
    nn.init.zeros_(reader.weight)
    nn.init.zeros_(reader.bias)
    optimizer = torch.optim.LBFGS(reader.parameters(), max_iter=rounds, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(reader(features), labels) + 1e-4 * reader.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return reader


def _accuracy(reader: nn.Linear, features: Tensor, labels: Tensor) -> float:
    return round(100 * float((reader(features).argmax(dim=1) == labels).float().mean()), 2) if len(labels) else math.nan


def probe_scenes(
    states_of: Callable[[Sequence[str]], tuple[Tensor, Tensor, Tensor, Tensor]],
    pieces: Callable[[Sequence[int], np.ndarray], np.ndarray],
    *,
    max_objects: int = 2,
    long: bool = False,
    count: int = 2_000,
) -> dict[str, Any]:
    """Fit linear readers on training captions and test them on held-out combinations, in per cent.

    Args:
        states_of: captions -> (standardised states [B, L, D], mask, ids, vector [B, D] that stands for the caption).
        pieces: (ids of a caption, word labels) -> token labels.

    Returns:
        accuracies "<kind> -> <attribute>" from each colour and shape word, "mean -> slots <attribute>", by kind of
        held-out combination and of all of them together; of slots the worse one; and the worst of each kind.
    """

    def gather(split: str, first: int) -> dict[str, Any]:
        scenes = [draw_scene(SEED + 1, first + i, split, max_objects) for i in range(count)]
        captions = [scene.long() if long else scene.short(i % 2) for i, scene in enumerate(scenes)]
        features: dict[str, list[Tensor]] = {"colour": [], "shape": []}
        labels: dict[str, list[Tensor]] = {"colour": [], "shape": []}
        kinds_of: dict[str, list[str]] = {"colour": [], "shape": []}
        vectors = []
        for start in range(0, count, 250):
            states, mask, ids, vector = states_of(captions[start : start + 250])
            vectors.append(vector)
            for i in range(len(ids)):
                scene = scenes[start + i]
                kinds, wanted = word_labels(captions[start + i], scene)
                row = ids[i][mask[i]].tolist()
                index = np.arange(len(kinds))[:, None]
                places = pieces(row, np.where(np.array(kinds)[:, None] != "", index, IGNORE))[:, 0]
                for place, word in enumerate(places.tolist()):
                    if word != IGNORE and kinds[word] in features:
                        features[kinds[word]].append(states[i, place])
                        labels[kinds[word]].append(torch.from_numpy(wanted[word]))
                        kinds_of[kinds[word]].append(scene.heldout_kind or "")
        slots = torch.from_numpy(np.stack([slot_labels(scene).reshape(-1) for scene in scenes]))
        return {
            "words": {k: (torch.stack(features[k]), torch.stack(labels[k]), np.array(kinds_of[k])) for k in features},
            "mean": torch.cat(vectors),
            "slots": slots,
            "kinds": np.array([scene.heldout_kind or "" for scene in scenes]),
        }

    seen, held = gather("train", 0), gather("heldout", 0)
    report: dict[str, Any] = {}
    for kind, (features, labels, _) in seen["words"].items():
        tested, wanted, origin = held["words"][kind]
        for a, attribute in enumerate(ATTRIBUTES):
            if max_objects <= 2 and attribute == "count":
                continue
            reader = fit_reader(features, labels[:, a], len(CLASSES[attribute]))
            for combination in COMBINATIONS:
                rows = torch.from_numpy((origin == combination) | (combination == "all"))
                report[f"{kind} word -> {attribute}, {combination}"] = _accuracy(reader, tested[rows], wanted[rows, a])
    slots = 2 if max_objects == 2 else MAX_GROUPS
    for a, attribute in enumerate(ATTRIBUTES):
        if max_objects <= 2 and attribute == "count":
            continue
        readers = [
            fit_reader(seen["mean"], seen["slots"][:, s * len(ATTRIBUTES) + a], len(CLASSES[attribute]))
            for s in range(slots)
        ]
        for combination in COMBINATIONS:
            rows = torch.from_numpy((held["kinds"] == combination) | (combination == "all"))
            right = [
                _accuracy(reader, held["mean"][rows], held["slots"][rows, s * len(ATTRIBUTES) + a])
                for s, reader in enumerate(readers)
            ]
            report[f"mean -> slots' {attribute}, {combination}"] = min(right)
    for combination in COMBINATIONS:
        values = [value for name, value in report.items() if name.endswith(combination) and not math.isnan(value)]
        report[f"worst, {combination}"] = min(values)
    return report


def paraphrase_cosines(vector_of: Callable[[Sequence[str]], Tensor], count: int = 500) -> dict[str, float]:
    """Return mean cosines of held-out two-object captions with their other wording and with their swapped order."""
    scenes = [draw_scene(SEED + 2, i, "heldout", 2) for i in range(4 * count)]
    scenes = [scene for scene in scenes if scene.relation is not None][:count]
    first, other = (vector_of([scene.short(w) for scene in scenes]) for w in (0, 1))
    words = [RELATION_WORDS[scene.relation] for scene in scenes if scene.relation is not None]
    # the same words with the opposite relation: the objects exchanged
    swapped = vector_of([scene.short(0).replace(a, b) for scene, (a, b) in zip(scenes, words, strict=True)])
    return {
        "paraphrase": round(float(F.cosine_similarity(first, other).mean()), 4),
        "order swapped": round(float(F.cosine_similarity(first, swapped).mean()), 4),
    }


@torch.no_grad()
def probe_t5(tower: Tower, tokenizer: T5Tokenizer, emoji_path: Path) -> dict[str, Any]:
    """Run the gate on a T5 tower; see `probe_scenes`."""
    pieces = Pieces(tokenizer)

    def states_of(captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        states, mask, ids = encode_raw(tower.module, tokenizer, captions)
        states = (states - tower.state_mean) / tower.state_std
        return states, mask, ids, mean_state(states, mask)

    def vector_of(captions: Sequence[str]) -> Tensor:
        return states_of(captions)[3]

    return {
        "short, 1-2 objects": probe_scenes(states_of, pieces.spread),
        "short, 1-6 objects": probe_scenes(states_of, pieces.spread, max_objects=6),
        "long, 1-2 objects": probe_scenes(states_of, pieces.spread, long=True, count=800),
        "cosine": paraphrase_cosines(vector_of),
        "emoji": probe_emoji(vector_of, emoji_path),
    }


@torch.no_grad()
def probe_emoji(vector_of: Callable[[Sequence[str]], Tensor], emoji_path: Path) -> dict[str, float]:
    """Read tone and gender from the mean state: fitted on seen names, tested on held-out combinations, in per cent."""
    seen, held = emoji_records(emoji_path), emoji_records(emoji_path, "heldout")
    features = [torch.cat([vector_of([r.caption for r in records[i : i + 256]]) for i in range(0, len(records), 256)])
                for records in (seen, held)]  # fmt: skip
    report = {}
    for field in ("tone", "gender"):
        names = sorted({getattr(r, field) for r in seen})
        labels = [torch.tensor([names.index(getattr(r, field)) for r in records]) for records in (seen, held)]
        report[field] = _accuracy(fit_reader(features[0], labels[0], len(names)), features[1], labels[1])
    return report
