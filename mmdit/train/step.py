"""One training step: draw a batch, backward, clip, update; and the refusal to update on numbers that are not finite.

Every draw is keyed by the sample's position in the stream of training samples: position p of a run sees the same
image, noise, t and caption dropout whatever the backbone, batch size, number of processes or resumes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from mmdit import rng
from mmdit.config import RunConfig
from mmdit.data.cache import Draw
from mmdit.data.order import data_order
from mmdit.denoiser import Conditioning, unwrap
from mmdit.diffusion import Schedule, sample_t, training_loss
from mmdit.encoders.axes import drop_captions
from mmdit.encoders.text import TextEncoders
from mmdit.encoders.towers import ENCODERS
from mmdit.train.sharding import whole
from mmdit.train.watch import Watch, part_norms


class Batch(NamedTuple):
    """What one forward needs: positions, indices int64 [B]; latents, noise [B, C, H, W]; t float64 [B]."""

    positions: np.ndarray
    indices: np.ndarray
    latents: Tensor
    conditioning: Conditioning
    noise: Tensor
    t: Tensor

    def to(self, device: torch.device) -> Batch:
        """Move the tensors."""
        return Batch(
            self.positions,
            self.indices,
            self.latents.to(device),
            self.conditioning.to(device),
            self.noise.to(device),
            self.t.to(device),
        )


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient was NaN or infinite; the update was not made."""


@dataclass(frozen=True)
class StepResult:
    """What an update gives to the log: mean loss, gradient norm before clipping, and where asked that of each part."""

    loss: float
    grad_norm: float
    part_norms: dict[str, float] | None = None


class BatchDrawer:
    """Draws the batch of any positions; stateless but for the null, so that it can run ahead in a thread."""

    def __init__(self, source: Any, text: TextEncoders, schedule: Schedule, config: RunConfig) -> None:
        self.source, self.schedule, self.config = source, schedule, config
        self.null = text.null(1, config.encoders.null, padding=config.encoders.padding).to("cpu")
        self.layout = text.layout
        self.absent = [name for name in ENCODERS if name not in text.towers]

    def draw(self, positions: np.ndarray) -> Batch:
        """Return the batch of these positions in the stream of training samples, on the CPU."""
        seed = self.config.seed
        indices = self._order(positions)
        latents, conditioning = self.source.batch(indices, self._posterior_noise(positions))
        uniforms = torch.from_numpy(rng.uniform(seed, "caption_dropout", positions, (4,)))
        conditioning = drop_captions(
            conditioning,
            self.null,
            self.config.encoders.dropout,
            uniforms,
            clip_l_width=self.layout.clip_l_width,
            pooled=self.layout.pooled,
            absent=self.absent,
        )
        noise = torch.from_numpy(rng.normal(seed, "train_noise", positions, latents.shape[1:]))
        u = torch.from_numpy(rng.uniform(seed, "train_t", positions))
        t = sample_t(self.config.diffusion.density, u, self.schedule)
        return Batch(np.asarray(positions), indices, latents, conditioning, noise, t)

    def _posterior_noise(self, positions: np.ndarray) -> Draw | None:
        """Return what draws from the VAE's posterior, keyed by position; None where the run takes its mean."""
        if self.config.encoders.posterior == "mean":
            return None
        return lambda shape: rng.normal(self.config.seed, "encode", positions, shape)

    def _order(self, positions: np.ndarray) -> np.ndarray:
        """Return the items at these positions; a source whose items do not all stack has an order of its own."""
        order = getattr(self.source, "order", None)
        if order is not None:
            return order(self.config.seed, positions, self.config.train.batch_size)
        return data_order(self.config.seed, len(self.source), positions)


