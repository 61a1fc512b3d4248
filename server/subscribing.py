"""How a subscription begins: may it, from where, and what its first reply says.

The order matters more than anything here.  A subscription is registered before
its page of history is read (``Node.subscribe``); its reply and its first step to
going live happen in one loop turn (``begin``), so that nothing can come between.
PROTOCOL 4.2, 8.2, 10, 11, 12.1, 13.1, 21.4.
"""

from collections.abc import Coroutine
from typing import Any

import msgspec

from server import filters, orders, protocol
from server.auth import Override, SubscribeOptions, TokenExpired, TokenInvalid
from server.channels import Namespace, grant, unknown_type
from server.errors import (
    ALREADY_SUBSCRIBED,
    BAD_REQUEST,
    CONNECTION_CLOSED,
    EXPIRED,
    INTERNAL,
    INVALID_TOKEN,
    LIMIT_EXCEEDED,
    MALFORMED,
    PERMISSION_DENIED,
    TOKEN_EXPIRED,
    UNRECOVERABLE_POSITION,
    Disconnected,
    Refused,
    Unavailable,
    Unsubscribed,
)
from server.hooks import Allow, Client, Hook, Hooks
from server.hub import Subscription
from server.limits import owner_of
from server.manners import Delta, Manner, bodies
from server.observe import event
from server.pages import Recovery
from server.protocol import Command
from server.session import Entrant, Session, json_info, ttl_s
from server.stream import ClientInfo, Cursor, Page, Position, catch_up

UNADORNED = SubscribeOptions(None, None)
"""A subscription as its namespace and the client have it."""


# --- subscribe ---------------------------------------------------------------
def subscribe(session: Session, command: Command) -> Coroutine[Any, Any, None]:
    """PROTOCOL 4.2, 10.2."""
    request = command.subscribe
    assert request is not None
    channels = session.node.channels
    channel = named(request.channel)
    channels.check_length(channel)
    if channel in session.subscriptions:
        raise Refused(ALREADY_SUBSCRIBED)
    limit = session.node.settings.client.channel_limit
    if len(session.subscriptions) >= limit:
        raise Refused(LIMIT_EXCEEDED, f"look at client.channel_limit ({limit})")
    namespace = channels.known(channel)
    channels.check_name(channel, namespace)
    if request.type:
        raise Refused(unknown_type(request.type), f"subscription type {request.type} is not offered")
    if request.delta not in ("", "fossil"):
        raise Disconnected(MALFORMED, "an unknown delta type")
    return _subscribe_patiently(session, command, request, namespace, _manner(session, request, namespace))


def _manner(session: Session, request: protocol.SubscribeRequest, namespace: Namespace) -> Manner:
    """How the client wants to be sent to, as far as that is granted; PROTOCOL 12.1, 13.1, 21.4."""
    options, filter, delta = namespace.options, None, Delta.OFF
    if request.tf is not msgspec.UNSET:
        if not options.allow_tags_filter:
            raise Refused(BAD_REQUEST, f"a filter; look at allow_tags_filter of namespace {namespace.name!r}")
        try:
            filter = filters.read(bytes(request.tf))
        except ValueError as error:
            raise Refused(BAD_REQUEST, str(error)) from None
    elif request.delta in options.allowed_delta_types:
        delta = Delta.FULL
    # Not in Protobuf: where numbers of 64 bits are objects, centrifuge-js 5.8 finds no subscription by its number.
    numbered = bool(request.flag & 1) and session.outbox.wire.format == "json"
    return Manner.of(session.outbox.wire, numbered=numbered, filter=filter, delta=delta)


