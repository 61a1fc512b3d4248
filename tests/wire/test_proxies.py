"""PROTOCOL 16: a back end that is asked over HTTP, and what it costs whom when that goes wrong."""

import asyncio
import base64
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import tornado.httpserver
import tornado.httputil
import tornado.iostream
import tornado.netutil
import tornado.web
from centrifuge.protocol import client_pb2
from conftest import ExpectedLog
from support import KEPT, OPEN, PATIENCE_S, PATIENTLY, ROOT, Client, Closed, Site, free_port, serving, settings, token
from tornado.httpclient import AsyncHTTPClient

import run
from handlers import make_sockets
from server import protobuf
from server.app import App, AppError, Change, Welcome
from server.app import Client as AppClient
from server.channels import Identity
from server.configuration import load
from server.errors import Refused
from server.proxies import AT_ONCE, WAITING
from server.stream import Publication

Asked = dict[str, Any]
Answer = Any
"""JSON, or bytes as they are, or a number as the HTTP status."""


class BackEnd:
    """An application's back end: ``answers`` by event, each as it is or a function of what was ``asked``."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers: dict[str, Answer | Callable[[Asked], Awaitable[Answer]]] = {}
        self.asked: list[tuple[str, Asked]] = []
        self.headers: list[tornado.httputil.HTTPHeaders] = []
        self.hanging = 0
        """How many requests wait for ``goes_on``."""
        self.most_hanging = 0
        self.goes_on = asyncio.Event()
        self.news = asyncio.Condition()

    def url(self, event: str) -> str:
        """Where it is asked."""
        return f"http://127.0.0.1:{self.port}/{event}"

    def of(self, event: str) -> list[Asked]:
        """What it was asked of this kind."""
        return [asked for name, asked in self.asked if name == event]

    async def hang(self, _: Asked) -> Answer:
        """An answer that comes when ``goes_on`` is set."""
        self.hanging += 1
        self.most_hanging = max(self.hanging, self.most_hanging)
        async with self.news:
            self.news.notify_all()
        await self.goes_on.wait()
        self.hanging -= 1
        return {"result": {}}

    async def until(self, done: Callable[[], bool]) -> None:
        """Wait until something that was asked makes this true."""
        async with asyncio.timeout(15), self.news:
            await self.news.wait_for(done)


class BackEndHandler(tornado.web.RequestHandler):
    """One question."""

    def initialize(self, back_end: BackEnd) -> None:
        """Tornado hands over what the URL table gave."""
        self.back_end = back_end

    async def post(self, event: str) -> None:
        """Note it, and answer as the test will have it."""
        asked = json.loads(self.request.body)
        self.back_end.asked.append((event, asked))
        self.back_end.headers.append(self.request.headers)
        async with self.back_end.news:
            self.back_end.news.notify_all()
        answer = self.back_end.answers.get(event, {"result": {}})
        if callable(answer):
            answer = await answer(asked)
        if isinstance(answer, int):
            self.set_status(answer)
            answer = {"result": {"user": "nobody should believe this"}}
        self.set_header("Content-Type", "application/json")
        with suppress(tornado.iostream.StreamClosedError):  # whoever asked has given up
            await self.finish(answer if isinstance(answer, bytes) else json.dumps(answer))

    def on_connection_close(self) -> None:
        """Whoever asked has given up."""


@asynccontextmanager
async def back_end() -> AsyncIterator[BackEnd]:
    """A back end on a free port."""
    listening = tornado.netutil.bind_sockets(0, "127.0.0.1")
    found = BackEnd(listening[0].getsockname()[1])
    app = tornado.web.Application([(r"/(\w+)", BackEndHandler, {"back_end": found})], log_function=lambda handler: None)
    server = tornado.httpserver.HTTPServer(app)
    server.add_sockets(listening)
    try:
        yield found
    finally:
        found.goes_on.set()
        server.stop()
        await server.close_all_connections()


NAMESPACES: list[dict[str, Any]] = [
    {"name": "ask", **KEPT, "presence": True, "join_leave": True, "subscribe_proxy_enabled": True}
    | {"publish_proxy_enabled": True, "sub_refresh_proxy_enabled": True, "allow_user_limited_channels": True}
    | {f"allow_{deed}_for_{who}": False for deed in ("subscribe", "publish") for who in ("client", "anonymous")},
    {"name": "raw", **OPEN, "publication_data_format": "binary", "publish_proxy_enabled": True},
    {"name": "chat", **KEPT, "presence": True},
]


def proxied(to: BackEnd, *events: str, **options: Any) -> dict[str, Any]:
    """Sections of settings in which these events are asked about, with these options."""

    def one(event: str) -> dict[str, Any]:
        return {"endpoint": to.url(event), "timeout": "10s", **options}

    def enabled(event: str) -> dict[str, Any]:
        return {**one(event), "enabled": event in events}

    return {
        "client": {
            "proxy": {"connect": enabled("connect"), "refresh": enabled("refresh")},
            "allow_anonymous_connect_without_token": False,
            "ping_interval": "1h",
        },
        "channel": {
            "proxy": {event: one(event) for event in ("subscribe", "publish", "sub_refresh")},
            "namespaces": [
                {name: value for name, value in namespace.items() if not _off(name, events)} for namespace in NAMESPACES
            ],
        },
        "rpc": {
            "proxy": one("rpc"),
            "without_namespace": {"proxy_enabled": "rpc" in events},
            "namespaces": [{"name": "bare"}],
        },
    }


def _off(option: str, events: tuple[str, ...]) -> bool:
    return option.endswith("_proxy_enabled") and option.removesuffix("_proxy_enabled") not in events


@asynccontextmanager
async def asking(
    *events: str, more: Mapping[str, Any] | None = None, **options: Any
) -> AsyncIterator[tuple[Site, BackEnd]]:
    """A server that asks about these events, and the back end that it asks."""
    async with back_end() as found:
        sections = proxied(found, *events, **options)
        for name, section in (more or {}).items():
            sections[name] = {**sections.get(name, {}), **section}
        async with serving(settings(**sections)) as site:
            yield site, found


ANONYMOUS = {"client": {"allow_anonymous_connect_without_token": True}}


async def ended(client: Client) -> int:
    """Connect, and learn with what code that ends."""
    with pytest.raises(Closed) as caught:
        await client.ask("connect")
    return int(caught.value.code)


# --- connect ----------------------------------------------------------------------
async def test_connect_tells_all_that_is_known() -> None:
    """The request has the client, how it came, its name, version, data and the channels that it wishes."""
    async with asking("connect") as (site, app):
        app.answers["connect"] = {"result": {"user": "42"}}
        client = await Client.connected(
            site.url, name="js", version="5", data={"a": [1.50]}, subs={"chat:1": {}, "ask:2": {}}
        )
        ((_, asked),) = app.asked
        assert asked == {
            "client": client.hello["client"],
            "transport": "websocket",
            "protocol": "json",
            "encoding": "json",
            "name": "js",
            "version": "5",
            "channels": ["chat:1", "ask:2"],
            "data": {"a": [1.5]},
        }
        assert app.headers[0]["Content-Type"] == "application/json"
        await client.close()


async def test_connect_gets_all_that_is_answered() -> None:
    """User, expiry, info, data, channels and subs of the answer are the connection's, as a token's would be."""
    async with asking("connect", "rpc", include_connection_meta=True) as (site, app):
        app.answers["connect"] = {
            "result": {
                "user": "42",
                "expire_at": int(site.clock()) + 300,
                "info": {"name": "Ann"},
                "data": {"hello": 1},
                "channels": ["chat:a"],
                "subs": {
                    "chat:b": {"info": {"role": "mod"}, "data": "topic", "expire_at": int(site.clock()) + 60},
                    "chat:c": {"override": {"force_recovery": {"value": False}, "presence": {}}},
                },
                "meta": {"plan": "gold"},
            }
        }
        client = await Client.connected(site.url)
        hello = client.hello
        assert (hello["expires"], 290 < hello["ttl"] <= 300, hello["data"]) == (True, True, {"hello": 1})
        assert set(hello["subs"]) == {"chat:a", "chat:b", "chat:c"}
        assert hello["subs"]["chat:b"]["data"] == "topic"
        assert (hello["subs"]["chat:b"]["expires"], 50 < hello["subs"]["chat:b"]["ttl"] <= 60) == (True, True)
        assert hello["subs"]["chat:a"]["recoverable"] is True
        assert "recoverable" not in hello["subs"]["chat:c"]
        ((_, member),) = (await client.ask("presence", channel="chat:b"))["presence"].items()
        assert (member["user"], member["conn_info"], member["chan_info"]) == ("42", {"name": "Ann"}, {"role": "mod"})
        assert (await client.ask("presence", channel="chat:c"))["presence"] == {}
        await client.ask("rpc", method="whoami")
        assert app.of("rpc")[0]["meta"] == {"plan": "gold"}
        await client.close()


@pytest.mark.parametrize("format", ["json", "protobuf"])
async def test_base64_in_an_answer(format: str) -> None:
    """Info that is no JSON is shown as its base64; data reaches a Protobuf client as bytes; JSON in base64 is JSON."""
    async with asking("connect") as (site, app):
        app.answers["connect"] = {
            "result": {
                "user": "42",
                "info": "passed over",
                "b64info": base64.b64encode(b"\x00\x01").decode(),
                "b64data": base64.b64encode(b"\xff\xfe").decode(),
                "subs": {"chat:a": {"b64data": base64.b64encode(b'{"in": "base64"}').decode()}},
            }
        }
        client = await Client.connected(site.url, format=format)
        assert client.hello["data"] == (b"\xff\xfe" if format == "protobuf" else "//4=")
        assert client.hello["subs"]["chat:a"]["data"] == {"in": "base64"}
        ((_, member),) = (await client.ask("presence", channel="chat:a"))["presence"].items()
        assert member["conn_info"] == "AAE="
        await client.close()


async def test_connect_with_a_token_asks_nobody() -> None:
    """A token decides alone; its meta goes to the back end later, where that is wanted."""
    async with asking("connect", "rpc", include_connection_meta=True) as (site, app):
        client = await Client.connected(site.url, token=token({"sub": "7", "meta": {"from": "token"}}))
        assert app.asked == []
        await client.ask("rpc", method="x")
        assert (app.of("rpc")[0]["user"], app.of("rpc")[0]["meta"]) == ("7", {"from": "token"})
        await client.close()


async def test_connect_as_nobody() -> None:
    """The user "" of an answer is let in as the anonymous one; an answer without result says nothing, which is 3501."""
    async with asking("connect") as (site, app):
        app.answers["connect"] = {"result": {"user": ""}}
        client = await Client.connected(site.url)
        await client.close()
        app.answers["connect"] = {}
        assert await ended(await Client.open(site.url)) == 3501
    async with asking("connect", more=ANONYMOUS) as (site, app):
        app.answers["connect"] = {}
        client = await Client.connected(site.url)
        await client.close()


async def test_connect_that_has_expired() -> None:
    """An expire_at that is past, of the connection or of one subscription, is refused with 110."""
    async with asking("connect") as (site, app):
        for result in ({"expire_at": 1_000}, {"subs": {"chat:a": {"expire_at": 1_000}}}):
            app.answers["connect"] = {"result": {"user": "42", **result}}
            client = await Client.open(site.url)
            assert await client.refused("connect") == 110
            await client.close()


# --- "no" -------------------------------------------------------------------------
@pytest.mark.parametrize("event", ["connect", "subscribe", "publish", "rpc"])
async def test_an_error_is_passed_to_the_client(event: str) -> None:
    """Code, message and whether to try again are the back end's; a known code brings its own words."""
    async with asking(event, more=None if event == "connect" else ANONYMOUS) as (site, app):
        client = await Client.open(site.url)
        if event != "connect":
            await client.ask("connect")
        request = {"method": "m"} if event == "rpc" else {} if event == "connect" else {"channel": "ask:1", "data": 1}
        app.answers[event] = {"error": {"code": 1000, "message": "be kind", "temporary": True}}
        assert (await client.call(event, **request))["error"] == {"code": 1000, "message": "be kind", "temporary": True}
        if event == "connect":
            await client.close()
            client = await Client.open(site.url)
        app.answers[event] = {"error": {"code": 103}}
        assert (await client.call(event, **request))["error"] == {"code": 103, "message": "permission denied"}
        await client.close()


