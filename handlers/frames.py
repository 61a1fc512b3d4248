"""RFC 6455 frames in and out of bytes.

A server's half of the framing, and nothing else: no socket, no clock, no idea of
what a message means.  ``Parser`` takes bytes as they come off a socket, cut
anywhere, and gives messages and control frames; the ``*_frame`` functions give
the bytes of frames to a client, which are never masked (RFC 6455 5.1).

Theory of operation.  ``feed`` what was read, then call ``next_event`` until it
returns ``None``.  A parser between two frames holds nothing; inside of a frame it
holds what has come of it; inside of a fragmented message also the fragments,
joined, so that an empty fragment costs nothing.  What is wrong with a frame is
said as soon as its header tells it, before its payload is waited for.  After a
close frame or a ``Violation`` the parser is deaf: RFC 6455 5.5.1 and 7.1.7 want
nothing behind these looked at.

Pure, but for Tornado's masking function in C: the one loop over payload bytes that
Python cannot do at speed.
"""

import struct

import msgspec
from tornado.util import _websocket_mask

from handlers.deflate import inflate

TEXT = 0x1
BINARY = 0x2
CLOSE = 0x8
PING = 0x9
PONG = 0xA

FIN = 0x80
RESERVED = 0x70
COMPRESSED = 0x40
FIN_TEXT = FIN | TEXT
MASKED = 0x80
LENGTH_16 = 126
LENGTH_64 = 127
CONTROL_BYTES = 125

MANY = 2**31

PROTOCOL_ERROR = 1002
INVALID_PAYLOAD = 1007
MESSAGE_TOO_BIG = 1009


class Ping(msgspec.Struct, frozen=True):
    """The peer wants a pong with the same ``data``, 0 to 125 bytes (RFC 6455 5.5.2)."""

    data: bytes


class Pong(msgspec.Struct, frozen=True):
    """The peer answered a ping, or just lives (RFC 6455 5.5.3)."""

    data: bytes


class Close(msgspec.Struct, frozen=True):
    """The peer sends no more (RFC 6455 5.5.1); ``code`` is ``None`` if it gave no reason.

    The caller must send a close frame, unless it has, and close the connection.
    """

    code: int | None = None
    reason: str = ""


Event = bytes | Ping | Pong | Close
"""What ``Parser.next_event`` gives; ``bytes`` is a whole message, its fragments joined."""


