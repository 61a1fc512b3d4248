"""The promises of ``server.presence``, asked of every kind.

A kind joins by a line in ``KINDS``: how to open several presences that know of
one another, as those of several processes do, each with a lease of ``LEASE_S``,
and how time passes for them.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, NamedTuple

import pytest
import redis
from redis.exceptions import MovedError
from redis_server import RedisServer, shared_cluster, shared_sentinels, shared_server, unique_prefix

from server.errors import Unavailable
from server.presence import Presence
from server.presence.memory import Board, MemoryPresence
from server.presence.redis import RedisPresence
from server.presence.scripts import Keys
from server.settings import RedisSettings
from server.stream import ClientInfo

NOW = 1_800_000_000.0
LEASE_S = 1000.0
MOMENT_S = 10.0
"""Little of a lease, and more than any of these tests really takes."""


class Place:
    """Where several presences share a memory: their clock, and what makes time pass there."""

    def __init__(self) -> None:
        self._now = NOW

    @property
    def now(self) -> float:
        """What the clock of a process says."""
        return self._now

    async def pass_time(self, seconds: float) -> None:
        """Let ``seconds`` pass for all."""
        self._now += seconds


Opened = AsyncIterator[tuple[Any, ...]]
"""A ``Place`` and as many presences as were asked for."""


@asynccontextmanager
async def memory(count: int, opened: bool = True) -> Opened:
    """Presences of nodes inside one process."""
    board = Board()
    async with _opened(Place(), [MemoryPresence(LEASE_S, board) for _ in range(count)], opened) as place:
        yield place


class RedisPlace(Place):
    """A Redis: what passes there is its own time, so each lease is made as much older.

    The clocks of the processes are wrong, each by another half minute.
    """

    def __init__(self, servers: Sequence[RedisServer], prefix: str) -> None:
        super().__init__()
        self._servers = servers
        self._leases = Keys(prefix).leases
        self._skew = itertools.cycle((0.0, 30.0, -30.0, 17.0))

    @property
    def now(self) -> float:
        """See ``Place.now``."""
        return self._now + next(self._skew)

    async def pass_time(self, seconds: float) -> None:
        """See ``Place.pass_time``."""
        self._now += seconds
        for server in self._servers:
            try:
                server.command("EVAL", AGE, 1, self._leases, str(int(seconds * 1000)))
            except (redis.ReadOnlyError, MovedError):
                continue  # the leases are not here


AGE = """
for _, incarnation in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    redis.call('ZINCRBY', KEYS[1], -ARGV[1], incarnation)
end
"""


@asynccontextmanager
async def redis_alone(count: int, opened: bool = True) -> Opened:
    """Presences of processes that share one Redis."""
    server = shared_server()
    async with _in_redis(server.url, [server], count, opened) as place:
        yield place


@asynccontextmanager
async def redis_sentinel(count: int, opened: bool = True) -> Opened:
    """The same, found through Sentinels."""
    sentinels = shared_sentinels()
    async with _in_redis(sentinels.url, sentinels.servers, count, opened) as place:
        yield place


@asynccontextmanager
async def redis_cluster(count: int, opened: bool = True) -> Opened:
    """The same in a cluster of three."""
    cluster = shared_cluster()
    async with _in_redis(cluster.url, cluster.servers, count, opened) as place:
        yield place


@asynccontextmanager
async def _in_redis(url: str, servers: Sequence[RedisServer], count: int, opened: bool) -> Opened:
    settings = RedisSettings(url=url, prefix=unique_prefix())
    presences = [RedisPresence(settings, LEASE_S) for _ in range(count)]
    async with _opened(RedisPlace(servers, settings.prefix), presences, opened) as place:
        yield place


@asynccontextmanager
async def _opened(place: Place, presences: Sequence[Presence], opened: bool) -> Opened:
    if opened:
        for presence in presences:
            await presence.open(place.now)
    try:
        yield place, *presences
    finally:
        for presence in presences:
            await presence.close()


class Kind(NamedTuple):
    """A kind under test."""

    name: str
    opened: Callable[..., AbstractAsyncContextManager[tuple[Any, ...]]]


KINDS = [
    Kind("memory", memory),
    Kind("redis", redis_alone),
    Kind("redis-sentinel", redis_sentinel),
    Kind("redis-cluster", redis_cluster),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])

ANN = ClientInfo("ann", "a1", b'{"name":"Ann"}', b'["mod"]')
ANN2 = ClientInfo("ann", "a2")
BOB = ClientInfo("bob", "b1", b"\xff\x00")
NOBODY, NOBODY2 = ClientInfo("", "n1"), ClientInfo("", "n2")


async def sweep_all(presence: Presence, now: float) -> list[tuple[str, ClientInfo]]:
    """Sweep until nothing is left to be cleared away."""
    swept: list[tuple[str, ClientInfo]] = []
    while some := await presence.sweep(now):
        swept.extend(some)
    return swept


@every_kind
async def test_everybody_sees_everybody(kind: Kind) -> None:
    """Entries of all processes are seen by all, with all they say; other channels are others."""
    async with kind.opened(2) as (place, one, other):
        await one.add("c", ANN)
        await other.add("c", BOB)
        await other.add("d", BOB)
        for presence in (one, other):
            assert await presence.members("c", place.now) == {"a1": ANN, "b1": BOB}
            assert await presence.members("d", place.now) == {"b1": BOB}
            assert await presence.members("nobody", place.now) == {}


@every_kind
async def test_any_name_will_do(kind: Kind) -> None:
    """Channels, users and clients of any letters, braces and lengths stay apart and come back as they were."""
    channels = ["}", "{", "{}", "a}b", "a%7Db", "a b\n", "é:ü#42,7", "x" * 255, "c:entries", "c}:entries", "%"]
    async with kind.opened(2) as (place, one, other):
        for number, channel in enumerate(channels):
            await one.add(channel, ClientInfo(f"ü{channel}", f"é{number}", b"", channel.encode()))
        for number, channel in enumerate(channels):
            expected = ClientInfo(f"ü{channel}", f"é{number}", b"", channel.encode())
            assert await other.members(channel, place.now) == {f"é{number}": expected}
            assert await other.stats(channel, place.now) == (1, 1)
        await place.pass_time(LEASE_S + MOMENT_S)
        await other.renew(place.now)
        assert await other.renew(place.now)
        assert sorted(channel for channel, _ in await sweep_all(other, place.now)) == sorted(channels)


@every_kind
async def test_adding_again_renews_the_entry(kind: Kind) -> None:
    """The same client again replaces what others see of it, and is still counted once."""
    async with kind.opened(1) as (place, one):
        await one.add("c", ANN)
        changed = ClientInfo("ann the second", "a1", b'{"name":"Anna"}')
        await one.add("c", changed)
        assert await one.members("c", place.now) == {"a1": changed}
        assert await one.stats("c", place.now) == (1, 1)


@every_kind
async def test_removing(kind: Kind) -> None:
    """An entry is gone once removed, from this channel only; one that is not there may be removed."""
    async with kind.opened(2) as (place, one, other):
        for channel in ("c", "d"):
            await one.add(channel, ANN)
        assert await one.remove("c", "a1") is True
        assert await one.remove("c", "a1") is False
        assert await one.remove("nobody", "a1") is False
        assert await other.members("c", place.now) == {}
        assert await other.stats("c", place.now) == (0, 0)
        assert await other.members("d", place.now) == {"a1": ANN}


@every_kind
async def test_an_entry_belongs_to_its_newest_owner(kind: Kind) -> None:
    """A client that is added elsewhere is another process's: its old owner's removal, end and death leave it alone."""
    async with kind.opened(4) as (place, remover, closer, quiet, newest):
        moved = ClientInfo("ann", "a1", b"elsewhere")
        for presence in (remover, closer, quiet):
            await presence.add("c", ANN)
        await newest.add("c", moved)
        assert await remover.remove("c", "a1") is False
        await closer.close()
        assert await newest.members("c", place.now) == {"a1": moved}
        assert await newest.stats("c", place.now) == (1, 1)
        await place.pass_time(LEASE_S / 2)
        await newest.renew(place.now)
        await place.pass_time(LEASE_S / 2 + MOMENT_S)
        assert list(await newest.sweep(place.now)) == []
        assert await newest.members("c", place.now) == {"a1": moved}
        assert await newest.remove("c", "a1") is True
        assert await newest.stats("c", place.now) == (0, 0)


@every_kind
async def test_coming_and_going_without_end(kind: Kind) -> None:
    """However many come and go in whatever order, who was added last is there, and the counts are right."""
    async with kind.opened(2) as (place, one, other):
        for round in range(10):
            infos = [ClientInfo(f"u{number % 3}", f"c{number}") for number in range(30)]
            await asyncio.gather(*((one, other)[number % 2].add("c", info) for number, info in enumerate(infos)))
            leaving = range(round, 30)
            gone = await asyncio.gather(*((one, other)[number % 2].remove("c", f"c{number}") for number in leaving))
            assert all(gone)
            assert await one.stats("c", place.now) == (round, min(round, 3))
            assert set(await other.members("c", place.now)) == {f"c{number}" for number in range(round)}
            await asyncio.gather(
                *((one, other)[number % 2].remove("c", f"c{number}") for number in range(round)),
            )
        await place.pass_time(LEASE_S + MOMENT_S)
        await other.renew(place.now)
        await other.renew(place.now)
        assert await sweep_all(other, place.now) == []


@every_kind
async def test_counting(kind: Kind) -> None:
    """Clients are counted one by one, users once each, and all anonymous clients are one user."""
    async with kind.opened(2) as (place, one, other):
        assert await one.stats("c", place.now) == (0, 0)
        for presence, info in ((one, ANN), (other, ANN2), (one, BOB), (one, NOBODY), (other, NOBODY2)):
            await presence.add("c", info)
        for presence in (one, other):
            assert await presence.stats("c", place.now) == (5, 3)
        await one.remove("c", "n1")
        assert await one.stats("c", place.now) == (4, 3)
        await other.remove("c", "n2")
        assert await one.stats("c", place.now) == (3, 2)


@every_kind
async def test_who_does_not_renew_is_not_seen(kind: Kind) -> None:
    """When a lease has run out its entries are not seen or counted any more, swept or not."""
    async with kind.opened(2) as (place, quiet, alive):
        for info in (ANN, NOBODY):
            await quiet.add("c", info)
        for info in (BOB, ANN2):
            await alive.add("c", info)
        await place.pass_time(LEASE_S / 2)
        assert await alive.renew(place.now) is True
        await place.pass_time(LEASE_S / 2 - MOMENT_S)
        assert await alive.members("c", place.now) == {"a1": ANN, "n1": NOBODY, "b1": BOB, "a2": ANN2}
        assert await alive.stats("c", place.now) == (4, 3)
        await place.pass_time(2 * MOMENT_S)
        assert await alive.members("c", place.now) == {"b1": BOB, "a2": ANN2}
        assert await alive.stats("c", place.now) == (2, 2)


@every_kind
async def test_who_renews_stays(kind: Kind) -> None:
    """A lease that is renewed in time never runs out, and nobody sweeps its entries away."""
    async with kind.opened(2) as (place, one, other):
        await one.add("c", ANN)
        for _ in range(20):
            await place.pass_time(LEASE_S / 2)
            assert await one.renew(place.now) is True
            assert await other.renew(place.now) is True
            assert list(await other.sweep(place.now)) == []
        assert await other.members("c", place.now) == {"a1": ANN}


@every_kind
async def test_each_entry_is_swept_by_one_survivor(kind: Kind) -> None:
    """Three survivors sweep at once: each entry of the two dead is returned exactly once, and then never again."""
    async with kind.opened(5) as (place, dead, dead2, *survivors):
        expected = []
        for number in range(500):
            info = ClientInfo("ann", f"a{number}", b"%d" % number)
            expected.append((f"c{number % 3}", info))
        await asyncio.gather(
            *((dead, dead2)[number % 2].add(channel, info) for number, (channel, info) in enumerate(expected))
        )
        for presence in survivors:
            await presence.add("c0", ClientInfo("sam", f"s{id(presence)}"))
        await place.pass_time(LEASE_S / 2)
        for presence in survivors:
            await presence.renew(place.now)
        await place.pass_time(LEASE_S / 2 + MOMENT_S)
        swept = []
        while found := [
            entry for some in await asyncio.gather(*(one.sweep(place.now) for one in survivors)) for entry in some
        ]:
            swept.extend(found)
        assert sorted(swept, key=repr) == sorted(expected, key=repr)
        for one in survivors:
            assert list(await one.sweep(place.now)) == []
            assert await one.stats("c0", place.now) == (3, 1)
            assert await one.stats("c1", place.now) == (0, 0)


@every_kind
async def test_an_early_sweep_takes_nothing(kind: Kind) -> None:
    """Until the very end of a lease its entries are safe."""
    async with kind.opened(2) as (place, one, other):
        await one.add("c", ANN)
        await place.pass_time(LEASE_S - MOMENT_S)
        assert list(await other.sweep(place.now)) == []
        assert await other.members("c", place.now) == {"a1": ANN}


@pytest.mark.parametrize("swept", [False, True])
@every_kind
async def test_a_process_that_comes_back(kind: Kind, swept: bool) -> None:
    """A process paused beyond its lease learns of it by ``renew``, adds its members again, and is seen again."""
    async with kind.opened(2) as (place, paused, other):
        await paused.add("c", ANN)
        await place.pass_time(LEASE_S / 2)
        await other.renew(place.now)
        await place.pass_time(LEASE_S / 2 + MOMENT_S)
        if swept:
            assert list(await other.sweep(place.now)) == [("c", ANN)]
        assert await paused.renew(place.now) is False
        await paused.add("c", ANN)
        await place.pass_time(MOMENT_S)
        assert await paused.renew(place.now) is True
        assert await other.members("c", place.now) == {"a1": ANN}
        await other.renew(place.now)
        assert list(await other.sweep(place.now)) == []
        assert await other.stats("c", place.now) == (1, 1)


@pytest.mark.parametrize("takes", ["sweep", "remove"])
@every_kind
async def test_a_new_life_does_not_own_what_the_old_one_had(kind: Kind, takes: str) -> None:
    """What is not added again after ``renew`` was ``False`` is unseen, and taken once: by a sweep or its process."""
    async with kind.opened(2) as (place, paused, other):
        await paused.add("c", ANN)
        await place.pass_time(LEASE_S / 2)
        await other.renew(place.now)
        await place.pass_time(LEASE_S / 2 + MOMENT_S)
        assert await paused.renew(place.now) is False
        assert await paused.members("c", place.now) == {}
        if takes == "remove":
            assert await paused.remove("c", "a1") is True
            assert await sweep_all(other, place.now) == []
        else:
            assert await sweep_all(other, place.now) == [("c", ANN)]
            assert await paused.remove("c", "a1") is False


@every_kind
async def test_closing_takes_the_entries_along(kind: Kind) -> None:
    """A process that ends in order leaves nothing to be swept, and nothing of the others' is touched."""
    async with kind.opened(2) as (place, leaver, other):
        for info in (ANN, NOBODY):
            await leaver.add("c", info)
        await other.add("c", BOB)
        await leaver.close()
        assert await other.members("c", place.now) == {"b1": BOB}
        assert await other.stats("c", place.now) == (1, 1)
        await place.pass_time(LEASE_S / 2)
        await other.renew(place.now)
        await place.pass_time(LEASE_S / 2 + MOMENT_S)
        assert list(await other.sweep(place.now)) == []


