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
import math
import uuid
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Any, Protocol
from weakref import WeakValueDictionary

import msgspec

from server import __version__, orders
from server.blocking import Blocking
from server.blocks import Blocks, Change
from server.broker import ANNOUNCED_BYTES, Broker, Joined, Left, Note, Published, Spent, Word
from server.channels import Channels, Namespace
from server.errors import (
    BAD_REQUEST,
    NOT_AVAILABLE,
    SERVER_ERROR,
    SHUTDOWN,
    TOO_MANY_REQUESTS,
    Disconnect,
    Disconnected,
    Refused,
    Unavailable,
)
from server.globs import matcher
from server.history import Appended, Draft, History
from server.hooks import Hooks
from server.hub import Feed, Hub, Step, Subscription
from server.limits import Key, Quotas, Rate, network
from server.members import Members
from server.metrics import Counts
from server.observe import event
from server.outbox import Outbox
from server.pages import NEWEST, Pages, patiently
from server.peers import OWED_S, Peers
from server.presence import Presence
from server.reload import same_terms
from server.settings import Settings
from server.stream import (
    Page,
    Position,
    Publication,
    Verdict,
    catch_up,
    weight_of,
)
from server.tasks import Tasks
from server.timetable import Timetable

HOLE_PATIENCE_S = 0.03
"""How long a hole may fill itself before history is asked: words overtake one another by milliseconds."""

RETRY_S = 1.0
"""How long after history failed a repair or a catching-up subscription asks again."""

TOPS_S = 5.0
"""How often followed channels are compared with the tops in history; each second while the broker is silent."""

OPEN_AGAIN_S = 2.0
"""How long after a part could not be opened it is tried again."""

ORDER_PATIENCE_S = 2.0
"""How long the answers of other processes are waited for; an SDK waits 5 s for all of its command."""

PASSING_KEY_S = 300.0
PASSING_KEYS = 100_000


Renewal = Callable[[Settings], Callable[[], None]]
"""Makes ready for other settings, or raises ``ValueError``; what it returns is called when they hold."""


