"""The one-way transports: uni_sse, uni_http_stream, uni_websocket; PROTOCOL 2.6.

One request to connect, and from then on bare pushes.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Protocol
from urllib.parse import quote

import pytest
import websockets
from conftest import ExpectedLog
from streams import Stream, ask, drop, settings, uni_http_stream, uni_sse, until_gone
from support import PATIENCE_S, Client, serving, token
from test_http_stream import pass_ping, session_of
from test_rfc6455 import masked

from handlers.frames import PING, PONG, TEXT
from server import orders
from server.app import App, Refuse
from server.app import Client as AppClient
from server.errors import FORCE_DISCONNECT, SHUTDOWN


class Listening(Protocol):
    """What the tests below ask of a listener, whatever carries it."""

    async def message(self) -> dict[str, Any] | None:
        """The next message; ``None`` at the end."""

    async def expect(self, kind: str) -> dict[str, Any]:
        """The next message, which must be of this kind."""

    async def ended(self, code: int) -> str:
        """The last message, a disconnect with this code, and the end; returns the reason."""


class SocketListener:
    """A listener on a WebSocket."""

    def __init__(self, connection: websockets.ClientConnection) -> None:
        self.connection = connection

    async def message(self) -> dict[str, Any] | None:
        """See ``Listening``."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                text = await self.connection.recv()
        except websockets.ConnectionClosed:
            return None
        assert isinstance(text, str)
        return dict(json.loads(text))

    async def expect(self, kind: str) -> dict[str, Any]:
        """See ``Listening``."""
        message = await self.message()
        assert message is not None, f"expected {kind}, got the end"
        assert kind in message, f"expected {kind}, got {message}"
        return dict(message[kind])

    async def ended(self, code: int) -> str:
        """See ``Listening``; the Close frame says the same."""
        end = await self.expect("disconnect")
        assert end["code"] == code, end
        assert await self.message() is None
        assert (self.connection.close_code, self.connection.close_reason) == (code, end["reason"])
        return str(end["reason"])


@asynccontextmanager
async def uni_websocket(port: int, request: Mapping[str, Any], *, first: bool = False) -> AsyncIterator[SocketListener]:
    """``/connection/uni_websocket`` with this request in the query, or as the first message."""
    url = f"ws://127.0.0.1:{port}/connection/uni_websocket"
    text = json.dumps(request)
    url = url if first else f"{url}?cf_connect={quote(text)}"
    async with websockets.connect(url, ping_interval=None, compression=None, max_size=None) as connection:
        if first:
            await connection.send(text)
        yield SocketListener(connection)


def uni_sse_by_post(port: int, request: Mapping[str, Any]) -> Stream:
    """``/connection/uni_sse`` with this request as body."""
    return Stream.request(port, "POST", "/connection/uni_sse", json.dumps(request).encode())


def uni_websocket_first(port: int, request: Mapping[str, Any]) -> Any:
    """``/connection/uni_websocket`` with this request as the first message."""
    return uni_websocket(port, request, first=True)


LISTENERS: dict[str, Callable[[int, Mapping[str, Any]], Any]] = {
    "uni_sse": uni_sse,
    "uni_sse by post": uni_sse_by_post,
    "uni_http_stream": uni_http_stream,
    "uni_websocket": uni_websocket,
    "uni_websocket first": uni_websocket_first,
}
each = pytest.mark.parametrize("kind", LISTENERS)


# --- listening --------------------------------------------------------------------
@each
async def test_the_first_push_is_connect(kind: str) -> None:
    """PROTOCOL 2.6, 5.7: who it is and what it follows; a session id, and neither pong nor node."""
    async with serving(settings()) as site:
        signed = token({"sub": "42", "channels": ["live:news"]})
        request = {"token": signed, "subs": {"chat:1": {}}, "name": "bell"}
        async with LISTENERS[kind](site.port, request) as listener:
            message = await listener.message()
            assert list(message) == ["connect"]
            hello = message["connect"]
            assert hello.keys() == {"client", "version", "subs", "ping", "session"}
            session = session_of(site, hello["client"])
            assert (session.user, session.secret, hello["ping"]) == ("42", hello["session"], 25)
            assert session.request.transport == kind.split(" ")[0]
            assert hello["subs"]["chat:1"].items() >= {"recoverable": True, "positioned": True}.items()
            assert hello["subs"]["live:news"] == {}


