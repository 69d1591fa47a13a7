"""Train the embedded CLIP pair: one image tower against a CLIP-L-like and a CLIP-G-like text tower.

    python scripts/train_tiny_encoders.py --part clip

A plain contrastive loss tells "A left of B" from "B left of A" hardly better than a coin (facts: 53 %), because random
captions seldom differ in order alone. So two-object pictures also compete against captions of the same words wrongly
bound, and heads, thrown away afterwards, name the scene's objects in order from the pooled vectors, and each object
from its words and from the picture's tokens that it covers. Without the heads on words and tokens neither side learnt
order in 950 steps (tried: 49 % on swapped captions, 66 % top-1).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit import rng
from mmdit.config import EmojiConfig
from mmdit.data.emoji import EmojiDataset, EmojiRecord
from mmdit.data.shapes import COLOURS, SHAPES, Scene, draw_scene, render
from mmdit.encoders.clip import IMAGE_FILE, ImageTower, contrastive_loss, images_to_pixels, load_tiny_clip
from mmdit.encoders.text import clip_lengths
from mmdit.encoders.tokenizers import CLIP_END, CLIP_START, CLIP_VOCAB_SIZE, ClipTokenizer, pad
from mmdit.encoders.towers import Tower, build_tower, save_tower, tower_states
from mmdit.train.clip_probes import probe_clip
from mmdit.train.recipe import run_recipe, write_description
from mmdit.train.scene_heads import SEED, SceneHeads, WordEnds
from mmdit.train.scene_labels import (
    ATTRIBUTES,
    IGNORE,
    MAX_GROUPS,
    canonical_list,
    group_labels,
    slot_labels,
    swapped_scenes,
    word_labels,
)

_COMMON = {"max_position_embeddings": 77, "num_hidden_layers": 3, "bos_token_id": CLIP_START, "pad_token_id": CLIP_END}
CLIP_CONFIGS: dict[str, dict[str, Any]] = {
    "clip_l": {
        "hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 3, "hidden_act": "quick_gelu",
        "projection_dim": 96, **_COMMON,
    },
    "clip_g": {
        "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "hidden_act": "gelu",
        "projection_dim": 128, **_COMMON,
    },
}  # fmt: skip
IMAGE_CONFIG: dict[str, Any] = {"resolution": 64, "width": 128, "depth": 3, "num_heads": 4,
                "projections": {"clip_l": 96, "clip_g": 128}}  # fmt: skip
_LOOKS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
_AXES = (None, "left", "above")
_TOKEN_CLASSES = (1 + len(COLOURS), len(SHAPES), 2, 5)  # colour or ground; shape, size and place of the object there


def occurring_ids(tokenizer: ClipTokenizer, emoji: Sequence[EmojiRecord], scenes: int = 4_000) -> Tensor:
    """Return the sorted ids that our captions use: int64 [K]."""
    captions = [record.caption for record in emoji]
    for index in range(scenes):
        scene = draw_scene(SEED, index, "train", 6)
        captions += [scene.short(0), scene.short(1), scene.long()]
    return torch.tensor(sorted({i for row in tokenizer(captions) for i in row}))


class Towers(nn.Module):
    """The trainee: two text towers over a compact vocabulary, the image tower, and heads that are thrown away."""

    def __init__(self, token_ids: Tensor, emoji: Sequence[EmojiRecord]) -> None:
        super().__init__()
        self.register_buffer("token_ids", token_ids)
        end = int((token_ids == CLIP_END).nonzero()[0])
        compact: dict[str, Any] = {
            "vocab_size": len(token_ids) + 1,
            "eos_token_id": end,
            "bos_token_id": end - 1,
            "pad_token_id": end,
        }
        # plain softmax: torch's fused attention is slower on a CPU where sequences are this short
        compact["attn_implementation"] = "eager"
        self.text = nn.ModuleDict({name: build_tower(name, {**c, **compact}) for name, c in CLIP_CONFIGS.items()})
        self.image = ImageTower(**IMAGE_CONFIG)
        self.vocabulary = [sorted({getattr(r, field) for r in emoji}) for field in ("tone", "gender")]
        self.sizes = [len(COLOURS), len(SHAPES)] * 2 + [len(_AXES), *map(len, self.vocabulary)]
        width = self.image.norm.normalized_shape[0]
        self.picture_head = nn.Linear(width, len(_LOOKS) + sum(self.sizes))
        self.token_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(_TOKEN_CLASSES)))
        self.scene_heads = nn.ModuleDict(
            {name: SceneHeads(c["hidden_size"], emoji) for name, c in CLIP_CONFIGS.items()}
        )

    def compact(self, ids: Tensor, unknown: Tensor | None = None) -> Tensor:
        """Map CLIP's ids to rows of the compact table; ids outside it, and `unknown` places, take the shared row."""
        rows = torch.searchsorted(self.token_ids, ids).clamp(max=len(self.token_ids) - 1)
        rows = torch.where(self.token_ids[rows] == ids, rows, len(self.token_ids))
        return rows if unknown is None else torch.where(unknown, len(self.token_ids), rows)


