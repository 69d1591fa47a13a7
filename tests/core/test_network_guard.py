"""The guard that keeps the tests offline: it refuses other machines, lets this one through, and tells who tried."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

TRY = "import socket\ntry: socket.create_connection(('192.0.2.1', 80), 5)\nexcept ConnectionRefusedError as e: print(e)"


@pytest.fixture
def own_log(tmp_path):
    """What this file tries on purpose is taken out of the list of tries again."""
    log = Path(os.environ["MMDIT_NETWORK_LOG"])
    before = log.read_bytes()
    yield lambda: log.read_bytes()[len(before) :].decode()
    log.write_bytes(before)


@pytest.mark.parametrize("host", ["192.0.2.1", "example.invalid"])  # reserved for documentation, for nothing
def test_another_machine_is_refused_and_the_try_written_down(own_log, host):
    with pytest.raises(ConnectionRefusedError, match="tests are offline"):
        socket.create_connection((host, 80), 5)
    assert host in own_log()
    assert "test_another_machine_is_refused" in own_log()


def test_a_process_that_a_test_starts_is_refused_as_well(own_log):
    done = subprocess.run([sys.executable, "-c", TRY], capture_output=True, text=True, check=True)
    assert "tests are offline" in done.stdout
    assert "192.0.2.1" in own_log()


def test_sockets_of_this_machine_are_let_through(own_log):
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1]), 5).close()
    assert own_log() == ""
