"""The training loop, to be read top to bottom; whatever it is told stands in one RunConfig.

    train(load_config("configs/train/quickstart.yaml"), "runs/mine")

The trainer knows no backbone: `denoiser(latents, timestep, conditioning)` inside `training_loss` is the only line in
which two rows of a study differ. It is not subclassed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from torch import nn
from tqdm import tqdm

from mmdit import rng
from mmdit.checkpoint import (
    CONFIG,
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    make_folder,
    sweep_temporaries,
    write_whole,
)
from mmdit.config import ConfigError, RunConfig, TrainConfig, differences, to_tree, to_yaml
from mmdit.diffusion import build_schedule
from mmdit.models import build_denoiser
from mmdit.pipeline import configure_cpu
from mmdit.stopping import SIGHUP, handled
from mmdit.train.ema import EMAs
from mmdit.train.memory import first_line, memory_told
from mmdit.train.optim import build_optimizer, lr_at, set_lr
from mmdit.train.ownership import sole_trainer
from mmdit.train.run import Run, count_parameters, due, spent, total_images
from mmdit.train.saving import COMPLETE, poll, restore, save, save_or_go_on
from mmdit.train.sharding import prepare_blocks, shard
from mmdit.train.sources import build_sources
from mmdit.train.step import BatchDrawer, NonFiniteLossError, Prefetcher, StepResult, micro_positions, update
from mmdit.train.tracking import Metrics, write_environment
from mmdit.train.validation import evaluate
from mmdit.train.watch import Watch, peak_tflops, training_flop

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: run the same command again

# what may change between the sessions of one run: nothing here alters an update already made
RESUMABLE = (
    "name", "sampling", "train.images", "train.seconds", "train.log_every", "train.validate_every",
    "train.sample_every",
    "train.checkpoint_every", "train.keep_checkpoints", "train.keep_every", "train.val_images", "train.val_levels",
    "train.sample_prompts", "train.tensorboard", "train.cache_dir", "train.precompute", "train.verify_cache",
    "train.require_cache", "train.num_processes",
    "train.sharding", "train.shard_size", "train.accumulation", "train.compile", "train.activation_checkpointing",
    "train.timeout", "train.max_skips", "train.save_retries", "train.async_checkpoints",
    "train.wandb", "train.peak_tflops",
)  # fmt: skip


class Result(NamedTuple):
    """How a session ended."""

    complete: bool
    images_seen: int
    seconds: float
    checkpoint: Path | None


def train(config: RunConfig, run_dir: str | Path, resume: str = "auto", progress: bool = True) -> Result:
    """Train one run to its budget, or until a signal; go on where the newest whole checkpoint stands.

    Args:
        config: the run.
        run_dir: its folder; made where it is not there.
        resume: `auto` goes on from a checkpoint where there is one; `never` refuses a folder that has some.
        progress: show bars.

    Returns:
        Result; `complete` is False where SIGINT, SIGTERM or SIGHUP ended the session (its checkpoint is written).

    Raises:
        ConfigError: the folder belongs to a run with another config, or the number of processes is not the config's.
        NonFiniteLossError: more than `train.max_skips` losses or gradients in a row that are not finite; names step,
            samples and the last good checkpoint.
        CheckpointError: a checkpoint could not be read, or more than `train.save_retries` in a row not be written; or
            another process trains in this folder.
        OutOfMemoryError: a step does not fit into memory; says what to change.
    """
    run_dir = Path(run_dir)
    hardware = configure_cpu()
    AcceleratorState._reset_state()  # a singleton that would refuse a second run of another precision in one process
    mixed = "bf16" if config.train.precision == "bf16" else "no"
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=config.train.timeout))
    # by default DDP keeps a second copy of all gradients, to send: 4 bytes a parameter
    views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    # without cpu=True accelerate does not join the processes that torchrun started on a machine without GPU
    on_cpu = not torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision=mixed, cpu=on_cpu, kwargs_handlers=[patience, views])
    if accelerator.num_processes != config.train.num_processes:
        raise ConfigError(
            f"train.num_processes is {config.train.num_processes}, but {accelerator.num_processes} process(es) run; "
            f"launch with: torchrun --nproc_per_node {config.train.num_processes} -m mmdit.train ..."
        )
    with sole_trainer(run_dir) if accelerator.is_main_process else nullcontext():
        return _session(config, run_dir, resume, progress, accelerator, hardware)


def _session(
    config: RunConfig, run_dir: Path, resume: str, progress: bool, accelerator: Accelerator, hardware: dict[str, Any]
) -> Result:
    """Open the run's folder, build the run and train it."""
    main = accelerator.is_main_process
    checkpoint = open_run(config, run_dir, resume, accelerator)
    accelerator.wait_for_everyone()
    # without its marker, which a kill or a full disk has cost it, a finished run is ended once more
    if checkpoint is not None and finished(checkpoint, config) and (run_dir / COMPLETE).is_file():
        return Result(True, checkpoint.state["images_seen"], checkpoint.state["seconds"], checkpoint.path)

    with memory_told(lambda error: _too_large_to_start(run_dir, error)):
        run = build_run(config, run_dir, accelerator, progress and main)
        if checkpoint is not None:
            restore(run, checkpoint)
    if main:
        if checkpoint is None and (warning := config.train.unreached_lr()) is not None:
            print(warning, flush=True)
        write_environment(run_dir, settings=hardware)
        resumed_at = run.images_seen if checkpoint else None
        run.metrics = Metrics(run_dir, resumed_at, config.train.tensorboard, config.train.wandb, config)
        run.log("event", event="resume" if checkpoint else "start", parameters=count_parameters(run.module))
    with interruptible(accelerator) as should_stop:
        try:
            with memory_told(lambda error: _too_large_between(run, error)):
                return loop(run, should_stop, progress and main)
        finally:
            if run.metrics is not None:
                run.metrics.close()


