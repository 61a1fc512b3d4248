"""What a storm has to answer for: what was said, heard and kept, held against one another.  Pure.

The storm only takes notes; here they are compared, so that the comparison itself
can be tested with notes that are wrong.  A note names a publication by its *mark*,
a payload that nobody else says, and writers number theirs: ``ann.17``.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Outcome = Literal["acknowledged", "unknown", "refused"]
"""How a publish ended: with a position, with error 100 or a lost connection, or with an error that promises absence."""


class Said(NamedTuple):
    """One publication as its writer knows it, after its last try.

    ``key`` is the idempotency key (``""``: none), ``offset`` 0 where the answer
    does not tell it.  ``began`` is when it was tried first and ``at`` when the
    outcome was known, in seconds of the storm's clock.
    """

    channel: str
    mark: str
    outcome: Outcome
    offset: int = 0
    epoch: str = ""
    key: str = ""
    at: float = 0.0
    began: float = 0.0


class Line(NamedTuple):
    """One publication as it stands in history, or as a subscriber got it."""

    offset: int
    mark: str
    key: str = ""


@dataclass
class Kept:
    """A channel's history at the end, as one process tells it."""

    channel: str
    process: str
    epoch: str
    lines: Sequence[Line]


@dataclass
class Heard:
    """All that one subscriber was sent of one channel, from behind ``since``, over all its connections."""

    who: str
    channel: str
    since: int = 0
    epoch: str = ""
    lines: list[Line] = field(default_factory=list)
    unrecovered: list[int] = field(default_factory=list)
    """The positions for which it was told ``recovered: false``."""


class Ended(NamedTuple):
    """A connection that somebody else than the client ended."""

    who: str
    process: str
    code: int
    reason: str
    at: float


class Down(NamedTuple):
    """A process was killed or stopped from ``began`` to ``ended``, in seconds of the storm's clock."""

    process: str
    began: float
    ended: float


class Waited(NamedTuple):
    """A publish at a process, begun at a moment of the storm's clock, and how long its outcome took (seconds)."""

    process: str
    began: float
    wait_s: float
    what: str = ""
    """Who tried what, and how it ended, for whoever reads a fault."""


class Vanished(NamedTuple):
    """A member of a process that was killed: how long others still saw it, ``None`` for "to the end"."""

    client: str
    process: str
    after_s: float | None
    most_s: float


class Leaves(NamedTuple):
    """How often one listener was told that a client of a killed process left."""

    who: str
    client: str
    times: int


@dataclass
class Notes:
    """All that a storm has noted."""

    said: list[Said] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    heard: list[Heard] = field(default_factory=list)
    passing: list[Heard] = field(default_factory=list)
    """What subscribers of channels without history were sent; offsets are 0."""
    passed: set[str] = field(default_factory=set)
    """The marks said in such channels."""
    waited: list[Waited] = field(default_factory=list)
    most_wait_s: float = float("inf")
    """How long an outcome may take: the publish timeout, and what a busy machine adds."""
    ended: list[Ended] = field(default_factory=list)
    downs: list[Down] = field(default_factory=list)
    vanished: list[Vanished] = field(default_factory=list)
    leaves: list[Leaves] = field(default_factory=list)


class Fault(NamedTuple):
    """A broken promise: which one, where, and what was seen."""

    kind: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: {self.what}"


RETURN_S = 15.0
"""How long after a stop or a kill connections may still end by it: pings and reconnecting take their time."""


def judge(notes: Notes) -> list[Fault]:
    """Every promise that the notes show broken, P1 to P6; empty if all were kept."""
    truth = {kept.channel: kept for kept in notes.kept}
    faults = [*_one_truth(notes.kept)]
    for channel, kept in truth.items():
        said = [one for one in notes.said if one.channel == channel]
        faults += _numbering(kept)
        faults += _written(kept, said)
        faults += _acknowledged(kept, said)
        faults += _keys(kept, said)
    for heard in notes.heard:
        if heard.channel in truth:
            faults += _list(heard, truth[heard.channel])
        else:
            faults.append(Fault("unknown", heard.who, f"{heard.channel} has no history"))
    for heard in notes.passing:
        faults += _passing(heard, notes.passed)
    faults += _waits(notes.waited, notes.most_wait_s, notes.downs)
    faults += _endings(notes.ended, notes.downs)
    faults += _ghosts(notes.vanished, notes.leaves)
    return faults


