"""What a process has done so far: plain numbers, for whoever looks (PROTOCOL 17.5).

Counting stands beside the work, so it may cost next to nothing: an addition to an
integer where something happens, and for a time or a size one search in a short
tuple.  Who looks pays for the rest: ``handlers/metrics.py`` reads these numbers,
and those that exist anyway (how many sessions, how many feeds), when it is asked.
What is done for every delivery is counted by the group and not one by one.

Tried and dropped: the metric objects of prometheus-client beside the work.  One
``labels(…).inc()`` costs a microsecond and a half, ten times what a delivery to a
socket may cost beside the system call, and takes a lock.

Plain: no clock, no library.  Numbers only grow, until the process ends.
"""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Bounds of times, from what a loop turn takes to what nobody waits for."""

MANY = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 10_000, 100_000)
"""Bounds of how many."""

_LIMIT = re.compile(
    r"\b(?:client|guests|rest|websocket|uni_websocket|emulation)\.[a-z_]*(?:limit|queue_max_size)\b"
    r"|\bclient\.(?:stale_close_delay|pong_timeout)\b|\bapp\.timeout\b"
)


class Histogram:
    """How often a value was at most each of ``bounds``, which ascend.

    ``counts`` has one number for each bound and one for what is above the last,
    each without those before it; ``total`` is the sum of all values.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def __repr__(self) -> str:
        return f"<Histogram {self.count} values, {self.total:g} in all>"

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Counts:
    """All numbers of one process but the hub's own; ``seconds`` in names are seconds."""

    def __init__(self) -> None:
        self.opened: Counter[str] = Counter()
        """Connections that came, by transport."""
        self.disconnects: Counter[int] = Counter()
        """Connections that ended, by code; 0: the client left."""
        self.refusals: Counter[int] = Counter()
        """Commands and calls that were refused, by the error's code."""
        self.limits: Counter[str] = Counter()
        """How often something was refused or ended for a limit, by the setting; see ``note_why``."""
        self.calls: Counter[str] = Counter()
        """Calls of the back-end API, by method."""
        self.kept = 0
        """Publications of kept channels that this process made durable."""
        self.passing = 0
        """Publications of passing channels that were published here."""
        self.heard = 0
        """Publications that other processes announced."""
        self.holes = 0
        self.repairs = 0
        self.failed_repairs = 0
        self.recovered = 0
        """Subscriptions that recovered, in all; the next two did not."""
        self.unrecoverable = 0
        self.lost = 0
        self.recovery_publications = Histogram(MANY)
        """How much a subscription that recovered had missed."""
        self.commit_publications = Histogram(MANY)
        self.batch_publications = Histogram(MANY)
        self.batch_seconds = Histogram(SECONDS)
        """From when a batch of commits was given to the store until it was durable."""
        self.read_seconds = Histogram(SECONDS)
        """From when a page or the tops were asked of history until they came."""
        self.broker_seconds = Histogram(SECONDS)
        """From when a word was said until the broker had taken it, of one word at a time."""
        self.own_age_seconds = Histogram(SECONDS)
        """How old the first publication of a commit of this process is when it has been delivered here."""
        self.others_age_seconds = Histogram(SECONDS)
        """The same for what another process announced, by both clocks."""
        self.lag_seconds = Histogram(SECONDS)
        """By how much the loop was late with the work of each second."""
        self.last_lag_seconds = 0.0

    def batch(self, publications: int, seconds: float) -> None:
        """History has made a batch durable."""
        self.batch_publications.observe(publications)
        self.batch_seconds.observe(seconds)

    def late(self, seconds: float) -> None:
        """The loop came to the work of a second so late."""
        self.last_lag_seconds = max(0.0, seconds)
        self.lag_seconds.observe(self.last_lag_seconds)

    def ended(self, code: int, why: str) -> None:
        """A connection ended; ``code`` is 0 if its client left."""
        self.disconnects[code] += 1
        self.note_why(why)

    def refused(self, code: int, why: str) -> None:
        """A command, a call or a request was refused."""
        self.refusals[code] += 1
        self.note_why(why)

    def note_why(self, why: str) -> None:
        """Count the limit that ``why`` names, if it names one.

        What is refused says why in words that name the setting to look at, so that
        who reads the log finds it; here the same words are counted.
        """
        found = _LIMIT.search(why)
        if found is not None:
            self.limits[found[0]] += 1
