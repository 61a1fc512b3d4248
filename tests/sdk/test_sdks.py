"""What applications do, done with SDKs that nobody here wrote: each story in two languages, two wire formats
and, where there is a choice, on each transport.

PROTOCOL 2.3, 2.4, 2.5, 4, 5, 8, 11, 14, 19.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cent import (
    CentNetworkError,
    Disconnect,
    DisconnectRequest,
    HistoryRequest,
    PublishRequest,
    SubscribeRequest,
    UnsubscribeRequest,
)
from instruments import (
    EMULATED,
    KINDS,
    Kind,
    Line,
    Player,
    RefusedBySdk,
    Tokens,
    back_end,
    complaints,
    config,
    playing,
    publish,
    serving,
    settings,
    signed,
)
from support import OPEN, Client, Process, Site

pytestmark = pytest.mark.parametrize("kind", [*KINDS, *EMULATED], ids=str)

VARIED: dict[str, Any] = {
    "text": 'zwölf\nZeilen, \u2028 and "quotes" 🎈',
    "list": [1, 2.5, None, True, {"": []}],
    "empty": {},
}
GIVEN: dict[str, Any] = {"name": "given", "history_size": 100, "history_ttl": "1h", "force_recovery": True}
SHORT: dict[str, Any] = {"name": "short", **OPEN, "history_size": 5, "history_ttl": "1h", "force_recovery": True}


async def gone(site: Site, clients: int = 0) -> None:
    """Wait until the server has no more than ``clients`` connections, with the help of one that asks it."""
    async with asyncio.timeout(10):
        asking = await Client.connected(site.url)
        while len(site.node.sessions) > clients + 1:
            await asking.ask("presence_stats", channel="live:nobody")
        await asking.close()


# --- connect --------------------------------------------------------------------
async def test_connects_without_token(kind: Kind) -> None:
    """Where anonymous clients are allowed, an SDK connects and learns the id that the server knows it by."""
    async with serving() as site, playing(kind, site.url, connect=False) as player:
        await player.connect()
        connected = await player.next("connected")
        assert list(site.node.sessions) == [connected["client"]]


async def test_connects_with_a_token(kind: Kind) -> None:
    """A token says who the client is and what others see of it."""
    async with serving() as site:
        token = signed(site, sub="42", info={"name": "Ada"})
        async with playing(kind, site.url, token=token) as player:
            await player.subscribed("live:1")
            (member,) = (await player.call("presence", "live:1")).values()
            assert (member["user"], member["conn_info"]) == ("42", {"name": "Ada"})


async def test_a_forged_token_ends_it(kind: Kind) -> None:
    """A client with an invalid token is sent away with 3500, and its SDK does not come back."""
    async with serving() as site, playing(kind, site.url, token="a.b.c", connect=False) as player:
        await player.connect()
        assert (await player.next("disconnected"))["code"] == 3500
        assert not site.node.sessions


async def test_nobody_without_token_ends_it(kind: Kind) -> None:
    """Where anonymous clients are not allowed, the SDK is told so for good."""
    closed = settings(client={"allow_anonymous_connect_without_token": False})
    async with serving(closed) as site, playing(kind, site.url, connect=False) as player:
        await player.connect()
        assert (await player.next("disconnected"))["code"] == 3501


async def test_an_expired_token_is_replaced(kind: Kind) -> None:
    """Error 109 at connect makes the SDK ask for a new token and come back with it."""
    async with serving() as site:
        old = signed(site, -60, sub="42")
        async with playing(kind, site.url, token=old, tokens=lambda _: signed(site, sub="42")) as player:
            assert len(player.untaken("asked")) == 1
            assert list(site.node.users) == ["42"]


# --- publish and receive ----------------------------------------------------------
async def test_publishes_and_receives(kind: Kind) -> None:
    """What one client publishes the others get as it was, numbered, and with its publisher; it gets it itself, too."""
    async with serving() as site:
        async with (
            playing(kind, site.url, token=signed(site, sub="7", info=[1])) as ann,
            playing(kind, site.url) as bob,
        ):
            assert await ann.subscribed("chat:1")
            subscribed = await bob.subscribed("chat:1")
            assert (subscribed["recoverable"], subscribed["positioned"]) == (True, True)
            await ann.call("publish", "chat:1", data=VARIED)
            await bob.call("publish", "chat:1", data="two")
            for player in (ann, bob):
                first, second = await player.publications("chat:1", 2)
                assert (first["offset"], first["data"]) == (1, VARIED)
                assert (first["info"]["user"], first["info"]["conn_info"]) == ("7", [1])
                assert (second["offset"], second["data"], second["info"]["user"]) == (2, "two", "")


async def test_passing_channels_have_no_numbers(kind: Kind) -> None:
    """In a channel without history publications arrive, but without offset, and nothing can be recovered."""
    async with serving() as site, playing(kind, site.url) as player:
        subscribed = await player.subscribed("live:1")
        assert (subscribed["recoverable"], subscribed["positioned"]) == (False, False)
        await player.call("publish", "live:1", data={"x": 1})
        (publication,) = await player.publications("live:1", 1)
        assert (publication["offset"], publication["data"]) == (0, {"x": 1})


async def test_tags_and_the_back_ends_publications(kind: Kind) -> None:
    """What the back end publishes has its tags and no publisher."""
    async with serving() as site, playing(kind, site.url) as player, back_end(site.port) as api:
        await player.subscribed("chat:1")
        await api.publish(PublishRequest(channel="chat:1", data=VARIED, tags={"lang": "de"}))
        (publication,) = await player.publications("chat:1", 1)
        assert publication == {"data": VARIED, "offset": 1, "info": None, "tags": {"lang": "de"}}


async def test_calls_are_carried_out_in_turn(kind: Kind) -> None:
    """Many publications at once from one client get their numbers in the order in which they were called.

    Where each is a request of its own, the SDK promises no order, and the server waits for none that is long under way:
    each is there once.
    """
    async with serving() as site, playing(kind, site.url) as player:
        await player.subscribed("chat:1")
        await asyncio.gather(*(player.call("publish", "chat:1", data=number) for number in range(1, 201)))
        came = await player.publications("chat:1", 200)
        assert [one["offset"] for one in came] == list(range(1, 201))
        data = [one["data"] for one in came]
        assert (sorted(data) if kind in EMULATED else data) == list(range(1, 201))


async def test_refusals_reach_the_application(kind: Kind) -> None:
    """A refused call raises with the server's code, and the connection goes on."""
    async with serving() as site, playing(kind, site.url) as player:
        refused: list[tuple[int, str, str, dict[str, Any]]] = [
            (102, "publish", "nope:1", {"data": 1}),
            (108, "history", "live:1", {"limit": 1}),
            (108, "rpc", "", {"method": "no", "data": 1}),
        ]
        for code, order, channel, arguments in refused:
            with pytest.raises(RefusedBySdk) as caught:
                await player.call(order, channel, **arguments)
            assert caught.value.code == code
        await player.subscribe("nope:1")
        assert (await player.next("unsubscribed", "nope:1"))["code"] == 102
        assert await player.call("presence_stats", "live:1") == {"num_clients": 0, "num_users": 0}