@pytest.mark.parametrize("event", ["connect", "subscribe", "publish", "rpc"])
async def test_a_disconnect_ends_the_connection(event: str) -> None:
    """Code and reason are the back end's."""
    async with asking(event, more=None if event == "connect" else ANONYMOUS) as (site, app):
        client = await Client.open(site.url)
        if event != "connect":
            await client.ask("connect")
        app.answers[event] = {"disconnect": {"code": 4501, "reason": "not you"}}
        request = {"method": "m"} if event == "rpc" else {} if event == "connect" else {"channel": "ask:1", "data": 1}
        await client.send(client.command(event, **request))
        assert await client.closed() == (4501, "not you")


TRANSFORMS = [
    {"status_code": 404, "to_error": {"code": 404, "message": "not found"}},
    {"status_code": 403, "to_disconnect": {"code": 4403, "reason": "forbidden"}},
]


async def test_a_status_becomes_what_the_settings_say() -> None:
    """A status of the list is the error or disconnect beside it; any other that is not 200 stays 100."""
    async with asking("rpc", more=ANONYMOUS, http={"status_to_code_transforms": TRANSFORMS}) as (site, app):
        client = await Client.connected(site.url)
        app.answers["rpc"] = 404
        assert (await client.call("rpc", method="m"))["error"] == {"code": 404, "message": "not found"}
        app.answers["rpc"] = 403
        await client.send(client.command("rpc", method="m"))
        assert await client.closed() == (4403, "forbidden")


