"""PROTOCOL 16 asked by requests (17.1.2, 17.1.3, 17.3.1): a back end decides about ``curl`` as about a connection."""

import asyncio
from typing import Any

import pytest
from conftest import ExpectedLog
from hopper import EventStream, ask, events, head_of, vanish
from support import KEPT, PATIENCE_S, Client, Site, token
from test_proxies import asking
from test_rest import bearer, path
from test_rest_events import gone, stream_of

CLOSED = {f"allow_{deed}_for_{who}": False for deed in ("history", "presence") for who in ("client", "anonymous")}
READERS = {
    "channel": {
        "namespaces": [
            {"name": "ask", **KEPT, "presence": True, "subscribe_proxy_enabled": True}
            | {**CLOSED, "allow_history_for_subscriber": True, "allow_presence_for_subscriber": True}
            | {"allow_publish_for_client": False, "allow_publish_for_subscriber": True},
        ]
    }
}
"""A namespace that gives its subscribers everything, and others nothing."""

ANN = bearer(sub="ann")


async def post(site: Site, channel: str, data: Any, **headers: str) -> Any:
    """Publish by REST as Ann; whatever the answer is."""
    return await ask(site.port, path(channel), body={"data": data}, headers={**ANN, **headers})


# --- publish ---------------------------------------------------------------------------
async def test_a_publish_by_request_is_asked_about() -> None:
    """The back end learns who, where, what and how; what it answers is published, and the answer says where it is."""
    async with asking("publish", http_headers=["X-Trace"]) as (site, app):
        app.answers["publish"] = {"result": {"data": {"n": "two"}, "tags": {"a": "b"}}}
        body = b'{"data": {"n": 1.00}}'
        reply = await ask(site.port, path("ask:1"), body=body, headers={**ANN, "X-Trace": "t1", "X-Other": "o"})
        assert (reply.status, reply.json["offset"]) == (201, 1)
        (asked,) = app.of("publish")
        client = asked.pop("client")
        assert asked == {
            "transport": "rest",
            "protocol": "json",
            "encoding": "json",
            "user": "ann",
            "channel": "ask:1",
            "data": {"n": 1.0},
        }
        assert app.headers[0]["X-Trace"] == "t1"
        assert "X-Other" not in app.headers[0]
        (publication,) = (await ask(site.port, reply.headers["location"], headers=ANN)).json["publications"]
        assert (publication["data"], publication["tags"]) == ({"n": "two"}, {"a": "b"})
        assert publication["info"] == {"user": "ann", "client": client}


async def test_keys_of_a_request_and_of_its_back_end() -> None:
    """A repeat is asked about again, and published once; the back end's own key goes before the request's."""
    async with asking("publish") as (site, app):
        first = await post(site, "ask:1", 1, **{"Idempotency-Key": "k"})
        again = await post(site, "ask:1", 2, **{"Idempotency-Key": "k"})
        assert (again.status, again.body) == (first.status, first.body) == (201, first.body)
        app.answers["publish"] = {"result": {"idempotency_key": "theirs"}}
        other = await post(site, "ask:1", 3, **{"Idempotency-Key": "k"})
        assert other.json["offset"] == 2
        assert (await post(site, "ask:1", 4)).body == other.body
        assert [asked["data"] for asked in app.of("publish")] == [1, 2, 3, 4]


async def test_a_publish_that_skips_history_is_on_its_way() -> None:
    """What the back end will not have kept has no number: 202, as in a passing channel, and subscribers have it."""
    both = asking("publish", "subscribe")
    async with both as (site, app), events(site.port, stream_of("ask:1"), ANN) as stream:
        await stream.began()
        app.answers["publish"] = {"result": {"skip_history": True}}
        reply = await post(site, "ask:1", "now")
        assert (reply.status, reply.json) == (202, {})
        passing = await stream.next()
        assert (passing.data["data"], "offset" in passing.data) == ("now", False)


NOS: list[tuple[Any, int, int]] = [
    ({"error": {"code": 103, "message": "permission denied"}}, 403, 103),
    ({"error": {"code": 422, "message": "too long"}}, 403, 422),
    ({"error": {"code": 429, "message": "slower", "temporary": True}}, 503, 429),
    ({"error": {"code": 111}}, 429, 111),
    ({"disconnect": {"code": 4501, "reason": "go away"}}, 403, 4501),
    ({"disconnect": {"code": 3500, "reason": "invalid token"}}, 401, 3500),
    (418, 403, 499),
]


