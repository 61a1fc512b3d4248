"""The storm's judge and schedule: a judge that finds nothing proves nothing, so it is given notes that are wrong."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from crowd import UNKNOWN, Answer, Delivery, Voice, World, write
from report import CALM, Disturbance, Figures, Spread, page, rows, slow, spread, waits
from schedule import AT_ONCE, KINDS, planned
from verdict import Down, Ended, Heard, Kept, Leaves, Line, Notes, Said, Vanished, Waited, judge, summary

ROOM = "chat:1"
TOP = 6


def _sound() -> Notes:
    """What a storm in which every promise was kept may note."""
    lines = [Line(n, f"ann.{n}", "key" if n == 4 else "") for n in range(1, TOP + 1)]
    said = [Said(ROOM, line.mark, "acknowledged", line.offset, "e1", line.key) for line in lines[:4]]
    said += [Said(ROOM, "ann.5", "acknowledged"), Said(ROOM, "ann.6", "unknown")]
    said += [Said(ROOM, "ann.7", "unknown"), Said(ROOM, "ann.8", "refused")]
    said += [Said(ROOM, "bob.1", "acknowledged", 4, "e1", "key")]
    return Notes(
        said=said,
        kept=[Kept(ROOM, "one", "e1", lines), Kept(ROOM, "two", "e1", list(lines))],
        heard=[Heard("eve", ROOM, 0, "e1", list(lines)), Heard("dan", ROOM, 2, "e1", lines[2:])],
        passing=[Heard("eve", "live:1", lines=[Line(0, "cat.1"), Line(0, "fox.1"), Line(0, "cat.3")])],
        passed={"cat.1", "cat.2", "cat.3", "fox.1"},
        waited=[Waited("one", 10.0, 9.0), Waited("two", 10.0, 3.5)],
        most_wait_s=4.0,
        ended=[Ended("eve", "one", 1006, "", 12.0)],
        downs=[Down("one", 11.0, 13.0)],
        vanished=[Vanished("c1", "one", 9.0, 12.0)],
        leaves=[Leaves("dan", "c1", 1)],
    )


def test_a_sound_storm_has_no_fault() -> None:
    """Unknown outcomes may be there or not, a repeated key is told the first one's position: nothing is found."""
    assert judge(_sound()) == []


def _line(notes: Notes, at: int, line: Line) -> None:
    for kept in notes.kept:
        kept.lines = [*kept.lines[:at], line, *kept.lines[at + 1 :]]


def _appended(notes: Notes, *lines: Line) -> None:
    for kept in notes.kept:
        kept.lines = [*kept.lines, *lines]
    for heard in notes.heard:
        heard.lines = [*heard.lines, *lines]


def _heard(notes: Notes, *offsets: int) -> None:
    notes.heard[0].lines = [Line(n, f"ann.{n}") for n in offsets]


