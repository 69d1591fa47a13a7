"""What a run learns from: its frozen encoders, and the data as they encode it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mmdit.config import ConfigError, RunConfig, UNetConfig, reads_streams
from mmdit.data import make_dataset
from mmdit.data.buckets import BucketedSource, Size, groups_of
from mmdit.data.cache import LiveBatches, precompute
from mmdit.encoders.text import TextEncoders
from mmdit.encoders.vae import AutoencoderKL, latent_statistics, load_vae
from mmdit.pipeline import load_encoders

SAMPLE_PROMPTS = 16


def evenly(count: int, most: int) -> np.ndarray:
    """Return at most `most` of `count` indices, evenly spaced, since files may be sorted by content: int64 [K]."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int)


class Sources(NamedTuple):
    """Frozen encoders, and what they made of the data."""

    vae: AutoencoderKL
    text: TextEncoders
    train: Any
    validation: Any
    prompts: list[str]


def build_sources(
    config: RunConfig, run_dir: Path, device: torch.device | str = "cpu", progress: bool = True
) -> Sources:
    """Load encoders and data; encode them once where `train.precompute` says so."""
    vae, text = load_encoders(config)
    check_widths(config, vae, text)
    vae, text = vae.to(device), text.to(device)
    train, precision = config.train, config.train.precision
    datasets = {split: make_dataset(config.data, split) for split in ("train", "val")}

    def encoded(dataset: Any, split: str, count: int | None) -> Any:
        if not train.precompute:
            return LiveBatches(dataset, vae, text, config.encoders, precision=precision, count=count)
        return precompute(
            dataset, vae, text, config.encoders, cache_dir=train.cache_dir or run_dir / "cache", count=count,
            precision=precision, verify=train.verify_cache, require=train.require_cache, progress=progress,
            label=f"encoding {split}",
        )  # fmt: skip

    made: dict[str, Any] = {}
    for split, dataset in datasets.items():
        count = train.val_images if split == "val" else None
        if getattr(config.data, "buckets", ()):
            views = dataset.by_bucket()
            check_buckets(config, dataset.bucket_sizes(), vae, {v.size: len(v) for v in views} if count is None else {})
            shares = [None if count is None else max(1, count * len(view) // len(dataset)) for view in views]
            parts = zip(views, shares, strict=True)
            made[split] = BucketedSource([encoded(v, f"{split} {v.size[0]}x{v.size[1]}", n) for v, n in parts])
        else:
            made[split] = encoded(dataset, split, count)
    if hasattr(made["train"], "order"):  # an order of its own may not suit this batch size: said now, not at step 1
        made["train"].order(config.seed, np.arange(1), train.batch_size)
    if train.precompute and progress and (odd := unusual_latents(made["train"])):
        print(odd, flush=True)
    if train.precompute:  # the training itself needs them no more; `draw_samples` fetches them
        vae, text = vae.to("cpu"), text.to("cpu")
    first = np.arange(min(SAMPLE_PROMPTS, len(datasets["val"])))
    prompts = list(train.sample_prompts) or datasets["val"].captions(first)
    return Sources(vae, text, made["train"], made["val"], prompts)


def unusual_latents(source: Any, images: int = 256) -> str:
    """Say in words where the latents of a run are far from mean 0 and deviation 1; "" where they are near.

    A shift and scale measured on other pictures is the usual cause; the run works and learns more slowly.
    """
    group = max(groups_of(source), key=len)
    latents = source.batch(group[evenly(len(group), images)])[0].double()
    mean = float(latents.mean(dim=(0, 2, 3)).square().mean().sqrt())
    std = float(latents.var(dim=(0, 2, 3)).mean().sqrt())
    if mean <= 0.5 and 0.6 <= std <= 1.6:
        return ""
    return (
        f"note: the channels of this run's latents have means of {mean:.2f} (root mean square) and a deviation of "
        f"{std:.2f} instead of 0 and 1; training is faster with the encoders.latent_shift and latent_scale that "
        f"`python scripts/cache.py CONFIG --statistics` prints"
    )


def check_buckets(config: RunConfig, sizes: list[Size], vae: AutoencoderKL, counts: dict[Size, int]) -> None:
    """Refuse buckets that the denoiser cannot take, or that no batch could be filled from, before anything is encoded.

    Args:
        sizes: of all buckets, (height, width) in pixels.
        counts: training pictures in each bucket that has some.

    Raises:
        ConfigError: sides that are no multiple of the grain, beyond the position table, or a bucket of less than a
            batch.
    """
    model, batch = config.model, config.train.batch_size
    grain, largest = vae.config.factor, None
    if isinstance(model, UNetConfig):
        grain *= 2 ** (len(model.channel_mult) - 1)
    else:
        grain *= model.patch_size
        largest = model.pos_embed_max_size * grain
    odd = [f"{h}x{w}" for h, w in sizes if h % grain or w % grain]
    if odd:
        raise ConfigError(f"data.buckets {', '.join(odd)}: sides must be multiples of {grain} pixels")
    large = [f"{h}x{w}" for h, w in sizes if largest is not None and max(h, w) > largest]
    if large:
        raise ConfigError(
            f"data.buckets {', '.join(large)}: the position table ends at {largest} pixels; raise "
            f"model.pos_embed_max_size or leave those sizes out"
        )
    small = [f"{h}x{w} ({n})" for (h, w), n in counts.items() if n < batch]
    if small:
        raise ConfigError(
            f"data.buckets {', '.join(small)}: fewer pictures than a batch of {batch}, which would never be seen; "
            f"leave those sizes out (their pictures go to the next ratio) or lower train.batch_size"
        )


def check_widths(config: RunConfig, vae: AutoencoderKL, text: TextEncoders) -> None:
    """Refuse encoders that do not fit the denoiser, before hours go into encoding; the config knows only the tiny ones.

    Raises:
        ConfigError: the widths that differ, and the overrides that would fit.
    """
    channels, model = vae.config.latent_channels, config.model
    wanted: dict[str, Any] = {"in_channels": channels, "out_channels": channels, "context_dim": text.context_dim}
    if model.pooled_dim is not None:
        wanted["pooled_dim"] = text.pooled_dim or None
    if reads_streams(model):
        wanted["text_streams"] = {name: width for name, _, _, width in text.streams}
    has = model.model_dump()
    wrong = {name: value for name, value in wanted.items() if has[name] != value}
    if wrong:
        given = ", ".join(f"model.{name} is {has[name]}" for name in wrong)
        quoted = {name: f'"{value}"' if isinstance(value, dict) else value for name, value in wrong.items()}
        fitting = " ".join(f"--model.{name} {'null' if value is None else value}" for name, value in quoted.items())
        raise ConfigError(f"{given}, but the encoders of this run give others; set {fitting}")


def measure_statistics(
    config: RunConfig, most: int = 4_096, batch: int = 64
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the latent_shift and latent_scale that bring each channel of the data's latents to mean 0, deviation 1."""
    data = make_dataset(config.data, "train")
    items = evenly(len(data), most)
    batches = (data.pixels(items[i : i + batch]) for i in range(0, len(items), batch))
    return latent_statistics(load_vae(config.encoders.vae), batches)
