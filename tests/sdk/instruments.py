"""What the SDK tests are written with: players that move a foreign SDK, and a wire that can be cut.

A ``Player`` is one client object of an SDK that nobody here wrote, moved by a
test.  Whatever kind it is, it takes the same orders and tells the same events,
as plain JSON values, so that one story can be told of every SDK and of both wire
formats (``KINDS``).  Nothing of the SDKs is patched.
"""

import asyncio
import functools
import itertools
import json
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import centrifuge  # type: ignore[import-untyped]
import support
from cent import AsyncClient, PublishRequest
from centrifuge import ClientEventHandler, DeltaType, FilterNode, ReplyError, StreamPosition, SubscriptionEventHandler
from relay import Relay, Streams
from support import PATIENCE_S, Process, Site, token

from server.configuration import load
from server.settings import Settings

PUPPET = Path(__file__).parent / "js" / "puppet.mjs"
NODE_OPTIONS = ("--experimental-eventsource", "--no-warnings")
"""Node has the browsers' EventSource, but not without being asked, and then it warns."""
PUPPET_LINE_BYTES = 16 * 1024 * 1024
RECONNECT_S = (0.05, 0.2)
"""The shortest and the longest pause of an SDK before it connects or subscribes again."""


class Kind(NamedTuple):
    """An SDK, the wire format that it speaks, and the transport that it speaks it on."""

    sdk: str
    format: str
    transport: str = "websocket"

    def __str__(self) -> str:
        return "-".join(self if self.transport != "websocket" else self[:2])


KINDS = [Kind(sdk, format) for sdk in ("python", "js") for format in ("json", "protobuf")]
"""What speaks on a WebSocket."""

EMULATED = [Kind("js", "json", "http_stream"), Kind("js", "protobuf", "http_stream"), Kind("js", "json", "sse")]
"""What has none (PROTOCOL 2.5); only centrifuge-js can do without.  The server must have ``config``'s transports."""


def config(**sections: Any) -> dict[str, Any]:
    """``support.config``, with every transport that an SDK may have."""
    return support.config(http_stream={"enabled": True}, sse={"enabled": True}, **sections)


def settings(**sections: Any) -> Settings:
    """``config`` as the server's own settings."""
    return load(config=None, environ={}, flags=config(**sections))


def serving(settings_: Settings | None = None) -> AbstractAsyncContextManager[Site]:
    """``support.serving``, with every transport that an SDK may have."""
    return support.serving(settings_ or settings())


class RefusedBySdk(Exception):
    """A call was answered with an error; ``code`` is the server's (PROTOCOL 7.1)."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{code} {message}")
        self.code = code


Tokens = Callable[[str], str]
"""Gives the token for a channel, or the connection's for ``""``."""

States = Callable[[], tuple[int, str]]
"""Gives the offset and epoch that the application's own state was read at."""


