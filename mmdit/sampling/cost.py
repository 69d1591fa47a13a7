"""What drawing one image takes: forwards of the network and their FLOP, counted by sampling with a stand-in for it.

Kinds of guidance differ in cost: CFG runs two rows a step, attention-space guidance one row with two texts, skip-layer
guidance one more row without some blocks, and all of them may act in a part of the steps only. To compare them at
equal cost, `solve_steps` gives each as many steps as the budget buys.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmdit.config import SamplingConfig
from mmdit.denoiser import Conditioning, Denoiser, skip_layers, skipped_layers
from mmdit.diffusion.schedule import Schedule
from mmdit.sampling import GRIDS, SAMPLERS, guidance_options, guided_denoise, needs_null, sampler_options

MOST_STEPS = 1000


class SamplingCost(NamedTuple):
    """Of one image: `evaluations`, rows that go through the network; `flops`, 2 a multiply-add."""

    evaluations: int
    flops: int


class _Call(NamedTuple):
    """What the cost of one row depends on: text tokens, whether a negative text runs beside, blocks left out."""

    tokens: int
    guidance: Any
    skipped: frozenset[int]


class _StandIn:
    """Obeys the door, predicts zeros and counts the rows of each kind of call."""

    def __init__(self, num_blocks: int | None) -> None:
        self.num_blocks = num_blocks
        self.rows: Counter[_Call] = Counter()
        self.examples: dict[_Call, Conditioning] = {}

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        call = _Call(conditioning.context.shape[1], conditioning.guidance, skipped_layers(self))
        self.rows[call] += latents.shape[0]
        self.examples.setdefault(call, conditioning.index([0]))
        return torch.zeros_like(latents)


class SamplingMeter:
    """Counts what sampling one image with a denoiser takes under any `SamplingConfig`.

    Args:
        denoiser: on the `meta` device, where a forward costs nothing.
        conditioning, null_conditioning: one row each, as they would be sampled with.
        latent_shape: C, H, W; C without what `conditioning.spatial` adds.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        prediction: str,
        conditioning: Conditioning,
        null_conditioning: Conditioning,
        latent_shape: tuple[int, int, int],
    ) -> None:
        self.denoiser, self.schedule, self.prediction = denoiser, schedule, prediction
        self.conditioning, self.null_conditioning = conditioning.to("cpu"), null_conditioning.to("cpu")
        self.latent_shape = latent_shape
        self._flops: dict[_Call, int] = {}

    def cost(self, config: SamplingConfig) -> SamplingCost:
        """Return what one image takes.

        Raises:
            ValueError: sampler, grid or guidance do not fit; see `guided_denoise`.
        """
        stand_in = _StandIn(getattr(self.denoiser, "num_blocks", None))
        null = self.null_conditioning if needs_null(config) else None
        options = guidance_options(config)
        denoise = guided_denoise(stand_in, self.schedule, self.prediction, self.conditioning, null, **options)
        nothing = torch.zeros(1, 1, 1, 1)
        grid = GRIDS[config.grid](self.schedule, config.num_steps)
        SAMPLERS[config.sampler](
            denoise, nothing, self.schedule, grid, step_noise=lambda i: nothing, **sampler_options(config)
        )
        flops = sum(rows * self._of_one(call, stand_in.examples[call]) for call, rows in stand_in.rows.items())
        return SamplingCost(stand_in.rows.total(), flops)

    def solve_steps(self, config: SamplingConfig, flops: float) -> SamplingConfig:
        """Return the config with the number of steps whose cost comes nearest to `flops`.

        Raises:
            ValueError: one step alone costs more than twice the budget, or 1,000 steps less than half of it.
        """
        low, high = 1, MOST_STEPS  # the first number of steps that reaches the budget lies in here
        while low < high:
            middle = (low + high) // 2
            if self._with(config, middle)[1] < flops:
                low = middle + 1
            else:
                high = middle
        near = [self._with(config, steps) for steps in {max(1, low - 1), low}]
        solved, value = min(near, key=lambda pair: abs(pair[1] - flops))
        if not 0.5 <= value / flops <= 2:
            raise ValueError(
                f"no number of steps from 1 to {MOST_STEPS} costs about {flops / 1e9:.3f} GFLOP an image; the nearest, "
                f"{solved.num_steps}, costs {value / 1e9:.3f}"
            )
        return solved

    def _with(self, config: SamplingConfig, steps: int) -> tuple[SamplingConfig, int]:
        changed = config.model_copy(update={"num_steps": steps})
        return changed, self.cost(changed).flops

    def _of_one(self, call: _Call, example: Conditioning) -> int:
        """FLOP of one row."""
        if call not in self._flops:
            latents, timestep = (torch.empty(shape, device="meta") for shape in ((1, *self.latent_shape), (1,)))
            with FlopCounterMode(display=False) as counter, torch.no_grad(), skip_layers(self.denoiser, call.skipped):
                self.denoiser(latents, timestep, example.to("meta"))
            self._flops[call] = int(counter.get_total_flops())
        return self._flops[call]
