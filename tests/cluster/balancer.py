"""A load balancer without memory: each connection goes to the next server in turn, whoever comes."""

import asyncio
import itertools
import socket
from collections.abc import Sequence
from typing import Self

from ports import free_port
from relay import Relay, Streams


def listening() -> socket.socket:
    """A socket that listens on a free port of 127.0.0.1: who connects waits until somebody serves it."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", free_port()))
    sock.listen(1024)
    sock.setblocking(False)
    return sock


class Balancer(Relay):
    """A TCP proxy before some ports of 127.0.0.1; a port that refuses is passed over.

    Each server is *next* in turn, so that two connections of one client end at
    two servers.  ``cut`` breaks all connections, as a network may.
    """

    def __init__(self, ports: Sequence[int]) -> None:
        super().__init__()
        self.ports = ports
        self.port = 0
        self.served: list[int] = []
        """The port of each connection so far, in their order."""
        self._turns = itertools.cycle(ports)

    @property
    def url(self) -> str:
        """Where WebSocket clients connect."""
        return f"ws://127.0.0.1:{self.port}/connection/websocket"

    @property
    def http(self) -> str:
        """Where browsers go."""
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.serve(listening())
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.end()

    async def serve(self, sock: socket.socket) -> None:
        """Take connections from ``sock``, which listens already."""
        self.port = sock.getsockname()[1]
        self._server = await asyncio.start_server(self.accept, sock=sock)

    async def far(self) -> Streams:
        """To the next server that is there."""
        for port in itertools.islice(self._turns, len(self.ports)):
            try:
                streams = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                continue
            self.served.append(port)
            return streams
        raise ConnectionRefusedError("no server is there")
