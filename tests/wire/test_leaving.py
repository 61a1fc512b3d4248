"""A server that goes away: not ready, still there, then client by client.  PROTOCOL 17.0.3."""

import asyncio
import signal
from asyncio import FIRST_COMPLETED
from pathlib import Path
from typing import Any

from hopper import ask, head_of, read_head, vanish
from support import PATIENCE_S, Client, Process, config

HANDSHAKE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}
GRACE_S = 30
"""Longer than a test has patience for: what ends it is what the test does."""


def _config(**shutdown: Any) -> dict[str, Any]:
    return config(shutdown={"grace": f"{GRACE_S}s", **shutdown})


async def _until_it_leaves(server: Process) -> dict[str, Any]:
    """Wait until readiness says that it goes away; what it says."""
    async with asyncio.timeout(PATIENCE_S):
        while (reply := await ask(server.port, "/health/ready")).status == 200:
            continue
    assert reply.status == 503
    found: dict[str, Any] = reply.json
    return found


async def _end(server: Process) -> int:
    return await asyncio.to_thread(server.wait)


async def test_not_ready_first_and_still_there(tmp_path: Path) -> None:
    """From SIGTERM on it is not ready and says why; newcomers are served as before; a second one is at once."""
    with Process(tmp_path, _config()) as server:
        old = await Client.connected(server.url)
        server.send(signal.SIGTERM)
        assert await _until_it_leaves(server) == {"ready": False, "reasons": {"server": "the server is going away"}}
        assert (await ask(server.port, "/health/live")).status == 200
        new = await Client.connected(server.url)
        await new.ask("subscribe", channel="chat:a")
        await old.ask("publish", channel="chat:a", data="still here")
        assert (await new.push("pub", "chat:a"))["data"] == "still here"
        server.send(signal.SIGTERM)
        assert await old.closed() == await new.closed() == (3001, "shutdown")
        assert await _end(server) == 0


async def test_a_terminal_has_no_grace(tmp_path: Path) -> None:
    """SIGINT does not wait for anybody to see that it is not ready."""
    with Process(tmp_path, _config()) as server:
        client = await Client.connected(server.url)
        server.send(signal.SIGINT)
        assert await client.closed() == (3001, "shutdown")
        assert await _end(server) == 0


async def test_clients_go_one_by_one(tmp_path: Path) -> None:
    """At a pace of one a second the others are served while one is sent away; a second signal sends them all."""
    with Process(tmp_path, _config(grace="0s", pace=1, timeout="300s")) as server:
        clients = [await Client.connected(server.url) for _ in range(8)]
        ends = [asyncio.create_task(client.closed()) for client in clients]
        server.send(signal.SIGTERM)
        _, waiting = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        assert len(waiting) >= 4
        left = next(client for client, end in zip(clients, ends, strict=True) if not end.done())
        await left.ask("publish", channel="chat:a", data=1)
        server.send(signal.SIGTERM)
        assert {end.result() for end in (await asyncio.wait(ends))[0]} == {(3001, "shutdown")}
        assert await _end(server) == 0


async def test_they_go_in_random_order(tmp_path: Path) -> None:
    """Who came first is not always sent away first (once in 40,320 runs it would be so by chance)."""
    with Process(tmp_path, _config(grace="0s", pace=20)) as server:
        clients = [await Client.connected(server.url) for _ in range(8)]
        gone: list[int] = []

        async def wait(number: int) -> None:
            await clients[number].closed()
            gone.append(number)

        server.send(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(*map(wait, range(8)))
        assert sorted(gone) == list(range(8)) != gone
        assert await _end(server) == 0


async def test_who_does_not_read_holds_nobody_up(tmp_path: Path) -> None:
    """A client that is owed much and takes nothing is cut; the server ends long before its timeout."""
    with Process(tmp_path, _config(grace="0s", timeout="300s")) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1)
        writer.write(
            b"GET /connection/websocket HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        commands = b'{"id":1,"connect":{}}\n{"id":2,"subscribe":{"channel":"live:a"}}'
        writer.write(bytes((0x81, 0x80 | len(commands), 0, 0, 0, 0)) + commands)
        talker = await Client.connected(server.url)
        async with asyncio.timeout(PATIENCE_S):
            while not (await talker.ask("presence_stats", channel="live:a"))["num_clients"]:
                continue
        filling = {"channel": "live:a", "data": "x" * 50_000}
        for _ in range(60):
            await talker.ask("publish", **filling)
        server.send(signal.SIGTERM)
        assert await talker.closed() == (3001, "shutdown")
        async with asyncio.timeout(PATIENCE_S):
            assert await _end(server) == 0
        writer.close()
        assert "Traceback" not in server.log.read_text()


async def test_a_kept_connection_lets_nobody_in(tmp_path: Path) -> None:
    """What a proxy has kept open is no way in any more: a handshake there is 503 once clients are sent away."""
    with Process(tmp_path, _config(grace="0s", pace=1, timeout="300s")) as server:
        clients = [await Client.connected(server.url) for _ in range(3)]
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            writer.write(head_of("GET", "/health/live", {}))
            assert (await read_head(reader))[0] == 200
            await reader.readexactly(len("{}"))
            server.send(signal.SIGTERM)
            await asyncio.wait([asyncio.create_task(one.closed()) for one in clients], return_when=FIRST_COMPLETED)
            writer.write(head_of("GET", "/connection/websocket", HANDSHAKE))
            assert (await read_head(reader))[0] == 503
        finally:
            await vanish(writer)
        server.send(signal.SIGTERM)
        for client in clients:
            assert await client.closed() == (3001, "shutdown")
        assert await _end(server) == 0
