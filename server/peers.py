"""The other processes: who they are, and what is asked of them until they answer.

The broker may lose any note, so whatever matters is *asked*: said again until
every process has answered, under an id that makes the repeat harmless.  The
rules:

* A question goes to everybody at once, known or not, and then again to those who
  still owe an answer, at first soon and later each few seconds, for a minute.
* Whoever asks waits only for processes that are *fresh*, heard of in the last
  seconds.  One that fell silent (it was killed, stopped or cut off) holds nobody
  up; should it come back within the minute it is asked all the same.
* A question is carried out once: its answer is kept, and a repeat gets that.  Only
  a long one is not: it told something, and telling it anew does no harm.
* A question says how old it is, so that what comes late can be carried out as of
  the time when it was asked.
* Processes say hello once a second, and goodbye.  Who has not been heard of for
  a lease is *lost*: nobody counts or asks it, but should it be heard of again it is
  asked what it owes.

Plain: nothing here waits but ``Question.answered``; timers come from the caller,
and so does the clock, which must not jump (that of a calendar does).
"""

import asyncio
import uuid
from collections.abc import Callable, Iterable, Mapping
from itertools import islice, takewhile
from typing import Any, Protocol

from server.broker import Answer, Ask, Broker, Bye, Hello, Note

FRESH_S = 3.5
"""A process that has not said hello for so long may be gone: three hellos can be lost, and one more late."""

OWED_S = 60.0
"""How long a question is asked again."""

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 3.0
"""The pause between two repeats, which doubles."""

LOST_S = 600.0
"""How long a process that fell silent may yet come back and owe what was asked meanwhile."""

KEPT_S = 2 * OWED_S
KEPT = 100_000
KEPT_ANSWER_BYTES = 1024
"""How long an answer is kept for repeats of its question, how many are, and how long such an answer may be."""

Later = Callable[[float, Callable[[], None]], Any]
"""Calls a function some seconds later, as ``loop.call_later``."""


class Timer(Protocol):
    """What ``Later`` gives."""

    def cancel(self) -> None:
        """Call it no more."""


class Peer:
    """Another process, as it was last heard of; ``facts`` are what it said of itself."""

    __slots__ = ("facts", "heard_at", "node")

    def __init__(self, node: str, facts: bytes, heard_at: float) -> None:
        self.node = node
        self.facts = facts
        self.heard_at = heard_at

    def __repr__(self) -> str:
        return f"<Peer {self.node} heard at {self.heard_at}>"


class Question:
    """One question on its way; ``answers`` by node id, ``owing`` are those who have not answered."""

    def __init__(self, id: str, body: bytes, to: str, owing: Iterable[str]) -> None:
        self.id = id
        self.body = body
        self.to = to
        self.owing = set(owing)
        self.answers: dict[str, bytes] = {}
        self.pause_s = FIRST_PAUSE_S
        self.until = 0.0
        self._news = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Question {self.id} answers={len(self.answers)} owing={len(self.owing)}>"

    def take(self, node: str, body: bytes) -> None:
        """``node`` has answered."""
        self.answers.setdefault(node, body)
        self.owing.discard(node)
        self._news.set()

    def forgive(self, node: str) -> None:
        """``node`` is gone for good and owes nothing."""
        self.owing.discard(node)
        self._news.set()

    async def answered(self, patience_s: float, silent: Callable[[str], bool]) -> set[str]:
        """Wait until all who are not ``silent`` have answered, or for ``patience_s``; returns who has not."""
        try:
            async with asyncio.timeout(patience_s):
                while not all(map(silent, self.owing)):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            pass
        return set(self.owing)


