"""One client: its commands in turn, each to a reply; and what comes to it unasked.

A session does not know how its bytes travel: a transport feeds it messages
(``receive``), gives it an ``Outbox``, and tells it when the peer is ``gone`` or
too ``slow``.  Commands are taken one after the other; those that need not wait
are answered on the spot, the rest by one task that lives as long as there is
something to wait for.  Meanwhile more commands wait in the inbox, and beyond
``INBOX`` of them the socket is not read any further: a flood is slowed by its
own weight, and costs nobody else anything.

Every change of state happens before a wait or is looked at again after it:
``closed`` of the session, ``closed`` of a subscription.  PROTOCOL 3.4, 4.
"""

import asyncio
import math
import random
import uuid
from collections import deque
from collections.abc import Callable, Container, Coroutine, Mapping, Sequence
from enum import Enum
from itertools import islice
from typing import Any, Never, Protocol

import msgspec

from server import orders, protocol
from server.auth import Verifier
from server.channels import Identity
from server.errors import (
    CONNECTION_EXPIRED,
    EXPIRED,
    FORBIDDEN,
    INAPPROPRIATE_PROTOCOL,
    INSUFFICIENT_STATE,
    INTERNAL,
    LIMIT_EXCEEDED,
    MALFORMED,
    NO_PONG,
    PERMISSION_DENIED,
    RATE_LIMITED,
    SERVER_ERROR,
    SERVER_UNSUBSCRIBE,
    SLOW,
    STALE,
    STATE_INVALIDATED,
    SUBSCRIPTION_EXPIRED,
    TOKEN_EXPIRED,
    TOO_MANY_ERRORS,
    TOO_MANY_REQUESTS,
    UNSUBSCRIBE_EXPIRED,
    UNSUBSCRIBE_INSUFFICIENT_STATE,
    UNSUBSCRIBE_STATE_INVALIDATED,
    Disconnect,
    Disconnected,
    Refusal,
    Refused,
    Unavailable,
    Unsubscribe,
)
from server.hooks import Client
from server.hub import Subscription
from server.jwks import Keys
from server.limits import Rate
from server.node import Node
from server.observe import event
from server.outbox import Outbox, Request
from server.protocol import Command
from server.stream import PAGE_BYTES, ClientInfo

YEAR_S = 365 * 24 * 3600

INBOX = 64
"""Commands that may wait behind a slow one before the socket is read no further."""

REFUSALS = 1000
"""Refusals in a row after which the client is disconnected with 3509."""

LOGGED = Rate.of(2, 20)
"""Refusals of one client that the log has: so many a second, and so many at once."""

INSTEAD = {
    TOKEN_EXPIRED.code: CONNECTION_EXPIRED,
    EXPIRED.code: CONNECTION_EXPIRED,
    TOO_MANY_REQUESTS.code: RATE_LIMITED,
    PERMISSION_DENIED.code: FORBIDDEN,
}
"""How a one-way client is told that connect was refused, by the refusal's code; any other is 3004 (PROTOCOL 2.6)."""

TURN = 50
"""Commands out of one client's inbox that are answered in one loop turn before others have theirs."""


class State(Enum):
    """Where a session is in its life; PROTOCOL 3.4."""

    NEW = "waits for connect"
    CONNECTING = "connect is being answered"
    REJECTED = "connect was answered with an error"
    CONNECTED = "at work"
    CLOSED = "over"


CONNECTED, CLOSED = State.CONNECTED, State.CLOSED
"""Asked for several times for each command, and an Enum takes six times as long to look into as a module (3.11)."""


class Gate(msgspec.Struct):
    """Who checks tokens: one verifier for connections, one for subscriptions, and the keys both may have to fetch.

    There is one for all; the verifiers are others when the settings are.
    """

    connection: Verifier
    subscription: Verifier
    keys: Keys


class Entrant(Protocol):
    """Whoever wants to be somebody here and to be let in somewhere: a session, or the caller of one request.

    What is found out about it is written into it (``commands.identify``).
    """

    node: Node
    gate: Gate
    request: Request
    client: str
    user: str
    identity: Identity
    info: ClientInfo
    handle: Client | None
    expire_at: int
    granted: frozenset[str]

    @property
    def subscriptions(self) -> Container[str]:
        """The channels that it is subscribed to, or counts as subscribed to."""


