"""The commands of a client, one function each; ``METHODS`` at the end is their table.

A function either answers on the spot and returns ``None``, or returns a coroutine
that the session awaits before it takes the next command.  What a client may not
have is raised: ``Refused`` costs the command, ``Disconnected`` the connection.
PROTOCOL 4.
"""

import asyncio
from collections.abc import Callable, Mapping
from sys import intern

import msgspec

from server import __version__, orders, protocol
from server.auth import SubscribeOptions, TokenExpired, TokenInvalid
from server.channels import Identity, Namespace, check_payload
from server.errors import (
    BAD_REQUEST,
    CHANNEL_LIMIT,
    CONNECTION_EXPIRED,
    CONNECTION_LIMIT,
    EXPIRED,
    FORBIDDEN,
    INSUFFICIENT_STATE,
    INTERNAL,
    INVALID_TOKEN,
    LIMIT_EXCEEDED,
    MALFORMED,
    NOT_AVAILABLE,
    PERMISSION_DENIED,
    TOKEN_EXPIRED,
    UNRECOVERABLE_POSITION,
    UNSUPPORTED,
    Disconnected,
    Refused,
    Unsubscribed,
)
from server.history import Draft
from server.hooks import Allow, Hook, Hooks, Welcome
from server.hub import Subscription
from server.manners import express
from server.node import Node
from server.observe import event
from server.protocol import Command
from server.renewing import renew
from server.session import Carrying, Entrant, Session, Skills, json_info, ttl_s
from server.stream import PAGE_BYTES, ClientInfo, Position, Publication
from server.subscribing import (
    ask_subscribing,
    begin,
    check_owner,
    join,
    named,
    options_of,
    postpone,
    subscribe,
    subscribe_by_order,
)

APP_CHARACTERS = 64
"""So much is kept of what a client says is its name, and its version (PROTOCOL 15.2.20)."""


# --- connect ---------------------------------------------------------------
def connect(session: Session, command: Command) -> Carrying:
    """PROTOCOL 4.1; who brings nothing to wait for is answered at once."""
    session.start_connecting()
    request = command.connect
    assert request is not None
    session.app_name = intern(request.name[:APP_CHARACTERS])  # the same for nearly everybody
    session.app_version = intern(request.version[:APP_CHARACTERS])
    if request.token or request.subs or session.node.hooks is not None:
        return _connect_patiently(session, command, request)
    identify_by_header(session)
    wanted: dict[str, SubscribeOptions] = {}
    namespaces = _introduce(session, None, wanted)
    _let_in(session, wanted)
    if wanted:
        return _join_all(session, command, wanted, namespaces, None)
    _welcome(session, command, [], None)
    return None


async def _connect_patiently(session: Session, command: Command, request: protocol.ConnectRequest) -> None:
    conn_info, wanted = await identify(session, request)
    data = None
    if session.node.hooks is not None:
        conn_info, data = await ask_connecting(session, session.node.hooks, request, conn_info, wanted)
    if session.closed:
        return
    namespaces = _introduce(session, conn_info, wanted)
    for channel in request.subs:
        if channel in wanted or (found := _wish(session, channel)) is None:
            continue
        options = SubscribeOptions(None, None)
        if session.node.hooks is not None:
            try:
                options = await ask_subscribing(session, session.node.hooks, channel, found, request.subs[channel].data)
            except Refused as refused:
                _pass_over(session, refused)
                continue
        wanted[channel], namespaces[channel] = options, found
    if session.closed:
        return
    _let_in(session, wanted)
    await _join_all(session, command, wanted, namespaces, data)


