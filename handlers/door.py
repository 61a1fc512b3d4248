"""How many clients may come in: beyond the limits a handshake is answered 503, before it costs a session.

PROTOCOL 18, ``client.connection_limit`` and ``client.connection_rate_limit``.
"""

from collections.abc import Callable

from server.node import Node


class Door:
    """Asked once for each client that wants to come in; ``clock()`` gives seconds that only grow."""

    def __init__(self, node: Node, clock: Callable[[], float]) -> None:
        self._node = node
        self._clock = clock
        self._rate = node.settings.client.connection_rate_limit
        self._tokens = float(self._rate)
        self._filled_at = clock()

    def refusal(self) -> str | None:
        """The setting that keeps this client out, or ``None`` if it may come in (which counts)."""
        limit = self._node.settings.client.connection_limit
        if limit and self._node.connections >= limit:
            return "client.connection_limit"
        if not self._rate:
            return None
        now = self._clock()
        self._tokens = min(float(self._rate), self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
        if self._tokens < 1:
            return "client.connection_rate_limit"
        self._tokens -= 1
        return None