async def test_a_message_too_large_is_named(kind: Kind) -> None:
    """A frame above the limit closes with 1009, code 3 to SDKs: the JavaScript one stays away, Python's comes back.

    Where commands are posted one by one, only this one fails.
    """
    async with serving() as site, playing(kind, site.url) as player:
        publishing = asyncio.ensure_future(player.call("publish", "chat:1", data="x" * 70_000))
        if kind in EMULATED:  # the SDK lets it run into its time limit
            await player.subscribed("chat:1")
            await player.call("publish", "chat:1", data="y")
            assert [one["data"] for one in await player.publications("chat:1", 1)] == ["y"]
            assert not player.untaken("connecting")
            publishing.cancel()
            await asyncio.wait([publishing])
            return
        event = "disconnected" if kind.sdk == "js" else "connecting"
        assert (await player.next(event))["code"] == 3
        await asyncio.wait([publishing])
        assert publishing.exception() is not None


async def test_unsubscribes(kind: Kind) -> None:
    """After unsubscribing nothing more comes, presence is empty, and one may subscribe again."""
    async with serving() as site, playing(kind, site.url) as player:
        await player.subscribed("chat:1")
        await player.unsubscribe("chat:1")
        assert (await player.next("unsubscribed", "chat:1"))["code"] == 0
        assert await player.call("presence", "chat:1") == {}
        await player.call("publish", "chat:1", data="unheard")
        await player.subscribed("chat:1")
        await player.call("publish", "chat:1", data="heard")
        (publication,) = await player.publications("chat:1", 1)
        assert (publication["offset"], publication["data"]) == (2, "heard")