class Player(ABC):
    """One client object of an SDK; see the module's docstring.

    Events carry what the SDK said, under the names of the protocol.  Those of the
    client have the channel ``""``, those of a subscription its channel, those of
    a server-side subscription begin with ``server_``.  ``asked`` is told when the
    SDK wants a token or a state.
    """

    def __init__(self, tokens: Tokens | None, states: States | None) -> None:
        self.tokens = tokens
        self.states = states
        self._told: defaultdict[tuple[str, str], deque[dict[str, Any]]] = defaultdict(deque)
        self._news = asyncio.Event()
        self._over = ""

    # --- orders ---------------------------------------------------------------
    @abstractmethod
    async def connect(self) -> None:
        """Begin to connect."""

    @abstractmethod
    async def disconnect(self) -> None:
        """Say goodbye."""

    @abstractmethod
    async def subscribe(self, channel: str, **options: Any) -> None:
        """Begin to subscribe.

        ``options``: ``token``, ``get_token``, ``get_state`` (true: ask the test),
        ``join_leave``, ``positioned``, ``recoverable``, ``delta`` (``"fossil"``),
        ``tags_filter`` (a node as the protocol has it).
        """

    @abstractmethod
    async def unsubscribe(self, channel: str) -> None:
        """Unsubscribe, and forget the subscription."""

    @abstractmethod
    async def call(self, order: str, channel: str = "", **arguments: Any) -> dict[str, Any]:
        """Order publish, history, presence, presence_stats or rpc; raises ``RefusedBySdk``."""

    # --- events ---------------------------------------------------------------
    def tell(self, event: str, channel: str, fields: dict[str, Any]) -> None:
        """Note what the SDK has said."""
        self._told[event, channel].append(fields)
        self._news.set()

    def end(self, why: str) -> None:
        """The SDK says nothing any more; whoever waits for it learns why."""
        self._over = self._over or why
        self._news.set()

    async def next(self, event: str, channel: str = "") -> dict[str, Any]:
        """The next event of this name and channel that nobody took yet, at most ``PATIENCE_S`` later."""
        waiting = self._told[event, channel]
        if not waiting:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    while not waiting:
                        assert not self._over, f"no {event} of {channel!r}: {self._over}"
                        self._news.clear()
                        await self._news.wait()
            except TimeoutError:
                raise AssertionError(f"no {event} of {channel!r} came; {self.told()}") from None
        return waiting.popleft()

    async def subscribed(self, channel: str, **options: Any) -> dict[str, Any]:
        """Subscribe and wait until it is in force; returns the event."""
        await self.subscribe(channel, **options)
        await self.next("subscribing", channel)
        return await self.next("subscribed", channel)

    async def publications(self, channel: str, count: int, *, server_side: bool = False) -> list[dict[str, Any]]:
        """The next ``count`` publications of a channel."""
        event = "server_publication" if server_side else "publication"
        return [await self.next(event, channel) for _ in range(count)]

    def untaken(self, event: str, channel: str = "") -> list[dict[str, Any]]:
        """What was told and nobody took."""
        return list(self._told[event, channel])

    def told(self) -> dict[str, int]:
        """How often each event was told that nobody took, for messages."""
        return {f"{event} {channel}".strip(): len(waiting) for (event, channel), waiting in self._told.items()}

    def _token(self, channel: str) -> str:
        assert self.tokens is not None, f"a token for {channel!r} was asked for, and the test has none"
        return self.tokens(channel)

    def _state(self) -> tuple[int, str]:
        assert self.states is not None, "a state was asked for, and the test has none"
        return self.states()


@asynccontextmanager
async def playing(
    kind: Kind,
    url: str,
    *,
    token: str = "",
    tokens: Tokens | None = None,
    states: States | None = None,
    connect: bool = True,
) -> AsyncIterator[Player]:
    """A player of this kind, connected unless ``connect`` is false, and gone in the end.

    With ``tokens`` the SDK gets a callback for connection tokens.
    """
    opened = python_player if kind.sdk == "python" else js_player
    async with opened(kind, url, token, tokens, states) as player:
        if connect:
            await player.connect()
            await player.next("connecting")
            await player.next("connected")
        yield player


# --- centrifuge-python ----------------------------------------------------------
class _Ears:
    """Takes whatever callback the SDK asks for, and notes what it is called with."""

    def __init__(self, note: Callable[[str, Any], None]) -> None:
        self._note = note

    def __getattribute__(self, name: str) -> Any:
        # The SDK's base classes define every callback, so __getattr__ would never be asked.
        if not name.startswith("on_"):
            return object.__getattribute__(self, name)
        return functools.partial(self._hear, name.removeprefix("on_"))

    async def _hear(self, event: str, context: Any) -> None:
        self._note(event, context)


class _ClientEars(_Ears, ClientEventHandler):  # type: ignore[misc]
    pass


class _SubscriptionEars(_Ears, SubscriptionEventHandler):  # type: ignore[misc]
    pass


