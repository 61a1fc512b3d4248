"""PROTOCOL 3.2, 4.4, 4.6 to 4.8, 9.4, 10.4: publish, history and rpc, seen from the wire."""

from typing import Any

import pytest
from support import KEPT, OPEN, Client, serving, settings, token

from server import protobuf
from server.settings import Settings

FORMATS = pytest.mark.parametrize("format", ["json", "protobuf"])
HISTORY = {"history_size": -1, "history_ttl": "1h"}


def _spaces(*namespaces: dict[str, Any], **sections: Any) -> Settings:
    return settings(channel={"namespaces": [*namespaces, {"name": "live", **OPEN}]}, **sections)


def _publishing(id: int, channel: str, data: bytes) -> bytes:
    """A Protobuf frame with one publish command."""
    return protobuf.prefixed(protobuf.Command(id=id, publish={"channel": channel, "data": data}).SerializeToString())


# --- publish -------------------------------------------------------------------------
@FORMATS
@pytest.mark.parametrize("channel", ["chat:1", "live:1"])
async def test_one_sees_its_own_publication_before_its_reply(format: str, channel: str) -> None:
    """PROTOCOL 3.4, 4.4: the publisher hears itself first, with its info; the reply is empty."""
    async with serving() as site:
        claims = {"sub": "ann", "info": {"name": "Ann"}}
        ann = await Client.connected(site.url, format=format, token=token(claims))
        bob = await Client.connected(site.url)
        for client in (ann, bob):
            await client.ask("subscribe", channel=channel)
        assert await ann.ask("publish", channel=channel, data={"text": "hi"}) == {}
        heard = [push["pub"] for push in ann.pushes if "pub" in push]
        assert len(heard) == 1
        info = {"user": "ann", "client": ann.hello["client"], "conn_info": {"name": "Ann"}}
        assert heard[0]["data"] == {"text": "hi"}
        assert heard[0]["info"] == info
        assert heard[0].get("offset", 0) == (channel == "chat:1")
        other = await bob.push("pub")
        assert {name: other[name] for name in heard[0]} == heard[0]
        assert other.keys() - heard[0].keys() <= {"time", "epoch"}, "these two the SDK's messages do not have yet"
        assert ("time" in other, len(other.get("epoch", ""))) == (channel == "chat:1", 8 * (channel == "chat:1"))


async def test_publishing_without_subscribing() -> None:
    """A publisher need not be subscribed; its channel info comes with it only if it is."""
    async with serving() as site:
        bob = await Client.connected(site.url)
        await bob.ask("subscribe", channel="chat:1")
        ann = await Client.connected(site.url, token=token({"sub": "ann"}))
        await ann.ask("publish", channel="chat:1", data=1)
        assert (await bob.push("pub"))["info"] == {"user": "ann", "client": ann.hello["client"]}
        subscription = {"sub": "ann", "channel": "chat:1", "info": "mod"}
        await ann.ask("subscribe", channel="chat:1", token=token(subscription))
        await ann.ask("publish", channel="chat:1", data=2)
        assert (await bob.push("pub"))["info"]["chan_info"] == "mod"


@pytest.mark.parametrize(
    "payload",
    ['{"b":1,  "a":\t2.50}', "123456789012345678901234567890.10", '"\\u00e4ä\\n<&>"', "[ ]", "null"],
)
async def test_payloads_keep_their_bytes(payload: str) -> None:
    """PROTOCOL 3.2: what was published comes back byte for byte, live, recovered and from history."""
    async with serving() as site:
        live = await Client.connected(site.url, format="protobuf")
        await live.ask("subscribe", channel="chat:1")
        client = await Client.open(site.url)
        frames: list[str] = []
        client.watch = frames.append
        await client.ask("connect")
        await client.ask("subscribe", channel="chat:1")
        await client.raw('{"id":90,"publish":{"channel":"chat:1","data":' + payload + "}}")
        assert await client.reply(90) == {"id": 90, "publish": {}}
        await client.ask("unsubscribe", channel="chat:1")
        await client.ask("subscribe", channel="chat:1", recover=True)
        await client.ask("history", channel="chat:1", limit=1)
        assert "".join(frames).count('"data":' + payload + ",") == 3
        await live.push("pub")


