"""Patches (PROTOCOL 12) against a decoder written from the format's description, and against a count of work."""

import random
import sys
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.delta import DIGITS, LONGEST, MOST, SHORTEST, create

SENTENCE = b'{"x":1,"text":"the quick brown fox jumps"}'


def apply(base: bytes, patch: bytes) -> tuple[bytes, list[bytes]]:
    """What a patch makes of its base, checked as clients check it, and the runs that it inserts."""
    at = 0

    def number(ended_by: bytes) -> int:
        nonlocal at
        end = next(place for place in range(at, len(patch)) if patch[place] not in DIGITS)
        assert at < end, (patch, at)
        assert patch[end] in ended_by, (patch, end)
        value = 0
        for digit in patch[at:end]:
            value = value * 64 + DIGITS.index(digit)
        at = end + 1
        return value

    size, result, inserted = number(b"\n"), b"", []
    while True:
        value = number(b"@:;")
        match patch[at - 1 : at]:
            case b"@":
                source = number(b",")
                assert 0 < value <= len(base) - source
                result += base[source : source + value]
            case b":":
                assert 0 < value < len(patch) - at
                inserted.append(patch[at : at + value])
                result += inserted[-1]
                at += value
            case _:
                break
    assert (at, len(result)) == (len(patch), size)
    filled = result + b"\0" * (-size % 4)
    words = [int.from_bytes(filled[place : place + 4], "big") for place in range(0, len(filled), 4)]
    assert value == sum(words) % 2**32
    return result, inserted


def patched(base: bytes, target: bytes, *, text: bool = False) -> bytes:
    """A patch that was checked: it is shorter, makes the target, and inserts whole characters if it is text."""
    patch = create(base, target, text=text)
    assert patch is not None
    assert len(patch) < len(target)
    result, inserted = apply(base, patch)
    assert result == target
    if text:
        patch.decode()
        assert all(run.decode() for run in inserted)
    return patch


def bytecodes(base: bytes, target: bytes) -> int:
    """Instructions of Python that making a patch takes: a measure that no busy machine changes."""
    count = 0

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        create(base, target, text=True)
    finally:
        sys.settrace(before)
    return count


def table(rows: int, seed: int, share: float) -> bytes:
    """A table of which a share of the rows is told by the seed, the others are always the same."""
    fixed, moving = random.Random(1), random.Random(seed)
    text = ""
    for row in range(rows):
        known, new = fixed.randrange(10**6), moving.randrange(10**6)
        text += f'{{"id":{row},"name":"player{row}","x":{new if moving.random() < share else known}}},'
    return text.encode()


# --- round trips ------------------------------------------------------------------

runs = st.text("ab", max_size=40) | st.text(max_size=40)


@st.composite
def edited(draw: st.DrawFn) -> tuple[str, str]:
    """A text of some runs, and what is left of it when runs are changed, moved, lost and repeated."""
    before = draw(st.lists(runs, min_size=1, max_size=12))
    after = [draw(st.sampled_from(before) | runs) if draw(st.booleans()) else run for run in before]
    after += draw(st.lists(st.sampled_from(before), max_size=4))
    return "".join(before), "".join(after)


@given(texts=edited(), text=st.booleans())
@example(texts=("ä" * 30, "ä" * 15 + "ö" + "ä" * 15), text=True)
def test_an_edited_text_comes_back(texts: tuple[str, str], text: bool) -> None:
    """Whatever is changed, moved, lost or repeated, a patch makes exactly the target, in fewer bytes, or is none."""
    base, target = (one.encode() for one in texts)
    if create(base, target, text=text) is not None:
        patched(base, target, text=text)


@given(base=st.binary(max_size=300), target=st.binary(max_size=300), shared=st.binary(max_size=300), text=st.booleans())
def test_any_bytes_come_back(base: bytes, target: bytes, shared: bytes, text: bool) -> None:
    """Bytes that are no text make the target too, also for who asked for whole characters where there are none."""
    base, target = base + shared, target + shared
    patch = create(base, target, text=text)
    if patch is not None:
        assert apply(base, patch)[0] == target


@given(size=st.integers(SHORTEST, 5000), cut=st.integers(0, 5000))
def test_a_word_put_in_anywhere_costs_a_word(size: int, cut: int) -> None:
    """One insertion into a payload of any length is told in its own bytes and 30 more, or in full."""
    base = random.Random(size).randbytes(size)
    target = base[:cut] + b"word" + base[cut:]
    patch = create(base, target, text=False)
    assert len(patch or target) <= min(len(target), len(b"word") + 30)
    assert patch is None or apply(base, patch)[0] == target


# --- what is found ----------------------------------------------------------------


def test_the_worked_example() -> None:
    """The example of the format's description comes out byte by byte."""
    target = SENTENCE.replace(b"1", b"2")
    assert patched(SENTENCE, target, text=True) == b"f\n5@0,1:2_@6,38yUQv;"


def test_the_middle_is_found() -> None:
    """A byte changed near both ends, so that neither beginning nor end helps, leaves one copy of all between."""
    base = table(10, seed=1, share=0)
    target = b"!" + base[1:-1] + b"!"
    assert len(patched(base, target, text=True)) < 25


