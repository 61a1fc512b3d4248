"""Faults that were here once, each with the story that showed it."""

import asyncio
import json
import time
from typing import Any

import pytest
from conftest import ExpectedLog
from patience import awake
from support import KEPT, Client, serving, settings, token
from tornado.httpclient import AsyncHTTPClient

from server.channels import Channels
from server.errors import Unavailable
from server.history import Appended, Draft, Retention
from server.history.memory import MemoryHistory
from server.node import PASSING_KEYS, Node
from server.presence.memory import MemoryPresence
from server.stream import ClientInfo, Page


class Publishing(MemoryPresence):
    """While somebody is entered, somebody else publishes, as may happen at any wait."""

    node: Node | None = None

    async def add(self, channel: str, info: ClientInfo) -> None:
        """Enter, then publish once."""
        await super().add(channel, info)
        node, self.node = self.node, None
        if node is not None:
            await node.publish(channel, node.channels.known(channel), Draft(b'"between"'))


async def test_the_reply_stands_before_the_tail() -> None:
    """In a room of many, what is published between page and reply comes after the reply; it once came before."""
    presence = Publishing(60)
    async with serving(presence=presence) as site:
        room = [await Client.connected(site.url) for _ in range(12)]
        for client in room:
            await client.ask("subscribe", channel="chat:a")
        newcomer = await Client.connected(site.url)
        seen: list[Any] = []
        newcomer.watch = seen.append
        presence.node = site.node
        await newcomer.ask("subscribe", channel="chat:a")
        assert (await newcomer.push("pub", "chat:a"))["data"] == "between"
        lines = [json.loads(line) for message in seen for line in message.split("\n")]
        kinds = ["reply" if "id" in line else next(iter(line["push"].keys() - {"channel"})) for line in lines if line]
        assert kinds.index("reply") < kinds.index("pub")
        for client in [*room, newcomer]:
            await client.close()


class Counting(MemoryHistory):
    """Counts its reads, and fails in one of them if asked to."""

    reads = 0
    fails_at = 0

    async def read(self, channel: str, retention: Retention, now_ms: int, **options: Any) -> Page:
        """As ever."""
        self.reads += 1
        if self.reads == self.fails_at:
            raise RuntimeError("a fault of ours")
        return await super().read(channel, retention, now_ms, **options)


async def test_history_forgets_a_channel_under_its_subscribers(log: ExpectedLog) -> None:
    """After the meta TTL of a quiet channel its subscriber is told, and the next costs few reads, not endless ones."""
    log.expect("subscription.lost")
    space = {"name": "chat", **KEPT, "history_ttl": "10s"}
    history = Counting()
    chosen = settings(channel={"history_meta_ttl": "30s", "namespaces": [space]})
    async with serving(chosen, history=history) as site:
        old = await Client.connected(site.url)
        await old.ask("subscribe", channel="chat:a")
        await old.ask("publish", channel="chat:a", data=1)
        site.clock.ahead_s += 100
        await history.sweep(site.node.channels.retention, site.node.now_ms)
        for _ in range(2):
            site.node.hub.sweep()  # nobody has needed the tail for a while
        before = history.reads
        new = await Client.connected(site.url)
        assert "epoch" not in await new.ask("subscribe", channel="chat:a")
        assert (await old.push("unsubscribe", "chat:a"))["code"] == 2500
        await new.ask("publish", channel="chat:a", data=2)
        assert (await new.push("pub", "chat:a"))["offset"] == 1
        assert history.reads - before <= 5
        await old.close()
        await new.close()


async def test_the_sweep_sees_a_forgotten_channel(log: ExpectedLog) -> None:
    """A subscriber of a channel that history forgot is told by the sweep, though nobody else comes."""
    log.expect("subscription.lost")
    history = MemoryHistory()
    async with serving(history=history) as site:
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="chat:a")
        await client.ask("publish", channel="chat:a", data=1)
        history._log.streams.clear()
        site.pass_time(6)
        assert (await client.push("unsubscribe", "chat:a"))["code"] == 2500
        await client.close()


