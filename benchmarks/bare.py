"""A WebSocket client's bytes, written by hand: for those who say what no library would."""

import json
from typing import Any

HANDSHAKE = (
    b"GET /connection/websocket HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
"""The opening handshake without its last, empty line, so that headers may follow."""


def frame(first: int, payload: bytes = b"") -> bytes:
    """A frame of a client (RFC 6455 5.2) whose mask is nothing; ``first`` is its first byte, FIN bit and opcode."""
    size = len(payload)
    head = bytes((first, 0x80 | size)) if size < 126 else bytes((first, 0xFE)) + size.to_bytes(2, "big")
    return head + bytes(4) + payload


def command(**said: Any) -> bytes:
    """One command in a text frame of its own."""
    return frame(0x81, json.dumps(said).encode())


def end_of_frame(data: bytes | bytearray) -> int:
    """Where the first frame of a server ends; beyond the data while that cannot be said."""
    if len(data) < 2:
        return 2
    size, head = data[1], 2
    if size >= 126:
        head += 2 if size == 126 else 8
        if len(data) < head:
            return head
        size = int.from_bytes(data[2:head], "big")
    return head + size
