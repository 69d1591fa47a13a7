"""How many attention heads: what the shapes of a file do not tell."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mmdit.weights.header import WeightsError

logger = logging.getLogger(__name__)

_RELEASED_HEAD = 64  # numbers a head in SD3, SD3.5, SD2 and SDXL; SD1.x has 8 heads instead
# (model_channels, context_dim) of U-Net releases -> which
_UNETS: dict[tuple[int, int], dict[str, Any]] = {
    (320, 768): {"num_heads": 8},  # SD1.x
    (320, 1024): {"head_dim": _RELEASED_HEAD},  # SD2.x
    (320, 2048): {"head_dim": _RELEASED_HEAD},  # SDXL base
    (384, 1280): {"head_dim": _RELEASED_HEAD},  # SDXL refiner
}


def resolve_heads(fields: Mapping[str, Any], overrides: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Lay `overrides` over the fields of a config and settle its heads.

    The number of heads is what `overrides` say, else what the fields say already (a config, or queries that are
    normalised), else what the known release of this size has, else the rule of its family, with a warning.

    Raises:
        WeightsError: nothing tells the heads.
    """
    merged = {**fields, **overrides}
    if merged.get("name") == "unet":
        if "head_dim" in overrides and "num_heads" not in overrides:
            merged["num_heads"] = None
        if "num_heads" not in merged and "head_dim" not in merged:
            merged |= _unet_heads(merged, source)
        return merged
    head = merged.pop("head_dim", None)
    if head is not None and "num_heads" not in overrides:
        if not isinstance(head, int) or head < 1 or merged["width"] % head:
            raise WeightsError(f"{source}: head_dim={head!r} does not divide the width {merged['width']}")
        merged["num_heads"] = merged["width"] // head
    if "num_heads" not in merged:
        if merged["width"] % _RELEASED_HEAD:
            raise WeightsError(
                f"{source}: nothing in the file tells how many heads a width of {merged['width']} is split into "
                f"(releases have {_RELEASED_HEAD} numbers a head); pass num_heads= or head_dim="
            )
        merged["num_heads"] = merged["width"] // _RELEASED_HEAD
    return merged


def _unet_heads(fields: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the heads of a U-Net by its release, else by its family."""
    base, context = fields["model_channels"], fields.get("context_dim", 768)
    known = _UNETS.get((base, context))
    if known is not None:
        return known
    widths = [base * mult for mult, depth in zip(fields["channel_mult"], fields["transformer_depth"]) if depth]
    # SD1.x projects by convolutions and has 8 heads; SD2 and SDXL project by linear maps and have heads of 64
    rule = {"head_dim": _RELEASED_HEAD} if fields.get("linear_projection") else {"num_heads": 8}
    divisor = next(iter(rule.values()))
    if any(width % divisor for width in widths):
        raise WeightsError(
            f"{source}: nothing in the file tells how many heads this U-Net has (model_channels {base}, context "
            f"{context}: no release); pass num_heads= or head_dim="
        )
    logger.warning(
        "%s is a U-Net of no released size; %s is taken, as in the releases of its kind: pass num_heads= or head_dim= "
        "if it has others",
        source,
        " ".join(f"{key}={value}" for key, value in rule.items()),
    )
    return rule
