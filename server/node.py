"""One process of Waterspout: it joins history, broker, presence and the hub.

Publishing, subscribing, recovery, repair and the once-a-second sweep are here,
each a short ``async`` function that waits around decisions made elsewhere
(``stream.catch_up``, ``Hub``).  The rules they keep:

* register first, read after; look at ``closed`` again after every wait;
* one read serves everybody who asked for a page of the same channel before it
  began, and one repair serves all who share a hole;
* history tells ``committed`` before it answers the publisher, so that a client
  sees its own publication before its reply, and also when nobody waits any more.

It reads no clock of its own: ``clock`` (Unix seconds) is handed in by run.py.
"""

import asyncio
import uuid
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

from server import broker as wires
from server.broker import ANNOUNCED_BYTES, Broker, Joined, Left, Published, Target, Word
from server.channels import Channels, Namespace
from server.errors import BAD_REQUEST, SERVER_ERROR, Disconnect, Disconnected, Refused, Unavailable
from server.history import Appended, Draft, History
from server.hooks import Hooks
from server.hub import Feed, Hub, Step, Subscription
from server.observe import event
from server.outbox import Outbox
from server.presence import Presence
from server.protocol import MAX_OFFSET
from server.settings import Settings
from server.stream import ClientInfo, Page, Position, Publication, Verdict, catch_up, weight_of
from server.timetable import Timetable

T = TypeVar("T")

HOLE_PATIENCE_S = 0.03
"""How long a hole may fill itself before history is asked: words overtake one another by milliseconds."""

RETRY_S = 1.0
"""How long after history failed a repair or a catching-up subscription asks again."""

TOPS_S = 5.0
"""How often followed channels are compared with the tops in history."""

PASSING_KEY_S = 300.0
PASSING_KEYS = 100_000


class Session(Protocol):
    """What the node asks of one client's session."""

    client: str
    user: str

    def __hash__(self) -> int:
        """A session is itself and nobody else."""

    def tick(self, now: float) -> None:
        """The moment that the session put into the timetable has come."""

    def rewind(self, seconds: float) -> None:
        """The clock was set back: put what is due back as well, and into the timetable anew."""

    def disconnect(self, disconnect: Disconnect, why: str = "") -> None:
        """End the connection."""

    def unsubscribe_by_order(self, channel: str) -> None:
        """End the subscription of ``channel``, or all if it is empty, with 2000."""

    def subscribe_by_order(self, order: wires.SubscribeOrder) -> None:
        """Subscribe server-side."""

    def refresh_by_order(self, order: wires.RefreshOrder) -> None:
        """Move the connection's expiry."""


