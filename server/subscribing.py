"""How a subscription begins: may it, from where, and what its first reply says.

The order matters more than anything here.  A subscription is registered before
its page of history is read (``Node.subscribe``); its reply and its first step to
going live happen in one loop turn (``begin``), so that nothing can come between.
PROTOCOL 4.2, 8.2, 10, 11.
"""

from collections.abc import Coroutine, Sequence
from typing import Any

import msgspec

from server import orders, protocol
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
)
from server.hooks import Allow, Client, Hook, Hooks
from server.hub import Subscription, express
from server.observe import event
from server.protocol import Command
from server.session import Entrant, Session, json_info, ttl_s
from server.stream import ClientInfo, Cursor, Page, Position, Publication, catch_up

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
    if request.tf is not msgspec.UNSET:
        raise Refused(BAD_REQUEST, "tag filters are not offered")
    return _subscribe_patiently(session, command, request, namespace)


async def _subscribe_patiently(
    session: Session, command: Command, request: protocol.SubscribeRequest, namespace: Namespace
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
    subscription, result, top = await join(session, channel, namespace, request, options, expire_at=expire_at)
    if subscription.closed:
        if not session.closed:
            raise Refused(PERMISSION_DENIED, "unsubscribed by the server while subscribing")
        return
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
    expire_at: int = 0,
    server_side: bool = False,
) -> tuple[Subscription, protocol.SubscribeResult, Position | None]:
    """Register, read, and work out the result; the caller replies and then calls ``begin`` in the same turn.

    The permission has been checked.  Also returns where history stood.  Raises
    ``Disconnected`` if the session ended before this could begin.
    """
    if session.closed:
        raise Disconnected(CONNECTION_CLOSED, "it ended before it was subscribed")
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
    subscription.positioned = granted.positioned
    subscription.recoverable = granted.recoverable
    subscription.present = granted.presence
    subscription.leaves_word = granted.join_leave
    subscription.wants_joins = granted.joins
    subscription.expire_at = expire_at = expire_at or options.expire_at
    session.subscriptions[channel] = subscription
    since = Position(request.offset, request.epoch) if request.recover and granted.recoverable else None
    try:
        page = await session.node.subscribe(subscription, since)
        if not subscription.closed:
            await session.node.members.enter(subscription)
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
    result = protocol.SubscribeResult(positioned=subscription.positioned, recoverable=subscription.recoverable)
    if page is None:
        return result
    top = page.top
    position = top
    if since is not None:
        result.was_recovering = True
        caught = catch_up(since, page)
        limit = _recovery_limit(session, subscription.namespace)
        result.recovered = caught.recovered and not (limit and top.offset - since.offset > limit)
        if result.recovered:
            position = caught.position
            missed = caught.publications
            result.publications = _express(session, subscription.namespace, missed, top.epoch)
            subscription.cursor = Cursor(Position(missed[-1].offset, top.epoch) if missed else position)
            event("subscription.recovered", client=session.client, channel=subscription.channel, since=since, top=top)
        else:
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
    if not result.recovered:
        subscription.cursor = Cursor(top)
    if subscription.positioned:
        result.offset, result.epoch = position.offset, position.epoch
    return result


def _express(
    session: Session, namespace: Namespace, publications: Sequence[Publication], epoch: str
) -> list[protocol.Publication]:
    format = session.outbox.wire.format
    return [express(format, publication, epoch, namespace) for publication in publications]


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
            session, order.channel, namespace, request, options, expire_at=order.expire_at, server_side=True
        )
    except (Unavailable, protocol.Inexpressible) as error:
        event("command.refused", client=session.client, method="subscribe", code=INTERNAL.code, why=str(error))
        return
    if subscription.closed:
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
