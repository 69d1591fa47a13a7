"""Runs the cells of a study as jobs of a cluster, through submitit; `cluster: local` and `debug` need none.

    executor: slurm
    slurm: {minutes: 120, gpus: 1, options: {slurm_partition: gpu, slurm_account: mine}}

The study's own process only waits: it may run on a login node. When it is stopped, jobs that wait are cancelled and
those that run are asked to save. At a job's time limit its training saves, and submitit puts the job back into the
queue, three times at most. For saving SLURM leaves 90 seconds (options: {slurm_signal_delay_s: 300} for more), `local`
30. Jobs of `local` and the commands given to SLURM are tested; a real SLURM never ran them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmdit.config import ConfigError, SlurmConfig
from mmdit.stopping import SIGHUP, handled, ignored
from mmdit_eval import executor

PATIENCE = 120.0  # seconds that a stopped study waits for its jobs to save
TIME_LIMIT = signal.SIGUSR2  # submitit has it sent before the time limit, and where a job has to give way to another
UNBEGUN = 130


def run_jobs(
    commands: Mapping[str, Sequence[str]],
    config: SlurmConfig,
    folder: Path,
    begun: Callable[[str], None],
    ended: Callable[[str, int], None],
    *,
    poll: float = 2.0,
    patience: float = PATIENCE,
) -> bool:
    """Submit every command as a job and wait for all.

    Args:
        commands: by name.
        folder: for the jobs' scripts and logs.
        begun, ended: as in `executor.run_queue`.
        poll: seconds between two looks.
        patience: seconds that jobs have for saving, once the study is stopped.

    Returns:
        Whether all were run to their end. False where one saved and ended before it, at its time limit or stopped from
        outside, or where the study was stopped: jobs have then been asked to save, and waited for.

    Raises:
        ConfigError: submitit is not installed, or the cluster does not take the job.
    """
    whole = True
    with executor.interruptions() as interrupted:
        waiting = submit(commands, config, folder)
        try:
            for name in waiting:
                begun(name)
            while waiting and not interrupted:
                for name, job in list(waiting.items()):
                    if interrupted or not job.done():
                        continue
                    code, asked = outcome(job)
                    del waiting[name]
                    if code == executor.EXIT_INTERRUPTED:
                        print(f"{name}: {_why(asked, config)}; state saved; run the same command to go on", flush=True)
                    whole = whole and code not in (executor.EXIT_INTERRUPTED, *executor.EXITS_UNBEGUN)
                    if asked is not None and config.cluster == "debug":  # runs in this process: it was the study's
                        interrupted.append(asked)
                    ended(name, code)
                if waiting and not interrupted:
                    time.sleep(poll)
        except KeyboardInterrupt:  # raised by somebody else's handler
            interrupted.append(signal.SIGINT)
        except BaseException:  # `ended` could not write: nobody would watch over the jobs, or know of them
            stop(waiting, config, lambda name, code: None, poll, patience)
            raise
        if interrupted:
            stop(waiting, config, ended, poll, patience)
    return whole and not interrupted


def _why(asked: int | None, config: SlurmConfig) -> str:
    if asked == TIME_LIMIT:
        return f"stopped at the job's time limit of {config.minutes} minutes"
    return "stopped from outside" + ("" if asked is None else f" ({signal.Signals(asked).name})")


def stop(
    waiting: Mapping[str, Any],
    config: SlurmConfig,
    ended: Callable[[str, int], None],
    poll: float = 2.0,
    patience: float = PATIENCE,
) -> None:
    """Ask jobs to save, wait for them, and tell `ended` what became of each."""
    jobs = dict(waiting)
    if config.cluster == "debug":  # none of these has begun
        for name in jobs:
            ended(name, UNBEGUN)
        return
    if jobs:
        print(
            f"\nstopping {len(jobs)} job(s): what is being trained saves its state, in up to {patience:.0f} seconds ..."
        )
    end = time.monotonic() + patience
    while jobs and time.monotonic() < end:
        ask_to_save(list(jobs.values()), config.cluster)  # again and again: one that is starting may not hear it
        time.sleep(poll)
        for i, (name, job) in enumerate(list(jobs.items())):
            if job.done(force_check=i == 0):  # which asks SLURM about all
                del jobs[name]
                # without a result it was cancelled before it began, or killed; what it had saved is there
                ended(name, outcome(job)[0] if job.paths.result_pickle.exists() else UNBEGUN)
    for name, job in jobs.items():
        print(f"{name}: still running after {patience:.0f} seconds, no longer waited for; its log: {job.paths.stdout}")
        if config.cluster == "slurm":
            job.cancel(check=False)
        ended(name, UNBEGUN)


def ask_to_save(jobs: Sequence[Any], cluster: str) -> None:
    """Send jobs that run SIGTERM, and cancel those that have not begun; a job passes it on to its training once.

    submitit's own `cancel` leaves less time: SLURM kills after its KillWait (30 seconds), `local` after one second.
    """
    if cluster == "slurm":
        ids = [job.job_id for job in jobs]
        for flag in ("--state=PENDING", "--signal=TERM"):
            subprocess.run(["scancel", flag, *ids], check=False, capture_output=True)  # complains of those that ended
        return
    for job in jobs:
        with suppress(ProcessLookupError):
            os.kill(int(job.job_id), signal.SIGTERM)  # submitit's controller sends it on to the job


def missing(config: SlurmConfig) -> str | None:
    """Say what keeps jobs from being started on this machine; None: nothing that could be known beforehand."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        return (
            "executor: slurm needs submitit; install it with: pip install 'mmdit-lab[cluster]', or set executor: local"
        )
    if config.cluster == "slurm" and shutil.which("srun") is None:
        return "no SLURM here (srun is missing); set executor: local, or slurm.cluster: local"
    return None


