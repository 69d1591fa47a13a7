"""What each family of releases takes from its text encoders, as one literal table.

    sd3     [CLIP-L ; CLIP-G] by feature, zero-padded to T5's width, T5 by token; pooled [CLIP-L ; CLIP-G projected]
    sd1.5   CLIP-L's last states behind the final norm; nothing pooled
    sdxl    [CLIP-L ; CLIP-G] by feature, not padded; pooled [CLIP-G projected ; six sizes x 256]

Sources: Esser et al. 2024, arXiv:2403.03206v1, B.3; Rombach et al. 2022, arXiv:2112.10752; Podell et al. 2023,
arXiv:2307.01952, section 2; and what the releases' own code does.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

CLIPS = ("clip_l", "clip_g")  # in the order of their features
SIZE_WIDTH = 256  # numbers for each of SDXL's six sizes
NUM_SIZES = 6  # original height and width, crop top and left, target height and width


class TextRules(NamedTuple):
    """How one family makes a Conditioning of its encoders' states.

    Attributes:
        encoders: which it has.
        states: of CLIP: `penultimate`, without the final norm, or `last`, behind it.
        pooled: the encoders whose vectors are joined to `pooled`, in order.
        sizes: whether six embedded sizes stand behind them.
        null: what the release's guidance takes for "no text".
    """

    encoders: tuple[str, ...]
    states: Literal["penultimate", "last"]
    pooled: tuple[str, ...]
    sizes: bool
    null: Literal["zeros", "empty_caption"]


FAMILIES = {
    "sd3": TextRules(("clip_l", "clip_g", "t5"), "penultimate", CLIPS, sizes=False, null="empty_caption"),
    "sd1.5": TextRules(("clip_l",), "last", (), sizes=False, null="empty_caption"),
    "sdxl": TextRules(CLIPS, "penultimate", ("clip_g",), sizes=True, null="zeros"),
}

# (width of states, width of pooled vector) in the releases: what an encoder that is left out contributes as zeros
RELEASED_WIDTHS = {"clip_l": (768, 768), "clip_g": (1280, 1280), "t5": (4096, 0)}


def embed_sizes(sizes: Tensor, batch: int) -> Tensor:
    """Embed SDXL's six sizes as it embeds network time: float32 [B, 1536], cosines before sines in each 256.

    Args:
        sizes: [B, 6], or [1, 6] for all rows, in pixels: original height, width, crop top, left, target height, width.

    Source: Podell et al. 2023, arXiv:2307.01952, section 2.2.

    Raises:
        ValueError: another shape.
    """
    sizes = torch.as_tensor(sizes)
    if sizes.ndim != 2 or sizes.shape[1] != NUM_SIZES or sizes.shape[0] not in (1, batch):
        raise ValueError(
            f"sizes must be [B, 6] = [{batch}, 6] (or [1, 6] for all): original height and width, crop top and left, "
            f"target height and width, in pixels; got {list(sizes.shape)}"
        )
    half = SIZE_WIDTH // 2
    exponents = torch.arange(half, dtype=torch.float32, device=sizes.device) / half
    angles = sizes.float()[:, :, None] * torch.exp(-math.log(10_000.0) * exponents)  # [B, 6, 128]
    return torch.cat([angles.cos(), angles.sin()], dim=2).flatten(1).expand(batch, -1)
