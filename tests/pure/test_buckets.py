"""Token buckets, and one bucket over many processes: what they let through, whatever the times are."""

import math
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.limits import TOLD_PART, Bucket, Key, Quotas, Rate, network

NOON = 1_700_000_000.0
ANN = ("ann", "live:1")

rates = st.integers(1, 2_000)
pauses = st.lists(st.one_of(st.just(0.0), st.floats(0, 0.01), st.floats(0, 3)), max_size=300)


def passed(bucket: Bucket, times: Iterable[float]) -> list[float]:
    """At which of these times the bucket had a token."""
    return [now for now in times if bucket.take(now)]


def times_of(pauses: list[float]) -> list[float]:
    """Times that begin at noon, with these pauses between them."""
    now, found = NOON, []
    for pause in pauses:
        now += pause
        found.append(now)
    return found


# --- one bucket --------------------------------------------------------------------------
@given(rates, rates, pauses)
def test_never_more_than_the_burst_and_the_rate(per_second: int, burst: int, pauses: list[float]) -> None:
    """In any stretch of time at most the burst, and the rate times its length, gets through."""
    let = passed(Bucket(Rate.of(per_second, burst)), times_of(pauses))
    for first in range(0, len(let), 7):
        for last in range(first, len(let), 11):
            assert last - first + 1 <= burst + (let[last] - let[first]) * per_second + 1.01


@given(rates, rates)
def test_the_whole_burst_is_there(per_second: int, burst: int) -> None:
    """A full bucket has exactly its burst, and after one token's time one more."""
    bucket = Bucket(Rate.of(per_second, burst))
    assert len(passed(bucket, [NOON] * (burst + 5))) == burst
    assert len(passed(bucket, [NOON + 1.001 / per_second] * 2)) == 1


@given(rates, st.integers(1, 20))
def test_who_keeps_to_the_rate_is_never_refused(per_second: int, seconds: int) -> None:
    """Steadily at the rate, or slower, every deed gets through, with a burst of one."""
    count = min(per_second * seconds, 2_000)
    times = [NOON + number / per_second for number in range(count)]
    assert len(passed(Bucket(Rate.of(per_second, 1)), times)) == count


@given(rates, rates, pauses, st.integers(0, 50))
def test_who_waits_as_told_finds_a_token(per_second: int, burst: int, pauses: list[float], ahead: int) -> None:
    """There is a token after what ``wait_s`` says and not before, also once others who were there first had theirs."""
    bucket = Bucket(Rate.of(per_second, burst))
    now = NOON
    for now in times_of(pauses):
        bucket.take(now)
    wait_s = bucket.wait_s(now, ahead)
    had = passed(bucket, [now] * (ahead + 1))
    assert (len(had) == ahead + 1) == (wait_s == 0.0)
    for _ in range(ahead + 1 - len(had)):
        now += bucket.wait_s(now)
        assert not bucket.take(now - 0.1 / per_second)
        assert bucket.take(now)
    assert now - NOON - sum(pauses) <= wait_s + (ahead + 1) / 500 / per_second + 1e-5


def test_without_a_limit() -> None:
    """A rate of 0 is none: as much as anybody likes, and nothing is remembered."""
    assert len(passed(Bucket(Rate.of(0)), [NOON] * 10_000)) == 10_000
    assert Bucket(Rate.of(0)).wait_s(NOON, ahead=10_000) == 0.0
    quotas = Quotas(0, lambda key, count: pytest.fail("expected no word"))
    assert all(quotas.take(ANN, NOON) for _ in range(10_000))
    quotas.heard(ANN, 10**9, NOON)
    assert (quotas.take(ANN, NOON), len(quotas)) == (True, 0)