def _introduce(session: Session, conn_info: bytes | None, wanted: dict[str, SubscribeOptions]) -> dict[str, Namespace]:
    """It is known who this is: adds its personal channel to ``wanted``, returns the namespaces of all of these."""
    settings = session.node.settings.client
    session.info = ClientInfo(session.user, session.client, conn_info)
    limit = settings.user_connection_limit
    if limit and session.user and len(session.node.users.get(session.user, ())) >= limit:
        raise Disconnected(CONNECTION_LIMIT, f"look at client.user_connection_limit ({limit})")
    personal = settings.subscribe_to_user_personal_channel
    if personal.enabled and session.user:
        name = session.node.channels.personal(session.user, personal.personal_channel_namespace)
        wanted.setdefault(name, SubscribeOptions(None, None))
    namespaces = {channel: session.node.channels.known(channel) for channel in wanted}
    for channel, namespace in namespaces.items():
        session.node.channels.check_name(channel, namespace)
    return namespaces


def _let_in(session: Session, wanted: dict[str, SubscribeOptions]) -> None:
    """From here on it is a client like the others; raises ``Disconnected`` if it may not be one."""
    limit = session.node.settings.client.channel_limit
    if len(wanted) > limit:
        raise Disconnected(CHANNEL_LIMIT, f"look at client.channel_limit ({limit})")
    session.node.admit(session)
    replace_others(session)


async def _join_all(
    session: Session,
    command: Command,
    wanted: dict[str, SubscribeOptions],
    namespaces: dict[str, Namespace],
    data: bytes | None,
) -> None:
    """Subscribe it to what it is to be subscribed to, and welcome it."""
    request = command.connect
    assert request is not None
    joined = await asyncio.gather(
        *(
            join(
                session,
                channel,
                namespaces[channel],
                request.subs.get(channel) or protocol.SubscribeRequest(),
                options,
                asked_at=session.arrived,
                server_side=True,
            )
            for channel, options in wanted.items()
        ),
        return_exceptions=True,
    )
    if session.closed:
        return
    for outcome in joined:
        if isinstance(outcome, Refused):
            _pass_over(session, outcome)  # blocked in this channel; the others it gets
        elif isinstance(outcome, BaseException) and not isinstance(outcome, Unsubscribed):
            session.leave_all()
            session.node.dismiss(session)
            raise outcome
    _welcome(session, command, [outcome for outcome in joined if isinstance(outcome, tuple)], data)


def _welcome(
    session: Session,
    command: Command,
    joined: "list[tuple[Subscription, protocol.SubscribeResult, Position | None]]",
    data: bytes | None,
) -> None:
    """Reply to connect and let everything begin, in one loop turn."""
    settings = session.node.settings.client
    now = session.node.clock()
    one_way = session.outbox.wire.codec.one_way
    pings = one_way or not session.request.native_pings
    result = protocol.ConnectResult(
        client=session.client,
        version=f"waterspout {__version__}",
        expires=bool(session.expire_at) and not session.renewed_here(),
        ttl=0 if session.renewed_here() else ttl_s(session.expire_at, now),
        data=protocol.payload(data),
        subs={subscription.channel: result for subscription, result, _ in joined if not subscription.closed},
        ping=int(settings.ping_interval) if pings else 0,
        pong=pings and not one_way and settings.ping_interval > 0,
        session=session.secret,
        node=session.node.id if session.secret and not one_way else "",
        time=int(now * 1000) if settings.connect_include_server_time else 0,
    )
    room = PAGE_BYTES  # for what all of them recovered together; the rest follows at the pace of the socket
    for subscription, subscribed, _ in joined:
        room -= sum(len(publication.data) + 64 for publication in subscribed.publications)
        if room < 0:
            postpone(subscription, subscribed)
    session.reply(command, "connect", result)
    for subscription, _, top in joined:
        begin(session, subscription, top)
    session.accept(now)


