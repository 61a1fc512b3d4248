"""Bare sockets: what a connection is once Tornado has let go of it.

A WebSocket after its handshake and a streamed HTTP response after its head are
the same thing on their way out: a socket, and the bytes that it has not taken.
Here is that half, for both: frames are written with one system call while the
socket takes them, what leaves in one loop turn leaves joined, what waits is bounded
in bytes, and who takes nothing for too long is cut off.  What comes in, what a frame
is, and how one says goodbye is for the kinds to know (``socket``, ``stream_outbox``).

What every kind shares of a connection's end.  Each arrow is one plain function;
nothing here awaits but ``drained``.

    OPEN     frames go out
     | the session calls close()          -> CLOSING
     | backlog above its limit, or stuck  -> SLOW
     | the socket fails while writing     -> LOST
     | the socket ends while reading      -> CLOSED
    SLOW     the session is told in the next turn, and closes
    LOST     the session is told in the next turn, and the socket is closed
    CLOSING  our goodbye is on its way or out; the peer's end or a time limit closes the socket
    CLOSED   the socket is closed

After our goodbye the socket stays open for reading, because closing it with unread
bytes sends a reset, and that makes the peer forget what we said last.  A connection
that closes has left the session behind and is bounded in bytes and in time:
``check_stalled`` ends what takes too long.
"""

import asyncio
import socket
import ssl
import struct
from abc import abstractmethod
from collections.abc import Iterable
from contextlib import suppress
from enum import Enum
from typing import ClassVar, Protocol, cast

from tornado.iostream import IOStream, StreamClosedError

from handlers.arrivals import Arrivals
from server import errors
from server.outbox import Outbox, Wire
from server.protocol import Codec

READ_BYTES = 64 * 1024
WRITE_BYTES = 64 * 1024
TLS_RECORD_BYTES = 16 * 1024
TAKEOVER_BYTES = 256 * 1024
LOW_WATER_BYTES = 16 * 1024
CLOSE_TIMEOUT_S = 5.0


class Listener(Protocol):
    """What an outbox tells its session of the peer; nothing of it may wait."""

    def gone(self) -> None:
        """The peer is gone, or said goodbye; called once, and never after ``Outbox.close``."""

    def slow(self) -> None:
        """The peer does not take what it is sent: leave the hub and close with ``errors.SLOW``."""


class State(Enum):
    """How far a connection is on its way; the module's docstring has the arrows.

    ``BROKEN`` and ``ANSWERED`` are a WebSocket's.
    """

    OPEN = "open"
    SLOW = "slow"
    LOST = "lost"
    CLOSING = "closing"
    BROKEN = "broken"
    ANSWERED = "answered"
    CLOSED = "closed"


OPEN = State.OPEN
"""Asked for with each frame, and an Enum takes six times as long to look into as a module (Python 3.11)."""


class Backlog:
    """What a socket has not taken: ``data`` begins with a frame, of which ``sent`` bytes or more are out.

    ``progress_at`` is the loop's time at which the socket last took something.
    ``waiters`` are told ``None`` when there is little left, or why there is no
    use in waiting.
    """

    __slots__ = ("_wire", "data", "progress_at", "sent", "waiters")

    def __init__(self, wire: "BareWire", data: bytes, sent: int) -> None:
        self._wire = wire
        self.data = bytearray(data)
        self.sent = sent
        self.progress_at = wire.loop.time()
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
            begin, _ = self._wire.around(self.data, self.sent)
            del self.data[:begin]
            self.sent -= begin

    def cut(self, held: int) -> None:
        """Drop the frames of which nothing is out; ``held`` bytes more than ``sent`` count as out."""
        _, end = self._wire.around(self.data, self.sent + held)
        del self.data[end:]

    def wake(self, disconnect: errors.Disconnect | None) -> None:
        """Tell all waiters."""
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(disconnect)


