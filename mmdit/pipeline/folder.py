"""Prompts to a folder of pictures: what scripts/sample.py does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from mmdit.checkpoint import CheckpointError
from mmdit.pipeline.machine import configure_cpu
from mmdit.pipeline.pictures import image_grid, save_image
from mmdit.pipeline.text_to_image import TextToImage
from mmdit.registry import unknown
from mmdit.sampling import SAMPLERS


def sample_to_folder(
    run: Path,
    prompt: Sequence[str],
    negative: str | None = None,
    seed: int = 0,
    num_images: int = 1,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    size: int | None = None,
    weights: str = "ema",
    out: Path = Path("samples"),
) -> int:
    """Draw `num_images` images of each prompt into a folder, settings in each PNG: what scripts/sample.py does.

    Returns:
        Exit code: 0; 2 for a run, name or size that is not there (the message is on stderr); 3 for a bad checkpoint.
    """
    if sampler is not None and sampler not in SAMPLERS:  # before anything is loaded
        print(unknown("sampler", sampler, SAMPLERS), file=sys.stderr)
        return 2
    try:
        configure_cpu()
        pipeline = TextToImage.load(run, weights)
        prompts = [text for text in prompt for _ in range(num_images)]
        options = {"seed": seed, "num_steps": steps, "sampler": sampler, "guidance_scale": guidance, "size": size}
        with tqdm(total=len(prompts), unit=" images") as bar:
            images = pipeline(prompts, negative, progress=bar.update, **options)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 3
    for index, (text, image) in enumerate(zip(prompts, images, strict=True)):
        settings = pipeline.settings(prompt=text, negative_prompt=negative, index=index, **options)
        save_image(image, out / f"{index:05d}.png", settings)
    if len(images) > 1:
        save_image(image_grid(images), out / "grid.png", pipeline.settings(prompts=list(prompt), **options))
    print(f"{len(images)} image(s) in {out}")
    return 0
