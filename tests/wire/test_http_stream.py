"""``/connection/http_stream``: the protocol over a streamed response; PROTOCOL 2.5.

Also what every streamed response shares: its head, its chunks, how it ends, and what becomes of a reader that does not
read.
"""

import asyncio
import fcntl
import gc
import json
import socket
import struct
import termios
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import tornado.httpserver
import tornado.netutil
from conftest import ExpectedLog
from streams import (
    CONNECT,
    Stream,
    ask,
    batch,
    drop,
    head,
    http_stream,
    say,
    settings,
    sse,
    uni_http_stream,
    uni_sse,
    until_gone,
)
from support import PATIENCE_S, Client, Site, listening, serving
from test_rfc6455 import certificate
from tornado.http1connection import HTTP1Connection
from tornado.httputil import HTTPServerRequest
from tornado.iostream import IOStream

from handlers import make_app
from handlers.asking import Clients
from handlers.eventstream import StreamHandler
from handlers.outboxes import BareOutbox
from handlers.stream_outbox import KERNEL_BYTES, StreamOutbox
from server.auth import sign
from server.errors import SHUTDOWN
from server.history import Draft
from server.session import Session

FORMATS = pytest.mark.parametrize("format", ["json", "protobuf"])
HEADERS = {
    "x-accel-buffering": "no",
    "cache-control": "private, no-cache, no-store, must-revalidate, max-age=0",
    "pragma": "no-cache",
    "connection": "close",
}


def session_of(site: Site, client: str) -> Session:
    """The server's side of a client."""
    session = site.node.sessions[client]
    assert isinstance(session, Session)
    return session


def pass_ping(site: Site, session: Session) -> None:
    """Let time pass until a session pings."""
    due = session.next_ping
    while session.next_ping == due:
        site.pass_time(1)


def outbox_of(site: Site, client: str) -> StreamOutbox:
    """The outbox of a client."""
    outbox = session_of(site, client).outbox
    assert isinstance(outbox, StreamOutbox)
    return outbox


# --- speaking -------------------------------------------------------------------
@FORMATS
async def test_connect_in_the_body(format: str) -> None:
    """PROTOCOL 2.5: the first commands come with the request, the reply says where the others go."""
    async with serving(settings()) as site:
        async with http_stream(site.port, CONNECT, format=format) as stream:
            assert (stream.status, stream.headers["transfer-encoding"]) == (200, "chunked")
            assert HEADERS.items() <= stream.headers.items()
            hello = await stream.expect("connect")
            assert (hello["node"], hello["ping"], hello["pong"]) == (site.node.id, 25, True)
            session = session_of(site, hello["client"])
            assert hello["session"] == session.secret
            assert hello["session"] != hello["client"]
            assert session.request.transport == "http_stream"


async def test_content_types() -> None:
    """PROTOCOL 2.5: the stream speaks what the request's content type says, and is of that type; JSON by default."""
    async with serving(settings()) as site:
        kinds = {
            "application/json": "application/json",
            "text/plain": "application/json",
            "APPLICATION/OCTET-STREAM; x=y": "application/octet-stream",
        }
        for sent, came in kinds.items():
            body = batch(CONNECT, format="protobuf" if "octet" in came else "json")
            request = Stream.request(site.port, "POST", "/connection/http_stream", body, {"Content-Type": sent})
            async with request as stream:
                assert stream.headers["content-type"] == came
                await stream.expect("connect")


@FORMATS
async def test_a_whole_conversation(format: str) -> None:
    """Commands go by /emulation, replies and pushes come in the stream, in order and to the same session."""
    async with serving(settings()) as site:
        subscribe = {"id": 2, "subscribe": {"channel": "chat:1"}}
        async with http_stream(site.port, CONNECT, subscribe, format=format) as stream:
            hello = await stream.expect("connect")
            assert (await stream.expect("subscribe"))["recoverable"]
            publish = {"id": 3, "publish": {"channel": "chat:1", "data": {"n": 1}}}
            await say(site.port, hello, publish, {"id": 4, "presence_stats": {"channel": "chat:1"}}, format=format)
            assert (await stream.expect("pub"))["data"] == {"n": 1}
            await stream.expect("publish")
            assert await stream.expect("presence_stats") == {"num_clients": 1, "num_users": 1}


