"""P8 once more, by those who mean it: slow readers and writers, half-open sockets, bombs, floods, names, tokens.

Each test shows three things: the offender gets its code, the process's memory stays
below what is said here and in docs/limits.md, and a neighbour who was there before
loses nothing, has every publication once and in order, and goes on.  How long the
neighbour waits meanwhile is measured beside the tests (``benchmarks/hostile.py``),
since a test that measures time on a busy machine proves nothing.

Malformed frames, wrong types, deep JSON and huge numbers are in ``test_bad_input``,
names without end in ``test_made_up_names``.
"""

import asyncio
import base64
import gc
import json
import socket
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import websockets
from conftest import ExpectedLog
from hopper import ask
from support import PATIENCE_S, Client, Process, Site, listening, settings, token
from test_bad_input import beside

import run
from benchmarks.bare import HANDSHAKE, command, end_of_frame, frame
from handlers import make_app
from handlers.socket import SocketOutbox
from server.session import Session

KB, MB = 1024, 1024 * 1024

ROOM = "chat:neighbours"


@contextmanager
def using_at_most(limit: int) -> Iterator[None]:
    """What is done in this block must not hold more than so many bytes above what was held before, at its worst moment.

    The test's own clients are in the same process and count as well.
    """
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before <= limit, f"{(peak - before) / MB:.1f} MB, expected at most {limit / MB:.1f}"


def session_of(site: Site, client: Client) -> Session:
    """The server's side of a client that has connected."""
    session = site.node.sessions[client.hello["client"]]
    assert isinstance(session, Session)
    return session


async def narrow(site: Site | Process, buffer: int = 4096) -> socket.socket:
    """A socket whose system takes so many bytes at a time (0: as many as it likes), connected to the site."""
    sock = socket.socket()
    if buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", site.port))
    return sock


class Bare:
    """A client that is nothing but a socket: it reads when and what the test says."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.came = bytearray()
        """What was read and not yet looked at."""
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def connected(cls, site: Site | Process, *commands: bytes, buffer: int = 4096) -> "Bare":
        """Shake hands, connect, and say this; the answers to that have been read."""
        bare = cls(await narrow(site, buffer))
        await bare.say(HANDSHAKE + b"\r\n" + command(id=1, connect={}) + b"".join(commands))
        came = b""
        async with asyncio.timeout(PATIENCE_S):
            while came.count(b'{"id":') < 1 + len(commands):
                came += await bare.hear(4096)
        return bare

    async def say(self, data: bytes) -> None:
        """Send bytes."""
        await self._loop.sock_sendall(self.sock, data)

    async def hear(self, most: int) -> bytes:
        """Read so many bytes at most; ``b""`` at the end."""
        try:
            return await self._loop.sock_recv(self.sock, most)
        except ConnectionError:
            return b""

    async def answer(self, id: int) -> bytes:
        """Read until command ``id`` is answered; all that came, the answer included."""
        wanted = b'{"id":%d,' % id
        came, self.came = self.came, bytearray()
        seen = 0
        async with asyncio.timeout(PATIENCE_S):
            while came.find(wanted, seen) < 0:
                seen = max(0, len(came) - len(wanted))
                data = await self.hear(MB)
                assert data, "it was closed before it answered"
                came += data
        return bytes(came)

    async def code(self) -> int:
        """Read up to the server's goodbye; its code."""
        came = self.came
        async with asyncio.timeout(PATIENCE_S):
            while True:
                while (end := end_of_frame(came)) <= len(came):
                    if came[0] == 0x88:
                        return int.from_bytes(came[2:4], "big")
                    del came[:end]
                data = await self.hear(MB)
                assert data, "it was closed without a goodbye"
                came += data

    def vanish(self) -> None:
        """Close it."""
        self.sock.close()


async def until(done: Callable[[], bool]) -> None:
    """Go on turn by turn until it is so."""
    async with asyncio.timeout(PATIENCE_S):
        while not done():
            await turn()


async def turn() -> None:
    """One turn of the loop, in which others go on."""
    await asyncio.sleep(0)


