"""What a network predicts, and the way from each prediction to `denoised`, the estimate of the clean latents.

    name        target                               denoised from the output
    velocity    noise - latents                      noisy_latents - sigma * output         rectified flow only
    epsilon     noise                                (noisy_latents - sigma * output) / alpha
    v           alpha * noise - sigma * latents      (alpha * noisy_latents - sigma * output) / (alpha^2 + sigma^2)
    sample      latents                              output

`velocity` is d noisy_latents / d sigma, whatever the shift: what the SD3 releases predict. `v` is Salimans & Ho's
(arXiv:2202.00512, Appendix D); the division by alpha^2 + sigma^2, which is 1 for the variance-preserving schedule, is
what makes it valid for rectified flow too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmdit.diffusion.schedule import RectifiedFlow, Schedule, expand
from mmdit.registry import lookup


class PredictionRule(NamedTuple):
    """One row of the table above; every function takes and gives [B, C, H, W], alpha and sigma [B, 1, 1, 1].

    Attributes:
        to_denoised: (output, noisy_latents, alpha, sigma) -> denoised.
        from_denoised: (denoised, noisy_latents, alpha, sigma) -> the output that would have meant it.
        target: (latents, noise, alpha, sigma) -> what the network is trained towards.
    """

    to_denoised: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    from_denoised: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


PREDICTIONS: dict[str, PredictionRule] = {
    "velocity": PredictionRule(
        to_denoised=lambda output, noisy, alpha, sigma: noisy - sigma * output,
        from_denoised=lambda denoised, noisy, alpha, sigma: (noisy - denoised) / sigma,
        target=lambda latents, noise, alpha, sigma: noise - latents,
    ),
    "epsilon": PredictionRule(
        to_denoised=lambda output, noisy, alpha, sigma: (noisy - sigma * output) / alpha,
        from_denoised=lambda denoised, noisy, alpha, sigma: (noisy - alpha * denoised) / sigma,
        target=lambda latents, noise, alpha, sigma: noise,
    ),
    "v": PredictionRule(
        to_denoised=lambda output, noisy, alpha, sigma: (alpha * noisy - sigma * output) / (alpha**2 + sigma**2),
        from_denoised=lambda denoised, noisy, alpha, sigma: (alpha * noisy - (alpha**2 + sigma**2) * denoised) / sigma,
        target=lambda latents, noise, alpha, sigma: alpha * noise - sigma * latents,
    ),
    "sample": PredictionRule(
        to_denoised=lambda output, noisy, alpha, sigma: output,
        from_denoised=lambda denoised, noisy, alpha, sigma: denoised,
        target=lambda latents, noise, alpha, sigma: latents,
    ),
}


def to_denoised(prediction: str, output: Tensor, noisy_latents: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Turn a network's output into the estimate of the clean latents.

    Args:
        prediction: a name of `PREDICTIONS`.
        output: what the network gave for noisy_latents at t, [B, C, H, W].
        noisy_latents: [B, C, H, W].
        t: [B]; keep it inside `time_limits`.

    Returns:
        denoised [B, C, H, W], at least float32.

    Raises:
        ValueError: unknown prediction, or one that the schedule does not define.
    """
    noisy_latents = _float(noisy_latents)
    alpha, sigma = expand(schedule.alpha(t), noisy_latents), expand(schedule.sigma(t), noisy_latents)
    return _rule(prediction, schedule).to_denoised(output.to(noisy_latents.dtype), noisy_latents, alpha, sigma)


def from_denoised(prediction: str, denoised: Tensor, noisy_latents: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Turn an estimate of the clean latents into the prediction that means it: the inverse of `to_denoised`.

    Undefined (division by zero) at t = 0, except for `sample`. Shapes and errors as `to_denoised`.
    """
    noisy_latents = _float(noisy_latents)
    alpha, sigma = expand(schedule.alpha(t), noisy_latents), expand(schedule.sigma(t), noisy_latents)
    return _rule(prediction, schedule).from_denoised(denoised.to(noisy_latents.dtype), noisy_latents, alpha, sigma)


def target(prediction: str, latents: Tensor, noise: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """Return what the network should give for these latents and this noise, [B, C, H, W], at least float32.

    Raises:
        ValueError: unknown prediction, or one that the schedule does not define.
    """
    latents = _float(latents)
    alpha, sigma = expand(schedule.alpha(t), latents), expand(schedule.sigma(t), latents)
    return _rule(prediction, schedule).target(latents, noise.to(latents.dtype), alpha, sigma)


def time_limits(prediction: str, schedule: Schedule) -> tuple[float, float]:
    """Return (lowest, highest) t at which this prediction may be asked for; part of a result's stamp.

    `epsilon` says nothing about the image where alpha is 0 (rectified flow at t = 1): highest 0.999.
    `sample` says nothing about the noise where sigma is 0 (t = 0): lowest 0.001. Otherwise all of [0, 1].
    """
    _rule(prediction, schedule)
    low = schedule.t_min if prediction == "sample" else 0.0
    no_image_left = schedule.alpha(torch.ones(1, dtype=torch.float64)).item() == 0.0
    return low, schedule.t_max if prediction == "epsilon" and no_image_left else 1.0


def clamp_t(prediction: str, t: Tensor, schedule: Schedule) -> Tensor:
    """Keep t [B] inside `time_limits`; training and sampling both pass through here."""
    low, high = time_limits(prediction, schedule)
    return t.clamp(low, high)


def _rule(prediction: str, schedule: Schedule) -> PredictionRule:
    rule = lookup(PREDICTIONS, prediction, "prediction")
    if prediction == "velocity" and not isinstance(schedule, RectifiedFlow):
        raise ValueError(
            "prediction 'velocity' belongs to rectified_flow; with variance_preserving use 'epsilon', 'v' or 'sample'"
        )
    return rule


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
