"""How often something may be done: token buckets, and one bucket over many processes.

A bucket holds so many tokens at most, each deed takes one, and they come back at a
steady rate.  Here it is a single number, the time at which it will be full again
(the virtual scheduling of ITU-T I.371, "GCRA"): a deed moves that time on by what one
token takes to come back, and may not move it further ahead than a whole bucket
takes.  So the hot path pays a comparison and an addition, and nothing has to be
filled up meanwhile.

What one user may publish in one channel is counted over all processes, in
``Quotas``.  Each process has a bucket of its own for them; of what is spent from it
the others are told, an eighth of a second's allowance at a time, and take it out of
theirs.  What that promises, of N processes:

* who publishes at one process has the whole rate, wherever that is;
* in any second, beyond what the bucket held, at most the rate times 1 + (N - 1)/8 gets
  through, and what words on their way have not told yet;
* what was told late is paid for later: over many seconds it is the rate;
* with the broker away each process counts for itself, which is N times the rate.

Tried and dropped: a counter in Redis for each user, channel and second is exact, and
a round trip before every publication, the passing ones that never needed Redis
included; tokens leased from Redis in chunks wait only sometimes, but for every newly
active pair, which is most of them; an equal share for each process gives a user
with one connection an Nth of what was promised.

Pure: ``now`` is handed in, in seconds.  PROTOCOL 18.
"""

import ipaddress
import math
from collections.abc import Callable
from functools import lru_cache

import msgspec

ADDRESSES = 10_000
"""How many addresses are remembered before the one that asked longest ago is forgotten."""

TOLD_PART = 8
"""How many times a second's allowance is told of while it is spent."""


class Rate(msgspec.Struct, frozen=True):
    """A bucket's measures: ``cost_s`` is what a token takes to come back, ``most_s`` what all of them and a half do.

    The half is for fractions: 200 times a 200th, added to a time of ten digits, is a
    hair more than 1.  Without a limit a deed costs nothing, and there is always room for it.
    """

    cost_s: float
    most_s: float

    @classmethod
    def of(cls, per_second: float, burst: float = 0) -> "Rate":
        """So many a second, and so many at once (0: as many as in a second); ``per_second`` of 0 is no limit."""
        if not per_second:
            return cls(0.0, math.inf)
        cost_s = 1 / per_second
        return cls(cost_s, (max(1.0, burst or per_second) + 0.5) * cost_s)

    def take(self, full_at: float, now: float) -> float | None:
        """When the bucket will be full again if one token is taken of it now; ``None`` if it has none.

        ``full_at`` is what this said last, 0.0 at first.
        """
        full_at = max(full_at, now) + self.cost_s
        return None if full_at > now + self.most_s else full_at


class Bucket:
    """One bucket, for what is no hot path."""

    __slots__ = ("_full_at", "_rate")

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._full_at = 0.0

    def __repr__(self) -> str:
        return f"<Bucket {self._rate} full at {self._full_at}>"

    def take(self, now: float) -> bool:
        """Take a token; false if there is none."""
        full_at = self._rate.take(self._full_at, now)
        if full_at is None:
            return False
        self._full_at = full_at
        return True

    def wait_s(self, now: float, ahead: int = 0) -> float:
        """How long it is until there is a token, once ``ahead`` others have had theirs; 0.0 if there is one now.

        A thousandth of a token's time too long, for fractions: whoever waits so long finds one.
        """
        cost_s, most_s = self._rate.cost_s, self._rate.most_s
        full_at = max(self._full_at, now) + (ahead + 1) * cost_s
        return full_at - most_s - now + cost_s / 1000 if full_at > now + most_s else 0.0


