"""AutoencoderKL: pixels to latents and back. Shift and scale of latents live here and nowhere else.

The layout, and so every parameter name, is that of the original releases (`encoder.down.0.block.0.norm1`, ...), which
SD1, SDXL and SD3 share; the embedded `tiny` VAE is the same class with a pixel-unshuffle stem, which on a CPU gives
the same quality in a fraction of the time (the full-resolution stages are the slow ones).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch import Tensor, nn

from mmdit.config import ConfigError, EncodersConfig, VAEConfig
from mmdit.weights import vae as layout

TINY = Path(__file__).parent / "tiny" / "vae.safetensors"


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
        hidden = self.mid(self.conv_in(raw_latents))
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
        # not persistent: released files hold no such keys, ours carry them in the config
        self.register_buffer("shift", _per_channel(config.shift), persistent=False)
        self.register_buffer("scale", _per_channel(config.scale), persistent=False)
        self.to(memory_format=torch.channels_last)

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
        hidden = self.encoder(pixels.contiguous(memory_format=torch.channels_last))  # [B, 2C, H, W]
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

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels [B, 3, R, R] of latents [B, C, H, W] as `encode` gives them.

        In [-1, 1] where `config.clamp` says so (tiny); released VAEs overshoot a little, as they always did.
        """
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(f"expected latents [B, {self.config.latent_channels}, H, W], got {list(latents.shape)}")
        pixels = self.decode_raw(self.denormalise(latents))
        return pixels.clamp(-1.0, 1.0) if self.config.clamp else pixels

    def decode_raw(self, raw_latents: Tensor) -> Tensor:
        """Return pixels [B, 3, R, R], not clamped, of raw latents [B, C, H, W]."""
        raw_latents = raw_latents.contiguous(memory_format=torch.channels_last)
        return self.decoder(self.post_quant_conv(raw_latents) if self.config.use_quant_conv else raw_latents)

    def normalise(self, raw_latents: Tensor) -> Tensor:
        """Return (raw_latents - shift) * scale."""
        return (raw_latents - self.shift.to(raw_latents.dtype)) * self.scale.to(raw_latents.dtype)

    def denormalise(self, latents: Tensor) -> Tensor:
        """Return latents / scale + shift."""
        return latents / self.scale.to(latents.dtype) + self.shift.to(latents.dtype)


def _per_channel(value: float | tuple[float, ...]) -> Tensor:
    """Return [1, C or 1, 1, 1], float32."""
    return torch.tensor(value, dtype=torch.float32).reshape(1, -1, 1, 1)


