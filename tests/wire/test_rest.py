"""PROTOCOL 17.1 and 17.2 over HTTP: read, page, wait and publish, with one cursor."""

import asyncio
import json
import signal
from pathlib import Path
from typing import Any
from urllib.parse import quote

from conftest import ExpectedLog
from hopper import Reply, ask, head_of, vanish
from support import KEPT, OPEN, PATIENCE_S, Client, Process, Site, config, serving, settings, token

from server.app import App, Change, Refuse
from server.app import Client as AppClient
from server.history.memory import MemoryHistory
from server.hub import Hub
from server.stream import Page


def path(channel: str, query: str = "") -> str:
    """Where a channel's publications are."""
    return f"/v1/channels/{quote(channel, safe='')}/publications{'?' if query else ''}{query}"


async def publish(site: Site, channel: str, data: Any, **headers: str) -> Any:
    """Publish; returns the position."""
    reply = await ask(site.port, path(channel), body={"data": data}, headers=headers)
    assert reply.status == 201, reply
    return reply.json


def data_of(reply: Reply) -> list[Any]:
    """The payloads of a page."""
    assert reply.status == 200, reply
    return [one["data"] for one in reply.json["publications"]]


def bearer(**claims: Any) -> dict[str, str]:
    """The header of somebody with a token."""
    return {"Authorization": f"Bearer {token(claims)}"}


class CountingHistory(MemoryHistory):
    """Counts its reads."""

    reads = 0

    async def read(self, *arguments: Any, **options: Any) -> Page:
        """See ``History.read``."""
        self.reads += 1
        return await super().read(*arguments, **options)


class Following:
    """Lets a test wait until so many subscriptions of a node's hub have begun, or until all are gone."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._changed = asyncio.Event()
        begin, leave = hub.begin, hub.leave

        def begun(subscription: Any) -> None:
            begin(subscription)
            self._changed.set()

        def left(subscription: Any) -> Any:
            feed = leave(subscription)
            self._changed.set()
            return feed

        hub.begin, hub.leave = begun, left  # type: ignore[method-assign]

    async def until(self, count: int, channel: str | None = None) -> None:
        """Wait until ``count`` subscriptions stand (in ``channel``)."""
        async with asyncio.timeout(PATIENCE_S):
            while self._count(channel) != count:
                self._changed.clear()
                await self._changed.wait()

    def _count(self, channel: str | None) -> int:
        feeds = [feed for feed in self._hub.feeds.values() if channel in (None, feed.channel)]
        return sum(1 for feed in feeds for one in feed.subscriptions() if one.begun)


# --- reading ---------------------------------------------------------------------------
async def test_the_newest_oldest_first_and_in_reverse() -> None:
    """Without ``since`` the newest ``limit`` come, and the position is the top; in reverse, newest first."""
    async with serving() as site:
        for number in range(1, 6):
            await publish(site, "chat:a", number)
        newest = await ask(site.port, path("chat:a", "limit=2"))
        assert (data_of(newest), newest.json["offset"]) == ([4, 5], 5)
        assert "link" not in newest.headers
        backwards = await ask(site.port, path("chat:a", "limit=2&reverse=true"))
        assert (data_of(backwards), backwards.json["offset"]) == ([5, 4], 4)
        pages, reply = [data_of(backwards)], backwards
        while "link" in reply.headers:
            reply = await ask(site.port, reply.headers["link"].partition("<")[2].partition(">")[0])
            pages.append(data_of(reply))
        assert pages == [[5, 4], [3, 2], [1]]


async def test_links_lead_through_everything_once() -> None:
    """From a cursor, ``Link: rel="next"`` is followed until there is none: every publication came once, in order."""
    async with serving() as site:
        for number in range(7):
            await publish(site, "chat:a", number)
        seen: list[Any] = []
        reply = await ask(site.port, path("chat:a", "since=:0&limit=3"))
        while True:
            seen += data_of(reply)
            if "link" not in reply.headers:
                break
            assert reply.headers["link"].endswith('rel="next"')
            reply = await ask(site.port, reply.headers["link"].partition("<")[2].partition(">")[0])
        assert seen == list(range(7))
        epoch, offset = reply.json["epoch"], reply.json["offset"]
        assert reply.headers["etag"] == f'"{epoch}:{offset}"' == f'"{epoch}:7"'
        after = await ask(site.port, path("chat:a", f"since={epoch}:7"))
        assert (data_of(after), after.json) == ([], {"publications": [], "epoch": epoch, "offset": 7})


async def test_only_the_position() -> None:
    """``limit=0`` tells where the channel stands, and nobody's publication changes it in an empty one."""
    async with serving() as site:
        empty = await ask(site.port, path("chat:a", "limit=0"))
        assert empty.json == {"publications": [], "epoch": "", "offset": 0}
        assert empty.headers["etag"] == '":0"'
        position = await publish(site, "chat:a", 1)
        assert (await ask(site.port, path("chat:a", "limit=0"))).json == {"publications": [], **position}


