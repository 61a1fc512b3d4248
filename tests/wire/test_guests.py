"""PROTOCOL 8.6 and 17.0.4 over HTTP: a name in, a token out that lets one connect; and what runs here."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import Client, Process, Site, config, serving, settings, token
from tornado.httpclient import AsyncHTTPClient, HTTPResponse

from server import __version__


async def fetch(base: str, path: str, body: Any = None, **options: Any) -> HTTPResponse:
    """GET, or POST ``body`` as JSON (text and bytes as they are); whatever the status."""
    if body is not None:
        options.setdefault("method", "POST")
        options["body"] = body if isinstance(body, str | bytes) else json.dumps(body)
    return await AsyncHTTPClient().fetch(base + path, raise_error=False, **options)


async def ask(site: Site, body: Any, **options: Any) -> HTTPResponse:
    """Ask for a session."""
    return await fetch(f"http://127.0.0.1:{site.port}", "/v1/session", body, **options)


def guests(**sections: Any) -> Any:
    """Settings with guests."""
    return settings(**{"guests": {"enabled": True}, **sections})


async def test_a_guest_connects_and_is_seen_by_name() -> None:
    """The token lets one in as a random user, and the others see the cleaned name in info."""
    async with serving(guests()) as site:
        answer = await ask(site, {"name": "  Ada\u202e  Lovelace"})
        assert answer.code == 200
        guest = json.loads(answer.body)
        assert set(guest) == {"token", "user", "name", "expires_at"}
        assert guest["name"] == "Ada Lovelace"
        assert "Ada" not in guest["user"]
        assert guest["expires_at"] == pytest.approx(site.clock() + 86_400, abs=5)
        assert answer.headers["Cache-Control"] == "no-store"
        client = await Client.connected(site.url, token=guest["token"])
        assert client.hello["expires"] is True
        await client.ask("subscribe", channel="chat:lobby")
        await client.ask("publish", channel="chat:lobby", data={"text": "hello"})
        info = (await client.push("pub", "chat:lobby"))["info"]
        assert (info["user"], info["conn_info"]) == (guest["user"], {"name": "Ada Lovelace"})
        await client.close()


async def test_a_guest_refreshes_before_the_end() -> None:
    """PROTOCOL 4.9: with the former token the new one is of the same user, so that the connection goes on."""
    async with serving(guests(guests={"enabled": True, "ttl": "60s"}, client={"ping_interval": "300s"})) as site:
        guest = json.loads((await ask(site, {"name": "Ada"})).body)
        client = await Client.connected(site.url, token=guest["token"])
        site.pass_time(50)
        renewed = json.loads((await ask(site, {"name": "Ada", "token": guest["token"]})).body)
        assert renewed["user"] == guest["user"]
        assert (await client.ask("refresh", token=renewed["token"]))["ttl"] == pytest.approx(60, abs=2)
        site.pass_time(50)
        assert await client.ask("publish", channel="live:a", data=1) == {}
        await client.close()


async def test_the_same_name_is_not_the_same_user() -> None:
    """Names are never identity, and an application's token gives nobody its user."""
    async with serving(guests()) as site:
        wishes = [{"name": "Ada"}, {"name": "Ada"}, {"name": "Ada", "token": token({"sub": "42"})}]
        users = {json.loads((await ask(site, wish)).body)["user"] for wish in wishes}
        assert len(users) == 3
        assert "42" not in users


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        ("", 400, "expected JSON"),
        ("{", 400, "expected JSON"),
        (b'{"name": "\xff"}', 400, "expected JSON"),
        ("[" * 10_000, 400, "expected JSON"),
        ("[]", 400, "array"),
        ("{}", 400, "`name`"),
        ({"name": None}, 400, "$.name"),
        ({"name": 7}, 400, "$.name"),
        ({"name": "Ada", "token": 7}, 400, "$.token"),
        ({"name": ""}, 400, "can be seen"),
        ({"name": " \u200b "}, 400, "can be seen"),
        ({"name": "x" * 33}, 400, "at most 32"),
        ({"name": "x" * 20_000}, 413, "at most 16384 bytes"),
    ],
)
async def test_wrong_input(body: Any, status: int, why: str) -> None:
    """Each gets a status and JSON that says what was expected."""
    async with serving(guests()) as site:
        answer = await ask(site, body)
        error = json.loads(answer.body)["error"]
        assert (answer.code, error["code"]) == (status, status)
        assert why in error["message"]
        assert answer.headers["Content-Type"] == "application/json"
        assert (await ask(site, {"name": "Ada"})).code == 200


async def test_other_methods() -> None:
    """Only POST makes a guest."""
    async with serving(guests()) as site:
        answer = await fetch(f"http://127.0.0.1:{site.port}", "/v1/session")
        assert answer.code == 405
        assert json.loads(answer.body)["error"]["code"] == 405