# --- subscribe -------------------------------------------------------------------
async def test_subscribe_asks_and_obeys() -> None:
    """The request has user, channel and data; the answer decides about info, data, expiry and options."""
    async with asking("subscribe", more=ANONYMOUS) as (site, app):
        client = await Client.connected(site.url, token=token({"sub": "42"}))
        app.answers["subscribe"] = {
            "result": {
                "info": {"role": "mod"},
                "data": {"topic": "tea"},
                "expire_at": int(site.clock()) + 100,
                "override": {"force_recovery": {"value": False}},
            }
        }
        result = await client.ask("subscribe", channel="ask:1", data={"pass": "word"})
        assert (result["data"], result["expires"], 90 < result["ttl"] <= 100) == ({"topic": "tea"}, True, True)
        assert "recoverable" not in result
        asked = app.of("subscribe")[0]
        assert (asked["client"], asked["user"], asked["channel"]) == (client.hello["client"], "42", "ask:1")
        assert asked["data"] == {"pass": "word"}
        ((_, member),) = (await client.ask("presence", channel="ask:1"))["presence"].items()
        assert member["chan_info"] == {"role": "mod"}
        app.answers["subscribe"] = {"result": {"expire_at": 1_000}}
        assert await client.refused("subscribe", channel="ask:2") == 110
        await client.close()


async def test_subscribe_where_somebody_else_has_decided() -> None:
    """Tokens and user-limited names are not asked about; a private channel without token is refused unasked."""
    async with asking("subscribe", more=ANONYMOUS) as (site, app):
        app.answers["subscribe"] = {"error": {"code": 103}}
        client = await Client.connected(site.url, token=token({"sub": "42"}))
        await client.ask("subscribe", channel="ask:1", token=token({"sub": "42", "channel": "ask:1"}))
        await client.ask("subscribe", channel="ask:mine#42")
        assert await client.refused("subscribe", channel="ask:yours#7") == 103
        assert await client.refused("subscribe", channel="$ask:1") == 103
        await client.ask("subscribe", channel="chat:1")
        assert app.asked == []
        assert await client.refused("subscribe", channel="ask:2") == 103
        assert len(app.asked) == 1
        await client.close()


async def test_a_wish_of_connect_is_asked_about() -> None:
    """A channel named in connect is granted if the back end permits it, and else passed over."""
    async with asking("subscribe", more=ANONYMOUS) as (site, app):

        async def judge(asked: Asked) -> Answer:
            return {"result": {}} if asked["channel"] == "ask:good" else {"error": {"code": 103}}

        app.answers["subscribe"] = judge
        client = await Client.connected(site.url, subs={"ask:good": {}, "ask:bad": {}})
        assert set(client.hello["subs"]) == {"ask:good"}
        await client.close()


