"""The words our tests are written in: a server, inside this process or beside it, and a client of raw commands.

``serving`` runs a node with its web application on a free port of the test's own
loop, with a clock that the test may move.  ``Process`` runs ``run.py`` as a
program, to be killed and started again.  ``Client`` says exactly what it is told
to and keeps what comes; it is no SDK.
"""

import asyncio
import base64
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import tornado.netutil
import websockets
from centrifuge.protocol import client_pb2
from google.protobuf.json_format import MessageToDict, ParseDict
from patience import PATIENT_S
from ports import free_port

import run
from handlers import make_app, make_internal_app, make_sockets
from handlers.socket import Sockets
from server import protobuf
from server.blocks import Blocks
from server.blocks.memory import MemoryBlocks
from server.broker import Broker
from server.broker.memory import MemoryBroker
from server.configuration import load
from server.history import History
from server.history.memory import MemoryHistory
from server.node import Node
from server.presence import Presence
from server.presence.memory import MemoryPresence
from server.session import Gate
from server.settings import Settings

ROOT = Path(__file__).parent.parent
PATIENCE_S = 15.0
PATIENTLY = f"{PATIENT_S:g}s"

OPEN: dict[str, Any] = {
    "allow_subscribe_for_client": True,
    "allow_subscribe_for_anonymous": True,
    "allow_publish_for_client": True,
    "allow_publish_for_anonymous": True,
    "allow_history_for_client": True,
    "allow_history_for_anonymous": True,
    "allow_presence_for_client": True,
    "allow_presence_for_anonymous": True,
}
KEPT: dict[str, Any] = {**OPEN, "history_size": -1, "history_ttl": "24h", "force_recovery": True}
SECRET = "a secret that is long enough for every HMAC"


def config(**sections: Any) -> dict[str, Any]:
    """A configuration for tests: tokens by ``SECRET``, anonymous allowed, namespaces chat (kept) and live (passing).

    Tests are quicker than people: nobody is told off for that, but where a test says so.
    Machines may stand still for seconds: nothing is given up for that, but where a test says so.
    """
    base: dict[str, Any] = {
        "client": {
            "token": {"hmac_secret_key": SECRET},
            "allow_anonymous_connect_without_token": True,
            "allowed_origins": ["*"],
            "command_rate_limit": 0,
            "publish_rate_limit": 0,
            "connection_rate_limit": 0,
            "recovery_rate_limit": 0,
        },
        "channel": {
            "namespaces": [
                {"name": "chat", **KEPT, "presence": True, "join_leave": True},
                {"name": "live", **OPEN, "presence": True, "join_leave": True},
            ]
        },
        "rest": {"read_rate_limit": 0},
        "http_api": {"key": "api-key"},
        "sqlite": {"path": ":memory:", "publish_timeout": PATIENTLY},
        "mongo": {"publish_timeout": PATIENTLY},
        "app": {"timeout": PATIENTLY},
        "shutdown": {"grace": "0s", "pace": 0},
    }
    return _merged(base, sections)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = _merged(result[name], value) if both else value
    return result


def settings(**sections: Any) -> Settings:
    """``config`` as the server's own settings."""
    return load(config=None, environ={}, flags=config(**sections))


def token(claims: Mapping[str, Any], secret: str = SECRET) -> str:
    """A token signed by the application."""
    return run.auth.sign(secret, claims)


# --- a server inside this process ----------------------------------------------
class Clock:
    """The time of a server under test: that of its start, moved by ``ahead_s`` alone, or the real one (``run``).

    Those that are there together began at the same time, however long it took to start their servers.
    """

    going: ClassVar[list["Clock"]] = []

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self._began = self.going[0]._began if self.going else time.time()
        self._runs = False

    def run(self) -> None:
        """From now on it is the real one, moved by ``ahead_s``."""
        self._runs = True

    def __enter__(self) -> Self:
        self.going.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.going.remove(self)

    def __call__(self) -> float:
        """Unix seconds."""
        return (time.time() if self._runs else self._began) + self.ahead_s


class Site:
    """A node on a port."""

    def __init__(self, node: Node, gate: Gate, sockets: Sockets, clock: Clock, port: int) -> None:
        self.node = node
        self.gate = gate
        self.sockets = sockets
        self.clock = clock
        self.port = port

    @property
    def url(self) -> str:
        """Where WebSocket clients connect."""
        return f"ws://127.0.0.1:{self.port}/connection/websocket"

    def pass_time(self, seconds: float) -> None:
        """Move the clock and do the once-a-second work of each second passed."""
        for _ in range(int(seconds)):
            self.clock.ahead_s += 1
            self.node.sweep(self.clock())