class Violation(Exception):
    """The peer broke RFC 6455: send a close frame with ``code`` and ``reason``, and close the connection."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.reason = reason


class Parser:
    """Turns the bytes of one client into events; see the module's docstring.

    ``limit`` is the number of bytes that a message may have, as it comes and,
    where it is compressed, as it is.  ``compression`` was agreed on or not.
    """

    __slots__ = ("_at", "_compression", "_data", "_deaf", "_first", "_limit", "_message", "_need", "_partial")

    def __init__(self, limit: int, *, compression: bool = False) -> None:
        self._limit = limit
        self._compression = compression
        self._data = b""
        self._at = 0
        self._partial: bytearray | None = None
        self._need = 0
        self._message: bytearray | None = None
        self._first = 0
        """Of the unfinished message: what its first fragment says of it."""
        self._deaf = False

    @property
    def held_bytes(self) -> int:
        """Bytes of unfinished frames and messages, and of frames not asked for yet."""
        return len(self._data) - self._at + len(self._partial or b"") + len(self._message or b"")

    def feed(self, data: bytes) -> None:
        """Take what came off the socket, at least one byte."""
        if self._deaf:
            return
        partial = self._partial
        if partial is not None:
            # Grows in place, and is looked at only when enough has come: a peer that
            # sends a byte at a time costs no more than the bytes.
            partial += data
            if len(partial) >= self._need:
                self._data = bytes(partial)
                self._partial = None
        elif self._at < len(self._data):
            self._data = self._data[self._at :] + data
            self._at = 0
        else:
            self._data = data
            self._at = 0

    def sole_text(self, data: bytes) -> bytes | None:
        """The message, if ``data`` is one whole text frame below 64 KB, and nothing before it is left; else ``None``.

        A short way for what most reads bring.  Whatever else came is to be fed as
        it is; nothing is judged or kept here.
        """
        have = len(data)
        if have < 6 or data[0] != FIN_TEXT or self._data or self._partial is not None or self._message is not None:
            return None
        size = data[1] - MASKED
        head = 2
        if size == LENGTH_16:
            size = data[2] << 8 | data[3]
            head = 4
            if size < LENGTH_16:
                return None
        elif not 0 <= size < LENGTH_16:
            return None
        if head + 4 + size != have or size > self._limit or self._deaf:
            return None
        payload = _websocket_mask(data[head : head + 4], data[head + 4 :])
        return payload if payload.isascii() else None

    @property
    def unread(self) -> bool:
        """Is there anything that ``next_event`` has not looked at?"""
        return self._at < len(self._data)

    def next_event(self, fragments: int = MANY) -> Event | None:
        """Give what comes next, or ``None`` when more bytes are needed for that, or after so many ``fragments``.

        Raises ``Violation``.
        """
        while True:
            data = self._data
            at = self._at
            have = len(data) - at
            if have < 2:
                self._wait_for(2)
                return None
            first = data[at]
            size = data[at + 1] - MASKED
            head = at + 2
            # The everyday frame, a short text that stands alone, needs none of the checks
            # but those on its payload.
            if first != FIN_TEXT or not 0 <= size < LENGTH_16 or self._message is not None:
                self._check_header(first, size)
                if size >= LENGTH_16:
                    width = 2 if size == LENGTH_16 else 8
                    if have < 2 + width:
                        self._wait_for(2 + width)
                        return None
                    size = int.from_bytes(data[head : head + width], "big")
                    self._check_length(size, width)
                    head += width
            if size > self._limit - len(self._message or b"") and not first & 0x8:
                raise self._violation(MESSAGE_TOO_BIG, f"message above {self._limit} bytes")
            end = head + 4 + size
            if end > len(data):
                self._wait_for(end - at)
                return None
            payload = _websocket_mask(data[head : head + 4], data[head + 4 : end])
            if end == len(data):
                self._data = b""
                self._at = 0
            else:
                self._at = end
            if first == FIN_TEXT:
                return self._utf8(payload)
            event = self._event(first, payload)
            if event is not None:
                return event
            fragments -= 1
            if not fragments:
                return None

    def _wait_for(self, need: int) -> None:
        """Keep what is left, at most a frame of which ``need`` bytes are wanted before it is looked at again."""
        if self._at < len(self._data):
            self._partial = bytearray(self._data[self._at :])
            self._need = need
            self._data = b""
        self._at = 0

    def _check_header(self, first: int, size: int) -> None:
        """Judge the two bytes that every frame has; ``size`` is the second one less the mask bit (RFC 6455 5.2)."""
        opcode = first & 0x0F
        if first & RESERVED and not (self._compression and first & RESERVED == COMPRESSED and opcode in (TEXT, BINARY)):
            raise self._violation(PROTOCOL_ERROR, "reserved bits are set that mean nothing here")  # and RFC 7692 6.1
        if size < 0:
            raise self._violation(PROTOCOL_ERROR, "frame of a client is not masked")  # 5.1
        if opcode & 0x8:
            if opcode > PONG:
                raise self._violation(PROTOCOL_ERROR, "unknown opcode")
            if not first & FIN:
                raise self._violation(PROTOCOL_ERROR, "control frame is fragmented")  # 5.5
            if size > CONTROL_BYTES:
                raise self._violation(PROTOCOL_ERROR, "control frame above 125 bytes")  # 5.5
        elif opcode > BINARY:
            raise self._violation(PROTOCOL_ERROR, "unknown opcode")
        elif opcode and self._message is not None:
            raise self._violation(PROTOCOL_ERROR, "new message inside of a fragmented one")  # 5.4
        elif not opcode and self._message is None:
            raise self._violation(PROTOCOL_ERROR, "continuation of nothing")  # 5.4

    def _check_length(self, size: int, width: int) -> None:
        """Judge a length of ``width`` bytes: the shortest form must be used, and 63 bits (RFC 6455 5.2)."""
        if size >> 63:
            raise self._violation(PROTOCOL_ERROR, "length with its top bit set")
        if size < LENGTH_16 or (width == 8 and size < 0x10000):
            raise self._violation(PROTOCOL_ERROR, "length not in its shortest form")

    def _event(self, first: int, payload: bytes) -> Event | None:
        """Say what a frame means that ``_check_header`` let through; ``None`` for a fragment that does not end."""
        opcode = first & 0x0F
        if opcode == PING:
            return Ping(payload)
        if opcode == PONG:
            return Pong(payload)
        if opcode == CLOSE:
            return self._close(payload)
        if first & FIN and opcode:
            return self._whole(first, payload)
        if opcode:
            self._message = bytearray(payload)
            self._first = first
            return None
        assert self._message is not None
        self._message += payload
        if not first & FIN:
            return None
        # Validated once it is whole: a character may be cut by a fragment's end, and the
        # limit keeps small what an invalid message can cost.
        message = bytes(self._message)
        self._message = None
        return self._whole(self._first, message)

    def _whole(self, first: int, payload: bytes) -> bytes:
        """The message of a payload that is all there; ``first`` is the first byte of its first frame."""
        if first & COMPRESSED:
            try:
                message = inflate(payload, self._limit)
            except ValueError:
                raise self._violation(INVALID_PAYLOAD, "compressed message is no DEFLATE") from None
            if message is None:
                raise self._violation(MESSAGE_TOO_BIG, f"compressed message above {self._limit} bytes")
            payload = message
        return self._utf8(payload) if first & 0x0F == TEXT else payload

    def _utf8(self, payload: bytes) -> bytes:
        """Let only UTF-8 pass (RFC 6455 8.1)."""
        if not payload.isascii():
            try:
                payload.decode()
            except UnicodeDecodeError:
                raise self._violation(INVALID_PAYLOAD, "text is not UTF-8") from None
        return payload

    def _close(self, payload: bytes) -> Close:
        """Read a close frame's code and reason (RFC 6455 5.5.1)."""
        if not payload:
            self._shut()
            return Close()
        if len(payload) == 1:
            raise self._violation(PROTOCOL_ERROR, "close frame of one byte")
        code = int.from_bytes(payload[:2], "big")
        if not is_close_code(code):
            raise self._violation(PROTOCOL_ERROR, "close code that no peer may send")
        reason = self._utf8(payload[2:]).decode()
        self._shut()
        return Close(code, reason)

    def stop(self) -> None:
        """Go deaf: what comes from now on, and what was not asked for yet, is dropped unread."""
        self._shut()

    def _violation(self, code: int, reason: str) -> Violation:
        """Go deaf, and give what to raise."""
        self._shut()
        return Violation(code, reason)

    def _shut(self) -> None:
        self._deaf = True
        self._data = b""
        self._at = 0
        self._partial = None
        self._message = None


