"""A server that goes away: not ready, still there, then client by client.  PROTOCOL 17.0.3."""

import asyncio
import json
import signal
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hopper import Cut, ask, head_of, read_head, vanish
from ports import free_port
from support import PATIENCE_S, Client, Closed, Process, config, serving, settings

import run
from server.broker.memory import MemoryBroker
from server.errors import Unavailable
from server.history import Appended, Draft
from server.history.memory import MemoryHistory
from server.settings import Settings
from server.stream import Retention

HANDSHAKE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}
GRACE_S = 30
"""Longer than a test has patience for: what ends it is what the test does."""


def _config(**shutdown: Any) -> dict[str, Any]:
    return config(shutdown={"grace": f"{GRACE_S}s", **shutdown})


async def _until_it_leaves(server: Process) -> dict[str, Any]:
    """Wait until readiness says that it goes away; what it says."""
    async with asyncio.timeout(PATIENCE_S):
        while (reply := await ask(server.port, "/health/ready")).status == 200:
            continue
    assert reply.status == 503
    found: dict[str, Any] = reply.json
    return found


async def _end(server: Process) -> int:
    return await asyncio.to_thread(server.wait)


async def test_not_ready_first_and_still_there(tmp_path: Path) -> None:
    """From SIGTERM on it is not ready and says why; newcomers are served as before; a second one is at once."""
    with Process(tmp_path, _config()) as server:
        old = await Client.connected(server.url)
        server.send(signal.SIGTERM)
        assert await _until_it_leaves(server) == {"ready": False, "reasons": {"server": "the server is going away"}}
        assert (await ask(server.port, "/health/live")).status == 200
        new = await Client.connected(server.url)
        await new.ask("subscribe", channel="chat:a")
        await old.ask("publish", channel="chat:a", data="still here")
        assert (await new.push("pub", "chat:a"))["data"] == "still here"
        server.send(signal.SIGTERM)
        assert await old.closed() == await new.closed() == (3001, "shutdown")
        assert await _end(server) == 0


async def test_a_terminal_has_no_grace(tmp_path: Path) -> None:
    """SIGINT does not wait for anybody to see that it is not ready."""
    with Process(tmp_path, _config()) as server:
        client = await Client.connected(server.url)
        server.send(signal.SIGINT)
        assert await client.closed() == (3001, "shutdown")
        assert await _end(server) == 0


async def test_clients_go_one_by_one(tmp_path: Path) -> None:
    """At a pace of one a second the others are served while one is sent away; a second signal sends them all."""
    with Process(tmp_path, _config(grace="0s", pace=1, timeout="300s")) as server:
        clients = [await Client.connected(server.url) for _ in range(30)]
        ends = [asyncio.create_task(client.closed()) for client in clients]
        server.send(signal.SIGTERM)
        _, waiting = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        assert len(waiting) >= 15
        while True:
            left = next(client for client, end in zip(clients, ends, strict=True) if not end.done())
            with suppress(Closed):  # its turn may have come meanwhile
                await left.ask("publish", channel="chat:a", data=1)
                break
        server.send(signal.SIGTERM)
        assert {end.result() for end in (await asyncio.wait(ends))[0]} == {(3001, "shutdown")}
        assert await _end(server) == 0


async def test_they_go_in_random_order(tmp_path: Path) -> None:
    """Who came first is not always sent away first (once in 40,320 runs it would be so by chance)."""
    with Process(tmp_path, _config(grace="0s", pace=20)) as server:
        clients = [await Client.connected(server.url) for _ in range(8)]
        gone: list[int] = []

        async def wait(number: int) -> None:
            await clients[number].closed()
            gone.append(number)

        server.send(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*map(wait, range(8)))
        assert sorted(gone) == list(range(8)) != gone
        assert await _end(server) == 0


