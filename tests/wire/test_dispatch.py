"""PROTOCOL 2.3, 3.1 to 3.4: frames, batches and the order of commands, seen from the wire."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import jwt
import pytest
import tornado.httpserver
import tornado.netutil
import tornado.web
import websockets
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support import Client, Site, config, serving, settings, token

from server.configuration import load

FORMATS = pytest.mark.parametrize("format", ["json", "protobuf"])


async def _unharmed(neighbour: Client) -> None:
    """A well-behaved client that was there all the time still publishes, hears itself and is answered."""
    await neighbour.ask("publish", channel="live:neighbours", data="still here")
    assert (await neighbour.push("pub", "live:neighbours"))["data"] == "still here"


async def _neighbour(site: Site) -> Client:
    neighbour = await Client.connected(site.url)
    await neighbour.ask("subscribe", channel="live:neighbours")
    return neighbour


# --- the table of PROTOCOL 3.4 ---------------------------------------------------
METHODS: dict[str, dict[str, Any]] = {
    "subscribe": {"channel": "chat:1"},
    "unsubscribe": {"channel": "chat:1"},
    "publish": {"channel": "chat:1", "data": 1},
    "presence": {"channel": "chat:1"},
    "presence_stats": {"channel": "chat:1"},
    "history": {"channel": "chat:1"},
    "rpc": {"method": "ping"},
    "refresh": {"token": "x"},
    "sub_refresh": {"channel": "chat:1", "token": "x"},
    "ping": {},
}


@FORMATS
@pytest.mark.parametrize("method", METHODS)
async def test_nothing_goes_before_connect(format: str, method: str) -> None:
    """Any command before connect ends the connection with 3501, and only this one."""
    async with serving() as site:
        neighbour = await _neighbour(site)
        early = await Client.open(site.url, format=format)
        await early.send({"id": 1, method: METHODS[method]})
        assert await early.closed() == (3501, "bad request")
        await _unharmed(neighbour)


@FORMATS
@pytest.mark.parametrize(
    "command",
    [
        pytest.param({}, id="a pong that nobody asked for"),
        pytest.param({"id": 7}, id="an id without a method"),
        pytest.param({"publish": {"channel": "live:1", "data": 1}}, id="a method without an id"),
        pytest.param({"id": 7, "ping": {}}, id="the ping of protocol version 1"),
        pytest.param({"id": 7, "connect": {}}, id="a second connect"),
        pytest.param({"id": 7, "rpc": {"method": "x"}, "history": {"channel": "chat:1"}}, id="two methods"),
        *(
            pytest.param({"id": 7, method: {**METHODS[method], "channel": ""}}, id=f"{method} of no channel")
            for method in ("subscribe", "unsubscribe", "publish", "presence", "presence_stats", "history")
        ),
        pytest.param({"id": 7, "subscribe": {"channel": "chat:1", "delta": "bsdiff"}}, id="an unknown delta"),
        pytest.param({"id": 7, "refresh": {}}, id="refresh without token"),
    ],
)
async def test_bad_requests(format: str, command: dict[str, Any]) -> None:
    """What breaks a rule of the connection ends it with 3501, and nobody else's."""
    async with serving() as site:
        neighbour = await _neighbour(site)
        client = await Client.connected(site.url, format=format)
        await client.send(command)
        assert await client.closed() == (3501, "bad request")
        await _unharmed(neighbour)


@pytest.mark.parametrize("command", ['{"id":1,"rebind":{}}', '{"id":1,"publish":null}', '{"rebind":{}}'])
async def test_unknown_methods(command: str) -> None:
    """An id with a method that we do not know, or without one that is an object, is 3501."""
    async with serving() as site:
        client = await Client.connected(site.url)
        await client.raw(command)
        assert (await client.closed())[0] == 3501


@FORMATS
async def test_send_has_no_taker(format: str) -> None:
    """PROTOCOL 4.8: ``send`` needs no id, and is 3508 with one or without."""
    async with serving() as site:
        for command in ({"send": {"data": {"n": 1}}}, {"id": 3, "send": {"data": {"n": 1}}}):
            client = await Client.connected(site.url, format=format)
            await client.send(command)
            assert await client.closed() == (3508, "not available")