# --- publish ---------------------------------------------------------------------
async def test_publish_asks_and_obeys() -> None:
    """What the back end answers is published: its data, tags and key; the request has what the client sent."""
    async with asking("publish", "subscribe", more=ANONYMOUS) as (site, app):
        client = await Client.connected(site.url, token=token({"sub": "42"}))
        await client.ask("subscribe", channel="ask:1")
        await client.ask("publish", channel="ask:1", data={"n": 1})
        assert (await client.push("pub"))["data"] == {"n": 1}
        asked = app.of("publish")[0]
        assert (asked["user"], asked["channel"], asked["data"]) == ("42", "ask:1", {"n": 1})
        app.answers["publish"] = {"result": {"data": {"n": "two"}, "tags": {"a": "b"}, "idempotency_key": "k"}}
        for _ in range(2):
            await client.ask("publish", channel="ask:1", data={"n": 2})
        pushed = await client.push("pub")
        assert (pushed["data"], pushed["tags"], pushed["offset"]) == ({"n": "two"}, {"a": "b"}, 2)
        app.answers["publish"] = {"result": {"skip_history": True}}
        await client.ask("publish", channel="ask:1", data={"n": 3})
        passing = await client.push("pub")
        assert (passing["data"], "offset" in passing) == ({"n": 3}, False)
        assert (await client.ask("history", channel="ask:1", limit=10))["offset"] == 2
        app.answers["publish"] = {"error": {"code": 422, "message": "no"}}
        refused = await client.call("rpc", method="publish", data={"channel": "ask:1", "data": 1})
        assert refused["error"]["code"] == 422
        await client.close()


async def test_publish_by_version() -> None:
    """PROTOCOL 11.8.3: what the back end calls outdated is not published, and the client is told the top."""
    async with asking("publish", more=ANONYMOUS) as (site, app):
        client = await Client.connected(site.url)
        for version, epoch, offset in ((2, "a", 1), (2, "a", 1), (1, "", 1), (3, "", 2), (1, "b", 3)):
            app.answers["publish"] = {"result": {"version": version, "version_epoch": epoch}}
            answer = await client.ask("rpc", method="publish", data={"channel": "ask:1", "data": version})
            assert answer["data"]["offset"] == offset
        page = await client.ask("history", channel="ask:1", limit=-1)
        assert [each["data"] for each in page["publications"]] == [2, 3, 1]
        await client.close()


async def test_publish_keeps_the_bytes() -> None:
    """What the back end answers goes out as it wrote it, number precision and order of keys included."""
    async with asking("publish", more=ANONYMOUS) as (site, app):
        client = await Client.connected(site.url)
        app.answers["publish"] = b'{"result": {"data": {"z": 1.50,\n "a": 10000000000000000000001}}}'
        await client.ask("publish", channel="ask:1", data=1)
        seen: list[str] = []
        client.watch = seen.append
        await client.ask("history", channel="ask:1", limit=1)
        assert '"data":{"z": 1.50, "a": 10000000000000000000001}' in seen[0]
        await client.close()


@pytest.mark.parametrize("wish", [False, True])
async def test_publish_may_wish_for_a_patch(wish: bool) -> None:
    """PROTOCOL 12.3.1, 16.4.2: ``delta`` of the answer goes with the publication."""
    async with asking("publish", more=ANONYMOUS) as (site, app):
        wishes: list[bool] = []
        history = site.node.history
        commit = history.on_commit

        def listen(channel: str, epoch: str, publications: Sequence[Publication]) -> None:
            wishes.extend(publication.delta for publication in publications)
            commit(channel, epoch, publications)

        history.on_commit = listen
        client = await Client.connected(site.url)
        app.answers["publish"] = {"result": {"delta": wish}}
        await client.ask("publish", channel="ask:1", data=1)
        assert wishes == [wish]
        await client.close()


@pytest.mark.parametrize("encoded", [False, True], ids=["as JSON", "as base64"])
async def test_binary_payloads(encoded: bool) -> None:
    """With binary_encoding bytes go there and come back in base64; without it what is no JSON is refused with 107."""
    async with asking("publish", more=ANONYMOUS, binary_encoding=encoded) as (site, app):
        client = await Client.connected(site.url, format="protobuf")
        await client.ask("subscribe", channel="raw:1")
        command = client.command("publish", channel="raw:1")
        message = client_pb2.Command(id=command["id"])
        message.publish.channel, message.publish.data = "raw:1", b"\x00\xff"
        app.answers["publish"] = {"result": {"b64data": base64.b64encode(b"\xfe\n").decode()}}
        await client.raw(protobuf.prefixed(message.SerializeToString()))
        reply = await client.reply(command["id"])
        if encoded:
            assert "publish" in reply
            assert (app.asked[0][1]["encoding"], app.asked[0][1]["b64data"]) == ("binary", "AP8=")
            assert (await client.push("pub"))["data"] == b"\xfe\n"
        else:
            assert reply["error"]["code"] == 107
            assert app.asked == []
        await client.close()


async def test_a_back_end_that_publishes_nonsense(log: ExpectedLog) -> None:
    """An answer that the namespace would not take is error 100, and nothing is published."""
    log.expect("proxy.failed", "hook.misanswered")
    async with asking("publish", more=ANONYMOUS, timeout="10s") as (site, app):
        client = await Client.connected(site.url)
        for result in (
            {"data": "x" * 600_000},
            {"b64data": "%"},
            {"b64data": base64.b64encode(b"\xff").decode()},
            {"version": 3, "skip_history": True},
            {"version": -3},
            {"version": 3, "version_epoch": "x" * 257},
            {"idempotency_key": "x" * 257},
            {"tags": {"a": 1}},
        ):
            app.answers["publish"] = {"result": result}
            assert await client.refused("publish", channel="ask:1", data=1) == 100, result
        assert (await client.ask("history", channel="ask:1"))["offset"] == 0
        await client.close()


