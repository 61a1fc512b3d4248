"""P8: no input of a client, however malformed, large, fast or slow, harms another client.

In each test the offender gets its code while a well-behaved neighbour, who was
there before, goes on publishing and hearing and notices nothing.
"""

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import websockets
from conftest import ExpectedLog
from support import KEPT, OPEN, Client, Process, Site, serving, settings

from server import protobuf
from server.session import Session
from server.settings import Settings

FORMATS = pytest.mark.parametrize("format", ["json", "protobuf"])


class Neighbour:
    """Two well-behaved clients in one kept channel, one of each format, that count on each other."""

    def __init__(self, clients: list[Client]) -> None:
        self.clients = clients
        self.said = 0

    @classmethod
    async def at(cls, site: Site | Process) -> "Neighbour":
        """Connect and subscribe."""
        clients = [await Client.connected(site.url, format=format) for format in ("json", "protobuf")]
        for client in clients:
            await client.ask("subscribe", channel="chat:neighbours")
        return cls(clients)

    async def notices_nothing(self) -> None:
        """Each publishes, is answered, and both hear it next; nothing else has come."""
        for client in self.clients:
            self.said += 1
            assert await client.ask("publish", channel="chat:neighbours", data=self.said) == {}
            for hearer in self.clients:
                pub = await hearer.push("pub", "chat:neighbours")
                assert (pub["offset"], pub["data"]) == (self.said, self.said)
                assert hearer.pushes == []


@asynccontextmanager
async def beside(chosen: Settings | None = None) -> AsyncIterator[tuple[Site, Neighbour]]:
    """A site with a neighbour, who is asked once more at the end."""
    async with serving(chosen) as site:
        neighbour = await Neighbour.at(site)
        await neighbour.notices_nothing()
        yield site, neighbour
        await neighbour.notices_nothing()
        assert len(site.node.hub.feeds["chat:neighbours"].live) == 2


# --- frames that are none ----------------------------------------------------------------
@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize(
    "frame",
    [
        "",
        "\n",
        "   ",
        "hello",
        "{",
        "[]",
        "null",
        '{"id":1}{"id":2}',
        '{"id":7,"history":{"channel":"chat:1"}}\n\n{"id":8,"history":{"channel":"chat:1"}}',
        '{"id":7,"history":{"channel":"chat:1"}}\noops',
        '{"id":NaN}',
        '{"id":7,"publish":{"channel":"chat:1","data":NaN}}',
        '{"id":7,"publish":{"channel":"chat:1","data":' + "[" * 30_000 + "]" * 30_000 + "}}",
        '{"id":7,"novel":' + '{"a":' * 10_000 + "1" + "}" * 10_000 + "}",
        b"\x00\x01\x02",
        b"\xff" * 100,
    ],
    ids=lambda frame: repr(frame[:20]),
)
async def test_frames_that_are_none(frame: str | bytes, connected: bool) -> None:
    """PROTOCOL 2.3: what is not JSON commands is 3501, before connect and after."""
    async with beside() as (site, _):
        offender = await Client.open(site.url)
        if connected:
            await offender.ask("connect")
        await offender.raw(frame)
        assert await offender.closed() == (3501, "bad request")


@pytest.mark.parametrize(
    "frame", [b"", b"\x05", b"\xff\xff\xff\xff\xff\xff", b"\x02\x08", b"\x01\xff", b"\x03\x3a\x7fa", b"{}", "{}"]
)
async def test_protobuf_frames_that_are_none(frame: str | bytes) -> None:
    """PROTOCOL 2.3: truncated and senseless Protobuf is 3501."""
    async with beside() as (site, _):
        offender = await Client.connected(site.url, format="protobuf")
        await offender.raw(frame)
        assert await offender.closed() == (3501, "bad request")