@every_kind
async def test_nothing_before_it_is_open(kind: Kind) -> None:
    """Until ``open`` has returned an entry cannot be made, and afterwards it can."""
    async with kind.opened(1, opened=False) as (place, one):
        with pytest.raises(Unavailable):
            await one.add("c", ANN)
        with pytest.raises(Unavailable):
            await one.renew(place.now)
        await one.open(place.now)
        await one.add("c", ANN)
        assert await one.members("c", place.now) == {"a1": ANN}


@every_kind
async def test_many_members(kind: Kind) -> None:
    """A thousand members in one channel and a thousand channels of one member are each found."""
    async with kind.opened(2) as (place, one, other):
        infos = [ClientInfo(f"u{number % 10}", f"c{number}") for number in range(1000)]
        await asyncio.gather(*(one.add("full", info) for info in infos))
        await asyncio.gather(*(one.add(f"c{number}", ANN) for number in range(1000)))
        assert await other.stats("full", place.now) == (1000, 10)
        assert await other.members("full", place.now) == {info.client: info for info in infos}
        await place.pass_time(LEASE_S / 2)
        await other.renew(place.now)
        await place.pass_time(LEASE_S / 2 + MOMENT_S)
        swept = await sweep_all(other, place.now)
        assert len(swept) == len(set(swept)) == 2000
