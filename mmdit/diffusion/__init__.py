"""Room: noise schedules, what a network predicts, how training draws t, the loss. Knows nothing of architecture."""

from mmdit.diffusion.loss import equidistant_levels, loss_by_level, training_loss
from mmdit.diffusion.prediction import PREDICTIONS, clamp_t, from_denoised, target, time_limits, to_denoised
from mmdit.diffusion.schedule import SCHEDULES, RectifiedFlow, Schedule, VariancePreserving, build_schedule, transition
from mmdit.diffusion.timesteps import DENSITIES, pdf, sample_t

__all__ = [
    "DENSITIES",
    "PREDICTIONS",
    "SCHEDULES",
    "RectifiedFlow",
    "Schedule",
    "VariancePreserving",
    "build_schedule",
    "clamp_t",
    "equidistant_levels",
    "from_denoised",
    "loss_by_level",
    "pdf",
    "sample_t",
    "target",
    "time_limits",
    "to_denoised",
    "training_loss",
    "transition",
]
