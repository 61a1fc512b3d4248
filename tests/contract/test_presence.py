"""The promises of ``server.presence``, asked of every kind.

A kind joins by a line in ``KINDS``: how to open several presences that know of
one another, as those of several processes do, each with a lease of ``LEASE_S``.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NamedTuple

import pytest

from server.presence import Presence
from server.presence.memory import Board, MemoryPresence
from server.stream import ClientInfo

NOW = 1_800_000_000.0
LEASE_S = 10.0


@asynccontextmanager
async def memory(count: int) -> AsyncIterator[list[Presence]]:
    """Presences of nodes inside one process."""
    board = Board()
    presences: list[Presence] = [MemoryPresence(LEASE_S, board) for _ in range(count)]
    for presence in presences:
        await presence.open(NOW)
    try:
        yield presences
    finally:
        for presence in presences:
            await presence.close()


class Kind(NamedTuple):
    """A kind under test."""

    name: str
    opened: Callable[[int], AbstractAsyncContextManager[list[Presence]]]


KINDS = [Kind("memory", memory)]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])

ANN = ClientInfo("ann", "a1", b'{"name":"Ann"}', b'["mod"]')
ANN2 = ClientInfo("ann", "a2")
BOB = ClientInfo("bob", "b1", b"\xff\x00")
NOBODY, NOBODY2 = ClientInfo("", "n1"), ClientInfo("", "n2")


@every_kind
async def test_everybody_sees_everybody(kind: Kind) -> None:
    """Entries of all processes are seen by all, with all they say; other channels are others."""
    async with kind.opened(2) as (one, other):
        await one.add("c", ANN)
        await other.add("c", BOB)
        await other.add("d", BOB)
        for presence in (one, other):
            assert await presence.members("c", NOW) == {"a1": ANN, "b1": BOB}
            assert await presence.members("d", NOW) == {"b1": BOB}
            assert await presence.members("nobody", NOW) == {}


@every_kind
async def test_adding_again_renews_the_entry(kind: Kind) -> None:
    """The same client again replaces what others see of it."""
    async with kind.opened(1) as (one,):
        await one.add("c", ANN)
        changed = ClientInfo("ann", "a1", b'{"name":"Anna"}')
        await one.add("c", changed)
        assert await one.members("c", NOW) == {"a1": changed}


@every_kind
async def test_removing(kind: Kind) -> None:
    """An entry is gone once removed, from this channel only; one that is not there may be removed."""
    async with kind.opened(2) as (one, other):
        for channel in ("c", "d"):
            await one.add(channel, ANN)
        await one.remove("c", "a1")
        await one.remove("c", "a1")
        await one.remove("nobody", "a1")
        assert await other.members("c", NOW) == {}
        assert await other.members("d", NOW) == {"a1": ANN}


@every_kind
async def test_counting(kind: Kind) -> None:
    """Clients are counted one by one, users once each, and all anonymous clients are one user."""
    async with kind.opened(2) as (one, other):
        assert await one.stats("c", NOW) == (0, 0)
        for presence, info in ((one, ANN), (other, ANN2), (one, BOB), (one, NOBODY), (other, NOBODY2)):
            await presence.add("c", info)
        for presence in (one, other):
            assert await presence.stats("c", NOW) == (5, 3)
        await one.remove("c", "n1")
        assert await one.stats("c", NOW) == (4, 3)
        await other.remove("c", "n2")
        assert await one.stats("c", NOW) == (3, 2)


@every_kind
async def test_who_does_not_renew_is_not_seen(kind: Kind) -> None:
    """When a lease has run out its entries are not seen or counted any more, swept or not."""
    async with kind.opened(2) as (quiet, alive):
        await quiet.add("c", ANN)
        await alive.add("c", BOB)
        assert await alive.renew(NOW + 5) is True
        assert await alive.members("c", NOW + LEASE_S - 0.5) == {"a1": ANN, "b1": BOB}
        assert await alive.members("c", NOW + LEASE_S + 0.5) == {"b1": BOB}
        assert await alive.stats("c", NOW + LEASE_S + 0.5) == (1, 1)


@every_kind
async def test_who_renews_stays(kind: Kind) -> None:
    """A lease that is renewed in time never runs out, and nobody sweeps its entries away."""
    async with kind.opened(2) as (one, other):
        await one.add("c", ANN)
        now = NOW
        for _ in range(20):
            now += LEASE_S / 2
            assert await one.renew(now) is True
            assert await other.renew(now) is True
            assert list(await other.sweep(now)) == []
        assert await other.members("c", now) == {"a1": ANN}


@every_kind
async def test_each_entry_is_swept_by_one_survivor(kind: Kind) -> None:
    """Three survivors sweep at once: each entry of the two dead is returned exactly once, and then never again."""
    async with kind.opened(5) as (dead, dead2, *survivors):
        expected = []
        for number in range(20):
            info = ClientInfo("ann", f"a{number}", b"%d" % number)
            await (dead if number % 2 else dead2).add(f"c{number % 3}", info)
            expected.append((f"c{number % 3}", info))
        for presence in survivors:
            await presence.add("c0", ClientInfo("sam", f"s{id(presence)}"))
        later = NOW + LEASE_S + 1
        for presence in survivors:
            await presence.renew(NOW + LEASE_S / 2)
        swept = [entry for found in await asyncio.gather(*(one.sweep(later) for one in survivors)) for entry in found]
        assert sorted(swept, key=repr) == sorted(expected, key=repr)
        for one in survivors:
            assert list(await one.sweep(later + 1)) == []
            assert await one.stats("c0", later) == (3, 1)
            assert await one.stats("c1", later) == (0, 0)


@every_kind
async def test_an_early_sweep_takes_nothing(kind: Kind) -> None:
    """Until the very end of a lease its entries are safe."""
    async with kind.opened(2) as (one, other):
        await one.add("c", ANN)
        assert list(await other.sweep(NOW + LEASE_S - 0.1)) == []
        assert await other.members("c", NOW) == {"a1": ANN}


@pytest.mark.parametrize("swept", [False, True])
@every_kind
async def test_a_process_that_comes_back(kind: Kind, swept: bool) -> None:
    """A process paused beyond its lease learns of it by ``renew``, adds its members again, and is seen again."""
    async with kind.opened(2) as (paused, other):
        await paused.add("c", ANN)
        later = NOW + LEASE_S + 1
        await other.renew(NOW + 5)
        if swept:
            assert list(await other.sweep(later)) == [("c", ANN)]
        assert await paused.renew(later) is False
        await paused.add("c", ANN)
        assert await paused.renew(later + 1) is True
        assert await other.members("c", later + 1) == {"a1": ANN}
        await other.renew(later)
        assert list(await other.sweep(later + 2)) == []


@every_kind
async def test_closing_takes_the_entries_along(kind: Kind) -> None:
    """A process that ends in order leaves nothing to be swept, and nothing of the others' is touched."""
    async with kind.opened(2) as (leaver, other):
        for info in (ANN, NOBODY):
            await leaver.add("c", info)
        await other.add("c", BOB)
        await leaver.close()
        assert await other.members("c", NOW) == {"b1": BOB}
        await other.renew(NOW + 5)
        assert list(await other.sweep(NOW + LEASE_S + 1)) == []


@every_kind
async def test_many_members(kind: Kind) -> None:
    """A thousand members in one channel and a thousand channels of one member are each found."""
    async with kind.opened(2) as (one, other):
        infos = [ClientInfo(f"u{number % 10}", f"c{number}") for number in range(1000)]
        await asyncio.gather(*(one.add("full", info) for info in infos))
        await asyncio.gather(*(one.add(f"c{number}", ANN) for number in range(1000)))
        assert await other.stats("full", NOW) == (1000, 10)
        assert await other.members("full", NOW) == {info.client: info for info in infos}
        assert len(await other.sweep(NOW + LEASE_S + 1)) == 2000
