"""PROTOCOL 17.1 and 17.3: cursors as text, and what an event stream makes of pushes."""

import asyncio
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import cursors, protocol
from server.errors import Disconnect
from server.outbox import Outbox, Wire
from server.protocol import MAX_OFFSET
from server.readers import CODEC, KEEP_ALIVE, WIRE, EventOutbox, Reader, parts
from server.stream import Position, Publication

EPOCHS = st.text("abcXYZ019_-", max_size=8)
POSITIONS = st.builds(Position, st.integers(0, MAX_OFFSET), EPOCHS)
NAMES = st.text(min_size=1, max_size=40)


@given(POSITIONS)
def test_a_cursor_reads_as_it_was_written(position: Position) -> None:
    """A position survives being text, a tag, and the id of one channel's stream."""
    assert cursors.read(cursors.written(position)) == position
    assert cursors.tags(f'W/"x", {cursors.tag(position)}') == [position]
    assert cursors.event_positions(cursors.event_id(["a"], {"a": position}), ["a"]) == {"a": position}


@given(st.dictionaries(NAMES, st.none() | POSITIONS, min_size=2, max_size=cursors.STREAM_CHANNELS))
def test_an_id_holds_the_cursors_of_all_channels(stands: dict[str, Position | None]) -> None:
    """Whatever the names are: each channel that has a position gets it back, in under 4 KB of plain characters."""
    positions = {channel: position for channel, position in stands.items() if position is not None}
    text = cursors.event_id(list(stands), positions)
    assert len(text) < cursors.ID_BYTES
    assert text.isascii()
    assert not set(text) & set(" \r\n\0")
    if text:
        assert cursors.event_positions(text, list(reversed(stands))) == positions
        assert cursors.event_positions(text, ["another", "third"]) == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        ":",
        "e:",
        "e:-1",
        "e:1 ",
        " e:1",
        "e:1\n",
        "é:1",
        "e:١",
        f"e:{MAX_OFFSET + 1}",
        "e" * 33 + ":1",
        "a.b:1",
    ],
)
def test_what_is_no_cursor(text: str) -> None:
    """Nothing else is taken for a cursor; as an entity tag it is nobody's."""
    with pytest.raises(ValueError, match="expected"):
        cursors.read(text)
    assert cursors.tags(f'"{text}"') == []


@pytest.mark.parametrize("text", ["", "e:1", "x.e:1", "abcdefgh.e", "abcdefgh.e:1,", ",", "a" * 5000])
def test_what_is_no_id_of_several(text: str) -> None:
    """An id of one channel does not say which of several it is of; broken ones say nothing at all."""
    with pytest.raises(ValueError, match="expected"):
        cursors.event_positions(text, ["a", "b"])


# --- pushes to events ------------------------------------------------------------------
def frame(channel: str, offset: int, epoch: str = "", data: bytes = b"1") -> bytes:
    """A publication as the hub gives it to readers."""
    body = protocol.publication(Publication(data, offset, 1), epoch)
    return WIRE.frame(CODEC.push(channel, "pub", body))


class PlainWire(Wire):
    """A stream that remembers what it is given."""

    format = "json"
    codec = protocol.JSON

    def frame(self, message: bytes) -> bytes:
        """See ``Wire.frame``."""
        return message

    def spread(self, outboxes: Iterable[Outbox], data: bytes) -> None:
        """See ``Wire.spread``."""
        for outbox in outboxes:
            outbox.send(data)


class PlainOutbox(Outbox):
    """See ``PlainWire``."""

    def __init__(self, wire: PlainWire) -> None:
        self.wire = wire
        self.said = b""
        self.ended: Disconnect | None = None

    @property
    def waiting_bytes(self) -> int:
        """See ``Outbox.waiting_bytes``."""
        return 0

    def send(self, frame: bytes) -> None:
        """See ``Outbox.send``."""
        self.said += frame

    def flush(self) -> None:
        """See ``Outbox.flush``."""

    async def drained(self) -> None:
        """See ``Outbox.drained``."""

    def close(self, disconnect: Disconnect) -> None:
        """See ``Outbox.close``."""
        self.ended = disconnect

    def pause_reading(self) -> None:
        """See ``Outbox.pause_reading``."""

    def resume_reading(self) -> None:
        """See ``Outbox.resume_reading``."""


