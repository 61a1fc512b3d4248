"""PROTOCOL 2.4, 4.9, 4.10, 8.3, 8.4: pings, refresh and expiry; the tests move the clock."""

from contextlib import suppress
from typing import Any

import pytest
import websockets
from support import Client, Site, serving, token

from server.orders import RefreshOrder, SubscribeOrder, Target

FORMATS = pytest.mark.parametrize("format", ["json", "protobuf"])


def _in(site: Site, seconds: int) -> int:
    return int(site.clock()) + seconds


async def _ann(site: Site, format: str = "json", **claims: Any) -> Client:
    return await Client.connected(site.url, format=format, token=token({"sub": "ann", **claims}))


async def _live(site: Site, client: Client, seconds: int) -> None:
    """Let time pass second by second, while the client answers its pings, until it is cut."""
    for _ in range(seconds):
        if client.close_code is not None:
            return
        site.pass_time(1)
        with suppress(websockets.ConnectionClosed):
            await (await client.connection.ping())


# --- pings ---------------------------------------------------------------------------
@FORMATS
async def test_pings(format: str) -> None:
    """A ping every 25 s, the first in the second half of that; a client that answers stays, busy or not."""
    async with serving() as site:
        client = await Client.connected(site.url, format=format)
        await _live(site, client, 11)
        assert client.pings == 0
        await _live(site, client, 16)
        assert client.pings == 1
        await _live(site, client, 52)
        assert client.pings == 3


@FORMATS
async def test_no_pong(format: str) -> None:
    """Who does not answer within 8 s is 3012, whatever else it says meanwhile; who answers notices nothing."""
    async with serving() as site:
        good = await Client.connected(site.url)
        mute = await Client.connected(site.url, format=format, pongs=False)
        while not mute.pings:
            await _live(site, good, 1)
        for _ in range(7):
            await _live(site, good, 1)
            await mute.ask("publish", channel="live:1", data=1)
        await _live(site, good, 2)
        assert await mute.closed() == (3012, "no pong")
        assert good.close_code is None


async def test_a_second_pong_is_unsolicited() -> None:
    """One ping, two pongs: 3501."""
    async with serving() as site:
        client = await Client.connected(site.url)
        while not client.pings:
            await _live(site, client, 1)
        await client.send({})
        assert await client.closed() == (3501, "bad request")


async def test_native_pings() -> None:
    """PROTOCOL 2.3: on request ping frames of WebSocket take the place of our pings, and no pong is announced."""
    async with serving() as site:
        client = await Client.open(f"{site.url}?cf_ws_frame_ping_pong=true")
        hello = await client.ask("connect")
        assert hello.keys() == {"client", "version"}
        await _live(site, client, 80)
        assert client.pings == 0
        await client.ask("publish", channel="live:1", data=1)
        await client.send({})
        assert (await client.closed())[0] == 3501


async def test_native_pings_want_their_pongs() -> None:
    """Who asked for native pings and answers none is 3012."""
    async with serving() as site:
        neighbour = await Client.connected(site.url)
        connection = await websockets.connect(f"{site.url}?cf_ws_frame_ping_pong=true", compression=None)
        client = Client(connection, "json", True)
        await client.ask("connect")
        client.connection.transport.pause_reading()
        await _live(site, neighbour, 37)
        client.connection.transport.resume_reading()
        assert await client.closed() == (3012, "no pong")


# --- the connection ----------------------------------------------------------------------
async def test_a_connection_expires() -> None:
    """PROTOCOL 8.3: 25 s after its expiry, not earlier, a connection that was not refreshed is 3005."""
    async with serving() as site:
        client = await _ann(site, exp=_in(site, 60))
        await _live(site, client, 78)
        assert client.close_code is None
        await _live(site, client, 12)
        assert await client.closed() == (3005, "connection expired")


@FORMATS
async def test_refresh(format: str) -> None:
    """PROTOCOL 4.9: a refresh moves the expiry, and a token without one ends it."""
    async with serving() as site:
        client = await _ann(site, format, exp=_in(site, 60))
        await _live(site, client, 70)
        result = await client.ask("refresh", token=token({"sub": "ann", "exp": _in(site, 100)}))
        assert result["expires"] is True
        assert 90 <= result["ttl"] <= 101
        await _live(site, client, 110)
        assert await client.ask("refresh", token=token({"sub": "ann"})) == {}
        await _live(site, client, 60)
        await client.ask("publish", channel="live:1", data=1)


@pytest.mark.parametrize(
    ("claims", "outcome"),
    [
        ({"sub": "ann", "exp": 1}, 3005),
        ({"sub": "bob"}, 3500),
        ({}, 3500),
        ({"sub": "ann", "channel": "live:1"}, 3500),
        ({"sub": "ann", "expire_at": 5}, 110),
        ({"sub": "ann", "channels": ["live:1"]}, 0),
        ({"sub": "ann", "subs": {"live:1": {}}}, 0),
        ({"sub": "ann", "channels": []}, 3010),
        ({"sub": "ann", "channels": ["live:1", "live:2"]}, 3010),
    ],
)
async def test_refresh_outcomes(claims: dict[str, Any], outcome: int) -> None:
    """Each case of PROTOCOL 4.9 for the user ann, whose token names live:1; 0 is a success."""
    async with serving() as site:
        neighbour = await Client.connected(site.url)
        client = await _ann(site, channels=["live:1"], exp=_in(site, 600))
        refresh = client.command("refresh", token=token(claims))
        await client.send(refresh)
        if outcome >= 3000:
            assert (await client.closed())[0] == outcome
        else:
            assert (await client.reply(refresh["id"])).get("error", {"code": 0})["code"] == outcome
        await neighbour.ask("publish", channel="live:1", data=1)