async def test_raw_newlines_are_taken_out() -> None:
    """PROTOCOL 2.3: a pretty-printed payload arrives on one line, whoever published it."""
    async with serving() as site:
        client = await Client.connected(site.url)
        for name in ("chat:1", "live:1"):
            await client.ask("subscribe", channel=name)
        pretty = await Client.connected(site.url, format="protobuf")
        for id, name in ((7, "chat:1"), (8, "live:1")):
            await pretty.raw(_publishing(id, name, b'{\r\n  "a": [\n1,\n2]\n}\n'))
            assert "publish" in await pretty.reply(id)
            assert (await client.push("pub", name))["data"] == {"a": [1, 2]}


PERMISSIONS = _spaces(
    {"name": "shut"},
    {"name": "cli", "allow_subscribe_for_client": True, "allow_publish_for_client": True},
    {"name": "sub", "allow_subscribe_for_client": True, "allow_publish_for_subscriber": True},
    {"name": "any", "allow_publish_for_client": True, "allow_publish_for_anonymous": True},
    {"name": "non", "allow_publish_for_anonymous": True},
    {"name": "obj", **OPEN, "publication_data_format": "json_object"},
)


@FORMATS
@pytest.mark.parametrize(
    ("channel", "user", "subscribed", "code"),
    [
        ("nowhere:1", "ann", False, 102),
        ("cli:ä", "ann", False, 107),
        ("cli:" + "x" * 252, "ann", False, 107),
        ("shut:1", "ann", False, 103),
        ("cli:1", "ann", False, 0),
        ("cli:1", "", False, 103),
        ("sub:1", "ann", False, 103),
        ("sub:1", "ann", True, 0),
        ("any:1", "", False, 0),
        ("non:1", "", False, 103),
        ("non:1", "ann", False, 103),
        ("obj:1", "ann", False, 107),
    ],
)
async def test_who_may_publish(format: str, channel: str, user: str, subscribed: bool, code: int) -> None:
    """PROTOCOL 10.4: what a client is told that publishes the number 1; 0 is a success."""
    async with serving(PERMISSIONS) as site:
        client = await Client.connected(site.url, format=format, token=token({"sub": user}))
        if subscribed:
            await client.ask("subscribe", channel=channel)
        reply = await client.call("publish", channel=channel, data=1)
        assert reply.get("error", {"code": 0})["code"] == code
        assert client.close_code is None


async def test_server_side_subscribers_are_subscribers() -> None:
    """``allow_publish_for_subscriber`` holds for server-side subscriptions, too."""
    async with serving(PERMISSIONS) as site:
        client = await Client.connected(site.url, token=token({"sub": "ann", "channels": ["sub:1"]}))
        await client.ask("publish", channel="sub:1", data=1)
        await client.ask("unsubscribe", channel="sub:1")
        assert await client.refused("publish", channel="sub:1", data=1) == 103


@pytest.mark.parametrize("request_", [{"type": 1, "key": "k"}, {"key": "k"}, {"removed": True}])
async def test_map_channels_are_not_offered(request_: dict[str, Any]) -> None:
    """PROTOCOL 21.1: what only a map channel could take is 108."""
    async with serving() as site:
        client = await Client.connected(site.url)
        assert await client.refused("publish", channel="live:1", data=1, **request_) == 108


@pytest.mark.parametrize("channel", ["chat:1", "live:1"])
async def test_nothing_is_no_publication(channel: str) -> None:
    """A publication without data is 107, in both formats."""
    async with serving() as site:
        json, binary = await Client.connected(site.url), await Client.connected(site.url, format="protobuf")
        assert await json.refused("publish", channel=channel) == 107
        await binary.raw(_publishing(9, channel, b""))
        assert (await binary.reply(9))["error"]["code"] == 107


# --- rpc and send --------------------------------------------------------------------
@FORMATS
async def test_publish_with_an_idempotency_key(format: str) -> None:
    """The rpc ``publish`` tells the position; the same key again publishes nothing and tells the same one."""
    async with serving() as site:
        client = await Client.connected(site.url, format=format)
        await client.ask("subscribe", channel="chat:1")
        request = {"channel": "chat:1", "data": {"n": 1}, "idempotency_key": "once"}
        first = (await client.ask("rpc", method="publish", data=request))["data"]
        assert first["offset"] == 1
        assert len(first["epoch"]) == 8
        assert (await client.ask("rpc", method="publish", data=request))["data"] == first
        other = await client.ask("rpc", method="publish", data={**request, "idempotency_key": "twice"})
        assert other["data"] == {"offset": 2, "epoch": first["epoch"]}
        assert [pub["offset"] for pub in await client.publications("chat:1", 2)] == [1, 2]
        assert not [push for push in client.pushes if "pub" in push]


