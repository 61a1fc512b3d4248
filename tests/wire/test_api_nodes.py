"""PROTOCOL 15.2 over two processes: what one is told, the clients of the other see."""

import asyncio

import msgspec
from patience import impatient
from support import Client, token
from test_away import SHORT_S, call, one, two

from server import orders
from server.broker.memory import Bus, MemoryBroker
from server.history.memory import Log
from server.peers import Peers
from server.presence.memory import Board


async def test_channels_of_all_processes() -> None:
    """Channels are those of every process, and their subscribers are added up."""
    async with two() as (here, there):
        first, second = await Client.connected(here.url), await Client.connected(there.url)
        for client, channels in ((first, ("chat:1", "chat:2")), (second, ("chat:2", "live:3"))):
            for channel in channels:
                await client.ask("subscribe", channel=channel)
        for site in (here, there):
            found = (await call(site, "channels"))["result"]["channels"]
            assert found == {
                "chat:1": {"num_clients": 1},
                "chat:2": {"num_clients": 2},
                "live:3": {"num_clients": 1},
            }
            assert set((await call(site, "channels", pattern="{chat:1,l*}"))["result"]["channels"]) == {
                "chat:1",
                "live:3",
            }
        for client in (first, second):
            await client.close()


async def test_connections_of_all_processes() -> None:
    """A user's connections are those of every process, and each process is told of them whole."""
    async with two() as (here, there):
        first = await Client.connected(here.url, token=token({"sub": "ann"}))
        second = await Client.connected(there.url, token=token({"sub": "ann"}), name="phone")
        other = await Client.connected(there.url, token=token({"sub": "ben"}))
        await second.ask("subscribe", channel="chat:1")
        mine = {first.hello["client"], second.hello["client"]}
        for site in (here, there):
            found = (await call(site, "connections", user="ann"))["result"]
            assert (set(found["connections"]), found["num_connections"]) == (mine, 2)
            about = found["connections"][second.hello["client"]]
            assert (about["app_name"], about["state"]) == ("phone", {"channels": {"chat:1": {}}})
            narrowed = (await call(site, "connections", user="ann", client=second.hello["client"]))["result"]
            assert narrowed == {"connections": {second.hello["client"]: about}, "num_connections": 1}
        for client in (first, second, other):
            await client.close()


async def test_connections_when_a_process_does_not_answer() -> None:
    """Half of the truth is none: while another process is alive and silent it is error 100."""
    async with two() as (here, there):
        there.broker.leave()
        with impatient(SHORT_S):
            assert (await call(here, "connections", user="ann"))["error"]["code"] == 100


async def test_connections_when_a_process_answers_otherwise() -> None:
    """What another process answers that cannot be read, or nothing after a fault of its own, is error 100."""
    bus, loop = Bus(), asyncio.get_running_loop()
    async with one(bus, Log(), Board()) as here:
        broker = MemoryBroker(bus)
        await broker.open("old")
        whole = orders.ConnectionsAnswer(1, [orders.Connection("c", "ann", "websocket", "json", "::1", 1)])
        answers = [msgspec.msgpack.encode(answer) for answer in (["c"], whole)] + [b""]
        old = Peers(
            broker,
            "old",
            carry_out=lambda body, asked_at: answers.pop(0),
            clock=loop.time,
            later=loop.call_later,
            lease_s=10,
        )
        broker.on_note = old.heard
        old.tick(b"")
        await here.node.tasks.idle()
        assert (await call(here, "connections", user="ann"))["error"]["code"] == 100
        found = (await call(here, "connections", user="ann"))["result"]
        assert (found["num_connections"], found["connections"]["c"]["node"]) == (1, "old")
        assert (await call(here, "connections", user="ann"))["error"]["code"] == 100
        assert answers == []
        old.close()
        await broker.close()


async def test_channels_when_a_process_does_not_answer() -> None:
    """Half of the truth is none: while another process is alive and silent it is error 100."""
    async with two() as (here, there):
        there.broker.leave()
        with impatient(SHORT_S):
            assert (await call(here, "channels"))["error"]["code"] == 100


async def test_a_batch_reaches_the_other_process_in_turn() -> None:
    """Subscribe, publish, unsubscribe and disconnect of one batch come to a client elsewhere in that order."""
    async with two() as (here, there):
        client = await Client.connected(there.url, token=token({"sub": "ann"}))
        commands = [
            {"subscribe": {"user": "ann", "channel": "chat:1"}},
            {"publish": {"channel": "chat:1", "data": "hi"}},
            {"unsubscribe": {"user": "ann", "channel": "chat:1"}},
            {"disconnect": {"user": "ann", "disconnect": {"code": 4000, "reason": "done"}}},
        ]
        replies = (await call(here, "batch", commands=commands))["replies"]
        assert [list(reply) for reply in replies] == [["subscribe"], ["publish"], ["unsubscribe"], ["disconnect"]]
        assert await client.closed() == (4000, "done")
        names = ("subscribe", "pub", "unsubscribe")
        kinds = [next(kind for kind in names if kind in push) for push in client.pushes]
        assert kinds[0] == "subscribe"
        assert kinds[-1] == "unsubscribe"


async def test_what_was_redacted_is_gone_everywhere() -> None:
    """redact at one process takes the payload out of history and out of the memory of another; offsets stay."""
    async with two() as (here, there):
        speaker, first = await Client.connected(here.url), await Client.connected(there.url)
        await first.ask("subscribe", channel="chat:1")
        for number in range(1, 6):
            await speaker.ask("publish", channel="chat:1", data={"secret": number})
        await first.publications("chat:1", 5)
        epoch = (await speaker.ask("history", channel="chat:1"))["epoch"]
        assert there.node.hub.feeds["chat:1"].tail, "without a tail this test shows nothing"
        assert await call(here, "redact", channel="chat:1", offset=3) == {"result": {}}
        late = await Client.connected(there.url)
        result = await late.ask("subscribe", channel="chat:1", recover=True, offset=1, epoch=epoch)
        assert [one["offset"] for one in result["publications"]] == [2, 3, 4, 5]
        assert result["publications"][0]["data"] == {"secret": 2}
        assert "secret" not in str(result["publications"][1])
        history = (await call(there, "history", channel="chat:1", limit=-1))["result"]
        assert [one["offset"] for one in history["publications"]] == [1, 2, 3, 4, 5]
        assert "3" not in str(history["publications"][2]["data"])
        for request, code in (
            ({"channel": "chat:1", "offset": 99}, 112),
            ({"channel": "chat:1"}, 107),
            ({"channel": "live:1", "offset": 1}, 108),
            ({"channel": "nope:1", "offset": 1}, 102),
        ):
            assert (await call(here, "redact", **request))["error"]["code"] == code
