"""The transformers of the U-Net, in every way they may read text.

Source: Rombach et al. 2022, arXiv:2112.10752 (self-attention, cross-attention, feed-forward; parameter names are
those of the releases). Ours: decoupled and joint attention, and text in the image's queries; docs/conditioning.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit.config import UNetConfig
from mmdit.models.layers import Keys, attend, attention, merge_heads
from mmdit.models.text import Owner, Text, extend_masks, joint_attention, project, text_projection
from mmdit.models.unet_text import TextEntry, TextStop

TextTensors = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # context, mask, negative, its mask
Moving = tuple[TextTensors | None, dict[Any, TextTensors | None]]


class Companions(NamedTuple):
    """What travels beside the features; read once per forward.

    Attributes:
        time: embedding of time, and of the pooled text where there is one, [B, 4 model_channels].
        states: the encoders' text, [B, L, E]; None with injection `pooled`.
        text: the same as the transformers take it: joint attention updates it from block to block.
        left: text as the way down left each level, for the way up.
        pooled: [B, G], or None.
        skipped: numbers of the transformer blocks to leave out.
        records: where the weights of image tokens on text tokens are collected, or None.
    """

    time: Tensor
    states: Text | None
    text: Text | None
    left: Mapping[Any, Text]
    pooled: Tensor | None
    skipped: frozenset[int]
    records: dict[str, list[Tensor]] | None

    def moving(self) -> Moving:
        """Return what a block may have changed as plain tensors: torch 2.11 compiles no other output right."""
        return _tensors(self.text), {level: _tensors(text) for level, text in self.left.items()}

    def after(self, moved: Moving) -> Companions:
        """Take up what a block returned."""
        text, left = moved
        like = self.states if self.text is None else self.text  # what is static is the same in all
        return self._replace(
            text=_text(like, text), left={level: _text(like, tensors) for level, tensors in left.items()}
        )


def _tensors(text: Text | None) -> TextTensors | None:
    return None if text is None else (text.context, text.mask, text.negative, text.negative_mask)


def _text(like: Text | None, tensors: TextTensors | None) -> Any:
    if like is None or tensors is None:
        return None
    return like._replace(context=tensors[0], mask=tensors[1], negative=tensors[2], negative_mask=tensors[3])


class Attention(nn.Module):
    """Multi-head attention of image tokens to themselves or to the context."""

    def __init__(self, channels: int, context_dim: int, num_heads: int, pooled_dim: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))
        if pooled_dim is not None:  # text in the query; at the start it adds nothing
            self.to_q_text = nn.Linear(pooled_dim, channels, bias=False)
            nn.init.zeros_(self.to_q_text.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Self-attention, [B, N, D] -> [B, N, D]."""
        return self.out(attention(self.queries(tokens), *self.keys(tokens)))

    def read(
        self, tokens: Tensor, text: Text, pooled: Tensor | None = None, record: list[Tensor] | None = None
    ) -> Tensor:
        """Read `text` [B, L, E] from `tokens` [B, N, D]; append the weights [B, A, N, L] to `record` if given."""
        keys = self.keys(text.context, text.mask)
        negative = None if text.negative is None else self.keys(text.negative, text.negative_mask)
        length = text.context.shape[1]
        return self.out(attend(self.queries(tokens, pooled), keys, length, negative, text.guidance, record))

    def queries(self, tokens: Tensor, pooled: Tensor | None = None) -> Tensor:
        """[B, N, D], pooled [B, G] where the config has text in the query -> [B, A, N, K]."""
        q = self.to_q(tokens)
        if pooled is not None:
            q = q + self.to_q_text(pooled.to(q.dtype))[:, None]
        return self._heads(q)

    def keys(self, context: Tensor, mask: Tensor | None = None) -> Keys:
        """[B, L, E] -> k and v, each [B, A, L, K]."""
        return Keys(self._heads(self.to_k(context)), self._heads(self.to_v(context)), mask)

    def out(self, mixed: Tensor) -> Tensor:
        """[B, A, N, K] -> [B, N, D]."""
        return self.to_out(merge_heads(mixed))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "B L (A K) -> B A L K", A=self.num_heads)


class GEGLU(nn.Module):
    """Linear to twice the width; one half gates the other. Source: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, hidden]."""
        value, gate = self.proj(tokens).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU and a linear map back; indices as in the releases (net.0.proj, net.2)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, hidden), nn.Identity(), nn.Linear(hidden, channels))

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        return self.net(tokens)


def _heads(channels: int, config: UNetConfig) -> int:
    return config.num_heads or channels // config.head_dim


