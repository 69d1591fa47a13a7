"""Refuse every connection that leaves the machine, and write it down; tests/conftest.py puts this on PYTHONPATH.

Python imports a module of this name at its start, so the processes that tests start are watched as well. An audit hook
sees all sockets of Python, whoever opens them; sockets of native code are counted by `benchmarks/faults.py F19`.
"""

import os
import sys

LOG = os.environ.get("MMDIT_NETWORK_LOG")
_NAMES = {"", "localhost", "localhost.localdomain", "0.0.0.0", "::", "::1"}


def is_local(host: object) -> bool:
    """Say whether a host is this machine; None and the empty name are."""
    if host is None:
        return True
    name = host.decode(errors="replace") if isinstance(host, bytes) else str(host)
    return name.lower() in {*_NAMES, os.uname().nodename.lower()} or name.startswith("127.")


def watch(event: str, arguments: tuple) -> None:
    """Stand in the way of a socket.

    Raises:
        ConnectionRefusedError: the address is on another machine.
    """
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) and address else None  # a path: a socket of this machine
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    else:
        return
    if is_local(host):
        return
    line = f"{os.environ.get('PYTEST_CURRENT_TEST', 'outside a test')}\t{event}\t{host}\n"
    if LOG:
        with open(LOG, "a", encoding="utf-8") as log:
            log.write(line)
    raise ConnectionRefusedError(f"tests are offline: {event} to {host!r} refused")


sys.addaudithook(watch)