# --- history -----------------------------------------------------------------
def _one_truth(kept: Iterable[Kept]) -> Iterator[Fault]:
    """Whichever process is asked, history is the same."""
    first: dict[str, Kept] = {}
    for one in kept:
        other = first.setdefault(one.channel, one)
        if (one.epoch, list(one.lines)) != (other.epoch, list(other.lines)):
            opinions = (f"{it.process} has {len(it.lines)} of {it.epoch}" for it in (one, other))
            yield Fault("two truths", one.channel, ", ".join(opinions))


def _numbering(kept: Kept) -> Iterator[Fault]:
    """P1: 1, 2, 3 … with no hole and no repeat."""
    for number, line in enumerate(kept.lines, 1):
        if line.offset != number:
            yield Fault("numbering", kept.channel, f"offset {line.offset} stands where {number} belongs")
            return


def _written(kept: Kept, said: Sequence[Said]) -> Iterator[Fault]:
    """Nothing stands there that nobody said, that was refused, or that stands there twice."""
    marks = Counter(line.mark for line in kept.lines)
    known = {one.mark: one for one in said}
    for mark, count in marks.items():
        if count > 1:
            yield Fault("doubled", kept.channel, f"{mark} is there {count} times")
        if mark not in known:
            yield Fault("unknown", kept.channel, f"{mark} is there, and nobody said it")
        elif known[mark].outcome == "refused":
            yield Fault("refused", kept.channel, f"{mark} is there, and its writer was told that it is not")


def _acknowledged(kept: Kept, said: Iterable[Said]) -> Iterator[Fault]:
    """P2: what was acknowledged is there, where the answer said, and is what was said."""
    marks = {line.mark for line in kept.lines}
    keys = {line.key for line in kept.lines if line.key}
    for one in said:
        if one.outcome != "acknowledged":
            continue
        if one.epoch and one.epoch != kept.epoch:
            yield Fault("epoch", kept.channel, f"{one.mark} was acknowledged in {one.epoch}, history is {kept.epoch}")
        if one.mark not in marks and not (one.key and one.key in keys):
            yield Fault("lost", kept.channel, f"{one.mark} was acknowledged at {one.offset or 'some offset'}")
            continue
        if not one.offset:
            continue
        if one.offset > len(kept.lines):
            yield Fault("lost", kept.channel, f"{one.mark} was acknowledged at {one.offset}, beyond the top")
            continue
        there = kept.lines[one.offset - 1]
        if there.mark != one.mark and not (one.key and there.key == one.key):
            yield Fault(
                "moved", kept.channel, f"{one.mark} was acknowledged at {one.offset}, where {there.mark} stands"
            )


def _keys(kept: Kept, said: Iterable[Said]) -> Iterator[Fault]:
    """P5: a key publishes once, and everybody who used it was told the same position."""
    for key, count in Counter(line.key for line in kept.lines if line.key).items():
        if count > 1:
            yield Fault("double key", kept.channel, f"{key} published {count} times")
    told: defaultdict[str, set[int]] = defaultdict(set)
    for one in said:
        if one.key and one.offset:
            told[one.key].add(one.offset)
    for key, offsets in told.items():
        if len(offsets) > 1:
            yield Fault("double key", kept.channel, f"{key} was acknowledged at {sorted(offsets)}")


