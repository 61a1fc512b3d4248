"""PROTOCOL 4.2, 4.3, 8.2, 10.2, 10.3: subscribe and unsubscribe, seen from the wire."""

import asyncio
import time
from typing import Any

import pytest
from support import OPEN, Client, Site, serving, settings, token

from server import orders
from server.orders import SubscribeOrder, Target
from server.settings import Settings
from server.stream import Position

FORMATS = pytest.mark.parametrize("format", ["json", "protobuf"])
NOW = int(time.time())
CLIENT = {"allow_subscribe_for_client": True}


def _spaces(*namespaces: dict[str, Any], **client: Any) -> Settings:
    return settings(client=client, channel={"namespaces": [*namespaces, {"name": "live", **OPEN}]})


ORDER = _spaces(
    {"name": "open", **CLIENT},
    {"name": "shut"},
    {"name": "any", **CLIENT, "allow_subscribe_for_anonymous": True},
    {"name": "lim", **CLIENT, "allow_user_limited_channels": True},
    {"name": "only", "allow_user_limited_channels": True},
    {"name": "num", **CLIENT, "channel_regex": r"^\d+$"},
    {"name": "uni", **CLIENT, "channel_regex": r"^[äöü]+$"},
    channel_limit=3,
)


@FORMATS
@pytest.mark.parametrize(
    ("channel", "code"),
    [
        ("nowhere:" + "x" * 300, 107),
        ("open:" + "ä" * 126, 107),
        ("nowhere:ä", 102),
        ("$nowhere:1", 102),
        ("open:ä", 107),
        ("num:x", 107),
        ("num:1", 0),
        ("$num:x", 107),
        ("uni:äöü", 0),
        ("uni:a", 107),
        ("$open:1", 103),
        ("shut:1", 103),
        ("open:1", 0),
        ("open:1:2", 0),
        ("open:#bob", 0),
        ("lim:1", 0),
        ("lim:x#ann", 0),
        ("lim:x#bob,ann", 0),
        ("lim:x#bob", 103),
        ("lim:x#", 103),
        ("lim:ann#bob", 103),
        ("lim:#ann#bob", 103),
        ("only:#ann", 0),
        ("only:1", 103),
        ("no namespace", 103),
    ],
)
async def test_checks(format: str, channel: str, code: int) -> None:
    """PROTOCOL 10.2: what the user ann is told about a channel it asks for without token; 0 is a success."""
    async with serving(ORDER) as site:
        ann = await Client.connected(site.url, format=format, token=token({"sub": "ann"}))
        reply = await ann.call("subscribe", channel=channel)
        assert reply.get("error", {"code": 0})["code"] == code
        assert set(site.node.hub.feeds) == ({channel} if not code else set())


@pytest.mark.parametrize(("channel", "code"), [("open:1", 103), ("any:1", 0), ("lim:#", 103), ("only:#", 103)])
async def test_the_anonymous_user(channel: str, code: int) -> None:
    """Anonymous users need ``allow_subscribe_for_anonymous``, and are on nobody's list."""
    async with serving(ORDER) as site:
        client = await Client.connected(site.url)
        assert (await client.call("subscribe", channel=channel)).get("error", {"code": 0})["code"] == code


async def test_the_earlier_check_decides() -> None:
    """PROTOCOL 10.2: length, then twice, then the limit, then the namespace."""
    async with serving(ORDER) as site:
        ann = await Client.connected(site.url, token=token({"sub": "ann"}))
        for name in ("open:1", "open:2", "open:3"):
            await ann.ask("subscribe", channel=name)
        assert await ann.refused("subscribe", channel="nowhere:" + "x" * 300) == 107
        assert await ann.refused("subscribe", channel="open:1") == 105
        assert await ann.refused("subscribe", channel="nowhere:1") == 106
        await ann.ask("unsubscribe", channel="open:1")
        assert await ann.refused("subscribe", channel="nowhere:1") == 102
        await ann.ask("subscribe", channel="open:1")


