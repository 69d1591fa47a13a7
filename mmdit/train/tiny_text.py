"""Train the embedded T5: span corruption, rewriting into the canonical list and the other wording, and scene heads.

    python scripts/train_tiny_encoders.py --part t5

What decides whether a denoiser can bind attributes on frozen states is that they can be read linearly, from each word
and from the mean; span corruption alone does not give that (facts: a U-Net on such states got 35 % of relations right,
98 % on states trained like these). Heads and decoder are thrown away; `text_probes` then fits fresh linear
readers on captions of training and tests them on held-out combinations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit import rng
from mmdit.data.emoji import EmojiRecord
from mmdit.data.shapes import Scene, draw_scene
from mmdit.encoders.t5 import NUM_SENTINELS, TASKS, Rewriter, corrupt_spans, rewriting_loss
from mmdit.encoders.tokenizers import T5_PAD, T5Tokenizer, pad, train_t5_pieces
from mmdit.encoders.towers import Tower, build_tower, save_tower, tower_states
from mmdit.train.recipe import run_recipe
from mmdit.train.scene_heads import SEED, T5_TOKENS, Pieces, SceneHeads, emoji_records, encode_raw, mean_state
from mmdit.train.scene_labels import (
    ATTRIBUTES,
    GRAMMAR_WORDS,
    IGNORE,
    MAX_GROUPS,
    canonical_list,
    slot_labels,
    word_labels,
)
from mmdit.train.text_probes import probe_t5

PIECES = 1_000
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


def rewriting_target(text: Text, task: str) -> str:
    """Return what a caption is to be rewritten into."""
    if text.emoji is not None:
        return emoji_list(text.emoji)
    if text.scene is None:
        return ""
    if task == "list":
        return canonical_list(text.scene)
    return text.scene.long() if task == "long" else text.scene.short(("first_wording", "second_wording").index(task))


def train_t5(
    out: Path,
    *,
    emoji_path: Path = Path("data/emoji.parquet"),
    seconds: float | None = None,
    steps: int = 1_300,
    batch_size: int = 128,
    lr: float = 2e-3,
    dropout: float = 0.1,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train the T5, write spiece.model and t5.safetensors to `out`, and return {"config", "training", "quality"}.

    Args:
        seconds: stop after this many seconds of training instead of `steps` (then not reproducible step by step).
        batch_size: captions a step, one in 32 of them long.
        dropout: inside the encoder, in training.
    """
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    emoji = emoji_records(emoji_path)
    tokenizer = train_pieces(out / "spiece.model", emoji)
    vocab_size = len(tokenizer) + NUM_SENTINELS
    config = {"vocab_size": vocab_size, **T5_CONFIG}
    module = build_tower("t5", {**config, "dropout_rate": dropout}).train()
    biases = start_small(module)
    heads, rewriter = SceneHeads(T5_CONFIG["d_model"], emoji), Rewriter(vocab_size, T5_CONFIG["d_model"])
    parameters = [*module.parameters(), *heads.parameters(), *rewriter.parameters()]
    others = [p for p in parameters if all(p is not bias for bias in biases)]
    groups = [{"params": others, "factor": 1.0}, {"params": biases, "factor": 10.0, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    pieces = Pieces(tokenizer)

    def losses_of(step: int) -> dict[str, Tensor]:
        return _t5_losses(module, heads, rewriter, tokenizer, pieces, emoji, step, batch_size, seed)

    training = run_recipe(losses_of, parameters, optimizer, lr=lr, steps=steps, seconds=seconds, log=log)

    module.eval()
    mean, std = state_statistics(module, tokenizer, emoji)
    tower = Tower(module, mean.half().float(), std.half().float())
    save_tower(out, "t5", tower)
    quality = probe_t5(tower, tokenizer, emoji_path)
    training |= {"batch_size": batch_size, "dropout": dropout, "seed": seed}
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
    num_long = batch_size // 32
    texts = [draw_text(step * batch_size + i, emoji, long=i < num_long) for i in range(batch_size)]
    tasks = ["list" if random.random() < 0.6 else ("first_wording", "second_wording")[int(random.integers(2))]
             for _ in texts]  # fmt: skip
    if step % 25 == 1:  # short -> long now and then: its filler cannot be foreseen, so little is learnt from it
        tasks[-4:] = ["long"] * 4
    captions = [text.caption for text in texts]
    for i, text in enumerate(texts):  # some read the canonical list itself
        if text.scene is not None and random.random() < 0.05:
            captions[i] = canonical_list(text.scene)
    rows = tokenizer(captions, T5_TOKENS)
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
        # In a mean over 120 words two objects must be loud. Asked for them there too, it read new (colour, shape) of
        # short captions worse: 93.7 % instead of 97.1 % of the colours (one run each).
        elif i >= num_long:
            slots[i] = torch.from_numpy(slot_labels(text.scene).reshape(-1))

    mask = ids != T5_PAD
    states = _states(module, ids)
    losses = heads.loss(states, mean_state(states, mask), words, slots, parts)
    some = slice(step % 4, None, 4)  # decoders cost as much as the encoder; a quarter of the rows teaches enough
    targets = tokenizer([rewriting_target(t, k) for t, k in zip(texts[some], tasks[some], strict=True)], T5_TOKENS)
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
        states, mask, _ = encode_raw(module, tokenizer, captions)
        seen.append(states[mask])
    every = torch.cat(seen).double()
    return every.mean(dim=0).float(), every.std(dim=0).clamp(min=1e-3).float()
