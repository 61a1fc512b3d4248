"""How a WebSocket begins, for what RFC 6455 leaves to HTTP; the handshake itself is in ``test_rfc6455``."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import tornado.httpserver
import tornado.netutil
import tornado.web
from conftest import ExpectedLog
from support import serving, settings
from tornado.httputil import HTTPServerRequest

from handlers.handshake import SocketHandshakes
from handlers.socket import Session, Sockets
from server.outbox import Outbox, Request

PATIENCE_S = 15.0
OFFER = "GET {path} HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n{more}\r\n"
KEY = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
PATH = "/connection/websocket"
CONNECT = bytes.fromhex("819500000000") + b'{"id":1,"connect":{}}'  # masked with zeros


class Line:
    """One TCP connection of a client that writes its requests itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def answer(self, request: str | bytes) -> tuple[int, dict[str, str], bytes]:
        """Send a request; the status, the headers by lower-case name, and the body of its answer."""
        self.writer.write(request if isinstance(request, bytes) else request.encode())
        async with asyncio.timeout(PATIENCE_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in head[1:-2])
            headers = {name.lower(): value for name, value in headers.items()}
            body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        return int(head[0].split(" ")[1]), headers, body


@asynccontextmanager
async def line_to(port: int) -> AsyncIterator[Line]:
    """A connection to a port of this machine."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Line(reader, writer)
    finally:
        writer.transport.abort()


def offer(more: str = "", *, path: str = PATH, version: int = 13) -> str:
    """A proper handshake, with more headers."""
    return OFFER.format(path=path, more=f"{KEY}Sec-WebSocket-Version: {version}\r\n{more}")


async def test_methods() -> None:
    """Only GET opens a WebSocket: 405 to the others as JSON, with the method that there is (RFC 9110 15.5.6)."""
    async with serving() as site, line_to(site.port) as line:
        for method in ("POST", "PUT", "OPTIONS"):
            status, headers, body = await line.answer(
                f"{method} {PATH} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
            )
            assert (status, headers["allow"]) == (405, "GET")
            assert json.loads(body) == {"error": {"code": 405, "message": "Method Not Allowed"}}


async def test_turned_away_and_back() -> None:
    """Who is turned away keeps its HTTP connection, and may shake hands on it."""
    async with serving() as site, line_to(site.port) as line:
        status, headers, body = await line.answer(offer(version=8))
        assert (status, headers["content-type"]) == (426, "application/json")
        assert "server" not in headers
        assert json.loads(body) == {"error": {"code": 426, "message": "expected Sec-WebSocket-Version 13"}}
        status, headers, _ = await line.answer(offer("Sec-WebSocket-Protocol: centrifuge-json\r\n"))
        assert (status, headers["sec-websocket-protocol"]) == (101, "centrifuge-json")
        line.writer.write(CONNECT)
        async with asyncio.timeout(PATIENCE_S):
            assert b'"connect":' in await line.reader.read(4096)


async def test_body_is_no_frame() -> None:
    """The body of a handshake is read over, and what follows it are frames, also in the same segment."""
    body = b'\x88\x00{"id":1}'  # would be a Close without a mask
    async with serving() as site, line_to(site.port) as line:
        request = offer(f"Content-Length: {len(body)}\r\n").encode() + body + CONNECT
        assert (await line.answer(request))[0] == 101
        async with asyncio.timeout(PATIENCE_S):
            assert b'"connect":' in await line.reader.read(4096)


async def test_bytes_that_are_no_text() -> None:
    """A query that is no UTF-8 asks for nothing that we know, and is no fault."""
    async with serving() as site, line_to(site.port) as line:
        assert (await line.answer(offer(path=f"{PATH}?format=%ff&cf_ws_frame_ping_pong=%fe")))[0] == 101


async def test_answers_unread() -> None:
    """A client that does not even take our 101, because of answers that it never read, is cut and gets no session."""
    made = []

    def connect(outbox: Outbox, request: Request) -> Session:
        made.append(request)
        raise AssertionError("no session was expected")

    filled = b""
    choked = asyncio.Event()

    class Choked(SocketHandshakes):
        def welcome(self, request: HTTPServerRequest) -> None:
            nonlocal filled
            sock = request.connection.stream.socket  # type: ignore[union-attr]
            try:
                while True:
                    filled += b"x" * sock.send(b"x" * 65_536)
            except BlockingIOError:
                choked.set()
                super().welcome(request)

    server = tornado.httpserver.HTTPServer(tornado.web.Application([(PATH, Choked(Sockets(connect)))]))
    listening = tornado.netutil.bind_sockets(0, "127.0.0.1")
    listening[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    server.add_sockets(listening)
    try:
        async with line_to(listening[0].getsockname()[1]) as line:
            line.reader._transport.pause_reading()  # type: ignore[attr-defined]
            line.writer.write(offer().encode())
            async with asyncio.timeout(PATIENCE_S):
                await choked.wait()
                line.reader._transport.resume_reading()  # type: ignore[attr-defined]
                assert await line.reader.read() == filled
        assert made == []
    finally:
        server.stop()
        await server.close_all_connections()


async def test_origin_comes_before_the_door(log: ExpectedLog) -> None:
    """PROTOCOL 2.3.1: a page of a foreign origin is told 403 and leaves no trace in the count of who may come in."""
    log.expect("connection.refused")
    chosen = settings(client={"allowed_origins": ["https://good.example"], "connection_limit": 1})
    async with serving(chosen) as site, line_to(site.port) as line:
        assert (await line.answer(offer("Origin: https://evil.example\r\n")))[0] == 403
        assert site.node.connections == 0
        assert log.seen("connection.refused")[0]["origin"] == "https://evil.example"