# --- over processes -----------------------------------------------------------------------
class Crowd:
    """Some processes that hear each other at once, a word at a time, or not at all."""

    def __init__(self, count: int, per_second: int, *, deaf: bool = False) -> None:
        self.now = NOON
        self.words = 0
        self._deaf = deaf
        self.quotas = [Quotas(per_second, lambda key, spent, me=me: self._tell(me, key, spent)) for me in range(count)]  # type: ignore[misc]

    def _tell(self, me: int, key: Key, count: int) -> None:
        self.words += 1
        for other, quotas in enumerate(self.quotas):
            if other != me and not self._deaf:
                quotas.heard(key, count, self.now)

    def publish(self, at: int, times: int) -> int:
        """How many of so many publications at one moment get through at a process."""
        return sum(self.quotas[at].take(ANN, self.now) for _ in range(times))


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("per_second", [1, 7, 50, 200])
def test_one_process_has_the_whole_rate(count: int, per_second: int) -> None:
    """Who is connected to one process gets all that was promised, however many processes there are."""
    crowd = Crowd(count, per_second)
    assert crowd.publish(0, 3 * per_second) == per_second
    crowd.now += 1
    assert crowd.publish(0, 3 * per_second) == per_second


@pytest.mark.parametrize("count", [2, 5, 8])
@pytest.mark.parametrize("per_second", [8, 50, 200])
def test_many_processes_let_through_little_more(count: int, per_second: int) -> None:
    """PROTOCOL 18.0.5: in a second at most the rate times 1 + (N - 1)/8, over ten of them hardly more than the rate."""
    crowd = Crowd(count, per_second)
    total = most = 0
    for second in range(10):
        let = 0
        for tick in range(20):
            crowd.now = NOON + second + tick / 20
            let += sum(crowd.publish(at, per_second // 4) for at in range(count))
        total += let
        most = max(most, let)
        if second:  # the first second has the burst as well
            assert let <= per_second * (1 + (count - 1) / TOLD_PART) + count
    assert total <= per_second * 11 + count * math.ceil(per_second / TOLD_PART)
    assert total >= per_second * 5, "what is promised to a user is not eaten up by words"


def test_who_does_not_hear_counts_for_itself() -> None:
    """With the broker away each process keeps to the rate, N of them to N times the rate."""
    crowd = Crowd(3, 50, deaf=True)
    assert [crowd.publish(at, 200) for at in range(3)] == [50, 50, 50]


def test_few_words_are_said() -> None:
    """A second at full rate is told in eight words, one publication now and then in none."""
    crowd = Crowd(2, 200)
    crowd.publish(0, 200)
    assert crowd.words == TOLD_PART
    crowd = Crowd(2, 200)
    for _ in range(20):
        crowd.now += 10
        assert crowd.publish(0, 1) == 1
        crowd.quotas[0].forget(crowd.now + 5)
    assert crowd.words == 0


@given(st.lists(st.integers(-5, 10**12), max_size=20))
def test_what_others_say_locks_nobody_out(counts: list[int]) -> None:
    """However much others claim to have spent, or say again, a user waits no longer than two seconds."""
    quotas = Quotas(10, lambda key, count: None)
    for count in counts:
        quotas.heard(ANN, count, NOON)
    assert quotas.take(ANN, NOON + 2.2)


def test_full_buckets_are_forgotten() -> None:
    """Nothing is kept of those who have not published for a while; who has just done so is remembered."""
    quotas = Quotas(10, lambda key, count: None)
    for number in range(1_000):
        quotas.take((f"user {number}", "live:1"), NOON)
    quotas.take(ANN, NOON + 2)
    quotas.forget(NOON + 2)
    assert len(quotas) == 1
    assert sum(quotas.take(ANN, NOON + 2) for _ in range(20)) == 9


def test_a_clock_that_is_set_back() -> None:
    """When the clock was set back by a day nobody waits for a day."""
    quotas = Quotas(10, lambda key, count: None)
    assert sum(quotas.take(ANN, NOON) for _ in range(20)) == 10
    quotas.rewind(86_400)
    assert not quotas.take(ANN, NOON - 86_400)
    assert quotas.take(ANN, NOON - 86_400 + 1)


# --- addresses ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("nonsense", "nonsense"),
        ("", ""),
    ],
)
def test_hosts(address: str, host: str) -> None:
    """An IPv6 host has a whole network of addresses; what is no address stands for itself."""
    assert network(address) == host
