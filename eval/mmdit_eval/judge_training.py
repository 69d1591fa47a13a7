"""Train the judge of emoji (judge.py): a picture, roughly handled, must stay nearest to its own clean picture.

    python -m mmdit_eval.judge_training --emoji data/emoji.parquet

Some minutes on one core. It trains on all emoji, held-out combinations too: a judge has to know the answer. Roughly
handled means moved, scaled, blurred, noisy, slightly recoloured, and passed through the VAE with noise on its latents,
which is what a diffusion model's pictures look like.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mmdit import rng
from mmdit.config import EmojiConfig
from mmdit.data import make_dataset
from mmdit.encoders.vae import AutoencoderKL, load_vae, to_images, to_pixels
from mmdit_eval.judge import WEIGHTS, Bank, Judge, Tower, retrieval_scores

LATENT_NOISE = 0.25  # deviations: pictures still recognisable by eye
TOWER: dict[str, Any] = {"widths": [32, 64, 96, 128], "narrow": 32, "width": 128}


def everything(config: EmojiConfig) -> tuple[list[Any], np.ndarray, list[str]]:
    """Return records, images uint8 [N, R, R, 3] and fingerprints of all emoji, seen and held out."""
    records: list[Any] = []
    images, fingerprints = [], []
    for split in ("seen", "heldout"):
        data = make_dataset(config, split)
        records += data.records(range(len(data)))
        images.append(data.pixels(range(len(data))))
        fingerprints.append(data.fingerprint)
    return records, np.concatenate(images), fingerprints


@torch.inference_mode()
def passed_through(vae: AutoencoderKL, images: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Return images uint8 after encode and decode, with normal noise of that deviation on the latents."""
    source, parts = torch.Generator().manual_seed(rng.integer_seed(seed, "metric")), []
    for start in range(0, len(images), 64):
        latents = vae.encode(to_pixels(images[start : start + 64]))
        latents = latents + noise * torch.randn(latents.shape, generator=source)
        parts.append(to_images(vae.decode(latents)))
    return np.concatenate(parts)


def handle(pixels: Tensor, source: torch.Generator) -> Tensor:
    """Move, scale, blur, recolour and roughen pixels [B, 3, R, R], each picture in its own way."""
    batch, side = len(pixels), pixels.shape[-1]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=source)

    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1.0 / uniform(0.9, 1.1)
    theta[:, :, 2] = uniform(-3.0, 3.0, 2) * 2 / side  # pixels to the grid's units
    field = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    # outside the picture lies white: sampling pads with 0, so 1 is taken off before and added after
    moved = F.grid_sample(pixels - 1.0, field, align_corners=False) + 1.0
    reach = torch.arange(-2.0, 3.0)
    kernel = torch.exp(-reach.square() / (2 * uniform(0.1, 0.9, 1).square()))
    kernel = kernel / kernel.sum(1, keepdim=True)  # [B, 5]
    flat = F.pad(moved, (2, 2, 2, 2), mode="replicate").transpose(0, 1)  # [3, B, R + 4, R + 4]
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=batch)
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=batch)
    blurred = flat.transpose(0, 1)
    recoloured = blurred * uniform(0.95, 1.05, 1, 1, 1) + uniform(-0.05, 0.05, 3, 1, 1)
    noise = torch.randn(pixels.shape, generator=source) * uniform(0.0, 0.1, 1, 1, 1)
    return (recoloured + noise).clamp(-1.0, 1.0)


def draw_rows(families: Sequence[Sequence[int]], total: int, size: int, random: np.random.Generator) -> np.ndarray:
    """Return distinct rows of one batch: half of them whole families of relatives, the rest anything."""
    rows: list[int] = []
    while len(rows) < size // 2:
        rows += families[int(random.integers(len(families)))]
    rows += random.integers(total, size=size).tolist()
    return np.array(list(dict.fromkeys(rows))[:size])


