"""Who has been told to go by when.  PROTOCOL 17.0.3."""

from hypothesis import given
from hypothesis import strategies as st

from server.leaving import PACED_PART, due


def test_the_pace_is_held() -> None:
    """Ten a second are ten a second, beginning with one at once."""
    assert [due(100, elapsed, 10, 30.0) for elapsed in (0.0, 0.09, 0.1, 1.0, 2.05)] == [1, 1, 2, 11, 21]


def test_no_pace_is_all_at_once() -> None:
    """Without a pace, or without any time, everybody is told in the first moment."""
    assert due(5_000, 0.0, 0, 30.0) == 5_000
    assert due(5_000, 0.0, 10, 0.0) == 5_000


@given(st.integers(0, 10**6), st.floats(0, 40), st.floats(0, 40), st.integers(0, 10**4), st.floats(0.001, 60))
def test_everybody_is_out_in_time(clients: int, one: float, other: float, pace: int, timeout_s: float) -> None:
    """However many there are: nobody is counted twice, nobody is taken back, and all are told within the paced part."""
    earlier, later = sorted((one, other))
    assert 0 <= due(clients, earlier, pace, timeout_s) <= due(clients, later, pace, timeout_s) <= clients
    assert due(clients, timeout_s * PACED_PART, pace, timeout_s) >= clients - 1
    assert due(clients, timeout_s, pace, timeout_s) == clients
