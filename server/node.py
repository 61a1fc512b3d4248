"""One process of Waterspout: it joins history, broker, presence and the hub.

Publishing, subscribing and the once-a-second sweep are here, each a short function
around decisions made elsewhere.  What is a matter of its own has a room of its own,
which the node furnishes and everybody finds by it: ``parts`` (what is opened and closed,
and may be away), ``peers`` and ``ordering`` (the other processes, and what is asked of
connections wherever they are), ``pages`` and ``positioning`` (reads of history, and who
is behind it), ``members``, ``blocking``.  The rules kept here:

* register first, read after; look at ``closed`` again after every wait;
* history tells ``committed`` before it answers the publisher, so that a client
  sees its own publication before its reply, and also when nobody waits any more.

It reads no clock of its own: ``clock`` (Unix seconds) is handed in by run.py.
"""

import asyncio
import uuid
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Protocol

from server import __version__, facts, orders
from server.blocking import Blocking
from server.blocks import Blocks, Change
from server.broker import ANNOUNCED_BYTES, Broker, Joined, Left, Note, Published, Spent, Word
from server.channels import Channels, Namespace
from server.errors import (
    BAD_REQUEST,
    NOT_AVAILABLE,
    SHUTDOWN,
    TOO_MANY_REQUESTS,
    Disconnected,
    Refused,
    Unavailable,
    Unsubscribed,
)
from server.facts import Facts
from server.history import Appended, Draft, History
from server.hooks import Hooks
from server.hub import Feed, Hub, Step, Subscription
from server.limits import Key, Quotas, Rate, network
from server.members import Members
from server.metrics import Counts
from server.observe import event
from server.ordering import Orderable, Ordering
from server.pace import Pace
from server.pages import NEWEST, Pages, Recovery, patiently
from server.parts import Parts
from server.peers import Peers
from server.positioning import Positioning
from server.presence import Presence
from server.reload import same_terms
from server.settings import Settings
from server.stream import Page, Position, Publication, Verdict, weight_of
from server.tasks import Tasks
from server.timetable import Timetable

TOPS_S = 5.0
"""How often followed channels are compared with the tops in history; each second while the broker is silent."""

PASSING_KEY_S = 300.0
PASSING_KEYS = 100_000


Renewal = Callable[[Settings], Callable[[], None]]
"""Makes ready for other settings, or raises ``ValueError``; what it returns is called when they hold."""


