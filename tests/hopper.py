"""HTTP as a program without a library speaks it, and a reader that keeps one cursor and no transport.

``ask`` is one request; ``EventStream`` is what a browser's ``EventSource`` does.  ``Hopper`` follows a
channel over all transports in turn: a few publications here, a few there, with nothing in its hands but the
cursor that the last one gave it.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple, Self
from urllib.parse import quote

import pytest
import websockets
from support import PATIENCE_S, Client, Closed


class Reply(NamedTuple):
    """An HTTP answer; the names of ``headers`` are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as a value."""
        return json.loads(self.body)


class Cut(Exception):
    """The connection ended before the answer did."""


# --- HTTP ---------------------------------------------------------------------------
async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """The status and the headers of an answer; raises ``Cut``."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (asyncio.IncompleteReadError, OSError):
        raise Cut("no answer") from None
    lines = head.split("\r\n")
    names = (line.partition(":") for line in lines[1:] if line)
    return int(lines[0].split()[1]), {name.lower(): value.strip() for name, _, value in names}


async def read_chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The pieces of a chunked body (RFC 9112 7.1); raises ``Cut`` if it ends in the middle."""
    try:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            yield (await reader.readexactly(size + 2))[:-2]
    except (asyncio.IncompleteReadError, OSError):
        raise Cut("a cut body") from None


def head_of(method: str, path: str, headers: Mapping[str, str]) -> bytes:
    """The head of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


async def ask(
    port: int, path: str, *, method: str = "GET", headers: Mapping[str, str] | None = None, body: Any = None
) -> Reply:
    """One request on a connection of its own; ``body`` is JSON unless it is bytes; raises ``Cut`` and ``OSError``."""
    sent = dict(headers or {})
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    if body is not None:
        method = "POST" if method == "GET" else method
        sent = {"Content-Type": "application/json", "Content-Length": str(len(data)), **sent}
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head_of(method, path, {"Connection": "close", **sent}) + data)
        status, found = await read_head(reader)
        if method == "HEAD" or status in (204, 304):
            content = b""
        elif "content-length" in found:
            content = await reader.readexactly(int(found["content-length"]))
        else:
            content = b"".join([chunk async for chunk in read_chunks(reader)])
        return Reply(status, found, content)
    except (asyncio.IncompleteReadError, ConnectionError):
        raise Cut("a cut answer") from None
    finally:
        await vanish(writer)


async def vanish(writer: asyncio.StreamWriter) -> None:
    """Be gone, without a goodbye."""
    writer.transport.abort()
    with suppress(OSError):
        await writer.wait_closed()


class Event(NamedTuple):
    """One event of a stream."""

    kind: str
    data: Any
    id: str


