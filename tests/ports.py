"""Ports for servers that tests start, stop and start again: free, and theirs alone while the run lasts.

The system lends ports from 32768 up to whoever connects: a client that tries to
reach a dead server there may get that very port, and be connected to itself.  So
these lie below, none is given twice, and each of several test processes that share
the work (pytest-xdist) gives away a range of its own: a server that is down keeps
its port.
"""

import os
import random
import socket

FIRST, LAST = 20_000, 32_000

_given: set[int] = set()


def _range() -> range:
    """The ports of this test process."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    size = (LAST - FIRST) // max(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), number + 1)
    return range(FIRST + number * size, FIRST + (number + 1) * size)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that nobody else will be given."""
    while True:
        port = random.choice(_range())
        with socket.socket() as sock:
            # One on which a server has just ended is free as well.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _given:
            _given.add(port)
            return port
