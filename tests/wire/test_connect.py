"""PROTOCOL 4.1: connect, seen from the wire."""

import pytest
from support import Client, serving


@pytest.mark.parametrize("format", ["json", "protobuf"])
async def test_hello(format: str) -> None:
    """A client that may connect learns its id, the ping interval and that its pongs are wanted."""
    async with serving() as site:
        client = await Client.connected(site.url, format=format)
        assert len(client.hello["client"]) == 36
        assert client.hello["ping"] == 25
        assert client.hello["pong"] is True
        await client.close()
