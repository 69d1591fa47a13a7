"""The loss: plain mean squared error against the named target, per sample, in float32. Used by training and by eval.

No weight hides here. The public SD3 trainers multiply the velocity error by sigma^2 by default (they compare denoised
latents); the paper does not, and neither do we: what the density of t prefers is all the weighting there is
(arXiv:2403.03206v1, Eq. 17 and section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmdit.denoiser import Conditioning, Denoiser
from mmdit.diffusion.prediction import clamp_t, from_denoised, target, to_denoised
from mmdit.diffusion.schedule import Schedule


def training_loss(
    denoiser: Denoiser,
    latents: Tensor,
    conditioning: Conditioning,
    noise: Tensor,
    t: Tensor,
    schedule: Schedule,
    prediction: str,
    common: str | None = None,
) -> Tensor:
    """Return the mean squared error of each sample.

    Args:
        denoiser: obeys the door.
        latents: clean, [B, C, H, W].
        conditioning: of the same B.
        noise: standard normal, [B, C, H, W].
        t: [B]; clamped to `prediction.time_limits`.
        prediction: what the denoiser gives, a name of `PREDICTIONS`.
        common: measure the error in this prediction instead, so that denoisers trained to different targets compare:
            the output is turned into `denoised` and that into `common`. None: the denoiser's own target.

    Returns:
        loss [B], float32 (float64 for float64 latents); the mean over C, H and W.

    Raises:
        ValueError: unknown prediction, or one that the schedule does not define.
    """
    t = clamp_t(prediction, t.to(latents.device), schedule)
    if common is not None:
        t = clamp_t(common, t, schedule).clamp(min=schedule.t_min)  # error in noise is undefined where sigma is 0
    noisy_latents = schedule.add_noise(latents, noise, t)
    output = denoiser(noisy_latents, schedule.timestep(t).float(), conditioning).to(noisy_latents.dtype)
    if common is not None and common != prediction:
        denoised = to_denoised(prediction, output, noisy_latents, t, schedule)
        output = from_denoised(common, denoised, noisy_latents, t, schedule)
    error = output - target(common or prediction, latents, noise, t, schedule)
    return error.square().flatten(1).mean(1)  # [B]


def equidistant_levels(count: int) -> Tensor:
    """Return t = 1/count, 2/count, ..., 1, float64 [count]; the last one is left out of the mean validation loss.

    Source: arXiv:2403.03206v1, 5.3 (validation loss per level, the level t = 1 excluded from the average).
    """
    if count < 1:
        raise ValueError(f"need at least one level, got {count}")
    return torch.arange(1, count + 1, dtype=torch.float64) / count


def loss_by_level(
    denoiser: Denoiser,
    latents: Tensor,
    conditioning: Conditioning,
    noise: Tensor,
    levels: int | Sequence[float] | Tensor,
    schedule: Schedule,
    prediction: str,
    common: str | None = None,
) -> Tensor:
    """Return the loss of each sample at each of several fixed t, [levels, B].

    The same latents and noise serve at every level, so curves of two denoisers differ by the denoisers alone. Runs
    without gradients, one level a forward.

    Args:
        levels: how many equidistant t, or the t themselves.
        common: as in `training_loss`; name it whenever rows of different objectives are compared.
    """
    times = equidistant_levels(levels) if isinstance(levels, int) else torch.as_tensor(levels, dtype=torch.float64)
    with torch.no_grad():
        rows = [
            training_loss(
                denoiser,
                latents,
                conditioning,
                noise,
                torch.full((latents.shape[0],), level, dtype=torch.float64),
                schedule,
                prediction,
                common,
            )
            for level in times.tolist()
        ]
    return torch.stack(rows)
