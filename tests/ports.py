"""Ports for servers that tests start, stop and start again: free, and theirs alone while the run lasts.

The system lends ports from 32768 up to whoever connects: a client that tries to
reach a dead server there may get that very port, and be connected to itself.  So
these lie below, and each that is given is held by a lock until this process ends: a
server that is down keeps its port, whoever else runs tests on this machine.  (A storm
whose server was down found another run's in its place, and told of lost epochs.)
"""

import fcntl
import os
import random
import socket
import tempfile
from contextlib import suppress
from pathlib import Path

FIRST, LAST = 20_000, 32_000


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that nobody else will be given."""
    while True:
        port = random.randrange(FIRST, LAST)
        if not _hold(port):
            continue
        with socket.socket() as sock:
            # One on which a server has just ended is free as well.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                sock.bind(("127.0.0.1", port))
                return port


def _hold(port: int) -> bool:
    """Lock the port's file, for as long as this process lives; false if somebody has."""
    folder = Path(tempfile.gettempdir(), f"waterspout-ports-{os.getuid()}")
    folder.mkdir(exist_ok=True)
    held = os.open(folder / str(port), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        return False
    return True