# --- addresses ---------------------------------------------------------------------
class Buckets:
    """A token bucket for each address, or name: ``per_minute`` come back in each minute; 0: no limit.

    It holds ``burst`` of them, or as many as come in a minute.

    An IPv6 host has a whole network of addresses, so its first 64 bits count.
    Memory is bounded: a full bucket need not be remembered.
    """

    def __init__(self, per_minute: int, addresses: int = ADDRESSES, *, burst: int = 0) -> None:
        self._size = float(burst or per_minute)
        self._rate = per_minute / 60
        self._addresses = addresses
        self._buckets: dict[str, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, address: str, now: float) -> float:
        """Take one for ``address``: 0.0 if there was one, else the seconds until there will be.

        ``now`` is in seconds and never goes back.
        """
        if not self._rate:
            return 0.0
        key = network(address)
        left, filled_at = self._buckets.pop(key, (self._size, now))
        left = min(self._size, left + (now - filled_at) * self._rate)
        wait_s = 0.0 if left >= 1 else (1 - left) / self._rate
        self._buckets[key] = (left if wait_s else left - 1, now)  # at the end: in order of the last question
        if len(self._buckets) > self._addresses:
            del self._buckets[next(iter(self._buckets))]
        return wait_s


@lru_cache(maxsize=4096)
def network(address: str) -> str:
    """What of an address stands for one host: of IPv6 its first 64 bits."""
    try:
        host = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(host, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((host, 64), strict=False))
    return str(host)


Owner = tuple[str, str]
"""Who answers for what is asked: a user, or who has none an address, as the other one of the two."""


def owner_of(user: str, address: str) -> Owner:
    """Who answers for what comes of ``user`` (``""`` for none) at ``address``; no user's name is an address."""
    return (user, "") if user else ("", network(address))


# --- over processes ----------------------------------------------------------------
class _Quota:
    """What is left to one key: when its bucket is full again, and how much the others have not been told."""

    __slots__ = ("full_at", "untold")

    def __init__(self) -> None:
        self.full_at = 0.0
        self.untold = 0


Key = tuple[str, str]
"""Whose quota, and for what: a user, or a client without one, and a channel."""


class Quotas:
    """A bucket for each key, over processes; see the module's docstring.

    ``tell`` is called with a key and how many were taken of it here since it was last
    called with that; the other processes give both to ``heard``.  Call ``forget``
    now and then.
    """

    def __init__(self, per_second: int, tell: Callable[[Key, int], None]) -> None:
        self._rate = Rate.of(per_second)
        self._tell = tell
        self._told = max(1, per_second // TOLD_PART)
        self._quotas: dict[Key, _Quota] = {}

    def __len__(self) -> int:
        return len(self._quotas)

    def take(self, key: Key, now: float) -> bool:
        """Take one of the quota of ``key``; false if there is none."""
        cost_s = self._rate.cost_s
        if not cost_s:
            return True
        quota = self._quotas.get(key)
        if quota is None:
            quota = self._quotas[key] = _Quota()
        full_at = quota.full_at  # ``Rate.take``, here without its call: each publication comes this way
        full_at = (full_at if full_at > now else now) + cost_s
        if full_at > now + self._rate.most_s:
            return False
        quota.full_at = full_at
        quota.untold += 1
        if quota.untold >= self._told:
            count, quota.untold = quota.untold, 0
            self._tell(key, count)
        return True

    def heard(self, key: Key, count: int, now: float) -> None:
        """Another process has spent so much of it.

        The debt that comes of it is bounded by one more bucket: a word that was said
        twice, or by a process with another rate, costs a user a second and no more.
        """
        if not self._rate.cost_s or count <= 0:
            return
        quota = self._quotas.get(key)
        if quota is None:
            quota = self._quotas[key] = _Quota()
        full_at = max(quota.full_at, now) + count * self._rate.cost_s
        quota.full_at = min(full_at, now + 2 * self._rate.most_s)

    def forget(self, now: float) -> None:
        """Forget the buckets that are full: they are like new ones."""
        for key in [key for key, quota in self._quotas.items() if quota.full_at <= now]:
            del self._quotas[key]

    def rewind(self, seconds: float) -> None:
        """The clock was set back by so much: what comes back does not wait until it is then again."""
        for quota in self._quotas.values():
            quota.full_at -= seconds
