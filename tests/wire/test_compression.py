"""PROTOCOL 2.3.11: messages are compressed for who offers it, where that is switched on."""

import asyncio
import json
import zlib
from typing import Any

import pytest
import websockets
from conftest import ExpectedLog
from support import Client, serving, settings
from websockets.asyncio.client import ClientConnection
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory, PerMessageDeflate
from websockets.frames import Frame

from handlers.deflate import Deflate
from handlers.frames import COMPRESSED, FIN, TEXT
from handlers.socket import DeflatedWire
from server.protobuf import Command, Reply, prefixed, split
from server.protocol import JSON
from server.settings import Settings

PATIENCE_S = 15.0
LONG = {"text": "all work and no play makes jack a dull boy. " * 40}


def compressing(**websocket: Any) -> Settings:
    """A configuration with compression."""
    return settings(websocket={"compression": True, **websocket})


async def deflating(url: str, **offer: Any) -> ClientConnection:
    """A client that offers compression."""
    return await websockets.connect(url, extensions=[ClientPerMessageDeflateFactory(**offer)], compression=None)


def agreed(connection: ClientConnection) -> PerMessageDeflate | None:
    """What was agreed on."""
    found = connection.protocol.extensions
    assert all(isinstance(extension, PerMessageDeflate) for extension in found)
    return found[0] if found else None  # type: ignore[return-value]


def masked(first: int, payload: bytes) -> bytes:
    """A frame of a client below 64 KB, masked with zeros; ``first`` is its first byte."""
    size = len(payload)
    head = bytes((first, 0x80 | size)) if size < 126 else bytes((first, 0xFE)) + size.to_bytes(2, "big")
    return head + bytes(4) + payload


async def ask(connection: ClientConnection, **command: Any) -> dict[str, Any]:
    """Send a command; the next message."""
    await connection.send(json.dumps(command))
    async with asyncio.timeout(PATIENCE_S):
        return dict(json.loads(await connection.recv()))


@pytest.mark.parametrize(
    "offer",
    [
        {},
        {"client_max_window_bits": True},
        {"server_max_window_bits": 12, "client_max_window_bits": 12},
        {"server_no_context_takeover": True, "client_no_context_takeover": True},
    ],
)
async def test_both_ways(offer: dict[str, Any]) -> None:
    """A client that offers compression sends and gets compressed messages, and each stands for itself."""
    async with serving(compressing()) as site:
        client = await deflating(site.url, **offer)
        extension = agreed(client)
        assert extension is not None
        assert extension.remote_no_context_takeover
        assert extension.local_no_context_takeover
        await ask(client, id=1, connect={})
        await ask(client, id=2, subscribe={"channel": "live:a"})
        for number in (3, 4):
            await client.send(json.dumps({"id": number, "publish": {"channel": "live:a", "data": LONG}}))
            async with asyncio.timeout(PATIENCE_S):
                pub, reply = json.loads(await client.recv()), json.loads(await client.recv())
            assert pub["push"]["pub"]["data"] == LONG
            assert reply == {"id": number, "publish": {}}
        await client.close()


async def test_off_by_default() -> None:
    """Nobody is compressed for unless websocket.compression is set, and nobody who did not offer it."""
    async with serving() as site:
        client = await deflating(site.url)
        assert agreed(client) is None
        await client.close()
    async with serving(compressing()) as site:
        client = await websockets.connect(site.url, compression=None)
        assert agreed(client) is None
        assert (await ask(client, id=1, connect={}))["id"] == 1
        await client.close()


async def test_offer_beyond_us() -> None:
    """A client that wants a smaller window than ours is served without compression."""
    async with serving(compressing()) as site:
        client = await deflating(site.url, server_max_window_bits=9)
        assert agreed(client) is None
        assert (await ask(client, id=1, connect={}))["id"] == 1
        await client.close()


class Counting(Deflate):
    """Keeps what it has compressed."""

    def __init__(self) -> None:
        super().__init__(1, 256)
        self.made: list[bytes] = []

    def compress(self, message: bytes) -> bytes | None:
        """See ``Deflate.compress``."""
        made = super().compress(message)
        if made is not None:
            self.made.append(made)
        return made