async def test_unknown_fields_are_passed_over() -> None:
    """PROTOCOL 3.2: fields that only a newer client knows change nothing."""
    async with serving() as site:
        client = await Client.open(site.url)
        await client.send({"id": 1, "novel": {"x": [1]}, "connect": {"mood": "sunny", "flag": 1, "profile": "p"}})
        assert "connect" in await client.reply(1)
        await client.send({"id": 2, "subscribe": {"channel": "live:1", "phase": 2, "cursor": "c", "limit": 5}})
        assert await client.reply(2) == {"id": 2, "subscribe": {}}


@FORMATS
async def test_after_a_refused_connect_nothing_is_carried_out(format: str) -> None:
    """Connect answered with an error: the rest of its frame is dropped, a further command is 3501."""
    async with serving() as site:
        watcher = await Client.connected(site.url)
        await watcher.ask("subscribe", channel="live:1")
        client = await Client.open(site.url, format=format)
        old = token({"sub": "ann", "exp": int(time.time()) - 60})
        await client.send(
            {"id": 1, "connect": {"token": old}}, {"id": 2, "publish": {"channel": "live:1", "data": "too early"}}
        )
        assert (await client.reply(1))["error"]["code"] == 109
        await client.send({"id": 3, "publish": {"channel": "live:1", "data": "too late"}})
        assert (await client.closed())[0] == 3501
        await watcher.ask("publish", channel="live:1", data="mine")
        assert (await watcher.push("pub"))["data"] == "mine"


async def test_after_a_connect_that_is_refused_at_once_nothing_is_carried_out() -> None:
    """The same for a connect that nothing had to be awaited for: the rest of its frame is dropped."""
    personal = {"enabled": True, "personal_channel_namespace": "live"}
    spaces = settings(client={"user_id_http_header": "X-User", "subscribe_to_user_personal_channel": personal})
    async with serving(spaces) as site:
        client = await Client.open(site.url, additional_headers={"X-User": "u" * 300})
        await client.send({"id": 1, "connect": {}}, {"id": 2, "publish": {"channel": "live:1", "data": "too early"}})
        assert (await client.reply(1))["error"]["code"] == 107
        await client.send({"id": 3, "publish": {"channel": "live:1", "data": "too late"}})
        assert (await client.closed())[0] == 3501
        assert client.ids == [1]


@pytest.mark.parametrize("rejected", [False, True])
async def test_who_never_connects_is_stale(rejected: bool) -> None:
    """No connect, or none that succeeded, within ``client.stale_close_delay`` is 3502."""
    async with serving() as site:
        client = await Client.open(site.url)
        if rejected:
            await client.send({"id": 1, "connect": {"token": token({"sub": "ann", "exp": 1})}})
            assert (await client.reply(1))["error"]["code"] == 109
        else:
            await (await client.connection.ping())
        site.pass_time(9)
        assert client.close_code is None
        site.pass_time(2)
        assert await client.closed() == (3502, "stale")


# --- batches ---------------------------------------------------------------------
@FORMATS
async def test_a_batch_is_answered_in_full_and_in_order(format: str) -> None:
    """PROTOCOL 2.3: connect and what follows in the same frame is each answered, in the order of the commands."""
    async with serving() as site:
        connection = await websockets.connect(
            site.url, subprotocols=[websockets.Subprotocol(f"centrifuge-{format}")], compression=None
        )
        assert connection.subprotocol == f"centrifuge-{format}"
        client = Client(connection, format, True)
        await client.send(
            {"id": 1, "connect": {"name": "js"}},
            {"id": 2, "subscribe": {"channel": "chat:1", "flag": 1}},
            {"id": 3, "publish": {"channel": "chat:1", "data": {"n": 1}}},
            {"id": 4, "history": {"channel": "chat:1", "limit": 10}},
            {"id": 5, "unsubscribe": {"channel": "chat:1"}},
            {"id": 6, "presence_stats": {"channel": "chat:1"}},
        )
        await client.until(lambda: 6 in client.ids)
        assert client.ids == [1, 2, 3, 4, 5, 6]
        assert (await client.reply(4))["history"]["publications"][0]["offset"] == 1
        assert (await client.reply(6))["presence_stats"] == {"num_clients": 0, "num_users": 0} or format == "protobuf"


