"""A test kit for those who write an app: a server without ports, clients without sockets, a clock that the test moves.

    async with harness(app) as world:
        ann = await world.connect("ann")
        lobby = await ann.subscribe("chat:lobby")
        await lobby.publish({"text": "hi"})
        assert (await lobby.publication()).data == {"text": "hi"}

Sessions, channels and history are the real ones, kept in memory; only the way
between a client and its session is short.  Namespaces are those of the server
that nobody configured (chat, game, live, and names without one), unless the test
says otherwise: ``harness(app, channel={...}, app={"timeout": "5s"})``.
"""

import asyncio
import heapq
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec

from server import auth
from server.app import App, Member, Message, Server
from server.blocks.memory import MemoryBlocks
from server.broker.memory import MemoryBroker
from server.commands import SKILLS
from server.configuration import load
from server.errors import SHUTDOWN, Disconnect
from server.history.memory import MemoryHistory
from server.hooks import CLEAR_UP_S
from server.inside import InsideOutbox, LineWire
from server.jwks import Keys
from server.node import Node
from server.outbox import Request
from server.presence.memory import MemoryPresence
from server.session import Gate, Session
from server.settings import TRY_OUT
from server.stream import Position

T = TypeVar("T")

NOON = 1_700_000_000.0
"""The time at which every world begins (Unix s)."""

STRIDE_S = 2.0
"""How far the clock moves at a time: presence renews its lease and pings are answered on the way."""

PATIENCE_S = 5.0
"""How long something is waited for, in real time, before the test fails."""

LAST_S = 1.0
"""How long the last hooks are waited for, in real time, when the world ends."""

BUSY_TURNS = 100_000
KEY = "known to the clients of one world in one process"


class ReplyError(Exception):
    """A command was refused, as an SDK tells it (PROTOCOL 7.1)."""

    def __init__(self, code: int, message: str, temporary: bool) -> None:
        super().__init__(f"{code} {message}")
        self.code = code
        self.message = message
        self.temporary = temporary


class ConnectionEnded(Exception):
    """The server ended the connection (PROTOCOL 7.2)."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code} {reason}")
        self.code = code
        self.reason = reason


# --- the short way between a client and its session ------------------------------
_WIRE = LineWire()


class _Mailbox(InsideOutbox):
    """Ends in a client, a loop turn later."""

    def __init__(self, client: "SimulatedClient") -> None:
        self.wire = _WIRE
        self._client = client
        self._open = True

    def send(self, frame: bytes) -> None:
        if self._open:
            asyncio.get_running_loop().call_soon(self._client._arrive, frame)

    def close(self, disconnect: Disconnect) -> None:
        if self._open:
            self._open = False
            asyncio.get_running_loop().call_soon(self._client._end, disconnect.code, disconnect.reason)


# --- clients ------------------------------------------------------------------------
class Subscription:
    """A client's subscription.  What came is in order; each is handed out once."""

    def __init__(self, client: "SimulatedClient", channel: str) -> None:
        self.client = client
        self.channel = channel
        self.data: Any = None
        """What came with the reply."""
        self.recovered = False
        self.position = Position()
        """Up to where it has heard everything."""
        self.end: tuple[int, str] | None = None
        """Code and reason, if the server ended it."""
        self._publications: deque[Message] = deque()
        self._joins: deque[Member] = deque()
        self._leaves: deque[Member] = deque()

    def __repr__(self) -> str:
        return f"<Subscription {self.channel!r} at {self.position.offset}>"

    async def publication(self) -> Message:
        """The next publication; raises ``TimeoutError`` if none comes."""
        return await self._next(self._publications, "publication")

    async def join(self) -> Member:
        """The next who joined."""
        return await self._next(self._joins, "join")

    async def leave(self) -> Member:
        """The next who left."""
        return await self._next(self._leaves, "leave")

    async def unsubscribed(self) -> tuple[int, str]:
        """Wait until the server ends it; returns code and reason (PROTOCOL 7.3)."""
        await self.client._until(lambda: self.end is not None, f"an end of {self.channel}")
        assert self.end is not None
        return self.end

    def heard(self) -> list[Message]:
        """All publications that came and were not handed out yet; after ``world.settle`` there are no more to come."""
        found = list(self._publications)
        self._publications.clear()
        return found

    async def _next(self, waiting: deque[T], what: str) -> T:
        await self.client._until(lambda: bool(waiting), f"a {what} in {self.channel}")
        return waiting.popleft()

    async def publish(self, data: Any) -> None:
        """Publish into its channel; raises ``ReplyError``."""
        await self.client.publish(self.channel, data)

    async def history(self, *, limit: int = 100, since: Position | None = None, reverse: bool = False) -> list[Message]:
        """What the channel keeps; raises ``ReplyError``."""
        return await self.client.history(self.channel, limit=limit, since=since, reverse=reverse)

    async def presence(self) -> dict[str, Member]:
        """Who is here, by client id; raises ``ReplyError``."""
        return await self.client.presence(self.channel)

    async def presence_stats(self) -> tuple[int, int]:
        """How many clients and users are here; raises ``ReplyError``."""
        stats = await self.client._ask("presence_stats", channel=self.channel)
        return stats["num_clients"], stats["num_users"]

    async def unsubscribe(self) -> None:
        """End it."""
        await self.client._ask("unsubscribe", channel=self.channel)
        self.client._subscriptions.pop(self.channel, None)

    def _begin(self, result: Mapping[str, Any]) -> None:
        self.data = result.get("data")
        self.recovered = result.get("recovered", False)
        self.position = Position(result.get("offset", 0), result.get("epoch", ""))
        for publication in result.get("publications", ()):
            self._hear(publication)

    def _hear(self, publication: Mapping[str, Any]) -> None:
        message = _message(publication)
        self._publications.append(message)
        if message.offset:
            self.position = Position(message.offset, publication.get("epoch") or self.position.epoch)

    def _take(self, push: Mapping[str, Any]) -> None:
        if "pub" in push:
            self._hear(push["pub"])
        elif "join" in push:
            self._joins.append(_member(push["join"]["info"]))
        elif "leave" in push:
            self._leaves.append(_member(push["leave"]["info"]))
        elif "unsubscribe" in push:
            self.end = push["unsubscribe"]["code"], push["unsubscribe"]["reason"]
            self.client._subscriptions.pop(self.channel, None)


