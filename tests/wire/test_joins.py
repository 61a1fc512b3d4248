"""PROTOCOL 4.5, 14: presence, join and leave, seen from the wire."""

from typing import Any

import pytest
from support import OPEN, Client, serving, settings, token

from server.orders import RefreshOrder, SubscribeOrder, Target

FORMATS = pytest.mark.parametrize("format", ["json", "protobuf"])


def _spaces(*namespaces: dict[str, Any]) -> Any:
    return settings(channel={"namespaces": [*namespaces, {"name": "live", **OPEN, "presence": True}]})


async def _user(url: str, user: str, **options: Any) -> Client:
    return await Client.connected(url, token=token({"sub": user, **options.pop("claims", {})}), **options)


def _told(client: Client) -> list[tuple[str, str]]:
    """The joins and leaves that nobody took yet, as (kind, user)."""
    return [(kind, push[kind]["info"]["user"]) for push in client.pushes for kind in ("join", "leave") if kind in push]


# --- presence -------------------------------------------------------------------------
@FORMATS
async def test_who_is_here(format: str) -> None:
    """Each subscription is in presence before its reply, with both infos, and out of it after its unsubscribe."""
    async with serving() as site:
        ann = await _user(site.url, "ann", format=format, claims={"info": {"name": "Ann"}})
        subscription = {"sub": "ann", "channel": "live:1", "info": {"role": "mod"}}
        await ann.send(
            ann.command("subscribe", channel="live:1", token=token(subscription)),
            command := ann.command("presence", channel="live:1"),
        )
        entry = {
            "user": "ann",
            "client": ann.hello["client"],
            "conn_info": {"name": "Ann"},
            "chan_info": {"role": "mod"},
        }
        assert (await ann.reply(command["id"]))["presence"] == {"presence": {entry["client"]: entry}}
        await ann.send(
            ann.command("unsubscribe", channel="live:1"), command := ann.command("presence", channel="live:1")
        )
        assert (await ann.reply(command["id"]))["presence"].get("presence", {}) == {}


async def test_clients_and_users() -> None:
    """A user with three tabs is three clients and one user; all anonymous clients are one user, too."""
    async with serving() as site:
        clients = [await _user(site.url, user) for user in ("ann", "ann", "ann", "bob", "", "")]
        for client in clients:
            await client.ask("subscribe", channel="live:1")
        assert await clients[0].ask("presence_stats", channel="live:1") == {"num_clients": 6, "num_users": 3}
        members = (await clients[0].ask("presence", channel="live:1"))["presence"]
        assert sorted(info["user"] for info in members.values()) == ["", "", "ann", "ann", "ann", "bob"]
        assert await clients[0].ask("presence_stats", channel="live:2") == {"num_clients": 0, "num_users": 0}


@FORMATS
@pytest.mark.parametrize("method", ["presence", "presence_stats"])
async def test_presence_refusals(format: str, method: str) -> None:
    """PROTOCOL 4.5, 10.4: 102 unknown namespace, 107 bad name, 108 presence is off, 103 not allowed."""
    only = {"name": "sub", "presence": True, "allow_subscribe_for_client": True, "allow_presence_for_subscriber": True}
    async with serving(_spaces({"name": "off", **OPEN}, {"name": "shut", "presence": True}, only)) as site:
        ann = await _user(site.url, "ann", format=format)
        for name, code in (("nowhere:1", 102), ("live:ä", 107), ("off:1", 108), ("shut:1", 103), ("sub:1", 103)):
            assert await ann.refused(method, channel=name) == code
        await ann.ask("subscribe", channel="sub:1")
        await ann.ask(method, channel="sub:1")