async def _subscribe_patiently(
    session: Session, command: Command, request: protocol.SubscribeRequest, namespace: Namespace, manner: Manner
) -> None:
    channel = request.channel
    options, expire_at = SubscribeOptions(None, None), 0
    if request.token:
        options, expire_at = await _admitted_by_token(session, channel, request.token)
    else:
        session.node.channels.may_subscribe(session.identity, channel, namespace)
    if session.node.hooks is not None:
        options = await ask_subscribing(
            session, session.node.hooks, channel, namespace, request.data, options, by_token=bool(request.token)
        )
    expire_at = options.expire_at or expire_at
    await session.make_room()
    if session.closed:
        return
    if channel in session.subscriptions:
        raise Refused(ALREADY_SUBSCRIBED, "subscribed by the server meanwhile")
    try:
        subscription, result, top = await join(
            session,
            channel,
            namespace,
            request,
            options,
            asked_at=session.arrived,
            expire_at=expire_at,
            manner=manner,
        )
    except Unsubscribed:
        if session.closed:
            return
        if namespace is not session.node.channels.namespace(channel):
            raise Unavailable("the options of its namespace have changed while it subscribed") from None
        raise Refused(PERMISSION_DENIED, "unsubscribed by the server while subscribing") from None
    session.reply(command, "subscribe", result)
    begin(session, subscription, top)
    if expire_at:
        session.plan()


async def ask_subscribing(
    entrant: Entrant,
    hooks: Hooks,
    channel: str,
    namespace: Namespace,
    data: protocol.Payload,
    options: SubscribeOptions = UNADORNED,
    *,
    by_token: bool = False,
) -> SubscribeOptions:
    """Ask the hook about a subscription that is permitted otherwise; raises what it refuses with.

    A hook that decides is not asked where a token has decided, or a user-limited name (PROTOCOL 10.2).
    """
    hook, client = hooks.find("subscribing", namespace.name), entrant.handle
    if hook is None or client is None:
        return options
    if hook.decides and (by_token or entrant.node.channels.users_of(channel, namespace) is not None):
        return options
    allow = await hooks.ask(hook, client, channel, data=protocol.given(data))
    if allow is None:
        return options
    found = options_of(hooks, hook, client, allow, options)
    if found.expire_at and found.expire_at <= entrant.node.clock():
        raise Refused(EXPIRED, f"expire_at of {hook.called} is past")
    return found


def options_of(
    hooks: Hooks, hook: Hook, client: Client, allow: Allow, options: SubscribeOptions = UNADORNED
) -> SubscribeOptions:
    """The options of a subscription as a hook wants them; what it leaves out is as in ``options``."""
    if not isinstance(allow, Allow):
        raise hooks.nonsense(hook, client, f"expected Allow for a channel, got {type(allow).__name__}")
    info, found = hooks.bytes_of(hook, client, allow.chan_info), hooks.bytes_of(hook, client, allow.data)
    return SubscribeOptions(
        options.info if info is None else info,
        options.data if found is None else found,
        options.override if allow.override == Override() else allow.override,
        allow.expire_at or options.expire_at,
    )


async def _admitted_by_token(session: Session, channel: str, token: str) -> tuple[SubscribeOptions, int]:
    """What a subscription token grants, and until when; PROTOCOL 8.2."""
    try:
        claims = await session.gate.keys.verified(
            lambda: session.gate.subscription.subscription(token, session.node.clock())
        )
    except TokenExpired:
        raise Refused(TOKEN_EXPIRED) from None
    except TokenInvalid as error:
        raise Refused(PERMISSION_DENIED, error.why) from None
    check_owner(session, claims.user, claims.client)
    if claims.channel != channel:
        raise Disconnected(INVALID_TOKEN, "a subscription token is for another channel")
    if claims.expire_at and claims.expire_at <= session.node.clock():
        raise Refused(EXPIRED, "the subscription token's expire_at is past")
    return SubscribeOptions(claims.info, claims.data, claims.override), claims.expire_at


def check_owner(session: Session, user: str, client: str) -> None:
    """Raises ``Disconnected(INVALID_TOKEN)`` for a subscription token of somebody else."""
    if user != session.user:
        raise Disconnected(INVALID_TOKEN, "a subscription token is for another user")
    if client and client != session.client:
        raise Disconnected(INVALID_TOKEN, "a subscription token is for another client")