async def test_each_message_is_a_line() -> None:
    """PROTOCOL 2.5: each message is followed by a newline, no line is empty."""
    async with serving(settings()) as site:
        commands = [CONNECT, *({"id": 2 + n, "presence_stats": {"channel": "live:1"}} for n in range(100))]
        async with http_stream(site.port, *commands) as stream:
            for command in commands:
                line = await stream.text(b"\n")
                assert line
                assert line.startswith(b'{"id":%d,' % command["id"])


@FORMATS
async def test_http_1_0(format: str) -> None:
    """A client of HTTP/1.0 gets no chunks (RFC 9112 7.1) and no promise of a next request: it reads until the end."""
    async with serving(settings()) as site:
        async with http_stream(site.port, CONNECT, format=format, version="1.0") as stream:
            assert "transfer-encoding" not in stream.headers
            assert stream.headers["connection"] == "close"
            hello = await stream.expect("connect")
            await say(site.port, hello, {"id": 2, "presence_stats": {"channel": "live:1"}}, format=format)
            await stream.expect("presence_stats")
            session_of(site, hello["client"]).disconnect(SHUTDOWN)
            assert await stream.ended(3001) == "shutdown"


# --- pings ------------------------------------------------------------------------
@FORMATS
async def test_pongs_are_posted(format: str) -> None:
    """PROTOCOL 2.4: pings come in the stream, pongs by /emulation; without one it ends with 3012."""
    async with serving(settings()) as site:
        async with http_stream(site.port, CONNECT, format=format) as stream:
            hello = await stream.expect("connect")
            session = session_of(site, hello["client"])
            for _ in range(3):
                pass_ping(site, session)
                assert await stream.message() == {}
                await say(site.port, hello, {}, format=format)
            pass_ping(site, session)
            assert await stream.message() == {}
            site.pass_time(9)
            await stream.ended(3012)
            assert stream.whole


# --- ends -------------------------------------------------------------------------
@FORMATS
async def test_a_disconnect_is_the_last_message(format: str) -> None:
    """PROTOCOL 2.5, 5.8: why it ends is said by a push behind everything that is owed; then the response ends whole."""
    async with serving(settings()) as site:
        subscribe = {"id": 2, "subscribe": {"channel": "live:1"}}
        async with http_stream(site.port, CONNECT, subscribe, format=format) as stream:
            hello = await stream.expect("connect")
            await stream.expect("subscribe")
            neighbour = await Client.connected(site.url)
            await neighbour.ask("publish", channel="live:1", data="last")
            session_of(site, hello["client"]).disconnect(SHUTDOWN)
            assert (await stream.expect("pub"))["data"] == "last"
            await stream.ended(3001)
            assert stream.whole
            assert not site.node.streams
            await neighbour.close()


@pytest.mark.parametrize(
    "body", [b"", b"\n", b"x", b"{}", b'{"id":1}', b'{"id":1,"publish":{"channel":"chat:1","data":1}}', b"[]", b"\xff"]
)
async def test_bodies_that_do_not_connect(body: bytes) -> None:
    """PROTOCOL 3.4: what is no connect is told 3501 in the stream, as on any transport."""
    async with serving(settings()) as site:
        async with Stream.request(site.port, "POST", "/connection/http_stream", body) as stream:
            assert stream.status == 200
            await stream.ended(3501)
        assert not site.node.streams


async def test_a_token_that_is_none() -> None:
    """PROTOCOL 4.1: whoever is sent away by connect learns it in the stream."""
    async with serving(settings()) as site:
        async with http_stream(site.port, {"id": 1, "connect": {"token": "x"}}) as stream:
            await stream.ended(3500)