# --- presence, join and leave --------------------------------------------------------
async def test_presence(kind: Kind) -> None:
    """Presence counts clients and users, one user with two connections once, and shows who they are."""
    async with serving() as site:
        token = signed(site, sub="42", info={"name": "Ada"})
        async with playing(kind, site.url, token=token) as ann, playing(kind, site.url, token=token) as ann2:
            async with playing(kind, site.url) as bob:
                for player in (ann, ann2, bob):
                    await player.subscribed("live:1")
                assert await bob.call("presence_stats", "live:1") == {"num_clients": 3, "num_users": 2}
                members = await bob.call("presence", "live:1")
                assert set(members) == set(site.node.sessions)
                seen = sorted((member["user"], member["conn_info"], member["chan_info"]) for member in members.values())
                assert seen[1:] == [("42", {"name": "Ada"}, None)] * 2
                assert seen[0] == ("", None, None)
            await gone(site, clients=2)
            assert await ann.call("presence_stats", "live:1") == {"num_clients": 2, "num_users": 1}


async def test_joins_and_leaves(kind: Kind) -> None:
    """Who asked for it is told its own join, and of everybody who comes and goes."""
    async with serving() as site:
        async with playing(kind, site.url, token=signed(site, sub="1")) as ann:
            await ann.subscribed("live:1", join_leave=True)
            assert (await ann.next("join", "live:1"))["user"] == "1"
            async with playing(kind, site.url, token=signed(site, sub="2")) as bob:
                await bob.subscribed("live:1")
                joined = await ann.next("join", "live:1")
                await bob.unsubscribe("live:1")
                assert await ann.next("leave", "live:1") == joined
                await bob.subscribed("live:1")
                assert await ann.next("join", "live:1") == joined
            assert await ann.next("leave", "live:1") == joined
            assert joined["user"] == "2"
            assert not bob.untaken("join", "live:1")


# --- history ---------------------------------------------------------------------
async def test_history(kind: Kind) -> None:
    """History is read from either end, in pages, after a position; limit 0 gives the position only."""
    async with serving() as site, playing(kind, site.url) as player:
        assert await player.call("history", "chat:1", limit=0) == {"publications": [], "offset": 0, "epoch": ""}
        for number in range(1, 8):
            await player.call("publish", "chat:1", data=number)
        top = await player.call("history", "chat:1", limit=0)
        epoch = top["epoch"]
        assert (top["publications"], top["offset"], bool(epoch)) == ([], 7, True)

        async def read(**arguments: Any) -> list[int]:
            page = await player.call("history", "chat:1", **arguments)
            assert (page["offset"], page["epoch"]) == (7, epoch)
            assert [one["offset"] for one in page["publications"]] == [one["data"] for one in page["publications"]]
            return [one["offset"] for one in page["publications"]]

        assert await read(limit=-1) == [1, 2, 3, 4, 5, 6, 7]
        assert await read(limit=2) == [1, 2]
        assert await read(limit=2, since=(2, epoch)) == [3, 4]
        assert await read(limit=9, since=(7, epoch)) == []
        assert await read(limit=3, reverse=True) == [7, 6, 5]
        assert await read(limit=3, reverse=True, since=(5, epoch)) == [4, 3, 2]
        with pytest.raises(RefusedBySdk) as caught:
            await read(limit=1, since=(2, "another"))
        assert caught.value.code == 112