async def test_a_publication_reads_as_on_a_websocket() -> None:
    """The same publication has the same fields, and the same bytes of data, on a WebSocket and here (PROTOCOL 6.3)."""
    async with serving() as site:
        client = await Client.connected(site.url)
        frames: list[str] = []
        client.watch = frames.append
        await client.ask("subscribe", channel="chat:a")
        body = b'{"data": {"n": 1.00, "s": "\\u00e9"}}'
        await ask(site.port, path("chat:a"), body=body)
        await client.push("pub")
        (frame,) = [frame for frame in frames if '"pub"' in frame]
        reply = await ask(site.port, path("chat:a"))
        assert b'{"n": 1.00, "s": "\\u00e9"}' in reply.body
        assert reply.json["publications"] == [json.loads(frame)["push"]["pub"]]
        await client.close()


async def test_a_cursor_that_is_gone_is_410_with_the_new_one() -> None:
    """Another epoch, a trimmed position, one beyond the top, another channel's: each says where to go on."""
    namespaces = [{"name": "short", **KEPT, "history_size": 2}, {"name": "chat", **KEPT}]
    async with serving(settings(channel={"namespaces": namespaces})) as site:
        for number in range(5):
            position = await publish(site, "short:a", number)
        other = await publish(site, "chat:b", "x")
        epoch = position["epoch"]
        for gone in (f"{epoch}:2", f"{epoch}:6", "elsewhere:1", f"{other['epoch']}:1"):
            for query in ("", "&reverse=true"):
                reply = await ask(site.port, path("short:a", f"since={gone}{query}"))
                assert reply.status == 410, (gone, reply)
                assert reply.headers["content-type"] == "application/problem+json"
                assert reply.headers["etag"] == f'"{epoch}:5"'
                problem = reply.json
                assert (problem["code"], problem["status"]) == (112, 410)
                assert {"epoch": problem["epoch"], "offset": problem["offset"]} == position
            waiting = await ask(site.port, path("short:a", f"since={gone}"), headers={"Prefer": "wait=30"})
            assert (waiting.status, waiting.json["offset"]) == (410, 5)
        assert data_of(await ask(site.port, path("short:a", f"since={epoch}:3"))) == [3, 4]


async def test_etags_are_cursors() -> None:
    """``If-None-Match`` with the cursor is 304 without body until something comes, for pages and for the newest."""
    async with serving() as site:
        epoch = (await publish(site, "chat:a", 1))["epoch"]
        for query in ("", "since=:0", "reverse=true", "limit=0"):
            tag = (await ask(site.port, path("chat:a", query))).headers["etag"]
            for header in (tag, f"W/{tag}", f'"else", {tag}', "*"):
                reply = await ask(site.port, path("chat:a", query), headers={"If-None-Match": header})
                assert (reply.status, reply.body) == (304, b""), (query, header)
                assert reply.headers["etag"] == tag
        await publish(site, "chat:a", 2)
        for query in ("", "since=:0", "reverse=true", "limit=0"):
            reply = await ask(site.port, path("chat:a", query), headers={"If-None-Match": f'"{epoch}:1"'})
            assert reply.status == 200, query
        page = await ask(site.port, path("chat:a", "since=:0&limit=1"), headers={"If-None-Match": f'"{epoch}:1"'})
        assert page.status == 304, "a page that is full does not change"
        foreign = await ask(site.port, path("chat:a"), headers={"If-None-Match": '"a", "b:c", ":", "é"'})
        assert foreign.status == 200


