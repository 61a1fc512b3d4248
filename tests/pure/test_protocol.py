"""PROTOCOL 2.3, 3, 5, 6: messages to bytes and back, in both formats."""

import json
from typing import Any

import pytest
from centrifuge.protocol import client_pb2
from google.protobuf.descriptor import Descriptor
from hypothesis import given
from hypothesis import strategies as st

from server import errors, protobuf, protocol, stream
from server.errors import MALFORMED, Disconnected
from server.protocol import FRAME_COMMANDS, JSON, PAYLOAD_DEPTH, PROTOBUF, Codec, Command, ProtobufCodec, is_json


def _json(message: bytes) -> Any:
    return json.loads(message)


def _command(**fields: Any) -> bytes:
    """One Protobuf command as the SDK's generated messages write it."""
    return protobuf.prefixed(bytes(client_pb2.Command(**fields).SerializeToString()))


def _reply(message: bytes) -> Any:
    (one,) = protobuf.split(message, 100)
    return client_pb2.Reply.FromString(one)


# --- commands -------------------------------------------------------------------------
def test_a_json_batch() -> None:
    """PROTOCOL 2.3: commands stand on lines; a last newline and space around them are allowed."""
    batch = b'{"id":1,"connect":{}}\n {"id":2,"publish":{"channel":"c","data":{"a": 1.0}}}\r\n{}\n'
    connect, publish, pong = JSON.decode(batch)
    assert (connect.id, connect.methods) == (1, ["connect"])
    assert publish.publish is not None
    assert protocol.given(publish.publish.data) == b'{"a": 1.0}'
    assert (pong.id, pong.methods) == (0, [])


@pytest.mark.parametrize(
    "batch",
    [
        b"",
        b"\n",
        b" ",
        b"\r\n",
        b"{}\n\n",
        b"\n{}",
        b"{}{}",
        b"{} {}",
        b"{",
        b"[]",
        b"null",
        b"1",
        b'"x"',
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{}",
        b'{"id":1,}',
        b"{'id':1}",
        b'{"id":NaN}',
        b'{"id":1,"publish":{"channel":"c","data":NaN}}',
        b'{"id":1,"publish":{"channel":"c","data":[1,]}}',
        b'{"id":1,"publish":{"channel":"\\ud800"}}',
        b'{"id":1,"publish":{"channel":"\xff"}}',
        b'{"id":1,"publish":{"channel":"a\tb"}}',
        b"\x00",
        b"[" * 100_000,
        b'{"id":1,"publish":{"channel":"c","data":' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
        b'{"id":1,"novel":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    ],
)
def test_json_that_is_no_batch(batch: bytes) -> None:
    """What is not made of JSON objects on lines is 3501, however deep or odd, and nothing else is raised."""
    with pytest.raises(Disconnected) as caught:
        JSON.decode(batch)
    assert caught.value.disconnect is MALFORMED
    assert len(caught.value.why) < 300


@pytest.mark.parametrize(
    "batch",
    [
        b"",
        b"\x01",
        b"\x80",
        b"\xff\xff\xff\xff\xff\x01",
        b"\x02\x08",
        b"\x7f",
        b"\x00\x01",
        b"\x01\x00",
        b"\x03\x3a\x05a",
        protobuf.prefixed(b"\x3a\x04\x0a\x02\xff\xfe"),
        protobuf.prefixed(b"\x0b" * 1000),
        _command(id=1, history={"channel": "c", "since": {"offset": 2**63}}),
        _command(id=1, subscribe={"channel": "c", "offset": 2**64 - 1}),
        _command(id=1, connect={"subs": {"c": {"offset": 2**63}}}),
    ],
)
def test_protobuf_that_is_no_batch(batch: bytes) -> None:
    """Truncated lengths and messages, bytes that are no message, offsets beyond 63 bits: 3501, and nothing else."""
    with pytest.raises(Disconnected) as caught:
        PROTOBUF.decode(batch)
    assert caught.value.disconnect is MALFORMED


@pytest.mark.parametrize("codec", [JSON, PROTOBUF], ids=["json", "protobuf"])
@given(batch=st.binary(max_size=200))
def test_no_bytes_are_a_fault(codec: protocol.Codec, batch: bytes) -> None:
    """Whatever the bytes, they are commands or 3501."""
    commands: list[Command] = []
    end: Disconnected | None = None
    try:
        commands = codec.decode(batch)
    except Disconnected as caught:
        end = caught
    assert commands if end is None else end.disconnect is MALFORMED


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)
    )
)
def test_payloads_pass_through(value: Any) -> None:
    """PROTOCOL 3.2: a payload leaves with the bytes it came with."""
    data = json.dumps(value, ensure_ascii=False).encode(errors="replace")
    (command,) = JSON.decode(b'{"id":1,"publish":{"channel":"c","data":' + data + b"}}")
    assert command.publish is not None
    came = protocol.given(command.publish.data)
    assert came == data
    assert protocol.is_json(data)
    pushed = JSON.push("c", "pub", protocol.publication(stream.Publication(data)))
    assert pushed == b'{"push":{"channel":"c","pub":{"data":' + data + b"}}}"


FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("connect", {"token": "t", "name": "n", "version": "v"}),
    ("subscribe", {"channel": "c", "token": "t", "recover": True, "epoch": "e", "offset": 7, "flag": 3}),
    ("subscribe", {"channel": "c", "positioned": True, "recoverable": True, "join_leave": True, "delta": "fossil"}),
    ("unsubscribe", {"channel": "c"}),
    ("presence", {"channel": "c"}),
    ("presence_stats", {"channel": "c"}),
    ("history", {"channel": "c", "limit": -1, "reverse": True}),
    ("rpc", {"method": "m"}),
    ("refresh", {"token": "t"}),
    ("sub_refresh", {"channel": "c", "token": "t"}),
]


@pytest.mark.parametrize(("method", "fields"), FIELDS)
def test_both_formats_say_the_same(method: str, fields: dict[str, Any]) -> None:
    """A command means the same in JSON and in Protobuf, field by field."""
    (text,) = JSON.decode(json.dumps({"id": 9, method: fields}).encode())
    (binary,) = PROTOBUF.decode(_command(id=9, **{method: fields}))
    assert text == binary
    request = getattr(text, method)
    assert {name: getattr(request, name) for name in fields} == fields


def test_nested_fields_in_both_formats() -> None:
    """Positions, wishes and headers are nested, and come through."""
    subs = {"a": {"recover": True, "offset": 3, "epoch": "e"}, "b": {}}
    (text,) = JSON.decode(json.dumps({"id": 1, "connect": {"subs": subs, "headers": {"x": "y"}}}).encode())
    (binary,) = PROTOBUF.decode(_command(id=1, connect={"subs": subs, "headers": {"x": "y"}}))
    assert text == binary
    since = {"offset": 5, "epoch": "e"}
    (text,) = JSON.decode(json.dumps({"id": 1, "history": {"channel": "c", "since": since}}).encode())
    (binary,) = PROTOBUF.decode(_command(id=1, history={"channel": "c", "since": since}))
    assert text == binary


def test_empty_requests_are_there_in_protobuf() -> None:
    """A method without fields is a message of length 0, and counts as present."""
    (connect,) = PROTOBUF.decode(_command(id=1, connect={}))
    assert connect.methods == ["connect"]
    assert PROTOBUF.decode(b"\x00\x00") == [Command(), Command()]


# --- the schema ---------------------------------------------------------------------------
LACKS = {"epoch", "type", "key", "removed"}
"""Fields that are younger than the SDK's messages."""


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (protobuf.Command.DESCRIPTOR, client_pb2.Command.DESCRIPTOR),
        (protobuf.Reply.DESCRIPTOR, client_pb2.Reply.DESCRIPTOR),
    ],
    ids=["Command", "Reply"],
)
def test_field_numbers(ours: Descriptor, theirs: Descriptor) -> None:
    """PROTOCOL appendix A: every field of every message has the number, name and type that the SDK gives it."""
    faults: list[str] = []
    _compare(ours, theirs, ours.name, faults, set())
    assert faults == []


def _compare(ours: Descriptor, theirs: Descriptor, path: str, faults: list[str], seen: set[tuple[str, str]]) -> None:
    if (ours.full_name, theirs.full_name) in seen:
        return
    seen.add((ours.full_name, theirs.full_name))
    for field in ours.fields:
        other = theirs.fields_by_number.get(field.number)
        if other is None:
            if field.name not in LACKS:
                faults.append(f"{path}.{field.name} has number {field.number}, which the SDK does not know")
        elif (field.name, field.type, field.is_repeated) != (other.name, other.type, other.is_repeated):
            faults.append(f"{path}.{field.name} is the SDK's {other.name}")
        elif field.message_type is not None and other.message_type is not None:
            _compare(field.message_type, other.message_type, f"{path}.{field.name}", faults, seen)


