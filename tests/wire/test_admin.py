"""PROTOCOL 17.6: who may use the console, and what it is told; the page itself is in tests/browser/test_console.py."""

import asyncio
import json
from typing import Any

import pytest
from conftest import ExpectedLog
from patience import PATIENT_S
from support import SECRET, Client, Site, serving, settings, token
from tornado.httpclient import AsyncHTTPClient, HTTPResponse

from server import sampling
from server.passes import AUDIENCE, Passes, link, with_secret
from server.sampling import A_SECOND, SAMPLES
from server.settings import AdminSettings, Settings

OPEN_SESAME = {"admin": {"enabled": True, "password": "open sesame", "secret": "signs passes"}}


async def _ask(site: Site, path: str, body: Any = None, **headers: str) -> HTTPResponse:
    """GET, or POST if there is a body: JSON, or bytes as they are."""
    post = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    return await AsyncHTTPClient().fetch(
        f"http://127.0.0.1:{site.port}/admin{path}",
        method="GET" if post is None else "POST",
        body=post,
        headers=headers,
        raise_error=False,
        request_timeout=30,
    )


async def _inside(site: Site) -> dict[str, str]:
    """The header that somebody has who has logged in."""
    response = await _ask(site, "/auth", {"password": "open sesame"})
    assert response.code == 200, response.body
    return {"Authorization": f"Bearer {json.loads(response.body)['token']}"}


async def _call(site: Site, method: str, headers: dict[str, str], **request: Any) -> dict[str, Any]:
    response = await _ask(site, f"/api/{method}", request, **headers)
    assert response.code == 200, response
    return dict(json.loads(response.body))


# --- who may come in --------------------------------------------------------------------------
async def test_there_is_no_console_unless_it_is_switched_on() -> None:
    """A configured server has no console unless that is configured, too."""
    async with serving() as site:
        for path in ("", "/state", "/settings"):
            assert (await _ask(site, path)).code == 404
        assert (await _ask(site, "/auth", {"password": ""})).code == 404


async def test_a_password_opens_it(log: ExpectedLog) -> None:
    """The right password gives a pass with an end; a wrong one does not, and the log says from where."""
    log.expect("admin.refused")
    async with serving(settings(**OPEN_SESAME)) as site:
        assert (await _ask(site, "")).code == 200, "the page is for all: it knows nothing"
        response = await _ask(site, "/auth", {"password": "open sesame"})
        given = json.loads(response.body)
        assert 0 < given["expires_at"] - site.clock() <= 12 * 3600
        assert response.headers["Cache-Control"] == "no-store"
        assert "Set-Cookie" not in response.headers
        for password in ("", "open", "open sesame ", "ouvre-toi", "\ud800"):
            assert (await _ask(site, "/auth", {"password": password})).code in (400, 401)
        assert {fields["address"] for fields in log.seen("admin.refused")} == {"127.0.0.1"}
        assert len(log.seen("admin.entered")) == 1
        assert not any("open" in str(fields["why"]) for fields in log.seen("admin.refused")), "no password is logged"


async def test_a_login_as_a_form(log: ExpectedLog) -> None:
    """A form is as good as JSON; what is neither is 400."""
    log.expect("admin.refused")
    async with serving(settings(**OPEN_SESAME)) as site:
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert (await _ask(site, "/auth", b"password=open+sesame", **form)).code == 200
        for body, headers in (
            (b"pass=open+sesame", form),
            (b"\xff=", form),
            (b"{", {}),
            (b"[]", {}),
            (b'{"password":1}', {}),
            (b" " * 5000, {}),
        ):
            assert (await _ask(site, "/auth", body, **headers)).code == 400


