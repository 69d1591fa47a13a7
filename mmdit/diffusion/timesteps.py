"""How training draws t: each density as its inverse distribution function and as its formula.

`sample_t(config, u)` turns uniforms into times; the uniforms come from `mmdit.rng`, so a draw belongs to an image and
a step and not to a batch. Every map rises with u, so u is the distribution function of the t it gives, and stratified
u give stratified t. t = 1 is noise: `logit_normal` with a positive mean draws more noise, as in the paper (the public
SD3 fine-tuning script of diffusers has the sign the other way).

t is the time before the schedule's shift; a shifted schedule shifts what is drawn here (see schedule.py).

Source: Esser et al. 2024, arXiv:2403.03206v1, Eq. 19 (logit-normal), 20 (mode), 21 (CosMap).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdit.config import CosMapConfig, LogitNormalConfig, ModeConfig, UniformConfig
from mmdit.diffusion.schedule import Schedule
from mmdit.registry import lookup

Density = UniformConfig | LogitNormalConfig | ModeConfig | CosMapConfig


class DensityRule(NamedTuple):
    """(config, u [B]) -> t [B], and (config, t [B]) -> density [B]; float64."""

    inverse_cdf: Callable[[Any, Tensor], Tensor]
    pdf: Callable[[Any, Tensor], Tensor]


def sample_t(config: Density, u: Tensor, schedule: Schedule | None = None) -> Tensor:
    """Draw t from uniforms.

    Args:
        config: the density.
        u: uniforms in [0, 1), [B]; pass float64 (`rng.uniform`), which keeps the tails.
        schedule: where given, t is moved to the times it trains at: a variance-preserving chain has T of them, so
            `uniform` becomes k = floor(u T) uniform over 0 .. T - 1, that is t = (floor(u T) + 1) / T.

    Returns:
        t [B], float64 (float32 for narrower u), in [0, 1].

    Raises:
        ValueError: a u outside [0, 1].
    """
    if u.numel() and not bool(((u >= 0) & (u <= 1)).all()):
        raise ValueError(f"u must lie in [0, 1], got values from {u.min():g} to {u.max():g}")
    t = lookup(DENSITIES, config.name, "density").inverse_cdf(config, u.double())
    if schedule is not None:
        t = schedule.snap(t)
    return t if u.dtype == torch.float64 else t.float()


def pdf(config: Density, t: Tensor) -> Tensor:
    """Return the density at t [B] in (0, 1) -> float64 [B]; the paper's formulas."""
    return lookup(DENSITIES, config.name, "density").pdf(config, t.double())


def _logit_normal_t(config: LogitNormalConfig, u: Tensor) -> Tensor:
    return torch.sigmoid(config.mean + config.std * torch.special.ndtri(u))


def _logit_normal_pdf(config: LogitNormalConfig, t: Tensor) -> Tensor:
    standard = (torch.logit(t) - config.mean) / config.std
    return torch.exp(-0.5 * standard**2) / (config.std * math.sqrt(2 * math.pi) * t * (1 - t))


def _mode_t(config: ModeConfig, u: Tensor) -> Tensor:
    """Eq. 20 with u read from the other end, f(1 - u), so that t rises with u; the distribution is the same."""
    return u - config.scale * (torch.sin(math.pi / 2 * u) ** 2 - u)


def _mode_slope(config: ModeConfig, u: Tensor) -> Tensor:
    return 1 - config.scale * (math.pi / 2 * torch.sin(math.pi * u) - 1)


def _mode_pdf(config: ModeConfig, t: Tensor) -> Tensor:
    """|d f^-1 / dt| has no closed form: invert by bisection (60 halvings reach float64), then one over the slope."""
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        middle = (low + high) / 2
        above = _mode_t(config, middle) > t
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return 1 / _mode_slope(config, (low + high) / 2)


def _cosmap_t(config: CosMapConfig, u: Tensor) -> Tensor:
    """1 - 1 / (tan(pi u / 2) + 1), written with sine and cosine so that u = 1 is no pole."""
    sine, cosine = torch.sin(math.pi / 2 * u), torch.cos(math.pi / 2 * u)
    return sine / (sine + cosine)


def _cosmap_pdf(config: CosMapConfig, t: Tensor) -> Tensor:
    return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)


DENSITIES: dict[str, DensityRule] = {
    "uniform": DensityRule(lambda config, u: u, lambda config, t: torch.ones_like(t)),
    "logit_normal": DensityRule(_logit_normal_t, _logit_normal_pdf),
    "mode": DensityRule(_mode_t, _mode_pdf),
    "cosmap": DensityRule(_cosmap_t, _cosmap_pdf),
}
