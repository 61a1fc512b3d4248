"""PROTOCOL 18.0.7: recoveries that need a read of history begin at a rate; what clients see of it, and who does not."""

import asyncio
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from hopper import EventStream, ask, events
from support import KEPT, PATIENCE_S, Client, Process, Site, config, serving, settings, token

from server.broker.memory import Bus, MemoryBroker
from server.history.memory import Log, MemoryHistory
from server.settings import Settings
from server.stream import Page

T = TypeVar("T")

SETTING = "client.recovery_rate_limit"
BIG = "x" * 20_000
"""More than is announced to other processes: they read it."""

PATIENT: dict[str, Any] = {"sqlite": {"publish_timeout": "600s"}}
"""So that nobody in line is refused."""

SOME: dict[str, Any] = {"sqlite": {"publish_timeout": "20s"}}
"""So that there is room for ten seconds' recoveries in line, and whoever comes behind them is refused."""

CAUGHT_UP = [1, 2]
"""What those who come back from offset 1 have missed."""


class PagesCounted(MemoryHistory):
    """Counts the pages that are read from behind a position, in ``pages``."""

    def __init__(self, log: Log | None = None) -> None:
        super().__init__(idempotency_ttl_ms=86_400_000, log=log)
        self.pages = 0

    async def read(self, channel: str, *arguments: Any, **options: Any) -> Page:
        """See ``History.read``."""
        self.pages += options.get("since") is not None
        return await super().read(channel, *arguments, **options)


def limited(per_second: int, **sections: Any) -> Settings:
    """The tests' configuration with so many recoveries a second."""
    return settings(client={"recovery_rate_limit": per_second}, **sections)


def waits(site: Site) -> int:
    """How often somebody met the limit."""
    found: int = site.node.counts.limits[SETTING]
    return found


async def _until_in_line(site: Site, count: int) -> None:
    """Wait until so many have had to wait."""
    async with asyncio.timeout(PATIENCE_S):
        while waits(site) < count:
            assert (await ask(site.port, "/health/live")).status == 200


async def _let_in_or_not(site: Site, count: int, asked: Sequence[asyncio.Task[T]]) -> list[T]:
    """What becomes of those who ``asked`` when so many had to wait or were refused: who waits then is let in."""
    await _until_in_line(site, count)
    site.node.renew(limited(0, **SOME))
    return await asyncio.gather(*asked)


async def _filled(url: str, channels: Sequence[str]) -> Client:
    """Publish 0, 1 and 2 to each; returns whoever did, subscribed to none."""
    writer = await Client.connected(url)
    for channel in channels:
        for number in range(3):
            await writer.ask("publish", channel=channel, data=number)
    return writer


async def _come_back(client: Client, channel: str, epoch: str = "") -> dict[str, Any]:
    reply: dict[str, Any] = await client.call("subscribe", channel=channel, recover=True, offset=1, epoch=epoch)
    return reply


def _caught_up(reply: dict[str, Any]) -> bool:
    """Has it recovered?  A reply that says so and is wrong is an ``AssertionError``."""
    if "error" in reply:
        assert reply["error"] == {"code": 100, "message": "internal server error", "temporary": True}
        return False
    assert reply["subscribe"]["recovered"] is True
    assert [pub["data"] for pub in reply["subscribe"]["publications"]] == CAUGHT_UP
    return True


async def test_many_that_come_back_are_let_in_at_the_rate() -> None:
    """Some recover at once, some wait in turn, and whoever would wait too long is refused and told to try again."""
    history = PagesCounted()
    async with serving(limited(2, **SOME), history=history) as site:
        channels = [f"chat:{number}" for number in range(40)]
        writer = await _filled(site.url, channels)
        returning = [await Client.connected(site.url) for _ in channels]
        clock = asyncio.get_running_loop().time
        began = clock()
        asked = [asyncio.create_task(_come_back(*pair)) for pair in zip(returning, channels, strict=True)]
        async with asyncio.timeout(PATIENCE_S):
            while history.pages < 4:
                assert (await ask(site.port, "/health/live")).status == 200
        let_in, most = history.pages, 2 + (clock() - began) * 2 + 1
        assert let_in <= most
        assert "subscribe" in await writer.call("subscribe", channel="chat:0"), (
            "who does not come back waits for nobody"
        )
        replies = await _let_in_or_not(site, int(38 - (most - 2)), asked)
        outcomes = [_caught_up(reply) for reply in replies]
        assert let_in <= sum(outcomes) <= history.pages
        assert not all(outcomes)

        for client, channel, outcome in zip(returning, channels, outcomes, strict=True):
            assert outcome or _caught_up(await _come_back(client, channel))


