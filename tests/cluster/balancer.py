"""A load balancer without memory: each connection goes to the next server in turn, whoever comes."""

import asyncio
import itertools
import socket
from collections.abc import Sequence
from typing import Self

from ports import free_port


def listening() -> socket.socket:
    """A socket that listens on a free port of 127.0.0.1: who connects waits until somebody serves it."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", free_port()))
    sock.listen(1024)
    sock.setblocking(False)
    return sock


class Balancer:
    """A TCP proxy before some ports of 127.0.0.1; a port that refuses is passed over.

    Each server is *next* in turn, so that two connections of one client end at
    two servers.  ``cut`` breaks all connections, as a network may.
    """

    def __init__(self, ports: Sequence[int]) -> None:
        self.ports = ports
        self.port = 0
        self.served: list[int] = []
        """The port of each connection so far, in their order."""
        self._turns = itertools.cycle(ports)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

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
        self._server = await asyncio.start_server(self._accept, sock=sock)

    async def end(self) -> None:
        """Take no more, and break what there is."""
        if self._server is not None:
            self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Break every connection at once, without a goodbye."""
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            far_reader, far_writer = await self._next_server()
            self._writers.add(far_writer)
            try:
                await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
            finally:
                self._writers.discard(far_writer)
                far_writer.transport.abort()
        except OSError:
            pass  # one side is gone, or was cut: the other goes, too
        finally:
            self._writers.discard(writer)
            self._tasks.discard(task)
            writer.transport.abort()

    async def _next_server(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        for port in itertools.islice(self._turns, len(self.ports)):
            try:
                streams = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                continue
            self.served.append(port)
            return streams
        raise ConnectionRefusedError("no server is there")


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