class Session(Protocol):
    """What the node asks of one client's session."""

    client: str
    user: str
    secret: str
    """The session id by which a back end or an emulated client means just this connection; ``""`` on a WebSocket."""

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

    def subscribe_by_order(self, order: orders.SubscribeOrder) -> None:
        """Subscribe server-side."""

    def refresh_by_order(self, order: orders.RefreshOrder) -> None:
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
        self._newcomers: dict[str, float] = {}
        """When, by the loop's clock, those connected who did so in the last minutes; the oldest first."""
        self.streams: dict[str, Callable[[bytes], None]] = {}
        """What takes the commands of each emulated session here, by its secret id (PROTOCOL 2.5)."""
        self.timetable: Timetable[Session] = Timetable()
        self.patience_s = settings.mongo.publish_timeout if settings.mongo.url else settings.sqlite.publish_timeout
        self.peers: Peers
        """The other processes; there from ``open`` on."""
        self.tasks = Tasks()
        self.pages = Pages(
            history,
            self.hub,
            self.tasks,
            self.counts,
            lambda: self.now_ms,
            patience_s=self.patience_s,
            at_once=settings.client.concurrent_recovery_limit,
        )
        self.members = Members(
            presence, broker, self.hub, self.channels, self.tasks, clock, self.check_all, self.counts
        )
        self._turns: WeakValueDictionary[Outbox, asyncio.Lock] = WeakValueDictionary()
        self._tops: dict[str, Position] = {}
        self.leaving = False
        """Takes no further client; see ``Leaving``."""
        self.renewals: list[Renewal] = []
        """Whoever has made something of the settings, to be asked when they change."""
        self.troubles: dict[str, str] = {}
        self._closed: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {}
        self._opening: asyncio.Task[None] | None = None
        self._unchecked = self._follow_failed = False
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
        loop = asyncio.get_running_loop()
        self.peers = Peers(
            self.broker,
            self.id,
            carry_out=self._answer,
            clock=loop.time,
            later=loop.call_later,
            lease_s=self.settings.presence.lease,
        )
        self.broker.on_note = self._noted
        self._closed = {
            "history": self.history.open,
            "broker": lambda: self.broker.open(self.id),
            "presence": lambda: self.presence.open(self.clock()),
            "blocks": self.blocking.open,
        }
        faults = await self._open_closed()
        if faults and not patiently:
            for name in {"history", "broker", "presence", "blocks"} - self._closed.keys():
                await getattr(self, name).close()
            raise faults[0]
        if faults:
            self._opening = self.spawn(self._open_later(), "open what is not open yet")

    async def _open_closed(self) -> list[Unavailable]:
        """Try to open what is not open, all at once; returns what was in the way."""
        names = list(self._closed)
        faults = []
        for name, fault in zip(names, await asyncio.gather(*map(self._open_one, names)), strict=True):
            if fault is None:
                del self._closed[name]
                self.troubles.pop(name, None)
                continue
            faults.append(fault)
            self.troubles[name] = str(fault)
        return faults

    async def _open_one(self, name: str) -> Unavailable | None:
        try:
            await self._closed[name]()
        except Unavailable as fault:
            return fault
        if name == "broker":
            self.peers.tick(self._facts())
        return None

    async def _open_later(self) -> None:
        while self._closed:
            for name, why in self.troubles.items():
                event(f"{name}.unavailable", why=why)
            await asyncio.sleep(OPEN_AGAIN_S)
            try:
                await self._open_closed()
            except Exception as fault:  # else one fault of ours would keep this process away for good
                event("task.failed", task="open what is not open yet", fault=fault)
        self._returned()

    @property
    def troubled(self) -> dict[str, str]:
        """What keeps this process from serving in full: the part and why, in operator's words; empty if nothing."""
        troubles = dict(self.troubles)
        if self.history.trouble:
            troubles.setdefault("history", self.history.trouble)
        if away := self.broker.trouble or self.broker.mute:
            troubles.setdefault("broker", away)
        if self.blocking.trouble:
            troubles.setdefault("blocks", self.blocking.trouble)
        return troubles

    async def close(self) -> None:
        """Finish what is under way and close the seams; sessions have been ended before."""
        if self._opening is not None:
            self._opening.cancel()
        await self.tasks.finish(self.patience_s)
        self.peers.close()
        await self.broker.close()
        await self.presence.close()
        await self.blocks.close()
        await self.history.close()

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run ``work`` beside us; the node owns the task and logs what it raises."""
        return self.tasks.spawn(work, name)

    @property
    def now_ms(self) -> int:
        """The clock in Unix milliseconds."""
        return int(self.clock() * 1000)

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
        self._newcomers[session.client] = asyncio.get_running_loop().time()

    def dismiss(self, session: Session) -> None:
        """Forget a session; it need not have been admitted."""
        if self.sessions.pop(session.client, None) is None:
            return
        mine = self.users[session.user]
        mine.pop(session.client, None)
        self._newcomers.pop(session.client, None)
        if not mine:
            del self.users[session.user]

    def targeted(self, target: orders.Target) -> list[Session]:
        """The connections here that an order is for (PROTOCOL 15.2)."""
        return [
            session
            for client, session in self.users.get(target.user, {}).items()
            if (not target.client or client == target.client)
            and (not target.session or session.secret == target.session)
            and client not in target.spared
        ]

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
        return await patiently(
            self.history.append(channel, draft, namespace.retention, self.now_ms), patience_s or self.patience_s
        )

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
                self._mend(channel, patiently=verdict is Verdict.HOLE)

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
                    self._compare(channel, top)
            case Joined(channel, info):
                self.members.tell(channel, "join", info)
            case Left(channel, info):
                self.members.tell(channel, "leave", info)

    def _note_heard(self, publications: Sequence[Publication]) -> None:
        if publications:
            self.counts.heard += len(publications)
            if publications[0].time_ms:
                self.counts.others_age_seconds.observe(max(0.0, self.clock() - publications[0].time_ms / 1000))

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
        await self.ask(orders.Forget(channel))

    def _forget(self, channel: str) -> None:
        feed = self.hub.feeds.get(channel)
        if feed is not None:
            feed.erasures += 1
            feed.forget_tail()
            if feed.ahead:
                feed.forget_ahead()
                self._mend(channel, patiently=False)

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
            if cursor is None or self.hub.feeds.get(feed.channel) is not feed:
                return False
            since = cursor.position
            try:
                page = await self.pages.mending(feed, since.offset)
                break
            except Unavailable as error:
                self.counts.failed_repairs += 1
                event("channel.repair_failed", channel=feed.channel, why=error)
                await asyncio.sleep(RETRY_S)
        if self.hub.feeds.get(feed.channel) is not feed:
            return False
        self.counts.repairs += 1
        event("channel.repaired", channel=feed.channel, offset=since.offset, top=page.top.offset)
        for subscription in self.hub.mend(feed, since, page):
            if subscription.cursor is None:
                subscription.session.lose(subscription)
            else:
                self._start_catching_up(subscription)
        return True

    def _returned(self) -> None:
        """The broker is back: others may have come and gone, and anything may have been said."""
        self.peers.tick(self._facts())
        self.blocking.read_all()
        self.check_all()

    def check_all(self) -> None:
        """Anything may have been missed: compare every followed kept channel with history now."""
        self._unchecked = True
        self.tasks.once("compare tops", self._check_tops)

    async def _check_tops(self) -> None:
        while self._unchecked:  # a check that had begun before has not seen what was missed since
            self._unchecked = False
            await self._check_tops_once()

    async def _check_tops_once(self) -> None:
        followed = [channel for channel, feed in self.hub.feeds.items() if feed.namespace.kept and feed.cursor]
        if not followed:
            return
        try:
            tops = await self.pages.tops(followed)
        except Unavailable as error:
            event("history.unavailable", why=error)
            return
        for channel in followed:
            self._compare(channel, tops.get(channel, Position()))

    # --- subscribing ----------------------------------------------------------
    async def subscribe(
        self, subscription: Subscription, since: Position | None, *, newest: bool = False
    ) -> Page | None:
        """Register a subscription and read what it needs for its reply: a page after ``since``, or the top.

        With ``newest`` the page ends with the newest publication that is kept; for a
        subscription with a filter it has those before it as well (PROTOCOL 11.6).
        Returns ``None`` for a passing channel.  Afterwards either ``settle`` in
        the same loop turn as the reply, or ``release``.  Raises
        ``errors.Unavailable``, having released it.
        """
        if subscription.namespace is not self.channels.namespace(subscription.channel):
            raise Unavailable("the options of its namespace have changed while it was about to subscribe")
        feed = self.hub.join(subscription)
        try:
            async with asyncio.timeout(self.patience_s):
                await self._follow(feed)
                if not subscription.namespace.kept:
                    return None
                if since is None:
                    return await self.pages.after(feed, NEWEST)
                if newest:
                    return await self.pages.newest(feed, filtered=subscription.manner.filter is not None)
                return self.hub.recall(feed, since, self.now_ms) or await self.pages.after(feed, since.offset)
        except TimeoutError:
            self.release(subscription)
            raise Unavailable(f"a subscription was not in force within {self.patience_s:g} s") from None
        except BaseException:
            self.release(subscription)
            raise

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
        while step not in (Step.LIVE, Step.ENDED):
            try:
                if step is Step.REPAIR:
                    step = await self._wait_for_repair(subscription)
                else:
                    async with turn:
                        await subscription.outbox.drained()
                        await asyncio.sleep(0)  # a page from memory waits for nothing: others have their turn first
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
        page = self.hub.recall(feed, since, self.now_ms) or await self.pages.after(feed, since.offset)
        if subscription.closed:
            return Step.LIVE
        caught = catch_up(since, page)
        if not caught.recovered:
            subscription.session.lose(subscription)
            return Step.LIVE
        if not self.hub.send(subscription, caught.publications, page.top.epoch):
            return Step.ENDED
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

    # --- orders ---------------------------------------------------------------
    async def order(self, order: orders.Order) -> None:
        """Carry out an order here and everywhere else.

        Raises ``errors.Unavailable`` if a process that is alive has not answered
        in time, or if none can be asked; they are asked again for a minute.
        """
        self.obey(order)
        await self.ask(order)

    def order_soon(self, order: orders.Order) -> None:
        """As ``order``, by somebody who does not wait for the others."""
        self.obey(order)
        self.peers.ask(orders.encode(order))

    async def ask(self, question: orders.Question, to: str = "") -> dict[str, bytes]:
        """Ask the node ``to``, or all others; returns the answers by node id, raises as ``order``.

        What is neither an order nor news to keep is of no use later, and not asked again then.
        """
        asked = self.peers.ask(orders.encode(question), to)
        try:
            silent = await asked.answered(ORDER_PATIENCE_S, self.peers.silent)
        finally:
            if not isinstance(question, orders.Order | orders.Forget | orders.Blocked):
                self.peers.give_up(asked)
        why = self.troubled.get("broker")
        if why and (silent or not asked.answers):  # who fell silent may be alive, and so may who is not known
            raise Unavailable(f"other processes cannot be asked: {why}")
        if not all(map(self.peers.silent, silent)) or (to and silent):
            raise Unavailable(f"{len(silent)} other processes have not answered within {ORDER_PATIENCE_S:g} s")
        return asked.answers

    def _answer(self, body: bytes, asked_at: float) -> bytes:
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
                    return _encode([session.client for session in self.targeted(target)])
                case orders.Forget(channel):
                    self._forget(channel)
                    return b""
                case orders.Blocked(record):
                    self.blocking.take(record)
                    return b""
                case orders.Emulated(session, data):
                    return self.hand_over(session, data)
                case _:
                    self.obey(question, asked_at)
                    return b""
        except Exception as fault:
            event("task.failed", task=f"answer {type(question).__name__}", fault=fault)
        return b""

    def hand_over(self, session: str, data: bytes) -> bytes:
        """Give commands to the emulated session that holds its stream here, if there is one (PROTOCOL 2.5)."""
        take = self.streams.get(session)
        if take is not None:
            take(data)
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

    async def block(self, user: str, change: Change) -> None:
        """Change what ``user`` may not, here and everywhere else (PROTOCOL 10.5).

        Raises ``errors.Unavailable``: the store's outcome is unknown, or it is done and
        not all other processes have said so; then they find out by themselves.
        """
        record = await patiently(self.blocks.change(user, change, self.now_ms), self.patience_s, "the store of blocks")
        self.blocking.take(record)
        await self.ask(orders.Blocked(record))

    def followed(self, pattern: str = "") -> dict[str, int]:
        """How many are subscribed here, by channel, of those whose names match ``pattern`` (PROTOCOL 15.2).

        Raises ``ValueError`` for what is no pattern.
        """
        matches = matcher(pattern)
        return {channel: feed.size + len(feed.catching) for channel, feed in self.hub.feeds.items() if matches(channel)}

    def _facts(self) -> bytes:
        """What this process says of itself."""
        return _encode(self.facts)

    @property
    def facts(self) -> "Facts":
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

    def everybody(self) -> "list[Facts]":
        """This process and all others that are alive, as they last said."""
        found = [self.facts]
        for peer in self.peers.all.values():
            with suppress(msgspec.DecodeError):  # of another version; it is there all the same
                found.append(msgspec.msgpack.decode(peer.facts, type=Facts))
        return found

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
        self._forget_newcomers()
        self.publishing.forget(now)
        self.hub.sweep()
        tops, self._tops = self._tops, {}
        for channel, top in tops.items():
            self.broker.announce(Published(channel, top))
        self.peers.tick(self._facts())
        if now >= self._next_tops or self.broker.trouble:
            self._next_tops = now + TOPS_S
            self.check_all()
        if now >= self._next_renewal:
            self._next_renewal = now + self.settings.presence.lease / 4
            self.tasks.once("renew presence", self.members.renew)
        self.tasks.once("sweep presence", self.members.sweep)
        self.tasks.once("sweep history", self._sweep_history)
        if "blocks" not in self._closed and self.blocking.due(asyncio.get_running_loop().time()):
            self.tasks.once("read blocks", self.blocking.read)

    def _forget_newcomers(self) -> None:
        """Who has been here for longer than orders are repeated is meant by any of them."""
        oldest = asyncio.get_running_loop().time() - 2 * OWED_S
        for client in [client for client, _ in takewhile(lambda came: came[1] < oldest, self._newcomers.items())]:
            del self._newcomers[client]

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


_encode = msgspec.msgpack.Encoder().encode


class Facts(msgspec.Struct):
    """One process, as it says itself (PROTOCOL 15.2, info); ``uptime`` in seconds."""

    uid: str
    name: str
    version: str
    num_clients: int
    num_users: int
    num_channels: int
    num_subs: int
    uptime: int
