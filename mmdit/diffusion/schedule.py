"""Noise schedules: how much of a noisy latent is image and how much is noise, as a function of t.

    noisy_latents = alpha(t) * latents + sigma(t) * noise,     t in [0, 1], rising with noise, t = 0 exactly the data

Two families stand behind one interface, so that loss, samplers and guidance are written once:

    RectifiedFlow         alpha = 1 - s(t), sigma = s(t), with the shift s(t) = shift t / (1 + (shift - 1) t)
    VariancePreserving    DDPM's chain of T steps; t = (k + 1) / T for the releases' 0-based index k = 0 .. T - 1

Where the shift stands: inside the schedule and nowhere else. `t` is the time *before* the shift. Densities draw it and
grids are written in it; the network is told 1000 * sigma(t), as in the SD3 releases, so training and sampling are
shifted alike (arXiv:2403.03206, 5.3.2). With shift = 1 the network time is 1000 t.

Numbers are computed in float64 and returned in the dtype of `t` (at least float32); index tables are float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from mmdit.config import RectifiedFlowConfig, VariancePreservingConfig
from mmdit.registry import lookup

Betas = Literal["linear", "scaled_linear", "cosine", "constant"]
NETWORK_TIME = 1000.0  # rectified flow: network time of pure noise


class Schedule(ABC):
    """alpha, sigma and the clock of one noising process; no parameters, no state.

    Attributes:
        t_min, t_max: where a prediction is singular (`prediction.time_limits`), training and sampling stop here.
    """

    t_min: float = 0.001
    t_max: float = 0.999

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the latents at t [B] -> [B]."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise at t [B] -> [B]."""

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """Network time of t [B] -> [B], float."""

    @abstractmethod
    def t_from_timestep(self, timestep: Tensor) -> Tensor:
        """t of a network time [B] -> [B]; the inverse of `timestep`."""

    @abstractmethod
    def ode_scale(self, t: Tensor) -> Tensor:
        """What noisy latents are divided by to give the ODE coordinate y: 1 (rectified flow) or alpha. [B] -> [B]."""

    @abstractmethod
    def t_from_tau(self, tau: Tensor) -> Tensor:
        """t at which the ODE's clock tau = sigma / ode_scale shows `tau`, [B] -> [B]."""

    @abstractmethod
    def snap(self, t: Tensor) -> Tensor:
        """Move t [B] to the times training may use: all of (0, 1], or the T points of a discrete chain."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Everything that distinguishes this schedule, for the stamp on a result."""

    def tau(self, t: Tensor) -> Tensor:
        """The ODE's clock sigma / ode_scale at t [B] -> [B]; rises with t and is 0 at t = 0."""
        return self.sigma(t) / self.ode_scale(t)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mix latents and noise.

        Args:
            latents: [B, C, H, W].
            noise: standard normal, [B, C, H, W].
            t: [B], in [0, 1].

        Returns:
            noisy_latents [B, C, H, W] in the latents' dtype, at least float32 (mixed there).
        """
        return expand(self.alpha(t), latents) * latents + expand(self.sigma(t), latents) * noise

    def ode_coordinates(self, noisy_latents: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (y [B, C, H, W], tau [B]) in which the sampling ODE is dy/dtau = (y - denoised) / tau.

        Rectified flow: (noisy_latents, sigma); variance preserving: (noisy_latents / alpha, sigma / alpha).
        Source: Song et al. 2021 (DDIM), arXiv:2010.02502, Eq. 14; Karras et al. 2022, arXiv:2206.00364, Eq. 3.
        """
        return noisy_latents / expand(self.ode_scale(t), noisy_latents), self.tau(t)

    def from_ode_coordinates(self, y: Tensor, t: Tensor) -> Tensor:
        """Return the noisy latents [B, C, H, W] of the ODE coordinate y at t [B]."""
        return y * expand(self.ode_scale(t), y)