async def test_tries_are_limited(log: ExpectedLog) -> None:
    """After ten tries in a minute an address waits, with the right password as well; another one does not."""
    log.expect("admin.refused")
    trusting = {**OPEN_SESAME, "http_server": {"trusted_proxies": ["127.0.0.1"]}}
    async with serving(settings(**trusting)) as site:
        for _ in range(10):
            assert (await _ask(site, "/auth", {"password": "guess"})).code == 401
        response = await _ask(site, "/auth", {"password": "open sesame"})
        assert response.code == 429
        assert 0 < int(response.headers["Retry-After"]) <= 60
        elsewhere = {"X-Forwarded-For": "192.0.2.7"}
        assert (await _ask(site, "/auth", {"password": "open sesame"}, **elsewhere)).code == 200


async def test_nobody_is_told_anything_without_a_pass(log: ExpectedLog) -> None:
    """No token, a broken one, one that has expired, one of a client, the API's key: all are 401, and do nothing."""
    log.expect("admin.refused", "admin.called")
    async with serving(settings(**OPEN_SESAME)) as site:
        inside = await _inside(site)
        expired = Passes(site.node.settings.admin, "").give(site.clock() - 13 * 3600).token
        endless = token({"sub": "console", "aud": AUDIENCE}, "signs passes")
        clients = token({"sub": "console", "exp": int(site.clock() + 60)}, "signs passes")
        forged = token({"sub": "console", "aud": AUDIENCE, "exp": int(site.clock() + 60)}, SECRET)
        for headers in (
            {},
            {"Authorization": "Bearer"},
            {"Authorization": "Basic b3BlbjpzZXNhbWU="},
            {"X-API-Key": "api-key"},
            *({"Authorization": f"Bearer {bad}"} for bad in ("nonsense", expired, endless, clients, forged)),
        ):
            assert (await _ask(site, "/state", **headers)).code == 401, headers
            assert (await _ask(site, "/settings", **headers)).code == 401
            assert (await _ask(site, "/sample", {"channel": "live:a"}, **headers)).code == 401
            assert (await _ask(site, "/api/publish", {"channel": "live:a", "data": 1}, **headers)).code == 401
        assert (await _ask(site, "/state", **inside)).code == 200
        assert not log.seen("admin.called")
        said = str([fields["why"] for fields in log.seen("admin.refused")])
        assert expired not in said
        assert forged not in said


async def test_a_pass_runs_out(log: ExpectedLog) -> None:
    """After ``admin.ttl`` a pass opens nothing."""
    log.expect("admin.refused")
    async with serving(settings(admin={**OPEN_SESAME["admin"], "ttl": "10m"})) as site:
        inside = await _inside(site)
        site.clock.ahead_s += 590
        assert (await _ask(site, "/state", **inside)).code == 200
        site.clock.ahead_s += 11
        assert (await _ask(site, "/state", **inside)).code == 401


async def test_another_site_gets_nowhere(log: ExpectedLog) -> None:
    """A browser that another site's page makes ask is turned away, even with a pass; so are its logins."""
    log.expect("admin.refused")
    async with serving(settings(**OPEN_SESAME)) as site:
        inside = await _inside(site)
        for place in ("cross-site", "same-site"):
            foreign = {"Sec-Fetch-Site": place}
            assert (await _ask(site, "/state", **inside, **foreign)).code == 403
            assert (await _ask(site, "/auth", {"password": "open sesame"}, **foreign)).code == 403
            assert (await _ask(site, "/api/info", {}, **inside, **foreign)).code == 403
        assert (await _ask(site, "/state", **inside, **{"Sec-Fetch-Site": "same-origin"})).code == 200
        page = await _ask(site, "")
        assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"]
        assert "Access-Control-Allow-Origin" not in page.headers


async def test_a_pass_that_was_signed_elsewhere() -> None:
    """Who knows ``admin.secret`` needs no password: a single sign-on signs passes of its own."""
    async with serving(settings(admin={"enabled": True, "secret": "signs passes"})) as site:
        signed = token({"aud": AUDIENCE, "exp": int(site.clock()) + 60}, "signs passes")
        assert (await _ask(site, "/state", Authorization=f"Bearer {signed}")).code == 200