# --- rpc -------------------------------------------------------------------------
async def test_rpc_goes_there_and_back() -> None:
    """Method and data go as they came, the answer's data comes back; no data is no data."""
    async with asking("rpc", more=ANONYMOUS) as (site, app):
        client = await Client.connected(site.url, token=token({"sub": "42"}))
        app.answers["rpc"] = {"result": {"data": {"sum": 3}}}
        assert await client.ask("rpc", method="sum", data=[1, 2]) == {"data": {"sum": 3}}
        app.answers["rpc"] = {"result": {}}
        assert await client.ask("rpc", method="") == {}
        asked, second = app.of("rpc")
        assert (asked["user"], asked["method"], asked["data"]) == ("42", "sum", [1, 2])
        assert "data" not in second
        await client.close()


async def test_rpc_namespaces() -> None:
    """A procedure of an unknown namespace is 104, one of a namespace without proxy 108; the built-in one is ours."""
    async with asking("rpc", more=ANONYMOUS) as (site, app):
        client = await Client.connected(site.url)
        assert await client.refused("rpc", method="nowhere:x") == 104
        assert await client.refused("rpc", method="bare:x") == 108
        await client.ask("rpc", method="publish", data={"channel": "chat:1", "data": 1})
        assert app.asked == []
        await client.close()


async def test_named_proxies() -> None:
    """A namespace may choose a back end of the list, of channels as of procedures."""
    async with back_end() as found, back_end() as other:
        sections = proxied(found, "rpc", "subscribe")
        sections["proxies"] = [{"name": "second", "endpoint": other.url("second"), "timeout": "10s"}]
        sections["rpc"]["namespaces"] = [{"name": "far", "proxy_enabled": True, "proxy_name": "second"}]
        sections["channel"]["namespaces"][0]["subscribe_proxy_name"] = "second"
        sections["client"] = ANONYMOUS["client"]
        async with serving(settings(**sections)) as site:
            client = await Client.connected(site.url)
            await client.ask("rpc", method="near")
            await client.ask("rpc", method="far:away")
            await client.ask("subscribe", channel="ask:1")
            assert [name for name, _ in found.asked] == ["rpc"]
            assert [one.get("method", one.get("channel")) for _, one in other.asked] == ["far:away", "ask:1"]
            await client.close()


# --- headers ---------------------------------------------------------------------
async def test_headers_that_are_listed_go_there() -> None:
    """Real headers go before emulated ones, these before static ones; what is not listed stays here."""
    async with asking(
        "connect",
        "rpc",
        http_headers=["Cookie", "X-Both"],
        emulated_headers=["Authorization", "X-Both", "X-Static"],
        http={"static_headers": {"X-Static": "ours", "X-Only": "static"}},
    ) as (site, app):
        app.answers["connect"] = {"result": {"user": "42"}}
        client = await Client.open(
            site.url, additional_headers={"Cookie": "a=b", "X-Both": "real", "X-Secret": "stays here"}
        )
        await client.ask(
            "connect",
            headers={"authorization": "Bearer x", "X-Both": "emulated", "X-Static": "theirs", "Cookie": "emulated"},
        )
        await client.ask("rpc", method="m")
        for headers in app.headers:
            assert headers["Cookie"] == "a=b"
            assert headers["Authorization"] == "Bearer x"
            assert headers["X-Both"] == "real"
            assert headers["X-Static"] == "theirs"
            assert headers["X-Only"] == "static"
            assert "X-Secret" not in headers
        await client.close()


async def test_an_emulated_header_cannot_become_two() -> None:
    """One with a line break or other characters that no header can have is passed over, with nothing behind it."""
    async with asking("connect", emulated_headers=["X-One", "X-Two", "X-Three"]) as (site, app):
        app.answers["connect"] = {"result": {"user": "42"}}
        bad = {"X-One": "a\r\nX-Admin: yes", "X-Two": "☃", "X-Three": "good"}
        client = await Client.connected(site.url, headers=bad)
        (headers,) = app.headers
        assert headers["X-Three"] == "good"
        assert not {"X-One", "X-Two", "X-Admin"} & set(headers)
        await client.close()


# --- expiry ----------------------------------------------------------------------
async def test_refresh_is_the_servers() -> None:
    """The client is told of no expiry; when it comes the back end is asked, and its answer holds."""
    async with asking("connect", "refresh", "rpc") as (site, app):
        app.answers["connect"] = {"result": {"user": "42", "expire_at": int(site.clock()) + 5, "channels": ["chat:a"]}}
        client = await Client.connected(site.url)
        assert not {"expires", "ttl"} & set(client.hello)
        app.answers["refresh"] = {"result": {"expire_at": int(site.clock()) + 20, "info": {"name": "new"}}}
        site.pass_time(7)
        await app.until(lambda: len(app.of("refresh")) == 1)
        assert app.of("refresh")[0]["user"] == "42"
        await site.node.tasks.idle()
        ((_, member),) = (await client.ask("presence", channel="chat:a"))["presence"].items()
        assert member["conn_info"] == {"name": "new"}
        app.answers["refresh"] = {"result": {"expired": True}}
        site.pass_time(15)
        assert await client.closed() == (3005, "connection expired")
        assert len(app.of("refresh")) == 2


