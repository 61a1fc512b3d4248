"""PROTOCOL 10.5: blocked everywhere, blocked in a channel, muted; in one process and between two, and in races."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import streams
from conftest import ExpectedLog
from hopper import ask, events
from patience import impatient
from support import Client, Process, Site, config, serving, settings, token
from test_away import AWAY, SHORT_S, FickleBroker, call, ready
from test_rest import Following, bearer, path

from server import orders
from server.app import App, Welcome
from server.app import Client as Guest
from server.blocking import READ_ALL_S, READ_S
from server.blocks import BLOCKS, KEPT_MS, Block, Change, Record, adding
from server.blocks.memory import MemoryBlocks, Shelf
from server.broker.memory import Bus, MemoryBroker
from server.errors import Unavailable
from server.history.memory import Log, MemoryHistory
from server.presence.memory import Board, MemoryPresence
from server.testing import ConnectionEnded, ReplyError, harness

HOUR_S = 3600.0


class FickleBlocks(MemoryBlocks):
    """Blocks that can be taken away, and whose answers can be held back: ``reading`` is set while one is."""

    def __init__(self, shelf: Shelf | None = None) -> None:
        super().__init__(shelf)
        self.away = False
        self.answering = asyncio.Event()
        self.answering.set()
        self.reading = asyncio.Event()

    async def open(self) -> None:
        """See ``Blocks.open``."""
        if self.away:
            raise Unavailable(AWAY)
        await super().open()

    async def change(self, user: str, change: Change, now_ms: int) -> Record:
        """See ``Blocks.change``."""
        if self.away:
            raise Unavailable(AWAY)
        return await super().change(user, change, now_ms)

    async def records(self, since: int = 0) -> list[Record]:
        """See ``Blocks.records``."""
        if self.away:
            raise Unavailable(AWAY)
        found = await super().records(since)
        self.reading.set()
        await self.answering.wait()
        return found


class Here(Site):
    """One of two, with its parts at hand."""

    blocks: FickleBlocks
    broker: FickleBroker


@asynccontextmanager
async def two() -> AsyncIterator[tuple[Here, Here]]:
    """Two nodes that share everything."""
    bus, log, board, shelf = Bus(), Log(), Board(), Shelf()
    async with one(bus, log, board, shelf) as here, one(bus, log, board, shelf) as there:
        there.pass_time(1)
        here.pass_time(1)
        yield here, there


@asynccontextmanager
async def one(bus: Bus, log: Log, board: Board, shelf: Shelf) -> AsyncIterator[Here]:
    """One node."""
    blocks, broker = FickleBlocks(shelf), FickleBroker(bus)
    history, presence = MemoryHistory(log=log, idempotency_ttl_ms=10_000), MemoryPresence(10.0, board)
    async with serving(blocks=blocks, broker=broker, history=history, presence=presence, patiently=True) as site:
        site.__class__ = Here
        assert isinstance(site, Here)
        site.blocks, site.broker = blocks, broker
        yield site


async def read_again(site: Site) -> None:
    """Have it read what is new, as it does every ``READ_S``."""
    await site.node.blocking.read()


async def block(site: Site, **what: Any) -> None:
    """Block somebody by the back-end API, successfully."""
    assert await call(site, "block_user", **what) == {"result": {}}


async def unblock(site: Site, **what: Any) -> None:
    """Let somebody do it again."""
    assert await call(site, "unblock_user", **what) == {"result": {}}


async def code(site: Site, method: str, **request: Any) -> int:
    """The error of a call."""
    return int((await call(site, method, **request))["error"]["code"])


def ann() -> str:
    """Her token."""
    return token({"sub": "ann"})


# --- everywhere -----------------------------------------------------------------------
async def test_who_is_blocked_is_sent_away_and_stays_outside() -> None:
    """PROTOCOL 10.5.1: all connections end with 3503, new ones with 3507, whatever the token; others stay."""
    async with serving() as site:
        first, second = await Client.connected(site.url, token=ann()), await Client.connected(site.url, token=ann())
        ben = await Client.connected(site.url, token=token({"sub": "ben"}))
        await block(site, user="ann", reason="spam")
        assert await first.closed() == (3503, "force disconnect")
        assert await second.closed() == (3503, "force disconnect")
        again = await Client.open(site.url)
        await again.send(again.command("connect", token=ann()))
        assert await again.closed() == (3507, "permission denied")
        assert ben.close_code is None
        await ben.ask("publish", channel="live:1", data=1)
        await unblock(site, user="ann")
        assert (await Client.connected(site.url, token=ann())).hello["client"]


async def test_a_block_runs_out() -> None:
    """PROTOCOL 10.5.3: with ``expire_at`` it ends by itself, and in the end nobody remembers it."""
    async with serving() as site:
        await block(site, user="ann", expire_at=int(site.clock()) + 100)
        with pytest.raises(Exception, match="3507"):
            await Client.connected(site.url, token=ann())
        site.clock.ahead_s += 101
        await Client.connected(site.url, token=ann())
        assert await call(site, "blocked_users") == {"result": {"blocks": []}}
        site.clock.ahead_s += KEPT_MS / 1000
        await read_again(site)
        assert site.node.blocking.users == {}
        assert await site.node.blocks.records() == []


@pytest.mark.parametrize("transport", ["sse", "http_stream"])
async def test_no_other_transport_lets_them_in(transport: str) -> None:
    """PROTOCOL 10.5.1: emulated ones end and refuse like the WebSocket."""
    connect = {"id": 1, "connect": {"token": ann()}}
    async with serving(streams.settings()) as site:
        async with getattr(streams, transport)(site.port, connect) as stream:
            await stream.expect("connect")
            await block(site, user="ann")
            assert await stream.ended(3503)
        async with getattr(streams, transport)(site.port, connect) as stream:
            assert await stream.ended(3507)


@pytest.mark.parametrize("transport", ["uni_sse", "uni_http_stream"])
async def test_no_one_way_transport_lets_them_in(transport: str) -> None:
    """PROTOCOL 10.5.1: nor do those that only listen."""
    async with serving(streams.settings()) as site:
        async with getattr(streams, transport)(site.port, {"token": ann()}) as stream:
            await stream.expect("connect")
            await block(site, user="ann")
            assert await stream.ended(3503)
        async with getattr(streams, transport)(site.port, {"token": ann()}) as stream:
            assert await stream.ended(3507)


async def test_rest_and_event_streams_are_closed_as_well() -> None:
    """PROTOCOL 10.5.1: reading, publishing, presence, waiting and listening are 403; what waits or listens ends."""
    async with serving() as site:
        following = Following(site.node.hub)
        await ask(site.port, path("chat:a"), body={"data": 1}, headers=bearer(sub="ann"))
        async with events(site.port, "/v1/events?channel=chat:a", bearer(sub="ann")) as stream:
            polling = asyncio.create_task(
                ask(site.port, path("chat:a", "since=:1"), headers=bearer(sub="ann") | {"Prefer": "wait=20"})
            )
            await following.until(2)
            await block(site, user="ann")
            assert (await polling).json["code"] == 3503
            while (event := await stream.next()).kind != "disconnect":
                pass
            assert event.data["code"] == 3503
        for reply in (
            await ask(site.port, path("chat:a"), headers=bearer(sub="ann")),
            await ask(site.port, path("chat:a"), body={"data": 1}, headers=bearer(sub="ann")),
            await ask(site.port, "/v1/channels/chat:a/presence", headers=bearer(sub="ann")),
            await ask(site.port, "/v1/events?channel=chat:a", headers=bearer(sub="ann")),
        ):
            assert (reply.status, reply.json["code"]) == (403, 3507), reply
        assert (await ask(site.port, path("chat:a"), headers=bearer(sub="ben"))).status == 200


async def test_whom_a_hook_names_is_blocked_too() -> None:
    """PROTOCOL 10.5.1: the user counts, whoever says who that is."""
    app = App()

    @app.connecting
    async def connecting(client: Guest, data: str) -> Welcome:
        return Welcome(user=data)

    async with harness(app, client={"allow_anonymous_connect_without_token": False}) as world:
        await world.node.block("ann", adding(Block()))
        with pytest.raises(ConnectionEnded) as end:
            await world.connect(data="ann")
        assert end.value.code == 3507
        await world.connect(data="ben")


# --- in a channel -----------------------------------------------------------------------
async def test_blocked_in_a_channel() -> None:
    """PROTOCOL 10.5.2: unsubscribed with 2000, then 103 for everything there, by token too; all else goes on."""
    async with serving() as site:
        client = await Client.connected(site.url, token=ann())
        for channel in ("chat:1", "chat:2"):
            await client.ask("subscribe", channel=channel)
        await block(site, user="ann", channel="chat:1")
        assert (await client.push("unsubscribe", "chat:1"))["code"] == 2000
        assert await client.refused("subscribe", channel="chat:1") == 103
        by_token = token({"sub": "ann", "channel": "chat:1"})
        assert await client.refused("subscribe", channel="chat:1", token=by_token) == 103
        assert await client.refused("publish", channel="chat:1", data=1) == 103
        assert await client.refused("rpc", method="publish", data={"channel": "chat:1", "data": 1}) == 103
        assert await client.refused("history", channel="chat:1", limit=1) == 103
        assert await client.refused("presence", channel="chat:1") == 103
        assert await client.refused("presence_stats", channel="chat:1") == 103
        for reply in (
            await ask(site.port, path("chat:1"), headers=bearer(sub="ann")),
            await ask(site.port, path("chat:1"), body={"data": 1}, headers=bearer(sub="ann")),
            await ask(site.port, "/v1/events?channel=chat:1", headers=bearer(sub="ann")),
        ):
            assert (reply.status, reply.json["code"]) == (403, 103), reply
        await client.ask("publish", channel="chat:2", data="still here")
        assert (await client.push("pub", "chat:2"))["data"] == "still here"
        await unblock(site, user="ann", channel="chat:1")
        await client.ask("subscribe", channel="chat:1")


async def test_connect_goes_on_without_the_channel() -> None:
    """PROTOCOL 10.5.2: what a token, connect's own wishes or the back end would subscribe them to is left out."""
    async with serving() as site:
        await block(site, user="ann", channel="chat:1")
        given = token({"sub": "ann", "channels": ["chat:1", "chat:2"]})
        client = await Client.connected(site.url, token=given, subs={"chat:1": {}, "chat:3": {}})
        assert set(client.hello["subs"]) == {"chat:2", "chat:3"}
        assert await call(site, "subscribe", user="ann", channel="chat:1") == {"result": {}}
        assert await call(site, "subscribe", user="ann", channel="chat:4") == {"result": {}}
        await client.push("subscribe", "chat:4")
        assert set(site.node.hub.feeds) == {"chat:2", "chat:3", "chat:4"}


