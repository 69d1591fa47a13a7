"""`python -m mmdit.train CONFIG [--out DIR] [--dry-run] [--train.lr 2e-4 ...]`: one run from the command line.

The config is read before torch is imported, so a typo is answered at once.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmdit.config import ConfigError, RunConfig, load_config
from mmdit.stopping import handled


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train one run. Any field of the config can be set as well: --train.lr 2e-4 --model.name unet --seed 1."""

    config: Annotated[Path, tyro.conf.Positional]
    """YAML file of the run."""
    out: Path | None = None
    """Run folder; default runs/<name>-s<seed>."""
    cache: Path | None = None
    """Folder for latents and text states, shared between runs; default <run>/cache."""
    hardware: Path | None = None
    """YAML of configs/hardware/: processes, sharding, compilation; leaves what is learnt alone."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest checkpoint; never: refuse a folder that has one."""
    dry_run: bool = False
    """Print parameters, FLOPs, tokens, steps and memory, and stop."""
    cache_only: bool = False
    """Encode the data into --cache and stop."""
    statistics: bool = False
    """Print encoders.latent_shift and latent_scale that bring the data's latents to mean 0, deviation 1, and stop."""
    validate: bool = False
    """Look at every picture and caption of `data`, write those that cannot be used to <run>/rejects.jsonl, and stop."""
    quiet: bool = False
    """No progress bar."""


_SWITCHES = ("--dry-run", "--cache-only", "--statistics", "--validate", "--quiet")


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell the script's own words from config overrides: own flags are those of `Arguments`, all others override."""
    fields = {f"--{field.name.replace('_', '-')}": field for field in dataclasses.fields(Arguments)}
    own, overrides, queue = [], [], list(words)
    while queue:
        word = queue.pop(0)
        flag = word.partition("=")[0].replace("_", "-")
        if not word.startswith("--") and not ("=" in word and "." in word.partition("=")[0] and "/" not in word):
            own.append(word)
        elif flag in ("--help", *fields) or flag.replace("--no-", "--") in _SWITCHES:
            own.append(word)
            takes_value = flag in fields and flag not in _SWITCHES and "=" not in word
            own += [queue.pop(0)] if takes_value and queue else []
        else:
            overrides.append(word)
            if word.startswith("--") and "=" not in word and queue and not queue[0].startswith("--"):
                overrides.append(queue.pop(0))
    return own, overrides


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came before training could be asked to stop (or after it)."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        Exit code: 0 done, 1 diverged, 2 wrong config, 3 the run folder or a checkpoint cannot be written or read,
        4 out of memory, 75 run the same command again (a signal: saved, or before the first update),
        130 interrupted by hand before there was anything to save.
    """

    def terminate(number: int) -> None:
        raise Terminated

    with handled(terminate, signal.SIGTERM):
        try:
            return _run(words)
        except Terminated:
            print("\nterminated before the first update; run the same command again", file=sys.stderr)
            return 75


def _run(words: Sequence[str] | None) -> int:
    """Run the command line; SIGTERM and SIGHUP raise `Terminated` while no update can be saved."""
    own, overrides = split_overrides(sys.argv[1:] if words is None else words)
    arguments = tyro.cli(Arguments, args=own, prog="train")
    if arguments.cache is not None:
        overrides += ["--train.cache_dir", str(arguments.cache)]
    try:
        config = load_config(arguments.config, overrides, arguments.hardware)
    except (ConfigError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    run_dir = arguments.out or Path("runs") / f"{config.name}-s{config.seed}"

    if arguments.validate:
        return _validate(config, run_dir / "rejects.jsonl")

    from mmdit.checkpoint import CheckpointError  # torch from here on

    if arguments.dry_run:
        from mmdit.train.estimate import describe

        print(describe(config))
        return 0
    from mmdit.data.images import DataError
    from mmdit.train.memory import OutOfMemoryError
    from mmdit.train.sources import build_sources, measure_statistics
    from mmdit.train.step import NonFiniteLossError
    from mmdit.train.trainer import EXIT_INTERRUPTED, train

    try:
        if arguments.statistics:
            shift, scale = measure_statistics(config)
            print(f"latent_shift: {list(shift)}\nlatent_scale: {list(scale)}")
            return 0
        if arguments.cache_only:
            build_sources(config, run_dir, progress=not arguments.quiet)
            return 0
        result = train(config, run_dir, arguments.resume, progress=not arguments.quiet)
    except (ConfigError, DataError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except NonFiniteLossError as error:
        print(error, file=sys.stderr)
        return 1
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 3
    except OutOfMemoryError as error:
        print(error, file=sys.stderr)
        return 4
    except OSError as error:
        reason = f"{run_dir} cannot be written or read ({error})"
        print(
            f"{reason}. Its checkpoints are untouched: free disk space, or see to permissions, and go on",
            file=sys.stderr,
        )
        return 3
    except Terminated:
        raise
    except KeyboardInterrupt:
        print("\nstopped before the first update: there was nothing to save yet", file=sys.stderr)
        return 130
    if not result.complete:
        again = " ".join(["python scripts/train.py", *(sys.argv[1:] if words is None else words)])
        print(f"saved {result.checkpoint}\ngo on with: {again}")
        return EXIT_INTERRUPTED
    print(f"done: {result.images_seen:,} images in {result.seconds:,.0f} s of training; {result.checkpoint}")
    return 0


def _validate(config: RunConfig, out: Path) -> int:
    """Check the pictures of a config; exit code 0 where all can be used, else 1, 2 where there is nothing to check."""
    if config.data.name != "images":
        print(f"data is {config.data.name!r}, which is drawn: --validate is for images", file=sys.stderr)
        return 2
    from mmdit.data.images import validate

    try:
        seen, bad = validate(config.data, out)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{seen - bad:,} of {seen:,} items can be used" + (f"; the others, with reasons: {out}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
