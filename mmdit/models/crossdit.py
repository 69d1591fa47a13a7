"""CrossDiT: a DiT whose image tokens read the text by cross-attention; the text itself is never updated.

Blocks of Peebles & Xie 2022 (arXiv:2212.09748v2) with a cross-attention between self-attention and MLP, as in
PixArt-alpha (Chen et al. 2023, arXiv:2310.00426v3, figure 4). Departs from PixArt: each block has its own modulation
(as in DiT), c holds the pooled text beside time, and the cross-attention is modulated and gated like the other two
branches. Everything else is MMDiT's, so the two differ in how text enters.

`injection: decoupled` gives each encoder stream a cross-attention of its own and sums what they read; `pooled` leaves
the cross-attention out.
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
    Keys,
    Modulation,
    PatchEmbed,
    RMSNorm,
    VectorEmbedder,
    admit,
    attend,
    attention,
    initialize,
    merge_heads,
    modulate,
    norm,
    split_heads,
    timestep_embedding,
    unpatchify,
)
from mmdit.models.posembed import crop_center, position_table
from mmdit.models.text import Text, project, read_text, text_projection


class CrossDiT(nn.Module):
    """The cross-attending diffusion transformer behind the door of `mmdit.denoiser`."""

    def __init__(self, config: CrossDiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, width)
        self.t_embedder = VectorEmbedder(256, width)
        if config.pooled_dim is not None:
            self.y_embedder = VectorEmbedder(config.pooled_dim, width)
        if config.injection != "pooled":
            self.context_embedder = text_projection(config, width)
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
        text = None
        if config.injection != "pooled":
            text = project(self.context_embedder, read_text(config, conditioning, x.dtype), norm)  # [B, L, D]
        c = self.t_embedder(timestep_embedding(timestep))                          # [B, D]
        if config.pooled_dim is not None:
            c = c + self.y_embedder(conditioning.pooled)

        for i, block in enumerate(self.blocks):
            if i not in skipped:
                record = None if records is None or text is None else records.setdefault(f"blocks.{i}", [])
                x = block(x, text, c, record)
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
        self.injection = config.injection
        if self.injection == "cross":
            self.cross_attn = CrossAttention(config)
        elif self.injection == "decoupled":
            self.cross_attn = nn.ModuleDict({name: CrossAttention(config) for name, _ in config.text_streams or ()})
        self.mlp = MLP(config.width, int(config.width * config.mlp_ratio))
        self.adaLN_modulation = Modulation(config.width, 6 if self.injection == "pooled" else 9)

    def forward(self, x: Tensor, text: Text | None, c: Tensor, record: list[Tensor] | None) -> Tensor:
        """[B, N, D], text [B, L, D] or None, c [B, D] -> [B, N, D]; the weights [B, A, N, L] go to `record`."""
        shift, scale, gate, *reading, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(c)
        x = torch.addcmul(x, gate, self.attn(modulate(norm(x), shift, scale)))
        if text is not None:
            text_shift, text_scale, text_gate = reading
            x = torch.addcmul(x, text_gate, self.read(modulate(norm(x), text_shift, text_scale), text, record))
        return torch.addcmul(x, mlp_gate, self.mlp(modulate(norm(x), mlp_shift, mlp_scale)))

    def read(self, x: Tensor, text: Text, record: list[Tensor] | None) -> Tensor:
        """Read the text, or each of its streams by an attention of its own, summed: [B, N, D]."""
        if self.injection == "cross":
            return self.cross_attn(x, text, record)
        own: list[Tensor] | None = None if record is None else []
        streams = [self.cross_attn[name](x, text.part(start, stop), own) for name, start, stop in text.parts]
        if record is not None and own is not None:
            record.append(torch.cat(own, dim=3))  # each stream's weights sum to one
        return sum(streams[1:], start=streams[0])


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

    def forward(self, x: Tensor, text: Text, record: list[Tensor] | None) -> Tensor:
        """Read `text` [B, L, D] from x; append the weights [B, A, N, L] to `record` where given."""
        (q,) = split_heads(self.q(x), self.num_heads, 1)  # [B, A, N, K]
        keys = self.keys(text.context, text.mask)
        negative = None if text.negative is None else self.keys(text.negative, text.negative_mask)
        read = attend(self.ln_q(q), keys, text.context.shape[1], negative, text.guidance, record)
        return self.proj(merge_heads(read))

    def keys(self, context: Tensor, mask: Tensor | None) -> Keys:
        """[B, L, D] -> k and v, each [B, A, L, K], with their mask."""
        k, v = split_heads(self.kv(context), self.num_heads, 2)
        return Keys(self.ln_k(k), v, mask)


def _qk_norms(config: CrossDiTConfig) -> tuple[nn.Module, nn.Module]:
    if config.qk_norm is None:
        return nn.Identity(), nn.Identity()
    head_dim = config.width // config.num_heads
    return RMSNorm(head_dim), RMSNorm(head_dim)
