"""Which of our bare sockets have something to read.

A loop can say so itself (``add_reader``), and is asked to where there is no ``epoll``.  asyncio's then makes a
key, a handle and a bound method for each socket, looks them up for each event and runs each in a context of its own:
some 10 of the 330 µs that a connection costs to come, 0.3 of the 2.7 KB that it takes while it is there, and a tenth of
a command (``make bench WORKS=W3,W6``, November 2026).  So here all of them stand in one ``epoll`` of ours, which
the loop watches as if it were one socket, and what has come is handed on in one go.

Nothing else changes by it: who is ready is told in the same turn of the loop, and only so many in one go, so that the
loop's other business has its turn between.
"""

import asyncio
import select
import sys
from typing import Protocol

from server.observe import event

TURN_SOCKETS = 256
"""How many sockets are read in one go; the others have their turn in the next one, before these have another."""


class Reader(Protocol):
    """Who reads a socket."""

    def readable(self) -> None:
        """Something has come, or the end."""


class Arrivals:
    """The sockets of one event loop that are read; by their numbers, as the kernel knows them.

    Must be made on the running loop.  Holds nothing of the system's while nobody is expected.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._readers: dict[int, Reader] = {}
        self._epoll: select.epoll | None = None

    def __repr__(self) -> str:
        return f"<Arrivals at {len(self._readers)} sockets>"

    def expect(self, fd: int, reader: Reader) -> None:
        """Tell ``reader`` in each turn in which there is something, until ``ignore``; ``fd`` is not expected yet."""
        if sys.platform == "linux":
            if self._epoll is None:
                self._epoll = select.epoll()
                self._loop.add_reader(self._epoll.fileno(), self._arrived)
            self._epoll.register(fd, select.EPOLLIN)
        else:
            self._loop.add_reader(fd, reader.readable)
        self._readers[fd] = reader

    def ignore(self, fd: int) -> None:
        """Tell nobody any more; before the socket is closed, and also if nobody was told."""
        if self._readers.pop(fd, None) is None:
            return
        if self._epoll is not None:
            self._epoll.unregister(fd)
            if not self._readers:
                self._loop.remove_reader(self._epoll.fileno())
                self._epoll.close()
                self._epoll = None
        else:
            self._loop.remove_reader(fd)

    def _arrived(self) -> None:
        if self._epoll is None:  # the last one has been ignored since the loop saw that it had something
            return
        for fd, _ in self._epoll.poll(0, TURN_SOCKETS):
            reader = self._readers.get(fd)  # one who was told before may have ended it
            if reader is None:
                continue
            try:
                reader.readable()
            except Exception as fault:  # the others' bytes have come as well
                event("task.failed", task="read a socket", fault=fault)
