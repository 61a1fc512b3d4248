"""The WebSocket transport over real sockets: RFC 6455 from the outside, and how a connection ends.

The sessions here are no Centrifuge sessions but the least that the transport wants:
they keep what they hear and answer with it.
"""

import asyncio
import base64
import datetime
import gc
import ipaddress
import resource
import socket
import ssl
import struct
import tracemalloc
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import tornado.httpserver
import tornado.netutil
import tornado.web
import tornado.websocket
import websockets
from conftest import ExpectedLog
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from tornado.httpclient import HTTPRequest
from tornado.httputil import HTTPServerRequest
from tornado.util import _websocket_mask

from handlers.frames import BINARY, CLOSE, PING, PONG, TEXT
from handlers.handshake import SocketHandshakes, handshake_fault, negotiate
from handlers.origins import client_address, origin_allowed
from handlers.socket import SocketOutbox, Sockets
from server import errors
from server.outbox import Outbox, Request

PATIENCE_S = 15.0
KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # the example of RFC 6455 1.3, and what it is answered with
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


# --- the decisions of the handshake -------------------------------------------
@pytest.mark.parametrize(
    ("origin", "pattern", "allowed"),
    [
        ("https://a.example.com", "https://*.example.com", True),
        ("https://a.b.example.com", "https://*.example.com", True),
        ("HTTPS://A.EXAMPLE.COM", "https://*.example.com", True),
        ("http://a.example.com", "https://*.example.com", False),
        ("https://example.com", "https://*.example.com", False),
        ("https://a.example.com.evil.org", "https://*.example.com", False),
        ("https://evil.org/.example.com", "https://*.example.com", False),
        ("https://evil.org#.example.com", "https://*.example.com", False),
        ("https://evil.org?.example.com", "https://*.example.com", False),
        ("https://user@evil.org", "https://*evil.com", False),
        ("https://a-example-com", "https://*.example.com", False),
        ("http://localhost:3000", "http://localhost:*", True),
        ("http://localhost", "http://localhost:*", False),
        ("http://localhost.evil.org:80", "http://localhost:*", False),
        ("http://[::1]:8000", "http://[::1]:*", True),
        ("http://1:8000", "http://[::1]:*", False),
        ("https://example.com", "https://example.com", True),
        ("https://example.com:8443", "https://example.com", False),
        ("https://anything", "*", True),
        ("null", "*", True),
        ("null", "https://*", False),
    ],
)
def test_origin_patterns(origin: str, pattern: str, allowed: bool) -> None:
    """PROTOCOL 2.2: an origin is matched whole, and ``*`` never leaves the host and port that it stands for."""
    assert origin_allowed(origin, [pattern]) is allowed
    assert origin_allowed(origin, ["https://other.example", pattern]) is allowed


def test_origin_may_be_missing() -> None:
    """PROTOCOL 2.2: who sends no origin is no browser and may; who sends one meets the list, also an empty one."""
    assert origin_allowed(None, [])
    assert origin_allowed("", [])
    assert not origin_allowed("https://example.com", [])