async def test_rpc_publish_is_idempotent(kind: Kind) -> None:
    """The built-in RPC ``publish`` gives the position, and the same one for the same key, publishing once."""
    async with serving() as site, playing(kind, site.url) as player:
        await player.subscribed("chat:1")
        order = {"channel": "chat:1", "data": {"move": "e4"}, "idempotency_key": "k"}
        first = await player.call("rpc", method="publish", data=order)
        assert (first["data"]["offset"], len(first["data"]["epoch"])) == (1, 8)
        assert await player.call("rpc", method="publish", data=order) == first
        second = await player.call("rpc", method="publish", data={**order, "idempotency_key": "l"})
        assert second["data"]["offset"] == 2
        assert [one["offset"] for one in await player.publications("chat:1", 2)] == [1, 2]
        assert not player.untaken("publication", "chat:1")


# --- recovery ----------------------------------------------------------------------
async def test_recovers_after_a_cut(kind: Kind) -> None:
    """What was published while the connection was cut comes in order on return, then what is live."""
    async with serving() as site, Line(site.port) as relay, back_end(site.port) as api:
        async with playing(kind, relay.url) as player:
            await player.subscribed("chat:1")
            await publish(api, "chat:1", [1, 2], at_once=1)
            assert len(await player.publications("chat:1", 2)) == 2
            with relay.severed():
                await player.next("connecting")
                await publish(api, "chat:1", range(3, 8), at_once=1)
            subscribed = await player.next("subscribed", "chat:1")
            assert (subscribed["was_recovering"], subscribed["recovered"]) == (True, True)
            await publish(api, "chat:1", [8])
            came = await player.publications("chat:1", 6)
            assert [(one["offset"], one["data"]["n"]) for one in came] == [(n, n) for n in range(3, 9)]
            assert not player.untaken("publication", "chat:1")


async def test_recovers_many_pages_while_more_are_published(kind: Kind) -> None:
    """A thousand missed ones, ten pages of history, come in order and once although the channel is busy meanwhile."""
    async with serving() as site, Line(site.port) as relay, back_end(site.port) as api:
        async with playing(kind, relay.url) as player:
            await player.subscribed("chat:1")
            await publish(api, "chat:1", [0])
            assert (await player.publications("chat:1", 1))[0]["offset"] == 1
            with relay.severed():
                await player.next("connecting")
                await publish(api, "chat:1", range(1, 1001))
                busy = asyncio.create_task(publish(api, "chat:1", range(1001, 1301), at_once=5))
            assert (await player.next("subscribed", "chat:1"))["recovered"]
            came = await player.publications("chat:1", 1300)
            await busy
            assert [one["offset"] for one in came] == list(range(2, 1302))
            assert sorted(one["data"]["n"] for one in came) == list(range(1, 1301))
            assert not player.untaken("publication", "chat:1")
            assert not player.untaken("subscribing", "chat:1")[1:], "one cut, one new subscription"


async def test_learns_that_history_is_gone(kind: Kind) -> None:
    """Who missed more than the channel keeps is told that it was not recovered, and goes on from the top."""
    with_short = settings(channel={"namespaces": [SHORT]})
    async with serving(with_short) as site, Line(site.port) as relay, back_end(site.port) as api:
        async with playing(kind, relay.url) as player:
            await player.subscribed("short:1")
            await publish(api, "short:1", [1])
            assert len(await player.publications("short:1", 1)) == 1
            with relay.severed():
                await player.next("connecting")
                await publish(api, "short:1", range(2, 13), at_once=1)
            subscribed = await player.next("subscribed", "short:1")
            assert (subscribed["was_recovering"], subscribed["recovered"], subscribed["offset"]) == (True, False, 12)
            await publish(api, "short:1", [13])
            (live,) = await player.publications("short:1", 1)
            assert (live["offset"], live["data"]) == (13, {"n": 13})


