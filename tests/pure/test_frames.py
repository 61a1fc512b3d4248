"""RFC 6455 framing: whatever is cut wherever means the same, and each clause has its breach."""

import re
import tracemalloc
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tornado.util import _websocket_mask

from handlers.frames import (
    BINARY,
    CLOSE,
    PING,
    PONG,
    TEXT,
    Close,
    Event,
    Parser,
    Ping,
    Pong,
    Violation,
    close_frame,
    frame_around,
    is_close_code,
    message_frame,
    ping_frame,
    pong_frame,
)

LIMIT = 70_000
KEY = b"\x37\xfa\x21\x3d"


def client_frame(opcode: int, payload: bytes = b"", *, fin: bool = True, key: bytes = KEY, reserved: int = 0) -> bytes:
    """A frame as a client must send it, or with what it must not."""
    size = len(payload)
    first = (0x80 if fin else 0) | reserved | opcode
    if size < 126:
        head = bytes((first, 0x80 | size))
    elif size < 0x10000:
        head = bytes((first, 0xFE)) + size.to_bytes(2, "big")
    else:
        head = bytes((first, 0xFF)) + size.to_bytes(8, "big")
    return head + key + _websocket_mask(key, payload)


def events_of(parser: Parser, *reads: bytes) -> list[Event]:
    """Everything that the parser makes of these reads."""
    events = []
    for read in reads:
        parser.feed(read)
        while (event := parser.next_event()) is not None:
            events.append(event)
    return events


def violation_of(parser: Parser, *reads: bytes) -> Violation | None:
    """What the parser finds wrong with these reads, if anything."""
    try:
        events = events_of(parser, *reads)
    except Violation as violation:
        return violation
    assert all(isinstance(event, bytes | Ping | Pong | Close) for event in events)
    return None


@dataclass
class Said:
    """What a client says: the bytes, and what they mean."""

    data: bytes
    events: list[Event]


small = st.binary(max_size=300)
control_data = st.binary(max_size=125)
key = st.binary(min_size=4, max_size=4)
text = st.text(max_size=200).map(str.encode)
sizes_at_the_edges = st.sampled_from([0, 1, 125, 126, 127, 65_535, 65_536]).map(lambda size: b"x" * size)


@st.composite
def control_frames(draw: st.DrawFn) -> Said:
    """A ping or a pong."""
    data = draw(control_data)
    if draw(st.booleans()):
        return Said(client_frame(PING, data, key=draw(key)), [Ping(data)])
    return Said(client_frame(PONG, data, key=draw(key)), [Pong(data)])


@st.composite
def messages(draw: st.DrawFn) -> Said:
    """A message in one frame or in fragments, with control frames between these (RFC 6455 5.4)."""
    opcode, payload = draw(
        st.one_of(
            text.map(lambda payload: (TEXT, payload)),
            small.map(lambda payload: (BINARY, payload)),
            sizes_at_the_edges.map(lambda payload: (TEXT, payload)),
        )
    )
    cuts = sorted(draw(st.lists(st.integers(0, len(payload)), max_size=4)))
    begins, ends = [0, *cuts], [*cuts, len(payload)]
    data = b""
    events: list[Event] = []
    for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        if number:
            for control in draw(st.lists(control_frames(), max_size=2)):
                data += control.data
                events += control.events
        last = number == len(cuts)
        data += client_frame(opcode if number == 0 else 0, payload[begin:end], fin=last, key=draw(key))
    return Said(data, [*events, payload])


conversations = st.lists(st.one_of(messages(), control_frames()), max_size=6)


@given(conversations, st.data())
def test_cuts_do_not_matter(conversation: list[Said], data: st.DataObject) -> None:
    """A stream of valid frames means the same however the reads cut it, and nothing is held when it ends."""
    stream = b"".join(said.data for said in conversation)
    cuts = sorted(set(data.draw(st.lists(st.integers(0, len(stream)), max_size=30))))
    reads = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True) if a < b]
    parser = Parser(LIMIT)
    assert events_of(parser, *reads) == [event for said in conversation for event in said.events]
    assert parser.held_bytes == 0


