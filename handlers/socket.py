"""The WebSocket transport once hands are shaken: the bare socket.

Tornado listens, routes and reads the request; ``handshake`` answers it.  From then
on a connection is a socket, a frame parser and an outbox: no coroutine, no stream, no
handler.  The loop tells us when there is something to read, whole messages go to the
session, and frames are written with one system call while the socket takes them.
Tried and dropped: Tornado's ``write_message`` costs six times as much per delivery as
what stands here, its IOStream with a frame encoded once three times, a coroutine over
the stream is level when writing and twice as dear when reading; each of them holds
14 KB for an idle connection.

Two short ways lead past what is there for every case, and do what it would do: most
reads bring one whole text frame, which goes to the session without becoming an event
(``_take``); most outboxes have a socket that takes all at once, and at the end of a
turn are written to in one loop (``BareWire._flush_dirty``).  Together 1.3 µs of the 19
that a message to oneself took (``make bench WORKS=W2,W6``), from the frame that comes
to the frames that go.

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

import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import Any, Protocol

from handlers.deflate import Deflate
from handlers.frames import (
    BINARY,
    COMPRESSED,
    MESSAGE_TOO_BIG,
    TEXT,
    Close,
    Parser,
    Ping,
    Violation,
    close_frame,
    frame_around,
    message_frame,
    ping_frame,
    pong_frame,
)
from handlers.origins import Network
from handlers.outboxes import OPEN, BareOutbox, BareWire, Listener, State, Tls
from handlers.refusals import Refusals
from server import errors
from server.observe import event
from server.outbox import Outbox, Request
from server.protocol import CODECS, Codec


class Session(Listener, Protocol):
    """What this transport wants of a session; nothing of it may wait."""

    def receive(self, message: bytes) -> None:
        """Take one WebSocket message."""

    def native_ping(self) -> None:
        """A ping frame came, which is answered unless the session closes now."""

    def native_pong(self) -> None:
        """A pong frame came."""


Connect = Callable[[Outbox, Request], Session]
"""Makes the session of a new connection; may send and close at once, is read to from the next turn on."""


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


TURN_EVENTS = 32
TURN_BYTES = 4 * 1024
TURN_FRAGMENTS = 256
"""What of one connection is taken in one turn of the loop, before the others have theirs: so many messages and control
frames, messages of so many bytes, one of which may be larger, and fragments without an end.