def test_what_moved_is_found() -> None:
    """Two halves that change places are two copies, whatever the distance."""
    base = random.Random(1).randbytes(40_000)
    assert len(patched(base, base[17_001:] + base[:17_001])) < 30


def test_many_small_changes_are_found() -> None:
    """Values of changing length in the rows of a table cost about their own bytes, not their rows."""
    base, target = table(60, seed=2, share=0.5), table(60, seed=3, share=0.5)
    changed = sum(old != new for old, new in zip(base.split(b"{"), target.split(b"{"), strict=True))
    assert changed > 30
    assert len(patched(base, target, text=True)) < changed * 16 + 20


def test_a_shared_byte_of_two_characters_is_not_shared() -> None:
    """Two letters with the same first byte, or the same last one: the copies on both sides end a character earlier."""
    around = "so that there is something to copy "
    for old, new in (("ä", "ö"), ("ä", "Ĥ"), ("日", "旦"), ("🙂", "🙃")):
        base, target = (f"{around}{one}{around}".encode() for one in (old, new))
        assert apply(base, patched(base, target, text=True))[1] == [new.encode()]


def test_characters_may_begin_in_the_middle_of_others() -> None:
    """What is copied need not be whole characters where it came from, if it is where it goes to."""
    common = "一二三四五六七八九十" * 3
    base = b"\xe4" + common.encode() + b"\xb8"
    target = f"«{common}»".encode()
    assert apply(base, patched(base, target, text=True))[1] == ["«".encode(), "»".encode()]


# --- where there is none ----------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "target"),
    [
        (b"", b"what nobody has heard of before"),
        (b"what is forgotten now, to the last word", b""),
        (b"0123456789abcdefghijklmnopqrstuvwxyz", b"zyxwvutsrqponmlkjihgfedcba9876543210"),
        (b"1", b"1"),
        (b"a" * SHORTEST, b"a" * (SHORTEST - 1)),
    ],
    ids=["no base", "nothing", "nothing in common", "tiny", "short"],
)
@pytest.mark.parametrize("text", [True, False], ids=["text", "bytes"])
def test_no_patch(base: bytes, target: bytes, text: bool) -> None:
    """Where a patch would not be shorter than what it makes there is none."""
    assert create(base, target, text=text) is None


def test_the_same_again_is_one_copy() -> None:
    """A payload that is repeated costs its size, one order and its checksum."""
    assert patched(SENTENCE, SENTENCE, text=True) == b"f\nf@0,38yEQv;"


def test_the_largest() -> None:
    """``LONGEST`` bytes are patched, one more on either side is not."""
    largest = random.Random(1).randbytes(LONGEST)
    assert len(patched(largest, largest[:-1])) < 25
    assert create(largest, largest + b"!", text=False) is None
    assert create(largest + b"!", largest, text=False) is None


# --- how much work it is ------------------------------------------------------------


def pairs(size: int) -> dict[str, tuple[bytes, bytes]]:
    """Payloads of a size that are as hard as we can think of."""
    chance = random.Random(size)
    return {
        "equal bytes": (b"a" * size, b"a" * (size // 2) + b"b" + b"a" * (size // 2)),
        "other equal bytes": (b"a" * size, b"b" * size),
        "a period that nearly fits": (b"abcdefghijk" * (size // 11), b"abcdefghijl" * (size // 11)),
        "a period just as long as a block": (b"abcdefghijkl" * (size // 12), b"abcdefghijklm" * (size // 13)),
        "continuations without a beginning": (b"\x80" * size, b"\x80" * (size // 2) + b"\x81" + b"\x80" * (size // 2)),
        "random bytes": (chance.randbytes(size), chance.randbytes(size)),
        "random digits": tuple(bytes(chance.choices(b"0123456789", k=size)) for _ in range(2)),
        "all rows changed": (table(size // 40, 5, 1)[:size], table(size // 40, 6, 1)[:size]),
    }


@pytest.mark.parametrize("name", pairs(0))
def test_the_work_is_bounded_by_the_length(name: str) -> None:
    """Twice the payload is twice the work or a little more, and never above 40 instructions a byte."""
    one, two = (bytecodes(*pairs(size)[name]) for size in (32_768, 65_536))
    assert two < 2.2 * one + 10_000
    assert two < 40 * 65_536


def test_what_has_not_changed_costs_nothing() -> None:
    """A word put into the middle of 128 KB takes the work that it takes in 1 KB, but for a few more steps."""
    costs = []
    for size in (1024, LONGEST - 16):
        base = random.Random(1).randbytes(size)
        costs.append(bytecodes(base, base[: size // 2] + b"word" + base[size // 2 :]))
    assert costs[1] < costs[0] + 2000


def test_nothing_in_common_costs_little() -> None:
    """64 KB of random bytes are given up after some hundred look-ups."""
    costs = bytecodes(*pairs(65_536)["random bytes"])
    assert costs < 4 * 65_536


def test_a_patch_has_so_many_copies_and_no_more() -> None:
    """Behind ``MOST`` copies the rest is inserted, but for the end; the patch is right, and still shorter."""
    chance = random.Random(1)
    rows = [chance.randbytes(20).replace(b"@", b"!") for _ in range(2 * MOST)]
    base, target = (mark.join(rows) + b"the same end" for mark in (b",", b";"))
    orders = patched(base, target).count(b"@")
    assert MOST <= orders <= MOST + 2
