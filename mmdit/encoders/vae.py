"""The VAE in use: its loss, pictures in and out, the latents' statistics; loading and saving of every layout.

The network itself is `mmdit.encoders.autoencoder`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from mmdit.config import ConfigError, EncodersConfig, VAEConfig
from mmdit.encoders.autoencoder import AutoencoderKL, sample
from mmdit.registry import lookup
from mmdit.weights import vae as names
from mmdit.weights.files import WeightFiles, WeightsError, open_weights
from mmdit.weights.fit import check_shapes
from mmdit.weights.writing import write_weights

__all__ = [
    "TINY",
    "AutoencoderKL",
    "latent_statistics",
    "load_run_vae",
    "load_vae",
    "sample",
    "save_vae",
    "to_images",
    "to_pixels",
    "vae_loss",
]

TINY = Path(__file__).parent / "tiny" / "vae.safetensors"
_CHANNELS = 65_536  # of one level: SD3's VAE has 512
_COMPUTED = (torch.float32, torch.bfloat16, torch.float16)


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
    channels = _open(encoders.vae, None)[2]["latent_channels"]
    chosen: dict[str, Any] = {}
    for name, value in (("shift", encoders.latent_shift), ("scale", encoders.latent_scale)):
        if isinstance(value, tuple) and len(value) != channels:
            raise ConfigError(
                f"encoders.latent_{name} has {len(value)} numbers, the VAE {encoders.vae!r} has {channels} channels; "
                f"set it to null, or to what `python scripts/cache.py CONFIG --statistics` prints"
            )
        if value is not None:
            chosen[name] = value
    return load_vae(encoders.vae, **chosen)


def load_vae(
    path: str | Path = "tiny",
    *,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **overrides: Any,
) -> AutoencoderKL:
    """Load a VAE, in evaluation mode, tensor by tensor into its place.

    Args:
        path: "tiny" (the embedded one), a .safetensors file (ours, a bare VAE or a whole checkpoint of SD1.5, SDXL or
            SD3; fp32, fp16, bf16 or unscaled fp8) or a diffusers folder (the VAE's own, or one with a folder `vae`).
        family: `sd3`, `sd1.5` or `sdxl`, whose shift and scale of latents to take where the file does not tell. A bare
            VAE with 16 channels is taken for SD3's.
        dtype: of the weights; None: float32 (SDXL's overflows in float16).
        device: None: the CPU.
        overrides: fields of VAEConfig that the file does not tell or tells wrongly, such as `norm_groups=` or `scale=`;
            `latent_scale=` and `latent_shift=`, as a run's config calls them, mean `scale=` and `shift=`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no VAE, its keys do not fit (missing and unexpected ones are listed), or its scale is
            not known: SD1.5's and SDXL's have equal shapes.
    """
    dtype, device = dtype or torch.float32, torch.device(device or "cpu")
    if dtype not in _COMPUTED:
        raise ValueError(f"a VAE cannot run in {dtype}; choose {', '.join(map(str, _COMPUTED))}")
    for name in ("shift", "scale"):
        if f"latent_{name}" in overrides:
            overrides[name] = overrides.pop(f"latent_{name}")
    files, sources, fields = _open(path, family)
    fields = {**fields, **overrides}
    if "scale" not in fields:
        known = ", ".join(f"family={name!r} ({values['scale']})" for name, values in names.LATENT_STATISTICS.items())
        raise WeightsError(
            f"{files.path} is a VAE with {fields['latent_channels']} latent channels, and nothing beside it tells the "
            f"scale of its latents: SD1.5's and SDXL's have the same shapes. Pass {known} or latent_scale="
        )
    with torch.device("meta"):
        vae = AutoencoderKL(VAEConfig(**fields))
    expected = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    found = {name: names.original_shape(name, files.shape(key)) for name, key in sources.items()}
    check_shapes("the VAE that its shapes describe", files.path, expected, found)
    state = {}
    # tensors go through one buffer into the network's memory format: one of their own each fragments the heap to double
    buffer = torch.empty(max(math.prod(shape) for shape in expected.values()), dtype=dtype, device=device)
    for name, shape in expected.items():
        read = files.read_into(sources[name], buffer[: math.prod(shape)].view(files.shape(sources[name])))
        memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        state[name] = torch.empty(shape, dtype=dtype, device=device, memory_format=memory_format)
        state[name].copy_(read.view(shape))
    vae.load_state_dict(state, strict=True, assign=True)
    vae.make_statistics(device)
    return vae.eval().requires_grad_(False)


def _open(path: str | Path, family: str | None) -> tuple[WeightFiles, dict[str, str], dict[str, Any]]:
    """Open a VAE: its files, {our name: key}, and the fields of VAEConfig they tell (`scale` not always)."""
    if family is not None:
        lookup(names.LATENT_STATISTICS, family, "family of VAEs")
    tiny = str(path) == "tiny"
    try:
        files = open_weights(TINY if tiny else path, ("vae",))
    except FileNotFoundError as error:
        hint = "the tiny one is made by `python -m mmdit.train.tiny_vae`"
        raise FileNotFoundError(
            f"no VAE at {path}: {error}; give 'tiny', a .safetensors file or a diffusers folder ({hint})"
        ) from error
    sources = names.name_sources(files)
    stored = files.metadata.get("config")
    if stored is not None and "block_channels" in stored:
        return files, sources, _stored_fields(files.path, stored, sources)
    shapes = {name: names.original_shape(name, files.shape(key)) for name, key in sources.items()}
    return files, sources, names.infer_fields(shapes, _folder_config(files), family or names.release_of(files))


def _stored_fields(path: Path, stored: str, sources: Mapping[str, str]) -> dict[str, Any]:
    """Read the config that `save_vae` wrote into a header: numbers of blocks that the file does not have are told.

    Raises:
        WeightsError: it is no config of a VAE.
    """
    try:
        fields = json.loads(stored)
        config = VAEConfig(**fields)
        depth = len(config.block_channels) * config.num_res_blocks
        if depth > len(sources) or min(depth, *config.block_channels) < 1 or max(config.block_channels) > _CHANNELS:
            raise ValueError(f"{config.num_res_blocks} blocks in each of {config.block_channels!s:.80}")
    except (ValueError, TypeError, RecursionError) as error:
        raise WeightsError(f"{path} has a config in its header that is none of a VAE ({error!s:.200})") from error
    return dict(fields)


def _folder_config(files: WeightFiles) -> dict[str, Any] | None:
    """Return the config.json beside the weights: of a folder always, of a single file where it is a VAE's."""
    config = files.config
    if files.path.is_dir() or (config or {}).get("_class_name") == "AutoencoderKL":
        return config
    return None


def save_vae(
    vae: AutoencoderKL, path: str | Path, layout: str = "original", *, dtype: torch.dtype | None = None
) -> Path:
    """Save a VAE in a released layout; the bits of its weights do not change.

    Args:
        path: `original`: a .safetensors file, its names bare, our config (with the scale) in its header. `diffusers`: a
            folder, which diffusers' AutoencoderKL reads.
        layout: `original` or `diffusers`.
        dtype: what weights are converted to; None keeps theirs.

    Returns:
        The file of weights.

    Raises:
        ValueError: an unknown layout, or what diffusers' has no words for.
    """
    state: Mapping[str, Tensor] = {key: tensor.contiguous() for key, tensor in vae.state_dict().items()}
    if lookup({"original": False, "diffusers": True}, layout, "layout"):
        config = names.diffusers_config(vae.config)
        file = Path(path) / "diffusion_pytorch_model.safetensors"
        write_weights(names.to_diffusers(state), file, dtype=dtype)
        (Path(path) / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return file
    return write_weights(state, path, metadata={"config": vae.config.model_dump_json()}, dtype=dtype)[0]
