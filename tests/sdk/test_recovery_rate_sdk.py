"""PROTOCOL 18.0.7: an SDK whose recovery would come too late is refused, tries again, and has missed nothing."""

import asyncio
import json

import pytest
from instruments import Kind, Line, playing, serving, settings
from support import Client, Site

from server.history import Draft

CHANNEL = "chat:sdk"
CROWD = 8


async def _say(site: Site, channel: str, *numbers: int) -> None:
    for number in numbers:
        await site.node.publish(channel, site.node.channels.known(channel), Draft(json.dumps(number).encode()))


async def _come_back_all_the_time(site: Site, channel: str, enough: asyncio.Event) -> None:
    """A client without manners: it recovers, leaves and comes back, and when refused asks again at once."""
    client = await Client.connected(site.url)
    while not enough.is_set():
        if "subscribe" in await client.call("subscribe", channel=channel, recover=True, offset=1):
            await client.ask("unsubscribe", channel=channel)
        else:  # a command that succeeds: after a thousand refusals in a row it would be sent away
            await client.ask("presence_stats", channel=channel)
    await client.close()


@pytest.mark.parametrize("kind", [Kind("python", "json"), Kind("js", "protobuf")], ids=str)
async def test_a_refused_recovery_is_tried_again(kind: Kind) -> None:
    """While others take every token it is refused; once there is one it recovers, each publication once, in order."""
    chosen = settings(client={"recovery_rate_limit": 1}, sqlite={"publish_timeout": "3s"})
    async with serving(chosen) as site, Line(site.port) as relay, playing(kind, relay.url) as player:
        site.clock.run()
        enough, channels = asyncio.Event(), [f"chat:other{number}" for number in range(CROWD)]
        for channel in channels:
            await _say(site, channel, 1, 2, 3)
        await player.subscribed(CHANNEL)
        await _say(site, CHANNEL, 1, 2)
        assert [one["data"] for one in await player.publications(CHANNEL, 2)] == [1, 2]
        with relay.severed():
            await player.next("subscribing", CHANNEL)
            await _say(site, CHANNEL, 3, 4)
            crowd = [asyncio.create_task(_come_back_all_the_time(site, channel, enough)) for channel in channels]
        try:
            refused = await player.next("error", CHANNEL)
        finally:
            enough.set()
            await asyncio.gather(*crowd)
        assert "100" in str(refused), refused
        assert (await player.next("subscribed", CHANNEL))["recovered"]
        await _say(site, CHANNEL, 5)
        assert [one["data"] for one in await player.publications(CHANNEL, 3)] == [3, 4, 5]