WRONG: dict[str, tuple[Callable[[Notes], object], str]] = {
    "a hole in a list": (lambda notes: _heard(notes, 1, 2, 4, 5, 6), "hole"),
    "a publication delivered twice": (lambda notes: _heard(notes, 1, 2, 3, 3, 4, 5, 6), "repeated"),
    "a page delivered twice": (lambda notes: _heard(notes, 1, 2, 3, 4, 2, 3, 4, 5, 6), "repeated"),
    "two that changed places": (lambda notes: _heard(notes, 1, 3, 2, 4, 5, 6), "order"),
    "a list that begins too late": (lambda notes: _heard(notes, 2, 3, 4, 5, 6), "hole"),
    "a list that ends too early": (lambda notes: _heard(notes, 1, 2, 3, 4, 5), "short"),
    "a subscriber that heard nothing": (lambda notes: _heard(notes), "short"),
    "an offset beyond the top": (lambda notes: _heard(notes, 1, 2, 3, 4, 5, 6, 7), "unknown"),
    "another payload than history's": (lambda notes: notes.heard[0].lines.__setitem__(1, Line(2, "ann.9")), "moved"),
    "a recovery refused": (lambda notes: notes.heard[0].unrecovered.append(3), "unrecovered"),
    "a subscriber in another epoch": (lambda notes: setattr(notes.heard[0], "epoch", "e2"), "epoch"),
    "an acknowledged one lost": (lambda notes: notes.said.append(Said(ROOM, "ann.9", "acknowledged")), "lost"),
    "an acknowledged one at another offset": (
        lambda notes: notes.said.__setitem__(1, Said(ROOM, "ann.2", "acknowledged", 3, "e1")),
        "moved",
    ),
    "an acknowledged one beyond the top": (
        lambda notes: notes.said.__setitem__(1, Said(ROOM, "ann.2", "acknowledged", 9, "e1")),
        "lost",
    ),
    "an acknowledgement of another epoch": (
        lambda notes: notes.said.__setitem__(1, Said(ROOM, "ann.2", "acknowledged", 2, "e2")),
        "epoch",
    ),
    "a publication stored twice": (lambda notes: _appended(notes, Line(7, "ann.2")), "doubled"),
    "an unknown outcome stored twice": (lambda notes: _appended(notes, Line(7, "ann.7"), Line(8, "ann.7")), "doubled"),
    "a refused one stored": (lambda notes: _appended(notes, Line(7, "ann.8")), "refused"),
    "one that nobody said": (lambda notes: _appended(notes, Line(7, "ghost.1")), "unknown"),
    "a key that published twice": (lambda notes: _appended(notes, Line(7, "bob.1", "key")), "double key"),
    "a key told two positions": (
        lambda notes: notes.said.append(Said(ROOM, "bob.2", "acknowledged", 5, "e1", "key")),
        "double key",
    ),
    "a key acknowledged and not there": (
        lambda notes: notes.said.append(Said(ROOM, "bob.2", "acknowledged", 0, "", "another key")),
        "lost",
    ),
    "a hole in the numbers": (lambda notes: _line(notes, 2, Line(9, "ann.3")), "numbering"),
    "a number twice": (lambda notes: _line(notes, 2, Line(2, "ann.3")), "numbering"),
    "two processes of two opinions": (
        lambda notes: setattr(notes.kept[1], "lines", notes.kept[1].lines[:5]),
        "two truths",
    ),
    "two processes in two epochs": (lambda notes: setattr(notes.kept[1], "epoch", "e2"), "two truths"),
    "a channel without history": (lambda notes: notes.heard.append(Heard("eve", "chat:2")), "unknown"),
    "a passing one delivered twice": (lambda notes: notes.passing[0].lines.append(Line(0, "cat.3")), "repeated"),
    "a passing one out of order": (lambda notes: notes.passing[0].lines.append(Line(0, "cat.2")), "order"),
    "a passing one that nobody said": (lambda notes: notes.passing[0].lines.append(Line(0, "cat.9")), "unknown"),
    "a client thrown out": (
        lambda notes: notes.ended.append(Ended("dan", "two", 3004, "internal", 12.0)),
        "disconnected",
    ),
    "a client thrown out long after": (
        lambda notes: notes.ended.append(Ended("eve", "one", 3008, "slow", 99.0)),
        "disconnected",
    ),
    "an outcome that took too long": (lambda notes: notes.waited.append(Waited("two", 10.0, 4.5)), "late"),
    "a ghost": (lambda notes: notes.vanished.append(Vanished("c2", "one", 12.5, 12.0)), "ghost"),
    "a ghost for ever": (lambda notes: notes.vanished.append(Vanished("c2", "one", None, 12.0)), "ghost"),
    "a leave told twice": (lambda notes: notes.leaves.append(Leaves("eve", "c1", 2)), "repeated"),
}