def sample(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Draw raw latents from the posterior with given standard normal noise; all [B, C, H, W]."""
    return mean + torch.exp(0.5 * logvar) * noise


class VAELoss(NamedTuple):
    """The parts of the loss, each a scalar: `total` is what is minimised."""

    total: Tensor
    squared: Tensor  # mean over pixels
    absolute: Tensor  # mean over pixels
    kl: Tensor  # mean over latent numbers, nats


def vae_loss(
    vae: AutoencoderKL,
    pixels: Tensor,
    noise: Tensor,
    weight: Tensor | None = None,
    *,
    squared: float = 10.0,
    absolute: float = 1.0,
    kl: float = 1e-4,
) -> VAELoss:
    """Return reconstruction plus Kullback-Leibler loss.

    Args:
        pixels: [B, 3, R, R] in [-1, 1].
        noise: standard normal [B, C, H, W].
        weight: [B, 1, R, R], of each pixel's error; None: 1 each.
        squared, absolute, kl: weights of the three parts.

    Source: Kingma and Welling 2014, arXiv:1312.6114, Eq. 10; weight of the KL as in Rombach et al. 2022.
    Departs: Rombach et al. add a perceptual and an adversarial term; flat pictures do without, and the squared error
    is what PSNR measures.
    """
    mean, logvar = vae.moments(pixels)
    mean, logvar = mean.float(), logvar.float()  # exp and the KL sum in float32 under autocast
    error = vae.decode_raw(sample(mean, logvar, noise)).float() - pixels  # [B, 3, R, R]
    weight = torch.ones_like(error[:, :1]) if weight is None else weight
    divergence = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    parts = (error.square() * weight).mean(), (error.abs() * weight).mean()
    return VAELoss(squared * parts[0] + absolute * parts[1] + kl * divergence, *parts, divergence)


def to_pixels(images: Any) -> Tensor:
    """Turn images uint8 [B, R, R, 3] (numpy) into pixels float32 [B, 3, R, R] in [-1, 1]."""
    return rearrange(torch.as_tensor(images), "B H W C -> B C H W").float() / 127.5 - 1.0


def to_images(pixels: Tensor) -> Any:
    """Turn pixels [B, 3, R, R] into images uint8 [B, R, R, 3] (numpy), rounded to the nearest, clipped."""
    scaled = (pixels.detach().float() * 127.5 + 127.5).round().clamp(0, 255)
    return rearrange(scaled, "B C H W -> B H W C").to(torch.uint8).cpu().numpy()


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKL, batches: Iterable[Any], posterior: bool = False
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return per-channel mean and 1 / standard deviation of raw latents: what `shift` and `scale` are to be.

    Args:
        batches: images, uint8 [N, R, R, 3] each.
        posterior: of latents drawn from the posterior, whose own variance then counts too; else of its means, which
            are what runs learn from (`mmdit.data.cache`).
    """
    means, variances = [], []
    for images in batches:
        mean, logvar = vae.moments(to_pixels(images))
        means.append(mean.double())
        variances.append(logvar.double().exp() if posterior else torch.zeros((), dtype=torch.float64).expand_as(mean))
    mean, variance = torch.cat(means), torch.cat(variances)
    std = (mean.var(dim=(0, 2, 3)) + variance.mean(dim=(0, 2, 3))).sqrt()
    shift = tuple(round(value, 5) for value in mean.mean(dim=(0, 2, 3)).tolist())
    return shift, tuple(round(1.0 / value, 5) for value in std.tolist())


def load_run_vae(encoders: EncodersConfig) -> AutoencoderKL:
    """Load the VAE of a run, with the run's own shift and scale of latents where it states them.

    Raises:
        ConfigError: they were measured on a VAE with another number of channels.
    """
    vae = load_vae(encoders.vae)
    channels = vae.config.latent_channels
    chosen: dict[str, Any] = {}
    for name, value in (("shift", encoders.latent_shift), ("scale", encoders.latent_scale)):
        if isinstance(value, tuple) and len(value) != channels:
            raise ConfigError(
                f"encoders.latent_{name} has {len(value)} numbers, the VAE {encoders.vae!r} has {channels} channels; "
                f"set it to null, or to what `python scripts/cache.py CONFIG --statistics` prints"
            )
        if value is not None:
            chosen[name] = value
    return load_vae(encoders.vae, **chosen) if chosen else vae


def load_vae(path: str | Path = "tiny", **overrides: Any) -> AutoencoderKL:
    """Load a VAE, in evaluation mode and float32.

    Args:
        path: "tiny" (the embedded one), a .safetensors file (ours, a bare VAE or a whole checkpoint of SD1, SDXL or
            SD3) or a diffusers folder (the VAE's own, or one that has a folder `vae`).
        overrides: fields of VAEConfig that the file does not tell or tells wrongly, such as `norm_groups=` or `scale=`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no VAE, or its keys do not fit; missing and unexpected ones are listed.
    """
    file, folder_config = TINY if str(path) == "tiny" else Path(path), None
    if file.is_dir():
        file, folder_config = layout.in_folder(file)
    if not file.is_file():
        raise FileNotFoundError(
            f"no VAE at {file}; give 'tiny', a .safetensors file or a diffusers folder (the tiny one is made by "
            "`python -m mmdit.train.tiny_vae`)"
        )
    with safe_open(file, framework="pt") as opened:
        stored = (opened.metadata() or {}).get("config")
        keys = list(opened.keys())
        prefix, kind = layout.find_prefix(keys, file), layout.release_of(keys)
        state = {key[len(prefix) :]: opened.get_tensor(key).float() for key in keys if key.startswith(prefix)}
    state = layout.to_original(state)
    if stored is not None and "block_channels" in stored:
        fields = json.loads(stored)
    else:
        fields = layout.infer_fields(state, folder_config, kind)
    vae = AutoencoderKL(VAEConfig(**{**fields, **overrides}))
    missing, unexpected = vae.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"{file} does not fit {vae.config}: missing {missing}, unexpected {unexpected}")
    return vae.eval().requires_grad_(False)
