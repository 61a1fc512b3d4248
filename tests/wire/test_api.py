"""PROTOCOL 15: what the back-end API refuses and does not let through; the rest is in tests/sdk/test_cent.py."""

import asyncio
import base64
import json
from typing import Any

import pytest
from conftest import ExpectedLog
from hopper import ask, events
from streams import uni_sse
from support import KEPT, OPEN, Client, Site, serving, settings, token
from test_rest import Following, bearer, path
from tornado.httpclient import AsyncHTTPClient, HTTPResponse

from server import ordering

SPACES = [
    {"name": "chat", **KEPT, "presence": True},
    {"name": "raw", **KEPT, "publication_data_format": "binary"},
    {"name": "live", **OPEN},
]


async def _post(site: Site, path: str, body: bytes, **headers: str) -> HTTPResponse:
    return await AsyncHTTPClient().fetch(
        f"http://127.0.0.1:{site.port}/{path}",
        method="POST",
        body=body,
        headers=headers,
        raise_error=False,
        request_timeout=60,
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


async def test_the_connections_of_a_user() -> None:
    """PROTOCOL 15.2.20: each with what it is, on every transport, and nobody else's; ``client`` leaves one of them."""
    async with serving(settings(uni_sse={"enabled": True})) as site:
        who, came = token({"sub": "ann"}), int(site.clock())
        one = await Client.connected(site.url, token=who, name="chat-app", version="1.2" * 100)
        for channel in ("chat:a", "live:b"):
            await one.ask("subscribe", channel=channel)
        two = await Client.connected(site.url, format="protobuf", token=who)
        ben = await Client.connected(site.url, token=token({"sub": "ben"}))
        async with (
            uni_sse(site.port, {"token": who, "name": "sse-app"}) as stream,
            events(site.port, f"/v1/events?channel=chat:a&token={who}") as listening,
        ):
            hello = await stream.expect("connect")
            assert listening.status == 200
            found = (await _call(site, "connections", user="ann"))["result"]
            assert found["num_connections"] == len(found["connections"]) == 4
            about = found["connections"][one.hello["client"]]
            assert came - 1 <= about.pop("connected_at") <= came + 60
            assert about == {
                "app_name": "chat-app",
                "app_version": ("1.2" * 100)[:64],
                "transport": "websocket",
                "protocol": "json",
                "user": "ann",
                "state": {"channels": {"chat:a": {}, "live:b": {}}},
                "num_channels": 2,
                "address": "127.0.0.1",
                "node": "test",
            }
            assert found["connections"][two.hello["client"]]["protocol"] == "protobuf"
            assert found["connections"][hello["client"]]["app_name"] == "sse-app"
            kinds = sorted(about["transport"] for about in found["connections"].values())
            assert kinds == ["events", "uni_sse", "websocket", "websocket"]
            narrowed = (await _call(site, "connections", user="ann", client=two.hello["client"]))["result"]
            assert list(narrowed["connections"]) == [two.hello["client"]]
            narrowed = (await _call(site, "connections", user="ann", session=hello["session"]))["result"]
            assert list(narrowed["connections"]) == [hello["client"]]
        await two.close()
        await ben.close()
        async with asyncio.timeout(10):
            while (found := (await _call(site, "connections", user="ann"))["result"])["num_connections"] > 1:
                pass
        assert list(found["connections"]) == [one.hello["client"]]
        assert (await _call(site, "connections", user="ben"))["result"] == {"connections": {}, "num_connections": 0}
        await one.close()


async def test_a_poll_is_a_connection_while_it_waits() -> None:
    """PROTOCOL 15.2.20, 17.2: who waits by REST is listed as ``rest``, with the channel, and is gone when answered."""
    async with serving() as site:
        await _call(site, "publish", channel="chat:a", data=1)
        epoch = (await _call(site, "history", channel="chat:a"))["result"]["epoch"]
        following = Following(site.node.hub)
        waiting = asyncio.create_task(
            ask(site.port, path("chat:a", f"since={epoch}:1"), headers=bearer(sub="ann") | {"Prefer": "wait=60"})
        )
        await following.until(1, "chat:a")
        (about,) = (await _call(site, "connections", user="ann"))["result"]["connections"].values()
        assert (about["transport"], about["protocol"], about["num_channels"]) == ("rest", "json", 1)
        assert about["state"] == {"channels": {"chat:a": {}}}
        await _call(site, "publish", channel="chat:a", data=2)
        assert (await waiting).status == 200
        assert (await _call(site, "connections", user="ann"))["result"]["connections"] == {}


async def test_connections_without_a_user_are_not_listed() -> None:
    """PROTOCOL 15.2.20: without user it is 107, since the anonymous ones may be a million; an expression is as well."""
    async with serving() as site:
        client = await Client.connected(site.url)
        assert await _code(site, "connections") == 107
        assert await _code(site, "connections", user="") == 107
        assert await _code(site, "connections", client=client.hello["client"]) == 107
        assert await _code(site, "connections", user="ann", expression="true") == 107
        assert (await _call(site, "connections", user="ann", expression=""))["result"]["connections"] == {}
        await client.close()


async def test_many_connections_are_told_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """PROTOCOL 15.2.20: of many connections and channels some are listed, and how many there are is true."""
    monkeypatch.setattr(ordering, "CONNECTIONS", 3)
    monkeypatch.setattr(ordering, "CHANNELS_IN_ALL", 150)
    async with serving(settings(client={"command_rate_limit": 0})) as site:
        clients = [await Client.connected(site.url, token=token({"sub": "ann"})) for _ in range(4)]
        for client in clients[:2]:
            for number in range(105):
                await client.ask("subscribe", channel=f"live:{number}")
        found = (await _call(site, "connections", user="ann"))["result"]
        assert (found["num_connections"], len(found["connections"])) == (4, 3)
        told = [found["connections"][client.hello["client"]] for client in clients[:3]]
        assert [about["num_channels"] for about in told] == [105, 105, 0]
        assert [len(about["state"]["channels"]) for about in told] == [100, 50, 0]
        for client in clients:
            await client.close()


async def test_what_is_not_offered_is_refused() -> None:
    """Where nothing is kept, a version is not passed over (108); broken base64 is 107, so is an unknown switch."""
    async with serving(settings(channel={"namespaces": SPACES})) as site:
        client = await Client.connected(site.url, token=token({"sub": "42"}))
        assert await _call(site, "publish", channel="live:a", data=1, delta=True) == {"result": {}}
        assert await _code(site, "publish", channel="live:a", data=1, version=3) == 108
        assert await _code(site, "publish", channel="chat:a", data=1, version=3, skip_history=True) == 108
        for wrong in (-1, 2**63, 1.5, "3"):
            assert await _code(site, "publish", channel="chat:a", data=1, version=wrong) == 107
        assert await _code(site, "publish", channel="chat:a", data=1, version=3, version_epoch="x" * 257) == 107
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


async def test_a_session_narrows_the_target() -> None:
    """PROTOCOL 15.2: of a user's connections only the one with this session id is meant, and none if nobody has it."""
    chosen = settings(uni_sse={"enabled": True})
    async with serving(chosen) as site:
        mine = {"token": token({"sub": "42"})}
        client = await Client.connected(site.url, **mine)
        async with uni_sse(site.port, mine) as first, uni_sse(site.port, mine) as second:
            session = (await first.expect("connect"))["session"]
            await second.expect("connect")
            for order in ("unsubscribe", "disconnect", "refresh"):
                answer = await _call(site, order, user="42", channel="chat:a", session="nobody's", expired=True)
                assert answer == {"result": {}}
            await _call(site, "subscribe", user="42", channel="chat:a", session=session, data="hello")
            assert (await first.expect("subscribe"))["data"] == "hello"
            await _call(site, "disconnect", user="42", session=session)
            await first.ended(3503)
            await _call(site, "publish", channel="chat:a", data=1)
            assert len(site.node.sessions) == 2
        await client.ask("presence_stats", channel="chat:a")
        assert not client.pushes
        await client.close()


# --- how errors are told -----------------------------------------------------------
STATUSES = [
    ("publish", {"channel": "nope:a", "data": 1}, 102, 404),
    ("rpc", {"method": "any"}, 104, 404),
    ("publish", {"channel": "chat:a"}, 107, 400),
    ("publish", {"channel": 7}, 107, 400),
    ("history", {"channel": "live:a"}, 108, 400),
    ("history", {"channel": "chat:a", "since": {"offset": 1, "epoch": "another"}}, 112, 416),
]


@pytest.mark.parametrize(("method", "request_", "code", "status"), STATUSES, ids=[str(one[2]) for one in STATUSES])
async def test_errors_as_the_status(method: str, request_: dict[str, Any], code: int, status: int) -> None:
    """In transport mode, by header or by setting, an error is the status and the body is the error itself."""
    key, body = {"X-API-Key": "api-key"}, json.dumps(request_).encode()
    by_header = {**key, "X-Centrifugo-Error-Mode": "transport"}
    for api, headers in (({}, by_header), ({"error_mode": "transport"}, key)):
        async with serving(settings(channel={"namespaces": SPACES}, http_api=api)) as site:
            await _post(site, "api/publish", b'{"channel":"chat:a","data":1}', **key)
            response = await _post(site, f"api/{method}", body, **headers)
            assert (response.code, json.loads(response.body)["code"]) == (status, code)
            assert set(json.loads(response.body)) == {"code", "message"}
            good = await _post(site, "api/info", b"{}", **headers)
            assert (good.code, set(json.loads(good.body))) == (200, {"result"})


async def test_other_methods_than_post() -> None:
    """GET and the like are 405, with the method that there is."""
    async with serving() as site:
        for path in ("api", "api/publish"):
            response = await AsyncHTTPClient().fetch(f"http://127.0.0.1:{site.port}/{path}", raise_error=False)
            assert (response.code, response.headers["Allow"]) == (405, "POST")


# --- batch -------------------------------------------------------------------------
@pytest.mark.parametrize("parallel", [False, True])
async def test_a_batch_has_each_answer_in_its_place(parallel: bool) -> None:
    """Replies stand in the order of the commands, errors among them; nothing is wrapped; always 200."""
    commands: list[Any] = [
        {"publish": {"channel": "chat:a", "data": 1}},
        {"publish": {"channel": "nope:a", "data": 1}},
        {"nonsense": {}},
        None,
        {},
        {"publish": {"channel": "chat:a", "data": 1}, "info": {}},
        {"publish": {"channel": 5}},
        {"batch": {"commands": []}},
        {"presence_stats": {"channel": "chat:a"}},
    ]
    async with serving(settings(channel={"namespaces": SPACES})) as site:
        answer = await _call(site, "batch", commands=commands, parallel=parallel)
        assert set(answer) == {"replies"}
        published, *refused, stats = answer["replies"]
        assert published["publish"]["offset"] == 1
        assert [reply["error"]["code"] for reply in refused] == [102, 104, 107, 107, 107, 107, 104]
        assert stats == {"presence_stats": {"num_clients": 0, "num_users": 0}}
        assert await _call(site, "batch") == {"replies": []}


async def test_a_batch_goes_in_turn() -> None:
    """What is not parallel is carried out one after the other: each sees what those before it have done."""
    async with serving(settings(channel={"namespaces": SPACES})) as site:
        commands: list[dict[str, Any]] = []
        for number in range(1, 31):
            commands += [{"publish": {"channel": "chat:a", "data": number}}, {"history": {"channel": "chat:a"}}]
        replies = (await _call(site, "batch", commands=commands))["replies"]
        assert [reply["publish"]["offset"] for reply in replies[::2]] == list(range(1, 31))
        assert [reply["history"]["offset"] for reply in replies[1::2]] == list(range(1, 31))


async def test_a_batch_that_asks_for_too_much() -> None:
    """Beyond 10,000 commands it is 107; beyond 16 MB of answers the rest is not carried out, and says so."""
    async with serving(settings(channel={"namespaces": SPACES})) as site:
        assert await _code(site, "batch", commands=[{"info": {}}] * 10_001) == 107
        for _ in range(20):
            await _call(site, "publish", channel="chat:a", data="x" * 400_000)
        history = {"history": {"channel": "chat:a", "limit": -1}}
        replies = (
            await _call(site, "batch", commands=[*[history] * 4, {"publish": {"channel": "chat:b", "data": 1}}])
        )["replies"]
        assert ["history" in reply for reply in replies] == [True, True, True, False, False]
        assert replies[-1]["error"]["code"] == 106
        assert (await _call(site, "history", channel="chat:b"))["result"]["offset"] == 0


# --- the old form ------------------------------------------------------------------
async def _lines(site: Site, body: bytes, path: str = "api") -> list[dict[str, Any]]:
    response = await _post(site, path, body, Authorization="apikey api-key")
    assert response.code == 200, response.body
    return [json.loads(line) for line in response.body.split(b"\n")]


@pytest.mark.parametrize("between", [b"\n", b"", b" \r\n\t"], ids=["newlines", "nothing", "white space"])
async def test_the_old_form(between: bytes) -> None:
    """Commands with method and params, one behind the other, are answered line by line; an id comes back."""
    commands = [
        b'{"method":"Publish","params":{"channel":"chat:a","data":{"n": 1.50}}}',
        b'{"id":7,"method":"HISTORY","params":{"channel":"chat:a","limit":1}}',
        b'{"id":8,"method":"presence_stats","params":{"channel":"nope:a"}}',
        b'{"method":"nonsense"}',
        b'{"method":"info"}',
        b'{"method":"batch","params":{"commands":[{"presence_stats":{"channel":"chat:a"}}]}}',
    ]
    async with serving(settings(channel={"namespaces": SPACES})) as site:
        for path in ("api", "api/"):
            answers = await _lines(site, between + between.join(commands) + between, path)
            published, history, refused, unknown, info, batch = answers
            assert published["result"]["offset"] > 0
            assert "id" not in published
            assert (history["id"], history["result"]["publications"][0]["data"]) == (7, {"n": 1.5})
            assert (refused["id"], refused["error"]["code"]) == (8, 102)
            assert unknown["error"]["code"] == 104
            assert len(info["result"]["nodes"]) == 1
            assert batch["result"]["replies"] == [{"presence_stats": {"num_clients": 0, "num_users": 0}}]


async def test_the_old_form_keeps_the_bytes() -> None:
    """Payloads go out as they came, whatever finds the end of a command."""
    async with serving(settings(channel={"namespaces": SPACES})) as site:
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="chat:a")
        seen: list[str] = []
        client.watch = seen.append
        data = b'{"z":  1.500, "a": 100000000000000000000000001, "\\u00fc": "\xc3\xbc"}'
        await _lines(site, b'{"method":"publish","params":{"channel":"chat:a","data":' + data + b"}}")
        await client.push("pub")
        assert f'"data":{data.decode()}' in seen[-1]
        await client.close()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" \n",
        b"{",
        b"[]",
        b"5",
        b'{"method":5}',
        b'{"method":"publish","params":{"channel":"chat:a","data":1}}{',
        b'{"method":"publish","params":{"channel":"chat:a","data":1}},{"method":"info"}',
        b'{"method":"publish","params":{"channel":"chat:a","data":NaN}}',
        b'{"method":"publish","params":' + b"[" * 100_000,
        b"\xff",
        b'{"method":"publish","params":{"channel":"chat:a","data":1}}' * 10_001,
    ],
    ids=lambda body: repr(body[:30]),
)
async def test_the_old_form_with_something_else_in_it(body: bytes) -> None:
    """No command, or one that cannot be read: 400, and none of the others is carried out either."""
    async with serving(settings(channel={"namespaces": SPACES})) as site:
        assert (await _post(site, "api", body, **{"X-API-Key": "api-key"})).code == 400
        assert (await _call(site, "history", channel="chat:a"))["result"]["offset"] == 0


