"""PROTOCOL 18: who is kept out before a session is made."""

import asyncio

import pytest
import websockets
from conftest import ExpectedLog
from support import Client, serving, settings


async def _status(url: str) -> int:
    with pytest.raises(websockets.InvalidStatus) as caught:
        await websockets.connect(url)
    return caught.value.response.status_code


async def test_connection_limit(log: ExpectedLog) -> None:
    """Beyond client.connection_limit a handshake is answered 503; a place that becomes free is free."""
    log.expect("connection.refused")
    async with serving(settings(client={"connection_limit": 2})) as site:
        first = await Client.connected(site.url)
        waiting = await Client.open(site.url)
        assert await _status(site.url) == 503
        assert log.seen("connection.refused")[0]["why"] == "client.connection_limit"
        await waiting.close()
        third = await Client.connected(site.url)
        assert await first.ask("publish", channel="live:a", data=1) == {}
        await first.close()
        await third.close()


async def test_connection_rate_limit(log: ExpectedLog) -> None:
    """More new connections in a second than client.connection_rate_limit are answered 503."""
    log.expect("connection.refused")
    async with serving(settings(client={"connection_rate_limit": 3})) as site:
        # At once, and many: on a busy machine the next second has begun before four have come one after another.
        came = await asyncio.gather(*(websockets.connect(site.url) for _ in range(20)), return_exceptions=True)
        admitted = [one for one in came if isinstance(one, websockets.ClientConnection)]
        refused = [one.response.status_code for one in came if isinstance(one, websockets.InvalidStatus)]
        assert refused == [503] * (20 - len(admitted))
        assert 3 <= len(admitted) < 20
        whys = {seen["why"] for seen in log.seen("connection.refused")}
        assert whys == {"client.connection_rate_limit"}
        for connection in admitted:
            await connection.close()
