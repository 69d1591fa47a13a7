"""Train the embedded T5: span corruption, rewriting into the canonical list and the other wording, and scene heads.

    python scripts/train_tiny_encoders.py --part t5

What decides whether a denoiser can bind attributes on frozen states is that they can be read linearly, from each word
and from the mean; span corruption alone does not give that (facts: a U-Net on such states got 35 % of relations right,
98 % on states trained like these). Heads and decoder are thrown away; `probe` then fits fresh linear readers on
captions of training and tests them on held-out combinations.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit import rng
from mmdit.config import EmojiConfig
from mmdit.data.captions import RELATION_WORDS
from mmdit.data.emoji import EmojiDataset, EmojiRecord
from mmdit.data.shapes import Scene, draw_scene
from mmdit.encoders.t5 import NUM_SENTINELS, TASKS, Rewriter, corrupt_spans, rewriting_loss
from mmdit.encoders.tokenizers import T5_PAD, T5Tokenizer, pad, train_t5_pieces
from mmdit.encoders.towers import Tower, build_tower, save_tower, tower_states
from mmdit.train.scene_labels import (
    ATTRIBUTES,
    CLASSES,
    GRAMMAR_WORDS,
    IGNORE,
    MAX_GROUPS,
    canonical_list,
    slot_labels,
    word_labels,
)
from mmdit.train.tracking import processor

SEED = 20  # of the scenes whose captions are read
PIECES = 1_000
MAX_TOKENS = 160
T5_CONFIG: dict[str, Any] = {
    "d_model": 256,
    "d_kv": 32,
    "num_heads": 4,
    "d_ff": 320,
    "num_layers": 3,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.0,
    "use_cache": False,
}


@dataclass(frozen=True)
class Text:
    """One training caption: a scene's (short wording 0 or 1, or long), an emoji's, or empty."""

    caption: str
    scene: Scene | None = None
    emoji: EmojiRecord | None = None


def emoji_records(path: Path, split: str = "train") -> list[EmojiRecord]:
    """Read the names of one split of the emoji file."""
    data = EmojiDataset(EmojiConfig(path=path), split)
    return data.records(range(len(data)))


def emoji_list(record: EmojiRecord) -> str:
    """Write an emoji's canonical list: "firefighter ; medium-dark ; woman"."""
    return " ; ".join(part for part in (record.base, record.tone, record.gender) if part)


def draw_text(index: int, emoji: Sequence[EmojiRecord], long: bool = False, split: str = "train") -> Text:
    """Return training caption `index`: mostly one or two objects, some up to six, an eighth emoji, 3 % empty."""
    random = rng.generator(SEED, "data", index, step=100 + long)
    kind = random.random()
    if kind < 0.03 and not long:
        return Text("")
    if kind < 0.16 and not long and emoji:
        record = emoji[int(random.integers(len(emoji)))]
        return Text(record.caption, emoji=record)
    scene = draw_scene(SEED, index, split, 2 if random.random() < 0.7 else 6)
    return Text(scene.long() if long else scene.short(int(random.integers(2))), scene=scene)


def train_pieces(path: Path, emoji: Sequence[EmojiRecord], scenes: int = 6_000) -> T5Tokenizer:
    """Train the sentencepiece model on captions of every form, canonical lists and emoji names."""
    sentences: list[str] = []
    for index in range(scenes):
        scene = draw_scene(SEED, index, "train", 6)
        sentences += [scene.short(0), scene.short(1), canonical_list(scene)]
        if index % 8 == 0:
            sentences.append(scene.long())
    sentences += [text for record in emoji for text in (record.caption, emoji_list(record))]
    train_t5_pieces(sentences, path, PIECES, GRAMMAR_WORDS)
    return T5Tokenizer(path)