@each
async def test_pushes_are_bare(kind: str) -> None:
    """PROTOCOL 2.6: publications and the back end's subscriptions and unsubscriptions come without wrapping."""
    async with serving(settings()) as site:
        speaker = await Client.connected(site.url)
        signed = token({"sub": "42"})
        async with LISTENERS[kind](site.port, {"token": signed, "subs": {"chat:1": {}}}) as listener:
            await listener.expect("connect")
            await speaker.ask("publish", channel="chat:1", data={"n": 1})
            message = await listener.message()
            assert message["channel"] == "chat:1"
            assert (message["pub"]["data"], message["pub"]["offset"]) == ({"n": 1}, 1)
            target = orders.Target("42")
            await site.node.ordering.give(orders.SubscribeOrder(target, "live:extra"))
            assert (await listener.message()) == {"channel": "live:extra", "subscribe": {}}
            await speaker.ask("publish", channel="live:extra", data=2)
            assert (await listener.expect("pub"))["data"] == 2
            await site.node.ordering.give(orders.UnsubscribeOrder(target, "live:extra"))
            assert (await listener.message())["unsubscribe"]["code"] == 2000
            await site.node.ordering.give(orders.RefreshOrder(target, False, int(site.clock()) + 100))
            assert (await listener.expect("refresh"))["ttl"] in (99, 100)
        await speaker.close()


@each
async def test_recovers_by_subs(kind: str) -> None:
    """PROTOCOL 2.6, 11.3: a position in the request brings what came after it, however much that is."""
    async with serving(settings()) as site:
        speaker = await Client.connected(site.url)
        for number in range(1, 151):
            await speaker.ask("publish", channel="chat:1", data=number)
        epoch = (await speaker.ask("history", channel="chat:1"))["epoch"]
        since = {"recover": True, "offset": 3, "epoch": epoch}
        async with LISTENERS[kind](site.port, {"subs": {"chat:1": since}}) as listener:
            subscribed = (await listener.expect("connect"))["subs"]["chat:1"]
            assert subscribed["recovered"]
            came = [publication["data"] for publication in subscribed.get("publications", [])]
            while len(came) < 147:
                came.append((await listener.expect("pub"))["data"])
            assert came == list(range(4, 151))
        lost = {"recover": True, "offset": 3, "epoch": "another"}
        async with LISTENERS[kind](site.port, {"subs": {"chat:1": lost}}) as listener:
            subscribed = (await listener.expect("connect"))["subs"]["chat:1"]
            assert "recovered" not in subscribed
            assert (subscribed["was_recovering"], subscribed["offset"]) == (True, 150)
        await speaker.close()


@each
async def test_pings_need_no_pong(kind: str) -> None:
    """PROTOCOL 2.6: a ping is ``{}``, and nobody who only listens is sent away for not answering."""
    async with serving(settings()) as site:
        async with LISTENERS[kind](site.port, {}) as listener:
            hello = await listener.expect("connect")
            for _ in range(4):
                pass_ping(site, session_of(site, hello["client"]))
                assert await listener.message() == {}
                if isinstance(listener, SocketListener):  # whose library answers native pings: wait for that
                    await (await listener.connection.ping())
            assert hello["client"] in site.node.sessions


# --- ends -------------------------------------------------------------------------
@each
async def test_a_disconnect_is_the_last_push(kind: str) -> None:
    """PROTOCOL 2.6, 5.8: why it ends is said by a push, and on a WebSocket by its Close frame, too."""
    async with serving(settings()) as site:
        async with LISTENERS[kind](site.port, {}) as listener:
            hello = await listener.expect("connect")
            session_of(site, hello["client"]).disconnect(SHUTDOWN)
            assert await listener.ended(3001) == "shutdown"
        await until_gone(site)


@each
@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"token": "x"}, 3500),
        ({"token": token({"sub": "42", "exp": 1})}, 3005),
        ({"token": token({"sub": "42", "expire_at": 1})}, 3005),
        ({"token": token({"sub": "42", "channels": ["nope:1"]})}, 3004),
        ({"token": token({"sub": "42", "channels": ["live:" + "x" * 300]})}, 3004),
        ({"subs": {"nope:1": {}}}, 3501),
        ({"data": {"refuse": 100}}, 3004),
        ({"data": {"refuse": 103}}, 3507),
        ({"data": {"refuse": 111}}, 3013),
        ({"data": {"refuse": 1000}}, 3004),
    ],
)
async def test_an_error_becomes_a_disconnect(kind: str, request_: dict[str, Any], code: int) -> None:
    """PROTOCOL 2.6: a failed connect is a disconnect push and the end, with a code for each error."""
    app = App()

    @app.connecting
    async def greet(client: AppClient, data: Any) -> None:
        if isinstance(data, dict):
            raise Refuse(data["refuse"], "by the hook")

    async with serving(settings()) as site:
        app.attach(site.node)
        async with LISTENERS[kind](site.port, request_) as listener:
            await listener.ended(code)
        await until_gone(site)


