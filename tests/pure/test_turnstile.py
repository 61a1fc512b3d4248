"""The line of those who come back: who goes through when, and who is told at once that it would be too late."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from weather import live_through

from server.errors import Overdue
from server.limits import Owner, owner_of
from server.turnstile import Turnstile

SETTING = "client.recovery_rate_limit"
LONG_S = 1_000.0
SOMEBODY = owner_of("", "198.51.100.7")


class Comer:
    """Somebody who may go away."""

    def __init__(self) -> None:
        self.closed = False


class Passage:
    """A turnstile, and who went through it at what time of the loop; ``waited`` had to wait for it."""

    def __init__(self, per_second: float) -> None:
        self.waited = 0
        self.turnstile = Turnstile(per_second, SETTING, self._note_wait)
        self.through: list[tuple[str, float]] = []

    def _note_wait(self) -> None:
        self.waited += 1

    async def go(
        self, key: str, comer: Comer | None = None, patience_s: float = LONG_S, owner: Owner = SOMEBODY
    ) -> None:
        """Go through, and note it."""
        await self.turnstile.take(key, comer or Comer(), owner, patience_s)
        self.through.append((key, asyncio.get_running_loop().time()))

    async def all(self, *keys: str) -> None:
        """Everybody comes at once, in this order."""
        await asyncio.gather(*map(self.go, keys))

    async def line_up(
        self, *keys: str, owner: Owner = SOMEBODY, patience_s: float = LONG_S
    ) -> list[asyncio.Task[None]]:
        """Somebody comes for all of these, and waits by now."""
        tasks = [asyncio.create_task(self.go(key, None, patience_s, owner)) for key in keys]
        await asyncio.sleep(0)
        return tasks

    @property
    def order(self) -> list[str]:
        """Who went through, in this order."""
        return [key for key, _ in self.through]


def _live(story: Coroutine[Any, Any, None]) -> None:
    live_through(story)


def test_a_burst_and_then_the_rate_in_order() -> None:
    """Ten a second: the first ten at once, the others a tenth of a second apart, as they came; then it is quiet."""

    async def story() -> None:
        passage = Passage(10)
        await passage.all(*map(str, range(35)))
        assert [key for key, _ in passage.through] == list(map(str, range(35)))
        expected = [0.0] * 10 + [number / 10 for number in range(1, 26)]
        assert [at for _, at in passage.through] == pytest.approx(expected, abs=0.06)
        assert passage.waited == 25
        await asyncio.sleep(5)
        await passage.all(*map(str, range(10)))
        assert passage.waited == 25

    _live(story())


def test_who_comes_for_the_same_goes_as_one() -> None:
    """A thousand for one thing, who come while it waits for its turn, go through by one token, and hold nobody up."""

    async def story() -> None:
        passage = Passage(1)
        await passage.go("first")
        await passage.all(*["crowd"] * 1_000, "after them")
        assert [key for key, _ in passage.through] == ["first", *["crowd"] * 1_000, "after them"]
        assert {round(at) for key, at in passage.through if key == "crowd"} == {1}
        assert round(passage.through[-1][1]) == 2

    _live(story())


def test_who_would_wait_too_long_is_told_at_once() -> None:
    """With patience for two seconds two get in line, the third is refused in no time; one with more patience is not."""

    async def story() -> None:
        passage = Passage(1)
        await passage.go("first")
        asked = [asyncio.create_task(passage.go(str(number), patience_s=2)) for number in range(3)]
        with pytest.raises(Overdue, match=SETTING):
            await asked[2]
        assert asyncio.get_running_loop().time() == 0.0
        with pytest.raises(Overdue, match=SETTING):
            await passage.go("1", patience_s=1)  # its own thing has its turn in two seconds
        await passage.go("patient")
        assert [key for key, _ in passage.through] == ["first", "0", "1", "patient"]
        assert passage.waited == 3

    _live(story())


def test_who_goes_away_takes_no_token() -> None:
    """Neither those whose wait was cancelled, nor those who closed while they waited, hold up the others."""

    async def story() -> None:
        passage = Passage(1)
        await passage.go("first")
        gone = Comer()
        tasks = [asyncio.create_task(passage.go(key, gone)) for key in ("closed", "cancelled", "shared")]
        tasks += [asyncio.create_task(passage.go(key)) for key in ("shared", "last")]
        await asyncio.sleep(0)
        tasks[1].cancel()
        gone.closed = True
        await asyncio.wait(tasks)
        assert {key: round(at) for key, at in passage.through} == {"first": 0, "closed": 1, "shared": 1, "last": 2}
        assert tasks[1].cancelled()

    _live(story())


def test_a_line_of_those_who_left_is_none() -> None:
    """When all who waited have been cancelled, the next one waits for nobody but the bucket."""

    async def story() -> None:
        passage = Passage(1)
        await passage.go("first")
        tasks = [asyncio.create_task(passage.go(str(number))) for number in range(50)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await passage.go("second", patience_s=1)
        assert passage.through[-1][0] == "second"
        assert passage.through[-1][1] <= 1

    _live(story())


@pytest.mark.parametrize("per_second", [0, 1_000])
def test_another_rate_is_for_those_who_wait_as_well(per_second: int) -> None:
    """Whoever raises the limit lets the line through, and does not wait until it has gone at the old rate."""

    async def story() -> None:
        passage = Passage(1)
        waiting = asyncio.create_task(passage.all(*map(str, range(100))))
        await asyncio.sleep(0)
        passage.turnstile.renew(per_second)
        await waiting
        assert asyncio.get_running_loop().time() < 0.2
        assert len(passage.through) == 100

    _live(story())


def test_without_a_limit_nobody_waits() -> None:
    """A rate of 0 is none."""

    async def story() -> None:
        passage = Passage(0)
        await passage.all(*map(str, range(5_000)))
        assert (passage.waited, len(passage.through)) == (0, 5_000)

    _live(story())


# --- whose turn it is ------------------------------------------------------------
def user(name: object) -> Owner:
    """The owner that a user is."""
    return owner_of(f"user {name}", "198.51.100.7")


def test_owners_take_turns() -> None:
    """One thing of each owner after the other, and of one owner in the order in which they came."""

    async def story() -> None:
        passage = Passage(1)
        await passage.go("first")
        tasks = await passage.line_up("a1", "a2", "a3", "a4", owner=user("a"))
        tasks += await passage.line_up("b1", "b2", owner=user("b"))
        tasks += await passage.line_up("c1", owner=user("c"))
        await asyncio.wait(tasks)
        assert passage.order == ["first", "a1", "b1", "c1", "a2", "b2", "a3", "a4"]
        assert [round(at) for _, at in passage.through] == list(range(8))

    _live(story())


def test_who_sends_hundreds_waits_behind_themselves() -> None:
    """450 of one address are in line for made-up things: three who come then go through next, and need little patience.

    The 450 lose nothing by it but those three turns.
    """

    async def story() -> None:
        passage = Passage(10)
        await passage.all(*map(str, range(10)))
        hostile = await passage.line_up(*(f"made up {number}" for number in range(450)))
        honest = [(await passage.line_up(str(name), owner=user(name), patience_s=0.5))[0] for name in range(3)]
        await asyncio.gather(*honest)
        assert asyncio.get_running_loop().time() < 0.5
        assert len(passage.turnstile) >= 446
        await asyncio.gather(*hostile)
        assert asyncio.get_running_loop().time() == pytest.approx(45.3, abs=0.6)

    _live(story())


def test_hostile_connections_that_come_again_and_again_take_half() -> None:
    """Of one owner whose things never end and another who asks for one at a time each gets every second token."""

    async def story() -> None:
        passage = Passage(10)
        await passage.all(*map(str, range(10)))

        async def flood(number: int) -> None:
            for again in range(1_000):
                await passage.go(f"made up {number} {again}")

        flood_tasks = [asyncio.create_task(flood(number)) for number in range(450)]
        await asyncio.sleep(0)
        for number in range(50):
            await passage.go(str(number), patience_s=0.35, owner=user("honest"))
        assert asyncio.get_running_loop().time() <= 10.5
        for task in flood_tasks:
            task.cancel()
        await asyncio.wait(flood_tasks)
        assert len(passage.turnstile) == 0

    _live(story())


def test_what_somebody_wants_last_is_not_held_back_for_others() -> None:
    """A thing that stands far back in one owner's line goes through for both when another owner's turn comes."""

    async def story() -> None:
        passage = Passage(1)
        await passage.go("first")
        tasks = await passage.line_up(*(f"a{number}" for number in range(9)), "both", owner=user("a"))
        tasks += await passage.line_up("both", owner=user("b"), patience_s=2.5)
        await asyncio.gather(*tasks)
        assert passage.order == ["first", "a0", "both", "both", *(f"a{number}" for number in range(1, 9))]

    _live(story())


def test_a_crowd_of_many_owners_is_one_to_the_others() -> None:
    """A thousand users who come for one thing take one token, and hold up nobody who comes behind them."""

    async def story() -> None:
        passage = Passage(1)
        await passage.go("first")
        crowd = [(await passage.line_up("crowd", owner=user(number)))[0] for number in range(1_000)]
        await passage.go("behind", patience_s=2.5, owner=user("behind"))
        await asyncio.gather(*crowd)
        assert len(passage.through) == 1_002
        assert {round(at) for key, at in passage.through if key == "crowd"} == {1}

    _live(story())


def test_whose_time_is_up_is_told_so_and_takes_no_token() -> None:
    """What others' coming has put off beyond its time is refused when that is over, not read for in vain."""

    async def story() -> None:
        passage = Passage(1)
        await passage.go("first")
        tasks = await passage.line_up("a1", "a2", owner=user("a"), patience_s=2.5)
        others = [(await passage.line_up(f"b{name}", owner=user(name)))[0] for name in range(4)]
        with pytest.raises(Overdue, match=SETTING):
            await tasks[1]
        assert asyncio.get_running_loop().time() == 2.5
        await asyncio.gather(*others)
        assert [(key, round(at)) for key, at in passage.through] == [
            ("first", 0),
            ("a1", 1),
            *((f"b{name}", 2 + name) for name in range(4)),
        ]

    _live(story())


def test_the_line_is_bounded() -> None:
    """However many owners come for however much, in line are no more than can go through, for each order of coming."""

    async def story() -> None:
        passage = Passage(100)
        await passage.all(*map(str, range(100)))
        tasks: list[asyncio.Task[None]] = []
        for name in range(300):
            keys = [f"{name} {number}" for number in range(300)]
            tasks += await passage.line_up(*keys, owner=user(name), patience_s=1)
        assert 100 <= len(passage.turnstile) <= 100 * 6
        assert sum(not task.done() for task in tasks) == len(passage.turnstile)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {type(None), Overdue}
        assert asyncio.get_running_loop().time() <= 1.1
        assert len(passage.turnstile) == 0

    _live(story())
