"""Prompts to images: the one place where encoders, denoiser, sampler and VAE meet at inference.

    pipeline = TextToImage.load("runs/quickstart/mmdit-s0")
    images = pipeline(["a red circle above a blue square"], seed=0)      # uint8 [1, R, R, 3]

Noise belongs to (seed, image index), so image 7 of a list is the same picture alone, in a batch of 64 or on another
machine; padding that a longer neighbour brings into its batch is masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmdit import rng
from mmdit.checkpoint import CheckpointError, checkpoint_hash, find_checkpoint, load_checkpoint, weights_stem
from mmdit.config import EncodersConfig, RunConfig, SamplingConfig, UNetConfig
from mmdit.denoiser import Conditioning
from mmdit.diffusion import Schedule, build_schedule
from mmdit.encoders.axes import apply_padding
from mmdit.encoders.text import TextEncoders, load_run_text
from mmdit.encoders.vae import AutoencoderKL, load_run_vae, to_images
from mmdit.models import build_denoiser
from mmdit.registry import lookup
from mmdit.sampling import GRIDS, SAMPLERS, guidance_options, guided_denoise, needs_null, sampler_options


class Stopped(RuntimeError):
    """Sampling was asked to stop between two steps."""


class TextToImage:
    """Text to image with one denoiser.

    Args:
        denoiser: obeys the door; used as it is, in evaluation mode.
        vae, text: frozen encoders.
        schedule: what noise is.
        prediction: what the denoiser gives.
        sampling: defaults of every call.
        encoders: padding and null of the run.
        precision: `bf16` (autocast) or `fp32`, of denoiser and VAE.
        size: pixels a side by default.
        provenance: goes into the metadata of saved pictures (run, checkpoint, its hash).
    """

    def __init__(
        self,
        denoiser: nn.Module,
        vae: AutoencoderKL,
        text: TextEncoders,
        schedule: Schedule,
        prediction: str,
        sampling: SamplingConfig | None = None,
        encoders: EncodersConfig | None = None,
        *,
        precision: str = "bf16",
        size: int = 64,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        self.denoiser, self.vae, self.text = denoiser, vae, text
        self.schedule, self.prediction = schedule, prediction
        self.sampling = sampling or SamplingConfig()
        self.encoders = encoders or EncodersConfig()
        self.precision, self.size = precision, size
        self.provenance = provenance or {}

    @classmethod
    def load(
        cls,
        path: str | Path,
        weights: str = "ema",
        *,
        device: torch.device | str | None = None,
        precision: str | None = None,
        vae: AutoencoderKL | None = None,
        text: TextEncoders | None = None,
    ) -> TextToImage:
        """Assemble the pipeline of a run.

        Args:
            path: a run folder (its newest whole checkpoint is taken) or one checkpoint.
            weights: `ema` (the average) or `raw` (the parameters themselves).
            precision: `bf16` or `fp32`; by default that of the training.
            vae, text: already loaded encoders, to share them between pipelines; they must be the run's.

        Raises:
            FileNotFoundError: no such run; the runs there are stand in the message.
            CheckpointError: no checkpoint, or one that does not verify.
        """
        stem = weights_stem(weights)
        checkpoint = load_checkpoint(find_checkpoint(path), stems=[stem])
        config = checkpoint.config
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        denoiser = build_denoiser(config.model).to(device)
        try:
            denoiser.load_state_dict(checkpoint.tensors[stem])
        except RuntimeError as error:
            reason = f"its {stem} does not fit the model of its config ({error})"
            raise CheckpointError(checkpoint.path, reason, "Was the library changed since?") from error
        vae, text = load_encoders(config, vae=vae, text=text)
        return cls(
            denoiser.eval(),
            vae.to(device),
            text.to(device),
            build_schedule(config.diffusion.schedule),
            config.diffusion.prediction,
            config.sampling,
            config.encoders,
            precision=precision or config.train.precision,
            size=config.data.resolution,
            provenance={
                "run": config.name,
                "checkpoint": checkpoint.path.name,
                "checkpoint_sha256": checkpoint_hash(checkpoint.path, stem),
                "weights": weights,
            },
        )

    @property
    def grain(self) -> int:
        """Pixels: both sides of an image are multiples of this."""
        config = self.denoiser.config
        multiple = 2 ** (len(config.channel_mult) - 1) if isinstance(config, UNetConfig) else config.patch_size
        return self.vae.config.factor * multiple

    def __call__(
        self, prompts: Sequence[str], negative_prompts: Sequence[str | None] | str | None = None, **options: Any
    ) -> np.ndarray:
        """Draw one image per prompt: uint8 [B, R, R, 3]. Options and errors as `images`."""
        return np.concatenate(list(self.images(prompts, negative_prompts, **options)))

    @torch.no_grad()
    def images(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str | None] | str | None = None,
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        size: int | tuple[int, int] | None = None,
        num_steps: int | None = None,
        sampler: str | None = None,
        grid: str | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 64,
        progress: Callable[[int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[np.ndarray]:
        """Draw images batch by batch.

        Args:
            prompts: one per image.
            negative_prompts: one for all, or one per image; None: the run's null.
            seed: of all noise.
            indices: number of each image, which with the seed decides its noise; default 0, 1, 2, ...
            size: pixels, one number or (height, width); multiples of `grain`.
            num_steps, sampler, grid, guidance_scale: where given, instead of the run's.
            progress: called with the images of each finished batch's count.
            should_stop: asked before each step.

        Yields:
            uint8 [batch_size or less, height, width, 3].

        Raises:
            ValueError: no prompts, lists of different length, a size that is no multiple, an unknown sampler or grid.
            Stopped: `should_stop` said so.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a list of strings, got the string {prompts!r}; write [{prompts!r}]")
        if not prompts:
            raise ValueError("there are no prompts; give at least one")
        numbers = list(range(len(prompts))) if indices is None else [int(i) for i in indices]
        if isinstance(negative_prompts, str) or negative_prompts is None:
            negative_prompts = [negative_prompts] * len(prompts)
        for name, given in (("indices", numbers), ("negative_prompts", negative_prompts)):
            if len(given) != len(prompts):
                raise ValueError(f"{name} has {len(given)} entries for {len(prompts)} prompts; give one per prompt")
        config = self._settings(num_steps, sampler, grid, guidance_scale)
        height, width = self._check_size(size)
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            latents = self.latents(
                prompts[rows], negative_prompts[rows], numbers[rows], seed, config, (height, width), should_stop
            )
            pixels = self.decode(latents)
            if progress is not None:
                progress(len(pixels))
            yield pixels

    def latents(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str | None],
        indices: Sequence[int],
        seed: int,
        config: SamplingConfig,
        size: tuple[int, int],
        should_stop: Callable[[], bool] | None = None,
    ) -> Tensor:
        """Sample one batch: latents float32 [B, C, H, W]."""
        factor, channels = self.vae.config.factor, self.vae.config.latent_channels
        shape = (channels, size[0] // factor, size[1] // factor)
        device = next(self.denoiser.parameters()).device

        def drawn(purpose: Any, step: int = 0) -> Tensor:
            return torch.from_numpy(rng.normal(seed, purpose, indices, shape, step)).to(device)

        def watch(i: int, t: float, denoised: Tensor) -> None:
            if should_stop is not None and should_stop():
                raise Stopped(f"stopped after sampling step {i + 1} of {config.num_steps}")

        conditioning = self.encode(prompts).to(device)
        null = self.encode_null(negative_prompts).to(device) if needs_null(config) else None
        denoise = guided_denoise(
            self.denoiser, self.schedule, self.prediction, conditioning, null, **guidance_options(config)
        )
        training = self.denoiser.training
        self.denoiser.eval()
        try:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                return SAMPLERS[config.sampler](
                    denoise,
                    drawn("sample_noise"),
                    self.schedule,
                    GRIDS[config.grid](self.schedule, config.num_steps),
                    step_noise=lambda i: drawn("step_noise", i),
                    callback=watch,
                    **sampler_options(config),
                )
        finally:
            self.denoiser.train(training)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts under the run's padding policy."""
        padding = self.encoders.padding
        return apply_padding(self.text.encode(prompts, padding="attend" if padding == "attend" else "mask"), padding)

    def encode_null(self, negative_prompts: Sequence[str | None]) -> Conditioning:
        """Encode negative prompts; where there is none, the run's null."""
        padding = self.encoders.padding
        null = self.text.null(1, self.encoders.null, padding=padding)
        given = [i for i, prompt in enumerate(negative_prompts) if prompt is not None]
        if not given:
            return null
        encoded = self.encode([str(negative_prompts[i]) for i in given])
        places = {row: place for place, row in enumerate(given)}
        both = Conditioning.cat([encoded, null])
        return both.index([places.get(row, len(given)) for row in range(len(negative_prompts))])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Return images uint8 [B, R, R, 3] of latents [B, C, H, W]."""
        with torch.autocast(latents.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            return to_images(self.vae.decode(latents))

    def _settings(
        self, num_steps: int | None, sampler: str | None, grid: str | None, guidance_scale: float | None
    ) -> SamplingConfig:
        if sampler is not None:
            lookup(SAMPLERS, sampler, "sampler")
        if grid is not None:
            lookup(GRIDS, grid, "grid")
        given = {"num_steps": num_steps, "sampler": sampler, "grid": grid, "guidance_scale": guidance_scale}
        tree = {**self.sampling.model_dump(), **{k: v for k, v in given.items() if v is not None}}
        if tree["sampler"] != "ddim":
            tree["eta"] = 0.0
        return SamplingConfig(**tree)

    def _check_size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        size = self.size if size is None else size
        height, width = (size, size) if isinstance(size, int) else size
        if height < 1 or width < 1 or height % self.grain or width % self.grain:
            near = [max(self.grain, round(side / self.grain) * self.grain) for side in (height, width)]
            raise ValueError(
                f"image size {height}x{width} is not a multiple of {self.grain} pixels; "
                f"the nearest is {near[0]}x{near[1]}"
            )
        return height, width

    def settings(self, **options: Any) -> dict[str, Any]:
        """Return what decides a picture, for its metadata: the run's sampling with `options` laid over it."""
        given = {key: value for key, value in options.items() if value is not None}
        return {**self.sampling.model_dump(), "precision": self.precision, **self.provenance, **given}


def load_encoders(
    config: RunConfig, *, vae: AutoencoderKL | None = None, text: TextEncoders | None = None
) -> tuple[AutoencoderKL, TextEncoders]:
    """Load a run's VAE and text encoders, on the CPU; what is passed in is taken as it is."""
    encoders = config.encoders
    vae = vae if vae is not None else load_run_vae(encoders)
    text = text if text is not None else load_run_text(encoders)
    return vae, text