class PythonPlayer(Player):
    """Moves centrifuge-python in this process."""

    def __init__(self, format: str, url: str, token: str, tokens: Tokens | None, states: States | None) -> None:
        super().__init__(tokens, states)
        self._binary = format == "protobuf"
        shortest, longest = RECONNECT_S
        self._client = centrifuge.Client(
            url,
            events=_ClientEars(self._client_said),
            token=token,
            get_token=self._get_token if tokens else None,
            use_protobuf=self._binary,
            min_reconnect_delay=shortest,
            max_reconnect_delay=longest,
            proxy=None,
        )

    async def connect(self) -> None:
        """See ``Player``."""
        await self._client.connect()

    async def disconnect(self) -> None:
        """See ``Player``."""
        await self._client.disconnect()

    async def leave(self) -> None:
        """Disconnect, and wait for what the SDK does beside us, so that no task outlives the test."""
        await self._client.disconnect()
        # There is no public way to wait for the socket that disconnect() closes in the background.
        while self._client._background_tasks:
            await asyncio.wait(set(self._client._background_tasks))

    async def subscribe(self, channel: str, **options: Any) -> None:
        """See ``Player``."""
        if options.pop("get_token", False):
            options["get_token"] = self._get_token
        if options.pop("get_state", False):
            options["get_state"] = self._get_state
        if "delta" in options:
            options["delta"] = DeltaType(options["delta"])
        if "tags_filter" in options:
            options["tags_filter"] = FilterNode(options["tags_filter"])
        shortest, longest = RECONNECT_S
        subscription = self._client.new_subscription(
            channel,
            events=_SubscriptionEars(functools.partial(self._said, channel)),
            min_resubscribe_delay=shortest,
            max_resubscribe_delay=longest,
            **options,
        )
        await subscription.subscribe()

    async def unsubscribe(self, channel: str) -> None:
        """See ``Player``."""
        subscription = self._client.get_subscription(channel)
        assert subscription is not None, f"{channel!r} is not subscribed"
        await subscription.unsubscribe()
        self._client.remove_subscription(subscription)

    async def call(self, order: str, channel: str = "", **arguments: Any) -> dict[str, Any]:
        """See ``Player``."""
        try:
            match order:
                case "publish":
                    await self._client.publish(channel, self._packed(arguments["data"]))
                    return {}
                case "history":
                    since = arguments.pop("since", None)
                    if since is not None:
                        arguments["since"] = StreamPosition(*since)
                    page = await self._client.history(channel, **arguments)
                    publications = [self._publication(publication) for publication in page.publications]
                    return {"publications": publications, "offset": page.offset, "epoch": page.epoch}
                case "presence":
                    presence = await self._client.presence(channel)
                    return {client: self._info(info) for client, info in presence.clients.items()}
                case "presence_stats":
                    stats = await self._client.presence_stats(channel)
                    return {"num_clients": stats.num_clients, "num_users": stats.num_users}
                case "rpc":
                    result = await self._client.rpc(arguments["method"], self._packed(arguments["data"]))
                    return {"data": self._unpacked(result.data)}
        except ReplyError as error:
            raise RefusedBySdk(error.code, error.message) from None
        raise AssertionError(f"no order {order}")

    async def _get_token(self, channel: str = "") -> str:
        self.tell("asked", channel, {})
        return self._token(channel)

    async def _get_state(self, channel: str) -> StreamPosition:
        self.tell("asked", channel, {})
        return StreamPosition(*self._state())

    def _client_said(self, event: str, context: Any) -> None:
        channel = getattr(context, "channel", "")
        self._said(channel, f"server_{event}" if channel else event, context)

    def _said(self, channel: str, event: str, context: Any) -> None:
        if event == "publication" or event == "server_publication":
            self.tell(event, channel, self._publication(context.pub))
        elif event.removeprefix("server_") in ("join", "leave"):
            self.tell(event, channel, self._info(context.info))
        else:
            self.tell(event, channel, self._plain(context))

    def _plain(self, context: Any) -> dict[str, Any]:
        fields = dict(vars(context))
        fields.pop("channel", None)
        if position := fields.pop("stream_position", None):
            fields.update(vars(position))
        if "data" in fields:
            fields["data"] = self._unpacked(fields["data"])
        return fields

    def _publication(self, publication: centrifuge.Publication) -> dict[str, Any]:
        info = publication.info
        return {
            "data": self._unpacked(publication.data),
            "offset": publication.offset,
            "info": self._info(info) if info else None,
            "tags": publication.tags,
        }

    def _info(self, info: centrifuge.ClientInfo) -> dict[str, Any]:
        return {
            "user": info.user,
            "client": info.client,
            "conn_info": self._unpacked(info.conn_info),
            "chan_info": self._unpacked(info.chan_info),
        }

    def _packed(self, data: Any) -> Any:
        return json.dumps(data).encode() if self._binary else data

    def _unpacked(self, data: Any) -> Any:
        return json.loads(data) if self._binary and data is not None else data


