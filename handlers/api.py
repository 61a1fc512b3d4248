"""``/api``: what a back end asks of the server over HTTP; PROTOCOL 15.

One table of methods, each with the typed parameters it takes and the function
that carries it out.  Answers are 200 with ``result`` or ``error``, since the
back-end SDKs depend on that.
"""

import asyncio
import base64
import binascii
import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from handlers.base import JsonHandler
from server import __version__, protocol
from server import broker as wires
from server.auth import Override
from server.channels import Namespace, check_payload
from server.commands import history_page
from server.errors import BAD_REQUEST, FORCE_DISCONNECT, INTERNAL, NOT_AVAILABLE, Refused, Unavailable
from server.history import Draft
from server.hooks import ending
from server.node import Node
from server.observe import event
from server.settings import HttpApiSettings
from server.stream import Position, Publication


class Flag(msgspec.Struct):
    """``{"value": true}``, as overrides are written (PROTOCOL 8.1)."""

    value: bool = False


class Channel(msgspec.Struct):
    """What presence, presence_stats and history_remove take."""

    channel: str = ""


class Publish(msgspec.Struct):
    """PROTOCOL 15.2, publish."""

    channel: str = ""
    data: protocol.Payload = UNSET
    b64data: str = ""
    skip_history: bool = False
    tags: dict[str, str] | None = None
    idempotency_key: str = ""
    version: int = 0


class Broadcast(msgspec.Struct):
    """PROTOCOL 15.2, broadcast."""

    channels: list[str] = []
    data: protocol.Payload = UNSET
    b64data: str = ""
    skip_history: bool = False
    tags: dict[str, str] | None = None
    idempotency_key: str = ""
    version: int = 0


class Subscribe(msgspec.Struct):
    """PROTOCOL 15.2, subscribe."""

    channel: str = ""
    user: str = ""
    client: str = ""
    session: str = ""
    info: protocol.Payload = UNSET
    b64info: str = ""
    data: protocol.Payload = UNSET
    b64data: str = ""
    expire_at: int = 0
    recover_since: protocol.StreamPosition | None = None
    override: dict[str, Flag | None] | None = None


class Unsubscribe(msgspec.Struct):
    """PROTOCOL 15.2, unsubscribe."""

    channel: str = ""
    user: str = ""
    client: str = ""
    session: str = ""


class DisconnectCode(msgspec.Struct):
    """The code that an ordered disconnect carries."""

    code: int = FORCE_DISCONNECT.code
    reason: str = FORCE_DISCONNECT.reason


class Disconnect(msgspec.Struct):
    """PROTOCOL 15.2, disconnect."""

    user: str = ""
    client: str = ""
    session: str = ""
    whitelist: list[str] | None = None
    disconnect: DisconnectCode | None = None


class Refresh(msgspec.Struct):
    """PROTOCOL 15.2, refresh."""

    user: str = ""
    client: str = ""
    session: str = ""
    expired: bool = False
    expire_at: int = 0
    info: protocol.Payload = UNSET


class History(msgspec.Struct):
    """PROTOCOL 15.2, history."""

    channel: str = ""
    limit: int = 0
    since: protocol.StreamPosition | None = None
    reverse: bool = False


class Info(msgspec.Struct):
    """PROTOCOL 15.2, info; takes nothing."""


class Positioned(msgspec.Struct, omit_defaults=True):
    """The result of a publish; empty in a passing channel."""

    offset: int = 0
    epoch: str = ""


