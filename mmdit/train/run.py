"""The moving parts of one training run, and the few questions that every part of the trainer asks of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from mmdit.config import RunConfig
from mmdit.denoiser import unwrap
from mmdit.diffusion import Schedule
from mmdit.encoders.text import TextEncoders
from mmdit.encoders.vae import AutoencoderKL
from mmdit.train.background import Background
from mmdit.train.ema import EMAs
from mmdit.train.sharding import is_sharded
from mmdit.train.tracking import Metrics


@dataclass
class Run:
    """The moving parts of one run. `seconds` is training time: evaluation, samples and checkpoints are not in it."""

    config: RunConfig
    run_dir: Path
    accelerator: Accelerator
    denoiser: nn.Module  # as accelerate prepared it; `unwrap` gives the module
    optimizer: Any
    emas: EMAs
    schedule: Schedule
    vae: AutoencoderKL
    text: TextEncoders
    source: Any
    validation: Any
    prompts: list[str]
    metrics: Metrics | None = None
    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    saved_at: int = -1
    evaluation_pending: bool = False  # interrupted between an update and its validation
    skipped: int = 0  # updates left out in a row
    failed_saves: int = 0  # in a row
    background: Background = field(default_factory=Background)
    sharded: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.sharded = is_sharded(self.module)

    @property
    def module(self) -> nn.Module:
        return unwrap(self.denoiser)

    def log(self, kind: str, **values: Any) -> None:
        if self.metrics is not None:
            self.metrics.write(
                kind, step=self.step, images_seen=self.images_seen, seconds=round(self.seconds, 3), **values
            )


def total_images(config: RunConfig) -> int:
    """Return the images a run sees: whole batches, the budget rounded down."""
    return config.train.images // config.train.batch_size * config.train.batch_size


def spent(images_seen: int, seconds: float, config: RunConfig) -> bool:
    """Say whether a budget is reached: of images, or of seconds of training where it has one."""
    limit = config.train.seconds
    return images_seen >= total_images(config) or (limit is not None and seconds >= limit)


def count_parameters(module: nn.Module) -> int:
    """Count the numbers a module trains."""
    return sum(p.numel() for p in module.parameters())


def due(every: int, run: Run) -> bool:
    """Say whether the last batch crossed a multiple of `every` images; 0 is never."""
    return every > 0 and run.images_seen // every > (run.images_seen - run.config.train.batch_size) // every
