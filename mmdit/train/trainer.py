"""The training loop, to be read top to bottom; whatever it is told stands in one RunConfig.

    train(load_config("configs/train/quickstart.yaml"), "runs/mine")

The trainer knows no backbone: `denoiser(latents, timestep, conditioning)` inside `training_loss` is the only line in
which two rows of a study differ. It is not subclassed.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from tqdm import tqdm

from mmdit import rng
from mmdit.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    sweep_temporaries,
    tensors_of,
)
from mmdit.config import ConfigError, RunConfig, differences, load_config, to_tree, to_yaml
from mmdit.denoiser import unwrap
from mmdit.diffusion import Schedule, build_schedule, equidistant_levels, loss_by_level
from mmdit.encoders.text import TextEncoders
from mmdit.encoders.vae import AutoencoderKL
from mmdit.models import build_denoiser
from mmdit.pipeline import Stopped, TextToImage, configure_cpu, image_grid, save_image
from mmdit.train.ema import EMA
from mmdit.train.optim import build_optimizer, load_optimizer, lr_at, optimizer_tensors, set_lr
from mmdit.train.sources import build_sources
from mmdit.train.step import BatchDrawer, NonFiniteLossError, Prefetcher, micro_positions, update
from mmdit.train.tracking import Metrics, write_environment

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: run the same command again
VALIDATION_SEED = 0  # one noise for all runs and seeds, so that their validation losses compare
SAMPLE_SEED = 0

# what may change between the sessions of one run: nothing here alters an update already made
RESUMABLE = (
    "name", "sampling", "train.images", "train.log_every", "train.validate_every", "train.sample_every",
    "train.checkpoint_every", "train.keep_checkpoints", "train.keep_every", "train.val_images", "train.val_levels",
    "train.sample_prompts", "train.tensorboard", "train.cache_dir", "train.precompute", "train.num_processes",
)  # fmt: skip


class Result(NamedTuple):
    """How a session ended."""

    complete: bool
    images_seen: int
    seconds: float
    checkpoint: Path | None


@dataclass
class Run:
    """The moving parts of one run. `seconds` is training time: evaluation, samples and checkpoints are not in it."""

    config: RunConfig
    run_dir: Path
    accelerator: Accelerator
    denoiser: nn.Module  # as accelerate prepared it; `unwrap` gives the module
    optimizer: Any
    ema: EMA
    schedule: Schedule
    vae: AutoencoderKL
    text: TextEncoders
    source: Any
    validation: Any
    prompts: list[str]
    metrics: Metrics | None = None
    step: int = 0
    images_seen: int = 0
    seconds: float = 0.0
    saved_at: int = -1
    evaluation_pending: bool = False  # interrupted between an update and its validation

    @property
    def module(self) -> nn.Module:
        return unwrap(self.denoiser)

    def log(self, kind: str, **values: Any) -> None:
        if self.metrics is not None:
            self.metrics.write(
                kind, step=self.step, images_seen=self.images_seen, seconds=round(self.seconds, 3), **values
            )


def train(config: RunConfig, run_dir: str | Path, resume: str = "auto", progress: bool = True) -> Result:
    """Train one run to its budget, or until a signal; go on where the newest whole checkpoint stands.

    Args:
        config: the run.
        run_dir: its folder; made where it is not there.
        resume: `auto` goes on from a checkpoint where there is one; `never` refuses a folder that has some.
        progress: show bars.

    Returns:
        Result; `complete` is False where SIGINT or SIGTERM ended the session (its checkpoint is written).

    Raises:
        ConfigError: the folder belongs to a run with another config, or the number of processes is not the config's.
        NonFiniteLossError: a loss or gradient that is not finite; names step, samples and the last good checkpoint.
        CheckpointError: a checkpoint could not be written or read.
    """
    run_dir = Path(run_dir)
    hardware = configure_cpu()
    AcceleratorState._reset_state()  # a singleton that would refuse a second run of another precision in one process
    mixed = "bf16" if config.train.precision == "bf16" else "no"
    # without cpu=True accelerate does not join the processes that torchrun started on a machine without GPU
    accelerator = Accelerator(mixed_precision=mixed, cpu=not torch.cuda.is_available())
    if accelerator.num_processes != config.train.num_processes:
        raise ConfigError(
            f"train.num_processes is {config.train.num_processes}, but {accelerator.num_processes} process(es) run; "
            f"launch with: torchrun --nproc_per_node {config.train.num_processes} -m mmdit.train ..."
        )
    main = accelerator.is_main_process
    checkpoint = open_run(config, run_dir, resume, main)
    accelerator.wait_for_everyone()
    if checkpoint is not None and finished(checkpoint, config):
        return Result(True, checkpoint.state["images_seen"], checkpoint.state["seconds"], checkpoint.path)

    run = build_run(config, run_dir, accelerator, progress and main)
    if checkpoint is not None:
        restore(run, checkpoint)
    if main:
        write_environment(run_dir, settings=hardware)
        run.metrics = Metrics(run_dir, run.images_seen if checkpoint else None, config.train.tensorboard)
        run.log("event", event="resume" if checkpoint else "start", parameters=count_parameters(run.module))
    with interruptible(accelerator) as should_stop:
        try:
            return loop(run, should_stop, progress and main)
        finally:
            if run.metrics is not None:
                run.metrics.close()


def loop(run: Run, should_stop: Callable[[], bool], progress: bool) -> Result:
    """Update, log, validate, sample, save, until the budget is spent or somebody asks to stop."""
    train, accelerator = run.config.train, run.accelerator
    budget = total_images(run.config)
    drawer = Prefetcher(BatchDrawer(run.source, run.text, run.schedule, run.config))
    losses: list[float] = []
    since_log, bar = run.seconds, _bar(budget, run.images_seen, progress)
    if run.evaluation_pending and not evaluate(run, should_stop):
        return _interrupted(run, bar)
    try:
        while run.images_seen < budget:
            began = time.perf_counter()
            lr = lr_at(train, run.images_seen + train.batch_size)
            set_lr(run.optimizer, lr)
            mine = micro_positions(run.config, run.images_seen, accelerator.process_index)
            after = micro_positions(run.config, run.images_seen + train.batch_size, accelerator.process_index)
            following = [*mine[1:], after[0] if run.images_seen + train.batch_size < budget else None]
            try:
                result = update(
                    run.denoiser,
                    run.optimizer,
                    accelerator,
                    [lambda p=p, f=f: drawer.take(p, f) for p, f in zip(mine, following, strict=True)],  # type: ignore
                    run.schedule,
                    run.config,
                )
            except NonFiniteLossError as error:
                raise NonFiniteLossError(_last_words(run, str(error))) from None
            run.ema.update()
            run.step += 1
            run.images_seen += train.batch_size
            run.seconds += time.perf_counter() - began
            losses.append(result.loss)
            bar.update(train.batch_size)

            if due(train.log_every, run) or run.images_seen >= budget or run.step == 1:
                speed = len(losses) * train.batch_size / max(run.seconds - since_log, 1e-9)
                mean = float(np.mean(losses))
                run.log("train", loss=mean, lr=lr, grad_norm=result.grad_norm, images_per_second=round(speed, 2))
                bar.set_postfix(loss=f"{mean:.4f}", lr=f"{lr:.1e}")
                losses, since_log = [], run.seconds
            if not evaluate(run, should_stop):
                return _interrupted(run, bar)
            if run.images_seen >= budget:
                break
            if due(train.checkpoint_every, run) or due(train.keep_every, run):
                save(run)
            if should_stop():
                return _interrupted(run, bar)
        path = save(run, complete=True)
    finally:
        drawer.close()
        bar.close()
    return Result(True, run.images_seen, run.seconds, path)


# --- beginning and going on ---------------------------------------------------------------------------------------


def open_run(config: RunConfig, run_dir: Path, resume: str, main: bool) -> Checkpoint | None:
    """Make or enter a run folder and return the checkpoint to go on from."""
    if main:
        run_dir.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(run_dir)
    problems: list[str] = []
    latest = latest_checkpoint(run_dir, problems.append)
    for problem in problems if main else ():
        print(problem, flush=True)
    if latest is None and problems:
        raise CheckpointError(run_dir, "none of its checkpoints verifies", "Train into a new folder with --out")
    if latest is not None and resume == "never":
        raise ConfigError(f"{run_dir} already holds checkpoints ({latest.name}); choose another --out or resume auto")
    checkpoint = None if latest is None else load_checkpoint(latest)
    stored = run_dir / "config.yaml"
    before = (
        checkpoint.config if checkpoint else load_config(stored) if stored.is_file() and resume != "never" else None
    )
    if before is not None and checkpoint is not None:
        mine, theirs = to_tree(config), to_tree(before)
        changed = [
            field
            for field in differences(mine, theirs)
            if not any(field == allowed or field.startswith(allowed + ".") for allowed in RESUMABLE)
        ]
        if changed:
            raise ConfigError(
                f"{run_dir} holds a run with another config: {', '.join(changed)} differ(s); resume with the same "
                f"values, or choose another --out"
            )
    if main:
        temporary = run_dir / "config.yaml.tmp"
        temporary.write_text(to_yaml(config), encoding="utf-8")
        temporary.replace(stored)
    return checkpoint


def build_run(config: RunConfig, run_dir: Path, accelerator: Accelerator, progress: bool) -> Run:
    """Load the data, build denoiser, optimizer and EMA; the same seed gives the same parameters."""
    with accelerator.main_process_first():  # one process encodes, the others then find its cache
        sources = build_sources(config, run_dir, accelerator.device, progress)
    denoiser = build_seeded(config).to(accelerator.device)
    if config.train.compile:
        denoiser.compile()
    ema = EMA(denoiser, config.train.ema_decay)
    prepared, optimizer = accelerator.prepare(denoiser, build_optimizer(denoiser, config.train))
    schedule = build_schedule(config.diffusion.schedule)
    return Run(config, run_dir, accelerator, prepared, optimizer, ema, schedule, *sources)


def build_seeded(config: RunConfig) -> nn.Module:
    """Build the denoiser of a config; its parameters are a function of the run's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.integer_seed(config.seed, "init"))
        return build_denoiser(config.model)


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Put everything back as it was, bit for bit."""
    tensors, state = checkpoint.tensors, checkpoint.state
    try:
        run.module.load_state_dict(tensors["model"])
        run.ema.load(tensors["ema"], state["ema_updates"])
        load_optimizer(_raw(run.optimizer), run.module, tensors["optimizer"])
        run.step, run.images_seen, run.seconds = state["step"], state["images_seen"], state["seconds"]
        run.evaluation_pending = state["evaluation_pending"]
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(checkpoint.path, f"does not fit this run ({error})", "Was the model changed?") from error
    run.saved_at = run.images_seen


def finished(checkpoint: Checkpoint, config: RunConfig) -> bool:
    """Say whether a run has spent its budget; with a larger `train.images` a finished run goes on."""
    return bool(checkpoint.state["complete"]) and checkpoint.state["images_seen"] >= total_images(config)


def total_images(config: RunConfig) -> int:
    """Return the images a run sees: whole batches, the budget rounded down."""
    return config.train.images // config.train.batch_size * config.train.batch_size


def count_parameters(module: nn.Module) -> int:
    """Count the numbers a module trains."""
    return sum(p.numel() for p in module.parameters())


# --- what happens between updates -----------------------------------------------------------------------------------


def due(every: int, run: Run) -> bool:
    """Say whether the last batch crossed a multiple of `every` images; 0 is never."""
    return every > 0 and run.images_seen // every > (run.images_seen - run.config.train.batch_size) // every


def evaluate(run: Run, should_stop: Callable[[], bool]) -> bool:
    """Validate and draw samples where they are due, with the EMA; return False where a signal cut it short."""
    train = run.config.train
    at_end = run.images_seen >= total_images(run.config)
    validating = train.validate_every > 0 and (due(train.validate_every, run) or at_end)
    sampling = train.sample_every > 0 and (due(train.sample_every, run) or at_end)
    run.evaluation_pending = validating or sampling
    with run.ema.swapped():
        if validating and not validate(run, should_stop):
            return False
        if sampling and run.accelerator.is_main_process and not draw_samples(run, should_stop):
            return False
    run.evaluation_pending = False
    return True


def validate(run: Run, should_stop: Callable[[], bool]) -> bool:
    """Log the loss at fixed levels of t on the validation split.

    Source: arXiv:2403.03206v1, B.3: equidistant levels, their mean without the last one (t = 1).
    """
    train, accelerator = run.config.train, run.accelerator
    levels = equidistant_levels(train.val_levels)
    sums = torch.zeros(train.val_levels, dtype=torch.float64)
    run.denoiser.eval()
    mine = np.arange(accelerator.process_index, len(run.validation), accelerator.num_processes)
    for start in range(0, len(mine), train.batch_size):
        indices = mine[start : start + train.batch_size]
        latents, conditioning = run.validation.batch(indices)
        noise = torch.from_numpy(rng.normal(VALIDATION_SEED, "val_noise", indices, latents.shape[1:]))
        losses = loss_by_level(
            run.denoiser, latents.to(accelerator.device), conditioning.to(accelerator.device),
            noise.to(accelerator.device), levels, run.schedule, run.config.diffusion.prediction,
        )  # [levels, B]  # fmt: skip
        sums += losses.double().sum(1).cpu()
        if should_stop():
            return False
    total = accelerator.reduce(sums.to(accelerator.device), "sum").cpu() / len(run.validation)
    by_level = total.tolist()
    run.log("validation", loss=float(np.mean(by_level[:-1])), loss_by_level=by_level, levels=levels.tolist())
    return True


def draw_samples(run: Run, should_stop: Callable[[], bool]) -> bool:
    """Save a grid of images of the fixed prompts under samples/."""
    config = run.config
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
    settings = pipeline.settings(seed=SAMPLE_SEED, prompts=run.prompts, images_seen=run.images_seen, run=config.name)
    save_image(image_grid(images), run.run_dir / "samples" / f"{run.images_seen:012d}.png", settings)
    return True


def save(run: Run, complete: bool = False) -> Path:
    """Write a checkpoint, then prune; of a finished run also `complete.json`."""
    path = run.run_dir / "checkpoints" / f"{run.images_seen:012d}"
    train = run.config.train
    if run.accelerator.is_main_process and (run.saved_at != run.images_seen or complete):
        tensors = {
            "model": tensors_of(run.module),
            "ema": run.ema.state_dict(run.module),
            "optimizer": optimizer_tensors(_raw(run.optimizer), run.module),
        }
        state = {
            "step": run.step,
            "seconds": run.seconds,
            "ema_updates": run.ema.updates,
            "evaluation_pending": run.evaluation_pending,
            "complete": complete,
        }
        path = save_checkpoint(run.run_dir, run.images_seen, tensors, state, run.config)
        run.saved_at = run.images_seen
        every = train.keep_every
        prune_checkpoints(run.run_dir, train.keep_checkpoints, lambda n: every > 0 and n % every < train.batch_size)
        if complete:
            record = {
                "images_seen": run.images_seen,
                "step": run.step,
                "seconds": run.seconds,
                "parameters": count_parameters(run.module),
                "checkpoint": path.name,
            }
            (run.run_dir / "complete.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
            run.log("event", event="complete")
    run.accelerator.wait_for_everyone()
    return path


def _raw(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _bar(total: int, done: int, progress: bool) -> Any:
    return tqdm(total=total, initial=done, unit=" images", disable=not progress, mininterval=1, dynamic_ncols=True)


def _interrupted(run: Run, bar: Any) -> Result:
    bar.close()
    path = save(run)
    run.log("event", event="interrupted")
    return Result(False, run.images_seen, run.seconds, path)


def _last_words(run: Run, reason: str) -> str:
    """Complete the message of a non-finite loss: when, and where to go on from."""
    good = latest_checkpoint(run.run_dir)
    message = (
        f"step {run.step + 1} (images {run.images_seen} to {run.images_seen + run.config.train.batch_size}): {reason}. "
        f"The update was not made. Last good checkpoint: {good if good else 'none yet'}. "
        f"Lower train.lr, or look at those samples, and resume"
    )
    run.log("event", event="non_finite", message=message)
    return message


@contextmanager
def interruptible(accelerator: Accelerator) -> Iterator[Callable[[], bool]]:
    """Catch SIGINT and SIGTERM: the first is remembered and polled, a second one obeys at once.

    Yields:
        should_stop(): True once any process has been asked to stop; all processes get the same answer.
    """
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        asked = True
        print("\nfinishing this step, then saving; once more to stop at once", flush=True)

    def should_stop() -> bool:
        if accelerator.num_processes == 1:
            return asked
        flag = torch.tensor(float(asked), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum") > 0)

    try:
        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs us there handles signals
        previous = {}
    try:
        yield should_stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