async def test_without_a_secret_passes_are_good_for_one_process(log: ExpectedLog) -> None:
    """Two processes without ``admin.secret`` know each its own passes only."""
    log.expect("admin.refused")
    chosen = settings(admin={"enabled": True, "password": "open sesame"})
    async with serving(chosen) as here, serving(chosen) as there:
        inside = await _inside(here)
        assert (await _ask(here, "/state", **inside)).code == 200
        assert (await _ask(there, "/state", **inside)).code == 401


def test_the_link_that_is_printed() -> None:
    """It opens the console of this very server; a secret that is set stays."""
    chosen = with_secret(Settings(admin=AdminSettings(enabled=True)), lambda: "made at the start")
    address, _, given = link(chosen.admin, "http://127.0.0.1:8000/", 1000.0).partition("#pass=")
    assert address == "http://127.0.0.1:8000/admin"
    assert Passes(chosen.admin, "").refusal(given, 1001.0) == ""
    assert Passes(AdminSettings(enabled=True), "another").refusal(given, 1001.0)
    kept = Settings(admin=AdminSettings(enabled=True, secret="mine"))
    assert with_secret(kept, lambda: "made at the start") is kept


# --- what it is told ----------------------------------------------------------------------------
async def test_state_of_the_process() -> None:
    """The console gets what it draws: this process, all processes, the numbers, what is in trouble."""
    async with serving(settings(**OPEN_SESAME)) as site:
        inside = await _inside(site)
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="live:a")
        await client.ask("publish", channel="live:a", data=1)
        state = json.loads((await _ask(site, "/state", **inside)).body)
        assert (state["node"], state["troubles"]) == (site.node.id, {})
        assert [(node["uid"], node["num_clients"]) for node in state["nodes"]] == [(site.node.id, 1)]
        assert state["numbers"]["publications"] == {"kept": 0, "passing": 1}
        assert state["numbers"]["deliveries"] == 1
        assert state["numbers"]["loop_lag_seconds"] == [0, 0], "as many values, and their sum"
        await client.close()


async def test_settings_in_force_without_secrets() -> None:
    """Every setting is shown as it holds; what is secret is starred."""
    async with serving(settings(**OPEN_SESAME)) as site:
        response = await _ask(site, "/settings", **await _inside(site))
        shown = json.loads(response.body)
        assert shown["channel"]["namespaces"][0]["name"] == "chat"
        assert shown["admin"] == {**shown["admin"], "password": "***", "secret": "***", "ttl": "12h"}
        assert not any(secret in response.body.decode() for secret in ("open sesame", "signs passes", SECRET))


async def test_the_api_with_a_pass(log: ExpectedLog) -> None:
    """The console calls the methods of the API; what changes something is in the log, what only looks is not."""
    log.expect("command.refused")
    async with serving(settings(**OPEN_SESAME)) as site:
        inside = await _inside(site)
        client = await Client.connected(site.url, token=token({"sub": "ann"}))
        await client.ask("subscribe", channel="chat:a")
        published = await _call(site, "publish", inside, channel="chat:a", data={"text": "hello"})
        assert published["result"]["offset"] == 1
        assert (await client.publications("chat:a", 1))[0]["data"] == {"text": "hello"}
        page = await _call(site, "history", inside, channel="chat:a", limit=10, reverse=True)
        assert [one["offset"] for one in page["result"]["publications"]] == [1]
        assert (await _call(site, "channels", inside))["result"]["channels"] == {"chat:a": {"num_clients": 1}}
        assert (await _call(site, "history", inside, channel="live:a"))["error"]["code"] == 108
        assert (await _ask(site, "/api/nonsense", {}, **inside)).code == 404
        await _call(site, "disconnect", inside, user="ann")
        assert (await client.closed())[0] == 3503
        assert [fields["method"] for fields in log.seen("admin.called")] == ["publish", "nonsense", "disconnect"]


# --- samples --------------------------------------------------------------------------------------
async def _sample(site: Site, inside: dict[str, str], channel: str, after: int = 0) -> dict[str, Any]:
    response = await _ask(site, "/sample", {"channel": channel, "after": after}, **inside)
    assert response.code == 200, response.body
    return dict(json.loads(response.body))