async def test_the_old_form_wants_the_key(log: ExpectedLog) -> None:
    """Without it: 401 with an empty body."""
    log.expect("api.refused")
    async with serving() as site:
        response = await _post(site, "api", b'{"method":"info"}')
        assert (response.code, response.body) == (401, b"")


# --- much at once ------------------------------------------------------------------
async def test_history_without_end_is_bounded() -> None:
    """Whatever limit is asked for, an answer is one run of some 8 MB; asking on from its end brings the rest."""
    async with serving(settings(channel={"namespaces": SPACES})) as site:
        for _ in range(30):
            await _call(site, "publish", channel="chat:a", data="x" * 400_000)
        for reverse, limit in ((False, -1), (True, 2**31 - 1)):
            seen: list[int] = []
            since: dict[str, Any] = {}
            while len(seen) < 30:
                page = (await _call(site, "history", channel="chat:a", limit=limit, reverse=reverse, **since))["result"]
                offsets = [publication["offset"] for publication in page["publications"]]
                assert 15 < len(offsets) < 25 or len(seen) + len(offsets) == 30
                assert page["offset"] == 30
                seen += offsets
                since = {"since": {"offset": offsets[-1], "epoch": page["epoch"]}}
            assert seen == (list(range(30, 0, -1)) if reverse else list(range(1, 31)))