async def test_learns_that_the_epoch_is_another(kind: Kind) -> None:
    """After a restore from backup numbers mean something else: not recovered, and the new epoch is learned."""
    async with serving() as site, Line(site.port) as relay, back_end(site.port) as api:
        async with playing(kind, relay.url) as player:
            await player.subscribed("chat:1")
            await publish(api, "chat:1", [1])
            assert len(await player.publications("chat:1", 1)) == 1
            with relay.severed():
                await player.next("connecting")
                await gone(site)
                await site.node.history.new_epochs()
            first = await player.next("subscribed", "chat:1")
            assert (first["was_recovering"], first["recovered"]) == (True, False)
            with relay.severed():
                await player.next("connecting")
                await publish(api, "chat:1", [2])
            assert (await player.next("subscribed", "chat:1"))["recovered"]
            (missed,) = await player.publications("chat:1", 1)
            assert missed["data"] == {"n": 2}


async def test_state_is_loaded_when_history_is_gone(kind: Kind) -> None:
    """With a state of its own the application is asked for it at first and after error 112; nothing is missed then."""
    with_short = settings(channel={"namespaces": [SHORT]})
    state = (0, "")
    async with serving(with_short) as site, Line(site.port) as relay, back_end(site.port) as api:
        async with playing(kind, relay.url, states=lambda: state) as player:
            subscribed = await player.subscribed("short:1", get_state=True)
            await player.next("asked", "short:1")
            assert (subscribed["was_recovering"], subscribed["recovered"]) == (True, True)
            await publish(api, "short:1", [1])
            assert len(await player.publications("short:1", 1)) == 1
            with relay.severed():
                await player.next("connecting")
                await publish(api, "short:1", [2])
            assert (await player.next("subscribed", "short:1"))["recovered"], "no reason to load anything"
            assert len(await player.publications("short:1", 1)) == 1
            with relay.severed():
                await player.next("connecting")
                await publish(api, "short:1", range(3, 13), at_once=1)
                top = await api.history(HistoryRequest(channel="short:1"))
                state = (top.offset - 2, top.epoch)
            await player.next("asked", "short:1")
            assert (await player.next("subscribed", "short:1"))["recovered"]
            assert [one["offset"] for one in await player.publications("short:1", 2)] == [11, 12]
            assert not player.untaken("asked", "short:1")
            assert not player.untaken("unsubscribed", "short:1")


async def test_a_shutdown_is_announced(kind: Kind, tmp_path: Path) -> None:
    """A server that is stopped sends its clients away with 3001; they come back when it does, and miss nothing."""
    with Process(tmp_path, config(sqlite={"path": str(tmp_path / "history.db")})) as server:
        async with playing(kind, server.url) as player, back_end(server.port) as api:
            await player.subscribed("chat:1")
            await publish(api, "chat:1", [1])
            assert len(await player.publications("chat:1", 1)) == 1
            assert await asyncio.to_thread(server.stop) == 0
            assert (await player.next("connecting"))["code"] == 3001
            await asyncio.to_thread(server.start)
            await publish(api, "chat:1", [2])
            assert (await player.next("subscribed", "chat:1"))["recovered"]
            (missed,) = await player.publications("chat:1", 1)
            assert (missed["offset"], missed["data"]) == (2, {"n": 2})
        assert complaints(server) == []


async def test_a_kill_loses_nothing(kind: Kind, tmp_path: Path) -> None:
    """The server is killed amid publishing: every acknowledged publication is heard once, in order, with no hole."""
    with Process(tmp_path, config(sqlite={"path": str(tmp_path / "history.db")})) as server:
        back = asyncio.Event()

        async def publish_patiently(who: int) -> None:
            for number in range(50):
                request = PublishRequest(
                    channel="chat:1", data={"who": who, "n": number}, idempotency_key=f"{who}/{number}"
                )
                try:
                    await api.publish(request)
                except CentNetworkError:
                    # Was it stored or not?  Nobody knows, so it is sent again under the same key.
                    await back.wait()
                    await api.publish(request)

        async with playing(kind, server.url) as player, back_end(server.port) as api:
            await player.subscribed("chat:1")
            publishing = [asyncio.create_task(publish_patiently(who)) for who in range(4)]
            came = await player.publications("chat:1", 60)
            server.kill()
            await asyncio.to_thread(server.start)
            back.set()
            await asyncio.gather(*publishing)
            came += await player.publications("chat:1", 140)
            assert [one["offset"] for one in came] == list(range(1, 201))
            for who in range(4):
                assert [one["data"]["n"] for one in came if one["data"]["who"] == who] == list(range(50))
            assert not player.untaken("publication", "chat:1")
        assert complaints(server) == []