def _query_dim(config: UNetConfig) -> int | None:
    return config.pooled_dim if config.text_in_query else None


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each behind a LayerNorm and a residual.

    `decoupled` has one cross-attention per encoder stream, on its real width, and sums what they read; where a stage
    carries no text there is none.
    """

    def __init__(self, channels: int, config: UNetConfig, reads_text: bool = True) -> None:
        super().__init__()
        heads = _heads(channels, config)
        self.reads_text = reads_text
        self.attn1 = Attention(channels, channels, heads)
        self.ff = FeedForward(channels, round(channels * config.ff_mult))
        if reads_text and config.injection == "decoupled":
            self.attn2: nn.Module = nn.ModuleDict(
                {n: Attention(channels, width, heads, _query_dim(config)) for n, width in config.text_streams or ()}
            )
        elif reads_text:
            self.attn2 = Attention(channels, config.context_dim, heads, _query_dim(config))
        self.norm1 = nn.LayerNorm(channels)
        if reads_text:
            self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(
        self, tokens: Tensor, text: Text | None, companions: Companions, record: list[Tensor] | None
    ) -> tuple[Tensor, Text | None]:
        """Map image tokens [B, N, D] to [B, N, D]; the text [B, L, E] stays as it came."""
        tokens = tokens + self.attn1(self.norm1(tokens))
        if self.reads_text and text is not None:
            tokens = tokens + self.read(self.norm2(tokens), text, companions.pooled, record)
        return tokens + self.ff(self.norm3(tokens)), text

    def read(self, tokens: Tensor, text: Text, pooled: Tensor | None, record: list[Tensor] | None) -> Tensor:
        """Read the text, or each of its streams by an attention of its own, summed: [B, N, D]."""
        if isinstance(self.attn2, Attention):
            return self.attn2.read(tokens, text, pooled, record)
        own: list[Tensor] | None = None if record is None else []
        read = []
        for name, start, stop in text.parts:
            attn = self.attn2[name]
            read.append(attn.read(tokens, text.part(start, stop, attn.to_k.in_features), pooled, own))
        if record is not None and own is not None:
            record.append(torch.cat(own, dim=3))  # each stream's weights sum to one
        return sum(read[1:], start=read[0])


class JointTransformerBlock(nn.Module):
    """One attention over image and text tokens, each projected by its own weights; then a feed-forward for each.

    Stands in the place of self- and cross-attention. Beside the text that travels each block reads the encoders'
    states anew, as cross-attention does, and where text has weights of its own (`weight_sets` 2 and 3, as in MMDiT)
    its updates begin at zero. As in the U-Net's other blocks nothing is modulated: time reaches the text through the
    image tokens that it reads.
    """

    def __init__(self, channels: int, config: UNetConfig, last: bool) -> None:
        super().__init__()
        self.last, self.sets = last, config.weight_sets
        self.states = text_projection(config, channels)
        self.image = TokenStream(channels, config, pooled_dim=_query_dim(config))
        if self.sets == 2:
            self.text: nn.Module = TokenStream(channels, config, writes=not last, begins_at_zero=True)
        elif self.sets == 3:
            names = [name for name, _ in config.text_streams or ()]
            self.text = nn.ModuleDict(
                {name: TokenStream(channels, config, writes=not last, begins_at_zero=True) for name in names}
            )

    def forward(
        self, tokens: Tensor, text: Text | None, companions: Companions, record: list[Tensor] | None
    ) -> tuple[Tensor, Text | None]:
        """Update image tokens [B, N, D] and text [B, L, D], masks [B, L + N]; the last block leaves the text."""
        reading = self.image.read(tokens, pooled=companions.pooled)
        assert text is not None  # the first stop of joint attention brings it in
        assert companions.states is not None
        states = project(self.states, companions.states)
        both = text.combine(states, lambda own, read: torch.cat([own, read], dim=-1))  # [B, L, 2 D]
        owners = self._owners(text)
        tokens, updated = joint_attention(tokens, self.image, reading, owners, both, last=self.last, record=record)
        return tokens, text if self.last else updated

    def _owners(self, text: Text) -> list[Owner]:
        """Say which weights own which part of the text."""
        if self.sets == 3:
            return [(self.text[name], start, stop) for name, start, stop in text.parts]
        return [(self.text if self.sets == 2 else self.image, 0, text.context.shape[1])]


class TokenStream(nn.Module):
    """The weights one kind of token owns in a joint block: attention and feed-forward, each behind a LayerNorm.

    Text comes with the encoders' states beside it, [B, L, 2 D]: what is read is LayerNorm(text) + states, what is
    updated is the text.
    """

    def __init__(
        self,
        channels: int,
        config: UNetConfig,
        writes: bool = True,
        begins_at_zero: bool = False,
        pooled_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.norm1 = nn.LayerNorm(channels)
        self.attn = Attention(channels, channels, _heads(channels, config), pooled_dim)
        if writes:
            self.norm2 = nn.LayerNorm(channels)
            self.ff = FeedForward(channels, round(channels * config.ff_mult))
            if begins_at_zero:
                zero_init(self.attn.to_out[0])
                zero_init(self.ff.net[-1])
        else:  # text that nobody reads afterwards is read, not updated
            del self.attn.to_q, self.attn.to_out

    def read(
        self, tokens: Tensor, queries: bool = True, pooled: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor, Tensor, None]:
        """Return q (None without `queries`), k, v, each [B, A, L, K], and nothing that `write` needs."""
        own, states = tokens[..., : self.channels], tokens[..., self.channels :]  # of image tokens no states
        normed = self.norm1(own)
        if states.shape[-1]:
            normed = normed + states
        k, v, _ = self.attn.keys(normed)
        return self.attn.queries(normed, pooled) if queries else None, k, v, None

    def write(self, tokens: Tensor, mixed: Tensor, _: None = None) -> Tensor:
        """Add what was read and the feed-forward: [B, L, D or 2 D], [B, A, L, K] -> [B, L, D]."""
        own = tokens[..., : self.channels] + self.attn.out(mixed)
        return own + self.ff(self.norm2(own))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, with a residual around all of them."""

    def __init__(self, channels: int, depth: int, config: UNetConfig, number: int, name: str, stop: TextStop) -> None:
        super().__init__()
        self.linear_projection = config.linear_projection
        self.numbers = {f"{name}.transformer_blocks.{i}": number + i for i in range(depth)}
        self.stop = stop
        project = nn.Linear if config.linear_projection else _pointwise
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = project(channels, channels)
        if stop.enters:
            self.text_entry = TextEntry(config, channels, stop)
        self.transformer_blocks = nn.ModuleList(
            JointTransformerBlock(channels, config, last=stop.last and i == depth - 1)
            if stop.reads and config.injection == "joint"
            else TransformerBlock(channels, config, stop.reads)
            for i in range(depth)
        )
        self.proj_out = zero_init(project(channels, channels))

    def forward(self, features: Tensor, companions: Companions) -> tuple[Tensor, Companions]:
        """Map features [B, D, H, W] to [B, D, H, W]; joint attention also updates the text among the companions."""
        height, width = features.shape[-2:]
        hidden = self.norm(features)
        if not self.linear_projection:
            hidden = self.proj_in(hidden)
        tokens = rearrange(hidden, "B D H W -> B (H W) D")  # [B, N, D]; a view where features are channels_last
        if self.linear_projection:
            tokens = self.proj_in(tokens)
        tokens, companions = self.run_blocks(tokens, companions)
        if self.linear_projection:
            tokens = self.proj_out(tokens)
        hidden = rearrange(tokens, "B (H W) D -> B D H W", H=height, W=width)  # [B, D, H, W]
        return features + (hidden if self.linear_projection else self.proj_out(hidden)), companions

    def run_blocks(self, tokens: Tensor, companions: Companions) -> tuple[Tensor, Companions]:
        """Run the blocks over tokens [B, N, D], with the text in this level's width."""
        text = companions.text
        if self.stop.enters:
            assert companions.states is not None
            text = self.text_entry(companions.states, text, companions.left.get(self.stop.level))
        masked = extend_masks(text, tokens.shape[1]) if self.stop.joint else text
        for block, (name, number) in zip(self.transformer_blocks, self.numbers.items(), strict=True):
            if number in companions.skipped:
                continue
            record = None
            if companions.records is not None and self.stop.reads:
                record = companions.records.setdefault(name, [])
            tokens, masked = block(tokens, masked, companions, record)
        if not self.stop.joint or text is None or masked is None:
            return tokens, companions
        text = text._replace(context=masked.context, negative=masked.negative)
        left = {**companions.left, self.stop.level: text} if self.stop.down else companions.left
        return tokens, companions._replace(text=text, left=left)


def _pointwise(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 1)


def zero_init(module: nn.Conv2d | nn.Linear) -> nn.Module:
    """Set weight and bias to zero: at the start the branch that ends in `module` adds nothing."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module
