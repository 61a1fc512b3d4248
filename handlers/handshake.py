"""How a WebSocket begins: Tornado reads the request, here it is judged and answered (PROTOCOL 2.2, 2.3; RFC 6455 4.2).

A path of WebSockets is an entry of the URL table like any other, but no
RequestHandler stands behind it: who may come in is answered 101 by one write, and
Tornado gives the socket away in the same turn.  Who may not gets a handler, which
says why as JSON.  Tried and dropped: a RequestHandler for both, whose coroutine,
header map and futures are 45 of the 240 µs that a handshake then takes
(``make bench WORKS=W3``); most of the rest is Tornado's accepting and reading.
"""

import base64
import binascii
import socket
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, cast

import tornado.web
from tornado.http1connection import HTTP1Connection
from tornado.httputil import HTTPMessageDelegate, HTTPServerRequest
from tornado.iostream import StreamClosedError
from tornado.routing import Router
from tornado.websocket import WebSocketProtocol13

from handlers import deflate
from handlers.base import JsonHandler
from handlers.origins import client_address, origin_allowed
from handlers.outboxes import take_socket
from handlers.socket import Sockets
from server.observe import event
from server.outbox import Request

SUBPROTOCOLS = {"centrifuge-json": "json", "centrifuge-protobuf": "protobuf"}