class Prefetcher:
    """Draws the next micro-batch in a thread while the denoiser works on this one."""

    def __init__(self, drawer: BatchDrawer) -> None:
        self._drawer, self._pool = drawer, ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[bytes, Future[Batch]] | None = None

    def take(self, positions: np.ndarray, following: np.ndarray | None) -> Batch:
        """Return the batch of `positions` and begin to draw `following`."""
        ahead, self._ahead = self._ahead, None
        known = ahead is not None and ahead[0] == positions.tobytes()
        batch = ahead[1].result() if ahead is not None and known else self._drawer.draw(positions)
        if following is not None:
            self._ahead = (following.tobytes(), self._pool.submit(self._drawer.draw, following))
        return batch

    def close(self) -> None:
        """Stop the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def micro_positions(config: RunConfig, images_seen: int, rank: int) -> list[np.ndarray]:
    """Return the positions of this rank's micro-batches of the next step.

    The global batch [images_seen, images_seen + batch_size) is cut into accumulation x processes equal pieces.
    """
    train = config.train
    pieces = train.accumulation * train.num_processes
    size = train.batch_size // pieces
    every = np.arange(images_seen, images_seen + train.batch_size).reshape(pieces, size)
    return list(every[rank :: train.num_processes])


def update(
    denoiser: nn.Module,
    optimizer: Any,
    accelerator: Any,
    batches: Sequence[Callable[[], Batch]],
    schedule: Schedule,
    config: RunConfig,
    watch: Watch | None = None,
    parts: bool = False,
) -> StepResult:
    """Make one update from this rank's micro-batches.

    Args:
        denoiser, optimizer: as accelerate prepared them; or sharded.
        batches: one function per micro-batch; each is called when its turn comes.
        watch: told losses, t and how long batches were waited for.
        parts: measure the gradient norm of each part of the network as well.

    Raises:
        NonFiniteLossError: a loss or the gradient norm is not finite; parameters and moments are as before.
    """
    denoiser.train()
    total = torch.zeros((), device=accelerator.device)
    taken: list[tuple[Batch, Tensor]] = []
    for number, take in enumerate(batches):
        began = time.perf_counter()
        batch = take().to(accelerator.device)
        if watch is not None:
            watch.waited += time.perf_counter() - began
        last = number == len(batches) - 1
        with torch.enable_grad(), _sync(accelerator, denoiser, last):
            losses = training_loss(
                denoiser, batch.latents, batch.conditioning, batch.noise, batch.t, schedule, config.diffusion.prediction
            )  # [B]
            loss = losses.mean() / len(batches)
            accelerator.backward(loss)
        total += loss.detach()
        taken.append((batch, losses.detach()))
        if watch is not None:
            watch.see(batch.t, losses.detach())
    norms = part_norms(unwrap(denoiser)) if parts else None
    parameters = [p for p in denoiser.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.train.clip_norm or math.inf)
    value, grad_norm = float(accelerator.reduce(total, "mean")), float(whole(norm))
    # gradients are averaged over processes and the loss reduced: every process decides the same
    if not (math.isfinite(value) and math.isfinite(grad_norm)):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteLossError(_blame(value, grad_norm, taken, config.train.num_processes))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(value, grad_norm, norms)


def _sync(accelerator: Any, denoiser: nn.Module, last: bool) -> Any:
    """Average gradients over processes at the last micro-batch only.

    Not where the model is sharded: gradients that wait to be averaged lie whole in every process, 4 bytes a parameter,
    and whoever cuts a batch into pieces is short of memory. There each piece's are spread at once.
    """
    if isinstance(denoiser, FSDPModule):
        return nullcontext()
    return nullcontext() if last else accelerator.no_sync(denoiser)


def _blame(value: float, grad_norm: float, taken: Sequence[tuple[Batch, Tensor]], processes: int) -> str:
    """Say which samples the numbers came from, those of all processes; each of them must ask."""
    bad = [int(i) for batch, losses in taken for i in batch.indices[~torch.isfinite(losses).cpu().numpy()]]
    every = [int(i) for batch, _ in taken for i in batch.indices]
    if processes > 1:
        parts: list[Any] = [None] * processes
        dist.all_gather_object(parts, (bad, every))
        bad, every = ([i for part in parts for i in part[which]] for which in (0, 1))
    named = (
        f"samples with a non-finite loss: {bad}"
        if bad
        else f"no single loss is to blame; samples of the batch: {every}"
    )
    return f"loss {value}, gradient norm {grad_norm}; {named}"