async def identify(
    entrant: Entrant, request: protocol.ConnectRequest
) -> tuple[bytes | None, dict[str, SubscribeOptions]]:
    """Find out who it is; returns its info and the channels that it gets; PROTOCOL 4.1, 8.5.

    Raises ``Refused`` and ``Disconnected`` as ``connect`` is answered (PROTOCOL 4.1.2), ``Unavailable`` if a key
    cannot be fetched.
    """
    settings = entrant.node.settings.client
    if request.token:
        try:
            claims = await entrant.gate.keys.verified(
                lambda: entrant.gate.connection.connection(request.token, entrant.node.clock())
            )
        except TokenExpired:
            raise Refused(TOKEN_EXPIRED) from None
        except TokenInvalid as error:
            raise Disconnected(INVALID_TOKEN, error.why) from None
        if not claims.user and settings.disallow_anonymous_connection_tokens:
            raise Disconnected(FORBIDDEN, "a token without user; client.disallow_anonymous_connection_tokens is set")
        if not settings.insecure and claims.expire_at:
            if claims.expire_at <= entrant.node.clock():
                raise Refused(EXPIRED, "the token's expire_at is past")
            entrant.expire_at = claims.expire_at
        _name(entrant, claims.user)
        if entrant.handle is not None:
            entrant.handle.meta = claims.meta
        entrant.granted = frozenset(claims.subs)
        return json_info(claims.info), dict(claims.subs)
    identify_by_header(entrant)
    return None, {}


def identify_by_header(entrant: Entrant) -> None:
    """Find out who somebody without token is; raises ``Disconnected``; PROTOCOL 8.5."""
    header = entrant.node.settings.client.user_id_http_header.lower()
    user = entrant.request.headers.get(header, "") if header else ""
    _name(entrant, user)
    if entrant.node.hooks is None or entrant.node.hooks.find("connecting") is None:
        _require_name(entrant)


def _require_name(entrant: Entrant) -> None:
    """Nobody named this client: may it be here as the anonymous user?  PROTOCOL 8.5."""
    settings = entrant.node.settings.client
    if not entrant.user and not settings.insecure and not settings.allow_anonymous_connect_without_token:
        raise Disconnected(MALFORMED, "connect without token; client.allow_anonymous_connect_without_token is not set")


async def ask_connecting(
    entrant: Entrant,
    hooks: Hooks,
    request: protocol.ConnectRequest,
    conn_info: bytes | None,
    wanted: dict[str, SubscribeOptions],
) -> tuple[bytes | None, bytes | None]:
    """Ask the hook who this is; adds to ``wanted``, returns the client's info and the reply's data.

    One that decides is not asked where a token has decided.  Raises as ``identify``, and what the hook refuses with.
    """
    hook, client = hooks.find("connecting"), entrant.handle
    if hooks.elsewhere is not None and client is not None:
        client.emulated = hooks.elsewhere.emulated(request.headers)
    if hook is None or client is None or (hook.decides and request.token):
        return conn_info, None
    entrant.info = ClientInfo(entrant.user, entrant.client, conn_info)
    client.introduction = request
    try:
        welcome = await hooks.ask(hook, client, data=protocol.given(request.data)) or Welcome()
    finally:
        client.introduction = None
    if welcome.user is not None and welcome.user != entrant.user:
        if request.token:
            raise hooks.nonsense(hook, client, "expected no user, since a token has named one, got another")
        _name(entrant, welcome.user)
    if not request.token and not (hook.decides and welcome.user is not None):
        _require_name(entrant)
    if welcome.expire_at and not entrant.node.settings.client.insecure:
        if welcome.expire_at <= entrant.node.clock():
            raise Refused(EXPIRED, f"expire_at of {hook.called} is past")
        entrant.expire_at = welcome.expire_at
    if welcome.conn_info is not msgspec.UNSET:
        conn_info = hooks.bytes_of(hook, client, welcome.conn_info)
        client.dressed = True
    allowed = welcome.channels if isinstance(welcome.channels, Mapping) else dict.fromkeys(welcome.channels, Allow())
    for channel, allow in allowed.items():
        try:
            hooks.check_channel(channel)
        except Refused as refused:
            raise hooks.nonsense(hook, client, f"channel {channel!r}: {refused.why}") from None
        wanted[channel] = options = options_of(hooks, hook, client, allow)
        if options.expire_at and options.expire_at <= entrant.node.clock():
            raise Refused(EXPIRED, f"expire_at of {hook.called} for {channel!r} is past")
    return conn_info, hooks.bytes_of(hook, client, welcome.data)