# --- muted ------------------------------------------------------------------------------
async def test_muted(log: ExpectedLog) -> None:
    """PROTOCOL 10.5.2: hears, reads and is seen, but may not publish, by no way; the log says why."""
    async with serving() as site:
        client = await Client.connected(site.url, token=ann())
        await client.ask("subscribe", channel="chat:1")
        await block(site, user="ann", channel="chat:1", mute=True)
        assert await client.refused("publish", channel="chat:1", data=1) == 103
        assert "muted" in str(log.seen("command.refused")[-1]["why"])
        assert await client.refused("rpc", method="publish", data={"channel": "chat:1", "data": 1}) == 103
        reply = await ask(site.port, path("chat:1"), body={"data": 1}, headers=bearer(sub="ann"))
        assert (reply.status, reply.json["code"]) == (403, 103)
        await client.ask("publish", channel="live:1", data=1)
        await call(site, "publish", channel="chat:1", data="from the back end")
        assert (await client.push("pub", "chat:1"))["data"] == "from the back end"
        await client.ask("presence", channel="chat:1")
        await block(site, user="ann", mute=True)
        assert await client.refused("publish", channel="live:1", data=1) == 103
        await unblock(site, user="ann", mute=True)
        await client.ask("publish", channel="live:1", data=1)
        assert await client.refused("publish", channel="chat:1", data=1) == 103
        assert client.close_code is None


