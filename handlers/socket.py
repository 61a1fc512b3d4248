"""The WebSocket transport: Tornado's HTTP, then the bare socket.

Tornado listens, routes and reads the request; ``SocketHandler`` answers the
handshake.  From then on a connection is a socket, a frame parser and an outbox:
no coroutine, no stream, no handler.  The loop tells us when there is something to
read, whole messages go to the session, and frames are written with one system call
while the socket takes them.  Tried and dropped: Tornado's ``write_message`` costs
six times as much per delivery as what stands here, its IOStream with a frame
encoded once three times, a coroutine over the stream is level when writing and
twice as dear when reading; each of them holds 14 KB for an idle connection.

How a connection ends.  Each arrow is one plain function; nothing here awaits but
``drained``.

    OPEN      frames go out, messages go to the session
     | the session calls close()          -> CLOSING
     | the peer sends Close               -> ANSWERED   its code is echoed (RFC 6455 5.5.1)
     | the peer breaks RFC 6455           -> BROKEN     1002, 1007 or 1009 (RFC 6455 7.1.7)
     | backlog above its limit, or stuck  -> SLOW
     | the socket fails while writing     -> LOST
     | the socket ends while reading      -> CLOSED
    SLOW      the session is told in the next turn, and closes
    LOST      the session is told in the next turn, and the socket is closed
    CLOSING   our Close is on its way or out; the peer's Close, its end or a time limit closes the socket
    BROKEN    the same, but what comes can not be read any more, so we say by a half-close that this was all
    ANSWERED  the peer has said goodbye; our Close is the last thing to leave
    CLOSED    the socket is closed

After a Close of ours the socket stays open for reading, because closing it with
unread bytes sends a reset, and that makes the peer forget our Close and its code.
A connection that closes has left the session behind and is bounded in bytes and in
time: ``check_stalled`` ends what takes too long.
"""

import asyncio
import base64
import binascii
import ipaddress
import os
import re
import socket
import ssl
import struct
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from enum import Enum
from functools import lru_cache
from typing import ClassVar, Protocol, cast

from tornado.iostream import IOStream, StreamClosedError
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
from server import errors
from server.observe import event
from server.outbox import Outbox, Request, Wire

READ_BYTES = 64 * 1024
WRITE_BYTES = 64 * 1024
TLS_RECORD_BYTES = 16 * 1024
TAKEOVER_BYTES = 256 * 1024
LOW_WATER_BYTES = 16 * 1024
CLOSE_TIMEOUT_S = 5.0

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Session(Protocol):
    """What this transport wants of a session; nothing of it may wait."""

    def receive(self, message: bytes) -> None:
        """Take one WebSocket message."""

    def gone(self) -> None:
        """The peer is gone, said goodbye, or broke RFC 6455; called once, and never after ``Outbox.close``."""

    def slow(self) -> None:
        """The peer does not take what it is sent: leave the hub and close with ``errors.SLOW``."""

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
class State(Enum):
    """How far a connection is on its way; the module's docstring has the arrows."""

    OPEN = "open"
    SLOW = "slow"
    LOST = "lost"
    CLOSING = "closing"
    BROKEN = "broken"
    ANSWERED = "answered"
    CLOSED = "closed"


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


class Backlog:
    """What a socket has not taken: ``data`` begins with a frame, of which ``sent`` bytes or more are out.

    ``progress_at`` is the loop's time at which the socket last took something.
    ``waiters`` are told ``None`` when there is little left, or why there is no
    use in waiting.
    """

    __slots__ = ("data", "progress_at", "sent", "waiters")

    def __init__(self, data: bytes, sent: int, now: float) -> None:
        self.data = bytearray(data)
        self.sent = sent
        self.progress_at = now
        self.waiters: list[asyncio.Future[errors.Disconnect | None]] = []

    @property
    def left(self) -> int:
        """Bytes that wait."""
        return len(self.data) - self.sent

    def advance(self, count: int, now: float) -> None:
        """The socket has taken ``count`` bytes more."""
        self.sent += count
        self.progress_at = now
        if self.sent > WRITE_BYTES:
            begin, _ = frame_around(self.data, self.sent)
            del self.data[:begin]
            self.sent -= begin

    def cut(self, held: int) -> None:
        """Drop the frames of which nothing is out; ``held`` bytes more than ``sent`` count as out."""
        _, end = frame_around(self.data, self.sent + held)
        del self.data[end:]

    def wake(self, disconnect: errors.Disconnect | None) -> None:
        """Tell all waiters."""
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(disconnect)