def head_labels(scene: Scene | None, vocabulary: list[list[str]], record: EmojiRecord | None) -> tuple[Tensor, Tensor]:
    """Return presence of each look, float [48], and classes int64 [7]: two slots' colour and shape, axis, tone, gender.

    Only a pair has slots and only an emoji has tone and gender; other places hold `IGNORE`.
    """
    presence, classes = torch.zeros(len(_LOOKS)), torch.full((7,), IGNORE)
    if record is not None:
        classes[5], classes[6] = vocabulary[0].index(record.tone), vocabulary[1].index(record.gender)
    if scene is not None:
        for item in scene.objects:
            presence[_LOOKS.index((item.colour, item.shape))] = 1.0
        classes[4] = _AXES.index(scene.relation)
        if scene.relation is not None:
            for slot, labels in enumerate(group_labels(scene)):
                classes[2 * slot], classes[2 * slot + 1] = labels[0] - 1, labels[1] - 1
    return presence, classes


def head_loss(logits: Tensor, presence: Tensor, classes: Tensor, num_scenes: int, sizes: Sequence[int]) -> Tensor:
    """Return presence's and slots' cross-entropies; the first `num_scenes` rows are scenes, the others emoji."""
    looks, *parts = logits.float().split([len(_LOOKS), *sizes], dim=1)
    loss = 8 * F.binary_cross_entropy_with_logits(looks[:num_scenes], presence[:num_scenes])
    for i, part in enumerate(parts):
        if (classes[:, i] != IGNORE).any():
            loss = loss + F.cross_entropy(part, classes[:, i], ignore_index=IGNORE)
    return loss


def token_labels(scene: Scene) -> np.ndarray:
    """Label the 8 x 8 grid of tokens: int64 [64, 4], `_TOKEN_CLASSES`; a token belongs to the object over it."""
    out = np.zeros((64, 4), dtype=np.int64)
    middle = 8 * (np.arange(8) + 0.5)  # pixels
    for number, group in enumerate(scene.groups):
        place = 0 if scene.relation is None else {"left": 1, "above": 3}[scene.relation] + number
        for item in (scene.objects[i] for i in group):
            away = np.maximum(np.abs(middle[None] - item.x), np.abs(middle[:, None] - item.y))
            # every object has the token its centre lies in
            inside = (away <= max(0.8 * item.radius, 4.01)).reshape(-1)
            colour, shape = tuple(COLOURS).index(item.colour), SHAPES.index(item.shape)
            out[inside] = (1 + colour, shape, item.size == "large", place)
    return out


