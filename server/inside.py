"""Subscribers without a socket: outboxes that end in this process.

A long-poll, a watcher of the console and the clients of the test kit are sent to like
anybody, and then look at the frames themselves.  What such outboxes share is here:
nothing is written, so nothing waits, and nothing is read.
"""

from collections.abc import Iterable, Iterator

import msgspec
from msgspec import UNSET, Raw, UnsetType

from server.errors import Disconnect
from server.outbox import Outbox, Wire
from server.protocol import JSON


class LineWire(Wire):
    """JSON, each message on a line of its own."""

    __slots__ = ()

    format = "json"
    codec = JSON

    def frame(self, message: bytes) -> bytes:
        """See ``Wire.frame``; messages have no raw newlines (PROTOCOL 2.3.6)."""
        return message + b"\n"

    def spread(self, outboxes: Iterable[Outbox], data: bytes) -> None:
        """See ``Wire.spread``."""
        for outbox in outboxes:
            outbox.send(data)


class InsideOutbox(Outbox):
    """Whoever makes a kind of it says what becomes of frames (``send``), and what of those that it keeps."""

    __slots__ = ()

    @property
    def waiting_bytes(self) -> int:
        """See ``Outbox.waiting_bytes``; nothing waits."""
        return 0

    def flush(self) -> None:
        """See ``Outbox.flush``; there is nothing to do."""

    async def drained(self) -> None:
        """See ``Outbox.drained``; nothing waits."""

    def close(self, disconnect: Disconnect) -> None:
        """See ``Outbox.close``; nobody is at the other end."""

    def pause_reading(self) -> None:
        """See ``Outbox.pause_reading``; nothing is read."""

    def resume_reading(self) -> None:
        """See ``Outbox.resume_reading``; nothing is read."""


class _Push(msgspec.Struct):
    pub: Raw | UnsetType = UNSET


class _Message(msgspec.Struct):
    push: _Push | UnsetType = UNSET


_message = msgspec.json.Decoder(_Message)


def publications(frames: bytes) -> Iterator[Raw]:
    """The publications among the frames of a ``LineWire``, as JSON (PROTOCOL 6.3)."""
    for line in frames.splitlines():
        message = _message.decode(line)
        if message.push is not UNSET and message.push.pub is not UNSET:
            yield message.push.pub
