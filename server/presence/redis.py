"""Presence over all processes that share a Redis: alone, behind Sentinels, or a cluster.

What stands in Redis is told in ``scripts``, how commands get there in ``lines``.

**Whose entry.**  A process takes a random name when it starts, and a number
behind it that grows whenever its lease has run out: name and number are its
incarnation.  An entry names its incarnation; who adds a client last owns it, and
only a process that owns an entry can remove it.

**Whose clock.**  A lease is judged by the clock of the Redis that holds all
leases, inside a script, so the clocks of the processes may be wrong by any
amount; the ``now`` that callers give is used for nothing but the patience with
strays (below), and there only its differences.  Once any sweep has found a lease
lapsed, that is final.  (If a failover moves the leases to a machine whose clock is
ahead by more than a lease, everybody registers anew; if it is behind, the dead stay
for so much longer.)

**Reading.**  First the channel, then the leases: an incarnation registers before
it adds, so one that is found in a channel and not among the leases is gone for
good.  Nothing is cached.  Those who ask for the same channel while a read is under
way share the next, so a crowd that looks around does not multiply the reading.

**Sweeping.**  Each survivor takes channels of a dead incarnation at random, at most
100 entries by one script, which deletes and returns them in one step: an entry
is taken by exactly one.  An answer that was lost is asked for again by the same
token and comes again.  A leave is therefore lost only if a survivor dies after its
script ran and before its node has announced, which is as long as one ``sweep`` takes,
some ``SWEPT_AT_ONCE`` entries; and never said twice.

**What is late.**  A command whose answer never came may still arrive, after newer
ones.  Every entry has a stamp, and older stamps change nothing; a removal that follows
an ``add`` of unknown outcome is said again for a while, since there may be no entry yet
to hold its stamp.

**What is lost.**  A Redis that comes back may know less than it did: nothing, or all
but the last moments after a failover.  If the lease is gone, ``renew`` says so, and
the node adds everything again.  Otherwise, since every such end breaks connections,
all our entries are entered again, quietly, after a connection had to be made anew.
Entries of an incarnation that nobody remembers (its lease was lost, or it added one in
its last breath) are *strays*: never shown, and swept a lease after they were noticed.
"""

import asyncio
import functools
import secrets
from collections import Counter
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any, TypeVar

from server.errors import Unavailable
from server.observe import event
from server.presence import Presence
from server.presence.lines import Lines
from server.presence.scripts import (
    ADD,
    INCARNATION,
    KEPT_ANSWER_S,
    LAPSED,
    LEASES,
    PAGE,
    PAGE_ENTRIES,
    PROCESS,
    REMOVE,
    RENEW,
    STATS,
    STATS_WITHOUT,
    SWEEP,
    SWEPT_BY_SCRIPT,
    Keys,
    Script,
    from_entry,
    owner_of,
    to_entry,
    to_stamp,
)
from server.redis import parse
from server.settings import RedisSettings
from server.stream import ClientInfo

PATIENCE_S = 2.0
"""How long a method waits for Redis before it raises ``errors.Unavailable``; ``open`` and ``close`` wait twice that."""

SWEPT_AT_ONCE = 2_000
"""When a sweep has taken so many entries it returns them, so that the leaves are announced soon."""

CHANNELS_AT_ONCE = 32
"""How many channels of a dead incarnation a sweep works on at a time; it may return so many hundreds more."""

ENTERED_AT_ONCE = 100
"""How many entries are entered again at a time."""

SAID_AGAIN = 24
"""In how many sweeps a removal is said again whose ``add`` may still be on its way: about a minute of them."""

MOST_DOUBTS = MOST_STRAYS = 10_000
"""Of how many doubtful entries and of how many strays a process takes note at a time."""

WRITE, READ, LEASE = "write", "read", "lease"
"""Lines of their own, so that renewing waits for no crowd, and writing for no reader."""

_Result = TypeVar("_Result")
_Place = tuple[str, str]
"""A channel, and a client or an incarnation in it."""


