"""Draw images with a trained run: python scripts/sample.py runs/quickstart-s0 --prompt "a red circle".

Writes one PNG per image (settings in its metadata) and, for several, a grid.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, get_args

import tyro

from mmdit.config import SamplerName
from mmdit.registry import unknown


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Draw images with a trained run."""

    run: Annotated[Path, tyro.conf.Positional]  # run folder or one checkpoint
    prompt: tuple[str, ...]  # one or several
    negative: str | None = None  # what to stay away from; default: the run's null
    seed: int = 0  # of all noise
    num_images: int = 1  # per prompt
    steps: int | None = None  # default: the run's sampling.num_steps
    sampler: str | None = None  # euler, heun, ddim, ddpm, dpmpp_2m, dpmpp_2m_sd35
    guidance: float | None = None  # guidance_scale; 1 is off
    size: int | None = None  # pixels a side
    weights: str = "ema"  # ema or raw
    out: Path = Path("samples")  # folder


if __name__ == "__main__":
    arguments = tyro.cli(Arguments)
    if arguments.sampler is not None and arguments.sampler not in get_args(SamplerName):
        sys.exit(print(unknown("sampler", arguments.sampler, get_args(SamplerName)), file=sys.stderr) or 2)
    from mmdit.pipeline import sample_to_folder  # torch from here on

    sys.exit(sample_to_folder(**vars(arguments)))
