"""Runs the cells of a study as jobs of a cluster, through submitit; `cluster: local` and `debug` need none.

    executor: slurm
    slurm: {minutes: 120, gpus: 1, options: {slurm_partition: gpu, slurm_account: mine}}

The study's own process only waits: it may run on a login node, and when it is stopped the jobs are cancelled, which
trainings take as the signal to save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdit.config import ConfigError, SlurmConfig


def run_jobs(
    commands: Mapping[str, Sequence[str]],
    config: SlurmConfig,
    folder: Path,
    begun: Callable[[str], None],
    ended: Callable[[str, int], None],
    *,
    poll: float = 2.0,
) -> bool:
    """Submit every command as a job and wait for all.

    Args:
        commands: by name.
        folder: for the jobs' scripts and logs.
        begun, ended: as in `executor.run_queue`.
        poll: seconds between two looks.

    Returns:
        Whether all were run; False after Ctrl-C, when the jobs have been cancelled.

    Raises:
        ConfigError: submitit is not installed, or the cluster does not take the job.
    """
    jobs = submit(commands, config, folder)
    for name in jobs:
        begun(name)
    waiting, stopped = dict(jobs), False
    while waiting:
        try:
            for name, job in list(waiting.items()):
                if job.done():
                    ended(name, exit_code(job))
                    del waiting[name]
            if waiting:
                time.sleep(poll)
        except KeyboardInterrupt:
            print("\nstopping: jobs are cancelled; what is being trained saves its state ...", flush=True)
            for job in waiting.values():
                job.cancel(check=False)
            stopped = True
            break
        except BaseException:  # `ended` could not write: nobody would watch over the jobs, or know of them
            for job in waiting.values():
                job.cancel(check=False)
            raise
    for name in waiting:
        ended(name, 75)
    return not stopped


def submit(commands: Mapping[str, Sequence[str]], config: SlurmConfig, folder: Path) -> dict[str, Any]:
    """Hand the commands to the cluster and return its jobs by name."""
    try:
        import submitit
    except ImportError:
        raise ConfigError(
            "executor: slurm needs submitit; install it with: pip install 'mmdit-lab[cluster]', or set executor: local"
        ) from None
    try:
        executor = submitit.AutoExecutor(
            folder=folder, cluster=None if config.cluster == "slurm" else config.cluster
        )  # None: the cluster that is there
        if config.cluster == "slurm" and executor.cluster != "slurm":
            raise ConfigError("no SLURM here (srun is missing); set executor: local, or slurm.cluster: local")
        executor.update_parameters(
            timeout_min=config.minutes, cpus_per_task=config.cpus, mem_gb=config.memory_gb,
            **({"gpus_per_node": config.gpus} if config.gpus else {}), **config.options,
        )  # fmt: skip
        jobs = {}
        for name, command in commands.items():
            executor.update_parameters(name=name)
            jobs[name] = executor.submit(run_command, list(command))
        return jobs
    except (NameError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"the cluster does not take the study's jobs: {error}; see slurm: in the study") from error


def run_command(command: list[str]) -> int:
    """Run one cell inside a job and return its exit code; the job's own log holds what it prints."""
    import subprocess

    return subprocess.run(command, check=False).returncode


def exit_code(job: Any) -> int:
    """Return the exit code of a finished job; 1 where the job itself failed or was killed."""
    try:
        return int(job.result())
    except Exception as error:  # submitit raises whatever went wrong on the other side
        print(f"job {job.job_id}: {error}; its log: {job.paths.stderr}", flush=True)
        return 1
