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
from collections.abc import Callable, Coroutine, Sequence
from enum import Enum
from typing import Any

import msgspec

from server import __version__, protocol
from server import broker as wires
from server.auth import Override, SubscribeOptions, TokenExpired, TokenInvalid, Verifier
from server.channels import Identity, Namespace, check_payload, grant, unknown_type
from server.errors import (
    ALREADY_SUBSCRIBED,
    BAD_REQUEST,
    CHANNEL_LIMIT,
    CONNECTION_EXPIRED,
    CONNECTION_LIMIT,
    EXPIRED,
    FORBIDDEN,
    INAPPROPRIATE_PROTOCOL,
    INSUFFICIENT_STATE,
    INTERNAL,
    INVALID_TOKEN,
    LIMIT_EXCEEDED,
    MALFORMED,
    NO_PONG,
    NOT_AVAILABLE,
    PERMISSION_DENIED,
    SERVER_UNSUBSCRIBE,
    SLOW,
    STALE,
    SUBSCRIPTION_EXPIRED,
    TOKEN_EXPIRED,
    UNRECOVERABLE_POSITION,
    UNSUBSCRIBE_EXPIRED,
    UNSUBSCRIBE_INSUFFICIENT_STATE,
    UNSUPPORTED,
    Disconnect,
    Disconnected,
    Refused,
    Unavailable,
    Unsubscribe,
)
from server.history import Draft
from server.hub import Subscription, express
from server.jwks import Keys
from server.node import Node
from server.observe import event
from server.outbox import Outbox, Request
from server.protocol import Command
from server.stream import ClientInfo, Cursor, Page, Position, Publication, catch_up

INBOX = 64
"""Commands that may wait behind a slow one before the socket is read no further."""

TURN = 200
"""Commands of one client that are answered in one loop turn before others have theirs."""

YEAR_S = 365 * 24 * 3600


class State(Enum):
    """Where a session is in its life; PROTOCOL 3.4."""

    NEW = "waits for connect"
    CONNECTING = "connect is being answered"
    REJECTED = "connect was answered with an error"
    CONNECTED = "at work"
    CLOSED = "over"


class Gate(msgspec.Struct, frozen=True):
    """Who checks tokens: one verifier for connections, one for subscriptions, and the keys both may have to fetch."""

    connection: Verifier
    subscription: Verifier
    keys: Keys


