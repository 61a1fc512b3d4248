"""Sockets that have something to read: each reader is told, whatever the others do."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from conftest import ExpectedLog

from handlers.arrivals import TURN_SOCKETS, Arrivals


class Ear:
    """Reads one end of a pair of sockets, into a list that all share."""

    def __init__(self, heard: "list[Ear]", said: asyncio.Event) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.setblocking(False)
        self.heard = heard
        self.said = said
        self.then: Callable[[], None] = lambda: None

    def readable(self) -> None:
        """See ``arrivals.Reader``."""
        self.heard.append(self)
        self.said.set()
        self.then()
        self.ours.recv(100)


@contextmanager
def listening(count: int) -> "Iterator[tuple[Arrivals, list[Ear], list[Ear], asyncio.Event]]":
    """So many ears, each with something to hear from the next turn of the loop on; and who has heard."""
    arrivals, heard, said = Arrivals(), [], asyncio.Event()
    ears = [Ear(heard, said) for _ in range(count)]
    for ear in ears:
        arrivals.expect(ear.ours.fileno(), ear)
        ear.theirs.send(b"x")
    try:
        yield arrivals, ears, heard, said
    finally:
        for ear in ears:
            arrivals.ignore(ear.ours.fileno())
            ear.ours.close()
            ear.theirs.close()


async def until(said: asyncio.Event, done: Callable[[], bool]) -> None:
    """Wait until ``done`` is true of what was heard."""
    async with asyncio.timeout(10):
        while not done():
            said.clear()
            await said.wait()


async def test_more_than_one_turn_takes() -> None:
    """Each of more sockets than are read in one go is told, and none a second time before all have been."""
    count = TURN_SOCKETS * 2 + 1
    with listening(count) as (_, ears, heard, said):
        for ear in ears:
            ear.theirs.send(b"more")
        await until(said, lambda: len(heard) >= count)
        assert set(heard[:count]) == set(ears)


async def test_a_reader_that_fails(log: ExpectedLog) -> None:
    """A fault in one reader is logged, and keeps nothing from the others."""
    log.expect("task.failed")

    def fail() -> None:
        ears[0].then = lambda: None
        raise RuntimeError("a fault of ours")

    with listening(3) as (_, ears, heard, said):
        ears[0].then = fail
        await until(said, lambda: len(set(heard)) == 3)
        await until(said, lambda: heard.count(ears[0]) == 2)  # what it did not read is still there
    assert len(log.seen("task.failed")) == 1


async def test_one_reader_ends_another() -> None:
    """Who is ended by a reader that was told before it in the same turn is not told any more."""
    with listening(2) as (arrivals, ears, heard, said):

        def end_the_other() -> None:
            for ear in ears:
                if ear is not heard[0]:
                    arrivals.ignore(ear.ours.fileno())
                    ear.ours.close()

        for ear in ears:
            ear.then = end_the_other
        await until(said, lambda: bool(heard))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(heard) == 1
        for ear in ears:
            if ear is not heard[0]:
                ear.ours = socket.socket()  # so that it can be closed once more


async def test_nobody_is_told_after_ignore() -> None:
    """Who is not expected any more hears nothing; to ignore it twice is once."""
    with listening(2) as (arrivals, ears, heard, said):
        arrivals.ignore(ears[0].ours.fileno())
        arrivals.ignore(ears[0].ours.fileno())
        await until(said, lambda: bool(heard))
        assert set(heard) == {ears[1]}
        arrivals.expect(ears[0].ours.fileno(), ears[0])
        await until(said, lambda: ears[0] in heard)