@pytest.mark.parametrize("fails_at", [1, 2, 3])
async def test_one_fault_in_a_read_costs_who_asked(log: ExpectedLog, fails_at: int) -> None:
    """A fault while reading is an error for who waited, and the channel works on; it once hung for all."""
    log.expect("task.failed", "channel.repair_failed")
    history = Counting()
    async with serving(history=history) as site:
        writer = await Client.connected(site.url)
        for number in range(350):
            await writer.ask("publish", channel="chat:a", data=number)
        history.fails_at = history.reads + fails_at
        unlucky = await Client.connected(site.url)
        reply = await unlucky.call("subscribe", channel="chat:a", recover=True, offset=0)
        if fails_at == 1:
            assert reply["error"]["code"] == 100
        else:
            page = reply["subscribe"]["publications"]
            rest = await unlucky.publications("chat:a", 350 - len(page))
            assert [publication["offset"] for publication in page + rest] == list(range(1, 351))
        lucky = await Client.connected(site.url)
        async with awake() as watch:
            await lucky.ask("subscribe", channel="chat:a")
        assert watch.s < 2
        for client in (writer, unlucky, lucky):
            await client.close()


def test_long_names_are_not_remembered() -> None:
    """Names too long for a channel leave no trace; 8,192 of them once held half a gigabyte."""
    channels = Channels(settings().channel)
    for number in range(100):
        channels.namespace(f"{number}:" + "x" * 60_000)
        channels.namespace(f"chat:{number}")
    assert channels._cached.cache_info().currsize == 100


async def test_keys_of_passing_channels_cost_the_same_when_full() -> None:
    """With the store of keys full a new one costs one old one, not a look at all of them."""
    async with serving() as site:
        for number in range(PASSING_KEYS):
            assert not site.node.repeated("live:a", str(number))
        before = time.process_time()
        for number in range(2_000):
            assert not site.node.repeated("live:b", str(number))
        assert time.process_time() - before < 1  # it took four seconds
        assert site.node.repeated("live:b", "1999")


class Slow(MemoryPresence):
    """Removals take their time, and may fail."""

    gate: asyncio.Event | None = None
    away = False

    async def remove(self, channel: str, client: str) -> bool:
        """When the gate opens."""
        if self.away:
            raise Unavailable("presence is away")
        if self.gate is not None:
            await self.gate.wait()
        return await super().remove(channel, client)


async def test_a_late_leave_does_not_undo_a_new_join() -> None:
    """Who is unsubscribed and comes back at once is present, and its leave is told before its second join."""
    presence = Slow(60)
    async with serving(presence=presence) as site:
        client = await Client.connected(site.url)
        watcher = await Client.connected(site.url)
        await watcher.ask("subscribe", channel="chat:a", join_leave=True)
        await client.ask("subscribe", channel="chat:a")
        presence.gate = asyncio.Event()
        subscribing = client.command("subscribe", channel="chat:a")
        session = site.node.sessions[client.hello["client"]]
        session.unsubscribe_by_order("chat:a")
        await client.push("unsubscribe", "chat:a")
        await client.send(subscribing)
        await watcher.ask("presence", channel="chat:a")
        presence.gate.set()
        await client.reply(subscribing["id"])
        await watcher.until(lambda: sum(1 for push in watcher.pushes if "join" in push or "leave" in push) >= 4)
        kinds = [next(iter(push.keys() - {"channel"})) for push in watcher.pushes]
        assert kinds == ["join", "join", "leave", "join"]
        assert client.hello["client"] in (await watcher.ask("presence", channel="chat:a"))["presence"]
        await client.close()
        await watcher.close()


async def test_a_removal_that_failed_is_made_up_for(log: ExpectedLog) -> None:
    """A member that presence could not take out when it left is taken out when presence is back."""
    log.expect("presence.unavailable")
    presence = Slow(60)
    async with serving(presence=presence) as site:
        client = await Client.connected(site.url)
        watcher = await Client.connected(site.url)
        await client.ask("subscribe", channel="chat:a")
        presence.away = True
        await client.ask("unsubscribe", channel="chat:a")
        presence.away = False
        assert len((await watcher.ask("presence", channel="chat:a"))["presence"]) == 1
        site.pass_time(20)
        assert (await watcher.ask("presence", channel="chat:a")).get("presence", {}) == {}
        await client.close()
        await watcher.close()