class RectifiedFlow(Schedule):
    """Straight paths between data and noise, with the resolution shift.

    Source: Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206v1, Eq. 13 (path) and 23 (shift).
    """

    def __init__(self, shift: float = 1.0) -> None:
        if not shift > 0:
            raise ValueError(f"shift must be positive, got {shift}; 1 leaves t as it is, SD3 uses 3")
        self.shift = float(shift)

    def alpha(self, t: Tensor) -> Tensor:
        # (1 - t) / (1 + (s - 1) t), not 1 - sigma: exactly 0 at t = 1 and without cancellation near it.
        x = _wide(t)
        return _narrow((1 - x) / (1 + (self.shift - 1) * x), t)

    def sigma(self, t: Tensor) -> Tensor:
        x = _wide(t)
        return _narrow(self.shift * x / (1 + (self.shift - 1) * x), t)

    def timestep(self, t: Tensor) -> Tensor:
        return NETWORK_TIME * self.sigma(t)

    def t_from_timestep(self, timestep: Tensor) -> Tensor:
        return self.t_from_tau(timestep / NETWORK_TIME)

    def ode_scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(_narrow(t, t))

    def t_from_tau(self, tau: Tensor) -> Tensor:
        x = _wide(tau)
        return _narrow(x / (self.shift - (self.shift - 1) * x), tau)

    def snap(self, t: Tensor) -> Tensor:
        return t

    def describe(self) -> dict[str, Any]:
        return {"name": "rectified_flow", "shift": self.shift, "t_min": self.t_min, "t_max": self.t_max}


class VariancePreserving(Schedule):
    """DDPM's forward chain q(x_k | x_{k-1}) = N(sqrt(1 - beta_k) x_{k-1}, beta_k), and the clock between its steps.

    At t = (k + 1) / T alpha^2 is alpha_bar[k] = prod_{i <= k} (1 - beta_i). Between two indices log(sigma / alpha) is
    interpolated linearly (as k-diffusion does). Index 0 still carries noise (sigma 0.029 with the betas of Stable
    Diffusion); below it, for t in (0, 1/T), sigma / alpha falls linearly to 0, so t = 0 is exactly the data. The
    network is never told less than k = 0.

    Source: Ho et al. 2020, arXiv:2006.11239, Eq. 2 and 4; cosine: Nichol & Dhariwal 2021, arXiv:2102.09672, Eq. 17.

    Args:
        betas: `linear` from beta_start to beta_end; `scaled_linear`, linear in sqrt(beta), as Stable Diffusion;
            `cosine`, which reads neither bound; `constant`, beta_end at every step: the time-homogeneous chain, which
            does not read beta_start.
        num_steps: T.

    Attributes:
        betas: float64 [T].
        alpha_bar: float64 [T].
    """

    def __init__(
        self,
        betas: Betas = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        num_steps: int = 1000,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        self.kind, self.beta_start, self.beta_end, self.num_steps = betas, beta_start, beta_end, num_steps
        self.betas: Tensor = lookup(BETAS, betas, "beta schedule")(beta_start, beta_end, num_steps)
        if not bool(((self.betas > 0) & (self.betas < 1)).all()):
            raise ValueError(f"betas must lie in (0, 1), got {self.betas.min():g} to {self.betas.max():g}")
        self.alpha_bar = torch.cumprod(1 - self.betas, dim=0)
        self._log_tau = 0.5 * (torch.log1p(-self.alpha_bar) - torch.log(self.alpha_bar))

    def alpha(self, t: Tensor) -> Tensor:
        return _narrow(torch.rsqrt(1 + self._tau(t) ** 2), t)

    def sigma(self, t: Tensor) -> Tensor:
        tau = self._tau(t)
        return _narrow(tau * torch.rsqrt(1 + tau**2), t)

    def tau(self, t: Tensor) -> Tensor:
        return _narrow(self._tau(t), t)

    def timestep(self, t: Tensor) -> Tensor:
        return _narrow((_wide(t) * self.num_steps - 1).clamp(min=0), t)

    def t_from_timestep(self, timestep: Tensor) -> Tensor:
        return _narrow((_wide(timestep) + 1) / self.num_steps, timestep)

    def ode_scale(self, t: Tensor) -> Tensor:
        return self.alpha(t)

    def t_from_tau(self, tau: Tensor) -> Tensor:
        x = _wide(tau)
        table = self._log_tau.to(x)
        log_tau = torch.log(x.clamp(min=torch.finfo(x.dtype).tiny)).contiguous()
        high = torch.searchsorted(table, log_tau).clamp(min=1, max=max(self.num_steps - 1, 1))
        high = high.clamp(max=self.num_steps - 1)
        low = (high - 1).clamp(min=0)
        span = torch.where(high > low, table[high] - table[low], torch.ones_like(x))
        index = low + ((log_tau - table[low]) / span).clamp(0, 1)
        below = x / table[0].exp()  # T t, where t < 1/T
        return _narrow(torch.where(below < 1, below, index + 1) / self.num_steps, tau)

    def snap(self, t: Tensor) -> Tensor:
        """Round t up to the next (k + 1) / T: uniform t becomes uniform k in 0 .. T - 1."""
        # The tolerance keeps a t that already is (k + 1) / T, up to rounding, where it is.
        tolerance = 1e-9 if t.dtype == torch.float64 else 1e-3
        steps = torch.ceil(_wide(t) * self.num_steps - tolerance).clamp(1, self.num_steps)
        return _narrow(steps / self.num_steps, t)

    def single_step(self, noisy_latents: Tensor, noise: Tensor, k: int) -> Tensor:
        """Draw from q(x_k | x_{k-1}): one step of the chain, from index k - 1 (the data for k = 0) to index k.

        Source: Ho et al. 2020, Eq. 2.

        Raises:
            ValueError: k is not in 0 .. T - 1.
        """
        if not 0 <= k < self.num_steps:
            raise ValueError(f"k must be in 0 .. {self.num_steps - 1}, got {k}")
        beta = self.betas[k].item()
        return math.sqrt(1 - beta) * noisy_latents + math.sqrt(beta) * noise

    def describe(self) -> dict[str, Any]:
        bounds = {
            "cosine": {},
            "constant": {"beta_end": self.beta_end},
        }.get(self.kind, {"beta_start": self.beta_start, "beta_end": self.beta_end})
        return {
            "name": "variance_preserving",
            "betas": self.kind,
            **bounds,
            "num_steps": self.num_steps,
            "t_min": self.t_min,
            "t_max": self.t_max,
        }

    def _tau(self, t: Tensor) -> Tensor:
        """sigma / alpha at t, float64 (float32 on devices without it)."""
        index = _wide(t) * self.num_steps - 1
        table = self._log_tau.to(index)
        low = index.floor().clamp(0, max(self.num_steps - 2, 0))
        high = (low + 1).clamp(max=self.num_steps - 1)
        weight = (index - low).clamp(0, 1)
        log_tau = torch.lerp(table[low.long()], table[high.long()], weight)
        return torch.where(index < 0, (index + 1) * table[0].exp(), log_tau.exp())


def _linear(beta_start: float, beta_end: float, num_steps: int) -> Tensor:
    return torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)