# --- tokens that expire ----------------------------------------------------------------
async def until(player: Player, site: Site, what: str, done: Callable[[], bool]) -> None:
    """Let the client ask and the server answer until ``done``; what the client said before has then been heard."""
    for _ in range(1000):
        if done():
            return
        await player.call("presence_stats", "live:nobody")
    raise AssertionError(f"after 1000 questions {what} is not so: {site.node.sessions}")


def short_lived(site: Site) -> Tokens:
    """Tokens for user 42, of which the first two for each channel last one to two seconds and all others an hour."""
    given: Counter[str] = Counter()

    def give(channel: str) -> str:
        given[channel] += 1
        now = site.clock()
        ttl_s = math.ceil(now) - int(now) + 1 if given[channel] <= 2 else 3600
        return signed(site, ttl_s, sub="42", **({"channel": channel} if channel else {}))

    return give


async def test_tokens_are_refreshed_again_and_again(kind: Kind) -> None:
    """Each time a token runs out the SDK gets a new one; connection and subscription outlive all the old ones."""
    impatient = {"expired_close_delay": "1s", "expired_sub_close_delay": "1s", "ping_interval": "60s"}
    async with serving(settings(client=impatient)) as site:
        async with playing(kind, site.url, tokens=short_lived(site)) as player:
            await player.subscribed("$chat:vip", get_token=True)
            session: Any = next(iter(site.node.sessions.values()))
            subscription = session.subscriptions["$chat:vip"]
            assert 0 < subscription.expire_at - site.clock() <= 2
            for _ in range(3):
                # The third question shows that the SDK understood how long the second token lasts.
                await player.next("asked")
                await player.next("asked", "$chat:vip")
            later = site.clock() + 1000
            await until(player, site, "the connection refreshed", lambda: session.expire_at > later)
            await until(player, site, "the subscription refreshed", lambda: subscription.expire_at > later)
            site.pass_time(6)
            await player.call("publish", "$chat:vip", data="still here")
            assert len(await player.publications("$chat:vip", 1)) == 1
            assert not player.untaken("subscribing", "$chat:vip")
            assert not player.untaken("connecting")


async def test_a_connection_that_is_not_refreshed_ends(kind: Kind) -> None:
    """Past its expiry and the grace a connection ends with 3005; the SDK fetches a new token and recovers."""
    impatient = settings(client={"expired_close_delay": "1s"})
    async with serving(impatient) as site, back_end(site.port) as api:
        old = signed(site, 6, sub="42")
        async with playing(kind, site.url, token=old, tokens=lambda _: signed(site, sub="42")) as player:
            await player.subscribed("chat:1")
            await publish(api, "chat:1", [1])
            assert len(await player.publications("chat:1", 1)) == 1
            site.pass_time(9)
            await publish(api, "chat:1", [2])
            assert (await player.next("connecting"))["code"] == 3005
            await player.next("asked")
            assert (await player.next("subscribed", "chat:1"))["recovered"]
            assert [one["offset"] for one in await player.publications("chat:1", 1)] == [2]


async def test_a_subscription_token(kind: Kind) -> None:
    """A private channel takes a token, which also brings data to the subscriber and info to the others."""
    async with serving() as site:
        async with playing(kind, site.url, token=signed(site, sub="42")) as player:
            await player.subscribe("$live:vip")
            assert (await player.next("unsubscribed", "$live:vip"))["code"] == 103
            token = signed(site, sub="42", channel="$live:vip2", data={"seat": 7}, info="gold")
            subscribed = await player.subscribed("$live:vip2", token=token)
            assert subscribed["data"] == {"seat": 7}
            (member,) = (await player.call("presence", "$live:vip2")).values()
            assert member["chan_info"] == "gold"


