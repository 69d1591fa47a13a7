"""Runs the cells of a study as processes, some at a time; an interruption is passed on once and waited for.

Two processes with one thread each train small denoisers faster than one after the other with two threads (on two
cores 1.6 times: the kernels are too small to share).
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mmdit.stopping import handled

EXIT_INTERRUPTED = 75  # a training process that saved and wants the same command again
# interrupted before there was anything to save, or while it was starting
EXITS_UNBEGUN = (130, -signal.SIGINT, -signal.SIGHUP)


def run_queue(
    commands: Mapping[str, Sequence[str]],
    workers: int,
    begun: Callable[[str], None],
    ended: Callable[[str, int], None],
    *,
    devices: Sequence[int] | None = None,
    poll: float = 0.1,
) -> bool:
    """Run commands in their order, `workers` at a time; each gets its share of the cores, and one of the GPUs.

    Args:
        commands: by name.
        begun: told a name when its process starts.
        ended: told a name and its exit code.
        devices: GPUs that the workers take in turn; None: those that this process may see.
        poll: seconds between two looks at the processes.

    Returns:
        Whether all were run. After Ctrl-C, or when a process says that it was interrupted, the others are asked once
        to save, are waited for, and no new ones begin.
    """
    waiting, running = list(commands), dict[str, Any]()
    stopped, gpus = False, visible_devices() if devices is None else [str(device) for device in devices]
    with interruptions() as interrupted:
        try:
            while running or (waiting and not stopped):
                while waiting and len(running) < workers and not stopped:
                    name = waiting.pop(0)
                    taken = {int(process.place) for process in running.values()}
                    place = min(set(range(workers)) - taken)
                    begun(name)
                    running[name] = start(commands[name], environment(workers, place, gpus))
                    running[name].place = place
                time.sleep(poll)
                if interrupted and not stopped:
                    print("\nstopping: what is being trained saves its state ...", flush=True)
                    stopped = True
                    ask_to_stop(running, signal.SIGHUP if signal.SIGHUP in interrupted else signal.SIGINT)
                for name, process in list(running.items()):
                    code = process.poll()
                    if code is None:
                        continue
                    del running[name]
                    ended(name, code)
                    if code in (EXIT_INTERRUPTED, *EXITS_UNBEGUN) and not stopped:
                        stopped = True
                        ask_to_stop(running)
        except BaseException:  # `begun` or `ended` could not write: nobody would watch over what runs, or know of it
            ask_to_stop(running)
            for process in running.values():
                process.wait()
            raise
    return not waiting and not stopped


@contextmanager
def interruptions() -> Iterator[list[int]]:
    """Note signals instead of raising, in a list that is yielded: raising amid a start leaves one nobody knows of."""
    noted: list[int] = []
    # what a shell starts in the background ignores SIGINT, and goes on ignoring it
    with handled(noted.append, *(n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN)):
        yield noted


def start(command: Sequence[str], environment: Mapping[str, str]) -> Any:
    """Start a process in a session of its own.

    The terminal's Ctrl-C would otherwise reach it twice, from the terminal and from us, and a second one means "at
    once".
    """
    return subprocess.Popen(command, start_new_session=True, env=dict(environment))


def ask_to_stop(running: Mapping[str, Any], number: int = signal.SIGINT) -> None:
    """Send the signal to each process, once: SIGHUP where the terminal is gone to which they print, too."""
    for process in running.values():
        process.send_signal(number)


def describe_exit(code: int) -> str:
    """Say how a process ended."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def visible_devices() -> list[str]:
    """Return the GPUs that this process may see, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [device.strip() for device in named.split(",") if device.strip()]
    import torch

    return [str(device) for device in range(torch.cuda.device_count())]


def environment(workers: int, place: int, devices: Sequence[str] = ()) -> dict[str, str]:
    """Return a process's environment: its share of the cores, its GPU, and its line for the progress bar."""
    own = dict(os.environ)
    if devices:
        own["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
    if workers > 1:
        cores = len(os.sched_getaffinity(0))
        own.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))
        own.setdefault("TQDM_POSITION", str(place))
    return own
