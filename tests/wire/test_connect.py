"""PROTOCOL 4.1, 8.1, 8.5, 9.2: connect, seen from the wire."""

import asyncio
import time
from contextlib import suppress
from typing import Any

import pytest
from support import KEPT, OPEN, Client, Closed, serving, settings, token

from server import protobuf
from server.settings import Settings

FORMATS = pytest.mark.parametrize("format", ["json", "protobuf"])
NOW = int(time.time())


def _client(**options: Any) -> Settings:
    return settings(client=options)


def _personal(**options: Any) -> Settings:
    personal = {"enabled": True, "personal_channel_namespace": "own", **options}
    own = {"name": "own", "history_size": 10, "history_ttl": "1h", "force_recovery": True, "presence": True}
    return settings(
        client={"subscribe_to_user_personal_channel": personal}, channel={"namespaces": [own, {"name": "live", **OPEN}]}
    )


@FORMATS
async def test_hello(format: str) -> None:
    """A client that may connect learns its id, the ping interval and that its pongs are wanted."""
    async with serving() as site:
        client = await Client.connected(site.url, format=format)
        assert len(client.hello["client"]) == 36
        assert client.hello["version"].startswith("waterspout ")
        assert client.hello["ping"] == 25
        assert client.hello["pong"] is True
        assert client.hello.keys() == {"client", "version", "ping", "pong"}
        await client.close()


# --- the table of outcomes ---------------------------------------------------------
@FORMATS
@pytest.mark.parametrize(
    ("options", "claims", "outcome"),
    [
        pytest.param({"allow_anonymous_connect_without_token": False}, None, 3501, id="no token, no anonymous"),
        pytest.param({"insecure": True, "allow_anonymous_connect_without_token": False}, None, 0, id="insecure"),
        pytest.param({}, {}, 0, id="a token without user"),
        pytest.param({"disallow_anonymous_connection_tokens": True}, {}, 3507, id="no anonymous tokens"),
        pytest.param({"disallow_anonymous_connection_tokens": True}, {"sub": "ann"}, 0, id="a token with user"),
        pytest.param({}, {"sub": "ann", "channel": "chat:1"}, 3500, id="a subscription token"),
        pytest.param({"token": {"audience": "here"}}, {"sub": "ann"}, 3500, id="no audience"),
        pytest.param({"token": {"audience": "here"}}, {"sub": "ann", "aud": ["x", "here"]}, 0, id="the audience"),
        pytest.param({"token": {"issuer": "us"}}, {"sub": "ann", "iss": "them"}, 3500, id="another issuer"),
        pytest.param({}, {"sub": 42}, 3500, id="a user that is no string"),
        pytest.param({}, {"sub": "ann", "exp": NOW - 1}, 109, id="expired"),
        pytest.param({"insecure": True}, {"sub": "ann", "exp": NOW - 1}, 109, id="expired, insecure"),
        pytest.param({}, {"sub": "ann", "nbf": NOW + 86_400}, 109, id="not yet valid"),
        pytest.param({}, {"sub": "ann", "expire_at": NOW - 1}, 110, id="expire_at is past"),
        pytest.param({}, {"sub": "ann", "expire_at": 0, "exp": NOW + 86_400}, 0, id="expire_at never"),
        pytest.param({}, {"sub": "ann", "channels": ["nowhere:1"]}, 102, id="channels in an unknown namespace"),
        pytest.param({}, {"sub": "ann", "subs": {"nowhere:1": {}}}, 102, id="subs in an unknown namespace"),
        pytest.param({"channel_limit": 2}, {"sub": "ann", "channels": ["a", "b"]}, 0, id="at the channel limit"),
        pytest.param({"channel_limit": 2}, {"sub": "ann", "channels": ["a", "b", "c"]}, 3505, id="above it"),
    ],
)
async def test_outcomes(format: str, options: dict[str, Any], claims: dict[str, Any] | None, outcome: int) -> None:
    """Each row of the table of PROTOCOL 4.1; 0 is a success, below 3000 an error, else a disconnect."""
    async with serving(_client(**options)) as site:
        neighbour = await Client.connected(site.url, token=token({"sub": "bob", "aud": "here", "iss": "us"}))
        client = await Client.open(site.url, format=format)
        await client.send({"id": 1, "connect": {} if claims is None else {"token": token(claims)}})
        if outcome >= 3000:
            assert (await client.closed())[0] == outcome
        else:
            assert (await client.reply(1)).get("error", {"code": 0})["code"] == outcome
        assert set(site.node.users) == {"bob"} | ({(claims or {}).get("sub", "")} if not outcome else set())
        await neighbour.ask("publish", channel="live:1", data=1)