def outcome(parser: Parser, reads: list[bytes], *, short_way: bool) -> tuple[list[Event], str, int]:
    """What a parser makes of these reads, what it finds wrong, and what it still holds."""
    events: list[Event] = []
    for read in reads:
        message = parser.sole_text(read) if short_way else None
        if message is not None:
            events.append(message)
            continue
        try:
            events += events_of(parser, read)
        except Violation as violation:
            return events, str(violation), parser.held_bytes
    return events, "", parser.held_bytes


@given(
    st.lists(
        st.one_of(
            messages().map(lambda said: said.data),
            control_frames().map(lambda said: said.data),
            st.builds(client_frame, st.just(TEXT), small, fin=st.booleans(), reserved=st.sampled_from([0, 0x40])),
            small.filter(bool),
        ),
        max_size=6,
    ),
    st.integers(1, 400),
)
def test_short_way(reads: list[bytes], limit: int) -> None:
    """``sole_text`` gives what ``feed`` and ``next_event`` would have given, whatever was read before and comes now."""
    assert outcome(Parser(limit), reads, short_way=True) == outcome(Parser(limit), reads, short_way=False)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 300, 65_535])
def test_short_way_is_taken(size: int) -> None:
    """A text frame that stands alone goes the short way, up to the limit and up to 64 KB."""
    assert Parser(LIMIT).sole_text(client_frame(TEXT, b"x" * size)) == b"x" * size
    assert Parser(size).sole_text(client_frame(TEXT, b"x" * size)) == b"x" * size


@pytest.mark.parametrize(
    "read",
    [
        client_frame(TEXT, b"x" * 300)[:-1],
        client_frame(TEXT, b"x") + b"\x81",
        client_frame(TEXT, b"x" * 127, fin=False),
        b"\x81\xff" + client_frame(TEXT, b"x" * 127)[4:],
        b"\x81\xfe\x00\x7d" + KEY + b"x" * 125,
        client_frame(TEXT, b"x" * 401),
        client_frame(TEXT, "ü".encode()),
        client_frame(TEXT, b"\xff"),
        client_frame(BINARY, b"x"),
        client_frame(TEXT, b"x", reserved=0x40),
        message_frame(TEXT, b"xxxxxx"),
        client_frame(CLOSE),
        b"\x81",
    ],
)
def test_short_way_is_narrow(read: bytes) -> None:
    """What is no whole plain frame, or wants a check, goes the long way, and so does what comes behind such a thing."""
    assert Parser(400).sole_text(read) is None
    for before in (b"\x81", client_frame(TEXT, b"a", fin=False), client_frame(CLOSE)):
        parser = Parser(400)
        events_of(parser, before)
        assert parser.sole_text(client_frame(TEXT, b"x")) is None


@given(conversations, st.data())
def test_asking_may_stop_between_events(conversation: list[Said], data: st.DataObject) -> None:
    """Who stops asking in the middle of a read gets the rest later, in order, also when more was fed meanwhile."""
    stream = b"".join(said.data for said in conversation)
    parser = Parser(LIMIT)
    events: list[Event] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        parser.feed(stream[:size])
        stream = stream[size:]
        for _ in range(data.draw(st.integers(0, 3))):
            if (event := parser.next_event()) is None:
                break
            events.append(event)
    while (event := parser.next_event()) is not None:
        events.append(event)
    assert events == [event for said in conversation for event in said.events]