def _scaled_linear(beta_start: float, beta_end: float, num_steps: int) -> Tensor:
    return torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_steps, dtype=torch.float64) ** 2


def _cosine(beta_start: float, beta_end: float, num_steps: int) -> Tensor:
    edges = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    level = torch.cos((edges + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - level[1:] / level[:-1]).clamp(max=0.999)


def _constant(beta_start: float, beta_end: float, num_steps: int) -> Tensor:
    return torch.full((num_steps,), beta_end, dtype=torch.float64)


BETAS = {"linear": _linear, "scaled_linear": _scaled_linear, "cosine": _cosine, "constant": _constant}
SCHEDULES: dict[str, type[Schedule]] = {"rectified_flow": RectifiedFlow, "variance_preserving": VariancePreserving}


def build_schedule(config: RectifiedFlowConfig | VariancePreservingConfig) -> Schedule:
    """Build the schedule that a config names; its other fields are the class's arguments."""
    return lookup(SCHEDULES, config.name, "schedule")(**config.model_dump(exclude={"name"}))


def transition(schedule: Schedule, t_low: Tensor, t_high: Tensor) -> tuple[Tensor, Tensor]:
    """Return (a, variance) of q(x_high | x_low) = N(a x_low, variance), both [B], for t_low <= t_high.

    The Markov chain whose marginals are the schedule's; for neighbours of the variance-preserving chain
    a = sqrt(1 - beta) and variance = beta.
    """
    a = schedule.alpha(t_high) / schedule.alpha(t_low)
    return a, schedule.sigma(t_high) ** 2 - (a * schedule.sigma(t_low)) ** 2


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Shape values [B] as [B, 1, 1, 1] beside `like`, on its device, in its dtype but at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return values.to(device=like.device, dtype=dtype).reshape(-1, *([1] * (like.ndim - 1)))


def _wide(t: Tensor) -> Tensor:
    """float64, or float32 where the device has nothing wider (Apple's mps)."""
    return t.to(torch.float32 if t.device.type == "mps" else torch.float64)


def _narrow(x: Tensor, t: Tensor) -> Tensor:
    """Return to the dtype of t; bfloat16 and integers would lose the level and become float32."""
    return x.to(t.dtype if t.dtype == torch.float64 else torch.float32)