async def test_removed_payloads_are_gone_from_memory_too(log: ExpectedLog) -> None:
    """What history_remove erased is not recovered from the channel's tail."""
    async with serving() as site:
        client = await Client.connected(site.url)
        epoch = (await client.ask("subscribe", channel="chat:a")).get("epoch", "")
        for number in range(5):
            await client.ask("publish", channel="chat:a", data=number)
        epoch = (await client.ask("history", channel="chat:a"))["epoch"]
        back = await Client.connected(site.url)
        await AsyncHTTPClient().fetch(
            f"http://127.0.0.1:{site.port}/api/history_remove",
            method="POST",
            headers={"X-API-Key": "api-key"},
            body='{"channel":"chat:a"}',
        )
        result = await back.ask("subscribe", channel="chat:a", recover=True, offset=2, epoch=epoch)
        assert not result.get("recovered")
        assert result["offset"] == 5
        await client.close()
        await back.close()


async def test_refusals_without_end(log: ExpectedLog) -> None:
    """A client that earns a thousand refusals in a row is sent away with 3509, and fills no log."""
    async with serving() as site:
        clumsy = await Client.connected(site.url)
        for _ in range(2):
            for _ in range(600):
                assert await clumsy.refused("publish", channel="nowhere:a", data=1) == 102
            await clumsy.ask("publish", channel="live:a", data=1)
        client = await Client.connected(site.url)
        commands = [client.command("publish", channel="nowhere:a", data=1) for _ in range(1001)]
        await client.send(*commands[:600])
        await client.send(*commands[600:])
        assert await client.closed() == (3509, "too many errors")
        assert len(log.seen("command.refused")) <= 60
        await clumsy.close()


class Hanging(MemoryHistory):
    """Never answers an append."""

    async def append(self, channel: str, draft: Draft, retention: Retention, now_ms: int) -> Appended:
        """Wait for ever."""
        await asyncio.Event().wait()
        raise AssertionError


async def test_a_broadcast_waits_once() -> None:
    """While history hangs, a broadcast to many channels ends after one publish timeout, not one for each."""
    async with serving(settings(sqlite={"publish_timeout": "300ms"}), history=Hanging()) as site:
        async with awake() as watch:
            response = await AsyncHTTPClient().fetch(
                f"http://127.0.0.1:{site.port}/api/broadcast",
                method="POST",
                headers={"X-API-Key": "api-key"},
                body=json.dumps({"channels": [f"chat:{number}" for number in range(30)], "data": 1}),
            )
        assert watch.s < 5
        answers = json.loads(response.body)["result"]["responses"]
        assert [answer["error"]["code"] for answer in answers] == [100] * 30


async def test_the_clock_is_set_back() -> None:
    """After a step back of ten minutes pings go on as before, for those who were here and those who come."""
    async with serving() as site:
        old = await Client.connected(site.url)
        site.pass_time(1)
        site.clock.ahead_s -= 600
        site.pass_time(1)
        new = await Client.connected(site.url)
        site.pass_time(26)
        await old.until(lambda: old.pings >= 1)
        await new.until(lambda: new.pings >= 1)
        await old.close()
        await new.close()


async def test_a_key_with_skip_history_counts() -> None:
    """An idempotency key works for a publication that skips history, too."""
    async with serving() as site:
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="chat:a")
        body = {"channel": "chat:a", "data": 1, "skip_history": True, "idempotency_key": "k"}
        for data in (1, 2):
            body["data"] = data
            await AsyncHTTPClient().fetch(
                f"http://127.0.0.1:{site.port}/api/publish",
                method="POST",
                headers={"X-API-Key": "api-key"},
                body=json.dumps(body),
            )
        await client.ask("publish", channel="chat:a", data=3)
        assert [publication["data"] for publication in await client.publications("chat:a", 2)] == [1, 3]
        await client.close()


async def test_a_refused_connect_reads_on() -> None:
    """A connect that is refused with many commands behind it still hears the client's goodbye."""
    async with serving() as site:
        client = await Client.open(site.url)
        commands = [client.command("subscribe", channel=f"chat:{number}") for number in range(200)]
        await client.send({"id": 500, "connect": {"token": token({"sub": "42", "exp": 1})}}, *commands)
        assert (await client.reply(500))["error"]["code"] == 109
        async with awake() as watch:
            await client.close()
        assert watch.s < 2
