"""What the log says of requests that are refused: the same one of the same address once a second.

A request costs its sender next to nothing, and a session's "no" is followed by an end
(PROTOCOL 18.0.2) where a request's is followed by the next request.  So what is logged is
bounded twice: by address, so that a flood does not hide what others are told, and over
all, since a flood may come from everywhere.  A line says how many it stands for; the
counters know of each.
"""

from collections.abc import Callable
from typing import Any

from server.limits import network
from server.observe import event, happened

QUIET_S = 1.0
"""How long the log says nothing more of the same refusal to the same address (of IPv6, its first 64 bits)."""

LINES = 50
"""How many lines there are in a second, whoever is refused."""

KINDS = 10_000
"""How many refusals of one kind are remembered; the one that was heard of longest ago is forgotten."""


class Refusals:
    """Says of refusals what is worth a line; ``clock`` is in seconds and only grows."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._kinds: dict[tuple[str, str, int], tuple[float, int]] = {}
        self._second = -1
        self._lines = 0

    def __len__(self) -> int:
        return len(self._kinds)

    def say(self, name: str, address: str, code: int, **fields: Any) -> None:
        """``observe.event``, with ``address``, ``code`` and ``count``, unless the log has just had it."""
        count = self._count(name, network(address), code)
        if count:
            event(name, address=address, code=code, count=count, **fields)
        else:
            happened[name] += 1

    def _count(self, *kind: Any) -> int:
        """How many refusals a line now stands for, 0 if there is to be none."""
        now = self._clock()
        if int(now) != self._second:
            self._second, self._lines = int(now), 0
        said_at, unsaid = self._kinds.pop(kind, (-QUIET_S, 0))
        unsaid += 1
        due = now - said_at >= QUIET_S and self._lines < LINES
        self._kinds[kind] = (now, 0) if due else (said_at, unsaid)  # at the end: in order of the last refusal
        if len(self._kinds) > KINDS:
            del self._kinds[next(iter(self._kinds))]
        self._lines += due
        return unsaid if due else 0
