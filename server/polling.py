"""A long-poll: it follows a channel, like a subscription, until the first thing comes.

It *is* a subscription of the hub, registered before its page is read, so that what
is published meanwhile is either in the page or wakes it.  What wakes it comes as
frames that are encoded once for all polls of the channel, and they are the answer:
a woken poll reads nothing.  What comes behind the first loop turn is for the next
request, which begins at the position that this one is told.

While it waits it is a connection: counted, found by orders for its user, sent away
when the process ends.  PROTOCOL 17.2.
"""

import asyncio
from collections.abc import Callable, Sequence

import msgspec
from msgspec import Raw

from server import orders, protocol
from server.callers import Caller
from server.channels import Namespace
from server.errors import (
    CONNECTION_CLOSED,
    CONNECTION_EXPIRED,
    INAPPROPRIATE_PROTOCOL,
    PERMISSION_DENIED,
    UNRECOVERABLE_POSITION,
    Disconnect,
    Disconnected,
    Refused,
    Unavailable,
    Unsubscribed,
)
from server.hub import Subscription
from server.inside import InsideOutbox, LineWire, publications
from server.limits import owner_of
from server.manners import express
from server.node import Node
from server.observe import event
from server.pages import Recovery
from server.stream import Cursor, Position, Publication, catch_up

LONGEST_S = 60
"""A proxy that hears nothing for longer ends the request itself."""


class Gone(Exception):
    """The position is no longer in history; ``top`` is where to go on from."""

    def __init__(self, top: Position) -> None:
        super().__init__(f"{UNRECOVERABLE_POSITION.message}, the top is {top}")
        self.top = top


class Lost(Exception):
    """History no longer holds what the poll needs next."""


class Tidings(msgspec.Struct, frozen=True):
    """Publications as JSON, and the position behind the last of them; ``more`` if history has gone further."""

    publications: Sequence[Raw]
    position: Position
    more: bool = False


def tidings(
    publications: Sequence[Publication], since: Position, top: Position, namespace: Namespace, limit: int
) -> Tidings:
    """What follows ``since``, ``limit`` publications at most; raises ``protocol.Inexpressible``."""
    bodies = [
        Raw(msgspec.json.encode(express("json", publication, top.epoch, namespace)))
        for publication in publications[:limit]
    ]
    last = publications[len(bodies) - 1].offset if bodies else since.offset
    return Tidings(bodies, Position(last, top.epoch), last < top.offset)


# --- the outbox -----------------------------------------------------------------------
class _Body(msgspec.Struct):
    offset: int = 0
    epoch: str = ""


_body = msgspec.json.Decoder(_Body)


WIRE = LineWire()


class PollOutbox(InsideOutbox):
    """What wakes one poll: it calls ``on_news`` once, in the turn after the first frames.

    From then on there is room for ``most_bytes``; what is beyond does not get into
    the answer, whose position then stands before it.
    """

    __slots__ = ("_frames", "_most_bytes", "_on_news", "_waiting_bytes", "full", "wire")

    def __init__(self, on_news: Callable[[], None], most_bytes: int) -> None:
        self.wire = WIRE
        self._on_news = on_news
        self._most_bytes = most_bytes
        self._frames: list[bytes] = []
        self._waiting_bytes = 0
        self.full = False
        """Has something come for which there was no room?"""

    @property
    def waiting_bytes(self) -> int:
        """See ``Outbox.waiting_bytes``."""
        return self._waiting_bytes

    def send(self, frame: bytes) -> None:
        """See ``Outbox.send``."""
        if not self._frames:
            asyncio.get_running_loop().call_soon(self._on_news)
        elif self.full or self._waiting_bytes + len(frame) > self._most_bytes:
            self.full = True  # for good: nothing may come behind a gap
            return
        self._frames.append(frame)
        self._waiting_bytes += len(frame)

    async def drained(self) -> None:
        """See ``Outbox.drained``; behind the first frames nothing more is wanted, and the poll is about to end."""
        if self._frames:
            raise Disconnected(CONNECTION_CLOSED, "it has its answer")

    def close(self, disconnect: Disconnect) -> None:
        """See ``Outbox.close``; the poll's answer is its goodbye."""

    def publications(self) -> list[tuple[Raw, int, str]]:
        """What has come: each publication as JSON, its offset, and the epoch where it is said."""
        found = []
        for publication in publications(b"".join(self._frames)):
            body = _body.decode(publication)
            found.append((publication, body.offset, body.epoch))
        return found