@pytest.mark.parametrize(
    "wrong",
    ["x", "a.b.c", "…", token({"sub": "ann"}, "another secret that is long enough for HMAC"), token({"sub": "a"})[:-4]],
)
async def test_tokens_that_are_none(wrong: str) -> None:
    """Malformed and forged tokens are 3500, in insecure mode, too."""
    for insecure in (False, True):
        async with serving(_client(insecure=insecure)) as site:
            client = await Client.open(site.url)
            await client.send({"id": 1, "connect": {"token": wrong}})
            assert await client.closed() == (3500, "invalid token")


async def test_user_connection_limit() -> None:
    """The connection above ``client.user_connection_limit`` is 3504; one that leaves makes room."""
    async with serving(_client(user_connection_limit=2)) as site:
        ann = token({"sub": "ann"})
        first, second = [await Client.connected(site.url, token=ann) for _ in range(2)]
        third = await Client.open(site.url)
        await third.send({"id": 1, "connect": {"token": ann}})
        assert await third.closed() == (3504, "connection limit")
        await Client.connected(site.url, token=token({"sub": "bob"}))
        for _ in range(3):
            await Client.connected(site.url)
        await first.close()
        await Client.connected(site.url, token=ann)
        assert second.close_code is None


# --- what the result says ------------------------------------------------------------
async def test_expiry_is_announced() -> None:
    """A connection that expires says so, with seconds; ``expire_at`` goes before ``exp``; a year is the most."""
    async with serving() as site:
        now = int(site.clock())
        for claims, least, most in (
            ({"exp": now + 300}, 290, 301),
            ({"exp": now + 300, "expire_at": now + 900}, 890, 901),
            ({"exp": now + 10 * 365 * 86_400}, 365 * 86_400, 365 * 86_400),
        ):
            client = await Client.connected(site.url, token=token({"sub": "ann", **claims}))
            assert client.hello["expires"] is True
            assert least <= client.hello["ttl"] <= most
        forever = await Client.connected(site.url, token=token({"sub": "ann", "exp": now + 300, "expire_at": 0}))
        assert forever.hello.keys() == {"client", "version", "ping", "pong"}


async def test_insecure_connections_do_not_expire() -> None:
    """PROTOCOL 8.5: in insecure mode the expiry of a token is not announced and ends nothing."""
    async with serving(_client(insecure=True)) as site:
        client = await Client.connected(site.url, token=token({"sub": "ann", "exp": int(site.clock()) + 20}))
        assert "expires" not in client.hello
        for _ in range(12):
            site.pass_time(5)
            await client.ask("presence_stats", channel="chat:1")


async def test_server_time() -> None:
    """``time`` is the server's clock in ms, if ``client.connect_include_server_time`` is set."""
    async with serving(_client(connect_include_server_time=True)) as site:
        site.clock.ahead_s = 5000
        client = await Client.connected(site.url)
        assert abs(client.hello["time"] - (time.time() + 5000) * 1000) < 60_000


async def test_a_trusted_proxy_may_name_the_user() -> None:
    """PROTOCOL 8.5: the header of ``client.user_id_http_header`` is the user; a token goes first; none is anonymous."""
    chosen = _client(user_id_http_header="X-User-Id", allow_anonymous_connect_without_token=False)
    async with serving(chosen) as site:
        header = {"x-user-id": "ann"}
        client = await Client.open(site.url, additional_headers=header)
        await client.ask("connect")
        assert list(site.node.users) == ["ann"]
        other = await Client.open(site.url, additional_headers=header)
        await other.ask("connect", token=token({"sub": "bob"}))
        assert set(site.node.users) == {"ann", "bob"}
        nobody = await Client.open(site.url)
        await nobody.send({"id": 1, "connect": {}})
        assert (await nobody.closed())[0] == 3501


