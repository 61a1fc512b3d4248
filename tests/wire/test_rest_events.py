"""PROTOCOL 17.3 over HTTP: channels as an ``EventSource``, and the cursor that its ids are."""

import asyncio
import json
import logging
import random
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from conftest import ExpectedLog
from hopper import Cut, Event, EventStream, ask, events, head_of, read_head, vanish
from support import KEPT, OPEN, PATIENCE_S, Client, Site, serving, settings, token
from test_rest import Following, bearer, path, publish

from server.app import Allow, App, Refuse
from server.app import Client as AppClient
from server.history.memory import MemoryHistory
from server.presence.memory import MemoryPresence
from server.stream import Page


def stream_of(*channels: str, **query: Any) -> str:
    """Where these channels are one event stream."""
    if len(channels) == 1:
        return f"/v1/channels/{quote(channels[0], safe='')}/events" + (f"?{urlencode(query, True)}" if query else "")
    return f"/v1/events?{urlencode({'channel': channels, **query}, True)}"


def data_of(found: list[Event]) -> list[Any]:
    """The payloads of events that are publications."""
    assert {event.kind for event in found} == {"message"}, found
    return [event.data["data"] for event in found]


async def gone(site: Site) -> None:
    """Wait until nothing of any reader is left; requests take the server's turns."""
    async with asyncio.timeout(PATIENCE_S):
        while site.node.connections or site.node.sessions or site.node.hub.feeds:
            await ask(site.port, "/health/live")


# --- one channel -------------------------------------------------------------------------
async def test_events_are_publications_and_ids_are_cursors() -> None:
    """Each event's data is the publication with its channel, its id the cursor behind it, good for REST as well."""
    async with serving() as site:
        epoch = (await publish(site, "chat:a", 0))["epoch"]
        async with events(site.port, stream_of("chat:a")) as stream:
            assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
            assert stream.headers["x-accel-buffering"] == "no"
            assert await stream.began() == f"{epoch}:1"
            await ask(site.port, path("chat:a"), body=b'{"data": {"n": 1.00}}', headers=bearer(sub="42"))
            await publish(site, "chat:a", 2)
            first, second = await stream.take(2)
            assert (first.kind, first.id, second.id) == ("message", f"{epoch}:2", f"{epoch}:3")
            assert first.data["channel"] == "chat:a"
            assert first.data["info"]["user"] == "42"
            page = await ask(site.port, path("chat:a", f"since={epoch}:1&limit=1"))
            assert {"channel": "chat:a", **page.json["publications"][0]} == first.data
            after = await ask(site.port, path("chat:a", f"since={first.id}"))
            assert [one["data"] for one in after.json["publications"]] == [2]
        await gone(site)


async def test_a_reader_comes_back_with_its_last_id() -> None:
    """With ``Last-Event-ID`` nothing that was published meanwhile is missed or repeated, not even before any event."""
    async with serving() as site:
        async with events(site.port, stream_of("chat:a")) as stream:
            assert await stream.began() == ":0"
        seen: list[Any] = []
        last = stream.last_id
        for start in range(0, 240, 60):
            for number in range(start, start + 60):
                await publish(site, "chat:a", number)
            async with events(site.port, stream_of("chat:a"), {"Last-Event-ID": last}) as stream:
                await stream.began()
                seen += data_of(await stream.take(50))
                last = stream.last_id
        async with events(site.port, stream_of("chat:a"), {"Last-Event-ID": last}) as stream:
            await stream.began()
            seen += data_of(await stream.take(40))
        assert seen == list(range(240))


async def test_since_is_where_a_page_begins() -> None:
    """A page reads by REST, then listens from that cursor by ``since``; ``Last-Event-ID`` goes before it later."""
    async with serving() as site:
        epoch = (await publish(site, "chat:a", 1))["epoch"]
        for number in (2, 3):
            await publish(site, "chat:a", number)
        async with events(site.port, stream_of("chat:a", since=f"{epoch}:1")) as stream:
            assert await stream.began() == f"{epoch}:1"
            assert data_of(await stream.take(2)) == [2, 3]
        headers = {"Last-Event-ID": f"{epoch}:2"}
        async with events(site.port, stream_of("chat:a", since=f"{epoch}:1"), headers) as stream:
            await stream.began()
            assert data_of(await stream.take(1)) == [3]


