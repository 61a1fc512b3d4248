"""What goes on while a part is away, and that nothing is lost or left behind when it is back.

Two nodes in this process, each on a port, share a bus, a log and a board; the
parts are the embedded ones, which a test may take away.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from conftest import ExpectedLog
from patience import impatient
from support import Client, Site, serving, token
from tornado.httpclient import AsyncHTTPClient

from server.broker import Note, Published, Word
from server.broker.memory import Bus, MemoryBroker
from server.errors import Unavailable
from server.history import Appended, Draft
from server.history.memory import Log, MemoryHistory
from server.presence.memory import Board, MemoryPresence
from server.stream import ClientInfo, Page, Position, Retention

AWAY = "redis.url: nobody answers"

SHORT_S = 0.2
"""How long a process that does not answer is waited for."""


class FickleBroker(MemoryBroker):
    """A broker that can be taken away; what is said meanwhile is lost, what is wished stands."""

    def __init__(self, bus: Bus) -> None:
        super().__init__(bus)
        self._wishes: set[str] = set()

    def leave(self) -> None:
        """Be away from now on."""
        self.trouble = AWAY

    async def come_back(self) -> None:
        """Be back, with all wishes fulfilled."""
        self.trouble = ""
        for channel in self._wishes:
            await super().follow(channel)
        self.on_return()

    async def follow(self, channel: str) -> None:
        """See ``Broker.follow``."""
        self._wishes.add(channel)
        if self.trouble:
            raise Unavailable(self.trouble)
        await super().follow(channel)

    async def unfollow(self, channel: str) -> None:
        """See ``Broker.unfollow``."""
        self._wishes.discard(channel)
        await super().unfollow(channel)

    def announce(self, word: Word) -> None:
        """See ``Broker.announce``."""
        if not self.trouble:
            super().announce(word)

    def tell(self, note: Note, to: str = "") -> None:
        """See ``Broker.tell``."""
        if not self.trouble:
            super().tell(note, to)

    def _hear(self, word: Word) -> None:
        if not self.trouble:
            super()._hear(word)

    def _note(self, note: Note) -> None:
        if not self.trouble:
            super()._note(note)


class FicklePresence(MemoryPresence):
    """Presence that can be taken away."""

    away = False

    def _look(self) -> None:
        if self.away:
            raise Unavailable(AWAY)

    async def add(self, channel: str, info: ClientInfo) -> None:
        """See ``Presence.add``."""
        self._look()
        await super().add(channel, info)

    async def remove(self, channel: str, client: str) -> bool:
        """See ``Presence.remove``."""
        self._look()
        return await super().remove(channel, client)

    async def members(self, channel: str, now: float) -> dict[str, ClientInfo]:
        """See ``Presence.members``."""
        self._look()
        return await super().members(channel, now)

    async def renew(self, now: float) -> bool:
        """See ``Presence.renew``."""
        self._look()
        return await super().renew(now)

    async def sweep(self, now: float) -> list[tuple[str, ClientInfo]]:
        """See ``Presence.sweep``."""
        self._look()
        return await super().sweep(now)


class FickleHistory(MemoryHistory):
    """History that can be taken away, and whose answers can be held back: ``reading`` is set while one is."""

    def __init__(self, log: Log) -> None:
        super().__init__(log)
        self.answering = asyncio.Event()
        self.answering.set()
        self.reading = asyncio.Event()

    def _look(self) -> None:
        if self.trouble:
            raise Unavailable(self.trouble)

    async def open(self) -> None:
        """See ``History.open``."""
        self._look()

    async def append(self, channel: str, draft: Draft, retention: Retention, now_ms: int) -> Appended:
        """See ``History.append``."""
        self._look()
        return await super().append(channel, draft, retention, now_ms)

    async def read(self, channel: str, retention: Retention, now_ms: int, **options: Any) -> Page:
        """See ``History.read``."""
        self._look()
        page = await super().read(channel, retention, now_ms, **options)
        self.reading.set()
        await self.answering.wait()
        return page

    async def tops(self, channels: Iterable[str]) -> dict[str, Position]:
        """See ``History.tops``."""
        self._look()
        return await super().tops(channels)


class Here(Site):
    """One of the two, with its parts at hand."""

    broker: FickleBroker
    presence: FicklePresence
    history: FickleHistory


@asynccontextmanager
async def two() -> AsyncIterator[tuple[Here, Here]]:
    """Two nodes that share everything."""
    bus, log, board = Bus(), Log(), Board()
    async with one(bus, log, board) as here, one(bus, log, board) as there:
        there.pass_time(1)
        here.pass_time(1)
        yield here, there


@asynccontextmanager
async def one(bus: Bus, log: Log, board: Board, *, history_away: bool = False) -> AsyncIterator[Here]:
    """One node."""
    broker, history, presence = FickleBroker(bus), FickleHistory(log), FicklePresence(10.0, board)
    if history_away:
        history.trouble = "mongo.url: nobody answers"
    async with serving(broker=broker, history=history, presence=presence, patiently=True) as site:
        site.__class__ = Here
        assert isinstance(site, Here)
        site.broker, site.history, site.presence = broker, history, presence
        yield site


async def _pass(site: Site, seconds: int) -> None:
    """Let time pass for one of the two, which does all of its work in it."""
    for _ in range(seconds):
        site.pass_time(1)
        await site.node.tasks.idle()


async def call(site: Site, method: str, **request: Any) -> dict[str, Any]:
    """One call of the back-end API, whatever it answers."""
    response = await AsyncHTTPClient().fetch(
        f"http://127.0.0.1:{site.port}/api/{method}",
        method="POST",
        body=json.dumps(request),
        headers={"X-API-Key": "api-key"},
    )
    return dict(json.loads(response.body))


async def ready(site: Site) -> tuple[int, Any]:
    """What the load balancer hears."""
    response = await AsyncHTTPClient().fetch(f"http://127.0.0.1:{site.port}/health/ready", raise_error=False)
    return response.code, json.loads(response.body)


# --- the broker -----------------------------------------------------------------
async def test_without_the_broker_everybody_stays_and_a_sweep_finds_what_was_said(log: ExpectedLog) -> None:
    """Kept channels go on by the sweep of each second, new subscriptions too; nobody is disconnected or refused."""
    log.expect("broker.unavailable")
    async with two() as (here, there):
        speaker, early = await Client.connected(here.url), await Client.connected(there.url)
        await early.ask("subscribe", channel="chat:1")
        there.broker.leave()
        late = await Client.connected(there.url)
        await late.ask("subscribe", channel="chat:1")
        await late.ask("subscribe", channel="live:1")
        for number in range(3):
            await speaker.ask("publish", channel="chat:1", data=number)
        there.pass_time(1)
        for client in (early, late):
            assert [pub["offset"] for pub in await client.publications("chat:1", 3)] == [1, 2, 3]
            assert client.close_code is None
        assert (await ready(there))[0] == 503
        await late.ask("publish", channel="live:1", data="here at least")
        assert (await late.push("pub", "live:1"))["data"] == "here at least"


async def test_when_the_broker_is_back_what_was_missed_comes_at_once(log: ExpectedLog) -> None:
    """The return itself repairs, without a sweep; channels subscribed meanwhile are heard then, passing ones too."""
    log.expect("broker.unavailable")
    async with two() as (here, there):
        speaker, hearer = await Client.connected(here.url), await Client.connected(there.url)
        await hearer.ask("subscribe", channel="chat:1")
        there.broker.leave()
        await hearer.ask("subscribe", channel="live:1")
        await speaker.ask("publish", channel="chat:1", data="missed")
        await speaker.ask("publish", channel="live:1", data="lost")
        await there.broker.come_back()
        assert (await hearer.push("pub", "chat:1"))["data"] == "missed"
        await speaker.ask("publish", channel="live:1", data="heard")
        assert (await hearer.push("pub", "live:1"))["data"] == "heard"
        assert await ready(there) == (200, {"ready": True})


# --- presence -------------------------------------------------------------------
async def test_without_presence_one_may_subscribe_and_is_entered_later(log: ExpectedLog) -> None:
    """A subscription does not need it; asking who is here is error 100; a renewal later everybody is there."""
    log.expect("presence.unavailable")
    async with two() as (here, there):
        there.presence.away = True
        client = await Client.connected(there.url)
        await client.ask("subscribe", channel="chat:1")
        assert await client.refused("presence", channel="chat:1") == 100
        there.presence.away = False
        there.pass_time(4)
        asker = await Client.connected(here.url)
        await there.node.tasks.idle()
        assert set((await asker.ask("presence", channel="chat:1"))["presence"]) == {client.hello["client"]}


async def test_who_leaves_while_presence_is_away_is_gone_later(log: ExpectedLog) -> None:
    """The removal is made up for when presence is back, and one who was never entered is not entered then."""
    log.expect("presence.unavailable")
    async with two() as (here, there):
        staying, client = await Client.connected(here.url), await Client.connected(there.url)
        await client.ask("subscribe", channel="chat:1")
        there.presence.away = True
        await client.ask("unsubscribe", channel="chat:1")
        await client.ask("subscribe", channel="chat:2")
        await client.ask("unsubscribe", channel="chat:2")
        for channel in ("chat:1", "chat:2"):
            there.presence.away = False
            there.pass_time(4)
            await there.node.tasks.idle()
            assert (await staying.ask("presence", channel=channel))["presence"] == {}


async def test_a_leave_that_a_survivor_has_told_is_not_told_again() -> None:
    """A process paused beyond its lease: others hear one leave of its member, also when that really leaves then."""
    async with two() as (here, there):
        watcher, paused = await Client.connected(here.url), await Client.connected(there.url)
        await watcher.ask("subscribe", channel="chat:1", join_leave=True)
        await paused.ask("subscribe", channel="chat:1")
        assert (await watcher.push("join", "chat:1"))["info"]["client"] == watcher.hello["client"]
        assert (await watcher.push("join", "chat:1"))["info"]["client"] == paused.hello["client"]
        await _pass(here, 14)
        assert (await watcher.push("leave", "chat:1"))["info"]["client"] == paused.hello["client"]
        await paused.ask("unsubscribe", channel="chat:1")
        await there.node.tasks.idle()
        await watcher.ask("publish", channel="chat:1", data="a mark behind all that was told")
        await watcher.push("pub", "chat:1")
        assert [push for push in watcher.pushes if "leave" in push] == []


async def test_a_paused_process_enters_its_members_anew_and_says_so() -> None:
    """When it is back its members are there again, and the others who were told that they left hear a join."""
    async with two() as (here, there):
        watcher, paused = await Client.connected(here.url), await Client.connected(there.url)
        await watcher.ask("subscribe", channel="chat:1", join_leave=True)
        await paused.ask("subscribe", channel="chat:1")
        await _pass(here, 14)
        assert (await watcher.push("leave", "chat:1"))["info"]["client"] == paused.hello["client"]
        watcher.pushes.clear()
        there.clock.ahead_s += 13
        there.pass_time(1)
        await there.node.tasks.idle()
        assert (await watcher.push("join", "chat:1"))["info"]["client"] == paused.hello["client"]
        members = (await watcher.ask("presence", channel="chat:1"))["presence"]
        assert set(members) == {watcher.hello["client"], paused.hello["client"]}


# --- history --------------------------------------------------------------------
async def test_without_history_only_what_needs_it_is_refused(log: ExpectedLog) -> None:
    """Kept publications, new kept subscriptions and reads are 100; passing ones, presence and live ones go on."""
    log.expect("history.unavailable", "channel.repair_failed")
    async with two() as (here, there):
        client, other = await Client.connected(here.url), await Client.connected(here.url)
        await client.ask("subscribe", channel="chat:1")
        here.history.trouble = "mongo.url: no primary"
        assert await client.refused("publish", channel="chat:1", data=1) == 100
        assert await other.refused("subscribe", channel="chat:1") == 100
        assert await client.refused("history", channel="chat:1", limit=1) == 100
        await client.ask("subscribe", channel="live:1")
        await other.ask("publish", channel="live:1", data="passing")
        assert (await client.push("pub", "live:1"))["data"] == "passing"
        assert client.hello["client"] in (await other.ask("presence", channel="chat:1"))["presence"]
        assert await ready(here) == (503, {"ready": False, "reasons": {"history": "mongo.url: no primary"}})
        here.history.trouble = ""
        writer = await Client.connected(there.url)
        await writer.ask("publish", channel="chat:1", data="after")
        assert (await client.push("pub", "chat:1"))["data"] == "after"
        assert await ready(here) == (200, {"ready": True})


async def test_a_server_that_starts_before_its_history(log: ExpectedLog) -> None:
    """It listens and says that it is not ready and why; when history can be opened it is, without a restart."""
    log.expect("history.unavailable")
    async with one(Bus(), Log(), Board(), history_away=True) as site:
        client = await Client.connected(site.url)
        assert await client.refused("publish", channel="chat:1", data=1) == 100
        assert await ready(site) == (503, {"ready": False, "reasons": {"history": "mongo.url: nobody answers"}})
        site.history.trouble = ""
        await site.node.tasks.idle()
        assert await ready(site) == (200, {"ready": True})
        await client.ask("publish", channel="chat:1", data=1)


# --- between processes ------------------------------------------------------------
async def test_orders_reach_connections_elsewhere_before_the_call_is_answered() -> None:
    """Subscribe, refresh, unsubscribe and disconnect of a user take effect at the other process."""
    async with two() as (here, there):
        client = await Client.connected(there.url, token=token({"sub": "ann", "exp": 4_000_000_000}))
        assert await call(here, "subscribe", user="ann", channel="chat:1", data={"hi": 1}) == {"result": {}}
        assert (await client.push("subscribe", "chat:1"))["data"] == {"hi": 1}
        assert await call(here, "refresh", user="ann", expire_at=4_000_000_001) == {"result": {}}
        assert (await client.push("refresh"))["expires"] is True
        assert await call(here, "unsubscribe", user="ann", channel="chat:1") == {"result": {}}
        assert (await client.push("unsubscribe", "chat:1"))["code"] == 2000
        assert await call(here, "disconnect", user="ann") == {"result": {}}
        assert await client.closed() == (3503, "force disconnect")
        assert there.node.users == {}


async def test_an_order_that_is_not_answered_is_error_100_and_still_carried_out() -> None:
    """The caller learns that a process has not answered; when that is back it obeys."""
    async with two() as (here, there):
        client = await Client.connected(there.url, token=token({"sub": "ann"}))
        there.broker.leave()
        with impatient(SHORT_S):
            assert (await call(here, "disconnect", user="ann"))["error"]["code"] == 100
        assert client.close_code is None
        await there.broker.come_back()
        assert await client.closed() == (3503, "force disconnect")


async def test_info_lists_every_process() -> None:
    """info names both, with what each holds."""
    async with two() as (here, there):
        client = await Client.connected(there.url)
        await client.ask("subscribe", channel="chat:1")
        there.pass_time(1)
        await there.node.tasks.idle()
        nodes = {node["uid"]: node for node in (await call(here, "info"))["result"]["nodes"]}
        assert set(nodes) == {here.node.id, there.node.id}
        assert nodes[there.node.id]["num_clients"] == 1
        assert nodes[there.node.id]["num_subs"] == 1
        assert nodes[here.node.id]["num_clients"] == 0


@pytest.mark.parametrize("size", [100, 20_000], ids=["announced whole", "announced by position"])
async def test_a_burst_from_elsewhere_arrives_without_a_sweep(size: int) -> None:
    """The last of many publications comes as soon as the first, also when only positions are announced."""
    async with two() as (here, there):
        speaker, hearer = await Client.connected(here.url), await Client.connected(there.url)
        await hearer.ask("subscribe", channel="chat:1")
        commands = [speaker.command("publish", channel="chat:1", data="x" * size) for _ in range(50)]
        for start in range(0, 50, 2):
            await speaker.send(*commands[start : start + 2])
        assert [pub["offset"] for pub in await hearer.publications("chat:1", 50)] == list(range(1, 51))


async def test_what_was_removed_is_not_recalled_elsewhere() -> None:
    """history_remove at one process clears what another still has in memory for those who come back."""
    async with two() as (here, there):
        speaker, first = await Client.connected(here.url), await Client.connected(there.url)
        await first.ask("subscribe", channel="chat:1")
        for number in range(5):
            await speaker.ask("publish", channel="chat:1", data=number)
        await first.publications("chat:1", 5)
        epoch = (await speaker.ask("history", channel="chat:1"))["epoch"]
        assert there.node.hub.feeds["chat:1"].tail, "without a tail this test shows nothing"
        assert await call(here, "history_remove", channel="chat:1") == {"result": {}}
        late = await Client.connected(there.url)
        result = await late.ask("subscribe", channel="chat:1", recover=True, offset=2, epoch=epoch)
        assert "recovered" not in result
        assert "publications" not in result


async def test_a_top_that_is_announced_during_a_repair_is_repaired_as_well() -> None:
    """What was published after the page of a repair was read, and announced before it came, waits for no sweep."""
    async with two() as (here, there):
        speaker, hearer = await Client.connected(here.url), await Client.connected(there.url)
        await hearer.ask("subscribe", channel="chat:1")
        there.broker.leave()
        await speaker.ask("publish", channel="chat:1", data=1)
        epoch = (await speaker.ask("history", channel="chat:1"))["epoch"]
        there.history.answering.clear()
        there.history.reading.clear()
        there.node.heard(Published("chat:1", Position(1, epoch)))
        await there.history.reading.wait()
        await speaker.ask("publish", channel="chat:1", data=2)
        there.node.heard(Published("chat:1", Position(2, epoch)))
        there.history.answering.set()
        assert [pub["offset"] for pub in await hearer.publications("chat:1", 2)] == [1, 2]