class FollowsCounted(MemoryBroker):
    """Counts the channels that others were ever asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: set[str] = set()

    async def follow(self, channel: str) -> None:
        """See ``Broker.follow``."""
        self.asked.add(channel)
        await super().follow(channel)


async def test_who_is_refused_costs_the_broker_nothing() -> None:
    """What a channel that is not let in would have to hear from other processes is not asked for."""
    broker = FollowsCounted()
    async with serving(limited(1, **SOME), broker=broker) as site:
        channels = [f"chat:{number}" for number in range(30)]
        await _filled(site.url, channels)
        returning = [await Client.connected(site.url) for _ in channels]
        asked = [asyncio.create_task(_come_back(*pair)) for pair in zip(returning, channels, strict=True)]
        replies = await _let_in_or_not(site, 27, asked)
        assert not all(map(_caught_up, replies))
        let_in = {channel for channel, reply in zip(channels, replies, strict=True) if _caught_up(reply)}
        assert let_in == broker.asked


async def test_what_memory_has_waits_for_nobody() -> None:
    """Those who missed nothing, or what the channel's tail still has, take no token: however many they are."""
    history = PagesCounted()
    async with serving(limited(1), history=history) as site:
        writer = await _filled(site.url, ["chat:1"])
        epoch = (await writer.ask("subscribe", channel="chat:1"))["epoch"]
        assert _caught_up(await _come_back(await Client.connected(site.url), "chat:1", epoch))
        assert history.pages == 1
        for _ in range(20):
            client = await Client.connected(site.url)
            assert _caught_up(await _come_back(client, "chat:1", epoch))
            await client.ask("unsubscribe", channel="chat:1")
            missed = await client.ask("subscribe", channel="chat:1", recover=True, offset=3, epoch=epoch)
            assert (missed["recovered"], missed.get("publications", [])) == (True, [])
        assert (history.pages, waits(site)) == (1, 0)


async def test_the_newest_is_a_recovery_as_well() -> None:
    """PROTOCOL 11.6: where everybody gets the newest publication it is read for each of them, and so at the rate."""
    cache = {"name": "score", **KEPT, "force_recovery_mode": "cache", "auto_cache_recover": True}
    async with serving(limited(1, channel={"namespaces": [cache]}, **SOME)) as site:
        channels = [f"score:{number}" for number in range(30)]
        await _filled(site.url, channels)
        coming = [await Client.connected(site.url) for _ in channels]
        asked = [
            asyncio.create_task(client.call("subscribe", channel=channel))
            for client, channel in zip(coming, channels, strict=True)
        ]
        await _until_in_line(site, 27)
        site.node.renew(limited(0, channel={"namespaces": [cache]}, **SOME))
        replies = await asyncio.gather(*asked)
        let_in = [reply["subscribe"] for reply in replies if "subscribe" in reply]
        assert 1 <= len(let_in) < len(replies)
        assert all([pub["data"] for pub in result["publications"]] == [2] for result in let_in)
        assert {reply["error"]["code"] for reply in replies if "error" in reply} == {100}


async def test_a_crowd_of_one_channel_takes_one_token() -> None:
    """A hundred who come back to a channel while it waits for its turn are one recovery to history."""
    history = PagesCounted()
    async with serving(limited(1, **PATIENT), history=history) as site:
        others = [f"chat:{number}" for number in range(40)]
        await _filled(site.url, ["chat:crowd", *others])
        channels = [*others, *["chat:crowd"] * 100]
        returning = [await Client.connected(site.url) for _ in channels]
        asked = [asyncio.create_task(_come_back(*pair)) for pair in zip(returning, channels, strict=True)]
        await _until_in_line(site, 120)
        site.node.renew(limited(0, **PATIENT))
        assert all(map(_caught_up, await asyncio.gather(*asked)))
        assert history.pages == 41