async def test_a_long_recovery_comes_whole() -> None:
    """A recovery of many pages comes in order at the reader's pace, live publications behind it."""
    async with serving() as site:
        await asyncio.gather(*(publish(site, "chat:a", "x" * 4000) for _ in range(350)))
        async with events(site.port, stream_of("chat:a", since=":0")) as stream:
            await stream.began()
            await publish(site, "chat:a", "live")
            found = await stream.take(351)
        assert [event.data["offset"] for event in found] == list(range(1, 352))
        assert [event.id.partition(":")[2] for event in found] == [str(number) for number in range(1, 352)]


async def test_many_readers_of_one_channel() -> None:
    """Readers that stand alike share their bytes; each has every event with its id, whenever it came."""
    async with serving() as site:
        following = Following(site.node.hub)
        await publish(site, "chat:a", 0)
        streams = [await EventStream.open(site.port, stream_of("chat:a")) for _ in range(12)]
        streams += [await EventStream.open(site.port, stream_of("chat:a", "live:b")) for _ in range(3)]
        late = await EventStream.open(site.port, stream_of("chat:a", since=":0"))
        await following.until(16, "chat:a")
        for stream in (*streams, late):
            await stream.began()
        await asyncio.gather(*(publish(site, "chat:a", number) for number in range(1, 31)))
        assert (await late.next()).data["data"] == 0
        for stream in (*streams, late):
            found = await stream.take(30)
            assert [event.data["offset"] for event in found] == list(range(2, 32))
            ids = [event.id.rpartition(":")[2] for event in found]
            assert ids == [str(number) for number in range(2, 32)]
            await stream.drop()
        await gone(site)


async def test_a_gone_cursor_is_a_reset() -> None:
    """Another epoch or a trimmed position: the event ``reset`` has the new cursor, and the stream goes on from it."""
    namespaces = [{"name": "short", **KEPT, "history_size": 2}]
    async with serving(settings(channel={"namespaces": namespaces})) as site:
        for number in range(5):
            epoch = (await publish(site, "short:a", number))["epoch"]
        for gone_id in ("else:3", f"{epoch}:2", f"{epoch}:6"):
            async with events(site.port, stream_of("short:a"), {"Last-Event-ID": gone_id}) as stream:
                assert await stream.began() == f"{epoch}:5"
                reset = await stream.next()
                assert reset == Event("reset", {"channel": "short:a", "epoch": epoch, "offset": 5}, f"{epoch}:5")
                assert (await ask(site.port, path("short:a"), body={"data": "next"})).status == 201
                assert (await stream.next()).data["data"] == "next"
                epoch, offset = stream.last_id.split(":")
                assert int(offset) == 6
            await site.node.history.remove("short:a")
            await site.node.history.new_epochs()
            for number in range(5):
                epoch = (await publish(site, "short:a", number))["epoch"]


async def test_trimmed_under_a_reader(log: ExpectedLog) -> None:
    """Numbering that begins anew under a stream ends it with 3010; who comes back gets the reset."""
    log.expect("subscription.lost")
    history = MemoryHistory(idempotency_ttl_ms=86_400_000)
    async with serving(history=history) as site:
        await publish(site, "chat:a", 1)
        async with events(site.port, stream_of("chat:a")) as stream:
            await stream.began()
            await history.new_epochs()
            site.node.positioning.check_all()
            end = await stream.next()
            assert (end.kind, end.data["code"]) == ("disconnect", 3010)
        async with events(site.port, stream_of("chat:a"), {"Last-Event-ID": stream.last_id}) as stream:
            await stream.began()
            assert (await stream.next()).kind == "reset"


