"""A TCP proxy that misbehaves as told: between one of our processes and MongoDB, Redis, or another of ours.

    async with Proxy("127.0.0.1", 6379, resp=True) as proxy:
        connect to proxy.host, proxy.port
        proxy.cut()             reset all connections that are open now (or a share of them: cut(0.5))
        proxy.refuse()          nobody listens any more; open connections go on
        await proxy.accept()    … listens again, on the same port
        proxy.stall()           half-open: connections are accepted, nothing is passed on, nothing is closed
        proxy.flow()            … what was held back is passed on, in order
        proxy.delay_s = 0.1     every byte arrives that much later, either way; order and throughput stay
        proxy.reset_chance = .01  each piece that passes may reset its connection instead
        proxy.lose(0.3)         drop that share of Redis's pub/sub messages on their way to a client (``resp``)
        proxy.target = …        new connections go there

It runs on the loop of whoever opens it, and draws lots from a ``Random`` that
can be given.  ``connections`` counts those that are open, ``accepted`` all so
far, ``passed`` and ``lost`` the pub/sub messages.
"""

import asyncio
import random
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self

from ports import free_port

PIECE = 64 * 1024
HELD_PIECES = 64
"""So much of one direction may wait for a delay or a stall, before the sender is held back as TCP does."""

Held = asyncio.Queue[tuple[float, bytes]]

MESSAGES = (b"message", b"smessage", b"pmessage")


class Proxy:
    """See the module's docstring."""

    def __init__(self, host: str, port: int, *, resp: bool = False, lots: random.Random | None = None) -> None:
        self.host = "127.0.0.1"
        self.port = free_port()
        self.target = (host, port)
        self.delay_s = 0.0
        self.reset_chance = 0.0
        self.accepted = self.passed = self.lost = 0
        self._resp = resp
        self._lots = lots or random.Random()
        self._loss = 0.0
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._pairs: dict[asyncio.Task[None], list[asyncio.StreamWriter]] = {}

    def __repr__(self) -> str:
        return f"<Proxy {self.address} to {self.target[0]}:{self.target[1]}>"

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"{self.host}:{self.port}"

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._pairs)

    # --- what it does to them ---------------------------------------------------
    def cut(self, share: float = 1.0) -> int:
        """Reset open connections, towards both ends; returns how many."""
        chosen = [pair for pair in self._pairs if share >= 1 or self._lots.random() < share]
        for pair in chosen:
            self._reset(pair)
        return len(chosen)

    def refuse(self) -> None:
        """Listen no longer."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def accept(self) -> None:
        """Listen (again)."""
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, self.host, self.port, limit=PIECE)

    def stall(self) -> None:
        """Pass nothing on."""
        self._flowing.clear()

    def flow(self) -> None:
        """Pass everything on (again)."""
        self._flowing.set()

    def lose(self, share: float) -> None:
        """Drop this share of the pub/sub messages from now on."""
        assert self._resp, "only a Proxy(resp=True) knows what a message is"
        self._loss = share

    # --- life ---------------------------------------------------------------------
    async def __aenter__(self) -> Self:
        await self.accept()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.refuse()
        pairs = list(self._pairs)
        for pair in pairs:
            self._reset(pair)
        await asyncio.gather(*pairs, return_exceptions=True)

    # --- one connection -------------------------------------------------------------
    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = asyncio.current_task()
        assert pair is not None
        self._pairs[pair] = [writer]
        self.accepted += 1
        try:
            await self._flowing.wait()
            far_reader, far_writer = await asyncio.open_connection(*self.target, limit=PIECE)
            self._pairs[pair].append(far_writer)
            there, back = Held(HELD_PIECES), Held(HELD_PIECES)
            async with asyncio.TaskGroup() as all_four:
                all_four.create_task(self._take(reader, there))
                all_four.create_task(self._give(pair, there, far_writer, None))
                all_four.create_task(self._take(far_reader, back))
                all_four.create_task(self._give(pair, back, writer, Splitter() if self._resp else None))
        except* (OSError, EOFError):
            pass  # either end is gone, so is the other
        except* asyncio.CancelledError:
            pass  # by _reset; this task is its own, and asyncio's server would log it as a fault
        finally:
            for one in self._pairs.pop(pair):
                one.transport.abort()

    async def _take(self, reader: asyncio.StreamReader, held: Held) -> None:
        """Read pieces, and note when each is due on the other side; the last one is empty."""
        loop = asyncio.get_running_loop()
        while piece := await reader.read(PIECE):
            await held.put((loop.time() + self.delay_s, piece))
        await held.put((loop.time() + self.delay_s, b""))

    async def _give(
        self, pair: "asyncio.Task[None]", held: Held, writer: asyncio.StreamWriter, splitter: "Splitter | None"
    ) -> None:
        """Pass pieces on, each when its time has come; raises ``EOFError`` after the last."""
        loop = asyncio.get_running_loop()
        while True:
            due, piece = await held.get()
            if (wait_s := due - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            await self._flowing.wait()
            if not piece:
                raise EOFError
            if splitter is not None:
                piece = self._thinned(splitter, piece)
            if self.reset_chance and self._lots.random() < self.reset_chance:
                self._reset(pair)
            writer.write(piece)
            await writer.drain()

    def _thinned(self, splitter: "Splitter", piece: bytes) -> bytes:
        kept = []
        for one in splitter.feed(piece):
            if is_message(one):
                if self._loss and self._lots.random() < self._loss:
                    self.lost += 1
                    continue
                self.passed += 1
            kept.append(one)
        return b"".join(kept)

    def _reset(self, pair: "asyncio.Task[None]") -> None:
        """End a connection so that both ends see a reset."""
        for writer in self._pairs.get(pair, ()):
            sock = writer.get_extra_info("socket")
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        pair.cancel()


# --- RESP ------------------------------------------------------------------------
class Splitter:
    """Finds where one value of Redis's protocol (RESP2 or RESP3) ends and the next begins."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The values that are complete now, in order, as they came."""
        rest = self._rest + data
        at = 0
        while (end := _end(rest, at)) >= 0:
            yield rest[at:end]
            at = end
        self._rest = rest[at:]


def _end(data: bytes, at: int) -> int:
    """Where the value that begins ``at`` ends; -1 if it has not come whole."""
    line = data.find(b"\r\n", at)
    if line < 0:
        return -1
    kind, rest = data[at : at + 1], data[at + 1 : line]
    at = line + 2
    if kind in b"$=!":  # a string of that many bytes
        end = at + int(rest) + 2 if int(rest) >= 0 else at
        return end if end <= len(data) else -1
    if kind in b"*>~%|":  # that many values; a map's come in pairs
        for _ in range(int(rest) * (2 if kind in b"%|" else 1)):
            at = _end(data, at)
            if at < 0:
                return -1
        return _end(data, at) if kind == b"|" else at
    return at


def is_message(value: bytes) -> bool:
    """Is this value, in RESP, a message of a pub/sub channel?"""
    if value[:1] not in (b"*", b">"):
        return False
    parts = value.split(b"\r\n", 3)
    return len(parts) > 3 and parts[2] in MESSAGES
