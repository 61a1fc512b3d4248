"""Who is blocked, as this process knows it: asked at every door, and kept true by what others tell and by reading.

A process has a copy of what the store holds (``server/blocks``).  It is asked of it for
each connection, subscription and publication, so that must cost next to nothing: it is
one look into ``users``, which is empty while nobody is blocked.

Who changes something does so in the store first, then here, then tells the other
processes, which is what makes it quick; that word can be lost, so everybody also reads
what is new each ``READ_S``, and everything now and then, and when the broker is back.  Revisions say which
of two things heard is the later one, so it does not matter in which order they come.

What is taken in is carried out in the same breath: the user's connections are ended, or
their subscriptions.  Who is just coming has not been among them, and so is asked about
once more where a connection is entered, and where a subscription is (``Node.admit``,
``subscribing.join``).

While the store is away what was read last holds.  A process that starts while it is away
knows of no block yet; it is not ready then (PROTOCOL 17.0.5).

PROTOCOL 10.5.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from itertools import islice
from typing import Literal, Protocol

from server.blocks import Block, Blocks, Record
from server.errors import FORBIDDEN, FORCE_DISCONNECT, PERMISSION_DENIED, Disconnect, Disconnected, Refused, Unavailable
from server.observe import event

READ_S = 10.0
"""How often what is new is read."""

MARGIN_MS = 600_000
"""By how much the clocks of processes may differ before a change of which no word came is only found with all."""

READ_ALL_S = 300.0
"""How often everything is read."""

SLICE = 200
"""How many records are taken in in one turn of the loop."""

Deed = Literal["subscribe", "publish", "history", "presence"]


class Blockable(Protocol):
    """What is asked of a connection."""

    def disconnect(self, disconnect: Disconnect, why: str = "") -> None:
        """End it."""

    def unsubscribe_by_order(self, channel: str) -> None:
        """End its subscription of ``channel``."""


class Blocking:
    """See the module's docstring; ``connections`` gives those that a user has here, ``clock`` Unix seconds."""

    def __init__(
        self, blocks: Blocks, connections: Callable[[str], Iterable[Blockable]], clock: Callable[[], float]
    ) -> None:
        self._blocks = blocks
        self._connections = connections
        self._clock = clock
        self.users: dict[str, dict[tuple[str, bool], Block]] = {}
        """Those of whom anything may hold, and what, by channel and whether it mutes; nobody else is asked about."""
        self._records: dict[str, Record] = {}
        self._due: list[tuple[int, str, int]] = []
        """A heap: when a record can be forgotten (Unix ms), whose, and which revision of it."""
        self._ordered: list[str] | None = None
        """The users in the order of their ids, if somebody has asked since they changed."""
        self._newest = 0
        self._read_at = self._all_read_at = 0.0
        self._wants_all = True
        self.trouble = ""
        """What keeps the store from being read, in operator's words; empty if nothing."""

    def __repr__(self) -> str:
        return f"<Blocking {len(self.users)} users>"

    # --- asking -----------------------------------------------------------------------
    def check_user(self, user: str) -> None:
        """Raises ``Disconnected(FORBIDDEN)`` if ``user`` may not be here."""
        if user in self.users and self._holding(user, "", muted=False):
            raise Disconnected(FORBIDDEN, "the user is blocked (block_user)")

    def check(self, deed: Deed, user: str, channel: str) -> None:
        """Raises ``Refused(PERMISSION_DENIED)`` if ``user`` may not do that in ``channel``; ``why`` names the block."""
        if user not in self.users:
            return
        if self._holding(user, "", muted=False):
            raise Refused(PERMISSION_DENIED, "the user is blocked (block_user)")
        if self._holding(user, channel, muted=False):
            raise Refused(PERMISSION_DENIED, f"the user is blocked in {channel[:64]!r} (block_user)")
        if deed == "publish" and self._holding(user, "", muted=True):
            raise Refused(PERMISSION_DENIED, "the user is muted (block_user)")
        if deed == "publish" and self._holding(user, channel, muted=True):
            raise Refused(PERMISSION_DENIED, f"the user is muted in {channel[:64]!r} (block_user)")

    def _holding(self, user: str, channel: str, *, muted: bool) -> bool:
        block = self.users[user].get((channel, muted))
        return block is not None and block.holds(self._clock())

    def held(self, user: str) -> list[Block]:
        """The blocks of ``user`` that hold now."""
        now = self._clock()
        return [block for block in self.users.get(user, {}).values() if block.holds(now)]

    def blocked_users(self, after: str, limit: int) -> list[str]:
        """The next users behind ``after`` of whom something holds, in the order of their ids."""
        if self._ordered is None:
            self._ordered = sorted(self.users)
        behind = islice(self._ordered, bisect_right(self._ordered, after), None)
        return list(islice((user for user in behind if self.held(user)), limit))

    # --- hearing ----------------------------------------------------------------------
    def take(self, record: Record) -> None:
        """Somebody changed the blocks of a user, or so it was read: if that is news, it holds from now on."""
        known = self._records.get(record.user)
        if known is not None and known.revision >= record.revision:
            return
        self._records[record.user] = record
        self._newest = max(self._newest, record.revision)
        if (forgettable_ms := record.forgettable_ms) is not None:
            heappush(self._due, (forgettable_ms, record.user, record.revision))
        if record.blocks:
            if record.user not in self.users:
                self._ordered = None
            self.users[record.user] = {(block.channel, block.muted): block for block in record.blocks}
        else:
            self._let_go(record.user)
        self._carry_out(record.user)

    def _let_go(self, user: str) -> None:
        if self.users.pop(user, None) is not None:
            self._ordered = None

    def _carry_out(self, user: str) -> None:
        held = [block for block in self.held(user) if not block.muted]
        if not held:
            return
        for connection in list(self._connections(user)):
            if any(not block.channel for block in held):
                connection.disconnect(FORCE_DISCONNECT, "the user is blocked (block_user)")
                continue
            for block in held:
                connection.unsubscribe_by_order(block.channel)

    # --- reading ----------------------------------------------------------------------
    async def open(self) -> None:
        """Open the store and read all; raises ``errors.Unavailable``."""
        await self._blocks.open()
        try:
            await self._read()
        except BaseException:
            await self._blocks.close()
            raise

    async def close(self) -> None:
        """Close the store."""
        await self._blocks.close()

    def read_all(self) -> None:
        """Anything may have been missed: read everything, next time."""
        self._wants_all = True
        self._read_at = 0.0

    def due(self, now: float) -> bool:
        """Is it time to read?  ``now`` in seconds that never go back."""
        if self._read_at and now - self._read_at < READ_S:
            return False
        self._read_at = now
        if now - self._all_read_at >= READ_ALL_S:
            self._all_read_at = now
            self._wants_all = True
        return True

    async def read(self) -> None:
        """Read what is new, and forget what is of no use any more; a store that is away is said once in the log."""
        try:
            await self._read()
            await self._forget()
        except Unavailable as error:
            if not self.trouble:
                event("blocks.unavailable", why=error)
            self.trouble = str(error)
        else:
            self.trouble = ""

    async def _read(self) -> None:
        wants_all, self._wants_all = self._wants_all, False
        try:
            records = await self._blocks.records(0 if wants_all else max(0, self._newest - MARGIN_MS))
        except BaseException:
            self._wants_all = self._wants_all or wants_all
            raise
        for number, record in enumerate(records, 1):
            self.take(record)
            if number % SLICE == 0:
                await asyncio.sleep(0)

    async def _forget(self) -> None:
        now_ms = int(self._clock() * 1000)
        old = []
        while self._due and self._due[0][0] <= now_ms:
            _, user, revision = heappop(self._due)
            record = self._records.get(user)
            if record is not None and record.revision == revision:
                old.append(record)
        if not old:
            return
        try:
            await self._blocks.forget(old)
        except BaseException:
            for record in old:
                heappush(self._due, (now_ms, record.user, record.revision))
            raise
        for record in old:
            if self._records.get(record.user) is record:
                del self._records[record.user]
                self._let_go(record.user)