async def test_refresh_by_the_client_is_not_wanted() -> None:
    """Who refreshes although the server does is disconnected with 3501."""
    async with asking("connect", "refresh", more=None) as (site, app):
        app.answers["connect"] = {"result": {"user": "42"}}
        client = await Client.connected(site.url)
        await client.send(client.command("refresh", token=token({"sub": "42"})))
        assert (await client.closed())[0] == 3501


async def test_a_refresh_that_cannot_be_is_tried_again_a_minute_later(log: ExpectedLog) -> None:
    """While the back end is away nobody is disconnected; once it is back, it decides."""
    log.expect("proxy.failed")
    async with asking("connect", "refresh") as (site, app):
        app.answers["connect"] = {"result": {"user": "42", "expire_at": int(site.clock()) + 5}}
        client = await Client.connected(site.url)
        app.answers["refresh"] = 503
        site.pass_time(40)
        await app.until(lambda: len(app.of("refresh")) == 1)
        await site.node.tasks.idle()
        app.answers["refresh"] = {"result": {"expire_at": 0}}
        site.pass_time(40)
        await app.until(lambda: len(app.of("refresh")) == 2)
        await site.node.tasks.idle()
        site.pass_time(120)
        assert len(app.of("refresh")) == 2
        assert client.close_code is None
        await client.close()


@pytest.mark.parametrize("answer", [{"result": {"expire_at": 1_000}}, {"error": {"code": 103}}, {}])
async def test_a_refresh_that_means_the_end(answer: Answer) -> None:
    """An expiry that is past, an error, and no result: each means expired."""
    async with asking("connect", "refresh") as (site, app):
        app.answers["connect"] = {"result": {"user": "42", "expire_at": int(site.clock()) + 5}}
        client = await Client.connected(site.url)
        app.answers["refresh"] = answer
        site.pass_time(7)
        assert await client.closed() == (3005, "connection expired")


async def test_sub_refresh_is_the_servers() -> None:
    """A subscription with an expiry is asked about when it comes; it gets other info, goes on, or ends with 2501."""
    async with asking("subscribe", "sub_refresh", more=ANONYMOUS) as (site, app):
        client = await Client.connected(site.url, token=token({"sub": "42"}))
        app.answers["subscribe"] = {"result": {"expire_at": int(site.clock()) + 5}}
        result = await client.ask("subscribe", channel="ask:1")
        assert not {"expires", "ttl"} & set(result)
        app.answers["sub_refresh"] = {"result": {"expire_at": int(site.clock()) + 20, "info": {"role": "new"}}}
        site.pass_time(7)
        await app.until(lambda: len(app.of("sub_refresh")) == 1)
        asked = app.of("sub_refresh")[0]
        assert (asked["user"], asked["channel"]) == ("42", "ask:1")
        await site.node.tasks.idle()
        ((_, member),) = (await client.ask("presence", channel="ask:1"))["presence"].items()
        assert member["chan_info"] == {"role": "new"}
        app.answers["sub_refresh"] = {"result": {"expired": True}}
        site.pass_time(15)
        assert (await client.push("unsubscribe", "ask:1"))["code"] == 2501
        await client.ask("subscribe", channel="chat:1")
        await client.close()


async def test_sub_refresh_by_the_client_is_not_wanted() -> None:
    """Who refreshes such a subscription itself is disconnected with 3501."""
    async with asking("subscribe", "sub_refresh", more=ANONYMOUS) as (site, _):
        client = await Client.connected(site.url, token=token({"sub": "42"}))
        await client.ask("subscribe", channel="ask:1")
        fresh = token({"sub": "42", "channel": "ask:1"})
        await client.send(client.command("sub_refresh", channel="ask:1", token=fresh))
        assert (await client.closed())[0] == 3501


async def test_who_leaves_while_the_back_end_thinks() -> None:
    """An answer about a client, or a subscription, that is gone meanwhile changes nothing."""
    async with asking("connect", "refresh", "subscribe", "sub_refresh") as (site, app):
        app.answers["connect"] = {"result": {"user": "42", "expire_at": int(site.clock()) + 5}}
        app.answers["subscribe"] = {"result": {"expire_at": int(site.clock()) + 5}}
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="ask:1")
        app.answers["refresh"] = app.answers["sub_refresh"] = app.hang
        site.pass_time(7)
        await app.until(lambda: app.hanging == 1)
        await client.close()
        app.goes_on.set()
        await site.node.tasks.idle()
        assert site.node.sessions == {}


# --- a back end that does wrong ------------------------------------------------------
@pytest.mark.parametrize(
    "answer",
    [
        500,
        302,
        b"",
        b"no JSON",
        b"[]",
        b'{"result": {"data": "\xff"}}',
        b'{"result": {"data": ' + b"[" * 200 + b"]" * 200 + b"}}",
        b"[" * 100_000,
        {"result": {"data": "x" * 600_000}},
        {"result": 5},
        {"error": {"code": "text"}},
        {"error": {"code": 7, "message": "an SDK's own"}},
        {"disconnect": {"code": 200, "reason": "no such code"}},
        {"disconnect": {"code": 4000, "reason": '{"a":1}'}},
        {},
    ],
    ids=lambda answer: str(answer)[:40],
)
async def test_what_is_no_answer_is_error_100(log: ExpectedLog, answer: Answer) -> None:
    """Another status, no JSON, too large, wrong types: the command fails, the connection goes on, the log says why."""
    log.expect("proxy.failed")
    async with asking("rpc", more=ANONYMOUS) as (site, app):
        client = await Client.connected(site.url)
        app.answers["rpc"] = answer
        reply = await client.call("rpc", method="m")
        assert reply["error"] == {"code": 100, "message": "internal server error", "temporary": True}
        (line,) = log.seen("proxy.failed")
        assert (line["proxy"], line["failures"]) == ("rpc.proxy", 1)
        app.answers["rpc"] = {"result": {"data": "well again"}}
        assert await client.ask("rpc", method="m") == {"data": "well again"}
        await client.close()