def token_loss(logits: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Return cross-entropies of what each token shows: logits [B, 64, sum of `_TOKEN_CLASSES`]."""
    labels = torch.from_numpy(np.stack([token_labels(scene) for scene in scenes]))
    colour, *others = logits.float().split(_TOKEN_CLASSES, dim=2)
    covered = labels[..., 0] > 0
    loss = F.cross_entropy(colour.flatten(0, 1), labels[..., 0].flatten())
    loss = loss + F.cross_entropy(colour[covered], labels[..., 0][covered])  # the ground is most of a picture
    for i, part in enumerate(others, start=1):
        loss = loss + F.cross_entropy(part[covered], labels[..., i][covered])
    return loss


def train_clip(
    out: Path,
    *,
    emoji_path: Path = Path("data/emoji.parquet"),
    seconds: float | None = None,
    steps: int = 1_000,
    batch_size: int = 96,
    lr: float = 4e-3,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train the pair, write clip_l, clip_g and clip_image.safetensors to `out`, and return {"config", "training"}.

    Args:
        seconds: stop after this many seconds of training instead of `steps` (then not reproducible step by step).
        batch_size: pictures a step, a sixth of them emoji.
        lr: of the text towers; the image tower's is half of it.
    """
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    emoji = EmojiDataset(EmojiConfig(path=emoji_path, flip=True), "train")
    records = emoji.records(range(len(emoji)))
    pictures = emoji.pixels(range(len(emoji)))
    tokenizer = ClipTokenizer()
    towers = Towers(occurring_ids(tokenizer, records), records)
    text = {id(p) for p in [*towers.text.parameters(), *towers.scene_heads.parameters()]}
    groups = [
        {"params": [p for p in towers.parameters() if (id(p) in text) == of_text], "factor": factor}
        for of_text, factor in ((True, 1.0), (False, 0.5))
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True)

    def losses_of(step: int) -> dict[str, Tensor]:
        return _clip_losses(towers, tokenizer, records, pictures, step, batch_size, seed)

    def snapshot(step: int) -> None:
        if step % 250 == 0:
            write_clip(out, copy.deepcopy(towers).eval(), tokenizer, records)

    parameters = list(towers.parameters())
    training = run_recipe(
        losses_of, parameters, optimizer, lr=lr, steps=steps, seconds=seconds, log=log, after=snapshot
    )
    training |= {"batch_size": batch_size, "seed": seed}
    config = write_clip(out, towers.eval(), tokenizer, records)
    return {"config": config, "training": training}


def _clip_losses(
    towers: Towers,
    tokenizer: ClipTokenizer,
    records: Sequence[EmojiRecord],
    pictures: np.ndarray,
    step: int,
    batch_size: int,
    seed: int,
) -> dict[str, Tensor]:
    random = rng.generator(seed, "data_order", step)
    num_emoji, num_long = batch_size // 6, batch_size // 24
    captions: list[str] = []
    keys: list[str] = []  # what a caption says, whatever its wording
    wrong: list[Scene] = []
    said: list[tuple[Scene | None, EmojiRecord | None, bool]] = []  # of each caption; is it long
    scenes: list[Scene] = []
    for i in range(batch_size - num_emoji):
        scene = draw_scene(SEED, step * batch_size + i, "train", 2 if random.random() < 0.75 else 6)
        scenes.append(scene)
        keys.append(canonical_list(scene))
        long = i < num_long
        captions.append(scene.long() if long else scene.short(int(random.integers(2))))
        said.append((scene, None, long))
        swaps = swapped_scenes(scene)
        if swaps and i % 2 == 0 and not long:  # half of them: each wrong caption costs as much as a true one
            names = [name for name in swaps if name != "order"]
            chosen = (["order"] if "order" in swaps else []) + (
                [names[int(random.integers(len(names)))]] if names else []
            )
            wrong += [swaps[name] for name in chosen]
    chosen_emoji = random.integers(len(records), size=num_emoji)
    of_emoji = [records[int(i)] for i in chosen_emoji]
    captions += [record.caption for record in of_emoji]
    said += [(None, record, False) for record in of_emoji] + [(scene, None, False) for scene in wrong]
    keys += [record.caption for record in of_emoji]
    wordings = random.integers(2, size=len(wrong))
    captions += [scene.short(int(wording)) for scene, wording in zip(wrong, wordings, strict=True)]
    keys += [canonical_list(scene) for scene in wrong]
    numbers = {key: n for n, key in enumerate(dict.fromkeys(keys))}
    key_ids = torch.tensor([numbers[key] for key in keys])

    drawn = np.concatenate([np.stack([render(scene) for scene in scenes]), _jitter(pictures[chosen_emoji], random)])
    tokens = towers.image.tokens(images_to_pixels(drawn, 64))
    features = towers.image.pool(tokens)
    rows = tokenizer(captions)
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad(rows, CLIP_END, int(lengths.max()))
    unknown = torch.from_numpy(random.random(ids.shape) < 0.005) & (ids != CLIP_END) & (ids != CLIP_START)
    ids = towers.compact(ids, unknown)

    labels = [head_labels(scene, towers.vocabulary, None) for scene in scenes]
    labels += [head_labels(None, towers.vocabulary, record) for record in of_emoji]
    presence, classes = torch.stack([a for a, _ in labels]), torch.stack([b for _, b in labels])
    losses = {
        "picture": head_loss(towers.picture_head(features), presence, classes, len(scenes), towers.sizes),
        "tokens": token_loss(towers.token_head(tokens[: len(scenes)]), scenes),
    }
    words, slots, parts = _text_labels(towers, tokenizer, rows, captions, said)
    for name in CLIP_CONFIGS:
        states, pooled = _run_text(towers.text[name], ids, lengths)
        embeds = towers.image.projections[name](features)
        scale = towers.image.log_scales[name]
        losses[name] = 2 * contrastive_loss(embeds.float(), pooled.float(), scale, key_ids[:batch_size], key_ids)
        for part, loss in towers.scene_heads[name].loss(states, pooled, words, slots, parts).items():
            losses[f"{name} {part}"] = 0.5 * loss
    return losses


def _text_labels(
    towers: Towers,
    tokenizer: ClipTokenizer,
    rows: Sequence[Sequence[int]],
    captions: Sequence[str],
    said: Sequence[tuple[Scene | None, EmojiRecord | None, bool]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return labels for `SceneHeads.loss`: words [B, L, attributes], slots [B, groups * attributes], emoji [B, 3]."""
    ends = WordEnds(tokenizer)
    words = torch.full((len(rows), max(map(len, rows)), len(ATTRIBUTES)), IGNORE)
    slots = torch.full((len(rows), MAX_GROUPS * len(ATTRIBUTES)), IGNORE)
    parts = torch.full((len(rows), 3), IGNORE)
    for i, (scene, record, long) in enumerate(said):
        if record is not None:
            parts[i] = torch.tensor(towers.scene_heads["clip_l"].emoji_labels(record))
        if scene is not None:
            words[i, : len(rows[i])] = torch.from_numpy(ends.spread(rows[i], word_labels(captions[i], scene)[1]))
            if not long:  # a cut caption does not name every object
                slots[i] = torch.from_numpy(slot_labels(scene).reshape(-1))
    return words, slots, parts


def _run_text(module: nn.Module, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return penultimate states [B, L, D] and pooled vectors [B, G], running rows of like length together."""
    states, vectors, places = [], [], []
    group = torch.bucketize(lengths, torch.tensor([8, 16, 32]))
    for rows in (torch.nonzero(group == g).flatten() for g in range(4)):
        if len(rows):
            out, pooled = tower_states(module, ids[rows, : int(lengths[rows].max())], None)
            assert pooled is not None
            states.append(F.pad(out, (0, 0, 0, ids.shape[1] - out.shape[1])))
            vectors.append(pooled)
            places.append(rows)
    back = torch.argsort(torch.cat(places))
    return torch.cat(states)[back], torch.cat(vectors)[back]


def _jitter(images: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Shift emoji by up to 3 pixels over their white ground: there is one picture of each."""
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), constant_values=255)
    top, left = random.integers(0, 7, size=2)
    return padded[:, top : top + images.shape[1], left : left + images.shape[2]]


@torch.no_grad()
def write_clip(
    out: Path, towers: Towers, tokenizer: ClipTokenizer, records: Sequence[EmojiRecord]
) -> dict[str, dict[str, Any]]:
    """Measure the states' statistics, bring pooled vectors to unit spread, and write the three files."""
    from safetensors.torch import save_file

    captions = [r.caption for r in records[:600]]
    captions += [draw_scene(SEED, 20_000_000 + i, "train", 6 if i % 4 == 0 else 2).short(i % 2) for i in range(3_400)]
    rows = tokenizer(captions)
    configs: dict[str, dict[str, Any]] = {}
    for name, module in towers.text.items():
        seen, vectors = [], []
        for start in range(0, len(rows), 250):
            ids = pad(rows[start : start + 250], CLIP_END, max(map(len, rows[start : start + 250])))
            real = torch.arange(ids.shape[1])[None] < clip_lengths(ids)[:, None]
            states, pooled = tower_states(module, towers.compact(ids), None)
            seen.append(states[real])
            vectors.append(pooled)
        every = torch.cat(seen).double()
        mean, std = every.mean(dim=0).float(), every.std(dim=0).clamp(min=1e-3).float()
        # the cosine does not see the scale of the pooled vector, a denoiser does
        spread = 1 / torch.cat(vectors).std(dim=0).square().mean().sqrt()
        if hasattr(module, "text_projection"):
            module.text_projection.weight.mul_(spread)
        else:
            norm = getattr(module, "text_model", module).final_layer_norm
            norm.weight.mul_(spread)
            norm.bias.mul_(spread)
        save_tower(out, name, Tower(module, mean.half().float(), std.half().float()), towers.token_ids)
        configs[name] = {**CLIP_CONFIGS[name], "vocab_size": CLIP_VOCAB_SIZE, "eos_token_id": CLIP_END}
    tensors = {key: value.half().contiguous() for key, value in towers.image.state_dict().items()}
    save_file(tensors, out / IMAGE_FILE)
    configs["clip_image"] = dict(IMAGE_CONFIG)
    return configs


def train_and_measure_clip(
    out: Path, *, emoji_path: Path = Path("data/emoji.parquet"), **options: Any
) -> dict[str, Any]:
    """Train the pair, then load what was written, fp16 as it is shipped, and measure that.

    Raises:
        FileNotFoundError: `out` has no T5 yet, which the text encoders are loaded together with.
    """
    if not (out / "t5.safetensors").is_file():
        raise FileNotFoundError(f"no T5 in {out}; `python scripts/train_tiny_encoders.py --part t5` makes it first")
    result = train_clip(out, emoji_path=emoji_path, **options)
    write_description(out, "clip", {**result, "quality": {}})
    result["quality"] = probe_clip(load_tiny_clip(out), emoji_path)
    return result