class Api:
    """The methods; each takes its parameters and returns the result, or raises ``Refused`` or ``Unavailable``."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def _known(self, channel: str) -> Namespace:
        if not channel:
            raise Refused(BAD_REQUEST, "a call without channel")
        namespace = self._node.channels.known(channel)
        self._node.channels.check_name(channel, namespace)
        return namespace

    async def publish(self, request: Publish | Broadcast, channel: str | None = None) -> Positioned:
        """PROTOCOL 15.2."""
        name = channel if channel is not None else getattr(request, "channel", "")
        namespace = self._known(name)
        if request.version:
            raise Refused(NOT_AVAILABLE, "versioned publishing is not offered yet")
        data = check_payload(_payload(request.data, request.b64data), namespace)
        if not namespace.binary:
            data = protocol.one_line(data)
        if request.skip_history:
            if request.idempotency_key and self._node.repeated(name, request.idempotency_key):
                return Positioned()
            self._node.publish_passing(name, Publication(data, tags=request.tags))
            return Positioned()
        draft = Draft(data, tags=request.tags, key=request.idempotency_key)
        position = (await self._node.publish(name, namespace, draft)).position
        return Positioned(position.offset, position.epoch if position.offset else "")

    async def broadcast(self, request: Broadcast) -> dict[str, Any]:
        """PROTOCOL 15.2; one channel's error does not fail the call."""
        if not request.channels:
            raise Refused(BAD_REQUEST, "broadcast without channels")

        async def one(channel: str) -> dict[str, Any]:
            try:
                return {"result": await self.publish(request, channel)}
            except (Refused, Unavailable) as error:
                return {"error": _error(error)}

        return {"responses": await asyncio.gather(*map(one, request.channels))}

    async def subscribe(self, request: Subscribe) -> protocol.Body:
        """PROTOCOL 15.2."""
        self._known(request.channel)
        override = {name: flag.value for name, flag in (request.override or {}).items() if flag is not None}
        unknown = override.keys() - set(Override.__struct_fields__)
        if unknown:
            raise Refused(BAD_REQUEST, f"unknown override: {', '.join(sorted(unknown))}")
        since = request.recover_since
        self._node.order(
            wires.SubscribeOrder(
                _target(request),
                request.channel,
                _payload(request.info, request.b64info),
                _payload(request.data, request.b64data),
                request.expire_at,
                Position(since.offset, since.epoch) if since else None,
                override,
            )
        )
        return protocol.EMPTY

    async def unsubscribe(self, request: Unsubscribe) -> protocol.Body:
        """PROTOCOL 15.2; an empty channel means all channels."""
        if request.channel:
            self._known(request.channel)
        self._node.order(wires.UnsubscribeOrder(_target(request), request.channel))
        return protocol.EMPTY

    async def disconnect(self, request: Disconnect) -> protocol.Body:
        """PROTOCOL 15.2."""
        end = request.disconnect or DisconnectCode()
        try:
            ending(end.code, end.reason)
        except ValueError as error:
            raise Refused(BAD_REQUEST, f"disconnect: {error}") from None
        target = _target(request, request.whitelist or ())
        self._node.order(wires.DisconnectOrder(target, end.code, end.reason))
        return protocol.EMPTY

    async def refresh(self, request: Refresh) -> protocol.Body:
        """PROTOCOL 15.2."""
        target = _target(request)
        info = protocol.given(request.info)
        self._node.order(wires.RefreshOrder(target, request.expired, request.expire_at, info))
        return protocol.EMPTY

    def _present(self, channel: str) -> None:
        if not self._known(channel).options.presence:
            raise Refused(NOT_AVAILABLE, "the namespace has no presence")

    async def presence(self, request: Channel) -> protocol.PresenceResult:
        """PROTOCOL 15.2."""
        self._present(request.channel)
        members = await self._node.presence.members(request.channel, self._node.clock())
        return protocol.PresenceResult({client: protocol.client_info(info) for client, info in members.items()})

    async def presence_stats(self, request: Channel) -> protocol.PresenceStatsResult:
        """PROTOCOL 15.2."""
        self._present(request.channel)
        return protocol.PresenceStatsResult(*await self._node.presence.stats(request.channel, self._node.clock()))

    async def history(self, request: History) -> protocol.HistoryResult:
        """PROTOCOL 15.2; without the limit that clients have."""
        namespace = self._known(request.channel)
        if not namespace.kept:
            raise Refused(NOT_AVAILABLE, "the namespace keeps no history")
        return await history_page(
            self._node, "json", request.channel, namespace, request.limit, request.since, request.reverse
        )

    async def history_remove(self, request: Channel) -> protocol.Body:
        """PROTOCOL 15.2; offsets go on, epoch and idempotency keys stay."""
        if not self._known(request.channel).kept:
            raise Refused(NOT_AVAILABLE, "the namespace keeps no history")
        await self._node.remove(request.channel)
        return protocol.EMPTY

    async def info(self, request: Info) -> dict[str, Any]:
        """PROTOCOL 15.2; this process."""
        node = self._node
        feeds = node.hub.feeds.values()
        return {
            "nodes": [
                {
                    "uid": node.id,
                    "name": node.name,
                    "version": __version__,
                    "num_clients": len(node.sessions),
                    "num_users": len(node.users),
                    "num_channels": len(feeds),
                    "num_subs": sum(1 for feed in feeds for _ in feed.subscriptions()),
                    "uptime": int(node.clock() - node.started_at),
                }
            ]
        }


