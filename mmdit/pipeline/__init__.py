"""Room: prompts to images. `TextToImage` assembles encoders, denoiser, sampler and VAE; the rest is what it needs."""

from __future__ import annotations

from mmdit.pipeline.folder import sample_to_folder
from mmdit.pipeline.machine import configure_cpu
from mmdit.pipeline.pictures import image_grid, save_image, to_pil
from mmdit.pipeline.request import Sizes
from mmdit.pipeline.runs import load_encoders
from mmdit.pipeline.text_to_image import Stopped, TextToImage

__all__ = [
    "Sizes",
    "Stopped",
    "TextToImage",
    "configure_cpu",
    "image_grid",
    "load_encoders",
    "sample_to_folder",
    "save_image",
    "to_pil",
]
