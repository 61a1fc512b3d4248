"""Many come back at once: what that costs history.  PROTOCOL 11.3, 11.5."""

import asyncio
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from mongod import fresh_database, shared_set
from support import PATIENTLY, Client, serving

from server.errors import Unavailable
from server.history import PAGE_BYTES, PAGE_PUBLICATIONS, Appended, Draft, History, Retention, RetentionOf
from server.history.memory import MemoryHistory
from server.history.mongo import MongoHistory
from server.settings import MongoSettings
from server.stream import Page, Position

CLIENTS = 1_000
MISSED = 90
FOREVER = Retention(-1, -1, -1)


class CountingHistory(History):
    """Another history that counts what it is asked for."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.queries: list[tuple[str, int | None]] = []

    async def open(self) -> None:
        """Open it, and listen to its commits in its stead."""
        await self.history.open()
        self.history.on_commit = self.on_commit

    async def close(self) -> None:
        """Close it."""
        await self.history.close()

    async def append(self, channel: str, draft: Draft, retention: Retention, now_ms: int) -> Appended:
        """Not counted: a write."""
        return await self.history.append(channel, draft, retention, now_ms)

    def heard(self, channel: str, top: Position, time_ms: int = 0) -> None:
        """Passed on."""
        self.history.heard(channel, top, time_ms)

    async def read(
        self,
        channel: str,
        retention: Retention,
        now_ms: int,
        *,
        since: int | None = None,
        limit: int = PAGE_PUBLICATIONS,
        max_bytes: int = PAGE_BYTES,
        reverse: bool = False,
    ) -> Page:
        """Count a read."""
        self.queries.append((channel, since))
        return await self.history.read(
            channel, retention, now_ms, since=since, limit=limit, max_bytes=max_bytes, reverse=reverse
        )

    async def tops(self, channels: Iterable[str]) -> dict[str, Position]:
        """Count a query for tops."""
        self.queries.append(("tops", None))
        return await self.history.tops(channels)

    async def remove(self, channel: str) -> None:
        """Not counted."""
        await self.history.remove(channel)

    async def redact(self, channel: str, offset: int) -> None:
        """Not counted."""
        await self.history.redact(channel, offset)

    async def sweep(self, retention_of: RetentionOf, now_ms: int) -> None:
        """Not counted: once a second, whoever is here."""
        await self.history.sweep(retention_of, now_ms)

    async def new_epochs(self) -> int:
        """Not counted."""
        return await self.history.new_epochs()


@contextmanager
def made(kind: str) -> Iterator[History]:
    """A history of a kind, nothing in it."""
    if kind == "memory":
        yield MemoryHistory()
        return
    database = fresh_database()
    options: dict[str, Any] = {"url": shared_set().url, "database": database, "publish_timeout": PATIENTLY}
    yield MongoHistory(MongoSettings.model_validate(options))
    shared_set().drop(database)


@pytest.mark.parametrize("kind", ["memory", "mongo"])
async def test_a_thousand_return_to_one_channel(kind: str) -> None:
    """All of them recover what they missed, each another part of the last page, for at most five history queries."""
    lots = random.Random(1)
    with made(kind) as inner:
        history = CountingHistory(inner)
        async with serving(history=history) as site:
            clients = [await Client.connected(site.url) for _ in range(CLIENTS)]
            appends = (
                history.append("chat:1", Draft(b"%d" % n), FOREVER, site.node.now_ms) for n in range(1, 2 * MISSED + 1)
            )
            appended = await asyncio.gather(*appends)
            epoch, top = appended[-1].position.epoch, appended[-1].position.offset
            history.queries.clear()

            async def come_back(client: Client) -> None:
                since = lots.randrange(top - MISSED, top + 1)
                result = await client.ask("subscribe", channel="chat:1", recover=True, offset=since, epoch=epoch)
                assert result["recovered"]
                got = [publication["offset"] for publication in result.get("publications", [])]
                assert got == list(range(since + 1, top + 1))

            await asyncio.gather(*map(come_back, clients))
            assert 1 <= len(history.queries) <= 5
            # They are live, and not for a query each.
            await clients[0].ask("publish", channel="chat:1", data="news")
            for client in clients:
                assert (await client.push("pub"))["offset"] == top + 1
            assert len(history.queries) <= 5
            await asyncio.gather(*(client.close() for client in clients))


async def test_a_return_while_history_is_away_costs_nobody_the_others() -> None:
    """Those who come back to a channel that cannot be read get error 100 together, for one query."""

    class Away(CountingHistory):
        async def read(self, channel: str, retention: Retention, now_ms: int, **how: Any) -> Page:
            await super().read(channel, retention, now_ms, **how)
            raise Unavailable("no primary")

    history = Away(MemoryHistory())
    async with serving(history=history) as site:
        clients = [await Client.connected(site.url) for _ in range(50)]
        refusals = await asyncio.gather(
            *(client.refused("subscribe", channel="chat:1", recover=True, offset=0, epoch="") for client in clients)
        )
        assert refusals == [100] * 50
        assert len(history.queries) <= 5
        await asyncio.gather(*(client.close() for client in clients))