# --- replies and pushes ---------------------------------------------------------------------
def test_zero_values_are_left_out() -> None:
    """PROTOCOL 3.2: results leave out what is zero, with the exceptions that are always written."""
    info = stream.ClientInfo("", "id")
    cases: list[tuple[str, protocol.Body, Any]] = [
        ("publish", protocol.EMPTY, {}),
        ("subscribe", protocol.SubscribeResult(), {}),
        ("connect", protocol.ConnectResult("id"), {"client": "id"}),
        ("refresh", protocol.RefreshResult(), {}),
        ("rpc", protocol.RPCResult(), {}),
        ("presence", protocol.PresenceResult({}), {"presence": {}}),
        (
            "presence",
            protocol.PresenceResult({"id": protocol.client_info(info)}),
            {"presence": {"id": {"user": "", "client": "id"}}},
        ),
        ("presence_stats", protocol.PresenceStatsResult(0, 0), {"num_clients": 0, "num_users": 0}),
        ("history", protocol.HistoryResult([], "", 0), {"publications": [], "epoch": "", "offset": 0}),
    ]
    for method, result, expected in cases:
        assert _json(JSON.reply(4, method, result)) == {"id": 4, method: expected}
        reply = _reply(PROTOBUF.reply(4, method, result))
        assert reply.id == 4
        assert reply.HasField(method), f"{method} is present, though it may be empty"


def test_publications_on_the_wire() -> None:
    """PROTOCOL 6.3: what is absent is left out; the epoch goes with the first publication of a stream only."""
    info = stream.ClientInfo("ann", "id", b'{"n":1}', b"2")
    full = stream.Publication(b"[1]", 2, 1_700_000_000_000, info, {"k": "v"})
    push = _json(JSON.push("c", "pub", protocol.publication(full, "ep")))["push"]
    assert push == {
        "channel": "c",
        "pub": {
            "data": [1],
            "info": {"user": "ann", "client": "id", "conn_info": {"n": 1}, "chan_info": 2},
            "offset": 2,
            "tags": {"k": "v"},
            "time": 1_700_000_000_000,
        },
    }
    first = _json(JSON.push("c", "pub", protocol.publication(stream.Publication(b"1", 1), "ep")))["push"]
    assert first["pub"] == {"data": 1, "offset": 1, "epoch": "ep"}
    passing = _json(JSON.push("c", "pub", protocol.publication(stream.Publication(b"1"))))["push"]
    assert passing["pub"] == {"data": 1}
    binary = _reply(PROTOBUF.push("c", "pub", protocol.publication(full, "ep"))).push
    assert (binary.channel, binary.pub.data, binary.pub.offset, binary.pub.time) == ("c", b"[1]", 2, 1_700_000_000_000)
    assert (binary.pub.info.conn_info, binary.pub.info.chan_info, dict(binary.pub.tags)) == (
        b'{"n":1}',
        b"2",
        {"k": "v"},
    )


def test_the_connect_push() -> None:
    """PROTOCOL 5.7, appendix A: the push has field numbers of its own, other than the result's."""
    result = protocol.ConnectResult(
        "id", expires=True, ttl=9, data=protocol.payload(b"1"), subs={"c": protocol.SubscribeResult()}
    )
    push = _reply(PROTOBUF.push("", "connect", result)).push.connect
    assert (push.client, push.expires, push.ttl, push.data, list(push.subs)) == ("id", True, 9, b"1", ["c"])
    assert _json(JSON.push("", "connect", result))["push"]["connect"]["subs"] == {"c": {}}


def test_refresh_results_in_protobuf() -> None:
    """Appendix A: refresh and sub_refresh carry the same fields under different numbers."""
    result = protocol.RefreshResult(True, 60)
    refreshed = _reply(PROTOBUF.reply(1, "refresh", result)).refresh
    sub_refreshed = _reply(PROTOBUF.reply(1, "sub_refresh", result)).sub_refresh
    assert [(one.expires, one.ttl) for one in (refreshed, sub_refreshed)] == [(True, 60)] * 2


@pytest.mark.parametrize("refusal", errors.REFUSALS.values(), ids=str)
def test_refusals(refusal: errors.Refusal) -> None:
    """PROTOCOL 7.1: code and message always, ``temporary`` only where it is true."""
    text = _json(JSON.refusal(3, refusal))
    error = {"code": refusal.code, "message": refusal.message}
    assert text == {"id": 3, "error": {**error, "temporary": True} if refusal.temporary else error}
    binary = _reply(PROTOBUF.refusal(3, refusal))
    assert (binary.id, binary.error.code, binary.error.temporary) == (3, refusal.code, refusal.temporary)


def test_pings_are_empty() -> None:
    """PROTOCOL 2.4: ``{}`` in JSON, one zero byte in Protobuf."""
    assert (JSON.ping, PROTOBUF.ping) == (b"{}", b"\x00")


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_prefixes(messages: list[bytes]) -> None:
    """Messages behind their lengths are taken apart again, as many and as long as they were."""
    assert protobuf.split(b"".join(map(protobuf.prefixed, messages)), 100) == messages


def test_long_prefixes() -> None:
    """Lengths of more than seven and fourteen bits, and the first that is cut short."""
    for size in (0, 1, 127, 128, 16_383, 16_384, 70_000):
        assert protobuf.split(protobuf.prefixed(bytes(size)), 1) == [bytes(size)]
        if size:
            with pytest.raises(ValueError, match="cut short"):
                protobuf.split(protobuf.prefixed(bytes(size))[:-1], 1)