@each
async def test_a_token_that_expires(kind: str) -> None:
    """PROTOCOL 2.6: it cannot be refreshed from here: the connection ends with 3005 and the client comes back."""
    async with serving(settings(client={"expired_close_delay": "1s"})) as site:
        signed = token({"sub": "42", "exp": int(site.clock()) + 5})
        async with LISTENERS[kind](site.port, {"token": signed}) as listener:
            hello = await listener.expect("connect")
            assert (hello["expires"], hello["ttl"]) in ((True, 5), (True, 4))
            site.pass_time(8)
            await listener.ended(3005)


@each
async def test_a_session_is_meant_alone(kind: str) -> None:
    """PROTOCOL 2.6, 15.2: the session id lets an order reach this one connection of its user."""
    async with serving(settings()) as site:
        signed = token({"sub": "42"})
        async with (
            LISTENERS[kind](site.port, {"token": signed}) as one,
            LISTENERS[kind](site.port, {"token": signed}) as other,
        ):
            hello = await one.expect("connect")
            await other.expect("connect")
            target = orders.Target("42", session=hello["session"])
            await site.node.ordering.give(
                orders.DisconnectOrder(target, FORCE_DISCONNECT.code, FORCE_DISCONNECT.reason)
            )
            await one.ended(3503)
            assert len(site.node.users["42"]) == 1


async def test_its_session_takes_no_commands() -> None:
    """PROTOCOL 2.5: a listener's session id is no way to speak for it."""
    async with serving(settings()) as site:
        async with uni_sse(site.port, {}) as listener:
            hello = await listener.expect("connect")
            body = {
                "session": hello["session"],
                "node": site.node.id,
                "data": '{"id":2,"subscribe":{"channel":"live:1"}}',
            }
            assert (await ask(site.port, "POST", "/emulation", json.dumps(body).encode())).status == 204
            assert not session_of(site, hello["client"]).subscriptions
            assert not site.node.streams


# --- bad input --------------------------------------------------------------------
BAD = [
    b"x",
    b"[]",
    b"null",
    b"1",
    b"\xff",
    b'{"token":1}',
    b'{"subs":[]}',
    b'{"subs":{"chat:1":1}}',
    b'{"subs":{"chat:1":{"offset":-1}}}',
    b'{"subs":{"chat:1":{"offset":"1"}}}',
    b'{"subs":{"chat:1":{"recover":1}}}',
    b'{"name":{}}',
    b'{"headers":{"a":1}}',
    b"{}{}",
    b"[" * 20_000,
]


@pytest.mark.parametrize("body", [b"", *BAD])
async def test_requests_that_are_none(body: bytes) -> None:
    """PROTOCOL 2.6: what is no request to connect is 400 with the reason, before anything is streamed."""
    async with serving(settings()) as site:
        for path in ("/connection/uni_sse", "/connection/uni_http_stream"):
            answer = await ask(site.port, "POST", path, body)
            assert answer.status == 400
            assert "connect" in answer.error
        if body:
            answer = await ask(site.port, "GET", f"/connection/uni_sse?cf_connect={quote(body)}")
            assert answer.status == 400
        assert not site.node.connections


async def test_no_request_is_an_empty_one() -> None:
    """PROTOCOL 2.6: a plain EventSource without cf_connect connects as nobody, if nobody may."""
    async with serving(settings()) as site:
        async with Stream.request(site.port, "GET", "/connection/uni_sse") as stream:
            assert (await stream.expect("connect"))["session"]
    async with serving(settings(client={"allow_anonymous_connect_without_token": False})) as site:
        async with Stream.request(site.port, "GET", "/connection/uni_sse") as stream:
            await stream.ended(3501)


@pytest.mark.parametrize("body", [b"", b"{", *BAD])
async def test_first_messages_that_are_none(body: bytes) -> None:
    """PROTOCOL 2.6: on a WebSocket the same is told by 3501, push and Close frame; in the query by 400."""
    async with serving(settings()) as site:
        url = f"ws://127.0.0.1:{site.port}/connection/uni_websocket"
        async with websockets.connect(url, compression=None) as connection:
            await connection.send(body)
            await SocketListener(connection).ended(3501)
        if body:
            with pytest.raises(websockets.InvalidStatus) as caught:
                await websockets.connect(f"{url}?cf_connect={quote(body)}")
            assert caught.value.response.status_code == 400