# --- the poll ----------------------------------------------------------------------------
class Poll:
    """One long-poll of ``caller``; ``limit`` publications and about ``most_bytes`` are what it answers with at most.

    It is a ``node.Session`` and a ``hub.Subscriber``.
    """

    secret = ""

    def __init__(self, caller: Caller, channel: str, namespace: Namespace, limit: int, most_bytes: int) -> None:
        self.client = caller.client
        self.user = caller.user
        self._node = caller.node
        self._request = caller.request
        self._began_at = caller.node.clock()
        self._expire_at = caller.expire_at
        self._limit = limit
        self._over: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._outbox = PollOutbox(self._finish, most_bytes)
        self._subscription = Subscription(self, self._outbox, channel, namespace, caller.info)

    def __repr__(self) -> str:
        return f"<Poll {self.client} user={self.user!r} channel={self._subscription.channel!r}>"

    @property
    def over(self) -> bool:
        """Has it been woken or ended?  Then it is about to be answered."""
        return self._over.done()

    async def news(self, since: Position, wait_s: float) -> Tidings:
        """What follows ``since``: at once if there is something, else when it comes, or nothing after ``wait_s``.

        Raises ``Gone``, ``errors.Unavailable``, ``errors.Disconnected`` if its user
        was ended, and ``protocol.Inexpressible``.
        """
        node, subscription = self._node, self._subscription
        if self._expire_at:
            wait_s = min(wait_s, max(0.0, self._expire_at - node.clock()))
        node.blocking.check("history", self.user, subscription.channel)
        node.admit(self)
        node.arrive(self._request.remote_addr)
        try:
            try:
                page = await node.subscribe(
                    subscription, Recovery(since, self._began_at, owner_of(self.user, self._request.remote_addr))
                )
            except Unsubscribed:
                return self._answer(since)
            assert page is not None, "only kept channels are polled"
            caught = catch_up(since, page)
            if not caught.recovered:
                raise Gone(page.top)
            if caught.publications:
                return tidings(caught.publications, since, page.top, subscription.namespace, self._limit)
            subscription.cursor = Cursor(caught.position)
            node.settle(subscription, page.top)
            await asyncio.wait([self._over], timeout=wait_s)
            return self._answer(caught.position)
        except Lost:
            page = await node.pages.read(subscription.channel, subscription.namespace, limit=0)
            raise Gone(page.top) from None
        finally:
            node.release(subscription)
            node.dismiss(self)
            node.depart(self._request.remote_addr)

    def _answer(self, since: Position) -> Tidings:
        """What the poll has got; raises what ended it otherwise."""
        end = self._over.result() if self.over else None
        found = self._outbox.publications()
        if end is not None and not found:
            raise end
        position, bodies = since, []
        for raw, offset, epoch in found[: self._limit]:
            if offset:  # what only passes through a kept channel has none, and moves nobody (PROTOCOL 11.1.5)
                position = Position(offset, epoch or position.epoch)
            bodies.append(raw)
        return Tidings(bodies, position, self._outbox.full or len(found) > len(bodies))

    def _finish(self, end: Exception | None = None) -> None:
        """It has news, or is ended: then it follows nothing any more, and waits for no turn to read."""
        if not self.over:
            self._over.set_result(end)
        if end is not None:
            self._node.release(self._subscription)

    def describe(self, most_channels: int) -> orders.Connection:
        """What a back end is told of it; PROTOCOL 15.2.20."""
        return orders.Connection(
            self.client,
            self.user,
            self._request.transport,
            self._request.format,
            self._request.remote_addr,
            int(self._began_at),
            1,
            [self._subscription.channel][:most_channels],
        )

    # --- what ends it: see ``node.Session`` and ``hub.Subscriber`` ----------------------------
    def disconnect(self, disconnect: Disconnect, why: str = "") -> None:
        """It is answered with this code; what cannot be said in JSON, as a read of it would be."""
        if disconnect is INAPPROPRIATE_PROTOCOL:
            self._finish(protocol.Inexpressible(why))
        else:
            self._finish(Disconnected(disconnect, why))

    def lose(self, subscription: Subscription) -> None:
        """History was trimmed under it, or begins anew; PROTOCOL 11.2."""
        self._node.counts.lost += 1
        event("subscription.lost", client=self.client, channel=subscription.channel)
        self._finish(Lost())

    def invalidate(self, subscription: Subscription) -> None:
        """Its namespace is another one now; asked again it is told what holds; PROTOCOL 9.5."""
        self._finish(Unavailable("the options of the namespace have changed while it waited"))

    def unsubscribe_by_order(self, channel: str) -> None:
        """The back end ends its subscription: it may not go on."""
        if channel in ("", self._subscription.channel):
            self._finish(Refused(PERMISSION_DENIED, "unsubscribed by the server while it waited"))

    def subscribe_by_order(self, order: orders.SubscribeOrder) -> None:
        """It follows one channel, and no other."""

    def refresh_by_order(self, order: orders.RefreshOrder) -> None:
        """Only an end matters to who is about to end."""
        if order.expired:
            self.disconnect(CONNECTION_EXPIRED, "ordered by the back-end API")

    def tick(self, now: float) -> None:
        """Nothing of it is in the timetable."""

    def rewind(self, seconds: float) -> None:
        """Nothing of it is in the timetable."""


# --- what needs no read ---------------------------------------------------------------------
CONFIRMED_S = 1.0
CONFIRMED_CHANNELS = 10_000


class Tops:
    """Where the channels that this process follows stand, as long as a read has just confirmed it.

    What is published elsewhere is heard here, unless the broker lost it; so a
    followed channel's top is true up to what happened since somebody last read it.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self._confirmed_at: dict[str, float] = {}

    def confirm(self, channel: str, top: Position, asked_at: float) -> None:
        """A read that began at ``asked_at`` (Unix s) has found ``top``."""
        confirmed = self._confirmed_at
        confirmed.pop(channel, None)
        position = self._followed(channel)
        if position is not None and position.epoch == top.epoch and position.offset >= top.offset:
            while len(confirmed) >= CONFIRMED_CHANNELS:
                del confirmed[next(iter(confirmed))]  # the oldest
            confirmed[channel] = asked_at

    def known(self, channel: str) -> Position | None:
        """The top of a channel that is followed here and was confirmed within the last second."""
        age_s = self._node.clock() - self._confirmed_at.get(channel, -CONFIRMED_S)
        return self._followed(channel) if 0 <= age_s <= CONFIRMED_S else None

    def _followed(self, channel: str) -> Position | None:
        feed = self._node.hub.feeds.get(channel)
        if feed is None or feed.cursor is None or feed.incomplete:
            return None
        in_force = feed.following is not None and feed.following.done()
        return feed.cursor.position if in_force else None