async def test_the_live_do_not_wait_for_those_who_come_back() -> None:
    """A hole under live subscribers is repaired from history while a line of recoveries waits for its turn."""
    bus, log = Bus(), Log()
    chosen = limited(1, **PATIENT)
    async with (
        serving(chosen, history=PagesCounted(log), broker=MemoryBroker(bus)) as here,
        serving(chosen, history=PagesCounted(log), broker=MemoryBroker(bus)) as there,
    ):
        channels = [f"chat:{number}" for number in range(60)]
        await _filled(there.url, channels)
        live, writer = await Client.connected(here.url), await Client.connected(there.url)
        await live.ask("subscribe", channel="chat:live")
        returning = [await Client.connected(here.url) for _ in channels]
        asked = [asyncio.create_task(_come_back(*pair)) for pair in zip(returning, channels, strict=True)]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        for number in range(3):
            await writer.ask("publish", channel="chat:live", data=[number, BIG])
            assert (await live.push("pub", "chat:live"))["data"] == [number, BIG]
        assert here.node.counts.repairs == 3
        assert any(not task.done() for task in asked)
        for site in (here, there):
            site.node.renew(limited(0, **PATIENT))
        assert all(map(_caught_up, await asyncio.gather(*asked)))


async def test_who_leaves_the_line_holds_nobody_up() -> None:
    """Clients that go away while they wait are not read for."""
    history = PagesCounted()
    chosen = limited(1, **PATIENT)
    async with serving(chosen, history=history) as site:
        channels = [f"chat:{number}" for number in range(80)]
        await _filled(site.url, [*channels, "chat:last"])
        leaving = [await Client.connected(site.url) for _ in channels]
        for client, channel in zip(leaving, channels, strict=True):
            await client.send(client.command("subscribe", channel=channel, recover=True, offset=1))
        await _until_in_line(site, 60)
        for client in leaving:
            await client.drop()
        assert _caught_up(await _come_back(await Client.connected(site.url), "chat:last"))
        assert history.pages < 30


async def test_commands_that_wait_behind_one_another_are_answered_in_time() -> None:
    """A client that comes back to many channels at once waits for all of them together no longer than for one."""
    async with serving(limited(1, sqlite={"publish_timeout": "3s"})) as site:
        site.clock.run()
        channels = [f"chat:{number}" for number in range(30)]
        await _filled(site.url, channels)
        client = await Client.connected(site.url)
        commands = [client.command("subscribe", channel=channel, recover=True, offset=1) for channel in channels]
        await client.send(*commands)
        outcomes = [_caught_up(await client.reply(command["id"])) for command in commands]
        assert outcomes[0]
        assert outcomes.count(False) >= 10


async def test_a_poll_that_comes_too_late_is_told_to_come_again() -> None:
    """A request with a cursor is a recovery like any other: 503 with ``Retry-After`` when its turn is too far off."""
    async with serving(limited(1, **SOME)) as site:
        channels = [f"chat:{number}" for number in range(40)]
        await _filled(site.url, channels)
        poll = "/v1/channels/{}/publications?since=:1"
        asked = [
            asyncio.create_task(ask(site.port, poll.format(channel), headers={"Prefer": "wait=20"}))
            for channel in channels
        ]
        replies = await _let_in_or_not(site, 37, asked)
        assert {reply.status for reply in replies} == {200, 503}
        assert all("retry-after" in reply.headers for reply in replies if reply.status == 503)
        for reply in replies:
            if reply.status == 200:
                assert [one["data"] for one in reply.json["publications"]] == CAUGHT_UP


# --- event streams and polls -----------------------------------------------------------
def _read_from(channel: str) -> str:
    return f"/v1/channels/{channel}/events?since=:1"


async def _caught_up_reader(stream: EventStream) -> bool:
    """Has it recovered?  Who was put off is told to come back."""
    if "content-length" in stream.headers:
        assert await stream.put_off() == 3004
        return False
    await stream.began()
    assert [found.data["data"] for found in await stream.take(2)] == CAUGHT_UP
    return True


