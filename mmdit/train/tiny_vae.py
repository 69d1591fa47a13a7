"""Train the embedded VAE: f8, 16 channels, 64 px, on shapes and on emoji without the held-out combinations.

    OMP_NUM_THREADS=2 python -m mmdit.train.tiny_vae --out mmdit/encoders/tiny

A quarter of an hour on two cores. Then `python -m mmdit_eval.vae_quality` measures what was written and adds it to
`vae.json`. The recipe is a function of its seed and of the data; on other hardware bf16 rounds differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mmdit import rng
from mmdit.config import EmojiConfig, ShapesConfig, VAEConfig
from mmdit.data import make_dataset
from mmdit.encoders.vae import AutoencoderKL, to_images, to_pixels, vae_loss

# shift and scale are measured at the end and written into the file's config
TINY_VAE = VAEConfig(
    block_channels=(48, 80, 88),
    num_res_blocks=1,
    latent_channels=16,
    mid_attention=False,
    norm_groups=8,
    stem_patch=2,
    shift=0.0,
    scale=1.0,
    clamp=True,
)
SHAPES = (ShapesConfig(num_images=10_000, max_objects=6, seed=11), ShapesConfig(num_images=6_000, seed=12))
STATISTICS_IMAGES = 4_096  # images whose latents give shift and scale


def training_pixels(emoji_path: Path) -> tuple[list[np.ndarray], list[str]]:
    """Return uint8 [N, 64, 64, 3] of shapes and of emoji, and the fingerprints of their data sets."""
    shapes = [make_dataset(config, "train") for config in SHAPES]
    emoji = make_dataset(EmojiConfig(path=emoji_path), "train")  # without the held-out combinations
    images = [np.concatenate([data.pixels(range(len(data))) for data in shapes]), emoji.pixels(range(len(emoji)))]
    return images, [data.fingerprint for data in (*shapes, emoji)]


def draw_batch(images: list[np.ndarray], counts: tuple[int, int], seed: int, step: int) -> Tensor:
    """Return pixels [sum(counts), 3, R, R] of one step: so many shapes, so many emoji, a quarter of these mirrored."""
    random = rng.generator(seed, "data_order", step)
    parts = []
    for kind, count in zip(images, counts, strict=True):
        part = kind[random.integers(len(kind), size=count)]
        parts.append(part)
    mirrored = random.random(counts[1]) < 0.25
    parts[1][mirrored] = parts[1][mirrored, :, ::-1]
    return to_pixels(np.concatenate(parts))


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return per-channel mean and 1 / standard deviation of raw latents drawn from the posterior.

    Posterior samples rather than means: that is what `shift` and `scale` are to bring to mean 0 and deviation 1; the
    two differ by the posterior's own variance, which is small.
    """
    means, variances = [], []
    for start in range(0, len(images), 64):
        mean, logvar = vae.moments(to_pixels(images[start : start + 64]))
        means.append(mean.double())
        variances.append(logvar.double().exp())
    mean, variance = torch.cat(means), torch.cat(variances)
    std = (mean.var(dim=(0, 2, 3)) + variance.mean(dim=(0, 2, 3))).sqrt()
    shift = tuple(round(value, 5) for value in mean.mean(dim=(0, 2, 3)).tolist())
    return shift, tuple(round(1.0 / value, 5) for value in std.tolist())


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: np.ndarray) -> tuple[float, float]:
    """Return dB of reconstructions against images uint8 [N, R, R, 3]: mean over images, and of the mean error."""
    errors = []
    for start in range(0, len(images), 64):
        batch = images[start : start + 64]
        back = to_images(vae.decode(vae.encode(to_pixels(batch))))
        errors.append(((back.astype(np.float64) - batch) ** 2).mean(axis=(1, 2, 3)))
    error = np.maximum(np.concatenate(errors), 1e-3) / 255.0**2
    return float(-10 * np.log10(error).mean()), float(-10 * math.log10(error.mean()))