async def test_a_subscription_that_is_not_refreshed_ends(kind: Kind) -> None:
    """Past its expiry and the grace it ends with 2501; the SDK fetches a new token, subscribes again and recovers."""
    impatient = settings(client={"expired_sub_close_delay": "1s"})
    async with serving(impatient) as site, back_end(site.port) as api:
        old = signed(site, 6, sub="42", channel="$chat:vip")
        connection, fresh = signed(site, sub="42"), signed(site, sub="42", channel="$chat:vip")
        async with playing(kind, site.url, token=connection, tokens=lambda _: fresh) as player:
            await player.subscribed("$chat:vip", token=old, get_token=True)
            await publish(api, "$chat:vip", [1])
            assert len(await player.publications("$chat:vip", 1)) == 1
            site.pass_time(9)
            await publish(api, "$chat:vip", [2])
            assert (await player.next("subscribing", "$chat:vip"))["code"] == 2501
            await player.next("asked", "$chat:vip")
            assert (await player.next("subscribed", "$chat:vip"))["recovered"]
            assert [one["offset"] for one in await player.publications("$chat:vip", 1)] == [2]
            assert not player.untaken("connecting")


# --- server-side subscriptions -----------------------------------------------------------
async def test_channels_of_the_token_recover(kind: Kind) -> None:
    """Channels named in the token are followed from connect on, and recovered when the connection is cut."""
    async with serving() as site, Line(site.port) as relay, back_end(site.port) as api:
        token = signed(site, sub="42", channels=["chat:news", "live:news"])
        async with playing(kind, relay.url, token=token) as player:
            subscribed = await player.next("server_subscribed", "chat:news")
            assert (subscribed["recoverable"], subscribed["positioned"]) == (True, True)
            assert not (await player.next("server_subscribed", "live:news"))["recoverable"]
            await publish(api, "chat:news", [1])
            assert len(await player.publications("chat:news", 1, server_side=True)) == 1
            with relay.severed():
                await player.next("server_subscribing", "chat:news")
                await publish(api, "chat:news", range(2, 252), at_once=1)
                await publish(api, "live:news", [1])
            again = await player.next("server_subscribed", "chat:news")
            assert (again["was_recovering"], again["recovered"]) == (True, True)
            await publish(api, "chat:news", [252])
            came = await player.publications("chat:news", 251, server_side=True)
            assert [(one["offset"], one["data"]["n"]) for one in came] == [(n, n) for n in range(2, 253)]
            assert not player.untaken("server_publication", "live:news")


async def test_subs_of_the_token(kind: Kind) -> None:
    """The claim ``subs`` brings data to the subscriber, info to the others, and may switch joins on."""
    async with serving() as site:
        options = {"data": {"hello": 1}, "info": "gold", "override": {"force_push_join_leave": {"value": True}}}
        token = signed(site, sub="42", subs={"live:room": options})
        async with playing(kind, site.url, token=token) as player:
            assert (await player.next("server_subscribed", "live:room"))["data"] == {"hello": 1}
            joined = await player.next("server_join", "live:room")
            assert (joined["user"], joined["chan_info"]) == ("42", "gold")
            async with playing(kind, site.url) as other:
                await other.subscribed("live:room")
                assert (await player.next("server_join", "live:room"))["user"] == ""
            assert (await player.next("server_leave", "live:room"))["user"] == ""


async def test_the_personal_channel_recovers(kind: Kind) -> None:
    """Every signed-in client follows its user's own channel, and misses nothing that is published there."""
    personal = {"enabled": True, "personal_channel_namespace": "chat"}
    with_personal = settings(client={"subscribe_to_user_personal_channel": personal})
    async with serving(with_personal) as site, Line(site.port) as relay, back_end(site.port) as api:
        async with playing(kind, relay.url, token=signed(site, sub="42")) as player:
            await player.next("server_subscribed", "chat:#42")
            with relay.severed():
                await player.next("server_subscribing", "chat:#42")
                await publish(api, "chat:#42", [1, 2], at_once=1)
            assert (await player.next("server_subscribed", "chat:#42"))["recovered"]
            came = await player.publications("chat:#42", 2, server_side=True)
            assert [one["offset"] for one in came] == [1, 2]