class SocketWire(Wire):
    """All connections of one format: the fan-out, and what they do together.

    Sizes in bytes, times in seconds.  Must be made on the running loop.
    """

    def __init__(self, format: str, *, queue_max_size: int, stall_timeout_s: float) -> None:
        self.format = format
        self.queue_max_size = queue_max_size
        self.stall_timeout_s = stall_timeout_s
        self.loop = asyncio.get_running_loop()
        self.backlogged: set[SocketOutbox] = set()
        self.closing: dict[SocketOutbox, float] = {}
        self._encode = binary_frame if format == "protobuf" else text_frame
        self._dirty: list[SocketOutbox] = []

    def frame(self, message: bytes) -> bytes:
        """Text frames for JSON, binary ones for protobuf (PROTOCOL 2.3)."""
        return self._encode(message)

    def spread(self, outboxes: Iterable[Outbox], data: bytes) -> None:
        """See ``Wire.spread``; one system call for each socket that has nothing waiting."""
        write = os.write
        size = len(data)
        for outbox in cast("Iterable[SocketOutbox]", outboxes):
            fd = outbox._direct
            if fd < 0:
                outbox._put(data)
                continue
            try:
                sent = write(fd, data)
            except BlockingIOError:
                sent = 0
            except OSError:
                outbox._lose_soon()
                continue
            if sent != size:
                outbox._keep(data, sent)

    def check_stalled(self, now: float) -> None:
        """Find who took nothing for too long, and whose goodbye takes too long; call it once a second.

        ``now`` is the loop's time.  Only the connections concerned are looked at.
        """
        for outbox in [outbox for outbox in self.backlogged if now - outbox.progress_at >= self.stall_timeout_s]:
            outbox._too_slow()
        for outbox in [outbox for outbox, deadline in self.closing.items() if now >= deadline]:
            outbox._abort()

    def _mark(self, outbox: "SocketOutbox") -> None:
        """Let ``outbox`` flush at the end of this loop turn."""
        if not self._dirty:
            self.loop.call_soon(self._flush_dirty)
        self._dirty.append(outbox)

    def _flush_dirty(self) -> None:
        dirty, self._dirty = self._dirty, []
        for outbox in dirty:
            outbox.flush()