class SimulatedClient:
    """One connection, with the words of the SDKs; every command raises ``ReplyError`` or ``ConnectionEnded``."""

    def __init__(self, node: Node, gate: Gate, address: str) -> None:
        self.id = ""
        self.data: Any = None
        """What came with the reply to connect."""
        self.end: tuple[int, str] | None = None
        """Code and reason, if the server ended the connection."""
        self._subscriptions: dict[str, Subscription] = {}
        self._replies: dict[int, dict[str, Any]] = {}
        self._last = 0
        self._expected: tuple[int, Subscription] | None = None
        self._news = asyncio.Event()
        self._session = Session(node, gate, SKILLS, _Mailbox(self), Request("test", "json", address, {}))

    def __repr__(self) -> str:
        return f"<SimulatedClient {self.id} {self.end or 'connected'}>"

    # --- saying ------------------------------------------------------------------
    async def subscribe(
        self, channel: str, *, data: Any = msgspec.UNSET, token: str = "", since: Position | None = None
    ) -> Subscription:
        """Subscribe, from a position on if ``since`` is given."""
        request: dict[str, Any] = {"channel": channel, "token": token, "join_leave": True}
        if data is not msgspec.UNSET:
            request["data"] = data
        if since is not None:
            request.update(recover=True, offset=since.offset, epoch=since.epoch)
        subscription = Subscription(self, channel)
        subscription._begin(await self._ask("subscribe", subscription, **request))
        return subscription

    async def subscription(self, channel: str) -> Subscription:
        """The subscription of ``channel``, waited for if the server is yet to make it."""
        await self._until(lambda: channel in self._subscriptions, f"a subscription of {channel}")
        return self._subscriptions[channel]

    async def publish(self, channel: str, data: Any) -> None:
        """Publish."""
        await self._ask("publish", channel=channel, data=data)

    async def publish_once(self, channel: str, data: Any, key: str) -> Position:
        """Publish with an idempotency key; returns the position (PROTOCOL 4.7)."""
        found = await self.rpc("publish", {"channel": channel, "data": data, "idempotency_key": key})
        return Position(found.get("offset", 0), found.get("epoch", ""))

    async def rpc(self, method: str, data: Any = msgspec.UNSET) -> Any:
        """Call a remote procedure; ``None`` for no answer."""
        request = {"method": method} if data is msgspec.UNSET else {"method": method, "data": data}
        return (await self._ask("rpc", **request)).get("data")

    async def history(
        self, channel: str, *, limit: int = 100, since: Position | None = None, reverse: bool = False
    ) -> list[Message]:
        """What a channel keeps."""
        request: dict[str, Any] = {"channel": channel, "limit": limit, "reverse": reverse}
        if since is not None:
            request["since"] = {"offset": since.offset, "epoch": since.epoch}
        return [_message(publication) for publication in (await self._ask("history", **request))["publications"]]

    async def presence(self, channel: str) -> dict[str, Member]:
        """Who is subscribed, by client id."""
        found = (await self._ask("presence", channel=channel))["presence"]
        return {client: _member(info) for client, info in found.items()}

    def disconnect(self) -> None:
        """Leave."""
        self._session.gone()
        self._news.set()

    async def disconnected(self) -> tuple[int, str]:
        """Wait until the server ends the connection; returns code and reason."""
        async with asyncio.timeout(PATIENCE_S):
            while self.end is None:
                self._news.clear()
                await self._news.wait()
        return self.end

    async def _ask(self, method: str, expecting: Subscription | None = None, /, **request: Any) -> dict[str, Any]:
        self._last = id = self._last + 1
        if expecting is not None:
            self._expected = id, expecting
        self._session.receive(json.dumps({"id": id, method: request}).encode())
        await self._until(lambda: id in self._replies, f"an answer to {method}")
        reply = self._replies.pop(id)
        if "error" in reply:
            error = reply["error"]
            raise ReplyError(error["code"], error["message"], error.get("temporary", False))
        return dict(reply[method])

    # --- hearing -----------------------------------------------------------------
    async def _until(self, done: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not done():
                    if self.end is not None:
                        raise ConnectionEnded(*self.end)
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise TimeoutError(
                f"expected {what}, but nothing came (and no time passed, but by world.pass_time)"
            ) from None

    def _arrive(self, frame: bytes) -> None:
        for line in frame.splitlines():
            self._take(json.loads(line))
        self._news.set()

    def _take(self, message: dict[str, Any]) -> None:
        if not message:
            self._session.receive(b"{}")
        elif "push" in message:
            self._take_push(message["push"])
        else:
            self._replies[message["id"]] = message
            # A subscription is there from its reply on: pushes follow in the same breath.
            if self._expected is not None and self._expected[0] == message["id"]:
                if "subscribe" in message:
                    subscription = self._expected[1]
                    self._subscriptions[subscription.channel] = subscription
                self._expected = None
            if "connect" in message:
                self._connected(message["connect"])

    def _connected(self, result: Mapping[str, Any]) -> None:
        self.id, self.data = result["client"], result.get("data")
        for channel, found in result.get("subs", {}).items():
            self._server_side(channel, found)

    def _server_side(self, channel: str, result: Mapping[str, Any]) -> None:
        self._subscriptions[channel] = Subscription(self, channel)
        self._subscriptions[channel]._begin(result)

    def _take_push(self, push: Mapping[str, Any]) -> None:
        channel = push.get("channel", "")
        if "subscribe" in push:
            self._server_side(channel, push["subscribe"])
        elif channel in self._subscriptions:
            self._subscriptions[channel]._take(push)

    def _end(self, code: int, reason: str) -> None:
        self.end = code, reason
        self._news.set()


def _member(info: Mapping[str, Any]) -> Member:
    return Member(info["user"], info["client"], info.get("conn_info"), info.get("chan_info"))


def _message(publication: Mapping[str, Any]) -> Message:
    info = _member(publication["info"]) if "info" in publication else None
    return Message(
        publication["data"], publication.get("offset", 0), publication.get("time", 0), info, publication.get("tags")
    )


# --- the world -----------------------------------------------------------------------
class World:
    """A server, its clock, and a door for clients; made by ``harness``."""

    def __init__(self, node: Node, app: App, gate: Gate, clock: "_Clock") -> None:
        self.node = node
        self.app = app
        self._gate = gate
        self._clock = clock
        self._clients: list[SimulatedClient] = []

    @property
    def server(self) -> Server:
        """What the app has, for the test to use as well."""
        return self.app.server

    async def connect(
        self,
        user: str = "",
        *,
        info: Any = None,
        data: Any = msgspec.UNSET,
        token: str = "",
        subs: Mapping[str, Position | None] | None = None,
        address: str = "127.0.0.1",
    ) -> SimulatedClient:
        """A client that has connected: as ``user`` by a token, with ``info`` for others to see; without, anonymous.

        ``token`` brings one of the test's own; ``data`` goes with the command, and
        so do the channels ``subs``, with the position to recover from if there is
        one.  Raises ``ReplyError`` and ``ConnectionEnded``.
        """
        client = SimulatedClient(self.node, self._gate, address)
        self._clients.append(client)
        request: dict[str, Any] = {} if data is msgspec.UNSET else {"data": data}
        if token or user or info is not None:
            request["token"] = token or self.token(user, info=info)
        request["subs"] = {
            channel: {} if since is None else {"recover": True, "offset": since.offset, "epoch": since.epoch}
            for channel, since in (subs or {}).items()
        }
        await client._ask("connect", **request)
        return client

    def token(self, user: str, **claims: Any) -> str:
        """A token of this world's; a claim that is ``None`` is left out."""
        given = {name: value for name, value in claims.items() if value is not None}
        return auth.sign(KEY, {"sub": user, **given})

    async def pass_time(self, seconds: float) -> None:
        """Move the clock; all that this leads to happens.

        Who sleeps in ``server.sleep`` wakes up in time, and a hook that takes
        longer than ``app.timeout`` is cut off.
        """
        until = self._clock.now + seconds
        await self.settle()
        while self._clock.now < until:
            self._clock.now = min(until, self._clock.now + STRIDE_S, self._clock.next_alarm)
            self._clock.ring()
            self.node.sweep(self._clock.now)
            await self.settle()

    async def settle(self) -> None:
        """Return when everything that can happen without the passing of time has happened."""
        ready = getattr(asyncio.get_running_loop(), "_ready", ())
        for _ in range(BUSY_TURNS):
            await asyncio.sleep(0)
            if not ready:
                return
        raise RuntimeError(f"something has been busy for {BUSY_TURNS} turns of the loop")

    async def _see_out(self) -> None:
        """Let the last hooks end; those that real time does not end soon take longer than they may."""
        await self.settle()
        if self.app.running:
            await asyncio.wait(self.app.running, timeout=LAST_S)
        if self.app.running:
            await self.pass_time(self.node.settings.app.timeout + CLEAR_UP_S)


class _Alarm:
    """Something that a clock has in mind."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class _Clock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.now = NOON
        self._alarms: list[tuple[float, int, _Alarm]] = []
        self._count = 0

    def __call__(self) -> float:
        return self.now

    @property
    def next_alarm(self) -> float:
        while self._alarms and self._alarms[0][2].callback is None:
            heapq.heappop(self._alarms)
        return max(self._alarms[0][0], self.now) if self._alarms else float("inf")

    def call_later(self, seconds: float, callback: Callable[[], None]) -> _Alarm:
        self._count += 1
        alarm = _Alarm(callback)
        heapq.heappush(self._alarms, (self.now + seconds, self._count, alarm))
        return alarm

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        over = asyncio.Event()
        alarm = self.call_later(seconds, over.set)
        try:
            await over.wait()
        finally:
            alarm.cancel()

    def ring(self) -> None:
        while self._alarms and self._alarms[0][0] <= self.now:
            callback = heapq.heappop(self._alarms)[2].callback
            if callback is not None:
                callback()


@asynccontextmanager
async def harness(app: App | None = None, /, **sections: Any) -> AsyncIterator[World]:
    """A world with ``app`` in it, for as long as the block lasts.

    ``sections`` are settings, as a configuration file has them.  Raises
    ``AppError`` for a faulty app, ``SettingsError`` for faulty settings.  An app
    may be used in one world at a time, and in many one after the other.
    """
    # Of what a newcomer can try, all but the console, which would ask for a password: nobody can open it here.
    # And no limits by the clock, which stands still while a test says a hundred things; nor gives memory up early.
    unhurried = {"command_rate_limit": 0, "publish_rate_limit": 0, "token": {"hmac_secret_key": KEY}}
    base = {**TRY_OUT, "admin": {}, "client": {**TRY_OUT["client"], **unhurried}}
    memory = {"path": ":memory:", "publish_timeout": f"{PATIENCE_S:g}s"}
    settings = load(config=None, environ={}, flags={**_merged(base, sections), "sqlite": memory})
    clock = _Clock()
    node = Node(
        history=MemoryHistory(idempotency_ttl_ms=int(settings.channel.idempotency_ttl * 1000)),
        broker=MemoryBroker(),
        presence=MemoryPresence(settings.presence.lease),
        blocks=MemoryBlocks(),
        settings=settings,
        clock=clock,
        name="test",
    )
    app = app or App()
    app.attach(node)
    real = app.server._sleep, app.call_later
    app.server._sleep, app.call_later = clock.sleep, clock.call_later
    verifier = auth.Verifier(settings.client.token)
    gate = Gate(verifier, verifier, Keys(_no_network, time.monotonic))
    world = World(node, app, gate, clock)
    try:
        await node.open()
        await app.start()
        yield world
    finally:
        for client in world._clients:
            client._session.disconnect(SHUTDOWN)
        await world._see_out()
        await app.stop()
        app.server._sleep, app.call_later = real
        await gate.keys.close()
        await node.close()


async def _no_network(url: str) -> bytes:
    raise OSError(f"there is no network in a test, and {url} was asked for")


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = _merged(result[name], value) if both else value
    return result