@pytest.mark.parametrize(("answer", "status", "code"), NOS)
async def test_every_no_of_a_back_end_has_a_status(answer: Any, status: int, code: int) -> None:
    """An error or a disconnect is a problem document with its code, whatever was asked, and nothing is published."""
    no = {"status_code": 418, "to_error": {"code": 499, "message": "teapot"}}
    http = {"status_to_code_transforms": [no]}
    async with asking("publish", "subscribe", more=READERS, http=http) as (site, app):
        app.answers["subscribe"] = answer
        for reply in (
            await ask(site.port, path("ask:1"), headers=ANN),
            await ask(site.port, "/v1/channels/ask:1/presence", headers=ANN),
            await ask(site.port, stream_of("ask:1"), headers=ANN),
            await post(site, "ask:1", 1),
        ):
            assert (reply.status, reply.json["code"]) == (status, code)
            assert ("retry-after" in reply.headers) is (status in (429, 503))
    async with asking("publish", http=http) as (site, app):
        app.answers["publish"] = answer
        reply = await post(site, "ask:1", 1)
        assert (reply.status, reply.json["code"]) == (status, code)
        app.answers["publish"] = {"result": {}}
        assert (await post(site, "ask:1", 1)).json["offset"] == 1


@pytest.mark.parametrize("answer", [500, b"no JSON", {}, {"result": {"data": 1, "idempotency_key": "x" * 257}}])
async def test_a_back_end_that_gives_no_answer_is_503(log: ExpectedLog, answer: Any) -> None:
    """What the back end does wrong is 503 with 100, to be tried again; nothing is let through because of it."""
    log.expect("proxy.failed")
    async with asking("publish") as (site, app):
        app.answers["publish"] = answer
        reply = await post(site, "ask:1", 1)
        assert (reply.status, reply.json["code"], reply.headers["retry-after"]) == (503, 100, "1")
        assert (await ask(site.port, path("ask:1"), headers=ANN)).json["offset"] == 0


# --- subscribe -------------------------------------------------------------------------
async def test_what_subscribers_may_is_asked_about() -> None:
    """A read, a look at presence and a publish each ask once whether one might subscribe, since it would be that."""
    async with asking("subscribe", more=READERS) as (site, app):
        app.answers["subscribe"] = {"result": {"info": {"seat": 4}}}
        assert (await post(site, "ask:1", "hello")).status == 201
        page = (await ask(site.port, path("ask:1"), headers=ANN)).json
        assert page["publications"][0]["info"]["chan_info"] == {"seat": 4}
        assert (await ask(site.port, "/v1/channels/ask:1/presence", headers=ANN)).json == {"presence": {}}
        assert [(one["transport"], one["user"], one["channel"]) for one in app.of("subscribe")] == [
            ("rest", "ann", "ask:1")
        ] * 3
        assert len({one["client"] for one in app.of("subscribe")}) == 3  # each request is a client of its own
        assert "data" not in app.of("subscribe")[0]


async def test_who_has_the_channel_already_is_not_asked_about() -> None:
    """A token that names the channel is the answer, for a read as for a connection (PROTOCOL 17.1.3)."""
    async with asking("subscribe", more=READERS) as (site, app):
        named = bearer(sub="ann", channels=["ask:1"])
        assert (await ask(site.port, path("ask:1"), headers=named)).status == 200
        async with events(site.port, stream_of("ask:1"), named) as stream:
            await stream.began()
        assert app.of("subscribe") == []
        assert (await ask(site.port, path("ask:2"), headers=named)).status == 200
        assert [one["channel"] for one in app.of("subscribe")] == ["ask:2"]


async def test_a_stream_asks_about_each_channel() -> None:
    """An event stream is one client, asked about once for each channel; one "no" and there is no stream at all."""
    async with asking("subscribe", more=READERS) as (site, app):
        async with events(site.port, stream_of("ask:1", "ask:2"), ANN) as stream:
            await stream.began()
        asked = app.of("subscribe")
        assert [(one["transport"], one["channel"]) for one in asked] == [("events", "ask:1"), ("events", "ask:2")]
        assert len({one["client"] for one in asked}) == 1

        async def only_the_first(asked: dict[str, Any]) -> Any:
            return {"result": {}} if asked["channel"] == "ask:1" else {"error": {"code": 103}}

        app.answers["subscribe"] = only_the_first
        refused = await EventStream.open(site.port, stream_of("ask:1", "ask:2"), ANN)
        assert (refused.status, refused.problem["code"]) == (403, 103)
        await gone(site)


