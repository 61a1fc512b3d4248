"""What is asked of other processes is carried out once by each, whatever is lost; and nobody waits for the dead."""

import asyncio
import heapq
import itertools
import random
from collections.abc import Callable

import pytest

from server.broker import Note
from server.broker.memory import Bus, MemoryBroker
from server.peers import FRESH_S, KEPT_ANSWER_BYTES, KEPT_S, OWED_S, Peers, Question

LEASE_S = 10.0
TURNS = 20


class Timeline:
    """Time that the test moves, and what is to be called in it."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.cancelled: set[int] = set()

    def clock(self) -> float:
        """Seconds."""
        return self.now

    def later(self, seconds: float, call: Callable[[], None]) -> "Alarm":
        """As ``loop.call_later``."""
        number = next(self._numbers)
        heapq.heappush(self._calls, (self.now + seconds, number, call))
        return Alarm(self, number)

    async def advance(self, seconds: float) -> None:
        """Let time pass, with all that is due in it."""
        end = self.now + seconds
        while self._calls and self._calls[0][0] <= end:
            self.now, number, call = heapq.heappop(self._calls)
            if number not in self.cancelled:
                call()
                await quiet()
        self.now = end
        await quiet()

    @property
    def pending(self) -> int:
        """How many calls are still to come."""
        return sum(number not in self.cancelled for _, number, _ in self._calls)


class Alarm:
    """One call to come."""

    def __init__(self, timeline: Timeline, number: int) -> None:
        self._timeline = timeline
        self._number = number

    def cancel(self) -> None:
        """Call it no more."""
        self._timeline.cancelled.add(self._number)


async def quiet() -> None:
    """Let everything arrive that is on its way through the loop."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


class LossyBroker(MemoryBroker):
    """Loses notes, and says some twice."""

    def __init__(self, bus: Bus, chance: random.Random) -> None:
        super().__init__(bus)
        self._chance = chance
        self.loss = 0.0
        self.said = 0

    def tell(self, note: Note, to: str = "") -> None:
        """As ever, counted."""
        self.said += 1
        super().tell(note, to)

    def _soon_tell(self, broker: MemoryBroker, note: Note) -> None:
        while self._chance.random() >= self.loss:
            super()._soon_tell(broker, note)
            if self._chance.random() >= self.loss:
                return


class Process:
    """One process as far as peers are concerned; ``done`` is what it carried out, ``dead`` if it does nothing more."""

    def __init__(self, bus: Bus, timeline: Timeline, chance: random.Random, name: str) -> None:
        self.name = name
        self.broker = LossyBroker(bus, chance)
        self.done: list[bytes] = []
        self.dead = False
        self.peers = Peers(
            self.broker,
            name,
            carry_out=self._carry_out,
            clock=timeline.clock,
            later=timeline.later,
            lease_s=LEASE_S,
        )
        self.broker.on_note = self._hear

    def _hear(self, note: Note) -> None:
        if not self.dead:
            self.peers.heard(note)

    def _carry_out(self, body: bytes, asked_at: float) -> bytes:
        self.done.append(body)
        return self.name.encode() + b" did " + body


class World:
    """Some processes that have said hello to one another."""

    def __init__(self, names: str = "abc", seed: int = 1) -> None:
        self.bus = Bus()
        self.timeline = Timeline()
        self.chance = random.Random(seed)
        self.processes = {name: Process(self.bus, self.timeline, self.chance, name) for name in names}

    def __getitem__(self, name: str) -> Process:
        return self.processes[name]

    async def open(self) -> "World":
        """Everybody opens and says hello."""
        for process in self.processes.values():
            await process.broker.open(process.name)
        await self.tick()
        return self

    async def tick(self) -> None:
        """A second has passed."""
        for process in self.processes.values():
            if not process.dead:
                process.peers.tick(process.name.encode())
        await self.timeline.advance(1.0)

    def spoil(self, loss: float) -> None:
        """From now on so much is lost."""
        for process in self.processes.values():
            process.broker.loss = loss


