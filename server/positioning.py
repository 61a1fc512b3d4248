"""Who is behind history, and how it gets there: channels with a hole, and subscriptions that catch up.

Fan-out is quick and may miss something; here it is noticed and made up for.  A channel
whose cursor stands before a hole, or behind a top that somebody knows, is *repaired*: one
at a time, by reads that all its live subscriptions share.  A subscription that is behind
the live ones *catches up*: page after page, at the pace of its socket, until it meets
them.  The rules:

* a hole may fill itself for a moment, since words overtake one another;
* look again after every wait: the feed may be gone, the subscription closed;
* what history cannot give now is asked for again, for as long as somebody wants it.

PROTOCOL 11.
"""

import asyncio
from collections.abc import Callable
from weakref import WeakValueDictionary

from server.errors import SERVER_ERROR, Disconnected, Unavailable
from server.hub import Feed, Hub, Step, Subscription
from server.metrics import Counts
from server.observe import event
from server.outbox import Outbox
from server.pace import Pace
from server.pages import Pages
from server.stream import Position, catch_up
from server.tasks import Tasks

HOLE_PATIENCE_S = 0.03
"""How long a hole may fill itself before history is asked: words overtake one another by milliseconds."""

RETRY_S = 1.0
"""How long after history failed a repair or a catching-up subscription asks again."""