METHODS: dict[str, tuple[type[msgspec.Struct], Callable[[Api, Any], Awaitable[Any]]]] = {
    "publish": (Publish, Api.publish),
    "broadcast": (Broadcast, Api.broadcast),
    "subscribe": (Subscribe, Api.subscribe),
    "unsubscribe": (Unsubscribe, Api.unsubscribe),
    "disconnect": (Disconnect, Api.disconnect),
    "refresh": (Refresh, Api.refresh),
    "presence": (Channel, Api.presence),
    "presence_stats": (Channel, Api.presence_stats),
    "history": (History, Api.history),
    "history_remove": (Channel, Api.history_remove),
    "info": (Info, Api.info),
}


class ApiHandler(JsonHandler):
    """``POST /api/<method>``."""

    def initialize(self, api: Api, settings: HttpApiSettings) -> None:
        """``api`` carries the calls out; ``settings`` has the key."""
        self._api = api
        self._settings = settings

    def _authorized(self) -> bool:
        if self._settings.insecure:
            return True
        key = self.request.headers.get("X-API-Key")
        if key is None:
            scheme, _, rest = self.request.headers.get("Authorization", "").partition(" ")
            key = rest.strip() if scheme.lower() == "apikey" else self.get_query_argument("api_key", "")
        expected = self._settings.key
        return bool(expected) and hmac.compare_digest(key.encode(errors="surrogateescape"), expected.encode())

    async def post(self, method: str) -> None:
        """Carry out one call; PROTOCOL 15.1."""
        if not self._authorized():
            event("api.refused", address=self.request.remote_ip, why="wrong or no key; look at http_api.key")
            self.set_status(401)
            self.clear_header("Content-Type")
            self.finish()
            return
        if method not in METHODS:
            self.answer({"error": {"code": 404, "message": "no such method"}}, 404)
            return
        kind, carry_out = METHODS[method]
        try:
            body = self.request.body
            body.decode()
            request = msgspec.json.decode(body, type=kind)
        except msgspec.ValidationError as error:
            self.answer({"error": {"code": BAD_REQUEST.code, "message": f"{BAD_REQUEST.message}: {error}"}})
            return
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self.set_status(400)
            self.set_header("Content-Type", "text/plain; charset=utf-8")
            self.finish(f"the body is not JSON: {error}\n")
            return
        try:
            self.answer({"result": await carry_out(self._api, request)})
        except protocol.Inexpressible as error:
            self.answer({"error": _error(Refused(NOT_AVAILABLE, str(error)))})
        except (Refused, Unavailable) as error:
            self.answer({"error": _error(error)})


def _target(request: "Subscribe | Unsubscribe | Disconnect | Refresh", spared: Sequence[str] = ()) -> wires.Target:
    """Which connections a call is for; raises ``Refused(BAD_REQUEST)`` for a session, which no transport has yet."""
    if request.session:
        raise Refused(BAD_REQUEST, "no transport of this server has session ids yet")
    return wires.Target(request.user, request.client, spared)


def _error(error: Refused | Unavailable) -> dict[str, Any]:
    refusal = error.refusal if isinstance(error, Refused) else INTERNAL
    why = error.why if isinstance(error, Refused) else str(error)
    event("command.refused", client="", method="api", code=refusal.code, why=why)
    return {"code": refusal.code, "message": refusal.message}


def _payload(data: Raw | UnsetType, encoded: str) -> bytes | None:
    """A payload given as JSON, or in base64, which wins; raises ``Refused(BAD_REQUEST)``."""
    if not encoded:
        return protocol.given(data)
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(BAD_REQUEST, "a base64 field is not base64") from None
