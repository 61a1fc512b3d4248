"""RFC 7692: which offers are taken, and messages in and out of DEFLATE."""

import json
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tornado.util import _websocket_mask

from handlers.deflate import ACCEPTED, Deflate, accept, inflate
from handlers.frames import BINARY, COMPRESSED, FIN, PING, TEXT, Event, Parser, Ping, Violation

LIMIT = 20_000
KEY = b"\x37\xfa\x21\x3d"


def compressed(message: bytes, *, window_bits: int = 15, final: bool = False) -> bytes:
    """The payload that another implementation makes of a message; ``final`` as RFC 7692 7.2.3.5 has it."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -window_bits)
    data = compressor.compress(message)
    return data + compressor.flush() + b"\x00" if final else (data + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


@given(st.binary(max_size=300) | st.randoms().map(lambda random: random.randbytes(random.randrange(5, 300))))
def test_a_message_that_was_cut_is_none(message: bytes) -> None:
    """What ends inside a block is no shorter message (RFC 7692 7.2.2); where only filling is missing, it is whole.

    One octet of 0 is an empty message, whatever it was cut from (7.2.3.6).
    """
    payload = compressed(message)
    assert inflate(payload, LIMIT) == message
    for at in range(len(payload)):
        part = payload[:at]
        try:
            assert inflate(part, LIMIT) == (b"" if part == b"\x00" else message), f"cut behind octet {at}"
        except ValueError:
            continue


@pytest.mark.parametrize("window_bits", [9, 15])
def test_what_comes_behind_a_final_block(window_bits: int) -> None:
    """Behind one that says it is the last there is an octet of zero, as RFC 7692 7.2.3.4 has it, or nothing."""
    message = json.dumps(list(range(200))).encode()
    payload = compressed(message, window_bits=window_bits, final=True)
    assert inflate(payload, LIMIT) == inflate(payload[:-1], LIMIT) == message
    for more in (b"\x01", b"\x00\x00", payload, b"\x03\x00" * 1_000):
        with pytest.raises(ValueError, match="behind"):
            inflate(payload + more, LIMIT)
    for at in range(len(payload) - 1):
        with pytest.raises(ValueError):
            inflate(payload[:at], LIMIT)


def client_frame(first: int, payload: bytes) -> bytes:
    """A frame of a client below 64 KB; ``first`` is its first byte."""
    size = len(payload)
    head = bytes((first, 0x80 | size)) if size < 126 else bytes((first, 0xFE)) + size.to_bytes(2, "big")
    return head + KEY + _websocket_mask(KEY, payload)


def events_of(parser: Parser, data: bytes) -> list[Event]:
    """Everything that a parser makes of this."""
    parser.feed(data)
    events = []
    while (event := parser.next_event()) is not None:
        events.append(event)
    return events


@pytest.mark.parametrize(
    ("offered", "answer"),
    [
        ("", None),
        ("permessage-deflate", ACCEPTED),
        ("permessage-deflate; client_max_window_bits", ACCEPTED),
        ("permessage-deflate;client_max_window_bits=9 ;server_no_context_takeover", ACCEPTED),
        ("permessage-deflate; client_no_context_takeover", ACCEPTED),
        ("x-webkit-deflate-frame, permessage-deflate", ACCEPTED),
        ("permessage-deflate; server_max_window_bits=15", f"{ACCEPTED}; server_max_window_bits=12"),
        ('permessage-deflate; server_max_window_bits="12"', f"{ACCEPTED}; server_max_window_bits=12"),
        ("permessage-deflate; server_max_window_bits=11", None),
        ("permessage-deflate; server_max_window_bits=10, permessage-deflate", ACCEPTED),
        ("permessage-deflate; server_max_window_bits", None),
        ("permessage-deflate; server_max_window_bits=16", None),
        ("permessage-deflate; server_max_window_bits=012", None),
        ("permessage-deflate; client_max_window_bits=7", None),
        ("permessage-deflate; client_max_window_bits=x", None),
        ("permessage-deflate; server_no_context_takeover=1", None),
        ("permessage-deflate; server_no_context_takeover; server_no_context_takeover", None),
        ("permessage-deflate; magic", None),
        ("permessage-bzip2", None),
    ],
)
def test_offers(offered: str, answer: str | None) -> None:
    """RFC 7692 5.1, 7.1: the first offer that we can keep to is taken; one with anything wrong in it never is."""
    assert accept(offered) == answer


messages = st.one_of(
    st.binary(max_size=2_000),
    st.text(max_size=500).map(str.encode),
    st.builds(lambda part, times: part * times, st.binary(min_size=1, max_size=40), st.integers(0, 400)),
)


@given(messages, st.integers(1, 9))
def test_there_and_back(message: bytes, level: int) -> None:
    """What is compressed is shorter, and an inflater with our window reads it; what would not be is left as it is."""
    data = Deflate(level, 0).compress(message)
    if data is not None:
        assert len(data) < len(message)
        assert zlib.decompressobj(-12).decompress(data + b"\x00\x00\xff\xff") == message
        assert inflate(data, len(message)) == message


def test_what_is_not_compressed() -> None:
    """A short message stays as it is, and so does one that would not shrink."""
    assert Deflate(1, 256).compress(b"a" * 255) is None
    assert Deflate(1, 256).compress(b"a" * 256) is not None
    assert Deflate(9, 0).compress(bytes(range(256))) is None


@given(messages, st.sampled_from([9, 12, 15]), st.booleans())
def test_of_others(message: bytes, window_bits: int, final: bool) -> None:
    """What other compressors make is read, whatever their window, and if they end it as a whole stream, too."""
    data = compressed(message, window_bits=window_bits, final=final)
    assert inflate(data, len(message)) == message
    if message:
        assert inflate(data, len(message) - 1) is None


def test_bomb() -> None:
    """Of what would become ten megabytes no more is unpacked than a message may have."""
    data = compressed(bytes(10_000_000))
    assert len(data) < 10_000
    tracemalloc.start()
    try:
        assert inflate(data, 1_000) is None
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@given(st.text(max_size=300), st.booleans(), st.lists(st.integers(0, 300), max_size=3), st.binary(max_size=125))
def test_fragments(text: str, plain: bool, cuts: list[int], ping: bytes) -> None:
    """RFC 7692 6.1: the first fragment says of the whole message that it is compressed; pings between are not."""
    message = text.encode()
    payload = message if plain else compressed(message)
    cuts = sorted(min(cut, len(payload)) for cut in cuts)
    parts = [payload[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(payload)], strict=True)]
    stream = b""
    for number, part in enumerate(parts):
        first = (0 if number else TEXT | (0 if plain else COMPRESSED)) | (FIN if number == len(parts) - 1 else 0)
        stream += client_frame(FIN | PING, ping) + client_frame(first, part)
    expected: list[Event] = [Ping(ping)] * len(parts)
    assert events_of(Parser(LIMIT, compression=True), stream) == [*expected, message]


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        (client_frame(FIN | COMPRESSED | TEXT, compressed(b"a" * (LIMIT + 1))), 1009),
        (client_frame(FIN | COMPRESSED | BINARY, b"x" * (LIMIT + 1)), 1009),
        (client_frame(FIN | COMPRESSED | TEXT, b"\xff\xff\xff"), 1007),
        (client_frame(FIN | COMPRESSED | TEXT, compressed(b"\xff")), 1007),
        (client_frame(FIN | COMPRESSED | PING, b""), 1002),
        (client_frame(TEXT, b"a") + client_frame(FIN | COMPRESSED, b""), 1002),
        (client_frame(FIN | 0x20 | TEXT, b"a"), 1002),
        (client_frame(FIN | COMPRESSED | 0x10 | TEXT, b"a"), 1002),
        (client_frame(FIN | COMPRESSED | 3, b"a"), 1002),
    ],
)
def test_breaches(frames: bytes, code: int) -> None:
    """A bomb is 1009, what is no DEFLATE or no UTF-8 inside 1007, and RSV1 where it means nothing 1002."""
    with pytest.raises(Violation) as caught:
        events_of(Parser(LIMIT, compression=True), frames)
    assert caught.value.code == code


def test_not_agreed() -> None:
    """RFC 6455 5.2: without an agreement RSV1 is 1002."""
    with pytest.raises(Violation) as caught:
        events_of(Parser(LIMIT), client_frame(FIN | COMPRESSED | TEXT, compressed(b"a")))
    assert caught.value.code == 1002


def test_most_of_json_goes() -> None:
    """A publication of a kilobyte of JSON, as an application sends it, shrinks to less than half at level 1."""
    text = json.dumps([{"id": n, "user": f"user{n * 7}", "price": n * 1.25} for n in range(25)]).encode()
    data = Deflate(1, 256).compress(text)
    assert data is not None
    assert len(data) < len(text) / 2