def loop(run: Run, should_stop: Callable[[], bool], progress: bool) -> Result:
    """Update, log, validate, sample, save, until the budget is spent or somebody asks to stop."""
    train, accelerator = run.config.train, run.accelerator
    budget = total_images(run.config)
    drawer = Prefetcher(BatchDrawer(run.source, run.text, run.schedule, run.config))
    watch = build_watch(run)
    losses: list[float] = []
    bar = _bar(budget if train.seconds is None else None, run.images_seen, progress)
    if run.evaluation_pending and not evaluate(run, should_stop):
        return _interrupted(run, bar)
    try:
        while not spent(run.images_seen, run.seconds, run.config):
            began = time.perf_counter()
            lr = lr_at(train, run.images_seen + train.batch_size, run.seconds)
            set_lr(run.optimizer, lr)
            result = one_update(run, drawer, watch, budget)
            run.images_seen += train.batch_size
            if result is not None:
                run.emas.update()
                run.step += 1
                losses.append(result.loss)
            elapsed = time.perf_counter() - began
            run.seconds = _agreed(run.seconds + elapsed, train, accelerator)
            at_end = spent(run.images_seen, run.seconds, run.config)
            watch.seconds, watch.images = watch.seconds + elapsed, watch.images + train.batch_size
            bar.update(train.batch_size)

            if logging_due(run, budget) or at_end:
                poll(run)
                seen = watch.record(accelerator)
                if result is not None and losses:
                    mean = float(np.mean(losses))
                    norms = {"grad_norm": result.grad_norm, "grad_norm_by_part": result.part_norms}
                    run.log("train", loss=mean, lr=lr, **norms, **seen)
                    bar.set_postfix(loss=f"{mean:.4f}", lr=f"{lr:.1e}")
                    losses = []
            if not evaluate(run, should_stop):
                return _interrupted(run, bar)
            if at_end:
                break
            if due(train.checkpoint_every, run) or due(train.keep_every, run):
                save_or_go_on(run)
            if should_stop():
                return _interrupted(run, bar)
        path = save(run, complete=True)
    finally:
        drawer.close()
        bar.close()
        _finish_writing(run)
    return Result(True, run.images_seen, run.seconds, path)


def one_update(run: Run, drawer: Prefetcher, watch: Watch, budget: int) -> StepResult | None:
    """Make the next update; None where it was left out because its numbers were not finite.

    Raises:
        NonFiniteLossError: that happened more than `train.max_skips` times in a row.
        OutOfMemoryError: it does not fit.
    """
    train, rank = run.config.train, run.accelerator.process_index
    mine = micro_positions(run.config, run.images_seen, rank)
    after = run.images_seen + train.batch_size
    following = [*mine[1:], micro_positions(run.config, after, rank)[0] if after < budget else None]
    batches: list[Any] = [lambda p=p, f=f: drawer.take(p, f) for p, f in zip(mine, following, strict=True)]
    parts = logging_due(run, budget, ahead=train.batch_size)
    try:
        with memory_told(lambda error: _too_large(run, error)):
            result = update(
                run.denoiser, run.optimizer, run.accelerator, batches, run.schedule, run.config, watch, parts
            )
    except NonFiniteLossError as error:
        run.skipped += 1
        if run.skipped > train.max_skips:
            raise NonFiniteLossError(_last_words(run, str(error))) from None
        run.log("event", event="skipped", message=str(error))
        if run.accelerator.is_main_process:
            left = f"update left out, {run.skipped} in a row of at most {train.max_skips}"
            print(f"\nimages {run.images_seen} to {after}: {error}; {left}", flush=True)
        return None
    run.skipped = 0
    return result