# --- several channels -----------------------------------------------------------------------
async def test_one_id_for_all_channels() -> None:
    """Cut between any two events of several channels, a reader that comes back misses and repeats nothing in any."""
    dice = random.Random(5)
    channels = ["chat:a", "chat:b", "chat:c"]
    async with serving() as site:
        seen: dict[str, list[Any]] = {channel: [] for channel in channels}
        last = await _first_id(site, *channels)
        published: dict[str, int] = dict.fromkeys(channels, 0)
        for _ in range(12):
            for _ in range(dice.randint(3, 12)):
                channel = dice.choice(channels)
                await publish(site, channel, published[channel])
                published[channel] += 1
            async with events(site.port, stream_of(*channels), {"Last-Event-ID": last}) as stream:
                await stream.began()
                behind = sum(published.values()) - sum(map(len, seen.values()))
                for event in await stream.take(dice.randint(0, behind)):
                    seen[event.data["channel"]].append(event.data["data"])
                last = stream.last_id
        async with events(site.port, stream_of(*reversed(channels)), {"Last-Event-ID": last}) as stream:
            await stream.began()
            for event in await stream.take(sum(published.values()) - sum(map(len, seen.values()))):
                seen[event.data["channel"]].append(event.data["data"])
        assert seen == {channel: list(range(count)) for channel, count in published.items()}


async def _first_id(site: Site, *channels: str) -> str:
    async with events(site.port, stream_of(*channels)) as stream:
        return await stream.began()


async def test_thirty_two_channels_fit_into_an_id() -> None:
    """Of 32 channels with names of 255 bytes the id stays under 4 KB, and leads back into each of them."""
    async with serving() as site:
        channels = [f"chat:{number:02}".ljust(255, "x") for number in range(32)]
        last = await _first_id(site, *channels)
        for number, channel in enumerate(channels):
            await publish(site, channel, number)
        async with events(site.port, stream_of(*channels), {"Last-Event-ID": last}) as stream:
            await stream.began()
            found = await stream.take(32)
        assert sorted(data_of(found)) == list(range(32))
        assert len(stream.last_id) < 4096
        async with events(site.port, stream_of(*channels), {"Last-Event-ID": stream.last_id}) as stream:
            assert await stream.began() == found[-1].id
            await publish(site, channels[7], "next")
            assert data_of([await stream.next()]) == ["next"]
        too_many = await EventStream.open(site.port, stream_of(*channels, "chat:more"))
        assert (too_many.status, too_many.problem["code"]) == (400, 107)


async def test_since_for_each_channel() -> None:
    """``since`` may be given once for each channel, in their order, as REST gave the cursors."""
    async with serving() as site:
        for channel in ("chat:a", "chat:b"):
            for number in (1, 2):
                epoch = (await publish(site, channel, f"{channel}{number}"))["epoch"]
        async with events(site.port, stream_of("chat:a", "chat:b", since=[":0", f"{epoch}:1"])) as stream:
            await stream.began()
            found = [await stream.next() for _ in range(3)]
        assert sorted(data_of(found)) == ["chat:a1", "chat:a2", "chat:b2"]
        wrong = await EventStream.open(site.port, stream_of("chat:a", "chat:b", "chat:c", since=[":0", ":0"]))
        assert (wrong.status, wrong.problem["detail"]) == (400, "since: expected one for each of 3 channels, got 2")


async def test_a_channel_that_is_new_in_the_url_is_a_reset() -> None:
    """An id knows nothing of a channel that was not followed then: that one says so, the others go on."""
    async with serving() as site:
        last = await _first_id(site, "chat:a", "chat:b")
        await publish(site, "chat:a", 1)
        async with events(site.port, stream_of("chat:a", "chat:b", "chat:c"), {"Last-Event-ID": last}) as stream:
            await stream.began()
            reset, publication = await stream.take(2)
        assert (reset.kind, reset.data["channel"]) == ("reset", "chat:c")
        assert publication.data["data"] == 1


async def test_passing_channels_have_no_cursor() -> None:
    """Publications of a passing channel come without id, at most once; and the id of the kept ones stays."""
    async with serving() as site:
        async with events(site.port, stream_of("live:a", "chat:a")) as stream:
            first = await stream.began()
            await ask(site.port, path("live:a"), body={"data": "hi"})
            event = await stream.next()
            assert (event.data["data"], event.id) == ("hi", first)
            assert "offset" not in event.data
        async with events(site.port, stream_of("live:a")) as alone:
            await _followed(site, "live:a")
            await ask(site.port, path("live:a"), body={"data": "alone"})
            assert data_of([await alone.next()]) == ["alone"]
            assert alone.last_id == ""