def _name(entrant: Entrant, user: str) -> None:
    """This is who it is; raises ``Disconnected`` for somebody who is blocked (PROTOCOL 10.5)."""
    entrant.node.blocking.check_user(user)
    entrant.user = user
    entrant.identity = Identity(user, entrant.node.settings.client.insecure)


def _wish(session: Session, channel: str) -> Namespace | None:
    """The namespace of a channel named in connect's ``subs``, if one could subscribe to it (PROTOCOL 4.1)."""
    namespace = session.node.channels.namespace(named(channel))
    if namespace is None:
        raise Disconnected(MALFORMED, f"connect.subs names a channel of an unknown namespace: {channel[:64]!r}")
    try:
        session.node.channels.check_name(channel, namespace)
        session.node.channels.may_subscribe(session.identity, channel, namespace)
    except Refused as refused:
        _pass_over(session, refused)
        return None
    return namespace


def _pass_over(session: Session, refused: Refused) -> None:
    event("command.refused", client=session.client, method="connect", code=refused.refusal.code, why=refused.why)


def replace_others(session: Session) -> None:
    """Of one user's connections only the newest stays, if it is to be so (PROTOCOL 9.2)."""
    personal = session.node.settings.client.subscribe_to_user_personal_channel
    if not (personal.enabled and personal.single_connection and session.user):
        return
    name = session.node.channels.personal(session.user, personal.personal_channel_namespace)
    namespace = session.node.channels.namespace(name)
    if namespace is not None and namespace.options.presence:
        target = orders.Target(session.user, spared=(session.client,))
        session.node.ordering.give_soon(orders.DisconnectOrder(target, CONNECTION_LIMIT.code, CONNECTION_LIMIT.reason))


def unsubscribe(session: Session, command: Command) -> Carrying:
    """PROTOCOL 4.3; unsubscribing from what one is not subscribed to succeeds."""
    request = command.unsubscribe
    assert request is not None
    subscription = session.subscriptions.get(named(request.channel))
    if subscription is None:
        session.reply(command, "unsubscribe")
        return None
    del session.subscriptions[subscription.channel]
    session.release(subscription)
    return _unsubscribe_patiently(session, command, subscription)


async def _unsubscribe_patiently(session: Session, command: Command, subscription: Subscription) -> None:
    await asyncio.shield(session.node.members.exit(subscription))
    session.reply(command, "unsubscribe")


# --- publish, history, presence, rpc --------------------------------------------
def publish(session: Session, command: Command) -> Carrying:
    """PROTOCOL 4.4."""
    request = command.publish
    assert request is not None
    if request.type or request.key or request.removed:
        raise Refused(NOT_AVAILABLE, "map channels are not offered")
    channel = named(request.channel)
    namespace, draft = _draft(session, channel, protocol.given(request.data))
    if session.node.hooks is not None and (hook := session.node.hooks.find("publishing", namespace.name)) is not None:
        return _publish_by_leave(session, command, channel, namespace, draft, hook)
    if namespace.kept:
        return _publish_patiently(session, command, channel, namespace, draft)
    session.node.publish_passing(channel, Publication(draft.data, info=draft.info))
    session.reply(command, "publish")
    return None


def _draft(session: Session, channel: str, data: bytes | None, key: str = "") -> tuple[Namespace, Draft]:
    """What this client would publish, if it may; PROTOCOL 10.4."""
    channels = session.node.channels
    namespace = channels.known(channel)
    channels.check_name(channel, namespace)
    payload = check_payload(data, namespace)
    subscription = session.subscriptions.get(channel)
    channels.require("publish", session.identity, namespace, subscribed=subscription is not None)
    session.node.blocking.check("publish", session.user, channel)
    session.node.check_rate(session.user or session.client, channel, session.arrived)
    info = session.info if subscription is None else subscription.info
    return namespace, Draft(payload if namespace.binary else protocol.one_line(payload), info=info, key=key)


async def _publish_by_leave(
    session: Session, command: Command, channel: str, namespace: Namespace, draft: Draft, hook: Hook
) -> None:
    draft = await ask_publishing(session, channel, namespace, draft, hook)
    if not session.closed:
        await _publish_patiently(session, command, channel, namespace, draft)


