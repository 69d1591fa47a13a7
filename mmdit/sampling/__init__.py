"""Room: inference. Grids of t, integrators over them, guidance.

denoise = guided_denoise(denoiser, schedule, prediction, conditioning, null_conditioning, guidance_scale=4.0)
grid = GRIDS["release"](schedule, 28)
latents = SAMPLERS["euler"](denoise, noise, schedule, grid)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mmdit.config import SamplingConfig
from mmdit.sampling.ddim import ddim
from mmdit.sampling.ddpm import ddpm
from mmdit.sampling.dpmpp import dpmpp_2m, dpmpp_2m_sd35
from mmdit.sampling.euler import euler
from mmdit.sampling.grids import GRIDS
from mmdit.sampling.guidance import SkipLayerGuidance, guidance_options, guided_denoise, needs_null
from mmdit.sampling.heun import heun

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": euler,
    "heun": heun,
    "ddim": ddim,
    "ddpm": ddpm,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sd35": dpmpp_2m_sd35,
}


def sampler_options(config: SamplingConfig) -> dict[str, Any]:
    """Return the options that the config's sampler reads, ready for `SAMPLERS[config.sampler](..., **options)`."""
    if config.sampler == "ddim":
        return {"eta": config.eta}
    if config.sampler == "ddpm":
        return {"variance": config.variance}
    return {}


__all__ = [
    "GRIDS",
    "SAMPLERS",
    "SkipLayerGuidance",
    "guidance_options",
    "guided_denoise",
    "needs_null",
    "sampler_options",
]
