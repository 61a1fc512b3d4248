"""Who asks by a request of their own, and what that lets them do.

A caller is to the application what a connection is: the same token names it, the
same hooks are asked about it, the same options permit or refuse.  But it is over
with its answer, and subscribed to nothing.  What a namespace gives to subscribers
only, a caller may do where it could subscribe, and the hook for subscribing is then
asked as it would be.  PROTOCOL 17.1.
"""

import uuid
from typing import Protocol

from msgspec import UNSET

from server import orders, protocol
from server.auth import SubscribeOptions
from server.channels import Deed, Identity, Namespace, check_payload
from server.commands import ask_connecting, ask_publishing, identify
from server.errors import (
    CONNECTION_CLOSED,
    MALFORMED,
    PERMISSION_DENIED,
    UNAUTHORIZED,
    Disconnect,
    Disconnected,
    Refused,
)
from server.history import Draft
from server.hooks import Client
from server.node import Node
from server.outbox import Request
from server.session import Entrant, Gate, json_info
from server.stream import ClientInfo
from server.subscribing import UNADORNED, ask_subscribing


class Requesting(Entrant, Protocol):
    """Who asks by a request, and can be ended meanwhile."""

    given: dict[str, SubscribeOptions]
    """The channels that it gets without being asked about them: its token's, its hook's, the personal one."""

    def go_on(self) -> None:
        """Something was waited for meanwhile; raises ``Disconnected`` if that ended us."""


class Asker:
    """Who somebody is that came with a token or without, and which channels that opens; PROTOCOL 4.1, 10.2.

    To be mixed into a kind that is ``Requesting``.
    """

    __slots__ = ()

    async def identify(self: Requesting, token: str) -> None:
        """Find out who it is, by the token (``""`` for none) and the app's hook; PROTOCOL 4.1, 8.5.

        Raises ``Refused`` and ``Disconnected`` as ``connect`` would be answered;
        but who needs a token and has none gets ``Refused(UNAUTHORIZED)``.
        """
        request = protocol.ConnectRequest(token=token)
        try:
            conn_info, self.given = await identify(self, request)
            if self.node.hooks is not None:
                conn_info, _ = await ask_connecting(self, self.node.hooks, request, conn_info, self.given)
        except Disconnected as end:
            if not token and end.disconnect is MALFORMED:
                raise Refused(UNAUTHORIZED, end.why) from None
            raise
        self.go_on()
        self.info = ClientInfo(self.user, self.client, conn_info)
        personal = self.node.settings.client.subscribe_to_user_personal_channel
        if personal.enabled and self.user:
            name = self.node.channels.personal(self.user, personal.personal_channel_namespace)
            self.given.setdefault(name, UNADORNED)

    def known(self: Requesting, channel: str) -> Namespace:
        """The namespace of a channel with a proper name; raises ``Refused`` (102, 107)."""
        namespace = self.node.channels.known(channel)
        self.node.channels.check_name(channel, namespace)
        return namespace

    async def may_subscribe(self: Requesting, channel: str, namespace: Namespace) -> SubscribeOptions:
        """What a subscription of it would get; raises ``Refused`` if it gets none; PROTOCOL 4.1.3, 10.2, 10.5."""
        self.node.blocking.check("subscribe", self.user, channel)
        given = self.given.get(channel)
        if given is not None:
            return given
        self.node.channels.may_subscribe(self.identity, channel, namespace)
        if self.node.hooks is None:
            return UNADORNED
        options = await ask_subscribing(self, self.node.hooks, channel, namespace, UNSET)
        self.go_on()
        return options


class Caller(Asker):
    """One request's asker; call ``identify`` first and ``end`` last.  It is a ``hooks.Peer``."""

    def __init__(self, node: Node, gate: Gate, request: Request) -> None:
        self.node = node
        self.gate = gate
        self.request = request
        self.client = str(uuid.uuid4())
        self.user = ""
        self.identity = Identity()
        self.info = ClientInfo("", self.client)
        self.expire_at = 0
        self.granted: frozenset[str] = frozenset()
        self.given: dict[str, SubscribeOptions] = {}
        self.subscriptions: dict[str, ClientInfo] = {}
        """The channels that it counts as subscribed to, and what others see of it there."""
        self.handle = None if node.hooks is None else Client(self, node.hooks)
        self._ended: Disconnected | None = None

    def __repr__(self) -> str:
        return f"<Caller {self.client} user={self.user!r}>"

    async def identify(self, token: str) -> None:
        """See ``Asker.identify``."""
        await super().identify(token)
        if self.handle is not None:
            self.handle.welcomed = True

    def go_on(self) -> None:
        """See ``Asker.go_on``."""
        if self._ended is not None:
            raise self._ended

    def end(self) -> None:
        """The answer is out; the app's hook is told."""
        self._ended = self._ended or Disconnected(CONNECTION_CLOSED, "the request is answered")
        if self.node.hooks is not None:
            self.node.hooks.ended(self.handle)

    async def require(self, deed: Deed, channel: str, namespace: Namespace) -> None:
        """Raises ``Refused`` if it may not; PROTOCOL 10.4."""
        self.node.blocking.check(deed, self.user, channel)
        channels = self.node.channels
        try:
            channels.require(deed, self.identity, namespace, subscribed=channel in self.subscriptions)
        except Refused as refused:
            if refused.refusal is not PERMISSION_DENIED:
                raise
            if not channels.may(deed, self.identity, namespace, subscribed=True):
                raise
            options = await self.may_subscribe(channel, namespace)
            self.subscriptions[channel] = ClientInfo(
                self.user, self.client, self.info.conn_info, json_info(options.info)
            )

    async def draft(self, channel: str, namespace: Namespace, data: bytes | None, key: str) -> Draft:
        """What it publishes, as the app's hook will have it; raises ``Refused`` if it may not; PROTOCOL 4.4."""
        payload = check_payload(data, namespace)
        await self.require("publish", channel, namespace)
        self.node.check_rate(self.user or self.request.remote_addr, channel, self.node.clock())
        info = self.subscriptions.get(channel, self.info)
        draft = Draft(payload if namespace.binary else protocol.one_line(payload), info=info, key=key)
        if self.node.hooks is not None and (hook := self.node.hooks.find("publishing", namespace.name)) is not None:
            draft = await ask_publishing(self, channel, namespace, draft, hook)
            self.go_on()
        return draft

    # --- what a hook may do with it: see ``hooks.Peer`` -----------------------------------
    @property
    def closed(self) -> bool:
        """Is it over?"""
        return self._ended is not None

    @property
    def following(self) -> list[str]:
        """The channels it counts as subscribed to."""
        return list(self.subscriptions)

    def disconnect(self, disconnect: Disconnect, why: str = "") -> None:
        """Answer with this instead."""
        self._ended = self._ended or Disconnected(disconnect, why)

    def subscribe_by_order(self, order: orders.SubscribeOrder) -> None:
        """There is nothing to subscribe: the answer is the last that it hears."""

    def unsubscribe_by_order(self, channel: str) -> None:
        """It is no subscriber of ``channel`` from now on."""
        self.subscriptions.pop(channel, None)
