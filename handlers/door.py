"""How many clients may come in: beyond the limits a handshake is answered 503, before it costs a session.

PROTOCOL 18: ``client.connection_limit``, ``client.address_connection_limit`` and
``client.connection_rate_limit``.
"""

import resource
from collections.abc import Callable

from server.leaving import REASON
from server.limits import Bucket, Rate, network
from server.node import Node

SPARE_FILES = 100
"""Open files that are left to listening sockets, stores, logs, and requests that are being answered."""


def open_files() -> int:
    """How many files this process may have open."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


class Door:
    """Asked once for each client that wants to come in; ``clock()`` gives seconds that only grow.

    Each connection is an open file, and a process that may open no more cannot even
    accept somebody to tell them so: ``files`` bounds the connections as well.
    """

    def __init__(self, node: Node, clock: Callable[[], float], files: int | None = None) -> None:
        self._node = node
        self._clock = clock
        self._files = open_files() if files is None else files
        self._per_second = node.settings.client.connection_rate_limit
        self._bucket = Bucket(Rate.of(self._per_second))

    def refusal(self, address: str) -> str | None:
        """The setting that keeps a client of ``address`` out, or ``None`` if it may come in (which counts).

        A process that sends its clients away takes no other in their place (PROTOCOL 17.0.3).
        """
        if self._node.leaving:
            return REASON
        why = self._full(address)
        if why is not None:
            self._node.counts.note_why(why)
        return why

    def _full(self, address: str) -> str | None:
        node, settings = self._node, self._node.settings.client
        if settings.connection_limit and node.connections >= settings.connection_limit:
            return "client.connection_limit"
        if self._files > 0 and node.connections >= self._files - SPARE_FILES:
            return f"client.connection_limit, which the limit of open files ({self._files}) does not allow for"
        if settings.address_connection_limit:
            here = node.addresses.get(network(address), 0)
            if here >= settings.address_connection_limit:
                return "client.address_connection_limit"
        if settings.connection_rate_limit != self._per_second:  # the settings were read again
            self._per_second = settings.connection_rate_limit
            self._bucket = Bucket(Rate.of(self._per_second))
        return None if self._bucket.take(self._clock()) else "client.connection_rate_limit"