# --- server-side subscriptions ---------------------------------------------------------
@FORMATS
async def test_channels_of_a_token(format: str) -> None:
    """The claim ``channels`` subscribes server-side with the namespace's options, permitted or not."""
    async with serving(settings(channel={"namespaces": [{"name": "shut"}, {"name": "chat", **KEPT}]})) as site:
        writer = await Client.connected(site.url)
        await writer.ask("publish", channel="chat:1", data=1)
        client = await Client.connected(
            site.url, format=format, token=token({"sub": "ann", "channels": ["chat:1", "shut:1"]})
        )
        subs = client.hello["subs"]
        assert subs["shut:1"] == {}
        epoch = subs["chat:1"].pop("epoch")
        assert len(epoch) == 8
        assert subs["chat:1"] == {"recoverable": True, "positioned": True, "offset": 1}
        await writer.ask("publish", channel="chat:1", data=2)
        assert (await client.push("pub", "chat:1"))["offset"] == 2


@FORMATS
async def test_subs_of_a_token(format: str) -> None:
    """The claim ``subs`` goes before ``channels``, gives data and info, and overrides options."""
    claims = {
        "sub": "ann",
        "info": {"name": "Ann"},
        "channels": ["live:ignored"],
        "subs": {
            "live:1": {"data": {"hello": 1}, "info": {"role": "owner"}},
            "live:2": {"override": {"presence": {"value": False}, "join_leave": {"value": False}}},
            "chat:1": {"override": {"force_recovery": {"value": False}}},
        },
    }
    async with serving() as site:
        client = await Client.connected(site.url, format=format, token=token(claims))
        assert client.hello["subs"] == {"live:1": {"data": {"hello": 1}}, "live:2": {}, "chat:1": {}}
        ann = {
            "user": "ann",
            "client": client.hello["client"],
            "conn_info": {"name": "Ann"},
            "chan_info": {"role": "owner"},
        }
        presence = await client.ask("presence", channel="live:1")
        assert presence == {"presence": {ann["client"]: ann}}
        watcher = await Client.connected(site.url)
        assert await watcher.ask("presence_stats", channel="live:2") == {"num_clients": 0, "num_users": 0}


@FORMATS
async def test_server_side_subscriptions_recover(format: str) -> None:
    """PROTOCOL 11.7: ``connect.subs`` brings the position, and the result what was missed."""
    async with serving() as site:
        ann = token({"sub": "ann", "channels": ["chat:1", "chat:2"]})
        writer = await Client.connected(site.url)
        await writer.ask("publish", channel="chat:1", data="before")
        first = await Client.connected(site.url, format=format, token=ann)
        position = {name: first.hello["subs"]["chat:1"][name] for name in ("offset", "epoch")}
        await first.close()
        for word in ("one", "two"):
            await writer.ask("publish", channel="chat:1", data=word)
        subs = {"chat:1": {"recover": True, **position}, "chat:2": {"recover": True, "epoch": "gone", "offset": 3}}
        again = await Client.connected(site.url, format=format, token=ann, subs=subs)
        recovered = again.hello["subs"]["chat:1"]
        assert recovered["recovered"] is True
        assert recovered["was_recovering"] is True
        assert recovered["offset"] == 1
        assert [(pub["offset"], pub["data"]) for pub in recovered["publications"]] == [(2, "one"), (3, "two")]
        lost = again.hello["subs"]["chat:2"]
        assert lost == {"was_recovering": True, "recoverable": True, "positioned": True}
        await writer.ask("publish", channel="chat:1", data="three")
        assert (await again.push("pub", "chat:1"))["offset"] == 4


async def test_wishes_are_granted_or_passed_over() -> None:
    """What ``connect.subs`` names besides is subscribed if the client could have done so itself, else left out."""
    namespaces = [
        {"name": "open", "allow_subscribe_for_client": True},
        {"name": "shut"},
        {"name": "lim", "allow_subscribe_for_client": True, "allow_user_limited_channels": True},
    ]
    async with serving(settings(channel={"namespaces": namespaces})) as site:
        names = ["open:1", "shut:1", "$open:1", "open:ü", "lim:a#bob", "lim:a#ann,bob", "none", "open:" + "x" * 300]
        wishes: dict[str, dict[str, Any]] = {name: {} for name in names}
        ann = await Client.connected(site.url, token=token({"sub": "ann"}), subs=wishes)
        assert set(ann.hello["subs"]) == {"open:1", "lim:a#ann,bob"}
        nobody = await Client.connected(site.url, subs=wishes)
        assert "subs" not in nobody.hello
        assert await ann.refused("subscribe", channel="open:1") == 105