async def test_who_does_not_read_holds_nobody_up(tmp_path: Path) -> None:
    """A client that is owed much and takes nothing is cut; the server ends long before its timeout."""
    with Process(tmp_path, _config(grace="0s", timeout="300s")) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1)
        writer.write(
            b"GET /connection/websocket HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        commands = b'{"id":1,"connect":{}}\n{"id":2,"subscribe":{"channel":"live:a"}}'
        writer.write(bytes((0x81, 0x80 | len(commands), 0, 0, 0, 0)) + commands)
        talker = await Client.connected(server.url)
        async with asyncio.timeout(PATIENCE_S):
            while not (await talker.ask("presence_stats", channel="live:a"))["num_clients"]:
                continue
        filling = {"channel": "live:a", "data": "x" * 50_000}
        for _ in range(60):
            await talker.ask("publish", **filling)
        server.send(signal.SIGTERM)
        assert await talker.closed() == (3001, "shutdown")
        async with asyncio.timeout(PATIENCE_S):
            assert await _end(server) == 0
        writer.close()
        assert "Traceback" not in server.log.read_text()


async def test_a_kept_connection_lets_nobody_in(tmp_path: Path) -> None:
    """What a proxy has kept open is no way in any more: a handshake there is 503 once clients are sent away."""
    with Process(tmp_path, _config(grace="0s", pace=1, timeout="300s")) as server:
        clients = [await Client.connected(server.url) for _ in range(20)]
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            writer.write(head_of("GET", "/health/live", {}))
            assert (await read_head(reader))[0] == 200
            await reader.readexactly(len("{}"))
            server.send(signal.SIGTERM)
            await asyncio.wait([asyncio.create_task(one.closed()) for one in clients], return_when=FIRST_COMPLETED)
            writer.write(head_of("GET", "/connection/websocket", HANDSHAKE))
            assert (await read_head(reader))[0] == 503
        finally:
            await vanish(writer)
        server.send(signal.SIGTERM)
        for client in clients:
            assert await client.closed() == (3001, "shutdown")
        assert await _end(server) == 0


# --- requests on kept connections ----------------------------------------------------
API = {"X-API-Key": "api-key", "Content-Type": "application/json"}
CALL = b'{"channel":"chat:a","limit":1}'


class Kept:
    """A connection that is kept, as a back end's or a proxy's: one request after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, request: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer; raises ``Cut`` if there is none."""
        self.writer.write(request)
        status, headers = await read_head(self.reader)
        return status, headers, await self.reader.readexactly(int(headers["content-length"]))


@asynccontextmanager
async def kept(port: int) -> AsyncIterator[Kept]:
    """One of them."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Kept(reader, writer)
    finally:
        await vanish(writer)


READ = head_of("GET", "/v1/channels/chat:a/publications", {})
HISTORY = head_of("POST", "/api/history", {**API, "Content-Length": str(len(CALL))}) + CALL


@pytest.mark.parametrize(
    "request_",
    [READ, HISTORY, *(head_of("GET", path, {}) for path in ("/health/live", "/none", "/", "/static/client.js"))],
)
async def test_a_kept_connection_is_told_to_go(request_: bytes, tmp_path: Path) -> None:
    """While clients are sent away each answer says ``Connection: close`` (RFC 9112 9.6), and it is closed behind it."""
    with Process(tmp_path, _config(grace="0s", pace=1, timeout="300s")) as server:
        clients = [await Client.connected(server.url) for _ in range(20)]
        await clients[0].ask("publish", channel="chat:a", data=1)
        async with kept(server.port) as before, kept(server.port) as after:
            first = await before.ask(request_)
            assert "connection" not in first[1]
            assert (await before.ask(request_))[0::2] == (await after.ask(request_))[0::2] == first[0::2]
            server.send(signal.SIGTERM)
            await asyncio.wait([asyncio.create_task(one.closed()) for one in clients], return_when=FIRST_COMPLETED)
            old = request_.replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\nConnection: keep-alive\r\n")
            for one, asked, unsaid in ((before, request_, "keep-alive"), (after, old, "close")):  # RFC 9112 9.3
                status, headers, body = await one.ask(asked)
                assert (status, body) == first[0::2]
                assert headers.get("connection", unsaid) == "close"
                async with asyncio.timeout(PATIENCE_S):
                    assert await one.reader.read() == b""
        server.send(signal.SIGTERM)
        for client in clients:
            assert await client.closed() == (3001, "shutdown")
        assert await _end(server) == 0


async def test_nobody_is_answered_by_a_server_without_its_history(tmp_path: Path) -> None:
    """Who asks again and again over kept connections gets good answers until he is told to go, and none of 100."""
    with Process(tmp_path, _config(grace="0s", pace=1, timeout="300s")) as server:
        clients = [await Client.connected(server.url) for _ in range(10)]
        await clients[0].ask("publish", channel="chat:a", data=1)
        bodies: list[tuple[int, bytes]] = []

        async def press(request: bytes) -> None:
            with suppress(OSError, Cut):  # it listens no more, or was closed before it read this
                while True:
                    async with kept(server.port) as one:
                        going_on = True
                        while going_on:
                            status, headers, body = await one.ask(request)
                            bodies.append((status, body))
                            going_on = headers.get("connection") != "close"

        async with kept(server.port) as pausing:
            assert (await pausing.ask(READ))[0] == 200
            pressing = [asyncio.create_task(press(request)) for request in (READ, HISTORY) * 4]
            while len(bodies) < 20:
                await clients[0].ask("presence_stats", channel="chat:a")
            server.send(signal.SIGTERM)
            await asyncio.wait([asyncio.create_task(one.closed()) for one in clients], return_when=FIRST_COMPLETED)
            status, headers, _ = await pausing.ask(READ)
            assert (status, headers["connection"]) == (200, "close")
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(*pressing)
        server.send(signal.SIGTERM)  # the others need not be waited for
        assert await _end(server) == 0
        assert {status for status, _ in bodies} == {200}
        assert not [body for _, body in bodies if b'"error"' in body]


def publish(data: int, **headers: str) -> bytes:
    """A back end's call."""
    body = b'{"channel":"chat:a","data":%d}' % data
    return head_of("POST", "/api/publish", {**API, **headers, "Content-Length": str(len(body))}) + body


class SlowHistory(MemoryHistory):
    """Stores when it is let; ``asked`` is set once it has been asked to, ``drafts`` are what it was asked to store."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()
        self.let = asyncio.Event()
        self.drafts: list[bytes] = []
        self.ended = False

    async def append(self, channel: str, draft: Draft, retention: Retention, now_ms: int) -> Appended:
        """See ``History.append``."""
        self.drafts.append(draft.data)
        self.asked.set()
        await self.let.wait()
        if self.ended:
            raise Unavailable("history is closed")
        return await super().append(channel, draft, retention, now_ms)

    async def close(self) -> None:
        """See ``History.close``."""
        self.ended = True
        await super().close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set once a server that ends has found that somebody is still there, and waits."""
    found = asyncio.Event()
    count = run.goodbyes

    def counted(*parts: Any) -> int:
        number = count(*parts)
        if number:
            found.set()
        return number

    monkeypatch.setattr(run, "goodbyes", counted)
    return found


@asynccontextmanager
async def ending(stack: AsyncExitStack, waits: asyncio.Event) -> AsyncIterator[None]:
    """Within the block the server that ``stack`` holds ends, and waits for somebody; behind it, it has ended."""
    end = asyncio.create_task(stack.aclose())
    waiting = asyncio.create_task(waits.wait())
    await asyncio.wait([end, waiting], return_when=FIRST_COMPLETED)
    waiting.cancel()
    assert not end.done(), "expected it to wait, and it has ended"
    yield
    async with asyncio.timeout(PATIENCE_S):
        await end


def chosen(*, internal: bool) -> Settings:
    """Settings with a console, and with or without a port of their own for operators and back ends."""
    return settings(
        http_server={"internal_port": free_port() if internal else 0},
        admin={"enabled": True, "password": "open sesame"},
    )


async def key(port: int) -> dict[str, str]:
    """What opens the API and, logged in there, the console."""
    logged_in = await ask(port, "/admin/auth", body={"password": "open sesame"})
    return {**API, "Authorization": f"Bearer {logged_in.json['token']}"}


CALLS = [
    ("/api/publish", {"channel": "chat:a", "data": 1}, 200),
    ("/api", b'{"method":"publish","params":{"channel":"chat:a","data":1}}', 200),
    ("/admin/api/publish", {"channel": "chat:a", "data": 1}, 200),
]


@pytest.mark.parametrize(
    ("path", "body", "good", "internal"),
    [
        ("/v1/channels/chat:a/publications", {"data": 1}, 201, False),
        *((*call, internal) for call in CALLS for internal in (False, True)),
    ],
)
async def test_a_request_under_way_is_finished(
    path: str, body: Any, good: int, internal: bool, waits: asyncio.Event
) -> None:
    """What was asked before the end is carried out and answered on either port, with the history that it needs."""
    history = SlowHistory()
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(serving(chosen(internal=internal), history=history))
        port = site.node.settings.http_server.internal_port or site.port
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {**(API if path.startswith("/v1") else await key(port)), "Content-Length": str(len(sent))}
        async with kept(port) as back_end:
            asking = asyncio.create_task(back_end.ask(head_of("POST", path, headers) + sent))
            await history.asked.wait()
            async with ending(stack, waits):
                assert not history.ended
                history.let.set()
                status, headers, answer = await asking
                assert (status, headers["connection"]) == (good, "close")
                assert b'"error"' not in answer
                assert await back_end.reader.read() == b""
    assert history.ended


class SlowBroker(MemoryBroker):
    """Follows when it is let; ``asked`` is set once it has been asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()
        self.let = asyncio.Event()

    async def follow(self, channel: str) -> None:
        """See ``Broker.follow``."""
        self.asked.set()
        await self.let.wait()
        await super().follow(channel)


@pytest.mark.parametrize("internal", [False, True])
async def test_the_console_is_waited_for_as_well(internal: bool, waits: asyncio.Event) -> None:
    """Whatever is asked is waited for, not the API and ``/v1`` alone: a sample, say, that begins to listen.

    It was cut.
    """
    broker = SlowBroker()
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(serving(chosen(internal=internal), broker=broker))
        port = site.node.settings.http_server.internal_port or site.port
        headers = await key(port)
        asking = asyncio.create_task(ask(port, "/admin/sample", headers=headers, body={"channel": "live:a"}))
        await broker.asked.wait()
        async with ending(stack, waits):
            broker.let.set()
            reply = await asking
            assert (reply.status, reply.json) == (200, {"publications": [], "number": 0})


@pytest.mark.parametrize("internal", [False, True])
async def test_a_kept_connection_has_one_more_answer(internal: bool, waits: asyncio.Event) -> None:
    """While one request is waited for nobody new comes in; who is in is answered once more, and told to go.

    The internal port went on to let others in until it was closed, and cut what they had asked.
    """
    history = SlowHistory()
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(serving(chosen(internal=internal), history=history))
        port = site.node.settings.http_server.internal_port or site.port
        async with kept(port) as slow, kept(port) as quick, kept(port) as idle:
            assert "connection" not in (await quick.ask(HISTORY))[1]
            assert "connection" not in (await idle.ask(HISTORY))[1]
            asking = asyncio.create_task(slow.ask(publish(1)))
            await history.asked.wait()
            async with ending(stack, waits):
                with pytest.raises(ConnectionRefusedError):
                    await ask(port, "/health/live")
                status, headers, _ = await quick.ask(HISTORY)
                assert (status, headers["connection"]) == (200, "close")
                history.let.set()
                assert (await asking)[0] == 200
            assert await idle.reader.read() == b""


async def test_what_stands_behind_the_last_answer(waits: asyncio.Event) -> None:
    """RFC 9112 9.6: several calls behind one another, and the first one's answer ends the connection: only it is done.

    The others were done as well, and nobody was told.
    """
    history = SlowHistory()
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(serving(history=history))
        async with kept(site.port) as back_end, kept(site.port) as another:
            another.writer.write(publish(1) + publish(2))
            await history.asked.wait()
            async with ending(stack, waits):
                back_end.writer.write(publish(3) + publish(4))
                while len(history.drafts) < 2:
                    await turn()
                history.let.set()
                for one in (back_end, another):
                    assert (await one.reader.read()).count(b"HTTP/1.1 200") == 1
    assert history.drafts == [b"1", b"3"]


async def test_who_asks_to_be_closed_has_asked_last() -> None:
    """Nor is anything done behind a request that says ``Connection: close`` itself, at any time."""
    async with serving() as site, kept(site.port) as back_end:
        back_end.writer.write(publish(1) + publish(2, Connection="close") + publish(3) + publish(4))
        assert (await back_end.reader.read()).count(b"HTTP/1.1 200") == 2
        page = (await ask(site.port, "/v1/channels/chat:a/publications?since=:0")).json
        assert [one["data"] for one in page["publications"]] == [1, 2]


async def test_a_poll_is_not_waited_for() -> None:
    """A long-poll is answered when clients are sent away, and told to go; it holds nobody up."""
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(serving(settings(shutdown={"timeout": "300s"})))
        async with kept(site.port) as poll:
            head = head_of("GET", "/v1/channels/chat:a/publications?since=:0", {"Prefer": "wait=60"})
            asking = asyncio.create_task(poll.ask(head))
            while not site.node.connections:
                await turn()
            async with asyncio.timeout(PATIENCE_S):
                await stack.aclose()
                status, headers, answer = await asking
            assert (status, headers["connection"]) == (503, "close")
            assert json.loads(answer)["code"] == 3001


async def test_who_keeps_an_ending_server_waiting_is_cut(waits: asyncio.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that does not come is not waited for as long as an answer: soon its connection is ended."""
    monkeypatch.setattr(run, "GOODBYE_S", 0.1)
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(serving(settings(shutdown={"timeout": "300s"})))
        async with kept(site.port) as before, kept(site.port) as slow:
            slow.writer.write(publish(1)[:-1])
            await before.ask(HISTORY)  # the other's head has been read when this one is answered
            async with ending(stack, waits):
                assert await slow.reader.read() == b""


async def test_a_request_without_end_holds_nobody_up() -> None:
    """One that is not finished within ``shutdown.timeout`` is cut, and the server ends."""
    history = SlowHistory()
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(serving(settings(shutdown={"timeout": "100ms"}), history=history))
        asking = asyncio.create_task(ask(site.port, "/api/publish", headers=API, body={"channel": "chat:a", "data": 1}))
        await history.asked.wait()
        await stack.aclose()
        with pytest.raises(Cut):
            await asking
    history.let.set()


async def turn() -> None:
    """One turn of the loop, in which others go on."""
    await asyncio.sleep(0)
