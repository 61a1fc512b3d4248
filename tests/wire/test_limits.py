"""PROTOCOL 18: limits, each with what a client sees of it and what is counted; those of one process at the door.

What a flood costs others is in ``test_hostile``.
"""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import websockets
from conftest import ExpectedLog
from hopper import ask
from support import KEPT, OPEN, PATIENCE_S, Client, Clock, Site, serving, settings, token

from handlers.door import SPARE_FILES, Door
from server.broker import Word
from server.broker.memory import Bus, MemoryBroker
from server.configuration import load
from server.history.memory import Log, MemoryHistory
from server.presence.memory import Board, MemoryPresence
from server.settings import Settings
from server.stream import Page

FORMATS = pytest.mark.parametrize("format", ["json", "protobuf"])


def limits(**client: Any) -> Settings:
    """The tests' configuration with these settings of ``client``."""
    return settings(client=client)


def met(site: Site) -> dict[str, int]:
    """How often each limit was met."""
    return dict(site.node.counts.limits)


def test_limits_are_on_by_default() -> None:
    """With no configuration, and with one that says nothing of limits, nothing that clients do is without a bound."""
    for flags in ({}, {"http_api": {"key": "k"}}):
        client = load(config=None, environ={}, flags=flags).client
        limited = {name: value for name, value in client if name.endswith(("_limit", "_burst", "queue_max_size"))}
        assert len(limited) >= 10
        assert [name for name, value in limited.items() if not value] == ["recovery_max_publication_limit"]


# --- commands ---------------------------------------------------------------------------
@FORMATS
async def test_commands_beyond_the_burst(format: str) -> None:
    """PROTOCOL 3.4.10: what the bucket has not is refused with 111 and not done; it fills again with time."""
    async with serving(limits(command_rate_limit=10, command_burst=20)) as site:
        client = await Client.connected(site.url, format=format)
        commands = [client.command("publish", channel="chat:1", data=number) for number in range(30)]
        await client.send(*commands)
        codes = [(await client.reply(command["id"])).get("error", {}).get("code", 0) for command in commands]
        assert codes == [0] * 19 + [111] * 11, "connect took the first"
        site.clock.ahead_s += 1
        assert [await client.ask("publish", channel="chat:1", data=number) for number in range(10)] == [{}] * 10
        assert await client.refused("publish", channel="chat:1", data=0) == 111
        assert (await (await Client.connected(site.url)).ask("history", channel="chat:1"))["offset"] == 29
        assert met(site) == {"client.command_rate_limit": 12}


@FORMATS
async def test_who_does_not_listen_to_refusals(format: str) -> None:
    """PROTOCOL 3.4.10: as many refusals as there were commands are answered, then it is 3013, for nobody else."""
    async with serving(limits(command_rate_limit=10, command_burst=20)) as site:
        other = await Client.connected(site.url)
        client = await Client.connected(site.url, format=format)
        await client.send(*(client.command("presence_stats", channel="live:1") for _ in range(60)))
        assert await client.closed() == (3013, "too many requests")
        assert len(client.ids) == 40
        await other.ask("publish", channel="live:1", data=1)


async def test_pongs_cost_nothing() -> None:
    """A client that only answers pings is never refused, however small its bucket is."""
    async with serving(limits(command_rate_limit=1, command_burst=1, ping_interval="2s", pong_timeout="1s")) as site:
        client = await Client.connected(site.url)
        session = site.node.sessions[client.hello["client"]]
        for number in range(1, 8):
            while session._pong_by == math.inf:
                site.pass_time(1)
            await client.until(lambda number=number: client.pings == number)  # type: ignore[misc]
            async with asyncio.timeout(PATIENCE_S):
                while session._pong_by < math.inf:
                    assert (await ask(site.port, "/health/live")).status == 200
        assert await client.ask("presence_stats", channel="live:1") is not None
        assert met(site) == {}


async def test_a_clock_set_back_refuses_nobody() -> None:
    """What had been taken of a bucket is not owed until the clock is there again."""
    async with serving(limits(command_rate_limit=10, command_burst=10)) as site:
        client = await Client.connected(site.url)
        for _ in range(9):
            await client.ask("publish", channel="live:1", data=1)
        site.node.sweep(site.clock())
        site.clock.ahead_s -= 3600
        site.node.sweep(site.clock())
        site.clock.ahead_s += 1
        assert await client.ask("publish", channel="live:1", data=1) == {}


