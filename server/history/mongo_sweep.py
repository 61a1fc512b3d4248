"""Destruction in MongoDB: retention, removal, redaction, the end of lives.

Everything goes in the same order: the floor (or the end) is written first, by a
majority; then what is below is erased, that is, loses its publications; and
after ``GUARD_MS``, or when its last key has expired, it is deleted.  Each step may
be the last one of a process: the next sweep, of whichever process, finds
``erased`` behind the floor, or an end that the channel does not know of, and
goes on from there.

A sweep looks at channels that this process lately wrote to, and at some of the
round: all channels there are, some at a time, so that what a dead process left
is found as well.  Nothing that clients see depends on how far it is: reads judge
by retention themselves.
"""

import asyncio
import secrets
from collections.abc import Sequence
from typing import NamedTuple

from server.errors import UNRECOVERABLE_POSITION, Refused, Unavailable
from server.history import Retention, RetentionOf, forgets, random_epoch
from server.history.mongo_places import Places
from server.history.mongo_scheme import (
    CHANNELS,
    GUARD_MS,
    LOG,
    Channel,
    Document,
    LastVersion,
    Record,
    after_end,
    end_document,
    erasure,
    slots,
    trimming,
    unerased,
)
from server.history.mongo_server import Fate, MongoServer

SWEEP_CHANNELS = 200
ROUND_CHANNELS = 20
FEW_RECORDS = 4
SWEEP_RECORDS = 200
SWEEP_DUE = 2_000
ERASE_RECORDS = 1_000
ERASE_STEPS = 5
TOUCHED = 10_000
TRIES = 5
AT_ONCE = 8


class _Plan(NamedTuple):
    """What a sweep has to do in one channel."""

    state: Channel
    floor: int
    used_ms: int
    top: int
    forget: bool
    whole: bool
    version: LastVersion = LastVersion()


class _End(NamedTuple):
    """The slot at which a life ends; with ``epoch`` the next one begins there."""

    channel: str
    slot: int
    epoch: str = ""
    used_ms: int = 0