async def test_a_back_end_that_never_answers(log: ExpectedLog) -> None:
    """After the timeout it is error 100; other commands of others go on meanwhile."""
    log.expect("proxy.failed")
    async with asking("rpc", more=ANONYMOUS, timeout="2s") as (site, app):
        client, other = await Client.connected(site.url), await Client.connected(site.url)
        app.answers["rpc"] = app.hang
        command = client.command("rpc", method="m")
        await client.send(command)
        await app.until(lambda: app.hanging == 1)
        await other.ask("publish", channel="chat:1", data=1)
        assert (await client.reply(command["id"]))["error"]["code"] == 100
        await client.close()
        await other.close()


async def test_a_back_end_that_is_not_there(log: ExpectedLog) -> None:
    """Connection refused is error 100 at once; the log has one line for many failures, and no secret of the URL."""
    log.expect("proxy.failed")
    endpoint = f"http://user:password@127.0.0.1:{free_port()}/rpc?key=secret"
    sections = {"rpc": {"proxy": {"endpoint": endpoint}, "without_namespace": {"proxy_enabled": True}}}
    async with serving(settings(**sections)) as site:
        client = await Client.connected(site.url)
        for _ in range(5):
            assert await client.refused("rpc", method="m") == 100
        (line,) = log.seen("proxy.failed")
        assert "password" not in str(line)
        assert "secret" not in str(line)
        await client.close()


@pytest.mark.parametrize(
    "words",
    [
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n"),
        (b"nothing of HTTP\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n", b"x"),
    ],
    ids=["headers", "a slow body", "an endless body", "no HTTP", "a length beyond all"],
)
async def test_a_back_end_that_never_ends(log: ExpectedLog, words: tuple[bytes, bytes]) -> None:
    """Who begins to answer and does not come to an end, or to the point, is given up at the limit of time or size."""
    log.expect("proxy.failed")
    first, rest = words
    reached, gone = asyncio.Event(), asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.set()
        writer.write(first)
        try:
            while not reader.at_eof():
                writer.write(rest)
                await writer.drain()
                with suppress(TimeoutError):
                    async with asyncio.timeout(0.02):
                        await reader.read(65536)
        except OSError:
            pass  # we were cut off
        finally:
            gone.set()
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/rpc"
    sections = {
        "rpc": {"proxy": {"endpoint": endpoint, "timeout": "500ms"}, "without_namespace": {"proxy_enabled": True}}
    }
    async with server, serving(settings(**sections)) as site:
        client = await Client.connected(site.url)
        assert await client.refused("rpc", method="m") == 100
        while not reached.is_set():  # on a machine that stood still the time may be over before it has connected
            assert await client.refused("rpc", method="m") == 100
        await asyncio.wait_for(gone.wait(), PATIENCE_S)
        await client.close()


async def test_one_that_hangs_holds_up_no_other(log: ExpectedLog) -> None:
    """So many requests at once and no more go to one endpoint; the others wait; another endpoint is not concerned."""
    async with asking("rpc", "subscribe", more=ANONYMOUS) as (site, app):
        clients = [await Client.connected(site.url) for _ in range(AT_ONCE + 6)]
        app.answers["rpc"] = app.hang
        commands = [client.command("rpc", method="m") for client in clients]
        for client, command in zip(clients, commands, strict=True):
            await client.send(command)
        await app.until(lambda: app.hanging == AT_ONCE)
        late = await Client.connected(site.url)
        await late.ask("subscribe", channel="ask:1")
        assert app.most_hanging == AT_ONCE
        app.goes_on.set()
        for client, command in zip(clients, commands, strict=True):
            assert (await client.reply(command["id"]))["rpc"] == {}
        assert len(app.of("rpc")) == len(clients)
        assert len(clients) < WAITING
        for client in [late, *clients]:
            await client.close()
    assert not log.seen("proxy.failed")


async def test_commands_behind_a_question_wait_for_it() -> None:
    """The commands of one client are answered in their order, however long the back end takes for the first."""
    async with asking("connect") as (site, app):
        app.answers["connect"] = app.hang
        client = await Client.open(site.url)
        connect, subscribe = client.command("connect"), client.command("subscribe", channel="chat:1")
        await client.send(connect, subscribe)
        await app.until(lambda: app.hanging == 1)
        assert client.ids == []
        app.goes_on.set()
        await client.reply(subscribe["id"])
        assert client.ids == [connect["id"], subscribe["id"]]
        await client.close()


# --- with the user's own module --------------------------------------------------------
async def test_a_hook_and_a_proxy_for_the_same_event() -> None:
    """It is a fault at start, which names each function and each setting; hooks for other events are welcome."""
    app = App()

    @app.connecting
    async def greet(client: AppClient) -> Welcome:
        return Welcome()

    @app.publishing
    async def moderate(client: AppClient, channel: str) -> Change | None:
        return None

    @app.rpc
    async def roll(client: AppClient) -> int:
        return 4

    @app.rpc("bare:roll")
    async def bare(client: AppClient) -> int:
        return 4

    async with back_end() as found:
        node = run.make_node(settings(**proxied(found, "connect", "publish", "rpc")))
        app.attach(node)
        with pytest.raises(AppError) as caught:
            make_sockets(node, run.make_gate(node.settings))
        said = str(caught.value).splitlines()
        assert len(said) == 3
        for function, setting in (
            ("greet", "client.proxy.connect"),
            ("moderate (publishing)", "channel.proxy.publish"),
            ("roll", "rpc.proxy"),
        ):
            assert any(function in line and setting in line for line in said)
        assert not any("bare" in line for line in said)
        other = run.make_node(settings(**proxied(found, "subscribe", "refresh")))
        app.attach(other)
        make_sockets(other, run.make_gate(other.settings))


