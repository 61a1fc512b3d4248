"""The figures of a storm, and the page that tells them.  Pure."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from crowd import Delivery
from schedule import KINDS
from verdict import Fault, Said, Waited

AFTER_S = 2.0
"""What is acknowledged so soon after a disturbance is still counted to it."""

MENDING_S = 5.0
"""How long after MongoDB was healed a process may still wait for it: an election, a pause before it tries again."""


class Disturbance(NamedTuple):
    """A fault as it happened, in seconds of the storm's clock; ``process`` is ``""`` where it was for all."""

    kind: str
    process: str
    began: float
    ended: float


class Spread(NamedTuple):
    """How long something took, in seconds, and how often it happened."""

    times: int = 0
    median_s: float = 0.0
    p99_s: float = 0.0
    worst_s: float = 0.0


def spread(times: Iterable[float]) -> Spread:
    """Of some times in seconds; the nearest rank, so that each figure is one that was seen."""
    ordered = sorted(times)
    if not ordered:
        return Spread()

    def rank(share: float) -> float:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    return Spread(len(ordered), rank(0.5), rank(0.99), ordered[-1])


@dataclass
class Row:
    """What was seen of one kind of disturbance; times in seconds.

    ``lasted``: of each.  ``acknowledged``: from the first try to the
    acknowledgement, over all tries.  ``there`` and ``elsewhere``: from the
    acknowledgement to the delivery to a listener that was connected all the while,
    at the process that was disturbed, and at others.  ``outcome_s``: the longest
    that one try waited for an acknowledgement or an error.
    """

    kind: str
    lasted: list[float] = field(default_factory=list)
    acknowledged: list[float] = field(default_factory=list)
    there: list[float] = field(default_factory=list)
    elsewhere: list[float] = field(default_factory=list)
    outcome_s: float = 0.0


CALM = "none"


@dataclass
class Figures:
    """All that the page tells of one storm."""

    seed: int
    length_s: float
    processes: int
    command: str
    rows: list[Row] = field(default_factory=list)
    counts: Mapping[str, int] = field(default_factory=dict)
    kept: int = 0
    faults: Sequence[Fault] = ()
    disturbances: Sequence[Disturbance] = ()
    machine: str = ""
    """What it ran on, in a few words."""


def rows(
    disturbances: Sequence[Disturbance],
    said: Iterable[Said],
    deliveries: Iterable[Delivery],
    waited: Iterable[Waited],
) -> list[Row]:
    """The figures by kind of disturbance, and of the time without any."""
    found = {kind: Row(kind) for kind in [*KINDS, CALM]}
    by_second: defaultdict[int, list[Disturbance]] = defaultdict(list)
    for disturbance in disturbances:
        found[disturbance.kind].lasted.append(disturbance.ended - disturbance.began)
        for second in range(int(disturbance.began), int(disturbance.ended + AFTER_S) + 1):
            by_second[second].append(disturbance)

    def during(began: float, ended: float) -> list[tuple[Row, str]]:
        some = {one for second in range(int(began), int(ended) + 1) for one in by_second.get(second, ())}
        some = {one for one in some if one.began <= ended and began <= one.ended + AFTER_S}
        return [(found[one.kind], one.process) for one in some] or [(found[CALM], "")]

    said = list(said)
    for told in said:
        if told.outcome == "acknowledged":
            for row, _ in during(told.began, told.at):
                row.acknowledged.append(told.at - told.began)
    for wait in waits(said, deliveries):
        for row, process in during(wait.began, wait.ended):
            (row.there if process == wait.place else row.elsewhere).append(wait.ended - wait.began)
    for one in waited:
        for row, _ in during(one.began, one.began + one.wait_s):
            row.outcome_s = max(row.outcome_s, one.wait_s)
    return list(found.values())


class Wait(NamedTuple):
    """From an acknowledgement to the delivery at ``place``, to a listener who was connected all the while."""

    mark: str
    place: str
    began: float
    ended: float


