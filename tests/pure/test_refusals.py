"""What the log has of refused requests: bounded for each address and over all, and nothing uncounted."""

import pytest
from conftest import ExpectedLog

from handlers import refusals
from handlers.refusals import KINDS, LINES, Refusals
from server.observe import happened


class Clock:
    """Seconds, as the test says."""

    now = 100.0

    def __call__(self) -> float:
        """See ``Refusals``."""
        return self.now


def refuse(told: Refusals, address: str = "10.0.0.1", code: int = 107, times: int = 1) -> None:
    """Refuse so often."""
    for _ in range(times):
        told.say("command.refused", address, code, client="", method="rest", why="because")


def counts(log: ExpectedLog) -> list[int]:
    """How many refusals each line stands for."""
    return [fields["count"] for fields in log.seen("command.refused")]


def test_the_same_one_is_said_once_a_second(log: ExpectedLog) -> None:
    """The first refusal is in the log at once; those that follow are in the next line, a second later or more."""
    clock, before = Clock(), happened["command.refused"]
    told = Refusals(clock)
    refuse(told, times=500)
    assert counts(log) == [1]
    clock.now += 0.9
    refuse(told, times=20)
    assert counts(log) == [1]
    clock.now += 0.2
    refuse(told)
    assert counts(log) == [1, 520]
    clock.now += 60
    refuse(told)
    assert counts(log) == [1, 520, 1]
    assert happened["command.refused"] - before == 522


def test_others_are_heard_through_a_flood(log: ExpectedLog) -> None:
    """Another address, and another refusal of the same one, has a line of its own."""
    told = Refusals(Clock())
    refuse(told, times=100)
    refuse(told, "10.0.0.2")
    refuse(told, code=103)
    assert [(fields["address"], fields["code"]) for fields in log.seen("command.refused")] == [
        ("10.0.0.1", 107),
        ("10.0.0.2", 107),
        ("10.0.0.1", 103),
    ]


def test_an_ipv6_host_is_one_whatever_its_address(log: ExpectedLog) -> None:
    """A host has 2 ** 64 addresses: they share their line, as they share a bucket (PROTOCOL 8.6.5)."""
    told = Refusals(Clock())
    for number in range(100):
        refuse(told, f"2001:db8::{number:x}")
    refuse(told, "2001:db8:0:1::1")
    assert counts(log) == [1, 1]


def test_a_flood_from_everywhere_is_bounded(log: ExpectedLog) -> None:
    """However many addresses there are, a second has so many lines; what was not said is in a later one."""
    clock = Clock()
    told = Refusals(clock)
    for number in range(1000):
        refuse(told, f"10.0.{number // 250}.{number % 250}")
    assert counts(log) == [1] * LINES
    clock.now += 1
    refuse(told, "10.0.3.249")
    assert counts(log)[LINES:] == [2]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the kinds that are remembered the one that was heard of longest ago gives way."""
    assert KINDS == 10_000
    monkeypatch.setattr(refusals, "KINDS", 10)
    told = Refusals(Clock())
    for number in range(1000):
        refuse(told, f"10.0.{number // 250}.{number % 250}")
    assert len(told) == 10
