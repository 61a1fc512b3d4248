"""PROTOCOL 11.6: channels of which only the newest publication counts."""

import asyncio
import json
from typing import Any
from urllib.parse import quote

import pytest
from hopper import events
from support import KEPT, OPEN, Client, Site, serving, settings, token

from server.history import Draft
from server.orders import SubscribeOrder, Target

FORMATS = pytest.mark.parametrize("format", ["json", "protobuf"])
GERMAN = {"key": "lang", "cmp": "eq", "val": "de"}


def _spaces(**options: Any) -> Any:
    cache = {**KEPT, "force_recovery_mode": "cache", "allow_tags_filter": True, "allowed_delta_types": ["fossil"]}
    return settings(
        channel={
            "namespaces": [
                {"name": "score", **cache, **options},
                {"name": "auto", **cache, "auto_cache_recover": True, **options},
                {"name": "ask", **OPEN, **cache, "force_recovery": False, "allow_recovery": True},
            ]
        },
        uni_sse={"enabled": True},
    )


async def _say(site: Site, channel: str, *numbers: int, **tags: str) -> None:
    namespace = site.node.channels.known(channel)
    for number in numbers:
        await site.node.publish(channel, namespace, Draft(b"%d" % number, tags=tags or None))


def _epoch(site: Site, channel: str) -> str:
    return str(site.node.history._log.streams[channel].epoch)  # type: ignore[attr-defined]


@FORMATS
@pytest.mark.parametrize(
    ("offset", "epoch", "newest"),
    [
        pytest.param(0, "", True, id="from nowhere"),
        pytest.param(3, "same", True, id="some missed"),
        pytest.param(4, "", True, id="one missed"),
        pytest.param(5, "", True, id="at the top, epoch unknown"),
        pytest.param(5, "other", True, id="at the top of another epoch"),
        pytest.param(9, "same", True, id="beyond the top"),
        pytest.param(1, "other", True, id="of another epoch"),
        pytest.param(5, "same", False, id="at the top"),
    ],
)
async def test_recovery(format: str, offset: int, epoch: str, newest: bool) -> None:
    """PROTOCOL 11.6.1: five were published; whatever the position, the newest one is sent, unless the client has it."""
    async with serving(_spaces(history_size=3)) as site:
        await _say(site, "score:1", 1, 2, 3, 4, 5)
        client = await Client.connected(site.url, format=format)
        current = _epoch(site, "score:1")
        result = await client.ask(
            "subscribe",
            channel="score:1",
            recover=True,
            offset=offset,
            epoch=current if epoch == "same" else epoch,
            flag=2,
        )
        assert (result["was_recovering"], result["recovered"], result["recoverable"]) == (True, True, True)
        assert [pub["data"] for pub in result.get("publications", [])] == ([5] if newest else [])
        assert (result["offset"], result["epoch"]) == (4 if newest else 5, current)
        await _say(site, "score:1", 6)
        live = await client.push("pub", "score:1")
        assert (live["data"], live["offset"]) == (6, 6)
        assert not client.pushes


@pytest.mark.parametrize(("at_top", "recovered"), [(True, True), (False, False)])
async def test_nothing_is_kept_any_more(at_top: bool, recovered: bool) -> None:
    """PROTOCOL 11.6.2: recovered only if the client is where the channel is; bit 2 of the flag refuses nothing here."""
    async with serving(_spaces()) as site:
        await _say(site, "score:1", 1, 2, 3)
        epoch = _epoch(site, "score:1")
        await site.node.remove("score:1")
        client = await Client.connected(site.url)
        result = await client.ask(
            "subscribe", channel="score:1", recover=True, offset=3 if at_top else 2, epoch=epoch, flag=2
        )
        assert result.get("recovered", False) is recovered
        assert "publications" not in result
        assert (result["was_recovering"], result["offset"], result["epoch"]) == (True, 3, epoch)
        await _say(site, "score:1", 4)
        assert (await client.push("pub", "score:1"))["data"] == 4


async def test_a_channel_nobody_published_to() -> None:
    """PROTOCOL 11.6.2: there is nothing to recover, and the first publication comes."""
    async with serving(_spaces()) as site:
        client = await Client.connected(site.url)
        for channel in ("score:1", "auto:1"):
            result = await client.ask("subscribe", channel=channel, recover=channel == "score:1")
            assert result == {"was_recovering": True, "recoverable": True, "positioned": True}
            await _say(site, channel, 1)
            assert (await client.push("pub", channel))["data"] == 1


async def test_who_does_not_ask() -> None:
    """PROTOCOL 11.6.3: without ``recover`` nothing is sent; with ``auto_cache_recover`` all get the newest."""
    async with serving(_spaces()) as site:
        client = await Client.connected(site.url)
        for channel, offset in (("score:1", 2), ("auto:1", 1)):
            await _say(site, channel, 1, 2)
            result = await client.ask("subscribe", channel=channel)
            assert result["offset"] == offset
            assert [pub["data"] for pub in result.get("publications", [])] == ([2] if offset == 1 else [])
            assert result.get("was_recovering", False) is result.get("recovered", False) is (offset == 1)


