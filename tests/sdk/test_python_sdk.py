"""What only centrifuge-python has, or had: Protobuf's numbers, payloads that are no JSON, a refresh without channel.

PROTOCOL 3.3, 4.10, 9.4, appendix A.
"""

import asyncio
from typing import Any

import centrifuge  # type: ignore[import-untyped]
import pytest
from centrifuge import PublicationContext, SubscriptionEventHandler
from centrifuge.protocol import client_pb2  # type: ignore[import-untyped]
from instruments import signed
from support import OPEN, PATIENCE_S, Client, serving, settings

from server import protobuf


class _Payloads(SubscriptionEventHandler):  # type: ignore[misc]
    """Takes the payloads of a subscription, as they are."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def on_publication(self, ctx: PublicationContext) -> None:
        """See the SDK."""
        self.heard.put_nowait(ctx.pub.data)


async def test_payloads_that_are_no_json() -> None:
    """In a binary namespace a Protobuf client gets exactly the bytes that were published, live and from history."""
    binary = {"name": "binary", **OPEN, "history_size": -1, "history_ttl": "1h", "publication_data_format": "binary"}
    payloads = [bytes(range(256)), b"\n\n", b'{"a": \n1}']
    async with serving(settings(channel={"namespaces": [binary]})) as site:
        client = centrifuge.Client(site.url, use_protobuf=True, proxy=None)
        ears = _Payloads()
        subscription = client.new_subscription("binary:1", events=ears)
        await client.connect()
        await subscription.subscribe()
        await subscription.ready()
        for payload in payloads:
            await subscription.publish(payload)
        async with asyncio.timeout(PATIENCE_S):
            assert [await ears.heard.get() for _ in payloads] == payloads
        page = await subscription.history(limit=10)
        assert [publication.data for publication in page.publications] == payloads
        await client.disconnect()
        await asyncio.gather(*client._background_tasks, return_exceptions=True)


@pytest.mark.parametrize("format", ["json", "protobuf"])
async def test_sub_refresh_without_channel(format: str) -> None:
    """Versions up to 0.5 refresh a subscription without naming its channel: the token's claim names it."""
    async with serving() as site:
        short = signed(site, 60, sub="42", channel="$chat:vip")
        client = await Client.connected(site.url, format=format, token=signed(site, sub="42"))
        assert (await client.ask("subscribe", channel="$chat:vip", token=short))["ttl"] <= 60
        refreshed = await client.ask("sub_refresh", token=signed(site, sub="42", channel="$chat:vip"))
        assert refreshed["expires"] is True
        assert 3500 < refreshed["ttl"] <= 3600
        await client.close()


@pytest.mark.parametrize("name", ["Command", "Reply"])
def test_field_numbers(name: str) -> None:
    """Every field, at whatever depth, has the SDK's number and type; one that the SDK lacks takes no other's number."""
    seen: set[tuple[str, str]] = set()
    differences: list[str] = []

    def compare(ours: Any, theirs: Any) -> None:
        if (ours.full_name, theirs.full_name) in seen:
            return
        seen.add((ours.full_name, theirs.full_name))
        for field in ours.fields:
            other = theirs.fields_by_name.get(field.name)
            if other is None:
                if field.number in theirs.fields_by_number:
                    differences.append(f"{theirs.name} has another field {field.number} than {field.name}")
                continue
            if (field.number, field.type, field.is_repeated) != (other.number, other.type, other.is_repeated):
                differences.append(f"{theirs.name}.{field.name} is {other.number}, not {field.number}")
            if field.message_type is not None and other.message_type is not None:
                compare(field.message_type, other.message_type)

    compare(getattr(protobuf, name).DESCRIPTOR, getattr(client_pb2, name).DESCRIPTOR)
    assert len(seen) > 10
    assert not differences