async def test_a_flood_does_not_fill_the_log(log: ExpectedLog) -> None:
    """PROTOCOL 18.0.2: refusals are 20 lines at once and 2 a second; between them commands may succeed as they like.

    Twenty refusals in a row were logged, and one success began the row anew.
    """
    async with serving() as site:
        client = await Client.connected(site.url)
        for _ in range(100):
            await client.refused("publish", channel="nowhere:1", data=1)
            await client.ask("publish", channel="live:1", data=1)
        assert len(log.seen("command.refused")) in (20, 21), "on a machine that takes half a second for this, one more"
        site.clock.ahead_s += 5
        for _ in range(20):
            await client.refused("publish", channel="nowhere:1", data=1)
        assert len(log.seen("command.refused")) in range(30, 33)
        assert site.node.counts.refusals[102] == 120


# --- publications of one user ---------------------------------------------------------------
@pytest.mark.parametrize("channel", ["chat:1", "live:1"])
async def test_publications_of_one_user(channel: str) -> None:
    """PROTOCOL 4.4.4, 18: the tabs of a user share what it may say in a channel; others have quotas of their own."""
    async with serving(limits(publish_rate_limit=6)) as site:
        tabs = [await Client.connected(site.url, token=token({"sub": "ann"})) for _ in range(2)]
        bob = await Client.connected(site.url, token=token({"sub": "bob"}))
        for tab in tabs * 3:
            await tab.ask("publish", channel=channel, data=1)
        for tab in tabs:
            assert await tab.refused("publish", channel=channel, data=1) == 111
            rpc = {"channel": channel, "data": 1, "idempotency_key": "k"}
            assert await tab.refused("rpc", method="publish", data=rpc) == 111
        await tabs[0].ask("publish", channel=f"{channel}1", data=1)
        await bob.ask("publish", channel=channel, data=1)
        site.clock.ahead_s += 0.5
        for _ in range(3):
            await tabs[1].ask("publish", channel=channel, data=1)
        assert await tabs[0].refused("publish", channel=channel, data=1) == 111
        assert met(site) == {"client.publish_rate_limit": 5}


async def test_publications_of_nobody() -> None:
    """Clients without a user are not one user: each has a quota, and so has each address that asks by REST."""
    async with serving(limits(publish_rate_limit=2)) as site:
        clients = [await Client.connected(site.url) for _ in range(2)]
        for client in clients:
            for _ in range(2):
                await client.ask("publish", channel="chat:1", data=1)
            assert await client.refused("publish", channel="chat:1", data=1) == 111
        path = "/v1/channels/chat:1/publications"
        answers = [await ask(site.port, path, body={"data": 1}) for _ in range(3)]
        assert [answer.status for answer in answers] == [201, 201, 429]


async def test_who_may_not_publish_spends_nothing() -> None:
    """What is refused for another reason is not counted against the user."""
    closed = {"name": "closed", **KEPT, "allow_publish_for_client": False, "allow_publish_for_subscriber": True}
    chosen = settings(client={"publish_rate_limit": 2}, channel={"namespaces": [closed]})
    async with serving(chosen) as site:
        ann = await Client.connected(site.url, token=token({"sub": "ann"}))
        for _ in range(5):
            assert await ann.refused("publish", channel="closed:1", data=1) == 103
        await ann.ask("subscribe", channel="closed:1")
        for _ in range(2):
            await ann.ask("publish", channel="closed:1", data=1)
        assert await ann.refused("publish", channel="closed:1", data=1) == 111


async def test_the_back_end_is_not_counted() -> None:
    """PROTOCOL 18.0.5: the server API publishes as much as it wants."""
    async with serving(limits(publish_rate_limit=1)) as site:
        for _ in range(5):
            body = {"channel": "chat:1", "data": 1}
            answer = await ask(site.port, "/api/publish", body=body, headers={"X-API-Key": "api-key"})
            assert "result" in answer.json