async def test_a_refused_connect() -> None:
    """PROTOCOL 3.4: an error at connect is a reply; the stream stays until it is stale."""
    async with serving(settings()) as site:
        expired = {"id": 1, "connect": {"token": sign("x" * 44, {"exp": 1})}}
        async with http_stream(site.port, expired) as stream:
            await stream.ended(3500)
        closed = {"exp": 1, "sub": "42"}
        token = sign(site.node.settings.client.token.hmac_secret_key, closed)
        async with http_stream(site.port, {"id": 1, "connect": {"token": token}}) as stream:
            assert (await stream.expect("error"))["code"] == 109
            site.pass_time(12)
            await stream.ended(3502)


async def test_the_client_goes() -> None:
    """PROTOCOL 2.5: a client ends it by closing; subscriptions, presence and its secret are gone with it."""
    async with serving(settings()) as site:
        neighbour = await Client.connected(site.url)
        await neighbour.ask("subscribe", channel="chat:1", join_leave=True)
        async with http_stream(site.port, CONNECT, {"id": 2, "subscribe": {"channel": "chat:1"}}) as stream:
            hello = await stream.expect("connect")
            await stream.expect("subscribe")
            assert list(site.node.streams) == [hello["session"]]
        while (await neighbour.push("leave"))["info"]["client"] != hello["client"]:
            pass
        assert not site.node.streams
        assert list(site.node.sessions) == [neighbour.hello["client"]]
        await neighbour.close()


async def test_a_second_request_is_not_answered() -> None:
    """What follows the request is read and forgotten; the end of the connection is noticed behind it."""
    async with serving(settings()) as site:
        async with http_stream(site.port, CONNECT) as stream:
            hello = await stream.expect("connect")
            stream.writer.write(head("GET", "/health/live", {}) * 10_000)
            await say(site.port, hello, {"id": 2, "presence_stats": {"channel": "live:1"}})
            await stream.expect("presence_stats")
            stream.writer.write_eof()
            await until_gone(site)


# --- who may --------------------------------------------------------------------
async def test_not_offered() -> None:
    """PROTOCOL 2.1: transports are off until they are switched on, and paths can be moved."""
    moved = settings(http_stream={"enabled": False}, sse={"handler_prefix": "/s"}, emulation={"handler_prefix": "/e"})
    async with serving(moved) as site:
        for method, path, status in (
            ("POST", "/connection/http_stream", 404),
            ("GET", "/connection/sse", 404),
            ("POST", "/emulation", 404),
            ("GET", "/s", 400),
            ("POST", "/e", 400),
        ):
            assert (await ask(site.port, method, path, b"" if method == "POST" else None)).status == status
    async with serving() as site:
        for path in ("http_stream", "sse", "uni_sse", "uni_http_stream", "uni_websocket", "init"):
            assert (await ask(site.port, "GET", f"/connection/{path}")).status == 404
        assert (await ask(site.port, "POST", "/emulation", b"")).status == 404


@pytest.mark.parametrize("path", ["/connection/http_stream", "/connection/uni_http_stream", "/emulation"])
async def test_preflight(path: str) -> None:
    """PROTOCOL 2.2: a browser that asks first learns what it may send."""
    async with serving(settings(client={"allowed_origins": ["https://a.example"]})) as site:
        asked = {"Origin": "https://a.example", "Access-Control-Request-Headers": "content-type, x-y"}
        answer = await ask(site.port, "OPTIONS", path, headers=asked)
        assert answer.status == 204
        assert {
            "access-control-allow-origin": "https://a.example",
            "access-control-allow-credentials": "true",
            "access-control-allow-methods": "POST, OPTIONS",
            "access-control-allow-headers": "content-type, x-y",
            "access-control-max-age": "300",
        }.items() <= answer.headers.items()