async def test_where_recovery_has_to_be_asked_for() -> None:
    """PROTOCOL 11.6: the mode holds for every subscription that may recover, and for no other."""
    async with serving(_spaces()) as site:
        await _say(site, "ask:1", 1, 2)
        client = await Client.connected(site.url)
        result = await client.ask("subscribe", channel="ask:1", recover=True, recoverable=True)
        assert [pub["data"] for pub in result["publications"]] == [2]
        await client.ask("unsubscribe", channel="ask:1")
        result = await client.ask("subscribe", channel="ask:1", recover=True, positioned=True)
        assert "was_recovering" not in result


async def test_server_side() -> None:
    """PROTOCOL 11.6.3, 11.7: in the connect result, asked for or by itself; by order it follows as a push."""
    async with serving(_spaces()) as site:
        for channel in ("score:1", "auto:1", "auto:2"):
            await _say(site, channel, 1, 2)
        mine = token({"sub": "42", "channels": ["score:1", "auto:1"]})
        client = await Client.connected(site.url, token=mine, subs={"score:1": {"recover": True}})
        for result in client.hello["subs"].values():
            assert ([pub["data"] for pub in result["publications"]], result["offset"]) == ([2], 1)
        (session,) = site.node.sessions.values()
        session.subscribe_by_order(SubscribeOrder(Target("42"), "auto:2"))
        assert (await client.push("subscribe", "auto:2"))["offset"] == 1
        assert (await client.push("pub", "auto:2"))["data"] == 2
        for channel in ("score:1", "auto:1", "auto:2"):
            await _say(site, channel, 3)
            assert (await client.push("pub", channel))["data"] == 3


async def test_event_streams_and_one_way_clients() -> None:
    """PROTOCOL 11.6.5: an event stream begins with the newest one and comes back to it; so does a one-way client."""
    async with serving(_spaces()) as site:
        await _say(site, "auto:1", 1, 2)
        epoch = _epoch(site, "auto:1")
        async with events(site.port, "/v1/channels/auto:1/events") as stream:
            assert await stream.began() == f"{epoch}:1"
            assert [event.data["data"] for event in await stream.take(1)] == [2]
            assert stream.last_id == f"{epoch}:2"
        await _say(site, "auto:1", 3, 4)
        async with events(site.port, "/v1/channels/auto:1/events", {"Last-Event-ID": f"{epoch}:2"}) as stream:
            await stream.began()
            await _say(site, "auto:1", 5)
            assert [event.data["data"] for event in await stream.take(2)] == [4, 5]
        connect = quote(json.dumps({"subs": {"auto:1": {}}}))
        async with events(site.port, f"/connection/uni_sse?cf_connect={connect}") as stream:
            ((hello,),) = [await stream.take(1)]
            (result,) = hello.data["connect"]["subs"].values()
            assert ([pub["data"] for pub in result["publications"]], result["offset"]) == ([5], 4)


@FORMATS
async def test_the_newest_that_matches(format: str) -> None:
    """PROTOCOL 11.6.4: with a filter it is the newest matching one of the newest hundred, if there is one."""
    async with serving(_spaces()) as site:
        await _say(site, "score:1", 1, lang="de")
        await _say(site, "score:1", 2, 3, lang="en")
        client = await Client.connected(site.url, format=format)
        result = await client.ask("subscribe", channel="score:1", recover=True, tf=GERMAN)
        assert [pub["data"] for pub in result["publications"]] == [1]
        assert (result["recovered"], result.get("offset", 0)) == (True, 0)
        await _say(site, "score:1", *range(4, 104), lang="en")
        await _say(site, "score:1", 104, lang="de")
        assert (await client.push("pub", "score:1"))["data"] == 104
        await _say(site, "score:1", *range(105, 205), lang="en")
        late = await Client.connected(site.url, format=format)
        result = await late.ask("subscribe", channel="score:1", recover=True, tf=GERMAN)
        assert (result["recovered"], result["offset"], result.get("publications", [])) == (True, 204, [])


async def test_with_patches() -> None:
    """PROTOCOL 11.6, 12.4: the newest one is in full, and the base of what follows."""
    async with serving(_spaces(delta_publish=True)) as site:
        text = b'{"score": %d, "text": "and it goes on and on and on"}'
        namespace = site.node.channels.known("score:1")
        for number in (1, 2):
            await site.node.publish("score:1", namespace, Draft(text % number))
        first, second = await Client.connected(site.url), await Client.connected(site.url)
        for client in (first, second):
            result = await client.ask("subscribe", channel="score:1", recover=True, delta="fossil")
            assert [pub["data"] for pub in result["publications"]] == [(text % 2).decode()]
        await site.node.publish("score:1", namespace, Draft(text % 3))
        await site.node.publish("score:1", namespace, Draft(text % 4))
        for client in (first, second):
            assert "delta" in (await client.publications("score:1", 2))[1]


async def test_a_mass_return_shares_its_reads() -> None:
    """A hundred who come back together ask history a few times and not a hundred."""
    async with serving(_spaces()) as site:
        await _say(site, "score:1", 1, 2, 3)
        history, reads = site.node.history, 0
        read = history.read

        async def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal reads
            reads += 1
            return await read(*arguments, **options)

        history.read = counted  # type: ignore[method-assign]
        clients = await asyncio.gather(*(Client.connected(site.url) for _ in range(100)))
        results = await asyncio.gather(
            *(client.ask("subscribe", channel="score:1", recover=True, offset=1) for client in clients)
        )
        assert {result["publications"][0]["data"] for result in results} == {3}
        assert reads < 100
