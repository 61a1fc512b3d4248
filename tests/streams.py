"""What tests of streamed responses are written with: requests of our own bytes, and a reader that takes them apart.

Nothing here is an HTTP library, so that what a server sends is seen as it is: chunks
and their end, lines, events, lengths.
"""

import asyncio
import json
import ssl
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from centrifuge.protocol import client_pb2  # type: ignore[import-untyped]
from support import PATIENCE_S, Site, _from_protobuf, _to_protobuf
from support import settings as base_settings

from server import protobuf
from server.settings import Settings

TRANSPORTS = ("http_stream", "sse", "uni_sse", "uni_http_stream", "uni_websocket", "init")


def settings(**sections: Any) -> Settings:
    """``support.settings``, with every transport on."""
    return base_settings(**{name: {"enabled": True} | sections.pop(name, {}) for name in TRANSPORTS}, **sections)


def head(method: str, path: str, headers: Mapping[str, str], version: str = "1.1") -> bytes:
    """The first lines of a request."""
    lines = [f"{method} {path} HTTP/{version}", "Host: a", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


async def drop(writer: asyncio.StreamWriter) -> None:
    """Vanish, without waiting for anybody."""
    writer.transport.abort()
    with suppress(ConnectionError, ssl.SSLError):
        await writer.wait_closed()


class Answer:
    """A whole response."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def error(self) -> str:
        """What our own errors say."""
        found = json.loads(self.body)["error"]
        assert found["code"] == self.status
        return str(found["message"])


async def ask(
    port: int, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> Answer:
    """One request on a connection of its own, and its answer."""
    async with Stream.request(port, method, path, body, headers) as stream:
        async with asyncio.timeout(PATIENCE_S):
            if "transfer-encoding" in stream.headers:
                return Answer(stream.status, stream.headers, b"".join([part async for part in stream]))
            size = int(stream.headers.get("content-length", 0))
            return Answer(stream.status, stream.headers, await stream.reader.readexactly(size))


class Stream:
    """A response as it comes.  Use it as a context manager; ``status`` and ``headers`` are there from then on.

    ``whole`` is true once the response has ended as HTTP/1.1 wants it.
    """

    def __init__(self, port: int, request: bytes) -> None:
        self._port = port
        self.bytes_of_request = request
        self._left = b""
        self.status = 0
        self.headers: dict[str, str] = {}
        self.whole = False
        self.hello: dict[str, Any] = {}
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    @classmethod
    def request(
        cls,
        port: int,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        version: str = "1.1",
    ) -> Self:
        """Any request."""
        all_headers = dict(headers or {})
        if body is not None:
            all_headers.setdefault("Content-Length", str(len(body)))
        return cls(port, head(method, path, all_headers, version) + (body or b""))

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**26)
        self.writer.write(self.bytes_of_request)
        async with asyncio.timeout(PATIENCE_S):
            first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
        self.status = int(first.split(" ")[1])
        for line in lines:
            name, _, value = line.partition(": ")
            assert name.lower() not in self.headers, f"{name} came twice"
            self.headers[name.lower()] = value
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await drop(self.writer)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """The next chunk; in HTTP/1.0, whatever comes."""
        if "transfer-encoding" not in self.headers:
            data = await self.reader.read(65536)
            if not data:
                raise StopAsyncIteration
            return data
        line = await self.reader.readuntil(b"\r\n")
        size = int(line, 16)
        data = await self.reader.readexactly(size + 2)
        assert data.endswith(b"\r\n")
        if size:
            return data[:-2]
        self.whole = True
        assert await self.reader.read() == b"", "nothing follows the last chunk"
        raise StopAsyncIteration

    async def text(self, mark: bytes) -> bytes | None:
        """What comes up to ``mark``, without it; ``None`` at the end."""
        async with asyncio.timeout(PATIENCE_S):
            while mark not in self._left:
                try:
                    self._left += await anext(self)
                except StopAsyncIteration:
                    assert not self._left, f"the response ended in the middle of a message: {self._left!r}"
                    return None
        found, _, self._left = self._left.partition(mark)
        return found

    async def message(self) -> dict[str, Any] | None:
        """The next message, as JSON has it; ``None`` at the end."""
        kind = self.headers["content-type"]
        if kind == "application/octet-stream":
            return await self._prefixed()
        if kind == "application/json":
            line = await self.text(b"\n")
            return None if line is None else dict(json.loads(line))
        event = await self.text(b"\n\n")
        if event is None:
            return None
        if event.startswith(b"\r\n"):  # the beginning of the stream
            event = event[2:]
        name, _, data = event.partition(b": ")
        assert name == b"data"
        return dict(json.loads(data))

    async def _prefixed(self) -> dict[str, Any] | None:
        while (end := _end_of_prefixed(self._left)) is None:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    self._left += await anext(self)
            except StopAsyncIteration:
                assert not self._left, f"the response ended in the middle of a message: {self._left!r}"
                return None
        (message,) = protobuf.split(self._left[:end], 1)
        self._left = self._left[end:]
        return _from_protobuf(message)

    async def expect(self, kind: str) -> dict[str, Any]:
        """The next message, which must be of this kind: a reply, or a push with or without its wrapping."""
        message = await self.message()
        assert message is not None, f"expected {kind}, got the end"
        found = message.get("push", message)
        assert kind in found, f"expected {kind}, got {message}"
        return dict(found[kind])

    async def ended(self, code: int) -> str:
        """The last message, a disconnect with this code, and the end; returns the reason."""
        end = await self.expect("disconnect")
        assert end["code"] == code, end
        assert await self.message() is None
        return str(end["reason"])


def _end_of_prefixed(data: bytes) -> int | None:
    """Where the first message behind its length ends, ``None`` if not all of it is there."""
    size = 0
    for index, byte in enumerate(data):
        size |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return index + 1 + size if index + 1 + size <= len(data) else None
    return None


# --- both ways ----------------------------------------------------------------
def batch(*commands: Mapping[str, Any], format: str = "json") -> bytes:
    """Commands as a body."""
    if format == "json":
        return "\n".join(json.dumps(command) for command in commands).encode()
    return b"".join(protobuf.prefixed(_to_protobuf(command)) for command in commands)


CONNECT: dict[str, Any] = {"id": 1, "connect": {}}


def http_stream(port: int, *commands: Mapping[str, Any], format: str = "json", version: str = "1.1") -> Stream:
    """``/connection/http_stream`` with these first commands."""
    kind = "application/octet-stream" if format == "protobuf" else "application/json"
    body = batch(*commands, format=format)
    return Stream.request(
        port, "POST", "/connection/http_stream", body, {"Content-Type": kind, "Connection": "keep-alive"}, version
    )


def sse(port: int, *commands: Mapping[str, Any], version: str = "1.1") -> Stream:
    """``/connection/sse`` with these first commands in the query."""
    path = f"/connection/sse?cf_connect={quote(batch(*commands))}"
    return Stream.request(port, "GET", path, headers={"Accept": "text/event-stream"}, version=version)


def emulated(session: str, node: str, data: bytes, format: str = "json") -> tuple[bytes, dict[str, str]]:
    """Body and headers of a post to ``/emulation``."""
    if format == "protobuf":
        body = client_pb2.EmulationRequest(session=session, node=node, data=data).SerializeToString()
        return bytes(body), {"Content-Type": "application/octet-stream"}
    text = json.dumps({"session": session, "node": node, "data": data.decode()})
    return text.encode(), {"Content-Type": "application/json"}


async def say(port: int, hello: Mapping[str, Any], *commands: Mapping[str, Any], format: str = "json") -> None:
    """Post commands for the client that was greeted so."""
    body, headers = emulated(hello["session"], hello["node"], batch(*commands, format=format), format)
    answer = await ask(port, "POST", "/emulation", body, headers)
    assert (answer.status, answer.body) == (204, b"")


async def until_gone(site: Site) -> None:
    """Wait until the server has no connection left, by asking it for other things."""
    async with asyncio.timeout(PATIENCE_S):
        while site.node.connections:
            await ask(site.port, "GET", "/health/live")


# --- one way ------------------------------------------------------------------
def uni_sse(port: int, request: Mapping[str, Any]) -> Stream:
    """``/connection/uni_sse`` with this request in the query."""
    return Stream.request(port, "GET", f"/connection/uni_sse?cf_connect={quote(json.dumps(request))}")


def uni_http_stream(port: int, request: Mapping[str, Any]) -> Stream:
    """``/connection/uni_http_stream`` with this request."""
    return Stream.request(port, "POST", "/connection/uni_http_stream", json.dumps(request).encode())