async def test_origins(log: ExpectedLog) -> None:
    """PROTOCOL 2.2: pages of allowed origins may read the stream, others get 403, and no browser sends none."""
    log.expect("connection.refused")
    async with serving(settings(client={"allowed_origins": ["https://a.example"]})) as site:
        body = batch(CONNECT)
        for origin, status in (("https://a.example", 200), ("", 200), ("https://b.example", 403), ("null", 403)):
            headers = {"Origin": origin} if origin else {}
            for method, path in (
                ("POST", "/connection/http_stream"),
                ("GET", "/connection/sse?cf_connect=%7B%22id%22%3A1%2C%22connect%22%3A%7B%7D%7D"),
                ("GET", "/connection/uni_sse"),
            ):
                given = body if method == "POST" else None
                async with Stream.request(site.port, method, path, given, headers) as stream:
                    assert stream.status == status
                    assert stream.headers.get("access-control-allow-origin", "") == (origin if status == 200 else "")
                    assert stream.headers["vary"] == "Origin"
            refused = await ask(site.port, "OPTIONS", "/emulation", headers=headers)
            assert refused.status == (204 if status == 200 else 403)
        assert {fields["why"] for fields in log.seen("connection.refused")} == {"client.allowed_origins"}


async def test_other_methods() -> None:
    """PROTOCOL 2.5: other methods are 405, and the answer says which there are."""
    async with serving(settings()) as site:
        for path, methods in (
            ("/connection/http_stream", "POST, OPTIONS"),
            ("/connection/sse", "GET, POST, OPTIONS"),
            ("/connection/uni_sse", "GET, POST, OPTIONS"),
            ("/connection/uni_http_stream", "POST, OPTIONS"),
            ("/emulation", "POST, OPTIONS"),
            ("/connection/init", "GET, OPTIONS"),
        ):
            for method in {"GET", "POST", "PUT", "DELETE", "PATCH"} - set(methods.split(", ")):
                answer = await ask(site.port, method, path, b"{}")
                assert (answer.status, answer.headers["allow"]) == (405, methods)
        assert (await ask(site.port, "GET", "/connection/init")).body == b"{}"


async def test_bodies_too_large() -> None:
    """PROTOCOL 2.5, 18: a body above the limit is 413, sent at once or in chunks; one at the limit is served."""
    paths = ("http_stream", "sse", "uni_sse", "uni_http_stream")
    small = {name: {"max_request_body_size": 1000} for name in (*paths, "emulation")}
    async with serving(settings(**small)) as site:
        for path in (*(f"/connection/{name}" for name in paths), "/emulation"):
            for size in (1001, 200_000):
                answer = await ask(site.port, "POST", path, b" " * size)
                assert answer.status == 413
                assert "1000" in answer.error
            chunks = b"%x\r\n%s\r\n" % (600, b" " * 600) * 2 + b"0\r\n\r\n"
            request = head("POST", path, {"Transfer-Encoding": "chunked"}) + chunks
            async with Stream(site.port, request) as stream:
                assert stream.status == 413
        full = batch(CONNECT).ljust(1000)
        async with Stream.request(site.port, "POST", "/connection/http_stream", full) as stream:
            await stream.expect("connect")


async def test_the_door_is_shut(log: ExpectedLog) -> None:
    """PROTOCOL 18: streams count as connections, and beyond the limit they are 503 like these."""
    log.expect("connection.refused")
    async with serving(settings(client={"connection_limit": 2})) as site:
        async with http_stream(site.port, CONNECT) as one, sse(site.port, CONNECT) as two:
            await one.expect("connect")
            await two.expect("connect")
            answer = await ask(site.port, "POST", "/connection/http_stream", batch(CONNECT))
            assert answer.status == 503
        await until_gone(site)
        async with http_stream(site.port, CONNECT) as three:
            await three.expect("connect")


async def test_who_is_asking() -> None:
    """Behind a trusted proxy the client's address is what that says, and a header names the user, as on a WebSocket."""
    trusting = settings(http_server={"trusted_proxies": ["127.0.0.1"]}, client={"user_id_http_header": "X-User"})
    async with serving(trusting) as site:
        headers = {"X-Forwarded-For": "198.51.100.7", "X-User": "42", "User-Agent": "us"}
        async with Stream.request(site.port, "POST", "/connection/http_stream", batch(CONNECT), headers) as stream:
            session = session_of(site, (await stream.expect("connect"))["client"])
            assert (session.request.remote_addr, session.user) == ("198.51.100.7", "42")
            assert session.request.headers["user-agent"] == "us"


