"""History in MongoDB: one truth for any number of processes.

**The insert is the number.**  A commit of a channel is one document that takes
the slots behind the channel's top (``mongo_scheme``).  Whoever comes second gets a
duplicate key, looks where the top is now, and tries the next slot.  One
document is atomic, so a commit has no hole inside; and it cannot become durable
before its predecessor, since its slot is known only from what is durable.

**The top is learned only** from own acknowledged commits, from what others
announced, and from majority reads.  A read of what merely the primary has would
be quicker, and wrong: what it shows may be rolled back, and the next commit
would leave a hole.

**Unknown outcomes are resolved, never guessed.**  Whatever the driver raises, the
document may be there or may still come to be there.  So the channel waits: the
same document is sent again to the same slot until a majority read shows who
holds it.  Publishers wait no longer than ``publish_timeout``; the resolution goes
on without them, and ``on_commit`` tells of its result.  Two kinds of trouble are
kept apart: a *contested* commit (duplicate key) is looked after at once by the
batch that it came in, a *doubtful* one goes to the resolver, which takes all that
there are, again and again, at the pace at which MongoDB answers.

**Fairness.**  Who wins a slot knows the next one first, and would win for ever:
without this, one of three processes got nine commits of ten, and publishers of
the others waited in vain.  So after a win in a channel where others write, and
after eight in quick succession in any (a process is told of others only by its
own losses), it waits for as long as a batch takes, or until it hears of
another's commit.  What comes meanwhile goes into its next commit, so little is
lost.

**Reads** take documents first and the channel's floor afterwards.  The sweep
writes the floor first and erases afterwards: so what a reader does not find is
below the floor that it then reads, and everything above is there.

**A negative answer** ("nobody published", "that position is beyond the top") rests
on one linearizable read.  A positive one needs no such: what a majority has stays.

**Times** of a channel never go backwards, across processes as well: a commit's
time is at least that of the document before it, which is known with its slot
(or is looked up, where an announcement did not tell).

**Versions** are judged by the same rule as numbers: the slot behind a known top
can only be had by one, so what was the last version up to that top is the last
one still.  It is known from own commits, and asked for (linearizable, since a stale
answer would let in what is outdated) after others have published.  Announcements
do not tell of it, so that those without versions, nearly all, cost nothing more.

**tops** asks for what nobody has told us: whether there is a document right
behind the top we know, for all channels in one ``$in`` of ids (and, after a long
silence, whether its floor or its life has changed); only where there is one, or
where we know nothing, it looks further.

What stands in the collections is ``mongo_scheme``'s, how they are reached
``mongo_server``'s.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

from server.errors import BAD_REQUEST, Refused, Unavailable
from server.history import (
    IDEMPOTENCY_TTL_MS,
    PAGE_BYTES,
    PAGE_PUBLICATIONS,
    Appended,
    Draft,
    History,
    Retention,
    RetentionOf,
)
from server.history.gathering import weigh
from server.history.mongo_commits import Commits
from server.history.mongo_places import Places, Stale, View
from server.history.mongo_scheme import LAST_SLOT, LOG, SPAN, Document, Record, slots
from server.history.mongo_server import MongoServer
from server.history.mongo_sweep import Sweep
from server.observe import event
from server.settings import MongoSettings
from server.stream import Page, Position, Publication

HEAVIEST = 12 * 1024 * 1024
"""The most bytes of one publication; a document of MongoDB has at most 16 MB."""

FIRST_RECORDS = 24
MORE_RECORDS = 100
AGAIN_S = 0.02
LONGEST_AGAIN_S = 0.25
AGAIN = 6

T = TypeVar("T")


class _Again(Unavailable):
    """What was read does not fit together, since the channel changed meanwhile: read once more, now."""


class _Stretch(NamedTuple):
    """Publications as they were collected.

    ``edge`` is the first document of the present life that was met, ``last`` the
    last one; ``whole`` says that there was nothing behind it.
    """

    publications: list[Publication]
    edge: Record | None
    last: Record | None
    whole: bool


class MongoHistory(History):
    """The contract of ``History``, kept in the replica set of ``settings``, together with other processes.

    ``idempotency_ttl_ms`` is how long a key is remembered.
    """

    def __init__(self, settings: MongoSettings, *, idempotency_ttl_ms: int = IDEMPOTENCY_TTL_MS) -> None:
        self._settings = settings
        self._ttl_ms = idempotency_ttl_ms
        self._server = MongoServer(settings)
        self._troubles: dict[str, str] = {}
        self._places = Places(self._server)
        self._sweep = Sweep(self._server, self._places, ttl_ms=idempotency_ttl_ms)
        self._commits: Commits | None = None

    def __repr__(self) -> str:
        return f"MongoHistory({self._server.place!r}, {self._settings.driver})"

    # --- life -----------------------------------------------------------------
    async def open(self) -> None:
        """Reach the replica set, and make or check collections and indexes; within ten seconds.

        Raises ``errors.Unavailable`` in operator's words; may then be called again.
        """
        if self._commits is not None:
            raise RuntimeError("this MongoHistory is open already")
        try:
            await self._server.open()
        except Unavailable as error:
            self.trouble = str(error)
            raise
        self.trouble = ""
        self._troubles = {}
        self._places = Places(self._server)
        self._sweep = Sweep(self._server, self._places, ttl_ms=self._ttl_ms)
        self._commits = Commits(
            self._server,
            self._places,
            patience_s=self._settings.publish_timeout,
            ttl_ms=self._ttl_ms,
            told=self._tell,
            timed=lambda publications, seconds: self.on_batch(publications, seconds),
            trouble=lambda why: self._note("commit", why),
        )

    async def close(self) -> None:
        """Finish the commits under way, for ``publish_timeout`` at most, and let go of all connections."""
        commits, self._commits = self._commits, None  # from here on nothing new is taken
        if commits is not None:
            await commits.close()
        await self._server.close()

    def _opened(self) -> Commits:
        if self._commits is None:
            raise Unavailable(f"history in {self._server.place} is not open")
        return self._commits

    # --- writing --------------------------------------------------------------
    async def append(self, channel: str, draft: Draft, retention: Retention, now_ms: int) -> Appended:
        """Put ``draft`` into the next batch; returns once a majority has it on its disks.  PROTOCOL 11.1, 11.8.

        Raises ``errors.Unavailable`` (outcome unknown) after ``publish_timeout``
        at the latest, ``errors.Refused`` (111; 107 for what is heavier than a
        document may be), and ``ValueError`` for text that is no Unicode.
        """
        commits = self._opened()
        self._places.now_ms = now_ms
        if weigh(draft) > HEAVIEST:
            raise Refused(BAD_REQUEST, f"a publication has more than {HEAVIEST} bytes")
        return await commits.append(channel, draft, now_ms)

    def heard(self, channel: str, top: Position, time_ms: int = 0) -> None:
        """Another process announced ``top``; with its time, the next commit needs no look."""
        self._places.heard(channel, top, time_ms)
        if self._commits is not None:
            self._commits.heard(channel)

    def _tell(self, channel: str, epoch: str, publications: Sequence[Publication]) -> None:
        self._sweep.touch(channel)
        try:
            self.on_commit(channel, epoch, publications)
        except Exception as error:
            # Our fault, but the commit stands, and the others in the batch are to be told.
            event("history.listener_failed", fault=error, channel=channel)

    def _note(self, what: str, why: str) -> None:
        """Remember that committing or reading fails, and why, or that it works; both are logged when they begin."""
        if bool(why) != (what in self._troubles):
            if why:
                event(f"history.{what}_failed", path=self._server.place, error=why)
            else:
                event(f"history.{what}_recovered", path=self._server.place)
        if why:
            self._troubles[what] = why
        else:
            self._troubles.pop(what, None)
        self.trouble = "; ".join(self._troubles.values())

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do ``work``, which may be done twice, until it succeeds or ``publish_timeout`` is over.

        Raises ``errors.Unavailable``, and what else ``work`` raises.
        """
        self._opened()
        loop = asyncio.get_running_loop()
        pause_s, at_once = AGAIN_S, AGAIN
        why = "it did not answer"
        try:
            async with asyncio.timeout(self._settings.publish_timeout):
                while True:
                    began_s = loop.time()
                    try:
                        result = await work()
                    except _Again as error:
                        why = str(error)
                        at_once -= 1
                        if at_once > 0:
                            continue
                    except Stale as error:
                        why = str(error)
                    except Unavailable as error:
                        why = str(error)
                        self._opened()
                        self._note("read", why)
                    else:
                        self._note("read", "")
                        return result
                    await asyncio.sleep(max(0.0, pause_s - (loop.time() - began_s)))
                    pause_s = min(2 * pause_s, LONGEST_AGAIN_S)
        except TimeoutError:
            raise Unavailable(f"within {self._settings.publish_timeout:g} s: {why}") from None

    # --- reading --------------------------------------------------------------
    async def read(
        self,
        channel: str,
        retention: Retention,
        now_ms: int,
        *,
        since: int | None = None,
        limit: int = PAGE_PUBLICATIONS,
        max_bytes: int = PAGE_BYTES,
        reverse: bool = False,
    ) -> Page:
        """Read a page.  PROTOCOL 4.6.

        Where it begins after ``since``, its floor says no more of what has
        expired than concerns that beginning.
        """
        self._places.now_ms = now_ms
        wish = _Wish(channel, retention, now_ms, since, limit, max_bytes, reverse)
        return await self._patiently(lambda: self._read(wish))

    async def _read(self, wish: "_Wish") -> Page:
        place = await self._places.find(wish.channel)
        if place is None:
            return Page((), Position())
        base = place.base
        # From where on we look: what is below these is gone for certain.
        low = max(place.floor - base, place.top - base - wish.retention.size if wish.retention.size >= 0 else 0)
        floor, stretch = 0, _Stretch([], None, None, False)
        if wish.reverse or wish.limit == 0:
            floor = await self._expired(wish, base, low)
        if wish.limit != 0:
            stretch = await self._collect(wish, base, low)
        newest = stretch.edge if wish.reverse else stretch.last
        if newest is None or not (wish.since is None if wish.reverse else stretch.whole):
            newest = await self._places.newest(wish.channel)
        # The channel's floor last: what was not found above is below it.
        asked_s = asyncio.get_running_loop().time()
        states = await self._places.states([wish.channel])
        place = self._places.learn(wish.channel, View(states.get(wish.channel), newest), asked_s)
        if place is None or place.base != base:
            raise _Again(f"{wish.channel!r} began anew while it was read")
        top = place.top - base
        if wish.since is not None and wish.since > top and not wish.reverse:
            certain = await self._places.newest(wish.channel, certain=True)
            if certain is not None and certain.last > place.top:
                raise _Again(f"{wish.channel!r} grew while it was read")
        floor = max(floor, place.floor - base, top - wish.retention.size if wish.retention.size >= 0 else 0)
        return self._page(wish, stretch, newest, Position(top, place.epoch), floor)

    def _page(self, wish: "_Wish", stretch: _Stretch, newest: Record | None, top: Position, floor: int) -> Page:
        """Put together what was read, and see that it has no hole."""
        found = stretch.publications
        publications = [publication for publication in found if publication.offset > floor]
        if wish.limit == 0:
            return Page((), top, floor)
        if len(publications) < len(found) and not stretch.whole:
            raise _Again(f"{wish.channel!r} was trimmed while it was read")
        step = -1 if wish.reverse else 1
        if any(after.offset != before.offset + step for before, after in pairwise(publications)):
            raise Unavailable(f"{self._server.place}: publications of {wish.channel!r} are missing")
        if not wish.reverse:
            start = max(floor, wish.since or 0)
            expired = newest is not None and newest.time_ms <= wish.expired_ms
            if publications and publications[0].offset > start + 1:
                if wish.expired_ms < 0:
                    raise Unavailable(f"{self._server.place}: publications of {wish.channel!r} are missing")
                floor = publications[0].offset - 1
            elif not publications and start < top.offset:
                if not expired:
                    raise _Again(f"{wish.channel!r} grew while it was read")
                floor = top.offset
            elif not publications and expired:
                floor = top.offset
        else:
            end = top.offset if wish.since is None else min(wish.since - 1, top.offset)
            if end > floor and not (publications and publications[0].offset == end):
                raise _Again(f"{wish.channel!r} grew while it was read")
        return Page(publications, top, floor)

    async def _expired(self, wish: "_Wish", base: int, low: int) -> int:
        """The highest offset that is gone for its age; asks for the first one that is not."""
        if wish.expired_ms < 0:
            return 0
        first = await self._collect(wish._replace(since=None, limit=1, reverse=False, max_bytes=0), base, low)
        if first.publications:
            return first.publications[0].offset - 1
        newest = await self._places.newest(wish.channel)
        if newest is None or newest.ends or newest.last - base <= low:
            return 0
        if newest.time_ms > wish.expired_ms:
            # It came just now, or it is below a floor that we do not know of yet.
            await self._places.see(wish.channel)
            raise _Again(f"{wish.channel!r} changed while it was read")
        return newest.last - base

    async def _collect(self, wish: "_Wish", base: int, low: int) -> _Stretch:
        """Publications as wished, above the offset ``low``, without the expired ones: documents of a few at a time."""
        above, upto = low, LAST_SLOT - base
        if wish.since is not None and wish.reverse:
            upto = min(upto, wish.since - 1)
        elif wish.since is not None:
            above = min(max(low, wish.since), upto)
        # The document that ends at ``above`` is asked for as well: it says where the top is if there is nothing behind.
        query = slots(wish.channel, max(0, base + above - SPAN), max(0, base + upto))
        query["last"] = {"$gte": max(1, base + above)}
        if wish.expired_ms >= 0:
            query["time"] = {"$gt": wish.expired_ms}
        publications: list[Publication] = []
        edge: Record | None = None
        last: Record | None = None
        size, documents = 0, FIRST_RECORDS
        while True:
            found = await self._server.find(LOG, query, fields=_PAGE_FIELDS, newest=wish.reverse, limit=documents)
            for record in self._places.records(found):
                contents = record.publications(base)
                if contents is None:
                    self._places.skip(LOG, {"_id": {"channel": record.channel, "first": record.first}})
                    continue
                if record.first > base:  # the end of the life before may be younger than what is newest in this one
                    edge, last = edge or record, record
                for publication in reversed(contents) if wish.reverse else contents:
                    if not above < publication.offset <= upto or publication.time_ms <= wish.expired_ms:
                        continue
                    if 0 <= wish.limit <= len(publications):
                        return _Stretch(publications, edge, last, False)
                    size += publication.weight
                    if publications and size > wish.max_bytes:
                        return _Stretch(publications, edge, last, False)
                    publications.append(publication)
            if len(found) < documents:
                return _Stretch(publications, edge, last, True)
            beyond: Document = {"$lt" if wish.reverse else "$gt": found[-1]["_id"]}
            query = {**query, "_id": {**query["_id"], **beyond}}
            documents = MORE_RECORDS

    async def tops(self, channels: Iterable[str]) -> dict[str, Position]:
        """The newest position of each known channel, from one query as a rule."""
        names = list(channels)
        return await self._patiently(lambda: self._places.tops(names))

    # --- destroying -------------------------------------------------------------
    async def remove(self, channel: str) -> None:
        """Forget the payloads of a channel at once.  PROTOCOL 11.1."""
        await self._patiently(lambda: self._sweep.remove(channel, self._places.now_ms))
        self._places.forget(channel)

    async def redact(self, channel: str, offset: int) -> None:
        """Erase one payload; raises ``errors.Refused`` (112) if it is not there.  PROTOCOL 11.1."""
        await self._patiently(lambda: self._sweep.redact(channel, offset))

    async def sweep(self, retention_of: RetentionOf, now_ms: int) -> None:
        """Erase what is gone, free expired keys, and end lives; a bounded amount a call.

        A channel that is kept no more (``retention_of`` gives ``None``) stays as
        it is: who takes an option away by mistake shall not lose what was said.

        Raises ``errors.Unavailable``; call it again.
        """
        self._opened()
        self._places.now_ms = now_ms
        try:
            await self._sweep.sweep(retention_of, now_ms)
        except Unavailable as error:
            self._opened()
            self._note("read", str(error))
            raise
        self._note("read", "")

    async def new_epochs(self) -> int:
        """Start every channel on a new epoch at offset 0: payloads and keys are gone.

        Other processes had better be stopped, but no harm is done if they are
        not.  Raises ``errors.Unavailable``: call it again, some have begun anew.
        """
        self._opened()
        return await self._sweep.new_epochs(self._places.now_ms)


class _Wish(NamedTuple):
    """What is to be read."""

    channel: str
    retention: Retention
    now_ms: int
    since: int | None
    limit: int
    max_bytes: int
    reverse: bool

    @property
    def expired_ms(self) -> int:
        """The time up to which publications are gone; -1 if none is gone for its age."""
        return self.now_ms - self.retention.ttl_ms if self.retention.ttl_ms >= 0 else -1


_PAGE_FIELDS = ("last", "time", "pubs", "end")
