"""Where so many go through in a second: the others wait in line, and take turns by whose they are.

A bucket alone says no; here whoever is told no waits for the next token.  Those who
come for the same thing stand in line as one, and one token lets all of them through:
what they cost is spent once.  Nobody waits in vain: who would have to wait for longer
than they can is told so when they come.  If all of them waited until their time was
up, a line that has grown too long would stay so: each would reach its end too late to
make use of the token it has had.

Each comer is somebody's, its *owner's*.  Owners take turns, one thing each, and within
an owner those go first who came first.  So whoever sends hundreds waits behind
themselves, and an owner's first waits for at most one thing of each who was there
before.  What later comers of others may hold up is an owner's second thing and those
behind it; if their time is up before their turn comes they are told so then.

A thing stands in line once, with the owner whose turn brings it there soonest: many
who want the same are one to the others as well, and nobody can hold a thing back by
wanting it last of all.

Memory is bounded by what gets in line at all: with room for R tokens within the
longest patience there are at most R owners in line, and R/n of them with n things, so
about R log R things.

Tried and dropped: one line for everybody, where some hundred connections of one address
that came back to made-up channels left no turn to anybody else; rounds that hold one
thing of each owner, which are quicker to count, but have holes to fill once somebody leaves.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from server.errors import Overdue
from server.limits import Bucket, Owner, Rate


class Comer(Protocol):
    """Whoever stands in line."""

    @property
    def closed(self) -> bool:
        """Has it gone away?  Then no token is spent for it."""


class _Place:
    """One place in line, for all who came for the same thing; it stands among those of ``owner``."""

    __slots__ = ("comers", "owner", "turn")

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.comers: list[Comer] = []
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Turnstile:
    """``per_second`` go through, as many at once after a quiet second; 0 is no limit.

    ``on_wait`` is called for each who has to wait.  ``setting`` is what an operator
    should look at, for the words of a refusal.
    """

    def __init__(self, per_second: float, setting: str, on_wait: Callable[[], None]) -> None:
        self._setting = setting
        self._on_wait = on_wait
        self._per_second = per_second
        self._bucket = Bucket(Rate.of(per_second))
        self._places: dict[str, _Place] = {}
        self._line: OrderedDict[Owner, OrderedDict[str, _Place]] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Turnstile {self._per_second:g}/s, {len(self._places)} of {len(self._line)} owners in line>"

    def __len__(self) -> int:
        return len(self._places)

    def renew(self, per_second: float) -> None:
        """Let so many through from now on, those who wait already included."""
        if per_second != self._per_second:
            self._per_second = per_second
            self._bucket = Bucket(Rate.of(per_second))
            self._let_through()

    async def take(self, key: str, comer: Comer, owner: Owner, patience_s: float) -> None:
        """Go through, at once or after a while; look at ``comer.closed`` afterwards.

        Raises ``errors.Overdue`` at once if that would be later than in ``patience_s``, and
        after ``patience_s`` if so many came meanwhile who are before it that its turn has not come.
        """
        now = asyncio.get_running_loop().time()
        if not self._line and self._bucket.take(now):
            return
        place = self._stand(key, owner, now, patience_s)
        self._on_wait()
        place.comers.append(comer)
        if self._timer is None:
            self._let_through()
        try:
            async with asyncio.timeout_at(now + patience_s):
                await asyncio.shield(place.turn)
        except TimeoutError:
            if not comer.closed:
                raise self._overdue() from None
        finally:
            place.comers.remove(comer)
            if not place.comers and self._places.get(key) is place:
                self._remove(key, place)

    def _stand(self, key: str, owner: Owner, now: float, patience_s: float) -> _Place:
        """The place in line for one more comer; raises ``Overdue`` if its turn is too far off."""
        place = self._places.get(key)
        ahead = self._ahead(owner, len(self._line.get(owner, ())))
        if place is not None:
            index = next(index for index, one in enumerate(self._line[place.owner]) if one == key)
            there = self._ahead(place.owner, index)
            if place.owner == owner or there <= ahead:
                ahead, owner = there, place.owner
        if self._bucket.wait_s(now, ahead) > patience_s:
            raise self._overdue()
        if place is None:
            place = _Place(owner)
        elif place.owner != owner:
            self._remove(key, place)
            place.owner = owner
        self._places[key] = place
        self._line.setdefault(owner, OrderedDict()).setdefault(key, place)
        return place

    def _ahead(self, owner: Owner, index: int) -> int:
        """How many go through before the thing of ``owner`` that has so many of its own before it, if nobody comes."""
        if not index and owner not in self._line:
            return len(self._line)
        ahead, turns = index, index + 1
        for other, places in self._line.items():
            if other == owner:
                turns = index  # those behind it have had a turn less by then
            else:
                ahead += min(len(places), turns)
        return ahead

    def _remove(self, key: str, place: _Place) -> None:
        """Nobody stands there any more."""
        del self._places[key]
        places = self._line[place.owner]
        del places[key]
        if not places:
            del self._line[place.owner]

    def _overdue(self) -> Overdue:
        return Overdue(f"too many come back at once, look at {self._setting} ({self._per_second:g})")

    def _let_through(self) -> None:
        """All for whom there is a token; the timer is set for the next one."""
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = loop.time()
        while self._line:
            owner, places = next(iter(self._line.items()))
            key, place = next(iter(places.items()))
            if not all(comer.closed for comer in place.comers):
                if not self._bucket.take(now):
                    self._timer = loop.call_at(now + self._bucket.wait_s(now), self._let_through)
                    return
                self._line.move_to_end(owner)
            self._remove(key, place)
            place.turn.set_result(None)