async def test_nobody_decides_where_nobody_is_attached() -> None:
    """A node that was never given its proxies goes by the namespace's own options, and opens nothing."""
    async with back_end() as found:
        node = run.make_node(settings(**proxied(found, "subscribe", "publish")))
        namespace = node.channels.known("ask:1")
        with pytest.raises(Refused):
            node.channels.may_subscribe(Identity("42"), "ask:1", namespace)
        assert not node.channels.may("publish", Identity("42"), namespace, subscribed=True)


def start(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the server with these arguments, which must not let it begin."""
    command = [sys.executable, str(ROOT / "run.py"), *arguments, "--port", str(free_port())]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)


def test_the_fault_at_start_is_told(tmp_path: Path) -> None:
    """Started with a hook and a proxy for connecting, the server says both and does not listen."""
    (tmp_path / "greeter.py").write_text(
        "from server.app import App, Client, Welcome\n\napp = App()\n\n\n"
        "@app.connecting\nasync def greet(client: Client) -> Welcome:\n    return Welcome()\n"
    )
    connect = {"enabled": True, "endpoint": "http://127.0.0.1:9/connect"}
    (tmp_path / "config.json").write_text(json.dumps({"client": {"proxy": {"connect": connect}}}))
    ended = start(tmp_path, "--app", "greeter.py", "--config", "config.json")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "greeter.py:6: greet (connecting)" in ended.stderr
    assert "client.proxy.connect (http://127.0.0.1:9/connect)" in ended.stderr


async def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    """The settings and the back end of docs/proxies.md do together what the page says."""
    page = (ROOT / "docs" / "proxies.md").read_text()
    config_, program = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)[0] for kind in ("json", "python"))
    port = str(free_port())
    for name, text in (("config.json", config_), ("backend.py", program)):
        patient = text.replace('"http_headers"', f'"timeout": "{PATIENTLY}", "http_headers"').replace("3s", PATIENTLY)
        (tmp_path / name).write_text(patient.replace("3000", port))
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(tmp_path / "backend.py"), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        assert b"asked on" in await asyncio.wait_for(process.stdout.readline(), 30)
        async with serving(load(config=tmp_path / "config.json", environ={})) as site:
            stranger = await Client.open(site.url)
            assert await ended(stranger) == 3501
            ann = await Client.open(site.url, additional_headers={"Cookie": "session=k1"})
            await ann.ask("connect")
            assert (await ann.ask("subscribe", channel="room:ann"))["data"] == {"topic": "tea"}
            assert await ann.refused("subscribe", channel="room:bob") == 403
            await ann.ask("publish", channel="room:ann", data={"text": "  hi "})
            pushed = await ann.push("pub")
            assert (pushed["data"], pushed["info"]["conn_info"]) == ({"text": "hi"}, {"name": "Ann"})
            assert await ann.ask("rpc", method="whoami") == {"data": {"you": "ann", "called": "whoami"}}
            await ann.close()
    finally:
        process.terminate()
        await process.wait()


async def test_requests_of_their_own_are_asked_about_as_well() -> None:
    """What is published by ``/v1`` goes through the same proxies as what a connection publishes (PROTOCOL 17.1)."""
    async with asking("connect", "publish", http_headers=["Cookie"]) as (site, app):
        app.answers["connect"] = {"result": {"user": "42"}}
        app.answers["publish"] = {"result": {"data": "changed"}}

        async def post(channel: str) -> int:
            url = f"http://127.0.0.1:{site.port}/v1/channels/{channel}/publications"
            headers = {"Content-Type": "application/json", "Cookie": "a=b"}
            body = '{"data": 1}'
            return (
                await AsyncHTTPClient().fetch(url, method="POST", body=body, headers=headers, raise_error=False)
            ).code

        assert await post("ask:1") == 201
        assert (app.of("publish")[0]["user"], app.of("publish")[0]["channel"]) == ("42", "ask:1")
        assert [headers["Cookie"] for headers in app.headers] == ["a=b", "a=b"]
        app.answers["publish"] = {"error": {"code": 103}}
        assert await post("ask:1") == 403
        app.answers["connect"] = {}
        assert await post("chat:1") == 401
        app.answers["connect"] = {"result": {"user": "42"}}
        client = await Client.connected(site.url)
        history = await client.ask("history", channel="ask:1", limit=10)
        assert [one["data"] for one in history["publications"]] == ["changed"]
        await client.close()


async def test_a_server_side_subscription_that_ends() -> None:
    """What the back end says of one that it made itself ends the connection with 3006, as an expiry does."""
    async with asking("connect", "sub_refresh") as (site, app):
        soon = int(site.clock()) + 5
        app.answers["connect"] = {"result": {"user": "42", "subs": {"ask:1": {"expire_at": soon}}}}
        client = await Client.connected(site.url)
        assert "expires" not in client.hello["subs"]["ask:1"]
        app.answers["sub_refresh"] = {"result": {"expired": True}}
        site.pass_time(7)
        assert (await client.closed())[0] == 3006
