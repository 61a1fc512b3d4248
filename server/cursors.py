"""Cursors as text: in a query, in an entity tag, and in the ids of an event stream.

A position is written ``EPOCH:OFFSET``, on every path and for every transport.  An
event stream of several channels has one id for all of them, since a browser sends
only the last id back: each position behind a mark of its channel, joined by
commas.  Names would not fit (32 of 255 bytes are 8 KB in a header that proxies cut
at 4), so a mark is a hash: it need not be read, only recognized.

Pure.  PROTOCOL 17.1, 17.3.
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from server.protocol import MAX_OFFSET
from server.stream import Position

STREAM_CHANNELS = 32
"""Channels of one event stream: so many cursors are less than 2 KB."""

ID_BYTES = 4096

_cursor = re.compile(r"([0-9A-Za-z_-]{0,32}):([0-9]{1,19})", re.ASCII)
_marked = re.compile(r"([0-9A-Za-z_-]{8})\.(.+)", re.ASCII)


def written(position: Position) -> str:
    """A position as text."""
    return f"{position.epoch}:{position.offset}"


def read(text: str) -> Position:
    """The position that ``written`` wrote; raises ``ValueError`` with what was expected."""
    found = _cursor.fullmatch(text)
    if found is None or int(found[2]) > MAX_OFFSET:
        raise ValueError("expected a cursor, EPOCH:OFFSET as an answer gave it")
    return Position(int(found[2]), found[1])


# --- entity tags (RFC 9110 8.8.3, 13.1.2) ----------------------------------------
def tag(position: Position) -> str:
    """The entity tag of what ends at a position."""
    return f'"{written(position)}"'


def tags(header: str) -> list[Position]:
    """The positions that an ``If-None-Match`` names, weak or strong; what is none of ours matches nothing of ours."""
    found = []
    for text in re.findall(r'"([^"]*)"', header):
        try:
            found.append(read(text))
        except ValueError:
            continue
    return found


# --- event ids ---------------------------------------------------------------------
@lru_cache(maxsize=4096)
def mark(channel: str) -> str:
    """What stands for a channel in the id of several: eight letters of its hash."""
    digest = hashlib.sha256(channel.encode(errors="surrogatepass")).digest()
    return base64.urlsafe_b64encode(digest[:6]).decode()


def event_id(channels: Sequence[str], positions: Mapping[str, Position]) -> str:
    """The id of an event stream of ``channels``; those without a position are left out."""
    if len(channels) == 1:
        return "".join(written(positions[channel]) for channel in channels if channel in positions)
    return ",".join(f"{mark(channel)}.{written(positions[channel])}" for channel in channels if channel in positions)


def event_positions(text: str, channels: Sequence[str]) -> dict[str, Position]:
    """The positions of ``channels`` that an event id holds, be it one of this stream or of another.

    A cursor without mark is that of the only channel.  Raises ``ValueError`` for
    what no event stream ever gave as its id.
    """
    if len(text) > ID_BYTES:
        raise ValueError(f"expected at most {ID_BYTES} characters, got {len(text)}")
    if len(channels) == 1 and "." not in text:
        return {channels[0]: read(text)}
    return _by_channel(text.split(","), channels)


def _by_channel(parts: Iterable[str], channels: Sequence[str]) -> dict[str, Position]:
    names = {mark(channel): channel for channel in channels}
    positions: dict[str, Position] = {}
    for part in parts:
        found = _marked.fullmatch(part)
        if found is None:
            raise ValueError("expected the id of an event of these channels")
        position = read(found[2])
        if found[1] in names:
            positions[names[found[1]]] = position
    return positions