def test_channel_names_are_escaped() -> None:
    """Names with quotes, control characters and any script stay themselves in a push."""
    for name in ('a"b', "a\\b", "a\nb", "ä:日本", "\x00", "\u2028"):
        message = JSON.push(name, "unsubscribe", protocol.Unsubscribe(2000, "server unsubscribe"))
        assert b"\n" not in message
        assert _json(message)["push"]["channel"] == name
        assert _reply(ProtobufCodec().push(name, "unsubscribe", protocol.Unsubscribe(1, "r"))).push.channel == name


# --- payloads ---------------------------------------------------------------------------------
@pytest.mark.parametrize("data", [b"1", b' "\xc3\xa4" ', b'{"a":[null,true,1e9]}', b"[\n1\r\n]", b"-0.5E-3"])
def test_json_payloads(data: bytes) -> None:
    """Any JSON text is a payload; without its raw newlines it says the same."""
    assert protocol.is_json(data)
    assert json.loads(protocol.one_line(data)) == json.loads(data)
    assert not {10, 13} & set(protocol.one_line(data))


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b" ", b"NaN", b"-Infinity", b"01", b"1.", b".5", b"+1", b"1 2", b"{}{}", b"nul", b"[1,]", b'{"a":1,}'),
        *(b'"a\tb"', b'"a\nb"', b'"\\q"', b'"\\u12"', b'"\xff"', b'"\xc3"', b'"\xed\xa0\x80"', b'"\\ud800"', b'"abc'),
        *(
            b"{a:1}",
            b"{'a':1}",
            b"[1 2]",
            b"\xef\xbb\xbf1",
            b"[1]\x00",
            b"\x0b1",
            b"[" * 100_000,
            b"[" * 9999 + b"]" * 9999,
        ),
    ],
)
def test_what_is_no_json_payload(data: bytes) -> None:
    """What would break a subscriber's parser is not taken for JSON."""
    assert not protocol.is_json(data)


@pytest.mark.parametrize(("codec", "pong"), [(JSON, b"{}\n"), (PROTOBUF, b"\x00")], ids=["json", "protobuf"])
def test_a_frame_holds_so_many_commands(codec: Codec, pong: bytes) -> None:
    """A frame of 2,000 commands is read, one more is malformed before any is made (PROTOCOL 18)."""
    assert len(codec.decode(pong * FRAME_COMMANDS)) == FRAME_COMMANDS
    with pytest.raises(Disconnected) as caught:
        codec.decode(pong * (FRAME_COMMANDS + 1))
    assert caught.value.disconnect == MALFORMED


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'["]",', b'{"\\\\":', b'["\\"]]]",'])
def test_payloads_are_nested_so_deep(opening: bytes) -> None:
    """A payload 128 deep is JSON to us, a deeper one is not, whatever its strings hold; breadth is free."""
    closing = b"}" if opening.startswith(b"{") else b"]"
    assert is_json(opening * PAYLOAD_DEPTH + b"0" + closing * PAYLOAD_DEPTH)
    assert not is_json(opening * (PAYLOAD_DEPTH + 1) + b"0" + closing * (PAYLOAD_DEPTH + 1))
    assert is_json(b"[" + b",".join([opening + b"0" + closing] * 500) + b"]")


# --- publications, by hand and not -----------------------------------------------------
INFOS = st.builds(
    stream.ClientInfo,
    user=st.text(),
    client=st.text(),
    conn_info=st.sampled_from([None, b"{}", '"\u00e9"'.encode()]),
    chan_info=st.sampled_from([None, b"[1]"]),
)
PUBLICATIONS = st.builds(
    stream.Publication,
    data=st.sampled_from([b"null", b'{"a":"%s%d"}', '"\u00e9"'.encode(), b"[" * 100 + b"]" * 100]),
    offset=st.sampled_from([0, 1, 2, protocol.MAX_OFFSET]),
    time_ms=st.sampled_from([0, 1_700_000_000_000]),
    info=st.none() | INFOS,
    tags=st.none() | st.dictionaries(st.text(), st.text(), max_size=2),
)


@pytest.mark.parametrize("codec", [JSON, PROTOBUF, protocol.ONE_WAY], ids=lambda codec: type(codec).__name__)
@given(channel=st.text(min_size=1), pub=PUBLICATIONS, epoch=st.sampled_from(["", "abcd"]))
def test_a_publication_looks_the_same_however_it_is_made(
    codec: Codec, channel: str, pub: stream.Publication, epoch: str
) -> None:
    """PROTOCOL 5.1: the short way to a publication gives the bytes of the push that it is."""
    long_way = codec.push(channel, "pub", protocol.publication(pub, epoch))
    assert codec.publication(channel, pub, epoch) == long_way