class EventStream:
    """A browser's ``EventSource`` without the coming back: with ``last_id``, after ``retry_ms`` if that was said.

    ``last_id`` is the one it was opened with until the stream names another, and a stream may end before it does.
    Only chunked streams are understood; ``comments`` counts what is meant for nobody.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        last_id: str,
        status: int,
        headers: dict[str, str],
    ) -> None:
        self.status = status
        self.headers = headers
        self.asked_id = self.last_id = last_id
        self.retry_ms: int | None = None
        self.comments = 0
        self.problem: Any = None
        self._reader = reader
        self._writer = writer
        self._events = self._read()

    @classmethod
    async def open(cls, port: int, path: str, headers: Mapping[str, str] | None = None, limit: int = 2**20) -> Self:
        """Ask for a stream; whatever the answer is.  Raises ``Cut``, also for one that is not ours, and ``OSError``."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=limit)
        sent = {"Accept": "text/event-stream", **(headers or {})}
        writer.write(head_of("GET", path, sent))
        try:
            stream = cls(reader, writer, sent.get("Last-Event-ID", ""), *await read_head(reader))
            if stream.status != 200:
                stream.problem = await stream._read_problem()
                await stream.drop()
        except BaseException:
            await vanish(writer)
            raise
        return stream

    async def next(self) -> Event:
        """The next event; raises ``Cut`` if the stream is cut, ``StopAsyncIteration`` if it ends."""
        async with asyncio.timeout(PATIENCE_S):
            return await anext(self._events)

    async def take(self, count: int) -> list[Event]:
        """The next ``count`` events."""
        return [await self.next() for _ in range(count)]

    async def put_off(self) -> int:
        """The code with which a stream ended that could not begin for now: an ``EventSource`` is told to come again."""
        assert (self.status, self.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        event = await self.next()
        assert event.kind == "disconnect", event
        assert self.retry_ms is not None
        assert 2_000 <= self.retry_ms <= 10_000
        assert self.last_id == self.asked_id, "the id that it has stays as it is"
        with pytest.raises(StopAsyncIteration):
            await self.next()
        return int(event.data["code"])

    async def began(self) -> str:
        """Wait for the first id, which says that the stream stands; returns it."""
        assert (await self.next()).kind == "id", "expected a stream to begin with its id"
        return self.last_id

    async def _read_problem(self) -> Any:
        """The problem document of a stream that is refused; what a proxy says in its own words is a ``Cut``."""
        body = await self._whole(int(self.headers["content-length"]))
        try:
            return json.loads(body)
        except ValueError:
            raise Cut(f"{self.status}: {body!r}") from None

    async def _whole(self, length: int) -> bytes:
        try:
            return await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, OSError):
            raise Cut("a cut body") from None

    async def _pieces(self) -> AsyncIterator[bytes]:
        if length := int(self.headers.get("content-length", 0)):
            yield await self._whole(length)
        else:
            async for chunk in read_chunks(self._reader):
                yield chunk

    async def _read(self) -> AsyncIterator[Event]:
        """Events as the HTML standard parses them, 9.2.6; an id alone is an event ``id`` for the tests to wait for."""
        text = b""
        async for chunk in self._pieces():
            text += chunk
            *blocks, text = text.split(b"\n\n")
            for block in blocks:
                kind, data, id = "", None, None
                for line in block.decode().split("\n"):
                    name, _, value = line.partition(":")
                    value = value.removeprefix(" ")
                    if name == "event":
                        kind = value
                    elif name == "data":
                        data = json.loads(value)
                    elif name == "id":
                        id = self.last_id = value
                    elif name == "retry":
                        self.retry_ms = int(value)
                    elif not name:
                        self.comments += 1
                if data is not None:
                    yield Event(kind or "message", data, self.last_id)
                elif id is not None:
                    yield Event("id", None, id)

    async def drop(self) -> None:
        """Vanish."""
        await vanish(self._writer)


@asynccontextmanager
async def events(port: int, path: str, headers: Mapping[str, str] | None = None) -> AsyncIterator[EventStream]:
    """An event stream that is dropped at the end."""
    stream = await EventStream.open(port, path, headers)
    try:
        yield stream
    finally:
        await stream.drop()


# --- the hopper ---------------------------------------------------------------------------
class Lost(AssertionError):
    """A transport said that the cursor is gone, and nobody had trimmed anything."""


ALWAYS = ("websocket", "events", "poll", "rest")
EMULATED = ("sse", "http_stream")
"""What a server offers if its configuration says so."""

MOST = 7
"""So many publications at most does a leg wait for; it may be brought more at once."""

FLOOD_S = 0.02
"""A client that came back at once, again and again, would be a flood."""