class Session:
    """See the module's docstring.  Made by a transport when a client arrives."""

    __slots__ = (
        "_arrived",
        "_busy",
        "_granted",
        "_inbox",
        "_paused",
        "_pong_by",
        "_stale_at",
        "client",
        "expire_at",
        "gate",
        "identity",
        "info",
        "next_ping",
        "node",
        "outbox",
        "request",
        "state",
        "subscriptions",
        "user",
    )

    def __init__(self, node: Node, gate: Gate, outbox: Outbox, request: Request) -> None:
        self.node = node
        self.gate = gate
        self.outbox = outbox
        self.request = request
        self.client = str(uuid.uuid4())
        self.user = ""
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
        self._granted: frozenset[str] = frozenset()
        self._arrived = 0.0
        self._stale_at = node.clock() + node.settings.client.stale_close_delay
        node.timetable.put(self, self._stale_at)
        event("connection.opened", client=self.client, transport=request.transport, address=request.remote_addr)

    def __repr__(self) -> str:
        return f"<Session {self.client} user={self.user!r} {self.state.name} channels={len(self.subscriptions)}>"

    @property
    def closed(self) -> bool:
        """Is it over?  To be asked after every wait."""
        return self.state is State.CLOSED

    # --- what the transport tells us ------------------------------------------
    def receive(self, message: bytes) -> None:
        """Take one message of the client, a batch of commands; never waits, never raises."""
        if self.closed:
            return
        try:
            commands = protocol.CODECS[self.outbox.wire.format].decode(message)
        except Disconnected as end:
            self.disconnect(end.disconnect, end.why)
            return
        now = self.node.clock()
        inbox = self._inbox
        if inbox is None:
            if len(commands) == 1 and not self._busy:
                self._work(commands[0], now)
                return
            inbox = self._inbox = deque()
        inbox.extend((command, now) for command in commands)
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

    def native_pong(self) -> None:
        """The answer to a ping of the transport's own."""
        self._pong_by = math.inf

    # --- commands in turn ------------------------------------------------------
    def _work(self, command: Command, arrived: float) -> None:
        """Answer one command now, or start the task that will."""
        self._arrived = arrived
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
                event("command.refused", client=self.client, method=method, code=refusal.code, why=why)
            case Unavailable():
                refusal = INTERNAL
                event("command.refused", client=self.client, method=method, code=refusal.code, why=str(error))
            case protocol.Inexpressible():
                self.disconnect(INAPPROPRIATE_PROTOCOL, str(error))
                return
            case _:
                refusal = INTERNAL
                event("command.failed", client=self.client, method=method, fault=error)
        if method == "connect":
            self.state = State.REJECTED
            self._inbox = None
        if command.id:
            self._write(protocol.CODECS[self.outbox.wire.format].refusal(command.id, refusal))

    def _dispatch(self, command: Command) -> Coroutine[Any, Any, None] | None:
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
        if self.state is not State.CONNECTED and (method != "connect" or self.state is not State.NEW):
            raise Disconnected(MALFORMED, f"a command {method} came while the session {self.state.value}")
        carry_out: Callable[[Session, Command], Coroutine[Any, Any, None] | None] = _METHODS[method]
        return carry_out(self, command)

    def _reply(self, command: Command, method: str, result: protocol.Body = protocol.EMPTY) -> None:
        self._write(protocol.CODECS[self.outbox.wire.format].reply(command.id, method, result))

    def _push(self, channel: str, kind: str, body: protocol.Body) -> None:
        self._write(protocol.CODECS[self.outbox.wire.format].push(channel, kind, body))

    def _write(self, message: bytes) -> None:
        if not self.closed:
            self.node.hub.post(self.outbox, self.outbox.wire.frame(message))

    # --- connect ---------------------------------------------------------------
    def _connect(self, command: Command) -> Coroutine[Any, Any, None]:
        if self.state is not State.NEW:
            raise Disconnected(MALFORMED, "a second connect")
        self.state = State.CONNECTING
        return self._connect_patiently(command)

    async def _connect_patiently(self, command: Command) -> None:
        """PROTOCOL 4.1."""
        request = command.connect
        assert request is not None
        settings = self.node.settings.client
        conn_info, wanted = await self._identify(request)
        if self.closed:
            return
        self.info = ClientInfo(self.user, self.client, conn_info)
        limit = settings.user_connection_limit
        if limit and self.user and len(self.node.users.get(self.user, ())) >= limit:
            raise Disconnected(CONNECTION_LIMIT, f"look at client.user_connection_limit ({limit})")
        personal = settings.subscribe_to_user_personal_channel
        if personal.enabled and self.user:
            name = self.node.channels.personal(self.user, personal.personal_channel_namespace)
            wanted.setdefault(name, SubscribeOptions(None, None))
        namespaces = {channel: self.node.channels.known(channel) for channel in wanted}
        for channel in request.subs:
            if channel not in wanted and (namespace := self._wish(channel)) is not None:
                wanted[channel], namespaces[channel] = SubscribeOptions(None, None), namespace
        if len(wanted) > settings.channel_limit:
            raise Disconnected(CHANNEL_LIMIT, f"look at client.channel_limit ({settings.channel_limit})")
        self.node.admit(self)
        if personal.enabled and personal.single_connection and self.user:
            self._replace_others(personal.personal_channel_namespace)
        joined = await asyncio.gather(
            *(
                self._join(
                    channel,
                    namespaces[channel],
                    request.subs.get(channel) or protocol.SubscribeRequest(),
                    options,
                    server_side=True,
                )
                for channel, options in wanted.items()
            ),
            return_exceptions=True,
        )
        if self.closed:
            return
        for outcome in joined:
            if isinstance(outcome, BaseException):
                self._leave_all()
                self.node.dismiss(self)
                raise outcome
        self._welcome(command, [outcome for outcome in joined if isinstance(outcome, tuple)])

    def _welcome(
        self, command: Command, joined: "list[tuple[Subscription, protocol.SubscribeResult, Position | None]]"
    ) -> None:
        """Reply to connect and let everything begin, in one loop turn."""
        settings = self.node.settings.client
        now = self.node.clock()
        native = self.request.native_pings
        result = protocol.ConnectResult(
            client=self.client,
            version=f"waterspout {__version__}",
            expires=bool(self.expire_at),
            ttl=_ttl(self.expire_at, now),
            subs={subscription.channel: result for subscription, result, _ in joined},
            ping=0 if native else int(settings.ping_interval),
            pong=not native and settings.ping_interval > 0,
            time=int(now * 1000) if settings.connect_include_server_time else 0,
        )
        self.state = State.CONNECTED
        self._reply(command, "connect", result)
        for subscription, _, top in joined:
            self._begin(subscription, top)
        if settings.ping_interval > 0:
            self.next_ping = now + settings.ping_interval * random.uniform(0.5, 1.0)
        self._plan()
        event(
            "connection.accepted",
            client=self.client,
            user=self.user,
            transport=self.request.transport,
            address=self.request.remote_addr,
        )

    async def _identify(self, request: protocol.ConnectRequest) -> tuple[bytes | None, dict[str, SubscribeOptions]]:
        """Find out who the client is; returns its info and the channels it gets; PROTOCOL 4.1, 8.5."""
        settings = self.node.settings.client
        if request.token:
            try:
                claims = await self.gate.keys.verified(
                    lambda: self.gate.connection.connection(request.token, self.node.clock())
                )
            except TokenExpired:
                raise Refused(TOKEN_EXPIRED) from None
            except TokenInvalid as error:
                raise Disconnected(INVALID_TOKEN, error.why) from None
            if not claims.user and settings.disallow_anonymous_connection_tokens:
                raise Disconnected(
                    FORBIDDEN, "a token without user; client.disallow_anonymous_connection_tokens is set"
                )
            if not settings.insecure and claims.expire_at:
                if claims.expire_at <= self.node.clock():
                    raise Refused(EXPIRED, "the token's expire_at is past")
                self.expire_at = claims.expire_at
            self._name(claims.user)
            self._granted = frozenset(claims.subs)
            return _json_info(claims.info), dict(claims.subs)
        header = settings.user_id_http_header.lower()
        user = self.request.headers.get(header, "") if header else ""
        if not user and not settings.insecure and not settings.allow_anonymous_connect_without_token:
            raise Disconnected(
                MALFORMED, "connect without token; client.allow_anonymous_connect_without_token is not set"
            )
        self._name(user)
        return None, {}

    def _name(self, user: str) -> None:
        self.user = user
        self.identity = Identity(user, self.node.settings.client.insecure)

    def _wish(self, channel: str) -> Namespace | None:
        """The namespace of a channel named in connect's ``subs``, if one could subscribe to it (PROTOCOL 4.1)."""
        namespace = self.node.channels.namespace(channel)
        if namespace is None:
            raise Disconnected(MALFORMED, f"connect.subs names a channel of an unknown namespace: {channel[:64]!r}")
        try:
            self.node.channels.check_name(channel, namespace)
            self.node.channels.may_subscribe(self.identity, channel, namespace)
        except Refused as refused:
            event("command.refused", client=self.client, method="connect", code=refused.refusal.code, why=refused.why)
            return None
        return namespace

    def _replace_others(self, personal_namespace: str) -> None:
        """Of one user's connections only the newest stays (PROTOCOL 9.2)."""
        name = self.node.channels.personal(self.user, personal_namespace)
        namespace = self.node.channels.namespace(name)
        if namespace is not None and namespace.options.presence:
            target = wires.Target(self.user, spared=(self.client,))
            self.node.order(wires.DisconnectOrder(target, CONNECTION_LIMIT.code, CONNECTION_LIMIT.reason))

    # --- subscribe ---------------------------------------------------------------
    def _subscribe(self, command: Command) -> Coroutine[Any, Any, None]:
        """PROTOCOL 4.2, 10.2."""
        request = command.subscribe
        assert request is not None
        channels = self.node.channels
        channel = _named(request.channel)
        channels.check_length(channel)
        if channel in self.subscriptions:
            raise Refused(ALREADY_SUBSCRIBED)
        limit = self.node.settings.client.channel_limit
        if len(self.subscriptions) >= limit:
            raise Refused(LIMIT_EXCEEDED, f"look at client.channel_limit ({limit})")
        namespace = channels.known(channel)
        channels.check_name(channel, namespace)
        if request.type:
            raise Refused(unknown_type(request.type), f"subscription type {request.type} is not offered")
        if request.delta not in ("", "fossil"):
            raise Disconnected(MALFORMED, "an unknown delta type")
        if request.tf is not msgspec.UNSET:
            raise Refused(BAD_REQUEST, "tag filters are not offered")
        return self._subscribe_patiently(command, request, namespace)

    async def _subscribe_patiently(
        self, command: Command, request: protocol.SubscribeRequest, namespace: Namespace
    ) -> None:
        channel = request.channel
        options, expire_at = SubscribeOptions(None, None), 0
        if request.token:
            options, expire_at = await self._admitted_by_token(channel, request.token)
        else:
            self.node.channels.may_subscribe(self.identity, channel, namespace)
        if self.closed:
            return
        if channel in self.subscriptions:
            raise Refused(ALREADY_SUBSCRIBED, "subscribed by the server meanwhile")
        subscription, result, top = await self._join(channel, namespace, request, options, expire_at=expire_at)
        if subscription.closed:
            if not self.closed:
                raise Refused(PERMISSION_DENIED, "unsubscribed by the server while subscribing")
            return
        self._reply(command, "subscribe", result)
        self._begin(subscription, top)
        if expire_at:
            self._plan()

    async def _admitted_by_token(self, channel: str, token: str) -> tuple[SubscribeOptions, int]:
        """What a subscription token grants, and until when; PROTOCOL 8.2."""
        try:
            claims = await self.gate.keys.verified(
                lambda: self.gate.subscription.subscription(token, self.node.clock())
            )
        except TokenExpired:
            raise Refused(TOKEN_EXPIRED) from None
        except TokenInvalid as error:
            raise Refused(PERMISSION_DENIED, error.why) from None
        self._check_owner(claims.user, claims.client)
        if claims.channel != channel:
            raise Disconnected(INVALID_TOKEN, "a subscription token is for another channel")
        if claims.expire_at and claims.expire_at <= self.node.clock():
            raise Refused(EXPIRED, "the subscription token's expire_at is past")
        return SubscribeOptions(claims.info, claims.data, claims.override), claims.expire_at

    def _check_owner(self, user: str, client: str) -> None:
        if user != self.user:
            raise Disconnected(INVALID_TOKEN, "a subscription token is for another user")
        if client and client != self.client:
            raise Disconnected(INVALID_TOKEN, "a subscription token is for another client")

    async def _join(
        self,
        channel: str,
        namespace: Namespace,
        request: protocol.SubscribeRequest,
        options: SubscribeOptions,
        *,
        expire_at: int = 0,
        server_side: bool = False,
    ) -> tuple[Subscription, protocol.SubscribeResult, Position | None]:
        """Register, read, and work out the result; the caller replies and then calls ``_begin`` in the same turn.

        The permission has been checked.  Also returns where history stood.
        """
        granted = grant(
            self.node.channels,
            self.identity,
            namespace,
            options.override,
            positioned=request.positioned,
            recoverable=request.recoverable,
            join_leave=request.join_leave,
        )
        info = self.info
        if options.info is not None:
            info = ClientInfo(info.user, info.client, info.conn_info, _json_info(options.info))
        subscription = Subscription(self, self.outbox, channel, namespace, info)
        subscription.server_side = server_side
        subscription.positioned = granted.positioned
        subscription.recoverable = granted.recoverable
        subscription.present = granted.presence
        subscription.leaves_word = granted.join_leave
        subscription.expire_at = expire_at
        self.subscriptions[channel] = subscription
        since = Position(request.offset, request.epoch) if request.recover and granted.recoverable else None
        try:
            page = await self.node.subscribe(subscription, since)
            if not subscription.closed:
                await self.node.enter(subscription)
            result = self._result(subscription, request, since, page)
        except BaseException:
            self._drop(subscription)
            raise
        result.data = protocol.payload(_json_info(options.data) if self.outbox.wire.format == "json" else options.data)
        if expire_at:
            result.expires, result.ttl = True, _ttl(expire_at, self.node.clock())
        subscription.joins = False if subscription.closed else granted.joins
        return subscription, result, page.top if page is not None else None

    def _result(
        self,
        subscription: Subscription,
        request: protocol.SubscribeRequest,
        since: Position | None,
        page: Page | None,
    ) -> protocol.SubscribeResult:
        """The result of a subscription, from the page that was read for it; places its cursor.  PROTOCOL 11.3, 11.4."""
        result = protocol.SubscribeResult(positioned=subscription.positioned, recoverable=subscription.recoverable)
        if page is None:
            return result
        top = page.top
        position = top
        if since is not None:
            result.was_recovering = True
            caught = catch_up(since, page)
            limit = self._recovery_limit(subscription.namespace)
            result.recovered = caught.recovered and not (limit and top.offset - since.offset > limit)
            if result.recovered:
                position = caught.position
                missed = caught.publications
                result.publications = self._express(subscription.namespace, missed, top.epoch)
                subscription.cursor = Cursor(Position(missed[-1].offset, top.epoch) if missed else position)
                event("subscription.recovered", client=self.client, channel=subscription.channel, since=since, top=top)
            else:
                event(
                    "subscription.unrecoverable",
                    client=self.client,
                    channel=subscription.channel,
                    since=since,
                    top=top,
                    floor=page.floor,
                )
                if request.flag & 2:
                    raise Refused(UNRECOVERABLE_POSITION)
        if not result.recovered:
            subscription.cursor = Cursor(top)
        if subscription.positioned:
            result.offset, result.epoch = position.offset, position.epoch
        return result

    def _express(
        self, namespace: Namespace, publications: Sequence[Publication], epoch: str
    ) -> list[protocol.Publication]:
        format = self.outbox.wire.format
        return [express(format, publication, epoch, namespace) for publication in publications]

    def _recovery_limit(self, namespace: Namespace) -> int:
        return (
            namespace.options.recovery_max_publication_limit or self.node.settings.client.recovery_max_publication_limit
        )

    def _begin(self, subscription: Subscription, top: Position | None) -> None:
        """The reply is out: let the subscription go live, and say the join."""
        if subscription.closed:
            return
        self.node.settle(subscription, top)
        self.node.say_join(subscription)

    # --- the end of a subscription -------------------------------------------------
    def _drop(self, subscription: Subscription) -> None:
        """Forget a subscription now; what others must learn of it is seen to beside us."""
        if self.subscriptions.get(subscription.channel) is subscription:
            del self.subscriptions[subscription.channel]
        if not subscription.closed:
            self.node.release(subscription)
            if subscription.present or subscription.leaves_word:
                self.node.spawn(self.node.exit(subscription), f"exit {subscription.channel}")

    def _end_subscription(self, subscription: Subscription, unsubscribe: Unsubscribe) -> None:
        self._drop(subscription)
        self._push(subscription.channel, "unsubscribe", protocol.Unsubscribe(unsubscribe.code, unsubscribe.reason))

    def lose(self, subscription: Subscription) -> None:
        """History no longer holds what this subscription needs next; PROTOCOL 11.2."""
        if subscription.closed:
            return
        event("subscription.lost", client=self.client, channel=subscription.channel)
        if subscription.server_side:
            self.disconnect(INSUFFICIENT_STATE, f"history of {subscription.channel!r} was trimmed under it")
        else:
            self._end_subscription(subscription, UNSUBSCRIBE_INSUFFICIENT_STATE)

    def _unsubscribe(self, command: Command) -> Coroutine[Any, Any, None] | None:
        """PROTOCOL 4.3; unsubscribing from what one is not subscribed to succeeds."""
        request = command.unsubscribe
        assert request is not None
        subscription = self.subscriptions.get(_named(request.channel))
        if subscription is None:
            self._reply(command, "unsubscribe")
            return None
        del self.subscriptions[subscription.channel]
        self.node.release(subscription)
        return self._unsubscribe_patiently(command, subscription)

    async def _unsubscribe_patiently(self, command: Command, subscription: Subscription) -> None:
        await self.node.exit(subscription)
        self._reply(command, "unsubscribe")

    # --- publish, history, presence, rpc --------------------------------------------
    def _publish(self, command: Command) -> Coroutine[Any, Any, None] | None:
        """PROTOCOL 4.4."""
        request = command.publish
        assert request is not None
        if request.type or request.key or request.removed:
            raise Refused(NOT_AVAILABLE, "map channels are not offered")
        channel = _named(request.channel)
        namespace, draft = self._draft(channel, protocol.given(request.data))
        if namespace.kept:
            return self._publish_patiently(command, channel, namespace, draft)
        self.node.publish_passing(channel, Publication(draft.data, info=draft.info))
        self._reply(command, "publish")
        return None

    def _draft(self, channel: str, data: bytes | None, key: str = "") -> tuple[Namespace, Draft]:
        """What this client would publish, if it may; PROTOCOL 10.4."""
        channels = self.node.channels
        namespace = channels.known(channel)
        channels.check_name(channel, namespace)
        payload = check_payload(data, namespace)
        subscription = self.subscriptions.get(channel)
        channels.require("publish", self.identity, namespace, subscribed=subscription is not None)
        info = self.info if subscription is None else subscription.info
        return namespace, Draft(payload if namespace.binary else protocol.one_line(payload), info=info, key=key)

    async def _publish_patiently(self, command: Command, channel: str, namespace: Namespace, draft: Draft) -> None:
        await self.node.publish(channel, namespace, draft, self._patience_s())
        self._reply(command, "publish")

    def _patience_s(self) -> float:
        """What is left of the time in which an SDK waits for its reply, since commands queue behind one another."""
        left = self._arrived + self.node.patience_s - self.node.clock()
        if left <= 0:
            raise Refused(INTERNAL, "the commands before it took all of the publish timeout")
        return left

    async def _history(self, command: Command) -> None:
        """PROTOCOL 4.6."""
        request = command.history
        assert request is not None
        channel = _named(request.channel)
        channels = self.node.channels
        namespace = channels.known(channel)
        channels.check_name(channel, namespace)
        channels.require("history", self.identity, namespace, subscribed=channel in self.subscriptions)
        most = self.node.settings.client.history_max_publication_limit
        limit = most if request.limit < 0 else min(request.limit, most)
        result = await history_page(
            self.node, self.outbox.wire.format, channel, namespace, limit, request.since, request.reverse
        )
        self._reply(command, "history", result)

    async def _presence(self, command: Command) -> None:
        """PROTOCOL 4.5."""
        assert command.presence is not None
        channel = self._presence_channel(command.presence)
        members = await self.node.presence.members(channel, self.node.clock())
        result = protocol.PresenceResult({client: protocol.client_info(info) for client, info in members.items()})
        self._reply(command, "presence", result)

    async def _presence_stats(self, command: Command) -> None:
        """PROTOCOL 4.5."""
        assert command.presence_stats is not None
        channel = self._presence_channel(command.presence_stats)
        clients, users = await self.node.presence.stats(channel, self.node.clock())
        self._reply(command, "presence_stats", protocol.PresenceStatsResult(clients, users))

    def _presence_channel(self, request: protocol.ChannelRequest) -> str:
        channel = _named(request.channel)
        namespace = self.node.channels.known(channel)
        self.node.channels.check_name(channel, namespace)
        self.node.channels.require("presence", self.identity, namespace, subscribed=channel in self.subscriptions)
        return channel

    def _rpc(self, command: Command) -> Coroutine[Any, Any, None] | None:
        """PROTOCOL 4.7; ``publish`` is built in, and ``ping`` if ``rpc.ping.enabled``."""
        request = command.rpc
        assert request is not None
        if request.method == "publish":
            return self._rpc_publish(command, protocol.given(request.data))
        if request.method == "ping" and self.node.settings.rpc.ping.enabled:
            self._reply(command, "rpc", protocol.RPCResult())
            return None
        raise Refused(NOT_AVAILABLE, f"no RPC method {request.method[:64]!r}")

    async def _rpc_publish(self, command: Command, data: bytes | None) -> None:
        """Publish with an idempotency key, and learn the position."""
        try:
            request = _rpc_publish_request.decode(data or b"")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Refused(BAD_REQUEST, f"rpc publish takes channel, data, idempotency_key: {error}") from None
        if not request.channel:
            raise Refused(BAD_REQUEST, "rpc publish without channel")
        namespace, draft = self._draft(request.channel, protocol.given(request.data), request.idempotency_key)
        appended = await self.node.publish(request.channel, namespace, draft, self._patience_s())
        position = appended.position
        result = {"offset": position.offset, "epoch": position.epoch} if position.offset else {}
        self._reply(command, "rpc", protocol.RPCResult(msgspec.Raw(msgspec.json.encode(result))))

    def _send(self, command: Command) -> None:
        """PROTOCOL 4.8."""
        raise Disconnected(UNSUPPORTED, "nobody here takes messages sent without reply")

    def _ping(self, command: Command) -> None:
        raise Disconnected(MALFORMED, "the command ping is of protocol version 1")

    # --- refresh -----------------------------------------------------------------
    async def _refresh(self, command: Command) -> None:
        """PROTOCOL 4.9."""
        request = command.refresh
        assert request is not None
        if not request.token:
            raise Disconnected(MALFORMED, "refresh without token")
        try:
            claims = await self.gate.keys.verified(
                lambda: self.gate.connection.connection(request.token, self.node.clock())
            )
        except TokenExpired:
            raise Disconnected(CONNECTION_EXPIRED, "refresh with an expired token") from None
        except TokenInvalid as error:
            raise Disconnected(INVALID_TOKEN, error.why) from None
        if claims.user != self.user:
            raise Disconnected(INVALID_TOKEN, "refresh with another user's token")
        now = self.node.clock()
        if claims.expire_at and claims.expire_at <= now:
            raise Refused(EXPIRED, "the token's expire_at is past")
        if claims.subs.keys() != self._granted:
            raise Disconnected(INSUFFICIENT_STATE, "the refreshed token has other channels")
        self.info = ClientInfo(self.user, self.client, _json_info(claims.info))
        self.expire_at = 0 if self.node.settings.client.insecure else claims.expire_at
        self._plan()
        self._reply(command, "refresh", protocol.RefreshResult(bool(self.expire_at), _ttl(self.expire_at, now)))

    async def _sub_refresh(self, command: Command) -> None:
        """PROTOCOL 4.10; the channel may be missing, as one SDK leaves it out, and is then the token's."""
        request = command.sub_refresh
        assert request is not None
        if request.type:
            raise Refused(NOT_AVAILABLE, "shared poll is not offered")
        if not request.token:
            raise Refused(BAD_REQUEST, "sub_refresh without token")
        if request.channel and request.channel not in self.subscriptions:
            raise Refused(PERMISSION_DENIED, "sub_refresh of a channel that is not subscribed")
        now = self.node.clock()
        try:
            claims = await self.gate.keys.verified(lambda: self.gate.subscription.subscription(request.token, now))
        except TokenExpired:
            subscription = self.subscriptions.get(request.channel)
            at = subscription.expire_at if subscription else 0
            self._reply(command, "sub_refresh", protocol.RefreshResult(bool(at), _ttl(at, now)))
            return
        except TokenInvalid as error:
            raise Disconnected(INVALID_TOKEN, error.why) from None
        self._check_owner(claims.user, claims.client)
        if request.channel and claims.channel != request.channel:
            raise Disconnected(INVALID_TOKEN, "a subscription token is for another channel")
        subscription = self.subscriptions.get(claims.channel)
        if subscription is None:
            raise Refused(PERMISSION_DENIED, "sub_refresh of a channel that is not subscribed")
        if claims.expire_at and claims.expire_at <= now:
            raise Refused(EXPIRED, "the subscription token's expire_at is past")
        subscription.expire_at = claims.expire_at
        self._plan()
        self._reply(command, "sub_refresh", protocol.RefreshResult(bool(claims.expire_at), _ttl(claims.expire_at, now)))

    # --- orders of the back end (PROTOCOL 15.2) -------------------------------------
    def unsubscribe_by_order(self, channel: str) -> None:
        """End the subscription of ``channel``, or all of them if it is empty, with 2000."""
        for subscription in list(self.subscriptions.values()):
            if not channel or subscription.channel == channel:
                self._end_subscription(subscription, SERVER_UNSUBSCRIBE)

    def subscribe_by_order(self, order: wires.SubscribeOrder) -> None:
        """Subscribe server-side; no effect if already subscribed."""
        if order.channel not in self.subscriptions and self.state is State.CONNECTED:
            self.node.spawn(self._subscribe_by_order(order), f"subscribe {self.client}")

    async def _subscribe_by_order(self, order: wires.SubscribeOrder) -> None:
        namespace = self.node.channels.namespace(order.channel)
        if namespace is None:
            return
        request = protocol.SubscribeRequest(channel=order.channel)
        if order.since is not None:
            request.recover, request.offset, request.epoch = True, order.since.offset, order.since.epoch
        options = SubscribeOptions(order.info, order.data, Override(**order.override))
        try:
            subscription, result, top = await self._join(
                order.channel, namespace, request, options, expire_at=order.expire_at, server_side=True
            )
        except (Unavailable, protocol.Inexpressible) as error:
            event("command.refused", client=self.client, method="subscribe", code=INTERNAL.code, why=str(error))
            return
        if subscription.closed:
            return
        if result.recovered and result.publications:
            # The push has no room for publications: they follow as ordinary pushes.
            subscription.cursor = Cursor(Position(result.offset, result.epoch))
        self._push(
            order.channel,
            "subscribe",
            protocol.Subscribe(result.recoverable, result.epoch, result.offset, result.positioned, result.data),
        )
        self._begin(subscription, top)
        self._plan()

    def refresh_by_order(self, order: wires.RefreshOrder) -> None:
        """Move the connection's expiry, or end it as expired."""
        if order.expired:
            self.disconnect(CONNECTION_EXPIRED, "ordered by the back-end API")
            return
        self.expire_at = order.expire_at
        if order.info is not None:
            self.info = ClientInfo(self.user, self.client, _json_info(order.info))
        self._plan()
        ttl = _ttl(order.expire_at, self.node.clock())
        self._push("", "refresh", protocol.RefreshResult(bool(order.expire_at), ttl))

    # --- time ------------------------------------------------------------------------
    def _pong(self, command: Command) -> None:
        if command.id or self._pong_by == math.inf:
            raise Disconnected(MALFORMED, "a command without method, or a pong that nobody asked for")
        self._pong_by = math.inf

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
        if self.expire_at and now >= self.expire_at + settings.expired_close_delay:
            self.disconnect(CONNECTION_EXPIRED, "the token expired and was not refreshed")
            return
        if not self._expire_subscriptions(now - settings.expired_sub_close_delay):
            return
        if now >= self.next_ping:
            self.next_ping = now + settings.ping_interval
            self._pong_by = now + settings.pong_timeout
            if self.request.native_pings:
                self.outbox.send(self.outbox.ping_frame())
            else:
                self._write(protocol.CODECS[self.outbox.wire.format].ping)
        self._plan()

    def _expire_subscriptions(self, until: float) -> bool:
        """End the subscriptions that expired before ``until``; false if that ended the connection."""
        expired = [sub for sub in self.subscriptions.values() if sub.expire_at and sub.expire_at <= until]
        for subscription in expired:
            if subscription.server_side:
                self.disconnect(SUBSCRIPTION_EXPIRED, f"the subscription of {subscription.channel!r} expired")
                return False
            self._end_subscription(subscription, UNSUBSCRIBE_EXPIRED)
        return True

    def _plan(self) -> None:
        """Enter into the timetable when this session next has something due."""
        if self.state is not State.CONNECTED:
            return
        settings = self.node.settings.client
        due = min(self.next_ping, self._pong_by)
        if self.expire_at:
            due = min(due, self.expire_at + settings.expired_close_delay)
        for subscription in self.subscriptions.values():
            if subscription.expire_at:
                due = min(due, subscription.expire_at + settings.expired_sub_close_delay)
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
        event("connection.closed", **fields)
        self.state = State.CLOSED
        self._inbox = None
        self.node.timetable.remove(self)
        self.node.dismiss(self)
        self._leave_all()

    def _leave_all(self) -> None:
        subscriptions, self.subscriptions = self.subscriptions, {}
        to_tell = []
        for subscription in subscriptions.values():
            self.node.release(subscription)
            if subscription.present or subscription.leaves_word:
                to_tell.append(subscription)
        if to_tell:
            self.node.spawn(self._exit_all(to_tell), f"exit {self.client}")

    async def _exit_all(self, subscriptions: list[Subscription]) -> None:
        for subscription in subscriptions:
            await self.node.exit(subscription)


