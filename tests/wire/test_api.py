"""PROTOCOL 15: what the back-end API refuses and does not let through; the rest is in tests/sdk/test_cent.py."""

import base64
import json
from typing import Any

import pytest
from conftest import ExpectedLog
from support import KEPT, OPEN, Client, Site, serving, settings, token
from tornado.httpclient import AsyncHTTPClient, HTTPResponse

SPACES = [
    {"name": "chat", **KEPT, "presence": True},
    {"name": "raw", **KEPT, "publication_data_format": "binary"},
    {"name": "live", **OPEN},
]


async def _post(site: Site, path: str, body: bytes, **headers: str) -> HTTPResponse:
    return await AsyncHTTPClient().fetch(
        f"http://127.0.0.1:{site.port}/{path}", method="POST", body=body, headers=headers, raise_error=False
    )


async def _call(site: Site, method: str, **request: Any) -> dict[str, Any]:
    response = await _post(site, f"api/{method}", json.dumps(request).encode(), **{"X-API-Key": "api-key"})
    assert response.code == 200, response
    return dict(json.loads(response.body))


async def _code(site: Site, method: str, **request: Any) -> int:
    answer = await _call(site, method, **request)
    assert "error" in answer, answer
    return int(answer["error"]["code"])


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-API-Key": "wrong"},
        {"Authorization": "apikey wrong"},
        {"X-API-Key": "", "Authorization": "apikey api-key"},
    ],
    ids=["none", "wrong", "wrong scheme key", "the first one counts"],
)
async def test_without_the_key(log: ExpectedLog, headers: dict[str, str]) -> None:
    """A call without the right key is 401 with an empty body, and the log names the setting."""
    log.expect("api.refused")
    async with serving() as site:
        response = await _post(site, "api/publish", b'{"channel":"chat:a","data":1}', **headers)
        assert (response.code, response.body) == (401, b"")
        assert "http_api.key" in str(log.seen("api.refused")[0]["why"])


async def test_three_ways_to_give_the_key() -> None:
    """X-API-Key, Authorization: apikey (in any case), and ?api_key= all open the API."""
    async with serving() as site:
        for path, headers in (
            ("api/info", {"X-API-Key": "api-key"}),
            ("api/info", {"Authorization": "ApiKey api-key"}),
            ("api/info?api_key=api-key", {}),
        ):
            assert (await _post(site, path, b"{}", **headers)).code == 200


async def test_bodies_that_are_no_calls() -> None:
    """No JSON is 400; wrong types are 107; an unknown method is 404, and so is any other path, all without a trace."""
    async with serving() as site:
        key = {"X-API-Key": "api-key"}
        for body in (b"", b"{", b"\xff\xfe", b'{"data":' + b"[" * 100_000):
            assert (await _post(site, "api/publish", body, **key)).code == 400
        assert await _code(site, "publish", channel=1, data=2) == 107
        assert (await _post(site, "api/nonsense", b"{}", **key)).code == 404
        response = await _post(site, "nowhere", b"{}")
        assert (response.code, json.loads(response.body)["error"]["code"]) == (404, 404)


async def test_what_is_not_offered_is_refused() -> None:
    """A session does not widen the target (107), a version is not passed over (108), broken base64 is 107."""
    async with serving(settings(channel={"namespaces": SPACES})) as site:
        client = await Client.connected(site.url, token=token({"sub": "42"}))
        assert await _code(site, "disconnect", user="42", session="another") == 107
        assert await _code(site, "unsubscribe", user="42", channel="chat:a", session="another") == 107
        assert await _code(site, "publish", channel="chat:a", data=1, version=3) == 108
        assert await _code(site, "publish", channel="chat:a", b64data="%%%") == 107
        assert (
            await _code(site, "subscribe", user="42", channel="chat:a", override={"nonsense": {"value": True}}) == 107
        )
        await client.ask("subscribe", channel="chat:a")
        await client.close()


