"""When which session wants to be looked at: one entry each, to the second.

Thousands of sessions each have a next ping, a pong to wait for, an expiry.  A
timer of the event loop for each would cost more memory than the session; here an
entry is one set membership, and a second's work is one set.

Plain; it is told the time.
"""

from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Timetable(Generic[T]):
    """Everybody has at most one entry; a new one replaces the old."""

    def __init__(self) -> None:
        self._seconds: dict[int, set[T]] = {}
        self._when: dict[T, int] = {}
        self._past = 0

    def __len__(self) -> int:
        return len(self._when)

    def put(self, who: T, at: float) -> None:
        """Have ``who`` returned by the first ``due`` from ``at`` (Unix s, rounded up) on."""
        second = max(-int(-at // 1), self._past + 1)
        old = self._when.get(who)
        if old == second:
            return
        if old is not None:
            self._drop(who, old)
        self._when[who] = second
        self._seconds.setdefault(second, set()).add(who)

    def remove(self, who: T) -> None:
        """Forget ``who``, who need not have an entry."""
        second = self._when.pop(who, None)
        if second is not None:
            self._drop(who, second)

    def rewind(self) -> list[T]:
        """Forget the time and all entries, since the clock was set back; returns who had one, to put it anew."""
        who = list(self._when)
        self._seconds.clear()
        self._when.clear()
        self._past = 0
        return who

    def due(self, now: float) -> list[T]:
        """Take out and return all whose time has come."""
        present = int(now)
        late = sorted(second for second in self._seconds if second <= present)
        self._past = max(self._past, present)
        found: list[T] = []
        for second in late:
            found += self._seconds.pop(second)
        for who in found:
            del self._when[who]
        return found

    def _drop(self, who: T, second: int) -> None:
        entries = self._seconds[second]
        entries.discard(who)
        if not entries:
            del self._seconds[second]
