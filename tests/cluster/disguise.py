"""MongoDB's answers with other addresses in them, so that a driver stays behind the proxies it was given.

A driver that knows a replica set asks each member who belongs to it, and then
connects to whatever they say; a proxy would be left at once.  So what a member
says of the set (its reply to ``hello``) is told with the addresses of the proxies
instead.  Everything else passes as it is.  Bytes in, bytes out.

MongoDB wire protocol: a message is a header of four little-endian int32 (length,
id, answered id, operation) and a body; OP_MSG (2013) has flags and then, in
section 0, one BSON document; OP_REPLY (1) answers the first question of a
connection with 20 bytes and one document.
"""

import struct
from collections.abc import Mapping
from typing import Any

import bson

HEADER = struct.Struct("<iiii")
OP_REPLY, OP_MSG = 1, 2013
CHECKSUM_PRESENT = 1
BEFORE_DOCUMENT = {OP_REPLY: 20, OP_MSG: 5}
TELLS_OF_A_SET = b"\x04hosts\x00"
"""How an array of this name begins in BSON."""
NAMES = ("me", "primary")
LISTS = ("hosts", "passives", "arbiters")


class Disguise:
    """One connection's bytes from a member to a driver; ``addresses`` maps what members say to what is told."""

    def __init__(self, addresses: Mapping[str, str]) -> None:
        self._addresses = addresses
        self._waiting = b""

    def feed(self, data: bytes) -> bytes:
        """What to pass on now: whole messages only."""
        self._waiting += data
        told = []
        while len(self._waiting) >= HEADER.size:
            length = HEADER.unpack_from(self._waiting)[0]
            if len(self._waiting) < length:
                break
            message, self._waiting = self._waiting[:length], self._waiting[length:]
            told.append(self._told(message) if TELLS_OF_A_SET in message else message)
        return b"".join(told)

    def _told(self, message: bytes) -> bytes:
        _, id, answers, operation = HEADER.unpack_from(message)
        at = HEADER.size + BEFORE_DOCUMENT.get(operation, 0)
        if operation not in BEFORE_DOCUMENT or (operation == OP_MSG and message[at - 1] != 0):
            return message
        (flags,) = struct.unpack_from("<i", message, HEADER.size)
        if operation == OP_MSG and flags & CHECKSUM_PRESENT:
            return message
        (length,) = struct.unpack_from("<i", message, at)
        document: dict[str, Any] = bson.decode(message[at : at + length])
        if "setName" not in document:
            return message
        for name in NAMES:
            if name in document:
                document[name] = self._addresses.get(document[name], document[name])
        for name in LISTS:
            if name in document:
                document[name] = [self._addresses.get(host, host) for host in document[name]]
        body = message[HEADER.size : at] + bson.encode(document) + message[at + length :]
        return HEADER.pack(HEADER.size + len(body), id, answers, operation) + body