class BareWire(Wire):
    """All connections of one kind: the fan-out, and what they do together.

    Sizes in bytes, times in seconds.  Must be made on the running loop.
    """

    def __init__(self, codec: Codec, *, queue_max_size: int, stall_timeout_s: float) -> None:
        self.format = codec.format
        self.codec = codec
        self.queue_max_size = queue_max_size
        self.stall_timeout_s = stall_timeout_s
        self.loop = asyncio.get_running_loop()
        self.arrivals = Arrivals()
        self.backlogged: set[BareOutbox] = set()
        self.closing: dict[BareOutbox, float] = {}
        self.goodbye_timeout_s = CLOSE_TIMEOUT_S
        """How long the peer may take over our goodbye, once that is out."""
        self.owed_timeout_s = max(CLOSE_TIMEOUT_S, stall_timeout_s)
        """How long it may take over what stands before the goodbye."""
        self._dirty: list[BareOutbox] = []

    @abstractmethod
    def around(self, data: bytes | bytearray, at: int) -> tuple[int, int]:
        """Where the frame begins and ends that byte ``at`` of ``data`` falls into; both are ``at`` between two frames.

        ``data`` begins with a frame; ``at`` is not beyond its end.
        """

    def spread(self, outboxes: Iterable[Outbox], data: bytes) -> None:
        """See ``Wire.spread``; one system call for each socket that has nothing waiting.

        ``send`` and not ``os.write``, which has the kernel look for a file first: 0.15 µs of 5.
        """
        size = len(data)
        for outbox in cast("Iterable[BareOutbox]", outboxes):
            sock = outbox._direct
            if sock is None:
                outbox._put(data)
                continue
            try:
                sent = sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                outbox._lose_soon()
                continue
            if sent != size:
                outbox._keep(data, sent)

    def post(self, outboxes: Iterable[Outbox], data: bytes) -> None:
        """See ``Wire.post``; ``BareOutbox.send`` without its calls, 0.1 µs each."""
        for outbox in cast("Iterable[BareOutbox]", outboxes):
            if outbox._pending is None and outbox._state is OPEN:
                outbox._pending = data
                outbox._direct = None
                if not self._dirty:
                    self.loop.call_soon(self._flush_dirty)
                self._dirty.append(outbox)
            else:
                outbox.send(data)

    def check_stalled(self, now: float) -> None:
        """Find who took nothing for too long, and whose goodbye takes too long; call it once a second.

        ``now`` is the loop's time.  Only the connections concerned are looked at.
        """
        for outbox in [outbox for outbox in self.backlogged if now - outbox.progress_at >= self.stall_timeout_s]:
            outbox._too_slow()
        for outbox in [outbox for outbox, deadline in self.closing.items() if now >= deadline]:
            outbox._abort()

    def hasten(self, seconds: float) -> None:
        """From now on no goodbye takes longer than so many seconds, what is owed before it included."""
        self.goodbye_timeout_s = min(self.goodbye_timeout_s, seconds)
        self.owed_timeout_s = min(self.owed_timeout_s, seconds)

    def _mark(self, outbox: "BareOutbox") -> None:
        """Let ``outbox`` flush at the end of this loop turn."""
        if not self._dirty:
            self.loop.call_soon(self._flush_dirty)
        self._dirty.append(outbox)

    def _flush_dirty(self) -> None:
        """End the loop turn: what each outbox was sent leaves, for most of them in the one system call it takes.

        This is ``flush`` without its five calls: 0.45 µs of the 7.5 of a delivery in a room of five.
        """
        dirty, self._dirty = self._dirty, []
        for outbox in dirty:
            pending = outbox._pending
            if pending is None:
                continue
            if outbox._backlog is not None or not outbox._plain:
                outbox.flush()
                continue
            outbox._pending = None  # what is pending is pending while the state is ``OPEN`` only
            data = b"".join(pending) if isinstance(pending, list) else pending
            try:
                sent = outbox._sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                outbox._lose_soon()
                continue
            if sent == len(data):
                outbox._direct = outbox._sock
            else:
                outbox._keep(data, sent)