def reading(wire: PlainWire, *channels: str, at: Position | None = None) -> tuple[EventOutbox, PlainOutbox]:
    """A reader that stands at ``at`` in all of its channels."""
    outbox, stream = EventOutbox(Reader(channels)), PlainOutbox(wire)
    if at is not None:
        outbox.reader.positions = dict.fromkeys(channels, at)
    outbox.attach(stream)
    return outbox, stream


@given(st.data())
def test_a_fan_out_says_to_each_what_it_would_be_told_alone(data: st.DataObject) -> None:
    """Shared bytes or not: readers of any channels and positions get the events that ``send`` would have given."""
    wire = PlainWire()
    places = st.none() | st.builds(Position, st.just(0), st.sampled_from(["", "e"]))
    channels = st.sampled_from([("a",), ("a", "b"), ("a", "b", "c")])
    readers = data.draw(st.lists(st.tuples(channels, places), min_size=1, max_size=8))
    first = data.draw(st.integers(1, 3))
    runs = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    spread = [reading(wire, *names, at=at) for names, at in readers]
    alone = [reading(wire, *names, at=at) for names, at in readers]
    offset = first
    for run in runs:
        frames = b"".join(frame("a", number, "e") for number in range(offset, offset + run))
        offset += run
        WIRE.spread([outbox for outbox, _ in spread], frames)
        for outbox, _ in alone:
            outbox.send(frames)
    assert [stream.said for _, stream in spread] == [stream.said for _, stream in alone]
    assert [outbox.reader.positions for outbox, _ in spread] == [outbox.reader.positions for outbox, _ in alone]


def test_an_id_never_runs_ahead_of_its_events() -> None:
    """Frames that were encoded in one order and leave in another: each id has only what left before it."""
    outbox, stream = reading(PlainWire(), "a", "b", at=Position(0, "e"))
    early, late = frame("a", 1), frame("b", 1)
    outbox.send(late)
    behind_late = cursors.event_positions(outbox.reader.id, ["a", "b"])
    outbox.send(early)
    assert behind_late == {"a": Position(0, "e"), "b": Position(1, "e")}
    assert cursors.event_positions(outbox.reader.id, ["a", "b"]) == {"a": Position(1, "e"), "b": Position(1, "e")}
    assert stream.said.count(b"\nid: ") == 2


def test_the_epoch_is_learned_from_the_first_publication() -> None:
    """Who began in an empty channel has the epoch in its ids from offset 1 on."""
    outbox, stream = reading(PlainWire(), "a", at=Position())
    outbox.send(frame("a", 1, "born") + frame("a", 2, "born"))
    assert b"\nid: born:1\n" in stream.said
    assert outbox.reader.id == "born:2"


def test_names_and_payloads_cannot_break_out_of_an_event() -> None:
    """Newlines, nulls and quotes in a channel's name or a payload stay inside one data line."""
    outbox, stream = reading(PlainWire(), 'a"\n\n\0', at=Position(0, "e"))
    outbox.send(frame('a"\n\n\0', 1, data=b'"\\n\\nid: x\\u0000"'))
    assert stream.said.count(b"\n") == 3
    assert stream.said.endswith(b"\nid: e:1\n\n")


def test_a_ping_is_a_comment() -> None:
    """What keeps a stream alive is no event."""
    assert parts(WIRE.frame(CODEC.ping)) == [None]
    assert Reader(["a"]).take([None]) == KEEP_ALIVE


async def test_what_is_said_before_the_stream_waits_for_it() -> None:
    """Pushes and an end that come before the response has begun are kept for it."""
    outbox, stream = EventOutbox(Reader(["a"])), PlainOutbox(PlainWire())
    outbox.send(frame("a", 0))
    assert outbox.waiting_bytes
    await asyncio.wait_for(outbox.drained(), 1)
    outbox.attach(stream)
    outbox.release()
    assert stream.said.startswith(b"data: ")
    ended = EventOutbox(Reader(["a"]))
    ended.close(Disconnect(4100, "banned"))
    ended.attach(stream)
    assert stream.ended == Disconnect(4100, "banned")
