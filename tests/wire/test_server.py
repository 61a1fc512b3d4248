"""How long a request may take to come, and who is not meant by that."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from hopper import ask
from support import PATIENCE_S, Client, listening, serving
from tornado.netutil import bind_sockets

import run
from handlers import make_app

REQUEST_S = 0.4
POLL = b"GET /v1/channels/chat:room/publications?timeout=20s&epoch=&offset=0 HTTP/1.1\r\nHost: a\r\n\r\n"
PUBLISH = (
    b"POST /v1/channels/chat:room/publications HTTP/1.1\r\nHost: a\r\n"
    b'Content-Type: application/json\r\nContent-Length: 10\r\n\r\n{"data":1}'
)
LIVE = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"


class Connection:
    """An HTTP connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def head(self) -> bytes:
        """The next answer's head."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.readuntil(b"\r\n\r\n")

    async def ended(self) -> bytes:
        """What comes until the server ends it."""
        async with asyncio.timeout(PATIENCE_S):
            with suppress(ConnectionError):
                return await self.reader.read()
        return b""


@asynccontextmanager
async def hurried() -> AsyncIterator[int]:
    """The port of a server on which requests have to come soon."""
    async with serving() as site:
        server = run.make_server(make_app(site.node, site.sockets), None, request_s=REQUEST_S)
        async with listening(server) as port:
            yield port


@asynccontextmanager
async def connection(port: int, said: bytes = b"") -> AsyncIterator[Connection]:
    """A connection on which so much has been said."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(said)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def test_who_says_nothing_is_ended() -> None:
    """A connection on which no request comes is ended, and so is one that was answered and asks no more."""
    async with hurried() as port, connection(port) as silent, connection(port, LIVE) as content:
        assert b" 200 " in await content.head()
        assert await silent.ended() == b""
        await content.ended()


async def test_who_comes_later_is_ended_as_well() -> None:
    """The clock goes on for those who came while it ran."""
    async with hurried() as port, connection(port) as first:
        asked = asyncio.get_running_loop().time()
        async with connection(port, b"GET / HT") as second, connection(port) as third:
            assert await first.ended() == await second.ended() == await third.ended() == b""
            assert asyncio.get_running_loop().time() - asked >= REQUEST_S * 0.9


async def test_who_waits_for_us_is_not_meant() -> None:
    """A long-poll and a WebSocket live on, however long ago their request came."""
    async with hurried() as port, connection(port, POLL) as polling:
        client = await Client.connected(f"ws://127.0.0.1:{port}/connection/websocket")
        async with connection(port) as silent:
            await silent.ended()  # by now the time of both others' requests would be over as well
        assert (await client.ask("publish", channel="chat:room", data={"n": 1})) == {}
        assert b" 200 " in await polling.head()
        await client.close()


@pytest.mark.parametrize("part", [PUBLISH[:20], PUBLISH[:-1]])
async def test_who_refuses_carries_nothing_out(part: bytes) -> None:
    """From ``refuse`` on no request is carried out, not one that had begun to come, nor on a connection that was kept.

    Connections were closed one after the other: what was asked on the last of them was done, and then cut.
    """
    async with serving() as site:
        server = run.make_server(make_app(site.node, site.sockets), None)
        listening = bind_sockets(0, "127.0.0.1")
        server.add_sockets(listening)
        port = listening[0].getsockname()[1]
        async with connection(port, LIVE) as kept, connection(port, LIVE + part) as begun:
            assert b" 200 " in await kept.head() + await begun.head()
            await kept.reader.readexactly(len("{}"))
            await begun.reader.readexactly(len("{}"))
            while server.under_way != part.count(b"\r\n\r\n"):
                await turn()
            server.refuse()
            kept.writer.write(PUBLISH)
            begun.writer.write(PUBLISH[len(part) :])
            assert await kept.ended() == await begun.ended() == b""
            assert server.under_way == 0
        await server.close_all_connections()
        assert (await ask(site.port, "/v1/channels/chat:room/publications")).json["publications"] == []


async def turn() -> None:
    """One turn of the loop, in which the server reads on."""
    await asyncio.sleep(0)