class Pieces:
    """Which word each piece of a caption belongs to, so that labels of words become labels of tokens."""

    def __init__(self, tokenizer: T5Tokenizer) -> None:
        names = [tokenizer.id_to_piece(i) for i in range(len(tokenizer))]
        # sentinels are looked up too: they begin no word and carry no letters
        self.begins = np.array([name.startswith("\u2581") for name in names] + [False] * NUM_SENTINELS)
        self.letters = np.array([any(c.isalnum() for c in name) for name in names] + [False] * NUM_SENTINELS)
        self.letters[:3] = False  # pad, end, unknown

    def spread(self, ids: Sequence[int], labels: np.ndarray) -> np.ndarray:
        """Return int64 [tokens, attributes]: each letter-bearing piece takes its word's row, others `IGNORE`."""
        array = np.asarray(ids)
        words = np.cumsum(self.begins[array]) - 1
        out = np.full((len(ids), labels.shape[1]), IGNORE, dtype=np.int64)
        kept = self.letters[array] & (words >= 0) & (words < len(labels))
        out[kept] = labels[words[kept]]
        return out


class SceneHeads(nn.Module):
    """Linear readers in training: each word's own object; the canonical list or the emoji's parts from the mean."""

    def __init__(self, width: int, emoji: Sequence[EmojiRecord]) -> None:
        super().__init__()
        sizes = [len(CLASSES[name]) for name in ATTRIBUTES]
        self.words = nn.ModuleList(nn.Linear(width, size) for size in sizes)
        self.slots = nn.ModuleList(nn.Linear(width, size) for _ in range(MAX_GROUPS) for size in sizes)
        self.vocabulary = [sorted({getattr(r, field) for r in emoji}) for field in ("base", "tone", "gender")]
        self.emoji = nn.ModuleList(nn.Linear(width, max(1, len(names))) for names in self.vocabulary)
        self._index = [{name: i for i, name in enumerate(names)} for names in self.vocabulary]

    def emoji_labels(self, record: EmojiRecord) -> list[int]:
        parts = (record.base, record.tone, record.gender)
        return [index[part] for index, part in zip(self._index, parts, strict=True)]

    def loss(self, states: Tensor, mean: Tensor, words: Tensor, slots: Tensor, emoji: Tensor) -> dict[str, Tensor]:
        """Cross-entropies, each a mean over its labelled places.

        Args:
            states: [B, L, D]; mean: [B, D] over real tokens.
            words: int64 [B, L, attributes]; slots: [B, groups * attributes]; emoji: [B, 3]; `IGNORE` where unlabelled.
        """
        said = words[..., 0] != IGNORE
        out = {}
        if said.any():
            chosen, labels = states[said], words[said]
            out["words"] = _sum(
                F.cross_entropy(head(chosen).float(), labels[:, i]) for i, head in enumerate(self.words)
            )
        rows = slots[:, 0] != IGNORE
        if rows.any():
            chosen, labels = mean[rows], slots[rows]
            out["slots"] = _sum(
                F.cross_entropy(head(chosen).float(), labels[:, i]) for i, head in enumerate(self.slots)
            )
        rows = emoji[:, 0] != IGNORE
        if rows.any():
            chosen, labels = mean[rows], emoji[rows]
            out["emoji"] = _sum(
                F.cross_entropy(head(chosen).float(), labels[:, i]) for i, head in enumerate(self.emoji)
            )
        return out


def _sum(values: Any) -> Tensor:
    return torch.stack(list(values)).sum()


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """Average the states of real tokens: [B, L, D], bool [B, L] -> [B, D]."""
    weight = mask[:, :, None].to(states.dtype)
    return (states * weight).sum(dim=1) / weight.sum(dim=1)


def rewriting_target(text: Text, task: str) -> str:
    """Return what a caption is to be rewritten into."""
    if text.emoji is not None:
        return emoji_list(text.emoji)
    if text.scene is None:
        return ""
    if task == "list":
        return canonical_list(text.scene)
    return text.scene.long() if task == "long" else text.scene.short(("first_wording", "second_wording").index(task))