def is_close_code(code: int) -> bool:
    """May this code stand in a close frame (RFC 6455 7.4 and IANA's registry, 1012 to 1014, as of 2026)?"""
    return 3000 <= code < 5000 or (1000 <= code <= 1014 and code not in (1004, 1005, 1006))


def message_frame(opcode: int, payload: bytes) -> bytes:
    """A whole frame with this opcode, and with ``COMPRESSED`` as well where ``payload`` is."""
    size = len(payload)
    if size < LENGTH_16:
        return bytes((FIN | opcode, size)) + payload
    if size < 0x10000:
        return _HEAD_16(FIN | opcode, LENGTH_16, size) + payload
    return _HEAD_64(FIN | opcode, LENGTH_64, size) + payload


_HEAD_16 = struct.Struct("!BBH").pack
_HEAD_64 = struct.Struct("!BBQ").pack


def ping_frame(data: bytes = b"") -> bytes:
    """A ping; raises ``ValueError`` above 125 bytes."""
    return _control_frame(PING, data)


def pong_frame(data: bytes = b"") -> bytes:
    """A pong with the data of the ping that it answers; raises ``ValueError`` above 125 bytes."""
    return _control_frame(PONG, data)


def close_frame(code: int | None = None, reason: str = "") -> bytes:
    """A close frame, without a payload if ``code`` is ``None``.

    Raises ``ValueError`` for a code that must not be sent, a reason without a
    code, and one above 123 bytes of UTF-8 (RFC 6455 5.5.1).
    """
    if code is None:
        if reason:
            raise ValueError(f"a reason needs a close code, got only {reason!r}")
        return message_frame(CLOSE, b"")
    if not is_close_code(code):
        raise ValueError(f"expected a close code that may be sent, got {code}")
    return _control_frame(CLOSE, code.to_bytes(2, "big") + reason.encode())


def _control_frame(opcode: int, payload: bytes) -> bytes:
    if len(payload) > CONTROL_BYTES:
        raise ValueError(f"a control frame carries at most {CONTROL_BYTES} bytes, got {len(payload)}")
    return message_frame(opcode, payload)


def frame_around(frames: bytes | bytearray, at: int) -> tuple[int, int]:
    """Where the frame begins and ends that byte ``at`` falls into, in a run of whole frames to a client.

    Both are ``at`` if a frame begins there.  ``at`` must not be beyond the end.
    """
    begin = end = 0
    while end < at:
        begin = end
        size = frames[begin + 1]
        if size < LENGTH_16:
            end = begin + 2 + size
        elif size == LENGTH_16:
            end = begin + 4 + int.from_bytes(frames[begin + 2 : begin + 4], "big")
        else:
            end = begin + 10 + int.from_bytes(frames[begin + 2 : begin + 10], "big")
    return (end, end) if end == at else (begin, end)