@pytest.mark.parametrize("wish", ["nowhere:1", ""])
async def test_wishes_that_cannot_be(wish: str) -> None:
    """A wish for a channel of an unknown namespace, or for none, is 3501."""
    async with serving(settings(channel={"without_namespace": OPEN})) as site:
        client = await Client.open(site.url)
        await client.send({"id": 1, "connect": {"subs": {wish: {}}}})
        assert (await client.closed())[0] == 3501
        assert not site.node.hub.feeds


async def test_a_channel_that_cannot_be_had_ends_the_others() -> None:
    """Where one server-side subscription fails, connect fails, and the others leave nothing behind."""
    binary = {"name": "bin", **KEPT, "publication_data_format": "binary"}
    async with serving(settings(channel={"namespaces": [binary, {"name": "chat", **KEPT, "presence": True}]})) as site:
        writer = await Client.connected(site.url, format="protobuf")
        for data in ("1", "{"):
            await writer.raw(_publish_bytes("bin:1", data.encode()))
        await writer.until(lambda: len(writer.ids) == 3)
        client = await Client.open(site.url)
        subs = {"bin:1": {"recover": True}, "chat:1": {}}
        await client.send({"id": 1, "connect": {"token": token({"sub": "ann", "channels": list(subs)}), "subs": subs}})
        assert (await client.closed())[0] == 3506
        assert await writer.ask("presence_stats", channel="chat:1") == {}
        assert list(site.node.users) == [""]
        assert not site.node.hub.feeds


def _publish_bytes(channel: str, data: bytes) -> bytes:
    return protobuf.prefixed(protobuf.Command(id=1, publish={"channel": channel, "data": data}).SerializeToString())


# --- personal channels ------------------------------------------------------------------
async def test_personal_channel() -> None:
    """PROTOCOL 9.2: each user has a channel of its own, the anonymous one has none, and it recovers."""
    async with serving(_personal()) as site:
        ann = await Client.connected(site.url, token=token({"sub": "ann"}))
        assert set(ann.hello["subs"]) == {"own:#ann"}
        assert ann.hello["subs"]["own:#ann"] == {"recoverable": True, "positioned": True}
        nobody = await Client.connected(site.url)
        assert "subs" not in nobody.hello
        both = await Client.connected(site.url, token=token({"sub": "bob", "channels": ["live:1"]}))
        assert set(both.hello["subs"]) == {"own:#bob", "live:1"}


async def test_single_connection() -> None:
    """With ``single_connection`` a user's new connection ends the others with 3504, and nobody else's."""
    async with serving(_personal(single_connection=True)) as site:
        bob = await Client.connected(site.url, token=token({"sub": "bob"}))
        older = await Client.connected(site.url, token=token({"sub": "ann"}))
        newer = await Client.connected(site.url, token=token({"sub": "ann"}))
        assert await older.closed() == (3504, "connection limit")
        assert "own:#ann" in newer.hello["subs"]
        await bob.ask("publish", channel="live:1", data=1)
        assert newer.close_code is None
        assert set(site.node.sessions) == {bob.hello["client"], newer.hello["client"]}


async def test_of_racing_connections_one_stays() -> None:
    """Twenty connections of one user at once: exactly one is left, and it is in force."""
    async with serving(_personal(single_connection=True)) as site:
        clients = [await Client.open(site.url) for _ in range(20)]
        ann = token({"sub": "ann"})
        await asyncio.gather(*(client.send(client.command("connect", token=ann)) for client in clients))
        await asyncio.gather(*(_settled(client) for client in clients))
        pending = {asyncio.create_task(client.closed()) for client in clients}
        while len(pending) > 1:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for last in pending:
            last.cancel()
        left = [client for client in clients if client.close_code is None]
        assert len(left) == 1
        await left[0].ask("publish", channel="live:1", data=1)


async def _settled(client: Client) -> None:
    """Wait until a client was answered or cut."""
    with suppress(Closed):
        await client.until(lambda: bool(client.ids))
