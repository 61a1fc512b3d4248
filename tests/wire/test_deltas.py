"""PROTOCOL 12: patches in place of payloads, and payloads in full wherever there is a doubt."""

import asyncio
import json
from typing import Any

import pytest
from centrifuge.fossil import apply_delta  # type: ignore[import-untyped]
from support import KEPT, OPEN, Client, Site, serving, settings

from server.history import Draft

FORMATS = pytest.mark.parametrize("format", ["json", "protobuf"])
FOSSIL = {"allowed_delta_types": ["fossil"]}
BINARY = {"publication_data_format": "binary"}


def _spaces(**options: Any) -> Any:
    """Kept channels with patches, and some without; ``options`` are those of the first."""
    return settings(
        channel={
            "namespaces": [
                {"name": "doc", **KEPT, **FOSSIL, **options},
                {"name": "always", **KEPT, **FOSSIL, "delta_publish": True},
                {"name": "raw", **KEPT, **FOSSIL, **BINARY, "delta_publish": True},
                {"name": "tick", **OPEN, **FOSSIL, "delta_publish": True},
                {"name": "chat", **KEPT, "delta_publish": True},
            ]
        }
    )


def _text(number: int) -> bytes:
    """A payload that changes at both ends only, and is more than ASCII."""
    text = "the · quick · brown · fox · jumps · over · the · lazy · dog ✓"
    return json.dumps({"n": number, "text": text, "end": -number}, ensure_ascii=False).encode()


async def _say(site: Site, channel: str, data: bytes, *, delta: bool = True, **options: Any) -> None:
    namespace = site.node.channels.known(channel)
    await site.node.publish(channel, namespace, Draft(data, delta=delta, **options))


class Holder:
    """A client that asked for patches, and what it makes of what it gets."""

    def __init__(self, client: Client, channel: str) -> None:
        self.client = client
        self.channel = channel
        self.payload = b""
        self.result: dict[str, Any] = {}
        self.held: list[bytes] = []
        self.kinds: list[str] = []
        """Of each publication: did it come in full or as a patch?"""

    @classmethod
    async def subscribed(cls, site: Site, channel: str, format: str = "json", **request: Any) -> "Holder":
        """One that has a client of its own."""
        holder = cls(await Client.connected(site.url, format=format), channel)
        await holder.subscribe(**request)
        return holder

    async def subscribe(self, **request: Any) -> None:
        """Subscribe, and take what was recovered."""
        self.result = await self.client.ask("subscribe", channel=self.channel, delta="fossil", **request)
        for publication in self.result.get("publications", ()):
            self.take(publication)

    async def hear(self, count: int) -> list[bytes]:
        """The payloads of the next publications."""
        for _ in range(count):
            self.take(await self.client.push("pub", self.channel))
        return self.held[-count:]

    def take(self, publication: dict[str, Any]) -> None:
        """Work out the payload as an SDK does."""
        data = publication["data"]
        if self.client.format == "json":
            assert isinstance(data, str)
            data = data.encode()
        elif not publication.get("delta"):
            data = json.dumps(data, ensure_ascii=False).encode() if not isinstance(data, bytes) else data
        self.payload = bytes(apply_delta(self.payload, data)) if publication.get("delta") else data
        self.held.append(self.payload)
        self.kinds.append("patch" if publication.get("delta") else "full")


# --- what is agreed: 12.1 ---------------------------------------------------------------
@FORMATS
@pytest.mark.parametrize(
    ("channel", "request_", "agreed"),
    [
        ("doc:1", {"delta": "fossil"}, True),
        ("doc:1", {}, False),
        ("doc:1", {"delta": ""}, False),
        ("chat:1", {"delta": "fossil"}, False),
        ("tick:1", {"delta": "fossil"}, True),
        ("doc:1", {"delta": "fossil", "tf": {"key": "a", "cmp": "ex"}}, False),
    ],
)
async def test_what_is_agreed(format: str, channel: str, request_: dict[str, Any], agreed: bool) -> None:
    """PROTOCOL 12.1: the result says ``delta`` if it was asked for and is allowed, and no filter with it."""
    async with serving(_spaces(allow_tags_filter=True)) as site:
        client = await Client.connected(site.url, format=format)
        assert (await client.ask("subscribe", channel=channel, **request_)).get("delta", False) is agreed
        await _say(site, channel, b'"hello"', tags={"a": ""})
        data = (await client.push("pub", channel))["data"]
        assert data == ('"hello"' if agreed and format == "json" else "hello")


