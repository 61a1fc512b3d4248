"""The promises of ``server.broker``, asked of every kind.

A kind joins by a line in ``KINDS``: how to open several brokers that hear one
another, as those of several processes do.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import NamedTuple

import msgspec
import pytest
from redis_server import shared_cluster, shared_sentinels, shared_server, unique_prefix

from server.broker import (
    Answer,
    Ask,
    Broker,
    Bye,
    Hello,
    Joined,
    Left,
    Note,
    Published,
    Spent,
    Word,
)
from server.broker.memory import Bus, MemoryBroker
from server.broker.redis import RedisBroker
from server.settings import RedisSettings
from server.stream import ClientInfo, Position, Publication

PATIENCE_S = 15.0


class Ear:
    """One process as its broker sees it: what it heard, in order."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.words: list[Word] = []
        self.notes: list[Note] = []
        self._news = asyncio.Event()
        broker.on_word = self._hear
        broker.on_note = self._note

    def _hear(self, word: Word) -> None:
        self.words.append(word)
        self._news.set()

    def _note(self, note: Note) -> None:
        self.notes.append(note)
        self._news.set()

    async def until(self, done: Callable[[], bool]) -> None:
        """Wait until ``done`` is true of what was heard."""
        async with asyncio.timeout(PATIENCE_S):
            while not done():
                self._news.clear()
                await self._news.wait()

    def numbers(self, channel: str) -> list[int]:
        """The offsets announced in ``channel``, as they came."""
        return [word.top.offset for word in self.words if isinstance(word, Published) and word.channel == channel]


@asynccontextmanager
async def memory(count: int) -> AsyncIterator[list[Ear]]:
    """Brokers of nodes inside one process."""
    bus = Bus()
    ears = [Ear(MemoryBroker(bus)) for _ in range(count)]
    for number, ear in enumerate(ears):
        await ear.broker.open(f"node {number}")
    try:
        yield ears
    finally:
        for ear in ears:
            await ear.broker.close()


@asynccontextmanager
async def redis(count: int, url: str) -> AsyncIterator[list[Ear]]:
    """Brokers as those of several processes, on one Redis."""
    prefix = unique_prefix()
    ears = [Ear(RedisBroker(RedisSettings(url=url, prefix=prefix))) for _ in range(count)]
    try:
        await asyncio.gather(*(ear.broker.open(f"node {number}") for number, ear in enumerate(ears)))
        yield ears
    finally:
        await asyncio.gather(*(ear.broker.close() for ear in ears))


class Kind(NamedTuple):
    """A kind under test."""

    name: str
    opened: Callable[[int], AbstractAsyncContextManager[list[Ear]]]


KINDS = [
    Kind("memory", memory),
    Kind("redis", lambda count: redis(count, shared_server().url)),
    Kind("redis-sentinel", lambda count: redis(count, shared_sentinels().url)),
    Kind("redis-cluster", lambda count: redis(count, shared_cluster().url)),
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])


def word(number: int, channel: str = "c") -> Published:
    """The word that ``channel`` has reached ``number``."""
    return Published(channel, Position(number, "e"), (Publication(b"%d" % number, number),))


MARKS = [f"mark{number}" for number in range(24)]
"""Several, since words of different channels may come by different ways; among so many there is one of each way."""


async def _over(speaker: Ear, *hearers: Ear) -> None:
    """Wait until all that ``speaker`` has announced so far has arrived: marks follow it, in channels for that."""
    await asyncio.gather(*(hearer.broker.follow(mark) for hearer in hearers for mark in MARKS))
    before = [{mark: len(hearer.numbers(mark)) for mark in MARKS} for hearer in hearers]
    for mark in MARKS:
        speaker.broker.announce(word(1, mark))
    for hearer, marks in zip(hearers, before, strict=True):
        await hearer.until(
            lambda hearer=hearer, marks=marks: all(len(hearer.numbers(mark)) > marks[mark] for mark in MARKS)  # type: ignore[misc]
        )


