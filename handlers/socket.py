"""The WebSocket transport: Tornado's HTTP, then the bare socket.

Tornado listens, routes and reads the request; ``SocketHandler`` answers the
handshake.  From then on a connection is a socket, a frame parser and an outbox:
no coroutine, no stream, no handler.  The loop tells us when there is something to
read, whole messages go to the session, and frames are written with one system call
while the socket takes them.  Tried and dropped: Tornado's ``write_message`` costs
six times as much per delivery as what stands here, its IOStream with a frame
encoded once three times, a coroutine over the stream is level when writing and
twice as dear when reading; each of them holds 14 KB for an idle connection.

How a WebSocket ends; ``outboxes`` has what every connection does.  Each arrow is one
plain function; nothing here awaits but ``drained``.

    OPEN      frames go out, messages go to the session
     | the session calls close()          -> CLOSING
     | the peer sends Close               -> ANSWERED   its code is echoed (RFC 6455 5.5.1)
     | the peer breaks RFC 6455           -> BROKEN     1002, 1007 or 1009 (RFC 6455 7.1.7)
    CLOSING   our Close is on its way or out; the peer's Close, its end or a time limit closes the socket
    BROKEN    the same, but what comes can not be read any more, so we say by a half-close that this was all
    ANSWERED  the peer has said goodbye; our Close is the last thing to leave
"""

import base64
import binascii
import ipaddress
import re
import socket
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from functools import lru_cache
from typing import Protocol

from tornado.iostream import StreamClosedError
from tornado.websocket import WebSocketProtocol13

from handlers.base import JsonHandler
from handlers.frames import (
    Close,
    Parser,
    Ping,
    Violation,
    binary_frame,
    close_frame,
    frame_around,
    ping_frame,
    pong_frame,
    text_frame,
)
from handlers.outboxes import CLOSE_TIMEOUT_S, BareOutbox, BareWire, Listener, State, Tls, take_socket
from server import errors
from server.observe import event
from server.outbox import Outbox, Request
from server.protocol import CODECS, Codec

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Session(Listener, Protocol):
    """What this transport wants of a session; nothing of it may wait."""

    def receive(self, message: bytes) -> None:
        """Take one WebSocket message."""

    def native_pong(self) -> None:
        """A pong frame came."""


Connect = Callable[[Outbox, Request], Session]
"""Makes the session of a new connection; may send and close at once, is read to from the next turn on."""


# --- the handshake's decisions: pure -----------------------------------------
@lru_cache(maxsize=256)
def _origin_pattern(pattern: str) -> re.Pattern[str]:
    anything = r"[^\s/?#@]*"  # never out of the host and port that the pattern stands for
    return re.compile(anything.join(re.escape(part) for part in pattern.split("*")), re.IGNORECASE)


def origin_allowed(origin: str | None, patterns: Iterable[str]) -> bool:
    """May a page of this ``Origin`` header connect (PROTOCOL 2.2)?

    A request without one comes from no browser and may.  In a pattern ``*``
    stands for any part of a host or port; the pattern ``*`` alone allows all,
    ``null`` included.
    """
    if not origin:
        return True
    return any(pattern == "*" or _origin_pattern(pattern).fullmatch(origin) for pattern in patterns)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Read an address as proxies write it, maybe with a port, an IPv6 one maybe in brackets; ``None`` if it is none."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def client_address(peer: str, forwarded_for: str, trusted: Sequence[Network]) -> str:
    """Say where a request comes from: the peer, or whom trusted proxies name.

    ``peer`` is the socket's other end, ``forwarded_for`` the ``X-Forwarded-For``
    header ("" for none).  Each proxy adds on the right whom it was asked by, so
    from the right the first address that is no trusted proxy is the truth, and
    anybody may have written what stands left of it.  What cannot be read is not
    walked over.
    """
    found = _address(peer)
    if found is None:
        return peer
    for text in reversed(forwarded_for.split(",") if forwarded_for else ()):
        if not any(found in network for network in trusted):
            break
        before = _address(text)
        if before is None:
            break
        found = before
    return str(found)


SUBPROTOCOLS = {"centrifuge-json": "json", "centrifuge-protobuf": "protobuf"}


def negotiate(offered: str, *queried: str) -> tuple[str, str | None]:
    """Choose the format and the subprotocol to answer with (PROTOCOL 2.3).

    ``offered`` is the ``Sec-WebSocket-Protocol`` header, ``queried`` the values
    of the query arguments that may name a format.  The client's first
    subprotocol that we speak decides; if there is none (some clients send the
    header empty) none is answered, and the query decides.
    """
    for name in offered.split(","):
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