async def test_muted_while_a_hook_thinks() -> None:
    """Who is muted while their publication is looked at has it refused."""
    app, asked, thought = App(), asyncio.Event(), asyncio.Event()

    @app.publishing
    async def publishing(client: Guest, channel: str) -> None:
        asked.set()
        await thought.wait()

    async with harness(app) as world:
        client = await world.connect(user="ann")
        publishing_ = asyncio.create_task(client.publish("live:1", "too late"))
        await asked.wait()
        await world.node.block("ann", adding(Block("live:1", muted=True)))
        thought.set()
        with pytest.raises(ReplyError) as refused:
            await publishing_
        assert refused.value.code == 103


# --- races ------------------------------------------------------------------------------
async def test_blocked_while_connecting() -> None:
    """Who is named already and not yet entered when the block comes is not let in."""
    app, asked, thought = App(), asyncio.Event(), asyncio.Event()

    @app.connecting
    async def connecting(client: Guest) -> None:
        asked.set()
        await thought.wait()

    async with harness(app) as world:
        entering = asyncio.create_task(world.connect(user="ann"))
        await asked.wait()
        await world.node.block("ann", adding(Block()))
        thought.set()
        with pytest.raises(ConnectionEnded) as end:
            await entering
        assert end.value.code == 3507
        assert world.node.sessions == {}