@asynccontextmanager
async def serving(
    settings_: Settings | None = None,
    *,
    history: History | None = None,
    broker: Broker | None = None,
    presence: Presence | None = None,
    blocks: Blocks | None = None,
    patiently: bool = False,
) -> AsyncIterator[Site]:
    """A node and its web application on a free port of this loop; time passes only as the test says."""
    chosen = settings_ or settings()
    with Clock() as clock:
        node = Node(
            history=history or MemoryHistory(idempotency_ttl_ms=86_400_000),
            broker=broker or MemoryBroker(),
            presence=presence or MemoryPresence(chosen.presence.lease),
            blocks=blocks or MemoryBlocks(),
            settings=chosen,
            clock=clock,
            name="test",
        )
        gate = run.make_gate(chosen)
        gate.keys._timeout_s = PATIENT_S
        await node.open(patiently=patiently)
        sockets = make_sockets(node, gate)
        servers = [run.make_server(make_app(node, sockets), None)]
        listening = tornado.netutil.bind_sockets(0, "127.0.0.1")
        servers[0].add_sockets(listening)
        if chosen.http_server.internal_port:
            servers.append(run.make_server(make_internal_app(node, sockets), None))
            servers[1].add_sockets(run.bind_internal(chosen.http_server))
        try:
            yield Site(node, gate, sockets, clock, listening[0].getsockname()[1])
        finally:
            await run.make_leaving(node, sockets, servers).leave(graceful=False)
            sockets.check_stalled(math.inf)  # what a program's end would close with it
            await run.close(node, gate, servers)


@asynccontextmanager
async def listening(server: tornado.httpserver.HTTPServer) -> AsyncIterator[int]:
    """One more HTTP server, on a free port of this loop, which is given."""
    sockets = tornado.netutil.bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    try:
        yield sockets[0].getsockname()[1]
    finally:
        server.stop()
        await server.close_all_connections()