# --- the connection -----------------------------------------------------------
class Reading(Enum):
    """Does a session want messages, and does the loop watch the socket for it?

    ``PAUSED`` becomes ``OFF`` only when something comes: most pauses are shorter
    than that, and cost no system call.  ``RESUMING`` lasts until the next turn: what
    was read before the pause goes to the session before anything more is read, else
    a client could make us hold more with each pause.
    """

    ON = "on"
    PAUSED = "paused"
    OFF = "off"
    RESUMING = "resuming"


class SocketWire(BareWire):
    """All WebSockets of one format; see ``BareWire``."""

    def __init__(self, codec: Codec, *, queue_max_size: int, stall_timeout_s: float) -> None:
        super().__init__(codec, queue_max_size=queue_max_size, stall_timeout_s=stall_timeout_s)
        self._encode = binary_frame if codec.format == "protobuf" else text_frame

    def frame(self, message: bytes) -> bytes:
        """Text frames for JSON, binary ones for protobuf (PROTOCOL 2.3)."""
        return self._encode(message)

    def around(self, data: bytes | bytearray, at: int) -> tuple[int, int]:
        """See ``BareWire.around``."""
        return frame_around(data, at)


class SocketOutbox(BareOutbox):
    """One WebSocket: its socket, its parser, and its outbox."""

    __slots__ = ("_parser", "_reading")

    wire: SocketWire
    _session: Session | None

    def __init__(self, sock: socket.socket, wire: SocketWire, parser: Parser) -> None:
        super().__init__(sock, wire)
        self._parser = parser
        self._reading = Reading.OFF

    def start(self, session: Session) -> None:
        """Bring what the client sends to ``session``, unless that has closed already."""
        if self._state in (State.OPEN, State.SLOW, State.LOST):
            self._session = session
        self.resume_reading()

    def pause_reading(self) -> None:
        """See ``Outbox.pause_reading``."""
        if self._reading in (Reading.ON, Reading.RESUMING) and self._state is State.OPEN:
            self._reading = Reading.PAUSED

    def resume_reading(self) -> None:
        """See ``Outbox.resume_reading``."""
        if self._reading in (Reading.ON, Reading.RESUMING) or self._state is State.CLOSED:
            return
        if self._reading is Reading.OFF:
            self.wire.loop.add_reader(self._fd, self._readable)
        self._reading = Reading.RESUMING
        self.wire.loop.call_soon(self._resumed)

    def ping_frame(self) -> bytes:
        """See ``Outbox.ping_frame``."""
        return ping_frame()

    # --- reading ---
    def _readable(self) -> None:
        if self._reading is not Reading.ON:
            if self._reading is Reading.PAUSED:
                self._reading = Reading.OFF
                self.wire.loop.remove_reader(self._fd)
            return
        try:
            data = self._read()
        except OSError:
            data = b""
        if data:
            self._parser.feed(data)
            self._take_events()
        elif data is not None:
            self._lose()

    def _resumed(self) -> None:
        """Go on with what was read before the pause."""
        if self._reading is Reading.RESUMING:
            self._reading = Reading.ON
            self._take_events()

    def _take_events(self) -> None:
        """Bring what the parser has to the session, as long as that wants it.

        In states other than ``OPEN`` only the peer's Close matters; the rest is read
        so that it can be found.
        """
        parser = self._parser
        try:
            while self._reading is Reading.ON and (came := parser.next_event()) is not None:
                if type(came) is Close:
                    self._peer_closed(came)
                elif self._state is not State.OPEN or self._session is None:
                    continue
                elif type(came) is bytes:
                    self._session.receive(came)
                elif type(came) is Ping:
                    self.send(pong_frame(came.data))
                else:
                    self._session.native_pong()
        except Violation as violation:
            self._peer_broke(violation)
        except Exception as fault:
            # The session's; it must not leave a connection that nobody serves.
            event("task.failed", task="session", fault=fault)
            if self._state is State.OPEN:
                self._say_goodbye(State.CLOSING, self._goodbye(errors.SERVER_ERROR))
            self._tell_gone()

    def _peer_closed(self, close: Close) -> None:
        """Answer the peer's Close, or take it for the answer to ours (RFC 6455 5.5.1)."""
        if self._state is State.CLOSING:
            self._state = State.ANSWERED
            if self._backlog is None:
                self._goodbye_said()
        elif self._state in (State.OPEN, State.SLOW):
            self._say_goodbye(State.ANSWERED, close_frame(close.code))
            self._tell_gone()

    def _peer_broke(self, violation: Violation) -> None:
        """Fail the connection (RFC 6455 7.1.7)."""
        if self._state is State.CLOSING:
            self._state = State.BROKEN
            if self._backlog is None:
                self._goodbye_said()
        elif self._state in (State.OPEN, State.SLOW):
            event("connection.violated", code=violation.code, reason=violation.reason)
            self._say_goodbye(State.BROKEN, close_frame(violation.code, violation.reason))
            self._tell_gone()

    # --- ending ---
    def _goodbye(self, disconnect: errors.Disconnect) -> bytes:
        """A Close frame; before it a push that says the same, where pushes are all there is (PROTOCOL 2.6)."""
        close = close_frame(disconnect.code, disconnect.reason)
        return self.wire.frame(self.wire.codec.disconnect(disconnect)) + close if self.wire.codec.one_way else close

    def _goodbye_said(self) -> None:
        """Our Close is out: close the socket if the peer's is in, else wait for it, but not forever."""
        if self._state is State.ANSWERED:
            self._end_writing()
            self._shut()
        elif self._state is State.CLOSING:
            self.wire.closing[self] = self.wire.loop.time() + CLOSE_TIMEOUT_S
        elif self._state is State.BROKEN:
            self._half_close()

    def _read_on(self) -> None:
        self.resume_reading()

    def _shut(self) -> None:
        self._reading = Reading.OFF
        super()._shut()