async def test_nothing_new_costs_no_read_while_the_channel_is_followed() -> None:
    """304 reads nothing while somebody here follows and the top was confirmed within a second; else once."""
    history = CountingHistory(idempotency_ttl_ms=86_400_000)
    async with serving(history=history) as site:
        tag = f'"{(await publish(site, "chat:a", 1))["epoch"]}:1"'

        async def poll(expected: int, query: str = "") -> int:
            before = history.reads
            reply = await ask(site.port, path("chat:a", query), headers={"If-None-Match": tag})
            assert reply.status == expected
            return history.reads - before

        assert [await poll(304), await poll(304)] == [1, 1], "nobody follows: one read each"
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="chat:a")
        assert [await poll(304) for _ in range(4)] == [1, 0, 0, 0]
        assert await poll(304, f"since={tag[1:-1]}") == 0
        assert await poll(304, "since=:0") == 1, "a page from elsewhere has to be looked at"
        site.clock.ahead_s += 1.5
        assert [await poll(304), await poll(304)] == [1, 0]
        await publish(site, "chat:a", 2)
        assert await poll(200) == 1
        site.clock.ahead_s -= 3600
        assert await poll(200) == 1, "a clock that was set back confirms nothing"
        await client.close()


async def test_names_are_percent_encoded() -> None:
    """Any name that the protocol allows has a path: slashes, question marks, spaces, umlauts."""
    namespaces = [{"name": "any", **KEPT, "channel_regex": ".+"}]
    async with serving(settings(channel={"namespaces": namespaces})) as site:
        for name in ("any:a/b", "any:a?b=c&d", "any:a b", "any:ä%41", "any:a#1,2", "any:..", "any:a+b"):
            await publish(site, name, name)
            reply = await ask(site.port, path(name))
            assert data_of(reply) == [name]
            (location,) = [(await ask(site.port, path(name), body={"data": 2})).headers["location"]]
            assert data_of(await ask(site.port, location)) == [2]


async def test_head_and_options() -> None:
    """HEAD has GET's headers and no body, waits for nothing; OPTIONS says what there is."""
    async with serving() as site:
        await publish(site, "chat:a", 1)
        got = await ask(site.port, path("chat:a"))
        head = await ask(site.port, path("chat:a"), method="HEAD", headers={"Prefer": "wait=60"})
        assert (head.status, head.body) == (200, b"")
        for name in ("etag", "content-type", "content-length", "cache-control", "vary"):
            assert head.headers[name] == got.headers[name]
        since = path("chat:a", f"since={got.headers['etag'][1:-1]}")
        waited = await ask(site.port, since, method="HEAD", headers={"Prefer": "wait=60"})
        assert waited.status == 200
        assert "preference-applied" not in waited.headers
        options = await ask(site.port, path("chat:a"), method="OPTIONS")
        assert (options.status, options.headers["allow"]) == (204, "GET, HEAD, POST, OPTIONS")


# --- publishing --------------------------------------------------------------------------
async def test_publishing_says_where() -> None:
    """201 with the position, and a Location where exactly this publication is; subscribers get it at once."""
    async with serving() as site:
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="chat:a")
        await publish(site, "chat:a", "before")
        reply = await ask(site.port, path("chat:a"), body={"data": {"text": "hi"}}, headers=bearer(sub="42"))
        assert (reply.status, reply.json["offset"]) == (201, 2)
        assert data_of(await ask(site.port, reply.headers["location"])) == [{"text": "hi"}]
        first, second = await client.publications("chat:a", 2)
        assert (first["info"]["user"], second["info"]["user"]) == ("", "42")
        passing = await ask(site.port, path("live:a"), body={"data": 1})
        assert (passing.status, passing.json) == (202, {})
        assert "location" not in passing.headers
        await client.close()