async def test_messages_are_objects_on_lines_of_their_own() -> None:
    """PROTOCOL 2.3: a JSON frame is objects with one newline between, none at the end, and no raw newline within."""
    async with serving() as site:
        async with websockets.connect(site.url, compression=None) as raw:
            await raw.send('{"id":1,"connect":{}}\n{"id":2,"subscribe":{"channel":"live:1"}}\n')
            await raw.send('{"id":3,"publish":{"channel":"live:1","data":{"a":\r[1,\t2]}}}')
            lines: list[str] = []
            while not any('"id":3' in line for line in lines):
                frame = await raw.recv(decode=True)
                lines += frame.split("\n")
            assert [json.loads(line).get("id") for line in lines] == [1, 2, None, 3]
            assert '"data":{"a":[1,\t2]}' in lines[2]


@pytest.mark.parametrize("query", ["format=protobuf", "cf_protocol=protobuf"])
async def test_the_query_may_ask_for_protobuf(query: str) -> None:
    """PROTOCOL 2.3: without a subprotocol the query decides about the format."""
    async with serving() as site:
        connection = await websockets.connect(f"{site.url}?{query}", compression=None)
        assert connection.subprotocol is None
        client = Client(connection, "protobuf", True)
        assert len((await client.ask("connect"))["client"]) == 36


async def test_an_empty_subprotocol_header_means_json() -> None:
    """PROTOCOL 2.3: a header ``Sec-WebSocket-Protocol`` without value is accepted and answered with none."""
    async with serving() as site:
        connection = await websockets.connect(
            site.url, compression=None, additional_headers={"Sec-WebSocket-Protocol": ""}
        )
        assert connection.subprotocol is None
        assert "client" in await Client(connection, "json", True).ask("connect")


async def test_an_id_may_be_as_large_as_32_bits_and_comes_back() -> None:
    """PROTOCOL 3.1: ids are the client's, up to 2**32 - 1, and may repeat."""
    async with serving() as site:
        client = await Client.connected(site.url)
        for id in (2**32 - 1, 5, 5):
            await client.send({"id": id, "publish": {"channel": "live:1", "data": 1}})
            assert await client.reply(id) == {"id": id, "publish": {}}


async def test_each_refusal_says_whether_to_try_again() -> None:
    """PROTOCOL 7.1: an error has code and message, and ``temporary`` only where trying again helps."""
    async with serving() as site:
        client = await Client.connected(site.url)
        reply = await client.call("subscribe", channel="nowhere:1")
        assert reply["error"] == {"code": 102, "message": "unknown channel"}


# --- order behind a slow connect ---------------------------------------------------
class _Keys(tornado.web.RequestHandler):
    """A key set that is served when the test says so."""

    def initialize(self, jwks: dict[str, Any], asked: asyncio.Event, release: asyncio.Event) -> None:
        self.jwks, self.asked, self.release = jwks, asked, release

    async def get(self) -> None:
        self.asked.set()
        await self.release.wait()
        self.finish(self.jwks)


