"""What a connection to Redis follows: whatever is wished in whatever order, it is what Redis does in the end."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.broker.ledger import BATCH_NAMES, Command, Ledger

NAMES = [b"a", b"b", b"c", b"d"]


class FakeRedis:
    """The other end: it carries out what it gets, one command after the other, and answers later."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.commands: deque[Command] = deque()
        self.subscribed: set[bytes] = set()
        self.ended_by_itself: set[bytes] = set()
        self.refuses = False

    def flush(self) -> None:
        """Send what has changed."""
        commands, _ = self.ledger.flush(ping=False)
        self.commands += commands

    def carry_out(self) -> None:
        """Carry out one command and let the answers arrive."""
        if not self.commands:
            return
        verb, *names = self.commands.popleft()
        ledger = self.ledger
        if verb == b"PING":
            for name in ledger.answered(names[0]).refused:
                ledger.want(name) if name in ledger.wanted else None
        elif self.refuses and verb == b"SSUBSCRIBE":
            ledger.refused("NOPERM")
        elif verb == b"SSUBSCRIBE":
            for name in names:
                self.subscribed.add(name)
                ledger.confirmed(name)
        else:
            assert verb == b"SUNSUBSCRIBE"
            for name in names:
                self.subscribed.discard(name)
                self._ended(name)

    def end(self, name: bytes) -> None:
        """End a subscription that nobody asked to end, as a slot does that moves."""
        if name in self.subscribed:
            self.subscribed.discard(name)
            self._ended(name)

    def _ended(self, name: bytes) -> None:
        if self.ledger.ended(name) and name in self.ledger.wanted:
            self.ledger.want(name)


steps = st.lists(
    st.tuples(st.sampled_from(["want", "unwant", "end"]), st.sampled_from(NAMES))
    | st.tuples(st.sampled_from(["flush", "carry out", "refuse", "allow"]), st.just(b"")),
    max_size=60,
)


def test_an_end_that_is_refused_is_let_be() -> None:
    """A subscription that Redis does not end is nobody's wish and asked for no more; wanted again it is in force."""
    ledger = Ledger(set(), sharded=False, group=lambda name: None)
    ledger.want(b"a")
    _follow(ledger)
    ledger.unwant(b"a")
    commands, _ = ledger.flush()
    ledger.refused("NOPERM")
    outcome = ledger.answered(commands[-1][1])
    assert (outcome.confirmed, outcome.refused, outcome.refusals) == ([], [], ["NOPERM"])
    assert ledger.settled
    assert not ledger.in_force(b"a")
    ledger.want(b"a")
    _follow(ledger)
    assert ledger.in_force(b"a")


def _follow(ledger: Ledger) -> None:
    """Let Redis confirm that it follows "a"."""
    commands, _ = ledger.flush()
    assert commands[0] == (b"SUBSCRIBE", b"a")
    ledger.confirmed(b"a")
    assert ledger.answered(commands[-1][1]).confirmed == [b"a"]


@settings(max_examples=500)
@given(steps)
def test_what_is_in_force_is_subscribed_and_all_comes_to_what_is_wanted(done: list[tuple[str, bytes]]) -> None:
    """Whatever is called in force is subscribed at Redis at that moment; when all is quiet, exactly what is wanted is.

    Wishes change while commands are under way, Redis refuses some, and ends some by itself.
    """
    ledger = Ledger(set(), sharded=True, group=lambda name: name in (b"a", b"b"))
    redis = FakeRedis(ledger)
    wanted: set[bytes] = set()
    for step, name in done:
        match step:
            case "want":
                wanted.add(name)
                ledger.want(name)
            case "unwant":
                wanted.discard(name)
                ledger.unwant(name)
            case "end":
                redis.end(name)
            case "flush":
                redis.flush()
            case "carry out":
                redis.carry_out()
            case "refuse" | "allow":
                redis.refuses = step == "refuse"
        for one in NAMES:
            assert not ledger.in_force(one) or one in redis.subscribed & wanted
    redis.refuses = False
    while redis.commands or ledger.changed:
        redis.flush()
        redis.carry_out()
    assert redis.subscribed == wanted == ledger.wanted
    assert {name for name in NAMES if ledger.in_force(name)} == wanted
    assert ledger.settled


def test_a_wish_that_comes_and_goes_before_it_is_sent_costs_nothing() -> None:
    """Called without a flush in between, only the last wish counts; nothing is sent if it is what stands already."""
    ledger = Ledger({b"a"}, sharded=False, group=len)
    assert ledger.flush()[0] == [(b"SUBSCRIBE", b"a"), (b"PING", b"1")]
    ledger.confirmed(b"a")
    assert ledger.answered(b"1").confirmed == [b"a"]
    ledger.unwant(b"a")
    ledger.want(b"b")
    ledger.want(b"a")
    ledger.unwant(b"b")
    assert not ledger.in_force(b"a")
    commands, names = ledger.flush()
    assert (commands, set(names)) == ([], {b"a", b"b"})
    assert ledger.in_force(b"a")


def test_a_wish_is_not_in_force_by_an_older_confirmation() -> None:
    """Followed, left and followed again while all is under way: only the last confirmation counts."""
    ledger = Ledger({b"a"}, sharded=False, group=len)
    ledger.flush()
    ledger.unwant(b"a")
    assert ledger.flush()[0] == [(b"UNSUBSCRIBE", b"a"), (b"PING", b"2")]
    ledger.want(b"a")
    assert ledger.flush()[0] == [(b"SUBSCRIBE", b"a"), (b"PING", b"3")]
    ledger.confirmed(b"a")
    ledger.answered(b"1")
    assert not ledger.in_force(b"a")
    assert ledger.ended(b"a") is False
    ledger.answered(b"2")
    ledger.confirmed(b"a")
    assert not ledger.in_force(b"a")
    ledger.answered(b"3")
    assert ledger.in_force(b"a")


def test_many_names_go_in_batches() -> None:
    """A return with thousands of names sends a bounded number at a time, and is settled after the last."""
    names = {b"%d" % number for number in range(2 * BATCH_NAMES + 1)}
    ledger = Ledger(set(names), sharded=False, group=lambda name: 0)
    sent: list[int] = []
    while ledger.changed:
        [(_, *asked), (_, number)] = ledger.flush()[0]
        sent.append(len(asked))
        assert not ledger.settled
        for name in asked:
            ledger.confirmed(name)
        ledger.answered(number)
    assert sent == [BATCH_NAMES, BATCH_NAMES, 1]
    assert ledger.settled
    assert all(ledger.in_force(name) for name in names)


def test_a_ping_that_is_not_due() -> None:
    """An answer out of order is an error: this connection cannot be understood any more."""
    ledger = Ledger(set(), sharded=False, group=len)
    assert ledger.flush() == ([], [])
    ledger.flush(ping=True)
    ledger.flush(ping=True)
    with pytest.raises(ValueError, match="expected the PING of a batch under way"):
        ledger.answered(b"3")
