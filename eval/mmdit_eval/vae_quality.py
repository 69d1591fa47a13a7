"""Measure a VAE: PSNR on fresh pictures, and whether the oracle still reads a scene after encode and decode.

    python -m mmdit_eval.vae_quality --folder mmdit/encoders/tiny --emoji data/emoji.parquet

What it finds is written beside the weights (vae.json, "quality"). No study can score better than this ceiling.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmdit.config import EmojiConfig, ShapesConfig
from mmdit.data import make_dataset
from mmdit.encoders.vae import AutoencoderKL, load_vae, to_images, to_pixels
from mmdit_eval.composition import score_composition

SCENES = 1_000  # per set of shapes
SEED = 2_026  # of scenes no training saw


@torch.inference_mode()
def reconstruct(vae: AutoencoderKL, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Return images uint8 [N, R, R, 3] after encode and decode."""
    parts = [
        to_images(vae.decode(vae.encode(to_pixels(images[i : i + batch_size]))))
        for i in range(0, len(images), batch_size)
    ]
    return np.concatenate(parts)


def psnr(images: np.ndarray, reconstructed: np.ndarray) -> dict[str, float]:
    """Return peak signal-to-noise ratios in dB, rounded to 0.01: mean over images, and of the mean squared error.

    Args:
        images, reconstructed: uint8 [N, R, R, 3].
    """
    error = ((images.astype(np.float64) - reconstructed) ** 2).mean(axis=(1, 2, 3)) / 255.0**2
    error = np.maximum(error, 1e-10)  # a picture that comes back exactly counts 100 dB
    return {
        "psnr_mean_over_images": round(float(-10 * np.log10(error).mean()), 2),
        "psnr_of_mean_error": round(-10 * math.log10(error.mean()), 2),
    }


def measure_vae(vae: AutoencoderKL, emoji: EmojiConfig | None = None, scenes: int = SCENES) -> dict[str, Any]:
    """Return the quality of a VAE on shapes (and emoji, where their file is given): one entry a set, with its N.

    `oracle` and `oracle_on_originals` hold the oracle's accuracies by attribute after and before the VAE.
    """
    out: dict[str, Any] = {}
    for name, split, most in (
        ("shapes_seen", "seen", 2),
        ("shapes_heldout", "heldout", 2),
        ("shapes_many_seen", "seen", 6),
        ("shapes_many_heldout", "heldout", 6),
    ):
        data = make_dataset(ShapesConfig(seed=SEED, max_objects=most), split)
        images, truth = data.pixels(range(scenes)), data.scenes(range(scenes))
        back = reconstruct(vae, images)
        out[name] = {
            "n": scenes,
            "max_objects": most,
            **psnr(images, back),
            "oracle": score_composition(back, truth)["summary"],
            "oracle_on_originals": score_composition(images, truth)["summary"],
        }
    for split in ("seen", "heldout") if emoji is not None else ():
        data = make_dataset(emoji, split)
        images = data.pixels(range(len(data)))
        out[f"emoji_{split}"] = {"n": len(images), **psnr(images, reconstruct(vae, images))}
    return out


def add_quality(folder: Path, emoji: Path) -> dict[str, Any]:
    """Measure the VAE of a folder, note the result in its vae.json and return it."""
    quality = measure_vae(load_vae(folder / "vae.safetensors"), EmojiConfig(path=emoji))
    file = folder / "vae.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    record["quality"] = {"command": "python -m mmdit_eval.vae_quality", "seed": SEED, **quality}
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record["quality"]


def main() -> None:
    """Measure the VAE of a folder and note the result in its vae.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("mmdit/encoders/tiny"))
    parser.add_argument("--emoji", type=Path, default=Path("data/emoji.parquet"))
    arguments = parser.parse_args()
    print(json.dumps(add_quality(arguments.folder, arguments.emoji), indent=1))


if __name__ == "__main__":
    main()