class BareOutbox(Outbox):
    """One connection: its socket, and what waits for it.

    ``_direct`` is the socket while frames may be written to it straight away: it is
    open, not TLS, and nothing waits.  Else it is ``None``.  That makes one comparison of
    the hot loop's every question.
    """

    __slots__ = (
        "_backlog",
        "_direct",
        "_fd",
        "_held",
        "_pending",
        "_session",
        "_sock",
        "_state",
        "wire",
    )

    wire: BareWire
    _plain: ClassVar[bool] = True

    def __init__(self, sock: socket.socket, wire: BareWire) -> None:
        self.wire = wire
        self._sock = sock
        self._fd = sock.fileno()
        self._direct: socket.socket | None = sock if self._plain else None
        self._held = 0
        """Bytes at the head of the backlog that must be written as they are, though they are not counted as sent."""
        self._session: Listener | None = None
        self._state = State.OPEN
        self._pending: bytes | list[bytes] | None = None
        """What was sent in this turn; one frame, which it mostly is, in no list of its own."""
        self._backlog: Backlog | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._state.value}, fd={self._fd}, waiting_bytes={self.waiting_bytes})"

    # --- the seam ---
    @property
    def waiting_bytes(self) -> int:
        """See ``Outbox.waiting_bytes``."""
        waiting = self._backlog.left if self._backlog is not None else 0
        pending = self._pending
        if pending is None:
            return waiting
        return waiting + (sum(map(len, pending)) if isinstance(pending, list) else len(pending))

    @property
    def progress_at(self) -> float:
        """The loop's time at which the socket last took something; infinity if nothing waits."""
        return self._backlog.progress_at if self._backlog is not None else float("inf")

    def send(self, frame: bytes) -> None:
        """See ``Outbox.send``."""
        pending = self._pending
        if pending is None:
            if self._state is OPEN:
                self._pending = frame
                self._direct = None
                self.wire._mark(self)
        elif isinstance(pending, list):
            pending.append(frame)
        else:
            self._pending = [pending, frame]

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
            self._say_goodbye(State.CLOSING, self._goodbye(disconnect))

    # --- what the kinds know ---
    @abstractmethod
    def _goodbye(self, disconnect: errors.Disconnect) -> bytes:
        """The last bytes of a connection that ends with this code."""

    @abstractmethod
    def readable(self) -> None:
        """See ``arrivals.Reader``."""

    @abstractmethod
    def _goodbye_said(self) -> None:
        """Our goodbye is out: close the socket, or wait for the peer's end, but not forever."""

    def _read_on(self) -> None:
        """Our goodbye is on its way: read from now on, whether or not anybody wants it."""

    # --- reading ---
    def _read(self) -> bytes | None:
        """Take what has come: ``b""`` at the end, ``None`` if there is nothing; raises ``OSError``."""
        try:
            return self._sock.recv(READ_BYTES)
        except BlockingIOError:
            return None

    # --- writing ---
    def _write(self, data: bytes | memoryview) -> int:
        """Give bytes to the socket, say how many it took (0 if it is full); raises ``OSError``."""
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0

    def _joined(self, data: bytes) -> bytes:
        """What is pending and ``data``, in one piece."""
        pending, self._pending = self._pending, None
        if pending is None:
            return data
        if not isinstance(pending, list):
            return pending + data
        pending.append(data)
        return b"".join(pending)

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
            self._direct = self._sock if self._plain else None
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
        self._direct = None
        self._start_backlog(data, sent)
        self._check_limit()

    def _start_backlog(self, data: bytes, sent: int) -> None:
        self._backlog = Backlog(self.wire, data, sent)
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
            self._direct = self._sock

    # --- ending ---
    def _too_slow(self) -> None:
        """Give up on a client that does not read: drop what waits, tell the session in the next turn.

        What is left of a frame that is partly out stays, so that the goodbye behind it can
        be read.
        """
        if self._state is not State.OPEN or self._backlog is None:
            return
        self._state = State.SLOW
        self._pending = None
        self._backlog.cut(self._held)
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
        self._direct = None
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

    def _say_goodbye(self, state: State, goodbye: bytes) -> None:
        """Send our goodbye behind what is waiting, and go on in ``state``.

        A slow client gets no more time for what it is owed than for the goodbye itself.
        """
        slow = self._state is State.SLOW
        self._state = state
        self._direct = None
        allowed_s = self.wire.goodbye_timeout_s if slow else self.wire.owed_timeout_s
        self.wire.closing[self] = self.wire.loop.time() + allowed_s
        try:
            self._push(self._joined(goodbye))
        except OSError:
            self._lose_soon()
            return
        if self._backlog is None:
            self._goodbye_said()
        else:
            self._backlog.wake(errors.CONNECTION_CLOSED)
        self._read_on()

    def _half_close(self) -> None:
        """Say by the socket itself that this was all, and give the peer a moment to take it."""
        self.wire.closing[self] = self.wire.loop.time() + self.wire.goodbye_timeout_s
        self._end_writing()
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def _end_writing(self) -> None:
        """Say that nothing follows, between the frames and the socket: TLS has such a thing."""

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
        self._direct = None
        self._pending = None
        self.wire.arrivals.ignore(self._fd)
        self.wire.closing.pop(self, None)
        if self._backlog is not None:
            self._backlog.wake(errors.CONNECTION_CLOSED)
            self._end_backlog()
        self._sock.close()


class Tls(BareOutbox):
    """A connection through TLS, mixed into a kind: the same, but bytes go through OpenSSL, record by record.

    OpenSSL may hold a record that the socket has half taken; the same bytes must
    then be offered again, though they do not count as sent.
    """

    __slots__ = ()

    _plain = False
    _sock: ssl.SSLSocket

    def _read(self) -> bytes | None:
        try:
            return self._sock.recv(READ_BYTES)
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLWantWriteError:
            # The peer asked for new keys, and the answer finds the socket full.
            self.wire.loop.add_writer(self._fd, self._writable)
            return None

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

    def _writable(self) -> None:
        if self._backlog is None:
            self.wire.loop.remove_writer(self._fd)
            self.readable()
        else:
            super()._writable()

    def _shut(self) -> None:
        if self._state is not State.CLOSED:
            self.wire.loop.remove_writer(self._fd)  # it may wait for room to answer a change of keys
        super()._shut()

    def _end_writing(self) -> None:
        with suppress(OSError, ValueError):
            self._sock.unwrap()


# --- out of Tornado's hands --------------------------------------------------
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
