"""A wire between a browser and its server that a test cuts, without the browser being told that it is offline."""

import asyncio
from typing import Self

from ports import free_port
from relay import Relay, Streams


class Wire(Relay):
    """Carries TCP connections to a port of this machine; from ``end`` until ``mend`` new ones are refused."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._to = port
        self._port = free_port()  # it is ours while nobody listens on it, too

    @property
    def http(self) -> str:
        """Where browsers go."""
        return f"http://127.0.0.1:{self._port}"

    async def far(self) -> Streams:
        """See ``Relay.far``."""
        return await asyncio.open_connection("127.0.0.1", self._to)

    async def mend(self) -> None:
        """Carry connections, on the same port as before."""
        self._server = await asyncio.start_server(self.accept, "127.0.0.1", self._port)

    async def __aenter__(self) -> Self:
        await self.mend()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.end()