async def test_server_side_subscriptions_count_for_the_limit() -> None:
    """``client.channel_limit`` counts those that the token brought, and 105 holds for them."""
    async with serving(ORDER) as site:
        ann = await Client.connected(site.url, token=token({"sub": "ann", "channels": ["shut:1", "shut:2"]}))
        await ann.ask("subscribe", channel="open:1")
        assert await ann.refused("subscribe", channel="open:2") == 106
        assert await ann.refused("subscribe", channel="shut:1") == 105


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"type": 1}, 103),
        ({"type": 3}, 103),
        ({"type": 4}, 108),
        ({"type": 99}, 108),
        ({"tf": {"key": "a", "cmp": "eq", "val": "b"}}, 107),
        ({"delta": "fossil"}, 0),
        ({"flag": 4}, 0),
    ],
)
async def test_what_is_not_offered(request_: dict[str, Any], code: int) -> None:
    """PROTOCOL 10.2, 12.1, 13.1, 21: other types and filters are refused, delta and other flags are passed over."""
    async with serving(ORDER) as site:
        ann = await Client.connected(site.url, token=token({"sub": "ann"}))
        reply = await ann.call("subscribe", channel="open:1", **request_)
        if code:
            assert reply["error"]["code"] == code
            await ann.ask("subscribe", channel="open:1")
        else:
            assert reply["subscribe"] == {}


# --- subscription tokens -------------------------------------------------------------------
@FORMATS
@pytest.mark.parametrize(
    ("claims", "outcome"),
    [
        pytest.param({"sub": "ann", "channel": "$shut:1"}, 0, id="the right one"),
        pytest.param({"sub": "ann", "channel": "$shut:1", "client": "me"}, 0, id="with the client"),
        pytest.param({"sub": "ann", "channel": "$shut:1", "client": "other"}, 3500, id="of another client"),
        pytest.param({"sub": "bob", "channel": "$shut:1"}, 3500, id="of another user"),
        pytest.param({"channel": "$shut:1"}, 3500, id="of the anonymous user"),
        pytest.param({"sub": "ann", "channel": "shut:1"}, 3500, id="for another channel"),
        pytest.param({"sub": "ann"}, 103, id="without channel"),
        pytest.param({"sub": "ann", "channel": 5}, 103, id="a channel that is no string"),
        pytest.param({"sub": "ann", "channel": "$shut:1", "exp": NOW - 1}, 109, id="expired"),
        pytest.param({"sub": "ann", "channel": "$shut:1", "nbf": NOW + 86_400}, 109, id="not yet valid"),
        pytest.param({"sub": "ann", "channel": "$shut:1", "expire_at": NOW - 1}, 110, id="expire_at is past"),
        pytest.param({"sub": "ann", "channel": "$shut:1", "expire_at": 0, "exp": NOW + 86_400}, 0, id="never expires"),
    ],
)
async def test_subscription_tokens(format: str, claims: dict[str, Any], outcome: int) -> None:
    """PROTOCOL 8.2: a good token permits any valid name; a wrong one is an error, somebody else's a disconnect."""
    async with serving(ORDER) as site:
        ann = await Client.connected(site.url, format=format, token=token({"sub": "ann"}))
        if claims.get("client") == "me":
            claims = {**claims, "client": ann.hello["client"]}
        subscribe = ann.command("subscribe", channel="$shut:1", token=token(claims))
        await ann.send(subscribe)
        if outcome >= 3000:
            assert await ann.closed() == (outcome, "invalid token")
        else:
            reply = await ann.reply(subscribe["id"])
            assert reply.get("error", {"code": 0})["code"] == outcome
            assert reply.get("subscribe", {}) == {}


@pytest.mark.parametrize(
    "wrong", ["x", "a.b.c", token({"sub": "ann", "channel": "$shut:1"}, "another secret, long enough for an HMAC")]
)
async def test_tokens_that_are_none(wrong: str) -> None:
    """A malformed or forged token is 103, also where no token would have been needed, and costs no connection."""
    async with serving(ORDER) as site:
        ann = await Client.connected(site.url, token=token({"sub": "ann"}))
        for name in ("$shut:1", "open:1"):
            assert await ann.refused("subscribe", channel=name, token=wrong) == 103
        await ann.ask("subscribe", channel="open:1")


@FORMATS
async def test_what_a_token_grants(format: str) -> None:
    """PROTOCOL 8.2: data, channel info, expiry and overrides come from the token; names are still checked."""
    spaces = _spaces(
        {"name": "dark", "history_size": 5, "history_ttl": "1h"}, {"name": "num", "channel_regex": r"^\d+$"}
    )
    async with serving(spaces) as site:
        ann = await Client.connected(site.url, format=format, token=token({"sub": "ann", "info": {"name": "Ann"}}))
        claims = {
            "sub": "ann",
            "channel": "dark:1",
            "exp": int(site.clock()) + 600,
            "data": {"motd": "hi"},
            "info": ["mod"],
            "override": {"force_recovery": {"value": True}, "presence": {"value": True}},
        }
        result = await ann.ask("subscribe", channel="dark:1", token=token(claims))
        assert 590 <= result.pop("ttl") <= 601
        assert result == {"expires": True, "recoverable": True, "positioned": True, "data": {"motd": "hi"}}
        members = await site.node.presence.members("dark:1", site.clock())
        assert members[ann.hello["client"]].chan_info == b'["mod"]'
        assert await ann.refused("subscribe", channel="num:x", token=token({"sub": "ann", "channel": "num:x"})) == 107


