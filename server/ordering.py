"""What one process orders and asks of all, and what it does when another one asks.

An order (``orders``) means connections wherever they are.  It is carried out here at
once, then everybody else is asked to, over and over until all have said so (``peers``).
The rest of what processes ask of each other goes the same way: who follows what, which
connections somebody has, what an emulated client says whose stream is elsewhere, and
that something kept has changed in its store.

An order that comes late does not mean who has come since: so it is remembered for a
while when each connection was entered.

PROTOCOL 15.2.
"""

import asyncio
import math
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Protocol

import msgspec

from server import orders
from server.blocking import Blocking
from server.errors import Disconnect, Unavailable
from server.globs import matcher
from server.hub import Hub
from server.observe import event
from server.peers import OWED_S, Peers

ORDER_PATIENCE_S = 2.0
"""How long the answers of other processes are waited for; an SDK waits 5 s for all of its command."""

CONNECTIONS = 1000
CHANNELS = 100
CHANNELS_IN_ALL = 10_000
"""What one process tells of a user's connections: so many at most, so many channels of each and of all together."""

_encode = msgspec.msgpack.Encoder().encode


class Orderable(Protocol):
    """What an order asks of one client's connection."""

    client: str
    user: str
    secret: str
    """The session id by which a back end or an emulated client means just this connection; ``""`` on a WebSocket."""

    def describe(self, most_channels: int) -> orders.Connection:
        """What there is to say of the connection; so many of its channels at most."""

    def disconnect(self, disconnect: Disconnect, why: str = "") -> None:
        """End the connection."""

    def unsubscribe_by_order(self, channel: str) -> None:
        """End the subscription of ``channel``, or all if it is empty, with 2000."""

    def subscribe_by_order(self, order: orders.SubscribeOrder) -> None:
        """Subscribe server-side."""

    def refresh_by_order(self, order: orders.RefreshOrder) -> None:
        """Move the connection's expiry."""


