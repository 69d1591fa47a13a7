"""What several backbones share by intent, so that a comparison cannot drift here.

Attention, adaptive layer norm, the MLP, the embeddings of time and pooled text, patches in and out. A block that
merely resembles another backbone's stays with its backbone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmdit.config import CrossDiTConfig, MMDiTConfig, UNetConfig
from mmdit.denoiser import AttentionGuidance, Conditioning, check_inputs

NORM_EPS = 1e-6  # of every norm here, as in the releases; PyTorch's own default is 1e-5
PLAIN_ATTENTION_BELOW = 128  # keys; on CPU two GEMMs and a softmax beat the flash kernel for short sequences


def admit(
    config: MMDiTConfig | CrossDiTConfig | UNetConfig,
    latents: Tensor,
    timestep: Tensor,
    conditioning: Conditioning,
    multiple: int,
    max_size: int | None = None,
) -> Tensor:
    """Refuse inputs that do not fit a backbone, and return its latents with `spatial` behind them.

    Args:
        latents: [B, C, H, W]; H and W multiples of `multiple` and at most `max_size`.

    Returns:
        [B, in_channels, H, W].

    Raises:
        ValueError: see `check_inputs`; or `conditioning.negative` is given to a denoiser without text tokens.
    """
    check_inputs(
        latents,
        timestep,
        conditioning,
        in_channels=config.in_channels,
        context_dim=config.context_dim,
        pooled_dim=config.pooled_dim,
        multiple=multiple,
        max_size=max_size,
    )
    if conditioning.negative is not None and config.injection == "pooled":
        raise ValueError(
            f"conditioning.negative (attention-space guidance) acts on text tokens, of which this {config.name} has "
            f"none (injection 'pooled'); give the negative prompt to classifier-free guidance as null_conditioning"
        )
    if conditioning.spatial is None:
        return latents
    return torch.cat([latents, conditioning.spatial.to(latents.dtype)], dim=1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention.

    Args:
        q: [B, A, L, K].
        k, v: [B, A, M, K]; M may differ from L.
        mask: bool [B, M], True = attend; None attends to everything. A row without any True gives zeros.

    Returns:
        [B, A, L, K], in the dtype of `v`.

    Source: Vaswani et al. 2017, arXiv:1706.03762v7, Eq. 1.
    """
    if q.device.type == "cpu" and k.shape[2] < PLAIN_ATTENTION_BELOW:
        return attention_weights(q, k, mask).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None, :])


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(K)), float32 [B, A, L, M]; arguments as in `attention`."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, A, L, M]
    if mask is None:
        return scores.softmax(dim=-1, dtype=torch.float32)
    hidden = ~mask[:, None, None, :]
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return scores.softmax(dim=-1, dtype=torch.float32).masked_fill(hidden, 0.0)  # zeros, not 1/M, where all is hidden


class Keys(NamedTuple):
    """What queries read: k and v [B, A, M, K], mask bool [B, M] or None."""

    k: Tensor
    v: Tensor
    mask: Tensor | None


def attend(
    q: Tensor,
    keys: Keys,
    length: int,
    negative: Keys | None = None,
    guidance: AttentionGuidance | None = None,
    record: list[Tensor] | None = None,
) -> Tensor:
    """Let image queries read text, guided away from a negative one where there is one.

    `kv_subtract` puts K(pos) - weight K(neg) and V(pos) - weight V(neg) in the place of each text token's key and
    value. Which tokens are seen is the positive mask's business; a negative token that is masked subtracts nothing.
    `nag` attends to both texts and combines what came out, `extrapolate`.

    Args:
        q: of image tokens, [B, A, N, K].
        keys: the first `length` are text; the rest, image tokens, are the same in `negative`.
        record: where given, the weights of q on text keys as they act are appended, [B, A, N, L]; for `nag` those
            on the positive text.

    Returns:
        [B, A, N, K].

    Source: the literal form of a negative prompt in attention (`kv_subtract`); arXiv:2505.21179 (`nag`).
    """
    if negative is not None and guidance is not None and guidance.mode == "kv_subtract":
        keys = keys._replace(
            k=_subtract(keys.k, negative.k, negative.mask, length, guidance.weight),
            v=_subtract(keys.v, negative.v, negative.mask, length, guidance.weight),
        )
    if record is not None:
        record.append(attention_weights(q, keys.k, keys.mask)[..., :length].detach())
    read = attention(q, *keys)
    if negative is not None and guidance is not None and guidance.mode == "nag":
        return extrapolate(read, attention(q, *negative), guidance)
    return read


def _subtract(positive: Tensor, negative: Tensor, mask: Tensor | None, length: int, weight: float) -> Tensor:
    """Subtract weight times the negative text's keys (or values) from the positive one's, [B, A, M, K]."""
    removed = negative[:, :, :length]
    if mask is not None:
        removed = removed * mask[:, None, :length, None].to(removed.dtype)
    return torch.cat([positive[:, :, :length] - weight * removed, positive[:, :, length:]], dim=2)