async def test_tokens_by_a_key_of_their_own() -> None:
    """PROTOCOL 8: ``client.subscription_token`` verifies subscription tokens by other keys."""
    other = "the secret of the subscriptions, long enough"
    tokens = {"subscription_token": {"enabled": True, "hmac_secret_key": other}}
    async with serving(_spaces({"name": "shut"}, **tokens)) as site:
        ann = await Client.connected(site.url, token=token({"sub": "ann"}))
        claims = {"sub": "ann", "channel": "shut:1"}
        assert await ann.refused("subscribe", channel="shut:1", token=token(claims)) == 103
        await ann.ask("subscribe", channel="shut:1", token=token(claims, other))


# --- grants ----------------------------------------------------------------------------------
HISTORY = {"history_size": 10, "history_ttl": "1h"}


@FORMATS
@pytest.mark.parametrize(
    ("options", "wishes", "granted"),
    [
        (HISTORY, {}, ""),
        (HISTORY, {"positioned": True, "recoverable": True}, ""),
        ({**HISTORY, "allow_positioning": True}, {}, ""),
        ({**HISTORY, "allow_positioning": True}, {"positioned": True, "recoverable": True}, "p"),
        ({**HISTORY, "allow_recovery": True}, {"positioned": True}, ""),
        ({**HISTORY, "allow_recovery": True}, {"recoverable": True}, "pr"),
        ({**HISTORY, "allow_history_for_subscriber": True}, {"positioned": True}, "p"),
        ({**HISTORY, "allow_history_for_client": True}, {"recoverable": True}, "pr"),
        ({**HISTORY, "force_positioning": True}, {}, "p"),
        ({**HISTORY, "force_recovery": True}, {}, "pr"),
        ({"force_positioning": True}, {"positioned": True}, ""),
        ({"allow_recovery": True, "allow_positioning": True}, {"positioned": True, "recoverable": True}, ""),
    ],
)
async def test_grants(format: str, options: dict[str, Any], wishes: dict[str, Any], granted: str) -> None:
    """PROTOCOL 10.3: p is positioned, r recoverable; forced, or wished for and allowed; never without history."""
    async with serving(_spaces({"name": "it", **CLIENT, **options})) as site:
        ann = await Client.connected(site.url, format=format, token=token({"sub": "ann"}))
        result = await ann.ask("subscribe", channel="it:1", **wishes)
        assert result == {name: True for name in ("positioned", "recoverable") if name[0] in granted}


async def test_insecure_mode_permits_everything_but_private_names() -> None:
    """PROTOCOL 8.5: everybody may subscribe, publish, read; a ``$`` channel still needs its token."""
    closed = {"name": "shut", "history_size": 5, "history_ttl": "1h", "presence": True}
    async with serving(_spaces(closed, insecure=True)) as site:
        client = await Client.connected(site.url)
        assert await client.ask("subscribe", channel="shut:1") == {}
        await client.ask("publish", channel="shut:1", data=1)
        assert len((await client.ask("history", channel="shut:1", limit=9))["publications"]) == 1
        assert len((await client.ask("presence", channel="shut:1"))["presence"]) == 1
        assert await client.ask("subscribe", channel="shut:#bob") == {}
        assert await client.refused("subscribe", channel="$shut:1") == 103
        await client.ask("subscribe", channel="$shut:1", token=token({"channel": "$shut:1"}))
        assert await client.refused("subscribe", channel="shut:2", token="x") == 103


# --- unsubscribe -----------------------------------------------------------------------------
@FORMATS
async def test_unsubscribe(format: str) -> None:
    """PROTOCOL 4.3: succeeds, subscribed or not, client-side or server-side; afterwards nothing more comes."""
    async with serving() as site:
        writer = await Client.connected(site.url)
        client = await Client.connected(site.url, format=format, token=token({"channels": ["chat:2"]}))
        await client.ask("subscribe", channel="chat:1")
        for name in ("chat:1", "chat:1", "chat:2", "nowhere:1"):
            assert await client.ask("unsubscribe", channel=name) == {}
        for name in ("chat:1", "chat:2"):
            await writer.ask("publish", channel=name, data=1)
        await client.ask("subscribe", channel="chat:1")
        await writer.ask("publish", channel="chat:1", data=2)
        assert (await client.push("pub"))["data"] == 2
        assert not [push for push in client.pushes if "pub" in push]


