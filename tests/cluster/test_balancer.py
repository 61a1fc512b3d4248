"""The load balancer of these tests: in turn, past those that are not there, and cut when told."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from balancer import Balancer
from ports import free_port


@asynccontextmanager
async def _named(name: str) -> AsyncIterator[int]:
    """A server that says its name, and then nothing until it is left; gives its port."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(name.encode() + b"\n")
        with suppress(ConnectionError):
            await reader.read()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def _outcome(reader: asyncio.StreamReader) -> str:
    try:
        return (await reader.read()).decode()
    except ConnectionError:
        return "reset"


async def test_connections_go_in_turn_and_past_the_dead() -> None:
    """Each connection goes to the next server; one that refuses is passed over; a cut ends what is open."""
    async with _named("one") as one, _named("other") as other, Balancer([one, free_port(), other]) as balancer:
        streams = [await asyncio.open_connection("127.0.0.1", balancer.port) for _ in range(4)]
        heard = [(await reader.readline()).decode().strip() for reader, _ in streams]
        assert heard == ["one", "other", "one", "other"]
        assert balancer.served == [one, other, one, other]
        balancer.cut()
        assert {await _outcome(reader) for reader, _ in streams} <= {"", "reset"}
        for _, writer in streams:
            writer.close()