async def test_deep_json_within_a_large_limit() -> None:
    """100,000 brackets, where messages may be that large, are 3501 and no fault."""
    async with beside(settings(websocket={"message_size_limit": 1_000_000})) as (site, _):
        for data in ("[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000):
            for frame in ('{"id":7,"publish":{"channel":"chat:1","data":' + data + "}}", data):
                offender = await Client.connected(site.url)
                await offender.raw(frame)
                assert (await offender.closed())[0] == 3501
        binary = await Client.connected(site.url, format="protobuf")
        await binary.raw(_publishing(7, "chat:1", b"[" * 100_000 + b"]" * 100_000))
        assert (await binary.reply(7))["error"]["code"] == 107


@FORMATS
async def test_too_large(format: str) -> None:
    """PROTOCOL 18: a message above ``websocket.message_size_limit`` is close code 1009, one just below is served."""
    async with beside(settings(websocket={"message_size_limit": 5000})) as (site, _):
        offender = await Client.connected(site.url, format=format)
        await offender.ask("publish", channel="chat:1", data="x" * 4900)
        await offender.send(offender.command("publish", channel="chat:1", data="x" * 5000))
        assert (await offender.closed())[0] == 1009
        reader = await Client.connected(site.url)
        assert (await reader.ask("history", channel="chat:1"))["offset"] == 1


# --- fields of the wrong type ---------------------------------------------------------------
WRONG: dict[str, tuple[Any, ...]] = {
    "string": (1, -1.5, True, [], {}, ["x"]),
    "boolean": (0, 1, "true", "", [], {}),
    "offset": (-1, 2**63, 2**64, 10**40, 1.5, 1e300, "1", True, [], {}),
    "number": ("1", 1.5, True, [], {}),
    "limit": ("1", 1.5, True, [], {}, 2**31, -(2**31) - 1, 2**70, 10**400),
    "object": (1, "x", True, [], [{}]),
}
SUBSCRIBE = {
    "channel": "string",
    "token": "string",
    "recover": "boolean",
    "epoch": "string",
    "offset": "offset",
    "positioned": "boolean",
    "recoverable": "boolean",
    "join_leave": "boolean",
    "delta": "string",
    "flag": "number",
    "type": "number",
}
FIELDS: dict[str, dict[str, str]] = {
    "connect": {"token": "string", "name": "string", "version": "string", "subs": "object", "headers": "object"},
    "subscribe": SUBSCRIBE,
    "unsubscribe": {"channel": "string"},
    "publish": {"channel": "string", "key": "string", "type": "number", "removed": "boolean"},
    "presence": {"channel": "string"},
    "presence_stats": {"channel": "string"},
    "history": {"channel": "string", "limit": "limit", "reverse": "boolean", "since": "object"},
    "rpc": {"method": "string"},
    "refresh": {"token": "string"},
    "sub_refresh": {"channel": "string", "token": "string", "type": "number"},
}


def _wrong_commands(method: str) -> list[dict[str, Any]]:
    good: dict[str, Any] = {"channel": "chat:1"} if "channel" in FIELDS[method] else {}
    commands: list[dict[str, Any]] = [{method: value} for value in WRONG["object"]]
    for field, kind in FIELDS[method].items():
        commands += [{method: {**good, field: value}} for value in WRONG[kind]]
    if method == "connect":
        for field, kind in SUBSCRIBE.items():
            commands += [{"connect": {"subs": {"chat:1": {field: value}}}} for value in WRONG[kind]]
        commands += [{"connect": {"headers": {"x": 1}}}, {"connect": {"subs": {"chat:1": 1}}}]
    if method == "history":
        for field, kind in (("offset", "offset"), ("epoch", "string")):
            commands += [{"history": {"channel": "chat:1", "since": {field: value}}} for value in WRONG[kind]]
    return commands


@pytest.mark.parametrize("method", FIELDS)
async def test_wrong_types(method: str) -> None:
    """Every field of every command with values of every wrong type: 3501 each, and no fault of ours."""
    async with beside() as (site, neighbour):
        commands = _wrong_commands(method)
        for start in range(0, len(commands), 20):
            offenders = [await _offend(site, method, command) for command in commands[start : start + 20]]
            await neighbour.notices_nothing()
            for offender, command in zip(offenders, commands[start : start + 20], strict=True):
                assert (await offender.closed())[0] == 3501, command


async def _offend(site: Site, method: str, command: dict[str, Any]) -> Client:
    offender = await Client.open(site.url)
    if method != "connect":
        await offender.ask("connect")
    await offender.raw(json.dumps({"id": 7, **command}))
    return offender


@pytest.mark.parametrize("id", [-1, 2**32, 10**30, 1.5, "1", True, [], {}, None])
async def test_ids_that_are_none(id: Any) -> None:
    """PROTOCOL 3.1: an id is a number up to 2**32 - 1."""
    async with beside() as (site, _):
        offender = await Client.connected(site.url)
        await offender.raw(json.dumps({"id": id, "history": {"channel": "chat:1"}}))
        assert (await offender.closed())[0] == 3501


@pytest.mark.parametrize("method", ["subscribe", "publish", "presence", "presence_stats", "history", "rpc"])
@pytest.mark.parametrize("name", ["chat:" + "x" * 251, "x" * 60_000, "chat:ä", "chat:\U0001f30a", "nowhere:\x00\n\x7f"])
async def test_odd_names(method: str, name: str) -> None:
    """Names too long, or not ASCII, or of no namespace cost their command only."""
    async with beside() as (site, _):
        offender = await Client.connected(site.url)
        request: dict[str, Any] = {"channel": name}
        if method == "publish":
            request["data"] = 1
        if method == "rpc":
            request = {"method": "publish", "data": {"channel": name, "data": 1}}
        assert await offender.refused(method, **request) in (102, 107)
        assert await offender.ask("unsubscribe", channel=name) == {}
        assert set(site.node.hub.feeds) == {"chat:neighbours"}


async def test_ascii_names_may_hold_anything() -> None:
    """Control characters in a name are names like any other, and do not break a line of the wire."""
    async with beside() as (site, _):
        client = await Client.connected(site.url)
        for name in ("chat:\x00", "chat:\n", 'chat:"\\', "chat: ", "chat:"):
            await client.ask("subscribe", channel=name)
            await client.ask("publish", channel=name, data=1)
            assert (await client.push("pub", name))["offset"] == 1


# --- payloads that are none --------------------------------------------------------------------
def _publishing(id: int, channel: str, data: bytes) -> bytes:
    return protobuf.prefixed(protobuf.Command(id=id, publish={"channel": channel, "data": data}).SerializeToString())


@pytest.mark.parametrize(
    "data",
    [b"\x00\xff", b"{", b'"\xff"', b'"\xc3"', b"NaN", b'"a\nb"', b'"\t"', b'"\\ud800"', b"1 2", b" ", b"[" * 5000],
)
@pytest.mark.parametrize("channel", ["chat:neighbours", "live:1"])
async def test_payloads_that_are_no_json(channel: str, data: bytes) -> None:
    """PROTOCOL 3.3: a Protobuf client's bytes that would break a JSON subscriber are 107, and reach nobody."""
    async with beside() as (site, _):
        watcher = await Client.connected(site.url)
        await watcher.ask("subscribe", channel="live:1")
        offender = await Client.connected(site.url, format="protobuf")
        await offender.raw(_publishing(7, channel, data))
        assert (await offender.reply(7))["error"]["code"] == 107
        rpc = {"method": "publish", "data": b'{"channel":"%s","data":%s}' % (channel.encode(), data)}
        await offender.raw(protobuf.prefixed(protobuf.Command(id=8, rpc=rpc).SerializeToString()))
        assert (await offender.reply(8))["error"]["code"] == 107
        await offender.ask("publish", channel="live:1", data="good")
        assert (await watcher.push("pub"))["data"] == "good"


async def test_a_text_frame_that_is_no_utf8() -> None:
    """RFC 6455 8.1: invalid UTF-8 in a text frame, inside a payload's string, too, is 1007 or 3501, never passed on."""
    async with beside() as (site, _):
        for data in (b'"\xff"', b'"\xed\xa0\x80"', b'"\xc3'):
            offender = await Client.connected(site.url)
            frame = b'{"id":7,"publish":{"channel":"chat:neighbours","data":' + data + b"}}"
            await offender.connection.send(frame, text=True)
            assert (await offender.closed())[0] in (1007, 3501)


@pytest.mark.parametrize("kept", [False, True])
async def test_a_binary_namespace(kept: bool) -> None:
    """PROTOCOL 9.4: bytes reach the Protobuf subscribers; a JSON subscriber who cannot be told is 3506."""
    binary = {"name": "bin", **(KEPT if kept else OPEN), "publication_data_format": "binary"}
    chosen = settings(channel={"namespaces": [binary, {"name": "chat", **KEPT}]})
    async with beside(chosen) as (site, neighbour):
        speaker = await Client.connected(site.url, format="protobuf")
        text, bystander = await Client.connected(site.url), await Client.connected(site.url)
        for client in (speaker, text):
            await client.ask("subscribe", channel="bin:1")
        await bystander.ask("subscribe", channel="bin:2")
        await speaker.raw(_publishing(7, "bin:1", b'{"good":1}\n'))
        assert (await text.push("pub"))["data"] == {"good": 1}
        for id, data in ((8, b"\x00\xff"), (9, b"")):
            await speaker.raw(_publishing(id, "bin:1", data))
            assert "publish" in await speaker.reply(id)
        assert await text.closed() == (3506, "inappropriate protocol")
        heard = await speaker.publications("bin:1", 3)
        assert [pub.get("data", b"") for pub in heard] == [{"good": 1}, b"\x00\xff", b""]
        await neighbour.notices_nothing()
        assert bystander.close_code is None
        if kept:
            late = await Client.open(site.url)
            await late.send(late.command("connect"), late.command("subscribe", channel="bin:1", recover=True))
            assert (await late.closed())[0] == 3506
            asker = await Client.connected(site.url)
            await asker.send(asker.command("history", channel="bin:1", limit=5))
            assert (await asker.closed())[0] == 3506


# --- floods ------------------------------------------------------------------------------------
@FORMATS
async def test_a_flood_of_commands(format: str) -> None:
    """10,000 commands in one go are answered in order; meanwhile a neighbour's publish is answered in a moment."""
    async with beside() as (site, neighbour):
        offender = await Client.connected(site.url, format=format)
        count = 10_000
        first = offender.command("presence_stats", channel="chat:1")["id"]
        commands = [
            {"id": first + number, "presence_stats" if number % 2 else "unsubscribe": {"channel": "chat:1"}}
            for number in range(count)
        ]
        flood = asyncio.create_task(_pour(offender, commands))
        await offender.until(lambda: len(offender.ids) > 100)
        rounds = 0
        while len(offender.ids) < count:
            await neighbour.notices_nothing()
            rounds += 1
        await flood
        assert offender.ids[1:] == list(range(first, first + count))
        assert rounds > 5, "the neighbour had its turns while the flood lasted"


async def _pour(client: Client, commands: list[dict[str, Any]]) -> None:
    for start in range(0, len(commands), 500):
        await client.send(*commands[start : start + 500])


async def test_a_flood_that_is_slow_to_answer() -> None:
    """Thousands of publications to a kept channel from one client: stored in order, and others have turns."""
    async with beside() as (site, neighbour):
        offender = await Client.connected(site.url)
        commands = [offender.command("publish", channel="chat:1", data=number) for number in range(5000)]
        flood = asyncio.create_task(_pour(offender, commands))
        rounds = 0
        while len(offender.ids) < 5001:
            await neighbour.notices_nothing()
            rounds += 1
        await flood
        assert rounds > 5
        page = await offender.ask("history", channel="chat:1", limit=300)
        assert [pub["data"] for pub in page["publications"]] == list(range(300))
        assert page["offset"] == 5000


async def test_many_offenders_at_once() -> None:
    """Fifty clients that break fifty different rules at the same moment are each cut; the neighbours go on."""
    async with beside() as (site, neighbour):
        choice = random.Random(7)
        frames = [json.dumps({"id": 7, **command}) for method in FIELDS for command in _wrong_commands(method)]
        offenders = [await Client.connected(site.url) for _ in range(50)]
        await asyncio.gather(*(offender.raw(choice.choice(frames)) for offender in offenders))
        await neighbour.notices_nothing()
        assert {(await offender.closed())[0] for offender in offenders} == {3501}
        assert len(site.node.sessions) == 2


# --- sockets that only half live -----------------------------------------------------------------
async def test_who_never_says_a_word() -> None:
    """Connections that never send connect are 3502, or closed, after the stale delay, and hold nothing."""
    async with beside() as (site, neighbour):
        mute = [await Client.open(site.url) for _ in range(10)]
        site.pass_time(12)
        assert {await client.closed() for client in mute} == {(3502, "stale")}
        await neighbour.notices_nothing()


async def test_half_a_frame() -> None:
    """A client that stops in the middle of a frame is stale like any other, and its line is closed."""
    async with beside() as (site, _):
        client = await Client.open(site.url)
        await (await client.connection.ping())
        client.connection.transport.write(b"\x81\xfe\x01\x00" + bytes(4) + b'{"id":1,')
        site.pass_time(12)
        # The goodbye of the client ends up in its half frame, so the line is cut when the time for that is over.
        site.sockets.check_stalled(asyncio.get_running_loop().time() + 60)
        assert (await client.closed())[0] == 3502


# --- a reader that stops ---------------------------------------------------------------------------
async def _small(site: Site) -> Client:
    """A client whose socket takes little at a time."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    sock.connect(("127.0.0.1", site.port))
    return await Client.open(site.url, sock=sock)


@pytest.mark.parametrize("channel", ["chat:1", "live:1"])
async def test_a_reader_that_stops(channel: str) -> None:
    """P7: it is cut with 3008, never holds more than its queue, costs the other subscriber nothing, and recovers."""
    limit = 200_000
    async with beside(settings(client={"queue_max_size": limit})) as (site, neighbour):
        writer, other, stopped = await Client.connected(site.url), await Client.connected(site.url), await _small(site)
        hello = await stopped.ask("connect")
        for client in (other, stopped):
            await client.ask("subscribe", channel=channel)
        session = site.node.sessions[hello["client"]]
        assert isinstance(session, Session)
        stopped.connection.transport.pause_reading()
        said = 0
        while not session.closed:
            assert said < 2000, "it was not cut"
            await writer.ask("publish", channel=channel, data=[said, "x" * 50_000])
            said += 1
            assert session.outbox.waiting_bytes <= limit + 60_000
        assert hello["client"] not in site.node.sessions
        await neighbour.notices_nothing()
        assert [pub["data"][0] for pub in await other.publications(channel, said)] == list(range(said))
        stopped.connection.transport.resume_reading()
        assert await stopped.closed() == (3008, "slow")
        heard = [push["pub"]["data"][0] for push in stopped.pushes if "pub" in push]
        assert heard == list(range(len(heard))), "what came before the cut is whole and in order"
        if channel == "chat:1":
            again = await Client.connected(site.url)
            result = await again.ask("subscribe", channel=channel, recover=True, offset=len(heard))
            assert result["recovered"] is True
            missed = result["publications"]
            missed += await again.publications(channel, said - len(heard) - len(missed))
            assert [pub["data"][0] for pub in missed] == list(range(len(heard), said))


async def test_answers_that_nobody_reads() -> None:
    """Who asks and asks and never reads an answer is cut with 3008, and is read no further meanwhile."""
    async with beside(settings(client={"queue_max_size": 200_000})) as (site, neighbour):
        writer = await Client.connected(site.url)
        await writer.ask("publish", channel="live:1", data=1)
        greedy = await _small(site)
        hello = await greedy.ask("connect")
        session = site.node.sessions[hello["client"]]
        assert isinstance(session, Session)
        greedy.connection.transport.pause_reading()
        commands = [greedy.command("presence_stats", channel="live:" + "x" * 30) for _ in range(500)]
        asking = asyncio.create_task(_ask_for_ever(greedy, commands, session))
        while not session.closed:
            await neighbour.notices_nothing()
            assert session.outbox.waiting_bytes <= 300_000
        await asking
        greedy.connection.transport.resume_reading()
        assert (await greedy.closed())[0] == 3008


async def _ask_for_ever(client: Client, commands: list[dict[str, Any]], session: Session) -> None:
    with suppress(websockets.ConnectionClosed):
        while not session.closed:
            await client.send(*commands)
            await asyncio.sleep(0)


async def test_nothing_of_this_was_a_fault(log: ExpectedLog) -> None:
    """Refusals are no warnings: a client cannot fill the operator's log with alarms."""
    async with beside() as (site, _):
        for frame in ("x", '{"id":7,"subscribe":{"channel":"nowhere:1"}}', '{"id":7,"rpc":{"method":"none"}}', "{}"):
            offender = await Client.connected(site.url)
            await offender.raw(frame)
            await offender.until(lambda offender=offender: 7 in offender.ids or offender.close_code is not None)  # type: ignore[misc]
        assert log.unexpected() == []
        assert {fields["code"] for fields in log.seen("command.refused")} == {102, 108}
