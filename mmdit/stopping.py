"""The signals that ask a long run to save and end: Ctrl-C, SIGTERM, and SIGHUP where its terminal is closed.

What is printed to a terminal that is gone raises an error in whoever prints, so a SIGHUP first sends it nowhere. Kernel
and shell may both send one: two are still one wish. Under nohup SIGHUP stays ignored.
"""

import os
import signal
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

SIGHUP = getattr(signal, "SIGHUP", None)  # systems without terminals of this kind have none


@contextmanager
def handled(act: Callable[[int], None], *numbers: int) -> Iterator[None]:
    """Within, call act(number) where one of these signals comes, or SIGHUP, once, unless it is ignored.

    In another thread than the main one nothing changes: whoever runs us there handles signals.
    """

    def handle(number: int, frame: object) -> None:
        if number == SIGHUP:
            signal.signal(number, signal.SIG_IGN)
            let_go_of_terminal()
        act(number)

    wanted = set(numbers)
    if SIGHUP is not None and signal.getsignal(SIGHUP) != signal.SIG_IGN:
        wanted.add(SIGHUP)
    with _set(handle, wanted):
        yield


@contextmanager
def ignored(*numbers: int) -> Iterator[None]:
    """Within, ignore these signals; a process that is started meanwhile goes on ignoring them."""
    with _set(signal.SIG_IGN, numbers):
        yield


@contextmanager
def _set(handler: Callable[[int, Any], None] | signal.Handlers, numbers: Iterable[int]) -> Iterator[None]:
    """Within, give these signals a handler; nothing changes in another thread than the main one."""
    previous = {}
    with suppress(ValueError):  # not the main thread
        for number in numbers:
            previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def interrupt(number: int) -> None:
    """Stop as Ctrl-C does where nobody ignores it; for `handled`.

    Raises:
        KeyboardInterrupt: always.
    """
    raise KeyboardInterrupt


def let_go_of_terminal() -> None:
    """Send what is printed from now on nowhere, where it went to a terminal."""
    with open(os.devnull, "wb") as nowhere:
        for descriptor in (1, 2):
            try:
                terminal = stat.S_ISCHR(os.fstat(descriptor).st_mode)  # of a closed one, isatty says no
            except OSError:
                continue
            if terminal:
                os.dup2(nowhere.fileno(), descriptor)
