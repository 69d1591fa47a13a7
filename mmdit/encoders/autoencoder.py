"""AutoencoderKL: pixels to latents and back. Shift and scale of latents live here and nowhere else.

The layout, and so every parameter name, is that of the original releases (`encoder.down.0.block.0.norm1`, ...), which
SD1, SDXL and SD3 share; the embedded `tiny` VAE is the same class with a pixel-unshuffle stem, which on a CPU gives
the same quality in a fraction of the time (the full-resolution stages are the slow ones).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mmdit.config import VAEConfig
from mmdit.encoders.tiling import blend_tiles


def _norm(channels: int, config: VAEConfig) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """norm, SiLU, 3x3 convolution, twice, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, config: VAEConfig) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, config)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, config)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        out = self.conv1(F.silu(self.norm1(hidden)))
        out = self.conv2(F.silu(self.norm2(out)))
        shortcut = self.nin_shortcut(hidden) if hasattr(self, "nin_shortcut") else hidden
        return shortcut + out


class Attention(nn.Module):
    """One head over all positions; projections are 1x1 convolutions, as the releases store them."""

    def __init__(self, channels: int, config: VAEConfig) -> None:
        super().__init__()
        self.norm = _norm(channels, config)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        q, k, v = (rearrange(project(normed), "B C H W -> B 1 (H W) C") for project in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return hidden + self.proj_out(rearrange(out, "B 1 (H W) C -> B C H W", H=hidden.shape[2]))


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, config: VAEConfig) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, config)
        if config.mid_attention:
            self.attn_1 = Attention(channels, config)
        self.block_2 = ResBlock(channels, channels, config)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.block_1(hidden)
        if hasattr(self, "attn_1"):
            hidden = self.attn_1(hidden)
        return self.block_2(hidden)