async def test_an_idempotency_key_in_a_passing_channel() -> None:
    """A key holds in channels without history, too; there is no position to tell."""
    async with serving() as site:
        client = await Client.connected(site.url)
        await client.ask("subscribe", channel="live:1")
        for _ in range(2):
            request = {"channel": "live:1", "data": 1, "idempotency_key": "once"}
            assert await client.ask("rpc", method="publish", data=request) == {"data": {}}
        await client.ask("publish", channel="live:1", data=2)
        assert [push["pub"]["data"] for push in client.pushes if "pub" in push] == [1, 2]


@pytest.mark.parametrize("channel", ["chat:1", "live:1"])
async def test_a_long_idempotency_key_is_refused(channel: str) -> None:
    """A key is remembered, so its length is bounded (107), also where there is no history."""
    async with serving() as site:
        client = await Client.connected(site.url)
        for key, code in (("k" * 256, 0), ("k" * 257, 107)):
            request = {"channel": channel, "data": 1, "idempotency_key": key}
            reply = await client.call("rpc", method="publish", data=request)
            assert reply.get("error", {"code": 0})["code"] == code


@FORMATS
@pytest.mark.parametrize(
    ("method", "data", "code"),
    [
        ("", {}, 108),
        ("sum", [1, 2], 108),
        ("ping", {}, 108),
        ("publish", {}, 107),
        ("publish", [], 107),
        ("publish", {"channel": 5, "data": 1}, 107),
        ("publish", {"channel": "chat:1"}, 107),
        ("publish", {"channel": "nowhere:1", "data": 1}, 102),
    ],
)
async def test_rpc_refusals(format: str, method: str, data: Any, code: int) -> None:
    """PROTOCOL 4.7: methods that are not there are 108, a ``publish`` that is none 107."""
    async with serving() as site:
        client = await Client.connected(site.url, format=format)
        assert await client.refused("rpc", method=method, data=data) == code


@FORMATS
async def test_rpc_ping(format: str) -> None:
    """PROTOCOL 4.7: with ``rpc.ping.enabled`` the method ``ping`` has an empty result."""
    async with serving(settings(rpc={"ping": {"enabled": True}})) as site:
        client = await Client.connected(site.url, format=format)
        assert await client.ask("rpc", method="ping", data={}) == {}


# --- history ---------------------------------------------------------------------------
async def _filled(url: str, channel: str, count: int, format: str = "json") -> Client:
    client = await Client.connected(url, format=format, token=token({"sub": "ann"}))
    commands = [client.command("publish", channel=channel, data=number) for number in range(1, count + 1)]
    for start in range(0, count, 100):
        await client.send(*commands[start : start + 100])
    for command in commands:
        assert "publish" in await client.reply(command["id"])
    return client


@FORMATS
async def test_pages_of_history(format: str) -> None:
    """PROTOCOL 4.6, 20.8: the position alone, first pages, later pages, and the same newest first."""
    async with serving() as site:
        client = await _filled(site.url, "chat:1", 5, format)
        empty = await client.ask("history", channel="chat:1")
        assert empty.get("publications", []) == []
        assert empty["offset"] == 5
        epoch = empty["epoch"]

        async def page(**request: Any) -> list[int]:
            result = await client.ask("history", channel="chat:1", **request)
            assert (result["offset"], result["epoch"]) == (5, epoch)
            assert [pub["data"] for pub in result.get("publications", [])] == [
                pub["offset"] for pub in result.get("publications", [])
            ]
            return [pub["offset"] for pub in result.get("publications", [])]

        assert await page(limit=2) == [1, 2]
        assert await page(limit=-1) == [1, 2, 3, 4, 5]
        assert await page(limit=2, since={"offset": 2, "epoch": epoch}) == [3, 4]
        assert await page(limit=2, since={"offset": 2}) == [3, 4]
        assert await page(limit=9, since={"offset": 4, "epoch": epoch}) == [5]
        assert await page(limit=9, since={"offset": 5, "epoch": epoch}) == []
        assert await page(limit=9, since={"offset": 2**63 - 1, "epoch": epoch}) == []
        assert await page(limit=2, reverse=True) == [5, 4]
        assert await page(limit=2, reverse=True, since={"offset": 4, "epoch": epoch}) == [3, 2]
        assert await page(limit=2, reverse=True, since={"offset": 1, "epoch": epoch}) == []
        assert await page(limit=2, reverse=True, since={"offset": 99, "epoch": epoch}) == [5, 4]
        assert await page(limit=0, since={"offset": 2, "epoch": epoch}) == []