def waits(said: Iterable[Said], deliveries: Iterable[Delivery]) -> Iterator[Wait]:
    """How long each listener waited for what was acknowledged while it was there."""
    acknowledged = {one.mark: one.at for one in said if one.outcome == "acknowledged"}
    for delivery in deliveries:
        when = acknowledged.get(delivery.mark)
        if when is not None and when >= delivery.since:
            yield Wait(delivery.mark, delivery.place, when, max(when, delivery.at))


def slow(all_waits: Iterable[Wait], disturbances: Sequence[Disturbance], most_s: float) -> Iterator[Fault]:
    """P4: whatever befalls Redis, kept channels wait for a sweep at most.

    Excused is only what had to wait for MongoDB or for a stopped process: these
    are repaired from history, and there was nobody to read it.
    """
    excuses = [one for one in disturbances if KINDS[one.kind].part in ("mongo", "process")]
    for wait in all_waits:
        if wait.ended - wait.began > most_s and not any(
            one.process in ("", wait.place) and one.began <= wait.ended and wait.began <= one.ended + MENDING_S
            for one in excuses
        ):
            what = f"waited {wait.ended - wait.began:.1f} s for {wait.mark}, acknowledged at {wait.began:.1f} s"
            yield Fault("slow", wait.place, what)


PAGE = """\
# What was broken, and what came of it

A storm is {processes} processes of `run.py`, a replica set of three `mongod`, one `redis-server`, and a TCP proxy of
our own before each of them for each process. Writers publish over WebSocket and `/api`, with idempotency keys and
without; listeners follow every channel, leave, come back anywhere, and present their position; wanderers keep nothing
but a cursor, and take it every few publications to another process or another transport: WebSocket, SSE, HTTP stream,
the event stream of a channel, long-poll, plain REST. Meanwhile things are broken by a schedule that is drawn from a
seed, at most two at once. In the end every list is compared with history, and every acknowledgement, key and unknown
outcome with what history has of it. Nothing is mocked.

    {command}

made this page: {minutes:.0f} minutes, seed {seed}{machine}.

| | |
| --- | ---: |
{counts}

{verdict}

## Disturbances

How often each was made, and how long it lasted, in seconds.

| what was done | times | shortest | longest | in all |
| --- | ---: | ---: | ---: | ---: |
{disturbances}

## Latency while it lasted

In milliseconds, each as *median / 99th percentile / worst*. *Acknowledgement* is from the first try to the answer, over
all tries of a publication with a key; *one try* the longest that a publisher waited for an acknowledgement or an
error. *Delivery* is from the acknowledgement to a listener who was connected all the while: *there* at the process that
was disturbed, *elsewhere* at the others (or at all, where all were disturbed). Where two disturbances overlapped, both
are charged; so is each with the two seconds after its end.

| what was done | acknowledged | acknowledgement | one try | delivered | delivery there | delivery elsewhere |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{rows}

## One by one

<details><summary>Every disturbance, in seconds since the beginning</summary>

| at | what | where | lasted |
| ---: | --- | --- | ---: |
{one_by_one}

</details>

## Whether it would notice

A storm that finds nothing proves something only if it can find something. `tests/cluster/test_verdict.py` gives its
judge notes that are wrong, each in one way. And the server was broken on purpose, in a copy, in five ways; this is what
the short storm of `make test` and the stories of `tests/cluster/test_breaks.py` said to each.

* Delivered and announced before the commit. The storm: publications "moved", heard with an offset that history gave
  to another, and "unreadable" histories. The stories: `test_what_only_a_dead_primary_had`, and most that hurt MongoDB.
* The top learned from a read of what merely the primary has. The storm: acknowledged publications "lost" in a rollback,
  and histories "unreadable", since tops are known that no majority has. The stories:
  `test_what_only_a_dead_primary_had`.
* A slot given up on a time-out. The storm: publications "doubled". The stories:
  `test_a_doubtful_answer_gives_up_no_slot`.
* The sweep left out. The storm: listeners "short" of the last words. The stories:
  `test_killed_between_commit_and_announcement`.
* Channels not followed again after a lost connection. The storm: listeners "deaf". The stories:
  `test_redis_dies_and_comes_back_empty`, `test_redis_out_of_reach`.
"""

