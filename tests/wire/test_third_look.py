"""Faults that a third reading found, each with its story; PROTOCOL 9.4, 11.6, 17.0.3."""

import asyncio
import base64
import signal
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hopper import ask, events, head_of, read_head
from support import KEPT, Client, Process, config, serving, settings
from test_leaving import HANDSHAKE
from test_rest_events import SlowPresence

from handlers import deflate, frames
from handlers.origins import origin_allowed
from server.history import Draft
from server.history.memory import MemoryHistory
from server.node import Node
from server.settings import Settings
from server.stream import Page

KEY = {"X-API-Key": "api-key"}


# --- what JSON cannot say ------------------------------------------------------------------
async def test_who_catches_up_with_what_is_no_json(tmp_path: Path) -> None:
    """PROTOCOL 9.4: what a JSON client cannot be told, behind the first page of its recovery, ends it with 3506.

    It was tried again and again within one turn of the loop, where the pages came from
    memory: no connection of the process was served any more, for ever.
    """
    binary = {"name": "bin", **KEPT, "publication_data_format": "binary"}
    with Process(tmp_path, config(channel={"namespaces": [binary, {"name": "chat", **KEPT}]})) as server:
        holder = await Client.connected(server.url, format="protobuf")
        await holder.ask("subscribe", channel="bin:1")
        for number in range(120):
            data = b"\x00\xff" if number == 110 else b"%d" % number
            body = {"channel": "bin:1", "b64data": base64.b64encode(data).decode()}
            assert (await ask(server.port, "/api/publish", body=body, headers=KEY)).status == 200
        late, neighbour = await Client.connected(server.url), await Client.connected(server.url)
        result = await late.ask("subscribe", channel="bin:1", recover=True)
        assert len(result["publications"]) == 100
        try:
            assert await late.closed() == (3506, "inappropriate protocol")
            heard = [push["pub"]["offset"] for push in late.pushes]
            assert heard == list(range(101, 111))
            await neighbour.ask("publish", channel="chat:1", data="still served")
        except TimeoutError:
            server.kill()
            raise


# --- the newest publication ---------------------------------------------------------------------
def _scores(**options: Any) -> Settings:
    cache = {**KEPT, "force_recovery_mode": "cache", "allow_tags_filter": True, **options}
    return settings(channel={"namespaces": [{"name": "score", **cache}]})


async def _say(node: Node, channel: str, *numbers: int, **tags: str) -> None:
    for number in numbers:
        await node.publish(channel, node.channels.known(channel), Draft(b"%d" % number, tags=tags or None))


async def test_the_newest_one_that_others_have_not_heard_of() -> None:
    """PROTOCOL 11.6.1: the newest publication is recovered although its announcement has not come here yet.

    What the process remembered of the channel ended before it, and passed for a channel of
    which nothing is kept: ``recovered`` was false, and there was no publication.
    """
    async with serving(_scores()) as site:
        early, late = await Client.connected(site.url), await Client.connected(site.url)
        await early.ask("subscribe", channel="score:1")
        await _say(site.node, "score:1", 1, 2, 3, 4)
        await early.publications("score:1", 4)
        # As another process would: it is durable, and this one has not been told.
        history, announce = site.node.history, site.node.history.on_commit
        history.on_commit = lambda channel, epoch, publications: None
        await _say(site.node, "score:1", 5)
        history.on_commit = announce
        result = await late.ask("subscribe", channel="score:1", recover=True)
        assert (result["recovered"], result["offset"]) == (True, 4)
        assert [pub["data"] for pub in result["publications"]] == [5]
        await _say(site.node, "score:1", 6)
        assert (await late.push("pub"))["data"] == 6
        assert [pub["data"] for pub in await early.publications("score:1", 2)] == [5, 6]


class Overtaken(MemoryHistory):
    """Somebody publishes behind the look at the top that a subscription begins with."""

    meanwhile: Callable[[], Awaitable[None]] | None = None

    async def read(self, *arguments: Any, **options: Any) -> Page:
        """See ``MemoryHistory.read``."""
        page = await super().read(*arguments, **options)
        if options.get("limit") == 0 and self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            await meanwhile()
        return page


async def test_what_is_published_while_the_newest_is_looked_for() -> None:
    """PROTOCOL 11.6.5: what comes while somebody subscribes follows as pushes, each of it.

    Of what came between the look at the top and the reading of a page all but the last was
    passed over.
    """
    history = Overtaken(idempotency_ttl_ms=86_400_000)
    async with serving(_scores(), history=history) as site:
        await _say(site.node, "score:1", 1, 2, 3)
        history.meanwhile = lambda: _say(site.node, "score:1", 4, 5, 6)
        client = await Client.connected(site.url)
        result = await client.ask("subscribe", channel="score:1", recover=True)
        assert ([pub["data"] for pub in result["publications"]], result["offset"]) == ([3], 2)
        await _say(site.node, "score:1", 7)
        assert [pub["offset"] for pub in await client.publications("score:1", 4)] == [4, 5, 6, 7]


