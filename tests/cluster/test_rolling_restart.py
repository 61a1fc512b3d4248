"""P9: three processes are restarted one after the other under two thousand clients, and nobody misses anything.

The clients do what SDKs do: told 3001 they come back after a while, to another
process, and recover there, while publications go on at all that are up.
"""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import correlation

import pytest
from crowd import ApiVoice, SocketVoice, World, last_words, write
from flock import Flock, Goodbye
from mongod import fresh_database, shared_set
from redis_server import shared_server
from stage import Running
from storm import read_all
from support import Process, config
from verdict import Kept, judge, summary

PROCESSES = 3
CLIENTS = 2_000
CHANNELS = [f"chat:{number}" for number in range(200)]
FOLLOWED = 2
"""Channels of one client, so that twenty clients share each."""

WRITERS = 6
PAUSE_S = 0.1
GRACE_S = 1.0
PACE = 200
"""Clients sent away in a second: the last process to be restarted has some 1,500 of them."""

TIMEOUT_S = 30.0
AT_ONCE = 20


@asynccontextmanager
async def _places(folder: Path) -> AsyncIterator[list[Running]]:
    """Processes over one history and one Redis, all ready; gone in the end."""
    database = fresh_database()
    chosen = config(
        client={
            "connection_rate_limit": 500,
            "recovery_rate_limit": 100,
            "address_connection_limit": 0,
            "user_connection_limit": 0,
        },
        shutdown={"grace": f"{GRACE_S}s", "pace": PACE, "timeout": f"{TIMEOUT_S}s"},
        mongo={"url": shared_set().url, "database": database},
        redis={"url": shared_server().url, "prefix": database},
    )
    places = []
    for number in range(PROCESSES):
        home = folder / f"process{number}"
        home.mkdir()
        places.append(Running(f"process {number}", Process(home, chosen)))
    try:
        await asyncio.gather(*(place.start() for place in places))
        await asyncio.gather(*(place.ready() for place in places))
        yield places
    finally:
        await asyncio.gather(*(asyncio.to_thread(place.process.kill) for place in places))


@pytest.mark.timeout(seconds=400)  # alone it takes 45 s, and beside all the others three times as long
async def test_a_rolling_restart_loses_nothing_and_keeps_the_pace(tmp_path: Path) -> None:
    """P2, P3, P9: everybody has each publication once and in order; goodbyes are 3001, by chance, never too fast."""
    began = time.monotonic()
    async with _places(tmp_path) as places:
        world = World(places, Random(9), lambda: time.monotonic() - began)
        flock = Flock(world)
        try:
            await _restarted_under_load(places, flock)
            world.notes.kept += await _history(places)
            await flock.arrived({kept.channel: len(kept.lines) for kept in world.notes.kept})
        finally:
            flock.scatter()
        faults = judge(world.notes)
        assert not faults, summary(faults)
        assert world.complaints == []
        assert [line for place in places for line in place.faults_logged()] == []
        assert world.counts["recoveries"] >= FOLLOWED * len(flock.goodbyes) > FOLLOWED * CLIENTS
        assert world.counts["acknowledged"] > len(CHANNELS) + 100
        assert world.counts["delivered"] > 5_000


async def _restarted_under_load(places: Sequence[Running], flock: Flock) -> None:
    """Everybody comes, then each process goes and comes again while all of them are written to; then a last word."""
    world = flock.world
    await flock.gather([world.random.sample(CHANNELS, FOLLOWED) for _ in range(CLIENTS)], places)
    voices = [(ApiVoice, SocketVoice)[number % 2](world, places[number % PROCESSES]) for number in range(WRITERS)]
    async with asyncio.TaskGroup() as writers:
        for number, voice in enumerate(voices):
            channels = world.random.sample(CHANNELS, len(CHANNELS))
            writers.create_task(write(world, f"writer{number}", channels, voice, keyed=True, pause_s=PAUSE_S))
        for place in places:
            await _restarted(place, flock)
        world.enough.set()
    await last_words(world, "last", CHANNELS, [ApiVoice(world, place) for place in places])


async def _restarted(place: Running, flock: Flock) -> None:
    """End a process as an operator does, and start it again; returns when everybody is somewhere."""
    here = {follower.name for follower in flock.followers if follower.place is place}
    said, told_at = len(flock.goodbyes), flock.world.clock()
    popen = place.process.popen
    assert popen is not None
    popen.send_signal(signal.SIGTERM)
    await asyncio.to_thread(popen.wait, 2 * TIMEOUT_S)
    assert place.process.wait() == 0
    await flock.until(lambda: len(flock.goodbyes) - said >= len(here))
    _sent_away_well(flock.goodbyes[said:], place.name, here, told_at + GRACE_S)
    await place.start()
    await place.ready()
    await flock.until(lambda: all(follower.settled for follower in flock.followers))


async def _history(places: Sequence[Running]) -> list[Kept]:
    """What is kept of each channel, as the processes in turn tell it."""
    kept: list[Kept] = []
    for first in range(0, len(CHANNELS), AT_ONCE):
        channels = CHANNELS[first : first + AT_ONCE]
        kept += await asyncio.gather(
            *(read_all(places[number % len(places)], channel) for number, channel in enumerate(channels))  # type: ignore[arg-type]
        )
    return kept


def _sent_away_well(goodbyes: Sequence[Goodbye], place: str, here: set[str], begins_at: float) -> None:
    """PROTOCOL 17.0.3: everybody was told 3001, in no order, and at no time had more been than the pace allows.

    It begins after the grace, and a goodbye arrives after it was said: so no load makes
    them come too early, and whoever is told too early is found out.  Clients that were
    not let in any more were told so at once, and are not among those who take turns.
    """
    assert Counter((bye.place, bye.code) for bye in goodbyes).keys() == {(place, 3001)}
    paced = [bye for bye in goodbyes if bye.welcomed_at]
    assert {bye.who for bye in paced} == here
    assert len(paced) == len(here) > CLIENTS // 4
    for told, bye in enumerate(paced):
        assert told <= (bye.at - begins_at) * PACE, f"{told} were told within {bye.at - begins_at:.3f} s"
    assert paced[-1].at - begins_at < TIMEOUT_S
    came = sorted(range(len(paced)), key=lambda at: paced[at].welcomed_at)
    assert abs(correlation(came, range(len(paced)))) < 0.25, "told to go in the order in which they came"
    neighbours = sum(bool({*one.channels} & {*other.channels}) for one, other in pairwise(paced))
    assert neighbours < len(paced) * 0.1, "told to go channel by channel"
