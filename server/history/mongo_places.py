"""What this process knows of the channels in MongoDB: where each one stands, and how sure that is.

A *place* is a channel's epoch, base, floor and top as far as we know.  It comes
from own acknowledged commits, from announcements, and from majority reads, and
is never too high: whatever it says is there.  It may be too low, which costs a
commit one more attempt.  A place that nothing has confirmed for ``TRUST_S`` is no
longer good for a guess (``mongo_scheme`` says why), but still tells an old answer
from a new one.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from server.errors import Unavailable
from server.history.mongo_scheme import CHANNELS, LOG, TRUST_S, Channel, Document, LastVersion, Record, slots
from server.history.mongo_server import MongoServer
from server.observe import event
from server.stream import Position

T = TypeVar("T")

PLACES = 100_000
RUMOURS = 10_000
LOOKS = 8
TRIES = 4
SKIPPED = 1_000
IN_ONE_QUERY = 10_000
SEE_CHANNELS = 2_000


class Stale(Unavailable):
    """What was read is older than what we know: a deposed primary has answered, or a new one that has yet to learn."""


class View(NamedTuple):
    """A channel as it was read: its document, and the newest one of its log."""

    state: Channel | None
    newest: Record | None

    @property
    def end(self) -> int:
        """The slot at which the life that ``state`` tells of has ended, 0 if it has not."""
        newest, state = self.newest, self.state
        return (
            newest.first if newest is not None and newest.ends and (state is None or newest.first > state.base) else 0
        )

    @property
    def alive(self) -> bool:
        """Has the channel an epoch?"""
        return self.state is not None and self.state.epoch != "" and not self.end

    @property
    def top(self) -> int:
        """The last slot that is taken."""
        return max(self.newest.last if self.newest else 0, self.state.floor if self.state else 0)


class Place:
    """Where a living channel stands, in slots.

    ``time_ms`` is that of the newest publication, -1 if that is not known;
    ``seen_s`` (of the loop) and ``seen_ms`` (of the callers) say when this was
    certainly true.  ``contested_s`` is until when others are taken to write here
    as well, ``streak`` how many commits in quick succession were ours, ``settled_s``
    when the last one was done.  ``version`` is the last one up to ``top``, ``None`` if
    that is not known: it is asked for when it matters.
    """

    __slots__ = (
        "base", "contested_s", "epoch", "floor", "seen_ms", "seen_s", "settled_s", "streak", "time_ms", "top",
        "version",
    )  # fmt: skip

    def __init__(self, epoch: str, base: int) -> None:
        self.epoch = epoch
        self.base = base
        self.floor = base
        self.top = base
        self.time_ms = -1
        self.seen_s = self.settled_s = self.contested_s = 0.0
        self.seen_ms = self.streak = 0
        self.version: LastVersion | None = None

    def __repr__(self) -> str:
        return f"Place({self.epoch!r}, base={self.base}, floor={self.floor}, top={self.top})"

    @property
    def position(self) -> Position:
        """The top as clients see it."""
        return Position(self.top - self.base, self.epoch)


class Places:
    """The places of many channels, the longest untouched forgotten first.

    ``now_ms`` is the latest time that a caller gave.
    """

    def __init__(self, server: MongoServer) -> None:
        self.now_ms = 0
        self._server = server
        self._places: OrderedDict[str, Place] = OrderedDict()
        self._rumours: OrderedDict[str, Position] = OrderedDict()
        self._looks = asyncio.Semaphore(LOOKS)
        self._skipped: set[str] = set()

    # --- what is known ----------------------------------------------------------
    def known(self, channel: str) -> Place | None:
        """What we know, however old; ``None`` if that is nothing, or that nobody has published."""
        return self._places.get(channel)

    def fresh(self, channel: str) -> Place | None:
        """What we know, if the next slot may be guessed from it."""
        place = self._places.get(channel)
        return place if place is not None and place.time_ms >= 0 and self._trusted(place) else None

    def _trusted(self, place: Place) -> bool:
        now_s = asyncio.get_running_loop().time()
        return now_s - place.seen_s <= TRUST_S and abs(self.now_ms - place.seen_ms) <= TRUST_S * 1000

    def heard(self, channel: str, top: Position, time_ms: int) -> None:
        """Another process has announced ``top``."""
        place = self._places.get(channel)
        if place is None or place.epoch != top.epoch:
            self._rumours[channel] = top
            self._rumours.move_to_end(channel)
            _bound(self._rumours, RUMOURS)
            return
        slot = place.base + top.offset
        if slot > place.top:
            place.top = slot
            place.time_ms = time_ms or -1
            place.version = None
            # How long it was on its way is not known, but only a little younger than its publication.
            place.seen_ms = time_ms
            place.seen_s = asyncio.get_running_loop().time()
            place.streak = 0

    def committed(
        self, channel: str, epoch: str, top: int, time_ms: int, version: LastVersion | None, sent_s: float
    ) -> None:
        """A commit of ours is durable; it was on its way since ``sent_s``.

        Since it got its slot, the ``version`` that was the last one when it was composed is so still.
        """
        place = self._places.get(channel)
        if place is not None and place.epoch == epoch and top > place.top:
            place.top = top
            place.time_ms = time_ms
            place.version = version
            place.seen_s = sent_s
            place.seen_ms = self.now_ms

    def forget(self, channel: str) -> None:
        """Know nothing any more: ask before the next answer."""
        self._places.pop(channel, None)

    def learn(self, channel: str, view: View, asked_s: float) -> Place | None:
        """Take in what was read after ``asked_s``; ``None`` if nobody has published in this life.

        Raises ``Stale`` if we know better.
        """
        place = self._places.get(channel)
        state = view.state
        if place is not None and self._contradicts(place, view):
            raise Stale(f"what was read of {channel!r} is older than what was known")
        if state is None or not view.alive:
            self._places.pop(channel, None)
            return None
        rumour = self._rumours.get(channel)
        if rumour is not None and rumour.epoch == state.epoch:
            if rumour.offset > view.top - state.base:
                raise Stale(f"what was read of {channel!r} is older than what was announced")
            del self._rumours[channel]
        if place is None or place.epoch != state.epoch:
            place = Place(state.epoch, state.base)
        self._places[channel] = place
        self._places.move_to_end(channel)
        _bound(self._places, PLACES)
        place.floor = max(place.floor, state.floor)
        if view.top > place.top:
            place.version = None
        if view.top >= place.top:
            newest = view.newest
            place.top = view.top
            place.time_ms = newest.time_ms if newest is not None and newest.first > state.base else state.used_ms
            place.seen_s = asked_s
            place.seen_ms = self.now_ms
        return place

    def _contradicts(self, place: Place, view: View) -> bool:
        state = view.state
        if state is not None and state.epoch == place.epoch:
            # Not if its end is behind what we know: then it goes by what follows.
            return max(view.top, view.end) < place.top
        # Another life: a later one has a higher base; but a channel whose last trace was deleted begins at 0 again.
        older = state is None or state.base <= place.base
        return older and self._trusted(place)

    # --- asking -----------------------------------------------------------------
    async def look(self, channels: Sequence[str], *, certain: bool = False) -> dict[str, View]:
        """Read where channels stand; documents first, so that what was trimmed away is below the floor.

        Raises ``errors.Unavailable``.
        """
        newest = await asyncio.gather(*(self.newest(channel, certain=certain) for channel in channels))
        states = await self.states(channels, certain=certain)
        return {channel: View(states.get(channel), record) for channel, record in zip(channels, newest, strict=True)}

    async def find(self, channel: str) -> Place | None:
        """Where a channel stands, if need be by reading; ``None`` if it is certain that nobody has published.

        Raises ``errors.Unavailable``.
        """
        place = self._places.get(channel)
        if place is None:
            asked_s = asyncio.get_running_loop().time()
            view = (await self.look([channel]))[channel]
            place = self.learn(channel, view, asked_s)
            if place is None and not view.end:
                state = (await self.states([channel], certain=True)).get(channel)
                if state is not None and state.epoch:
                    raise Stale(f"what was read of {channel!r} is older than what a majority has")
        return place

    async def see(self, channel: str) -> Place | None:
        """Read where a channel stands, whatever we know; ``None`` if a majority knows of no life.

        Raises ``errors.Unavailable``.
        """
        asked_s = asyncio.get_running_loop().time()
        view = (await self.look([channel]))[channel]
        return self.learn(channel, view, asked_s)

    async def newest(self, channel: str, *, certain: bool = False) -> Record | None:
        """The newest document of a channel's log."""
        limit = 1
        while True:
            async with self._looks:
                found = await self._server.find(
                    LOG, slots(channel), fields=("last", "time", "end"), newest=True, limit=limit, certain=certain
                )
            records = self.records(found)
            if records or len(found) < limit:
                return records[0] if records else None
            limit *= 4  # Only others' documents so far.

    async def last_versions(self, channels: Sequence[str]) -> dict[str, LastVersion]:
        """The last versions of channels, those of lives that are over included.

        A linearizable read each, since a stale answer would let in what is outdated.
        The log first: a version whose document was deleted meanwhile is then in its
        channel's.  Raises ``errors.Unavailable``.
        """
        if not channels:
            return {}
        logged = await asyncio.gather(*map(self._last_logged, channels))
        states = await self.states(channels)
        trimmed = [states[channel].version if channel in states else LastVersion() for channel in channels]
        return {channel: max(pair) for channel, *pair in zip(channels, logged, trimmed, strict=True)}

    async def _last_logged(self, channel: str) -> LastVersion:
        query = {"_id.channel": channel, "version": {"$exists": True}}
        fields = ("last", "time", "version")
        async with self._looks:
            found = await self._server.find(
                LOG, query, fields=fields, newest=True, by="_id.first", limit=1, certain=True
            )
        return max((record.version for record in self.records(found)), default=LastVersion())

    async def states(self, channels: Iterable[str], *, certain: bool = False) -> dict[str, Channel]:
        """The documents of channels, of those that have one."""
        query = {"_id": {"$in": list(channels)}}
        found = await self._server.find(CHANNELS, query, ordered=False, certain=certain)
        return {state.name: state for state in self.channels(found)}

    async def tops(self, channels: Iterable[str]) -> dict[str, Position]:
        """The newest position of each channel that has one, as ``mongo`` describes; raises ``errors.Unavailable``."""
        asked = list(dict.fromkeys(channels))
        confirmed = await self._confirm(asked)
        unsure = [channel for channel in asked if channel not in confirmed]
        absent = await self._see_all(unsure)
        if absent:
            # All that seem to be unknown in one linearizable read; whoever is found there is looked at again.
            states = await self.states(absent, certain=True)
            await self._see_all([channel for channel in absent if channel in states and states[channel].epoch])
        return {channel: place.position for channel in asked if (place := self._places.get(channel)) is not None}

    async def _confirm(self, channels: Sequence[str]) -> set[str]:
        """Which of ``channels`` stand where we know them, by one query for all of them, or two.

        There is no document right behind a top.  Nor was there one that is deleted
        by now: the place is trusted, or else the channel's document, read
        afterwards, tells of the same life and of no higher floor.
        """
        asked_s = asyncio.get_running_loop().time()
        known = {channel: (place, place.top) for channel in channels if (place := self._places.get(channel))}
        lapsed = [channel for channel, (place, _) in known.items() if not self._trusted(place)]
        news = await self._news({channel: top + 1 for channel, (_, top) in known.items()})
        lapsed = [channel for channel in lapsed if channel not in news]
        states = await self.states(lapsed) if lapsed else {}
        confirmed = set(known) - news
        for channel in lapsed:
            place, top = known[channel]
            state = states.get(channel)
            if state is None or state.epoch != place.epoch or state.floor > top:
                confirmed.discard(channel)
        for channel in confirmed:
            place, top = known[channel]
            if place.top == top:
                place.seen_s = asked_s
                place.seen_ms = self.now_ms
        return confirmed

    async def _see_all(self, channels: Sequence[str]) -> list[str]:
        """Look at many; returns those of whom nothing was found.

        Some at a time, so that what was learnt stays even if the caller's patience
        ends: of ten thousand that nobody knew, the next call then has fewer left.
        """
        absent: list[str] = []
        for start in range(0, len(channels), SEE_CHANNELS):
            absent += await self._see_some(channels[start : start + SEE_CHANNELS])
        return absent

    async def _see_some(self, channels: Sequence[str]) -> list[str]:
        loop = asyncio.get_running_loop()
        left = channels
        for attempt in range(TRIES):
            # Most channels that are followed and unknown were never published to: those cost no look at the log.
            states = await self.states(left) if left else {}
            present = [channel for channel in left if channel in states or channel in self._places]
            asked_s = loop.time()
            stale = []
            for channel, view in (await self.look(present)).items() if present else ():
                try:
                    self.learn(channel, view, asked_s)
                except Stale:
                    stale.append(channel)
            if not stale:
                break
            if attempt == TRIES - 1:
                raise Stale(f"what was read of {stale[0]!r} is older than what was known")
            await asyncio.sleep(0.02 * 2**attempt)
            left = stale
        return [channel for channel in channels if channel not in self._places]

    async def _news(self, slots_: dict[str, int]) -> set[str]:
        """Those channels that have a document at the given slot."""
        ids = [{"channel": channel, "first": slot} for channel, slot in slots_.items()]
        found: list[Document] = []
        for start in range(0, len(ids), IN_ONE_QUERY):
            query = {"_id": {"$in": ids[start : start + IN_ONE_QUERY]}}
            found += await self._server.find(LOG, query, fields=("_id",), ordered=False)
        return {document["_id"]["channel"] for document in found}

    # --- documents --------------------------------------------------------------
    def records(self, documents: Iterable[Document]) -> list[Record]:
        """The records among ``documents`` of the log; what is not ours is skipped, and named in a warning."""
        return self._ours(LOG, documents, Record.of)

    def channels(self, documents: Iterable[Document]) -> list[Channel]:
        """The same for documents of ``channels``."""
        return self._ours(CHANNELS, documents, Channel.of)

    def _ours(self, collection: str, documents: Iterable[Document], read: Callable[[Document], T | None]) -> list[T]:
        found = []
        for document in documents:
            one = read(document)
            if one is None:
                self.skip(collection, document)
            else:
                found.append(one)
        return found

    def skip(self, collection: str, document: Document) -> None:
        """Warn of a document that is not ours, once."""
        name = f"{collection} {document.get('_id')!r}"
        if name not in self._skipped and len(self._skipped) < SKIPPED:
            self._skipped.add(name)
            event(
                "history.document_skipped",
                path=self._server.place,
                collection=collection,
                document=repr(document.get("_id")),
            )


def _bound(mapping: OrderedDict[str, Place] | OrderedDict[str, Position], most: int) -> None:
    if len(mapping) > most:
        mapping.popitem(last=False)  # in a plain dict the first one is behind all that were deleted before it