async def ask_publishing(entrant: Entrant, channel: str, namespace: Namespace, draft: Draft, hook: Hook) -> Draft:
    """What the hook makes of a publication that the configuration allows; raises what it refuses with; PROTOCOL 4.4."""
    hooks, client = entrant.node.hooks, entrant.handle
    assert hooks is not None
    assert client is not None
    change = await hooks.ask(hook, client, channel, data=draft.data)
    # The client may have lost its subscription, and with it the permission, while the hook thought about it.
    entrant.node.channels.require("publish", entrant.identity, namespace, subscribed=channel in entrant.subscriptions)
    entrant.node.blocking.check("publish", entrant.user, channel)
    if change is None:
        return draft
    data, tags = draft.data, draft.tags if change.tags is None else change.tags
    if change.data is not msgspec.UNSET:
        raw = namespace.binary and isinstance(change.data, bytes)
        try:
            data = check_payload(bytes(change.data) if raw else hooks.bytes_of(hook, client, change.data), namespace)
            entrant.node.check_size(Publication(data, tags=tags))
        except Refused as refused:
            if refused.refusal is INTERNAL:
                raise
            raise hooks.nonsense(hook, client, refused.why) from None
        data = data if namespace.binary else protocol.one_line(data)
    key = change.key or draft.key
    if change.version.number and (change.skip_history or not namespace.kept):
        raise hooks.nonsense(hook, client, "a version, where no history is kept that it could be compared with")
    changed = {"skip_history": change.skip_history, "delta": change.delta, "version": change.version}
    return msgspec.structs.replace(draft, data=data, tags=tags, key=key, **changed)


async def _publish_patiently(
    session: Session, command: Command, channel: str, namespace: Namespace, draft: Draft
) -> None:
    await session.node.publish(channel, namespace, draft, _patience_s(session))
    session.reply(command, "publish")


def _patience_s(session: Session) -> float:
    """What is left of the time in which an SDK waits for its reply, since commands queue behind one another."""
    left = session.arrived + session.node.patience_s - session.node.clock()
    if left <= 0:
        raise Refused(INTERNAL, "the commands before it took all of the publish timeout")
    return left


async def history(session: Session, command: Command) -> None:
    """PROTOCOL 4.6."""
    request = command.history
    assert request is not None
    channel = named(request.channel)
    channels = session.node.channels
    namespace = channels.known(channel)
    channels.check_name(channel, namespace)
    channels.require("history", session.identity, namespace, subscribed=channel in session.subscriptions)
    session.node.blocking.check("history", session.user, channel)
    most = session.node.settings.client.history_max_publication_limit
    limit = request.limit
    if most and not 0 <= limit <= most:
        session.node.counts.limits["client.history_max_publication_limit"] += limit > most
        limit = most
    await session.make_room()
    result = await history_page(
        session.node,
        session.outbox.wire.format,
        channel,
        namespace,
        limit,
        request.since,
        request.reverse,
        # What an answer weighs beside its payloads must fit as well.
        max_bytes=session.node.settings.client.queue_max_size // 2,
    )
    session.reply(command, "history", result)


async def presence(session: Session, command: Command) -> None:
    """PROTOCOL 4.5."""
    assert command.presence is not None
    channel = _presence_channel(session, command.presence)
    result = await presence_of(session.node, channel)
    await session.make_room()
    session.reply(command, "presence", result)


async def presence_stats(session: Session, command: Command) -> None:
    """PROTOCOL 4.5."""
    assert command.presence_stats is not None
    channel = _presence_channel(session, command.presence_stats)
    clients, users = await session.node.presence.stats(channel, session.node.clock())
    session.reply(command, "presence_stats", protocol.PresenceStatsResult(clients, users))


def _presence_channel(session: Session, request: protocol.ChannelRequest) -> str:
    channel = named(request.channel)
    namespace = session.node.channels.known(channel)
    session.node.channels.check_name(channel, namespace)
    session.node.channels.require("presence", session.identity, namespace, subscribed=channel in session.subscriptions)
    session.node.blocking.check("presence", session.user, channel)
    return channel


