"""Between processes: what a second reading found, each as the story of how it went wrong."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from conftest import ExpectedLog
from patience import impatient
from redis_server import RedisServer
from support import Client, Site, serving, settings, token
from test_away import AWAY, SHORT_S, FickleBroker, FickleHistory, FicklePresence, call, one, ready, two

from server import orders
from server.broker import ANNOUNCED_BYTES, Published, Word
from server.broker.memory import Bus, MemoryBroker
from server.broker.redis import RedisBroker
from server.errors import Unavailable
from server.history.memory import Log
from server.presence.memory import Board
from server.session import Session
from server.settings import RedisSettings
from server.stream import ClientInfo, Position
from server.tasks import Tasks

HOUR_S = 3600.0


# --- orders ---------------------------------------------------------------------
async def test_an_order_is_no_success_while_nobody_can_be_asked() -> None:
    """Without the broker a process knows of nobody, and so it cannot say that everybody has obeyed."""
    async with one(Bus(), Log(), Board()) as site:
        client = await Client.connected(site.url, token=token({"sub": "ann"}))
        site.broker.leave()
        assert (await call(site, "disconnect", user="ann"))["error"]["code"] == 100
        assert await client.closed() == (3503, "force disconnect")
        assert (await call(site, "channels"))["error"]["code"] == 100
        await site.broker.come_back()
        assert await call(site, "disconnect", user="ann") == {"result": {}}


async def test_commands_that_were_refused_for_a_silent_process_are_not_carried_out_later() -> None:
    """503 to an emulated client's post is the end of it: said again by the client, it would be done twice."""
    async with two() as (here, there):
        taken: list[bytes] = []
        there.node.streams["secret"] = taken.append
        there.broker.leave()
        with pytest.raises(Unavailable), impatient(SHORT_S):
            await here.node.ordering.ask(orders.Emulated("secret", b"publish"), to=there.node.id)
        await there.broker.come_back()
        await here.node.ordering.ask(orders.Emulated("secret", b"publish again"), to=there.node.id)
        assert taken == [b"publish again"]
        assert here.node.peers._questions == {}


async def test_an_order_that_comes_late_spares_who_came_later() -> None:
    """What was ordered while a process was cut off is for the connections of that time, not for those made since."""
    async with two() as (here, there):
        before = await Client.connected(there.url, token=token({"sub": "ann"}))
        there.broker.leave()
        with impatient(SHORT_S):
            assert (await call(here, "disconnect", user="ann"))["error"]["code"] == 100
        after = await Client.connected(there.url, token=token({"sub": "ann"}))
        await there.broker.come_back()
        assert await before.closed() == (3503, "force disconnect")
        await after.ask("publish", channel="live:1", data="still here")
        assert after.close_code is None


async def test_a_jump_of_the_clock_loses_neither_processes_nor_questions() -> None:
    """Who is alive and what is owed is judged by time that passes, whatever the calendar says."""
    async with two() as (here, there):
        client = await Client.connected(there.url, token=token({"sub": "ann"}))
        there.broker.leave()
        with impatient(SHORT_S):
            assert (await call(here, "disconnect", user="ann"))["error"]["code"] == 100
        for seconds in (HOUR_S, -HOUR_S):
            here.clock.ahead_s += seconds
            here.node.sweep(here.clock())
            assert set(here.node.peers.all) == {there.node.id}
        await there.broker.come_back()
        assert await client.closed() == (3503, "force disconnect")


# --- the sweep --------------------------------------------------------------------
class HeldHistory(FickleHistory):
    """Its tops can be held back; ``asked`` is set when they have been asked for."""

    def __init__(self, log: Log) -> None:
        super().__init__(log)
        self.asked = asyncio.Event()
        self.held = asyncio.Event()
        self.held.set()

    async def tops(self, channels: Iterable[str]) -> dict[str, Position]:
        """See ``History.tops``."""
        found = await super().tops(channels)
        self.asked.set()
        await self.held.wait()
        return found


async def test_a_return_during_a_check_is_checked_after_it() -> None:
    """A check that began before the return has not seen what was said until then, so there is another one."""
    bus, log, board = Bus(), Log(), Board()
    history, broker = HeldHistory(log), FickleBroker(bus)
    async with (
        one(bus, log, board) as here,
        serving(history=history, broker=broker, presence=FicklePresence(10.0, board)) as there,
    ):
        speaker, hearer = await Client.connected(here.url), await Client.connected(there.url)
        await hearer.ask("subscribe", channel="chat:1")
        broker.leave()
        history.held.clear()
        there.node.positioning.check_all()
        await history.asked.wait()
        await speaker.ask("publish", channel="chat:1", data="after the tops were read")
        await broker.come_back()
        history.held.set()
        assert (await hearer.push("pub", "chat:1"))["data"] == "after the tops were read"