async def test_history_page_by_page_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the pages are in which it is read, an answer is what one page would have brought."""
    monkeypatch.setattr("server.backend.PAGE_PUBLICATIONS", 3)
    async with serving(settings(channel={"namespaces": SPACES})) as site:
        for number in range(1, 11):
            await _call(site, "publish", channel="chat:a", data=number)
        epoch = (await _call(site, "history", channel="chat:a"))["result"]["epoch"]
        for limit, since, reverse, wanted in (
            (-1, None, False, range(1, 11)),
            (7, None, False, range(1, 8)),
            (5, 4, False, range(5, 10)),
            (100, 9, False, range(10, 11)),
            (100, 10, False, ()),
            (-1, None, True, range(10, 0, -1)),
            (4, None, True, range(10, 6, -1)),
            (9, 8, True, range(7, 0, -1)),
            (0, 3, False, ()),
        ):
            more = {} if since is None else {"since": {"offset": since, "epoch": epoch}}
            result = (await _call(site, "history", channel="chat:a", limit=limit, reverse=reverse, **more))["result"]
            assert [one["data"] for one in result["publications"]] == list(wanted)
            assert (result["offset"], result["epoch"]) == (10, epoch)


async def test_a_huge_broadcast_does_not_hold_up_others() -> None:
    """While ten thousand channels are published in, another client's commands are answered in between."""
    async with serving(settings(channel={"namespaces": SPACES})) as site:
        client = await Client.connected(site.url)
        channels = [f"chat:{number}" for number in range(9_999)]
        calling = asyncio.create_task(_call(site, "broadcast", channels=[*channels, "nope:a"], data={"n": 1}))
        answered = 0
        while not calling.done():
            await client.ask("presence_stats", channel="chat:1")
            answered += 1
        responses = (await calling)["result"]["responses"]
        assert [response.get("result", {}).get("offset") for response in responses[:-1]] == [1] * 9_999
        assert responses[-1]["error"]["code"] == 102
        assert answered > 20
        await client.close()


async def test_many_refusals_in_one_call_do_not_fill_the_log(log: ExpectedLog) -> None:
    """Of the refusals of one request the log has the first twenty."""
    async with serving() as site:
        answer = await _call(site, "broadcast", channels=[f"nope:{number}" for number in range(100)], data=1)
        assert {response["error"]["code"] for response in answer["result"]["responses"]} == {102}
        assert len(log.seen("command.refused")) == 20


# --- channels ------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", ["[", "{a", "x" * 513, "{a,b}" * 7])
async def test_a_pattern_that_is_none(pattern: str) -> None:
    """Open brackets, or more than anybody means, are 107."""
    async with serving() as site:
        assert await _code(site, "channels", pattern=pattern) == 107


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