class SlowHistory(MemoryHistory):
    """Its reads can be held back; ``reading`` is set while one is."""

    def __init__(self) -> None:
        super().__init__(idempotency_ttl_ms=10_000)
        self.reading, self.answering = asyncio.Event(), asyncio.Event()

    async def read(self, *arguments: Any, **options: Any) -> Any:
        """See ``History.read``."""
        self.reading.set()
        await self.answering.wait()
        return await super().read(*arguments, **options)


async def test_blocked_while_subscribing() -> None:
    """A subscription that waits for its history when the block comes never goes live."""
    history = SlowHistory()
    async with serving(history=history) as site:
        client = await Client.connected(site.url, token=ann())
        command = client.command("subscribe", channel="chat:1")
        await client.send(command)
        await history.reading.wait()
        await block(site, user="ann", channel="chat:1")
        history.answering.set()
        assert (await client.reply(command["id"]))["error"]["code"] == 103
        assert site.node.hub.feeds == {}


async def test_blocked_while_connecting_with_channels() -> None:
    """Whose connect waits for the histories of its channels has been entered, and is found there."""
    history = SlowHistory()
    async with serving(history=history) as site:
        client = await Client.open(site.url)
        await client.send(client.command("connect", token=token({"sub": "ann", "channels": ["chat:1"]})))
        await history.reading.wait()
        await block(site, user="ann")
        assert await client.closed() == (3503, "force disconnect")
        history.answering.set()
        await site.node.tasks.idle()
        assert (site.node.sessions, site.node.hub.feeds) == ({}, {})


# --- between processes ---------------------------------------------------------------------
async def test_every_process_obeys_before_the_answer() -> None:
    """PROTOCOL 10.5.4: when the call is answered the user is gone from the other process, too, and stays outside."""
    async with two() as (here, there):
        client = await Client.connected(there.url, token=ann())
        await block(here, user="ann")
        assert not there.node.users.get("ann")
        assert await client.closed() == (3503, "force disconnect")
        refused = await Client.open(there.url)
        await refused.send(refused.command("connect", token=ann()))
        assert (await refused.closed())[0] == 3507
        await unblock(there, user="ann")
        await Client.connected(here.url, token=ann())


async def test_a_lost_word_is_made_up_for_by_reading() -> None:
    """PROTOCOL 10.5.4: a process that nobody could tell reads it within ten seconds, and sends the user away then."""
    async with two() as (here, there):
        client = await Client.connected(there.url, token=ann())
        there.broker.leave()
        with impatient(SHORT_S):
            assert await code(here, "block_user", user="ann") == 100
        assert client.close_code is None
        await read_again(there)
        assert await client.closed() == (3503, "force disconnect")
        assert not here.node.users.get("ann")