@asynccontextmanager
async def _three(chosen: Settings) -> AsyncIterator[list[Site]]:
    """Three processes that hear one another."""
    bus, log, board = Bus(), Log(), Board()

    def parts() -> dict[str, Any]:
        history = MemoryHistory(idempotency_ttl_ms=86_400_000, log=log)
        return {"history": history, "broker": MemoryBroker(bus), "presence": MemoryPresence(10.0, board)}

    async with (
        serving(chosen, **parts()) as one,
        serving(chosen, **parts()) as two,
        serving(chosen, **parts()) as three,
    ):
        for site in (one, two, three):
            site.pass_time(1)
        yield [one, two, three]


async def test_publications_of_one_user_over_processes() -> None:
    """PROTOCOL 18.0.5: one process gives a user the whole rate, three together at most 1 + 2/8 of it."""
    async with _three(limits(publish_rate_limit=80)) as sites:
        tabs = [await Client.connected(site.url, token=token({"sub": "ann"})) for site in sites]
        let: Counter[int] = Counter()
        for _ in range(60):
            for at, tab in enumerate(tabs):
                let[at] += "publish" in await tab.call("publish", channel="live:1", data=1)
        refilled = 80 * 3  # what may have come back meanwhile on a machine that takes three seconds for this
        assert 80 <= let.total() <= 80 * 10 / 8 + 3 + refilled
        assert let.total() < 180
        bob = await Client.connected(sites[0].url, token=token({"sub": "bob"}))
        answers = [await bob.call("publish", channel="live:1", data=1) for _ in range(80)]
        assert all("publish" in answer for answer in answers)


# --- at the door ------------------------------------------------------------------------------
async def _status(url: str, forwarded_for: str = "") -> int:
    headers = {"X-Forwarded-For": forwarded_for} if forwarded_for else {}
    try:
        connection = await websockets.connect(url, additional_headers=headers)
    except websockets.InvalidStatus as turned:
        return turned.response.status_code
    await connection.close()
    return 101


async def test_connections_from_one_address(log: ExpectedLog) -> None:
    """Beyond ``client.address_connection_limit`` it is 503, on every way in; who leaves makes room."""
    log.expect("connection.refused")
    chosen = settings(client={"address_connection_limit": 2}, sse={"enabled": True}, uni_websocket={"enabled": True})
    async with serving(chosen) as site:
        first, second = await Client.connected(site.url), await Client.open(site.url)
        assert await _status(site.url) == 503
        assert await _status(site.url.replace("websocket", "uni_websocket")) == 503
        for path in ("/connection/sse?cf_connect=%7B%7D", "/v1/channels/chat:1/events"):
            assert (await ask(site.port, path)).status == 503
        assert {fields["why"] for fields in log.seen("connection.refused")} == {"client.address_connection_limit"}
        assert met(site) == {"client.address_connection_limit": 4}
        await first.close()
        third = await Client.connected(site.url)
        await second.close()
        await third.close()
        assert site.node.addresses == {}


async def test_addresses_behind_a_proxy(log: ExpectedLog) -> None:
    """Behind a trusted proxy each client's own address counts, of IPv6 its network; who only says so is the proxy."""
    log.expect("connection.refused")
    behind = settings(client={"address_connection_limit": 1}, http_server={"trusted_proxies": ["127.0.0.1"]})
    async with serving(behind) as site:
        holders = [
            await Client.open(site.url, additional_headers={"X-Forwarded-For": address})
            for address in ("192.0.2.1", "9.9.9.9, 192.0.2.2", "2001:db8::1")
        ]
        assert await _status(site.url, "192.0.2.1") == 503
        assert await _status(site.url, "9.9.9.9") == 101
        assert await _status(site.url, "2001:db8::2") == 503
        assert await _status(site.url, "2001:db8:0:1::1") == 101
        for holder in holders:
            await holder.close()
    async with serving(limits(address_connection_limit=1)) as site:
        holder = await Client.open(site.url, additional_headers={"X-Forwarded-For": "192.0.2.1"})
        assert await _status(site.url, "192.0.2.2") == 503
        await holder.close()


async def test_open_files() -> None:
    """PROTOCOL 18.0.6: before the process may open no more files, newcomers are told so, and the log says why."""
    async with serving() as site:
        door = Door(site.node, Clock(), files=SPARE_FILES + 1)
        assert door.refusal("192.0.2.1") is None
        client = await Client.connected(site.url)
        why = door.refusal("192.0.2.1")
        assert why is not None
        assert "limit of open files" in why
        assert met(site) == {"client.connection_limit": 1}
        assert Door(site.node, Clock(), files=-1).refusal("192.0.2.1") is None, "no limit of files at all"
        await client.close()