async def _followed(site: Site, channel: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while channel not in site.node.hub.feeds or not site.node.hub.feeds[channel].live:
            await ask(site.port, "/health/live")


async def test_without_recovery_there_is_no_cursor() -> None:
    """Where a WebSocket could not recover, a stream gives no id for the channel, and begins anew each time."""
    namespaces = [{"name": "off", **KEPT, "force_recovery": False, "allow_history_for_client": False}]
    async with serving(settings(channel={"namespaces": namespaces})) as site:
        async with events(site.port, stream_of("off:a", since=":0")) as stream:
            await _followed(site, "off:a")
            await ask(site.port, path("off:a"), body={"data": 1})
            assert data_of([await stream.next()]) == [1]
            assert stream.last_id == ""


# --- who may ---------------------------------------------------------------------------------
async def test_refused_before_it_begins() -> None:
    """What a WebSocket would be refused is a problem document with the same code, and leaves nothing behind."""
    namespaces = [{"name": "shut"}, {"name": "named", "allow_subscribe_for_client": True}, {"name": "chat", **KEPT}]
    async with serving(settings(channel={"namespaces": namespaces})) as site:
        now = int(site.clock())
        cases: list[tuple[str, dict[str, str], int, int]] = [
            (stream_of("shut:a"), bearer(sub="42"), 403, 103),
            (stream_of("named:a"), {}, 403, 103),
            (stream_of("chat:a", "shut:a"), bearer(sub="42"), 403, 103),
            (stream_of("$chat:a"), bearer(sub="42"), 403, 103),
            (stream_of("nowhere:a"), {}, 404, 102),
            (stream_of("chat:ä"), {}, 400, 107),
            (stream_of("chat:a"), {"Authorization": "Bearer x"}, 401, 3500),
            (stream_of("chat:a", token=token({"sub": "42", "exp": now - 5})), {}, 401, 109),
            (stream_of("chat:a", since="x"), {}, 400, 107),
            (stream_of("chat:a", since=[":0", ":0"]), {}, 400, 107),
            (stream_of("chat:a", token=["a", "b"]), {}, 400, 107),
            (stream_of("chat:a"), {"Last-Event-ID": "not an id"}, 400, 107),
            (stream_of("chat:a", "chat:b"), {"Last-Event-ID": "e:1"}, 400, 107),
            (stream_of("chat:a"), {"Last-Event-ID": "x" * 5000}, 400, 107),
            (stream_of("chat:a", "chat:a"), {}, 400, 107),
            ("/v1/events", {}, 400, 107),
            ("/v1/events?channel=", {}, 400, 107),
            ("/v1/events?channel=%ff", {}, 400, 107),
        ]
        for place, headers, status, code in cases:
            stream = await EventStream.open(site.port, place, headers)
            assert (stream.status, stream.problem["code"]) == (status, code), (place, headers, stream.problem)
            assert stream.headers["content-type"] == "application/problem+json"
        async with events(site.port, stream_of("named:a"), bearer(sub="42")) as stream:
            assert stream.status == 200
            assert site.node.connections == 1
        await gone(site)


async def test_a_token_in_the_url_stays_out_of_the_log(log: ExpectedLog) -> None:
    """``?token=`` lets one in, and is in no line of the log, at no level, whatever happens to the request."""
    secret = token({"sub": "42", "channels": ["shut:mine"]})
    logging.getLogger("tornado").setLevel(logging.DEBUG)
    async with serving(
        settings(channel={"namespaces": [{"name": "shut", **KEPT, **dict.fromkeys(OPEN, False)}]})
    ) as site:
        async with events(site.port, stream_of("shut:mine", token=secret)) as stream:
            assert stream.status == 200
            await stream.began()
        for place in (stream_of("shut:other", token=secret), stream_of("shut:mine", token=secret + "x"),
                      f"/v1/nowhere?token={secret}", f"/v1/events?token={secret}&channel=%ff",
                      f"/v1/channels/%ff/events?token={secret}"):  # fmt: skip
            stream = await EventStream.open(site.port, place)
            assert stream.status in (400, 401, 403, 404)
        await ask(site.port, stream_of("shut:mine", token=secret), method="DELETE")
        await gone(site)
    logging.getLogger("tornado").setLevel(logging.NOTSET)
    assert log.records
    for record in log.records:
        text = logging.Formatter().format(record) + str(vars(record))
        assert secret[:40] not in text


async def test_channels_of_the_token() -> None:
    """A connection token's channels open to a stream what the namespace does not, the personal channel too."""
    personal = {"subscribe_to_user_personal_channel": {"enabled": True, "personal_channel_namespace": "shut"}}
    chosen = settings(
        client=personal, channel={"namespaces": [{"name": "shut", "history_size": 5, "history_ttl": "1h"}]}
    )
    async with serving(chosen) as site:
        headers = bearer(sub="42", channels=["shut:given", "$shut:secret"])
        for channel, status in (("shut:given", 200), ("$shut:secret", 200), ("shut:#42", 200), ("shut:#43", 403)):
            stream = await EventStream.open(site.port, stream_of(channel), headers)
            assert stream.status == status, channel
            await stream.drop()


async def test_hooks_are_asked_of_one_client() -> None:
    """A stream is one client to the app: what one hook noted the next one reads, down to the end."""
    app, heard = App(), []

    @app.connecting
    async def connecting(client: AppClient) -> None:
        client.notes["heard"] = heard
        heard.append(f"connecting {client.transport}")

    @app.subscribing
    async def subscribing(client: AppClient, channel: str) -> Allow:
        client.notes["heard"].append(f"subscribing {channel}")
        if channel == "chat:not":
            raise Refuse(460, "not there")
        return Allow(chan_info={"seat": 4})

    @app.leaving
    async def leaving(client: AppClient, channel: str) -> None:
        client.notes["heard"].append(f"leaving {channel}")

    @app.disconnecting
    async def disconnecting(client: AppClient) -> None:
        client.notes["heard"].append("disconnecting")

    async with serving() as site:
        app.attach(site.node)
        refused = await EventStream.open(site.port, stream_of("chat:a", "chat:not"))
        assert (refused.status, refused.problem["code"], refused.problem["title"]) == (403, 460, "not there")
        await gone(site)
        heard.clear()
        async with events(site.port, stream_of("chat:a")) as stream:
            await stream.began()
            members = (await ask(site.port, "/v1/channels/chat:a/presence")).json["presence"]
            assert [one["chan_info"] for one in members.values()] == [{"seat": 4}]
        await gone(site)
        await app.finish(PATIENCE_S)
    mine = [one for one in heard if one not in ("connecting rest", "disconnecting")]
    assert mine == ["connecting events", "subscribing chat:a", "leaving chat:a"]
    assert heard[-1] == "disconnecting"


# --- a session like any other ---------------------------------------------------------------
async def test_a_reader_is_present_and_leaves() -> None:
    """A reader is in presence, others are told of it, and it leaves when its connection ends."""
    namespaces = [{"name": "chat", **KEPT, "presence": True, "join_leave": True, "force_push_join_leave": True}]
    async with serving(settings(channel={"namespaces": namespaces})) as site:
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="chat:a")
        await client.push("join")
        async with events(site.port, stream_of("chat:a"), bearer(sub="42")) as stream:
            await stream.began()
            assert (await client.push("join"))["info"]["user"] == "42"
            joined = await stream.next()
            assert (joined.kind, joined.data["channel"], joined.data["info"]["user"]) == ("join", "chat:a", "42")
            assert len((await client.ask("presence", channel="chat:a"))["presence"]) == 2
        assert (await client.push("leave"))["info"]["user"] == "42"
        await client.close()