class RedisPresence(Presence):
    """See ``Presence``; ``lease_s`` is how long after its last ``renew`` a process is believed alive."""

    def __init__(self, settings: RedisSettings, lease_s: float) -> None:
        self._settings = settings
        self._lease_ms = int(lease_s * 1000)
        self._lease_s = lease_s
        self._keys = Keys(settings.prefix)
        self._lines: Lines | None = None
        self._opened = False
        self._process = secrets.token_hex(PROCESS // 2)
        self._number = 0
        self._stamp = 0
        self._held: dict[str, dict[str, tuple[ClientInfo, int]]] = {}
        self._noted: set[str] = set()
        self._adding: Counter[str] = Counter()
        self._entering: dict[_Place, int] = {}
        self._doubts: dict[_Place, tuple[int, int] | None] = {}
        self._tokens: dict[_Place, int] = {}
        self._strays: dict[_Place, float | None] = {}
        self._just_lapsed = False
        self._forgetful = False
        self._reads: dict[str, list[asyncio.Task[dict[str, ClientInfo]]]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        return f"<RedisPresence {self._incarnation} channels={len(self._held)}>"

    @property
    def _incarnation(self) -> str:
        return f"{self._process}{self._number:0{INCARNATION - PROCESS}x}"

    # --- life -----------------------------------------------------------------
    async def open(self, now: float) -> None:
        """See ``Presence.open``."""
        try:
            address = parse(self._settings.url)
        except ValueError as error:
            raise Unavailable(str(error)) from None
        self._number += 1
        lines = self._lines = Lines(address, self._on_return)
        try:
            async with asyncio.timeout(2 * PATIENCE_S):
                await lines.run(LEASE, RENEW, [self._keys.leases], "", self._lease_ms, self._incarnation)
        except TimeoutError:
            await self._drop()
            raise Unavailable(f"redis.url: {address.text} did not answer within {2 * PATIENCE_S:g} s") from None
        except BaseException:
            await self._drop()
            raise
        self._opened = True

    async def close(self) -> None:
        """See ``Presence.close``."""
        if not self._opened:
            return
        self._opened = False
        try:
            async with asyncio.timeout(2 * PATIENCE_S):
                while not await self._sweep_incarnation(self._incarnation, []):
                    pass
        except (Unavailable, TimeoutError) as error:
            event("presence.unavailable", why=f"the entries stay until the lease ends ({error or 'no answer in time'})")
        await self._drop()

    async def _drop(self) -> None:
        lines, self._lines = self._lines, None
        if lines is not None:
            await lines.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)  # which now get no answer any more
        self._forget()

    def _forget(self) -> None:
        """Hold nothing any more: what was entered belongs to an incarnation that is gone."""
        self._held.clear()
        self._noted.clear()

    # --- one client -----------------------------------------------------------
    async def add(self, channel: str, info: ClientInfo) -> None:
        """See ``Presence.add``."""
        self._require_open()
        place, stamp = (channel, info.client), self._next_stamp()
        self._entering[place] = stamp
        try:
            await self._within(self._add(channel, info, stamp))
        except (Unavailable, asyncio.CancelledError):
            self._doubt(place)
            raise
        else:
            if self._entering.get(place) == stamp:  # else it was removed or added again meanwhile
                self._held.setdefault(channel, {})[info.client] = info, stamp
        finally:
            if self._entering.get(place) == stamp:
                del self._entering[place]

    async def _add(self, channel: str, info: ClientInfo, stamp: int) -> None:
        while True:
            incarnation = self._incarnation
            self._adding[channel] += 1
            try:
                await self._note(channel)
                await self._enter(channel, info, stamp, incarnation)
            finally:
                self._adding[channel] -= 1
                if not self._adding[channel]:
                    del self._adding[channel]
            if incarnation == self._incarnation:
                return  # else the lease ended on the way, and the entry is a dead one's

    async def _note(self, channel: str) -> None:
        """See that whoever sweeps this incarnation finds ``channel``."""
        if channel not in self._noted:
            incarnation = self._incarnation
            await self._live.ask(WRITE, "SADD", self._keys.channels(incarnation), channel)
            if incarnation == self._incarnation:
                self._noted.add(channel)

    async def _enter(self, channel: str, info: ClientInfo, stamp: int, incarnation: str, again: str = "") -> None:
        self._require_open()
        entry = to_entry(incarnation, stamp, info)
        await self._live.run(WRITE, ADD, self._channel_keys(channel), info.client, entry, again)

    async def remove(self, channel: str, client: str) -> bool:
        """See ``Presence.remove``."""
        self._require_open()
        place, stamp = (channel, client), self._next_stamp()
        self._entering.pop(place, None)
        held = self._held.get(channel, {})
        held.pop(client, None)
        if not held:
            self._held.pop(channel, None)
        if place in self._doubts:
            self._doubts[place] = stamp, SAID_AGAIN
        return await self._within(self._remove(channel, client, stamp))

    async def _remove(self, channel: str, client: str, stamp: int) -> bool:
        incarnation = self._incarnation
        keys = self._channel_keys(channel)
        taken, left = await self._answer(WRITE, REMOVE, keys, client, incarnation, to_stamp(stamp))
        if not left and incarnation == self._incarnation and channel in self._noted and not self._adding[channel]:
            # On the line to that key this goes before the SADD of any add that comes later.
            self._noted.discard(channel)
            self._live.say(WRITE, "SREM", self._keys.channels(incarnation), channel)
        return bool(taken)

    def _doubt(self, place: _Place) -> None:
        while len(self._doubts) >= MOST_DOUBTS:
            del self._doubts[next(iter(self._doubts))]
        self._doubts.setdefault(place, None)

    # --- reading --------------------------------------------------------------
    async def members(self, channel: str, now: float) -> dict[str, ClientInfo]:
        """See ``Presence.members``; who asks while others do gets the same dict, so it is not to be changed."""
        self._require_open()
        return await self._within(asyncio.shield(self._shared_read(channel)))

    def _shared_read(self, channel: str) -> "asyncio.Task[dict[str, ClientInfo]]":
        """A read that has not begun yet: after the one that is under way, if there is one."""
        reads = self._reads.setdefault(channel, [])
        if len(reads) == 2:
            return reads[1]
        task = self._spawn(self._read_after(reads[0] if reads else None, channel), f"presence of {channel}")
        reads.append(task)
        task.add_done_callback(functools.partial(self._has_read, channel))
        task.add_done_callback(_heard)
        return task

    def _has_read(self, channel: str, task: "asyncio.Task[dict[str, ClientInfo]]") -> None:
        reads = self._reads[channel]
        reads.remove(task)
        if not reads:
            del self._reads[channel]

    async def _read_after(
        self, earlier: "asyncio.Task[dict[str, ClientInfo]] | None", channel: str
    ) -> dict[str, ClientInfo]:
        if earlier is not None:
            await asyncio.wait([earlier])
        [entries] = self._keys.of(channel, "entries")
        found: dict[bytes, bytes] = {}
        cursor = b"0"
        while True:
            cursor, page = await self._answer(READ, PAGE, [entries], cursor, PAGE_ENTRIES)
            found.update(zip(page[::2], page[1::2], strict=True))
            if cursor == b"0":
                break
        if not found:
            return {}
        live, lapsed = await self._leases()
        self._notice_strays(channel, {owner_of(entry) for entry in found.values()} - live - lapsed)
        return {
            client.decode(): from_entry(client, entry) for client, entry in found.items() if owner_of(entry) in live
        }

    async def stats(self, channel: str, now: float) -> tuple[int, int]:
        """See ``Presence.stats``."""
        self._require_open()
        return await self._within(self._stats(channel))

    async def _stats(self, channel: str) -> tuple[int, int]:
        keys = self._channel_keys(channel)
        users, flat = await self._answer(READ, STATS, keys)
        counts = {incarnation.decode(): int(count) for incarnation, count in zip(flat[::2], flat[1::2], strict=True)}
        if not counts:
            return 0, 0
        live, lapsed = await self._leases()
        self._notice_strays(channel, counts.keys() - live - lapsed)
        gone = counts.keys() - live
        if gone:
            clients, users = await self._answer(READ, STATS_WITHOUT, keys, *gone)
            return clients, users
        return sum(counts.values()), users

    async def _leases(self) -> tuple[set[str], set[str]]:
        """The incarnations that are alive, and those that are dead and not yet cleared away."""
        live, lapsed = await self._answer(READ, LEASES, [self._keys.leases])
        return {one.decode() for one in live}, {one.decode() for one in lapsed}

    def _notice_strays(self, channel: str, incarnations: Iterable[str]) -> None:
        for incarnation in incarnations:
            if len(self._strays) < MOST_STRAYS:
                self._strays.setdefault((channel, incarnation), None)

    # --- leases ---------------------------------------------------------------
    async def renew(self, now: float) -> bool:
        """See ``Presence.renew``."""
        self._require_open()
        return await self._within(self._renew())

    async def _renew(self) -> bool:
        number = self._number
        following = f"{self._process}{number + 1:0{INCARNATION - PROCESS}x}"
        in_time = await self._answer(LEASE, RENEW, [self._keys.leases], self._incarnation, self._lease_ms, following)
        self._just_lapsed = not in_time
        if not in_time and number == self._number:
            self._number += 1
            self._forget()
        self._live.probe()
        forgetful, self._forgetful = self._forgetful, False
        if in_time and forgetful:
            self._spawn(self._enter_again(), "enter again").add_done_callback(_ended)
        return bool(in_time)

    def _on_return(self) -> None:
        self._forgetful = True

    async def _enter_again(self) -> None:
        """Enter all that we hold again: a connection is new, and what its server knows may be old."""
        incarnation, count = self._incarnation, 0
        places = [(channel, client) for channel, clients in self._held.items() for client in clients]
        try:
            for channel in {channel for channel, _ in places}:
                await self._live.ask(WRITE, "SADD", self._keys.channels(incarnation), channel)
            for start in range(0, len(places), ENTERED_AT_ONCE):
                if incarnation != self._incarnation:
                    return  # the lease has run out, and the node adds everything again
                some = places[start : start + ENTERED_AT_ONCE]
                await _all_of([self._enter_held(*place, incarnation) for place in some])
                count += len(some)
        except Unavailable:
            self._forgetful = True  # at the next renewal
        else:
            if count:
                event("presence.entered_again", count=count)

    async def _enter_held(self, channel: str, client: str, incarnation: str) -> None:
        # Nothing waits between finding it held and queueing its entry, and a removal would be
        # queued behind that: nobody who has left is entered here.
        held = self._held.get(channel, {}).get(client)
        if held is not None:
            await self._enter(channel, *held, incarnation, again="1")

    # --- sweeping -------------------------------------------------------------
    async def sweep(self, now: float) -> list[tuple[str, ClientInfo]]:
        """See ``Presence.sweep``."""
        self._require_open()
        if self._just_lapsed:
            # If our own lease ran out it may have been Redis that was away, and all others are
            # about to add their members again: nobody is judged until the next renewal.
            return []
        swept: list[tuple[str, ClientInfo]] = []
        try:
            await self._within(self._say_removals_again())
            await _all_of([self._sweep_place(*place, swept) for place in self._tokens])
            await _all_of([self._sweep_place(*place, swept) for place in self._old_strays(now)])
            for incarnation in await self._within(self._answer(WRITE, LAPSED, [self._keys.leases])):
                if incarnation.decode() != self._incarnation:
                    await self._sweep_incarnation(incarnation.decode(), swept)
        except Unavailable:
            if not swept:
                raise
            # What was taken must be announced; the rest is there for the next sweep.
        return swept

    async def _say_removals_again(self) -> None:
        await _all_of([self._say_again(place, *said) for place, said in self._doubts.items() if said is not None])

    async def _say_again(self, place: _Place, stamp: int, times: int) -> None:
        channel, client = place
        await self._answer(WRITE, REMOVE, self._channel_keys(channel), client, self._incarnation, to_stamp(stamp))
        if self._doubts.get(place) == (stamp, times):
            if times > 1:
                self._doubts[place] = stamp, times - 1
            else:
                del self._doubts[place]

    def _old_strays(self, now: float) -> list[_Place]:
        """Strays that have had a lease's time to be entered again by their process, if the leases were lost."""
        old = [place for place, since in self._strays.items() if since is not None and now - since > self._lease_s]
        for place in old:
            del self._strays[place]
        for place, since in self._strays.items():
            if since is None:
                self._strays[place] = now
        return old

    async def _sweep_incarnation(self, incarnation: str, swept: list[tuple[str, ClientInfo]]) -> bool:
        """Clear away what ``incarnation`` left; returns whether that was all."""
        channels = self._keys.channels(incarnation)
        while len(swept) < SWEPT_AT_ONCE:
            # At random, so that several survivors work on different channels.
            some = await self._within(self._live.ask(WRITE, "SRANDMEMBER", channels, str(CHANNELS_AT_ONCE)))
            assert isinstance(some, list)
            if not some:
                await self._within(self._live.ask(WRITE, "ZREM", self._keys.leases, incarnation))
                return True
            await _all_of([self._sweep_place(channel.decode(), incarnation, swept) for channel in some])
        return False

    async def _sweep_place(self, channel: str, incarnation: str, swept: list[tuple[str, ClientInfo]]) -> None:
        """Clear away what ``incarnation`` left in ``channel``, or a part if that is much."""
        place = channel, incarnation
        while True:
            # The same token until an answer came: a script whose answer was lost says it again.
            token = self._tokens.setdefault(place, self._next_stamp())
            keys = self._keys.of(channel, "entries", "counts", "users", f"swept:{self._process}{to_stamp(token)}")
            run = self._answer(WRITE, SWEEP, keys, incarnation, SWEPT_BY_SCRIPT, KEPT_ANSWER_S)
            left, *taken = await self._within(run)
            if self._tokens.pop(place, None) != token:
                return
            swept.extend(
                (channel, from_entry(client, entry)) for client, entry in zip(taken[::2], taken[1::2], strict=True)
            )
            if int(left) == 0:
                await self._within(self._live.ask(WRITE, "SREM", self._keys.channels(incarnation), channel))
                return
            if len(swept) >= SWEPT_AT_ONCE:
                return

    # --- asking ---------------------------------------------------------------
    def _require_open(self) -> None:
        if not self._opened:
            raise Unavailable("presence is not open")

    @property
    def _live(self) -> Lines:
        if self._lines is None:
            raise Unavailable("presence is not open")
        return self._lines

    def _channel_keys(self, channel: str) -> tuple[str, ...]:
        return self._keys.of(channel, "entries", "counts", "users")

    def _next_stamp(self) -> int:
        self._stamp += 1
        return self._stamp

    async def _answer(self, purpose: str, script: Script, keys: Iterable[str], *args: str | bytes | int) -> Any:
        return await self._live.run(purpose, script, tuple(keys), *args)

    async def _within(self, work: Awaitable[_Result]) -> _Result:
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await work
        except TimeoutError:
            raise Unavailable(f"redis.url: presence had no answer within {PATIENCE_S:g} s") from None

    def _spawn(self, work: Coroutine[Any, Any, _Result], name: str) -> "asyncio.Task[_Result]":
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _heard(task: "asyncio.Task[Any]") -> None:
    """Its end is told to those who wait for it, of whom there may be none left."""
    if not task.cancelled():
        task.exception()


def _ended(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (fault := task.exception()) is not None:
        event("task.failed", task=task.get_name(), fault=fault)


async def _all_of(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Let all come to their end, then raise what the first of them raised."""
    ends = await asyncio.gather(*works, return_exceptions=True)
    for end in ends:
        if isinstance(end, BaseException):
            raise end