async def test_what_is_turned_away_does_not_fill_the_log(log: ExpectedLog) -> None:
    """A flood of handshakes beyond a limit is a line a second; the counters know of each."""
    log.expect("connection.refused")
    async with serving(limits(address_connection_limit=1)) as site:
        holder = await Client.open(site.url)
        assert [await _status(site.url) for _ in range(20)] == [503] * 20
        assert len(log.seen("connection.refused")) < 20
        assert met(site) == {"client.address_connection_limit": 20}
        await holder.close()


# --- messages ---------------------------------------------------------------------------------
async def test_a_message_that_is_too_large_is_counted() -> None:
    """Close code 1009 is a limit that was met, on either kind of WebSocket."""
    chosen = settings(websocket={"message_size_limit": 100}, uni_websocket={"enabled": True, "message_size_limit": 100})
    async with serving(chosen) as site:
        for url in (site.url, site.url.replace("websocket", "uni_websocket")):
            connection = await websockets.connect(url)
            await connection.send("x" * 101)
            await connection.wait_closed()
            assert connection.close_code == 1009
        assert met(site) == {"websocket.message_size_limit": 1, "uni_websocket.message_size_limit": 1}


async def test_a_history_that_is_cut_is_counted() -> None:
    """PROTOCOL 4.6.2: who asks for more than ``client.history_max_publication_limit`` gets that many."""
    async with serving(limits(history_max_publication_limit=3)) as site:
        client = await Client.connected(site.url)
        for number in range(5):
            await client.ask("publish", channel="chat:1", data=number)
        for limit, found in ((2, 2), (-1, 3), (3, 3), (4, 3)):
            assert len((await client.ask("history", channel="chat:1", limit=limit))["publications"]) == found
        assert met(site) == {"client.history_max_publication_limit": 1}


async def test_who_does_not_connect_is_counted() -> None:
    """3502 and 3012 are limits of time that were met."""
    async with serving() as site:
        mute, deaf = await Client.open(site.url), await Client.connected(site.url, pongs=False)
        site.pass_time(40)
        assert [(await client.closed())[0] for client in (mute, deaf)] == [3502, 3012]
        assert met(site) == {"client.stale_close_delay": 1, "client.pong_timeout": 1}


# --- recoveries at once -------------------------------------------------------------------------
class PagesHeld(MemoryHistory):
    """Pages behind a position wait until they are let go; ``reading`` and ``most`` count those that are read."""

    def __init__(self) -> None:
        super().__init__(idempotency_ttl_ms=86_400_000)
        self.let_go = asyncio.Event()
        self.begun = asyncio.Semaphore(0)
        self.reading = self.most = 0

    async def read(self, channel: str, *arguments: Any, **options: Any) -> Page:
        """See ``History.read``."""
        if options.get("since") is None:
            return await super().read(channel, *arguments, **options)
        self.reading += 1
        self.most = max(self.most, self.reading)
        self.begun.release()
        try:
            await self.let_go.wait()
            return await super().read(channel, *arguments, **options)
        finally:
            self.reading -= 1


async def test_recoveries_take_turns() -> None:
    """Beyond ``client.concurrent_recovery_limit`` a recovery is not refused but waits, and newcomers do not wait."""
    history = PagesHeld()
    async with serving(limits(concurrent_recovery_limit=2), history=history) as site:
        writer = await Client.connected(site.url)
        channels = [f"chat:{number}" for number in range(10)]
        for channel in channels:
            for number in range(3):
                await writer.ask("publish", channel=channel, data=number)
        returning = [await Client.connected(site.url) for _ in channels]
        asked = [
            asyncio.create_task(client.ask("subscribe", channel=channel, recover=True, offset=1))
            for client, channel in zip(returning, channels, strict=True)
        ]
        for _ in range(2):
            await history.begun.acquire()
        assert await writer.ask("subscribe", channel="chat:new") is not None
        assert await writer.ask("publish", channel="chat:new", data="as ever") == {}
        history.let_go.set()
        for result in await asyncio.gather(*asked):
            assert result["recovered"] is True
            assert [pub["data"] for pub in result["publications"]] == [1, 2]
        assert history.most == 2
        assert met(site)["client.concurrent_recovery_limit"] >= 1