class SocketOutbox(Outbox):
    """One connection: its socket, its parser, and its outbox.

    ``_direct`` is the socket's number while frames may be written to it straight
    away: it is open, not TLS, and nothing waits.  Else it is -1.  That makes one
    comparison of the hot loop's every question.
    """

    __slots__ = (
        "_backlog",
        "_direct",
        "_fd",
        "_parser",
        "_pending",
        "_reading",
        "_session",
        "_sock",
        "_state",
        "wire",
    )

    wire: SocketWire
    _plain: ClassVar[bool] = True

    def __init__(self, sock: socket.socket, wire: SocketWire, parser: Parser) -> None:
        self.wire = wire
        self._sock = sock
        self._fd = sock.fileno()
        self._direct = self._fd if self._plain else -1
        self._parser = parser
        self._session: Session | None = None
        self._state = State.OPEN
        self._reading = Reading.OFF
        self._pending: list[bytes] | None = None
        self._backlog: Backlog | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._state.value}, fd={self._fd}, waiting_bytes={self.waiting_bytes})"

    def start(self, session: Session) -> None:
        """Bring what the client sends to ``session``, unless that has closed already."""
        if self._state in (State.OPEN, State.SLOW, State.LOST):
            self._session = session
        self.resume_reading()

    # --- the seam ---
    @property
    def waiting_bytes(self) -> int:
        """See ``Outbox.waiting_bytes``."""
        waiting = self._backlog.left if self._backlog is not None else 0
        return waiting + sum(map(len, self._pending)) if self._pending is not None else waiting

    @property
    def progress_at(self) -> float:
        """The loop's time at which the socket last took something; infinity if nothing waits."""
        return self._backlog.progress_at if self._backlog is not None else float("inf")

    def send(self, frame: bytes) -> None:
        """See ``Outbox.send``."""
        if self._pending is not None:
            self._pending.append(frame)
        elif self._state is State.OPEN:
            self._pending = [frame]
            self._direct = -1
            self.wire._mark(self)

    def flush(self) -> None:
        """See ``Outbox.flush``."""
        if self._pending is not None:
            self._put(b"")

    async def drained(self) -> None:
        """See ``Outbox.drained``."""
        self.flush()
        while self._state is State.OPEN and self._backlog is not None and self._backlog.left > LOW_WATER_BYTES:
            waiter = self.wire.loop.create_future()
            self._backlog.waiters.append(waiter)
            disconnect = await waiter
            if disconnect is not None:
                raise errors.Disconnected(disconnect, "while waiting for the socket")
        if self._state is not State.OPEN:
            slow = self._state is State.SLOW
            raise errors.Disconnected(errors.SLOW if slow else errors.CONNECTION_CLOSED, "socket is not open")

    def close(self, disconnect: errors.Disconnect) -> None:
        """See ``Outbox.close``; ``CONNECTION_CLOSED`` is never sent (PROTOCOL 2.3), the socket just closes."""
        self._session = None
        if disconnect.code == errors.CONNECTION_CLOSED.code:
            self._shut()
        elif self._state in (State.OPEN, State.SLOW, State.LOST):
            self._say_goodbye(State.CLOSING, disconnect.code, disconnect.reason)

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
    def _read(self) -> bytes | None:
        """Take what has come: ``b""`` at the end, ``None`` if there is nothing; raises ``OSError``."""
        try:
            return self._sock.recv(READ_BYTES)
        except BlockingIOError:
            return None

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
                self._say_goodbye(State.CLOSING, errors.SERVER_ERROR.code, errors.SERVER_ERROR.reason)
            self._tell_gone()

    def _peer_closed(self, close: Close) -> None:
        """Answer the peer's Close, or take it for the answer to ours (RFC 6455 5.5.1)."""
        if self._state is State.CLOSING:
            self._state = State.ANSWERED
            if self._backlog is None:
                self._goodbye_said()
        elif self._state in (State.OPEN, State.SLOW):
            self._say_goodbye(State.ANSWERED, close.code)
            self._tell_gone()

    def _peer_broke(self, violation: Violation) -> None:
        """Fail the connection (RFC 6455 7.1.7)."""
        if self._state is State.CLOSING:
            self._state = State.BROKEN
            if self._backlog is None:
                self._goodbye_said()
        elif self._state in (State.OPEN, State.SLOW):
            event("connection.violated", code=violation.code, reason=violation.reason)
            self._say_goodbye(State.BROKEN, violation.code, violation.reason)
            self._tell_gone()

    # --- writing ---
    def _write(self, data: bytes | memoryview) -> int:
        """Give bytes to the socket, say how many it took (0 if it is full); raises ``OSError``."""
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0

    def _held_bytes(self) -> int:
        """Bytes at the head of the backlog that must be written as they are, though they are not counted as sent."""
        return 0

    def _joined(self, data: bytes) -> bytes:
        """What is pending and ``data``, in one piece."""
        pending, self._pending = self._pending, None
        if pending is None:
            return data
        if data:
            pending.append(data)
        return pending[0] if len(pending) == 1 else b"".join(pending)

    def _put(self, data: bytes) -> None:
        """Write what is pending and ``data`` now, as far as the socket takes it."""
        if self._state is not State.OPEN:
            return
        try:
            self._push(self._joined(data))
        except OSError:
            self._lose_soon()
            return
        if self._backlog is None:
            self._direct = self._fd if self._plain else -1
        else:
            self._check_limit()

    def _push(self, data: bytes) -> None:
        """Write behind what waits, and let the rest wait; raises ``OSError``."""
        if self._backlog is not None:
            self._backlog.data += data
            return
        sent = self._write(data)
        if sent != len(data):
            self._start_backlog(data, sent)

    def _keep(self, data: bytes, sent: int) -> None:
        """Let the rest wait of what a fan-out could not write."""
        self._direct = -1
        self._start_backlog(data, sent)
        self._check_limit()

    def _start_backlog(self, data: bytes, sent: int) -> None:
        self._backlog = Backlog(data, sent, self.wire.loop.time())
        self.wire.backlogged.add(self)
        self.wire.loop.add_writer(self._fd, self._writable)

    def _end_backlog(self) -> None:
        self._backlog = None
        self.wire.backlogged.discard(self)
        self.wire.loop.remove_writer(self._fd)

    def _check_limit(self) -> None:
        if self._backlog is not None and self._backlog.left > self.wire.queue_max_size:
            self._too_slow()

    def _writable(self) -> None:
        """The socket takes bytes again."""
        backlog = self._backlog
        if backlog is None:
            return
        try:
            with memoryview(backlog.data) as view, view[backlog.sent : backlog.sent + WRITE_BYTES] as part:
                sent = self._write(part)
        except OSError:
            self._lose()
            return
        if not sent:
            return
        backlog.advance(sent, self.wire.loop.time())
        if backlog.left <= LOW_WATER_BYTES:
            backlog.wake(None)
        if backlog.left:
            return
        self._end_backlog()
        if self._state is not State.OPEN:
            self._goodbye_said()
        elif self._plain and self._pending is None:
            self._direct = self._fd

    # --- ending ---
    def _too_slow(self) -> None:
        """Give up on a client that does not read: drop what waits, tell the session in the next turn.

        What is left of a frame that is partly out stays, so that the Close behind it can
        be read.
        """
        if self._state is not State.OPEN or self._backlog is None:
            return
        self._state = State.SLOW
        self._pending = None
        self._backlog.cut(self._held_bytes())
        self._backlog.wake(errors.SLOW)
        self.wire.loop.call_soon(self._tell_slow)

    def _tell_slow(self) -> None:
        if self._state is not State.SLOW:
            return
        if self._session is not None:
            self._session.slow()
        self.close(errors.SLOW)

    def _lose_soon(self) -> None:
        """The socket failed while the caller could not be called back."""
        if self._state is State.CLOSED:
            return
        self._state = State.LOST
        self._direct = -1
        self._pending = None
        self.wire.loop.call_soon(self._lose)

    def _lose(self) -> None:
        """The socket has ended."""
        self._shut()
        self._tell_gone()

    def _tell_gone(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.gone()

    def _say_goodbye(self, state: State, code: int | None, reason: str = "") -> None:
        """Send our Close behind what is waiting, and go on in ``state``.

        A slow client gets no more time for what it is owed than for the Close itself.
        """
        slow = self._state is State.SLOW
        self._state = state
        self._direct = -1
        allowed_s = CLOSE_TIMEOUT_S if slow else max(CLOSE_TIMEOUT_S, self.wire.stall_timeout_s)
        self.wire.closing[self] = self.wire.loop.time() + allowed_s
        try:
            self._push(self._joined(close_frame(code, reason)))
        except OSError:
            self._lose_soon()
            return
        if self._backlog is None:
            self._goodbye_said()
        else:
            self._backlog.wake(errors.CONNECTION_CLOSED)
        self.resume_reading()

    def _goodbye_said(self) -> None:
        """Our Close is out: close the socket if the peer's is in, else wait for it, but not forever."""
        if self._state is State.ANSWERED:
            self._end_writing()
            self._shut()
        elif self._state in (State.CLOSING, State.BROKEN):
            self.wire.closing[self] = self.wire.loop.time() + CLOSE_TIMEOUT_S
            if self._state is State.BROKEN:
                self._end_writing()
                with suppress(OSError):
                    self._sock.shutdown(socket.SHUT_WR)

    def _end_writing(self) -> None:
        """Say that nothing follows, below the frames."""

    def _abort(self) -> None:
        """Time is up.  What the peer did not take is forgotten, by the kernel too."""
        if self._backlog is not None:
            with suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._shut()

    def _shut(self) -> None:
        """Close the socket; the second call does nothing."""
        if self._state is State.CLOSED:
            return
        self._state = State.CLOSED
        self._direct = -1
        self._pending = None
        self._reading = Reading.OFF
        self.wire.loop.remove_reader(self._fd)
        self.wire.closing.pop(self, None)
        if self._backlog is not None:
            self._backlog.wake(errors.CONNECTION_CLOSED)
            self._end_backlog()
        self._sock.close()


class TlsOutbox(SocketOutbox):
    """A connection through TLS: the same, but bytes go through OpenSSL, record by record.

    OpenSSL may hold a record that the socket has half taken; the same bytes must
    then be offered again, though they do not count as sent.
    """

    __slots__ = ("_held",)

    _plain = False
    _sock: ssl.SSLSocket

    def __init__(self, sock: ssl.SSLSocket, wire: SocketWire, parser: Parser) -> None:
        super().__init__(sock, wire, parser)
        self._held = 0

    def _read(self) -> bytes | None:
        try:
            return self._sock.recv(READ_BYTES)
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLWantWriteError:
            # The peer asked for new keys, and the answer finds the socket full.
            self.wire.loop.add_writer(self._fd, self._writable)
            return None

    def _resumed(self) -> None:
        super()._resumed()
        # The loop does not see what OpenSSL has decrypted already.  Our reads take records
        # whole and leave nothing; the last one before the takeover was Tornado's.
        if self._reading is Reading.ON:
            self._readable()

    def _write(self, data: bytes | memoryview) -> int:
        sent = 0
        self._held = 0
        with memoryview(data) as view:
            while sent < len(view):
                with view[sent : sent + TLS_RECORD_BYTES] as record:
                    try:
                        sent += self._sock.send(record)
                    except ssl.SSLWantWriteError:
                        self._held = len(record)
                        break
        return sent

    def _held_bytes(self) -> int:
        return self._held

    def _writable(self) -> None:
        if self._backlog is None:
            self.wire.loop.remove_writer(self._fd)
            self._readable()
        else:
            super()._writable()

    def _end_writing(self) -> None:
        with suppress(OSError, ValueError):
            self._sock.unwrap()


# --- the way in ---------------------------------------------------------------
class Sockets:
    """The WebSocket connections of this process, and what their handshake must know.

    ``connect`` makes their sessions.  ``queue_max_size`` and
    ``message_size_limit`` are bytes, ``outbox_stall_timeout_s`` seconds
    (PROTOCOL 18).  ``user_id_http_header`` is a header's name that sessions want
    to see, "" for none.  ``refusal`` names the setting that keeps the next client
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
        trusted_proxies: Sequence[Network] = (),
        refusal: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.allowed_origins = tuple(allowed_origins)
        self.trusted_proxies = tuple(trusted_proxies)
        self.wanted_headers = tuple(name.lower() for name in ("user-agent", user_id_http_header) if name)
        self.refusal = refusal
        self._connect = connect
        self._message_size_limit = message_size_limit
        self._wires = {
            format: SocketWire(format, queue_max_size=queue_max_size, stall_timeout_s=outbox_stall_timeout_s)
            for format in SUBPROTOCOLS.values()
        }

    @property
    def closing(self) -> int:
        """How many connections have not finished their goodbye."""
        return sum(len(wire.closing) for wire in self._wires.values())

    def check_stalled(self, now: float) -> None:
        """See ``SocketWire.check_stalled``."""
        for wire in self._wires.values():
            wire.check_stalled(now)

    def adopt(self, sock: socket.socket, data: bytes, request: Request) -> None:
        """Make a session for a socket whose handshake is done, and of which ``data`` was read already."""
        parser = Parser(self._message_size_limit)
        if data:
            parser.feed(data)
        wire = self._wires[request.format]
        outbox = TlsOutbox(sock, wire, parser) if isinstance(sock, ssl.SSLSocket) else SocketOutbox(sock, wire, parser)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            with suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            session = self._connect(outbox, request)
        except Exception as fault:
            event("task.failed", task="session", fault=fault)
            outbox.close(errors.SERVER_ERROR)
        else:
            outbox.start(session)


def take_socket(stream: IOStream) -> tuple[socket.socket, bytes] | None:
    """Part a socket from Tornado's stream, with what that has read already; ``None`` if it is gone.

    The stream must be forgotten afterwards: it still believes that it owns the socket.
    """
    sock = stream.socket
    reading = cast("asyncio.Future[bytes]", stream.read_bytes(TAKEOVER_BYTES, partial=True))
    if not reading.done():
        stream.io_loop.remove_handler(sock)
        return sock, b""
    try:
        data = reading.result()
    except StreamClosedError:
        return None
    stream.io_loop.remove_handler(sock)
    return sock, data


class SocketHandler(JsonHandler):
    """Answers the opening handshake, and is forgotten (PROTOCOL 2.2, 2.3; RFC 6455 4.2)."""

    def initialize(self, sockets: Sockets) -> None:
        """Tornado hands over what the URL table gave."""
        self.sockets = sockets

    async def get(self) -> None:
        """Shake hands and adopt the socket, or answer 400, 403, 426 or 503 with the reason."""
        headers = self.request.headers
        fault = handshake_fault(
            self.request.version,
            headers.get("Upgrade", ""),
            headers.get("Connection", ""),
            headers.get("Sec-WebSocket-Key", ""),
        )
        if fault is not None:
            self._refuse(400, fault)
            return
        if headers.get("Sec-WebSocket-Version") != "13":
            self.set_header("Sec-WebSocket-Version", "13")  # RFC 6455 4.4
            self._refuse(426, "expected Sec-WebSocket-Version 13")
            return
        address = client_address(
            self.request.remote_ip or "", headers.get("X-Forwarded-For", ""), self.sockets.trusted_proxies
        )
        origin = headers.get("Origin")
        if not origin_allowed(origin, self.sockets.allowed_origins):
            event("connection.refused", why="client.allowed_origins", origin=origin, address=address)
            self._refuse(403, "this origin may not connect")
            return
        refusal = self.sockets.refusal()
        if refusal is not None:
            event("connection.refused", why=refusal, origin=origin, address=address)
            self._refuse(503, "too many connections, try again later")
            return
        format, subprotocol = negotiate(
            headers.get("Sec-WebSocket-Protocol", ""),
            self.get_query_argument("format", ""),
            self.get_query_argument("cf_protocol", ""),
        )
        request = Request(
            transport="websocket",
            format=format,
            remote_addr=address,
            headers={name: headers[name] for name in self.sockets.wanted_headers if name in headers},
            native_pings=self.get_query_argument("cf_ws_frame_ping_pong", "") == "true",
        )
        self.set_status(101)
        self.clear_header("Content-Type")
        self.set_header("Upgrade", "websocket")
        self.set_header("Connection", "Upgrade")
        self.set_header("Sec-WebSocket-Accept", WebSocketProtocol13.compute_accept_value(headers["Sec-WebSocket-Key"]))
        if subprotocol is not None:
            self.set_header("Sec-WebSocket-Protocol", subprotocol)
        try:
            await self.flush()
        except StreamClosedError:
            return
        self.ui.clear()  # refers to us; without it the request would live until the next collection of cycles
        taken = take_socket(self.detach())
        if taken is not None:
            self.sockets.adopt(*taken, request)

    def _refuse(self, status: int, why: str) -> None:
        self.answer({"error": {"code": status, "message": why}}, status)