async def test_a_channel_that_left_the_token_ends(kind: Kind) -> None:
    """A channel that a client gets by its token only is reported as ended when a later token does not name it."""
    with_given = settings(channel={"namespaces": [GIVEN]}, client={"expired_close_delay": "1s"})
    async with serving(with_given) as site:
        old = signed(site, 6, sub="42", channels=["given:a", "given:b"])
        fresh = signed(site, sub="42", channels=["given:b"])
        async with playing(kind, site.url, token=old, tokens=lambda _: fresh) as player:
            await player.next("server_subscribed", "given:a")
            await player.next("server_subscribed", "given:b")
            site.pass_time(9)
            assert (await player.next("connecting"))["code"] == 3005
            assert (await player.next("server_subscribed", "given:b"))["recovered"]
            await player.next("server_unsubscribed", "given:a")
            assert not player.untaken("server_unsubscribed", "given:b")


# --- what the back end orders ---------------------------------------------------------------
async def test_the_back_end_subscribes_and_unsubscribes(kind: Kind) -> None:
    """A subscription ordered by the back end is reported, delivers, and ends by order."""
    async with serving() as site, back_end(site.port) as api:
        async with playing(kind, site.url, token=signed(site, sub="42")) as player:
            await publish(api, "chat:extra", [1])
            await api.subscribe(SubscribeRequest(user="42", channel="chat:extra", data={"hello": 1}))
            subscribed = await player.next("server_subscribed", "chat:extra")
            assert (subscribed["recoverable"], subscribed["offset"], subscribed["data"]) == (True, 1, {"hello": 1})
            await publish(api, "chat:extra", [2])
            (publication,) = await player.publications("chat:extra", 1, server_side=True)
            assert (publication["offset"], publication["data"]) == (2, {"n": 2})
            await api.unsubscribe(UnsubscribeRequest(user="42", channel="chat:extra"))
            await player.next("server_unsubscribed", "chat:extra")
            assert await player.call("presence", "chat:extra") == {}


async def test_the_back_end_ends_a_subscription(kind: Kind) -> None:
    """Unsubscribed by order (2000) is for good; the connection and its other subscriptions go on."""
    async with serving() as site, back_end(site.port) as api:
        async with playing(kind, site.url, token=signed(site, sub="42")) as player:
            await player.subscribed("chat:a")
            await player.subscribed("chat:b")
            await api.unsubscribe(UnsubscribeRequest(user="42", channel="chat:a"))
            assert (await player.next("unsubscribed", "chat:a"))["code"] == 2000
            await publish(api, "chat:a", [1])
            await publish(api, "chat:b", [1])
            assert len(await player.publications("chat:b", 1)) == 1
            assert not player.untaken("publication", "chat:a")
            assert not player.untaken("connecting")


async def test_the_back_end_ends_a_connection(kind: Kind) -> None:
    """Disconnected by order is for good with 3503, and only for a moment with a code that says so."""
    async with serving() as site, back_end(site.port) as api:
        async with playing(kind, site.url, token=signed(site, sub="42")) as player:
            await player.subscribed("chat:1")
            await publish(api, "chat:1", [1])
            assert len(await player.publications("chat:1", 1)) == 1
            await api.disconnect(DisconnectRequest(user="42", disconnect=Disconnect(code=4000, reason="moved")))
            await publish(api, "chat:1", [2])
            connecting = await player.next("connecting")
            assert (connecting["code"], connecting["reason"]) == (4000, "moved")
            assert (await player.next("subscribed", "chat:1"))["recovered"]
            assert [one["offset"] for one in await player.publications("chat:1", 1)] == [2]
            await api.disconnect(DisconnectRequest(user="42"))
            ended = await player.next("disconnected")
            assert (ended["code"], ended["reason"]) == (3503, "force disconnect")
            assert not site.node.sessions


# --- ping ---------------------------------------------------------------------------------
async def test_pings_are_answered(kind: Kind) -> None:
    """Over many pings an SDK stays connected by its pongs, while a client that answers none is cut with 3012."""
    async with serving() as site, playing(kind, site.url) as player:
        silent = await Client.connected(site.url, pongs=False)
        for _ in range(120):
            site.pass_time(1)
            await player.call("presence_stats", "live:1")
        assert (await silent.closed())[0] == 3012
        assert not player.untaken("connecting")
        await silent.close()