async def test_orders_reach_readers() -> None:
    """What the back end does to a user's connections it does to a stream, which says so; it adds no channel."""
    async with serving() as site:

        async def order(method: str, **body: Any) -> None:
            reply = await ask(
                site.port, f"/api/{method}", body={"user": "42", **body}, headers={"X-API-Key": "api-key"}
            )
            assert reply.json == {"result": {}}

        async with events(site.port, stream_of("chat:a", "chat:b"), bearer(sub="42")) as stream:
            await stream.began()
            await order("subscribe", channel="chat:c")
            await order("unsubscribe", channel="chat:a")
            gone_channel = await stream.next()
            assert gone_channel.kind == "unsubscribe"
            assert gone_channel.data == {"channel": "chat:a", "code": 2000, "reason": "server unsubscribe"}
            for channel in ("chat:a", "chat:c", "chat:b"):
                await publish(site, channel, channel)
            event = await stream.next()
            assert (event.data["data"], event.id.count(":")) == ("chat:b", 1)
            await order("disconnect", disconnect={"code": 4100, "reason": "banned"})
            end = await stream.next()
            assert (end.kind, end.data) == ("disconnect", {"code": 4100, "reason": "banned"})
        await gone(site)


async def test_time_passes_over_a_stream() -> None:
    """A comment keeps the stream alive each ping interval, no pong is expected; a token's end ends it with 3005."""
    async with serving(
        settings(client={"ping_interval": "5s", "pong_timeout": "2s", "expired_close_delay": "10s"})
    ) as site:
        headers = bearer(sub="42", exp=int(site.clock()) + 60)
        async with events(site.port, stream_of("chat:a"), headers) as stream:
            await stream.began()
            site.pass_time(30)
            await publish(site, "chat:a", 1)
            assert data_of([await stream.next()]) == [1]
            assert stream.comments >= 4
            site.pass_time(45)
            end = await stream.next()
            assert (end.kind, end.data["code"]) == ("disconnect", 3005)
        await gone(site)