async def test_a_refused_refresh_leaves_the_old_expiry() -> None:
    """After error 110 the connection still expires when it would have."""
    async with serving() as site:
        client = await _ann(site, exp=_in(site, 60))
        assert await client.refused("refresh", token=token({"sub": "ann", "expire_at": 5})) == 110
        await _live(site, client, 78)
        await _live(site, client, 12)
        assert (await client.closed())[0] == 3005


async def test_refreshed_by_the_back_end() -> None:
    """PROTOCOL 5.9, 15.2: the back end moves the expiry and a push says so, or ends the connection with 3005."""
    async with serving() as site:
        client = await _ann(site, exp=_in(site, 60))
        site.node.ordering.give_soon(RefreshOrder(Target("ann"), False, _in(site, 300)))
        push = await client.push("refresh")
        assert push["expires"] is True
        assert 290 <= push["ttl"] <= 301
        await _live(site, client, 100)
        site.node.ordering.give_soon(RefreshOrder(Target("ann"), True, 0))
        assert (await client.closed())[0] == 3005


# --- the subscription -----------------------------------------------------------------------
def _subscription(channel: str = "live:1", **claims: Any) -> str:
    return token({"sub": "ann", "channel": channel, **claims})


@FORMATS
async def test_a_subscription_expires(format: str) -> None:
    """PROTOCOL 8.4: 25 s after its expiry it ends with 2501; the connection and other subscriptions stay."""
    async with serving() as site:
        client = await _ann(site, format)
        result = await client.ask("subscribe", channel="live:1", token=_subscription(exp=_in(site, 60)))
        assert result["expires"] is True
        assert 50 <= result["ttl"] <= 61
        await client.ask("subscribe", channel="live:2")
        await _live(site, client, 78)
        assert client.pushes == []
        await _live(site, client, 12)
        assert await client.push("unsubscribe", "live:1") == {"code": 2501, "reason": "subscription expired"}
        await client.ask("subscribe", channel="live:1", token=_subscription("live:1"))
        await client.ask("publish", channel="live:2", data=1)
        await client.push("pub", "live:2")


async def test_a_server_side_subscription_expires() -> None:
    """PROTOCOL 8.4: where the server subscribed, an expired subscription ends the connection with 3006."""
    async with serving() as site:
        client = await _ann(site)
        site.node.ordering.give_soon(SubscribeOrder(Target("ann"), "live:1", expire_at=_in(site, 60)))
        await client.push("subscribe", "live:1")
        await _live(site, client, 78)
        await _live(site, client, 12)
        assert await client.closed() == (3006, "subscription expired")


@FORMATS
@pytest.mark.parametrize("named", [True, False])
async def test_sub_refresh(format: str, named: bool) -> None:
    """PROTOCOL 4.10: a fresh token moves the expiry; the channel may be left out, it is in the token."""
    async with serving() as site:
        client = await _ann(site, format)
        await client.ask("subscribe", channel="live:1", token=_subscription(exp=_in(site, 60)))
        await _live(site, client, 70)
        request = {"channel": "live:1"} if named else {}
        result = await client.ask("sub_refresh", token=_subscription(exp=_in(site, 100)), **request)
        assert result["expires"] is True
        assert 90 <= result["ttl"] <= 101
        await _live(site, client, 110)
        assert await client.ask("sub_refresh", token=_subscription(), **request) == {}
        await _live(site, client, 60)
        assert client.pushes == []


@pytest.mark.parametrize("named", [True, False])
async def test_sub_refresh_with_an_expired_token(named: bool) -> None:
    """The old expiry stays in force: no error, and 2501 comes in its time."""
    async with serving() as site:
        client = await _ann(site)
        await client.ask("subscribe", channel="live:1", token=_subscription(exp=_in(site, 60)))
        await _live(site, client, 70)
        request = {"channel": "live:1"} if named else {}
        assert "error" not in await client.call("sub_refresh", token=_subscription(exp=_in(site, -1)), **request)
        await _live(site, client, 8)
        assert client.pushes == []
        await _live(site, client, 12)
        assert (await client.push("unsubscribe", "live:1"))["code"] == 2501


@pytest.mark.parametrize(
    ("channel", "claims", "outcome"),
    [
        ("live:1", None, 107),
        ("live:2", {}, 103),
        ("", {"channel": "live:2"}, 103),
        ("live:1", {"expire_at": 5}, 110),
        ("live:1", {"channel": "live:2"}, 3500),
        ("live:1", {"channel": ""}, 3500),
        ("live:1", {"sub": "bob"}, 3500),
        ("live:1", {"client": "other"}, 3500),
        ("live:1", {}, 0),
    ],
)
async def test_sub_refresh_outcomes(channel: str, claims: dict[str, Any] | None, outcome: int) -> None:
    """Each case of PROTOCOL 4.10 for the user ann, subscribed to live:1; 0 is a success."""
    async with serving() as site:
        client = await _ann(site)
        await client.ask("subscribe", channel="live:1", token=_subscription(exp=_in(site, 600)))
        full = {"sub": "ann", "channel": channel, **(claims or {})}
        refresh = client.command("sub_refresh", channel=channel, token="" if claims is None else token(full))
        await client.send(refresh)
        if outcome >= 3000:
            assert (await client.closed())[0] == outcome
        else:
            assert (await client.reply(refresh["id"])).get("error", {"code": 0})["code"] == outcome


async def test_what_is_left_is_told_as_a_whole_second() -> None:
    """PROTOCOL 4.1: ``ttl`` comes with ``expires``, so the last part of a second counts as one."""
    async with serving() as site:
        client = await _ann(site, exp=_in(site, 5))
        assert client.hello["expires"] is True
        assert 1 <= client.hello["ttl"] <= 5
