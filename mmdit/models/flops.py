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
from mmdit.denoiser import Streams
from mmdit.models.text import even_streams
from mmdit.models.unet_text import TextRoute, TextStop
from mmdit.registry import lookup

Parts = list[tuple[int, int]]  # tokens and width of each encoder stream


def forward_flops(
    config: MMDiTConfig | CrossDiTConfig | UNetConfig, *, tokens: int | Streams, latent_size: int | tuple[int, int]
) -> int:
    """Return the FLOP of one forward of one image.

    Args:
        config: of the backbone.
        tokens: L, text tokens, or the streams they lie in: where each encoder has weights of its own it matters how
            many are whose, and a number is taken as streams of about equal length. Masked ones are computed too, so
            trimmed and untrimmed texts differ.
        latent_size: H and W in latent pixels, or one number for both.
    """
    height, width = (latent_size, latent_size) if isinstance(latent_size, int) else latent_size
    formula = lookup(FORMULAS, config.name, "backbone")
    return formula(config, _parts(config, tokens), height, width)


def _parts(config: MMDiTConfig | CrossDiTConfig | UNetConfig, tokens: int | Streams) -> Parts:
    """Tokens and width of each stream that the weights tell apart; one part where they do not."""
    streams = even_streams(config, tokens) if isinstance(tokens, int) else tokens
    if streams is None:
        assert isinstance(tokens, int)
        return [(tokens, config.context_dim)]
    widths = dict(config.text_streams or ())
    return [(stop - start, widths.get(name, config.context_dim)) for name, start, stop, _ in streams]


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


def _mmdit(config: MMDiTConfig, text: Parts, height: int, width: int) -> int:
    N, D = height * width // config.patch_size**2, config.width
    L = 0 if config.injection == "pooled" else _length(text)
    total = _ends(config, N) + (_projected(config, text, D) if L else 0)
    modulations = len(text) if config.weight_sets == 3 else 1  # of the text; one set modulates it by the image's
    for i in range(config.depth):
        last, dual = i == config.depth - 1, i in config.dual_attention_layers
        total += linear(1, D, 6 * D) + _tokens(config, N)
        if L:
            short = last and config.weight_sets > 1  # text that is only read has no gates and no MLP
            total += modulations * linear(1, D, 2 * D if short else 6 * D)
            total += linear(L, D, 2 * D) if last else _tokens(config, L)
        total += attention(N if last else L + N, L + N, D)
        if dual:  # three more modulations, a second set of projections, attention among image tokens
            total += linear(1, D, 3 * D) + linear(N, D, 4 * D) + attention(N, N, D)
    return total


def _tokens(config: MMDiTConfig, rows: int) -> int:
    """Projections and MLP of one stream."""
    return linear(rows, config.width, 4 * config.width) + _mlp(config, rows)


def _length(text: Parts) -> int:
    return sum(length for length, _ in text)


def _projected(config: MMDiTConfig | CrossDiTConfig | UNetConfig, text: Parts, D: int) -> int:
    """Encoder states to width D, by one map or by one for each stream."""
    if config.text_projection == "per_encoder":
        return sum(linear(length, width, D) for length, width in text)
    return linear(_length(text), config.context_dim, D)


def _crossdit(config: CrossDiTConfig, text: Parts, height: int, width: int) -> int:
    N, D = height * width // config.patch_size**2, config.width
    block = linear(N, D, 4 * D) + attention(N, N, D) + _mlp(config, N)  # self-attention, MLP
    if config.injection == "pooled":
        return _ends(config, N) + config.depth * (block + linear(1, D, 6 * D))
    for length in [part for part, _ in text] if config.injection == "decoupled" else [_length(text)]:
        block += linear(N, D, 2 * D) + linear(length, D, 2 * D) + attention(N, length, D)  # q, output; k, v; reading
    return _ends(config, N) + _projected(config, text, D) + config.depth * (block + linear(1, D, 9 * D))


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


