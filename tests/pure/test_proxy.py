"""The proxy of the fault tests does what it is told: what it breaks is broken, and nothing else is."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import awake
from proxy import Proxy, Splitter, is_message

PATIENCE_S = 15.0


class Echo:
    """A server that sends back what it gets; ``ended`` counts the connections that were closed from the other side."""

    def __init__(self) -> None:
        self.port = 0
        self.ended = 0
        self.news = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()
            self.ended += 1
            self.news.set()


@asynccontextmanager
async def echo(resp: bool = False) -> AsyncIterator[tuple[Echo, Proxy]]:
    """An echo behind a proxy."""
    far = Echo()
    server = await asyncio.start_server(far.serve, "127.0.0.1", 0)
    far.port = server.sockets[0].getsockname()[1]
    async with Proxy("127.0.0.1", far.port, resp=resp, lots=random.Random(1)) as proxy:
        yield far, proxy
    server.close()


Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connected(proxy: Proxy) -> Line:
    """A connection through the proxy."""
    return await asyncio.open_connection(proxy.host, proxy.port)


async def said(line: Line, text: bytes) -> bytes:
    """What comes back for ``text``."""
    reader, writer = line
    writer.write(text)
    async with asyncio.timeout(PATIENCE_S):
        return await reader.readexactly(len(text))


async def test_it_passes_everything_on_in_order() -> None:
    """A megabyte arrives whole and in order on each of several connections, and an end is an end on both sides."""
    payload = random.Random(2).randbytes(1_000_000)
    async with echo() as (far, proxy):
        lines = [await connected(proxy) for _ in range(3)]
        assert await asyncio.gather(*(said(line, payload) for line in lines)) == [payload] * 3
        assert proxy.connections == 3
        for _, writer in lines:
            writer.close()
        async with asyncio.timeout(PATIENCE_S):
            while far.ended < 3 or proxy.connections:
                await asyncio.wait_for(far.news.wait(), PATIENCE_S)
                far.news.clear()
                await asyncio.sleep(0)
        assert proxy.accepted == 3


async def test_cut_resets_what_is_open_and_nothing_else() -> None:
    """After ``cut`` both ends see a reset; new connections work."""
    async with echo() as (far, proxy):
        line = await connected(proxy)
        assert await said(line, b"a") == b"a"
        assert proxy.cut() == 1
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(line[0].read(1), PATIENCE_S)
        line[1].close()
        await asyncio.wait_for(far.news.wait(), PATIENCE_S)
        other = await connected(proxy)
        assert await said(other, b"b") == b"b"
        other[1].close()


async def test_refuse_turns_newcomers_away() -> None:
    """While it refuses, open connections go on and new ones are refused; then they are accepted at the same port."""
    async with echo() as (_, proxy):
        line = await connected(proxy)
        assert await said(line, b"a") == b"a"
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await connected(proxy)
        assert await said(line, b"b") == b"b"
        await proxy.accept()
        other = await connected(proxy)
        assert await said(other, b"c") == b"c"
        for _, writer in (line, other):
            writer.close()


async def test_stall_holds_everything_back_and_flow_lets_it_go() -> None:
    """While it stalls, connections are accepted and silent; afterwards what was said arrives."""
    async with echo() as (_, proxy):
        old = await connected(proxy)
        assert await said(old, b"a") == b"a"
        proxy.stall()
        new = await connected(proxy)
        for _, writer in (old, new):
            writer.write(b"held")
        reads = [asyncio.ensure_future(reader.readexactly(4)) for reader, _ in (old, new)]
        done, _ = await asyncio.wait(reads, timeout=0.2)
        assert not done
        proxy.flow()
        assert await asyncio.wait_for(asyncio.gather(*reads), PATIENCE_S) == [b"held", b"held"]
        for _, writer in (old, new):
            writer.close()


async def test_delay_makes_everything_late_but_not_slow() -> None:
    """Ten answers, asked for at once, take one delay there and one back, and not ten."""
    loop = asyncio.get_running_loop()
    async with echo() as (_, proxy):
        line = await connected(proxy)
        proxy.delay_s = 0.15
        began = loop.time()
        async with awake() as watch:
            for _ in range(10):
                line[1].write(b"x" * 1000)
                await asyncio.sleep(0)
            await asyncio.wait_for(line[0].readexactly(10_000), PATIENCE_S)
        assert loop.time() - began >= 0.3
        assert watch.s < 1.5
        line[1].close()


async def test_reset_chance_cuts_by_lot() -> None:
    """With a chance of a half, of many connections that speak some are reset, and a chance of 0 resets none."""
    async with echo() as (_, proxy):

        async def one() -> bool:
            line = await connected(proxy)
            try:
                return await said(line, b"a") == b"a"
            except (ConnectionError, asyncio.IncompleteReadError):
                return False
            finally:
                line[1].close()

        assert all([await one() for _ in range(20)])
        proxy.reset_chance = 0.5
        lots = [await one() for _ in range(40)]
        assert {True, False} == set(lots)


def resp(value: object) -> bytes:
    """A value as Redis sends it."""
    match value:
        case bytes():
            return b"$%d\r\n%s\r\n" % (len(value), value)
        case int():
            return b":%d\r\n" % value
        case None:
            return b"$-1\r\n"
        case list():
            return b"*%d\r\n" % len(value) + b"".join(map(resp, value))
    raise AssertionError(value)


def message(number: int) -> bytes:
    """A message of a channel, as Redis sends it."""
    return resp([b"message", b"c", b"%d\r\n" % number])


async def test_lose_drops_messages_and_nothing_else() -> None:
    """With a loss of 30 % about that many messages are missing, the rest arrives in order, and no answer is lost."""
    answer = resp([b"pong", b"message"])
    async with echo(resp=True) as (_, proxy):
        line = await connected(proxy)
        proxy.lose(0.3)
        line[1].write(b"".join(message(number) + answer for number in range(1000)) + b"+END\r\n")
        got = await asyncio.wait_for(line[0].readuntil(b"+END\r\n"), PATIENCE_S)
        values = list(Splitter().feed(got))
        arrived = [value for value in values if is_message(value)]
        assert [value for value in values if not is_message(value)] == [answer] * 1000 + [b"+END\r\n"]
        assert 600 < len(arrived) < 800
        assert arrived == [value for number in range(1000) if (value := message(number)) in set(arrived)]
        assert (proxy.passed, proxy.lost) == (len(arrived), 1000 - len(arrived))
        line[1].close()


values = st.recursive(
    st.binary(max_size=20) | st.integers(-5, 5) | st.none(), lambda parts: st.lists(parts, max_size=4), max_leaves=10
)


@given(st.lists(values, max_size=6), st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_values_are_found_however_they_are_cut(said: list[object], sizes: list[int]) -> None:
    """However a stream of RESP values is cut into pieces, each value comes out whole, once and in order."""
    whole = [resp(value) for value in said]
    stream, splitter, found = b"".join(whole), Splitter(), []
    at, turn = 0, 0
    while at < len(stream):
        size = sizes[turn % len(sizes)]
        found += list(splitter.feed(stream[at : at + size]))
        at, turn = at + size, turn + 1
    assert found == whole


def test_what_counts_as_a_message() -> None:
    """Messages of channels, patterns and shards count, in RESP2 and RESP3; confirmations and answers do not."""
    for kind in (b"message", b"smessage", b"pmessage"):
        assert is_message(resp([kind, b"c", b"text"]))
        assert is_message(b">" + resp([kind, b"c", b"text"])[1:])
    for other in ([b"subscribe", b"message", 1], [b"pong", b""], [], b"message", None, 3):
        assert not is_message(resp(other))
