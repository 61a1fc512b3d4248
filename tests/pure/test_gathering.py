"""The queues behind a group commit: fair, bounded, in order, and each waiter answered once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import TOO_MANY_REQUESTS, Refused
from server.history import COMMIT_BYTES, COMMIT_PUBLICATIONS, QUEUE_BYTES, QUEUE_PUBLICATIONS, Appended, Draft
from server.history.gathering import BATCH_BYTES, BATCH_PUBLICATIONS, Commit, Gathering, weigh
from server.stream import ClientInfo, Position


def position(offset: int) -> Position:
    """A position of the one epoch here."""
    return Position(offset, "epoch")


def waiters(commit: Commit[int]) -> list[int]:
    """Who waits for a commit, in its order."""
    return [entry.waiter for entry in commit.entries]


def settled(gathering: Gathering[int], commit: Commit[int]) -> list[tuple[int, Appended]]:
    """Settle a commit whose publications got 1, 2, 3 ...; gives the answers."""
    return gathering.settle(commit, [Appended(position(n)) for n, _ in enumerate(commit.entries, 1)])


def test_one_commit_in_flight_per_channel() -> None:
    """What is added while a commit is in flight waits for its outcome, and then goes out in order."""
    gathering: Gathering[int] = Gathering()
    gathering.add("a", Draft(b""), 0, 1)
    (first,) = gathering.take()
    gathering.add("a", Draft(b""), 0, 2)
    gathering.add("a", Draft(b""), 0, 3)
    assert not gathering.ready
    assert gathering.take() == []
    assert settled(gathering, first) == [(1, Appended(position(1)))]
    (second,) = gathering.take()
    assert waiters(second) == [2, 3]
    settled(gathering, second)
    assert gathering.idle


def test_a_commit_is_bounded_in_publications() -> None:
    """A commit takes at most COMMIT_PUBLICATIONS from the head of the queue."""
    gathering: Gathering[int] = Gathering()
    for waiter in range(COMMIT_PUBLICATIONS + 1):
        gathering.add("a", Draft(b""), 0, waiter)
    (first,) = gathering.take()
    assert waiters(first) == list(range(COMMIT_PUBLICATIONS))
    settled(gathering, first)
    (second,) = gathering.take()
    assert waiters(second) == [COMMIT_PUBLICATIONS]


def test_a_commit_is_bounded_in_bytes() -> None:
    """A commit stops before COMMIT_BYTES, and a draft heavier than that goes alone."""
    gathering: Gathering[int] = Gathering()
    for waiter, size in enumerate([COMMIT_BYTES // 2, COMMIT_BYTES // 2, COMMIT_BYTES * 2, 1]):
        gathering.add("a", Draft(bytes(size)), 0, waiter)
    seen = []
    while gathering.ready:
        (commit,) = gathering.take()
        seen.append(waiters(commit))
        settled(gathering, commit)
    assert seen == [[0], [1], [2], [3]]


def test_a_flooded_channel_starves_none() -> None:
    """Every ready channel gets a commit before the flooded one gets its second."""
    gathering: Gathering[int] = Gathering()
    for waiter in range(QUEUE_PUBLICATIONS):
        gathering.add("flooded", Draft(b""), 0, waiter)
    gathering.add("quiet", Draft(b""), 0, -1)
    first = gathering.take()
    assert [commit.channel for commit in first] == ["flooded", "quiet"]
    gathering.add("late", Draft(b""), 0, -2)
    for commit in first:
        settled(gathering, commit)
    assert [commit.channel for commit in gathering.take()] == ["late", "flooded"]


@pytest.mark.parametrize("size", [0, COMMIT_BYTES])
def test_a_batch_is_bounded_and_the_next_goes_on(size: int) -> None:
    """A batch ends at its bound (plus one commit), and the channels left out come first in the next."""
    gathering: Gathering[int] = Gathering()
    names = [f"channel {n}" for n in range(120)]
    for name in names:
        for waiter in range(COMMIT_PUBLICATIONS):
            if size == 0 or waiter == 0:
                gathering.add(name, Draft(bytes(size)), 0, waiter)
    first = gathering.take()
    assert sum(len(commit.entries) for commit in first) <= BATCH_PUBLICATIONS
    assert sum(entry.weight for commit in first for entry in commit.entries) <= BATCH_BYTES + COMMIT_BYTES + 64
    for commit in first:
        settled(gathering, commit)
    second = gathering.take()
    order = [commit.channel for commit in first + second]
    assert order == names[: len(order)]


def test_a_full_queue_refuses_by_number_and_takes_nothing() -> None:
    """The draft after QUEUE_PUBLICATIONS is refused with 111; other channels and later drafts are not."""
    gathering: Gathering[int] = Gathering()
    for waiter in range(QUEUE_PUBLICATIONS):
        gathering.add("a", Draft(b""), 0, waiter)
    (commit,) = gathering.take()  # in flight still counts: it is still in memory
    with pytest.raises(Refused) as refused:
        gathering.add("a", Draft(b"", key="k"), 0, -1)
    assert refused.value.refusal is TOO_MANY_REQUESTS
    gathering.add("b", Draft(b""), 0, -2)
    settled(gathering, commit)
    gathering.add("a", Draft(b"", key="k"), 0, -3)
    seen = []
    while gathering.ready:
        for commit in gathering.take():
            seen += waiters(commit)
            settled(gathering, commit)
    assert -1 not in seen
    assert seen[-1] == -3
    assert len(seen) == QUEUE_PUBLICATIONS - COMMIT_PUBLICATIONS + 2


def test_a_full_queue_refuses_by_bytes_but_an_empty_one_never() -> None:
    """Bytes are bounded per channel; a draft above the bound gets in alone, or it never would."""
    gathering: Gathering[int] = Gathering()
    gathering.add("a", Draft(bytes(QUEUE_BYTES + 1)), 0, 1)
    with pytest.raises(Refused):
        gathering.add("a", Draft(b""), 0, 2)
    (commit,) = gathering.take()
    settled(gathering, commit)
    gathering.add("a", Draft(b""), 0, 3)
    assert [waiters(commit) for commit in gathering.take()] == [[3]]


def test_a_repeated_key_follows_the_first_to_success() -> None:
    """Queued or in flight, the same key waits for the first's outcome and gets its position as a repeat."""
    gathering: Gathering[int] = Gathering()
    gathering.add("a", Draft(b"one", key="k"), 0, 1)
    gathering.add("a", Draft(b"two", key="k"), 0, 2)
    gathering.add("b", Draft(b"else", key="k"), 0, 9)  # keys are unique in a channel only
    commit, other = gathering.take()
    gathering.add("a", Draft(b"three", key="k"), 0, 3)
    assert waiters(commit) == [1]
    assert waiters(other) == [9]
    repeat = Appended(position(1), repeated=True)
    assert settled(gathering, commit) == [(1, Appended(position(1))), (2, repeat), (3, repeat)]
    assert not gathering.ready
    gathering.add("a", Draft(b"four", key="k"), 0, 4)
    assert [waiters(commit) for commit in gathering.take()] == [[4]]


