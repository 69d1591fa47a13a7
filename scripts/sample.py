"""Draw images with a trained run or with released weights.

    python scripts/sample.py runs/quickstart-s0 --prompt "a red circle"
    python scripts/sample.py --weights sd3_medium_incl_clips.safetensors --prompt "a red fox in the snow"

Writes one PNG per image (settings in its metadata) and, for several, a grid. Exit codes: 0; 2 wrong input; 3 bad
checkpoint; 4 out of memory; 130 interrupted. Which files go where for each released family: docs/weights.md.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from mmdit.config import SamplerName
from mmdit.registry import unknown
from mmdit.weights.header import WeightsError, refuse_unreadable


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Draw images with a trained run or with released weights."""

    run: Annotated[Path | None, tyro.conf.Positional] = None  # run folder or one checkpoint of ours
    prompt: tuple[str, ...] = ()  # one or several
    negative: str | None = None  # what to stay away from; default: the run's or release's null
    seed: int = 0  # of all noise
    num_images: int = 1  # per prompt
    steps: int | None = None  # default: the run's or release's own
    sampler: str | None = None  # euler, heun, ddim, ddpm, dpmpp_2m, dpmpp_2m_sd35
    guidance: float | None = None  # guidance_scale; 1 is off
    negative_guidance: str | None = None  # cfg, skip_layer, nag, kv_subtract or none
    size: str | None = None  # HEIGHTxWIDTH in pixels, or one number
    weights: str = "ema"  # with a run: ema or raw; without: path of released weights (file or diffusers folder)
    out: Path = Path("samples")  # folder
    device: str | None = None  # cuda, cuda:1, cpu; default: cuda where there is one
    batch_size: int | None = None  # images at once; default: 1 with released weights
    dry_run: bool = False  # released weights: say what each part takes in memory, and stop
    vae: Path | None = None  # released weights: the VAE, where it is not in --weights
    text: tuple[str, ...] = ()  # released weights: text encoders: a path, or clip_l=PATH clip_g=PATH t5=PATH
    spiece: Path | None = None  # T5's spiece.model
    family: str | None = None  # sd3, sd3.5_medium, sd3.5_large, sd3.5_large_turbo, sd1.5, sdxl; default: found
    dtype: Literal["fp32", "bf16", "fp16"] | None = None  # default: bf16 on an accelerator, fp32 on the CPU
    offload: Literal["none", "encoders", "blocks"] | None = None  # default: what fits the device
    tables: bool = False  # free the adaLN weights while sampling
    t5_length: int | None = None  # tokens of T5; 77 by default, 256 as in diffusers
    skip_layer: bool = False  # the release's skip-layer guidance (SD3.5 medium)
    original_size: str | None = None  # SDXL: HEIGHTxWIDTH it is told the picture had
    crop: str | None = None  # SDXL: TOPxLEFT of the cut it is told
    target_size: str | None = None  # SDXL: HEIGHTxWIDTH it is told to draw


if __name__ == "__main__":
    arguments = tyro.cli(Arguments)
    if arguments.sampler is not None and arguments.sampler not in get_args(SamplerName):
        sys.exit(print(unknown("sampler", arguments.sampler, get_args(SamplerName)), file=sys.stderr) or 2)
    if not arguments.prompt and not arguments.dry_run:
        sys.exit(print('give at least one --prompt "..."', file=sys.stderr) or 2)
    try:
        refuse_unreadable(arguments.weights)
    except WeightsError as error:
        sys.exit(print(error, file=sys.stderr) or 2)
    from mmdit.pipeline import sample_to_folder  # torch from here on

    sys.exit(sample_to_folder(**vars(arguments)))