@asynccontextmanager
async def python_player(
    kind: Kind, url: str, token: str, tokens: Tokens | None, states: States | None
) -> AsyncIterator[PythonPlayer]:
    """See ``playing``."""
    player = PythonPlayer(kind.format, url, token, tokens, states)
    try:
        yield player
    finally:
        await player.leave()


# --- centrifuge-js ----------------------------------------------------------------
class JsPlayer(Player):
    """Moves centrifuge-js in a process of Node: orders go in as lines of JSON, events and answers come out.

    The SDK's questions (for a token, for a state) are asked of the test the same way.
    """

    def __init__(self, process: asyncio.subprocess.Process, tokens: Tokens | None, states: States | None) -> None:
        super().__init__(tokens, states)
        self._process = process
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next = 0
        self.complaints = ""
        """What the process wrote to standard error, once it has ended."""

    async def connect(self) -> None:
        """See ``Player``."""
        await self._order("connect")

    async def disconnect(self) -> None:
        """See ``Player``."""
        await self._order("disconnect")

    async def subscribe(self, channel: str, **options: Any) -> None:
        """See ``Player``."""
        await self._order("subscribe", channel=channel, options=options)

    async def unsubscribe(self, channel: str) -> None:
        """See ``Player``."""
        await self._order("unsubscribe", channel=channel)

    async def call(self, order: str, channel: str = "", **arguments: Any) -> dict[str, Any]:
        """See ``Player``."""
        return await self._order(order, channel=channel, **arguments)

    async def together(self, *orders: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Calls that the SDK sends in one frame; each has ``order``, ``channel`` and its arguments."""
        answers = await self._order("together", orders=list(orders))
        return list(answers["results"])

    async def _order(self, order: str, **arguments: Any) -> dict[str, Any]:
        assert not self._over, self._over
        self._next += 1
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[self._next] = answer
        self._write({"id": self._next, "order": order, **arguments})
        async with asyncio.timeout(PATIENCE_S):
            return await answer

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line).encode() + b"\n")

    async def read(self) -> None:
        """Take what the process says until it ends."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            said = json.loads(line)
            if "event" in said:
                self.tell(said["event"], said["channel"], said["fields"])
            elif "ask" in said:
                self._answer(said)
            elif "error" in said:
                self._settle(said["id"], RefusedBySdk(said["error"]["code"], said["error"]["message"]))
            else:
                self._settle(said["id"], said["result"])
        assert self._process.stderr is not None
        self.complaints = (await self._process.stderr.read()).decode()
        self.end(f"the Node process has ended; {self.complaints}")
        for answer in self._answers.values():
            answer.cancel()

    def _settle(self, id: int, outcome: dict[str, Any] | RefusedBySdk) -> None:
        answer = self._answers.pop(id)
        if answer.done():
            return
        if isinstance(outcome, RefusedBySdk):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)

    def _answer(self, asked: Mapping[str, Any]) -> None:
        self.tell("asked", asked["channel"], {})
        if asked["ask"] == "state":
            offset, epoch = self._state()
            self._write({"answer": asked["number"], "value": {"offset": offset, "epoch": epoch}})
        else:
            self._write({"answer": asked["number"], "value": self._token(asked["channel"])})


