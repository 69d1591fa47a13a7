"""Guidance: from a denoiser and its conditioning to the closure denoise(noisy_latents, t) -> denoised.

Samplers see only this closure, so each kind of guidance is written once for all of them. Everything is combined on
`denoised`: it is affine in the network's output at a fixed (noisy_latents, t), so null + w (cond - null) gives the same
there as on velocity or epsilon.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdit.config import SamplingConfig
from mmdit.denoiser import AttentionGuidance, Conditioning, Denoiser, skip_layers
from mmdit.diffusion.prediction import clamp_t, time_limits, to_denoised
from mmdit.diffusion.schedule import Schedule
from mmdit.sampling.trajectory import Denoise


class SkipLayerGuidance(NamedTuple):
    """Push away from what the network says with some blocks left out: + scale (cond - cond without the blocks).

    Defaults: SD3.5-medium. Source: Stability-AI/sd3.5.

    Attributes:
        layers: block numbers to leave out.
        start, end: active while start < 1 - t < end. The release counts steps (start n < i < end n) on its own grid,
            where 1 - t = i / n nearly: the same steps are chosen (pinned by a test).
    """

    scale: float = 2.5
    layers: tuple[int, ...] = (7, 8, 9)
    start: float = 0.01
    end: float = 0.20


def guidance_options(config: SamplingConfig) -> dict[str, Any]:
    """Return the kind of guidance a config asks for, ready for `guided_denoise(..., **options)`."""
    options: dict[str, Any] = {"guidance_scale": 1.0, "interval": config.guidance_interval}
    if config.negative_guidance in ("cfg", "skip_layer"):
        options["guidance_scale"] = config.guidance_scale
    if config.negative_guidance == "skip_layer":
        options["skip_layer"] = SkipLayerGuidance(**config.skip_layer.model_dump())
    if config.negative_guidance == "kv_subtract":
        options["attention"] = AttentionGuidance("kv_subtract", config.kv_subtract.weight)
    if config.negative_guidance == "nag":
        options["attention"] = AttentionGuidance("nag", config.nag.scale, config.nag.tau, config.nag.alpha)
    return options


def needs_null(config: SamplingConfig) -> bool:
    """Tell whether a config's guidance sets anything against the prompt, so that a null must be encoded."""
    options = guidance_options(config)
    return options["guidance_scale"] != 1 or "attention" in options