# --- the WebSocket ------------------------------------------------------------------
async def test_silence_on_a_websocket() -> None:
    """PROTOCOL 3.4: who never asks to connect is stale."""
    async with serving(settings()) as site:
        url = f"ws://127.0.0.1:{site.port}/connection/uni_websocket"
        async with websockets.connect(url, compression=None) as connection:
            site.pass_time(12)
            await SocketListener(connection).ended(3502)


@pytest.mark.parametrize("first", [False, True])
async def test_later_messages_are_ignored(first: bool) -> None:
    """PROTOCOL 2.6: whatever a listener says later is read and forgotten, be it what it may."""
    async with serving(settings()) as site:
        async with uni_websocket(site.port, {"subs": {"live:1": {}}}, first=first) as listener:
            hello = await listener.expect("connect")
            for text in ("{}", "x", '{"id":2,"publish":{"channel":"live:1","data":1}}', b"\xff"):
                await listener.connection.send(text)
            await (await listener.connection.ping())
            speaker = await Client.connected(site.url)
            await speaker.ask("publish", channel="live:1", data="first")
            assert (await listener.expect("pub"))["data"] == "first"
            assert hello["client"] in site.node.sessions
            await speaker.close()


async def test_a_first_message_too_large() -> None:
    """PROTOCOL 18: above ``uni_websocket.message_size_limit`` it is close code 1009."""
    async with serving(settings(uni_websocket={"message_size_limit": 1000})) as site:
        async with uni_websocket(site.port, {"name": "x" * 1001}, first=True) as listener:
            assert await listener.message() is None
            assert listener.connection.close_code == 1009


async def test_native_pings(log: ExpectedLog) -> None:
    """PROTOCOL 2.6: besides ``{}`` a WebSocket is pinged by RFC 6455; one that does not answer is gone with 3012."""
    async with serving(settings()) as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        lines = ["GET /connection/uni_websocket?cf_connect=%7B%7D HTTP/1.1", "Host: a", "Upgrade: websocket"]
        lines += ["Connection: Upgrade", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        async with asyncio.timeout(PATIENCE_S):
            assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
            opcode, payload = await _frame(reader)
            assert opcode == TEXT
            session = session_of(site, json.loads(payload)["connect"]["client"])
            pass_ping(site, session)
            assert await _frame(reader) == (PING, b"")
            assert await _frame(reader) == (TEXT, b"{}")
            writer.write(masked(PONG))
            writer.write(masked(PING, b"heard"))
            assert await _frame(reader) == (PONG, b"heard")
            site.pass_time(9)
            assert not session.closed
            pass_ping(site, session)
            assert await _frame(reader) == (PING, b"")
            assert await _frame(reader) == (TEXT, b"{}")
            site.pass_time(9)
            assert await _frame(reader) == (TEXT, b'{"disconnect":{"code":3012,"reason":"no pong"}}')
        await drop(writer)
        assert [fields["code"] for fields in log.seen("connection.closed")] == [3012]


async def _frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    first, size = await reader.readexactly(2)
    if size == 126:
        size = int.from_bytes(await reader.readexactly(2), "big")
    return first & 0x0F, await reader.readexactly(size)


async def test_websocket_handshakes(log: ExpectedLog) -> None:
    """PROTOCOL 2.2, 2.3: its handshake is held to the same rules as the other WebSocket's."""
    log.expect("connection.refused")
    async with serving(settings(client={"allowed_origins": ["https://a.example"], "connection_limit": 1})) as site:
        assert (await ask(site.port, "GET", "/connection/uni_websocket")).status == 400
        url = f"ws://127.0.0.1:{site.port}/connection/uni_websocket?cf_connect=%7B%7D"
        with pytest.raises(websockets.InvalidStatus) as caught:
            await websockets.connect(url, origin=websockets.Origin("https://b.example"))
        assert caught.value.response.status_code == 403
        async with websockets.connect(
            url, compression=None, origin=websockets.Origin("https://a.example")
        ) as connection:
            await SocketListener(connection).expect("connect")
            with pytest.raises(websockets.InvalidStatus) as caught:
                await websockets.connect(url)
            assert caught.value.response.status_code == 503