def encode_mean(module: nn.Module, tokenizer: T5Tokenizer, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Return raw states [B, L, D], mask [B, L] and ids [B, L] of captions."""
    rows = tokenizer(captions, MAX_TOKENS)
    ids = pad(rows, T5_PAD, max(map(len, rows)))
    mask = ids != T5_PAD
    states, _ = tower_states(module, ids, mask)
    return states, mask, ids


def train_t5(
    out: Path,
    *,
    emoji_path: Path = Path("data/emoji.parquet"),
    seconds: float | None = None,
    steps: int = 1_300,
    batch_size: int = 128,
    lr: float = 2e-3,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train the T5, write spiece.model and t5.safetensors to `out`, and return {"config", "training", "quality"}.

    Args:
        seconds: stop after this many seconds of training instead of `steps` (then not reproducible step by step).
        batch_size: captions a step, one in 32 of them long.
    """
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    emoji = emoji_records(emoji_path)
    tokenizer = train_pieces(out / "spiece.model", emoji)
    vocab_size = len(tokenizer) + NUM_SENTINELS
    config = {"vocab_size": vocab_size, **T5_CONFIG}
    module = build_tower("t5", config).train()
    biases = start_small(module)
    heads, rewriter = SceneHeads(T5_CONFIG["d_model"], emoji), Rewriter(vocab_size, T5_CONFIG["d_model"])
    parameters = [*module.parameters(), *heads.parameters(), *rewriter.parameters()]
    others = [p for p in parameters if all(p is not bias for bias in biases)]
    groups = [{"params": others, "factor": 1.0}, {"params": biases, "factor": 10.0, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    pieces = Pieces(tokenizer)

    started, step = time.perf_counter(), 0
    average: dict[str, float] = {}
    while True:
        elapsed = time.perf_counter() - started
        progress = step / steps if seconds is None else elapsed / seconds
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            warmup, cosine = min(1.0, (step + 1) / 50), 0.5 * (1 + math.cos(math.pi * progress))
            group["lr"] = group["factor"] * lr * warmup * (0.02 + 0.98 * cosine)
        with torch.autocast("cpu", torch.bfloat16):
            losses = _t5_losses(module, heads, rewriter, tokenizer, pieces, emoji, step, batch_size, seed)
        total = _sum(losses.values())
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        for name, loss in losses.items():
            value = float(loss.detach())
            average[name] = 0.95 * average.get(name, value) + 0.05 * value
        step += 1
        if step % 20 == 0:
            log(f"t5 step {step} {elapsed:.0f} s " + " ".join(f"{k} {v:.3f}" for k, v in average.items()))
    seconds_used = time.perf_counter() - started

    module.eval()
    mean, std = state_statistics(module, tokenizer, emoji)
    tower = Tower(module, mean.half().float(), std.half().float())
    save_tower(out, "t5", tower)
    quality = probe_t5(tower, tokenizer, emoji_path)
    training = {
        "seconds": round(seconds_used),
        "steps": step,
        "lr_schedule_by": "steps" if seconds is None else "seconds",
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "threads": torch.get_num_threads(),
        "hardware": processor(),
        "loss": {name: round(value, 4) for name, value in average.items()},
    }
    return {"config": {"t5": config}, "training": training, "quality": quality}


def start_small(module: nn.Module) -> list[nn.Parameter]:
    """Shrink T5's initial embeddings and outputs, spread its position biases; return the biases.

    Departs from T5's own initialisation, which suits a hundred times more steps: order is known by these biases alone,
    and their initial 0.06 leaves a bag of words (tried: after 700 steps order-swapped captions had a cosine of 0.99);
    beside embeddings of size 1 what layers add grows too slowly (slot loss after 150 steps 1.67 against 0.35).
    """
    biases = []
    for name, parameter in module.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.normal_(parameter, std=2.0)
            biases.append(parameter)
        elif name in ("shared.weight", "encoder.embed_tokens.weight") or name.endswith((".o.weight", ".wo.weight")):
            parameter.data.mul_(0.3)
    return biases


def _t5_losses(
    module: nn.Module,
    heads: SceneHeads,
    rewriter: Rewriter,
    tokenizer: T5Tokenizer,
    pieces: Pieces,
    emoji: Sequence[EmojiRecord],
    step: int,
    batch_size: int,
    seed: int,
) -> dict[str, Tensor]:
    random = rng.generator(seed, "data_order", step)
    # every step sees every kind: steps of short captions only, alternating with others, were tried and learn badly
    texts = [draw_text(step * batch_size + i, emoji, long=i < batch_size // 32) for i in range(batch_size)]
    tasks = ["list" if random.random() < 0.6 else ("first_wording", "second_wording")[int(random.integers(2))]
             for _ in texts]  # fmt: skip
    if step % 25 == 1:  # short -> long now and then: its filler cannot be foreseen, so little is learnt from it
        tasks[-4:] = ["long"] * 4
    captions = [text.caption for text in texts]
    for i, text in enumerate(texts):  # some read the canonical list itself
        if text.scene is not None and random.random() < 0.05:
            captions[i] = canonical_list(text.scene)
    rows = tokenizer(captions, MAX_TOKENS)
    ids = pad(rows, T5_PAD, max(map(len, rows)))
    words = torch.full((*ids.shape, len(ATTRIBUTES)), IGNORE)
    slots = torch.full((len(texts), MAX_GROUPS * len(ATTRIBUTES)), IGNORE)
    parts = torch.full((len(texts), 3), IGNORE)
    for i, text in enumerate(texts):
        if text.scene is not None:
            labels = word_labels(captions[i], text.scene)[1]
            words[i, : len(rows[i])] = torch.from_numpy(pieces.spread(rows[i], labels))
        if text.emoji is not None:
            parts[i] = torch.tensor(heads.emoji_labels(text.emoji))
        else:
            slots[i] = torch.from_numpy(slot_labels(text.scene).reshape(-1))

    mask = ids != T5_PAD
    states = _states(module, ids)
    losses = heads.loss(states, mean_state(states, mask), words, slots, parts)
    some = slice(step % 4, None, 4)  # decoders cost as much as the encoder; a quarter of the rows teaches enough
    targets = tokenizer([rewriting_target(t, k) for t, k in zip(texts[some], tasks[some], strict=True)], MAX_TOKENS)
    losses["rewriting"] = rewriting_loss(
        rewriter,
        states[some],
        mask[some],
        torch.tensor([TASKS.index(task) for task in tasks[some]]),
        pad(targets, T5_PAD, max(map(len, targets))),
    )
    corrupted = [corrupt_spans(row, len(tokenizer), random) for row in rows[(step + 1) % 4 :: 4]]
    inputs, hidden = ([pair[k] for pair in corrupted] for k in (0, 1))
    ids = pad(inputs, T5_PAD, max(map(len, inputs)))
    mask = ids != T5_PAD
    states = _states(module, ids)
    spans = torch.full((len(inputs),), TASKS.index("spans"))
    wanted = pad(hidden, T5_PAD, max(map(len, hidden)))
    losses["spans"] = 0.3 * rewriting_loss(rewriter, states, mask, spans, wanted)
    return losses


def _states(module: nn.Module, ids: Tensor) -> Tensor:
    """Run the encoder on groups of rows of like length, to share little padding: [B, L] -> [B, L, D]."""
    real = (ids != T5_PAD).sum(dim=1)
    group = torch.bucketize(real, torch.tensor([8, 14, 30]))
    parts, places = [], []
    for rows in (torch.nonzero(group == g).flatten() for g in range(4)):
        if len(rows):
            part = ids[rows, : int(real[rows].max())]
            states, _ = tower_states(module, part, part != T5_PAD)
            parts.append(F.pad(states, (0, 0, 0, ids.shape[1] - states.shape[1])))
            places.append(rows)
    return torch.cat(parts)[torch.argsort(torch.cat(places))]


@torch.no_grad()
def state_statistics(module: nn.Module, tokenizer: T5Tokenizer, emoji: Sequence[EmojiRecord]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel over the real tokens of 4,096 captions."""
    seen = []
    for start in range(0, 4_096, 256):
        captions = [draw_text(10_000_000 + start + i, emoji).caption for i in range(256)]
        states, mask, _ = encode_mean(module, tokenizer, captions)
        seen.append(states[mask])
    every = torch.cat(seen).double()
    return every.mean(dim=0).float(), every.std(dim=0).clamp(min=1e-3).float()


# --- the gate ---------------------------------------------------------------------------------------------------------


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
        states, mask, ids = encode_mean(tower.module, tokenizer, captions)
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


def write_description(out: Path, part: str, result: dict[str, Any]) -> None:
    """Merge one part's config, training record and quality into text.json."""
    file = out / "text.json"
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    content.setdefault("encoders", {}).update(result["config"])
    content.setdefault("training", {})[part] = result["training"]
    content.setdefault("quality", {})[part] = result["quality"]
    temporary = file.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(file)