class Hopper:
    """One reader of a kept channel.

    Each leg begins at the cursor, on any of ``ports`` and in any of ``ways``, and takes a few publications; how
    it ends is left to chance, and to whoever cuts connections and kills processes.  One that brings nothing for
    ``silence_s`` is given up.  ``received`` must be history in the end.
    """

    def __init__(
        self,
        ports: Sequence[int],
        channel: str,
        dice: random.Random,
        token: str = "",
        *,
        ways: Sequence[str] = ALWAYS,
        silence_s: float = PATIENCE_S,
    ) -> None:
        self.ports = ports
        self.channel = channel
        self.received: list[dict[str, Any]] = []
        self.legs: dict[str, int] = {}
        """How many legs each way has carried that brought something."""
        self.cuts = 0
        """How many legs ended before they had brought what they were to bring."""
        self.epoch = ""
        self.offset = 0
        self._dice = dice
        self._token = token
        self._ways = ways
        self._silence_s = silence_s
        self._news = asyncio.Event()
        self._kinds = {
            "websocket": self.websocket,
            "sse": self.sse,
            "http_stream": self.http_stream,
            "events": self.events,
            "poll": self.poll,
            "rest": self.rest,
        }

    @property
    def cursor(self) -> str:
        """Where it stands."""
        return f"{self.epoch}:{self.offset}"

    async def hop(self, count: int) -> None:
        """Hop until ``count`` publications have been received."""
        while len(self.received) < count:
            await self.leg(count - len(self.received))

    async def leg(self, most: int = MOST) -> None:
        """Go one way, to one process, for a few publications; raises ``AssertionError`` if what comes is wrong."""
        kind = self._dice.choice(self._ways)
        before = len(self.received)
        try:
            async with asyncio.timeout(self._silence_s):
                await self._kinds[kind](self._dice.choice(self.ports), min(self._dice.randint(1, MOST), most))
        except (OSError, Cut, Closed, TimeoutError, websockets.WebSocketException, StopAsyncIteration):
            self.cuts += 1
            await asyncio.sleep(FLOOD_S)
        if len(self.received) > before:
            self.legs[kind] = self.legs.get(kind, 0) + 1

    def take(self, publication: Mapping[str, Any], epoch: str = "") -> None:
        """A publication has come: it moves the cursor."""
        self.received.append({"offset": publication["offset"], "data": publication["data"]})
        self.offset = publication["offset"]
        self.epoch = epoch or publication.get("epoch") or self.epoch
        self._news.set()

    async def reached(self, count: int) -> None:
        """Wait until it has received so many."""
        while len(self.received) < count:
            self._news.clear()
            await self._news.wait()

    # --- the legs ---
    async def websocket(self, port: int, count: int) -> None:
        """Subscribe with recovery, take some, vanish."""
        client = await Client.open(f"ws://127.0.0.1:{port}/connection/websocket")
        connect, subscribe = self._commands()
        try:
            await client.send(connect, subscribe)
            await client.reply(connect["id"])
            taken = self._begun(await client.reply(subscribe["id"]))
            for _ in range(count - taken):
                self.take(await client.push("pub", self.channel))
        finally:
            await client.drop()

    async def sse(self, port: int, count: int) -> None:
        """The same as an event stream: both commands in the query (PROTOCOL 2.5.3)."""
        query = quote("\n".join(map(json.dumps, self._commands())))
        async with events(port, f"/connection/sse?cf_connect={query}") as stream:
            self._check(stream.status, stream.problem)
            while count > 0:
                count -= self._heard((await stream.next()).data)

    async def http_stream(self, port: int, count: int) -> None:
        """The same as lines of a body that does not end (PROTOCOL 2.5.2)."""
        body = "\n".join(map(json.dumps, self._commands())).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            length = {"Content-Type": "application/json", "Content-Length": str(len(body))}
            writer.write(head_of("POST", "/connection/http_stream", length) + body)
            self._check((await read_head(reader))[0], "of the HTTP stream")
            rest = b""
            async for chunk in read_chunks(reader):
                *lines, rest = (rest + chunk).split(b"\n")
                count -= sum(self._heard(json.loads(line)) for line in lines)
                if count <= 0:
                    break
        finally:
            await vanish(writer)

    def _commands(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """How a connection begins that goes on from the cursor."""
        position = {"recover": True, "epoch": self.epoch, "offset": self.offset}
        connect = {"token": self._token} if self._token else {}
        return {"id": 1, "connect": connect}, {"id": 2, "subscribe": {"channel": self.channel, **position}}

    def _begun(self, reply: Mapping[str, Any]) -> int:
        """The reply to subscribe; returns how many publications were in it."""
        if reply.get("error", {}).get("code") == 100:
            raise Cut(str(reply))
        assert "subscribe" in reply, f"subscribe was answered with {reply}"
        result = reply["subscribe"]
        if not result.get("recovered"):
            raise Lost(f"{self.cursor} on a connection: {result}")
        for publication in result.get("publications", ()):
            self.take(publication, result.get("epoch", ""))
        return len(result.get("publications", ()))

    def _heard(self, message: Mapping[str, Any]) -> int:
        """A message of a stream; returns how many publications it brought."""
        if message.get("id") == 2:
            return self._begun(message)
        push = message.get("push", {})
        if "disconnect" in push or "unsubscribe" in push:
            raise Cut(str(push))
        if "pub" not in push:
            return 0
        self.take(push["pub"])
        return 1

    async def events(self, port: int, count: int) -> None:
        """Listen from the cursor, as a browser that comes back."""
        headers = {"Last-Event-ID": self.cursor, **self._authorization}
        async with events(port, f"{self._path}/events", headers) as stream:
            self._check(stream.status, stream.problem)
            taken = 0
            while taken < count:
                event = await stream.next()
                if event.kind == "reset":
                    raise Lost(f"{self.cursor} in an event stream: {event}")
                if event.kind == "message":
                    self.take(event.data)
                    assert event.id == self.cursor, f"expected the id {self.cursor}, got {event.id}"
                    taken += 1
                elif event.kind != "id":
                    raise Cut(str(event))

    async def poll(self, port: int, count: int) -> None:
        """Long-poll from the cursor."""
        await self._read(port, count, {"Prefer": "wait=2"})

    async def rest(self, port: int, count: int) -> None:
        """Read what is there, page by page."""
        while await self._read(port, count, {}):
            continue

    async def _read(self, port: int, count: int, headers: Mapping[str, str]) -> bool:
        """Read one page from the cursor on; says whether there is another."""
        path = f"{self._path}/publications?since={self.cursor}&limit={count}"
        reply = await ask(port, path, headers={**headers, **self._authorization})
        self._check(reply.status, reply.body)
        page = reply.json
        for publication in page["publications"]:
            self.take(publication, page["epoch"])
        self.epoch = self.epoch or page["epoch"]  # that of a life in which nothing has been said yet
        assert page["offset"] == self.offset, f"{self.cursor} was read up to {page}"
        assert page["epoch"] in ("", self.epoch), f"{self.cursor} was read as {page}"
        return "link" in reply.headers

    def _check(self, status: int, problem: Any) -> None:
        if status == 410:
            raise Lost(f"{self.cursor} over HTTP: {problem}")
        if status >= 500 or status == 429:
            raise Cut(f"{status}: {problem}")
        assert status == 200, f"{status}: {problem}"

    @property
    def _path(self) -> str:
        return f"/v1/channels/{quote(self.channel, safe='')}"

    @property
    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}


async def publish_once(port: Callable[[], int], channel: str, data: Any, key: str) -> None:
    """Publish by REST until it is acknowledged, at whatever ``port`` is the right one then; it is there once."""
    while True:
        with suppress(OSError, Cut, TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                path = f"/v1/channels/{quote(channel, safe='')}/publications"
                reply = await ask(port(), path, headers={"Idempotency-Key": key}, body={"data": data})
            if reply.status == 201:
                return
        await asyncio.sleep(0.02)  # as above


async def publish_all(ports: Callable[[], Sequence[int]], channel: str, count: int, dice: random.Random) -> list[Any]:
    """Publish ``count`` numbered values by REST, each until it is acknowledged; returns them in order."""
    for number in range(count):
        await publish_once(lambda: dice.choice(ports()), channel, number, f"number-{number}")
    return list(range(count))