async def test_once_for_all() -> None:
    """A publication is compressed once, however many get it; those without compression get it as it is."""
    counting = Counting()
    async with serving(compressing()) as site:
        site.sockets._deflated["json"] = DeflatedWire(JSON, counting, queue_max_size=1 << 20, stall_timeout_s=10.0)
        clients = [await deflating(site.url) for _ in range(12)]
        for client in clients:
            await ask(client, id=1, connect={})
            await ask(client, id=2, subscribe={"channel": "live:a"})
        plain = await Client.connected(site.url)
        await plain.ask("subscribe", channel="live:a")
        counting.made.clear()
        await plain.ask("publish", channel="live:a", data=LONG)
        for client in clients:
            async with asyncio.timeout(PATIENCE_S):
                assert json.loads(await client.recv())["push"]["pub"]["data"] == LONG
            await client.close()
        assert len(counting.made) == 1
        assert len(counting.made[0]) < len(json.dumps(LONG)) / 5
        await plain.close()


async def test_short_ones_as_they_are() -> None:
    """A message below websocket.compression_min_size comes uncompressed."""
    seen: list[bool] = []

    class Watching(PerMessageDeflate):
        def decode(self, frame: Frame, *, max_size: int | None = None) -> Frame:
            seen.append(frame.rsv1)
            return super().decode(frame, max_size=max_size)

    async with serving(compressing(compression_min_size=1_000)) as site:
        client = await deflating(site.url)
        extension = agreed(client)
        assert extension is not None
        extension.__class__ = Watching
        await ask(client, id=1, connect={})
        await ask(client, id=2, subscribe={"channel": "live:a"})
        await ask(client, id=3, publish={"channel": "live:a", "data": LONG})
        await client.recv()
        assert seen == [False, False, True, False]
        await client.close()


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (zlib.compress(bytes(200_000))[2:-4], 1009),
        (b"\xff\xff\xff\xff", 1007),
    ],
)
async def test_bad_messages(payload: bytes, code: int, log: ExpectedLog) -> None:
    """A bomb is 1009 at websocket.message_size_limit, whatever it would become; what is no DEFLATE is 1007."""
    log.expect("connection.violated")
    async with serving(compressing()) as site:
        client = await deflating(site.url)
        client.transport.write(masked(FIN | COMPRESSED | TEXT, payload))
        async with asyncio.timeout(PATIENCE_S):
            with pytest.raises(websockets.ConnectionClosed) as caught:
                await client.recv()
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == code


async def test_fragments_with_a_ping_between() -> None:
    """A compressed message may come in fragments, and a ping between them is answered before it is whole."""
    async with serving(compressing()) as site:
        client = await deflating(site.url)
        compressor = zlib.compressobj(wbits=-15)
        data = compressor.compress(b'{"id":1,"connect":{}}') + compressor.flush(zlib.Z_SYNC_FLUSH)
        first, second = data[:5], data[5:-4]
        client.transport.write(masked(COMPRESSED | TEXT, first))
        async with asyncio.timeout(PATIENCE_S):
            await (await client.ping(b"between"))
            client.transport.write(masked(FIN, second))
            assert json.loads(await client.recv())["id"] == 1
        await client.close()


async def test_protobuf() -> None:
    """Protobuf is compressed no otherwise: a binary frame, of which what is inside is what it was."""
    async with serving(compressing(compression_min_size=0)) as site:
        client = await deflating(f"{site.url}?format=protobuf")
        assert agreed(client) is not None
        command = Command(id=1)
        command.connect.SetInParent()
        await client.send(prefixed(command.SerializeToString()))
        async with asyncio.timeout(PATIENCE_S):
            message = await client.recv()
        assert isinstance(message, bytes)
        assert Reply.FromString(split(message, 1)[0]).id == 1
        await client.close()


async def test_not_one_way() -> None:
    """The one-way WebSocket takes no offer, and its pushes come as they are."""
    chosen = settings(websocket={"compression": True}, uni_websocket={"enabled": True})
    async with serving(chosen) as site:
        client = await deflating(f"ws://127.0.0.1:{site.port}/connection/uni_websocket")
        assert agreed(client) is None
        await client.send("{}")
        async with asyncio.timeout(PATIENCE_S):
            assert "connect" in json.loads(await client.recv())
        await client.close()