async def test_a_poll_is_asked_about_before_it_waits() -> None:
    """A long-poll asks once; what the back end says later is for the next request."""
    async with asking("subscribe", "publish", more=READERS) as (site, app):
        polling = asyncio.create_task(
            ask(site.port, path("ask:1", "since=:0"), headers={**ANN, "Prefer": "wait=60"}),
        )
        await app.until(lambda: len(app.of("subscribe")) == 1)
        await _following(site, "ask:1")
        app.answers["subscribe"] = {"error": {"code": 103}}
        assert (await post(site, "ask:1", 1)).status == 403
        publisher = await Client.connected(site.url, token=token({"sub": "bob", "channels": ["ask:1"]}))
        await publisher.ask("publish", channel="ask:1", data="news")
        reply = await polling
        assert [one["data"] for one in reply.json["publications"]] == ["news"]
        assert (await ask(site.port, path("ask:1", "since=:0"), headers=ANN)).status == 403


async def _following(site: Site, channel: str) -> None:
    """Wait until somebody follows a channel; requests take the server's turns."""
    async with asyncio.timeout(PATIENCE_S):
        while channel not in site.node.hub.feeds:
            await ask(site.port, "/health/live")


@pytest.mark.parametrize("where", ["publications", "presence", "events"])
async def test_who_goes_while_the_back_end_thinks(where: str) -> None:
    """A client that is gone when the back end answers leaves nothing behind, and the next one is asked about anew."""
    async with asking("subscribe", more=READERS) as (site, app):
        app.answers["subscribe"] = app.hang
        _, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(head_of("GET", f"/v1/channels/ask:1/{where}", ANN))
        await app.until(lambda: app.hanging == 1)
        await vanish(writer)
        app.goes_on.set()
        await gone(site)
        assert (await ask(site.port, f"/v1/channels/ask:1/{where}", method="HEAD", headers=ANN)).status == 200
        assert len(app.of("subscribe")) == 2
        await gone(site)


# --- connect ---------------------------------------------------------------------------
async def test_who_comes_with_a_cookie() -> None:
    """Without a token the connect proxy says who asks; its channels need no further question."""
    async with asking("connect", "subscribe", more=READERS, http_headers=["Cookie"]) as (site, app):

        async def by_cookie(_: dict[str, Any]) -> Any:
            cookie = app.headers[-1].get("Cookie")
            return {"result": {"user": "ann", "channels": ["ask:1"]}} if cookie == "s=1" else {}

        app.answers["connect"] = by_cookie
        cookie = {"Cookie": "s=1"}
        assert (await ask(site.port, path("ask:1"), headers=cookie)).status == 200
        assert (await ask(site.port, path("ask:1"), body={"data": 1}, headers=cookie)).status == 201
        async with events(site.port, stream_of("ask:1", since=":0"), cookie) as stream:
            await stream.began()
            assert (await stream.next()).data["info"]["user"] == "ann"
        assert app.of("subscribe") == []
        assert [one["transport"] for one in app.of("connect")] == ["rest", "rest", "events"]
        nobody = await ask(site.port, path("ask:1"))
        assert (nobody.status, nobody.json["code"]) == (401, 101)


async def test_cookies_of_another_sites_page_reach_nobody() -> None:
    """What another site embeds in its page begins no stream, and its cookies are shown to no back end (17.3.9)."""
    async with asking("connect", http_headers=["Cookie"]) as (site, app):
        app.answers["connect"] = {"result": {"user": "ann"}}
        embedded = {"Cookie": "s=1", "Sec-Fetch-Site": "cross-site"}
        refused = await EventStream.open(site.port, stream_of("chat:1"), embedded)
        assert (refused.status, refused.problem["code"]) == (403, 103)
        assert app.asked == []


async def test_a_flood_of_requests_waits_for_places() -> None:
    """Requests share the 64 places of an endpoint with connections: more of them wait, and all are answered."""
    async with asking("publish") as (site, app):
        app.answers["publish"] = app.hang
        posts = [asyncio.create_task(post(site, f"ask:{number}", number)) for number in range(80)]
        await app.until(lambda: app.hanging == 64)
        client = await Client.connected(site.url, token=token({"sub": "bob"}))
        await client.ask("subscribe", channel="chat:1")  # which asks nobody, and is not held up
        app.goes_on.set()
        assert {reply.status for reply in await asyncio.gather(*posts)} == {201}
        assert app.most_hanging == 64
        await client.close()
