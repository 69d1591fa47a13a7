"""Prompts to images: the one place where encoders, denoiser, sampler and VAE meet at inference.

    pipeline = TextToImage.load("runs/quickstart/mmdit-s0")
    pipeline = TextToImage.load("sd3_medium_incl_clips.safetensors")
    images = pipeline(["a red circle above a blue square"], seed=0)      # uint8 [1, R, R, 3]

Noise belongs to (seed, image index), so image 7 of a list is the same picture alone, in a batch of 64 or on another
machine; padding that a longer neighbour brings into its batch is masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from mmdit import rng
from mmdit.config import EncodersConfig, NegativeGuidance, SamplingConfig, UNetConfig, check_guidance
from mmdit.denoiser import Conditioning
from mmdit.diffusion import Schedule, build_schedule
from mmdit.diffusion.prediction import clamp_t
from mmdit.encoders.axes import apply_padding
from mmdit.encoders.text import TextEncoders
from mmdit.encoders.vae import AutoencoderKL, to_images
from mmdit.models.modulation_table import Keep, ModulationTables, table_bytes
from mmdit.pipeline.offload import Offload, Part
from mmdit.pipeline.prompts import CutWarning
from mmdit.pipeline.released import load_released
from mmdit.pipeline.request import Sizes, Texts, check_lists, check_size, check_sizes, check_skip
from mmdit.pipeline.runs import load_encoders, load_run
from mmdit.pipeline.sources import is_released
from mmdit.registry import lookup, unknown
from mmdit.releases import Release
from mmdit.sampling import (
    GRIDS,
    SAMPLERS,
    SkipLayerGuidance,
    guidance_options,
    guided_denoise,
    needs_null,
    sampler_options,
)

TILE_ABOVE = 160 * 160  # latent pixels (1280 x 1280 of an f8 VAE): larger pictures of a release are decoded in tiles
TILE = 128  # latent pixels a side of a tile


class Stopped(RuntimeError):
    """Sampling was asked to stop between two steps."""


class TextToImage:
    """Text to image with one denoiser.

    Args:
        denoiser: obeys the door; used as it is, in evaluation mode. Or a `Part` that fetches it.
        vae, text: frozen encoders; `text` may be a `Part`.
        schedule: what noise is.
        prediction: what the denoiser gives.
        sampling: defaults of every call.
        encoders: padding and null of the run.
        precision: `bf16` (autocast where the weights are float32) or `fp32`, of denoiser and VAE.
        size: pixels a side by default.
        provenance: goes into the metadata of saved pictures (run, checkpoint, its hash).
        release: the released family, where it is one.
        device: where it runs; by default where the denoiser is.
        offload: see `mmdit.pipeline.offload`; other than `none` needs Parts that can be fetched.
        tables: answer adaLN from tables while sampling (`mmdit.models.modulation_table`), where that saves memory.
    """

    def __init__(
        self,
        denoiser: nn.Module | Part[nn.Module],
        vae: AutoencoderKL,
        text: TextEncoders | Part[TextEncoders],
        schedule: Schedule,
        prediction: str,
        sampling: SamplingConfig | None = None,
        encoders: EncodersConfig | None = None,
        *,
        precision: str = "bf16",
        size: int = 64,
        provenance: dict[str, Any] | None = None,
        release: Release | None = None,
        device: torch.device | None = None,
        offload: Offload = "none",
        tables: bool = False,
        model_config: Any = None,
    ) -> None:
        self._denoiser = denoiser if isinstance(denoiser, Part) else Part(denoiser)
        self._text = text if isinstance(text, Part) else Part(text)
        self.vae = vae
        self.schedule, self.prediction = schedule, prediction
        self.sampling = sampling or SamplingConfig()
        self.encoders = encoders or EncodersConfig()
        self.precision, self.size = precision, size
        self.provenance, self.release = provenance or {}, release
        self.offload, self.tables = offload, tables
        self._device, self._model_config = device, model_config
        self._warn_cut = CutWarning()

    @classmethod
    def load(
        cls,
        path: str | Path,
        weights: str = "ema",
        *,
        device: torch.device | str | None = None,
        precision: str | None = None,
        vae: AutoencoderKL | str | Path | None = None,
        text: TextEncoders | Any | None = None,
        **options: Any,
    ) -> TextToImage:
        """Assemble the pipeline of a run, or of released weights.

        Args:
            path: a run folder (its newest whole checkpoint is taken) or one checkpoint; or released weights: a
                .safetensors file (all in one, or the denoiser alone), a sharded set, or a diffusers folder.
            weights: of a run: `ema` (the average) or `raw` (the parameters themselves).
            precision: of a run: `bf16` or `fp32`; by default that of the training.
            vae, text: already loaded encoders, to share them between pipelines; they must be the run's. With released
                weights also their paths, as `load_vae` and `load_text_encoders` take them.
            options: of released weights alone: family, dtype, offload, tables, spiece, t5_length; see
                `mmdit.pipeline.released.load_released`.

        Raises:
            FileNotFoundError: no such run; the runs there are stand in the message. Or no such file of weights.
            CheckpointError: no checkpoint, or one that does not verify.
            ValueError: released weights that lack a part, with the file that has it; options a run does not take.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if is_released(path):
            return cls(**load_released(path, device=device, vae=vae, text=text, **options))
        if options:
            raise ValueError(f"{', '.join(options)}: only with released weights; {path} is taken for a run")
        denoiser, config, provenance = load_run(path, weights, device)
        loaded_vae, loaded_text = load_encoders(config, vae=vae, text=text)  # type: ignore[arg-type]
        return cls(
            denoiser,
            loaded_vae.to(device),
            loaded_text.to(device),
            build_schedule(config.diffusion.schedule),
            config.diffusion.prediction,
            config.sampling,
            config.encoders,
            precision=precision or config.train.precision,
            size=config.data.resolution,
            provenance=provenance,
        )

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser, loaded if it is not in memory."""
        return self._denoiser.get()

    @property
    def text(self) -> TextEncoders:
        """The text encoders, loaded if they are not in memory."""
        return self._text.get()

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device or next(self.denoiser.parameters()).device

    @property
    def model_config(self) -> Any:
        """The denoiser's config."""
        return self._model_config or self.denoiser.config

    @property
    def batch_size(self) -> int:
        """Images drawn at once by default."""
        return 64 if self.release is None else 1

    @property
    def grain(self) -> int:
        """Pixels: both sides of an image are multiples of this."""
        config = self.model_config
        multiple = 2 ** (len(config.channel_mult) - 1) if isinstance(config, UNetConfig) else config.patch_size
        return self.vae.config.factor * multiple

    @property
    def largest(self) -> int | None:
        """Pixels a side at most, where the denoiser has a table of positions; else None."""
        config = self.model_config
        if isinstance(config, UNetConfig):
            return None
        return config.pos_embed_max_size * config.patch_size * self.vae.config.factor

    def __call__(
        self, prompts: Sequence[str], negative_prompts: Sequence[str | None] | str | None = None, **options: Any
    ) -> np.ndarray:
        """Draw one image per prompt: uint8 [B, R, R, 3]. Options and errors as `images`."""
        return np.concatenate(list(self.images(prompts, negative_prompts, **options)))

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
        negative_guidance: str | None = None,
        skip_layer: SkipLayerGuidance | bool = False,
        sizes: Sizes | None = None,
        batch_size: int | None = None,
        progress: Callable[[int], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[np.ndarray]:
        """Draw images batch by batch. What is asked is checked at once, before anything is loaded or computed.

        Args:
            prompts: one per image.
            negative_prompts: one for all, or one per image; None: the run's null.
            seed: of all noise.
            indices: number of each image, which with the seed decides its noise; default 0, 1, 2, ...
            size: pixels, one number or (height, width); multiples of `grain`, at most `largest`.
            num_steps, sampler, grid, guidance_scale, negative_guidance: where given, instead of the run's.
            skip_layer: skip-layer guidance on top; True: as the release has it (SD3.5-medium).
            sizes: SDXL's micro-conditioning; None: a picture of `size` that was not cut.
            batch_size: images at once; by default 64 of a run, 1 of a release.
            progress: called with the images of each finished batch's count.
            should_stop: asked before each step.
            on_step: called with the number of each finished sampling step.

        Yields:
            uint8 [batch_size or less, height, width, 3].

        Raises:
            ValueError: no prompts, lists of different length, a size that is no multiple or too large, an unknown
                sampler or grid, sizes or skip-layer guidance where there is none.
            Stopped: `should_stop` said so.
        """
        numbers, negatives = check_lists(prompts, indices, negative_prompts)
        config = self._settings(num_steps, sampler, grid, guidance_scale, negative_guidance)
        size = check_size(self.size if size is None else size, self.grain, self.largest)
        told = check_sizes(sizes, size, self.release)
        skip = check_skip(skip_layer, self.release)

        def watch(i: int, t: float, denoised: Tensor) -> None:
            if on_step is not None:
                on_step(i)
            if should_stop is not None and should_stop():
                raise Stopped(f"stopped after sampling step {i + 1} of {config.num_steps}")

        batch_size = batch_size or self.batch_size
        batches = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]

        def draw(known: Texts, batch: slice) -> Tensor:
            return self.latents(known, numbers[batch], seed, config, size, skip_layer=skip, watch=watch)

        texts = (self.encode_texts(prompts[b], negatives[b], config, told) for b in batches)
        return self._batches(texts, batches, config, draw, progress)

    @torch.no_grad()
    def _batches(
        self,
        texts: Iterable[Texts],
        batches: Sequence[slice],
        config: SamplingConfig,
        draw: Callable[[Texts, slice], Tensor],
        progress: Callable[[int], None] | None,
    ) -> Iterator[np.ndarray]:
        """Encode, draw and decode batch after batch, with what the offload level and the tables want around it."""
        if self.offload != "none":
            texts = self._encode_and_leave(texts)
        elif self.tables:
            texts = list(texts)
        with self._tabulated(texts, config) as ready:
            for batch, known in zip(batches, ready, strict=True):
                pixels = self.decode(draw(known, batch))
                if progress is not None:
                    progress(len(pixels))
                yield pixels

    def _encode_and_leave(self, texts: Iterable[Texts]) -> list[Texts]:
        """Encode everything with the text encoders alone in memory, and free them."""
        if self._text.can_leave:
            self._denoiser.put_away()
        kept = [known.to("cpu") for known in texts]
        self._text.put_away()
        return kept

    @contextmanager
    def _tabulated(self, texts: Iterable[Texts], config: SamplingConfig) -> Iterator[Iterable[Texts]]:
        """Put adaLN tables in place for the known texts, where they are asked for and smaller than the weights."""
        if not self.tables:
            yield texts
            return
        known = [self._ready(each) for each in texts]
        rows = [c.pooled for each in known for c in each if c is not None and c.pooled is not None]
        times = self.schedule.timestep(self._times(config)).float()
        pooled = torch.unique(torch.cat(rows), dim=0) if rows else None
        count = 1 if pooled is None else len(pooled)
        dtype = torch.bfloat16 if self._autocasts else self.dtype
        tables, weights = table_bytes(self.denoiser, len(times), count, dtype.itemsize)
        if tables >= weights:  # many different prompts: the tables would be larger than what they replace
            yield known
            return
        # freed weights come back with the denoiser's next loading; on an accelerator they wait on the host
        keep: Keep = "host" if self.device.type != "cpu" else "nowhere" if self._denoiser.can_leave else "place"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._autocasts):
            in_place = ModulationTables(self.denoiser, times, pooled, keep)
        try:
            yield known
        finally:
            if keep == "nowhere":
                self._denoiser.put_away()
            else:
                in_place.restore()

    def _times(self, config: SamplingConfig) -> Tensor:
        """Return the times t the network is asked at, float64 [T], on the device."""
        grid = GRIDS[config.grid](self.schedule, config.num_steps)[:-1].to(self.device)
        return clamp_t(self.prediction, grid, self.schedule)

    def latents(
        self,
        texts: Texts,
        indices: Sequence[int],
        seed: int,
        config: SamplingConfig,
        size: tuple[int, int],
        *,
        skip_layer: SkipLayerGuidance | None = None,
        watch: Callable[[int, float, Tensor], None] | None = None,
    ) -> Tensor:
        """Sample one batch: latents float32 [B, C, H, W]; `watch(i, t, denoised)` is called after each step."""
        factor, channels = self.vae.config.factor, self.vae.config.latent_channels
        shape = (channels, size[0] // factor, size[1] // factor)
        device = self.device

        def drawn(purpose: Any, step: int = 0) -> Tensor:
            return torch.from_numpy(rng.normal(seed, purpose, indices, shape, step)).to(device)

        denoiser, texts = self.denoiser, self._ready(texts)
        options = guidance_options(config) | ({} if skip_layer is None else {"skip_layer": skip_layer})
        denoise = guided_denoise(denoiser, self.schedule, self.prediction, texts.conditioning, texts.null, **options)
        training = denoiser.training
        denoiser.eval()
        try:
            with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._autocasts):
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
            denoiser.train(training)

    @property
    def dtype(self) -> torch.dtype:
        """Of the denoiser's weights."""
        return next(self.denoiser.parameters()).dtype

    @property
    def _autocasts(self) -> bool:
        return self.precision == "bf16" and self.dtype == torch.float32

    def _ready(self, texts: Texts) -> Texts:
        """Move texts to the device; a denoiser held in half precision reads them so."""
        return texts.to(self.device, None if self.dtype == torch.float32 else self.dtype)

    def encode_texts(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str | None],
        config: SamplingConfig,
        told: Tensor | None = None,
    ) -> Texts:
        """Encode one batch of prompts and, where guidance needs it, what stands against them.

        Args:
            told: the six sizes of SDXL, [1, 6].
        """
        self._warn_cut(self.text, [*prompts, *(prompt for prompt in negative_prompts if prompt)])
        null = self.encode_null(negative_prompts, told) if needs_null(config) else None
        return Texts(self.encode(prompts, told), null)

    def encode(self, prompts: Sequence[str], told: Tensor | None = None) -> Conditioning:
        """Encode prompts under the run's padding policy."""
        padding = self.encoders.padding
        encoded = self.text.encode(
            prompts,
            padding="attend" if padding == "attend" else "mask",
            sizes=None if told is None else told.expand(len(prompts), -1),
        )
        return apply_padding(encoded, padding)

    def encode_null(self, negative_prompts: Sequence[str | None], told: Tensor | None = None) -> Conditioning:
        """Encode negative prompts; where there is none, the run's null."""
        null = self.text.null(1, self.encoders.null, padding=self.encoders.padding, sizes=told)
        nothing = (None, "") if self.release is not None and self.release.empty_is_null else (None,)
        given = [i for i, prompt in enumerate(negative_prompts) if prompt not in nothing]
        if not given:
            return null
        encoded = self.encode([str(negative_prompts[i]) for i in given], told)
        places = {row: place for place, row in enumerate(given)}
        both = Conditioning.cat([encoded, null])
        return both.index([places.get(row, len(given)) for row in range(len(negative_prompts))])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Return images uint8 [B, R, R, 3] of latents [B, C, H, W]; those of a release one by one, large ones tiled."""
        if self.release is None:
            with torch.autocast(latents.device.type, dtype=torch.bfloat16, enabled=self._autocasts):
                return to_images(self.vae.decode(latents))
        tile = TILE if latents.shape[2] * latents.shape[3] > TILE_ABOVE else None
        parameter = next(self.vae.parameters())
        rows = latents.to(parameter.device, parameter.dtype).split(1)
        return np.concatenate([to_images(self.vae.decode(row, tile=tile)) for row in rows])

    def _settings(
        self,
        num_steps: int | None = None,
        sampler: str | None = None,
        grid: str | None = None,
        guidance_scale: float | None = None,
        negative_guidance: str | None = None,
    ) -> SamplingConfig:
        if sampler is not None:
            lookup(SAMPLERS, sampler, "sampler")
        if grid is not None:
            lookup(GRIDS, grid, "grid")
        if negative_guidance is not None and negative_guidance not in get_args(NegativeGuidance):
            raise ValueError(unknown("negative guidance", negative_guidance, get_args(NegativeGuidance)))
        given = {
            "num_steps": num_steps,
            "sampler": sampler,
            "grid": grid,
            "guidance_scale": guidance_scale,
            "negative_guidance": negative_guidance,
        }
        tree = {**self.sampling.model_dump(), **{k: v for k, v in given.items() if v is not None}}
        if tree["sampler"] != "ddim":
            tree["eta"] = 0.0
        config = SamplingConfig(**tree)
        check_guidance(self.model_config, self.encoders, config)
        return config

    def settings(self, **options: Any) -> dict[str, Any]:
        """Return what decides a picture, for its metadata: the run's sampling with `options` laid over it."""
        given = {key: value for key, value in options.items() if value is not None}
        return {**self.sampling.model_dump(), "precision": self.precision, **self.provenance, **given}
