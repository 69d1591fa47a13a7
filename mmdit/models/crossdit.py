"""CrossDiT: a DiT whose image tokens read the text by cross-attention; the text itself is never updated.

Blocks of Peebles & Xie 2022 (arXiv:2212.09748v2) with a cross-attention between self-attention and MLP, as in
PixArt-alpha (Chen et al. 2023, arXiv:2310.00426v3, figure 4). Departs from PixArt: each block has its own modulation
(as in DiT), c holds the pooled text beside time, and the cross-attention is modulated and gated like the other two
branches. Everything else is MMDiT's, so the two differ in how text enters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmdit.config import CrossDiTConfig
from mmdit.denoiser import Conditioning, attention_records, skipped_layers
from mmdit.models.layers import (
    MLP,
    FinalLayer,
    Modulation,
    PatchEmbed,
    RMSNorm,
    VectorEmbedder,
    admit,
    attention,
    attention_weights,
    initialize,
    merge_heads,
    modulate,
    norm,
    split_heads,
    timestep_embedding,
    unpatchify,
)
from mmdit.models.posembed import crop_center, position_table


class CrossDiT(nn.Module):
    """The cross-attending diffusion transformer behind the door of `mmdit.denoiser`."""

    def __init__(self, config: CrossDiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, width)
        self.t_embedder = VectorEmbedder(256, width)
        self.y_embedder = VectorEmbedder(config.pooled_dim, width)
        self.context_embedder = nn.Linear(config.context_dim, width)
        self.blocks = nn.ModuleList(CrossBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, config.patch_size, config.out_channels)
        self.register_buffer("pos_embed", position_table(width, config.pos_embed_max_size, config.pos_embed_base_size))
        self.num_blocks = config.depth
        initialize(self)

    def forward(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict; shapes as in `mmdit.denoiser`: [B, C, H, W], [B] -> [B, C, H, W]."""
        return self.run_blocks(latents, timestep, conditioning)

    def run_blocks(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        residuals: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Predict, adding `residuals` (each [B, N, D]) to the image tokens after the blocks, spread evenly.

        Raises:
            ValueError: the inputs do not fit this model; see `admit`.
        """
        config, P = self.config, self.config.patch_size
        latents = admit(config, latents, timestep, conditioning, P, config.pos_embed_max_size * P)
        rows, columns = latents.shape[2] // P, latents.shape[3] // P
        skipped, records = skipped_layers(self), attention_records(self)

        # fmt: off
        x = self.x_embedder(latents) + crop_center(self.pos_embed, rows, columns)  # [B, N, D]
        context = self.context_embedder(norm(conditioning.context.to(x.dtype)))    # [B, L, D]
        c = self.t_embedder(timestep_embedding(timestep))                          # [B, D]
        c = c + self.y_embedder(conditioning.pooled)

        for i, block in enumerate(self.blocks):
            if i not in skipped:
                weights = None if records is None else records.setdefault(f"blocks.{i}", [])
                x = block(x, context, c, conditioning.context_mask, weights)
            if residuals:
                x = x + residuals[i * len(residuals) // config.depth]

        return unpatchify(self.final_layer(x, c), rows, P)                         # [B, C, H, W]
        # fmt: on

    def unused_parameters(self) -> dict[str, str]:
        """Name the parameters that get no gradient: none."""
        return {}


class CrossBlock(nn.Module):
    """Self-attention, cross-attention to the text, MLP; each modulated and gated by c."""

    def __init__(self, config: CrossDiTConfig) -> None:
        super().__init__()
        self.attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config)
        self.mlp = MLP(config.width, int(config.width * config.mlp_ratio))
        self.adaLN_modulation = Modulation(config.width, 9)

    def forward(
        self, x: Tensor, context: Tensor, c: Tensor, mask: Tensor | None, weights: list[Tensor] | None
    ) -> Tensor:
        """[B, N, D], text [B, L, D], c [B, D], mask bool [B, L] or None -> [B, N, D]."""
        shift, scale, gate, text_shift, text_scale, text_gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(c)
        x = torch.addcmul(x, gate, self.attn(modulate(norm(x), shift, scale)))
        text = self.cross_attn(modulate(norm(x), text_shift, text_scale), context, mask, weights)
        x = torch.addcmul(x, text_gate, text)
        return torch.addcmul(x, mlp_gate, self.mlp(modulate(norm(x), mlp_shift, mlp_scale)))


class SelfAttention(nn.Module):
    """Image tokens to image tokens, [B, N, D] -> [B, N, D]."""

    def __init__(self, config: CrossDiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.ln_q, self.ln_k = _qk_norms(config)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.num_heads, 3)  # [B, A, N, K]
        return self.proj(merge_heads(attention(self.ln_q(q), self.ln_k(k), v)))


class CrossAttention(nn.Module):
    """Image tokens to text tokens, [B, N, D] and [B, L, D] -> [B, N, D]."""

    def __init__(self, config: CrossDiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.ln_q, self.ln_k = _qk_norms(config)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None, weights: list[Tensor] | None) -> Tensor:
        (q,) = split_heads(self.q(x), self.num_heads, 1)  # [B, A, N, K]
        k, v = split_heads(self.kv(context), self.num_heads, 2)  # [B, A, L, K]
        q, k = self.ln_q(q), self.ln_k(k)
        if weights is not None:
            weights.append(attention_weights(q, k, mask))  # [B, A, N, L]
        return self.proj(merge_heads(attention(q, k, v, mask)))


def _qk_norms(config: CrossDiTConfig) -> tuple[nn.Module, nn.Module]:
    if config.qk_norm is None:
        return nn.Identity(), nn.Identity()
    head_dim = config.width // config.num_heads
    return RMSNorm(head_dim), RMSNorm(head_dim)