class Ordering:
    """See the module's docstring.

    ``users`` are the connections here by user and client id, ``streams`` what takes the
    commands of each emulated session here.  ``broker_trouble`` says why the others cannot be
    reached, ``""`` if they can; ``forget`` takes a channel's payloads out of this process's memory.
    Call ``sweep`` once a second.
    """

    def __init__(
        self,
        peers: Peers,
        users: Mapping[str, Mapping[str, Orderable]],
        hub: Hub,
        blocking: Blocking,
        streams: Mapping[str, Callable[[bytes], None]],
        *,
        broker_trouble: Callable[[], str],
        forget: Callable[[str], None],
    ) -> None:
        self._peers = peers
        self._users = users
        self._hub = hub
        self._blocking = blocking
        self._streams = streams
        self._broker_trouble = broker_trouble
        self._forget = forget
        self._newcomers: dict[str, float] = {}
        """When, by the loop's clock, those connected who did so in the last minutes; the oldest first."""

    def __repr__(self) -> str:
        return f"<Ordering newcomers={len(self._newcomers)}>"

    # --- who came when ------------------------------------------------------------
    def enter(self, client: str) -> None:
        """A connection is entered now; what was ordered before does not mean it."""
        self._newcomers[client] = asyncio.get_running_loop().time()

    def dismiss(self, client: str) -> None:
        """A connection is gone."""
        self._newcomers.pop(client, None)

    def sweep(self) -> None:
        """Who has been here for longer than orders are repeated is meant by any of them."""
        oldest = asyncio.get_running_loop().time() - 2 * OWED_S
        for client in [client for client, _ in takewhile(lambda came: came[1] < oldest, self._newcomers.items())]:
            del self._newcomers[client]

    # --- ordering -----------------------------------------------------------------
    async def give(self, order: orders.Order) -> None:
        """Carry out an order here and everywhere else.

        Raises ``errors.Unavailable`` if a process that is alive has not answered
        in time, or if none can be asked; they are asked again for a minute.
        """
        self.obey(order)
        await self.ask(order)

    def give_soon(self, order: orders.Order) -> None:
        """As ``give``, by somebody who does not wait for the others."""
        self.obey(order)
        self._peers.ask(orders.encode(order))

    async def ask(self, question: orders.Question, to: str = "") -> dict[str, bytes]:
        """Ask the node ``to``, or all others; returns the answers by node id, raises as ``give``.

        What is neither an order nor news to keep is of no use later, and not asked again then.
        """
        asked = self._peers.ask(orders.encode(question), to)
        try:
            silent = await asked.answered(ORDER_PATIENCE_S, self._peers.silent)
        finally:
            if not isinstance(question, orders.Order | orders.Forget | orders.Blocked):
                self._peers.give_up(asked)
        why = self._broker_trouble()
        if why and (silent or not asked.answers):  # who fell silent may be alive, and so may who is not known
            raise Unavailable(f"other processes cannot be asked: {why}")
        if not all(map(self._peers.silent, silent)) or (to and silent):
            raise Unavailable(f"{len(silent)} other processes have not answered within {ORDER_PATIENCE_S:g} s")
        return asked.answers

    # --- carrying out -------------------------------------------------------------
    def answer(self, body: bytes, asked_at: float) -> bytes:
        """Carry out what another process asked; a fault of ours in it is logged, and answered with nothing."""
        try:
            question = orders.decode(body)
        except msgspec.DecodeError as error:
            event("broker.unreadable", why=error)
            return b""
        try:
            match question:
                case orders.ChannelsQuestion(pattern):
                    return _encode(self.followed(pattern))
                case orders.ConnectionsQuestion(target):
                    return _encode(self.described(target))
                case orders.Forget(channel):
                    self._forget(channel)
                    return b""
                case orders.Blocked(record):
                    self._blocking.take(record)
                    return b""
                case orders.Emulated(session, data):
                    return self.hand_over(session, data)
                case _:
                    self.obey(question, asked_at)
                    return b""
        except Exception as fault:
            event("task.failed", task=f"answer {type(question).__name__}", fault=fault)
        return b""

    def obey(self, order: orders.Order, asked_at: float = math.inf) -> None:
        """Carry out an order on the connections of this process that were here when it was given.

        ``asked_at`` is that time by the loop's clock; an order that comes late does
        not mean who has come since.
        """
        for session in self.targeted(order.target):
            if self._newcomers.get(session.client, -math.inf) > asked_at:
                continue
            match order:
                case orders.DisconnectOrder(_, code, reason):
                    session.disconnect(Disconnect(code, reason), "ordered by the back-end API")
                case orders.SubscribeOrder():
                    session.subscribe_by_order(order)
                case orders.UnsubscribeOrder(_, channel):
                    session.unsubscribe_by_order(channel)
                case orders.RefreshOrder():
                    session.refresh_by_order(order)

    def targeted(self, target: orders.Target) -> list[Orderable]:
        """The connections here that an order is for (PROTOCOL 15.2)."""
        return [
            session
            for client, session in self._users.get(target.user, {}).items()
            if (not target.client or client == target.client)
            and (not target.session or session.secret == target.session)
            and client not in target.spared
        ]

    def described(self, target: orders.Target) -> orders.ConnectionsAnswer:
        """The connections here that ``target`` means, as far as one answer goes (PROTOCOL 15.2.20)."""
        targeted = self.targeted(target)
        found: list[orders.Connection] = []
        room = CHANNELS_IN_ALL
        for session in targeted[:CONNECTIONS]:
            found.append(session.describe(min(CHANNELS, room)))
            room -= len(found[-1].channels)
        return orders.ConnectionsAnswer(len(targeted), found)

    def hand_over(self, session: str, data: bytes) -> bytes:
        """Give commands to the emulated session that holds its stream here, if there is one (PROTOCOL 2.5)."""
        take = self._streams.get(session)
        if take is not None:
            take(data)
        return b""

    def followed(self, pattern: str = "") -> dict[str, int]:
        """How many are subscribed here, by channel, of those whose names match ``pattern`` (PROTOCOL 15.2).

        Raises ``ValueError`` for what is no pattern.
        """
        matches = matcher(pattern)
        feeds = self._hub.feeds.items()
        return {channel: feed.size + len(feed.catching) for channel, feed in feeds if matches(channel)}
