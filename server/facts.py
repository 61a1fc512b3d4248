"""What each process says of itself, once a second, to all others (PROTOCOL 15.2, info).

``peers`` carries it and does not look into it; here it is written and read.
"""

from collections.abc import Iterable
from contextlib import suppress

import msgspec

from server.peers import Peer


class Facts(msgspec.Struct):
    """One process, as it says itself (PROTOCOL 15.2, info); ``uptime`` in seconds."""

    uid: str
    name: str
    version: str
    num_clients: int
    num_users: int
    num_channels: int
    num_subs: int
    uptime: int


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Facts)


def encode(facts: Facts) -> bytes:
    """The bytes of what a process says, as ``read`` reads them."""
    return _encoder.encode(facts)


def read(peers: Iterable[Peer]) -> list[Facts]:
    """What other processes last said; who speaks otherwise is left out."""
    found = []
    for peer in peers:
        with suppress(msgspec.DecodeError):  # of another version; it is there all the same
            found.append(_decoder.decode(peer.facts))
    return found