# --- subscribers -------------------------------------------------------------
def _list(heard: Heard, kept: Kept) -> Iterator[Fault]:
    """P3: every publication once and in order, from the position it began at to the top."""
    where = f"{heard.who} in {heard.channel}"
    for offset in heard.unrecovered:
        yield Fault("unrecovered", where, f"was told that what follows {offset} is gone, and it is not")
    if heard.epoch and heard.epoch != kept.epoch:
        yield Fault("epoch", where, f"stands in {heard.epoch}, history is {kept.epoch}")
    at = heard.since
    seen: set[int] = set()
    for line in heard.lines:
        if line.offset > len(kept.lines) or line.offset < 1:
            yield Fault("unknown", where, f"{line.mark} came as {line.offset}, the top is {len(kept.lines)}")
        elif kept.lines[line.offset - 1].mark != line.mark:
            there = kept.lines[line.offset - 1].mark
            yield Fault("moved", where, f"{line.mark} came as {line.offset}, where history has {there}")
        if line.offset in seen:
            yield Fault("repeated", where, f"{line.offset} came again after {at}")
        elif line.offset <= at:
            yield Fault("order", where, f"{line.offset} came after {at}")
        elif line.offset > at + 1:
            yield Fault("hole", where, f"{line.offset} came after {at}")
        seen.add(line.offset)
        at = max(at, line.offset)
    if at < len(kept.lines):
        yield Fault("short", where, f"stands at {at} in the end, the top is {len(kept.lines)}")


def _passing(heard: Heard, said: set[str]) -> Iterator[Fault]:
    """A passing channel: at most once, in order per writer."""
    where = f"{heard.who} in {heard.channel}"
    last: dict[str, int] = {}
    for line in heard.lines:
        writer, _, number = line.mark.rpartition(".")
        before = last.get(writer, 0)
        if line.mark not in said:
            yield Fault("unknown", where, f"{line.mark} came, and nobody said it")
        elif int(number) == before:
            yield Fault("repeated", where, f"{line.mark} came again")
        elif int(number) < before:
            yield Fault("order", where, f"{line.mark} came after {writer}.{before}")
        last[writer] = max(before, int(number))


# --- connections and members -------------------------------------------------
def _waits(waited: Iterable[Waited], most_s: float, downs: Sequence[Down]) -> Iterator[Fault]:
    """A publish ends in time, with an acknowledgement or with error 100, whatever befalls the stores."""
    for one in waited:
        end = one.began + one.wait_s
        excused = any(down.process == one.process and down.began <= end and one.began <= down.ended for down in downs)
        if one.wait_s > most_s and not excused:
            yield Fault(
                "late", one.process, f"a publish at {one.began:.1f} s had no outcome for {one.wait_s:.1f} s; {one.what}"
            )


def _endings(ended: Iterable[Ended], downs: Sequence[Down]) -> Iterator[Fault]:
    """P4: whatever befalls Redis and MongoDB, only the end of a process, or its stop, ends a connection."""
    for one in ended:
        excused = any(down.process == one.process and down.began <= one.at <= down.ended + RETURN_S for down in downs)
        if not excused:
            yield Fault("disconnected", one.who, f"by {one.process} with {one.code} {one.reason} at {one.at:.1f} s")


def _ghosts(vanished: Iterable[Vanished], leaves: Iterable[Leaves]) -> Iterator[Fault]:
    """P6: members of a dead process are gone in time, and their leave is told once."""
    for one in vanished:
        if one.after_s is None or one.after_s > one.most_s:
            seen = "to the end" if one.after_s is None else f"for {one.after_s:.1f} s"
            yield Fault(
                "ghost", one.client, f"of {one.process} was seen {seen}, at most {one.most_s:g} s were promised"
            )
    for told in leaves:
        if told.times > 1:
            yield Fault("repeated", told.who, f"was told {told.times} times that {told.client} left")


def summary(faults: Sequence[Fault], most: int = 20) -> str:
    """The faults in words, by kind and then the first ``most`` of them."""
    counts: Mapping[str, int] = Counter(fault.kind for fault in faults)
    lines = [", ".join(f"{count} × {kind}" for kind, count in sorted(counts.items()))]
    return "\n".join(lines + [str(fault) for fault in faults[:most]])