# --- who reads slowly, or not at all ----------------------------------------------------------
@pytest.mark.parametrize("channel", ["chat:1", "live:1"])
@pytest.mark.parametrize("bytes_at_a_time", [0, 1])
async def test_a_slow_reader(channel: str, bytes_at_a_time: int) -> None:
    """P7: who reads nothing, or a byte now and then, holds one queue at most and is cut with 3008."""
    limit = 200_000
    async with beside(settings(client={"queue_max_size": limit})) as (site, neighbour):
        bare = await Bare.connected(site, command(id=2, subscribe={"channel": channel}))
        writer, hearer = await Client.connected(site.url), await Client.connected(site.url)
        await hearer.ask("subscribe", channel=channel)
        session = _other(site, writer, hearer, neighbour)
        said = 0
        with using_at_most(8 * MB):
            while not session.closed:
                assert said < 500, "it was not cut"
                await writer.ask("publish", channel=channel, data=[said, "x" * 20_000])
                said += 1
                assert session.outbox.waiting_bytes <= limit + 30_000
                if bytes_at_a_time:
                    bare.came += await bare.hear(bytes_at_a_time)
                assert (await hearer.push("pub", channel))["data"][0] == said - 1
        assert await bare.code() == 3008
        bare.vanish()


def _other(site: Site, *others: Any) -> Session:
    """The session at a site that belongs to none of these."""
    known = {one.hello["client"] for other in others for one in getattr(other, "clients", [other])}
    (client,) = set(site.node.sessions) - known
    session = site.node.sessions[client]
    assert isinstance(session, Session)
    return session


async def test_who_takes_nothing_for_too_long() -> None:
    """PROTOCOL 18: a queue that is not full but does not move is 3008 after ``client.outbox_stall_timeout``."""
    async with beside() as (site, neighbour):
        bare = await Bare.connected(site, command(id=2, subscribe={"channel": "live:1"}))
        writer = await Client.connected(site.url)
        session = _other(site, writer, neighbour)
        while not session.outbox.waiting_bytes:
            await writer.ask("publish", channel="live:1", data="x" * 20_000)
        site.sockets.check_stalled(asyncio.get_running_loop().time() + 11)
        await until(lambda: session.closed)
        assert await bare.code() == 3008
        bare.vanish()


async def test_a_thousand_pages_for_one_who_does_not_read() -> None:
    """Who asks for history without end and reads none of it is read no further, and never holds more than its queue."""
    async with beside(settings(client={"queue_max_size": 400_000})) as (site, neighbour):
        writer = await Client.connected(site.url)
        for _ in range(20):
            await writer.ask("publish", channel="chat:1", data="x" * 10_000)
        bare = await Bare.connected(site)
        session = _other(site, writer, neighbour)
        asked = b"".join(command(id=id, history={"channel": "chat:1", "limit": 300}) for id in range(2, 1_002))
        with using_at_most(8 * MB):
            await bare.say(asked)
            await until(lambda: session.outbox.waiting_bytes > 0)
            for _ in range(20):
                await neighbour.notices_nothing()
                assert session.outbox.waiting_bytes <= 600_000
        site.sockets.check_stalled(asyncio.get_running_loop().time() + 11)
        assert await bare.code() == 3008
        bare.vanish()


# --- who writes slowly --------------------------------------------------------------------------
async def test_a_byte_now_and_then() -> None:
    """A frame of 64 KB that comes byte by byte costs no more than the bytes, and no ping is answered: 3012."""
    async with beside() as (site, neighbour):
        bare = await Bare.connected(site)
        session = _other(site, neighbour)
        slow = bytes((0x81, 0xFE)) + (60_000).to_bytes(2, "big") + bytes(4) + b'{"id":2,"publish":{"channel":"chat:1"'
        with using_at_most(2 * MB):
            for at in range(len(slow)):
                await bare.say(slow[at : at + 1])
                await turn()
            await neighbour.notices_nothing()
        for one in neighbour.clients:
            session_of(site, one).next_ping = session.next_ping + 1_000  # they cannot answer in no time
        while not session.closed:
            site.pass_time(1)
        assert site.node.counts.limits["client.pong_timeout"] == 1
        site.sockets.check_stalled(asyncio.get_running_loop().time() + 60)
        assert await bare.code() == 3012
        bare.vanish()


@pytest.mark.parametrize(
    "part", [b"GET /connection/web", HANDSHAKE, b"POST /emulation HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"]
)
async def test_a_request_that_never_ends(part: bytes) -> None:
    """Who begins a request and does not go on with it is cut off when its time is over."""
    async with beside() as (site, _):
        server = run.make_server(make_app(site.node, site.sockets), None, request_s=0.3)  # type: ignore[arg-type]
        async with listening(server) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(part)
            async with asyncio.timeout(PATIENCE_S):
                with suppress(ConnectionError):
                    while await reader.read(1000):
                        pass
            writer.close()