def extrapolate(positive: Tensor, negative: Tensor, guidance: AttentionGuidance) -> Tensor:
    """Push an attention's output away from the negative one's, hold its norm, and blend: each [B, A, N, K].

    The norm is that of a token over all heads, in float32.
    Source: Chen et al. 2025, arXiv:2505.21179, 3.2: extrapolation, L1 normalisation by tau, blending by alpha.
    """
    guided = positive + (guidance.weight - 1) * (positive - negative)
    size, limit = (x.float().abs().sum(dim=(1, 3), keepdim=True) for x in (guided, guidance.tau * positive))
    guided = guided * (limit / size.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1).to(guided.dtype)
    return positive + guidance.alpha * (guided - positive)


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last axis, in float32, then scale.

    Source: Zhang & Sennrich 2019, arXiv:1910.07467v1, Eq. 4; on queries and keys: arXiv:2403.03206v1, 5.3.2.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), NORM_EPS).to(x.dtype)


class MLP(nn.Module):
    """Linear, GELU (tanh form), Linear; D -> hidden -> D."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def timestep_embedding(timestep: Tensor, size: int = 256, max_period: float = 10_000.0) -> Tensor:
    """Embed network time as cosines and sines: [B] -> float32 [B, size].

    Float32 whatever the network runs in: at time 999 bfloat16 cannot tell neighbouring steps apart.
    Source: Vaswani et al. 2017, arXiv:1706.03762v7, 3.5. Departs: cosines first, as in the releases.
    """
    half = size // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep.float()[:, None] * torch.exp(-math.log(max_period) * exponents)  # [B, size/2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class VectorEmbedder(nn.Module):
    """Linear, SiLU, Linear: one vector per sample to width D."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x.to(self.mlp[0].weight.dtype))


class Modulation(nn.Sequential):
    """adaLN: `count` vectors of width D from the vector c; all zero at initialisation.

    Source: Peebles & Xie 2022, arXiv:2212.09748v2, 3.2 (adaLN-Zero).
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, count * width))
        self.count = count

    def forward(self, c: Tensor) -> tuple[Tensor, ...]:
        """[B, D] -> `count` tensors [B, 1, D]."""
        return super().forward(c).unsqueeze(1).chunk(self.count, dim=-1)


def norm(x: Tensor) -> Tensor:
    """Layer norm over D without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)


def modulate(normed: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return normed * (1 + scale) + shift; [B, L, D] with [B, 1, D]."""
    return torch.addcmul(shift, normed, 1 + scale)


def split_heads(x: Tensor, num_heads: int, parts: int) -> tuple[Tensor, ...]:
    """[B, L, parts * D] -> `parts` tensors [B, A, L, K]."""
    return rearrange(x, "B L (part A K) -> part B A L K", part=parts, A=num_heads).unbind(0)


def merge_heads(x: Tensor) -> Tensor:
    """[B, A, L, K] -> [B, L, D]."""
    return rearrange(x, "B A L K -> B L (A K)")


class PatchEmbed(nn.Module):
    """Latents to image tokens, [B, C, H, W] -> [B, N, D]."""

    def __init__(self, channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        # A GEMM over patches: the same numbers as the convolution whose layout the weights keep, and faster on CPU.
        P = self.proj.kernel_size[0]
        patches = rearrange(latents, "B C (h p) (w q) -> B (h w) (C p q)", p=P, q=P)  # [B, N, C P P]
        return F.linear(patches.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


def unpatchify(x: Tensor, rows: int, patch_size: int) -> Tensor:
    """Image tokens to latents, [B, N, P P C] -> [B, C, H, W]; `rows` is H / P."""
    return rearrange(x, "B (h w) (p q C) -> B C (h p) (w q)", h=rows, p=patch_size, q=patch_size)


class FinalLayer(nn.Module):
    """Modulated norm, then one linear map to patches; zero at initialisation. [B, N, D] -> [B, N, P P C]."""

    def __init__(self, width: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, patch_size * patch_size * channels)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)
        return self.linear(modulate(norm(x), shift, scale))


def initialize(denoiser: nn.Module) -> None:
    """Initialise a transformer backbone as DiT does: Xavier, zero gates, zero output.

    Every residual branch starts closed and the prediction starts at exactly zero.
    Source: Peebles & Xie 2022, arXiv:2212.09748v2, 3.2, and the initial values of their release.
    """
    for module in denoiser.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))  # a patch convolution counts as the linear map it is
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in denoiser.modules():
        if isinstance(module, VectorEmbedder):
            nn.init.normal_(module.mlp[0].weight, std=0.02)
            nn.init.normal_(module.mlp[2].weight, std=0.02)
        elif isinstance(module, Modulation):
            nn.init.zeros_(module[1].weight)
        elif isinstance(module, FinalLayer):
            nn.init.zeros_(module.linear.weight)