class Peers:
    """See the module's docstring.

    ``carry_out`` is given the body of each question that others ask, once, and the
    time by our clock when it was asked at the latest; it returns the answer.
    ``clock`` is in seconds and never jumps.  Call ``tick`` once a second.
    """

    def __init__(
        self,
        broker: Broker,
        node: str,
        *,
        carry_out: Callable[[bytes, float], bytes],
        clock: Callable[[], float],
        later: Later,
        lease_s: float,
    ) -> None:
        self._broker = broker
        self._node = node
        self._carry_out = carry_out
        self._clock = clock
        self._later = later
        self._lease_s = lease_s
        self._peers: dict[str, Peer] = {}
        self._lost: dict[str, Peer] = {}
        self._questions: dict[str, Question] = {}
        self._timers: dict[str, Timer] = {}
        self._given: dict[str, tuple[float, bytes]] = {}
        self._facts = b""

    def __repr__(self) -> str:
        return f"<Peers {len(self._peers)} questions={len(self._questions)}>"

    # --- who is there ---------------------------------------------------------
    @property
    def all(self) -> Mapping[str, Peer]:
        """The other processes that are alive as far as is known, by node id."""
        return self._peers

    def silent(self, node: str) -> bool:
        """Has ``node`` not been heard of for some seconds, or never?"""
        peer = self._peers.get(node)
        return peer is None or self._clock() - peer.heard_at > FRESH_S

    def tick(self, facts: bytes) -> None:
        """Say hello with ``facts``, and take for lost who has been silent for a lease."""
        self._facts = facts
        self._broker.tell(Hello(self._node, facts))
        now = self._clock()
        for peer in [peer for peer in self._peers.values() if now - peer.heard_at > self._lease_s]:
            self._lost[peer.node] = self._peers.pop(peer.node)
        for peer in [peer for peer in self._lost.values() if now - peer.heard_at > LOST_S]:
            del self._lost[peer.node]
        old = takewhile(lambda given: now - given[1][0] >= KEPT_S, self._given.items())
        for id in [id for id, _ in old]:
            del self._given[id]
        for id in list(islice(self._given, max(0, len(self._given) - KEPT))):
            del self._given[id]

    def close(self) -> None:
        """Say goodbye, and ask nobody any more."""
        self._broker.tell(Bye(self._node))
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._questions.clear()

    # --- asking ---------------------------------------------------------------
    def ask(self, body: bytes, to: str = "") -> Question:
        """Ask the node ``to``, or everybody else; it is asked again until answered, whoever waits."""
        owing = (to,) if to else (*self._peers, *self._lost)
        question = Question(uuid.uuid4().hex, body, to, owing)
        question.until = self._clock() + OWED_S
        self._broker.tell(Ask(question.id, self._node, body), to)
        self._questions[question.id] = question
        self._repeat_later(question)
        return question

    def give_up(self, question: Question) -> None:
        """Ask no more, since nobody needs the answer; it may have been carried out all the same."""
        self._questions.pop(question.id, None)
        timer = self._timers.pop(question.id, None)
        if timer is not None:
            timer.cancel()

    def _repeat_later(self, question: Question) -> None:
        pause_s = question.pause_s
        if question.owing and question.owing.isdisjoint(self._peers):
            pause_s = max(pause_s, question.until - self._clock())  # who is lost is asked when it is heard of again
        self._timers[question.id] = self._later(pause_s, lambda: self._repeat(question))
        question.pause_s = min(2 * question.pause_s, LONGEST_PAUSE_S)

    def _repeat(self, question: Question) -> None:
        now = self._clock()
        if not question.owing or now >= question.until:
            self.give_up(question)
            return
        question._news.set()  # who was fresh may have fallen silent meanwhile
        ask = Ask(question.id, self._node, question.body, OWED_S - (question.until - now))
        for node in question.owing & self._peers.keys():
            self._broker.tell(ask, node)
        self._repeat_later(question)

    # --- hearing --------------------------------------------------------------
    def heard(self, note: Note) -> None:
        """Another process has said something; it may be late or repeated."""
        match note:
            case Hello(sender, facts):
                new = sender not in self._peers
                self._lost.pop(sender, None)
                self._peers[sender] = Peer(sender, facts, self._clock())
                if new:
                    self._greet(sender)
            case Bye(sender):
                self._peers.pop(sender, None)
                self._lost.pop(sender, None)
                for question in self._questions.values():
                    question.forgive(sender)
            case Ask():
                self._answer(note)
            case Answer(id, sender, body):
                if (peer := self._peers.get(sender)) is not None:
                    peer.heard_at = self._clock()
                if (asked := self._questions.get(id)) is not None:
                    asked.take(sender, body)

    def _greet(self, node: str) -> None:
        """Somebody is new or was lost: it learns of us at once, and is asked what it or everybody is being asked."""
        self._broker.tell(Hello(self._node, self._facts), node)
        for question in list(self._questions.values()):
            if question.to in ("", node) and node not in question.answers:
                question.owing.add(node)
                question.pause_s = FIRST_PAUSE_S
                self._timers.pop(question.id).cancel()
                self._repeat(question)

    def _answer(self, ask: Ask) -> None:
        _, answer = self._given.get(ask.id, (0.0, None))
        if answer is None:
            now = self._clock()
            answer = self._carry_out(ask.body, now - ask.age_s)
            if len(answer) <= KEPT_ANSWER_BYTES:
                self._given[ask.id] = now, answer
        self._broker.tell(Answer(ask.id, self._node, answer), ask.sender)