def test_a_key_is_free_once_its_outcome_is_known() -> None:
    """While others of the channel still wait, a key that was answered begins a new entry; nobody follows the past."""
    for ends in (settled, Gathering.fail):
        gathering: Gathering[int] = Gathering()
        gathering.add("a", Draft(b"", key="k"), 0, 1)
        (first,) = gathering.take()
        gathering.add("a", Draft(b""), 0, 2)
        ends(gathering, first)
        gathering.add("a", Draft(b"", key="k"), 0, 3)
        (second,) = gathering.take()
        assert waiters(second) == [2, 3]


def test_a_repeated_key_follows_the_first_to_failure() -> None:
    """When the first with a key fails, those behind it fail, and the key is free again."""
    gathering: Gathering[int] = Gathering()
    gathering.add("a", Draft(b"", key="k"), 0, 1)
    gathering.add("a", Draft(b"", key="k"), 0, 2)
    (commit,) = gathering.take()
    assert gathering.fail(commit) == [1, 2]
    assert gathering.idle
    gathering.add("a", Draft(b"", key="k"), 0, 3)
    assert [waiters(commit) for commit in gathering.take()] == [[3]]


def test_followers_are_bounded_too() -> None:
    """A flood of one key fills the queue by number, though it stores one payload."""
    gathering: Gathering[int] = Gathering()
    for waiter in range(QUEUE_PUBLICATIONS):
        gathering.add("a", Draft(b"", key="k"), 0, waiter)
    with pytest.raises(Refused):
        gathering.add("a", Draft(b"", key="k"), 0, -1)
    (commit,) = gathering.take()
    assert len(gathering.fail(commit)) == QUEUE_PUBLICATIONS
    assert gathering.idle


def test_the_weight_counts_all_that_is_stored() -> None:
    """Info, tags and key weigh like payload, or they would be a way around the bounds."""
    info = ClientInfo("u", "c", conn_info=bytes(100), chan_info=bytes(50))
    bare = weigh(Draft(b"12345"))
    assert weigh(Draft(b"12345", info=info)) >= bare + 150
    assert weigh(Draft(b"12345", tags={"ab": "cd"})) >= bare + 4
    assert weigh(Draft(b"12345", key="key")) == bare + 3


def test_a_commit_that_goes_out_again_takes_more_with_it() -> None:
    """Refilled, it has all who came since, in order, up to the bounds of a commit; and they are answered with it."""
    gathering: Gathering[int] = Gathering()
    gathering.add("a", Draft(b""), 0, 0)
    (commit,) = gathering.take()
    for waiter in range(1, COMMIT_PUBLICATIONS + 2):
        gathering.add("a", Draft(b""), 0, waiter)
    gathering.refill(commit)
    assert waiters(commit) == list(range(COMMIT_PUBLICATIONS))
    assert len(settled(gathering, commit)) == COMMIT_PUBLICATIONS
    (rest,) = gathering.take()
    assert waiters(rest) == [COMMIT_PUBLICATIONS, COMMIT_PUBLICATIONS + 1]
    gathering.add("a", Draft(bytes(COMMIT_BYTES)), 0, -1)
    gathering.refill(rest)
    assert len(rest.entries) == 2


