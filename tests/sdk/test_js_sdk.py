"""What only centrifuge-js does: many commands in one frame, and a position made up by the application.

PROTOCOL 2.3, 3.4, 11.3, 19.
"""

import pytest
from instruments import EMULATED, JsPlayer, Kind, Line, back_end, playing, publish, serving

pytestmark = pytest.mark.parametrize("kind", [Kind("js", "json"), Kind("js", "protobuf"), *EMULATED], ids=str)


async def test_connect_and_subscribe_in_one_frame(kind: Kind) -> None:
    """Subscriptions that wait for the connection come in connect's frame; each is served, up to the limit of 128."""
    channels = [f"chat:{number}" for number in range(130)]
    async with serving() as site, Line(site.port) as relay, playing(kind, relay.url, connect=False) as player:
        for channel in channels:
            await player.subscribe(channel)
        await player.connect()
        for channel in channels[:128]:
            await player.next("subscribed", channel)
        for channel in channels[128:]:
            assert (await player.next("unsubscribed", channel))["code"] == 106
        assert len(site.node.hub.feeds) == 128
        with relay.severed():
            await player.next("subscribing", channels[0])
        for channel in channels[:128]:
            assert (await player.next("subscribed", channel))["recovered"]


async def test_calls_in_one_frame(kind: Kind) -> None:
    """The commands of one frame are carried out in turn: the last one sees what the first ones did."""
    async with serving() as site, playing(kind, site.url) as player:
        assert isinstance(player, JsPlayer)
        await player.subscribed("chat:1")
        orders = [{"order": "publish", "channel": "chat:1", "data": number} for number in range(100)]
        *_, page = await player.together(*orders, {"order": "history", "channel": "chat:1", "limit": 200})
        assert [one["data"] for one in page["publications"]] == list(range(100))
        assert [one["data"] for one in await player.publications("chat:1", 100)] == list(range(100))


async def test_first_subscription_since_a_position(kind: Kind) -> None:
    """An application that kept a position itself gets on its first subscription what came after it."""
    async with serving() as site, playing(kind, site.url) as player, back_end(site.port) as api:
        await publish(api, "chat:1", range(1, 6), at_once=1)
        epoch = (await player.call("history", "chat:1", limit=0))["epoch"]
        subscribed = await player.subscribed("chat:1", since=(3, epoch))
        assert (subscribed["was_recovering"], subscribed["recovered"]) == (True, True)
        assert [one["offset"] for one in await player.publications("chat:1", 2)] == [4, 5]


async def test_first_subscription_since_a_lost_position(kind: Kind) -> None:
    """A position of another epoch, or beyond the top, is said to be unrecoverable, and the top is given."""
    async with serving() as site, playing(kind, site.url) as player, back_end(site.port) as api:
        for channel, offset, epoch in (("chat:1", 1, "another"), ("chat:2", 9, "")):
            await publish(api, channel, range(1, 4), at_once=1)
            subscribed = await player.subscribed(channel, since=(offset, epoch))
            assert (subscribed["was_recovering"], subscribed["recovered"]) == (True, False)
            assert subscribed["offset"] == 3
            assert not player.untaken("publication", channel)