@pytest.mark.parametrize("story", WRONG)
def test_every_wrong_is_named(story: str) -> None:
    """Notes that show one broken promise are judged to show it, by its name."""
    notes = _sound()
    spoil, kind = WRONG[story]
    spoil(notes)
    faults = judge(notes)
    assert kind in {fault.kind for fault in faults}, summary(faults) if faults else "nothing was found"


def test_the_summary_counts_and_is_short() -> None:
    """A storm that went wrong all over says how much of what, and then the first faults only."""
    notes = _sound()
    notes.said += [Said(ROOM, f"ann.{n}", "acknowledged") for n in range(100, 200)]
    text = summary(judge(notes))
    assert text.startswith("100 × lost\n")
    assert len(text.splitlines()) == 21


@pytest.mark.parametrize("seed", range(30))
def test_the_schedule_keeps_its_bounds(seed: int) -> None:
    """Two faults at once at most, never two of one part, all healed in time; every kind comes in half an hour."""
    faults = planned(seed, 1800, 3)
    assert faults == planned(seed, 1800, 3)
    assert faults != planned(seed + 1, 1800, 3)
    assert {fault.kind for fault in faults} == set(KINDS)
    assert max(fault.end_s for fault in faults) <= 1800
    assert {fault.process for fault in faults} == {0, 1, 2}
    assert all(one.at_s <= other.at_s for one, other in pairwise(faults))
    for fault in faults:
        at_once = [one for one in faults if one.at_s <= fault.at_s < one.end_s]
        assert len(at_once) <= AT_ONCE
        assert max(Counter(KINDS[one.kind].part for one in at_once).values()) == 1


@pytest.mark.parametrize("seed", range(30))
def test_a_short_schedule_has_most_kinds(seed: int) -> None:
    """In three quarters of a minute, with short faults, eight kinds and more come, none longer than it may be."""
    faults = planned(seed, 45, 2, longest_s=5, pause_s=0.5)
    assert len({fault.kind for fault in faults}) >= 8
    assert max(fault.length_s for fault in faults) <= 5


def test_the_report_charges_what_was_under_way() -> None:
    """A wait is charged to all disturbances that it overlaps, there or elsewhere, and to none that was over before."""
    disturbances = [Disturbance("redis cut", "one", 10.0, 15.0), Disturbance("redis lossy", "", 16.0, 20.0)]
    said = [Said(ROOM, f"ann.{at}", "acknowledged", at=at, began=at - 1) for at in (5.0, 11.0, 14.5, 30.0)]
    said.append(Said(ROOM, "ann.12.0", "unknown", at=12.0, began=11.0))
    deliveries = [
        Delivery("ann.5.0", 5.1, "one", 0.0),
        Delivery("ann.11.0", 15.0, "one", 0.0),
        Delivery("ann.11.0", 11.2, "two", 0.0),
        Delivery("ann.14.5", 16.5, "two", 0.0),
        Delivery("ann.14.5", 18.5, "one", 16.0),  # was away when it was acknowledged
        Delivery("ann.30.0", 30.3, "two", 0.0),
    ]
    found = {row.kind: row for row in rows(disturbances, said, deliveries, [Waited("one", 12.0, 3.0)])}
    cut, lossy, calm = found["redis cut"], found["redis lossy"], found[CALM]
    assert (cut.lasted, cut.there, max(cut.elsewhere), cut.outcome_s) == ([5.0], [4.0], 2.0, 3.0)
    assert (lossy.lasted, lossy.there, lossy.elsewhere, lossy.outcome_s) == ([4.0], [], [2.0], 0.0)
    assert (cut.acknowledged, lossy.acknowledged, calm.acknowledged) == ([1.0, 1.0], [], [1.0, 1.0])
    assert [round(one, 3) for one in calm.elsewhere] == [0.1, 0.3]