class Downsample(nn.Module):
    """Halve both sides. Zeros are added on the right and at the bottom only: the releases were trained so."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(F.pad(hidden, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double both sides: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))


class Encoder(nn.Module):
    """Pixels [B, 3, R, R] -> mean and log-variance, concatenated [B, 2C, H, W]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.stem_patch = config.stem_patch
        widths = config.block_channels
        self.conv_in = nn.Conv2d(3 * config.stem_patch**2, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        channels = widths[0]
        for level, width in enumerate(widths):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(config.num_res_blocks):
                stage.block.append(ResBlock(channels, width, config))
                channels = width
            if level < len(widths) - 1:
                stage.downsample = Downsample(channels)
            self.down.append(stage)
        self.mid = Middle(channels, config)
        self.norm_out = _norm(channels, config)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = F.pixel_unshuffle(pixels, self.stem_patch) if self.stem_patch > 1 else pixels
        hidden = self.conv_in(hidden)
        for stage in self.down:
            for block in stage.block:
                hidden = block(hidden)
            if hasattr(stage, "downsample"):
                hidden = stage.downsample(hidden)
        return self.conv_out(F.silu(self.norm_out(self.mid(hidden))))


class Decoder(nn.Module):
    """Raw latents [B, C, H, W] -> pixels [B, 3, R, R]; the last layer is linear."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.stem_patch = config.stem_patch
        widths = config.block_channels
        channels = widths[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = Middle(channels, config)
        stages: list[nn.Module] = []
        for level, width in reversed(list(enumerate(widths))):
            stage = nn.Module()
            stage.block = nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                stage.block.append(ResBlock(channels, width, config))
                channels = width
            if level > 0:
                stage.upsample = Upsample(channels)
            stages.insert(0, stage)  # the releases number stages by resolution: up.0 is the last one to run
        self.up = nn.ModuleList(stages)
        self.norm_out = _norm(channels, config)
        self.conv_out = nn.Conv2d(channels, 3 * config.stem_patch**2, 3, padding=1)

    def forward(self, raw_latents: Tensor) -> Tensor:
        return self.upwards(self.middle(raw_latents))

    def middle(self, raw_latents: Tensor) -> Tensor:
        """Run what stays at the latents' resolution, attention included: [B, C, H, W] -> [B, width, H, W]."""
        return self.mid(self.conv_in(raw_latents))

    def upwards(self, hidden: Tensor) -> Tensor:
        """Run what raises the resolution: [B, width, H, W] -> pixels [B, 3, R, R]."""
        for stage in reversed(self.up):
            for block in stage.block:
                hidden = block(hidden)
            if hasattr(stage, "upsample"):
                hidden = stage.upsample(hidden)
        hidden = self.conv_out(F.silu(self.norm_out(hidden)))
        return F.pixel_shuffle(hidden, self.stem_patch) if self.stem_patch > 1 else hidden


class AutoencoderKL(nn.Module):
    """Autoencoder with a Gaussian posterior, kept near the standard normal by a small KL term.

    Source: Rombach et al. 2022, arXiv:2112.10752; shift of latents: Esser et al. 2024, arXiv:2403.03206.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.use_quant_conv:
            self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
            self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.make_statistics()
        self.to(memory_format=torch.channels_last)

    def make_statistics(self, device: torch.device | str | None = None) -> None:
        """Make shift and scale from the config, as buffers on `device`; whoever builds on the meta device calls it."""
        # not persistent: released files hold no such keys, ours carry them in the config
        for name, value in (("shift", self.config.shift), ("scale", self.config.scale)):
            numbers = torch.tensor(value, dtype=torch.float32, device=device)
            self.register_buffer(name, numbers.reshape(1, -1, 1, 1), persistent=False)  # [1, C or 1, 1, 1]

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encode.

        Args:
            pixels: [B, 3, R, R] in [-1, 1]; both sides multiples of `config.factor`.

        Returns:
            mean and log-variance of the raw latents, each [B, C, H, W]; the latter in [-30, 20].

        Raises:
            ValueError: the pixels have another shape.
        """
        factor = self.config.factor
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] % factor or pixels.shape[3] % factor:
            raise ValueError(
                f"expected pixels [B, 3, height, width] with sides that are multiples of {factor}, got "
                f"{list(pixels.shape)}"
            )
        pixels = pixels.to(self.encoder.conv_in.weight.dtype).contiguous(memory_format=torch.channels_last)
        hidden = self.encoder(pixels)  # [B, 2C, H, W]
        if self.config.use_quant_conv:
            hidden = self.quant_conv(hidden)
        mean, logvar = hidden.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return latents [B, C, H, W], shifted and scaled, of pixels [B, 3, R, R] in [-1, 1].

        Args:
            noise: standard normal [B, C, H, W]: draw from the posterior; None takes its mean.
        """
        mean, logvar = self.moments(pixels)
        return self.normalise(mean if noise is None else sample(mean, logvar, noise))

    def decode(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Return pixels [B, 3, R, R] of latents [B, C, H, W] as `encode` gives them.

        In [-1, 1] where `config.clamp` says so (tiny); released VAEs overshoot a little, as they always did.

        Args:
            tile: decode in overlapping tiles of this many latents a side, 8 or more, which bounds the memory of the
                high-resolution stages by that of one tile. None, or sides of at most `tile`: whole, exactly. The
                stages at the latents' resolution, attention among them, always see all latents; behind them each tile
                has the statistics of its own group norms, so that tiles differ a little in tone from the whole: see
                `tiling.blend_tiles` for how they are joined.

        Raises:
            ValueError: latents of another shape, or a tile below 8.
        """
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(f"expected latents [B, {self.config.latent_channels}, H, W], got {list(latents.shape)}")
        pixels = self.decode_raw(self.denormalise(latents), tile)
        return pixels.clamp(-1.0, 1.0) if self.config.clamp else pixels

    def decode_raw(self, raw_latents: Tensor, tile: int | None = None) -> Tensor:
        """Return pixels [B, 3, R, R], not clamped, of raw latents [B, C, H, W]; `tile` as in `decode`."""
        raw_latents = raw_latents.to(self.decoder.conv_in.weight.dtype).contiguous(memory_format=torch.channels_last)
        if self.config.use_quant_conv:
            raw_latents = self.post_quant_conv(raw_latents)
        if tile is None:
            return self.decoder(raw_latents)
        return blend_tiles(self.decoder.upwards, self.decoder.middle(raw_latents), tile, self.config.factor)

    def normalise(self, raw_latents: Tensor) -> Tensor:
        """Return (raw_latents - shift) * scale."""
        return (raw_latents - self.shift.to(raw_latents.dtype)) * self.scale.to(raw_latents.dtype)

    def denormalise(self, latents: Tensor) -> Tensor:
        """Return latents / scale + shift."""
        return latents / self.scale.to(latents.dtype) + self.shift.to(latents.dtype)


def sample(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Draw raw latents from the posterior with given standard normal noise; all [B, C, H, W]."""
    return mean + torch.exp(0.5 * logvar) * noise