async def test_an_idempotency_key_publishes_once() -> None:
    """A repeat, quoted or not, gets the first one's position; two at the same time publish once (PROTOCOL 11.8)."""
    async with serving() as site:
        first = await publish(site, "chat:a", 1, **{"Idempotency-Key": "k-1"})
        assert await publish(site, "chat:a", 2, **{"Idempotency-Key": '"k-1"'}) == first
        racing = await asyncio.gather(*(publish(site, "chat:a", 3, **{"Idempotency-Key": "race"}) for _ in range(5)))
        assert [one["offset"] for one in racing] == [2] * 5
        assert data_of(await ask(site.port, path("chat:a"))) == [1, 3]


async def test_an_idempotency_key_outlives_the_process(tmp_path: Path) -> None:
    """A key is honoured after a crash, as the other APIs' keys are."""
    settings_ = config(sqlite={"path": str(tmp_path / "keys.db")})
    headers = {"Idempotency-Key": "once"}
    with Process(tmp_path, settings_) as server:
        first = await ask(server.port, path("chat:a"), body={"data": 1}, headers=headers)
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        again = await ask(server.port, path("chat:a"), body={"data": 2}, headers=headers)
        assert (again.status, again.json) == (201, first.json)


# --- waiting ------------------------------------------------------------------------------
async def test_a_poll_is_answered_the_moment_something_comes() -> None:
    """``Prefer: wait`` holds the answer until a publication, without a read; it says what was granted."""
    history = CountingHistory(idempotency_ttl_ms=86_400_000)
    async with serving(history=history) as site:
        following = Following(site.node.hub)
        epoch = (await publish(site, "chat:a", 1))["epoch"]
        poll = asyncio.create_task(
            ask(site.port, path("chat:a", f"since={epoch}:1"), headers={"Prefer": "respond-async, wait=3600; x=y"})
        )
        await following.until(1)
        reads = history.reads
        await publish(site, "chat:a", {"n": 2})
        reply = await poll
        assert history.reads == reads
        assert data_of(reply) == [{"n": 2}]
        assert reply.json["offset"] == 2
        assert reply.headers["preference-applied"] == "wait=60"
        assert reply.headers["etag"] == f'"{epoch}:2"'
        assert reply.json["publications"] == (await ask(site.port, path("chat:a", "limit=1"))).json["publications"]
        assert (site.node.connections, site.node.sessions, site.node.hub.feeds) == (0, {}, {})


async def test_a_poll_that_is_late_does_not_wait() -> None:
    """What follows the cursor already is the answer, ``limit`` of it, with a link to the rest."""
    async with serving() as site:
        for number in range(3):
            await publish(site, "chat:a", number)
        reply = await ask(site.port, path("chat:a", "since=:0&limit=2"), headers={"Prefer": "wait=60"})
        assert (data_of(reply), reply.json["offset"]) == ([0, 1], 2)
        assert 'rel="next"' in reply.headers["link"]


async def test_a_poll_without_news_ends_with_its_cursor() -> None:
    """After its time a poll is answered with no publication and the position it came with; 304 with its tag."""
    async with serving() as site:
        epoch = (await publish(site, "chat:a", 1))["epoch"]
        since = path("chat:a", f"since={epoch}:1")
        reply = await ask(site.port, since, headers={"Prefer": "wait=1"})
        assert (reply.status, reply.json) == (200, {"publications": [], "epoch": epoch, "offset": 1})
        tagged = await ask(site.port, since, headers={"Prefer": "wait=1", "If-None-Match": f'"{epoch}:1"'})
        assert (tagged.status, tagged.headers["preference-applied"]) == (304, "wait=1")


async def test_waiting_with_an_entity_tag_alone() -> None:
    """``If-None-Match`` and ``wait`` without ``since``: the newest page, as soon as it is another one."""
    async with serving() as site:
        following = Following(site.node.hub)
        tag = f'"{(await publish(site, "chat:a", 1))["epoch"]}:1"'
        headers = {"Prefer": "wait=60", "If-None-Match": tag}
        poll = asyncio.create_task(ask(site.port, path("chat:a"), headers=headers))
        await following.until(1)
        await publish(site, "chat:a", 2)
        assert data_of(await poll) == [1, 2]
        assert data_of(await ask(site.port, path("chat:a"), headers=headers)) == [1, 2]


