"""permessage-deflate (RFC 7692): what is agreed on in a handshake, and one message at a time in and out of DEFLATE.

Neither side keeps anything from one message to the next ("no context takeover").
That costs some of the saving, but a message is then compressed once for all who get
it, as it is encoded once, and an idle connection holds no window.

So each message has a compressor of its own, and that must be cheap to make.  With a
window of 4 KB and tables to fit it takes 32 KB instead of zlib's usual 256 KB, which
the allocator may fetch from the system and give back each time: 270 bytes then took
from 5 to 190 µs.  The saving is the same up to 4 KB, and a few percent less above.
What it costs: benchmarks/README.md.

Pure.
"""

import re
import zlib

WINDOW_BITS = 12
MEMORY_LEVEL = 5
LARGEST_WINDOW_BITS = 15
TAIL = b"\x00\x00\xff\xff"
"""What ends the output of a flush, and is neither sent nor received (RFC 7692 7.2.1)."""

LAST = b"\x03\x00"
"""A last block without content (RFC 1951 3.2.3, 3.2.6): where a block can begin, it ends the stream."""

NAME = "permessage-deflate"
ACCEPTED = f"{NAME}; server_no_context_takeover; client_no_context_takeover"

_bits = re.compile(r"8|9|1[0-5]")


def accept(offered: str) -> str | None:
    """The ``Sec-WebSocket-Extensions`` to answer an offer of that header with, ``None`` for none (RFC 7692 5.1, 7.1).

    The first offer that we can keep to is taken.  A client that offers nothing
    about windows may use the largest one, and must read ours, which is small.
    """
    for offer in offered.split(","):
        name, *fields = (part.strip() for part in offer.split(";"))
        if name != NAME:
            continue
        parameters: dict[str, str] = {}
        for field in fields:
            key, _, value = (part.strip() for part in field.partition("="))
            parameters[key] = value.strip('"')
        if len(parameters) == len(fields) and _good(parameters):
            ours = parameters.get("server_max_window_bits")
            return ACCEPTED if ours is None else f"{ACCEPTED}; server_max_window_bits={WINDOW_BITS}"
    return None


def _good(parameters: dict[str, str]) -> bool:
    """Are these the parameters of an offer, and can we keep to them?  RFC 7692 7.1."""
    for key, value in parameters.items():
        match key:
            case "server_no_context_takeover" | "client_no_context_takeover":
                good = not value
            case "client_max_window_bits":
                good = not value or _bits.fullmatch(value) is not None
            case "server_max_window_bits":
                good = _bits.fullmatch(value) is not None and int(value) >= WINDOW_BITS
            case _:
                good = False
        if not good:
            return False
    return True


class Deflate:
    """Compresses the messages of a server; ``min_size`` is in bytes, ``level`` from 1 (quick) to 9 (small)."""

    def __init__(self, level: int, min_size: int) -> None:
        self._level = level
        self._min_size = min_size

    def compress(self, message: bytes) -> bytes | None:
        """The payload of a compressed message (RFC 7692 7.2.1), ``None`` if it is better sent as it is."""
        size = len(message)
        if size < self._min_size:
            return None
        compressor = zlib.compressobj(self._level, zlib.DEFLATED, -WINDOW_BITS, MEMORY_LEVEL)
        data = compressor.compress(message) + compressor.flush(zlib.Z_SYNC_FLUSH)
        return data[: -len(TAIL)] if len(data) - len(TAIL) < size else None


def inflate(data: bytes, most: int) -> bytes | None:
    """The message of a compressed payload (RFC 7692 7.2.2), ``None`` if it has more than ``most`` bytes.

    No more than that is unpacked, whatever it would become.  Raises ``ValueError``
    for what is no DEFLATE, or not all of it.

    zlib does not say whether it stopped inside a block: what was cut would pass as a
    shorter message.  So it is handed the end of an empty block, which nothing may come
    of, and one more block, which ends the stream only if one could begin there.  Two cuts
    cannot be told: one where a block ends, and one that leaves the octet 0 only, which is an
    empty message (RFC 7692 7.2.3.6).  What has ended by itself may be followed by the
    octet that RFC 7692 7.2.3.4 adds, and by nothing else: zlib would not look at it.
    """
    inflater = zlib.decompressobj(-LARGEST_WINDOW_BITS)
    try:
        message = inflater.decompress(data, most + 1)
        if len(message) > most:
            return None
        if inflater.eof:
            if inflater.unused_data not in (b"", b"\x00"):
                raise ValueError("there is something behind the last block")
            return message
        inside = inflater.decompress(TAIL, 1) or inflater.eof
        if inside or inflater.decompress(LAST, 1) or not inflater.eof:
            raise ValueError("it ends inside a block")
    except zlib.error as error:
        raise ValueError(str(error)) from None
    return message