async def test_a_body_that_never_ends() -> None:
    """Whoever sends a body for ever, slowly or without end, is cut off by the HTTP server and hurts nobody."""
    async with serving(settings()) as site, behind(site, body_timeout=0.3, max_body_size=300_000) as port:
        slow_reader, slow_writer = await asyncio.open_connection("127.0.0.1", port)
        slow_writer.write(head("POST", "/connection/http_stream", {"Content-Length": "60000"}) + b"{")
        fast_reader, fast_writer = await asyncio.open_connection("127.0.0.1", port)
        fast_writer.write(head("POST", "/emulation", {"Transfer-Encoding": "chunked"}))
        fast_writer.write(b"%x\r\n%s\r\n" % (50_000, b" " * 50_000) * 8)
        async with http_stream(port, CONNECT) as stream:
            await stream.expect("connect")
            assert await _what_is_left(slow_reader) == b""
            assert b" 200 " not in await _what_is_left(fast_reader)
            assert site.node.connections == 1
        await drop(slow_writer)
        await drop(fast_writer)


async def _what_is_left(reader: asyncio.StreamReader) -> bytes:
    """What comes up to the end, be that a reset."""
    async with asyncio.timeout(PATIENCE_S):
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


def behind(site: Site, **options: Any) -> AbstractAsyncContextManager[int]:
    """The port of one more HTTP server in front of the same node, with these options."""
    assert isinstance(site.sockets, Clients)
    return listening(tornado.httpserver.HTTPServer(make_app(site.node, site.sockets), **options))


# --- who does not read --------------------------------------------------------------
async def deaf(site: Site, request: bytes, receive_buffer: int = 4096) -> socket.socket:
    """A bare socket that has asked and will not read; the caller closes it."""
    sock = socket.socket()
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, ("127.0.0.1", site.port))
    await loop.sock_sendall(sock, request)
    return sock


async def read_all(sock: socket.socket) -> bytes:
    """Read up to the end."""
    loop = asyncio.get_running_loop()
    parts: list[bytes] = []
    async with asyncio.timeout(PATIENCE_S):
        while part := await loop.sock_recv(sock, 65536):
            parts.append(part)
    return b"".join(parts)


def request_of(stream: Stream) -> bytes:
    """The bytes with which a stream would be asked for."""
    return stream.bytes_of_request


def unchunked(response: bytes) -> tuple[bytes, bool]:
    """The content of a whole response that came in chunks, and whether its end did."""
    _, _, rest = response.partition(b"\r\n\r\n")
    content = b""
    while rest:
        line, _, rest = rest.partition(b"\r\n")
        size = int(line, 16)
        assert rest[size : size + 2] == b"\r\n", "a chunk is cut short"
        content, rest = content + rest[:size], rest[size + 2 :]
        if not size:
            return content, not rest
    return content, False


STREAMS = {
    "http_stream": lambda port: http_stream(port, CONNECT, {"id": 2, "subscribe": {"channel": "live:1"}}),
    "sse": lambda port: sse(port, CONNECT, {"id": 2, "subscribe": {"channel": "live:1"}}),
    "uni_http_stream": lambda port: uni_http_stream(port, {"subs": {"live:1": {}}}),
    "uni_sse": lambda port: uni_sse(port, {"subs": {"live:1": {}}}),
}