def test_a_held_channel_waits_and_others_do_not() -> None:
    """Settled with ``hold``, a channel has no further commit before ``release``, whether or not somebody came."""
    gathering: Gathering[int] = Gathering()
    for channel in ("a", "b"):
        gathering.add(channel, Draft(b""), 0, 1)
    for commit in gathering.take():
        gathering.settle(commit, [Appended(position(1))], hold=True)
    assert gathering.idle
    gathering.add("a", Draft(b""), 0, 2)
    gathering.add("c", Draft(b""), 0, 3)
    assert [commit.channel for commit in gathering.take()] == ["c"]
    gathering.release("b")
    gathering.release("a")
    (commit,) = gathering.take()
    assert (commit.channel, waiters(commit)) == ("a", [2])


def test_who_waited_in_vain_is_let_go() -> None:
    """Shed from the head while all of an entry's waiters are late; what is in flight stays; the key is free again."""
    gathering: Gathering[int] = Gathering()
    gathering.add("a", Draft(b""), 0, 1)
    (commit,) = gathering.take()
    for waiter, key in ((2, "k"), (3, "l"), (4, "k"), (15, "l"), (6, "")):
        gathering.add("a", Draft(b"", key=key), 0, waiter)
    late = (10).__gt__
    assert gathering.shed("a", late) == [2, 4]
    gathering.add("a", Draft(b"", key="k"), 0, 17)
    settled(gathering, commit)
    (rest,) = gathering.take()
    assert waiters(rest) == [3, 6, 17]
    assert [waiter for waiter, _ in settled(gathering, rest)] == [3, 15, 6, 17]
    assert gathering.idle


def test_a_channel_of_which_all_are_let_go_is_gone() -> None:
    """Shed to the last, a channel is not ready any more, and who comes next begins anew; held, it stays held."""
    gathering: Gathering[int] = Gathering()
    gathering.add("a", Draft(b""), 0, 1)
    assert gathering.shed("a", bool) == [1]
    assert gathering.shed("a", bool) == gathering.shed("unknown", bool) == []
    assert not gathering.ready
    assert gathering.idle
    gathering.add("a", Draft(b""), 0, 2)
    (commit,) = gathering.take()
    gathering.settle(commit, [Appended(position(1))], hold=True)
    gathering.add("a", Draft(b""), 0, 3)
    assert gathering.shed("a", bool) == [3]
    gathering.add("a", Draft(b""), 0, 4)
    assert not gathering.ready
    gathering.release("a")
    assert [waiters(commit) for commit in gathering.take()] == [[4]]


STEPS = st.one_of(
    st.tuples(st.just("add"), st.sampled_from("abc"), st.sampled_from(["", "", "k", "l"]), st.integers(0, 90_000)),
    st.tuples(st.just("take"), st.just(""), st.just(""), st.just(0)),
    st.tuples(st.sampled_from(["settle", "fail"]), st.just(""), st.just(""), st.integers(0, 5)),
)


@given(st.lists(STEPS, max_size=60))
def test_whatever_happens_each_waiter_is_answered_once_and_in_order(steps: list[tuple[str, str, str, int]]) -> None:
    """In any order of adding, taking and outcomes: one in flight per channel, order kept, nobody lost or told twice."""
    gathering: Gathering[int] = Gathering()
    added: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    cut: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    flying: list[Commit[int]] = []
    answered: list[int] = []

    def take() -> None:
        for commit in gathering.take():
            assert commit.channel not in {other.channel for other in flying}
            keys = [entry.draft.key for entry in commit.entries if entry.draft.key]
            assert len(keys) == len(set(keys))
            assert sum(entry.weight for entry in commit.entries) <= COMMIT_BYTES
            cut[commit.channel] += waiters(commit)
            flying.append(commit)

    def end(commit: Commit[int], how: str) -> None:
        flying.remove(commit)
        if how == "fail":
            answered.extend(gathering.fail(commit))
        else:
            answered.extend(waiter for waiter, _ in settled(gathering, commit))

    for number, (what, channel, key, size) in enumerate(steps):
        if what == "add":
            gathering.add(channel, Draft(bytes(size), key=key), 0, number)
            added[channel].append(number)
        elif what == "take":
            take()
        elif flying:
            end(flying[size % len(flying)], what)
    while flying or gathering.ready:
        take()
        end(flying[0], "settle")

    assert gathering.idle
    assert sorted(answered) == sorted(added["a"] + added["b"] + added["c"])
    for channel, numbers in cut.items():
        assert numbers == sorted(numbers)
        assert set(numbers) <= set(added[channel])
