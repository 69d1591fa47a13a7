"""Moving averages of the parameters: lists of tensors beside them, not second modules.

Under FSDP2 the tensors are shards like the parameters; copying the module (torch's `swa_utils`) fails there, and serves
as the oracle in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmdit.config import TrainConfig
from mmdit.train.sharding import local


class EMA:
    """Average of a module's parameters.

    With a constant decay, decay_n = min(decay, (1 + n) / (10 + n)) for update n = 0, 1, ...: without this warm-up the
    average would carry the random initialisation for 1 / (1 - decay) updates. With `sigma_rel` the average is a power
    function of training time, decay_n = (1 - 1 / (n + 1)) ^ (gamma + 1), so its width stays a fixed share of the run.

    Args:
        denoiser: the module; under FSDP2 already sharded.
        decay: of a constant average.
        sigma_rel: relative width of a power-function average, instead of `decay`.

    Source: Karras et al. 2023, arXiv:2312.02696, section 3.1 (power function).
    """

    def __init__(self, denoiser: nn.Module, decay: float | None = None, sigma_rel: float | None = None) -> None:
        if (decay is None) == (sigma_rel is None):
            raise ValueError(f"give one of decay and sigma_rel, got {decay} and {sigma_rel}")
        self.decay, self.gamma, self.updates = decay, None if sigma_rel is None else power_of(sigma_rel), 0
        self.names = [name for name, _ in denoiser.named_parameters()]
        self.parameters = [parameter for _, parameter in denoiser.named_parameters()]
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    def next_decay(self) -> float:
        """Return the decay of the coming update."""
        if self.gamma is not None:
            return (1 - 1 / (self.updates + 1)) ** (self.gamma + 1)
        assert self.decay is not None
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters; one fused pass over all of them."""
        here, there = [local(a) for a in self.averages], [local(p.detach()) for p in self.parameters]
        torch._foreach_lerp_(here, there, 1 - self.next_decay())
        self.updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the module run on the averages while the context lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            if not isinstance(parameter, DTensor):
                parameter.data, average.data = average.data, parameter.data
                continue
            # FSDP2 keeps its own hold of a shard's memory: exchange the numbers, not the tensors
            mine, theirs = local(parameter.detach()), local(average)
            kept = mine.clone()
            mine.copy_(theirs)
            theirs.copy_(kept)

    def state_dict(self, denoiser: nn.Module) -> dict[str, Tensor]:
        """Return the module's state dict with the averages in place of the parameters: it loads like any other."""
        return {**denoiser.state_dict(), **dict(zip(self.names, self.averages, strict=True))}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Put saved averages back, bit for bit, each in its parameter's memory layout."""
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(tensors[name])
        self.updates = updates


class EMAs:
    """The averages of a run by the stem of their file: `ema`, then `ema-<name>` for each of `train.more_emas`."""

    def __init__(self, denoiser: nn.Module, config: TrainConfig) -> None:
        self.main = EMA(denoiser, config.ema_decay)
        self.all = {"ema": self.main} | {
            ema_stem(name): EMA(denoiser, other.decay, other.sigma_rel) for name, other in config.more_emas.items()
        }

    def update(self) -> None:
        """Move every average."""
        for ema in self.all.values():
            ema.update()


def ema_stem(name: str) -> str:
    """Return the stem of the file that holds the average `name`."""
    return f"ema-{name}"


def power_of(sigma_rel: float) -> float:
    """Return gamma of the power-function average whose relative width is `sigma_rel`.

    sigma_rel² = (gamma + 1) / ((gamma + 2)² (gamma + 3)): the one real root above zero of a cubic.

    Raises:
        ValueError: a width that no gamma >= 0 has (the widest is 12^-1/2, about 0.289).
    """
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel must lie between 0 and {12**-0.5:.3f}, got {sigma_rel}")
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots[np.isreal(roots)].real.max())