async def test_half_open_sockets() -> None:
    """Fifty clients whose machines have vanished are gone after a ping, and their sockets after the goodbye's time."""
    async with beside() as (site, neighbour):
        bares = [await Bare.connected(site, command(id=2, subscribe={"channel": "live:1"})) for _ in range(50)]
        assert site.node.connections == 52
        for one in neighbour.clients:
            session_of(site, one).next_ping = site.clock() + 10_000
        site.pass_time(25 + 8 + 2)
        assert site.node.connections == 2
        assert site.node.counts.disconnects[3012] == 50
        assert "live:1" not in site.node.hub.feeds
        site.sockets.check_stalled(asyncio.get_running_loop().time() + 60)
        assert site.sockets.closing == 0
        for bare in bares:
            bare.vanish()


# --- bombs and floods -----------------------------------------------------------------------------
async def test_a_compression_bomb(log: ExpectedLog) -> None:
    """60 MB in 60 KB, and a bomb in fragments: 1009, and never more memory than a message may have."""
    log.expect("connection.violated")
    bomb = zlib.compress(bytes(60 * MB), 9)[2:-4][: 60 * KB]
    async with beside(settings(websocket={"compression": True})) as (site, neighbour):
        for fragments in (1, 10):
            bare = Bare(await narrow(site))
            await bare.say(HANDSHAKE + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n")
            assert b"permessage-deflate" in await bare.hear(4096)
            step = len(bomb) // fragments
            parts = [bomb[at * step : (at + 1) * step] for at in range(fragments)]
            with using_at_most(2 * MB):
                for at, part in enumerate(parts):
                    first = (0x41 if at == 0 else 0x00) | (0x80 if at == fragments - 1 else 0)
                    await bare.say(frame(first, part))
                assert await bare.code() == 1009
            await neighbour.notices_nothing()
            bare.vanish()
        assert site.node.counts.limits["websocket.message_size_limit"] == 2


@pytest.mark.parametrize("opcode", [0x89, 0x8A])
async def test_a_flood_of_pings(opcode: int) -> None:
    """PROTOCOL 3.4.10: pings of RFC 6455, and pongs that nobody asked for, count as commands: 3013 beyond them."""
    chosen = settings(client={"command_rate_limit": 100, "command_burst": 200})
    async with beside(chosen) as (site, neighbour):
        bare = await Bare.connected(site)
        with using_at_most(4 * MB):
            await bare.say(frame(opcode, b"x") * 20_000)
            await neighbour.notices_nothing()
            assert await bare.code() == 3013
        assert site.node.counts.limits == {"client.command_rate_limit": 1}
        bare.vanish()


async def test_fragments_without_an_end() -> None:
    """Empty fragments by the ten thousand hold nothing, and the neighbour has its turns between them."""
    async with beside() as (site, neighbour):
        bare = await Bare.connected(site)
        session = _other(site, neighbour)
        assert isinstance(session.outbox, SocketOutbox)
        with using_at_most(4 * MB):
            ending = asyncio.create_task(bare.code())
            pouring = asyncio.create_task(bare.say(frame(0x01) + frame(0x00) * 100_000 + frame(0x80)))
            rounds = 0
            while not ending.done():
                await neighbour.notices_nothing()
                rounds += 1
            await pouring
            assert await ending == 3501, "an empty message, in the end"
        assert rounds > 3
        bare.vanish()


async def test_more_than_come_in_at_the_door(log: ExpectedLog) -> None:
    """Newcomers at four times ``client.connection_rate_limit``: the door lets in what it says, the others get 503."""
    log.expect("connection.refused")
    rate = 20
    async with beside(settings(client={"connection_rate_limit": rate})) as (site, neighbour):
        outcomes: Counter[int] = Counter()
        loop = asyncio.get_running_loop()
        begin = loop.time()

        async def come() -> None:
            try:
                connection = await websockets.connect(site.url)
            except websockets.InvalidStatus as turned:
                outcomes[turned.response.status_code] += 1
            else:
                outcomes[101] += 1
                await connection.close()

        while loop.time() - begin < 1.5 or not outcomes[503]:
            await asyncio.gather(*(come() for _ in range(8)), neighbour.notices_nothing())
        elapsed_s = loop.time() - begin
        assert outcomes.keys() == {101, 503}
        assert outcomes[101] <= rate + elapsed_s * rate + 1
        assert site.node.counts.limits == {"client.connection_rate_limit": outcomes[503]}
        assert len(log.seen("connection.refused")) <= elapsed_s + 2, "a line a second"


async def test_reads_without_end(log: ExpectedLog) -> None:
    """Who reads by REST without a pause gets what ``rest.read_rate_limit`` says, then 429, and holds nothing."""
    rate = 20
    async with beside(settings(rest={"read_rate_limit": rate})) as (site, neighbour):
        loop = asyncio.get_running_loop()
        outcomes: Counter[int] = Counter()
        with using_at_most(2 * MB):
            begin = loop.time()
            for _ in range(50):
                answers = await asyncio.gather(*(ask(site.port, f"/v1/channels/{ROOM}/publications") for _ in range(8)))
                outcomes.update(answer.status for answer in answers)
                await neighbour.notices_nothing()
            elapsed_s = loop.time() - begin
        assert outcomes.keys() == {200, 429}
        assert outcomes[200] <= rate + elapsed_s * rate + 1
        assert site.node.counts.limits == {"rest.read_rate_limit": outcomes[429]}
        assert len(log.seen("command.refused")) <= elapsed_s + 2, "a line a second"


# --- tokens -----------------------------------------------------------------------------------------
def _token(header: Any, claims: Any, signature: bytes = b"") -> str:
    """A token that nobody has signed."""
    parts = (json.dumps(header).encode(), json.dumps(claims).encode(), signature)
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


ANN = {"sub": "ann"}
TOKENS = {
    "none": _token({"alg": "none"}, ANN),
    "None": _token({"alg": "nOnE"}, ANN, b"signed"),
    "a huge kid": _token({"alg": "RS256", "kid": "k" * 40_000}, ANN, b"x"),
    "a kid that is a path": _token({"alg": "RS256", "kid": "../../etc/passwd"}, ANN, b"x"),
    "deep claims": token({"sub": "ann"})[:-5] + "." * 5_000,
    "deep header": base64.urlsafe_b64encode(b"[" * 40_000).decode() + ".e30.eA",
    "no parts": "x" * 60_000,
    "dots": "." * 60_000,
    "no base64": "\x00.\u00e4.\U0001f30a",
}


@pytest.mark.parametrize("name", TOKENS)
async def test_tokens_that_are_none(name: str) -> None:
    """PROTOCOL 8.1: a token without a signature, or made to be costly, is 3500, or 103 to subscribe with."""
    async with beside() as (site, _):
        bearer = TOKENS[name]
        with using_at_most(4 * MB):
            offender = await Client.open(site.url)
            await offender.send(offender.command("connect", token=bearer))
            assert await offender.closed() == (3500, "invalid token")
            ann = await Client.connected(site.url, token=token(ANN))
            assert await ann.refused("subscribe", channel="$chat:1", token=bearer) == 103
            await ann.send(ann.command("refresh", token=bearer))
            assert await ann.closed() == (3500, "invalid token")
        path = "/v1/channels/chat:1/publications"
        with suppress(UnicodeEncodeError):
            answer = await ask(site.port, path, headers={"Authorization": f"Bearer {bearer}"})
            assert answer.status in (400, 401, 431)


class Hanging:
    """A key set's server that takes every connection and never says a word."""

    def __init__(self) -> None:
        self.asked = 0
        self.writers: list[asyncio.StreamWriter] = []

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Somebody asks."""
        self.asked += 1
        self.writers.append(writer)
        await reader.read()


async def test_a_key_set_that_hangs(log: ExpectedLog) -> None:
    """PROTOCOL 4.1.2: who comes with made-up key ids while the key set hangs is refused with 100; it is asked once."""
    hanging = Hanging()
    server = await asyncio.start_server(hanging.take, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    keys = {"token": {"hmac_secret_key": "", "jwks_public_endpoint": f"http://127.0.0.1:{port}/jwks"}}
    async with beside(settings(client=keys)) as (site, neighbour):
        site.gate.keys._timeout_s = 0.5
        with using_at_most(8 * MB):
            offenders = [await Client.open(site.url) for _ in range(40)]
            for number, offender in enumerate(offenders):
                bearer = _token({"alg": "RS256", "kid": f"made up {number}"}, ANN, b"x" * 256)
                await offender.send(offender.command("connect", token=bearer))
            await neighbour.notices_nothing()
            for offender in offenders:
                assert (await offender.reply(1))["error"]["code"] == 100
        assert hanging.asked <= 2
        for offender in offenders:
            await offender.close()
    for writer in hanging.writers:
        writer.close()
    server.close()