async def test_limits_hold_for_streams(log: ExpectedLog) -> None:
    """``client.connection_limit`` is "later", ``client.user_connection_limit`` 429, both before anything begins."""
    log.expect("connection.refused")
    async with serving(settings(client={"connection_limit": 2, "user_connection_limit": 1})) as site:
        async with events(site.port, stream_of("chat:a"), bearer(sub="42")) as stream:
            await stream.began()
            second = await EventStream.open(site.port, stream_of("chat:a"), bearer(sub="42"))
            assert (second.status, second.problem["code"]) == (429, 3504)
            async with events(site.port, stream_of("chat:a"), bearer(sub="43")) as other:
                await other.began()
                async with events(site.port, stream_of("chat:a"), bearer(sub="44")) as third:
                    assert await third.put_off() == 3013
                told = await ask(site.port, stream_of("chat:a"), headers=bearer(sub="44"))
                assert (told.status, told.json["code"], told.headers["retry-after"]) == (503, 111, "1")
        await gone(site)


async def test_only_the_newest_connection_stays() -> None:
    """With ``single_connection`` a stream ends its user's others once it has begun, and is ended by newer ones."""
    personal = {"enabled": True, "single_connection": True, "personal_channel_namespace": "chat"}
    async with serving(settings(client={"subscribe_to_user_personal_channel": personal})) as site:
        bystander = await Client.connected(site.url, token=token({"sub": "43"}))
        client = await Client.connected(site.url, token=token({"sub": "42"}))
        assert (await EventStream.open(site.port, stream_of("none:a"), bearer(sub="42"))).status == 404
        assert (await ask(site.port, stream_of("chat:a"), method="HEAD", headers=bearer(sub="42"))).status == 200
        await client.ask("publish", channel="chat:a", data="still here")
        async with events(site.port, stream_of("chat:a"), bearer(sub="42")) as first:
            await first.began()
            assert await client.closed() == (3504, "connection limit")
            async with events(site.port, stream_of("chat:a"), bearer(sub="42")) as second:
                await second.began()
                end = await first.next()
                assert (end.kind, end.data) == ("disconnect", {"code": 3504, "reason": "connection limit"})
                client = await Client.connected(site.url, token=token({"sub": "42"}))
                assert (await second.next()).data["code"] == 3504
        await client.ask("publish", channel="chat:a", data="still here")
        await bystander.ask("publish", channel="chat:a", data="still here")


async def test_a_poll_ends_nobody_and_is_ended() -> None:
    """With ``single_connection`` a request that waits spares its user's connection; the next connection ends it."""
    personal = {"enabled": True, "single_connection": True, "personal_channel_namespace": "chat"}
    async with serving(settings(client={"subscribe_to_user_personal_channel": personal})) as site:
        following = Following(site.node.hub)
        client = await Client.connected(site.url, token=token({"sub": "42"}))
        headers = {**bearer(sub="42"), "Prefer": "wait=60"}
        polling = asyncio.create_task(ask(site.port, path("chat:a", "since=:0"), headers=headers))
        await following.until(1, "chat:a")
        await client.ask("publish", channel="chat:b", data="still here")
        async with events(site.port, stream_of("chat:b"), bearer(sub="42")) as stream:
            await stream.began()
            ended = await polling
            assert (ended.status, ended.json["code"], ended.headers["retry-after"]) == (429, 3504, "1")
            assert await client.closed() == (3504, "connection limit")