async def history_page(
    node: Node,
    format: str,
    channel: str,
    namespace: Namespace,
    limit: int,
    since: protocol.StreamPosition | None,
    reverse: bool,
) -> protocol.HistoryResult:
    """Answer a history command of a client or of the back end; PROTOCOL 4.6.

    Raises ``Refused``: 107 for ``reverse`` from offset 0, 112 for another epoch.
    """
    if reverse and since is not None and not since.offset:
        raise Refused(BAD_REQUEST, "history in reverse from offset 0")
    page = await node.read(
        channel, namespace, since=None if since is None else since.offset, limit=limit, reverse=reverse
    )
    if since is not None and since.epoch and since.epoch != page.top.epoch:
        raise Refused(UNRECOVERABLE_POSITION, "history since a position of another epoch")
    publications = page.publications
    if reverse and since is not None and since.offset <= page.floor:
        publications = ()
    return protocol.HistoryResult(
        [express(format, publication, page.top.epoch, namespace) for publication in publications],
        page.top.epoch,
        page.top.offset,
    )


class _RpcPublish(msgspec.Struct):
    channel: str = ""
    data: protocol.Payload = msgspec.UNSET
    idempotency_key: str = ""


_rpc_publish_request = msgspec.json.Decoder(_RpcPublish)

_METHODS: dict[str, Callable[[Session, Command], Coroutine[Any, Any, None] | None]] = {
    "connect": Session._connect,
    "subscribe": Session._subscribe,
    "unsubscribe": Session._unsubscribe,
    "publish": Session._publish,
    "presence": Session._presence,
    "presence_stats": Session._presence_stats,
    "history": Session._history,
    "rpc": Session._rpc,
    "send": Session._send,
    "ping": Session._ping,
    "refresh": Session._refresh,
    "sub_refresh": Session._sub_refresh,
}


def _named(channel: str) -> str:
    if not channel:
        raise Disconnected(MALFORMED, "a command without channel")
    return channel


def _ttl(expire_at: int, now: float) -> int:
    """Seconds until ``expire_at``, at least 1, at most a year; 0 if it never comes (PROTOCOL 8.3)."""
    return min(max(1, math.ceil(expire_at - now)), YEAR_S) if expire_at else 0


def _json_info(info: bytes | None) -> bytes | None:
    """Info as JSON: bytes that are none (``b64info``) become a base64 string, so that everybody can be shown them."""
    if info is None or protocol.is_json(info):
        return info
    return msgspec.json.encode(info)