@given(st.lists(st.binary(min_size=1, max_size=400), max_size=8))
def test_any_bytes_are_frames_or_a_violation(reads: list[bytes]) -> None:
    """Arbitrary bytes give events or a violation with a code that RFC 6455 has for it, never another exception."""
    parser = Parser(1_000)
    violation = violation_of(parser, *reads)
    if violation is None:
        assert parser.held_bytes <= sum(map(len, reads))
    else:
        assert violation.code in (1002, 1007, 1009)
        assert close_frame(violation.code, violation.reason)
        assert parser.held_bytes == 0


@given(conversations.filter(bool), st.data())
def test_damage_is_contained(conversation: list[Said], data: st.DataObject) -> None:
    """One changed byte in a valid stream gives other events or a violation, never another exception."""
    stream = bytearray(b"".join(said.data for said in conversation))
    stream[data.draw(st.integers(0, min(len(stream), 500) - 1))] ^= data.draw(st.integers(1, 255))
    violation = violation_of(Parser(LIMIT), bytes(stream))
    assert violation is None or violation.code in (1002, 1007, 1009)


BREACHES = {
    "5.1 an unmasked frame": (b"\x81\x02hi", 1002),
    "5.2 RSV1": (client_frame(TEXT, b"hi", reserved=0x40), 1002),
    "5.2 RSV2": (client_frame(TEXT, b"hi", reserved=0x20), 1002),
    "5.2 RSV3 of a control frame": (client_frame(PING, b"hi", reserved=0x10), 1002),
    "5.2 opcode 3": (client_frame(3, b"hi"), 1002),
    "5.2 opcode 7": (client_frame(7), 1002),
    "5.2 opcode 11": (client_frame(11), 1002),
    "5.2 opcode 15": (client_frame(15), 1002),
    "5.2 16 bits for 125": (b"\x81\xfe\x00\x7d", 1002),
    "5.2 64 bits for 65535": (b"\x81\xff\x00\x00\x00\x00\x00\x00\xff\xff", 1002),
    "5.2 the top bit of 64": (b"\x82\xff\x80\x00\x00\x00\x00\x00\x00\x00", 1002),
    "5.4 a continuation of nothing": (client_frame(0, b"hi"), 1002),
    "5.4 an unfinished continuation of nothing": (client_frame(0, b"hi", fin=False), 1002),
    "5.4 a text inside of a fragmented message": (client_frame(TEXT, b"a", fin=False) + client_frame(TEXT, b"b"), 1002),
    "5.4 a continuation of what has ended": (
        client_frame(TEXT, b"a", fin=False) + client_frame(0, b"b") + client_frame(0, b"c"),
        1002,
    ),
    "5.5 a fragmented ping": (client_frame(PING, b"a", fin=False), 1002),
    "5.5 a fragmented close": (client_frame(CLOSE, fin=False), 1002),
    "5.5 a ping of 126 bytes": (client_frame(PING, b"x" * 126), 1002),
    "5.5 a close of 64 KiB": (client_frame(CLOSE, b"x" * 65_536), 1002),
    "5.5.1 a close of one byte": (client_frame(CLOSE, b"\x03"), 1002),
    "5.5.1 a reason that is not UTF-8": (client_frame(CLOSE, b"\x03\xe8\xff"), 1007),
    "7.4.1 close code 1005": (client_frame(CLOSE, (1005).to_bytes(2, "big")), 1002),
    "7.4.1 close code 1015": (client_frame(CLOSE, (1015).to_bytes(2, "big")), 1002),
    "7.4.2 close code 999": (client_frame(CLOSE, (999).to_bytes(2, "big")), 1002),
    "7.4.2 close code 2999": (client_frame(CLOSE, (2999).to_bytes(2, "big")), 1002),
    "7.4.2 close code 5000": (client_frame(CLOSE, (5000).to_bytes(2, "big")), 1002),
    "8.1 text that is not UTF-8": (client_frame(TEXT, b"\xce\xba\xff"), 1007),
    "8.1 a cut character at the end": (client_frame(TEXT, "é".encode()[:1]), 1007),
    "8.1 a surrogate": (client_frame(TEXT, b"\xed\xa0\x80"), 1007),
    "8.1 an overlong form": (client_frame(TEXT, b"\xc0\xaf"), 1007),
    "8.1 beyond Unicode": (client_frame(TEXT, b"\xf4\x90\x80\x80"), 1007),
    "8.1 fragments that are no text when joined": (
        client_frame(TEXT, "é".encode()[:1], fin=False) + client_frame(0, b"e"),
        1007,
    ),
    "10.4 a message above the limit": (client_frame(BINARY, b"x" * (LIMIT + 1)), 1009),
    "10.4 fragments above the limit": (
        client_frame(BINARY, b"x" * (LIMIT - 1), fin=False) + client_frame(0, b"xx"),
        1009,
    ),
}