def rpc(session: Session, command: Command) -> Carrying:
    """PROTOCOL 4.7; ``publish`` is built in, ``ping`` if ``rpc.ping.enabled``, the rest is the user's module's."""
    request = command.rpc
    assert request is not None
    if request.method == "publish":
        return _rpc_publish(session, command, protocol.given(request.data))
    if request.method == "ping" and session.node.settings.rpc.ping.enabled:
        session.reply(command, "rpc", protocol.RPCResult())
        return None
    if session.node.hooks is not None and (hook := session.node.hooks.find("rpc", request.method)) is not None:
        return _rpc_hook(session, command, hook, protocol.given(request.data))
    raise Refused(NOT_AVAILABLE, f"no RPC method {request.method[:64]!r}")


async def _rpc_hook(session: Session, command: Command, hook: Hook, data: bytes | None) -> None:
    hooks, client = session.node.hooks, session.handle
    assert hooks is not None
    assert client is not None
    answer = await hooks.ask(hook, client, data=data)
    result = None if answer is None else hooks.bytes_of(hook, client, answer)
    if result is not None:
        most = session.node.settings.client.queue_max_size // 2
        if len(result) > most:
            raise hooks.nonsense(hook, client, f"more than half of client.queue_max_size ({most} bytes)")
        await session.make_room()
    session.reply(command, "rpc", protocol.RPCResult(protocol.payload(result)))


async def _rpc_publish(session: Session, command: Command, data: bytes | None) -> None:
    """Publish with an idempotency key, and learn the position."""
    try:
        request = _rpc_publish_request.decode(data or b"")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(BAD_REQUEST, f"rpc publish takes channel, data, idempotency_key: {error}") from None
    if not request.channel:
        raise Refused(BAD_REQUEST, "rpc publish without channel")
    namespace, draft = _draft(session, request.channel, protocol.given(request.data), request.idempotency_key)
    if session.node.hooks is not None and (hook := session.node.hooks.find("publishing", namespace.name)) is not None:
        draft = await ask_publishing(session, request.channel, namespace, draft, hook)
        if session.closed:
            return
    appended = await session.node.publish(request.channel, namespace, draft, _patience_s(session))
    position = appended.position
    result = {"offset": position.offset, "epoch": position.epoch} if position.offset else {}
    session.reply(command, "rpc", protocol.RPCResult(msgspec.Raw(msgspec.json.encode(result))))


def send(session: Session, command: Command) -> None:
    """PROTOCOL 4.8."""
    raise Disconnected(UNSUPPORTED, "nobody here takes messages sent without reply")


def ping(session: Session, command: Command) -> None:
    """PROTOCOL 3.4."""
    raise Disconnected(MALFORMED, "the command ping is of protocol version 1")


# --- refresh -----------------------------------------------------------------
async def refresh(session: Session, command: Command) -> None:
    """PROTOCOL 4.9."""
    request = command.refresh
    assert request is not None
    if not request.token:
        raise Disconnected(MALFORMED, "refresh without token")
    if session.renewed_here():
        raise Disconnected(MALFORMED, "refresh by a client, and client.proxy.refresh.enabled is set")
    try:
        claims = await session.gate.keys.verified(
            lambda: session.gate.connection.connection(request.token, session.node.clock())
        )
    except TokenExpired:
        raise Disconnected(CONNECTION_EXPIRED, "refresh with an expired token") from None
    except TokenInvalid as error:
        raise Disconnected(INVALID_TOKEN, error.why) from None
    if claims.user != session.user:
        raise Disconnected(INVALID_TOKEN, "refresh with another user's token")
    now = session.node.clock()
    if claims.expire_at and claims.expire_at <= now:
        raise Refused(EXPIRED, "the token's expire_at is past")
    if claims.subs.keys() != session.granted:
        raise Disconnected(INSUFFICIENT_STATE, "the refreshed token has other channels")
    if session.handle is None or not session.handle.dressed:
        session.renew_info(claims.info)
    session.expire_at = 0 if session.node.settings.client.insecure else claims.expire_at
    session.plan()
    session.reply(command, "refresh", protocol.RefreshResult(bool(session.expire_at), ttl_s(session.expire_at, now)))


