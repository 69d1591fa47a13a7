"""What one forward of a backbone costs, in closed form: a second opinion on torch's counter, at no cost itself.

Counted are matrix products, convolutions and the two products of attention, a multiply-add being two FLOP; norms,
activations and softmax are not. Every function below is one module of `models/`, named as there, for one image.

    forward_flops(config, tokens=154, latent_size=128)     # exactly what FlopCounterMode counts (tested)

Letters: N image tokens or pixels of a stage, L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmdit.config import CrossDiTConfig, MMDiTConfig, UNetConfig
from mmdit.registry import lookup


def forward_flops(
    config: MMDiTConfig | CrossDiTConfig | UNetConfig, *, tokens: int, latent_size: int | tuple[int, int]
) -> int:
    """Return the FLOP of one forward of one image.

    Args:
        config: of the backbone.
        tokens: L, text tokens; masked ones are computed too, so trimmed and untrimmed texts differ.
        latent_size: H and W in latent pixels, or one number for both.
    """
    height, width = (latent_size, latent_size) if isinstance(latent_size, int) else latent_size
    return lookup(FORMULAS, config.name, "backbone")(config, tokens, height, width)


def linear(rows: int, inputs: int, outputs: int) -> int:
    """One linear map of `rows` vectors."""
    return 2 * rows * inputs * outputs


def attention(queries: int, keys: int, width: int) -> int:
    """q k^T and weights times v, over all heads; without the projections."""
    return 4 * queries * keys * width


def convolution(pixels: int, inputs: int, outputs: int, kernel: int = 3) -> int:
    """One convolution that gives `pixels`."""
    return linear(pixels, kernel * kernel * inputs, outputs)


# --- transformers -------------------------------------------------------------------------------------------------


def _mmdit(config: MMDiTConfig, L: int, height: int, width: int) -> int:
    N, D = height * width // config.patch_size**2, config.width
    total = _ends(config, N) + linear(L, config.context_dim, D)
    for i in range(config.depth):
        last, dual = i == config.depth - 1, i in config.dual_attention_layers
        total += _stream(config, N, writes=True) + _stream(config, L, writes=not last)
        total += attention(N if last else L + N, L + N, D)
        if dual:  # three more modulations, a second set of projections, attention among image tokens
            total += linear(1, D, 3 * D) + linear(N, D, 4 * D) + attention(N, N, D)
    return total


def _stream(config: MMDiTConfig, rows: int, writes: bool) -> int:
    """Modulation, projections and MLP of one stream; the text of the last block gives keys and values only."""
    D = config.width
    if not writes:
        return linear(1, D, 2 * D) + linear(rows, D, 2 * D)
    return linear(1, D, 6 * D) + linear(rows, D, 4 * D) + _mlp(config, rows)


def _crossdit(config: CrossDiTConfig, L: int, height: int, width: int) -> int:
    N, D = height * width // config.patch_size**2, config.width
    block = linear(1, D, 9 * D) + _mlp(config, N)
    block += linear(N, D, 4 * D) + attention(N, N, D)  # self-attention
    block += linear(N, D, 2 * D) + linear(L, D, 2 * D) + attention(N, L, D)  # q and output; k and v; cross-attention
    return _ends(config, N) + linear(L, config.context_dim, D) + config.depth * block


def _mlp(config: MMDiTConfig | CrossDiTConfig, rows: int) -> int:
    return 2 * linear(rows, config.width, int(config.width * config.mlp_ratio))


def _ends(config: MMDiTConfig | CrossDiTConfig, N: int) -> int:
    """Patches in, time and pooled text, patches out."""
    D, patch = config.width, config.patch_size**2
    total = linear(N, config.in_channels * patch, D) + linear(1, 256, D) + linear(1, D, D)
    if config.pooled_dim is not None:
        total += linear(1, config.pooled_dim, D) + linear(1, D, D)
    return total + linear(1, D, 2 * D) + linear(N, D, config.out_channels * patch)


# --- U-Net ----------------------------------------------------------------------------------------------------------


def _unet(config: UNetConfig, L: int, height: int, width: int) -> int:
    base, pixels = config.model_channels, height * width
    widths = [base * mult for mult in config.channel_mult]
    sizes = [pixels // 4**stage for stage in range(len(widths))]
    total = linear(1, base, 4 * base) + linear(1, 4 * base, 4 * base)
    if config.pooled_dim is not None:
        total += linear(1, config.pooled_dim, 4 * base) + linear(1, 4 * base, 4 * base)
    total += convolution(pixels, config.in_channels, base)

    channels, skips = base, [base]
    for stage, D in enumerate(widths):
        for _ in range(config.num_res_blocks):
            total += _res_block(config, sizes[stage], channels, D)
            total += _transformer(config, sizes[stage], L, D, config.transformer_depth[stage])
            channels = D
            skips.append(channels)
        if stage + 1 < len(widths):
            total += convolution(sizes[stage + 1], channels, channels)  # down
            skips.append(channels)

    total += 2 * _res_block(config, sizes[-1], channels, channels)
    total += _transformer(config, sizes[-1], L, channels, config.middle_transformer_depth)

    for stage, D in reversed(list(enumerate(widths))):
        for _ in range(config.num_res_blocks + 1):
            total += _res_block(config, sizes[stage], channels + skips.pop(), D)
            total += _transformer(config, sizes[stage], L, D, config.transformer_depth[stage])
            channels = D
        if stage:
            total += convolution(sizes[stage - 1], D, D)  # up
    return total + convolution(pixels, channels, config.out_channels)


def _res_block(config: UNetConfig, pixels: int, channels: int, D: int) -> int:
    """Two convolutions, the time embedding, the shortcut where the width changes."""
    total = convolution(pixels, channels, D) + convolution(pixels, D, D) + linear(1, 4 * config.model_channels, D)
    return total + (linear(pixels, channels, D) if channels != D else 0)


def _transformer(config: UNetConfig, N: int, L: int, D: int, depth: int) -> int:
    """Projections in and out, and `depth` blocks of self-attention, cross-attention and GEGLU."""
    if depth == 0:
        return 0
    hidden = round(D * config.ff_mult)
    block = linear(N, D, 4 * D) + attention(N, N, D)
    block += linear(N, D, 2 * D) + linear(L, config.context_dim, 2 * D) + attention(N, L, D)
    block += linear(N, D, 2 * hidden) + linear(N, hidden, D)
    return linear(N, D, 2 * D) + depth * block


FORMULAS: dict[str, Callable[[Any, int, int, int], int]] = {"mmdit": _mmdit, "crossdit": _crossdit, "unet": _unet}