async def finished(question: Question, process: Process) -> set[str]:
    """What ``answered`` says without waiting."""
    return await question.answered(0, process.peers.silent)


async def test_everybody_is_known_with_what_they_say() -> None:
    """After one hello each knows the others and their facts, and a later hello renews the facts."""
    world = await World().open()
    assert {name: peer.facts for name, peer in world["a"].peers.all.items()} == {"b": b"b", "c": b"c"}
    world["b"].peers.tick(b"news")
    await quiet()
    assert world["a"].peers.all["b"].facts == b"news"


async def test_who_comes_later_is_greeted() -> None:
    """A new process knows all others by its first hello, without waiting for theirs."""
    world = await World("ab").open()
    late = Process(world.bus, world.timeline, world.chance, "late")
    await late.broker.open("late")
    late.peers.tick(b"")
    await quiet()
    assert set(late.peers.all) == {"a", "b"}
    assert set(world["a"].peers.all) == {"b", "late"}


async def test_each_answers_once() -> None:
    """A question is carried out by each other process, once, and each answer comes back."""
    world = await World().open()
    question = world["a"].peers.ask(b"x")
    await quiet()
    assert await finished(question, world["a"]) == set()
    assert question.answers == {"b": b"b did x", "c": b"c did x"}
    await world.timeline.advance(OWED_S * 2)
    assert [process.done for process in world.processes.values()] == [[], [b"x"], [b"x"]]
    assert world.timeline.pending == 0


async def test_a_question_to_one_is_asked_of_nobody_else() -> None:
    """Only the process named carries it out."""
    world = await World().open()
    question = world["a"].peers.ask(b"x", "c")
    await quiet()
    assert question.answers == {"c": b"c did x"}
    assert world["b"].done == []


@pytest.mark.parametrize("seed", range(20))
async def test_loss_and_repeats_change_nothing(seed: int) -> None:
    """Half of all notes are lost, some come twice: each question is carried out once everywhere, and answered."""
    world = await World(seed=seed).open()
    world.spoil(0.5)
    questions = [world["a"].peers.ask(b"%d" % number) for number in range(5)]
    for _ in range(int(OWED_S)):
        await world.timeline.advance(1.0)
    world.spoil(0.0)
    await world.timeline.advance(10.0)
    for name in "bc":
        assert sorted(world[name].done) == [b"%d" % number for number in range(5)]
    assert [set(question.answers) for question in questions] == [{"b", "c"}] * 5


async def test_nobody_waits_for_the_silent() -> None:
    """A process that is gone holds an answer up for some seconds at most; the living have answered meanwhile."""
    world = await World().open()
    world["c"].dead = True
    question = world["a"].peers.ask(b"x")
    await quiet()
    assert await finished(question, world["a"]) == {"c"}
    assert not world["a"].peers.silent("c"), "for all that is known it lives"
    for _ in range(int(FRESH_S) + 1):
        await world.tick()
    assert world["a"].peers.silent("c")
    assert await asyncio.wait_for(question.answered(60, world["a"].peers.silent), 5) == {"c"}


async def test_one_who_comes_back_is_asked_all_the_same() -> None:
    """A process that was stopped for half a minute carries out what was asked meanwhile, once."""
    world = await World().open()
    world["c"].dead = True
    world["a"].peers.ask(b"x")
    for _ in range(30):
        await world.tick()
    assert "c" not in world["a"].peers.all, "its lease is over"
    world["c"].dead = False
    for _ in range(5):
        await world.tick()
    assert world["c"].done == [b"x"]


async def test_who_opens_while_something_is_asked_is_asked_too() -> None:
    """A question that is still open goes to a process that appears only now."""
    world = await World("ab").open()
    world["b"].dead = True
    question = world["a"].peers.ask(b"x")
    late = Process(world.bus, world.timeline, world.chance, "late")
    await late.broker.open("late")
    late.peers.tick(b"")
    await world.timeline.advance(5.0)
    assert late.done == [b"x"]
    assert question.answers == {"late": b"late did x"}


