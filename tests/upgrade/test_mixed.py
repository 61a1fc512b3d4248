"""Processes that do not understand one another, since one of them is of another version: for a while, in an update."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from conftest import ExpectedLog
from redis_server import shared_server, unique_prefix
from support import PATIENCE_S, Client, Site, serving, settings

from server.broker.redis import VERSION, RedisBroker
from server.history.memory import Log, MemoryHistory
from server.node import TOPS_S
from server.presence.memory import Board, MemoryPresence
from server.settings import RedisSettings


class NewerBroker(RedisBroker):
    """As a release to come will speak."""

    version = VERSION + 1


@asynccontextmanager
async def mixed() -> AsyncIterator[tuple[Site, Site]]:
    """A process of today and one of the next version, at one store and one Redis."""
    log, board = Log(), Board()
    redis = RedisSettings(url=shared_server().url, prefix=unique_prefix())

    def site(kind: type[RedisBroker]) -> AbstractAsyncContextManager[Site]:
        return serving(
            settings(), history=MemoryHistory(log=log), broker=kind(redis), presence=MemoryPresence(10.0, board)
        )

    async with site(RedisBroker) as today, site(NewerBroker) as newer:
        yield today, newer


async def test_kept_channels_miss_nothing(log: ExpectedLog) -> None:
    """What either publishes the other's subscribers get, in order and once, when tops are compared; no hole is left."""
    log.expect("broker.unreadable")
    async with mixed() as sites:
        clients = [await Client.connected(site.url) for site in sites]
        for client in clients:
            await client.ask("subscribe", channel="chat:1")
        for round_ in range(3):
            for number in range(10):
                await clients[number % 2].ask("publish", channel="chat:1", data=[round_, number])
            for site, client in zip(sites, clients, strict=True):
                site.pass_time(TOPS_S + 1)
                found = await client.publications("chat:1", 10)
                assert [one["data"] for one in found] == [[round_, number] for number in range(10)]
                assert [one["offset"] for one in found] == list(range(round_ * 10 + 1, round_ * 10 + 11))
        async with asyncio.timeout(PATIENCE_S):
            while len(log.seen("broker.unreadable")) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # a log tells nobody that something was written to it
    told = [str(fields["why"]) for fields in log.seen("broker.unreadable")]
    assert len(told) == 2, "each said it once, whatever came"
    for spoken, understood in ((VERSION, VERSION + 1), (VERSION + 1, VERSION)):
        words = f"speak version {spoken} to one another, this one version {understood}"
        assert sum(words in one for one in told) == 1


async def test_who_comes_back_to_the_other_one_recovers(log: ExpectedLog) -> None:
    """A position of one process is good at the other, as in any rolling update."""
    log.expect("broker.unreadable")
    async with mixed() as (today, newer):
        writer = await Client.connected(newer.url)
        client = await Client.connected(today.url)
        since = await client.ask("subscribe", channel="chat:1")
        await client.close()
        for number in range(5):
            await writer.ask("publish", channel="chat:1", data=number)
        back = await Client.connected(newer.url)
        answer = await back.ask(
            "subscribe", channel="chat:1", recover=True, offset=since.get("offset", 0), epoch=since.get("epoch", "")
        )
        assert answer["recovered"]
        assert [one["data"] for one in answer["publications"]] == list(range(5))