@pytest.mark.parametrize("reason", ["", "5", '{"a":1}', "x" * 124, "ü"])
async def test_a_reason_that_sdks_misread(reason: str) -> None:
    """A disconnect's reason is 1 to 123 bytes of ASCII and no JSON; else the call is refused, and nobody leaves."""
    async with serving() as site:
        client = await Client.connected(site.url, token=token({"sub": "42"}))
        assert await _code(site, "disconnect", user="42", disconnect={"code": 4000, "reason": reason}) == 107
        await client.ask("publish", channel="live:a", data=1)
        assert (await _call(site, "disconnect", user="42", disconnect={"code": 4000, "reason": "enough"})) == {
            "result": {}
        }
        assert await client.closed() == (4000, "enough")


async def test_binary_history_has_no_json() -> None:
    """History of a binary namespace is answered while its payloads are JSON, and is 108 when one is not."""
    async with serving(settings(channel={"namespaces": SPACES})) as site:
        await _call(site, "publish", channel="raw:a", data={"a": 1})
        assert (await _call(site, "history", channel="raw:a", limit=5))["result"]["publications"][0]["data"] == {"a": 1}
        await _call(site, "publish", channel="raw:a", b64data=base64.b64encode(b"\x00\xff").decode())
        assert await _code(site, "history", channel="raw:a", limit=5) == 108


async def test_newlines_of_a_back_end_stay_out_of_the_wire() -> None:
    """Pretty-printed data and info lose their raw newlines, which separate messages on the wire (PROTOCOL 2.3)."""
    async with serving(settings(channel={"namespaces": SPACES})) as site:
        client = await Client.connected(site.url, token=token({"sub": "42"}))
        for method, body in (
            ("subscribe", b'{"user":"42","channel":"chat:a","info":{\n "a":1\n},"data":{\r\n"b":2}}'),
            ("publish", b'{"channel":"chat:a","data":{\n"c":3\n}}'),
            ("refresh", b'{"user":"42","info":{\n"d":4\n}}'),
        ):
            assert (await _post(site, f"api/{method}", body, **{"X-API-Key": "api-key"})).code == 200
        assert (await client.push("subscribe", "chat:a"))["data"] == {"b": 2}
        assert (await client.push("pub", "chat:a"))["data"] == {"c": 3}
        await client.push("refresh")
        ((_, info),) = (await client.ask("presence", channel="chat:a"))["presence"].items()
        assert info["chan_info"] == {"a": 1}
        assert info["conn_info"] == {"d": 4}
        await client.close()


async def test_a_payload_that_would_cut_its_subscribers() -> None:
    """A payload larger than half of client.queue_max_size is 107, kept or passing; one below it arrives."""
    chosen = settings(channel={"namespaces": SPACES}, client={"queue_max_size": 100_000})
    async with serving(chosen) as site:
        client = await Client.connected(site.url)
        for channel in ("chat:a", "live:a"):
            await client.ask("subscribe", channel=channel)
            assert await _code(site, "publish", channel=channel, data="x" * 50_001) == 107
            assert await _code(site, "publish", channel=channel, data="x" * 50_001, skip_history=True) == 107
            assert "result" in await _call(site, "publish", channel=channel, data="x" * 40_000)
            assert len((await client.push("pub", channel))["data"]) == 40_000
        await client.close()


async def test_a_presence_that_would_cut_the_asker() -> None:
    """A presence larger than half of client.queue_max_size is 106; its numbers can still be asked for."""
    chosen = settings(channel={"namespaces": SPACES}, client={"queue_max_size": 10_000})
    async with serving(chosen) as site:
        clients = [await Client.connected(site.url, token=token({"sub": "42", "info": "x" * 600})) for _ in range(8)]
        for client in clients:
            await client.ask("subscribe", channel="chat:a")
        assert await clients[0].refused("presence", channel="chat:a") == 106
        assert await clients[0].ask("presence_stats", channel="chat:a") == {"num_clients": 8, "num_users": 1}
        for client in clients:
            await client.close()
