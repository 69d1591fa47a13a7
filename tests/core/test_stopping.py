import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mmdit.stopping import handled

# in a terminal of its own: waits until its terminal is closed, then prints and writes what it saw
CHILD = """
import os, signal, sys, time
os.setsid()
os.close(os.open(os.ttyname(0), os.O_RDWR))
from pathlib import Path
from mmdit.stopping import handled
seen = []
with handled(seen.append, signal.SIGTERM):
    print("ready", flush=True)
    for _ in range(300):
        if seen:
            break
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGHUP)  # the shell's, after the kernel's
    print("to nobody", flush=True)
    print("to nobody", file=sys.stderr, flush=True)
Path(sys.argv[1]).write_text(f"{seen}")
"""


@pytest.fixture(autouse=True)
def as_it_was():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_signal_is_told_and_the_handlers_are_put_back():
    seen = []
    with handled(seen.append, signal.SIGTERM):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [signal.SIGTERM, signal.SIGTERM]


def test_they_are_put_back_after_an_error():
    with pytest.raises(KeyError), handled(print, signal.SIGTERM):
        raise KeyError


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        seen = []
        with handled(seen.append, signal.SIGTERM):
            os.kill(os.getpid(), signal.SIGHUP)
        assert seen == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_changes_nothing():
    kept = []

    def enter():
        with handled(kept.append, signal.SIGTERM):
            kept.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert kept == [signal.getsignal(signal.SIGTERM)]


def test_a_closed_terminal_is_one_wish_and_what_is_printed_afterwards_is_dropped(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", CHILD, str(tmp_path / "seen")]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    assert b"ready" in os.read(ours, 1_000)
    os.close(ours)
    assert child.wait(timeout=20) == 0
    assert (tmp_path / "seen").read_text() == f"[{int(signal.SIGHUP)}]"
