"""Who of this process is in presence, and who is told of joins and leaves; PROTOCOL 14.

The rules:

* Whoever should be in presence and could not be entered, and whoever should not
  be and could not be taken out, is made up for when presence can be reached; a
  subscription never waits for that.
* What concerns one client in one channel is done in turn, so that leaving and coming
  back happen in that order, and are told so.
* A leave is told by whoever took the entry out: this process, or a survivor that
  swept it away because our lease had run out.
"""

import asyncio
from collections.abc import Callable
from itertools import islice
from typing import Literal
from weakref import WeakValueDictionary

from server.broker import Broker, Joined, Left
from server.channels import Channels
from server.errors import Unavailable
from server.hub import Hub, Subscription
from server.metrics import Counts
from server.observe import event
from server.presence import Presence
from server.stream import ClientInfo
from server.tasks import Tasks

AT_ONCE = 100
"""How many entries are made up for at a time."""


class Members:
    """See the module's docstring.

    Call ``renew`` several times a lease, and ``sweep`` once a second.  ``lapsed``
    is called when the lease turns out to have run out: this process was paused or
    cut off, and may have missed anything.
    """

    def __init__(
        self,
        presence: Presence,
        broker: Broker,
        hub: Hub,
        channels: Channels,
        tasks: Tasks,
        clock: Callable[[], float],
        lapsed: Callable[[], None],
        counts: Counts,
    ) -> None:
        self._presence = presence
        self._broker = broker
        self._hub = hub
        self._channels = channels
        self._tasks = tasks
        self._clock = clock
        self._lapsed = lapsed
        self._counts = counts
        self._exits: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        self._ghosts: set[tuple[str, str]] = set()
        self._absent: set[Subscription] = set()
        self._unsaid: set[Subscription] = set()
        """Whose leave has been told by a survivor though they are here, so that their join is to be said again."""
        self._away = False

    def __repr__(self) -> str:
        return f"<Members absent={len(self._absent)} ghosts={len(self._ghosts)}>"

    def _complain(self, error: Unavailable) -> None:
        """Say that presence is away: once, however many come and go meanwhile."""
        if not self._away:
            self._away = True
            event("presence.unavailable", why=error)

    async def enter(self, subscription: Subscription) -> None:
        """Enter a subscription into presence if its channel keeps that; if that cannot be now, it is tried again."""
        if not subscription.present or subscription.closed:
            return
        before = self._exits.get((subscription.channel, subscription.info.client))
        if before is not None:
            await asyncio.shield(before)  # else its removal would take us out again
            if subscription.closed:
                return
        self._absent.add(subscription)
        try:
            await self._add(subscription)
        except Unavailable as error:
            self._complain(error)

    async def _add(self, subscription: Subscription) -> None:
        channel, client = subscription.channel, subscription.info.client
        async with self._turn(channel, client):
            if not subscription.closed:  # if it is closed meanwhile its exit is next, and takes it out
                await self._presence.add(channel, subscription.info)
                self._ghosts.discard((channel, client))
        self._absent.discard(subscription)

    async def _remove(self, channel: str, client: str) -> bool:
        """Take a client out of presence, if need be later; false if somebody else has, and says the leave."""
        async with self._turn(channel, client):
            try:
                return await self._presence.remove(channel, client)
            except Unavailable as error:
                self._complain(error)
                self._ghosts.add((channel, client))
                return True

    async def _lay(self, ghost: tuple[str, str]) -> None:
        """Take out who could not be taken out when it left, unless it has come back; raises ``errors.Unavailable``."""
        async with self._turn(*ghost):
            if ghost in self._ghosts:
                await self._presence.remove(*ghost)
                self._ghosts.discard(ghost)

    def _turn(self, channel: str, client: str) -> asyncio.Lock:
        return self._turns.setdefault((channel, client), asyncio.Lock())

    def exit(self, subscription: Subscription) -> asyncio.Task[None]:
        """Take a subscription that was released out of presence, then say the leave; returns the task that does so."""
        key = subscription.channel, subscription.info.client
        task = self._exits[key] = self._tasks.spawn(self._exit(subscription), f"exit {subscription.channel}")
        task.add_done_callback(lambda _: self._exits.pop(key) if self._exits.get(key) is task else None)
        return task

    async def _exit(self, subscription: Subscription) -> None:
        channel, info = subscription.channel, subscription.info
        self._absent.discard(subscription)
        self._unsaid.discard(subscription)
        ours_to_say = await self._remove(channel, info.client) if subscription.present else True
        if subscription.joined and ours_to_say:
            self._say_leave(channel, info)

    # --- joins and leaves -------------------------------------------------------
    def say_join(self, subscription: Subscription) -> None:
        """Tell the channel that somebody subscribed, if it emits joins; after the reply."""
        if subscription.leaves_word:
            subscription.joined = True
            if self.tell(subscription.channel, "join", subscription.info):
                self._broker.announce(Joined(subscription.channel, subscription.info))

    def _say_leave(self, channel: str, info: ClientInfo) -> None:
        if self.tell(channel, "leave", info):
            self._broker.announce(Left(channel, info))

    def tell(self, channel: str, kind: Literal["join", "leave"], info: ClientInfo) -> bool:
        """Tell the subscribers here of a join or a leave; false if they are too many for that (PROTOCOL 14.2.4).

        A thousand who come to a thousand are a million pushes.
        """
        feed = self._hub.feeds.get(channel)
        if feed is not None:
            limit = feed.namespace.options.join_leave_limit
            if limit and feed.size + len(feed.catching) > limit:
                self._counts.limits["join_leave_limit"] += 1
                return False
        self._hub.tell(channel, kind, info)
        return True

    # --- once in a while --------------------------------------------------------
    async def renew(self) -> None:
        """Renew the lease; if it had run out, enter everybody anew and tell those who were told that they left."""
        try:
            in_time = await self._presence.renew(self._clock())
            self._away = False
            if in_time:
                return
            self._lapsed()
            present = [one for feed in self._hub.feeds.values() for one in feed.subscriptions() if one.present]
            self._absent.update(present)
            for subscription in present:
                if subscription.joined:
                    subscription.joined = False  # the leave is for a survivor to tell
                    self._unsaid.add(subscription)
            await self._enter_absent()
        except Unavailable as error:
            self._complain(error)

    async def sweep(self) -> None:
        """Make up for what could not be entered or removed, and clear away what processes that died have left."""
        try:
            await self._enter_absent()
            while some := list(islice(self._ghosts, AT_ONCE)):
                await asyncio.gather(*map(self._lay, some))
            while gone := await self._presence.sweep(self._clock()):
                for number, (channel, info) in enumerate(gone, 1):
                    namespace = self._channels.namespace(channel)
                    if namespace is not None and namespace.options.join_leave:
                        self._say_leave(channel, info)
                    if number % AT_ONCE == 0:
                        await asyncio.sleep(0)  # each is told to a whole channel
        except Unavailable as error:
            self._complain(error)

    async def _enter_absent(self) -> None:
        """Enter all who should be in presence and are not, some at a time, and say the joins that are due.

        Raises ``errors.Unavailable``.
        """
        self._absent = {subscription for subscription in self._absent if not subscription.closed}
        while some := list(islice(self._absent, AT_ONCE)):
            await asyncio.gather(*map(self._add, some))
        while some := list(islice(self._unsaid, AT_ONCE)):
            self._unsaid.difference_update(some)
            for subscription in some:
                self.say_join(subscription)
            await asyncio.sleep(0)