async def test_an_unknown_kind_of_patch() -> None:
    """PROTOCOL 12.1: disconnected with 3501, whatever the namespace allows."""
    async with serving(_spaces()) as site:
        client = await Client.connected(site.url)
        await client.send(client.command("subscribe", channel="doc:1", delta="bsdiff"))
        assert (await client.closed())[0] == 3501


# --- live: 12.2, 12.3 ----------------------------------------------------------------------
@FORMATS
@pytest.mark.parametrize("crowd", [1, 12])
async def test_patches(format: str, crowd: int) -> None:
    """PROTOCOL 12.3: the first in full, the others as patches; each ends up with exactly the bytes published."""
    async with serving(_spaces()) as site:
        holders = [await Holder.subscribed(site, "doc:1", format) for _ in range(crowd)]
        plain = await Client.connected(site.url, format=format)
        await plain.ask("subscribe", channel="doc:1")
        said = [_text(number) for number in range(5)]
        for data in said:
            await _say(site, "doc:1", data)
        for holder in holders:
            assert await holder.hear(5) == said
            assert holder.kinds == ["full", "patch", "patch", "patch", "patch"]
        heard = await plain.publications("doc:1", 5)
        assert [publication["data"] for publication in heard] == [json.loads(data) for data in said]
        assert not any("delta" in publication for publication in heard)


async def test_exact_bytes() -> None:
    """PROTOCOL 12.2: spaces, key order, escapes and digits are those of the publisher, in full and patched."""
    said = [
        b'{ "b":1.10,\t"a" : "\\u00e9\\/",  "n": 12345678901234567890 , "long": "once upon a time, there was" }',
        b'{ "b":1.20,\t"a" : "\\u00e9\\/",  "n": 12345678901234567891 , "long": "once upon a time, there was" }',
        '{ "b":1.20,\t"a" : "\\u00e9\\/",  "n": 12345678901234567891 , "long": "once upon é time thère was" }'.encode(),
    ]
    async with serving(_spaces()) as site:
        holder = await Holder.subscribed(site, "doc:1")
        for data in said:
            await _say(site, "doc:1", data)
        assert await holder.hear(3) == said
        assert holder.kinds == ["full", "patch", "patch"]


async def test_who_asked_for_no_patch_when_publishing() -> None:
    """PROTOCOL 12.3: published without ``delta`` it goes in full, unless the namespace has ``delta_publish``."""
    async with serving(_spaces()) as site:
        holder, always = [await Holder.subscribed(site, channel) for channel in ("doc:1", "always:1")]
        for number, delta in enumerate([False, False, True, False, True]):
            for channel in ("doc:1", "always:1"):
                await _say(site, channel, _text(number), delta=delta)
        assert await holder.hear(5) == await always.hear(5) == [_text(number) for number in range(5)]
        assert holder.kinds == ["full", "full", "patch", "full", "patch"]
        assert always.kinds == ["full", "patch", "patch", "patch", "patch"]


async def test_a_patch_that_would_be_longer() -> None:
    """PROTOCOL 12.3: where no patch is shorter the payload goes in full, and is the next one's base."""
    said = [
        _text(1),
        b'"short"',
        b'"something else altogether, nothing of which was there"',
        b"[1]",
        _text(1),
        _text(2),
    ]
    async with serving(_spaces()) as site:
        holder = await Holder.subscribed(site, "doc:1")
        for data in said:
            await _say(site, "doc:1", data)
        assert await holder.hear(6) == said
        assert holder.kinds == ["full", "full", "full", "full", "full", "patch"]