def logging_due(run: Run, budget: int, ahead: int = 0) -> bool:
    """Say whether a record is written at the images seen now, or after `ahead` more."""
    now, every, batch = run.images_seen + ahead, run.config.train.log_every, run.config.train.batch_size
    return (every > 0 and now // every > (now - batch) // every) or now >= budget or now == batch


def build_watch(run: Run) -> Watch:
    """Make the watch of a run: FLOP per image counted on a batch of its own."""
    train, device = run.config.train, run.accelerator.device
    latents, conditioning = run.source.batch(np.arange(1))
    return Watch(device, training_flop(run.module, latents, conditioning), peak_tflops(device, train.peak_tflops))


# --- beginning and going on ---------------------------------------------------------------------------------------


def open_run(config: RunConfig, run_dir: Path, resume: str, accelerator: Accelerator) -> Checkpoint | None:
    """Make or enter a run folder and return the checkpoint to go on from."""
    main = accelerator.is_main_process
    problems: list[str] = []
    latest = None
    if main:  # one process verifies for all
        make_folder(run_dir)
        sweep_temporaries(run_dir)
        latest = latest_checkpoint(run_dir, problems.append)
        for problem in problems:
            print(problem, flush=True)
    latest, problems = broadcast_object_list([latest, problems])
    if latest is None and problems:
        raise CheckpointError(run_dir, "none of its checkpoints verifies", "Train into a new folder with --out")
    if latest is not None and resume == "never":
        raise ConfigError(f"{run_dir} already holds checkpoints ({latest.name}); choose another --out or resume auto")
    checkpoint = None
    if latest is not None:  # shards are read later, by each process its own
        own_part = config.train.sharding != "none" and (latest / "model").is_dir()
        checkpoint = load_checkpoint(latest, () if own_part else None, verified=True)
    if checkpoint is not None:
        mine, theirs = to_tree(config), to_tree(checkpoint.config)
        changed = [
            field
            for field in differences(mine, theirs)
            if not any(field == allowed or field.startswith(allowed + ".") for allowed in RESUMABLE)
        ]
        if changed:
            told = ", ".join(
                f"{field} was {_value(theirs, field)} and is {_value(mine, field)} now" for field in changed
            )
            raise ConfigError(
                f"{run_dir} holds a run with another config: {told}; resume with the old values, or take another --out"
            )
    if checkpoint is not None and checkpoint.state.get("weights_only") and not finished(checkpoint, config):
        raise CheckpointError(
            checkpoint.path,
            "keeps nothing but weights (a study's prune_finished), so training cannot go on from it",
            "Train into a new folder with --out",
        )
    if main:
        write_whole(run_dir / CONFIG, to_yaml(config))
    return checkpoint


def _value(tree: Any, field: str) -> str:
    """Return the value of a dotted field as text; `absent` where this config has no such field."""
    for name in field.split("."):
        if not isinstance(tree, Mapping) or name not in tree:
            return "absent"
        tree = tree[name]
    return repr(tree)


def build_run(config: RunConfig, run_dir: Path, accelerator: Accelerator, progress: bool) -> Run:
    """Load the data, build denoiser, optimizer and EMA; the same seed gives the same parameters."""
    sources = build_sources(config, run_dir, accelerator.device, progress)  # processes share the encoding, part by part
    denoiser = build_seeded(config).to(accelerator.device)
    prepare_blocks(denoiser, config.train)
    sharding = config.train.sharding != "none"
    if sharding:
        shard(denoiser, config.train, accelerator.device)
    emas = EMAs(denoiser, config.train)
    optimizer = accelerator.prepare_optimizer(build_optimizer(denoiser, config.train))
    # "evaluation" leaves out DistributedDataParallel, which a sharded model does not need; autocast it gets
    prepared = accelerator.prepare_model(denoiser, evaluation_mode=sharding)
    schedule = build_schedule(config.diffusion.schedule)
    return Run(config, run_dir, accelerator, prepared, optimizer, emas, schedule, *sources)


def build_seeded(config: RunConfig) -> nn.Module:
    """Build the denoiser of a config; its parameters are a function of the run's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.integer_seed(config.seed, "init"))
        return build_denoiser(config.model)


def finished(checkpoint: Checkpoint, config: RunConfig) -> bool:
    """Say whether a run has spent its budget; with a larger one a finished run goes on."""
    state = checkpoint.state
    return bool(state["complete"]) and spent(state["images_seen"], state["seconds"], config)


def _agreed(seconds: float, train: TrainConfig, accelerator: Accelerator) -> float:
    """Agree on the time where the budget is in seconds: all processes stop after the same update."""
    if train.seconds is None or accelerator.num_processes == 1:
        return seconds
    return float(accelerator.reduce(torch.tensor(seconds, device=accelerator.device), "mean"))


def _bar(total: int | None, done: int, progress: bool) -> Any:
    return tqdm(total=total, initial=done, unit=" images", disable=not progress, mininterval=1, dynamic_ncols=True)


def _interrupted(run: Run, bar: Any) -> Result:
    bar.close()
    path = save(run)
    run.log("event", event="interrupted")
    return Result(False, run.images_seen, run.seconds, path)


def _finish_writing(run: Run) -> None:
    """Let the thread finish its checkpoint, whatever ended the session; a failure has no one left to count it."""
    error = run.background.close()
    if error is not None:
        print(f"\n{error}", flush=True)


def _last_words(run: Run, reason: str) -> str:
    """Complete the message of a non-finite loss: when, and where to go on from."""
    _finish_writing(run)
    good = latest_checkpoint(run.run_dir)
    message = (
        f"step {run.step + 1} (images {run.images_seen} to {run.images_seen + run.config.train.batch_size}): {reason}. "
        f"The update was not made. Last good checkpoint: {good if good else 'none yet'}. "
        f"Lower train.lr, or look at those samples, and resume"
    )
    run.log("event", event="non_finite", message=message)
    return message


def _too_large(run: Run, error: BaseException) -> str:
    """Say what to change where a step does not fit into memory."""
    _finish_writing(run)
    train = run.config.train
    share = train.batch_size // train.accumulation // train.num_processes
    good = latest_checkpoint(run.run_dir)
    run.log("event", event="out_of_memory", message=str(error))
    return (
        f"out of memory at {share} images a process and forward ({first_line(error)}). Halve that with "
        f"--train.accumulation {2 * train.accumulation}: the global batch of {train.batch_size} and the run's numbers "
        f"stay; or set --train.activation_checkpointing true, or --train.sharding fsdp2 on several processes. "
        f"Last good checkpoint: {good or 'none yet'}"
    )


def _too_large_between(run: Run, error: BaseException) -> str:
    """Say what to change where updates fit and validation, samples or a checkpoint do not."""
    _finish_writing(run)
    run.log("event", event="out_of_memory", message=str(error))
    return (
        f"out of memory between updates, in validation, samples or a checkpoint ({first_line(error)}). Fewer "
        f"--train.sample_prompts take less, --train.sample_every 0 and --train.validate_every 0 leave them out: none "
        f"of these changes the training. Last good checkpoint: {latest_checkpoint(run.run_dir) or 'none yet'}"
    )


def _too_large_to_start(run_dir: Path, error: BaseException) -> str:
    """Say what to change where the session does not get to its first update."""
    return (
        f"out of memory while encoders, data and denoiser were loaded ({first_line(error)}). End other programs, "
        f"choose a smaller model, or spread it with --train.sharding fsdp2 on several processes; train.py CONFIG "
        f"--dry-run says what it takes. Last good checkpoint: {latest_checkpoint(run_dir) or 'none yet'}"
    )


@contextmanager
def interruptible(accelerator: Accelerator) -> Iterator[Callable[[], bool]]:
    """Catch SIGINT, SIGTERM and SIGHUP: the first is remembered and polled, a second one obeys at once.

    Yields:
        should_stop(): True once any process has been asked to stop; all processes get the same answer.
    """
    asked = False

    def ask(number: int) -> None:
        nonlocal asked
        if asked and number != SIGHUP:  # which follows a SIGTERM where a machine is shut down
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        asked = True
        print("\nfinishing this step, then saving; once more to stop at once", flush=True)

    def should_stop() -> bool:
        if accelerator.num_processes == 1:
            return asked
        flag = torch.tensor(float(asked), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum") > 0)

    with handled(ask, signal.SIGINT, signal.SIGTERM):
        yield should_stop