async def test_one_session_that_fails_its_tick_harms_no_other(
    log: ExpectedLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others whose time has come in the same second have their pings, and the rest of the sweep is done."""
    log.expect("sweep.failed")
    async with serving(settings(client={"ping_interval": "2s", "pong_timeout": "1s"})) as site:
        clients = [await Client.connected(site.url) for _ in range(5)]
        tick = Session.tick

        def fail(self: Session, now: float) -> None:
            if self.client == clients[2].hello["client"]:
                raise RuntimeError("a fault of ours")
            tick(self, now)

        monkeypatch.setattr(Session, "tick", fail)
        site.pass_time(3)
        for client in clients[:2] + clients[3:]:
            await client.until(lambda client=client: client.pings > 0)  # type: ignore[misc]
        assert len(log.seen("sweep.failed")) == 1


# --- presence -----------------------------------------------------------------------
class SlowPresence(FicklePresence):
    """What is added is there at once, but the answer to the first ``add`` waits for ``answering``.

    ``adding`` is set when that is asked for; after ``fails_after`` additions it is away.
    """

    def __init__(self, lease_s: float, board: Board) -> None:
        super().__init__(lease_s, board)
        self.answering = asyncio.Event()
        self.adding = asyncio.Event()
        self.added: list[str] = []
        self.fails_after: int | None = None

    async def add(self, channel: str, info: ClientInfo) -> None:
        """See ``Presence.add``."""
        if self.fails_after is not None and len(self.added) >= self.fails_after:
            raise Unavailable(AWAY)
        await super().add(channel, info)
        self.added.append(info.client)
        self.adding.set()
        if len(self.added) == 1:
            await self.answering.wait()


async def test_an_entry_whose_answer_comes_late_takes_no_newer_one_with_it() -> None:
    """Unsubscribed while it was being entered and subscribed again: the client is present in the end."""
    presence = SlowPresence(10.0, Board())
    async with serving(presence=presence) as site:
        client = await Client.connected(site.url, token=token({"sub": "ann"}))
        command = client.command("subscribe", channel="chat:1")
        await client.send(command)
        await presence.adding.wait()
        assert await call(site, "unsubscribe", user="ann", channel="chat:1") == {"result": {}}
        assert await call(site, "subscribe", user="ann", channel="chat:1") == {"result": {}}
        for _ in range(100):
            await asyncio.sleep(0)  # what can go on without that answer does
        presence.answering.set()
        await client.push("subscribe", "chat:1")
        assert (await client.reply(command["id"]))["error"]["code"] == 103
        await site.node.tasks.idle()
        assert set((await client.ask("presence", channel="chat:1"))["presence"]) == {client.hello["client"]}


async def test_joins_that_could_not_be_said_after_a_pause_are_said_later(log: ExpectedLog) -> None:
    """Presence goes away again while a paused process enters its members: all of them are told of in the end."""
    log.expect("presence.unavailable")
    bus, log_, board = Bus(), Log(), Board()
    presence = SlowPresence(10.0, board)
    presence.answering.set()
    async with (
        one(bus, log_, board) as here,
        serving(history=FickleHistory(log_), broker=FickleBroker(bus), presence=presence) as there,
    ):
        watcher = await Client.connected(here.url)
        await watcher.ask("subscribe", channel="chat:1", join_leave=True)
        await watcher.push("join", "chat:1")
        paused = {(await _member(there.url)).hello["client"] for _ in range(3)}
        assert {(await watcher.push("join", "chat:1"))["info"]["client"] for _ in paused} == paused
        for _ in range(14):
            here.pass_time(1)
            await here.node.tasks.idle()
        assert {(await watcher.push("leave", "chat:1"))["info"]["client"] for _ in paused} == paused
        presence.fails_after = len(presence.added) + 1
        there.clock.ahead_s += 13
        there.pass_time(1)
        await there.node.tasks.idle()
        presence.fails_after = None
        there.pass_time(1)
        await there.node.tasks.idle()
        assert {(await watcher.push("join", "chat:1"))["info"]["client"] for _ in paused} == paused


async def _member(url: str) -> Client:
    client = await Client.connected(url)
    await client.ask("subscribe", channel="chat:1")
    return client


async def test_an_outage_is_said_once_and_not_for_each_client(log: ExpectedLog) -> None:
    """A crowd that subscribes and leaves while Redis is away does not fill the log."""
    log.expect("presence.unavailable", "broker.unavailable")
    async with one(Bus(), Log(), Board()) as site:
        site.broker.leave()
        site.presence.away = True
        client = await Client.connected(site.url)
        for number in range(20):
            await client.ask("subscribe", channel=f"live:{number}")
            await client.ask("unsubscribe", channel=f"live:{number}")
        site.pass_time(5)
        await site.node.tasks.idle()
        assert len(log.seen("presence.unavailable")) == 1
        assert len(log.seen("broker.unavailable")) == 1
        await site.broker.come_back()
        site.presence.away = False
        site.pass_time(5)
        await client.ask("subscribe", channel="live:1")
        site.presence.away = True
        await client.ask("unsubscribe", channel="live:1")
        await site.node.tasks.idle()
        assert len(log.seen("presence.unavailable")) == 2


# --- the broker ------------------------------------------------------------------------
async def test_a_process_that_may_not_publish_is_not_ready(log: ExpectedLog) -> None:
    """It hears and serves, but the others do not hear it: operators are told why, until it is heard again."""
    log.expect("broker.refused")
    with RedisServer() as redis:
        redis.command("ACL", "SETUSER", "ann", "on", ">secret", "~*", "&*", "+@all")
        broker = RedisBroker(RedisSettings(url=f"redis://ann:secret@{redis.address}"))
        async with serving(broker=broker) as site:
            assert await ready(site) == (200, {"ready": True})
            redis.command("ACL", "SETUSER", "ann", "-publish")
            answer = await _ready_again(site, 503)
            why = answer["reasons"]["broker"]
            assert why.startswith(
                f"redis.url: expected that the user ann may publish at {redis.address}, found that it"
            )
            assert "secret" not in why
            redis.command("ACL", "SETUSER", "ann", "+publish")
            assert await _ready_again(site, 200) == {"ready": True}
    assert len(log.seen("broker.refused")) == 1


async def _ready_again(site: Site, status: int) -> Any:
    """Let seconds pass, in each of which it says hello, until it is ready or not."""
    async with asyncio.timeout(20):
        while (answer := await ready(site))[0] != status:
            site.pass_time(1)
    return answer[1]


class Announcing(MemoryBroker):
    """Remembers what was announced."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[Word] = []

    def announce(self, word: Word) -> None:
        """See ``Broker.announce``."""
        self.words.append(word)
        super().announce(word)


async def test_a_publication_that_is_heavy_by_its_tags_is_announced_by_its_position() -> None:
    """What Redis carries of a kept channel is bounded, wherever its bytes stand."""
    broker = Announcing()
    async with serving(broker=broker) as site:
        for tags in ({}, {"tag": "x" * ANNOUNCED_BYTES}):
            assert "result" in await call(site, "publish", channel="chat:1", data=1, tags=tags)
        kept = [word for word in broker.words if isinstance(word, Published)]
        assert [(word.top.offset, len(word.publications)) for word in kept] == [(1, 1), (2, 0)]


# --- the beginning --------------------------------------------------------------------
class FaultyHistory(FickleHistory):
    """Its opening fails in a way that nobody foresaw, once it has been away."""

    faults = 0

    async def open(self) -> None:
        """See ``History.open``."""
        if self.faults:
            self.faults -= 1
            raise RuntimeError("a fault of ours")
        await super().open()


async def test_a_fault_while_opening_again_is_not_the_last_try(log: ExpectedLog) -> None:
    """Whatever comes up on the way, a part that was away at the start is opened when it can be."""
    log.expect("history.unavailable", "task.failed")
    history = FaultyHistory(Log())
    history.trouble = "mongo.url: nobody answers"
    async with serving(history=history, patiently=True) as site:
        history.trouble, history.faults = "", 1
        while (await ready(site))[0] != 200:
            assert site.node.parts.troubles, "it is not ready, and says why"
            await site.node.tasks.idle()
        assert len(log.seen("task.failed")) == 1


@asynccontextmanager
async def _waiting_for_history(**sections: Any) -> AsyncIterator[None]:
    history = FickleHistory(Log())
    history.trouble = "mongo.url: nobody answers"
    async with serving(settings(**sections), history=history, patiently=True):
        yield


async def test_closing_does_not_wait_for_what_could_not_be_opened(log: ExpectedLog) -> None:
    """A server that still waits for its history ends at once, and ``run.py check`` speaks in time."""
    log.expect("history.unavailable")
    async with asyncio.timeout(10):
        async with _waiting_for_history(sqlite={"publish_timeout": "60s"}):
            pass


async def test_what_is_cancelled_at_the_end_has_ended_before_its_parts_are_closed() -> None:
    """``finish`` returns when the last task has cleaned up behind itself."""
    tasks, begun, cleaned = Tasks(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.set()

    tasks.spawn(work(), "work")
    await begun.wait()
    await tasks.finish(0.01)
    assert cleaned.is_set()