@pytest.mark.parametrize(
    ("code", "retry"), [(3001, False), (3499, False), (3500, True), (3503, True), (4100, False), (4500, True)]
)
async def test_who_is_to_stay_away_is_told_so(code: int, retry: bool) -> None:
    """A code after which no SDK comes back tells a browser, which knows no codes, to wait a day; no other does."""
    async with serving() as site, events(site.port, stream_of("chat:a"), bearer(sub="42")) as stream:
        await stream.began()
        body = {"user": "42", "disconnect": {"code": code, "reason": "because"}}
        assert (await ask(site.port, "/api/disconnect", body=body, headers={"X-API-Key": "api-key"})).status == 200
        assert (await stream.next()).data == {"code": code, "reason": "because"}
        assert stream.retry_ms == (86_400_000 if retry else None)


async def test_a_reader_that_does_not_read_is_cut(log: ExpectedLog) -> None:
    """Who takes nothing is cut with 3008, its memory bounded; others get everything, and it comes back by its id."""
    limit = 300_000
    async with serving(settings(client={"queue_max_size": limit})) as site:
        lazy = await EventStream.open(site.port, stream_of("chat:a"), limit=2**16)
        await lazy.began()
        async with events(site.port, stream_of("chat:a")) as eager:
            await eager.began()
            (follower,) = [one for one in site.node.sessions.values() if one.outbox is not None][:1]  # type: ignore[attr-defined]
            most = sent = 0
            while not log.seen("connection.closed"):
                await publish(site, "chat:a", "x" * 50_000)
                sent += 1
                assert (await eager.next()).data["offset"] == sent
                most = max(most, follower.outbox.waiting_bytes)  # type: ignore[attr-defined]
                assert sent < 500
            assert most <= limit + 2 * 50_200
            assert log.seen("connection.closed")[0]["code"] == 3008
            received = []
            try:
                while True:
                    received.append((await lazy.next()).data.get("offset"))
            except (Cut, StopAsyncIteration):
                await lazy.drop()
        received = [offset for offset in received if offset is not None]
        assert received == list(range(1, len(received) + 1))
        assert len(received) < sent
        async with events(site.port, stream_of("chat:a"), {"Last-Event-ID": lazy.last_id}) as again:
            await again.began()
            rest = await again.take(sent - len(received))
        assert [event.data["offset"] for event in rest] == list(range(len(received) + 1, sent + 1))


class SlowPresence(MemoryPresence):
    """Lets nobody in before it is told to."""

    def __init__(self) -> None:
        super().__init__(10)
        self.asked = asyncio.Event()
        self.open_door = asyncio.Event()

    async def add(self, *arguments: Any) -> None:
        """See ``Presence.add``."""
        self.asked.set()
        await self.open_door.wait()
        await super().add(*arguments)


async def test_a_client_that_leaves_before_its_stream_begins() -> None:
    """Whoever goes, or is ended, while the request is looked at leaves nothing behind, and learns why if it can."""
    presence = SlowPresence()
    async with serving(presence=presence) as site:
        _, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(head_of("GET", stream_of("chat:a"), {}))
        await presence.asked.wait()
        await vanish(writer)
        await gone(site)
        presence.asked.clear()
        opening = asyncio.create_task(EventStream.open(site.port, stream_of("chat:a"), bearer(sub="42")))
        await presence.asked.wait()
        order = {"user": "42", "disconnect": {"code": 4100, "reason": "banned"}}
        await ask(site.port, "/api/disconnect", body=order, headers={"X-API-Key": "api-key"})
        presence.open_door.set()
        stream = await opening
        assert (stream.status, stream.problem["code"]) == (403, 4100)
        await gone(site)
        assert await presence.members("chat:a", site.clock()) == {}


class BrokenHistory(MemoryHistory):
    """Breaks once while it reads."""

    broken = False

    async def read(self, *arguments: Any, **options: Any) -> Page:
        """See ``History.read``."""
        if self.broken:
            raise RuntimeError("broken by the test")
        return await super().read(*arguments, **options)