class TlsOutbox(Tls, SocketOutbox):
    """A WebSocket through TLS."""

    __slots__ = ()

    def _resumed(self) -> None:
        super()._resumed()
        # The loop does not see what OpenSSL has decrypted already.  Our reads take records
        # whole and leave nothing; the last one before the takeover was Tornado's.
        if self._reading is Reading.ON:
            self._readable()


# --- the way in ---------------------------------------------------------------
class Sockets:
    """The WebSocket connections of this process, and what their handshake must know.

    ``connect`` makes their sessions.  ``queue_max_size`` and
    ``message_size_limit`` are bytes, ``outbox_stall_timeout_s`` seconds
    (PROTOCOL 18).  ``user_id_http_header`` is a header's name that sessions want
    to see, "" for none, and ``proxied_headers`` are others.  ``refusal`` names the setting that keeps the next client
    out, or gives ``None``.  Must be made on the running loop.
    """

    def __init__(
        self,
        connect: Connect,
        *,
        allowed_origins: Sequence[str] = (),
        message_size_limit: int = 65_536,
        queue_max_size: int = 1_048_576,
        outbox_stall_timeout_s: float = 10.0,
        user_id_http_header: str = "",
        proxied_headers: Iterable[str] = (),
        trusted_proxies: Sequence[Network] = (),
        refusal: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.allowed_origins = tuple(allowed_origins)
        self.trusted_proxies = tuple(trusted_proxies)
        wanted = ("user-agent", user_id_http_header, *proxied_headers)
        self.wanted_headers = tuple(dict.fromkeys(name.lower() for name in wanted if name))
        self.refusal = refusal
        self._connect = connect
        self.queue_max_size = queue_max_size
        self.outbox_stall_timeout_s = outbox_stall_timeout_s
        self._message_size_limit = message_size_limit
        self._wires = {
            format: SocketWire(CODECS[format], queue_max_size=queue_max_size, stall_timeout_s=outbox_stall_timeout_s)
            for format in SUBPROTOCOLS.values()
        }
        self._watched: list[BareWire] = list(self._wires.values())

    def wanted(self, headers: Mapping[str, str]) -> dict[str, str]:
        """The headers of a request that its session wants to see, by lower-case name."""
        return {name: headers[name] for name in self.wanted_headers if name in headers}

    def watch(self, *wires: BareWire) -> None:
        """Look after the connections of other transports as well."""
        self._watched += wires

    @property
    def closing(self) -> int:
        """How many connections have not finished their goodbye."""
        return sum(len(wire.closing) for wire in self._watched)

    def check_stalled(self, now: float) -> None:
        """See ``BareWire.check_stalled``."""
        for wire in self._watched:
            wire.check_stalled(now)

    def adopt(self, sock: socket.socket, data: bytes, request: Request) -> None:
        """Make a session for a socket whose handshake is done, and of which ``data`` was read already."""
        outbox = self.outbox(sock, data, self._wires[request.format], self._message_size_limit)
        session = self.session(outbox, request)
        if session is not None:
            outbox.start(session)

    def outbox(self, sock: socket.socket, data: bytes, wire: SocketWire, message_size_limit: int) -> SocketOutbox:
        """The outbox of such a socket."""
        parser = Parser(message_size_limit)
        if data:
            parser.feed(data)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            with suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return TlsOutbox(sock, wire, parser) if isinstance(sock, ssl.SSLSocket) else SocketOutbox(sock, wire, parser)

    def session(self, outbox: Outbox, request: Request) -> Session | None:
        """A session behind an outbox, which is closed if that is beyond us."""
        try:
            return self._connect(outbox, request)
        except Exception as fault:
            event("task.failed", task="session", fault=fault)
            outbox.close(errors.SERVER_ERROR)
            return None


class HandshakeHandler(JsonHandler):
    """Answers opening handshakes, and is forgotten (PROTOCOL 2.2, 2.3; RFC 6455 4.2)."""

    sockets: Sockets

    @property
    def address(self) -> str:
        """Where the request comes from."""
        forwarded_for = self.request.headers.get("X-Forwarded-For", "")
        return client_address(self.request.remote_ip or "", forwarded_for, self.sockets.trusted_proxies)

    def turned_away(self) -> bool:
        """Answer who may not have a WebSocket: 400, 403, 426 or 503 with the reason; the others the door counts."""
        headers = self.request.headers
        fault = handshake_fault(
            self.request.version,
            headers.get("Upgrade", ""),
            headers.get("Connection", ""),
            headers.get("Sec-WebSocket-Key", ""),
        )
        if fault is not None:
            self.refuse(400, fault)
            return True
        if headers.get("Sec-WebSocket-Version") != "13":
            self.set_header("Sec-WebSocket-Version", "13")  # RFC 6455 4.4
            self.refuse(426, "expected Sec-WebSocket-Version 13")
            return True
        origin = headers.get("Origin")
        if not origin_allowed(origin, self.sockets.allowed_origins):
            event("connection.refused", why="client.allowed_origins", origin=origin, address=self.address)
            self.refuse(403, "this origin may not connect")
            return True
        refusal = self.sockets.refusal()
        if refusal is not None:
            event("connection.refused", why=refusal, origin=origin, address=self.address)
            self.refuse(503, "too many connections, try again later")
            return True
        return False

    async def shake_hands(self) -> tuple[socket.socket, bytes] | None:
        """Answer 101 and take the socket from Tornado; ``None`` if the client is gone."""
        key = self.request.headers["Sec-WebSocket-Key"]
        self.set_status(101)
        self.clear_header("Content-Type")
        self.set_header("Upgrade", "websocket")
        self.set_header("Connection", "Upgrade")
        self.set_header("Sec-WebSocket-Accept", WebSocketProtocol13.compute_accept_value(key))
        try:
            await self.flush()
        except StreamClosedError:
            return None
        self.ui.clear()  # refers to us; without it the request would live until the next collection of cycles
        return take_socket(self.detach())

    def refuse(self, status: int, why: str) -> None:
        """Answer with an error, and with the reason for whoever wrote the client."""
        self.answer({"error": {"code": status, "message": why}}, status)


class SocketHandler(HandshakeHandler):
    """``/connection/websocket``; PROTOCOL 2.3."""

    def initialize(self, sockets: Sockets) -> None:
        """Tornado hands over what the URL table gave."""
        self.sockets = sockets

    async def get(self) -> None:
        """Shake hands and adopt the socket, or answer 400, 403, 426 or 503 with the reason."""
        if self.turned_away():
            return
        format, subprotocol = negotiate(
            self.request.headers.get("Sec-WebSocket-Protocol", ""),
            self.get_query_argument("format", ""),
            self.get_query_argument("cf_protocol", ""),
        )
        request = Request(
            transport="websocket",
            format=format,
            remote_addr=self.address,
            headers=self.sockets.wanted(self.request.headers),
            native_pings=self.get_query_argument("cf_ws_frame_ping_pong", "") == "true",
        )
        if subprotocol is not None:
            self.set_header("Sec-WebSocket-Protocol", subprotocol)
        taken = await self.shake_hands()
        if taken is not None:
            self.sockets.adopt(*taken, request)
