"""What one process asks of another about its connections, and the bytes in which it does.

An *order* is carried out on every connection it is for, wherever that is; other
questions want to be told something.  ``peers`` carries them there and their
answers back, ``ordering`` carries them out.
"""

from collections.abc import Sequence

import msgspec

from server.blocks import Record
from server.stream import Position


class Target(msgspec.Struct, frozen=True):
    """Which connections an order is for: those of ``user``, narrowed by client id or session id (PROTOCOL 15.2).

    The empty user is the anonymous user, not everybody.
    """

    user: str
    client: str = ""
    spared: Sequence[str] = ()
    session: str = ""


class DisconnectOrder(msgspec.Struct, frozen=True, tag="d"):
    """End the target's connections."""

    target: Target
    code: int
    reason: str


class SubscribeOrder(msgspec.Struct, frozen=True, tag="s"):
    """Subscribe the target's connections server-side."""

    target: Target
    channel: str
    info: bytes | None = None
    data: bytes | None = None
    expire_at: int = 0
    since: Position | None = None
    override: dict[str, bool] = {}


class UnsubscribeOrder(msgspec.Struct, frozen=True, tag="u"):
    """End the target's subscriptions of ``channel``, or of all channels if it is empty."""

    target: Target
    channel: str


class RefreshOrder(msgspec.Struct, frozen=True, tag="r"):
    """Move the expiry of the target's connections (0: never), or end them as expired."""

    target: Target
    expired: bool
    expire_at: int
    info: bytes | None = None


class ChannelsQuestion(msgspec.Struct, frozen=True, tag="c"):
    """Which channels are followed, whose names match ``pattern``, and by how many clients (PROTOCOL 15.2)."""

    pattern: str = ""


class ConnectionsQuestion(msgspec.Struct, frozen=True, tag="n"):
    """Which connections does the target have?  Answered by ``ConnectionsAnswer``."""

    target: Target


class Forget(msgspec.Struct, frozen=True, tag="f"):
    """Payloads of ``channel`` were erased from history: hold none in memory either."""

    channel: str


class Blocked(msgspec.Struct, frozen=True, tag="b"):
    """The blocks of a user were changed: these are all that hold now."""

    record: Record


class Emulated(msgspec.Struct, frozen=True, tag="e"):
    """Commands of a client whose stream another process holds (PROTOCOL 2.5)."""

    session: str
    data: bytes


class Connection(msgspec.Struct, frozen=True):
    """One connection, as its process describes it (PROTOCOL 15.2.20); ``connected_at`` in Unix seconds.

    ``channels`` are some of those that it is subscribed to, ``num_channels`` is how many these are.
    """

    client: str
    user: str
    transport: str
    protocol: str
    address: str
    connected_at: int
    num_channels: int = 0
    channels: Sequence[str] = ()
    app_name: str = ""
    app_version: str = ""


class ConnectionsAnswer(msgspec.Struct, frozen=True):
    """The connections that the target of a ``ConnectionsQuestion`` has in one process: how many, and some of them."""

    number: int
    connections: Sequence[Connection]


Order = DisconnectOrder | SubscribeOrder | UnsubscribeOrder | RefreshOrder
Question = Order | ChannelsQuestion | ConnectionsQuestion | Forget | Blocked | Emulated

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)


def encode(question: Question) -> bytes:
    """The bytes of a question, as ``decode`` reads them."""
    return _encoder.encode(question)


def decode(data: bytes) -> Question:
    """A question of another process; raises ``msgspec.DecodeError`` if that speaks otherwise."""
    return _decoder.decode(data)