def _unet(config: UNetConfig, text: Parts, height: int, width: int) -> int:
    base, pixels = config.model_channels, height * width
    widths, route = [base * mult for mult in config.channel_mult], TextRoute(config)
    sizes = [pixels // 4**stage for stage in range(len(widths))]
    total = linear(1, base, 4 * base) + linear(1, 4 * base, 4 * base)
    if config.pooled_dim is not None:
        total += linear(1, config.pooled_dim, 4 * base) + linear(1, 4 * base, 4 * base)
    if config.injection == "cross" and config.text_projection == "per_encoder":
        total += _projected(config, text, config.context_dim)
    total += convolution(pixels, config.in_channels, base)

    channels, skips = base, [base]
    for stage, D in enumerate(widths):
        for _ in range(config.num_res_blocks):
            total += _res_block(config, sizes[stage], channels, D)
            total += _transformer(config, sizes[stage], text, D, config.transformer_depth[stage], route.down(stage))
            channels = D
            skips.append(channels)
        if stage + 1 < len(widths):
            total += convolution(sizes[stage + 1], channels, channels)  # down
            skips.append(channels)

    total += 2 * _res_block(config, sizes[-1], channels, channels)
    total += _transformer(config, sizes[-1], text, channels, config.middle_transformer_depth, route.middle())

    for stage, D in reversed(list(enumerate(widths))):
        for i in range(config.num_res_blocks + 1):
            total += _res_block(config, sizes[stage], channels + skips.pop(), D)
            stop = route.up(stage, i == config.num_res_blocks)
            total += _transformer(config, sizes[stage], text, D, config.transformer_depth[stage], stop)
            channels = D
        if stage:
            total += convolution(sizes[stage - 1], D, D)  # up
    return total + convolution(pixels, channels, config.out_channels)


def _res_block(config: UNetConfig, pixels: int, channels: int, D: int) -> int:
    """Two convolutions, the time embedding, the shortcut where the width changes."""
    total = convolution(pixels, channels, D) + convolution(pixels, D, D) + linear(1, 4 * config.model_channels, D)
    return total + (linear(pixels, channels, D) if channels != D else 0)


def _transformer(config: UNetConfig, N: int, text: Parts, D: int, depth: int, stop: TextStop) -> int:
    """Projections in and out, text that comes to this level, and `depth` blocks."""
    if depth == 0:
        return 0
    total, L = linear(N, D, 2 * D), _length(text)
    if stop.enters:
        total += _projected(config, text, D) if stop.carried is None else linear(L, stop.carried, D)
    for i in range(depth):
        if stop.joint:
            total += _projected(config, text, D) + _joint_block(config, N, L, D, stop.last and i == depth - 1)
        else:
            total += linear(N, D, 4 * D) + attention(N, N, D) + _geglu(config, N, D)
            total += _cross_attention(config, N, text, D) if stop.reads else 0
    return total


def _joint_block(config: UNetConfig, N: int, L: int, D: int, last: bool) -> int:
    """One attention over text and image, a feed-forward for each; text that nobody reads afterwards is only read."""
    total = linear(N, D, 4 * D) + _geglu(config, N, D) + _query(config, D)
    total += linear(L, D, 2 * D) if last else linear(L, D, 4 * D) + _geglu(config, L, D)
    return total + attention(N if last else L + N, L + N, D)


def _cross_attention(config: UNetConfig, N: int, text: Parts, D: int) -> int:
    """q and output; k and v; reading. One for all streams, or one for each."""
    parts = text if config.injection == "decoupled" else [(_length(text), config.context_dim)]
    return sum(
        linear(N, D, 2 * D) + linear(length, width, 2 * D) + attention(N, length, D) + _query(config, D)
        for length, width in parts
    )


def _query(config: UNetConfig, D: int) -> int:
    """The pooled text in the image's queries."""
    return linear(1, config.pooled_dim or 0, D) if config.text_in_query else 0


def _geglu(config: UNetConfig, rows: int, D: int) -> int:
    hidden = round(D * config.ff_mult)
    return linear(rows, D, 2 * hidden) + linear(rows, hidden, D)


FORMULAS: dict[str, Callable[[Any, Parts, int, int], int]] = {"mmdit": _mmdit, "crossdit": _crossdit, "unet": _unet}