def train_judge(
    out: Path = WEIGHTS,
    *,
    emoji_path: Path = Path("data/emoji.parquet"),
    steps: int = 900,
    batch: int = 96,
    lr: float = 2e-3,
    temperature: float = 0.05,
    seed: int = 0,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Train the tower, write it (fp16) and its record (JSON beside it).

    Loss: InfoNCE of handled pictures against the batch's clean ones. Source: van den Oord et al. 2018,
    arXiv:1807.03748, Eq. 4; instance discrimination: Wu et al. 2018, arXiv:1805.01978.

    Args:
        seconds: stop earlier after so long; the record says how many steps were made.
    """
    started = time.time()
    records, images, fingerprints = everything(EmojiConfig(path=emoji_path))
    vae = load_vae("tiny")
    variants = [images, passed_through(vae, images, 0.0, seed), passed_through(vae, images, LATENT_NOISE, seed)]
    families: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        if record.tone:
            families["base", record.base, record.gender].append(i)
            families["gender", record.base, record.tone].append(i)
            families["tone", record.tone, record.gender].append(i)
    groups = [rows for rows in families.values() if len(rows) > 1]

    torch.manual_seed(rng.integer_seed(seed, "init"))
    tower = Tower(**TOWER).train()
    optimizer = torch.optim.AdamW(tower.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    source = torch.Generator().manual_seed(rng.integer_seed(seed, "data"))
    began, made = time.time(), 0
    for step in range(steps):
        progress = max(step / steps, (time.time() - began) / seconds)
        if progress >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * progress)))
        random = rng.generator(seed, "data_order", step)
        rows = draw_rows(_some(groups, random), len(images), batch, random)
        which = random.choice(len(variants), size=len(rows), p=(0.4, 0.3, 0.3))
        rough = handle(to_pixels(np.stack([variants[w][r] for w, r in zip(which, rows, strict=True)])), source)
        queries, keys = tower(torch.cat([rough, to_pixels(images[rows])])).chunk(2)
        loss = F.cross_entropy(queries @ keys.T / temperature, torch.arange(len(rows)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        made = step + 1
        if made % 100 == 0:
            print(
                json.dumps({"step": made, "loss": round(loss.item(), 4), "seconds": round(time.time() - began)}),
                flush=True,
            )

    state = {name: tensor.half().contiguous() for name, tensor in tower.state_dict().items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, out, metadata={"tower": json.dumps(TOWER)})
    tower.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    record = {
        "command": "python -m mmdit_eval.judge_training",
        "sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
        "parameters": sum(parameter.numel() for parameter in tower.parameters()),
        "seed": seed,
        "steps": made,
        "batch": batch,
        "lr": lr,
        "temperature": temperature,
        "seconds": {"all": round(time.time() - started, 1), "training": round(time.time() - began, 1)},
        "hardware": f"{torch.get_num_threads()} threads",
        "data_fingerprints": fingerprints,
        "quality": measure_judge(Judge(tower), records, images, vae),
    }
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _some(groups: Sequence[list[int]], random: np.random.Generator) -> list[list[int]]:
    """Pick eight families, at most 24 of each: some tones have 96 members."""
    return [random.permutation(groups[int(i)])[:24].tolist() for i in random.integers(len(groups), size=8)]


def measure_judge(judge: Judge, records: Sequence[Any], images: np.ndarray, vae: AutoencoderKL) -> dict[str, Any]:
    """Return accuracies on pictures handled with a seed that training did not use, by question and by split.

    `all` asks for the true picture among every emoji there is; the other questions are those of judge.py.
    """
    bank = Bank(records, judge.embed(images))
    source = torch.Generator().manual_seed(rng.integer_seed(1, "metric"))
    handled = [to_images(handle(to_pixels(images[i : i + 256]), source)) for i in range(0, len(images), 256)]
    sets = {
        "through_vae": passed_through(vae, images, 0.0, seed=1),
        f"through_vae_latent_noise_{LATENT_NOISE}": passed_through(vae, images, LATENT_NOISE, seed=1),
        "handled": np.concatenate(handled),
    }
    heldout = np.array([record.split == "heldout" for record in records])
    out: dict[str, Any] = {}
    for name, queries in sets.items():
        nearest = (judge.embed(queries) @ bank.embeddings.T).argmax(1) == np.arange(len(images))
        out[name] = {"all": {"accuracy": round(float(nearest.mean()), 4), "n": len(nearest)}}
        for split, chosen in (("seen", ~heldout), ("heldout", heldout)):
            rows = np.flatnonzero(chosen)
            scores = retrieval_scores(queries[rows], [records[int(i)] for i in rows], bank, judge)
            out[name][split] = {
                question: {
                    "accuracy": None if score["accuracy"] is None else round(score["accuracy"], 4),
                    "chance": None if score["chance"] is None else round(score["chance"], 4),
                    "n": score["n"],
                }
                for question, score in scores.items()
            }
    return out


def main() -> None:
    """Parse and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--emoji", type=Path, default=Path("data/emoji.parquet"))
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seconds", type=float, default=math.inf)
    arguments = parser.parse_args()
    record = train_judge(arguments.out, emoji_path=arguments.emoji, steps=arguments.steps, seconds=arguments.seconds)
    print(json.dumps(record["quality"], indent=1))


if __name__ == "__main__":
    main()
