"""Who asks, and from where: the origin of a page, and the address behind proxies.  Pure."""

import ipaddress
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

ORIGIN_CHARACTERS = 512
"""What is longer is no origin: a host's name has 253 at most.  With two ``*`` the work grows with the square of it."""


@lru_cache(maxsize=256)
def _origin_pattern(pattern: str) -> re.Pattern[str]:
    anything = r"[^\s/?#@]*"  # never out of the host and port that the pattern stands for
    return re.compile(anything.join(re.escape(part) for part in pattern.split("*")), re.IGNORECASE)


def origin_allowed(origin: str | None, patterns: Iterable[str]) -> bool:
    """May a page of this ``Origin`` header connect (PROTOCOL 2.2)?

    A request without one comes from no browser and may.  In a pattern ``*``
    stands for any part of a host or port; the pattern ``*`` alone allows all,
    ``null`` included.  What is longer than ``ORIGIN_CHARACTERS`` matches no other.
    """
    if not origin:
        return True
    short = len(origin) <= ORIGIN_CHARACTERS
    return any(pattern == "*" or (short and _origin_pattern(pattern).fullmatch(origin)) for pattern in patterns)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Read an address as proxies write it, maybe with a port, an IPv6 one maybe in brackets; ``None`` if it is none."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def client_address(peer: str, forwarded_for: str, trusted: Sequence[Network]) -> str:
    """Say where a request comes from: the peer, or whom trusted proxies name.

    ``peer`` is the socket's other end, ``forwarded_for`` the ``X-Forwarded-For``
    header ("" for none).  Each proxy adds on the right whom it was asked by, so
    from the right the first address that is no trusted proxy is the truth, and
    anybody may have written what stands left of it.  What cannot be read is not
    walked over.
    """
    found = _address(peer)
    if found is None:
        return peer
    for text in reversed(forwarded_for.split(",") if forwarded_for else ()):
        if not any(found in network for network in trusted):
            break
        before = _address(text)
        if before is None:
            break
        found = before
    return str(found)