@pytest.mark.parametrize("ending", ["close", "drop", "disconnect"])
async def test_who_leaves_is_gone_at_once(ending: str) -> None:
    """A goodbye, a broken line, a disconnect: presence and the others know of it without any lease running out."""
    async with serving() as site:
        watcher = await _user(site.url, "bob")
        await watcher.ask("subscribe", channel="live:1", join_leave=True)
        ann = await _user(site.url, "ann", claims={"channels": ["live:1"]})
        await watcher.until(lambda: len(_told(watcher)) == 2)
        if ending == "close":
            await ann.close()
        elif ending == "drop":
            await ann.drop()
        else:
            await ann.send({"id": 99, "connect": {}})
        await watcher.push("leave", "live:1")
        assert list((await watcher.ask("presence", channel="live:1"))["presence"]) == [watcher.hello["client"]]


async def test_a_half_open_line() -> None:
    """A client that is silently gone misses its pong: it is cut with 3012, out of presence, and its leave is said."""
    async with serving() as site:
        watcher = await _user(site.url, "bob")
        await watcher.ask("subscribe", channel="live:1", join_leave=True)
        silent = await _user(site.url, "ann", pongs=False)
        await silent.ask("subscribe", channel="live:1")
        for _ in range(37):
            site.pass_time(1)
            await watcher.ask("presence_stats", channel="live:1")
        assert await silent.closed() == (3012, "no pong")
        assert (await watcher.push("leave", "live:1"))["info"]["user"] == "ann"
        assert list((await watcher.ask("presence", channel="live:1"))["presence"]) == [watcher.hello["client"]]
        assert watcher.close_code is None


@pytest.mark.parametrize("by", ["refresh", "order"])
async def test_new_info_is_shown(by: str) -> None:
    """PROTOCOL 4.9: the info of a refreshed token replaces the old one in presence and in publications."""
    async with serving() as site:
        watcher = await _user(site.url, "bob")
        ann = await _user(site.url, "ann", claims={"info": {"mood": "sad"}})
        subscription = {"sub": "ann", "channel": "live:1", "info": "mod"}
        await ann.ask("subscribe", channel="live:1", token=token(subscription))
        await watcher.ask("subscribe", channel="live:1")
        if by == "refresh":
            await ann.ask("refresh", token=token({"sub": "ann", "info": {"mood": "merry"}}))
        else:
            site.node.ordering.give_soon(RefreshOrder(Target("ann"), False, 0, b'{"mood":"merry"}'))
            await ann.push("refresh")
        await ann.ask("publish", channel="live:1", data=1)
        shown = {"user": "ann", "client": ann.hello["client"], "conn_info": {"mood": "merry"}, "chan_info": "mod"}
        assert (await watcher.push("pub"))["info"] == shown
        members = (await watcher.ask("presence", channel="live:1"))["presence"]
        assert members[ann.hello["client"]] == shown


# --- join and leave ----------------------------------------------------------------------
@FORMATS
async def test_joins_and_leaves(format: str) -> None:
    """PROTOCOL 20.5: the own join comes behind the reply, the others' joins and leaves follow, never the own leave."""
    async with serving() as site:
        ann = await Client.connected(site.url, format=format, token=token({"sub": "ann"}))
        reply = await ann.call("subscribe", channel="live:1", join_leave=True)
        assert reply["subscribe"] == {}
        assert (await ann.push("join", "live:1"))["info"] == {"user": "ann", "client": ann.hello["client"]}
        bob = await _user(site.url, "bob")
        await bob.ask("subscribe", channel="live:1")
        assert (await ann.push("join", "live:1"))["info"] == {"user": "bob", "client": bob.hello["client"]}
        await bob.ask("unsubscribe", channel="live:1")
        assert (await ann.push("leave", "live:1"))["info"]["user"] == "bob"
        assert _told(bob) == [], "who did not ask is not told"
        await ann.ask("unsubscribe", channel="live:1")
        await ann.ask("publish", channel="live:1", data=1)
        assert ann.pushes == []


