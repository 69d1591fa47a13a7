"""What every sampler shares: a checked grid with its noise levels, one call of the denoiser, strict options."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdit.diffusion.schedule import Schedule
from mmdit.registry import unknown

Denoise = Callable[[Tensor, Tensor], Tensor]
"""denoise(noisy_latents [B, C, H, W], t [B] float64) -> denoised [B, C, H, W]"""

StepNoise = Callable[[int], Tensor]
"""step_noise(i) -> standard normal [B, C, H, W] of step i, keyed by (seed, image index, i)"""

Callback = Callable[[int, float, Tensor], None]
"""callback(i, t, denoised), called once a step, for progress and previews"""


class Level(NamedTuple):
    """One point of the grid; Python floats in float64."""

    t: float
    alpha: float
    sigma: float
    scale: float  # noisy_latents = scale * y, in the schedule's ODE coordinates (y, tau)

    @property
    def tau(self) -> float:
        """The ODE's clock, sigma / scale."""
        return self.sigma / self.scale

    @property
    def log_snr(self) -> float:
        """lambda = log(alpha / sigma): -inf at pure noise, +inf at the data."""
        if self.alpha == 0:
            return -math.inf
        return math.inf if self.sigma == 0 else math.log(self.alpha / self.sigma)


def read_levels(schedule: Schedule, grid: Tensor) -> list[Level]:
    """Check a grid and look its levels up.

    Args:
        grid: 1-D, strictly descending t in [0, 1], ending in 0; its beginning may be cut off (`strength`).

    Raises:
        ValueError: it is anything else.
    """
    t = torch.as_tensor(grid, dtype=torch.float64, device="cpu")
    if t.ndim != 1 or len(t) < 2:
        raise ValueError(f"a grid is 1-D with at least two times, got shape {list(t.shape)}; see mmdit.sampling.GRIDS")
    if t[-1] != 0 or t[0] > 1 or not bool((t[1:] < t[:-1]).all()):
        raise ValueError(
            f"a grid descends strictly from at most 1 to 0, got {t[0]:g} ... {t[-1]:g}; see mmdit.sampling.GRIDS"
        )
    values = (t, schedule.alpha(t), schedule.sigma(t), schedule.ode_scale(t))
    return [Level(*row) for row in zip(*(v.tolist() for v in values), strict=True)]


def working(noisy_latents: Tensor) -> Tensor:
    """Return the latents in the sampler's own precision: float32, or float64 where they come so."""
    return noisy_latents.to(torch.promote_types(noisy_latents.dtype, torch.float32))


def evaluate(denoise: Denoise, noisy_latents: Tensor, t: float) -> Tensor:
    """Ask for the denoised latents at one t for the whole batch."""
    # float64: (k + 1) / 1000 in float32 would reach the network as 981.00006.
    dtype = torch.float32 if noisy_latents.device.type == "mps" else torch.float64
    times = torch.full((noisy_latents.shape[0],), t, dtype=dtype, device=noisy_latents.device)
    return denoise(noisy_latents, times).to(noisy_latents.dtype)


def read_options(sampler: str, options: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """Lay options on the sampler's defaults.

    Raises:
        ValueError: an option that this sampler does not read.
    """
    for name in options:
        if name not in defaults:
            if not defaults:
                raise ValueError(f"sampler {sampler!r} takes no options, got {name!r}")
            raise ValueError(unknown(f"option of sampler {sampler!r}", name, defaults))
    return {**defaults, **options}


def draw(step_noise: StepNoise | None, i: int, like: Tensor, sampler: str) -> Tensor:
    """Return the noise of step i in the precision of `like`.

    Raises:
        ValueError: the sampler needs noise and none was passed, or its shape is not that of the latents.
    """
    if step_noise is None:
        raise ValueError(
            f"sampler {sampler!r} adds noise at each step: pass step_noise, a function of the step number that gives "
            f"[B, C, H, W] (for example from mmdit.rng.normal), so that the result depends on the seed alone"
        )
    noise = step_noise(i).to(like)
    if noise.shape != like.shape:
        raise ValueError(f"step_noise({i}) has shape {list(noise.shape)}, the latents have {list(like.shape)}")
    return noise