async def test_waiting_in_a_channel_that_nobody_has_published_to() -> None:
    """The first publication of all wakes a poll, whose answer has the epoch that began with it."""
    async with serving() as site:
        following = Following(site.node.hub)
        polls = [asyncio.create_task(ask(site.port, path("chat:a", query), headers={"Prefer": "wait=60"}))
                 for query in ("since=:0", "")]  # fmt: skip
        await following.until(2)
        position = await publish(site, "chat:a", "first")
        for poll in polls:
            reply = await poll
            assert data_of(reply) == ["first"]
            assert {"epoch": reply.json["epoch"], "offset": reply.json["offset"]} == position


async def test_a_poller_that_follows_its_cursor_misses_nothing() -> None:
    """Bursts while a poller is between two polls, or in the middle of one: all come, once, in order."""
    async with serving() as site:
        seen: list[Any] = []
        cursor = ":0"

        async def follow() -> None:
            nonlocal cursor
            while len(seen) < 200:
                reply = await ask(site.port, path("chat:a", f"since={cursor}&limit=7"), headers={"Prefer": "wait=60"})
                seen.extend(data_of(reply))
                cursor = reply.headers["etag"][1:-1]

        async with asyncio.TaskGroup() as group:
            group.create_task(follow())
            for start in range(0, 200, 20):
                await asyncio.gather(*(publish(site, "chat:a", start + number) for number in range(20)))
        assert sorted(seen) == list(range(200))
        page = await ask(site.port, path("chat:a", "since=:0&limit=300"))
        assert seen == data_of(page)


async def test_a_poll_whose_client_leaves_frees_everything() -> None:
    """A client that goes away while it waits leaves no subscription, no session and no count behind."""
    async with serving() as site:
        following = Following(site.node.hub)
        _, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(head_of("GET", path("chat:a", "since=:0"), {"Prefer": "wait=60"}))
        await following.until(1)
        assert site.node.connections == 1
        await vanish(writer)
        await following.until(0)
        await ask(site.port, path("chat:a"))
        assert (site.node.connections, site.node.sessions, site.node.hub.feeds) == (0, {}, {})


async def test_a_poll_loses_its_place_when_history_does(log: ExpectedLog) -> None:
    """Numbering that begins anew under a waiting poll is 410 with the new cursor, as for a subscription."""
    log.expect("subscription.lost")
    history = MemoryHistory(idempotency_ttl_ms=86_400_000)
    async with serving(history=history) as site:
        following = Following(site.node.hub)
        epoch = (await publish(site, "chat:a", 1))["epoch"]
        headers = {"Prefer": "wait=60"}
        poll = asyncio.create_task(ask(site.port, path("chat:a", f"since={epoch}:1"), headers=headers))
        await following.until(1)
        await history.new_epochs()
        site.node.positioning.check_all()
        reply = await poll
        assert (reply.status, reply.json["code"]) == (410, 112)
        assert reply.json["epoch"] != epoch
        assert log.seen("subscription.lost")


async def test_polls_are_ended_by_orders() -> None:
    """What the back end does to a user's connections it does to a waiting poll: 403 with the code."""
    async with serving(settings(channel={"namespaces": [{"name": "chat", **KEPT}]})) as site:
        following = Following(site.node.hub)
        headers = {"Prefer": "wait=60", **bearer(sub="42")}
        for method, body, status, code in (
            ("disconnect", {"user": "42"}, 403, 3503),
            ("disconnect", {"user": "42", "disconnect": {"code": 4100, "reason": "banned"}}, 403, 4100),
            ("unsubscribe", {"user": "42", "channel": "chat:a"}, 403, 103),
            ("refresh", {"user": "42", "expired": True}, 401, 3005),
        ):
            poll = asyncio.create_task(ask(site.port, path("chat:a", "since=:0"), headers=headers))
            await following.until(1)
            order = await ask(site.port, f"/api/{method}", body=body, headers={"X-API-Key": "api-key"})
            assert order.json == {"result": {}}
            reply = await poll
            assert (reply.status, reply.json["code"]) == (status, code)


