"""The classic text-to-image U-Net: SD1.x and SDXL, with text by cross-attention or in one of the laboratory's ways.

Source: Rombach et al. 2022, arXiv:2112.10752 (SD1.x); Podell et al. 2023, arXiv:2307.01952 (SDXL); residual blocks
from Dhariwal & Nichol 2021, arXiv:2105.05233. Parameter names are those of the released checkpoints.

    latents -> input_blocks (features kept as skips) -> middle_block -> output_blocks (skips joined again) -> out
    timestep (+ pooled) -> added to the features of every residual block
    context  -> the transformer blocks: keys and values of their cross-attention, or tokens that travel with the
                features from block to block (`injection: joint`)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdit.config import UNetConfig
from mmdit.denoiser import Conditioning, attention_records, skipped_layers
from mmdit.models.layers import admit, timestep_embedding
from mmdit.models.text import PerEncoder, project, read_text
from mmdit.models.unet_attention import Companions, Moving, SpatialTransformer, zero_init
from mmdit.models.unet_text import TextRoute, TextStop


class ResBlock(nn.Module):
    """Two 3x3 convolutions, the time embedding added between them, and a shortcut around.

    GroupNorm needs no cast here: torch keeps its statistics in float32 for bf16 and fp16 features too, so the
    result is that of the releases' `GroupNorm32` (tested).
    """

    def __init__(self, channels: int, out_channels: int, time_dim: int, norm_groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(norm_groups, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(norm_groups, out_channels),
            nn.SiLU(),
            nn.Identity(),  # the releases' dropout; keeps the convolution at index 3
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, features: Tensor, time: Tensor) -> Tensor:
        """Map features [B, D, H, W] and time embedding [B, 4 model_channels] to [B, D', H, W]."""
        hidden = self.in_layers(features)  # [B, D', H, W]
        hidden = hidden + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(features) + self.out_layers(hidden)


class Downsample(nn.Module):
    """Halve height and width by a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D, H, W] -> [B, D, H/2, W/2]."""
        return self.op(features)


class Upsample(nn.Module):
    """Double height and width by repeating pixels, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D, H, W] -> [B, D, 2H, 2W]."""
        return self.conv(F.interpolate(features, scale_factor=2.0, mode="nearest"))


class Block(nn.Sequential):
    """One entry of input_blocks, middle_block or output_blocks: layers that take different companions."""

    def forward(self, features: Tensor, companions: Companions) -> tuple[Tensor, Moving]:
        """Run the layers over features [B, D, H, W]."""
        for layer in self:
            if isinstance(layer, ResBlock):
                features = layer(features, companions.time)
            elif isinstance(layer, SpatialTransformer):
                features, companions = layer(features, companions)
            else:
                features = layer(features)
        return features, companions.moving()


class UNet(nn.Module):
    """U-Net of SD1.x and SDXL behind the door of `mmdit.denoiser`.

    Convolutions run in channels_last: the latents are converted at the door and every layer keeps the format.
    Without it a bf16 step on a CPU is slower than a float32 one.

    Transformer blocks are numbered 0, 1, ... in the order they run (input, middle, output): the numbers that
    `skip_layers` takes. Their names in `record_attention` are their module paths.

    Source: Rombach et al. 2022, arXiv:2112.10752, Section 3.3; layout of the released SD1.5 and SDXL checkpoints.
    Departs: the pooled vector, where there is one, goes through `label_emb` into the time embedding, as in SDXL.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        base, time_dim, groups = config.model_channels, 4 * config.model_channels, config.norm_groups
        widths = [base * mult for mult in config.channel_mult]
        self.num_blocks = 0
        route = TextRoute(config)

        self.time_embed = nn.Sequential(nn.Linear(base, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        if config.pooled_dim is not None:
            self.label_emb = nn.Sequential(
                nn.Sequential(nn.Linear(config.pooled_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
            )

        if config.injection == "cross" and config.text_projection == "per_encoder":
            self.context_embedder = PerEncoder(config.text_streams or (), config.context_dim)

        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(config.in_channels, base, 3, padding=1))])
        channels, skips = base, [base]
        for stage, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                name = f"input_blocks.{len(self.input_blocks)}"
                layers = [ResBlock(channels, width, time_dim, groups)]
                layers += self._transformer(width, config.transformer_depth[stage], f"{name}.1", route.down(stage))
                self.input_blocks.append(Block(*layers))
                channels = width
                skips.append(channels)
            if stage + 1 < len(widths):
                self.input_blocks.append(Block(Downsample(channels)))
                skips.append(channels)

        self.middle_block = Block(
            ResBlock(channels, channels, time_dim, groups),
            *self._transformer(channels, config.middle_transformer_depth, "middle_block.1", route.middle()),
            ResBlock(channels, channels, time_dim, groups),
        )

        self.output_blocks = nn.ModuleList()
        for stage, width in reversed(list(enumerate(widths))):
            for i in range(config.num_res_blocks + 1):
                name = f"output_blocks.{len(self.output_blocks)}"
                layers = [ResBlock(channels + skips.pop(), width, time_dim, groups)]
                last = i == config.num_res_blocks
                layers += self._transformer(width, config.transformer_depth[stage], f"{name}.1", route.up(stage, last))
                if stage and last:
                    layers += [Upsample(width)]
                self.output_blocks.append(Block(*layers))
                channels = width

        self.out = nn.Sequential(
            nn.GroupNorm(groups, channels),
            nn.SiLU(),
            zero_init(nn.Conv2d(channels, config.out_channels, 3, padding=1)),
        )

    def _transformer(self, channels: int, depth: int, name: str, stop: TextStop) -> list[nn.Module]:
        """Return the transformer of a block in a list, or an empty one where the stage has none."""
        if depth == 0:
            return []
        first = self.num_blocks
        self.num_blocks += depth
        return [SpatialTransformer(channels, depth, self.config, first, name, stop)]

    def forward(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict velocity, epsilon, v or sample, as the run decides.

        Args:
            latents: [B, C, H, W]; H and W multiples of 2^(stages - 1).
            timestep: [B], network time.
            conditioning: context [B, L, E]; pooled [B, G] where `config.pooled_dim` is set; `spatial` is
                concatenated to the latents.

        Returns:
            [B, out_channels, H, W].

        Raises:
            ValueError: shapes do not fit the config; see `admit` and `read_text`.
        """
        return self.run_blocks(latents, timestep, conditioning)

    def run_blocks(
        self,
        latents: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        residuals: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Run the network; `residuals` are a ControlNet's.

        Args:
            residuals: one tensor per entry of `input_blocks`, added to the skip it leaves behind, then one added to
                the features after `middle_block`; shapes as those features. Source: Zhang et al. 2023,
                arXiv:2302.05543, Section 3.2.
        """
        config = self.config
        latents = admit(config, latents, timestep, conditioning, 2 ** (len(config.channel_mult) - 1))
        if residuals is not None and len(residuals) != len(self.input_blocks) + 1:
            raise ValueError(
                f"residuals must be {len(self.input_blocks) + 1} tensors (one per input block, one for the middle), "
                f"got {len(residuals)}"
            )
        added: Iterator[Tensor] = iter(residuals or ())

        time = self.embed_time(timestep, conditioning.pooled)  # [B, 4 model_channels]
        companions = self._companions(time, conditioning)

        features = latents.to(time.dtype).contiguous(memory_format=torch.channels_last)
        skips = []
        for block in self.input_blocks:
            features, moved = block(features, companions)
            companions = companions.after(moved)
            skips.append(features)
        if residuals is not None:
            skips = [skip + next(added) for skip in skips]
        features, moved = self.middle_block(features, companions)
        companions = companions.after(moved)
        if residuals is not None:
            features = features + next(added)
        for block in self.output_blocks:
            features, moved = block(torch.cat([features, skips.pop()], dim=1), companions)
            companions = companions.after(moved)
        return self.out(features)  # [B, out_channels, H, W]

    def _companions(self, time: Tensor, conditioning: Conditioning) -> Companions:
        """Gather what the blocks are told besides the features."""
        config, states = self.config, None
        if config.injection != "pooled":
            states = read_text(config, conditioning, time.dtype)
        text = states
        if states is not None and config.injection == "cross" and config.text_projection == "per_encoder":
            text = project(self.context_embedder, states)
        pooled = conditioning.pooled if config.text_in_query else None
        first = None if config.injection == "joint" else text  # a level's entry brings the states in
        return Companions(time, states, first, {}, pooled, skipped_layers(self), attention_records(self))

    def embed_time(self, timestep: Tensor, pooled: Tensor | None) -> Tensor:
        """Embed network time [B] and, where the config has it, the pooled vector [B, G]: [B, 4 model_channels]."""
        embedding = timestep_embedding(timestep, self.config.model_channels)  # float32 [B, model_channels]
        time = self.time_embed(embedding.to(self.time_embed[0].weight.dtype))
        if self.config.pooled_dim is not None:
            assert pooled is not None  # `admit` saw to it
            time = time + self.label_emb(pooled.to(time.dtype))
        return time

    def unused_parameters(self) -> dict[str, str]:
        """Return {name: reason} of parameters that get no gradient: none."""
        return {}