class Node:
    """One process; see the module's docstring.

    ``open`` before use, ``sweep`` once a second, ``close`` at the end.
    """

    def __init__(
        self,
        *,
        history: History,
        broker: Broker,
        presence: Presence,
        settings: Settings,
        clock: Callable[[], float],
        name: str = "",
    ) -> None:
        self.id = str(uuid.uuid4())
        self.name = name or self.id
        self.history = history
        self.broker = broker
        self.presence = presence
        self.settings = settings
        self.clock = clock
        self.channels = Channels(settings.channel)
        self.hub = Hub(lambda call: asyncio.get_running_loop().call_soon(call))
        self.hooks: Hooks | None = None
        """What a user's module has to say; set before the first session."""
        self.connections = 0
        """How many clients are here, connected or about to be."""
        self.sessions: dict[str, Session] = {}
        self.users: defaultdict[str, dict[str, Session]] = defaultdict(dict)
        self.timetable: Timetable[Session] = Timetable()
        self.patience_s = settings.sqlite.publish_timeout
        self._tasks: set[asyncio.Task[Any]] = set()
        self._busy: set[str] = set()
        self._turns: WeakValueDictionary[Outbox, asyncio.Lock] = WeakValueDictionary()
        self._tops: dict[str, Position] = {}
        self._exits: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._ghosts: set[tuple[str, str]] = set()
        self._swept_at = 0.0
        self._passing_keys: dict[tuple[str, str], float] = {}
        self._next_tops = self._next_renewal = 0.0
        self.started_at = 0.0

    def __repr__(self) -> str:
        return f"<Node {self.name} sessions={len(self.sessions)} feeds={len(self.hub.feeds)}>"

    # --- life -----------------------------------------------------------------
    async def open(self) -> None:
        """Open the seams; raises ``errors.Unavailable`` if one of them cannot be."""
        self.started_at = self.clock()
        self.history.on_commit = self.committed
        self.broker.on_word = self.heard
        self.broker.on_order = self.obey
        self.broker.on_return = self.check_all
        await self.history.open()
        await self.broker.open()
        await self.presence.open(self.clock())

    async def close(self) -> None:
        """Finish what is under way and close the seams; sessions have been ended before."""
        pending = {task for task in self._tasks if task is not asyncio.current_task()}
        if pending:
            _, late = await asyncio.wait(pending, timeout=self.patience_s)
            for task in late:
                task.cancel()
        await self.broker.close()
        await self.presence.close()
        await self.history.close()

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run ``work`` beside us; the node owns the task and logs what it raises."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            event("task.failed", task=task.get_name(), fault=fault)

    @property
    def now_ms(self) -> int:
        """The clock in Unix milliseconds."""
        return int(self.clock() * 1000)

    # --- sessions -------------------------------------------------------------
    def admit(self, session: Session) -> None:
        """Enter a session that has connected."""
        self.sessions[session.client] = session
        self.users[session.user][session.client] = session

    def dismiss(self, session: Session) -> None:
        """Forget a session; it need not have been admitted."""
        if self.sessions.pop(session.client, None) is None:
            return
        mine = self.users[session.user]
        mine.pop(session.client, None)
        if not mine:
            del self.users[session.user]

    def targeted(self, target: Target) -> list[Session]:
        """The connections here that an order is for (PROTOCOL 15.2)."""
        return [
            session
            for client, session in self.users.get(target.user, {}).items()
            if (not target.client or client == target.client) and client not in target.spared
        ]

    # --- publishing -----------------------------------------------------------
    async def publish(self, channel: str, namespace: Namespace, draft: Draft, patience_s: float = 0) -> Appended:
        """Publish ``draft`` and return its position (``Position(0, "")`` in a passing channel).

        Raises ``errors.Unavailable`` when the outcome is unknown, at the latest
        after ``patience_s`` (default: the configured publish timeout), and
        ``errors.Refused`` when the channel's queue is full.
        """
        if len(draft.key) > 256:
            raise Refused(BAD_REQUEST, "an idempotency key is longer than 256 characters")
        self.check_size(draft)
        if namespace.retention is None:
            if draft.key and self.repeated(channel, draft.key):
                return Appended(Position(), repeated=True)
            self.publish_passing(channel, Publication(draft.data, info=draft.info, tags=draft.tags))
            return Appended(Position())
        return await self._patiently(
            self.history.append(channel, draft, namespace.retention, self.now_ms), patience_s or self.patience_s
        )

    def check_size(self, draft: Draft | Publication) -> None:
        """Raises ``Refused(BAD_REQUEST)`` for what would cut every subscriber that it is sent to (PROTOCOL 18)."""
        most = self.settings.client.queue_max_size // 2
        if weight_of(draft.data, draft.info, draft.tags) > most:
            raise Refused(BAD_REQUEST, f"a payload is larger than half of client.queue_max_size ({most} bytes)")

    def publish_passing(self, channel: str, publication: Publication) -> None:
        """Deliver and announce a publication that nobody keeps: at most once, in order per publisher.

        Raises ``errors.Refused`` if it is too large.
        """
        self.check_size(publication)
        self.hub.hear(channel, "", publication)
        self.broker.announce(Published(channel, Position(), (publication,)))

    def repeated(self, channel: str, key: str) -> bool:
        """Has this key been used in a passing channel in the last minutes?  It counts as used from now on."""
        now = self.clock()
        keys = self._passing_keys
        until = keys.pop((channel, key), 0.0)
        while len(keys) >= PASSING_KEYS:
            del keys[next(iter(keys))]  # the oldest
        keys[channel, key] = until if until > now else now + PASSING_KEY_S
        return until > now

    def committed(self, channel: str, epoch: str, publications: Sequence[Publication]) -> None:
        """History has made these durable: deliver them here, then tell the others."""
        self._deliver(channel, epoch, publications)
        top = Position(publications[-1].offset, epoch)
        self._tops[channel] = top
        light = [publication for publication in publications if len(publication.data) <= ANNOUNCED_BYTES]
        self.broker.announce(Published(channel, top, light))

    def _deliver(self, channel: str, epoch: str, publications: Iterable[Publication]) -> None:
        for publication in publications:
            verdict = self.hub.hear(channel, epoch, publication)
            if verdict is Verdict.HOLE or verdict is Verdict.FOREIGN:
                self._mend(channel, patiently=verdict is Verdict.HOLE)

    def heard(self, word: Word) -> None:
        """Another process has said something; it may be late, repeated or out of order."""
        match word:
            case Published(channel, top, publications):
                self._deliver(channel, top.epoch, publications)
                if top.offset and not (publications and publications[-1].offset == top.offset):
                    self._compare(channel, top)
            case Joined(channel, info):
                self.hub.tell(channel, "join", info)
            case Left(channel, info):
                self.hub.tell(channel, "leave", info)

    async def remove(self, channel: str) -> None:
        """Forget the payloads of a kept channel; offsets go on (PROTOCOL 11.1).  Raises ``errors.Unavailable``."""
        await self.history.remove(channel)
        feed = self.hub.feeds.get(channel)
        if feed is not None:
            feed.forget_tail()

    # --- repair ---------------------------------------------------------------
    def _compare(self, channel: str, top: Position) -> None:
        if self.hub.behind(channel, top):
            self._mend(channel, patiently=False)

    def _mend(self, channel: str, *, patiently: bool) -> asyncio.Future[None] | None:
        """Have a channel brought up to history's top; one repair at a time, shared."""
        feed = self.hub.feeds.get(channel)
        if feed is None:
            return None
        if feed.repairing is None:
            feed.repairing = self.spawn(self._repair(feed, patiently), f"repair {channel}")
        return feed.repairing

    async def _repair(self, feed: Feed, patiently: bool) -> None:
        try:
            if patiently:
                await asyncio.sleep(HOLE_PATIENCE_S)
                if not feed.ahead:
                    return
            for _ in range(3):
                if feed.cursor is None or not await self._repair_once(feed) or not feed.ahead:
                    return
            feed.forget_ahead()
        finally:
            feed.repairing = None

    async def _repair_once(self, feed: Feed) -> bool:
        """Read one page and mend with it; false if the feed is gone meanwhile."""
        while True:
            cursor = feed.cursor
            if cursor is None or self.hub.feeds.get(feed.channel) is not feed:
                return False
            since = cursor.position
            try:
                page = await self._page(feed, since.offset)
                break
            except Unavailable as error:
                event("channel.repair_failed", channel=feed.channel, why=error)
                await asyncio.sleep(RETRY_S)
        if self.hub.feeds.get(feed.channel) is not feed:
            return False
        event("channel.repaired", channel=feed.channel, offset=since.offset, top=page.top.offset)
        for subscription in self.hub.mend(feed, since, page):
            if subscription.cursor is None:
                subscription.session.lose(subscription)
            else:
                self._start_catching_up(subscription)
        return True

    def check_all(self) -> None:
        """Anything may have been missed: compare every followed kept channel with history now."""
        self._once("compare tops", self._check_tops)

    async def _check_tops(self) -> None:
        followed = [channel for channel, feed in self.hub.feeds.items() if feed.namespace.kept and feed.cursor]
        if not followed:
            return
        try:
            tops = await self._patiently(self.history.tops(followed), self.patience_s)
        except Unavailable as error:
            event("history.unavailable", why=error)
            return
        for channel in followed:
            self._compare(channel, tops.get(channel, Position()))

    # --- reading --------------------------------------------------------------
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
        """A page of a kept channel's history as ``History.read`` gives it; raises ``errors.Unavailable``."""
        assert namespace.retention is not None, f"{channel!r} is a passing channel"
        reading = self.history.read(
            channel, namespace.retention, self.now_ms, since=since, limit=limit, max_bytes=max_bytes, reverse=reverse
        )
        return await self._patiently(reading, self.patience_s)

    async def _patiently(self, work: Coroutine[Any, Any, T], patience_s: float) -> T:
        try:
            async with asyncio.timeout(patience_s):
                return await work
        except TimeoutError:
            raise Unavailable(f"history has not answered within {patience_s:g} s") from None

    def _page(self, feed: Feed, since: int) -> "asyncio.Future[Page]":
        """A page after ``since``, read after this call; one read serves all who asked before it began."""
        future: asyncio.Future[Page] = asyncio.get_running_loop().create_future()
        if feed.pages is None:
            feed.pages = []
            self.spawn(self._serve_pages(feed), f"read {feed.channel}")
        feed.pages.append((since, future))
        return future

    async def _serve_pages(self, feed: Feed) -> None:
        """Read until nobody asks: from the lowest of those whom the last page did not reach, or of all.

        Nobody starves: who was not served goes first, and one page serves
        everybody within its reach.
        """
        namespace = feed.namespace
        assert namespace.retention is not None
        assert feed.pages is not None
        left: list[tuple[int, asyncio.Future[Page]]] = []
        while left or feed.pages:
            asked, feed.pages = left + feed.pages, []
            first = min(since for since, _ in left or asked)
            try:
                reading = (
                    self.history.read(feed.channel, namespace.retention, self.now_ms, limit=0)
                    if first == NEWEST
                    else self.history.read(feed.channel, namespace.retention, self.now_ms, since=first)
                )
                page = await self._patiently(reading, self.patience_s)
            except Unavailable as error:
                for _, future in asked:
                    if not future.done():
                        future.set_exception(error)
                left = []
                continue
            except Exception as fault:
                event("task.failed", task=f"read {feed.channel}", fault=fault)
                for _, future in asked:
                    if not future.done():
                        future.set_exception(Unavailable("a fault of ours while reading"))
                left = []
                continue
            self.hub.remember(feed, page)
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

    # --- subscribing ----------------------------------------------------------
    async def subscribe(self, subscription: Subscription, since: Position | None) -> Page | None:
        """Register a subscription and read what it needs for its reply: a page after ``since``, or the top.

        Returns ``None`` for a passing channel.  Afterwards either ``settle`` in
        the same loop turn as the reply, or ``release``.  Raises
        ``errors.Unavailable``, having released it.
        """
        feed = self.hub.join(subscription)
        try:
            async with asyncio.timeout(self.patience_s):
                await self._follow(feed)
                if not subscription.namespace.kept:
                    return None
                if since is None:
                    return await self._page(feed, NEWEST)
                return self.hub.recall(feed, since) or await self._page(feed, since.offset)
        except TimeoutError:
            self.release(subscription)
            raise Unavailable(f"a subscription was not in force within {self.patience_s:g} s") from None
        except BaseException:
            self.release(subscription)
            raise

    async def _follow(self, feed: Feed) -> None:
        if feed.following is None:
            feed.following = self.spawn(self.broker.follow(feed.channel), f"follow {feed.channel}")
        try:
            await asyncio.shield(feed.following)
        except Unavailable:
            feed.following = None
            raise

    def settle(self, subscription: Subscription, top: Position | None) -> None:
        """Let a subscription that has been replied to go live, or catch up until it can.

        ``top`` is where history stood when its page was read; ``None`` for a
        passing channel.
        """
        self.hub.begin(subscription)
        cursor = subscription.cursor
        if cursor is not None and top is not None and cursor.offset < top.offset:
            self._start_catching_up(subscription)
            return
        step = self.hub.go_live(subscription)
        if step is not Step.LIVE:
            self._start_catching_up(subscription, step)

    def _start_catching_up(self, subscription: Subscription, step: Step = Step.READ) -> None:
        self.spawn(self._catch_up(subscription, step), f"catch up {subscription.channel}")

    async def _catch_up(self, subscription: Subscription, step: Step) -> None:
        """Read page after page at the pace of the socket, then go live; PROTOCOL 11.5.

        The subscriptions of one socket take turns: if all of them took the room
        that they see when it is drained, their pages together would be too much.
        """
        turn = self._turns.setdefault(subscription.outbox, asyncio.Lock())
        while step is not Step.LIVE:
            try:
                if step is Step.REPAIR:
                    step = await self._wait_for_repair(subscription)
                else:
                    async with turn:
                        await subscription.outbox.drained()
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
        page = self.hub.recall(feed, since) or await self._page(feed, since.offset)
        if subscription.closed:
            return Step.LIVE
        caught = catch_up(since, page)
        if not caught.recovered:
            subscription.session.lose(subscription)
            return Step.LIVE
        self.hub.send(subscription, caught.publications, page.top.epoch)
        if subscription.closed:
            return Step.LIVE
        if not cursor.epoch:
            cursor.epoch = page.top.epoch
        if cursor.offset < page.top.offset:
            return Step.READ
        if not page.top.epoch and feed.cursor is not None and feed.cursor.epoch:
            return Step.REPAIR  # History has forgotten the channel under its live ones.
        return self.hub.go_live(subscription)

    async def _wait_for_repair(self, subscription: Subscription) -> Step:
        repair = self._mend(subscription.channel, patiently=False)
        if repair is not None:
            await asyncio.shield(repair)
        if subscription.closed:
            return Step.LIVE
        step = self.hub.go_live(subscription)
        # The channel is as far as history now; if they still do not meet, history has to judge the other one.
        return Step.READ if step is Step.REPAIR else step

    def release(self, subscription: Subscription) -> None:
        """Take a subscription out of the hub; the last one of a channel lets go of the broker, too."""
        emptied = self.hub.leave(subscription)
        if emptied is not None and emptied.following is not None:
            self.spawn(self._unfollow(emptied.channel), f"unfollow {emptied.channel}")

    async def _unfollow(self, channel: str) -> None:
        try:
            await self.broker.unfollow(channel)
        except Unavailable as error:
            event("broker.unavailable", why=error)

    # --- presence, joins and leaves --------------------------------------------
    async def enter(self, subscription: Subscription) -> None:
        """Enter a subscription into presence if its channel keeps that; raises ``errors.Unavailable``."""
        if not subscription.present or subscription.closed:
            return
        channel, client = subscription.channel, subscription.info.client
        before = self._exits.get((channel, client))
        if before is not None:
            await asyncio.shield(before)  # else its removal would take us out again
        await self.presence.add(channel, subscription.info)
        self._ghosts.discard((channel, client))
        if subscription.closed:
            await self.presence.remove(channel, client)

    def say_join(self, subscription: Subscription) -> None:
        """Tell the channel that somebody subscribed, if it emits joins; after the reply."""
        if subscription.leaves_word:
            subscription.joined = True
            self.hub.tell(subscription.channel, "join", subscription.info)
            self.broker.announce(Joined(subscription.channel, subscription.info))

    def exit(self, subscription: Subscription) -> asyncio.Task[None]:
        """Take a subscription that was released out of presence, then say the leave; returns the task that does so."""
        key = subscription.channel, subscription.info.client
        task = self._exits[key] = self.spawn(self._exit(subscription), f"exit {subscription.channel}")
        task.add_done_callback(lambda _: self._exits.pop(key) if self._exits.get(key) is task else None)
        return task

    async def _exit(self, subscription: Subscription) -> None:
        channel, client = subscription.channel, subscription.info.client
        if subscription.present:
            try:
                await self.presence.remove(channel, client)
            except Unavailable as error:
                event("presence.unavailable", why=error)
                self._ghosts.add((channel, client))
        if subscription.joined:
            self.say_leave(subscription.channel, subscription.info)

    def say_leave(self, channel: str, info: ClientInfo) -> None:
        """Tell the channel that somebody is gone."""
        self.hub.tell(channel, "leave", info)
        self.broker.announce(Left(channel, info))

    async def _keep_presence(self) -> None:
        now = self.clock()
        try:
            if not await self.presence.renew(now):
                for feed in list(self.hub.feeds.values()):
                    for subscription in list(feed.subscriptions()):
                        if subscription.present and not subscription.closed:
                            await self.enter(subscription)
                            if subscription.joined and not subscription.closed:
                                self.say_join(subscription)  # the others were told that it left
            for channel, client in list(self._ghosts):
                await self.presence.remove(channel, client)
                self._ghosts.discard((channel, client))
            for channel, info in await self.presence.sweep(self.clock()):
                namespace = self.channels.namespace(channel)
                if namespace is not None and namespace.options.join_leave:
                    self.say_leave(channel, info)
        except Unavailable as error:
            event("presence.unavailable", why=error)

    # --- orders ---------------------------------------------------------------
    def order(self, order: wires.Order) -> None:
        """Carry out an order here and have the other processes do so, too."""
        self.obey(order)
        self.broker.order(order)

    def obey(self, order: wires.Order) -> None:
        """Carry out an order on the connections of this process."""
        for session in self.targeted(order.target):
            match order:
                case wires.DisconnectOrder(_, code, reason):
                    session.disconnect(Disconnect(code, reason), "ordered by the back-end API")
                case wires.SubscribeOrder():
                    session.subscribe_by_order(order)
                case wires.UnsubscribeOrder(_, channel):
                    session.unsubscribe_by_order(channel)
                case wires.RefreshOrder():
                    session.refresh_by_order(order)

    # --- once a second ----------------------------------------------------------
    def sweep(self, now: float) -> None:
        """The once-a-second work: due sessions, retention, leases, and the search for silent losses."""
        if now < self._swept_at - 1:
            self._rewind(self._swept_at - now)
        self._swept_at = now
        for session in self.timetable.due(now):
            session.tick(now)
        self.hub.sweep()
        tops, self._tops = self._tops, {}
        for channel, top in tops.items():
            self.broker.announce(Published(channel, top))
        if now >= self._next_tops:
            self._next_tops = now + TOPS_S
            self.check_all()
        if now >= self._next_renewal:
            self._next_renewal = now + self.settings.presence.lease / 4
            self._once("keep presence", self._keep_presence)
        self._once("sweep history", self._sweep_history)

    def _rewind(self, seconds: float) -> None:
        """The clock was set back: nothing waits until it is then again."""
        self._next_tops = self._next_renewal = 0.0
        for session in self.timetable.rewind():
            session.rewind(seconds)

    async def _sweep_history(self) -> None:
        try:
            await self.history.sweep(self.channels.retention, self.now_ms)
        except Unavailable as error:
            event("history.unavailable", why=error)

    def _once(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start ``work`` unless it is still running from an earlier sweep."""
        if name in self._busy:
            return
        self._busy.add(name)
        self.spawn(work(), name).add_done_callback(lambda _: self._busy.discard(name))


NEWEST = MAX_OFFSET
"""In place of a cursor: only the top is asked for."""