async def test_polls_of_one_client_are_limited_and_harm_nobody() -> None:
    """Beyond ``rest.poll_limit`` a client's poll is 429; its others go on, and so does everybody else."""
    async with serving(settings(rest={"poll_limit": 50})) as site:
        following = Following(site.node.hub)
        greedy = {"Prefer": "wait=60", **bearer(sub="greedy")}
        polls = [asyncio.create_task(ask(site.port, path("chat:a", "since=:0"), headers=greedy)) for _ in range(50)]
        await following.until(50)
        refused = await asyncio.gather(
            *(ask(site.port, path("chat:a", "since=:0"), headers=greedy) for _ in range(150))
        )
        assert {(reply.status, reply.json["code"], reply.headers["retry-after"]) for reply in refused} == {
            (429, 111, "1")
        }
        other = asyncio.create_task(
            ask(site.port, path("chat:a", "since=:0"), headers={"Prefer": "wait=60", **bearer(sub="modest")})
        )
        anonymous = asyncio.create_task(ask(site.port, path("chat:a", "since=:0"), headers={"Prefer": "wait=60"}))
        await following.until(52)
        assert (await ask(site.port, path("chat:a", "since=:0"), headers=bearer(sub="greedy"))).status == 200
        await publish(site, "chat:a", "news")
        for reply in await asyncio.gather(*polls, other, anonymous):
            assert data_of(reply) == ["news"]
        again = await ask(site.port, path("chat:a", "since=:0"), headers=greedy)
        assert data_of(again) == ["news"]


async def test_polls_count_as_connections() -> None:
    """``client.connection_limit`` (503) and ``client.user_connection_limit`` (429) hold for waiting polls, too."""
    async with serving(settings(client={"connection_limit": 2, "user_connection_limit": 1})) as site:
        following = Following(site.node.hub)
        user, other = ({"Prefer": "wait=60", **bearer(sub=sub)} for sub in ("42", "43"))
        polls = [asyncio.create_task(ask(site.port, path("chat:a", "since=:0"), headers=user))]
        await following.until(1)
        second = await ask(site.port, path("chat:a", "since=:0"), headers=user)
        assert (second.status, second.json["code"]) == (429, 3504)
        polls.append(asyncio.create_task(ask(site.port, path("chat:a", "since=:0"), headers=other)))
        await following.until(2)
        third = await ask(site.port, path("chat:a", "since=:0"), headers={"Prefer": "wait=60"})
        assert (third.status, third.json["code"]) == (503, 111)
        await publish(site, "chat:a", 1)
        assert [(await poll).status for poll in polls] == [200, 200]


async def test_a_poll_ends_with_its_token() -> None:
    """A poll waits no longer than its token is good; the next request is refused."""
    async with serving() as site:
        headers = {"Prefer": "wait=60", **bearer(sub="42", exp=int(site.clock()) + 2)}
        reply = await ask(site.port, path("chat:a", "since=:0"), headers=headers)
        assert data_of(reply) == []
        site.clock.ahead_s += 2
        assert (await ask(site.port, path("chat:a", "since=:0"), headers=headers)).json["code"] == 109


async def test_a_server_that_ends_answers_its_polls(tmp_path: Path) -> None:
    """On SIGTERM a waiting poll is answered 503 and comes back; it is not cut."""
    with Process(tmp_path, config()) as server:
        poll = asyncio.create_task(ask(server.port, path("chat:a", "since=:0"), headers={"Prefer": "wait=60"}))
        async with asyncio.timeout(PATIENCE_S):
            while (await ask(server.port, "/v1/status")).json["channels"] != 1:
                continue
        server.send(signal.SIGTERM)
        reply = await poll
        assert (reply.status, reply.json["code"], reply.headers["retry-after"]) == (503, 3001, "1")
        assert await asyncio.to_thread(server.wait) == 0