@pytest.mark.parametrize("kind", STREAMS)
async def test_a_reader_that_does_not_read(kind: str, log: ExpectedLog) -> None:
    """PROTOCOL 18: it is cut with 3008, and what it makes us hold is bounded, in our buffers and in the kernel's.

    Others notice nothing; and should it read after all, it finds whole messages, the reason, and the end.
    """
    limit = 200_000
    async with serving(settings(client={"queue_max_size": limit})) as site:
        neighbour = await Client.connected(site.url)
        await neighbour.ask("subscribe", channel="live:1", join_leave=True)
        await neighbour.push("join", "live:1")
        sock = await deaf(site, request_of(STREAMS[kind](site.port)))
        client = (await neighbour.push("join", "live:1"))["info"]["client"]
        outbox = outbox_of(site, client)
        descriptor = outbox._fd
        most = held = published = 0
        while client in site.node.sessions:
            published += 1
            await neighbour.ask("publish", channel="live:1", data="x" * 5_000)
            most = max(most, outbox.waiting_bytes)
            if client in site.node.sessions:
                held = max(held, _kernel_bytes(descriptor))
        assert most <= limit
        assert held <= 2 * KERNEL_BYTES
        assert len(await neighbour.publications("live:1", published)) == published
        (closed,) = [fields for fields in log.seen("connection.closed") if fields["client"] == client]
        assert (closed["code"], closed["reason"]) == (3008, "slow")
        assert outbox.waiting_bytes < 20_000
        content, whole = unchunked(await read_all(sock))
        assert whole
        last = json.loads(content.rstrip(b"\n").split(b"\n")[-1].removeprefix(b"data: "))
        assert last.get("push", last) == {"disconnect": {"code": 3008, "reason": "slow"}}
        sock.close()
        await neighbour.close()


def _kernel_bytes(descriptor: int) -> int:
    """What the kernel holds of what was written: not sent, or not acknowledged."""
    return int(struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, b"\0" * 4))[0])


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_reader_that_stops(version: str) -> None:
    """PROTOCOL 18: who takes nothing for ``client.outbox_stall_timeout`` is cut, however little waits."""
    async with serving(settings()) as site:
        neighbour = await Client.connected(site.url)
        await neighbour.ask("subscribe", channel="live:1", join_leave=True)
        await neighbour.push("join", "live:1")
        stream = http_stream(site.port, CONNECT, {"id": 2, "subscribe": {"channel": "live:1"}}, version=version)
        sock = await deaf(site, request_of(stream))
        client = (await neighbour.push("join", "live:1"))["info"]["client"]
        outbox = outbox_of(site, client)
        while not outbox.waiting_bytes:
            await neighbour.ask("publish", channel="live:1", data="x" * 5_000)
        loop = asyncio.get_running_loop()
        site.sockets.check_stalled(loop.time() + 9)
        assert client in site.node.sessions
        site.sockets.check_stalled(loop.time() + 60)
        leave = await neighbour.push("leave", "live:1")
        assert leave["info"]["client"] == client
        response = await read_all(sock)
        content = unchunked(response)[0] if version == "1.1" else response.partition(b"\r\n\r\n")[2]
        assert [line[:2] for line in content.splitlines()] == [b'{"'] * len(content.splitlines())
        assert content.endswith(b'{"push":{"disconnect":{"code":3008,"reason":"slow"}}}\n')
        sock.close()
        await neighbour.close()


async def test_who_never_says_goodbye_is_forgotten() -> None:
    """After our last words the client has five seconds to take them; then the socket is closed all the same."""
    async with serving(settings()) as site:
        sock = await deaf(site, request_of(http_stream(site.port, CONNECT)))
        while not site.node.sessions:
            await ask(site.port, "GET", "/health/live")
        (client,) = site.node.sessions
        outbox = outbox_of(site, client)
        session_of(site, client).disconnect(SHUTDOWN)
        assert site.sockets.closing == 1
        site.sockets.check_stalled(asyncio.get_running_loop().time() + 6)
        assert site.sockets.closing == 0
        assert "closed" in repr(outbox)
        sock.close()