class Positioning:
    """See the module's docstring; ``now_ms()`` is Unix time."""

    def __init__(
        self, hub: Hub, pages: Pages, pace: Pace, tasks: Tasks, counts: Counts, now_ms: Callable[[], int]
    ) -> None:
        self._hub = hub
        self._pages = pages
        self._pace = pace
        self._tasks = tasks
        self._counts = counts
        self._now_ms = now_ms
        self._turns: WeakValueDictionary[Outbox, asyncio.Lock] = WeakValueDictionary()
        self._unchecked = False

    # --- repair ---------------------------------------------------------------
    def compare(self, channel: str, top: Position) -> None:
        """History reaches to ``top``, somebody says: have the channel repaired if it is behind that."""
        if self._hub.behind(channel, top):
            self.mend(channel, patiently=False)

    def mend(self, channel: str, *, patiently: bool) -> asyncio.Future[None] | None:
        """Have a channel brought up to history's top; one repair at a time, shared."""
        feed = self._hub.feeds.get(channel)
        if feed is None:
            return None
        if feed.repairing is None:
            feed.repairing = self._tasks.spawn(self._repair(feed, patiently), f"repair {channel}")
        return feed.repairing

    async def _repair(self, feed: Feed, patiently: bool) -> None:
        try:
            if patiently:
                await asyncio.sleep(HOLE_PATIENCE_S)
                if not feed.incomplete:
                    return
            for _ in range(3):
                if feed.cursor is None or not await self._repair_once(feed) or not feed.incomplete:
                    return
            feed.forget_ahead()
        finally:
            feed.repairing = None

    async def _repair_once(self, feed: Feed) -> bool:
        """Read one page and mend with it; false if the feed is gone meanwhile."""
        while True:
            cursor = feed.cursor
            if cursor is None or self._hub.feeds.get(feed.channel) is not feed:
                return False
            since = cursor.position
            try:
                page = await self._pages.mending(feed, since.offset)
                break
            except Unavailable as error:
                self._counts.failed_repairs += 1
                event("channel.repair_failed", channel=feed.channel, why=error)
                await asyncio.sleep(RETRY_S)
        if self._hub.feeds.get(feed.channel) is not feed:
            return False
        self._counts.repairs += 1
        event("channel.repaired", channel=feed.channel, offset=since.offset, top=page.top.offset)
        for subscription in self._hub.mend(feed, since, page):
            if subscription.cursor is None:
                subscription.session.lose(subscription)
            else:
                self.start_catching_up(subscription)
        return True

    def check_all(self) -> None:
        """Anything may have been missed: compare every followed kept channel with history now."""
        self._unchecked = True
        self._tasks.once("compare tops", self._check_tops)

    async def _check_tops(self) -> None:
        while self._unchecked:  # a check that had begun before has not seen what was missed since
            self._unchecked = False
            await self._check_tops_once()

    async def _check_tops_once(self) -> None:
        followed = [channel for channel, feed in self._hub.feeds.items() if feed.namespace.kept and feed.cursor]
        if not followed:
            return
        try:
            tops = await self._pages.tops(followed)
        except Unavailable as error:
            event("history.unavailable", why=error)
            return
        for channel in followed:
            self.compare(channel, tops.get(channel, Position()))

    # --- catching up ----------------------------------------------------------
    def start_catching_up(self, subscription: Subscription, step: Step = Step.READ) -> None:
        """Bring a subscription to the live ones, beginning with ``step``; PROTOCOL 11.5."""
        self._tasks.spawn(self._catch_up(subscription, step), f"catch up {subscription.channel}")

    async def _catch_up(self, subscription: Subscription, step: Step) -> None:
        """Read page after page at the pace of the socket, then go live; PROTOCOL 11.5.

        The subscriptions of one socket take turns: if all of them took the room
        that they see when it is drained, their pages together would be too much.
        """
        turn = self._turns.setdefault(subscription.outbox, asyncio.Lock())
        while step not in (Step.LIVE, Step.ENDED):
            try:
                if step is Step.REPAIR:
                    step = await self._wait_for_repair(subscription)
                else:
                    async with turn:
                        await subscription.outbox.drained()
                        async with self._pace.room:
                            step = await self._read_on(subscription)
            except Disconnected as end:
                if not subscription.closed:
                    subscription.session.disconnect(end.disconnect, "it did not take its history")
                return
            except Unavailable as error:
                event("channel.repair_failed", channel=subscription.channel, why=error)
                await asyncio.sleep(RETRY_S)
            except Exception as fault:
                event("task.failed", task=f"catch up {subscription.channel}", fault=fault)
                subscription.session.disconnect(SERVER_ERROR, "a fault of ours while it caught up")
                return
            if subscription.closed:
                return

    async def _read_on(self, subscription: Subscription) -> Step:
        feed, cursor = subscription.feed, subscription.cursor
        if feed is None or cursor is None:
            return Step.LIVE
        since = cursor.position
        page = self._hub.recall(feed, since, self._now_ms())
        if page is None:
            await self._pace.reading()
            if subscription.closed:
                return Step.LIVE
            page = await self._pages.after(feed, since.offset)
        erasures = feed.erasures
        await self._pace.sending(max(1, len(page.publications)))  # whatever comes of it, others have their turn
        if subscription.closed:
            return Step.LIVE
        if feed.erasures != erasures:  # the page may hold what has been erased since
            return Step.READ
        caught = catch_up(since, page)
        if not caught.recovered:
            subscription.session.lose(subscription)
            return Step.LIVE
        if not self._hub.send(subscription, caught.publications, page.top.epoch):
            return Step.ENDED
        if subscription.closed:
            return Step.LIVE
        if not cursor.epoch:
            cursor.epoch = page.top.epoch
        if cursor.offset < page.top.offset:
            return Step.READ
        if not page.top.epoch and feed.cursor is not None and feed.cursor.epoch:
            return Step.REPAIR  # History has forgotten the channel under its live ones.
        return self._hub.go_live(subscription)

    async def _wait_for_repair(self, subscription: Subscription) -> Step:
        repair = self.mend(subscription.channel, patiently=False)
        if repair is not None:
            await asyncio.shield(repair)
        if subscription.closed:
            return Step.LIVE
        step = self._hub.go_live(subscription)
        # The channel is as far as history now; if they still do not meet, history has to judge the other one.
        return Step.READ if step is Step.REPAIR else step