async def join(
    session: Session,
    channel: str,
    namespace: Namespace,
    request: protocol.SubscribeRequest,
    options: SubscribeOptions,
    *,
    asked_at: float,
    expire_at: int = 0,
    server_side: bool = False,
    manner: Manner | None = None,
) -> tuple[Subscription, protocol.SubscribeResult, Position | None]:
    """Register, read, and work out the result; the caller replies and then calls ``begin`` in the same turn.

    The permission has been checked.  ``asked_at`` (Unix s) is when the command, the request
    or the order for it came (PROTOCOL 18.0.7).  Without a ``manner`` it is sent to as its
    wire has it, and no more.  Also returns where history stood.  Raises ``Disconnected``
    if the session ended before this could begin, ``Unsubscribed`` if the subscription
    was closed meanwhile, ``Unavailable``, and ``Refused`` if its user is blocked in the channel:
    from here on whoever blocks them finds the subscription (PROTOCOL 10.5).
    """
    if session.closed:
        raise Disconnected(CONNECTION_CLOSED, "it ended before it was subscribed")
    session.node.blocking.check("subscribe", session.user, channel)
    granted = grant(
        session.node.channels,
        session.identity,
        namespace,
        options.override,
        positioned=request.positioned,
        recoverable=request.recoverable,
        join_leave=request.join_leave,
    )
    info = session.info
    if options.info is not None:
        info = ClientInfo(info.user, info.client, info.conn_info, json_info(options.info))
    subscription = Subscription(session, session.outbox, channel, namespace, info)
    subscription.server_side = server_side
    subscription.manner = manner or subscription.manner
    subscription.positioned = granted.positioned
    subscription.recoverable = granted.recoverable
    subscription.present = granted.presence
    subscription.leaves_word = granted.join_leave
    subscription.wants_joins = granted.joins
    subscription.expire_at = expire_at = expire_at or options.expire_at
    session.subscriptions[channel] = subscription
    since = _since(request, namespace) if granted.recoverable else None
    cached = namespace.options.force_recovery_mode == "cache"
    recovery = None
    if since is not None:
        recovery = Recovery(since, asked_at, owner_of(session.user, session.request.remote_addr), cached)
    try:
        page = await session.node.subscribe(subscription, recovery)
        page = await session.node.enter(subscription, page, recovery)
        if subscription.closed:
            raise Unsubscribed
        result = _result(session, subscription, request, since, page)
    except BaseException:
        session.drop(subscription)
        raise
    result.data = protocol.payload(json_info(options.data) if session.outbox.wire.format == "json" else options.data)
    if expire_at and not session.renewed_here(subscription):
        result.expires, result.ttl = True, ttl_s(expire_at, session.node.clock())
    return subscription, result, page.top if page is not None else None


def _result(
    session: Session,
    subscription: Subscription,
    request: protocol.SubscribeRequest,
    since: Position | None,
    page: Page | None,
) -> protocol.SubscribeResult:
    """The result of a subscription, from the page that was read for it; places its cursor.  PROTOCOL 11.3, 11.4."""
    manner, feed = subscription.manner, subscription.feed
    result = protocol.SubscribeResult(positioned=subscription.positioned, recoverable=subscription.recoverable)
    result.delta = manner.delta is not Delta.OFF
    result.id = feed.number if manner.numbered and feed is not None else 0
    if page is None:
        return result
    top = page.top
    position = top
    if since is not None and subscription.namespace.options.force_recovery_mode == "cache":
        position = _recover_newest(session, subscription, result, since, page)
    elif since is not None:
        result.was_recovering = True
        caught = catch_up(since, page)
        limit = _recovery_limit(session, subscription.namespace)
        result.recovered = caught.recovered and not (limit and top.offset - since.offset > limit)
        if result.recovered:
            position = caught.position
            missed = caught.publications
            result.publications = bodies(manner, missed, top.epoch, subscription.namespace, session.node.hub.patches)
            if missed and result.delta:
                subscription.base = missed[-1].data
            subscription.cursor = Cursor(Position(missed[-1].offset, top.epoch) if missed else position)
            session.node.counts.recovered += 1
            session.node.counts.recovery_publications.observe(max(0, top.offset - since.offset))
            event("subscription.recovered", client=session.client, channel=subscription.channel, since=since, top=top)
        else:
            session.node.counts.unrecoverable += 1
            event(
                "subscription.unrecoverable",
                client=session.client,
                channel=subscription.channel,
                since=since,
                top=top,
                floor=page.floor,
            )
            if request.flag & 2 and not subscription.server_side:
                raise Refused(UNRECOVERABLE_POSITION)
    if subscription.cursor is None:
        subscription.cursor = Cursor(top)
    if subscription.positioned:
        result.offset, result.epoch = position.offset, position.epoch
    return result