async def test_a_fault_of_ours_is_500_or_503(log: ExpectedLog) -> None:
    """What the server cannot do is a problem document with 100, logged once, and nothing of it is told."""
    log.expect("task.failed", "http.failed")
    history = BrokenHistory(idempotency_ttl_ms=86_400_000)
    async with serving(history=history) as site:
        history.broken = True
        async with events(site.port, stream_of("chat:a")) as stream:
            assert await stream.put_off() == 3004
        told = await ask(site.port, stream_of("chat:a"))
        assert (told.status, told.json["code"], told.headers["retry-after"]) == (503, 100, "1")
        page = await ask(site.port, path("chat:a"), headers={"Origin": "http://page"})
        assert (page.status, page.json["code"]) == (500, 100)
        assert page.headers["access-control-allow-origin"] == "http://page"
        assert b"broken by" not in page.body
        await gone(site)


# --- HTTP ----------------------------------------------------------------------------------
async def test_head_and_http_1_0() -> None:
    """HEAD has the stream's headers and ends; a client of HTTP/1.0 gets the events without chunks."""
    async with serving() as site:
        head = await ask(site.port, stream_of("chat:a"), method="HEAD")
        assert (head.status, head.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert (await ask(site.port, stream_of("shut:a"), method="HEAD")).status == 404
        await gone(site)
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(head_of("GET", stream_of("chat:a"), {}).replace(b"HTTP/1.1", b"HTTP/1.0"))
        status, headers = await read_head(reader)
        assert (status, headers.get("transfer-encoding")) == (200, None)
        assert await reader.readuntil(b"\n\n") == b"id: :0\n\n"
        await publish(site, "chat:a", 1)
        event = await reader.readuntil(b"\n\n")
        assert json.loads(event.removeprefix(b"data: ").partition(b"\n")[0])["data"] == 1
        await vanish(writer)


async def test_pages_of_other_origins() -> None:
    """A page of an allowed origin may listen; others are 403, and told so in a document they cannot read."""
    async with serving(settings(client={"allowed_origins": ["https://good.example"]})) as site:
        async with events(site.port, stream_of("chat:a"), {"Origin": "https://good.example"}) as stream:
            assert stream.headers["access-control-allow-origin"] == "https://good.example"
            assert "access-control-allow-credentials" not in stream.headers
            assert "Origin" in stream.headers["vary"]
        refused = await EventStream.open(site.port, stream_of("chat:a"), {"Origin": "https://evil.example"})
        assert (refused.status, refused.problem["code"]) == (403, 103)
        assert "access-control-allow-origin" not in refused.headers


async def test_what_another_site_puts_into_its_pages() -> None:
    """An image or a link of another site, with whatever cookies, begins no stream: nobody enters, no hook is asked."""
    app = App()
    asked: list[str] = []

    @app.connecting
    async def connecting(client: AppClient) -> None:
        asked.append(client.transport)

    async with serving(settings(client={"allowed_origins": ["https://good.example"]})) as site:
        app.attach(site.node)
        for elsewhere in ("cross-site", "same-site"):
            image = {"Sec-Fetch-Site": elsewhere, "Sec-Fetch-Mode": "no-cors"}
            for where in (stream_of("chat:a"), stream_of("chat:a", "chat:b"), stream_of("chat:a", token="")):
                refused = await EventStream.open(site.port, where, image)
                assert (refused.status, refused.problem["code"]) == (403, 103)
                assert (await ask(site.port, where, method="HEAD", headers=image)).status == 403
        assert (site.node.connections, asked) == (0, [])

        # Its own pages and people who type the address may, and so may who brings a token along.
        for welcome in ({"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}, {}):
            async with events(site.port, stream_of("chat:a"), welcome) as stream:
                await stream.began()
        for where, headers in (
            (stream_of("chat:a", token=token({"sub": "42"})), {}),
            (stream_of("chat:a"), bearer(sub="42")),
        ):
            async with events(site.port, where, {**headers, "Sec-Fetch-Site": "cross-site"}) as stream:
                await stream.began()
        # With an origin it is the origin that counts.
        allowed = {"Sec-Fetch-Site": "cross-site", "Origin": "https://good.example"}
        async with events(site.port, stream_of("chat:a"), allowed) as stream:
            await stream.began()
        assert asked == ["events"] * 6
        await gone(site)
        await app.finish(PATIENCE_S)