async def test_after_a_goodbye_nothing_is_owed() -> None:
    """A process that ends in order is forgotten at once, and forgiven its answers."""
    world = await World().open()
    world["c"].dead = True
    question = world["a"].peers.ask(b"x")
    world["c"].peers.close()
    await quiet()
    assert await finished(question, world["a"]) == set()
    assert set(world["a"].peers.all) == {"b"}


async def test_after_close_nothing_is_said() -> None:
    """A process that has closed repeats no question."""
    world = await World().open()
    world["b"].dead = world["c"].dead = True
    world["a"].peers.ask(b"x")
    world["a"].peers.close()
    said = world["a"].broker.said
    await world.timeline.advance(OWED_S)
    assert world["a"].broker.said == said
    assert world.timeline.pending == 0


async def test_alone_nobody_is_waited_for() -> None:
    """A process without others has its answer at once, and asks no more."""
    world = await World("a").open()
    question = world["a"].peers.ask(b"x")
    assert await finished(question, world["a"]) == set()
    await world.timeline.advance(5.0)
    assert world.timeline.pending == 0


async def test_answers_are_forgotten_in_time() -> None:
    """What was answered is remembered for as long as it may be asked again, and no longer."""
    world = await World("ab").open()
    world["a"].peers.ask(b"x")
    await quiet()
    assert len(world["b"].peers._given) == 1
    for _ in range(int(KEPT_S) + 2):
        await world.tick()
    assert len(world["b"].peers._given) == 0


async def test_what_was_asked_after_a_process_was_forgotten_reaches_it_too() -> None:
    """A process that was cut off for longer than its lease obeys what was ordered in the last minute."""
    world = await World().open()
    world["c"].dead = True
    for _ in range(int(2 * LEASE_S)):
        await world.tick()
    assert "c" not in world["a"].peers.all
    question = world["a"].peers.ask(b"x")
    await quiet()
    assert await asyncio.wait_for(question.answered(60, world["a"].peers.silent), 5) == {"c"}
    for _ in range(20):
        await world.tick()
    world["c"].dead = False
    await world.tick()
    assert world["c"].done == [b"x"], "it waits for no repeat"
    assert world["b"].done == [b"x"]


async def test_a_question_costs_nothing_while_only_the_lost_owe_an_answer() -> None:
    """Nobody speaks to a process that is gone; after a minute the question is forgotten."""
    world = await World("ab").open()
    world["b"].dead = True
    for _ in range(int(2 * LEASE_S)):
        await world.tick()
    said = world["a"].broker.said
    world["a"].peers.ask(b"x")
    assert world["a"].broker.said == said + 1
    await world.timeline.advance(OWED_S / 2)
    assert world["a"].broker.said == said + 1
    await world.timeline.advance(OWED_S)
    assert world["a"].peers._questions == {}
    assert world.timeline.pending == 0


async def test_a_question_that_was_given_up_is_asked_no_more() -> None:
    """Who needs the answer now has no use for it in a minute; and commands of a client are not carried out then."""
    world = await World("ab").open()
    world["b"].dead = True
    question = world["a"].peers.ask(b"x", "b")
    await quiet()
    world["a"].peers.give_up(question)
    world["b"].dead = False
    await world.timeline.advance(OWED_S)
    assert world["b"].done == []
    assert world.timeline.pending == 0


async def test_a_long_answer_is_not_kept() -> None:
    """Lists of channels do not pile up for two minutes; what did something was answered briefly, and is kept."""
    world = await World("ab").open()
    body = b"y" * KEPT_ANSWER_BYTES
    for name in (b"x", body):
        question = world["a"].peers.ask(name)
        await quiet()
        assert question.answers["b"].endswith(name)
    assert [answer for _, answer in world["b"].peers._given.values()] == [b"b did x"]
