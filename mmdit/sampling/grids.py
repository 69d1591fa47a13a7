"""Time grids: descending t, ending in 0. `GRIDS[name](schedule, num_steps)` gives num_steps + 1 times, float64.

A grid for image-to-image is one of these with its beginning cut off.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmdit.diffusion.schedule import Schedule, VariancePreserving


def linear(schedule: Schedule, num_steps: int) -> Tensor:
    """Equal steps in t from 1 to 0; a shifted schedule turns them into the shifted levels, once.

    Raises:
        ValueError: num_steps < 1, or more steps than the variance-preserving chain has.
    """
    _check(schedule, num_steps)
    return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)


def release(schedule: Schedule, num_steps: int) -> Tensor:
    """The released models' own inference grid.

    Rectified flow: SD3's reference code and diffusers space num_steps points evenly between the *shifted* levels of
    t = 1 and t = 0.001, and shift them once more; so evenly spaced t between 1 and s(0.001), then 0. With shift 3 and
    28 steps sigma(t) is 1, .987381, .974108, ..., .110906, .008929, 0.
    Variance preserving: `leading`, the grid of SD1.5 and SDXL.
    """
    if isinstance(schedule, VariancePreserving):
        return leading(schedule, num_steps)
    _check(schedule, num_steps)
    last = schedule.sigma(torch.tensor([0.001], dtype=torch.float64)).item()
    return _to_zero(torch.linspace(1, last, num_steps, dtype=torch.float64))


def leading(schedule: Schedule, num_steps: int) -> Tensor:
    """SD1.5's and SDXL's grid: every (T // num_steps)-th index, plus 1 (50 steps: k = 981, 961, ..., 1), then the data.

    The first index lies below T - 1, where a little image is left (k = 981: alpha 0.075 beside sigma 0.997), although
    sampling starts from pure noise: the releases' numerics. Between T/2 and T steps the stride is 1 and the grid begins
    lower still, at k = num_steps. With T steps the offset would leave the table, so all T indices are taken without it.

    Raises:
        ValueError: the schedule is not variance preserving, num_steps < 1 or > T.
    """
    if not isinstance(schedule, VariancePreserving):
        raise ValueError("grid 'leading' is for variance_preserving; with rectified_flow use 'linear' or 'release'")
    _check(schedule, num_steps)
    total = schedule.num_steps
    offset = 1 if num_steps < total else 0
    index = torch.arange(num_steps - 1, -1, -1) * (total // num_steps) + offset
    return _to_zero(schedule.t_from_timestep(index.double()))


def karras(schedule: Schedule, num_steps: int, rho: float = 7.0) -> Tensor:
    """Equal steps in tau^(1/rho), tau the ODE's clock (sigma, or sigma / alpha), from t = 1 to t_min, then 0.

    The lowest level is that of t = 0.001 (rectified flow) or of k = 0 (variance preserving).
    Source: Karras et al. 2022, arXiv:2206.00364, Eq. 5.

    Raises:
        ValueError: num_steps < 1, or more steps than the variance-preserving chain has.
    """
    _check(schedule, num_steps)
    lowest = 1 / schedule.num_steps if isinstance(schedule, VariancePreserving) else schedule.t_min
    highest_tau, lowest_tau = schedule.tau(torch.tensor([1.0, lowest], dtype=torch.float64)).tolist()
    ramp = torch.linspace(highest_tau ** (1 / rho), lowest_tau ** (1 / rho), num_steps, dtype=torch.float64)
    # clamp: the rho-th power of the rho-th root may overshoot the end of the table by one rounding
    t = schedule.t_from_tau((ramp**rho).clamp(lowest_tau, highest_tau))
    return _to_zero(t.clamp(max=1))


GRIDS: dict[str, Callable[[Schedule, int], Tensor]] = {
    "linear": linear,
    "release": release,
    "leading": leading,
    "karras": karras,
}


def _check(schedule: Schedule, num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if isinstance(schedule, VariancePreserving) and num_steps > schedule.num_steps:
        raise ValueError(f"num_steps is {num_steps}, the chain has {schedule.num_steps}; use at most as many")


def _to_zero(t: Tensor) -> Tensor:
    return torch.cat([t, t.new_zeros(1)])
