"""What a driver is told of a replica set behind proxies, in whatever pieces it comes."""

import struct
from typing import Any

import bson
import pytest
from disguise import HEADER, OP_MSG, OP_REPLY, Disguise

ADDRESSES = {"127.0.0.1:1": "127.0.0.1:91", "127.0.0.1:2": "127.0.0.1:92"}
HELLO = {
    "hosts": ["127.0.0.1:1", "127.0.0.1:2"],
    "setName": "s",
    "me": "127.0.0.1:2",
    "primary": "127.0.0.1:1",
    "ok": 1.0,
}
TOLD = {
    "hosts": ["127.0.0.1:91", "127.0.0.1:92"],
    "setName": "s",
    "me": "127.0.0.1:92",
    "primary": "127.0.0.1:91",
    "ok": 1.0,
}


def _message(operation: int, document: dict[str, Any]) -> bytes:
    before = struct.pack("<iqii", 8, 0, 0, 1) if operation == OP_REPLY else struct.pack("<iB", 0, 0)
    body = before + bson.encode(document)
    return HEADER.pack(HEADER.size + len(body), 7, 8, operation) + body


@pytest.mark.parametrize("operation", [OP_REPLY, OP_MSG])
@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_members_are_told_by_their_proxies(operation: int, piece: int) -> None:
    """A reply to hello names proxies, in both of its forms; the messages around it pass as they are."""
    other = _message(OP_MSG, {"cursor": {"firstBatch": [{"hosts": ["127.0.0.1:1"]}]}, "ok": 1.0})
    data = other + _message(operation, HELLO) + other
    disguise = Disguise(ADDRESSES)
    told = b"".join(disguise.feed(data[at : at + piece]) for at in range(0, len(data), piece))
    assert told == other + _message(operation, TOLD) + other


def test_half_a_message_waits() -> None:
    """Nothing is passed on before it is whole, and nothing is kept behind."""
    data = _message(OP_MSG, HELLO)
    disguise = Disguise(ADDRESSES)
    assert disguise.feed(data[:-1]) == b""
    assert disguise.feed(data[-1:] + data[:20]) == _message(OP_MSG, TOLD)
    assert disguise.feed(data[20:]) == _message(OP_MSG, TOLD)
