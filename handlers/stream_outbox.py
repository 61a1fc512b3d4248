"""A streamed HTTP response as an ``Outbox``.

Tornado reads the request and writes the head of the response; then the socket is
taken from it, as from a WebSocket's handshake, and for the same reasons
(``outboxes``): nothing is awaited for a subscriber, and what waits for one is counted
and bounded, in no buffer but our own and a small one of the kernel's.

Two layers.  A *framing* makes of a message what the client reads: a line, a message
behind its length, an event.  A ``StreamWire`` puts each into a chunk of its own (RFC
9112 7.1), so that the client can tell the end from a cut; a client of HTTP/1.0, which
knows no chunks, gets the bytes as they are and reads until the end (RFC 9112 6.3).

After the request nothing more is expected of the client.  What it sends is read and
forgotten, so that its end is seen; a second request on the same connection is never
answered, which ``Connection: close`` has told it.

``open_stream`` is the way here.  Who needs another text than a framing makes (event
ids, say) gives ``StreamWire.chunk`` of it to ``StreamOutbox.send``, or a kind of
``StreamWire`` with a ``frame`` and a ``goodbye`` of its own.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import msgspec
import tornado.web
from tornado.iostream import StreamClosedError

from handlers.outboxes import BareOutbox, BareWire, Listener, Tls, take_socket
from server import errors
from server.protocol import Codec

KERNEL_BYTES = 128 * 1024
"""How much of what is not on its way yet the kernel holds for one stream, before it waits here and counts."""

LAST_CHUNK = b"0\r\n\r\n"

HEADERS = {
    "X-Accel-Buffering": "no",
    "Cache-Control": "private, no-cache, no-store, must-revalidate, max-age=0",
    "Pragma": "no-cache",
    "Connection": "close",
}
"""What every streamed response says of itself: nobody on the way may hold it back or keep it (PROTOCOL 2.5)."""


# --- framings: pure -----------------------------------------------------------
class Framing(msgspec.Struct, frozen=True):
    """How a client finds the messages in a stream of bytes.

    ``wrap`` makes of a message what is sent.  ``around`` says where the wrapped
    message begins and ends that a byte falls into, as ``BareWire.around``.
    ``prelude`` are the first bytes of a stream.
    """

    content_type: str
    wrap: Callable[[bytes], bytes]
    around: Callable[[bytes | bytearray, int], tuple[int, int]]
    prelude: bytes = b""


def _delimited_by(mark: bytes) -> Callable[[bytes | bytearray, int], tuple[int, int]]:
    def around(data: bytes | bytearray, at: int) -> tuple[int, int]:
        before = data.rfind(mark, 0, at)
        begin = 0 if before < 0 else before + len(mark)
        if begin == at:
            return at, at
        end = data.find(mark, max(begin, at - len(mark) + 1))
        return begin, len(data) if end < 0 else end + len(mark)

    return around


def _around_prefixed(data: bytes | bytearray, at: int) -> tuple[int, int]:
    begin = end = 0
    while end < at:
        begin = end
        size = shift = 0
        while True:
            byte = data[end]
            end += 1
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        end += size
    return (end, end) if end == at else (begin, end)


def around_chunk(data: bytes | bytearray, at: int) -> tuple[int, int]:
    """As ``BareWire.around``, for a run of whole chunks without extensions (RFC 9112 7.1)."""
    begin = end = 0
    while end < at:
        begin = end
        line = data.index(b"\r\n", begin)
        end = line + 2 + int(data[begin:line], 16) + 2
    return (end, end) if end == at else (begin, end)


LINES = Framing("application/json", lambda message: message + b"\n", _delimited_by(b"\n"))
"""JSON, a message a line (PROTOCOL 2.5)."""

LENGTHS = Framing("application/octet-stream", bytes, _around_prefixed)
"""Protobuf, each message behind its length: that is how the codec makes them."""

EVENTS = Framing(
    "text/event-stream; charset=utf-8",
    lambda message: b"data: %s\n\n" % message,
    _delimited_by(b"\n\n"),
    prelude=b"\r\n",
)
"""JSON, a message an event (HTML standard, 9.2 server-sent events)."""


# --- the connection -----------------------------------------------------------
class StreamWire(BareWire):
    """All streams of one kind; see ``BareWire``.

    ``chunked`` is false for clients of HTTP/1.0.
    """

    def __init__(
        self, framing: Framing, codec: Codec, *, chunked: bool, queue_max_size: int, stall_timeout_s: float
    ) -> None:
        super().__init__(codec, queue_max_size=queue_max_size, stall_timeout_s=stall_timeout_s)
        self.framing = framing
        self.chunked = chunked

    def chunk(self, data: bytes) -> bytes:
        """Some text of the response, at least one byte, as it goes on the socket."""
        return b"%x\r\n%s\r\n" % (len(data), data) if self.chunked else data

    def frame(self, message: bytes) -> bytes:
        """See ``Wire.frame``."""
        return self.chunk(self.framing.wrap(message))

    def goodbye(self, disconnect: errors.Disconnect) -> bytes:
        """The last words of the response, as they go on the socket: a ``disconnect`` push (PROTOCOL 5.8)."""
        return self.frame(self.codec.disconnect(disconnect))

    def around(self, data: bytes | bytearray, at: int) -> tuple[int, int]:
        """See ``BareWire.around``."""
        return around_chunk(data, at) if self.chunked else self.framing.around(data, at)


class StreamOutbox(BareOutbox):
    """One streamed response.

    ``paused`` says that the session wants no more commands; they come elsewhere,
    and ``on_resume`` tells whoever holds them when it does again.
    """

    __slots__ = ("_on_resume", "paused")

    wire: StreamWire

    def __init__(self, sock: socket.socket, wire: StreamWire) -> None:
        super().__init__(sock, wire)
        self.paused = False
        self._on_resume: Callable[[], None] | None = None

    def start(self, session: Listener) -> None:
        """Tell ``session`` when the client goes or does not read, unless it has closed already."""
        if self._sock.fileno() < 0:
            return
        self._session = session
        self.wire.arrivals.expect(self._fd, self)
        # The end may have come while Tornado was still reading, and TLS may hold it where the loop does not look.
        self.wire.loop.call_soon(self.readable)

    def on_resume(self, call: Callable[[], None]) -> None:
        """Call this each time when the session takes commands again."""
        self._on_resume = call

    def pause_reading(self) -> None:
        """See ``Outbox.pause_reading``; the socket is read all the same, since only its end is of interest."""
        self.paused = True

    def resume_reading(self) -> None:
        """See ``Outbox.resume_reading``."""
        if self.paused:
            self.paused = False
            if self._on_resume is not None:
                self.wire.loop.call_soon(self._on_resume)

    def readable(self) -> None:
        """See ``arrivals.Reader``."""
        if self._sock.fileno() < 0:
            return
        try:
            data = self._read()
        except OSError:
            data = b""
        if data == b"":
            self._lose()

    def _goodbye(self, disconnect: errors.Disconnect) -> bytes:
        return self.wire.goodbye(disconnect) + (LAST_CHUNK if self.wire.chunked else b"")

    def _goodbye_said(self) -> None:
        self._half_close()

    def _shut(self) -> None:
        self._on_resume = None
        super()._shut()


class TlsStreamOutbox(Tls, StreamOutbox):
    """A streamed response through TLS."""

    __slots__ = ()


# --- the way in ---------------------------------------------------------------
class Wires(NamedTuple):
    """The wires of one kind of stream."""

    chunked: StreamWire
    plain: StreamWire

    @classmethod
    def of(cls, framing: Framing, codec: Codec, *, queue_max_size: int, stall_timeout_s: float) -> "Wires":
        """Both; ``handlers.socket.Sockets.watch`` each."""
        return cls(
            *(
                StreamWire(
                    framing, codec, chunked=chunked, queue_max_size=queue_max_size, stall_timeout_s=stall_timeout_s
                )
                for chunked in (True, False)
            )
        )


async def open_stream(
    handler: tornado.web.RequestHandler, wires: Wires, *, unheard_s: float = 60.0
) -> StreamOutbox | None:
    """Answer 200 with the head of a stream, and take the socket from Tornado; ``None`` if the client is gone.

    The whole body of the request must have been read.  Headers that were set go
    out with ``HEADERS``.  The caller must give the outbox a session by ``start``,
    or close it.  A client whose machine or network has vanished is found out
    ``unheard_s`` after something was last sent to it.
    """
    chunked = handler.request.version == "HTTP/1.1"
    wire = wires.chunked if chunked else wires.plain
    handler.set_status(200)
    handler.set_header("Content-Type", wire.framing.content_type)
    for name, value in HEADERS.items():
        handler.set_header(name, value)
    # Tornado would promise an HTTP/1.0 client who asked for it to keep the connection, and name no length.
    handler.request.headers.pop("Connection", None)
    try:
        # It waits for what the client has not taken yet of former answers on this connection.
        async with asyncio.timeout(wire.stall_timeout_s):
            await handler.flush()
    except TimeoutError:
        handler.detach().close()
        return None
    except StreamClosedError:
        return None
    handler.ui.clear()  # refers to it; without this the request would live until the next collection of cycles
    taken = take_socket(handler.detach())
    if taken is None:
        return None
    sock, _ = taken
    _tune(sock, unheard_s)
    outbox = TlsStreamOutbox(sock, wire) if isinstance(sock, ssl.SSLSocket) else StreamOutbox(sock, wire)
    if wire.framing.prelude:
        outbox.send(wire.chunk(wire.framing.prelude))
    return outbox


def _tune(sock: socket.socket, unheard_s: float) -> None:
    """Small answers at once, little held by the kernel, and an end for who has vanished; where the system can."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    options = {"TCP_NODELAY": 1, "TCP_NOTSENT_LOWAT": KERNEL_BYTES, "TCP_USER_TIMEOUT": int(unheard_s * 1000)}
    for name, value in options.items():
        number = getattr(socket, name, None)
        if number is not None:
            with suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, number, value)