async def test_the_newest_that_matches_comes_once() -> None:
    """PROTOCOL 11.6.4: who comes back from the newest publication that matches is not sent it again.

    Its position is not the top, since what does not match stands behind it.
    """
    async with serving(_scores()) as site:
        await _say(site.node, "score:1", 1, lang="de")
        await _say(site.node, "score:1", 2, 3, lang="en")
        client = await Client.connected(site.url)
        wish = {"channel": "score:1", "recover": True, "tf": {"key": "lang", "cmp": "eq", "val": "de"}}
        result = await client.ask("subscribe", **wish)
        assert ([pub["offset"] for pub in result["publications"]], result.get("offset")) == ([1], None)
        await client.ask("unsubscribe", channel="score:1")
        again = await client.ask("subscribe", **wish, offset=1, epoch=result["epoch"])
        assert (again["recovered"], again["offset"], again.get("publications")) == (True, 3, None)
        await _say(site.node, "score:1", 4, lang="de")
        assert (await client.push("pub"))["offset"] == 4
        assert not client.pushes


async def test_pages_from_memory_are_not_all_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """PROTOCOL 11.5: who catches up from memory takes a page in a turn of the loop, and others have theirs between.

    With a filter that costs much and lets nothing pass, 40 pages held everybody up for 30 ms,
    at each subscribe.
    """
    spaces = [{"name": "chat", **KEPT, "allow_tags_filter": True}]
    async with serving(settings(channel={"namespaces": spaces})) as site:
        live, late = await Client.connected(site.url), await Client.connected(site.url)
        await live.ask("subscribe", channel="chat:1")
        await _say(site.node, "chat:1", *range(1000))
        feed, loop = site.node.hub.feeds["chat:1"], asyncio.get_running_loop()
        assert len(feed.tail) == 1000
        turn, pages = 0, []

        def next_turn() -> None:
            nonlocal turn
            turn += 1
            ticking[:] = [loop.call_soon(next_turn)]

        send = site.node.hub.send

        def counted(*arguments: Any) -> bool:
            pages.append(turn)
            return send(*arguments)

        ticking = [loop.call_soon(next_turn)]
        monkeypatch.setattr(site.node.hub, "send", counted)
        wish = {"op": "not", "nodes": [{"key": "a", "cmp": "nex"}]}
        epoch = feed.cursor.epoch if feed.cursor is not None else ""
        await late.ask("subscribe", channel="chat:1", recover=True, epoch=epoch, tf=wish)
        await _say(site.node, "chat:1", 1000, a="x")
        assert (await late.push("pub"))["data"] == 1000
        ticking[0].cancel()
        assert len(set(pages)) == len(pages) >= 9


# --- what was erased -------------------------------------------------------------------------------
class Slow(MemoryHistory):
    """Its next page takes its time, once ``goes_on`` is there: what it says is then what was."""

    goes_on: asyncio.Event | None = None

    def __init__(self) -> None:
        super().__init__(idempotency_ttl_ms=86_400_000)
        self.has_read = asyncio.Event()

    async def read(self, *arguments: Any, **options: Any) -> Page:
        """See ``MemoryHistory.read``."""
        page = await super().read(*arguments, **options)
        goes_on, self.goes_on = self.goes_on, None
        if goes_on is not None:
            self.has_read.set()
            await goes_on.wait()
        return page


async def test_what_is_erased_while_it_is_read() -> None:
    """PROTOCOL 15.2: a payload that is redacted while a page of it is on its way is handed out to nobody.

    The page came in behind the order to forget, was given to who had asked for it, and
    remembered for those who came after.
    """
    history = Slow()
    async with serving(history=history) as site:
        live, first, second = [await Client.connected(site.url) for _ in range(3)]
        await live.ask("subscribe", channel="chat:1")
        await _say(site.node, "chat:1", 1, 22222, 3)
        await live.publications("chat:1", 3)
        site.pass_time(3)  # nothing of it is remembered
        history.goes_on = goes_on = asyncio.Event()
        asking = asyncio.create_task(first.ask("subscribe", channel="chat:1", recover=True))
        await history.has_read.wait()
        await site.node.redact("chat:1", 2)
        goes_on.set()
        result = await asking
        assert [pub.get("data") for pub in result["publications"]] == [1, None, 3]
        result = await second.ask("subscribe", channel="chat:1", recover=True, epoch=result["epoch"])
        assert [pub.get("data") for pub in result["publications"]] == [1, None, 3]