class Issuer:
    """An identity provider: it signs tokens, and publishes its key when ``release`` is set."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/jwks"
        self.asked, self.release = asyncio.Event(), asyncio.Event()
        self._key = ed25519.Ed25519PrivateKey.generate()
        public = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        x = base64.urlsafe_b64encode(public).rstrip(b"=").decode()
        self.jwks = {"keys": [{"kty": "OKP", "crv": "Ed25519", "kid": "k", "use": "sig", "x": x}]}

    def token(self, **claims: Any) -> str:
        """A token of this provider."""
        return jwt.encode(claims, self._key, algorithm="EdDSA", headers={"kid": "k"})


@asynccontextmanager
async def _issuing() -> AsyncIterator[Issuer]:
    listening = tornado.netutil.bind_sockets(0, "127.0.0.1")
    issuer = Issuer(listening[0].getsockname()[1])
    options = {"jwks": issuer.jwks, "asked": issuer.asked, "release": issuer.release}
    server = tornado.httpserver.HTTPServer(tornado.web.Application([("/jwks", _Keys, options)]))
    server.add_sockets(listening)
    try:
        yield issuer
    finally:
        issuer.release.set()
        server.stop()
        await server.close_all_connections()


@FORMATS
async def test_commands_wait_for_a_connect_that_takes_its_time(format: str) -> None:
    """PROTOCOL 3.4: while connect fetches keys, the rest of its frame and further frames wait, and keep their order."""
    async with _issuing() as issuer:
        flags = config()
        flags["client"]["token"] = {"jwks_public_endpoint": issuer.url}
        async with serving(load(config=None, environ={}, flags=flags)) as site:
            neighbour = await _neighbour(site)
            client = await Client.open(site.url, format=format)
            await client.send(
                {"id": 1, "connect": {"token": issuer.token(sub="ann")}}, {"id": 2, "subscribe": {"channel": "chat:1"}}
            )
            await issuer.asked.wait()
            for id in range(3, 200):
                await client.send({"id": id, "publish": {"channel": "chat:1", "data": id}})
            await client.send({"id": 200, "presence": {"channel": "chat:1"}})
            await _unharmed(neighbour)
            assert client.ids == [], "nothing is answered before connect"
            issuer.release.set()
            members = (await client.reply(200))["presence"]["presence"]
            assert [info["user"] for info in members.values()] == ["ann"]
            assert client.ids == list(range(1, 201))
            assert [pub["data"] for pub in await client.publications("chat:1", 197)] == list(range(3, 200))


async def test_a_second_connect_behind_a_slow_one_is_refused_in_its_turn() -> None:
    """Two connects in one frame: the first is answered, the second is 3501."""
    async with _issuing() as issuer:
        flags = config()
        flags["client"]["token"] = {"jwks_public_endpoint": issuer.url}
        async with serving(load(config=None, environ={}, flags=flags)) as site:
            client = await Client.open(site.url)
            connect = {"token": issuer.token(sub="ann")}
            await client.send({"id": 1, "connect": connect}, {"id": 2, "connect": connect})
            await issuer.asked.wait()
            issuer.release.set()
            assert "connect" in await client.reply(1)
            assert (await client.closed())[0] == 3501


async def test_an_unreachable_key_set_is_an_error_to_try_again_after() -> None:
    """A key set that cannot be had is error 100, temporary: the token may well be good."""
    async with _issuing() as issuer:
        address = issuer.url
    flags = config()
    flags["client"]["token"] = {"jwks_public_endpoint": address}
    async with serving(load(config=None, environ={}, flags=flags)) as site:
        client = await Client.open(site.url)
        reply = await client.call("connect", token=issuer.token(sub="ann"))
        assert reply["error"] == {"code": 100, "message": "internal server error", "temporary": True}


async def test_who_vanishes_while_connecting_leaves_nothing_behind() -> None:
    """A client that goes while its connect waits is never admitted, present or subscribed."""
    async with _issuing() as issuer:
        flags = config()
        flags["client"]["token"] = {"jwks_public_endpoint": issuer.url}
        async with serving(load(config=None, environ={}, flags=flags)) as site:
            client = await Client.open(site.url)
            await client.send({"id": 1, "connect": {"token": issuer.token(sub="ann", channels=["chat:1"])}})
            await issuer.asked.wait()
            await client.drop()
            issuer.release.set()
            neighbour = await Client.connected(site.url, token=issuer.token(sub="bob"))
            assert await neighbour.ask("presence", channel="chat:1") == {"presence": {}}
            assert list(site.node.users) == ["bob"]
            assert not site.node.hub.feeds


async def test_who_vanishes_right_behind_its_connect_leaves_nothing_behind() -> None:
    """Connect, subscriptions from the token and the end of the socket, all at once: no subscription outlives it."""
    async with serving(settings()) as site:
        watcher = await Client.connected(site.url)
        await watcher.ask("subscribe", channel="chat:1", join_leave=True)
        await watcher.push("join")
        names = [f"chat:{number}" for number in range(1, 20)]
        for _ in range(10):
            client = await Client.open(site.url)
            client.connection.transport.write(_masked({"connect": {"token": token({"sub": "x", "channels": names})}}))
            await client.drop()
        last = await Client.connected(site.url)
        await watcher.ask("presence", channel="chat:1")
        assert set(site.node.sessions) == {watcher.hello["client"], last.hello["client"]}
        assert set(site.node.hub.feeds) == {"chat:1"}
        assert site.node.hub.feeds["chat:1"].size == 1
        assert list((await watcher.ask("presence", channel="chat:1"))["presence"]) == [watcher.hello["client"]]


def _masked(command: dict[str, Any]) -> bytes:
    """A whole text frame, masked with zeros, so that it leaves in the same breath as what follows."""
    data = json.dumps({"id": 1, **command}).encode()
    assert 126 <= len(data) < 65_536
    return b"\x81\xfe" + len(data).to_bytes(2, "big") + bytes(4) + data