async def test_readers_wait_in_line_as_others_do() -> None:
    """Event streams that come back, more than a second's, all get what they missed, one after the other."""
    history = PagesCounted()
    async with serving(limited(5, **PATIENT), history=history) as site:
        channels = [f"chat:{number}" for number in range(24)]
        await _filled(site.url, channels)
        streams = await asyncio.gather(*(EventStream.open(site.port, _read_from(channel)) for channel in channels))
        assert all([await _caught_up_reader(stream) for stream in streams])
        assert (history.pages, waits(site) >= 6) == (24, True)
        for stream in streams:
            await stream.drop()


async def test_a_reader_that_is_put_off_comes_back() -> None:
    """An ``EventSource`` never returns after a 503: so it gets 200, a time to come again, and an end; nothing stays."""
    async with serving(limited(1, **SOME)) as site:
        channels = [f"chat:{number}" for number in range(30)]
        await _filled(site.url, channels)
        asked = [asyncio.create_task(EventStream.open(site.port, _read_from(channel))) for channel in channels]
        streams = await _let_in_or_not(site, 27, asked)
        outcomes = [await _caught_up_reader(stream) for stream in streams]
        assert True in outcomes
        assert False in outcomes
        assert waits(site) >= outcomes.count(False)
        assert site.node.counts.refusals[100] == outcomes.count(False)
        head = await ask(site.port, _read_from(channels[outcomes.index(False)]), method="HEAD")
        assert head.status == 200
        assert {*site.node.hub.feeds} == {
            channel for channel, outcome in zip(channels, outcomes, strict=True) if outcome
        }, "who was put off follows nothing"

        async with events(site.port, _read_from(channels[outcomes.index(False)])) as again:
            assert await _caught_up_reader(again)
        for stream in streams:
            await stream.drop()


async def _order(site: Site, method: str, **body: Any) -> None:
    reply = await ask(site.port, f"/api/{method}", body=body, headers={"X-API-Key": "api-key"})
    assert reply.json == {"result": {}}


async def _line_of(site: Site, count: int) -> tuple[Client, asyncio.Task[dict[str, Any]]]:
    """Somebody without a user who waits with so many made-up channels, in one connect; returns whoever that is."""
    client = await Client.open(site.url)
    before = waits(site)
    names = [f"chat:made-up-{before}-{number}" for number in range(count)]
    subs = {name: {"recover": True, "offset": 1, "epoch": "zz"} for name in names}
    asked = asyncio.create_task(client.call("connect", subs=subs))
    await _until_in_line(site, before + count - 5)  # what comes at once are five at most; all of them come together
    return client, asked


async def test_who_is_unsubscribed_in_line_is_told_no_false_reset() -> None:
    """A reader that loses one of two channels while it waits begins with the other; the lost one has no position."""
    async with serving(limited(1, **PATIENT)) as site:
        await _filled(site.url, ["chat:a", "chat:b"])
        hostile, asked = await _line_of(site, 20)
        headers = {"Authorization": f"Bearer {token({'sub': '42'})}"}
        path = "/v1/events?channel=chat:a&channel=chat:b&since=:1&since=:1"
        before = waits(site)
        opening = asyncio.create_task(EventStream.open(site.port, path, headers))
        await _until_in_line(site, before + 2)
        await _order(site, "unsubscribe", user="42", channel="chat:a")
        site.node.renew(limited(0, **PATIENT))
        stream = await opening
        assert ":" in await stream.began()
        found = await stream.take(3)
        assert [(event.kind, event.data["channel"]) for event in found] == [
            ("message", "chat:b"),
            ("message", "chat:b"),
            ("unsubscribe", "chat:a"),
        ]
        await stream.drop()
        await asked
        await hostile.drop()