def submit(commands: Mapping[str, Sequence[str]], config: SlurmConfig, folder: Path) -> dict[str, Any]:
    """Hand the commands to the cluster and return its jobs by name.

    Raises:
        ConfigError: submitit or SLURM is not there, or the cluster does not take the job.
    """
    reason = missing(config)
    if reason is not None:
        raise ConfigError(reason)
    import submitit

    # jobs of this machine stand in the terminal's group: its Ctrl-C and its end are passed on by the study alone
    local = [number for number in (signal.SIGINT, SIGHUP) if number is not None and config.cluster == "local"]
    try:
        cluster = submitit.AutoExecutor(folder=folder, cluster=config.cluster)
        cluster.update_parameters(
            timeout_min=config.minutes, cpus_per_task=config.cpus, mem_gb=config.memory_gb,
            **({"gpus_per_node": config.gpus} if config.gpus else {}), **config.options,
        )  # fmt: skip
        jobs = {}
        for name, command in commands.items():
            cluster.update_parameters(name=name)
            with ignored(*local):
                jobs[name] = cluster.submit(Cell(), list(command))
        return jobs
    except (NameError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"the cluster does not take the study's jobs: {error}; see slurm: in the study") from error


class Cell:
    """One cell inside a job. Whoever has a `checkpoint` is put back into the queue by submitit at its time limit."""

    def __call__(self, command: Sequence[str]) -> tuple[int, int | None]:
        """Run the command; the job's own log holds what it prints. A wish to stop is passed on once, as SIGTERM.

        Returns:
            Its exit code, and the signal that asked it to stop; None: it ended by itself.
        """
        put_back, asked = signal.getsignal(TIME_LIMIT), list[int]()
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM, TIME_LIMIT) if signal.getsignal(n) != signal.SIG_IGN]
        with handled(asked.append, *numbers):
            with ignored(TIME_LIMIT):  # which some clusters send to the training too, and it would end it
                process = executor.start(command, os.environ)
            told = False
            while (code := process.poll()) is None:
                if asked and not told:
                    process.send_signal(signal.SIGTERM)
                    told = True
                time.sleep(0.1)
        if asked and code == -signal.SIGTERM:  # while it was starting
            code = UNBEGUN
        if asked and set(asked) == {TIME_LIMIT} and code == executor.EXIT_INTERRUPTED and callable(put_back):
            try:
                put_back(TIME_LIMIT, None)  # ends this process, where the job may go on
            except Exception as error:  # too many times, or the cluster allows it to nobody
                print(f"not put back into the queue: {error}", flush=True)
        return int(code), asked[0] if asked else None

    def checkpoint(self, command: Sequence[str]) -> Any:
        """Return what submitit shall run when the job begins again: the same command goes on."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, command)


def outcome(job: Any) -> tuple[int, int | None]:
    """Return what `Cell` did of a finished job; exit code 1 where the job itself failed or was killed."""
    try:
        code, asked = job.result()
        return int(code), asked
    except Exception as error:  # submitit raises whatever went wrong on the other side
        print(f"job {job.job_id}: {error}; its log: {job.paths.stderr}", flush=True)
        return 1, None