class Sweep:
    """Destroys, at the word of the contract's methods, and only then."""

    def __init__(self, server: MongoServer, places: Places, *, ttl_ms: int) -> None:
        self._server = server
        self._places = places
        self._ttl_ms = ttl_ms
        # Channels lately written to: a set that keeps its order.
        self._touched: dict[str, None] = {}
        self._round_after = ""

    def touch(self, channel: str) -> None:
        """Let the sweep look at ``channel`` soon; beyond the bound the round finds it."""
        if len(self._touched) < TOUCHED:
            self._touched[channel] = None

    # --- the sweep --------------------------------------------------------------
    async def sweep(self, retention_of: RetentionOf, now_ms: int) -> None:
        """Do a bounded amount of what is to be done; raises ``errors.Unavailable``, call it again."""
        touched = list(self._touched)[:SWEEP_CHANNELS]
        # Taken off before anything waits: what is committed meanwhile puts them back.
        for channel in touched:
            del self._touched[channel]
        unfinished = touched
        try:
            states = await self._places.states(touched) if touched else {}
            states.update(await self._next_round())
            kept = [(state, retention) for state in states.values() if (retention := retention_of(state.name))]
            plans = await self._plans(kept, now_ms)
            await self._trim([plan for plan in plans if plan.floor > plan.state.floor], now_ms)
            behind = [plan.state for plan in plans if plan.state.floor > plan.state.erased]
            for state in behind[:ERASE_STEPS]:
                await self._erase_step(state.name, state.erased, state.floor, now_ms)
            await self._erase([plan for plan in plans if plan.floor > plan.state.erased == plan.state.floor], now_ms)
            await self._end([_End(plan.state.name, plan.top + 1) for plan in plans if plan.forget], now_ms)
            await self._bury([state for state in states.values() if not state.epoch], now_ms)
            await self._see_to_due(now_ms)
            unfinished = [plan.state.name for plan in plans if not plan.whole] + [state.name for state in behind]
        finally:
            for channel in unfinished:
                self.touch(channel)

    async def _next_round(self) -> dict[str, Channel]:
        query = {"_id": {"$gt": self._round_after}}
        found = await self._server.find(CHANNELS, query, limit=ROUND_CHANNELS)
        names = [document["_id"] for document in found if isinstance(document["_id"], str)]
        self._round_after = names[-1] if len(found) == ROUND_CHANNELS and names else ""
        return {state.name: state for state in self._places.channels(found)}

    async def _plans(self, kept: Sequence[tuple[Channel, Retention]], now_ms: int) -> list[_Plan]:
        limit = asyncio.Semaphore(AT_ONCE)

        async def plan(state: Channel, retention: Retention) -> _Plan:
            async with limit:
                return await self._plan(state, retention, now_ms)

        return list(await asyncio.gather(*(plan(*pair) for pair in kept)))

    async def _plan(self, state: Channel, retention: Retention, now_ms: int) -> _Plan:
        """Decide by the oldest documents that count, and the newest one.

        As a rule a few show that nothing more is gone; many are asked for only when those are.
        """
        for limit in (FEW_RECORDS, SWEEP_RECORDS):
            found = await self._server.find(
                LOG, slots(state.name, state.floor), fields=("last", "time", "end", "version"), limit=limit
            )
            records = self._places.records(found)
            whole = len(found) < limit
            newest = records[-1] if whole and records else None if whole else await self._places.newest(state.name)
            if newest is not None and newest.ends:
                # Whoever ended this life did not come to say so in its channel.
                await self._after_end([_End(state.name, newest.first)], now_ms)
                return _Plan(state, 0, 0, 0, False, True)
            top = newest.last if newest is not None else state.floor
            gone = [record for record in records if _is_gone(record, retention, top, now_ms)]
            if whole or len(gone) < len(records):
                break
        floor = gone[-1].last if gone else state.floor
        used_ms = gone[-1].time_ms if gone else state.used_ms
        version = max((record.version for record in gone), default=LastVersion())
        forget = state.epoch != "" and floor == top and forgets(retention, used_ms, now_ms)
        return _Plan(state, floor, used_ms, top, forget, whole or len(gone) < len(records), version)

    async def _trim(self, plans: Sequence[_Plan], now_ms: int) -> None:
        changes: list[tuple[Document, Document]] = []
        for plan in plans:
            query: Document = {"_id": plan.state.name, "epoch": plan.state.epoch, "base": plan.state.base}
            changes.append((query, trimming(plan.floor, plan.used_ms, plan.version)))
        await self._server.update_each(CHANNELS, changes)

    async def _erase(self, plans: Sequence[_Plan], now_ms: int) -> None:
        """Erase what has just come below the floors, and note that it was."""
        erasures: list[tuple[Document, Document]] = []
        notes: list[tuple[Document, Document]] = []
        for plan in plans:
            erasures.append((unerased(plan.state.name, plan.state.erased, plan.floor), erasure(now_ms)))
            notes.append(({"_id": plan.state.name}, {"$max": {"erased": plan.floor}}))
        await self._server.update_each(LOG, erasures)
        await self._server.update_each(CHANNELS, notes)

    async def _bury(self, ended: Sequence[Channel], now_ms: int) -> None:
        """Delete the last trace of channels whose life ended so long ago that nobody remembers it."""
        for state in ended:
            # Asked for from the end on: its document outlives all that is older, except for keys, which go with it.
            if state.ended_ms + GUARD_MS + self._ttl_ms < now_ms and state.erased >= state.floor:
                left = await self._server.find(LOG, slots(state.name), fields=("last",), limit=1)
                if not left:
                    await self._server.delete(CHANNELS, {"_id": state.name, "epoch": "", "base": state.base})

    async def _see_to_due(self, now_ms: int) -> None:
        """Delete erased documents after their time, and free expired keys in those that are kept."""
        found = await self._server.find(
            LOG, {"due": {"$lte": now_ms}}, fields=("last",), ordered=False, limit=SWEEP_DUE
        )
        if not found:
            return
        ids = {"_id": {"$in": [document["_id"] for document in found]}, "due": {"$lte": now_ms}}
        await self._server.delete(LOG, {**ids, "pubs": {"$exists": False}})
        await self._server.update(LOG, {**ids, "pubs": {"$exists": True}}, {"$unset": {"keys": "", "due": ""}})

    # --- ends -------------------------------------------------------------------
    async def _end(self, ends: Sequence[_End], now_ms: int) -> set[str]:
        """End lives, each at the slot behind its top; returns in which channels, since others may be published to.

        Raises ``errors.Unavailable``: perhaps they have ended.
        """
        if not ends:
            return set()
        documents = [end_document(end.channel, end.slot, now_ms, secrets.token_bytes(12)) for end in ends]
        fates, why = await self._server.insert(documents)
        ended = [end for end, fate in zip(ends, fates, strict=True) if fate is Fate.STORED]
        await self._after_end(ended, now_ms)
        if Fate.UNKNOWN in fates:
            raise Unavailable(why)
        return {end.channel for end in ended}

    async def _after_end(self, ends: Sequence[_End], now_ms: int) -> None:
        """Let channels know that their lives have ended."""
        changes: list[tuple[Document, Document]] = []
        for end in ends:
            query: Document = {"_id": end.channel, "base": {"$lt": end.slot}}
            changes.append((query, after_end(end.slot, end.epoch, end.used_ms, now_ms)))
        await self._server.update_each(CHANNELS, changes)
        for end in ends:
            self._places.forget(end.channel)

    async def new_epochs(self, now_ms: int) -> int:
        """End the life of every channel, and begin another; raises ``errors.Unavailable``, call it again."""
        count, after = 0, ""
        while True:
            found = await self._server.find(CHANNELS, {"_id": {"$gt": after}}, limit=SWEEP_CHANNELS)
            for state in self._places.channels(found):
                count += await self._renew(state.name, now_ms)
            if len(found) < SWEEP_CHANNELS:
                return count
            after = found[-1]["_id"]

    async def _renew(self, channel: str, now_ms: int) -> bool:
        """Begin ``channel`` anew, whoever writes to it meanwhile; false if it has no epoch."""
        for _ in range(TRIES):
            view = (await self._places.look([channel]))[channel]
            state = view.state
            if state is None or not view.alive:
                return False
            newest = view.newest
            used_ms = newest.time_ms if newest is not None and newest.first > state.base else state.used_ms
            if await self._end([_End(channel, view.top + 1, random_epoch(), used_ms)], max(now_ms, used_ms)):
                self.touch(channel)
                return True
        raise Unavailable(f"{self._server.place}: {channel!r} is being published to; stop all servers first")

    # --- one channel ------------------------------------------------------------
    async def remove(self, channel: str, now_ms: int) -> None:
        """Raise the floor to the top, and erase; the sweep erases what is many.

        Raises ``errors.Unavailable``, call it again.
        """
        view = (await self._places.look([channel], certain=True))[channel]
        state, newest = view.state, view.newest
        if state is None or not view.alive:
            return
        if newest is not None and newest.last > state.floor:
            query: Document = {"_id": channel, "epoch": state.epoch, "base": state.base}
            # What has come since the look is below no floor yet, but a version is no less true for being known early.
            version = (await self._places.last_versions([channel]))[channel]
            if not await self._server.update(CHANNELS, query, trimming(newest.last, newest.time_ms, version)):
                return  # Its life has ended meanwhile, and everything went with it.
        erased = state.erased
        for _ in range(ERASE_STEPS):
            if erased < view.top:
                erased = await self._erase_step(channel, erased, view.top, now_ms)
        self.touch(channel)

    async def _erase_step(self, channel: str, erased: int, floor: int, now_ms: int) -> int:
        """Erase the next ``ERASE_RECORDS`` documents below ``floor``, and note it; returns up to where."""
        found = await self._server.find(LOG, slots(channel, erased, floor), fields=("last",), limit=ERASE_RECORDS)
        upto: int = found[-1]["_id"]["first"] if len(found) == ERASE_RECORDS else floor
        await self._server.update(LOG, unerased(channel, erased, upto), erasure(now_ms))
        await self._server.update(CHANNELS, {"_id": channel}, {"$max": {"erased": upto}})
        return upto

    async def redact(self, channel: str, offset: int) -> None:
        """Put ``null`` in place of one payload.

        Raises ``errors.Refused`` (112): it is not there; ``errors.Unavailable``.
        """
        while True:
            view = (await self._places.look([channel], certain=True))[channel]
            state = view.state
            slot = offset + (state.base if state else 0)
            if state is None or not view.alive or not state.floor < slot <= view.top:
                break
            (record,) = self._places.records(
                await self._server.find(LOG, slots(channel, state.floor, slot), newest=True, limit=1)
            ) or (None,)
            if record is None or record.packed is None or not record.publications(0) or slot > record.last:
                break
            # Only if it is still as we read it: somebody may redact its neighbour.  Whoever is late has one neighbour
            # less to be late for, so that this ends, however many there are.
            query: Document = {"_id": {"channel": channel, "first": record.first}, "pubs": record.packed}
            redacted = record.redacted(slot)
            if redacted == record.packed or await self._server.update(LOG, query, {"$set": {"pubs": redacted}}):
                return
        raise Refused(UNRECOVERABLE_POSITION, f"{channel!r} has no publication {offset} to redact")


def _is_gone(record: Record, retention: Retention, top: int, now_ms: int) -> bool:
    """Does retention call all of ``record`` gone?"""
    if retention.size >= 0 and record.last <= top - retention.size:
        return True
    return retention.ttl_ms >= 0 and record.time_ms <= now_ms - retention.ttl_ms
