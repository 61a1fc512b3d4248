"""Pages of history for the subscriptions of one process: one read for all who ask for the same.

Everybody who wants a page of a channel before a read of it begins is served by
that read, as far as it reaches; so a thousand who come back to one channel cost
history a few reads.  Recoveries begin so many a second, and pages for them are read
so many at a time; a page for a hole under live subscriptions does not wait behind
either.  A payload that was erased while a page was on its way is never handed out:
the page is read again.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec

from server.channels import Namespace
from server.errors import Unavailable
from server.history import History
from server.hub import Feed, Hub, Subscription
from server.limits import Owner
from server.metrics import Counts
from server.observe import event
from server.protocol import MAX_OFFSET
from server.stream import PAGE_BYTES, PAGE_PUBLICATIONS, Page, Position
from server.tasks import Tasks
from server.turnstile import Turnstile

T = TypeVar("T")

NEWEST = MAX_OFFSET
"""Asked for in the place of an offset by who wants to know where the top is, and no page."""

NO_LIMIT = 2**31
RECOVERY_RATE = "client.recovery_rate_limit"

TURN_PART = 0.5
"""Within which part of the patience a recovery must have its turn; the rest is for its page."""


class Recovery(msgspec.Struct, frozen=True):
    """What somebody who comes back wants: what follows ``since``, or the ``newest`` of it alone (PROTOCOL 11.6).

    ``asked_at`` (Unix s) is when the command or the request for it came; ``owner`` is whose turn it takes.
    """

    since: Position
    asked_at: float
    owner: Owner
    newest: bool = False


async def patiently(work: Awaitable[T], patience_s: float, whose: str = "history") -> T:
    """What ``work`` gives; raises ``errors.Unavailable`` after ``patience_s``."""
    try:
        async with asyncio.timeout(patience_s):
            return await work
    except TimeoutError:
        raise Unavailable(f"{whose} has not answered within {patience_s:g} s") from None


class Pages:
    """The reads of one process.  Each raises ``errors.Unavailable``, at the latest after ``patience_s``.

    ``now_ms()`` is Unix time; ``at_once`` how many recoveries are read for at a time, and ``per_second``
    how many channels begin to be read for them in a second, 0 for any number.
    """

    def __init__(
        self,
        history: History,
        hub: Hub,
        tasks: Tasks,
        counts: Counts,
        now_ms: Callable[[], int],
        *,
        patience_s: float,
        at_once: int,
        per_second: int,
    ) -> None:
        self._history = history
        self._hub = hub
        self._tasks = tasks
        self._counts = counts
        self._now_ms = now_ms
        self._patience_s = patience_s
        self._turns = asyncio.Semaphore(at_once or NO_LIMIT)
        self._turnstile = Turnstile(per_second, RECOVERY_RATE, self._count_wait)

    def renew(self, per_second: int) -> None:
        """Let so many recoveries begin in a second from now on, those that wait already included."""
        self._turnstile.renew(per_second)

    def _count_wait(self) -> None:
        self._counts.limits[RECOVERY_RATE] += 1

    async def read(
        self,
        channel: str,
        namespace: Namespace,
        *,
        since: int | None = None,
        limit: int,
        max_bytes: int = 2**31,
        reverse: bool = False,
    ) -> Page:
        """A page of a kept channel's history as ``History.read`` gives it."""
        assert namespace.retention is not None, f"{channel!r} is a passing channel"
        return await self._timely(
            self._history.read(
                channel,
                namespace.retention,
                self._now_ms(),
                since=since,
                limit=limit,
                max_bytes=max_bytes,
                reverse=reverse,
            )
        )

    async def tops(self, channels: list[str]) -> dict[str, Position]:
        """The tops of those that history knows."""
        return await self._timely(self._history.tops(channels))

    async def turn(self, subscription: Subscription, recovery: Recovery) -> None:
        """Return when it is the turn of a subscription that comes back: at once if memory has what it needs.

        What ends with the newest is always read.  It may have been closed meanwhile.
        Raises ``errors.Overdue`` if its turn does not come in time, at once if that is
        known at once (PROTOCOL 18.0.7).
        """
        feed = subscription.feed
        assert feed is not None, f"{subscription!r} has no feed"
        if recovery.newest or self._hub.recall(feed, recovery.since, self._now_ms()) is None:
            waited_s = max(0.0, self._now_ms() / 1000 - recovery.asked_at)
            left_s = self._patience_s * TURN_PART - waited_s
            await self._turnstile.take(feed.channel, subscription, recovery.owner, left_s)

    async def mending(self, feed: Feed, since: int) -> Page:
        """A page after ``since`` for the live ones, who wait for nobody."""
        while True:
            erasures = feed.erasures
            page = await self._page(feed, since)
            if feed.erasures == erasures:
                return page

    async def newest(self, feed: Feed, *, filtered: bool) -> Page:
        """A page that ends where history's top is now; all who are not filtered share their reads (PROTOCOL 11.6)."""
        if filtered:
            page = await self._page(feed, None, reverse=True)
            return Page(page.publications[::-1], page.top, page.floor)
        top = (await self.after(feed, NEWEST)).top
        before = Position(max(0, top.offset - 1), top.epoch)
        found = self._hub.recall(feed, before, self._now_ms())
        if found is None or not found.publications:  # the live ones may not have heard of the top yet
            found = await self.after(feed, before.offset)
        newest = [publication for publication in found.publications if publication.offset > before.offset][:1]
        return Page(newest, found.top, found.floor)  # what was published since follows as pushes

    def after(self, feed: Feed, since: int) -> "asyncio.Future[Page]":
        """A page after ``since``, read after this call; one read serves all who asked before it began."""
        future: asyncio.Future[Page] = asyncio.get_running_loop().create_future()
        if feed.pages is None:
            feed.pages = []
            self._tasks.spawn(self._serve(feed), f"read {feed.channel}")
        feed.pages.append((since, future))
        return future

    async def _serve(self, feed: Feed) -> None:
        """Read until nobody asks: from the lowest of those whom the last page did not reach, or of all.

        Nobody starves: who was not served goes first, and one page serves
        everybody within its reach.
        """
        assert feed.pages is not None
        left: list[tuple[int, asyncio.Future[Page]]] = []
        while left or feed.pages:
            asked, feed.pages = left + feed.pages, []
            first = min(since for since, _ in left or asked)
            erasures = feed.erasures
            try:
                if first == NEWEST:
                    page = await self.read(feed.channel, feed.namespace, limit=0)
                else:
                    page = await self._in_turn(feed, first)
            except Unavailable as error:
                _fail(asked, error)
                left = []
                continue
            except Exception as fault:
                event("task.failed", task=f"read {feed.channel}", fault=fault)
                _fail(asked, Unavailable("a fault of ours while reading"))
                left = []
                continue
            if feed.erasures != erasures:
                left = asked  # What was erased while we read must not be handed out, least of all remembered.
                continue
            self._hub.remember(feed, page)
            last = page.publications[-1].offset if page.publications else page.top.offset
            left = []
            for since, future in asked:
                if future.done():
                    continue
                if since == NEWEST or (since >= first and (since < last or last >= page.top.offset)):
                    future.set_result(page)
                else:
                    left.append((since, future))
        feed.pages = None

    async def _in_turn(self, feed: Feed, since: int) -> Page:
        """A page after ``since``, when so many others are not being read: the time for it begins with its turn.

        All who come back at once are so let in one after the other, at the pace of history,
        and those who wait hold no page of it in memory.
        """
        if self._turns.locked():
            self._counts.limits["client.concurrent_recovery_limit"] += 1
        async with self._turns:
            return await self._page(feed, since)

    async def _page(self, feed: Feed, since: int | None, *, reverse: bool = False) -> Page:
        """One page of the size that goes with a reply (PROTOCOL 11.3)."""
        return await self.read(
            feed.channel, feed.namespace, since=since, limit=PAGE_PUBLICATIONS, max_bytes=PAGE_BYTES, reverse=reverse
        )

    async def _timely(self, reading: Coroutine[Any, Any, T]) -> T:
        """What was asked of history, counted by how long it took."""
        time = asyncio.get_running_loop().time
        began_at = time()
        found = await patiently(reading, self._patience_s)
        self._counts.read_seconds.observe(time() - began_at)
        return found


def _fail(asked: list[tuple[int, "asyncio.Future[Page]"]], error: Unavailable) -> None:
    for _, future in asked:
        if not future.done():
            future.set_exception(error)