One read brings up to 10,000 tiny frames, which would hold up everybody else for 20 ms or more.
"""

ON = Reading.ON
"""See ``outboxes.OPEN``."""


class SocketWire(BareWire):
    """All WebSockets of one format; see ``BareWire``."""

    compression = False

    def __init__(self, codec: Codec, *, queue_max_size: int, stall_timeout_s: float) -> None:
        super().__init__(codec, queue_max_size=queue_max_size, stall_timeout_s=stall_timeout_s)
        self.note_too_big: Callable[[], None] = lambda: None
        """Called for each message above the limit."""
        self._opcode = BINARY if codec.format == "protobuf" else TEXT

    def frame(self, message: bytes) -> bytes:
        """Text frames for JSON, binary ones for protobuf (PROTOCOL 2.3)."""
        return message_frame(self._opcode, message)

    def around(self, data: bytes | bytearray, at: int) -> tuple[int, int]:
        """See ``BareWire.around``."""
        return frame_around(data, at)


class DeflatedWire(SocketWire):
    """All WebSockets of one format on which compression was agreed: what all of them get is compressed once, too."""

    compression = True

    def __init__(self, codec: Codec, deflate: Deflate, *, queue_max_size: int, stall_timeout_s: float) -> None:
        super().__init__(codec, queue_max_size=queue_max_size, stall_timeout_s=stall_timeout_s)
        self._deflate = deflate

    def frame(self, message: bytes) -> bytes:
        """As ``SocketWire.frame``, compressed where that saves anything (PROTOCOL 2.3.11)."""
        data = self._deflate.compress(message)
        return super().frame(message) if data is None else message_frame(COMPRESSED | self._opcode, data)


class SocketOutbox(BareOutbox):
    """One WebSocket: its socket, its parser, and its outbox."""

    __slots__ = ("_parser", "_reading", "_resuming")

    wire: SocketWire
    _session: Session | None

    def __init__(self, sock: socket.socket, wire: SocketWire, parser: Parser) -> None:
        super().__init__(sock, wire)
        self._parser = parser
        self._reading = Reading.OFF
        self._resuming = False

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
            try:
                self.wire.arrivals.expect(self._fd, self)
            except OSError as fault:  # the system has no more of what it takes
                event("task.failed", task="read a socket", fault=fault)
                self._lose_soon()
                return
        self._go_on_soon()

    def _go_on_soon(self) -> None:
        """Take what was read already in the next turn, before anything more is read."""
        self._reading = Reading.RESUMING
        if not self._resuming:
            self._resuming = True
            self.wire.loop.call_soon(self._resumed)

    def ping_frame(self) -> bytes:
        """See ``Outbox.ping_frame``."""
        return ping_frame()

    # --- reading ---
    def readable(self) -> None:
        """See ``arrivals.Reader``."""
        if self._reading is not ON:
            if self._reading is Reading.PAUSED:
                self._reading = Reading.OFF
                self.wire.arrivals.ignore(self._fd)
            return
        try:
            data = self._read()
        except OSError:
            data = b""
        if data:
            self._take(data)
        elif data is not None:
            self._lose()

    def _take(self, data: bytes) -> None:
        """Bring what was read to the session; mostly that is one message, which goes there straight."""
        session = self._session
        if session is not None and self._state is OPEN:
            message = self._parser.sole_text(data)
            if message is not None:
                try:
                    session.receive(message)
                except Exception as fault:
                    self._session_failed(fault)
                return
        self._parser.feed(data)
        self._take_events()

    def _resumed(self) -> None:
        """Go on with what was read before the pause."""
        self._resuming = False
        if self._reading is Reading.RESUMING:
            self._reading = Reading.ON
            self._take_events()

    def _take_events(self) -> None:
        """Bring what the parser has to the session, as long as that wants it.

        In states other than ``OPEN`` only the peer's Close matters; the rest is read
        so that it can be found.  What is more than one connection's part of a turn
        waits for the next.
        """
        parser = self._parser
        events, room = TURN_EVENTS, TURN_BYTES
        try:
            while self._reading is Reading.ON and events and room > 0:
                came = parser.next_event(TURN_FRAGMENTS)
                events -= 1
                if came is None:
                    break
                if type(came) is Close:
                    self._peer_closed(came)
                elif self._state is not State.OPEN or self._session is None:
                    room -= len(came) if type(came) is bytes else 0  # a compressed one has cost as much as ever
                    continue
                elif type(came) is bytes:
                    room -= len(came)
                    self._session.receive(came)
                elif type(came) is Ping:
                    self.send(pong_frame(came.data))
                    self._session.native_ping()
                else:
                    self._session.native_pong()
            if self._reading is Reading.ON and parser.unread:
                self._go_on_soon()
        except Violation as violation:
            self._peer_broke(violation)
        except Exception as fault:
            self._session_failed(fault)

    def _session_failed(self, fault: Exception) -> None:
        """The session raised: that must not leave a connection that nobody serves."""
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
            if violation.code == MESSAGE_TOO_BIG:
                self.wire.note_too_big()
            self._say_goodbye(State.BROKEN, close_frame(violation.code, violation.reason))
            self._tell_gone()

    # --- ending ---
    def close(self, disconnect: errors.Disconnect) -> None:
        """See ``Outbox.close``; of who floods us nothing more is looked at, not even for its Close.

        What is still on its way may be a hundred thousand frames, which cost as much to read as those before.
        """
        if disconnect.code == errors.RATE_LIMITED.code and self._state in (State.OPEN, State.SLOW, State.LOST):
            self._session = None
            self._parser.stop()
            self._say_goodbye(State.BROKEN, self._goodbye(disconnect))
        else:
            super().close(disconnect)

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
            self.wire.closing[self] = self.wire.loop.time() + self.wire.goodbye_timeout_s
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
            self.readable()


# --- the way in ---------------------------------------------------------------
class Sockets:
    """The WebSocket connections of this process, and what their handshake must know.

    ``connect`` makes their sessions.  ``queue_max_size`` and
    ``message_size_limit`` are bytes, ``outbox_stall_timeout_s`` seconds
    (PROTOCOL 18).  ``user_id_http_header`` is a header's name that sessions want
    to see, "" for none, and ``proxied_headers`` are others.  ``refusal`` names the setting that keeps the next client
    of an address out, or gives ``None``; ``note_limit`` is told of other settings that somebody met.  ``deflate`` is
    for those who can take it, ``None`` for nobody.  Must be made on the running loop.
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
        refusal: Callable[[str], str | None] = lambda address: None,
        note_limit: Callable[[str], None] = lambda setting: None,
        deflate: Deflate | None = None,
    ) -> None:
        self.allowed_origins = tuple(allowed_origins)
        self.trusted_proxies = tuple(trusted_proxies)
        wanted = ("user-agent", user_id_http_header, *proxied_headers)
        self.wanted_headers = tuple(dict.fromkeys(name.lower() for name in wanted if name))
        self.refusal = refusal
        self.refusals = Refusals(time.monotonic)
        self._connect = connect
        self.queue_max_size = queue_max_size
        self.outbox_stall_timeout_s = outbox_stall_timeout_s
        self._message_size_limit = message_size_limit
        limits: dict[str, Any] = {"queue_max_size": queue_max_size, "stall_timeout_s": outbox_stall_timeout_s}
        self._wires = {format: SocketWire(codec, **limits) for format, codec in CODECS.items()}
        self._deflated: dict[str, SocketWire] = {}
        if deflate is not None:
            self._deflated = {format: DeflatedWire(codec, deflate, **limits) for format, codec in CODECS.items()}
        for wire in (*self._wires.values(), *self._deflated.values()):
            wire.note_too_big = partial(note_limit, "websocket.message_size_limit")
        self.note_limit = note_limit
        self._watched: list[BareWire] = [*self._wires.values(), *self._deflated.values()]

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

    @property
    def backlogged(self) -> int:
        """How many connections have something waiting that their socket has not taken."""
        return sum(len(wire.backlogged) for wire in self._watched)

    def check_stalled(self, now: float) -> None:
        """See ``BareWire.check_stalled``."""
        for wire in self._watched:
            wire.check_stalled(now)

    def hasten(self, seconds: float) -> None:
        """See ``BareWire.hasten``."""
        for wire in self._watched:
            wire.hasten(seconds)

    @property
    def compression(self) -> bool:
        """May a handshake agree on compression?"""
        return bool(self._deflated)

    def adopt(self, sock: socket.socket, data: bytes, request: Request, *, compression: bool = False) -> None:
        """Make a session for a socket whose handshake is done, and of which ``data`` was read already."""
        wire = (self._deflated if compression else self._wires)[request.format]
        outbox = self.outbox(sock, data, wire, self._message_size_limit)
        session = self.session(outbox, request)
        if session is not None:
            outbox.start(session)

    def outbox(self, sock: socket.socket, data: bytes, wire: SocketWire, message_size_limit: int) -> SocketOutbox:
        """The outbox of such a socket."""
        parser = Parser(message_size_limit, compression=wire.compression)
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
