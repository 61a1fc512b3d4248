"""What is broken when: a storm's faults, drawn from a seed.  Pure.

Two faults at most are under way at once, never two of the same *part*, and of the
processes never more than one is down.  Kinds come in turns, shuffled, so that
every kind comes before one comes again.
"""

from random import Random
from typing import NamedTuple


class Kind(NamedTuple):
    """One way to break something: the part it breaks, for how long (seconds), and what is done."""

    part: str
    shortest_s: float
    longest_s: float
    what: str


KINDS = {
    "process killed": Kind("process", 1, 15, "kill -9 of a process, started again at the end"),
    "killed unannounced": Kind(
        "process", 3, 15, "a process is cut off from Redis while it commits, and then killed: nobody was told"
    ),
    "process stopped": Kind("process", 30, 30, "SIGSTOP of a process, SIGCONT at the end"),
    "redis emptied": Kind("redis", 1, 10, "Redis is killed, and comes back empty at the end"),
    "redis failed over": Kind("redis", 1, 10, "Redis is killed, and its replica takes its place at the end"),
    "redis stopped": Kind("redis", 5, 15, "SIGSTOP of Redis, SIGCONT at the end"),
    "redis lossy": Kind("redis", 10, 30, "every process loses 30 % of what Redis pushes to it"),
    "redis slow": Kind("redis", 10, 30, "300 ms more each way between every process and Redis"),
    "redis cut": Kind("link", 5, 20, "one process's connections to Redis are cut, new ones refused"),
    "redis stalled": Kind("link", 5, 20, "one process's connections to Redis stay open, and nothing gets through"),
    "primary stepped down": Kind("mongo", 5, 10, "the primary of MongoDB is told to step down"),
    "primary killed": Kind("mongo", 5, 20, "kill -9 of the primary of MongoDB, started again at the end"),
    "primary stopped": Kind("mongo", 10, 20, "SIGSTOP of the primary of MongoDB, SIGCONT at the end"),
    "majority frozen": Kind("mongo", 4, 10, "both secondaries store nothing, so that no write reaches a majority"),
    "primary rolled back": Kind(
        "mongo", 5, 15, "the primary is killed with writes that nobody else has, and started again at the end"
    ),
    "mongo killed": Kind("mongo", 3, 10, "kill -9 of all members of MongoDB at once, started again at the end"),
    "mongo cut": Kind("mongo", 5, 15, "one process's connections to MongoDB are cut, new ones refused"),
    "mongo stalled": Kind("mongo", 5, 15, "one process's connections to MongoDB stay open, and nothing gets through"),
}

WIRES_OF_ONE = ("mongo cut", "mongo stalled")
AT_ONCE = 2


def for_one(kind: str) -> bool:
    """Is it done to one process, and not to all or to a store?"""
    return KINDS[kind].part in ("process", "link") or kind in WIRES_OF_ONE


class Planned(NamedTuple):
    """A fault of the schedule; ``process`` is the number of the one it is for, where it is for one."""

    kind: str
    at_s: float
    length_s: float
    process: int

    @property
    def end_s(self) -> float:
        """When it is healed."""
        return self.at_s + self.length_s


def planned(
    seed: int, length_s: float, processes: int, *, longest_s: float = 30.0, pause_s: float = 5.0
) -> list[Planned]:
    """The faults of a storm of ``length_s`` seconds, by their beginning; all are healed within it.

    No fault is longer than ``longest_s``; after each begin, some time up to
    ``2 * pause_s`` passes before the next one may.
    """
    random = Random(seed)
    faults: list[Planned] = []
    bag: list[str] = []
    now = 0.0
    while True:
        now += random.uniform(0, 2 * pause_s)
        if not bag:
            bag = sorted(KINDS)
            random.shuffle(bag)
        name = bag.pop()
        kind = KINDS[name]
        length = random.uniform(kind.shortest_s, kind.longest_s)
        if length > longest_s:
            length = random.uniform(longest_s / 2, longest_s)
        while (ends := _in_the_way(faults, kind.part, now)) and len(ends):
            now = min(ends)
        if now + length > length_s:
            return faults
        faults.append(Planned(name, now, length, random.randrange(processes)))


def _in_the_way(faults: list[Planned], part: str, now: float) -> list[float]:
    """When those end that must end before a fault of ``part`` may begin."""
    under_way = [fault for fault in faults if fault.end_s > now]
    ends = [fault.end_s for fault in under_way if KINDS[fault.kind].part == part]
    return ends or ([fault.end_s for fault in under_way] if len(under_way) >= AT_ONCE else [])
