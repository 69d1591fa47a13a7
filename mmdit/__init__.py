"""mmdit: how should text enter a latent diffusion model? MMDiT and U-Net behind one door.

Public names are imported on first use, so that `import mmdit` costs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "Conditioning": "mmdit.denoiser",
    "build_denoiser": "mmdit.models",
    "load_config": "mmdit.config",
    "load_denoiser": "mmdit.weights.denoiser",
    "load_text_encoders": "mmdit.encoders.text",
    "load_vae": "mmdit.encoders.vae",
    "save_denoiser": "mmdit.weights.denoiser",
    "save_text_encoders": "mmdit.encoders.saving",
    "save_vae": "mmdit.encoders.vae",
    "TextToImage": "mmdit.pipeline",
}
__all__ = [
    "Conditioning",
    "TextToImage",
    "build_denoiser",
    "load_config",
    "load_denoiser",
    "load_text_encoders",
    "load_vae",
    "save_denoiser",
    "save_text_encoders",
    "save_vae",
]

if TYPE_CHECKING:
    from mmdit.config import load_config
    from mmdit.denoiser import Conditioning
    from mmdit.encoders.saving import save_text_encoders
    from mmdit.encoders.text import load_text_encoders
    from mmdit.encoders.vae import load_vae, save_vae
    from mmdit.models import build_denoiser
    from mmdit.pipeline import TextToImage
    from mmdit.weights.denoiser import load_denoiser, save_denoiser


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mmdit' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