@pytest.mark.parametrize("name", BREACHES)
def test_each_breach_has_its_code(name: str) -> None:
    """RFC 6455, the clause in the name: this breach is found, whole or byte by byte, with the right close code."""
    data, code = BREACHES[name]
    with pytest.raises(Violation) as whole:
        events_of(Parser(LIMIT), data)
    assert whole.value.code == code
    with pytest.raises(Violation) as bytewise:
        events_of(Parser(LIMIT), *(data[at : at + 1] for at in range(len(data))))
    assert (bytewise.value.code, bytewise.value.reason) == (code, whole.value.reason)


def test_events_before_a_breach_are_not_lost() -> None:
    """What came whole before the breach, even in the same read, is given first."""
    parser = Parser(LIMIT)
    parser.feed(client_frame(TEXT, b"one") + client_frame(PING, b"two") + b"\x81\x02hi")
    assert parser.next_event() == b"one"
    assert parser.next_event() == Ping(b"two")
    with pytest.raises(Violation, match="1002"):
        parser.next_event()


@pytest.mark.parametrize("last", [client_frame(CLOSE, b"\x03\xe8"), client_frame(3)], ids=["close", "violation"])
def test_nothing_counts_after_the_end(last: bytes) -> None:
    """RFC 6455 5.5.1, 7.1.7: after a close frame or a breach nothing is looked at or kept."""
    parser = Parser(LIMIT)
    violation_of(parser, last + client_frame(TEXT, b"late"))
    assert events_of(parser, client_frame(TEXT, b"later"), b"\x00" * 100_000) == []
    assert parser.held_bytes == 0


@pytest.mark.parametrize(
    ("payload", "close"),
    [
        (b"", Close()),
        (b"\x03\xe8", Close(1000)),
        (b"\x03\xe9going", Close(1001, "going")),
        ((4999).to_bytes(2, "big") + "tschüß".encode(), Close(4999, "tschüß")),
    ],
)
def test_close_frames_are_read(payload: bytes, close: Close) -> None:
    """RFC 6455 5.5.1: a close frame has a code and a reason, or only a code, or neither."""
    assert events_of(Parser(LIMIT), client_frame(CLOSE, payload)) == [close]


def test_size_is_refused_by_its_header() -> None:
    """RFC 6455 10.4: a message above the limit is refused before any of its payload has come."""
    with pytest.raises(Violation, match="1009"):
        events_of(Parser(LIMIT), b"\x82\xff" + (LIMIT + 1).to_bytes(8, "big"))
    parser = Parser(LIMIT)
    assert events_of(parser, client_frame(BINARY, b"x" * LIMIT, fin=False)) == []
    with pytest.raises(Violation, match="1009"):
        events_of(parser, b"\x80\x81")


def test_limit_itself_is_allowed() -> None:
    """A message of exactly the limit passes, in one frame and in fragments; control frames do not count."""
    parser = Parser(200)
    assert events_of(parser, client_frame(TEXT, b"x" * 200)) == [b"x" * 200]
    halves = client_frame(TEXT, b"x" * 100, fin=False) + client_frame(PING, b"y" * 125) + client_frame(0, b"x" * 100)
    assert events_of(parser, halves) == [Ping(b"y" * 125), b"x" * 200]
    assert events_of(Parser(10), client_frame(PING, b"y" * 125)) == [Ping(b"y" * 125)]