# --- who may ------------------------------------------------------------------------------
async def test_permissions_are_those_of_the_websocket() -> None:
    """Each option permits here exactly what it permits there; "for subscribers" is who could subscribe."""
    kept = {"history_size": 10, "history_ttl": "1h", "presence": True}
    namespaces = [
        {"name": "shut", **kept},
        {"name": "named", **{name: value for name, value in KEPT.items() if "anonymous" not in name}, "presence": True},
        {"name": "subs", **kept, "allow_subscribe_for_client": True, "allow_history_for_subscriber": True,
         "allow_publish_for_subscriber": True, "allow_presence_for_subscriber": True},
        {"name": "noone", **kept, "allow_history_for_subscriber": True, "allow_publish_for_subscriber": True,
         "allow_presence_for_subscriber": True},
        {"name": "mine", **kept, "allow_user_limited_channels": True, "allow_history_for_subscriber": True},
    ]  # fmt: skip
    async with serving(settings(channel={"namespaces": namespaces})) as site:
        user = bearer(sub="42")
        given = bearer(sub="42", channels=["noone:a"])

        async def statuses(channel: str, headers: dict[str, str]) -> list[int]:
            place = f"/v1/channels/{quote(channel)}"
            return [
                (await ask(site.port, path(channel), headers=headers)).status,
                (await ask(site.port, path(channel), headers=headers, body={"data": 1})).status,
                (await ask(site.port, f"{place}/presence", headers=headers)).status,
            ]

        assert await statuses("shut:a", user) == [403, 403, 403]
        assert await statuses("named:a", {}) == [403, 403, 403]
        assert await statuses("named:a", user) == [200, 201, 200]
        assert await statuses("subs:a", user) == [200, 201, 200]
        assert await statuses("subs:a", {}) == [403, 403, 403]
        assert await statuses("noone:a", user) == [403, 403, 403]
        assert await statuses("noone:a", given) == [200, 201, 200]
        assert (await ask(site.port, path("mine:a#41,42"), headers=user)).status == 200
        assert (await ask(site.port, path("mine:a#41"), headers=user)).status == 403
        assert await statuses("nowhere:a", user) == [404, 404, 404]


async def test_tokens_as_on_connect() -> None:
    """Invalid, expired, of another kind, or none where one is needed: 401 with the code, and what is wanted."""
    async with serving(settings(client={"allow_anonymous_connect_without_token": False})) as site:
        now = int(site.clock())
        cases = {
            "": (101, "Bearer"),
            "Bearer nonsense": (3500, 'Bearer error="invalid_token"'),
            f"Bearer {token({'sub': '42'}, secret='x' * 40)}": (3500, 'Bearer error="invalid_token"'),
            f"Bearer {token({'sub': '42', 'exp': now - 5})}": (109, 'Bearer error="invalid_token"'),
            f"Bearer {token({'sub': '42', 'expire_at': now - 5})}": (110, 'Bearer error="invalid_token"'),
            f"Bearer {token({'sub': '42', 'channel': 'chat:a'})}": (3500, 'Bearer error="invalid_token"'),
            "Basic YTpi": (3500, 'Bearer error="invalid_token"'),
            "Bearer": (3500, 'Bearer error="invalid_token"'),
        }
        for header, (code, challenge) in cases.items():
            headers = {"Authorization": header} if header else {}
            reply = await ask(site.port, path("chat:a"), headers=headers)
            assert (reply.status, reply.json["code"]) == (401, code), header
            assert reply.headers["www-authenticate"] == challenge
        good = await ask(site.port, path("chat:a"), headers={"Authorization": f"bEARER {token({'sub': '42'})}"})
        assert good.status == 200
        assert (await ask(site.port, path("chat:a", f"token={token({'sub': '42'})}"))).status == 401