# --- decisions: pure ----------------------------------------------------------
class TurnedAway(Exception):
    """Why a request gets no WebSocket: an HTTP status, the reason for whoever wrote the client, and headers."""

    def __init__(self, status: int, why: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(f"{status} {why}")
        self.status = status
        self.why = why
        self.headers = headers or {}


def negotiate(offered: str, *queried: str) -> tuple[str, str | None]:
    """Choose the format and the subprotocol to answer with (PROTOCOL 2.3).

    ``offered`` is the ``Sec-WebSocket-Protocol`` header, ``queried`` the values
    of the query arguments that may name a format.  The client's first
    subprotocol that we speak decides; if there is none (some clients send the
    header empty) none is answered, and the query decides.
    """
    for name in offered.split(",") if offered else ():
        if name.strip() in SUBPROTOCOLS:
            return SUBPROTOCOLS[name.strip()], name.strip()
    return ("protobuf" if "protobuf" in queried else "json"), None


def handshake_fault(version: str, upgrade: str, connection: str, key: str) -> str | None:
    """Say what is wrong with an opening handshake (RFC 6455 4.2.1), ``None`` if nothing is.

    ``version`` is HTTP's, the rest are the headers of these names, "" where
    there is none.
    """
    if version != "HTTP/1.1":
        return f"expected HTTP/1.1, got {version}"
    if "websocket" not in _tokens(upgrade):
        return 'expected the header "Upgrade: websocket"'
    if "upgrade" not in _tokens(connection):
        return 'expected the header "Connection: Upgrade"'
    try:
        nonce = base64.b64decode(key, validate=True)
    except (binascii.Error, ValueError):
        nonce = b""
    return None if len(nonce) == 16 else "expected 16 bytes in base64 as Sec-WebSocket-Key"


def _tokens(header: str) -> set[str]:
    return {token.strip().lower() for token in header.split(",")}


def queried(request: HTTPServerRequest, name: str) -> str:
    """The last value of a query argument, "" if there is none."""
    values = request.query_arguments.get(name)
    return values[-1].decode(errors="replace") if values else ""


# --- one request ----------------------------------------------------------------
class Handshakes(Router):
    """One path of WebSockets, an entry of the URL table."""

    def __init__(self, sockets: Sockets) -> None:
        self.sockets = sockets

    def find_handler(self, request: HTTPServerRequest, **kwargs: Any) -> HTTPMessageDelegate:
        """Tornado asks who takes the rest of this request."""
        return _Handshake(self, request)

    @abstractmethod
    def welcome(self, request: HTTPServerRequest) -> None:
        """Let a client in whose request has been read to its end; raises ``TurnedAway``."""

    def address(self, request: HTTPServerRequest) -> str:
        """Where a request comes from."""
        forwarded_for = request.headers.get("X-Forwarded-For", "")
        return client_address(request.remote_ip or "", forwarded_for, self.sockets.trusted_proxies)

    def check(self, request: HTTPServerRequest) -> None:
        """Raise ``TurnedAway`` for who may not have a WebSocket: 400, 403, 426, 503; the others the door counts."""
        headers = request.headers
        fault = handshake_fault(
            request.version,
            headers.get("Upgrade", ""),
            headers.get("Connection", ""),
            headers.get("Sec-WebSocket-Key", ""),
        )
        if fault is not None:
            raise TurnedAway(400, fault)
        if headers.get("Sec-WebSocket-Version") != "13":
            raise TurnedAway(426, "expected Sec-WebSocket-Version 13", {"Sec-WebSocket-Version": "13"})  # RFC 6455 4.4
        origin = headers.get("Origin")
        if not origin_allowed(origin, self.sockets.allowed_origins):
            event("connection.refused", why="client.allowed_origins", origin=origin, address=self.address(request))
            raise TurnedAway(403, "this origin may not connect")
        address = self.address(request)
        refusal = self.sockets.refusal(address)
        if refusal is not None:
            self.sockets.refusals.say("connection.refused", address, 503, why=refusal, origin=origin)
            raise TurnedAway(503, "too many connections, try again later")


class SocketHandshakes(Handshakes):
    """``/connection/websocket``; PROTOCOL 2.3."""

    def welcome(self, request: HTTPServerRequest) -> None:
        """See ``Handshakes.welcome``."""
        self.check(request)
        offered = request.headers.get("Sec-WebSocket-Protocol", "")
        format, subprotocol = negotiate(offered, queried(request, "format"), queried(request, "cf_protocol"))
        asked = Request(
            transport="websocket",
            format=format,
            remote_addr=self.address(request),
            headers=self.sockets.wanted(request.headers),
            native_pings=queried(request, "cf_ws_frame_ping_pong") == "true",
        )
        agreed = {}
        if subprotocol is not None:
            agreed["Sec-WebSocket-Protocol"] = subprotocol
        extensions = request.headers.get("Sec-WebSocket-Extensions", "") if self.sockets.compression else ""
        compression = deflate.accept(extensions)
        if compression is not None:
            agreed["Sec-WebSocket-Extensions"] = compression
        taken = shake_hands(request, agreed)
        if taken is not None:
            self.sockets.adopt(*taken, asked, compression=compression is not None)


class _Handshake(HTTPMessageDelegate):
    """One request to a path of WebSockets; a body is read over."""

    def __init__(self, path: Handshakes, request: HTTPServerRequest) -> None:
        self._path = path
        self._request = request

    def finish(self) -> None:
        """The request has been read to its end."""
        request = self._request
        try:
            if request.method != "GET":
                raise TurnedAway(405, "Method Not Allowed", {"Allow": "GET"})
            self._path.welcome(request)
        except TurnedAway as turned:
            _TURNING_AWAY.get_handler_delegate(request, TurnedAwayHandler, {"turned": turned}).finish()


class TurnedAwayHandler(JsonHandler):
    """Tells a client why it gets no WebSocket."""

    def initialize(self, turned: TurnedAway) -> None:
        """Tornado hands over why."""
        self._turned = turned

    def prepare(self) -> None:
        """Answer, whatever the method is."""
        for name, value in self._turned.headers.items():
            self.set_header(name, value)
        self.answer({"error": {"code": self._turned.status, "message": self._turned.why}}, self._turned.status)


_TURNING_AWAY = tornado.web.Application(log_function=lambda handler: None)


def shake_hands(request: HTTPServerRequest, headers: Mapping[str, str]) -> tuple[socket.socket, bytes] | None:
    """Answer 101 and take the socket from Tornado, with what was read of it already; ``None`` if the client is gone."""
    accept = WebSocketProtocol13.compute_accept_value(request.headers["Sec-WebSocket-Key"])
    fields = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Accept": accept, **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    stream = cast(HTTP1Connection, request.connection).detach()
    try:
        written = stream.write(f"HTTP/1.1 101 Switching Protocols\r\n{head}\r\n".encode())
        if written.done():
            written.result()
            return take_socket(stream)
    except StreamClosedError:
        return None
    # It asked for a WebSocket behind answers that it does not read: there is nothing to wait for.
    stream.close()
    return None