# --- a server beside this process -----------------------------------------------
class Process:
    """``run.py`` as a program, in ``folder``; started, killed and started again on the same port."""

    def __init__(self, folder: Path, config_: Mapping[str, Any] | None = None, *arguments: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.arguments = [*arguments, "--port", str(self.port)]
        if config_ is not None:
            file = folder / "config.json"
            file.write_text(json.dumps(config_))
            self.arguments += ["--config", str(file)]
        self.log = folder / "server.log"
        self.popen: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        """Where WebSocket clients connect."""
        return f"ws://127.0.0.1:{self.port}/connection/websocket"

    @property
    def http(self) -> str:
        """Where browsers go."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Self:
        """Start it and wait until it has printed its address."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("WATERSPOUT_")}
        with self.log.open("a") as log:
            self.popen = subprocess.Popen(
                [sys.executable, str(ROOT / "run.py"), *self.arguments],
                cwd=self.folder,
                env=environ,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line.startswith("Waterspout is listening on "), f"{line!r}\n{self.log.read_text()}"
        return self

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """End it as somebody at its terminal would; returns its exit code."""
        return self._end(signal.SIGINT)

    def _end(self, number: int) -> int:
        self.send(number)
        return self.wait()

    def send(self, number: int) -> None:
        """Send it a signal."""
        if self.popen is not None:
            self.popen.send_signal(number)

    def wait(self) -> int:
        """Wait for its end; returns its exit code."""
        if self.popen is None:
            return 0
        code = self.popen.wait(PATIENCE_S)
        if self.popen.stdout is not None:
            self.popen.stdout.close()
        self.popen = None
        return code

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.popen is not None and self.popen.poll() is None:
            self.stop()
        elif self.popen is not None and self.popen.stdout is not None:
            self.popen.stdout.close()


# --- a client -----------------------------------------------------------------
class Closed(Exception):
    """The server ended the connection with ``code`` and ``reason``."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.reason = reason


class Client:
    """One connection that says exactly what it is told to, in JSON or Protobuf.

    Replies and pushes are dicts as on the JSON wire; with Protobuf, payloads are
    turned from and into JSON (those that are none stay bytes).  Pings are answered
    unless ``pongs`` is false, and counted; ``ids`` are those of all replies so far,
    as they came; ``watch`` is called with each text frame as it is.
    """

    def __init__(self, connection: websockets.ClientConnection, format: str, pongs: bool) -> None:
        self.connection = connection
        self.format = format
        self.pongs = pongs
        self.hello: dict[str, Any] = {}
        self.pings = 0
        self.pushes: list[dict[str, Any]] = []
        self.close_code: tuple[int, str] | None = None
        self.ids: list[int] = []
        self.watch: Callable[[str], object] = str
        self._replies: dict[int, dict[str, Any]] = {}
        self._next = 0
        self._news = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, url: str, *, format: str = "json", pongs: bool = True, **options: Any) -> "Client":
        """Open a connection, without any command yet."""
        if format == "protobuf":
            options["subprotocols"] = ["centrifuge-protobuf"]
        connection = await websockets.connect(url, max_size=None, ping_interval=None, compression=None, **options)
        return cls(connection, format, pongs)

    @classmethod
    async def connected(cls, url: str, *, format: str = "json", pongs: bool = True, **request: Any) -> "Client":
        """Open a connection and connect; ``client.hello`` is the result."""
        client = await cls.open(url, format=format, pongs=pongs)
        client.hello = await client.ask("connect", **request)
        return client

    # --- saying ---------------------------------------------------------------
    async def send(self, *commands: Mapping[str, Any]) -> None:
        """Send commands in one frame, as they are."""
        if self.format == "json":
            await self.raw("\n".join(json.dumps(command) for command in commands))
        else:
            await self.raw(b"".join(protobuf.prefixed(_to_protobuf(command)) for command in commands))

    async def raw(self, frame: str | bytes) -> None:
        """Send one WebSocket message."""
        await self.connection.send(frame)

    def command(self, method: str, /, **request: Any) -> dict[str, Any]:
        """A command with the next id."""
        self._next += 1
        return {"id": self._next, method: request}

    async def ask(self, method: str, /, **request: Any) -> dict[str, Any]:
        """Send one command and return its result; a refusal is an ``AssertionError``."""
        reply = await self.call(method, **request)
        assert method in reply, f"{method} was answered with {reply}"
        return dict(reply[method])

    async def refused(self, method: str, /, **request: Any) -> int:
        """Send one command that must be refused; returns the error's code."""
        reply = await self.call(method, **request)
        assert "error" in reply, f"{method} was answered with {reply}"
        return int(reply["error"]["code"])

    async def call(self, method: str, /, **request: Any) -> dict[str, Any]:
        """Send one command and return the whole reply."""
        command = self.command(method, **request)
        await self.send(command)
        return await self.reply(command["id"])

    # --- hearing --------------------------------------------------------------
    async def reply(self, id: int) -> dict[str, Any]:
        """The reply to command ``id``; raises ``Closed`` if the server ends the connection instead."""
        await self.until(lambda: id in self._replies)
        return self._replies.pop(id)

    async def until(self, done: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
        """Wait until ``done`` is true of what came; raises ``Closed`` or ``TimeoutError``."""
        async with asyncio.timeout(patience_s):
            while not done():
                if self.close_code is not None:
                    raise Closed(*self.close_code)
                self._news.clear()
                await self._news.wait()

    async def push(self, kind: str, channel: str | None = None) -> dict[str, Any]:
        """The next push of this kind (and channel) that nobody took yet."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            for push in self.pushes:
                if kind in push and channel in (None, push.get("channel", "")):
                    found.append(push)
                    return True
            return False

        await self.until(look)
        self.pushes.remove(found[0])
        return dict(found[0][kind])

    async def publications(self, channel: str, count: int) -> list[dict[str, Any]]:
        """The next ``count`` publications of a channel."""
        return [await self.push("pub", channel) for _ in range(count)]

    async def closed(self) -> tuple[int, str]:
        """Wait for the server's goodbye; returns code and reason."""
        async with asyncio.timeout(PATIENCE_S):
            while self.close_code is None:
                self._news.clear()
                await self._news.wait()
        return self.close_code

    async def close(self) -> None:
        """Say goodbye."""
        await self.connection.close()
        with suppress(asyncio.CancelledError):
            await self._reader

    async def drop(self) -> None:
        """Vanish without a goodbye."""
        self.connection.transport.abort()
        with suppress(asyncio.CancelledError):
            await self._reader

    async def _read(self) -> None:
        try:
            async for message in self.connection:
                if isinstance(message, str):
                    self.watch(message)
                for reply in _messages(message):
                    await self._take(reply)
                self._news.set()
        except websockets.ConnectionClosed:
            pass
        self.close_code = (self.connection.close_code or 1006, self.connection.close_reason or "")
        self._news.set()

    async def _take(self, reply: dict[str, Any]) -> None:
        if not reply:
            self.pings += 1
            if self.pongs:
                await self.send({})
        elif "push" in reply:
            self.pushes.append(reply["push"])
        else:
            self.ids.append(reply["id"])
            self._replies[reply["id"]] = reply


def _messages(message: str | bytes) -> list[dict[str, Any]]:
    if isinstance(message, str):
        return [json.loads(line) for line in message.split("\n")]
    return [_from_protobuf(part) for part in protobuf.split(message, 100_000)]


_PAYLOADS = ("data", "info", "conn_info", "chan_info")


def _to_protobuf(command: Mapping[str, Any]) -> bytes:
    """By the SDK's own generated messages, so that our field numbers are held against somebody else's."""
    command = json.loads(json.dumps(command))
    for request in command.values():
        if isinstance(request, dict) and "data" in request:
            request["data"] = base64.b64encode(json.dumps(request["data"]).encode()).decode()
    return bytes(ParseDict(command, client_pb2.Command()).SerializeToString())


def _from_protobuf(message: bytes) -> dict[str, Any]:
    reply = client_pb2.Reply.FromString(message)
    found = MessageToDict(reply, preserving_proto_field_name=True)
    for method in ("connect", "subscribe", "unsubscribe", "publish", "presence_stats", "rpc", "refresh", "sub_refresh"):
        if reply.HasField(method):
            found.setdefault(method, {})
    return dict(_plain(found))


def _plain(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _plain(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str) and name in _PAYLOADS:
        payload = base64.b64decode(value)
        try:
            return json.loads(payload)
        except ValueError:
            return payload
    if isinstance(value, str) and name in ("offset", "time"):
        return int(value)
    return value