async def test_presence_over_http() -> None:
    """Who is here is what a WebSocket would be told."""
    async with serving() as site:
        client = await Client.connected(site.url, token=token({"sub": "42", "info": {"name": "Ada"}}))
        await client.ask("subscribe", channel="chat:a")
        reply = await ask(site.port, "/v1/channels/chat%3Aa/presence")
        assert reply.json == await client.ask("presence", channel="chat:a")
        assert reply.json["presence"][client.hello["client"]]["conn_info"] == {"name": "Ada"}
        assert (await ask(site.port, "/v1/channels/chat:b/presence")).json == {"presence": {}}
        await client.close()


async def test_a_server_without_rest() -> None:
    """``rest.disabled``: there is nothing below ``/v1`` but what belongs to others."""
    async with serving(settings(rest={"disabled": True})) as site:
        assert (await ask(site.port, path("chat:a"))).status == 404
        assert (await ask(site.port, "/v1/openapi.json")).status == 404
        assert (await ask(site.port, "/v1/status")).status == 200


# --- the app's hooks ------------------------------------------------------------------------
async def test_hooks_are_not_gone_around() -> None:
    """Connecting, subscribing and publishing ask the app as a WebSocket does; each request is a visit to it."""
    app, heard = App(), []

    @app.connecting
    async def connecting(client: AppClient) -> None:
        heard.append(f"connecting {client.user} {client.transport}")
        if client.user == "banned":
            raise Refuse(450, "not you")

    @app.subscribing("subs")
    async def subscribing(client: AppClient, channel: str) -> None:
        heard.append(f"subscribing {channel}")
        if channel == "subs:secret":
            raise Refuse(451, "not there")

    @app.publishing("chat")
    async def publishing(client: AppClient, channel: str, data: Any) -> Change | None:
        heard.append(f"publishing {channel}")
        if data == "bad":
            raise Refuse(452, "mind your words")
        return Change({"said": data}, tags={"checked": "yes"})

    @app.disconnecting
    async def disconnecting(client: AppClient) -> None:
        heard.append(f"disconnecting {client.user}")

    namespaces = [
        {"name": "chat", **KEPT},
        {"name": "subs", **OPEN, "history_size": 5, "history_ttl": "1h", "allow_history_for_client": False,
         "allow_history_for_subscriber": True},
    ]  # fmt: skip
    async with serving(settings(channel={"namespaces": namespaces})) as site:
        app.attach(site.node)
        user = bearer(sub="42")
        banned = await ask(site.port, path("chat:a"), headers=bearer(sub="banned"))
        assert (banned.status, banned.json["code"], banned.json["title"]) == (403, 450, "not you")
        refused = await ask(site.port, path("chat:a"), headers=user, body={"data": "bad"})
        assert (refused.status, refused.json["code"]) == (403, 452)
        assert (await ask(site.port, path("chat:a"), headers=user, body={"data": "good"})).status == 201
        (publication,) = (await ask(site.port, path("chat:a"), headers=user)).json["publications"]
        assert (publication["data"], publication["tags"]) == ({"said": "good"}, {"checked": "yes"})
        assert (await ask(site.port, path("subs:open"), headers=user)).status == 200
        secret = await ask(site.port, path("subs:secret"), headers=user)
        assert (secret.status, secret.json["code"]) == (403, 451)
        await app.finish(PATIENCE_S)
        assert heard.count("connecting 42 rest") == heard.count("disconnecting 42") == 5
        assert heard.count("disconnecting banned") == 0
        assert [one for one in heard if one.startswith("subscribing")] == [
            "subscribing subs:open",
            "subscribing subs:secret",
        ]
        assert heard.count("publishing chat:a") == 2


async def test_a_hook_that_ends_the_visit() -> None:
    """A hook that disconnects its client ends the request with that code, and what it would do is not done."""
    app = App()

    @app.publishing
    async def publishing(client: AppClient, channel: str) -> None:
        client.disconnect(4001, "go away")

    async with serving() as site:
        app.attach(site.node)
        reply = await ask(site.port, path("chat:a"), body={"data": 1})
        assert (reply.status, reply.json["code"], reply.json["title"]) == (403, 4001, "go away")
        assert data_of(await ask(site.port, path("chat:a"))) == []