async def test_the_sweep_reads_every_ten_seconds() -> None:
    """Reading is due each ``READ_S`` of time that passes, whatever the calendar says, and when the broker is back."""
    async with two() as (_, there):
        blocking = there.node.blocking
        now = asyncio.get_running_loop().time() + 100
        assert blocking.due(now)
        assert not blocking.due(now + READ_S - 1)
        assert blocking.due(now + READ_S)
        assert not blocking.due(now + READ_S + 1)
        there.broker.leave()
        await there.broker.come_back()
        assert blocking.due(now + READ_S + 2)


async def test_a_change_by_a_clock_that_is_behind_is_found() -> None:
    """What has an older revision than the newest that is known is found when all is read, within five minutes."""
    async with two() as (here, there):
        here.clock.ahead_s = HOUR_S
        await block(here, user="ben")
        here.broker.leave()
        with impatient(SHORT_S):
            assert await code(there, "block_user", user="ann") == 100
        await read_again(here)
        assert set(here.node.blocking.users) == {"ben"}
        assert here.node.blocking.due(asyncio.get_running_loop().time() + READ_ALL_S)
        await read_again(here)
        assert set(here.node.blocking.users) == {"ann", "ben"}


async def test_late_and_repeated_words_change_nothing() -> None:
    """What is heard after something later was heard is old: a block that was lifted does not come back."""
    async with two() as (here, there):
        await block(here, user="ann")
        (old,) = await there.node.blocks.records()
        await unblock(here, user="ann")
        await there.node.ordering.ask(orders.Blocked(old), to=here.node.id)
        there.node.blocking.take(old)
        assert there.node.blocking.users == {} == here.node.blocking.users
        await Client.connected(there.url, token=ann())


async def test_what_is_changed_while_somebody_reads_is_not_undone() -> None:
    """A reading that began before a change does not bring back what was before it."""
    async with two() as (here, there):
        await block(here, user="ann")
        there.blocks.answering.clear()
        there.blocks.reading.clear()
        reading = asyncio.create_task(read_again(there))
        await there.blocks.reading.wait()
        await unblock(here, user="ann")
        there.blocks.answering.set()
        await reading
        assert there.node.blocking.users == {}


# --- the store is away -----------------------------------------------------------------------
async def test_while_the_store_is_away_the_last_known_list_holds(log: ExpectedLog) -> None:
    """PROTOCOL 10.5.5: changes are error 100 and change nothing, who is blocked stays so, and the log says it once."""
    log.expect("blocks.unavailable")
    async with two() as (here, _):
        await block(here, user="ann")
        here.blocks.away = True
        assert await code(here, "unblock_user", user="ann") == 100
        assert await code(here, "block_user", user="ben") == 100
        for _ in range(3):
            await read_again(here)
        assert len(log.seen("blocks.unavailable")) == 1
        assert await ready(here) == (503, {"ready": False, "reasons": {"blocks": AWAY}})
        with pytest.raises(Exception, match="3507"):
            await Client.connected(here.url, token=ann())
        await Client.connected(here.url, token=token({"sub": "ben"}))
        here.blocks.away = False
        await unblock(here, user="ann")
        await Client.connected(here.url, token=ann())


async def test_a_process_that_starts_without_the_store_says_so(log: ExpectedLog) -> None:
    """PROTOCOL 10.5.5: it is not ready, and knows of nobody; when the store is there who is blocked is sent away."""
    log.expect("blocks.unavailable")
    shelf = Shelf()
    blocks = FickleBlocks(shelf)
    shelf.records["ann"] = Record("ann", 1, (Block(),))
    blocks.away = True
    async with serving(blocks=blocks, patiently=True) as site:
        assert await ready(site) == (503, {"ready": False, "reasons": {"blocks": AWAY}})
        client = await Client.connected(site.url, token=ann())
        blocks.away = False
        assert await client.closed() == (3503, "force disconnect")
        assert await ready(site) == (200, {"ready": True})


