"""How publications get into MongoDB: batches, contests, doubts.  ``mongo`` tells why it is done so.

The way of a commit, once ``Gathering`` has cut it: it is *composed* into a
document for the slot behind the known top, and *sent* in a batch with others.  Then

* ``STORED``: it is *settled*: told to ``on_commit``, then to its publishers.
* ``TAKEN``: somebody has its slot or one of its keys.  A look tells who: we
  ourselves (settled); another (composed anew, for the next slot and without
  what was a repeat); nobody that a majority knows of (sent again as it is).
* ``UNKNOWN``: the resolver looks and does the same, for as long as it takes.

A draft with a version is judged when its commit is composed, by the last version
up to the known top; that the next slot could be had proves that it was the last
one.  Where that version is not known, or nothing is left to be sent that could
prove it, there is a look first.

Once sent, a document is given up only when a majority read shows another one in
its slot, or one of its keys in another one: then it can never get in.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from server.errors import Unavailable
from server.history import Appended, Draft, random_epoch
from server.history.gathering import BATCH_BYTES, Gathering
from server.history.mongo_looks import Looks
from server.history.mongo_places import Places, Stale, View
from server.history.mongo_scheme import (
    CHANNELS,
    LOG,
    Document,
    LastVersion,
    Record,
    after_end,
    beginning,
    pack_extra,
)
from server.history.mongo_server import Fate, MongoServer
from server.history.mongo_write import Verdict, Waiter, Write, is_late, is_plain, judge
from server.observe import event
from server.stream import Position, Publication

LOOKINGS = 2
"""Batches of channels that have to be looked at first, on their way at a time."""

LOOK_CHANNELS = 200
"""The most channels in one of these: of thousands, the first ones shall have their answer before the last is found."""

SHORTEST_YIELD_S = 0.002
LONGEST_YIELD_S = 0.5
YIELD_AFTER = 8
CONTESTED_S = 1.0
BUSY = 3
SMOOTHING = 0.1
BLIND_S = 0.002
LONGEST_BLIND_S = 0.1
RESOLVE_S = 0.05
LONGEST_RESOLVE_S = 1.0

OnCommit = Callable[[str, str, Sequence[Publication]], None]


class Commits:
    """Everything that waits to be published, and the way of it; see the module's docstring.

    ``told`` is called with each commit that became durable, before its publishers;
    ``timed`` with the publications and the seconds of each batch that was stored.
    """

    def __init__(
        self,
        server: MongoServer,
        places: Places,
        *,
        patience_s: float,
        ttl_ms: int,
        told: OnCommit,
        timed: Callable[[int, float], None],
        trouble: Callable[[str], None],
    ) -> None:
        self._server = server
        self._places = places
        self._looks = Looks(server, places)
        self._patience_s = patience_s
        self._ttl_ms = ttl_ms
        self._told = told
        self._timed = timed
        self._trouble = trouble
        self._gathering: Gathering[Waiter] = Gathering()
        self._waiting: deque[tuple[str, Waiter]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._gather_due = False
        self._sending = False
        self._looking = 0
        self._unsure: list[Write] = []
        self._doubtful: list[Write] = []
        self._resolving = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle: asyncio.Future[None] | None = None
        self._closed = False
        self._held: dict[str, asyncio.TimerHandle] = {}
        # What a batch takes, of late.  So long others are given a turn: they need a look and a send.
        self._yield_s = SHORTEST_YIELD_S

    def __repr__(self) -> str:
        return f"Commits({self._gathering!r}, {len(self._doubtful)} in doubt)"

    # --- coming and going -------------------------------------------------------
    async def append(self, channel: str, draft: Draft, now_ms: int) -> Appended:
        """Put ``draft`` into the next batch; returns once it is durable.

        Raises ``errors.Unavailable`` (outcome unknown), ``errors.Refused``
        (111), and ``ValueError`` for text that is no Unicode.
        """
        loop = asyncio.get_running_loop()
        channel.encode()
        draft.key.encode()
        draft.version.epoch.encode()
        extra = pack_extra(draft.info, draft.tags)
        waiter = Waiter(loop.create_future(), loop.time() + self._patience_s, extra)
        self._gathering.add(channel, draft, now_ms, waiter)
        while self._waiting and self._waiting[0][1].future.done():
            self._waiting.popleft()
        self._waiting.append((channel, waiter))
        if self._timer is None:
            self._timer = loop.call_at(waiter.ends_s, self._shed)
        self._gather_soon()
        return await waiter.future

    async def close(self) -> None:
        """Let what is under way end, for ``patience_s``; the outcome of the rest is unknown."""
        if not self._gathering.idle:
            self._idle = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._idle], timeout=self._patience_s)
        self._closed = True
        for timer in self._held.values():
            timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))
        if self._timer is not None:
            self._timer.cancel()
        for _, waiter in self._waiting:
            waiter.refuse("history was closed before it knew whether this is stored")

    def _shed(self) -> None:
        """Answer those who have waited for ``patience_s``, and let go of what no commit has begun with."""
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        channels = set()
        while self._waiting and (self._waiting[0][1].future.done() or self._waiting[0][1].ends_s <= now_s):
            channel, waiter = self._waiting.popleft()
            if waiter.ends_s <= now_s:
                waiter.refuse(f"{self._server.place} did not store it within {self._patience_s:g} s")
                channels.add(channel)
        for channel in channels:
            self._gathering.shed(channel, partial(is_late, now_s=now_s))
        self._timer = loop.call_at(self._waiting[0][1].ends_s, self._shed) if self._waiting else None
        self._note_idle()

    def _note_idle(self) -> None:
        if self._idle is not None and not self._idle.done() and self._gathering.idle:
            self._idle.set_result(None)

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        if self._closed:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            event("task.failed", task=task.get_name(), fault=fault)

    # --- sending ----------------------------------------------------------------
    def _gather_soon(self) -> None:
        if not self._gather_due:
            self._gather_due = True
            asyncio.get_running_loop().call_soon(self._gather)

    def _gather(self) -> None:
        """Send the next batch, unless one is on its way; and look at channels of which too little is known.

        One at a time is best: what comes meanwhile goes together.  With two, 200
        publishers in as many channels got three quarters of the throughput for
        more of our time, with four two thirds.  Looks go apart, so that nobody
        waits for those of others.
        """
        self._gather_due = False
        while self._gathering.ready and not self._sending:
            known: list[Write] = []
            for commit in self._gathering.take():
                write = Write(commit)
                place = self._places.fresh(commit.channel)
                if place is not None and write.may_guess(place):
                    write.compose(place, self._ttl_ms)
                (self._unsure if write.document is None else known).append(write)
            if known:
                self._sending = True
                self._spawn(self._drive_known(known), "commit")
        while self._unsure and self._looking < LOOKINGS:
            writes, self._unsure = self._unsure[:LOOK_CHANNELS], self._unsure[LOOK_CHANNELS:]
            self._looking += 1
            self._spawn(self._drive_unsure(writes), "commit")

    async def _drive_known(self, writes: list[Write]) -> None:
        try:
            writes = await self._pass(writes)
        finally:
            self._sending = False
            self._gather_soon()
        await self._drive(writes)

    async def _drive_unsure(self, writes: list[Write]) -> None:
        try:
            await self._drive(writes)
        finally:
            self._looking -= 1
            self._gather_soon()

    async def _drive(self, writes: list[Write]) -> None:
        """Bring a batch to its end, except for what is in doubt."""
        while writes:
            writes = await self._pass(writes)

    async def _resolve(self) -> None:
        """Bring to its end what is in doubt; there is only one of these at a time."""
        pause_s = RESOLVE_S
        try:
            while self._doubtful:
                writes = self._next_doubtful()
                before = len(self._doubtful)
                contested = await self._pass(writes)
                if contested:
                    self._spawn(self._drive(contested), "commit")
                if len(self._doubtful) > before:
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_RESOLVE_S)
                else:
                    pause_s = RESOLVE_S
            self._trouble("")
        finally:
            self._resolving = False

    def _next_doubtful(self) -> list[Write]:
        """Some of those in doubt, a batch's worth, those that have waited longest."""
        size = count = 0
        while count < min(len(self._doubtful), LOOK_CHANNELS) and size < BATCH_BYTES:
            size += self._doubtful[count].size
            count += 1
        writes, self._doubtful = self._doubtful[:count], self._doubtful[count:]
        return writes

    def _doubt(self, writes: Sequence[Write]) -> None:
        self._doubtful += writes
        if not self._resolving:
            self._resolving = True
            self._spawn(self._resolve(), "resolve")

    async def _pass(self, writes: list[Write]) -> list[Write]:
        """Look where that is needed, send once, and settle; returns those that lost their slot, to be passed again."""
        try:
            unsure = [write for write in writes if write.document is None or write.sent]
            ready = [write for write in writes if write.document is not None and not write.sent]
            if unsure:
                ready += await self._look(unsure)
            return await self._send(ready) if ready else []
        except Exception as fault:
            # A fault of ours.  Whatever became of these: their slots are still theirs or another's, never both.
            event("history.batch_failed", fault=fault, path=self._server.place)
            for write in writes:
                self._fail(write, "a fault of ours while storing")
            return []
        finally:
            # Not before all of them have their answer: whoever goes on publishing then goes with the next batch.
            # (200 publishers in as many channels: an eighth more publications, for less of our time.)
            self._gather_soon()

    async def _send(self, writes: list[Write]) -> list[Write]:
        sent_s = asyncio.get_running_loop().time()
        for write in writes:
            write.sent = True
            write.sent_s = sent_s
        fates, why = await self._server.insert([write.document for write in writes if write.document is not None])
        if Fate.STORED in fates:
            took_s = asyncio.get_running_loop().time() - sent_s
            stored = (write for write, fate in zip(writes, fates, strict=True) if fate is Fate.STORED)
            self._timed(sum(len(write.publications) for write in stored), took_s)
            smooth_s = self._yield_s + SMOOTHING * (took_s - self._yield_s)
            self._yield_s = max(SHORTEST_YIELD_S, min(smooth_s, LONGEST_YIELD_S))
        taken, unknown = [], []
        for write, fate in zip(writes, fates, strict=True):
            if fate is Fate.STORED:
                self._settle(write)
            elif fate is Fate.TAKEN:
                taken.append(write)
            else:
                write.doubted = True
                unknown.append(write)
        if unknown:
            self._trouble(why)
            self._doubt(unknown)
        elif len(taken) < len(writes):
            self._trouble("")
        return taken

    # --- looking ----------------------------------------------------------------
    async def _look(self, writes: list[Write]) -> list[Write]:
        """Find out what became of ``writes`` and where their channels stand; returns those to be sent (again)."""
        now_s = asyncio.get_running_loop().time()
        for write in writes:
            if not write.sent and all(
                is_late(waiter, now_s) for entry in write.commit.entries for waiter in entry.waiters
            ):
                self._fail(write, f"{self._server.place} did not store it within {self._patience_s:g} s")
        writes = [write for write in writes if not write.done]
        try:
            ready = await self._look_closely(writes)
        except Stale:
            # No trouble: a life ended or began meanwhile, or a new primary has yet to learn.  The next look will tell.
            self._doubt([write for write in writes if not write.done])
            return []
        except Unavailable as error:
            self._trouble(str(error))
            self._doubt([write for write in writes if not write.done])
            return []
        blind = max((write.blind for write in ready), default=0)
        if blind:
            # Taken, the primary says, and a majority does not know by whom yet: it soon will.
            await asyncio.sleep(min(BLIND_S * 2**blind, LONGEST_BLIND_S))
        return ready

    async def _look_closely(self, writes: list[Write]) -> list[Write]:
        asked_s = asyncio.get_running_loop().time()
        # Keys before views: what has a key then belongs to a life that the view tells of, or to one that was before.
        hits = await self._looks.hits([write for write in writes if write.sent or write.twofold])
        views, holders = await self._looks.views_and_holders(writes)
        used_up: list[tuple[Document, Document]] = []
        anew: list[Write] = []
        ready: list[Write] = []
        for write in writes:
            view = views[write.channel]
            match judge(write, holders.get(write.channel), view):
                case Verdict.OURS:
                    self._settle(write)
                    continue
                case Verdict.GONE:
                    self._fail(write, "what became of it is no longer known")
                    continue
                case Verdict.LOST:
                    write.document = None
                    self._lost(write)
            used_up += self._weigh_keys(write, hits.get(write.channel, ()), view)
            if write.document is None:
                anew.append(write)
            else:
                write.blind += 1
                ready.append(write)
        await self._server.update_each(LOG, used_up)
        if anew:
            ready += await self._compose_anew(anew, views, asked_s)
        return ready

    def _weigh_keys(self, write: Write, hits: Sequence[Record], view: View) -> list[tuple[Document, Document]]:
        """Take repeats out of ``write``; returns the changes that free keys whose time, or whose life, is over."""
        wanted, own = write.keys, write.document and write.document["commit"]
        base, epoch = (view.state.base, view.state.epoch) if view.state else (0, "")
        used_up: list[tuple[Document, Document]] = []
        for record in hits:
            for key in record.keys:
                entry = wanted.get(key.key)
                if entry is None or record.commit == own:
                    continue
                if record.first > base and key.until_ms > entry.now_ms and view.alive:
                    write.outcomes[entry] = Appended(Position(key.slot - base, epoch), repeated=True)
                    if entry in write.entries:
                        # It can never get in beside the other one, so it may be given up.
                        write.document = None
                else:
                    identity = {"channel": record.channel, "first": record.first}
                    stale = {"key": key.key, "until": key.until_ms}
                    used_up.append(({"_id": identity}, {"$pull": {"keys": stale}}))
        return used_up

    async def _compose_anew(self, writes: Sequence[Write], views: dict[str, View], asked_s: float) -> list[Write]:
        """Compose for where the channels stand now, in a new life where the last one has ended.

        What is wrong with one channel (its document is a stranger's or was deleted,
        what was announced is not there) puts that one in doubt, and no other.
        """
        beginnings: list[tuple[Document, Any]] = []
        now_ms = self._places.now_ms
        for write in writes:
            view = views[write.channel]
            if view.end:
                query: Document = {"_id": write.channel, "base": {"$lt": view.end}}
                beginnings.append((query, after_end(view.end, random_epoch(), now_ms, now_ms)))
            elif view.state is not None and not view.alive:
                query = {"_id": write.channel, "base": view.state.base, "epoch": ""}
                beginnings.append((query, beginning(random_epoch(), now_ms)))
        if beginnings:
            await self._server.update_each(CHANNELS, beginnings)
            names = [query["_id"] for query, _ in beginnings]
            states = await self._places.states(names)
            views = {**views, **{name: View(states.get(name), views[name].newest) for name in names}}
        for write in writes:
            self._gathering.refill(write.commit, fits=is_plain)
        # After the views: what has come since is found out by its slot.
        versions = await self._places.last_versions([write.channel for write in writes if write.versioned])
        ready = []
        for write in writes:
            try:
                place = self._places.learn(write.channel, views[write.channel], asked_s)
            except Stale:
                place = None
            version = versions.get(write.channel, LastVersion())
            if place is None or version.slot > place.top:
                self._doubt([write])
                continue
            if write.versioned:
                place.version = version if version.slot > place.base else LastVersion()
            write.compose(place, self._ttl_ms)
            if write.document is None:
                self._settle(write)
            else:
                ready.append(write)
        return ready

    # --- the end ----------------------------------------------------------------
    def _lost(self, write: Write) -> None:
        """Another process writes to this channel as well: give it its turn from now on."""
        place = self._places.known(write.channel)
        if place is not None:
            place.contested_s = asyncio.get_running_loop().time() + CONTESTED_S
            place.streak = 0

    def _settle(self, write: Write) -> None:
        write.done = True
        channel, document = write.channel, write.document
        hold = False
        if document is not None:
            self._places.committed(
                channel, write.epoch, document["last"], document["time"], write.version, write.sent_s
            )
            hold = self._yields(channel)
            self._told(channel, write.epoch, write.publications)
            for entry, publication in zip(write.entries, write.publications, strict=True):
                write.outcomes[entry] = Appended(Position(publication.offset, write.epoch))
        outcomes = [write.outcomes.get(entry) or write.outdated[entry] for entry in write.commit.entries]
        for waiter, outcome in self._gathering.settle(write.commit, outcomes, hold=hold):
            waiter.answer(outcome)
        if hold:
            if (place := self._places.known(channel)) is not None:
                place.streak = 0
            self._held[channel] = asyncio.get_running_loop().call_later(self._yield_s, self._release, channel)
        self._note_idle()

    def _yields(self, channel: str) -> bool:
        """Is it time to let others write to this channel?"""
        place = self._places.known(channel)
        if place is None:
            return False
        now_s = asyncio.get_running_loop().time()
        busy = now_s - place.settled_s < BUSY * self._yield_s
        place.settled_s = now_s
        place.streak = place.streak + 1 if busy else 0
        return place.contested_s > now_s or place.streak >= YIELD_AFTER

    def heard(self, channel: str) -> None:
        """Another process has published there: its turn is over."""
        timer = self._held.get(channel)
        if timer is not None:
            timer.cancel()
            self._release(channel)

    def _release(self, channel: str) -> None:
        del self._held[channel]
        self._gathering.release(channel)
        self._gather_soon()

    def _fail(self, write: Write, why: str) -> None:
        if not write.done:
            write.done = True
            for waiter in self._gathering.fail(write.commit):
                waiter.refuse(why)
            self._note_idle()