async def test_what_is_erased_while_its_reader_is_entered() -> None:
    """PROTOCOL 15.2: nor is one that is redacted between the page and the reply, as when presence takes its time."""
    presence = SlowPresence()
    async with serving(presence=presence) as site:
        returning = await Client.connected(site.url)
        await _say(site.node, "chat:1", 1, 22222, 3)
        asking = asyncio.create_task(returning.ask("subscribe", channel="chat:1", recover=True))
        await presence.asked.wait()
        await site.node.redact("chat:1", 2)
        presence.open_door.set()
        assert [pub.get("data") for pub in (await asking)["publications"]] == [1, None, 3]
        await returning.close()


# --- going away ------------------------------------------------------------------------------------
async def test_who_connects_while_clients_are_sent_away() -> None:
    """PROTOCOL 17.0.3: whose handshake is older, and who connects when clients are sent away, is sent away as well.

    It was let in behind those who were told to go, and then cut without a word.
    """
    async with serving() as site:
        client = await Client.open(site.url)
        poll = asyncio.create_task(ask(site.port, "/v1/channels/chat:1/publications?since=:0"))
        assert (await poll).status == 200
        site.node.leaving = True
        await client.send(client.command("connect"))
        assert await client.closed() == (3001, "shutdown")
        waiting = await ask(site.port, "/v1/channels/chat:1/publications?since=:0", headers={"Prefer": "wait=30"})
        assert (waiting.status, waiting.json["code"]) == (503, 3001)
        async with events(site.port, "/v1/channels/chat:1/events", {"Last-Event-ID": ":0"}) as stream:
            assert await stream.put_off() == 3001
        assert not site.node.connections


BOT = "from server.app import App\napp = App()\n"


async def test_a_signal_while_it_starts_anew(tmp_path: Path) -> None:
    """SIGTERM ends a server with --reload also while it sends its clients away because of a change.

    It heard the signal, and started anew.
    """
    bot = tmp_path / "bot.py"
    bot.write_text(BOT)
    pace = config(shutdown={"grace": "0s", "pace": 2, "timeout": "300s"})
    with Process(tmp_path, pace, "--app", str(bot), "--reload") as server:
        clients = [await Client.connected(server.url) for _ in range(8)]
        ends = [asyncio.create_task(client.closed()) for client in clients]
        bot.write_text(BOT + "# changed\n")
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        server.send(signal.SIGTERM)
        assert await asyncio.to_thread(server.wait) == 0
        for end in ends:
            assert await end == (3001, "shutdown")


# --- what comes behind a goodbye ---------------------------------------------------------------------
async def test_compressed_messages_behind_a_goodbye(monkeypatch: pytest.MonkeyPatch) -> None:
    """PROTOCOL 2.3.11: what a client sends behind its end is unpacked no faster than what came before it.

    Only messages that were wanted counted: 600 of 100 bytes each, which become 64 KB each,
    held everybody up for 80 ms.
    """
    unpacked: list[int] = []

    def counted(data: bytes, most: int) -> bytes | None:
        unpacked.append(turn)
        return deflate.inflate(data, most)

    monkeypatch.setattr(frames, "inflate", counted)
    turn, loop = 0, asyncio.get_running_loop()

    def next_turn() -> None:
        nonlocal turn
        turn += 1
        ticking[:] = [loop.call_soon(next_turn)]

    async with serving(settings(websocket={"compression": True})) as site:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
        offer = {**HANDSHAKE, "Sec-WebSocket-Extensions": "permessage-deflate"}
        writer.write(head_of("GET", "/connection/websocket", offer))
        assert (await read_head(reader))[0] == 101
        packed = zlib.compress(b"x" * 65_000, wbits=-15)
        ticking = [loop.call_soon(next_turn)]
        writer.write(_masked(0xC1, packed) * 40 + _masked(0x88, b""))
        said = await reader.read()
        ticking[0].cancel()
        assert said[2:4] == (3501).to_bytes(2, "big")
        assert len(unpacked) == len(set(unpacked)) == 40
        writer.close()


def _masked(first: int, payload: bytes) -> bytes:
    """A short frame of a client."""
    return bytes((first, 0x80 | len(payload), 0, 0, 0, 0)) + payload


# --- what is no origin ---------------------------------------------------------------------------------
def test_an_origin_of_any_length() -> None:
    """PROTOCOL 2.2.2: what is too long for an origin is none, and costs nothing.

    Under a pattern with two ``*`` a header of 60 KB took a second of everybody's time, before
    anybody had shown who they are.
    """
    pattern = "https://*.example.com:*"
    assert origin_allowed(f"https://{'a' * 200}.example.com:65535", [pattern])
    longer = f"https://{'a' * 600}.example.com:65535"
    assert not origin_allowed(longer, [pattern])
    assert origin_allowed(longer, [pattern, "*"])
    assert not origin_allowed("https://" + ".example.com:" * 4_600 + "@", [pattern])