@every_kind
async def test_who_has_others_is_not_alone(kind: Kind) -> None:
    """A broker says that nobody could hear only where that is certain; else what it is not given would be missed."""
    async with kind.opened(2) as (one, other):
        assert not one.broker.alone
        assert not other.broker.alone
    async with memory(1) as (one,):
        assert one.broker.alone


@every_kind
async def test_others_hear_what_they_follow(kind: Kind) -> None:
    """An announcement reaches every process that follows its channel, with all it says, and no other process."""
    info = ClientInfo("ann", "id", b'{"n":1}', b"2")
    publications = (Publication(b'{"a":1}', 7, 1_700_000_000_000, info, {"k": "v"}), Publication(b"\xff\x00", 8))
    said: list[Word] = [
        Published("c", Position(8, "epoch"), publications),
        Published("c", Position(9, "epoch")),
        Published("c", Position(), (Publication(b"passing"),)),
        Joined("c", info),
        Left("c", ClientInfo("", "other")),
    ]
    async with kind.opened(4) as (speaker, first, second, deaf):
        for ear in (first, second):
            await ear.broker.follow("c")
        for one in said:
            speaker.broker.announce(one)
        await _over(speaker, first, second, deaf)
        for ear in (first, second):
            heard = [one for one in ear.words if one.channel == "c"]
            assert [_plain(one) for one in heard] == [_plain(one) for one in said]
        assert {one.channel for one in deaf.words} == {*MARKS}


def _plain(one: Word) -> object:
    """A word in a form in which sequences of another type compare equal."""
    if isinstance(one, Published):
        return one.channel, one.top, list(one.publications)
    return one


@every_kind
async def test_own_words_are_not_heard(kind: Kind) -> None:
    """A process that follows a channel hears the others' words in it, and never its own."""
    async with kind.opened(2) as (one, other):
        for ear in (one, other):
            await ear.broker.follow("c")
        for number in range(1, 20):
            one.broker.announce(word(number))
            other.broker.announce(word(100 + number))
        await _over(one, other)
        await _over(other, one)
        assert one.numbers("c") == list(range(101, 120))
        assert other.numbers("c") == list(range(1, 20))


@every_kind
async def test_follow_is_in_force_when_it_returns(kind: Kind) -> None:
    """Whatever is announced after ``follow`` returned is heard, for channel after channel."""
    async with kind.opened(2) as (speaker, hearer):
        for number in range(1, 50):
            channel = f"c{number}"
            await hearer.broker.follow(channel)
            speaker.broker.announce(word(number, channel))
            await hearer.until(lambda channel=channel, number=number: hearer.numbers(channel) == [number])  # type: ignore[misc]


@every_kind
async def test_following_twice_is_following_once(kind: Kind) -> None:
    """A repeated ``follow`` changes nothing: each word is heard once, and one ``unfollow`` ends it."""
    async with kind.opened(2) as (speaker, hearer):
        await asyncio.gather(*(hearer.broker.follow("c") for _ in range(3)))
        speaker.broker.announce(word(1))
        await hearer.until(lambda: hearer.numbers("c") == [1])
        await hearer.broker.unfollow("c")
        speaker.broker.announce(word(2))
        await _over(speaker, hearer)
        assert hearer.numbers("c") == [1]


@every_kind
async def test_unfollow(kind: Kind) -> None:
    """After ``unfollow`` a channel is quiet here and goes on elsewhere; it may be called for one never followed."""
    async with kind.opened(3) as (speaker, leaver, stayer):
        for ear in (leaver, stayer):
            await ear.broker.follow("c")
        await leaver.broker.unfollow("c")
        await leaver.broker.unfollow("never followed")
        speaker.broker.announce(word(1))
        await _over(speaker, leaver, stayer)
        assert leaver.numbers("c") == []
        assert stayer.numbers("c") == [1]


