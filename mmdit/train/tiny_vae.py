"""Train the embedded VAE: f8, 16 channels, 64 px, on shapes and on emoji without the held-out combinations.

    OMP_NUM_THREADS=2 python -m mmdit.train.tiny_vae --out runs/tiny_vae
    cp runs/tiny_vae/vae.* mmdit/encoders/tiny/
    python -m mmdit_eval.vae_quality

A quarter of an hour on two free cores. Plain reconstruction first, then shapes' outlines are weighted up. Without the
latter PSNR is the same and small dark stars come back as pentagons (seen; the oracle read 11 % of the held-out
bindings wrong). The last command measures what was written and adds it to `vae.json`. The recipe is a function of its
seed and of the data; on other hardware bf16 rounds differently.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mmdit import rng
from mmdit.config import EmojiConfig, ShapesConfig, VAEConfig
from mmdit.data import make_dataset
from mmdit.encoders.vae import AutoencoderKL, latent_statistics, load_vae, to_images, to_pixels, vae_loss

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


@dataclass(frozen=True)
class Stage:
    """One stretch of training; each begins with the stage before's average and a fresh optimiser.

    Attributes:
        images: budget.
        schedule_images: where the cosine of the learning rate would reach 0.
        outline: extra weight of pixels that belong to a shape or lie within two pixels of one.
    """

    images: int
    schedule_images: int
    lr: float
    batch_shapes: int
    batch_emoji: int
    outline: float = 0.0


STAGES = (
    Stage(images=80_000, schedule_images=150_000, lr=2e-3, batch_shapes=12, batch_emoji=20),
    Stage(images=8_000, schedule_images=32_000, lr=1e-3, batch_shapes=18, batch_emoji=14, outline=7.0),
    Stage(images=20_000, schedule_images=20_000, lr=8e-4, batch_shapes=16, batch_emoji=16, outline=7.0),
)


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


def outline_weight(pixels: Tensor, shapes: int, outline: float) -> Tensor | None:
    """Return the weight of each pixel, [B, 1, R, R]; the first `shapes` pictures of a batch are shapes."""
    if not outline:
        return None
    background = pixels.flatten(2).median(dim=2).values[:, :, None, None]  # objects cover less than half of a scene
    near = F.max_pool2d(((pixels - background).abs().amax(1, keepdim=True) > 0.15).float(), 5, stride=1, padding=2)
    near[shapes:] = 0.0
    return 1.0 + outline * near


def train_stage(
    vae: AutoencoderKL,
    arrays: list[np.ndarray],
    stage: Stage,
    *,
    number: int,
    seed: int,
    snapshot: Path,
    ema_decay: float = 0.999,
    snapshot_every: int = 250,
) -> tuple[AutoencoderKL, list[dict[str, float]]]:
    """Train for one stage; return the average and its curve. Snapshots of the average go to the folder `snapshot`."""
    config = vae.config
    # a slice of training's own pictures suffices for a progress line; fresh ones are the quality measurement's job
    watched = [array[:: max(1, len(array) // 128)][:128] for array in arrays]
    average = copy.deepcopy(vae).requires_grad_(False).eval()
    vae.requires_grad_(True).train()
    parameters, averaged = list(vae.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    batch, warmup = stage.batch_shapes + stage.batch_emoji, 100
    noise_source = torch.Generator().manual_seed(rng.integer_seed(seed, "encode", number))
    began, curve = time.time(), []
    for step in range(stage.images // batch):
        progress = step * batch / stage.schedule_images
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * progress)))
        pixels = draw_batch(arrays, (stage.batch_shapes, stage.batch_emoji), seed + number, step)
        side = pixels.shape[-1] // config.factor
        noise = torch.randn(batch, config.latent_channels, side, side, generator=noise_source)
        weight = outline_weight(pixels, stage.batch_shapes, stage.outline)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = vae_loss(vae, pixels, noise, weight)
        optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        # a short memory at first: the average would otherwise drag the stage's beginning along for 1,000 steps
        torch._foreach_lerp_(averaged, parameters, 1.0 - min(ema_decay, (1 + step) / (10 + step)))
        if (step + 1) % snapshot_every == 0:
            measured = {
                "stage": number,
                "step": step + 1,
                "seconds": round(time.time() - began, 1),
                "loss": round(loss.total.item(), 5),
                "kl": round(loss.kl.item(), 3),
                "psnr_shapes": round(psnr(average, watched[0])[0], 2),
                "psnr_emoji": round(psnr(average, watched[1])[0], 2),
            }
            curve.append(measured)
            print(json.dumps(measured), flush=True)
            write_vae(average, config, snapshot, {"curve": curve})
    write_vae(average, config, snapshot, {"curve": curve})
    return average, curve


def train_vae(
    out: Path,
    *,
    emoji_path: Path = Path("data/emoji.parquet"),
    stages: Sequence[Stage] = STAGES,
    config: VAEConfig = TINY_VAE,
    seed: int = 0,
    begin: Path | None = None,
) -> dict[str, Any]:
    """Train and write the tiny VAE to `out`; the average of stage k goes to `out`/stage<k>.

    Args:
        begin: a file that an interrupted run left for stage k - 1 (`.../stage<k - 1>/vae.safetensors`): go on with k.

    Returns:
        What is written to vae.json under "training".
    """
    started = time.time()
    arrays, fingerprints = training_pixels(emoji_path)
    prepared = time.time()
    torch.manual_seed(rng.integer_seed(seed, "init"))
    vae = AutoencoderKL(config)
    first, curve = 0, []
    if begin is not None:
        first = int(begin.parent.name.removeprefix("stage")) + 1
        vae = load_vae(begin)
        curve = json.loads(begin.with_suffix(".json").read_text(encoding="utf-8"))["curve"]
    for number, stage in list(enumerate(stages))[first:]:
        _, measured = train_stage(vae, arrays, stage, number=number, seed=seed, snapshot=out / f"stage{number}")
        curve += measured
        # read back as written (fp16), so that a run that begins here goes the same way
        vae = load_vae(out / f"stage{number}" / "vae.safetensors")

    chosen = np.concatenate([array[:: max(1, 2 * len(array) // STATISTICS_IMAGES)] for array in arrays])
    batches = (chosen[i : i + 64] for i in range(0, len(chosen), 64))
    shift, scale = latent_statistics(vae, batches, posterior=True)
    record = {
        "command": "python -m mmdit.train.tiny_vae",
        "seed": seed,
        "stages": [asdict(stage) for stage in stages],
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "seconds_of_data": round(prepared - started, 1),
        "hardware": f"{torch.get_num_threads()} threads, {platform.machine()}",
        "torch": torch.__version__,
        "data_fingerprints": fingerprints,
        "curve_on_training_images": curve,
    }
    write_vae(vae, config.model_copy(update={"shift": shift, "scale": scale}), out, {"training": record})
    return record


def main() -> None:
    """Parse and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tiny_vae"))
    parser.add_argument("--emoji", type=Path, default=Path("data/emoji.parquet"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--begin", type=Path, help="stage<k>/vae.safetensors of an interrupted run")
    arguments = parser.parse_args()
    train_vae(arguments.out, emoji_path=arguments.emoji, seed=arguments.seed, begin=arguments.begin)


if __name__ == "__main__":
    main()