async def sub_refresh(session: Session, command: Command) -> None:
    """PROTOCOL 4.10; the channel may be missing, as one SDK leaves it out, and is then the token's."""
    request = command.sub_refresh
    assert request is not None
    if request.type:
        raise Refused(NOT_AVAILABLE, "shared poll is not offered")
    if not request.token:
        raise Refused(BAD_REQUEST, "sub_refresh without token")
    if request.channel and request.channel not in session.subscriptions:
        raise Refused(PERMISSION_DENIED, "sub_refresh of a channel that is not subscribed")
    now = session.node.clock()
    try:
        claims = await session.gate.keys.verified(lambda: session.gate.subscription.subscription(request.token, now))
    except TokenExpired:
        subscription = session.subscriptions.get(request.channel)
        at = subscription.expire_at if subscription else 0
        session.reply(command, "sub_refresh", protocol.RefreshResult(bool(at), ttl_s(at, now)))
        return
    except TokenInvalid as error:
        raise Disconnected(INVALID_TOKEN, error.why) from None
    check_owner(session, claims.user, claims.client)
    if request.channel and claims.channel != request.channel:
        raise Disconnected(INVALID_TOKEN, "a subscription token is for another channel")
    subscription = session.subscriptions.get(claims.channel)
    if subscription is None:
        raise Refused(PERMISSION_DENIED, "sub_refresh of a channel that is not subscribed")
    if session.renewed_here(subscription):
        raise Disconnected(MALFORMED, "sub_refresh by a client, and sub_refresh_proxy_enabled is set in its namespace")
    if claims.expire_at and claims.expire_at <= now:
        raise Refused(EXPIRED, "the subscription token's expire_at is past")
    subscription.expire_at = claims.expire_at
    session.plan()
    session.reply(command, "sub_refresh", protocol.RefreshResult(bool(claims.expire_at), ttl_s(claims.expire_at, now)))


async def presence_of(node: Node, channel: str) -> protocol.PresenceResult:
    """Answer a client who asks for presence; PROTOCOL 4.5.

    Raises ``Refused(LIMIT_EXCEEDED)`` if that would be too large, before anything is encoded.
    """
    members = await node.presence.members(channel, node.clock())
    most = node.settings.client.queue_max_size // 2
    if sum(len(info.conn_info or b"") + len(info.chan_info or b"") + 160 for info in members.values()) > most:
        raise Refused(LIMIT_EXCEEDED, f"presence is larger than half of client.queue_max_size ({most} bytes)")
    return protocol.PresenceResult({client: protocol.client_info(info) for client, info in members.items()})


async def history_page(
    node: Node,
    format: str,
    channel: str,
    namespace: Namespace,
    limit: int,
    since: protocol.StreamPosition | None,
    reverse: bool,
    max_bytes: int = 2**31,
) -> protocol.HistoryResult:
    """Answer a history command of a client or of the back end; PROTOCOL 4.6.

    Brings about ``max_bytes`` at most, but one publication if there is one.
    Raises ``Refused``: 107 for ``reverse`` from offset 0, 112 for another epoch.
    """
    if reverse and since is not None and not since.offset:
        raise Refused(BAD_REQUEST, "history in reverse from offset 0")
    page = await node.pages.read(
        channel,
        namespace,
        since=None if since is None else since.offset,
        limit=limit,
        max_bytes=max_bytes,
        reverse=reverse,
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


METHODS: dict[str, Callable[[Session, Command], Carrying]] = {
    "connect": connect,
    "subscribe": subscribe,
    "unsubscribe": unsubscribe,
    "publish": publish,
    "presence": presence,
    "presence_stats": presence_stats,
    "history": history,
    "rpc": rpc,
    "send": send,
    "ping": ping,
    "refresh": refresh,
    "sub_refresh": sub_refresh,
}

SKILLS = Skills(METHODS, subscribe_by_order, renew)