async def test_the_join_comes_behind_the_reply() -> None:
    """On the wire the reply stands before the own join, for client-side and server-side subscriptions."""
    forced = {"name": "loud", **OPEN, "join_leave": True, "force_push_join_leave": True}
    async with serving(_spaces(forced)) as site:
        lines: list[str] = []
        client = await Client.open(site.url)
        client.watch = lambda text: lines.extend(text.split("\n"))
        await client.ask("connect", token=token({"sub": "ann", "channels": ["loud:1"]}))
        await client.push("join", "loud:1")
        await client.ask("subscribe", channel="loud:2")
        await client.push("join", "loud:2")
        assert ['"connect"' in lines[0], '"join"' in lines[1], '"subscribe"' in lines[2], '"join"' in lines[3]] == [
            True
        ] * 4


@pytest.mark.parametrize(
    ("options", "asked", "hears"),
    [
        ({"join_leave": True}, False, False),
        ({"join_leave": True}, True, False),
        ({"join_leave": True, "presence": True}, True, False),
        ({"join_leave": True, "presence": True, "allow_presence_for_subscriber": True}, True, True),
        ({"join_leave": True, "presence": True, "allow_presence_for_client": True}, True, True),
        ({"join_leave": True, "force_push_join_leave": True}, False, True),
        ({"presence": True, "allow_presence_for_client": True}, True, False),
        ({"presence": True, "force_push_join_leave": True}, True, False),
    ],
)
async def test_who_is_told(options: dict[str, Any], asked: bool, hears: bool) -> None:
    """PROTOCOL 10.3, 14.2: joins go to those forced, or who ask and may read presence, if emitted at all."""
    space = {"name": "it", "allow_subscribe_for_client": True, "allow_publish_for_client": True, **options}
    async with serving(_spaces(space)) as site:
        ann, bob = await _user(site.url, "ann"), await _user(site.url, "bob")
        await ann.ask("subscribe", channel="it:1", join_leave=asked)
        await bob.ask("subscribe", channel="it:1")
        await bob.ask("unsubscribe", channel="it:1")
        await bob.ask("publish", channel="it:1", data=1)
        await ann.push("pub")
        assert _told(ann) == ([("join", "ann"), ("join", "bob"), ("leave", "bob")] if hears else [])


async def test_overrides_of_a_token() -> None:
    """PROTOCOL 8.1: a token may switch presence and joins on or off for one subscription."""
    space = {"name": "it", **OPEN, "presence": True, "join_leave": True, "force_push_join_leave": True}
    async with serving(_spaces(space)) as site:
        ann, bob = await _user(site.url, "ann"), await _user(site.url, "bob")
        await ann.ask("subscribe", channel="it:1")
        await ann.push("join")
        ghost = {"join_leave": {"value": False}, "presence": {}, "force_push_join_leave": {"value": False}}
        await bob.ask("subscribe", channel="it:1", token=token({"sub": "bob", "channel": "it:1", "override": ghost}))
        assert await ann.ask("presence_stats", channel="it:1") == {"num_clients": 1, "num_users": 1}
        await bob.close()
        carl = await _user(site.url, "carl")
        await carl.ask("subscribe", channel="it:1")
        await ann.until(lambda: len(_told(ann)) == 1)
        assert _told(ann) == [("join", "carl")]
        assert _told(bob) == []


async def test_subscribed_by_the_back_end_joins() -> None:
    """A subscription that the back end makes is in presence, and the others are told."""
    async with serving() as site:
        watcher, ann = await _user(site.url, "bob"), await _user(site.url, "ann")
        await watcher.ask("subscribe", channel="live:1", join_leave=True)
        await watcher.push("join")
        site.node.ordering.give_soon(SubscribeOrder(Target("ann"), "live:1", info=b'"guest"'))
        assert (await watcher.push("join"))["info"]["chan_info"] == "guest"
        assert len((await watcher.ask("presence", channel="live:1"))["presence"]) == 2
        await ann.close()
        assert (await watcher.push("leave"))["info"]["user"] == "ann"
