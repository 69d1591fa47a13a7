"""What happens between updates besides saving: the loss at fixed levels of t, and pictures of fixed prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from mmdit import rng
from mmdit.data.buckets import groups_of
from mmdit.diffusion import equidistant_levels, loss_by_level
from mmdit.pipeline import Stopped, TextToImage, image_grid, save_image
from mmdit.train.run import Run, due, spent

VALIDATION_SEED = 0  # one noise for all runs and seeds, so that their validation losses compare
SAMPLE_SEED = 0


def evaluate(run: Run, should_stop: Callable[[], bool]) -> bool:
    """Validate and draw samples where they are due, with the EMA; return False where a signal cut it short."""
    train = run.config.train
    at_end = spent(run.images_seen, run.seconds, run.config)
    validating = train.validate_every > 0 and (due(train.validate_every, run) or at_end)
    sampling = train.sample_every > 0 and (due(train.sample_every, run) or at_end)
    run.evaluation_pending = validating or sampling
    with run.emas.main.swapped():
        if validating and not validate(run, should_stop):
            return False
        # a sharded model is gathered by all processes together: then all draw, and one writes
        if sampling and (run.sharded or run.accelerator.is_main_process) and not draw_samples(run, should_stop):
            return False
    run.evaluation_pending = False
    return True


def validate(run: Run, should_stop: Callable[[], bool]) -> bool:
    """Log the loss at fixed levels of t on the validation split.

    Every process makes the same number of forwards, for each asks the others something (a sharded model its
    parameters, a signal whether to stop): one without images left repeats its last and does not count it.

    Source: arXiv:2403.03206v1, B.3: equidistant levels, their mean without the last one (t = 1).
    """
    train, accelerator = run.config.train, run.accelerator
    levels = equidistant_levels(train.val_levels)
    sums = torch.zeros(train.val_levels, dtype=torch.float64)
    run.denoiser.eval()
    for indices, counted in shares(
        run.validation, train.batch_size, accelerator.process_index, accelerator.num_processes
    ):
        latents, conditioning = run.validation.batch(indices)
        noise = torch.from_numpy(rng.normal(VALIDATION_SEED, "val_noise", indices, latents.shape[1:]))
        losses = loss_by_level(
            run.denoiser, latents.to(accelerator.device), conditioning.to(accelerator.device),
            noise.to(accelerator.device), levels, run.schedule, run.config.diffusion.prediction,
        )  # [levels, B]  # fmt: skip
        if counted:
            sums += losses.double().sum(1).cpu()
        if should_stop():
            return False
    total = accelerator.reduce(sums.to(accelerator.device), "sum").cpu() / len(run.validation)
    by_level = total.tolist()
    run.log("validation", loss=float(np.mean(by_level[:-1])), loss_by_level=by_level, levels=levels.tolist())
    return True


def shares(source: Any, batch_size: int, rank: int, world: int) -> Iterator[tuple[np.ndarray, bool]]:
    """Yield this process's batches of a source's items, and whether they count; all processes get equally many.

    Items that do not stack (of two buckets) are never in one batch.
    """
    for group in groups_of(source):
        for start in range(0, len(group), batch_size * world):
            mine = group[start + rank : start + batch_size * world : world]
            yield (mine, True) if len(mine) else (group[:1], False)


def draw_samples(run: Run, should_stop: Callable[[], bool]) -> bool:
    """Save a grid of images of the fixed prompts under samples/."""
    config = run.config
    home = next(run.vae.parameters()).device  # of a cached run the CPU: a T5-XXL is 10 to 19 GB that no update needs
    run.vae.to(run.accelerator.device)
    run.text.to(run.accelerator.device)
    pipeline = TextToImage(
        run.module, run.vae, run.text, run.schedule, config.diffusion.prediction, config.sampling, config.encoders,
        precision=config.train.precision, size=config.data.resolution,
    )  # fmt: skip
    # a signal is answered by all processes together elsewhere; alone, this one may answer at once
    alone = should_stop if run.accelerator.num_processes == 1 else None
    try:
        images = pipeline(run.prompts, seed=SAMPLE_SEED, should_stop=alone)
    except Stopped:
        return False
    finally:
        run.vae.to(home)
        run.text.to(home)
    if run.accelerator.is_main_process:
        settings = pipeline.settings(
            seed=SAMPLE_SEED, prompts=run.prompts, images_seen=run.images_seen, run=config.name
        )
        try:
            save_image(image_grid(images), run.run_dir / "samples" / f"{run.images_seen:012d}.png", settings)
        except OSError as error:  # a full disk costs a picture, not the run
            run.log("event", event="samples_failed", message=str(error))
            print(f"\nthe samples of image {run.images_seen} cannot be written ({error}); training goes on", flush=True)
    return True