async def test_without_guests_there_is_no_such_path() -> None:
    """guests.enabled is off unless somebody sets it: 404."""
    async with serving() as site:
        assert (await ask(site, {"name": "Ada"})).code == 404


async def test_rate_limit() -> None:
    """Beyond guests.rate_limit an address is told when to come back; other addresses do not notice."""
    rules = {"guests": {"enabled": True, "rate_limit": 2}, "http_server": {"trusted_proxies": ["127.0.0.1"]}}
    async with serving(guests(**rules)) as site:
        ada, grace = {"X-Forwarded-For": "203.0.113.5"}, {"X-Forwarded-For": "203.0.113.6"}
        assert [(await ask(site, {"name": "Ada"}, headers=ada)).code for _ in range(2)] == [200, 200]
        answer = await ask(site, {"name": "Ada"}, headers=ada)
        assert answer.code == 429
        assert 0 < int(answer.headers["Retry-After"]) <= 30
        assert answer.headers["Retry-After"] in json.loads(answer.body)["error"]["message"]
        assert (await ask(site, {"name": "Grace"}, headers=grace)).code == 200


async def test_wrong_input_counts() -> None:
    """Nonsense is not free: whoever sends it is slowed as well."""
    async with serving(guests(guests={"enabled": True, "rate_limit": 1})) as site:
        assert [(await ask(site, "{")).code for _ in range(2)] == [400, 429]


async def test_origins() -> None:
    """Pages of client.allowed_origins may ask and read the answer, errors included; others get 403 and no leave."""
    async with serving(guests(client={"allowed_origins": ["https://*.example.com"]})) as site:
        ours, theirs = {"Origin": "https://app.example.com"}, {"Origin": "https://evil.example"}
        for body, code in (({"name": "Ada"}, 200), ("{", 400)):
            answer = await ask(site, body, headers=ours)
            assert answer.code == code
            assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example.com"
            assert answer.headers["Vary"] == "Origin"
        preflight = await ask(site, None, headers=ours, method="OPTIONS")
        assert preflight.code == 204
        assert preflight.headers["Access-Control-Allow-Methods"] == "POST, OPTIONS"
        assert preflight.headers["Access-Control-Allow-Headers"] == "Content-Type"
        for method, wish in (("POST", {"name": "Ada"}), ("OPTIONS", None)):
            answer = await ask(site, wish, headers=theirs, method=method)
            assert answer.code == 403
            assert "Access-Control-Allow-Origin" not in answer.headers


async def test_guests_of_the_unconfigured_server_survive_a_restart(tmp_path: Path) -> None:
    """Its own key is kept beside the database, and never printed: a token from before kill -9 still lets one in."""
    with Process(tmp_path) as process:
        guest = json.loads((await fetch(process.http, "/v1/session", {"name": "Ada"})).body)
        key = (tmp_path / "waterspout.db.key").read_text().strip()
        process.kill()
        process.start()
        client = await Client.connected(process.url, token=guest["token"])
        await client.ask("publish", channel="chat:lobby", data={"text": "back"})
        await client.close()
        again = json.loads((await fetch(process.http, "/v1/session", {"name": "Ada", "token": guest["token"]})).body)
        assert again["user"] == guest["user"]
        process.stop()
        log = process.log.read_text()
        assert "guest.welcomed" in log
        assert key not in log
        assert guest["token"] not in log


async def test_status() -> None:
    """It counts what is connected now, and says what a page needs to know of this server."""
    async with serving(guests()) as site:
        base = f"http://127.0.0.1:{site.port}"
        before = json.loads((await fetch(base, "/v1/status")).body)
        assert before == {
            "version": __version__,
            "connections": 0,
            "channels": 0,
            "uptime": 0,
            "configured": True,
            "guests": True,
        }
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="chat:a")
        site.pass_time(7)
        now = json.loads((await fetch(base, "/v1/status")).body)
        assert (now["connections"], now["channels"], now["uptime"]) == (1, 1, 7)
        await client.close()


async def test_documents_are_served_and_nothing_else() -> None:
    """The README and the protocol can be read where the server runs; its code and its database cannot."""
    async with serving(settings()) as site:
        base = f"http://127.0.0.1:{site.port}"
        for path in ("/README.md", "/server/PROTOCOL.md"):
            answer = await fetch(base, path)
            assert (answer.code, answer.headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
        for path in ("/run.py", "/server/auth.py", "/docs/../run.py", "/docs/%2e%2e/setup.cfg", "/waterspout.db"):
            assert (await fetch(base, path)).code == 404


async def test_unconfigured_says_so(tmp_path: Path) -> None:
    """The status tells a server that is open for trying out from one that somebody has configured."""
    for folder, rules, configured in (("a", None, False), ("b", config(), True)):
        (tmp_path / folder).mkdir()
        with Process(tmp_path / folder, rules) as process:
            assert json.loads((await fetch(process.http, "/v1/status")).body)["configured"] is configured
