"""A channel's stream as values: where one stands in it, and what comes next.

Here is the arithmetic of the third promise (a subscription delivers every
publication once and in order, or says that it cannot), free of any waiting:
``Cursor.judge`` decides about one publication, ``catch_up`` about one page of
history.  Pure: no clock, no randomness, no ``async``.  PROTOCOL 11.
"""

from collections.abc import Sequence
from enum import Enum

import msgspec

PAGE_PUBLICATIONS = 100
PAGE_BYTES = 128 * 1024
"""How much of a stream is read, and replied with, at a time."""


class Position(msgspec.Struct, frozen=True):
    """A place in a stream: everything up to ``offset`` (1, 2, 3 ...; 0 is before the first) under ``epoch``.

    The epoch ``""`` stands for "nobody has published yet", or, from a client,
    for "unknown".
    """

    offset: int = 0
    epoch: str = ""


class ClientInfo(msgspec.Struct, frozen=True):
    """What others see of a client (PROTOCOL 6.2).

    ``conn_info`` and ``chan_info`` are payload bytes (JSON text, or opaque for
    Protobuf clients), or ``None`` where there is none.
    """

    user: str
    client: str
    conn_info: bytes | None = None
    chan_info: bytes | None = None


class Publication(msgspec.Struct, frozen=True):
    """One message in a channel (PROTOCOL 6.3).

    ``data`` are the payload bytes exactly as published, less raw newlines.
    ``offset`` is 0 in a passing channel, and ``time_ms`` (Unix time, of the
    server that stored it) 0 as well.  ``delta`` is the publisher's wish that it be
    sent as a patch where it can be; it goes with the announcement and is not stored
    (PROTOCOL 12).
    """

    data: bytes
    offset: int = 0
    time_ms: int = 0
    info: ClientInfo | None = None
    tags: dict[str, str] | None = None
    delta: bool = False

    @property
    def weight(self) -> int:
        """Bytes that this publication is counted with wherever bytes are bounded."""
        return weight_of(self.data, self.info, self.tags)


def weight_of(data: bytes, info: ClientInfo | None, tags: dict[str, str] | None) -> int:
    """About how many bytes a publication takes on the wire and in memory."""
    weight = len(data) + 64
    if info is not None:
        weight += len(info.conn_info or b"") + len(info.chan_info or b"") + 64
    if tags:
        weight += sum(len(name) + len(value) for name, value in tags.items()) + 64
    return weight


class Page(msgspec.Struct, frozen=True):
    """One consistent look at a channel's history.

    ``publications`` ascend without a hole (or descend, for a reverse read);
    ``top`` is the newest position at the moment of the read; ``floor`` is the
    highest offset that is known to be gone, so that a cursor below it has lost
    something (0: nothing is gone).
    """

    publications: Sequence[Publication]
    top: Position
    floor: int = 0


class Retention(msgspec.Struct, frozen=True):
    """How long a kept channel remembers; ``-1`` means no limit.

    ``size`` publications, each for ``ttl_ms``; ``meta_ttl_ms`` after its last
    commit an empty channel forgets its epoch and top.
    """

    size: int
    ttl_ms: int
    meta_ttl_ms: int


class Verdict(Enum):
    """What a cursor says of one publication."""

    NEXT = "next"
    SEEN = "seen"
    HOLE = "hole"
    FOREIGN = "foreign"


class Cursor:
    """A subscription's position, or that of all live subscriptions of a channel in this process.

    It moves only by ``advance``, one publication at a time; PROTOCOL 11.2.
    """

    __slots__ = ("epoch", "offset")

    def __init__(self, position: Position) -> None:
        self.offset = position.offset
        self.epoch = position.epoch

    def __repr__(self) -> str:
        return f"Cursor({self.offset}, {self.epoch!r})"

    @property
    def position(self) -> Position:
        """The position as a value."""
        return Position(self.offset, self.epoch)

    def judge(self, offset: int, epoch: str) -> Verdict:
        """Say whether the publication ``offset`` of ``epoch`` may be delivered now.

        An empty epoch of the cursor ("nobody had published") agrees with any.
        """
        if epoch != self.epoch and self.epoch:
            return Verdict.FOREIGN
        if offset == self.offset + 1:
            return Verdict.NEXT
        return Verdict.SEEN if offset <= self.offset else Verdict.HOLE

    def advance(self, offset: int, epoch: str) -> None:
        """Move on to ``offset``, which ``judge`` must have called ``NEXT``."""
        self.offset = offset
        self.epoch = epoch


class Catch(msgspec.Struct, frozen=True):
    """What a page of history means for somebody who stands at a position.

    ``recovered`` is false only when history itself is gone: another epoch, a
    position below the floor, or one beyond the top.  ``publications`` are then
    empty and ``position`` is the top; else ``position`` is the asked one (with
    the epoch learned) and the publications follow it without a hole.
    """

    recovered: bool
    position: Position
    publications: Sequence[Publication] = ()


def catch_up(since: Position, page: Page) -> Catch:
    """Join ``since`` and a page that was read after it (PROTOCOL 11.3).

    The page may begin earlier than ``since`` (reads are shared), never later
    than the first stored publication after it.
    """
    top = page.top
    if since.epoch and since.epoch != top.epoch:
        return Catch(False, top)
    if since.offset < page.floor or since.offset > top.offset:
        return Catch(False, top)
    fresh = page.publications
    if fresh and fresh[0].offset <= since.offset:
        fresh = [publication for publication in fresh if publication.offset > since.offset]
    return Catch(True, Position(since.offset, top.epoch), fresh)
