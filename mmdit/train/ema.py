"""Exponential moving average of the parameters: a list of tensors beside them, not a second module.

Under FSDP2 the tensors are shards like the parameters; copying the module (torch's `swa_utils`) fails there, and serves
as the oracle in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Average of a module's parameters.

    decay_n = min(decay, (1 + n) / (10 + n)) for update n = 0, 1, ...: without this warm-up the average would carry the
    random initialisation for 1 / (1 - decay) updates.
    """

    def __init__(self, denoiser: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.names = [name for name, _ in denoiser.named_parameters()]
        self.parameters = [parameter for _, parameter in denoiser.named_parameters()]
        self.averages = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters; one fused pass over all of them."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)
        self.updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the module run on the averages while the context lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            parameter.data, average.data = average.data, parameter.data

    def state_dict(self, denoiser: nn.Module) -> dict[str, Tensor]:
        """Return the module's state dict with the averages in place of the parameters: it loads like any other."""
        return {**denoiser.state_dict(), **dict(zip(self.names, self.averages, strict=True))}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Put saved averages back, bit for bit, each in its parameter's memory layout."""
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(tensors[name])
        self.updates = updates
