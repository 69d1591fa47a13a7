"""MMDiT: text and image as two token streams with weights of their own, which meet in every attention.

Source: Esser et al. 2024, arXiv:2403.03206v1, figure 2. Two additions of the SD3.5 releases are switched by the
config: RMS-normalised queries and keys (`qk_norm`), and blocks whose image stream has a second attention of its own
(`dual_attention_layers`, "MMDiT-X"). Parameter names are those of the releases' single files; there `x` is the image
stream and `y` the pooled text.

The paper's variants with other sets of weights (its 5.1.1) are `weight_sets`: 1, text and image share one; 3, each of
two text streams and the image have their own. `injection: pooled` leaves the text tokens out: a DiT.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdit.config import MMDiTConfig
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
    initialize,
    merge_heads,
    modulate,
    norm,
    split_heads,
    timestep_embedding,
    unpatchify,
)
from mmdit.models.posembed import crop_center, position_table
from mmdit.models.text import Owner, Text, extend_masks, joint_attention, project, read_text, text_projection


class MMDiT(nn.Module):
    """The multimodal diffusion transformer behind the door of `mmdit.denoiser`."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, width)
        self.t_embedder = VectorEmbedder(256, width)
        if config.pooled_dim is not None:
            self.y_embedder = VectorEmbedder(config.pooled_dim, width)
        if config.injection == "joint":
            self.context_embedder = text_projection(config, width)
        self.joint_blocks = nn.ModuleList(JointBlock(config, i) for i in range(config.depth))
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
        """Predict, adding `residuals` (each [B, N, D]) to the image stream after the blocks.

        Fewer residuals than blocks are spread evenly, each serving several blocks in turn. The last block gets none:
        it has no context output to share them with, and the releases' ControlNets were trained so.

        Raises:
            ValueError: the inputs do not fit this model; see `admit`.
        """
        config, P = self.config, self.config.patch_size
        latents = admit(config, latents, timestep, conditioning, P, config.pos_embed_max_size * P)
        rows, columns = latents.shape[2] // P, latents.shape[3] // P
        skipped, records = skipped_layers(self), attention_records(self)

        # fmt: off
        x = self.x_embedder(latents) + crop_center(self.pos_embed, rows, columns)  # [B, N, D]
        text = self.embed_text(conditioning, x)                                    # [B, L, D], masks [B, L + N]
        c = self.t_embedder(timestep_embedding(timestep))                          # [B, D]
        if config.pooled_dim is not None:
            c = c + self.y_embedder(conditioning.pooled)

        for i, block in enumerate(self.joint_blocks):
            if i not in skipped:
                x, context, negative = block(x, text, c, self._record(records, i))
                text = None if text is None else text._replace(context=context, negative=negative)
            if residuals and i < config.depth - 1:
                x = x + residuals[i * len(residuals) // config.depth]

        return unpatchify(self.final_layer(x, c), rows, P)                         # [B, C, H, W]
        # fmt: on

    def embed_text(self, conditioning: Conditioning, x: Tensor) -> Text | None:
        """Project the text [B, L, E] to [B, L, D] and extend its masks by the image tokens x [B, N, D]."""
        if self.config.injection == "pooled":
            return None
        text = project(self.context_embedder, read_text(self.config, conditioning, x.dtype))
        return extend_masks(text, x.shape[1])

    def _record(self, records: dict[str, list[Tensor]] | None, i: int) -> list[Tensor] | None:
        """Return where block i puts its attention, None where nobody asked or the blocks read no text."""
        if records is None or self.config.injection == "pooled":
            return None
        return records.setdefault(f"joint_blocks.{i}", [])

    def unused_parameters(self) -> dict[str, str]:
        """Name the parameters that get no gradient, or none in part, with the reason.

        The weights of text queries in the last block are stored because the releases store them. No text leaves that
        block, so its queries are never computed: rows [0, D) of `qkv` have zero gradient and `ln_q` is frozen.
        """
        last = self.joint_blocks[-1]
        names = [
            f"joint_blocks.{self.config.depth - 1}.{name}"
            for name, _ in last.named_parameters()
            if name.startswith("context_block.") and name.endswith(("attn.qkv.weight", "attn.qkv.bias", "ln_q.weight"))
        ]
        return dict.fromkeys(names, "no text leaves the last block, so its text queries (rows [0, D)) are not computed")


class JointBlock(nn.Module):
    """One block of the figure: each stream is modulated and projected by itself, both attend to both."""

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        self.last = index == config.depth - 1
        self.sets = config.weight_sets if config.injection == "joint" else 0
        if self.sets == 2:
            self.context_block = StreamBlock(config, writes=not self.last)
        elif self.sets == 3:
            streams = {name: StreamBlock(config, writes=not self.last) for name, _ in config.text_streams or ()}
            self.context_block = nn.ModuleDict(streams)
        self.x_block = StreamBlock(config, dual=index in config.dual_attention_layers)
        if self.last and config.qk_norm and self.sets > 1:
            for name, parameter in self.context_block.named_parameters():
                parameter.requires_grad_("ln_q" not in name)

    def forward(
        self, x: Tensor, text: Text | None, c: Tensor, weights: list[Tensor] | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the updated streams: image, text, negative text. (Tensors: torch 2.11 compiles no other tuple right.)

        Args:
            x: image [B, N, D].
            text: [B, L, D], masks [B, L + N]; the last block returns it as it came.
            c: time plus pooled text, [B, D].
            weights: where given, what image queries read from text keys is appended, [B, A, N, L].
        """
        reading = self.x_block.read(x, c)
        x, text = joint_attention(x, self.x_block, reading, self._owners(text), text, c, last=self.last, record=weights)
        return (x, None, None) if text is None else (x, text.context, text.negative)

    def _owners(self, text: Text | None) -> list[Owner]:
        """Say which weights own which part of the text."""
        if text is None:
            return []
        if self.sets == 3:
            return [(self.context_block[name], start, stop) for name, start, stop in text.parts]
        return [(self.context_block if self.sets == 2 else self.x_block, 0, text.context.shape[1])]


class StreamBlock(nn.Module):
    """The weights one stream owns in a block, and the two halves of its work around the shared attention."""

    def __init__(self, config: MMDiTConfig, writes: bool = True, dual: bool = False) -> None:
        super().__init__()
        self.attn = AttentionWeights(config, output=writes)
        if dual:
            self.attn2 = AttentionWeights(config)
        if writes:
            self.mlp = MLP(config.width, int(config.width * config.mlp_ratio))
        self.dual = dual
        self.adaLN_modulation = Modulation(config.width, 2 if not writes else 9 if dual else 6)

    def read(
        self, x: Tensor, c: Tensor, queries: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor, tuple[Tensor, ...]]:
        """Return q, k, v, each [B, A, L, K], and what `write` needs; q is None without `queries`."""
        shift, scale, *rest = self.adaLN_modulation(c)
        normed = norm(x)
        q, k, v = self.attn.project(modulate(normed, shift, scale), queries=queries)
        if self.dual:
            *rest, shift2, scale2, gate2 = rest
            own = attention(*self.attn2.project(modulate(normed, shift2, scale2)))
            rest += [gate2 * self.attn2.proj(merge_heads(own))]  # added by `write`, after the joint attention
        return q, k, v, tuple(rest)

    def write(self, x: Tensor, mixed: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Add the attention's result and the MLP to the stream: [B, L, D], [B, A, L, K] -> [B, L, D]."""
        gate, mlp_shift, mlp_scale, mlp_gate, *own = modulation
        x = torch.addcmul(x, gate, self.attn.proj(merge_heads(mixed)))
        if own:
            x = x + own[0]
        return torch.addcmul(x, mlp_gate, self.mlp(modulate(norm(x), mlp_shift, mlp_scale)))


class AttentionWeights(nn.Module):
    """Projections to queries, keys and values, packed in this order, and the one back; the norms of q and k."""

    def __init__(self, config: MMDiTConfig, output: bool = True) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        if output:
            self.proj = nn.Linear(config.width, config.width)
        normed = config.qk_norm == "rms"
        self.ln_q = RMSNorm(config.width // config.num_heads) if normed else nn.Identity()
        self.ln_k = RMSNorm(config.width // config.num_heads) if normed else nn.Identity()

    def project(self, x: Tensor, queries: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
        """[B, L, D] -> q, k, v, each [B, A, L, K]; without `queries` only the rows of k and v are computed."""
        if not queries:
            D = x.shape[-1]
            k, v = split_heads(F.linear(x, self.qkv.weight[D:], self.qkv.bias[D:]), self.num_heads, 2)
            return None, self.ln_k(k), v
        q, k, v = split_heads(self.qkv(x), self.num_heads, 3)
        return self.ln_q(q), self.ln_k(k), v
