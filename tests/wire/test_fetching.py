"""How back ends are asked: what goes out is one request, what is no answer is said to be none.  PROTOCOL 16.0.10."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support import PATIENCE_S

from handlers.fetching import Fetcher
from server.errors import Unavailable
from server.proxies import Post

MOST_BYTES = 100_000
BODY = b'{"client":"c1"}'
WELL = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


class Far:
    """A back end that takes one request a connection, and says exactly what the test will have it say."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.port = 0
        self.heads: list[dict[str, str]] = []
        """The headers of each request, in lower case."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection; without an answer it is left open."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        except asyncio.IncompleteReadError:  # somebody connected and thought better of it
            writer.close()
            return
        length = re.search(r"\r\ncontent-length: ([0-9]+)", head)
        assert length, head
        assert await reader.readexactly(int(length[1])) == BODY
        self.heads.append(dict(line.split(": ", 1) for line in head.split("\r\n")[1:-2]))
        writer.write(self.answer)
        if self.answer:
            writer.close()
        else:
            await reader.read()
            writer.close()

    def post(self, timeout_s: float = PATIENCE_S, **headers: str) -> Post:
        """A question."""
        return Post(
            f"http://127.0.0.1:{self.port}/asked", {"Content-Type": "application/json", **headers}, BODY, timeout_s
        )


@asynccontextmanager
async def far(answer: bytes = WELL) -> AsyncIterator[tuple[Far, Fetcher]]:
    """A back end, and who asks it."""
    there = Far(answer)
    async with await asyncio.start_server(there.serve, "127.0.0.1", 0) as server:
        there.port = server.sockets[0].getsockname()[1]
        yield there, Fetcher(most_bytes=MOST_BYTES)


async def test_what_is_about_one_connection_is_not_passed_on() -> None:
    """Whoever lists such headers cannot bring two messages out of step; another host may be named."""
    async with far() as (there, fetch):
        ill = {"Transfer-Encoding": "chunked", "Content-Length": "3", "TE": "x", "Expect": "100", "Upgrade": "h2c"}
        response = await fetch(there.post(**ill, Host="elsewhere.example", Cookie="a=b"))
        assert (response.status, response.body) == (200, b"{}")
        (head,) = there.heads
        assert (head["host"], head["cookie"], head["content-length"]) == ("elsewhere.example", "a=b", str(len(BODY)))
        assert not head.keys() & {"transfer-encoding", "te", "expect", "upgrade"}


async def test_who_asks_no_more_is_no_fault() -> None:
    """A question that its asker has given up is nobody's when its connection ends: nothing is logged of it."""
    asked, hang_up = asyncio.Event(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await hang_up.wait()
        writer.close()

    async with far() as (there, fetch), await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        given_up = asyncio.create_task(fetch(Post(f"http://127.0.0.1:{port}/", {}, BODY, PATIENCE_S)))
        await asked.wait()
        given_up.cancel()
        await asyncio.wait([given_up])
        hang_up.set()
        assert (await fetch(there.post())).status == 200  # by then the other connection's end has been noticed
        assert given_up.cancelled()


async def test_a_header_cannot_become_two() -> None:
    """A line break in a header is refused before anything is said; what Latin-1 has not, too."""
    async with far() as (there, fetch):
        for value in ("a\r\nX: b", "a\nb", "日本"):
            with pytest.raises(Unavailable):
                await fetch(there.post(Cookie=value))
        assert there.heads == []


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (MOST_BYTES + 1),
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000,
        b"SSH-2.0-OpenSSH_9.2\r\n",
    ],
)
async def test_what_is_no_answer(answer: bytes) -> None:
    """One that ends early, is too large, has too much of a head, or is of another protocol, is none."""
    async with far(answer) as (there, fetch):
        with pytest.raises(Unavailable):
            await fetch(there.post())
        assert len(there.heads) == 1


async def test_time_is_up() -> None:
    """A back end that listens and says nothing is given up after the time of its question."""
    async with far(b"") as (there, fetch):
        while not there.heads:  # where everything stands still the time may be up before the question is asked
            with pytest.raises(Unavailable):
                await fetch(there.post(timeout_s=0.2))
        assert len(there.heads) == 1
