"""Released weights to a pipeline's parts: `TextToImage(**load_released(path))`."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmdit.diffusion import build_schedule
from mmdit.encoders.released import tokenizer_paths
from mmdit.encoders.text import TextEncoders, load_text_encoders
from mmdit.encoders.vae import AutoencoderKL, load_vae
from mmdit.pipeline.memory import MemoryPlan, plan_memory
from mmdit.pipeline.offload import BlockStream, Offload, Part, check_level, choose_level
from mmdit.pipeline.sources import Sources, TextPaths, find_sources
from mmdit.registry import lookup
from mmdit.weights.denoiser import load_denoiser
from mmdit.weights.text_files import find_text

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_dtypes(sources: Sources, dtype: str | None, device: torch.device) -> dict[str, torch.dtype]:
    """Return what each part is held in: `dtype`, by default bf16 on an accelerator and fp32 on the CPU.

    The VAE is held in fp32 where the rest is fp16: SDXL's and SD3's overflow in it, as their configs say.
    """
    chosen = lookup(DTYPES, dtype or ("fp32" if device.type == "cpu" else "bf16"), "dtype")
    return {
        name: torch.float32 if name == "vae" and chosen == torch.float16 else chosen
        for name in ("denoiser", "vae", "clip_l", "clip_g", "t5")
    }


def plan_released(
    path: str | Path,
    *,
    device: torch.device,
    vae: Any = None,
    text: Any = None,
    family: str | None = None,
    dtype: str | None = None,
    offload: str | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[MemoryPlan, Offload]:
    """Return what `load_released` would take and the offload level it would choose; headers only."""
    sources = find_sources(path, vae, text, family, overrides)
    plan = plan_memory(sources, choose_dtypes(sources, dtype, device))
    level = check_level(offload, device) if offload else choose_level(plan.text_bytes, plan.other_bytes, device)
    return plan, level


def load_released(
    path: str | Path,
    *,
    device: torch.device,
    vae: AutoencoderKL | str | Path | None = None,
    text: TextEncoders | TextPaths | None = None,
    family: str | None = None,
    dtype: str | None = None,
    offload: str | None = None,
    tables: bool = False,
    spiece: str | Path | None = None,
    t5_length: int = 77,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    lazy: bool = False,
) -> dict[str, Any]:
    """Load released weights; the arguments of `TextToImage`.

    Args:
        path: a .safetensors file (all in one, or the denoiser alone), a sharded set, or a diffusers folder.
        vae, text: loaded encoders or paths, for parts that `path` lacks; `text` also {"clip_l": path, ...}. T5 may be
            missing: SD3 then reads zeros in its place.
        family: where the weights do not tell it; SD3.5-large-turbo has large's shapes, and is told by its name alone.
        dtype: `fp32`, `bf16` or `fp16`; by default bf16 on an accelerator, fp32 on the CPU.
        offload: `none`, `encoders` or `blocks`, see `mmdit.pipeline.offload`; by default what fits the device.
        tables: answer adaLN from tables while sampling.
        spiece: T5's `spiece.model`, where it does not lie beside its weights.
        t5_length: tokens of the T5 stream: 77 as in the paper; 256 is diffusers' default.
        overrides: {part: config fields} that shapes do not tell, such as {"denoiser": {"num_heads": 8}}.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, a missing part, T5 without its vocabulary, an unknown family, dtype or level.
    """
    overrides = overrides or {}
    loaded_vae = vae if isinstance(vae, AutoencoderKL) else None
    loaded_text = text if isinstance(text, TextEncoders) else None
    sources = find_sources(
        path,
        vae if not isinstance(vae, AutoencoderKL) else None,
        text if not isinstance(text, TextEncoders) else None,
        family,
        overrides,
        need_vae=loaded_vae is None,
        need_text=loaded_text is None,
    )
    release, dtypes = sources.release, choose_dtypes(sources, dtype, device)
    plan = plan_memory(sources, dtypes)
    level = check_level(offload, device) if offload else choose_level(plan.text_bytes, plan.other_bytes, device)
    if tables and level == "blocks":
        raise ValueError("tables and offload 'blocks' do not go together: streamed blocks bring their adaLN weights")
    if loaded_text is None:
        _check_vocabulary(sources, spiece)
    if sources.missing:
        logger.warning(
            "%s without %s: its tokens are zeros, as the release was trained to bear. Its weights are %s",
            release.title,
            ", ".join(sources.missing),
            "; ".join(release.files[name] for name in sources.missing),
        )

    def fetch_denoiser() -> nn.Module:
        place = torch.device("cpu") if level == "blocks" else device
        denoiser = load_denoiser(
            sources.denoiser, dtype=dtypes["denoiser"], device=place, **overrides.get("denoiser", {})
        )
        denoiser = denoiser.eval().requires_grad_(False)
        if level == "blocks":
            BlockStream(denoiser, device)
        return denoiser

    def fetch_text() -> TextEncoders:
        return load_text_encoders(
            sources.text,
            family=release.text,
            t5_length=t5_length,
            use=[name for name in release.towers if name in sources.parts],
            tokenizers=None if spiece is None else {"t5": spiece},
            dtype=dtypes["clip_l"],
            device=torch.device("cpu") if level == "blocks" else device,
            clip_l=overrides.get("clip_l"),
            clip_g=overrides.get("clip_g"),
            t5=overrides.get("t5"),
        )

    def fetch_vae() -> AutoencoderKL:
        fields = overrides.get("vae", {})
        return load_vae(sources.vae, family=release.text, dtype=dtypes["vae"], device=device, **fields)

    parts: dict[str, Any] = {
        "denoiser": Part(fetch=fetch_denoiser),
        "text": Part(loaded_text) if loaded_text is not None else Part(fetch=fetch_text),
    }
    if level == "none" and not lazy:
        for part in parts.values():
            part.get()
    return {
        **parts,
        "vae": loaded_vae if loaded_vae is not None else fetch_vae(),
        "schedule": build_schedule(release.diffusion.schedule),
        "prediction": release.diffusion.prediction,
        "sampling": release.sampling,
        "encoders": release.encoders,
        "precision": next(name for name, value in DTYPES.items() if value == dtypes["denoiser"]),
        "size": release.size,
        "provenance": _provenance(sources, level),
        "release": release,
        "device": device,
        "offload": level,
        "tables": tables,
        "model_config": sources.config,
    }


def _check_vocabulary(sources: Sources, spiece: str | Path | None) -> None:
    """Say before gigabytes are read that T5 has no vocabulary.

    Raises:
        FileNotFoundError: `spiece` is not there.
        ValueError: T5 is there without one.
    """
    if spiece is not None and not Path(spiece).exists():
        raise FileNotFoundError(f"no T5 vocabulary {spiece}; it is tokenizer_3/spiece.model of the diffusers folder")
    if "t5" not in sources.parts or spiece is not None:
        return
    if "t5" not in tokenizer_paths(find_text(sources.text, sources.release.text), ("t5",), None):
        raise ValueError(
            f"{sources.release.title} with T5 needs T5's vocabulary, which its weights do not hold: give spiece= "
            f"(--spiece) the path of tokenizer_3/spiece.model of the diffusers folder (google/t5-v1_1-xxl has the same "
            f"one), or put spiece.model beside the weights; or leave T5 out: text={{'clip_l': PATH, 'clip_g': PATH}} "
            f"(--text clip_l=PATH clip_g=PATH)"
        )


def _provenance(sources: Sources, level: Offload) -> dict[str, Any]:
    """Say in a picture's metadata which weights made it: family, file names, sizes, and a hash of the header."""
    files = sources.parts["denoiser"].files
    header = "\n".join(f"{key} {files.shape(key)} {files.dtype(key)}" for key in files)
    return {
        "release": sources.release.name,
        "weights_file": ", ".join(file.name for file in files.files),
        "weights_bytes": sum(file.stat().st_size for file in files.files),
        "weights_header_sha256": hashlib.sha256(header.encode()).hexdigest(),
        "text_encoders": [name for name in sources.parts if name not in ("denoiser", "vae")],
        "schedule": sources.release.diffusion.schedule.model_dump(),
        "offload": level,
    }