async def test_a_quiet_channel_is_seen_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever watches a passing channel sees what comes, once, and is nobody in it."""
    monkeypatch.setattr(sampling, "WATCHED_S", PATIENT_S)
    async with serving(settings(**OPEN_SESAME)) as site:
        inside = await _inside(site)
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="live:a", join_leave=True)
        assert await _sample(site, inside, "live:a") == {"publications": [], "number": 0}
        for number in range(3):
            await client.ask("publish", channel="live:a", data=number)
        first = await _sample(site, inside, "live:a")
        assert [one["pub"]["data"] for one in first["publications"]] == [0, 1, 2]
        assert not any(one["gap"] for one in first["publications"])
        assert abs(first["publications"][0]["time"] - site.clock() * 1000) < 60_000
        await client.ask("publish", channel="live:a", data=3)
        second = await _sample(site, inside, "live:a", first["number"])
        assert [one["pub"]["data"] for one in second["publications"]] == [3]
        assert (await client.ask("presence_stats", channel="live:a")) == {"num_clients": 1, "num_users": 1}
        joins = [push["join"]["info"]["client"] for push in client.pushes if "join" in push]
        assert joins == [client.hello["client"]], "its own"
        await client.close()


async def test_a_flood_is_not_slowed_by_who_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a flood the sample hears so many in a second, then leaves the channel; who watches is told of the gap."""
    monkeypatch.setattr(sampling, "WATCHED_S", PATIENT_S)
    async with serving(settings(**OPEN_SESAME)) as site:
        inside = await _inside(site)
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="live:hot")
        await _sample(site, inside, "live:hot")
        feed = site.node.hub.feeds["live:hot"]
        assert feed.size == 2
        delivered = site.node.hub.deliveries
        for number in range(50 * A_SECOND):
            await client.ask("publish", channel="live:hot", data=number)
            if feed.size == 1:
                break
        assert feed.size == 1, "it has heard enough of this second"
        heard = site.node.hub.deliveries - delivered - (number + 1)
        assert A_SECOND <= heard <= 3 * A_SECOND, "a second may have ended in between"
        found = await _sample(site, inside, "live:hot")
        assert 0 < len(found["publications"]) <= 50
        async with asyncio.timeout(15):
            while feed.size == 1:
                await _sample(site, inside, "live:hot")
        await client.ask("publish", channel="live:hot", data="later")
        later = (await _sample(site, inside, "live:hot", found["number"]))["publications"]
        assert (later[-1]["pub"]["data"], later[-1]["gap"]) == ("later", True)
        await client.close()


async def test_samples_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many channels are watched at a time."""
    monkeypatch.setattr(sampling, "WATCHED_S", PATIENT_S)
    async with serving(settings(**OPEN_SESAME)) as site:
        inside = await _inside(site)
        for number in range(SAMPLES + 1):
            await _sample(site, inside, f"live:{number}")
        assert "live:0" not in site.node.hub.feeds
        assert len(site.node.hub.feeds) == SAMPLES


async def test_samples_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample that nobody asks for any more lets go of its channel."""
    monkeypatch.setattr(sampling, "WATCHED_S", 0.2)
    async with serving(settings(**OPEN_SESAME)) as site:
        inside = await _inside(site)
        gone = asyncio.Event()
        release = site.node.release

        def released(subscription: Any) -> None:
            release(subscription)
            if not site.node.hub.feeds:
                gone.set()

        site.node.release = released  # type: ignore[method-assign]
        await _sample(site, inside, "live:0")
        await asyncio.wait_for(gone.wait(), 30)


@pytest.mark.parametrize("body", [b'{"channel":"chat:a"}', b'{"channel":"nowhere:a"}', b"{}", b"{", b"\xff"])
async def test_what_cannot_be_sampled(body: bytes) -> None:
    """A kept channel, one of no namespace, and what is no question are 400."""
    async with serving(settings(**OPEN_SESAME)) as site:
        assert (await _ask(site, "/sample", body, **await _inside(site))).code == 400