class Session(Orderable, Protocol):
    """What the node asks of one client's session."""

    def __hash__(self) -> int:
        """A session is itself and nobody else."""

    def tick(self, now: float) -> None:
        """The moment that the session put into the timetable has come."""

    def rewind(self, seconds: float) -> None:
        """The clock was set back: put what is due back as well, and into the timetable anew."""


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
        blocks: Blocks,
        settings: Settings,
        clock: Callable[[], float],
        name: str = "",
    ) -> None:
        self.id = str(uuid.uuid4())
        self.name = name or self.id
        self.history = history
        self.broker = broker
        self.presence = presence
        self.blocks = blocks
        self.settings = settings
        self.clock = clock
        self.channels = Channels(settings.channel)
        self.counts = Counts()
        self.hub = Hub(
            lambda call: asyncio.get_running_loop().call_soon(call), lambda: asyncio.get_running_loop().time()
        )
        self.hooks: Hooks | None = None
        """What a user's module has to say; set before the first session."""
        self.connections = 0
        """How many clients are here, connected or about to be."""
        self.addresses: Counter[str] = Counter()
        """How many of them each host has."""
        self.command_rate = Rate.of(settings.client.command_rate_limit, settings.client.command_burst)
        """How often one client may ask for something."""
        self.publishing = Quotas(settings.client.publish_rate_limit, self._tell_spent)
        """How often one user may publish in one channel."""
        self.sessions: dict[str, Session] = {}
        self.users: defaultdict[str, dict[str, Session]] = defaultdict(dict)
        self.blocking = Blocking(blocks, lambda user: self.users.get(user, {}).values(), clock)
        self.streams: dict[str, Callable[[bytes], None]] = {}
        """What takes the commands of each emulated session here, by its secret id (PROTOCOL 2.5)."""
        self.timetable: Timetable[Session] = Timetable()
        self.patience_s = settings.mongo.publish_timeout if settings.mongo.url else settings.sqlite.publish_timeout
        self.tasks = Tasks()
        self.parts = Parts(
            history,
            broker,
            presence,
            self.blocking,
            openings={
                "history": history.open,
                "broker": self._open_broker,
                "presence": lambda: presence.open(self.clock()),
                "blocks": self.blocking.open,
            },
            tasks=self.tasks,
            returned=self._returned,
        )
        self.peers = Peers(
            broker,
            self.id,
            carry_out=lambda body, asked_at: self.ordering.answer(body, asked_at),
            clock=lambda: asyncio.get_running_loop().time(),
            later=lambda delay_s, call: asyncio.get_running_loop().call_later(delay_s, call),
            lease_s=settings.presence.lease,
        )
        """The other processes."""
        self.ordering = Ordering(
            self.peers,
            self.users,
            self.hub,
            self.blocking,
            self.streams,
            broker_trouble=lambda: self.parts.troubled.get("broker", ""),
            forget=self._forget,
        )
        self.pages = Pages(
            history,
            self.hub,
            self.tasks,
            self.counts,
            lambda: self.now_ms,
            patience_s=self.patience_s,
            at_once=settings.client.concurrent_recovery_limit,
            per_second=settings.client.recovery_rate_limit,
        )
        self.pace = Pace()
        self.positioning = Positioning(self.hub, self.pages, self.pace, self.tasks, self.counts, lambda: self.now_ms)
        self.members = Members(
            presence, broker, self.hub, self.channels, self.tasks, clock, self.positioning.check_all, self.counts
        )
        self._tops: dict[str, Position] = {}
        self.leaving = False
        """Takes no further client; see ``Leaving``."""
        self.renewals: list[Renewal] = []
        """Whoever has made something of the settings, to be asked when they change."""
        self._follow_failed = False
        self._swept_at = 0.0
        self._passing_keys: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._next_tops = self._next_renewal = 0.0
        self.started_at = 0.0

    def __repr__(self) -> str:
        return f"<Node {self.name} sessions={len(self.sessions)} feeds={len(self.hub.feeds)}>"

    # --- life -----------------------------------------------------------------
    async def open(self, *, patiently: bool = False) -> None:
        """Open the seams; raises ``errors.Unavailable`` if one of them cannot be.

        ``patiently`` goes on without, says so in the log, and tries again until
        all are open: parts that are elsewhere may come later than we.
        """
        self.started_at = self.clock()
        self.history.on_commit = self.committed
        self.history.on_batch = self.counts.batch
        self.broker.on_word = self.heard
        self.broker.on_taken = self.counts.broker_seconds.observe
        self.broker.on_return = self._returned
        self.broker.on_note = self._noted
        await self.parts.open(patiently=patiently)

    async def _open_broker(self) -> None:
        await self.broker.open(self.id)
        self._say_hello()

    def _returned(self) -> None:
        """The broker is back: others may have come and gone, and anything may have been said."""
        self._say_hello()
        self.blocking.read_all()
        self.positioning.check_all()

    async def close(self) -> None:
        """Finish what is under way and close the seams; sessions have been ended before."""
        self.parts.give_up()
        await self.tasks.finish(self.patience_s)
        self.peers.close()
        await self.parts.close()

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run ``work`` beside us; the node owns the task and logs what it raises."""
        return self.tasks.spawn(work, name)

    @property
    def now_ms(self) -> int:
        """The clock in Unix milliseconds."""
        return int(self.clock() * 1000)

    @property
    def facts(self) -> Facts:
        """What this process is and holds (PROTOCOL 15.2, info)."""
        feeds = self.hub.feeds.values()
        return Facts(
            self.id,
            self.name,
            __version__,
            len(self.sessions),
            len(self.users),
            len(feeds),
            sum(feed.size + len(feed.catching) for feed in feeds),
            int(self.clock() - self.started_at),
        )

    def everybody(self) -> list[Facts]:
        """This process and all others that are alive, as they last said."""
        return [self.facts, *facts.read(self.peers.all.values())]

    def _say_hello(self) -> None:
        self.peers.tick(facts.encode(self.facts))

    # --- settings -------------------------------------------------------------
    def renew(self, settings: Settings) -> None:
        """From now on these settings hold; which of them may differ is for ``reload.renewed`` to say (PROTOCOL 9.5).

        Raises ``ValueError`` for what somebody can make nothing of, and has then changed nothing.
        """
        commits = [renewal(settings) for renewal in self.renewals]
        former, self.settings = self.settings.client, settings
        client = settings.client
        self.channels.renew(settings.channel)
        self.command_rate = Rate.of(client.command_rate_limit, client.command_burst)
        if client.publish_rate_limit != former.publish_rate_limit:
            self.publishing = Quotas(client.publish_rate_limit, self._tell_spent)
        self.pages.renew(client.recovery_rate_limit)
        for commit in commits:
            commit()
        for feed in list(self.hub.feeds.values()):
            self._renew_feed(feed)

    def _renew_feed(self, feed: Feed) -> None:
        """Give a channel its namespace as it is now, or end its subscriptions if they were made on other terms."""
        namespace = self.channels.namespace(feed.channel)
        if namespace is feed.namespace:
            return
        same = namespace is not None and same_terms(feed.namespace.options, namespace.options)
        for subscription in list(feed.subscriptions()):
            if same and namespace is not None:
                subscription.namespace = namespace
            else:
                subscription.session.invalidate(subscription)
        if same and namespace is not None:
            feed.namespace = namespace

    # --- sessions -------------------------------------------------------------
    def arrive(self, address: str) -> None:
        """A client is here, connected or about to be."""
        self.connections += 1
        self.addresses[network(address)] += 1

    def depart(self, address: str) -> None:
        """A client that has arrived is gone."""
        self.connections -= 1
        host = network(address)
        self.addresses[host] -= 1
        if not self.addresses[host]:
            del self.addresses[host]

    def admit(self, session: Session) -> None:
        """Enter a session that has connected.

        Raises ``errors.Disconnected`` if its user is blocked, or if clients are being sent away.
        """
        if self.leaving:
            raise Disconnected(SHUTDOWN, "it connected while clients are sent away")
        self.blocking.check_user(session.user)
        self.sessions[session.client] = session
        self.users[session.user][session.client] = session
        self.ordering.enter(session.client)

    def dismiss(self, session: Session) -> None:
        """Forget a session; it need not have been admitted."""
        if self.sessions.pop(session.client, None) is None:
            return
        mine = self.users[session.user]
        mine.pop(session.client, None)
        self.ordering.dismiss(session.client)
        if not mine:
            del self.users[session.user]

    # --- publishing -----------------------------------------------------------
    async def publish(self, channel: str, namespace: Namespace, draft: Draft, patience_s: float = 0) -> Appended:
        """Publish ``draft`` and return its position (``Position(0, "")`` if it is passing).

        Raises ``errors.Unavailable`` when the outcome is unknown, at the latest
        after ``patience_s`` (default: the configured publish timeout), and
        ``errors.Refused`` when the channel's queue is full, or for a version
        where nothing is kept that it could be compared with.
        """
        if len(draft.key) > 256:
            raise Refused(BAD_REQUEST, "an idempotency key is longer than 256 characters")
        self.check_size(draft)
        if namespace.retention is None or draft.skip_history:
            if draft.version.number:
                raise Refused(NOT_AVAILABLE, "a version needs history, which this publication skips")
            if draft.key and self.repeated(channel, draft.key):
                return Appended(Position(), repeated=True)
            self.publish_passing(channel, Publication(draft.data, info=draft.info, tags=draft.tags))
            return Appended(Position())
        self.pace.committing()
        try:
            return await patiently(
                self.history.append(channel, draft, namespace.retention, self.now_ms), patience_s or self.patience_s
            )
        finally:
            self.pace.committed()

    def check_rate(self, whose: str, channel: str, now: float) -> None:
        """Raises ``Refused(TOO_MANY_REQUESTS)`` for who publishes too often in this channel (PROTOCOL 18)."""
        if not self.publishing.take((whose, channel), now):
            limit = self.settings.client.publish_rate_limit
            raise Refused(TOO_MANY_REQUESTS, f"look at client.publish_rate_limit ({limit})")

    def _tell_spent(self, key: Key, count: int) -> None:
        if self.peers.all:
            self.broker.tell(Spent(self.id, *key, count))

    def _noted(self, note: Note) -> None:
        """Another process has said something of itself or to us."""
        match note:
            case Spent(_, whose, channel, count):
                self.publishing.heard((whose, channel), count, self.clock())
            case _:
                self.peers.heard(note)

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
        self.counts.passing += 1
        self.hub.hear(channel, "", publication)
        if not self.broker.alone:
            self.broker.announce(Published(channel, Position(), (publication,)))

    def repeated(self, channel: str, key: str) -> bool:
        """Has this key been used in a passing channel in the last minutes?  It counts as used from now on."""
        now = self.clock()
        keys = self._passing_keys
        until = keys.pop((channel, key), 0.0)
        while len(keys) >= PASSING_KEYS:
            keys.popitem(last=False)  # in a plain dict the first one is behind all that were deleted before it
        keys[channel, key] = until if until > now else now + PASSING_KEY_S
        return until > now

    def committed(self, channel: str, epoch: str, publications: Sequence[Publication]) -> None:
        """History has made these durable: deliver them here, then tell the others."""
        self._deliver(channel, epoch, publications)
        counts = self.counts
        counts.kept += len(publications)
        counts.commit_publications.observe(len(publications))
        counts.own_age_seconds.observe(max(0.0, self.clock() - publications[0].time_ms / 1000))
        top = Position(publications[-1].offset, epoch)
        self._tops[channel] = top
        light = [publication for publication in publications if publication.weight <= ANNOUNCED_BYTES]
        self.broker.announce(Published(channel, top, light))

    def _deliver(self, channel: str, epoch: str, publications: Iterable[Publication]) -> None:
        for publication in publications:
            verdict = self.hub.hear(channel, epoch, publication)
            if verdict is Verdict.HOLE or verdict is Verdict.FOREIGN:
                self.counts.holes += 1
                self.positioning.mend(channel, patiently=verdict is Verdict.HOLE)

    def heard(self, word: Word) -> None:
        """Another process has said something; it may be late, repeated or out of order."""
        match word:
            case Published(channel, top, publications):
                newest = publications[-1] if publications else None
                if top.offset:
                    time_ms = newest.time_ms if newest is not None and newest.offset == top.offset else 0
                    self.history.heard(channel, top, time_ms)
                self._deliver(channel, top.epoch, publications)
                self._note_heard(publications)
                if top.offset and not (newest is not None and newest.offset == top.offset):
                    self.positioning.compare(channel, top)
            case Joined(channel, info):
                self.members.tell(channel, "join", info)
            case Left(channel, info):
                self.members.tell(channel, "leave", info)

    def _note_heard(self, publications: Sequence[Publication]) -> None:
        if publications:
            self.counts.heard += len(publications)
            if publications[0].time_ms:
                self.counts.others_age_seconds.observe(max(0.0, self.clock() - publications[0].time_ms / 1000))

    # --- taking back ------------------------------------------------------------
    async def remove(self, channel: str) -> None:
        """Forget the payloads of a kept channel; offsets go on (PROTOCOL 11.1).  Raises ``errors.Unavailable``."""
        await self.history.remove(channel)
        await self._forget_everywhere(channel)

    async def redact(self, channel: str, offset: int) -> None:
        """Erase the payload of one publication; its offset stays (PROTOCOL 15.2).

        Raises ``errors.Refused`` if it is not there, and ``errors.Unavailable``.
        """
        await self.history.redact(channel, offset)
        await self._forget_everywhere(channel)

    async def _forget_everywhere(self, channel: str) -> None:
        """History has lost payloads on purpose: no process may hand them out from its memory."""
        self._forget(channel)
        await self.ordering.ask(orders.Forget(channel))

    def _forget(self, channel: str) -> None:
        feed = self.hub.feeds.get(channel)
        if feed is not None:
            feed.erasures += 1
            feed.forget_tail()
            if feed.ahead:
                feed.forget_ahead()
                self.positioning.mend(channel, patiently=False)

    async def block(self, user: str, change: Change) -> None:
        """Change what ``user`` may not, here and everywhere else (PROTOCOL 10.5).

        Raises ``errors.Unavailable``: the store's outcome is unknown, or it is done and
        not all other processes have said so; then they find out by themselves.
        """
        record = await patiently(self.blocks.change(user, change, self.now_ms), self.patience_s, "the store of blocks")
        self.blocking.take(record)
        await self.ordering.ask(orders.Blocked(record))

    # --- subscribing ----------------------------------------------------------
    async def subscribe(self, subscription: Subscription, recovery: Recovery | None) -> Page | None:
        """Register a subscription and read what it needs for its reply: what it recovers, or without that the top.

        If the newest is to be recovered the page ends with the newest publication that is kept;
        for a subscription with a filter it has those before it as well (PROTOCOL 11.6).
        Returns ``None`` for a passing channel and for no other.  Afterwards either ``settle`` in
        the same loop turn as the reply, or ``release``.  Raises ``errors.Unavailable``, having released it
        (``errors.Overdue`` if its turn does not come in time), and ``errors.Unsubscribed`` if it was closed meanwhile.
        """
        if subscription.namespace is not self.channels.namespace(subscription.channel):
            raise Unavailable("the options of its namespace have changed while it was about to subscribe")
        feed = self.hub.join(subscription)
        if feed.followed and not subscription.namespace.kept:
            return None  # as below, but without a timer for a wait that there is none of: 6 µs of a connection's 330
        try:
            async with asyncio.timeout(self.patience_s):
                page = await self._first_page(subscription, feed, recovery)
            if subscription.closed:
                raise Unsubscribed
            return page
        except TimeoutError:
            self.release(subscription)
            raise Unavailable(f"a subscription was not in force within {self.patience_s:g} s") from None
        except BaseException:
            self.release(subscription)
            raise

    async def _first_page(self, subscription: Subscription, feed: Feed, recovery: Recovery | None) -> Page | None:
        kept = subscription.namespace.kept
        if kept and recovery is not None:
            await self.pages.turn(subscription, recovery)
            if subscription.closed:
                raise Unsubscribed
        await self._follow(feed)
        return await self._page(subscription, feed, recovery) if kept else None

    async def _page(self, subscription: Subscription, feed: Feed, recovery: Recovery | None) -> Page:
        if recovery is None:
            return await self.pages.after(feed, NEWEST)
        if recovery.newest:
            return await self.pages.newest(feed, filtered=subscription.manner.filter is not None)
        since = recovery.since
        while True:
            page = self.hub.recall(feed, since, self.now_ms) or await self.pages.after(feed, since.offset)
            erasures = feed.erasures
            await self.pace.sending(len(page.publications))
            if feed.erasures == erasures:
                return page

    async def enter(self, subscription: Subscription, page: Page | None, recovery: Recovery | None) -> Page | None:
        """Enter a subscription into presence, behind ``subscribe``, which gave ``page``.

        Gives the page for its reply: another one if something was erased meanwhile.
        Raises ``errors.Unavailable``.
        """
        feed = subscription.feed
        assert feed is not None, f"{subscription!r} has no feed"
        erasures = feed.erasures
        await self.members.enter(subscription)
        if page is None or subscription.closed or feed.erasures == erasures:
            return page
        return await patiently(self._page(subscription, feed, recovery), self.patience_s)

    async def _follow(self, feed: Feed) -> None:
        """Wait until what others say here is heard, or until the broker says that it cannot be now.

        Without it nobody is refused: the broker keeps the wish, and until it is
        fulfilled the sweep looks for what was missed.
        """
        if feed.following is None:
            feed.following = self.spawn(self._follow_broker(feed.channel), f"follow {feed.channel}")
        await asyncio.shield(feed.following)

    async def _follow_broker(self, channel: str) -> None:
        try:
            await self.broker.follow(channel)
            self._follow_failed = False
        except Unavailable as error:
            if not self._follow_failed:  # once, however many subscribe meanwhile
                event("broker.unavailable", why=error)
            self._follow_failed = True

    def settle(self, subscription: Subscription, top: Position | None) -> None:
        """Let a subscription that has been replied to go live, or catch up until it can.

        ``top`` is where history stood when its page was read; ``None`` for a
        passing channel.
        """
        self.hub.begin(subscription)
        cursor = subscription.cursor
        if cursor is not None and top is not None and cursor.offset < top.offset:
            self.positioning.start_catching_up(subscription)
            return
        step = self.hub.go_live(subscription)
        if step is not Step.LIVE:
            self.positioning.start_catching_up(subscription, step)

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

    # --- once a second ----------------------------------------------------------
    def sweep(self, now: float) -> None:
        """The once-a-second work: due sessions, retention, leases, and the search for silent losses."""
        if now < self._swept_at - 1:
            self._rewind(self._swept_at - now)
        self._swept_at = now
        for session in self.timetable.due(now):
            try:
                session.tick(now)
            except Exception as fault:  # the others' time has come as well
                event("sweep.failed", fault=fault)
        self.ordering.sweep()
        self.publishing.forget(now)
        self.hub.sweep()
        tops, self._tops = self._tops, {}
        for channel, top in tops.items():
            self.broker.announce(Published(channel, top))
        self._say_hello()
        if now >= self._next_tops or self.broker.trouble:
            self._next_tops = now + TOPS_S
            self.positioning.check_all()
        if now >= self._next_renewal:
            self._next_renewal = now + self.settings.presence.lease / 4
            self.tasks.once("renew presence", self.members.renew)
        self.tasks.once("sweep presence", self.members.sweep)
        self.tasks.once("sweep history", self._sweep_history)
        if self.parts.is_open("blocks") and self.blocking.due(asyncio.get_running_loop().time()):
            self.tasks.once("read blocks", self.blocking.read)

    def _rewind(self, seconds: float) -> None:
        """The clock was set back: nothing waits until it is then again."""
        self._next_tops = self._next_renewal = 0.0
        self.publishing.rewind(seconds)
        for session in self.timetable.rewind():
            session.rewind(seconds)

    async def _sweep_history(self) -> None:
        try:
            await self.history.sweep(self.channels.retention, self.now_ms)
        except Unavailable as error:
            event("history.unavailable", why=error)
