"""The released families: everything about a released model that its weights do not say.

Noise, prediction, sampler, grid, steps and guidance of each release, what stands for "no text", the native size, and
which files hold its parts. A literal table; `TextToImage.load` reads it and nothing else knows these numbers.

Sources: the releases' own inference code (Stability-AI/sd3-ref and Stability-AI/sd3.5 for the SD3 families,
Stability-AI/generative-models for SDXL, the Stable Diffusion v1.5 model card) and the scheduler configs of their
diffusers folders. Where these disagree, the comment says which one is followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mmdit.config import (
    DiffusionConfig,
    EncodersConfig,
    RectifiedFlowConfig,
    SamplingConfig,
    VariancePreservingConfig,
)
from mmdit.registry import lookup
from mmdit.sampling import SkipLayerGuidance


@dataclass(frozen=True)
class Release:
    """One released family.

    Attributes:
        name: as `mmdit.weights.detect` calls it.
        title: as people call it.
        text: whose text rules and latents: a family of `load_text_encoders` and of `load_vae`, which know the scale of
            latents.
        diffusion: noise and prediction. Its density is not read: nothing is trained here.
        sampling: defaults of every picture.
        null: what stands for "no text" where there is no negative prompt.
        empty_is_null: whether a negative prompt "" also means the null, instead of the encoded empty caption.
        size: native pixels a side.
        towers: text encoders; those of `optional` may be left out and are then zeros.
        files: part -> where the release keeps it, for messages.
        sizes: whether the pooled text is followed by six embedded sizes (SDXL's micro-conditioning).
        skip_layer: the release's skip-layer guidance; off unless asked for.
    """

    name: str
    title: str
    text: Literal["sd3", "sd1.5", "sdxl"]
    diffusion: DiffusionConfig
    sampling: SamplingConfig
    null: Literal["zeros", "empty_caption"]
    size: int
    towers: tuple[str, ...]
    files: Mapping[str, str]
    optional: tuple[str, ...] = ()
    empty_is_null: bool = False
    sizes: bool = False
    skip_layer: SkipLayerGuidance | None = field(default=None)

    @property
    def encoders(self) -> EncodersConfig:
        """Padding and null as the pipeline reads them: released models attend to padding."""
        return EncodersConfig(padding="attend", null=self.null)


_SD3_TEXT = {
    "clip_l": "text_encoders/clip_l.safetensors",
    "clip_g": "text_encoders/clip_g.safetensors",
    "t5": "text_encoders/t5xxl_fp16.safetensors (or t5xxl_fp8_e4m3fn.safetensors)",
}
_FLOW = DiffusionConfig(schedule=RectifiedFlowConfig(shift=3.0), prediction="velocity")
_CHAIN = DiffusionConfig(schedule=VariancePreservingConfig(), prediction="epsilon")  # the betas of Stable Diffusion


def _sd3(name: str, title: str, file: str, sampling: SamplingConfig, skip: SkipLayerGuidance | None = None) -> Release:
    """The four SD3 families differ in the denoiser's shapes and in how they are sampled."""
    return Release(
        name=name,
        title=title,
        text="sd3",
        diffusion=_FLOW,
        sampling=sampling,
        null="empty_caption",
        size=1024,
        towers=("clip_l", "clip_g", "t5"),
        optional=("t5",),
        files={"denoiser": file, "vae": f"{file} (its first_stage_model part), or vae/ of its diffusers folder"}
        | _SD3_TEXT,
        skip_layer=skip,
    )


def _release_grid(sampler: str, num_steps: int, guidance_scale: float) -> SamplingConfig:
    return SamplingConfig.model_validate(
        {"sampler": sampler, "grid": "release", "num_steps": num_steps, "guidance_scale": guidance_scale}
    )


RELEASES: dict[str, Release] = {
    release.name: release
    for release in (
        # sd3-ref: Euler, guidance 5, "50 steps, 28 quite decent"; diffusers' default is 28 steps with guidance 7.
        _sd3("sd3", "SD3 medium", "sd3_medium.safetensors", _release_grid("euler", 28, 5.0)),
        # Stability-AI/sd3.5, CONFIGS and the skip-layer block of its main(); the guidance 4.0 that stands beside the
        # skip-layer numbers there is assigned after the scale was read and never used.
        _sd3(
            "sd3.5_medium",
            "SD3.5 medium",
            "sd3.5_medium.safetensors",
            _release_grid("dpmpp_2m_sd35", 50, 5.0),
            SkipLayerGuidance(scale=2.5, layers=(7, 8, 9), start=0.01, end=0.20),
        ),
        _sd3("sd3.5_large", "SD3.5 large", "sd3.5_large.safetensors", _release_grid("dpmpp_2m_sd35", 40, 4.5)),
        _sd3(
            "sd3.5_large_turbo",
            "SD3.5 large turbo",
            "sd3.5_large_turbo.safetensors",
            _release_grid("euler", 4, 1.0),
        ),
        Release(
            name="sd1.5",
            title="Stable Diffusion 1.5",
            text="sd1.5",
            diffusion=_CHAIN,
            # 50 steps at 981, 961, ..., 1, guidance 7.5. DDIM without noise, which Euler equals here.
            sampling=_release_grid("ddim", 50, 7.5),
            null="empty_caption",
            size=512,
            towers=("clip_l",),
            files={
                "denoiser": "v1-5-pruned-emaonly.safetensors",
                "vae": "v1-5-pruned-emaonly.safetensors (its first_stage_model part)",
                "clip_l": "v1-5-pruned-emaonly.safetensors (its cond_stage_model part)",
            },
        ),
        Release(
            name="sdxl",
            title="Stable Diffusion XL base",
            text="sdxl",
            diffusion=_CHAIN,
            sampling=_release_grid("euler", 50, 5.0),
            null="zeros",
            empty_is_null=True,  # generative-models: force_uc_zero_embeddings for an empty negative prompt
            size=1024,
            towers=("clip_l", "clip_g"),
            sizes=True,
            files={
                "denoiser": "sd_xl_base_1.0.safetensors",
                "vae": "sd_xl_base_1.0.safetensors (its first_stage_model part)",
                "clip_l": "sd_xl_base_1.0.safetensors (its conditioner.embedders.0 part)",
                "clip_g": "sd_xl_base_1.0.safetensors (its conditioner.embedders.1 part)",
            },
        ),
    )
}


def find_release(family: str) -> Release:
    """Return the release of a family.

    Raises:
        ValueError: unknown family; the nearest name stands in the message.
    """
    return lookup(RELEASES, family, "released family")