def _since(request: protocol.SubscribeRequest, namespace: Namespace) -> Position | None:
    """Where a subscription that may recover wants to; with ``auto_cache_recover`` everybody does."""
    if request.recover:
        return Position(request.offset, request.epoch)
    return Position() if namespace.options.auto_cache_recover else None


def _recover_newest(
    session: Session, subscription: Subscription, result: protocol.SubscribeResult, since: Position, page: Page
) -> Position:
    """Recover nothing but the newest publication; returns the position that the result says.  PROTOCOL 11.6."""
    top, manner, hub = page.top, subscription.manner, session.node.hub
    client, channel = session.client, subscription.channel
    there = since.offset > 0 and since == top
    result.was_recovering = True
    result.recovered = there or bool(page.publications)
    if result.recovered:
        session.node.counts.recovered += 1
        event("subscription.recovered", client=client, channel=channel, since=since, top=top)
    else:
        session.node.counts.unrecoverable += 1
        event("subscription.unrecoverable", client=client, channel=channel, since=since, top=top, floor=page.floor)
    if there or not page.publications:
        return top
    newest = Position(page.publications[-1].offset, top.epoch)
    subscription.cursor = Cursor(newest)
    wanted = [one for one in page.publications if manner.filter is None or manner.filter.matches(one.tags)][-1:]
    if not wanted or since == Position(wanted[0].offset, top.epoch):
        return newest
    result.publications = bodies(manner, wanted, top.epoch, subscription.namespace, hub.patches)
    if result.delta:
        subscription.base = wanted[0].data
    return Position(wanted[0].offset - 1, top.epoch)


def _recovery_limit(session: Session, namespace: Namespace) -> int:
    return (
        namespace.options.recovery_max_publication_limit or session.node.settings.client.recovery_max_publication_limit
    )


def begin(session: Session, subscription: Subscription, top: Position | None) -> None:
    """The reply is out: let the subscription go live, and say the join."""
    if subscription.closed:
        return
    session.node.settle(subscription, top)
    session.node.members.say_join(subscription)


def postpone(subscription: Subscription, result: protocol.SubscribeResult) -> None:
    """Let what was recovered follow as ordinary pushes instead of going with the result."""
    if result.publications:
        result.publications = []
        subscription.base = None
        subscription.cursor = Cursor(Position(result.offset, result.epoch))


async def subscribe_by_order(session: Session, order: orders.SubscribeOrder) -> None:
    """Subscribe server-side, unasked, and say so with a push; PROTOCOL 5.6, 11.7."""
    namespace = session.node.channels.namespace(order.channel)
    if namespace is None or session.closed or order.channel in session.subscriptions:
        return
    request = protocol.SubscribeRequest(channel=order.channel)
    if order.since is not None:
        request.recover, request.offset, request.epoch = True, order.since.offset, order.since.epoch
    options = SubscribeOptions(order.info, order.data, Override(**order.override))
    try:
        subscription, result, top = await join(
            session,
            order.channel,
            namespace,
            request,
            options,
            asked_at=session.node.clock(),
            expire_at=order.expire_at,
            server_side=True,
        )
    except Unsubscribed:
        return
    except (Unavailable, protocol.Inexpressible) as error:
        event("command.refused", client=session.client, method="subscribe", code=INTERNAL.code, why=str(error))
        return
    except Refused as refused:
        code = refused.refusal.code
        event("command.refused", client=session.client, method="subscribe", code=code, why=refused.why)
        return
    postpone(subscription, result)  # The push has no room for publications.
    session.push(
        order.channel,
        "subscribe",
        protocol.Subscribe(result.recoverable, result.epoch, result.offset, result.positioned, result.data),
    )
    begin(session, subscription, top)
    session.plan()


def named(channel: str) -> str:
    """The channel of a command; raises ``Disconnected(MALFORMED)`` if it has none (PROTOCOL 3.4)."""
    if not channel:
        raise Disconnected(MALFORMED, "a command without channel")
    return channel
