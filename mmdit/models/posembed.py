"""Where an image token lies: a 2-D sin-cos table, of which each image takes the centre.

The table is stored with the weights and never recomputed for released ones, since releases differ in how they made
it; `position_table` is what new models start with.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPAN = 16  # units of position that `base_size` patches span: 256 pixels in patches of 16, the size SD3 begins with


def position_table(width: int, max_size: int, base_size: int) -> Tensor:
    """Make the table of a square of `max_size` patches a side, float32 [1, max_size^2, D], row by row.

    Patch p of a side lies at (p - (max_size - base_size) / 2) * 16 / base_size: the base square is centred, and
    larger sizes extend the grid on both sides instead of stretching it.

    Source: Esser et al. 2024, arXiv:2403.03206v1, 5.3.2. "w goes first": the first D/2 numbers encode the column.
    """
    if torch.get_default_device().type == "meta":  # a network without memory: arithmetic there would import 150 MB
        return torch.empty(1, max_size * max_size, width)
    positions = (torch.arange(max_size, dtype=torch.float64) - (max_size - base_size) / 2) * SPAN / base_size
    side = _sines(positions, width // 2).float()  # [M, D/2]
    column = side[None, :, :].expand(max_size, -1, -1)
    row = side[:, None, :].expand(-1, max_size, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1)[None]


def _sines(positions: Tensor, size: int) -> Tensor:
    """Return sines, then cosines, of positions at size/2 wavelengths: [M] -> float64 [M, size]."""
    exponents = torch.arange(size // 2, dtype=torch.float64, device=positions.device) / (size / 2)
    angles = positions[:, None] / 10_000**exponents
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def crop_center(table: Tensor, rows: int, columns: int) -> Tensor:
    """Cut rows x columns patches out of the middle of a table: [1, M^2, D] -> [1, rows * columns, D].

    Raises:
        ValueError: the image is larger than the table.
    """
    max_size = round(table.shape[1] ** 0.5)
    if rows > max_size or columns > max_size:
        raise ValueError(
            f"an image of {rows}x{columns} patches exceeds the position table of {max_size}x{max_size}; "
            f"use a smaller image or a model with a larger model.pos_embed_max_size"
        )
    top, left = (max_size - rows) // 2, (max_size - columns) // 2
    square = table.unflatten(1, (max_size, max_size))
    return square[:, top : top + rows, left : left + columns].flatten(1, 2)