async def test_who_is_unsubscribed_in_line_is_refused() -> None:
    """A command that waits for its turn is answered 103 when the back end ends its subscription, and costs no read."""
    history = PagesCounted()
    async with serving(limited(1, **PATIENT), history=history) as site:
        await _filled(site.url, ["chat:a"])
        hostile, asked = await _line_of(site, 20)
        client = await Client.connected(site.url, token=token({"sub": "42"}))
        before = waits(site)
        coming = asyncio.create_task(_come_back(client, "chat:a"))
        await _until_in_line(site, before + 1)
        await _order(site, "unsubscribe", user="42", channel="chat:a")
        assert (await coming)["error"]["code"] == 103
        site.node.renew(limited(0, **PATIENT))
        await asked
        assert history.pages == 20, "the made-up ones alone"
        await hostile.drop()


async def test_a_poll_that_is_ended_in_line_costs_no_read() -> None:
    """A poll whose user is sent away while it waits for its turn is answered so, and takes no token."""
    history = PagesCounted()
    async with serving(limited(1, **PATIENT), history=history) as site:
        await _filled(site.url, ["chat:a"])
        hostile, asked = await _line_of(site, 20)
        before = waits(site)
        headers = {"Prefer": "wait=20", "Authorization": f"Bearer {token({'sub': '42'})}"}
        polling = asyncio.create_task(ask(site.port, "/v1/channels/chat:a/publications?since=:1", headers=headers))
        await _until_in_line(site, before + 1)
        await _order(site, "disconnect", user="42", disconnect={"code": 4100, "reason": "banned"})
        site.node.renew(limited(0, **PATIENT))
        ended = await polling
        assert (ended.status, ended.json["code"]) == (403, 4100)
        await asked
        assert history.pages == 20, "the made-up ones alone"
        await hostile.drop()


# --- whose turn it is ----------------------------------------------------------------------
async def test_made_up_channels_of_one_address_take_recovery_from_nobody_else() -> None:
    """With 450 of one address in line for channels that never were, users are served within their turn, in time.

    They come by commands, by polls and by event streams; each waits for a token or two, not for the hundreds.
    """
    async with serving(limited(5, **PATIENT)) as site:
        channels = [f"chat:{number}" for number in range(6)]
        await _filled(site.url, channels)
        lines = [await _line_of(site, 120) for _ in range(4)]
        assert waits(site) >= 450
        for number, channel in enumerate(channels):
            mine = token({"sub": str(number)})
            headers = {"Authorization": f"Bearer {mine}"}
            if number % 3 == 0:
                assert _caught_up(await _come_back(await Client.connected(site.url, token=mine), channel))
            elif number % 3 == 1:
                path, headers = f"/v1/channels/{channel}/publications?since=:1", {**headers, "Prefer": "wait=20"}
                poll = await ask(site.port, path, headers=headers)
                assert [one["data"] for one in poll.json["publications"]] == CAUGHT_UP
            else:
                async with events(site.port, _read_from(channel), headers) as stream:
                    assert await _caught_up_reader(stream)
        assert not any(asked.done() for _, asked in lines)
        site.node.renew(limited(0, **PATIENT))
        for client, asked in lines:
            assert (await asked)["connect"]["subs"]
            await client.drop()


async def test_the_limit_is_read_again(tmp_path: Path) -> None:
    """SIGHUP with another rate holds for those who come next, and for those who wait."""
    chosen = config(client={"recovery_rate_limit": 1}, prometheus={"enabled": True}, **PATIENT)
    with Process(tmp_path, chosen) as server:
        channels = [f"chat:{number}" for number in range(60)]
        writer = await _filled(server.url, channels)
        returning = [await Client.connected(server.url) for _ in channels]
        asked = [asyncio.create_task(_come_back(*pair)) for pair in zip(returning, channels, strict=True)]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        (tmp_path / "config.json").write_text(
            (tmp_path / "config.json").read_text().replace('"recovery_rate_limit": 1', '"recovery_rate_limit": 0')
        )
        server.send(signal.SIGHUP)
        async with asyncio.timeout(PATIENCE_S):
            assert all(map(_caught_up, await asyncio.gather(*asked)))
        metrics = (await ask(server.port, "/metrics")).body.decode()
        assert f'waterspout_limits_total{{setting="{SETTING}"}}' in metrics
        for client in (writer, *returning):
            await client.drop()