@pytest.mark.parametrize("crowd", [1, 12])
async def test_who_comes_later(crowd: int) -> None:
    """PROTOCOL 12.3: a new one gets the next in full while the others get a patch; then all get the same."""
    async with serving(_spaces()) as site:
        early = [await Holder.subscribed(site, "doc:1") for _ in range(crowd)]
        await _say(site, "doc:1", _text(1))
        late = [await Holder.subscribed(site, "doc:1") for _ in range(crowd)]
        # The second one reaches the feed while the first is still on its way out of it.
        await asyncio.gather(*(_say(site, "doc:1", _text(number)) for number in (2, 3, 4)))
        for holder in early:
            assert await holder.hear(4) == [_text(number) for number in (1, 2, 3, 4)]
            assert holder.kinds == ["full", "patch", "patch", "patch"]
        for holder in late:
            assert await holder.hear(3) == [_text(number) for number in (2, 3, 4)]
            assert holder.kinds == ["full", "patch", "patch"]
        assert len(site.node.hub.feeds["doc:1"].live) == 1


async def test_passing_channels() -> None:
    """PROTOCOL 12.3: without numbers nothing is known to come before anything: always in full, as text."""
    async with serving(_spaces()) as site:
        holder = await Holder.subscribed(site, "tick:1")
        for number in range(3):
            await _say(site, "tick:1", _text(number))
        assert await holder.hear(3) == [_text(number) for number in range(3)]
        assert holder.kinds == ["full"] * 3


async def test_what_passes_through_a_kept_channel() -> None:
    """PROTOCOL 12.3: ``skip_history`` goes in full, and is what the client holds then."""
    async with serving(_spaces()) as site:
        holder = await Holder.subscribed(site, "doc:1")
        said = [(_text(1), False), (_text(20), True), (_text(3), False), (_text(40), True)]
        for data, skip in said:
            await _say(site, "doc:1", data, skip_history=skip)
        assert await holder.hear(4) == [data for data, _ in said]
        assert holder.kinds == ["full", "full", "patch", "full"]


async def test_nothing_is_held_for_nobody() -> None:
    """The last payload is kept in memory only while somebody needs it as a base."""
    async with serving(_spaces()) as site:
        plain, holder = await Client.connected(site.url), await Holder.subscribed(site, "doc:1")
        await plain.ask("subscribe", channel="doc:1")
        await _say(site, "doc:1", _text(1))
        assert site.node.hub.feeds["doc:1"].base == _text(1)
        await holder.client.ask("unsubscribe", channel="doc:1")
        assert site.node.hub.feeds["doc:1"].base is None


# --- recovery: 12.4 ---------------------------------------------------------------------------
@FORMATS
async def test_recovery(format: str) -> None:
    """PROTOCOL 12.4: in a reply the first one is in full, the rest are patches, however they were published; the live
    ones go on from there."""
    async with serving(_spaces()) as site:
        for number in range(1, 6):
            await _say(site, "doc:1", _text(number), delta=False)
        holder = await Holder.subscribed(site, "doc:1", format, recover=True, offset=1)
        assert holder.result["delta"] is True
        assert holder.held == [_text(number) for number in range(2, 6)]
        assert holder.kinds == ["full", "patch", "patch", "patch"]
        await _say(site, "doc:1", _text(6))
        assert await holder.hear(1) == [_text(6)]


@FORMATS
async def test_a_long_recovery(format: str) -> None:
    """PROTOCOL 12.4: what follows behind the reply goes on in patches, over pages and into the live ones."""
    async with serving(_spaces()) as site:
        for number in range(1, 251):
            await _say(site, "doc:1", _text(number))
        holder = await Holder.subscribed(site, "doc:1", format, recover=True)
        await holder.hear(150)
        await _say(site, "doc:1", _text(251))
        await holder.hear(1)
        assert holder.held == [_text(number) for number in range(1, 252)]
        assert holder.kinds[0] == "full"
        assert set(holder.kinds[1:250]) == {"patch"}


