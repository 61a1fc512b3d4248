"""Patches, filters and numbers, as SDKs that nobody here wrote ask for them and take them.

Every SDK here offers to know channels by number, so that all tests of this folder show
that as well (in JSON; centrifuge-js cannot in Protobuf).  PROTOCOL 11.6, 12, 13, 21.4.
"""

import json
from typing import Any

import pytest
from cent import PublishRequest
from instruments import EMULATED, KINDS, Kind, Line, back_end, playing, serving, settings
from support import KEPT, Site

from server.history import Draft

pytestmark = pytest.mark.parametrize("kind", [*KINDS, *EMULATED], ids=str)

TEXT = "it was the best of times, it was the worst of times · дважды два ✓ "


def _spaces() -> Any:
    kept = {**KEPT, "allowed_delta_types": ["fossil"], "allow_tags_filter": True}
    cache = {"force_recovery_mode": "cache", "auto_cache_recover": True}
    return settings(channel={"namespaces": [{"name": "doc", **kept}, {"name": "score", **kept, **cache}]})


def _document(number: int) -> dict[str, Any]:
    """What changes near both ends of a long text, and is a patch for that."""
    return {"n": number, "text": TEXT * 8, "lines": [number, number + 1], "end": "✓" * (number % 5)}


async def _say(site: Site, channel: str, number: int, **options: Any) -> None:
    data = json.dumps(_document(number), ensure_ascii=False).encode()
    await site.node.publish(channel, site.node.channels.known(channel), Draft(data, **options))


async def test_patches(kind: Kind) -> None:
    """Live, through a cut with recovery, and live again: each SDK puts together exactly what was published."""
    async with serving(_spaces()) as site, Line(site.port) as relay, playing(kind, relay.url) as player:
        await player.subscribed("doc:1", delta="fossil")
        await player.subscribed("doc:2")
        heard = []
        for number in range(1, 11):
            await _say(site, "doc:1", number, delta=number % 4 > 0)
            heard.append((await player.next("publication", "doc:1"))["data"])
        with relay.severed():
            await player.next("subscribing", "doc:1")
            for number in range(11, 141):
                await _say(site, "doc:1", number, delta=True)
        assert (await player.next("subscribed", "doc:1"))["recovered"]
        for number in range(141, 146):
            await _say(site, "doc:1", number, delta=True)
        heard += [one["data"] for one in await player.publications("doc:1", 135)]
        assert heard == [_document(number) for number in range(1, 146)]
        (manner,) = site.node.hub.feeds["doc:1"].live
        assert manner.numbered is (kind.format == "json"), "every SDK offers to know channels by number"
        assert manner.delta.name == "BASED"


async def test_patches_of_a_back_end(kind: Kind) -> None:
    """The server API publishes with ``delta``, as ``cent`` asks for it, and the SDK gets the document."""
    async with serving(_spaces()) as site, playing(kind, site.url) as player, back_end(site.port) as api:
        await player.subscribed("doc:1", delta="fossil")
        for number in range(5):
            await api.publish(PublishRequest(channel="doc:1", data=_document(number), delta=True))
        heard = [one["data"] for one in await player.publications("doc:1", 5)]
        assert heard == [_document(number) for number in range(5)]


async def test_filters(kind: Kind) -> None:
    """An SDK's filter holds live, over a cut, and for what was missed; a bad one ends the subscription with 107."""
    wanted = {
        "op": "and",
        "nodes": [{"key": "lang", "cmp": "in", "vals": ["de", "en"]}, {"key": "price", "cmp": "lt", "val": "10.5"}],
    }
    tags = [{"lang": lang, "price": price} for lang in ("de", "fr", "en") for price in ("10.49", "10.5", "free")]
    async with serving(_spaces()) as site, Line(site.port) as relay, playing(kind, relay.url) as player:
        await player.subscribed("doc:1", tags_filter=wanted)
        for number, some in enumerate(tags):
            await _say(site, "doc:1", number, tags=some)
        assert [one["data"]["n"] for one in await player.publications("doc:1", 2)] == [0, 6]
        with relay.severed():
            await player.next("subscribing", "doc:1")
            for number, some in enumerate(tags, 10):
                await _say(site, "doc:1", number, tags=some)
        assert (await player.next("subscribed", "doc:1"))["recovered"]
        await _say(site, "doc:1", 20, tags=tags[0])
        heard = await player.publications("doc:1", 3)
        assert [(one["data"]["n"], one["tags"]["lang"]) for one in heard] == [(10, "de"), (16, "en"), (20, "de")]
        await player.subscribe("doc:2", tags_filter={"key": "lang", "cmp": "is", "val": "de"})
        assert (await player.next("unsubscribed", "doc:2"))["code"] == 107


async def test_the_newest_only(kind: Kind) -> None:
    """In cache mode each subscribe brings the newest publication, at first and after a cut, and none twice."""
    async with serving(_spaces()) as site, Line(site.port) as relay, playing(kind, relay.url) as player:
        for number in (1, 2, 3):
            await _say(site, "score:1", number)
        assert (await player.subscribed("score:1", delta="fossil"))["recovered"]
        await _say(site, "score:1", 4, delta=True)
        assert [one["data"]["n"] for one in await player.publications("score:1", 2)] == [3, 4]
        with relay.severed():
            await player.next("subscribing", "score:1")
            for number in range(5, 30):
                await _say(site, "score:1", number)
        assert (await player.next("subscribed", "score:1"))["recovered"]
        assert [one["data"]["n"] for one in await player.publications("score:1", 1)] == [29]
        with relay.severed():
            await player.next("subscribing", "score:1")
        assert (await player.next("subscribed", "score:1"))["recovered"]
        await _say(site, "score:1", 30, delta=True)
        assert [one["data"]["n"] for one in await player.publications("score:1", 1)] == [30]