def test_a_spread_names_times_that_were_seen() -> None:
    """Median, 99th percentile and worst are nearest ranks; of nothing there is nothing."""
    assert spread([]) == Spread()
    assert spread([3.0]) == Spread(1, 3.0, 3.0, 3.0)
    assert spread(n / 100 for n in range(200, 0, -1)) == Spread(200, 1.0, 1.98, 2.0)


def test_the_page_says_what_was_found() -> None:
    """A storm that broke a promise says so at the top of its page, and one that broke none says that."""
    figures = Figures(7, 1800.0, 3, "make storm MINUTES=30 SEED=7", rows([], [], [], []), {"sent": 12_345})
    figures.rows[0].acknowledged, figures.rows[0].lasted = [0.004, 0.02, 1.5], [2.0, 3.5]
    figures.rows[0].there, figures.rows[0].elsewhere = [0.3], [0.001, 0.002]
    figures.disturbances = [Disturbance(figures.rows[0].kind, "process 1", 61.4, 63.4)]
    what = KINDS[figures.rows[0].kind].what
    assert f"| {what} | 2 | 2.0 | 3.5 | 6 |" in page(figures)
    assert f"| {what} | 3 | 20 / 1,500 / 1,500 | 0 | 3 | 300 / 300 / 300 | 1 / 2 / 2 |" in page(figures)
    assert f"| 61 | {what} | process 1 | 2.0 |" in page(figures)
    assert "12,345" in page(figures)
    assert "make storm MINUTES=30 SEED=7" in page(figures)
    assert "no hole, no repeat" in page(figures)
    figures.faults = judge(Notes(passing=[Heard("eve", "live:1", lines=[Line(0, "cat.1")])]))
    assert "**1 promises were broken:**" in page(figures)
    assert "nobody said it" in page(figures)


def test_a_slow_delivery_needs_an_excuse() -> None:
    """Longer than a sweep may take only what waited for MongoDB or for a stopped process, and there."""
    said = [Said(ROOM, "ann.1", "acknowledged", at=10.0)]
    late = list(waits(said, [Delivery("ann.1", 25.0, "one", 0.0), Delivery("ann.1", 12.0, "two", 0.0)]))
    excused = [Disturbance("mongo stalled", "one", 9.0, 24.0), Disturbance("primary killed", "", 9.0, 20.0)]
    for excuse in excused:
        assert not list(slow(late, [excuse], 10.0))
    for none in (
        Disturbance("redis stopped", "", 9.0, 24.0),
        Disturbance("mongo stalled", "two", 9.0, 24.0),
        Disturbance("primary killed", "", 0.0, 4.0),
    ):
        (fault,) = slow(late, [none], 10.0)
        assert (fault.kind, fault.where) == ("slow", "one")


@dataclass
class Nowhere:
    """A process that is only a name."""

    name: str
    url: str = ""
    http: str = ""


class Diary(Voice):
    """A voice that never learns what became of its words, and notes what it does."""

    MOST = 60

    def __init__(self, world: World, home: Nowhere) -> None:
        super().__init__(world, home)
        self.did: list[str] = []

    async def _publish(self, channel: str, payload: Mapping[str, Any], key: str) -> Answer:
        self.did.append("publish")
        if self.did.count("publish") == self.MOST:
            self.world.enough.set()
        return UNKNOWN

    def move(self) -> None:
        """See ``Voice``."""
        super().move()
        self.did.append("move")

    async def drop(self) -> None:
        """See ``Voice``."""
        self.did.append("drop")


async def test_who_moves_lets_go_first() -> None:
    """A connection that stayed was noted at the place its writer had moved to, and that was blamed for a stop."""
    places = [Nowhere("one"), Nowhere("two")]
    world = World(places, Random(5), lambda: 0.0)
    diary = Diary(world, places[0])
    await write(world, "ann", [ROOM], diary, keyed=False, pause_s=0.0)
    assert diary.did.count("move") > 5
    assert all(before == "drop" for before, after in pairwise(diary.did) if after == "move")
    assert {one.process for one in world.notes.waited} == {"one", "two"}
