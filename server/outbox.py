"""Outbox: the seam between a session and the socket that carries its frames.

``handlers/`` brings the kinds; the hub and the sessions know only this.  What
every kind promises:

* Frames leave whole and in the order in which they were given, whichever of
  ``send`` and ``spread`` they were given to.
* Nothing here calls the session back while the caller is still on the stack: a
  lost or too slow socket is reported in a later turn of the loop.  So a fan-out
  may run over the hub's own collections.
* What waits is bounded in bytes.  A client that does not take it is cut off with
  3008 (PROTOCOL 7.2); frames are never silently skipped.
* Once ``close`` was called or the socket was lost, frames are dropped without a
  word: their session is on its way out.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import msgspec

from server.errors import Disconnect
from server.protocol import Codec


class Request(msgspec.Struct, frozen=True):
    """How a client came here, as much of it as a session may want to know.

    ``format`` is ``"json"`` or ``"protobuf"``; ``headers`` holds the wanted ones
    only, by lower-case name; with ``native_pings`` the client asked for pings of
    the transport instead of PROTOCOL 2.4's.  ``secret`` is a session id, where the
    transport has such a thing: whoever knows it may speak for the client.
    """

    transport: str
    format: str
    remote_addr: str
    headers: Mapping[str, str]
    native_pings: bool = False
    secret: str = ""


class Wire(ABC):
    """One kind of transport in one format, shared by all its connections."""

    __slots__ = ()

    format: str
    """``"json"`` or ``"protobuf"``."""

    codec: Codec
    """What its messages are made with."""

    @abstractmethod
    def frame(self, message: bytes) -> bytes:
        """Give one encoded reply or push the form in which it goes on the socket."""

    @abstractmethod
    def spread(self, outboxes: "Iterable[Outbox]", data: bytes) -> None:
        """Write ``data``, one or more whole frames, to every outbox now.

        The outboxes must be of this wire.  Never raises, never waits, never
        calls back.  What an outbox was sent before goes out before ``data``.
        """

    def post(self, outboxes: "Iterable[Outbox]", data: bytes) -> None:
        """As ``Outbox.send`` of each of them, which must be of this wire."""
        for outbox in outboxes:
            outbox.send(data)


class Outbox(ABC):
    """The frames of one session that wait for its socket."""

    __slots__ = ()

    wire: Wire

    @property
    @abstractmethod
    def waiting_bytes(self) -> int:
        """Bytes that the socket has not taken yet."""

    @abstractmethod
    def send(self, frame: bytes) -> None:
        """Let whole frames leave at the end of this loop turn, joined with what else is sent in it."""

    @abstractmethod
    def flush(self) -> None:
        """Let what was sent leave now."""

    @abstractmethod
    async def drained(self) -> None:
        """Flush, and return when (nearly) nothing waits; at once if that is so already.

        Raises ``errors.Disconnected`` with ``SLOW`` when the socket was too slow
        or took nothing for ``outbox_stall_timeout``, and with
        ``CONNECTION_CLOSED`` when it is gone or was closed.
        """

    @abstractmethod
    def close(self, disconnect: Disconnect) -> None:
        """Say goodbye with this code after what is waiting; the second call does nothing.

        The session must have left the hub before.  It hears nothing of this
        connection any more.
        """

    @abstractmethod
    def pause_reading(self) -> None:
        """Take no more messages from the client until ``resume_reading``."""

    @abstractmethod
    def resume_reading(self) -> None:
        """Take messages from the client again, in a later turn of the loop."""

    def ping_frame(self) -> bytes:
        """The transport's own ping, to be sent where ``Request.native_pings`` was asked for (PROTOCOL 2.3).

        Raises ``NotImplementedError`` where the transport has none; such a
        transport never sets ``native_pings``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no native pings, expected Request.native_pings=False")
