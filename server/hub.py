"""Who in this process follows which channel, where each stands, and the fan-out.

All live subscriptions of a channel stand at one place, so one cursor judges for
all of them: a publication costs one decision per process and one write per
socket.  A subscription that is catching up has a cursor of its own, reads pages
of history (``node`` does that), and goes live through the channel's *tail*: the
latest publications heard while somebody catches up, bounded in bytes and shared.
The tail outlives the last of them by a second or two, so that of a thousand
clients who come back together only the first few ask history at all (``recall``).

The third promise lives here: nothing is written to a client unless it is the
next offset of its subscription.  What keeps it:

* a subscription is registered (``join``) before its history is read, so that
  whatever is published from then on is in the tail or on a later page;
* a hole is not stepped over: what came too early waits in ``ahead``, and the
  caller is told to repair the channel from history;
* who goes live has all that was sent to the others and nothing that will be:
  pending frames leave before anybody joins or leaves the live ones.

Fan-out never waits.  The live ones are kept by *manner* (``manners``): those of one
get the same bytes.  For more than ``FEW`` sockets of a manner a frame is kept until
the end of the loop turn, when all frames of the turn leave joined, in one tight loop
(``Wire.spread``); for fewer it goes into each outbox at once, which joins it with
everything else bound for that socket.

Tried and dropped: a cursor per live subscription (a comparison and a store per
delivery, a tenth of its cost, for cursors that are always equal); writing each
publication out at once (twenty in one turn cost twenty system calls per socket).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Protocol

from server import protocol
from server.channels import Namespace
from server.errors import INAPPROPRIATE_PROTOCOL, Disconnect
from server.manners import Delta, Manner, Patches, Sending, encode, in_full
from server.metrics import SECONDS, Histogram
from server.outbox import Outbox, Wire
from server.stream import (
    PAGE_BYTES,
    PAGE_PUBLICATIONS,
    ClientInfo,
    Cursor,
    Page,
    Position,
    Publication,
    Verdict,
    catch_up,
)

if TYPE_CHECKING:
    import asyncio

TAIL_BYTES = 256 * 1024
FEW = 8


class Subscriber(Protocol):
    """What the hub and the node ask of the session behind a subscription."""

    def lose(self, subscription: "Subscription") -> None:
        """History no longer holds what this subscription needs next (PROTOCOL 11.2)."""

    def invalidate(self, subscription: "Subscription") -> None:
        """What was agreed on when it was made no longer holds (PROTOCOL 9.5)."""

    def disconnect(self, disconnect: Disconnect, why: str = "") -> None:
        """End the connection."""


class Subscription:
    """One session following one channel.

    ``cursor`` is set while it catches up, and ``None`` while it is live (the
    feed's cursor is then its own).  Whoever waits on its behalf looks at
    ``closed`` after every wait.  ``base`` is set while it catches up and gets patches:
    the payload that it was sent last.
    """

    __slots__ = (
        "base",
        "begun",
        "channel",
        "closed",
        "cursor",
        "expire_at",
        "feed",
        "info",
        "joined",
        "leaves_word",
        "live",
        "manner",
        "namespace",
        "outbox",
        "positioned",
        "present",
        "recoverable",
        "server_side",
        "session",
        "wants_joins",
    )

    def __init__(
        self, session: Subscriber, outbox: Outbox, channel: str, namespace: Namespace, info: ClientInfo
    ) -> None:
        self.session = session
        self.outbox = outbox
        self.channel = channel
        self.namespace = namespace
        self.info = info
        self.manner = Manner.of(outbox.wire)
        """How it is sent to; whoever makes it may choose another one before it joins."""
        self.base: bytes | None = None
        self.feed: Feed | None = None
        self.cursor: Cursor | None = None
        self.live = False
        self.closed = False
        self.server_side = False
        self.positioned = False
        self.recoverable = False
        self.present = False
        """Is it entered into presence?"""
        self.begun = False
        """Is its reply out?"""
        self.wants_joins = False
        """Shall it be told of joins and leaves, once its reply is out?"""
        self.leaves_word = False
        """Are others told when it joins and leaves?"""
        self.joined = False
        """Have they been told that it joined?"""
        self.expire_at = 0

    def __repr__(self) -> str:
        state = "closed" if self.closed else "live" if self.live else f"catching up at {self.cursor}"
        return f"<Subscription {self.channel!r} {state}>"


class Step(Enum):
    """What somebody who wants to go live must do next."""

    LIVE = "done: it is live"
    READ = "read another page after its cursor"
    REPAIR = "repair the channel first: its live ones are behind"
    ENDED = "nothing: its connection is about to end"


class Feed:
    """One channel in this process; exists while somebody here is subscribed.

    ``cursor`` is where the live subscriptions stand, ``None`` while nothing is
    known.  ``tail`` ends where the cursor stands, and is added to while
    ``tail_wanted``; ``ahead`` holds what came too early, with its epoch.
    ``number`` stands for the channel where that was agreed; ``base`` is what the
    based ones were sent last.
    """

    __slots__ = (
        "ahead",
        "ahead_bytes",
        "audience",
        "base",
        "catching",
        "channel",
        "cursor",
        "erasures",
        "following",
        "live",
        "namespace",
        "number",
        "pages",
        "pending",
        "repairing",
        "tail",
        "tail_bytes",
        "tail_used",
        "tail_wanted",
        "wanted",
    )

    def __init__(self, channel: str, namespace: Namespace, number: int) -> None:
        self.channel = channel
        self.namespace = namespace
        self.number = number
        self.cursor: Cursor | None = None
        self.live: dict[Manner, dict[Outbox, Subscription]] = {}
        self.base: bytes | None = None
        self.catching: set[Subscription] = set()
        self.audience: set[Subscription] = set()
        """Who is told of joins and leaves."""
        self.tail: deque[Publication] = deque()
        self.tail_bytes = 0
        self.tail_wanted = False
        self.tail_used = False
        self.ahead: dict[int, tuple[str, Publication]] = {}
        self.ahead_bytes = 0
        self.wanted = 0
        """The highest offset that somebody has told of; a repair is not done before it."""
        self.erasures = 0
        """How often history has lost payloads on purpose; a page that was read meanwhile may still hold them."""
        self.pending: dict[Manner, list[bytes]] = {}
        self.following: asyncio.Future[None] | None = None
        self.repairing: asyncio.Future[None] | None = None
        self.pages: list[tuple[int, asyncio.Future[Page]]] | None = None

    def __repr__(self) -> str:
        return f"<Feed {self.channel!r} at {self.cursor} live={self.size} catching={len(self.catching)}>"

    @property
    def followed(self) -> bool:
        """Has the broker been asked to bring what others say here, and answered?"""
        asked = self.following
        return asked is not None and asked.done() and not asked.cancelled() and asked.exception() is None

    @property
    def size(self) -> int:
        """How many subscriptions are live."""
        return sum(map(len, self.live.values()))

    def subscriptions(self) -> Iterator[Subscription]:
        """All of them, live or catching up."""
        for group in self.live.values():
            yield from group.values()
        yield from self.catching

    def forget_tail(self) -> None:
        """Let go of the tail: it no longer ends where the cursor stands, or nobody wants it."""
        self.tail.clear()
        self.tail_bytes = 0

    def forget_ahead(self) -> None:
        """Let go of what came too early."""
        self.ahead.clear()
        self.ahead_bytes = 0
        self.wanted = 0

    @property
    def incomplete(self) -> bool:
        """Is there something beyond the cursor that is known of and not delivered?"""
        return bool(self.ahead) or (self.cursor is not None and self.cursor.offset < self.wanted)


class Hub:
    """The feeds of one process.  Plain functions; nothing here waits.

    ``soon`` is called with the function that ends a loop turn (``loop.call_soon``);
    ``clock()`` gives the loop's time in seconds.
    """

    def __init__(self, soon: Callable[[Callable[[], None]], object], clock: Callable[[], float]) -> None:
        self.feeds: dict[str, Feed] = {}
        self.deliveries = 0
        """Publications that were put into outboxes, one for each subscription."""
        self.fanout_seconds = Histogram(SECONDS)
        """From the first publication for a larger room in a loop turn until all of that turn was written."""
        self.patches = Patches()
        self._numbers = count(1)
        self._clock = clock
        self._dirty_since = 0.0
        self._soon = soon
        self._tails: set[Feed] = set()
        self._dirty: list[Feed] = []
        self._after: list[tuple[Outbox, bytes]] = []

    # --- joining and leaving --------------------------------------------------
    def join(self, subscription: Subscription) -> Feed:
        """Register a subscription that is about to catch up; do this before anything waits."""
        feed = self.feeds.get(subscription.channel)
        if feed is None:
            number = next(self._numbers)
            feed = self.feeds[subscription.channel] = Feed(subscription.channel, subscription.namespace, number)
        subscription.feed = feed
        feed.catching.add(subscription)
        self._want_tail(feed)
        return feed

    def leave(self, subscription: Subscription) -> Feed | None:
        """Take a subscription out; returns its feed if that was the last one, to be unfollowed."""
        feed = subscription.feed
        subscription.closed = True
        if feed is None:
            return None
        subscription.feed = None
        feed.audience.discard(subscription)
        if subscription.live:
            self._settle(feed)
            group = feed.live[subscription.manner]
            del group[subscription.outbox]
            if not group:
                del feed.live[subscription.manner]
                patched = subscription.manner.delta is not Delta.OFF
                if patched and all(other.delta is Delta.OFF for other in feed.live):
                    feed.base = None
            subscription.live = False
        else:
            feed.catching.discard(subscription)
        if feed.live or feed.catching:
            return None
        del self.feeds[feed.channel]
        self._tails.discard(feed)
        return feed

    def begin(self, subscription: Subscription) -> None:
        """The reply of a subscription is out, so it may hear of joins and leaves."""
        subscription.begun = True
        if subscription.wants_joins and subscription.feed is not None:
            subscription.feed.audience.add(subscription)

    def go_live(self, subscription: Subscription) -> Step:
        """Make a subscription live that has read history to the top, if it and its channel can meet.

        Sends it the part of the tail it lacks.  For a passing channel there is
        nothing to meet.
        """
        feed, cursor = subscription.feed, subscription.cursor
        assert feed is not None, f"{subscription!r} has no feed"
        self._settle(feed)  # its reply stands before its tail
        if cursor is not None:
            step = self._meet(feed, subscription, cursor)
            if step is not Step.LIVE:
                return step
        feed.catching.discard(subscription)
        if subscription.base is not None and subscription.base == feed.base:
            subscription.manner = subscription.manner.but(Delta.BASED)
        feed.live.setdefault(subscription.manner, {})[subscription.outbox] = subscription
        subscription.base = None
        subscription.cursor = None
        subscription.live = True
        return Step.LIVE

    def _meet(self, feed: Feed, subscription: Subscription, cursor: Cursor) -> Step:
        common = feed.cursor
        if common is None:
            feed.cursor = Cursor(cursor.position)
            return Step.LIVE
        foreign = bool(common.epoch and cursor.epoch and common.epoch != cursor.epoch)
        if foreign or cursor.offset > common.offset:
            if feed.live:
                return Step.REPAIR
            feed.cursor = Cursor(cursor.position)
            feed.forget_tail()
            self._close_ranks(feed)
            return Step.LIVE if feed.cursor.offset == cursor.offset else Step.READ
        if cursor.offset < common.offset:
            tail = feed.tail
            if not tail or tail[0].offset > cursor.offset + 1:
                return Step.READ
            if not self.send(subscription, [pub for pub in tail if pub.offset > cursor.offset], common.epoch):
                return Step.ENDED
        return Step.LIVE

    # --- the tail -------------------------------------------------------------
    def _want_tail(self, feed: Feed) -> None:
        feed.tail_wanted = feed.tail_used = True
        if feed.namespace.kept:
            self._tails.add(feed)

    def recall(self, feed: Feed, since: Position, now_ms: int) -> Page | None:
        """What history would answer after ``since``, if the tail reaches back that far; else ``None``.

        The live ones stand at its top: who continues from it is as far as they
        are.  What is too old, or too far back, is for history to judge.
        """
        cursor, tail, retention = feed.cursor, feed.tail, feed.namespace.retention
        if cursor is None or not cursor.epoch or since.epoch != cursor.epoch or since.offset > cursor.offset:
            return None
        if since.offset < cursor.offset and (not tail or tail[0].offset > since.offset + 1):
            return None
        if retention is not None and 0 <= retention.size < cursor.offset - since.offset:
            return None
        missed: list[Publication] = []
        room = PAGE_BYTES
        for publication in tail:
            if publication.offset > since.offset:
                room -= publication.weight
                if len(missed) == PAGE_PUBLICATIONS or (missed and room < 0):
                    break
                missed.append(publication)
        if missed and retention is not None and 0 <= retention.ttl_ms <= now_ms - missed[0].time_ms:
            return None
        return Page(missed, cursor.position)

    def remember(self, feed: Feed, page: Page) -> None:
        """Lengthen the tail backwards by a page of history that borders on it, for the next who come back."""
        cursor, tail = feed.cursor, feed.tail
        if cursor is None or cursor.epoch != page.top.epoch or not feed.tail_wanted or not page.publications:
            return
        first = tail[0].offset if tail else cursor.offset + 1
        if page.publications[-1].offset < first - 1:
            return
        for publication in reversed(page.publications):
            if publication.offset < first:
                if feed.tail_bytes + publication.weight > TAIL_BYTES:
                    return
                tail.appendleft(publication)
                feed.tail_bytes += publication.weight

    def sweep(self) -> None:
        """Let go of the tails that nobody has needed since the last sweep; call it once a second."""
        for feed in [feed for feed in self._tails if not feed.catching]:
            if feed.tail_used:
                feed.tail_used = False
            else:
                self._tails.discard(feed)
                feed.tail_wanted = False
                feed.forget_tail()

    # --- publications ---------------------------------------------------------
    def hear(self, channel: str, epoch: str, publication: Publication) -> Verdict:
        """Judge one publication and deliver it to the live ones if it is next.

        After ``HOLE`` and ``FOREIGN`` the caller must repair the channel from
        history; after ``NEXT`` and ``SEEN`` all is well.
        """
        feed = self.feeds.get(channel)
        if feed is None:
            return Verdict.SEEN
        if not publication.offset:
            self._emit(feed, publication, "")
            return Verdict.NEXT
        cursor = feed.cursor
        if cursor is None:
            cursor = feed.cursor = Cursor(Position(publication.offset - 1, epoch))
        verdict = cursor.judge(publication.offset, epoch)
        if verdict is Verdict.NEXT:
            self._advance(feed, cursor, epoch, publication)
            self._close_ranks(feed)
            return Verdict.HOLE if feed.ahead else verdict
        if verdict is Verdict.HOLE and feed.ahead_bytes < TAIL_BYTES and publication.offset not in feed.ahead:
            feed.ahead[publication.offset] = epoch, publication
            feed.ahead_bytes += publication.weight
        return verdict

    def behind(self, channel: str, top: Position) -> bool:
        """Must a channel be repaired, given the top that somebody announced or that history has?"""
        feed = self.feeds.get(channel)
        if feed is None or feed.cursor is None:
            return False
        verdict = feed.cursor.judge(top.offset, top.epoch)
        if verdict is Verdict.SEEN:
            return False
        if verdict is not Verdict.FOREIGN:
            feed.wanted = max(feed.wanted, top.offset)
        return True

    def mend(self, feed: Feed, since: Position, page: Page) -> Sequence[Subscription]:
        """Bring a channel forward with a page that was read after ``since``, its cursor at that time.

        Returns the subscriptions that can no longer be served from here: all
        live ones if history itself is gone (``lost``), or if the page does not
        reach the top; the latter are then catching up, each at its own pace.
        Tell them apart by ``subscription.cursor``.
        """
        caught = catch_up(since, page)
        if not caught.recovered:
            if feed.cursor is None or self._moved_past(feed.cursor, since, page):
                return []
            lost = self._halt(feed, None)
            feed.cursor = None
            feed.forget_ahead()
            return lost
        for publication in caught.publications:
            self.hear(feed.channel, page.top.epoch, publication)
        cursor = feed.cursor
        last = page.publications[-1].offset if page.publications else page.top.offset
        if cursor is None or cursor.offset > last or last >= page.top.offset:
            return []
        late = self._halt(feed, cursor.position)
        feed.cursor = None
        feed.forget_ahead()
        return late

    @staticmethod
    def _moved_past(cursor: Cursor, since: Position, page: Page) -> bool:
        """Has the cursor left ``since`` while the page was read, for a place where nothing is lost?"""
        return cursor.position != since and cursor.epoch == page.top.epoch and cursor.offset >= page.floor

    def _halt(self, feed: Feed, at: Position | None) -> list[Subscription]:
        """Take all live subscriptions back to catching up from ``at``; ``None``: they have lost their place."""
        self._settle(feed)
        halted = [subscription for group in feed.live.values() for subscription in group.values()]
        feed.live.clear()
        feed.base = None
        feed.forget_tail()
        for subscription in halted:
            subscription.live = False
            if subscription.manner.delta is Delta.BASED:
                subscription.manner = subscription.manner.but(Delta.FULL)
            subscription.cursor = Cursor(at) if at is not None else None
            feed.catching.add(subscription)
        self._want_tail(feed)
        return halted

    def _close_ranks(self, feed: Feed) -> None:
        """Deliver what came too early and is next now; what is left in ``ahead`` stands behind a hole."""
        cursor, ahead = feed.cursor, feed.ahead
        if not ahead or cursor is None:
            return
        while (early := ahead.pop(cursor.offset + 1, None)) is not None:
            epoch, publication = early
            feed.ahead_bytes -= publication.weight
            if cursor.judge(publication.offset, epoch) is Verdict.NEXT:
                self._advance(feed, cursor, epoch, publication)
        for offset in [offset for offset in ahead if offset <= cursor.offset]:
            feed.ahead_bytes -= ahead.pop(offset)[1].weight

    def _advance(self, feed: Feed, cursor: Cursor, epoch: str, publication: Publication) -> None:
        cursor.advance(publication.offset, epoch)
        if feed.tail_wanted:
            feed.tail.append(publication)
            feed.tail_bytes += publication.weight
            while feed.tail_bytes > TAIL_BYTES:
                feed.tail_bytes -= feed.tail.popleft().weight
        if feed.live:
            self._emit(feed, publication, epoch)

    # --- fan-out --------------------------------------------------------------
    def _emit(self, feed: Feed, publication: Publication, epoch: str) -> None:
        """One publication to all live ones that want it, encoded once for each form that one of them gets."""
        sending: Sending | None = None
        patched = failed = False
        for manner, group in feed.live.items():
            try:
                if manner.plain:  # nearly always: nothing to decide, and nobody to share the frame with
                    frame = in_full(manner, feed.channel, feed.number, feed.namespace, publication, epoch)
                else:
                    if sending is None:
                        sending = self._sending(feed, publication, epoch, _live_base(feed, publication))
                    if manner.filter is not None and not sending.wanted(manner.filter):
                        continue
                    patched = patched or manner.delta is not Delta.OFF
                    frame = sending.frame(manner)
            except protocol.Inexpressible as error:
                self._give_up(group, error)
                failed = True
            else:
                self._pass_on(feed, manner, group, frame)
        if patched and feed.namespace.kept:
            feed.base = None if failed else publication.data
            self._close_up(feed)

    def _sending(self, feed: Feed, publication: Publication, epoch: str, base: bytes | None) -> Sending:
        return Sending(feed.channel, feed.number, feed.namespace, publication, epoch, self.patches, base)

    def _give_up(self, group: dict[Outbox, Subscription], error: protocol.Inexpressible) -> None:
        """These cannot be sent a publication, and may not be spared it either (PROTOCOL 9.4)."""
        for subscription in group.values():
            self._soon(partial(subscription.session.disconnect, INAPPROPRIATE_PROTOCOL, str(error)))

    def _pass_on(self, feed: Feed, manner: Manner, group: dict[Outbox, Subscription], frame: bytes) -> None:
        """One frame to all of a group: to a few at once, to many at the end of the turn."""
        self.deliveries += len(group)
        if len(group) <= FEW and not feed.pending:
            manner.wire.post(group, frame)
            return
        if not feed.pending:
            if not self._dirty:
                self._dirty_since = self._clock()
                self._soon(self.flush)
            self._dirty.append(feed)
        feed.pending.setdefault(manner, []).append(frame)

    def _close_up(self, feed: Feed) -> None:
        """Who got a payload in full has the same base as the others from now on, and is sent to as they are."""
        full = [manner for manner in feed.live if manner.delta is Delta.FULL]
        if not full:
            return
        self._settle(feed)
        for manner in full:
            group = feed.live.pop(manner)
            based = manner.but(Delta.BASED)
            for subscription in group.values():
                subscription.manner = based
            feed.live.setdefault(based, {}).update(group)

    def tell(self, channel: str, kind: str, info: ClientInfo) -> None:
        """A join or a leave of ``info`` to the subscriptions that want to know (PROTOCOL 14.2)."""
        feed = self.feeds.get(channel)
        if feed is None:
            return
        body = protocol.Presence(protocol.client_info(info))
        frames: dict[tuple[Wire, bool], bytes] = {}
        for subscription in feed.audience:
            manner = subscription.manner
            form = manner.wire, manner.numbered
            frame = frames.get(form)
            if frame is None:
                frame = frames[form] = encode(manner, channel, feed.number, kind, body)
            self.post(subscription.outbox, frame)

    def send(self, subscription: Subscription, publications: Iterable[Publication], epoch: str) -> bool:
        """Publications to one subscription that is catching up, if it wants them; its cursor moves with each.

        False if one of them cannot be said to this client: its connection ends in the next
        turn, and until then nothing may come behind the gap (PROTOCOL 9.4).
        """
        feed, cursor, manner = subscription.feed, subscription.cursor, subscription.manner
        assert feed is not None, f"{subscription!r} has no feed"
        assert cursor is not None, f"{subscription!r} is not catching up"
        patched = manner.delta is not Delta.OFF
        if patched:
            manner = manner.but(Delta.BASED)
        for publication in publications:
            try:
                if manner.plain:
                    frame = in_full(manner, feed.channel, feed.number, feed.namespace, publication, epoch)
                else:
                    sending = self._sending(feed, publication, epoch, subscription.base)
                    if manner.filter is not None and not sending.wanted(manner.filter):
                        cursor.advance(publication.offset, epoch)
                        continue
                    frame = sending.frame(manner)
            except protocol.Inexpressible as error:
                self._soon(partial(subscription.session.disconnect, INAPPROPRIATE_PROTOCOL, str(error)))
                return False
            cursor.advance(publication.offset, epoch)
            if patched:
                subscription.base = publication.data
            self.deliveries += 1
            subscription.outbox.send(frame)
        return True

    def post(self, outbox: Outbox, frame: bytes) -> None:
        """A reply or a push for one socket, in order behind the publications of this loop turn."""
        if self._dirty:
            self._after.append((outbox, frame))
        else:
            outbox.send(frame)

    def _settle(self, feed: Feed) -> None:
        """Before the live ones change: what was meant for them leaves, and what was posted before stays before."""
        if self._dirty and (feed.pending or self._after):
            self.flush()

    def flush(self) -> None:
        """End the loop turn: the pending frames of every channel leave."""
        dirty, self._dirty = self._dirty, []
        after, self._after = self._after, []
        alone = len(dirty) == 1
        for feed in dirty:
            pending, feed.pending = feed.pending, {}
            for manner, frames in pending.items():
                data = frames[0] if len(frames) == 1 else b"".join(frames)
                group = feed.live.get(manner, {})
                if alone:
                    manner.wire.spread(group, data)
                else:
                    manner.wire.post(group, data)
        for outbox, frame in after:
            outbox.send(frame)
        if dirty:
            self.fanout_seconds.observe(self._clock() - self._dirty_since)


def _live_base(feed: Feed, publication: Publication) -> bytes | None:
    """What a live publication may be a patch of; ``None`` if it goes to everybody in full (PROTOCOL 12.3)."""
    if feed.base is None or not publication.offset:
        return None
    return feed.base if publication.delta or feed.namespace.options.delta_publish else None