# --- joins and leaves -----------------------------------------------------------------------------
async def test_joins_in_a_crowd_are_not_told() -> None:
    """PROTOCOL 14.2.4: above so many subscribers nobody is told of joins and leaves; presence knows them all."""
    room = {"name": "room", **OPEN, "presence": True, "join_leave": True, "force_push_join_leave": True}
    async with serving(settings(channel={"namespaces": [{**room, "join_leave_limit": 3}]})) as site:
        watcher = await Client.connected(site.url)
        await watcher.ask("subscribe", channel="room:1")
        crowd = [await Client.connected(site.url) for _ in range(4)]
        for client in crowd:
            await client.ask("subscribe", channel="room:1")
        stats = await watcher.ask("presence_stats", channel="room:1")
        assert stats["num_clients"] == 5
        assert sum("join" in push for push in watcher.pushes) == 3
        for client in crowd[:3]:
            await client.ask("unsubscribe", channel="room:1")
        assert (await watcher.ask("presence_stats", channel="room:1"))["num_clients"] == 2
        assert [push["leave"]["info"]["client"] for push in watcher.pushes if "leave" in push] == [
            client.hello["client"] for client in crowd[1:3]
        ]
        assert met(site) == {"join_leave_limit": 3}


async def test_a_crowd_elsewhere_is_not_told_either() -> None:
    """A process with a crowd of its own tells it nothing of what another process says, which a small one does tell."""
    room = {"name": "room", **OPEN, "join_leave": True, "force_push_join_leave": True, "join_leave_limit": 2}
    async with _three(settings(channel={"namespaces": [room]})) as (here, crowded, there):
        hearers = [await Client.connected(site.url) for site in (crowded, crowded, crowded, there)]
        for client in hearers:
            await client.ask("subscribe", channel="room:1")
        for client in hearers:
            client.pushes.clear()
        newcomer = await Client.connected(here.url)
        await newcomer.ask("subscribe", channel="room:1")
        assert (await hearers[-1].push("join"))["info"]["client"] == newcomer.hello["client"]
        await newcomer.ask("publish", channel="room:1", data="last")
        for client in hearers[:3]:
            await client.push("pub")
            assert not any("join" in push for push in client.pushes)


# --- what one connection gets of a turn ------------------------------------------------------------
class TurnsCounted(MemoryBroker):
    """Counts the words that are said in each turn of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = 0
        self.said: Counter[int] = Counter()
        self._going = False

    @property
    def alone(self) -> bool:
        """See ``Broker.alone``; it listens itself."""
        return False

    def announce(self, word: Word) -> None:
        """See ``Broker.announce``."""
        self.said[self.turn] += 1
        super().announce(word)

    async def count(self) -> None:
        """Count turns for as long as this is awaited."""
        while True:
            self.turn += 1
            await asyncio.sleep(0)


@pytest.mark.parametrize(("frames", "each", "most"), [(1_500, 1, 32), (300, 5, 90), (10, 150, 50)])
async def test_one_read_is_many_turns(frames: int, each: int, most: int) -> None:
    """PROTOCOL 3.4.9: however many commands one read brings, 32 messages or 50 commands are carried out in a turn.

    64 KB of frames of one command each were answered in one turn: for 20 ms nobody else was.
    """
    broker = TurnsCounted()
    async with serving(broker=broker) as site:
        client = await Client.connected(site.url)
        counting = asyncio.create_task(broker.count())
        number = 0
        batch = []
        for _ in range(frames):
            ids = [client.command("publish")["id"] for _ in range(each)]
            batch.append(b"\n".join(b'{"id":%d,"publish":{"channel":"live:1","data":1}}' % id for id in ids))
            number += each
        client.connection.transport.write(b"".join(map(_frame, batch)))
        await client.until(lambda: len(client.ids) == number + 1)
        counting.cancel()
        assert client.ids[1:] == list(range(2, number + 2))
        assert broker.said.total() == number
        assert max(broker.said.values()) <= 2 * most, "what is left of one read, and the first of the next"


def _frame(payload: bytes) -> bytes:
    """A text frame of a client whose mask is nothing."""
    size = len(payload)
    head = bytes((0x81, 0x80 | size)) if size < 126 else bytes((0x81, 0xFE)) + size.to_bytes(2, "big")
    return head + bytes(4) + payload