async def test_a_recovery_that_meets_the_live_ones() -> None:
    """PROTOCOL 12.4: who recovered up to where the others stand gets the same patch as they do, at once."""
    async with serving(_spaces()) as site:
        other = await Holder.subscribed(site, "doc:1")
        await _say(site, "doc:1", _text(1))
        await _say(site, "doc:1", _text(2))
        await other.hear(2)
        back = await Holder.subscribed(site, "doc:1", recover=True)
        await _say(site, "doc:1", _text(3))
        assert await back.hear(1) == await other.hear(1) == [_text(3)]
        assert (back.kinds, other.kinds) == (["full", "patch", "patch"], ["full", "patch", "patch"])


async def test_nothing_missed_is_no_base() -> None:
    """PROTOCOL 12.4: recovered without publications, the next one comes in full, whatever the client still holds."""
    async with serving(_spaces()) as site:
        other = await Holder.subscribed(site, "doc:1")
        await _say(site, "doc:1", _text(1))
        await other.hear(1)
        back = await Holder.subscribed(site, "doc:1", recover=True, offset=1)
        assert (back.result["recovered"], back.held) == (True, [])
        await _say(site, "doc:1", _text(2))
        assert await back.hear(1) == await other.hear(1) == [_text(2)]
        assert (back.kinds, other.kinds) == (["full"], ["full", "patch"])


async def test_an_erased_payload() -> None:
    """PROTOCOL 12.3: live ones hold what was erased since, who recovers does not; each gets what fits that."""
    async with serving(_spaces()) as site:
        other = await Holder.subscribed(site, "doc:1")
        await _say(site, "doc:1", _text(1))
        await other.hear(1)
        await site.node.redact("doc:1", 1)
        back = await Holder.subscribed(site, "doc:1", recover=True)
        assert back.held == [b"null"]
        await _say(site, "doc:1", _text(2))
        assert await back.hear(1) == await other.hear(1) == [_text(2)]
        assert (back.kinds, other.kinds) == (["full", "full"], ["full", "patch"])


async def test_a_hole() -> None:
    """PROTOCOL 12.3: what is read from history to fill a hole comes in full, and patches go on behind it."""
    async with serving(_spaces()) as site:
        holder = await Holder.subscribed(site, "doc:1")
        await _say(site, "doc:1", _text(1))
        history = site.node.history
        loud, history.on_commit = history.on_commit, lambda *_: None
        await _say(site, "doc:1", _text(2))
        await _say(site, "doc:1", _text(3))
        history.on_commit = loud
        await _say(site, "doc:1", _text(4))
        await holder.hear(4)
        await _say(site, "doc:1", _text(5))
        await holder.hear(1)
        assert holder.held == [_text(number) for number in (1, 2, 3, 4, 5)]
        assert holder.kinds[:3] == ["full", "full", "full"]
        assert holder.kinds[4] == "patch"


# --- payloads that are no JSON: 12.2, 9.4 --------------------------------------------------------
async def test_binary_payloads() -> None:
    """PROTOCOL 12.2, 9.4.2: Protobuf gets patches of any bytes, JSON the exact text; what is none ends it with 3506."""
    said = [b'{"a": \n1, "b": "a text that is long enough"}', b'{"a": \n2, "b": "a text that is long enough"}']
    binary = [bytes(range(256)), bytes(range(1, 256)), b"\xff" + bytes(range(2, 256))]
    async with serving(_spaces()) as site:
        text = await Holder.subscribed(site, "raw:1")
        for data in said:
            await _say(site, "raw:1", data)
        assert await text.hear(2) == said
        assert text.kinds == ["full", "patch"]
        raw = await Holder.subscribed(site, "raw:1", "protobuf")
        await _say(site, "raw:1", binary[0])
        assert (await text.client.closed())[0] == 3506
        for data in binary:
            await _say(site, "raw:1", data)
        assert await raw.hear(4) == [binary[0], *binary]
        assert raw.kinds == ["full", "full", "patch", "patch"]
        late = await Client.connected(site.url)
        await late.send(late.command("subscribe", channel="raw:1", recover=True, delta="fossil"))
        assert (await late.closed())[0] == 3506