def test_a_partial_frame_holds_what_has_come() -> None:
    """A client that stops in the middle of a frame costs the bytes that it has sent, not those that it promised."""
    parser = Parser(1 << 40)
    promise = b"\x82\xff" + (1 << 40).to_bytes(8, "big") + KEY
    tracemalloc.start()
    try:
        assert events_of(parser, promise, *[b"x" * 1_000] * 50) == []
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert parser.held_bytes == len(promise) + 50_000
    assert held < 50_000 * 1.25 + 2_000


def test_empty_fragments_cost_nothing() -> None:
    """A message of endlessly many empty fragments occupies no memory."""
    parser = Parser(LIMIT)
    fragments = client_frame(0, b"", fin=False) * 1_000
    assert events_of(parser, client_frame(TEXT, b"", fin=False)) == []
    tracemalloc.start()
    try:
        for _ in range(20):
            assert events_of(parser, fragments) == []
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert parser.held_bytes == 0
    assert held < 2_000
    assert events_of(parser, client_frame(0, b"end")) == [b"end"]


@given(st.booleans(), sizes_at_the_edges)
def test_frames_to_a_client(is_text: bool, payload: bytes) -> None:
    """RFC 6455 5.1, 5.2: our frames are whole, unmasked, and have their length in its shortest form."""
    opcode = TEXT if is_text else BINARY
    frame = message_frame(TEXT if is_text else BINARY, payload)
    assert frame[0] == 0x80 | opcode
    size = len(payload)
    width = 0 if size < 126 else 2 if size < 0x10000 else 8
    assert frame[1] == (size if width == 0 else 126 if width == 2 else 127)
    assert width == 0 or int.from_bytes(frame[2 : 2 + width], "big") == size
    assert frame[2 + width :] == payload


def test_control_frames_to_a_client() -> None:
    """RFC 6455 5.5: our control frames carry at most 125 bytes, and only codes that may be sent."""
    assert ping_frame(b"a") == b"\x89\x01a"
    assert pong_frame(b"a") == b"\x8a\x01a"
    assert close_frame() == b"\x88\x00"
    assert close_frame(3008, "slow") == b"\x88\x06\x0b\xc0slow"
    assert len(close_frame(1000, "x" * 123)) == 127
    with pytest.raises(ValueError, match=re.escape("at most 125 bytes, got 126")):
        close_frame(1000, "x" * 124)
    with pytest.raises(ValueError, match="at most 125"):
        ping_frame(b"x" * 126)
    with pytest.raises(ValueError, match="got 1005"):
        close_frame(1005)
    with pytest.raises(ValueError, match="needs a close code"):
        close_frame(None, "why")


def test_close_codes() -> None:
    """RFC 6455 7.4: exactly the registered codes, those of libraries and those of applications may be sent."""
    allowed = {code for code in range(70_000) if is_close_code(code)}
    registered = {1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014}
    assert allowed == registered | set(range(3000, 5000))


@given(st.lists(st.one_of(small, sizes_at_the_edges), min_size=1, max_size=6), st.data())
def test_frame_around(payloads: list[bytes], data: st.DataObject) -> None:
    """In a run of frames, each byte is found to lie in its frame, and each boundary on itself."""
    run = b""
    edges = [0]
    for payload in payloads:
        run += message_frame(BINARY, payload)
        edges.append(len(run))
    at = data.draw(st.one_of(st.integers(0, len(run)), st.sampled_from(edges)))
    begin, end = frame_around(run, at)
    if at in edges:
        assert (begin, end) == (at, at)
    else:
        assert edges.index(end) - edges.index(begin) == 1
        assert begin < at < end