def write_vae(vae: AutoencoderKL, config: VAEConfig, folder: Path, record: dict[str, Any]) -> None:
    """Write vae.safetensors (fp16, the config in its metadata) and vae.json (the same config, and `record`)."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half().contiguous() for name, tensor in vae.state_dict().items()}
    fields = config.model_dump(mode="json")
    temporary = folder / ".vae.safetensors.tmp"
    save_file(state, temporary, metadata={"config": json.dumps(fields)})
    temporary.replace(folder / "vae.safetensors")
    digest = hashlib.sha256((folder / "vae.safetensors").read_bytes()).hexdigest()
    content = {"config": fields, "sha256": digest, **record}
    (folder / "vae.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def train_vae(
    out: Path,
    *,
    emoji_path: Path = Path("data/emoji.parquet"),
    images: int = 150_000,
    batch_shapes: int = 12,
    batch_emoji: int = 20,
    lr: float = 2e-3,
    ema_decay: float = 0.999,
    seed: int = 0,
    init: Path | None = None,
    stage: str = "main",
    snapshot_every: int = 500,
    config: VAEConfig = TINY_VAE,
) -> dict[str, Any]:
    """Train and write the tiny VAE to `out`; snapshots of the average go to `out`/snapshot.

    Args:
        images: budget in images.
        snapshot_every: steps between snapshots and validation lines.

    Returns:
        What is written to vae.json under "training".
    """
    started = time.time()
    arrays, fingerprints = training_pixels(emoji_path)
    # a slice of training's own pictures suffices for a progress line; fresh ones are the quality measurement's job
    watched = [array[:: max(1, len(array) // 128)][:128] for array in arrays]
    torch.manual_seed(rng.integer_seed(seed, "init"))
    vae = AutoencoderKL(config)
    average = AutoencoderKL(config).requires_grad_(False).eval()
    average.load_state_dict(vae.state_dict())
    parameters, averaged = list(vae.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    batch = batch_shapes + batch_emoji
    steps, warmup = images // batch, 100
    noise_source = torch.Generator().manual_seed(rng.integer_seed(seed, "encode"))
    prepared = time.time()
    curve: list[dict[str, float]] = []

    def finish() -> tuple[VAEConfig, AutoencoderKL]:
        chosen = np.concatenate([array[:: max(1, 2 * len(array) // STATISTICS_IMAGES)] for array in arrays])
        shift, scale = latent_statistics(average, chosen)
        return config.model_copy(update={"shift": shift, "scale": scale}), average

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
        pixels = draw_batch(arrays, (batch_shapes, batch_emoji), seed, step)
        side = pixels.shape[-1] // config.factor
        noise = torch.randn(batch, config.latent_channels, side, side, generator=noise_source)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = vae_loss(vae, pixels, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        # a short memory at first: the average would otherwise drag the initialisation along for 1,000 steps
        torch._foreach_lerp_(averaged, parameters, 1.0 - min(ema_decay, (1 + step) / (10 + step)))
        if (step + 1) % snapshot_every == 0:
            measured = {
                "step": step + 1,
                "seconds": round(time.time() - prepared, 1),
                "loss": round(loss.total.item(), 5),
                "kl": round(loss.kl.item(), 3),
                "psnr_shapes": round(psnr(average, watched[0])[0], 2),
                "psnr_emoji": round(psnr(average, watched[1])[0], 2),
            }
            curve.append(measured)
            print(json.dumps(measured), flush=True)
            write_vae(average, config, out / "snapshot", {"curve": curve})

    final_config, final = finish()
    record = {
        "command": "python -m mmdit.train.tiny_vae",
        "seed": seed,
        "images": steps * batch,
        "steps": steps,
        "batch": {"shapes": batch_shapes, "emoji": batch_emoji},
        "lr": lr,
        "ema_decay": ema_decay,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "seconds": {"data": round(prepared - started, 1), "training": round(time.time() - prepared, 1)},
        "hardware": f"{torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "data_fingerprints": fingerprints,
        "curve_on_training_images": curve,
    }
    write_vae(final, final_config, out, {"training": record})
    return record


def main() -> None:
    """Parse and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("mmdit/encoders/tiny"))
    parser.add_argument("--emoji", type=Path, default=Path("data/emoji.parquet"))
    parser.add_argument("--images", type=int, default=150_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train_vae(arguments.out, emoji_path=arguments.emoji, images=arguments.images, seed=arguments.seed)


if __name__ == "__main__":
    main()