TRUSTED = [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8")]


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "address"),
    [
        ("192.0.2.1", "", "192.0.2.1"),
        ("192.0.2.1", "198.51.100.7", "192.0.2.1"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", "203.0.113.9, 198.51.100.7, 10.1.1.1", "198.51.100.7"),
        ("10.0.0.1", "10.2.2.2, 10.1.1.1", "10.2.2.2"),
        ("10.0.0.1", "198.51.100.7, garbage", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.7, , 10.1.1.1", "10.1.1.1"),
        ("10.0.0.1", "198.51.100.7:4711", "198.51.100.7"),
        ("fd00::1", "[2001:db8::1]:4711", "2001:db8::1"),
        ("fd00::1", "2001:db8::1", "2001:db8::1"),
        ("::ffff:10.0.0.1", "::ffff:198.51.100.7", "198.51.100.7"),
        ("::ffff:192.0.2.1", "198.51.100.7", "192.0.2.1"),
        ("unix", "198.51.100.7", "unix"),
    ],
)
def test_client_address(peer: str, forwarded_for: str, address: str) -> None:
    """Only a trusted proxy is believed, from the right, up to the first address that is not one of them."""
    assert client_address(peer, forwarded_for, TRUSTED) == address


@pytest.mark.parametrize(
    ("offered", "queried", "chosen"),
    [
        ("", ["", ""], ("json", None)),
        ("centrifuge-json", ["", ""], ("json", "centrifuge-json")),
        ("centrifuge-protobuf", ["", ""], ("protobuf", "centrifuge-protobuf")),
        ("other, centrifuge-protobuf", ["", ""], ("protobuf", "centrifuge-protobuf")),
        ("centrifuge-json,centrifuge-protobuf", ["", ""], ("json", "centrifuge-json")),
        ("other", ["", ""], ("json", None)),
        ("", ["protobuf", ""], ("protobuf", None)),
        ("", ["", "protobuf"], ("protobuf", None)),
        ("", ["json", "xml"], ("json", None)),
    ],
)
def test_negotiate(offered: str, queried: list[str], chosen: tuple[str, str | None]) -> None:
    """PROTOCOL 2.3: the first subprotocol that we speak decides, else the query, else it is JSON."""
    assert negotiate(offered, *queried) == chosen


def test_handshake_faults() -> None:
    """RFC 6455 4.2.1: each thing that a client's handshake must have is asked for by name."""
    assert handshake_fault("HTTP/1.1", "WebSocket", "keep-alive, Upgrade", KEY) is None
    assert "HTTP/1.1" in str(handshake_fault("HTTP/1.0", "websocket", "Upgrade", KEY))
    assert "Upgrade: websocket" in str(handshake_fault("HTTP/1.1", "h2c", "Upgrade", KEY))
    assert "Connection" in str(handshake_fault("HTTP/1.1", "websocket", "keep-alive", KEY))
    for key in ("", "short", base64.b64encode(b"x" * 15).decode(), KEY + "!", "é" * 24):
        assert "Sec-WebSocket-Key" in str(handshake_fault("HTTP/1.1", "websocket", "Upgrade", key))


# --- the words of these tests -------------------------------------------------
class Hearer:
    """A session that keeps what it hears, and does with a message what ``act`` says."""

    def __init__(self, site: "Site", outbox: Outbox, request: Request) -> None:
        assert isinstance(outbox, SocketOutbox)
        self.outbox = outbox
        self.request = request
        self.heard: list[bytes] = []
        self.ends: list[str] = []
        self.pongs = 0
        self._act = site.act
        self._news = asyncio.Event()

    def receive(self, message: bytes) -> None:
        """See ``Session``."""
        self.heard.append(message)
        self._news.set()
        self._act(self, message)

    def gone(self) -> None:
        """See ``Session``."""
        self.ends.append("gone")
        self._news.set()

    def slow(self) -> None:
        """See ``Session``."""
        self.ends.append("slow")
        self._news.set()
        self.outbox.close(errors.SLOW)

    def native_ping(self) -> None:
        """See ``Session``."""

    def native_pong(self) -> None:
        """See ``Session``."""
        self.pongs += 1
        self._news.set()

    def say(self, message: bytes) -> None:
        """Send one message."""
        self.outbox.send(self.outbox.wire.frame(message))

    async def until(self, done: Callable[["Hearer"], bool]) -> None:
        """Wait until ``done`` is true of this session."""
        async with asyncio.timeout(PATIENCE_S):
            while not done(self):
                self._news.clear()
                await self._news.wait()


def echo(session: Hearer, message: bytes) -> None:
    """Say what was heard."""
    session.say(message)


def keep_quiet(session: Hearer, message: bytes) -> None:
    """Only hear."""


class Site:
    """A server of ``Hearer`` sessions."""

    def __init__(self, act: Callable[[Hearer, bytes], None], **options: Any) -> None:
        self.act = act
        self.port = 0
        self.sessions: list[Hearer] = []
        self.arrivals: asyncio.Queue[Hearer] = asyncio.Queue()
        self.sockets = Sockets(self._connect, **options)
        self.requests: list[weakref.ref[HTTPServerRequest]] = []

    def _connect(self, outbox: Outbox, request: Request) -> Hearer:
        session = Hearer(self, outbox, request)
        self.sessions.append(session)
        self.arrivals.put_nowait(session)
        return session

    async def arrival(self) -> Hearer:
        """The next session."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.arrivals.get()

    def pass_time(self, seconds: float) -> None:
        """Check who is stalled, ``seconds`` from now."""
        self.sockets.check_stalled(asyncio.get_running_loop().time() + seconds)


@asynccontextmanager
async def serving(
    act: Callable[[Hearer, bytes], None] = echo,
    *,
    tls: ssl.SSLContext | None = None,
    send_buffer: int = 0,
    chunk_size: int | None = None,
    **options: Any,
) -> AsyncIterator[Site]:
    """A server on a free port of this loop; at the end no socket of it is open."""
    site = Site(act, **options)

    class Watched(SocketHandshakes):
        def welcome(self, request: HTTPServerRequest) -> None:
            site.requests.append(weakref.ref(request))
            super().welcome(request)

    app = tornado.web.Application([("/", Watched(site.sockets))], log_function=lambda handler: None)
    server = tornado.httpserver.HTTPServer(app, ssl_options=tls, chunk_size=chunk_size)
    listening = tornado.netutil.bind_sockets(0, "127.0.0.1", backlog=1_000)
    if send_buffer:
        listening[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server.add_sockets(listening)
    site.port = listening[0].getsockname()[1]
    try:
        yield site
    finally:
        server.stop()
        for session in site.sessions:
            session.outbox.close(errors.CONNECTION_CLOSED)
        site.pass_time(60)
        assert site.sockets.closing == 0
        await server.close_all_connections()


class Peer:
    """A client that says any bytes it likes, and reads only when it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.status = 0
        self.headers: dict[str, str] = {}

    def say(self, *frames: bytes) -> None:
        """Send bytes as they are."""
        self.writer.write(b"".join(frames))

    async def frame(self) -> tuple[int, bytes]:
        """The next frame, as opcode and payload; it must be whole and unmasked (RFC 6455 5.1)."""
        async with asyncio.timeout(PATIENCE_S):
            first, size = await self.reader.readexactly(2)
            assert first & 0xF0 == 0x80
            if size >= 126:
                size = int.from_bytes(await self.reader.readexactly(2 if size == 126 else 8), "big")
            return first & 0x0F, await self.reader.readexactly(size)

    async def goodbye(self) -> tuple[int, str]:
        """Read up to the Close frame; its code and reason."""
        while True:
            opcode, payload = await self.frame()
            if opcode == CLOSE:
                return int.from_bytes(payload[:2], "big"), payload[2:].decode()

    async def end(self) -> bytes:
        """Read up to the end of the connection; what still came."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read()


async def silent_client(site: Site, receive_buffer: int = 0) -> socket.socket:
    """A bare socket that has shaken hands; the caller closes it."""
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setblocking(False)
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await loop.sock_connect(sock, ("127.0.0.1", site.port))
    lines = ["GET / HTTP/1.1", "Host: a", "Upgrade: websocket", "Connection: Upgrade"]
    lines += [f"Sec-WebSocket-Key: {KEY}", "Sec-WebSocket-Version: 13", "", ""]
    await loop.sock_sendall(sock, "\r\n".join(lines).encode())
    assert (await loop.sock_recv(sock, 4_096)).startswith(b"HTTP/1.1 101")
    return sock


async def settled(site: Site) -> None:
    """Return when the server has handled all that was sent to it before: a newcomer has been answered twice."""
    async with peer_of(site) as peer:
        for _ in range(2):
            peer.say(masked(PING))
            assert await peer.frame() == (PONG, b"")


def masked(opcode: int, payload: bytes = b"", *, fin: bool = True) -> bytes:
    """A frame of a client."""
    size, key = len(payload), b"\x01\x02\x03\x04"
    head = bytes(((0x80 if fin else 0) | opcode,))
    if size < 126:
        head += bytes((0x80 | size,))
    elif size < 0x10000:
        head += b"\xfe" + size.to_bytes(2, "big")
    else:
        head += b"\xff" + size.to_bytes(8, "big")
    return head + key + _websocket_mask(key, payload)


def goodbye(code: int, reason: str = "") -> bytes:
    """The payload of a Close frame."""
    return code.to_bytes(2, "big") + reason.encode()


@asynccontextmanager
async def peer_of(
    site: Site,
    *,
    path: str = "/",
    headers: dict[str, str] | None = None,
    behind: bytes = b"",
    receive_buffer: int = 0,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Peer]:
    """A peer that has sent its handshake, with ``behind`` in the same breath, and read the answer.

    A header ``""`` is left out.  With ``receive_buffer`` it reads nothing beyond
    that by itself.
    """
    sock = socket.socket()
    sock.setblocking(False)
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", site.port))
    reader, writer = await asyncio.open_connection(
        sock=sock,
        limit=receive_buffer or 65_536,
        ssl=tls,
        server_hostname="127.0.0.1" if tls is not None else None,
    )
    peer = Peer(reader, writer)
    sent = {
        "Host": f"127.0.0.1:{site.port}",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": KEY,
        "Sec-WebSocket-Version": "13",
        **(headers or {}),
    }
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items() if value != "-"), "", ""]
    peer.say("\r\n".join(lines).encode(), behind)
    try:
        async with asyncio.timeout(PATIENCE_S):
            answer = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        peer.status = int(answer[0].split(" ")[1])
        peer.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in answer[1:-2])}
        yield peer
    finally:
        writer.transport.abort()


# --- the handshake over the wire ----------------------------------------------
async def test_handshake() -> None:
    """RFC 6455 4.2.2: the key is answered with its digest, no extension is taken, and nobody says who we are."""
    offered = {"Sec-WebSocket-Extensions": "permessage-deflate; client_max_window_bits"}
    async with serving() as site, peer_of(site, headers=offered) as peer:
        assert peer.status == 101
        assert peer.headers["upgrade"].lower() == "websocket"
        assert peer.headers["connection"].lower() == "upgrade"
        assert peer.headers["sec-websocket-accept"] == ACCEPT
        assert not {"sec-websocket-extensions", "sec-websocket-protocol", "server", "content-length"} & set(
            peer.headers
        )


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Upgrade": "-"}, 400),
        ({"Upgrade": "h2c"}, 400),
        ({"Connection": "close"}, 400),
        ({"Sec-WebSocket-Key": "-"}, 400),
        ({"Sec-WebSocket-Key": "too short"}, 400),
        ({"Sec-WebSocket-Version": "-"}, 426),
        ({"Sec-WebSocket-Version": "8"}, 426),
    ],
)
async def test_bad_handshakes(headers: dict[str, str], status: int) -> None:
    """RFC 6455 4.2.1, 4.4: a handshake with a fault gets its status, and a wrong version is told the right one."""
    async with serving() as site, peer_of(site, headers=headers) as peer:
        assert peer.status == status
        assert status != 426 or peer.headers["sec-websocket-version"] == "13"
        assert not site.sessions


async def test_origin(log: ExpectedLog) -> None:
    """PROTOCOL 2.2: a foreign page gets 403, and the log names the setting; the server's own host is no exception."""
    log.expect("connection.refused")
    async with serving(allowed_origins=["https://*.example.com"]) as site:
        async with peer_of(site, headers={"Origin": "https://evil.org"}) as peer:
            assert peer.status == 403
        assert log.seen("connection.refused")[0]["why"] == "client.allowed_origins"
        own = {"Origin": f"http://127.0.0.1:{site.port}", "Sec-Fetch-Site": "same-origin"}
        async with peer_of(site, headers=own) as peer:
            assert peer.status == 403
        async with peer_of(site, headers={"Origin": "https://a.example.com"}) as peer:
            assert peer.status == 101
        async with peer_of(site) as peer:
            assert peer.status == 101


@pytest.mark.parametrize(
    ("path", "subprotocol", "format", "answered"),
    [
        ("/", None, "json", None),
        ("/", "", "json", None),
        ("/", "centrifuge-json", "json", "centrifuge-json"),
        ("/", "centrifuge-protobuf", "protobuf", "centrifuge-protobuf"),
        ("/?format=protobuf", None, "protobuf", None),
        ("/?cf_protocol=protobuf", "", "protobuf", None),
    ],
)
async def test_formats(path: str, subprotocol: str | None, format: str, answered: str | None) -> None:
    """PROTOCOL 2.3: the format is negotiated, JSON goes in text frames and Protobuf in binary ones."""
    headers = {} if subprotocol is None else {"Sec-WebSocket-Protocol": subprotocol}
    async with serving() as site, peer_of(site, path=path, headers=headers) as peer:
        assert peer.headers.get("sec-websocket-protocol") == answered
        session = await site.arrival()
        assert session.request.format == format
        for opcode in (TEXT, BINARY):  # what we read is trusted to be in the negotiated format
            peer.say(masked(opcode, b"{}"))
            assert await peer.frame() == (TEXT if format == "json" else BINARY, b"{}")


async def test_request() -> None:
    """A session learns who asks, from where behind the trusted proxies, and the wanted headers only."""
    trusted = [ipaddress.ip_network("127.0.0.0/8")]
    headers = {
        "User-Agent": "a hand",
        "X-User": "42",
        "X-Other": "no",
        "X-Forwarded-For": "203.0.113.9, 198.51.100.7",
    }
    async with serving(user_id_http_header="X-User", trusted_proxies=trusted) as site:
        async with peer_of(site, path="/?cf_ws_frame_ping_pong=true", headers=headers):
            session = await site.arrival()
            assert session.request == Request(
                transport="websocket",
                format="json",
                remote_addr="198.51.100.7",
                headers={"user-agent": "a hand", "x-user": "42"},
                native_pings=True,
            )
        async with peer_of(site):
            session = await site.arrival()
            assert session.request == Request("websocket", "json", "127.0.0.1", {})


async def test_frames_behind_the_handshake() -> None:
    """What comes in one packet with the handshake is heard, and so is a frame that is cut there."""
    cut = masked(TEXT, b"two")
    async with serving() as site, peer_of(site, behind=masked(TEXT, b"one") + cut[:4]) as peer:
        assert await peer.frame() == (TEXT, b"one")
        peer.say(cut[4:])
        assert await peer.frame() == (TEXT, b"two")


async def test_request_is_forgotten() -> None:
    """After the handshake Tornado's request does not live on, without waiting for the collector."""
    gc.collect()
    gc.disable()
    try:
        async with serving() as site, peer_of(site) as peer:
            peer.say(masked(TEXT, b"hi"))
            assert await peer.frame() == (TEXT, b"hi")
            assert [request() for request in site.requests] == [None]
    finally:
        gc.enable()


# --- messages -----------------------------------------------------------------
SIZES = [0, 1, 125, 126, 65_535, 65_536, 300_000]


async def test_websockets_agrees() -> None:
    """The ``websockets`` client gets back what it sent, of every size, whole and in fragments, and its pongs."""
    async with serving(message_size_limit=1 << 20) as site:
        async with websockets.connect(f"ws://127.0.0.1:{site.port}/", ping_interval=None, max_size=None) as client:
            assert client.protocol.extensions == []
            for size in SIZES:
                await client.send("ä" * (size // 2))
                assert await client.recv() == "ä" * (size // 2)
            await client.send(["frag", "", "ments ä", "!"])
            assert await client.recv() == "fragments ä!"
            async with asyncio.timeout(PATIENCE_S):
                await (await client.ping(b"x" * 125))
        await site.sessions[0].until(lambda session: session.ends == ["gone"])
        assert client.close_code == 1000


async def test_tornado_agrees() -> None:
    """Tornado's own client gets back what it sent, and is told our code."""
    async with serving(message_size_limit=1 << 20) as site:
        request = HTTPRequest(f"ws://127.0.0.1:{site.port}/")
        client = await tornado.websocket.websocket_connect(request, subprotocols=["centrifuge-protobuf"])
        assert client.selected_subprotocol == "centrifuge-protobuf"
        for size in SIZES:
            await client.write_message(b"x" * size, binary=True)
            assert await client.read_message() == b"x" * size
        site.sessions[0].outbox.close(errors.FORCE_DISCONNECT)
        assert await client.read_message() is None
        assert (client.close_code, client.close_reason) == (3503, "force disconnect")
        client.close()


async def test_byte_at_a_time() -> None:
    """A peer that sends each byte in a packet of its own is understood."""
    async with serving() as site, peer_of(site) as peer:
        peer.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in masked(TEXT, b"x" * 130) + masked(PING, b"?") + masked(TEXT, b"y"):
            peer.say(bytes((byte,)))
            await peer.writer.drain()
        assert [await peer.frame() for _ in range(3)] == [(TEXT, b"x" * 130), (PONG, b"?"), (TEXT, b"y")]


async def test_a_partial_frame_is_no_burden() -> None:
    """A peer that begins a large frame and stops costs what it has sent, and is not heard."""
    async with serving(message_size_limit=1 << 30) as site, peer_of(site) as peer:
        session = await site.arrival()
        head = b"\x82\xff" + (1 << 29).to_bytes(8, "big") + b"\x01\x02\x03\x04"
        peer.say(masked(TEXT, b"before"), head, b"x" * 10_000)
        await session.until(lambda session: session.heard == [b"before"])
        assert await peer.frame() == (TEXT, b"before")
        assert session.outbox._parser.held_bytes <= len(head) + 10_000


async def test_order_of_send_and_spread() -> None:
    """What is sent and what is spread arrive in the order in which they were given, in one turn and over turns."""
    async with serving(keep_quiet) as site, peer_of(site) as peer, peer_of(site) as other:
        one, two = await site.arrival(), await site.arrival()
        wire = one.outbox.wire
        one.say(b"1")
        wire.spread([one.outbox, two.outbox], wire.frame(b"2") + wire.frame(b"3"))
        wire.spread([one.outbox, two.outbox], wire.frame(b"4"))
        one.say(b"5")
        one.say(b"6")
        assert one.outbox.waiting_bytes == len(wire.frame(b"5")) * 2
        one.outbox.flush()
        assert one.outbox.waiting_bytes == 0
        one.say(b"7")
        assert [(await peer.frame())[1] for _ in range(7)] == [b"1", b"2", b"3", b"4", b"5", b"6", b"7"]
        assert [(await other.frame())[1] for _ in range(3)] == [b"2", b"3", b"4"]


async def test_pings_both_ways() -> None:
    """RFC 6455 5.5.2, 5.5.3: a ping is answered with its data in order, our own ping is answered to the session."""
    async with serving() as site, peer_of(site) as peer:
        session = await site.arrival()
        peer.say(masked(TEXT, b"1"), masked(PING, b"data"), masked(TEXT, b"2"), masked(PONG, b"unasked"))
        assert [await peer.frame() for _ in range(3)] == [(TEXT, b"1"), (PONG, b"data"), (TEXT, b"2")]
        await session.until(lambda session: session.pongs == 1)
        session.outbox.send(session.outbox.ping_frame())
        assert await peer.frame() == (PING, b"")
        peer.say(masked(PONG))
        await session.until(lambda session: session.pongs == 2)


async def test_pause() -> None:
    """A paused session hears nothing, holds little, and after the pause hears all in order."""
    messages = [b"%05d" % number for number in range(50_000)]

    def pause(session: Hearer, message: bytes) -> None:
        if len(session.heard) % 1_000 == 1:
            session.outbox.pause_reading()

    async with serving(pause) as site, peer_of(site) as peer:
        session = await site.arrival()
        peer.say(*(masked(TEXT, message) for message in messages))
        heard = 1
        while heard < len(messages):
            await session.until(lambda session, heard=heard: len(session.heard) >= heard)  # type: ignore[misc]
            assert len(session.heard) == heard
            assert session.outbox._parser.held_bytes <= 2 * 65_536
            heard += 1_000
            session.outbox.resume_reading()
        await session.until(lambda session: len(session.heard) == len(messages))
        assert session.heard == messages


async def test_pausing_all_the_time_gathers_nothing() -> None:
    """A session that pauses at each message and resumes in each turn never makes us hold more than one read."""
    loop = asyncio.get_running_loop()
    most = 0

    def pause(session: Hearer, message: bytes) -> None:
        session.outbox.pause_reading()

    def resume() -> None:
        nonlocal most
        most = max(most, session.outbox._parser.held_bytes)
        session.outbox.resume_reading()
        if len(session.heard) < 500:
            loop.call_soon(resume)

    async with serving(pause) as site, peer_of(site) as peer:
        session = await site.arrival()
        peer.say(masked(TEXT, b"x" * 100) * 20_000)
        resume()
        await session.until(lambda session: len(session.heard) >= 500)
        assert most <= 65_536 + 106


async def test_pause_and_end() -> None:
    """A paused session that closes says its code, and the peer's answer ends the connection."""

    def pause(session: Hearer, message: bytes) -> None:
        session.outbox.pause_reading()

    async with serving(pause) as site, peer_of(site) as peer:
        session = await site.arrival()
        peer.say(masked(TEXT, b"1"), masked(TEXT, b"2"))
        await session.until(lambda session: bool(session.heard))
        session.outbox.close(errors.SHUTDOWN)
        assert await peer.goodbye() == (3001, "shutdown")
        peer.say(masked(CLOSE, goodbye(3001)))
        assert await peer.end() == b""
        assert session.heard == [b"1"]
        assert session.ends == []


# --- goodbyes -----------------------------------------------------------------
@pytest.mark.parametrize("disconnect", errors.DISCONNECTS.values(), ids=lambda disconnect: str(disconnect.code))
async def test_our_close(disconnect: errors.Disconnect) -> None:
    """PROTOCOL 7.2, 2.3: each disconnect is said with its code and reason after what was sent; 3000 is never said."""
    async with serving() as site, peer_of(site) as peer:
        session = await site.arrival()
        session.say(b"last")
        session.outbox.close(disconnect)
        session.outbox.close(errors.SHUTDOWN)
        session.say(b"too late")
        session.outbox.wire.spread([session.outbox], b"too late")
        if disconnect is errors.CONNECTION_CLOSED:
            assert await peer.end() == b""
            return
        assert await peer.frame() == (TEXT, b"last")
        assert await peer.goodbye() == (disconnect.code, disconnect.reason)
        assert site.sockets.closing == 1
        peer.say(masked(TEXT, b"unheard"), masked(CLOSE, goodbye(disconnect.code)))
        assert await peer.end() == b""
        # Of who floods nothing more is read, its Close neither: its own end is waited for (PROTOCOL 3.4.10).
        assert site.sockets.closing == (disconnect is errors.RATE_LIMITED)
        assert (session.heard, session.ends) == ([], [])


@pytest.mark.parametrize("code", [1000, 1001, 1012, 3001, 4999])
async def test_their_close(code: int) -> None:
    """RFC 6455 5.5.1: a peer's Close is echoed and ends the connection; the session is told once."""
    async with serving() as site, peer_of(site) as peer:
        session = await site.arrival()
        peer.say(masked(TEXT, b"hi"), masked(CLOSE, goodbye(code, "bye")), masked(TEXT, b"unheard"))
        assert await peer.frame() == (TEXT, b"hi")
        assert await peer.frame() == (CLOSE, goodbye(code))
        await session.until(lambda session: session.ends == ["gone"])
        assert session.heard == [b"hi"]
        session.outbox.close(errors.SHUTDOWN)
        session.say(b"too late")


async def test_their_close_without_a_code() -> None:
    """RFC 6455 5.5.1: a Close without a code is answered with one without."""
    async with serving() as site, peer_of(site) as peer:
        peer.say(masked(CLOSE))
        assert await peer.frame() == (CLOSE, b"")
        assert await peer.end() == b""


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x81\x02hi", 1002),
        (masked(3), 1002),
        (masked(PING, fin=False), 1002),
        (masked(0), 1002),
        (masked(CLOSE, b"\x00"), 1002),
        (masked(TEXT, b"\xff"), 1007),
        (masked(TEXT, b"x" * 1_001), 1009),
        (masked(TEXT, b"x" * 600, fin=False) + masked(0, b"x" * 600), 1009),
    ],
)
async def test_breaches_are_told(data: bytes, code: int) -> None:
    """RFC 6455 7.1.7: who breaks the framing is told the code, hears the end at once, and its session is told once."""
    async with serving(message_size_limit=1_000) as site, peer_of(site) as peer:
        session = await site.arrival()
        peer.say(masked(TEXT, b"ok"), data, masked(TEXT, b"unheard"))
        assert await peer.frame() == (TEXT, b"ok")
        assert (await peer.goodbye())[0] == code
        assert await peer.end() == b""
        peer.writer.close()
        await settled(site)
        assert site.sockets.closing == 0
        assert (session.heard, session.ends) == ([b"ok"], ["gone"])


async def test_websockets_is_told_its_message_is_too_big() -> None:
    """PROTOCOL 2.3: a client library learns 1009 when its message is above the limit."""
    async with serving(message_size_limit=65_536) as site:
        async with websockets.connect(f"ws://127.0.0.1:{site.port}/", compression=None) as client:
            await client.send("x" * 65_536)
            assert len(await client.recv()) == 65_536
            await client.send("x" * 65_537)
            with pytest.raises(websockets.ConnectionClosedError):
                await client.recv()
        assert client.close_code == 1009


@pytest.mark.parametrize("rest", [masked(TEXT, b"x" * 60_000) * 100, b"\x82\xff" + b"\xff" * 6_000_000])
async def test_a_flood_does_not_eat_the_close(rest: bytes) -> None:
    """A peer that goes on sending megabytes after our goodbye still reads it: no reset overtakes the Close."""

    def leave(session: Hearer, message: bytes) -> None:
        session.outbox.close(errors.FORCE_DISCONNECT)

    async with serving(leave) as site, peer_of(site) as peer:
        peer.say(masked(TEXT, b"go"), rest)
        async with asyncio.timeout(PATIENCE_S):
            await peer.writer.drain()
        assert await peer.goodbye() == (3503, "force disconnect")
        peer.say(masked(CLOSE, goodbye(3503)))
        assert await peer.end() == b""


async def test_a_goodbye_is_not_waited_for_forever() -> None:
    """A peer that does not answer our Close is let go after five seconds."""
    async with serving() as site, peer_of(site) as peer:
        session = await site.arrival()
        closed_at = asyncio.get_running_loop().time()
        session.outbox.close(errors.SHUTDOWN)
        assert await peer.goodbye() == (3001, "shutdown")
        site.sockets.check_stalled(closed_at + 4.5)
        assert site.sockets.closing == 1
        site.pass_time(5.5)
        assert site.sockets.closing == 0
        assert await peer.end() == b""


async def test_a_half_closed_peer_is_gone() -> None:
    """A peer that ends its side without a Close is gone."""
    async with serving() as site, peer_of(site) as peer:
        session = await site.arrival()
        peer.writer.write_eof()
        await session.until(lambda session: session.ends == ["gone"])
        assert await peer.end() == b""
        with pytest.raises(errors.Disconnected, match="3000"):
            await session.outbox.drained()


async def test_a_reset_peer_harms_nobody() -> None:
    """A socket that fails under a fan-out is reported in a later turn, once, and the others get the frame."""
    async with serving() as site, peer_of(site) as before:
        victim = await silent_client(site)
        async with peer_of(site) as behind:
            sessions = [await site.arrival() for _ in range(3)]
            wire = sessions[0].outbox.wire
            victim.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            victim.close()
            outboxes = [session.outbox for session in sessions]
            wire.spread(outboxes, wire.frame(b"1"))
            wire.spread(outboxes, wire.frame(b"2"))
            sessions[1].say(b"3")
            assert sessions[1].ends == []
            await sessions[1].until(lambda session: session.ends == ["gone"])
            for peer in (before, behind):
                assert [(await peer.frame())[1] for _ in range(2)] == [b"1", b"2"]
            assert [session.ends for session in sessions] == [[], ["gone"], []]


@pytest.mark.parametrize("behind", [b"", masked(TEXT, b"unheard")])
async def test_a_failing_session_is_ended(behind: bytes, log: ExpectedLog) -> None:
    """A fault in a session is logged once, ends its connection with 3004, and no other."""
    log.expect("task.failed")

    def fail(session: Hearer, message: bytes) -> None:
        if message == b"fail":
            raise ZeroDivisionError
        session.say(message)

    async with serving(fail) as site, peer_of(site) as peer, peer_of(site) as other:
        peer.say(masked(TEXT, b"fail"), behind)
        assert await peer.goodbye() == (3004, "internal server error")
        other.say(masked(TEXT, b"fine"))
        assert await other.frame() == (TEXT, b"fine")
        assert [session.ends for session in site.sessions] == [["gone"], []]
        assert site.sessions[0].heard == [b"fail"]
        assert len(log.seen("task.failed")) == 1


async def test_a_session_that_cannot_be_made(log: ExpectedLog) -> None:
    """A fault while a session is made ends that connection with 3004."""
    log.expect("task.failed")
    async with serving() as site:
        site.sessions = None  # type: ignore[assignment]
        async with peer_of(site, behind=masked(TEXT, b"unheard")) as peer:
            assert await peer.goodbye() == (3004, "internal server error")
            peer.say(masked(CLOSE, goodbye(3004)))
            assert await peer.end() == b""
        site.sessions = []


async def test_a_session_that_closes_while_it_is_made() -> None:
    """A session may refuse its client at once: the code arrives, and nothing is heard."""
    async with serving() as site:
        made = site.sockets._connect

        def refuse(outbox: Outbox, request: Request) -> Any:
            session = made(outbox, request)
            outbox.send(outbox.wire.frame(b"no"))
            outbox.close(errors.CONNECTION_LIMIT)
            return session

        site.sockets._connect = refuse
        async with peer_of(site, behind=masked(TEXT, b"unheard")) as peer:
            assert await peer.frame() == (TEXT, b"no")
            assert await peer.goodbye() == (3504, "connection limit")
            peer.say(masked(CLOSE, goodbye(3504)))
            assert await peer.end() == b""
        assert (site.sessions[0].heard, site.sessions[0].ends) == ([], [])


# --- slow clients -------------------------------------------------------------
LIMIT = 200_000
FRAME = b"x" * 10_000


def certificate(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS for a server, and for clients that trust it alone."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "server.pem"
    file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + made.public_bytes(serialization.Encoding.PEM)
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(file)
    return server, ssl.create_default_context(cafile=str(file))


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
async def test_a_reader_that_stops_is_cut(secure: bool, tmp_path: Path) -> None:
    """PROTOCOL 18: above the limit, by one frame at most, the backlog goes; who reads again sees whole frames, 3008."""
    server, client = certificate(tmp_path) if secure else (None, None)
    async with (
        serving(keep_quiet, tls=server, queue_max_size=LIMIT, send_buffer=8_192) as site,
        peer_of(site, receive_buffer=8_192, tls=client) as peer,
    ):
        session = await site.arrival()
        outbox = session.outbox
        frame = outbox.wire.frame(FRAME)
        given, most = 0, 0
        while not session.ends and given < 10_000:
            for _ in range(100):
                outbox.wire.spread([outbox], frame)
                given += 1
                most = max(most, outbox.waiting_bytes)
            with pytest.raises(errors.Disconnected) as end:
                await outbox.drained()
            assert end.value.disconnect is errors.SLOW
            await session.until(lambda session: bool(session.ends))
        assert session.ends == ["slow"]
        assert LIMIT - len(frame) < most <= LIMIT + len(frame)
        assert outbox.waiting_bytes < 2 * len(frame) + 16_384
        frames = 0
        while (came := await peer.frame())[0] != CLOSE:
            assert came == (TEXT, FRAME)
            frames += 1
        assert 0 < frames < given
        assert came == (CLOSE, goodbye(3008, "slow"))
        peer.say(masked(CLOSE, goodbye(3008)))
        assert await peer.end() == b""
        assert session.ends == ["slow"]


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
async def test_a_reader_that_slows_down_is_cut_between_frames(secure: bool, tmp_path: Path) -> None:
    """Also after much of a backlog went out, what is left of it when it is cut is the rest of one frame."""
    server, client = certificate(tmp_path) if secure else (None, None)
    limit = 1_000_000
    async with (
        serving(keep_quiet, tls=server, queue_max_size=limit, send_buffer=8_192) as site,
        peer_of(site, receive_buffer=8_192, tls=client) as peer,
    ):
        session = await site.arrival()
        outbox = session.outbox
        frame = outbox.wire.frame(FRAME)
        outbox.wire.spread([outbox], frame * 90)
        for _ in range(43):
            assert await peer.frame() == (TEXT, FRAME)
        while outbox.waiting_bytes <= limit - len(frame):
            outbox.wire.spread([outbox], frame)
        assert session.ends == []
        outbox.wire.spread([outbox], frame * 2)
        await session.until(lambda session: session.ends == ["slow"])
        while (came := await peer.frame())[0] != CLOSE:
            assert came == (TEXT, FRAME)
        assert came == (CLOSE, goodbye(3008, "slow"))


async def test_one_write_above_the_limit() -> None:
    """A single write that leaves more than the limit waiting is too much already."""
    async with (
        serving(keep_quiet, queue_max_size=LIMIT, send_buffer=8_192) as site,
        peer_of(site, receive_buffer=8_192) as peer,
    ):
        session = await site.arrival()
        session.outbox.wire.spread([session.outbox], session.outbox.wire.frame(FRAME) * 60)
        await session.until(lambda session: session.ends == ["slow"])
        assert await peer.goodbye() == (3008, "slow")


async def test_a_backlog_that_ends_keeps_the_order() -> None:
    """What was sent in the turn in which the socket becomes quick again still goes before what is spread then."""
    async with serving(keep_quiet, send_buffer=8_192) as site:
        client = await silent_client(site, receive_buffer=8_192)
        session = await site.arrival()
        outbox = session.outbox
        outbox.wire.spread([outbox], outbox.wire.frame(FRAME) * 15)
        assert outbox.waiting_bytes > 0
        outbox.send(outbox.wire.frame(b"first"))
        got = b""
        while outbox.progress_at < float("inf"):  # the loop has no turn in here
            got += client.recv(65_536)
            outbox._writable()
        outbox.wire.spread([outbox], outbox.wire.frame(b"second"))
        expected = outbox.wire.frame(FRAME) * 15 + outbox.wire.frame(b"first") + outbox.wire.frame(b"second")
        async with asyncio.timeout(PATIENCE_S):
            while len(got) < len(expected):
                got += await asyncio.get_running_loop().sock_recv(client, 65_536)
        assert got == expected
        client.close()


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])
async def test_a_reader_that_never_reads_again_is_let_go(secure: bool, tmp_path: Path) -> None:
    """A client that was cut and does not take its Close either is dropped after five seconds."""
    server, client = certificate(tmp_path) if secure else (None, None)
    async with (
        serving(keep_quiet, tls=server, queue_max_size=LIMIT, send_buffer=8_192) as site,
        peer_of(site, receive_buffer=8_192, tls=client),
    ):
        session = await site.arrival()
        for _ in range(200):
            session.outbox.wire.spread([session.outbox], session.outbox.wire.frame(FRAME))
        await session.until(lambda session: session.ends == ["slow"])
        site.pass_time(4.5)
        assert site.sockets.closing == 1
        site.pass_time(5.5)
        assert site.sockets.closing == 0
        assert session.outbox.waiting_bytes == 0


async def test_a_stalled_reader_is_cut() -> None:
    """A backlog below the limit that does not move for ten seconds is as slow as one above it."""
    async with (
        serving(keep_quiet, queue_max_size=1 << 30, send_buffer=8_192) as site,
        peer_of(site, receive_buffer=8_192) as peer,
    ):
        session = await site.arrival()
        for _ in range(100):
            session.say(FRAME)
        waiting = asyncio.create_task(session.outbox.drained())
        site.pass_time(60)  # nothing waits for the socket yet, so nobody is stalled
        session.outbox.flush()
        site.pass_time(9)
        assert session.outbox.waiting_bytes > 0
        site.pass_time(11)
        assert session.ends == []
        with pytest.raises(errors.Disconnected, match="3008"):
            await waiting
        await session.until(lambda session: session.ends == ["slow"])
        assert await peer.goodbye() == (3008, "slow")


async def test_a_slow_reader_that_reads_is_served() -> None:
    """``drained`` returns when the client has read, many may wait, and one that gives up harms no other."""
    async with (
        serving(keep_quiet, queue_max_size=LIMIT, send_buffer=8_192) as site,
        peer_of(site, receive_buffer=8_192) as peer,
    ):
        session = await site.arrival()
        await session.outbox.drained()
        for _ in range(15):
            session.say(FRAME)
        session.outbox.flush()
        assert session.outbox.waiting_bytes > 0
        waiting = [asyncio.create_task(session.outbox.drained()) for _ in range(3)]
        tick = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(tick.set_result, None)
        await tick
        waiting[1].cancel()
        session.outbox.wire.spread([session.outbox], session.outbox.wire.frame(b"behind"))
        for _ in range(15):
            assert await peer.frame() == (TEXT, FRAME)
        assert await peer.frame() == (TEXT, b"behind")
        async with asyncio.timeout(PATIENCE_S):
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [type(None), asyncio.CancelledError, type(None)]
        session.say(b"quick again")
        assert await peer.frame() == (TEXT, b"quick again")
        assert session.outbox.waiting_bytes == 0
        site.pass_time(60)
        assert session.ends == []


@pytest.mark.parametrize("both", [False, True], ids=["ours", "both"])
async def test_a_goodbye_waits_for_what_is_owed(both: bool) -> None:
    """An ordinary close comes behind the backlog, which a client that reads gets whole, also if it closes too."""
    async with (
        serving(keep_quiet, queue_max_size=LIMIT, send_buffer=8_192) as site,
        peer_of(site, receive_buffer=8_192) as peer,
    ):
        session = await site.arrival()
        for _ in range(15):
            session.say(FRAME)
        session.outbox.close(errors.SHUTDOWN)
        if both:
            peer.say(masked(CLOSE, goodbye(1000)))
            await settled(site)
        assert session.outbox.waiting_bytes > 0
        for _ in range(15):
            assert await peer.frame() == (TEXT, FRAME)
        assert await peer.goodbye() == (3001, "shutdown")
        if both:
            assert await peer.end() == b""


async def test_pings_of_a_peer_that_does_not_read_are_bounded() -> None:
    """A peer that pings and never reads our pongs is cut like any other slow one."""
    async with (
        serving(keep_quiet, queue_max_size=LIMIT, send_buffer=8_192) as site,
        peer_of(site, receive_buffer=8_192) as peer,
    ):
        session = await site.arrival()
        pings = masked(PING, b"x" * 125) * 1_000

        async def flood() -> None:
            while not session.ends:
                peer.say(pings)
                await peer.writer.drain()

        flooding = asyncio.create_task(flood())
        await session.until(lambda session: session.ends == ["slow"])
        flooding.cancel()
        assert session.outbox.waiting_bytes < LIMIT
        assert await peer.goodbye() == (3008, "slow")


# --- TLS ------------------------------------------------------------------------
async def test_tls(tmp_path: Path) -> None:
    """Over TLS both client libraries get back what they sent, however many records it takes, and our codes."""
    server, client = certificate(tmp_path)
    async with serving(tls=server, message_size_limit=1 << 20) as site:
        url = f"wss://127.0.0.1:{site.port}/"
        async with websockets.connect(url, ssl=client, ping_interval=None, max_size=None) as peer:
            for size in SIZES:
                await peer.send(b"x" * size)
                assert await peer.recv(decode=False) == b"x" * size
            for number in range(1_000):
                await peer.send(str(number))
            assert [await peer.recv() for _ in range(1_000)] == [str(number) for number in range(1_000)]
            site.sessions[0].outbox.close(errors.FORCE_RECONNECT)
            with pytest.raises(websockets.ConnectionClosed):
                await peer.recv()
            assert (peer.close_code, peer.close_reason) == (3011, "force reconnect")
        request = HTTPRequest(url, ssl_options=client)
        other = await tornado.websocket.websocket_connect(request)
        await other.write_message("x" * 300_000)
        assert await other.read_message() == "x" * 300_000
        other.close(1001, "away")
        await site.sessions[1].until(lambda session: session.ends == ["gone"])


async def test_tls_frames_in_one_record(tmp_path: Path) -> None:
    """Frames that come in one record with the handshake, or in a burst during a pause, are all heard."""

    def pause(session: Hearer, message: bytes) -> None:
        session.outbox.pause_reading()

    server, client = certificate(tmp_path)
    async with serving(pause, tls=server) as site:
        burst = b"".join(masked(TEXT, b"%03d" % number) for number in range(300))
        async with peer_of(site, tls=client, behind=burst) as peer:
            session = await site.arrival()
            for number in range(300):
                await session.until(lambda session, number=number: len(session.heard) > number)  # type: ignore[misc]
                assert len(session.heard) == number + 1
                session.outbox.resume_reading()
            assert session.heard == [b"%03d" % number for number in range(300)]
            peer.say(masked(TEXT, b"x" * 40_000), masked(3))
            await session.until(lambda session: len(session.heard) > 300)
            session.outbox.resume_reading()
            assert (await peer.goodbye())[0] == 1002


async def test_tls_record_that_tornado_began(tmp_path: Path) -> None:
    """Frames are heard that OpenSSL had decrypted, but Tornado not read, when the socket changed hands."""
    server, client = certificate(tmp_path)
    async with (
        serving(tls=server, chunk_size=512) as site,
        peer_of(site, tls=client, behind=masked(TEXT, b"x" * 5_000)) as peer,
    ):
        assert await peer.frame() == (TEXT, b"x" * 5_000)


# --- many -----------------------------------------------------------------------
async def test_an_idle_connection_is_small() -> None:
    """P7: a thousand connections that say nothing cost less than 4 KB of our memory each, clients included."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4_096)), hard))
    count = 1_000
    clients: list[socket.socket] = []
    async with serving(keep_quiet) as site:
        for _ in range(20):
            clients.append(await silent_client(site))
        site.requests.clear()
        gc.collect()
        tracemalloc.start()
        try:
            for _ in range(count):
                clients.append(await silent_client(site))
            site.requests.clear()
            site.arrivals = asyncio.Queue()
            gc.collect()
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        print(f"{held / count:.0f} bytes per idle connection, its client and its test session included")
        assert held / count < 4_096
        for sock in clients:
            sock.close()
        for session in site.sessions:
            await session.until(lambda session: session.ends == ["gone"])