def guided_denoise(
    denoiser: Denoiser,
    schedule: Schedule,
    prediction: str,
    conditioning: Conditioning,
    null_conditioning: Conditioning | None = None,
    guidance_scale: float = 1.0,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    skip_layer: SkipLayerGuidance | None = None,
    attention: AttentionGuidance | None = None,
) -> Denoise:
    """Build denoise(noisy_latents, t) -> denoised with guidance, by default classifier-free.

    Both halves run as one doubled batch [conditioning; null_conditioning], joined once, here; the shorter context is
    padded and masked (`Conditioning.cat`). Scale 1 runs the first half alone and scale 0 the second alone. A negative
    prompt is a null_conditioning like any other. The network runs under the caller's autocast; what it gives is
    combined in float32.

    Args:
        prediction: what the denoiser gives, a name of `PREDICTIONS`.
        conditioning: of the B images to be sampled.
        null_conditioning: what stands for "no text", B rows or one row for all.
        guidance_scale: w in null + w (cond - null).
        interval: guidance acts where interval[0] <= t <= interval[1]; outside the conditioning alone is used.
            Source: Kynkäänniemi et al. 2024, arXiv:2404.07724.
        skip_layer: skip-layer guidance on top, one more forward of B rows where it is active.
        attention: guidance inside the attention, with `null_conditioning` as the negative text; with a guidance_scale
            of 1 it stands alone. With `kv_subtract` both texts must have the same length.

    Returns:
        The closure. t beyond the prediction's `time_limits` is answered as at the limit.

    Raises:
        ValueError: a guidance_scale other than 1, or `attention`, without null_conditioning; unknown prediction, or
            one that the schedule does not define; an interval that is none; batches or texts that do not fit.

    Source: Ho & Salimans 2022, arXiv:2207.12598, Eq. 6, in the form where w = 1 is no guidance.
    """
    time_limits(prediction, schedule)  # refuses a prediction that the schedule does not define, before sampling
    if guidance_scale < 0:
        raise ValueError(f"guidance_scale must be at least 0, got {guidance_scale}; 1 is no guidance")
    if not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"guidance interval must be 0 <= low <= high <= 1 in t, got {interval}")
    if (guidance_scale != 1 or attention is not None) and null_conditioning is None:
        what = f"guidance_scale {guidance_scale}" if attention is None else f"guidance in attention ({attention.mode})"
        raise ValueError(f"{what} needs a null_conditioning; pass one, or use guidance_scale 1 alone")
    batch = conditioning.context.shape[0]
    doubled: Conditioning | None = None
    guided = conditioning  # what runs as "cond" where guidance acts
    if null_conditioning is not None and (guidance_scale != 1 or attention is not None):
        if null_conditioning.context.shape[0] == 1:
            null_conditioning = null_conditioning.repeat(batch)
        if null_conditioning.context.shape[0] != batch:
            raise ValueError(
                f"null_conditioning has {null_conditioning.context.shape[0]} rows, conditioning has {batch}; give as "
                f"many, or one row for all"
            )
        if attention is not None:
            guided = _against(conditioning, null_conditioning, attention)
        elif guidance_scale != 0:
            doubled = Conditioning.cat([conditioning, null_conditioning])

    def run(noisy_latents: Tensor, t: Tensor, given: Conditioning) -> Tensor:
        # a denoiser held in bfloat16 wants bfloat16 latents; its conditioning tells
        half = given.context.dtype in (torch.bfloat16, torch.float16)
        inputs = noisy_latents.to(given.context.dtype) if half else noisy_latents
        output = denoiser(inputs, schedule.timestep(t).float(), given)
        return to_denoised(prediction, output, noisy_latents, t, schedule)

    def denoise(noisy_latents: Tensor, t: Tensor) -> Tensor:
        """noisy_latents [B, C, H, W], t [B], all rows alike -> denoised [B, C, H, W], float32 or wider."""
        if noisy_latents.shape[0] != batch:
            raise ValueError(f"noisy_latents have {noisy_latents.shape[0]} rows, the conditioning has {batch}")
        level = float(t[0])
        t = clamp_t(prediction, t, schedule)
        positive: Tensor | None = None
        if not interval[0] <= level <= interval[1]:
            denoised = positive = run(noisy_latents, t, conditioning)
        elif guidance_scale == 1:
            denoised = positive = run(noisy_latents, t, guided)
        elif doubled is None:
            assert null_conditioning is not None
            denoised = run(noisy_latents, t, null_conditioning)
            if guidance_scale != 0:
                positive = run(noisy_latents, t, guided)
                denoised = denoised + guidance_scale * (positive - denoised)
        else:
            both = run(noisy_latents.repeat(2, 1, 1, 1), t.repeat(2), doubled)  # [2B, C, H, W]
            positive, null = both.chunk(2)
            denoised = null + guidance_scale * (positive - null)
        if skip_layer is not None and skip_layer.start < 1 - level < skip_layer.end:
            if positive is None:
                positive = run(noisy_latents, t, conditioning)
            with skip_layers(denoiser, skip_layer.layers):
                weakened = run(noisy_latents, t, conditioning)
            denoised = denoised + skip_layer.scale * (positive - weakened)
        return denoised

    return denoise


def _against(conditioning: Conditioning, negative: Conditioning, guidance: AttentionGuidance) -> Conditioning:
    """Set the negative text beside the positive one; for `kv_subtract` each token needs its counterpart.

    Raises:
        ValueError: the lengths differ under `kv_subtract`.
    """
    if guidance.mode == "kv_subtract":
        layouts = [
            [stop - start for _, start, stop, _ in c.streams] if c.streams else [c.context.shape[1]]
            for c in (conditioning, negative)
        ]
        if layouts[0] != layouts[1]:
            raise ValueError(
                f"kv_subtract subtracts the negative text token by token, but the texts have {layouts[0]} and "
                f"{layouts[1]} tokens; encode both with padding 'mask' or 'attend', not 'trim'"
            )
    return conditioning.with_negative(negative, guidance)