@asynccontextmanager
async def js_player(
    kind: Kind, url: str, token: str, tokens: Tokens | None, states: States | None
) -> AsyncIterator[JsPlayer]:
    """See ``playing``; a process that wrote to standard error, or ended before it was told to, fails the test."""
    shortest, longest = RECONNECT_S
    options = {
        "url": url,
        "format": kind.format,
        "transport": kind.transport,
        "token": token,
        "get_token": tokens is not None,
        "shortest_ms": shortest * 1000,
        "longest_ms": longest * 1000,
    }
    process = await asyncio.create_subprocess_exec(
        "node",
        *NODE_OPTIONS,
        str(PUPPET),
        json.dumps(options),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=PUPPET_LINE_BYTES,
    )
    assert process.stdin is not None
    player = JsPlayer(process, tokens, states)
    reader = asyncio.create_task(player.read())
    try:
        yield player
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(reader, process.wait())
        except BaseException:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise
        await process.stdin.wait_closed()
    assert (process.returncode, player.complaints) == (0, "")


# --- a wire that can be cut ---------------------------------------------------------
class Line(Relay):
    """Carries TCP connections to a port, until it is told to cut them."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._to = port
        self._open = asyncio.Event()
        self._open.set()
        self.carried = 0
        """Connections that were carried so far."""

    async def __aenter__(self) -> "Line":
        self._server = await asyncio.start_server(self.accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        await self.end()
        await self._server.wait_closed()

    @property
    def url(self) -> str:
        """Where WebSocket clients connect."""
        assert self._server is not None
        port = self._server.sockets[0].getsockname()[1]
        return f"ws://127.0.0.1:{port}/connection/websocket"

    @contextmanager
    def severed(self) -> Iterator[None]:
        """Within this, nobody gets through: connections are broken, new ones are held until the end."""
        self._open.clear()
        self.cut()
        try:
            yield
        finally:
            self._open.set()

    async def far(self) -> Streams:
        """See ``Relay.far``; who comes while it is severed waits."""
        await self._open.wait()
        streams = await asyncio.open_connection("127.0.0.1", self._to)
        self.carried += 1
        return streams


# --- the back end -------------------------------------------------------------------
@asynccontextmanager
async def back_end(port: int, key: str = "api-key") -> AsyncIterator[AsyncClient]:
    """The back end's API client of a server on ``port``."""
    async with AsyncClient(f"http://127.0.0.1:{port}/api", key) as api:
        yield api


async def publish(api: AsyncClient, channel: str, numbers: Iterable[int], at_once: int = 50) -> None:
    """Publish ``{"n": number}`` for each number, some at once, so that only their offsets are in order."""
    for some in batched(numbers, at_once):
        await asyncio.gather(*(api.publish(PublishRequest(channel=channel, data={"n": number})) for number in some))


def batched(numbers: Iterable[int], size: int) -> Iterator[list[int]]:
    """The numbers in lists of ``size``, the last one shorter."""
    waiting = iter(numbers)
    while some := list(itertools.islice(waiting, size)):
        yield some


def signed(site: Site, ttl_s: int = 3600, **claims: Any) -> str:
    """A token that expires ``ttl_s`` after the server's now."""
    return token({"exp": int(site.clock()) + ttl_s, **claims})


def complaints(server: Process) -> list[str]:
    """The warnings and errors in the log of a server beside this process."""
    return [line for line in server.log.read_text().splitlines() if " info " not in line]