HISTORIES = _spaces(
    {"name": "open", **KEPT},
    {"name": "shut", **HISTORY},
    {"name": "sub", **HISTORY, "allow_subscribe_for_client": True, "allow_history_for_subscriber": True},
    {"name": "three", **KEPT, "history_size": 3},
)


@FORMATS
@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"channel": "live:1"}, 108),
        ({"channel": "shut:1"}, 103),
        ({"channel": "sub:1"}, 103),
        ({"channel": "nowhere:1"}, 102),
        ({"channel": "open:ä"}, 107),
        ({"channel": "open:1", "since": {"offset": 1, "epoch": "other"}, "limit": 1}, 112),
        ({"channel": "open:1", "since": {"epoch": "other"}}, 112),
        ({"channel": "open:1", "since": {}, "reverse": True}, 107),
        ({"channel": "open:1", "since": {"offset": 0}, "reverse": True, "limit": 5}, 107),
        ({"channel": "open:1", "since": {"offset": 7}, "limit": 5}, 0),
        ({"channel": "open:1", "since": {}, "limit": 5}, 0),
    ],
)
async def test_history_refusals(format: str, request_: dict[str, Any], code: int) -> None:
    """The table of PROTOCOL 4.6; 0 is a success."""
    async with serving(HISTORIES) as site:
        client = await _filled(site.url, "open:1", 1, format)
        assert (await client.call("history", **request_)).get("error", {"code": 0})["code"] == code


async def test_history_for_subscribers() -> None:
    """``allow_history_for_subscriber`` opens it while subscribed, and an unknown stream is empty with epoch ""."""
    async with serving(HISTORIES) as site:
        client = await Client.connected(site.url, token=token({"sub": "ann"}))
        await client.ask("subscribe", channel="sub:1")
        assert await client.ask("history", channel="sub:1", limit=5) == {"publications": [], "epoch": "", "offset": 0}
        await client.ask("unsubscribe", channel="sub:1")
        assert await client.refused("history", channel="sub:1") == 103


@FORMATS
async def test_history_since_what_is_gone(format: str) -> None:
    """PROTOCOL 4.6: older than what is kept: from the oldest kept one; backwards from there: nothing."""
    async with serving(HISTORIES) as site:
        client = await _filled(site.url, "three:1", 10, format)

        async def page(**request: Any) -> list[int]:
            result = await client.ask("history", channel="three:1", limit=-1, **request)
            return [pub["offset"] for pub in result.get("publications", [])]

        assert await page() == [8, 9, 10]
        assert await page(since={"offset": 2}) == [8, 9, 10]
        assert await page(reverse=True) == [10, 9, 8]
        assert await page(reverse=True, since={"offset": 9}) == [8]
        assert await page(reverse=True, since={"offset": 8}) == []
        assert await page(reverse=True, since={"offset": 5}) == []


async def test_history_is_cut() -> None:
    """At most ``client.history_max_publication_limit`` come at once, also where all were asked for; 0 is no limit."""
    for most, got in ((300, 300), (7, 7), (0, 310)):
        async with serving(settings(client={"history_max_publication_limit": most})) as site:
            client = await _filled(site.url, "chat:1", 310)
            for limit in (-1, 100_000, 2**31 - 1, -(2**31)):
                page = await client.ask("history", channel="chat:1", limit=limit)
                assert [pub["offset"] for pub in page["publications"]] == list(range(1, got + 1))
                assert page["offset"] == 310
            assert len((await client.ask("history", channel="chat:1", limit=3))["publications"]) == 3


async def test_history_that_would_not_fit_the_outbox() -> None:
    """Whoever asks for all of a heavy channel gets what fits, is not cut off for it, and can ask for the rest."""
    async with serving(settings(client={"queue_max_size": 300_000})) as site:
        client = await Client.connected(site.url)
        for number in range(60):
            await client.ask("publish", channel="chat:1", data=f"{number:050000}")
        offsets: list[int] = []
        while len(offsets) < 60:
            since = {"offset": offsets[-1] if offsets else 0}
            page = await client.ask("history", channel="chat:1", limit=-1, since=since)
            assert page["publications"], "each page brings something"
            assert sum(len(pub["data"]) for pub in page["publications"]) < 300_000
            offsets += [pub["offset"] for pub in page["publications"]]
        assert offsets == list(range(1, 61))