Carrying = Coroutine[Any, Any, None] | None
"""What is to be awaited for a command, or ``None`` if it has been answered."""


class Skills(msgspec.Struct, frozen=True):
    """What sessions can do; ``server.commands`` has them, so that a session need not know its commands."""

    methods: "Mapping[str, Callable[[Session, Command], Carrying]]"
    subscribe_by_order: "Callable[[Session, orders.SubscribeOrder], Coroutine[Any, Any, None]]"
    renew: "Callable[[Session, float], None]"


class Session:
    """See the module's docstring.  Made by a transport when a client arrives."""

    __slots__ = (
        "_busy",
        "_commands_full_at",
        "_inbox",
        "_lines_full_at",
        "_paused",
        "_pong_by",
        "_refusals",
        "_refusals_full_at",
        "_skills",
        "_stale_at",
        "app_name",
        "app_version",
        "arrived",
        "client",
        "connected_at",
        "expire_at",
        "gate",
        "granted",
        "handle",
        "identity",
        "info",
        "next_ping",
        "node",
        "outbox",
        "request",
        "secret",
        "state",
        "subscriptions",
        "user",
    )

    def __init__(self, node: Node, gate: Gate, skills: Skills, outbox: Outbox, request: Request) -> None:
        self.node = node
        self.gate = gate
        self._skills = skills
        self.outbox = outbox
        self.request = request
        self.client = str(uuid.uuid4())
        self.user = ""
        self.secret = request.secret
        self.identity = Identity()
        self.info = ClientInfo("", self.client)
        self.state = State.NEW
        self.subscriptions: dict[str, Subscription] = {}
        self.expire_at = 0
        self.next_ping = math.inf
        self._pong_by = math.inf
        self._inbox: deque[tuple[Command, float]] | None = None
        self._busy = False
        self._paused = False
        self._refusals = 0
        self._commands_full_at = self._refusals_full_at = self._lines_full_at = 0.0
        self.granted: frozenset[str] = frozenset()
        self.arrived = 0.0
        self.handle = None if node.hooks is None else Client(self, node.hooks)
        self.app_name = self.app_version = ""
        self.connected_at = node.clock()
        self._stale_at = self.connected_at + node.settings.client.stale_close_delay
        node.arrive(request.remote_addr)
        node.counts.opened[request.transport] += 1
        node.timetable.put(self, self._stale_at)
        event("connection.opened", client=self.client, transport=request.transport, address=request.remote_addr)

    def __repr__(self) -> str:
        return f"<Session {self.client} user={self.user!r} {self.state.name} channels={len(self.subscriptions)}>"

    @property
    def closed(self) -> bool:
        """Is it over?  To be asked after every wait."""
        return self.state is CLOSED

    @property
    def following(self) -> list[str]:
        """The channels it is subscribed to."""
        return list(self.subscriptions)

    def describe(self, most_channels: int) -> orders.Connection:
        """What a back end is told of it; PROTOCOL 15.2.20."""
        return orders.Connection(
            self.client,
            self.user,
            self.request.transport,
            self.request.format,
            self.request.remote_addr,
            int(self.connected_at),
            len(self.subscriptions),
            list(islice(self.subscriptions, most_channels)),
            self.app_name,
            self.app_version,
        )

    def start_connecting(self) -> None:
        """Connect has come; raises ``Disconnected(MALFORMED)`` if it is not the first."""
        if self.state is not State.NEW:
            raise Disconnected(MALFORMED, "a second connect")
        self.state = State.CONNECTING

    def accept(self, now: float) -> None:
        """Connect has been answered: other commands may come, and pings begin, spread over half an interval."""
        self.state = State.CONNECTED
        if self.handle is not None:
            self.handle.welcomed = True
        self.next_ping = now + self.node.settings.client.ping_interval * random.uniform(0.5, 1.0)
        self.plan()
        transport, address = self.request.transport, self.request.remote_addr
        event("connection.accepted", client=self.client, user=self.user, transport=transport, address=address)

    # --- what the transport tells us ------------------------------------------
    def receive(self, message: bytes) -> None:
        """Take one message of the client, a batch of commands; never waits, never raises."""
        try:
            commands = self.outbox.wire.codec.decode(message)
        except Disconnected as end:
            self.disconnect(end.disconnect, end.why)
        else:
            self.take(commands)

    def take(self, commands: Sequence[Command]) -> None:
        """Take commands of the client, at least one; never waits, never raises."""
        if self.state is CLOSED:
            return
        now = self.node.clock()
        inbox = self._inbox
        if inbox is None:
            if len(commands) == 1 and not self._busy:
                self._work(commands[0], now)
                return
            inbox = self._inbox = deque()
        inbox.extend((command, now) for command in commands if not self._heard_pong(command))
        if not self._busy:
            self._work_on()
        if self._busy and len(inbox) > INBOX and not self._paused and not self.closed:
            self._paused = True
            self.outbox.pause_reading()

    def gone(self) -> None:
        """The peer is gone, whatever the reason."""
        self._end(None, "")

    def slow(self) -> None:
        """The peer does not take what it is sent; PROTOCOL 18."""
        self.disconnect(SLOW, "look at client.queue_max_size and client.outbox_stall_timeout")

    def native_ping(self) -> None:
        """A ping of the peer's transport, which has been answered; counts as a command (PROTOCOL 3.4.10)."""
        full_at = self.node.command_rate.take(self._commands_full_at, self.node.clock())
        if full_at is None:
            limit = self.node.settings.client.command_rate_limit
            self.disconnect(RATE_LIMITED, f"pings, look at client.command_rate_limit ({limit})")
            return
        self._commands_full_at = full_at

    def native_pong(self) -> None:
        """The answer to a ping of the transport's own, or one that nobody asked for (RFC 6455 5.5.3)."""
        if self._pong_by == math.inf:
            self.native_ping()
        self._pong_by = math.inf

    # --- commands in turn ------------------------------------------------------
    def _work(self, command: Command, arrived: float) -> None:
        """Answer one command now, or start the task that will."""
        self.arrived = arrived
        try:
            waiting = self._dispatch(command)
        except Exception as error:
            self._answer_fault(command, error)
            return
        if waiting is not None:
            self._busy = True
            self.node.spawn(self._serve(command, waiting), f"serve {self.client}")

    def _work_on(self) -> None:
        """Answer what waits in the inbox, until something has to be waited for."""
        inbox = self._inbox
        if inbox is None:
            return
        self._busy = False
        for _ in range(TURN):
            if self._inbox is not inbox:  # connect was refused, and what stood behind it is dropped
                return
            if self._paused and len(inbox) <= INBOX // 2:
                self._paused = False
                self.outbox.resume_reading()
            if not inbox or self.closed:
                self._inbox = None
                return
            self._work(*inbox.popleft())
            if self._busy:
                return
        self._busy = True
        asyncio.get_running_loop().call_soon(self._work_on)

    async def _serve(self, command: Command, waiting: Coroutine[Any, Any, None]) -> None:
        try:
            await waiting
        except Exception as error:
            self._answer_fault(command, error)
        self._busy = False
        self._work_on()

    def _answer_fault(self, command: Command, error: Exception) -> None:
        """Every "no" to a command ends here: a refusal, a disconnect, or a fault of ours."""
        if self.closed:
            return
        method = (command.methods or ["pong"])[0]
        match error:
            case Disconnected():
                self.disconnect(error.disconnect, error.why)
                return
            case Refused():
                refusal, why = error.refusal, error.why
                self._note_refusal(method, refusal, why)
            case Unavailable():
                refusal = INTERNAL
                self._note_refusal(method, refusal, str(error))
            case protocol.Inexpressible():
                self.disconnect(INAPPROPRIATE_PROTOCOL, str(error))
                return
            case _:
                refusal = INTERNAL
                event("command.failed", client=self.client, method=method, fault=error)
        if self.outbox.wire.codec.one_way:
            self.disconnect(INSTEAD.get(refusal.code, SERVER_ERROR), f"instead of the error {refusal.code}")
            return
        if method == "connect":
            self.state = State.REJECTED
            self._inbox = None
            if self._paused:
                self._paused = False
                self.outbox.resume_reading()
        if command.id:
            self.write(self.outbox.wire.codec.refusal(command.id, refusal))
        if self._refusals >= REFUSALS:
            self.disconnect(TOO_MANY_ERRORS, f"{REFUSALS} refusals in a row")

    def _note_refusal(self, method: str, refusal: Refusal, why: str) -> None:
        """Log some of the refusals: a client that goes on and on does not fill the log."""
        self._refusals += 1
        self.node.counts.refused(refusal.code, why)
        full_at = LOGGED.take(self._lines_full_at, self.node.clock())
        if full_at is not None:
            self._lines_full_at = full_at
            event("command.refused", client=self.client, method=method, code=refusal.code, why=why)

    def _dispatch(self, command: Command) -> Carrying:
        """Carry out one command, or return what is to be awaited for it; PROTOCOL 3.4."""
        methods = command.methods
        if not methods:
            self._pong(command)
            return None
        if len(methods) > 1:
            raise Disconnected(MALFORMED, f"a command has two methods: {methods[0]} and {methods[1]}")
        method = methods[0]
        if not command.id and method != "send":
            raise Disconnected(MALFORMED, f"a command {method} has no id")
        if self.state is not CONNECTED and (method != "connect" or self.state is not State.NEW):
            raise Disconnected(MALFORMED, f"a command {method} came while the session {self.state.value}")
        rate, now = self.node.command_rate, self.arrived
        full_at = self._commands_full_at  # ``Rate.take``, here without its call
        full_at = (full_at if full_at > now else now) + rate.cost_s
        if full_at > now + rate.most_s:
            self._refuse_flood()
        self._commands_full_at = full_at
        return self._skills.methods[method](self, command)

    def _refuse_flood(self) -> Never:
        """The bucket of commands is empty: refuse one, and end who goes on at twice the rate; PROTOCOL 3.4.10.

        Refusals have a bucket like that of the commands.
        """
        settings = self.node.settings.client
        why = f"look at client.command_rate_limit ({settings.command_rate_limit})"
        full_at = self.node.command_rate.take(self._refusals_full_at, self.arrived)
        if full_at is None:
            raise Disconnected(RATE_LIMITED, why)
        self._refusals_full_at = full_at
        raise Refused(TOO_MANY_REQUESTS, why)

    def reply(self, command: Command, method: str, result: protocol.Body = protocol.EMPTY) -> None:
        """Answer a command."""
        self._refusals = 0
        self.write(self.outbox.wire.codec.reply(command.id, method, result))

    def push(self, channel: str, kind: str, body: protocol.Body) -> None:
        """Say something unasked (PROTOCOL 5)."""
        self.write(self.outbox.wire.codec.push(channel, kind, body))

    def write(self, message: bytes) -> None:
        """Send one encoded message, in order behind the publications of this loop turn."""
        if self.state is not CLOSED:
            self.node.hub.post(self.outbox, self.outbox.wire.frame(message))

    async def make_room(self) -> None:
        """Wait, before an answer that may be heavy, until the socket has taken most of those before it.

        Raises ``Disconnected`` if it does not.
        """
        if self.outbox.waiting_bytes > PAGE_BYTES:
            await self.outbox.drained()

    # --- the end of a subscription -------------------------------------------------
    def drop(self, subscription: Subscription) -> None:
        """Forget a subscription now; what others must learn of it is seen to beside us."""
        if self.subscriptions.get(subscription.channel) is subscription:
            del self.subscriptions[subscription.channel]
        if not subscription.closed:
            self.release(subscription)
            if subscription.present or subscription.leaves_word:
                self.node.members.exit(subscription)

    def release(self, subscription: Subscription) -> None:
        """Take a subscription that is no longer ours out of the hub, and have the user's module told."""
        self.node.release(subscription)
        if self.node.hooks is not None and subscription.begun:
            self.node.hooks.left(self.handle, subscription.channel, subscription.namespace.name)

    def _end_subscription(self, subscription: Subscription, unsubscribe: Unsubscribe) -> None:
        self.drop(subscription)
        self.push(subscription.channel, "unsubscribe", protocol.Unsubscribe(unsubscribe.code, unsubscribe.reason))

    def lose(self, subscription: Subscription) -> None:
        """History no longer holds what this subscription needs next; PROTOCOL 11.2."""
        if subscription.closed:
            return
        self.node.counts.lost += 1
        event("subscription.lost", client=self.client, channel=subscription.channel)
        if subscription.server_side:
            self.disconnect(INSUFFICIENT_STATE, f"history of {subscription.channel!r} was trimmed under it")
        else:
            self._end_subscription(subscription, UNSUBSCRIBE_INSUFFICIENT_STATE)

    def invalidate(self, subscription: Subscription) -> None:
        """The terms of this subscription are others now; PROTOCOL 9.5."""
        if subscription.closed:
            return
        if subscription.server_side:
            self.disconnect(STATE_INVALIDATED, f"the namespace of {subscription.channel!r} has other options now")
        else:
            self._end_subscription(subscription, UNSUBSCRIBE_STATE_INVALIDATED)

    # --- orders of the back end (PROTOCOL 15.2) -------------------------------------
    def unsubscribe_by_order(self, channel: str) -> None:
        """End the subscription of ``channel``, or all of them if it is empty, with 2000."""
        for subscription in list(self.subscriptions.values()):
            if not channel or subscription.channel == channel:
                self._end_subscription(subscription, SERVER_UNSUBSCRIBE)

    def subscribe_by_order(self, order: orders.SubscribeOrder) -> None:
        """Subscribe server-side; no effect if already subscribed."""
        if order.channel in self.subscriptions or self.state is not State.CONNECTED:
            return
        limit = self.node.settings.client.channel_limit
        if len(self.subscriptions) >= limit:
            why = f"look at client.channel_limit ({limit})"
            event("command.refused", client=self.client, method="subscribe", code=LIMIT_EXCEEDED.code, why=why)
        else:
            self.node.spawn(self._skills.subscribe_by_order(self, order), f"subscribe {self.client}")

    def refresh_by_order(self, order: orders.RefreshOrder) -> None:
        """Move the connection's expiry, or end it as expired."""
        if order.expired:
            self.disconnect(CONNECTION_EXPIRED, "ordered by the back-end API")
            return
        self.expire_at = order.expire_at
        if order.info is not None:
            self.renew_info(order.info)
        self.plan()
        if not self.renewed_here():
            ttl = ttl_s(order.expire_at, self.node.clock())
            self.push("", "refresh", protocol.RefreshResult(bool(order.expire_at), ttl))

    def renew_info(self, conn_info: bytes | None) -> None:
        """Show others ``conn_info`` from now on, also where the client is subscribed and present; PROTOCOL 4.9."""
        conn_info = json_info(conn_info)
        if conn_info == self.info.conn_info:
            return
        self.info = ClientInfo(self.user, self.client, conn_info)
        for subscription in self.subscriptions.values():
            subscription.info = msgspec.structs.replace(subscription.info, conn_info=conn_info)
            self.node.spawn(self.node.members.enter(subscription), f"enter {subscription.channel}")

    # --- time ------------------------------------------------------------------------
    def _pong(self, command: Command) -> None:
        if command.id or self._pong_by == math.inf:
            raise Disconnected(MALFORMED, "a command without method, or a pong that nobody asked for")
        self._pong_by = math.inf

    def _heard_pong(self, command: Command) -> bool:
        """Is this the pong we wait for?  It counts when it comes, not when the commands before it are done."""
        if command.id or self._pong_by == math.inf or command.methods:
            return False
        self._pong_by = math.inf
        return True

    def tick(self, now: float) -> None:
        """Look at what is due: connect, ping, pong, expiries; PROTOCOL 2.4, 8.3, 8.4."""
        if self.closed:
            return
        settings = self.node.settings.client
        if self.state is not State.CONNECTED:
            if now >= self._stale_at and self.state is not State.CONNECTING:
                self.disconnect(STALE, f"no connect within client.stale_close_delay ({settings.stale_close_delay:g} s)")
            else:
                self.node.timetable.put(self, max(self._stale_at, now + 1))
            return
        if now >= self._pong_by:
            if not self._paused:
                self.disconnect(NO_PONG, f"no pong within client.pong_timeout ({settings.pong_timeout:g} s)")
                return
            self._pong_by = now + settings.pong_timeout
        self._skills.renew(self, now)
        if self.expire_at and now >= self.expire_at + settings.expired_close_delay:
            self.disconnect(CONNECTION_EXPIRED, "the token expired and was not refreshed")
            return
        if not self._expire_subscriptions(now - settings.expired_sub_close_delay):
            return
        if now >= self.next_ping:
            self.next_ping = now + settings.ping_interval
            self._ping(now)
        self.plan()

    def _ping(self, now: float) -> None:
        """Ping, and expect a pong of whoever can say one: of a one-way client its transport, if that can."""
        codec, native = self.outbox.wire.codec, self.request.native_pings
        if native:
            self.outbox.send(self.outbox.ping_frame())
        if not native or codec.one_way:
            self.write(codec.ping)
        if native or not codec.one_way:
            self._pong_by = now + self.node.settings.client.pong_timeout

    def rewind(self, seconds: float) -> None:
        """The clock was set back by so much: so is all that is due."""
        self.next_ping -= seconds
        self._pong_by -= seconds
        self._stale_at -= seconds
        self._commands_full_at -= seconds
        self._refusals_full_at -= seconds
        self._lines_full_at -= seconds
        self.plan()
        if self.state is not State.CONNECTED and not self.closed:
            self.node.timetable.put(self, self._stale_at)

    def _expire_subscriptions(self, until: float) -> bool:
        """End the subscriptions that expired before ``until``; false if that ended the connection."""
        expired = [sub for sub in self.subscriptions.values() if sub.expire_at and sub.expire_at <= until]
        for subscription in expired:
            self.expire(subscription)
            if self.closed:
                return False
        return True

    def expire(self, subscription: Subscription) -> None:
        """End a subscription that has expired, or with a server-side one the connection; PROTOCOL 8.4."""
        if subscription.server_side:
            self.disconnect(SUBSCRIPTION_EXPIRED, f"the subscription of {subscription.channel!r} expired")
        else:
            self._end_subscription(subscription, UNSUBSCRIBE_EXPIRED)

    def renewed_here(self, subscription: Subscription | None = None) -> bool:
        """Is somebody else asked when the connection, or a subscription, expires, so that its client need not refresh?

        PROTOCOL 16.2, 16.5.
        """
        if self.node.hooks is None:
            return False
        if subscription is None:
            return self.node.hooks.find("refreshing") is not None
        return self.node.hooks.find("sub_refreshing", subscription.namespace.name) is not None

    def plan(self) -> None:
        """Enter into the timetable when this session next has something due."""
        if self.state is not State.CONNECTED:
            return
        settings = self.node.settings.client
        due = min(self.next_ping, self._pong_by)
        if self.expire_at:
            due = min(due, self.expire_at + (0 if self.renewed_here() else settings.expired_close_delay))
        for subscription in self.subscriptions.values():
            if subscription.expire_at:
                delay = 0 if self.renewed_here(subscription) else settings.expired_sub_close_delay
                due = min(due, subscription.expire_at + delay)
        if due < math.inf:
            self.node.timetable.put(self, due)

    # --- the end -----------------------------------------------------------------------
    def disconnect(self, disconnect: Disconnect, why: str = "") -> None:
        """End the connection with a code; everybody else is told first."""
        if not self.closed:
            self._end(disconnect, why)
            self.outbox.close(disconnect)

    def _end(self, disconnect: Disconnect | None, why: str) -> None:
        if self.closed:
            return
        fields: dict[str, Any] = {"client": self.client, "user": self.user}
        if disconnect is not None:
            self.node.hub.flush()
            fields.update(code=disconnect.code, reason=disconnect.reason, why=why)
        self.node.counts.ended(disconnect.code if disconnect is not None else 0, why)
        event("connection.closed", **fields)
        self.state = State.CLOSED
        self._inbox = None
        self.node.depart(self.request.remote_addr)
        self.node.timetable.remove(self)
        self.node.dismiss(self)
        self.node.streams.pop(self.secret, None)
        self.leave_all()
        if self.node.hooks is not None:
            self.node.hooks.ended(self.handle)

    def leave_all(self) -> None:
        """Forget all subscriptions now; what others must learn is seen to beside us."""
        subscriptions, self.subscriptions = self.subscriptions, {}
        for subscription in subscriptions.values():
            self.release(subscription)
            if subscription.present or subscription.leaves_word:
                self.node.members.exit(subscription)


def ttl_s(expire_at: int, now: float) -> int:
    """Seconds until ``expire_at``, at least 1, at most a year; 0 if it never comes (PROTOCOL 8.3)."""
    return min(max(1, math.ceil(expire_at - now)), YEAR_S) if expire_at else 0


def json_info(info: bytes | None) -> bytes | None:
    """Info as JSON: bytes that are none (``b64info``) become a base64 string, so that everybody can be shown them."""
    if info is None:
        return None
    return protocol.one_line(info) if protocol.is_json(info) else msgspec.json.encode(info)