async def test_an_unsubscribe_right_behind_its_subscribe() -> None:
    """Subscribe and unsubscribe in one frame, many times: each is answered, and nothing is left."""
    async with serving() as site:
        client = await Client.connected(site.url)
        commands = [
            client.command(method, channel="chat:1") for _ in range(100) for method in ("subscribe", "unsubscribe")
        ]
        await client.send(*commands)
        for command in commands:
            assert "error" not in await client.reply(command["id"])
        assert not site.node.hub.feeds
        assert (await client.ask("presence_stats", channel="chat:1")) == {"num_clients": 0, "num_users": 0}


# --- subscribed by the back end -----------------------------------------------------------------
def _order(channel: str, **options: Any) -> SubscribeOrder:
    return SubscribeOrder(Target("ann"), channel, **options)


async def _ann(site: Site, format: str = "json") -> Client:
    return await Client.connected(site.url, format=format, token=token({"sub": "ann"}))


@FORMATS
async def test_subscribed_by_order(format: str) -> None:
    """PROTOCOL 5.6, 11.7: a push says where it starts; what was missed since ``recover_since`` follows it."""
    async with serving() as site:
        ann = await _ann(site, format)
        for number in range(3):
            await ann.ask("publish", channel="chat:1", data=number)
        epoch = (await ann.ask("history", channel="chat:1"))["epoch"]
        site.node.ordering.give_soon(_order("chat:1", since=Position(1, epoch), data=b'{"why":1}'))
        push = await ann.push("subscribe", "chat:1")
        assert push == {"recoverable": True, "positioned": True, "epoch": epoch, "offset": 1, "data": {"why": 1}}
        assert [pub["offset"] for pub in await ann.publications("chat:1", 2)] == [2, 3]
        assert await ann.refused("subscribe", channel="chat:1") == 105


async def test_ordered_twice_is_subscribed_once() -> None:
    """The same order twice in one breath subscribes once; a client that is there already notices nothing."""
    async with serving() as site:
        ann = await _ann(site)
        for _ in range(3):
            site.node.ordering.give_soon(_order("chat:1"))
        assert await ann.push("subscribe", "chat:1") == {"recoverable": True, "positioned": True}
        site.node.ordering.give_soon(_order("chat:1"))
        await ann.ask("publish", channel="chat:1", data=1)
        assert [push for push in ann.pushes if "subscribe" in push] == []
        assert [push["pub"]["offset"] for push in ann.pushes if "pub" in push] == [1]
        await ann.close()
        neighbour = await Client.connected(site.url)
        assert (await neighbour.ask("presence", channel="chat:1"))["presence"] == {}
        assert not site.node.hub.feeds


async def test_an_order_for_who_is_just_leaving() -> None:
    """An order that meets the end of its client subscribes nobody."""
    async with serving() as site:
        ann = await _ann(site)
        site.node.ordering.give_soon(_order("chat:1"))
        site.node.ordering.give_soon(orders.DisconnectOrder(Target("ann"), 3503, "force disconnect"))
        assert await ann.closed() == (3503, "force disconnect")
        neighbour = await Client.connected(site.url)
        assert (await neighbour.ask("presence", channel="chat:1"))["presence"] == {}
        assert not site.node.hub.feeds


async def test_unsubscribed_by_order() -> None:
    """PROTOCOL 7.3: the push carries 2000; an empty channel means all; others stay subscribed."""
    async with serving() as site:
        ann, bob = await _ann(site), await Client.connected(site.url, token=token({"sub": "bob"}))
        for client in (ann, bob):
            for name in ("chat:1", "chat:2", "live:1"):
                await client.ask("subscribe", channel=name)
        site.node.ordering.give_soon(orders.UnsubscribeOrder(Target("ann"), "chat:1"))
        assert await ann.push("unsubscribe", "chat:1") == {"code": 2000, "reason": "server unsubscribe"}
        site.node.ordering.give_soon(orders.UnsubscribeOrder(Target("ann"), ""))
        await asyncio.gather(ann.push("unsubscribe", "chat:2"), ann.push("unsubscribe", "live:1"))
        await ann.ask("publish", channel="chat:1", data=1)
        assert (await bob.push("pub", "chat:1"))["data"] == 1
        assert not [push for push in [*ann.pushes, *bob.pushes] if "pub" in push or "unsubscribe" in push]
        await ann.ask("subscribe", channel="chat:1")