async def test_blocks_outlive_a_restart(tmp_path: Path) -> None:
    """What was blocked is in a file beside the database."""
    chosen = config(sqlite={"path": "data.db"})
    for again in (False, True):
        with Process(tmp_path, chosen) as process:
            reply = await ask(
                process.port, "/api/blocked_users" if again else "/api/block_user", body={"user": "ann"},
                headers={"X-API-Key": "api-key"},
            )  # fmt: skip
            assert "result" in reply.json
            if again:
                assert reply.json["result"]["blocks"][0]["user"] == "ann"
            client = await Client.open(process.url)
            await client.send(client.command("connect", token=ann()))
            assert (await client.closed())[0] == 3507
    assert (tmp_path / "data.db.blocks").exists()


# --- the calls --------------------------------------------------------------------------------
async def test_what_the_calls_refuse() -> None:
    """PROTOCOL 15.2.17, 15.2.18: no user 107, an unknown channel 102, a bad name or a past expiry 107, too many 106."""
    async with serving() as site:
        for method in ("block_user", "unblock_user"):
            assert await code(site, method) == 107
            assert await code(site, method, user="") == 107
            assert await code(site, method, user="ann", channel="nowhere:1") == 102
            assert await code(site, method, user="ann", channel="chat:ü") == 107
            assert await code(site, method, user=7) == 107
        assert await code(site, "block_user", user="ann", expire_at=int(site.clock()) - 1) == 107
        assert await code(site, "block_user", user="ann", expire_at=-1) == 107
        assert await code(site, "block_user", user="ann", reason="x" * 257) == 107
        assert await call(site, "blocked_users") == {"result": {"blocks": []}}
        many = [Block(f"chat:{number}") for number in range(BLOCKS)]
        await site.node.block("ann", lambda _: many)
        assert await code(site, "block_user", user="ann", channel="chat:x") == 106
        await unblock(site, user="nobody knows him")


async def test_the_list() -> None:
    """PROTOCOL 15.2.19: everything that holds, by user; page by page, or of one user."""
    async with serving() as site:
        end = int(site.clock()) + 100
        await block(site, user="cay", channel="chat:1", mute=True, expire_at=end, reason="noise")
        for user in ("ben", "ann"):
            await block(site, user=user)
        muted = {"user": "cay", "channel": "chat:1", "mute": True, "expire_at": end, "reason": "noise"}
        plain = {"channel": "", "mute": False, "expire_at": 0, "reason": ""}
        found = (await call(site, "blocked_users"))["result"]["blocks"]
        assert found == [{"user": "ann", **plain}, {"user": "ben", **plain}, muted]
        assert (await call(site, "blocked_users", user="cay"))["result"]["blocks"] == [muted]
        assert (await call(site, "blocked_users", user="dan"))["result"]["blocks"] == []
        page = (await call(site, "blocked_users", limit=1, after="ann"))["result"]["blocks"]
        assert [one["user"] for one in page] == ["ben"]


async def test_who_did_it_is_in_the_log(log: ExpectedLog) -> None:
    """PROTOCOL 15.1.7: a line for each administrative act, with whom and where and what became of it, no payload."""
    async with serving() as site:
        await block(site, user="ann", channel="chat:1", reason="said rude things")
        assert await code(site, "block_user", user="") == 107
        await call(site, "publish", channel="live:1", data="secret words")
        await call(site, "batch", commands=[{"disconnect": {"user": "ben"}}])
        lines = log.seen("api.called")
        assert [line["method"] for line in lines] == ["block_user", "block_user", "disconnect"]
        assert [line["code"] for line in lines] == [0, 107, 0]
        assert (lines[0]["user"], lines[0]["channel"]) == ("ann", "chat:1")
        assert (lines[0]["by"], lines[0]["address"]) == ("key", "127.0.0.1")
        assert [line["method"] for line in log.seen("api.served")] == ["publish"]
        assert "secret words" not in str([vars(record) for record in log.records])
        assert "rude" not in str([vars(record) for record in log.records])


async def test_a_broker_of_one_process_needs_nobody() -> None:
    """Alone, a block is done when it is stored."""
    async with serving(settings(), broker=MemoryBroker()) as site:
        await block(site, user="ann")
        assert set(site.node.blocking.users) == {"ann"}