@every_kind
async def test_follow_and_unfollow_take_effect_in_the_order_of_the_calls(kind: Kind) -> None:
    """Called without waiting in between, the last call of a channel decides."""
    async with kind.opened(2) as (speaker, hearer):
        broker = hearer.broker
        await asyncio.gather(
            *(call("on") for _ in range(20) for call in (broker.follow, broker.unfollow, broker.follow))
        )
        await asyncio.gather(*(call("off") for _ in range(20) for call in (broker.follow, broker.unfollow)))
        for channel in ("on", "off"):
            speaker.broker.announce(word(1, channel))
        await _over(speaker, hearer)
        assert hearer.numbers("on") == [1]
        assert hearer.numbers("off") == []


@every_kind
async def test_notes_reach_the_others(kind: Kind) -> None:
    """Every note reaches every other process once, whatever it follows, with all it says; not the one that gave it."""
    notes: list[Note] = [
        Ask("id 1", "node 0", b'{"channel":"c"}'),
        Answer("id 1", "node 0", b"[1,2,null]"),
        Hello("node 0", b'{"name":"here"}'),
        Bye("node 0"),
        Spent("node 0", "ann", "live:1", 25),
    ]
    async with kind.opened(3) as (giver, first, second):
        for note in notes:
            giver.broker.tell(note)
        for ear in (first, second):
            await ear.until(lambda ear=ear: len(ear.notes) >= len(notes))  # type: ignore[misc]
        await _over(giver, first, second)
        for ear in (first, second):
            assert sorted(map(_said, ear.notes)) == sorted(map(_said, notes))
        assert giver.notes == []


def _said(note: Note) -> bytes:
    """A note in a form in which equal ones compare equal."""
    return msgspec.json.encode(note)


@every_kind
async def test_a_note_to_one_process_reaches_no_other(kind: Kind) -> None:
    """What is told to a node by its id arrives there alone; a node that is unknown costs nothing."""
    async with kind.opened(3) as (giver, first, second):
        giver.broker.tell(Bye("to nobody"), "node 17")
        giver.broker.tell(Bye("to the second"), "node 2")
        giver.broker.tell(Bye("to all"))
        for ear in (first, second):
            await ear.until(lambda ear=ear: Bye("to all") in ear.notes)  # type: ignore[misc]
        await second.until(lambda: Bye("to the second") in second.notes)
        assert first.notes == [Bye("to all")]
        assert len(second.notes) == 2


@every_kind
async def test_announcing_never_raises(kind: Kind) -> None:
    """Words for nobody, heavy ones, many in one go, and those of a broker that is closed raise nothing."""
    async with kind.opened(2) as (speaker, hearer):
        speaker.broker.announce(word(1, "nobody"))
        await hearer.broker.follow("c")
        speaker.broker.announce(Published("c", Position(1, "e"), (Publication(bytes(1_000_000), 1),)))
        for number in range(2, 1001):
            speaker.broker.announce(word(number))
        await hearer.until(lambda: len(hearer.numbers("c")) == 1000)
        assert sorted(hearer.numbers("c")) == list(range(1, 1001))
        await speaker.broker.close()
        speaker.broker.announce(word(1001))
        speaker.broker.tell(Bye("node 0"))


@every_kind
async def test_a_closed_broker_hears_nothing(kind: Kind) -> None:
    """After ``close`` neither words nor orders come in, and the others go on."""
    async with kind.opened(3) as (speaker, closed, other):
        for ear in (closed, other):
            await ear.broker.follow("c")
        await closed.broker.close()
        speaker.broker.announce(word(1))
        speaker.broker.tell(Bye("node 0"))
        await _over(speaker, other)
        await other.until(lambda: len(other.notes) == 1)
        assert (closed.words, closed.notes) == ([], [])
        assert other.numbers("c") == [1]
