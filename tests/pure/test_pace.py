"""The pace of those who are behind: how much of them is in one turn of the loop, and what waits for a commit."""

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import pytest
from weather import live_through

from server.pace import HOLD_LINE, HOLD_S, TURN_PUBLICATIONS, Pace


class Crowd:
    """A pace, and who was let through by it: in which turn of the loop, and at what time of it."""

    def __init__(self) -> None:
        self.pace = Pace()
        self.through: list[tuple[str, int, float]] = []
        self.turn = 0
        self._counting = asyncio.create_task(self._count())

    async def _count(self) -> None:
        while True:
            self.turn += 1
            await asyncio.sleep(0)

    def quiet(self) -> None:
        """Count turns no more: the loop's clock goes on only when it has nothing to do."""
        self._counting.cancel()

    async def go(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Wait for ``work``, and note it."""
        await work
        self.through.append((name, self.turn, asyncio.get_running_loop().time()))

    def send(self, name: str, publications: int) -> asyncio.Task[None]:
        """Somebody has a page of so many to be sent."""
        return asyncio.create_task(self.go(name, self.pace.sending(publications)))

    def read(self, name: str) -> asyncio.Task[None]:
        """Somebody wants a page to be read."""
        return asyncio.create_task(self.go(name, self.pace.reading()))

    @property
    def names(self) -> list[str]:
        """Who is through, in this order."""
        return [name for name, _, _ in self.through]

    def times(self) -> dict[str, float]:
        """When each went through, in seconds of the loop."""
        return {name: at for name, _, at in self.through}


def test_a_turn_holds_one_long_page_or_several_short_ones() -> None:
    """However many come at once, in one turn no more is sent than the page that reaches the limit, in their order."""

    async def story() -> None:
        crowd = Crowd()
        lengths = [100] * 20 + [1] * 500 + [60] * 10 + [1_000, 100, 1_000]
        await asyncio.gather(*(crowd.send(str(number), length) for number, length in enumerate(lengths)))
        assert crowd.names == [str(number) for number in range(len(lengths))]
        turns: dict[int, list[int]] = {}
        for (_, turn, _), length in zip(crowd.through, lengths, strict=True):
            turns.setdefault(turn, []).append(length)
        assert all(sum(sent[:-1]) < TURN_PUBLICATIONS for sent in turns.values())
        assert len(turns) <= 20 + 5 + 5 + 3 + 2
        crowd.quiet()

    live_through(story())


def test_who_comes_later_in_a_turn_waits_as_well() -> None:
    """What was sent in this turn counts, whether or not anybody is in line; the next one begins anew."""

    async def story() -> None:
        crowd = Crowd()
        await crowd.pace.sending(TURN_PUBLICATIONS)
        await asyncio.gather(crowd.send("a", TURN_PUBLICATIONS), crowd.send("b", TURN_PUBLICATIONS))
        assert len({turn for _, turn, _ in crowd.through}) == 2
        for _ in range(3):
            await asyncio.sleep(0)
        before = crowd.turn
        await crowd.pace.sending(TURN_PUBLICATIONS)
        assert crowd.turn == before, "it waited for nobody"
        crowd.quiet()

    live_through(story())


def test_an_empty_page_waits_for_nothing() -> None:
    """Who has missed nothing is not sent a page, and needs no turn."""

    async def story() -> None:
        crowd = Crowd()
        crowd.pace.committing()
        held = crowd.send("held", 1)
        await asyncio.sleep(0)
        await crowd.go("empty", crowd.pace.sending(0))
        assert crowd.names == ["empty"]
        crowd.pace.committed()
        await held
        crowd.quiet()

    live_through(story())


def test_pages_wait_for_a_commit() -> None:
    """While one is on its way nothing is sent or read; they go on in the turn in which the last one is over."""

    async def story() -> None:
        crowd = Crowd()
        crowd.quiet()
        crowd.pace.committing()
        tasks = [crowd.send("page", 100), crowd.read("read"), crowd.send("next", 100)]
        await asyncio.sleep(HOLD_S / 2)
        assert crowd.names == []
        crowd.pace.committed()
        await asyncio.gather(*tasks)
        assert crowd.names == ["page", "read", "next"]
        assert set(crowd.times().values()) == {HOLD_S / 2}

    live_through(story())


def test_a_read_that_nobody_holds_begins_at_once() -> None:
    """Without a commit a read waits for nothing, even if pages are in line."""

    async def story() -> None:
        crowd = Crowd()
        pages = [crowd.send(str(number), 100) for number in range(5)]
        read = crowd.read("read")
        await read
        assert crowd.names.index("read") < 3
        await asyncio.gather(*pages)
        crowd.quiet()

    live_through(story())


def test_commits_that_have_no_end_hold_for_a_moment_only() -> None:
    """With commits all the time pages and commits take turns: one turn of pages, and a moment."""

    async def story() -> None:
        crowd = Crowd()
        crowd.quiet()
        crowd.pace.committing()
        await asyncio.gather(*(crowd.send(str(number), 100) for number in range(5)))
        times = list(crowd.times().values())
        assert times == pytest.approx([HOLD_S * (number + 1) for number in range(5)])

    live_through(story())


def test_a_long_line_does_not_wait_for_commits() -> None:
    """Replies have to come in time: with too many in line they go as fast as the loop does, down to that many."""

    async def story() -> None:
        crowd = Crowd()
        crowd.quiet()
        crowd.pace.committing()
        await asyncio.gather(*(crowd.send(str(number), 100) for number in range(3 * HOLD_LINE)))
        at_once = Counter(crowd.times().values())[0.0]
        assert at_once == 2 * HOLD_LINE, "the others waited"

    live_through(story())


def test_who_gives_up_holds_up_nobody() -> None:
    """Whoever was cancelled in line takes no turn, and the line goes on behind them."""

    async def story() -> None:
        crowd = Crowd()
        crowd.quiet()
        crowd.pace.committing()
        tasks = [crowd.send(str(number), 100) for number in range(4)]
        await asyncio.sleep(0)
        for gone in tasks[:3]:
            gone.cancel()
        await asyncio.wait(tasks)
        assert crowd.names == ["3"]
        assert crowd.times()["3"] == pytest.approx(HOLD_S)
        crowd.pace.committed()
        await asyncio.wait([crowd.send("4", 100)])
        assert crowd.names == ["3", "4"]

    live_through(story())