COUNTS = (
    ("publications written to kept channels", "sent"),
    ("… acknowledged (a key that two publish at the same time is acknowledged to both)", "acknowledged"),
    ("… unknown in the end (error 100, or the connection was lost; no key)", "unknown"),
    ("… tried where nobody listened", "nobody there"),
    ("… said again under the same key", "sent again"),
    ("… refused (error 111, nothing published)", "refused"),
    ("publications in history at the end", "kept"),
    ("delivered to listeners of kept channels", "delivered"),
    ("written to a passing channel", "sent in passing"),
    ("… delivered", "delivered in passing"),
    ("delivered to wanderers", "delivered to wanderers"),
    ("… legs, each by any transport at any process", "legs"),
    ("… by WebSocket, that brought something", "legs by websocket"),
    ("… by SSE", "legs by sse"),
    ("… by HTTP stream", "legs by http_stream"),
    ("… by the event stream of the channel", "legs by events"),
    ("… by long-poll", "legs by poll"),
    ("… by plain REST", "legs by rest"),
    ("… ended by a disturbance, or by four seconds of silence", "legs cut short"),
    ("connections of listeners", "connections"),
    ("… ended with their process", "connections ended"),
    ("recoveries from a position", "recoveries"),
    ("subscriptions put off with error 100", "subscriptions put off"),
    ("members of killed processes seen to fade in time", "faded"),
)


def page(figures: Figures) -> str:
    """The page as Markdown."""
    counts = {**figures.counts, "kept": figures.kept}
    if figures.faults:
        verdict = f"**{len(figures.faults)} promises were broken:**\n\n" + "\n".join(
            f"* {fault}" for fault in figures.faults[:50]
        )
    else:
        verdict = (
            "Every list was history's: same order, no hole, no repeat. Every acknowledged publication is there once, at"
            "\nits offset; no key published twice; nobody was told that a position is gone; nobody was disconnected but"
            "\nby the end or the stop of its process; no process logged a fault of its own."
        )
    return PAGE.format(
        processes=figures.processes,
        command=figures.command,
        minutes=figures.length_s / 60,
        seed=figures.seed,
        counts="\n".join(f"| {words} | {counts.get(name, 0):,} |" for words, name in COUNTS),
        verdict=verdict,
        machine=f", {figures.machine}" if figures.machine else "",
        disturbances="\n".join(_lasting(row) for row in figures.rows if row.kind != CALM),
        rows="\n".join(_latency(row) for row in figures.rows),
        one_by_one="\n".join(
            f"| {one.began:.0f} | {KINDS[one.kind].what} | {one.process} | {one.ended - one.began:.1f} |"
            for one in sorted(figures.disturbances, key=lambda one: one.began)
        ),
    )


def _lasting(row: Row) -> str:
    lasted = f"{min(row.lasted):.1f} | {max(row.lasted):.1f}" if row.lasted else " | "
    return f"| {KINDS[row.kind].what} | {len(row.lasted)} | {lasted} | {sum(row.lasted):.0f} |"


def _latency(row: Row) -> str:
    what = "nothing" if row.kind == CALM else KINDS[row.kind].what
    acknowledged, delivered = spread(row.acknowledged), len(row.there) + len(row.elsewhere)
    return (
        f"| {what} | {acknowledged.times:,} | {_in_ms(acknowledged)} | {row.outcome_s * 1000:,.0f} "
        f"| {delivered:,} | {_in_ms(spread(row.there))} | {_in_ms(spread(row.elsewhere))} |"
    )


def _in_ms(spread: Spread) -> str:
    figures = (spread.median_s, spread.p99_s, spread.worst_s)
    return " / ".join(f"{one * 1000:,.0f}" for one in figures) if spread.times else ""
