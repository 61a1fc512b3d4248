"""From samples of the stack to shares of time and a flame graph."""

import xml.etree.ElementTree as ET

import pytest

from benchmarks import stacks

RAW = """\
run (run.py:10);loop (base.py:5);write (outboxes.py:7) 6
run (run.py:10);loop (base.py:6);write (outboxes.py:9) 2
run (run.py:12);loop (base.py:6) 1
run (run.py:10);loop (base.py:6);loop (base.py:6) 1
thread (threading.py:1);_worker (concurrent/futures/thread.py:81) 500

"""


def test_lines_of_one_function_are_one_and_the_idle_are_left_out() -> None:
    """Stacks that differ by lines only are added up; a thread that waits for work is not at work."""
    assert stacks.parse(RAW) == {
        ("run (run.py)", "loop (base.py)", "write (outboxes.py)"): 8,
        ("run (run.py)", "loop (base.py)"): 1,
        ("run (run.py)", "loop (base.py)", "loop (base.py)"): 1,
    }


def test_a_function_has_its_own_share_and_that_of_what_it_calls() -> None:
    """Own shares add up to all; one that calls itself is not counted twice."""
    found = {share.name: share for share in stacks.shares(stacks.parse(RAW))}
    assert sum(share.own for share in found.values()) == pytest.approx(1)
    assert found["loop (base.py)"] == ("loop (base.py)", pytest.approx(0.2), pytest.approx(1.0))
    assert found["write (outboxes.py)"].own == pytest.approx(0.8)
    assert next(iter(found)) == "write (outboxes.py)", "the greatest first"


def test_one_can_ask_below_a_function() -> None:
    """The shares below a function are of its time only."""
    assert "80.0" in stacks.top(stacks.parse(RAW), 1)
    assert stacks.under(stacks.parse(RAW), "write").splitlines()[2].split("|")[2].strip() == "100.0"
    assert stacks.under(stacks.parse(RAW), "sing") == "nothing is called sing"


def test_the_flame_is_as_wide_as_the_time() -> None:
    """Each function is a box, as wide as its share, with its name; names are escaped."""
    drawn = stacks.flame(stacks.parse(RAW.replace("write", "<lambda>")), "a & b")
    root = ET.fromstring(drawn)
    boxes = {
        group[0].text: float(group[1].get("width", "0"))
        for group in root
        if group.tag.endswith("}g") and group[0].text is not None
    }
    assert boxes["run (run.py) 100.0 %"] == pytest.approx(stacks.WIDTH, abs=1)
    assert boxes["<lambda> (outboxes.py) 80.0 %"] == pytest.approx(0.8 * stacks.WIDTH, abs=1)
    assert len(boxes) == 4
