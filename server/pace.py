"""When those who are behind are sent their pages: a few in each turn of the loop, and commits go first.

A page for somebody who comes back costs the loop as much as a publication to a hundred
live ones.  A crowd of them would have the loop to itself for as long as it is behind: so
each waits for a turn in which few others are sent one, and the live ones have theirs
between.

Where threads write history (``history.sqlite_file``, Motor) they have to get the interpreter
for each of their steps from a loop that always has something to do, and on a single core
the core as well: beside 100 who catch up an append took 17 ms, half of which it was not
even asked for.  And a thread that reads takes the interpreter from a publication that is
on its way to its subscribers.  So while somebody waits for a commit no page is sent and
none is read, for a moment.

The p99 of 1,000 live ones beside 100 who catch up on 10,000 each was 8.3 times its usual
without turns, 3.0 times with them, and is 1.8 times with both (``make bench
WORKS=recovery``, November 2026).  PROTOCOL 11.5.
"""

import asyncio
from collections import deque

TURN_PUBLICATIONS = 100
"""How many publications are sent to those who are behind in one turn of the loop, if they are not of one page."""

HOLD_S = 0.002
"""For how long a page waits for a commit.  Others may be made all the time: then they and the pages take turns."""

HOLD_LINE = 250
"""With more in line nobody waits for commits, since a reply has to come in time."""

ROOM = 64
"""How many of those who catch up read and hold a page at a time."""


class Pace:
    """The turns of one loop.  ``room`` is for who catches up, from before its page is read until it is sent."""

    def __init__(self) -> None:
        self.room = asyncio.Semaphore(ROOM)
        self._commits = 0
        self._sent = 0
        """How many publications may be sent in this turn, of those who were in line or were let through."""
        self._line: deque[tuple[asyncio.Future[None], int]] = deque()
        self._due: asyncio.Handle | None = None
        """The next turn."""
        self._held = False
        """Whether it waits for a commit."""

    def __repr__(self) -> str:
        return f"<Pace {len(self._line)} in line, {self._commits} commits under way>"

    def committing(self) -> None:
        """Somebody waits for a commit; ``committed`` is called when it is over, however it ended."""
        self._commits += 1

    def committed(self) -> None:
        """One commit less is waited for."""
        self._commits -= 1
        if self._held and self._due is not None:
            self._due.cancel()
            self._held = False
            self._due = asyncio.get_running_loop().call_soon(self._next)

    async def sending(self, publications: int) -> None:
        """Return in the turn of the loop in which a page of so many is to be sent; at once if it is empty."""
        if not publications:
            return
        if self._line or self._commits or self._sent >= TURN_PUBLICATIONS:
            await self._wait(publications)
            return
        self._sent += publications
        if self._due is None:
            self._due = asyncio.get_running_loop().call_soon(self._next)

    async def reading(self) -> None:
        """Return when a page is to be read: at once if nobody waits for a commit."""
        if self._commits:
            await self._wait(0)

    async def _wait(self, publications: int) -> None:
        loop = asyncio.get_running_loop()
        place: asyncio.Future[None] = loop.create_future()
        self._line.append((place, publications))
        if self._due is None:
            self._due = loop.call_soon(self._begin)
        await place

    def _begin(self) -> None:
        """Begin the next turn, or hold it."""
        if self._commits and 0 < len(self._line) <= HOLD_LINE:
            self._held = True
            self._due = asyncio.get_running_loop().call_later(HOLD_S, self._next)
        else:
            self._next()

    def _next(self) -> None:
        self._held, self._due, self._sent = False, None, 0
        while self._line and self._sent < TURN_PUBLICATIONS:
            place, publications = self._line.popleft()
            if not place.done():  # else cancelled
                place.set_result(None)
                self._sent += publications
        if self._sent or self._line:
            self._due = asyncio.get_running_loop().call_soon(self._begin)
