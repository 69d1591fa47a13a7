"""Networks without memory: shapes and names to be filled from a file."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mmdit.models import build_denoiser


class Unfilled(TorchFunctionMode):
    """Leave tensors as they are where code initialises them.

    On the meta device there is nothing to fill, yet torch computes it by way of its compiler, whose import alone takes
    150 MB and seconds.
    """

    _FILLING = ("normal_", "uniform_", "trunc_normal_", "zero_", "fill_")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")  # torch.nn.init passes it by name
        if getattr(func, "__name__", "") in self._FILLING and isinstance(target, torch.Tensor):
            return target
        return func(*args, **kwargs)


def empty_denoiser(config: Any) -> nn.Module:
    """Build a backbone on the meta device; it must be filled with `load_state_dict(..., assign=True)`."""
    with torch.device("meta"), Unfilled():
        return build_denoiser(config)