async def test_a_thousand_recover_at_their_own_pace() -> None:
    """PROTOCOL 11.3: a long recovery goes page by page as the stream is read, and nobody is cut for its length."""
    async with serving(settings(client={"queue_max_size": 300_000})) as site:
        neighbour = await Client.connected(site.url)
        await neighbour.ask("publish", channel="chat:1", data="first")
        epoch = (await neighbour.ask("history", channel="chat:1"))["epoch"]
        for number in range(600):
            await neighbour.ask("publish", channel="chat:1", data={"n": number, "x": "x" * 2_000})
        since = {"recover": True, "offset": 1, "epoch": epoch}
        commands = CONNECT, {"id": 2, "subscribe": {"channel": "chat:1", **since}}
        async with http_stream(site.port, *commands) as stream:
            await stream.expect("connect")
            page = await stream.expect("subscribe")
            assert page["recovered"]
            offsets = [publication["offset"] for publication in page["publications"]]
            while len(offsets) < 600:
                message = await stream.message()
                assert message is not None
                if "pub" in message["push"]:
                    offsets.append(message["push"]["pub"]["offset"])
            assert offsets == list(range(2, 602))
        await neighbour.close()


# --- how it is written --------------------------------------------------------------
async def test_one_turn_leaves_joined() -> None:
    """What is sent to a stream in one loop turn leaves in one write, however many messages that are."""
    async with serving(settings()) as site:
        async with http_stream(site.port, CONNECT) as stream:
            hello = await stream.expect("connect")
            outbox = outbox_of(site, hello["client"])
            before = _segments(outbox)
            session = session_of(site, hello["client"])
            session.receive(batch(*({"id": 2 + number, "rpc": {"method": "no"}} for number in range(50))))
            for _ in range(50):
                await stream.expect("error")
            assert _segments(outbox) - before == 1


def _segments(outbox: BareOutbox) -> int:
    """How many segments with data the kernel has sent for a socket (``tcpi_data_segs_out``)."""
    info = outbox._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return int(struct.unpack_from("I", info, 156)[0])


async def test_tls(tmp_path: Path) -> None:
    """Through TLS it is the same: chunks, a message larger than a record, a goodbye, and an end."""
    server_side, client_side = certificate(tmp_path)
    async with serving(settings()) as site, behind(site, ssl_options=server_side) as port:
        stream = http_stream(port, CONNECT, {"id": 2, "subscribe": {"channel": "live:1"}})
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client_side, limit=2**20)
        writer.write(request_of(stream))
        while b'"id":2' not in await reader.readuntil(b"\n"):
            pass
        (client,) = site.node.sessions
        namespace = site.node.channels.known("live:1")
        await site.node.publish("live:1", namespace, Draft(b'"%s"' % (b"x" * 100_000)))
        while b"xxx" not in await reader.readuntil(b"\n"):
            pass
        session_of(site, client).disconnect(SHUTDOWN)
        rest = await reader.read()
        assert b'"code":3001' in rest
        assert rest.endswith(b"0\r\n\r\n")
        await drop(writer)


async def test_a_tls_client_that_goes(tmp_path: Path) -> None:
    """The end of a TLS connection is noticed, also when nothing is being sent."""
    server_side, client_side = certificate(tmp_path)
    async with serving(settings()) as site, behind(site, ssl_options=server_side) as port:
        neighbour = await Client.connected(site.url)
        await neighbour.ask("subscribe", channel="live:1", join_leave=True)
        await neighbour.push("join", "live:1")
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client_side)
        writer.write(request_of(STREAMS["http_stream"](port)))
        client = (await neighbour.push("join", "live:1"))["info"]["client"]
        await drop(writer)
        assert (await neighbour.push("leave", "live:1"))["info"]["client"] == client
        await neighbour.close()


async def test_nothing_of_the_request_stays() -> None:
    """A stream is a socket, a session and an outbox: of the request, its handler and its buffers nothing is left."""
    async with serving(settings()) as site, AsyncExitStack() as streams:
        gc.collect()
        gc.disable()  # what only the collector of cycles would find counts as left
        try:
            for _ in range(5):
                for stream in (http_stream(site.port, CONNECT), sse(site.port, CONNECT), uni_sse(site.port, {})):
                    await (await streams.enter_async_context(stream)).expect("connect")
            kinds = (HTTPServerRequest, HTTP1Connection, StreamHandler, IOStream)
            assert [found for found in gc.get_objects() if isinstance(found, kinds)] == []
        finally:
            gc.enable()
